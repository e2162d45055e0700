"""What calibrated codebooks are learned from: histograms of normalised numbers, weighted by squared gradients.

KVQuant (arXiv 2401.18079, section 3.2) places the levels of a codebook by k-means over normalised keys or values, each
number weighted by the square of the loss's gradient at it (a diagonal of the Fisher information). One even histogram
per layer and side holds all that such a k-means needs, so memory is bounded however long the text is, and one pass
serves codebooks of any width.

The loss is the sum over tokens of the log-likelihood of the next one; every window has its own gradient. A squared
gradient at a number that was divided by s weighs its normalised error s^2 times (the paper's appendix; the released
code leaves s out). Exact tokens (sinks) and outliers are not counted: no level stands for them.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from kvq.calib.forward import look, plan_layers
from kvq.calib.job import Job, Progress, refuse_missing, run_job, state_of
from kvq.calib.measured import MeasuredLayer
from kvq.calib.observe import Batch
from kvq.calib.observers.bins import BINS, Bins
from kvq.calib.ranks import Ranks
from kvq.calib.run_state import Layers
from kvq.calib.stats import Fit, LayerStats, Stats
from kvq.calib.watch import Watcher, watch
from kvq.codecs import Codec, CodecSpec
from kvq.errors import DataError
from kvq.models.decoder import telling
from kvq.models.describe import ModelSpec, describe
from kvq.models.rope import Rope
from kvq.pages.affine import wide
from kvq.pages.layout import SIDES
from kvq.recipe import Recipe
from kvq.transforms.frame import FRAME_TOKENS

FIT = "codebooks"
# Gradients of one window are held at a time.
BATCH_SIZE = 1


@dataclass(frozen=True, kw_only=True)
class Book:
    """One histogram to learn from: what a codec compares with its levels, on some heads of a layer.

    name   of its numbers among those of the layer and side; equal for codecs that differ in the width alone.
    """

    side: str
    heads: tuple[int, ...]
    spec: CodecSpec
    sinks: int

    @property
    def name(self) -> str:
        text = json.dumps([self.spec.compared_settings(), self.heads, self.sinks], sort_keys=True)
        return f"{self.side}.{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    @property
    def tensor(self) -> str:
        """The statistic's tensor that the codec sees."""
        return self.spec.tensor(self.side)


def books_of(recipes: Sequence[Recipe], model: ModelSpec) -> dict[int, tuple[Book, ...]]:
    """The histograms that recipes need, by layer; empty for recipes without calibrated levels."""
    found: dict[int, dict[str, Book]] = {}
    for index, book in _books(recipes, model):
        found.setdefault(index, {}).setdefault(book.name, book)
    return {index: tuple(books.values()) for index, books in found.items()}


def weighted(recipes: Sequence[Recipe], model: ModelSpec) -> bool:
    """True if some codebook is weighted by gradients."""
    return any(book.spec.weighs_by_gradients for _, book in _books(recipes, model))


def _books(recipes: Sequence[Recipe], model: ModelSpec) -> Iterator[tuple[int, Book]]:
    """(layer, book) of every codec with calibrated levels; several may have one name."""
    for recipe in recipes:
        for layer in model.full_layers:
            for spec, heads in recipe.head_groups(layer.index, layer.kv_heads, len(model.layers)):
                for side in SIDES:
                    codec = getattr(spec, side)
                    if codec.learns_levels:
                        yield layer.index, Book(side=side, heads=heads, spec=codec, sinks=spec.tokens.sinks)


def learned(stats: Stats, layer: int, book: Book) -> Bins:
    """The histogram of a book. Raises DataError if the statistics do not hold it."""
    fit = stats.fits.get(FIT)
    names = {what: f"layers.{layer}.{book.name}.{what}" for what in ("counts", "weights")}
    if fit is None or names["counts"] not in fit.tensors:
        raise DataError(
            f"the statistics of {stats.model!r} hold no codebook for the {book.side}s of layer {layer}: run 'kvq "
            "calibrate' with --for and this recipe."
        )
    bins = Bins(**{what: fit.tensors[name] for what, name in names.items()})
    if len(bins.counts) != BINS:
        raise DataError(
            f"the codebooks of {stats.model!r} were learned by another version of kvq, from {len(bins.counts)} bins "
            f"instead of {BINS}: run 'kvq calibrate' again."
        )
    if book.spec.weighs_by_gradients and not fit.facts.get("weighted"):
        raise DataError(
            f"the codebooks of {stats.model!r} were learned without gradients and the recipe wants weights=fisher: "
            "run 'kvq calibrate' with --for and this recipe."
        )
    return bins


def learn_codebooks(
    model: PreTrainedModel,
    recipes: Sequence[Recipe],
    stats: Stats | None,
    tokens: torch.Tensor,
    *,
    valid: torch.Tensor | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    state_folder: str | Path | None = None,
    ranks: Ranks | None = None,
) -> Stats | None:
    """Add what codebooks of ``recipes`` are learned from to statistics that hold the ranges they need.

    tokens, valid   windows int64 [N, T] and bool [N, T], as for ``collect``.
    stats           in the first process; None in the others.
    state_folder, ranks, progress   as for ``collect``: an interrupted run continues and ends with the same numbers.

    Raises DataError if gradients are not finite, UnsupportedModelError if the model does not show what is needed.
    """
    ranks = ranks or Ranks()
    spec = describe(model.config)
    books, gradient = books_of(recipes, spec), weighted(recipes, spec)
    codecs = ranks.agree(_codecs(books, stats, spec) if ranks.is_first else None)
    job = Job.of(
        spec, tokens, valid, frozenset(), batch_size=BATCH_SIZE, seed=seed, dtype=model.dtype, reservoir_bytes=0
    )
    needs = frozenset(f"{book.tensor}.range" for own in books.values() for book in own)
    plans = plan_layers(spec, look(model, job.lone, list(books)), needs, {})
    refuse_missing(plans)
    ropes = {index: plan.rope for index, plan in plans.items()}
    made = json.dumps([[index, [book.name for book in own]] for index, own in books.items()])
    state = state_of(state_folder, job, model.config, made, gradient, _digest(codecs))
    measure = functools.partial(_measure, model, books=books, codecs=codecs, ropes=ropes, gradient=gradient)
    layers = run_job(job, ranks, state, measure, progress)
    if layers is None:
        return None
    found = {
        f"layers.{index}.{need.removesuffix('.bins')}.{what}": x
        for index, layer in layers.items()
        for need, bins in layer.items()
        for what, x in bins.tensors().items()
    }
    facts = {
        "weighted": gradient,
        "windows": len(tokens),
        "tokens": int(tokens.numel() if valid is None else valid.sum()),
    }
    return stats.with_fit(FIT, Fit(tensors=found, facts=facts))


def _codecs(books: Mapping[int, Sequence[Book]], stats: Stats, model: ModelSpec) -> dict[int, dict[str, Codec]]:
    """The codec of every book, with evenly spaced levels: what is learned does not depend on them."""
    head_dims = {layer.index: layer.head_dim for layer in model.full_layers}
    found: dict[int, dict[str, Codec]] = {}
    for index, own in books.items():
        found[index] = {}
        for book in own:
            plain = book.spec.before_learning()
            tensors = plain.fit(MeasuredLayer(stats.layers[index], index, book.tensor, book.heads))
            found[index][book.name] = plain.build(head_dims[index], tensors, len(book.heads))
    return found


def _digest(codecs: Mapping[int, Mapping[str, Codec]]) -> str:
    digest = hashlib.sha256()
    for index, own in codecs.items():
        for name, codec in own.items():
            digest.update(f"{index} {name} {codec!r}".encode())
    return digest.hexdigest()


class _Sides(Watcher):
    """A watcher that keeps what layers give to their cache, and lets gradients reach it."""

    def __init__(self, layers):
        self.layers = dict.fromkeys(layers)
        self.seen: dict[int, dict[str, torch.Tensor]] = {}

    def saw_cache(self, index: int, key: torch.Tensor, value: torch.Tensor) -> None:
        if index in self.layers:
            for x in (key, value):
                if x.requires_grad:
                    x.retain_grad()
            self.seen[index] = {"key": key, "value": value}


def _measure(model: PreTrainedModel, batch: Batch, *, books, codecs, ropes, gradient: bool) -> Layers:
    """Histograms of one batch, by layer."""
    sides = _Sides(books)
    with _gradients(model) if gradient else torch.no_grad(), watch(model, sides) as cache:
        inputs = {"input_ids": batch.tokens.to(model.device), "past_key_values": cache, "use_cache": True}
        if batch.valid is not None:
            inputs |= {"attention_mask": batch.valid.long().to(model.device)}
            inputs |= {"position_ids": batch.positions.expand(len(batch.tokens), -1).to(model.device)}
        with telling(model, 1, len(batch.tokens)):
            logits = model(**inputs).logits
        if gradient:
            _loss(logits, batch).backward()
    return {
        index: LayerStats(
            {f"{book.name}.bins": _bins(book, codecs[index][book.name], sides.seen[index], ropes[index], batch, index)
             for book in own}
        )
        for index, own in books.items()
    }  # fmt: skip


def _loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sum of the negative log-likelihood of every real token but the first."""
    targets = batch.tokens[:, 1:].to(logits.device)
    if batch.valid is not None:
        targets = targets.masked_fill(~(batch.valid[:, 1:] & batch.valid[:, :-1]).to(logits.device), -100)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="sum")


@contextlib.contextmanager
def _gradients(model: PreTrainedModel) -> Iterator[None]:
    """Gradients of activations alone: weights need none, and embeddings pretend to be leaves."""
    wanted = [weight for weight in model.parameters() if weight.requires_grad]
    hook = model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].detach().requires_grad_())
    try:
        for weight in wanted:
            weight.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        hook.remove()
        for weight in wanted:
            weight.requires_grad_(True)


def _bins(
    book: Book, codec: Codec, seen: Mapping[str, torch.Tensor], rope: Rope | None, batch: Batch, index: int
) -> Bins:
    x, slope = seen[book.side].detach(), seen[book.side].grad
    heads = list(book.heads)
    x, slope = wide(x[:, heads]), None if slope is None else wide(slope[:, heads])
    if book.tensor != book.side and rope is not None:
        positions = batch.positions.to(x.device)
        positions = positions if book.tensor == "key_pre" else positions - positions % FRAME_TOKENS
        x, slope = rope.inverse(x, positions), None if slope is None else rope.transposed(slope, positions)
    found = []
    for row in range(len(x)):
        real = slice(None) if batch.valid is None else batch.valid[row].to(x.device)
        body = x[row][:, real][:, book.sinks :]
        body = body[:, : body.shape[1] // codec.block_tokens * codec.block_tokens]
        if not body.numel():
            continue
        numbers, scale = codec.compared(body)
        weights = None
        if slope is not None:
            weights = (slope[row][:, real][:, book.sinks :][:, : body.shape[1]] * scale).square()
        found.append(Bins.observe(numbers, weights))
    total = functools.reduce(Bins.merge, found) if found else Bins.observe(x.new_zeros(0), x.new_zeros(0))
    if not bool(total.weights.isfinite().all()):
        raise DataError(
            f"layer {index} gives gradients of {book.side}s that are NaN or Inf in {batch.windows}: load the model in "
            "bfloat16 or float32."
        )
    return Bins(counts=total.counts.cpu(), weights=total.weights.cpu())
