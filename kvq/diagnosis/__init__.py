"""What quantization would do to a model, told from statistics before anything is quantized."""

from kvq.diagnosis.causes import Cause, causes_of
from kvq.diagnosis.predict import Prediction, bit_errors, layers_of, predict
from kvq.diagnosis.tokens import LayerTokens
from kvq.diagnosis.verdict import CANDIDATES, Diagnosis, diagnose

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
