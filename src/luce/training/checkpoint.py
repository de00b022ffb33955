"""Checkpoints to resume from, and exported weights."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import load
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import files, manifest, models
from ..documents import read_json
from ..errors import UserError
from ..trust import Trusted
from .processes import processes
from .weights import load_weights as load_weights
from .weights import read_weights as read_weights

State = dict[str, Any]
ASIDE = ".checkpoint.part"
NAME = re.compile(r"checkpoint-([0-9]+)")

BEST, LAST, DESCRIPTION = "student.safetensors", "student-last.safetensors", "student.json"
RESTORE = "restore it from a copy, or train again in another folder"


def save(folder: Path, accelerator: Accelerator, epoch: int, extra: State) -> None:
    """Write a checkpoint and remove the previous one; an interruption leaves one of the two complete.

    Args:
        folder: Of the run.
        accelerator: Saves model, optimizer and the random states of all processes.
        epoch: The last finished epoch.
        extra: The rest of the state; tensors and plain values only.
    Raises:
        UserError: If the files cannot be written.
    """
    aside, final = folder / ASIDE, folder / f"checkpoint-{epoch}"
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
    # No process may write before the remains of an interrupted save are removed.
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(aside))
        accelerator.wait_for_everyone()  # each process writes its random state
        if accelerator.is_main_process:
            torch.save(extra, aside / "luce.pt")
            manifest.write(
                aside, (str(path.relative_to(aside)) for path in aside.rglob("*") if path.is_file())
            )
            # Listed before the new checkpoint has its name, or it would be deleted with the older ones.
            older = _checkpoints(folder)
            mode = (aside / "luce.pt").stat().st_mode
            for path in aside.iterdir():
                files.settle(path, mode)
            # Renamed when complete, and older ones deleted after: an interruption leaves a whole one.
            files.rename(aside, final)
            for path in older:
                shutil.rmtree(path)
    except (*files.FAILURES, UserError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"cannot write a checkpoint to {folder} ({files.reason(error)}); free some space"
        ) from error
    # No process may go on, and perhaps end the run, while the checkpoint is still incomplete.
    accelerator.wait_for_everyone()


def restore(folder: Path, accelerator: Accelerator) -> State | None:
    """Load the latest checkpoint into the accelerator.

    Returns:
        The `extra` of `save`; None without a checkpoint.
    Raises:
        UserError: If the checkpoint is damaged, cannot be read or belongs to another network.
    """
    checkpoints = _checkpoints(folder)
    if not checkpoints:
        return None
    latest = checkpoints[-1]
    try:
        manifest.check(latest)
        accelerator.load_state(str(latest))
        # The accelerator ignores random states that it cannot read: the run would then differ.
        load(str(latest / f"random_states_{accelerator.process_index}.pkl"))
        return torch.load(latest / "luce.pt", weights_only=True)
    except Exception as error:  # damaged files raise anything, and all have the same remedy
        raise UserError(
            f"cannot resume from {latest} ({files.reason(error)}); "
            "delete this folder to start again, or restore it from a copy"
        ) from error


def clear(folder: Path) -> None:
    """Remove the checkpoints of a finished run, whose weights are exported; a folder may be read-only."""
    if processes().is_main_process:
        for path in (*_checkpoints(folder), folder / ASIDE):
            shutil.rmtree(path, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    # Not a copy such as `checkpoint-9.bak`. By number: as text checkpoint-10 comes before checkpoint-9.
    epochs = {path: int(found[1]) for path in folder.glob("*") if (found := NAME.fullmatch(path.name))}
    return sorted(epochs, key=epochs.__getitem__)


def export(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write the weights of a student as safetensors, under the names of its network.

    Raises:
        UserError: If the file cannot be written.
    """
    # Clones: safetensors refuses tensors that share memory, as tied weights do.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    files.write(path, lambda aside: save_file(plain, aside))


def build(
    name: str, options: Mapping[str, Any], *, classes: int, input_shape: Sequence[int], weights: Path
) -> nn.Module:
    """Build a network and load all its weights from a file.

    Raises:
        UserError: As `luce.models.build` and `load_weights` do, or if the file differs from its digest.
    """
    if weights.name in (manifest.read(weights.parent) or ()):
        manifest.check(weights.parent, [weights.name], remedy=RESTORE)
    body = models.empty(name, options, classes=classes, input_shape=input_shape)
    load_weights(body, weights)
    return body


def describe(
    name: str,
    options: Mapping[str, Any],
    classes: tuple[str, ...],
    input_shape: tuple[int, ...],
    mean: list[float],
    std: list[float],
) -> dict[str, Any]:
    """Return the description from which `load_student` builds the network again."""
    return {
        "model": name,
        "options": dict(options),
        "classes": list(classes),
        "input_shape": list(input_shape),
        "mean": mean,
        "std": std,
    }


def seal(folder: Path, description: Mapping[str, Any]) -> None:
    """Write the description of a run's exported student, and digests of it and of the weights.

    Raises:
        UserError: If a file cannot be written.
    """
    files.write_json(folder / DESCRIPTION, description)
    if files.is_main_process():
        manifest.write(folder, (BEST, LAST, DESCRIPTION))


def load_student(folder: Path, *, trusted: Trusted = False) -> tuple[models.Classifier, dict[str, Any]]:
    """Load the exported student of a run folder and its description.

    Args:
        folder: Of a finished run.
        trusted: Whether the folder may name any code; or the names that the user's own recipe gives and that
            it may repeat.
    Raises:
        UserError: If the folder holds no exported student, a damaged one, or one that needs `trusted`.
    """
    path, weights = folder / DESCRIPTION, folder / BEST
    try:
        if not path.is_file():
            raise UserError(f"expected {folder} to be a finished run with an exported student, got none")
        manifest.check(folder, (DESCRIPTION, BEST), remedy=RESTORE)
        description = read_json(path)
        name, options, mean, std = (description[key] for key in ("model", "options", "mean", "std"))
        models.check_description(name, options, path, trusted)
        shape = {"classes": len(description["classes"]), "input_shape": description["input_shape"]}
        models.check_size(name, options, **shape, file=weights)
        body = models.empty(name, options, **shape)
        load_weights(body, weights)
        return models.Classifier(body, mean, std).eval(), description
    except UserError:
        raise
    except Exception as error:  # a file of others may hold anything
        raise UserError(
            f"expected {folder} to be a finished run with an exported student ({files.reason(error)})"
        ) from error
