# Everything runs in .venv, which is made on first use. Versions are those the suite was last passed with (constraints.txt).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
SOURCES := setup.py pyproject.toml $(wildcard csrc/* csrc/*/*)
COMMA := ,

.PHONY: help install quickstart wheel docs docs-links test test-oldest test-newest trainers sanitize sanitize-memory sanitize-threads fuzz faults lint format bench gpu-check gpu-sanitize gpu-bench gpu-profile gpu-train aot-report env clean

help:
	@echo "make quickstart   train SmolLM2-135M with the fused DIL loss and show what it learned"
	@echo "make test         the whole test suite; says what could not run here and why"
	@echo "make test-oldest  the core tests with the oldest torch, triton, transformers and Python that the package admits"
	@echo "make test-newest  the same with the newest ones"
	@echo "make trainers     the adapters inside ms-swift, LLaMA-Factory, axolotl and OpenRLHF, by their own commands on the CPU"
	@echo "make bench        the CPU benchmarks, into benchmarks/results/"
	@echo "make gpu-check    on an NVIDIA GPU: the GPU tests"
	@echo "make gpu-sanitize on an NVIDIA GPU: every kernel on small cases under compute-sanitizer"
	@echo "make gpu-bench    on an NVIDIA GPU: the benchmarks; called again it goes on where it stopped"
	@echo "make gpu-profile  on an NVIDIA GPU: bytes moved, bandwidth and pipe use of the kernels, by Nsight Compute"
	@echo "make gpu-train    on an NVIDIA GPU: training to convergence beside TRL (needs trl), and a 1B-class model for speed"
	@echo "make aot-report   what the compilers make of every Triton kernel, without a GPU"
	@echo "make docs         the documentation site into build/docs/, any warning an error; docs-links asks the network for its outer links"
	@echo "make wheel        sdist and wheel into dist/, the wheel tested where no compiler is"
	@echo "make sanitize     the CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer"
	@echo "make fuzz         coverage-guided fuzzing of the public functions and the readers of data, 10 minutes each"
	@echo "make faults       every fault at every moment of a run: the table of docs/faults.md"
	@echo "make lint         ruff, mypy, import-linter, clang-format, zizmor; make format applies the formatters"
	@echo "make env          versions, backends, and why one is unavailable"

# torch comes first, so that the extension builds against it without a second copy in an isolated build environment.
$(VENV)/.installed: $(SOURCES) constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "setuptools>=77" wheel pybind11 ninja
	$(PIP) torch
	$(PIP) --no-build-isolation -e ".[train]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --no-build-isolation -e ".[train,bench,dev,docs]"
	@touch $@

install: $(VENV)/.installed

quickstart: install
	$(BIN)/python -m dil_kernels.quickstart $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

# Each in an environment of its own, with a torch that lacks its CUDA libraries, on another Python where there is one; the CUDA
# part is compiled where nvcc is; SIMD levels are of the compiler and left to `make test`. Last, the binary built against one
# torch runs under the other.
# A shim of pyenv answers only for versions that are chosen: here all that it has.
python_or_ours = $(shell PYENV_VERSION="$$(pyenv versions --bare 2>/dev/null | paste -sd:)" \
  $(1) -c "import ensurepip, sys; print(sys.executable)" 2>/dev/null || echo $(PYTHON))
oldest_PYTHON = $(call python_or_ours,python3.10)
newest_PYTHON = $(call python_or_ours,python3.13)
oldest_PINS := -c tests/versions/oldest.txt
# What the newest versions of Triton compile, executed; and what only its interpreter runs.
newest_TESTS := tests/test_emulated_ptx.py::test_compiled_kernels_compute_the_truth_within_their_memory \
  tests/test_ahead_of_time.py::test_the_launch_sweep_prints_an_entry_of_the_table
CORE_TESTS := $(addprefix tests/test_,ahead_of_time.py bad_input.py build.py fused_loss.py fused_loss_unpaired.py imports.py \
  linear.py linear_autograd.py linear_bad_input.py linear_bounds.py linear_logits_path.py linear_memory.py::test_predicted_memory links.py likelihood.py \
  logps.py losses.py ops.py options.py)
TORCH_OF = $$($(1)/bin/python -c "import torch; print(torch.__path__[0])")
test-oldest test-newest: test-%: $(VENV)/.installed-dev
	$($*_PYTHON) -m venv --clear $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --disable-pip-version-check -q $($*_PINS) --no-deps torch triton accelerate
	$(VENV)-$*/bin/python tests/versions/stub_cuda.py
	$(VENV)-$*/bin/python -m pip install --disable-pip-version-check -q $($*_PINS) -r tests/versions/requirements.txt
	DIL_KERNELS_BUILD=$(if $(shell command -v nvcc),cuda,cpu) TORCH_CUDA_ARCH_LIST=9.0 \
	  $(VENV)-$*/bin/python -m pip install --disable-pip-version-check -q --no-build-isolation --no-deps .
	$(VENV)-$*/bin/dil-env
	TORCH_CUDA_ARCH_LIST=9.0 $(VENV)-$*/bin/pytest -n 2 --deselect tests/test_build.py::test_every_simd_level_is_exact $(CORE_TESTS) $($*_TESTS) $(ARGS)
	$(VENV)-$*/bin/pytest tests/test_stable_abi.py --other-torch $(call TORCH_OF,$(BIN)/..)
	$(BIN)/pytest tests/test_stable_abi.py --other-torch $(call TORCH_OF,$(VENV)-$*)

# Each in an environment of its own, one after another (`make trainer-swift` runs one), of all that ran with it and nothing more.
swift_PACKAGE := ms-swift==4.6.0
llamafactory_PACKAGE := llamafactory==0.9.5
axolotl_PACKAGE := axolotl==0.21.0
openrlhf_PACKAGE := openrlhf==0.11.2
axolotl_PYTHON = $(call python_or_ours,python3.12)
TRAINERS := swift llamafactory axolotl openrlhf
trainers:
	for trainer in $(TRAINERS); do $(MAKE) --no-print-directory trainer-$$trainer || exit 1; done
trainer-%:
	$(or $($*_PYTHON),$(PYTHON)) -m venv --clear $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --disable-pip-version-check -q --no-deps torch==2.13.0 triton==3.7.1
	$(VENV)-$*/bin/python -m pip install --disable-pip-version-check -q filelock fsspec jinja2 networkx packaging sympy \
	  typing-extensions "setuptools>=77" wheel pybind11 ninja
	$(VENV)-$*/bin/python tests/versions/stub_cuda.py
	$(VENV)-$*/bin/python -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -r tests/trainers/$*.txt $($*_PACKAGE)
	DIL_KERNELS_BUILD=cpu $(VENV)-$*/bin/python -m pip install --disable-pip-version-check -q --no-build-isolation --no-deps .
	cd tests/trainers && $(abspath $(VENV)-$*)/bin/python check_$*.py

# A wheel for the Python and the glibc of this machine; those of a release are built in containers (tool.cibuildwheel).
wheel: $(VENV)/.installed-dev
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist/built
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python -m auditwheel repair -w dist dist/built/*.whl --exclude 'libtorch*' --exclude 'libc10*'
	mv dist/built/*.tar.gz dist && rm -r dist/built
	$(PYTHON) -m venv --clear $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt torch numpy pytest hypothesis mpmath
	$(VENV)-wheel/bin/python -m pip install --disable-pip-version-check -q --no-deps triton typing-extensions dist/*.whl
	CXX=none $(VENV)-wheel/bin/pytest -q tests/test_losses.py tests/test_logps.py tests/test_scalar_losses.py
	ls -l dist

SPHINX := $(BIN)/python -m sphinx -E -q -W --keep-going -d build/doctrees
docs: $(VENV)/.installed-dev
	rm -rf build/docs
	$(SPHINX) -b html docs build/docs
	@echo "build/docs/index.html"

docs-links: $(VENV)/.installed-dev
	$(SPHINX) -b linkcheck docs build/docs-links

# The CPU kernels under sanitizers, in an extension that is built for each into build/.
CPU_BUILT_WITH = rm -rf build/$(1); CXX=g++ CXXFLAGS="$(2) -O1 -g" DIL_KERNELS_BUILD=cpu \
  $(BIN)/python setup.py -q build --build-base build/$(1)/temp --build-lib build/$(1)/lib
PRELOADED = $$(g++ -print-file-name=lib$(1).so) $$(g++ -print-file-name=libstdc++.so.6)
CPU_SANITIZED_TESTS := $(addprefix test_,bf16_mm.py fused_loss.py fused_loss_unpaired.py infinite_log_ratios.py layouts.py linear.py linear_autograd.py \
  linear_bounds.py linear_logits_path.py logps.py losses.py ops.py scalar_losses.py softcapping.py)
CPU_SANITIZED_PYTEST := -m pytest -p no:cacheprovider -q -k "cpp or mm" $(CPU_SANITIZED_TESTS) $(ARGS)
sanitize: sanitize-memory sanitize-threads

# AddressSanitizer and UndefinedBehaviorSanitizer, at every SIMD level; first a read beyond a tensor that must be seen. Masked vectors, of
# which the bf16 product is made, AddressSanitizer does not see: its own tests have guard pages instead.
SANITIZED_MEMORY = ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(call PRELOADED,asan)" \
  PYTHONPATH=$(CURDIR)/build/sanitize/lib $(abspath $(BIN))/python
build/sanitize/.built: $(VENV)/.installed-dev $(SOURCES) $(wildcard dil_kernels/*.py dil_kernels/*/*.py)
	$(call CPU_BUILT_WITH,sanitize,-fsanitize=address$(COMMA)undefined -fno-sanitize-recover=undefined)
	@touch $@
sanitize-memory: build/sanitize/.built
	cd tests && if ($(SANITIZED_MEMORY) sanitizers/read_beyond.py) 2> ../build/sanitize/seen.txt; then echo "a read beyond a tensor was not seen"; exit 1; fi
	grep -q "ERROR: AddressSanitizer" build/sanitize/seen.txt
	cd tests && for level in avx512_bf16 avx512 avx2 baseline; do \
	  echo $$level; DIL_KERNELS_CPU_CAPABILITY=$$level $(SANITIZED_MEMORY) $(CPU_SANITIZED_PYTEST) || exit 1; \
	done

# ThreadSanitizer, in the place of torch's loops some on std::thread, which it sees through; torch itself has one thread. First a race
# that must be seen. It sees what csrc reads and writes, and nothing of torch, which is not built for it. Of the tests those in which
# every loop of csrc has rows to share: log-probs, loss, head and the bf16 product, forward and backward. Left out are those of values,
# whose few rows share nothing, and what makes threads by the thousand (every boundary of tiles) or is about Python (compile, opcheck).
CPU_THREADED_TESTS := $(addprefix test_,bf16_mm.py::test_however_the_work_is_shared_out fused_loss.py fused_loss_unpaired.py \
  linear.py linear_autograd.py logps.py)
CPU_THREADED := (cpp or shared_out) and not every_boundary and not compile and not opcheck
SANITIZED_THREADS = OMP_NUM_THREADS=1 TSAN_OPTIONS="halt_on_error=1 ignore_noninstrumented_modules=1" PYTHONPATH=$(CURDIR)/build/sanitize_threads/lib \
  LD_PRELOAD="$(call PRELOADED,tsan) $(CURDIR)/build/sanitize_threads/threads.so" $(abspath $(BIN))/python
sanitize-threads: $(VENV)/.installed-dev
	$(call CPU_BUILT_WITH,sanitize_threads,-fsanitize=thread)
	g++ -std=c++17 -O1 -g -fsanitize=thread -fPIC -shared -pthread tests/sanitizers/threads.cpp -o build/sanitize_threads/threads.so
	cd tests && if (DIL_PLANTED_RACE=1 $(SANITIZED_THREADS) sanitizers/loop.py) 2> ../build/sanitize_threads/seen.txt; then echo "a race was not seen"; exit 1; fi
	grep -q "WARNING: ThreadSanitizer: data race" build/sanitize_threads/seen.txt
	cd tests && $(SANITIZED_THREADS) -m pytest -p no:cacheprovider -q -k "$(CPU_THREADED)" $(CPU_THREADED_TESTS) $(ARGS)

# Coverage-guided fuzzing (atheris, by the coverage of the Python code) of the public functions and of the readers of preference data. What that finds of
# calls that differ runs again on the extension with AddressSanitizer, whose own symbols for coverage keep atheris from seeing any. It begins with the
# inputs of tests/fuzz/corpus; one that fails is kept in build/fuzz: mend what it shows, and add it to the corpus, which the suite runs.
FUZZ_SECONDS ?= 600
FUZZED = PYTHONPATH=$(CURDIR)/build/fuzz/packages:$(CURDIR) $(abspath $(BIN))/python run.py $(1) ../../build/fuzz/$(1) corpus/$(1) \
  -artifact_prefix=../../build/fuzz/$(1)- -max_total_time=$(FUZZ_SECONDS) -max_len=$(2) -timeout=60 -rss_limit_mb=8192 -print_final_stats=1
fuzz: build/sanitize/.built
	mkdir -p build/fuzz/ops build/fuzz/readers
	$(PIP) --target build/fuzz/packages --upgrade atheris==3.0.0
	cd tests/fuzz && $(call FUZZED,ops,64) $(ARGS)
	cd tests/fuzz && $(SANITIZED_MEMORY) replay.py ops corpus/ops ../../build/fuzz/ops
	cd tests/fuzz && $(call FUZZED,readers,2048) -dict=readers.dict $(ARGS)

# Every cell of docs/faults.md.
faults: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 -m "faults or not faults" tests/test_faults.py $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/* tests/emulation/*
	$(BIN)/zizmor --quiet --offline --min-severity medium .github

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/* tests/emulation/*

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/bench_logprob.py --device cpu $(ARGS)
	$(BIN)/python benchmarks/bench_loss.py --device cpu $(ARGS)
	$(BIN)/python benchmarks/bench_linear.py --device cpu $(ARGS)
	$(BIN)/python benchmarks/bench_train.py --device cpu $(ARGS)

# On a GPU machine with its own PyTorch: make gpu-check BIN=/path/to/bin, after `pip install -e . --no-build-isolation` there.
# Each command ends within 10 minutes. Test modules whose packages are missing there are skipped and named.
gpu-check:
	timeout 590 $(BIN)/python -m pytest -m gpu --bare $(ARGS)

# Without PyTorch's caching allocator, so that memcheck sees where each tensor ends. initcheck does not see what cuBLAS writes with
# the copy engine, tiles of logits for one: there the head is left to the tests that poison what is not written.
SANITIZED := $(BIN)/python -m pytest -q -x --bare tests/test_gpu.py -k
gpu-sanitize:
	@command -v compute-sanitizer >/dev/null || { echo "gpu-sanitize: compute-sanitizer (of the CUDA toolkit) was not found on PATH"; exit 0; }; \
	for tool in memcheck racecheck initcheck; do \
	  cases="sanitize"; [ $$tool != initcheck ] || cases="sanitize and not linear"; \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 195 compute-sanitizer --tool $$tool --error-exitcode 1 $(SANITIZED) "$$cases" || exit $$?; \
	done

# Every benchmark stops at its share of 10 minutes and exits with 3 if cases are left; called again it goes on with those.
gpu-bench:
	@worst=0; \
	for run in "bench_loss.py 1" "bench_train.py 2" "bench_linear.py 3" "bench_logprob.py 3"; do set -- $$run; \
	  $(BIN)/python benchmarks/$$1 --device cuda --resume --minutes $$2 $(ARGS) || worst=$$?; \
	done; exit $$worst

# A few launches of every kernel at the sizes of the targets; the figures of interest are those of SpeedOfLight. Only what
# runs in the timed calls of our provider is looked at, not the truth that they are checked against.
NCU := ncu --clock-control none --nvtx --nvtx-include "dil_kernels/" --kernel-name "regex:^_logps|^_head|gemm|nvjet" \
  --launch-count 16 --section SpeedOfLight --section MemoryWorkloadAnalysis --section ComputeWorkloadAnalysis
gpu-profile:
	@command -v ncu >/dev/null || { echo "gpu-profile: ncu (Nsight Compute) was not found on PATH"; exit 1; }
	timeout 150 $(NCU) $(BIN)/python benchmarks/bench_logprob.py --device cuda --providers dil_kernels --cases 4x2048-v128256-bf16-50pct $(ARGS)
	timeout 150 $(NCU) $(BIN)/python benchmarks/bench_logprob.py --device cuda --providers dil_kernels --cases 4x16-v128256-bf16-100pct $(ARGS)
	timeout 200 $(NCU) $(BIN)/python benchmarks/bench_linear.py --device cuda --providers dil_kernels --cases policy-4x2048-d4096-v128256 $(ARGS)

# PAIRS is a file of preference pairs; the embedded ones are short.
gpu-train:
	$(BIN)/python -m experiments.beside_trl $(if $(PAIRS),--pairs $(PAIRS)) \
	  --runs-dir runs/beside_trl_gpu --output experiments/results/beside_trl_gpu $(ARGS)
	$(BIN)/python -m experiments.beside_trl $(if $(PAIRS),--pairs $(PAIRS)) --random-llama --max-steps 40 --batch-size 4 \
	  --runs-dir runs/beside_trl_1b --output experiments/results/beside_trl_1b $(ARGS)

aot-report: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/aot_report.py --csv

env: install
	$(BIN)/dil-env

clean:
	rm -rf build *.egg-info $(VENV)-oldest $(VENV)-newest $(addprefix $(VENV)-,$(TRAINERS)) $(VENV)/.installed $(VENV)/.installed-dev dil_kernels/*.so dil_kernels/_build_report.py
