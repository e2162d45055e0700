"""Copy a function: identifiers and numbers that must come out exactly."""

from kvq.eval.probes.base import Passage, Probe, Setting
from kvq.eval.probes.copying import build_copies
from kvq.eval.probes.vocabulary import NOUNS, name


def _record(draw, function: str) -> tuple[str, str]:
    argument, local = name(draw), f"{draw.choice(NOUNS)}{draw.randrange(10, 100)}"
    whole = (
        f"def {function}({argument}, {local}=None):\n"
        f"    {local} = {local} or {name(draw)}({argument}, {draw.randrange(100, 1000)})\n"
        f"    return {argument}.{name(draw)}({local})"
    )
    return f"def {function}(", whole


def build(setting: Setting) -> list[Passage]:
    return build_copies(setting, "copy_code", _record)


PROBE = Probe(
    name="copy_code",
    version="1",
    summary="repeat a function out of a text exactly",
    metrics=("copied", "exact", "nll"),
    cells=("length",),
    chance=0.0,
    build=build,
)
