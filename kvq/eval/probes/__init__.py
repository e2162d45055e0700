"""kvq's own tasks with questions: texts that are generated offline, from a seed, for any tokenizer."""

from kvq.eval.probes.base import Probe
from kvq.eval.probes.copies import CopyCode, CopyJson
from kvq.eval.probes.drift import Drift
from kvq.eval.probes.multi_key import MultiKey
from kvq.eval.probes.needle import Needle
from kvq.eval.probes.variable_tracking import VariableTracking

__all__ = ["PROBES", "Probe"]

PROBES = {own.name: own() for own in (Needle, MultiKey, VariableTracking, CopyJson, CopyCode, Drift)}
