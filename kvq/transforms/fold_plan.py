"""What folds where: the first steps of every chain that a model's weights can take over, and why others cannot.

A step is folded on both sides or not at all, so that a folded checkpoint is an ordinary model with the outputs of the
original, whoever runs it. Nothing is decided by a step's name: its matrix is tried against the model.

    keys     k' = k P and q' = q P^-T come out of the projections if P commutes with the rotary embedding, which is
             tried with the model's own; behind a norm, if its weight can take P, that is if P is a scale
    values   v' = v P and o = o' P^-1 always fold, unless something stands between (a gate, a norm)
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from kvq.models.architecture import Attention, Norm, Projection
from kvq.models.names import TensorNames
from kvq.models.rope import Rope
from kvq.transforms.chain import Chain, Step
from kvq.transforms.fold import Columns, Gamma, Operation, Rows, Scale

# Some families rotate in float32 whatever they are given.
_TOLERANCE = 1e-6
_POSITIONS = (0, 1, 2, 5, 17, 100, 4001)


@dataclass(frozen=True, kw_only=True)
class FoldPlan:
    """What an export does to weights.

    folded       by layer and side, how many of the first steps are folded; sides without any are absent.
    left         by layer and side, why the next step is not; sides whose steps all fold are absent.
    operations   by tensor name, as the checkpoint has it.
    """

    folded: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    left: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    operations: Mapping[str, tuple[Operation, ...]] = field(default_factory=dict)


def plan_folds(
    chains: Mapping[int, Mapping[str, Chain]],
    head_dims: Mapping[int, int],
    attention: Mapping[int, Attention],
    rope: Rope | str,
    tensors: Iterable[str],
) -> FoldPlan:
    """Plan the folds of a model.

    chains      by layer and side, for all KV heads of the layer; head_dims: by layer.
    attention   ``kvq.models.architecture.describe_attention``.
    rope        the model's rotary embedding, or why there is none to try.
    tensors     names of the checkpoint's tensors.
    """
    names = TensorNames(tensors)
    folded, left, operations = {}, {}, {}
    for index, sides in chains.items():
        for side, chain in sides.items():
            if not chain.steps:
                continue
            layer = _Layer(attention.get(index), side, _kv_heads(attention.get(index)), head_dims[index], rope)
            count, reason = layer.foldable(chain)
            found = layer.operations(chain.first(count)) if count else {}
            missing = [name for name in found if names.find(name) is None]
            if missing:
                count, reason, found = 0, f"the checkpoint has no tensor {missing[0]!r}", {}
            if count:
                folded.setdefault(index, {})[side] = count
            if reason:
                left.setdefault(index, {})[side] = reason
            for name, own in found.items():
                operations.setdefault(names.find(name), []).extend(own)
    return FoldPlan(folded=folded, left=left, operations={name: tuple(own) for name, own in operations.items()})


def _kv_heads(attention: Attention | None) -> int:
    return len(attention.key.heads) if attention and attention.key else 0


class _Layer:
    """One side of one layer: which steps fold, and into what."""

    def __init__(self, attention: Attention | None, side: str, heads: int, head_dim: int, rope: Rope | str):
        self.attention, self.side, self.heads, self.head_dim, self.rope = attention, side, heads, head_dim, rope

    def foldable(self, chain: Chain) -> tuple[int, str | None]:
        """How many of the first steps fold, and why the next one does not."""
        obstacle = "kvq does not know this layer" if self.attention is None else self._obstacle()
        for count, step in enumerate(chain.steps):
            reason = obstacle or (self._key_reason(step) if self.side == "key" else self._value_reason(step))
            if reason:
                return count, reason
        return len(chain.steps), None

    def _obstacle(self) -> str | None:
        found = self.attention.obstacles.get(self.side)
        if found is None and self.side == "value" and self.attention.gate:
            return "a gate multiplies the attention output channel by channel"
        return found

    def _key_reason(self, step: Step) -> str | None:
        if step.stays:
            return step.stays
        if self._moves(step):
            return "it is subtracted after the rotary embedding"
        matrix, norm = self._matrix(step.forward), self.attention.key_norm
        if self.attention.rotary:
            if isinstance(self.rope, str):
                return self.rope
            if not _commutes(matrix, self.rope):
                kind = "its scale differs within a rotary pair" if _is_diagonal(matrix) else "it mixes rotary pairs"
                return f"{kind}, so it does not commute with the rotary embedding"
        for norm in (self.attention.key_norm, *self.attention.query_norm.values()):
            reason = norm and _norm_reason(norm, matrix)
            if reason:
                return reason
        return None

    def _value_reason(self, step: Step) -> str | None:
        if step.stays:
            return step.stays
        if self._moves(step):
            return "it is subtracted, and the output projection has no place to add it again"
        if self.attention.value_norm is not None:
            matrix = self._matrix(step.forward)
            unit = torch.eye(self.head_dim, dtype=torch.float64)
            if not self.attention.value_norm.rotates:
                return "a norm with a weight stands between the value projection and the cache"
            # Numbers that calibration stored are rounded to float32.
            if not torch.allclose(matrix @ matrix.transpose(-1, -2), unit.expand_as(matrix), atol=1e-6):
                return "a norm stands between the value projection and the cache, which undoes all but rotations"
        return None

    def _moves(self, step: Step) -> bool:
        return bool(step.forward(torch.zeros(self.heads, 1, self.head_dim, dtype=torch.float64)).any())

    def _matrix(self, function) -> torch.Tensor:
        """The matrices [K, D, D] of a linear function of row vectors."""
        unit = torch.eye(self.head_dim, dtype=torch.float64)
        return function(unit.expand(self.heads, self.head_dim, self.head_dim))

    def operations(self, chain: Chain) -> dict[str, list[Operation]]:
        """Operations by tensor name."""
        found: dict[str, list[Operation]] = {}
        layer = self.attention
        if self.side == "value":
            _add_rows(found, layer.value, self._matrix(chain.forward))
            inverse = self._matrix(chain.inverse)
            for projection in layer.output.values():
                own = inverse.repeat_interleave(len(projection.heads) // self.heads, dim=0)
                found.setdefault(projection.weight, []).extend(_blocks(projection.heads, own, 1))
            return found
        forward, query = self._matrix(chain.forward), self._matrix(chain.transform_query)
        if layer.key_norm is None:
            _add_rows(found, layer.key, forward)
        else:
            _add_gamma(found, layer.key_norm, forward)
        for reader, projection in layer.query.items():
            own = query.repeat_interleave(len(projection.heads) // self.heads, dim=0)
            norm = layer.query_norm.get(reader)
            if norm is None:
                _add_rows(found, projection, own)
            else:
                _add_gamma(found, norm, own)
        return found


def _add_rows(found: dict[str, list[Operation]], projection: Projection, matrices: torch.Tensor) -> None:
    for name in filter(None, (projection.weight, projection.bias)):
        found.setdefault(name, []).extend(_blocks(projection.heads, matrices, 0))


def _blocks(heads: Sequence[slice], matrices: torch.Tensor, axis: int) -> Iterator[Operation]:
    """Operations by which each head's row vectors are multiplied by its matrix [H, D, D]; ``axis`` as of ``Scale``."""
    if not _is_diagonal(matrices):
        for span, matrix in zip(heads, matrices, strict=True):
            yield (Columns if axis else Rows)(span, matrix.T)
        return
    factors, first = matrices.diagonal(dim1=-2, dim2=-1), 0
    for last in range(1, len(heads) + 1):
        # Heads that lie side by side are one block.
        if last == len(heads) or heads[last].start != heads[last - 1].stop:
            yield Scale(slice(heads[first].start, heads[last - 1].stop), factors[first:last].flatten(), axis)
            first = last


def _add_gamma(found: dict[str, list[Operation]], norm: Norm, matrices: torch.Tensor) -> None:
    factor = matrices.diagonal(dim1=-2, dim2=-1)
    factor = factor[0] if norm.shared else factor.flatten()
    found[norm.weight] = [Gamma(factor, norm.offset)]
    if norm.bias is not None:
        found[norm.bias] = [Gamma(factor, 0)]


def _norm_reason(norm: Norm, matrix: torch.Tensor) -> str | None:
    if norm.weight is None:
        return "a norm without a usable weight stands between projection and cache"
    if not _is_diagonal(matrix):
        return "a norm stands between projection and cache, and its weight takes only scales"
    if norm.shared and not torch.allclose(matrix, matrix[:1].expand_as(matrix), rtol=_TOLERANCE, atol=0):
        return "the heads share the weight of a norm between projection and cache, and their scales differ"
    return None


def _is_diagonal(matrix: torch.Tensor) -> bool:
    return torch.equal(matrix, torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1)))


def _commutes(matrix: torch.Tensor, rope: Rope) -> bool:
    """True if rotating to a position and then P is the same as P and then rotating."""
    generator = torch.Generator().manual_seed(0)
    heads, size = matrix.shape[:2]
    x = torch.randn(1, heads, len(_POSITIONS), size, dtype=torch.float64, generator=generator)
    positions = torch.tensor([_POSITIONS])
    after, before = rope.rotate(x, positions) @ matrix, rope.rotate(x @ matrix, positions)
    return float((after - before).abs().max()) <= _TOLERANCE * float(after.abs().max())
