"""``luce info``: versions, devices and optional packages."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

EXTRAS = {
    "vision": ("timm", "torchvision"),
    "text": ("transformers", "datasets"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "check": ("hypothesis",),
    "remote": ("httpx2",),
    "serve": ("starlette", "uvicorn"),
    "track": ("tensorboard", "wandb"),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Show versions, devices, optional packages, and the names of losses, models and data."""


def main(_: Options, __: str) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    from .. import data, losses, models, ops
    from ..runs.environment import environment

    table = Table(show_header=False, box=None)
    for name, value in environment().items():
        if value is not None:
            table.add_row(name, str(value))
    kernels = ops.describe()
    table.add_row("kernels", f"{kernels['backend']}, {kernels['instruction_set']}")
    table.add_row("kernels, CUDA", ops.describe_gpu())
    for extra, packages in EXTRAS.items():
        versions = [f"{package} {_version(package) or 'not installed'}" for package in packages]
        table.add_row(f"extra {extra}", ", ".join(versions))
    table.add_row("losses", ", ".join(name for name in losses.modules.__all__ if name.endswith("Loss")))
    table.add_row("models", ", ".join(models.names()))
    table.add_row("data", ", ".join(data.names()))
    Console().print(table)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
