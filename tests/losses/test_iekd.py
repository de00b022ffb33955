"""IE-KD: its two losses by hand and their laws; its split, coders, preparation, and who learns from what."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from luce import IEKDLoss, exploration_loss, inheritance_loss
from luce.losses import linear_cka
from luce.losses.modules.iekd import AutoEncoder, coder
from luce.methods import train_by_sgd

laws = settings(max_examples=20, deadline=None, derandomize=True)
both = pytest.mark.parametrize("function", [inheritance_loss, exploration_loss], ids=lambda f: f.__name__)
each_form = pytest.mark.parametrize("form", ["l1", "cosine"])

STUDENT, TEACHER = (6, 4, 4), (8, 4, 4)


@st.composite
def factors(draw: Any) -> tuple[Tensor, Tensor]:
    """Of both networks, in float64."""
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    random = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    s, t = (torch.randn(*shape, generator=random, dtype=torch.float64) for _ in range(2))
    return s, t


def built(shapes: tuple[Any, Any] = (STUDENT, TEACHER), seed: int = 0, **options: Any) -> IEKDLoss:
    torch.manual_seed(seed)
    loss = IEKDLoss(**options)
    loss.build(*([shape] for shape in shapes))
    return loss


def batch(
    shapes: tuple[Any, Any] = (STUDENT, TEACHER), rows: int = 5, seed: int = 1
) -> tuple[list[Tensor], list[Tensor]]:
    random = torch.Generator().manual_seed(seed)
    s, t = ([torch.randn(rows, *shape, generator=random)] for shape in shapes)
    return s, t


class TeacherFeatures:
    """What `prepare` is given; remembers how it was asked."""

    def __init__(self, maps: Tensor) -> None:
        self.maps = maps
        self.asked: list[dict[str, Any]] = []

    def __call__(self, batch_size: int = 256, epochs: int = 1, shuffle: bool = False) -> Any:
        self.asked.append({"batch_size": batch_size, "epochs": epochs, "shuffle": shuffle})
        order = torch.Generator().manual_seed(0)
        for _ in range(epochs):
            rows = len(self.maps)
            index = torch.randperm(rows, generator=order) if shuffle else torch.arange(rows)
            for some in index.split(batch_size):
                yield [self.maps[some]]


def structured(rows: int, shape: tuple[int, ...] = TEACHER, seed: int = 0) -> Tensor:
    """Maps that three numbers per row make, which a code can hold."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(shape[0], 3, generator=random)
    latent = torch.randn(rows, 3, generator=random)
    return (latent @ mix.T).relu()[:, :, None, None].expand(rows, *shape)


def prepared(seed: int = 0, **options: Any) -> IEKDLoss:
    loss = built(seed=seed, **{"epochs": 1, **options})
    loss.prepare(TeacherFeatures(structured(32)), train_by_sgd)
    return loss


# The two losses ---------------------------------------------------------------------------------------------


def test_the_numbers_of_the_smallest_factors() -> None:
    """(3, 4) and (4, 3) point to (0.6, 0.8) and (0.8, 0.6)."""
    s, t = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
    l1, cosine = (abs(0.6 - 0.8) + abs(0.8 - 0.6)) / 2, 0.6 * 0.8 + 0.8 * 0.6
    assert inheritance_loss(s, t).item() == pytest.approx(l1)
    assert exploration_loss(s, t).item() == pytest.approx(-l1)
    assert inheritance_loss(s, t, form="cosine").item() == pytest.approx(1 - cosine)
    assert exploration_loss(s, t, form="cosine").item() == pytest.approx(cosine)
    assert exploration_loss(-s, t, form="cosine").item() == pytest.approx(cosine)  # no aim of its own


@laws
@given(factors())
def test_against_plain_loops(pair: tuple[Tensor, Tensor]) -> None:
    s, t = pair
    l1, cosine, away = 0.0, 0.0, 0.0
    for one, other in zip(s.flatten(1).tolist(), t.flatten(1).tolist(), strict=True):
        a, b = ([x / math.sqrt(sum(y * y for y in row)) for x in row] for row in (one, other))
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        l1 += sum(abs(x - y) for x, y in zip(a, b, strict=True)) / s.numel()
        cosine, away = cosine + (1 - dot) / len(s), away + abs(dot) / len(s)
    assert inheritance_loss(s, t).item() == pytest.approx(l1)
    assert exploration_loss(s, t).item() == pytest.approx(-l1)
    assert inheritance_loss(s, t, form="cosine").item() == pytest.approx(cosine)
    assert exploration_loss(s, t, form="cosine").item() == pytest.approx(away)


@laws
@given(factors())
def test_bounds(pair: tuple[Tensor, Tensor]) -> None:
    s, t = pair
    bound = 2 / math.sqrt(s[0].numel())
    assert 0 <= inheritance_loss(s, t) <= bound + 1e-12
    assert -1e-12 <= inheritance_loss(s, t, form="cosine") <= 2 + 1e-12
    assert 0 <= exploration_loss(s, t, form="cosine") <= 1 + 1e-12
    alike = torch.ones_like(s)
    assert inheritance_loss(alike, -alike).item() == pytest.approx(bound)  # the bound is met


@each_form
@both
@laws
@given(pair=factors(), scale=st.floats(1e-3, 1e3))
def test_a_positive_factor_on_any_row_changes_nothing(
    function: Any, form: Any, pair: tuple[Tensor, Tensor], scale: float
) -> None:
    s, t = pair
    scaled = s.clone()
    scaled[0] *= scale
    expected = function(s, t, form=form)
    assert_close(function(scaled, t, form=form), expected)
    assert_close(function(s, scale * t, form=form), expected)


@each_form
@laws
@given(factors())
def test_inheritance_ends_where_the_directions_are_equal(form: Any, pair: tuple[Tensor, Tensor]) -> None:
    s, t = pair
    assert inheritance_loss(3 * t, t, form=form).item() == pytest.approx(0, abs=1e-12)
    if s[0].numel() > 1:
        assert inheritance_loss(s, t, form=form) > 1e-6


def test_exchanging_the_parts_and_the_signs_gives_the_same_total() -> None:
    a, b, t = (torch.randn(3, 4, 2, 2, dtype=torch.float64) for _ in range(3))
    total = inheritance_loss(a, t) + exploration_loss(b, t)
    assert_close(-(exploration_loss(a, t) + inheritance_loss(b, t)), total, rtol=1e-14, atol=0)


@each_form
@both
def test_a_step_on_the_loss_itself(function: Any, form: Any) -> None:
    """Inheritance draws the directions together, exploration drives them apart."""
    s, t = torch.rand(4, 10, dtype=torch.float64, requires_grad=True), torch.rand(4, 10, dtype=torch.float64)
    (slope,) = torch.autograd.grad(function(s, t, form=form), s)
    before, after = (F.cosine_similarity(x.detach(), t).mean() for x in (s, s - 0.1 * slope))
    assert (after > before).item() is (function is inheritance_loss)


@each_form
@both
def test_gradients_against_finite_differences(function: Any, form: Any) -> None:
    s, t = torch.randn(3, 2, 2, 2, dtype=torch.float64), torch.randn(3, 2, 2, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: function(s, t, form=form), s.requires_grad_())
    function(s, t.requires_grad_(), form=form).backward()
    assert t.grad is None


@each_form
@both
def test_a_row_of_zeros(function: Any, form: Any) -> None:
    s, t = torch.randn(3, 5), torch.randn(3, 5)
    s[1], t[2] = 0, 0
    value = function(s.requires_grad_(), t, form=form)
    (slope,) = torch.autograd.grad(value, s)
    assert value.isfinite()
    assert slope.isfinite().all()
    assert not slope[1].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@each_form
@both
def test_16_bits_are_calculated_in_float32(function: Any, form: Any, dtype: torch.dtype) -> None:
    s, t = torch.randn(4, 300).to(dtype), torch.randn(4, 300).to(dtype)
    value = function(s, t, form=form)
    assert value.dtype == torch.float32
    assert_close(value.double(), function(s.double(), t.double(), form=form), rtol=1e-5, atol=1e-6)


@each_form
@both
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_small_and_large_factors(function: Any, form: Any, scale: float) -> None:
    s, t = torch.randn(4, 6), torch.randn(4, 6)
    expected = function(s, t, form=form)
    assert_close(function(scale * s, scale * t, form=form), expected, rtol=1e-4, atol=1e-6)


@both
def test_factors_that_are_refused(function: Any) -> None:
    with pytest.raises(
        ValueError, match=r"`student_features` of shape \(2, 4\), got \(2, 3\); `luce.IEKDLoss`"
    ):
        function(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="`form` to be one of 'l1', 'cosine', got 'l2'"):
        function(torch.zeros(2, 3), torch.zeros(2, 3), form="l2")


# The split --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["natural", "random"])
@pytest.mark.parametrize("channels", [2, 3, 8, 9])
def test_both_parts_cover_all_channels_once(channels: int, split: str) -> None:
    loss = built(((channels, 4, 4), TEACHER), split=split)
    inheriting, exploring = loss.inheriting_channels.tolist(), loss.exploring_channels.tolist()
    assert sorted(inheriting + exploring) == list(range(channels))
    assert len(inheriting) == channels // 2
    assert loss.inheriting[1].in_channels == channels // 2
    assert loss.exploring[1].in_channels == channels - channels // 2
    if split == "natural":
        assert inheriting + exploring == list(range(channels))


def test_a_random_split_is_drawn_from_the_generator_and_changes_nothing_else() -> None:
    shapes = (16, 4, 4), TEACHER
    first, again, other = (built(shapes, seed, split="random") for seed in (0, 0, 1))
    assert torch.equal(first.inheriting_channels, again.inheriting_channels)
    assert not torch.equal(first.inheriting_channels, other.inheriting_channels)
    natural = built(shapes, 0)
    assert first.inheriting_channels.tolist() != natural.inheriting_channels.tolist()
    for one, two in zip(first.parameters(), natural.parameters(), strict=True):
        assert torch.equal(one, two)


def test_one_channel_cannot_be_split() -> None:
    with pytest.raises(ValueError, match=r"at least 2 channels.*got \(1, 4, 4\)"):
        built(((1, 4, 4), TEACHER))


# Coders and the forward pass --------------------------------------------------------------------------------


def second_coder(layers: Any, x: Tensor, *, training: bool) -> Tensor:
    """With the weights of a coder."""
    x = torch.where(x > 0, x, 0.1 * x)
    for convolution, norm in ((layers[1], layers[2]), (layers[4], layers[5]), (layers[7], layers[8])):
        x = F.conv2d(x, convolution.weight, padding=1)
        mean, variance = norm.running_mean, norm.running_var
        if training:
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        x = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        x = x * norm.weight[:, None, None] + norm.bias[:, None, None]
        x = torch.where(x > 0, x, 0.1 * x)
    return x


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("autoencoder", "form"), [("prepared", "l1"), ("online", "cosine")])
def test_the_loss_by_a_second_implementation(autoencoder: str, form: Any, training: bool) -> None:
    options = {"inheritance_weight": 3.0, "exploration_weight": 0.7, "split": "random", "form": form}
    loss = prepared(seed=3, autoencoder=autoencoder, **options).double().train(training)
    for module in loss.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # weights and biases that do something
            torch.nn.init.normal_(module.weight, 1.0, 0.3)
            torch.nn.init.normal_(module.bias, 0.0, 0.3)
    ((s,), (t,)) = ([x.double() for x in features] for features in batch())
    online = autoencoder == "online"
    code = second_coder(loss.of_teacher.encoder, t, training=training and online)
    restored = second_coder(loss.of_teacher.decoder, code, training=training and online)
    parts = s[:, loss.inheriting_channels], s[:, loss.exploring_channels]
    f_i = second_coder(loss.inheriting, parts[0], training=training)
    f_e = second_coder(loss.exploring, parts[1], training=training)
    expected = {
        "inheritance": inheritance_loss(f_i, code, form=form),
        "exploration": exploration_loss(f_e, code, form=form),
        "cka_inheritance": linear_cka(parts[0], t),
        "cka_exploration": linear_cka(parts[1], t),
    }
    expected["loss"] = 3.0 * expected["inheritance"] + 0.7 * expected["exploration"]
    if online:
        expected["reconstruction"] = (restored - t).abs().mean()
        expected["loss"] = expected["loss"] + expected["reconstruction"]
    found = loss([s.requires_grad_()], [t])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")
        assert found[name].shape == ()
    assert not found["cka_inheritance"].requires_grad
    assert not found["cka_exploration"].requires_grad


def test_a_coder_starts_as_in_the_authors_code() -> None:
    torch.manual_seed(0)
    layers = coder(24, 48)
    convolutions = [layer for layer in layers if isinstance(layer, torch.nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in convolutions] == [(24, 24), (24, 48), (48, 48)]
    for convolution in convolutions:
        expected = math.sqrt(2 / (9 * convolution.out_channels))
        assert convolution.weight.std().item() == pytest.approx(expected, rel=0.03)
        assert convolution.bias is None
    assert coder(24, 48)(torch.zeros(2, 24, 5, 3)).shape == (2, 48, 5, 3)


@pytest.mark.parametrize(("channels", "expected"), [(8, 4), (9, 4), (1, 1)])
def test_the_code_has_half_the_channels_of_the_teacher(channels: int, expected: int) -> None:
    for option, size in ((None, expected), (7, 7)):
        loss = built((STUDENT, (channels, 4, 4)), code_channels=option)
        last = [part[7].out_channels for part in (loss.of_teacher.encoder, loss.inheriting, loss.exploring)]
        assert last == [size] * 3
        assert loss.of_teacher.decoder[7].out_channels == channels


@pytest.mark.parametrize(
    ("student", "teacher"), [((6, 8, 2), (8, 4, 4)), ((6, 2, 2), (8, 4, 4)), ((6, 4, 4), (8, 2, 2))]
)
def test_the_larger_map_is_pooled_to_the_smaller(student: Any, teacher: Any) -> None:
    size = min(student[1], teacher[1]), min(student[2], teacher[2])
    shapes = student, teacher
    loss = built(shapes, autoencoder="online", inheritance_weight=2.0).eval()
    s, t = batch(shapes)
    pooled = [F.adaptive_avg_pool2d(s[0], size)], [F.adaptive_avg_pool2d(t[0], size)]
    found, expected = loss(s, t), loss(*pooled)
    for name in ("loss", "inheritance", "exploration", "reconstruction"):
        assert_close(found[name], expected[name])
    inheriting = s[0][:, :3]
    assert_close(found["cka_inheritance"], linear_cka(inheriting, t[0]))  # of the maps as they are


def test_the_auto_encoder_is_prepared_on_maps_of_the_size_it_will_see() -> None:
    maps = structured(20, (8, 4, 4))
    one, other = (built(((6, 2, 2), shape), epochs=2) for shape in ((8, 4, 4), (8, 2, 2)))
    found = one.prepare(TeacherFeatures(maps), train_by_sgd)
    expected = other.prepare(TeacherFeatures(F.adaptive_avg_pool2d(maps, 2)), train_by_sgd)
    assert found == expected
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


# Who learns from what ---------------------------------------------------------------------------------------


def test_weights_of_0_teach_the_student_nothing() -> None:
    loss, ((s,), (t,)) = prepared(inheritance_weight=0.0, exploration_weight=0.0), batch()
    terms = loss([s.requires_grad_()], [t])
    (slope,) = torch.autograd.grad(terms["loss"], s)
    assert terms["loss"] == 0
    assert not slope.any()
    assert terms["inheritance"] > 0 > terms["exploration"]


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)])
def test_each_loss_teaches_its_own_part(weights: tuple[float, float]) -> None:
    inheritance, exploration = weights
    loss = prepared(inheritance_weight=inheritance, exploration_weight=exploration, split="random")
    ((s,), (t,)) = batch()
    loss([s.requires_grad_()], [t])["loss"].backward()
    assert s.grad is not None
    assert s.grad[:, loss.inheriting_channels].any().item() is (inheritance > 0)
    assert s.grad[:, loss.exploring_channels].any().item() is (exploration > 0)


def test_nothing_moves_a_prepared_auto_encoder() -> None:
    """Not its gradient, nor weight decay, nor the statistics of the batches, whatever the mode."""
    loss, ((s,), (t,)) = prepared(), batch()
    before = copy.deepcopy(loss.of_teacher.state_dict())
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for mode in (True, False, True):
        loss.train(mode)
        optimizer.zero_grad()
        loss([s], [t.requires_grad_()])["loss"].backward()
        optimizer.step()
        assert not any(module.training for module in loss.of_teacher.modules())
        assert all(module.training is mode for module in loss.inheriting.modules())
    assert t.grad is None
    assert all(parameter.grad is None for parameter in loss.of_teacher.parameters())
    assert all(parameter.grad is not None for parameter in loss.inheriting.parameters())
    assert all(parameter.grad is not None for parameter in loss.exploring.parameters())
    for name, value in loss.of_teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_an_online_auto_encoder_learns_from_its_reconstruction_alone() -> None:
    loss, ((s,), (t,)) = built(autoencoder="online", inheritance_weight=9.0, exploration_weight=5.0), batch()
    parameters = list(loss.of_teacher.parameters())
    terms = loss([s.requires_grad_()], [t.requires_grad_()])
    found = torch.autograd.grad(terms["loss"], parameters, retain_graph=True)
    expected = torch.autograd.grad(terms["reconstruction"], parameters)
    assert all(torch.equal(a, b) and a.any() for a, b in zip(found, expected, strict=True))
    assert terms["inheritance"].requires_grad
    loss([s], [t])["loss"].backward()
    assert t.grad is None
    assert loss.of_teacher.training
    assert loss.train().of_teacher.training


@each_form
@pytest.mark.parametrize("part", ["inheritance", "exploration"])
def test_a_step_draws_one_part_near_and_drives_the_other_away(part: str, form: Any) -> None:
    """One step of gradient descent on the student's map, with the encoders as they are."""
    weights = {"inheritance_weight": 0.0, "exploration_weight": 0.0, f"{part}_weight": 1.0}
    loss, ((s,), (t,)) = prepared(form=form, **weights), batch(rows=16)

    def cosines(student: Tensor) -> Tensor:
        channels = loss.inheriting_channels if part == "inheritance" else loss.exploring_channels
        encoder = loss.inheriting if part == "inheritance" else loss.exploring
        with torch.no_grad():
            return F.cosine_similarity(
                encoder(student[:, channels]).flatten(1), loss.of_teacher.encode(t).flatten(1)
            ).mean()

    (slope,) = torch.autograd.grad(loss([s.requires_grad_()], [t])["loss"], s)
    s = s.detach()
    before, after = cosines(s), cosines(s - 0.1 * slope / slope.std())
    assert (after - before).item() * (1 if part == "inheritance" else -1) > 1e-3


# Preparation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reconstruction_form", ["l1", "l2"])
def test_preparing_teaches_the_auto_encoder_what_the_teacher_sees(reconstruction_form: str) -> None:
    maps, other = structured(512).split(256)
    source, loss = TeacherFeatures(maps), built(reconstruction_form=reconstruction_form)
    power = 1 if reconstruction_form == "l1" else 2

    def error(network: AutoEncoder, x: Tensor) -> float:
        """Relative to zeros."""
        with torch.no_grad():
            return ((network(x) - x).abs() ** power).sum().item() / (x.abs() ** power).sum().item()

    fresh = copy.deepcopy(loss.of_teacher)
    fresh.freeze(False)  # and so with the statistics of the maps it sees
    untrained = error(fresh, other)
    found = loss.prepare(source, train_by_sgd)
    assert source.asked[0] == {"batch_size": 128, "epochs": 30, "shuffle": True}
    assert source.asked[1:] == [{"batch_size": 128, "epochs": 1, "shuffle": False}]
    assert found["relative_reconstruction"] == pytest.approx(error(loss.of_teacher, maps))
    mean = ((loss.of_teacher(maps) - maps).abs() ** power).mean().item()
    assert found["reconstruction"] == pytest.approx(mean)
    assert error(loss.of_teacher, other) < 0.5 * untrained  # of maps it has not seen


def test_preparing_is_descent_with_nesterov_momentum_and_weight_decay() -> None:
    maps, loss = structured(300).double(), built(epochs=2, lr=0.03).double()
    network = copy.deepcopy(loss.of_teacher)
    network.freeze(False)
    velocity = [torch.zeros_like(parameter) for parameter in network.parameters()]
    source = TeacherFeatures(maps)
    for (x,) in source(128, epochs=2, shuffle=True):
        error = (network(x) - x).abs().mean()
        slopes = torch.autograd.grad(error, list(network.parameters()))
        with torch.no_grad():
            for parameter, slope, v in zip(network.parameters(), slopes, velocity, strict=True):
                slope = slope + 5e-4 * parameter
                v.mul_(0.9).add_(slope)
                parameter -= 0.03 * (slope + 0.9 * v)
    loss.prepare(source, train_by_sgd)
    assert_close(loss.of_teacher.state_dict(), network.state_dict())


def test_preparing_leaves_the_rest_and_the_generator_alone() -> None:
    loss = built(epochs=2)
    before, state = copy.deepcopy(loss.state_dict()), torch.get_rng_state()
    maps = structured(32)
    with torch.no_grad():  # whoever calls it
        loss.prepare(TeacherFeatures(maps.requires_grad_()), train_by_sgd)
    assert maps.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in loss.state_dict().items():
        if name != "prepared" and not name.endswith("num_batches_tracked"):
            moved = name.startswith("of_teacher")
            assert torch.equal(value, before[name]) is not moved, name
    assert not any(parameter.requires_grad for parameter in loss.of_teacher.parameters())
    assert not any(module.training for module in loss.of_teacher.modules())


def test_training_without_preparation_is_refused() -> None:
    loss = built()
    with pytest.raises(RuntimeError, match=r"IEKDLoss\.prepare.*before the first batch.*'online'"):
        loss(*batch())
    loss.eval()(*batch())
    with pytest.raises(RuntimeError, match=r"IEKDLoss\.build"):
        IEKDLoss().prepare(TeacherFeatures(structured(4)), train_by_sgd)
    online = built(autoencoder="online")
    assert not online.needs_preparation
    assert loss.needs_preparation
    assert online.prepare(TeacherFeatures(structured(4)), train_by_sgd) == {}
    assert online(*batch())["loss"].requires_grad


def test_what_was_prepared_and_split_is_saved_and_restored() -> None:
    loss, fresh = prepared(split="random"), built(seed=1, epochs=1, split="random")
    assert not torch.equal(loss.inheriting_channels, fresh.inheriting_channels)
    state = copy.deepcopy(loss.state_dict())
    expected = loss(*batch())
    fresh.load_state_dict(state)
    found = fresh(*batch())  # no preparation
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    unprepared = built(split="random")
    with pytest.raises(RuntimeError, match=r'Missing key.*"prepared"'):
        fresh.load_state_dict(unprepared.state_dict())
    other = built(split="random")
    other.load_state_dict(unprepared.state_dict())
    with pytest.raises(RuntimeError, match="prepare"):
        other(*batch())


def test_a_preparation_that_fails_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"finite error of the prepared auto-encoder.*got nan; lower `lr`"):
        built(epochs=1).prepare(TeacherFeatures(torch.full((4, *TEACHER), torch.nan)), train_by_sgd)


def test_a_teacher_that_is_silent_can_be_prepared() -> None:
    loss = built(epochs=1)
    found = loss.prepare(TeacherFeatures(torch.zeros(4, *TEACHER)), train_by_sgd)
    assert found == {"reconstruction": 0.0, "relative_reconstruction": 0.0}
    (s,), _ = batch(rows=4)
    terms = loss([s.requires_grad_()], [torch.zeros(4, *TEACHER)])
    terms["loss"].backward()
    assert s.grad is not None
    assert s.grad.isfinite().all()


# Batches and options ----------------------------------------------------------------------------------------


def test_a_single_value_per_channel_cannot_be_normalised() -> None:
    shapes = (6, 1, 1), (8, 1, 1)
    loss = built(shapes, autoencoder="online")
    message = r"more than one value per channel.*a single row; choose a batch size"
    with pytest.raises(ValueError, match=message):
        loss(*batch(shapes, rows=1))
    assert loss(*batch(shapes, rows=2))["loss"].isfinite()
    assert loss.eval()(*batch(shapes, rows=1))["loss"].isfinite()
    with pytest.raises(ValueError, match=message):
        built(shapes, epochs=1).prepare(TeacherFeatures(torch.rand(129, 8, 1, 1)), train_by_sgd)
    pooled = (6, 1, 1), (8, 4, 4)
    with pytest.raises(ValueError, match=message):
        built(pooled, autoencoder="online")(*batch(pooled, rows=1))


@pytest.mark.parametrize(
    ("option", "wrong"),
    [
        ("inheritance_weight", -1.0),
        ("exploration_weight", math.nan),
        ("form", "l2"),
        ("split", "half"),
        ("code_channels", 0),
        ("code_channels", 2.5),
        ("autoencoder", "frozen"),
        ("reconstruction_form", "l3"),
        ("epochs", 0),
        ("lr", 0.0),
    ],
)
def test_options_that_are_refused(option: str, wrong: Any) -> None:
    with pytest.raises(ValueError, match=f"`{option}`") as caught:
        IEKDLoss(**{option: wrong})
    assert repr(wrong) in str(caught.value)
