"""Where a checkpoint keeps each decoder layer's attention, read from the names of its own tensors.

Serving engines look for KV scales beside an attention module's weights, and module names differ between families and
between a text model and the same model inside a vision-language one.
"""

import re
from collections.abc import Iterable

from transformers import PretrainedConfig

from kvq.errors import UnsupportedModelError

# A projection of an attention module: model.layers.3.self_attn.k_proj.weight, ....attention.query_key_value.weight
_PROJECTION = re.compile(
    r"(?P<before>(?:.*\.)?(?:layers|h|blocks|block))\.(?P<layer>\d+)\.(?P<module>[\w.]+?)\."
    r"(?:k_proj|v_proj|qkv_proj|q_proj|query_key_value|c_attn|qkv|Wqkv)\.[\w.]+"
)
# Stacks of layers that are not the decoder: towers of other media, and extra layers that predict several tokens.
_OTHER_STACKS = re.compile(r"(?i)(vision|visual|audio|image|speech|encoder|mtp|nextn|draft|resampler|perceiver)")
_STACK = "layers."


def attention_modules(tensors: Iterable[str], layers: Iterable[int]) -> dict[int, str]:
    """Full name of the attention module of each wanted layer, such as ``model.layers.3.self_attn``.

    tensors   names of a checkpoint's tensors.
    layers    indices of the layers that have attention.

    Raises UnsupportedModelError if a layer has none or several.
    """
    wanted = sorted(set(layers))
    found: dict[int, set[str]] = {index: set() for index in wanted}
    for name in tensors:
        match = _PROJECTION.fullmatch(name)
        if match and not _OTHER_STACKS.search(name) and int(match["layer"]) in found:
            found[int(match["layer"])].add(f"{match['before']}.{match['layer']}.{match['module']}")
    for index in wanted:
        if len(found[index]) != 1:
            what = f"several attention modules ({', '.join(sorted(found[index]))})" if found[index] else "none"
            raise UnsupportedModelError(
                f"the attention of layer {index} cannot be told from the names of the weights: found {what}, so there "
                "is no place for its KV scales; use --target kvq."
            )
    return {index: found[index].pop() for index in wanted}


def shared_layers(config: PretrainedConfig) -> dict[int, int]:
    """Layers that read another layer's keys and values (Gemma 3n, Gemma 4), by index, with the layer they read.

    config   of the text model.
    """
    count = getattr(config, "num_kv_shared_layers", None) or 0
    if not count:
        return {}
    types = list(config.layer_types)
    first = len(types) - count
    return {
        reader: max(index for index in range(first) if types[index] == types[reader])
        for reader in range(first, len(types))
    }


class TensorNames:
    """Tensors of a checkpoint by the names of the text model, which may lie deeper in it."""

    def __init__(self, tensors: Iterable[str]):
        self.tensors = set(tensors)
        self._by_end: dict[str, list[str]] = {}
        for name in self.tensors:
            if _STACK in name and not _OTHER_STACKS.search(name):
                self._by_end.setdefault(name[name.index(_STACK) :], []).append(name)

    def find(self, name: str) -> str | None:
        """The checkpoint's name of a tensor; None if there is none, or more than one that could be meant."""
        if name in self.tensors:
            return name
        found = self._by_end.get(name[name.index(_STACK) :], []) if _STACK in name else []
        return found[0] if len(found) == 1 else None
