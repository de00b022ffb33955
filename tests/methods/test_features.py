"""Distillation through features: what a step does, what it leaves as it was, and what is refused."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import TensorDataset

import luce
from luce import CRDLoss, CrossEntropyLoss, FitNetLoss, KDLoss, VIDLoss, WeightedSum, models
from luce.data import Examples
from luce.errors import UserError
from luce.losses import FeatureLoss
from luce.losses.modules.features import TeacherFeatures, Train
from luce.methods import FeatureMethod, FeatureTerm
from luce.models import Classifier
from luce.signals import CachedTeacher, LiveTeacher
from luce.training.batches import TrainingBatches

SHAPE = (1, 8, 8)
CE_AND_KD = {"task": (0.5, CrossEntropyLoss()), "kd": (2.0, KDLoss(temperature=3.0))}


class MSELoss(FeatureLoss):
    """The plainest: nothing is learnt."""

    takes = "maps"

    def __init__(self) -> None:
        self.__post_init__()

    def _stage(self, stage: int, student: Tensor, teacher: Tensor) -> Tensor:
        return nn.functional.mse_loss(student, teacher)


def networks(student: str = "cnn") -> tuple[nn.Module, LiveTeacher]:
    build = {"classes": 4, "input_shape": SHAPE}
    options = {"widths": [4, 6, 6]} if student == "cnn" else {}
    teacher = models.build("cnn", widths=[4, 6, 8], **build)
    return Classifier(models.build(student, **build, **options)), LiveTeacher(Classifier(teacher))


def batch(rows: int = 6) -> dict[str, Tensor]:
    return {"input": torch.rand(rows, *SHAPE), "target": torch.arange(rows) % 4, "index": torch.arange(rows)}


def everything_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# A step -----------------------------------------------------------------------------------------------------


def test_a_step_is_one_forward_pass_and_all_terms() -> None:
    (student, teacher), rows = networks(), batch()
    terms = {
        "first": FeatureTerm(3.0, MSELoss(), ["stages.0"], ["stages.0"]),
        "crossed": (0.5, MSELoss(), ["stages.0", "stem"], ["stages.0", "stem"]),
    }
    method = FeatureMethod(WeightedSum(CE_AND_KD), terms)
    method.build(student, teacher, rows, rows)
    calls = []
    student.register_forward_hook(lambda *_: calls.append(1))
    with method.hooks(student, teacher):
        found = method.step(student.eval(), rows, teacher.signal(rows))
    assert len(calls) == 1
    assert list(found) == ["task", "kd", "first", "crossed", "loss"]

    inner, other = student.body, teacher.network.body
    mse = nn.functional.mse_loss
    stem, their_stem = inner.stem(rows["input"]), other.stem(rows["input"])
    first = mse(inner.stages[0](stem), other.stages[0](their_stem))
    expected = WeightedSum(CE_AND_KD)(inner(rows["input"]), other(rows["input"]), rows["target"])
    expected |= {"first": 3 * first, "crossed": (first + mse(stem, their_stem)) / 2}
    expected["loss"] = expected["loss"] + expected["first"] + expected["crossed"]
    torch.testing.assert_close(dict(sorted(found.items())), dict(sorted(expected.items())))


def test_the_features_are_those_of_this_very_pass() -> None:
    """Dropout shows whether the student ran again."""
    student = Classifier(nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 4)))
    _, teacher = networks()
    seen = {}

    class Spy(MSELoss):
        takes = "vectors"

        def _stage(self, stage: int, student: Tensor, teacher: Tensor) -> Tensor:
            seen["feature"] = student
            return student.sum() * 0

    def loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        seen["logits"] = student_logits
        return student_logits.sum() * 0

    method, rows = FeatureMethod(loss, {"spy": (1.0, Spy(), ["1"], ["pool"])}), batch()
    method.build(student, teacher, rows, rows)
    with method.hooks(student, teacher):
        terms = method.step(student.train(), rows, teacher.signal(rows))
    assert terms.keys() == {"logits", "spy", "loss"}
    assert (seen["feature"] == 0).float().mean() > 0.3
    torch.testing.assert_close(seen["logits"], student.body[2](seen["feature"]))


def test_features_alone() -> None:
    (student, teacher), rows = networks(), batch()
    method = FeatureMethod(None, {"hint": (2.0, FitNetLoss(), ["stages.1"], ["stages.1"])})
    method.build(student, teacher, rows, rows)
    with method.hooks(student, teacher):
        terms = method.step(student, rows, teacher.signal(rows))
    assert terms.keys() == {"hint", "loss"}
    terms["loss"].backward()
    assert student.body.stages[1][1].weight.grad.abs().sum() > 0
    assert not student.body.head.weight.grad.any()


def test_a_weight_grows_over_its_warm_up() -> None:
    (student, teacher), rows = networks(), batch()
    method = FeatureMethod(
        WeightedSum(CE_AND_KD, {"kd": 2}),
        {"slow": (3.0, MSELoss(), ["stem"], ["stem"], 4), "at once": (3.0, MSELoss(), ["stem"], ["stem"])},
    )
    method.build(student, teacher, rows, rows)
    values = {}
    with method.hooks(student, teacher):
        for epoch in (1, 2, 4, 9):
            method.set_epoch(epoch)
            values[epoch] = method.step(student.eval(), rows, teacher.signal(rows))
    full = values[9]["at once"]
    for epoch, share in ((1, 0.25), (2, 0.5), (4, 1.0), (9, 1.0)):
        torch.testing.assert_close(values[epoch]["slow"], share * full)
        torch.testing.assert_close(values[epoch]["at once"], full)
    torch.testing.assert_close(2 * values[1]["kd"], values[2]["kd"])


def test_a_term_of_weight_0_is_0_even_where_it_is_infinite() -> None:
    class Infinite(MSELoss):
        def _stage(self, stage: int, student: Tensor, teacher: Tensor) -> Tensor:
            return student.sum() * torch.inf

    (student, teacher), rows = networks(), batch()
    method = FeatureMethod(CrossEntropyLoss(), {"off": (0.0, Infinite(), ["stem"], ["stem"])})
    method.build(student, teacher, rows, rows)
    with method.hooks(student, teacher):
        terms = method.step(student, rows, teacher.signal(rows))
    assert terms["off"].item() == 0
    assert torch.equal(terms["loss"], terms["logits"])


def test_labels_and_row_numbers_go_to_the_losses_that_want_them() -> None:
    seen = {}

    class Wants(MSELoss):
        needs_labels = needs_index = True

        def forward(self, student_features, teacher_features, **told):
            seen.update(told)
            return student_features[0].sum()

    (student, teacher), rows = networks(), batch()
    method = FeatureMethod(None, {"wants": (1.0, Wants(), ["stem"], ["stem"])})
    method.build(student, teacher, rows, rows)
    with method.hooks(student, teacher):
        method.step(student, rows, teacher.signal(rows))
    assert seen["target"] is rows["target"]
    assert seen["index"] is rows["index"]


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_a_compiled_student_learns_the_same(backend: str) -> None:
    torch.compiler.reset()
    gradients = []
    for compiled in (False, True):
        torch.manual_seed(0)
        (student, teacher), rows = networks(), batch()
        method = FeatureMethod(
            CrossEntropyLoss(), {"vid": (1.0, VIDLoss(), ["stages.0", "stages.1"], ["stages.0", "stages.1"])}
        )
        method.build(student, teacher, rows, rows)
        with method.hooks(student, teacher):
            called = torch.compile(student, backend=backend) if compiled else student
            for _ in range(2):
                method.step(called, rows, teacher.signal(rows))["loss"].backward()
        gradients.append([p.grad for p in (*student.parameters(), *method.parameters())])
    torch.testing.assert_close(*gradients)


# What is left as it was -------------------------------------------------------------------------------------


def test_building_leaves_no_trace() -> None:
    student, teacher = networks("resnet8")
    student.train()
    student.body.stages[1].eval()
    modes = [module.training for module in student.modules()]
    before, theirs = everything_of(student), everything_of(teacher.network)
    method = FeatureMethod(None, {"vector": (1.0, luce.RKDLoss(), ["pool"], ["pool"])})  # learns nothing
    rows, state = batch(), torch.get_rng_state()
    method.build(student, teacher, rows, rows)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(everything_of(student), before)
    assert same(everything_of(teacher.network), theirs)
    assert [module.training for module in student.modules()] == modes
    assert all(parameter.grad is None for parameter in student.parameters())
    assert not any(m._forward_hooks for n in (student, teacher.network) for m in n.modules())


def test_a_network_that_draws_random_numbers_even_in_evaluation() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x)

    _, teacher = networks()
    student = nn.Sequential(nn.Flatten(), Noisy(), nn.Linear(64, 4))
    method = FeatureMethod(None, {"vector": (1.0, luce.RKDLoss(), ["1"], ["pool"])})
    rows, state = batch(), torch.get_rng_state()
    method.build(student, teacher, rows, rows)
    assert torch.equal(torch.get_rng_state(), state)


def test_training_changes_nothing_of_the_teacher() -> None:
    student, teacher = networks()
    before = everything_of(teacher.network)
    method = FeatureMethod(
        WeightedSum(CE_AND_KD), {"hint": (100.0, FitNetLoss(), ["stages.1"], ["stages.1"])}
    )
    method.build(student, teacher, batch(1), batch())
    optimizer = torch.optim.SGD([*student.parameters(), *method.parameters()], lr=0.1)
    with method.hooks(student, teacher):
        for _ in range(3):
            rows = batch()
            optimizer.zero_grad()
            method.step(student.train(), rows, teacher.signal(rows))["loss"].backward()
            optimizer.step()
    assert same(everything_of(teacher.network), before)
    assert all(parameter.grad is None for parameter in teacher.network.parameters())
    assert not teacher.network.training
    assert teacher.signal(batch()).features == {}


def test_no_feature_outlives_its_step() -> None:
    (student, teacher), rows = networks(), batch()
    method = FeatureMethod(None, {"map": (1.0, MSELoss(), ["stem"], ["stem"])})
    method.build(student, teacher, rows, rows)
    born: list[weakref.ref[Tensor]] = []
    for network in (student.body, teacher.network.body):
        network.stem.register_forward_hook(lambda module, inputs, output: born.append(weakref.ref(output)))
    gc.disable()
    try:
        with method.hooks(student, teacher):
            for _ in range(4):
                method.step(student, rows, teacher.signal(rows))["loss"].backward()
                assert len(born) == 2
                assert [feature() for feature in born] == [None, None]
                born.clear()
    finally:
        gc.enable()


def test_hooks_go_when_a_training_breaks_off() -> None:
    (student, teacher), rows = networks(), batch()
    method = FeatureMethod(None, {"map": (1.0, MSELoss(), ["stem"], ["stem"])})
    method.build(student, teacher, rows, rows)
    with pytest.raises(ZeroDivisionError), method.hooks(student, teacher):
        1 / 0  # noqa: B018
    assert not any(m._forward_hooks for n in (student, teacher.network) for m in n.modules())
    assert teacher.signal(rows).features == {}
    with pytest.raises(RuntimeError, match=r"within `with method\.hooks"):
        method.step(student, rows, teacher.signal(rows))


# What it asks for, and what is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "feature", "uses_unlabelled"),
    [
        (CrossEntropyLoss(), FitNetLoss(), True),
        (None, FitNetLoss(), True),
        (CrossEntropyLoss(), CRDLoss(), False),
        (None, CRDLoss(), False),
        (WeightedSum(CE_AND_KD), CRDLoss(), True),
    ],
)
def test_which_rows_can_teach(loss, feature, uses_unlabelled: bool) -> None:
    method = FeatureMethod(loss, {"x": (1.0, feature, ["pool"], ["pool"])})
    assert method.needs_teacher
    assert method.uses_unlabelled is uses_unlabelled
    if loss is not None:  # a term that is switched off teaches nothing
        off = FeatureMethod(loss, {"x": (0.0, feature, ["pool"], ["pool"])})
        assert off.uses_unlabelled is isinstance(loss, WeightedSum)


def test_preparation_reaches_the_loss_on_logits() -> None:
    class Prepared(KDLoss):
        needs_preparation = True

        def prepare(self, teacher_logits: Tensor, target: Tensor) -> dict[str, float]:
            self.heard = teacher_logits, target
            return {"found": 3.0}

    loss = Prepared()
    assert not FeatureMethod(KDLoss(), {"x": (1.0, MSELoss(), ["a"], ["a"])}).needs_preparation
    method = FeatureMethod(loss, {"x": (1.0, MSELoss(), ["a"], ["a"])})
    assert method.needs_preparation
    inputs, targets = torch.rand(300, 4), torch.arange(300) % 2
    rows = TrainingBatches(Examples(TensorDataset(inputs, targets), range(300)), torch.device("cpu"))
    teacher = LiveTeacher(nn.Linear(4, 2))
    assert method.prepare(teacher, rows) == {"found": 3.0}
    assert_close(loss.heard[0], teacher.network(inputs).detach())
    assert torch.equal(loss.heard[1], targets)


def test_preparation_reaches_the_losses_on_features_that_want_it() -> None:
    class Prepared(MSELoss):
        needs_preparation = True

        def prepare(self, teacher_features: TeacherFeatures, train: Train) -> dict[str, float]:
            self.heard = [
                torch.cat(one) for one in zip(*teacher_features(batch_size=4, epochs=2), strict=True)
            ]
            return {"found": 2.0}

    class NotPrepared(MSELoss):
        def prepare(self, teacher_features: TeacherFeatures, train: Train) -> dict[str, float]:
            raise AssertionError("nobody asked")

    _, teacher = networks()
    loss, paths = Prepared(), ["stages.1", "stages.0"]
    method = FeatureMethod(
        KDLoss(), {"a": (1.0, loss, paths, paths), "b": (1.0, NotPrepared(), paths, paths)}
    )
    assert method.needs_preparation
    rows = batch(10)
    examples = Examples(TensorDataset(rows["input"], rows["target"]), range(10))
    found = method.prepare(teacher, TrainingBatches(examples, torch.device("cpu")))
    assert found == {"a.found": 2.0}
    with teacher.record_features(paths):
        features = teacher.signal(rows).features
    for path, heard in zip(paths, loss.heard, strict=True):
        assert_close(heard, torch.cat([features[path]] * 2))
    assert teacher.signal(rows).features == {}  # no hook is left


def test_what_a_loss_tells_beside_its_value_is_noted_and_not_descended() -> None:
    class Telling(MSELoss):
        def forward(
            self, student_features: list[Tensor], teacher_features: list[Tensor]
        ) -> dict[str, Tensor]:
            value = super().forward(student_features, teacher_features)
            return {"loss": value, "twice": 2 * value}

    student, teacher = networks()
    method = FeatureMethod(None, {"x": (3.0, Telling(), ["stages.0"], ["stages.0"])})
    rows = batch()
    method.build(student, teacher, rows, rows)
    with method.hooks(student, teacher):
        terms = method.step(student, rows, teacher.signal(rows))
    assert terms.keys() == {"x", "x.twice", "loss"}
    assert_close(terms["x"], 1.5 * terms["x.twice"])
    assert_close(terms["loss"], terms["x"])
    assert not terms["x.twice"].requires_grad


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({}, "expected at least one term"),
        ({"loss": (1.0, MSELoss(), ["a"], ["a"])}, 'none of them called "loss"'),
        ({"x": (-1.0, MSELoss(), ["a"], ["a"])}, "weight of x.*at least 0, got -1"),
        ({"x": (1.0, MSELoss(), ["a"], ["a"], -1)}, "warmup of x.*at least 0, got -1"),
        ({"x.y": (1.0, MSELoss(), ["a"], ["a"])}, "names of terms that can name a module"),
    ],
)
def test_terms_that_are_refused(terms, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureMethod(None, terms)


def test_a_term_has_lists_of_paths_and_a_loss_on_features() -> None:
    with pytest.raises(TypeError, match=r"expected a loss on features .* for `x`, got KDLoss"):
        FeatureMethod(None, {"x": (1.0, KDLoss(), ["a"], ["a"])})
    for paths in ("pool", ["pool"]), (["pool"], "pool"):
        with pytest.raises(TypeError, match=r"expected lists of paths for `x`, got .*'pool'"):
            FeatureMethod(None, {"x": (1.0, MSELoss(), *paths)})


@pytest.mark.parametrize(("loss", "name"), [(KDLoss(), "logits"), (WeightedSum(CE_AND_KD), "kd")])
def test_a_term_on_features_hides_none_on_logits(loss, name: str) -> None:
    terms = {name: (1.0, MSELoss(), ["a"], ["a"])}
    with pytest.raises(ValueError, match=rf"expected other names .*got \['{name}'\]"):
        FeatureMethod(loss, terms)
    assert FeatureMethod(None, terms).terms.keys() == {name}


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ((1.0, FitNetLoss(), ["stage.0"], ["stages.0"]), "module of Network `stage.0`; did you mean"),
        (
            (1.0, FitNetLoss(), ["stages.0"], ["stages.7"]),
            "module of Network `stages.7`; did you mean",
        ),
        ((1.0, FitNetLoss(), ["pool"], ["stages.0"]), r"`x`: expected a feature of the student of shape"),
        (
            (1.0, luce.RKDLoss(), ["pool"], ["stages.0"]),
            r"`x`: expected a feature of the teacher.*pool",
        ),
        ((1.0, VIDLoss(), ["stem", "stages.0"], ["stem"]), "`x`: expected as many features"),
        ((1.0, luce.RKDLoss(), ["pool", "pool"], ["pool", "pool"]), "`x`: expected one feature"),
    ],
)
def test_networks_that_do_not_suit_the_losses(term, message: str) -> None:
    student, teacher = networks()
    with pytest.raises(UserError, match=message):
        FeatureMethod(None, {"x": term}).build(student, teacher, batch(1), batch())


def test_a_teacher_that_has_no_features_to_give() -> None:
    student, _ = networks()
    method = FeatureMethod(None, {"x": (1.0, FitNetLoss(), ["stem"], ["stem"])})
    with pytest.raises(UserError, match=r"set `teacher\.cache_outputs: false`"):
        method.build(student, CachedTeacher(torch.zeros(6, 4)), batch(1), batch())
    with pytest.raises(UserError, match="add `teacher` to the recipe"):
        method.build(student, None, batch(1), batch())


def test_crd_is_told_of_the_rows() -> None:
    student, teacher = networks()
    method = FeatureMethod(None, {"crd": (0.8, CRDLoss(width=8), ["pool"], ["pool"])})
    rows = {"index": torch.tensor([4, 2, 9]), "target": torch.tensor([0, -1, 1])}
    method.build(student, teacher, batch(1), rows)
    assert method.losses["crd"].student_bank.shape == (2, 8)
    one_class = {"index": torch.arange(3), "target": torch.zeros(3, dtype=torch.long)}
    method = FeatureMethod(None, {"crd": (0.8, CRDLoss(width=8), ["pool"], ["pool"])})
    with pytest.raises(UserError, match="`crd`: expected labelled rows of at least two classes"):
        method.build(student, teacher, batch(1), one_class)
