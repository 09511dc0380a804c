#!/bin/bash
# Builds the unit and golden tests for aarch64 and runs them under QEMU: the NEON kernels against chapter 5,
# and everything else against the same golden files as here.
#
#     tests/cross.sh [GTEST OPTION...]
#
# The libraries are Debian's for arm64, unpacked in build/cross; this system's own packages stay as they are.
set -euo pipefail
cd "$(dirname "$0")/.."
cross=$PWD/build/cross lib=usr/lib/aarch64-linux-gnu
packages=(libsimdjson-dev libsimdjson14 libpcre2-dev libpcre2-8-0 libutf8proc-dev libutf8proc2 libgtest-dev
          libcli11-dev)

if [ ! -d "$cross/sysroot" ]; then
    echo "fetching ${packages[*]} for arm64"
    mkdir -p "$cross"/apt/lists/partial "$cross"/apt/cache/archives/partial "$cross"/debs
    : >"$cross/apt/status"
    cat >"$cross/apt.conf" <<END
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
APT::Sandbox::User "root";
Dir::State "$cross/apt";
Dir::State::status "$cross/apt/status";
Dir::Cache "$cross/apt/cache";
END
    export APT_CONFIG=$cross/apt.conf
    apt-get -qq update
    (cd "$cross/debs" && apt-get -qq download "${packages[@]}")
    for deb in "$cross"/debs/*.deb; do dpkg -x "$deb" "$cross/unpacked"; done
    mv "$cross/unpacked" "$cross/sysroot"
fi

program=$cross/tests
sources=(./*.cpp ./*.h tests/tests.cpp tests/{unit,golden,fuzz})
if [ ! -x "$program" ] || [ -n "$(find "${sources[@]}" -newer "$program")" ]; then
    echo "compiling $program"
    aarch64-linux-gnu-g++ -O2 -std=c++20 -ffp-contract=off -fopenmp -fpeel-loops -pthread -Wall -Wextra \
        -Wpedantic -Werror -Wno-psabi -I. -I"$cross/sysroot/usr/include" tests/tests.cpp -o "$program" \
        -L"$cross/sysroot/$lib" -lsimdjson -lpcre2-8 -lutf8proc -lgtest -lgtest_main
fi
QEMU_LD_PREFIX=/usr/aarch64-linux-gnu qemu-aarch64 -E LD_LIBRARY_PATH="$cross/sysroot/$lib" \
    "$program" --gtest_brief=1 "--gtest_filter=-Fuzz*" "$@"
