"""``kvq report``: results as a page, or as Markdown."""

from pathlib import Path

import click

from kvq.commands.common import check_writable, write_atomically


@click.command("report")
@click.argument("results", nargs=-1, required=True, metavar="RESULTS...")
@click.option("-o", "--output", "out", metavar="FILE", help="File to write; without it, Markdown goes to stdout.")
@click.option("--format", "kind", type=click.Choice(["html", "md"]), help="By default by the name of FILE.")
@click.option("--open", "browse", is_flag=True, help="Open FILE in the browser.")
def command(results: tuple[str, ...], out: str | None, kind: str | None, browse: bool) -> None:
    """Show results of 'kvq eval --json' and 'kvq compare --json' as one page that needs no network.

    \b
    Examples:
      kvq report result.json -o report.html --open
      kvq report kivi4.json kivi2.json -o report.html
      kvq report result.json --format md
    """
    kind = kind or ("html" if out is not None and not out.endswith(".md") else "md")
    if out is None and (kind == "html" or browse):
        raise click.UsageError("-o FILE is missing: name the page to write, such as -o report.html.")
    if out is not None:
        check_writable(out)
    from kvq.report.load import load_results

    if kind == "html":
        from kvq.report.html import html_report as written
    else:
        from kvq.report.markdown import markdown_report as written
    found = load_results(results)
    text = written(found)
    if out is None:
        click.echo(text, nl=False)
        return
    write_atomically(Path(out), text)
    click.echo(f"Report of {len(found)} {'run' if len(found) == 1 else 'runs'} written to {out}.")
    if browse:
        click.launch(Path(out).resolve().as_uri())
