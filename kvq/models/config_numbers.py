"""What a config must say before anything is built from it: numbers where numbers belong, and sizes that can be."""

from collections.abc import Mapping
from typing import Any

from kvq.errors import CheckpointError

# Largest of each, far above any model: what is larger would be built for hours, or fill the memory.
LARGEST = {
    "num_hidden_layers": 10_000,
    "num_attention_heads": 100_000,
    "num_key_value_heads": 100_000,
    "head_dim": 100_000,
    "hidden_size": 10_000_000,
    "intermediate_size": 100_000_000,
    "vocab_size": 100_000_000,
    "max_position_embeddings": 1 << 40,
}
# Parts that are tables of their own.
_TABLES = ("text_config", "vision_config", "quantization_config", "rope_scaling", "rope_parameters")
_WAY_OUT = "mend config.json, or copy or download the model again."


def check_numbers(config: Mapping[str, Any], name: str) -> None:
    """Raise CheckpointError for the first field of a config, its text part included, that no model can have.

    What is missing or null has a default, and a list says it layer by layer; both are left to transformers.
    """
    if not isinstance(config.get("model_type"), str | None):
        raise CheckpointError(f"config.json of {name!r} says model_type={config['model_type']!r}, no name: {_WAY_OUT}")
    for field in _TABLES:
        value = config.get(field)
        if value is not None and not isinstance(value, Mapping):
            raise CheckpointError(
                f"config.json of {name!r} says {field}={_short(value)}, where a table of settings belongs: {_WAY_OUT}"
            )
    for field, largest in LARGEST.items():
        value = config.get(field)
        if value is None or isinstance(value, list | tuple):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
            raise CheckpointError(
                f"config.json of {name!r} says {field}={_short(value)}: it must be a whole number from 1 to "
                f"{largest:,}; {_WAY_OUT}"
            )
    text = config.get("text_config")
    if text is not None:
        check_numbers(text, name)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
