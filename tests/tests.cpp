// The unit tests, the golden tests and the fuzz corpus in one program: the processor's kernels, which take
// most of the time to compile, are compiled once for all of them.
//
//   build/tests                                   from the top of the repository
//   build/tests --gtest_filter=-'Golden*:Fuzz*'   the unit tests alone
#include "unit/unit.cpp"

#define TESTS_TOGETHER
#include "golden/golden.cpp"

#include "fuzz/replay.cpp"
