"""Configuration of ECP language models (arXiv 2412.06106) and their relatives, for Hugging Face's transformers."""

from typing import Any

from transformers import PretrainedConfig

CAUSAL = ("ecp", "transformer", "sliding_window", "longlora")
LATENT = ("perceiver_ar", "double_attention", "split_attention", "compressed_double_attention")


class EcpConfig(PretrainedConfig):
    """What an ECP model is.

    Args:
        architecture: who sees whom. ``ecp``: every segment itself, causally, and all of the segment before it.
            ``transformer``, ``sliding_window``, ``longlora``: causal baselines. ``perceiver_ar``,
            ``double_attention``, ``split_attention``, ``compressed_double_attention``: the last positions, the
            latents, see everything, and only they are scored.
        task: "language", or "classification", which scores the label behind a whole window.
        pooling: what a classifier reads, "mean" or "last" of its positions.
        inputs: "tokens", or "values": a classifier's ids of 0 to 255 enter through a linear map.
        learnt_positions: whether a learnt vector is added for each position of a classifier's window.
        vocab_size: entries of the vocabulary.
        layers: residual blocks.
        width: of the residual stream.
        heads: query heads.
        key_value_heads: heads of keys and values; None means as many.
        feed_forward_width: hidden width of the feed-forward network.
        sequence_length: tokens of a training window.
        segment_length: tokens of a segment, of ecp and of the context of split_attention.
        latents: last positions that are scored; None means half of the window.
        compressed_context: rows that compressed_double_attention keeps of its context; None means half of it.
        compression_residual: "aligned" or "release", see the project's docs.
        window: tokens that a position of sliding_window sees; None means 3/2 segments.
        group_length: tokens of a longlora group; None means 3 segments.
        norm: "layernorm" or "rmsnorm".
        activation: "gelu" or "swiglu".
        bias: whether output projections, feed-forward network and output layer have biases.
        tied_key_value: whether one projection serves as keys and as values.
        rotary: "none", "first_layer" or "every_layer".
        rotary_theta: base of the rotary frequencies.
        qk_norm: whether queries and keys are normed before the rotation.
        key_value_norm: whether tied keys and values are normed after it.
        first_segment_projection: whether the first segment of ecp has an output projection of its own.
        dropout: on attention weights and on the hidden layer, in training.
        document_mask: whether attention stays within documents.
        restart_positions: whether positions are counted from the beginning of each document.
        end_of_document: id of the token that ends a document.
    """

    model_type = "ecp"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012, a tuple stops their Trainer
    attribute_map = {  # noqa: RUF012, the type that the base class has
        "hidden_size": "width",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "num_key_value_heads": "key_value_heads",
        "intermediate_size": "feed_forward_width",
        "max_position_embeddings": "sequence_length",
    }

    def __init__(
        self,
        architecture: str = "ecp",
        task: str = "language",
        pooling: str = "mean",
        inputs: str = "tokens",
        learnt_positions: bool = False,
        vocab_size: int = 32_000,
        layers: int = 12,
        width: int = 768,
        heads: int = 6,
        key_value_heads: int | None = None,
        feed_forward_width: int = 3072,
        sequence_length: int = 2048,
        segment_length: int = 256,
        latents: int | None = None,
        compressed_context: int | None = None,
        compression_residual: str = "aligned",
        window: int | None = None,
        group_length: int | None = None,
        norm: str = "rmsnorm",
        activation: str = "swiglu",
        bias: bool = False,
        tied_key_value: bool = False,
        rotary: str = "every_layer",
        rotary_theta: float = 10000.0,
        qk_norm: bool = True,
        key_value_norm: bool = False,
        first_segment_projection: bool = False,
        dropout: float = 0.0,
        document_mask: bool = False,
        restart_positions: bool = False,
        end_of_document: int | None = None,
        **others: Any,
    ) -> None:
        _check(architecture, width, heads, key_value_heads or heads)
        self.architecture = architecture
        self.task, self.pooling = task, pooling
        self.inputs, self.learnt_positions = inputs, learnt_positions
        self.vocab_size = vocab_size
        self.layers = layers
        self.width, self.heads, self.key_value_heads = width, heads, key_value_heads or heads
        self.feed_forward_width = feed_forward_width
        self.sequence_length = sequence_length
        self.segment_length = segment_length
        self.latents = latents
        self.compressed_context = compressed_context
        self.compression_residual = compression_residual
        self.window, self.group_length = window, group_length
        self.norm, self.activation, self.bias = norm, activation, bias
        self.tied_key_value = tied_key_value
        self.rotary, self.rotary_theta = rotary, rotary_theta
        self.qk_norm = qk_norm
        self.key_value_norm = key_value_norm
        self.first_segment_projection = first_segment_projection
        self.dropout = dropout
        self.document_mask = document_mask
        self.restart_positions = restart_positions
        self.end_of_document = end_of_document
        if others.setdefault("tie_word_embeddings", False):
            raise ValueError("tie_word_embeddings is true: the output layer has weights of its own")
        super().__init__(**others)

    @property
    def streams(self) -> bool:
        """Whether tokens can follow one another through a cache."""
        return self.architecture in CAUSAL

    @property
    def scored_positions(self) -> int:
        """Last positions of a window that have scores."""
        return self.sequence_length if self.streams else self.latents or max(1, self.sequence_length // 2)

    @property
    def context(self) -> int:
        """Positions of a window before those that are scored."""
        return self.sequence_length - self.scored_positions

    @property
    def compressed_rows(self) -> int:
        """Rows that are left of the context after its compression."""
        return self.compressed_context or max(1, self.context // 2)

    @property
    def view(self) -> int | None:
        """Most positions that a query sees, its own among them; None where there is no bound."""
        m, n = self.segment_length, self.sequence_length
        return {
            "ecp": 2 * m,
            "sliding_window": self.window or max(1, min(3 * m // 2, n)),
            "longlora": self.group_length or max(2, min(3 * m, n) // 2 * 2),
        }.get(self.architecture)


def _check(architecture: str, width: int, heads: int, key_value_heads: int) -> None:
    """Refuse what no model can be."""
    if architecture not in CAUSAL + LATENT:
        raise ValueError(f"architecture is {architecture!r}, expected one of {', '.join(CAUSAL + LATENT)}")
    if width % heads or heads % key_value_heads:
        raise ValueError(f"width {width}, heads {heads}, key_value_heads {key_value_heads}: do not divide")
    if architecture == "longlora" and key_value_heads % 2:
        raise ValueError(f"longlora shifts half of the key/value heads, and {key_value_heads} have no half")
