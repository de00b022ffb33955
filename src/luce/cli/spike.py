"""``luce spike``: a run's student as a spiking network."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from ..models import Classifier
    from ..spiking.experiment import SpikingResult

USAGE = "luce spike RUN [--steps T] [--percentile P] [--lower P,P] [--rows N] [--out FOLDER] [...]"
DESCRIPTION = """Convert the student of a finished run to integrate-and-fire neurons and simulate it on its
data: accuracy after every time step, spikes and an estimate of energy, leaving early, lower thresholds.
Writes spike.json, spike.png and spike.html into the folder spiking of the run.

Networks of convolutions, linear layers, ReLU, average pooling and batch normalisation convert; `vgg_pool` and
`mlp` among Luce's own, best with binary weights: `student: {name: "binary:vgg_pool"}`.

  luce spike runs/digits-bsnn/all-labels/PLD/seed-0 --steps 128 --percentile 99.9"""
BATCH = 250


def _parser() -> argparse.ArgumentParser:
    from ._parser import Parser, numbers

    parser = Parser("spike", usage=USAGE, description=DESCRIPTION)
    parser.add_argument("folder", metavar="RUN", type=Path, help="a finished run folder")
    parser.add_argument("--steps", type=int, default=64, help="time steps: 64")
    parser.add_argument(
        "--percentile",
        type=float,
        default=99.9,
        help="of a layer's activations, which becomes a rate of 1: 99.9",
    )
    parser.add_argument(
        "--lower", type=numbers, default=[99.0, 95.0], metavar="P,P", help="lower thresholds to try: 99,95"
    )
    parser.add_argument("--calibration", type=int, default=4096, metavar="N", help="training rows: 4096")
    parser.add_argument("--rows", type=int, metavar="N", help="of test and validation rows, at most so many")
    parser.add_argument(
        "--start", type=float, default=0.5, help="of the membranes, in thresholds: 0.5 rounds, 0 rounds down"
    )
    parser.add_argument("--mode", default="layerwise", help="layerwise, or synchronous: one layer per step")
    parser.add_argument(
        "--exit-loss", type=float, default=0.005, help="share of rows that leaving early may lose: 0.005"
    )
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU even where there is a GPU")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="RUN/spiking unless given")
    return parser


def main(words: Sequence[str]) -> None:
    parser = _parser()
    if "--help" in words or "-h" in words:
        parser.print_help()
        return
    request = parser.parse_args(list(words))
    _check(request)

    from rich.console import Console

    from .. import files
    from ..reports import terminal_table
    from ..spiking import read
    from ..spiking import report as page
    from ..training import checkpoint

    student, description = checkpoint.load_student(request.folder)
    read(student.body)  # refuse before any work
    out: Path = request.out or request.folder / "spiking"
    with files.folder_for_work(out):
        found = examine(request, student, description, shlex.join(["luce", "spike", *words]))
    files.write_json(out / "spike.json", page.as_json(found))
    files.write_bytes(out / "spike.png", page.picture(found))
    page.write_html(found, out / "spike.html")
    console = Console()
    console.print(terminal_table(page.table(found)))
    for sentence in (*page.answers(found), *(" ".join(warning) for warning in page.warnings(found))):
        console.print(f"\n{sentence}", highlight=False, markup=False)
    print(f"\npage: {out / 'spike.html'}\nfigures: {out / 'spike.json'}\npicture: {out / 'spike.png'}")


def _check(request: argparse.Namespace) -> None:
    """Refuse wrong figures before anything is loaded."""
    for name in ("steps", "calibration", "rows"):
        if (value := getattr(request, name)) is not None and value < 1:
            raise UserError(f"expected `--{name}` of at least 1, got {value}")
    for percentile in (request.percentile, *request.lower):
        if not 0 < percentile <= 100:
            raise UserError(f"expected percentiles above 0 and of at most 100, got {percentile:g}")
    if not 0 <= request.start < 1:
        raise UserError(f"expected `--start` of at least 0 and below 1, got {request.start:g}")
    if request.mode not in ("layerwise", "synchronous"):
        raise UserError(f"expected `--mode` layerwise or synchronous, got {request.mode}")
    if not 0 <= request.exit_loss <= 1:
        raise UserError(f"expected `--exit-loss` in [0, 1], got {request.exit_loss:g}")


def examine(
    request: argparse.Namespace, student: Classifier, description: dict[str, Any], command: str
) -> SpikingResult:
    """Load the data of the run that a request names, convert its student and simulate it.

    Raises:
        UserError: If the data are not there, or the network does not convert.
    """
    import torch

    from .. import __version__, data
    from ..config import parse, read_yaml
    from ..recipes.build import prepare_data
    from ..recipes.schema import Recipe
    from ..spiking.experiment import Settings, convert_and_simulate
    from ..training.engine import new_accelerator
    from ..training.progress import Bar, progress_bars

    folder: Path = request.folder
    recipe = parse(Recipe, read_yaml(folder / "recipe.yaml"))
    recipe.training.cpu = recipe.training.cpu or request.cpu
    materials = prepare_data(recipe)
    device = new_accelerator(recipe.training).device
    student = student.to(device)

    def some(rows: Any, most: int | None) -> Any:
        rows = rows.plain
        if most is None or most >= len(rows):
            return rows
        at = torch.linspace(0, len(rows) - 1, most).round().long()
        return data.Examples(rows.source, rows.indices[at], rows.targets[at])

    def batches(rows: Any) -> Iterator[Any]:
        for batch in data.loader(rows, batch_size=BATCH, seed=None, workers=recipe.data.workers):
            yield batch["input"].to(device), batch["target"].to(device)

    train, validation, test = (
        some(rows, most)
        for rows, most in (
            (materials.train, request.calibration),
            (materials.validation, request.rows),
            (materials.test, request.rows),
        )
    )
    with progress_bars() as progress:

        @contextmanager
        def watch(what: str) -> Iterator[Callable[[], None]]:
            rows = len(validation if what.startswith("validation") else test)
            with Bar(progress, what, total=request.steps * -(-rows // BATCH)) as bar:
                yield bar.advance

        return convert_and_simulate(
            student,
            batches(train),
            batches(validation),
            lambda: batches(test),
            Settings(
                request.steps,
                request.percentile,
                tuple(request.lower),
                request.start,
                request.mode,
                request.exit_loss,
            ),
            watch,
            name=str(folder),
            model=description["model"],
            command=command,
            facts=(("luce", __version__), ("torch", str(torch.__version__)), ("device", str(device))),
        )
