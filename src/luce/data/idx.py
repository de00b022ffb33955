"""The IDX format of MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

UNSIGNED_BYTE = 0x08


def read_idx(path: Path, dims: int) -> Tensor:
    """Read an IDX file of unsigned bytes, gzipped if its name ends in ``.gz``.

    The header is two zero bytes, the type code, the number of dimensions, and each dimension's size as a
    big-endian 32-bit integer; the values follow in row-major order.

    Args:
        path: File to read.
        dims: Expected number of dimensions: 3 for images, 1 for labels.

    Returns:
        A uint8 tensor of the shape in the header.

    Raises:
        UserError: If the file is missing or damaged, or its type, number of dimensions or length is wrong.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"expected an IDX file at {path}, got none") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a complete gzip file ({error}); download it again") from error
    magic, header = bytes([0, 0, UNSIGNED_BYTE, dims]), 4 + 4 * dims
    if content[:4] != magic:
        raise UserError(
            f"expected {path} to be an IDX file of unsigned bytes with {dims} dimension(s), "
            f"starting with {magic.hex()}, got {content[:4].hex() or 'an empty file'}"
        )
    if len(content) < header:
        raise UserError(
            f"expected {path} to have a header of {header} bytes, got {len(content)} bytes in all"
        )
    shape = tuple(np.frombuffer(content, ">u4", dims, offset=4).tolist())
    if len(content) - header != math.prod(shape):
        raise UserError(
            f"expected {math.prod(shape)} bytes of data in {path} for shape {shape}, "
            f"got {len(content) - header}; download it again"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())
