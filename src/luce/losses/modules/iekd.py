"""IE-KD: half of the student's channels inherit the teacher's features, the other half explore."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ... import checks
from ...errors import UserError
from .. import _features
from ..functional.embeddings import linear_cka
from ..functional.iekd import FORMS, Form, exploration_loss, inheritance_loss
from .features import FeatureLoss, Shapes, TeacherFeatures, Tensors, Train, channels, through

__all__ = ["IEKDLoss"]

PREPARATION_BATCH = 128
SLOPE = 0.1
"""Negative slope of the leaky ReLUs in the coders."""


@dataclass(eq=False, repr=False, kw_only=True)
class IEKDLoss(FeatureLoss):
    r"""Inheritance and exploration: one half of the student's channels follows a code of the teacher's map.

    .. math:: \lambda_i\, L_i(E_i(f_i), E(f_t)) + \lambda_e\, L_e(E_e(f_e), E(f_t))

    The channels of the student's map are split into :math:`f_i`, which inherits, and :math:`f_e`, which
    explores while the task's loss keeps it useful. E is the encoder of an auto-encoder of the teacher's map;
    each part has its own encoder, trained with the student. :math:`L_i` is `luce.inheritance_loss`, which
    attracts, and :math:`L_e` is `luce.exploration_loss`, which repels. Add any loss on the logits. The
    authors take the last map before the pooling.

    A *prepared* auto-encoder is trained on the teacher's maps before the student: `prepare`, which the
    training loop calls, has it trained with batches of 128 by SGD (Nesterov momentum 0.9, weight decay 5e-4,
    a constant learning rate; `luce.methods.train_by_sgd`) and freezes it, in evaluation mode. An *online* one
    is trained with the student, only by its reconstruction error, a term of the loss of weight 1. It is meant
    for a teacher that changes, and is our reconstruction.

    The weights: in the authors' configuration both are 1; in their ablation, which we know from digests
    only, both are best at 50. The normalisation that belongs to either could not be verified. The authors'
    code takes the mean over all entries, at most 0.044 for factors of 32 channels and 8x8 places: a weight of
    1 is then negligible beside a cross-entropy. Our recipes take 50. Sums over the D entries of a factor
    would need weights D times smaller.

    Coders (three 3x3 convolutions with batch normalisation and leaky ReLUs), split and preparation are those
    of the authors' code. Three of its errors are not copied: it swaps the names of student and teacher;
    exploration attracts like inheritance unless ``negative`` is set, which its configuration does not do; and
    a resumed run draws another random split, which is saved with the weights here. Maps of different sizes
    and odd numbers of channels are our additions.

    An encoder can explore alone while the features stay as they were. ``cka_inheritance`` and
    ``cka_exploration`` therefore measure how each part's channels compare with the teacher's map
    (`luce.losses.linear_cka` over the batch). The latter should come out lower; nothing enforces it.

    Args:
        inheritance_weight: :math:`\lambda_i`, at least 0.
        exploration_weight: :math:`\lambda_e`, at least 0.
        form: ``"l1"`` or ``"cosine"``, for both losses.
        split: ``"natural"``: the first half of the channels inherits, rounded down; or ``"random"``: as many
            channels, drawn once by `build`.
        code_channels: Channels of the code; None for half of the teacher's channels.
        autoencoder: ``"prepared"`` or ``"online"``.
        reconstruction_form: The auto-encoder's loss over all entries: ``"l1"``, the mean absolute error, as
            in the authors' code, or ``"l2"``, the mean square.
        epochs: Epochs of the preparation.
        lr: Learning rate of the preparation, positive.

    Shape:
        One map of each network, ``(N, C', H, W)`` or ``(N, T, D)``, at least 2 channels of the student's. The
        larger is average-pooled to the size of the smaller. On tokens the convolutions mix neighbours in the
        order of the tokens only; reshape them to a map instead.

    Returns:
        A dict: ``"loss"``, the unweighted ``"inheritance"`` and ``"exploration"``, ``"cka_inheritance"`` and
        ``"cka_exploration"`` without gradient, and ``"reconstruction"`` of an online auto-encoder.

    Raises:
        ValueError: On options out of range, a student's map of one channel, and, in training mode, a batch
            with a single value per channel, over which nothing can be normalised.
        RuntimeError: In training mode before `build` or `prepare`.

    Example:
        >>> from luce.methods import train_by_sgd
        >>> loss = IEKDLoss(inheritance_weight=50, exploration_weight=50, epochs=2)
        >>> loss.build([(16, 4, 4)], [(32, 8, 8)])
        >>> batches = [[torch.rand(16, 32, 8, 8)] for _ in range(4)]
        >>> sorted(loss.prepare(lambda batch_size, epochs=1, shuffle=False: batches * epochs, train_by_sgd))
        ['reconstruction', 'relative_reconstruction']
        >>> terms = loss([torch.rand(2, 16, 4, 4)], [torch.rand(2, 32, 8, 8)])
        >>> list(terms)
        ['loss', 'inheritance', 'exploration', 'cka_inheritance', 'cka_exploration']

    References:
        Huang et al., Revisiting Knowledge Distillation: An Inheritance and Exploration Framework, CVPR 2021,
        arXiv 2107.00181.
    """

    takes = "maps"
    stages = "one"
    prepared_buffers = ("prepared",)

    inheritance_weight: float = 1.0
    exploration_weight: float = 1.0
    form: Form = "l1"
    split: Literal["natural", "random"] = "natural"
    code_channels: int | None = None
    autoencoder: Literal["prepared", "online"] = "prepared"
    reconstruction_form: Literal["l1", "l2"] = "l1"
    epochs: int = 30
    lr: float = 0.1

    def _check_options(self) -> None:
        checks.check_not_negative(
            inheritance_weight=self.inheritance_weight, exploration_weight=self.exploration_weight
        )
        checks.check_choice("form", self.form, FORMS)
        checks.check_choice("split", self.split, ("natural", "random"))
        if self.code_channels is not None:
            checks.check_count(most=checks.WIDEST, code_channels=self.code_channels)
        checks.check_choice("autoencoder", self.autoencoder, ("prepared", "online"))
        checks.check_choice("reconstruction_form", self.reconstruction_form, ("l1", "l2"))
        checks.check_count(epochs=self.epochs)
        checks.check_positive(lr=self.lr)

    def _make(self, student_shapes: Shapes, teacher_shapes: Shapes) -> None:
        ((student, teacher),) = channels(student_shapes, teacher_shapes)
        if student < 2:
            raise ValueError(
                f"expected a feature of the student of at least 2 channels, to inherit and to explore, "
                f"got {tuple(student_shapes[0])}"
            )
        code, inheriting = self.code_channels or max(teacher // 2, 1), student // 2
        self.of_teacher = AutoEncoder(teacher, code, frozen=self.needs_preparation)
        self.inheriting, self.exploring = coder(inheriting, code), coder(student - inheriting, code)
        order = torch.randperm(student) if self.split == "random" else torch.arange(student)
        # Buffers: a resumed run must keep a random split, or the encoders would get other channels.
        self.inheriting_channels = nn.Buffer(order[:inheriting])
        self.exploring_channels = nn.Buffer(order[inheriting:])
        self._try(student_shapes, teacher_shapes)

    @property
    def needs_preparation(self) -> bool:
        return self.autoencoder == "prepared"

    def prepare(self, teacher_features: TeacherFeatures, train: Train) -> dict[str, float]:
        """Train the auto-encoder on the teacher's maps, and freeze it; an online one needs none of that.

        Args:
            teacher_features: Of the training rows, lists of one map.
            train: Runs the steps; `luce.methods.train_by_sgd` does what the authors do.
        Returns:
            Of all rows, after training: ``reconstruction``, the mean error per entry, and
            ``relative_reconstruction``, which of zeros would be 1.
        Raises:
            UserError: If the error is no number any more, or a batch has a single value per channel.
        """
        if not self.needs_preparation:
            return {}
        self._check_built()
        self.of_teacher.freeze(False)
        batches = teacher_features(batch_size=PREPARATION_BATCH, epochs=self.epochs, shuffle=True)
        train(self.of_teacher, batches, self._reconstruction_error, lr=self.lr)
        self.of_teacher.freeze(True)
        quality = self._quality(teacher_features)
        # Last, so that an auto-encoder that `_quality` rejects never counts as prepared.
        self.prepared = torch.ones((), dtype=torch.bool, device=self.inheriting_channels.device)
        return quality

    def _reconstruction_error(self, features: Tensors) -> Tensor:
        teacher = self._pooled(features)
        _check_normalisable(teacher)
        return self._errors(self.of_teacher(teacher), teacher).mean()

    @torch.no_grad()
    def _quality(self, teacher_features: TeacherFeatures) -> dict[str, float]:
        error, size, entries = 0.0, 0.0, 0
        for features in teacher_features(batch_size=PREPARATION_BATCH):
            teacher = self._pooled(features)
            # Python's floats are float64: a float32 sum over all batches would lose digits.
            error += self._errors(self.of_teacher(teacher), teacher).sum().item()
            size += self._errors(torch.zeros_like(teacher), teacher).sum().item()
            entries += teacher.numel()
        if not math.isfinite(error):
            raise UserError(
                f"expected a finite error of the prepared auto-encoder of the teacher's maps, got {error}; "
                f"lower `lr`, or look for infinite or missing values in the teacher's maps"
            )
        return {"reconstruction": error / entries, "relative_reconstruction": error / size if size else 0.0}

    def _pooled(self, features: Tensors) -> Tensor:
        """Return the teacher's map, pooled to the size that it has when compared with the student's."""
        assert self._shapes is not None
        (teacher,) = features
        student = teacher.new_zeros(len(teacher), *self._shapes[0][0])
        return _features.maps(student, teacher)[1]

    def _errors(self, restored: Tensor, teacher: Tensor) -> Tensor:
        """Return the reconstruction error of each entry."""
        difference = restored.to(teacher.dtype) - teacher
        return difference.abs() if self.reconstruction_form == "l1" else difference.square()

    def forward(self, student_features: Tensors, teacher_features: Tensors) -> dict[str, Tensor]:
        """The loss of a batch and its parts, scalars."""
        self._check_number(len(student_features), len(teacher_features))
        self._check_built()
        student, teacher = _features.maps(student_features[0], teacher_features[0])
        if self.training:
            self._check_prepared()
            _check_normalisable(student)
        # Both losses detach the code, so that an online encoder learns from its reconstruction alone.
        code = self.of_teacher.encode(teacher)
        inherited = through(self.inheriting, student[:, self.inheriting_channels])
        explored = through(self.exploring, student[:, self.exploring_channels])
        terms = {
            "inheritance": inheritance_loss(inherited, code, form=self.form),
            "exploration": exploration_loss(explored, code, form=self.form),
            **self._alignments(student_features[0], teacher_features[0]),
        }
        loss = self.inheritance_weight * terms["inheritance"] + self.exploration_weight * terms["exploration"]
        if self.autoencoder == "online":
            terms["reconstruction"] = self._errors(self.of_teacher.decode(code), teacher).mean()
            loss = loss + terms["reconstruction"]
        return {"loss": loss, **terms}

    @torch.no_grad()
    def _alignments(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        student = _features.as_map(student)
        return {
            "cka_inheritance": linear_cka(student[:, self.inheriting_channels], teacher),
            "cka_exploration": linear_cka(student[:, self.exploring_channels], teacher),
        }

    def _check_prepared(self) -> None:
        if not self._is_prepared():
            raise RuntimeError(
                "expected IEKDLoss.prepare to be called with the teacher's features before the first batch: "
                "it trains their auto-encoder; `autoencoder='online'` does without"
            )


class AutoEncoder(nn.Module):
    """An encoder of maps and its decoder. While it is frozen, neither weights nor statistics move."""

    def __init__(self, channels: int, code: int, *, frozen: bool) -> None:
        super().__init__()
        self.encoder, self.decoder = coder(channels, code), coder(code, channels)
        self.freeze(frozen)

    def freeze(self, frozen: bool) -> None:
        # Set before `train`, which reads it.
        self.frozen = frozen
        self.requires_grad_(not frozen)
        self.train(not frozen)

    def train(self, mode: bool = True) -> AutoEncoder:
        # In training mode each batch's statistics would change the code that the student follows.
        return super().train(mode and not self.frozen)

    def encode(self, x: Tensor) -> Tensor:
        return through(self.encoder, x)

    def decode(self, code: Tensor) -> Tensor:
        return through(self.decoder, code)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


def coder(inputs: int, outputs: int) -> nn.Sequential:
    """Three 3x3 convolutions at full size, with normal weights of variance ``2 / (9 * channels out)``."""
    layers: list[nn.Module] = [nn.LeakyReLU(SLOPE)]
    for before, after in ((inputs, inputs), (inputs, outputs), (outputs, outputs)):
        convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out")
        layers += [convolution, nn.BatchNorm2d(after), nn.LeakyReLU(SLOPE)]
    return nn.Sequential(*layers)


def _check_normalisable(feature: Tensor) -> None:
    """Raise UserError for a single value per channel: batch normalisation averages over rows and places."""
    if feature.numel() == feature.shape[1]:
        raise UserError(
            "expected more than one value per channel in a batch for IEKDLoss, which normalises over rows "
            "and places, got maps of one place and a single row; choose a batch size that leaves no single "
            "row at the end of an epoch, or maps of more places"
        )
