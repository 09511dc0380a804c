// Weights of every dtype: random ones, and what the definitions of the formats say that they are worth.
#pragma once
#include "unit.h"

constexpr Dtype QUANTISED[] = {Dtype::Q4_0, Dtype::Q4_1, Dtype::Q5_0, Dtype::Q5_1, Dtype::Q8_0, Dtype::Q2_K,
                               Dtype::Q3_K, Dtype::Q4_K, Dtype::Q5_K, Dtype::Q6_K, Dtype::IQ4_NL,
                               Dtype::IQ4_XS};
constexpr Dtype ALL_DTYPES[] = {Dtype::F64,  Dtype::F32,  Dtype::BF16, Dtype::F16,  Dtype::F8_E4M3,
                                Dtype::Q4_0, Dtype::Q4_1, Dtype::Q5_0, Dtype::Q5_1, Dtype::Q8_0,
                                Dtype::Q2_K, Dtype::Q3_K, Dtype::Q4_K, Dtype::Q5_K, Dtype::Q6_K,
                                Dtype::IQ4_NL, Dtype::IQ4_XS};

// -- values by definition ---------------------------------------------------------------------------

inline bool same_value(double a, double b) {
    return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

// The value of a floating-point code with `exponent_bits` and `fraction_bits`, as IEEE 754 defines it:
// subnormals below exponent 1, and for `has_infinity` the largest exponent is infinity and NaN.
inline double value_of(uint32_t code, int exponent_bits, int fraction_bits, bool has_infinity) {
    int bias = (1 << (exponent_bits - 1)) - 1, e = int(code >> fraction_bits) & ((1 << exponent_bits) - 1);
    double f = double(code & ((1u << fraction_bits) - 1)) / (1 << fraction_bits);
    double sign = (code >> (exponent_bits + fraction_bits)) & 1 ? -1 : 1;
    if (has_infinity && e == (1 << exponent_bits) - 1) return f != 0 ? std::nan("") : sign * INFINITY;
    return sign * (e ? std::pow(2.0, e - bias) * (1 + f) : std::pow(2.0, 1 - bias) * f);
}

// A quantised block: value i is d scale[i] q[i] - m minimum[i]. The formats as llama.cpp's ggml-common.h lays
// them out, read from front to back: each loop meets the values in the order of the row.
struct Defined {
    double d = 0, m = 0;
    std::vector<int> q, scale, minimum;

    void add(int value, int its_scale, int its_minimum) {
        q.push_back(value), scale.push_back(its_scale), minimum.push_back(its_minimum);
    }
    // Exact: 11 bits of d, 8 of scale and 8 of q, and likewise for m, within 64.
    long double value(size_t i) const {
        return (long double)(d) * scale[i] * q[i] - (long double)(m) * minimum[i];
    }
};

inline double half_at(const uint8_t* p) { return value_of(uint32_t(p[0] + 256 * p[1]), 5, 10, true); }

inline void define_of_32(Defined& b, const uint8_t* p, int bits, bool minimum) {
    b.d = half_at(p), p += 2;
    if (minimum) b.m = half_at(p), p += 2;
    const uint8_t *high = p, *low = bits == 5 ? p + 4 : p;
    for (int i = 0; i < 32; i++) {
        int q = i < 16 ? low[i] % 16 : low[i - 16] / 16;
        if (bits == 5 && (high[i / 8] >> i % 8) % 2) q += 16;
        b.add(minimum ? q : q - (1 << (bits - 1)), 1, minimum ? -1 : 0);
    }
}
inline void define_q8_0(Defined& b, const uint8_t* p) {
    b.d = half_at(p);
    for (int i = 0; i < 32; i++) b.add(p[2 + i] < 128 ? p[2 + i] : p[2 + i] - 256, 1, 0);
}
inline void define_q2_k(Defined& b, const uint8_t* p) {
    b.d = half_at(p + 80), b.m = half_at(p + 82);
    const uint8_t *scale = p, *q = p + 16;
    for (int half = 0; half < 2; half++, q += 32) {
        for (int power = 1; power <= 64; power *= 4) {
            for (int l = 0; l < 32; l++) b.add(q[l] / power % 4, scale[l / 16] % 16, scale[l / 16] / 16);
            scale += 2;
        }
    }
}
inline void define_q3_k(Defined& b, const uint8_t* p) {
    b.d = half_at(p + 108);
    const uint8_t *high = p, *q = p + 32, *packed = p + 96;
    int scale[16], k = 0, mask = 1;
    for (int i = 0; i < 16; i++) {
        scale[i] = i < 8 ? packed[i] % 16 : packed[i - 8] / 16;
        scale[i] += 16 * (packed[8 + i % 4] / (i < 4 ? 1 : i < 8 ? 4 : i < 12 ? 16 : 64) % 4) - 32;
    }
    for (int half = 0; half < 2; half++, q += 32) {
        for (int power = 1; power <= 64; power *= 4, mask *= 2, k += 2) {
            for (int l = 0; l < 32; l++)
                b.add(q[l] / power % 4 - (high[l] & mask ? 0 : 4), scale[k + l / 16], 0);
        }
    }
}
inline void define_q4_q5_k(Defined& b, const uint8_t* p, bool five) {
    b.d = half_at(p), b.m = half_at(p + 2);
    const uint8_t *s = p + 4, *high = p + 16, *q = five ? p + 48 : p + 16;
    for (int j = 0; j < 8; j++) {
        int scale = j < 4 ? s[j] % 64 : s[j + 4] % 16 + 16 * (s[j - 4] / 64);
        int minimum = j < 4 ? s[j + 4] % 64 : s[j + 4] / 16 + 16 * (s[j] / 64);
        for (int l = 0; l < 32; l++) {
            int four = j % 2 ? q[l] / 16 : q[l] % 16;
            b.add(four + (five && high[l] & 1 << j ? 16 : 0), scale, minimum);
        }
        if (j % 2) q += 32;
    }
}
inline void define_q6_k(Defined& b, const uint8_t* p) {
    b.d = half_at(p + 208);
    const uint8_t *low = p, *high = p + 128, *scale = p + 192;
    for (int half = 0; half < 2; half++, low += 64, high += 32, scale += 8) {
        for (int quarter = 0; quarter < 4; quarter++) {
            for (int l = 0; l < 32; l++) {
                int byte = low[l + quarter % 2 * 32], four = quarter < 2 ? byte % 16 : byte / 16;
                int two = high[l] >> 2 * quarter & 3, s = scale[2 * quarter + l / 16];
                b.add(four + 16 * two - 32, s < 128 ? s : s - 256, 0);
            }
        }
    }
}
inline void define_iq4(Defined& b, const uint8_t* p, bool xs) {
    static const int TABLE[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    b.d = half_at(p);
    const uint8_t *high = p + 2, *low = p + 4, *q = xs ? p + 8 : p + 2;
    for (int j = 0; j < (xs ? 8 : 1); j++, q += 16) {
        int two = (high[0] + 256 * high[1]) >> 2 * j & 3, four = j % 2 ? low[j / 2] / 16 : low[j / 2] % 16;
        for (int l = 0; l < 32; l++)
            b.add(TABLE[l < 16 ? q[l] % 16 : q[l - 16] / 16], xs ? 16 * two + four - 32 : 1, 0);
    }
}
inline Defined define(Dtype dtype, const void* block) {
    Defined b;
    const uint8_t* p = static_cast<const uint8_t*>(block);
    switch (dtype) {
    case Dtype::Q4_0: define_of_32(b, p, 4, false); break;
    case Dtype::Q4_1: define_of_32(b, p, 4, true); break;
    case Dtype::Q5_0: define_of_32(b, p, 5, false); break;
    case Dtype::Q5_1: define_of_32(b, p, 5, true); break;
    case Dtype::Q8_0: define_q8_0(b, p); break;
    case Dtype::Q2_K: define_q2_k(b, p); break;
    case Dtype::Q3_K: define_q3_k(b, p); break;
    case Dtype::Q4_K: define_q4_q5_k(b, p, false); break;
    case Dtype::Q5_K: define_q4_q5_k(b, p, true); break;
    case Dtype::Q6_K: define_q6_k(b, p); break;
    case Dtype::IQ4_NL: define_iq4(b, p, false); break;
    case Dtype::IQ4_XS: define_iq4(b, p, true); break;
    default: ADD_FAILURE() << "dtype " << int(dtype) << " has no blocks";
    }
    return b;
}

// Number i at p, of a dtype without blocks.
inline double number_at(Dtype dtype, const void* p, size_t i) {
    const char* at = static_cast<const char*>(p) + i * row_bytes(dtype, 1);
    switch (dtype) {
    case Dtype::F64: return load<double>(at);
    case Dtype::F32: return load<float>(at);
    case Dtype::BF16: return value_of(load<uint16_t>(at), 8, 7, true);
    case Dtype::F16: return value_of(load<uint16_t>(at), 5, 10, true);
    default: return (*at & 127) == 127 ? std::nan("") : value_of(load<uint8_t>(at), 4, 3, false);
    }
}

// -- random weights ---------------------------------------------------------------------------------

// TAME: numbers of a size that weights have. ANY: all bits at random, so NaN, infinities and subnormals too.
enum class Contents : uint8_t { TAME, ANY };

// Where the blocks of a quantised dtype have their f16 numbers.
inline std::vector<size_t> places_of_halves(Dtype dtype) {
    switch (dtype) {
    case Dtype::Q2_K: return {80, 82};
    case Dtype::Q3_K: return {108};
    case Dtype::Q6_K: return {208};
    case Dtype::Q4_1:
    case Dtype::Q5_1:
    case Dtype::Q4_K:
    case Dtype::Q5_K: return {0, 2};
    default: return {0};
    }
}

// The largest |scale q| of a quantised dtype.
inline int extreme_size(Dtype dtype) {
    static const std::map<Dtype, int> SIZE = {
        {Dtype::Q4_0, 8},      {Dtype::Q4_1, 15},     {Dtype::Q5_0, 16},      {Dtype::Q5_1, 31},
        {Dtype::Q8_0, 128},    {Dtype::Q2_K, 15 * 3}, {Dtype::Q3_K, 32 * 4},  {Dtype::Q4_K, 63 * 15},
        {Dtype::Q5_K, 63 * 31}, {Dtype::Q6_K, 128 * 32}, {Dtype::IQ4_NL, 127}, {Dtype::IQ4_XS, 32 * 127}};
    return SIZE.at(dtype);
}

inline std::string random_bytes(size_t n, Noise& noise) {
    std::string out;
    while (out.size() < n) {
        uint64_t eight = noise.rng.next();
        append_bytes(out, &eight, 8);
    }
    out.resize(n);
    return out;
}

// n numbers, a multiple of the dtype's block.
inline std::string random_weights(Dtype dtype, int n, Noise& noise, Contents contents = Contents::TAME) {
    std::string out = random_bytes(row_bytes(dtype, n), noise);
    if (contents == Contents::ANY) return out;
    if (!quantised(dtype) && dtype != Dtype::F64)
        return random_data(format_of(dtype).name, uint64_t(n), 0, 1, noise);
    size_t bytes = size_t(format_of(dtype).bytes);
    for (size_t at = 0; at < out.size(); at += bytes) {
        double number = noise.next();
        if (dtype == Dtype::F64) std::memcpy(out.data() + at, &number, 8);
        if (dtype == Dtype::F64) continue;
        for (size_t place : places_of_halves(dtype)) {           // the largest weight is between 1/2 and 4
            int exponent = 15 - std::ilogb(extreme_size(dtype)) - noise.below(2);
            uint16_t half = uint16_t((noise.rng.next() & 0x83FF) | uint64_t(exponent) << 10);
            std::memcpy(out.data() + at + place, &half, 2);
        }
    }
    return out;
}

// A matrix at an odd address. Its numbers by definition are those of `row` (e4m3 without scales).
struct RandomMatrix {
    std::string bytes, scale_bytes;
    Matrix matrix;

    RandomMatrix(Dtype dtype, int rows, int cols, uint64_t seed, Contents contents = Contents::TAME,
                 int first_row = 0) {
        Noise noise{{seed}};
        bytes = "x" + random_weights(dtype, rows * cols, noise, contents);
        bytes.shrink_to_fit();                           // so that a sanitizer sees a read beyond the end
        int blocks = ((first_row + rows + 127) / 128) * ((cols + 127) / 128);
        scale_bytes = "y" + random_data("F32", uint64_t(blocks), 1, 0.5, noise);
        const void* scale = dtype == Dtype::F8_E4M3 ? scale_bytes.data() + 1 : nullptr;
        matrix = {reinterpret_cast<const std::byte*>(bytes.data() + 1), static_cast<const std::byte*>(scale),
                  dtype, rows, cols, first_row, 0};
    }
    RandomMatrix(const RandomMatrix&) = delete;

    size_t cols() const { return size_t(matrix.cols); }
    const char* row_at(int r) const {
        return bytes.data() + 1 + size_t(r) * row_bytes(matrix.dtype, matrix.cols);
    }
    std::vector<Defined> blocks(int r) const {
        std::vector<Defined> out;
        size_t block = size_t(format_of(matrix.dtype).values), size = size_t(format_of(matrix.dtype).bytes);
        for (size_t i = 0; i < cols() / block; i++) out.push_back(define(matrix.dtype, row_at(r) + i * size));
        return out;
    }
    // Quantised values are rounded once, from the exact value to float.
    Vector row(int r) const {
        Vector out;
        if (!quantised(matrix.dtype)) {
            for (size_t i = 0; i < cols(); i++) out.push_back(real(number_at(matrix.dtype, row_at(r), i)));
            return out;
        }
        for (const Defined& b : blocks(r))
            for (size_t i = 0; i < b.q.size(); i++) out.push_back(real(float(b.value(i))));
        return out;
    }
    // Of the 128 columns from 128 k on.
    real scale(int r, size_t k) const {
        if (!matrix.scale) return 1;
        size_t row = size_t((matrix.first_row + r) / 128), blocks = (cols() + 127) / 128;
        return load<float>(scale_bytes.data() + 1 + 4 * (row * blocks + k));
    }
    // With the scale: one more rounding.
    Vector scaled_row(int r) const {
        Vector out = row(r);
        for (size_t i = 0; matrix.scale && i < out.size(); i++) out[i] *= scale(r, i / 128);
        return out;
    }
};

// The block whose weights are the largest of its format, d = 1 and m = 1.
inline std::string extreme_block(Dtype dtype) {
    bool minimums = places_of_halves(dtype).size() > 1;              // or values from -2^n to 2^n - 1
    std::string bytes(size_t(format_of(dtype).bytes), minimums ? '\xFF' : '\0');
    if (dtype == Dtype::Q8_0) bytes.assign(bytes.size(), '\x80');
    if (dtype == Dtype::Q6_K) std::fill_n(bytes.begin() + 192, 16, '\x80');                // scales of -128
    for (size_t place : places_of_halves(dtype)) bytes.replace(place, 2, std::string("\x00\x3C", 2));
    return bytes;
}

// -- activations in small integers ------------------------------------------------------------------

// A vector x in small integers by the definition of 5.2, in the order that the fast kernels read.
inline void quantise_plain(const IntRows& out, const real* x) {
    for (int b = 0; b < out.n / out.block; b++, x += out.block) {
        IntRows block = out.at(0, b);
        *block.d = quantise_block_plain(block.q, x, out.block);
        for (int i = 0; i < out.block; i++) {
            int16_t& sum = block.sums[i / GROUP];
            sum = int16_t((i % GROUP ? sum : 0) + block.q[i]);
        }
    }
}

// T vectors of n numbers, quantised by k.
struct Ints {
    std::vector<int8_t> q;
    std::vector<int16_t> sums;
    std::vector<float> d;
    IntRows rows;

    Ints(const Vector& x, int T, int block, const Kernels& k = {})
        : rows(int(x.size()) / T, block, T) {
        d.assign(size_t(rows.blocks(T)), 9999);
        q.assign(d.size() * size_t(block), 99), sums.assign(q.size() / GROUP, 9999);
        rows.q = q.data(), rows.sums = sums.data(), rows.d = d.data();
        auto quantise = k.target ? k.target->quantise : quantise_plain;
        for (int t = 0; t < T; t++) quantise(rows.vector(t), x.data() + size_t(t) * size_t(rows.n));
    }
    Ints(const Ints&) = delete;
};

// out[t][r] = W[r] . x[t] for the rows begin <= r < end, by the definitions of 5.1 and of 5.2.
inline void rows_plain(Rows out, ConstRows x, const Matrix& w, int T, int begin, int end) {
    for (int t = 0; t < T; t++)
        for (int r = begin; r < end; r++) out[t][r] = dot_row_plain(w, r, x[t]);
}
inline void int_rows_plain(Rows out, ConstRows x, const Matrix& w, int T, int begin, int end) {
    for (int t = 0; t < T; t++)
        for (int r = begin; r < end; r++) out[t][r] = int_dot_plain(w, r, x[t]);
}

// out: (T, w.rows)   x: (T, w.cols)   dense
inline void matmul(real* out, const real* x, const Matrix& w, int T) {
    matmul({out, w.rows}, {x, w.cols}, w, T);
}
