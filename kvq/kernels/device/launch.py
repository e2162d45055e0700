"""A kernel call as data: what runs is what the budgets are counted on."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from kvq.kernels.bit_fields import book_registers
from kvq.pages.pages import Pages


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel call: ``run`` it, or ``compile`` it for the current target and get the binary."""

    kernel: Any
    grid: tuple[int, int, int]
    args: tuple
    constants: dict[str, Any]
    options: dict[str, int | bool]

    def run(self, *first: torch.Tensor) -> None:
        """Launch in the device of the tensors; ``first`` stand in the place of the first arguments, laid out alike."""
        args = (*first, *self.args[len(first) :])
        if several_devices() and args[0].device.type == "cuda":
            with torch.cuda.device(args[0].device):
                self.kernel[self.grid](*args, **self.constants, **self.options)
        else:
            self.kernel[self.grid](*args, **self.constants, **self.options)

    def compile(self):
        return self.kernel.warmup(*self.args, **self.constants, **self.options, grid=self.grid)


@lru_cache(maxsize=1)
def several_devices() -> bool:
    return torch.cuda.is_available() and torch.cuda.device_count() > 1


def limit_of(pages: Pages, unread: torch.Tensor) -> torch.Tensor:
    """The bound of the values' scales, or ``unread`` where no kernel asks for one."""
    return pages.pool.value_limit if pages.layout.value.scaled_by_token else unread


def books(pages: Pages) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Registers of both sides' levels, or () where a side has no book or needs no table of it."""
    found = []
    for side, levels in (("key", pages.key_levels), ("value", pages.value_levels)):
        found.append(() if levels is None or pages.layout.side(side).evenly else book_registers(levels))
    return tuple(found)


def factor(pages: Pages, side: str) -> float:
    """The static factor of a side's numbers as kernels read them: its scale, times the distance of even levels."""
    levels = pages.key_levels if side == "key" else pages.value_levels
    scale = float(pages.key_scale if side == "key" else pages.value_scale)
    return scale * (levels[1] - levels[0]) if levels is not None and pages.layout.side(side).evenly else scale


def pieces(longest: int, page_tokens: int) -> int:
    """Most pages that a range of ``longest`` tokens can touch."""
    return (longest + page_tokens - 2) // page_tokens + 1


def exactly() -> dict[str, int | bool]:
    """Options of kernels whose bytes must not depend on how products and sums are contracted."""
    return {"num_warps": 4, "enable_fp_fusion": False}
