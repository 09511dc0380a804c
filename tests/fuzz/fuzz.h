// What the targets share. A target may refuse its input with one of the program's two errors; anything else
// that leaves it, a sanitizer's report or a broken CHECK is a find.
#pragma once
#ifndef TESTS_TOGETHER                // tests/tests.cpp has it already
#define DEEPSEEK_NO_MAIN
#include "../../deepseek.cpp"
#endif

#define FUZZ_CHECK(condition) CHECK(condition, "a property of the fuzz target")

// Runs body(text); an error must be one that the user can be shown.
template <class Body> int fuzz_one(const uint8_t* data, size_t size, const Body& body) {
    try {
        body(std::string_view(reinterpret_cast<const char*>(data), size));
    } catch (const UserError& e) {
        FUZZ_CHECK(*e.what());
    } catch (const TokenizerError& e) {
        FUZZ_CHECK(*e.what());
    }
    return 0;
}
