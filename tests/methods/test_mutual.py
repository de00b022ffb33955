"""Mutual learning: who learns from whom, when, and what stays as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from luce import (
    CrossEntropyLoss,
    FitNetLoss,
    KDLoss,
    PLDLoss,
    RKDLoss,
    SimKDLoss,
    VIDLoss,
    WeightedSum,
    models,
)
from luce.errors import UserError
from luce.methods import FeatureMethod, LogitMethod, Method, MutualLearning, TwoViewMethod
from luce.models import Classifier
from luce.signals import LearningTeacher

SHAPE = (1, 8, 8)


def network(seed: int, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(108, 4)
    )


def batch(seed: int = 0, rows: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(rows, *SHAPE, generator=generator)
    return {"input": pixels, "target": torch.arange(rows) % 4, "index": torch.arange(rows)}


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def dml(weight: float = 1.0) -> LogitMethod:
    return LogitMethod(
        WeightedSum({"task": (1.0, CrossEntropyLoss()), "kl": (weight, KDLoss(temperature=1.0))})
    )


def train(
    student: nn.Module, method: MutualLearning | LogitMethod, steps: int = 3
) -> list[dict[str, Tensor]]:
    """The steps of a training loop, as the engine makes them; the terms of each."""
    method.build(student, None, batch(rows=1), batch())
    own = {
        id(p) for o in getattr(method, "optimizers", {}).values() for g in o.param_groups for p in g["params"]
    }
    optimizer = sgd([p for p in (*student.parameters(), *method.parameters()) if id(p) not in own])
    found = []
    with method.hooks(student, None):
        for seed in range(steps):
            terms = method.step(student, batch(seed), None)
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
            if isinstance(method, MutualLearning):
                terms |= method.after_step(student, batch(seed))
            found.append({name: value.detach() for name, value in terms.items()})
    return found


def everything_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a: nn.Module | dict[str, Tensor], b: nn.Module | dict[str, Tensor]) -> bool:
    a, b = (x.state_dict() if isinstance(x, nn.Module) else x for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# A step -----------------------------------------------------------------------------------------------------


def test_the_student_steps_and_then_its_peer_which_sees_the_student_as_it_has_become() -> None:
    student, peer = network(1), network(2)
    ours, theirs = copy.deepcopy(student), copy.deepcopy(peer)
    method = MutualLearning(dml(0.5), peer, optimizer=sgd)
    found = train(student, method)

    def kl(p: Tensor, q: Tensor) -> Tensor:
        p, q = p.log_softmax(1), q.log_softmax(1)
        return (p.exp() * (p - q)).sum(1).mean()

    first, second = sgd([*ours.parameters()]), sgd([*theirs.parameters()])
    for seed, terms in enumerate(found):
        x, y = batch(seed)["input"], batch(seed)["target"]
        for optimizer, learner, other, prefix in (
            (first, ours, theirs, ""),
            (second, theirs, ours, "peer."),
        ):
            said = copy.deepcopy(other)(x).detach()  # in training mode, counting nothing
            logits = learner(x)
            task, mutual = F.cross_entropy(logits, y), 0.5 * kl(said, logits)
            optimizer.zero_grad()
            (task + mutual).backward()
            optimizer.step()
            for name, value in {"task": task, "kl": mutual, "loss": task + mutual}.items():
                assert_close(terms[prefix + name], value.detach())
    for found_network, expected in ((student, ours), (peer, theirs)):
        assert_close(everything_of(found_network), everything_of(expected))


def test_no_gradient_crosses() -> None:
    student, peer, rows = network(1), network(2), batch()
    method = MutualLearning(dml(), peer, optimizer=sgd)
    method.build(student, None, rows, rows)
    with method.hooks(student, None):
        before = everything_of(peer)
        method.step(student, rows, None)["loss"].backward()
        assert all(parameter.grad is None for parameter in peer.parameters())
        assert same(peer, before)
        gradients, before = [p.grad.clone() for p in student.parameters()], everything_of(student)
        found = method.after_step(student, rows)
        assert not any(value.requires_grad for value in found.values())
        assert all(map(torch.equal, gradients, (p.grad for p in student.parameters())))
        assert same(student, before)
        assert all(parameter.grad is None for parameter in peer.parameters())  # ready for the next


def test_a_network_counts_a_batch_once_when_it_learns_from_it() -> None:
    student, peer = network(1), network(2)
    method = MutualLearning(dml(), peer, optimizer=sgd)
    train(student, method, steps=5)
    assert [n[1].num_batches_tracked.item() for n in (student, peer)] == [5, 5]


def test_who_teaches_is_asked_in_training_mode() -> None:
    """With the statistics of the batch, and with dropout."""
    peer = network(2, dropout=0.5)
    source, rows = LearningTeacher(peer), batch(rows=8)
    before = everything_of(peer)
    torch.manual_seed(3)
    said = source.signal(rows).logits
    assert not said.requires_grad
    assert same(peer, before)
    assert not torch.equal(source.signal(rows).logits, said)  # dropout drew anew
    torch.manual_seed(3)
    assert torch.equal(said, peer(rows["input"]))
    assert not same(peer, before)
    peer.eval()
    assert torch.equal(source.signal(rows).logits, source.signal(rows).logits)
    assert not peer.training


def test_without_a_mutual_term_two_networks_train_side_by_side() -> None:
    """To the bits of two plain trainings."""
    student, peer, alone, other = network(1), network(2), network(1), network(2)
    found = train(student, MutualLearning(dml(0.0), peer, optimizer=sgd), steps=4)
    plain = [train(n, LogitMethod(CrossEntropyLoss()), steps=4) for n in (alone, other)]
    assert same(student, alone)
    assert same(peer, other)
    for terms, first, second in zip(found, *plain, strict=True):
        assert torch.equal(terms["loss"], first["loss"])
        assert torch.equal(terms["peer.loss"], second["loss"])
        assert terms["kl"] == terms["peer.kl"] == 0


def test_two_networks_come_to_agree() -> None:
    torch.manual_seed(0)
    student, peer = network(1), network(2)
    alone, other = copy.deepcopy(student), copy.deepcopy(peer)
    train(student, MutualLearning(dml(3.0), peer, optimizer=sgd), steps=30)
    train(alone, MutualLearning(dml(0.0), other, optimizer=sgd), steps=30)

    def distance(a: nn.Module, b: nn.Module) -> float:
        a, b = (n.eval()(batch(99, rows=64)["input"]).softmax(1) for n in (a, b))
        return (a - b).abs().sum(1).mean().item()

    assert distance(student, peer) < 0.5 * distance(alone, other)


def test_both_directions_hear_of_epochs() -> None:
    loss = WeightedSum({"task": (1.0, CrossEntropyLoss()), "kl": (1.0, KDLoss())}, {"kl": 4})
    student, rows = network(1), batch()
    method = MutualLearning(LogitMethod(loss), network(2), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    method.build(student, None, rows, rows)
    found = {}
    with method.hooks(student, None):
        for epoch in (1, 4):
            method.set_epoch(epoch)
            found[epoch] = method.step(student, rows, None) | method.after_step(student, rows)
    for name in ("kl", "peer.kl"):
        assert_close(4 * found[1][name], found[4][name])


@pytest.mark.parametrize("clip_norm", [1e-3, 1e3])
def test_the_gradient_of_the_peer_is_clipped(clip_norm: float) -> None:
    moved = []
    for limit in (clip_norm, None):
        peer = network(2)
        before = [p.detach().clone() for p in peer.parameters()]
        train(network(1), MutualLearning(dml(), peer, optimizer=sgd, clip_norm=limit), steps=1)
        distances = [(a - b).norm() for a, b in zip(before, peer.parameters(), strict=True)]
        moved.append(torch.stack(distances).norm().item())
    clipped, freely = moved
    assert freely > 0.01
    assert clipped == pytest.approx(0.1 * clip_norm if clip_norm < 1 else freely, rel=1e-3)


@pytest.mark.parametrize(
    ("loss", "uses_unlabelled"),
    [(KDLoss(), True), (PLDLoss(), True), (RKDLoss(), True)],
    ids=["KD", "PLD", "RKD"],
)
def test_any_loss_can_teach_both(loss: nn.Module, uses_unlabelled: bool) -> None:
    student, peer = network(1), network(2)
    if isinstance(loss, RKDLoss):
        method: Any = FeatureMethod(CrossEntropyLoss(), {"rkd": (1.0, loss, ["4"], ["4"])})
    else:
        method = LogitMethod(loss)
    before = everything_of(student), everything_of(peer)
    both = MutualLearning(method, peer, optimizer=sgd)
    assert not both.needs_teacher
    assert both.uses_unlabelled is method.uses_unlabelled is uses_unlabelled
    found = train(student, both)
    assert all(value.isfinite() for terms in found for value in terms.values())
    assert not same(student, before[0])
    assert not same(peer, before[1])


# Features ---------------------------------------------------------------------------------------------------


def cnn(widths: list[int], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Classifier(models.build("cnn", classes=4, input_shape=SHAPE, widths=widths))


def hinted(**terms: Any) -> FeatureMethod:
    return FeatureMethod(
        CrossEntropyLoss(), terms or {"hint": (10.0, FitNetLoss(), ["stages.0"], ["stages.1"])}
    )


def test_paths_keep_their_networks_in_both_directions() -> None:
    """Which have other widths here: the first stage of the student beside the second of the peer."""
    student, peer = cnn([4, 6, 8], 1), cnn([3, 5, 7], 2)
    method = MutualLearning(hinted(), peer, optimizer=sgd)
    found = train(student, method)
    channels = [
        [shapes[0][0] for shapes in direction.losses["hint"]._shapes]
        for direction in (method.method, method.peer_method)
    ]
    assert channels == [[6, 7], [7, 6]]
    assert found[0].keys() == {"logits", "hint", "loss", "peer.logits", "peer.hint", "peer.loss"}
    assert found[-1]["hint"] < found[0]["hint"]
    assert found[-1]["peer.hint"] < found[0]["peer.hint"]
    assert not any(m._forward_hooks for n in (student, peer) for m in n.modules())


def test_features_of_the_other_teach() -> None:
    """Against the loss by hand, the teacher's map from a copy that counts nothing here."""
    student, peer, rows = cnn([4, 6, 8], 1), cnn([4, 6, 8], 2), batch()
    method = MutualLearning(hinted(hint=(2.0, RKDLoss(), ["pool"], ["pool"])), peer, optimizer=sgd)
    method.build(student, None, rows, rows)

    def pooled(network: nn.Module) -> Tensor:
        body = copy.deepcopy(network).body
        return body.pool(body.neck(body.stages(body.stem(rows["input"]))))

    with method.hooks(student, None):
        expected = 2 * RKDLoss()([pooled(student)], [pooled(peer)])
        assert_close(method.step(student, rows, None)["hint"], expected)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter += 0.1
        expected = 2 * RKDLoss()([pooled(peer)], [pooled(student)])
        assert_close(method.after_step(student, rows)["peer.hint"], expected.detach())


def test_what_the_losses_learn_belongs_to_whom_it_teaches() -> None:
    student, peer = cnn([4, 6, 8], 1), cnn([4, 6, 8], 2)
    vid = (1.0, VIDLoss(), ["stages.0", "stages.1"], ["stages.0", "stages.1"])
    method = MutualLearning(hinted(vid=vid), peer, optimizer=sgd)
    method.build(student, None, batch(rows=1), batch())
    ours, theirs = [*method.method.parameters()], [*method.peer_method.parameters()]
    assert len(ours) == len(theirs) > 0
    held = {id(p) for group in method.optimizers["peer"].param_groups for p in group["params"]}
    assert held == {id(p) for p in (*peer.parameters(), *theirs)}
    assert {id(p) for p in method.parameters()} == held | {id(p) for p in ours}
    before = [p.detach().clone() for p in (*ours, *theirs)]
    train(student, method)
    assert not any(map(torch.equal, before, (*ours, *theirs)))


# The peer ---------------------------------------------------------------------------------------------------


def test_a_peer_is_drawn_by_the_seed_but_is_no_twin_of_the_student() -> None:
    def fresh() -> nn.Module:
        return nn.Linear(64, 4)

    def made(seed: int) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(seed)
        student = fresh()
        torch.manual_seed(seed)  # as the engine does before a build
        method = MutualLearning(dml(), fresh, optimizer=sgd)
        assert method.co_trained == method.optimizers == {}
        rows = {**batch(), "input": torch.zeros(6, 64)}
        method.build(student, None, rows, rows)
        assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(seed).get_state())
        return student, method.co_trained["peer"]

    student, peer = made(5)
    assert not same(student, peer)
    for seed, expected in ((5, True), (6, False)):
        assert same(made(seed)[1], peer) is expected
        assert not same(made(seed)[0], peer)


def test_building_leaves_no_trace_in_networks_that_are_there() -> None:
    student, peer = network(1, dropout=0.5), network(2, dropout=0.5)
    student[1].eval()
    modes = [m.training for n in (student, peer) for m in n.modules()]
    before = everything_of(student), everything_of(peer)
    rows = batch(rows=1)
    method = MutualLearning(hinted(rkd=(1.0, RKDLoss(), ["4"], ["4"])), peer, optimizer=sgd)
    method.build(student, None, rows, rows)
    assert same(student, before[0])
    assert same(peer, before[1])
    assert [m.training for n in (student, peer) for m in n.modules()] == modes


def test_a_network_that_cannot_learn_from_one_row_is_built_for_one() -> None:
    student, peer = (nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 4)) for _ in range(2))
    method = MutualLearning(hinted(rkd=(1.0, RKDLoss(), ["1"], ["1"])), peer, optimizer=sgd)
    method.build(student, None, batch(rows=1), batch())
    assert peer.training


def test_what_is_kept_is_enough_to_go_on() -> None:
    hint = FeatureMethod(CrossEntropyLoss(), {"hint": (1.0, FitNetLoss(), ["stages.0"], ["stages.0"])})
    student, method = cnn([4, 6, 8], 1), MutualLearning(hint, cnn([4, 6, 8], 2), optimizer=sgd)
    train(student, method)
    again, other = cnn([4, 6, 8], 3), MutualLearning(copy.deepcopy(hint), cnn([4, 6, 8], 4), optimizer=sgd)
    other.build(again, None, batch(rows=1), batch())
    again.load_state_dict(student.state_dict())
    other.load_state_dict(method.state_dict())
    other.optimizers["peer"].load_state_dict(copy.deepcopy(method.optimizers["peer"].state_dict()))
    for one, its in ((student, method), (again, other)):
        with its.hooks(one, None):
            its.after_step(one, batch(7))
    assert same(method, other)
    assert {name.partition(".")[0] for name in method.state_dict()} == {"method", "peer_method", "peer"}


# What is refused --------------------------------------------------------------------------------------------


class Prepared(KDLoss):
    needs_preparation = True


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            TwoViewMethod(LogitMethod(KDLoss())),
            "one view and without optimizers.*got TwoViewMethod",
        ),
        (
            MutualLearning(dml(), network(2), optimizer=sgd),
            "without optimizers.*got MutualLearning",
        ),
        (LogitMethod(CrossEntropyLoss()), "a loss that compares with a teacher for mutual learning"),
        (LogitMethod(PLDLoss(teacher_temperature="auto")), "no trained teacher"),
        (LogitMethod(Prepared()), "no trained teacher"),
        (FeatureMethod(None, {"simkd": (1.0, SimKDLoss(), ["neck"], ["neck"])}), "no trained teacher"),
    ],
    ids=["two views", "own steps", "nothing mutual", "auto", "prepared", "SimKD"],
)
def test_losses_that_are_refused(method: Method, message: str) -> None:
    with pytest.raises(UserError, match=message):
        MutualLearning(method, network(2), optimizer=sgd)


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, float("nan")])
def test_a_limit_that_makes_no_sense(clip_norm: float) -> None:
    with pytest.raises(ValueError, match="`clip_norm` to be a finite number above 0"):
        MutualLearning(dml(), network(2), optimizer=sgd, clip_norm=clip_norm)


def test_a_peer_that_is_a_twin_is_refused() -> None:
    student, rows = network(1), batch()
    for peer in (student, Classifier(student), network(1)):
        with pytest.raises(UserError, match="a peer with other initial weights than the student's"):
            MutualLearning(dml(), peer, optimizer=sgd).build(student, None, rows, rows)


def test_a_path_that_the_peer_has_not_is_told_when_building() -> None:
    rows = batch()
    with pytest.raises(UserError, match=r"unknown module of Network `stages\.1`; did you mean `stages"):
        MutualLearning(hinted(), cnn([4, 6], 2), optimizer=sgd).build(cnn([4, 6, 8], 1), None, rows, rows)


def test_a_step_outside_of_the_block() -> None:
    student, rows = network(1), batch()
    method = MutualLearning(dml(), network(2), optimizer=sgd)
    method.build(student, None, rows, rows)
    with pytest.raises(ZeroDivisionError), method.hooks(student, None):
        1 / 0  # noqa: B018
    with pytest.raises(RuntimeError, match=r"within `with method\.hooks"):
        method.step(student, rows, None)
