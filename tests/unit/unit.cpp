// All unit tests in one program: deepseek.cpp is compiled once.
//
//   g++ -std=c++20 -O1 -ffp-contract=off -fopenmp -I. tests/unit/unit.cpp -o build/unit
//       -lgtest -lgtest_main -lsimdjson -lpcre2-8 -lutf8proc
//   build/unit                            from the top of the repository
//   build/unit --gtest_filter='Gate*'     one chapter's tests: names begin with its subject
#include "unit.h"

#include "ch01_rules.cpp"
#include "ch02_numbers.cpp"
#include "ch03_files.cpp"
#include "ch03_hostile.cpp"
#include "gguf_blocks.cpp"
#include "gguf_models.cpp"
#include "ch05_operations.cpp"
#include "ch06_positions.cpp"
#include "ch07_gqa.cpp"
#include "ch08_mla.cpp"
#include "ch09_ffn.cpp"
#include "ch10_moe.cpp"
#include "ch11_model.cpp"
#include "ch12_talking.cpp"
#include "ch13_mtp.cpp"
#include "ch14_fp8.cpp"
#include "ch15_machines.cpp"
#include "ch19_bill.cpp"
#include "ch21_conversation.cpp"
#include "simd_kernels.cpp"
#include "simd_interleaved.cpp"
#if __has_include("tokenizer.cpp")
#include "tokenizer.cpp"
#endif
