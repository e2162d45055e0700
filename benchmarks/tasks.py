"""Every local task on the embedded model, under the baseline and a few recipes, as JSON, table and page.

    kvq calibrate builtin --full -o stats.safetensors
    python benchmarks/tasks.py --task-data DIR --stats stats.safetensors

DIR holds the rows of the tasks (``kvq.eval.local``) and wikitext2_valid.txt. Documents are few, to keep it short on a
CPU, and their number stands beside every score: with so few, most differences cannot be told from chance, and the
table says so; --scale 10 asks ten times as many. Examples in the prompt make requests long enough to read quantized
tokens, of which these recipes keep the last 128 exact. Results are written after every group of tasks, and a run that
was interrupted goes on where it was.
"""

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from kvq.commands.common import quiet_transformers
from kvq.eval.evaluate import compare
from kvq.eval.result import SCHEMA_VERSION
from kvq.report.html import html_report
from kvq.report.load import joined
from kvq.report.markdown import markdown_report
from kvq.report.results import compare_table

RESULTS = Path(__file__).parent / "results"
FOUND = Path(__file__).parents[1] / "examples" / "auto"
RECIPES = (
    "fp16",
    "int4",
    "kivi4",
    "kivi2",
    "smoothrot4",
    *(str(FOUND / f"auto-{bits}.yaml") for bits in ("4.5", "2.5")),
)
TEXT = "wikitext2_valid.txt"


@dataclass(frozen=True)
class Group:
    """Tasks that share their options; shots: examples in a prompt."""

    tasks: str
    limit: int
    shots: int | None = None
    lengths: str | None = None
    seq_len: int | None = None


GROUPS = (
    Group("perplexity,divergence", limit=4, seq_len=512),
    Group("arc_easy,arc_challenge,piqa", limit=6, shots=5),
    Group("hellaswag,lambada_openai,boolq", limit=6, shots=2),
    Group("gsm8k", limit=2, shots=2),
    Group("needle,copy_json", limit=1, lengths="1024"),
    Group("wikitext", limit=1),
)


def run(group: Group, arguments: argparse.Namespace, progress) -> list[dict]:
    names = group.tasks.split(",")
    settings = {
        "tasks": names,
        "limit": arguments.scale * group.limit,
        "fewshot": group.shots,
        "seq_len": group.seq_len,
    }
    settings |= {"task_data": arguments.task_data, "data": Path(arguments.task_data) / TEXT}
    settings |= {"lengths": tuple(map(int, group.lengths.split(","))) if group.lengths else None}
    if arguments.cache:
        settings["cache"] = arguments.cache
    found = compare([arguments.model], arguments.recipes, stats=arguments.stats, progress=progress, **settings)
    if any(result.partial for result in found):
        raise KeyboardInterrupt
    return [replace(result, command=_command(group, arguments)).to_dict() for result in found]


def _command(group: Group, arguments: argparse.Namespace) -> str:
    recipes = ",".join(Path(own).name for own in arguments.recipes)
    words = [f"kvq compare {arguments.model} --recipes {recipes} --stats stats.safetensors"]
    words += [f"--tasks {group.tasks} --limit {arguments.scale * group.limit} --task-data DIR --data {TEXT}"]
    words += [f"--num-fewshot {group.shots}"] if group.shots is not None else []
    words += [f"--lengths {group.lengths}"] if group.lengths else []
    words += [f"--seq-len {group.seq_len}"] if group.seq_len else []
    return " ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task-data", required=True)
    parser.add_argument("--stats", required=True)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--recipes", type=lambda text: text.split(","), default=list(RECIPES))
    parser.add_argument("--scale", type=int, default=1, help="times as many documents")
    parser.add_argument("--cache", help="folder for answers, so that an interrupted run goes on")
    parser.add_argument("--out", default=str(RESULTS / "tasks"), help="results go to OUT.json, OUT.md and OUT.html")
    arguments = parser.parse_args()
    quiet_transformers()
    console = Console(stderr=True)
    runs: list[dict] = []
    with Progress(console=console) as bar:
        for group in GROUPS:
            task = bar.add_task(group.tasks, total=None)

            def step(done: int, total: int, what: str, task=task) -> None:
                bar.update(task, completed=done, total=total, description=what)

            runs += run(group, arguments, step)
            bar.update(task, description=group.tasks, completed=1, total=1)
            found = joined(runs)
            write(found, Path(arguments.out))
    Console().print(compare_table(found))


def write(found: list[dict], out: Path) -> None:
    text = json.dumps({"schema_version": SCHEMA_VERSION, "runs": found}, indent=1) + "\n"
    out.with_suffix(".json").write_text(text, encoding="utf-8")
    out.with_suffix(".md").write_text(markdown_report(found, heading="# Tasks on the embedded model"), encoding="utf-8")
    out.with_suffix(".html").write_text(html_report(found), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
