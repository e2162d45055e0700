"""``kvq bench``: decode attention against the roof of this machine."""

import platform

import click

from kvq.commands.common import Output, json_option
from kvq.errors import KernelError

DEFAULT_SHAPES = {"cpu": "1x4K,1x16K", "cuda": "1x4K,1x32K,8x32K,32x32K"}


@click.command("bench")
@click.option(
    "--shapes",
    metavar="LIST",
    multiple=True,
    help="BATCHxTOKENS, separated by commas, e.g. 1x4K,8x32K; repeat the option for shapes with ',kv=8,g=4,d=128'.",
)
@click.option(
    "--bits",
    metavar="LIST",
    default="8,4,2,kivi2,e4m3",
    show_default=True,
    help="Widths: 8, 4, 3, 2, e4m3, nf4, kivi2, kivi4, or KEY:VALUE such as 4:2.",
)
@click.option("--impl", default="auto", show_default=True, help="auto, triton, cpp or reference, and no other.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@json_option
def command(shapes: tuple[str, ...], bits: str, impl: str, device: str, output: Output) -> None:
    """Measure decode attention on packed pages: checked first, then beside a copy and beside exact attention.

    \b
    Examples:
      kvq bench
      kvq bench --shapes 1x4K,1x32K --bits 4,2,kivi2
      kvq bench --shapes 8x32K,kv=4,g=8,d=128 --json bench.json
    """
    import torch

    from kvq.bench import bench
    from kvq.bench.roofline import Shape
    from kvq.kernels.dispatch import check_implementation
    from kvq.report.tables import bench_tables

    check_implementation(impl)
    if device == "cuda" and not torch.cuda.is_available():
        raise KernelError("--device cuda: there is no CUDA device; leave the option out to measure the CPU.")
    where = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    texts = shapes or (DEFAULT_SHAPES[where.type],)
    chosen = [Shape.parse(text) for given in texts for text in ([given] if "=" in given else given.split(","))]
    widths = [width.strip() for width in bits.split(",")]
    for width in widths:
        bench.sides_of(width)
    bench.refuse_too_large(chosen, widths, where)
    facts = {
        "device": torch.cuda.get_device_name() if where.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads() if where.type == "cpu" else None,
        "torch": torch.__version__,
    }
    report = facts | bench.bench(chosen, widths, where, impl, progress=lambda text: click.echo(text, err=True))
    output.show(*bench_tables(report))
    output.write(report)
    if bench.failed(report):
        raise KernelError("a check failed, and nothing of it was timed: " + "; ".join(bench.failed(report)) + ".")
