"""Learning rate as a function of tokens, so that it depends neither on the batch nor on a saved state."""

import math

from ecp_scale.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, tokens: int, run_tokens: int) -> float:
    """Rate of the update that brings the run to ``tokens``.

    Args:
        config: peak, warm-up and schedule.
        tokens: tokens seen, this step included.
        run_tokens: tokens of the whole run, where cosine ends unless ``decay_tokens`` is set.
    """
    peak = config.learning_rate
    if tokens < config.warmup_tokens:
        return peak * tokens / config.warmup_tokens
    if config.schedule == "constant":
        return peak
    if config.schedule == "halving":
        assert config.halving_tokens
        return peak * 0.5 ** (tokens // config.halving_tokens)
    end = config.decay_tokens or run_tokens
    progress = min(1.0, (tokens - config.warmup_tokens) / max(1, end - config.warmup_tokens))
    lowest = peak * config.min_lr_ratio
    return lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * progress))
