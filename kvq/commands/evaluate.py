"""``kvq eval``: score a model while it reads its quantized cache."""

import click

from kvq.commands.common import (
    Output,
    chosen_recipe,
    json_option,
    progress_bar,
    quiet_transformers,
    settings_option,
)

MODES = ("stream", "prefill", "chunked", "simulate")


@click.command("eval")
@click.argument("model")
@click.option("--recipe", metavar="NAME|FILE", help="Recipe for a plain model; an export brings its own.")
@settings_option
@click.option(
    "--tasks",
    default="perplexity,divergence",
    show_default=True,
    metavar="NAME,...",
    help="perplexity, divergence, and names of lm-eval tasks.",
)
@click.option("--data", default="builtin", show_default=True, metavar="builtin|FILE|HUB_ID", help="Text to score.")
@click.option("--seq-len", type=click.IntRange(2), help="Tokens per window.")
@click.option("--stride", type=click.IntRange(1), help="Tokens from one window to the next; scored once each.")
@click.option("--limit", type=click.IntRange(1), help="Windows, or requests of an lm-eval task, to score.")
@click.option(
    "--mode", type=click.Choice(MODES), default="stream", show_default=True, help="What the scored tokens attend to."
)
@click.option("--chunk", default=512, show_default=True, type=click.IntRange(1), help="Tokens per chunk, mode chunked.")
@click.option("--baseline", metavar="MODEL", help="Model to compare with, instead of the same weights unquantized.")
@click.option("--stats", metavar="STATS", help="Statistics of 'kvq calibrate', for --recipe with static scales.")
@click.option("--task-dir", metavar="DIR", help="Folder with lm-eval task files of your own.")
@click.option("--batch-size", default=1, show_default=True, type=click.IntRange(1), help="Windows per forward.")
@click.option("--seed", default=0, show_default=True, help="Seed of lm-eval tasks that sample.")
@json_option
def command(
    model: str,
    recipe: str | None,
    settings: dict,
    tasks: str,
    data: str,
    seq_len: int | None,
    stride: int | None,
    limit: int | None,
    mode: str,
    chunk: int,
    baseline: str | None,
    stats: str | None,
    task_dir: str | None,
    batch_size: int,
    seed: int,
    output: Output,
) -> None:
    """Score an export, or a plain MODEL with --recipe, while it reads its quantized cache.

    \b
    Modes, by what a scored token attends to:
      stream    what token-by-token decoding would have read (the default)
      prefill   the prompt exactly, the continuation through the packed prompt
      chunked   as stream, with the text fed in chunks
      simulate  everything quantized but the sinks, no exact window: for comparison with papers

    \b
    Examples:
      kvq eval smollm2-kivi2 --limit 4
      kvq eval builtin --recipe kivi4 --tasks perplexity --data book.txt --seq-len 2048
      kvq eval smollm2-kivi2 --tasks my_task --task-dir tasks --json result.json
    """
    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    if not names:
        raise click.UsageError("--tasks is empty: name one, for example --tasks perplexity,divergence.")
    chosen = chosen_recipe(recipe, settings)
    quiet_transformers()
    from kvq.calib.stats import Stats
    from kvq.eval.evaluate import DEFAULT_SEQ_LEN, evaluate
    from kvq.report.tables import eval_table

    with progress_bar("Evaluating", tokens_per_step=seq_len or DEFAULT_SEQ_LEN) as step:
        result = evaluate(
            model,
            chosen,
            tasks=names,
            data=data,
            seq_len=seq_len,
            stride=stride,
            limit=limit,
            mode=mode,
            chunk=chunk,
            baseline=baseline,
            stats=Stats.load(stats) if stats else None,
            task_dir=task_dir,
            batch_size=batch_size,
            seed=seed,
            progress=step,
        ).to_dict()
    output.show(eval_table(result))
    output.write(result)
    if result["partial"]:
        raise KeyboardInterrupt
