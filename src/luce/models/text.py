"""What lets a text classifier of Hugging Face read token ids alone."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from ..errors import UserError

Model = TypeVar("Model", bound=nn.Module)


def mask_padding(model: Model) -> Model:
    """Let a network of Hugging Face look past the padding in its input, token ids ``(N, T)``.

    Called without an attention mask, it is given ``ids != pad_token_id`` of its config, so that logits do not
    depend on how far a text is padded. It stays the same object, with the same names of weights and modules;
    a mask that the caller gives is left alone. `luce.models.build` does this for ``hf:``.

    Args:
        model: From ``input_ids`` and an ``attention_mask``, with a ``config``.

    Raises:
        UserError: If the network's config names no padding token; and when it runs on anything but token ids.

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
            f"expected a network that knows its padding token, the config of {type(model).__name__} names "
            "none; give it `pad_token_id`, that of its tokenizer"
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
    """Whether a network of Hugging Face reads token ids and has not been through `mask_padding`."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return (
        getattr(model, "main_input_name", None) == "input_ids"
        and getattr(_text_config(model), "pad_token_id", None) is not None
        and not any(isinstance(hook, partial) and hook.func is _give_mask for hook in hooks)
    )


def check_tokens(model: nn.Module, *, size: int, padding: int) -> None:
    """Check that a network reads a tokenizer's ids as they are meant, as far as it tells.

    Args:
        model: One with a ``config``, as Hugging Face's have; any other may pass.
        size: Number of tokens.
        padding: Id of the token that fills up short texts.

    Raises:
        UserError: If it has fewer tokens, or takes another one for padding.
    """
    config, remedy = _text_config(model), "choose the tokenizer that the network was trained with"
    if config is None:
        return
    if getattr(config, "vocab_size", size) < size:  # characters are hashed, not counted
        raise UserError(
            f"expected a network of at least the {size} tokens of the tokenizer, got one of "
            f"{config.vocab_size}; {remedy}"
        )
    if config.pad_token_id != padding:
        raise UserError(
            f"expected a network that takes token {padding} for padding, as the tokenizer does, got one that "
            f"takes {config.pad_token_id}; {remedy}"
        )


def _text_config(model: nn.Module) -> Any:
    """What Hugging Face's networks are made from, the part on text; None of other networks."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else None
