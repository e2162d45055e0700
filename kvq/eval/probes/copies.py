"""Exact copies of something unique in a text: what agents do with calls and identifiers, and what breaks first.

The text holds a few records. The question repeats the beginning of one; the answer is the rest of it, token by token.
"""

import json
from abc import abstractmethod
from collections.abc import Callable
from random import Random

from kvq.eval.probes.base import Ask, Passage, Probe, Setting
from kvq.eval.probes.vocabulary import CITIES, NOUNS, distinct_names, name, number

RECORDS = 4
# What stands between a record and the text around it.
BREAK = "\n\n"


class Copy(Probe):
    """Copies of one kind of record."""

    version = "1"
    metrics = ("copied", "exact", "nll")

    @abstractmethod
    def record(self, draw: Random, called: str) -> tuple[str, str]:
        """The part of a record that is repeated, and the whole of it; ``called`` is its name."""

    def passage(self, setting: Setting, draw: Random, length: int) -> Passage:
        encode = setting.encode
        gap = encode(BREAK)
        parts = [split(*self.record(draw, called), encode) for called in distinct_names(draw, RECORDS)]
        question = len(gap) + max(len(begin) + len(rest) for begin, rest in parts)
        pieces = [(*gap, *begin, *rest, *gap) for begin, rest in parts]
        depths = [i / RECORDS for i in range(RECORDS)]
        passage = setting.spread(draw, pieces, setting.fit(length, question), depths)
        asks = tuple(
            Ask(prompt=(*gap, *begin), candidates=(rest,), right=0, labels={"length": length, "depth": depth})
            for (begin, rest), depth in zip(parts, depths)
        )
        return Passage(tokens=passage, asks=asks)


class CopyJson(Copy):
    """A tool call: JSON whose values must come out exactly."""

    name = "copy_json"
    summary = "repeat a tool call out of a text exactly"

    def record(self, draw: Random, called: str) -> tuple[str, str]:
        arguments = {
            "id": f"{draw.randrange(16**6):06x}",
            "city": draw.choice(CITIES),
            "path": f"/{draw.choice(NOUNS)}/{name(draw)}.txt",
            "count": int(number(draw)),
        }
        whole = json.dumps({"name": called, "arguments": arguments})
        return whole[: whole.index('"arguments"')], whole


class CopyCode(Copy):
    """A function: names that occur nowhere else, and digits."""

    name = "copy_code"
    summary = "repeat a function out of a text exactly"

    def record(self, draw: Random, called: str) -> tuple[str, str]:
        argument, local = name(draw), f"{draw.choice(NOUNS)}{draw.randrange(10, 100)}"
        whole = (
            f"def {called}({argument}, {local}=None):\n"
            f"    {local} = {local} or {name(draw)}({argument}, {draw.randrange(100, 1000)})\n"
            f"    return {argument}.{name(draw)}({local})"
        )
        return f"def {called}(", whole


def split(begin: str, whole: str, encode: Callable) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The whole's tokens, cut where they leave the beginning's: token boundaries are those of the text."""
    tokens, first = encode(whole), encode(begin)
    shared = next((i for i, (a, b) in enumerate(zip(tokens, first)) if a != b), len(first))
    return tuple(tokens[:shared]), tuple(tokens[shared:])
