"""Write the README's table of recipes from benchmarks/results/quality.json and the recipes themselves.

python benchmarks/readme_table.py
"""

import json
from pathlib import Path

from kvq.recipe import list_recipes, load_recipe

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- recipes: begin -->\n", "<!-- recipes: end -->"


def table(quality: dict) -> str:
    """One row a shipped recipe, most bits first; recipes without a measurement come last."""
    found = quality["recipes"]
    lines = [
        "| recipe | what it does | paper | bits per element | perplexity | KL, nats | top-1 |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name in sorted(list_recipes(), key=lambda name: -found.get(name, {}).get("bits_per_element", 0)):
        recipe, row = load_recipe(name), found.get(name)
        numbers = ["-"] * 4
        if row and row["recipe_hash"] == recipe.hash:
            numbers = [
                f"{row['bits_per_element']:.2f}",
                f"{row['perplexity']:.2f}",
                f"{row['kl']:.4f}",
                f"{row['top1']:.1%}",
            ]
        lines.append("| " + " | ".join([f"`{name}`", recipe.summary, recipe.paper, *numbers]) + " |")
    return "\n".join(lines) + "\n"


def with_table(readme: str, quality: dict) -> str:
    head, rest = readme.split(BEGIN)
    return head + BEGIN + table(quality) + END + rest.split(END)[1]


def main() -> None:
    quality = json.loads((ROOT / "benchmarks/results/quality.json").read_text())
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(), quality))


if __name__ == "__main__":
    main()
