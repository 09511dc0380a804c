#!/bin/bash
# Builds llama.cpp's newest release natively, writes models of published shapes with random weights, and
# prints the table of tests/bench/bench.py: our speed, the machine's floors, llama.cpp's speed.
#
#     tests/bench/peers.sh [FOLDER]       FOLDER: where all this goes (default: build/peers; 15 GB)
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

models=()
for shape in qwen-1.5b; do          # llama.cpp knows V2-Lite by its 27 layers and refuses v2-lite's 6
    [ -d $shape ] || "$root"/tests/bench/make_model.py $shape $shape
    for type in q8_0 q4_k_m bf16; do
        [ -f $shape-$type.gguf ] || "$root"/deepseek quantize -m $shape -o $shape-$type.gguf --type $type
        models+=("$folder/$shape-$type.gguf")
    done
done
"$root"/tests/bench/bench.py --peer "$folder/bin" "${models[@]}"
