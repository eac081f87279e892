"""Arrays for the page: base64 of small integers, which the page's script turns back into numbers.

A number keeps 1/65,000 (two bytes) or 1/250 (one byte) of its array's range; the page shows three
digits. JSON would take two to four times as much.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

Packed = dict[str, Any]
"""``min``, ``step`` (float), ``bytes`` (1 or 2), ``data`` (base64). The largest code is NaN."""


def pack(values: np.ndarray, width: int = 2) -> Packed | None:
    """The array, flattened; None where it holds no finite number. ``width``: bytes per number."""
    flat = np.asarray(values, dtype=np.float64).ravel()
    finite = np.isfinite(flat)
    if not finite.any():
        return None
    most = 256**width - 2
    low, high = float(flat[finite].min()), float(flat[finite].max())
    step = (high - low) / most or 1.0
    codes = np.full(flat.shape, most + 1, dtype=np.float64)
    codes[finite] = np.round((flat[finite] - low) / step)
    data = codes.astype("<u2" if width == 2 else "u1").tobytes()
    return {
        "min": low,
        "step": step,
        "bytes": width,
        "data": base64.b64encode(data).decode(),
    }


def pack_indices(values: list[int]) -> Packed:
    """Whole numbers below 65,535, exactly."""
    data = base64.b64encode(np.asarray(values, dtype="<u2").tobytes()).decode()
    return {"min": 0.0, "step": 1.0, "bytes": 2, "data": data}


def unpack(packed: Packed) -> np.ndarray:
    """What the page's script makes of it: flat float64, NaN where there was none."""
    codes = np.frombuffer(
        base64.b64decode(packed["data"]), dtype="<u2" if packed["bytes"] == 2 else "u1"
    ).astype(np.float64)
    codes[codes == 256 ** packed["bytes"] - 1] = np.nan
    return packed["min"] + codes * packed["step"]


def size(value: Any) -> int:
    """Bytes that the packed arrays inside take on the page."""
    if isinstance(value, dict):
        return len(value["data"]) if "data" in value else sum(size(v) for v in value.values())
    return sum(size(v) for v in value) if isinstance(value, (list, tuple)) else 0
