#!/usr/bin/env bash
# Runs a suite of the emulator: what `make` built from CUDA's headers, without a GPU.
#
#   tests/gpu/emulated.sh NAME COMMAND...        from anywhere; CUDA names another folder of the toolkit
#
# Where there are no such headers the suite says so and is skipped.
cd "$(dirname "$0")/../.." || exit 1
name=$1
shift
for folder in ${CUDA:-/usr/local/cuda /opt/cuda}; do
    [ -e "$folder/include/cuda_runtime_api.h" ] && exec "$@"
done
echo "$name: skipped, there are no CUDA headers here"
