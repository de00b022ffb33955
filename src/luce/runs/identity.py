"""The identity of a training: everything that makes its numbers, as plain values and digests.

It is written into the folder of a training and compared whenever that folder is used again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import digest
from ..data import Data, Examples
from ..data.fingerprint import of_rows, of_source
from ..data.text import Tokenizer
from ..methods import Method, MutualLearning
from ..models import Classifier
from ..models.modes import resting
from ..recipes.build import RunInputs
from ..recipes.teacher import OpenTeacher
from ..remote import RemoteTeacher
from ..signals import BlackBox, CachedTeacher, LiveTeacher, LocalBlackBox, Teacher
from .plain import SCALARS, code_of, constants, is_own, name_of, own_functions, plain

Identity = Mapping[str, Any]

SHOWN = 3
"""Differing fields that a message names."""
LONG = 40
"""Characters of a value in a message."""
DIGEST = re.compile(rf"(?:[0-9.]+:)?([0-9a-f]{{6}})[0-9a-f]{{{2 * digest.BYTES - 6}}}")
"""A digest, with the version of Python if it is one of code; a message shows its beginning."""
ABSENT = object()
_trained: WeakKeyDictionary[Any, tuple[Path, Any, Any]] = WeakKeyDictionary()
"""Networks and losses that this process has trained: in which folder, and their identity after and before."""


def of_network(network: nn.Module) -> dict[str, Any]:
    """Describe a network by digests of its structure and weights; a `Classifier` also by its other values.

    The structure holds classes of modules, their options, names and shapes of tensors, and the code of
    classes that the user wrote.
    """
    wrapping = {}
    if isinstance(network, Classifier):
        wrapping = {"mean": network.mean.tolist(), "std": network.std.tolist(), **_order(network.order)}
        network = network.body
    state = {
        name: value
        for name, value in network.state_dict().items()
        if isinstance(value, Tensor) and not is_lazy(value)
    }
    shapes = [[name, str(value.dtype), list(value.shape)] for name, value in sorted(state.items())]
    modules = [[name, *_options(module)] for name, module in network.named_modules()]
    own = sorted({type(module) for module in network.modules() if is_own(type(module))}, key=name_of)
    functions = [function for cls in own for function in own_functions(cls)]
    return {
        "class": name_of(type(network)),
        "architecture": digest.of_json([modules, shapes]),
        **({"code": code_of(functions), "constants": constants(functions)} if own else {}),
        "weights": digest.of_tensors(state),
        **wrapping,
    }


def _order(order: Tensor | None) -> dict[str, Any]:
    """Describe in which order the logits of a network are given, if not in its own."""
    return {} if order is None else {"order": order.tolist()}


def rounded(values: Sequence[float]) -> list[float]:
    """Round statistics of data, whose last digits depend on the number of threads.

    >>> rounded([0.30522585172513494])
    [0.305226]
    """
    return [float(f"{value:.6g}") for value in values]


def _options(module: nn.Module) -> list[Any]:
    """Class and options of a module; a name that changes when a folder is moved is none."""
    attributes = {
        name: value if isinstance(value, SCALARS) else getattr(value, "__name__", None)
        for name, value in sorted(vars(module).items())
        if not name.startswith("_") and name not in ("training", "name_or_path")
    }
    return [name_of(type(module)), module.extra_repr(), attributes]


def of_student(student: nn.Module) -> dict[str, Any]:
    """Describe a student as `of_network`, with the parameters that are not trained, and `resting` modules."""
    frozen = [name for name, value in student.named_parameters() if not value.requires_grad]
    at_rest = set(resting(student))
    evaluated = [name for name, module in student.named_modules() if module in at_rest]
    return {**of_network(student), "frozen": frozen, "in_evaluation_mode": evaluated}


def of_teacher(teacher: Teacher | nn.Module) -> Any:
    """Describe a teacher without a query: a network as `of_network`, a server as it describes itself."""
    if isinstance(teacher, nn.Module):
        return of_network(teacher)
    described: dict[str, Any] = {"class": name_of(type(teacher))}
    if isinstance(teacher, BlackBox):
        described |= {"answers": teacher.answers, "top_k": teacher.top_k, "floor": teacher.floor}
        described |= _order(teacher.order)
    if isinstance(teacher, RemoteTeacher):
        service = teacher.service
        return {**described, "url": teacher.url, "model": service.model, "classes": plain(service.names)}
    if isinstance(teacher, LocalBlackBox):
        return {**of_network(teacher.model), **described}
    if type(teacher) is LiveTeacher:
        return of_network(teacher.network)
    if type(teacher) is CachedTeacher:
        return {**described, "logits": plain(teacher.logits)}
    return plain(teacher)


def of_data(data: Data, parts: Mapping[str, Examples]) -> dict[str, Any]:
    """Describe loaded data and parts of it.

    Args:
        data: As loaded.
        parts: Rows by name: of ``data.test`` under the name ``test``, else of ``data.train``.
    """
    sources = {name: data.test if name == "test" else data.train for name in parts}
    inputs = {source: of_source(source) for source in {*sources.values()}}  # type: ignore[arg-type]
    return {
        "classes": list(data.classes),
        "input_shape": list(data.input_shape),
        **{name: of_rows(rows, inputs[sources[name]]) for name, rows in parts.items()},
        "mean": rounded(data.mean),
        "std": rounded(data.std),
        "tokenizer": _of_tokenizer(data.tokenizer),
    }


def of_examples(rows: Examples) -> dict[str, Any]:
    """Describe rows with the inputs of their source."""
    return of_rows(rows, of_source(rows.source))


def _of_tokenizer(tokenizer: Tokenizer | None) -> dict[str, Any] | None:
    if tokenizer is None:
        return None
    return {"size": tokenizer.size, "padding": tokenizer.padding, "max_length": tokenizer.max_length}


def of_inputs(
    inputs: RunInputs, opened: OpenTeacher | None = None, *, teacher: bool = True
) -> dict[str, Any]:
    """Describe the data and the teacher of a run, which runs of a comparison share.

    Args:
        inputs: Of the run.
        opened: The teacher from `luce.recipes.teacher.open_teacher`, if the inputs have none.
        teacher: Whether to describe the teacher.
    """
    parts = {"train": inputs.train, "validation": inputs.validation, "test": inputs.test}
    described: dict[str, Any] = {"data": of_data(inputs.data, parts)}
    if not teacher:
        return described
    source: Any = opened[0] if isinstance(opened, tuple) else opened
    if inputs.teacher is not None:
        source = inputs.teacher.source
    return {**described, "teacher": None if source is None else of_teacher(source)}


def of_peers(method: Method) -> dict[str, Any]:
    """Describe the networks that a recipe's method trains beside the student, which may have checkpoints."""
    part: Method | None = method
    while part is not None:
        if isinstance(part, MutualLearning) and part.new_peer is not None:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                return {"peer": of_network(part.new_peer())}
        part = part.inner
    return {}


def differences(there: Any, here: Any, place: str = "") -> Iterator[str]:
    """Yield each field in which two nested plain values differ, with both values.

    >>> list(differences({"training": {"epochs": 40, "lr": 0.1}}, {"training": {"epochs": 60, "lr": 0.1}}))
    ['training.epochs: 40 there, 60 here']
    """
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for kind in ("class", "function"):
            if there.get(kind) != here.get(kind):
                yield f"{place}: {_shown(there)} there, {_shown(here)} here"
                return
        for key in {**there, **here}:
            inner = f"{place}.{key}" if place else str(key)
            yield from differences(there.get(key, ABSENT), here.get(key, ABSENT), inner)
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for index, pair in enumerate(zip(there, here, strict=True)):
            yield from differences(*pair, f"{place}[{index}]")
    elif not (there == here or repr(there) == repr(here) or _of_two_pythons(place, there, here)):
        yield f"{place}: {_shown(there)} there, {_shown(here)} here"


def _of_two_pythons(place: str, there: Any, here: Any) -> bool:
    """Whether these are digests of code from two versions of Python, which tell nothing."""
    if not (place.endswith(".code") and isinstance(there, str) and isinstance(here, str)):
        return False
    return there.partition(":")[0] != here.partition(":")[0]


def _shown(value: Any) -> str:
    if value is ABSENT:
        return "nothing"
    if isinstance(value, Mapping):
        return str(value.get("class") or value.get("function") or f"{len(value)} entries")
    text = str(value)
    if found := DIGEST.fullmatch(text):
        return found[1]
    if isinstance(value, list) and len(text) > LONG:
        return f"{len(value)} entries"
    return text if len(text) <= LONG else f"{text[: LONG - 4]} ..."


def named(found: list[str]) -> str:
    """Join differences for a message.

    >>> named(["a: 1 there, 2 here", "b: 1 there, 2 here", "c: 1 there, 2 here", "d: 1 there, 2 here"])
    'a: 1 there, 2 here; b: 1 there, 2 here; c: 1 there, 2 here; and 1 more'
    """
    more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return "; ".join(found[:SHOWN] + more)


Parts = Mapping[str, tuple[Any, Callable[[Any], Any]]]
"""Things by name, each with the function that describes it."""


def of_parts(parts: Parts, folder: Path) -> dict[str, Any]:
    """Describe things as they were before this process trained them in a folder, if it did and nobody since.

    So a second call with the same objects, whose weights the first one has trained, is the same training.
    """
    described = {}
    for name, (thing, describe) in parts.items():
        now = describe(thing)
        place, after, before = _trained_in(thing)
        described[name] = before if place == folder.resolve() and after == now else now
    return described


def remember(parts: Parts, folder: Path, before: Identity) -> None:
    """Keep what `of_parts` needs, after a training or its interruption."""
    for name, (thing, describe) in parts.items():
        with suppress(TypeError):  # it has no hash or admits no weak reference
            _trained[thing] = (folder.resolve(), describe(thing), before[name])


def _trained_in(thing: Any) -> tuple[Any, Any, Any]:
    with suppress(TypeError):
        return _trained.get(thing) or (None, None, None)
    return None, None, None
