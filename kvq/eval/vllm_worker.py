"""Ask vLLM for what a folder's cache does: run by path, with the Python of vLLM's own environment, which has no kvq.

    python vllm_worker.py REQUEST.json ANSWER.json

request   model, dtype, cache_dtype (None: as the checkpoint says), skip (layers kept in 16 bits), prompts (token
          ids), tokens (to generate).
answer    version, platform, cache_dtype; layers: attention layer -> its scales and cache dtype as the engine holds
          them; outputs: per prompt the generated token ids, their text, and the log-probabilities of both parts.
"""

import json
import os
import sys


def main(request_file: str, answer_file: str) -> None:
    with open(request_file) as file:
        request = json.load(file)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    # In this process, so that the loaded model can be looked at.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

    import vllm
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    prompts, tokens = request["prompts"], request["tokens"]
    settings = {"kv_cache_dtype": request["cache_dtype"]} if request["cache_dtype"] else {}
    if request["skip"]:
        settings["kv_cache_dtype_skip_layers"] = request["skip"]
    llm = LLM(
        request["model"],
        dtype=request["dtype"],
        max_model_len=max(map(len, prompts)) + tokens + 16,
        max_num_seqs=len(prompts),
        enforce_eager=True,
        enable_prefix_caching=False,
        seed=0,
        **settings,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, prompt_logprobs=0, logprobs=0, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    answer = {
        "version": vllm.__version__,
        "platform": "cpu" if current_platform.is_cpu() else current_platform.device_type,
        "cache_dtype": llm.llm_engine.vllm_config.cache_config.cache_dtype,
        "layers": llm.apply_model(held_scales)[0],
        "outputs": [_output(prompt, output) for prompt, output in zip(prompts, outputs)],
    }
    with open(answer_file, "w") as file:
        json.dump(answer, file)


def held_scales(model) -> dict:
    """Scales and cache dtype of every attention layer, as the engine's kernels get them."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "_k_scale") and hasattr(module, "kv_cache_dtype"):
            found[name] = {
                "key": module._k_scale.flatten().tolist(),
                "value": module._v_scale.flatten().tolist(),
                "cache_dtype": module.kv_cache_dtype,
            }
    return found


def _output(prompt: list[int], output) -> dict:
    made = output.outputs[0]
    given = zip(prompt[1:], output.prompt_logprobs[1:])
    return {
        "tokens": list(made.token_ids),
        "text": made.text,
        "prompt_logprobs": [entry[token].logprob for token, entry in given],
        "logprobs": [entry[token].logprob for token, entry in zip(made.token_ids, made.logprobs)],
    }


if __name__ == "__main__":
    main(*sys.argv[1:3])
