"""The packed KV cache: plan, storage, attention over segments, and the transformers layer."""

from kvq.cache.layer import HANDLE, Handle, PackedLayer, cache_nbytes, implementations, pack_cache, packed_layers
from kvq.cache.plan import CachePlan, HeadGroup, make_plan

__all__ = [
    "HANDLE",
    "CachePlan",
    "Handle",
    "HeadGroup",
    "PackedLayer",
    "cache_nbytes",
    "implementations",
    "make_plan",
    "pack_cache",
    "packed_layers",
]
