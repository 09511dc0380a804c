// simd.h: every kernel gives the bits of its plain twin.
#include "unit.h"

#include "weights.h"

// All but the plain ones.
static std::vector<Kernels> fast_kernels() {
    std::vector<Kernels> all = available_kernels();
    all.erase(all.begin());
    return all;
}

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

// -- products ---------------------------------------------------------------------------------------

// T tokens on the rows begin .. end. What else is in the output must stay.
struct Part {
    int T, begin, end;
};
static void products(const Kernels& k, const Matrix& w, bool wild, Part p) {
    Noise noise{{uint64_t(w.cols + p.T)}};
    int stride = w.cols + 3;
    auto label = [&] {
        return text_of("%s, %s (%d, %d), rows %d to %d, T %d", k.name, format_of(w.dtype).name, w.rows,
                       w.cols, p.begin, p.end, p.T);
    };
    Vector x = activations(p.T, stride, wild, noise);
    Vector expected(size_t(p.T) * size_t(w.rows + 1), 7), out = expected;
    rows_plain({expected.data(), w.rows + 1}, {x.data(), stride}, w, p.T, p.begin, p.end);
    k.target->rows({out.data(), w.rows + 1}, {x.data(), stride}, w, p.T, p.begin, p.end);
    ASSERT_TRUE(same_bits(expected, out)) << label();
    if (k.target->arrange) {
        std::fill(out.begin(), out.end(), real(7));
        Vector arranged(arranged_size(w.cols) * size_t((p.T + ARRANGED_TOKENS - 1) / ARRANGED_TOKENS));
        for (int t = 0; t < p.T; t += ARRANGED_TOKENS)
            k.target->arrange(arranged.data() + size_t(t / ARRANGED_TOKENS) * arranged_size(w.cols),
                      {x.data() + size_t(t) * size_t(stride), stride}, std::min(ARRANGED_TOKENS, p.T - t),
                      w.cols);
        k.target->arranged_rows({out.data(), w.rows + 1}, arranged.data(), w, p.T, p.begin, p.end);
        ASSERT_TRUE(same_bits(expected, out)) << label() << ", arranged";
    }
    if (!quantised(w.dtype) || looked_up(w.dtype)) return;
    Vector dense = activations(p.T, w.cols, wild, noise);
    Ints ints(dense, p.T, format_of(w.dtype).values, k);
    int_rows_plain({expected.data(), w.rows + 1}, {dense.data(), w.cols}, w, p.T, p.begin, p.end);
    k.target->int_rows({out.data(), w.rows + 1}, ints.rows, w, p.T, p.begin, p.end);
    ASSERT_TRUE(same_bits(expected, out)) << label() << ", integers";
}

// For each fast kernel and each dtype.
static void for_each(const std::function<void(const Kernels&, Dtype)>& body) {
    for (const Kernels& k : fast_kernels()) {
        for (Dtype dtype : ALL_DTYPES) {
            body(k, dtype);
            if (testing::Test::HasFatalFailure()) return;
        }
    }
}
static int block_of(Dtype dtype) { return format_of(dtype).values; }
// `n` columns, or `blocks` blocks.
static int columns(Dtype dtype, int n, int blocks) {
    return block_of(dtype) == 1 ? n : blocks * block_of(dtype);
}

// Few tokens, one more than few, and many. Every width up to 300, or up to some blocks.
TEST(FastCpu, ProductsEqualPlainForEveryWidth) {
    for_each([](const Kernels& k, Dtype dtype) {
        int block = block_of(dtype);
        for (int n = block; n <= std::max(300, 10 * block); n += block) {
            RandomMatrix w(dtype, 2, n, uint64_t(n), Contents::TAME, 127);   // rows 127 and 128: two scales
            for (int T = 1; T <= 9; T++) ASSERT_NO_FATAL_FAILURE(products(k, w.matrix, false, {T, 0, 2}));
        }
    });
}
// Blocks have 12, 32 or 48 rows: all that may be left over.
TEST(FastCpu, ProductsEqualPlainForEveryNumberOfRows) {
    for_each([](const Kernels& k, Dtype dtype) {
        RandomMatrix w(dtype, 75, columns(dtype, 40, 1), 1, Contents::TAME, 100);
        for (int rows = 1; rows <= 70; rows++) {
            int begin = rows % 6;
            for (int T = 1; T <= 9; T++)
                ASSERT_NO_FATAL_FAILURE(products(k, w.matrix, false, {T, begin, begin + rows}));
        }
    });
}
// A block takes 64 or 128 tokens.
TEST(FastCpu, ProductsEqualPlainForManyTokens) {
    for_each([](const Kernels& k, Dtype dtype) {
        RandomMatrix w(dtype, 19, columns(dtype, 150, 2), 1);
        for (int T : {15, 16, 17, 63, 64, 65, 127, 128, 129, 130, 131, 132, 133, 255, 256, 257, 300})
            ASSERT_NO_FATAL_FAILURE(products(k, w.matrix, false, {T, 1, 19}));
    });
}
// Floats are taken 256 columns at a time; for few tokens 1, 2, 4 or (4,096 columns) 8 rows: 23 need each.
TEST(FastCpu, ProductsEqualPlainForLongRows) {
    for_each([](const Kernels& k, Dtype dtype) {
        for (int n : {511, 512, 513, 767, 768, 769, 1023, 1024, 1025, 1040, 1536, 2049, 4099, 4352}) {
            int whole = (n + block_of(dtype) - 1) / block_of(dtype) * block_of(dtype);
            RandomMatrix w(dtype, 23, whole, uint64_t(n));
            for (int T : {1, 3, 4, 9, 34}) ASSERT_NO_FATAL_FAILURE(products(k, w.matrix, false, {T, 0, 23}));
        }
    });
}
TEST(FastCpu, ProductsEqualPlainForAnyBits) {
    for_each([](const Kernels& k, Dtype dtype) {
        int block = block_of(dtype);
        for (int n = block; n <= std::max(300, 10 * block); n += block * (1 + n / block / 40)) {
            RandomMatrix w(dtype, 14, n, uint64_t(n), Contents::ANY);
            for (int T : {1, 2, 3, 4, 5}) {
                ASSERT_NO_FATAL_FAILURE(products(k, w.matrix, false, {T, 0, 14}));
                ASSERT_NO_FATAL_FAILURE(products(k, w.matrix, true, {T, 0, 14}));
            }
        }
    });
}
TEST(FastCpu, ProductsEqualPlainForTameWeightsAndWildActivations) {
    for_each([](const Kernels& k, Dtype dtype) {
        RandomMatrix w(dtype, 14, 1024, 1);
        for (int T = 1; T <= 9; T++) ASSERT_NO_FATAL_FAILURE(products(k, w.matrix, true, {T, 0, 14}));
    });
}
// Around ARRANGE_FROM tokens, more than a block has, and rows so long that few tokens are taken at once and a
// lane in parts. AVX-512 packs rows of bf16 in another way if their columns fill 32 places: 160 do.
TEST(FastCpu, MatmulEqualsPlain) {
    for_each([](const Kernels& k, Dtype dtype) {
        for (int n : {columns(dtype, 150, 2), columns(dtype, 160, 3), columns(dtype, 41000, 161)}) {
            RandomMatrix w(dtype, n > 1000 ? 3 : 400, n, 1);
            int rows = w.matrix.rows;
            for (int T : {31, 32, 33, 134}) {
                Noise noise;
                Vector x = noise.vector(size_t(T) * size_t(n));
                Vector expected(size_t(T) * size_t(rows)), out = expected;
                ScopedKernels scoped(Kernels{});
                matmul(expected.data(), x.data(), w.matrix, T);
                kernels = k;
                matmul(out.data(), x.data(), w.matrix, T);
                ASSERT_TRUE(same_bits(expected, out))
                    << k.name << ", " << format_of(dtype).name << ", n " << n << ", T " << T;
            }
        }
    });
}
// One NaN, infinity or subnormal among tame weights, at every place.
TEST(FastCpu, ProductsEqualPlainWhereverASpecialWeightStands) {
    const std::pair<Dtype, int> special[] = {
        {Dtype::F8_E4M3, 0x7F}, {Dtype::F8_E4M3, 0xFF}, {Dtype::F8_E4M3, 0x01}, {Dtype::BF16, 0x7F80},
        {Dtype::BF16, 0x0001},  {Dtype::F16, 0xFC00},   {Dtype::F16, 0x7E00},   {Dtype::F16, 0x8001}};
    for (const Kernels& k : fast_kernels()) {
        for (auto [dtype, code] : special) {
            for (size_t place = 0; place < 150; place++) {
                RandomMatrix w(dtype, 1, 150, 1);
                std::memcpy(w.bytes.data() + 1 + place * row_bytes(dtype, 1), &code, row_bytes(dtype, 1));
                for (int T : {1, 4}) ASSERT_NO_FATAL_FAILURE(products(k, w.matrix, false, {T, 0, 1}));
            }
        }
    }
}
TEST(FastCpu, ProductsReadViewsInsideScaleBlocks) {
    for (const Kernels& k : fast_kernels()) {
        RandomMatrix w(Dtype::F8_E4M3, 300, 200, 1);
        Matrix view = w.matrix.view(90, 200).view(30, 150);     // rows 120 .. 269: three blocks
        for (int T : {1, 3, 5}) ASSERT_NO_FATAL_FAILURE(products(k, view, false, {T, 0, 150}));
    }
}
TEST(FastCpu, ProductsReadRowsThatAreApart) {
    for_each([](const Kernels& k, Dtype dtype) {
        RandomMatrix w(dtype, 20, 768, 1);
        Matrix part = w.matrix;
        part.cols = 512, part.stride = row_bytes(dtype, 768);
        if (dtype == Dtype::F8_E4M3) return;                    // scales know no stride
        for (int T : {1, 3, 5}) ASSERT_NO_FATAL_FAILURE(products(k, part, false, {T, 0, 20}));
    });
}
// All weights and all activations at their largest, in each way through the kernels; UBSan watches.
TEST(FastCpu, IntegersDoNotOverflow) {
    for (const Kernels& k : fast_kernels()) {
        for (Dtype dtype : QUANTISED) {
            if (looked_up(dtype)) continue;
            int block = block_of(dtype), n = 1024;
            std::string extreme = extreme_block(dtype);
            RandomMatrix w(dtype, 17, n, 1);
            for (size_t at = 1; at < w.bytes.size(); at += extreme.size())
                w.bytes.replace(at, extreme.size(), extreme);
            for (int T : {1, 2, 3, 4, 5, 129}) {
                Vector x(size_t(T * n), 127), expected(size_t(T) * 17), out = expected;
                for (size_t i = 0; i < x.size(); i++) if (i / size_t(n) % 2) x[i] = -127;
                Ints ints(x, T, block, k);
                int_rows_plain({expected.data(), 17}, {x.data(), n}, w.matrix, T, 0, 17);
                k.target->int_rows({out.data(), 17}, ints.rows, w.matrix, T, 0, 17);
                ASSERT_TRUE(same_bits(expected, out)) << format_of(dtype).name << ", T " << T;
            }
        }
    }
}

// -- widening ---------------------------------------------------------------------------------------

TEST(FastCpu, WidenEqualsPlain) {
    for_each([](const Kernels& k, Dtype dtype) {
        int block = block_of(dtype);
        for (int n = block; n <= std::max(300, 5 * block); n += block) {
            RandomMatrix w(dtype, 2, n, uint64_t(n), n / block % 2 ? Contents::TAME : Contents::ANY, 127);
            Vector expected(size_t(n) + 1, 7), out = expected;
            for (int r = 0; r < 2; r++) {
                widen_plain(expected.data(), w.matrix, r), k.widen(out.data(), w.matrix, r);
                ASSERT_TRUE(same_bits(expected, out))
                    << k.name << ", " << format_of(dtype).name << ", n " << n;
            }
        }
    });
}
TEST(FastCpu, WidenKnowsAllCodesOfTheShortFormats) {
    for (const Kernels& k : fast_kernels()) {
        std::string bytes;
        for (int code = 0; code < 65536; code++) append_bytes(bytes, &code, 2);
        Vector expected(65536), out(65536);
        for (Dtype dtype : {Dtype::BF16, Dtype::F16}) {
            Matrix m{reinterpret_cast<const std::byte*>(bytes.data()), nullptr, dtype, 1, 65536, 0, 0};
            widen_plain(expected.data(), m, 0), k.widen(out.data(), m, 0);
            EXPECT_TRUE(same_bits(expected, out)) << k.name;
        }
        std::string codes, ones;
        for (int code = 0; code < 256; code++) codes += char(code);
        for (float one : {1.0f, 1.0f}) append_bytes(ones, &one, 4);
        k.widen(out.data(),
                {reinterpret_cast<const std::byte*>(codes.data()),
                 reinterpret_cast<const std::byte*>(ones.data()), Dtype::F8_E4M3, 1, 256, 0, 0},
                0);
        Vector table(E4M3.begin(), E4M3.end());
        EXPECT_TRUE(same_bits(out.data(), table.data(), 256)) << k.name;
    }
}
TEST(FastCpu, DotRealEqualsPlain) {
    for (const Kernels& k : fast_kernels()) {
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

// -- weighted sums ----------------------------------------------------------------------------------

static void expect_weigh(const Kernels& k, const Matrix& v, int T, int n, bool wild) {
    Noise noise{{uint64_t(T * 1000 + n)}};
    int stride = v.cols + 2;
    Vector p = activations(T, v.rows + 1, wild, noise), expected = activations(T, stride, wild, noise);
    Vector out = expected;
    weigh_plain({expected.data(), stride}, {p.data(), v.rows + 1}, v, T, n);
    k.weigh({out.data(), stride}, {p.data(), v.rows + 1}, v, T, n);
    ASSERT_TRUE(same_bits(expected, out)) << k.name << ", " << format_of(v.dtype).name << ", " << v.cols
                                          << " columns, T " << T << ", n " << n;
}

// Six tokens at a time, 64 rows at a time, 16 or 8 or single columns.
TEST(FastCpu, WeighEqualsPlain) {
    for_each([](const Kernels& k, Dtype dtype) {
        int block = block_of(dtype);
        for (int cols = block; cols <= std::max(40, 2 * block); cols += block) {
            RandomMatrix v(dtype, 70, cols, uint64_t(cols), Contents::TAME, 100);
            for (int T = 1; T <= 16; T++)
                for (int n : {0, 1, 7, 70}) ASSERT_NO_FATAL_FAILURE(expect_weigh(k, v.matrix, T, n, false));
        }
        RandomMatrix v(dtype, 200, columns(dtype, 136, 1), 1, Contents::TAME, 100);
        for (int n = 0; n <= 200; n += n < 60 || n > 130 ? 7 : 1)
            ASSERT_NO_FATAL_FAILURE(expect_weigh(k, v.matrix, 1 + n % 16, n, n % 3 == 0));
    });
}
TEST(FastCpu, WeighEqualsPlainForAnyBits) {
    for_each([](const Kernels& k, Dtype dtype) {
        RandomMatrix v(dtype, 70, columns(dtype, 45, 1), 1, Contents::ANY);
        for (int T : {1, 2, 6, 7, 16})
            for (int n : {1, 2, 65}) ASSERT_NO_FATAL_FAILURE(expect_weigh(k, v.matrix, T, n, T % 2));
    });
}
TEST(FastCpu, WeighReadsRowsThatAreApart) {
    for_each([](const Kernels& k, Dtype dtype) {
        RandomMatrix w(dtype, 70, 512, 1);
        Matrix part = w.matrix;
        part.cols = 256, part.stride = row_bytes(dtype, 512);
        if (dtype == Dtype::F8_E4M3) return;                    // scales know no stride
        for (int T : {1, 7}) ASSERT_NO_FATAL_FAILURE(expect_weigh(k, part, T, 70, false));
    });
}

// -- activations in small integers ------------------------------------------------------------------

static void expect_quantise(const Kernels& k, const Vector& x, int block) {
    Ints expected(x, 1, block), out(x, 1, block, k);
    ASSERT_EQ(expected.q, out.q) << k.name << ", block " << block;
    ASSERT_EQ(expected.sums, out.sums) << k.name << ", block " << block;
    Vector d(expected.d.begin(), expected.d.end()), other(out.d.begin(), out.d.end());
    ASSERT_TRUE(same_bits(d, other)) << k.name << ", block " << block;
}

TEST(FastCpu, QuantiseEqualsPlain) {
    for (const Kernels& k : fast_kernels()) {
        Noise noise;
        for (int round = 0; round < 500; round++) {
            int block = round % 2 ? 32 : 256;
            Vector x = activations(1, 256 * (1 + round % 5), round % 4 == 3, noise);
            for (real& v : x) v = real(std::ldexp(double(v), round % 300 - 149));
            ASSERT_NO_FATAL_FAILURE(expect_quantise(k, x, block));
        }
    }
}
TEST(FastCpu, QuantiseEqualsPlainAtTiesAndEnds) {
    for (const Kernels& k : fast_kernels()) {
        Noise noise;
        for (int block : {32, 256}) {
            Vector halves(256);                                 // the largest is 127: every number is a tie
            for (real& v : halves) v = real(noise.below(254)) - real(126.5);
            for (size_t i = 0; i < 256; i += 32) halves[i] = 127;
            ASSERT_NO_FATAL_FAILURE(expect_quantise(k, halves, block));
            for (double all : {0.0, -0.0, 1.0, -1.0, 0x1p-100, 0x1.Fp-101, 3e38})
                ASSERT_NO_FATAL_FAILURE(expect_quantise(k, Vector(256, real(all)), block));
            for (real bad : {real(NAN), real(-NAN), real(INFINITY), real(-INFINITY)}) {
                for (size_t place = 0; place < 256; place += 5) {
                    Vector x = noise.vector(256);
                    x[place] = bad;
                    ASSERT_NO_FATAL_FAILURE(expect_quantise(k, x, block));
                }
            }
        }
    }
}

// -- exp --------------------------------------------------------------------------------------------

// A sweep over all floats: normal, subnormal, infinite, NaN, of both signs.
static Vector all_kinds_of_numbers() {
    Vector out;
    for (uint64_t bits = 0; bits < uint64_t(1) << 32; bits += 9973)
        out.push_back(real(std::bit_cast<float>(uint32_t(bits))));
    for (double x = -110; x < 95; x += 1.0 / 1024) out.push_back(real(x));
    for (float x : {-104.0f, 88.8f, 88.72283f})
        for (float y : {std::nextafter(x, -INFINITY), x, std::nextafter(x, INFINITY)}) out.push_back(real(y));
    for (double x : {0.0, -0.0, double(INFINITY), -double(INFINITY), std::nan("")}) out.push_back(real(x));
    return out;
}
TEST(FastCpu, SoftmaxEqualsPlain) {
    const real inf = real(INFINITY);
    auto compare = [](const Kernels& k, const Vector& z, real scale, size_t begin, int n) {
        Vector expected = z, out = z;
        softmax_plain(expected.data() + begin, scale, n), k.softmax(out.data() + begin, scale, n);
        return same_bits(expected, out);
    };
    for (const Kernels& k : fast_kernels()) {
        Vector z = all_kinds_of_numbers();
        std::erase_if(z, [](real x) { return !(x <= 50); });
        EXPECT_TRUE(compare(k, z, 1, 0, int(z.size()))) << k.name;
        EXPECT_TRUE(compare(k, z, real(0.7), 1, int(z.size()) - 1)) << k.name;
        Noise noise;
        for (int n = 0; n <= 100; n++) {
            Vector some = noise.vector(102);
            for (real& x : some) x *= 30;
            EXPECT_TRUE(compare(k, some, real(0.3), 1, n)) << k.name << ", n " << n;
            for (real special : {-inf, inf, real(std::nan(""))}) {
                some[size_t(1 + n / 3)] = special;
                EXPECT_TRUE(compare(k, some, real(0.3), 1, n)) << k.name << ", " << n << " with " << special;
            }
            EXPECT_TRUE(compare(k, Vector(102, -inf), 1, 1, n)) << k.name << ", n " << n << ", -inf alone";
        }
    }
}
TEST(FastCpu, SiluTimesEqualsPlain) {
    for (const Kernels& k : fast_kernels()) {
        Noise noise;
        Vector z = all_kinds_of_numbers(), up = activations(1, int(z.size()), true, noise);
        Vector expected = z, out = z;
        silu_times_plain(expected.data(), up.data(), int(z.size()));
        k.silu_times(out.data(), up.data(), int(z.size()));
        EXPECT_TRUE(same_bits(expected, out)) << k.name;
        for (int n = 0; n <= 40; n++) {
            expected.assign(z.end() - 60, z.end()), out = expected;
            silu_times_plain(expected.data() + 1, up.data(), n), k.silu_times(out.data() + 1, up.data(), n);
            EXPECT_TRUE(same_bits(expected, out)) << k.name << ", n " << n;
        }
    }
}

// -- choose_kernels ---------------------------------------------------------------------------------

TEST(ChooseKernels, TakesTheLastOfTheList) {
    ScopedKernels before(kernels);
    choose_kernels("", false);
    EXPECT_STREQ(kernels.name, available_kernels().back().name);
}
TEST(ChooseKernels, TakesWhatIsAskedFor) {
    ScopedKernels before(kernels);
    for (const Kernels& k : available_kernels()) {
        choose_kernels(k.name, false);
        EXPECT_STREQ(kernels.name, k.name);
        EXPECT_EQ(kernels.target, k.target);
    }
}
TEST(ChooseKernels, ExactLeavesTheIntegersOut) {
    ScopedKernels before(kernels);
    for (const Kernels& k : available_kernels()) {
        choose_kernels(k.name, true);
        EXPECT_FALSE(kernels.integers) << k.name;
        EXPECT_STREQ(kernels.name, k.name);
        choose_kernels(k.name, false);
        EXPECT_EQ(kernels.integers, sizeof(real) == 4) << k.name;
    }
}
TEST(ChooseKernels, RefusesWhatThisProcessorLacks) {
    ScopedKernels before(kernels);
    EXPECT_TRUE(refuses([] { choose_kernels("avx9", false); }, "avx9"));
}
TEST(ChooseKernels, PlainComesFirst) { EXPECT_STREQ(available_kernels()[0].name, "plain"); }
