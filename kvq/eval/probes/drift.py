"""Drift: how long a greedy generation stays what the unquantized model writes.

The unquantized model writes on from a few prompts. The recipe then reads what it wrote: up to the first token that it
would not have written itself, this is its own greedy generation, token for token. Beyond it, agreement is the share of
tokens that it would have chosen at that place of the baseline's text.
"""

from collections.abc import Sequence
from random import Random

from kvq.eval.probes.base import Ask, Passage, Probe, Setting

PROMPT, WRITTEN = 256, 256


class Drift(Probe):
    """Prompts, and what the unquantized model writes after them."""

    name = "drift"
    version = "1"
    summary = "tokens until a greedy generation leaves the unquantized model's"
    metrics = ("tokens", "agreement")
    count = 8

    def lengths(self, longest: int) -> tuple[int, ...]:
        return (min(PROMPT, longest // 2),)

    def passages(self, setting: Setting, draws: Sequence[Random], length: int) -> list[Passage]:
        """All of one length at once, so that the model writes them in batches."""
        prompts = [tuple(setting.cut(draw, length)) for draw in draws]
        written = setting.generate(prompts, min(WRITTEN, setting.longest - length))
        asks = [Ask(prompt=(), candidates=(own,), right=0, labels={"length": length}) for own in written]
        return [Passage(tokens=prompt, asks=(own,)) for prompt, own in zip(prompts, asks)]

    def passage(self, setting: Setting, draw: Random, length: int) -> Passage:
        return self.passages(setting, [draw], length)[0]
