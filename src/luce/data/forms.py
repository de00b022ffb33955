"""The forms in which people have rows and labels: those that can be read, and a way out for the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset

from ..errors import UserError, one_line
from ..labels import UNLABELLED

NUMBERED = "number the classes 0 .. C-1, such as with `torch.unique(labels, return_inverse=True)[1]`"
"""How labels of any size become class indices."""


def count_rows(dataset: Any) -> int:
    """Return the length of a dataset.

    Raises:
        UserError: If it has none or is not read by index; with the way out.
    """
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
        try:
            return len(dataset)
        except Exception as error:  # of the user's own code: anything
            raise UserError(
                f"cannot tell the length of the dataset `{type(dataset).__name__}`, whose `__len__` raised "
                f"{type(error).__name__}: {one_line(error)}"
            ) from error
    kind = dataset.__name__ if isinstance(dataset, type) else type(dataset).__name__
    raise UserError(
        f"expected a map-style dataset with items (input, label), or a pair of arrays (inputs, labels), "
        f"got {kind}; {way}"
    )


def stated_classes(dataset: Any) -> tuple[str, ...] | None:
    """Return the class names that a dataset states as ``classes``, in the order of its labels; None without.

    Those of a ``Subset`` are those of the whole, and the parts of a ``ConcatDataset`` must agree.

    Raises:
        UserError: If parts number the classes differently.
    """
    if isinstance(dataset, Subset):
        return stated_classes(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        parts = [stated_classes(part) for part in dataset.datasets]
        for other in parts[1:]:
            check_same_classes(parts[0], other, "the parts of a dataset")
        return max((part for part in parts if part), key=len, default=None)
    names = getattr(dataset, "classes", None)
    if not isinstance(names, Sequence) or isinstance(names, str):
        return None
    if getattr(dataset, "target_transform", None) is not None:  # torchvision's changes labels, not names
        return None
    numbers = getattr(dataset, "class_to_idx", None)  # of torchvision, where it decides on the labels
    if isinstance(numbers, Mapping) and sorted(numbers.values()) == list(range(len(names))):
        names = sorted(numbers, key=numbers.__getitem__)
    return tuple(map(str, names))


def check_same_classes(one: Sequence[str] | None, other: Sequence[str] | None, where: str) -> None:
    """Raise UserError if two lists of class names, where both are known, give a number to two classes."""
    for place, (name, another) in enumerate(zip(one or (), other or (), strict=False)):
        if name != another:
            raise UserError(
                f"expected {where} to number the classes alike, got `{name}` and `{another}` for class "
                f"{place}; give both the same `classes` and `class_to_idx`, such as folders of the same names"
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
    if isinstance(values, Tensor) and values.is_nested:
        way = "pad it with `to_padded_tensor()`"
    elif isinstance(values, Tensor) and values.is_meta:
        way = "it has no values: load it on a device"
    elif isinstance(values, Tensor) and values.layout == torch.strided:
        plain = values.device.type == "cpu" and not values.requires_grad
        return values if plain else values.detach().cpu()
    elif isinstance(values, Tensor):
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
    indices = values if real else values.long()
    too_large = values.dtype == torch.uint64 and bool((indices < 0).any())
    if values.ndim == 1 and not too_large and (not real or not len(values)):
        return indices.long()
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
    if not values.is_floating_point():
        return "some are above 2**63 - 1, as -1 becomes without a sign; " + NUMBERED
    if bool(values.isnan().any()):
        return f"give {UNLABELLED} where there is no label (label {int(values.isnan().nonzero()[0])} is nan)"
    if bool((values == values.round()).all()):
        return "convert the whole numbers with `labels.long()`"
    return f"{values[values != values.round()][0]:g} is no class: numbers to be predicted are not supported"


def _names(mapping: Mapping[Any, Any]) -> str:
    names = [f"`{name}`" for name in mapping]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "no key"
