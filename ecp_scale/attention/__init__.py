"""Pure maths on this rank's heads: imports torch and a type of the config, and knows no process group."""

from ecp_scale.attention.cache import SegmentCache
from ecp_scale.attention.kernels import Settings, put_flash, refusal
from ecp_scale.attention.key_value import KeyValue
from ecp_scale.attention.latent import latent_attention
from ecp_scale.attention.pieces import documents_on
from ecp_scale.attention.rotary import Rotation, rotate, rotation
from ecp_scale.attention.sdpa import attend
from ecp_scale.attention.segment import segment_attention

__all__ = [
    "KeyValue",
    "Rotation",
    "SegmentCache",
    "Settings",
    "attend",
    "documents_on",
    "latent_attention",
    "put_flash",
    "refusal",
    "rotate",
    "rotation",
    "segment_attention",
]
