"""Data sets loaded with Hugging Face ``datasets``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, import_optional, unknown_name
from .dataset import Data, describe, say_rows
from .sources import InMemory, LazyImages, Source
from .text import Tokenizer
from .transforms import evaluation_view, training_view

if TYPE_CHECKING:
    from PIL import Image


def load_hub(
    name: str,
    root: Path | None,
    *,
    config: str | None = None,
    input_column: str | None = None,
    label_column: str | None = None,
    test_split: str | None = None,
    image_size: int | None = None,
    tokenizer: str | None = None,
    max_length: int = 128,
) -> Data:
    """Load images, texts or lists of numbers from the hub or from a folder that ``datasets`` can read.

    Args:
        name: Name or folder, as for ``datasets.load_dataset``.
        root: Cache folder; None uses the one of ``datasets``.
        config: Configuration, if the name has several.
        input_column: Input column. None works if only one column holds images or lists of numbers, or, with
            a tokenizer, if only one holds texts.
        label_column: Label column. None works if only one column is declared as class labels.
        test_split: Name of the test split; None uses ``test`` or, without it, ``validation``.
        image_size: Crops images of any size to this many pixels on demand, as ``imagefolder:`` does; None
            decodes images of equal size into memory.
        tokenizer: Tokenizer of the network, a name on the hub or a folder; converts texts to token ids.
        max_length: Tokens per text; see `luce.data.Tokenizer`.

    Raises:
        UserError: If the data cannot be loaded, or a column or split is missing or ambiguous.
    """
    datasets = import_optional("datasets", "text")
    try:
        splits = datasets.load_dataset(name, config, cache_dir=None if root is None else str(root))
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"`datasets` could not load `{name}`: {reason}") from error
    test_split = test_split or next((s for s in ("test", "validation") if s in splits), "test")
    for split in ("train", test_split):
        if split not in splits:
            raise UserError(
                f"expected a split `{split}` in `{name}`, got {', '.join(splits)}; set `test_split`"
            )

    features = splits["train"].features
    pictures = [c for c, feature in features.items() if isinstance(feature, datasets.Image)]
    numbers = [c for c, feature in features.items() if _is_numbers(feature)]
    texts = [c for c, feature in features.items() if _is_text(feature)]
    labels = [c for c, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if tokenizer is None and (input_column in texts or (texts and not pictures + numbers)):
        raise UserError(
            f"expected a `tokenizer` for the texts in column `{input_column or texts[0]}`; give the name or "
            "the folder of the network's tokenizer"
        )
    tokens = None if tokenizer is None else Tokenizer(tokenizer, max_length)
    candidates = pictures + numbers if tokens is None else texts
    input_column = _choose("input_column", input_column, features, candidates)
    if tokens is not None and input_column not in texts:
        raise UserError(f"expected a column of texts for `tokenizer`, `{input_column}` holds other values")
    label_column = _choose("label_column", label_column, features, labels)

    def source(split: str, views: list[Callable[..., Tensor]]) -> Source:
        rows = splits[split]
        targets = _labels(rows, label_column)
        if tokens is not None:
            return InMemory(tokens(rows[input_column]), targets)
        if input_column not in pictures:
            return InMemory(_numbers(rows, input_column), targets)
        if image_size is None:
            return InMemory(_decoded(rows, input_column), targets)
        transforms = [partial(view, size=image_size) for view in views]
        return LazyImages(partial(_open_cell, rows, input_column), targets, *transforms)

    data = describe(
        f"hf:{name}",
        source("train", [training_view, evaluation_view]),
        source(test_split, [evaluation_view]),
        classes=getattr(features[label_column], "names", None),
        licence=splits["train"].info.license or "unknown",
        tokenizer=tokens,
    )
    return say_rows(data)


def _choose(option: str, column: str | None, columns: Iterable[str], candidates: list[str]) -> str:
    if column is None:
        if len(candidates) == 1:
            return candidates[0]
        reason = f"{len(candidates)} columns fit" if candidates else "no column has a fitting type"
        raise UserError(f"expected `{option}`: {reason}; name one of {', '.join(candidates or columns)}")
    if column not in columns:
        raise unknown_name(f"`{option}`", column, columns)
    return column


def _is_numbers(feature: Any) -> bool:
    """Whether a column holds lists or arrays, of any depth, of numbers."""
    is_list = hasattr(feature, "feature")
    while hasattr(feature, "feature"):
        feature = feature.feature
    return (is_list or hasattr(feature, "shape")) and feature.dtype.startswith(("int", "uint", "float"))


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _labels(rows: Any, column: str) -> Tensor:
    values = _column(rows, column)
    if values.dtype.kind not in "iu":
        raise UserError(
            f"expected class indices in column `{column}`, got {values.dtype}; "
            "number the classes with `class_encode_column` of `datasets`"
        )
    return torch.tensor(values)


def _numbers(rows: Any, column: str) -> Tensor:
    values = _column(rows, column)
    if values.dtype == object:
        raise UserError(f"expected lists of equal length in column `{column}`, got several lengths")
    return torch.from_numpy(values.astype(np.float32))


def _decoded(rows: Any, column: str) -> Tensor:
    images: list[np.ndarray] = []
    for row in rows.select_columns([column]):
        mode = "L" if row[column].mode in ("1", "L") else "RGB"
        images.append(np.atleast_3d(np.asarray(row[column].convert(mode))))
        if images[-1].shape != images[0].shape:
            raise UserError(
                f"expected images of equal size (H, W, C), got {images[0].shape} and {images[-1].shape}; "
                "set `image_size` to crop them"
            )
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _open_cell(rows: Any, column: str, index: int) -> Image.Image:
    image: Image.Image = rows[index][column]
    return image.convert("RGB")


def _column(rows: Any, column: str) -> np.ndarray:
    values: np.ndarray = rows.select_columns([column]).with_format("numpy")[:][column]
    return values
