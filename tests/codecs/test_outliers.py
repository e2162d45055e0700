"""Sparse outliers: KVQuant and GEAR against loops over their definitions, in float64."""

import pytest
import torch

from kvq.codecs import codec_spec
from kvq.codecs.outliers import outlier_count

HEAD_DIM, HEADS = 32, 3


def codec_of(artefacts=None, **settings):
    return codec_spec(**settings).build(HEAD_DIM, artefacts or {}, HEADS)


def round_trip(codec, x):
    return codec.decode(codec.encode(x), torch.float64)


def affine_group(numbers, bits):
    """One group: fp16 scale and minimum, round half to even."""
    low, high = min(numbers), max(numbers)
    scale = torch.tensor((high - low) / (2**bits - 1)).half().double().item()
    minimum = torch.tensor(low).half().double().item()
    if not scale:
        return [minimum] * len(numbers)
    return [min(max(round((x - minimum) / scale), 0), 2**bits - 1) * scale + minimum for x in numbers]


def sparse_and_dense(vector: list[float], count: int, quantize) -> list[float]:
    """Take the extremes out, put the mean of the others in their place, quantize, and put the extremes back."""
    order = sorted(range(len(vector)), key=lambda i: vector[i])
    taken = set(order[:count] + order[-count:])
    rest = [v for i, v in enumerate(vector) if i not in taken]
    mean = sum(rest) / max(1, len(rest))
    dense = quantize([mean if i in taken else v for i, v in enumerate(vector)])
    return [vector[i] if i in taken else v for i, v in enumerate(dense)]


def test_outliers_along_tokens_are_the_extremes_of_all_heads(numbers):
    x = numbers(2, 9)
    codec = codec_of(codec="affine", bits=3, axis="token", group="token", outliers={"share": 0.04, "along": "token"})
    found = round_trip(codec, x)
    for b in range(2):
        for t in range(9):
            expected = sparse_and_dense(x[b, :, t].flatten().tolist(), 2, lambda v: affine_group(v, 3))
            # What is exact in the definition is exact to fp16 of the difference here.
            assert found[b, :, t].flatten().tolist() == pytest.approx(expected, abs=1.6e-2)


def test_outliers_along_channels_are_the_extremes_of_a_block(numbers):
    x = numbers(1, 64)
    codec = codec_of(codec="affine", bits=2, axis="channel", group=32, outliers={"share": 0.1, "along": "channel"})
    found = round_trip(codec, x)
    for h in range(HEADS):
        for c in range(HEAD_DIM):
            for start in (0, 32):
                vector = x[0, h, start : start + 32, c].tolist()
                expected = sparse_and_dense(vector, 2, lambda v: affine_group(v, 2))
                assert found[0, h, start : start + 32, c].tolist() == pytest.approx(expected, abs=1.6e-2)


def test_static_ranges_choose_what_lies_farthest_outside(numbers):
    """KVQuant keys: per-channel ranges from calibration, outliers by distance from the middle in half ranges."""
    levels = torch.linspace(-1, 1, 8, dtype=torch.float64)
    static = torch.rand(HEADS, HEAD_DIM, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.5
    artefacts = {"levels": levels, "edges": (levels[1:] + levels[:-1]) / 2, "range": static}
    settings = {"codec": "book", "bits": 3, "levels": "calibrated", "scale": "calibrated"}
    codec = codec_of(artefacts, **settings, outliers={"share": 0.06, "along": "token"})
    x = numbers(1, 21)
    index = codec.encode(x).sections["outlier_index"].long()
    found, dense = round_trip(codec, x), round_trip(codec_of(artefacts, **settings), x)
    for t in range(21):
        token, scale, middle = x[0, :, t].flatten(), static[..., 0].flatten(), static[..., 1].flatten()
        distance = ((token - middle) / scale).abs()
        chosen = set(distance.argsort(descending=True)[:6].tolist())
        assert set(index[0, t].tolist()) == chosen
        kept = torch.tensor([i in chosen for i in range(HEADS * HEAD_DIM)])
        assert torch.allclose(found[0, :, t].flatten()[kept], token[kept], rtol=0, atol=1e-2)
        assert torch.equal(found[0, :, t].flatten()[~kept], dense[0, :, t].flatten()[~kept])


@pytest.mark.parametrize("along", ["token", "channel"])
def test_a_share_of_all_is_exact(numbers, along):
    x = numbers(1, 64)
    codec = codec_of(codec="affine", bits=2, axis="channel", group=64, outliers={"share": 1.0, "along": along})
    assert (round_trip(codec, x) - x).abs().max() < 1e-2
    assert (round_trip(codec_of(codec="affine", bits=2, axis="channel", group=64), x) - x).abs().max() > 1


def test_a_constant_vector_and_ties_are_counted_once():
    """The largest and the smallest of equal numbers are different ones, so nothing is added twice."""
    codec = codec_of(codec="affine", bits=2, axis="token", group="head", outliers={"share": 0.1, "along": "token"})
    x = torch.full((1, HEADS, 64, HEAD_DIM), 1.7, dtype=torch.float64)
    encoded = codec.encode(x)
    index = encoded.sections["outlier_index"].long()
    assert (index.diff(dim=-1) > 0).all()
    assert (codec.decode(encoded, torch.float64) - x).abs().max() < 1e-3


@pytest.mark.parametrize(("share", "length", "count"), [(0.01, 4096, 20), (0.01, 192, 1), (0.02, 64, 1), (1, 33, 16)])
def test_counts(share, length, count):
    assert outlier_count(share, length) == count


def test_the_smallest_index_type_that_holds_a_token():
    for heads, dtype in ((8, "uint8"), (9, "int16")):
        spec = codec_spec(codec="affine", bits=2, axis="token", group="head", outliers={"share": 0.1, "along": "token"})
        layout = spec.build(HEAD_DIM, {}, heads).layout(64)
        assert {s.name: s.dtype for s in layout.extras}["outlier_index"] == dtype


def test_gear_is_sparse_plus_backbone_plus_low_rank(numbers):
    """One block by the paper's definition: outliers out, KIVI codes, then the best rank-r part of what is left."""
    x = numbers(1, 64, heads=1)
    spec = {"codec": "affine", "bits": 2, "axis": "channel", "group": 64}
    spec |= {"low_rank": {"rank": 4, "block": 64}, "outliers": {"share": 0.04, "along": "channel"}}
    codec = codec_spec(**spec).build(HEAD_DIM, {}, 1)
    dense, kept = torch.empty(64, HEAD_DIM, dtype=torch.float64), torch.zeros(64, HEAD_DIM, dtype=torch.bool)
    filled = x[0, 0].clone()
    for c in range(HEAD_DIM):
        vector = x[0, 0, :, c]
        order = vector.argsort()
        kept[order[:1], c] = kept[order[-1:], c] = True
        filled[kept[:, c], c] = vector[~kept[:, c]].mean()
        dense[:, c] = torch.tensor(affine_group(filled[:, c].tolist(), 2))
    u, s, v = torch.linalg.svd(filled - dense)
    low_rank = (u[:, :4] * s[:4]) @ v[:4]
    expected = torch.where(kept, x[0, 0], dense + low_rank)
    found = round_trip(codec, x)[0, 0]
    # Three iterations come near to the best approximation.
    assert (found - x[0, 0]).norm() < 1.03 * (expected - x[0, 0]).norm()
    assert (found - expected)[kept].abs().max() < 1e-2
    backbone = codec_spec(**{k: spec[k] for k in ("codec", "bits", "axis", "group")}).build(HEAD_DIM)
    assert (found - x[0, 0]).norm() < 0.8 * (round_trip(backbone, x)[0, 0] - x[0, 0]).norm()
