"""Kills commands at random moments, and compares what they end in with an uninterrupted run.

    python -m benchmarks.kills [--kills 100] [--seed 0] [--folder FOLDER] [WORK ...]

Each kill starts a command in a new folder, ends all its processes with SIGKILL at a moment that is drawn
evenly from the time which the whole command takes, and runs it again. All files but reports and times must
then be those of the uninterrupted run, bit for bit, and nothing temporary may be left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from luce import digest

BASE: dict[str, Any] = {
    "data": {"name": "sklearn:digits", "validation": 0.2},
    "student": {"name": "mlp", "options": {"hidden": [16]}},
    "training": {"epochs": 30, "batch_size": 64, "lr": 0.01, "cpu": True},
}
TEACHER = {"name": "mlp", "checkpoint": "teacher"}
KD = {"task": {"loss": "CrossEntropyLoss", "weight": 0.1}, "kd": {"loss": "KDLoss", "temperature": 4.0}}
RECIPES: dict[str, dict[str, Any]] = {
    "teacher": {"loss": {"task": {"loss": "CrossEntropyLoss"}}, "training": {"epochs": 4}},
    "ema": {"teacher": TEACHER, "loss": KD, "training": {"ema": 0.9}},
    "accumulation": {"teacher": TEACHER, "loss": KD, "training": {"accumulate": 3, "checkpoint_every": 4}},
    "two views": {
        "data": {"augment": "crop_flip", "strong_augment": "strong", "workers": 2},
        "teacher": TEACHER,
        "loss": {"task": {"loss": "CrossEntropyLoss"}, "mlld": {"loss": "MLLDLoss"}},
        "training": {"epochs": 5},
    },
    "metadistil": {
        "teacher": TEACHER,
        "loss": {"meta": {"method": "MetaDistil", "teacher_lr": 0.01}, **KD},
        "training": {"epochs": 12},
    },
    "mekd": {
        "teacher": {**TEACHER, "answers": "probs", "budget": 400},
        "loss": {
            "kd": {"loss": "KDLoss"},
            "mekd": {"method": "MEKD", "queries": 400, "gan_epochs": 2, "gan_width": 8},
        },
        "training": {"epochs": 8},
    },
    "compare": {
        "title": "Kills",
        "question": "Do they change anything?",
        "baseline": "KD",
        "seeds": [0, 1],
        "settings": {"all": {"description": "all labels"}},
        "methods": {"KD": {"kd": {"loss": "KDLoss"}}, "PLD": {"pld": {"loss": "PLDLoss"}}},
        "teacher": {"name": "mlp", "options": {"hidden": [16]}},
        "teacher_training": {"epochs": 6},
        "training": {"epochs": 8},
    },
}
WORKS = (*(name for name in RECIPES if name != "teacher"), "onnx", "packed")
REPORTS = ("report.html", "environment.json", "digests.json")
"""Files with times in them, and their digests."""


@dataclass(frozen=True)
class Outcome:
    """What a kill came to: ``equal``, ``not equal``, ``refused`` or ``finished before``, and details."""

    kind: str
    about: str = ""


def prepare(place: Path) -> None:
    """Write the recipes into a folder, and train the teacher that they name."""
    for name, recipe in RECIPES.items():
        parts = {key: {**value, **recipe.get(key, {})} for key, value in BASE.items()}
        (place / f"{name}.yaml").write_text(yaml.safe_dump({**recipe, **parts}, sort_keys=False))
    done = start(place, "teacher", Path("teacher"))
    _, said = done.communicate()
    if done.returncode:
        raise SystemExit(said)


def start(place: Path, work: str, out: Path) -> subprocess.Popen[str]:
    """Start a command in a process group of its own; its files go to `out`, below `place`."""
    if work in ("onnx", "packed"):
        ending = {"onnx": ".onnx", "packed": ".safetensors"}[work]
        words = ["export", "teacher", "--format", work, "--out", str(out / f"student{ending}")]
    else:
        command = {"teacher": "train", "compare": "compare"}.get(work, "distill")
        words = [command, f"{work}.yaml", "--out", str(out)]
    return subprocess.Popen(
        [sys.executable, "-m", "luce", *words],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill(place: Path, work: str, out: Path, after: float, whole: Mapping[str, Any]) -> Outcome:
    """Kill a command after some seconds, run it again, and compare its files with those of a whole run."""
    process = start(place, work, out)
    try:
        _, said = process.communicate(timeout=after)
        return Outcome("refused", said) if process.returncode else Outcome("finished before")
    except subprocess.TimeoutExpired:
        pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    process = start(place, work, out)
    _, said = process.communicate()
    if process.returncode:
        return Outcome("refused", said.strip().splitlines()[-1])
    now = content(place, out)
    different = sorted(name for name in now.keys() | whole.keys() if now.get(name) != whole.get(name))
    return Outcome("not equal", ", ".join(different)) if different else Outcome("equal")


def content(place: Path, out: Path) -> dict[str, Any]:
    """Return all files of a folder by name, without times and the folder's own name.

    Temporary ones too, which should not be there.
    """
    folder = place / out
    return {str(path.relative_to(folder)): _read(path, out) for path in _files(folder)}


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and path.name not in REPORTS)


def _read(path: Path, out: Path) -> Any:
    if path.suffix == ".safetensors":  # whose metadata have no order
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return file.metadata(), digest.of_tensors(tensors)
    if path.suffix == ".yaml":
        return path.read_text(encoding="utf-8").replace(str(out), "OUT")
    if path.name not in ("metrics.jsonl", "result.json"):
        return path.read_bytes()
    text = path.read_text(encoding="utf-8")
    values = (
        [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else [json.loads(text)]
    )
    return [{key: value for key, value in record.items() if key != "seconds"} for record in values]


def study(place: Path, works: Sequence[str], kills: int, seed: int) -> dict[str, Counter[str]]:
    """Kill the works in turn until each kill has met a living command; print what was not equal."""
    prepare(place)
    wholes, seconds = {}, {}
    for work in works:
        started = time.perf_counter()
        process = start(place, work, Path("whole") / work)
        _, said = process.communicate()
        if process.returncode:
            raise SystemExit(f"{work}: {said}")
        seconds[work] = time.perf_counter() - started
        wholes[work] = content(place, Path("whole") / work)
    draw = random.Random(seed)
    table: dict[str, Counter[str]] = {work: Counter() for work in works}
    number = tries = 0
    while number < kills and tries < 3 * kills:
        work = works[number % len(works)]
        after, tries = draw.uniform(0, seconds[work]), tries + 1
        outcome = kill(place, work, Path("cut") / f"{work}-{tries}", after, wholes[work])
        table[work][outcome.kind] += 1
        number += outcome.kind != "finished before"
        if outcome.about:
            print(f"{work}, killed after {after:.2f} s: {outcome.kind}: {outcome.about}", flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("works", nargs="*", metavar="WORK", help=f"of {', '.join(WORKS)}; all unless given")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep all files here, a new folder")
    request = parser.parse_args()
    if unknown := set(request.works) - set(WORKS):
        parser.error(f"unknown work {min(unknown)}; known: {', '.join(WORKS)}")
    with tempfile.TemporaryDirectory() as temporary:
        place = request.folder or Path(temporary)
        place.mkdir(parents=True, exist_ok=request.folder is None)
        table = study(place, request.works or WORKS, request.kills, request.seed)
    kinds = ("equal", "not equal", "refused", "finished before")
    print(f"{'':14}" + "".join(f"{kind:>17}" for kind in kinds))
    for work, counts in table.items():
        print(f"{work:14}" + "".join(f"{counts[kind]:17}" for kind in kinds))
    killed = sum(sum(counts.values()) - counts["finished before"] for counts in table.values())
    equal = sum(counts["equal"] for counts in table.values())
    print(f"{equal} of {killed} kills equal to an uninterrupted run")
    if equal < killed or killed < request.kills:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
