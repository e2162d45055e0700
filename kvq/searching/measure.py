"""Measure variants of one layer through the real evaluation path, without running the layers before it again.

The layers before the changed one see what they saw in the exact forward, so the states that enter every layer are kept
from that forward. A variant's forward is the model's own, in two-view attention, with the layers before the changed one
handing on what they are given. Families whose layers take more from each other than hidden states are run whole.
"""

import contextlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from kvq.cache import CachePlan
from kvq.eval.likelihood import score_row
from kvq.eval.lm_head import Hidden, hidden_states
from kvq.eval.two_view import two_view
from kvq.models.decoder import decoder_layers, telling

Name = TypeVar("Name", bound=Hashable)

# Relative difference of final states that another order of the same sums may make.
REUSE_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Means over the scored tokens of some windows: KL to the exact model (nats), share of changed top-1 tokens."""

    kl: float
    flips: float
    tokens: int

    @classmethod
    def pooled(cls, parts: Sequence["Damage"]) -> "Damage":
        tokens = sum(part.tokens for part in parts)
        kl, flips = (sum(getattr(part, name) * part.tokens for part in parts) / tokens for name in ("kl", "flips"))
        return cls(kl=kl, flips=flips, tokens=tokens)


class _Stop(Exception):
    """Ends a forward once the wanted layer has run."""


class Probe:
    """One window [1, T] of a model, its exact forward, and variants of it. ``positions`` [1, T]: None counts from 0."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: torch.Tensor,
        reuse: bool = True,
        positions: torch.Tensor | None = None,
    ):
        self.model, self.tokens, self.positions = model, tokens, positions
        self.blocks = decoder_layers(model) if reuse else None
        self.entering: list[torch.Tensor] = []
        self.leaving: list[torch.Tensor] = []
        self._in_tuple = False
        self.exact = self._exact()

    def _exact(self) -> Hidden:
        hooks = []
        for block in self.blocks or ():
            hooks.append(block.register_forward_pre_hook(self._enter, with_kwargs=True))
            hooks.append(block.register_forward_hook(self._leave))
        try:
            return self._run()
        finally:
            for hook in hooks:
                hook.remove()

    def _run(self) -> Hidden:
        return hidden_states(self.model, self.tokens, self.positions)

    def _enter(self, module, args, kwargs):
        self.entering.append(args[0] if args else kwargs["hidden_states"])

    def _leave(self, module, args, output):
        self._in_tuple = isinstance(output, tuple)
        self.leaving.append(output[0] if self._in_tuple else output)

    def reuses(self, layers: Sequence[int]) -> bool:
        """True if forwards from the middle and the last of ``layers`` end where the exact forward does."""
        if not self.blocks or len(self.entering) != len(self.blocks):
            return False
        whole = self.exact.states
        for layer in {layers[len(layers) // 2], layers[-1]}:
            try:
                with self._from(layer):
                    found = self._run().states
            # A layer that misses what an earlier one should have left raises what its family raises.
            except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError):
                return False
            if not bool((found - whole).norm() <= REUSE_TOLERANCE * whole.norm()):
                return False
        return True

    @contextlib.contextmanager
    def _from(self, layer: int) -> Iterator[None]:
        """Forwards start at ``layer``, with what enters it in the exact forward."""
        states = self.entering[layer]

        def give(module, args, kwargs):
            return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})

        skipped = [(block, block.__dict__.get("forward")) for block in self.blocks[:layer]]
        hook = self.blocks[layer].register_forward_pre_hook(give, with_kwargs=True)
        for block, _ in skipped:
            block.forward = self._hand_on
        try:
            yield
        finally:
            hook.remove()
            for block, held in skipped:
                del block.forward
                # Another library (accelerate) may have put its own forward there.
                if held is not None:
                    block.forward = held

    def _hand_on(self, hidden_states, *args, **kwargs):
        return (hidden_states,) if self._in_tuple else hidden_states

    def _variant(self, plan: CachePlan) -> Hidden:
        (layer,) = plan.layers
        with two_view(self.model, plan, "stream"), self._from(layer) if self.blocks else contextlib.nullcontext():
            return self._run()

    def damages(self, plans: Mapping[Name, CachePlan]) -> dict[Name, Damage]:
        """What each plan, of one layer, does to the model's next-token distributions."""
        with telling(self.model, len(plans)):
            found = {name: self._variant(plan) for name, plan in plans.items()}
        scores = score_row(self.model, self.model, self.exact, found, self.tokens[0], 0, 1, 0)
        kl = {name: float(own.kl.double().mean()) for name, own in scores.items()}
        flips = {name: 1 - float(own.agrees.double().mean()) for name, own in scores.items()}
        return {name: Damage(kl=kl[name], flips=flips[name], tokens=len(own.kl)) for name, own in scores.items()}

    @torch.inference_mode()
    def local_error(self, plan: CachePlan) -> float:
        """Relative squared error of what leaves the changed layer, over the layer's own change of its input."""
        (layer,) = plan.layers
        if not self.blocks:
            return float("nan")
        box = []

        def take(module, args, output):
            box.append(output[0] if isinstance(output, tuple) else output)
            raise _Stop

        hook = self.blocks[layer].register_forward_hook(take)
        try:
            with two_view(self.model, plan, "stream"), self._from(layer), contextlib.suppress(_Stop):
                self._run()
        finally:
            hook.remove()
        exact = self.leaving[layer]
        return float((box[0] - exact).double().square().sum() / (exact - self.entering[layer]).double().square().sum())
