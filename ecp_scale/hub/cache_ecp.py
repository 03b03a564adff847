"""Where tokens stand, and what is remembered of those before them: in ECP two segments per layer, and no more.

Shapes: B batch, T tokens that come in, C positions that a cache holds, H query heads, G key/value heads, E head width,
D width of the residual stream, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .configuration_ecp import EcpConfig


class Places(NamedTuple):
    """Where the tokens of one call stand, and the keys that they may see: those of the cache, then their own.

    Positions are counted from the first token of each sequence; -1 is no token.
    """

    queries: Tensor
    """Positions (B, T)."""
    keys: Tensor
    """Positions (B, C + T)."""
    query_documents: Tensor | None
    """Numbers of their documents (B, T), None where attention may cross documents."""
    key_documents: Tensor | None
    """(B, C + T)."""
    rotation: Tensor
    """Cosine and sine of every token and pair of channels (2, B, 1, T, E / 2)."""
    kept: Tensor | None
    """Which of the C + T keys the cache keeps (B, C'); None keeps all."""

    def rows(self, index: slice | Tensor) -> "Places":
        """Of some of the tokens, in a model without a cache."""
        documents = None if self.query_documents is None else self.query_documents[:, index]
        return Places(
            self.queries[:, index],
            self.keys[:, index],
            documents,
            documents,
            self.rotation[..., index, :],
            None,
        )


class EcpCacheLayer(CacheLayerMixin):
    """Keys and values (B, G, C, E) of one layer; one tensor where they are tied."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Begin empty."""
        self.keys = key_states[..., :0, :]
        self.values = self.keys if value_states is None else value_states[..., :0, :]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, kept: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in new keys and values (B, G, T, E), which may be one tensor; keep those at ``kept`` of old and new.

        Returns:
            All of them (B, G, C + T, E).
        """
        tied = key_states is value_states
        if not self.is_initialized:
            self.lazy_initialization(key_states, None if tied else value_states)
        keys = torch.cat((self.keys, key_states), dim=-2)
        values = keys if tied else torch.cat((self.values, value_states), dim=-2)
        self.keys = keys if kept is None else at_rows(keys, kept)
        self.values = self.keys if tied else values if kept is None else at_rows(values, kept)
        return keys, values

    def rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change which sequences there are."""
        if self.is_initialized:
            tied = self.values is self.keys
            self.keys = change(self.keys)
            self.values = self.keys if tied else change(self.values)

    def get_seq_length(self) -> int:
        """Positions that are held."""
        return self.keys.shape[-2] if self.is_initialized else 0

    def get_max_length(self) -> int:
        """Nothing that transformers need know."""
        return -1

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Of a mask that this model makes itself."""
        length = query_length if isinstance(query_length, int) else len(query_length)
        return self.get_seq_length() + length, 0


class EcpCache(Cache):
    """What a model must remember of its sequences: as many positions per layer as a token sees, and no more.

    Every sequence of a batch stands where it stands: padding is not kept.
    """

    def __init__(self, config: EcpConfig) -> None:
        super().__init__(layers=[EcpCacheLayer() for _ in range(config.layers)])
        self.tensors: dict[str, Tensor] = {}
        """``positions`` (B, C) and ``documents`` (B, C) of the keys; of each sequence (B,), the ``next_position``, the
        ``next_document``, where it begins (``document_start``), and the ``columns`` that have been read, padding
        included. Tensors, all of them: for a number that changes, torch.compile would compile every step."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that have been read, padding included."""
        return int(self.tensors["columns"][0]) if self.tensors else 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what ``beam_idx[i]`` was."""
        self._rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence several times."""
        self._rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some sequences alone."""
        self._rows(lambda tensor: tensor[indices])

    def crop(self, *_: Any) -> None:
        """Not possible: what lies behind what a token sees is gone."""
        raise NotImplementedError("an EcpCache cannot go back: it holds no more than the next token sees")

    def reset(self) -> None:
        """Forget everything."""
        self.tensors = {}
        for layer in self.layers:
            layer.__init__()

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.tensors = {name: change(tensor) for name, tensor in self.tensors.items()}
        for layer in self.layers:
            layer.rows(change)


def places_of(
    config: EcpConfig, input_ids: Tensor | None, valid: Tensor, cache: EcpCache | None, dtype: torch.dtype
) -> Places:
    """Of the tokens (B, T) that are ``valid`` and of the keys before them; the cache's own record moves on."""
    old = {} if cache is None else cache.tensors
    start = old["next_position"][:, None] if old else torch.zeros_like(valid[:, :1], dtype=torch.long)
    positions = torch.where(valid, valid.long().cumsum(1) - 1 + start, -1)
    keys = torch.cat((old["positions"], positions), dim=1) if old else positions
    turned, documents, key_documents = positions, None, None
    new: dict[str, Tensor] = {}
    if config.document_mask:
        assert input_ids is not None
        first = old["document_start"][:, None] if old else torch.zeros_like(start)
        ends = ((input_ids == config.end_of_document) & valid).long()
        documents = ends.cumsum(1) - ends + (old["next_document"][:, None] if old else 0)
        key_documents = torch.cat((old["documents"], documents), dim=1) if old else documents
        # The position behind the last end before each token, and behind all of them.
        behind = torch.where(ends.bool(), positions + 1, 0).cummax(1).values.maximum(first)
        if config.restart_positions:
            turned = positions - torch.cat((first, behind[:, :-1]), dim=1)
        new = {"next_document": documents[:, -1] + ends[:, -1], "document_start": behind[:, -1].clone()}
    kept = None
    if cache is not None:
        following = valid.long().sum(1) + start[:, 0]
        kept, held = _kept(config, keys, old, following)
        if key_documents is not None:
            new["documents"] = key_documents if kept is None else key_documents.gather(1, kept)
        columns = (old["columns"] if old else torch.zeros_like(following)) + valid.shape[1]
        cache.tensors = {"positions": held, "next_position": following, "columns": columns, **new}
    return Places(positions, keys, documents, key_documents, _rotation(config, turned, dtype), kept)


def _kept(config: EcpConfig, keys: Tensor, old: dict[str, Tensor], following: Tensor) -> tuple[Tensor | None, Tensor]:
    """Which of the keys at these positions (B, C + T) the tokens from ``following`` (B,) on can see.

    A position has its place in the cache, its remainder by the size: nothing moves when a token comes.

    Returns:
        Indices (B, C'), None for all; and the positions (B, C').
    """
    size = config.view
    if size is None:
        return None, keys
    place, last = torch.arange(size, device=keys.device), following[:, None] - 1
    position = last - (last - place) % size  # the latest one that has the place
    before = old["positions"].shape[1] if old else 0
    first = old["next_position"][:, None] if old else 0
    # What is not there yet may be read from anywhere: its position says that it is none.
    kept = torch.where(position >= first, before + position - first, place).clamp(0, keys.shape[1] - 1)
    return kept, position.clamp(min=-1)


def _rotation(config: EcpConfig, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Cosine and sine (2, B, 1, T, E / 2) of positions (B, T), at least in float32."""
    # In float64, where there is one: at position 1e6 an angle in float32 is wrong by up to 0.06.
    wide = torch.float32 if positions.device.type == "mps" else torch.float64
    width = config.width // config.heads
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=wide) / width
    angles = (positions.to(wide)[..., None] * config.rotary_theta**-exponents)[:, None]
    return torch.stack((angles.cos(), angles.sin())).to(torch.promote_types(dtype, torch.float32))


def at_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (B, T') of (B, T, D) or (B, G, T, E)."""
    for _ in range(x.dim() - 3):
        index = index[:, None]
    return x.gather(-2, index[..., None].expand(*x.shape[:-2], index.shape[-1], x.shape[-1]))
