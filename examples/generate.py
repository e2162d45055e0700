"""Generate with a packed 2-bit KV cache, without an export: any causal model of transformers, any recipe.

python examples/generate.py [MODEL] [RECIPE]
"""

import sys

import kvq
from kvq.calib.data import builtin_text
from kvq.models.resolve import load_model, load_tokenizer, resolve_model


def main(name: str = "builtin", recipe: str = "kivi2") -> None:
    folder = resolve_model(name)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    # Long enough that most of it is packed: kivi2 keeps the last 128 tokens exact.
    inputs = tokenizer(builtin_text("evaluation")[:4000], return_tensors="pt").to(model.device)
    with kvq.quantized_cache(model, recipe):
        cache = kvq.new_cache(model)
        tokens = model.generate(**inputs, past_key_values=cache, max_new_tokens=32, do_sample=False)
        print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        print(f"\n{kvq.cache_nbytes(cache):,} bytes of cache for {cache.get_seq_length()} tokens with {recipe}")


if __name__ == "__main__":
    main(*sys.argv[1:])
