"""Before an export is written: does the model with folded transforms give the logits of the original?

The original runs on a few tokens in float32; then every tensor is folded in memory, from the same operations that are
applied to the files, and it runs again. What separates the two is a mistake in a fold, since in exact arithmetic they
are the same model. Rounding to the checkpoint's dtype comes afterwards and is reported, not judged: it moves each
weight by up to half a unit in its last place, as any change to a 16-bit checkpoint does. What random changes of that
size do to the same weights is reported beside it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kvq.errors import CheckpointError
from kvq.models.names import TensorNames
from kvq.models.resolve import load_model
from kvq.transforms.fold import Operation, fold

BOUND = 1e-4
ROWS, TOKENS = 2, 24


@dataclass(frozen=True, kw_only=True)
class FoldCheck:
    """What the check found on ``tokens`` tokens.

    error      largest difference of a logit over the largest logit, in float32; at most ``BOUND``.
    kl, top1   KL(original || folded) in nats a token and share of equal best tokens, weights rounded to their dtype.
    noise_kl   KL(original || original with the same weights moved at random by up to half a unit in the last place).
    """

    error: float
    kl: float
    top1: float
    noise_kl: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_folds(
    source: Path, operations: Mapping[str, tuple[Operation, ...]], dtype: torch.dtype, bound: float = BOUND
) -> FoldCheck:
    """Compare logits. Raises CheckpointError if they differ by more than ``bound``.

    dtype   of the checkpoint.
    """
    model = load_model(source, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (ROWS, TOKENS), generator=generator).to(model.device)
    exact = _logits(model, tokens)
    parameters = _parameters(model, operations)
    noisy = _with_noise(model, parameters, dtype, tokens, generator)
    for name, own in operations.items():
        parameters[name].data.copy_(fold(parameters[name].data.cpu(), own))
    found = _logits(model, tokens)
    error = float((found - exact).abs().max() / exact.abs().max())
    if not error <= bound:
        raise CheckpointError(
            f"the model with folded transforms gives other logits than the original (relative difference {error:.1e}, "
            f"and {bound:.0e} is allowed), so nothing was written: this model does something to keys or values that "
            "kvq does not know; add --no-fold to apply the transforms while it runs."
        )
    for parameter in parameters.values():
        parameter.data.copy_(parameter.data.to(dtype))
    rounded = _logits(model, tokens)
    kl, top1 = _divergence(exact, rounded)
    return FoldCheck(error=error, kl=kl, top1=top1, noise_kl=_divergence(exact, noisy)[0], tokens=tokens.numel())


def _with_noise(
    model, parameters, dtype: torch.dtype, tokens: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Logits with every number of the parameters moved by up to half a unit in its last place, and back."""
    kept = {name: parameter.data.clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        weight = parameter.data
        unit = torch.ldexp(torch.full_like(weight, torch.finfo(dtype).eps / 2), torch.frexp(weight).exponent)
        weight += unit * (torch.rand(weight.shape, generator=generator) - 0.5).to(weight)
    noisy = _logits(model, tokens)
    for name, parameter in parameters.items():
        parameter.data.copy_(kept[name])
    return noisy


def _divergence(exact: torch.Tensor, found: torch.Tensor) -> tuple[float, float]:
    """KL(exact || found) in nats a token, and the share of equal best tokens."""
    before, after = exact.double().log_softmax(-1), found.double().log_softmax(-1)
    kl = float((before.exp() * (before - after)).sum(-1).mean().clamp_min(0))
    return kl, float((before.argmax(-1) == after.argmax(-1)).double().mean())


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


@torch.inference_mode()
def _logits(model, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, use_cache=False).logits.float()
