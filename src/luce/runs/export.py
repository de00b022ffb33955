"""Export of a student: as ONNX, or packed with one bit per binary weight."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import digest, files, log, models
from ..documents import load_json
from ..errors import UserError, import_optional, one_line
from ..models.binary import baked, binary_layers, binary_parts
from ..training.weights import PACKED as FORMAT

Description = dict[str, Any]

VERSION = "2"
WITHOUT_DIGEST = "1"
"""The version of files that older versions of Luce wrote."""
SIGNS, SCALE = ".signs", ".scale"
AGREES = 1e-3
"""Largest difference of two engines' logits, relative to the largest logit: they sum in different orders."""


# Packed -----------------------------------------------------------------------------------------------------


def write_packed(path: Path, student: models.Classifier, description: Description) -> None:
    """Write one bit per binary weight and one scale per filter, and all other tensors unchanged.

    The bits of a layer are ``NAME.weight.signs``, as bytes with the first weight in the lowest bit, 1 for +1;
    its scales are ``NAME.weight.scale``. The metadata describes the network.

    Args:
        path: Ends in ``.safetensors``.
        student: As `luce.training.checkpoint.load_student` returns it.
        description: Likewise.
    Raises:
        UserError: If it cannot be written.
    """
    tensors = dict(baked(student.body).state_dict())
    for name, layer in binary_layers(student.body).items():
        parts = binary_parts(layer)
        assert parts is not None
        del tensors[f"{name}.weight"]
        tensors[f"{name}.weight{SIGNS}"], tensors[f"{name}.weight{SCALE}"] = pack(parts[0]), parts[1]
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(description)
    metadata = {"format": FORMAT, "version": VERSION, "student": text, "digest": _digest(text, plain)}
    files.write(path, lambda aside: save_file(plain, aside, metadata))


def read_packed(path: Path, *, trusted: bool = False) -> tuple[models.Classifier, Description]:
    """Read the network that `write_packed` wrote, with ordinary layers and bit-identical logits.

    Args:
        path: Of the file.
        trusted: Whether the file may name any code, such as a ``python:`` network.
    Raises:
        UserError: If the file cannot be read, has another format, is damaged, or needs `trusted`.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path} ({files.reason(error)})") from error
    if metadata.get("format") != FORMAT or metadata.get("version") not in (VERSION, WITHOUT_DIGEST):
        raise UserError(
            f"expected {path} to be packed by `luce export --format packed`, version {VERSION}, got format "
            f"{metadata.get('format')}, version {metadata.get('version')}"
        )
    try:
        student = metadata["student"]
        if metadata["version"] == WITHOUT_DIGEST and "digest" not in metadata:
            log.info(f"{path} was packed without a digest, so it is not checked for damage")
        elif metadata["digest"] != _digest(student, tensors):
            raise UserError(f"{path} is damaged: it differs from its digest; restore it or export it again")
        description = load_json(student, path)
        name, options = description["model"], description["options"]
        models.check_description(name, options, path, trusted)
        shape = {"classes": len(description["classes"]), "input_shape": description["input_shape"]}
        models.check_size(name, options, **shape, file=path)
        body = _filled(baked(models.empty(name, options, **shape)), tensors)
        return models.Classifier(body, description["mean"], description["std"]).eval(), description
    except UserError:
        raise
    except Exception as error:  # a file of other software may raise anything
        raise UserError(f"{path} is damaged ({type(error).__name__}: {one_line(error)})") from error


def _digest(student: str, tensors: Mapping[str, Tensor]) -> str:
    """Digest the text that describes the network, and its tensors."""
    return digest.of_json([student, digest.of_tensors(tensors)])


def _filled(body: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Load packed weights into a network without binary layers."""
    weights = dict(tensors)
    for name, shape in {name: tensor.shape for name, tensor in body.state_dict().items()}.items():
        if name + SIGNS in tensors:
            packed, scale = weights.pop(name + SIGNS), weights.pop(name + SCALE)
            signs = unpack(packed, shape)
            if scale.shape != shape[:1]:
                raise ValueError(f"expected {shape[0]} scales of {name}, got {tuple(scale.shape)}")
            weights[name] = scale.view(-1, *[1] * (signs.ndim - 1)) * signs
    body.load_state_dict(weights)
    return body


def pack(signs: Tensor) -> Tensor:
    """Return signs as bits, eight to a byte, the first in the lowest bit; zeros fill the last byte.

    >>> pack(torch.tensor([1.0, -1.0, 1.0]))
    tensor([5], dtype=torch.uint8)
    """
    bits = torch.nn.functional.pad((signs.flatten() > 0).int(), (0, -signs.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, device=bits.device)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """Return the signs that `pack` packed.

    Raises:
        ValueError: If the bytes do not fit the shape.

    >>> unpack(torch.tensor([5], dtype=torch.uint8), torch.Size([3]))
    tensor([ 1., -1.,  1.])
    """
    if packed.dtype != torch.uint8 or packed.shape != (-(-shape.numel() // 8),):
        raise ValueError(f"expected the bits of {tuple(shape)}, got {packed.dtype} {tuple(packed.shape)}")
    bits = (packed.int().unsqueeze(1) >> torch.arange(8)) & 1
    return (2.0 * bits.flatten()[: shape.numel()] - 1.0).view(shape)


# ONNX -------------------------------------------------------------------------------------------------------


def write_onnx(path: Path, student: models.Classifier, description: Description) -> float:
    """Write a network from raw inputs, in any number of rows, to logits; normalisation is part of it.

    Args:
        path: Ends in ``.onnx``.
        student: As `luce.training.checkpoint.load_student` returns it.
        description: Likewise.
    Returns:
        The largest difference from PyTorch's logits under onnxruntime, on random rows.
    Raises:
        MissingExtra: If the extra ``export`` is not installed.
        UserError: If the network cannot be exported, the answers differ, or the file cannot be written.
    """
    for module in ("onnx", "onnxscript", "onnxruntime"):
        import_optional(module, "export")
    network = baked(student).cpu().eval()
    rows = example(network, description, rows=2)
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                network,
                (rows,),
                dynamo=True,
                input_names=["input"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
        content = program.model_proto.SerializeToString()
        difference = _difference(content, network, description)
    except UserError:
        raise
    except Exception as error:  # an exporter raises anything at what it does not know
        raise UserError(f"`{description['model']}` cannot be exported as ONNX: {one_line(error)}") from error
    files.write_bytes(path, content)
    return difference


@torch.no_grad()
def _difference(content: bytes, network: nn.Module, description: Description) -> float:
    """Return the largest difference between the logits of onnxruntime and PyTorch, on one and five rows."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    largest = 0.0
    for count in (1, 5):
        rows = example(network, description, rows=count)
        expected = network(rows)
        (answer,) = session.run(["logits"], {"input": rows.numpy()})
        off = (torch.from_numpy(answer) - expected).abs().max().item()
        if not off <= AGREES * max(1.0, expected.abs().max().item()):
            raise UserError(
                f"expected the same logits from onnxruntime and PyTorch, got a difference of {off:g}"
            )
        largest = max(largest, off)
    return largest


def example(network: nn.Module, description: Description, *, rows: int) -> Tensor:
    """Return random rows of a network's inputs: token ids for a network of texts, else numbers in [0, 1)."""
    shape = (rows, *description["input_shape"])
    random = torch.Generator().manual_seed(rows)
    for module in network.modules():
        if getattr(module, "main_input_name", None) == "input_ids":
            config: Any = module.config
            return torch.randint(config.vocab_size, shape, generator=random)
    return torch.rand(shape, generator=random)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's logs and warnings."""
    import logging

    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
