#!/bin/sh
# toolchain.sh TOOL...: makes .toolchain/TOOL exist, without root, for each of
#   libclang      for bindgen      ($LIBCLANG_PATH, or the system's, or a Python wheel)
#   cuda          nvcc 13.0        ($CUDA_HOME, or the one on the PATH, or Python wheels)
#   disassembler  cuobjdump, nvdisasm (Python wheels): for the table of kernel resources
#   clang-format  the pinned one (Python wheel)
#   matplotlib    a Python with it, for the plots (venv)
# .cargo/config.toml and the Makefile point there. A tool that is there is left alone; one that is being fetched appears
# only when it is complete, so an interrupted run is simply run again.
set -eu
cd "$(dirname "$0")/.."
mkdir -p .toolchain
home=$(cd .toolchain && pwd -P)

fail() {
    echo "toolchain: $1" >&2
    exit 1
}

# fetch TOOL REQUIREMENT...: unpacks Python wheels into .toolchain/TOOL.
fetch() {
    tool=$1
    shift
    echo "toolchain: fetching $tool ($*)"
    new=$home/.new-$tool-$$
    trap 'rm -rf "$new"' EXIT
    trap 'exit 1' INT TERM HUP
    python3 -m venv "$new/venv" ||
        fail "python3 cannot make a venv: install python3 with its venv module (Debian: python3-venv)"
    "$new/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: \
        --target "$new/packages" "$@" ||
        fail "cannot fetch $tool: pip needs a network to reach its package index, or install $tool yourself (see the top of scripts/toolchain.sh)"
}

# keep FOLDER TEST: moves FOLDER of what was fetched into place, if the file TEST is in it.
keep() {
    [ -e "$new/packages/$1/$2" ] || fail "the wheels of $tool hold no $1/$2"
    # Someone else may have been faster.
    mv -T "$new/packages/$1" "$home/$tool" 2>/dev/null || [ -e "$home/$tool" ] || fail "cannot write $home/$tool"
    rm -rf "$new"
}

libclang() {
    for folder in "${LIBCLANG_PATH:-/none}" "$(llvm-config --libdir 2>/dev/null || true)" /usr/lib/llvm-*/lib; do
        for library in "$folder"/libclang.so "$folder"/libclang.so.* "$folder"/libclang-[0-9]*.so*; do
            [ -e "$library" ] || continue
            ln -sfn "$folder" "$home/libclang"
            return
        done
    done
    fetch libclang libclang==18.1.1
    keep clang/native libclang.so
}

cuda() {
    for folder in "${CUDA_HOME:-/none}" "$(dirname "$(dirname "$(command -v nvcc 2>/dev/null || echo /none/none)")")"; do
        [ -x "$folder/bin/nvcc" ] || continue
        case $("$folder/bin/nvcc" --version) in
        *"release 13.0"*)
            ln -sfn "$folder" "$home/cuda"
            return
            ;;
        *) echo "toolchain: $folder/bin/nvcc is not release 13.0: not used" ;;
        esac
    done
    fetch cuda nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 \
        nvidia-cuda-cccl==13.0.85
    chmod +x "$new"/packages/nvidia/cu13/bin/* "$new"/packages/nvidia/cu13/nvvm/bin/*
    keep nvidia/cu13 bin/nvcc
}

disassembler() {
    fetch disassembler nvidia-cuda-cuobjdump==13.2.51 nvidia-cuda-nvdisasm==13.2.51
    chmod +x "$new"/packages/nvidia/cu13/bin/*
    keep nvidia/cu13 bin/cuobjdump
}

clang_format() {
    fetch clang-format clang-format==18.1.8
    chmod +x "$new"/packages/clang_format/data/bin/*
    keep clang_format/data bin/clang-format
}

matplotlib() {
    echo "toolchain: fetching matplotlib"
    # A venv does not survive being moved, so it is made in its place, and what marks it complete comes last.
    python3 -m venv --clear "$home/matplotlib.venv" ||
        fail "python3 cannot make a venv: install python3 with its venv module (Debian: python3-venv)"
    "$home/matplotlib.venv/bin/python" -m pip install --quiet --disable-pip-version-check --only-binary :all: matplotlib==3.10.7 ||
        fail "cannot fetch matplotlib: pip needs a network to reach its package index"
    ln -sfn matplotlib.venv "$home/matplotlib"
}

for name in "$@"; do
    [ -e "$home/$name" ] && continue
    rm -f "$home/$name" # a link whose target has gone
    case $name in
    libclang) libclang ;;
    cuda) cuda ;;
    disassembler) disassembler ;;
    clang-format) clang_format ;;
    matplotlib) matplotlib ;;
    *) fail "unknown tool $name" ;;
    esac
done
