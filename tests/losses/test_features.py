"""One battery over all losses on features: what is learnt, what gets a gradient, what batches are allowed."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import luce
from luce.losses import FeatureLoss
from luce.losses.modules import embeddings, iekd, lipschitz, maps

from .feature_cases import CASES, FREE, LEARNT, Case

each = pytest.mark.parametrize("entry", CASES, ids=str)
each_free = pytest.mark.parametrize("entry", FREE, ids=str)
each_learnt = pytest.mark.parametrize("entry", LEARNT, ids=str)
each_16_bit = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])


def value(loss: FeatureLoss, student, teacher):
    """With the same random mask each time; of a loss that tells its parts, the total."""
    torch.manual_seed(2)
    result = loss(student, teacher)
    return result["loss"] if isinstance(result, dict) else result


def value_and_gradients(loss, student, teacher):
    student = [s.clone().requires_grad_() for s in student]
    result = value(loss, student, teacher)
    return result.detach(), torch.autograd.grad(result, student)


def test_the_cases_name_every_loss():
    here = {
        cls
        for module in (embeddings, maps, iekd, lipschitz)
        for cls in vars(module).values()
        if isinstance(cls, type) and cls.__module__ == module.__name__ and issubclass(cls, FeatureLoss)
    }
    assert here == {entry.module for entry in CASES}
    assert {cls.__name__ for cls in here} <= set(luce.__all__)


def test_the_cases_try_each_option():
    for module in {entry.module for entry in CASES}:
        tried = {name for entry in CASES if entry.module is module for name in entry.options}
        assert tried == set(module().options()), module


# What is learnt, and by whom


@each
def test_the_student_learns_and_the_teacher_does_not(entry):
    loss = entry.build().double()
    student, teacher = ([x.requires_grad_() for x in group] for group in entry.batch())
    before = [t.detach().clone() for t in teacher]
    result = value(loss, student, teacher)
    assert result.shape == ()
    result.backward()
    assert all(s.grad is not None and s.grad.isfinite().all() and s.grad.any() for s in student)
    assert all(t.grad is None for t in teacher)
    assert all(torch.equal(a, b) for a, b in zip(before, teacher, strict=True))
    for name, parameter in loss.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@each
def test_gradients_against_finite_differences(entry):
    loss = entry.build().double()
    if issubclass(entry.module, luce.OFDLoss):  # its margins move with every batch in training mode
        loss(*entry.batch(4))
        loss.eval()
    if entry.options.get("algorithm") == "power":  # the gradient is that of the limit
        loss.iterations = 300
    student, teacher = entry.batch(4)
    # The code of IE-KD is a target, which no gradient passes.
    learnt = {name: p for name, p in loss.named_parameters() if not name.startswith("of_teacher")}

    def function(*tensors):
        features, parameters = tensors[: len(student)], tensors[len(student) :]
        call = functools.partial(torch.func.functional_call, loss, dict(zip(learnt, parameters, strict=True)))
        return value(lambda *features: call(features), list(features), teacher)

    inputs = [x.detach().clone().requires_grad_() for x in (*student, *learnt.values())]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@each_learnt
def test_what_is_learnt_are_parameters_made_once(entry):
    loss = entry.module(**entry.options)
    assert not list(loss.parameters())
    with pytest.raises(RuntimeError, match=rf"{entry.module.__name__}\.build"):
        loss(*entry.batch())
    loss.build(entry.student, entry.teacher)
    first = {name: (parameter, parameter.clone()) for name, parameter in loss.named_parameters()}
    assert first
    assert all(isinstance(p, nn.Parameter) for p, _ in first.values())
    assert any(p.requires_grad for p, _ in first.values())
    buffers = {name: buffer.clone() for name, buffer in loss.named_buffers()}
    loss.build([torch.Size(s) for s in entry.student], [torch.Size(t) for t in entry.teacher])
    for name, parameter in loss.named_parameters():
        assert parameter is first[name][0]
        assert torch.equal(parameter, first[name][1])
    for name, buffer in loss.named_buffers():  # trying the shapes leaves no trace
        assert torch.equal(buffer, buffers[name])
        assert not buffer.any() or name.endswith(("running_var", "_channels"))
    assert loss.training
    with pytest.raises(ValueError, match=r"was built for.*make another one"):
        loss.build([(2 * s[0], *s[1:]) for s in entry.student], entry.teacher)


@each_learnt
def test_training_what_is_learnt_lowers_the_loss(entry):
    loss = entry.build().double()
    student, teacher = entry.batch(4)
    start = value(loss, student, teacher).item()
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.02)
    for _ in range(20):
        optimizer.zero_grad()
        value(loss, student, teacher).backward()
        optimizer.step()
    assert value(loss, student, teacher) < start - 1e-3 * abs(start)


@each_free
def test_a_loss_that_learns_nothing_needs_no_build(entry):
    loss = entry.module(**entry.options)
    assert_close(loss(*entry.batch()), entry.build()(*entry.batch()), rtol=0, atol=0)
    assert not loss.state_dict()
    before = torch.get_rng_state()
    loss.build(entry.student, entry.teacher)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("entry", [c for c in FREE if c.module.stages != "consecutive"], ids=str)
def test_the_module_is_the_function_stage_by_stage(entry):
    name = entry.module.__name__.removesuffix("Loss").lower() + "_loss"
    function = getattr(luce, name)
    keywords = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in keywords if p.kind is p.KEYWORD_ONLY}
    own = {"dim"}  # of the embeddings of CC
    assert {k: v for k, v in entry.module().options().items() if k not in own} == defaults
    student, teacher = entry.batch()
    terms = [function(s, t, **entry.options) for s, t in zip(student, teacher, strict=True)]
    assert_close(entry.build()(student, teacher), sum(terms), rtol=1e-14, atol=0)


# The module as such


@each
def test_copies_and_saved_weights_give_the_same(entry):
    loss = entry.build().double()
    student, teacher = entry.batch()
    loss(student, teacher)
    expected = value(loss.eval(), student, teacher)
    other = entry.module(**entry.options)
    other.build(entry.student, entry.teacher)
    other.double().eval().load_state_dict(loss.state_dict())
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), other):
        assert_close(value(twin, student, teacher), expected, rtol=0, atol=0)
        assert twin.options() == loss.options()


@pytest.mark.parametrize("entry", [entry for entry in CASES if not list(entry.build().children())], ids=str)
def test_the_text_of_a_module_is_the_call_that_makes_it(entry):
    loss = entry.module(**entry.options)
    options = ", ".join(f"{name}={value!r}" for name, value in entry.options.items())
    assert repr(loss) == f"{entry.module.__name__}({options})"
    assert eval(repr(loss), vars(luce)).options() == loss.options()


@pytest.mark.parametrize(
    ("module", "option", "wrong"),
    [
        (luce.ATLoss, "p", 0.5),
        (luce.ATLoss, "p", math.inf),
        (luce.NSTLoss, "form", "gaussian"),
        (luce.VIDLoss, "initial_variance", 0.0),
        (luce.CWDLoss, "temperature", 0.0),
        (luce.MGDLoss, "mask_ratio", 1.0),
        (luce.MGDLoss, "mask_ratio", -0.1),
        (luce.MGDLoss, "masked", "rows"),
        (luce.PKTLoss, "eps", 0.0),
        (luce.RKDLoss, "distance_weight", -1.0),
        (luce.RKDLoss, "angle_weight", math.nan),
        (luce.CCLoss, "form", "pairs"),
        (luce.CCLoss, "gamma", 0.0),
        (luce.CCLoss, "order", 0),
        (luce.CCLoss, "order", 1.5),
        (luce.CCLoss, "dim", 0),
    ],
    ids=str,
)
def test_a_bad_option_is_refused_when_the_module_is_made(module, option, wrong):
    with pytest.raises(ValueError, match=f"`{option}`") as caught:
        module(**{option: wrong})
    assert repr(wrong) in str(caught.value)


# Which features


@each
def test_wrong_numbers_of_features(entry):
    loss = entry.build()
    student, teacher = entry.batch()
    with pytest.raises(ValueError, match="as many features of the student as of the teacher"):
        loss(student, teacher[:-1])
    with pytest.raises(ValueError, match="expected"):
        loss([], [])
    with pytest.raises(ValueError, match="expected"):
        loss([*student, *student], [*teacher, *teacher])
    with pytest.raises(ValueError, match="as many features"):
        entry.module(**entry.options).build(entry.student, entry.teacher[:-1])


@each
def test_wrong_ranks_types_and_rows(entry):
    loss = entry.build()
    student, teacher = entry.batch()
    deep = [s[..., None, None] for s in student]
    if entry.module is luce.SPLoss:  # flattens whatever comes
        assert_close(loss(deep, teacher), loss(student, teacher), rtol=0, atol=0)
    else:
        with pytest.raises(ValueError, match=r"`student_features` of shape.*without the batch, got \("):
            loss(deep, teacher)
    for wrong, error, message in (
        ([s.long() for s in student], TypeError, r"`student_features` of a floating dtype, got torch.int64"),
        ([s.tolist() for s in student], TypeError, r"`student_features` to be a torch.Tensor, got list"),
        ([s[:2] for s in student], ValueError, r"the same rows.*got 2 and 3"),
        ([s[..., :0] for s in student], ValueError, r"`student_features` to be non-empty"),
        ([s.to("meta") for s in student], ValueError, r"`teacher_features` on meta.*got cpu"),
    ):
        with pytest.raises(error, match=message):
            loss(wrong, teacher)
    with pytest.raises(ValueError, match=r"at least one.*got 0 and 0"):
        loss([s[:0] for s in student], [t[:0] for t in teacher])


@each
def test_shapes_that_a_loss_cannot_read_are_refused_by_build(entry):
    loss = entry.module(**entry.options)
    for shape in ((), (1, 2, 3, 4), (3, 0, 2), (3, 4, 4) if loss.takes == "vectors" else (7,)):
        with pytest.raises(ValueError, match=r"expected a feature of the student.*got \("):
            loss.build([shape] * len(entry.student), entry.teacher)
    entry.ready(loss)  # what failed has left nothing behind
    value(loss.float(), *entry.batch(dtype=torch.float32))


@pytest.mark.parametrize(
    "entry", [c for c in CASES if c.module.takes == "maps" and c.module is not luce.SPLoss], ids=str
)
def test_maps_beside_tokens_are_refused_by_build(entry):
    loss, tokens = entry.module(**entry.options), [(t[1] * t[2], t[0]) for t in entry.teacher]
    with pytest.raises(ValueError, match=r"both features as maps|as large as the teacher's"):
        loss.build(entry.student, tokens)
    if loss.learns:
        with pytest.raises(RuntimeError, match="build"):
            loss(*entry.batch())
    loss.build(entry.student, entry.teacher)  # what failed is no obstacle


@pytest.mark.parametrize("entry", [c for c in CASES if c.module.takes == "maps"], ids=str)
def test_tokens_are_a_map_of_one_column(entry):
    """(N, T, D) as (N, D, T, 1), with as many tokens in both."""
    stages = len(entry.student)
    tokens = Case(entry.module, ((6, 3),) * stages, ((6, 4),) * stages, entry.options)
    column = Case(entry.module, ((3, 6, 1),) * stages, ((4, 6, 1),) * stages, entry.options)
    student, teacher = tokens.batch()
    columns = [[x.mT[..., None] for x in group] for group in (student, teacher)]
    loss, other = column.build().double(), tokens.build().double()
    other.load_state_dict(loss.state_dict())
    assert_close(value(other, student, teacher), value(loss, *columns), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "function", [luce.at_loss, luce.nst_loss, luce.cwd_loss, luce.fitnet_loss], ids=lambda f: f.__name__
)
def test_unequal_numbers_of_tokens_cannot_be_compared_place_by_place(function):
    with pytest.raises(ValueError, match="expected"):
        function(torch.zeros(2, 5, 3), torch.zeros(2, 6, 3))


@pytest.mark.parametrize("function", [luce.cwd_loss, luce.ickd_loss, luce.fitnet_loss])
def test_functions_that_need_equal_channels_say_what_makes_them_equal(function):
    with pytest.raises(ValueError, match=r"module|FitNetLoss"):
        function(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4))


@pytest.mark.parametrize("name", ["ATLoss", "NSTLoss", "VIDLoss", "CWDLoss", "MGDLoss"])
def test_the_larger_map_is_pooled_to_the_smaller(name):
    """Side by side: the student is higher, the teacher is wider."""
    random = torch.Generator().manual_seed(3)
    student = torch.randn(2, 3, 6, 2, generator=random, dtype=torch.float64)
    teacher = torch.randn(2, 4, 3, 4, generator=random, dtype=torch.float64)
    entry = Case(getattr(luce, name), ((3, 6, 2),), ((4, 3, 4),))
    pooled = [student.unflatten(2, (3, 2)).mean(3)], [teacher.unflatten(3, (2, 2)).mean(4)]
    loss = entry.build().double()
    assert_close(value(loss, [student], [teacher]), value(loss, *pooled), rtol=1e-12, atol=0)


# Batches


@each
def test_the_order_of_the_rows_does_not_matter(entry):
    unmasked_entry = Case(entry.module, entry.student, entry.teacher, {**entry.options, **unmasked(entry)})
    loss = unmasked_entry.build().double()
    student, teacher = entry.batch(5)
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = [s[order] for s in student], [t[order] for t in teacher]
    one, other = value(loss, student, teacher), value(loss, *shuffled)
    if entry.depends_on_order:
        assert (one - other).abs() > 1e-6
    else:
        # The second batch of OFD meets the same margins: its statistics are those of the first.
        assert_close(other, one, rtol=1e-11, atol=1e-13)


def unmasked(entry):
    return {"mask_ratio": 0.0} if entry.module is luce.MGDLoss else {}


@pytest.mark.parametrize("entry", [entry for entry in CASES if not entry.couples_rows], ids=str)
def test_a_batch_is_the_mean_over_its_rows(entry):
    unmasked_entry = Case(entry.module, entry.student, entry.teacher, {**entry.options, **unmasked(entry)})
    loss = unmasked_entry.build().double()
    student, teacher = entry.batch(4)
    loss(student, teacher)
    loss.eval()  # batch normalisation and margins couple rows in training
    rows = [value(loss, [s[i : i + 1] for s in student], [t[i : i + 1] for t in teacher]) for i in range(4)]
    assert_close(value(loss, student, teacher), torch.stack(rows).mean(), rtol=1e-11, atol=1e-13)


@each
def test_one_row_and_rows_of_zeros_or_all_alike_are_defined(entry):
    loss = entry.build().double()
    student, teacher = entry.batch(4)
    one_zero, alike = ([x.clone() for x in student] for _ in range(2))
    for x, y in zip(one_zero, alike, strict=True):
        x[1] = 0
        y[:] = y[:1]
    nothing, silent = [0 * s for s in student], [0 * t for t in teacher]
    for s, t in (
        (student, teacher),
        (one_zero, teacher),
        (alike, teacher),
        (nothing, teacher),
        (student, silent),
        (nothing, silent),
        (alike, [x[:1].expand_as(x) for x in teacher]),
        ([x[:1] for x in student], [x[:1] for x in teacher]),
    ):
        result, gradients = value_and_gradients(loss, s, t)
        assert result.isfinite()
        assert all(g.isfinite().all() for g in gradients)


@each
def test_strides_do_not_matter(entry):
    loss = entry.build().double()
    student, teacher = entry.batch()
    strided = [[x.movedim(1, -1).contiguous().movedim(-1, 1) for x in g] for g in (student, teacher)]
    sparse = [[torch.stack([x, x], -1)[..., 0] for x in g] for g in (student, teacher)]
    loss.eval()
    expected = value_and_gradients(loss, student, teacher)
    for other in (strided, sparse):
        assert_close(value_and_gradients(loss, *other), expected, rtol=1e-11, atol=1e-13)


# Precision


@each_16_bit
@each_free
def test_16_bit_features_are_calculated_in_float32(entry, dtype):
    loss = entry.build()
    student, teacher = entry.batch(4, dtype)
    result, gradients = value_and_gradients(loss, student, teacher)
    assert result.dtype == torch.float32
    assert all(g.dtype == dtype for g in gradients)
    wide = [[x.double() for x in g] for g in (student, teacher)]
    truth, slopes = value_and_gradients(loss, *wide)
    assert_close(result.double(), truth, rtol=1e-5, atol=1e-6)
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert_close(
            gradient.double(), slope, rtol=2 * torch.finfo(dtype).eps, atol=1e-5 * float(slope.abs().max())
        )


@each_16_bit
@each_learnt
def test_16_bit_features_meet_float32_layers(entry, dtype):
    loss = entry.build()
    student, teacher = entry.batch(4, dtype)
    result = value(loss, student, teacher)
    assert result.dtype == torch.float32
    wide = value(loss, *([x.float() for x in g] for g in (student, teacher)))
    if not issubclass(entry.module, luce.OFDLoss):
        assert_close(result, wide, rtol=1e-6, atol=1e-6)
    low = entry.build().to(dtype)  # and layers in 16 bits meet any features
    assert value(low, *entry.batch(4, torch.float32)).isfinite()


@each
def test_autocast_touches_no_more_than_the_layers(entry):
    loss = entry.build()
    student, teacher = entry.batch(4, torch.float32)
    expected, slopes = value_and_gradients(loss, student, teacher)
    student = [s.requires_grad_() for s in student]
    with torch.autocast("cpu", torch.bfloat16):
        result = value(loss, student, teacher)
    gradients = torch.autograd.grad(result, student)
    assert result.dtype == torch.float32
    if entry in FREE:
        assert_close((result.detach(), gradients), (expected, slopes), rtol=0, atol=0)
    else:
        assert_close(result.detach(), expected, rtol=0.1, atol=0)
        assert all(g.isfinite().all() for g in gradients)


@each
def test_float32_is_close_to_float64(entry):
    wide, narrow = entry.build().double(), entry.build()
    truth, slopes = value_and_gradients(wide, *entry.batch(4))
    result, gradients = value_and_gradients(narrow, *entry.batch(4, torch.float32))
    assert_close(result.double(), truth, rtol=1e-4, atol=1e-6)
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert_close(gradient.double(), slope, rtol=1e-3, atol=1e-4 * float(slope.abs().max()))


SCALE_FREE = {luce.ATLoss, luce.NSTLoss, luce.SPLoss, luce.PKTLoss, luce.RKDLoss}


@pytest.mark.parametrize(
    "entry", [c for c in FREE if c.module in SCALE_FREE or c.module is luce.CCLoss], ids=str
)
@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e4, 1e12])
def test_a_factor_on_the_features_changes_nothing_however_large(entry, scale):
    """In float32, where squares of 1e-12 and 1e12 are still numbers but their squares are not."""
    if entry.options.get("p") == 3.0:
        scale = scale**0.5
    loss = entry.build()
    student, teacher = entry.batch(4, torch.float32)
    expected = loss(student, teacher)
    assert_close(loss([scale * s for s in student], teacher), expected, rtol=1e-4, atol=1e-6)
    assert_close(loss(student, [scale * t for t in teacher]), expected, rtol=1e-4, atol=1e-6)


# torch.compile

# One loss of each way through the code: maps without and with layers, pairs of maps, consecutive maps, random
# masks, rows that couple, and a loss that returns its parts.
PATHS = {"ATLoss", "VIDLoss", "FSPLoss", "OFDLoss", "LipschitzLoss-True", "MGDLoss", "RKDLoss", "LONDONLoss"}
COMPILED = [
    pytest.param(entry, id=str(entry), marks=() if str(entry) in PATHS else pytest.mark.slow)
    for entry in CASES
]


def test_every_way_is_compiled():
    assert {param.id for param in COMPILED if not param.marks} == PATHS


@pytest.mark.parametrize("entry", COMPILED)
def test_compiled_is_eager(entry):
    torch.compiler.reset()
    loss = entry.build().eval()
    if entry.module is luce.MGDLoss:
        loss.mask_ratio = 0.0
    student, teacher = entry.batch(3, torch.float32)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_close(
        value_and_gradients(compiled, student, teacher),
        value_and_gradients(loss, student, teacher),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.gpu
@each
def test_a_gpu_agrees_with_the_cpu(entry):
    loss = Case(entry.module, entry.student, entry.teacher, {**entry.options, **unmasked(entry)}).build()
    student, teacher = entry.batch(4, torch.float32)
    expected = value_and_gradients(copy.deepcopy(loss), student, teacher)
    there = ([x.cuda() for x in features] for features in (student, teacher))
    result, gradients = value_and_gradients(loss.cuda(), *there)
    actual = result.cpu(), tuple(g.cpu() for g in gradients)
    assert_close(actual, expected, rtol=1e-3, atol=1e-5)  # convolutions may run in TF32
