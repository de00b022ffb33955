"""``luce landscape``: the shape of losses over a plane of student logits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..documents import InvalidYAML, load_yaml
from ..errors import UserError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Draw losses over the plane s = t + a d1 + b d2 of student logits s around the teacher's logits t.

    With three classes the plane holds every student, up to a common offset of its logits; with more classes
    d1 and d2 are random. A white plus marks s = t, a dot the lowest point. Each loss may have options, and +
    adds another loss to the same panel. The values on the grid are written as JSON beside the picture.

      luce landscape PLDLoss KDLoss temperature=4
      luce landscape CrossEntropyLoss weight=0.1 + KDLoss weight=0.9 --teacher 0,3,1 --label 0

    Attributes:
        losses: LOSS [OPTION=VALUE ...] [+ LOSS ...], with the names and options of recipes.
        teacher: Logits of the teacher, such as 2,0.5,-1, which is the default.
        classes: Use random teacher logits of norm 1 with this number of classes.
        label: The labelled class; the teacher's top class if not given.
        radius: Half the side of the square, in logits; 5 times the norm of the teacher's logits if not given.
        points: Grid points along each side, an odd number.
        seed: Seed of random logits and directions.
        out: The picture, a PNG.
    """

    losses: tuple[str, ...]
    teacher: tuple[float, ...] | None = None
    classes: int | None = None
    label: int | None = None
    radius: float | None = None
    points: int = 81
    seed: int = 0
    out: Path = Path("runs/landscape.png")

    def __post_init__(self) -> None:
        if self.out.suffix.lower() != ".png":
            raise UserError(f"expected a file that ends in .png as `out`, got {self.out}")
        if self.teacher is not None and self.classes is not None:
            raise UserError("expected `teacher` or `classes`, got both")
        if self.classes is not None and self.classes < 2:
            raise UserError(f"expected `classes` of at least 2, got {self.classes}")


def main(options: Options, _: str) -> None:
    """Write the picture and the grids, and print the lowest points."""
    import torch

    from .. import analysis, files
    from ..analysis.landscape import picture, random_logits

    panels = split_losses(options.losses)
    losses = {" ".join(words): _build(words) for words in panels}
    if len(losses) < len(panels):
        raise UserError("expected different losses, got one of them twice")
    if options.classes is not None:
        teacher = random_logits(options.classes, options.seed)
    else:
        teacher = torch.tensor(
            (2.0, 0.5, -1.0) if options.teacher is None else options.teacher, dtype=torch.float64
        )
    landscapes = []
    for name, loss in losses.items():
        try:
            landscapes.append(
                analysis.landscape(
                    loss,
                    teacher,
                    options.label,
                    name=name,
                    radius=options.radius,
                    points=options.points,
                    seed=options.seed,
                )
            )
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error
    files.make_folder(options.out.parent)
    files.write_bytes(options.out, picture(landscapes))
    grids = options.out.with_suffix(".json")
    files.write_json(grids, {"landscapes": [landscape.as_dict() for landscape in landscapes]})
    for landscape in landscapes:
        a, b, value = landscape.minimum
        edge = (
            ", at the edge of the grid: the loss falls further outside" if landscape.minimum_on_edge else ""
        )
        print(f"{landscape.name}: lowest {value:.6g} at a = {a:.3g}, b = {b:.3g}{edge}")
    print(f"picture: {options.out}\ngrids: {grids}")


def _build(words: Sequence[str]) -> Any:
    """The loss of a panel.

    Raises:
        UserError: If it cannot be built; names the loss as it was typed.
    """
    from ..recipes import build_loss

    terms = read_loss(words)
    try:
        return build_loss(terms)
    except UserError as error:
        message = re.sub(r"`loss(?:\.\d+)?`", f"`{' '.join(words)}`", str(error))
        message = re.sub(r"(weight|warmup) of (\d+)", lambda m: f"{m[1]} of {terms[m[2]]['loss']}", message)
        raise UserError(message) from error


def split_losses(words: Sequence[str]) -> list[list[str]]:
    """The words of each panel: a loss starts a new panel unless a ``+`` is before it.

    >>> split_losses(["PLDLoss", "CrossEntropyLoss", "weight=0.1", "+", "KDLoss"])
    [['PLDLoss'], ['CrossEntropyLoss', 'weight=0.1', '+', 'KDLoss']]
    """
    panels: list[list[str]] = []
    for before, word in zip(["", *words], words, strict=False):
        if panels and (word == "+" or before == "+" or "=" in word):
            panels[-1].append(word)
        else:
            panels.append([word])
    return panels


def read_loss(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The terms of a recipe's loss from ``NAME option=value ... + NAME ...``.

    >>> read_loss(["CrossEntropyLoss", "weight=0.1", "+", "KDLoss", "temperature=4"])
    {'1': {'loss': 'CrossEntropyLoss', 'weight': 0.1}, '2': {'loss': 'KDLoss', 'temperature': 4}}

    Raises:
        UserError: If a name or a value is missing or cannot be read.
    """
    terms: dict[str, dict[str, Any]] = {}
    term: dict[str, Any] | None = None
    for word in words:
        name, equals, value = word.partition("=")
        if word == "+" and term is not None:
            term = None
        elif term is None and not equals:
            term = terms[str(len(terms) + 1)] = {"loss": word}
        elif term is None or not equals:
            raise UserError(f"expected LOSS OPTION=VALUE ... + LOSS ..., got `{' '.join(words)}`")
        elif name in term:
            raise UserError(f"expected `{name}` once, got it twice in `{' '.join(words)}`")
        else:
            try:
                term[name] = load_yaml(value)
            except InvalidYAML as error:
                raise UserError(f"cannot read the value of `{word}`: {error.problem}") from error
    if term is None:
        raise UserError(f"expected a loss after `+`, got `{' '.join(words)}`")
    return terms
