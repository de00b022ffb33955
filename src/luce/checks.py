"""Argument checks with the error messages of losses, methods and analysis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")
LARGEST = 2**31 - 1
"""Largest integer of an option; its square fits into 64 bits, and a larger number can be a float."""


WIDEST = 2**20
"""Largest size of what an option lets a loss hold in memory, such as samples or channels."""


def is_number(value: object) -> bool:
    """Return whether a value is a float, or an integer up to `LARGEST`, and not a bool."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= LARGEST
    return isinstance(value, Real)


def _is_integer(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _got(value: object) -> str:
    """The value for the end of a message, with advice about an integer beyond `LARGEST`."""
    large = isinstance(value, int) and abs(value) > LARGEST
    return f"got {value!r}" + (
        "; write an integer as large as this as a float, such as 1e10" if large else ""
    )


def check_positive(**values: float) -> None:
    """Raise ValueError unless each value is a finite number above 0."""
    for name, value in values.items():
        if not (is_number(value) and 0 < value < math.inf):
            raise ValueError(f"expected `{name}` to be a finite number above 0, {_got(value)}")


def check_not_negative(**values: float) -> None:
    """Raise ValueError unless each value is a finite number of at least 0."""
    for name, value in values.items():
        if not (is_number(value) and 0 <= value < math.inf):
            raise ValueError(f"expected `{name}` to be a finite number of at least 0, {_got(value)}")


def check_at_least(least: float, **values: float) -> None:
    """Raise ValueError unless each value is a finite number of at least `least`."""
    for name, value in values.items():
        if not (is_number(value) and least <= value < math.inf):
            raise ValueError(f"expected `{name}` to be a finite number of at least {least}, {_got(value)}")


def check_temperature(temperature: float, scale_by_temperature: bool) -> None:
    """Raise ValueError unless the temperature is above 0, and finite for an unscaled loss."""
    if temperature != math.inf:
        check_positive(temperature=temperature)
    elif not scale_by_temperature:
        raise ValueError(
            f"expected `temperature` to be finite with `scale_by_temperature=False`, got {temperature!r}: "
            f"without its square the loss is 0 there"
        )


def check_between(low: float, high: float, **values: float) -> None:
    """Raise ValueError unless each value lies strictly between the bounds."""
    for name, value in values.items():
        if not (is_number(value) and low < value < high):
            raise ValueError(f"expected `{name}` strictly between {low} and {high}, got {value!r}")


def check_label_smoothing(label_smoothing: float) -> None:
    if not (is_number(label_smoothing) and 0 <= label_smoothing < 1):
        raise ValueError(f"expected `label_smoothing` in [0, 1), got {label_smoothing!r}")


def check_top_k(top_k: int | None) -> None:
    if top_k is not None and not _is_integer(top_k, 1, LARGEST):
        raise ValueError(
            f"expected `top_k` to be None or an integer of at least 1 and at most {LARGEST}, got {top_k!r}"
        )


def check_count(most: int = LARGEST, **values: int) -> None:
    """Raise ValueError unless each value is an integer of at least 1 and at most `most`.

    A bound on what takes memory or time in its proportion turns a mistake into a message.
    """
    for name, value in values.items():
        if not _is_integer(value, 1, most):
            raise ValueError(
                f"expected `{name}` to be an integer of at least 1 and at most {most}, got {value!r}"
            )


def check_int64(**values: int | None) -> None:
    """Raise unless each value is None or an integer that a tensor can hold."""
    for name, value in values.items():
        if value is None or _is_integer(value, -(2**63), 2**63 - 1):
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"expected `{name}` to be an integer, got {value!r}")
        raise ValueError(f"expected `{name}` to be an integer of 64 bits, got {value!r}")


def check_share(share: float) -> None:
    """Raise ValueError unless the share is a fraction (float) or a count (integer of at least 2)."""
    number = isinstance(share, int) and not isinstance(share, bool)
    if not (2 <= share <= LARGEST if number else isinstance(share, float) and 0 < share <= 1):
        raise ValueError(
            f"expected `share` to be a fraction above 0 and at most 1.0, or an integer of at least 2 "
            f"and at most {LARGEST}, got {share!r}"
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"expected `{name}` to be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_order(order: Tensor, logits: Tensor) -> None:
    """Check dtype and shape of a ranking of the classes; not that it is one."""
    if not isinstance(order, Tensor):
        raise TypeError(f"expected `teacher_order` to be a torch.Tensor, got {type(order).__name__}")
    if order.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"expected `teacher_order` of int64 or int32, got {order.dtype}; see `luce.teacher_order`"
        )
    if order.shape != logits.shape:
        raise ValueError(
            f"expected `teacher_order` of shape {tuple(logits.shape)} like `teacher_logits`, "
            f"got {tuple(order.shape)}"
        )


def check_power_of_two(classes: int, dtype: torch.dtype) -> None:
    """Raise ValueError if ``2**(classes - 1)`` overflows the dtype."""
    _, limit = math.frexp(torch.finfo(dtype).max)
    if classes > limit:
        raise ValueError(
            f"expected at most {limit} classes with `normalize=False`, got {classes}: the unscaled weights "
            f"2**(C - k) - 1 overflow {dtype}; use `normalize=True`"
        )


def check_reduction(reduction: str) -> None:
    check_choice("reduction", reduction, REDUCTIONS)


def check_logits(name: str, logits: Tensor, like: Tensor | None = None) -> None:
    """Check for a floating tensor with a class dimension, of the shape and on the device of `like`."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"expected `{name}` to be a torch.Tensor, got {type(logits).__name__}")
    if not logits.is_floating_point():
        raise TypeError(
            f"expected `{name}` of a floating dtype, got {logits.dtype}; pass raw logits, not class indices"
        )
    if logits.ndim == 0:
        raise ValueError(f"expected `{name}` with a class dimension, got a scalar")
    if like is None:
        return
    if logits.shape != like.shape:
        raise ValueError(
            f"expected `{name}` of shape {tuple(like.shape)} like `student_logits`, got {tuple(logits.shape)}"
        )
    if logits.device != like.device:
        raise ValueError(
            f"expected `{name}` on {like.device} like `student_logits`, got {logits.device}; "
            f"move it with .to({str(like.device)!r})"
        )


def class_axis(logits: Tensor, class_dim: int) -> int:
    """Return the class axis as a non-negative index; 0 for a single row of shape ``(C,)``."""
    if logits.ndim == 1:
        class_dim = 0
    if not -logits.ndim <= class_dim < logits.ndim:
        raise ValueError(
            f"expected `class_dim` between {-logits.ndim} and {logits.ndim - 1} "
            f"for logits of shape {tuple(logits.shape)}, got {class_dim}"
        )
    axis = class_dim % logits.ndim
    if logits.shape[axis] == 0:
        raise ValueError(
            f"expected at least one class along dimension {class_dim}, got {tuple(logits.shape)}"
        )
    return axis


def check_per_row(name: str, values: Tensor, rows: torch.Size, logits: Tensor) -> None:
    """Check for one value per row: the shape of the logits without their class dimension."""
    if not isinstance(values, Tensor):
        raise TypeError(f"expected `{name}` to be a torch.Tensor, got {type(values).__name__}")
    if values.shape != rows:
        raise ValueError(
            f"expected `{name}` of shape {tuple(rows)} (the logits' {tuple(logits.shape)} without the class "
            f"dimension), got {tuple(values.shape)}"
        )
    if values.device != logits.device:
        raise ValueError(f"expected `{name}` on {logits.device} like `student_logits`, got {values.device}")


def check_given(name: str, value: Tensor | None) -> None:
    """Raise TypeError if a required tensor is missing."""
    if value is None:
        raise TypeError(f"expected `{name}` to be a torch.Tensor, got NoneType; this loss needs it")


def check_target(target: Tensor, rows: torch.Size, logits: Tensor) -> None:
    """Check for class indices, one per row."""
    check_per_row("target", target, rows, logits)
    if target.is_floating_point() or target.dtype == torch.bool or target.is_complex():
        raise TypeError(f"expected `target` of an integer dtype (class indices), got {target.dtype}")


def wrong_label(label: int, classes: int) -> ValueError:
    return ValueError(
        f"expected labels in [0, {classes}) of classes that exist, got {label}; "
        f"mark rows that should not count with `ignore_index`"
    )


FEATURES = {
    "maps": {3: "(C', H, W)", 2: "(T, D)"},
    "vectors": {1: "(D,)"},
}
"""Accepted shapes of a feature without its batch, by rank."""


def check_feature_shape(name: str, shape: torch.Size, takes: str | None) -> None:
    """Check that a feature, without its batch, is not empty and has a rank of `FEATURES` (any if None)."""
    if takes is not None and len(shape) not in FEATURES[takes]:
        advice = "pool the map or flatten it" if takes == "vectors" else "take it before the pooling"
        raise ValueError(
            f"expected {name} of shape {' or '.join(FEATURES[takes].values())} without the batch, "
            f"got {tuple(shape)}; {advice}"
        )
    if shape.numel() == 0 or not shape:
        raise ValueError(f"expected {name} to be non-empty without the batch, got {tuple(shape)}")


def check_features(
    student_features: Tensor,
    teacher_features: Tensor,
    takes: str | None,
    names: tuple[str, str] = ("student_features", "teacher_features"),
) -> None:
    """Check two features: dtype, rank, the same number of rows (at least one) and the same device."""
    for name, feature in zip(names, (student_features, teacher_features), strict=True):
        if not isinstance(feature, Tensor):
            raise TypeError(f"expected `{name}` to be a torch.Tensor, got {type(feature).__name__}")
        if not feature.is_floating_point():
            raise TypeError(f"expected `{name}` of a floating dtype, got {feature.dtype}")
        check_feature_shape(f"`{name}`", feature.shape[1:], takes)
    rows, others = student_features.shape[0], teacher_features.shape[0]
    if rows != others or rows == 0:
        raise ValueError(
            f"expected the same rows, at least one, in `{names[0]}` and `{names[1]}`, got {rows} and {others}"
        )
    if student_features.device != teacher_features.device:
        raise ValueError(
            f"expected `{names[1]}` on {student_features.device} like `{names[0]}`, "
            f"got {teacher_features.device}"
        )


def check_same_layout(first: Tensor, second: Tensor) -> None:
    """Raise ValueError unless both features are maps or both are tokens."""
    if first.ndim != second.ndim:
        raise ValueError(
            f"expected both features as maps (N, C', H, W) or both as tokens (N, T, D), got "
            f"{tuple(first.shape)} and {tuple(second.shape)}; reshape the tokens to a map"
            f", without a class token"
        )


def check_stages(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor], least: int) -> None:
    """Check that both networks give the same number of features, at least `least`."""
    student, teacher = len(student_features), len(teacher_features)
    if student != teacher:
        raise ValueError(
            f"expected as many features of the student as of the teacher, got {student} and {teacher}"
        )
    if student < least:
        raise ValueError(f"expected at least {least} features of each network, got {student}")


def check_matrices(**matrices: Tensor) -> None:
    """Check for floating tensors of non-empty matrices."""
    for name, matrix in matrices.items():
        if not isinstance(matrix, Tensor):
            raise TypeError(f"expected `{name}` to be a torch.Tensor, got {type(matrix).__name__}")
        if not matrix.is_floating_point():
            raise TypeError(f"expected `{name}` of a floating dtype, got {matrix.dtype}")
        if matrix.ndim < 2 or 0 in matrix.shape[-2:]:
            raise ValueError(f"expected `{name}` of shape (..., M, N), not empty, got {tuple(matrix.shape)}")


def check_two(**pairs: tuple[Tensor, Tensor]) -> None:
    """Check for pairs: the input and the output of a stage."""
    for name, pair in pairs.items():
        if not isinstance(pair, (tuple, list)):
            raise TypeError(f"expected `{name}` to be (input, output) of a stage, got {type(pair).__name__}")
        if len(pair) != 2:
            raise ValueError(f"expected `{name}` to be (input, output) of a stage, got {len(pair)} features")


def check_like(name: str, feature: Tensor, like: Tensor, advice: str) -> None:
    """Raise ValueError unless a feature has the shape of `like`."""
    if feature.shape != like.shape:
        raise ValueError(
            f"expected `{name}` of shape {tuple(like.shape)}, got {tuple(feature.shape)}; {advice}"
        )
