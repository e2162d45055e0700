"""The KV scales of a folder: where they should be, and what is wrong with those that are there."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from kvq.errors import UnsupportedModelError
from kvq.exporting.check.findings import Finding, ScaleSummary, error, warning
from kvq.exporting.check.folder import Folder
from kvq.exporting.engines import SPELLINGS
from kvq.models.describe import ModelSpec
from kvq.models.names import attention_modules, shared_layers
from kvq.pages.layout import SIDES

# 448 times this is more than float16 holds, so nothing measured in 16 bits needs a larger scale.
_LARGEST = 65504.0 / 448.0
_SUFFIXES = (".k_scale", ".v_scale", ".kv_scale", "_cache.scale", "k_proj.output_scale", "v_proj.output_scale")


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Scales by layer and side, and how their names are spelled (keys of SPELLINGS).

    layers   every layer whose cache an engine quantizes.
    """

    layers: Mapping[int, str]
    found: Mapping[tuple[int, str], torch.Tensor]
    spelled: frozenset[str]

    def without(self) -> list[int]:
        """Layers that have no scale at all."""
        return [i for i in self.layers if not any((i, side) in self.found for side in SIDES)]

    def half(self) -> list[tuple[int, str]]:
        """Layer and side of scales whose partner is there and they are not."""
        empty = set(self.without())
        return [(i, s) for i in self.layers if i not in empty for s in SIDES if (i, s) not in self.found]

    @property
    def granularity(self) -> str | None:
        sizes = {tensor.numel() for tensor in self.found.values()}
        return None if not sizes else "tensor" if sizes == {1} else "head"

    def summary(self, skipped: Iterable[int] = ()) -> ScaleSummary:
        numbers = torch.cat([t.flatten().double() for t in self.found.values()]) if self.found else torch.empty(0)
        numbers = numbers[numbers.isfinite()]
        return ScaleSummary(
            expected=2 * len(set(self.layers) - set(skipped)),
            found=len(self.found),
            granularity=self.granularity,
            smallest=float(numbers.min()) if len(numbers) else None,
            largest=float(numbers.max()) if len(numbers) else None,
        )


def read_scales(folder: Folder, model: ModelSpec, findings: list[Finding]) -> Scales:
    """Find every scale by the names that engines know; adds findings for what is odd about them."""
    cached = [layer.index for layer in model.layers if layer.kind in ("full", "sliding")]
    wanted = sorted({*cached, *shared_layers(model.config)})
    try:
        modules = attention_modules(folder.tensors, wanted)
    except UnsupportedModelError as wrong:
        findings.append(error("scales", str(wrong)))
        return Scales(layers={}, found={}, spelled=frozenset())
    found: dict[tuple[int, str], torch.Tensor] = {}
    spelled, known = set(), set()
    for index, module in modules.items():
        for side in SIDES:
            for spelling, pattern in SPELLINGS.items():
                name = pattern.format(module=module, s=side[0])
                if name not in folder.tensors:
                    continue
                spelled.add(spelling)
                known.add(name)
                if (index, side) in found:
                    findings.append(error("scales", f"layer {index} has two {side} scales, spelled in different ways."))
                found[index, side] = _read(folder, name, findings)
    strangers = sorted(name for name in set(folder.tensors) - known if name.endswith(_SUFFIXES))
    if strangers:
        lost = f"{len(strangers)} tensors look like KV scales and lie where none is looked for"
        findings.append(warning("scales", f"{lost}, such as {strangers[0]!r}."))
    return Scales(layers=modules, found=found, spelled=frozenset(spelled))


def judge_values(scales: Scales, model: ModelSpec, measured: bool) -> list[Finding]:
    """Findings for scales that are not finite, not positive, of a wrong shape, or exactly 1.0.

    measured   True if the folder says where its scales come from, so that a 1.0 was calibrated.
    """
    heads = _heads(model)
    problems: dict[str, list[str]] = {}
    for (index, side), scale in scales.found.items():
        wrong = _wrong(scale, heads[index])
        if wrong:
            problems.setdefault(wrong, []).append(f"layer {index} {side}")
    found = [error("scales", f"{', '.join(_some(places))} hold {what}.") for what, places in problems.items()]
    ones = [f"layer {i} {s}" for (i, s), scale in scales.found.items() if bool((scale == 1.0).any())]
    if ones:
        text = f"{', '.join(_some(ones))} {'is' if len(ones) == 1 else 'are'} exactly 1.0"
        if measured:
            found.append(warning("scales", f"{text}; calibration gave them so."))
        else:
            found.append(error("scales", f"{text}, the number that stands for no calibration."))
    return found


def _wrong(scale: torch.Tensor, heads: int) -> str | None:
    """What a scale holds that it should not."""
    if not scale.is_floating_point():
        return "no floating-point numbers"
    if scale.numel() not in (1, heads):
        return f"neither 1 nor {heads} numbers"
    if not bool(scale.isfinite().all()):
        return "NaN or infinity"
    if not bool((scale > 0).all()):
        return "numbers that are not positive"
    return f"more than {_LARGEST:.0f}, beyond what 16 bits need" if float(scale.max()) > _LARGEST else None


def _heads(model: ModelSpec) -> dict[int, int]:
    heads = {layer.index: layer.kv_heads for layer in model.layers}
    return heads | {reader: heads[owner] for reader, owner in shared_layers(model.config).items()}


def _read(folder: Folder, name: str, findings: list[Finding]) -> torch.Tensor:
    try:
        return folder.tensor(name)
    except OSError as wrong:
        findings.append(error("scales", f"{name!r} cannot be read ({wrong})."))
        return torch.tensor(float("nan"))


def _some(names: list[str], count: int = 3) -> list[str]:
    return names if len(names) <= count else [*names[:count], f"{len(names) - count} more"]
