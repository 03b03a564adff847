"""Pure maths on this rank's heads: imports torch alone and knows no process group."""

from ecp_scale.attention.cache import SegmentCache
from ecp_scale.attention.rotary import Rotation, rotate, rotation
from ecp_scale.attention.segment import KeyValue, segment_attention

__all__ = ["KeyValue", "Rotation", "SegmentCache", "rotate", "rotation", "segment_attention"]
