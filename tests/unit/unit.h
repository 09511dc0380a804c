// What the chapters' tests share: error bounds, noise, small models and a folder to write them to.
//
// Two rules. A fact is compared with something that is not this program: a published value, a formula in long
// double, a recipe written out a second time. And a tolerance is a count of roundings, written beside it.
#pragma once

#ifndef DEEPSEEK_NO_MAIN
#define DEEPSEEK_NO_MAIN
#endif
#include <gtest/gtest.h>

#include "../../deepseek.cpp"

#include <deque>
#include <numeric>

// -- error bounds -----------------------------------------------------------------------------------

// Unit roundoff: the relative error of one rounding to `real`.
constexpr long double U = std::numeric_limits<real>::epsilon() / 2.0L;

// The relative error of n roundings in a row is at most this (Higham 2002, lemma 3.1).
constexpr long double chain_error(long double n) { return n * U / (1 - n * U); }

// Roundings that a term of `dot` goes through: its lane's chain, then 4 levels of the tree.
constexpr int dot_roundings(int n) { return (n + LANES - 1) / LANES + 4; }

// exp_of is within one unit in the last place, 2 U: half a unit and a little for float, std::exp for double.
constexpr long double EXP_ERROR = 2 * U;

// The relative error of a softmax over n numbers that lie up to `range` below the largest: the difference
// moves a term by range * U, exp_of by EXP_ERROR; the same for the sum, which has the lanes and the tree of a
// dot, or n - 1 additions if that is less; one division.
constexpr long double softmax_error(int n, long double range) {
    return 1.01L * (2 * (range * U + EXP_ERROR) + std::min(n, dot_roundings(n)) * U);
}

// Equal bits. NaNs are equal wherever they stand: their payload is no part of the contract.
inline bool same_bits(const real* a, const real* b, size_t n) {
    for (size_t i = 0; i < n; i++) {
        bool both_nan = std::isnan(a[i]) && std::isnan(b[i]);
        if (!both_nan && std::memcmp(a + i, b + i, sizeof(real)) != 0) return false;
    }
    return true;
}
inline bool same_bits(const Vector& a, const Vector& b) {
    return a.size() == b.size() && same_bits(a.data(), b.data(), a.size());
}

// -- refusals ---------------------------------------------------------------------------------------

// Did `body` end in a UserError whose one line contains `part`?
inline testing::AssertionResult refuses(const std::function<void()>& body, const std::string& part) {
    try {
        body();
    } catch (const UserError& e) {
        std::string text = e.what();
        if (text.find(part) == std::string::npos)
            return testing::AssertionFailure() << "'" << text << "' does not name '" << part << "'";
        if (text.find('\n') != std::string::npos)
            return testing::AssertionFailure() << "'" << text << "' is more than one line";
        return testing::AssertionSuccess();
    }
    return testing::AssertionFailure() << "not refused; expected a line with '" << part << "'";
}

// -- noise, threads, kernels ------------------------------------------------------------------------

// Reproducible numbers in [-1, 1).
struct Noise {
    Rng rng{1};

    double next() { return 2 * rng.uniform() - 1; }
    int below(int n) { return int(rng.next() % uint64_t(n)); }
    Vector vector(size_t n) {
        Vector out(n);
        for (real& v : out) v = real(next());
        return out;
    }
};

// Tests run on one thread, but for those that compare numbers of threads: tiny models gain nothing from more.
struct ScopedThreads {
    int before = n_threads();
    explicit ScopedThreads(int n) { set_threads(n); }
    ~ScopedThreads() { set_threads(before); }
};

struct ScopedKernels {
    Kernels before = kernels;
    explicit ScopedKernels(const Kernels& k) { kernels = k; }
    ~ScopedKernels() { kernels = before; }
};

// -- a folder to write to ---------------------------------------------------------------------------

// build/unit.PID, removed at the end.
class ScratchRoot {
public:
    ~ScratchRoot() {
        std::error_code error;
        if (!path_.empty()) fs::remove_all(path_, error);
    }
    fs::path folder(const std::string& name) {
        if (path_.empty()) path_ = fs::path("build") / text_of("unit.%d", int(getpid()));
        fs::remove_all(path_ / name);
        fs::create_directories(path_ / name);
        return path_ / name;
    }

private:
    fs::path path_;
};
inline ScratchRoot scratch_root;

// A new, empty folder.
inline fs::path scratch(const std::string& name) { return scratch_root.folder(name); }

inline void write_text(const fs::path& path, std::string_view text) {
    std::ofstream(path, std::ios::binary).write(text.data(), std::streamsize(text.size()));
}

// -- configs ----------------------------------------------------------------------------------------

// A config.json: key -> JSON value.
using Keys = std::map<std::string, std::string>;

inline std::string json_of(const Keys& keys) {
    std::string out;
    for (auto& [key, value] : keys) out += (out.empty() ? "{\"" : ",\"") + key + "\":" + value;
    return out + "}";
}
inline Keys with(Keys keys, const Keys& changes) {
    for (auto& [key, value] : changes) keys[key] = value;
    return keys;
}
inline Keys without(Keys keys, const std::string& key) {
    keys.erase(key);
    return keys;
}
inline Config config_of(const Keys& keys) { return parse_config(json_of(keys), "config.json"); }

// Numbers that the constructor counts without any weights.
inline uint64_t count_parameters(const Config& c) {
    Model counted;
    counted.config = c;
    Binder binder(nullptr, "", false);
    bind_model(binder, counted);
    return binder.parameters;
}

// -- small models -----------------------------------------------------------------------------------

// Awkward sizes on purpose: no dimension is a multiple of 16, and heads of kv_b_proj straddle scale blocks.
inline Keys tiny_deepseek(const std::string& type) {
    return {{"model_type", "\"" + type + "\""},
            {"hidden_size", "24"},
            {"vocab_size", "31"},
            {"num_hidden_layers", "3"},
            {"num_attention_heads", "3"},
            {"num_key_value_heads", "3"},
            {"intermediate_size", "37"},
            {"max_position_embeddings", "512"},
            {"rms_norm_eps", "1e-6"},
            {"rope_theta", "10000"},
            {"q_lora_rank", "20"},
            {"kv_lora_rank", "18"},
            {"qk_nope_head_dim", "50"},
            {"qk_rope_head_dim", "6"},
            {"v_head_dim", "7"},
            {"n_routed_experts", "8"},
            {"num_experts_per_tok", "3"},
            {"moe_intermediate_size", "9"},
            {"n_shared_experts", "1"},
            {"first_k_dense_replace", "1"},
            {"eos_token_id", "1"}};
}
inline Keys tiny_v3() {
    return with(tiny_deepseek("deepseek_v3"),
                {{"topk_method", "\"noaux_tc\""}, {"scoring_func", "\"sigmoid\""}, {"norm_topk_prob", "true"},
                 {"routed_scaling_factor", "2.5"}, {"n_group", "4"}, {"topk_group", "2"},
                 {"num_nextn_predict_layers", "1"}});
}
inline Keys tiny_v2_lite() {
    return with(tiny_deepseek("deepseek_v2"),
                {{"topk_method", "\"greedy\""}, {"scoring_func", "\"softmax\""}, {"norm_topk_prob", "false"},
                 {"routed_scaling_factor", "1.0"}, {"q_lora_rank", "null"}, {"n_shared_experts", "2"},
                 {"rope_scaling", R"({"type":"yarn","factor":4,"original_max_position_embeddings":16,)"
                                  R"("mscale":0.707,"mscale_all_dim":0.707})"}});
}
inline Keys tiny_fp8() {
    return with(tiny_v3(),
                {{"hidden_size", "136"},
                 {"kv_lora_rank", "132"},
                 {"q_lora_rank", "130"},
                 {"quantization_config", R"({"quant_method":"fp8","weight_block_size":[128,128]})"}});
}
inline Keys tiny_dense(const std::string& type) {
    return {{"model_type", "\"" + type + "\""}, {"hidden_size", "24"}, {"vocab_size", "31"},
            {"num_hidden_layers", "2"}, {"num_attention_heads", "6"}, {"num_key_value_heads", "2"},
            {"head_dim", "10"}, {"intermediate_size", "37"}, {"max_position_embeddings", "512"},
            {"rms_norm_eps", "1e-5"}, {"rope_theta", "10000"}, {"tie_word_embeddings", "false"}};
}

// Tensor names and shapes as the model cards list them, written out here and not taken from the Binder.
using Shapes = std::vector<std::pair<std::string, std::vector<uint64_t>>>;

inline uint64_t size_in(const Keys& keys, const std::string& key) {
    auto at = keys.find(key);
    return at == keys.end() || at->second == "null" ? 0 : std::stoull(at->second);
}

inline void list_mlp(Shapes& out, const std::string& p, uint64_t D, uint64_t width) {
    out.push_back({p + "gate_proj.weight", {width, D}});
    out.push_back({p + "up_proj.weight", {width, D}});
    out.push_back({p + "down_proj.weight", {D, width}});
}

inline void list_mla(Shapes& out, const Keys& k, const std::string& p) {
    auto n = [&](const char* key) { return size_in(k, key); };
    uint64_t D = n("hidden_size"), H = n("num_attention_heads"), rank = n("q_lora_rank");
    uint64_t Rkv = n("kv_lora_rank"), Dn = n("qk_nope_head_dim"), Dr = n("qk_rope_head_dim"),
             Dv = n("v_head_dim");
    if (rank) {
        out.push_back({p + "q_a_proj.weight", {rank, D}});
        out.push_back({p + "q_a_layernorm.weight", {rank}});
        out.push_back({p + "q_b_proj.weight", {H * (Dn + Dr), rank}});
    } else {
        out.push_back({p + "q_proj.weight", {H * (Dn + Dr), D}});
    }
    out.push_back({p + "kv_a_proj_with_mqa.weight", {Rkv + Dr, D}});
    out.push_back({p + "kv_a_layernorm.weight", {Rkv}});
    out.push_back({p + "kv_b_proj.weight", {H * (Dn + Dv), Rkv}});
    out.push_back({p + "o_proj.weight", {D, H * Dv}});
}

inline void list_gqa(Shapes& out, const Keys& k, const std::string& p) {
    auto n = [&](const char* key) { return size_in(k, key); };
    uint64_t D = n("hidden_size"), d = n("head_dim"), q = n("num_attention_heads") * d;
    uint64_t kv = n("num_key_value_heads") * d;
    for (auto [name, rows] : {std::pair{"q", q}, std::pair{"k", kv}, std::pair{"v", kv}}) {
        out.push_back({p + name + "_proj.weight", {rows, D}});
        if (k.at("model_type") == "\"qwen2\"") out.push_back({p + name + "_proj.bias", {rows}});
        bool normed = k.at("model_type") == "\"qwen3\"" && *name != 'v';
        if (normed) out.push_back({p + name + "_norm.weight", {d}});
    }
    out.push_back({p + "o_proj.weight", {D, q}});
}

inline void list_layer(Shapes& out, const Keys& k, uint64_t l) {
    auto n = [&](const char* key) { return size_in(k, key); };
    std::string p = "model.layers." + std::to_string(l) + ".";
    uint64_t D = n("hidden_size"), E = n("n_routed_experts"), F = n("moe_intermediate_size");
    out.push_back({p + "input_layernorm.weight", {D}});
    out.push_back({p + "post_attention_layernorm.weight", {D}});
    if (n("kv_lora_rank")) list_mla(out, k, p + "self_attn.");
    else list_gqa(out, k, p + "self_attn.");
    if (E == 0 || l < n("first_k_dense_replace")) return list_mlp(out, p + "mlp.", D, n("intermediate_size"));
    out.push_back({p + "mlp.gate.weight", {E, D}});
    if (k.at("topk_method") == "\"noaux_tc\"") out.push_back({p + "mlp.gate.e_score_correction_bias", {E}});
    for (uint64_t e = 0; e < E; e++) list_mlp(out, p + "mlp.experts." + std::to_string(e) + ".", D, F);
    if (n("n_shared_experts")) list_mlp(out, p + "mlp.shared_experts.", D, n("n_shared_experts") * F);
}

inline Shapes list_tensors(const Keys& k) {
    Shapes out;
    auto n = [&](const char* key) { return size_in(k, key); };
    uint64_t D = n("hidden_size"), V = n("vocab_size"), L = n("num_hidden_layers");
    out.push_back({"model.embed_tokens.weight", {V, D}});
    out.push_back({"model.norm.weight", {D}});
    bool tied = k.count("tie_word_embeddings") && k.at("tie_word_embeddings") == "true";
    if (!tied) out.push_back({"lm_head.weight", {V, D}});
    for (uint64_t l = 0; l < L + n("num_nextn_predict_layers"); l++) list_layer(out, k, l);
    if (n("num_nextn_predict_layers") == 0) return out;
    std::string p = "model.layers." + std::to_string(L) + ".";
    for (const char* name : {"enorm.weight", "hnorm.weight", "shared_head.norm.weight"})
        out.push_back({p + name, {D}});
    out.push_back({p + "eh_proj.weight", {D, 2 * D}});
    return out;
}

// -- files ------------------------------------------------------------------------------------------

struct FileTensor {
    std::string name, dtype;
    std::vector<uint64_t> shape;
    std::string data;
};

// The safetensors layout, written out here: u64 n, n bytes of JSON, data.
inline std::string safetensors_of(const std::vector<FileTensor>& tensors) {
    std::string header, data;
    for (const FileTensor& t : tensors) {
        std::string shape;
        for (uint64_t side : t.shape) shape += (shape.empty() ? "" : ",") + std::to_string(side);
        header += (header.empty() ? "{\"" : ",\"") + t.name + "\":{\"dtype\":\"" + t.dtype +
                  "\",\"shape\":[" + shape + "],\"data_offsets\":[" + std::to_string(data.size()) + "," +
                  std::to_string(data.size() + t.data.size()) + "]}";
        data += t.data;
    }
    header += "}";
    uint64_t n = header.size();
    return std::string(reinterpret_cast<const char*>(&n), 8) + header + data;
}

inline void append_bytes(std::string& out, const void* data, size_t bytes) {
    out.append(static_cast<const char*>(data), bytes);
}

// Random numbers of `dtype` around `centre`, at most `spread` away. F16 takes its exponents from a few small
// ones, F8_E4M3 any code but NaN: no rounding from another format is needed to make them.
inline std::string random_data(const std::string& dtype, uint64_t n, double centre, double spread,
                               Noise& noise) {
    std::string out;
    for (uint64_t i = 0; i < n; i++) {
        float v = float(centre + spread * noise.next());
        uint32_t bits = std::bit_cast<uint32_t>(v);
        uint16_t top = uint16_t(bits >> 16),
                 half = uint16_t((noise.rng.next() & 0x83FF) | (8u + i % 4) << 10);
        uint8_t byte = uint8_t(noise.below(127) + (noise.below(2) ? 128 : 0));
        if (dtype == "F32") append_bytes(out, &v, 4);
        else if (dtype == "BF16") append_bytes(out, &top, 2);
        else if (dtype == "F16") append_bytes(out, &half, 2);
        else append_bytes(out, &byte, 1);
    }
    return out;
}

// All tensors of a model: matrices in `dtype`, vectors in BF16, gate biases in F32. With F8_E4M3 the matrices
// that the released V3 keeps in BF16 stay so.
inline std::vector<FileTensor> random_tensors(const Keys& keys, const std::string& dtype, uint64_t seed) {
    Noise noise{{seed}};
    std::vector<FileTensor> out;
    for (auto& [name, shape] : list_tensors(keys)) {
        uint64_t n = 1;
        for (uint64_t side : shape) n *= side;
        bool bias = name.ends_with("bias"), vector = shape.size() == 1;
        bool kept = name.find("embed") != std::string::npos || name.find("head") != std::string::npos ||
                    name.find("mlp.gate.") != std::string::npos || name.find("eh_proj") != std::string::npos;
        std::string type = vector ? (bias ? "F32" : "BF16") : dtype == "F8_E4M3" && kept ? "BF16" : dtype;
        double spread = vector ? 0.25 : 2 / std::sqrt(double(shape.back()));
        out.push_back({name, type, shape, random_data(type, n, vector && !bias ? 1 : 0, spread, noise)});
        if (type != "F8_E4M3") continue;
        std::vector<uint64_t> blocks = {(shape[0] + 127) / 128, (shape[1] + 127) / 128};
        out.push_back({name + "_scale_inv", "F32", blocks,
                       random_data("F32", blocks[0] * blocks[1], spread / 200, spread / 400, noise)});
    }
    return out;
}

inline fs::path write_model(const std::string& name, const Keys& keys,
                            const std::vector<FileTensor>& tensors) {
    fs::path folder = scratch(name);
    write_text(folder / "config.json", json_of(keys));
    write_text(folder / "model.safetensors", safetensors_of(tensors));
    return folder;
}

inline Model random_model(const std::string& name, const Keys& keys, const std::string& dtype = "BF16",
                          uint64_t seed = 1) {
    return load_model(write_model(name, keys, random_tensors(keys, dtype, seed)));
}

// -- running ----------------------------------------------------------------------------------------

inline std::vector<int> random_ids(int n, int V, uint64_t seed = 1) {
    Noise noise{{seed}};
    std::vector<int> ids;
    for (int i = 0; i < n; i++) ids.push_back(noise.below(V));
    return ids;
}

// All that a prompt makes: logits (T, V), mtp_logits (T - 1, V) and, with `taps`, every intermediate.
struct Answer {
    Vector logits, mtp_logits;
    Taps taps;
};

inline Answer answer(const Model& model, const std::vector<int>& ids, SessionOptions options,
                     bool taps = false, const Device& device = CPU) {
    const Config& c = model.config;
    size_t V = size_t(c.V), T = ids.size();
    Answer out{Vector(T * V), Vector(c.n_mtp ? (T - 1) * V : 0), {}};
    Session s(model, options, device);
    if (taps) s.taps = &out.taps;
    s.tokens = ids;
    prefill(s, ids, 0, [&](int pos, int n) {
        s.device.head(s, out.logits.data() + size_t(pos) * V, s.a.h, n);
        if (!c.n_mtp) return;
        size_t begin = size_t(s.mtp_length);
        int rows = mtp_catch_up(s);
        s.device.head(s, out.mtp_logits.data() + begin * V, s.a.mtp_h, rows);
    });
    return out;
}
inline Answer answer(const Model& model, const std::vector<int>& ids) {
    return answer(model, ids, {int(ids.size()), int(ids.size()), MlaForm::ABSORBED});
}

// -- a model whose answer is known ------------------------------------------------------------------

// A Markov chain as a transformer. Embeddings are unit vectors, attention and feed-forward add nothing, and
// the final norm gives the unit vector back exactly (16 numbers, eps 0, weight 1/4), so the logits after
// token t are `table[t]`, to the bit. The MTP module predicts from a mixture of rows t and t + 1: a draft
// that is often wrong.
class Chain {
public:
    static constexpr int WIDTH = 16;
    Model model;

    explicit Chain(const std::vector<std::vector<float>>& table) {
        int V = int(table.size());
        Config& c = model.config;
        c.D = WIDTH, c.V = V, c.n_layers = 1, c.n_mtp = 1, c.ffn_width = 1, c.max_context = 1024;
        c.H = 1, c.G = 1, c.head_dim = 2, c.eps = 0;
        model.rope = make_rope(c.rope, c.head_dim);
        model.embed = matrix(V, WIDTH, [](int r, int col) { return float(r == col); });
        model.head = matrix(V, WIDTH,
                            [&](int r, int col) { return col < V ? table[size_t(col)][size_t(r)] : 0; });
        model.norm = vector(real(0.25));
        model.layers.push_back(idle_layer());
        Mtp mtp{vector(1), vector(1), vector(real(0.25)), {}, idle_layer()};
        mtp.proj = matrix(WIDTH, 2 * WIDTH, [&](int r, int col) {
            return r == col ? 0.8f : col < V && r == (col + 1) % V ? 0.6f : 0.0f;
        });
        model.mtp.push_back(mtp);
    }

private:
    std::deque<std::vector<float>> store_;

    template <class Value> Matrix matrix(int rows, int cols, const Value& value) {
        std::vector<float>& data = store_.emplace_back();
        for (int i = 0; i < rows * cols; i++) data.push_back(value(i / cols, i % cols));
        return {reinterpret_cast<const std::byte*>(data.data()), nullptr, Dtype::F32, rows, cols, 0, 0};
    }
    std::span<const real> vector(real value) { return model.vectors.emplace_back(WIDTH, value); }
    Layer idle_layer() {
        auto zeros = [&](int rows, int cols) { return matrix(rows, cols, [](int, int) { return 0.0f; }); };
        Layer w;
        w.attn_norm = w.ffn_norm = vector(1);
        w.gqa = {zeros(2, WIDTH), zeros(2, WIDTH), zeros(2, WIDTH), zeros(WIDTH, 2), {}, {}, {}};
        w.mlp = {zeros(1, WIDTH), zeros(1, WIDTH), zeros(WIDTH, 1)};
        return w;
    }
};

// Row t sends to token (t + step) % V with certainty under greedy decoding.
inline std::vector<std::vector<float>> ring(int V, int step) {
    size_t n = size_t(V);
    std::vector<std::vector<float>> table(n, std::vector<float>(n));
    for (size_t t = 0; t < n; t++) table[t][(t + size_t(step)) % n] = 5;
    return table;
}

// -- counting ---------------------------------------------------------------------------------------

inline std::vector<long double> probabilities(const real* logits, int V, long double temperature = 1) {
    std::vector<long double> p;
    long double top = *std::max_element(logits, logits + V), sum = 0;
    for (int i = 0; i < V; i++) p.push_back(std::exp((logits[i] - top) / temperature)), sum += p.back();
    for (long double& x : p) x /= sum;
    return p;
}

// Pearson's statistic of `counts` against `p`, as a multiple of the value that chance exceeds once in a
// million: for k degrees of freedom P(X >= k + 2 sqrt(k t) + 2 t) <= e^-t (Laurent, Massart 2000, lemma 1), t
// = ln 1e6. Cells of fewer than 20 expected counts are thrown together. Above 1: not this distribution.
inline double surprise(const std::vector<int64_t>& counts, const std::vector<long double>& p) {
    double n = double(std::accumulate(counts.begin(), counts.end(), int64_t(0)));
    double statistic = 0, small_count = 0, small_expected = 0;
    int cells = 0;
    auto add = [&](double count, double expected) {
        if (expected == 0) {
            if (count > 0) statistic = std::numeric_limits<double>::infinity();   // the impossible happened
            return;
        }
        statistic += (count - expected) * (count - expected) / expected, cells++;
    };
    for (size_t i = 0; i < counts.size(); i++) {
        double count = double(counts[i]), expected = n * double(p[i]);
        if (expected >= 20 || expected == 0) add(count, expected);
        else small_count += count, small_expected += expected;
    }
    add(small_count, small_expected);
    double k = cells - 1, t = std::log(1e6);
    return statistic / (k + 2 * std::sqrt(k * t) + 2 * t);
}
