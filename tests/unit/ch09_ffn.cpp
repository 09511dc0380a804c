// Chapter 9: SwiGLU.
#include "unit.h"

struct FfnCase {
    Model model;
    std::unique_ptr<Session> session;
    Vector x;

    explicit FfnCase(int T) : model(random_model("ffn", tiny_dense("llama"))) {
        session = std::make_unique<Session>(model, SessionOptions{T, T, MlaForm::ABSORBED});
        x = Noise{}.vector(size_t(T * model.config.D));
    }
    const Mlp& weights() const { return model.layers[0].mlp; }
    Vector run(const real* in, int T) const {
        Vector out(size_t(T * model.config.D));
        swiglu(out.data(), in, weights(), T, session->a.gate, session->a.up);
        return out;
    }
};

// Row r of W times x in long double, with the sum of absolute terms.
static std::pair<long double, long double> exact_row(const Matrix& w, int r,
                                                     const std::vector<long double>& x) {
    Vector row(static_cast<size_t>(w.cols));
    widen_plain(row.data(), w, r);
    long double sum = 0, size = 0;
    for (size_t i = 0; i < row.size(); i++) sum += row[i] * x[i], size += std::fabs(row[i] * x[i]);
    return {sum, size};
}

// Each row of numbers on its own, whatever their number and the threads.
TEST(SiluTimes, MultipliesBySilu) {
    Noise noise;
    for (int width : {1, 7, 8, 40, 3000}) {
        for (int T : {1, 2, 9}) {
            Vector gate = noise.vector(size_t(width * T)), up = noise.vector(gate.size());
            for (real& z : gate) z *= 10;
            for (int threads : {1, 3, 8}) {
                ScopedThreads scoped(threads);
                Vector out = gate;
                silu_times(out.data(), up.data(), width, T);
                for (size_t i = 0; i < out.size(); i++) {
                    long double x = gate[i], exact = x / (1 + std::exp(-x)) * up[i];
                    ASSERT_LE(std::fabs(out[i] - exact), std::fabs(exact) * (EXP_ERROR + 3.01L * U)) << i;
                }
            }
        }
    }
}
TEST(SiluTimes, OfNoRowsWritesNothing) {
    real gate = 5, up = 7;
    silu_times(&gate, &up, 1, 0);
    EXPECT_EQ(gate, 5);
}

// gate and up: dot_roundings(D). silu has a slope of at most 1.1 and EXP_ERROR + 2 U of its own; one product.
// Each hidden number carries that into its column of W_down, whose dot adds dot_roundings(F) roundings.
TEST(Swiglu, IsNearTheFormula) {
    FfnCase f(1);
    const Mlp& w = f.weights();
    Vector out = f.run(f.x.data(), 1);
    std::vector<long double> x(f.x.begin(), f.x.end()), hidden, error;
    long double dot = chain_error(dot_roundings(w.w_gate.cols));
    for (int r = 0; r < w.w_gate.rows; r++) {
        auto [gate, gate_size] = exact_row(w.w_gate, r, x);
        auto [up, up_size] = exact_row(w.w_up, r, x);
        long double silu = gate / (1 + std::exp(-gate)),
                    silu_error = 1.1L * dot * gate_size + 5 * U * std::fabs(silu);
        hidden.push_back(silu * up);
        error.push_back(1.01L * (silu_error * std::fabs(up) + std::fabs(silu) * dot * up_size +
                                 U * std::fabs(silu * up)));
    }
    for (int r = 0; r < w.w_down.rows; r++) {
        auto [exact, size] = exact_row(w.w_down, r, hidden);
        auto [unused, carried] = exact_row(w.w_down, r, error);
        (void)unused;
        long double bound = carried + chain_error(dot_roundings(w.w_down.cols)) * (size + carried);
        EXPECT_LE(std::fabs(out[size_t(r)] - exact), bound) << r;
    }
}
TEST(Swiglu, ATokenAloneHasTheBitsItHasInCompany) {
    FfnCase f(9);
    size_t D = size_t(f.model.config.D);
    Vector all = f.run(f.x.data(), 9);
    for (size_t t = 0; t < 9; t++) {
        Vector one = f.run(f.x.data() + t * D, 1);
        EXPECT_TRUE(same_bits(one.data(), all.data() + t * D, D)) << t;
    }
}
TEST(Swiglu, OfZeroIsZero) {
    FfnCase f(1);
    EXPECT_EQ(f.run(Vector(size_t(f.model.config.D)).data(), 1), Vector(size_t(f.model.config.D)));
}
