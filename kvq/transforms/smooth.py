"""Scales by channel that move magnitude from what is stored to what reads it.

    absmax      s = max|x|^alpha / max|y|^beta          SmoothQuant (2211.10438), QServe's SmoothAttention (2405.04532)
    mean        s = mean|x|^alpha                       AWQ (2306.00978)
    threshold   s = max(1, max|x| / t)                  Outlier Suppression+ (2304.09145), with t searched

x are the keys and y their queries, or x the values and y the columns of the output projection that read them. Keys
take the larger number of a rotary pair, so that the scale commutes with RoPE. A common factor of all channels, which no
quantizer sees, is divided out. Searches take what gives the least error of the attention output, as QServe does.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kvq.errors import DataError, RecipeError
from kvq.settings import check_choice, is_number
from kvq.transforms.fit_data import FitData
from kvq.transforms.objective import attention_errors
from kvq.transforms.spec import SCALE, TransformSpec, register_transform
from kvq.transforms.steps import Diagonal

GRID = tuple(i / 20 for i in range(1, 20))
# Shares of the largest magnitude that a threshold may take.
THRESHOLDS = tuple(i / 20 for i in range(2, 20))
RULES = ("absmax", "mean", "threshold")
SEARCH = "search"


@register_transform("smooth")
@dataclass(frozen=True, kw_only=True)
class SmoothSpec(TransformSpec):
    """A scale by channel (keys: by rotary pair).

    alpha, beta   exponents of 0 to 1 (0.5 and 0 if not given), or ``search``: what gives the least error of the
                  attention output.
    rule          ``absmax``, ``mean`` or ``threshold``.
    """

    alpha: float | str | None = None
    beta: float | str | None = None
    rule: str | None = None

    tensors = SCALE
    commutes_with_rope = works_on_channels = reads_magnitudes = keeps_magnitudes = True
    why_not_framed = "scales rotary pairs, which is the same everywhere"
    # Magnitudes of pairs do not turn.
    is_fitted_to_positions = False

    def check(self) -> None:
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if value not in (None, SEARCH) and (not is_number(value) or not 0 <= value <= 1):
                raise RecipeError(f"{name}={value!r} is not an exponent: use a number of 0 to 1, or 'search'.")
        check_choice("rule", self.rule, RULES)
        if self.rule == "threshold" and not self.alpha == self.beta is None:
            raise RecipeError("rule 'threshold' has no exponents: remove alpha and beta.")
        if self.rule == "mean" and self.beta is not None:
            raise RecipeError("rule 'mean' has no beta: remove it.")

    @property
    def searches(self) -> bool:
        """True if candidates are tried on measured attention."""
        return self.rule == "threshold" or SEARCH in (self.alpha, self.beta)

    def needs(self, side):
        yield f"{side}.range"
        if side == "key" and self.beta:
            yield "query.range"
        if self.searches or self.rule == "mean":
            yield "reservoir"

    def reads_output(self, side) -> bool:
        return self.searches or (side == "value" and bool(self.beta))

    def fit(self, data: FitData) -> dict[str, torch.Tensor]:
        candidates = list(_candidates(self, data))
        if len(candidates) > 1:
            errors = attention_errors(data, map(Diagonal, candidates))
            candidates = [candidates[errors.index(min(errors))]]
        return {"scale": candidates[0].float()}

    def build(self, head_dim, tensors) -> Diagonal:
        return Diagonal(tensors["scale"])


def _candidates(spec: SmoothSpec, data: FitData) -> Iterator[torch.Tensor]:
    if spec.searches:
        # First, so that it wins where nothing is better.
        yield torch.ones_like(_stored(data, "absmax"))
    if spec.rule == "threshold":
        stored = _stored(data, "absmax")
        top = stored.amax(-1, keepdim=True)
        yield from (_usable((stored / (top * share)).clamp_min(1)) for share in THRESHOLDS)
        return
    rule = "mean" if spec.rule == "mean" else "absmax"
    stored = _stored(data, "absmean" if rule == "mean" else "absmax")
    reader = torch.ones_like(stored) if rule == "mean" else None
    for alpha, beta in _exponents(spec):
        if beta and reader is None:
            reader = _reader(data)
        yield _usable(stored**alpha / (reader**beta if beta else 1))


def _exponents(spec: SmoothSpec) -> list[tuple[float, float]]:
    """(alpha, beta) to try. Both searched: beta is 0, 1 - alpha (QServe) or alpha."""
    alpha = 0.5 if spec.alpha is None else spec.alpha
    beta = 0.0 if spec.beta is None else spec.beta
    if alpha == beta == SEARCH:
        return [(a, b) for a in GRID for b in dict.fromkeys((0.0, 1 - a, a))]
    if alpha == SEARCH:
        return [(a, beta) for a in GRID]
    return [(alpha, b) for b in GRID] if beta == SEARCH else [(alpha, beta)]


def _stored(data: FitData, name: str) -> torch.Tensor:
    """Magnitudes of what is stored, [K, D]; of its distance from the mean if a later step takes that away."""
    if not data.centred:
        return _joined(getattr(data, name)(data.side), data)
    distance = (data.tokens(data.side) - data.mean(data.side).unsqueeze(-2)).abs()
    return _joined(distance.amax(-2) if name == "absmax" else distance.mean(-2), data)


def _reader(data: FitData) -> torch.Tensor:
    """Magnitudes of what reads it, [K, D]."""
    if data.side == "key":
        return _joined(data.absmax("query"), data)
    if data.output is None:
        raise DataError("a value scale with beta above 0 needs the weights of the model: fit it beside its checkpoint.")
    return data.output.abs().amax(1).unflatten(0, (data.heads, -1)).amax(1).double()


def _joined(x: torch.Tensor, data: FitData) -> torch.Tensor:
    """The larger number of those that must have one scale."""
    if data.side == "key":
        x = torch.maximum(x, x.index_select(-1, data.partner))
    return x.amax(0, keepdim=True).expand_as(x) if data.shared else x


def _usable(scale: torch.Tensor) -> torch.Tensor:
    """1 for channels that were never used, and a geometric mean of 1 by head."""
    scale = torch.where(scale.isfinite() & (scale > 0), scale, 1.0)
    return scale / scale.log().mean(-1, keepdim=True).exp()
