"""Checkpoints to resume from, and exported weights."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import load
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import files, models
from ..documents import read_json
from ..errors import UserError
from .processes import processes
from .weights import load_weights as load_weights
from .weights import read_weights as read_weights

State = dict[str, Any]


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
    aside, final = folder / ".checkpoint.part", folder / f"checkpoint-{epoch}"
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
    # No process may write before the remains of an interrupted save are removed.
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(aside))
        accelerator.wait_for_everyone()  # each process writes its random state
        if accelerator.is_main_process:
            torch.save(extra, aside / "luce.pt")
            # Listed before the new checkpoint has its name, or it would be deleted with the older ones.
            older = _checkpoints(folder)
            mode = (aside / "luce.pt").stat().st_mode
            for path in aside.iterdir():
                files.settle(path, mode)
            # Renamed when complete, and older ones deleted after: an interruption leaves a whole one.
            files.rename(aside, final)
            for path in older:
                shutil.rmtree(path)
    except files.FAILURES as error:
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
        UserError: If the checkpoint cannot be read or belongs to another network.
    """
    checkpoints = _checkpoints(folder)
    if not checkpoints:
        return None
    latest = checkpoints[-1]
    try:
        accelerator.load_state(str(latest))
        # The accelerator ignores random states that it cannot read: the run would then differ.
        load(str(latest / f"random_states_{accelerator.process_index}.pkl"))
        return torch.load(latest / "luce.pt", weights_only=True)
    except Exception as error:  # damaged files raise anything, and all have the same remedy
        raise UserError(
            f"cannot resume from {latest} ({files.reason(error)}); delete it to start again"
        ) from error


def clear(folder: Path) -> None:
    """Remove the checkpoints of a finished run, whose weights are exported."""
    if processes().is_main_process:
        for path in _checkpoints(folder):
            shutil.rmtree(path)


def _checkpoints(folder: Path) -> list[Path]:
    # By number: as text checkpoint-10 comes before checkpoint-9.
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


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
        UserError: As `luce.models.build` and `load_weights` do.
    """
    body = empty(name, options, classes=classes, input_shape=input_shape)
    load_weights(body, weights)
    return body


def empty(name: str, options: Mapping[str, Any], *, classes: int, input_shape: Sequence[int]) -> nn.Module:
    """Build a network whose weights will all be replaced, without loading pretrained ones.

    Raises:
        UserError: As `luce.models.build` does.
    """
    if name.removeprefix("binary:").startswith("hf:"):  # it would load the checkpoint that it came from
        options = {**options, "pretrained": False}
    return models.build(name, classes=classes, input_shape=input_shape, **options)


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


def load_student(folder: Path) -> tuple[models.Classifier, dict[str, Any]]:
    """Load the exported student of a run folder and its description.

    Raises:
        UserError: If the folder holds no exported student.
    """
    if not (folder / "student.json").is_file():
        raise UserError(f"expected {folder} to be a finished run with an exported student, got none")
    description = read_json(folder / "student.json")
    try:
        body = build(
            description["model"],
            description["options"],
            classes=len(description["classes"]),
            input_shape=description["input_shape"],
            weights=folder / "student.safetensors",
        )
        student = models.Classifier(body, description["mean"], description["std"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"expected {folder} to be a finished run with an exported student ({files.reason(error)})"
        ) from error
    return student.eval(), description
