"""The public names, and what importing them costs."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import luce

HEAVY = [
    "accelerate",
    "datasets",
    "jinja2",
    "jsonargparse",
    "matplotlib",
    "PIL",
    "rich",
    "scipy",
    "sklearn",
    "tensorboard",
    "timm",
    "torchmetrics",
    "torchvision",
    "transformers",
    "wandb",
]


@pytest.mark.parametrize("statement", ["import luce", "import luce; luce.pld_loss", "import luce.cli"])
def test_importing_imports_nothing_heavy(statement: str) -> None:
    script = f"{statement}; import sys; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", luce.__all__)
def test_every_public_name_is_there_and_explains_itself(name: str) -> None:
    thing = getattr(luce, name)
    if name == "UNLABELLED":
        assert thing == -1
        return
    assert inspect.getdoc(thing)
    assert thing.__doc__  # its own, not its parent's


def test_public_names_are_sorted_and_unique() -> None:
    assert len(set(luce.__all__)) == len(luce.__all__)
    constants = [name for name in luce.__all__ if name.isupper()]
    classes = [name for name in luce.__all__ if name[0].isupper() and not name.isupper()]
    functions = [name for name in luce.__all__ if name[0].islower()]
    assert luce.__all__ == [*sorted(constants), *sorted(classes), *sorted(functions)]


def test_every_loss_function_and_module_is_public() -> None:
    from luce import losses

    public = {*losses.functional.__all__, *losses.modules.__all__}
    assert public <= set(luce.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'luce' has no attribute 'distil'"):
        luce.distil  # noqa: B018


def test_the_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert luce.__version__ == version("luce")
