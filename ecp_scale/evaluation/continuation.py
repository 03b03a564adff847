"""The text of ids that come one after another, as it comes."""

from collections.abc import Iterable, Iterator, Sequence

from ecp_scale.data.tokenizer import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for the first bytes of a character."""
BEFORE = 8
"""Ids of the prompt that the first new one is decoded with."""
LONGEST = 8
"""Ids that a character may take; what is unfinished after so many is none."""


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
    ids, begin, end = list(prompt), max(0, len(prompt) - BEFORE), len(prompt)
    held_back = max((len(stop) for stop in stops), default=1) - 1
    waiting = ""
    for token in new:
        ids.append(token)
        text = _text_behind(tokenizer, ids[begin:], end - begin)
        if text.endswith(UNFINISHED) and len(ids) - end < LONGEST:
            continue
        waiting += text
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
        waiting += _text_behind(tokenizer, ids[begin:], end - begin)
    if waiting:
        yield waiting


def _text_behind(tokenizer: Tokenizer, ids: list[int], known: int) -> str:
    """Text of ids without that of the first ``known``, beside which the others are decoded as they are in the whole."""
    before, text = tokenizer.decode(ids[:known]), tokenizer.decode(ids)
    return text[len(before) :] if text.startswith(before) else tokenizer.decode(ids[known:])
