"""A server's description of itself, and checks of its answers against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from ..signals.blackbox import AnswerKind, check_answers
from . import wire

TOLERANCE = 1e-3
"""Allowed deviation of a sum of probabilities from 1, in addition to that of their rounding."""

MOST_DECIMALS = 17
"""Decimals of a 64-bit number."""


@dataclass(frozen=True)
class Service:
    """A server's description of itself.

    Attributes:
        model: Identifier that changes whenever an answer could.
        classes: Number of classes.
        names: Of the classes; None if unknown.
        input_shape: Of one input; None if unknown.
        answers: Form of the answers.
        top_k: Number of classes in an answer of kind ``"topk"``.
        decimals: Of the probabilities; None without rounding.
        max_batch: Largest number of rows in a request.
    """

    model: str
    classes: int
    names: tuple[str, ...] | None
    input_shape: tuple[int, ...] | None
    answers: AnswerKind
    top_k: int | None
    decimals: int | None
    max_batch: int | None

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Service:
        """Parse and check the response of ``/v1/info``.

        Raises:
            ValueError: On a missing or invalid field.
        """
        if content.get("protocol") != wire.PROTOCOL:
            raise ValueError(f"expected `protocol` {wire.PROTOCOL}, got {content.get('protocol')!r}")
        model = content.get("model")
        # Without it the cache would mix the answers of different models.
        if not (isinstance(model, str) and model):
            raise ValueError(f"expected `model` as a name, got {model!r}")
        names, classes = None, content.get("classes")
        if isinstance(classes, list) and all(isinstance(name, str) for name in classes):
            names, classes = tuple(classes), len(classes)
        if type(classes) is not int or classes < 1:
            raise ValueError("expected `classes` as a list of names or their number")
        shape = content.get("input_shape")
        if shape is not None and not (
            isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape)
        ):
            raise ValueError("expected `input_shape` as a list of sizes, or null")
        whole = {name: content.get(name) for name in ("top_k", "decimals", "max_batch")}
        for name, value in whole.items():
            if value is not None and not (type(value) is int and value >= 1):
                raise ValueError(f"expected `{name}` as a number of at least 1, or null")
        if (whole["decimals"] or 1) > MOST_DECIMALS:
            raise ValueError(f"expected `decimals` in 1 .. {MOST_DECIMALS}, or null, got more")
        check_answers(content.get("answers"), whole["top_k"], classes)
        return cls(
            model=model,
            classes=classes,
            names=names,
            input_shape=None if shape is None else tuple(shape),
            answers=cast(AnswerKind, content["answers"]),
            **whole,
        )

    @property
    def width(self) -> int:
        """Numbers in the answer to a row."""
        return {"probs": self.classes, "topk": 2 * (self.top_k or 0), "label": 1}[self.answers]

    def read_answers(self, content: Mapping[str, Any], rows: int) -> np.ndarray:
        """Parse and check the answers to this number of rows, float32; see `luce.signals.blackbox.answer`.

        Raises:
            ValueError: If they do not fit the description.
        """
        if content.get("model", self.model) != self.model:
            raise ValueError(f"expected answers of the model {self.model}, got answers of {content['model']}")
        parts = []
        if self.answers != "probs":
            parts.append(self._classes(_field(content, "classes"), rows))
        if self.answers != "label":
            width = self.classes if self.answers == "probs" else cast(int, self.top_k)
            parts.append(self._probs(_field(content, "probs"), rows, width))
        return np.concatenate(parts, axis=1, dtype=np.float32)

    def _classes(self, array: np.ndarray, rows: int) -> np.ndarray:
        array = array[:, None] if self.answers == "label" and array.ndim == 1 else array
        expected = (rows, self.top_k or 1)
        if array.shape != expected:
            raise ValueError(f"expected `classes` of shape {expected}, got {array.shape}")
        if array.dtype.kind not in "iu":
            raise ValueError("expected class numbers in `classes`, got fractions")
        if len(array) and not 0 <= array.min() <= array.max() < self.classes:
            raise ValueError(
                f"expected `classes` in 0 .. {self.classes - 1}, got {array.min()} .. {array.max()}"
            )
        if (np.diff(np.sort(array, axis=1), axis=1) == 0).any():
            raise ValueError("expected different `classes` in a row, got one of them twice")
        return array

    def _probs(self, array: np.ndarray, rows: int, width: int) -> np.ndarray:
        if array.shape != (rows, width):
            dimension = "rows" if array.shape[:1] != (rows,) else "classes"
            raise ValueError(
                f"expected `probs` of {rows} rows and {width} classes, got other {dimension}: {array.shape}"
            )
        if array.dtype.kind != "f" and array.dtype.kind not in "iu":
            raise ValueError("expected numbers in `probs`")
        if (array < 0).any():
            raise ValueError(f"expected probabilities, got a negative one: {array.min()}")
        totals = array.sum(1, dtype=np.float64)
        slack = TOLERANCE + (0.0 if self.decimals is None else width * 0.5 * 10.0**-self.decimals)
        if (totals > 1 + slack).any() or (self.answers == "probs" and (totals < 1 - slack).any()):
            wrong = totals[np.abs(totals - 1).argmax()]
            raise ValueError(f"expected probabilities that sum to 1, got a row that sums to {wrong:.6g}")
        if self.answers == "topk" and (np.diff(array, axis=1) > 0).any():
            raise ValueError("expected the probabilities of `topk` in falling order")
        return array


def _field(content: Mapping[str, Any], name: str) -> np.ndarray:
    if name not in content:
        raise ValueError(
            f"expected `{name}` in the answer, got {', '.join(map(repr, list(content)[:5])) or 'nothing'}"
        )
    try:
        return wire.unpack(content[name])
    except ValueError as error:
        raise ValueError(f"in `{name}`: {error}") from error
