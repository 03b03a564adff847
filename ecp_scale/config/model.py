"""What the model is, what it counts, and every check on it.

Symbols in the documentation follow the paper: L layers, D width, h heads, e = D/h, n sequence length, m segment length,
l latents. The words that --help prints about a field are the text below it.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from ecp_scale.config.checks import not_positive
from ecp_scale.config.geometry import GEOMETRIES, Geometry
from ecp_scale.errors import InputError

GEOMETRY_FIELDS = ("sequence_length", "segment_length", "latents", "window", "group_length")
"""Fields that no weight's shape depends on (but for compressed_double_attention): they may change after training."""


@dataclass(frozen=True)
class ModelConfig:
    """What the model is: its size, its attention pattern and the switches between `paper` and `scaled`."""

    preset: str | None = None
    """Preset whose values are the defaults of this run (the YAML files in ecp_scale/config/presets)."""
    architecture: Literal[
        "ecp",
        "perceiver_ar",
        "double_attention",
        "compressed_double_attention",
        "split_attention",
        "transformer",
        "sliding_window",
        "longlora",
    ] = "ecp"
    """Attention pattern; docs/architectures.md draws them."""
    task: Literal["language", "classification"] = "language"
    """Predict every next token; or the label behind a whole window, from all of it (see ecp-preprocess --recipe)."""
    pooling: Literal["mean", "last"] = "mean"
    """What a classifier reads: the mean over its trained positions, or the last one."""
    inputs: Literal["tokens", "values"] = "tokens"
    """What enters the first layer: a row of the embedding for each token, or a linear map of a classifier's values."""
    learnt_positions: bool = False
    """Add a learnt vector for each position of a classifier's window to what enters the first layer."""
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
    """Tokens of a segment m: of ecp, and of the context of split_attention."""
    latents: int | None = None
    """Last positions l that are trained in perceiver_ar and the *_attention models; null means n/2."""
    compressed_context: int | None = None
    """Rows c that compressed_double_attention keeps of its context; null means half of the context."""
    compression_residual: Literal["aligned", "release"] = "aligned"
    """Residual around the compression: pooled context and the latents' own rows, or the first c + l rows (release)."""
    window: int | None = None
    """Tokens that a position of sliding_window sees, its own included; null means 3m/2, the cost of ecp."""
    group_length: int | None = None
    """Tokens of a longlora group; null means 3m, the cost of ecp."""
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    """Normalisation before attention, before the feed-forward network and before the output layer."""
    activation: Literal["gelu", "swiglu"] = "swiglu"
    """Feed-forward network: Linear-GELU-Linear (erf GELU) or SwiGLU."""
    bias: bool = False
    """Biases in the output projections, the feed-forward network and the output layer (queries and keys never)."""
    tied_key_value: bool = False
    """One projection serves as keys and as values (paper)."""
    rotary: Literal["none", "first_layer", "every_layer"] = "every_layer"
    """Layers whose queries and keys are rotated; tied values are rotated with their keys."""
    rotary_theta: float = 10000.0
    """Base of the rotary frequencies."""
    qk_norm: bool = True
    """RMSNorm over every query and key head before the rotation."""
    key_value_norm: bool = False
    """LayerNorm over every head of the tied keys and values after the rotation (the paper's relatives of ecp)."""
    first_segment_projection: bool = False
    """The first segment of ecp has an output projection of its own (paper)."""
    dropout: float = 0.0
    """Dropout on attention weights and on the feed-forward hidden layer."""
    initialization: Literal["pytorch", "normal", "depth_scaled"] = "depth_scaled"
    """PyTorch's defaults, normal with std 0.02, or the same with 0.02 / sqrt(2L) at the end of residual branches."""
    allow_short_receptive_field: bool = False
    """Permit a receptive field below sequence_length."""

    @property
    def head_width(self) -> int:
        """Width of one head, e."""
        return self.width // self.heads

    @property
    def key_value_width(self) -> int:
        """Width of all keys of one position."""
        return (self.key_value_heads or self.heads) * self.head_width

    @property
    def has_first_projection(self) -> bool:
        """Whether the first segment has an output projection of its own; patterns without segments have no first."""
        return self.first_segment_projection and self.architecture == "ecp"

    def rotates(self, layer: int) -> bool:
        """Whether a layer, from 0 on, rotates its queries and keys."""
        return self.rotary == "every_layer" or (self.rotary == "first_layer" and layer == 0)

    def ignored(self) -> list[str]:
        """Fields that the architecture does not read, of those that only some architectures do."""
        some = dict.fromkeys(name for geometry in GEOMETRIES.values() for name in geometry.fields)
        read = set(GEOMETRIES[self.architecture].fields)
        if any(name in read and getattr(self, name) is None for name in ("window", "group_length")):
            read.add("segment_length")  # which their defaults are made of
        return [name for name in some if name not in read]

    @cached_property
    def geometry(self) -> Geometry:
        """Who sees whom, with every default filled in."""
        n, m = self.sequence_length, self.segment_length
        latents = self.latents or max(1, n // 2)
        return GEOMETRIES[self.architecture](
            layers=self.layers,
            sequence_length=n,
            segment_length=m,
            latents=latents,
            compressed_context=self.compressed_context or max(1, (n - latents) // 2),
            window=self.window or max(1, min(3 * m // 2, n)),
            group_length=self.group_length or max(2, min(3 * m, n) // 2 * 2),
        )

    @property
    def receptive_field_tokens(self) -> int:
        """Farthest position, counted from 1 at itself, that any position depends on."""
        return self.geometry.receptive_field_tokens

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
    def input_parameters(self) -> int:
        """Entries of what makes the input of the first layer."""
        rows = self.known_vocab_size if self.inputs == "tokens" else 2
        return (rows + self.learnt_positions * self.sequence_length) * self.width

    @property
    def key_value_matrix_parameters(self) -> int:
        """Entries of the matrices that make the keys and values of one layer."""
        return (1 if self.tied_key_value else 2) * self.width * self.key_value_width

    @property
    def feed_forward_matrix_parameters(self) -> int:
        """Entries of the matrices of one feed-forward network."""
        return (3 if self.activation == "swiglu" else 2) * self.width * self.feed_forward_width

    @property
    def parameters(self) -> int:
        """Trainable parameters, without the padding of the vocabulary."""
        norm = self.width * (2 if self.norm == "layernorm" else 1)
        projections = 2 if self.has_first_projection else 1
        layer = (1 + projections) * self.width**2 + self.key_value_matrix_parameters
        layer += self.feed_forward_matrix_parameters + 2 * norm
        layer += 2 * self.head_width * (self.qk_norm + self.key_value_norm)
        if self.bias:
            ffn_matrices_out = 2 if self.activation == "swiglu" else 1
            layer += projections * self.width + ffn_matrices_out * self.feed_forward_width + self.width
        head_bias = self.known_vocab_size if self.bias else 0
        whole = self.layers * layer + self.input_parameters + self.known_vocab_size * self.width + norm + head_bias
        return whole + self.geometry.compression_parameters

    @property
    def score_pairs(self) -> float:
        """Query-key pairs of one head over a sequence of n tokens, summed over the layers."""
        return sum(self.geometry.score_pairs(layer) for layer in range(self.layers))

    @property
    def flops_per_token(self) -> float:
        """Floating-point operations of a training step per token of a window: forward, and twice that for backward.

        Matrix products only: 2 per matrix entry and row, 4 D per score pair.
        """
        geometry = self.geometry
        predictions = 1 if self.task == "classification" else geometry.trained_positions
        entries = predictions * self.known_vocab_size * self.width
        for layer in range(self.layers):
            entries += geometry.query_rows(layer) * self.width**2
            entries += geometry.key_rows(layer) * self.key_value_matrix_parameters
            entries += geometry.output_rows(layer) * (self.width**2 + self.feed_forward_matrix_parameters)
        if geometry.compression_parameters:
            entries += geometry.compressed_context * geometry.context * self.width
        return 3 * (2 * entries + 4 * self.width * self.score_pairs) / self.sequence_length

    def check_predicts_tokens(self, what: str) -> None:
        """Refuse a classifier for something that it cannot do.

        Raises:
            InputError: which begins with ``what``.
        """
        if self.task == "classification":
            raise InputError(f"{what} a classifier, which names the label of a window (model.task classification)")

    def problems(self) -> list[str]:
        """Everything that is wrong with the model, each with its numbers."""
        found = not_positive(
            "model",
            self,
            ("layers", "width", "heads", "feed_forward_width", "sequence_length", "segment_length", "vocab_multiple"),
        )
        for name in ("vocab_size", "key_value_heads", "latents", "compressed_context", "window", "group_length"):
            if getattr(self, name) is not None:
                found += not_positive("model", self, (name,))
        if not 0 <= self.dropout < 1:
            found.append(f"model.dropout is {self.dropout}, expected at least 0 and below 1")
        if self.task == "language":
            positions = str(self.learnt_positions).lower()
            given = (("inputs", self.inputs, "tokens"), ("learnt_positions", positions, "false"))
            found += [
                f"model.{name} is {value}, which only a classifier takes (model.task classification): use {default}"
                for name, value, default in given
                if value != default
            ]
        return found or self._head_problems() + self._geometry_problems()

    def _head_problems(self) -> list[str]:
        found = []
        if self.width % self.heads:
            found.append(f"model.width {self.width} is not divisible by model.heads {self.heads}")
        elif self.head_width % 2 and self.rotary != "none":
            found.append(f"model.width / model.heads is {self.head_width}; rotary positions need an even head width")
        if self.key_value_heads and self.heads % self.key_value_heads:
            found.append(f"model.heads {self.heads} is not divisible by model.key_value_heads {self.key_value_heads}")
        if self.key_value_norm and not self.tied_key_value:
            found.append(
                "model.key_value_norm is true, but it norms tied keys and values: model.tied_key_value is false"
            )
        if self.architecture == "longlora" and (self.key_value_heads or self.heads) % 2:
            count = self.key_value_heads or self.heads
            found.append(f"longlora shifts half of the key/value heads, and {count} of them have no half")
        return found

    def _geometry_problems(self) -> list[str]:
        found = []
        geometry, n = self.geometry, self.sequence_length
        for name in ("latents", "window", "group_length"):
            if (getattr(self, name) or 0) > n:
                found.append(f"model.{name} {getattr(self, name)} is larger than model.sequence_length {n}")
        context = max(0, geometry.context)
        if (self.compressed_context or 0) > context:
            found.append(
                f"model.compressed_context {self.compressed_context} is larger than the context, "
                f"model.sequence_length {n} - model.latents {geometry.latents} = {context} tokens"
            )
        if geometry.latents <= n:
            found += geometry.problems()
        if self.receptive_field_tokens < n and not self.allow_short_receptive_field:
            found.append(
                f"the receptive field {geometry.receptive_field_formula} is shorter than model.sequence_length {n}; "
                "set model.allow_short_receptive_field to accept that"
            )
        if self.has_first_projection and n <= self.segment_length:
            found.append(
                f"model.first_segment_projection with one segment (sequence_length {n}, segment_length "
                f"{self.segment_length}) would leave the other projection untrained"
            )
        return found

    def weights_problems(self, trained: "ModelConfig") -> list[str]:
        """Why weights trained with the geometry of another config, equal otherwise, cannot be used with this one."""
        if self.learnt_positions and self.sequence_length != trained.sequence_length:
            return [
                f"model.sequence_length is {self.sequence_length}, but {trained.sequence_length} positions were learnt "
                "(model.learnt_positions)"
            ]
        sizes = [(model.geometry.context, model.geometry.compressed_context) for model in (trained, self)]
        if not self.geometry.compression_parameters or sizes[0] == sizes[1]:
            return []
        (old, old_rows), (new, new_rows) = sizes
        return [
            f"compressed_double_attention was trained to compress a context of {old} tokens to {old_rows} rows and "
            f"cannot compress {new} to {new_rows}: keep model.sequence_length - model.latents and "
            "model.compressed_context as they were"
        ]
