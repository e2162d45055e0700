"""GPTQ and AWQ weights in the layout of compressed-tensors, code for code and scale for scale.

Engines give attention layers beside GPTQ or AWQ weights nothing to load KV scales into, and do so beside
compressed-tensors weights. Both stand for ``w = (code - zero) * scale`` in groups along the input; only the order in
memory differs, so nothing is rounded.

    GPTQ    qweight [in / n, out] packs n codes along the input; qzeros [groups, out / n] hold zero - 1 (``gptq_v2``:
            zero); scales [groups, out].
    AWQ     qweight [in, out / 8] and qzeros [groups, out / 8] pack eight codes of the output, in the order 0 2 4 6 1 3
            5 7.
    here    weight_packed [out, in / n], weight_scale [out, groups], weight_zero_point [out / n, groups]; codes and
            zeros are counted from the middle, 2^(bits - 1).
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kvq.errors import CheckpointError
from kvq.exporting.checkpoint import quantization_of, shard_index, to_json
from kvq.exporting.targets.engine import merged_config
from kvq.models.resolve import INDEX_FILE, check_weights
from kvq.models.stored import StoredTensor, tensors_of

METHODS = ("gptq", "awq")
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PACKED = ("qweight", "qzeros", "scales", "g_idx")


def repack(source: Path, work: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Write the weights of ``source`` to ``work``, with an index, and return the config that belongs to them.

    config   config.json of ``source``, whose weights one of METHODS has quantized.

    Raises CheckpointError for what the other layout cannot say: an order of columns (``desc_act``), bits other than 4
    and 8, or AWQ's layouts for single kernels.
    """
    layout = _Layout(source.name, quantization_of(config))
    held = tensors_of(source)
    modules = sorted(name.removesuffix(".qweight") for name in held if name.endswith(".qweight"))
    if not modules:
        raise CheckpointError(f"model {source.name!r} says {layout.method!r} and holds no qweight: download it again.")
    symmetric = all(layout.is_symmetric(_parts(held, module)) for module in modules)
    for file in check_weights(source):
        save_file(dict(_converted(file, held, layout, symmetric)), work / file.name, metadata={"format": "pt"})
    (work / INDEX_FILE).write_bytes(shard_index(work))
    ours = merged_config(config, layout.scheme(symmetric, _ignored(held, modules)))
    (work / "config.json").write_bytes(to_json(ours))
    return ours


class _Layout:
    """How one checkpoint's codes are packed, from its ``quantization_config``."""

    def __init__(self, model: str, fields: Mapping[str, Any]):
        self.model, self.method = model, fields["quant_method"]
        self.bits = fields.get("bits", fields.get("w_bit"))
        self.group = fields.get("group_size", fields.get("q_group_size", -1))
        # The older form of GPTQ stores a zero less one.
        older = fields.get("checkpoint_format", "gptq") == "gptq"
        self.offset = int(self.method == "gptq" and older)
        version = str(fields.get("version", "gemm")).lower()
        if self.bits not in ((4, 8) if self.method == "gptq" else (4,)):
            self._refuse(f"{self.bits!r} bits")
        if self.method == "gptq" and fields.get("checkpoint_format", "gptq") not in ("gptq", "gptq_v2"):
            self._refuse(f"checkpoint_format {fields['checkpoint_format']!r}")
        if self.method == "awq" and version != "gemm":
            self._refuse(f"version {version!r}")

    def is_symmetric(self, parts: Mapping[str, torch.Tensor]) -> bool:
        """True if every zero of a module is the middle of the codes."""
        return bool((self._zeros(parts) == 1 << (self.bits - 1)).all())

    def convert(self, module: str, parts: Mapping[str, torch.Tensor], symmetric: bool) -> dict[str, torch.Tensor]:
        """The tensors of a module in the new layout, by their last name."""
        pack_to_int32 = _packer()
        middle = 1 << (self.bits - 1)
        codes, scales = self._codes(parts), parts["scales"]
        inputs, outputs = codes.shape
        self._check_order(module, parts, inputs, scales.shape[0])
        found = {
            "weight_packed": pack_to_int32((codes.T - middle).to(torch.int8), self.bits),
            "weight_scale": scales.T.contiguous(),
            "weight_shape": torch.tensor([outputs, inputs], dtype=torch.int64),
        }
        if not symmetric:
            zeros = (self._zeros(parts).T - middle).to(torch.int8)
            found["weight_zero_point"] = pack_to_int32(zeros, self.bits, packed_dim=0).contiguous()
        return found

    def scheme(self, symmetric: bool, ignored: list[str]) -> dict[str, Any]:
        """The ``quantization_config`` of the new layout."""
        by_group = self.group > 0
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": symmetric,
            "strategy": "group" if by_group else "channel",
            "group_size": self.group if by_group else None,
            "dynamic": False,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": ignored,
        }

    def _codes(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Codes [in, out], 0 to 2^bits - 1."""
        if self.method == "awq":
            return self._unpack_awq(parts["qweight"])
        return _unpack(parts["qweight"].T.contiguous(), self.bits).T

    def _zeros(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Zeros [groups, out], 0 to 2^bits - 1."""
        if self.method == "awq":
            return self._unpack_awq(parts["qzeros"])
        return (_unpack(parts["qzeros"], self.bits) + self.offset) & ((1 << self.bits) - 1)

    def _unpack_awq(self, packed: torch.Tensor) -> torch.Tensor:
        stored = _unpack(packed, self.bits).view(len(packed), -1, len(_AWQ_ORDER))
        plain = torch.empty_like(stored)
        plain[..., list(_AWQ_ORDER)] = stored
        return plain.flatten(1)

    def _check_order(self, module: str, parts: Mapping[str, torch.Tensor], inputs: int, groups: int) -> None:
        order = parts.get("g_idx")
        if order is not None and not torch.equal(order.long(), torch.arange(inputs) // (inputs // groups)):
            self._refuse(f"an order of columns (desc_act) in {module!r}")

    def _refuse(self, what: str) -> None:
        raise CheckpointError(
            f"model {self.model!r} has {self.method!r} weights with {what}, which compressed-tensors cannot say for "
            "engines, and beside these weights as they are no engine reads KV scales: quantize the base model's "
            "weights to compressed-tensors instead."
        )


def _converted(
    file: Path, held: Mapping[str, StoredTensor], layout: _Layout, symmetric: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of everything that one file holds afterwards; a module goes where its codes were."""
    with safe_open(file, framework="pt") as source:
        for name in (name for name, own in held.items() if own.file == file):
            module, _, last = name.rpartition(".")
            if f"{module}.qweight" not in held or last not in _PACKED:
                yield name, source.get_tensor(name)
            elif last == "qweight":
                for own, tensor in layout.convert(module, _parts(held, module), symmetric).items():
                    yield f"{module}.{own}", tensor


def _packer():
    try:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    except ImportError:
        raise CheckpointError(
            "GPTQ and AWQ weights are packed anew by the package compressed-tensors, which is not installed: "
            "pip install 'kvq-toolkit[targets]'."
        ) from None
    return pack_to_int32


def _parts(held: Mapping[str, StoredTensor], module: str) -> dict[str, torch.Tensor]:
    found = {}
    with ExitStack() as stack:
        for part in _PACKED:
            name = f"{module}.{part}"
            if name in held:
                found[part] = stack.enter_context(safe_open(held[name].file, framework="pt")).get_tensor(name)
    missing = [part for part in _PACKED[:3] if part not in found]
    if missing:
        raise CheckpointError(f"weights lack {module}.{missing[0]}: copy or download the model again.")
    return found


def _unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [rows, columns * 32 / bits] (int32) of words [rows, columns], the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(1)


def _ignored(held: Mapping[str, StoredTensor], modules: list[str]) -> list[str]:
    """Modules with plain weights of two dimensions, and the head, which may be tied and have none."""
    weights = [name for name, own in held.items() if name.endswith(".weight") and len(own.shape) == 2]
    plain = {name.removesuffix(".weight") for name in weights if "embed" not in name}
    return sorted((plain | {"lm_head"}) - set(modules))
