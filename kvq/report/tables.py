"""Results as rich tables. Everything arrives as plain data and nothing is computed here but the layout."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Column, Table


def new_table(title: str, *columns: str | Column, rows: Iterable[Sequence[str]] = (), left: int | None = 1) -> Table:
    """A table whose first ``left`` columns are texts (None: all), and whose others are numbers.

    A Column of rich says for itself how it is set.
    """
    # Folded, because a name that is cut off cannot be typed.
    texts = [
        Column(str(name), justify="left" if left is None or i < left else "right", overflow="fold")
        for i, name in enumerate(columns)
    ]
    made = (own if isinstance(own, Column) else text for own, text in zip(columns, texts))
    table = Table(*made, title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    return table


def size(count: float) -> str:
    """Bytes for people, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def number(value: Any, digits: int = 4) -> str:
    if isinstance(value, float):
        return f"{value:,.{digits}f}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def percent(share: float | None, missing: str = "-") -> str:
    return missing if share is None else f"{share:.0%}"


def facts_table(title: str, facts: Mapping[str, Any]) -> Table:
    rows = [(name.replace("_", " "), str(value)) for name, value in facts.items()]
    table = new_table(title, Column(style="dim", no_wrap=True), Column(overflow="fold"), rows=rows)
    table.box, table.show_header = None, False
    return table


def recommended_table(rows: Sequence[Mapping[str, Any]]) -> tuple[Table, str]:
    """The recipes to begin with, and how to take one."""
    tokens, context = rows[0]["tokens"], rows[0]["context"]
    columns = (
        Column("name", no_wrap=True), Column("what for"), "bits per element", f"KL at {tokens:,} tokens",
        f"speed at {context:,}",
    )  # fmt: skip
    shown = (
        (row["name"], row["role"], f"{row['bits']:.2f}", f"{row['kl']:.2g}", f"{row['speed']:.2f}x") for row in rows
    )
    legend = (
        "Measured with the embedded model on a CPU: KL in nats a token, speed beside a plain cache of exact numbers. "
        "They need statistics: 'kvq calibrate MODEL --for NAME -o STATS', then --stats STATS."
    )
    return new_table("Recommended", *columns, rows=shown), legend


def recipes_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    columns = (Column("name", no_wrap=True), Column("summary"), Column("contexts"), Column("paper", no_wrap=True))
    bound = {True: "as long as the calibration text", False: "any"}
    shown = ((row["name"], row["summary"], bound[row["is_bound_to_positions"]], row["paper"]) for row in rows)
    return new_table("Recipes", *columns, rows=shown)


LAYER_KINDS = {
    "full": "full attention: can be quantized",
    "sliding": "sliding window: bounded, stays exact",
    "state": "no cache of its own: left alone",
}


def layers_table(layers: Sequence[Mapping[str, Any]]) -> Table:
    """Layers of equal shape in one row."""
    # Reading recipes takes torch, which a list of them does not need.
    from kvq.recipe import numbers_text

    alike: dict[tuple, list[int]] = {}
    for layer in layers:
        shape = tuple(layer[name] for name in ("kind", "kv_heads", "head_dim", "window"))
        alike.setdefault(shape, []).append(layer["index"])
    rows = (
        (
            numbers_text(indices).replace(",", ", "),
            LAYER_KINDS[kind] + (f" ({window:,} tokens)" if window else ""),
            number(heads or None),
            number(dim or None),
        )
        for (kind, heads, dim, window), indices in alike.items()
    )
    return new_table("Layers", "layers", "kind", "KV heads", "head dim", rows=rows, left=2)


def generation_table(result: Mapping[str, Any]) -> Table:
    cache = result["cache"]
    speed = f"{result['tokens_per_second']:.1f} tokens/s" if result["tokens_per_second"] else "not measured"
    small = f"{size(cache['bytes_in_16_bit'])}, and an fp16 cache {size(cache['fp16_bytes'])}"
    return facts_table(
        "",
        {
            "tokens": f"{result['prompt_tokens']:,} in the prompt, {result['new_tokens']:,} generated",
            "decoding": f"{speed}, first token after {result['first_token_seconds']:.2f} s",
            "cache": f"{cache['tokens']:,} tokens in {size(cache['bytes'])} (exact tokens in {cache['exact_dtype']})",
            "at 16 bits": small,
            "recipe": cache["recipe"],
            "implementation": cache["implementation"],
        },
    )


MEMORY_KINDS = {
    "packed": "packed",
    "exact": "full attention, kept exact",
    "sliding": "sliding window, kept exact",
    "none": "no cache",
}


def bench_tables(report: Mapping[str, Any]) -> list[Any]:
    """Roofline tables of ``kvq bench``: one for each shape, its exact attention first."""
    shown: list[Any] = [
        f"{report['device']}, copy bandwidth {report['copy_bandwidth'] / 1e9:.1f} GB/s (read and written)"
    ]
    for exact in report["exact"]:
        columns = ("width", "error", "MiB", "floor", "time", "of copy", "vs best exact", "ran")
        rows = [
            (name, "", "", "", _duration(seconds), percent(exact["fraction"].get(name), ""), "", "")
            for name, seconds in exact["seconds"].items()
        ]
        rows += [_bench_row(row) for row in report["rows"] if row["shape"] == exact["shape"]]
        shown.append(new_table(exact["shape"], *columns, rows=rows))
        shown += [f"{name}: {why}" for name, why in exact["not_run"].items()]
    shown += sorted({f"ran: {row['ran']}" for row in report["rows"]})
    return shown


def _bench_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    measured = ("", row["note"], "", "")
    if row["seconds"] is not None:
        times = (_duration(row["floor"]), _duration(row["seconds"]))
        measured = (*times, percent(row["fraction"]), f"{row['vs_best_exact']:.2f}x")
    error, mib = f"{row['error']:.1e}", f"{row['bytes'] / 2**20:.1f}"
    return row["width"], error, mib, *measured, row["ran"].partition(" ")[0]


def _duration(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def memory_table(plan: Mapping[str, Any]) -> Group:
    """A MemoryPlan: growth by kind of layer, and the cache of one sequence at a few lengths."""
    recipe = plan["recipe"]
    kinds = [
        (MEMORY_KINDS[row["kind"]], number(row["layers"]), f"{row['bytes_per_token']:,.1f}")
        for row in plan["layer_kinds"]
    ]
    kinds.append(("all", "", f"{plan['bytes_per_token']:,.1f} (fp16: {plan['plain_bytes_per_token']:,})"))
    lengths = [
        (number(row["tokens"]), size(row["plain_bytes"]), size(row["recipe_bytes"]), f"{row['ratio']:.2f}x")
        for row in plan["lengths"]
    ]
    return Group(
        new_table(f"Layers of {plan['model_type']} with {recipe}", "kind", "layers", "bytes per token", rows=kinds),
        new_table("Cache of one sequence", "tokens", "fp16", recipe, "smaller by", rows=lengths),
        f"{plan['bits_per_element']:.2f} bits per element in the long run, metadata included.",
    )


def search_table(found: Mapping[str, Any]) -> Table:
    """The chosen recipes of a search and the best uniform ones: what was measured, beside what was predicted."""
    rows = (
        (
            row["name"],
            number(row["bits"], 3),
            number(row["measured"]["kl"], 5),
            number(row["measured"]["kl_stderr"], 5),
            number(row["measured"]["top1"]),
            number(row["confirmed"]["kl"] if "confirmed" in row else None, 5),
            number(row.get("refitted_kl"), 5),
            number(row["predicted"], 5),
        )
        for row in sorted([*found["points"], *found["uniform"]], key=lambda row: (row["budget"], row["measured"]["kl"]))
    )
    title = "Search: KL on text that sensitivities did not see"
    columns = (
        "recipe",
        "bits",
        "KL",
        "±",
        "top-1",
        "confirmed",
        "refitted",
        Column("predicted", justify="right", style="dim"),
    )
    return new_table(title, *columns, rows=rows)
