"""The diagnosis of ``kvq inspect``: what quantization would do, as text, JSON and pictures."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvq.commands.common import Output, check_writable, progress_bar, write_atomically
from kvq.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from kvq.diagnosis.outlook import Outlook


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """recipe: to predict and to show, or None. html: a file; png: a folder; each may be None."""

    recipe: Any = None
    html: str | None = None
    png: str | None = None

    def __bool__(self) -> bool:
        return any((self.recipe, self.html, self.png))

    def check(self) -> None:
        """Refuse before any work what cannot be done after it."""
        if self.html:
            check_writable(self.html)
        if self.png and Path(self.png).exists() and not Path(self.png).is_dir():
            raise CheckpointError(f"{self.png!r} is a file: give --png the name of a folder.")
        if self.html or self.png:
            import kvq.report.drawing  # noqa: F401 - says what is missing


def show_diagnosis(stats, title: str, facts: dict[str, Any], wishes: Wishes, output: Output, folder=None) -> dict:
    """Show the diagnosis and return it as plain data; statistics that hold too little say so in one line.

    Raises DataError if they hold too little for what was asked for.
    """
    from kvq.diagnosis import layers_of
    from kvq.diagnosis.outlook import outlook_of
    from kvq.report.diagnosis_tables import bit_errors_table, predictions_table, verdict_lines

    try:
        layers = layers_of(stats)
    except DataError as error:
        if wishes:
            raise
        output.show(f"No verdict: {error}")
        return {"diagnosis": None, "why_not": str(error)}
    pictures = bool(wishes.html or wishes.png)
    with progress_bar("Predicting") as step:
        found = outlook_of(stats, layers, wishes.recipe, folder, pictures=pictures, progress=step)
    data = found.to_dict()
    diagnosis = data["diagnosis"]
    output.show(
        predictions_table(diagnosis), bit_errors_table(found.errors, found.widths_of), *verdict_lines(diagnosis)
    )
    if pictures:
        _save(title, facts, found, wishes, output)
    return data


def _save(title: str, facts: dict[str, Any], found: "Outlook", wishes: Wishes, output: Output) -> None:
    from kvq.report.diagnosis_charts import diagnosis_charts
    from kvq.report.diagnosis_html import diagnosis_html
    from kvq.report.drawing import png

    made = diagnosis_charts(found.stats, found.layers, found.diagnosis, found.errors, found.widths_of, found.shown)
    if wishes.png:
        target = Path(wishes.png)
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"folder {wishes.png!r} cannot be made ({error.strerror}): choose another.") from None
        for name, figure in made.items():
            write_atomically(target / f"{name}.png", png(figure))
        output.show(f"{len(made)} pictures written to {target}.")
    if wishes.html:
        page = diagnosis_html(title, facts, found.diagnosis.to_dict(), found.errors, found.widths_of, made)
        write_atomically(Path(wishes.html), page)
        output.show(f"Report written to {wishes.html}.")
