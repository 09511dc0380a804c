#!/bin/bash
# Builds llama.cpp's newest release natively, compares its logits with ours (tests/bench/peer_logits.py),
# writes models of published shapes with random weights, and prints the table of tests/bench/bench.py: our
# speed, the machine's floors, llama.cpp's speed.
#
#     tests/bench/peers.sh [FOLDER]       FOLDER: where all this goes (default: build/peers; 45 GB)
#
# llama.cpp is in the source package of llama-cpp-python at the Python registry.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
folder=$(mkdir -p "${1:-$root/build/peers}" && cd "${1:-$root/build/peers}" && pwd)

make -C "$root" deepseek build/floors
cd "$folder"
if [ ! -x bin/llama-bench ]; then
    python3 -m venv venv
    venv/bin/pip -q install cmake scikit-build-core
    venv/bin/pip -q download --no-deps --no-binary llama-cpp-python --no-build-isolation llama-cpp-python
    tar xf llama_cpp_python-*.tar.gz
    source=$(echo "$folder"/llama_cpp_python-*/vendor/llama.cpp)
    # g++ 12 believes that the tile configuration is never read and drops it: without this line AMX traps.
    sed -i 's|^    _tile_loadconfig(&tc);|    asm volatile("" : : "r"(\&tc) : "memory");\n&|' \
        "$source/ggml/src/ggml-cpu/amx/mmq.cpp"
    venv/bin/cmake -S "$source" -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_CURL=OFF \
        -DLLAMA_OPENSSL=OFF >cmake.log
    make -C build -j"$(nproc)" llama-bench >make.log 2>&1
    ln -sfn build/bin bin
fi

if [ ! -x bin/peer_logits ]; then
    source=$(echo "$folder"/llama_cpp_python-*/vendor/llama.cpp)
    g++ -O2 -std=c++17 -I"$source/include" -I"$source/ggml/include" "$root/tests/bench/peer_logits.cpp" \
        -o bin/peer_logits -Lbin -lllama -lggml -lggml-base -Wl,-rpath,"$folder/build/bin"
fi
"$root"/tests/bench/peer_logits.py "$folder/bin/peer_logits"
echo

quantised() {                               # SHAPE TYPE OUT.gguf
    [ -d "$1" ] || "$root"/tests/bench/make_model.py "$1" "$1"
    "$root"/deepseek quantize -m "$1" -o "$3" --type "$2"
}
models=()
for type in q8_0 q4_k_m bf16; do
    [ -f qwen-1.5b-$type.gguf ] || quantised qwen-1.5b $type qwen-1.5b-$type.gguf
    models+=("$folder/qwen-1.5b-$type.gguf")
done
for type in q8_0 q4_k_m; do                 # llama.cpp knows V2-Lite by its 27 layers
    if [ ! -f v2-lite-$type.gguf ]; then
        quantised v2-lite $type few.gguf
        "$root"/tests/bench/repeat_layers.py few.gguf v2-lite-$type.gguf 27
        rm few.gguf
    fi
    models+=("$folder/v2-lite-$type.gguf")
done
"$root"/tests/bench/bench.py --peer "$folder/bin" "${models[@]}"
