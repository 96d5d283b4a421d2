# make quickstart | check | test | faults | lint | types | docs | venv | bench | test-gpu | gpu-report | test-mcore-latest | test-vllm-older
# PYTHON       the interpreter that .venv is made from (3.11 or later)
# TORCH_INDEX  on a CPU machine where pip finds no CPU build of torch: the address of PyTorch's CPU wheel index
PYTHON ?= python3
VENV ?= .venv
export PYTHON VENV TORCH_INDEX
BIN = $(VENV)/bin
# A GPU machine's own installation will do where there is no $(VENV).
HERE = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
# One OpenMP thread a rank: two ranks share two cores, and vLLM's samples are then bit-reproducible.
export OMP_NUM_THREADS ?= 1

.PHONY: venv quickstart check test faults lint types docs bench test-gpu gpu-report test-mcore-latest test-vllm-older

venv:
	@tools/make_venv.sh

quickstart: venv
	$(BIN)/torchrun --rdzv-backend loopback --rdzv-endpoint localhost --nproc-per-node 2 -m megatron_dypo train examples/quickstart/config.yaml

# Before every commit, in under 2 minutes on 2 cores: lint, types, and the tests that start no processes (tests/slow.py).
check: lint types
	$(BIN)/python -m pytest tests -m "not slow and not gpu and not faults" -n 2 --dist worksteal

# Two workers, a file of tests to each: most of the time one core would wait for the other's imports. The longest first
# (tests/conftest.py), not those of most tests.
test: venv
	$(BIN)/python -m pytest tests -m "not gpu and not faults" -n 2 --dist loadfile --no-loadscope-reorder

faults: venv
	MEGATRON_DYPO_FUZZ=10 $(BIN)/python -m pytest tests/faults -m "not gpu"
	$(BIN)/python -m pytest tests --ignore tests/faults -m faults

# The parallel and training tests with another Megatron-Core, in a folder of its own (requirements/mcore-latest.txt).
LATEST = $(abspath $(VENV))/mcore-latest
test-mcore-latest: venv
	$(BIN)/python -m pip install -q --no-deps --ignore-requires-python --upgrade --target $(LATEST) -r requirements/mcore-latest.txt
	PYTHONPATH=$(LATEST) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/test_layouts.py \
	    tests/test_end_to_end.py tests/test_checkpoint.py tests/test_rollout.py tests/test_import_export.py tests/test_offload.py \
	    tests/test_training.py tests/test_head_parallel.py tests/test_convert.py tests/test_attention.py tests/test_planner.py \
	    tests/test_moe.py tests/test_waits.py tests/test_warm_up.py

# The tests of an engine in process with an older vLLM, in a folder of its own (requirements/vllm-older.txt). Its servers
# and its side of NCCL and IPC transfers are those that are refused (docs/rollout.md).
OLDER = $(abspath $(VENV))/vllm-older
test-vllm-older: venv
	$(BIN)/python -m pip install -q --no-deps --upgrade --target $(OLDER) -r requirements/vllm-older.txt
	PYTHONPATH=$(OLDER) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -k "not nccl" \
	    tests/test_rollout.py tests/test_offload.py tests/test_transfer.py tests/test_determinism.py \
	    tests/test_vllm_versions.py tests/test_doctor.py

test-gpu:
	$(HERE) -m pytest tests/test_gpu.py -m gpu -p no:cacheprovider

# One page on what works on this machine's GPU and how fast: benchmarks/results/gpu_report_*.md (docs/gpu-report.md).
# PART=trainer|engine|many   one part, at most 5 minutes; ONLY=STAGE,STAGE   those alone; results are merged.
gpu-report:
	$(HERE) -m benchmarks.gpu_report $(if $(PART),--part $(PART)) $(if $(ONLY),--only $(ONLY))

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/shellcheck -x launch/*.sh launch/slurm.sbatch examples/*/run.sh tools/*.sh

# Each folder's type errors against the number that tools/type_errors.json allows it: a rise is an error. The first run
# takes a minute or two, later ones what has changed. LOWER=1 writes numbers down that have fallen.
types: venv
	$(BIN)/python tools/type_ratchet.py $(if $(LOWER),--lower)

# The pages of docs/ as a site, in site/; a link that leads nowhere is an error.
docs: venv
	$(BIN)/mkdocs build --quiet --strict

# The head takes about 10 minutes on 2 cores, the layouts half an hour, the recipes hours. Results:
# benchmarks/results/, benchmarks/README.md.
bench: venv
	$(BIN)/python -m pip install -q --no-deps -r requirements/bench.txt
	$(BIN)/python -m benchmarks.linear_logprob
	$(BIN)/python -m benchmarks.linear_logprob --preset entropy
	$(BIN)/torchrun --rdzv-backend loopback --rdzv-endpoint localhost --nproc-per-node 2 -m benchmarks.checkpoints --out benchmarks/results/checkpoints_cpu.json
	$(BIN)/python -m benchmarks.packing
	$(BIN)/python -m benchmarks.weight_sync
	$(BIN)/torchrun --rdzv-backend loopback --rdzv-endpoint localhost --nproc-per-node 16 -m benchmarks.export
	$(BIN)/python -m benchmarks.reward
	$(BIN)/python -m benchmarks.rollout
	$(BIN)/python -m benchmarks.layouts
	$(BIN)/python -m benchmarks.tables
	$(BIN)/python -m benchmarks.recipes
	$(BIN)/python -m benchmarks.systems
