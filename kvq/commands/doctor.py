"""``kvq doctor``: what is installed, what will run, and whether a model can be quantized."""

from typing import Any

import click

from kvq.commands.common import Output, json_option, quiet_transformers
from kvq.errors import KvqError


@click.command("doctor")
@click.argument("model", required=False)
@json_option
def command(model: str | None, output: Output) -> None:
    """Show versions, the GPU and what will run; with MODEL, whether it can be quantized.

    \b
    Examples:
      kvq doctor
      kvq doctor builtin
      kvq doctor ./my-model --json -
    """
    quiet_transformers()
    from kvq.diagnosis.environment import environment, examine
    from kvq.report.diagnosis_tables import cause_line
    from kvq.report.tables import facts_table, layers_table

    report = environment()
    shown = {name: text or "not installed" for name, text in report["versions"].items()}
    shown["GPU"] = report["gpu"] or "none"
    shown |= {f"attention: {name}": text for name, text in report["attention"].items()}
    shown["embedded model"] = "installed" if report["builtin_installed"] else "not installed"
    output.show(facts_table("kvq doctor", shown))
    try:
        if model is not None:
            report["model"] = examine(model)
            output.show(layers_table(report["model"]["layers"]), _verdict(model, report["model"]))
            output.show(*(cause_line(cause) for cause in report["model"]["causes"]))
            output.show(*(f"FP8 in {engine}: {text}." for engine, text in report["model"]["fp8"].items()))
    except KvqError as error:
        report["model"] = {"model": model, "quantizable": False, "reason": str(error)}
        # The diagnosis stays complete for a machine to read, and the exit code still says no.
        raise
    finally:
        output.write(report)


def _verdict(model: str, facts: dict[str, Any]) -> str:
    total, full = len(facts["layers"]), facts["quantizable_layers"]
    left = f"; the other {total - full} stay as they are" if full < total else ""
    return f"{model} can be quantized: {full} of {total} layers{left}."
