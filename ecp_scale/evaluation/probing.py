"""How many answers of a probe a model gets right, by their distance (``ecp_scale.preparation.probes``)."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from ecp_scale.data.tokenizer import Tokenizer
from ecp_scale.errors import InputError
from ecp_scale.models.language_model import LanguageModel
from ecp_scale.preparation.probes import Probe, chance

BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Accuracy:
    """Of the answers at one distance: their symbols, and how many were the model's first choice; and whole answers."""

    distance: int
    symbols: int
    right_symbols: int
    answers: int
    right_answers: int

    @property
    def share(self) -> float:
        """Share of the symbols that are right."""
        return self.right_symbols / self.symbols


def read_probes(path: Path) -> list[Probe]:
    """Read the probes that ``ecp-make-probe`` wrote.

    Raises:
        InputError: naming the line that is none.
    """
    found = []
    try:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            try:
                probe = Probe(**json.loads(line))
                if [type(value) for value in vars(probe).values()] != [str, str, int, str]:
                    raise TypeError("expected text, text, a number and text")
                chance(probe.task)
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(f"{path}, line {number}: not a probe of ecp-make-probe ({error})") from error
            found.append(probe)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if not found:
        raise InputError(f"{path}: no probes")
    return found


def check_length(path: Path, probes: Sequence[Probe], tokenizer: Tokenizer, sequence_length: int) -> None:
    """Refuse probes that are not one window each.

    Raises:
        InputError: with both lengths.
    """
    for probe in probes:
        length = len(tokenizer.encode(probe.prompt)) + len(tokenizer.encode(probe.answer)) + 1
        if length != sequence_length:
            raise InputError(
                f"{path}: a probe has {length} tokens with its end, but model.sequence_length is {sequence_length}; "
                f"make them with --length {sequence_length}"
            )


@torch.no_grad()
def accuracies(
    model: LanguageModel, tokenizer: Tokenizer, probes: Iterable[Probe], batch: int | None = None
) -> list[Accuracy]:
    """Accuracy by distance, nearest first.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        probes: whose texts, with their ends, are one training window each.
        batch: probes that are read together; None takes what fits into ``BATCH_TOKENS``.
    """
    device = next(model.parameters()).device
    batch = batch or max(1, BATCH_TOKENS // model.config.sequence_length)
    counts: dict[int, list[int]] = {}
    for some in _batches(probes, batch):
        asked = [tokenizer.encode(probe.prompt) for probe in some]
        answers = [tokenizer.encode(probe.answer) for probe in some]
        # As in training: the whole window is read, and what follows a position is not seen there.
        rows = [[*first, *last, tokenizer.end_of_document] for first, last in zip(asked, answers, strict=True)]
        said = model.logits(torch.tensor(rows, device=device)).argmax(-1).cpu()
        for probe, answer, row in zip(some, answers, said, strict=True):
            behind = len(answer) + 2  # the last position of the prompt, from the end of the window
            right = row[-behind : len(row) - 2] == torch.tensor(answer)
            sums = counts.setdefault(probe.distance, [0, 0, 0, 0])
            for place, more in enumerate((len(answer), int(right.sum()), 1, int(right.all()))):
                sums[place] += more
    return [Accuracy(distance, *sums) for distance, sums in sorted(counts.items())]


def _batches(probes: Iterable[Probe], size: int) -> Iterator[list[Probe]]:
    remaining = iter(probes)
    while some := list(islice(remaining, size)):
        yield some
