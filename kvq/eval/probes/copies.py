"""Exact copies of something unique in a text: what agents do with calls and identifiers, and what breaks first.

The text holds a few records. The question repeats the beginning of one; the answer is the rest of it, token by token.
"""

from collections.abc import Callable

from kvq.eval.probes.base import Ask, Passage, Setting
from kvq.eval.probes.vocabulary import distinct_names

LENGTH, COUNT, RECORDS = 1024, 4, 4
# What stands between a record and the text around it.
BREAK = "\n\n"


def build_copies(setting: Setting, probe: str, record: Callable) -> list[Passage]:
    """Passages for one kind of record: ``record(draw, name)`` gives the part that is repeated, and the whole."""
    return [
        _passage(setting, probe, record, length, number)
        for length in setting.lengths or (min(LENGTH, setting.longest),)
        for number in range(setting.count or COUNT)
    ]


def _passage(setting: Setting, probe: str, record: Callable, length: int, number: int) -> Passage:
    draw, encode = setting.draws(probe, length, number), setting.encode
    gap = encode(BREAK)
    parts = [_split(*record(draw, name), encode) for name in distinct_names(draw, RECORDS)]
    question = len(gap) + max(len(begin) + len(rest) for begin, rest in parts)
    pieces = [(*gap, *begin, *rest, *gap) for begin, rest in parts]
    depths = [i / RECORDS for i in range(RECORDS)]
    passage = setting.spread(draw, pieces, setting.fit(length, question), depths)
    asks = tuple(
        Ask(prompt=(*gap, *begin), candidates=(rest,), right=0, labels={"length": length, "depth": depth})
        for (begin, rest), depth in zip(parts, depths)
    )
    return Passage(tokens=passage, asks=asks)


def _split(begin: str, whole: str, encode: Callable) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The whole's tokens, cut where they leave the beginning's: token boundaries are those of the text."""
    tokens, first = encode(whole), encode(begin)
    shared = next((i for i, (a, b) in enumerate(zip(tokens, first)) if a != b), len(first))
    return tuple(tokens[:shared]), tuple(tokens[shared:])
