"""Every codec and wrapper that recipes can name, as specs with stand-ins for what calibration makes."""

import pytest
import torch

from kvq.codecs import CodecSpec, codec_spec

HEAD_DIM, HEADS = 32, 3


def affine(bits, axis, group, **more):
    return {"codec": "affine", "bits": bits, "axis": axis, "group": group} | more


def book(bits, levels, scale, **more):
    return {"codec": "book", "bits": bits, "levels": levels, "scale": scale} | more


NVFP4 = {"codec": "float4", "group": 16, "meta": "e4m3", "scale": "unit"}
TOKEN_OUTLIERS = {"outliers": {"share": 0.04, "along": "token"}}
CHANNEL_OUTLIERS = {"outliers": {"share": 0.1, "along": "channel"}}
SPECS = {
    "tiers": {"codec": "tiers", "bits": [4, 2], "group": 32, "meta": "range8"},
    "affine": affine(3, "token", "head"),
    "affine-channel": affine(2, "channel", 16),
    "flexgen": affine(4, "token", 32),
    "zeroquant": affine(8, "token", "token", symmetric=True),
    "symmetric-e4m3": affine(4, "channel", 32, symmetric=True, meta="e4m3"),
    "shared": affine(4, "token", "token"),
    "e4m3": affine(2, "token", 16, meta="e4m3", clip=0.9),
    "zero8": affine(2, "token", 16, meta="zero8"),
    "zero8-channel": affine(3, "channel", 32, meta="zero8"),
    "range8": affine(2, "channel", 32, meta="range8"),
    "nf4": book(4, "normal_float", "absmax", axis="token", group=16),
    "nf3-channel": book(3, "normal_float", "range", axis="channel", group=32),
    "lloyd-moments": book(2, "lloyd_max", "moments", axis="token", group="head"),
    "uniform-book": book(4, "uniform", "range", axis="token", group="token"),
    "kvquant-key": book(3, "calibrated", "calibrated", q_norm=True, weights="fisher") | TOKEN_OUTLIERS,
    "kvquant-value": book(2, "calibrated", "range", axis="token", group="token") | TOKEN_OUTLIERS,
    "turboquant": book(3, "lloyd_max", "unit", norm={"over": "head", "correct": "length"}),
    "even": book(2, "even", "unit", norm={"over": "head", "correct": "length"}),
    "turboquant-signs": book(2, "lloyd_max", "unit", norm={"over": "head"}, signs={"seed": 3}),
    "turboquant-outliers": book(2, "lloyd_max", "unit", norm={"over": "head", "correct": "least_squares"})
    | TOKEN_OUTLIERS,
    "oscar": affine(2, "channel", 32, norm={"over": "token", "correct": "least_squares"}),
    "float16": {"codec": "float16"},
    "decoquant": affine(4, "token", "head", decomposed={"size": 8, "block": 32}),
    "decoquant-outliers": affine(2, "channel", 32, decomposed={"size": 16, "block": 64}) | TOKEN_OUTLIERS,
    "float8": {"codec": "float8", "scale": "calibrated"},
    "float8-normed": {"codec": "float8", "scale": "unit", "norm": {"over": "token"}},
    "mxfp4": {"codec": "float4", "group": 32, "meta": "e8m0"},
    "nvfp4": NVFP4,
    "nvfp4-calibrated": NVFP4 | {"scale": "calibrated"} | CHANNEL_OUTLIERS | {"low_rank": {"rank": 1, "block": 16}},
    "skvq": affine(2, "token", 16, meta="e4m3", clip=0.92, permute={"by": "range"}),
    "permuted-sparse": NVFP4 | {"permute": {"by": "range"}, "norm": {"over": "head"}} | TOKEN_OUTLIERS,
    "gear-key": affine(2, "channel", 32, low_rank={"rank": 2, "block": 64}) | CHANNEL_OUTLIERS,
    "gear-value": affine(2, "token", 16, low_rank={"rank": 3, "block": 32, "format": "e4m3"}) | TOKEN_OUTLIERS,
    "gear-light": affine(4, "channel", 64, low_rank={"rank": 2, "block": 64}),
    "qjl": {"codec": "sketch", "bits": 4, "outlier_channels": 3, "outlier_bits": 2, "group": 32},
    "sketch": {"codec": "sketch", "bits": 2, "seed": 5},
}


def artefacts_of(spec: CodecSpec, heads: int = HEADS, head_dim: int = HEAD_DIM) -> dict[str, torch.Tensor]:
    """Tensors as calibration would make them, made up."""
    generator = torch.Generator().manual_seed(7)
    found = {"scale": torch.tensor(0.02)}
    if spec.learns_levels:
        levels = torch.rand(2**spec.bits, generator=generator, dtype=torch.float64).mul(2).sub(1).sort().values
        found |= {"levels": levels + 0.01, "edges": (levels[1:] + levels[:-1]) / 2}
    width = torch.rand(heads, head_dim, generator=generator, dtype=torch.float64) * 3 + 4
    found["range"] = torch.stack([width, torch.randn(heads, head_dim, generator=generator).double()], dim=-1)
    found["order"] = torch.randperm(heads * head_dim, generator=generator).view(heads, head_dim)
    return found


@pytest.fixture(params=sorted(SPECS))
def spec(request) -> CodecSpec:
    return codec_spec(**SPECS[request.param])


@pytest.fixture
def specs() -> list[CodecSpec]:
    return [codec_spec(**settings) for settings in SPECS.values()]


@pytest.fixture
def codec(spec):
    return spec.build(HEAD_DIM, artefacts_of(spec), HEADS)


@pytest.fixture
def numbers():
    """Factory of made-up keys: channels of unlike size and middle, and a few tokens that stand out."""

    def draw(rows: int, tokens: int, seed: int = 0, heads: int = HEADS, head_dim: int = HEAD_DIM) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        size = torch.rand(heads, 1, head_dim, generator=generator, dtype=torch.float64) * 3 + 0.1
        middle = torch.randn(heads, 1, head_dim, generator=generator, dtype=torch.float64)
        x = torch.randn(rows, heads, tokens, head_dim, generator=generator, dtype=torch.float64)
        x[:, :, ::29] *= 4
        return x * size + middle

    return draw
