"""Start a real serving engine on a folder and compare its answers with kvq's own simulation of the same folder.

Two computations of one FP8 cache differ by more than rounding: where a key lies near the middle between two FP8
numbers, the last bit of the arithmetic decides which it becomes, and later layers see the change. How much that amounts
to is measured, not assumed: kvq simulates twice, in the engine's dtype and in a finer one, and the engine may differ
from the simulation by a small multiple of what these two differ by.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kvq.cache import CachePlan
from kvq.calib.data import builtin_text
from kvq.errors import CheckpointError
from kvq.eval.two_view import two_view
from kvq.exporting.simulated_engine import is_engine_export, simulated_config, simulated_plan
from kvq.models.resolve import load_model, load_tokenizer
from kvq.pages.layout import SIDES

# Multiple of the measured noise that the mean deviation may reach, and nats below which nobody cares.
NOISE_FACTOR, FLOOR = 2.0, 0.002
# The CPU kernels of vLLM cut bits off (csrc/cpu/cpu_attn_fp8.hpp); GPUs round to nearest.
ROUNDING = {"cpu": "toward_zero"}
PROMPT_TOKENS, NEW_TOKENS = 128, 16
_FINER = {torch.float32: torch.float64}
_WORKERS = {"vllm": "vllm_worker.py"}


@dataclass(frozen=True, kw_only=True)
class PromptComparison:
    """One prompt; log-probabilities in nats, of the prompt's tokens and of the generated ones.

    deviation, worst   mean and largest difference between engine and simulation.
    noise              mean difference between two simulations, in the engine's dtype and in a finer one.
    effect             mean difference between engine and the unquantized model: what FP8 changes at all.
    greedy_gap         how far a token that the engine chose lies below the simulation's most likely one, at most.
    """

    text: str
    deviation: float
    worst: float
    noise: float
    effect: float
    greedy_gap: float


@dataclass(frozen=True, kw_only=True)
class EngineComparison:
    """problems: sentences, empty if the engine does what the folder says."""

    engine: str
    version: str
    platform: str
    cache_dtype: str
    rounding: str
    scales_checked: int
    prompts: tuple[PromptComparison, ...]
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def ask_engine(
    folder: Path,
    prompts: Sequence[Sequence[int]],
    *,
    engine: str = "vllm",
    python: str = sys.executable,
    dtype: str = "auto",
    cache_dtype: str | None = None,
    skip: Sequence[str] = (),
    tokens: int = NEW_TOKENS,
    timeout: float = 1800,
) -> dict[str, Any]:
    """Run the engine in a process of its own and return its answer (see ``vllm_worker.py``).

    python   the interpreter of the environment that has the engine.

    Raises CheckpointError, with the engine's last words, if it does not answer.
    """
    if engine not in _WORKERS:
        raise CheckpointError(f"{engine!r} cannot be started by kvq: it runs {', '.join(_WORKERS)}.")
    worker = Path(__file__).with_name(_WORKERS[engine])
    request = {
        "model": str(folder.resolve()),
        "dtype": dtype,
        "cache_dtype": cache_dtype,
        "skip": list(skip),
        "prompts": [list(prompt) for prompt in prompts],
        "tokens": tokens,
    }
    with tempfile.TemporaryDirectory() as work:
        asked, answered = Path(work) / "request.json", Path(work) / "answer.json"
        asked.write_text(json.dumps(request))
        command = [python, str(worker), str(asked), str(answered)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=work)
        except subprocess.TimeoutExpired:
            raise CheckpointError(
                f"{engine} did not answer within {timeout:.0f} seconds: use a smaller model."
            ) from None
        except OSError as error:
            raise CheckpointError(f"{python!r} cannot be run ({error.strerror}): name the engine's Python.") from None
        if done.returncode or not answered.is_file():
            raise CheckpointError(f"{engine} does not serve {folder.name!r}: {_last_words(done.stderr)}")
        return json.loads(answered.read_text())


def compare_with_engine(folder: Path, prompts: Sequence[Sequence[int]], **settings: Any) -> EngineComparison:
    """Ask the engine, simulate, and judge. ``settings`` as for ``ask_engine``; raises as it does."""
    answer = ask_engine(folder, prompts, **settings)
    return judge(folder, prompts, answer, engine=settings.get("engine", "vllm"), dtype=settings.get("dtype", "auto"))


def judge(
    folder: Path, prompts: Sequence[Sequence[int]], answer: Mapping[str, Any], *, engine: str = "vllm", dtype: str
) -> EngineComparison:
    """Compare an engine's answer with the simulation of ``folder``, which need not be the folder that it served."""
    rounding = ROUNDING.get(answer["platform"], "nearest")
    # The CPU kernels know one scale a layer, and take the largest of its heads'.
    largest = answer["platform"] == "cpu"
    plan = simulated_plan(folder, rounding, largest) if is_engine_export(folder) else None
    problems = _storage_problems(answer, plan) if plan else []
    texts = [list(prompt) + output["tokens"] for prompt, output in zip(prompts, answer["outputs"])]
    precision: torch.dtype = getattr(simulated_config(folder), "dtype", None) or torch.float32
    if dtype != "auto":
        precision = getattr(torch, dtype)
    model = load_model(folder, dtype=precision, config=simulated_config(folder))
    simulated = [logprobs(model, plan, text) for text in texts]
    exact = [_of_tokens(logprobs(model, None, text), text) for text in texts]
    model = load_model(folder, dtype=_FINER.get(precision, torch.float32), config=simulated_config(folder))
    finer = [_of_tokens(logprobs(model, plan, text), text) for text in texts]
    compared = zip(prompts, texts, answer["outputs"], simulated, finer, exact)
    rows = [_compare(len(prompt), *found) for prompt, *found in compared]
    problems += [text for number, row in enumerate(rows, 1) for text in _noise_problems(number, row)]
    return EngineComparison(
        engine=engine,
        version=answer["version"],
        platform=answer["platform"],
        cache_dtype=answer["cache_dtype"],
        rounding=rounding,
        scales_checked=2 * len(plan.layers) if plan else 0,
        prompts=tuple(rows),
        problems=tuple(problems),
    )


def two_prompts(folder: Path, tokens: int = PROMPT_TOKENS) -> list[list[int]]:
    """Token ids of two pieces of the builtin text, in the folder's tokenizer."""
    tokenizer = load_tokenizer(folder)
    ids = tokenizer(builtin_text("evaluation")[: tokens * 40])["input_ids"]
    return [ids[:tokens], ids[tokens : 2 * tokens]]


def logprobs(model, plan: CachePlan | None, ids: Sequence[int]) -> torch.Tensor:
    """Log-probabilities [T, V] (float64) at every position, with every number quantized as ``plan`` says."""
    tokens = torch.tensor([list(ids)], device=model.device)
    with torch.inference_mode():
        if plan is None:
            logits = model(tokens, use_cache=False).logits
        else:
            with two_view(model, plan, "simulate"):
                logits = model(tokens).logits
    return torch.log_softmax(logits[0].double(), dim=-1).cpu()


def _of_tokens(scores: torch.Tensor, text: list[int]) -> torch.Tensor:
    """Log-probabilities of a text's tokens, without the first, from those of all tokens at every position."""
    return scores[:-1].gather(1, torch.tensor(text[1:]).unsqueeze(1)).squeeze(1)


def _compare(
    prompt_tokens: int,
    text: list[int],
    output: Mapping[str, Any],
    simulated: torch.Tensor,
    finer: torch.Tensor,
    exact: torch.Tensor,
) -> PromptComparison:
    """simulated: [T, V]; finer, exact: [T - 1], of the text's tokens, simulated in a finer dtype and not quantized."""
    engine = torch.tensor(output["prompt_logprobs"] + output["logprobs"], dtype=torch.float64)
    own = _of_tokens(simulated, text)
    deviation = (engine - own).abs()
    return PromptComparison(
        text=output["text"],
        deviation=float(deviation.mean()),
        worst=float(deviation.max()),
        noise=float((own - finer).abs().mean()),
        effect=float((engine - exact).abs().mean()),
        greedy_gap=float((simulated[:-1].amax(-1) - own)[prompt_tokens - 1 :].max()),
    )


def _storage_problems(answer: Mapping[str, Any], plan: CachePlan) -> list[str]:
    """Layers must be in FP8, and the scales that the engine holds the folder's, number for number."""
    held = {int(re.search(r"layers\.(\d+)\.", name)[1]): layer for name, layer in answer["layers"].items()}
    plain = sorted(index for index in plan.layers if not held.get(index, {}).get("cache_dtype", "").startswith("fp8"))
    problems = [f"layers {plain} are not stored in FP8."] if plain else []
    for index, layer in held.items():
        for side in SIDES if index in plan.layers else ():
            wanted = sorted({group.codecs[side].scale for group in plan.layers[index]})
            own = sorted(set(layer[side])) if len(wanted) > 1 else [max(layer[side])]
            if own != wanted:
                problems.append(f"layer {index} has the {side} scale {layer[side]} and the folder {wanted}.")
    return problems


def _noise_problems(number: int, row: PromptComparison) -> list[str]:
    problems = []
    if row.deviation > max(NOISE_FACTOR * row.noise, FLOOR):
        problems.append(
            f"prompt {number}: engine and simulation differ by {row.deviation:.4f} nats a token, and two simulations "
            f"by {row.noise:.4f}."
        )
    if row.greedy_gap > max(4 * NOISE_FACTOR * row.noise, FLOOR):
        problems.append(
            f"prompt {number}: a token that the engine chose lies {row.greedy_gap:.4f} nats below the simulation's."
        )
    return problems


def _last_words(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if re.search(r"Error|error:|Exception", line)]
    return (lines or stderr.strip().splitlines() or ["it says nothing."])[-1][:400]
