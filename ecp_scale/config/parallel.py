"""How ranks share the work, and every check on it."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from ecp_scale.config.checks import not_positive
from ecp_scale.config.model import ModelConfig

Recompute: TypeAlias = Literal["none", "selective", "full"]
"""What is computed again in the backward pass: the hidden layer of the feed-forward network; attention, too; whole
blocks."""

LONGEST_SECONDS = 10**7


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks share the work: world size = tensor * context * data."""

    tensor: int = 1
    """Ranks that share every matrix (Megatron tensor parallelism)."""
    context: int = 1
    """Ranks that share a sequence: each holds a run of segments and sends its last one to the right (ecp,
    sliding_window)."""
    sequence: bool = False
    """Ranks of a tensor group split the positions where they do not split matrices (Megatron sequence parallelism)."""
    recompute: Recompute = "none"
    """Activations computed again in the backward pass instead of kept, besides the hidden layer of the feed-forward
    network: none, attention, or whole blocks."""
    timeout_seconds: int = 600
    """How long a rank waits for the others before it gives up."""

    def problems(self, model: ModelConfig, world_size: int | None) -> list[str]:
        """Everything that is wrong with the layout; ``world_size`` None means not launched yet."""
        found = not_positive("parallel", self, ("tensor", "context", "timeout_seconds"))
        if self.timeout_seconds > LONGEST_SECONDS:
            found.append(f"parallel.timeout_seconds is {self.timeout_seconds}, expected at most {LONGEST_SECONDS}")
        if found:
            return found
        if model.heads % self.tensor:
            found.append(f"model.heads {model.heads} is not divisible by parallel.tensor {self.tensor}")
        if model.key_value_heads and model.key_value_heads % self.tensor:
            found.append(
                f"model.key_value_heads {model.key_value_heads} is not divisible by parallel.tensor {self.tensor}: "
                "a rank holds whole key/value heads"
            )
        if model.feed_forward_width % self.tensor:
            found.append(
                f"model.feed_forward_width {model.feed_forward_width} is not divisible by parallel.tensor {self.tensor}"
            )
        if world_size is not None and world_size % (self.tensor * self.context):
            found.append(
                f"the launch has {world_size} ranks, not a multiple of "
                f"parallel.tensor * parallel.context = {self.tensor} * {self.context}"
            )
        return found + self._sequence_problems(model)

    def _sequence_problems(self, model: ModelConfig) -> list[str]:
        """What is wrong with the ways to share a sequence."""
        found = []
        n, halo = model.sequence_length, model.geometry.halo_positions
        what = "model.window" if model.architecture == "sliding_window" else "model.segment_length"
        if self.context > 1 and not halo:
            found.append(
                f"parallel.context is {self.context}, but {model.architecture} is not local: only ecp and "
                "sliding_window need no more than a segment from the rank to the left"
            )
        elif self.context > 1 and n % (self.context * halo):
            found.append(
                f"model.sequence_length {n} is not a multiple of parallel.context * {what} = {self.context} * {halo}: "
                "every rank holds whole segments"
            )
        if self.sequence and self.tensor == 1:
            found.append("parallel.sequence is true without tensor parallelism: parallel.tensor is 1")
        if self.sequence and not model.geometry.streams:
            found.append(
                f"parallel.sequence is true, but the layers of {model.architecture} keep different numbers of rows"
            )
        elif self.sequence and n // self.context % self.tensor:
            found.append(
                f"model.sequence_length / parallel.context = {n} / {self.context} is not divisible by parallel.tensor "
                f"{self.tensor}, which parallel.sequence requires"
            )
        return found

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas of the model; at least 1, so that other checks can go on where the layout is wrong."""
        return max(1, world_size // max(1, self.tensor * self.context))
