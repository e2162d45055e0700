"""What quantization would do to a model, told from statistics before anything is quantized."""

from kvq.calib.diagnosis.causes import Cause, causes_of
from kvq.calib.diagnosis.predict import Prediction, bit_errors, layers_of, predict
from kvq.calib.diagnosis.tokens import LayerTokens
from kvq.calib.diagnosis.verdict import CANDIDATES, Diagnosis, diagnose

__all__ = [
    "CANDIDATES",
    "Cause",
    "Diagnosis",
    "LayerTokens",
    "Prediction",
    "bit_errors",
    "causes_of",
    "diagnose",
    "layers_of",
    "predict",
]
