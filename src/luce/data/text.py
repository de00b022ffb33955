"""From texts to the token ids that a text classifier reads."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luce.errors import UserError, import_optional

CHUNK = 4096
"""Texts at a time: as lists of Python integers, ids take ten times the memory."""


class Tokenizer:
    """Token ids of one length, with a tokenizer of Hugging Face.

    A longer text loses its end, a shorter one is filled up with the padding token, which a network must know
    as such: `luce.models.build` makes those of ``hf:`` look past it, `luce.models.mask_padding` others.

    Args:
        source: A name on the hub, a folder, or a tokenizer of Hugging Face itself; the one that the network
            was trained with.
        max_length: Tokens of every text, those included that the tokenizer adds itself.

    Attributes:
        size: Number of tokens it knows; ids are ``0 .. size - 1``.
        padding: Id that fills up short texts.

    Raises:
        UserError: If there is no such tokenizer, it has no padding token, or ``max_length`` is not positive
            or more than it was made for.

    Example:
        >>> import tokenizers, transformers
        >>> ids = {"[PAD]": 0, "[UNK]": 1, "wheat": 2, "falls": 3}
        >>> words = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="[UNK]"))
        >>> words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        >>> own = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
        >>> Tokenizer(own, max_length=3)(["wheat falls", "corn"])
        tensor([[2, 3, 0],
                [1, 0, 0]])
    """

    def __init__(self, source: Any, max_length: int = 128) -> None:
        if isinstance(source, str | Path):
            source = _load(str(source))
        if source.pad_token_id is None:
            raise UserError(
                f"expected a tokenizer with a padding token, `{source.name_or_path}` has none; set its "
                "`pad_token`, save it to a folder and name that"
            )
        most = source.model_max_length
        if not 0 < max_length <= most:
            raise UserError(
                f"expected `max_length` in 1 .. {most} for `{source.name_or_path}`, got {max_length}"
            )
        self.max_length, self.size, self.padding = max_length, len(source), int(source.pad_token_id)
        self._encode = source

    def __call__(self, texts: Iterable[str]) -> Tensor:
        """The ids, int64, shape ``(N, max_length)``; warns of the number of texts that lose their ends.

        Raises:
            UserError: If a text is no string, or has no token.
        """
        texts = list(texts)
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"expected texts, got {type(text).__name__} as text {row}; leave it out")
        ids, cut = [torch.empty(0, self.max_length, dtype=torch.int64)], 0
        for start in range(0, len(texts), CHUNK):
            encoded = self._encode(
                texts[start : start + CHUNK],
                truncation=True,
                padding="max_length",
                max_length=self.max_length,
                return_tensors="pt",
            )
            ids.append(encoded["input_ids"])
            cut += sum(bool(one.overflowing) for one in encoded.encodings or ())
        found = torch.cat(ids)
        empty = (found == self.padding).all(1).nonzero()
        if len(empty):
            raise UserError(f"expected a token in every text, text {int(empty[0])} has none; leave it out")
        if cut:
            warnings.warn(
                f"{cut} of {len(texts)} texts are longer than `max_length`, {self.max_length} tokens, and "
                "lose their ends",
                stacklevel=2,
            )
        return found


def _load(name: str) -> Any:
    transformers = import_optional("transformers", "text")
    try:
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # what is no tokenizer fails in many ways
        raise UserError(
            f"expected a tokenizer on the hub or in a local folder, `{name}` gives none ({error})"
        ) from error
