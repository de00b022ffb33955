"""What every test runs under."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_and_fixed_seed() -> None:
    """Workers of pytest-xdist share the cores, and a failure must come back when it is asked for."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _messages_of_luce_are_captured(caplog: pytest.LogCaptureFixture) -> None:
    """So that `caplog.text` holds what `luce.log` says, of either kind."""
    caplog.set_level(logging.INFO, "luce")


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, "wheat", "corn", "falls", "rises", "bank", "loan", "rate", "barrel", "oil", "ship"]
"""A vocabulary; a token's id is its place."""


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny classifier of texts, 3 classes and 2 layers, with its tokenizer, as Hugging Face keeps them."""
    transformers = pytest.importorskip("transformers", reason="needs the extra [text]")
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    described = {"tokenizer_class": "BertTokenizer", "model_max_length": 32}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.3,  # so that every layer and token changes the logits by far more than rounding
        num_labels=3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        no_gpu = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(no_gpu)
