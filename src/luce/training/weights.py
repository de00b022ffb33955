"""Weights from files as other tools write them, read without running code from them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .. import files, log
from ..errors import UserError, listed

ENTRIES = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights"),
    *("params", "state_dict_ema", "model_ema", "ema", "params_ema"),
)
"""Entries of a file under which tools keep the weights of a network; earlier ones are preferred."""

DEPTH = 2
"""Largest number of mappings around the weights."""

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of names that stand for a wrapper of PyTorch."""

COUNTER = "num_batches_tracked"
"""End of names that files of early versions of PyTorch lack; loading fills them."""

PACKED = "luce-packed"
"""The format of packed students in the metadata of their files."""


class _Beside:
    """Stands for a value beside the weights, such as a NumPy scalar: takes everything and keeps nothing."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


BESIDE = (
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray", "argparse.Namespace"),
    *(f"pathlib{part}.{system}Path" for part in ("", "._local") for system in ("", "Posix", "Windows")),
)
"""Names in a pickle that are read as `_Beside`: NumPy's own objects would trust the sizes in the file."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return tensors by name from a safetensors or PyTorch file, without executing code from it.

    Other tools write the weights as one entry of a mapping, such as ``state_dict`` or ``model``, beside other
    values. The entry is taken out; the names of its tensors stay as they are.

    Raises:
        UserError: If the file cannot be read, or holds no tensors by name.
    """
    return _read(path)[0]


def load_weights(model: nn.Module, path: Path) -> None:
    """Load weights into a plain network; all names and shapes must agree.

    Wrappers of PyTorch (``module``, ``_orig_mod``) are taken out of the names wherever they stand, and one
    prefix from all of them, such as Lightning's ``model.``; tensors beside that prefix are left out. Weights
    of fewer bits become those of the network's dtype.

    Raises:
        UserError: If the file cannot be read or its tensors are not those of the network.
    """
    given, entry = _read(path)
    own = model.state_dict()
    prefix, weights = _renamed(given, own, path)
    weights |= _tied(weights, own)
    problems = _misfits(weights, own)
    try:
        if not problems:
            model.load_state_dict(weights)
    except RuntimeError as error:  # what a network of somebody else's checks
        problems = [files.reason(error)]
    if problems:
        read = f" (of its entry `{entry}`)" * bool(entry) + f" (without the prefix `{prefix}`)" * bool(prefix)
        raise UserError(
            f"the checkpoint {path}{read} does not fit the network: {'; '.join(problems)}; "
            "give the `name` and `options` that it was trained with"
        )
    loaded = model.state_dict()
    if broken := [name for name in weights if not loaded[name].isfinite().all()]:
        log.warning(
            f"the checkpoint {path} has infinite or undefined numbers in {listed(broken)}, as those "
            "become that are too large for their dtype; save it in float32"
        )


def _read(path: Path) -> tuple[dict[str, Tensor], str]:
    """Return tensors by name, and the entry of the file that holds them."""
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path), ""
        with (
            torch.serialization.safe_globals([(_Beside, name) for name in BESIDE]),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # of other kinds of files, which end in an error
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError) as error:
        if "TorchScript" in str(error):
            raise UserError(
                f"expected weights in {path}, got a TorchScript archive, which is code; save the state_dict "
                "of the network"
            ) from error
        raise UserError(f"cannot read the checkpoint {path} ({files.reason(error)})") from error
    except UserError:
        raise
    except Exception as error:  # the unpickler raises anything
        raise UserError(
            f"{path} is damaged, or holds more than tensors, which Luce does not load; "
            "save its state_dict as safetensors"
        ) from error
    found = _entries(content)
    known = [entry for name in ENTRIES for entry in found if entry.split(".")[-1] == name]
    if not found or (len(found) > 1 and not known):
        what = f"one network, got {listed(found)}" if found else "tensors by name, as state_dict() gives them"
        raise UserError(f"expected {path} to hold {what}; save the state_dict of a network alone")
    entry = (known or list(found))[0]
    if len(known) > 1:
        others = listed(f"`{other}`" for other in known[1:])
        log.info(f"the checkpoint {path} holds weights in several entries: reads `{entry}`, not {others}")
    return found[entry], entry


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("format") == PACKED:
            raise UserError(
                f"expected weights in {path}, got a packed student, for luce.runs.export.read_packed; "
                "name the run folder that it was packed from"
            )
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _entries(content: object, path: tuple[str, ...] = ()) -> dict[str, dict[str, Tensor]]:
    """Return the mappings from names to tensors in a file, by the entry that holds them."""
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        return {}
    inner: dict[str, dict[str, Tensor]] = {}
    for name, value in content.items() if len(path) < DEPTH else ():
        inner |= _entries(value, (*path, name))
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    return inner or ({".".join(path): tensors} if tensors else {})


def _renamed(
    given: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path
) -> tuple[str, dict[str, Tensor]]:
    """Return the prefix that a file puts before the names of a network, and its tensors under those names.

    If no prefix fits as the names are, wrappers of PyTorch within them are left out.

    Raises:
        UserError: If the whole network is found under several prefixes.
    """
    if given.keys() == own.keys():
        return "", dict(given)
    found = "", dict(given)
    for spell in (str, _unwrapped):
        names, tensors = {spell(name): name for name in own}, {spell(name): given[name] for name in given}
        if len(names) < len(own) or len(tensors) < len(given):
            break
        wanted = {name for name in names if not name.endswith(COUNTER)}
        count = _prefixes(tensors, wanted)
        whole = [prefix for prefix in count if count[prefix] == len(wanted)]
        if len(whole) > 1 and "" not in whole:
            raise UserError(
                f"expected one network in {path}, got several that fit, under the prefixes {listed(whole)}; "
                "save the state_dict of one of them"
            )
        prefix = "" if "" in whole or not count else count.most_common(1)[0][0]
        inside = {name: value for name, value in tensors.items() if name.startswith(prefix) or not whole}
        plain = {name.removeprefix(prefix): value for name, value in inside.items()}
        found = prefix, {names.get(name, name): value for name, value in plain.items()}
        if whole:
            if left := [name for name in tensors if name not in inside]:
                log.info(
                    f"the checkpoint {path} holds the network under `{prefix}`: leaves out {listed(left)}"
                )
            break
    return found


def _prefixes(names: Iterable[str], wanted: set[str]) -> Counter[str]:
    """Return what stands before the wanted names in others, with the number of names that are found so."""
    ends = ((name, name.split(".", at)[-1]) for name in names for at in range(name.count(".") + 1))
    return Counter(name.removesuffix(end) for name, end in ends if end in wanted)


def _unwrapped(name: str) -> str:
    """Return a name without the parts that stand for wrappers of PyTorch."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _tied(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights that a file holds under another name of the same tensor, as safetensors does."""
    places = {_place(own[name]): value for name, value in weights.items() if name in own}
    missing = {name: _place(value) for name, value in own.items() if name not in weights}
    return {name: places[place] for name, place in missing.items() if place in places}


def _place(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    """Return what two names of one tensor have in common."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _misfits(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Return a sentence for each way in which weights differ from those of a network."""
    both = [name for name in weights if name in own]
    found = {
        "missing": [name for name in own if name not in weights and not name.endswith(COUNTER)],
        "unexpected": [name for name in weights if name not in own],
        "other shapes": [
            f"{name} is {tuple(weights[name].shape)}, not {tuple(own[name].shape)}"
            for name in both
            if weights[name].shape != own[name].shape
        ],
        # Copied, a quantised file would be taken for weights although it holds steps of a scale.
        "no floating numbers": [
            f"{name} is {weights[name].dtype}"
            for name in both
            if own[name].is_floating_point() and not weights[name].is_floating_point()
        ],
    }
    return [f"{kind}: {listed(names, 2)}" for kind, names in found.items() if names]
