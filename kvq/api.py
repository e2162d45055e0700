"""The public functions, in the order in which they are used: calibrate, export, run, evaluate, search.

What a function alone needs is imported when it is called, so that a packed cache costs no import of evaluations.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kvq import cache as caches
from kvq.cache import CachePlan
from kvq.errors import DataError
from kvq.models import describe as models
from kvq.models.describe import ModelSpec
from kvq.models.resolve import checkpoint_of, load_config, resolve_model
from kvq.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from kvq.calib.data import Document
    from kvq.calib.stats import Stats
    from kvq.eval.result import EvalResult
    from kvq.exporting.exporter import ExportResult
    from kvq.exporting.memory import MemoryPlan
    from kvq.searching.outcome import Search

Progress = Callable[[int, int, str], None]


def calibrate(
    model: PreTrainedModel | str | Path,
    *,
    recipe: Recipe | str | Path | Sequence[Recipe | str | Path] = (),
    full: bool = False,
    end_to_end: bool = False,
    data: str | Path | Sequence[Document] = "builtin",
    field: str | None = None,
    split: str = "train",
    packed: bool = True,
    chat_template: bool = False,
    samples: int = 64,
    seq_len: int = 512,
    seed: int = 0,
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
    device_map: str | dict[str, Any] | None = None,
    layer_by_layer: bool | None = None,
    memory_limit: int | None = None,
    reservoir_bytes: int = 512 * 2**20,
    tokenizer: PreTrainedTokenizerBase | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Stats:
    """Run a model over text and return statistics of its keys, values and queries.

    model            a checkpoint folder, a hub id or ``builtin``; or a model in memory, which needs ``tokenizer`` and
                     serves recipes that learn nothing.
    recipe           one or several: measure what they read, and learn what they learn. Without one: ranges, quantiles,
                     attention sinks and massive activations; everything with ``full``.
    end_to_end       learn transforms further, on the logits of the whole model.
    data             ``builtin``, a .txt, .jsonl or .parquet file, a hub id, or the texts (conversations) themselves.
    field, split     column of the text (None: ``messages``, else ``text``), and split of a hub data set.
    packed           cut windows out of the joined text; False: a window is one document.
    chat_template    put texts into the tokenizer's chat template, as messages of a user.
    samples, seq_len windows, and tokens a window. seed: of the choice of windows. batch_size: windows a forward.
    dtype            of the weights; None: float32 on the CPU, the checkpoint's on a GPU.
    device_map       spread the model over several devices, as ``from_pretrained`` does.
    layer_by_layer   hold one decoder layer at a time; None: if the weights take more than ``memory_limit`` bytes.
    reservoir_bytes  token vectors to keep, all layers together.
    out              file to write the statistics to. An interrupted call continues there when it is repeated.
    progress         called with (done, total, what).

    Raises DataError, UnsupportedModelError, ModelNotFoundError, CheckpointError or RecipeError as text, model, disk and
    recipe demand.
    """
    from kvq.calib.run import CalibrationText, calibrate_folder, calibrate_model, save, state_folder_of

    recipes = (recipe,) if isinstance(recipe, str | Path | Recipe) else tuple(recipe)
    text = CalibrationText(
        data=data, field=field, split=split, samples=samples, seq_len=seq_len, seed=seed, packed=packed,
        chat_template=chat_template,
    )  # fmt: skip
    settings: dict[str, Any] = {
        "full": full, "batch_size": batch_size, "seed": seed, "reservoir_bytes": reservoir_bytes, "progress": progress,
    }  # fmt: skip
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise DataError("a model in memory brings no tokenizer: give tokenizer=, or the model's folder or hub id.")
        stats = calibrate_model(model, tokenizer, text, recipes, **settings)
        if out is not None:
            stats.save(out)
        return stats
    settings |= {
        "dtype": dtype, "device_map": device_map, "layer_by_layer": layer_by_layer, "memory_limit": memory_limit,
        "end_to_end": end_to_end,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        if out is not None:
            state = state_folder_of(Path(out))
        else:
            state = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "state"
        found = calibrate_folder(model, text, recipes, state_folder=state, **settings)
    assert found is not None, "one process alone is the first"
    if out is not None:
        save(found.stats, Path(out))
    return found.stats


def export(
    model: str | Path,
    out: str | Path,
    *,
    recipe: Recipe | str | Path,
    stats: Stats | str | Path | None = None,
    target: str = "kvq",
    other_weights: bool = False,
    fold: bool = True,
    force: bool = False,
    results: Sequence[str | Path] = (),
    base_name: str | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Write a model with a recipe to the new folder ``out``, which ``from_pretrained`` or a serving engine loads.

    stats          statistics, or their file, for recipes that need them.
    target         for whom: ``kvq``, or a name of ``kvq export --list-targets``.
    other_weights  take statistics of other weights of the same shape, such as the unquantized base's.
    fold           put transforms into the weights where that is exact.
    force          replace an export that is already there; nothing else is ever replaced.
    results        files of ``kvq eval MODEL --recipe ... --json``, for the model card.
    base_name      of the base model in card and provenance; None: the hub id or the folder's name.
    progress       called with (bytes hashed, bytes in all, what).

    Raises CheckpointError for a source, target or results that cannot be used, if folded weights change the logits, and
    if writing fails (nothing is left then); RecipeError, UnsupportedModelError, ModelNotFoundError.
    """
    from kvq.exporting import exporter
    from kvq.report.results_card import card_of

    chosen = load_recipe(recipe)
    return exporter.export(
        model,
        chosen,
        out,
        target=target,
        stats=stats,
        other_weights=other_weights,
        force=force,
        base_name=base_name,
        fold=fold,
        card=card_of(model, chosen, results, target) if results else None,
        progress=None if progress is None else lambda done, total: progress(done, total, "Hashing"),
    )


def describe(model: PreTrainedModel | PretrainedConfig | str | Path) -> ModelSpec:
    """What kvq sees of a model, its config, folder or hub id: layers, KV heads, head_dim, and which can be quantized.

    Raises UnsupportedModelError, with the reason, for a model whose cache kvq cannot quantize.
    """
    if isinstance(model, str | Path):
        return models.describe(load_config(resolve_model(model)))
    return models.describe(model.config if isinstance(model, PreTrainedModel) else model)


def memory_plan(model: ModelSpec | PreTrainedModel | PretrainedConfig | str | Path, recipe: Recipe | str) -> MemoryPlan:
    """What a recipe's cache weighs on a model: bytes of one sequence, and bits a number; needs no statistics.

    Raises RecipeError or UnsupportedModelError if the recipe does not fit.
    """
    from kvq.exporting import memory

    return memory.memory_plan(_spec(model), load_recipe(recipe))


def make_plan(
    recipe: Recipe | str | Path,
    model: ModelSpec | PreTrainedModel | PretrainedConfig | str | Path,
    artefacts: Mapping[str, torch.Tensor] | None = None,
    *,
    stats: Stats | str | Path | None = None,
) -> CachePlan:
    """Resolve a recipe against a model: codecs, transforms, rules and page layouts of every layer, and their bytes.

    stats      statistics, or their file, for recipes that need them.
    artefacts  what they give the recipe, by name, where that is at hand already.

    Raises RecipeError for a recipe that does not fit or lacks statistics, CheckpointError for another model's.
    """
    from kvq.calib.check import checked_artefacts

    chosen, spec = load_recipe(recipe), _spec(model)
    if stats is not None:
        artefacts = checked_artefacts(chosen, spec, stats, _folder(model))
    return caches.make_plan(chosen, spec, artefacts)


def evaluate(
    model: str | Path,
    *,
    recipe: Recipe | str | Path | None = None,
    tasks: Sequence[str] = ("perplexity", "divergence"),
    data: str | Path = "builtin",
    seq_len: int | None = None,
    stride: int | None = None,
    lengths: Sequence[int] | None = None,
    limit: int | None = None,
    mode: str = "stream",
    chunk: int = 512,
    baseline: str | Path | None = None,
    stats: Stats | str | Path | None = None,
    task_dir: str | Path | None = None,
    task_data: str | Path | None = None,
    fewshot: int | None = None,
    chat: bool = False,
    batch_size: int = 1,
    dtype: torch.dtype | str | None = None,
    seed: int = 0,
    cache: str | Path | None = "default",
    progress: Progress | None = None,
) -> EvalResult:
    """Score an export, or a plain model under ``recipe``, while it reads its quantized cache, beside the exact one.

    recipe      for a plain model (None: fp16, nothing quantized); an export brings its own.
    tasks       perplexity, divergence, needle, multi_key, variable_tracking, copy_json, copy_code, drift, speed, and
                lm-eval tasks by name or file (.yaml).
    data        text to score, and to make generated texts of: ``builtin``, a file or a hub id.
    seq_len     tokens a window (None: 2,048, or the model's maximum if less). stride: from one window to the next.
    lengths     tokens of generated texts. limit: windows, texts a length, and documents of each lm-eval task.
    mode        what a scored token attends to: stream, prefill, chunked (of ``chunk`` tokens) or simulate.
    baseline    model to compare with; None: the same weights, not quantized.
    stats       statistics, or their file, for a recipe that needs them.
    task_dir    folder with lm-eval task files; task_data: folder with rows for lm-eval tasks, without a network.
    fewshot     examples in a prompt of lm-eval tasks; chat: prompts go through the chat template.
    batch_size  windows, or requests, a forward.
    cache       folder for answers of runs that may be interrupted; ``default``: in the user's cache; None: no folder.
    progress    called with (done, total, what).

    An interrupted call returns what it has, marked ``partial``; the same call then continues. Raises DataError for
    unknown tasks and text that does not fit or reads nothing quantized; RecipeError, CheckpointError,
    ModelNotFoundError, UnsupportedModelError.
    """
    from kvq.eval import evaluate as scoring

    return scoring.evaluate(
        model, recipe, baseline=baseline, stats=stats, dtype=dtype, progress=progress, tasks=tasks, data=data,
        seq_len=seq_len, stride=stride, lengths=None if lengths is None else tuple(lengths), limit=limit, mode=mode,
        chunk=chunk, task_dir=task_dir, task_data=task_data, fewshot=fewshot, chat=chat, batch_size=batch_size,
        seed=seed, cache=cache,
    )  # fmt: skip


def compare(
    models: Sequence[str | Path],
    *,
    recipes: Sequence[Recipe | str | Path] | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> list[EvalResult]:
    """Evaluate several exports, or one model under several recipes, on the same requests; the baseline runs once.

    settings   keyword arguments of ``evaluate``; exports of different models need a ``baseline``.
    """
    from kvq.eval import evaluate as scoring

    return scoring.compare(models, recipes, progress=progress, **settings)


def search(
    model: str | Path,
    *,
    budget: float | Sequence[float],
    stats: Stats | str | Path | None = None,
    data: str | Path | Sequence[str | Path] = "builtin",
    verify_data: str | Path | Sequence[str | Path] = (),
    space: Mapping[str, Any] | str | Path | None = None,
    metric: str = "kl",
    floors: Mapping[str, float] | None = None,
    tokens: int | None = None,
    seq_len: int = 2048,
    context: int | None = None,
    windows: int = 1,
    verify_windows: int = 4,
    anchors: int = 3,
    heads: bool = True,
    refine: int = 4,
    time_limit: float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    command: Sequence[str] = (),
    progress: Progress | None = None,
) -> Search:
    """Search the mixed-precision recipe of least damage for a model within a budget of bits.

    budget          bits a number, codes and metadata, keys and values averaged; one, or several from one measuring.
    stats           statistics, or their file, for options whose transforms need them.
    data            text to measure on, or several. verify_data: texts that confirm; while they are fewer than two,
                    parts of ``data`` that nothing else reads do so too.
    space           search space, as plain data or a file; None: the default.
    metric          ``kl`` or ``top1``: what is minimised. floors: what must hold, such as {"top1": 0.95}.
    tokens          count bits in a filled cache of so many tokens instead.
    seq_len         tokens a window. windows: of a text, for sensitivities. verify_windows: to choose, and to confirm.
    context         windows stand at positions up to so many tokens; None: from 0.
    anchors         options measured per side and layer; heads: give heads options of their own.
    refine          rounds of measuring what was chosen. time_limit: seconds of the whole call, which
                    then gives what was found.
    out             recipe file to write (.yaml; ``{budget}`` stands for the budget), with its evidence and the front
                    beside it. An interrupted call continues there when it is repeated.
    command         the command line that the evidence names.
    progress        called with (done, total, what).

    The recipes are ``[point.chosen.recipe for point in result.points]``. Raises DataError for a text that is too short,
    for budgets or floors that cannot be met and for a time limit that ends before every option was tried; RecipeError,
    CheckpointError, ModelNotFoundError.
    """
    from kvq.calib.stats import Stats
    from kvq.report.search_files import SearchFiles
    from kvq.searching.outcome import Settings
    from kvq.searching.search import search as searching
    from kvq.searching.space import load_space

    budgets = (float(budget),) if isinstance(budget, int | float) else tuple(budget)
    files = SearchFiles.of(out, budgets) if out is not None else None
    settings = Settings(
        budgets=budgets, metric=metric, floors=dict(floors or {}), tokens=tokens, seq_len=seq_len, context=context,
        windows=windows, verify_windows=verify_windows, anchors=anchors, heads=heads, refine=refine,
        time_limit=time_limit, seed=seed,
    )  # fmt: skip
    found = searching(
        model,
        settings,
        stats=stats if stats is None or isinstance(stats, Stats) else Stats.load(stats),
        data=_listed(data),
        verify_data=_listed(verify_data),
        space=space if isinstance(space, Mapping) else load_space(space),
        progress=None if progress is None else lambda stage, done, total: progress(done, total, stage),
        journal=files.journal if files else None,
        names=files.name if files else lambda budget: f"auto-{budget:g}",
    )
    if files is not None:
        files.write(found, command)
    return found


def _listed(data: str | Path | Sequence[str | Path]) -> Sequence[str | Path]:
    return (data,) if isinstance(data, str | Path) else data


def _spec(model: ModelSpec | PreTrainedModel | PretrainedConfig | str | Path) -> ModelSpec:
    return model if isinstance(model, ModelSpec) else describe(model)


def _folder(model: ModelSpec | PreTrainedModel | PretrainedConfig | str | Path) -> Path | None:
    """The checkpoint that a model came from, None if that is not known."""
    if isinstance(model, ModelSpec):
        return None
    return resolve_model(model) if isinstance(model, str | Path) else checkpoint_of(model)
