"""How gradients become weights: the optimizer's numbers, and the learning rate as a function of tokens."""

import math
from dataclasses import dataclass
from typing import Literal

from ecp_scale.config.checks import not_positive


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become weights. Schedules count tokens, so they do not depend on the batch size."""

    name: Literal["adamw", "muon", "sgd"] = "adamw"
    """Update rule; muon is for the blocks' matrices, with AdamW for all else (ZeRO-0 to -2); sgd has no momentum."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    epsilon: float = 1e-8
    """AdamW's epsilon."""
    momentum: float = 0.95
    """Muon's."""
    average_decay: float | None = None
    """Keep a moving average of the weights, of which so large a share stays at a step (as 0.999); null keeps none."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on the weights of linear layers only."""
    gradient_clipping: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    schedule: Literal["constant", "cosine", "halving", "wsd"] = "cosine"
    """Learning rate after the warm-up; wsd (warm-up, stable, decay) is constant and then falls linearly at the end."""
    warmup_tokens: int = 0
    """Tokens over which the rate rises linearly from 0."""
    decay_tokens: int | None = None
    """Tokens at which cosine reaches its minimum; null means the whole run."""
    min_lr_ratio: float = 0.1
    """Final rate of cosine and wsd as a share of the peak."""
    cooldown_tokens: int | None = None
    """Tokens at the end of the run over which the rate of wsd falls; null means a fifth of the run."""
    halving_tokens: int | None = None
    """Tokens between two halvings of the rate (schedule halving)."""

    def problems(self) -> list[str]:
        """Everything that is wrong with the optimizer."""
        found = not_positive("optimizer", self, ("learning_rate", "epsilon"))
        for name in ("weight_decay", "gradient_clipping", "warmup_tokens", "min_lr_ratio"):
            if getattr(self, name) < 0:
                found.append(f"optimizer.{name} is {getattr(self, name)}, expected at least 0")
        for name in ("beta1", "beta2", "momentum", *(["average_decay"] if self.average_decay is not None else [])):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"optimizer.{name} is {getattr(self, name)}, expected at least 0 and below 1")
        if self.schedule == "halving" and not self.halving_tokens:
            found.append("optimizer.schedule is halving but optimizer.halving_tokens is not set")
        if self.decay_tokens is not None and self.decay_tokens <= self.warmup_tokens:
            found.append(
                f"optimizer.decay_tokens {self.decay_tokens} is not beyond optimizer.warmup_tokens {self.warmup_tokens}"
            )
        if self.cooldown_tokens is not None:
            found += not_positive("optimizer", self, ("cooldown_tokens",))
        return found

    def states(self, orthogonal: bool) -> int:
        """Numbers that are kept of each weight; ``orthogonal``: of those that Muon updates."""
        moments = {"adamw": 2, "sgd": 0, "muon": 1 if orthogonal else 2}[self.name]
        return moments + (self.average_decay is not None)

    def cooldown_of(self, run_tokens: int) -> int:
        """Tokens over which the rate of wsd falls in a run of ``run_tokens``."""
        return self.cooldown_tokens if self.cooldown_tokens is not None else max(1, run_tokens // 5)

    def learning_rate_at(self, tokens: int, run_tokens: int) -> float:
        """Rate of the update that brings the run to ``tokens``; it depends neither on the batch nor on a saved state.

        Args:
            tokens: tokens seen, this step included.
            run_tokens: tokens of the whole run, where wsd ends, and cosine unless ``decay_tokens`` is set.
        """
        peak = self.learning_rate
        if tokens < self.warmup_tokens:
            return peak * tokens / self.warmup_tokens
        if self.schedule == "constant":
            return peak
        if self.schedule == "halving":
            assert self.halving_tokens
            return peak * 0.5 ** (tokens // self.halving_tokens)
        lowest = peak * self.min_lr_ratio
        if self.schedule == "wsd":
            left = max(0, run_tokens - tokens) / self.cooldown_of(run_tokens)
            return lowest + (peak - lowest) * min(1.0, left)
        end = self.decay_tokens or run_tokens
        progress = min(1.0, (tokens - self.warmup_tokens) / max(1, end - self.warmup_tokens))
        return lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * progress))
