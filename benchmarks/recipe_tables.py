"""Write the tables of recipes, in README.md and docs/recipes.md, and kvq/recipes/recommended.json, from the measured
results and the recipes themselves.

python benchmarks/recipe_tables.py

A recipe's numbers are those of benchmarks/results/{quality,transforms,codebooks}.json, the first that measured
the recipe as it is now (its hash) on all six windows of the development span in mode ``stream``; failing that, those of
lowrank.json, of its first window alone, with a mark.
"""

import json
from pathlib import Path

from kvq.recipe import list_recipes, load_recipe

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
SOURCES = {"quality": 6, "transforms": 6, "codebooks": 6, "lowrank": 1}
WINDOWS, SEQ_LEN, SPEED_CONTEXT = 6, 2048, 8192
ROLES = {"klt2": "smallest", "klt3": "balanced", "klt4": "nearly lossless"}
RECOMMENDED = ROOT / "kvq/recipes/recommended.json"
BEGIN, END = "<!-- recipes: begin -->\n", "<!-- recipes: end -->"
# What the README shows: the control, what everybody knows, and the best at each size.
SHORT = (
    "fp16", "fp8", "int8", "kivi4", "klt4", "int4", "qoq4", "smoothrot4", "klt3", "kvquant3", "kivi2", "klt2",
)  # fmt: skip


def measured() -> dict[str, dict]:
    """{recipe hash: perplexity, kl, top1, asymptotic_bits} of every complete measurement."""
    found: dict[str, dict] = {}
    for source, windows in SOURCES.items():
        path = RESULTS / f"{source}.json"
        result = json.loads(path.read_text()) if path.is_file() else {"recipes": {}}
        for row in result["recipes"].values():
            own = row if "kl" in row else row.get("stream")
            if own and own.get("windows", result.get("windows")) == windows:
                mark = "" if windows == WINDOWS else "*"
                found.setdefault(row["recipe_hash"], own | {"asymptotic_bits": row["asymptotic_bits"], "mark": mark})
    return found


def recommended() -> list[dict]:
    """What the product says of the recipes that it recommends."""
    found = measured()
    decoded = json.loads((RESULTS / "decode_flagship.json").read_text())["rows"]
    speeds = {row["method"]: row["vs_dynamic"] for row in decoded if row["context"] == SPEED_CONTEXT}
    return [
        {
            "name": name,
            "role": role,
            "bits": found[load_recipe(name).hash]["asymptotic_bits"],
            "kl": float(f"{found[load_recipe(name).hash]['kl']:.3g}"),
            "tokens": SEQ_LEN,
            "speed": round(speeds[name], 2),
            "context": SPEED_CONTEXT,
        }
        for name, role in ROLES.items()
    ]


def table(names: list[str], found: dict[str, dict]) -> str:
    """One row a recipe: the measured ones by falling bits and rising KL, then the others."""
    lines = [
        "| recipe | what it does | paper | bits per element | perplexity | KL, nats | top-1 |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    rows = {name: (load_recipe(name), found.get(load_recipe(name).hash)) for name in names}

    def order(name: str) -> tuple[float, float]:
        row = rows[name][1]
        return (-round(row["asymptotic_bits"], 2), row["kl"]) if row else (1.0, 0.0)

    for name in sorted(rows, key=order):
        recipe, row = rows[name]
        numbers = ["-"] * 4
        if row:
            bits, kl = row["asymptotic_bits"], row["kl"]
            numbers = [f"{row['perplexity']:.2f}", f"{kl:.4f}", f"{row['top1']:.1%}"]
            numbers = [f"{bits:.2f}", *(number + row["mark"] for number in numbers)]
        lines.append("| " + " | ".join([f"`{name}`", recipe.summary, recipe.paper, *numbers]) + " |")
    return "\n".join(lines) + "\n"


def with_table(page: str, names: list[str]) -> str:
    head, rest = page.split(BEGIN)
    return head + BEGIN + table(names, measured()) + END + rest.split(END)[1]


def pages() -> dict[Path, list[str]]:
    """Pages with a table, and the recipes that each shows."""
    every = list_recipes()
    return {ROOT / "README.md": [name for name in SHORT if name in every], ROOT / "docs/recipes.md": every}


def main() -> None:
    for path, names in pages().items():
        path.write_text(with_table(path.read_text(), names))
    RECOMMENDED.write_text(json.dumps(recommended(), indent=1) + "\n")


if __name__ == "__main__":
    main()
