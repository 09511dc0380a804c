// Appendix A: every kernel gives the bits of its plain twin.
#include "unit.h"

enum class Contents { TAME, ANY };

// A matrix at an odd address whose bytes are tame numbers, or any bits at all: NaN, infinities, subnormals. A
// view of it begins inside a scale block.
struct Weights8 {
    std::string bytes, scales;
    Matrix matrix;

    Weights8(Dtype dtype, int rows, int cols, Contents contents, int first_row) {
        static const char* const NAMES[] = {"F32", "BF16", "F16", "F8_E4M3"};
        Noise noise{{uint64_t(cols * 10 + int(dtype))}};
        bytes = "x";
        if (contents == Contents::TAME)
            bytes += random_data(NAMES[int(dtype)], uint64_t(rows) * uint64_t(cols), 0, 1, noise);
        while (bytes.size() <= size_t(rows) * size_t(cols) * size_of(dtype)) bytes += char(noise.below(256));
        scales = "y" + random_data("F32", uint64_t((rows + 127) / 128 + 1) * uint64_t((cols + 127) / 128), 1,
                                   0.5, noise);
        bool scaled = dtype == Dtype::F8_E4M3;
        matrix = {reinterpret_cast<const std::byte*>(bytes.data() + 1),
                  scaled ? reinterpret_cast<const std::byte*>(scales.data() + 1) : nullptr,
                  dtype,
                  rows,
                  cols,
                  first_row};
    }
};

constexpr Dtype ALL_DTYPES[] = {Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::F8_E4M3};

// T vectors, a little apart; with `wild`, some numbers are infinite, NaN or subnormal.
static Vector activations(int T, int stride, bool wild, Noise& noise) {
    Vector x = noise.vector(size_t(T) * size_t(stride));
    const real special[] = {real(INFINITY),
                            real(-INFINITY),
                            std::numeric_limits<real>::quiet_NaN(),
                            std::numeric_limits<real>::denorm_min(),
                            std::numeric_limits<real>::min() / 3,
                            real(-0.0),
                            real(1e38)};
    for (size_t i = 0; wild && i < x.size(); i += 1 + size_t(noise.below(200)))
        x[i] = special[noise.below(7)];
    return x;
}

static void expect_dots(const Kernels& k, const Weights8& w, const Vector& x, int stride, int T) {
    Vector expected(size_t(T * 3), 7), out = expected;         // every third is written
    for (int r = 0; r < w.matrix.rows; r++) {
        dots_plain(expected.data(), 3, w.matrix, r, {x.data(), stride}, T);
        k.dots(out.data(), 3, w.matrix, r, {x.data(), stride}, T);
        ASSERT_TRUE(same_bits(expected, out))
            << k.name << ", dtype " << int(w.matrix.dtype) << ", n " << w.matrix.cols << ", T " << T;
    }
}

TEST(FastCpu, DotsEqualPlain) {
    for (const Kernels& k : available_kernels()) {
        for (Dtype dtype : ALL_DTYPES) {
            Noise noise;
            for (int n = 1; n <= 300; n++) {
                Weights8 w(dtype, 2, n, Contents::TAME, 127);   // rows 127 and 128 of some larger matrix
                Vector x = activations(9, n + 3, false, noise);
                for (int T = 1; T <= 9; T++) ASSERT_NO_FATAL_FAILURE(expect_dots(k, w, x, n + 3, T));
            }
        }
    }
}
TEST(FastCpu, DotsEqualPlainForAnyBits) {
    for (const Kernels& k : available_kernels()) {
        for (Dtype dtype : ALL_DTYPES) {
            Noise noise;
            for (int n = 1; n <= 300; n += 1 + n / 40) {
                Weights8 w(dtype, 3, n, Contents::ANY, 0);
                for (bool wild : {false, true}) {
                    Vector x = activations(5, n + 1, wild, noise);
                    for (int T : {1, 2, 3, 4, 5}) ASSERT_NO_FATAL_FAILURE(expect_dots(k, w, x, n + 1, T));
                }
            }
        }
    }
}
// One NaN, infinity or subnormal among tame weights, at every place.
TEST(FastCpu, DotsEqualPlainWhereverASpecialWeightStands) {
    for (const Kernels& k : available_kernels()) {
        for (auto [dtype, code] :
             {std::pair{Dtype::F8_E4M3, 0x7F}, std::pair{Dtype::F8_E4M3, 0xFF},
              std::pair{Dtype::F8_E4M3, 0x01}, std::pair{Dtype::BF16, 0x7F80}, std::pair{Dtype::BF16, 0x0001},
              std::pair{Dtype::F16, 0xFC00}, std::pair{Dtype::F16, 0x7E00}, std::pair{Dtype::F16, 0x8001}}) {
            Noise noise;
            Vector x = activations(4, 150, false, noise);
            for (size_t place = 0; place < 150; place++) {
                Weights8 w(dtype, 1, 150, Contents::TAME, 0);
                std::memcpy(w.bytes.data() + 1 + place * size_of(dtype), &code, size_of(dtype));
                ASSERT_NO_FATAL_FAILURE(expect_dots(k, w, x, 150, 4));
            }
        }
    }
}
TEST(FastCpu, DotsReadViewsInsideScaleBlocks) {
    for (const Kernels& k : available_kernels()) {
        Noise noise;
        Weights8 w(Dtype::F8_E4M3, 300, 200, Contents::TAME, 0);
        Vector x = activations(3, 200, false, noise);
        w.matrix = w.matrix.view(90, 200).view(30, 150);        // rows 120 .. 269: three blocks
        ASSERT_NO_FATAL_FAILURE(expect_dots(k, w, x, 200, 3));
    }
}
TEST(FastCpu, WidenEqualsPlain) {
    for (const Kernels& k : available_kernels()) {
        for (Dtype dtype : ALL_DTYPES) {
            for (int n = 1; n <= 300; n++) {
                Weights8 w(dtype, 2, n, n % 2 ? Contents::TAME : Contents::ANY, 127);
                Vector expected(size_t(n) + 1, 7), out = expected;
                for (int r = 0; r < 2; r++) {
                    widen_plain(expected.data(), w.matrix, r), k.widen(out.data(), w.matrix, r);
                    ASSERT_TRUE(same_bits(expected, out))
                        << k.name << ", dtype " << int(dtype) << ", n " << n;
                }
            }
        }
    }
}
TEST(FastCpu, WidenKnowsAllCodesOfTheShortFormats) {
    for (const Kernels& k : available_kernels()) {
        std::string bytes;
        for (int code = 0; code < 65536; code++) append_bytes(bytes, &code, 2);
        Vector expected(65536), out(65536);
        for (Dtype dtype : {Dtype::BF16, Dtype::F16}) {
            Matrix m{reinterpret_cast<const std::byte*>(bytes.data()), nullptr, dtype, 1, 65536, 0};
            widen_plain(expected.data(), m, 0), k.widen(out.data(), m, 0);
            EXPECT_TRUE(same_bits(expected, out)) << k.name;
        }
        std::string codes, ones;
        for (int code = 0; code < 256; code++) codes += char(code);
        for (float one : {1.0f, 1.0f}) append_bytes(ones, &one, 4);
        k.widen(out.data(),
                {reinterpret_cast<const std::byte*>(codes.data()),
                 reinterpret_cast<const std::byte*>(ones.data()), Dtype::F8_E4M3, 1, 256, 0},
                0);
        Vector table(E4M3.begin(), E4M3.end());
        EXPECT_TRUE(same_bits(out.data(), table.data(), 256)) << k.name;
    }
}
TEST(FastCpu, DotRealEqualsPlain) {
    for (const Kernels& k : available_kernels()) {
        Noise noise;
        for (int n = 0; n <= 300; n++) {
            Vector a = activations(1, n + 1, n % 3 == 0, noise), b = activations(1, n + 1, n % 3 == 1, noise);
            for (int offset : {0, 1}) {                         // not aligned to 32 bytes, at least once
                real expected = dot_real_plain(a.data() + offset, b.data() + offset, n + 1 - offset);
                real out = k.dot_real(a.data() + offset, b.data() + offset, n + 1 - offset);
                ASSERT_TRUE(same_bits(&expected, &out, 1)) << k.name << " " << n;
            }
        }
    }
}
TEST(FastCpu, AxpyEqualsPlain) {
    for (const Kernels& k : available_kernels()) {
        Noise noise;
        for (int n = 0; n <= 300; n++) {
            Vector v = activations(1, n + 2, n % 2 == 0, noise),
                   expected = activations(1, n + 2, n % 5 == 0, noise), out = expected;
            real factor = real(noise.next());
            axpy_plain(expected.data() + 1, factor, v.data() + 1, n),
                k.axpy(out.data() + 1, factor, v.data() + 1, n);
            ASSERT_TRUE(same_bits(expected, out)) << k.name << " " << n;
        }
    }
}

TEST(ChooseKernels, TakesTheLastOfTheList) {
    ScopedKernels before(kernels);
    choose_kernels("");
    EXPECT_STREQ(kernels.name, available_kernels().back().name);
}
TEST(ChooseKernels, TakesWhatIsAskedFor) {
    ScopedKernels before(kernels);
    for (const Kernels& k : available_kernels()) {
        choose_kernels(k.name);
        EXPECT_STREQ(kernels.name, k.name);
    }
}
TEST(ChooseKernels, RefusesWhatThisProcessorLacks) {
    ScopedKernels before(kernels);
    EXPECT_TRUE(refuses([] { choose_kernels("avx9"); }, "avx9"));
}
TEST(ChooseKernels, PlainComesFirst) { EXPECT_STREQ(available_kernels()[0].name, "plain"); }
