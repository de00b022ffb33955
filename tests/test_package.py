"""The public names, and what importing them costs."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import luce

HEAVY = [
    "accelerate",
    "datasets",
    "jinja2",
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
    assert luce.__all__ == sorted(set(luce.__all__))


def test_every_loss_function_and_module_is_public() -> None:
    public = {*luce.losses.functional.__all__, *luce.losses.modules.__all__}
    assert public <= set(luce.__all__)


def test_the_families_list_every_loss_that_they_define() -> None:
    """A function is a loss by its suffix; a module by being a final class with a function or a forward."""
    for package, is_loss in (
        (luce.losses.functional, lambda name, thing: name.endswith("_loss") and name[0] != "_"),
        (luce.losses.modules, lambda name, thing: name.endswith("Loss") and name not in BASES),
    ):
        for info in pkgutil.iter_modules(package.__path__):
            family = importlib.import_module(f"{package.__name__}.{info.name}")
            defined = {
                name
                for name, thing in vars(family).items()
                if getattr(thing, "__module__", "") == family.__name__ and is_loss(name, thing)
            }
            assert defined <= set(getattr(family, "__all__", [])) | HELPERS, family.__name__
            assert set(getattr(family, "__all__", [])) <= set(package.__all__), family.__name__


BASES = {"LogitLoss", "FeatureLoss", "LinearLoss"}
HELPERS = {"hierarchical_context_loss"}
"""Functions inside a module's file, with the suffix of a loss."""


def test_helpers_and_base_classes_are_in_the_submodule() -> None:
    names = {"FeatureLoss", "LogitLoss", "linear_cka", "standardize", "tempered_kd"}
    assert names <= set(luce.losses.__all__)
    assert names.isdisjoint(luce.__all__)
    assert all(hasattr(luce.losses, name) for name in luce.losses.__all__)


# Dotted names in README, documentation and docstrings

ROOT = Path(__file__).parents[1]
DOTTED = re.compile(r"(?<![\w./-])luce(?:\.[A-Za-z_]\w*)+(?![\w/])")
NO_NAMES = {"luce.cpp", "luce.yaml", "luce.json", "luce.egg"}


def dotted_names() -> dict[str, set[str]]:
    """Each name ``luce.x...`` with the files that write it: README, documentation and docstrings."""
    pages = (ROOT / "README.md", *ROOT.glob("docs/**/*.md"))
    texts = {path: path.read_text(encoding="utf-8") for path in pages}
    for path in ROOT.glob("src/luce/**/*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docs = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, nodes)]
        texts[path] = "\n".join(docs)
    names: dict[str, set[str]] = {}
    for path, text in texts.items():
        for name in DOTTED.findall(text):
            names.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    return {name: files for name, files in names.items() if name not in NO_NAMES}


TRY_EACH = """
import importlib, os, sys
import luce  # alone: what a name needs beyond this, the package must import by itself

def reach(name):
    first, *rest = name.split(".")[1:]
    thing, path = getattr(luce, first), f"luce.{first}"
    for part in rest:
        path += "." + part
        thing = getattr(thing, part) if hasattr(thing, part) else importlib.import_module(path)

def missing(names):
    count = 0
    for name in names:
        try:
            reach(name)
        except (AttributeError, ImportError) as error:
            count += 1
            print(f"{name}: {error}", flush=True)
    return count

groups = {}
for name in sys.argv[1:]:
    groups.setdefault(name.split(".")[1], []).append(name)
for names in groups.values():
    # A child of its own, so that no name is there because another one was imported before it.
    if (child := os.fork()) == 0:
        os._exit(missing(names) > 0)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.slow
def test_every_dotted_name_is_reachable_after_import_luce() -> None:
    names = {**dotted_names(), "luce.nowhere.Thing": {"no page"}}
    assert len(names) > 100
    command = [sys.executable, "-c", TRY_EACH, *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    missing = {line: names[line.split(":")[0]] for line in done.stdout.splitlines()}
    assert list(missing.values()) == [{"no page"}], missing


@pytest.mark.parametrize("name", sorted({module.name for module in pkgutil.iter_modules(luce.__path__)}))
def test_every_submodule_is_an_attribute(name: str) -> None:
    if not name.startswith("_"):
        assert inspect.ismodule(getattr(luce, name))
        assert name in dir(luce)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'luce' has no attribute 'distil'"):
        luce.distil  # noqa: B018


def test_the_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert luce.__version__ == version("luce")
