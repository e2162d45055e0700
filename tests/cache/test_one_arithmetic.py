"""The same tokens give the same bytes in torch, C++ and Triton, in 16-bit numbers too."""

import contextlib
import itertools

import pytest
import torch

from kvq.cache.plan import make_plan
from kvq.calib.artefacts import stand_in_artefacts
from kvq.codecs import AffineCodec, Float8Codec
from kvq.errors import RecipeError
from kvq.kernels.cpp import build, launch
from kvq.kernels.cpp.sides import sides_of
from kvq.kernels.dispatch import interpreted, triton_version
from kvq.kernels.pack import pack_tokens
from kvq.kernels.types import Source
from kvq.models.describe import describe
from kvq.pages.layout import PageLayout
from kvq.pages.pages import Pages
from kvq.pages.pool import Pool
from kvq.recipe import list_recipes, load_recipe

HEADS, TOKENS = 1, 128


def codecs_that_kernels_pack(tiny_config) -> dict[str, AffineCodec | Float8Codec]:
    """Of every shipped recipe, the keys' and values' codecs that the pack kernel takes; one of each kind."""
    found = {}
    for recipe in (recipe for recipe in map(load_recipe, list_recipes()) if not recipe.is_exact):
        # Heads of 80 channels where the recipe's groups allow it.
        for head_dim in (80, 64):
            spec = describe(tiny_config(layers=1, heads=2, kv_heads=2, head_dim=head_dim))
            with contextlib.suppress(RecipeError):
                group = make_plan(recipe, spec, stand_in_artefacts(recipe, spec)).layers[0][0]
                break
        for codec in group.codecs.values():
            if codec.kernels_encode:
                found.setdefault(str(codec), codec)
    return found


def numbers(head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Ordinary tokens, constants, ties between two codes, small and large numbers."""
    x = torch.randn(1, HEADS, TOKENS, head_dim, generator=torch.Generator().manual_seed(0)) * 2
    x[:, :, 3] = 1.375
    x[:, :, 4] = 0
    x[:, :, 5] *= 1e-5
    x[:, :, 6] = torch.arange(head_dim) / 2
    x[:, :, 7] = x[:, :, 7] * 900
    x[:, :, 8, ::2] = 300
    x[..., 5] = x[..., 5] * 0.01 + 17
    # Channels whose numbers lie on the middles between codes.
    x[:, :, 64:, 9] = torch.arange(64) / 2
    return x.to(dtype)


def empty_pages(codec) -> Pages:
    layout = codec.layout(max(64, codec.page_tokens))
    pool = Pool(PageLayout(key=layout, value=layout), HEADS)
    ids = pool.allocate(-(-TOKENS // layout.page_tokens))
    return Pages(pool=pool, ids=[ids], key_scale=float(codec.scale))


def written(codec, x: torch.Tensor, by: str) -> torch.Tensor:
    """The bytes of pages with tokens of odd counts, in whole blocks."""
    pages, unit = empty_pages(codec), codec.block_tokens
    clip = codec.clip if isinstance(codec, AffineCodec) else 1.0
    cuts = [0, 64 // unit * unit, TOKENS // unit * unit] if unit > 1 else [0, 37, 38, 101]
    for start, stop in itertools.pairwise(cuts):
        part = x[:, :, start:stop]
        if by == "codec":
            pages.write("key", start, codec.encode(part))
        elif by == "cpp":
            side = sides_of({"key": codec, "value": codec}, pages.layout)["key"]
            assert launch.pack(part, pages, side, start)
        else:
            bounds = torch.tensor([[start, stop]], dtype=torch.int32)
            source = Source(x=part, ranges=bounds, offsets=-bounds[:, 0].contiguous(), longest=stop - start)
            assert pack_tokens(source, pages, "key", clip=clip, impl=by).impl == by
    return torch.cat([slab.flatten() for slab in pages.pool.slabs])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_same_tokens_give_the_same_bytes_in_every_implementation(dtype, tiny_config):
    codecs = codecs_that_kernels_pack(tiny_config)
    assert {codec.bits for codec in codecs.values()} >= {2, 4, 8}
    assert {type(codec) for codec in codecs.values()} == {AffineCodec, Float8Codec}
    ways = {"codec", "reference"}
    # Triton has a test of float32 in tests/kernels/pack.
    if triton_version() is not None and interpreted() and dtype != torch.float32:
        ways.add("triton")
    for name, codec in codecs.items():
        x = numbers(codec.head_dim, dtype)
        want = written(codec, x.float(), "codec")
        own = ways | {"cpp"} if build.unavailable() is None else ways
        for by in own:
            assert torch.equal(written(codec, x, by), want), (name, by)


def test_codes_made_in_the_tokens_own_precision_are_others():
    """Negative control: the formula in bfloat16, as it was; a third of the codes differ and the error doubles."""
    codec = AffineCodec(bits=8, axis="token", group=64, head_dim=64)
    x = torch.randn(1, 2, 512, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale, minimum = ((high - low) / 255).half(), low.half()
    coarse = ((x - minimum.bfloat16()) / scale.bfloat16()).round().clamp(0, 255).to(torch.uint8)
    encoded = codec.encode(x)
    assert (coarse != encoded.codes).double().mean() > 0.2
    decoded = codec.decode(encoded, torch.float64)
    error = (decoded - x.double()).square().mean()
    assert (coarse.double() * scale.double() + minimum.double() - x.double()).square().mean() > 2 * error
