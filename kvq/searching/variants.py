"""Plans in which one side of one layer, or of some of its heads, is quantized and everything else is exact."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

from kvq.cache import CachePlan, HeadGroup, make_plan
from kvq.calib.artefacts import fit_artefacts
from kvq.calib.stats import Stats
from kvq.errors import DataError, KvqError, RecipeError
from kvq.heads import TokenPolicy
from kvq.models.describe import LayerSpec, ModelSpec
from kvq.pages.flush import FlushRule
from kvq.pages.layout import SIDES
from kvq.searching.space import PARTNER, Option, Space

# A window that no text leaves: what is not measured stays exact.
_ENDLESS = 1 << 40


class Variants:
    """Plans and costs of every option of a space on one model.

    ``space`` has only the options that could be made; ``left_out`` names the others, with the reason. ``late`` says
    that the time for fitting is over.
    """

    def __init__(
        self,
        space: Space,
        model: ModelSpec,
        stats: Stats | None = None,
        folder: Path | None = None,
        late: Callable[[], bool] = lambda: False,
    ):
        self.model, self.late, self.left_out = model, late, dict(space.left_out)
        self._artefacts: dict[tuple, dict[str, torch.Tensor]] = {}
        self._plans: dict[tuple, CachePlan] = {}
        options = {
            side: tuple(o for o in space.of(side) if self._made(o, space.tokens, stats, folder)) for side in SIDES
        }
        for side in SIDES:
            if not options[side]:
                raise RecipeError(
                    f"no option for {side}s can be made on this model: {next(iter(self.left_out.values()))}"
                )
        self.space = replace(space, options=options, left_out=self.left_out)

    def _made(self, option: Option, policies, stats: Stats | None, folder: Path | None) -> bool:
        try:
            key = self._key(option)
            if key not in self._artefacts:
                if any(key[0] == option.side for key in self._artefacts) and self.late():
                    raise DataError("time limit")
                recipe = option.recipe(policies[0])
                self._artefacts[key] = fit_artefacts(recipe, self.model, stats, folder) if stats is not None else {}
            for policy in policies:
                self._plans[option, policy] = make_plan(option.recipe(policy), self.model, self._artefacts[key])
        except KvqError as error:
            self.left_out[f"{option.side} {option.name}"] = str(error)
            return False
        return True

    @staticmethod
    def _key(option: Option) -> tuple:
        """Options of one key share artefacts: chains are fitted to the text, not to the codec behind them."""
        learned = any(step["kind"].startswith("learned") or step.get("rule") for step in option.chain)
        searched = learned or any("search" in step.values() for step in option.chain)
        own = option.codec if option.codec.is_calibrated or searched else None
        return option.side, repr(option.chain), own

    @cached_property
    def layers(self) -> Mapping[int, LayerSpec]:
        return {layer.index: layer for layer in self.model.full_layers}

    def plan(self, option: Option, policy: TokenPolicy, layer: int, head: int | None = None) -> CachePlan:
        """Only ``option``'s side of ``layer`` (of KV head ``head`` alone) is quantized."""
        own = self._plans[option, policy]
        if head is None or self.layers[layer].kv_heads == 1:
            groups = tuple(_alone(group, option.side) for group in own.layers[layer])
        else:
            groups = self._one_head(option, policy, layer, head)
        return CachePlan(recipe=own.recipe, model=self.model, layers={layer: groups})

    def _one_head(self, option: Option, policy: TokenPolicy, layer: int, head: int) -> tuple[HeadGroup, ...]:
        recipe = option.recipe(policy)
        others = [h for h in range(self.layers[layer].kv_heads) if h != head]
        # Any other codec separates the other heads; they are never flushed.
        codec = PARTNER.to_dict() | ({"bits": 4} if option.codec == PARTNER else {})
        # An override keeps what it does not name, and the option's other settings need not fit this codec.
        codec |= {name: None for name in option.codec.to_dict() if name not in codec}
        split = replace(recipe, layers={f"{layer}/{','.join(map(str, others))}": {option.side: codec}})
        only = replace(
            self.model, layers=tuple(la if la.index == layer else replace(la, kind="state") for la in self.model.layers)
        )
        plan = make_plan(split, only, self._artefacts[self._key(option)])
        return tuple(
            _alone(group, option.side) if group.heads == (head,) else _alone(group, None)
            for group in plan.layers[layer]
        )

    def bits(self, option: Option, policy: TokenPolicy, layer: int, tokens: int | None = None) -> float:
        """Stored bits per number of this side of a layer: asymptotically, or with exact tokens at ``tokens`` tokens."""
        group = self._plans[option, policy].layers[layer][0]
        side = group.layout.side(option.side)
        stored = side.bits_per_element(len(group.heads), padded=True) * side.head_dim / group.head_dim
        if tokens is None:
            return stored
        packed = group.rules[option.side].packed(tokens)
        return (packed * stored + (tokens - packed) * 8 * self.model.dtype.itemsize) / tokens


def _alone(group: HeadGroup, side: str | None) -> HeadGroup:
    """The group with the other side (None: both sides) exact for ever."""
    never = {s: FlushRule(sinks=group.sinks, window=_ENDLESS, unit=1) for s in SIDES if s != side}
    return replace(group, rules={**group.rules, **never})
