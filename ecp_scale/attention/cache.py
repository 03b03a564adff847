"""Streaming over ``segment_attention``: what a layer must remember between two calls."""

from torch import Tensor

from ecp_scale.attention.segment import KeyValue, join, segment_attention


class SegmentCache:
    """Keys and values that later positions of one layer can still see: at most two segments.

    ``left`` is the last full segment, ``open`` the segment being filled. Chunks of any length may be fed one after
    another; the results equal one call over all of them.
    """

    def __init__(self, segment_length: int) -> None:
        self.segment_length = segment_length
        self.left: KeyValue | None = None
        self.open: KeyValue | None = None

    @property
    def positions(self) -> int:
        """Positions held, at most 2m."""
        return sum(part[0].shape[-2] for part in (self.left, self.open) if part is not None)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend with the next positions of the stream and remember what the ones after them need.

        Args:
            q: queries (B, H, T, E) of the next T positions.
            k: keys (B, G, T, E) of the same positions.
            v: values (B, G, T, E), ``k`` itself where tied.

        Returns:
            The attended values (B, H, T, E).
        """
        chunk = (k, v) if self.open is None else join(self.open, (k, v))
        out, _ = segment_attention(q, *chunk, self.segment_length, self.left)
        end = chunk[0].shape[-2]
        border = end - end % self.segment_length
        if border:
            self.left = _positions(chunk, border - self.segment_length, border)
        self.open = _positions(chunk, border, end) if border < end else None
        return out


def _positions(chunk: KeyValue, start: int, stop: int) -> KeyValue:
    # clone(): a view would keep the whole chunk alive.
    keys = chunk[0][..., start:stop, :].clone()
    return keys, keys if chunk[0] is chunk[1] else chunk[1][..., start:stop, :].clone()
