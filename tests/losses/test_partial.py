"""What a partial target keeps, where the relation of the classes comes from, and KD's three parts."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import luce
from luce.errors import UserError
from luce.losses import class_relations, partial_target, weight_similarity
from luce.losses.functional import partial
from luce.losses.functional.partial import KEEPS, RELATED

from . import formulas, test_battery
from .catalogue import IGNORED, LOSSES, UNLABELLED, Case, batch

inf, nan = math.inf, math.nan
laws = settings(max_examples=25, deadline=None, derandomize=True)
LOGIT = st.integers(-40, 40).map(lambda i: i / 8)


def even_share(mass, weights, places):
    """Spread a mass over some places by their weights, evenly if these are all 0."""
    total = math.fsum(weights[c] for c in places)
    return {c: mass * (weights[c] / total if total else 1 / len(places)) for c in places}


def expected_target(t, y, keep, temperature=1.0, relation=None, label_smoothing=0.1, top_k=None, first=False):
    """The table of the docstring for one row of Python floats, method by method."""
    rho, classes = formulas.softmax(t, temperature), len(t)
    others = [c for c in range(classes) if c != y]
    if keep == "uniform":
        return [label_smoothing / classes + (1 - label_smoothing) * (c == y) for c in range(classes)]
    if keep in ("class_mean", "weight_sim"):
        found = even_share(1.0, relation[y], range(classes))
    elif keep == "topk":
        count = top_k if isinstance(top_k, int) else max(1, round(top_k * classes))
        order = sorted(range(classes), key=lambda c: (not (first and c == y), -t[c], c))
        rest = sorted(order[count:])
        found = {c: rho[c] for c in order[:count]}
        found |= even_share(math.fsum(rho[c] for c in rest), [1.0] * classes, rest) if rest else {}
    else:
        weights = [1.0] * classes if keep == "true_prob" else relation[y]
        found = {y: rho[y], **even_share(math.fsum(rho[c] for c in others), weights, others)}
    return [found[c] for c in range(classes)]


@st.composite
def questions(draw):
    """Logits of a student and a teacher, a label, and everything that a target may ask for."""
    classes = draw(st.integers(2, 6))
    rows = st.lists(LOGIT, min_size=classes, max_size=classes)
    share = st.sampled_from([0.0, 0.0, 0.1, 1.0, 7.0])
    keep = draw(st.sampled_from(KEEPS))
    options = {"keep": keep, "temperature": draw(st.sampled_from([0.5, 1.0, 4.0]))}
    if keep == "uniform":
        options["label_smoothing"] = draw(st.sampled_from([0.0, 0.1, 0.9]))
    if keep == "topk":
        options["top_k"] = draw(st.integers(1, 7) | st.sampled_from([0.01, 0.3, 0.5, 1.0]))
        options["always_keep_true"] = draw(st.booleans())
    if keep in RELATED:
        row = st.lists(share, min_size=classes, max_size=classes)
        options["relation"] = draw(st.lists(row, min_size=classes, max_size=classes))
    return draw(rows), draw(rows), draw(st.integers(0, classes - 1)), options


def as_tensors(s, t, y, options):
    relation = options.get("relation")
    if relation is not None:
        options = {**options, "relation": torch.tensor(relation, dtype=torch.float64)}
    return torch.tensor([s, s]).double(), torch.tensor([t, t]).double(), torch.tensor([y, y]), options


def slope(loss, student, *others, **options):
    student = student.clone().requires_grad_()
    return torch.autograd.grad(loss(student, *others, **options).sum(), student)[0]


# Targets


@settings(laws, max_examples=100)
@given(questions())
def test_a_target_is_its_formula_and_the_loss_its_divergence(question):
    s, t, y, options = question
    plain = {"first" if name == "always_keep_true" else name: value for name, value in options.items()}
    expected = expected_target(t, y, **plain)
    student, teacher, target, options = as_tensors(*question)
    found = partial_target(teacher, target, **options)
    assert found[1].tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert (found >= 0).all()
    assert_close(found.sum(-1), torch.ones(2, dtype=torch.float64))
    temperature = options["temperature"]
    log_q = formulas.log_softmax(s, temperature)
    kl = math.fsum(a * (math.log(a) - b) for a, b in zip(expected, log_q, strict=True) if a)
    value = luce.partial_kd_loss(student, teacher, target, **options)
    assert value.item() == pytest.approx(temperature**2 * kl, rel=1e-9, abs=1e-12)
    q = (student / temperature).softmax(-1)
    gradient = slope(luce.partial_kd_loss, student, teacher, target, **options, reduction="sum")
    assert_close(gradient, temperature * (q - found), rtol=1e-9, atol=1e-12)
    assert_close(gradient.sum(-1), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    itself = luce.partial_kd_loss(temperature * found.log(), teacher, target, **options)
    assert itself.item() == pytest.approx(0, abs=1e-12)  # a student that says the target has nothing to learn


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_what_keeps_everything_is_kd(temperature):
    student, teacher, target = batch(6)
    expected = luce.kd_loss(student, teacher, temperature=temperature)
    rho = (teacher / temperature).softmax(-1)
    for top_k in (5, 4, 99, 1.0):  # of five classes; with one left, there is nothing to spread
        options = {"keep": "topk", "top_k": top_k, "temperature": temperature}
        assert_close(partial_target(teacher, target, **options), rho)
        assert_close(luce.partial_kd_loss(student, teacher, target, **options), expected)


def test_the_largest_one_alone_is_the_true_probability_where_the_teacher_is_right():
    _, teacher, target = batch(30)
    right = teacher.argmax(-1) == target
    assert 0 < right.sum() < 30
    expected = partial_target(teacher, target)
    one = partial_target(teacher, target, keep="topk", top_k=1)
    assert_close(one[right], expected[right])
    assert (one[~right] != expected[~right]).any(-1).all()
    always = partial_target(teacher, target, keep="topk", top_k=1, always_keep_true=True)
    assert_close(always, expected)


@pytest.mark.parametrize(("fraction", "count"), [(0.01, 1), (0.3, 2), (0.35, 2), (0.59, 3), (1.0, 5)])
def test_a_fraction_of_the_classes(fraction, count):
    """Rounded, but at least one; of the classes that exist."""
    _, teacher, target = batch(6)
    for logits in (teacher, torch.cat([teacher, torch.full((6, 5), -inf)], dim=-1)):
        expected = partial_target(logits, target, keep="topk", top_k=count)
        assert_close(partial_target(logits, target, keep="topk", top_k=fraction), expected)


def test_of_many_equal_logits_the_first_are_kept():
    kept = partial._largest(torch.zeros(1, 500), torch.ones(1, 500) > 0, torch.zeros(1, 500) > 0, 40)
    assert kept[0].nonzero().flatten().tolist() == list(range(40))


def test_of_equal_logits_the_first_are_kept():
    teacher = torch.tensor([[1.0, 2.0, 1.0, 0.0, 1.0]])
    rho = teacher.softmax(-1)[0]
    for label, always, kept in ((3, False, [0, 1]), (4, True, [1, 4]), (1, True, [0, 1])):
        target = partial_target(
            teacher, torch.tensor([label]), keep="topk", top_k=2, always_keep_true=always
        )[0]
        same = (target == rho).nonzero().flatten().tolist()
        assert [c for c in same if c in kept] == kept
        rest = [c for c in range(5) if c not in kept]
        assert_close(target[rest], rho[rest].mean().expand(3))


@laws
@given(questions())
def test_a_teacher_rescales_the_gradient_of_the_label_and_of_all_others_alike(question):
    """Total gradient over that of cross-entropy: one number for the label and for the sum of the others.

    For a given student the teacher's probability of the label settles it, so that every target which keeps
    that leaves the number as full KD has it.
    """
    student, teacher, target, options = as_tensors(*question)
    y, temperature, weight = int(target[0]), options["temperature"], 0.9
    task = slope(luce.cross_entropy_loss, student, target, reduction="sum")[0]

    def total(loss, **more):
        kd = slope(loss, student, teacher, target, temperature=temperature, reduction="sum", **more)[0]
        return (1 - weight) * task + weight * kd

    rest = torch.arange(len(task)) != y
    full = total(luce.kd_loss)
    q = (student / temperature).softmax(-1)[0, y]
    rho = (teacher / temperature).softmax(-1)[0, y]
    p = student.softmax(-1)[0, y]
    w = (1 - weight) + weight * temperature * (rho - q) / (1 - p)
    assert_close(full[y], w * task[y], rtol=1e-6, atol=1e-12)
    part = total(luce.partial_kd_loss, **{name: x for name, x in options.items() if name != "temperature"})
    assert_close(part[rest].sum(), -part[y], rtol=1e-6, atol=1e-12)
    if options["keep"].startswith("true_prob"):
        assert_close(part[y], full[y], rtol=1e-6, atol=1e-12)


def test_a_uniform_teacher_is_label_smoothing():
    student, _, target = batch(6)
    share = 0.3
    even = torch.zeros_like(student)
    expected = slope(luce.cross_entropy_loss, student, target, label_smoothing=share)
    mixed = (1 - share) * slope(luce.cross_entropy_loss, student, target)
    assert_close(mixed + share * slope(luce.kd_loss, student, even), expected)
    # And so is the target that keeps nothing but the label, whatever the teacher says.
    uniform = slope(
        luce.partial_kd_loss,
        student,
        torch.randn_like(student),
        target,
        keep="uniform",
        label_smoothing=share,
    )
    assert_close(uniform, expected)


def test_targets_come_in_the_shape_of_the_logits():
    _, teacher, target = batch(2, 3)
    target[0, 1], target[1, 2] = UNLABELLED, IGNORED
    flat = partial_target(teacher.flatten(0, 1), target.flatten())
    assert_close(flat.sum(-1), (target >= 0).flatten().double())
    last = partial_target(teacher, target, class_dim=-1)
    assert_close(last, flat.reshape(2, 3, 5))
    assert_close(partial_target(teacher.movedim(-1, 1), target), last.movedim(-1, 1))
    assert_close(partial_target(teacher[0, 0], target[0, 0]), last[0, 0])
    assert partial_target(teacher.bfloat16(), target, class_dim=-1).dtype == torch.float32
    options = {"keep": "class_mean", "relation": RELATION.clone().requires_grad_(), "class_dim": -1}
    assert not partial_target(teacher.requires_grad_(), target, **options).requires_grad


def test_what_is_known_of_a_class_does_not_reach_rows_without_a_label():
    _, teacher, target = batch(3)
    target[:] = torch.tensor([1, UNLABELLED, 2])
    relation = RELATION.clone()
    relation[0] = nan
    found = partial_target(teacher, target, keep="class_mean", relation=relation)
    assert_close(found.sum(-1), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))


def test_classes_that_do_not_exist_get_nothing():
    _, teacher, target = batch(4)
    relation = torch.rand(5, 5, dtype=torch.float64)
    places = [1, 3, 4, 7, 8]
    wide = torch.full((4, 9), -inf, dtype=torch.float64)
    wide[:, places] = teacher
    wide_relation = torch.rand(9, 9, dtype=torch.float64)
    wide_relation[torch.tensor(places)[:, None], torch.tensor(places)] = relation
    for keep in KEEPS:
        options = {"keep": keep, "top_k": 0.4}
        narrow = partial_target(teacher, target, relation=relation, **options)
        labels = torch.tensor(places)[target]
        found = partial_target(wide, labels, relation=wide_relation, **options)
        assert_close(found[:, places], narrow)
        assert_close(found.sum(), narrow.sum())


@pytest.mark.parametrize("relation", [None, [[1.0, 0.0], [0.0, 1.0]]], ids=["none", "list"])
@pytest.mark.parametrize("keep", RELATED)
def test_a_missing_relation(keep, relation):
    student, teacher, target = batch(2)
    with pytest.raises(TypeError, match=r"`relation` to be .*`luce.losses.class_relations`"):
        luce.partial_kd_loss(student, teacher, target, keep=keep, relation=relation)


def test_a_relation_of_other_classes():
    student, teacher, target = batch(2)
    with pytest.raises(ValueError, match=r"`relation` of shape \(5, 5\), .* got \(4, 4\)"):
        luce.partial_kd_loss(student, teacher, target, keep="class_mean", relation=torch.eye(4))


@pytest.mark.parametrize("keep", RELATED)
def test_a_negative_relation(keep):
    student, teacher, target = batch(2)
    target[:] = torch.tensor([1, UNLABELLED])
    relation = RELATION.clone()
    relation[1, 3] = -0.25
    options = {"keep": keep, "relation": relation}
    for call in (
        lambda: luce.partial_kd_loss(student, teacher, target, **options),
        lambda: partial_target(teacher, target, **options),
    ):
        with pytest.raises(ValueError, match=r"`relation` of numbers of at least 0, got -0.25"):
            call()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(student, teacher, target):
        return luce.partial_kd_loss(student, teacher, target, **options, reduction="none")

    assert loss(student, teacher, target).isnan().tolist() == [True, False]


def test_topk_needs_a_number():
    with pytest.raises(ValueError, match=r"`top_k` .* got None"):
        luce.PartialKDLoss(keep="topk")


def test_errors_about_the_teacher_of_a_target_name_it():
    with pytest.raises(TypeError, match="`teacher_logits` of a floating dtype"):
        partial_target(torch.ones(2, 3, dtype=torch.long), torch.zeros(2, dtype=torch.long))


# The battery over targets that need a relation, which modules have only once they are prepared


RELATION = torch.rand(5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
(PARTIAL,) = (loss for loss in LOSSES if loss.function is luce.partial_kd_loss)
RELATED_CASES = [Case(PARTIAL, {"keep": keep, "relation": RELATION, "temperature": 2.0}) for keep in RELATED]


@pytest.mark.parametrize("related", RELATED_CASES, ids=lambda case: case.options["keep"])
@pytest.mark.parametrize(
    "law",
    [
        test_battery.test_a_single_row,
        test_battery.test_an_empty_batch,
        test_battery.test_strided_expanded_and_channels_last_inputs,
        test_battery.test_inputs_are_left_alone,
        test_battery.test_reductions,
        test_battery.test_weighted_reductions,
        test_battery.test_micro_batches_weighted_by_their_rows_are_one_batch,
        test_battery.test_weight_zero_is_deleting,
        test_battery.test_unlabelled_rows,
        test_battery.test_labels_matter_where_they_should,
        test_battery.test_only_the_student_gets_a_gradient,
    ],
    ids=lambda law: law.__name__.removeprefix("test_"),
)
def test_the_battery(law, related):
    law(related)


@pytest.mark.parametrize("related", RELATED_CASES, ids=lambda case: case.options["keep"])
def test_the_battery_of_marks_and_dtypes(related):
    test_battery.test_ignoring_is_deleting(related)
    test_battery.test_dtypes_agree_with_float64_on_the_same_numbers(related)
    test_battery.test_what_stands_in_an_ignored_row_does_not_matter(related)


@pytest.mark.parametrize(
    "keep",
    [pytest.param(keep, marks=() if keep == "class_mean" else pytest.mark.slow) for keep in RELATED],
)
def test_a_relation_under_compile(keep):
    student, teacher, target = batch(6)
    target[0], target[1] = IGNORED, UNLABELLED
    loss = luce.PartialKDLoss(keep=keep)
    loss.relation = RELATION
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_close(compiled(student, teacher, target), loss(student, teacher, target))
    assert_close(slope(compiled, student, teacher, target), slope(loss, student, teacher, target))
    target[2] = 99  # where asking would stall: NaN, and no index out of range
    assert compiled(student, teacher, target).isnan()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def targets(logits, labels):
        return partial_target(logits, labels, keep=keep, relation=RELATION)

    assert targets(teacher, target).isnan().all(-1).tolist() == [False, False, True, False, False, False]


def test_nan_in_a_relation_is_not_hidden():
    student, teacher, target = batch(3)
    target[:] = torch.tensor([0, 1, 2])
    relation = RELATION.clone()
    relation[1, 3] = nan
    for keep in RELATED:
        values = luce.partial_kd_loss(
            student, teacher, target, keep=keep, relation=relation, reduction="none"
        )
        assert values.isnan().tolist() == [False, True, False]


# Relations


def test_class_relations_are_the_means_of_the_rows_of_each_class():
    _, teacher, target = batch(40)
    target[target == 3], target[0], target[1] = 2, UNLABELLED, IGNORED
    for temperature in (1.0, 2.5):
        found = class_relations(teacher, target, temperature=temperature)
        for label in range(5):
            rows = [formulas.softmax(t.tolist(), temperature) for t in teacher[target == label]]
            mean = (
                [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)] if rows else [0.0] * 5
            )
            assert found[label].tolist() == pytest.approx(mean, rel=1e-12)
        shuffled = torch.randperm(40)
        assert_close(class_relations(teacher[shuffled], target[shuffled], temperature=temperature), found)


def test_class_relations_of_many_rows_are_summed_piece_by_piece(monkeypatch):
    _, teacher, target = batch(23)
    whole = class_relations(teacher, target)
    for numbers in (1, 15, 40):
        monkeypatch.setattr(partial, "CHUNK", numbers)
        assert_close(class_relations(teacher, target), whole)


def test_class_relations_are_summed_in_float64():
    rows = 200_000
    teacher = torch.tensor([[math.log(0.7), math.log(0.3)]]).expand(rows, -1)
    found = class_relations(teacher, torch.zeros(rows, dtype=torch.long))
    assert found.dtype == torch.float32
    assert_close(found[0], torch.tensor([0.7, 0.3]), rtol=2e-7, atol=0)
    assert class_relations(teacher[:2].bfloat16(), torch.tensor([0, 1])).dtype == torch.float32
    assert class_relations(teacher[:2].double(), torch.tensor([0, 1])).dtype == torch.float64


def test_a_class_without_rows_relates_to_all_others_alike():
    _, teacher, target = batch(8)
    target[:] = 1
    relation = class_relations(teacher, target)
    assert (relation[2] == 0).all()
    target[:] = 2
    even = partial_target(teacher, target, keep="class_mean", relation=relation)
    assert_close(even, torch.full_like(even, 0.2))
    found = partial_target(teacher, target, keep="true_prob+class_mean", relation=relation)
    assert_close(found, partial_target(teacher, target))
    assert not class_relations(teacher[:0], target[:0]).any()


def test_class_relations_of_a_sure_teacher_leave_nothing_to_others():
    """And then what it does leave is spread evenly, instead of dividing by 0."""
    teacher = 1e4 * torch.eye(3)
    relation = class_relations(teacher, torch.arange(3))
    assert_close(relation, torch.eye(3))
    unsure = torch.tensor([[1.0, 2.0, 3.0]])
    target = partial_target(unsure, torch.tensor([1]), keep="true_prob+class_mean", relation=relation)
    assert_close(target, partial_target(unsure, torch.tensor([1])))


@pytest.mark.parametrize(
    ("logits", "target", "error", "match"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 4).long(), ValueError, r"shape \(N, C\), got \(2, 3, 4\)"),
        (torch.zeros(2, 3), torch.zeros(3).long(), ValueError, r"`target` of shape \(2,\)"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), ValueError, r"labels in \[0, 3\).*got 3"),
        (torch.zeros(2, 3), torch.zeros(2), TypeError, "integer dtype"),
        (torch.zeros(2, 3).long(), torch.zeros(2).long(), TypeError, "floating dtype"),
    ],
    ids=["three dimensions", "lengths", "label", "target dtype", "logits dtype"],
)
def test_class_relations_refuse(logits, target, error, match):
    with pytest.raises(error, match=match):
        class_relations(logits, target)


def test_weight_similarity():
    weight = torch.tensor([[2.0, 0.0], [0.0, 0.5], [-3.0, 3.0]], dtype=torch.float64)
    half = math.sqrt(0.5)
    cosines = [[1.0, 0.0, -half], [0.0, 1.0, half], [-half, half, 1.0]]
    for alpha in (0.0, 1.0, 3.0):
        expected = [formulas.softmax([alpha * x for x in row]) for row in cosines]
        found = weight_similarity(weight, alpha=alpha)
        assert_close(found, torch.tensor(expected, dtype=torch.float64))
        # The power of the plain similarity, normalised again.
        power = weight_similarity(weight) ** alpha
        assert_close(found, power / power.sum(-1, keepdim=True))
        assert_close(found, weight_similarity(weight * torch.tensor([[5.0], [1.0], [0.1]]), alpha=alpha))
    nothing = weight_similarity(torch.zeros(2, 3))
    assert_close(nothing, torch.full((2, 2), 0.5))
    assert weight_similarity(weight.half()).dtype == torch.float32
    assert not weight_similarity(weight.requires_grad_()).requires_grad


@pytest.mark.parametrize(
    ("weight", "alpha", "match"),
    [(torch.zeros(3), 1.0, r"shape \(C, D\), got \(3,\)"), (torch.zeros(3, 2), -1.0, "`alpha`")],
)
def test_weight_similarity_refuses(weight, alpha, match):
    with pytest.raises(ValueError, match=match):
        weight_similarity(weight, alpha=alpha)


# Modules


def test_a_module_learns_the_class_means():
    student, teacher, target = batch(30)
    for keep in ("class_mean", "true_prob+class_mean"):
        loss = luce.PartialKDLoss(keep=keep, temperature=2.0, ignore_index=4, unlabelled_index=-7)
        assert loss.needs_preparation
        assert not loss.state_dict()
        with pytest.raises(RuntimeError, match=rf"`prepare\(teacher_logits, target\)`.*{keep[-10:]}"):
            loss(student, teacher, target)
        target[0] = -7
        assert loss.prepare(teacher, target) == {}
        kept = (target != 4) & (target != -7)
        relation = class_relations(teacher[kept], target[kept], temperature=2.0)
        assert_close(loss.relation, relation)
        options = {"keep": keep, "temperature": 2.0, "ignore_index": 4, "unlabelled_index": -7}
        expected = luce.partial_kd_loss(student, teacher, target, relation=relation, **options)
        assert_close(loss(student, teacher, target), expected)


def test_preparing_again_forgets_the_teacher_before():
    _, teacher, target = batch(30)
    loss = luce.PartialKDLoss(keep="class_mean")
    loss.prepare(torch.zeros_like(teacher), target)
    loss.prepare(teacher, target)
    assert_close(loss.relation, class_relations(teacher, target))


def test_a_module_uses_the_weight_of_the_teacher_s_last_layer():
    student, teacher, target = batch(6)
    weight = torch.randn(5, 7, dtype=torch.float64)
    for keep in ("weight_sim", "true_prob+weight_sim"):
        loss = luce.PartialKDLoss(keep=keep)
        assert loss.needs_preparation
        with pytest.raises(RuntimeError, match=r"`use_weight\(weight\)` to be called before the first batch"):
            loss(student, teacher, target)
        with pytest.raises(UserError, match=r"`use_weight\(weight\)` before training .* use `class_mean`"):
            loss.prepare(teacher, target)
        loss.use_weight(weight, alpha=2.0)
        assert not loss.needs_preparation
        loss.prepare(teacher, target)  # says nothing about it
        expected = luce.partial_kd_loss(
            student, teacher, target, keep=keep, relation=weight_similarity(weight, alpha=2.0)
        )
        assert_close(loss(student, teacher, target), expected)
    with pytest.raises(ValueError, match="`keep` with `weight_sim`"):
        luce.PartialKDLoss().use_weight(weight)


def test_what_needs_no_relation_wants_no_preparation():
    for options in ({}, {"keep": "uniform"}, {"keep": "topk", "top_k": 3}):
        loss = luce.PartialKDLoss(**options)
        assert not loss.needs_preparation
        assert loss.prepare(torch.zeros(2, 5), torch.zeros(2).long()) == {}
        assert loss.relation is None


def test_a_relation_is_saved_and_copied_with_its_module():
    student, teacher, target = batch(30)
    loss = luce.PartialKDLoss(keep="class_mean")
    loss.prepare(teacher, target)
    expected = loss(student, teacher, target)
    fresh, used = luce.PartialKDLoss(keep="class_mean"), luce.PartialKDLoss(keep="class_mean")
    used.prepare(torch.zeros_like(teacher), target)
    for other in (fresh, used):
        other.load_state_dict(loss.state_dict())
        assert_close(other(student, teacher, target), expected, rtol=0, atol=0)
    assert fresh.relation.data_ptr() != loss.relation.data_ptr()
    assert_close(copy.deepcopy(loss)(student, teacher, target), expected, rtol=0, atol=0)
    whole = luce.WeightedSum({"kd": (1.0, luce.PartialKDLoss(keep="class_mean"))})
    whole.load_state_dict(luce.WeightedSum({"kd": (1.0, loss)}).state_dict())
    assert_close(whole(student, teacher, target)["kd"], expected, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="size mismatch"):
        used.load_state_dict({"relation": torch.eye(4)})


def test_a_sum_prepares_its_terms():
    student, teacher, target = batch(30)
    loss = luce.WeightedSum(
        {"kd": (1.0, luce.PartialKDLoss(keep="class_mean")), "task": (1.0, luce.KDLoss())}
    )
    assert loss.needs_preparation
    loss.prepare(teacher, target)
    assert loss(student, teacher, target)["kd"].isfinite()


# KD in three parts


@laws
@given(questions())
def test_the_parts_of_kd_add_up_to_it(question):
    student, teacher, target, options = as_tensors(*question)
    options = {"temperature": options["temperature"]}
    p = (teacher / options["temperature"]).softmax(-1)
    entropy = options["temperature"] ** 2 * -(p * p.log()).sum(-1).mean()
    whole = luce.decomposed_kd_loss(student, teacher, target, **options)
    assert_close(whole, luce.kd_loss(student, teacher, **options) + entropy)
    off = {"guidance_weight": 0.0, "smooth_weight": 0.0, "relation_weight": 0.0}
    parts = [
        luce.decomposed_kd_loss(student, teacher, target, **options, **{**off, name: 1.0}) for name in off
    ]
    assert_close(sum(parts), whole, rtol=1e-9, atol=1e-12)
    assert parts[0] >= 0
    assert parts[1] >= 0
    gradient = slope(luce.decomposed_kd_loss, student, teacher, target, **options)
    assert_close(gradient, slope(luce.kd_loss, student, teacher, **options), rtol=1e-9, atol=1e-12)
    without = slope(luce.decomposed_kd_loss, student, teacher, target, **options, relation_weight=0.0)
    assert_close(
        without, slope(luce.partial_kd_loss, student, teacher, target, **options), atol=1e-12, rtol=1e-9
    )


def test_a_part_that_is_switched_off_may_be_infinite():
    student, teacher, target = batch(3)
    student[:, 4], target[:] = -inf, 1
    options = {"smooth_weight": 0.0, "relation_weight": 0.0}
    assert luce.decomposed_kd_loss(student, teacher, target) == inf
    assert luce.decomposed_kd_loss(student, teacher, target, **options).isfinite()
    gradient = slope(luce.decomposed_kd_loss, student, teacher, target, **options)
    assert gradient.isfinite().all()
