"""From texts to the token ids that a text classifier reads."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, import_optional, one_line

CHUNK = 4096
"""Texts at a time: as lists of Python integers, ids take ten times the memory."""


class Tokenizer:
    """Token ids of one length, with a tokenizer of Hugging Face.

    A longer text is cut, a shorter one filled up with the padding token, both at the end unless the tokenizer
    has its own way. A network must know that token as such: `luce.models.build` makes those of ``hf:`` look
    past it, `luce.models.mask_padding` others.

    Args:
        source: A name on the hub, a folder, or a tokenizer of Hugging Face itself; the one that the network
            was trained with.
        max_length: Tokens of every text, those included that the tokenizer adds itself; at least one more.

    Attributes:
        size: Number of tokens it knows; ids are ``0 .. size - 1``.
        padding: Id that fills up short texts.

    Raises:
        UserError: If there is no such tokenizer, it knows no words or no padding token, or ``max_length`` is
            less than it needs or more than it was made for.

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
        # What transformers makes of a folder without a vocabulary has special tokens alone.
        words = "".join(source.get_vocab().keys() - set(source.all_special_tokens))
        if not any(map(str.isalnum, words)):
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
        """The ids, int64, shape ``(N, max_length)``; warns of the number of texts that are cut.

        Raises:
            UserError: If there is one text instead of several, or one is no string or has no token.
        """
        if isinstance(texts, str):  # or its letters would pass for texts
            raise UserError("expected a list of texts, got one; put it into a list")
        texts = list(texts)
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"expected texts, got {type(text).__name__} as text {row}; leave it out")
        ids, cut = [torch.empty(0, self.max_length, dtype=torch.int64)], 0
        for start in range(0, len(texts), CHUNK):
            chunk = texts[start : start + CHUNK]
            encoded = self._encode(
                chunk, truncation=True, padding="max_length", max_length=self.max_length, return_tensors="pt"
            )
            ids.append(encoded["input_ids"])
            if encoded.encodings is None:  # a tokenizer in Python does not tell what it has cut
                cut += sum(len(whole) > self.max_length for whole in self._encode(chunk)["input_ids"])
            else:
                cut += sum(bool(one.overflowing) for one in encoded.encodings)
        found = torch.cat(ids)
        empty = (found == self.padding).all(1).nonzero()
        if len(empty):
            raise UserError(f"expected a token in every text, text {int(empty[0])} has none; leave it out")
        if cut:
            warnings.warn(
                f"{cut} of {len(texts)} texts are longer than `max_length`, {self.max_length} tokens, "
                "and are cut",
                stacklevel=2,
            )
        return found


def _load(name: str) -> Any:
    transformers = import_optional("transformers", "text")
    try:
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # what is no tokenizer fails in many ways
        raise UserError(
            f"expected a tokenizer on the hub or in a local folder, `{name}` gives none ({one_line(error)})"
        ) from error
