"""ECP language models (arXiv 2412.06106) and their relatives for Hugging Face's transformers, in plain torch.

In ECP every segment of m tokens sees itself, causally, and all of the segment before it. What a token sees therefore
has an end, and so has what generation must remember: two segments per layer, however long the context. The relatives
differ in who sees whom, and in nothing else.

Shapes: B batch, T tokens that come in, C positions that a cache holds, H query heads, G key/value heads, E head width,
D width of the residual stream, V vocabulary.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu, silu
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .attention_ecp import EPSILON, EcpAttention
from .cache_ecp import EcpCache, Places, at_rows, places_of
from .configuration_ecp import EcpConfig


class EcpFeedForward(nn.Module):
    """Linear-GELU-Linear, or SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: EcpConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.up = nn.Linear(config.width, config.feed_forward_width, config.bias)
        self.gate = None
        if config.activation == "swiglu":
            self.gate = nn.Linear(config.width, config.feed_forward_width, config.bias)
        self.down = nn.Linear(config.feed_forward_width, config.width, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        hidden = gelu(self.up(x)) if self.gate is None else silu(self.gate(x)) * self.up(x)
        return self.down(dropout(hidden, self.dropout, self.training))


class EcpBlock(GradientCheckpointingLayer):
    """One residual block: attention and a feed-forward network, each after a norm."""

    def __init__(self, config: EcpConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = EcpAttention(config, layer)
        self.feed_forward_norm = _norm(config)
        self.feed_forward = EcpFeedForward(config)

    def forward(self, x: Tensor, places: Places, past_key_values: EcpCache | None = None) -> Tensor:
        """(B, T, D) -> (B, T', D)."""
        attended = self.attention(self.attention_norm(x), places, past_key_values)
        x = self.attention.residual(x, places) + attended
        return x + self.feed_forward(self.feed_forward_norm(x))


class EcpForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model of any architecture."""

    config_class = EcpConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EcpBlock"]  # noqa: RUF012, as the base class has it
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _is_stateful = True  # generation that takes tokens back is refused

    def __init__(self, config: EcpConfig) -> None:
        super().__init__(config)
        # Of values: a constant row and a slope.
        self.embedding = nn.Embedding(config.vocab_size if config.inputs == "tokens" else 2, config.width)
        self.position_embedding = None
        if config.learnt_positions:
            self.position_embedding = nn.Embedding(config.sequence_length, config.width)
        self.layers = nn.ModuleList(EcpBlock(config, layer) for layer in range(config.layers))
        self.norm = _norm(config)
        self.output = nn.Linear(config.width, config.vocab_size, config.bias)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: EcpCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        position_ids: None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Scores of the next token.

        Args:
            input_ids: token ids (B, T).
            attention_mask: (B, T), or (B, past + T): 0 where there is padding, on whichever side. Positions and
                segments are counted without it.
            past_key_values: what ``use_cache`` has returned for the tokens before.
            inputs_embeds: (B, T, D) in place of the ids.
            labels: ids (B, T), -100 where none is trained; they are shifted here.
            use_cache: return a cache, where the architecture can; the default is to, unless in training or for a loss.
            logits_to_keep: scores of so many last positions, or of those at these indices; 0 means all.
            position_ids: not used: positions follow from the mask.
            output_hidden_states: return also what enters each block, and what the output layer reads.
            return_dict: False returns a tuple of what there is.
            kwargs: of the loss.

        Returns:
            ``logits`` (B, T, V), of the scored positions; ``loss``, the mean in nats; ``past_key_values``;
            ``hidden_states``, each (B, T, D).
        """
        if kwargs.pop("output_attentions", None):
            raise ValueError("output_attentions: attention weights are never formed")
        self._check(input_ids, attention_mask, past_key_values, inputs_embeds, position_ids)
        cache = past_key_values
        x = self._embedded(cast(Tensor, input_ids)) if inputs_embeds is None else inputs_embeds
        self._check_classified(x.shape[1], attention_mask, cache, labels)
        if use_cache is None:
            use_cache = not self.training and labels is None
        if cache is None and self.config.streams and use_cache and self.config.task == "language":
            cache = EcpCache(self.config)
        x, input_ids, valid, back = self._tokens_first(x, input_ids, attention_mask)
        places = places_of(self.config, input_ids, valid, cache, x.dtype)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        x, states = self._through_blocks(x, places, cache, output_hidden_states)
        if back is not None:
            x = at_rows(x, back.to(x.device))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        if self.config.task == "classification":
            logits = self.output(self._pooled(self.norm(x)))
        else:
            logits = self.output(self.norm(x if isinstance(kept, int) else x[:, kept]))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels[:, -logits.shape[1] :], vocab_size=self.config.vocab_size, **kwargs
            )
        hidden_states = tuple(states if back is None else (at_rows(state, back.to(state.device)) for state in states))
        result = CausalLMOutputWithPast(loss, logits, cache, hidden_states or None)
        return result.to_tuple() if return_dict is False else result

    def _embedded(self, input_ids: Tensor) -> Tensor:
        """What enters the first layer (B, T, D), but for learnt positions."""
        if self.config.inputs == "tokens":
            return self.embedding(input_ids)
        constant, slope = self.embedding(torch.arange(2, device=input_ids.device))
        return constant + (2 * input_ids[..., None] - 255).to(constant.dtype) / 255 * slope

    def _pooled(self, x: Tensor) -> Tensor:
        """What a classifier's output layer reads (B, 1, D)."""
        return x.mean(1, keepdim=True) if self.config.pooling == "mean" else x[:, -1:]

    def _check_classified(self, count: int, attention_mask: Tensor | None, cache: Any, labels: Tensor | None) -> None:
        """Refuse what a classifier has no use for."""
        if self.config.task == "language":
            return
        if labels is not None:
            raise ValueError("a classifier has one prediction for a window: its logits are (B, 1, V)")
        if self.config.learnt_positions and count != self.config.sequence_length:
            raise ValueError(f"{self.config.sequence_length} positions were learnt, found {count}")
        if cache is not None or (attention_mask is not None and not attention_mask.all()):
            raise ValueError("a classifier reads whole windows, without a cache and without padding")

    def _tokens_first(
        self, x: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Tokens in front and padding behind them, where nothing sees it; sequences then begin side by side.

        Returns:
            Both inputs so, which of them are tokens (B, T), and where each was (B, T), None if they are as they were.
        """
        if attention_mask is None or not self.config.streams:
            return x, input_ids, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device), None
        valid = attention_mask[:, -x.shape[1] :].bool()
        if x.shape[1] == 1:
            return x, input_ids, valid, None
        order = (~valid).long().argsort(dim=1, stable=True)
        ids = None if input_ids is None else input_ids.gather(1, order)
        return at_rows(x, order), ids, valid.gather(1, order), order.argsort(dim=1)

    def _through_blocks(
        self, x: Tensor, places: Places, cache: EcpCache | None, keep: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """What leaves the last block (B, T', D); and, to keep, what enters each, and what the output layer reads."""
        if self.position_embedding is not None:
            x = x + self.position_embedding(torch.arange(x.shape[1], device=x.device))
        states = []
        for block in self.layers:
            states += [x] if keep else []
            x = block(x, places, past_key_values=cache)
            places = cast(EcpBlock, block).attention.left(places)
        return x, states + ([self.norm(x)] if keep else [])

    def _check(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        cache: Any,
        inputs_embeds: Tensor | None,
        position_ids: Any,
    ) -> None:
        """Refuse what this model would read wrongly."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds")
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is not None and given.shape[1] == 0:
            raise ValueError("expected at least one token")
        if position_ids is not None:
            raise ValueError("position_ids are not read: positions follow from attention_mask")
        if input_ids is None and self.config.document_mask:
            raise ValueError("inputs_embeds do not tell documents apart, which this model needs; pass input_ids")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"attention_mask has {attention_mask.dim()} dimensions, expected (batch, tokens)")
        if cache is not None and not isinstance(cache, EcpCache):
            raise ValueError(f"past_key_values is a {type(cache).__name__}, expected the EcpCache that was returned")
        if self.config.streams:
            return
        name = self.config.architecture
        if cache is not None:
            raise ValueError(f"the context of {name} is not causal: it has no cache")
        if attention_mask is not None and not attention_mask.all():
            raise ValueError(f"the context of {name} is not causal and cannot be padded; pass sequences of one length")
        count = 0 if given is None else given.shape[1]
        if name == "compressed_double_attention" and count != self.config.sequence_length:
            raise ValueError(f"{name} reads exactly {self.config.sequence_length} tokens, found {count}")

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: EcpCache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 1,
        **_: Any,
    ) -> dict[str, Any]:
        """What ``forward`` is called with: the tokens that the cache has not seen."""
        if not self.config.streams:
            raise ValueError(
                f"generate() needs a causal context, and that of {self.config.architecture} is not: its scores come "
                "from re-reading a window, as the project's launch/generate.py does"
            )
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        return {
            "input_ids": input_ids[:, seen:],
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No: ``forward`` makes the cache."""
        return False

    def _init_weights(self, module: nn.Module) -> None:
        """Normal with std 0.02; norms are the identity."""
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                nn.init.zeros_(parameter)
            elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.embedding = value

    def resize_token_embeddings(self, *arguments: Any, **named: Any) -> nn.Embedding:
        """Refused where values enter: there is no row for each token."""
        if self.config.inputs == "values":
            raise ValueError("inputs is 'values': the embedding is a constant and a slope, which have no other size")
        return cast(nn.Embedding, super().resize_token_embeddings(*arguments, **named))

    def get_output_embeddings(self) -> nn.Module:
        """The output layer."""
        return self.output

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the output layer."""
        self.output = new_embeddings


def _norm(config: EcpConfig) -> nn.Module:
    return (nn.LayerNorm if config.norm == "layernorm" else nn.RMSNorm)(config.width, EPSILON)
