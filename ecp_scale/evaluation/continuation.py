"""The text of ids that come one after another, as it comes."""

from collections.abc import Iterable, Iterator, Sequence

from ecp_scale.data.tokenizer import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for the first bytes of a character."""


def pieces_of_text(
    tokenizer: Tokenizer, prompt: Sequence[int], new: Iterable[int], stops: Sequence[str] = ()
) -> Iterator[str]:
    """What follows a prompt, piece by piece, up to the first of some texts.

    Args:
        tokenizer: of the ids.
        prompt: ids before the first new one: a tokenizer may drop a space where a text begins.
        new: ids; no further one is asked for when a stop has been found.
        stops: texts that end it; they are not part of it.

    Yields:
        Text that no later id changes.
    """
    ids, begin, end = list(prompt), max(0, len(prompt) - 8), len(prompt)
    held_back = max((len(stop) for stop in stops), default=1) - 1
    waiting = ""
    for token in new:
        ids.append(token)
        known, text = tokenizer.decode(ids[begin:end]), tokenizer.decode(ids[begin:])
        if text.endswith(UNFINISHED) and len(ids) - end < 8:
            continue
        waiting += text[len(known) :] if text.startswith(known) else tokenizer.decode(ids[end:])
        begin, end = end, len(ids)
        found = min((place for stop in stops if (place := waiting.find(stop)) >= 0), default=None)
        if found is not None:
            yield waiting[:found]
            return
        certain = len(waiting) - held_back
        if certain > 0:
            yield waiting[:certain]
            waiting = waiting[certain:]
    if end < len(ids):
        known, text = tokenizer.decode(ids[begin:end]), tokenizer.decode(ids[begin:])
        waiting += text[len(known) :] if text.startswith(known) else tokenizer.decode(ids[end:])
    if waiting:
        yield waiting
