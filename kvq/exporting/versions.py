"""One forward of a checkpoint in several versions, which differ in some tensors, with one tensor in memory at a time.

The batch holds the rows of every version one after the other. A module whose tensors differ takes each version's rows
with that version's tensors; all other modules see the whole batch, so that whatever the versions share is read once and
multiplied once. Weights are read as their module runs and dropped after it: large linear layers by blocks of rows,
embeddings only where they are looked up.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from kvq.models.names import TensorNames, shared_layers
from kvq.models.resolve import load_config
from kvq.models.skeleton import without_weights
from kvq.models.stored import StoredTensor, tensors_of

# Numbers of a linear layer's weight that are in float32 at a time.
BLOCK = 1 << 19

# All versions of a tensor, given its name and what the checkpoint holds, in the checkpoint's dtype.
Versions = Callable[[str, torch.Tensor], Sequence[torch.Tensor]]


class CannotStream(Exception):
    """This model does not run tensor by tensor; the text says why."""


@torch.inference_mode()
def logits_of_versions(
    folder: Path, tokens: torch.Tensor, changed: frozenset[str], versions: Versions, count: int
) -> torch.Tensor:
    """Logits [count, B, T, vocabulary] in float32 of tokens [B, T], on the CPU.

    changed    names of the tensors, as the checkpoint has them, that differ between versions.
    versions   called once for each of them; gives ``count`` tensors of its shape.

    Raises CannotStream for models whose tensors are renamed or converted as they are loaded, or that use weights
    outside the module that owns them.
    """
    config = load_config(folder)
    model = without_weights(config, torch.float32)
    weights = _Weights(model, tensors_of(folder), changed, versions, count)
    with weights.on_demand():
        try:
            found = model(input_ids=tokens.repeat(count, 1), use_cache=False).logits
        except (NotImplementedError, RuntimeError) as error:
            if "meta" in str(error):
                raise CannotStream("some weights are used outside the module that owns them") from None
            raise
    unused = changed - weights.used
    if unused or found.is_meta:
        raise CannotStream(f"tensor {sorted(unused)[0]!r} was not used" if unused else "no logits were computed")
    return found.float().unflatten(0, (count, len(tokens)))


class _Weights:
    """Gives modules their weights while they run."""

    def __init__(
        self,
        model: PreTrainedModel,
        tensors: Mapping[str, StoredTensor],
        changed: frozenset[str],
        versions: Versions,
        count: int,
    ):
        self.model, self.changed, self.versions, self.count = model, changed, versions, count
        self.used: set[str] = set()
        if shared_layers(model.config.get_text_config(decoder=True)):
            raise CannotStream("some layers read the keys and values of another")
        if any(not isinstance(entry, WeightRenaming) for entry in get_model_conversion_mapping(model)):
            raise CannotStream("its tensors are converted as they are loaded")
        self.stored = _by_parameter(model, tensors)

    @contextmanager
    def on_demand(self) -> Iterator[None]:
        """Inside the block modules have their weights when, and only when, they run."""
        wrapped = [module for module in self.model.modules() if module._parameters]
        for module in wrapped:
            module.forward = partial(self._forward, module, module.forward)
        try:
            yield
        finally:
            for module in wrapped:
                del module.forward

    def _forward(self, module: torch.nn.Module, forward, *args, **kwargs):
        own = {name: self.stored[p] for name, p in module._parameters.items() if p is not None}
        differing = {name for name, tensor in own.items() if tensor.name in self.changed}
        if differing:
            return self._each(module, forward, own, differing, *args, **kwargs)
        if type(module) is torch.nn.Linear:
            bias = own["bias"].read() if "bias" in own else None
            return _linear(own["weight"].mapped(), bias, *args, **kwargs)
        if isinstance(module, torch.nn.Embedding):
            # Versions share it, so a product with a scale may as well be in the checkpoint's dtype.
            with _holding(module, {name: tensor.mapped() for name, tensor in own.items()}):
                return forward(*args, **kwargs).float()
        with _holding(module, {name: tensor.read().float() for name, tensor in own.items()}):
            return forward(*args, **kwargs)

    def _each(self, module, forward, own: Mapping[str, StoredTensor], differing: set[str], *args, **kwargs):
        """Each version's rows of the only input, with that version's weights."""
        if len(args) != 1 or kwargs or len(args[0]) % self.count:
            raise CannotStream(f"{type(module).__name__} takes more than one batch of rows")
        shared = {name: tensor.read().float() for name, tensor in own.items() if name not in differing}
        each = {name: self.versions(own[name].name, own[name].read()) for name in differing}
        self.used |= {own[name].name for name in differing}
        out = []
        for number, rows in enumerate(args[0].chunk(self.count)):
            tensors = shared | {name: found[number] for name, found in each.items()}
            if type(module) is torch.nn.Linear:
                out.append(_linear(tensors["weight"], tensors.get("bias"), rows))
                continue
            with _holding(module, tensors):
                out.append(forward(rows))
        return torch.cat(out)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """``nn.Linear`` in float32, whatever the weight's dtype."""
    rows, columns = weight.shape
    step = max(1, BLOCK // max(columns, 1))
    # Rows of the weight give rows of the result: products of few tokens are faster this way round.
    tokens = x.reshape(-1, columns).T
    out = x.new_empty(rows, tokens.shape[1])
    for first in range(0, rows, step):
        torch.mm(weight[first : first + step].float(), tokens, out=out[first : first + step])
    out = out.T.reshape(*x.shape[:-1], rows).contiguous()
    return out if bias is None else out + bias.float()


def _by_parameter(
    model: PreTrainedModel, tensors: Mapping[str, StoredTensor]
) -> dict[torch.nn.Parameter, StoredTensor]:
    """Every parameter's tensor. Raises CannotStream if one has none of its shape."""
    names = TensorNames(tensors)
    found: dict[torch.nn.Parameter, StoredTensor] = {}
    # A tied parameter has several names, of which the checkpoint has one.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tensor = tensors.get(names.find(name) or "")
        if tensor and tensor.dtype is not None and tensor.shape == tuple(parameter.shape):
            found.setdefault(parameter, tensor)
    lacking = [name for name, parameter in model.named_parameters() if parameter not in found]
    if lacking:
        raise CannotStream(f"the checkpoint has no tensor of the name and shape of {lacking[0]!r}")
    return found


@contextmanager
def _holding(module: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """The module has these weights inside the block."""
    kept = {name: module._parameters[name] for name in weights}
    module._parameters.update({n: torch.nn.Parameter(w, requires_grad=False) for n, w in weights.items()})
    try:
        yield
    finally:
        module._parameters.update(kept)
