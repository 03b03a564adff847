"""How long, how fast and where a run trains."""

from dataclasses import dataclass
from typing import Literal

from ecp_scale.config.checks import not_positive, range_problems


@dataclass(frozen=True)
class TrainingConfig:
    """How long, how fast and where."""

    output_dir: str | None = None
    """Run folder: resolved config, metrics.jsonl, checkpoints."""
    steps: int = 1000
    """Optimizer steps of the whole run."""
    tokens: int | None = None
    """Tokens of the whole run in place of training.steps: it ends with the step that reaches them."""
    seed: int = 1
    """Seed of the weights, the order of samples and dropout."""
    micro_batch_size: int = 1
    """Sequences that one rank processes at a time."""
    global_batch_size: int = 16
    """Sequences of one optimizer step, over all ranks and accumulation steps."""
    batch_schedule: dict[int, int] | None = None
    """Other sizes of the global batch, from how many tokens of the run on, as {1000000: 32, 4000000: 64}."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Type of weights in the forward pass; bf16 keeps fp32 master weights."""
    compile: bool | Literal["auto"] = "auto"
    """Compile norms, rotary positions, SwiGLU and the softmax of the loss with torch.compile; the first step then takes
    up to minutes longer. auto does so on a GPU."""
    tf32: bool = False
    """On a GPU, round the operands of fp32 matrix products to TF32: several times as fast, with 10 bits of mantissa."""
    flash_attention: Literal["torch", "FA3", "FA4"] = "torch"
    """FlashAttention of a GPU: torch's own, or one of an installed package that torch puts in its place; those have no
    dropout."""
    validation_every_steps: int = 100
    """Optimizer steps between two validations."""
    validation_windows: int = 64
    """Windows of the validation shards that are scored, from the first on."""
    z_loss: float = 0.0
    """Weight of log(Z)^2 in the training, Z the sum of exp(score) over the vocabulary, which keeps scores from growing
    (PaLM: 1e-4); the losses that are reported are without it."""
    max_skipped_steps: int = 5
    """Updates in a row with non-finite gradients after which the run stops with a report."""
    skip_samples: dict[int, int] | None = None
    """Samples of the run that are passed over, by number, from the first to the last of a range, as {1200: 1263}; a
    resume then goes on from the newest checkpoint that has read none of them."""
    spike_score: float = 10.0
    """A loss or gradient norm is a spike that is so many standard deviations above the median of the 16 steps before
    it."""
    on_spike: Literal["warn", "roll_back"] = "warn"
    """At a spike of the loss: say so, or go back to the newest checkpoint before it and pass over the samples around
    it, by training.skip_samples."""
    spike_skip_steps: int = 10
    """Steps up to a spike whose samples are passed over after going back."""

    def problems(self) -> list[str]:
        """Everything that is wrong with the run's length and batch."""
        names = ("steps", "micro_batch_size", "global_batch_size", "validation_every_steps", "validation_windows")
        found = not_positive("training", self, (*names, "max_skipped_steps", "spike_score", "spike_skip_steps"))
        found += range_problems(self.skip_samples or {}, "training.skip_samples")
        if self.tokens is not None:
            found += not_positive("training", self, ("tokens",))
        if self.z_loss < 0:
            found.append(f"training.z_loss is {self.z_loss}, expected at least 0")
        if not 0 <= self.seed < 2**63:
            found.append(f"training.seed is {self.seed}, expected a number from 0 to 2^63 - 1")
        for tokens, sequences in (self.batch_schedule or {}).items():
            if tokens < 0 or sequences < 1:
                found.append(
                    f"training.batch_schedule from {tokens} tokens: {sequences} sequences, expected at least 0 and 1"
                )
        return found
