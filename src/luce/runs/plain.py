"""Losses, methods and other objects of a user as plain values, to tell whether two are the same."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import digest

DEPTH = 8
"""Levels that are followed; deeper objects count by the names of their classes."""
SCALARS = (bool, int, float, str, type(None))
INTERNAL = vars(nn.Module()).keys()
"""What PyTorch keeps in every module."""
PASSING = ("epoch",)
"""What the training loop sets in Luce's modules."""


def plain(value: Any, depth: int = DEPTH) -> Any:
    """Return nested mappings and lists of numbers and texts that two objects share only if they are alike.

    Tensors count by digest; modules by class, attributes, parameters and buffers; dataclasses by fields;
    functions by name, code, defaults, and the values of the closure and of global constants that they use.
    Of other objects the attributes count if their class is the user's own. Not seen is what a function reads
    elsewhere: global objects, files, the code of functions that it calls.

    Example:
        >>> from luce import KDLoss
        >>> described = plain(KDLoss(temperature=4.0))
        >>> described["class"], described["temperature"]
        ('KDLoss', 4.0)
    """
    if isinstance(value, SCALARS):
        return value
    if isinstance(value, Tensor):
        return None if is_lazy(value) else digest.of_tensors({"": value})
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return digest.of_bytes(repr((value.dtype, value.shape)).encode(), value.tobytes())
    if isinstance(value, type):
        return name_of(value)
    if depth == 0:
        return name_of(type(value))
    inner = functools.partial(plain, depth=depth - 1)
    if isinstance(value, Mapping):
        return {str(key): inner(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return inner(value._asdict())
    if isinstance(value, list | tuple):
        return [inner(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if isinstance(value, functools.partial):
        return {"partial": inner(value.func), "arguments": inner([*value.args, value.keywords])}
    if isinstance(value, MethodType):
        return {"function": value.__func__.__qualname__, "self": inner(value.__self__)}
    if isinstance(value, FunctionType):
        return _function(value, inner)
    return _object(value, inner)


def name_of(cls: type) -> str:
    """Name a class: with its package, unless that is Luce or the user's own, whose scripts may be renamed."""
    root = cls.__module__.partition(".")[0]
    own = root == "luce" or is_own(cls)
    return cls.__qualname__ if own or root == "builtins" else f"{root}.{cls.__qualname__}"


def is_own(thing: Any) -> bool:
    """Whether a class or function is the user's, neither of Luce nor of Python or an installed package."""
    root = str(thing.__module__).partition(".")[0]
    if root in ("luce", "torch") or root in sys.stdlib_module_names:
        return False
    file = getattr(sys.modules.get(thing.__module__), "__file__", None) or ""
    return "site-packages" not in file and "dist-packages" not in file


def code_of(functions: Iterable[FunctionType]) -> str:
    """Digest what functions do, with the Python version, on which this depends; not docstrings or places."""
    content = [[function.__name__, _code(function.__code__, function.__doc__)] for function in functions]
    return f"{sys.version_info.major}.{sys.version_info.minor}:{digest.of_json(content)}"


def own_functions(cls: type) -> list[FunctionType]:
    """The functions of a class and of its base classes, as far as the user wrote them."""
    functions = []
    for base in filter(is_own, cls.__mro__):
        members = (inspect.unwrap(item) for item in vars(base).values() if callable(item))
        functions += [item for item in members if isinstance(item, FunctionType)]
    return functions


def constants(functions: Iterable[FunctionType]) -> dict[str, Any]:
    """The global numbers, texts and tensors that functions use, by name."""
    return {
        name: plain(function.__globals__[name])
        for function in functions
        for name in function.__code__.co_names
        if isinstance(function.__globals__.get(name, ...), (*SCALARS, Tensor)) and not name.startswith("__")
    }


def _code(code: CodeType, doc: str | None = None) -> list[Any]:
    values = [None if doc is not None and value == doc else value for value in code.co_consts]
    return [
        code.co_code.hex(),
        list(code.co_names),
        list(code.co_freevars),
        [_code(value) if isinstance(value, CodeType) else _constant(value) for value in values],
    ]


def _constant(value: Any) -> str:
    return repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value)


def _function(function: FunctionType, inner: Callable[[Any], Any]) -> dict[str, Any]:
    described: dict[str, Any] = {"function": function.__qualname__}
    if is_own(function):
        closure = inspect.getclosurevars(function).nonlocals
        defaults = [*(function.__defaults__ or ()), function.__kwdefaults__ or {}]
        described |= {"code": code_of([function]), "closure": inner(closure), "defaults": inner(defaults)}
        described |= {"constants": constants([function])}
    return described


def _object(value: Any, inner: Callable[[Any], Any]) -> Any:
    cls = type(value)
    if hasattr(value, "__qualname__"):  # a function that is not written in Python
        return value.__qualname__
    if isinstance(value, torch.dtype | torch.device | Path):
        return str(value)
    own, luce = is_own(cls), cls.__module__.partition(".")[0] == "luce"
    if not (own or luce or isinstance(value, nn.Module) or dataclasses.is_dataclass(value)):
        return name_of(cls)
    names = list(getattr(value, "__dict__", {}))
    if dataclasses.is_dataclass(value) and not (own and names):
        names = [field.name for field in dataclasses.fields(value)]
    names = [name for name in names if name not in INTERNAL and not (luce and name in PASSING)]
    described = {"class": name_of(cls), **{name: inner(getattr(value, name)) for name in names}}
    if isinstance(value, nn.Module):
        tensors = [*value.named_parameters(recurse=False), *value.named_buffers(recurse=False)]
        parts = (*tensors, *value.named_children())
        described |= {name: inner(part) for name, part in parts if name not in described}
    if own and (functions := own_functions(cls)):
        described |= {"code": code_of(functions), "constants": constants(functions)}
    return described
