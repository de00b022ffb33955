"""What a loss saves: tensors alone, which survive a file of safetensors and resume the very same loss."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.testing import assert_close

import luce

from . import feature_cases
from .catalogue import CASES, batch

RELATED = ["class_mean", "true_prob+class_mean", "weight_sim"]
MODULES = [
    *(lambda case=case: case.loss.module(**case.options) for case in CASES),
    lambda: luce.PLDLoss(teacher_temperature="auto"),
    *(lambda keep=keep: luce.PartialKDLoss(keep=keep) for keep in RELATED),
    lambda: luce.CTKDLoss(),
    lambda: luce.CTKDLoss(classes=5),
    lambda: luce.Standardized(luce.PLDLoss(teacher_temperature="auto")),
    lambda: luce.WeightedSum({"a": (0.5, luce.PLDLoss(teacher_temperature="auto")), "b": (1, luce.KDLoss())}),
]


def saved(module: torch.nn.Module) -> dict[str, Tensor]:
    """The state of a module after a file of safetensors, which holds nothing but tensors."""
    state = module.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    again = safetensors.torch.load(safetensors.torch.save(state))
    assert_close(again, dict(state), rtol=0, atol=0, equal_nan=True)
    return again


@pytest.mark.parametrize("make", MODULES, ids=lambda make: repr(make()).split("\n")[0])
def test_a_loss_on_logits_resumes_from_tensors_alone(make) -> None:
    student, teacher, target = batch(12)
    loss, fresh = make(), make()
    if loss.needs_preparation:
        assert saved(loss) == {}
        if "weight_sim" in getattr(loss, "keep", ""):
            loss.use_weight(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))
        else:
            loss.prepare(teacher, target)
    fresh.load_state_dict(saved(loss))
    torch.manual_seed(0)
    expected = loss(student, teacher, target)
    torch.manual_seed(0)
    assert_close(fresh(student, teacher, target), expected, rtol=0, atol=0)


@pytest.mark.parametrize("entry", feature_cases.CASES, ids=str)
def test_a_loss_on_features_resumes_from_tensors_alone(entry: feature_cases.Case) -> None:
    loss, fresh = entry.build(), entry.module(**entry.options)
    fresh.build(entry.student, entry.teacher)
    fresh.load_state_dict(saved(loss))
    batch = entry.batch(4, torch.float32)
    values = []
    for module in (loss, fresh):
        torch.manual_seed(0)
        values.append(module(*batch))
    assert_close(values[1], values[0], rtol=0, atol=0)


def test_the_banks_of_crd_resume_from_tensors_alone() -> None:
    index, target = torch.arange(10), torch.arange(10) % 3

    def make() -> luce.CRDLoss:
        loss = luce.CRDLoss(negatives=4)
        loss.register_rows(index, target)
        loss.build([(8,)], [(16,)])
        return loss

    loss, fresh = make(), make()
    student, teacher = [torch.rand(3, 8)], [torch.rand(3, 16)]
    loss(student, teacher, target=target[:3], index=index[:3])
    fresh.load_state_dict(saved(loss))
    values = []
    for module in (loss, fresh):
        torch.manual_seed(0)
        values.append(module(student, teacher, target=target[:3], index=index[:3]))
    assert_close(values[1], values[0], rtol=0, atol=0)


def test_a_checkpoint_fills_a_loss_that_was_not_prepared_and_the_reverse_leaves_it_so() -> None:
    loss = luce.PLDLoss(teacher_temperature="auto")
    loss.load_state_dict({})
    with pytest.raises(RuntimeError, match="`prepare"):
        loss(*batch(3))
    loss.load_state_dict({"suggested_temperature": torch.tensor(2.0)})
    assert_close(loss(*batch(3)), luce.pld_loss(*batch(3), teacher_temperature=2.0))
    loss.load_state_dict({"suggested_temperature": torch.tensor(3.0)})
    assert loss.options()["teacher_temperature"] == 3.0


def test_a_suggested_temperature_lies_on_the_device_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that train on GPUs broadcast the buffers of a loss, which works on their devices only."""
    monkeypatch.setattr("luce.losses.modules.listwise.suggest_temperature", lambda logits: 2.0)
    loss = luce.PLDLoss(teacher_temperature="auto")
    prepared = loss.prepare(torch.empty(3, 5, device="meta"), torch.empty(3, device="meta"))
    assert prepared == {"teacher_temperature": 2.0}
    assert loss.suggested_temperature.device.type == "meta"
    assert loss.options()["teacher_temperature"] == 2.0


def test_a_restored_temperature_compiles_without_a_break() -> None:
    loss = luce.PLDLoss(teacher_temperature="auto")
    loss.load_state_dict({"suggested_temperature": torch.tensor(2.0)})
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    assert_close(compiled(*batch(3)), luce.pld_loss(*batch(3), teacher_temperature=2.0))
