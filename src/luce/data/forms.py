"""The forms in which people have rows and labels: those that can be read, and a way out for the others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ..errors import UserError
from ..labels import UNLABELLED

NUMBERED = "number the classes 0 .. C-1, such as with `torch.unique(labels, return_inverse=True)[1]`"
"""How labels of any size become class indices."""


def check_rows(dataset: Any) -> None:
    """Raise UserError, with the way out, unless a dataset has a length and is read by index."""
    if isinstance(dataset, DataLoader):
        way = "give the dataset that it loads, `loader.dataset`"
    elif isinstance(dataset, str | Path):
        way = "read it first, for example with `luce.data.load(name).train`"
    elif isinstance(dataset, IterableDataset) or hasattr(dataset, "__next__"):
        way = "its rows cannot be read by index: collect them in a list"
    elif hasattr(dataset, "columns") and hasattr(dataset, "to_numpy"):
        way = "give (inputs, labels), such as (frame[names].to_numpy(), frame[name].to_numpy())"
    elif isinstance(dataset, Mapping):
        way = f"give one of its values, or a pair of arrays (inputs, labels); it has {_names(dataset)}"
    elif isinstance(dataset, Tensor | np.ndarray):
        way = "give labels too, as (inputs, labels)"
    elif isinstance(dataset, type):
        way = "make an instance of the class"
    elif hasattr(dataset, "train") and hasattr(dataset, "test"):
        way = "give its `train`"
    elif not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        way = "give it `__len__` and `__getitem__`"
    else:
        return
    kind = dataset.__name__ if isinstance(dataset, type) else type(dataset).__name__
    raise UserError(
        f"expected a map-style dataset with items (input, label), or a pair of arrays (inputs, labels), "
        f"got {kind}; {way}"
    )


def pair_of(item: Any, index: int) -> tuple[Any, Any]:
    """Return input and label of an item, a pair or a dict with ``input`` and ``target``.

    Raises:
        UserError: If it has another form.
    """
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    if isinstance(item, Mapping):
        if {"input", "target"} <= item.keys():
            return item["input"], item["target"]
        got, way = f"a dict with {_names(item)}", "rename its keys"
    elif isinstance(item, tuple | list):
        got, way = f"a {type(item).__name__} of {len(item)}", "return the input and its label"
    else:
        got, way = type(item).__name__, "return the input together with its label"
    raise UserError(
        f"expected item {index} of the dataset to be (input, label) or a dict with `input` and `target`, "
        f"got {got}; {way}"
    )


def as_tensor(values: Any, what: str) -> Tensor:
    """Return a tensor or an array as a tensor on the CPU.

    Raises:
        UserError: If it is something else, or an array of no numbers; it is called ``what``.
    """
    if isinstance(values, Tensor) and values.layout == torch.strided:
        plain = values.device.type == "cpu" and not values.requires_grad
        return values if plain else values.detach().cpu()
    if isinstance(values, Tensor):
        way = "make it dense with `to_dense()`"
    elif np.ma.is_masked(values):
        way = "some values are masked: fill them in"
    elif type(values).__module__.startswith("PIL"):
        way = "give the dataset a transform that makes tensors, such as torchvision's `ToTensor()`"
    elif isinstance(values, Mapping):
        way = f"join {_names(values)} into one tensor"
    elif not hasattr(values, "__array__"):
        way = "let the dataset's transform make it a tensor"
    else:
        array = np.asarray(values)
        try:
            return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))
        except TypeError:
            way = f"it holds {array.dtype}: convert it to numbers"
    raise UserError(f"expected {what} to be a tensor or an array, got {type(values).__name__}; {way}")


def class_index(label: Any, what: str) -> int:
    """Return one label, an integer in any form, as an integer; ``what`` names it in errors."""
    if isinstance(label, int | np.integer | np.bool_) and abs(int(label)) < 2**63:
        return int(label)
    if isinstance(label, Tensor) and label.ndim == 0 and not label.is_floating_point():  # in a microsecond
        return class_index(label.item(), what)
    rows = label[None] if isinstance(label, Tensor | np.ndarray) else [label]
    return int(_indices(rows, f"{what} to be a class index", 1)[0])


def class_indices(labels: Any, what: str = "labels") -> Tensor:
    """Return labels as int64 of shape ``(N,)``.

    Args:
        labels: Integers or booleans, shape ``(N,)`` or ``(N, 1)``, in a tensor, an array or a list.
        what: Names the labels in errors.

    Raises:
        UserError: If they are something else.
    """
    return _indices(labels, f"{what} to be class indices", 0)


def _indices(labels: Any, expected: str, hidden: int) -> Tensor:
    """Return class indices; errors leave out the first ``hidden`` dimensions."""
    try:
        values = labels.detach().cpu() if isinstance(labels, Tensor) else _numbers(labels)
    except (TypeError, ValueError):  # text, None, lists of unequal length
        labels = labels.tolist() if hasattr(labels, "tolist") else labels
        some = ", ".join(map(repr, list(labels)[:3])) if hasattr(labels, "__iter__") else repr(labels)
        raise UserError(
            f"expected {expected}, got {some}; number the classes 0 .. C-1, such as with "
            f"`{{name: i for i, name in enumerate(sorted(set(names)))}}`, and give {UNLABELLED} where there "
            "is no label"
        ) from None
    if values.ndim > 1 and values.shape[1:].numel() == 1:
        values = values.flatten()
    real = values.is_floating_point() or values.is_complex()
    if values.ndim == 1 and (not real or not len(values)):
        return values.long()
    raise UserError(
        f"expected {expected}, got {values.dtype} of shape {tuple(values.shape[hidden:])}; "
        f"{_way_to_indices(values)}"
    )


def _numbers(labels: Any) -> Tensor:
    if np.ma.is_masked(labels):
        raise ValueError("masked labels are missing")
    array = np.array(labels)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


def _way_to_indices(values: Tensor) -> str:
    if values.ndim == 2 and bool((values.sum(1) - 1).abs().max() < 1e-3):
        return "one-hot and soft labels become class indices with `labels.argmax(1)`"
    if values.ndim > 1:
        return "give one class index for each row, as several labels of a row are not supported"
    if values.ndim == 0 or values.is_complex():
        return "give one class index for each row"
    if bool(values.isnan().any()):
        return f"give {UNLABELLED} where there is no label (label {int(values.isnan().nonzero()[0])} is nan)"
    if bool((values == values.round()).all()):
        return "convert the whole numbers with `labels.long()`"
    return f"{values[values != values.round()][0]:g} is no class: numbers to be predicted are not supported"


def _names(mapping: Mapping[Any, Any]) -> str:
    names = [f"`{name}`" for name in mapping]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "no key"
