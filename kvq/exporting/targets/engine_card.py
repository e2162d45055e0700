"""The model card of an engine target: what is in the folder, and the exact command that serves it."""

from collections.abc import Mapping

import torch

from kvq.exporting.engines import Release, find_release
from kvq.exporting.model_card import front_matter, provenance_table, recipe_table, with_front_matter
from kvq.exporting.targets.base import Job, Target
from kvq.exporting.targets.scheme import Scheme

_BODY = """
# {base} with calibrated FP8 KV scales

The weights are those of `{base}`, {weights}.
Beside them lie {count} scales for an FP8 cache of keys and values, one a {granularity}, measured on text.
Engines take scales from the checkpoint or use 1.0: keys beyond 448 would then be clipped, and small values would lose
most of their digits.

## Serve it

{commands}

`kvq check {folder}` says, without the engine, whether it will load and whether every scale is found. With `--run` it
starts the engine, where one is installed, and compares its answers with kvq's own simulation.
{notes}
## Recipe

{recipe_table}

A stored number is `value / scale`, rounded to E4M3. Scales lie in `kv_scales.safetensors`; the largest is
{largest:.4g} for keys and {largest_value:.4g} for values. The cache takes one byte a number instead of two.

## Provenance

{provenance_table}

`kvq/provenance.json` has the rest, and `kvq/manifest.json` the SHA-256 of every file.
"""


def engine_card(target: Target, job: Job, scheme: Scheme, method: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write the card. ``method``: the quant_method that is written; ``tensors``: the scales by name."""
    base = job.provenance["base_model"]
    front = front_matter(base, job.licence, ["kvq", "kv-cache", "fp8", target.name])
    body = _BODY.format(
        base=base,
        weights=_weights(job),
        count=len(tensors),
        granularity="layer and side" if scheme.granularity == "tensor" else "head and side",
        commands="\n\n".join(_command(engine, job, scheme, method) for engine in target.engines),
        folder=job.folder,
        notes=_notes(scheme),
        recipe_table=recipe_table(job.plan),
        largest=max(float(sides["key"].max()) for sides in scheme.scales.values()),
        largest_value=max(float(sides["value"].max()) for sides in scheme.scales.values()),
        provenance_table=provenance_table(job.provenance),
    )
    return with_front_matter(front, body)


def _weights(job: Job) -> str:
    repacked = job.provenance.get("repacked_from")
    if repacked:
        return f"code for code and scale for scale,\nin the layout of compressed-tensors instead of {repacked!r}"
    if job.check is None:
        return "unchanged"
    return (
        f"with the transforms below folded in. Checked when it was exported:\nin float32 the logits differ by at most "
        f"{job.check.error:.1e} of the largest; rounded to {str(job.model.dtype).removeprefix('torch.')}, KL "
        f"{job.check.kl:.1e} nats a token"
    )


def _command(engine: str, job: Job, scheme: Scheme, method: str) -> str:
    release = find_release(engine)
    reader = release.readers.get(method)
    if reader is None:
        return f"{release.title}: {release.refused.get(method, 'does not load it')}."
    if scheme.granularity == "head" and reader.head is None:
        return f"{release.title}: reads one scale a layer only."
    if scheme.skipped and not release.skip_flag:
        return f"{release.title}: cannot keep single layers in 16 bits."
    language = "python" if engine == "transformers" else "bash"
    command = release.command(job.folder, reader.flag, scheme.skipped)
    return f"{release.title}{_condition(release, method, scheme)}:\n\n```{language}\n{command}\n```"


def _condition(release: Release, method: str, scheme: Scheme) -> str:
    reader = release.readers[method]
    where = getattr(reader, scheme.granularity)
    package = f"with the package {reader.package}" if reader.package else ""
    parts = [part for part in (where, package) if part]
    return f" ({'; '.join(parts)})" if parts else ""


def _notes(scheme: Scheme) -> str:
    exact = [f"Layers {', '.join(map(str, scheme.exact))}"] if scheme.exact else []
    return "".join(
        f"\n{layers} have no scales: the flag above keeps them in 16 bits, and without it they would be stored at a "
        "scale of 1.0.\n"
        for layers in exact + (["Sliding-window layers"] if scheme.windows else [])
    )
