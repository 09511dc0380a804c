// llama.cpp's logits of a GGUF model, for tests/bench/peer_logits.py.
//
//     peer_logits MODEL.gguf OUT IDS      IDS: separated by commas; OUT: (ids, vocabulary) in f32
//
// The time from the start to the first logits goes to stderr.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "llama.h"

int main(int argc, char** argv) {
    if (argc != 4) return 1;
    auto start = std::chrono::steady_clock::now();
    llama_log_set([](ggml_log_level level, const char* text, void*) {
        if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
    }, nullptr);
    std::vector<llama_token> ids;
    for (char* p = argv[3]; *p; p += *p == ',') ids.push_back(llama_token(std::strtol(p, &p, 10)));
    llama_model_params plain = llama_model_default_params();
    plain.use_extra_bufts = false;      // with AMX they abort on a deepseek2 model
    llama_model* model = llama_model_load_from_file(argv[1], plain);
    if (!model) return 1;
    int n = int(ids.size());
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = uint32_t(n < 64 ? 64 : n);
    params.n_threads = params.n_threads_batch = 2;
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    llama_context* context = llama_init_from_model(model, params);
    if (!context) return 1;
    llama_batch batch = llama_batch_init(n, 0, 1);
    for (int i = 0; i < n; i++) {
        batch.token[i] = ids[size_t(i)], batch.pos[i] = i, batch.n_seq_id[i] = 1, batch.seq_id[i][0] = 0;
        batch.logits[i] = 1;
    }
    batch.n_tokens = n;
    if (llama_decode(context, batch) != 0) return 1;
    size_t width = size_t(llama_vocab_n_tokens(llama_model_get_vocab(model)));
    std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    fprintf(stderr, "%.2f s\n", seconds.count());
    FILE* out = fopen(argv[2], "wb");
    for (int i = 0; out && i < n; i++) fwrite(llama_get_logits_ith(context, i), sizeof(float), width, out);
    return out && fclose(out) == 0 ? 0 : 1;
}
