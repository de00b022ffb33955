"""Convert all students of a finished comparison to spiking networks, and keep their accuracy over time.

    luce compare benchmarks/studies/bsnn.yaml --out runs/bsnn
    python -m benchmarks.studies.spiking runs/bsnn benchmarks/results/bsnn [STEPS] [ROWS]

Besides the files of `benchmarks.studies.collect`, the folder then has `spiking.jsonl.gz`, a line per run, and
`spiking.png`: accuracy against time steps, mean over seeds.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.pictures import save_picture
from benchmarks.results import write_lines
from benchmarks.studies.collect import collect
from luce import reports
from luce.cli import spike
from luce.errors import UserError
from luce.reports.canvas import STYLE, colours
from luce.reports.runs import Comparison, Setting
from luce.spiking import report as page

MARKS = (1, 2, 4, 8, 16, 32, 64, 128)
Simulations = dict[tuple[str, str], list[dict[str, Any]]]


def convert(folder: Path, comparison: Comparison, steps: int, rows: int | None) -> Simulations:
    """Run `luce spike` on every run, unless its result is there; return the results by setting and method."""
    simulated: Simulations = {}
    for setting in comparison.settings:
        for method in comparison.methods:
            for run in comparison.runs[setting.name][method]:
                place = folder / setting.name / method / f"seed-{run.seed}"
                options = [
                    str(place),
                    "--steps",
                    str(steps),
                    *([] if rows is None else ["--rows", str(rows)]),
                ]
                written = place / "spiking" / "spike.json"
                command = shlex.join(["luce", "spike", *options])
                if not (written.exists() and json.loads(written.read_text())["command"] == command):
                    spike.main(options)
                simulated.setdefault((setting.name, method), []).append(json.loads(written.read_text()))
    return simulated


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Return the mean and the sample standard deviation as text."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def over_time(setting: Setting, simulated: Simulations, methods: Sequence[str], steps: int) -> str:
    marks = [mark for mark in MARKS if mark <= steps]
    lines = [
        f"| {setting.label} | source | " + " | ".join(f"t = {mark}" for mark in marks) + " |",
        "| :-- | --: |" + " --: |" * len(marks),
    ]
    for method in methods:
        seeds = simulated[setting.name, method]
        cells = [spread([100 * seed["accuracy"][mark - 1] for seed in seeds]) for mark in marks]
        source = spread([100 * seed["source_accuracy"] for seed in seeds])
        lines.append(f"| {method} | {source} | {' | '.join(cells)} |")
    return "\n".join(lines)


def costs(setting: Setting, simulated: Simulations, methods: Sequence[str]) -> str:
    lines = [
        f"| {setting.label} | last step less source, points | first within 1 point | spikes, all steps | "
        "leaving early: accuracy | steps | spikes | nJ, held | source nJ, multiplied | added | KiB |",
        "| :-- |" + " --: |" * 10,
    ]
    for method in methods:
        seeds = simulated[setting.name, method]
        within = [seed["within_a_point"] for seed in seeds]
        exits = [seed["early_exit"]["test"] for seed in seeds]
        energies = [seed["energy_nanojoules"]["source"] for seed in seeds]
        cells = [
            spread([100 * (seed["accuracy"][-1] - seed["source_accuracy"]) for seed in seeds], 2),
            "not in all seeds" if None in within else spread(within),
            spread([seed["spikes"][-1] for seed in seeds], 0),
            spread([100 * each["accuracy"] for each in exits]),
            spread([each["time"] for each in exits]),
            spread([each["spikes"] for each in exits], 0),
            spread([seed["early_exit"]["test_energy_nanojoules"]["held"] for seed in seeds], 0),
            spread([each["multiplied"] for each in energies], 0),
            spread([each["added"] for each in energies], 0),
            f"{seeds[0]['size']['bits'] / 8192:.1f}",
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def lower_thresholds(setting: Setting, simulated: Simulations, methods: Sequence[str], steps: int) -> str:
    marks = [mark for mark in MARKS if mark <= steps]
    percentiles = list(simulated[setting.name, methods[0]][0]["lower_thresholds"])
    lines = [
        f"| {setting.label}, percentile | " + " | ".join(f"t = {mark}" for mark in marks) + " |",
        "| :-- |" + " --: |" * len(marks),
    ]
    for method in methods:
        for percentile in percentiles:
            curves = [
                seed["lower_thresholds"][percentile]["accuracy"] for seed in simulated[setting.name, method]
            ]
            cells = [spread([100 * curve[mark - 1] for curve in curves]) for mark in marks]
            lines.append(f"| {method}, {percentile} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(
    comparison: Comparison, simulated: Simulations, steps: int, palette: Mapping[str, str], path: Path
) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = STYLE
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.2 * len(comparison.settings), 3.9), layout="constrained")
        panels = figure.subplots(1, len(comparison.settings), sharey=True, squeeze=False)[0]
        for axes, setting in zip(panels, comparison.settings, strict=True):
            for method in comparison.methods:
                seeds, colour = simulated[setting.name, method], palette[method]
                curve = [100 * mean(seed["accuracy"][time] for seed in seeds) for time in range(steps)]
                axes.plot(range(1, steps + 1), curve, color=colour, label=method)
                source = 100 * mean(seed["source_accuracy"] for seed in seeds)
                axes.axhline(source, color=colour, linewidth=0.8, linestyle=(0, (4, 3)))
            axes.set_xscale("log", base=2)
            marks = [mark for mark in MARKS if mark <= steps]
            axes.set_xticks(marks, [str(mark) for mark in marks])
            axes.minorticks_off()
            axes.set_title(setting.name, fontsize=9.5)
            axes.set_xlabel("time steps; dashed: the network before conversion")
        panels[0].set_ylabel("test accuracy (%)")
        panels[0].legend(frameon=False, loc="lower right")
        save_picture(figure, path, dpi=130)


def main(source: str, target: str, steps: str = "64", rows: str | None = None) -> None:
    folder, out = Path(source), Path(target)
    comparison = reports.read_comparison(folder)
    if comparison.missing:
        sys.exit(f"expected a finished comparison, got {folder}, of which runs are missing")
    simulated = convert(folder, comparison, int(steps), None if rows is None else int(rows))
    collect(folder, out)
    picture(comparison, simulated, int(steps), colours(comparison), out / "spiking.png")
    one = simulated[comparison.settings[0].name, comparison.methods[0]][0]
    how, over = one["settings"], (simulated, comparison.methods)
    text = [
        (out / "README.md").read_text(encoding="utf-8").strip(),
        "## As spiking networks",
        "Test accuracy in percent after each number of time steps, mean ± standard deviation over seeds, of "
        f"the students of the best epoch, on {one['rows']['test']:,} test rows. Percentile "
        f"{how['percentile']:g} of {one['rows']['calibration']:,} training rows; membranes start at "
        f"{how['start']:g} of their threshold; {how['mode']}.",
        "![Accuracy against time steps](spiking.png)",
        *(over_time(setting, *over, int(steps)) for setting in comparison.settings),
        "Costs. Leaving early is chosen on validation rows, of which it may lose "
        f"{100 * how['exit_loss']:g} points. Energy is an estimate: {page.ASSUMPTIONS}; the input current is "
        "computed once and held. `added` is the source network where a product with ±1 is an addition.",
        *(costs(setting, *over) for setting in comparison.settings),
        "Lower thresholds, from lower percentiles, fire sooner and cut off the largest activations:",
        *(lower_thresholds(setting, *over, int(steps)) for setting in comparison.settings),
        "A line per run is in `spiking.jsonl.gz`.",
    ]
    (out / "README.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    lines = [
        {"setting": setting, "method": method, **seed}
        for (setting, method), seeds in simulated.items()
        for seed in seeds
    ]
    write_lines(out / "spiking.jsonl.gz", lines)


if __name__ == "__main__":
    if not 3 <= len(sys.argv) <= 5:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
