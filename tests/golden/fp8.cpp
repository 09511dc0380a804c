// Chapter 14 against tests/golden/make_fp8.py: a part of golden.cpp, which includes it.
//
//   operations   codes, scales and the three sums are equal, in both builds: their types are fixed, and so is
//                the order of each sum
//   double       --arith: every result is rounded to bf16, and between two roundings both programs are exact
//                to some 2^-45. They would have to fall on either side of a tie to differ: equal, as stored
//   float        A last bit of f32 moves a sum over a tie now and then, and the other bf16 or e4m3 number
//                moves all that follows. Our result must still be nearer to the reference's than half the way
//                that the arithmetic leads: |ours - g| <= |f32 - g| / 2, root mean squares over a tensor. A
//                missing or an additional rounding somewhere leads about as far as the arithmetic does there.
//   KL           e: the largest relative error of a rounding, 2^-8 for bf16 and 2^-4 for e4m3. S results are
//                rounded on the way to the logits, and their errors are independent, so that they add in
//                squares: the logits' is e sqrt(S) times their spread s, where no expert changes. KL is
//                Var_p(error) / 2 to second order, hence KL <= 3 S (e s)^2 / 2: 3 is promised, since a
//                softmax multiplies the error of its scores by their size. S is 20 a layer for bf16 (two
//                norms, queries, keys, values, scores, ...), 8 a layer for e4m3 (the linear layers).
//   top-1        The likeliest token changes only where it was ahead by less than 4 times the error of a
//                difference of two logits, e sqrt(2 S) s.
//
// Where an expert changes, another sum is computed: such positions count in the means that are printed, not
// in these limits.

constexpr double BF16_ERROR = 0x1p-8, E4M3_ERROR = 0x1p-4, SIGMAS = 4;
constexpr int BF16_RESULTS = 20, LINEAR_LAYERS = 8;

const std::vector<std::string> WITH_ARITH = {"v3-fp8", "v3-ue8m0", "v2-lite",
                                             "qwen2",  "qwen3",    "llama3",  "tiny"};

// -- the operations -----------------------------------------------------------------------------------------

// fp8.safetensors, by name.
struct Fp8File {
    Mapping mapping{"tests/golden/fp8/fp8.safetensors"};
    TensorFile file = parse_safetensors({mapping.data(), mapping.size()}, "fp8.safetensors");

    const TensorInfo& info(const std::string& name) const {
        for (const TensorInfo& t : file.tensors) if (t.name == name) return t;
        fail("fp8.safetensors: no tensor %s", name.c_str());
    }
    int rows(const std::string& name) const { return int(info(name).shape[0]); }
    int cols(const std::string& name) const { return int(info(name).shape[1]); }
    template <class T> std::vector<T> all(const std::string& name) const {
        const TensorInfo& t = info(name);
        std::vector<T> out((t.end - t.begin) / sizeof(T));
        std::memcpy(out.data(), mapping.data() + file.data_begin + t.begin, t.end - t.begin);
        return out;
    }
    Vector reals(const std::string& name) const {
        Vector out;
        if (info(name).dtype == "F32") for (float x : all<float>(name)) out.push_back(x);
        else for (uint16_t h : all<uint16_t>(name)) out.push_back(bf16_to_float(h));
        return out;
    }
};

// Equal numbers, or both NaN.
template <class T> testing::AssertionResult equal(const std::string& name, const std::vector<T>& ours,
                                                  const std::vector<T>& golden) {
    if (ours.size() != golden.size()) return testing::AssertionFailure() << name << ": another size";
    for (size_t i = 0; i < ours.size(); i++) {
        double a = double(ours[i]), b = double(golden[i]);
        if (a == b || (std::isnan(a) && std::isnan(b))) continue;
        return testing::AssertionFailure() << "first difference: fp8 " << name
                                           << text_of("\n    number %zu: ours %.9g, golden %.9g", i, a, b);
    }
    return testing::AssertionSuccess();
}

void expect_quantised(const Fp8File& f, const std::string& x, const std::string& golden,
                      const Fp8Format& how) {
    int rows = f.rows(x), n = f.cols(x);
    Vector values = f.reals(x);
    std::vector<uint8_t> q(size_t(rows) * size_t(n));
    std::vector<float> s(f.all<float>(golden + ".s").size());
    quantise_fp8(q.data(), s.data(), {values.data(), n}, rows, n, how);
    EXPECT_TRUE(equal(golden + ".s", s, f.all<float>(golden + ".s")));
    EXPECT_TRUE(equal(golden + ".q", q, f.all<uint8_t>(golden + ".q")));
}

TEST(GoldenFp8, CastsToTheSameCodes) {
    Fp8File f;
    std::vector<uint8_t> q;
    for (float x : f.all<float>("cast.x")) q.push_back(float_to_e4m3(x));
    EXPECT_TRUE(equal("cast.q", q, f.all<uint8_t>("cast.q")));
}

TEST(GoldenFp8, QuantisesByEachFormula) {
    Fp8File f;
    const char* names[] = {"v3", "v32", "deepgemm", "deepep", "tilekernels", "flashmla"};
    for (int i = 0; i < 6; i++)
        for (bool ue8m0 : {false, true})
            expect_quantised(f, "x", text_of("quant.%s%s", names[i], ue8m0 ? "_ue8m0" : ""),
                             {Fp8Formula(i), ue8m0});
    expect_quantised(f, "w", "quant.w", {Fp8Formula::V3, false, 128});
}

struct GoldenGemm {
    Fp8File f;
    std::vector<uint8_t> aq = f.all<uint8_t>("a.q"), bq = f.all<uint8_t>("b.q");
    std::vector<float> as = f.all<float>("a.s"), bs = f.all<float>("b.s"), old = f.all<float>("old");
    Fp8Matrix a{aq.data(), as.data(), f.rows("a.q"), f.cols("a.q")};
    Fp8Matrix b{bq.data(), bs.data(), f.rows("b.q"), f.cols("b.q"), 128};

    std::vector<float> result(Fp8Sum sum, Dtype dtype, bool add) const {
        std::vector<float> out = old;
        std::vector<uint16_t> half(out.size());
        auto* data = dtype == Dtype::BF16 ? reinterpret_cast<std::byte*>(half.data())
                                          : reinterpret_cast<std::byte*>(out.data());
        gemm_fp8({data, dtype, add}, a, b, sum);
        for (size_t i = 0; dtype == Dtype::BF16 && i < out.size(); i++) out[i] = bf16_to_float(half[i]);
        return out;
    }
};

TEST(GoldenFp8, SumsInEachArithmetic) {
    GoldenGemm g;
    const char* names[] = {"exact", "promoted", "hopper"};
    for (int i = 0; i < 3; i++) {
        std::string name = text_of("gemm.%s", names[i]);
        EXPECT_TRUE(equal(name, g.result(Fp8Sum(i), Dtype::F32, false), g.f.all<float>(name)));
        EXPECT_TRUE(equal(name + ".bf16", g.result(Fp8Sum(i), Dtype::BF16, false),
                          g.f.all<float>(name + ".bf16")));
        EXPECT_TRUE(equal(name + ".add", g.result(Fp8Sum(i), Dtype::F32, true),
                          g.f.all<float>(name + ".add")));
    }
}

// What an H100 answered to one instruction of 32 products.
TEST(GoldenFp8, AddsAsAnH100) {
    Fp8File f;
    std::vector<uint8_t> a = f.all<uint8_t>("h100.a"), b = f.all<uint8_t>("h100.b");
    std::vector<float> d;
    for (size_t i = 0; i < a.size(); i += 32) d.push_back(hopper_step(0, &a[i], &b[i], 32));
    EXPECT_EQ(d.size(), 256u);
    EXPECT_TRUE(equal("h100.d", d, f.all<float>("h100.d")));
}

// -- the forward pass ---------------------------------------------------------------------------------------

const char* arith_name(Arith arith) { return arith == Arith::BF16 ? "bf16" : "fp8"; }

// A model in an arithmetic. One without FP8 weights is given some for FP8.
class InArith {
public:
    InArith(const std::string& name, Arith arith, MlaForm form, const Kernels& with = {},
            const std::string& quant = "none") {
        kernels = with;
        use_arith(arith);
        model_ = load_model(model_folder(name), {quant, [](size_t, size_t) {}});
        set_arith(model_, form);
        way.form = form, way.with = kernels;
    }
    ~InArith() { kernels = {}; }
    Taps taps(const std::vector<int>& ids) const { return run(model_, ids, way); }
    Results results(const Golden& golden) const { return results_of(taps(golden.ids), golden.rows); }
    int layers() const { return model_.config.n_layers; }
    Way way;

private:
    Model model_;
};

// Those of arith.safetensors that begin with `prefix`, without it.
Golden read_arith(const std::string& name, const std::string& prefix) {
    Golden golden;
    for (Values& v : read_results(golden_file(name).parent_path() / "arith.safetensors")) {
        if (v.name == "ids") golden.ids = v.integers;
        else if (v.name == "rows") golden.rows = v.integers;
        else if (v.name.starts_with(prefix)) v.name.erase(0, prefix.size()), golden.results.push_back(v);
    }
    return golden;
}

double distance(const Values& a, const Values& b) {
    return std::sqrt(metrics(a, b, 0, a.size()).squares / double(a.size()));
}

class InArithOf : public testing::TestWithParam<std::string> {
protected:
    std::string name = GetParam();
};
INSTANTIATE_TEST_SUITE_P(Golden, InArithOf, testing::ValuesIn(WITH_ARITH), test_name);

// Empty, or the first tensor that is farther from golden than allowed.
std::string far_from(const Golden& golden, const Results& ours, const Results& f32, const std::string& name) {
    for (const Values& g : golden.results) {
        const Values& v = *find(ours, g.name);
        double d = distance(v, g), all = distance(*find(f32, g.name), g), most = IN_DOUBLE ? 0 : all / 2;
        if (!(d <= most)) return text_of("first difference: %s %s: %.3g, allowed %.3g", name.c_str(),
                                         g.name.c_str(), d, most);
    }
    return "";
}

TEST_P(InArithOf, RoundsWhereTheReferenceRounds) {
    for (Arith arith : {Arith::BF16, Arith::FP8}) {
        Golden golden = read_arith(name, text_of("%s.", arith_name(arith)));
        if (golden.results.empty()) continue;
        Results f32 = InArith(name, Arith::F32, MlaForm::NAIVE).results(golden);
        Results ours = InArith(name, arith, MlaForm::NAIVE).results(golden);
        EXPECT_EQ(far_from(golden, ours, f32, name), "") << arith_name(arith);
        const Values &g = *find(golden.results, "logits"), &v = *find(ours, "logits");
        std::printf("%-12s %-4s logits: |f32 - golden| %.2e, |ours - golden| %.2e\n", name.c_str(),
                    arith_name(arith), distance(*find(f32, "logits"), g), distance(v, g));
    }
}

#ifdef DEEPSEEK_FLOAT
// Threads, chunks, decoding and kernels change no bit in any arithmetic.
TEST_P(InArithOf, HasTheSameBitsInEveryWay) {
    std::vector<int> ids = read_arith(name, "bf16.").ids;
    ids.resize(std::min(ids.size(), size_t(20)));
    for (Arith arith : {Arith::BF16, Arith::FP8}) {
        if (arith == Arith::FP8 && read_arith(name, "fp8.").results.empty()) continue;
        Taps expected = InArith(name, arith, MlaForm::ABSORBED).taps(ids);
        for (const Kernels& k : available_kernels()) {
            InArith in(name, arith, MlaForm::ABSORBED, k);
            for (auto [threads, chunk, decode] : {std::tuple{3, 0, false}, {2, 3, false}, {1, 0, true}}) {
                in.way.threads = threads, in.way.chunk = chunk, in.way.decode = decode;
                std::string text = bit_difference(expected, in.taps(ids));
                EXPECT_EQ(text, "") << "first difference: " << name << " " << in.way.text();
            }
        }
    }
}

// What is kept is bf16 already: a cache in bf16 loses nothing.
TEST_P(InArithOf, KeepsBf16InTheCache) {
    std::vector<int> ids = read_arith(name, "bf16.").ids;
    InArith in(name, Arith::BF16, MlaForm::ABSORBED);
    Taps expected = in.taps(ids);
    in.way.kv = Dtype::BF16;
    EXPECT_EQ(bit_difference(expected, in.taps(ids)), "") << "first difference: " << name;
}
#endif

// The rows in which every layer picked the same experts.
std::vector<size_t> same_choices(const Results& a, const Results& b) {
    std::vector<size_t> rows;
    for (size_t t = 0; t < find(a, "logits")->rows(); t++) {
        bool same = true;
        for (const Values& v : a) {
            auto begin = v.integers.begin() + std::ptrdiff_t(v.integers.empty() ? 0 : t * v.row_size());
            auto end = begin + std::ptrdiff_t(v.integers.empty() ? 0 : v.row_size());
            const Values& w = *find(b, v.name);
            same = same && std::equal(begin, end, w.integers.begin() + (begin - v.integers.begin()));
        }
        if (same) rows.push_back(t);
    }
    return rows;
}

// One position: KL of y from x, the variance of x's logits, and by how much its best is ahead of y's best.
struct Divergence {
    double kl = 0, variance = 0, ahead = 0;
};
Divergence divergence(const Values& a, const Values& b, size_t t) {
    Divergence d;
    const size_t V = a.row_size();
    const double *x = &a.reals[t * V], *y = &b.reals[t * V];
    auto log_sum = [V](const double* z) {
        double top = *std::max_element(z, z + V), sum = 0;
        for (size_t i = 0; i < V; i++) sum += std::exp(z[i] - top);
        return top + std::log(sum);
    };
    double lx = log_sum(x), ly = log_sum(y), mean = 0, square = 0;
    for (size_t i = 0; i < V; i++) {
        d.kl += std::exp(x[i] - lx) * ((x[i] - lx) - (y[i] - ly));
        mean += x[i] / double(V), square += x[i] * x[i] / double(V);
    }
    d.variance = square - mean * mean;
    d.ahead = x[top_1(a, t)] - x[top_1(b, t)];
    return d;
}

// The table of chapter 14.
class ArithDivergence : public InArithOf {
protected:
    void check(Arith arith, const char* quant) const {
        const bool fp8 = arith == Arith::FP8;
        std::vector<int> ids = read_golden(name).ids;
        InArith wide(name, Arith::F32, MlaForm::ABSORBED, {}, quant);
        Results a = results_of(wide.taps(ids), {});
        Results b = results_of(InArith(name, arith, MlaForm::ABSORBED, {}, quant).taps(ids), {});
        const Values &x = *find(a, "logits"), &y = *find(b, "logits");
        double e2 = BF16_RESULTS * BF16_ERROR * BF16_ERROR;
        e2 = wide.layers() * (e2 + fp8 * LINEAR_LAYERS * E4M3_ERROR * E4M3_ERROR);
        double kl = 0, kl_same = 0, most = 0;
        size_t agree = 0;
        std::vector<size_t> same = same_choices(a, b);
        for (size_t t = 0; t < x.rows(); t++) {
            Divergence d = divergence(x, y, t);
            kl += d.kl / double(x.rows()), agree += d.ahead == 0;
            if (std::find(same.begin(), same.end(), t) == same.end()) continue;
            kl_same += d.kl, most += PROMISED * d.variance * e2 / 2;
            EXPECT_LE(d.ahead, SIGMAS * std::sqrt(2 * e2 * d.variance)) << "position " << t;
        }
        EXPECT_GT(kl, 0);                            // something was rounded
        EXPECT_GE(same.size(), 2u);                  // or nothing is compared
        EXPECT_LE(kl_same, most);
        std::printf("%-12s %s, --quant %s: KL %.3f millinats, top-1 %zu of %zu; experts as in f32 at %zu, "
                    "their KL %.2f of the limit\n",
                    name.c_str(), arith_name(arith), quant, 1000 * kl, agree, x.rows(), same.size(),
                    kl_same / most);
    }
};
INSTANTIATE_TEST_SUITE_P(Golden, ArithDivergence, testing::ValuesIn(all_names()), test_name);

TEST_P(ArithDivergence, IsWithinWhatRoundingsDo) {
    check(Arith::BF16, "none");
    check(Arith::FP8, read_config(model_folder(name)).fp8 ? "none" : "fp8");
}
