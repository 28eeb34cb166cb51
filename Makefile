# make demo | test | nightly | lint: each makes .venv first if it is not there; a second run installs nothing.
# make gpu-check: on a machine with a GPU, every check that needs one, in .venv-gpu.
#   In an environment of yours: make gpu-check GPU_PYTHON=python
# make docs: builds the pages of docs/ into site/; a broken link fails.
# make lock: writes requirements.lock again from pyproject.toml.

PYTHON ?= $(or $(shell command -v python3.11),python3)
TORCH := torch==2.13.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu
PIP := .venv/bin/python -m pip --disable-pip-version-check
GPU_PYTHON ?= .venv-gpu/bin/python
EXTRAS := cpu,ray,plot,docs,test

.PHONY: demo test nightly lint docs gpu-check lock clean

demo: .venv/installed
	.venv/bin/vllm-kl demo $(ARGS)

test: .venv/installed
	.venv/bin/python -m pytest $(ARGS)

# The long table: every architecture that was tried, and its figures in docs/architectures.md.
nightly: .venv/installed
	.venv/bin/python -m pytest -m "nightly or not nightly" --table docs/architectures.md \
		tests/weights/test_pushes.py tests/test_concurrency.py $(ARGS)

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

docs: .venv/installed
	.venv/bin/mkdocs build --strict

gpu-check: $(filter .venv-gpu/installed,$(GPU_PYTHON:bin/python=installed))
	$(GPU_PYTHON) benchmarks/gpu_check.py $(ARGS)

.venv-gpu/installed: pyproject.toml
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip --disable-pip-version-check install --quiet --editable '.[gpu,test]'
	@touch $@

# pip's own settings come first; if they offer no CPU build of PyTorch, pip asks PyTorch's index. The lock
# names every other package. So --no-deps: pip resolves nothing and installs no package that the lock does not
# name.
.venv/installed: requirements.lock pyproject.toml Makefile
	@command -v $(PYTHON) >/dev/null || \
		{ echo "$(PYTHON) not found: install it, or run make PYTHON=python3 ..."; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "python venv is missing: apt-get install python3-venv"; exit 1; }
	$(PIP) install --quiet '$(TORCH)' || $(PIP) install --quiet --index-url $(TORCH_INDEX) '$(TORCH)'
	$(PIP) install --quiet --no-deps --no-compile --requirement requirements.lock
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

lock: .venv/installed
	$(PIP) install --quiet uv
	printf 'vllm-kl[$(EXTRAS)] @ .\n' | .venv/bin/uv pip compile --quiet \
		--python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-annotate \
		--custom-compile-command "make lock" --no-emit-package torch --no-emit-package vllm-kl \
		$(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS), \
			--extra-index-url $(TORCH_INDEX) --index-strategy unsafe-best-match) \
		--output-file requirements.lock -
	sed -i "/sys_platform == 'never'/d" requirements.lock

clean:
	rm -rf .venv .venv-gpu build site *.egg-info .pytest_cache .ruff_cache .hypothesis
