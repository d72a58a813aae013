#!/bin/sh
# resources.sh FOLDER: a table of what each kernel in FOLDER/*.cubin uses, read from the machine code. Per kernel: threads per
# block, bytes of parameters, registers per thread, bytes of static shared memory and of stack; and how many instructions
# it has that touch local memory (spills), multiply matrices (HGMMA is wgmma, QGMMA that of fp8, HMMA mma.sync), and copy in bulk (UTMALDG
# is TMA by tensor map, UBLKCP without one). hidden: exponentials computed while a wgmma is in flight, that is from a wait
# that leaves groups in flight to the next that leaves none (ptxas may sink them below it without a word).
set -eu
PATH=$(dirname "$0")/../.toolchain/disassembler/bin:$PATH

for cubin in "$1"/*.cubin; do
    cuobjdump -elf "$cubin"
    cuobjdump -res-usage "$cubin"
    cuobjdump -sass "$cubin"
done | awk '
    function number(hex,    i, n) {
        for (i = 3; i <= length(hex); i++) n = 16 * n + index("0123456789abcdef", substr(hex, i, 1)) - 1
        return n
    }
    /^\.nv\.info\./ { kernel = substr($1, 10) }
    $1 == "Attribute:" { attribute = $2 }
    $1 == "Value:" && attribute == "EIATTR_MAX_THREADS" { threads[kernel] = number($2) }
    $1 == "Value:" && attribute == "EIATTR_CBANK_PARAM_SIZE" { params[kernel] = number($2) }

    $1 == "Function" && /:$/ { kernel = substr($2, 1, length($2) - 1) }
    $1 ~ /^REG:/ { for (i = 1; i <= NF; i++) { split($i, pair, ":"); used[kernel, pair[1]] = pair[2] } }

    $1 == "Function" && $2 == ":" { kernel = $3; kernels[kernel]; in_flight = 0 }
    $1 ~ /^\/\*[0-9a-f]+\*\/$/ && NF > 2 {
        instruction = $2 ~ /^@/ ? $3 : $2
        if (instruction ~ /^WARPGROUP.DEPBAR/) in_flight = !/gsb0, 0x0/
        if (instruction ~ /^MUFU.EX2/ && in_flight) hidden[kernel]++
        sub(/\..*/, "", instruction)
        count[kernel, instruction]++
    }

    END {
        columns = "%-24s %7s %6s %9s %6s %5s %5s %5s %5s %5s %7s %6s %6s\n"
        printf columns, "kernel", "threads", "params", "registers", "shared", "stack", "local", "HGMMA", "QGMMA", "HMMA", "UTMALDG", "UBLKCP", "hidden"
        fflush()
        for (k in kernels)
            printf columns, k, threads[k], params[k], used[k, "REG"], used[k, "SHARED"], used[k, "STACK"],
                count[k, "LDL"] + count[k, "STL"], count[k, "HGMMA"] + 0, count[k, "QGMMA"] + 0, count[k, "HMMA"] + 0, count[k, "UTMALDG"] + 0,
                count[k, "UBLKCP"] + 0, hidden[k] + 0 | "LC_ALL=C sort"
    }'
