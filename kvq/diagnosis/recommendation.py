"""From predictions and causes to a verdict: which recipes would ruin the model, and which one to use."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvq.calib.stats import Stats
from kvq.diagnosis.causes import Cause, causes_of
from kvq.diagnosis.predict import GOOD, Prediction, layers_of, predict
from kvq.diagnosis.sample_tokens import LayerTokens
from kvq.errors import listed
from kvq.recipe import Recipe, load_recipe

# Shipped recipes worth choosing from: what engines serve, and the best at every width.
CANDIDATES = (
    *("fp8", "int8", "int4", "sinks4", "biassafe4", "kivi4", "kivi2"),
    *("klt4", "klt3", "klt2", "turboquant4", "turboquant3"),
)


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """predictions   of every candidate, most bits first; those that could not be tried last.
    causes        of trouble, found in the statistics.
    real_tokens   whether predictions were made on real tokens of a reservoir, or on drawn ones.
    """

    predictions: tuple[Prediction, ...]
    causes: tuple[Cause, ...]
    real_tokens: bool

    @property
    def recommended(self) -> Prediction | None:
        """The good recipe of fewest bits; None if none is good."""
        good = [p for p in self.predictions if p.verdict == "good"]
        return min(good, key=lambda p: p.bits, default=None)

    @property
    def collapses(self) -> tuple[str, ...]:
        return tuple(p.recipe for p in self.predictions if p.verdict == "collapse")

    def sentence(self) -> str:
        """The verdict in a sentence or two."""
        said = f"{listed(self.collapses)} would ruin this model" if self.collapses else "no recipe tried collapses"
        best, untried = self.recommended, sorted(p.recipe for p in self.predictions if p.why_not)
        more = f" Not predicted, and maybe better: {listed(untried)}." if untried else ""
        if best is None:
            return f"{_upper(said)}, and none is predicted to cost less than {GOOD} nats per token: keep fp16.{more}"
        return f"{_upper(said)}. Use {best.recipe}: {best.bits:.2f} bits, about {best.loss:.3f} nats per token.{more}"

    def to_dict(self) -> dict[str, Any]:
        best = self.recommended
        return {
            "verdict": self.sentence(),
            "recommended": best.recipe if best else None,
            "collapses": list(self.collapses),
            "tokens": "real" if self.real_tokens else "drawn",
            "causes": [vars(cause) | {"layers": list(cause.layers)} for cause in self.causes],
            "predictions": [
                {
                    "recipe": p.recipe,
                    "verdict": p.verdict,
                    "bits_per_element": p.bits,
                    "loss": p.loss,
                    "errors": dict(p.errors),
                    "why_not": p.why_not,
                }
                for p in self.predictions
            ],
        }


def diagnose(
    stats: Stats,
    recipes: Sequence[Recipe] | None = None,
    *,
    folder: Path | None = None,
    layers: dict[int, LayerTokens] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Diagnosis:
    """Predict what each recipe (by default CANDIDATES) would do to a model, and what would be to blame.

    folder   the model's checkpoint, for transforms that read weights.
    layers   ``layers_of(stats)``, if it is at hand.

    Raises DataError if the statistics hold too little to predict anything.
    """
    recipes = recipes if recipes is not None else [load_recipe(name) for name in CANDIDATES]
    layers = layers or layers_of(stats)
    found = []
    for number, recipe in enumerate(recipes):
        if progress:
            progress(number, len(recipes))
        found.append(predict(recipe, stats, layers, folder))
    found.sort(key=lambda p: (bool(p.why_not), -p.bits if p.bits == p.bits else 0, p.recipe))
    real = all(tokens.is_real for tokens in layers.values())
    return Diagnosis(predictions=tuple(found), causes=tuple(causes_of(stats)), real_tokens=real)


def _upper(text: str) -> str:
    return text if text.startswith(CANDIDATES) else text[:1].upper() + text[1:]
