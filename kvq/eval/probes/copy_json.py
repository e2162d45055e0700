"""Copy a tool call: JSON whose values must come out exactly."""

import json

from kvq.eval.probes.base import Passage, Probe, Setting
from kvq.eval.probes.copying import build_copies
from kvq.eval.probes.vocabulary import CITIES, NOUNS, name, number


def _record(draw, tool: str) -> tuple[str, str]:
    arguments = {
        "id": f"{draw.randrange(16**6):06x}",
        "city": draw.choice(CITIES),
        "path": f"/{draw.choice(NOUNS)}/{name(draw)}.txt",
        "count": int(number(draw)),
    }
    whole = json.dumps({"name": tool, "arguments": arguments})
    return whole[: whole.index('"arguments"')], whole


def build(setting: Setting) -> list[Passage]:
    return build_copies(setting, "copy_json", _record)


PROBE = Probe(
    name="copy_json",
    version="1",
    summary="repeat a tool call out of a text exactly",
    metrics=("copied", "exact", "nll"),
    cells=("length",),
    chance=0.0,
    build=build,
)
