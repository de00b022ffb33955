"""Data sets loaded with Hugging Face ``datasets``."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..config import name_or_path
from ..errors import UserError, import_optional, one_line, unknown_name
from ..files import reason
from .dataset import Data, describe, say_rows
from .forms import class_indices
from .headers import Headers
from .images import Size, read_image
from .sources import InMemory, LazyImages, Source
from .text import Tokenizer
from .transforms import views

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
    random_crop: bool = False,
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
        image_size: Scales and crops images of any size on demand, as ``imagefolder:`` does; None decodes
            images of equal size into memory, grey ones with one channel.
        random_crop: As for ``imagefolder:``.
        tokenizer: Tokenizer of the network, a name on the hub or a folder; converts texts to token ids.
        max_length: Tokens per text; see `luce.data.Tokenizer`.

    Raises:
        UserError: If the data cannot be loaded, or a column or split is missing or ambiguous.
    """
    datasets = import_optional("datasets", "text")
    try:
        cache = None if root is None else str(root)
        splits = datasets.load_dataset(name_or_path(name), config, cache_dir=cache)
    except Exception as error:  # of readers of files, scripts and connections: anything
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        told = one_line(cause) if isinstance(cause, Exception) else reason(error)
        raise UserError(f"`datasets` could not load `{name}`: {told}") from error
    test_split = test_split or next((s for s in ("test", "validation") if s in splits), "test")
    for split in ("train", test_split):
        if split not in splits:
            raise UserError(
                f"expected a split `{split}` in `{name}`, got {', '.join(splits)}; set `test_split`"
            )
        if not len(splits[split]):
            raise UserError(f"expected rows in the split `{split}` of `{name}`, got none")

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

    parts = {split: splits[split] for split in ("train", test_split)}
    targets = [_labels(rows, label_column) for rows in parts.values()]
    remarks: list[str] = []
    if input_column in pictures:
        plain = datasets.Image(decode=False)
        cells = [
            _Cells(rows.cast_column(input_column, plain), input_column, split)
            for split, rows in parts.items()
        ]
        train, test, remarks = _images(cells, targets, image_size, random_crop)
    elif image_size is not None or random_crop:
        raise UserError(f"`image_size` and `random_crop` are for images, column `{input_column}` holds none")
    else:
        inputs = [
            _numbers(rows, input_column) if tokens is None else tokens(rows[input_column])
            for rows in parts.values()
        ]
        train, test = map(InMemory, inputs, targets)
    data = describe(
        f"hf:{name}",
        train,
        test,
        classes=getattr(features[label_column], "names", None),
        licence=splits["train"].info.license or "unknown",
        tokenizer=tokens,
    )
    columns = f"inputs from column `{input_column}`, labels from `{label_column}`"
    return say_rows(data, f"test rows from split `{test_split}`", columns, *remarks)


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
    if values.dtype.kind not in "biuf":
        raise UserError(
            f"expected class indices in column `{column}`, got {values.dtype}; "
            "number the classes with `class_encode_column` of `datasets`"
        )
    return class_indices(values, f"the labels in column `{column}`")


def _numbers(rows: Any, column: str) -> Tensor:
    values = _column(rows, column)
    if values.dtype == object:
        raise UserError(f"expected lists of equal length in column `{column}`, got several lengths")
    is_image = values.ndim == 4 and getattr(rows.features[column], "dtype", None) == "uint8"
    return torch.from_numpy(values.astype(np.uint8 if is_image else np.float32))


@dataclass(frozen=True)
class _Cells:
    """The images of a split, not decoded."""

    rows: Any
    column: str
    split: str

    def file(self, index: int) -> tuple[Path | IO[bytes], str]:
        """Return the file of one image, and what messages call it."""
        name = f"{self.split}[{index}]['{self.column}']"
        cell = self.rows[index][self.column]
        if cell is None:
            raise UserError(f"expected an image in {name}, got none; remove the row")
        return Path(cell["path"]) if cell["bytes"] is None else io.BytesIO(cell["bytes"]), name

    def open(self, index: int, mode: str | None = "RGB", size: Size | None = None) -> Image.Image:
        return read_image(*self.file(index), mode=mode, size=size)

    def decoded(self, size: Size) -> Tensor:
        """Decode all images, ``(N, C, H, W)``: with one channel if all are grey, otherwise with three."""
        images = [np.atleast_3d(np.asarray(self.open(i, None, size))) for i in range(len(self.rows))]
        shape = size[1], size[0], max((image.shape[2] for image in images), default=1)
        same = np.stack([np.broadcast_to(image, shape) for image in images])
        return torch.from_numpy(same).permute(0, 3, 1, 2).contiguous()


def _images(
    cells: list[_Cells], targets: list[Tensor], image_size: int | None, random_crop: bool
) -> tuple[Source, Source, list[str]]:
    """Return the images of the training and the test split, and what is done with them."""
    training, evaluation = views(image_size, random_crop)
    train, test = cells
    first = len(train.rows)
    headers = Headers.read(
        first + len(test.rows), lambda i: train.file(i) if i < first else test.file(i - first)
    )
    remarks = headers.plan(image_size, random_crop)
    if image_size is not None:
        lazy = LazyImages(train.open, targets[0], training, evaluation if random_crop else None)
        return (
            lazy,
            LazyImages(test.open, targets[1], evaluation),
            [*remarks, "RGB, mean and std of ImageNet"],
        )
    inputs = [part.decoded(headers.only_size()) for part in cells]
    channels = max(values.shape[1] for values in inputs)  # grey images in one split only become RGB too
    held = [
        InMemory(v.expand(-1, channels, -1, -1).contiguous(), t) for v, t in zip(inputs, targets, strict=True)
    ]
    return held[0], held[1], [*remarks, "RGB" if channels == 3 else "grey"]


def _column(rows: Any, column: str) -> np.ndarray:
    values: np.ndarray = rows.select_columns([column]).with_format("numpy")[:][column]
    return values
