"""The text of a search, cut into parts that share no token: measuring, choosing, and two or more that confirm."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvq.calib.data import load_texts, source_name
from kvq.errors import DataError
from kvq.eval.likelihood import Windows
from kvq.eval.text_tasks import text_ids


@dataclass(frozen=True, kw_only=True)
class Part:
    """Windows int64 [N, T], and the position of the first token of each."""

    windows: torch.Tensor
    starts: tuple[int, ...]

    def positions(self, window: int) -> torch.Tensor | None:
        """Of one window's tokens, int64 [1, T]; None: they count from 0."""
        start = self.starts[window]
        return None if start == 0 else torch.arange(start, start + self.windows.shape[1]).unsqueeze(0)

    def window(self, number: int) -> Windows:
        """One of them to be scored, every token but the first."""
        return Windows(tokens=self.windows[number : number + 1], first=[1], positions=self.positions(number))


@dataclass(frozen=True, kw_only=True)
class Text:
    """The parts, and what they are: equal identities are equal tokens. ``confirming`` by the name of its text."""

    measuring: Part
    choosing: Part
    confirming: Mapping[str, Part]
    identity: dict[str, Any]


def cut_text(tokenizer, data: Sequence[str | Path], verify_data: Sequence[str | Path], settings) -> Text:
    """Cut whole windows out of every text and deal a seeded choice of them to the parts; see ``search.Settings``.

    Every text of ``data`` gives windows to measure on and to choose on. What confirms are at least two texts that chose
    nothing: those of ``verify_data``, and while they are fewer than two, windows of ``data`` that no other part has:
    of each text, or of the two halves of a single one. Of the builtin text, the part that calibration leaves alone.

    Raises DataError if a text has too few windows.
    """
    own, length = settings.verify_windows, settings.seq_len
    held_out = len(verify_data) < 2
    twice = next(
        (source for i, source in enumerate((*data, *verify_data)) if source in (*data, *verify_data)[:i]), None
    )
    if twice is not None:
        raise DataError(f"data {source_name(twice)!r} is named twice: name each text once, for one purpose.")
    halves = held_out and len(data) == 1 and not verify_data
    deals = [_Deal(tokenizer, source, length, settings.seed) for source in data]
    choosing, confirming, measuring = [], {}, []
    for deal in deals:
        deal.require(settings.windows + own * (1 + held_out + halves))
        choosing.append(deal.take("choosing", own))
        if halves:
            middle = deal.count // 2
            confirming[f"first half of {deal.name}"] = deal.take("first half", own, range(middle))
            confirming[f"second half of {deal.name}"] = deal.take("second half", own, range(middle, deal.count))
        elif held_out:
            confirming[deal.name] = deal.take("confirming", own)
        # Measuring comes last, so that more windows of it leave the other parts as they are.
        measuring.append(deal.take("measuring", settings.windows))
    others = [_Deal(tokenizer, source, length, settings.seed) for source in verify_data]
    for deal in others:
        deal.require(own)
        confirming[deal.name] = deal.take("confirming", own)
    return Text(
        measuring=_part(measuring, settings),
        choosing=_part(choosing, settings),
        confirming={name: _part([windows], settings) for name, windows in confirming.items()},
        identity={"search": [deal.identity for deal in deals], "verify": [deal.identity for deal in others]},
    )


def _part(windows: list[torch.Tensor], settings) -> Part:
    """Windows spread evenly over the positions of the context; a single one stands at its end."""
    # Texts take turns, so that each stands at near and at far positions.
    whole = torch.stack(windows, dim=1).flatten(0, 1)
    spare = (settings.context or settings.seq_len) - settings.seq_len
    last = max(len(whole) - 1, 1)
    starts = tuple(spare * (number if len(whole) > 1 else 1) // last for number in range(len(whole)))
    return Part(windows=whole, starts=starts)


class _Deal:
    """The windows of one text in a seeded order; each is given to one part."""

    def __init__(self, tokenizer, source: str | Path, length: int, seed: int):
        texts = load_texts(source, part="evaluation")
        ids, self.identity = text_ids(tokenizer, source, texts)
        self.name, self.length, self.count = source_name(source), length, len(ids) // length
        self.whole = torch.tensor(ids[: self.count * length], dtype=torch.int64).view(self.count, length)
        self.order = torch.randperm(self.count, generator=torch.Generator().manual_seed(seed)).tolist()
        # As calibration names its text, so that the same text is seen.
        self.identity["documents_sha256"] = hashlib.sha256(
            json.dumps(texts).encode("utf-8", "surrogatepass")
        ).hexdigest()
        self.identity["windows"] = {}

    def require(self, count: int) -> None:
        if self.count < count:
            raise DataError(
                f"the search needs {count} windows of {self.length} tokens and {self.name!r} has {self.count}: use "
                "more text, shorter windows (--seq-len) or fewer (--windows, --verify-windows)."
            )

    def take(self, part: str, count: int, among: range | None = None) -> torch.Tensor:
        taken = [number for number in self.order if among is None or number in among][:count]
        if len(taken) < count:
            raise DataError(
                f"the search needs {count} windows of {self.length} tokens in the {part} of {self.name!r}, which has "
                f"{len(taken)} left: use more text, or fewer windows (--verify-windows)."
            )
        self.order = [number for number in self.order if number not in taken]
        self.identity["windows"][part] = taken
        return self.whole[taken]
