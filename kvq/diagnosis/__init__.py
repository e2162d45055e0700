"""What quantization would do to a model, told from statistics before anything is quantized."""

from kvq.diagnosis.causes import Cause, causes_of
from kvq.diagnosis.predict import Prediction, bit_errors, layers_of, predict
from kvq.diagnosis.recommendation import CANDIDATES, Diagnosis, diagnose
from kvq.diagnosis.sample_tokens import LayerTokens

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
