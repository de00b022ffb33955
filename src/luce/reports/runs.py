"""Read run folders and comparison folders into plain values.

Statistics, tables and plots start from these values; no other module of this package opens a result file.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..config import as_path
from ..documents import damaged, load_json, read_json, read_yaml
from ..errors import UserError, unknown_name

SEED_FOLDER = re.compile(r"seed-(\d+)")


@dataclass(frozen=True)
class Bin:
    """One bar of a reliability diagram: mean confidence and accuracy, in [0, 1], of ``count`` examples."""

    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True)
class Figures:
    """Test figures of a student.

    Rates are fractions in [0, 1], ``nll`` and ``kl`` are nats per example, Kendall's tau lies in [-1, 1].
    From `agreement` on, figures compare the student with its teacher and are None without one.
    """

    accuracy: float
    nll: float
    calibration_error: float
    reliability: tuple[Bin, ...]
    agreement: float | None = None
    kl: float | None = None
    kendall_tau: float | None = None
    topk_overlap: float | None = None
    kendall_tau_top: float | None = None
    kendall_tau_bottom: float | None = None
    kl_gradient_top: float | None = None
    kl_gradient_bottom: float | None = None


WITH_A_TEACHER = (
    *("agreement", "kl", "kendall_tau", "topk_overlap"),
    *("kendall_tau_top", "kendall_tau_bottom", "kl_gradient_top", "kl_gradient_bottom"),
)


@dataclass(frozen=True)
class Epoch:
    """One line of ``metrics.jsonl``."""

    number: int
    step: int
    seconds: float
    lr: float
    train: Mapping[str, float]
    validation: Mapping[str, float]


@dataclass(frozen=True)
class Moment:
    """Validation and test figures of the student after one epoch."""

    epoch: int
    validation: Mapping[str, float]
    test: Figures


@dataclass(frozen=True)
class Network:
    """A model's name and size; for a teacher also its test accuracy if known.

    ``parameters`` is None for a black box; ``queries`` is the number of rows sent to it.
    """

    model: str
    parameters: int | None
    accuracy: float | None = None
    queries: int | None = None


@dataclass(frozen=True)
class Sample:
    """An image that a method generated, bytes ``(channels, height, width)``, and the teacher's answer."""

    pixels: np.ndarray
    label: str
    confidence: float


@dataclass(frozen=True)
class Run:
    """One finished training run.

    ``prepared`` holds figures that the method measured before training, ``co_trained`` the test accuracy at
    the last epoch of networks trained together with the student.
    """

    folder: Path
    recipe: Mapping[str, Any]
    environment: Mapping[str, Any]
    epochs: tuple[Epoch, ...]
    method: str
    seed: int
    seconds: float
    selection: str
    student: Network
    teacher: Network | None
    last: Moment
    best: Moment
    prepared: Mapping[str, float] = field(default_factory=dict)
    co_trained: Mapping[str, float] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True)
class Setting:
    """One column of a comparison; ``description`` is a noun phrase that reads well after "With"."""

    name: str
    description: str

    @property
    def label(self) -> str:
        """The description if there is one, else the name."""
        return self.description or self.name


@dataclass(frozen=True)
class Comparison:
    """Several methods under several settings, each with one run per seed.

    ``runs[setting][method]`` holds the finished runs in the order of their seeds, possibly none;
    ``missing`` lists the run folders of the full grid that have no finished run.
    """

    folder: Path
    recipe: Mapping[str, Any]
    title: str
    question: str
    baseline: str
    command: str
    settings: tuple[Setting, ...]
    methods: tuple[str, ...]
    runs: Mapping[str, Mapping[str, tuple[Run, ...]]]
    teacher: Run | None
    missing: tuple[Path, ...]

    def finished(self) -> tuple[Run, ...]:
        """Return every finished student run."""
        return tuple(run for methods in self.runs.values() for runs in methods.values() for run in runs)

    def teacher_accuracy(self, setting: str) -> float | None:
        """Return the teacher's test accuracy as recorded by the students of a setting, in [0, 1]."""
        for runs in self.runs[setting].values():
            for run in runs:
                if run.teacher is not None:
                    return run.teacher.accuracy
        return None if self.teacher is None else self.teacher.last.test.accuracy


def read_run(folder: Path | str) -> Run:
    """Read a finished run.

    Args:
        folder: Holds ``recipe.yaml``, ``environment.json``, ``metrics.jsonl`` and ``result.json``.

    Raises:
        UserError: If a file is missing, cannot be read or lacks a field; names the file.
    """
    folder = as_path(folder)
    path = folder / "result.json"
    if not folder.is_dir():
        raise UserError(f"expected a folder that luce train, distill or compare has written, got {folder}")
    if not path.exists():
        raise UserError(f"{path} does not exist: the run has not finished; finish it or name another folder")
    result = read_json(path)
    with _fields_of(path):
        teacher = result.get("teacher")
        return Run(
            folder=folder,
            recipe=read_yaml(folder / "recipe.yaml"),
            environment=read_json(folder / "environment.json"),
            epochs=_read_epochs(folder / "metrics.jsonl"),
            method=str(result["method"]),
            seed=int(result["seed"]),
            seconds=float(result["seconds"]),
            selection=str(result["selection"]),
            student=Network(str(result["student"]["model"]), int(result["student"]["parameters"])),
            teacher=teacher and _teacher(teacher),
            last=_moment(result["last"]),
            best=_moment(result["best"]),
            prepared=dict(result.get("prepared", {})),
            co_trained={
                str(name): float(fields["test"]["accuracy"])
                for name, fields in result.get("co_trained", {}).items()
            },
            samples=_read_samples(folder / "samples.json"),
        )


def _teacher(content: Mapping[str, Any]) -> Network:
    size, test = content["parameters"], content["test"]
    return Network(
        str(content["model"]),
        None if size is None else int(size),
        None if test is None else float(test["accuracy"]),
        content.get("queries"),
    )


def read_comparison(folder: Path | str) -> Comparison:
    """Read ``comparison.yaml`` and every finished run at ``SETTING/METHOD/seed-N``.

    Settings and methods keep the order of ``comparison.yaml``, with the baseline first.

    Raises:
        UserError: If a file cannot be read, the baseline is none of the methods or no run has finished.
    """
    folder = as_path(folder)
    path = folder / "comparison.yaml"
    recipe = read_yaml(path)
    with _fields_of(path):
        baseline = str(recipe["baseline"])
        settings = tuple(
            Setting(str(name), str((options or {}).get("description") or "").strip().rstrip("."))
            for name, options in recipe["settings"].items()
        )

    declared = recipe.get("methods")
    names = [str(name) for name in declared] if isinstance(declared, (list, dict)) else []
    names += sorted({method.name for setting in settings for method in _folders(folder / setting.name)})
    if baseline not in names:
        raise unknown_name(f"baseline in {path}:", baseline, names)
    methods = tuple(dict.fromkeys([baseline, *names]))

    grid = [(setting.name, method) for setting in settings for method in methods]
    seeds = sorted({seed for cell in grid for seed in _seeds(folder.joinpath(*cell))})
    missing = [
        run
        for cell in grid
        for seed in seeds
        if not ((run := folder.joinpath(*cell, f"seed-{seed}")) / "result.json").exists()
    ]
    runs: dict[str, dict[str, tuple[Run, ...]]] = {setting.name: {} for setting in settings}
    for setting, method in grid:
        places = [folder / setting / method / f"seed-{seed}" for seed in seeds]
        runs[setting][method] = tuple(read_run(place) for place in places if place not in missing)
    if not any(finished for cell in runs.values() for finished in cell.values()):
        raise UserError(f"expected a finished run under {folder}, got none; run the comparison first")

    teacher = folder / "teacher"
    finished = (teacher / "result.json").exists()
    if teacher.is_dir() and not finished:
        missing.insert(0, teacher)
    return Comparison(
        folder=folder,
        recipe=recipe,
        title=str(recipe.get("title") or folder.resolve().name),
        question=str(recipe.get("question") or ""),
        baseline=baseline,
        command=str(recipe.get("command") or ""),
        settings=settings,
        methods=methods,
        runs=runs,
        teacher=read_run(teacher) if finished else None,
        missing=tuple(missing),
    )


def _folders(parent: Path) -> list[Path]:
    if not parent.is_dir():
        return []
    return [path for path in parent.iterdir() if path.is_dir() and not path.name.startswith(".")]


def _seeds(parent: Path) -> list[int]:
    return [int(match[1]) for path in _folders(parent) if (match := SEED_FOLDER.fullmatch(path.name))]


def _moment(fields: Mapping[str, Any]) -> Moment:
    test = fields["test"]
    optional = {name: test.get(name) for name in WITH_A_TEACHER}
    return Moment(
        epoch=int(fields["epoch"]),
        validation=dict(fields["validation"]),
        test=Figures(
            accuracy=float(test["accuracy"]),
            nll=float(test["nll"]),
            calibration_error=float(test["calibration_error"]),
            reliability=tuple(
                Bin(float(b["confidence"]), float(b["accuracy"]), int(b["count"]))
                for b in test["reliability"]
            ),
            **{name: None if value is None else float(value) for name, value in optional.items()},
        ),
    )


def _read_samples(path: Path) -> tuple[Sample, ...]:
    """Read the images that a method generated; empty if there are none."""
    if not path.exists():
        return ()
    content = read_json(path)
    with _fields_of(path):
        pixels = np.frombuffer(base64.b64decode(content["pixels"]), dtype=np.uint8)
        images = pixels.reshape(content["shape"])
        answers = zip(images, content["classes"], content["confidence"], strict=True)
        return tuple(Sample(*each) for each in answers)


def _read_epochs(path: Path) -> tuple[Epoch, ...]:
    epochs: dict[int, Epoch] = {}
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        with _fields_of(f"{path}, line {number}"):
            fields = load_json(line, f"{path}, line {number}")
            # A resumed run writes the interrupted epoch again; the later line replaces the earlier one.
            epochs[int(fields["epoch"])] = Epoch(
                number=int(fields["epoch"]),
                step=int(fields["step"]),
                seconds=float(fields["seconds"]),
                lr=float(fields["lr"]),
                train=dict(fields["train"]),
                validation=dict(fields["validation"]),
            )
    return tuple(epochs[number] for number in sorted(epochs))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}); name a folder that Luce wrote") from error


@contextmanager
def _fields_of(source: Path | str) -> Iterator[None]:
    """Name the file in the error when a field is missing or has a wrong type."""
    try:
        yield
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{source} has no field {error}; run it again with this version of Luce") from error
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise damaged(source, error) from error


def panels(source: Run | Comparison) -> Mapping[Setting, Mapping[str, Sequence[Run]]]:
    """Return the runs by setting and method; a single run is a grid of one."""
    if isinstance(source, Run):
        return {Setting("", ""): {source.method: (source,)}}
    return {
        setting: {method: runs for method, runs in source.runs[setting.name].items() if runs}
        for setting in source.settings
    }
