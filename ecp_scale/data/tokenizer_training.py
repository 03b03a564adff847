"""Train a sentencepiece tokenizer that gives every text back exactly."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece

from ecp_scale.data.documents import read_documents
from ecp_scale.data.files import atomic_write
from ecp_scale.data.parsing import Parsing, hash_fraction
from ecp_scale.data.sources import Source, find_sources
from ecp_scale.errors import InputError

MAX_LINE_BYTES = 4096
"""Sentencepiece skips longer lines."""


def train_tokenizer(
    inputs: Sequence[str],
    output: str,
    vocab_size: int,
    *,
    parsing: Parsing | None = None,
    threads: int = 1,
    sample_bytes: int | None = None,
    seed: int = 1,
) -> None:
    """Train byte-pair encoding with byte fallback on .txt and .jsonl files and write OUTPUT (a .model file).

    No normalisation, all white space kept, line ends and tabs pieces of their own, unknown characters as bytes:
    decoding what was encoded returns the text. ``sample_bytes`` keeps documents by a hash of seed and text, so that
    about so many bytes of the sources go into the training; None keeps all.

    Raises:
        InputError: if an input cannot be used, or the text is too small for the vocabulary.
    """
    sources = find_sources(inputs)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(sources, parsing or Parsing(), sample_bytes, seed),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n", "\t"],
            max_sentence_length=MAX_LINE_BYTES,
            num_threads=threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(f"cannot train a vocabulary of {vocab_size} on {', '.join(inputs)}: {reason}") from error
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(model.getvalue())


def _lines(sources: Sequence[Source], parsing: Parsing, sample_bytes: int | None, seed: int) -> Iterator[str]:
    total = sum(source.size for source in sources)
    share = 1.0 if sample_bytes is None or not total else sample_bytes / total
    for text in read_documents(sources, parsing):
        if share >= 1 or hash_fraction(text, f"{seed}/") < share:
            yield from (line for line in text.split("\n") if line and len(line.encode()) <= MAX_LINE_BYTES)
