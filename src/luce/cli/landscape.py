"""``luce landscape``: the shape of losses over a plane of student logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError

USAGE = "luce landscape --loss LOSS [OPTION=VALUE ...] [--loss ...] [--teacher LOGITS] [--label CLASS]"
DESCRIPTION = """Draw losses over the plane s = t + a d1 + b d2 of student logits s around the teacher's
logits t. With three classes the plane holds every student there is, but for a common offset of its logits;
with more it is cut at random directions. A white plus marks s = t, a dot the lowest point. Writes a PNG, and
the grids as JSON beside it.

  luce landscape --loss PLDLoss --loss KDLoss temperature=4
  luce landscape --loss PLDLoss teacher_temperature=0.5 --loss PLDLoss teacher_temperature=2
  luce landscape --loss CrossEntropyLoss weight=0.1 + KDLoss weight=0.9 --teacher 0,3,1 --label 0"""


def main(words: Sequence[str]) -> None:
    from ._parser import Parser, numbers

    parser = Parser("landscape", usage=USAGE, description=DESCRIPTION)
    parser.add_argument(
        "--loss",
        nargs="+",
        action="append",
        metavar=("LOSS", "OPTION=VALUE"),
        help="a loss of recipes with its options; + adds another to it, and --loss again another panel",
    )
    parser.add_argument("--teacher", type=numbers, metavar="LOGITS", help="such as 2,0.5,-1, which it is")
    parser.add_argument("--classes", type=int, help="a random teacher of unit norm with so many classes")
    parser.add_argument("--label", type=int, help="a class; the teacher's first choice unless given")
    parser.add_argument(
        "--radius", type=float, help="half the side; 5 times the norm of the teacher's logits"
    )
    parser.add_argument("--points", type=int, default=81, help="along each side, odd: 81")
    parser.add_argument("--seed", type=int, default=0, help="of the random teacher and directions: 0")
    parser.add_argument("--out", type=Path, default=Path("runs/landscape.png"), help="runs/landscape.png")
    if "--help" in words or "-h" in words:
        parser.print_help()
        return
    request = parser.parse_args(list(words))
    if not request.loss:
        raise UserError("expected at least one loss, such as: luce landscape --loss PLDLoss")
    if request.out.suffix.lower() != ".png":
        raise UserError(f"expected a file that ends in .png after `--out`, got {request.out}")
    if request.teacher is not None and request.classes is not None:
        raise UserError("expected `--teacher` or `--classes`, got both")

    import torch

    from .. import analysis, files
    from ..analysis.landscape import picture
    from ..recipes.methods import build_loss

    losses = [(" ".join(loss), build_loss(read_loss(loss))) for loss in request.loss]
    if request.classes is None:
        teacher = torch.tensor(request.teacher or [2.0, 0.5, -1.0], dtype=torch.float64)
    elif request.classes < 2:
        raise UserError(f"expected `--classes` of at least 2, got {request.classes}")
    else:
        random = torch.Generator().manual_seed(request.seed)
        teacher = torch.nn.functional.normalize(
            torch.randn(request.classes, dtype=torch.float64, generator=random), dim=0
        )
    label = int(teacher.argmax()) if request.label is None else request.label
    found = []
    for name, loss in losses:
        try:
            if loss.needs_preparation:
                loss.prepare(teacher[None], torch.tensor([label]))
            found.append(
                analysis.landscape(
                    loss,
                    teacher,
                    label,
                    name=name,
                    radius=request.radius,
                    points=request.points,
                    seed=request.seed,
                )
            )
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error
    drawn = picture(found)
    files.make_folder(request.out.parent)
    files.write_bytes(request.out, drawn)
    grids = request.out.with_suffix(".json")
    files.write_json(grids, {"landscapes": [one.as_dict() for one in found]})
    for one in found:
        a, b, value = one.minimum
        edge = ", at the edge: it falls further outside" if one.minimum_on_edge else ""
        print(f"{one.name}: lowest {value:.6g} at a = {a:.3g}, b = {b:.3g}{edge}")
    print(f"picture: {request.out}\ngrids: {grids}")


def read_loss(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Terms of a recipe's loss from ``NAME option=value ... + NAME ...``.

    >>> read_loss(["CrossEntropyLoss", "weight=0.1", "+", "KDLoss", "temperature=4"])
    {'1': {'loss': 'CrossEntropyLoss', 'weight': 0.1}, '2': {'loss': 'KDLoss', 'temperature': 4}}
    """
    import yaml

    terms: dict[str, dict[str, Any]] = {}
    fresh = True
    for word in words:
        if word == "+":
            fresh = True
        elif fresh:
            term: dict[str, Any] = {"loss": word}
            terms[str(len(terms) + 1)] = term
            fresh = False
        else:
            name, equals, value = word.partition("=")
            if not equals:
                raise UserError(f"expected an option of {term['loss']} as option=value, got `{word}`")
            try:
                term[name] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise UserError(f"cannot read the value of `{word}`") from error
    if fresh:
        raise UserError("expected a loss after `+`")
    return terms
