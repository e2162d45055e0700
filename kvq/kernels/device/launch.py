"""A kernel call as data: what runs is what the budgets are counted on."""

from dataclasses import dataclass
from typing import Any

from kvq.kernels.bit_fields import book_registers
from kvq.kernels.geometry import sides_of
from kvq.pages.pages import Pages


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel call: ``run`` it, or ``compile`` it for the current target and get the binary."""

    kernel: Any
    grid: tuple[int, int, int]
    args: tuple
    constants: dict[str, Any]
    options: dict[str, int | bool]

    def run(self) -> None:
        self.kernel[self.grid](*self.args, **self.constants, **self.options)

    def compile(self):
        return self.kernel.warmup(*self.args, **self.constants, **self.options, grid=self.grid)


def limits(pages: Pages) -> bool:
    """Whether the values' scales lie in pages, token by token, and a bound of them is known."""
    value = sides_of(pages.layout)[1]
    return pages.value_limit is not None and value.scaled and not value.by_channel


def books(pages: Pages) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Registers of both sides' levels, or () where a side has no book."""
    return tuple(() if levels is None else book_registers(levels) for levels in (pages.key_levels, pages.value_levels))


def pieces(longest: int, page_tokens: int) -> int:
    """Most pages that a range of ``longest`` tokens can touch."""
    return (longest + page_tokens - 2) // page_tokens + 1


def exactly() -> dict[str, int | bool]:
    """Options of kernels whose bytes must not depend on how products and sums are contracted."""
    return {"num_warps": 4, "enable_fp_fusion": False}
