"""What every kind of statistic is: tensors and numbers that join with another batch's as if both were seen together."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import torch

# Metadata of fields that join otherwise than by a sum.
SMALLEST, LARGEST = {"join": torch.minimum}, {"join": torch.maximum}


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """A frozen dataclass of tensors, plain numbers and other statistics, measured by ``observe`` on a batch.

    Tensors and numbers (``facts``) are stored, and ``restore`` reads them back.
    """

    def merge(self, other: Self) -> Self:
        """Statistics of both token sets together."""
        joined = {}
        for part in fields(self):
            own, others = getattr(self, part.name), getattr(other, part.name)
            join = part.metadata.get("join", operator.add)
            joined[part.name] = own.merge(others) if isinstance(own, Statistic) else join(own, others)
        return type(self)(**joined)

    def cpu(self) -> Self:
        """The same statistic with all tensors on the CPU."""
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        movable = torch.Tensor | Statistic
        return type(self)(**{name: x.cpu() if isinstance(x, movable) else x for name, x in values.items()})

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name; those of a statistic inside as ``{field}_{name}``."""
        found = {}
        for part in fields(self):
            value = getattr(self, part.name)
            if isinstance(value, Statistic):
                found |= {f"{part.name}_{name}": x for name, x in value.tensors().items()}
            elif isinstance(value, torch.Tensor):
                found[part.name] = value
        return found

    def facts(self) -> dict[str, Any]:
        """What is no tensor, as plain data."""
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        return {name: x for name, x in values.items() if not isinstance(x, torch.Tensor | Statistic)}

    @classmethod
    def restore(cls, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> Self:
        """Inverse of ``tensors`` and ``facts``; other tensors are passed over. Raises KeyError if something lacks."""
        values = {}
        for part in fields(cls):
            if issubclass(part.type, Statistic):
                prefix = f"{part.name}_"
                own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
                values[part.name] = part.type.restore(own, facts)
            else:
                values[part.name] = (tensors if part.type is torch.Tensor else facts)[part.name]
        return cls(**values)
