#!/usr/bin/env bash
# nvcc compiles deepseek.cpp whole, without a warning of ours: what deepseek.cu, which includes it, needs.
#
#   tests/gpu/compiles.sh        from anywhere; NVCC names another nvcc, CXX the host compiler
#
# Where there is no nvcc the suite says so and is skipped. Not optimised, for one GPU: this takes a minute. It
# is not done again while build/nvcc/deepseek.o is newer than every source. System headers may warn (nvcc
# takes /usr/include for such). simdjson's own SIMD is off: nvcc fails in it.
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

compile() {                                  # compile TEXT OUT: fails on errors and on warnings
    printf '%s\n' "$1" >"$out/text.cu"
    "$nvcc" -x cu -std=c++20 -O0 -arch=sm_80 -ccbin "${CXX:-g++}" -I. -Werror all-warnings \
        -diag-suppress 1675 -DSIMDJSON_IMPLEMENTATION_HASWELL=0 -DSIMDJSON_IMPLEMENTATION_ICELAKE=0 \
        -DSIMDJSON_IMPLEMENTATION_WESTMERE=0 -Xcompiler=-Wall,-Wextra,-Werror,-ffp-contract=off,-fopenmp \
        -c "$out/text.cu" -o "$2" >"$out/log" 2>&1 && ! grep -q warning "$out/log"
}
refused() { ! compile "$1" "$out/planted.o" && grep -q "$2" "$out/log"; }

whole() {
    local object=$out/deepseek.o
    [ -e "$object" ] && [ -z "$(find ./*.cpp ./*.h tests/gpu/compiles.sh -newer "$object")" ] && return 0
    rm -f "$object"
    compile '#include "deepseek.cpp"' "$object" || { head -60 "$out/log"; return 1; }
}

kernel='__global__ void twice(float* x) { x[threadIdx.x] *= 2; }'
check "a kernel" compile "$kernel" "$out/planted.o"
check "an error" refused "$kernel int one() { return two; }" "two"
check "a warning of nvcc's" refused "$kernel int one() { int unused; return 1; }" "unused"
check "a warning of the host compiler's" refused "$kernel bool less(int a, unsigned b) { return a < b; }" \
    "sign-compare"
check "deepseek.cpp" whole

echo "nvcc: $passed passed, $failed failed"
[ "$failed" = 0 ]
