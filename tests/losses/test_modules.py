"""A module is its function with the options stored."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import luce

from .catalogue import LOSSES, batch

BAD = [
    (loss, name, value) for loss in LOSSES for name, value in (*loss.bad_options, ("reduction", "average"))
]


def arguments(loss, student, teacher, target):
    return (student, teacher, target) if loss.module.takes_teacher else (student, target)


def test_module_is_function(case):
    student, teacher, target = batch(4, 3)
    target[0, 0], target[1, 1] = -7, -8
    weight = torch.rand(4, 3, dtype=torch.float64)
    shared = {"class_dim": -1, "reduction": "none", "ignore_index": -7}
    if case.loss.uses_label:
        shared["unlabelled_index"] = -8
    module = case.loss.module(**case.options, **shared)
    expected = case(student, teacher, target, row_weight=weight, **shared)
    assert_close(module(student, teacher, target, weight), expected, rtol=0, atol=0)
    assert_close(module(student, teacher, target), case(student, teacher, target, **shared), rtol=0, atol=0)


@pytest.mark.parametrize(("loss", "option", "value"), BAD, ids=lambda v: str(getattr(v, "name", v)))
def test_function_and_constructor_refuse_a_bad_option_alike(loss, option, value):
    with pytest.raises(ValueError, match=f"`{option}`") as from_function:
        loss.function(*arguments(loss, *batch(3)), **{option: value})
    assert repr(value) in str(from_function.value)
    with pytest.raises(ValueError, match=f"`{option}`") as from_module:
        loss.module(**{option: value})
    assert str(from_module.value) == str(from_function.value)


def test_an_unknown_option_is_refused(default):
    with pytest.raises(TypeError, match="temprature"):
        default.loss.module(temprature=4.0)
    with pytest.raises(TypeError, match="unknown option of PLDLoss: `topk`; did you mean `top_k`"):
        luce.PLDLoss(topk=3)


def test_a_module_holds_nothing_to_save_and_survives_copies(case):
    student, teacher, target = batch(4)
    module = case.loss.module(**case.options)
    assert isinstance(module, nn.Module)
    assert not module.state_dict()
    assert not list(module.parameters())
    expected = module(student, teacher, target)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin.options() == module.options()
        assert_close(twin(student, teacher, target), expected, rtol=0, atol=0)
    assert_close(nn.ModuleList([module])[0](student, teacher, target), expected, rtol=0, atol=0)
    hash(module)


def test_the_text_of_a_module_is_the_call_that_makes_it(case):
    module = case.loss.module(**case.options)
    assert (
        repr(module) == f"{type(module).__name__}({', '.join(f'{k}={v!r}' for k, v in case.options.items())})"
    )
    assert eval(repr(module), {"inf": math.inf, **vars(luce)}).options() == module.options()


def test_cross_entropy_needs_no_teacher():
    student, teacher, target = batch(4)
    module = luce.CrossEntropyLoss()
    assert_close(module(student, None, target), module(student, teacher, target), rtol=0, atol=0)


@pytest.mark.parametrize("module", [luce.CrossEntropyLoss, luce.TfKDLoss])
def test_labels_in_the_place_of_the_teacher_are_refused_with_the_call_to_write(module):
    student, _, target = batch(4)
    with pytest.raises(TypeError, match=r"third argument.*: loss\(student_logits, None, target\)"):
        module()(student, target)


def test_making_a_module_leaves_the_random_state_alone(default):
    before = torch.get_rng_state()
    default.loss.module()
    assert torch.equal(torch.get_rng_state(), before)
