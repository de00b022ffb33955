"""Mutants of the operators' Python: layout, autograd, reference formulas."""

from __future__ import annotations

from .mutant import Mutant, mutant

PLD = "tests/ops/test_pld.py tests/ops/test_pld_native.py"
DIVERGENCE = "tests/ops/test_divergence.py tests/losses/test_golden.py"
FUSED = "tests/ops/test_fused.py tests/ops/test_divergence.py"
LAYOUT = "tests/ops/test_pld.py tests/losses/test_battery.py"
LINEAR = "tests/losses/test_linear.py"

OPS: tuple[Mutant, ...] = (
    mutant(
        "ops/rows of a block in the wrong order",
        LAYOUT,
        "block.movedim(1, -1).reshape(-1, block.shape[1])",
        "block.reshape(-1, block.shape[1])",
    ),
    mutant(
        "ops/the reference forgets the row weight",
        "tests/losses/test_battery.py tests/ops/test_divergence.py",
        "values = torch.where(idle[:, 0], 0, flat * values)",
        "values = torch.where(idle[:, 0], 0, values)",
    ),
    mutant(
        "ops/16-bit rows are not widened",
        f"{LAYOUT} tests/ops/test_cross_entropy.py",
        "wide = torch.promote_types(student.dtype, torch.float32)",
        "wide = student.dtype",
    ),
    # Autograd of the fused operators
    mutant(
        "ops/incoming gradient is dropped",
        FUSED,
        "return (gradient * upstream.unsqueeze(1)).to(gradient.dtype)",
        "return gradient.clone()",
    ),
    mutant(
        "ops/one row's gradient of 1 passes for all",
        FUSED,
        "return bool((upstream == 1).all())",
        "return bool((upstream == 1).any())",
    ),
    mutant(
        "ops/a kept graph hands out its stored gradient",
        FUSED,
        "return asked is None or asked()",
        "return False",
        "return keeps_graph is None or keeps_graph()",
        "return False",
    ),
    mutant(
        "ops/second derivative has no graph",
        FUSED,
        "tensors[0], upstream, create_graph=True)",
        "tensors[0], upstream)",
    ),
    # Reference formulas
    mutant(
        "ops/label moves one place short",
        PLD,
        "torch.where(k <= place, k - 1, k)",
        "torch.where(k < place, k - 1, k)",
    ),
    mutant(
        "ops/truncated ranking drops its tail",
        PLD,
        "tail = finite[:, places:].logsumexp(",
        "tail = finite[:, places + 1 :].logsumexp(",
    ),
    mutant(
        "ops/tied places share without Efron's half",
        PLD,
        "share = (members + 1) / (2 * members)",
        "share = (members - 1) / (2 * members)",
    ),
    mutant(
        "ops/the label ties with others",
        PLD,
        "tied[:, 1:2] &= (target < 0)[:, None]",
        "tied[:, 1:2] &= (target >= 0)[:, None]",
    ),
    mutant(
        "ops/one place too few within epsilon",
        PLD,
        "((left >= epsilon).sum(-1, keepdim=True) + 1)",
        "(left >= epsilon).sum(-1, keepdim=True)",
    ),
    mutant(
        "ops/teacher temperature multiplies",
        PLD,
        "alpha = (teacher / teacher_temperature).softmax(-1)",
        "alpha = (teacher * teacher_temperature).softmax(-1)",
        "alpha = (teacher / options.teacher_temperature).softmax(-1)",
        "alpha = (teacher * options.teacher_temperature).softmax(-1)",
    ),
    mutant(
        "ops/prefixes instead of suffixes",
        "tests/ops/test_suffix_logsumexp.py",
        "phi = x.clamp(min=lowest).flip(-1).logcumsumexp(-1)",
        "phi = x.clamp(min=lowest).logcumsumexp(-1)",
    ),
    mutant(
        "ops/reverse KL is forward KL",
        DIVERGENCE,
        "return forward_kl(teacher, student, temperature)",
        "return forward_kl(student, teacher, temperature)",
    ),
    mutant(
        "ops/JSD shares exchanged",
        DIVERGENCE,
        "return beta * of_teacher + (1 - beta) * of_student",
        "return (1 - beta) * of_teacher + beta * of_student",
    ),
    mutant(
        "ops/KL limit is the whole variance",
        DIVERGENCE,
        "values = deviation.square().sum(-1) / (2 * count[:, 0])",
        "values = deviation.square().sum(-1) / count[:, 0]",
    ),
    mutant(
        "ops/excess derivative with the wrong sign",
        DIVERGENCE,
        "(step + torch.expm1(-step)) - fall * other_step)",
        "(step + torch.expm1(-step)) + fall * other_step)",
    ),
    mutant(
        "ops/normaliser is not corrected",
        "tests/ops/test_divergence.py tests/losses/test_limits.py tests/losses/test_precision.py",
        "return rough - _change(p, q, difference - rough).sum(-1, keepdim=True).log1p()",
        "return rough",
    ),
    mutant(
        "ops/DKD of a sure teacher has a rest",
        DIVERGENCE,
        "return tckd, torch.where(first[:, 1] == -torch.inf, 0, nckd)",
        "return tckd, nckd",
    ),
    mutant(
        "ops/RKKD steepens one network",
        "tests/ops/test_rkkd.py",
        "return (k * d_t).tanh() * (k * d_s).tanh()",
        "return d_t.tanh() * (k * d_s).tanh()",
    ),
    mutant(
        "ops/RKKD divides by all pairs",
        "tests/ops/test_rkkd.py",
        "total / (classes * (classes - 1)).clamp(min=1)",
        "total / (classes * classes).clamp(min=1)",
    ),
    mutant(
        "ops/the last part of the pairs is skipped",
        "tests/losses/test_pairwise.py tests/ops/test_rkkd.py",
        "for first in range(width, s.shape[-1], width):",
        "for first in range(width, s.shape[-1] - width, width):",
    ),
    mutant(
        "ops/smoothing over classes that do not exist",
        "tests/ops/test_cross_entropy.py",
        "evenly = torch.where(exists, nll, 0).sum(-1) / exists.sum(-1)",
        "evenly = torch.where(exists, nll, 0).sum(-1) / student.shape[-1]",
    ),
    mutant(
        "ops/softmax overflows",
        "tests/ops/test_softmax.py",
        "e = (wide(x) - wide(x).amax(1, keepdim=True)).exp()",
        "e = wide(x).exp()",
    ),
    mutant(
        "ops/linear loss forgets the weight of recomputed rows",
        LINEAR,
        "share = upstream if weight is None else weight * upstream",
        "share = upstream",
    ),
    mutant(
        "ops/linear loss drops the bias's gradient of later chunks",
        LINEAR,
        "of_bias[:classes] += slope.sum(0)",
        "of_bias[:classes] = slope.sum(0)",
    ),
    mutant(
        "ops/linear loss does not scale the gradient back",
        LINEAR,
        "for result in (values, *gradients):",
        "for result in (values,):",
    ),
)
