"""The catalogue knows every loss there is, so that the battery leaves none out."""

from __future__ import annotations

import inspect

import luce
from luce.losses import LogitLoss, functional

from .catalogue import LOSSES, OF_THEIR_OWN


def subclasses(cls: type) -> set[type]:
    return {sub for child in cls.__subclasses__() for sub in {child} | subclasses(child)}


def takes_logits(function) -> bool:
    """Losses on features have a battery of their own, in test_features.py."""
    return next(iter(inspect.signature(function).parameters)) == "student_logits"


def test_every_public_function_has_an_entry():
    listed = {loss.name for loss in LOSSES}
    for module in (luce, functional):
        functions = {name: getattr(module, name) for name in module.__all__ if name.endswith("_loss")}
        assert {name for name, function in functions.items() if takes_logits(function)} == listed


def test_every_module_has_an_entry():
    here = {sub for sub in subclasses(LogitLoss) if sub.__module__.startswith("luce.")}
    assert here == {loss.module for loss in LOSSES} | OF_THEIR_OWN
    assert {module.__name__ for module in here} <= set(luce.__all__)


PER_BATCH = ("relation", "row_weight", "teacher_order")


def test_every_option_of_a_function_is_one_of_its_module_with_the_same_default():
    for loss in LOSSES:
        keywords = inspect.signature(loss.function).parameters.values()
        keyword_only = {p.name: p.default for p in keywords if p.kind is p.KEYWORD_ONLY}
        options = {name: default for name, default in keyword_only.items() if name not in PER_BATCH}
        assert loss.module().options() == options, loss.name


def test_modules_say_what_they_do_with_rows_without_a_label():
    for loss in LOSSES:
        assert loss.module.uses_unlabelled is not loss.needs_label, loss.name


def test_the_entries_try_each_option_of_the_loss_itself():
    shared = {"ignore_index", "unlabelled_index", "class_dim", "reduction"}
    for loss in LOSSES:
        tried = {name for options in loss.options for name in options}
        assert tried == set(loss.module().options()) - shared, loss.name
