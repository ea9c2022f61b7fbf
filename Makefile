# `make demo` and `make test` set up a fresh clone: a Python environment in .venv, the pinned
# dependencies with hashes, and the Rust module. The set-up is kept, so that the second run starts
# at once and needs no network.
# Requirements: Rust, Python 3.11 or newer with venv, a C compiler as linker.

PYTHON ?= python3
# The ONNX Runtime: onnxruntime (CPU) or onnxruntime-gpu. An environment can only have one of them.
RUNTIME ?= onnxruntime
# At most two threads, so that runs with the same seed agree between machines with two or more cores.
OMP_NUM_THREADS ?= $(shell [ "$$(getconf _NPROCESSORS_ONLN)" -ge 2 ] && echo 2 || echo 1)
export OMP_NUM_THREADS
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# Relative paths only: the path of the clone may contain spaces.
BIN := .venv/bin
PINNED := .venv/pinned-$(RUNTIME)
BUILT := .venv/built
# In a separate folder: peft imports bitsandbytes if it is installed, which takes as long as torch.
QUANTIZED := .venv/quantized
RELEASE := .venv/release
BROWSER := .venv/browser
CHROMIUM ?= chromium
# In a separate folder: its dozens of dependencies serve one test only.
RAY_SERVE := .venv/ray-serve
# An environment of its own: these packages need other versions than this one.
CLIENTS := .venv/clients

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test quick families long page clients ray-serve torture check setup pins bench-rust gpu load \
	docs wheels image audit clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

demo: $(BUILT) ## train, export and rank on a small task with a known answer
	$(BIN)/python -m logratio demo

test: check ## every check and every test: what CI runs
	cargo bench --locked --no-run
	cargo test --locked
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# What an edit of the package most often breaks; the rest takes torch or real material.
QUICK := -m "not slow and not shared and not families and not long and not browser" $(addprefix tests/python/, \
	data/formats data/layouts data/tokenization data/store cache rust_module \
	training/test_schedule.py training/methods/test_columns.py training/methods/test_gold.py \
	training/methods/test_properties.py training/methods/test_settings.py \
	training/methods/test_statistics.py)

quick: $(BUILT) ## lints and the quickest tests of the package, in about three minutes
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile $(QUICK)

families: $(BUILT) ## score, and export, every causal language model of the installed transformers, for many minutes
	$(BIN)/python -m pytest -m families tests/python/logps/test_families.py tests/python/logps/test_every_family.py \
		tests/python/export/test_families.py -n auto --maxprocesses 4

long: $(BUILT) ## tests that take minutes each: trainings, a rehearsal of make gpu
	$(BIN)/python -m pytest -m long

page: $(BUILT) $(BROWSER)/installed ## the page of `serve` in Chromium, which must be installed (CHROMIUM=its command)
	@command -v "$(CHROMIUM)" >/dev/null || { echo 'make page needs Chromium: on Debian, apt-get install chromium;' \
		'for another one, make page CHROMIUM=command' >&2; exit 1; }
	PYTHONPATH="$(BROWSER)$${PYTHONPATH:+:$$PYTHONPATH}" CHROMIUM="$(CHROMIUM)" $(BIN)/python -m pytest -m browser \
		tests/python/serving/test_page_in_browser.py

$(BROWSER)/installed: .ci/browser.txt $(PINNED)
	$(BIN)/python -m pip install -q --require-hashes --only-binary :all: --no-deps --upgrade \
		--target "$(BROWSER)" -r .ci/browser.txt
	touch $@

clients: $(BUILT) $(CLIENTS)/installed ## serve to the clients of other projects, unmodified; downloads 150 MB once
	LOGRATIO_CLIENTS="$(CURDIR)/$(CLIENTS)/bin/python" $(BIN)/python -m pytest -m clients \
		tests/python/serving/test_clients.py

$(CLIENTS)/installed: .ci/clients.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install -q --require-hashes --only-binary :all: -r .ci/clients.txt
	@touch $@

ray-serve: $(BUILT) $(RAY_SERVE)/installed ## serve with Ray Serve on this machine, for minutes; downloads 60 MB once
	PYTHONPATH="$(CURDIR)/$(RAY_SERVE)" $(BIN)/python -m pytest -m ray_serve tests/python/serving/test_ray_serve.py

$(RAY_SERVE)/installed: $(PINNED) .ci/ray-serve.txt
	$(BIN)/python -m pip install --require-hashes --only-binary :all: --no-deps --upgrade \
		--target $(RAY_SERVE) -r .ci/ray-serve.txt
	@touch $@

torture: ## the reference cache under faults, for hours: 10,000 kills, 100 million losses of power
	LOGRATIO_POWER_LOSSES=100 LOGRATIO_KILLS=5 LOGRATIO_FORGERIES=100 LOGRATIO_WRITERS=5 \
		PROPTEST_CASES=1000000 cargo test --locked --test 'cache_*'

check: $(BUILT) ## formatting, lints, types and documentation, without the tests
	cargo fmt --check
	cargo clippy --locked --all-targets --all-features -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --all-features
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m mypy
	$(BIN)/python -m mypy.stubtest logratio._rust

setup: $(BUILT) ## only the environment: .venv with the dependencies and this package, editable

bench-rust: $(BUILT) ## time the Rust core
	cargo bench --locked

# Needs no set-up, because the GPU machine may have no network and no Rust. See benches/gpu.py for the
# requirements; GPU_FLAGS="--device cpu --tiny" is a rehearsal.
gpu: ## tests and benches on a GPU in under 12 minutes: make gpu OUT=folder PYTHON=python3
	$(PYTHON) benches/gpu.py --out "$(or $(OUT),gpu-results)" $(GPU_FLAGS)

# Needs two cores that nothing else uses, and for two scenarios the network: it installs schemathesis
# and sentence-transformers in temporary folders.
load: $(BUILT) ## the server under load, faults and attacks: 90 minutes, or 10 with LOAD_FLAGS=--quick
	$(BIN)/python benches/bench_load.py --install $(LOAD_FLAGS)

docs: $(BUILT) ## the table of error codes, and the API reference in target/docs
	$(BIN)/python python/docs/build.py target/docs

# What a release needs, and nothing else does. Linux wheels are linked by zig, against the symbols of
# glibc 2.28 whatever this machine has. A TARGET of another machine needs `rustup target add`.
TARGET ?= $(shell rustc -vV | sed -n 's/^host: //p')
LINUX := $(findstring linux,$(TARGET))

$(RELEASE)/installed: .ci/release.txt
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install -q --require-hashes --only-binary :all: -r .ci/release.txt
	@touch $@

WHEEL = PATH="$(CURDIR)/$(RELEASE)/bin:$$PATH" CARGO_TARGET_DIR="$(CURDIR)/target" \
	maturin build --release --locked --target $(TARGET) --out "$(CURDIR)/dist" \
	$(if $(LINUX),--zig --compatibility manylinux_2_28)

wheels: $(RELEASE)/installed ## the wheels of logratio and logratio-serve and the sdist in dist, for TARGET
	rm -rf dist target/serve
	mkdir -p target/serve
	$(RELEASE)/bin/maturin sdist --out dist
	tar -xzf dist/logratio-*.tar.gz -C target/serve --strip-components 1
	cp python/logratio-serve/pyproject.toml python/logratio-serve/README.md target/serve
	$(WHEEL)
	cd target/serve && $(WHEEL)
	$(if $(LINUX),PATH="$(CURDIR)/$(RELEASE)/bin:$$PATH" auditwheel repair --plat manylinux_2_28_$(firstword $(subst -, ,$(TARGET))) \
		--wheel-dir target/audited dist/*.whl)
	$(RELEASE)/bin/cyclonedx-py requirements .ci/constraints.txt -o dist/logratio.cdx.json
	$(RELEASE)/bin/cyclonedx-py requirements .ci/server.txt -o dist/logratio-serve.cdx.json

image: $(BUILT) wheels ## build the image of logratio-serve without Docker, and test it; for minutes, as root
	.ci/image

# NVIDIA's libraries and certificates (MPL) are used unchanged; the rest is permissive.
LICENCES := Apache;BSD;ISC;MIT;MPL;NVIDIA;PSF;Python Software Foundation;Public Domain;Unlicense;zlib

audit: $(BUILT) $(RELEASE)/installed ## licences and known vulnerabilities of what is installed; needs the network
	cargo deny --version || cargo install --locked cargo-deny
	cargo deny --config .ci/deny.toml check
	for pins in constraints server tools ray-serve release; do \
		$(RELEASE)/bin/pip-audit --strict --disable-pip --require-hashes -r .ci/$$pins.txt || exit 1; \
	done
	$(RELEASE)/bin/pip-licenses --python $(BIN)/python --partial-match --allow-only "$(LICENCES)" \
		--ignore-packages cuda-toolkit # NVIDIA's list of its libraries, without a licence field
	$(BIN)/python -m pip check
	$(RELEASE)/bin/zizmor --offline .github
	$(RELEASE)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

clean: ## remove build outputs; keeps .venv (delete it for a fresh set-up)
	rm -rf target dist python/logratio/_rust*.so $(BUILT)
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find python tests benches -name __pycache__ -prune -exec rm -rf {} +

# Python files need no rebuild, since the package is installed editable. pip has no index here, so
# that a dependency without a pin fails the build. VIRTUAL_ENV is set because maturin otherwise
# installs into any active environment.
$(BUILT): $(PINNED) Cargo.toml Cargo.lock pyproject.toml $(shell find rust -type f)
	env -u CONDA_PREFIX VIRTUAL_ENV="$$PWD/.venv" PIP_NO_INDEX=1 PIP_QUIET=1 \
		$(BIN)/maturin develop --release --locked
	@touch $@

$(PINNED): .venv/created .ci/constraints.txt .ci/tools.txt .ci/quantized.txt .ci/$(RUNTIME).txt
	@echo "Installing the pinned dependencies. On Linux: about 3.3 GB to download, 6.9 GB on disk."
	@rm -f .venv/pinned-*
	$(BIN)/python -m pip uninstall -qq --yes $(filter-out $(RUNTIME),onnxruntime onnxruntime-gpu)
	$(BIN)/python -m pip install --require-hashes --only-binary :all: \
		-r .ci/constraints.txt -r .ci/$(RUNTIME).txt -r .ci/tools.txt
	$(BIN)/python -m pip install --require-hashes --only-binary :all: --no-deps --upgrade \
		--target $(QUANTIZED) -r .ci/quantized.txt
	@touch $@

.venv/created:
	@command -v cargo >/dev/null || \
		{ echo 'logratio needs Rust to build: no `cargo` on the PATH (rustup installs it).' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo 'logratio needs Python 3.11 or newer, and `$(PYTHON)` is not: name one with make PYTHON=…' >&2; exit 1; }
	$(PYTHON) -m venv .venv || \
		{ echo '`$(PYTHON) -m venv` failed: on Debian and Ubuntu, install python3-venv.' >&2; exit 1; }
	@touch $@

# Emits no index address and no path, so that the files work on every machine.
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-annotate --no-emit-index-url --no-emit-find-links --custom-compile-command "make pins" $(UPGRADE)

pins: $(PINNED) ## resolve the pinned dependencies again; newer ones with UPGRADE=--upgrade
	$(COMPILE) pyproject.toml --extra demo-cpu --extra serve-cpu --no-emit-package onnxruntime \
		-o .ci/constraints.txt
	$(COMPILE) --group tools -c .ci/constraints.txt -o .ci/tools.txt
	$(COMPILE) python/logratio-serve/pyproject.toml --extra cpu --extra otel --no-emit-package onnxruntime \
		-c .ci/constraints.txt -c .ci/tools.txt -o .ci/server.txt
	echo 'ray[serve]' | $(COMPILE) - -c .ci/constraints.txt -c .ci/tools.txt -o .ci/ray-serve.txt \
		$$(sed -n 's/^\([a-z0-9-]*\)==.*/--no-emit-package \1/p' .ci/constraints.txt .ci/tools.txt)
	$(COMPILE) --group release -c .ci/tools.txt -o .ci/release.txt
	$(COMPILE) --group clients --fork-strategy fewest -o .ci/clients.txt
	$(COMPILE) --group browser -c .ci/constraints.txt -c .ci/tools.txt -o .ci/browser.txt
	echo bitsandbytes | $(COMPILE) - --no-deps -o .ci/quantized.txt
	echo onnxruntime | $(COMPILE) - --no-deps -o .ci/onnxruntime.txt
	echo onnxruntime-gpu | $(COMPILE) - --no-deps -o .ci/onnxruntime-gpu.txt
