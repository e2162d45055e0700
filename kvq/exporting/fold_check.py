"""As an export is written: does the model with folded transforms give the logits of the original?

The original runs on a few tokens in float32, and beside it the model whose tensors are folded, in one go with those for
the files. What separates the two is a mistake in a fold, since in exact arithmetic they are the same model. Rounding to
the checkpoint's dtype is reported, not judged: it moves each weight by up to half a unit in its last place, as any
change to a 16-bit checkpoint does. What random changes of that size do to the same weights is reported beside it.

All four run at once, with one tensor in memory at a time (``versions.py``). Models that cannot run so are loaded whole,
and run one version after the other.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kvq.errors import CheckpointError
from kvq.exporting.versions import CannotStream, logits_of_versions
from kvq.models.names import TensorNames
from kvq.models.resolve import load_config, load_model
from kvq.transforms.fold import Operation, fold

BOUND = 1e-4
ROWS, TOKENS = 1, 16
# Versions of the model, in the order in which they are run.
EXACT, FOLDED, ROUNDED, NOISY = range(4)
# Odd, so that rows of a weight do not all meet the same random numbers.
_RANDOM = (1 << 16) + 1


@dataclass(frozen=True, kw_only=True)
class FoldCheck:
    """What the check found on ``tokens`` tokens.

    error      largest difference of a logit over the largest logit, in float32; at most ``BOUND``.
    kl, top1   KL(original || folded) in nats a token and share of equal best tokens, weights rounded to their dtype.
    noise_kl   KL(original || original with the same weights moved at random by up to half a unit in the last place).
    loaded     why the whole model was in memory for it; None if one tensor at a time was enough.
    """

    error: float
    kl: float
    top1: float
    noise_kl: float
    tokens: int
    loaded: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_folds(
    source: Path,
    operations: Mapping[str, tuple[Operation, ...]],
    dtype: torch.dtype,
    put: Callable[[str, torch.Tensor], None] | None = None,
    bound: float = BOUND,
) -> FoldCheck:
    """Compare logits. Raises CheckpointError if they differ by more than ``bound``.

    dtype   in which the model runs.
    put     takes tensors as they are folded, by name and in the dtype of the file, so that nothing is folded twice. Not
            of a model that is loaded whole, whose tensors have another form, perhaps after some have been taken.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = load_config(source).get_text_config(decoder=True).vocab_size
    tokens = torch.randint(vocabulary, (ROWS, TOKENS), generator=generator)
    random, loaded = torch.rand(_RANDOM, generator=generator) - 0.5, None
    try:
        versions = _versions(operations, dtype, random, put)
        logits = logits_of_versions(source, tokens, frozenset(operations), versions, 4)
    except CannotStream as reason:
        versions = _versions(operations, dtype, random, None)
        logits, loaded = _logits_of_loaded(source, tokens, operations, versions), str(reason)
    exact, folded = logits[EXACT], logits[FOLDED]
    error = float((folded - exact).abs().max() / exact.abs().max())
    if not error <= bound:
        raise CheckpointError(
            f"the model with folded transforms gives other logits than the original (relative difference {error:.1e}, "
            f"and {bound:.0e} is allowed), so nothing is written: this model does something to keys or values that "
            "kvq does not know; add --no-fold to apply the transforms while it runs."
        )
    (kl, top1), (noise_kl, _) = _divergences(exact, logits[[ROUNDED, NOISY]])
    return FoldCheck(error=error, kl=kl, top1=top1, noise_kl=noise_kl, tokens=tokens.numel(), loaded=loaded)


def _versions(
    operations: Mapping[str, tuple[Operation, ...]],
    dtype: torch.dtype,
    random: torch.Tensor,
    put: Callable[[str, torch.Tensor], None] | None,
) -> Callable[[str, torch.Tensor], tuple[torch.Tensor, ...]]:
    """The four versions of a tensor, in float32."""

    def versions(name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        exact = tensor.float()
        # Float64 is not rounded for the file by way of float32.
        folded = fold(tensor, operations[name], torch.promote_types(tensor.dtype, torch.float32))
        stored, folded = folded.to(tensor.dtype), folded.float()
        if put is not None:
            put(name, stored)
        return exact, folded, stored.to(dtype).float(), _moved(exact, dtype, random)

    return versions


def _moved(weight: torch.Tensor, dtype: torch.dtype, random: torch.Tensor) -> torch.Tensor:
    """Every number of a float32 weight moved by up to half a unit in its last place, were it of ``dtype``."""
    flat = weight.flatten()
    moved = torch.empty_like(flat)
    for part, out in zip(flat.split(len(random)), moved.split(len(random))):
        # Sign and exponent alone are the power of two at or below a number, which the unit is ``eps`` times.
        powers = (part.view(torch.int32) & ~0x7FFFFF).view(torch.float32)
        torch.addcmul(part, powers, random[: len(part)], value=torch.finfo(dtype).eps, out=out)
    return moved.view_as(weight)


def _divergences(exact: torch.Tensor, found: torch.Tensor) -> list[tuple[float, float]]:
    """KL(exact || found) in nats a token, and the share of equal best tokens, of each of several versions."""
    before = exact.double().log_softmax(-1)
    results = []
    for version in found:
        after = version.double().log_softmax(-1)
        kl = float((before.exp() * (before - after)).sum(-1).mean().clamp_min(0))
        results.append((kl, float((exact.argmax(-1) == version.argmax(-1)).double().mean())))
    return results


@torch.inference_mode()
def _logits_of_loaded(source: Path, tokens: torch.Tensor, operations, versions) -> torch.Tensor:
    """What ``logits_of_versions`` gives, of a model that is loaded whole."""
    model = load_model(source, dtype=torch.float32)
    parameters = _parameters(model, operations)
    each = {name: versions(name, parameter.data.cpu()) for name, parameter in parameters.items()}
    found = []
    for number in (EXACT, FOLDED, ROUNDED, NOISY):
        for name, parameter in parameters.items():
            parameter.data.copy_(each[name][number])
        found.append(model(input_ids=tokens.to(model.device), use_cache=False).logits.float().cpu())
    return torch.stack(found)


def _parameters(model, operations: Mapping[str, tuple[Operation, ...]]) -> dict[str, torch.nn.Parameter]:
    """The model's parameters by the checkpoint's names."""
    held = dict(model.named_parameters())
    names = TensorNames(held)
    missing = [name for name in operations if names.find(name) is None]
    if missing:
        raise CheckpointError(
            f"tensor {missing[0]!r} goes by another name in the loaded model, so folding it cannot be checked: add "
            "--no-fold."
        )
    return {name: held[names.find(name)] for name in operations}
