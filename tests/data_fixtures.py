"""Small indexed files and tokenizers for the data tests."""

import base64
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers

from lclm.config import MixtureEntry
from lclm.data.indexed import IndexedWriter

WritePrefix = Callable[..., str]


def mixture_entry(prefix: str, packing: str, piece_length: int, share: object) -> MixtureEntry:
    """An entry of a mixture; a bad value is a ValueError of pydantic's."""
    return MixtureEntry(prefix=prefix, packing=packing, piece_length=piece_length, share=share)


@pytest.fixture(autouse=True)
def keep_loggers() -> Iterator[None]:
    """Tools that a test runs in this process set logging up for themselves, and for it alone."""
    loggers = [logging.getLogger(name) for name in ("lclm", "lclm_kernels")]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture
def write_prefix(tmp_path: Path) -> WritePrefix:
    """write_prefix(name, lengths): documents whose tokens are all different, 1, 2, 3, ..."""

    def write(name: str, lengths: Sequence[int], **metadata: object) -> str:
        prefix = str(tmp_path / name)
        tokens = np.arange(1, sum(lengths) + 1)
        with IndexedWriter(prefix, vocab_size=max(70000, sum(lengths) + 2)) as writer:
            writer.metadata.update(metadata)
            for start, length in zip(np.cumsum([0, *lengths]), lengths):
                writer.add_document(tokens[start : start + length])
        return prefix

    return write


SENTENCES = [
    "hello hello world, the cat sat on the mat\n",
    "def f(x):\n    return x + 1\n",
    "a long road goes over the hill and the hill is high\n",
    "numbers 123 456 789 and names: Anna, Bertil, Carla\n",
]


@pytest.fixture(scope="session")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small tokenizer of each kind, all under the name tokenizer.model or tokenizer.json."""
    root = tmp_path_factory.mktemp("tokenizers")
    files = {
        kind: root / kind / ("tokenizer.json" if kind == "hf" else "tokenizer.model")
        for kind in ("hf", "tiktoken", "sentencepiece")
    }
    for file in files.values():
        file.parent.mkdir()
    hf = tokenizers.Tokenizer(tokenizers.models.BPE())
    hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    hf.train_from_iterator(SENTENCES, trainer)
    hf.save(str(files["hf"]))
    merged = [b"he", b"ll", b"hell", b"hello", b" w", b"or", b" wor", b" world"]
    ranks = [bytes([value]) for value in range(256)] + merged
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(ranks))
    files["tiktoken"].write_bytes(b"".join(lines))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        vocab_size=320,
        byte_fallback=True,
        hard_vocab_limit=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    files["sentencepiece"].write_bytes(model.getvalue())
    return files
