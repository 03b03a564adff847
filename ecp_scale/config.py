"""The configuration of a run: frozen dataclasses, what they count, and every check on them.

Symbols in the documentation follow the paper: L layers, D width, h heads, e = D/h, n sequence length, m segment length.
Counts live here and are tested against the built model; nothing here imports torch. The file is longer than the others
because every field of a run is explained here, in the words that --help prints.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """What the model is: its size, its attention pattern and the switches between `paper` and `scaled`."""

    preset: str | None = None
    """Preset whose values are the defaults of this run (the YAML files in ecp_scale/presets)."""
    architecture: Literal["ecp"] = "ecp"
    """Attention pattern."""
    vocab_size: int | None = None
    """Vocabulary entries V; null takes the number from the tokenizer of the training shards."""
    vocab_multiple: int = 128
    """The stored vocabulary is padded to a multiple of this times parallel.tensor; the padding never shows."""
    layers: int = 12
    """Residual blocks L."""
    width: int = 768
    """Model width D."""
    heads: int = 6
    """Query heads h."""
    key_value_heads: int | None = None
    """Key/value heads (grouped-query attention); null means as many as heads."""
    feed_forward_width: int = 3072
    """Hidden width of the feed-forward network."""
    sequence_length: int = 2048
    """Tokens of a training window n."""
    segment_length: int = 256
    """Tokens of a segment m."""
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    """Normalisation before attention, before the feed-forward network and before the output layer."""
    activation: Literal["gelu", "swiglu"] = "swiglu"
    """Feed-forward network: Linear-GELU-Linear (erf GELU) or SwiGLU."""
    bias: bool = False
    """Biases in the output projections, the feed-forward network and the output layer (queries and keys never)."""
    tied_key_value: bool = False
    """One projection serves as keys and as values (paper)."""
    rotary: Literal["first_layer", "every_layer"] = "every_layer"
    """Layers whose queries and keys are rotated; tied values are rotated with their keys."""
    rotary_theta: float = 10000.0
    """Base of the rotary frequencies."""
    qk_norm: bool = True
    """RMSNorm over every query and key head before the rotation."""
    first_segment_projection: bool = False
    """The first segment has an output projection of its own (paper)."""
    dropout: float = 0.0
    """Dropout on attention weights and on the feed-forward hidden layer."""
    initialization: Literal["pytorch", "depth_scaled"] = "depth_scaled"
    """PyTorch's defaults, or normal with std 0.02 and 0.02 / sqrt(2L) at the end of residual branches."""
    allow_short_reach: bool = False
    """Permit a reach (L+1)*m below sequence_length."""

    @property
    def head_width(self) -> int:
        """Width of one head, e."""
        return self.width // self.heads

    @property
    def key_value_width(self) -> int:
        """Width of all keys of one position."""
        return (self.key_value_heads or self.heads) * self.head_width

    @property
    def reach_tokens(self) -> int:
        """Farthest position, counted from 1 at itself, that the last token of a segment depends on: (L+1)*m."""
        return (self.layers + 1) * self.segment_length

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        """Rows of the stored embedding: V rounded up to a multiple of vocab_multiple * tensor_parallel."""
        multiple = self.vocab_multiple * tensor_parallel
        return -(-self.known_vocab_size // multiple) * multiple

    @property
    def known_vocab_size(self) -> int:
        """Vocabulary entries; an error of ours where the tokenizer has not been consulted yet."""
        assert self.vocab_size is not None, "vocab_size is read from the tokenizer before the model is built"
        return self.vocab_size

    @property
    def layer_matrix_parameters(self) -> int:
        """Entries of the matrices that one token meets in one layer."""
        key_value = (1 if self.tied_key_value else 2) * self.width * self.key_value_width
        feed_forward = (3 if self.activation == "swiglu" else 2) * self.width * self.feed_forward_width
        return 2 * self.width**2 + key_value + feed_forward

    @property
    def parameters(self) -> int:
        """Trainable parameters, without the padding of the vocabulary."""
        norm = self.width * (2 if self.norm == "layernorm" else 1)
        projections = 2 if self.first_segment_projection else 1
        layer = self.layer_matrix_parameters + (projections - 1) * self.width**2 + 2 * norm
        layer += 2 * self.head_width if self.qk_norm else 0
        if self.bias:
            ffn_matrices_out = 2 if self.activation == "swiglu" else 1
            layer += projections * self.width + ffn_matrices_out * self.feed_forward_width + self.width
        head_bias = self.known_vocab_size if self.bias else 0
        return self.layers * layer + 2 * self.known_vocab_size * self.width + norm + head_bias

    @property
    def score_pairs(self) -> int:
        """Query-key pairs of one head over a sequence of n tokens: 1.5 m n, less the missing left of segment 0."""
        m = self.segment_length
        segments = self.sequence_length // m
        return segments * m * (m + 1) // 2 + (segments - 1) * m * m

    @property
    def flops_per_token(self) -> float:
        """Floating-point operations of a training step per token: forward, and twice that for backward.

        Matrix products only: 2 per matrix entry, 4 D per score pair.
        """
        matrices = self.layers * self.layer_matrix_parameters + self.known_vocab_size * self.width
        attention = self.layers * 4 * self.width * self.score_pairs / self.sequence_length
        return 3 * (2 * matrices + attention)

    def problems(self) -> list[str]:
        """Everything that is wrong with the model, each with its numbers."""
        found = _not_positive(
            "model",
            self,
            ("layers", "width", "heads", "feed_forward_width", "sequence_length", "segment_length", "vocab_multiple"),
        )
        for name in ("vocab_size", "key_value_heads"):
            if getattr(self, name) is not None:
                found += _not_positive("model", self, (name,))
        if not 0 <= self.dropout < 1:
            found.append(f"model.dropout is {self.dropout}, expected at least 0 and below 1")
        if found:
            return found
        if self.width % self.heads:
            found.append(f"model.width {self.width} is not divisible by model.heads {self.heads}")
        elif self.head_width % 2:
            found.append(f"model.width / model.heads is {self.head_width}; rotary positions need an even head width")
        if self.key_value_heads and self.heads % self.key_value_heads:
            found.append(f"model.heads {self.heads} is not divisible by model.key_value_heads {self.key_value_heads}")
        if self.sequence_length % self.segment_length:
            found.append(
                f"model.sequence_length {self.sequence_length} is not a multiple of "
                f"model.segment_length {self.segment_length}"
            )
        if self.reach_tokens < self.sequence_length and not self.allow_short_reach:
            found.append(
                f"the reach (layers + 1) * segment_length = ({self.layers} + 1) * {self.segment_length} = "
                f"{self.reach_tokens} is shorter than model.sequence_length {self.sequence_length}; "
                "set model.allow_short_reach to accept that"
            )
        if self.first_segment_projection and self.sequence_length <= self.segment_length:
            found.append(
                f"model.first_segment_projection with one segment (sequence_length {self.sequence_length}, "
                f"segment_length {self.segment_length}) would leave the other projection untrained"
            )
        return found


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks share the work: world size = tensor * context * data."""

    tensor: int = 1
    """Ranks that share every matrix (Megatron tensor parallelism)."""
    context: int = 1
    """Ranks that share a sequence; this version supports 1."""
    sequence: bool = False
    """Megatron sequence parallelism; this version supports false."""
    timeout_seconds: int = 600
    """How long a rank waits for the others before it gives up."""

    def problems(self, model: ModelConfig, world_size: int | None) -> list[str]:
        """Everything that is wrong with the layout; ``world_size`` None means not launched yet."""
        found = _not_positive("parallel", self, ("tensor", "context", "timeout_seconds"))
        if found:
            return found
        if self.context != 1:
            found.append(f"parallel.context is {self.context}; this version supports 1")
        if self.sequence:
            found.append("parallel.sequence is true; this version supports false")
        if model.heads % self.tensor:
            found.append(f"model.heads {model.heads} is not divisible by parallel.tensor {self.tensor}")
        if model.key_value_heads and model.key_value_heads % self.tensor:
            found.append(
                f"model.key_value_heads {model.key_value_heads} is not divisible by parallel.tensor {self.tensor}"
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
        return found

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas of the model; at least 1, so that other checks can go on where the layout is wrong."""
        return max(1, world_size // max(1, self.tensor * self.context))


@dataclass(frozen=True)
class DataConfig:
    """Which token shards are read."""

    prefix: str | None = None
    """Prefix of the training shards that data_tools/preprocess.py wrote."""
    validation_prefix: str | None = None
    """Prefix of the validation shards; null trains without validation."""


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become weights. Schedules count tokens, so they do not depend on the batch size."""

    name: Literal["adamw", "sgd"] = "adamw"
    """Update rule; sgd has no momentum and is there to expose wrong gradient scales."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    epsilon: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on the weights of linear layers only."""
    gradient_clipping: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    schedule: Literal["constant", "cosine", "halving"] = "cosine"
    """Learning rate after the warm-up."""
    warmup_tokens: int = 0
    """Tokens over which the rate rises linearly from 0."""
    decay_tokens: int | None = None
    """Tokens at which cosine reaches its minimum; null means the whole run."""
    minimum_ratio: float = 0.1
    """Final rate of cosine as a share of the peak."""
    halving_tokens: int | None = None
    """Tokens between two halvings of the rate (schedule halving)."""

    def problems(self) -> list[str]:
        """Everything that is wrong with the optimizer."""
        found = _not_positive("optimizer", self, ("learning_rate", "epsilon"))
        for name in ("weight_decay", "gradient_clipping", "warmup_tokens", "minimum_ratio"):
            if getattr(self, name) < 0:
                found.append(f"optimizer.{name} is {getattr(self, name)}, expected at least 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"optimizer.{name} is {getattr(self, name)}, expected at least 0 and below 1")
        if self.schedule == "halving" and not self.halving_tokens:
            found.append("optimizer.schedule is halving but optimizer.halving_tokens is not set")
        if self.decay_tokens is not None and self.decay_tokens <= self.warmup_tokens:
            found.append(
                f"optimizer.decay_tokens {self.decay_tokens} is not beyond optimizer.warmup_tokens {self.warmup_tokens}"
            )
        return found


@dataclass(frozen=True)
class TrainingConfig:
    """How long, how fast and where."""

    output_dir: str | None = None
    """Run folder: resolved config, metrics.jsonl, checkpoints."""
    steps: int = 1000
    """Optimizer steps of the whole run."""
    seed: int = 1
    """Seed of the weights, the order of samples and dropout."""
    micro_batch_size: int = 1
    """Sequences that one rank processes at a time."""
    global_batch_size: int = 16
    """Sequences of one optimizer step, over all ranks and accumulation steps."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Type of weights in the forward pass; bf16 keeps fp32 master weights."""
    validation_every_steps: int = 100
    """Optimizer steps between two validations."""
    validation_windows: int = 64
    """Windows of the validation shards that are scored, from the first on."""
    max_skipped_steps: int = 5
    """Updates in a row with non-finite gradients after which the run stops with a report."""

    def problems(self) -> list[str]:
        """Everything that is wrong with the run's length and batch."""
        names = ("steps", "micro_batch_size", "global_batch_size", "validation_every_steps", "validation_windows")
        found = _not_positive("training", self, (*names, "max_skipped_steps"))
        if self.seed < 0:
            found.append(f"training.seed is {self.seed}, expected at least 0")
        return found


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved."""

    every_steps: int = 1000
    """Optimizer steps between two checkpoints; the last step is always saved."""
    keep: int | None = None
    """Newest checkpoints to keep; null keeps all."""

    def problems(self) -> list[str]:
        """Everything that is wrong with the checkpoints."""
        return _not_positive("checkpoint", self, ("every_steps", *(["keep"] if self.keep is not None else [])))


@dataclass(frozen=True)
class LoggingConfig:
    """Where the numbers go besides metrics.jsonl."""

    wandb: Literal["online", "offline", "disabled"] = "disabled"
    """Weights & Biases mode."""
    wandb_project: str = "ecp-scale"
    """Weights & Biases project."""
    run_name: str | None = None
    """Name of the run; null takes the name of the run folder."""
    peak_teraflops: float | None = None
    """Peak of one device at the run's precision, for mfu; null looks known GPUs up."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @cached_property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all ranks."""
        return self.training.global_batch_size * self.model.sequence_length

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches of one rank in one optimizer step."""
        together = self.training.micro_batch_size * self.parallel.data_parallel_size(world_size)
        return max(1, self.training.global_batch_size // max(1, together))

    def problems(self, world_size: int | None = None) -> list[str]:
        """Everything that is wrong, at once; ``world_size`` None means not launched yet."""
        training = self.training.problems()
        found = self.model.problems() + self.parallel.problems(self.model, world_size) + self.optimizer.problems()
        found += training + self.checkpoint.problems()
        if not training:
            ranks = self.parallel.data_parallel_size(world_size or 1)
            if self.training.global_batch_size % (self.training.micro_batch_size * ranks):
                found.append(
                    f"training.global_batch_size {self.training.global_batch_size} is not a multiple of "
                    f"training.micro_batch_size * data-parallel ranks = {self.training.micro_batch_size} * {ranks}"
                )
        return found


def _not_positive(section: str, config: object, names: tuple[str, ...]) -> list[str]:
    values = [(name, getattr(config, name)) for name in names]
    return [f"{section}.{name} is {value}, expected more than 0" for name, value in values if not value > 0]
