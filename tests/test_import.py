"""``import kvq`` is lean, and imports inside the package go one way, down the floors, without a circle of files."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

import kvq

PACKAGE = Path(kvq.__file__).parent
# A part imports from its own floor and from those below it; parts of one floor form no circle either.
FLOORS = (
    ("errors", "shapes", "atomic", "registry", "settings", "progress", "recipes", "pages"),
    ("kernels",),
    ("codecs",),
    ("transforms", "models"),
    ("heads", "recipe"),
    ("cache",),
    ("calib", "exporting"),
    ("integrations", "engines"),
    ("eval",),
    ("diagnosis", "searching", "report", "bench"),
    ("api",),
    ("cli", "commands"),
)
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
Graph = dict[str, set[str]]


def imports(sources: Mapping[str, str]) -> Graph:
    """Which modules of kvq each module imports anywhere: at the top, in a function, for types only.

    ``from package import module`` is an import of both: the package's ``__init__`` must have run, or be running.
    Only the version of ``kvq`` is a fact about the package and no import of its ``__init__``.
    """
    graph: Graph = {}
    for module, source in sources.items():
        found = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{module}: relative imports are not read here, write the whole name"
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {node.module} if node.module != "kvq" else set()
                if any(f"kvq.{alias.name}" not in sources for alias in node.names if alias.name != "__version__"):
                    found.add(node.module)
        graph[module] = {name for name in found if name in sources} - {module}
    return graph


def part(module: str) -> str:
    return module.removeprefix("kvq").removeprefix(".").split(".")[0]


def climbs(graph: Graph) -> list[str]:
    """Imports from a higher floor; the package's own ``__init__``, the public face, stands above all."""

    def level(module: str) -> int:
        return LEVEL[part(module)] if module != "kvq" else len(FLOORS)

    return [f"{a} -> {b}" for a in sorted(graph) for b in sorted(graph[a]) if level(b) > level(a)]


def circles(graph: Mapping[str, set[str]]) -> list[str]:
    """Every import that lies on a circle: what it imports reaches it again."""

    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            new = graph.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        return seen

    on_one = {module for module in graph if module in reached(module)}
    return [f"{a} -> {b}" for a in sorted(on_one) for b in sorted(graph[a] & on_one) if a in reached(b)]


def parts_of(graph: Graph) -> Graph:
    """The same imports between parts, files of a part taken together."""
    found: Graph = {}
    for module, names in graph.items():
        found.setdefault(part(module), set()).update({part(name) for name in names} - {part(module)})
    return found


def module_name(path: Path) -> str:
    return ".".join(("kvq", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


@pytest.fixture(scope="module")
def graph() -> Graph:
    return imports({module_name(path): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))})


def test_every_part_has_a_floor(graph):
    assert {part(module) for module in graph} - {""} <= set(LEVEL)


def test_imports_go_down_the_floors(graph):
    found = climbs(graph)
    assert not found, "\n".join(found)


def test_no_circle_of_files_or_parts(graph):
    """Late imports and type-only ones included."""
    found = circles(graph) + circles(parts_of(graph))
    assert not found, "\n".join(found)


def test_what_the_tests_above_would_see():
    """Negative controls: an upward import in a function, a circle by a late, a type-only or a package's import."""
    up = imports({"kvq.cache.a": "def f():\n    from kvq.eval import b", "kvq.eval": "", "kvq.eval.b": ""})
    assert climbs(up) == ["kvq.cache.a -> kvq.eval", "kvq.cache.a -> kvq.eval.b"]
    assert climbs(imports({"kvq": "", "kvq.cache": "from kvq import load"})) == ["kvq.cache -> kvq"]
    assert climbs(imports({"kvq": "", "kvq.cache": "from kvq import __version__"})) == []

    late = imports({"kvq.a": "import kvq.b", "kvq.b": "def f():\n    import kvq.a"})
    types = imports({"kvq.a": "import kvq.b", "kvq.b": "if TYPE_CHECKING:\n    from kvq.a import A"})
    package = imports({"kvq.p": "from kvq.p.a import x", "kvq.p.a": "from kvq.p import b", "kvq.p.b": ""})
    assert circles(late) == circles(types) == ["kvq.a -> kvq.b", "kvq.b -> kvq.a"]
    assert circles(package) == ["kvq.p -> kvq.p.a", "kvq.p.a -> kvq.p"]
    assert circles(imports({"kvq.a": "import kvq.b", "kvq.b": ""})) == []

    crossed = imports({"kvq.p.a": "import kvq.q.a", "kvq.q.a": "", "kvq.q.b": "import kvq.p.b", "kvq.p.b": ""})
    assert circles(crossed) == []
    assert circles(parts_of(crossed)) == ["p -> q", "q -> p"]


# Names that several folders share on purpose: parts of one operation, the base of a family, the codec of a page form.
SHARED = {"affine", "base", "kernel", "launch", "reference", "spec"}


def shared_names(modules: Iterable[str]) -> list[str]:
    """Modules of one file name in several folders; a command may have the name of what it calls."""
    found: dict[str, list[str]] = {}
    for module in modules:
        name = module.rpartition(".")[2]
        if part(module) != "commands" and name not in SHARED and "." in module.removeprefix("kvq."):
            found.setdefault(name, []).append(module)
    return [" and ".join(own) for own in found.values() if len(own) > 1]


def test_a_file_name_means_one_thing(graph):
    files = [module for module in graph if not (PACKAGE.parent / module.replace(".", "/")).is_dir()]
    found = shared_names(files)
    assert not found, "\n".join(found)
    assert shared_names(["kvq.a.plan", "kvq.b.plan", "kvq.commands.plan", "kvq.a.base", "kvq.b.base"]) == [
        "kvq.a.plan and kvq.b.plan"
    ]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_import_is_lean():
    """No torch, no transformers, no network library, no GPU: only the hook is put in place."""
    loaded = run("import sys, kvq; print(' '.join(sorted({m.split('.')[0] for m in sys.modules})))").split()
    heavy = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "yaml", "requests", "httpx", "triton"}
    assert heavy & set(loaded) == set()
    assert "kvq" in loaded


@pytest.mark.parametrize("order", ["kvq first", "transformers first"])
def test_registered_as_soon_as_transformers_can_load(order):
    first, then = "import kvq", "import transformers.quantizers.auto as auto"
    lines = (first, then) if order == "kvq first" else (then, first)
    code = "; ".join((*lines, "import importlib", "importlib.reload(kvq)"))
    maps = "auto.AUTO_QUANTIZER_MAPPING", "auto.AUTO_QUANTIZATION_CONFIG_MAPPING"
    names = run(f"{code}; print({maps[0]}['kvq'].__name__, {maps[1]}['kvq'].__name__)").split()
    assert names == ["KvqQuantizer", "KvqConfig"]


@pytest.mark.parametrize("name", sorted({module: name for name, module in kvq._LAZY.items()}.values()))
def test_a_public_name_resolves_first_of_all(name):
    """In a fresh process, one name of every module: whatever is asked for first must not run in a circle."""
    code = f"import kvq; assert kvq.{name} is not None; from transformers.quantizers.auto import "
    code += "AUTO_QUANTIZER_MAPPING as m; assert 'kvq' in m"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_resolve():
    for name in kvq.__all__:
        assert getattr(kvq, name) is not None
    assert set(kvq.__all__) <= set(dir(kvq))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = kvq.nonsense
