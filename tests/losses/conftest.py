"""Parametrises tests over the catalogue: a test that asks for `case`, `by_row` or `default` gets them all."""

from __future__ import annotations

import pytest

from .catalogue import BY_ROW, CASES, DEFAULTS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, cases in (("case", CASES), ("by_row", BY_ROW), ("default", DEFAULTS)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, cases, ids=str)
