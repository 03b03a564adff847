"""Spikes: a loss or a gradient norm far above those of the steps before it.

What is usual is the median of the newest steps, and how noisy it is the median change from one step to the next. A
spike itself moves neither, and nor does a loss that falls; so the watch needs no idea of the run. Chowdhery et al.
(PaLM, 2022, section 5.1) went back by hand from spikes of the loss, and passed over the batches around them.
"""

import itertools
import math
import statistics
from collections import deque
from collections.abc import Hashable
from typing import NamedTuple

WINDOW = 64
"""Steps whose changes tell how noisy a run is."""
LEAST = 16
"""Steps whose median is the usual; before there are so many, none is judged."""
NORMAL = 1.4826
"""Standard deviation of normal numbers whose median distance from their mean is 1."""
LOSS_SPREAD = 0.01
"""Least standard deviation that is assumed of a loss, in nats: what hardly changes must not spike by a hair."""
NORM_SPREAD = 0.1
"""The same of the logarithm of a norm."""


class Spike(NamedTuple):
    """One number that is far above those before it."""

    step: int
    what: str
    value: float
    usual: float
    score: float
    """Distance from the usual one, in standard deviations."""

    def __str__(self) -> str:
        return f"the {self.what} is {self.value:.4g}, {self.score:.0f} deviations above the usual {self.usual:.4g}"


class SpikeWatch:
    """Compares the loss and the gradient norm of each step with those of the ``WINDOW`` steps before it."""

    def __init__(self, least_score: float) -> None:
        """Args:
        least_score: of a spike.
        """
        self._least = least_score
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._setting: Hashable = None

    def look(self, step: int, loss: float, norm: float, setting: Hashable = None) -> list[Spike]:
        """Take the numbers of a step, and return those that are spikes, a loss before a norm.

        Args:
            step: that they are of.
            loss: nats per token.
            norm: of the gradients, before they are clipped; what is not finite is no spike of its own.
            setting: what the numbers depend on, such as the mixture of corpora; with another one the watch begins anew.
        """
        if setting != self._setting:
            self._losses.clear()
            self._norms.clear()
            self._setting = setting
        found = [self._judged(Spike(step, "loss", loss, *_compared(loss, self._losses, LOSS_SPREAD)))]
        if math.isfinite(norm) and norm > 0:  # norms are noisy by a factor, so their logarithms are compared
            usual, score = _compared(math.log(norm), self._norms, NORM_SPREAD)
            found.append(self._judged(Spike(step, "gradient norm", norm, math.exp(usual), score)))
        return [spike for spike in found if spike is not None]

    def _judged(self, spike: Spike) -> Spike | None:
        return spike if spike.score >= self._least else None


def _compared(value: float, before: deque[float], least_spread: float) -> tuple[float, float]:
    """The usual value, and how many standard deviations this one, which joins those before, is above it."""
    usual, score = value, 0.0
    if len(before) >= LEAST:
        usual = statistics.median(list(before)[-LEAST:])
        changes = [abs(one - other) for one, other in itertools.pairwise(before)]
        spread = NORMAL * statistics.median(changes) / math.sqrt(2)
        score = (value - usual) / max(spread, least_spread)
    before.append(value)
    return usual, score
