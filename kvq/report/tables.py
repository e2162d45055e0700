"""Results as rich tables. Everything arrives as plain data and nothing is computed here but the layout."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table


def plain_table(title: str, *columns: str) -> Table:
    """A table whose first column is text and whose other columns are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        # A name that is cut off cannot be typed.
        table.add_column(column, justify="right" if i else "left", overflow="fold")
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


def facts_table(title: str, facts: Mapping[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), str(value))
    return table


def recipes_table(rows: Iterable[Mapping[str, str]]) -> Table:
    table = Table(title="Recipes", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("summary")
    table.add_column("paper", no_wrap=True)
    for row in rows:
        table.add_row(row["name"], row["summary"], row["paper"])
    return table


def _ranges(indices: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> '0-2, 5'."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


LAYER_KINDS = {
    "full": "full attention: can be quantized",
    "sliding": "sliding window: bounded, stays exact",
    "state": "no cache of its own: left alone",
}


def layers_table(layers: Sequence[Mapping[str, Any]]) -> Table:
    """Layers of equal shape in one row."""
    alike: dict[tuple, list[int]] = {}
    for layer in layers:
        alike.setdefault((layer["kind"], layer["kv_heads"], layer["head_dim"], layer["window"]), []).append(
            layer["index"]
        )
    table = Table(title="Layers", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, justify in (("layers", "left"), ("kind", "left"), ("KV heads", "right"), ("head dim", "right")):
        table.add_column(name, justify=justify)
    for (kind, heads, dim, window), indices in alike.items():
        kind_text = LAYER_KINDS[kind] + (f" ({window:,} tokens)" if window else "")
        table.add_row(_ranges(indices), kind_text, number(heads or None), number(dim or None))
    return table


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
        table = plain_table(exact["shape"], *columns)
        for name, seconds in exact["seconds"].items():
            table.add_row(name, "", "", "", _duration(seconds), _share(exact["fraction"].get(name)), "", "")
        for row in report["rows"]:
            if row["shape"] == exact["shape"]:
                table.add_row(*_bench_row(row))
        shown += [table, *(f"{name}: {why}" for name, why in exact["not_run"].items())]
    shown += sorted({f"ran: {row['ran']}" for row in report["rows"]})
    return shown


def _bench_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    error, mib = f"{row['error']:.1e}", f"{row['bytes'] / 2**20:.1f}"
    if row["seconds"] is None:
        return row["width"], error, mib, "", row["note"], "", "", row["ran"].partition(" ")[0]
    measured = (
        _duration(row["floor"]),
        _duration(row["seconds"]),
        f"{row['fraction']:.0%}",
        f"{row['vs_best_exact']:.2f}x",
    )
    return (row["width"], error, mib, *measured, row["ran"].partition(" ")[0])


def _share(fraction: float | None) -> str:
    return "" if fraction is None else f"{fraction:.0%}"


def _duration(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def memory_table(plan: Mapping[str, Any]) -> Group:
    """A MemoryPlan: growth by kind of layer, and the cache of one sequence at a few lengths."""
    recipe = plan["recipe"]
    kinds = plain_table(f"Layers of {plan['model_type']} with {recipe}", "kind", "layers", "bytes per token")
    for row in plan["layer_kinds"]:
        kinds.add_row(MEMORY_KINDS[row["kind"]], number(row["layers"]), f"{row['bytes_per_token']:,.1f}")
    kinds.add_row("all", "", f"{plan['bytes_per_token']:,.1f} (fp16: {plan['plain_bytes_per_token']:,})")
    lengths = plain_table("Cache of one sequence", "tokens", "fp16", recipe, "smaller by")
    for row in plan["lengths"]:
        lengths.add_row(
            number(row["tokens"]), size(row["plain_bytes"]), size(row["recipe_bytes"]), f"{row['ratio']:.2f}x"
        )
    return Group(kinds, lengths, f"{plan['bits_per_element']:.2f} bits per element in the long run, metadata included.")
