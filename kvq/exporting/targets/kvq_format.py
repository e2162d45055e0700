"""The target ``kvq``: kvq's own format (``kvq.exporting.checkpoint``), which transformers loads after import kvq."""

from pathlib import Path

from kvq.exporting.checkpoint import QUANT_METHOD, build_config, shard_index, side_files, to_json
from kvq.exporting.manifest import QUICK_BYTES
from kvq.exporting.memory import memory_plan
from kvq.exporting.model_card import model_card
from kvq.exporting.targets.base import Job, Target
from kvq.models.resolve import INDEX_FILE, check_weights


def contents(target: Target, job: Job) -> dict[str, bytes]:
    side = side_files(job.plan, job.artefacts, job.provenance)
    ours = build_config(job.plan, weights_fingerprint=job.weights, files=side, copied=tuple(job.companions))
    card = model_card(job.plan, memory_plan(job.plan.model, job.plan.recipe), job.provenance, job.licence)
    return {
        "config.json": to_json({**job.config, "quantization_config": ours}),
        INDEX_FILE: shard_index(job.source),
        **side,
        "README.md": card.encode(),
    }


def weights(source: Path) -> dict[str, Path]:
    return {file.name: file for file in check_weights(source)}


KVQ = Target(
    name="kvq",
    summary="kvq's own format: any recipe, loaded by transformers after 'import kvq'",
    engines=("transformers",),
    formats={None: QUANT_METHOD},
    contents=contents,
    weights=weights,
    sliding=False,
    hash_limit=QUICK_BYTES,
)
