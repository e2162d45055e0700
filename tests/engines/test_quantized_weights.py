"""Weights that were quantized before kvq came: vLLM serves them with the KV scales that an export adds.

The checkpoints are made here from the embedded model, rounded to 4 bits in GPTQ's and in AWQ's layout. Beside each lies
its twin, with the numbers that its codes stand for as ordinary weights: what the engine answers from the codes must be
kvq's simulation of the twin.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvq.eval.engine_run import ask_engine, judge, two_prompts
from kvq.exporting.check import check_folder
from kvq.exporting.engines import find_release
from kvq.exporting.exporter import export

pytest.importorskip("compressed_tensors", reason="the extra 'targets' is not installed")
pytestmark = [pytest.mark.engine, pytest.mark.model]

GROUP = 64
AWQ_ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
DECLARED = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
}


def rounded(weight: torch.Tensor, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [in, out], zeros [groups, out] (both 0 to 15) and float16 scales [groups, out] of a weight [out, in]."""
    groups = weight.float().T.unflatten(0, (-1, GROUP))
    if symmetric:
        scales = (groups.abs().amax(1) / 7).half()
        zeros = torch.full_like(scales, 8, dtype=torch.int64)
    else:
        low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
        scales = ((high - low) / 15).half()
        zeros = (-low / scales).round().clamp(0, 15).long()
    codes = (groups / scales.float().unsqueeze(1)).round().long() + zeros.unsqueeze(1)
    return codes.clamp(0, 15).flatten(0, 1), zeros, scales


def packed(codes: torch.Tensor, dim: int) -> torch.Tensor:
    """int32 words of eight 4-bit codes along ``dim``, the first code in the lowest bits."""
    shifts = 4 * torch.arange(8)
    words = (codes.unflatten(dim, (-1, 8)) << (shifts if dim == 1 else shifts.unsqueeze(1))).sum(dim + 1)
    return (words - ((words >> 31) << 32)).to(torch.int32)


def module_of(method: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of one linear layer, and the weight [out, in] (float32, exact) that they stand for."""
    codes, zeros, scales = rounded(weight, symmetric=method == "gptq")
    group = torch.arange(len(codes)) // GROUP
    twin = ((codes - zeros[group]) * scales.float()[group]).T.contiguous()
    if method == "awq":
        in_order = [part.unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1) for part in (codes, zeros)]
        return {"qweight": packed(in_order[0], 1), "qzeros": packed(in_order[1], 1), "scales": scales}, twin
    # This layout stores one less than the zero point.
    own = {"qweight": packed(codes, 0), "qzeros": packed(zeros - 1, 1), "scales": scales}
    return own | {"g_idx": group.to(torch.int32)}, twin


@pytest.fixture(scope="module")
def quantized(builtin_dir, tmp_path_factory):
    """Factory ``quantized(method) -> (checkpoint, twin)``: folders of the embedded model with 4-bit weights."""

    def make(method: str) -> tuple[Path, Path]:
        root = tmp_path_factory.mktemp(method)
        tensors, twins = {}, {}
        for file in sorted(builtin_dir.glob("*.safetensors")):
            for name, tensor in load_file(file).items():
                tensors[name] = twins[name] = tensor
                if name.endswith("_proj.weight"):
                    own, twins[name] = module_of(method, tensors.pop(name))
                    tensors |= {f"{name.removesuffix('.weight')}.{part}": value for part, value in own.items()}
        config = json.loads((builtin_dir / "config.json").read_text())
        contents = {"checkpoint": (tensors, {"quantization_config": DECLARED[method]}), "twin": (twins, {})}
        for name, (held, fields) in contents.items():
            shutil.copytree(builtin_dir, root / name, ignore=shutil.ignore_patterns("*.safetensors*"))
            save_file(held, root / name / "model.safetensors", metadata={"format": "pt"})
            (root / name / "config.json").write_text(json.dumps(config | fields))
        return root / "checkpoint", root / "twin"

    return make


@pytest.mark.parametrize("method", DECLARED)
def test_the_engine_serves_the_codes_with_the_scales_that_kvq_added(
    quantized, served, builtin_stats, engine_python, record, tmp_path, monkeypatch, method
):
    # By default the CPU kernels round activations to 8 bits for such weights, which is no matter of the checkpoint.
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "0")
    checkpoint, twin = quantized(method)
    for source, name in ((checkpoint, "out"), (twin, "twin")):
        export(source, "fp8", tmp_path / name, target="vllm", stats=builtin_stats, other_weights=True)
    (report,) = check_folder(tmp_path / "out", [find_release("vllm", "0.32")])
    assert report.errors == ()
    prompts = two_prompts(tmp_path / "out")
    answer = ask_engine(tmp_path / "out", prompts, python=engine_python, dtype="bfloat16")
    found = judge(tmp_path / "twin", prompts, answer, dtype="bfloat16")
    record[f"{method} weights in 4 bits, FP8 cache, bfloat16"] = found.to_dict()
    assert found.problems == ()
    assert found.scales_checked == 60
    # The control: not the answers of the model before its weights were rounded.
    problems = judge(served("vllm"), prompts, answer, dtype="bfloat16").problems
    assert any("engine and simulation differ" in text for text in problems)
