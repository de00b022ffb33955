"""Parametrises tests over the catalogue: a test that asks for `case`, `by_row` or `default` gets them all.

``@pytest.mark.only(condition)`` leaves out the cases that a test says nothing about.
"""

from __future__ import annotations

import pytest

from .catalogue import BY_ROW, CASES, DEFAULTS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    conditions = [mark.args[0] for mark in metafunc.definition.iter_markers("only")]
    for name, cases in (("case", CASES), ("by_row", BY_ROW), ("default", DEFAULTS)):
        if name in metafunc.fixturenames:
            chosen = [case for case in cases if all(condition(case) for condition in conditions)]
            metafunc.parametrize(name, chosen, ids=str)
