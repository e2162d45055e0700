"""Faithful log-likelihood scoring: a model's single, cache-less forward that reads what a packed cache would hold."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kvq.cache import CachePlan, HeadGroup
from kvq.cache.attend import Options
from kvq.cache.model_attention import kvq_attention, options_of
from kvq.errors import CacheError, DataError, UnsupportedModelError
from kvq.eval.branches import Branches
from kvq.eval.two_view_attention import MODES, Schedule, two_view_attend
from kvq.integrations.runtime import positions_of
from kvq.models.decoder import decoder_of
from kvq.models.describe import describe

__all__ = ["MODES", "NAME", "two_view"]

NAME = "kvq_two_view"
# Layers that reuse another layer's keys and values (Gemma 3n) get the same tensor, and with it this mark.
_GROUPS = "kvq_two_view_groups"
_ACTIVE: "WeakKeyDictionary[torch.nn.Module, _State]" = WeakKeyDictionary()


@dataclass
class _State:
    """One ``two_view`` block. ``real`` [B, T] marks the running forward's real tokens; None: no pads on the left.

    ``positions`` [B or 1, T]: rotary positions that the running forward was given; None: 0, 1, 2, ...
    ``wanted``: layers whose attention must pass here. ``watch``: see ``two_view``.
    """

    plan: CachePlan | None
    schedule: Schedule
    given_lengths: torch.Tensor | None
    branches: Branches | None
    wanted: frozenset[int]
    watch: Callable[[int, torch.Tensor, torch.Tensor], None] | None
    lengths: torch.Tensor | None = None
    real: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    seen: set[int] = field(default_factory=set)

    def groups(self, module: torch.nn.Module, key: torch.Tensor) -> tuple[HeadGroup, ...]:
        index = getattr(module, "layer_idx", None)
        self.seen.add(index)
        if self.plan is not None and index in self.plan.layers:
            setattr(key, _GROUPS, self.plan.layers[index])
        return getattr(key, _GROUPS, ())


@contextmanager
def two_view(
    model: PreTrainedModel,
    plan: CachePlan | None,
    mode: str = "stream",
    *,
    chunk: int = 512,
    contexts: int | Sequence[int] | torch.Tensor | None = None,
    lengths: int | Sequence[int] | torch.Tensor | None = None,
    branches: Branches | None = None,
    watch: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
) -> Iterator[PreTrainedModel]:
    """Inside the block, ``model(input_ids)`` scores as decoding through the packed cache of ``plan`` would.

        with two_view(model, plan, "stream"):
            logits = model(input_ids).logits

    plan       what the cache would hold; None: exact keys and values.
    mode       how the tokens are taken to arrive; see ``kvq.eval.two_view_attention``.
    chunk      tokens a chunk (mode chunked).
    contexts   tokens of each row's prompt (mode prefill): [B], or one number for all rows.
    lengths    real tokens of each row if rows are padded on the right without an attention mask: [B], or one number.
    branches   rows that fork into several continuations; call the model with ``position_ids=branches.positions`` and no
               attention mask. Only for models whose layers all attend to the whole past.
    watch      called in every planned layer with its index, its attention's output, and what exact attention gives for
               the same input, both [B, T, H, D].

    No cache is kept. Left and right pads given by a 2-D ``attention_mask`` are understood. Layers outside the plan, and
    every layer of a recipe that quantizes nothing, run the model's ordinary attention. Leaving restores the model.

    Raises DataError for an unknown mode or settings that do not fit it, CacheError for another model's plan or for a
    forward with a cache, UnsupportedModelError if some planned layer's attention cannot be reached.
    """
    schedule = Schedule(mode=mode, chunk=chunk, contexts=_per_row(contexts, "contexts"))
    spec = describe(model.config)
    if plan is not None and spec.fingerprint != plan.model.fingerprint:
        raise CacheError("the plan was made for another model: make it again with kvq.make_plan for this one.")
    if branches is not None and len(spec.full_layers) < len(spec.layers):
        raise UnsupportedModelError(
            f"not every layer of {spec.model_type!r} attends to the whole past, so its rows cannot fork: score each "
            "continuation in a row of its own."
        )
    wanted = (
        frozenset(layer.index for layer in spec.layers)
        if branches is not None
        else frozenset(plan.layers if plan else ())
    )
    state = _State(
        plan=plan,
        schedule=schedule,
        given_lengths=_per_row(lengths, "lengths"),
        branches=branches,
        wanted=wanted,
        watch=watch,
    )
    decoder = decoder_of(model)
    modules = [module for module in model.modules() if hasattr(module, "layer_idx")]
    previous = model.config._attn_implementation
    outer = {module: _ACTIVE.get(module) for module in modules}
    # First in line, so that the hook of an installed packed cache already sees use_cache=False.
    before = decoder.register_forward_pre_hook(functools.partial(_before, state), with_kwargs=True, prepend=True)
    after = decoder.register_forward_hook(functools.partial(_after, state))
    try:
        if wanted:
            register()
            _ACTIVE.update(dict.fromkeys(modules, state))
            model.set_attn_implementation(NAME)
        yield model
    finally:
        before.remove()
        after.remove()
        if wanted:
            model.set_attn_implementation(previous)
            for module, held in outer.items():
                _ACTIVE.pop(module, None)
                if held is not None:
                    _ACTIVE[module] = held


def register() -> None:
    """Register the attention function and its mask under the name ``kvq_two_view``; safe to repeat."""
    AttentionInterface.register(NAME, two_view_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def two_view_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention of query [B, H, T, D] as the running ``two_view`` block says; returns [B, T, H, D] and no weights."""
    state = _ACTIVE.get(module)
    groups = state.groups(module, key) if state is not None else ()
    if not groups and state is not None and state.branches is not None:
        return _attend_branches(module, query, key, value, dropout, scaling, state.branches, kwargs), None
    if not groups:
        return kvq_attention(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    options = options_of(module, query, scaling, kwargs)
    for name, rows in (("contexts", state.schedule.contexts), ("lengths", state.lengths)):
        if rows is not None and len(rows) not in (1, query.shape[0]):
            raise DataError(f"{name} has {len(rows)} entries for a batch of {query.shape[0]}: give one for each row.")
    if state.real is None:
        out = _attend_groups(query, key, value, groups, attention_mask, options, state, state.positions)
    else:
        out = _attend_padded(query, key, value, groups, attention_mask, options, state)
    out = out.transpose(1, 2).contiguous()
    if state.watch is not None:
        exact, _ = kvq_attention(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        state.watch(module.layer_idx, out, exact)
    return out, None


def _attend_branches(module, query, key, value, dropout, scaling, branches: Branches, kwargs) -> torch.Tensor:
    """The model's ordinary attention [B, T, H, D] in rows that fork: first the common context, then what follows."""
    fork = branches.fork
    settings = {"dropout": dropout, "scaling": scaling, **kwargs}
    parts = [(query[:, :, :fork], key[:, :, :fork], value[:, :, :fork], None)]
    if fork < query.shape[2]:
        parts.append((query[:, :, fork:], key, value, branches.mask().to(query.device)))
    return torch.cat([kvq_attention(module, *part, **settings)[0] for part in parts], dim=1)


def _attend_groups(query, key, value, groups, mask, options: Options, state: _State, positions) -> torch.Tensor:
    """Every head group's attention, [B, H, T, D]; real tokens stand on the left."""
    B, H, T, D = query.shape
    heads = key.shape[1]
    grouped = query.view(B, heads, H // heads, T, D) if query.is_contiguous() else query.unflatten(1, (heads, -1))
    lengths = None if state.lengths is None else state.lengths.expand(B)
    rest = (mask if state.branches is None else None, lengths, positions, state.branches)
    if len(groups) == 1:
        return two_view_attend(grouped, key, value, groups[0], state.schedule, options, *rest).flatten(1, 2)
    out = torch.empty_like(grouped)
    for group in groups:
        own = list(group.heads)
        logits = None if options.sink_logits is None else options.sink_logits.view(heads, -1)[own].flatten()
        part = Options(scaling=options.scaling, softcap=options.softcap, sink_logits=logits)
        out[:, own] = two_view_attend(grouped[:, own], key[:, own], value[:, own], group, state.schedule, part, *rest)
    return out.flatten(1, 2)


def _attend_padded(query, key, value, groups, mask, options: Options, state: _State) -> torch.Tensor:
    """Move every row's real tokens to the left, attend, and move the results back."""
    # A stable sort keeps the order of the real tokens.
    order = torch.argsort((~state.real).to(torch.int8), dim=1, stable=True).to(query.device)
    index = order[:, None, :, None]
    query, key, value = (x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in (query, key, value))
    if mask is not None:
        mask = mask.expand(len(order), -1, -1, -1)
        mask = mask.gather(2, index.expand(-1, mask.shape[1], -1, mask.shape[3]))
        mask = mask.gather(3, order[:, None, None].expand_as(mask))
    # Without positions of its own, the forward numbered every column, pads included.
    positions = torch.arange(order.shape[1]).unsqueeze(0) if state.positions is None else state.positions
    positions = positions.expand(len(order), -1).gather(1, order.cpu())
    out = _attend_groups(query, key, value, groups, mask, options, state, positions)
    return torch.empty_like(out).scatter_(2, index.expand_as(out), out)


def _before(state: _State, module, args, kwargs):
    """Keep the forward free of a cache, and note which tokens are real."""
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise CacheError(
            "two-view scoring runs without a cache: leave past_key_values out, or leave the two_view block."
        )
    kwargs["past_key_values"], kwargs["use_cache"] = None, False
    mask = kwargs.get("attention_mask")
    state.seen.clear()
    if state.branches is not None:
        _check_forks(state.branches, kwargs)
    state.lengths, state.real = state.given_lengths, None
    state.positions = None if state.plan is None else positions_of(kwargs, state.plan)
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and not bool(mask.all()):
        real = mask.bool().cpu()
        state.lengths = real.sum(1)
        on_the_left = torch.arange(real.shape[1]) < state.lengths.unsqueeze(1)
        state.real = None if torch.equal(real, on_the_left) else real
    return args, kwargs


def _check_forks(branches: Branches, kwargs) -> None:
    positions = kwargs.get("position_ids")
    if positions is None or not torch.equal(positions.cpu(), branches.positions):
        raise DataError("rows that fork need position_ids=branches.positions: pass them to the model.")
    mask = kwargs.get("attention_mask")
    if mask is not None and not (mask.ndim == 2 and bool(mask.all())):
        raise DataError("rows that fork take no attention_mask: leave it out.")
    # transformers reads jumps of the positions as texts packed in one row, unless it is given a mask.
    kwargs["attention_mask"] = torch.ones_like(positions)


def _after(state: _State, module, args, output) -> None:
    missed = state.wanted - state.seen
    if missed:
        raise UnsupportedModelError(
            f"layer {min(missed)} of this {type(module).__name__} does not use the attention interface of "
            "transformers, so one forward cannot score a packed cache: generate through the cache instead."
        )


def _per_row(value, name: str) -> torch.Tensor | None:
    if value is None:
        return None
    rows = torch.as_tensor(value).cpu().reshape(-1)
    if rows.is_floating_point() or rows.dtype == torch.bool or bool((rows < 0).any()):
        raise DataError(f"{name}={value!r} does not count tokens: give whole numbers of 0 or more.")
    return rows.long()
