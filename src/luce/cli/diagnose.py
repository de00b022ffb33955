"""``luce diagnose``: the knowledge of a teacher beyond the labels."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..recipes import Recipe
from ..runs import DiagnoseOptions, diagnose
from ._parser import recipe_fields


@dataclass(frozen=True, kw_only=True)
class Options(DiagnoseOptions):
    """Analyse the knowledge of a teacher beyond the labels, and the limits of KD with it.

    Splits the knowledge into smoothing, classes and single rows, shows the gradient that KD gives a student
    and where its temperature lies between KD and logit matching, and compares the teacher with simulated
    teachers that know less. The fields of a recipe's teacher and data are options too.

      luce diagnose runs/digits-teacher sklearn:digits --out runs/diagnosis
      luce diagnose resnet56 torchvision:CIFAR100 --checkpoint resnet56.pt --temperature 4
      luce diagnose timm:resnet18 imagefolder:photos --teacher.options.pretrained true
        --data.options.image_size 224

    Attributes:
        out: Folder to write diagnose.json and diagnose.html to.
        json: Print JSON instead of a table.
    """

    overrides: dict[str, Any] = field(default_factory=dict, metadata=recipe_fields(Recipe, "teacher", "data"))
    out: Path | None = None
    json: bool = False


def main(options: Options, command_line: str) -> None:
    """Diagnose, and print or write the results."""
    from rich.console import Console
    from rich.text import Text

    from .. import files
    from ..analysis import page
    from ..reports import terminal_table

    with nullcontext() if options.out is None else files.locked(options.out):
        report = diagnose(options, command=command_line)
        if options.out is not None:
            files.write_json(options.out / "diagnose.json", page.as_json(report))
            page.write_html(report, options.out / "diagnose.html")
    if options.json:
        print(json.dumps(page.as_json(report), indent=2))
    else:
        console = Console()
        console.print(terminal_table(page.table(report)))
        sentences = [
            f"Most similar classes: {page.strongest(report)}.",
            *(f"{finding.title} {finding.text}" for finding in report.findings),
            *page.answers(report),
        ]
        for sentence in sentences:
            console.print(Text(f"\n{sentence}"))
    if options.out is not None and not options.json:
        print(f"\npage: {options.out / 'diagnose.html'}\nfigures: {options.out / 'diagnose.json'}")
