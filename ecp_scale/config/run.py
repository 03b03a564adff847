"""The configuration of a run: frozen dataclasses and every check on them.

The words that --help prints about a field are the text below it.
"""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeAlias

from ecp_scale.config.checks import not_positive, unusable
from ecp_scale.config.data import DataConfig
from ecp_scale.config.model import ModelConfig
from ecp_scale.config.optimizer import OptimizerConfig
from ecp_scale.config.parallel import ParallelConfig
from ecp_scale.config.training import TrainingConfig

AttentionBackend: TypeAlias = Literal["auto", "reference", "sdpa", "flash", "flex"]


@dataclass(frozen=True)
class AttentionConfig:
    """What attention does at the borders of documents, and what computes it."""

    backend: AttentionBackend = "auto"
    """What computes attention: a flash kernel in a few calls for all segments (flash), FlexAttention (flex, on a GPU),
    torch's scaled_dot_product_attention for each segment (sdpa), all scores by definition (reference), or the fastest
    that serves (auto). All compute the same; one that cannot, as flash on a CPU with dropout, is refused by name."""
    document_mask: bool = False
    """Attention never crosses the border of a document, in any architecture."""
    restart_positions: bool = False
    """Rotary positions count from 0 in every document; needs document_mask."""
    end_of_document: int | None = None
    """Token id that ends a document; null takes the tokenizer's."""

    def problems(self, model: ModelConfig, has_shards: bool) -> list[str]:
        """Everything that is wrong with the mask; ``has_shards`` says whether a tokenizer knows the end."""
        found = []
        end = self.end_of_document
        if self.document_mask and end is None and not has_shards:
            found.append(
                "attention.document_mask is true without document ids: attention.end_of_document is null, and there is "
                "no data.prefix or data.blend whose tokenizer would tell it"
            )
        if end is not None and not 0 <= end < (model.vocab_size or end + 1):
            found.append(f"attention.end_of_document is {end}, expected an id from 0 to {(model.vocab_size or 0) - 1}")
        if self.restart_positions and not self.document_mask:
            found.append("attention.restart_positions is true but attention.document_mask is false")
        released = model.architecture == "compressed_double_attention" and model.compression_residual == "release"
        if self.document_mask and released:
            found.append(
                "attention.document_mask with model.compression_residual release: that residual adds the rows of "
                "other documents; use aligned"
            )
        return found


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved."""

    every_steps: int = 1000
    """Optimizer steps between two checkpoints; the last step is always saved."""
    keep_last: int | None = None
    """Newest checkpoints to keep; null keeps all."""
    keep_every: int | None = None
    """Beside the newest ones, keep those whose step is a multiple of this."""
    mirror: str | None = None
    """A second folder that checkpoints are copied to behind the training, and that a resume takes where it has more."""
    asynchronous: bool = False
    """Write checkpoints behind the training, from a copy of the states in host memory; one at a time."""
    on_failed_save: Literal["stop", "continue"] = "stop"
    """What a run does when a checkpoint cannot be written, as where the disk is full."""

    def problems(self) -> list[str]:
        """Everything that is wrong with the checkpoints."""
        names = [name for name in ("keep_last", "keep_every") if getattr(self, name) is not None]
        found = not_positive("checkpoint", self, ("every_steps", *names))
        if self.keep_every is not None and self.keep_last is None:
            found.append("checkpoint.keep_every is set, but without checkpoint.keep_last all are kept")
        return found


@dataclass(frozen=True)
class LoggingConfig:
    """Where the numbers go besides metrics.jsonl."""

    wandb: Literal["online", "offline", "disabled"] = "disabled"
    """Weights & Biases mode."""
    wandb_project: str = "ecp-scale"
    """Weights & Biases project."""
    run_name: str | None = None
    """Name of the run; null takes the name of the run folder."""
    tensorboard: bool = False
    """Write TensorBoard's event files to RUN/tensorboard."""
    every_steps: int = 1
    """Optimizer steps between two lines on the screen, where it is no terminal."""
    profile_steps: tuple[int, int] | None = None
    """First and last step to profile on the first rank, as [10, 12]; RUN/profile gets a trace, on a GPU memory too."""
    peak_teraflops: float | None = None
    """Peak of one device at the run's precision, for mfu; null looks known GPUs up."""

    def problems(self) -> list[str]:
        """Everything that is wrong with the logging."""
        found = not_positive(
            "logging", self, ("every_steps", *(["peak_teraflops"] if self.peak_teraflops is not None else []))
        )
        if self.profile_steps is not None and not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
            found.append(f"logging.profile_steps is {list(self.profile_steps)}, expected the first step and the last")
        return found


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @cached_property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all ranks, before any other size of training.batch_schedule holds."""
        return self.training.global_batch_size * self.model.sequence_length

    def sequences_after(self, tokens: int) -> int:
        """Sequences of the optimizer step that follows ``tokens`` tokens of the run."""
        begun = [start for start in self.training.batch_schedule or {} if start <= tokens]
        return (self.training.batch_schedule or {})[max(begun)] if begun else self.training.global_batch_size

    def steps_to(self, tokens: int, done: int = 0, taken: int = 0) -> int:
        """The first step of a run, of which ``done`` have taken ``taken`` tokens, after which it has ``tokens``."""
        while taken < tokens:
            step = self.sequences_after(taken) * self.model.sequence_length
            ahead = [start for start in self.training.batch_schedule or {} if taken < start < tokens]
            alike = -(-(min([*ahead, tokens]) - taken) // step)
            taken, done = taken + alike * step, done + alike
        return done

    def with_length(self, done: int = 0, taken: int = 0) -> "Config":
        """The same with ``training.steps`` of ``training.tokens``, where these are set; see ``steps_to``."""
        if self.training.tokens is None:
            return self
        steps = self.steps_to(self.training.tokens, done, taken)
        return dataclasses.replace(self, training=dataclasses.replace(self.training, steps=steps))

    def tokens_after(self, steps: int, done: int = 0, tokens: int = 0) -> int:
        """Tokens of a run of ``steps`` steps, of which ``done`` have taken ``tokens``."""
        left = steps - done
        while left > 0:
            step = self.sequences_after(tokens) * self.model.sequence_length
            ahead = [start - tokens for start in self.training.batch_schedule or {} if start > tokens]
            alike = min(left, -(-min(ahead) // step)) if ahead else left
            tokens, left = tokens + alike * step, left - alike
        return tokens

    def run_tokens(self, done: int = 0, taken: int = 0) -> int:
        """Tokens of the whole run, of which ``done`` steps have taken ``taken``; the same at every step of it."""
        training = self.training
        steps = training.steps if training.tokens is None else self.steps_to(training.tokens, done, taken)
        return self.tokens_after(steps, done, taken)

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches of one rank in one optimizer step."""
        together = self.training.micro_batch_size * self.parallel.data_parallel_size(world_size)
        return max(1, self.training.global_batch_size // max(1, together))

    def without_effect(self, fields: Iterable[str]) -> list[tuple[str, str]]:
        """Which of these fields the choices of others make idle, and those choices."""
        model, optimizer = self.model, self.optimizer
        idle = {f"model.{name}": f"model.architecture {model.architecture}" for name in model.ignored()}
        schedule = f"optimizer.schedule {optimizer.schedule}"
        if optimizer.schedule != "halving":
            idle["optimizer.halving_tokens"] = schedule
        if optimizer.schedule != "cosine":
            idle["optimizer.decay_tokens"] = schedule
        if optimizer.schedule != "wsd":
            idle["optimizer.cooldown_tokens"] = schedule
        if optimizer.schedule not in ("cosine", "wsd"):
            idle["optimizer.min_lr_ratio"] = schedule
        if model.task == "language":
            idle["model.pooling"] = f"model.task {model.task}"
        if model.rotary == "none":
            idle |= dict.fromkeys(("model.rotary_theta", "attention.restart_positions"), "model.rotary none")
        if optimizer.name != "muon":
            idle["optimizer.momentum"] = f"optimizer.name {optimizer.name}"
        if optimizer.name == "sgd":
            idle |= dict.fromkeys(("optimizer.beta1", "optimizer.beta2", "optimizer.epsilon"), "optimizer.name sgd")
        return [(field, idle[field]) for field in fields if field in idle]

    def remarks(self) -> list[str]:
        """What can be meant, but seldom is."""
        run = self.with_length()
        tokens = run.tokens_after(run.training.steps)
        warmup, training, checkpoint = self.optimizer.warmup_tokens, self.training, self.checkpoint
        found = []
        if warmup > tokens:
            found.append(
                f"optimizer.warmup_tokens {warmup:,} is beyond the {tokens:,} tokens of the run: the rate stays low"
            )
        kept = ((checkpoint.keep_last or run.training.steps) - 1) * checkpoint.every_steps
        if training.on_spike == "roll_back" and kept <= training.spike_skip_steps:
            found.append(
                f"training.on_spike roll_back goes back {training.spike_skip_steps} steps and more, of which "
                f"checkpoint.keep_last {checkpoint.keep_last} and every_steps {checkpoint.every_steps} may leave none"
            )
        return found

    def problems(self, world_size: int | None = None) -> list[str]:
        """Everything that is wrong, at once; ``world_size`` None means not launched yet."""
        sections = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        beyond = [text for name, section in sections.items() for text in unusable(name, section)]
        if beyond:
            return beyond
        training = self.training.problems()
        found = self.model.problems() + self.attention.problems(self.model, self.data.is_set)
        found += self.parallel.problems(self.model, world_size) + self.optimizer.problems()
        if self.model.task == "classification" and self.parallel.context > 1:
            found.append(
                f"parallel.context is {self.parallel.context}, but model.task classification pools whole windows: use 1"
            )
        found += training + self.checkpoint.problems() + self.data.problems() + self.logging.problems()
        if not training:
            ranks = self.parallel.data_parallel_size(world_size or 1)
            together = self.training.micro_batch_size * ranks
            sizes = {"training.global_batch_size": self.training.global_batch_size}
            for tokens, sequences in (self.training.batch_schedule or {}).items():
                sizes[f"training.batch_schedule from {tokens} tokens"] = sequences
            found += [
                f"{name} {size} is not a multiple of training.micro_batch_size * data-parallel ranks = "
                f"{self.training.micro_batch_size} * {ranks}; {self._that_divides(size, ranks)}"
                for name, size in sizes.items()
                if size % together
            ]
        return found or self._length_problems()

    def _length_problems(self) -> list[str]:
        """What does not fit into the run; every number is in its range."""
        optimizer, run = self.optimizer, self.with_length()
        tokens = run.tokens_after(run.training.steps)
        cooldown = optimizer.cooldown_of(tokens)
        if optimizer.schedule != "wsd" or optimizer.warmup_tokens + cooldown <= tokens:
            return []
        return [
            f"optimizer.warmup_tokens {optimizer.warmup_tokens} and a cool-down of {cooldown} tokens "
            f"(optimizer.cooldown_tokens) do not fit into a run of {tokens} tokens"
        ]

    def _that_divides(self, sequences: int, ranks: int) -> str:
        if sequences % ranks:
            return f"{-(-sequences // ranks) * ranks} sequences can be shared out"
        return f"training.micro_batch_size {math.gcd(sequences // ranks, self.training.micro_batch_size)} divides it"
