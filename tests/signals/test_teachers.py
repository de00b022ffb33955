"""Teachers: what they answer and what asking does to them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from luce import data
from luce.errors import UserError
from luce.signals import CachedTeacher, DenseSignal, LearningTeacher, LiveTeacher, Teacher


def network() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 4))


def batch(rows: int = 6) -> dict[str, Tensor]:
    return {"input": torch.randn(rows, 3), "target": torch.zeros(rows).long(), "index": torch.arange(rows)}


def test_a_signal_cannot_be_changed() -> None:
    signal = DenseSignal(torch.zeros(2, 3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        signal.logits = torch.ones(2, 3)  # type: ignore[misc]


def test_a_live_teacher_answers_in_evaluation_mode_without_gradient() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    teacher, rows = LiveTeacher(model), batch()
    rows["input"].requires_grad_()
    answers = [teacher.signal(rows).logits for _ in range(2)]
    assert torch.equal(*answers)
    assert not answers[0].requires_grad
    torch.testing.assert_close(answers[0], model[2](model[0](rows["input"])).detach())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    # Its answers can stand in a loss that is differentiated: they are no inference tensors.
    (answers[0] * torch.ones(4, requires_grad=True)).sum().backward()


def test_a_teacher_is_no_module() -> None:
    """Or a method that holds one would train it, save it and wrap it."""
    assert not issubclass(Teacher, nn.Module)
    holder = nn.Module()
    holder.teacher = LiveTeacher(network())
    assert not list(holder.parameters())
    assert not holder.state_dict()


def test_a_remembered_teacher_finds_rows_by_their_index() -> None:
    pairs = TensorDataset(torch.randn(20, 3), torch.arange(20) % 4)
    live = LiveTeacher(network())
    # Some rows of the source, in any order, one of them twice.
    examples = data.Examples(pairs, [7, 3, 19, 0, 12, 3, 5])
    remembered = CachedTeacher.of(live, data.loader(examples, batch_size=3, seed=None), rows=20)
    assert remembered.logits.shape == (20, 4)
    everything = live.signal({"input": pairs.tensors[0]}).logits
    for index in ([3, 3], [19, 0, 7], [12]):
        answer = remembered.signal({"index": torch.tensor(index)}).logits
        torch.testing.assert_close(answer, everything[index])
    others = [index for index in range(20) if index not in (7, 3, 19, 0, 12, 5)]
    assert remembered.logits[others].isnan().all()  # which no training overlooks


def test_a_remembered_teacher_does_not_hold_what_it_was_made_from() -> None:
    live, rows = LiveTeacher(network()), batch()
    remembered = CachedTeacher.of(live, [rows], rows=6)
    before = remembered.signal(rows).logits.clone()
    nn.init.zeros_(live.network[2].weight)
    assert torch.equal(remembered.signal(rows).logits, before)
    remembered.to(torch.device("cpu"))
    assert torch.equal(remembered.signal(rows).logits, before)


def test_a_teacher_that_was_asked_nothing_remembers_nothing() -> None:
    with pytest.raises(UserError, match="expected at least one batch"):
        CachedTeacher.of(LiveTeacher(network()), [], rows=3)


def test_a_learning_teacher_with_one_module_in_two_places_keeps_its_statistics() -> None:
    norm = nn.BatchNorm1d(3)
    network = nn.Sequential(norm, nn.ReLU(), norm).train()
    before = {name: (id(value), value.clone()) for name, value in network.named_buffers()}
    answer = LearningTeacher(network).signal(batch()).logits
    assert answer.isfinite().all()
    assert before.keys() == dict(network.named_buffers()).keys()
    for name, value in network.named_buffers():
        assert id(value) == before[name][0]
        assert torch.equal(value, before[name][1])
