"""kvq's own tasks with questions: texts that are generated offline, from a seed, for any tokenizer."""

from kvq.eval.probes import copy_code, copy_json, drift, multi_key, needle, variable_tracking
from kvq.eval.probes.base import Probe

__all__ = ["PROBES", "Probe"]

PROBES = {
    module.PROBE.name: module.PROBE for module in (needle, multi_key, variable_tracking, copy_json, copy_code, drift)
}
