"""Who sees whom: the attention of ECP (arXiv 2412.06106, section 3), of its relatives and of causal baselines.

Shapes: B batch, T tokens that come in, C positions that a cache holds, H query heads, G key/value heads, E head width,
D width of the residual stream, V vocabulary.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import adaptive_avg_pool1d, scaled_dot_product_attention

from .cache_ecp import EcpCache, Places
from .configuration_ecp import EcpConfig

EPSILON = 1e-5
BLOCK = 512
"""Queries that are computed at a time where no segment says so."""
WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Trap: cuDNN's kernel, which torch prefers on Hopper, rounds dropout to sixteenths, and with a mask has given wrong
gradients without a word (torch 2.11 on an H100)."""


class EcpAttention(nn.Module):
    """Projections around attention, and who sees whom."""

    def __init__(self, config: EcpConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.head_width = config.width // config.heads
        key_value_width = config.key_value_heads * self.head_width
        self.rotated = config.rotary == "every_layer" or (config.rotary == "first_layer" and layer == 0)
        self.query = nn.Linear(config.width, config.width, bias=False)
        self.key = nn.Linear(config.width, key_value_width, bias=False)
        self.value = None if config.tied_key_value else nn.Linear(config.width, key_value_width, bias=False)
        self.query_norm = nn.RMSNorm(self.head_width, EPSILON) if config.qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(self.head_width, EPSILON) if config.qk_norm else nn.Identity()
        self.key_value_norm = nn.LayerNorm(self.head_width, EPSILON) if config.key_value_norm else nn.Identity()
        self.output = nn.Linear(config.width, config.width, config.bias)
        self.first_output = None
        if config.first_segment_projection and config.architecture == "ecp":
            self.first_output = nn.Linear(config.width, config.width, config.bias)
        self.pattern = nn.ModuleDict()
        if self.compresses:
            self.pattern["compression"] = nn.Linear(config.context, config.compressed_rows)

    @property
    def compresses(self) -> bool:
        """Whether this layer leaves fewer rows of the context than it reads."""
        return self.config.architecture == "compressed_double_attention" and self.layer == 0

    @property
    def latents_only(self) -> bool:
        """Whether this layer leaves nothing but the latents."""
        if self.config.streams:
            return False
        return self.layer == (0 if self.config.architecture == "perceiver_ar" else self.config.layers - 1)

    def forward(self, x: Tensor, places: Places, cache: EcpCache | None) -> Tensor:
        """(B, T, D) -> (B, T', D), of the rows that leave the layer."""
        rows = min(self.config.scored_positions, x.shape[1]) if self.latents_only else x.shape[1]
        q = self.query_norm(self._heads(self.query(x[:, -rows:])))
        k = self.key_norm(self._heads(self.key(x)))
        if self.rotated:
            q, k = _rotate(q, places.rotation[..., -rows:, :]), _rotate(k, places.rotation)
        k = self.key_value_norm(k)
        v = k if self.value is None else self._heads(self.value(x))
        if not self.config.streams:
            attended = self._latent_attention(q, k, v, places)
        else:
            if cache is not None:
                k, v = cache.layers[self.layer].update(k, v, kept=places.kept)
            attended = self._causal_attention(q, k, v, places)
        return self._project(attended.transpose(1, 2).flatten(2), places)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)  # (B, H, T, E)

    def _project(self, attended: Tensor, places: Places) -> Tensor:
        if self.first_output is None:
            return self.output(attended)
        in_first_segment = places.queries < self.config.segment_length
        return torch.where(in_first_segment[..., None], self.first_output(attended), self.output(attended))

    def _causal_attention(self, q: Tensor, k: Tensor, v: Tensor, places: Places) -> Tensor:
        """Block by block of queries, over the keys that any query of a block may see: cost linear in T."""
        before = k.shape[-2] - q.shape[-2]
        view = self.config.view
        # Where sequences begin with these tokens, blocks are segments, and none looks back further than one.
        back = self.config.segment_length if not before and self.config.architecture == "ecp" else view
        block = self.config.segment_length if self.config.architecture == "ecp" else view or BLOCK
        outputs = []
        for start in range(0, q.shape[-2], block):
            stop = min(start + block, q.shape[-2])
            low = 0 if back is None or start < back else before + start - back
            high = before + stop
            seen = self._visible(places, slice(start, stop), slice(low, high), before)
            outputs.append(self._attend(q[..., start:stop, :], k[..., low:high, :], v[..., low:high, :], seen))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-2)

    def _visible(self, places: Places, of: slice, among: slice, before: int) -> Tensor:
        """Which keys each query sees (B, 1 or H, queries, keys)."""
        query, key = places.queries[:, None, of, None], places.keys[:, None, None, among]
        seen = (key >= self._first_visible(query)) & (key <= query) & (key >= 0)
        if places.query_documents is not None and places.key_documents is not None:
            seen = seen & (places.query_documents[:, None, of, None] == places.key_documents[:, None, None, among])
        # Padding sees itself: a row that sees nothing is not a number, and 0 times that is none either.
        queries = torch.arange(of.start, of.stop, device=seen.device)[:, None] + before
        return seen | (queries == torch.arange(among.start, among.stop, device=seen.device))

    def _first_visible(self, position: Tensor) -> Tensor:
        """The first position (B, 1 or H, T, 1) that each one (B, 1, T, 1) sees."""
        if self.config.architecture == "ecp":
            m = self.config.segment_length
            return (position // m - 1) * m
        if self.config.architecture == "transformer":
            return torch.zeros_like(position)
        view = self.config.view
        assert view is not None
        if self.config.architecture == "sliding_window":
            return position - view + 1
        # longlora: for the second half of the heads, groups lie half a group later.
        plain = self.config.key_value_heads // 2 * (self.config.heads // self.config.key_value_heads)
        shift = torch.arange(self.config.heads, device=position.device)[:, None, None] >= plain
        shift = shift * (view // 2)
        return (position + shift) // view * view - shift

    def _latent_attention(self, q: Tensor, k: Tensor, v: Tensor, places: Places) -> Tensor:
        """The latents see everything, causally among themselves; the context sees itself, or its own segment of it."""
        count, documents = k.shape[-2], places.key_documents
        is_causal = self.config.architecture == "perceiver_ar" and self.layer > 0
        latents = min(self.config.scored_positions, count)
        context = 0 if self.latents_only or is_causal else count - latents
        outputs = []
        split = self.config.architecture == "split_attention"
        step = self.config.segment_length if split else max(1, context)
        dropped = self.config.architecture != "compressed_double_attention"
        for start in range(0, context, step):
            part = slice(start, min(start + step, context))
            seen = None if documents is None else documents[:, None, part, None] == documents[:, None, None, part]
            outputs.append(self._attend(q[..., part, :], k[..., part, :], v[..., part, :], seen, dropped))
        rows = q.shape[-2] - context
        index = torch.arange(count, device=q.device)
        seen = (index <= index[count - rows :, None])[None, None]
        if documents is not None:
            seen = seen & (documents[:, None, count - rows :, None] == documents[:, None, None])
        outputs.append(self._attend(q[..., context:, :], k, v, seen))
        out = torch.cat(outputs, dim=-2)
        return self._compress(out, places) if self.compresses else out

    def _compress(self, attended: Tensor, places: Places) -> Tensor:
        """The context's part of what is attended (B, H, n, E) to fewer rows."""
        context, latents = attended.split([self.config.context, attended.shape[-2] - self.config.context], dim=-2)
        if places.key_documents is not None:
            context = context * self._of_border_document(places.key_documents)[:, None, :, None]
        compressed = self.pattern["compression"](context.transpose(-1, -2)).transpose(-1, -2)
        return torch.cat((compressed, latents), dim=-2)

    def _of_border_document(self, documents: Tensor) -> Tensor:
        """Which context positions (B, n - l) of (B, n) are of the document that goes on in the latents."""
        context = documents[:, : self.config.context]
        return context == context[:, -1:]

    def residual(self, x: Tensor, places: Places) -> Tensor:
        """What the output is added to: (B, T, D) -> (B, T', D)."""
        if self.latents_only:
            return x[:, -self.config.scored_positions :]
        if not self.compresses:
            return x
        rows = self.config.compressed_rows
        if self.config.compression_residual == "release":
            return x[:, : rows + self.config.scored_positions]
        context, latents = x[:, : self.config.context], x[:, self.config.context :]
        counts = context.new_ones(*context.shape[:2], 1)
        if places.key_documents is not None:
            counts = self._of_border_document(places.key_documents)[..., None].to(x.dtype)
        pooled, share = (
            adaptive_avg_pool1d(part.transpose(1, 2), rows).transpose(1, 2) for part in (context * counts, counts)
        )
        return torch.cat((pooled / share.clamp(min=1 / self.config.context), latents), dim=1)

    def left(self, places: Places) -> Places:
        """The places of the rows that leave the layer."""
        if self.latents_only:
            return places.rows(slice(-self.config.scored_positions, None))
        if not self.compresses:
            return places
        context, rows, device = self.config.context, self.config.compressed_rows, places.queries.device
        shares = torch.arange(1, rows + 1, device=device)
        last = (shares * context + rows - 1) // rows - 1  # a compressed row stands at the last position of its share
        kept = torch.cat((last, torch.arange(context, context + self.config.scored_positions, device=device)))
        left = places.rows(kept)
        if places.key_documents is None:
            return left
        border = places.key_documents[:, context - 1 : context].expand(-1, rows)
        documents = torch.cat((border, places.key_documents[:, context:]), dim=1)
        return left._replace(query_documents=documents, key_documents=documents)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, dropped: bool = True) -> Tensor:
        rate = self.config.dropout if self.training and dropped else 0.0
        if q.is_cuda and seen is not None and q.shape[1] != k.shape[1]:
            # Without cuDNN, no kernel for masks takes grouped heads.
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        with sdpa_kernel(WITHOUT_CUDNN) if q.is_cuda and (rate or seen is not None) else nullcontext():
            return scaled_dot_product_attention(q, k, v, seen, dropout_p=rate, enable_gqa=q.shape[1] != k.shape[1])


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Adjacent pairs of channels of (B, H, T, E) rotate together (arXiv 2104.09864)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
