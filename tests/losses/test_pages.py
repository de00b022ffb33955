"""The pages of the losses in the documentation, which docs/generate_losses.py writes."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import luce

SCRIPT = Path(__file__).parents[2] / "docs" / "generate_losses.py"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_losses", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_loss_has_a_section_with_its_source_and_its_verification(generator: ModuleType) -> None:
    pages = generator.pages()
    written = "\n".join(pages.values())
    parts = re.split(r"^## ", written, flags=re.MULTILINE)[1:]
    sections = {part.split("\n")[0]: part for part in parts}
    losses = {*luce.losses.functional.__all__, *luce.losses.modules.__all__}
    assert {name for name in losses if f"`luce.{name}`" not in written} == set()
    for entry in generator.entries():
        assert "**Verified by**\n\n- " in sections[entry.title], entry.title
        assert f"({entry.family}.md#{entry.title.lower()})" in pages["index.md"]


def test_nothing_of_restructured_text_is_left(generator: ModuleType) -> None:
    for name, text in generator.pages().items():
        assert not re.search(r":math:|\.\. math", text), name
        assert text.count("```") % 2 == 0, name
        assert text.count("$$") % 2 == 0, name


def test_a_docstring_as_markdown(generator: ModuleType) -> None:
    doc = """Sum.

.. math:: a +
    b

Of :math:`x`.

Args:
    x: One ``Tensor``
        of rows.
Example:
    >>> 1
    1
"""
    assert generator.markdown(doc) == (
        "Sum.\n\n$$\na + b\n$$\n\nOf $x$.\n\n**Args**\n\n- `x`: One `Tensor` of rows.\n\n"
        "**Example**\n\n```python\n>>> 1\n1\n```\n"
    )
