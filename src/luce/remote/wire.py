"""The wire format: JSON, with arrays as nested lists or as base64; see docs/black-box.md."""

from __future__ import annotations

import base64
import json
import math
from typing import Any, NoReturn

import numpy as np

from ..documents import unique

DTYPES = {"float32": "<f4", "uint8": "|u1", "int64": "<i8"}
"""NumPy dtypes of arrays in base64 by name; all little-endian."""

DIMENSIONS = 16
"""Most dimensions of an array in base64."""

PROTOCOL = 1


def parse(content: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ValueError: On anything else, including ``NaN`` and ``Infinity``, which are not JSON.
    """
    try:
        value = json.loads(content, parse_constant=_no_json, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON, got {quote(content)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {quote(content)}")
    return value


def _no_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def quote(content: bytes) -> str:
    """Quote the beginning of an unexpected response, for a message."""
    if not content:
        return "nothing"
    text = " ".join(content[:60].decode("utf-8", errors="replace").split())
    return f"`{text}{' ...' if len(content) > 60 else ''}`"


def pack(array: np.ndarray) -> dict[str, Any]:
    """Encode an array as base64.

    >>> pack(np.array([[1, 2]], dtype=np.uint8))
    {'dtype': 'uint8', 'shape': [1, 2], 'base64': 'AQI='}
    """
    data = array.astype(DTYPES[array.dtype.name], copy=False).tobytes()
    return {
        "dtype": array.dtype.name,
        "shape": list(array.shape),
        "base64": base64.b64encode(data).decode("ascii"),
    }


def unpack(value: object) -> np.ndarray:
    """Decode an array of finite numbers from nested lists (to float64 or int64) or from the form of `pack`.

    Raises:
        ValueError: On anything else.
    Example:
        >>> unpack({"dtype": "uint8", "shape": [1, 2], "base64": "AQI="})
        array([[1, 2]], dtype=uint8)
        >>> unpack([[1.5, 2]])
        array([[1.5, 2. ]])
    """
    array = _from_base64(value) if isinstance(value, dict) else _from_lists(value)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError("expected finite numbers, got NaN or infinity")
    return array


def _from_lists(value: object) -> np.ndarray:
    if not isinstance(value, list):
        raise ValueError(f"expected nested lists or an object with `base64`, got {type(value).__name__}")
    try:
        array = np.array(value)
    except (ValueError, OverflowError, RecursionError) as error:
        raise ValueError("expected lists of equal lengths at each depth") from error
    if array.dtype.kind not in "if":
        raise ValueError("expected numbers in the nested lists")
    return array


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _from_base64(value: dict[str, Any]) -> np.ndarray:
    dtype, shape, text = (value.get(name) for name in ("dtype", "shape", "base64"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"expected a `dtype` among {', '.join(DTYPES)}")
    # Few sizes, as the product of a million of them takes minutes.
    if not (isinstance(shape, list) and len(shape) <= DIMENSIONS and all(map(_is_size, shape))):
        raise ValueError(f"expected `shape` as a list of at most {DIMENSIONS} sizes")
    if math.prod(size or 1 for size in shape) >= 2**48:  # NumPy refuses it, even if one size is 0
        raise ValueError(f"expected an array of fewer than 2**48 numbers in `shape`, got {shape}")
    if not isinstance(text, str):
        raise ValueError("expected `base64` as a string")
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError("expected `base64` without other characters") from error
    numpy_dtype = np.dtype(DTYPES[dtype])
    if len(data) != math.prod(shape) * numpy_dtype.itemsize:
        raise ValueError(f"expected the bytes of {dtype} in `shape` {shape[:8]}, got {len(data)}")
    return np.frombuffer(data, dtype=numpy_dtype).reshape(shape)
