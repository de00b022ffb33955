"""Judge rules for PLD's teacher temperature on finished comparisons: does one rule serve every teacher?

    for name in digits letters fashion-mnist glyphs; do
        luce compare benchmarks/studies/temperature-$name.yaml --out runs/temperature-$name
    done
    python -m benchmarks.studies.temperature runs/temperature-* benchmarks/results/temperature

A rule is a goal for a statistic of the teacher on the training rows: it takes the temperature that meets the
goal. Its regret is the points of test accuracy it loses against the best of the trained temperatures; between
them accuracy is interpolated. The goal has the smallest mean regret, once over all data sets and, to estimate
its worth on a new one, over all but the one it is judged on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import yaml
from torch import Tensor

from benchmarks.pictures import save_picture
from luce import reports
from luce.config import parse
from luce.errors import UserError
from luce.losses.temperature import first_place
from luce.recipes import Recipe, prepare
from luce.reports.runs import Comparison

FINE = np.geomspace(0.5, 8, 81)


def effective_ranks(logits: Tensor, temperature: float) -> float:
    """Return the exponential of the mean entropy: the number of places that share the teacher's weight."""
    total = 0.0
    for rows in logits.double().split(4096):
        log_p = (rows / temperature).log_softmax(-1)
        total -= (log_p.exp() * log_p).sum().item()
    return float(np.exp(total / len(logits)))


STATISTICS: dict[str, Callable[[Tensor, float], float]] = {
    "temperature": lambda logits, tau: tau,
    "first place": first_place,
    "effective ranks": effective_ranks,
}
GOALS = {
    "temperature": FINE,
    "first place": np.linspace(0.3, 0.98, 69),
    "effective ranks": np.geomspace(1.02, 30, 60),
}


@dataclass(frozen=True)
class Curve:
    """Test accuracy in percent of PLD by temperature in one setting of one data set, with its teacher."""

    data: str
    classes: int
    setting: str
    taus: tuple[float, ...]
    seeds: tuple[tuple[float, ...], ...]
    others: dict[str, float]
    statistics: dict[str, np.ndarray]

    @property
    def means(self) -> np.ndarray:
        return np.array([mean(seeds) for seeds in self.seeds])

    def accuracy(self, tau: float) -> float:
        return float(np.interp(np.log(tau), np.log(self.taus), self.means))

    def tau(self, statistic: str, goal: float) -> float:
        """Return the temperature at which the statistic meets the goal, within those that were trained."""
        values = self.statistics[statistic]
        if values[0] > values[-1]:
            values, goal = -values, -goal
        return float(np.exp(np.interp(goal, values, np.log(FINE))))

    def regret(self, statistic: str, goal: float) -> float:
        return float(self.means.max() - self.accuracy(self.tau(statistic, goal)))


def read_finished(folder: Path) -> Comparison:
    """Read a comparison.

    Raises:
        UserError: If one of its runs has not finished.
    """
    comparison = reports.read_comparison(folder)
    seeds = {run.seed for run in comparison.finished()}
    if comparison.missing or not seeds.issuperset(comparison.recipe["seeds"]):
        raise UserError(
            f"expected a finished comparison, got {folder}, of which runs are missing; "
            f"finish it with `{comparison.command}`"
        )
    return comparison


def curves(comparison: Comparison) -> list[Curve]:
    """Return the curves of one comparison."""
    folder, first = comparison.folder, comparison.finished()[0]
    recipe = parse(Recipe, yaml.safe_load((first.folder / "recipe.yaml").read_text()))
    assert recipe.teacher is not None
    recipe.teacher.checkpoint = str(folder / "teacher")
    inputs = prepare(recipe)
    logits = inputs.teacher.train.logits[inputs.train.indices]
    statistics = {
        name: np.array([statistic(logits, tau) for tau in FINE]) for name, statistic in STATISTICS.items()
    }
    results = []
    for setting, methods in comparison.runs.items():
        by_tau, others = {}, {}
        for method, runs in methods.items():
            accuracies = tuple(100 * run.last.test.accuracy for run in runs)
            kind, _, tau = method.partition(" ")
            if kind == "PLD" and tau != "auto":
                by_tau[float(tau or 1)] = accuracies
            else:
                others[method] = mean(accuracies)
        taus = tuple(sorted(by_tau))
        seeds = tuple(by_tau[tau] for tau in taus)
        name = recipe.data.name.split(".")[-1]
        results.append(Curve(name, logits.shape[1], setting, taus, seeds, others, statistics))
    return results


def best_goal(results: Sequence[Curve], statistic: str) -> float:
    return min(GOALS[statistic], key=lambda goal: mean(curve.regret(statistic, goal) for curve in results))


def draw(results: Sequence[Curve], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from luce.reports.canvas import BLUE, GREY, OTHERS, STYLE

    colours = dict(zip(dict.fromkeys(curve.data for curve in results), (BLUE, *OTHERS), strict=False))
    dashes = {"few-labels": "--", "300-classes": "--", "100-classes": ":"}
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
        for curve in results:
            gain = curve.means - curve.accuracy(1.0)
            style = {"color": colours[curve.data], "ls": dashes.get(curve.setting, "-")}
            label = f"{curve.data.removeprefix('sklearn:')}, {curve.setting}"
            left.plot(curve.taus, gain, "o", ms=3, label=label, **style)
            places = np.interp(np.log(curve.taus), np.log(FINE), curve.statistics["first place"])
            right.plot(places, gain, "o", ms=3, **style)
        for axes in (left, right):
            axes.axhline(0, color=GREY, lw=0.8)
        left.set_xscale("log", base=2)
        left.set_xticks(curve.taus, [f"{tau:g}" for tau in curve.taus])
        left.minorticks_off()
        left.set_xlabel("teacher temperature")
        left.set_ylabel("test accuracy minus that at 1, points")
        left.legend(fontsize=7)
        right.set_xlabel("mean probability of the teacher's first choice at that temperature")
        save_picture(figure, file, dpi=160)


def table(*rows: Sequence[str]) -> str:
    head, *body = ("| " + " | ".join(cells) + " |" for cells in rows)
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])


def report(results: Sequence[Curve]) -> str:
    taus = results[0].taus
    names = list(dict.fromkeys(name for curve in results for name in curve.others))
    accuracy = [("data, setting", *names, *(f"PLD {tau:g}" for tau in taus))]
    teachers = [
        (
            "data, setting",
            "best τ",
            "first place at τ = 1",
            "at the best",
            "effective ranks at 1",
            "at the best",
        )
    ]
    for curve in results:
        name, best = f"{curve.data}, {curve.setting}", curve.means.max()
        others = [f"{curve.others[other]:.2f}" if other in curve.others else "" for other in names]
        plds = [f"**{value:.2f}**" if value == best else f"{value:.2f}" for value in curve.means]
        accuracy.append((name, *others, *plds))
        best_tau = taus[int(curve.means.argmax())]
        looks = [
            f"{np.interp(np.log(tau), np.log(FINE), curve.statistics[statistic]):.3f}"
            for statistic in ("first place", "effective ranks")
            for tau in (1.0, best_tau)
        ]
        teachers.append((name, f"{best_tau:g}", *looks))
    rules = [("held", "goal", "mean regret", "worst", "mean on a data set left out", "worst")]
    for statistic in STATISTICS:
        goal = best_goal(results, statistic)
        seen = [curve.regret(statistic, goal) for curve in results]
        unseen = []
        for data in dict.fromkeys(curve.data for curve in results):
            elsewhere = best_goal([curve for curve in results if curve.data != data], statistic)
            unseen += [curve.regret(statistic, elsewhere) for curve in results if curve.data == data]
        figures = (mean(seen), max(seen), mean(unseen), max(unseen))
        rules.append((statistic, f"{goal:.2f}", *(f"{figure:.2f}" for figure in figures)))
    fixed = {
        "the paper's 1": [curve.regret("temperature", 1.0) for curve in results],
        "log10 of the classes, a guess made after looking": [
            curve.regret("temperature", np.log10(curve.classes)) for curve in results
        ],
    }
    for name, lost in fixed.items():
        rules.append((name, "", f"{mean(lost):.2f}", f"{max(lost):.2f}", "", ""))
    return "\n\n".join(
        [
            "## Test accuracy by temperature, percent",
            table(*accuracy),
            "## What the teacher looks like on the training rows",
            table(*teachers),
            "## Rules and what they lose, points",
            table(*rules),
        ]
    )


def main(folders: Sequence[str], out: Path) -> None:
    comparisons = [read_finished(Path(folder)) for folder in folders]
    results = [curve for comparison in comparisons for curve in curves(comparison)]
    if len(data := {curve.data for curve in results}) < 2:
        raise UserError(f"expected two data sets or more, to judge rules on one left out, got {data.pop()}")
    out.mkdir(parents=True, exist_ok=True)
    draw(results, out / "temperature.png")
    (out / "tables.md").write_text(report(results) + "\n", encoding="utf-8")
    lines = [
        {
            "data": c.data,
            "setting": c.setting,
            "accuracy": dict(zip(c.taus, c.seeds, strict=True)),
            **c.others,
        }
        for c in results
    ]
    (out / "curves.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(report(results))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    try:
        main(sys.argv[1:-1], Path(sys.argv[-1]))
    except UserError as error:
        sys.exit(str(error))
