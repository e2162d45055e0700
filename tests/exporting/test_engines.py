"""The engine tables: complete, and asked by release."""

import re

import pytest
from packaging.specifiers import SpecifierSet

from kvq.errors import RecipeError
from kvq.exporting.engines import SPELLINGS, engines, find_release
from kvq.exporting.targets import TARGETS

RELEASES = [release for releases in engines().values() for release in releases.values()]


@pytest.mark.parametrize("release", RELEASES, ids=lambda r: f"{r.engine}-{r.version}")
def test_every_row_can_be_used(release):
    assert SpecifierSet(release.transformers)
    assert release.readers.keys().isdisjoint(release.refused)
    for reader in release.readers.values():
        assert set(reader.spelled) <= set(SPELLINGS)
        assert reader.missing or not reader.spelled
    for spelling in (release.architectures or {}).values():
        assert spelling in ("mapped", *SPELLINGS)
    assert "DIR" in release.command("DIR")


def test_the_tables_cover_what_targets_write():
    """A target's main engine has a reader, and a condition to state, for every format that it writes."""
    for target in TARGETS.values():
        readers = find_release(target.engines[0]).readers
        assert set(target.formats.values()) <= set(readers)


def test_commands_carry_the_flags():
    vllm = find_release("vllm")
    assert vllm.command("x", "fp8", ("3", "sliding_window")) == (
        "vllm serve x --kv-cache-dtype fp8 --kv-cache-dtype-skip-layers 3 sliding_window"
    )


@pytest.mark.parametrize(
    ("asked", "found"), [(None, "0.33"), ("0.32", "0.32"), ("0.33.1", "0.33"), ("0.32.0.post1", "0.32")]
)
def test_releases_by_version(asked, found):
    assert find_release("vllm", asked).version == found


@pytest.mark.parametrize("version", ["0.3", "0.34", "0.330", "latest", "33"])
def test_unknown_releases_are_refused(version):
    with pytest.raises(RecipeError, match=re.escape(f"vllm {version} is not in the tables, which know 0.32, 0.33")):
        find_release("vllm", version)


def test_unknown_engines_are_refused():
    with pytest.raises(RecipeError, match="Did you mean 'vllm'"):
        find_release("vlm")
