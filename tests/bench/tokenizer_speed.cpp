// Encodes texts again and again and says how long each time took; driven by tokenizer_speed.py.
//
// usage: tokenizer_speed FOLDER FILE...
// Each line of stdin is the number of a FILE and a size: the file is encoded in pieces of at least that many
// bytes, ending with a line. The answer is a line "SECONDS COUNT HASH" about all ids.
#include "../../tokenizer.h"

#include <chrono>
#include <iostream>
#include <sstream>

namespace {

using Pieces = std::vector<std::string_view>;

Pieces cut(std::string_view text, size_t size) {
    Pieces pieces;
    while (!text.empty()) {
        size_t end = size < text.size() ? std::min(text.find('\n', size), text.size() - 1) + 1 : text.size();
        pieces.push_back(text.substr(0, end));
        text.remove_prefix(end);
    }
    return pieces;
}

void answer(const Tokenizer& tokenizer, const Pieces& pieces) {
    std::vector<std::vector<int>> ids;
    auto start = std::chrono::steady_clock::now();
    for (std::string_view piece : pieces) ids.push_back(tokenizer.encode(piece));
    std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
    size_t count = 0;
    uint64_t hash = 0;
    for (const auto& some : ids)
        for (int id : some) count++, hash = (hash * 1000003 + uint64_t(id)) % (uint64_t(1) << 43);
    std::cout << time.count() << ' ' << count << ' ' << hash << std::endl;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 3) return std::cerr << "usage: tokenizer_speed FOLDER FILE...\n", 1;
    Tokenizer tokenizer = Tokenizer::load(argv[1]);
    std::vector<std::string> texts;
    for (int i = 2; i < argc; i++) texts.push_back(tokenizer_detail::read_file(argv[i]).value());
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream in(line);
        size_t number = 0, size = 0;
        in >> number >> size;
        answer(tokenizer, cut(texts.at(number), size));
    }
}
