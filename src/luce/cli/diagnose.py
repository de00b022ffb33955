"""``luce diagnose``: what a teacher knows beyond the labels, and how much of it reaches a student."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, unknown_name

if TYPE_CHECKING:
    from ..analysis.page import DiagnosisReport
    from ..data import Data, Examples
    from ..recipes.schema import Recipe

USAGE = "luce diagnose TEACHER DATA [--temperature T] [--student FOLDER] [--out FOLDER | --json] [...]"
DESCRIPTION = """Split what a teacher says beyond the labels into smoothing, classes and single rows; say what
it does to a student, and where its temperature stands between KD and logit matching; and compare it with
made-up teachers that know less. Any field of a recipe's teacher and data is an option too.

  luce diagnose runs/digits-teacher sklearn:digits --out runs/diagnosis
  luce diagnose resnet56 torchvision:CIFAR100 --checkpoint resnet56.pt --temperature 4
  luce diagnose timm:resnet18 imagefolder:photos --teacher.options.pretrained true --data.workers 4"""
SWEEP = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
SWEEP_ROWS = 8192
"""At other temperatures so many rows, taken at even distances, are enough."""
FRESH = "a student that knows nothing yet (all logits 0)"


def _parser() -> argparse.ArgumentParser:
    from ._parser import Parser

    parser = Parser("diagnose", usage=USAGE, description=DESCRIPTION)
    parser.add_argument("teacher", metavar="TEACHER", help="a run folder of Luce, or the name of a network")
    parser.add_argument("data", metavar="DATA", help="such as sklearn:digits; luce info lists what there is")
    parser.add_argument("--checkpoint", help="weights of a network that is given by name")
    parser.add_argument("--student", help="a run folder; a student that knows nothing unless given")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the teacher's softmax: 1")
    parser.add_argument("--weight", type=float, default=0.9, help="of KD in (1 - w) CE + w KD: 0.9")
    parser.add_argument("--root", help="folder of data that is not installed")
    parser.add_argument(
        "--held-out",
        choices=("validation", "test"),
        help="rows to hold the training rows against: validation rows for a run on the same data, which "
        "was not trained on them, else test rows",
    )
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU even where there is a GPU")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write diagnose.json and diagnose.html")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def main(words: Sequence[str]) -> None:
    parser = _parser()
    if "--help" in words or "-h" in words:
        parser.print_help()
        return
    request, rest = parser.parse_known_args(list(words))

    from rich.console import Console
    from rich.text import Text

    from .. import files
    from ..analysis import page
    from ..reports import terminal_table

    recipe, same_data = read(request, rest)
    _check_figures(request)
    command = shlex.join(["luce", "diagnose", *words])
    with nullcontext() if request.out is None else files.folder_for_work(request.out):
        report = examine(recipe, request, same_data=same_data, command=command)
    if request.json:
        print(json.dumps(page.as_json(report), indent=2))
    else:
        console = Console()
        console.print(terminal_table(page.table(report)))
        sentences = [
            f"Classes that resemble others most: {page.strongest(report)}.",
            *(f"{finding.title} {finding.text}" for finding in report.findings),
            *page.answers(report),
        ]
        for sentence in sentences:
            console.print(Text(f"\n{sentence}"))
    if request.out is not None:
        files.write_json(request.out / "diagnose.json", page.as_json(report))
        page.write_html(report, request.out / "diagnose.html")
        if not request.json:
            print(f"\npage: {request.out / 'diagnose.html'}\nfigures: {request.out / 'diagnose.json'}")


def _check_figures(request: argparse.Namespace) -> None:
    """Refuse wrong figures before a network is asked about all rows."""
    import torch

    from .. import analysis

    row = torch.zeros(1, 2)
    try:
        analysis.diagnose(
            row,
            torch.tensor([0]),
            student_logits=row,
            temperature=request.temperature,
            weight=request.weight,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def read(request: argparse.Namespace, rest: Sequence[str]) -> tuple[Recipe, bool]:
    """Teacher, student and data as a recipe has them, and whether the teacher was trained on this data.

    Raises:
        UserError: On an unknown option, or a teacher that is neither a run folder nor a name.
    """
    from ..config import merge, overrides, parse, read_yaml
    from ..recipes.schema import Recipe

    nested = overrides(rest)
    flags = [action.option_strings[0] for action in _parser()._actions if action.option_strings]
    for name in nested:
        if name not in ("teacher", "data"):
            raise unknown_name("option", f"--{name}", [*flags, "--teacher.FIELD", "--data.FIELD"])
    data: dict[str, Any] = {}
    folder, same_data = Path(request.teacher), False
    if folder.is_dir():
        teacher: dict[str, Any] = {"checkpoint": request.teacher}
        if request.checkpoint is not None:
            raise UserError(f"expected no `--checkpoint` beside {folder}, a run folder, which holds its own")
        if (folder / "recipe.yaml").exists():
            trained_on = read_yaml(folder / "recipe.yaml").get("data") or {}
            if same_data := trained_on.get("name") == request.data:
                data = {**trained_on, "labels_per_class": None}
    elif len(folder.parts) > 1 and ":" not in request.teacher:
        raise UserError(f"expected a run folder or the name of a network as TEACHER, got {request.teacher}")
    else:
        teacher = {"name": request.teacher, "checkpoint": request.checkpoint}
    data = {**data, "name": request.data}
    if request.root is not None:
        data["root"] = request.root
    content = {
        "data": data,
        "teacher": teacher,
        "student": {"checkpoint": request.student},
        "training": {"cpu": request.cpu},
    }
    recipe = parse(Recipe, merge(content, nested))
    # Whatever was asked for: every row is looked at once, as it is.
    recipe.data.augment = "none"
    assert recipe.teacher is not None
    recipe.teacher.cache_outputs = recipe.teacher.test = True
    return recipe, same_data


def rows(recipe: Recipe, loaded: Data, held_out: str, *, split: bool) -> tuple[Examples, Examples]:
    """Training rows and held-out rows as they are seen without augmentation."""
    import torch

    from .. import data
    from ..data.sources import as_source

    options = recipe.data
    if split:
        train, validation, test = data.split(loaded, validation=options.validation, seed=options.split_seed)
    else:
        train, test = (
            data.Examples(part, torch.arange(len(as_source(part)))) for part in (loaded.train, loaded.test)
        )
    if options.labels_per_class is not None:
        train = data.keep_labels(train, per_class=options.labels_per_class, seed=options.split_seed)
    return train.plain, validation if held_out == "validation" else test.plain


def examine(recipe: Recipe, request: argparse.Namespace, *, same_data: bool, command: str) -> DiagnosisReport:
    """Load what is needed, ask the networks about all rows, and put the figures together.

    Raises:
        UserError: If anything cannot be loaded, or does not fit together.
    """
    import torch

    from .. import __version__, analysis, data, suggest_temperature
    from ..analysis.page import DiagnosisReport
    from ..recipes.build import RunInputs, build_network
    from ..recipes.teacher import load_teacher
    from ..reports.runs import Bin
    from ..training import metrics
    from ..training.batches import EVALUATION_BATCH
    from ..training.engine import new_accelerator

    options = recipe.data
    loaded = data.load(options.name, root=options.root, **options.options)
    which = request.held_out or ("validation" if same_data else "test")
    train, held_out = rows(recipe, loaded, which, split=same_data or which == "validation")
    known = load_teacher(RunInputs(loaded, train, held_out, held_out, teacher=None), recipe).teacher
    assert known is not None
    parts = {"training": train, "held out": held_out}
    assert known.test is not None  # `read` has asked for it
    teacher = {
        name: source.signal({"index": part.indices}).logits
        for (name, part), source in zip(parts.items(), (known.train, known.test), strict=True)
    }
    student = {name: torch.zeros_like(logits, dtype=torch.float32) for name, logits in teacher.items()}
    who = FRESH
    if request.student is not None:
        network, description = build_network(recipe.student, loaded)
        accelerator = new_accelerator(recipe.training)
        network = accelerator.prepare(network)
        for name, part in parts.items():
            batches = data.loader(part, batch_size=EVALUATION_BATCH, seed=None, workers=options.workers)
            student[name], _, _ = metrics.collect(network, accelerator.prepare(batches), accelerator)
        who = f"the student {request.student} ({description['model']})"

    try:
        found = {
            name: analysis.diagnose(
                teacher[name],
                part.targets,
                temperature=request.temperature,
                student_logits=student[name],
                weight=request.weight,
            )
            for name, part in parts.items()
        }
        some = slice(None, None, -(-len(train) // SWEEP_ROWS))
        sweep = tuple(
            analysis.diagnose(
                teacher["training"][some], train.targets[some], temperature=temperature, references=False
            )
            for temperature in sorted({*SWEEP, request.temperature})
        )
        suggested = suggest_temperature(teacher["training"])
        limits = analysis.limits(
            student["training"][some], teacher["training"][some], temperature=request.temperature
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    reliability = {}
    for name, part in parts.items():
        labelled = part.targets != data.UNLABELLED
        figures = metrics.full(teacher[name][labelled].float(), None, part.targets[labelled])
        reliability[name] = [Bin(**bar) for bar in figures["reliability"]]
    count = known.description["parameters"]
    size = known.description["model"] + ("" if count is None else f", {count:,} parameters")
    return DiagnosisReport(
        teacher=request.teacher,
        data=request.data,
        classes=loaded.classes,
        student=who,
        train=found["training"],
        held_out=found["held out"],
        held_out_rows=f"{which} rows",
        sweep=sweep,
        limits=limits,
        suggested_temperature=suggested,
        reliability=reliability,
        command=command,
        facts=(("teacher", size), ("luce", __version__), ("torch", torch.__version__)),
    )
