// The golden tests: each step of each tiny model against a float64 reference that shares no code with ours
// (tests/golden/reference.py, itself compared with the published programs: tests/golden/README.md).
//
//   F="-std=c++20 -O2 -ffp-contract=off -fopenmp -pthread -Wall -Wextra -DDEEPSEEK_NO_MAIN -I."
//   L="-lgtest -lgtest_main -lsimdjson -lpcre2-8 -lutf8proc"
//   g++ $F -DDEEPSEEK_REAL=double tests/golden/golden.cpp -o build/golden-double $L && build/golden-double
//   g++ $F tests/golden/golden.cpp -o build/golden $L && build/golden       (or build/tests: tests/tests.cpp)
//
// Two programs from this one text, both run from the root of the repository. The double build shows that the
// formulas are right, to the last digit that the golden files hold, and leaves its results in
// build/golden-yardstick. The float build takes them as the yardstick of what rounding may do to it. (It runs
// build/golden-double by itself when they are missing or older than that program. GOLDEN_DIR names another
// folder than build.)
//
// How far may a result be from the golden value?
//
//   u       2^-24: the relative error of one rounding to F32 (half a unit in the last place)
//   g       the golden value as stored: a float64 result rounded to F32, so at most u |g| from it
//   R       float32_error in the golden file: the largest error that the reference's own lines make in this
//           tensor when they run in float32
//
//   double  |ours - g| <= u |g| + u R.  The first term is the storage. The second is the arithmetic: R comes
//           from roundings of size u; the same roundings in double have size 2^-53 = 2^-29 u, so both
//           programs are expected within 2^-29 R of the exact result. u R = 2^-24 R gives each of the two
//           2^4 times that, since their sums run in different orders and other roundings meet.
//   float   |ours - g| <= 3 E + u |g| + u R,  E = max |float build - double build| over the row (so also with
//           E over the tensor, which is larger). Were the double build exact, E would be the whole error; 3
//           is the factor that we promise, not one that is needed.
//           E <= 4 R.  Without this, a coarse mistake of the float build alone would stretch its own
//           tolerance. Both sides are the largest of many errors that the same formulas make with roundings
//           of the same size in another order of summation, so they differ by a small factor; 2.1 is the
//           largest seen, and a mistake that matters is larger by orders of magnitude.
//   forms   mla_naive and mla_absorbed are both within the above of the same numbers, so they differ by at
//           most the sum of both limits: 2 u R in double, 2 * 4 R in float.
//   kv      A cache in bf16 rounds what it keeps once more, by 2^-8 of it at most: 2^16 u. R shows what
//           roundings of size u do, of these numbers and of all others; as long as errors are small they grow
//           with the roundings, so with --kv bf16 a tensor moves by less than 2^16 R. Seen: up to 0.21 of it.
//           (No row of these models has a multiple of 32 numbers: --kv q8_0 is left to the unit tests.)
//   ids     expert_idx: equal. The prompts are chosen so that no choice is nearer than 2e-4 to another one,
//           some 100 times R of the router's scores.
#include <gtest/gtest.h>

#ifndef TESTS_TOGETHER                // tests/tests.cpp has it already
#ifndef DEEPSEEK_NO_MAIN
#define DEEPSEEK_NO_MAIN
#endif
#include "deepseek.cpp"
#endif

namespace golden {

constexpr bool IN_DOUBLE = sizeof(real) == 8;
constexpr double U = 0x1p-24, PROMISED = 3, SAME_SIZE = 4, KV_BF16 = 0x1p16;

const std::vector<std::string> WITH_MLA = {
    "v2-lite", "v2-groups", "v2-noyarn", "v2-ties", "v3-bf16",     "v3-mtp", "v3-f16",
    "v3-ties", "v3-fp8",    "v3-long",   "v3-ue8m0", "v3-negative", "tiny"};
const std::vector<std::string> WITH_GQA = {"qwen2",       "qwen2-tied", "qwen2-f32",  "qwen3",
                                           "qwen3-plain", "llama3",     "llama3-long"};

std::vector<std::string> all_names() {
    std::vector<std::string> names = WITH_MLA;
    names.insert(names.end(), WITH_GQA.begin(), WITH_GQA.end());
    return names;
}

fs::path build_folder() {
    const char* folder = std::getenv("GOLDEN_DIR");
    return folder ? folder : "build";
}
fs::path model_folder(const std::string& name) {
    return name == "tiny" ? fs::path("weights/tiny") : fs::path("tests/golden/models") / name;
}
fs::path golden_file(const std::string& name) {
    return (name == "tiny" ? fs::path("tests/golden/tiny") : model_folder(name)) / "taps.safetensors";
}

// -- tensors ------------------------------------------------------------------------------------------------

// A named result. One of the two vectors is filled.
struct Values {
    std::string name;
    std::vector<size_t> shape;
    std::vector<double> reals;
    std::vector<int32_t> integers;

    size_t rows() const { return shape[0]; }
    size_t size() const { return reals.size() + integers.size(); }
    size_t row_size() const { return rows() ? size() / rows() : 0; }
    std::string coordinate(size_t i) const {
        std::string text;
        for (size_t axis = shape.size(); axis-- > 0; i /= shape[axis])
            text = std::to_string(i % shape[axis]) + (text.empty() ? "" : ", ") + text;
        return "(" + text + ")";
    }
};
using Results = std::vector<Values>;                 // in network order

const Values* find(const Results& results, const std::string& name) {
    for (const Values& v : results) if (v.name == name) return &v;
    return nullptr;
}

// Those rows of `v` whose positions are in `rows`; all when there are none.
Values select(const Values& v, const std::vector<int>& rows) {
    if (rows.empty()) return v;
    Values out{v.name, v.shape, {}, {}};
    out.shape[0] = 0;
    for (size_t r : rows) {
        if (r >= v.rows()) continue;                 // the MTP tensors have no last position
        size_t begin = r * v.row_size(), end = begin + v.row_size();
        for (size_t i = begin; i < end && !v.reals.empty(); i++) out.reals.push_back(v.reals[i]);
        for (size_t i = begin; i < end && !v.integers.empty(); i++) out.integers.push_back(v.integers[i]);
        out.shape[0]++;
    }
    return out;
}

Results read_results(const fs::path& path) {
    Mapping mapping(path);
    TensorFile file = parse_safetensors({mapping.data(), mapping.size()}, path.string());
    Results out;
    for (const TensorInfo& t : file.tensors) {
        Values v{t.name, {t.shape.begin(), t.shape.end()}, {}, {}};
        const std::byte *data = mapping.data() + file.data_begin, *p = data + t.begin;
        for (; p < data + t.end; p += t.dtype == "F64" ? 8 : 4) {
            if (t.dtype == "F64") v.reals.push_back(load<double>(p));
            else if (t.dtype == "F32") v.reals.push_back(double(load<float>(p)));
            else if (t.dtype == "I32") v.integers.push_back(load<int32_t>(p));
            else fail("%s: dtype %s", path.c_str(), t.dtype.c_str());
        }
        out.push_back(v);
    }
    return out;
}

// Not through write_safetensors of deepseek.cpp alone: what is written is read back by the other program.
void write_results(const fs::path& path, const Results& results) {
    std::vector<OutputTensor> out;
    for (const Values& v : results) {
        if (v.integers.empty()) out.push_back({v.name, "F64", v.shape, v.reals.data(), v.reals.size() * 8});
        else out.push_back({v.name, "I32", v.shape, v.integers.data(), v.integers.size() * 4});
    }
    fs::create_directories(path.parent_path());
    AtomicFile file(path.string(), true);
    write_safetensors(file, out);
}

struct Golden {
    std::vector<int> ids, rows;                      // prompt; positions that are stored, none: all
    Results results;
    std::map<std::string, double> float32_error;     // R
    std::set<std::string> without;                   // taps that the file does not store, of any layer
};

// What the header says about the results.
void read_metadata(Golden& golden, const fs::path& path) {
    std::string file = read_file(path);
    Document header(std::string_view(file).substr(8, load<uint64_t>(file.data())), path.string());
    Fields metadata(Fields(header.root, path.string()).get("__metadata__"), "__metadata__");
    Document errors(metadata.text("float32_error"), path.string());
    Fields fields(errors.root, "float32_error");
    for (auto& [name, value] : fields.all()) golden.float32_error[name] = fields.number(name.c_str(), 0, 1);
    std::istringstream names(metadata.text("without", ""));
    for (std::string name; names >> name;) golden.without.insert(name);
}

// The last part of a tensor's name.
std::string tap_of(const Values& v) { return v.name.substr(v.name.rfind('.') + 1); }

void leave_out(Results& results, const std::set<std::string>& taps) {
    std::erase_if(results, [&](const Values& v) { return taps.count(tap_of(v)) > 0; });
}

Golden read_golden(const std::string& name) {
    Golden golden;
    read_metadata(golden, golden_file(name));
    for (const Values& v : read_results(golden_file(name))) {
        if (v.name == "ids") golden.ids = v.integers;
        else if (v.name == "rows") golden.rows = v.integers;
        else golden.results.push_back(v);
    }
    return golden;
}

// -- running a model ----------------------------------------------------------------------------------------

const char* form_name(MlaForm form) { return form == MlaForm::NAIVE ? "naive" : "absorbed"; }

// The ways to compute the same numbers.
struct Way {
    int threads = 1, chunk = 0;                      // chunk 0: the whole prompt at once
    bool decode = false;                             // the second half token by token
    MlaForm form = MlaForm::ABSORBED;
    Kernels with = {};
    Dtype kv = REAL;                                 // how the cache is stored

    std::string text() const {
        std::string cut = decode ? "decoded" : chunk ? text_of("chunks of %d", chunk) : "one chunk";
        return text_of("%s, %s, %d threads, %s", with.name, form_name(form), threads, cut.c_str());
    }
};

// Every tap, `logits` (T, V) and, where there is an MTP module, `mtp_logits` (T - 1, V).
Taps run(const Model& model, const std::vector<int>& ids, const Way& way) {
    int T = int(ids.size()), V = model.config.V;
    set_threads(way.threads);
    kernels = way.with;
    Session s(model, {T, way.chunk ? way.chunk : T, way.form, way.kv});
    Taps taps;
    s.taps = &taps;
    s.tokens = ids;
    Vector logits(size_t(T) * size_t(V));
    auto after = [&](int, int n) {
        s.device.head(s, logits.data(), s.a.h, n);
        taps.add("logits", logits.data(), n, {V});
        int rows = model.config.n_mtp ? mtp_catch_up(s) : 0;
        if (rows == 0) return;
        s.device.head(s, logits.data(), s.a.mtp_h, rows);
        taps.add("mtp_logits", logits.data(), rows, {V});
    };
    int together = way.decode ? T / 2 : T;
    prefill(s, std::span(ids).first(size_t(together)), 0, after);
    for (int i = together; i < T; i++) prefill(s, std::span(ids).subspan(size_t(i), 1), i, after);
    return taps;
}

Results results_of(const Taps& taps, const std::vector<int>& rows) {
    Results out;
    for (const Taps::Entry& t : taps.entries) {
        Values v{t.name, t.inner, {t.values.begin(), t.values.end()}, t.integers};
        size_t row = 1;
        for (size_t n : t.inner) row *= n;
        v.shape.insert(v.shape.begin(), v.size() / row);
        out.push_back(select(v, rows));
    }
    return out;
}

// -- comparing ----------------------------------------------------------------------------------------------

// How two vectors differ, in the measures that people use.
struct Metrics {
    double max_abs = 0, squares = 0, squares_ours = 0, squares_golden = 0, products = 0;

    void add(double ours, double golden) {
        double d = ours == golden ? 0 : ours - golden;          // -inf is no further from itself
        max_abs = std::isnan(d) ? d : std::max(max_abs, std::abs(d));
        squares += d * d, products += ours * golden;
        squares_ours += ours * ours, squares_golden += golden * golden;
    }
    std::string text() const {
        return text_of("max abs %.3g, NMSE %.3g, calc_diff %.3g", max_abs, squares / squares_golden,
                       1 - 2 * products / (squares_ours + squares_golden));
    }
};

Metrics metrics(const Values& ours, const Values& golden, size_t begin, size_t end) {
    Metrics m;
    for (size_t i = begin; i < end; i++) m.add(ours.reals[i], golden.reals[i]);
    return m;
}

size_t top_1(const Values& v, size_t row) {
    auto begin = v.reals.begin() + std::ptrdiff_t(row * v.row_size());
    return size_t(std::max_element(begin, begin + std::ptrdiff_t(v.row_size())) - begin);
}

// The largest allowed |ours - golden| of element i.
using Limit = std::function<double(size_t i)>;

double value(const Values& v, size_t i) { return v.reals.empty() ? v.integers[i] : v.reals[i]; }

// The metrics of the row with the worst number, and of all.
std::string metrics_text(const Values& ours, const Values& golden, size_t row) {
    size_t n = golden.row_size(), agree = 0;
    for (size_t r = 0; r < golden.rows(); r++) agree += top_1(ours, r) == top_1(golden, r);
    return text_of("\n    row %zu: %s\n    all: %s, top-1 equal in %zu of %zu rows", row,
                   metrics(ours, golden, row * n, row * n + n).text().c_str(),
                   metrics(ours, golden, 0, golden.size()).text().c_str(), agree, golden.rows());
}

// Empty, or how `ours` is too far from `golden`.
std::string difference(const Values& ours, const Values& golden, const Limit& limit) {
    if (ours.shape != golden.shape || ours.reals.size() != golden.reals.size())
        return text_of("%zu rows of %zu numbers, golden has %zu rows of %zu", ours.rows(), ours.row_size(),
                       golden.rows(), golden.row_size());
    auto excess = [&](size_t i) {
        double a = value(ours, i), b = value(golden, i), e = a == b ? 0 : std::abs(a - b) - limit(i);
        return std::isnan(e) ? std::numeric_limits<double>::infinity() : e;
    };
    size_t wrong = 0, worst = 0;
    std::set<size_t> rows;
    for (size_t i = 0; i < golden.size(); i++) {
        if (excess(i) <= 0) continue;
        if (wrong++ == 0 || excess(i) > excess(worst)) worst = i;
        rows.insert(i / golden.row_size());
    }
    if (wrong == 0) return "";
    std::string text = text_of("%zu of %zu numbers, %zu of %zu rows (the first: %zu) beyond the limit", wrong,
                               golden.size(), rows.size(), golden.rows(), *rows.begin());
    text += text_of("; the worst at %s: ours %.9g, golden %.9g, limit %.3g", golden.coordinate(worst).c_str(),
                    value(ours, worst), value(golden, worst), limit(worst));
    return golden.reals.empty() ? text : text + metrics_text(ours, golden, worst / golden.row_size());
}

// Compares all tensors, in network order. `limit_of` makes a tensor's limit from ours and the golden one.
std::string differences(const std::string& name, const Results& ours, const Results& golden,
                        const std::function<Limit(const Values& ours, const Values& golden)>& limit_of) {
    std::string first, others;
    for (const Values& want : golden) {
        const Values* got = find(ours, want.name);
        std::string text = got ? difference(*got, want, limit_of(*got, want)) : "missing";
        if (text.empty()) continue;
        if (first.empty()) first = "first difference: " + name + " " + want.name + "\n    " + text;
        else others += " " + want.name;
    }
    for (const Values& got : ours) {
        if (!find(golden, got.name)) first += "\n" + got.name + ": not in the golden file";
    }
    return first + (others.empty() ? "" : "\nthen also:" + others);
}

double largest_difference(const Values& a, const Values& b, size_t begin, size_t end) {
    return a.reals.empty() || a.shape != b.shape ? 0 : metrics(a, b, begin, end).max_abs;
}

// -- the rules ----------------------------------------------------------------------------------------------

fs::path yardstick_file(const std::string& name, MlaForm form) {
    return build_folder() / "golden-yardstick" / (name + "." + form_name(form) + ".safetensors");
}

bool is_fresh(const fs::path& yardstick, const std::string& name) {
    if (!fs::exists(yardstick)) return false;
    fs::path program = build_folder() / "golden-double";
    auto made = fs::last_write_time(yardstick);
    return made >= fs::last_write_time(golden_file(name)) &&
           (!fs::exists(program) || made >= fs::last_write_time(program));
}

// Once, with the other program.
void make_yardsticks() {
    static bool tried = false;
    if (std::exchange(tried, true)) return;
    std::string command = (build_folder() / "golden-double").string() + " --gtest_filter=*MatchesGolden*";
    std::string log = (build_folder() / "golden-double.log").string();
    if (std::system((command + " >" + log + " 2>&1").c_str()) == 0) return;
    std::fprintf(stderr, "%s failed or does not exist (tests/golden/golden.cpp says how to build it): %s\n",
                 command.c_str(), log.c_str());
}

double error_of(const Golden& golden, const Values& v) {
    auto at = golden.float32_error.find(v.name);
    return at == golden.float32_error.end() ? 0 : at->second;
}

void check_double(const std::string& name, const Golden& golden, const Results& ours, MlaForm form) {
    write_results(yardstick_file(name, form), ours);
    std::string text = differences(name, ours, golden.results, [&](const Values&, const Values& g) -> Limit {
        double R = error_of(golden, g);
        return [R, &g](size_t i) { return g.reals.empty() ? 0 : U * std::abs(g.reals[i]) + U * R; };
    });
    EXPECT_TRUE(text.empty()) << form_name(form) << ", double build against golden\n" << text;
}

void check_float(const std::string& name, const Golden& golden, const Results& ours, MlaForm form) {
    fs::path file = yardstick_file(name, form);
    if (!is_fresh(file, name)) make_yardsticks();
    Results yardstick = read_results(file);
    auto limit_of = [&](const Values& v, const Values& g) -> Limit {
        const Values* d = find(yardstick, g.name);
        double R = error_of(golden, g);
        size_t n = g.row_size();
        std::vector<double> E(g.rows());                 // by row
        for (size_t r = 0; d && r < g.rows(); r++) E[r] = largest_difference(v, *d, r * n, r * n + n);
        return [&g, E, R, n](size_t i) {
            return g.reals.empty() ? 0 : PROMISED * E[i / n] + U * std::abs(g.reals[i]) + U * R;
        };
    };
    std::string text = differences(name, ours, golden.results, limit_of);
    EXPECT_TRUE(text.empty()) << form_name(form) << ", float build against golden\n" << text;
    text = differences(name, ours, yardstick, [&](const Values&, const Values& d) -> Limit {
        double R = error_of(golden, d);
        return [R](size_t) { return SAME_SIZE * R; };
    });
    EXPECT_TRUE(text.empty()) << form_name(form) << ", float build against double build\n" << text;
}

// One line a model: the errors of the logits that the rules above speak of.
void report(const std::string& name, const Golden& golden, const Results& ours, MlaForm form) {
    const Values &g = *find(golden.results, "logits"), &v = *find(ours, "logits");
    std::printf("%-12s %-8s logits: |%s - golden| %.2e", name.c_str(), form_name(form),
                IN_DOUBLE ? "double" : "float", metrics(v, g, 0, g.size()).max_abs);
    if (!IN_DOUBLE) {
        Results yardstick = read_results(yardstick_file(name, form));
        double ratio = 0;
        for (const Values& d : yardstick) {
            double R = error_of(golden, d), E = largest_difference(*find(ours, d.name), d, 0, d.size());
            if (R > 0) ratio = std::max(ratio, E / R);
        }
        std::printf(", |float - double| %.2e; all tensors: E / R up to %.2f",
                    metrics(v, *find(yardstick, "logits"), 0, v.size()).max_abs, ratio);
    }
    std::putchar('\n');
}

class OfModel : public testing::TestWithParam<std::string> {
protected:
    std::string name = GetParam();
    Golden golden = read_golden(name);
    Model model = load_model(model_folder(name));

    std::vector<MlaForm> forms() const {
        if (!model.config.mla()) return {MlaForm::ABSORBED};
        return {MlaForm::ABSORBED, MlaForm::NAIVE};
    }
    Results results(MlaForm form) const {
        Way way;
        way.form = form;
        Results all = results_of(run(model, golden.ids, way), golden.rows);
        leave_out(all, golden.without);
        return all;
    }
    // What a form computes: the naive one has no use for what stands between query and latent cache.
    Golden golden_of(MlaForm form) const {
        Golden part = golden;
        if (form == MlaForm::NAIVE) leave_out(part.results, {"q_absorbed", "z"});
        return part;
    }
};

class OfMlaModel : public OfModel {};

std::string test_name(const testing::TestParamInfo<std::string>& info) {
    std::string name = info.param;
    std::replace(name.begin(), name.end(), '-', '_');
    return name;
}
INSTANTIATE_TEST_SUITE_P(Golden, OfModel, testing::ValuesIn(all_names()), test_name);
INSTANTIATE_TEST_SUITE_P(Golden, OfMlaModel, testing::ValuesIn(WITH_MLA), test_name);

TEST_P(OfModel, MatchesGolden) {
    for (MlaForm form : forms()) {
        Results ours = results(form);
        (IN_DOUBLE ? check_double : check_float)(name, golden_of(form), ours, form);
        report(name, golden, ours, form);
    }
}

TEST_P(OfMlaModel, NaiveAndAbsorbedAgree) {
    auto limit_of = [&](const Values&, const Values& v) -> Limit {
        double R = error_of(golden, v);
        return [R](size_t) { return 2 * (IN_DOUBLE ? U : SAME_SIZE) * R; };
    };
    Results naive = results(MlaForm::NAIVE), absorbed = results(MlaForm::ABSORBED);
    leave_out(absorbed, {"q_absorbed", "z"});
    std::string text = differences(name, naive, absorbed, limit_of);
    EXPECT_TRUE(text.empty()) << "naive against absorbed\n" << text;
}

// -- a cache in fewer bits ----------------------------------------------------------------------------------

// The first row with other expert ids, in any layer; from there on two runs are two different sums.
size_t first_other_choice(const Results& a, const Results& b) {
    size_t end = a.front().rows();
    for (const Values& v : a) {
        const Values& w = *find(b, v.name);
        for (size_t i = 0; i < v.integers.size(); i++)
            if (v.integers[i] != w.integers[i]) end = std::min(end, i / v.row_size());
    }
    return end;
}

Values first_rows(const Values& v, size_t n) {
    std::vector<int> rows;
    for (size_t r = 0; r < n; r++) rows.push_back(int(r));
    return select(v, rows);
}

std::vector<std::string> before_the_cache(const Config& c) {
    if (!c.mla()) return {"embed", "layers.0.attn_norm"};
    return {"embed", "layers.0.attn_norm", "layers.0.q_nope", "layers.0.q_rope"};
}

// With --kv bf16: nothing changes before the cache is read; what MLA keeps of a token is rounded once, to
// bf16; and the rest is within the limit that the head of this file derives.
TEST_P(OfModel, ACacheInBf16IsWithinItsRounding) {
    Way exact, rounded;
    rounded.kv = Dtype::BF16;
    Results a = results_of(run(model, golden.ids, exact), {});
    Results b = results_of(run(model, golden.ids, rounded), {});
    for (const std::string& tap : before_the_cache(model.config))
        EXPECT_EQ(find(a, tap)->reals, find(b, tap)->reals) << tap;
    for (const char* tap : {"layers.0.c_kv", "layers.0.k_rope"}) {
        if (!model.config.mla()) continue;
        Values kept = *find(a, tap);
        for (double& x : kept.reals) x = bf16_to_float(float_to_bf16(float(x)));
        EXPECT_EQ(kept.reals, find(b, tap)->reals) << tap;
    }
    size_t rows = first_other_choice(a, b);
    EXPECT_GE(rows, 2u);                             // or nothing is compared
    double most = 0;
    for (const Values& v : a) {
        double R = error_of(golden, v);
        if (v.reals.empty() || R == 0) continue;
        Values x = first_rows(v, std::min(rows, v.rows())), y = first_rows(*find(b, v.name), x.rows());
        double D = largest_difference(x, y, 0, x.size());
        EXPECT_LE(D, KV_BF16 * R) << v.name;
        most = std::max(most, D / R);
    }
    EXPECT_GT(most, KV_BF16 / 100);                  // the cache was one of bf16
    std::printf("%-12s %zu of %zu rows: |kv bf16 - kv f32| up to %.3f of the limit\n", name.c_str(), rows,
                golden.ids.size(), most / KV_BF16);
}

// -- one answer ---------------------------------------------------------------------------------------------

// Empty, or where the bits of two runs differ first.
std::string bit_difference(const Taps& a, const Taps& b) {
    if (a.entries.size() != b.entries.size()) return "another number of taps";
    for (const Taps::Entry& x : a.entries) {
        auto at = b.index.find(x.name);
        if (at == b.index.end()) return x.name + ": missing";
        const Taps::Entry& y = b.entries[at->second];
        size_t n = x.values.size(), row = 1;
        for (size_t side : x.inner) row *= side;
        if (n != y.values.size() || x.integers.size() != y.integers.size()) return x.name + ": another size";
        if (x.integers != y.integers) return x.name + ": other integers";
        if (n == 0 || std::memcmp(x.values.data(), y.values.data(), n * sizeof(real)) == 0) continue;
        for (size_t i = 0; i < n; i++) {
            if (std::memcmp(&x.values[i], &y.values[i], sizeof(real)) == 0) continue;
            return text_of("%s: row %zu, number %zu: %.9g against %.9g", x.name.c_str(), i / row, i % row,
                           double(x.values[i]), double(y.values[i]));
        }
    }
    return "";
}

// Threads, chunks, decoding and kernels, each against one plain pass on one thread.
std::vector<Way> other_ways(MlaForm form) {
    std::vector<Way> ways;
    for (const Kernels& k : available_kernels()) {
        ways.push_back({1, 0, false, form, k});
        ways.push_back({3, 0, false, form, k});
        ways.push_back({2, 1, false, form, k});
        ways.push_back({8, 3, false, form, k});
        ways.push_back({1, 7, false, form, k});
        ways.push_back({8, 64, false, form, k});
        ways.push_back({3, 0, true, form, k});
    }
    return ways;
}

constexpr size_t ENOUGH = 70;                       // tokens: one full chunk of 64 and a part of another

TEST_P(OfModel, HasTheSameBitsInEveryWay) {
    std::vector<int> ids = golden.ids;
    ids.resize(std::min(ids.size(), ENOUGH));
    for (MlaForm form : forms()) {
        Way plain;
        plain.form = form;
        Taps expected = run(model, ids, plain);
        for (const Way& way : other_ways(form)) {
            std::string text = bit_difference(expected, run(model, ids, way));
            EXPECT_TRUE(text.empty()) << "first difference: " << name << " " << text << "\n" << way.text();
        }
    }
}

// -- text ---------------------------------------------------------------------------------------------------

// tests/golden/text/samples.jsonl: questions and the greedy answers of the float64 reference.
struct Sample {
    std::string question, text;
};

std::vector<std::string> lines_of(const fs::path& path) {
    std::vector<std::string> lines;
    std::istringstream in(read_file(path));
    for (std::string line; std::getline(in, line);) lines.push_back(line);
    return lines;
}

std::vector<Sample> read_samples() {
    std::vector<Sample> out;
    for (const std::string& line : lines_of("tests/golden/text/samples.jsonl")) {
        Document document(line, "samples.jsonl");
        Fields fields(document.root, "samples.jsonl");
        out.push_back({fields.text("question"), fields.text("text")});
    }
    return out;
}

class GoldenText : public testing::Test {
protected:
    Model model = load_model("weights/tiny");
    Tokenizer tokenizer = Tokenizer::load("weights/tiny");
    Statistics total;

    // The greedy answer, special tokens left out.
    std::string answer(const std::string& question, bool mtp) {
        kernels = available_kernels().back();
        set_threads(processors());
        Session session(model, {model.config.max_context, 128, MlaForm::ABSORBED});
        std::vector<int> prompt = tokenizer.encode(tokenizer.render({{"user", question}}, true)), ids;
        Generation g;
        g.sampling.temperature = 0;
        g.stops = {tokenizer.eos};
        g.drafting = mtp ? &MTP_DRAFTS : nullptr;
        auto said = [&](int id) { return ids.push_back(id), true; };
        Statistics stats = generate(session, prompt, g, [](int) {}, said);
        total.drafted += stats.drafted, total.accepted += stats.accepted;
        std::erase_if(ids, [&](int id) { return tokenizer.is_special(id); });
        return tokenizer.decode(ids);
    }
};

TEST_F(GoldenText, SaysWhatTheReferenceSays) {
    std::vector<Sample> samples = read_samples();
    ASSERT_GE(samples.size(), 24u);
    for (const Sample& s : samples) EXPECT_EQ(answer(s.question, false), s.text) << s.question;
}

#ifdef DEEPSEEK_FLOAT
TEST_F(GoldenText, SaysTheSameWithDrafts) {
    for (const Sample& s : read_samples()) EXPECT_EQ(answer(s.question, true), s.text) << s.question;
    EXPECT_GT(total.drafted, 0);
    EXPECT_GT(total.accepted, total.drafted / 2) << "of " << total.drafted;   // or little was tested
}
#endif

// tests/golden/text/ids.jsonl: ids that the Rust library `tokenizers` makes, prompts that Jinja renders.
TEST(GoldenTokens, AreThoseOfTheLibrary) {
    std::map<std::string, Tokenizer> tokenizers;
    int texts = 0, chats = 0;
    for (const std::string& line : lines_of("tests/golden/text/ids.jsonl")) {
        Document document(line, "ids.jsonl");
        Fields fields(document.root, "ids.jsonl");
        std::string folder = fields.text("tokenizer"), text;
        if (!tokenizers.count(folder)) tokenizers[folder] = Tokenizer::load(folder);
        const Tokenizer& t = tokenizers[folder];
        if (fields.has("messages")) {
            text = t.render(parse_messages(simdjson::minify(fields.get("messages"))), true);
            EXPECT_EQ(text, fields.text("prompt")) << "first difference: tokens chat\n" << line;
            chats++;
        } else {
            text = fields.text("text"), texts++;
        }
        std::vector<int> ids = t.encode(text);
        EXPECT_EQ(ids, parse_ids(fields, "ids", t.vocab_size())) << "first difference: tokens ids\n" << line;
        EXPECT_EQ(t.decode(ids), text) << "first difference: tokens decode\n" << line;
    }
    EXPECT_GT(texts, 20);
    EXPECT_GT(chats, 4);
}

#include "fp8.cpp"

// -- the tests themselves -----------------------------------------------------------------------------------

TEST(GoldenChecker, EveryFolderIsInTheList) {
    std::set<std::string> folders = {"tiny"};
    for (auto& entry : fs::directory_iterator("tests/golden/models"))
        folders.insert(entry.path().filename().string());
    std::vector<std::string> names = all_names();
    EXPECT_EQ(folders, std::set<std::string>(names.begin(), names.end()));
}

// A single wrong number anywhere is seen and named, and so is a row of zeros among many, which a global
// calc_diff below 1e-3 lets pass.
TEST(GoldenChecker, SeesOneWrongNumberAndOneEmptyRow) {
    Rng rng{1};
    Values golden{"x", {1000, 3, 2}, {}, {}};
    for (int i = 0; i < 6000; i++) golden.reals.push_back(rng.uniform() - 0.5);
    auto limit = [](size_t) { return 1e-6; };
    EXPECT_EQ(difference(golden, golden, limit), "");
    Values ours = golden;
    ours.reals[4321] += 2e-6;
    std::string text = difference(ours, golden, limit);
    EXPECT_NE(text.find("1 of 6000 numbers, 1 of 1000 rows (the first: 720)"), std::string::npos) << text;
    EXPECT_NE(text.find("the worst at (720, 0, 1): "), std::string::npos) << text;
    ours = golden;
    std::fill_n(ours.reals.begin() + 600, 6, 0.0);
    EXPECT_NE(difference(ours, golden, limit).find("1 of 1000 rows"), std::string::npos);
    Metrics m = metrics(ours, golden, 0, 6000);
    EXPECT_LT(1 - 2 * m.products / (m.squares_ours + m.squares_golden), 1e-3);
    ours = golden;
    ours.reals[7] = std::numeric_limits<double>::quiet_NaN();
    EXPECT_NE(difference(ours, golden, limit), "");
    Values integers{"i", {2, 2}, {}, {1, 2, 3, 4}}, other = integers;
    other.integers[3] = 5;
    text = difference(other, integers, [](size_t) { return 0; });
    EXPECT_NE(text.find("(1, 1): ours 5, golden 4"), std::string::npos) << text;
}

TEST(GoldenChecker, SeesOneOtherBit) {
    Taps a, b;
    std::vector<real> x = {1, 2, 3, 4}, y = {1, 2, std::nextafter(real(3), real(4)), 4};
    a.add("x", x.data(), 2, {2}), b.add("x", x.data(), 2, {2});
    EXPECT_EQ(bit_difference(a, b), "");
    a.add("y", x.data(), 2, {2}), b.add("y", y.data(), 2, {2});
    EXPECT_NE(bit_difference(a, b).find("y: row 1, number 0"), std::string::npos);
}

}  // namespace golden
