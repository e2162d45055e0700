"""Write docs/compatibility.md: what was found to work with which release.

    python docs/build_compatibility.py run      # run the contract tests in this environment and keep the outcome
    python docs/build_compatibility.py          # write the page from all outcomes and from the engine tables

Outcomes lie in docs/compatibility.json, one entry for each release of transformers; ``run`` replaces the entry of the
release that is installed. The page's other half comes from ``kvq/exporting/engines``, which ``kvq check`` reads too.
"""

import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kvq.exporting.engines import Release, engines, find_release
from kvq.exporting.targets import TARGETS

ROOT = Path(__file__).parents[1]
CONTRACTS, OUTCOMES, PAGE = ROOT / "tests/contracts", ROOT / "docs/compatibility.json", ROOT / "docs/compatibility.md"
PACKAGES = ("torch", "huggingface_hub", "safetensors", "lm_eval", "compressed-tensors")
ABOUT = {
    "test_transformers_cache": "caches and their layers",
    "test_transformers_generation": "generation and forward hooks",
    "test_transformers_attention": "the attention interface",
    "test_transformers_loading": "loading, saving and quantizers",
    "test_transformers_rotary": "rotary modules",
    "test_compressed_tensors": "compressed-tensors",
    "test_lm_eval": "lm-eval",
    "test_files": "safetensors, hub, FP8 numbers",
}


def run() -> None:
    """Run the contract tests here and store passed, failed and skipped by surface."""
    with tempfile.TemporaryDirectory() as work:
        report = Path(work) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            str(CONTRACTS),
        ]
        subprocess.run(command, cwd=ROOT, check=False)
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    surfaces: dict[str, dict[str, int]] = {}
    for case in cases:
        # A file that is skipped whole has its name in place of a test's.
        name = f"{case.get('classname')}.{case.get('name')}".split("tests.contracts.")[-1].split(".")[0]
        outcome = "failed" if case.find("failure") is not None or case.find("error") is not None else "passed"
        skipped = case.find("skipped")
        if skipped is not None:
            # A fault that is known is a fault all the same.
            outcome = "failed" if skipped.get("type") == "pytest.xfail" else "skipped"
        row = surfaces.setdefault(name, {"passed": 0, "failed": 0, "skipped": 0})
        row[outcome] += 1
    outcomes = json.loads(OUTCOMES.read_text()) if OUTCOMES.exists() else {}
    outcomes[version("transformers")] = {
        "packages": {name: _version(name) for name in PACKAGES},
        "surfaces": dict(sorted(surfaces.items())),
    }
    ordered = dict(sorted(outcomes.items(), key=lambda item: [int(part) for part in item[0].split(".")]))
    OUTCOMES.write_text(json.dumps(ordered, indent=2) + "\n")


def page(outcomes: dict) -> str:
    """The page's text."""
    return "\n".join(
        [
            "# What works with what",
            "",
            "Written by `docs/build_compatibility.py`; do not edit.",
            "",
            "## transformers",
            "",
            "kvq relies on parts of transformers and of other packages that may change. Each has a contract test in",
            "`tests/contracts/`, so that a new release fails in one obvious place. Outcomes, as tests that passed:",
            "",
            *_contracts(outcomes),
            "",
            "## Serving engines",
            "",
            "Which KV caches each engine takes from a checkpoint. `kvq check DIR --engine NAME` applies the same",
            "tables.",
            "",
            *_engines(),
            "",
            "## Targets",
            "",
            "What `kvq export --target NAME` writes for weights of each kind, and the engines that load it.",
            "",
            *_targets(),
            "",
            "## Cache dtypes of the engine's own",
            "",
            "These need no scales from the checkpoint: the engine computes them token by token. A recipe of such",
            "codecs whose transforms all fold is exported for the engine as an ordinary checkpoint.",
            "",
            *_own(),
            "",
        ]
    )


def _contracts(outcomes: dict) -> list[str]:
    releases = list(outcomes)
    rows = []
    for file in sorted(CONTRACTS.glob("test_*.py")):
        cells = [_outcome(outcomes[release]["surfaces"].get(file.stem)) for release in releases]
        rows.append([f"[{ABOUT[file.stem]}](../tests/contracts/{file.name})", *cells])
    for package in PACKAGES:
        rows.append([f"with {package}", *(outcomes[release]["packages"].get(package) or "-" for release in releases)])
    return _table(["surface", *releases], rows)


def _outcome(row: dict | None) -> str:
    if row is None or not (row["passed"] or row["failed"]):
        return "not installed"
    total = row["passed"] + row["failed"]
    return f"{row['passed']} of {total}" if row["failed"] else str(row["passed"])


def _engines() -> list[str]:
    rows = []
    for releases in engines().values():
        for release in _different(list(releases.values())):
            for method, reader in release.readers.items():
                scales = "-" if not reader.spelled else "a layer" if reader.head is None else "a layer, or a head"
                release_notes = f"; fails if {reader.filled[0]} is empty" if reader.filled else ""
                dtype = reader.dtype or f"16 bits; FP8 with `{release.dtype_flag} {reader.flag}`"
                rows.append(
                    [
                        release.title,
                        release.version,
                        f"`{method}`",
                        scales,
                        dtype + release_notes,
                        reader.missing or "-",
                    ]
                )
            for method, why in release.refused.items():
                rows.append([release.title, release.version, f"`{method}`", "none", why, "-"])
    return _table(["engine", "release", "quant_method", "scales, one", "cache", "a missing scale becomes"], rows)


def _different(releases: list[Release]) -> list[Release]:
    """Releases of one engine, neighbours with the same tables as one row."""
    found: list[Release] = []
    for release in releases:
        if found and _facts(found[-1]) == _facts(release):
            first = found[-1].version.split(" to ")[0]
            found[-1] = replace(found[-1], version=f"{first} to {release.version}")
        else:
            found.append(release)
    return found


def _facts(release: Release) -> tuple:
    return release.readers, release.refused, release.own


def _targets() -> list[str]:
    rows = []
    for target in TARGETS.values():
        formats = ", ".join(f"{source or 'unquantized'} -> `{written}`" for source, written in target.formats.items())
        formats = formats or "unquantized -> none"
        rows.append([f"`{target.name}`", formats, ", ".join(find_release(e).title for e in target.engines)])
    return _table(["target", "weights -> quant_method that is written", "loaded by"], rows)


def _own() -> list[str]:
    rows = []
    for releases in engines().values():
        release = list(releases.values())[-1]
        for name, own in release.own.items():
            numbers = own.codec + (", rotated by the engine first" if own.rotates else "")
            flag = f"`{release.dtype_flag} {name}`"
            rows.append([release.name, flag, str(own.bits), numbers, own.where or "always"])
    return _table(["engine", "flag", "bits", "numbers", "runs"], rows)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    if sys.argv[1:] == ["run"]:
        run()
    PAGE.write_text(page(json.loads(OUTCOMES.read_text())))
