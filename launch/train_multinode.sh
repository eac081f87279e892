#!/usr/bin/env bash
# Train a recipe on every node of a hostfile, started from one of them:
#   launch/train_multinode.sh HOSTFILE RECIPE [key=value...]
# Needs: passwordless ssh to each node, pdsh here, and the same checkout and data at the same path
# on each node. Set MASTER_ADDR or MASTER_PORT where the first host's defaults do not serve.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

if [ $# -lt 2 ]; then
    echo "usage: launch/train_multinode.sh HOSTFILE RECIPE [key=value...]" >&2
    exit 2
fi
hostfile="$1"
shift
if [ ! -f "$hostfile" ]; then
    echo "no hostfile $hostfile; copy launch/hostfile.example and name your nodes" >&2
    exit 2
fi
if [ -x "$here/.venv/bin/deepspeed" ]; then
    export PATH="$here/.venv/bin:$PATH"
fi
address=()
if [ -n "${MASTER_ADDR:-}" ]; then
    address+=(--master_addr "$MASTER_ADDR")
fi
if [ -n "${MASTER_PORT:-}" ]; then
    address+=(--master_port "$MASTER_PORT")
fi
# The launcher hands on only variables that .deepspeed_env names (NCCL_SOCKET_IFNAME=...).
exec deepspeed --hostfile "$hostfile" --force_multi "${address[@]}" --module mlalign.train "$@"
