"""Whether shards are what their manifest says."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ecp_scale.data.manifest import Manifest, ShardRecord, TextCounts
from ecp_scale.data.marks import plain
from ecp_scale.data.shards import Tokens, TokenShard
from ecp_scale.data.tokenizer import Tokenizer, gives_texts_back
from ecp_scale.errors import InputError
from ecp_scale.files import sha256_of

CHUNK_TOKENS = 1 << 16
"""Ids of a long document that are decoded at a time, about."""


def verify(prefix: Path, deep: bool = False) -> Iterator[str]:
    """Check structure, counts, ids and hashes; ``deep`` also decodes every document and counts its text.

    Yields:
        A problem at a time, naming the file; nothing where all is well.

    Raises:
        InputError: if there is no manifest to compare with, or its tokenizer is not there.
    """
    manifest = Manifest.read(prefix)
    tokenizer = manifest.load_tokenizer(prefix)
    totals = sum((record.counts for record in manifest.shards), TextCounts())
    if totals != manifest.totals:
        yield f"{prefix.name}.manifest.json: the shards add up to {totals}, the totals say {manifest.totals}"
    for record in manifest.shards:
        path = prefix.parent / record.name
        try:
            shard = TokenShard(path)
        except InputError as error:
            yield str(error)
            continue
        problems = list(_shard_problems(path, shard, record, manifest))
        yield from problems
        if deep and not problems and not manifest.labels:
            yield from _text_problems(path, shard, record.counts, tokenizer, manifest.marked)


def _shard_problems(path: Path, shard: TokenShard, record: ShardRecord, manifest: Manifest) -> Iterator[str]:
    tokenizer, marked = manifest.tokenizer, manifest.marked
    damaged = [f"{path}.idx: {problem}" for problem in shard.problems()]
    if damaged:
        yield from damaged
        return
    found = (len(shard.lengths), shard.tokens)
    expected = (record.counts.documents, record.counts.tokens)
    if found != expected:
        yield f"{path}.idx: {found[0]} documents of {found[1]} tokens, the manifest says {expected[0]} of {expected[1]}"
    for suffix, expected_hash in record.sha256.items():
        digest = sha256_of(path.with_name(f"{path.name}.{suffix}"))
        if digest != expected_hash:
            yield f"{path}.{suffix}: sha256 {digest[:12]}..., the manifest says {expected_hash[:12]}..."
    largest, lowest = (int(shard.ids.max()), int(shard.ids.min())) if shard.tokens else (0, 0)
    if lowest < (-tokenizer.vocab_size if marked else 0) or largest >= tokenizer.vocab_size:
        wrong = largest if largest >= tokenizer.vocab_size else lowest
        yield f"{path}.bin: id {wrong}, but the tokenizer has {tokenizer.vocab_size} entries"
    ends = np.cumsum(shard.lengths, dtype=np.int64)[shard.lengths > 0] - 1
    if manifest.labels:
        if len(set(shard.lengths.tolist())) > 1 or (shard.ids[ends] >= len(manifest.labels)).any():
            yield f"{path}.bin: a document has another length than the first, or does not end with a label"
    elif len(ends) < len(shard.lengths) or (plain(shard.ids[ends]) != tokenizer.end_of_document).any():
        yield f"{path}.bin: a document does not end with id {tokenizer.end_of_document}"


def _text_problems(
    path: Path, shard: TokenShard, counts: TextCounts, tokenizer: Tokenizer, marked: bool
) -> Iterator[str]:
    """Every document decodes; where the tokenizer gives texts back, to the ids and the sizes of the manifest.

    Texts with marks are put together of parts, with control tokens between them.
    """
    compares = gives_texts_back(tokenizer) and not marked
    size = words = 0
    for number in range(len(shard.lengths)):
        for ids in _chunks(plain(shard.document(number)[:-1]), tokenizer):
            text = tokenizer.decode(ids)
            if compares and tokenizer.encode(text) != ids:
                yield f"{path}, document {number}: its text has other ids than it was decoded from"
                return
            size += len(text.encode())
            words += len(text.split())
    if compares and (size, words) != (counts.bytes, counts.words):
        yield (
            f"{path}: decodes to {size} bytes and {words} words, the manifest says {counts.bytes} and {counts.words}; "
            "damage, or a tokenizer that does not give texts back exactly"
        )


def _chunks(document: Tokens, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Ids of a document, a long one cut between two words, where its text can be encoded in parts too."""
    start, place = 0, CHUNK_TOKENS
    while place < len(document):
        before, behind = document[place - 4 : place].tolist(), document[place : place + 4].tolist()
        if re.search(r"[^\s\ufffd]$", tokenizer.decode(before)) and re.match(r" \w", tokenizer.decode(behind)):
            yield document[start:place].tolist()
            start, place = place, place + CHUNK_TOKENS
        else:
            place += 1
    yield document[start:].tolist()
