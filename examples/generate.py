"""Generate with a packed 2-bit KV cache, without an export: any causal model of transformers, any recipe.

python examples/generate.py [MODEL] [RECIPE]
"""

import sys
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvq


def main(name: str = "builtin", recipe: str = "kivi2") -> None:
    folder = kvq.resolve_model(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    device, dtype = ("cuda", "auto") if torch.cuda.is_available() else ("cpu", "float32")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    # Long enough that most of it is packed: kivi2 keeps the last 128 tokens exact.
    inputs = tokenizer(topics["specialnames"][:4000], return_tensors="pt").to(model.device)
    with kvq.quantized_cache(model, recipe):
        cache = kvq.new_cache(model)
        tokens = model.generate(**inputs, past_key_values=cache, max_new_tokens=32, do_sample=False)
        print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        print(f"\n{kvq.cache_nbytes(cache):,} bytes of cache for {cache.get_seq_length()} tokens with {recipe}")


if __name__ == "__main__":
    main(*sys.argv[1:])
