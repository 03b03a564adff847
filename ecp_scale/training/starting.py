"""What a run looks at before its first step: data, vocabulary, and what a resume does to the learning rate."""

import dataclasses
import json
import socket
from pathlib import Path
from typing import Any

from ecp_scale.checkpoint.saving import Start
from ecp_scale.cluster.ranks import Ranks
from ecp_scale.cluster.signals import STOPPED
from ecp_scale.config import Config, OptimizerConfig
from ecp_scale.console import say
from ecp_scale.data.blend import Blend, check_same_tokenizer
from ecp_scale.data.corpus import Corpus
from ecp_scale.errors import InputError
from ecp_scale.files import write_text

LARGEST_JUMP = 2.0
"""Factor between what the next step's rate would have been and what it is, beyond which a resume is refused."""


def open_data(config: Config) -> tuple[Config, Blend, Corpus | None]:
    """The corpora of a run, and its config with the vocabulary known; for one rank to ask.

    Raises:
        InputError: if a corpus cannot be used, or does not fit the config.
    """
    blend = Blend(config.data.phases, config.model.sequence_length, config.training.seed)
    validation = None
    if config.data.validation_prefix is not None:
        validation = Corpus(config.data.validation_prefix, config.model.sequence_length)
        check_same_tokenizer(validation, blend.corpora[0])
    return with_vocabulary(config, blend.corpora[0]), blend, validation


def write_settings(run: Path, config: str, deepspeed: dict[str, Any]) -> None:
    """Leave the resolved config and DeepSpeed JSON in the run folder; for one rank, when nothing is refused any more.

    Raises:
        InputError: if they cannot be written.
    """
    try:
        write_text(run / "config.yaml", config)
        write_text(run / "deepspeed.json", json.dumps(deepspeed, indent=2) + "\n")
        (run / STOPPED).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{error.filename or run}: {error.strerror or error}") from error


def check_view(blend: Blend, validation: Corpus | None) -> None:
    """Refuse a host that sees other corpora than the first rank, which has opened these; one rank of a host looks.

    Raises:
        InputError: naming the corpus.
    """
    ranks = Ranks.from_environment()
    if ranks.local_rank != 0 or ranks.rank == 0:  # which has opened them
        return
    for corpus in [*blend.corpora, *([validation] if validation is not None else [])]:
        seen = Corpus(str(corpus.prefix), corpus.sequence_length)
        if seen.digest != corpus.digest:
            raise InputError(
                f"corpus {corpus.prefix} on host {socket.gethostname()} is {seen.tokens:,} tokens with the hash "
                f"{seen.digest[:12]}..., for the first rank {corpus.tokens:,} with {corpus.digest[:12]}..."
            )


def check_rate(start: Start, config: Config, run_tokens: int, allow_jump: bool) -> None:
    """Say how a resume changes the learning rate of the next step; refuse a jump.

    Raises:
        InputError: if the rate would be more than ``LARGEST_JUMP`` times, or less than one such part of, what it would
            have been, unless ``allow_jump``.
    """
    record = start.record
    if record is None or not record.optimizer or not record.run_tokens or record.step >= config.training.steps:
        return
    tokens = record.tokens + config.sequences_after(record.tokens) * config.model.sequence_length
    before = OptimizerConfig(**record.optimizer).learning_rate_at(tokens, record.run_tokens)
    after = config.optimizer.learning_rate_at(tokens, run_tokens)
    if before == after:
        return
    text = f"the learning rate of step {record.step + 1:,} was to be {before:.3g} and is now {after:.3g}"
    larger, smaller = max(before, after), min(before, after)
    if larger > LARGEST_JUMP * smaller and not allow_jump:
        raise InputError(
            f"{text}, a jump by more than {LARGEST_JUMP:g}; pass --allow-rate-jump, or set optimizer.decay_tokens, "
            "optimizer.learning_rate or training.steps to what keeps it"
        )
    say(f"rate        {text}")


def with_vocabulary(config: Config, corpus: Corpus) -> Config:
    """The config with the vocabulary and the end of documents of the corpus, unless it names its own.

    Raises:
        InputError: if its own is too small.
    """
    entries = corpus.tokenizer.vocab_size
    ignored_ids = set(config.data.loss_ignore_ids)
    beyond = sorted(token for token in ignored_ids if not 0 <= token < entries)
    if beyond or len(ignored_ids) == entries:
        raise InputError(
            f"data.loss_ignore_ids holds {f'the ids {beyond[:10]}' if beyond else 'every id'}, but the tokenizer of "
            f"{corpus.prefix} has the {entries} entries 0 to {entries - 1}, of which some must be trained"
        )
    if (config.attention.end_of_document or 0) >= entries:
        raise InputError(
            f"attention.end_of_document is {config.attention.end_of_document}, but the tokenizer of {corpus.prefix} "
            f"has {entries} entries"
        )
    if config.attention.end_of_document is None:
        attention = dataclasses.replace(config.attention, end_of_document=corpus.tokenizer.end_of_document)
        config = dataclasses.replace(config, attention=attention)
    if config.model.vocab_size is None:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=entries))
    if config.model.vocab_size < entries:
        raise InputError(
            f"model.vocab_size is {config.model.vocab_size}, but the tokenizer of {corpus.prefix} has {entries} "
            "entries; set model.vocab_size to null to take the tokenizer's"
        )
    return config
