"""Streaming over ``segment_attention``: what a layer must remember between two calls."""

from torch import Tensor

from ecp_scale.attention.key_value import KeyValue, join
from ecp_scale.attention.segment import segment_attention
from ecp_scale.config import AttentionBackend


class SegmentCache:
    """Keys and values that later positions of one layer can still see: at most two segments.

    ``left`` is the last full segment, ``open`` the segment being filled. Chunks of any length may be fed one after
    another; the results equal one call over all of them. The arguments are those of ``segment_attention``.
    """

    def __init__(
        self,
        segment_length: int,
        *,
        look_back: bool = True,
        window: int | None = None,
        first_length: int | None = None,
        backend: AttentionBackend = "auto",
    ) -> None:
        self.segment_length = segment_length
        self.look_back = look_back
        self.window = window
        self.backend = backend
        self.open_length = first_length or segment_length
        self.left: KeyValue | None = None
        self.open: KeyValue | None = None

    @property
    def positions(self) -> int:
        """Positions held, at most 2m."""
        return sum(part.positions for part in (self.left, self.open) if part is not None)

    def attend(self, q: Tensor, key_value: KeyValue) -> Tensor:
        """Attend with the next positions of the stream and remember what the ones after them need.

        Args:
            q: queries (B, H, T, E) of the next T positions.
            key_value: keys, values and documents of the same positions.

        Returns:
            The attended values (B, H, T, E).
        """
        chunk = key_value if self.open is None else join(self.open, key_value)
        out, _ = segment_attention(
            q,
            chunk.keys,
            chunk.values,
            self.segment_length,
            self.left,
            look_back=self.look_back,
            window=self.window,
            first_length=self.open_length,
            documents=chunk.documents,
            backend=self.backend,
        )
        end = chunk.positions
        if end < self.open_length:
            self.open = chunk
            return out
        border = end - (end - self.open_length) % self.segment_length
        if self.look_back:
            self.left = _positions(chunk, border - self.segment_length, border)
        self.open = _positions(chunk, border, end) if border < end else None
        self.open_length = self.segment_length
        return out


def _positions(chunk: KeyValue, start: int, stop: int) -> KeyValue:
    # clone(): a view would keep the whole chunk alive.
    keys = chunk.keys[..., start:stop, :].clone()
    values = keys if chunk.keys is chunk.values else chunk.values[..., start:stop, :].clone()
    return KeyValue(keys, values, None if chunk.documents is None else chunk.documents[..., start:stop].clone())
