"""Recipes as dataclasses; their fields are the options of the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..config import merge, parse
from ..errors import UserError, unknown_name
from ..training.settings import TrainingOptions

MOST_WORKERS = 256
"""More processes than any machine's cores need; a mistyped number would fill its memory."""


def refuse_options(options: Mapping[str, Any], kind: str, settled: Sequence[str]) -> None:
    """Refuse `options` of data or a model that have a field or a source of their own.

    Raises:
        UserError: On such an option.
    """
    for name in settled:
        if name in options:
            raise UserError(f"expected no `{name}` in the `options` of the {kind}: it is set elsewhere")


@dataclass
class DataOptions:
    """Data of a run.

    Attributes:
        name: Data source, such as ``sklearn:digits``, ``fashion-mnist``, ``torchvision:CIFAR100``,
            ``imagefolder:PATH``, ``hf:NAME``, ``python:module.attr``.
        root: Folder of data that is not installed.
        options: Further options of the data source.
        validation: Share of the training rows that is held out to choose the best epoch.
        split_seed: Seed of the validation split and of the choice of labels; compared runs share it.
        labels_per_class: Number of labels to keep per class; the other rows become unlabelled. None keeps
            all labels.
        augment: Augmentation of training batches: none, flip, crop_flip or strong.
        strong_augment: Augmentation of a second view of each training batch, applied on top of a new draw of
            augment; the loss is then the sum over both views. none for a single view.
        workers: Processes that read data; 0 for data in memory.
    """

    name: str = "sklearn:digits"
    root: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    validation: float = 0.1
    split_seed: int = 0
    labels_per_class: int | None = None
    augment: str = "none"
    strong_augment: str = "none"
    workers: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.workers <= MOST_WORKERS:
            raise UserError(f"expected `data.workers` in 0 .. {MOST_WORKERS}, got {self.workers}")
        if not 0 < self.validation < 1:
            raise UserError(f"expected `data.validation` as a share in (0, 1), got {self.validation:g}")
        if not 0 <= self.split_seed < 2**32:
            raise UserError(f"expected `data.split_seed` in 0 .. 2**32 - 1, got {self.split_seed}")
        if self.labels_per_class is not None and self.labels_per_class < 1:
            raise UserError(f"expected `data.labels_per_class` of at least 1, got {self.labels_per_class}")
        refuse_options(self.options, "data", ("name", "root"))


@dataclass
class ModelOptions:
    """A network.

    Attributes:
        name: Architecture, such as ``resnet20``, ``timm:NAME``, ``torchvision:NAME``, ``hf:NAME``,
            ``python:module.attr``.
        options: Further options of the model.
        checkpoint: Initial weights: a safetensors file, a .pt file of tensors, or a run folder of Luce, whose
            network and normalisation replace the other fields.
        mean: Mean of each input channel that the network subtracts; None for that of the data.
        std: Standard deviation that it divides by, likewise.
        match_classes: How the classes of a trained network are matched with the data's: by ``name``, or by
            ``position`` whatever their names are.
    """

    name: str = "mlp"
    options: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    match_classes: Literal["name", "position"] = "name"

    def __post_init__(self) -> None:
        refuse_options(self.options, "model", ("name", "classes", "input_shape"))


@dataclass
class TeacherOptions(ModelOptions):
    """The teacher: a network, or the address of a server.

    Attributes:
        cache_outputs: Query the teacher once per row and keep its answers, instead of once per epoch; only
            without augmentation.
        url: Address of a server that answers as a black box, such as ``luce serve``; instead of a network.
        answers: Form of a black box's answers: probs, topk or label. None for the logits of a network, or
            for the form that the server offers.
        top_k: Number of classes in an answer of form topk.
        budget: Largest number of queries to a black box, in rows; None for no limit.
        floor: Smaller probabilities count as it; None for half of the last decimal of rounded answers, else
            1e-12.
        cache: File that stores the server's answers; runs may share it.
        concurrency: Number of simultaneous requests to the server.
        batch_size: Largest number of rows in one request.
        timeout: Seconds after which a request fails.
        retries: Number of repetitions of a failed request.
        token_env: Environment variable that holds the server's token.
        token_file: File that holds the server's token.
        test: Query the server about the test rows too, to compare the student with it.
    """

    cache_outputs: bool = False
    url: str | None = None
    answers: Literal["probs", "topk", "label"] | None = None
    top_k: int | None = None
    budget: int | None = None
    floor: float | None = None
    cache: str = "runs/answers.sqlite"
    concurrency: int = 8
    batch_size: int = 256
    timeout: float = 60.0
    retries: int = 5
    token_env: str | None = None
    token_file: str | None = None
    test: bool = False

    def check(self) -> None:
        """Check that the options fit together.

        Raises:
            UserError: If they do not.
        """
        if self.url is not None and (self.checkpoint is not None or self.options):
            raise UserError("expected `teacher.url` or a network as the teacher, got both; leave out one")
        if self.url is None and self.answers is None:
            for name in ("top_k", "budget", "floor"):
                if getattr(self, name) is not None:
                    raise UserError(
                        f"expected `teacher.{name}` with `teacher.answers` or `teacher.url` alone"
                    )
        if self.floor is not None and not 0 < self.floor < 1:
            raise UserError(f"expected `teacher.floor` in (0, 1), got {self.floor}")


@dataclass
class Recipe:
    """One run.

    Attributes:
        method: Name of the method in reports.
        data: Data and its augmentation.
        student: The network to train.
        teacher: The network to learn from; none for training without a teacher.
        loss: The terms of the loss by name. Each has a ``loss``, such as PLDLoss, the options of that loss,
            and optionally a ``weight`` (1 by default), a ``warmup`` (epochs over which the weight grows from
            0) and ``standardize: true`` (divide each row's logits by their standard deviation). A loss on
            features names modules: ``student``, such as ``pool`` or ``[stages.0, stages.1]``, and
            ``teacher``, by default the same. One entry may have a ``method`` in place of ``loss``, such as
            MetaDistil, and its options; it changes how the other terms are trained.
        training: Options of the training loop.
    """

    method: str = "PLD"
    data: DataOptions = field(default_factory=DataOptions)
    student: ModelOptions = field(default_factory=ModelOptions)
    teacher: TeacherOptions | None = None
    loss: dict[str, dict[str, Any]] = field(default_factory=lambda: {"pld": {"loss": "PLDLoss"}})
    training: TrainingOptions = field(default_factory=TrainingOptions)

    def __post_init__(self) -> None:
        if self.teacher is not None:
            self.teacher.check()

    @property
    def names(self) -> tuple[str, ...]:
        """The networks that it names, which run folders may therefore name too; see `luce.trust`."""
        return (self.student.name, *(() if self.teacher is None else (self.teacher.name,)))


@dataclass
class ComparisonRecipe:
    """One comparison: every method in every setting with every seed.

    Attributes:
        title: Title of the report.
        question: The question that the comparison answers, in one sentence.
        baseline: The method that the others are compared with.
        seeds: Seeds of the runs of each method; methods are paired by seed.
        data: Data and its augmentation.
        student: The network to train.
        teacher: The network to learn from.
        teacher_training: Options of the teacher's own training on all labels; None for a teacher that has
            weights.
        training: Options of the students' training.
        settings: Changes to the fields above by name of the setting; ``description`` is a noun phrase for the
            report.
        methods: Terms of the loss by name of the method; see Recipe.
    """

    title: str = "Comparison"
    question: str = "Which method trains the best student?"
    baseline: str = "cross-entropy"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    data: DataOptions = field(default_factory=DataOptions)
    student: ModelOptions = field(default_factory=ModelOptions)
    teacher: TeacherOptions = field(default_factory=TeacherOptions)
    teacher_training: TrainingOptions | None = None
    training: TrainingOptions = field(default_factory=TrainingOptions)
    settings: dict[str, dict[str, Any]] = field(default_factory=lambda: {"all": {}})
    methods: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.baseline not in self.methods:
            raise unknown_name("baseline", self.baseline, self.methods)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"expected `seeds` as a list of different integers, got {self.seeds}")
        if not self.settings:
            raise UserError("expected at least one entry in `settings`, got none")
        for name in (*self.settings, *self.methods):
            if not name or name.startswith(".") or "/" in name or "\\" in name or name == "teacher":
                raise UserError(
                    "expected names of settings and methods that can name a folder other than `teacher`, "
                    f"got `{name}`"
                )
        if self.teacher.url is not None and self.teacher_training is not None:
            raise UserError("expected no `teacher_training` with `teacher.url`, whose teacher is trained")
        for name, changes in self.settings.items():
            for key in ("loss", "method"):
                if key in changes:
                    raise UserError(f"expected no `{key}` in setting `{name}`: all settings share `methods`")
            for key in ("data", "student", "teacher", "training"):
                if not isinstance(changes.get(key, {}), dict):
                    raise UserError(f"expected `settings.{name}.{key}` as a mapping, got {changes[key]!r}")

    def recipe(self, setting: str, method: str, seed: int) -> Recipe:
        """Return the recipe of one run."""
        base = {name: asdict(getattr(self, name)) for name in ("data", "student", "teacher", "training")}
        changes = {key: value for key, value in self.settings[setting].items() if key != "description"}
        content = merge(base, changes, {"training": {"seed": seed}, "method": method})
        return parse(Recipe, {**content, "loss": self.methods[method]})

    def teacher_recipe(self) -> Recipe:
        """Return the recipe that trains the teacher on all labels with cross-entropy."""
        assert self.teacher_training is not None
        return Recipe(
            method="teacher",
            data=dataclasses.replace(self.data, labels_per_class=None, strong_augment="none"),
            student=ModelOptions(
                **{f.name: getattr(self.teacher, f.name) for f in dataclasses.fields(ModelOptions)}
            ),
            teacher=None,
            loss={"task": {"loss": "CrossEntropyLoss"}},
            training=self.teacher_training,
        )
