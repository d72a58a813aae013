# `make run` and `make test` need a Rust toolchain, a C++20 compiler and python3 with venv; the rest is fetched into
# .toolchain/ without root (scripts/toolchain.sh).

CARGO := cargo
CLANG_FORMAT := .toolchain/clang-format/bin/clang-format
C_SOURCES = $(wildcard kernels/*.h kernels/*.cuh kernels/*.cu kernels/simt/*.h kernels/simt/*.cpp kernels/simt/planted/*.h \
              kernels/simt/planted/*.cu)

# Without an NVIDIA driver only the host target can run, so nvcc is neither fetched nor used.
DRIVER := $(wildcard /dev/nvidiactl)
FOR_THIS_MACHINE := $(if $(DRIVER),,--no-default-features)

# What `make run` asks: x in 3x + 4 = 2 (mod 11).
QUESTION := 3*x+4=2 mod 11

.PHONY: run test bench fmt fmt-check resources setup
.DEFAULT_GOAL := run

setup:
	@scripts/toolchain.sh libclang cuda disassembler clang-format

run:
	@scripts/toolchain.sh libclang $(if $(DRIVER),cuda)
	$(CARGO) run --release $(FOR_THIS_MACHINE) -- generate models/modulo "$(QUESTION)" --n-ignore 2 --ignore-string Wait

test: setup
	$(CARGO) test --release

bench: setup
	$(CARGO) bench

fmt: setup
	$(CARGO) fmt
	$(CLANG_FORMAT) -i $(C_SOURCES)

fmt-check: setup
	$(CARGO) fmt --check
	$(CLANG_FORMAT) --dry-run -Werror $(C_SOURCES)
