r"""Mapping-Emulation distillation: a student of a teacher that only answers, about images that were made.

First a generator :math:`G` learns to make images like those at hand, from latents :math:`z \sim N(0, I_C)`;
then it stays as it is, and student :math:`S` and teacher :math:`T` are asked about :math:`x' = G(z)`:

.. math:: L = w \cdot \frac{1}{m n} \sum_{i=1}^{m} \big\lVert G(\bar S(x'_i) / \tau) - G(\bar T(x'_i) / \tau)
    \big\rVert_1 + L_\text{logits}\big(S(x'), T(x')\big)

with logits :math:`\bar S, \bar T` less their mean, for probabilities leave a constant open that
:math:`G` would see, and the mean taken over the *m* images and their *n* values, from -1 to 1 each.
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

AT_ONCE = 256
"""Images that a network is shown at a time."""

TRIAL = 8
"""Images of a trial."""

SHOWN = 24
"""Images that a report shows."""

HARD_TAU = 5.0
"""Temperature in front of the generator for hard answers, which have no spread of their own."""

SOURCES = ("generated", "noise", "real")


class Plan(NamedTuple):
    """How many images the teacher is to be asked about.

    Attributes:
        information: While the generator learns.
        pool: To distil from.
    """

    information: int
    pool: int


@dataclass(eq=False, repr=False)
class MEKD(Prepares, GeneratesInputs, WrappedMethod[LogitMethod]):
    r"""Mapping-Emulation KD (MEKD): distillation from a black box, without sending it real images.

    Of the training rows the teacher is told nothing; their labels are not looked at, but for choosing the
    best epoch on validation rows. Before training, a generator learns to make images like the rows
    (*deprivatisation*), by the usual non-saturating game with a discriminator, in nats,

    .. math:: L_D = -\log \sigma(D(x)) - \log(1 - \sigma(D(x'))), \qquad
        L_G = -(1 + \alpha y) \log \sigma(D(x')),

    in which *y* is the teacher's highest probability of the image :math:`x'`: the *information* term prefers
    images that the teacher is sure of. Then the teacher is asked about a pool of made images, once, and the
    student learns from these answers: by the loss of the other terms of the recipe, such as KDLoss or PLDLoss
    (PLD takes the order of the teacher's answer alone, as on rows without a label), and by the distance of
    the images that the frozen generator makes of both networks' logits; see `luce.methods.mekd`. A step's
    batch of rows sets only how many images of the pool it takes (two at least).

    What this does and does not do: nothing ties a latent to the class of its image, so the generator inverts
    the teacher in distribution only; the alignment leaves open whatever logits the generator ignores, which
    is why the terms on logits stay. Real images are not sent, but a generator can memorise them.

    The *budget*: `queries` is the number of images that the teacher is ever asked about, those of the
    information term among them. A resumed training asks about none of them again. A hard answer (a class
    alone) has *y* = 1, which says nothing, so none is spent on it there. The counts, the losses of the game,
    and for the answers :math:`\tau`, the *ratio* of their spread to it (latents have 1), their mean
    confidence and how many classes they name (the exponential of the entropy of the best classes: few where
    the generator makes few kinds of images) go into ``prepared`` of a run's ``result.json``.

    Args:
        method: On logits; what the student learns from the teacher's answers.
        queries: Images that the teacher is asked about in all. None makes new ones at every step, as the
            authors do, and asks about all of them, without end.
        information: Share of the queries, in [0, 1), for the information term, in the generator's last steps.
            With ``queries=None`` every step of the generator asks, unless it is 0.
        alpha: Weight of the information term.
        images: ``"generated"``; or for comparison ``"noise"``, uniform in the range of the data, or
            ``"real"``, training rows, both without alignment.
        image: Weight *w* of the alignment; 0 for none. The authors' code has 1. Their formula sums over an
            image's values, which is a weight of *n* here.
        tau: Temperature in front of the generator. ``"auto"`` is the root mean square of the pool's centred
            answers, so that they spread like latents, and 5 for hard answers, which a student then meets at
            a gap of 5 times `gain`. The authors' code has 5.
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
        ValueError: On a wrong value, or a loss that does not look at the teacher, or needs labels.
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
        >>> found = method.prepare(LiveTeacher(teacher), Rows())
        >>> found["queries"], found["information_queries"]
        (64.0, 16.0)
        >>> sorted(method.step(student, rows, None))
        ['image', 'logits', 'loss']

    References:
        Ma et al., Aligning Logits Generatively for Principled Black-Box Knowledge Distillation, CVPR 2024,
        arXiv 2205.10490. The networks, the optimizer and the defaults are those of the authors' code where
        nothing else is said. Our own: *y* (that code takes the index of the class), the pool, the budget,
        centred logits, `tau` and `gain`.
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
        """Make the generator and room for the pool; nobody is asked yet."""
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
        made_of = (classes,) if self.images == "generated" else self.shape
        self.pool: Tensor = nn.Buffer(torch.zeros(self.plan.pool, *made_of))
        self.answers: Tensor = nn.Buffer(torch.zeros(self.plan.pool, classes))
        self.temperature: Tensor = nn.Buffer(torch.ones(()))
        self.low: Tensor = nn.Buffer(torch.zeros(self.shape[0], 1, 1))
        self.span: Tensor = nn.Buffer(torch.ones(self.shape[0], 1, 1))
        self.to(inputs.device)

    @property
    def plan(self) -> Plan:
        """How many images the teacher will be asked about before training."""
        steps = self.gan_epochs * math.ceil(self.rows / self.gan_batch_size)
        most = steps * self.gan_batch_size
        if self.images != "generated" or not self.alpha or self.kind == "label":
            most = 0  # there is nothing to be asked, or nothing that an answer would change
        if self.queries is None:
            return Plan(most if self.information else 0, AT_ONCE)
        information = min(most, round(self.information * self.queries), self.queries - 1)
        return Plan(information, self.queries - information)

    def prepare(self, teacher: Teacher, rows: TrainingRows) -> dict[str, float]:
        """Train the generator, make the pool and ask about it; see the class for what is found."""
        plan = self.plan
        if rows.trial:
            plan = Plan(*(min(number, TRIAL) for number in plan))
        self._find_range(rows)
        found: dict[str, float] = {}
        if self.images == "generated":
            found = self._learn_to_make_images(teacher, rows, plan.information)
        if self.images == "real":  # a trial sees the first rows alone
            self.pool = _some(rows, plan.pool, plan.pool if rows.trial else self.rows)
        else:
            self.pool = self._new(plan.pool)
        parts = self.pool.split(teacher.preferred_batch)
        self.answers = torch.cat([self._ask(teacher, self._images(part)) for part in parts])
        spread = self._find_tau()
        found |= self.method.prepare_loss(self.answers, _no_labels(self.answers))
        best = self.answers.argmax(-1).bincount() / len(self.answers)
        if self.queries is not None:
            found["queries"] = float(sum(plan))
        return found | {
            "information_queries": float(plan.information),
            "tau": self.temperature.item(),
            "ratio": spread,
            "confidence": _confidence(self.answers).mean().item(),
            "classes": torch.special.entr(best).sum().exp().item(),
        }

    def _check_budget(self, teacher: Teacher) -> None:
        """Refuse a plan that the whole budget is too small for; what was paid for before may come free."""
        if teacher.budget is None:
            return
        if self.queries is None:
            raise BudgetError(
                "expected a number of `queries` for a teacher with a budget, got none, which asks about new "
                "images at every step"
            )
        if self.queries > teacher.budget:
            raise BudgetError(
                f"expected at most {teacher.budget} `queries`, the teacher's budget, got {self.queries}; "
                "lower them, or raise `teacher.budget`"
            )

    def _find_range(self, rows: TrainingRows) -> None:
        """Of each channel, from the darkest to the brightest value, which the generator calls -1 and 1."""
        ends = [batch["input"].transpose(0, 1).flatten(1).aminmax(dim=1) for batch in rows.batches()]
        low = torch.stack([end.min for end in ends]).amin(0)
        span = torch.stack([end.max for end in ends]).amax(0) - low
        if not torch.isfinite(span).all():
            raise UserError("expected training images of finite numbers for MEKD, got some that are none")
        self.low = low.view_as(self.low).to(self.low)
        self.span = torch.where(span > 0, span, 1.0).view_as(self.span).to(self.span)

    def _learn_to_make_images(self, teacher: Teacher, rows: TrainingRows, questions: int) -> dict[str, float]:
        """Play the game of generator and discriminator; the mean losses of its last epoch, in nats."""
        generator, discriminator = self.generator, Discriminator(self.shape).to(self.low)
        optimizers = [
            torch.optim.Adam(network.parameters(), lr=self.gan_lr, betas=(0.5, 0.999))
            for network in (generator, discriminator)
        ]
        per_epoch = math.ceil(self.rows / self.gan_batch_size)
        steps = 1 if rows.trial else self.gan_epochs * per_epoch
        asks_from = steps - math.ceil(questions / self.gan_batch_size)
        losses: deque[Tensor] = deque(maxlen=per_epoch)
        generator.requires_grad_(True).train()
        batches = rows.batches(self.gan_batch_size, epochs=self.gan_epochs, shuffle=True)
        for number, batch in enumerate(batches):
            real = 2 * (batch["input"] - self.low) / self.span - 1
            made = generator(generator.draw(self.gan_batch_size))
            confidence = made.new_zeros(len(made))
            if number >= asks_from and questions:
                now = min(questions, len(made))
                confidence[:now] = _confidence(self._ask(teacher, self._in_range(made[:now].detach())))
                questions -= now
            discriminator.requires_grad_(False)
            odds = discriminator(made)
            loss = fooling_loss(odds) + self.alpha * information_loss(odds, confidence)
            _descend(optimizers[0], loss)
            discriminator.requires_grad_(True)
            telling = fooling_loss(discriminator(real)) + fooling_loss(-discriminator(made.detach()))
            _descend(optimizers[1], telling)
            losses.append(torch.stack([loss, telling]).detach())
        generator.requires_grad_(False).eval().zero_grad()
        generator_loss, discriminator_loss = torch.stack([*losses]).mean(0).tolist()
        if not math.isfinite(generator_loss + discriminator_loss):
            raise UserError("the generator's training came to no number; lower `gan_lr`")
        return {"generator_loss": generator_loss, "discriminator_loss": discriminator_loss}

    def _new(self, number: int) -> Tensor:
        """What so many images are made of: latents, or pixels that are noise already."""
        if self.images == "generated":
            return self.generator.draw(number)
        return self.low + self.span * torch.rand(number, *self.shape).to(self.low)

    @torch.no_grad()
    def _images(self, made_of: Tensor) -> Tensor:
        """In the range of the data."""
        if self.images != "generated":
            return made_of
        return self._in_range(torch.cat([self.generator(part) for part in made_of.split(AT_ONCE)]))

    def _in_range(self, made: Tensor) -> Tensor:
        return self.low + self.span * (made + 1) / 2

    def _ask(self, teacher: Teacher, images: Tensor) -> Tensor:
        """What the teacher says, of all processes to the first one alone."""
        index = torch.full((len(images),), UNLABELLED, device=images.device)
        batch = {"input": images, "target": index, "index": index}
        answers = as_first(lambda: teacher.signal(batch).logits)
        if not torch.isfinite(answers).all():
            raise UserError("expected answers of finite numbers from the teacher, got some that are none")
        return answers.to(self.low)

    def _find_tau(self) -> float:
        """Settle the temperature in front of the generator; the spread of the answers in its units."""
        if self.tau != "auto":
            self.temperature.fill_(self.tau)
        elif self.kind == "label":
            self.temperature.fill_(HARD_TAU)
        else:
            spread = _centred(self.answers).square().mean().sqrt()
            self.temperature.copy_(torch.where(spread > 0, spread, 1.0))
        return self.teacher_latents(self.answers).square().mean().sqrt().item()

    def teacher_latents(self, answers: Tensor) -> Tensor:
        """Latents of the images that stand for the teacher's answers, ``(N, C)``."""
        if self.kind != "label":
            return _centred(answers) / self.temperature
        classes = answers.shape[-1]
        gain = math.sqrt(classes) if self.gain == "auto" else self.gain
        return _centred(gain * F.one_hot(answers.argmax(-1), classes).to(answers))

    def alignment(self, student_logits: Tensor, teacher_latents: Tensor) -> Tensor:
        """Mean absolute difference of the images made of both, from 0 to 2."""
        with torch.autocast(student_logits.device.type, enabled=False):
            ours = self.generator(_centred(student_logits.to(self.temperature)) / self.temperature)
            with torch.no_grad():
                theirs = self.generator(teacher_latents)
            return (ours - theirs).abs().mean()

    def train(self, mode: bool = True) -> MEKD:
        """As for any module; but the generator stays in evaluation mode."""
        super().train(mode)
        if hasattr(self, "generator"):
            self.generator.eval()
        return self

    def set_epoch(self, epoch: int) -> None:
        self.order = self.order[:0]  # an epoch begins anew, whether the training was interrupted or not
        self.method.set_epoch(epoch)

    def step(self, student: nn.Module, batch: Batch, signal: Signal | None) -> dict[str, Tensor]:
        """The terms on the logits, and ``"image"`` for the alignment; of the batch only its size counts."""
        number = max(2, len(batch["target"]))
        with torch.autocast(self.low.device.type, enabled=False):
            if self.queries is None:
                images = self._images(self._new(number))
                answers = self.teacher.signal({**batch, "input": images}).logits.to(self.low)
            else:
                rows = self._next(number).to(self.low.device)
                images, answers = self._images(self.pool[rows]), self.answers[rows]
        logits = student(images)
        said = DenseSignal(answers, kind=self.kind)
        terms = self.method.terms(logits, {"target": _no_labels(answers)}, said)
        loss = terms.pop("loss")
        terms = terms or {"logits": loss}
        if self.image_weight:
            terms["image"] = self.image_weight * self.alignment(logits, self.teacher_latents(answers))
            loss = loss + terms["image"]
        return {**terms, "loss": loss}

    def _next(self, number: int) -> Tensor:
        """Rows of the pool in random order, all of them before any comes again, within an epoch."""
        while len(self.order) < number:
            self.order = torch.cat([self.order, torch.randperm(len(self.pool))])
        rows, self.order = self.order[:number], self.order[number:]
        return rows

    @property
    def samples(self) -> Samples:
        images = (self._images(self.pool[:SHOWN]) - self.low) / self.span
        return Samples(images.cpu(), self.answers[:SHOWN].cpu())


def fooling_loss(odds: Tensor) -> Tensor:
    """Mean of :math:`-\\log \\sigma`, in nats, of log-odds ``(N,)`` that an image is real."""
    return F.softplus(-odds).mean()


def information_loss(odds: Tensor, confidence: Tensor) -> Tensor:
    """`fooling_loss` with each image weighing as the teacher is sure of it.

    Args:
        odds: Log-odds that an image is real, ``(N,)``.
        confidence: The teacher's highest probability, ``(N,)``, in [0, 1].
    Raises:
        ValueError: If the shapes differ: weights beside a column of odds would weigh every pair of rows.
    Example:
        >>> round(information_loss(torch.zeros(2), torch.tensor([1.0, 0.5])).item(), 6)
        0.51986
    """
    if odds.shape != confidence.shape:
        raise ValueError(
            f"expected as many weights as odds, of shape {tuple(odds.shape)}, got {tuple(confidence.shape)}"
        )
    return (confidence * F.softplus(-odds)).mean()


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(-1, keepdim=True)


def _confidence(answers: Tensor) -> Tensor:
    return answers.softmax(-1).amax(-1)


def _no_labels(answers: Tensor) -> Tensor:
    return torch.full(answers.shape[:1], UNLABELLED, device=answers.device)


def _some(rows: TrainingRows, number: int, among: int) -> Tensor:
    """Images of so many rows, drawn at random, in their order."""
    chosen = torch.randperm(among)[:number].sort().values
    images, at = [], 0
    for batch in rows.batches():
        end = at + len(batch["input"])
        images.append(batch["input"][chosen[(chosen >= at) & (chosen < end)] - at])
        at = end
    return torch.cat(images)


def _needing_labels(method: LogitMethod) -> list[str]:
    """Names of the losses that learn nothing from a row without a label."""
    if not isinstance(method.loss, WeightedSum):
        return [] if method.uses_unlabelled else [type(method.loss).__name__]
    return [
        name
        for name, loss in method.loss.losses.items()
        if method.loss.weights[name] and not getattr(loss, "uses_unlabelled", True)
    ]
