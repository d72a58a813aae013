#!/bin/sh
# toolchain.sh TOOL...: makes .toolchain/TOOL exist, without root, for each of
#   libclang      for bindgen      ($LIBCLANG_PATH, or the system's, or a Python wheel)
#   cuda          nvcc 13.0        ($CUDA_HOME, or the one on the PATH, or Python wheels)
#   disassembler  cuobjdump, nvdisasm (Python wheels): for the table of kernel resources
#   clang-format  the pinned one (Python wheel)
#   matplotlib    a Python with it, for the plots (venv)
#   openai        a Python with OpenAI's client, for the tests of the server (venv)
#   lm-eval       lm-evaluation-harness with what it needs to ask servers, for the tests of the server (venv)
#   guidellm      a benchmark of servers; the last release that does without PyTorch (venv)
#   vllm-router   the router, for the test of several servers (venv)
#   haproxy       the load balancer, for the same (the system's, or Debian packages)
#   chromium      a browser and its driver, for the test of the page (the system's, or Debian packages)
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

# venv TOOL REQUIREMENT...: a Python that has these and what they need, as .toolchain/TOOL.
venv() {
    tool=$1
    shift
    echo "toolchain: fetching $tool ($*)"
    # A venv does not survive being moved, so it is made in its place, and what marks it complete comes last.
    python3 -m venv --clear "$home/$tool.venv" ||
        fail "python3 cannot make a venv: install python3 with its venv module (Debian: python3-venv)"
    "$home/$tool.venv/bin/python" -m pip install --quiet --disable-pip-version-check --only-binary :all: "$@" ||
        fail "cannot fetch $tool: pip needs a network to reach its package index"
    ln -sfn "$tool.venv" "$home/$tool"
}

# debian TOOL COMMAND... -- PACKAGE...: a folder .toolchain/TOOL with these commands, the system's or those of Debian packages, whose
# paths below usr follow a colon.
debian() {
    tool=$1
    shift
    commands=
    while [ "$1" != -- ]; do
        commands="$commands $1"
        shift
    done
    shift
    new=$home/.new-$tool-$$
    trap 'rm -rf "$new"' EXIT
    trap 'exit 1' INT TERM HUP
    mkdir -p "$new/root" "$new/lists/partial" "$new/debs"
    missing=
    for command in $commands; do command -v "${command%:*}" >/dev/null || missing=$command; done
    if [ -z "$missing" ]; then
        for command in $commands; do ln -s "$(command -v "${command%:*}")" "$new/${command%:*}"; done
    else
        echo "toolchain: fetching $tool"
        # Package lists of our own, since those of the system may be missing and only root writes them.
        apt="-qq -o Dir::State::Lists=$new/lists -o APT::Sandbox::User="
        apt-get $apt update && packages=$(apt-get $apt -s install --no-install-recommends "$@" |
            sed -n 's/^Inst \([^ ]*\).*/\1/p') && [ "$packages" ] || fail "cannot fetch $tool: install it yourself"
        (cd "$new/debs" && apt-get $apt download $packages) || fail "cannot fetch the packages of $tool"
        for package in "$new"/debs/*.deb; do dpkg-deb -x "$package" "$new/root"; done
        for command in $commands; do
            cat >"$new/${command%:*}" <<END
#!/bin/sh
root=\$(dirname "\$(readlink -f "\$0")")/root/usr
export LD_LIBRARY_PATH=\$root/lib/$(uname -m)-linux-gnu:\$root/lib/$(uname -m)-linux-gnu/pulseaudio
exec "\$root/${command#*:}" "\$@"
END
            chmod +x "$new/${command%:*}"
        done
        rm -rf "$new/debs" "$new/lists"
    fi
    mv -T "$new" "$home/$tool" 2>/dev/null || [ -e "$home/$tool" ] || fail "cannot write $home/$tool"
}

for name in "$@"; do
    [ -e "$home/$name" ] && continue
    rm -f "$home/$name" # a link whose target has gone
    case $name in
    libclang) libclang ;;
    cuda) cuda ;;
    disassembler) disassembler ;;
    clang-format) clang_format ;;
    matplotlib) venv matplotlib matplotlib==3.10.7 ;;
    openai) venv openai openai==3.54.0 ;;
    lm-eval) venv lm-eval --no-binary rouge-score,sqlitedict,word2number 'lm-eval[api]==0.4.13' transformers==5.17.0 ;;
    guidellm) venv guidellm guidellm==0.3.1 datasets==5.0.1 transformers==5.17.0 ;;
    chromium) debian chromium chromium:lib/chromium/chromium chromedriver:bin/chromedriver -- chromium chromium-driver ;;
    vllm-router) venv vllm-router vllm-router==0.1.17 ;;
    haproxy) debian haproxy haproxy:sbin/haproxy -- haproxy ;;
    *) fail "unknown tool $name" ;;
    esac
done
