"""Write the descriptions in docs/api.md from the code: signature and docstring of every public name.

python docs/build_api.py

What stands between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->`` is made here, everything else by hand;
``tests/test_docs.py`` says when the page must be made anew.
"""

import ast
import inspect
import re
import textwrap
from pathlib import Path
from types import FunctionType

import kvq

PAGE = Path(__file__).with_name("api.md")
WIDTH = 110
_BOUND = ("self", "cls")


def signature(name: str, function: FunctionType) -> str:
    """A function's signature as its source writes it, one argument a line where it is long."""
    node = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
    assert isinstance(node, ast.FunctionDef)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    arguments = _arguments(node.args)
    short = f"{name}({', '.join(arguments)}){returns}"
    if len(short) > WIDTH:
        short = "\n".join([f"{name}(", *(f"    {own}," for own in arguments), f"){returns}"])
    return short.replace("'", '"')


def _arguments(given: ast.arguments) -> list[str]:
    def written(own: ast.arg, default: ast.expr | None = None) -> str:
        text = ast.unparse(own)
        return text if default is None else f"{text}{' = ' if own.annotation else '='}{ast.unparse(default)}"

    missing = [None] * (len(given.args) - len(given.defaults))
    found = [written(*pair) for pair in zip(given.args, [*missing, *given.defaults]) if pair[0].arg not in _BOUND]
    star = [f"*{written(given.vararg)}"] if given.vararg else ["*"] if given.kwonlyargs else []
    found += star + [written(*pair) for pair in zip(given.kwonlyargs, given.kw_defaults)]
    return found + ([f"**{written(given.kwarg)}"] if given.kwarg else [])


def description(name: str) -> str:
    """What the page says of a public name."""
    thing = getattr(kvq, name)
    if not inspect.isclass(thing):
        return f"```text\n{signature(f'kvq.{name}', thing)}\n\n{inspect.getdoc(thing)}\n```"
    lines = [inspect.getdoc(thing) or ""]
    for own, value in vars(thing).items():
        if own.startswith("_"):
            continue
        function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if isinstance(function, FunctionType):
            prefix = f"{thing.__name__}." if isinstance(value, classmethod) else "."
            lines.append(f"{signature(prefix + own, function)}\n{_first(function)}")
        elif isinstance(value, property):
            lines.append(f".{own}\n{_first(value)}")
    return "```text\nkvq." + name + "\n\n" + "\n\n".join(line.rstrip() for line in lines) + "\n```"


def _first(thing: object) -> str:
    """The first paragraph of a docstring, indented."""
    text = (inspect.getdoc(thing) or "").split("\n\n")[0]
    return textwrap.indent(text, "    ")


def page(text: str) -> str:
    """The page with every description made anew."""

    def made(match: re.Match) -> str:
        return f"<!-- {match[1]}: begin -->\n{description(match[1])}\n<!-- {match[1]}: end -->"

    return re.sub(r"<!-- (\w+): begin -->\n.*?<!-- \1: end -->", made, text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
