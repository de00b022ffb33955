"""Models from timm, torchvision, Hugging Face and Python modules of the user.

Each loader is called as ``loader(name, options, classes=..., input_shape=...)``.
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

from ..config import name_or_path
from ..errors import UserError, import_optional, one_line, unknown_name
from .network import image_channels
from .text import mask_padding

Options = Mapping[str, Any]

LISTED = 8
"""Number of weights that a warning lists."""

FIXED = ("dtype", "num_labels", "torch_dtype", "trust_remote_code")
"""Arguments that transformers accepts among the fields of a config but that Luce sets itself."""


class FreshWeights(UserWarning):
    """A checkpoint lacks weights of the network, which start at random."""


@contextmanager
def fresh_weights_expected() -> Iterator[None]:
    """Suppress `FreshWeights`: other weights replace them at once, or the warning was given before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FreshWeights)
        yield


def from_timm(name: str, options: Options, *, classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Load an architecture of timm, or one of its schemes such as ``hf-hub:owner/name``."""
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
    """Load an image classifier of torchvision."""
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
    """Load a classifier of images or text from the Hugging Face hub or a local folder.

    The checkpoint's head is kept if it fits ``classes``; the network then states the names of its classes as
    ``class_names``. Otherwise it is initialised at random, with a
    warning: this is right for a student and never for a teacher. Options are fields of the network's config,
    such as ``num_hidden_layers``, which keeps the first layers of the checkpoint; ``pretrained: false``
    initialises all weights at random. Weights are float32 even if the checkpoint has fewer bits, which are
    too few for training; ``training.precision`` saves memory. Code in a checkpoint is never run. A classifier
    of text reads token ids ``(N, T)`` and masks their padding; see `mask_padding`.
    """
    transformers = import_optional("transformers", "text")
    for option in sorted(options.keys() & set(FIXED)):
        raise UserError(
            f"`hf:{name}` has no option `{option}`: Luce sets float32 weights and the classes of the data, "
            "and runs no code of a checkpoint"
        )
    name = name_or_path(name)
    settings = {option: value for option, value in options.items() if option != "pretrained"}
    try:
        with _quiet(transformers):
            config, others = transformers.AutoConfig.from_pretrained(
                name, num_labels=classes, return_unused_kwargs=True, trust_remote_code=False, **settings
            )
    except (OSError, ValueError) as error:
        raise UserError(
            f"expected `hf:{name}` to name a model on the hub or in a local folder: {one_line(error)}"
        ) from error
    except Exception as error:  # options of a wrong type raise errors of their own classes
        raise UserError(f"`hf:{name}` cannot be built with these options: {one_line(error)}") from error
    if others:
        raise UserError(
            f"`hf:{name}` cannot be built with these options: {type(config).__name__} has no field "
            f"{', '.join(map(repr, others))}"
        )
    attention = str(getattr(config, "_attn_implementation", None))
    if "/" in attention and "attn_implementation" not in options:  # compiled code on the hub
        raise UserError(f"`hf:{name}` asks for the code `{attention}`; Luce runs no code of a checkpoint")
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
    except FreshWeights:  # made an error, where no weights may be fresh
        raise
    except Exception as error:  # wrong options and damaged files raise many kinds of errors
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
    base: Any = model
    if all(key.startswith(f"{base.base_model_prefix}.") for key in fresh):  # the head is the checkpoint's
        base.class_names = tuple(base.config.id2label[place] for place in range(classes))
    if fresh:
        more = f" and {len(fresh) - LISTED} more" if len(fresh) > LISTED else ""
        warnings.warn(
            f"the checkpoint `hf:{name}` does not fill {', '.join(fresh[:LISTED])}{more} for {classes} "
            "classes; these start at random, so train the model before you use it as a teacher",
            FreshWeights,
            stacklevel=4,
        )
    return model


@contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """Suppress transformers' messages about weights that do not fit; `FreshWeights` replaces them."""
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
    """Call an importable function or class, and return its result."""
    module_name, _, attribute = path.rpartition(".")
    if not module_name:
        raise UserError(f"expected `python:package.module.attribute`, got `python:{path}`")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module can raise anything; the traceback keeps the cause
        raise UserError(
            f"could not import `{module_name}` for `python:{path}` ({type(error).__name__}: {error}); "
            "is its folder on PYTHONPATH?"
        ) from error
    if not hasattr(module, attribute):
        raise unknown_name(f"attribute of `{module_name}`", attribute, dir(module))
    factory = getattr(module, attribute)
    # A module instance is callable too, but the call runs a forward pass.
    if not callable(factory) or isinstance(factory, nn.Module):
        raise UserError(
            f"expected `python:{path}` to name a function or class that builds a model, "
            f"got an object of type {type(factory).__name__}"
        )
    return call(path, factory, options, classes=classes, input_shape=input_shape)


def call(name: str, factory: Callable[..., nn.Module], options: Options, **offered: Any) -> nn.Module:
    """Call ``factory(**options)`` with those of the ``offered`` arguments that it accepts.

    Raises:
        UserError: If the factory does not accept an option, or an argument is missing.
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
