"""The page record: sections are aligned, disjoint, and as large as the tables of the specification say."""

import pytest

from kvq.pages.layout import PageLayout, Section, SideLayout


def side(bits, head_dim=128, axis="token", group=128, page_tokens=64, form="affine", extras=()):
    return SideLayout(
        format=form, bits=bits, head_dim=head_dim, page_tokens=page_tokens, axis=axis, group=group, extras=extras
    )


@pytest.mark.parametrize(("bits", "record"), [(8, 16896), (4, 8704), (3, 6656), (2, 4608)])
def test_record_sizes_of_the_reference_table(bits, record):
    """head_dim 128, 64 tokens, one (scale, minimum) pair of fp16 numbers per token and side."""
    assert PageLayout(key=side(bits), value=side(bits)).record_bytes == record


@pytest.mark.parametrize("head_dim", [16, 48, 80, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_sections_are_aligned_and_disjoint(bits, head_dim):
    key = side(bits, head_dim, axis="channel", group=32)
    value = side(2, head_dim, group=16)
    layout = PageLayout(key=key, value=value)
    spans = [
        (layout.offsets["key_words"], key.words_bytes),
        (layout.offsets["value_words"], value.words_bytes),
        (layout.offsets["key_meta"], key.meta_bytes),
        (layout.offsets["value_meta"], value.meta_bytes),
    ]
    for (start, size), following in zip(spans, [s for s, _ in spans[1:]] + [layout.record_bytes]):
        assert start % 128 == 0
        assert start + size <= following


def test_bits_per_element_count_codes_and_metadata():
    assert side(2, 64, group=32).bits_per_element() == 3.0
    assert side(2, 64, axis="channel", group=32).bits_per_element() == 3.0
    assert side(4, 64, group=64).bits_per_element() == 4.5
    assert side(8, 64, form="e4m3").bits_per_element() == 8.0


def test_padding_counts_where_pages_are_counted():
    odd = Section(name="outliers", shape=(), dtype="uint8", tokens=8)
    padded = side(2, 64, group=32, extras=(odd,))
    # 64 tokens have 8 bytes, which take 16.
    assert padded.bits_per_element() == 3 + 8 * 8 / (64 * 64)
    assert padded.bits_per_element(padded=True) == 3 + 8 * 16 / (64 * 64)
    layout = PageLayout(key=padded, value=side(2, 64, group=32))
    assert layout.bits_per_element() == 8 * layout.record_bytes / (2 * 64 * 64)
    plain = PageLayout(key=side(2, 64, group=32), value=side(4, 64, group=64))
    assert plain.bits_per_element() == (3.0 + 4.5) / 2


def test_further_sections_follow_and_shared_ones_lie_apart():
    own = Section(name="outliers", shape=(3,), dtype="int16")
    shared = Section(name="norm", shape=(), tokens=1, shared=True)
    plain = PageLayout(key=side(2, 64, group=32), value=side(2, 64, group=32))
    more = PageLayout(key=side(2, 64, group=32, extras=(own, shared)), value=side(2, 64, group=32, extras=(own,)))
    assert {name: more.offsets[name] for name in plain.offsets if name != "end"} == {
        name: start for name, start in plain.offsets.items() if name != "end"
    }
    assert more.offsets["key_outliers"] == plain.record_bytes
    # 64 tokens of three int16 numbers fill three times 128 bytes.
    assert more.record_bytes == plain.record_bytes + 2 * 384
    assert (plain.shared_bytes, more.shared_bytes) == (0, 128)
    assert more.shared_offsets["key_norm"] == 0


def test_shared_sections_count_once_for_all_heads():
    norm = Section(name="norm", shape=(), shared=True)
    layout = side(2, 64, group=32, extras=(norm,))
    assert layout.bits_per_element(1) == 3.25
    assert layout.bits_per_element(4) == 3.0625
