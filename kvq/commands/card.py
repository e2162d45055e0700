"""``kvq card``: put results into the model card of an export."""

from pathlib import Path

import click

from kvq.commands.common import write_atomically


@click.command("card")
@click.argument("folder", metavar="DIR")
@click.argument("results", nargs=-1, required=True, metavar="RESULTS...")
@click.option("--dry-run", is_flag=True, help="Print the card and write nothing.")
def command(folder: str, results: tuple[str, ...], dry_run: bool) -> None:
    """Put RESULTS of 'kvq eval DIR --json' into the model card (README.md) of the export DIR.

    An earlier section of results is replaced. Results of another recipe, of other weights or of an interrupted run are
    refused.

    \b
    Examples:
      kvq card smollm2-kivi2 result.json
    """
    from kvq.exporting.manifest import MANIFEST, restated
    from kvq.exporting.model_card import CARD
    from kvq.report.load import load_results
    from kvq.report.results_card import card_with_results

    text = card_with_results(folder, load_results(results))
    if dry_run:
        click.echo(text, nl=False)
        return
    manifest = restated(Path(folder), CARD, text.encode())
    write_atomically(Path(folder) / CARD, text)
    if manifest is not None:
        write_atomically(Path(folder) / MANIFEST, manifest)
    click.echo(f"Results written into {Path(folder) / CARD}.")
