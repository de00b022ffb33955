"""The IDX format of MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import math
import zlib
from io import BufferedReader
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

UNSIGNED_BYTE = 0x08
LARGEST = 2**30  # bytes of data; twice EMNIST, the largest of MNIST's kin
DEFLATE = 1032  # bytes that one byte of gzip can hold at most


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
        UserError: If the file is missing or damaged, or its type, number of dimensions or length is wrong, or
            its header promises more than 1 GiB.
    """
    try:
        size = path.stat().st_size
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _read(file, path, dims, most=size * DEFLATE if path.suffix == ".gz" else size)
    except FileNotFoundError:
        raise UserError(f"expected an IDX file at {path}, got none") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a complete gzip file ({error}); download it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from error


def _read(file: gzip.GzipFile | BufferedReader, path: Path, dims: int, most: int) -> Tensor:
    magic, header = bytes([0, 0, UNSIGNED_BYTE, dims]), 4 + 4 * dims
    start = file.read(header)
    if start[:4] != magic:
        raise UserError(
            f"expected {path} to be an IDX file of unsigned bytes with {dims} dimension(s), "
            f"starting with {magic.hex()}, got {start[:4].hex() or 'an empty file'}"
        )
    if len(start) < header:
        raise UserError(f"expected {path} to have a header of {header} bytes, got {len(start)} bytes in all")
    shape = tuple(np.frombuffer(start, ">u4", dims, offset=4).tolist())
    size = math.prod(shape)
    if size > LARGEST:
        raise UserError(f"expected at most {LARGEST:,} bytes of data in {path}, its header promises {size:,}")
    content = file.read(min(size, most))  # a short file must not cost the memory that its header promises
    if len(content) < size or file.read(1):
        got = f"{len(content):,}" if len(content) < size else "more"
        raise UserError(
            f"expected {size:,} bytes of data in {path} for shape {shape}, got {got}; download it again"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8).reshape(shape).copy())
