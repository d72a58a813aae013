# Needed: a Rust toolchain, a C++20 compiler, make, and python3 with venv. What else is missing is fetched into .toolchain/
# without root (scripts/toolchain.sh).

CARGO := cargo
CLANG_FORMAT := .toolchain/clang-format/bin/clang-format
C_SOURCES = $(wildcard $(foreach folder,kernels kernels/simt kernels/simt/planted tests/fake,$(addprefix $(folder)/*.,h cuh cu cpp c)))

# Without an NVIDIA driver only the host target can run: `make run` then neither fetches nor uses nvcc.
DRIVER := $(wildcard /dev/nvidiactl)
FOR_THIS_MACHINE := $(if $(DRIVER),,--no-default-features)

# What `make run` asks: the x with 3x + 4 = 2 (mod 11).
QUESTION := Find x with 3x + 4 = 2 (mod 11).
# `make test TESTS=sampler` runs the tests with that in their name.
TESTS :=
# Those that run every kernel, alone and in a whole model.
ON_KERNELS := attention bench::random norms products sampler simt model::a_checked_run
FUZZ_SECONDS := 60

.PHONY: run test bench fmt check-fmt lint resources asan fuzz gpu-bundle predict plots clients setup

run: # answers a question with the tiny model on whatever this machine has
	@scripts/toolchain.sh libclang $(if $(DRIVER),cuda)
	$(CARGO) run --release $(FOR_THIS_MACHINE) -- generate models/modulo "$(QUESTION)" --n-ignore 2 --ignore-string Wait

test: setup clients # every test; every kernel is compiled by nvcc, too
	$(CARGO) test --release -- $(TESTS)

bench: setup # every kernel alone, and how fast the tiny model answers
	$(CARGO) run --release -- bench kernels
	$(CARGO) run --release -- bench latency models/modulo

fmt: setup
	$(CARGO) fmt
	$(CLANG_FORMAT) -i $(C_SOURCES)

check-fmt: setup
	$(CARGO) fmt --check
	$(CLANG_FORMAT) --dry-run -Werror $(C_SOURCES)

lint: setup
	$(CARGO) clippy --release --all-targets -- -D warnings

resources: setup # writes tests/resources.txt anew
	PONDER_UPDATE_RESOURCES=1 $(CARGO) test --release --test tests -- resources

asan: setup # every kernel with the address sanitizer in it and in the SIMT machine
	$(CARGO) test --release --no-default-features --features asan --test tests -- $(or $(TESTS),$(ON_KERNELS))

fuzz: setup # a minute for each parser of outside input
	tests/fuzz.sh $(FUZZ_SECONDS)

gpu-bundle: setup # what benches/gpu.sh needs on a machine without Rust
	scripts/gpu-bundle.sh

predict: setup # writes benches/predictions.json and docs/predictions.md anew
	$(CARGO) build --release
	python3 benches/predict.py

plots: # draws docs/*.svg and *.png from benches/results/, or from the predictions; pictures and numbers of docs/kernels
	@scripts/toolchain.sh matplotlib
	.toolchain/matplotlib/bin/python benches/plot.py
	.toolchain/matplotlib/bin/python benches/draw_kernels.py

# A browser, a client library, an evaluation harness and a benchmark that are pointed at the server. Where they cannot be had, their tests say so and pass.
clients:
	-@scripts/toolchain.sh chromium
	-@scripts/toolchain.sh openai
	-@scripts/toolchain.sh lm-eval
	-@scripts/toolchain.sh guidellm
	-@scripts/toolchain.sh vllm-router
	-@scripts/toolchain.sh haproxy

setup:
	@scripts/toolchain.sh libclang cuda disassembler clang-format
