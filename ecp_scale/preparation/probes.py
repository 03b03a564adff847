"""Texts whose answers stand at a known distance: whether a model uses its context, and how far.

A probe is one training window of bytes: a source, filler, and at the end a question with its answer. Only the answer
has a loss. Between the position that predicts a symbol of the answer and the symbol that it needs lie exactly
``distance`` tokens, so what a model can know of it is decided by its receptive field, and a guess has a known chance.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

from ecp_scale.errors import InputError

Task: TypeAlias = Literal["copy", "recall", "passkey"]
LETTERS, DIGITS = "abcdefghijklmnopqrstuvwxyz", "0123456789"
FILLER = "."
ANSWERS: dict[Task, int] = {"copy": 12, "recall": 1, "passkey": 4}
"""Symbols of an answer."""
ALPHABETS: dict[Task, str] = {"copy": LETTERS, "recall": DIGITS, "passkey": DIGITS}
"""What they are drawn from."""
FRAMES: dict[Task, tuple[str, str, str]] = {"copy": ("<", ">", "="), "passkey": ("#", "#", "?")}
"""What opens and closes the source of an answer that stands in filler, and what asks for it."""


@dataclass(frozen=True)
class Probe:
    """A question and its answer: what is read, what must follow, and how far back it stands, in tokens."""

    prompt: str
    answer: str
    distance: int
    task: Task

    @property
    def record(self) -> dict[str, Any]:
        """As a line of JSON has it."""
        return asdict(self)


def chance(task: Task) -> float:
    """Share of the answer's symbols that a guess gets right."""
    return 1 / len(ALPHABETS[task])


def shortest(task: Task) -> int:
    """The smallest distance that a task has."""
    return 1 if task == "recall" else ANSWERS[task] + 1


def longest(task: Task, length: int) -> int:
    """The largest distance that fits into a window of ``length`` tokens, its end of document included."""
    # Beside it the answer, the end of the document, and what opens the source.
    return length - ANSWERS[task] - 3


def probes(task: Task, length: int, distances: Sequence[int], count: int, seed: int) -> Iterator[Probe]:
    """Probes of ``length`` tokens each, with the end of the document; number i has distance i modulo their number.

    * copy: ``<abc...>``, filler, ``=abc...``: the letters again.
    * recall: pairs of a letter and a digit in the filler; at the end a letter, which its digit must follow.
    * passkey: ``#4821#`` somewhere in the filler, at the end ``?4821``.

    Raises:
        InputError: if a distance does not fit.
    """
    check(task, length, distances, count)
    for number in range(count):
        # A generator of its own: number i is the same whatever their count.
        rng = random.Random(f"{task}/{seed}/{number}")
        distance = distances[number % len(distances)]
        yield _recall(rng, length - 1, distance) if task == "recall" else _hidden(task, rng, length - 1, distance)


def check(task: str, length: int, distances: Sequence[int], count: int) -> None:
    """Refuse what has no probes.

    Raises:
        InputError: saying what was expected.
    """
    if task not in get_args(Task):
        raise InputError(f"task is {task!r}, expected one of {', '.join(get_args(Task))}")
    if count < 1 or not distances:
        raise InputError(f"{count} probes at {len(distances)} distances, expected at least one of each")
    least, most = shortest(task), longest(task, length)  # type: ignore[arg-type]
    wrong = [distance for distance in distances if not least <= distance <= most]
    if wrong:
        raise InputError(
            f"distances {', '.join(map(str, wrong))} of {task} do not fit into a window of {length} tokens, expected "
            f"{least} to {most}"
        )


def _hidden(task: Task, rng: random.Random, size: int, distance: int) -> Probe:
    """A copy or a pass key."""
    opening, closing, asks = FRAMES[task]
    answer = "".join(rng.choices(ALPHABETS[task], k=ANSWERS[task]))
    # The position that asks predicts the first symbol, whose source lies ``distance`` before it.
    prompt = [FILLER] * (size - len(answer))
    prompt[-1] = asks
    _write(prompt, len(prompt) - 1 - distance - 1, opening + answer + closing)
    return Probe("".join(prompt), answer, distance, task)


def _recall(rng: random.Random, size: int, distance: int) -> Probe:
    prompt = [FILLER] * (size - 1)
    asked, *others = rng.sample(LETTERS, len(LETTERS))
    value = rng.choice(DIGITS)
    prompt[-1] = asked
    # The digit lies ``distance`` before the last position, its letter one before that.
    place = len(prompt) - 1 - distance - 1
    free = [other for other in range(0, len(prompt) - 2, 2) if abs(other - place) > 1]
    for letter, other in zip(others, rng.sample(free, min(len(others), len(free))), strict=False):
        _write(prompt, other, letter + rng.choice(DIGITS))
    _write(prompt, place, asked + value)
    return Probe("".join(prompt), value, distance, "recall")


def _write(text: list[str], place: int, what: str) -> None:
    text[place : place + len(what)] = what
