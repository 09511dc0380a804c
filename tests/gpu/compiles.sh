#!/usr/bin/env bash
# nvcc compiles deepseek.cu without a warning, and its kernels keep their numbers in registers.
#
#   tests/gpu/compiles.sh        from anywhere; NVCC names another nvcc, CXX the host compiler
#
# Where there is no nvcc the suite says so and is skipped. The program itself is built by make, with the same
# warnings as errors; here its kernels are compiled for one GPU, and ptxas' report is read. It is not done
# again while that is newer than every source. System headers may warn (nvcc takes /usr/include for such).
# simdjson's own SIMD is off: nvcc fails in it.
set -u
cd "$(dirname "$0")/../.." || exit 1
export LC_ALL=C
nvcc=${NVCC:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
if ! command -v "$nvcc" >/dev/null; then
    echo "nvcc: skipped, there is no nvcc here"
    exit 0
fi
out=build/nvcc
mkdir -p "$out"
passed=0 failed=0

check() {                                    # check NAME COMMAND...
    local name=$1
    shift
    if "$@"; then passed=$((passed + 1)); else failed=$((failed + 1)) && echo "nvcc: $name FAILED"; fi
}

compile() {                                  # compile TEXT OPTION...: fails on errors and on warnings
    printf '%s\n' "$1" >"$out/text.cu"
    shift
    "$nvcc" -x cu -std=c++20 -arch=sm_80 --fmad=false --expt-relaxed-constexpr -ccbin "${CXX:-g++}" -I. \
        -Werror all-warnings -diag-suppress 1675 -DSIMDJSON_IMPLEMENTATION_HASWELL=0 \
        -DSIMDJSON_IMPLEMENTATION_ICELAKE=0 -DSIMDJSON_IMPLEMENTATION_WESTMERE=0 \
        -Xcompiler=-Wall,-Wextra,-Werror,-ffp-contract=off,-fopenmp \
        "$@" "$out/text.cu" >"$out/log" 2>&1 && ! grep -q warning "$out/log"
}
refused() { ! compile "$1" -c -o "$out/planted.o" && grep -q "$2" "$out/log"; }

# A report in which a kernel spills registers, or has arrays that lie in memory.
spills() { grep -q "[1-9][0-9]* bytes \(stack frame\|spill\)" "$1"; }
report() {                                   # report TEXT FILE
    compile "$1" -O2 -Xptxas -v -cubin -o "$out/kernels.cubin" && cp "$out/log" "$2"
}
seen() { report "$1" "$out/planted.txt" && spills "$out/planted.txt"; }
whole() {
    local file=$out/kernels.txt
    [ -e "$file" ] && [ -z "$(find ./*.cu ./*.cpp ./*.h tests/gpu/compiles.sh -newer "$file")" ] ||
        { rm -f "$file" && report '#include "deepseek.cu"' "$file"; } || { head -60 "$out/log"; return 1; }
}
in_registers() {
    local kernels
    kernels=$(grep -c "Compiling entry function" "$out/kernels.txt")
    [ "$kernels" -ge 70 ] && ! spills "$out/kernels.txt"
}

kernel='__global__ void twice(float* x) { x[threadIdx.x] *= 2; }'
check "a kernel" compile "$kernel" -c -o "$out/planted.o"
check "an error" refused "$kernel int one() { return two; }" "two"
check "a warning of nvcc's" refused "$kernel int one() { int unused; return 1; }" "unused"
check "a warning of the host compiler's" refused "$kernel bool less(int a, unsigned b) { return a < b; }" \
    "sign-compare"
check "an array that lies in memory" seen '__global__ void count(float* x, const int* at) {
    float v[64] = {};
    for (int i = 0; i < 64; i++) v[at[i] & 63] += x[i];
    for (int i = 0; i < 64; i++) x[i] = v[i];
}'
check "deepseek.cu" whole
check "its kernels' numbers are in registers" in_registers

echo "nvcc: $passed passed, $failed failed"
[ "$failed" = 0 ]
