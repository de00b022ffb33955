"""Attention masks for text classifiers of Hugging Face that are called with token ids only."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from ..errors import UserError

Model = TypeVar("Model", bound=nn.Module)


def mask_padding(model: Model) -> Model:
    """Make a network of Hugging Face ignore the padding in its input, token ids ``(N, T)``.

    A hook adds the attention mask ``ids != pad_token_id`` to calls without one, so that logits do not depend
    on the length of the padding. The object, its weights and its module names stay the same, and a mask that
    the caller gives takes precedence. `luce.models.build` does this for ``hf:``.

    Args:
        model: A network with a ``config`` that accepts ``input_ids`` and ``attention_mask``.

    Raises:
        UserError: If the config has no padding token; in a forward pass, if the input is not token ids.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> shape = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        >>> config = BertConfig(vocab_size=10, pad_token_id=0, **shape)
        >>> model = mask_padding(BertForSequenceClassification(config).eval())
        >>> short, long = model(torch.tensor([[5, 7]])), model(torch.tensor([[5, 7, 0, 0]]))
        >>> torch.allclose(short.logits, long.logits, atol=1e-6)
        True
    """
    padding = getattr(_text_config(model), "pad_token_id", None)
    if padding is None:
        raise UserError(
            f"expected a padding token in the config of {type(model).__name__}, got none; set `pad_token_id` "
            "to that of the tokenizer"
        )
    model.register_forward_pre_hook(partial(_give_mask, padding), with_kwargs=True)
    return model


def _give_mask(
    padding: int, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    ids = args[0] if args else kwargs.get("input_ids")
    if ids is None or len(args) > 1 or kwargs.get("attention_mask") is not None:
        return None
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        what = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise UserError(f"expected token ids of shape (N, T) for {type(model).__name__}, got {what}")
    return args, {**kwargs, "attention_mask": (ids != padding).long()}


def attends_to_padding(model: nn.Module) -> bool:
    """Whether a network of Hugging Face reads token ids and lacks the hook of `mask_padding`."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return (
        getattr(model, "main_input_name", None) == "input_ids"
        and getattr(_text_config(model), "pad_token_id", None) is not None
        and not any(isinstance(hook, partial) and hook.func is _give_mask for hook in hooks)
    )


def check_tokens(model: nn.Module, *, size: int, padding: int) -> None:
    """Check a network's config against a tokenizer; networks without a ``config`` pass.

    Args:
        model: The network.
        size: Size of the tokenizer's vocabulary.
        padding: Id of the tokenizer's padding token.

    Raises:
        UserError: If the network has fewer tokens, or another padding token.
    """
    config, remedy = _text_config(model), "use the tokenizer that the network was trained with"
    if config is None:
        return
    if getattr(config, "vocab_size", size) < size:  # absent in models that hash characters
        raise UserError(
            f"expected a network with at least the {size} tokens of the tokenizer, got "
            f"{config.vocab_size}; {remedy}"
        )
    if config.pad_token_id != padding:
        raise UserError(
            f"expected a network with padding token {padding}, as in the tokenizer, got "
            f"{config.pad_token_id}; {remedy}"
        )


def _text_config(model: nn.Module) -> Any:
    """Return the text part of a Hugging Face config; None for other networks."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else None
