"""The model card of an export: README.md with front matter."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kvq.cache import CachePlan
from kvq.exporting.memory import MemoryPlan
from kvq.recipe import Recipe

CARD = "README.md"
_LICENCE_KEYS = ("license", "license_name", "license_link")
_HEAD_BYTES = 64 * 1024

_BODY = """
# {base} with a {recipe} KV cache

> **Without `import kvq` this model loads with an UNQUANTIZED cache.** transformers then only warns about an unknown
> quantization type: the answers are those of the base model, and no memory is saved.

```python
import kvq  # pip install kvq-toolkit
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "..."  # this folder, or its id on the hub
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("The KV cache", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```

The weights are those of `{base}`, {weights}. What is quantized is the cache of keys and values, with the recipe
`{recipe}`{summary}.

## Recipe

{recipe_table}

## Cache memory of one sequence

{memory_table}

Predicted bytes, exact tokens at 2 bytes a number, metadata included; {bits:.2f} bits per element in the long run.

## Provenance

{provenance_table}

`kvq/provenance.json` has the rest. The side files are checked against the SHA-256 in `config.json` when the model is
loaded.
"""

_PLAIN = """
# {base}, with the transforms of {recipe} in its weights

An ordinary checkpoint: it loads in any engine that runs `{base}`, without kvq, and gives the same outputs up to the
rounding of its weights. Its keys and values are easier to quantize, so an engine's own 4- or 8-bit KV cache loses less.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("...")  # this folder, or its id on the hub
```
{serve}
## What changed

{transforms_table}

Checked when it was exported, against `{base}` on {tokens} tokens: with weights in float32 the logits differ by at most
{error:.1e} of the largest; rounded to {dtype}, KL {kl:.1e} nats a token (random changes of that size to the same
weights: {noise_kl:.1e}), and {top1:.1%} of the tokens have the same most likely successor.

## Provenance

{provenance_table}
"""


def plain_markdown(text: str) -> str:
    """Text that is not ours, as Markdown shows it: one line, without links, tags or headings of its own."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def plain_card(
    plan: CachePlan, check, provenance: Mapping[str, Any], licence: Mapping[str, str], serve: str = ""
) -> str:
    """The card of a checkpoint without kvq's format.

    check   a ``kvq.exporting.fold_check.FoldCheck``; serve: a section that says how engines serve it.
    """
    base = provenance["base_model"]
    front = front_matter(base, licence, ["kvq", "kv-cache", plan.recipe.name]) | {"base_model_relation": "finetune"}
    rows = [
        (side, " then ".join(step.kind for step in getattr(plan.recipe.transforms, side)) or "none")
        for side in ("key", "value")
    ]
    body = _PLAIN.format(
        base=base,
        recipe=plan.recipe.name,
        serve=serve,
        transforms_table=_table(("side", "transforms"), rows),
        tokens=check.tokens,
        error=check.error,
        dtype=str(plan.model.dtype).removeprefix("torch."),
        kl=check.kl,
        noise_kl=check.noise_kl,
        top1=check.top1,
        provenance_table=provenance_table(provenance),
    )
    return with_front_matter(front, body)


def model_card(plan: CachePlan, memory: MemoryPlan, provenance: Mapping[str, Any], licence: Mapping[str, str]) -> str:
    """Write the card. ``licence``: front matter from ``licence_of``."""
    base = provenance["base_model"]
    front = front_matter(base, licence, ["kvq", "kv-cache", "quantized", plan.recipe.name])
    body = _BODY.format(
        base=base,
        recipe=plan.recipe.name,
        summary=f" ({plain_markdown(plan.recipe.summary)})" if plan.recipe.summary else "",
        weights="with exact transforms folded in" if plan.folded else "unchanged",
        recipe_table=recipe_table(plan, context_limit(plan.recipe, provenance)),
        memory_table=_memory_table(memory),
        bits=memory.bits_per_element,
        provenance_table=provenance_table(provenance),
    )
    return with_front_matter(front, body)


def with_front_matter(front: Mapping[str, Any], body: str) -> str:
    return f"---\n{yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True)}---\n{body}"


def front_matter(base: str, licence: Mapping[str, str], tags: list[str]) -> dict[str, Any]:
    """The front matter of a card, as the hub reads it."""
    return {
        "base_model": base,
        "base_model_relation": "quantized",
        "library_name": "transformers",
        **licence,
        "pipeline_tag": "text-generation",
        "tags": tags,
    }


def licence_of(folder: Path) -> dict[str, str]:
    """The licence fields of a source folder's README front matter; empty if it states none."""
    try:
        with open(folder / CARD, encoding="utf-8") as file:
            text = file.read(_HEAD_BYTES)
        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, IndexError):
        return {}
    if not isinstance(front, dict):
        return {}
    return {key: front[key] for key in _LICENCE_KEYS if isinstance(front.get(key), str)}


def _table(head: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def context_limit(recipe: Recipe, provenance: Mapping[str, Any]) -> str | None:
    """For which contexts a recipe was fitted, in words; None if it holds at every position."""
    if not recipe.is_bound_to_positions:
        return None
    data = (provenance.get("statistics") or {}).get("data") or {}
    return f"up to {data['seq_len']} tokens, as calibrated" if "seq_len" in data else "as long as the calibration text"


def recipe_table(plan: CachePlan, contexts: str | None = None) -> str:
    """The recipe as a table of the card. ``contexts``: those that it was fitted for, if it does not hold for all."""
    recipe = plan.recipe
    rows = [(side, _settings(getattr(recipe, side).to_dict())) for side in ("key", "value")]
    for side, steps in recipe.transforms.to_dict().items():
        rows.append((f"{side} transforms", " then ".join(_settings(step).removeprefix("kind ") for step in steps)))
    rows.append(("exact tokens", f"first {recipe.tokens.sinks}, last {recipe.tokens.window}"))
    rows += [(f"layers {pattern}", _override(override)) for pattern, override in recipe.layers.items()]
    if contexts:
        rows.append(("fitted for contexts", contexts))
    if recipe.paper:
        rows.append(("paper", recipe.paper))
    return _table(("part", "setting"), rows)


def _override(override) -> str:
    return "; ".join(f"{part}: {_settings(settings)}" for part, settings in override.items())


def _settings(settings) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _memory_table(memory: MemoryPlan) -> str:
    rows = [
        (f"{row.tokens:,}", _mib(row.plain_bytes), _mib(row.recipe_bytes), f"{row.ratio:.2f}x")
        for row in memory.lengths
    ]
    return _table(("tokens", "16-bit cache", memory.recipe, "smaller by"), rows)


def provenance_table(provenance: Mapping[str, Any]) -> str:
    """Where an export comes from, as a table of the card."""
    stats = provenance["statistics"]
    rows = [
        ("base model", provenance["base_model"]),
        ("weights fingerprint", f"`{provenance['weights_fingerprint'][:16]}`"),
        ("recipe hash", f"`{provenance['recipe_hash'][:16]}`"),
        ("kvq", provenance["kvq_version"]),
        ("statistics", f"`{stats['sha256'][:16]}`" if stats else "none needed"),
    ]
    return _table(("what", "value"), rows)
