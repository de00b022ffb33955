"""Recipes: what a run is made of, as dataclasses. Their fields are the options of the command line."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from torch import nn

from .. import losses
from ..errors import UserError, unknown_name
from ..losses import FeatureLoss, LogitLoss
from ..losses.modules import SimKDLoss, Standardized, WeightedSum
from ..methods import MEKD, FeatureMethod, FeatureTerm, LogitMethod, MetaDistil, Method, SimKD

Terms = dict[str, dict[str, Any]]


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
class TrainingOptions:
    """How to train.

    Attributes:
        epochs: Passes over the training rows.
        batch_size: Rows per step and process.
        seed: Of the initial weights, the order of the rows and the augmentation.
        optimizer: sgd (with Nesterov momentum) or adamw.
        lr: Peak learning rate.
        momentum: Of sgd.
        weight_decay: Of either optimizer.
        schedule: cosine, step or constant.
        warmup_epochs: Epochs over which the learning rate rises from 0; may be a fraction.
        milestones: Epochs after which the step schedule multiplies the learning rate.
        gamma: By how much.
        clip_norm: Largest norm of the gradient; None for no limit.
        accumulate: Batches per optimizer step.
        precision: no, bf16 or fp16.
        ema: Decay of an average of the weights, which is then evaluated and exported; None for none.
        patience: Stop after so many epochs without a better validation accuracy; None never stops early.
        checkpoint_every: Epochs between checkpoints to resume from.
        trackers: tensorboard, wandb.
        cpu: Stay on the CPU even where there is a GPU.
    """

    epochs: int = 30
    batch_size: int = 64
    seed: int = 0
    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    warmup_epochs: float = 0.0
    milestones: list[int] = field(default_factory=list)
    gamma: float = 0.1
    clip_norm: float | None = None
    accumulate: int = 1
    precision: Literal["no", "bf16", "fp16"] = "no"
    ema: float | None = None
    patience: int | None = None
    checkpoint_every: int = 1
    trackers: list[str] = field(default_factory=list)
    cpu: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"expected `training.{name}` to be at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"expected `training.seed` in 0 .. 2**32 - 1, got {self.seed}")
        for name in ("lr", "gamma", "clip_norm", "patience"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise UserError(f"expected `training.{name}` above 0, got {value}")
        for name in ("momentum", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"expected `training.{name}` of at least 0, got {getattr(self, name)}")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise UserError(
                f"expected `training.warmup_epochs` in [0, {self.epochs}), fewer than the epochs, "
                f"got {self.warmup_epochs}"
            )
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"expected `training.ema` between 0 and 1, got {self.ema}")


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


PROCEDURES: dict[str, Callable[..., Method]] = {
    "MEKD": MEKD,
    "MetaDistil": MetaDistil,
}
"""Methods that go around another one, by their names in recipes."""


def build_method(terms: Terms, procedures: Mapping[str, Callable[..., Method]] = PROCEDURES) -> Method:
    """The method that the loss terms of a recipe describe: on the logits, on features, or on both.

    An entry with ``method`` instead of ``loss`` names one of the procedures, which goes around the others.
    Its options are those that the procedure takes by name only.

    Raises:
        UserError: As `build_loss`, if all weights are 0, and on a term on features that does not say which
            ones.
    Example:
        >>> method = build_method(
        ...     {"task": {"loss": "CrossEntropyLoss"}, "hint": {"loss": "FitNetLoss", "student": "stages.0"}}
        ... )
        >>> method.terms["hint"].teacher
        ['stages.0']
    """
    # A loss may have an option called `method`: an entry that names a loss is never a procedure.
    around = [name for name, term in terms.items() if "method" in term and "loss" not in term]
    if len(around) > 1:
        raise UserError(f"expected one entry with `method` in `loss`, got {around}")
    for name in around:
        inner = build_method({other: term for other, term in terms.items() if other != name})
        return _around(f"loss.{name}", dict(terms[name]), inner, procedures)
    if all(term.get("weight", 1.0) == 0 for term in terms.values()):
        raise UserError(f"expected a term of a weight above 0 in `loss`, got {sorted(terms)} without one")
    known = _known(FeatureLoss)
    on_features = {name: term for name, term in terms.items() if str(term.get("loss")) in known}
    on_logits = {name: term for name, term in terms.items() if name not in on_features}
    if not on_features:
        return LogitMethod(build_loss(terms))
    features = {}
    for term, description in on_features.items():
        options = dict(description)
        student = _paths(term, "student", options.pop("student", None))
        teacher = _paths(term, "teacher", options.pop("teacher", student))
        weight, warmup = options.pop("weight", 1.0), options.pop("warmup", 0.0)
        loss = _build(f"loss.{term}", known, options, beside=("weight", "warmup", "student", "teacher"))
        features[term] = FeatureTerm(weight, loss, student, teacher, warmup)
    try:
        reuses_head = any(isinstance(term.loss, SimKDLoss) for term in features.values())
        method = SimKD if reuses_head else FeatureMethod
        return method(build_loss(on_logits) if on_logits else None, features)
    except (TypeError, ValueError) as error:
        raise UserError(f"`loss`: {error}") from error


def _around(
    place: str, options: dict[str, Any], inner: Method, procedures: Mapping[str, Callable[..., Method]]
) -> Method:
    """A method around another one, from its name and options."""
    name = str(options.pop("method"))
    if name not in procedures:
        raise unknown_name(f"method in `{place}`:", name, procedures)
    parameters = inspect.signature(procedures[name]).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise unknown_name(f"option of {name} in `{place}`:", option, known)
    try:
        return procedures[name](inner, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"`{place}`: {error}") from error


def _paths(term: str, network: str, value: object) -> list[str]:
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) for path in paths):
        raise UserError(
            f"expected `loss.{term}.{network}` to name a module or a list of modules, such as stages.0, "
            f"pool, or body.0 for one that has but a number, got {value!r}"
        )
    return paths


def build_loss(terms: Terms) -> WeightedSum:
    """The loss that the terms on logits of a recipe describe.

    Raises:
        UserError: On an unknown loss or option, or a value that the loss refuses.
    Example:
        >>> build_loss({"kd": {"loss": "KDLoss", "weight": 0.9, "temperature": 4.0}})
        WeightedSum(
          kd: 0.9
          (losses): ModuleDict(
            (kd): KDLoss(temperature=4.0)
          )
        )
    """
    known, built, warmup = _known(LogitLoss), {}, {}
    for term, description in terms.items():
        options = dict(description)
        weight = options.pop("weight", 1.0)
        if "warmup" in options:
            warmup[term] = options.pop("warmup")
        standardize = options.pop("standardize", False)
        if not isinstance(standardize, bool):
            raise UserError(f"expected `loss.{term}.standardize` to be true or false, got {standardize!r}")
        loss = _build(f"loss.{term}", known, options, beside=("weight", "warmup", "standardize"))
        built[term] = (weight, Standardized(loss) if standardize else loss)
    try:
        return WeightedSum(built, warmup)
    except (TypeError, ValueError) as error:
        raise UserError(f"`loss`: {error}") from error


def _known(kind: type[nn.Module]) -> dict[str, type[Any]]:
    """The losses of a kind that a recipe may name."""
    everything = {name: getattr(losses.modules, name) for name in losses.modules.__all__}
    no_loss = (kind, Standardized)
    return {name: cls for name, cls in everything.items() if issubclass(cls, kind) and cls not in no_loss}


def _build(place: str, known: Mapping[str, type[Any]], options: dict[str, Any], beside: Sequence[str]) -> Any:
    """A loss from its name and options, which stand in a recipe beside others that are not its own."""
    name = str(options.pop("loss", None))
    if name not in known:
        if name in _known(FeatureLoss):
            raise UserError(f"expected a loss on logits in `{place}`, got {name}, which compares features")
        raise unknown_name(f"loss in `{place}`:", name, (*_known(LogitLoss), *_known(FeatureLoss)))
    for option in options:
        if option not in (allowed := [field.name for field in dataclasses.fields(known[name])]):
            raise unknown_name(f"option of {name} in `{place}`:", option, (*allowed, *beside))
    try:
        return known[name](**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"`{place}`: {error}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file.

    Raises:
        UserError: If the file cannot be read or holds something else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the recipe {path} ({error}); name a YAML file") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"expected {path} to hold a YAML mapping, got {type(content).__name__}")
    return content


def merge(base: Mapping[str, Any], *overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings laid over one another, the last one on top; nothing is modified.

    >>> merge({"training": {"epochs": 3, "lr": 0.1}}, {"training": {"epochs": 5}})
    {'training': {'epochs': 5, 'lr': 0.1}}
    """
    merged = dict(base)
    for override in overrides:
        for key, value in override.items():
            old = merged.get(key)
            merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
