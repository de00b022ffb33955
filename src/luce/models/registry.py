"""Native networks by name, and the function that builds a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import UserError, unknown_name
from . import loaders
from .binary import binarize_, split_options
from .mobilenet import mobilenetv2
from .network import Network, positive_integers
from .resnet import resnet, resnet50
from .shufflenet import shufflenetv1, shufflenetv2
from .simkd import simkd
from .small import cnn, conv_stride, mlp
from .vgg import vgg
from .vgg_pool import vgg_pool
from .wide_resnet import wide_resnet

THIN = (16, 16, 32, 64)
WIDE = (32, 64, 128, 256)

# Arguments that a name fixes are bound by position, so that only the keywords of the builder are options.
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "conv_stride": conv_stride,
    "resnet8": partial(resnet, 8, THIN),
    "resnet14": partial(resnet, 14, THIN),
    "resnet20": partial(resnet, 20, THIN),
    "resnet32": partial(resnet, 32, THIN),
    "resnet44": partial(resnet, 44, THIN),
    "resnet56": partial(resnet, 56, THIN),
    "resnet110": partial(resnet, 110, THIN),
    "resnet8x4": partial(resnet, 8, WIDE),
    "resnet32x4": partial(resnet, 32, WIDE),
    "resnet50": resnet50,
    "wrn_16_1": partial(wide_resnet, 16, 1),
    "wrn_16_2": partial(wide_resnet, 16, 2),
    "wrn_40_1": partial(wide_resnet, 40, 1),
    "wrn_40_2": partial(wide_resnet, 40, 2),
    "vgg8": partial(vgg, (1, 1, 1, 1, 1)),
    "vgg11": partial(vgg, (1, 1, 2, 2, 2)),
    "vgg13": partial(vgg, (2, 2, 2, 2, 2)),
    "vgg16": partial(vgg, (2, 2, 3, 3, 3)),
    "vgg19": partial(vgg, (2, 2, 4, 4, 4)),
    "vgg_pool": vgg_pool,
    "mobilenetv2": mobilenetv2,
    "shufflenetv1": shufflenetv1,
    "shufflenetv2": shufflenetv2,
}


def simkd_student(
    name: str, options: Mapping[str, Any], *, classes: int, input_shape: tuple[int, ...]
) -> nn.Module:
    """Build SimKD's student from two native networks: ``name`` and the one in the option ``teacher``.

    Further options are ``teacher_options``, ``factor`` of `luce.models.simkd`, and those of ``name``.
    """
    rest = dict(options)
    teacher_name, teacher_options = rest.pop("teacher", None), rest.pop("teacher_options", {})
    factor = rest.pop("factor", 2)
    for which in (name, teacher_name):
        if which not in names():
            raise UserError(
                "expected `simkd:STUDENT` with the option `teacher`, both names of native networks, "
                f"got `{which}`"
            )
    if not isinstance(teacher_options, Mapping) or {"classes", "input_shape"} & teacher_options.keys():
        raise UserError(
            "expected `teacher_options` to be a mapping such as {widths: [8, 16]}, without `classes` and "
            f"`input_shape`, which the student determines, got {teacher_options!r}"
        )
    student = build(name, classes=classes, input_shape=input_shape, **rest)
    # Only the architecture is used; building it must not advance the random state of the run.
    with torch.random.fork_rng([]):
        teacher = build(teacher_name, classes=classes, input_shape=input_shape, **teacher_options)
    assert isinstance(student, Network)
    assert isinstance(teacher, Network)
    return simkd(student, teacher, input_shape=input_shape, factor=factor)


def binary_student(
    name: str, options: Mapping[str, Any], *, classes: int, input_shape: tuple[int, ...]
) -> nn.Module:
    """Build a network with binary weights except in its first and last layer; see `luce.models.binary`.

    Options are ``gradient_scale`` and those of ``name``.
    """
    gradient_scale, rest = split_options(options)
    return binarize_(build(name, classes=classes, input_shape=input_shape, **rest), gradient_scale)


LOADERS: dict[str, Callable[..., nn.Module]] = {
    "timm": loaders.from_timm,
    "torchvision": loaders.from_torchvision,
    "hf": loaders.from_hugging_face,
    "python": loaders.from_python,
    "simkd": simkd_student,
    "binary": binary_student,
}


def names() -> tuple[str, ...]:
    """Return the names of the native networks."""
    return tuple(NETWORKS)


def build(name: str, *, classes: int, input_shape: Sequence[int] = (3, 32, 32), **options: Any) -> nn.Module:
    """Build a classifier from ``(N, *input_shape)`` float tensors to ``(N, classes)`` logits.

    Args:
        name: One of :func:`names`, or a source and a name: ``timm:NAME``; ``torchvision:NAME``; ``hf:NAME``,
            a hub id or a local folder, for images or text (see `luce.models.loaders.from_hugging_face`);
            ``python:package.module.attribute``, a function or class, called with ``classes`` and
            ``input_shape`` if it accepts them; ``simkd:NAME``, a native network that ends in its teacher's
            classifier (`luce.models.simkd`); ``binary:NAME``, any of these with binary weights
            (`luce.models.binary`).
        classes: Number of classes, at least 1.
        input_shape: Shape of one example, ``(channels, height, width)`` for images; text models ignore it.
        options: Options of the builder, for example ``hidden=(256, 256)`` for ``mlp``, ``widths`` for
            ``cnn``, ``pretrained=True`` for timm, ``weights="DEFAULT"`` for torchvision, and for ``hf:``
            fields of the config such as ``num_hidden_layers=2``, or ``pretrained=False``.

    Returns:
        The model. A Hugging Face model returns an object, not a tensor: :func:`~luce.models.logits_of` reads
        the logits of either.

    Raises:
        UserError: If the name or an option is unknown, a shape does not fit, or the result is not a module.
        MissingExtra: If the library of the source is not installed.

    Example:
        >>> from torch import zeros
        >>> build("mlp", classes=10, input_shape=(1, 8, 8), hidden=[64, 32])(zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """
    if type(classes) is not int or classes < 1:
        raise UserError(f"expected `classes` as a positive integer, got {classes!r}")
    shape = positive_integers("input_shape", input_shape)
    source, colon, rest = name.partition(":")
    if colon:
        if source not in LOADERS:
            raise unknown_name("source of models", source, LOADERS)
        model = LOADERS[source](rest, options, classes=classes, input_shape=shape)
    else:
        if name not in NETWORKS:
            raise unknown_name("model", name, NETWORKS)
        model = loaders.call(name, NETWORKS[name], options, classes=classes, input_shape=shape)
    if not isinstance(model, nn.Module):
        raise UserError(f"expected `{name}` to return a torch.nn.Module, got {type(model).__name__}")
    return model
