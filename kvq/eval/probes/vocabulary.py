"""Words that generated passages are written with: common ones, which any tokenizer knows."""

import random

CITIES = """
    Lisbon Oslo Cairo Lima Kyoto Prague Dublin Nairobi Havana Quito Riga Sofia Tunis Vienna Zagreb Athens
    Berlin Delhi Geneva Hanoi Jakarta Kabul London Madrid Moscow Naples Paris Rome Seoul Sydney Tokyo Warsaw
""".split()  # noqa: SIM905 (a list of words is read more easily like this)
NOUNS = """
    lantern window garden market bridge pepper candle harbor thunder basket feather marble tunnel castle forest mirror
    pencil river rocket saddle shadow silver spider temple ticket turtle velvet wagon walnut winter anchor barrel
    button camera carpet circle copper cotton engine finger guitar hammer island jacket kettle ladder magnet needle
""".split()  # noqa: SIM905


def number(draw: random.Random) -> str:
    """Five digits."""
    return str(draw.randrange(10_000, 100_000))


def distinct_numbers(draw: random.Random, count: int) -> list[str]:
    return [str(value) for value in draw.sample(range(10_000, 100_000), count)]


def name(draw: random.Random) -> str:
    """An identifier of two words."""
    return "_".join(draw.sample(NOUNS, 2))


def distinct_names(draw: random.Random, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[name(draw)] = None
    return list(found)
