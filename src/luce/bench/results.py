"""From figures to results: what a case records, how its goals are judged, where results are kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import write_text
from .cases import Case, Goal
from .measure import Timing

Record = dict[str, Any]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median with the 20th and the 80th percentile."""
    p20, median, p80 = np.percentile(values, (20, 50, 80)).tolist()
    return {"median": median, "p20": p20, "p80": p80}


def record(case: Case, timing: Timing, memory: Mapping[str, float]) -> Record:
    """Everything that a case gave, as values for JSON.

    A ratio is the baseline's time over the candidate's, taken within each round, which a drift of the
    machine's speed leaves alone; ``of_medians`` beside its spread is the ratio of the two medians.
    """
    seconds = {name: spread(values) for name, values in timing.seconds.items()}
    ratios = {}
    if own := timing.seconds.get(case.candidate):
        for name, other in timing.seconds.items():
            if name != case.candidate:
                of_medians = seconds[name]["median"] / seconds[case.candidate]["median"]
                rounds = [b / a for a, b in zip(own, other, strict=True)]
                ratios[name] = {**spread(rounds), "of_medians": of_medians}
    found: Record = {
        "case": case.name,
        "group": case.group,
        "shape": case.shape,
        "dtype": case.dtype,
        "logits": case.logits,
        "backward": case.backward,
        "candidate": case.candidate,
        "rounds": max(map(len, timing.seconds.values()), default=0),
        "repeats": timing.repeats,
        "seconds": seconds,
        "ratios": ratios,
        "memory": dict(memory),
        "failed": timing.failed,
    }
    values = [(goal, _value(goal, found)) for goal in case.goals]
    found["goals"] = [{**asdict(g), "text": str(g), "value": v, "verdict": g.verdict(v)} for g, v in values]
    return found


def _value(goal: Goal, found: Record) -> float | None:
    if goal.measure == "speed":
        return found["ratios"].get(goal.against, {}).get("median")
    if goal.measure == "memory":
        return found["memory"].get(found["candidate"])
    medians = {name: 1e6 * values["median"] for name, values in found["seconds"].items()}
    if found["candidate"] not in medians or (goal.against and goal.against not in medians):
        return None
    return medians[found["candidate"]] - medians.get(goal.against, 0.0)


def append(path: Path, found: Record) -> None:
    """Add a line; a reader sees the file before or after, never in between."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    write_text(path, before + json.dumps(found) + "\n")


def read_latest(path: Path) -> list[Record]:
    """The records of the run that was added last.

    Raises:
        UserError: If the file cannot be read.
    """
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        latest = records[-1]["run"]["id"]
        return [found for found in records if found["run"]["id"] == latest]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"expected lines of `luce bench` in {path}, got: {error!r}; choose another with --out"
        ) from error
