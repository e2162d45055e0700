"""The same tokens give the same bytes in torch, C++ and Triton, in 16-bit numbers too."""

import contextlib
import itertools

import pytest
import torch

from kvq.cache.plan import make_plan
from kvq.calib.artefacts import stand_in_artefacts
from kvq.codecs import AffineCodec, Codec
from kvq.errors import RecipeError
from kvq.kernels.cpp import build, launch
from kvq.kernels.cpp.sides import sides_of
from kvq.kernels.dispatch import interpreted, triton_version
from kvq.kernels.pack import pack_tokens, why_no_pack
from kvq.kernels.types import Source
from kvq.models.describe import describe
from kvq.pages.layout import PageLayout
from kvq.pages.pages import Pages
from kvq.pages.pool import Pool
from kvq.pages.view import View
from kvq.recipe import list_recipes, load_recipe

HEADS, TOKENS = 2, 128


def codecs_that_kernels_pack(tiny_config) -> dict[View, Codec]:
    """Of every shipped recipe, the keys' and values' codecs that the pack kernel takes; one of each kind."""
    found = {}
    for recipe in (recipe for recipe in map(load_recipe, list_recipes()) if not recipe.is_exact):
        # Heads of 80 channels where the recipe's groups allow it.
        for head_dim in (80, 64):
            spec = describe(tiny_config(layers=1, heads=HEADS, kv_heads=HEADS, head_dim=head_dim))
            with contextlib.suppress(RecipeError):
                group = make_plan(recipe, spec, stand_in_artefacts(recipe, spec)).layers[0][0]
                break
        for codec in group.codecs.values():
            view = codec.view(codec.page_tokens)
            if why_no_pack(view, layout_of(codec)) is None:
                found.setdefault(view, codec)
    return found


def layout_of(codec) -> PageLayout:
    layout = codec.layout(codec.page_tokens)
    return PageLayout(key=layout, value=layout)


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
    pool = Pool(layout_of(codec), HEADS)
    return Pages(pool=pool, ids=[pool.allocate(-(-TOKENS // codec.page_tokens))])


def written(codec, x: torch.Tensor, by: str) -> torch.Tensor:
    """The bytes of pages with tokens of odd counts, in whole blocks."""
    pages, unit = empty_pages(codec), codec.block_tokens
    cuts = sorted({0, 64 // unit * unit, TOKENS // unit * unit}) if unit > 1 else [0, 63, 65]
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
            assert pack_tokens(source, pages, "key", codec, impl=by).impl == by
    return torch.cat([slab.flatten() for slab in pages.pool.slabs])


def kind_of(view: View) -> tuple:
    """How numbers are chosen and stored, bits aside."""
    own = view.slices[0].layout
    meta = own.axis, own.meta_terms, own.meta_format, own.meta_shared
    return view.encoding, view.norm, view.correct, len(view.slices) > 1, view.slices[0].clip < 1, meta


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_same_tokens_give_the_same_bytes_in_every_implementation(dtype, tiny_config):
    codecs = codecs_that_kernels_pack(tiny_config)
    kinds = {(view.encoding, part.layout.bits) for view in codecs for part in view.slices}
    assert kinds >= {("minmax", 2), ("minmax", 8), ("symmetric", 8), ("unit", 3), ("absmax", 4), ("e2m1", 4)}
    assert {view.norm for view in codecs} == {None, "head", "token"}
    assert any(len(view.slices) > 1 for view in codecs)
    assert len({kind_of(view) for view in codecs}) >= 12
    ways = ["reference"] if build.unavailable() is not None else ["reference", "cpp"]
    # Triton, whose interpreter is slow, packs one of a kind whatever its bits; other dtypes are in tests/kernels/pack.
    triton = triton_version() is not None and interpreted() and dtype == torch.bfloat16
    kinds = set()
    for view, codec in codecs.items():
        x = numbers(codec.head_dim, dtype)
        want = written(codec, x.float(), "codec")
        fresh = triton and kind_of(view) not in kinds
        kinds.add(kind_of(view))
        for by in [*ways, "triton"] if fresh else ways:
            assert torch.equal(written(codec, x, by), want), (view, by)


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
