"""Put a packed cache into a model, and take it out again."""

import functools
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging

from kvq.cache import CachePlan, make_plan, pack_cache, packed_layers
from kvq.cache import model_attention as attention
from kvq.cache.layer import NO_OTHER_ATTENTION
from kvq.calib.check import checked_artefacts
from kvq.calib.stats import Stats
from kvq.errors import CacheError, UnsupportedModelError
from kvq.integrations.decode_graph import decoding
from kvq.kernels.dispatch import check_implementation
from kvq.models.decoder import decoder_of
from kvq.models.describe import describe, text_config
from kvq.models.resolve import checkpoint_of
from kvq.recipe import Recipe, load_recipe

logger = logging.get_logger(__name__)

# Running forwards of other threads that began while a block was open, by (identity of its Runtime, thread).
_strangers: Counter[tuple[int, int]] = Counter()
_stranger_left = threading.Condition()


@dataclass
class Runtime:
    """What kvq installed on a model, as ``model.kvq``.

    impl   what the caches made from now on attend with: ``auto``, or ``triton``, ``cpp`` or ``reference`` and nothing
           else; may be set at any time.
    graphs whether ``generate`` may replay recorded steps on CUDA (``kvq.integrations.decode_graph``); likewise.
    thread the only thread whose forwards get packed caches without asking; None: all threads.
    """

    plan: CachePlan
    attention: str
    previous_attention: str
    hooks: tuple[torch.utils.hooks.RemovableHandle, ...]
    impl: str = "auto"
    thread: int | None = None
    graphs: bool = True

    @property
    def recipe(self) -> Recipe:
        return self.plan.recipe


def install(model: PreTrainedModel, plan: CachePlan, impl: str = "auto", thread: int | None = None) -> Runtime:
    """Make ``generate`` and plain calls of ``model``, in ``thread`` or in all threads, use a packed cache.

    A cache that the caller passes, or asks for with ``cache_implementation``, is left alone and named. An attention
    implementation other than the default stays, and then reads dequantized tensors.
    """
    if getattr(model, "kvq", None) is not None:
        raise CacheError(
            f"this model already runs recipe {model.kvq.recipe.name!r}: leave that quantized_cache block first, or "
            "load the base model."
        )
    previous = model.config._attn_implementation
    # Models that SDPA cannot serve (softcap, sink logits) default to eager; elsewhere eager was somebody's choice.
    default_eager = previous == "eager" and not model._supports_sdpa and model._supports_attention_backend
    if previous in ("sdpa", attention.NAME) or default_eager:
        attention.register()
        model.set_attn_implementation(attention.NAME)
    else:
        logger.warning_once(
            f"kvq: attention {previous!r} does not read packed pages; every step dequantizes the cache for it."
        )
    decoder = decoder_of(model)
    hooks = [decoder.register_forward_pre_hook(functools.partial(_before_forward, model), with_kwargs=True)]
    if thread is not None:
        hooks.append(decoder.register_forward_hook(functools.partial(_after_forward, model), always_call=True))
    model._prepare_cache_for_generation = functools.partial(_prepare_cache, model)
    model.prepare_inputs_for_generation = functools.wraps(type(model).prepare_inputs_for_generation)(
        functools.partial(_prepare_inputs, model)
    )
    model.init_continuous_batching = _refuse_continuous_batching
    model._optimize_model_for_decode = functools.partial(decoding, model)
    model.kvq = Runtime(
        plan=plan,
        attention=model.config._attn_implementation,
        previous_attention=previous,
        hooks=tuple(hooks),
        impl=impl,
        thread=thread,
    )
    return model.kvq


def uninstall(model: PreTrainedModel) -> None:
    """Undo ``install``: the model is as it was.

    Waits for forwards of other threads that began meanwhile: their masks are made for the attention that is installed.
    """
    runtime = model.kvq
    runtime.hooks[0].remove()
    with _stranger_left:
        _stranger_left.wait_for(lambda: all(block != id(runtime) for block, _ in _strangers))
    for hook in runtime.hooks[1:]:
        hook.remove()
    del model._prepare_cache_for_generation, model.prepare_inputs_for_generation, model.init_continuous_batching
    del model._optimize_model_for_decode
    del model.kvq
    model.set_attn_implementation(runtime.previous_attention)


@contextmanager
def quantized_cache(
    model: PreTrainedModel,
    recipe: Recipe | str | Path,
    artefacts: Mapping[str, torch.Tensor] | None = None,
    impl: str = "auto",
    *,
    stats: Stats | str | Path | None = None,
) -> Iterator[PreTrainedModel]:
    """Run a model with a recipe's packed cache inside a ``with`` block, without an export.

        with kvq.quantized_cache(model, "kivi2"):
            model.generate(...)

    The block serves the thread that opened it. Other threads go on with plain caches, of which they are told once;
    ``past_key_values=kvq.new_cache(model)`` is packed in all of them.

    stats      statistics, or their file, for recipes that need them.
    artefacts  what they give the recipe, by name, where that is at hand already.
    impl       what attends to packed pages, see ``Runtime``.

    Raises RecipeError for a recipe that does not fit or lacks statistics, CheckpointError for another model's,
    CacheError if the model runs a recipe already, and KernelError if there is no such implementation or (when it is to
    run) if it cannot.
    """
    check_implementation(impl)
    chosen, spec = load_recipe(recipe), describe(model.config)
    if stats is not None:
        artefacts = checked_artefacts(chosen, spec, stats, checkpoint_of(model))
    install(model, make_plan(chosen, spec, artefacts), impl, threading.get_ident())
    try:
        yield model
    finally:
        uninstall(model)


@contextmanager
def running(model: PreTrainedModel, plan: CachePlan | None) -> Iterator[PreTrainedModel]:
    """Run ``model`` on exactly this plan's cache (None: an ordinary one), and put back what was installed on it."""
    runtime = getattr(model, "kvq", None)
    if runtime is not None and runtime.plan is plan:
        yield model
        return
    if runtime is not None:
        uninstall(model)
    try:
        if plan is not None and plan.layers:
            install(model, plan, thread=threading.get_ident())
        yield model
    finally:
        if getattr(model, "kvq", None) is not None:
            uninstall(model)
        if runtime is not None:
            install(model, runtime.plan, runtime.impl, runtime.thread)


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """A fresh packed cache for an export that was loaded, or for a model inside ``quantized_cache``.

    Raises CacheError for a plain model, whose cache would not be quantized.
    """
    if getattr(model, "kvq", None) is None:
        raise CacheError(
            "this model has no quantized cache: load an export, or call this inside kvq.quantized_cache(model, recipe)."
        )
    cache = DynamicCache(config=text_config(model.config))
    pack_cache(cache, model.kvq.plan, model.kvq.impl)
    return cache


def _prepare_cache(model, generation_config, model_kwargs, *args, **kwargs):
    """Let transformers build its cache, then pack the plain layers of it."""
    ours = model_kwargs.get("past_key_values") is None
    if ours and not _is_strange(model.kvq):
        _heed_settings(model, generation_config)
    ours = ours and generation_config.cache_implementation in (None, "dynamic")
    result = type(model)._prepare_cache_for_generation(model, generation_config, model_kwargs, *args, **kwargs)
    cache = model_kwargs.get("past_key_values")
    if ours and cache is not None and not _is_strange(model.kvq):
        pack_cache(cache, model.kvq.plan, model.kvq.impl)
        # transformers asked for this before the layers were replaced.
        if generation_config.is_assistant:
            cache.activate_past_recording()
    for layer in packed_layers(cache)[:1]:
        layer.context.prompt = _prompt_columns(generation_config, model_kwargs)
    return result


def _prepare_inputs(model, input_ids, *args, **kwargs):
    """As transformers, but a later turn's first draft comes with the tokens that the cache lacks: its assisted decoding
    forwards the whole text again, behind what is stored of it (up to 5.23)."""
    layers = packed_layers(kwargs.get("past_key_values"))
    is_untold = "next_sequence_length" in kwargs and kwargs["next_sequence_length"] is None
    if is_untold and kwargs.get("is_first_iteration") and layers and kwargs.get("inputs_embeds") is None:
        kwargs["next_sequence_length"] = input_ids.shape[1] - layers[0].get_seq_length()
    return type(model).prepare_inputs_for_generation(model, input_ids, *args, **kwargs)


def _is_strange(runtime: Runtime) -> bool:
    """Whether the running thread is not the one that a block serves; it is told once."""
    if runtime.thread is None or runtime.thread == threading.get_ident():
        return False
    logger.warning_once(
        f"kvq: the quantized_cache block with recipe {runtime.recipe.name!r} belongs to another thread than this call, "
        "whose tokens are not quantized: open the block in the thread that generates, or pass "
        "past_key_values=kvq.new_cache(model)."
    )
    return True


def _heed_settings(model: PreTrainedModel, generation_config) -> None:
    """A cache that the checkpoint's generation config names gives way to a packed one; no cache at all is somebody's
    choice. Both are said once."""
    recipe, wanted = model.kvq.recipe.name, generation_config.cache_implementation
    if generation_config.use_cache is False:
        logger.warning_once(
            f"kvq: use_cache=False leaves nothing to quantize, so recipe {recipe!r} does nothing: remove it."
        )
    elif wanted not in (None, "dynamic") and wanted == model.generation_config.cache_implementation:
        logger.warning_once(
            f"kvq: the model's generation config names cache {wanted!r}, which is not quantized; recipe {recipe!r} "
            "takes its place. Pass a cache of your own to have another."
        )
        generation_config.cache_implementation = None


def _refuse_continuous_batching(*args, **kwargs):
    raise CacheError(
        "continuous batching (generate_batch) keeps tokens in a paged cache of its own, which kvq does not quantize: "
        "call generate with a padded batch, or leave the quantized_cache block."
    )


def _prompt_columns(generation_config, model_kwargs) -> int | None:
    """Columns of the prompt, as ``generate`` has them at hand; newer releases drop a mask that is all ones."""
    mask = model_kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        return mask.shape[1]
    return getattr(generation_config, "_mask_length", None)


def positions_of(kwargs, plan: CachePlan) -> torch.Tensor | None:
    """Rotary positions [B or 1, L] that a forward was given, on the CPU; None if it was given none or nobody asks."""
    given = kwargs.get("position_ids")
    if given is None or not plan.needs_positions:
        return None
    if given.ndim != 2:
        raise UnsupportedModelError(
            f"position_ids of {given.ndim} dimensions: keys that are stored before RoPE need one position a token; use "
            "a recipe that stores them after RoPE."
        )
    return given.cpu()


def _running_positions(cache, args, kwargs, plan: CachePlan) -> torch.Tensor | None:
    """Positions of this forward's tokens; without ``position_ids`` models count columns, pads included."""
    if not plan.needs_positions:
        return None
    given = positions_of(kwargs, plan)
    if given is not None:
        return given
    tokens = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    tokens = args[0] if tokens is None else tokens
    start = cache.get_seq_length()
    return torch.arange(start, start + tokens.shape[1]).unsqueeze(0)


def _before_forward(model: PreTrainedModel, module, args, kwargs):
    """Give a forward without a cache a packed one, and tell packed layers which columns are pads."""
    runtime = getattr(model, "kvq", None)
    # Another thread may have closed the block meanwhile.
    if runtime is None:
        return args, kwargs
    plan = runtime.plan
    cache = kwargs.get("past_key_values")
    if is_strange := _is_strange(runtime):
        with _stranger_left:
            _strangers[id(runtime), threading.get_ident()] += 1
    use_cache = kwargs.get("use_cache")
    use_cache = module.config.use_cache if use_cache is None else use_cache
    if cache is None and use_cache and not is_strange and not (module.training and torch.is_grad_enabled()):
        cache = DynamicCache(config=text_config(module.config))
        pack_cache(cache, plan, model.kvq.impl)
        kwargs["past_key_values"] = cache
        _refuse_unread_scores(plan)
    layers = packed_layers(cache)
    if cache is not None and plan.layers and not layers and not is_strange:
        logger.warning_once(
            f"kvq: a {type(cache).__name__} was given to a model that runs recipe {plan.recipe.name!r}, so its tokens "
            "are not quantized: pass none, or one of kvq.new_cache(model)."
        )
    if layers:
        _check_reader(model, cache, layers[0])
        mask = kwargs.get("attention_mask")
        two_dimensional = isinstance(mask, torch.Tensor) and mask.ndim == 2
        positions = _running_positions(cache, args, kwargs, plan)
        layers[0].context.begin(mask.bool() if two_dimensional else None, positions)
    return args, kwargs


def _refuse_unread_scores(plan: CachePlan) -> None:
    """lm-eval's own Hugging Face model scores a text with one forward that begins a cache and reads none of it."""
    if not plan.layers or "lm_eval.models.huggingface" not in sys.modules:
        return
    frame = sys._getframe()
    while frame is not None:
        is_score = frame.f_code.co_name == "_model_call" and frame.f_globals["__name__"] == "lm_eval.models.huggingface"
        # kvq's own model for lm-eval derives from it, and has its unquantized scores from it.
        if is_score and not type(frame.f_locals["self"]).__module__.startswith("kvq."):
            raise CacheError(
                f"lm-eval's model 'hf' scores in one forward, which reads nothing that recipe {plan.recipe.name!r} "
                "quantizes: use 'kvq eval MODEL --tasks TASK', or lm-eval's model 'kvq'."
            )
        frame = frame.f_back


def _check_reader(model: PreTrainedModel, cache, layer) -> None:
    """Refuse a cache that this model's forward cannot read, before it stores anything."""
    if layer.reads_handle and model.config._attn_implementation != attention.NAME:
        raise CacheError(
            f"attention {model.config._attn_implementation!r} cannot read this cache: {NO_OTHER_ATTENTION}"
        )
    # A model that drafts with its own first layers has fewer of them meanwhile.
    needed = min(1 + max(model.kvq.plan.layers, default=0), text_config(model.config).num_hidden_layers)
    if len(cache.layers) < needed:
        raise CacheError(
            f"a cache of {len(cache.layers)} layers was given to a model that needs {needed}: make one with "
            "kvq.new_cache(model)."
        )


def _after_forward(model: PreTrainedModel, module, args, output):
    """A forward of another thread has ended."""
    key = id(getattr(model, "kvq", None)), threading.get_ident()
    with _stranger_left:
        if key in _strangers:
            _strangers[key] -= 1
            if not _strangers[key]:
                del _strangers[key]
            _stranger_left.notify_all()
