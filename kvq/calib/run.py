"""A whole calibration: text to tokens, statistics, and what the recipes learn on them."""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvq.cache.plan import check_transforms
from kvq.calib.codebooks import books_of, learn_codebooks
from kvq.calib.collect import ALONE, collect
from kvq.calib.data import Document, load_documents
from kvq.calib.end_to_end import learn_end_to_end
from kvq.calib.learn import learn_fits, learned_steps
from kvq.calib.loading import Options, by_layer, load_for
from kvq.calib.needs import ALL_NEEDS, DEFAULT_NEEDS, needs_of
from kvq.calib.observers import Massive, Sinks
from kvq.calib.ranks import Ranks
from kvq.calib.stats import Stats
from kvq.calib.windows import Windows, token_windows
from kvq.errors import DataError, RecipeError
from kvq.models.describe import ModelSpec, describe
from kvq.models.resolve import load_config, load_model, load_tokenizer, resolve_model, weights_fingerprint
from kvq.recipe import Recipe, load_recipe

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class CalibrationText:
    """What a model is calibrated on.

    data           ``builtin``, a file, a hub id (``kvq.calib.data``), or the documents themselves.
    field, split   column and split of a data set.
    """

    data: str | Path | Sequence[Document] = "builtin"
    field: str | None = None
    split: str = "train"
    samples: int = 64
    seq_len: int = 512
    seed: int = 0
    packed: bool = True
    chat_template: bool = False

    def windows(self, tokenizer: PreTrainedTokenizerBase) -> Windows:
        if isinstance(self.data, str | Path):
            source, documents = self.data, load_documents(self.data, field=self.field, split=self.split)
        else:
            source, documents = "text", list(self.data)
        return token_windows(
            tokenizer, documents, samples=self.samples, seq_len=self.seq_len, seed=self.seed,
            source=source, packed=self.packed, chat_template=self.chat_template,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Learning:
    """seconds that learning took, and the most memory in bytes that the process had held then (None: unknown)."""

    what: str
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """stats, what they took to learn, and whether one layer at a time was in memory."""

    stats: Stats
    learning: tuple[Learning, ...]
    layer_by_layer: bool


def options_for(recipes: Sequence[Recipe | str | Path], spec: ModelSpec, *, full: bool = False, **settings) -> Options:
    """What to measure for recipes (none: the default, or everything with ``full``); settings of ``Options``.

    Raises RecipeError for a recipe that reads no statistics, or whose transforms this model does not undo.
    """
    if recipes and full:
        raise DataError("full measures everything, and a recipe only what it reads: leave one of them out.")
    loaded = tuple(load_recipe(recipe) for recipe in recipes)
    for recipe in loaded:
        check_transforms(recipe, spec)
    needs = frozenset().union(*(needs_of(recipe, spec) for recipe in loaded))
    if loaded and not needs:
        names = ", ".join(repr(recipe.name) for recipe in loaded)
        raise RecipeError(f"recipe {names} reads no statistics: use it as it is, or calibrate without naming it.")
    needs = needs or (ALL_NEEDS if full else DEFAULT_NEEDS)
    return Options(needs=needs, strict=bool(loaded), recipes=loaded, **settings)


def calibrate_folder(
    model: str | Path,
    text: CalibrationText,
    recipes: Sequence[Recipe | str | Path],
    *,
    state_folder: Path,
    end_to_end: bool = False,
    ranks: Ranks = ALONE,
    progress: Progress | None = None,
    **settings,
) -> Calibration | None:
    """Calibrate a checkpoint; None in all processes but the first.

    state_folder   to continue from if interrupted; remove it when the statistics are saved.
    settings       of ``options_for``.
    """
    folder = resolve_model(model)
    spec = describe(load_config(folder))
    options = options_for(recipes, spec, **settings)
    layer_by_layer = by_layer(folder, options, ranks)
    tokenizer = load_tokenizer(folder)
    windows = text.windows(tokenizer)
    placing = {"layer_by_layer": layer_by_layer, "state_folder": state_folder, "ranks": ranks}
    stats = _measured(folder, Path(model).name, windows, options, **placing, progress=progress)
    if stats is None:
        return None
    stats = replace(stats, token_texts=token_texts(stats, tokenizer))
    stats, learning = _learn(stats, options.recipes, spec, folder, state_folder, progress, end_to_end, windows.tokens)
    return Calibration(stats=stats, learning=learning, layer_by_layer=layer_by_layer)


def _measured(
    folder: Path,
    name: str,
    windows: Windows,
    options: Options,
    *,
    layer_by_layer: bool,
    state_folder: Path,
    ranks: Ranks,
    progress: Progress | None,
) -> Stats | None:
    """Statistics of the model in ``folder``, and what codebooks are learned from; None but in the first process."""
    learns = bool(books_of(options.recipes, describe(load_config(folder))))
    if learns and layer_by_layer:
        raise DataError(
            "codebooks are learned with the whole model in memory, which excludes layer by layer: raise "
            "--memory-limit, or use a recipe without calibrated levels."
        )
    model = load_for(folder, options, layer_by_layer=layer_by_layer, state_folder=state_folder, ranks=ranks)
    shared = {"valid": windows.valid, "ranks": ranks}
    stats = collect(
        model,
        windows.tokens,
        state_folder=state_folder,
        progress=_named(progress, "Calibrating"),
        model_name=name,
        weights_fingerprint=weights_fingerprint(folder),
        data=windows.identity,
        **shared,
        **options.measuring,
    )
    if learns:
        shared |= {"state_folder": state_folder / "codebooks", "progress": _named(progress, "Learning codebooks")}
        stats = learn_codebooks(model, options.recipes, stats, windows.tokens, seed=options.seed, **shared)
    return stats


def token_texts(stats: Stats, tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The texts of the tokens that statistics name."""
    ids: set[int] = set()
    for layer in stats.layers.values():
        for part in layer.values():
            if isinstance(part, Massive | Sinks):
                ids |= set(part.tops.token.flatten().tolist())
    return {i: tokenizer.decode([i]) for i in sorted(ids)}


def calibrate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: CalibrationText,
    recipes: Sequence[Recipe | str | Path],
    *,
    progress: Progress | None = None,
    **settings,
) -> Stats:
    """Calibrate a model in memory. Raises RecipeError for a recipe that learns, which needs the checkpoint's folder."""
    spec = describe(model.config)
    options = options_for(recipes, spec, **settings)
    for recipe in options.recipes:
        if books_of([recipe], spec) or any(learned_steps(recipe, spec)):
            raise RecipeError(
                f"recipe {recipe.name!r} learns from the checkpoint: give the model's folder or hub id, not the model."
            )
    windows = text.windows(tokenizer)
    stats = collect(
        model,
        windows.tokens,
        valid=windows.valid,
        **options.measuring,
        progress=_named(progress, "Calibrating"),
        model_name=Path(model.name_or_path or "").name,
        data=windows.identity,
    )
    assert stats is not None
    return replace(stats, token_texts=token_texts(stats, tokenizer))


def _learn(stats, recipes, spec, folder, state_folder, progress, end_to_end, tokens):
    """The statistics with what learned transforms learn on them, and the time and memory that took."""
    recipes = [recipe for recipe in recipes if any(learned_steps(recipe, spec))]
    ways = [("layer by layer", "Learning transforms", partial(learn_fits, model=spec, folder=folder))]
    if end_to_end and recipes:
        loaded = load_model(folder)
        learn = partial(learn_end_to_end, loaded, tokens=tokens, folder=folder)
        ways.append(("end to end", "Learning end to end", learn))
    found = []
    for how, title, learn in ways:
        for recipe in recipes:
            start = time.perf_counter()
            step = _named(progress, title)
            stats = learn(recipe=recipe, stats=stats, state_folder=state_folder, progress=step)
            seconds = time.perf_counter() - start
            found.append(Learning(what=f"{recipe.name} {how}", seconds=seconds, peak_bytes=peak_memory()))
    return stats, tuple(found)


def state_folder_of(out: Path) -> Path:
    """Where the state of an interrupted calibration waits, beside the statistics file that it will be."""
    return out.with_name(f".{out.name}.partial")


def save(stats: Stats, out: Path) -> None:
    """Write the statistics, and remove the state that they were made of."""
    stats.save(out)
    shutil.rmtree(state_folder_of(out), ignore_errors=True)


def _named(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(done, total, what)


def peak_memory() -> int | None:
    """Most bytes of memory that this process has held, None where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None
