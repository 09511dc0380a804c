// A saved cache (12.3), loaded into a session of the shipped model. One that is accepted is gone on with.
#include "fuzz.h"

#include <sys/mman.h>

// A file in memory, as load_cache wants a path.
struct MemoryFile {
    int fd = memfd_create("cache", MFD_CLOEXEC);
    explicit MemoryFile(std::string_view text) {
        FUZZ_CHECK(fd >= 0 && ::write(fd, text.data(), text.size()) == ssize_t(text.size()));
    }
    ~MemoryFile() { close(fd); }
    std::string path() const { return "/proc/self/fd/" + std::to_string(fd); }
};

// The numbers that name model and options are no seed's business: a zero stands for the right one.
inline std::string with_facts(std::string text, const Session& s) {
    TensorFile file = parse_safetensors(std::as_bytes(std::span(text.data(), text.size())), "fuzz");
    std::vector<CacheFact> facts = cache_facts(s);
    for (const TensorInfo& t : file.tensors) {
        for (size_t i = 0; t.name == "about" && 8 * (i + 3) <= t.end - t.begin && i < facts.size(); i++) {
            char* at = text.data() + file.data_begin + t.begin + 8 * (i + 2);
            if (load<uint64_t>(at) == 0) std::memcpy(at, &facts[i].value, 8);
        }
    }
    return text;
}

// Whether it was accepted.
inline bool use_cache(std::string_view text) {
    static const Model model = load_model("weights/tiny");
    Session s(model, {8, 2, MlaForm::ABSORBED, REAL});
    try {
        load_cache(s, MemoryFile(with_facts(std::string(text), s)).path());
    } catch (const UserError& e) {
        FUZZ_CHECK(*e.what() && s.length == 0 && s.mtp_length == 0 && s.tokens.empty());
        return false;
    }
    check_settled(s);
    FUZZ_CHECK(size_t(s.length) == s.tokens.size() && s.length <= 8);
    std::vector<int> ids(s.tokens.begin(), s.tokens.begin() + std::min(s.length, 5));
    ids.push_back(1);
    Generation g;
    g.max_tokens = 2, g.drafting = &MTP_DRAFTS;
    fuzz_one(nullptr, 0, [&](std::string_view) {                     // its numbers may be none
        generate(s, ids, g, [](int) {}, [&](int id) { return id >= 0 && id < model.config.V; });
    });
    check_settled(s);
    return true;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    return use_cache({reinterpret_cast<const char*>(data), size}), 0;
}
