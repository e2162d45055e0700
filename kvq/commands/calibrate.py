"""``kvq calibrate``: run a model over text and save statistics of its keys and values."""

from pathlib import Path

import click

from kvq.commands.common import Output, check_writable, json_option, progress_bar, quiet_transformers


@click.command("calibrate")
@click.argument("model")
@click.option("-o", "--output", "out", metavar="STATS", required=True, help="File to write, e.g. stats.safetensors.")
@click.option("--data", default="builtin", show_default=True, metavar="builtin|FILE|HUB_ID", help="Calibration text.")
@click.option("--samples", default=64, show_default=True, type=click.IntRange(1), help="Windows of text.")
@click.option("--seq-len", default=512, show_default=True, type=click.IntRange(2), help="Tokens per window.")
@click.option("--seed", default=0, show_default=True, help="Seed of the choice of windows.")
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(1), help="Windows per forward.")
@json_option
def command(
    model: str, out: str, data: str, samples: int, seq_len: int, seed: int, batch_size: int, output: Output
) -> None:
    """Measure the keys and values of MODEL over text, and save the statistics.

    Only recipes with static scales (fp8) need statistics. An interrupted run continues when the same command is
    given again.

    \b
    Examples:
      kvq calibrate builtin -o stats.safetensors
      kvq calibrate ./my-model -o stats.safetensors --data corpus.txt --samples 128
    """
    check_writable(out)
    quiet_transformers()
    from kvq.calib.collect import collect
    from kvq.calib.data import load_texts, token_windows
    from kvq.commands.inspect import stats_rows
    from kvq.models.describe import describe
    from kvq.models.resolve import load_config, load_model, load_tokenizer, resolve_model, weights_fingerprint
    from kvq.report.tables import stats_table

    folder = resolve_model(model)
    describe(load_config(folder))
    windows, identity = token_windows(
        load_tokenizer(folder), load_texts(data), samples=samples, seq_len=seq_len, seed=seed, source=data
    )
    path = Path(out)
    with progress_bar("Calibrating", tokens_per_step=seq_len) as step:
        stats = collect(
            load_model(folder),
            windows,
            batch_size=batch_size,
            progress=step,
            resume_path=path.with_name(f".{path.name}.partial"),
            model_name=Path(model).name,
            weights_fingerprint=weights_fingerprint(folder),
            data=identity,
        )
    stats.save(path)
    output.show(stats_table(stats_rows(stats)), f"Statistics of {samples} x {seq_len} tokens written to {out}.")
    output.write({"stats": out, "layers": len(stats.layers), "tokens": samples * seq_len, **stats.provenance()})
