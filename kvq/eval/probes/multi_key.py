"""Many keys, one wanted: a text that is nothing but keys and their numbers.

After the multi-key needles of RULER (Hsieh et al. 2024, arXiv 2404.06654): everything around the answer looks like it.
"""

from random import Random

from kvq.eval.probes.base import Ask, Passage, Probe, Setting
from kvq.eval.probes.vocabulary import distinct_names, distinct_numbers

ASKED = 8


class MultiKey(Probe):
    """Lines of keys and numbers; some of the keys are asked for."""

    name = "multi_key"
    version = "1"
    summary = "find one key among many that look like it"
    metrics = ("choice", "exact", "nll")
    chance = 1 / ASKED

    def passage(self, setting: Setting, draw: Random, length: int) -> Passage:
        encode = setting.encode
        # A line takes five tokens at least.
        keys = distinct_names(draw, min(length // 5, 1500))
        values = distinct_numbers(draw, len(keys))
        lines = [encode(f"{key}: {value}\n") for key, value in zip(keys, values)]
        room = setting.fit(length, 2 * max(map(len, lines)) + 2)
        count, tokens = 0, []
        while count < len(lines) and len(tokens) + len(lines[count]) <= room:
            tokens += lines[count]
            count += 1
        asked = sorted({round(i * (count - 1) / (ASKED - 1)) for i in range(ASKED)})
        candidates = tuple(tuple(encode(f" {values[i]}")) for i in asked)
        # The text ends where its room does: filler in front makes up for what is left.
        passage = (*setting.cut(draw, room - len(tokens)), *tokens)
        asks = tuple(
            Ask(
                prompt=tuple(encode(f"\n{keys[line]}:")),
                candidates=candidates,
                right=i,
                labels={"length": length, "depth": round(line / max(1, count - 1), 2)},
            )
            for i, line in enumerate(asked)
        )
        return Passage(tokens=passage, asks=asks)
