"""The values of a loss over a plane of student logits.

The plane follows appendix J of the PLD paper, which we know from secondary sources: ``s = t + a d1 + b d2``,
with *a* and *b* in ``[-5 ||t||, 5 ||t||]`` and orthonormal directions, random ones for more than three
classes. With three classes the directions span all logits of a given mean, so the picture shows everything
that a shift-invariant loss can distinguish. Start with that one.

References:
    Plackett-Luce Distillation, arXiv 2506.12542, appendix J.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import checks
from ..reports.canvas import INK, OTHERS, draw_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

THREE = torch.tensor([[0.0, -1.0, 1.0], [2.0, -1.0, -1.0]], dtype=torch.float64)
"""Directions for three classes: class 0 points up, class 1 to the lower left, class 2 to the lower right."""


@dataclass(frozen=True)
class Landscape:
    """A loss on a square grid around the teacher's logits.

    Attributes:
        name: Name of the loss.
        teacher_logits: Centre of the grid, ``(C,)``.
        label: Class index.
        directions: d1 and d2, ``(2, C)``, orthonormal.
        steps: Values of *a* and of *b*, ``(P,)``, from minus to plus the radius.
        values: ``(P, P)``; the entry ``[i, j]`` is the loss at ``a = steps[j]``, ``b = steps[i]``.
    """

    name: str
    teacher_logits: Tensor
    label: int
    directions: Tensor
    steps: Tensor
    values: Tensor

    @property
    def radius(self) -> float:
        return self.steps[-1].item()

    @property
    def minimum(self) -> tuple[float, float, float]:
        """*a*, *b* and the loss at the lowest grid point; of equal ones the nearest to the teacher."""
        lowest = self.values.nan_to_num(nan=math.inf).min()
        places = (self.values == lowest).nonzero()
        if not len(places):
            return math.nan, math.nan, math.nan
        nearest = places[self.steps[places].square().sum(-1).argmin()]
        b, a = self.steps[nearest].tolist()
        return a, b, lowest.item()

    @property
    def minimum_on_edge(self) -> bool:
        """Whether the lowest point lies on the edge, so that a minimum, if any, lies outside the grid."""
        a, b, _ = self.minimum
        return max(abs(a), abs(b)) >= self.radius

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; a non-finite loss becomes None."""
        a, b, value = self.minimum
        return {
            "loss": self.name,
            "teacher_logits": self.teacher_logits.tolist(),
            "label": self.label,
            "directions": self.directions.tolist(),
            "steps": self.steps.tolist(),
            "minimum": {"a": a, "b": b, "value": value, "on_edge": self.minimum_on_edge},
            "values": [[v if math.isfinite(v) else None for v in row] for row in self.values.tolist()],
        }


MOST_POINTS = 2001
"""Along each side of a grid; a million students fit into memory."""


def landscape(
    loss: Callable[..., Tensor | Mapping[str, Tensor]],
    teacher_logits: Tensor,
    label: int | None = None,
    *,
    name: str = "",
    radius: float | None = None,
    points: int = 81,
    seed: int = 0,
) -> Landscape:
    """Evaluate a loss at every point of a grid around the teacher's logits, in float64.

    Each point is a batch of one row, because some losses couple the rows of a batch.

    Args:
        loss: Called as ``loss(student_logits, teacher_logits, target)`` with one row; returns a scalar, or a
            mapping with a scalar at ``"loss"``. A loss that needs preparation is prepared with the teacher's
            logits.
        teacher_logits: Finite unnormalised log-scores, ``(C,)``, at least two classes.
        label: Class index in ``[0, C)``; the teacher's top class if None.
        name: Name of the loss in the picture.
        radius: Half the side of the square, in logits; by default five times the norm of the teacher's logits
            (5 if they are 0).
        points: Number of points along each side; odd, so that the teacher's logits are a grid point.
        seed: Seed of the directions, which are random unless there are three classes.
    Raises:
        ValueError: If a shape or value is wrong.
        TypeError: If a dtype is wrong.
    Example:
        >>> from luce import KDLoss
        >>> found = landscape(KDLoss(), torch.tensor([2.0, 0.5, -1.0]), 0, points=11)
        >>> found.minimum[:2], found.minimum_on_edge
        ((0.0, 0.0), False)
    """
    checks.check_logits("teacher_logits", teacher_logits)
    if teacher_logits.ndim != 1 or len(teacher_logits) < 2 or not bool(teacher_logits.isfinite().all()):
        raise ValueError(
            f"expected `teacher_logits` as one row of at least 2 finite logits, got {teacher_logits.tolist()}"
        )
    label = int(teacher_logits.argmax()) if label is None else label
    if not 0 <= label < len(teacher_logits):
        raise ValueError(f"expected `label` in [0, {len(teacher_logits)}), got {label}")
    if not 3 <= points <= MOST_POINTS or points % 2 == 0:
        raise ValueError(
            f"expected `points` as an odd number of at least 3 and at most {MOST_POINTS}, got {points}"
        )
    t = teacher_logits.detach().double()
    radius = 5 * (t.norm().item() or 1.0) if radius is None else radius
    checks.check_positive(radius=radius)
    directions, target = _directions(len(t), seed), torch.tensor([label])
    if getattr(loss, "needs_preparation", False):
        loss.prepare(t[None], target)  # type: ignore[attr-defined]
    half = points // 2
    # Integers keep an exact 0 in the middle, so that the teacher's logits are a grid point; linspace may not.
    steps = torch.arange(-half, half + 1, dtype=torch.float64) / half * radius
    b, a = torch.meshgrid(steps, steps, indexing="ij")
    grid = t + a.reshape(-1, 1) * directions[0] + b.reshape(-1, 1) * directions[1]
    with torch.no_grad():
        values = [_scalar(loss(row[None], t[None], target)) for row in grid]
    square = torch.tensor(values, dtype=torch.float64).reshape(points, points)
    return Landscape(name, t, label, directions, steps, square)


def random_logits(classes: int, seed: int) -> Tensor:
    """Random logits of norm 1, ``(classes,)``, in float64."""
    random = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(classes, dtype=torch.float64, generator=random), dim=0)


def _directions(classes: int, seed: int) -> Tensor:
    if classes == 3:
        return THREE / THREE.norm(dim=-1, keepdim=True)
    random = torch.randn(classes, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(random).Q.T


def _scalar(value: Tensor | Mapping[str, Tensor]) -> float:
    return (value if isinstance(value, Tensor) else value["loss"]).item()


# The picture ------------------------------------------------------------------------------------------------


def picture(landscapes: Sequence[Landscape]) -> bytes:
    """Return a PNG with a panel for each landscape, three in a row."""
    columns = min(3, len(landscapes))
    lines = math.ceil(len(landscapes) / columns)

    def paint_all(figure: Figure) -> None:
        panels = figure.subplots(lines, columns, squeeze=False).ravel()
        for axes, shown in zip(panels, landscapes, strict=False):
            _paint(figure, axes, shown)
        for axes in panels[len(landscapes) :]:
            axes.set_axis_off()
        marks = "plus: the student's logits equal the teacher's\ndot: lowest point"
        if len(landscapes[0].teacher_logits) == 3:
            marks += "; lines: the student's predicted class changes"
        figure.supxlabel(marks, fontsize=8)

    return draw_png((4.3 * columns, 4.2 * lines + 0.6), paint_all)


def _paint(figure: Figure, axes: Axes, shown: Landscape) -> None:
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    values = np.ma.masked_invalid(shown.values.numpy())
    steps, radius = shown.steps.numpy(), shown.radius
    flat = values.count() == 0 or np.ptp(values.compressed()) < 1e-12
    if values.count():
        filled = axes.contourf(steps, steps, values, levels=1 if flat else 24, cmap="viridis")
        if not flat:
            axes.contour(steps, steps, values, levels=24, colors="white", linewidths=0.3, alpha=0.5)
        figure.colorbar(filled, ax=axes, shrink=0.75, pad=0.02, ticks=MaxNLocator(6), label="loss")
    if len(shown.teacher_logits) == 3:
        _mark_classes(axes, shown)
    axes.plot(0, 0, "+", color="white", markersize=11, markeredgewidth=2.2, clip_on=False)
    a, b, value = shown.minimum
    if math.isfinite(value) and not flat:
        axes.plot(a, b, "o", color=OTHERS[0], markeredgecolor="white", markersize=7, clip_on=False, zorder=4)
    where = "constant" if flat else f"lowest {value:.3g}" + (" at the edge" if shown.minimum_on_edge else "")
    axes.set_title("\n".join([*textwrap.wrap(shown.name, 44), where]), fontsize=8.5, color=INK)
    axes.set(xlim=(-radius, radius), ylim=(-radius, radius), aspect="equal")
    axes.set(xlabel="a (logits)", ylabel="b (logits)")
    axes.grid(visible=False)


def _mark_classes(axes: Axes, shown: Landscape) -> None:
    """Draw the borders at which the predicted class changes, and name the classes."""
    from matplotlib.patheffects import withStroke

    middle = -(shown.directions @ shown.teacher_logits)  # where the three logits are equal
    for index, towards in enumerate(shown.directions.T):
        unit = towards / towards.norm()
        end = middle - 10 * shown.radius * unit
        axes.plot(*zip(middle.tolist(), end.tolist(), strict=True), color="white", linewidth=1, alpha=0.8)
        x, y = (middle + 0.72 * shown.radius * unit).tolist()
        name = f"class {index}" + (" (label)" if index == shown.label else "")
        text = axes.text(x, y, name, color="white", ha="center", va="center", fontsize=8, clip_on=True)
        text.set_path_effects([withStroke(linewidth=2, foreground="#00000088")])
