"""Needle in a haystack: pass keys at several depths of a long text, each asked for at its end.

One text holds a needle at every depth, so that one forward measures all of them; the others' keys are the wrong
candidates. After "passkey retrieval" (Mohtashami and Jaggi 2023, arXiv 2305.16300) and its many descendants.
"""

from random import Random

from kvq.eval.probes.base import Ask, Passage, Probe, Setting
from kvq.eval.probes.vocabulary import CITIES, distinct_numbers

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SMALLEST, LARGEST = 1024, 8192
INTRODUCTION = "A long text follows. Pass keys are hidden in it; remember them.\n\n"


class Needle(Probe):
    """Pass keys of cities at five depths."""

    name = "needle"
    version = "1"
    summary = "find pass keys at depths of a long text"
    metrics = ("choice", "exact", "nll")
    cells = ("length", "depth")
    chance = 1 / len(DEPTHS)
    count = 2

    def lengths(self, longest: int) -> tuple[int, ...]:
        """Doubling lengths up to what the model takes, four at most."""
        found = [min(longest, LARGEST)]
        while len(found) < 4 and found[0] // 2 >= SMALLEST:
            found.insert(0, found[0] // 2)
        return tuple(found)

    def passage(self, setting: Setting, draw: Random, length: int) -> Passage:
        encode = setting.encode
        cities, keys = draw.sample(CITIES, len(DEPTHS)), distinct_numbers(draw, len(DEPTHS))
        needles = [
            encode(f"\n\nThe pass key of {city} is {key}. Remember it: {key} is the pass key of {city}.\n\n")
            for city, key in zip(cities, keys)
        ]
        candidates = tuple(tuple(encode(f" {key}")) for key in keys)
        prompts = [tuple(encode(f"\n\nWhat is the pass key of {city}? The pass key of {city} is")) for city in cities]
        begin = encode(INTRODUCTION)
        question = max(map(len, prompts)) + max(map(len, candidates))
        passage = setting.spread(draw, needles, setting.fit(length, question) - len(begin), DEPTHS)
        asks = tuple(
            Ask(prompt=prompt, candidates=candidates, right=i, labels={"length": length, "depth": depth})
            for i, (prompt, depth) in enumerate(zip(prompts, DEPTHS))
        )
        return Passage(tokens=(*begin, *passage), asks=asks)
