#!/usr/bin/env bash
# Build and train a recipe on this machine:
#   launch/train.sh RECIPE [key=value...]
# The processes, the ZeRO stage and everything else stand in the recipe; `mlalign train` starts the
# deepspeed launcher with them.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

if [ $# -lt 1 ]; then
    echo "usage: launch/train.sh RECIPE [key=value...]" >&2
    exit 2
fi
if [ -x "$here/.venv/bin/mlalign" ]; then
    export PATH="$here/.venv/bin:$PATH"
fi
exec mlalign train "$@"
