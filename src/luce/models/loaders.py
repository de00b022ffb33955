"""Models from timm, torchvision, Hugging Face and the user's own Python.

Each door is called as ``door(name, options, classes=..., input_shape=...)``.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import nn

from ..errors import UserError, import_optional, one_line, unknown_name
from .network import image_channels
from .text import mask_padding

Options = Mapping[str, Any]

LISTED = 8
"""Weights that a warning names."""

SETTLED = ("dtype", "num_labels", "torch_dtype", "trust_remote_code")
"""What transformers would take among the fields of a config, and is not the user's to choose here."""


class FreshWeights(UserWarning):
    """Some weights of a network that was to come from a checkpoint are not in it."""


@contextmanager
def fresh_weights_expected() -> Iterator[None]:
    """Without `FreshWeights`: where others take their place at once, or the warning has been given before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FreshWeights)
        yield


def from_timm(name: str, options: Options, *, classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """An architecture of timm, or a scheme of its own such as ``hf-hub:owner/name``."""
    channels = image_channels(input_shape)
    timm = import_optional("timm", "vision")
    if ":" not in name and not timm.is_model(name):
        raise unknown_name("timm model", name, timm.list_models())
    try:
        model: nn.Module = timm.create_model(name, num_classes=classes, in_chans=channels, **options)
    except (TypeError, RuntimeError) as error:
        raise UserError(f"timm model `{name}` cannot be built with these options: {error}") from error
    return model


def from_torchvision(name: str, options: Options, *, classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """An image classifier of torchvision."""
    models = import_optional("torchvision.models", "vision")
    known = models.list_models(module=models)
    if name not in known:
        raise unknown_name("torchvision model", name, known)
    _check_channels(f"torchvision model `{name}`", 3, input_shape)
    try:
        model: nn.Module = models.get_model(name, num_classes=classes, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"torchvision model `{name}` cannot be built with these options: {error}") from error
    return model


def from_hugging_face(
    name: str, options: Options, *, classes: int, input_shape: tuple[int, ...]
) -> nn.Module:
    """A classifier of images or of text from the Hugging Face hub or a local folder.

    The checkpoint's head is kept if it fits ``classes``. Otherwise it starts afresh, which is right for a
    student and never for a teacher: hence the warning. Options are those of the network's config, such as
    ``num_hidden_layers``, which keeps the first ones of the checkpoint; with ``pretrained: false`` all
    weights start afresh. They are float32 even where the checkpoint has fewer bits, which are too few to
    learn with; ``training.precision`` saves memory. No code that comes with a checkpoint is run. A
    classifier of text reads token ids ``(N, T)`` and looks past their padding; see `mask_padding`.
    """
    transformers = import_optional("transformers", "text")
    for option in sorted(options.keys() & set(SETTLED)):
        raise UserError(
            f"`hf:{name}` has no option `{option}`: its weights are float32, its classes those of the data, "
            "and no code of a checkpoint is run"
        )
    settings = {name: value for name, value in options.items() if name != "pretrained"}
    try:
        with _quiet(transformers):
            config, others = transformers.AutoConfig.from_pretrained(
                name, num_labels=classes, return_unused_kwargs=True, trust_remote_code=False, **settings
            )
    except (OSError, ValueError) as error:
        raise UserError(
            f"`hf:{name}` is no model on the hub and no local folder of one: {one_line(error)}"
        ) from error
    except Exception as error:  # an option of another type than the config's has an error of its own
        raise UserError(f"`hf:{name}` cannot be built with these options: {one_line(error)}") from error
    if others:
        raise UserError(
            f"`hf:{name}` cannot be built with these options: {type(config).__name__} has no field "
            f"{', '.join(map(repr, others))}"
        )
    reads_text = False
    if type(config) in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        factory = transformers.AutoModelForImageClassification
        _check_channels(f"`hf:{name}`", getattr(config, "num_channels", 3), input_shape)
    elif type(config) in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        factory, reads_text = transformers.AutoModelForSequenceClassification, True
    else:
        raise UserError(
            f"expected `hf:{name}` to classify images or text, got a model of type `{config.model_type}`, "
            "for which transformers has no classifier"
        )
    try:
        if options.get("pretrained", True):
            model = _from_checkpoint(transformers, factory, name, classes, settings)
        else:
            model = factory.from_config(config)
    except Exception as error:  # wrong options and damaged files fail in many ways
        raise UserError(f"`hf:{name}` cannot be built with these options: {one_line(error)}") from error
    model = model.float()
    return mask_padding(model) if reads_text else model


def _from_checkpoint(
    transformers: ModuleType, factory: Any, name: str, classes: int, settings: Options
) -> nn.Module:
    with _quiet(transformers):
        loaded: tuple[nn.Module, dict[str, Any]] = factory.from_pretrained(
            name,
            num_labels=classes,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
            **settings,
        )
    model, report = loaded
    fresh = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if fresh:
        more = f" and {len(fresh) - LISTED} more" if len(fresh) > LISTED else ""
        warnings.warn(
            f"the checkpoint `hf:{name}` does not fill {', '.join(fresh[:LISTED])}{more} for {classes} "
            "classes; these start at random, so train the model before you take it as a teacher",
            FreshWeights,
            stacklevel=4,
        )
    return model


@contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """Without what transformers says of labels and weights that do not fit; our warning has what matters."""
    logging = transformers.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def from_python(path: str, options: Options, *, classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """What an importable function or class returns."""
    module_name, _, attribute = path.rpartition(".")
    if not module_name:
        raise UserError(f"expected `python:package.module.attribute`, got `python:{path}`")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may fail in any way; the cause stays in the traceback
        raise UserError(
            f"could not import `{module_name}` for `python:{path}` ({type(error).__name__}: {error}); "
            "is its folder on PYTHONPATH?"
        ) from error
    if not hasattr(module, attribute):
        raise unknown_name(f"attribute of `{module_name}`", attribute, dir(module))
    factory = getattr(module, attribute)
    # A module is callable too, but calling it runs a forward pass.
    if not callable(factory) or isinstance(factory, nn.Module):
        raise UserError(
            f"expected `python:{path}` to name a function or class that builds a model, "
            f"got an object of type {type(factory).__name__}"
        )
    return call(path, factory, options, classes=classes, input_shape=input_shape)


def call(name: str, factory: Callable[..., nn.Module], options: Options, **offered: Any) -> nn.Module:
    """``factory(**options)``, with those of the ``offered`` arguments that it takes.

    Raises:
        UserError: If the factory does not take an option, or needs an argument that nobody gave.
    """
    signature = inspect.signature(factory)
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
        known = [parameter for parameter in signature.parameters if parameter not in offered]
        offered = {key: value for key, value in offered.items() if key in signature.parameters}
        for option in options:
            if option not in known:
                takes = f"it takes {', '.join(f'`{k}`' for k in known)}" if known else "it takes none"
                raise UserError(f"model `{name}` has no option `{option}`; {takes}")
    arguments = {**offered, **options}
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise UserError(f"model `{name}` cannot be built: {error}; give it as an option") from error
    return factory(**arguments)


def _check_channels(model: str, channels: int, input_shape: tuple[int, ...]) -> None:
    if channels != image_channels(input_shape):
        raise UserError(
            f"{model} takes images of {channels} channels, but `input_shape` is {input_shape}; "
            "repeat or reduce the channels when the data is loaded"
        )
