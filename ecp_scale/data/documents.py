"""Documents of text inputs, read and parsed in this process."""

from collections.abc import Iterator, Sequence

from ecp_scale.data.parsing import BadRecordError, Parsing
from ecp_scale.data.sources import Place, Source
from ecp_scale.errors import InputError


def read_documents(sources: Sequence[Source], parsing: Parsing) -> Iterator[str]:
    """Documents in order; what the parsing drops is left out.

    Raises:
        InputError: naming the source and the record that cannot be read.
    """
    for number, source in enumerate(sources):
        for record in source.records(number, Place(number), parsing.reading):
            try:
                text = parsing.text(record.raw, source.is_json)
            except BadRecordError as error:
                raise InputError(f"{record.name}: {error}") from error
            if text is not None:
                yield text
