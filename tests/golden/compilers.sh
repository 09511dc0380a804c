#!/usr/bin/env bash
# One answer from two compilers: builds deepseek with g++ and with clang++, without -march flags, and compares
# the bytes that `deepseek logits --taps` writes for every golden model: both programs, with the kernels that
# the processor has and with the plain ones (--exact), must write the same file.
#
#   tests/golden/compilers.sh            from the root of the repository; programs in build/compilers
#
# CXX and CLANGXX name other compilers. A program is built anew only if the sources are newer.
set -u
cd "$(dirname "$0")/../.."
export LC_ALL=C
out=build/compilers
mkdir -p "$out"
passed=0 failed=0

check() {                                    # check NAME COMMAND...
    local name=$1
    shift
    if "$@"; then passed=$((passed + 1)); else failed=$((failed + 1)) && echo "compilers: $name FAILED"; fi
}

build() {                                    # build COMPILER PROGRAM
    [ -x "$2" ] && [ -z "$(find ./*.cpp ./*.h -newer "$2")" ] && return 0
    "$1" -std=c++20 -O2 -ffp-contract=off -fopenmp -pthread deepseek.cpp -o "$2" \
        -lsimdjson -lpcre2-8 -lutf8proc -ledit
}

build "${CXX:-g++}" "$out/deepseek-gcc" &
build "${CLANGXX:-clang++}" "$out/deepseek-clang"
check "build with clang++" test $? = 0
wait $!
check "build with g++" test $? = 0

# The ids of a golden file, comma-separated: its first tensor, so the data begin with them.
ids_of() {
    python3 - "$1" <<'PYTHON'
import json, struct, sys
with open(sys.argv[1], "rb") as f:
    size, = struct.unpack("<Q", f.read(8))
    begin, end = json.loads(f.read(size))["ids"]["data_offsets"]
    f.seek(8 + size + begin)
    print(*struct.unpack(f"<{(end - begin) // 4}i", f.read(end - begin)), sep=",")
PYTHON
}

# Header and tensors of two files are the same; only their metadata, which name the kernels, may differ.
same_file() {                                # same_file A B
    python3 - "$1" "$2" <<'PYTHON'
import json, struct, sys
def content(path):
    with open(path, "rb") as f:
        size, = struct.unpack("<Q", f.read(8))
        header = json.loads(f.read(size))
        header.pop("__metadata__")
        return header, f.read()
sys.exit(content(sys.argv[1]) != content(sys.argv[2]))
PYTHON
}

logits() {                                   # logits COMPILER MODEL IDS OUT OPTIONS...
    local program=$out/deepseek-$1 model=$2 ids=$3 file=$out/$4
    shift 4
    rm -f "$file"
    "$program" logits -m "$model" --ids "$ids" --taps --out "$file" "$@"
}

same() {                                     # same MODEL IDS
    logits gcc "$1" "$2" gcc.out && logits clang "$1" "$2" clang.out &&
        logits gcc "$1" "$2" gcc-exact.out --exact && logits clang "$1" "$2" clang-exact.out --exact &&
        cmp "$out/gcc.out" "$out/clang.out" && same_file "$out/gcc.out" "$out/gcc-exact.out" &&
        cmp "$out/gcc-exact.out" "$out/clang-exact.out"
}

export OMP_WAIT_POLICY=passive               # gentle to whatever else runs here
models=0
for golden in tests/golden/models/*/taps.safetensors tests/golden/tiny/taps.safetensors; do
    model=$(dirname "$golden")
    [ "$model" = tests/golden/tiny ] && model=weights/tiny
    check "$model" same "$model" "$(ids_of "$golden")"
    models=$((models + 1))
done
check "at least 18 models" test "$models" -ge 18

rounded() {                                  # rounded MODEL IDS ARITH: activations in fewer bits
    logits gcc "$1" "$2" gcc.out --arith "$3" && logits clang "$1" "$2" clang.out --arith "$3" &&
        cmp "$out/gcc.out" "$out/clang.out"
}
for arith in bf16 fp8; do
    for golden in v3-fp8 v3-ue8m0; do
        golden=tests/golden/models/$golden
        check "$golden --arith $arith" rounded "$golden" "$(ids_of "$golden/taps.safetensors")" "$arith"
    done
done

differs() {                                  # one other id must show in the bytes
    logits gcc weights/tiny 0,508,40 gcc.out && logits clang weights/tiny 0,508,41 clang.out &&
        ! same_file "$out/gcc.out" "$out/clang.out"
}
check "another id, other bytes" differs

echo "compilers: $passed passed, $failed failed"
[ "$failed" = 0 ]
