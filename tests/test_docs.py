"""What the documents say is true: commands parse, recipes are listed, and the README's Python runs."""

import ast
import inspect
import json
import re
import runpy
import shlex
from pathlib import Path

import click
import pytest
import yaml

import kvq
from kvq.cli import main
from kvq.codecs import CODECS, PARTS
from kvq.exporting.exporter import export
from kvq.recipe import list_recipes, load_recipe, parse_recipe
from kvq.recipes import recommended
from kvq.transforms import TRANSFORMS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted(ROOT.glob("docs/*.md")),
]
README = (ROOT / "README.md").read_text()
API = (ROOT / "docs/api.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def command_lines() -> list[str]:
    """Every ``kvq ...`` line of the documents' shell blocks, and every `kvq ...` in backticks that has an argument."""
    found = []
    for text in (document.read_text() for document in DOCUMENTS):
        shell = [line for block in blocks(text, "bash") for line in block.splitlines()]
        inline = re.findall(r"`(kvq [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        found += [line for line in shell if line.startswith("kvq ")] + [" ".join(line.split()) for line in inline]
    return sorted(set(found))


def _help_lines() -> list[str]:
    commands = [main, *main_commands(main)]
    return sorted({line.strip() for c in commands for line in (c.help or "").splitlines() if line.startswith("  kvq ")})


def main_commands(group: click.Group) -> list[click.Command]:
    context = click.Context(group)
    found = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        found += [command, *(main_commands(command) if isinstance(command, click.Group) else [])]
    return found


@pytest.mark.parametrize("line", command_lines() + _help_lines())
def test_every_quoted_command_parses(line):
    args = shlex.split(line.split(" > ")[0].split(" < ")[0])[1:]
    command, context = main, click.Context(main)
    while isinstance(command, click.Group) and args:
        name, *args = args
        command = command.get_command(context, name)
        assert command is not None, line
    command.make_parser(context).parse_args(args)


def test_the_tables_of_recipes_hold_what_was_measured():
    script = runpy.run_path(str(ROOT / "benchmarks/recipe_tables.py"))
    for path, names in script["pages"]().items():
        page = path.read_text()
        assert script["with_table"](page, names) == page, "run python benchmarks/recipe_tables.py"
    assert all(f"| `{name}` |" in page for name in list_recipes()), "docs/recipes.md lists every recipe"


@pytest.mark.parametrize(("page", "registry"), [("codecs", CODECS), ("codecs", PARTS), ("transforms", TRANSFORMS)])
def test_the_tables_of_methods_hold_what_is_registered(page, registry):
    rows = re.findall(r"^\| (`[^|]*) \|", (ROOT / f"docs/{page}.md").read_text(), re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert set(registry.shipped()) <= listed


def test_the_compatibility_page_says_what_the_tables_say():
    script = runpy.run_path(str(ROOT / "docs/build_compatibility.py"))
    outcomes = json.loads((ROOT / "docs/compatibility.json").read_text())
    written = (ROOT / "docs/compatibility.md").read_text()
    assert script["page"](outcomes) == written, "run python docs/build_compatibility.py"
    assert {path.stem for path in (ROOT / "tests/contracts").glob("test_*.py")} == set(script["ABOUT"])


def test_links_lead_somewhere():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert (document.parent / target).exists(), (document.name, target)


def test_the_recipe_of_the_walk_through_is_valid():
    block = blocks((ROOT / "CONTRIBUTING.md").read_text(), "yaml")[0]
    assert parse_recipe(yaml.safe_load(block), source="CONTRIBUTING.md").key.bits == 3


def test_the_python_of_the_readme_runs(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    export(tiny_checkpoint(head_dim=32), "kivi2", tmp_path / "smollm2-kivi2")
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(README, "python")
    exec(compile(block, "README.md", "exec"), {})
    assert "bytes of cache for" in capsys.readouterr().out


def test_the_api_page_describes_every_public_name_as_it_is():
    script = runpy.run_path(str(ROOT / "docs/build_api.py"))
    assert script["page"](API) == API, "run python docs/build_api.py"
    described = set(re.findall(r"<!-- (\w+): begin -->", API))
    errors = {name for name, thing in vars(kvq.errors).items() if inspect.isclass(thing) and name.endswith("Error")}
    assert errors <= set(kvq.__all__)
    assert all(f"| `{name}` |" in API for name in errors)
    assert described | errors | {"__version__"} == set(kvq.__all__)


def test_every_public_function_is_described_with_types_errors_and_an_example():
    examples = "\n".join(blocks(API, "python"))
    for name in sorted(set(kvq.__all__) - {"__version__"}):
        thing = getattr(kvq, name)
        assert thing.__doc__, name
        if inspect.isclass(thing):
            continue
        assert f"kvq.{name}(" in examples
        own = inspect.signature(thing)
        assert own.return_annotation is not inspect.Signature.empty, name
        for argument in own.parameters.values():
            assert argument.annotation is not inspect.Parameter.empty, (name, argument)


def test_the_python_of_the_api_page_runs(tiny_checkpoint, tmp_path, monkeypatch):
    tiny_checkpoint(head_dim=64, name="my-model")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks(API, "python"):
        exec(compile(block, "api.md", "exec"), names)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_import_kvq_and_nothing_inside_it(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] != "kvq", ast.unparse(node)
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("kvq.") for alias in node.names), ast.unparse(node)


@pytest.mark.model
def test_the_example_generates_with_the_embedded_model(builtin_dir, capsys):
    runpy.run_path(str(ROOT / "examples/generate.py"))["main"](str(builtin_dir))
    assert "bytes of cache for" in capsys.readouterr().out


def test_recommended_recipes_have_the_figures_of_the_results():
    """What the product ships is what was measured of the recipes as they are: a stale figure fails."""
    script = runpy.run_path(str(ROOT / "benchmarks/recipe_tables.py"))
    assert recommended() == script["recommended"](), "run python benchmarks/recipe_tables.py"
    assert [row["bits"] for row in recommended()] == sorted(row["bits"] for row in recommended())
    assert [row["kl"] for row in recommended()] == sorted((row["kl"] for row in recommended()), reverse=True)


@pytest.mark.parametrize(("name", "gib"), [("klt2", "2.4"), ("kivi2", "3.0")])
def test_the_first_numbers_of_the_readme_are_those_of_the_recipes(name, gib):
    """16 bits a number are 16 GiB there: 32 layers of 8 KV heads of 128 channels, 131,072 tokens."""
    head, tokens = load_recipe(name).for_head(0, 0, 32), 131_072
    codecs = [spec.stand_in(128, 8) for spec in (head.key, head.value)]
    bits = sum(codec.layout(128).bits_per_element(8, padded=True) for codec in codecs) / 2
    exact = head.tokens.window + head.tokens.sinks
    assert f"{(bits * (tokens - exact) + 16 * exact) / tokens:.1f}" == gib
    assert f"{gib} GiB" in (ROOT / "README.md").read_text()[:600]
