"""``import kvq`` is lean, and imports inside the package go one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kvq

PACKAGE = Path(kvq.__file__).parent
FLOORS = (
    ("errors", "fields", "codec_specs", "transform_specs", "specs", "recipe", "recipes", "models", "pages"),
    ("kernels",),
    ("codecs",),
    ("transforms", "calib", "cache"),
    ("exporting",),
    ("integrations",),
    ("eval",),
    ("diagnosis", "searching", "bench"),
    ("report",),
    ("cli", "commands"),
)
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}


def imported(tree: ast.AST) -> set[str]:
    """Parts of kvq that a module imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "kvq":
            # The version is a fact about the package, not a part of it.
            found |= {f"kvq.{alias.name}" for alias in node.names if alias.name != "__version__"}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module)
    return {name.split(".")[1] for name in found if name.startswith("kvq.")}


def violations(part: str, source: str) -> list[str]:
    return [name for name in imported(ast.parse(source)) if LEVEL.get(name, 99) > LEVEL[part]]


FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    """A module imports from its own floor and from those below: errors, recipe, models, kernels -> ... -> cli."""
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert part in LEVEL, f"kvq/{part} has no floor in this test"
    assert violations(part, path.read_text()) == []


def test_the_floor_test_sees_an_upward_import():
    assert violations("cache", "def f():\n    from kvq.exporting.exporter import export") == ["exporting"]
    assert violations("cache", "import kvq.eval.perplexity") == ["eval"]
    assert violations("cache", "from kvq import cli") == ["cli"]
    assert violations("cache", "from kvq.cache.plan import x\nfrom kvq import __version__") == []


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
