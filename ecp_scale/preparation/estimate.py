"""What preprocessing will give and take, from a sample of the text."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from ecp_scale.data.manifest import unread_lines
from ecp_scale.data.marks import MARKED
from ecp_scale.data.shards import token_type
from ecp_scale.data.tokenizer import load_tokenizer
from ecp_scale.data.tokenizer_kinds import UnencodableError
from ecp_scale.errors import InputError
from ecp_scale.preparation.finding import find_sources
from ecp_scale.preparation.parsing import BadRecordError, Dropped, Parsing
from ecp_scale.preparation.segments import Segments
from ecp_scale.preparation.sources import Place, Source

SAMPLE_BYTES = 4 << 20
SAMPLED_SOURCES = 32


@dataclass(frozen=True)
class Estimate:
    """Figures of a whole corpus, extrapolated by bytes on disk."""

    sources: int
    source_bytes: int
    sampled_bytes: int
    documents: int
    tokens: int
    output_bytes: int
    shards: int
    seconds: float
    not_read: tuple[str, ...] = ()
    """What lies in the input folders and is not read, a line for each reason."""

    def __str__(self) -> str:
        took = f"{self.seconds / 60:,.1f} minutes" if self.seconds > 90 else f"{self.seconds:.1f} seconds"
        return "\n".join(
            (
                f"sources     {self.sources:,} with {self.source_bytes / 1e9:,.3f} GB, "
                f"of which {self.sampled_bytes / 1e6:,.3f} MB were sampled",
                f"documents   about {self.documents:,}",
                f"tokens      about {self.tokens:,}",
                f"output      about {self.output_bytes / 1e9:,.3f} GB in {self.shards:,} shards",
                f"time        about {took} of tokenizing",
                *(f"not read    {line}" for line in self.not_read),
            )
        )


def estimate(
    inputs: Sequence[str],
    tokenizer_spec: str,
    parsing: Parsing,
    workers: int,
    shard_tokens: int,
    end_token: str | None = None,
) -> Estimate:
    """Tokenize the beginnings of some sources, evenly chosen, and extrapolate; nothing is written.

    Raises:
        InputError: if an input or the tokenizer cannot be used, or the sample has no text.
    """
    found = find_sources(inputs)
    sources = [source for source in found.sources if source.size]
    if not sources:
        raise InputError("nothing to extrapolate from: hub datasets, standard input and empty files have no size")
    tokenizer = load_tokenizer(tokenizer_spec, end_token)
    chosen = [sources[i] for i in np.unique(np.linspace(0, len(sources) - 1, SAMPLED_SOURCES).astype(int))]
    read, texts = 0, []
    for source in chosen:
        part, beginning = _beginning(source, parsing, SAMPLE_BYTES // len(chosen))
        read += part
        texts += beginning
    if not texts:
        raise InputError(f"the sample of {len(chosen)} sources has no text")
    began = time.perf_counter()
    try:
        tokens = sum(len(ids) + 1 for ids in tokenizer.encode_batch(texts, parsing.preparation != "none"))
    except UnencodableError as error:
        raise InputError(f"a document of the sample cannot be encoded: {error}") from error
    seconds = time.perf_counter() - began
    total = sum(source.size for source in sources)
    scale = total / max(1, read)
    width = np.dtype(MARKED if parsing.marks else token_type(tokenizer.vocab_size)).itemsize
    documents, whole = round(len(texts) * scale), round(tokens * scale)
    return Estimate(
        sources=len(sources),
        source_bytes=total,
        sampled_bytes=read,
        documents=documents,
        tokens=whole,
        output_bytes=whole * width + documents * 20,
        shards=max(1, -(-whole // shard_tokens)),
        seconds=seconds * scale / workers,
        not_read=tuple(unread_lines(found.reasons)),
    )


def _beginning(source: Source, parsing: Parsing, most: int) -> tuple[int, list[str]]:
    """Bytes on disk and documents of the beginning of a source, at most about ``most`` bytes of them."""
    texts: list[str] = []
    read, size = 0, 0
    is_json = source.format(parsing.reading) == "json"
    for record in source.records(0, Place(), parsing.reading):
        read = max(read, record.read_bytes)
        with suppress(BadRecordError):
            raw = record.raw
            if record.part and isinstance(raw, bytes):  # of a long text the part is enough, whatever it is cut in
                raw = raw.decode(errors="ignore").encode()
            text = parsing.text(raw, is_json)
            text = text.text if isinstance(text, Segments) else text
            if not isinstance(text, Dropped):
                texts.append(parsing.prepared(text))
                size += len(text)
        if max(read, size) >= most:
            break
    return read, texts
