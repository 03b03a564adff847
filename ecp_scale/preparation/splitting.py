"""How much is set aside for validation: whole documents, or blocks of text where there are few documents."""

from collections.abc import Sequence
from contextlib import suppress

from ecp_scale.errors import InputError
from ecp_scale.preparation.encoding import Encoding
from ecp_scale.preparation.parsing import BadRecordError, Dropped, Parsing
from ecp_scale.preparation.sources import STDIN, Place, Record, Source

FEW_DOCUMENTS = 10
"""Documents are few where their share for validation would be fewer than this."""
BLOCKS = 4
"""Blocks of validation that a corpus of few documents gives, about."""
LEAST_CHARACTERS = 256


def block_characters(sources: Sequence[Source], encoding: Encoding) -> int | None:
    """Characters of the blocks into which all texts are cut, since the documents are few; None where they are not.

    Documents that pass the filters are counted, until there are enough. ``sources`` are those of all parts of a corpus,
    so that all of them decide alike.
    """
    share = encoding.validation_share
    # Texts of which parts have no loss are not cut.
    if not share or encoding.parsing.marks or any(source.name == STDIN for source in sources):
        return None
    documents = size = 0
    parsing = encoding.parsing
    for number, source in enumerate(sources):
        is_json = source.format(parsing.reading) == "json"
        with suppress(InputError):  # which the run itself meets in its place
            for record in source.records(number, Place(number), parsing.reading):
                size += len(record.passed)
                documents += record.what != "end" and record.last and _passes(parsing, record, is_json)
                if documents * min(share, 1 - share) >= FEW_DOCUMENTS:
                    return None
    return max(LEAST_CHARACTERS, min(1 << 16, int(size * share / BLOCKS)))


def _passes(parsing: Parsing, record: Record, is_json: bool) -> bool:
    if record.part:  # filters of a long text are asked at its end
        return True
    try:
        return not isinstance(parsing.text(record.raw, is_json), Dropped)
    except BadRecordError:
        return False
