"""Arguments and options of the pack launch."""

from kvq.kernels.device.launch import Launch, exactly, limit_of, pieces
from kvq.kernels.geometry import sides_of
from kvq.kernels.pack.kernel import pack_tokens
from kvq.kernels.types import Source
from kvq.pages.pages import Pages


def pack(source: Source, pages: Pages, side: str, clip: float) -> Launch:
    own = sides_of(pages.layout)[0 if side == "key" else 1]
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
            (1 - clip) / 2,
            float(pages.key_scale if side == "key" else pages.value_scale),
        ),
        constants={
            "S": own,
            "RECORD": pages.layout.record_bytes,
            "CLIP": clip < 1,
            "LIMIT": limit,
        },
        options=exactly(),
    )
