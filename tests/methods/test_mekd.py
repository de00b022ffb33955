"""MEKD: the alignment, the game, the pool, the budget, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import luce
from luce import CrossEntropyLoss, KDLoss, PLDLoss, WeightedSum, models
from luce.errors import UserError
from luce.methods import MEKD, FeatureMethod, LogitMethod, TwoViewMethod
from luce.methods._processes import as_first
from luce.methods.mekd import fooling_loss, information_loss
from luce.signals import BudgetError, CachedTeacher, DenseSignal, LiveTeacher, LocalBlackBox, Teacher

C, SHAPE = 4, (1, 8, 8)


class Rows:
    """Implements `TrainingRows` on so many random images."""

    def __init__(self, count: int = 40, trial: bool = False, shape: tuple[int, ...] = SHAPE) -> None:
        self.trial = trial
        generator = torch.Generator().manual_seed(3)
        self.images = 3 + 2 * torch.rand(count, *shape, generator=generator)
        self.index = torch.arange(count)
        self.read = 0

    @property
    def all(self) -> dict[str, Tensor]:
        return {"input": self.images, "target": self.index % C, "index": self.index}

    def batches(self, batch_size: int = 256, *, epochs: int = 1, shuffle: bool = False) -> Iterator[Any]:
        for _ in range(epochs):
            for rows in self.index.split(batch_size):
                self.read += 1
                yield {name: part[rows] for name, part in self.all.items()}
                if self.trial:
                    return


class Recorder(LiveTeacher):
    """Remembers what it was asked."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.seen: list[Tensor] = []

    def signal(self, batch: Any) -> DenseSignal:
        self.seen.append(batch["input"])
        return super().signal(batch)

    @property
    def queries(self) -> int:
        return sum(map(len, self.seen))


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return models.build("mlp", classes=C, input_shape=SHAPE, hidden=[6])


def ready(
    loss: Any = None, teacher: Teacher | None = None, rows: Rows | None = None, **options: Any
) -> tuple[MEKD, nn.Module, dict[str, float]]:
    """A prepared method, its student, and what it found."""
    torch.manual_seed(1)
    options = {"queries": 50, "gan_epochs": 2, "gan_batch_size": 16, "gan_width": 4, **options}
    method, student, rows = MEKD(LogitMethod(loss or KDLoss()), **options), network(1), rows or Rows()
    teacher = teacher or LiveTeacher(network(2))
    method.build(student, teacher, {name: part[:2] for name, part in rows.all.items()}, rows.all)
    found = method.prepare(teacher, rows)
    return method, student, found


def test_the_alignment_is_the_mean_distance_of_two_images() -> None:
    method, *_ = ready(image=3.0, tau=2.0)
    answers, logits = torch.randn(5, C), torch.randn(5, C, requires_grad=True)
    ours = method.generator((logits - logits.mean(1, keepdim=True)) / 2.0)
    theirs = method.generator((answers - answers.mean(1, keepdim=True)) / 2.0)
    expected = sum((a - b).abs().sum() for a, b in zip(ours, theirs, strict=True)) / (5 * 64)
    value = method.alignment(logits, method.teacher_latents(answers))
    torch.testing.assert_close(value, expected)
    assert 0 < value <= 2


def test_nothing_is_left_to_align_where_student_and_teacher_say_the_same() -> None:
    method, *_ = ready(tau=2.0)
    answers = torch.randint(-8, 8, (5, C)) / 4  # sums and means of these are exact
    logits = (answers + 8.0).requires_grad_()  # a constant is open
    value = method.alignment(logits, method.teacher_latents(answers))
    (slope,) = torch.autograd.grad(value, logits)
    assert value == 0
    assert torch.equal(slope, torch.zeros(5, C))


def test_the_gradient_of_the_alignment() -> None:
    method, *_ = ready(tau=1.5)
    method.double()
    latents = method.teacher_latents(torch.randn(3, C, dtype=torch.float64))
    logits = torch.randn(3, C, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: method.alignment(x, latents), logits)


def test_hard_and_soft_answers_align_alike_where_they_say_the_same() -> None:
    method, *_ = ready(tau=2.5, gain=3.0)
    classes = torch.tensor([0, 3, 1])
    soft = 2.5 * 3.0 * torch.eye(C)[classes]
    logits = torch.randn(3, C)
    values = []
    for kind, answers in (("probs", soft), ("label", 1000.0 * torch.eye(C)[classes])):
        method.kind = kind
        values.append(method.alignment(logits, method.teacher_latents(answers)))
    torch.testing.assert_close(*values)


def test_a_hard_answer_has_the_norm_of_a_latent() -> None:
    method, *_ = ready()
    method.kind = "label"
    expected = math.sqrt(C) * (torch.eye(C)[2] - 1 / C)
    torch.testing.assert_close(method.teacher_latents(torch.tensor([[0.0, 0.0, 9.0, 1.0]]))[0], expected)


@pytest.mark.parametrize("tau", ["auto", 0.25])
def test_tau_makes_answers_spread_like_latents(tau: Any) -> None:
    method, _, found = ready(tau=tau)
    centred = method.answers - method.answers.mean(1, keepdim=True)
    spread = math.sqrt(centred.square().mean().item())
    assert found["tau"] == pytest.approx(spread if tau == "auto" else 0.25)
    assert found["ratio"] == pytest.approx(1.0 if tau == "auto" else spread / 0.25)


def test_only_the_student_learns() -> None:
    teacher = LiveTeacher(network(2))
    method, student, _ = ready(teacher=teacher)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    method.train()
    terms = method.step(student.train(), Rows().all, None)
    terms["loss"].backward()
    assert all(parameter.grad is None for parameter in method.parameters())
    assert all(parameter.grad is None for parameter in teacher.network.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in student.parameters())
    assert not any(module.training for module in method.generator.modules())
    for name, value in method.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_step_takes_rows_of_the_pool_and_their_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = WeightedSum({"kd": (0.5, KDLoss(temperature=2.0)), "pld": (2.0, PLDLoss())})
    method, student, _ = ready(loss, image=3.0)
    monkeypatch.setattr(torch, "randperm", torch.arange)
    method.set_epoch(1)
    for first in (0, 7, 14):
        terms = method.step(student, {"target": torch.zeros(7)}, None)
        low, high = Rows().images.aminmax()
        images = low + (high - low) * (method.generator(method.pool[first : first + 7]) + 1) / 2
        answers, logits = method.answers[first : first + 7], student(images)
        torch.testing.assert_close(answers, LiveTeacher(network(2)).signal({"input": images}).logits)
        expected = {
            "kd": 0.5 * luce.kd_loss(logits, answers, temperature=2.0),
            "pld": 2.0 * luce.pld_loss(logits, answers),
            "image": 3.0 * method.alignment(logits, method.teacher_latents(answers)),
        }
        torch.testing.assert_close(terms, {**expected, "loss": sum(expected.values())})


def test_the_pool_is_gone_through_before_any_row_comes_again() -> None:
    method, *_ = ready(queries=20, information=0.0)
    method.set_epoch(1)
    rows = torch.cat([method._next(number) for number in (6, 6, 6, 2)])
    assert sorted(rows.tolist()) == list(range(20))
    assert sorted(method._next(45)[:20].tolist()) == list(range(20))
    torch.manual_seed(5)
    method.set_epoch(2)  # what was left of the epoch before is forgotten: nothing need be saved of it
    first = method._next(10)
    torch.manual_seed(5)
    method.set_epoch(3)
    assert torch.equal(first, method._next(10))


@pytest.mark.parametrize(
    ("options", "information", "pool"),
    [
        ({}, 5, 45),
        ({"information": 0.0}, 0, 50),
        ({"information": 0.5}, 25, 25),
        ({"information": 0.99, "queries": 400, "gan_epochs": 1}, 48, 352),  # no more than the game has images
        ({"information": 0.96, "queries": 10}, 9, 1),  # there is always something to distil from
        ({"alpha": 0.0}, 0, 50),
        ({"images": "noise"}, 0, 50),
        ({"images": "real", "queries": 30}, 0, 30),
    ],
)
def test_the_teacher_is_asked_as_often_as_planned(
    options: dict[str, Any], information: int, pool: int
) -> None:
    teacher = Recorder(network(2))
    method, student, found = ready(teacher=teacher, **options)
    assert method.plan == (information, pool)
    assert (found["queries"], found["information_queries"]) == (information + pool, information)
    assert teacher.queries == information + pool
    for _ in range(5):
        method.step(student, Rows().all, None)
    assert teacher.queries == information + pool


def test_a_label_says_nothing_about_how_sure_a_teacher_is() -> None:
    teacher = LocalBlackBox(network(2), answers="label", classes=C)
    method, student, found = ready(teacher=teacher, information=0.5)
    assert (teacher.queries, found["information_queries"]) == (50, 0)
    assert (found["tau"], found["confidence"]) == (5.0, 1.0)
    assert method.step(student, Rows().all, None)["loss"].isfinite()


@pytest.mark.parametrize("answers", ["probs", "topk", "label"])
@pytest.mark.parametrize("loss", [KDLoss(temperature=2.0), PLDLoss(top_k=2)], ids=["kd", "pld"])
def test_any_answer_teaches(loss: nn.Module, answers: Any) -> None:
    teacher = LocalBlackBox(network(2), answers=answers, classes=C, top_k=2 if answers == "topk" else None)
    method, student, _ = ready(loss, teacher)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        losses.append(method.step(student, Rows().all, None)["loss"])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_probabilities_teach_like_the_logits_behind_them() -> None:
    live, box = LiveTeacher(network(2)), LocalBlackBox(network(2), answers="probs", classes=C)
    methods = [ready(teacher=teacher)[0] for teacher in (live, box)]
    latents = [method.teacher_latents(method.answers) for method in methods]
    torch.testing.assert_close(*latents)
    torch.testing.assert_close(*[method.state_dict()["pool"] for method in methods])


@pytest.mark.parametrize("budget", [49, 50])
def test_a_plan_beyond_the_budget_asks_nothing(budget: int) -> None:
    teacher = LocalBlackBox(network(2), answers="probs", classes=C, budget=budget)
    rows = Rows()
    if budget < 50:
        with pytest.raises(BudgetError, match="at most 49 `queries`, the teacher's budget, got 50"):
            ready(teacher=teacher, rows=rows)
        assert (teacher.queries, rows.read) == (0, 0)
    else:
        ready(teacher=teacher, rows=rows)
        assert teacher.queries == 50


def test_a_budget_wants_a_number_of_queries() -> None:
    teacher = LocalBlackBox(network(2), answers="probs", classes=C, budget=10**9)
    with pytest.raises(BudgetError, match="a number of `queries` for a teacher with a budget"):
        ready(teacher=teacher, queries=None)


def test_new_images_at_every_step() -> None:
    teacher = Recorder(network(2))
    method, student, found = ready(teacher=teacher, queries=None)
    assert found["information_queries"] == 2 * 3 * 16  # 2 epochs of 3 batches of 16 images
    assert teacher.queries == 96 + 256
    assert "queries" not in found  # there is no end of them
    seen = len(teacher.seen)
    for _ in range(2):
        method.step(student, {"target": torch.zeros(9)}, None)
    first, second = teacher.seen[seen:]
    assert len(first) == len(second) == 9
    assert not torch.equal(first, second)


@pytest.mark.parametrize("queries", [50, None])
def test_at_least_two_images_a_step(queries: int | None) -> None:
    method, student, _ = ready(queries=queries)
    sizes = []
    student.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    method.step(student, {"target": torch.zeros(1)}, None)
    assert sizes == [2]


def test_noise_fills_the_range_of_the_data() -> None:
    method, *_ = ready(images="noise", queries=400)
    low, high = Rows().images.aminmax()
    assert low <= method.pool.min() < 3.05
    assert 4.95 < method.pool.max() <= high
    assert not hasattr(method, "generator")


def test_real_rows_are_told_apart() -> None:
    method, _, found = ready(images="real", queries=30)
    assert len(method.pool.flatten(1).unique(dim=0)) == 30
    assert all((Rows().images == image).flatten(1).all(1).any() for image in method.pool)
    assert "tau" in found


def test_made_images_keep_to_the_range_of_each_channel() -> None:
    rows = Rows(shape=(2, 8, 8))
    rows.images[:, 1] = 7.0  # nothing to see
    teacher = LiveTeacher(nn.Sequential(nn.Flatten(), nn.Linear(128, C)))
    student = nn.Sequential(nn.Flatten(), nn.Linear(128, C))
    method = MEKD(LogitMethod(KDLoss()), queries=50, gan_epochs=1, gan_width=4)
    method.build(student, teacher, {"input": rows.images[:2]}, rows.all)
    method.prepare(teacher, rows)
    images = method._images(method.pool)
    assert images[:, 0].min() >= 3
    assert images[:, 0].max() <= 5
    assert images[:, 1].min() >= 7
    assert method.samples.images.min() >= 0
    assert method.samples.images.max() <= 1


def test_a_constant_confidence_only_scales() -> None:
    odds = torch.randn(9, dtype=torch.float64, requires_grad=True)
    plain, weighted = fooling_loss(odds), information_loss(odds, torch.full_like(odds, 0.3))
    slopes = [torch.autograd.grad(loss, odds)[0] for loss in (plain, weighted)]
    torch.testing.assert_close(weighted, 0.3 * plain)
    torch.testing.assert_close(slopes[1], 0.3 * slopes[0])
    expected = -sum(0.3 * math.log(1 / (1 + math.exp(-x))) for x in odds.tolist()) / 9
    assert weighted.item() == pytest.approx(expected)


@pytest.mark.parametrize("shapes", [((4,), (4, 1)), ((4, 1), (4,)), ((4,), ())], ids=str)
def test_weights_and_odds_have_the_same_shape(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="as many weights as log-odds"):
        information_loss(*map(torch.zeros, shapes))


def test_the_information_term_looks_at_the_last_images_of_the_game() -> None:
    rows, steps = Rows(), []

    class Watch(Recorder):
        def signal(self, batch: Any) -> DenseSignal:
            steps.append(rows.read - 1)  # the first batch was read to find the range
            return super().signal(batch)

    teacher = Watch(network(2))
    ready(teacher=teacher, rows=rows, queries=60, information=0.4)
    assert [len(images) for images in teacher.seen] == [16, 8, 36]
    assert steps == [5, 6, 6]  # of 6, and then the pool
    weights = [
        ready(queries=60, information=0.4, alpha=alpha)[0].generator.body[-2].weight
        for alpha in (0.0, 0.5, 50.0)
    ]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_the_game_is_won_by_neither_on_data_that_is_easily_made() -> None:
    rows = Rows(64)
    rows.images = 3 + 2 * (torch.rand(64, 1, 1, 1) > 0.5).float().expand(64, *SHAPE)
    rows.images = (rows.images + 0.1 * torch.rand(64, *SHAPE)).clamp(3, 5)
    method, _, found = ready(rows=rows, queries=200, gan_epochs=40, gan_lr=2e-3, gan_width=8)
    brightness = method._images(method.pool).mean((1, 2, 3))
    assert (brightness < 3.5).float().mean() > 0.1
    assert (brightness > 4.5).float().mean() > 0.1
    assert 0 < found["discriminator_loss"] < 3
    assert 0 < found["generator_loss"] < 6


def test_preparation_repeats_with_the_seed_and_draws_are_its_own() -> None:
    pools = [ready()[0].state_dict() for _ in range(2)]
    assert pools[0].keys() == pools[1].keys()
    assert all(torch.equal(pools[0][name], pools[1][name]) for name in pools[0])


def test_what_was_learned_is_in_the_state() -> None:
    method, student, _ = ready()
    torch.manual_seed(4)
    expected = method.step(student, Rows().all, None)
    other = MEKD(LogitMethod(KDLoss()), queries=50, gan_epochs=2, gan_batch_size=16, gan_width=4)
    teacher = Recorder(network(2))
    other.build(student, teacher, {"input": Rows().images[:2]}, Rows().all)
    other.load_state_dict(method.state_dict())
    torch.manual_seed(4)
    torch.testing.assert_close(other.step(student, Rows().all, None), expected, rtol=0, atol=0)
    assert not teacher.seen


def test_a_trial_does_little() -> None:
    teacher, rows = Recorder(network(2)), Rows(trial=True)
    method, student, _ = ready(teacher=teacher, rows=rows, queries=10_000, gan_epochs=100)
    assert teacher.queries == 16
    assert rows.read == 2
    assert method.step(student, rows.all, None)["loss"].isfinite()


def test_a_trial_of_real_rows_does_with_the_first_ones() -> None:
    rows = Rows(1000, trial=True)
    method, student, _ = ready(rows=rows, images="real", queries=500)
    assert len(method.pool) == 8
    assert all((rows.images[:8] == image).flatten(1).all(1).any() for image in method.pool)
    assert method.step(student, rows.all, None)["loss"].isfinite()


def test_images_are_made_so_many_at_a_time() -> None:
    method, *_ = ready()
    sizes = []
    method.generator.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    assert len(method._images(torch.zeros(600, C))) == 600
    assert sizes == [256, 256, 88]


def test_a_loss_is_prepared_with_the_answers() -> None:
    method, student, found = ready(PLDLoss(teacher_temperature="auto"))
    assert found["teacher_temperature"] == pytest.approx(luce.suggest_temperature(method.answers))
    assert method.step(student, Rows().all, None)["loss"].isfinite()


def test_building_leaves_the_student_as_it_is() -> None:
    student, rows = models.build("resnet8", classes=C, input_shape=(1, 8, 8)), Rows()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    MEKD(LogitMethod(KDLoss())).build(student, LiveTeacher(network()), {"input": rows.images}, rows.all)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert student.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": 0}, "`queries`"),
        ({"queries": 1}, "at least 2 `queries`"),
        ({"queries": 2.5}, "`queries`"),
        ({"queries": True}, "`queries`"),
        ({"information": 1.0}, r"`information` in \[0, 1\)"),
        ({"information": -0.1}, "`information`"),
        ({"information": "all"}, "`information`"),
        ({"alpha": -1}, "`alpha`"),
        ({"images": "gan"}, "`images` to be one of 'generated', 'noise', 'real'"),
        ({"images": "noise", "image": 1.0}, "`image: 0` with `images: noise`"),
        ({"images": "real", "queries": None}, "a number of `queries` with real images"),
        ({"image": -1.0}, "`image`"),
        ({"tau": 0}, "`tau`"),
        ({"tau": "big"}, "`tau`"),
        ({"gain": math.inf}, "`gain`"),
        ({"gan_epochs": 0}, "`gan_epochs`"),
        ({"gan_batch_size": 1}, "`gan_batch_size`"),
        ({"gan_width": 1}, "`gan_width`"),
        ({"gan_lr": 0}, "`gan_lr`"),
        ({"loss": PLDLoss(teacher_temperature="auto"), "queries": None}, "prepared with the answers"),
        ({"loss": CrossEntropyLoss()}, "uses the teacher"),
        (
            {"loss": WeightedSum({"ce": (1.0, CrossEntropyLoss()), "kd": (1.0, KDLoss())})},
            r"no label.*\['ce'\]",
        ),
        ({"loss": luce.DKDLoss()}, "no label.*DKDLoss"),
        ({"loss": WeightedSum({"image": (1.0, KDLoss())})}, 'no term called "image"'),
    ],
    ids=str,
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    loss = options.pop("loss", KDLoss())
    with pytest.raises(ValueError, match=message):
        MEKD(LogitMethod(loss), **options)


def test_a_term_that_counts_nothing_may_want_labels() -> None:
    MEKD(LogitMethod(WeightedSum({"ce": (0.0, CrossEntropyLoss()), "kd": (1.0, KDLoss())})))


def test_features_of_a_black_box_are_not_to_be_had() -> None:
    method = FeatureMethod(KDLoss(), {"hint": (1.0, luce.FitNetLoss(), ["stages.0"], ["stages.0"])})
    with pytest.raises(TypeError, match="expected a LogitMethod for MEKD, got FeatureMethod"):
        MEKD(method)


def test_two_views_of_images_that_are_not_looked_at() -> None:
    with pytest.raises(UserError, match="one view of each batch for MEKD, which generates its inputs"):
        TwoViewMethod(MEKD(LogitMethod(KDLoss())))


@pytest.mark.parametrize(
    ("teacher", "images", "options", "message"),
    [
        (None, torch.rand(4, *SHAPE), {}, "add `teacher` to the recipe"),
        (CachedTeacher(torch.zeros(4, C)), torch.rand(4, *SHAPE), {}, "set `teacher.cache_outputs: false`"),
        (LiveTeacher(network()), torch.rand(4, 64), {}, r"expected images .* got inputs of shape \(64,\)"),
        (LiveTeacher(network()), torch.zeros(4, *SHAPE, dtype=torch.long), {}, "floating dtype.*int64"),
        (
            LiveTeacher(network()),
            torch.rand(4, *SHAPE),
            {"images": "real", "queries": 5},
            "at most 4 `queries`",
        ),
    ],
    ids=["no teacher", "remembered", "vectors", "integers", "too few rows"],
)
def test_networks_and_data_that_do_not_suit(
    teacher: Teacher | None, images: Tensor, options: dict[str, Any], message: str
) -> None:
    rows = {"input": images, "index": torch.arange(4), "target": torch.arange(4)}
    with pytest.raises(UserError, match=message):
        MEKD(LogitMethod(KDLoss()), **options).build(network(), teacher, rows, rows)


@pytest.mark.parametrize("what", ["rows", "answers", "game"])
def test_what_is_no_number_is_told(what: str) -> None:
    rows, teacher, options = Rows(), network(2), {"information": 0.0}
    if what == "rows":
        rows.images[3, 0, 0, 0] = torch.nan
    elif what == "answers":
        teacher.head.bias.data[0] = torch.nan
    else:
        options["gan_lr"] = 1e30
    messages = {
        "rows": "training images of finite numbers",
        "answers": "answers of finite",
        "game": "lower `gan_lr`",
    }
    with pytest.raises(UserError, match=messages[what]):
        ready(teacher=LiveTeacher(teacher), rows=rows, **options)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fails", [False, True])
def test_of_several_processes_the_first_one_asks(
    rank: int, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And all hear of its error, or the others would wait for ever."""
    sent: list[Any] = []

    def broadcast(found: list[Any]) -> None:
        if rank == 0:
            sent.extend(found)
        else:
            found[:] = [BudgetError("too much") if fails else torch.ones(2)]

    def compute() -> Tensor:
        assert rank == 0
        if fails:
            raise BudgetError("too much")
        return torch.ones(2)

    processes = {"is_initialized": lambda: True, "get_world_size": lambda: 2, "get_rank": lambda: rank}
    for name, answer in {**processes, "broadcast_object_list": broadcast}.items():
        monkeypatch.setattr(torch.distributed, name, answer)
    if fails:
        with pytest.raises(BudgetError, match="too much"):
            as_first(compute)
    else:
        assert torch.equal(as_first(compute), torch.ones(2))
    assert len(sent) == (rank == 0)
