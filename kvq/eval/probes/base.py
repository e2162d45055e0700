"""What kvq's own tasks have in common: generated texts, questions about them, and what counts as an answer.

A probe writes a passage and asks about it. Every answer is a continuation whose log-probability and greedy tokens are
read off in one forward (``kvq.eval.continuations``): what is measured is what decoding would have done, in the
named mode, and all questions about a passage share its forward. Passages depend on tokenizer, text, seed and lengths
alone: baseline and recipes get the same ones.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvq.errors import DataError
from kvq.eval.continuations import Question, TokenScores

Tokens = tuple[int, ...]
# Where passages end: short questions after such a length cross no boundary of a usual flush unit, so that all questions
# about a passage can share its forward.
UNIT, LANDING = 128, 8


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One question: what follows the passage, candidate answers, which of them is right, and labels for grouping."""

    prompt: Tokens
    candidates: tuple[Tokens, ...]
    right: int
    labels: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A text and what is asked about it."""

    tokens: Tokens
    asks: tuple[Ask, ...]

    @property
    def question(self) -> Question:
        own = tuple((*ask.prompt, *candidate) for ask in self.asks for candidate in ask.candidates)
        return Question(context=self.tokens, continuations=own)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one question.

    choice   the right candidate is the most likely one (None: there is only one).
    exact    greedy decoding writes exactly the right answer.
    copied   share of the answer's tokens before the first that greedy decoding gets wrong; tokens: the same, counted.
    agreement  share of the answer's tokens that are the most likely ones, given those before them.
    nll      nats a token of the right answer.
    packed, scored   tokens of the answer that read quantized tokens, and all of them.
    """

    labels: Mapping[str, Any]
    choice: bool | None
    exact: bool
    copied: float
    tokens: int
    agreement: float
    nll: float
    packed: int
    scored: int


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a probe may use.

    encode      text to token ids, without special tokens.
    filler      token ids of the text that passages are made of.
    lengths     tokens of a passage; None: the probe's own choice. count: passages a length (None: likewise).
    longest     tokens that the model takes.
    generate    (prompts, tokens) to greedy continuations of the unquantized model.
    """

    encode: Callable[[str], list[int]]
    filler: Sequence[int]
    lengths: tuple[int, ...] | None
    count: int | None
    seed: int
    longest: int
    generate: Callable[[list[Tokens], int], list[Tokens]]

    def draws(self, *names: Any) -> random.Random:
        return random.Random("/".join(map(str, (self.seed, *names))))

    def fit(self, length: int, question: int) -> int:
        """Tokens of a passage of about ``length`` tokens that leaves room for ``question`` more."""
        whole = length // UNIT * UNIT + LANDING
        while whole + question > self.longest:
            whole -= UNIT
        fits = min(length, self.longest - question)
        return whole if whole >= 2 * UNIT else fits

    def cut(self, draw: random.Random, tokens: int) -> list[int]:
        """A piece of the filler text; it starts over where it ends."""
        if len(self.filler) < 2:
            raise DataError("the text for passages has fewer than two tokens: give more with --data.")
        start = draw.randrange(len(self.filler))
        return [self.filler[(start + i) % len(self.filler)] for i in range(tokens)]

    def spread(
        self, draw: random.Random, pieces: Sequence[Sequence[int]], tokens: int, depths: Sequence[float]
    ) -> Tokens:
        """A passage of ``tokens`` tokens: filler with the pieces inserted at these depths (0 first, 1 last)."""
        room = tokens - sum(map(len, pieces))
        if room < len(pieces):
            raise DataError(f"a passage of {tokens} tokens has no room for what is hidden in it: use longer --lengths.")
        filler, passage, last = self.cut(draw, room), [], 0
        for depth, piece in sorted(zip(depths, pieces), key=lambda own: own[0]):
            place = round(depth * room)
            passage += [*filler[last:place], *piece]
            last = place
        return tuple(passage + filler[last:])


class Probe(ABC):
    """One of kvq's own tasks.

    metrics   names of Outcome fields to report, the main one first. cells: labels to group by.
    chance    what guessing gives the main metric.
    count     passages a length, if the setting names no number.
    """

    name: str
    version: str
    summary: str
    metrics: tuple[str, ...]
    cells: tuple[str, ...] = ("length",)
    chance: float = 0.0
    count: int = 4

    def lengths(self, longest: int) -> tuple[int, ...]:
        """Tokens of passages, if the setting names none, for a model that takes ``longest``."""
        return (min(1024, longest),)

    def build(self, setting: Setting) -> list[Passage]:
        passages = []
        for length in setting.lengths or self.lengths(setting.longest):
            draws = [setting.draws(self.name, length, number) for number in range(setting.count or self.count)]
            passages += self.passages(setting, draws, length)
        return passages

    def passages(self, setting: Setting, draws: Sequence[random.Random], length: int) -> list[Passage]:
        """Passages of one length, each from chances of its own."""
        return [self.passage(setting, draw, length) for draw in draws]

    @abstractmethod
    def passage(self, setting: Setting, draw: random.Random, length: int) -> Passage:
        """Write one passage of about ``length`` tokens, and ask about it."""


def outcomes(passage: Passage, scores: Sequence[TokenScores]) -> list[Outcome]:
    """Outcomes of a passage's questions from the scores of ``passage.question``."""
    found, at = [], 0
    for ask in passage.asks:
        own = scores[at : at + len(ask.candidates)]
        at += len(ask.candidates)
        totals = [float(s.logprobs[-len(c) :].sum()) for s, c in zip(own, ask.candidates)]
        right, length = own[ask.right], len(ask.candidates[ask.right])
        greedy = right.greedy[-length:]
        written = int(greedy.int().cumprod(0).sum())
        found.append(
            Outcome(
                labels=ask.labels,
                choice=None if len(own) == 1 else max(range(len(own)), key=totals.__getitem__) == ask.right,
                exact=written == length,
                copied=written / length,
                tokens=written,
                agreement=float(greedy.double().mean()),
                nll=-totals[ask.right] / length,
                packed=min(right.packed, length),
                scored=length,
            )
        )
    return found
