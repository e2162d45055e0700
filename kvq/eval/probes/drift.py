"""Drift: how long a greedy generation stays what the unquantized model writes.

The unquantized model writes on from a few prompts. The recipe then reads what it wrote: up to the first token that it
would not have written itself, this is its own greedy generation, token for token. Beyond it, agreement is the share of
tokens that it would have chosen at that place of the baseline's text.
"""

from kvq.eval.probes.base import Ask, Passage, Probe, Setting

PROMPT, WRITTEN, COUNT = 256, 256, 8


def build(setting: Setting) -> list[Passage]:
    passages = []
    for length in setting.lengths or (min(PROMPT, setting.longest // 2),):
        written = min(WRITTEN, setting.longest - length)
        draws = [setting.draws("drift", length, number) for number in range(setting.count or COUNT)]
        prompts = [tuple(setting.cut(draw, length)) for draw in draws]
        for prompt, own in zip(prompts, setting.generate(prompts, written)):
            ask = Ask(prompt=(), candidates=(own,), right=0, labels={"length": length})
            passages.append(Passage(tokens=prompt, asks=(ask,)))
    return passages


PROBE = Probe(
    name="drift",
    version="1",
    summary="tokens until a greedy generation leaves the unquantized model's",
    metrics=("tokens", "agreement"),
    cells=("length",),
    chance=0.0,
    build=build,
)
