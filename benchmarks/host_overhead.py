"""What the host does in a decode step, counted without a GPU and without times, for every shipped recipe.

    python benchmarks/host_overhead.py [--recipes int4,kivi2]

A small Llama decodes through ``model(...)`` as ``generate`` calls it: kvq's hook before the forward, its cache and its
attention. Its tensors lie on a device that is pretended (``PretendedTensor``): operators compute on the CPU, but what
crosses between host and device is seen. Triton kernels are counted and not run; everything else of a step is real.

    calls         Python functions entered (``sys.setprofile``), those of the pretence itself left out
    operators     torch operators on device tensors that compute or copy (views are not launched, so they do not count)
    allocations   operators whose result has new storage
    copies        host to device
    syncs         device to host: ``item``, ``tolist``, ``bool``, ``nonzero``, a boolean index, ``equal``
    launches      Triton kernels

A figure is that of a whole step of ``LAYERS`` layers over their number, so what is done once a forward counts a part.
It is the median of ``STEPS`` steps, so what happens once in 64 or 128 tokens (a new page, a block of keys) is left out;
``worst`` is the most of these steps. ``exact`` is ``DynamicCache`` with SDPA in the same model.
"""

import argparse
import json
import os
import statistics
import sys
from contextlib import contextmanager
from pathlib import Path

# Triton reads this when a kernel is defined; on the pretended device the kernels "run" as in the interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvq.cache import implementations, make_plan
from kvq.calib.artefacts import stand_in_artefacts
from kvq.integrations.runtime import install, new_cache, uninstall
from kvq.kernels.device import launch
from kvq.models.describe import describe
from kvq.recipe import list_recipes, load_recipe

RESULTS = Path(__file__).parent / "results" / "host_overhead"
LAYERS = 4
BATCHES = (1, 8)
PROMPT, WARM, STEPS = 200, 2, 5
COUNTED = ("calls", "operators", "allocations", "copies", "syncs", "launches")
# The goals for recipes that run fused.
MOST = {"calls": 320, "operators": 60, "copies": 0, "syncs": 0}
PRETENDED = "pretended"

# What torch runs around the operators of a tensor type of its own, which no real device has.
_OF_THE_PRETENCE = (
    __file__, "torch/_compile.py", "torch/_dynamo/eval_frame.py", "torch/_library/simple_registry.py",
    "torch/utils/backend_registration.py", "torch/compiler/__init__.py",
)  # fmt: skip
_SYNCS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique_dim", "_unique2"}


class PretendedTensor(torch.Tensor):
    """A tensor on the pretended device; ``held`` has its numbers on the CPU."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        made = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, device=torch.device(PRETENDED, 0), **made)

    def __init__(self, held: torch.Tensor):
        self.held = held

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of the pretence")

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self):
        return self.held.untyped_storage()

    def tolist(self):
        Pretence.running.count("syncs")
        return self.held.tolist()


class Pretence(TorchDispatchMode):
    """Runs operators of ``PretendedTensor`` and counts what the host does while ``counting``."""

    running: "Pretence"

    def __init__(self):
        super().__init__()
        self.counts = dict.fromkeys(COUNTED, 0)
        self.names: dict[str, int] = {}
        self.functions: dict[str, int] = {}
        self.is_counting = False
        self._inside = 0

    def count(self, what: str) -> None:
        if self.is_counting:
            self.counts[what] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._inside += 1
        try:
            return self._run(func, args, dict(kwargs or {}))
        finally:
            self._inside -= 1

    def _run(self, func, args, kwargs):
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        here = any(isinstance(x, PretendedTensor) for x in tensors)
        target = kwargs.get("device")
        there = here if target is None else torch.device(target).type == PRETENDED
        self._note(func, args, tensors, here, there)
        plain_args, plain_kwargs = pytree.tree_map(_held, (args, kwargs))
        if target is not None:
            plain_kwargs["device"] = torch.device("cpu")
            # A copy to another device is one, on the CPU as well.
            if here != there and func is torch.ops.aten._to_copy.default:
                plain_kwargs.pop("pin_memory", None)
        out = func(*plain_args, **plain_kwargs)
        if func is torch.ops.aten.set_.source_Storage:
            return args[0]
        if not there:
            return out
        out = pytree.tree_map(lambda x: PretendedTensor(x) if isinstance(x, torch.Tensor) else x, out)
        return return_and_correct_aliasing(func, args, kwargs, out) if here else out

    def _note(self, func, args, tensors, here: bool, there: bool) -> None:
        if not self.is_counting or not (here or there):
            return
        name = func._schema.name.removeprefix("aten::")
        from_host = any(not isinstance(x, PretendedTensor) and x.ndim for x in tensors)
        if name in _SYNCS or (here and not there) or (name in ("index", "index_put_") and _has_mask(args[1])):
            self.counts["syncs"] += 1
        elif there and from_host and name in ("_to_copy", "copy_", "lift_fresh"):
            self.counts["copies"] += 1
        returns = func._schema.returns
        is_view = bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write
        if is_view or name in ("detach", "lift_fresh", "_unsafe_view"):
            return
        self.counts["operators"] += 1
        self.names[name] = self.names.get(name, 0) + 1
        if there and returns and returns[0].alias_info is None:
            self.counts["allocations"] += 1

    def profile(self, frame, event, argument) -> None:
        if event == "call" and not self._inside and not frame.f_code.co_filename.endswith(_OF_THE_PRETENCE):
            self.counts["calls"] += 1
            code = frame.f_code
            where = f"{Path(code.co_filename).name}:{code.co_qualname}"
            self.functions[where] = self.functions.get(where, 0) + 1

    @contextmanager
    def counting(self):
        """Counts anew what happens inside."""
        self.counts, self.names, self.functions = dict.fromkeys(COUNTED, 0), {}, {}
        self.is_counting = True
        sys.setprofile(self.profile)
        try:
            yield self.counts
        finally:
            sys.setprofile(None)
            self.is_counting = False


def _held(x):
    return x.held if isinstance(x, PretendedTensor) else x


def _has_mask(indices) -> bool:
    return any(isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in indices)


@contextmanager
def pretence():
    """Everything inside may use the device ``pretended``; kernels are counted, not run."""
    if not hasattr(torch, PRETENDED):
        _setup_privateuseone_for_python_backend(PRETENDED)
    mode = Pretence.running = Pretence()
    attention, run = torch.nn.functional.scaled_dot_product_attention, launch.Launch.run

    def scaled_dot_product_attention(query, key, value, **settings):
        # One launch on a GPU; which one is chosen by C++ code that this device does not have.
        mode.count("operators")
        mode.count("allocations")
        mode._inside += 1
        try:
            settings = {name: _held(value) for name, value in settings.items()}
            return PretendedTensor(attention(query.held, key.held, value.held, **settings))
        finally:
            mode._inside -= 1

    def count_launch(self, *first) -> None:
        mode.count("launches")

    torch.nn.functional.scaled_dot_product_attention = scaled_dot_product_attention
    launch.Launch.run = count_launch
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with mode, torch.no_grad():
            yield mode
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.nn.functional.scaled_dot_product_attention, launch.Launch.run = attention, run


def made_model() -> LlamaForCausalLM:
    """A Llama of ``LAYERS`` layers with random weights and biases, 4 query and 2 KV heads of 64 channels."""
    config = LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=256, num_hidden_layers=LAYERS, head_dim=64,
        num_attention_heads=4, num_key_value_heads=2, attention_bias=True, initializer_range=0.15, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.k_proj.bias)
    return model


def to_pretended(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model in bfloat16 on the pretended device."""
    model = model.to(torch.bfloat16)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(PretendedTensor(parameter.data), requires_grad=False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = PretendedTensor(buffer)
    return model


def plan_of(name: str):
    """The plan of a shipped recipe for the made model; counts do not depend on what calibration finds."""
    recipe, spec = load_recipe(name), describe(made_model().config)
    artefacts = {key: _invertible(tensor) for key, tensor in stand_in_artefacts(recipe, spec).items()}
    return make_plan(recipe, spec, artefacts)


def _invertible(tensor: torch.Tensor) -> torch.Tensor:
    """The identity in the place of a matrix that stands in for one."""
    if tensor.ndim < 2 or tensor.shape[-1] != tensor.shape[-2] or tensor.shape[-1] == 1:
        return tensor
    return torch.eye(tensor.shape[-1], dtype=tensor.dtype).expand_as(tensor).contiguous()


def decode(plan, batch: int, padded: bool = False, steps: int = STEPS) -> tuple[list[dict], str, Pretence]:
    """Counts of steps, what attended, and the mode (for names). ``plan`` None: an ordinary cache."""
    model = made_model()
    tokens = torch.randint(3, 100, (batch, PROMPT + WARM + steps), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1:, :7] = 0
    found = []
    with pretence() as mode:
        model = to_pretended(model)
        if plan is not None:
            install(model, plan, impl="triton")
        cache = DynamicCache(config=model.config) if plan is None else new_cache(model)
        tokens, mask = PretendedTensor(tokens), PretendedTensor(mask)
        at = 0
        for new in [PROMPT] + [1] * (WARM + steps):
            ids, own = tokens[:, at : at + new], mask[:, : at + new] if padded else None
            at += new
            if at <= PROMPT + WARM:
                model(ids, past_key_values=cache, attention_mask=own, logits_to_keep=1)
                continue
            with mode.counting() as counts:
                model(ids, past_key_values=cache, attention_mask=own, logits_to_keep=1)
            found.append(counts)
        ran = "" if plan is None else "; ".join(implementations(cache))
        if plan is not None:
            uninstall(model)
    return found, ran, mode


def per_layer(plan, batch: int, padded: bool = False, steps: int = STEPS) -> dict:
    """Counts of a steady step over the number of layers, and what attended."""
    counted, ran, _ = decode(plan, batch, padded, steps)
    row = {}
    for name in COUNTED:
        found = [counts[name] / LAYERS for counts in counted]
        row[name], row[f"worst_{name}"] = statistics.median(found), max(found)
    return row | {"ran": ran}


def measure(recipes: list[str]) -> dict:
    found = {"exact": {str(batch): per_layer(None, batch) for batch in BATCHES}}
    for name in recipes:
        if not load_recipe(name).is_exact:
            plan = plan_of(name)
            found[name] = {str(batch): per_layer(plan, batch) for batch in BATCHES}
            found[name]["8 padded"] = per_layer(plan, 8, padded=True)
            print(name, {key: value for key, value in found[name]["1"].items() if key in COUNTED}, flush=True)
    return found


def table(found: dict) -> str:
    lines = [
        "Per layer and step: Python calls, torch operators, allocations, copies from the host, waits for the device, "
        "Triton launches.",
        "",
        "| recipe | batch | " + " | ".join(COUNTED) + " | ran |",
        "| --- | --- | " + " | ".join(["---:"] * len(COUNTED)) + " | --- |",
    ]
    for name, rows in found.items():
        for batch, row in rows.items():
            numbers = [f"{row[what]:g}" for what in COUNTED]
            lines.append("| " + " | ".join([name, batch, *numbers, row["ran"].replace("asked for, ", "")]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", help="names, separated by commas; by default all, and results are written")
    parser.add_argument("--functions", action="store_true", help="print what is called most in one step of the recipes")
    args = parser.parse_args()
    recipes = args.recipes.split(",") if args.recipes else list_recipes()
    if args.functions:
        for name in recipes:
            counts, ran, mode = decode(None if name == "fp16" else plan_of(name), 1)
            print(name, counts[-1], ran)
            for what in (mode.functions, mode.names):
                print("\n".join(f"{n:6} {key}" for key, n in sorted(what.items(), key=lambda x: -x[1])[:70]))
        return
    found = measure(recipes)
    if args.recipes is None:
        RESULTS.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
