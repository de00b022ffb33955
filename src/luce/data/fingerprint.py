"""Digests of rows, so that a training can tell whether its data changed."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from .. import digest, log
from .examples import Examples
from .sources import InMemory, LazyImages, Part, Source, Wrapped

SAMPLE = 64
"""Rows that are read where reading all would take too long."""
AGAIN = 16
"""Of these, rows that are read twice, to find out whether reading them is repeatable."""
OPENED = 2**15
"""Files whose content is looked at, evenly spaced; names and sizes count of all files."""
BYTES = 2**26
"""Of the content of all opened files together: small folders are read as a whole."""
TAIL = 256
"""Least number of bytes at the end of a file. Compressed images change there with any pixel."""
NESTING = 4
"""Datasets within datasets that are followed."""


def of_rows(rows: Examples, inputs: str | None) -> dict[str, Any]:
    """Describe rows: their number, and digests of labels, of their order in the source, and of its inputs.

    Args:
        rows: To be described.
        inputs: From `of_source`, for their source.
    """
    return {
        "rows": len(rows),
        "labels": _of_values(rows.targets),
        "order": _of_values(rows.indices),
        "inputs": inputs,
    }


def of_source(source: Source) -> str | None:
    """Digest the inputs of a source, in their order; None if reading a row twice gives two inputs.

    Rows in memory count in full. Of image files count all names and sizes, and the last bytes of up to
    `OPENED` files; times of modification do not, so that a copy is equal. Of other datasets count the tensors
    and arrays that they hold, and `SAMPLE` rows, which are read under fixed seeds: random transforms count as
    well. No random state is moved.
    """
    if isinstance(source, InMemory):
        return _of_values(source.inputs)
    if isinstance(source, Part):
        whole = of_source(source.source)
        return None if whole is None else digest.of_json([whole, _of_values(source.indices)])
    if isinstance(source, LazyImages) and source.files is not None:
        # Not the images: decoders differ in the last bit between machines.
        return digest.of_json([of_files(*source.files), _of_transform(source.transform)])
    sampled = _of_sample(source)
    content = _of_dataset(source.dataset) if isinstance(source, Wrapped) else None
    return None if sampled is None else digest.of_json([content, sampled])


def of_files(folder: Path | str, names: Sequence[Any] | np.ndarray) -> str:
    """Digest names and sizes of files, and the last bytes of evenly spaced ones.

    Args:
        folder: That holds them; its own name does not count.
        names: Text or bytes, relative to the folder.
    Raises:
        OSError: If a file cannot be read.
    """
    root = os.fsencode(folder)
    paths = [os.path.join(root, os.fsencode(name)) for name in names]
    sizes = [os.stat(path).st_size for path in paths]
    step = max(1, -(-len(paths) // OPENED))
    share = max(TAIL, BYTES // max(1, -(-len(paths) // step)))
    tails = (_tail(path, size, share) for path, size in zip(paths[::step], sizes[::step], strict=True))
    listed = (os.fsencode(name) + b"\0%d\0" % size for name, size in zip(names, sizes, strict=True))
    return digest.of_bytes(*listed, *tails)


def _tail(path: bytes, size: int, share: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        file.seek(max(0, size - share))
        return file.read(share)


def _of_transform(transform: Any) -> list[str]:
    if isinstance(transform, partial):
        return [*_of_transform(transform.func), repr(transform.args), repr(transform.keywords)]
    return [getattr(transform, "__qualname__", type(transform).__qualname__)]


def _of_sample(source: Source) -> list[str] | None:
    """Digest evenly spaced rows; None if reading them is not repeatable."""
    step = max(1, -(-len(source) // SAMPLE))
    chosen = range(0, len(source), step)
    with _own_random_state():
        sampled = [_of_row(source, row) for row in chosen]
        repeated = [_of_row(source, row) for row in chosen[:AGAIN]]
    if repeated == sampled[:AGAIN]:
        return sampled
    name = type(source.dataset if isinstance(source, Wrapped) else source).__name__
    log.info(
        f"rows of {name} differ each time they are read, even under fixed seeds: whether its inputs changed "
        "cannot be told when a folder is used again"
    )
    return None


def _of_row(source: Source, row: int) -> str:
    torch.default_generator.manual_seed(row)  # `torch.manual_seed` would seed the accelerators too
    np.random.seed(row)
    random.seed(row)
    return _of_values(source.read(row))


@contextmanager
def _own_random_state() -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch's CPU generator after a block."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _of_dataset(dataset: Any, nesting: int = NESTING) -> Any:
    """Digest what a dataset holds in tensors, arrays and files; nested lists."""
    name = type(dataset).__qualname__
    if isinstance(dataset, Source):
        return [name, of_source(dataset)]
    if isinstance(dataset, list | tuple):
        parts = [part for item in dataset for part in (item if isinstance(item, list | tuple) else [item])]
        return [name, [_of_values(part) for part in parts if isinstance(part, Tensor | np.ndarray)]]
    if isinstance(dataset, Subset):
        return [name, _of_dataset(dataset.dataset, nesting - 1), list(map(int, dataset.indices))]
    if isinstance(dataset, ConcatDataset):
        return [name, [_of_dataset(part, nesting - 1) for part in dataset.datasets]]
    held: dict[str, Any] = {}
    for key, value in sorted(getattr(dataset, "__dict__", {}).items()):
        if key == "samples" and _lists_files(value):  # torchvision's ImageFolder and its kin
            paths = [os.path.abspath(path) for path, *_ in value]
            root = os.path.commonpath([os.path.dirname(path) for path in paths])
            held[key] = of_files(root, [path[len(root) :].lstrip(os.sep) for path in paths])
        elif isinstance(value, Tensor | np.ndarray):
            held[key] = _of_values(value)
        elif isinstance(value, Dataset) and nesting:
            held[key] = _of_dataset(value, nesting - 1)
        elif key == "tensors":  # of a `TensorDataset`
            held[key] = [_of_values(part) for part in value]
    return [name, held]


def _lists_files(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], tuple)
        and isinstance(value[0][0], str)
        and os.path.isfile(value[0][0])
    )


def _of_values(values: Tensor | np.ndarray) -> str:
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "biuf":
            return digest.of_bytes(repr((values.dtype, values.shape)).encode())
        values = torch.from_numpy(np.ascontiguousarray(values).view(np.uint8))
    return digest.of_tensors({"": values})
