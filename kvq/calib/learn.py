"""Learn the learned steps of a recipe, layer by layer, and keep them with the statistics.

A layer's side is learned once for everything that decides it: its chain up to the learned step, its codec and its
token policy. The hash of these is the name of a *fit* in the statistics file; its tensors are named
``{layer}.{side}.{place}.{what}``, and its facts hold losses and trials of every layer. Recipes that differ elsewhere
share their fits.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from kvq.calib.fit_source import FitSource
from kvq.calib.run_state import save_learned, saved_learned
from kvq.calib.stats import Fit, Stats
from kvq.errors import RecipeError
from kvq.heads import HeadSpec
from kvq.models.describe import LayerSpec, ModelSpec
from kvq.pages.layout import SIDES
from kvq.recipe import Recipe
from kvq.transforms.fit import fit_steps
from kvq.transforms.fit_data import FitData
from kvq.transforms.learned import learn

Progress = Callable[[int, int], None]


def fit_name(spec: HeadSpec, side: str, place: int, end_to_end: str | None = None) -> str:
    """Name of the fit of a chain's step: a hash of all that decides it beside the model and the statistics.

    end_to_end   hash of the recipe whose layers were learned together; None: each layer by its attention output.
    """
    steps = [step.to_dict() for step in getattr(spec.transforms, side)]
    facts = {
        "side": side,
        "steps": steps[: place + 1],
        # Later steps without numbers are part of what is tried.
        "after": [step.to_dict() for step in getattr(spec.transforms, side)[place + 1 :] if not step.tensors],
        "codec": getattr(spec, side).to_dict(),
        "tokens": spec.tokens.to_dict(),
        "end_to_end": end_to_end,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def learned_steps(recipe: Recipe, model: ModelSpec) -> Iterator[tuple[LayerSpec, str, HeadSpec, int]]:
    """(layer, side, what its heads get, place) of every learned step of a recipe."""
    for layer in model.full_layers:
        spec = recipe.for_head(layer.index, 0, len(model.layers))
        for side in SIDES:
            for place, step in enumerate(getattr(spec.transforms, side) if not spec.is_exact else ()):
                if step.is_learned:
                    yield layer, side, spec, place


def find_learned(
    stats: Stats, recipe: Recipe, spec: HeadSpec, layer: int, side: str, place: int, seen: FitData
) -> dict[str, torch.Tensor]:
    """Tensors of a learned step from the statistics, end-to-end ones first. Raises RecipeError if there are none."""
    kind = getattr(spec.transforms, side)[place].kind
    prefix = f"{layer}.{side}.{place}."
    for together in (recipe.hash, None):
        fit = stats.fits.get(fit_name(spec, side, place, together))
        found = {n.removeprefix(prefix): t for n, t in (fit.tensors if fit else {}).items() if n.startswith(prefix)}
        if found:
            return found
    raise RecipeError(
        f"transform {kind!r} of recipe {recipe.name!r} was not learned on these statistics: run 'kvq calibrate MODEL "
        f"--for {recipe.name} -o STATS'."
    )


def learn_fits(
    recipe: Recipe,
    model: ModelSpec,
    stats: Stats,
    folder: Path,
    *,
    state_folder: Path,
    progress: Progress | None = None,
) -> Stats:
    """The statistics with fits for every learned step of a recipe.

    state_folder   where finished layers are kept: an interrupted call continues there and gives the same fits.
    progress       called with (learned steps done, steps in all), first with what was done before.
    """
    jobs = list(learned_steps(recipe, model))
    if not jobs:
        return stats
    done: dict[tuple[int, str, int], Fit] = {}
    source = FitSource(model, stats, folder)
    if progress:
        progress(0, len(jobs))
    for layer, side, spec in dict.fromkeys((layer, side, spec) for layer, side, spec, _ in jobs):
        codec = getattr(spec, side).stand_in(spec.stored_dim(side, layer.head_dim), layer.kv_heads)
        data = source.fit_data(layer, side, spec, codec)
        step = partial(_learn_one, spec, layer.index, side, state_folder, _run(stats), done)
        fit_steps(getattr(spec.transforms, side), data, step, **spec.framing(side))
        if progress:
            progress(len(done), len(jobs))
    return _joined(stats, jobs, done)


def _learn_one(
    spec: HeadSpec, layer: int, side: str, folder: Path, run: str, done, place: int, seen: FitData
) -> dict[str, torch.Tensor]:
    """Learn one step, or read it from an interrupted run."""
    path = folder / f"fit-{fit_name(spec, side, place)}-{layer}.safetensors"
    held = saved_learned(path, run)
    if held is not None:
        fit = Fit(tensors=held[0], facts=held[1])
    else:
        learned = learn(getattr(spec.transforms, side)[place], seen)
        facts = {
            "losses": [round(loss, 8) for loss in learned.losses],
            "trials": [[count, round(error, 8)] for count, error in learned.trials],
        }
        fit = Fit(tensors={n: t.detach().contiguous() for n, t in learned.numbers.items()}, facts=facts)
        save_learned(path, run, fit.tensors, facts)
    done[layer, side, place] = fit
    return dict(fit.tensors)


def _run(stats: Stats) -> str:
    """Hash of the statistics that steps are learned on."""
    tensors, metadata = replace(stats, fits={}).to_parts()
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _joined(stats: Stats, jobs, done) -> Stats:
    """Put the steps of all layers into one fit for each name."""
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    facts: dict[str, dict] = {}
    for layer, side, spec, place in jobs:
        name, fit = fit_name(spec, side, place), done[layer.index, side, place]
        tensors.setdefault(name, {}).update({f"{layer.index}.{side}.{place}.{n}": t for n, t in fit.tensors.items()})
        step = getattr(spec.transforms, side)[place].to_dict()
        entry = facts.setdefault(name, {"step": step, "side": side, "objective": "block", "layers": {}})
        entry["layers"][str(layer.index)] = dict(fit.facts)
    for name, own in tensors.items():
        stats = stats.with_fit(name, Fit(tensors=own, facts=facts[name]))
    return stats
