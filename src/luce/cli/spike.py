"""``luce spike``: a run's student as a spiking network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..runs import SpikeOptions, spike


@dataclass(frozen=True, kw_only=True)
class Options(SpikeOptions):
    """Convert the student of a finished run to integrate-and-fire neurons and simulate it on the run's data.

    Reports accuracy after every time step, spikes, an estimate of energy, early exit, and lower thresholds.
    Writes spike.json, spike.png and spike.html.

    Networks of convolutions, linear layers, ReLU, average pooling and batch normalisation can be converted;
    of Luce's own, vgg_pool and mlp. Best with binary weights: student: {name: "binary:vgg_pool"}.

      luce spike runs/digits-bsnn/all-labels/PLD/seed-0 --steps 128 --percentile 99.9

    Attributes:
        run: A finished run.
        out: Folder of the results; RUN/spiking if not given.
    """

    run: Path
    out: Path | None = None


def main(options: Options, command_line: str) -> None:
    """Simulate, write the results and print the table."""
    from rich.console import Console

    from .. import files
    from ..reports import terminal_table
    from ..spiking import report
    from ..training.progress import progress_bars

    out = options.out or options.run / "spiking"
    with files.locked(out):
        with progress_bars() as progress:
            result = spike(options.run, options, command=command_line, progress=progress)
        files.write_json(out / "spike.json", report.as_json(result))
        files.write_bytes(out / "spike.png", report.picture(result))
        report.write_html(result, out / "spike.html")
    console = Console()
    console.print(terminal_table(report.table(result)))
    for sentence in (*report.answers(result), *(" ".join(warning) for warning in report.warnings(result))):
        console.print(f"\n{sentence}", highlight=False, markup=False)
    print(f"\npage: {out / 'spike.html'}\nfigures: {out / 'spike.json'}\npicture: {out / 'spike.png'}")
