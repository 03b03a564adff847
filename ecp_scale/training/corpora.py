"""The corpora of a run, and what they say of its config: the vocabulary and the end of documents."""

import dataclasses
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from ecp_scale.cluster.ranks import Ranks
from ecp_scale.config import Config
from ecp_scale.console import say
from ecp_scale.data.blend import Blend, check_same_tokenizer
from ecp_scale.data.corpus import Corpus
from ecp_scale.data.manifest import Manifest
from ecp_scale.data.marks import LossMask
from ecp_scale.errors import InputError


def check_prefixes(config: Config) -> None:
    """Refuse prefixes without shards, before libraries load.

    Raises:
        InputError: if a manifest cannot be read.
    """
    names = dict.fromkeys(name for _, weights in config.data.phases for name in weights)
    for name in [*names, *config.data.set_aside.values()]:
        Manifest.read(Path(name))


def open_data(config: Config) -> tuple[Config, Blend, dict[str, Corpus]]:
    """The corpora of a run, those for validation by name, and its config with the vocabulary known; for one rank.

    Raises:
        InputError: if a corpus cannot be used, or does not fit the config.
    """
    names = [name for _, weights in config.data.phases for name in weights]
    for name in dict.fromkeys([*names, *config.data.set_aside.values()]):
        check_task(config, Path(name))
    training = config.training
    blend = Blend(config.data.phases, config.model.sequence_length, training.seed, training.skip_samples)
    validation = {name: Corpus(prefix, config.model.sequence_length) for name, prefix in config.data.set_aside.items()}
    for corpus in validation.values():
        check_same_tokenizer(corpus, blend.corpora[0])
    return with_vocabulary(config, blend.corpora[0]), blend, validation


def loss_mask(config: Config, corpora: Sequence[Corpus]) -> LossMask:
    """Which targets of a run on some corpora have no loss; the same on all ranks."""
    return LossMask(tuple(config.data.loss_ignore_ids), any(corpus.manifest.marked for corpus in corpora))


def check_view(blend: Blend, validation: Mapping[str, Corpus]) -> None:
    """Refuse a host that sees other corpora than the first rank, which has opened these; one rank of a host looks.

    Raises:
        InputError: naming the corpus.
    """
    ranks = Ranks.from_environment()
    if ranks.local_rank != 0 or ranks.rank == 0:  # which has opened them
        return
    for corpus in [*blend.corpora, *validation.values()]:
        seen = Corpus(str(corpus.prefix), corpus.sequence_length)
        if seen.digest != corpus.digest:
            raise InputError(
                f"corpus {corpus.prefix} on host {socket.gethostname()} is {seen.tokens:,} tokens with the hash "
                f"{seen.digest[:12]}..., for the first rank {corpus.tokens:,} with {corpus.digest[:12]}..."
            )


def check_task(config: Config, prefix: Path) -> None:
    """Refuse shards that are for another task, whatever the length of their windows.

    Raises:
        InputError: naming them.
    """
    labels = Manifest.read(prefix).labels
    if bool(labels) != (config.model.task == "classification"):
        held = "documents with labels" if labels else "text without labels"
        raise InputError(f"model.task is {config.model.task}, but {prefix} holds {held}")


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
    if config.model.vocab_size > entries:
        say(
            f"note        model.vocab_size is {config.model.vocab_size:,}, but the tokenizer of {corpus.prefix} has "
            f"{entries:,} entries; null takes the tokenizer's"
        )
    return config
