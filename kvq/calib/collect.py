"""Run a model over token windows, watch it, and join what every batch shows into statistics."""

from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedModel

from kvq.calib.data import DataIdentity
from kvq.calib.forward import look, measure, plan_layers
from kvq.calib.job import Job, Progress, refuse_missing, run_job, state_of
from kvq.calib.needs import DEFAULT_NEEDS
from kvq.calib.ranks import Ranks
from kvq.calib.stats import Stats, config_data
from kvq.models.describe import describe

RESERVOIR_BYTES = 512 * 2**20
ALONE = Ranks()


def collect(
    model: PreTrainedModel,
    windows: torch.Tensor,
    *,
    valid: torch.Tensor | None = None,
    needs: frozenset[str] = DEFAULT_NEEDS,
    strict: bool = False,
    batch_size: int = 8,
    seed: int = 0,
    reservoir_bytes: int = RESERVOIR_BYTES,
    progress: Progress | None = None,
    state_folder: str | Path | None = None,
    ranks: Ranks = ALONE,
    model_name: str = "",
    weights_fingerprint: str = "",
    data: DataIdentity | None = None,
) -> Stats | None:
    """Measure a model over token windows int64 [N, T].

    valid            bool [N, T], False for padding on either side; None: no padding.
    needs            what to measure (``kvq.calib.needs``).
    strict           refuse a need that this model cannot give; otherwise ``Stats.missing`` says why it is not there.
    batch_size       windows a forward; the model's head is not run.
    seed             of the windows that the reservoir keeps.
    reservoir_bytes  bytes of all layers' reservoirs together.
    progress         called with (windows done, windows in all) after each batch, and first with what was resumed.
    state_folder     where the state is kept while this runs and when it is stopped; the same call then continues and
                     gives the same statistics to the bit. Remove the folder when the result is safe.
    ranks            the processes that share the windows. All get the same arguments; only the first gets the result.
    model_name, weights_fingerprint, data   provenance, as in Stats.

    Raises DataError if activations are NaN or Inf, UnsupportedModelError if the model has no cache to measure.
    """
    spec = describe(model.config)
    job = Job.of(
        spec, windows, valid, needs, batch_size=batch_size, seed=seed, dtype=model.dtype,
        reservoir_bytes=reservoir_bytes,
    )  # fmt: skip
    plans = plan_layers(
        spec, look(model, job.lone, [layer.index for layer in spec.cached_layers]), job.needs, job.capacities
    )
    if strict:
        refuse_missing(plans)
    state = state_of(state_folder, job, model.config, weights_fingerprint)
    layers = run_job(job, ranks, state, lambda batch: measure(model, batch, plans), progress)
    if layers is None:
        return None
    return Stats(
        layers=dict(sorted(layers.items())),
        model=model_name or spec.model_type,
        model_fingerprint=spec.fingerprint,
        config=config_data(model.config),
        weights_fingerprint=weights_fingerprint,
        data=data,
        versions={package: version(package) for package in ("kvq-toolkit", "torch", "transformers")},
        # What some layer cannot give, and why.
        missing={need: why for plan in plans.values() for need, why in plan.missing.items()},
    )
