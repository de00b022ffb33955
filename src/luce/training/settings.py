"""The options of the training loop."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ..errors import UserError

MOST = 2**31 - 1
"""Most epochs, rows of a batch, and batches of a step."""


@dataclass
class TrainingOptions:
    """Options of the training loop.

    Attributes:
        epochs: Passes over the training rows.
        batch_size: Rows per batch and process.
        seed: Seed of the initial weights, the order of the rows and the augmentation.
        optimizer: sgd (with Nesterov momentum) or adamw.
        lr: Peak learning rate.
        momentum: Momentum of sgd.
        weight_decay: Weight decay of either optimizer.
        schedule: Course of the learning rate after the warm-up: cosine, step or constant.
        warmup_epochs: Epochs over which the learning rate rises from 0; may be a fraction.
        milestones: Rising epochs after which the step schedule multiplies the learning rate by gamma.
        gamma: Factor of the step schedule.
        clip_norm: Largest norm of the gradient; None for no limit.
        accumulate: Batches per optimizer step.
        precision: Mixed precision: no, bf16 or fp16.
        ema: Decay of an exponential moving average of the weights, which is then evaluated and exported; None
            for no average.
        patience: Stop after this many epochs without a better validation accuracy; None never stops early.
        checkpoint_every: Epochs between checkpoints.
        trackers: tensorboard, wandb.
        cpu: Use the CPU even if there is a GPU.
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
            if not 1 <= (value := getattr(self, name)) <= MOST:
                bound = f"at least 1, got {value}" if value < 1 else f"at most {MOST}, got {value}"
                raise UserError(f"expected `training.{name}` to be {bound}")
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
        if sorted({0, *self.milestones}) != [0, *self.milestones]:
            raise UserError(f"expected `training.milestones` as rising epochs from 1, got {self.milestones}")
        if self.milestones and self.schedule != "step":
            raise UserError(
                f"expected `training.schedule: step` with `training.milestones`, got {self.schedule}, which "
                "has none"
            )
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"expected `training.ema` between 0 and 1, got {self.ema}")
