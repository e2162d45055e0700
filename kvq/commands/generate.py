"""``kvq generate``: text from a model, and what its cache cost."""

import sys
import time

import click

from kvq.commands.common import Finite, Output, chosen_recipe, json_option, quiet_transformers, settings_option
from kvq.errors import DataError


@click.command("generate")
@click.argument("model", metavar="DIR|MODEL")
@click.option("--prompt", help="The prompt; read from stdin without it.")
@click.option("--max-new-tokens", default=128, show_default=True, type=click.IntRange(1), help="Tokens to generate.")
@click.option("--recipe", metavar="NAME|FILE", help="Recipe for a plain model; an export brings its own.")
@settings_option
@click.option("--stats", metavar="STATS", help="Statistics of 'kvq calibrate', for --recipe with static scales.")
@click.option("--temperature", type=Finite(min=0), help="Sample at this temperature; greedy without it or at 0.")
@click.option("--seed", default=0, show_default=True, help="Seed of the sampling.")
@click.option("--raw", is_flag=True, help="Give the prompt as it is, without the model's chat template.")
@click.option("--ignore-eos", is_flag=True, help="Always generate --max-new-tokens, to measure speed.")
@json_option
def command(
    model: str,
    prompt: str | None,
    max_new_tokens: int,
    recipe: str | None,
    settings: dict,
    stats: str | None,
    temperature: float | None,
    seed: int,
    raw: bool,
    ignore_eos: bool,
    output: Output,
) -> None:
    """Generate text from an export, or from a plain MODEL (with --recipe, through a quantized cache).

    \b
    Examples:
      kvq generate smollm2-kivi2 --prompt "What is a KV cache?"
      kvq generate builtin --recipe kivi4 --prompt "Once upon a time" --raw --max-new-tokens 64
      kvq generate smollm2-kivi2 --temperature 0.7 --seed 1 < prompt.txt
    """
    chosen = chosen_recipe(recipe, settings)
    if prompt is None:
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise DataError("the prompt is empty: give --prompt TEXT, or text on stdin.")
    quiet_transformers()
    from kvq.eval.evaluated_model import load_evaluated
    from kvq.integrations.runtime import install
    from kvq.report.tables import generation_table

    evaluated = load_evaluated(model, chosen, stats=stats)
    loaded, tokenizer = evaluated.model, evaluated.tokenizer
    # An export brings its cache.
    if evaluated.plan and evaluated.plan.layers and getattr(loaded, "kvq", None) is None:
        install(loaded, evaluated.plan)
    inputs = _encode(tokenizer, prompt, raw).to(loaded.device)
    _check_length(loaded, inputs["input_ids"].shape[1], max_new_tokens)
    options = _sampling(temperature, seed)
    if ignore_eos:
        options |= {"min_new_tokens": max_new_tokens}
    result = _generate(loaded, tokenizer, inputs, max_new_tokens, options, output)
    output.show("", generation_table(result))
    output.write({"model": model} | result)


def _encode(tokenizer, prompt: str, raw: bool):
    if raw or not getattr(tokenizer, "chat_template", None):
        return tokenizer(prompt, return_tensors="pt", verbose=False)
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def _check_length(model, prompt_tokens: int, max_new_tokens: int) -> None:
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if prompt_tokens == 0:
        raise DataError("the prompt gives no tokens: give some text.")
    if limit and prompt_tokens + max_new_tokens > limit:
        raise DataError(
            f"the prompt's {prompt_tokens:,} tokens and {max_new_tokens:,} new ones exceed the model's {limit:,} "
            "positions: shorten the prompt, or lower --max-new-tokens."
        )


def _sampling(temperature: float | None, seed: int) -> dict:
    import torch

    torch.manual_seed(seed)
    if not temperature:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature}


def _printer(tokenizer, console):
    """A streamer that prints text as it comes, and notes when tokens came (``times``) and how many (``count``)."""
    from transformers import TextStreamer

    class Printer(TextStreamer):
        def __init__(self):
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.times: list[float] = []
            self.count = 0

        def put(self, value):
            # The first call brings the prompt.
            self.count += value.numel() if self.times else 0
            self.times.append(time.perf_counter())
            super().put(value)

        def on_finalized_text(self, text, stream_end=False):
            console.file.write(text + ("\n" if stream_end else ""))
            console.file.flush()

    return Printer()


def _tokens_per_second(times: list[float]) -> float | None:
    """Decoding alone: the first token's time, which reads the prompt, is left out."""
    steps = len(times) - 2
    return steps / (times[-1] - times[1]) if steps > 0 else None


def _generate(model, tokenizer, inputs, max_new_tokens: int, options: dict, output: Output) -> dict:
    printer = _printer(tokenizer, output.console)
    generated = model.generate(
        **inputs, max_new_tokens=max_new_tokens, streamer=printer, return_dict_in_generate=True, **options
    )
    prompt_tokens = inputs["input_ids"].shape[1]
    return {
        "text": tokenizer.decode(generated.sequences[0, prompt_tokens:], skip_special_tokens=True),
        "prompt_tokens": prompt_tokens,
        "new_tokens": printer.count,
        "tokens_per_second": _tokens_per_second(printer.times),
        "first_token_seconds": printer.times[1] - printer.times[0],
        "cache": _cache_report(model, generated.past_key_values),
    }


def _cache_report(model, cache) -> dict:
    """What a filled cache holds: measured bytes, the same with 16-bit exact numbers, a 16-bit cache, and what ran."""
    from kvq.cache import CachePlan, cache_nbytes, implementations
    from kvq.models.describe import describe
    from kvq.recipe import load_recipe

    tokens = cache.get_seq_length()
    runtime = getattr(model, "kvq", None)
    plain = CachePlan(recipe=load_recipe("fp16"), model=describe(model.config), layers={})
    plan = runtime.plan if runtime else plain
    ran = " and ".join(implementations(cache)) or "the prompt alone"
    return {
        "tokens": tokens,
        "bytes": cache_nbytes(cache),
        "bytes_in_16_bit": plan.predicted_bytes(tokens, itemsize=2),
        "fp16_bytes": plain.predicted_bytes(tokens, itemsize=2),
        "recipe": plan.recipe.name,
        "exact_dtype": str(model.dtype).removeprefix("torch."),
        "implementation": f"{runtime.attention} attention, {ran}" if runtime else "DynamicCache",
    }
