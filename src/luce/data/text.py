"""Texts as token ids."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import name_or_path
from ..errors import UserError, import_optional, one_line

CHUNK = 4096
"""Texts per chunk: tokenizers return lists of Python integers, which take ten times the memory of tensors."""


class Tokenizer:
    """Converts texts to token ids of one length with a tokenizer of Hugging Face.

    Longer texts are truncated and shorter ones padded, at the end unless the tokenizer is configured
    otherwise. The network must mask the padding: `luce.models.build` does so for ``hf:`` networks,
    `luce.models.mask_padding` for others.

    Args:
        source: A name on the hub, a folder, or a tokenizer object of Hugging Face; use the one that the
            network was trained with.
        max_length: Tokens per text, including special tokens that the tokenizer adds; at least one more than
            their number.

    Attributes:
        size: Size of the vocabulary; ids are ``0 .. size - 1``.
        padding: Id of the padding token.

    Raises:
        UserError: If the tokenizer cannot be loaded, has no vocabulary or no padding token, or ``max_length``
            is out of its range.

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
                "`pad_token`, save it to a folder and name that folder"
            )
        # From a folder without a vocabulary transformers builds a tokenizer of special tokens only.
        characters = "".join(source.get_vocab().keys() - set(source.all_special_tokens))
        if not any(map(str.isalnum, characters)):
            raise UserError(
                f"expected a tokenizer with a vocabulary, `{source.name_or_path}` has none; save the "
                "network's tokenizer there too, or name another folder"
            )
        least, most = 1 + source.num_special_tokens_to_add(), source.model_max_length
        if type(max_length) is not int or not least <= max_length <= most:
            raise UserError(
                f"expected `max_length` in {least} .. {most} for `{source.name_or_path}`, got {max_length!r}"
            )
        self.max_length, self.size, self.padding = max_length, len(source), int(source.pad_token_id)
        self._encode = source

    def __call__(self, texts: Iterable[str]) -> Tensor:
        """Return the ids, int64, shape ``(N, max_length)``; warn of the number of truncated texts.

        Raises:
            UserError: If ``texts`` is a single string, or a text is not a string or has no token.
        """
        if isinstance(texts, str):  # iterating it would tokenize single letters
            raise UserError("expected a list of texts, got a single string; put it into a list")
        texts = list(texts)
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"expected texts, got {type(text).__name__} as text {row}; remove it")
        ids, truncated = [torch.empty(0, self.max_length, dtype=torch.int64)], 0
        for start in range(0, len(texts), CHUNK):
            chunk = texts[start : start + CHUNK]
            encoded = self._encode(
                chunk, truncation=True, padding="max_length", max_length=self.max_length, return_tensors="pt"
            )
            ids.append(encoded["input_ids"])
            if encoded.encodings is None:  # tokenizers written in Python do not report truncation
                truncated += sum(len(whole) > self.max_length for whole in self._encode(chunk)["input_ids"])
            else:
                truncated += sum(bool(one.overflowing) for one in encoded.encodings)
        all_ids = torch.cat(ids)
        empty = (all_ids == self.padding).all(1).nonzero()
        if len(empty):
            raise UserError(f"expected a token in every text, text {int(empty[0])} has none; remove it")
        if truncated:
            warnings.warn(
                f"{truncated} of {len(texts)} texts are longer than `max_length`, {self.max_length} tokens, "
                "and are truncated",
                stacklevel=2,
            )
        return all_ids


def _load(name: str) -> Any:
    transformers = import_optional("transformers", "text")
    try:
        return transformers.AutoTokenizer.from_pretrained(name_or_path(name), trust_remote_code=False)
    except Exception as error:  # anything but a tokenizer fails in many ways
        raise UserError(
            f"expected a tokenizer on the hub or in a local folder, got `{name}` ({one_line(error)})"
        ) from error
