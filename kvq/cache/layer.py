"""A decoder layer's packed cache, behind the transformers cache-layer interface."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from kvq.cache.attend import Options, attend
from kvq.cache.context import ForwardContext
from kvq.cache.dense import dense
from kvq.cache.dropping import drop
from kvq.cache.observer import Observer
from kvq.cache.plan import CachePlan, HeadGroup
from kvq.cache.store import HeadStore
from kvq.errors import CacheError
from kvq.kernels.dispatch import check_implementation
from kvq.pages.layout import SIDES

# The attribute by which the tensors that `update` returns carry the packed storage to the attention function.
HANDLE = "kvq_handle"
NO_OTHER_ATTENTION = (
    "once kvq's attention has read a cache no other can; begin a new cache after leaving the quantized_cache block or "
    "changing the attention implementation."
)


class Placeholder(torch.Tensor):
    """Stands for keys or values that lie in packed pages: shape, dtype and device, but no numbers and no memory.

    Whatever would read it raises CacheError; kvq's attention takes the handle that it carries.
    """

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], like: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)

    # Asking for its shape is free, and every operator ends below.
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyrefly: ignore [bad-override]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # pyrefly: ignore [bad-override]
        for stand_in in (x for x in tree_leaves((args, kwargs)) if isinstance(x, cls)):
            # Layers before the reader have got the tokens of this forward, those behind it have not.
            getattr(stand_in, HANDLE).layer.context.is_broken = True
        raise CacheError(f"{func} reads what lies in packed pages: {NO_OTHER_ATTENTION}")

    def __repr__(self, **_) -> str:
        return f"Placeholder(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


@dataclass(frozen=True, kw_only=True)
class Handle:
    """One update of a packed layer, as the attention function needs it."""

    layer: "PackedLayer"
    snapshots: list
    columns: torch.Tensor | None
    start: int

    @property
    def is_prompt(self) -> bool:
        """True if nothing was stored before: the returned tensors are the exact keys and values."""
        return self.start == 0 and self.snapshots[0].prompt is None

    def attend(self, query: torch.Tensor, mask: torch.Tensor | None, options: Options) -> torch.Tensor:
        """Attention of query [B, H, L, D] over the packed segments; mask [B, 1, L, columns] or None. Same shape out.

        Then the layer's observers are shown it.
        """
        B, H, L, D = query.shape
        heads = sum(len(store.group.heads) for store in self.layer.stores)
        grouped = query.view(B, heads, H // heads, L, D)
        row_masks = None if mask is None else self._row_masks(mask, B)
        lse = None
        if self.layer.observers:
            dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
            lse = query.new_full(grouped.shape[:-1], -torch.inf, dtype=dtype)
        if len(self.layer.stores) == 1:
            out = self._attend_heads(0, grouped, row_masks, options, lse)
        else:
            out = torch.empty_like(grouped)
            for i, store in enumerate(self.layer.stores):
                own = list(store.group.heads)
                logits = None if options.sink_logits is None else options.sink_logits.view(heads, -1)[own].flatten()
                part = Options(scaling=options.scaling, softcap=options.softcap, sink_logits=logits)
                found = None if lse is None else lse[:, own]
                out[:, own] = self._attend_heads(i, grouped[:, own], row_masks, part, found)
                if lse is not None:
                    lse[:, own] = found
        if lse is not None:
            self.show(query, lse.view(B, H, L))
        return out.view(B, H, L, D)

    def show(self, query: torch.Tensor, lse: torch.Tensor) -> None:
        """Tell the layer's observers of queries [B, H, L, D] and their log-sum-exp [B, H, L]."""
        for observer in self.layer.observers:
            observer.after_attention(self.layer, query, lse)

    def _attend_heads(self, index: int, q: torch.Tensor, row_masks, options: Options, lse) -> torch.Tensor:
        """Attention of one store's query heads, [B, kv_heads, group, L, head_dim], in the model's own basis."""
        store, snapshot = self.layer.stores[index], self.snapshots[index]
        chains = snapshot.chains if snapshot is store.step else store.chains_of(q.shape[3], q.dtype)
        # Chains see [B, kv_heads, any, head_dim].
        q = chains["key"].transform_query(q.flatten(2, 3)).view_as(q)
        steps = self.layer.context.steps
        out = attend(store, snapshot, q, row_masks, self.columns, options, steps, lse)
        if lse is not None and store.chains["key"]:
            # Keys that lose a number by channel move all logits of a query by one number.
            lost = chains["key"].forward(q.new_zeros(1, q.shape[1], 1, q.shape[-1])).to(lse.dtype)
            lse -= options.scaling * (q.to(lse.dtype) * lost.unsqueeze(2)).sum(-1)
        return chains["value"].inverse(out.flatten(2, 3)).view_as(out)

    def _row_masks(self, given: torch.Tensor, rows: int) -> list[torch.Tensor] | None:
        """Drop the columns of pads: one [L, tokens] mask per row; None if it says no more than causality."""
        real, total = self.layer.real, self.layer.length
        if self.columns is None and self.layer.context.is_plain(given, real, total):
            return None
        mask = given.expand(rows, *given.shape[1:])[:, 0, :, :total]
        if real is None:
            return list(mask)
        return [own[:, columns.to(own.device)] for own, columns in zip(mask, real)]


class PackedLayer(CacheLayerMixin):
    """Keys and values of one decoder layer: exact sinks, packed pages, exact window.

    The first update returns the exact tensors, so prompt attention is exact. Later updates return dequantized tensors,
    or, once the kvq attention function has shown that it reads the handle, a ``Placeholder``: a handle that gets lost
    then is an error instead of another result. ``observers`` are shown every attention over the layer.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self, groups: tuple[HeadGroup, ...], context: ForwardContext):
        super().__init__()
        self.groups = groups
        # KV heads and head_dim of what may arrive.
        self.expected = sum(len(group.heads) for group in groups), groups[0].head_dim
        self.context = context
        self.observers: list[Observer] = []
        self.stores: list[HeadStore] = []
        self.length = 0
        self.real: torch.Tensor | None = None
        self.reads_handle = False
        self.recording = False
        self.holding = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.stores = [HeadStore(group, key_states.shape[0], self.device, self.dtype) for group in self.groups]
        for store in self.stores:
            store.recording, store.holding, store.impl = self.recording, self.holding, self.context.impl
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Store new tokens [B, kv_heads, L, head_dim]; returns what attention must use, with the handle attached."""
        for states in (key_states, value_states):
            if (states.shape[1], states.shape[3]) != self.expected:
                raise CacheError(
                    f"a layer planned for (heads, head_dim) = {self.expected} was given "
                    f"{(states.shape[1], states.shape[3])}: its cache, or the plan, is another model's; make one with "
                    "kvq.new_cache(model), or resolve the recipe again with kvq.make_plan."
                )
        if self.context.is_broken:
            raise CacheError(
                "some layers of this cache have tokens of a forward that failed, which others lack: begin a new cache."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, new = self.length, key_states.shape[2]
        if new == 0:
            return key_states, value_states
        if self.observers and start > 0 and not self.reads_handle:
            raise CacheError(
                "a layer with observers was read by another attention than kvq's, which shows them nothing: "
                "leave the model its default attention, or register no observers."
            )
        if not self.reads_handle and any(store.kept is not None for store in self.stores):
            raise CacheError(
                "a layer that dropped tokens was read by another attention than kvq's, which would see them as zeros: "
                "leave the model its default attention."
            )
        context = self.context
        columns = context.new_tokens(start, new).valid
        self.real = context.real(self.real, start, key_states.shape[0], new)
        self.length += new
        prompt = self._prompt_before_draft(start, new) if self.recording else None
        # A single real token; what it returns must reach kvq's attention.
        stepping = new == 1 and start > 0 and columns is None and self.reads_handle
        snapshots = []
        for store in self.stores:
            own = slice(None) if len(self.stores) == 1 else list(store.group.heads)
            states = {"key": key_states[:, own].detach(), "value": value_states[:, own].detach()}
            snapshot = store.append_on_device(states, context.counters) if stepping else None
            if snapshot is None:
                chains = store.chains_of(new, self.dtype)
                states = {side: chains[side].forward(x) for side, x in states.items()}
                snapshot = store.append(states, columns, prompt, context.positions)
            snapshots.append(snapshot)
        handle = Handle(layer=self, snapshots=snapshots, columns=columns, start=start)
        if start == 0:
            keys, values = key_states.view_as(key_states), value_states.view_as(value_states)
        elif self.reads_handle:
            shape = (*key_states.shape[:2], self.length, key_states.shape[3])
            keys = values = Placeholder(shape, key_states)
        else:
            keys, values = (dense(self, side, snapshots) for side in SIDES)
        setattr(keys, HANDLE, handle)
        setattr(values, HANDLE, handle)
        return keys, values

    def _prompt_before_draft(self, start: int, new: int) -> int | None:
        """How many of the new columns are a turn's prompt; None for a draft alone, and for a first prompt alone."""
        left = (self.context.prompt or 0) - start
        return min(new, left) if left > 0 and (start > 0 or new > left) else None

    def follow(self) -> None:
        """Count a step of one token that the device has made by itself (``DeviceStep.follow``)."""
        self.length += 1
        for store in self.stores:
            store.step.follow()

    def hold(self) -> None:
        """Pack nothing until ``release``, so that tokens can be dropped while they are exact; a prompt stays lent."""
        self.holding = True
        for store in self.stores:
            store.hold()

    def release(self) -> None:
        """Pack what the rules have released meanwhile, and go on packing."""
        self.holding = False
        for store in self.stores:
            store.release()

    def drop(self, gone: torch.Tensor) -> None:
        """Forget tokens for good; ``gone`` [B, kv_heads, columns] bool, True = forget. What it says of pads, and of
        tokens that were dropped before, does not matter.

        The layer's length, the positions and the masks stay those of all tokens that came. Raises CacheError as
        ``kvq.cache.dropping.drop``.
        """
        marks = list(gone.cpu())
        if self.real is not None:
            marks = [own[:, real] for own, real in zip(marks, self.real, strict=True)]
        for store in self.stores:
            drop(store, [own[list(store.group.heads)] for own in marks])

    @property
    def batch(self) -> int:
        """Sequences."""
        return len(self.stores[0].seen) // self.stores[0].split

    @property
    def keys(self) -> torch.Tensor | None:
        """Dequantized keys of the stored state, computed on demand."""
        return dense(self, "key", None) if self.is_initialized and self.length else None

    @keys.setter
    def keys(self, value) -> None:
        assert value is None, "a packed layer's keys are read-only"

    @property
    def values(self) -> torch.Tensor | None:
        """Dequantized values of the stored state, computed on demand."""
        return dense(self, "value", None) if self.is_initialized and self.length else None

    @values.setter
    def values(self, value) -> None:
        assert value is None, "a packed layer's values are read-only"

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """The name of ``get_max_length`` up to transformers 5.17."""
        return -1

    def reset(self) -> None:
        """Forget every token; storage is released."""
        self.stores, self.length, self.real, self.is_initialized = [], 0, None, False
        self.context.is_broken = False

    def activate_past_recording(self) -> None:
        """Keep recent tokens exact beyond the policy, so that a rejected draft can be cropped away."""
        self.recording = True
        for store in self.stores:
            store.settle()
            store.recording = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens; the argument is zero or negative. Raises CacheError beyond what is still exact."""
        # Up to 5.17 speculative decoding passes a tensor.
        tokens_to_remove = int(tokens_to_remove)
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass a negative number, the tokens to remove from the end.")
        count = -tokens_to_remove
        if count == 0 or not self.is_initialized:
            return
        if count >= self.length:
            # As a plain cache: nothing is left, and the next tokens are a prompt.
            self.reset()
            return
        # Pads among the columns were not stored.
        counts = [count] * self.batch if self.real is None else self.real[:, -count:].sum(1).tolist()
        for store in self.stores:
            store.crop(counts)
        self.length -= count
        self.real = None if self.real is None else self.real[:, : self.length]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices) -> None:
        """Take rows by whatever indexes a tensor; full pages are shared between copies of a row, never duplicated."""
        if not self.is_initialized:
            return
        if not isinstance(indices, torch.Tensor):
            indices = torch.arange(self.batch)[indices, ...].reshape(-1)
        if indices.dtype == torch.bool:
            indices = indices.nonzero().squeeze(1)
        for store in self.stores:
            store.select(indices)
        self.real = None if self.real is None else self.real[indices.to(self.real.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            rows = torch.arange(self.batch, device=self.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def offload(self) -> None:
        for store in self.stores:
            store.to(torch.device("cpu"))

    def prefetch(self) -> None:
        for store in self.stores:
            store.to(self.device)

    @property
    def nbytes(self) -> int:
        """Bytes held: pages, exact windows and sinks, allocated room included."""
        return sum(store.nbytes for store in self.stores)


def pack_cache(cache, plan: CachePlan, impl: str = "auto") -> None:
    """Replace, in place, the plain full-attention layers of a fresh DynamicCache by packed ones.

    ``impl``: what attends, a name of ``kvq.kernels.dispatch.IMPLEMENTATIONS``.
    """
    check_implementation(impl)
    context = ForwardContext(impl)
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layers += [DynamicLayer() for _ in range(len(cache.layers), len(plan.model.layers))]
    for index, groups in plan.layers.items():
        if index >= len(cache.layers):
            # The config has fewer layers for a while: the model drafts for itself with its first ones.
            continue
        layer = cache.layers[index]
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[index] = PackedLayer(groups, context)


def packed_layers(cache) -> list[PackedLayer]:
    """The packed layers of a cache; empty for any other object."""
    return [layer for layer in getattr(cache, "layers", ()) if isinstance(layer, PackedLayer)]


def implementations(cache) -> list[str]:
    """What attended to a cache's packed pages so far: ``triton``, ``cpp`` or ``reference``, each with the reason."""
    return sorted({str(ran) for layer in packed_layers(cache) for store in layer.stores for ran in store.ran})


def cache_nbytes(cache: Cache) -> int:
    """Measured bytes of any transformers cache: packed storage, plain tensors, and the states of layers that have no
    keys and values (linear attention, convolutions)."""
    return sum(layer.nbytes if isinstance(layer, PackedLayer) else _tensor_bytes(vars(layer)) for layer in cache.layers)


def _tensor_bytes(held) -> int:
    """Bytes of the tensors in nested lists, tuples and mappings."""
    if isinstance(held, torch.Tensor):
        return held.nbytes
    if isinstance(held, Mapping):
        held = held.values()
    elif not isinstance(held, list | tuple):
        return 0
    return sum(_tensor_bytes(part) for part in held)
