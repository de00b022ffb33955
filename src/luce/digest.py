"""Digests: short names that two things share only if their content is the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

BYTES = 16
"""Of a digest: the first ones of SHA-256, for which processors have instructions.

Of 2**32 different things no two share them, but for a probability of 2**-65.
"""
CHUNK = 2**20


def of_json(content: Any) -> str:
    """Digest plain values; the order of a mapping's keys does not count.

    >>> of_json({"a": 1, "b": [2]}) == of_json({"b": [2], "a": 1})
    True
    """
    return of_bytes(json.dumps(content, sort_keys=True).encode())


def of_bytes(*parts: bytes | memoryview) -> str:
    """Digest bytes; several parts count as one.

    >>> of_bytes(b"worth") == of_bytes(b"wo", b"rth")
    True
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[: 2 * BYTES]


def of_file(path: Path) -> str:
    """Digest the content of a file.

    Raises:
        OSError: If it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()[: 2 * BYTES]


def of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Digest names, dtypes, shapes and values of tensors; their order does not count.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 2)
        >>> of_tensors(layer.state_dict()) == of_tensors(dict(reversed(layer.state_dict().items())))
        True
    """
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[: 2 * BYTES]
