"""Adapters: losses of the usual signatures. The classes here have the signatures of public libraries."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import luce
from luce.conformance import ADAPTERS, Loss, check, load_loss
from luce.conformance.adapters import adapter_name
from luce.errors import UserError

from . import broken

CLAIMS = ["divergence"]


class TorchdistillKD(nn.KLDivLoss):
    """torchdistill's `KDLoss`."""

    def __init__(
        self,
        student_module_path,
        student_module_io,
        teacher_module_path,
        teacher_module_io,
        temperature,
        alpha=None,
        beta=None,
        reduction="batchmean",
        **kwargs,
    ):
        super().__init__(reduction=reduction)
        self.paths = (student_module_path, student_module_io), (teacher_module_path, teacher_module_io)
        self.temperature = temperature

    def forward(self, student_io_dict, teacher_io_dict, targets=None, *args, **kwargs):
        (path, io), (teacher_path, teacher_io) = self.paths
        student, teacher = student_io_dict[path][io], teacher_io_dict[teacher_path][teacher_io]
        return super().forward(
            (student / self.temperature).log_softmax(1), (teacher / self.temperature).softmax(1)
        )


class Trainer:
    """TRL's GKDTrainer."""

    @staticmethod
    def generalized_jsd_loss(
        student_logits,
        teacher_logits,
        labels=None,
        beta=0.5,
        temperature=1.0,
        reduction="batchmean",
        num_items_in_batch=None,
    ):
        assert student_logits.ndim == 3
        return luce.jsd_loss(
            student_logits,
            teacher_logits,
            labels,
            beta=beta,
            temperature=temperature,
            class_dim=-1,
            scale_by_temperature=False,
        )


class FusedLinear(nn.Module):
    """Liger's `LigerFusedLinearJSDLoss`."""

    def __init__(self, weight_hard_loss=0.5, weight_soft_loss=0.5, temperature=1.0):
        super().__init__()
        self.weights, self.temperature = (weight_hard_loss, weight_soft_loss), temperature

    def forward(
        self,
        student_input,
        student_weight,
        teacher_input,
        teacher_weight,
        true_labels,
        student_bias=None,
        teacher_bias=None,
    ):
        student, teacher = student_input @ student_weight.T, teacher_input @ teacher_weight.T
        soft = luce.jsd_loss(
            student, teacher, true_labels, temperature=self.temperature, scale_by_temperature=False
        )
        return self.weights[0] * luce.cross_entropy_loss(student, true_labels) + self.weights[1] * soft


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (luce.kd_loss, "plain"),
        (luce.KDLoss, "plain"),
        (luce.KDLoss(), "plain"),
        (broken.kd, "unlabelled"),
        (broken.kd_with_labels, "plain"),
        (lambda y_pred, y_true, eps=1e-10: y_pred, "unlabelled"),
        (lambda logits_s, logits_t, labels: logits_s, "plain"),
        (luce.cross_entropy_loss, "student"),
        (F.cross_entropy, "student"),
        (nn.CrossEntropyLoss, "student"),
        (nn.KLDivLoss(reduction="batchmean"), "log_probs"),
        (nn.KLDivLoss, "log_probs"),
        (TorchdistillKD, "torchdistill"),
        (Trainer.generalized_jsd_loss, "trl"),
        (FusedLinear, "liger"),
        (FusedLinear(), "liger"),
    ],
)
def test_the_signature_suggests_the_adapter(function, name: str) -> None:
    assert adapter_name(function) == name


LOGITS = torch.tensor([[[0.5, -1.0, 2.0], [0.1, 0.3, 0.2]], [[2.0, 1.0, 0.1], [0.0, 1.0, 0.5]]])
TARGET = torch.tensor([2, -100])
PATHS = dict.fromkeys(("student_module_path", "teacher_module_path"), "head") | dict.fromkeys(
    ("student_module_io", "teacher_module_io"), "output"
)


JSD = luce.jsd_loss(*LOGITS, TARGET, beta=0.1)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (Loss.of(luce.kd_loss, options={"temperature": 2.0}), luce.kd_loss(*LOGITS, TARGET, temperature=2.0)),
        (Loss.of(luce.KDLoss, options={"temperature": 2.0}), luce.kd_loss(*LOGITS, TARGET, temperature=2.0)),
        (Loss.of(broken.kd), luce.kd_loss(*LOGITS)),
        (Loss.of(luce.cross_entropy_loss), luce.cross_entropy_loss(LOGITS[0], TARGET)),
        (Loss.of(nn.KLDivLoss(reduction="batchmean")), luce.kd_loss(*LOGITS)),
        (Loss.of(nn.KLDivLoss(reduction="batchmean", log_target=True), "log_targets"), luce.kd_loss(*LOGITS)),
        (Loss.of(TorchdistillKD, options={**PATHS, "temperature": 1.0}), luce.kd_loss(*LOGITS)),
        (Loss.of(Trainer.generalized_jsd_loss, options={"beta": 0.1}), JSD),
        (
            Loss.of(FusedLinear),
            0.5 * luce.jsd_loss(*LOGITS, TARGET) + 0.5 * luce.cross_entropy_loss(LOGITS[0], TARGET),
        ),
    ],
)  # fmt: skip
def test_what_is_called(loss: Loss, expected: torch.Tensor) -> None:
    torch.testing.assert_close(loss(*LOGITS, TARGET), expected)


@pytest.mark.parametrize(
    ("function", "options", "claims"),
    [
        (TorchdistillKD, {**PATHS, "temperature": 4.0}, CLAIMS),
        (Trainer.generalized_jsd_loss, {"beta": 0.9}, [*CLAIMS, "masking"]),
        (FusedLinear, {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0}, [*CLAIMS, "masking"]),
        (nn.KLDivLoss, {"reduction": "batchmean"}, CLAIMS),
    ],
)
def test_sound_losses_of_every_signature_pass(function, options, claims) -> None:
    verdicts = check(function, options=options, claims=claims, examples=4)
    assert not [found for found in verdicts if found.state == "broken"]
    assert {"zero_at_equality", "micro_batches", "low_precision"} <= {
        found.law for found in verdicts if found.state == "held"
    }


def test_a_fused_head_is_compared_with_the_loss_on_logits() -> None:
    def found(temperature: float):
        loss = Loss.of(
            FusedLinear, options={"weight_hard_loss": 0.0, "weight_soft_loss": 1.0}, claims=["masking"]
        )
        other = Loss.of(Trainer.generalized_jsd_loss, options={"temperature": temperature})
        [verdict] = check(loss, against=other, laws=["implementations"])
        return verdict.state

    assert found(1.0) == "held"
    assert found(2.0) == "broken"


def test_the_other_implementation_gets_the_options_it_has() -> None:
    options = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "temperature": 3.0}
    [verdict] = check(
        FusedLinear, options=options, against=Trainer.generalized_jsd_loss, laws=["implementations"]
    )
    assert verdict.state == "held"


def test_a_product_cannot_hold_infinity() -> None:
    [verdict] = check(FusedLinear, laws=["excluded_classes"], claims=["excluded_classes"])
    assert verdict.evidence == "the loss receives its logits as a matrix product, which cannot hold -inf"


def test_a_loss_that_takes_no_float64() -> None:
    def narrow(student_logits, teacher_logits):
        if student_logits.dtype == torch.float64:
            raise TypeError("no float64")
        return broken.kd(student_logits, teacher_logits)

    with pytest.raises(UserError, match="no float64"):
        check(narrow)
    verdicts = check(narrow, dtype=torch.float32, claims=CLAIMS, examples=4)
    assert not [found for found in verdicts if found.state == "broken"]


def test_a_loss_that_computes_in_float32_is_judged_as_such() -> None:
    def narrow(student_logits, teacher_logits):
        return broken.kd(student_logits.float(), teacher_logits.float())

    assert not [found for found in check(narrow, claims=CLAIMS, examples=4) if found.state == "broken"]


def test_a_loss_brings_its_adapter_options_and_claims() -> None:
    loss = Loss(broken.mean_over_elements, ADAPTERS["unlabelled"], claims=["vanishing_classes"])
    assert check(loss, laws=["vanishing_classes"])[0].state == "broken"
    more = Loss.of(
        Loss.of(luce.kd_loss, options={"temperature": 2.0}, claims=["masking"]), claims=["divergence"]
    )
    assert (more.options, more.claims) == ({"temperature": 2.0}, ("masking", "divergence"))


def test_finding_a_loss() -> None:
    assert load_loss("luce:kd_loss") is luce.kd_loss
    assert load_loss("luce.losses:functional.kd_loss") is luce.kd_loss
    for path, reason in {
        "luce.kd_loss": "expected `module:callable`",
        "luce:": "expected `module:callable`",
        "lucee:kd_loss": "could not import `lucee`",
        "luce:kd_los": "unknown attribute of `luce` `kd_los`; did you mean",
        "luce:__version__": "to name a loss, got an object of type str",
    }.items():
        with pytest.raises(UserError, match=reason):
            load_loss(path)
