"""Arguments and options of the pack launch."""

from dataclasses import dataclass

from kvq.kernels.device.launch import Launch, exactly, limit_of, pieces
from kvq.kernels.geometry import Side, sides_of
from kvq.kernels.pack.kernel import pack_tokens
from kvq.kernels.types import Source
from kvq.pages.pages import Pages
from kvq.pages.view import View


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What the kernels are compiled for besides a side's geometry; see ``kvq.pages.view.View``.

    clips   by slice, whether its codes span less than a group's range.
    """

    encoding: str
    correct: str | None
    clips: tuple[bool, ...]


def encoding_of(view: View, side: Side) -> tuple[Encoding, tuple]:
    """How a side is packed: what is compiled, and the numbers that a launch is given."""
    clip = {part.first: part.clip for part in view.slices}
    shares = [clip.get(own.first, 1.0) for own in side.slices]
    encoding = Encoding(encoding=view.encoding, correct=view.correct, clips=tuple(share < 1 for share in shares))
    levels = view.levels if view.correct else ()
    return encoding, (tuple((1 - share) / 2 for share in shares), view.edges, levels, float(view.scale))


def pack(source: Source, pages: Pages, side: str, view: View) -> Launch:
    own = sides_of(pages.layout)[0 if side == "key" else 1]
    encoding, numbers = encoding_of(view, own)
    x = source.x
    limit = side == "value" and own.limited
    return Launch(
        kernel=pack_tokens,
        grid=(pieces(source.longest, own.page_tokens), x.shape[0], pages.heads),
        args=(
            x,
            pages.pool.base,
            pages.table,
            source.ranges,
            source.offsets,
            limit_of(pages, source.offsets) if limit else source.offsets,
            x.stride(0),
            x.stride(1),
            x.stride(2),
            x.shape[2],
            pages.table.stride(0),
            pages.pool.unit,
            numbers,
        ),
        constants={"S": own, "E": encoding, "RECORD": pages.layout.record_bytes, "LIMIT": limit},
        options=exactly(),
    )
