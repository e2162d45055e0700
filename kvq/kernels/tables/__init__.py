"""Launch parameters, as data: no autotuning, so a first token costs one compilation and no search."""

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

from kvq.kernels.geometry import Side

_REGISTERS = 65536


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """How a kernel is launched.

    warps       warps of a program. rows, split: see ``geometry.tile_of``.
    stages      tiles in flight, the one being read included.
    registers   most registers of a thread; what fits without spilling decides how many programs share a processor.
    programs    programs that share a processor, by registers.
    """

    warps: int
    rows: int
    split: int
    stages: int
    registers: int

    @property
    def programs(self) -> int:
        return _REGISTERS // (32 * self.warps * self.registers)


@lru_cache(maxsize=1)
def _decode_table() -> list[dict]:
    return json.loads(resources.files(__package__).joinpath("decode.json").read_text())


def _width(side: Side) -> str:
    name = side.kind if side.kind != "affine" else str(side.bits)
    if side.by_channel:
        return f"{name} channel"
    return f"{name} groups" if side.groups > 1 else name


def decode_parameters(key: Side, value: Side, columns: int, sm: int) -> Parameters:
    """The first row of ``decode.json`` whose conditions hold; conditions that are left out always do."""
    facts = {"key": _width(key), "value": _width(value), "head_dim": key.head_dim, "columns": columns, "sm": sm}
    for row in _decode_table():
        if all(_holds(facts[name], allowed) for name, allowed in row.get("when", {}).items()):
            return Parameters(**row["use"])
    raise AssertionError("decode.json ends with a row without conditions")


def _holds(fact, allowed) -> bool:
    """``allowed``: a list of values, or {"from": lowest, "to": highest} for numbers."""
    if isinstance(allowed, list):
        return fact in allowed
    return allowed.get("from", fact) <= fact <= allowed.get("to", fact)
