"""The diagnosis of ``kvq inspect``: what quantization would do, as text, JSON and pictures."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvq.commands.common import Output, progress_bar, write_atomically
from kvq.errors import CheckpointError, DataError, RecipeError

# Recipes whose transforms are shown when none is asked for, best first.
_SHOWN = ("klt3", "turboquant4")
# Of a short calibration, for a look at a model.
SAMPLES, SEQ_LEN = 8, 512


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
        from kvq.commands.common import check_writable

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
    from kvq.diagnosis import CANDIDATES, bit_errors, diagnose, layers_of
    from kvq.recipe import load_recipe
    from kvq.report.diagnosis_tables import bit_errors_table, predictions_table, verdict_lines

    try:
        layers = layers_of(stats)
    except DataError as error:
        if wishes:
            raise
        output.show(f"No verdict: {error}")
        return {"diagnosis": None, "why_not": str(error)}
    recipes = [load_recipe(name) for name in CANDIDATES]
    if wishes.recipe and wishes.recipe.hash not in {recipe.hash for recipe in recipes}:
        recipes.insert(0, wishes.recipe)
    with progress_bar("Predicting") as step:
        found = diagnose(stats, recipes, folder=folder, layers=layers, progress=step)
        errors, widths_of = _bit_errors(bit_errors, stats, layers, wishes.recipe, folder)
    if wishes.recipe:
        _refuse_unfit(found, wishes.recipe)
    data = found.to_dict()
    output.show(predictions_table(data), bit_errors_table(errors, widths_of), *verdict_lines(data))
    if wishes.html or wishes.png:
        plan = _shown_plan(stats, found, wishes.recipe, folder)
        _save(title, facts, stats, layers, found, errors, widths_of, plan, wishes, output)
    return {"diagnosis": data, "bit_errors": {"recipe": widths_of, "layers": errors}}


def _refuse_unfit(found, recipe) -> None:
    why = next((p.why_not for p in found.predictions if p.recipe == recipe.name), "")
    if why:
        raise RecipeError(f"recipe {recipe.name!r} cannot be predicted: {why}")


def _bit_errors(compute, stats, layers, recipe, folder) -> tuple[dict, str]:
    """Of the recipe asked for where its codecs take other widths, else of kivi2."""
    if recipe is not None:
        try:
            return compute(stats, layers, recipe, folder), recipe.name
        except RecipeError:
            pass
    return compute(stats, layers), "kivi2"


def _shown_plan(stats, found, recipe, folder):
    """The plan of the recipe whose transforms are shown; None if none that can be fitted has any."""
    from kvq.diagnosis.predict import plan_of
    from kvq.recipe import load_recipe

    if recipe is not None:
        return plan_of(recipe, stats, folder)
    best = found.recommended.recipe if found.recommended else None
    fitted = {p.recipe for p in found.predictions if not p.why_not}
    for name in (best, *_SHOWN):
        if name is not None and name in fitted:
            plan = plan_of(load_recipe(name), stats, folder)
            if plan.has_transforms:
                return plan
    return None


def _save(title, facts, stats, layers, found, errors, widths_of, plan, wishes: Wishes, output: Output) -> None:
    from kvq.report.diagnosis_charts import diagnosis_charts
    from kvq.report.diagnosis_html import diagnosis_html
    from kvq.report.drawing import png

    made = diagnosis_charts(stats, layers, found, errors, widths_of, plan)
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
        page = diagnosis_html(title, facts, found.to_dict(), errors, widths_of, made)
        write_atomically(Path(wishes.html), page)
        output.show(f"Report written to {wishes.html}.")


def measured(folder: Path, name: str):
    """Statistics of a model over a little built-in text, for a look at it."""
    from kvq.calib.calibrate import Options, calibrate
    from kvq.calib.data import load_documents
    from kvq.calib.windows import token_windows
    from kvq.models.resolve import load_tokenizer

    tokenizer = load_tokenizer(folder)
    windows = token_windows(
        tokenizer, load_documents("builtin"), samples=SAMPLES, seq_len=SEQ_LEN, seed=0, source="builtin"
    )
    with tempfile.TemporaryDirectory() as state, progress_bar("Measuring") as step:
        return calibrate(
            folder, windows, Options(batch_size=1), state_folder=Path(state) / "state", progress=step,
            model_name=name, tokenizer=tokenizer,
        )  # fmt: skip
