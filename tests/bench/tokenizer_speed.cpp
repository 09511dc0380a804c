// Encodes a file again and again and says how long each time took; driven by tokenizer_speed.py.
//
// usage: tokenizer_speed FOLDER FILE...
// Each line of stdin is the number of a FILE; the answer is a line "SECONDS TOKENS" for one encoding of it.
#include "../../tokenizer.h"

#include <chrono>
#include <iostream>

int main(int argc, char** argv) {
    if (argc < 3) return std::cerr << "usage: tokenizer_speed FOLDER FILE...\n", 1;
    Tokenizer tokenizer = Tokenizer::load(argv[1]);
    std::vector<std::string> texts;
    for (int i = 2; i < argc; i++) texts.push_back(tokenizer_detail::read_file(argv[i]).value());
    for (size_t which; std::cin >> which;) {
        auto start = std::chrono::steady_clock::now();
        size_t tokens = tokenizer.encode(texts.at(which)).size();
        std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
        std::cout << time.count() << ' ' << tokens << std::endl;
    }
}
