"""Variable tracking: numbers given to names, and names given to other names, scattered over a text.

After RULER (Hsieh et al. 2024, arXiv 2404.06654). One hop asks for a name that was given a number, two hops for a name
that was given such a name; every number of the text is a candidate.
"""

from random import Random

from kvq.eval.probes.base import Ask, Passage, Probe, Setting
from kvq.eval.probes.vocabulary import distinct_names, distinct_numbers

CHAINS, HOPS = 4, 2


class VariableTracking(Probe):
    """Chains of names, each given the number at its beginning."""

    name = "variable_tracking"
    version = "1"
    summary = "follow a name to its number, directly and through another name"
    metrics = ("choice", "nll")
    cells = ("length", "hops")
    chance = 1 / CHAINS

    def passage(self, setting: Setting, draw: Random, length: int) -> Passage:
        encode = setting.encode
        names, values = distinct_names(draw, CHAINS * HOPS), distinct_numbers(draw, CHAINS)
        chains = [names[i * HOPS : (i + 1) * HOPS] for i in range(CHAINS)]
        pieces, depths = [], []
        for i, (chain, value) in enumerate(zip(chains, values)):
            for hop, (own, given) in enumerate(zip(chain, (value, *chain))):
                pieces.append(encode(f"\n\n{own} = {given}\n\n"))
                # Names are given in order; the chains run side by side.
                depths.append((hop + (i + draw.random()) / CHAINS) / HOPS)
        prompts = {own: tuple(encode(f"\n\n{own} =")) for own in names}
        candidates = tuple(tuple(encode(f" {value}")) for value in values)
        question = max(map(len, prompts.values())) + max(map(len, candidates))
        passage = setting.spread(draw, pieces, setting.fit(length, question), depths)
        asks = tuple(
            Ask(prompt=prompts[own], candidates=candidates, right=i, labels={"length": length, "hops": hop})
            for i, chain in enumerate(chains)
            for hop, own in enumerate(chain, start=1)
        )
        return Passage(tokens=passage, asks=asks)
