# One target per task. `make run` and `make test` need nothing but Python 3.11, pip and a shell.
# Only one onnxruntime can be installed: with CUDA's libraries where there is an NVIDIA driver, the
# same package on its CPU provider on other Linux x86-64 machines, the CPU package elsewhere.
RUNTIME := $(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),$(if $(wildcard /proc/driver/nvidia/version),cuda,gpu),cpu)
PYTHON := .venv/bin/python
PIP_INSTALL := $(PYTHON) -m pip install --quiet --constraint constraints.txt --editable
INSTALL := $(if $(filter-out 0,$(shell id -u)),sudo) sh -c 'apt-get update && apt-get install --yes --no-install-recommends "$$0"'

PEERS := litserve bentoml mlserver rayserve triton
BENCHMARKS := scaling-table calibration-table stratified predict-http reading mc-passes scaling startup-memory deployment gpu

.PHONY: run setup test test-slow uci-test image-test browser browser-test check check-console format screenshots bench bench-peers soak overload uci first-paint $(BENCHMARKS) lock
run: models/digits
	exec env DROPSERVE_DEBUG=1 .venv/bin/dropserve serve --models models --host 127.0.0.1 --port 8000

models/digits: runs/digits
	.venv/bin/dropserve export runs/digits --models models

runs/digits: | .venv/$(RUNTIME)
	.venv/bin/dropserve train --data digits --out runs/digits

# All that `make run` needs: training, export and the service.
.venv/$(RUNTIME): pyproject.toml constraints.txt
	python3 -m venv .venv
	$(PIP_INSTALL) '.[$(RUNTIME),train]'
	touch $@

# The same environment with what the other targets need: tests, checks and benchmarks.
setup: .venv/$(RUNTIME)-all

.venv/$(RUNTIME)-all: .venv/$(RUNTIME)
	$(PIP_INSTALL) '.[$(RUNTIME),train,score,ray,otel,dev]'
	touch $@

# Twice: tests marked quiet bound the time of something, and run alone, on the same bundles.
test: export TESTS_SHARED = build/tests
test: setup build/clients/kserve/installed build/clients/mlserver/installed
	rm -rf $(TESTS_SHARED)
	$(PYTHON) -m pytest
	$(PYTHON) -m pytest -n 0 -m quiet $$(grep -rl --include='test_*.py' mark.quiet tests)

# The clients of other servers require older versions of what this project needs, and of each other.
build/clients/%/installed: tests/clients/%.txt | setup
	.venv/bin/uv venv --quiet --clear --python $(PYTHON) build/clients/$*
	.venv/bin/uv pip install --quiet --python build/clients/$* --requirement $<
	touch $@

test-slow: setup
	$(PYTHON) -m pytest --dist loadscope -m slow

uci-test: setup
	$(PYTHON) -m pytest -n 0 -m uci

image-test: setup
	$(PYTHON) -m pytest -n 0 -m image

browser-test: setup browser build/npm/installed
	$(PYTHON) -m pytest -m browser

# Debian's package, unless a browser is installed already.
browser:
	command -v chromium || command -v chromium-browser || command -v google-chrome || $(INSTALL) chromium

# The console's pinned checkers; the page itself needs none of them.
build/npm/installed: tests/console/package.json tests/console/package-lock.json
	command -v npm || $(INSTALL) npm
	mkdir -p build/npm
	cp $^ build/npm
	npm ci --prefix build/npm --no-audit --no-fund
	touch $@

check-console: build/npm/installed
	build/npm/node_modules/.bin/biome ci --config-path tests/console app/console
	build/npm/node_modules/.bin/tsc --project tests/console

screenshots: setup browser
	$(PYTHON) -m tests.console.screenshots

check: setup
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	.venv/bin/lint-imports --no-cache --no-logo

format: setup
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

# `make bench RECORD=--record` replaces the committed figures in benchmarks/results.
RECORD :=
bench: $(BENCHMARKS)

soak overload uci: setup
	$(PYTHON) -m benchmarks.$@ $(RECORD)

$(BENCHMARKS): setup
	$(PYTHON) -m benchmarks.$(subst -,_,$@) $(RECORD)

first-paint: setup browser
	$(PYTHON) -m benchmarks.first_paint $(RECORD)

bench-peers: setup build/peers/passes/installed $(PEERS:%=build/peers/%/installed)
	$(PYTHON) -m benchmarks.predict_http --peers $(RECORD)
	build/peers/passes/bin/python -m benchmarks.mc_passes $(RECORD)

# Each peer has its own environment. baal is compared with dropserve in one process, so it is
# installed without its requirements, beside this project's packages.
build/peers/passes/installed: benchmarks/peers/passes.txt
	python3 -m venv build/peers/passes
	build/peers/passes/bin/python -m pip install --quiet --no-deps --requirement $<
	$(PYTHON) -c 'import numpy, pathlib; print(pathlib.Path(numpy.__file__).parents[1])' \
		> $$(echo build/peers/passes/lib/python*/site-packages)/project.pth
	touch $@

build/peers/%/installed: benchmarks/peers/%.txt
	python3 -m venv build/peers/$*
	build/peers/$*/bin/python -m pip install --quiet --requirement $<
	touch $@

lock: setup
	$(PYTHON) -m piptools compile --quiet --upgrade --strip-extras --all-extras --no-annotate --no-header \
		--no-emit-index-url --no-emit-find-links --output-file constraints.txt pyproject.toml
	sed -i 's/+cpu$$//; /^nvidia-/d' constraints.txt
	for client in kserve mlserver; do .venv/bin/uv pip compile --quiet --upgrade --no-annotate --no-header \
		--python $(PYTHON) --output-file tests/clients/$$client.txt tests/clients/$$client.in || exit 1; done
