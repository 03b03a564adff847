"""Which token ends a document: named by the user, declared beside the tokenizer, or known by its name."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ecp_scale.errors import InputError

ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
"""Names of tokens that end a document, taken in this order and only where the tokenizer calls them special."""
DECLARATIONS = ("tokenizer_config.json", "special_tokens_map.json")
"""Files of Hugging Face beside a tokenizer.json that may declare an ``eos_token``."""


class End(NamedTuple):
    """The id of the token that ends a document, and why it was taken."""

    token: int
    reason: str


def choose_end(path: Path, vocabulary: Mapping[str, int], special: Sequence[str], wanted: str | int | None) -> End:
    """The end of documents of a tokenizer of Hugging Face's.

    Args:
        path: the tokenizer's file; declarations are looked for beside it.
        vocabulary: the id of every entry, added tokens included.
        special: entries that the tokenizer calls special.
        wanted: the entry that the user names, or its id; None leaves the choice to declaration and name.

    Raises:
        InputError: listing the candidates, where nothing tells the end.
    """
    if isinstance(wanted, int):
        return End(wanted, f"id {wanted}, by the record of the shards")
    if wanted is not None:
        if wanted not in vocabulary:
            raise InputError(f"tokenizer {path}: has no entry {wanted!r}{_candidates(special)}")
        return End(vocabulary[wanted], f"{wanted}, by --end-token")
    for name in DECLARATIONS:
        declared = _declared(path.with_name(name))
        if declared is not None and declared not in vocabulary:
            raise InputError(
                f"{path.with_name(name)}: eos_token is {declared!r}, which {path.name} does not have; name another "
                f"with --end-token{_candidates(special)}"
            )
        if declared is not None:
            return End(vocabulary[declared], f"{declared}, the eos_token of {name}")
    for name in ENDS:
        if name in special:
            return End(vocabulary[name], f"{name}, by its name")
    raise InputError(
        f"tokenizer {path}: no special token is called {', '.join(ENDS)}, and no {' or '.join(DECLARATIONS)} beside it "
        f"declares an eos_token; name the token that ends a document with --end-token{_candidates(special)}"
    )


def _candidates(special: Sequence[str]) -> str:
    shown = ", ".join(special[:10]) + (f" and {len(special) - 10} more" if len(special) > 10 else "")
    return f" (special tokens: {shown})" if special else " (it has no special tokens)"


def _declared(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError, OSError) as error:
        raise InputError(f"{path}: not a declaration of special tokens ({error})") from error
    content = found.get("content") if isinstance(found, dict) else found
    return content if isinstance(content, str) else None
