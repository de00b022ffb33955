r"""Mapping-Emulation KD: distillation from a black box through generated images.

First a generator :math:`G` learns to make images like the training rows from latents :math:`z \sim N(0,
I_C)`. Then it is frozen, and student :math:`S` and teacher :math:`T` are evaluated on :math:`x' = G(z)`:

.. math:: L = w \cdot \frac{1}{m n} \sum_{i=1}^{m} \big\lVert G(\bar S(x'_i) / \tau) - G(\bar T(x'_i) / \tau)
    \big\rVert_1 + L_\text{logits}\big(S(x'), T(x')\big)

with logits :math:`\bar S, \bar T` less their mean, since probabilities leave a constant undetermined that
:math:`G` would see, and with the mean over the *m* images and their *n* values in [-1, 1].
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..errors import UserError
from ..labels import UNLABELLED
from ..losses.modules import WeightedSum
from ..models.generators import Discriminator, Generator
from ..signals import BudgetError, DenseSignal, Signal, Teacher
from ._processes import as_first
from .base import Batch, GeneratesInputs, Prepares, Samples, TrainingRows, WrappedMethod
from .features import without_side_effects
from .logits import LogitMethod

CHUNK = 256
"""Images that the generator makes in one forward pass."""

TRIAL = 8
"""Images of a dry run."""

SAMPLES = 24
"""Images in a report."""

HARD_TAU = 5.0
"""Temperature of the alignment for hard answers, which have no spread of their own."""

SOURCES = ("generated", "noise", "real")


class Plan(NamedTuple):
    """Numbers of images to query.

    Attributes:
        information: While the generator learns.
        pool: To distil from.
    """

    information: int
    pool: int


@dataclass(eq=False, repr=False)
class MEKD(Prepares, GeneratesInputs, WrappedMethod[LogitMethod]):
    r"""Mapping-Emulation KD (MEKD): distillation from a black box that receives no real image.

    The training rows are never sent to the teacher. Their labels are not used, except for choosing the best
    epoch on validation rows. Before training, a generator learns to make images like the rows
    (*deprivatisation*), by the usual non-saturating game with a discriminator, in nats,

    .. math:: L_D = -\log \sigma(D(x)) - \log(1 - \sigma(D(x'))), \qquad
        L_G = -(1 + \alpha y) \log \sigma(D(x')),

    in which *y* is the teacher's highest probability for the image :math:`x'`: the *information* term prefers
    images that the teacher is certain of. Then the teacher is queried once for a pool of generated images,
    and the student learns from these answers, with the loss of the other terms of the recipe, such as KDLoss
    or PLDLoss (PLD uses only the order of the teacher's answer, as on unlabelled rows), and with the distance
    between the images that the frozen generator makes of both networks' logits; see `luce.methods.mekd`. Only
    the size of a step's batch matters: it is the number of images from the pool (at least two).

    *Limits.* Nothing ties a latent to the class of its image, so the generator inverts the teacher in
    distribution only. The alignment does not determine logits that the generator ignores, so the terms on
    logits are needed. Real images are not sent, but a generator can memorise them.

    *Budget.* `queries` is the total number of images that the teacher receives, including those of the
    information term. A resumed training queries none of them again. A hard answer (a class alone) has *y* =
    1, which carries no information, so the information term spends no query on it. ``prepared`` in a run's
    ``result.json`` holds the counts, the losses of the game, and of the answers :math:`\tau`, the *ratio* of
    their spread to it (latents have 1), their mean confidence and the number of classes that they name (the
    exponential of the entropy of the best classes: small where the generator makes few kinds of images).

    Args:
        method: Defines the loss on the teacher's answers.
        queries: Total number of images to query. None makes new ones in every step, as the authors do, and
            queries all of them, without a limit.
        information: Share of the queries, in [0, 1), for the information term, in the generator's last steps.
            With ``queries=None`` every step of the generator queries, unless the share is 0.
        alpha: Weight of the information term.
        images: ``"generated"``; or for comparison ``"noise"``, uniform in the range of the data, or
            ``"real"``, training rows, both without alignment.
        image: Weight *w* of the alignment; None for 1 with generated images and 0 otherwise. The authors'
            code has 1. Their formula sums over an image's values, which is a weight of *n* here.
        tau: Temperature of the logits that enter the generator. ``"auto"`` is the root mean square of the
            pool's centred answers, so that they spread like latents, and 5 for hard answers, which a student
            matches with a gap of 5 times `gain`. The authors' code has 5.
        gain: The latent of a hard answer is ``gain`` on its class and 0 elsewhere, less the mean.
            ``"auto"`` is the square root of the number of classes, the usual norm of a latent; 1 / `tau` is
            that of the authors' code.
        gan_epochs: Passes of the generator's training over the rows. The authors take 200 over a tenth of
            the rows.
        gan_batch_size: Rows in each of its steps, at least 2.
        gan_lr: Learning rate of both its networks, by Adam with betas 0.5 and 0.999.
        gan_width: Channels of the generator. The authors have 128.
    Raises:
        TypeError: On a method that is no `LogitMethod`.
        ValueError: On a wrong value, or a loss that does not use the teacher, or needs labels.
    Example:
        >>> import luce
        >>> from luce.signals import LiveTeacher
        >>> rows = {"input": torch.rand(8, 1, 8, 8), "target": torch.arange(8), "index": torch.arange(8)}
        >>> class Rows:
        ...     trial = False
        ...     def batches(self, batch_size=256, *, epochs=1, shuffle=False):
        ...         yield from [rows] * epochs
        >>> student, teacher = (luce.models.build("cnn", classes=10, input_shape=(1, 8, 8)) for _ in range(2))
        >>> method = MEKD(LogitMethod(luce.KDLoss()), queries=64, information=0.25, gan_epochs=4, gan_width=8)
        >>> method.build(student, LiveTeacher(teacher), rows, rows)
        >>> results = method.prepare(LiveTeacher(teacher), Rows())
        >>> results["queries"], results["information_queries"]
        (64.0, 16.0)
        >>> sorted(method.step(student, rows, None))
        ['image', 'logits', 'loss']

    References:
        Ma et al., Aligning Logits Generatively for Principled Black-Box Knowledge Distillation, CVPR 2024,
        arXiv 2205.10490. The networks, the optimizer and the defaults are those of the authors' code unless
        stated otherwise. Ours are *y* (that code takes the index of the class), the pool, the budget, centred
        logits, `tau` and `gain`.
    """

    needs_teacher = False  # it answers none of the rows

    method: InitVar[LogitMethod]
    _: KW_ONLY
    queries: int | None = 10_000
    information: float = 0.1
    alpha: float = 0.5
    images: Literal["generated", "noise", "real"] = "generated"
    image: float | None = None
    tau: float | Literal["auto"] = "auto"
    gain: float | Literal["auto"] = "auto"
    gan_epochs: int = 20
    gan_batch_size: int = 64
    gan_lr: float = 2e-4
    gan_width: int = 128

    def __post_init__(self, method: LogitMethod) -> None:
        if not isinstance(method, LogitMethod):
            raise TypeError(
                f"expected a LogitMethod for MEKD, got {type(method).__name__}: a black box has no features"
            )
        super().__init__(method)
        default = 1.0 if self.images == "generated" else 0.0
        self.image_weight = default if self.image is None else self.image
        self._check_loss()
        self._check_options()
        self.order = torch.empty(0, dtype=torch.long)

    def _check_loss(self) -> None:
        if not self.method.needs_teacher:
            raise ValueError("expected a loss that uses the teacher, got one that does not")
        if label_losses := _needing_labels(self.method):
            raise ValueError(
                f"expected losses that need no label, as generated images have none, got {label_losses}"
            )
        if isinstance(self.method.loss, WeightedSum) and "image" in self.method.loss.weights:
            raise ValueError('expected no term called "image" beside MEKD, which adds one of that name')
        if self.queries is None and self.method.needs_preparation:
            raise ValueError(
                "expected a number of `queries` for a loss that is prepared with the answers, got None"
            )

    def _check_options(self) -> None:
        checks.check_choice("images", self.images, SOURCES)
        checks.check_not_negative(image=self.image_weight, alpha=self.alpha)
        if self.image_weight and self.images != "generated":
            raise ValueError(
                f"expected `image: 0` with `images: {self.images}`, which has no generator, got {self.image}"
            )
        if self.queries is not None:
            checks.check_count(queries=self.queries)
            if self.queries < 2:
                raise ValueError(f"expected at least 2 `queries`, got {self.queries}")
        elif self.images == "real":
            raise ValueError("expected a number of `queries` with real images, got None")
        if not (checks.is_number(self.information) and 0 <= self.information < 1):
            raise ValueError(f"expected `information` in [0, 1), got {self.information!r}")
        for name, value in (("tau", self.tau), ("gain", self.gain)):
            if value != "auto":
                checks.check_positive(**{name: value})
        checks.check_count(
            gan_epochs=self.gan_epochs, gan_batch_size=self.gan_batch_size, gan_width=self.gan_width
        )
        if min(self.gan_batch_size, self.gan_width) < 2:
            raise ValueError(
                "expected `gan_batch_size` and `gan_width` of at least 2, "
                f"got {self.gan_batch_size} and {self.gan_width}"
            )
        checks.check_positive(gan_lr=self.gan_lr)

    def build(self, student: nn.Module, teacher: Teacher | None, sample: Batch, rows: Batch) -> None:
        """Make the generator and the buffers of the pool; nothing is queried yet."""
        if teacher is None:
            raise UserError("expected a teacher for MEKD; add `teacher` to the recipe")
        if not teacher.answers_new_inputs:
            raise UserError(
                f"expected a teacher that answers generated images for MEKD, got {teacher.description}"
            )
        inputs = sample["input"]
        if inputs.ndim != 4 or not inputs.is_floating_point():
            raise UserError(
                "expected images (channels, height, width) of a floating dtype for MEKD, got inputs of shape "
                f"{tuple(inputs.shape[1:])} and {inputs.dtype}"
            )
        self.teacher, self.shape, self.rows = teacher, inputs.shape[1:], len(rows["index"])
        self.kind = teacher.kind
        if self.images == "real" and self.plan.pool > self.rows:
            raise UserError(
                f"expected at most {self.rows} `queries`, one for each training row, got {self.queries}"
            )
        self._check_budget(teacher)
        with without_side_effects(student, inputs.device):
            classes = student(inputs).shape[-1]
        if self.images == "generated":
            self.generator = Generator(classes, self.shape, self.gan_width).requires_grad_(False).eval()
        latent_shape = (classes,) if self.images == "generated" else self.shape
        # Of their final sizes: a checkpoint is loaded without another preparation, and its shapes must fit.
        self.pool: Tensor = nn.Buffer(torch.zeros(self.plan.pool, *latent_shape))
        self.answers: Tensor = nn.Buffer(torch.zeros(self.plan.pool, classes))
        self.temperature: Tensor = nn.Buffer(torch.ones(()))
        self.low: Tensor = nn.Buffer(torch.zeros(self.shape[0], 1, 1))
        self.span: Tensor = nn.Buffer(torch.ones(self.shape[0], 1, 1))
        self.to(inputs.device)

    @property
    def plan(self) -> Plan:
        """The numbers of images to query before training."""
        steps = self.gan_epochs * math.ceil(self.rows / self.gan_batch_size)
        most = steps * self.gan_batch_size
        if self.images != "generated" or not self.alpha or self.kind == "label":
            most = 0  # no generator, or an answer that would not change its loss
        if self.queries is None:
            return Plan(most if self.information else 0, CHUNK)
        information = min(most, round(self.information * self.queries), self.queries - 1)
        return Plan(information, self.queries - information)

    def prepare(self, teacher: Teacher, rows: TrainingRows) -> dict[str, float]:
        """Train the generator, make the pool and query it; see the class for the results."""
        plan = self.plan
        if rows.trial:
            plan = Plan(*(min(number, TRIAL) for number in plan))
        self._set_range(rows)
        results: dict[str, float] = {}
        if self.images == "generated":
            results = self._train_generator(teacher, rows, plan.information)
        if self.images == "real":  # a dry run has the first rows only
            self.pool = _random_rows(rows, plan.pool, plan.pool if rows.trial else self.rows)
        else:
            self.pool = self._draw(plan.pool)
        parts = self.pool.split(teacher.preferred_batch)
        self.answers = torch.cat([self._ask(teacher, self._images(part)) for part in parts])
        spread = self._set_temperature()
        results |= self.method.prepare_loss(self.answers, _no_labels(self.answers))
        best = self.answers.argmax(-1).bincount() / len(self.answers)
        if self.queries is not None:
            results["queries"] = float(sum(plan))
        return results | {
            "information_queries": float(plan.information),
            "tau": self.temperature.item(),
            "ratio": spread,
            "confidence": _confidence(self.answers).mean().item(),
            "classes": torch.special.entr(best).sum().exp().item(),
        }

    def _check_budget(self, teacher: Teacher) -> None:
        """Refuse a plan beyond the whole budget; earlier queries may be cached, so they do not count."""
        if teacher.budget is None:
            return
        if self.queries is None:
            raise BudgetError(
                "expected a number of `queries` for a teacher with a budget, got none, which queries new "
                "images in every step"
            )
        if self.queries > teacher.budget:
            raise BudgetError(
                f"expected at most {teacher.budget} `queries`, the teacher's budget, got {self.queries}; "
                "lower them, or raise `teacher.budget`"
            )

    def _set_range(self, rows: TrainingRows) -> None:
        """Store each channel's minimum and span, which the generator maps to -1 and 1."""
        ends = [batch["input"].transpose(0, 1).flatten(1).aminmax(dim=1) for batch in rows.batches()]
        low = torch.stack([end.min for end in ends]).amin(0)
        span = torch.stack([end.max for end in ends]).amax(0) - low
        if not torch.isfinite(span).all():
            raise UserError("expected training images of finite numbers for MEKD, got NaN or infinity")
        self.low = low.view_as(self.low).to(self.low)
        # A constant channel has the span 0, and 0 / 0 would be NaN.
        self.span = torch.where(span > 0, span, 1.0).view_as(self.span).to(self.span)

    def _train_generator(self, teacher: Teacher, rows: TrainingRows, queries: int) -> dict[str, float]:
        """Train generator and discriminator; return the mean losses of the last epoch, in nats."""
        generator, discriminator = self.generator, Discriminator(self.shape).to(self.low)
        optimizers = [
            torch.optim.Adam(network.parameters(), lr=self.gan_lr, betas=(0.5, 0.999))
            for network in (generator, discriminator)
        ]
        per_epoch = math.ceil(self.rows / self.gan_batch_size)
        steps = 1 if rows.trial else self.gan_epochs * per_epoch
        first_query = steps - math.ceil(queries / self.gan_batch_size)
        losses: deque[Tensor] = deque(maxlen=per_epoch)
        generator.requires_grad_(True).train()
        batches = rows.batches(self.gan_batch_size, epochs=self.gan_epochs, shuffle=True)
        for number, batch in enumerate(batches):
            real = 2 * (batch["input"] - self.low) / self.span - 1
            made = generator(generator.draw(self.gan_batch_size))
            confidence = made.new_zeros(len(made))
            if number >= first_query and queries:
                count = min(queries, len(made))
                # Detached: a black box passes no gradient back.
                images = self._in_range(made[:count].detach())
                confidence[:count] = _confidence(self._ask(teacher, images))
                queries -= count
            # The generator's step needs no gradients of the discriminator's weights.
            discriminator.requires_grad_(False)
            log_odds = discriminator(made)
            loss = fooling_loss(log_odds) + self.alpha * information_loss(log_odds, confidence)
            _minimise(optimizers[0], loss)
            discriminator.requires_grad_(True)
            real_loss, fake_loss = (
                fooling_loss(discriminator(real)),
                fooling_loss(-discriminator(made.detach())),
            )
            discriminator_loss = real_loss + fake_loss
            _minimise(optimizers[1], discriminator_loss)
            losses.append(torch.stack([loss, discriminator_loss]).detach())
        generator.requires_grad_(False).eval().zero_grad()
        means = torch.stack([*losses]).mean(0).tolist()
        if not math.isfinite(sum(means)):
            raise UserError("the losses of the generator's training are not finite; lower `gan_lr`")
        return dict(zip(("generator_loss", "discriminator_loss"), means, strict=True))

    def _draw(self, number: int) -> Tensor:
        """Draw the latents of this number of images, or noise images themselves."""
        if self.images == "generated":
            return self.generator.draw(number)
        return self.low + self.span * torch.rand(number, *self.shape).to(self.low)

    @torch.no_grad()
    def _images(self, latents: Tensor) -> Tensor:
        """Generate images in the range of the data; noise and real images are returned unchanged."""
        if self.images != "generated":
            return latents
        return self._in_range(torch.cat([self.generator(part) for part in latents.split(CHUNK)]))

    def _in_range(self, made: Tensor) -> Tensor:
        return self.low + self.span * (made + 1) / 2

    def _ask(self, teacher: Teacher, images: Tensor) -> Tensor:
        """Query the teacher, in the first process only, and return its logits in all."""
        index = torch.full((len(images),), UNLABELLED, device=images.device)
        batch = {"input": images, "target": index, "index": index}
        answers = as_first(lambda: teacher.signal(batch).logits)
        if not torch.isfinite(answers).all():
            raise UserError("expected answers of finite numbers from the teacher, got NaN or infinity")
        # Where there are several processes `as_first` returns CPU tensors.
        return answers.to(self.low)

    def _set_temperature(self) -> float:
        """Set the temperature of the alignment and return the spread of the answers in its units."""
        if self.tau != "auto":
            self.temperature.fill_(self.tau)
        elif self.kind == "label":
            self.temperature.fill_(HARD_TAU)
        else:
            spread = _centred(self.answers).square().mean().sqrt()
            # If all answers are flat, a division by 0 would make the latents NaN.
            self.temperature.copy_(torch.where(spread > 0, spread, 1.0))
        return self.teacher_latents(self.answers).square().mean().sqrt().item()

    def teacher_latents(self, answers: Tensor) -> Tensor:
        """Return the latents that represent the teacher's answers, ``(N, C)``."""
        if self.kind != "label":
            return _centred(answers) / self.temperature
        classes = answers.shape[-1]
        gain = math.sqrt(classes) if self.gain == "auto" else self.gain
        return _centred(gain * F.one_hot(answers.argmax(-1), classes).to(answers))

    def alignment(self, student_logits: Tensor, teacher_latents: Tensor) -> Tensor:
        """Return the mean absolute difference of the images generated from both, in [0, 2]."""
        with torch.autocast(student_logits.device.type, enabled=False):
            # Outside autocast: bfloat16 keeps 8 bits of images in [-1, 1], and the loss is their difference.
            student_images = self.generator(_centred(student_logits.to(self.temperature)) / self.temperature)
            with torch.no_grad():
                teacher_images = self.generator(teacher_latents)
            return (student_images - teacher_images).abs().mean()

    def train(self, mode: bool = True) -> MEKD:
        """Set the mode as for any module, except that the generator stays in evaluation mode."""
        super().train(mode)
        if hasattr(self, "generator"):
            self.generator.eval()
        return self

    def set_epoch(self, epoch: int) -> None:
        # A checkpoint does not hold the order, and a resumed epoch must draw the same.
        self.order = self.order[:0]
        self.method.set_epoch(epoch)

    def step(self, student: nn.Module, batch: Batch, signal: Signal | None) -> dict[str, Tensor]:
        """Return the terms on the logits, and ``"image"`` for the alignment; see the class for the batch."""
        # Batch normalisation may raise on a single row in training mode.
        number = max(2, len(batch["target"]))
        with torch.autocast(self.low.device.type, enabled=False):
            if self.queries is None:
                images = self._images(self._draw(number))
                answers = self.teacher.signal({**batch, "input": images}).logits.to(self.low)
            else:
                rows = self._next(number).to(self.low.device)
                images, answers = self._images(self.pool[rows]), self.answers[rows]
        logits = student(images)
        signal = DenseSignal(answers, kind=self.kind)
        terms = self.method.terms(logits, {"target": _no_labels(answers)}, signal)
        loss = terms.pop("loss")
        terms = terms or {"logits": loss}
        if self.image_weight:
            terms["image"] = self.image_weight * self.alignment(logits, self.teacher_latents(answers))
            loss = loss + terms["image"]
        return {**terms, "loss": loss}

    def _next(self, number: int) -> Tensor:
        """Draw rows of the pool in random order, each once before any is repeated within an epoch."""
        while len(self.order) < number:
            self.order = torch.cat([self.order, torch.randperm(len(self.pool))])
        rows, self.order = self.order[:number], self.order[number:]
        return rows

    @property
    def samples(self) -> Samples:
        images = (self._images(self.pool[:SAMPLES]) - self.low) / self.span
        return Samples(images.cpu(), self.answers[:SAMPLES].cpu())


def fooling_loss(log_odds: Tensor) -> Tensor:
    """Return the mean of :math:`-\\log \\sigma`, in nats, for log-odds ``(N,)`` of a real image."""
    return F.softplus(-log_odds).mean()


def information_loss(log_odds: Tensor, confidence: Tensor) -> Tensor:
    """Return `fooling_loss` with each image weighted by the teacher's confidence.

    Args:
        log_odds: That an image is real, ``(N,)``.
        confidence: The teacher's highest probability, ``(N,)``, in [0, 1].
    Raises:
        ValueError: If the shapes differ: broadcasting would weight every pair of rows.
    Example:
        >>> round(information_loss(torch.zeros(2), torch.tensor([1.0, 0.5])).item(), 6)
        0.51986
    """
    # (N,) times (N, 1) would broadcast to (N, N) without an error.
    if log_odds.shape != confidence.shape:
        raise ValueError(
            f"expected as many weights as log-odds, of shape {tuple(log_odds.shape)}, "
            f"got {tuple(confidence.shape)}"
        )
    return (confidence * F.softplus(-log_odds)).mean()


def _minimise(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(-1, keepdim=True)


def _confidence(answers: Tensor) -> Tensor:
    return answers.softmax(-1).amax(-1)


def _no_labels(answers: Tensor) -> Tensor:
    return torch.full(answers.shape[:1], UNLABELLED, device=answers.device)


def _random_rows(rows: TrainingRows, number: int, among: int) -> Tensor:
    """Return the images of this number of random rows, in their order."""
    chosen = torch.randperm(among)[:number].sort().values
    images, start = [], 0
    for batch in rows.batches():
        end = start + len(batch["input"])
        images.append(batch["input"][chosen[(chosen >= start) & (chosen < end)] - start])
        start = end
    return torch.cat(images)


def _needing_labels(method: LogitMethod) -> list[str]:
    """Return the names of the losses to which a row without a label contributes nothing."""
    if not isinstance(method.loss, WeightedSum):
        return [] if method.uses_unlabelled else [type(method.loss).__name__]
    return [
        name
        for name, loss in method.loss.losses.items()
        if method.loss.weights[name] and not getattr(loss, "uses_unlabelled", True)
    ]
