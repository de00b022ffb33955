"""Records of measured cases: their figures, the verdicts on their goals, and the file that keeps them."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from luce.errors import UserError

from .cases import Case, Goal

if TYPE_CHECKING:
    from .measure import Timing

Record = dict[str, Any]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median with the 20th and the 80th percentile."""
    p20, median, p80 = np.percentile(values, (20, 50, 80)).tolist()
    return {"median": median, "p20": p20, "p80": p80}


def record(
    case: Case,
    timing: Timing,
    memory: Mapping[str, float],
    errors: Mapping[str, float] | None = None,
    copy_gbps: float | None = None,
) -> Record:
    """Return all figures of a case as values for JSON.

    A ratio is the baseline's time over the candidate's within a round, so that a drift of the machine's speed
    cancels; ``of_medians`` beside its spread is the ratio of the two medians.
    """
    seconds = {name: spread(values) for name, values in timing.seconds.items()}
    ratios, copy_share = {}, None
    if own := timing.seconds.get(case.candidate):
        median = seconds[case.candidate]["median"]
        for name, other in timing.seconds.items():
            if name != case.candidate:
                rounds = [b / a for a, b in zip(own, other, strict=True)]
                ratios[name] = {**spread(rounds), "of_medians": seconds[name]["median"] / median}
        if copy_gbps is not None and not case.width:
            moved = (case.networks + case.backward) * case.array_bytes
            copy_share = moved / (copy_gbps * 1e9) / median
    figures: Record = {
        "case": case.name,
        "group": case.group,
        "device": case.device,
        "shape": case.shape,
        "dtype": case.dtype,
        "logits": case.logits,
        "backward": case.backward,
        "candidate": case.candidate,
        "rounds": max(map(len, timing.seconds.values()), default=0),
        "repeats": timing.repeats,
        "seconds": seconds,
        "ratios": ratios,
        "copy_share": copy_share,
        "memory": dict(memory),
        "errors": dict(errors or {}),
        "failed": timing.failed,
    }
    values = [(goal, _value(goal, figures)) for goal in case.goals]
    figures["goals"] = [{**asdict(g), "text": str(g), "value": v, "verdict": g.verdict(v)} for g, v in values]
    return figures


def _value(goal: Goal, figures: Record) -> float | None:
    candidate, memory = figures["candidate"], figures["memory"]
    if goal.measure == "speed":
        return figures["ratios"].get(goal.against, {}).get("median")
    if goal.measure == "copy":
        return figures["copy_share"]
    if goal.measure == "memory":
        if not goal.against:
            return memory.get(candidate)
        return (
            memory[candidate] / memory[goal.against] if {candidate, goal.against} <= memory.keys() else None
        )
    if goal.measure == "microseconds":
        median = figures["seconds"].get(candidate, {}).get("median")
        return None if median is None else 1e6 * median
    return figures["errors"].get(goal.measure)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that a reader sees as it was or complete, never in between."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def write_lines(path: Path, records: Sequence[Record]) -> None:
    """Write records as gzipped lines of JSON, the same bytes for the same records."""
    text = "".join(json.dumps(each) + "\n" for each in records)
    write_atomically(path, gzip.compress(text.encode(), mtime=0))


def read_lines(path: Path) -> list[Record]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def append(path: Path, figures: Record) -> None:
    """Add a record to a file of gzipped lines."""
    write_lines(path, [*(read_lines(path) if path.exists() else []), figures])


def read_latest(path: Path) -> list[Record]:
    """Return the records of the run that was added last.

    Raises:
        UserError: If the file cannot be read.
    """
    try:
        records = read_lines(path)
        latest = records[-1]["run"]["id"]
        return [each for each in records if each["run"]["id"] == latest]
    except (OSError, EOFError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"expected gzipped lines of `python -m benchmarks run` in {path}, got: {error!r}; "
            "choose another file with --out"
        ) from error
