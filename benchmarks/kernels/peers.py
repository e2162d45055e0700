"""Decode attention of others, on the shapes of ``kvq bench``: FlashAttention, FlashInfer, and vLLM's Triton kernels.

A peer is a function (shape, device) -> (name, calls on copies of the data, or why it cannot run). A name begins with
the dtype of plain numbers that it reads; any other reads quantized ones. Nothing here is needed to use kvq.
"""

import importlib.util

import torch

from kvq.bench import timing
from kvq.bench.roofline import Shape, exact_bytes

_BLOCK = 16
# Split-KV of vLLM's unified attention, as its Triton backend sets it for decoding.
_SEGMENTS = 16


def _missing(package: str) -> str | None:
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def _numbers(shape: Shape, device: torch.device, seed: int, *lead: int) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*lead, generator=generator, device=device, dtype=torch.bfloat16)


def _lengths(shape: Shape, device: torch.device) -> torch.Tensor:
    return torch.full((shape.batch,), shape.context, dtype=torch.int32, device=device)


def flash_attention(shape: Shape, device: torch.device):
    name = "bfloat16 FlashAttention"
    if _missing("flash_attn"):
        return name, _missing("flash_attn")
    from flash_attn import flash_attn_with_kvcache

    def call(seed: int):
        size = (shape.batch, shape.context, shape.kv_heads, shape.head_dim)
        k, v = _numbers(shape, device, seed, *size), _numbers(shape, device, seed + 1, *size)
        q = _numbers(shape, device, seed + 2, shape.batch, 1, shape.heads, shape.head_dim)
        lengths = _lengths(shape, device)
        return lambda: flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths)

    return name, [call(3 * i) for i in range(timing.copies_of(exact_bytes(shape, 2), device))]


def flash_infer(shape: Shape, device: torch.device):
    name = "bfloat16 FlashInfer"
    if _missing("flashinfer"):
        return name, _missing("flashinfer")
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    blocks = -(-shape.context // _BLOCK)

    def call(seed: int):
        size = (shape.batch * blocks, 2, _BLOCK, shape.kv_heads, shape.head_dim)
        cache = _numbers(shape, device, seed, *size)
        q = _numbers(shape, device, seed + 1, shape.batch, shape.heads, shape.head_dim)
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device=device)
        wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=shape.group > 1)
        starts = torch.arange(shape.batch + 1, dtype=torch.int32, device=device) * blocks
        pages = torch.arange(shape.batch * blocks, dtype=torch.int32, device=device)
        last = torch.full((shape.batch,), (shape.context - 1) % _BLOCK + 1, dtype=torch.int32, device=device)
        settings = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
        wrapper.plan(
            starts,
            pages,
            last,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            _BLOCK,
            pos_encoding_mode="NONE",
            **settings,
        )
        return lambda: wrapper.run(q, cache)

    return name, [call(2 * i) for i in range(timing.copies_of(exact_bytes(shape, 2), device))]


def _vllm(mode: str, name: str):
    """vLLM's Triton unified attention, its cache filled by vLLM's own kernel."""

    def peer(shape: Shape, device: torch.device):
        if _missing("vllm"):
            return name, _missing("vllm")
        copies = timing.copies_of(exact_bytes(shape, 2) // (1 if mode == "NONE" else 2), device)
        return name, [_vllm_call(mode, shape, device, 2 * i) for i in range(copies)]

    peer.__name__ = f"vllm_{mode.lower()}"
    return peer


def _vllm_call(mode: str, shape: Shape, device: torch.device, seed: int):
    from vllm.v1.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash_per_token_head_quant
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    from vllm.v1.kv_cache_interface import KVQuantMode

    quant = KVQuantMode[mode]
    blocks = shape.batch * -(-shape.context // _BLOCK)
    packed = 2 if mode.startswith("INT4") else 1
    dtype = {"NONE": torch.bfloat16, "INT8_PER_TOKEN_HEAD": torch.int8}.get(mode, torch.uint8)
    size = (blocks, _BLOCK, shape.kv_heads, shape.head_dim // packed)
    if mode == "NONE":
        keys, values = _numbers(shape, device, seed, *size), _numbers(shape, device, seed + 1, *size)
        scales = [None, None]
    else:
        keys, values = (torch.zeros(size, dtype=dtype, device=device) for _ in range(2))
        scales = [torch.ones(size[:3], dtype=torch.float32, device=device) for _ in range(2)]
        for block in range(0, blocks, 4096):
            count = min(4096, blocks - block) * _BLOCK
            new = [_numbers(shape, device, seed + i, count, shape.kv_heads, shape.head_dim) for i in range(2)]
            slots = block * _BLOCK + torch.arange(count, device=device)
            triton_reshape_and_cache_flash_per_token_head_quant(*new, keys, values, *scales, slots, quant)
    q = _numbers(shape, device, seed + 2, shape.batch, shape.heads, shape.head_dim)
    out, lengths = torch.empty_like(q), _lengths(shape, device)
    starts = torch.arange(shape.batch + 1, dtype=torch.int32, device=device)
    table = torch.arange(blocks, dtype=torch.int32, device=device).view(shape.batch, -1)
    padded = 1 << (shape.head_dim - 1).bit_length()
    parts = (shape.batch, shape.heads, _SEGMENTS)
    partial = torch.empty(*parts, padded, device=device)
    tops, sums = (torch.empty(parts, device=device) for _ in range(2))
    return lambda: unified_attention(
        q=q,
        k=keys,
        v=values,
        out=out,
        cu_seqlens_q=starts,
        max_seqlen_q=1,
        seqused_k=lengths,
        max_seqlen_k=shape.context,
        softmax_scale=shape.head_dim**-0.5,
        causal=True,
        window_size=(-1, -1),
        block_table=table,
        softcap=0.0,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        seq_threshold_3D=max(1, 128 // shape.kv_heads),
        num_par_softmax_segments=_SEGMENTS,
        softmax_segm_output=partial,
        softmax_segm_max=tops,
        softmax_segm_expsum=sums,
        kv_quant_mode=quant,
        k_scale_cache=scales[0],
        v_scale_cache=scales[1],
    )


PEERS = [
    flash_attention,
    flash_infer,
    _vllm("NONE", "bfloat16 vLLM Triton"),
    _vllm("INT8_PER_TOKEN_HEAD", "int8 vLLM Triton"),
    _vllm("INT4_PER_TOKEN_HEAD", "int4 vLLM Triton"),
]
