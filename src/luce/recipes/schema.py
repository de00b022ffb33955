"""Recipes as dataclasses; their fields are the options of the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..config import merge, parse
from ..errors import UserError, unknown_name
from ..training.settings import TrainingOptions


def refuse_options(options: Mapping[str, Any], kind: str, settled: Sequence[str]) -> None:
    """Refuse further options of data or a model that are settled elsewhere."""
    for name in settled:
        if name in options:
            raise UserError(
                f"expected no `{name}` among the `options` of the {kind}: it is settled elsewhere"
            )


@dataclass
class DataOptions:
    """Which data, and which part of it.

    Attributes:
        name: Such as ``sklearn:digits``, ``fashion-mnist``, ``torchvision:CIFAR100``, ``imagefolder:PATH``,
            ``hf:NAME``, ``python:module.attr``.
        root: Folder of data that is not installed.
        options: Further options of the data source.
        validation: Share of the training rows kept apart to choose epochs by.
        split_seed: Of the validation split and of the choice of labels; compared runs share it.
        labels_per_class: Keep only so many labels; the other rows stay as unlabelled ones. None keeps all.
        augment: none, flip, crop_flip or strong.
        strong_augment: Likewise, applied to a second view of each training batch, on top of augment drawn
            anew; the loss is then the sum over both views. none for one view alone.
        workers: Processes that read; 0 for data in memory.
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
        if self.workers < 0:
            raise UserError(f"expected `data.workers` of at least 0, got {self.workers}")
        refuse_options(self.options, "data", ("name", "root"))


@dataclass
class ModelOptions:
    """A network.

    Attributes:
        name: Such as ``resnet20``, ``timm:NAME``, ``torchvision:NAME``, ``hf:NAME``, ``python:module.attr``.
        options: Further options of the model.
        checkpoint: Weights to start from: a run folder of Luce, a safetensors file or a .pt file of tensors.
        mean: Per channel, of the inputs it was made for; None takes the data's.
        std: As mean.
    """

    name: str = "mlp"
    options: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    mean: list[float] | None = None
    std: list[float] | None = None

    def __post_init__(self) -> None:
        refuse_options(self.options, "model", ("name", "classes", "input_shape"))


@dataclass
class TeacherOptions(ModelOptions):
    """The network to learn from, or the address of one.

    Attributes:
        cache_outputs: Ask it once about every row instead of once per epoch; only without augmentation.
        url: Of a server that answers as a black box, such as ``luce serve``; instead of a network.
        answers: What a black box tells: probs, topk or label. None for all that a network knows, or for
            whatever the server tells.
        top_k: How many classes topk tells.
        budget: Rows that a black box may be asked about; None for any number.
        floor: Probabilities below it count as it; None for half of the last decimal, or 1e-12.
        cache: File of the server's answers, which other runs may share.
        concurrency: Requests to the server at one time.
        batch_size: Most rows in one.
        timeout: Seconds until one must be answered.
        retries: How often one that is not is repeated.
        token_env: Environment variable that holds the server's token.
        token_file: Or a file with it.
        test: Ask the server about the test rows too, for figures that compare with it.
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
        """Refuse options that do not go together.

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

    @property
    def black_box(self) -> bool:
        """Whether it only answers."""
        return self.url is not None or self.answers is not None


@dataclass
class Recipe:
    """One run.

    Attributes:
        method: What reports call it.
        data: Which data.
        student: The network to train.
        teacher: The network to learn from; none for a plain training.
        loss: The terms of the loss by name. Each has a ``loss``, such as PLDLoss, a ``weight`` (1 unless
            given), perhaps a ``warmup`` (epochs over which the weight grows), perhaps ``standardize: true``
            (it sees each row's logits in units of their spread), and that loss's own options. One on features
            names the modules that they come from: ``student``, such as ``pool`` or ``[stages.0, stages.1]``,
            and ``teacher``, which is the same unless given. One entry may have a ``method`` instead, with its
            options: it changes how the others are trained.
        training: How to train.
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


@dataclass
class ComparisonRecipe:
    """One comparison: every method in every setting with every seed.

    Attributes:
        title: Of the report.
        question: That the comparison answers, in a sentence.
        baseline: The method that the others are compared with.
        seeds: One run each; methods are paired by them.
        data: Which data.
        student: The network to train.
        teacher: The network to learn from.
        teacher_training: How to train the teacher first, on all labels; None if its checkpoint or its
            options bring weights already.
        training: How to train the students.
        settings: By name, what differs from the above; ``description`` is a noun phrase for the report.
        methods: By name, the terms of the loss.
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
                    "expected names of settings and methods that can name a folder beside that of the "
                    f"teacher, got `{name}`"
                )
        if self.teacher.url is not None and self.teacher_training is not None:
            raise UserError("expected no `teacher_training` beside `teacher.url`, whose teacher is trained")
        for name, changes in self.settings.items():
            for key in ("loss", "method"):
                if key in changes:
                    raise UserError(f"expected no `{key}` in setting `{name}`: all settings share `methods`")

    def recipe(self, setting: str, method: str, seed: int) -> Recipe:
        """The recipe of one run."""
        base = {name: asdict(getattr(self, name)) for name in ("data", "student", "teacher", "training")}
        changes = {key: value for key, value in self.settings[setting].items() if key != "description"}
        content = merge(base, changes, {"training": {"seed": seed}, "method": method})
        return parse(Recipe, {**content, "loss": self.methods[method]})

    def teacher_recipe(self) -> Recipe:
        """The recipe of the teacher, which learns from all labels by cross-entropy."""
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
