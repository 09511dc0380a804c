// deepseek on a GPU: the twin of deepseek.cpp.
//
// =================================================================================================
// Chapter 0. How to read this file
// =================================================================================================
//
// deepseek.cpp is included whole, and each of its operations gets a twin in `namespace cuda`: the same name,
// the same arguments, the same numbers out. Only the arrays lie in the memory of a GPU. Chapters have the
// numbers and the order of deepseek.cpp, so that both files can lie open side by side:
//
//   0   How to read this file      contents, the rule of the twins
//   1   Ground rules               threads, launches, errors, memory of the device
//   2   Numbers                    how a kernel reads a weight of each format
//   5   Small operations           softmax, matmul in three shapes, embed, rmsnorm, top_k
//   6   Positions                  RoPE, a thread a pair
//   7   Attention I: GQA           a block for eight queries, splits of the context and their merging
//   8   Attention II: MLA          the naive and the absorbed form, all heads in one launch
//   9   Feed-forward               SwiGLU
//   10  Mixture of experts         gates by rank, dispatch without atomics, all experts in one launch
//   11  The model                  uploading, the forward pass, a decoding step as a graph
//   12  Talking                    sampling where the logits lie
//   13  Multi-token prediction     the draft, on the device
//   14  FP8                        quantising, the GEMM, Hopper's accumulator among sixteen threads
//   15  Many machines              dispatch and combine through windows of peers, flags, two forms
//   22  Command line               deepseek check
//
// What does a GPU change? Not what is computed. A sum has the same order as on the CPU, sixteen lanes and a
// tree (chapter 5 there), for a half-warp is sixteen threads: lane j is thread j. So most twins give the same
// bits, and `deepseek check` compares them with ==. Where a sum over the context is split among blocks
// (chapter 7) the order is another one, and the bound on the difference is derived there.
//
// Three things have to be decided for each kernel, and its comment says them: what a thread owns, what is
// read once for many uses, and who waits for whom. All of it is portable CUDA for any GPU from sm_80 on. What
// a kernel computes never depends on the number of blocks, of tokens or of splits.
//
// Without a GPU the same text is compiled as host C++ against an emulator (tests/gpu): SHARED, launch and the
// functions of a warp are what it puts something else behind.

#include "deepseek.cpp"

#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#if defined(__CUDACC__)
#define SHARED(T, name, count) __shared__ T name[count]
#define DYNAMIC_SHARED(T, name)                                                                          \
    extern __shared__ __align__(16) unsigned char dynamic_shared[];                                      \
    T* const name = reinterpret_cast<T*>(dynamic_shared)
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
            Args... args) {
    kernel<<<grid, block, shared, stream>>>(static_cast<Params>(args)...);
}
#else
#include "cuda_emulator.h"
#endif

static_assert(sizeof(real) == 4, "the twins compute in f32");

// The two have one signature; where a name has several, the type says which is meant.
#define TWIN(f) static_assert(std::is_same_v<decltype(&::f), decltype(&cuda::f)>, #f ": signature drifted")
#define TWIN_OF(f, ...)                                                                                  \
    static_assert(std::is_same_v<decltype(static_cast<__VA_ARGS__>(&::f)),                               \
                                 decltype(static_cast<__VA_ARGS__>(&cuda::f))>)

// =================================================================================================
// Chapter 1. Ground rules
// =================================================================================================
//
// A kernel is a function that thousands of threads run at once. Each finds its part from the numbers of its
// block and of itself in the block. Thirty-two neighbours are a warp: they read memory together, best when
// they read neighbouring numbers, and can hand each other values without memory (shuffles). Here a warp is
// mostly two half-warps of sixteen threads, each with a sum of its own.
//
//      grid   --  blocks, in any order, some of them at the same time
//      block  --  128 threads, four warps, eight half-warps; they share memory and can wait for each other
//
// Blocks cannot wait for each other: where one needs what others made, a new kernel begins. All kernels go
// into one queue, in the order of the calls.
//
// A kernel's mistake is seen when the host next waits for the queue. Every call of the run time is checked,
// and an error is one line.

namespace cuda {

constexpr int THREADS = 128, HALF = 16, HALVES = THREADS / HALF;
constexpr unsigned ALL_LANES = ~0u;

inline cudaStream_t queue = nullptr;

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) fail("cuda: %s: %s", what, cudaGetErrorString(error));
}

// Waits until everything that was asked for is done.
inline void wait() { check(cudaStreamSynchronize(queue), "a kernel"); }

inline void send(void* to, const void* from, size_t bytes) {         // `from` may change afterwards
    if (bytes) check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, queue), "a copy to the device");
}
inline void read(void* to, const void* from, size_t bytes) {         // waits
    if (bytes)
        check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, queue), "a copy from the device");
    wait();
}

inline unsigned ceil_div(int64_t n, int64_t by) { return unsigned((n + by - 1) / by); }

// kernel(args...) on a grid of blocks of THREADS threads, which share so many bytes besides what the kernel
// declares; nothing where the grid is empty.
template <class... Params, class... Args>
void start_sharing(size_t bytes, void (*kernel)(Params...), dim3 grid, Args... args) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    launch(kernel, grid, dim3(THREADS), bytes, queue, args...);
    check(cudaGetLastError(), "a launch");
}
template <class... Params, class... Args>
void start(void (*kernel)(Params...), dim3 grid, Args... args) {
    start_sharing(0, kernel, grid, args...);
}

// A thread for each of n items.
template <class... Params, class... Args>
void start_each(void (*kernel)(Params...), int64_t n, Args... args) {
    start(kernel, dim3(ceil_div(n, THREADS)), args...);
}
__device__ inline int64_t item() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

__device__ inline int half_of_block() { return int(threadIdx.x) / HALF; }
__device__ inline int half_lane() { return int(threadIdx.x) % HALF; }

// std::min takes references, and a constant of the host has no address in a kernel.
__device__ inline int min(int a, int b) { return a < b ? a : b; }
__device__ inline int max(int a, int b) { return a > b ? a : b; }

// The tree of ::sum_lanes over a half-warp: every thread gets the sum. All 32 lanes of a warp must take part.
template <class T> __device__ T sum_lanes(T x) {
    for (int apart = HALF / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(ALL_LANES, x, apart, HALF);
    return x;
}
template <class T> __device__ T max_lanes(T x) {
    for (int apart = HALF / 2; apart > 0; apart /= 2) {
        T other = __shfl_xor_sync(ALL_LANES, x, apart, HALF);
        x = other > x ? other : x;
    }
    return x;
}

// An array in the device's memory, and copies of it. It is not initialised.
template <class T> class Buffer {
public:
    explicit Buffer(size_t n = 0) : n_(n) {
        if (n) check(cudaMalloc(reinterpret_cast<void**>(&data_), n * sizeof(T)), "memory");
    }
    explicit Buffer(const std::vector<T>& v) : Buffer(v.size()) { send(data_, v.data(), n_ * sizeof(T)); }
    ~Buffer() { if (data_) cudaFree(data_); }
    Buffer(Buffer&& other) noexcept { *this = std::move(other); }
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(data_, other.data_), std::swap(n_, other.n_);
        return *this;
    }
    T* data() const { return data_; }
    size_t size() const { return n_; }
    std::vector<T> host() const {
        std::vector<T> v(n_);
        read(v.data(), data_, n_ * sizeof(T));
        return v;
    }

private:
    T* data_ = nullptr;
    size_t n_ = 0;
};

}

// =================================================================================================
// Chapter 2. Numbers
// =================================================================================================
//
// Weights lie on the device as in the file: eight bits stay eight bits until a thread multiplies with them. A
// kernel is compiled once for each format, and value<D> is what makes them different. All widenings are
// exact, those of chapter 2 of deepseek.cpp; what a conversion there does with branches and the C library, a
// thread does with bits.

namespace cuda {

// -- 2.1  widening -------------------------------------------------------------------------------

// The bits of e4m3, moved to where f32 has its exponent, are the number times 2^-120; subnormal ones too.
__device__ inline float e4m3_to_float(uint8_t b) {
    float magnitude = __uint_as_float(uint32_t(b & 127) << 20) * 0x1p120f;
    if ((b & 127) == E4M3_NAN) return __uint_as_float(0x7FC00000);
    return b & 128 ? -magnitude : magnitude;
}

__device__ inline float f16_at(const void* p) { return __half2float(*static_cast<const __half*>(p)); }

// Number i of a row of blocks: scale q - minimum, rounded as ::dequantise rounds.
template <Dtype D> __device__ float block_value(const std::byte* row, int i) {
    constexpr Format F = format_of(D);
    constexpr BlockLayout L = layout_of(D);
    const int at = i % F.values, group = at / GROUP;
    Bytes p = reinterpret_cast<Bytes>(row) + int64_t(i / F.values) * F.bytes;
    GroupScale s = group_scale<D>(p, group);
    int q = L.low.get(p, group * GROUP, at % GROUP);
    if constexpr (L.high.bits > 0) q |= L.high.get(p, group * GROUP, at % GROUP) << L.low.bits;
    float scale = f16_at(p + L.d) * float(s.scale);
    float minimum = L.m < 0 ? 0 : f16_at(p + (L.m < 0 ? 0 : L.m)) * float(s.minimum);
    return scale * float(integer_of<D>(q)) - minimum;
}

// Number i of a token of 656 bytes.
__device__ inline float latent_value(const std::byte* row, int i) {
    const auto* scale = reinterpret_cast<const float*>(row + LATENT_SCALED);
    const auto* rope = reinterpret_cast<const uint16_t*>(row + LATENT_ROPE);
    if (i >= LATENT_SCALED) return bf16_to_float(rope[i - LATENT_SCALED]);
    return cuda::e4m3_to_float(uint8_t(row[i])) * scale[i / SCALE_BLOCK];
}

// Number i of a row. Of e4m3 without its scale.
template <Dtype D> __device__ float value(const std::byte* row, int i) {
    if constexpr (D == Dtype::F32) return reinterpret_cast<const float*>(row)[i];
    else if constexpr (D == Dtype::BF16) return bf16_to_float(reinterpret_cast<const uint16_t*>(row)[i]);
    else if constexpr (D == Dtype::F16) return f16_at(row + 2 * int64_t(i));
    else if constexpr (D == Dtype::F8_E4M3) return cuda::e4m3_to_float(uint8_t(row[i]));
    else if constexpr (D == Dtype::F8_LATENT) return latent_value(row, i);
    else return block_value<D>(row, i);
}

// body.operator()<D>() for a format that kernels read
template <class Body> void for_dtype(Dtype dtype, const Body& body) {
    switch (dtype) {
    case Dtype::F64:
    case Dtype::F8_LATENT: fail("--device cuda: %s weights are not supported", format_of(dtype).name);
    case Dtype::F32: return body.template operator()<Dtype::F32>();
    case Dtype::BF16: return body.template operator()<Dtype::BF16>();
    case Dtype::F16: return body.template operator()<Dtype::F16>();
    case Dtype::F8_E4M3: return body.template operator()<Dtype::F8_E4M3>();
    default: return for_format(dtype, body);
    }
}

// -- 2.2  Stack: matrices evenly apart -----------------------------------------------------------

// Matrices of one shape and format, at even distances: all heads of W^UK, all experts of a layer, or a single
// one. A kernel that works on all of them gets the first and the distances, and no list.
struct Stack {
    const std::byte *data, *scale;
    int rows, cols, first_row, pairs;
    int64_t row_bytes;
    int64_t next = 0, next_scale = 0;      // bytes to the next matrix
    int next_first_row = 0;

    __device__ const std::byte* row(int g, int64_t r) const { return data + g * next + r * row_bytes; }
    // The scales of row r, one for each 128 columns.
    __device__ const float* scales(int g, int r) const {
        int64_t tile = (first_row + g * next_first_row + r) / SCALE_BLOCK;
        return reinterpret_cast<const float*>(scale + g * next_scale) + tile * scale_blocks(cols);
    }
};

inline Stack stack_of(const Matrix& w) {
    return {w.data, w.scale, w.rows, w.cols, w.first_row, w.pairs, w.row(1) - w.row(0)};
}

// get(i): the i-th of n matrices
template <class Get> Stack stack_of(size_t n, const Get& get) {
    Stack s = stack_of(get(0));
    if (n < 2) return s;
    s.next = get(1).data - s.data, s.next_first_row = get(1).first_row - s.first_row;
    s.next_scale = get(1).scale - s.scale;
    for (size_t i = 0; i < n; i++) {
        const Matrix& w = get(i);
        bool even = w.data - s.data == int64_t(i) * s.next &&
                    w.scale - s.scale == int64_t(i) * s.next_scale &&
                    w.first_row - s.first_row == int(i) * s.next_first_row;
        CHECK(even && w.dtype == get(0).dtype && w.rows == s.rows && w.cols == s.cols,
              "matrix %zu is not where the first two say", i);
    }
    return s;
}

}

// =================================================================================================
// Chapter 5. Small operations
// =================================================================================================
//
// A decoding step multiplies one vector with every weight of the model: two operations for each weight that
// is read. It takes as long as reading does, and all that counts is that neighbours read neighbouring bytes.
// A prompt multiplies many vectors with the same weights, so a thread keeps several sums and each number that
// it reads serves several of them:
//
//                  x[t]  x[t+1] ... x[t+7]         a half-warp, 4 rows x 8 tokens: thread j reads
//      w[r]         .     .          .             numbers j, j + 16, j + 32 ... of 12 vectors and keeps
//      w[r+1]       .     .          .             lane j of 32 dots. In the end the sixteen threads add
//      w[r+2]       .     .          .             their lanes in the tree of chapter 5.
//      w[r+3]       .     .          .
//
// That is the definition's own order, so the bits are the CPU's. Weights of llama.cpp's formats are
// dequantised as they are read: what is equal is the CPU's --exact, not its sum of small integers.

namespace cuda {

// -- 5.1  softmax, silu: each row, each number ---------------------------------------------------

// Row z (n) of a half-warp; a half-warp without one passes n = 0. z is left as e^(scale z - top), and `sum`
// is theirs; where all are -inf it is 0, and a quotient by it NaN, as it should be.
template <class Row> __device__ void exp_row(const Row& z, float scale, int n, float& top, float& sum) {
    top = -std::numeric_limits<float>::infinity(), sum = 0;
    for (int i = half_lane(); i < n; i += HALF) {
        z[i] = z[i] * scale;
        top = z[i] > top ? float(z[i]) : top;
    }
    top = max_lanes(top);
    const float shift = top == -std::numeric_limits<float>::infinity() ? 0 : top;
    for (int i = half_lane(); i < n; i += HALF) z[i] = exp_of(z[i] - shift), sum += z[i];
    sum = sum_lanes(sum);
}

// A half-warp a row.
__global__ void softmax_kernel(Rows z, float scale, int T, int n) {
    int t = int(blockIdx.x) * HALVES + half_of_block();
    float* row = t < T ? z[t] : nullptr;
    float top, sum;
    exp_row(row, scale, row ? n : 0, top, sum);
    for (int i = half_lane(); row && i < n; i += HALF) row[i] /= sum;
}
inline void softmax(Rows z, real scale, int T, int n) {
    start(softmax_kernel, dim3(ceil_div(T, HALVES)), z, scale, T, n);
}
TWIN(softmax);

__global__ void silu_times_kernel(float* gate, const float* up, int64_t n) {
    int64_t i = item();
    if (i < n) gate[i] = gate[i] / (1 + exp_of(-gate[i])) * up[i];
}
inline void silu_times(real* gate, const real* up, int width, int T) {
    start_each(silu_times_kernel, int64_t(width) * T, gate, up, int64_t(width) * T);
}
TWIN(silu_times);

__global__ void add_kernel(float* out, const float* x, int64_t n, int64_t period) {
    int64_t i = item();
    if (i < n) out[i] += x[i % period];
}
inline void add(real* out, const real* x, size_t n) {
    start_each(add_kernel, int64_t(n), out, x, int64_t(n), int64_t(n));
}
inline void add_bias(real* out, std::span<const real> bias, int T) {
    int64_t n = int64_t(bias.size());
    start_each(add_kernel, n * T, out, bias.data(), n * T, n);
}
TWIN(add);
TWIN(add_bias);

// -- 5.2  matmul ---------------------------------------------------------------------------------

// What one launch multiplies: T vectors with one matrix; or with each of several, `next_out` and `next_x`
// numbers further; or, where `first` says which rows of `out` are whose (10.2), each with its own.
struct Batch {
    Rows out;
    ConstRows x;
    Stack w;
    int T, groups = 1;
    int64_t next_out = 0, next_x = 0;
    const int* first = nullptr;            // (groups + 1)
    const int* token = nullptr;            // (T): the row of x for each row of out; none: the same
};

// The group of a slot: the last whose first slot is not behind it.
__device__ inline int group_of(const int* first, int groups, int slot) {
    int low = 0, high = groups;            // first[low] <= slot < first[high]
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (first[middle] <= slot) low = middle;
        else high = middle;
    }
    return low;
}

// The rows of `out` that a block works on.
struct Tile {
    int group, begin, end;                 // begin >= end: nothing to do
};
// Blocks count rows where groups have rows of their own: only the first of each TT has something to do.
template <int TT> __device__ Tile tile_of(const Batch& b) {
    if (!b.first) return {int(blockIdx.z), int(blockIdx.x) * TT, b.T};
    int slot = int(blockIdx.x), group = group_of(b.first, b.groups, slot);
    bool begins = (slot - b.first[group]) % TT == 0;
    return {group, slot, begins ? b.first[group + 1] : slot};
}

// Each half-warp R rows of W and TT vectors. What lies beyond the last row or vector is computed from the
// last one again, and not written: so the threads of a warp stay together.
template <Dtype D, int R, int TT> __global__ void by_rows_kernel(Batch b) {
    constexpr bool SCALED = D == Dtype::F8_E4M3;
    const Tile tile = tile_of<TT>(b);
    if (tile.begin >= tile.end) return;
    const int g = tile.group, last = b.w.rows - 1, cols = b.w.cols;
    const int r0 = (int(blockIdx.y) * HALVES + half_of_block()) * R;
    const std::byte* w[R];
    const float* x[TT];
    for (int r = 0; r < R; r++) w[r] = b.w.row(g, min(r0 + r, last));
    for (int t = 0; t < TT; t++) {
        int row = min(tile.begin + t, tile.end - 1);
        x[t] = b.x[b.token ? b.token[row] : row] + g * b.next_x;
    }
    float sum[R][TT] = {};
    for (int begin = 0, block = 0; begin < cols; begin += SCALED ? SCALE_BLOCK : cols, block++) {
        float part[R][TT] = {};
        const int end = SCALED ? min(begin + SCALE_BLOCK, cols) : cols;
        for (int i = begin + half_lane(); i < end; i += HALF) {
            for (int r = 0; r < R; r++) {
                const float v = value<D>(w[r], i);
                for (int t = 0; t < TT; t++) part[r][t] = std::fma(v, x[t][i], part[r][t]);
            }
        }
        for (int r = 0; r < R; r++) {
            const float s = SCALED ? b.w.scales(g, min(r0 + r, last))[block] : 1;
            for (int t = 0; t < TT; t++) sum[r][t] = SCALED ? std::fma(s, part[r][t], sum[r][t]) : part[r][t];
        }
    }
    for (int i = 0; i < R * TT; i++) {
        const int r = r0 + i / TT, t = tile.begin + i % TT;
        const float y = sum_lanes(sum[i / TT][i % TT]);
        if (half_lane() != i % HALF || r > last || t >= tile.end) continue;
        const int at = b.w.pairs ? r / b.w.pairs * b.w.pairs + place_in_head(r % b.w.pairs, b.w.pairs) : r;
        b.out[t][g * b.next_out + at] = y;
    }
}

// One vector: the rows of W go to as many half-warps as there are. Several: 4 x 8.
inline void by_rows(Dtype dtype, const Batch& b) {
    const unsigned groups = b.first ? 1 : unsigned(b.groups);
    for_dtype(dtype, [&]<Dtype D>() {
        if (b.T == 1 || (b.first && b.T <= b.groups)) {
            start(by_rows_kernel<D, 1, 1>, dim3(unsigned(b.T), ceil_div(b.w.rows, HALVES), groups), b);
        } else {
            dim3 grid(b.first ? unsigned(b.T) : ceil_div(b.T, 8), ceil_div(b.w.rows, HALVES * 4), groups);
            start(by_rows_kernel<D, 4, 8>, grid, b);
        }
    });
}

// out[t] = W^T x[t]: a thread a column, its sums over the rows in their order, for up to eight vectors.
template <Dtype D> __global__ void by_columns_kernel(Batch b) {
    constexpr int TT = 8;
    const int i = int(item()), g = int(blockIdx.z), t0 = int(blockIdx.y) * TT;
    if (i >= b.w.cols) return;
    float sum[TT] = {};
    for (int j = 0; j < b.w.rows; j++) {
        float v = value<D>(b.w.row(g, j), i);
        if (D == Dtype::F8_E4M3) v *= b.w.scales(g, j)[i / SCALE_BLOCK];
        for (int t = 0; t < TT; t++)
            sum[t] = std::fma(b.x[min(t0 + t, b.T - 1)][g * b.next_x + j], v, sum[t]);
    }
    for (int t = 0; t < TT && t0 + t < b.T; t++) b.out[t0 + t][g * b.next_out + i] = sum[t];
}
inline void by_columns(Dtype dtype, const Batch& b) {
    for_dtype(dtype, [&]<Dtype D>() {
        start(by_columns_kernel<D>, dim3(ceil_div(b.w.cols, THREADS), ceil_div(b.T, 8), unsigned(b.groups)),
              b);
    });
}

inline void matmul(std::span<const Product> products) {
    for (const Product& p : products) {
        CHECK(!p.w->transposed, "%d x %d", p.w->rows, p.w->cols);
        by_rows(p.w->dtype, {p.out, p.x, stack_of(*p.w), p.T});
    }
}
// Whichever of W and W^T is stored: sums over what lies in a row, or over the rows.
inline void matmul(Rows out, ConstRows x, const Matrix& w, int T) {
    (w.transposed ? by_columns : by_rows)(w.dtype, {out, x, stack_of(w.stored()), T});
}
inline void matmul_transposed(Rows out, ConstRows x, const Matrix& w, int T) {
    (w.transposed ? by_rows : by_columns)(w.dtype, {out, x, stack_of(w.stored()), T});
}
TWIN_OF(matmul, void (*)(std::span<const Product>));
TWIN_OF(matmul, void (*)(Rows, ConstRows, const Matrix&, int));
TWIN(matmul_transposed);

// -- 5.3  embed, rmsnorm -------------------------------------------------------------------------

// A thread a number of out (T, w.cols): rows ids[t] of W, or 0, 1, ... without ids.
template <Dtype D> __global__ void widen_kernel(Rows out, Stack w, const int* ids, int T) {
    const int64_t t = item() / w.cols;
    const int i = int(item() % w.cols);
    if (t >= T) return;
    const int r = ids ? ids[t] : int(t);
    const float v = value<D>(w.row(0, r), i);
    out[t][i] = D == Dtype::F8_E4M3 ? v * w.scales(0, r)[i / SCALE_BLOCK] : v;
}
inline void widen_rows(Rows out, const Matrix& w, const int* ids, int T) {
    for_dtype(w.dtype, [&]<Dtype D>() {
        start_each(widen_kernel<D>, int64_t(T) * w.cols, out, stack_of(w), ids, T);
    });
}
inline void embed(Rows out, const Matrix& w, std::span<const int> ids) {
    widen_rows(out, w, ids.data(), int(ids.size()));
}
TWIN(embed);

// A block a token. Each half-warp sums the squares, all the same sum: that costs less than to hand it on.
__global__ void rmsnorm_kernel(Rows out, ConstRows x, const float* w, int n, float eps) {
    const float* row = x[blockIdx.x];
    float sum = 0;
    for (int i = half_lane(); i < n; i += HALF) sum = std::fma(row[i], row[i], sum);
    const float scale = 1 / std::sqrt(sum_lanes(sum) / float(n) + eps);
    __syncthreads();                       // `out` may be `x`, which others still read
    for (int i = int(threadIdx.x); i < n; i += THREADS) out[blockIdx.x][i] = row[i] * scale * w[i];
}
inline void rmsnorm(Rows out, ConstRows x, std::span<const real> w, int64_t T, double eps) {
    start(rmsnorm_kernel, dim3(unsigned(T)), out, x, w.data(), int(w.size()), float(eps));
}
TWIN(rmsnorm);

// -- 5.4  top_k: by rank -------------------------------------------------------------------------

// How many of the n numbers come before number i: the larger, and of equal ones those with a lower index. NaN
// is the last of all. What comes at place r is known without sorting, and each thread finds its own.
template <class Row> __device__ int rank_of(const Row& v, int n, int i) {
    auto key = [&](int j) {
        const float z = v[j];
        return z == z ? z : -std::numeric_limits<float>::infinity();
    };
    const float mine = key(i);
    int rank = 0;
    for (int j = 0; j < n; j++) rank += key(j) > mine || (key(j) == mine && j < i);
    return rank;
}

__global__ void top_k_kernel(int* idx, const float* v, int n, int k) {
    const int i = int(item());
    if (i >= n) return;
    const int rank = rank_of(v, n, i);
    if (rank < k) idx[rank] = i;
}
inline void top_k(int* idx, const real* v, int n, int k) { start_each(top_k_kernel, n, idx, v, n, k); }
TWIN(top_k);

}

// =================================================================================================
// Chapter 6. Positions
// =================================================================================================
//
// A pair is turned by one thread, which reads both numbers before it writes either; so it can happen in
// place. The angles are the host's: their cosines come from its C library, in double, rounded once, and a
// kernel that computed them again would turn by other last bits. For a step they are a few hundred bytes.

namespace cuda {

// -- 6.1  rope_interleaved, rope_half ------------------------------------------------------------

// The thread's pair: numbers `a` and `b` of a head.
struct Pair {
    int64_t t, h;
    int i;                                 // t < 0: there is none
};
__device__ inline Pair pair_of(const Heads& x, int dim) {
    int64_t at = item(), pairs = dim / 2, t = at / pairs / x.H;
    return {t < x.T ? t : -1, at / pairs % x.H, int(at % pairs)};
}

__global__ void rope_interleaved_kernel(Heads x, const float* cos_sin, int dim) {
    const Pair p = pair_of(x, dim);
    if (p.t < 0) return;
    float* head = x.at(p.t, p.h);
    rotate(head[2 * p.i], head[2 * p.i + 1], cos_sin + p.t * dim + 2 * p.i);
}
__global__ void rope_half_kernel(Heads x, const float* cos_sin, int dim) {
    const Pair p = pair_of(x, dim);
    if (p.t < 0) return;
    float* head = x.at(p.t, p.h);
    rotate(head[p.i], head[p.i + dim / 2], cos_sin + p.t * dim + 2 * p.i);
}
inline void rope_interleaved(const Heads& x, const real* cos_sin, int dim) {
    start_each(rope_interleaved_kernel, int64_t(x.T) * x.H * (dim / 2), x, cos_sin, dim);
}
inline void rope_half(const Heads& x, const real* cos_sin, int dim) {
    start_each(rope_half_kernel, int64_t(x.T) * x.H * (dim / 2), x, cos_sin, dim);
}
TWIN(rope_interleaved);
TWIN(rope_half);

}

// =================================================================================================
// Chapter 7. Attention I: GQA
// =================================================================================================
//
// Two loops again, q . k and p v, and between them a softmax that needs all scores of a query. What is one
// buffer of scores on the CPU would be too large for a block here: so the context is cut into splits of 256
// positions. A block takes eight queries that look at the same keys (neighbours in (t, h): the heads of a
// group, and of the next tokens) and one split after the other:
//
//      half-warp j:  dots of keys j, j + 8, ...  with the eight queries     scores (8, 256), shared
//      half-warp q:  softmax of query q's scores                            top, sum
//      thread i:     out[q][i] = sum over the split of p[q][j] v[j][i]
//
// Each key and value is read once for eight queries. Results of splits are put together two at a time: with
// tops m, sums l (of e^(score - m)) and outputs o,
//
//      m = max(m1, m2)    a = l1 e^(m1 - m)    b = l2 e^(m2 - m)    l = a + b    o = o1 a/l + o2 b/l
//
// One decoded token has few queries, so its splits go to blocks of their own, as many as the context has, and
// a second kernel puts them together; a prompt has queries enough, and a block does both. The splits are the
// same, and so is the order of putting together: the same bits. FlashMLA and FlashDecoding choose the number
// of splits by the batch; then a sequence's answer depends on its neighbours.
//
// Up to 256 positions the bits are the CPU's. Beyond, the two differ by what either rounds: a chain of n
// products once a position, putting together five times a split. Every partial sum is at most the largest
// |v|, so the bound is 4 (n + 5 n / 256) 2^-24 of it; measured differences are a hundredth of that.

namespace cuda {

// -- 7.1  attend ---------------------------------------------------------------------------------

constexpr int SPLIT = 256, QUERIES = HALVES;

// The key heads of a layer, as the kernels get them, one for each blockIdx.z; or the one key head of as many
// conversations, a token each, whose rows are found through a table of pages (8.2).
struct KeyHeads {
    Rows out;
    ConstRows q;
    int64_t next_out, next_q;              // numbers to the next key head's queries
    Stack k, v;
    int heads, T;
    const int* n;                          // (T)
    float scale;
    int splits;                            // of the whole context
    float* partial = nullptr;              // of each query and split: top, sum, out (dv); none: put together
    const int* table = nullptr;            // (conversations, table_width); none: rows lie in order
    int table_width = 0;
    Rows lse = {nullptr, 0};               // (T, heads), or not asked for
    int64_t next_lse = 0;                  // numbers to the next key head's

    __device__ int queries() const { return T * heads; }
    __device__ int seen(int query) const { return table ? n[blockIdx.z] : n[query / heads]; }
    __device__ const std::byte* row(const Stack& s, int j) const {
        if (!table) return s.row(int(blockIdx.z), j);
        const int page = table[int64_t(blockIdx.z) * table_width + j / PAGE];
        return s.row(0, int64_t(page) * PAGE + j % PAGE);
    }
    __device__ float* output(int query) const {
        return out[query / heads] + blockIdx.z * next_out + query % heads * v.cols;
    }
    __device__ float* part(int query, int split) const {
        return partial + ((int64_t(blockIdx.z) * queries() + query) * splits + split) * (v.cols + 2);
    }
};

// Numbers i, i + 1, ... of shared memory as a row.
template <class Array> struct Slice {
    Array& array;
    int begin;
    __device__ decltype(auto) operator[](int i) const { return array[begin + i]; }
};

struct Weights {
    float old, now;
};
// How much what there was and what comes count; top and sum become those of both. A part whose scores are all
// -inf has the sum 0 and counts nothing.
__device__ inline Weights put_together(float& top, float& sum, float top2, float sum2) {
    if (sum2 == 0) return {1, 0};
    if (sum == 0) {
        top = top2, sum = sum2;
        return {0, 1};
    }
    const float both = top > top2 ? top : top2;
    const float a = sum * exp_of(top - both), b = sum2 * exp_of(top2 - both);
    top = both, sum = a + b;
    return {a / sum, b / sum};
}

__device__ inline float mixed(float old, float now, Weights w) {
    return w.now == 0 ? old : w.old == 0 ? now : old * w.old + now * w.now;   // 0 times NaN is no part of it
}

// p[q * SPLIT + j] = q . k of eight queries from `first` on and n positions from `begin` on.
template <Dtype D, class Array>
__device__ void scores(Array& p, const KeyHeads& a, int first, int begin, int n) {
    const float* q[QUERIES];
    for (int i = 0; i < QUERIES; i++) {
        const int query = min(first + i, a.queries() - 1);
        q[i] = a.q[query / a.heads] + blockIdx.z * a.next_q + query % a.heads * a.k.cols;
    }
    for (int j0 = 0; j0 < n; j0 += HALVES) {
        const int j = j0 + half_of_block();
        const std::byte* key = a.row(a.k, begin + min(j, n - 1));
        float sum[QUERIES] = {};
        for (int i = half_lane(); i < a.k.cols; i += HALF) {
            const float v = value<D>(key, i);
            for (int m = 0; m < QUERIES; m++) sum[m] = std::fma(v, q[m][i], sum[m]);
        }
        for (int m = 0; m < QUERIES; m++) {
            const float s = sum_lanes(sum[m]);
            if (half_lane() == m && j < n) p[m * SPLIT + j] = s;
        }
    }
}

// The logarithm, where it is asked for, and the answer of a query that sees nothing.
__device__ inline void finish(const KeyHeads& a, int query, int seen, float top, float sum) {
    for (int i = 0; seen == 0 && i < a.v.cols; i++) a.output(query)[i] = 0;
    if (!a.lse.data) return;
    a.lse[query / a.heads][blockIdx.z * a.next_lse + query % a.heads] =       // by the same steps
        seen ? float(double(top) - log(double(1 / sum))) : std::numeric_limits<float>::infinity();
}

// A block: eight queries and all splits in turn; or split blockIdx.y alone, left for join_kernel.
template <Dtype D> __global__ void attend_kernel(KeyHeads a) {
    SHARED(float, p, QUERIES * SPLIT);
    SHARED(int, visible, QUERIES);         // positions of the split that a query sees
    SHARED(float, old, QUERIES);
    SHARED(float, now, QUERIES);
    const int first = int(blockIdx.x) * QUERIES, last = min(first + QUERIES, a.queries()) - 1;
    const int mine = half_of_block(), query = min(first + mine, last);     // of the softmax
    const int seen = a.seen(query), most = a.seen(last);
    const int from = a.partial ? int(blockIdx.y) : 0, end = a.partial ? from + 1 : a.splits;
    float top = 0, sum = 0;
    for (int split = from; split < end && split * SPLIT < most; split++) {
        const int begin = split * SPLIT, n = min(SPLIT, most - begin), count = max(0, min(seen - begin, n));
        scores<D>(p, a, first, begin, n);
        __syncthreads();
        float part_top, part_sum;
        exp_row(Slice<decltype(p)>{p, mine * SPLIT}, a.scale, count, part_top, part_sum);
        for (int j = half_lane(); j < count; j += HALF) p[mine * SPLIT + j] = p[mine * SPLIT + j] / part_sum;
        Weights w{0, 1};
        if (split == from) top = part_top, sum = part_sum;
        else w = put_together(top, sum, part_top, part_sum);
        if (half_lane() == 0) visible[mine] = count, old[mine] = w.old, now[mine] = w.now;
        __syncthreads();
        for (int i = int(threadIdx.x); i < a.v.cols; i += THREADS) {
            float o[QUERIES] = {};
            int counts[QUERIES];
            for (int m = 0; m < QUERIES; m++) counts[m] = visible[m];
            for (int j = 0; j < n; j++) {
                const float v = value<D>(a.row(a.v, begin + j), i);
                for (int m = 0; m < QUERIES; m++)
                    if (j < counts[m]) o[m] = std::fma(p[m * SPLIT + j], v, o[m]);
            }
            for (int m = 0; m < QUERIES; m++) {              // a constant: o and counts stay in registers
                if (first + m > last) continue;
                float& out = a.partial ? a.part(first + m, split)[2 + i] : a.output(first + m)[i];
                out = split == from ? o[m] : mixed(out, o[m], {old[m], now[m]});
            }
        }
        if (a.partial && half_lane() == 0 && first + mine <= last) {
            float* part = a.part(query, split);
            part[0] = part_top, part[1] = part_sum;
        }
        __syncthreads();                   // before the scores of the next split are written
    }
    if (!a.partial && half_lane() == 0 && first + mine <= last) finish(a, query, seen, top, sum);
}

// A block a query.
__global__ void join_kernel(KeyHeads a) {
    const int query = int(blockIdx.x), n = a.seen(query);
    float top = 0, sum = 0;
    for (int i = int(threadIdx.x); n > 0 && i < a.v.cols; i += THREADS) {
        const float* part = a.part(query, 0);
        float out = part[2 + i];
        top = part[0], sum = part[1];
        for (int split = 1; split * SPLIT < n; split++) {
            part = a.part(query, split);
            out = mixed(out, part[2 + i], put_together(top, sum, part[0], part[1]));
        }
        a.output(query)[i] = out;
    }
    if (threadIdx.x == 0) finish(a, query, n, top, sum);
}

// Numbers of `scratch` with which each of T tokens' splits has a block of its own. dv: numbers of a value
inline int64_t split_scratch(int T, int H, int context, int dv) {
    return int64_t(T) * H * ceil_div(context, SPLIT) * (dv + 2);
}

// The kernels for a cache of `dtype`; positions: the most that a token may see. scratch: one row, of
// split_scratch numbers; where it has fewer, a block does all splits.
inline void attend_all(KeyHeads a, Dtype dtype, unsigned groups, int positions, Rows scratch) {
    const unsigned queries = unsigned(a.T * a.heads);
    a.splits = int(ceil_div(positions, SPLIT));
    const int64_t needed = split_scratch(a.T, int(groups) * a.heads, positions, a.v.cols);
    if (a.splits > 1 && needed <= scratch.stride) a.partial = scratch.data;
    const dim3 grid(ceil_div(queries, QUERIES), a.partial ? unsigned(a.splits) : 1, groups);
    switch (dtype) {
    case Dtype::F32: start(attend_kernel<Dtype::F32>, grid, a); break;
    case Dtype::BF16: start(attend_kernel<Dtype::BF16>, grid, a); break;
    case Dtype::Q8_0: start(attend_kernel<Dtype::Q8_0>, grid, a); break;
    case Dtype::F8_LATENT: start(attend_kernel<Dtype::F8_LATENT>, grid, a); break;
    default: CHECK(false, "keys in %s", format_of(dtype).name);
    }
    if (a.partial) start(join_kernel, dim3(queries, 1, groups), a);
}

// Keys of one format; the heads lie at even distances. K and V may have more rows than any token sees.
inline void attend(std::span<const Attention> heads, Rows scratch) {
    const Attention& one = heads[0];
    KeyHeads a{one.out, one.q, 0, 0, stack_of(heads.size(), [&](size_t i) { return heads[i].k; }),
               stack_of(heads.size(), [&](size_t i) { return heads[i].v; }), one.heads, int(one.n.size()),
               one.n.data(), one.scale, 0};
    a.lse = one.lse;
    if (heads.size() > 1)
        a.next_out = heads[1].out.data - one.out.data, a.next_q = heads[1].q.data - one.q.data,
        a.next_lse = heads[1].lse.data - one.lse.data;
    attend_all(a, one.k.dtype, unsigned(heads.size()), one.k.rows, scratch);
}
TWIN(attend);

// -- 7.2  the cache: keys and values of the past -------------------------------------------------

// x[t] becomes row n[t] - 1: a thread a number, or a block of 32. Where a step writes is read on the device,
// so the same launch serves every step.
__global__ void store_kernel(Stack cache, Dtype dtype, const int* n, ConstRows x, int T) {
    const int unit = dtype == Dtype::Q8_0 ? 32 : 1, units = cache.cols / unit;
    const int t = int(item() / units), i = int(item() % units);
    if (t >= T) return;
    std::byte* row = const_cast<std::byte*>(cache.row(0, n[t] - 1));
    if (dtype == Dtype::F32) reinterpret_cast<float*>(row)[i] = x[t][i];
    if (dtype == Dtype::BF16) reinterpret_cast<uint16_t*>(row)[i] = float_to_bf16(x[t][i]);
    if (dtype == Dtype::Q8_0) quantise_q8_0(row + 34 * i, x[t] + 32 * i);
}
inline void store(const Matrix& cache, std::span<const int> n, ConstRows x) {
    const int units = cache.cols / format_of(cache.dtype).values, T = int(n.size());
    start_each(store_kernel, int64_t(T) * units, stack_of(cache), cache.dtype, n.data(), x, T);
}
TWIN(store);

// -- 7.3  gqa: what the distills have ------------------------------------------------------------

inline void gqa_attend(real* out, const real* q, const Cache& cache, int l, int H, std::span<const int> n,
                       Rows scratch, real* lse) {
    const int G = cache.parts / 2, d = cache.width, group = H / G;
    std::vector<Attention> heads;
    for (int g = 0; g < G; g++) {
        int64_t at = int64_t(g) * group * d, stride = int64_t(H) * d;
        heads.push_back({{out + at, stride}, {q + at, stride}, group, cache.matrix(l, 2 * g),
                         cache.matrix(l, 2 * g + 1), 1 / std::sqrt(real(d)), n,
                         {lse ? lse + g * group : nullptr, H}});
    }
    cuda::attend(heads, scratch);
}
TWIN(gqa_attend);

}

// =================================================================================================
// Chapter 8. Attention II: MLA
// =================================================================================================
//
// In the absorbed form all heads look at one key: a row of the cache, of which a block reads 576 numbers once
// for eight queries, 128 heads of a decoded token with sixteen blocks a split. Before and after, each head
// has its own small matrix; the heads of a weight lie evenly apart, so one launch does them all:
//
//      q_absorbed = W^UK^T q_nope      sums over the rows of W^UK      128 x (Dn x Rkv)
//      out        = W^UV z             sums over the columns of W^UV   128 x (Dv x Rkv)
//
// The naive form is here to be compared with: it expands the cache for one head after the other.

namespace cuda {

// -- 8.1  the two forms --------------------------------------------------------------------------

// to[t][h] (n numbers) = from[t][h]
__global__ void copy_kernel(Heads to, Heads from, int n) {
    const int64_t i = item() % n, h = item() / n % to.H, t = item() / n / to.H;
    if (t < to.T) to.at(t, h)[i] = from.at(t, h)[i];
}
inline void copy(const Heads& to, const Heads& from, int n) {
    start_each(copy_kernel, int64_t(to.T) * to.H * n, to, from, n);
}

inline Stack stack_of(std::span<const Matrix> heads) {
    return cuda::stack_of(heads.size(), [&](size_t h) { return heads[h].stored(); });
}

inline void mla_naive(const LatentAttention& a) {
    const int H = int(a.wk_b.size()), Dn = a.wk_b[0].rows, Rkv = a.wk_b[0].cols, Dv = a.wv_b[0].rows;
    const int latent = Rkv + a.Dr, dk = Dn + a.Dr, width = dk + Dv;
    int n = 0;                             // positions that the last token sees: the host waits for it
    if (!a.n.empty()) read(&n, &a.n.back(), sizeof n);
    if (n == 0) return;
    Rows c{a.expanded[0], latent}, k{a.expanded[0] + int64_t(n) * latent, width}, v{k[0] + dk, width};
    widen_rows(c, a.cache, nullptr, n);
    copy({k[0] + Dn, width, 0, n, 1}, {c[0] + Rkv, latent, 0, n, 1}, a.Dr);
    for (int h = 0; h < H; h++) {
        cuda::matmul(k, c, a.wk_b[size_t(h)], n);                                       // W^UK c
        cuda::matmul(v, c, a.wv_b[size_t(h)], n);                                       // W^UV c
        Attention head{{a.out + h * Dv, int64_t(H) * Dv}, {a.q + h * dk, int64_t(H) * dk}, 1,
                       real_matrix(k[0], n, dk), real_matrix(v[0], n, Dv), a.scale, a.n, a.lse_from(h)};
        head.k.stride = head.v.stride = size_t(width) * sizeof(real);
        cuda::attend({&head, 1}, a.scratch);
    }
}

inline void mla_absorbed(const LatentAttention& a) {
    const int H = int(a.wk_b.size()), Dn = a.wk_b[0].rows, Rkv = a.wk_b[0].cols, Dv = a.wv_b[0].rows;
    const int T = int(a.n.size()), dk = Dn + a.Dr, latent = Rkv + a.Dr;
    Batch down{{a.q_absorbed, int64_t(H) * latent}, {a.q, int64_t(H) * dk}, cuda::stack_of(a.wk_b), T, H,
               latent, dk};
    (a.wk_b[0].transposed ? by_rows : by_columns)(a.wk_b[0].dtype, down);               // W^UK^T q_nope
    copy({a.q_absorbed + Rkv, int64_t(H) * latent, latent, T, H},
         {const_cast<real*>(a.q) + Dn, int64_t(H) * dk, dk, T, H}, a.Dr);
    Attention all{{a.z, int64_t(H) * Rkv}, {a.q_absorbed, int64_t(H) * latent}, H, a.cache, a.cache, a.scale,
                  a.n, a.lse_from(0)};
    all.v.cols = Rkv, all.v.stride = row_bytes(a.cache.dtype, latent);                  // the value: c alone
    cuda::attend({&all, 1}, a.scratch);
    Batch up{{a.out, int64_t(H) * Dv}, {a.z, int64_t(H) * Rkv}, cuda::stack_of(a.wv_b), T, H, Dv, Rkv};
    (a.wv_b[0].transposed ? by_columns : by_rows)(a.wv_b[0].dtype, up);                 // W^UV z
}
TWIN(mla_naive);
TWIN(mla_absorbed);

// -- 8.2  a cache in pages -----------------------------------------------------------------------

// The conversations lie side by side as key heads do elsewhere; only the way to a row is another one. A page
// number is read once for each key by sixteen threads that need it at the same time.
inline void mla_paged(const PagedAttention& a, Rows scratch) {
    const int width = a.pool.cols;
    const Stack rows = stack_of(a.pool);
    KeyHeads all{{a.out, int64_t(a.H) * a.dv}, {a.q, int64_t(a.H) * width}, int64_t(a.H) * a.dv,
                 int64_t(a.H) * width, rows, rows, a.H, 1, a.n.data(), a.scale, 0};
    all.v.cols = a.dv, all.table = a.table, all.table_width = a.table_width;
    all.lse = {a.lse, 0}, all.next_lse = a.H;
    attend_all(all, a.pool.dtype, unsigned(a.n.size()), a.table_width * PAGE, scratch);
}
TWIN(mla_paged);

}

// =================================================================================================
// Chapter 9. Feed-forward
// =================================================================================================
//
// Three products and what lies between them. Fusing silu into the first two would save a pass over gate and
// up, a thousandth of what the weights take: here they stay apart.

namespace cuda {

// -- 9.1  swiglu ---------------------------------------------------------------------------------

inline void swiglu(real* out, const real* x, const Mlp& w, int T, real* gate, real* up) {
    const int F = w.w_gate.rows, D = w.w_gate.cols;
    cuda::matmul({gate, F}, {x, D}, w.w_gate, T);
    cuda::matmul({up, F}, {x, D}, w.w_up, T);
    cuda::silu_times(gate, up, F, T);
    cuda::matmul({out, D}, {gate, F}, w.w_down, T);
}
TWIN(swiglu);

}

// =================================================================================================
// Chapter 10. Mixture of experts
// =================================================================================================
//
// How does a GPU sort? Here it does not. An expert's place among the picked is the number of experts before
// it, and a pair's slot the number of pairs before it, which each thread counts for itself: more comparisons
// than a sort makes, and none that has to wait for another. No atomic addition decides an order, so slots,
// and with them all sums, are the same each time and the same as the CPU's.
//
//      gate           a block a token: affinities, groups, ranks
//      dispatch       a thread an expert: pairs of lower experts; a thread a pair: its slot
//      run_experts    all slots of all experts in one launch; a block finds its expert in `first`, on the
//                     device, so the host need not know who was picked
//      combine        a thread a number of the output, over the token's picks in their order

namespace cuda {

// -- 10.1  gates: which experts see this token ---------------------------------------------------

__global__ void sigmoid_kernel(float* out, const float* z, int64_t n) {
    const int64_t i = item();
    if (i < n) out[i] = sigmoid(z[i]);
}
inline void affinities(const Routing& r, const GateShape& g) {
    const int64_t n = int64_t(r.T) * g.E;
    if (g.affinity == Affinity::SIGMOID) return start_each(sigmoid_kernel, n, r.affinity, r.logits, n);
    if (n)
        check(cudaMemcpyAsync(r.affinity, r.logits, size_t(n) * 4, cudaMemcpyDeviceToDevice, queue),
              "a copy");
    cuda::softmax({r.affinity, g.E}, 1, r.T, g.E);
}

// By what a group is judged; NONE: there are no groups.
enum class GroupScore : uint8_t { NONE, BEST, BEST_TWO };

__device__ inline float group_score(const float* choice, int n, GroupScore by) {
    float best = -std::numeric_limits<float>::infinity(), second = best;
    for (int e = 0; e < n; e++) {
        if (choice[e] > best) second = best, best = choice[e];
        else if (choice[e] > second) second = choice[e];
    }
    return by == GroupScore::BEST ? best : best + second;
}

// A block a token. bias: none, or what is added before picking and never enters the weights
__global__ void pick_kernel(Routing r, const float* bias, GateShape g, GroupScore by) {
    DYNAMIC_SHARED(float, score);          // (n_group)
    const int64_t t = blockIdx.x;
    const int size = by == GroupScore::NONE ? g.E : g.E / g.n_group, me = int(threadIdx.x);
    const float* affinity = r.affinity + t * g.E;
    float *choice = r.choice + t * g.E, *weight = r.weight + t * g.K;
    int* idx = r.idx + t * g.K;
    for (int e = me; e < g.E; e += THREADS) choice[e] = bias ? affinity[e] + bias[e] : affinity[e];
    __syncthreads();
    for (int i = me; by != GroupScore::NONE && i < g.n_group; i += THREADS)
        score[i] = r.group_score[t * g.n_group + i] = group_score(choice + i * size, size, by);
    __syncthreads();
    for (int e = me; by != GroupScore::NONE && e < g.E; e += THREADS)
        if (rank_of(score, g.n_group, e / size) >= g.topk_group)
            choice[e] = -std::numeric_limits<float>::infinity();
    __syncthreads();
    for (int e = me; e < g.E; e += THREADS) {
        const int rank = rank_of(choice, g.E, e);
        if (rank < g.K) idx[rank] = e;
    }
    __syncthreads();
    const bool normalise = g.normalise && g.K > 1;
    const float scale = normalise && !g.scale_normalised ? 1 : float(g.scale);
    float sum = 0;                         // each thread the same: the order is that of the picks
    for (int k = 0; k < g.K; k++) sum += affinity[idx[k]];
    for (int k = me; k < g.K; k += THREADS) {
        const float s = affinity[idx[k]];
        weight[k] = (normalise ? s / (sum + 1e-20f) : s) * scale;
    }
}
inline void pick(const Routing& r, const real* bias, const GateShape& g, GroupScore by) {
    cuda::affinities(r, g);
    start_sharing(size_t(g.n_group) * sizeof(float), pick_kernel, dim3(unsigned(r.T)), r, bias, g, by);
}

inline void gate_greedy(const Routing& r, const GateShape& g) { cuda::pick(r, nullptr, g, GroupScore::NONE); }
inline void gate_group_limited_greedy(const Routing& r, const GateShape& g) {
    cuda::pick(r, nullptr, g, GroupScore::BEST);
}
inline void gate_noaux_tc(const Routing& r, const real* bias, const GateShape& g) {
    cuda::pick(r, bias, g, GroupScore::BEST_TWO);
}
TWIN(gate_greedy);
TWIN(gate_group_limited_greedy);
TWIN(gate_noaux_tc);

// -- 10.2  dispatch: sort the (token, expert) pairs by expert ------------------------------------

__global__ void count_kernel(int* first, const int* expert_idx, int pairs, int E) {
    const int e = int(item());
    if (e > E) return;
    int lower = 0;
    for (int i = 0; i < pairs; i++) lower += expert_idx[i] < e;
    first[e] = lower;
}
__global__ void place_kernel(int* slot, int* slot_token, const int* first, const int* expert_idx, int pairs,
                             int K) {
    const int i = int(item());
    if (i >= pairs) return;
    int at = first[expert_idx[i]];
    for (int j = 0; j < i; j++) at += expert_idx[j] == expert_idx[i];
    slot[i] = at, slot_token[at] = i / K;
}
inline void dispatch(int* first, int* slot, int* slot_token, const int* expert_idx, int T, int K, int E) {
    start_each(count_kernel, E + 1, first, expert_idx, T * K, E);
    start_each(place_kernel, T * K, slot, slot_token, first, expert_idx, T * K, K);
}
TWIN_OF(dispatch, void (*)(int*, int*, int*, const int*, int, int, int));

// -- 10.3  experts and combine -------------------------------------------------------------------

// One of the three matrices of all experts.
inline Stack stack_of(const std::vector<Mlp>& experts, Matrix Mlp::*which) {
    return cuda::stack_of(experts.size(), [&](size_t e) { return experts[e].*which; });
}

// A token is read where it lies, so `in` is not needed but as the place of `shared_out`.
inline void run_experts(const ExpertWork& a, const Moe& w) {
    const Mlp& one = w.experts[0];
    const int slots = a.T * a.K, F = one.w_gate.rows, E = int(w.experts.size());
    const int64_t D = one.w_gate.cols;
    auto all = [&](Rows out, ConstRows x, Matrix Mlp::*which, const int* token) {
        const Stack stack = cuda::stack_of(w.experts, which);
        by_rows((one.*which).dtype, {out, x, stack, slots, E, 0, 0, a.first, token});
    };
    all({a.gate, F}, {a.u, D}, &Mlp::w_gate, a.slot_token);
    all({a.up, F}, {a.u, D}, &Mlp::w_up, a.slot_token);
    cuda::silu_times(a.gate, a.up, F, slots);
    all({a.out, D}, {a.gate, F}, &Mlp::w_down, nullptr);
    if (!w.shared.w_gate) return;
    cuda::swiglu(a.shared_out, a.u, w.shared, a.T, a.gate + int64_t(slots) * F, a.up + int64_t(slots) * F);
}
TWIN(run_experts);

__global__ void combine_kernel(float* out, const float* expert_out, const int* slot, const float* weight,
                               int K, const float* shared, int T, int D) {
    const int64_t t = item() / D, d = item() % D;
    if (t >= T) return;
    float sum = 0;
    for (int64_t k = t * K; k < (t + 1) * K; k++)
        sum = std::fma(weight[k], expert_out[int64_t(slot[k]) * D + d], sum);
    out[item()] = shared ? sum + shared[item()] : sum;
}
inline void combine(real* out, const real* expert_out, const int* slot, const real* weight, int K,
                    const real* shared, int T, int D) {
    start_each(combine_kernel, int64_t(T) * D, out, expert_out, slot, weight, K, shared, T, D);
}
TWIN_OF(combine, void (*)(real*, const real*, const int*, const real*, int, const real*, int, int));

}

// =================================================================================================
// Chapter 11. The model
// =================================================================================================
//
// The structs are those of chapter 11 of deepseek.cpp: a Model whose matrices point into the device's memory,
// and a Session whose cache and activations lie there. What follows is that chapter's text with the twins in
// the place of the operations.
//
//      host                                         device
//      weights, mapped       -- once -->            weights, in the formats of the files
//      ids, cos and sin      -- each step -->       embed, L blocks, norm
//      a token               <-- each step --       head, choose
//
// The host only asks. Nothing that it does depends on what a kernel computed: who goes to which expert, and
// in which row of the cache a token is kept, is read by kernels from memory. So a step of one token is always
// the same list of some hundred launches, and the driver can be given the list as a whole, a graph: launching
// one by one would take longer than many of these kernels do.

namespace cuda {

// -- 11.1  weights, device, cache and activations ------------------------------------------------

// The first call of the driver.
inline void begin() {
    if (!queue) check(cudaStreamCreateWithFlags(&queue, cudaStreamNonBlocking), "a stream");
}

inline std::shared_ptr<std::byte> memory(size_t bytes) {
    begin();
    void* p = nullptr;
    if (bytes == 0) return nullptr;
    if (cudaMalloc(&p, bytes) != cudaSuccess)
        fail("--device cuda: %.3f GB of the device's memory were refused", double(bytes) / 1e9);
    check(cudaMemsetAsync(p, 0, bytes, queue), "memory");
    return {static_cast<std::byte*>(p), [](std::byte* q) { cudaFree(q); }};
}

// What a session has beside its arrays, in the row of `scratch`: results of splits, logits, ids, a choice.
constexpr int HEAD_ROWS = 16, SPLIT_TOKENS = 2;          // tokens of a head at once; a token and a draft

struct Work {
    Rows splits;
    real* logits;                          // (HEAD_ROWS, V)
    int* ids;                              // (chunk)
    Choice* choice;                        // behind the ids

    static int64_t numbers(const Config& c, const SessionOptions& o) {
        if (int64_t(o.chunk) * c.H > std::numeric_limits<int>::max())            // they are counted in int
            fail("--chunk %d: with %d heads more queries than a GPU's grid has blocks", o.chunk, c.H);
        return split_numbers(c, o) + int64_t(HEAD_ROWS) * c.V + o.chunk + 2;
    }
    explicit Work(const Session& s) {
        const Config& c = s.model.config;
        const int64_t n = split_numbers(c, s.options);
        splits = {s.a.scratch.data, n}, logits = s.a.scratch.data + n;
        ids = reinterpret_cast<int*>(logits + int64_t(HEAD_ROWS) * c.V);
        choice = reinterpret_cast<Choice*>(ids + s.options.chunk);
    }

private:
    static int64_t split_numbers(const Config& c, const SessionOptions& o) {
        const int dv = c.mla() && o.mla == MlaForm::ABSORBED ? c.Rkv : c.v_dim();
        return (split_scratch(SPLIT_TOKENS, c.H, o.context, dv) + 15) / 16 * 16;
    }
};

// -- 11.2  upload: weights into the device's memory ----------------------------------------------

// Walks a model's weights: without memory it counts, with it each is copied and then pointed to. What several
// matrices share, a tied head or the scales of all heads, is there once. Experts come out evenly apart.
struct Upload {
    Arena arena;
    size_t total;
    const std::function<void(size_t, size_t)>& progress;
    std::map<const void*, const std::byte*> done;

    const std::byte* place(const void* from, size_t bytes) {
        auto [at, is_new] = done.try_emplace(from, nullptr);
        if (!is_new || !from) return at->second;
        at->second = arena.take<std::byte>(bytes);
        if (!arena.base) return nullptr;
        send(const_cast<std::byte*>(at->second), from, bytes);
        progress(arena.used, total);
        return at->second;
    }
    void point(const std::byte*& to, const std::byte* placed) const { if (arena.base) to = placed; }

    static size_t bytes(const Matrix& w) {
        return size_t(w.stored().rows) * row_bytes(w.dtype, w.stored().cols);
    }
    static size_t scale_bytes(const Matrix& w) {
        return size_t(scale_blocks(w.first_row + w.rows) * scale_blocks(w.cols)) * sizeof(float);
    }
    void matrix(Matrix& w) {
        if (!w) return;
        point(w.data, place(w.data, bytes(w)));
        if (w.scale) point(w.scale, place(w.scale, scale_bytes(w)));
    }
    // Heads are views of one or two tensors: what lies without a gap stays so.
    void heads(Mla& w) {
        std::vector<Matrix*> all;
        for (std::vector<Matrix>* part : {&w.wk_b, &w.wv_b})
            for (Matrix& head : *part) all.push_back(&head);
        std::sort(all.begin(), all.end(), [](Matrix* a, Matrix* b) { return a->data < b->data; });
        for (size_t i = 0; i < all.size();) {
            const std::byte *first = all[i]->data, *end = first;
            const Matrix* last = all[i];
            size_t j = i;
            for (; j < all.size() && all[j]->data == end; j++) last = all[j], end += bytes(*last);
            const std::byte* placed = place(first, size_t(end - first));
            const std::byte* scale = last->scale ? place(last->scale, scale_bytes(*last)) : nullptr;
            for (; i < j; i++)
                point(all[i]->data, placed + (all[i]->data - first)), point(all[i]->scale, scale);
        }
    }
    void model(Model& m) {
        each_matrix(m, [&](Matrix& w, Role role) { if (role != Role::LATENT) matrix(w); });
        for (Layer& l : m.layers) heads(l.mla);
        for (Mtp& mtp : m.mtp) heads(mtp.layer.mla);
        each_vector(m, [&](std::span<const real>& v) {
            const std::byte* placed = place(v.data(), v.size_bytes());
            if (arena.base) v = {reinterpret_cast<const real*>(placed), v.size()};
        });
    }
};

inline void upload(Model& m, const std::function<void(size_t, size_t)>& progress) {
    Upload bill{{}, 0, progress, {}};
    bill.model(m);
    m.uploaded = memory(bill.arena.used);
    Upload copies{{m.uploaded.get(), 0}, bill.arena.used, progress, {}};
    copies.model(m);
    wait();
}

// -- 11.3  the layers' parts: each operation gets its arrays -------------------------------------

// As Session::tap, of arrays of the device.
inline void tap(const Session& s, int l, const char* name, const real* data, int T,
                std::initializer_list<int> inner) {
    if (!s.taps_of(l)) return;
    size_t n = size_t(T);
    for (int size : inner) n *= size_t(size);
    Vector host(n);
    cuda::read(host.data(), data, n * sizeof(real));
    s.tap(l, name, host.data(), T, inner);
}

inline void tap(const Session& s, const char* name, const real* data, int T) {        // (T, D)
    if (!s.taps) return;
    Vector host(size_t(T) * size_t(s.model.config.D));
    cuda::read(host.data(), data, host.size() * sizeof(real));
    s.taps->add(name, host.data(), T, {s.model.config.D});
}

inline void tap_attention(const Session& s, int l, int T) {
    const Config& c = s.model.config;
    if (c.mla() && s.options.mla == MlaForm::ABSORBED) {
        cuda::tap(s, l, "q_absorbed", s.a.q_absorbed, T, {c.H, c.Rkv + c.Dr});
        cuda::tap(s, l, "z", s.a.z, T, {c.H, c.Rkv});
    }
    cuda::tap(s, l, "lse", s.a.lse, T, {c.H});
    cuda::tap(s, l, "o", s.a.o, T, {c.H, c.v_dim()});
}
TWIN(tap_attention);

inline void gqa(Session& s, const Gqa& w, int l, int T) {
    const Config& c = s.model.config;
    Activations& a = s.a;
    const int d = c.head_dim, width = c.G * d;
    real *k = a.kv, *v = a.kv + int64_t(T) * width;                        // (T, G, d) each
    ConstRows u{a.u, c.D};
    cuda::matmul({a.q, c.H * d}, u, w.wq, T);
    cuda::matmul({k, width}, u, w.wk, T);
    cuda::matmul({v, width}, u, w.wv, T);
    if (c.qkv_bias) cuda::add_bias(a.q, w.bq, T), cuda::add_bias(k, w.bk, T), cuda::add_bias(v, w.bv, T);
    if (c.qk_norm) {
        cuda::rmsnorm({a.q, d}, {a.q, d}, w.q_norm, int64_t(T) * c.H, c.eps);
        cuda::rmsnorm({k, d}, {k, d}, w.k_norm, int64_t(T) * c.G, c.eps);
    }
    cuda::rope_half({a.q, c.H * d, d, T, c.H}, a.cos_sin, d);
    cuda::rope_half({k, width, d, T, c.G}, a.cos_sin, d);
    std::span<const int> n{a.seen, size_t(T)};
    for (int g = 0; g < c.G; g++) {
        cuda::store(s.cache.matrix(l, 2 * g), n, {k + g * d, width});
        cuda::store(s.cache.matrix(l, 2 * g + 1), n, {v + g * d, width});
    }
    cuda::gqa_attend(a.o, a.q, s.cache, l, c.H, n, Work(s).splits, s.taps_of(l) ? a.lse : nullptr);
    cuda::tap_attention(s, l, T);
    cuda::matmul({a.y, c.D}, {a.o, c.H * d}, w.wo, T);
}
TWIN(gqa);

// Numbers `from`, `from + 1`, ... of each of H parts of a row, as a tap.
inline void tap_parts(const Session& s, int l, const char* name, Heads x, int from,
                      std::initializer_list<int> inner) {
    const int n = *(inner.end() - 1);
    Buffer<real> dense(size_t(x.T) * size_t(x.H) * size_t(n));
    x.data += from;
    copy({dense.data(), int64_t(x.H) * n, n, x.T, x.H}, x, n);
    cuda::tap(s, l, name, dense.data(), x.T, inner);
}
inline void tap_mla(const Session& s, int l, int T) {
    if (!s.taps) return;
    const Config& c = s.model.config;
    const int latent = c.Rkv + c.Dr, q_dim = c.q_dim();
    int seen = 0;
    cuda::read(&seen, s.a.seen, sizeof seen);
    widen_rows({s.a.kv, latent}, s.cache.matrix(l, 0).view(seen - 1, T), nullptr, T);   // as they are kept
    const Heads q{s.a.q, int64_t(c.H) * q_dim, q_dim, T, c.H}, kv{s.a.kv, latent, 0, T, 1};
    tap_parts(s, l, "q_nope", q, 0, {c.H, c.Dn});
    tap_parts(s, l, "q_rope", q, c.Dn, {c.H, c.Dr});
    tap_parts(s, l, "c_kv", kv, 0, {c.Rkv});
    tap_parts(s, l, "k_rope", kv, c.Rkv, {c.Dr});
}
TWIN(tap_mla);

inline void attend_latent(Session& s, const Mla& w, int l, int T) {
    Activations& a = s.a;
    LatentAttention core{a.o, a.q, s.cache.matrix(l, 0), w.wk_b, w.wv_b, {a.seen, size_t(T)},
                         s.model.config.Dr, mla_scale(s.model), a.q_absorbed, a.z, a.expanded,
                         Work(s).splits, s.taps_of(l) ? a.lse : nullptr};
    if (s.options.mla == MlaForm::NAIVE) cuda::mla_naive(core);
    else cuda::mla_absorbed(core);
}
TWIN(attend_latent);

//   c^Q = RMSNorm(W^DQ u), [q_nope | q_rope] = W^UQ c^Q                   V3 eq. 6-9
//   [c | k] = W^DKV u,  c^KV = RMSNorm(c),  k_rope = RoPE(k)              V3 eq. 1-3
inline void mla(Session& s, const Mla& w, int l, int T) {
    const Config& c = s.model.config;
    Activations& a = s.a;
    const int width = c.Rkv + c.Dr, q_dim = c.q_dim();
    ConstRows u{a.u, c.D};
    Rows kv{a.kv, width}, c_q{a.c_q, c.Rq}, q{a.q, c.H * q_dim};
    cuda::matmul(kv, u, w.wkv_a, T);
    if (c.Rq) {
        cuda::matmul(c_q, u, w.wq_a, T);
        cuda::rmsnorm(c_q, c_q, w.q_norm, T, LATENT_EPS);
        cuda::tap(s, l, "c_q", a.c_q, T, {c.Rq});
        cuda::matmul(q, c_q, w.wq_b, T);
    } else {
        cuda::matmul(q, u, w.wq, T);
    }
    cuda::rmsnorm(kv, kv, w.kv_norm, T, LATENT_EPS);
    cuda::rope_interleaved({a.q + c.Dn, c.H * q_dim, q_dim, T, c.H}, a.cos_sin, c.Dr);
    cuda::rope_interleaved({a.kv + c.Rkv, width, 0, T, 1}, a.cos_sin, c.Dr);
    cuda::store(s.cache.matrix(l, 0), {a.seen, size_t(T)}, kv);
    cuda::tap_mla(s, l, T);
    cuda::attend_latent(s, w, l, T);
    cuda::tap_attention(s, l, T);
    cuda::matmul({a.y, c.D}, {a.o, c.H * c.Dv}, w.wo, T);
}
TWIN(mla);

inline void moe(Session& s, const Moe& w, int l, int T) {
    const Config& c = s.model.config;
    Activations& a = s.a;
    cuda::matmul({a.router_logits, c.E}, {a.u, c.D}, w.gate_w, T);
    const GateShape shape = gate_shape(c);
    const Routing r{T, a.router_logits, a.affinity, a.choice, a.expert_idx, a.gate_weight, a.group_score};
    switch (c.gate) {
    case Gate::GREEDY: cuda::gate_greedy(r, shape); break;
    case Gate::GROUP_LIMITED_GREEDY: cuda::gate_group_limited_greedy(r, shape); break;
    case Gate::NOAUX_TC: cuda::gate_noaux_tc(r, w.gate_bias.data(), shape); break;
    }
    cuda::tap(s, l, "router_logits", a.router_logits, T, {c.E});
    if (c.gate != Gate::GREEDY) cuda::tap(s, l, "group_score", a.group_score, T, {c.n_group});
    cuda::tap(s, l, "choice", a.choice, T, {c.E});
    if (s.taps_of(l)) {
        std::vector<int> idx(size_t(T) * size_t(c.K));
        cuda::read(idx.data(), a.expert_idx, idx.size() * sizeof(int));
        s.taps->add(text_of("layers.%d.expert_idx", l), idx.data(), T, c.K);
    }
    cuda::tap(s, l, "expert_weight", a.gate_weight, T, {c.K});

    cuda::dispatch(a.first, a.slot, a.slot_token, a.expert_idx, T, c.K, c.E);
    cuda::run_experts(
        {a.u, T, c.K, a.first, a.slot_token, a.expert_in, a.expert_out, a.expert_in, a.gate, a.up}, w);
    const real* shared = c.n_shared ? a.expert_in : nullptr;
    if (s.taps_of(l)) {
        cuda::combine(a.u, a.expert_out, a.slot, a.gate_weight, c.K, nullptr, T, c.D);
        cuda::tap(s, l, "routed_out", a.u, T, {c.D});
        if (shared) cuda::tap(s, l, "shared_out", shared, T, {c.D});
    }
    cuda::combine(a.y, a.expert_out, a.slot, a.gate_weight, c.K, shared, T, c.D);
}
TWIN(moe);

// -- 11.4  block, forward, head ------------------------------------------------------------------

inline void block(Session& s, const Layer& w, real* x, int l, int T) {
    const Config& c = s.model.config;
    Activations& a = s.a;
    const size_t n = size_t(T) * size_t(c.D);

    cuda::rmsnorm({a.u, c.D}, {x, c.D}, w.attn_norm, T, c.eps);
    cuda::tap(s, l, "attn_norm", a.u, T, {c.D});
    if (c.mla()) cuda::mla(s, w.mla, l, T);
    else cuda::gqa(s, w.gqa, l, T);
    cuda::tap(s, l, "attn_out", a.y, T, {c.D});
    cuda::add(x, a.y, n);

    cuda::rmsnorm({a.u, c.D}, {x, c.D}, w.ffn_norm, T, c.eps);
    cuda::tap(s, l, "ffn_norm", a.u, T, {c.D});
    if (c.is_moe(l)) cuda::moe(s, w.moe, l, T);
    else cuda::swiglu(a.y, a.u, w.mlp, T, a.gate, a.up);
    cuda::tap(s, l, "ffn_out", a.y, T, {c.D});
    cuda::add(x, a.y, n);
    cuda::tap(s, l, "out", x, T, {c.D});
}
TWIN(block);

// What depends on the positions alone, made by the host.
inline void place(Session& s, int T, int pos) {
    Vector cos_sin(size_t(T) * s.model.rope.frequency.size() * 2);
    std::vector<int> seen;
    rope_table(cos_sin.data(), s.model.rope, T, pos);
    for (int t = 0; t < T; t++) seen.push_back(pos + t + 1);
    send(s.a.cos_sin, cos_sin.data(), cos_sin.size() * sizeof(real));
    send(s.a.seen, seen.data(), seen.size() * sizeof(int));
}
TWIN(place);

// A recorded list of launches, and of which session's arrays.
struct Graph {
    cudaGraphExec_t launches = nullptr;
    const Session* session = nullptr;
    const std::byte *cache = nullptr, *arena = nullptr, *weights = nullptr;
};
inline Graph graphs[SPLIT_TOKENS];         // by the number of tokens

// Records what `list` asks for, the first time, and lets the device do it.
inline void replay(Graph& g, const Session& s, const std::function<void()>& list) {
    const std::byte *cache = s.cache.memory.get(), *weights = s.model.uploaded.get();
    if (g.session != &s || g.cache != cache || g.arena != s.arena.base || g.weights != weights) {
        if (g.launches) cudaGraphExecDestroy(g.launches);
        cudaGraph_t recorded;
        check(cudaStreamBeginCapture(queue, cudaStreamCaptureModeThreadLocal), "recording");
        list();
        check(cudaStreamEndCapture(queue, &recorded), "recording");
        check(cudaGraphInstantiate(&g.launches, recorded, 0), "a graph");
        cudaGraphDestroy(recorded);
        g = {g.launches, &s, cache, s.arena.base, weights};
    }
    check(cudaGraphLaunch(g.launches, queue), "a graph");
}

inline void forward(Session& s, std::span<const int> ids, int pos) {
    const Model& m = s.model;
    const Config& c = m.config;
    Activations& a = s.a;
    const int T = int(ids.size());
    CHECK(T <= s.options.chunk && pos + T <= s.options.context, "%d tokens at %d", T, pos);
    const Work work(s);
    cuda::place(s, T, pos);
    send(work.ids, ids.data(), ids.size_bytes());
    auto pass = [&] {
        cuda::embed({a.x, c.D}, m.embed, {work.ids, ids.size()});
        cuda::tap(s, "embed", a.x, T);
        for (int l = 0; l < c.n_layers; l++) cuda::block(s, m.layers[size_t(l)], a.x, l, T);
        cuda::rmsnorm({a.h, c.D}, {a.x, c.D}, m.norm, T, c.eps);
        cuda::tap(s, "norm", a.h, T);
    };
    const bool waits = s.taps || (c.mla() && s.options.mla == MlaForm::NAIVE);   // then it is no list
    if (T <= SPLIT_TOKENS && !waits) replay(graphs[T - 1], s, pass);
    else pass(), wait();                   // what is shown as read has been read
    s.length = pos + T, s.h_pos = pos, s.h_rows = T;
}
TWIN(forward);

// The logits go to the host's memory, some tokens at a time.
inline void head(const Session& s, real* logits, const real* h, int T) {
    const int64_t V = s.model.config.V, D = s.model.config.D;
    const Work work(s);
    for (int64_t t = 0; t < T; t += HEAD_ROWS) {
        const int n = int(std::min<int64_t>(HEAD_ROWS, T - t));
        cuda::matmul({work.logits, V}, {h + t * D, D}, s.model.head, n);
        cuda::read(logits + t * V, work.logits, size_t(n) * size_t(V) * sizeof(real));
    }
}
TWIN(head);

}

// =================================================================================================
// Chapter 12. Talking
// =================================================================================================
//
// Half a megabyte of logits for V3's 129,280 tokens, of which one is wanted: if they went to the host for
// each token, it would compute as many exponentials while the GPU waits. So the choice is made where they
// lie, and eight bytes cross the bus. The random number is the host's, drawn as on the CPU, and the weights
// are the same doubles: a seed gives the same words on every device.
//
//      top-k, top-p     one candidate after the other, in descending order, each found by a search of all
//      neither          all in the order of their ids: sums of so many terms are handed from lane to lane
//
// A nucleus is some dozens of tokens. Sorting everything, which the order asks for, would cost more than that
// many searches; of a flat distribution it would cost less.

namespace cuda {

// -- 12.1  sampling ------------------------------------------------------------------------------

struct Found {
    float z;
    int i;
};
__device__ inline bool comes_before(const Found& a, const Found& b) {
    return a.z > b.z || (a.z == b.z && a.i < b.i);
}

// The first of the finite logits (V), in descending order, that comes after `last`; i = V: there is none. A
// block finds it, and all its threads get it.   zs, is: (HALVES), shared
template <class Zs, class Is>
__device__ Found next_of(const float* logits, int V, const Found& last, Zs& zs, Is& is) {
    Found best{-std::numeric_limits<float>::infinity(), V};
    for (int i = int(threadIdx.x); i < V; i += THREADS) {
        const Found mine{logits[i], i};
        if (comes_before(last, mine) && comes_before(mine, best)) best = mine;
    }
    for (int apart = HALF / 2; apart > 0; apart /= 2) {
        const Found other{__shfl_xor_sync(ALL_LANES, best.z, apart, HALF),
                          __shfl_xor_sync(ALL_LANES, best.i, apart, HALF)};
        if (comes_before(other, best)) best = other;
    }
    // What the last search left in the places may still be read.
    __syncthreads();
    if (half_lane() == 0) zs[half_of_block()] = best.z, is[half_of_block()] = best.i;
    __syncthreads();
    for (int i = 0; i < HALVES; i++) {
        const Found other{zs[i], is[i]};
        if (comes_before(other, best)) best = other;
    }
    return best;
}

// use(i, w) for each token in the order of ids, in all threads, with its weight w; until it says true.
template <class Use>
__device__ void each_in_order(const float* logits, int V, float top, double temperature, const Use& use) {
    bool done = false;
    for (int first = 0; first < V && !done; first += HALF) {
        const int mine = min(first + half_lane(), V - 1);
        const double w = weight_of(logits[mine], top, temperature);
        for (int lane = 0; lane < HALF; lane++) {
            const double w_lane = __shfl_sync(ALL_LANES, w, lane, HALF);
            if (!done && first + lane < V) done = use(first + lane, w_lane);
        }
    }
}

// As ::distribution without top-k and top-p, then ::candidate_at.
__device__ inline Choice choose_of_all(const float* logits, int V, const Found& top, const Sampling& s,
                                       double at) {
    Choice choice{top.i, 0};
    double sum = 0;
    each_in_order(logits, V, top.z, s.temperature, [&](int, double w) {
        if (w >= s.min_p) sum += w, choice.candidates++;
        return false;
    });
    each_in_order(logits, V, top.z, s.temperature, [&](int i, double w) {
        if (w < s.min_p) return false;
        choice.id = i;
        const double p = w / sum;
        if (at < p) return true;
        at -= p;
        return false;
    });
    return choice;
}

// The same with them. search(last): next_of
template <class Search>
__device__ Choice choose_of_best(const float* logits, int V, const Found& top, const Sampling& s, double at,
                                 const Search& search) {
    const bool limited = s.top_k > 0 && s.top_k < V;
    const int most = limited ? s.top_k : V;
    auto weight = [&](float z) { return weight_of(z, top.z, s.temperature); };
    double lane = 0;                       // of the sum that top-p is a share of
    Found last = top;
    for (int n = 0; limited && s.top_p < 1 && n < most; n++, last = search(last))
        if (n % LANES == half_lane()) lane += weight(last.z);
    for (int i = half_lane(); !limited && i < V; i += HALF) lane += weight(logits[i]);
    const double total = cuda::sum_lanes(lane);
    const double enough = s.top_p < 1 ? s.top_p * total : std::numeric_limits<double>::infinity();
    double seen = 0, sum = 0;
    int count = 0;
    last = top;
    for (int n = 0; n < most && seen < enough; n++, last = search(last)) {
        const double w = weight(last.z);
        seen += w;
        if (w >= s.min_p) sum += w, count++;
    }
    Choice choice{top.i, count};
    last = top;
    for (int n = 0; n < count; n++, last = search(last)) {       // the heaviest ones: min-p took the last
        choice.id = last.i;
        const double p = weight(last.z) / sum;
        if (at < p) break;
        at -= p;
    }
    return choice;
}

// One block: what it does is read half a megabyte some dozens of times.
__global__ void choose_kernel(Choice* out, const float* logits, int V, Sampling s, double at) {
    SHARED(float, zs, HALVES);
    SHARED(int, is, HALVES);
    int broken = 0;
    for (int i = int(threadIdx.x); i < V; i += THREADS) broken |= !std::isfinite(logits[i]);
    const bool no_number = __syncthreads_or(broken);
    auto search = [&](const Found& last) { return next_of(logits, V, last, zs, is); };
    const Found top = search({std::numeric_limits<float>::infinity(), -1});
    Choice choice{top.i, 1};
    const bool best_first = (s.top_k > 0 && s.top_k < V) || s.top_p < 1;
    if (no_number) choice = {-1, 0};
    else if (s.temperature > 0 && best_first) choice = choose_of_best(logits, V, top, s, at, search);
    else if (s.temperature > 0) choice = choose_of_all(logits, V, top, s, at);
    if (threadIdx.x == 0) *out = choice;
}
inline void choose(Choice* out, const real* logits, int V, const Sampling& s, double at) {
    start(choose_kernel, dim3(1), out, logits, V, s, at);
}
TWIN(choose);

// -- 12.2  generate ------------------------------------------------------------------------------

inline Choice choose_next(const Session& s, const real* h, const Sampling& sampling, double at) {
    const int V = s.model.config.V, D = s.model.config.D;
    const Work work(s);
    Choice choice;
    cuda::matmul({work.logits, V}, {h, D}, s.model.head, 1);
    cuda::choose(work.choice, work.logits, V, sampling, at);
    read(&choice, work.choice, sizeof choice);
    return choice;
}
TWIN(choose_next);

}

// =================================================================================================
// Chapter 13. Multi-token prediction
// =================================================================================================
//
// The draft's pass is the main model's text again with other weights; its input, [embedding | hidden state],
// is made where both already lie. A token and its draft are two rows, for which the weights are read once.

namespace cuda {

// -- 13.1  mtp_forward ---------------------------------------------------------------------------

inline void mtp_forward(Session& s, const real* h, std::span<const int> next, int pos) {
    const Model& m = s.model;
    const Mtp& w = m.mtp[0];
    const Config& c = m.config;
    Activations& a = s.a;
    const int T = int(next.size());
    const Work work(s);
    send(work.ids, next.data(), next.size_bytes());
    cuda::embed({a.mtp_in, 2 * c.D}, m.embed, {work.ids, next.size()});
    cuda::rmsnorm({a.mtp_in, 2 * c.D}, {a.mtp_in, 2 * c.D}, w.enorm, T, c.eps);
    cuda::rmsnorm({a.mtp_in + c.D, 2 * c.D}, {h, c.D}, w.hnorm, T, c.eps);
    cuda::matmul({a.mtp_x, c.D}, {a.mtp_in, 2 * c.D}, w.proj, T);
    cuda::tap(s, "mtp.in", a.mtp_x, T);
    cuda::place(s, T, pos);
    cuda::block(s, w.layer, a.mtp_x, c.n_layers, T);
    cuda::tap(s, "mtp.out", a.mtp_x, T);
    cuda::rmsnorm({a.mtp_h, c.D}, {a.mtp_x, c.D}, w.norm, T, c.eps);
    s.mtp_length = pos + T;
}
TWIN(mtp_forward);

// -- 13.2  the GPU as a device -------------------------------------------------------------------

inline int one() { return 1; }             // row of scratch: kernels have none of their own

inline uint64_t available() {
    size_t available = 0, total = 0;
    check(cudaMemGetInfo(&available, &total), "memory");
    return available;
}

// Why there is no GPU to run on, or "".
inline std::string missing() {
    int count = 0, major = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0)
        return text_of("no CUDA device (%s)", error ? cudaGetErrorString(error) : "none is visible");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "the device");
    return major < 8 ? text_of("the GPU is of compute capability %d, 8 is needed", major) : "";
}

const Device GPU = {.name = "cuda",
                    .memory = memory,
                    .read = read,
                    .write = send,
                    .threads = one,
                    .attention_scratch = Work::numbers,
                    .forward = forward,
                    .head = head,
                    .choose_next = choose_next,
                    .mtp_forward = mtp_forward,
                    .available = available,
                    .upload = upload,
                    .missing = missing};

}

// =================================================================================================
// Chapter 14. FP8
// =================================================================================================
//
// A tensor core takes tiles; this is the plain form, that any GPU can run and that a tuned one is compared
// with. A half-warp makes one number of D. Its sixteen threads are the sixteen lanes of `promoted`; for
// `exact` any order would do. The accumulator of `hopper` is a search for the largest exponent and a sum of
// integers, two of the 32 products a thread: both are exact, so no order is to be kept.
//
//      gemm_fp8               a block a row of A and eight rows of B
//      gemm_fp8_contiguous    the same, and group[m] says whose B
//      gemm_fp8_masked        a group a layer of blocks; rows that are not there end at once
//      gemm_fp8_k_grouped     the same; where a group's columns begin is the sum of the groups before it

namespace cuda {

// -- 14.1  quantise_fp8: a block a tile ----------------------------------------------------------

constexpr uint32_t NO_NUMBER = 0x7F800000;  // magnitude_bits from here on are those of no number

// Of the values of all threads. shared: (HALVES)
template <class Array> __device__ uint32_t largest_of_block(uint32_t mine, Array& shared) {
    mine = max_lanes(mine);
    if (half_lane() == 0) shared[half_of_block()] = mine;
    __syncthreads();
    for (int i = 0; i < HALVES; i++) mine = shared[i] > mine ? uint32_t(shared[i]) : mine;
    return mine;
}

__device__ inline TileScale scale_of(uint32_t largest, const Fp8Format& f) {
    if (largest >= NO_NUMBER) return {__uint_as_float(0x7FC00000)};
    return tile_scale(f.formula, __uint_as_float(largest), f.ue8m0);
}

// Thread i has column i of the tile.
__global__ void quantise_fp8_kernel(uint8_t* q, float* scale, ConstRows x, int rows, int n, Fp8Format f) {
    SHARED(uint32_t, largest_of, HALVES);
    const int64_t blocks = scale_blocks(n), first = blockIdx.x / blocks * f.tile;
    const int column = int(blockIdx.x % blocks) * SCALE_BLOCK + int(threadIdx.x);
    const int64_t end = first + f.tile < rows ? first + f.tile : rows;
    uint32_t largest = 0;
    for (int64_t r = first; r < end && column < n; r++) {
        const uint32_t bits = magnitude_bits(x[r][column]);
        largest = bits > largest ? bits : largest;
    }
    largest = largest_of_block(largest, largest_of);
    const bool finite = largest < NO_NUMBER;
    const TileScale t = scale_of(largest, f);
    for (int64_t r = first; r < end && column < n; r++) {
        const float v = x[r][column];
        q[r * n + column] = finite ? float_to_e4m3(t.inverse == 0 ? v / t.s : v * t.inverse) : E4M3_NAN;
    }
    if (threadIdx.x == 0) scale[blockIdx.x] = t.s;
}
inline void quantise_fp8(uint8_t* q, float* scale, ConstRows x, int rows, int n, const Fp8Format& f) {
    const int64_t tiles = ceil_div(rows, f.tile) * scale_blocks(n);
    start(quantise_fp8_kernel, dim3(unsigned(tiles)), q, scale, x, rows, n, f);
}
TWIN(quantise_fp8);

// A block a tile of c_kv, and one more for k_rope.
__global__ void store_latent_kernel(Stack cache, const int* n, ConstRows x) {
    SHARED(uint32_t, largest_of, HALVES);
    std::byte* row = const_cast<std::byte*>(cache.row(0, n[blockIdx.x] - 1));
    const int tile = int(blockIdx.y), i = tile * SCALE_BLOCK + int(threadIdx.x);
    const float v = i < cache.cols ? x[blockIdx.x][i] : 0;
    const uint32_t largest = largest_of_block(magnitude_bits(v), largest_of);
    if (i >= LATENT_SCALED) {
        auto* rope = reinterpret_cast<uint16_t*>(row + LATENT_ROPE);
        if (i < cache.cols) rope[i - LATENT_SCALED] = float_to_bf16(v);
        return;
    }
    const bool finite = largest < NO_NUMBER;
    const TileScale t = scale_of(largest, {Fp8Formula::FLASHMLA, true});
    row[i] = std::byte(finite ? float_to_e4m3(v / t.s) : E4M3_NAN);
    if (threadIdx.x == 0) reinterpret_cast<float*>(row + LATENT_SCALED)[tile] = t.s;
}
inline void store_latent(const Matrix& cache, std::span<const int> n, ConstRows x) {
    CHECK(cache.dtype == Dtype::F8_LATENT, "%s", format_of(cache.dtype).name);
    const dim3 grid(unsigned(n.size()), ceil_div(cache.cols, SCALE_BLOCK));
    start(store_latent_kernel, grid, stack_of(cache), n.data(), x);
}
TWIN(store_latent);

// -- 14.2  the sum of one number, in three arithmetics -------------------------------------------

__device__ inline double sum_exact(const Fp8Pair& p) {
    double sum = 0;
    for (int begin = 0, i = 0; begin < p.n; begin += SCALE_BLOCK, i++) {
        double block = 0;
        for (int k = begin + half_lane(); k < min(p.n, begin + SCALE_BLOCK); k += HALF)
            block += double(cuda::e4m3_to_float(p.a[k])) * double(cuda::e4m3_to_float(p.b[k]));
        sum = std::fma(double(p.a_scale[i]) * double(p.b_scale[i]), cuda::sum_lanes(block), sum);
    }
    return sum;
}

__device__ inline float sum_promoted(const Fp8Pair& p) {
    float sum = 0;
    for (int begin = 0, i = 0; begin < p.n; begin += SCALE_BLOCK, i++) {
        float lane = 0;
        for (int k = begin + half_lane(); k < min(p.n, begin + SCALE_BLOCK); k += HALF)
            lane += cuda::e4m3_to_float(p.a[k]) * cuda::e4m3_to_float(p.b[k]);
        sum = std::fma(p.a_scale[i] * p.b_scale[i], cuda::sum_lanes(lane), sum);
    }
    return sum;
}

// What is left of a term under the largest exponent: multiples of 2^(top - 13).
__device__ inline int cut_term(const Aligned& term, int top) {
    const int shift = top - term.exponent + F32_FRACTION - HOPPER_FRACTION;
    return shift < 31 ? term.significand / (1 << max(shift, 0)) : 0;
}

// c plus n products, n at most 32: two of them this thread's.
__device__ inline float hopper_step(float c, const uint8_t* a, const uint8_t* b, int n) {
    const Aligned start = aligned_float(c);
    Aligned mine[2] = {};
    int top = start.significand ? start.exponent : -127, broken = !std::isfinite(c);
    for (int i = 0, k = half_lane(); i < 2 && k < n; i++, k += HALF) {
        mine[i] = aligned_product(a[k], b[k]);
        broken |= (a[k] & 127) == E4M3_NAN || (b[k] & 127) == E4M3_NAN;
        if (mine[i].significand) top = max(top, mine[i].exponent);
    }
    top = max_lanes(top), broken = max_lanes(broken);
    const int sum = cuda::sum_lanes(cut_term(mine[0], top) + cut_term(mine[1], top)) + cut_term(start, top);
    const int bits = 32 - __clz(sum < 0 ? -sum : sum), cut = 1 << max(0, bits - HOPPER_FRACTION - 1);
    return broken ? __uint_as_float(0x7FFFFFFF) : std::ldexp(float(sum / cut * cut), top - HOPPER_FRACTION);
}

__device__ inline float sum_hopper(const Fp8Pair& p) {
    float sum = 0;
    for (int begin = 0, i = 0; begin < p.n; begin += SCALE_BLOCK, i++) {
        const int end = min(p.n, begin + SCALE_BLOCK);
        float block = 0;
        for (int k = begin; k < end; k += HOPPER_STEP)
            block = cuda::hopper_step(block, p.a + k, p.b + k, min(HOPPER_STEP, end - k));
        sum = std::fma(p.a_scale[i] * p.b_scale[i], block, sum);
    }
    return sum;
}

// -- 14.3  gemm_fp8: D = A B^T, dense and grouped ------------------------------------------------

enum class Grouping : uint8_t { DENSE, CONTIGUOUS, MASKED, K_GROUPED };

struct Gemm {
    Fp8Output out;
    Fp8Matrix a, b;
    const int* group;                      // of each row; or rows, or columns, of each group
    Grouping by;
    Fp8Sum arithmetic;
};

// Row m of A, row n of B, and where their product goes; false where there is none.
__device__ inline bool find(const Gemm& g, int64_t m, int64_t n, Fp8Pair& pair, Fp8Output& out) {
    Fp8Matrix a = g.a, b = g.b;
    const int z = int(blockIdx.z);
    int64_t row = m;                       // of D
    if (g.by == Grouping::CONTIGUOUS) {
        if (g.group[m] < 0) return false;
        b = b.group(g.group[m]);
    } else if (g.by == Grouping::MASKED) {
        if (m >= g.group[z]) return false;
        a = a.group(z), b = b.group(z), row += int64_t(z) * a.rows;
    } else if (g.by == Grouping::K_GROUPED) {
        int64_t before = 0;
        for (int i = 0; i < z; i++) before += g.group[i];
        a.q += before * a.rows, a.scale += before / SCALE_BLOCK * a.rows;
        b.q += before * b.rows, b.scale += before / SCALE_BLOCK * b.rows;
        a.n = b.n = g.group[z], row += int64_t(z) * a.rows;
    }
    pair = {a.q + m * a.n, b.q + n * b.n, a.scale_row(m), b.scale_row(n), a.n};
    out = g.out.at(row * b.rows + n);
    return true;
}

__global__ void gemm_fp8_kernel(Gemm g) {
    const int64_t n = int64_t(blockIdx.y) * HALVES + half_of_block(), last = g.b.rows - 1;
    Fp8Pair pair;
    Fp8Output out;
    if (!find(g, blockIdx.x, n < last ? n : last, pair, out)) return;      // for all threads of a block
    const double sum = g.arithmetic == Fp8Sum::EXACT ? cuda::sum_exact(pair)
                       : g.arithmetic == Fp8Sum::PROMOTED ? double(cuda::sum_promoted(pair))
                                                          : double(cuda::sum_hopper(pair));
    if (half_lane() == 0 && n <= last) put(out, sum, g.arithmetic);
}
inline void start_gemm(const Gemm& g, size_t groups) {
    start(gemm_fp8_kernel, dim3(unsigned(g.a.rows), ceil_div(g.b.rows, HALVES), unsigned(groups)), g);
}

inline void gemm_fp8(const Fp8Output& out, const Fp8Matrix& a, const Fp8Matrix& b, Fp8Sum arithmetic) {
    CHECK(a.n == b.n, "K is %d and %d", a.n, b.n);
    start_gemm({out, a, b, nullptr, Grouping::DENSE, arithmetic}, 1);
}
inline void gemm_fp8_contiguous(const Fp8Output& out, const Fp8Matrix& a, const Fp8Matrix& b,
                                std::span<const int> group, Fp8Sum arithmetic) {
    start_gemm({out, a, b, group.data(), Grouping::CONTIGUOUS, arithmetic}, 1);
}
inline void gemm_fp8_masked(const Fp8Output& out, const Fp8Matrix& a, const Fp8Matrix& b,
                            std::span<const int> rows, Fp8Sum arithmetic) {
    start_gemm({out, a, b, rows.data(), Grouping::MASKED, arithmetic}, rows.size());
}
inline void gemm_fp8_k_grouped(const Fp8Output& out, Fp8Matrix a, Fp8Matrix b, std::span<const int> k,
                               Fp8Sum arithmetic) {
    start_gemm({out, a, b, k.data(), Grouping::K_GROUPED, arithmetic}, k.size());
}
TWIN(gemm_fp8);
TWIN(gemm_fp8_contiguous);
TWIN(gemm_fp8_masked);
TWIN(gemm_fp8_k_grouped);

}

// =================================================================================================
// Chapter 15. Many machines
// =================================================================================================
//
// How do GPUs hand each other tokens without their hosts? Each opens a window of its memory to its peers. Who
// has rows for a peer writes them there, and then a flag; who waits reads the flag in its own memory:
//
//      rank 0  rows --write--> | window of 1: rows of source 0 | rows of source 1 | ... | flags |
//              fence, flag --> |                                                     ^ polled by 1
//
// A flag is the number of the call (its epoch) and how many rows came. A window has two halves, for even and
// for odd epochs: before a rank begins epoch n + 2 it has seen all ranks begin n + 1, so all are done with n,
// and no further barrier is needed. Nothing is added in the order of arrival, no slot is given by an atomic:
// places are prefix sums over (source rank, token), and the bits are the CPU's.
//
// Two forms, as in DeepEP. The normal one tells all ranks the counts first, so that rows lie without gaps in
// the order of their sources. The low-latency one is one kernel: rows go to a place that needs no counts, and
// each expert's block packs its own. A wait that lasts too long names who was waited for, and ends.

namespace cuda {

// -- 15.1  dispatch_layout: who gets what --------------------------------------------------------

__device__ inline bool goes(const int* idx, int K, int low, int high) {
    bool any = false;
    for (int k = 0; k < K; k++) any |= idx[k] >= low && idx[k] < high;
    return any;
}
__global__ void in_rank_kernel(Layout out, const int* idx, int T, int K, RankShape s) {
    const int64_t t = item() / s.R, r = item() % s.R;
    if (t < T) out.in_rank[item()] = goes(idx + t * K, K, s.first[r], s.first[r + 1]);
}
// A thread for each count, so that it is made in one order.
__global__ void layout_kernel(Layout out, const int* idx, int T, int K, RankShape s) {
    const int nodes = (s.R + s.per_node - 1) / s.per_node;
    for (int64_t i = item(); i < s.R + nodes + s.first[s.R]; i += int64_t(gridDim.x) * blockDim.x) {
        const bool rank = i < s.R, node = !rank && i < s.R + nodes;
        const int64_t n = i - s.R, p = n - nodes;
        int low = int(p), high = int(p) + 1, count = 0;
        if (rank) low = s.first[i], high = s.first[i + 1];
        if (node) low = s.first[n * s.per_node], high = s.first[min(s.R, int(n + 1) * s.per_node)];
        for (int t = 0; t < T; t++) {
            if (rank || node) count += goes(idx + int64_t(t) * K, K, low, high);
            else for (int k = 0; k < K; k++) count += idx[int64_t(t) * K + k] == low;
        }
        (rank ? out.per_rank[i] : node ? out.per_node[n] : out.per_expert[p]) = count;
    }
}
// shape.first, too, lies in the device's memory.
inline void dispatch_layout(const Layout& out, const int* idx, int T, int K, const RankShape& shape) {
    start_each(in_rank_kernel, int64_t(T) * shape.R, out, idx, T, K, shape);
    start(layout_kernel, dim3(4), out, idx, T, K, shape);
}
TWIN(dispatch_layout);

// -- 15.2  dispatch: rows into the windows of peers ----------------------------------------------

constexpr int MOST_RANKS = 16;

// A rank, as its kernels see it.
struct Peers {
    int R, me, K, D, most;                 // most: tokens of a rank in one call
    Dtype there, back;                     // of the numbers on their way: F32, BF16; there also F8_E4M3
    int64_t patience;                      // polls
    unsigned epoch;
    int first[MOST_RANKS + 1];             // rank r has the experts first[r] .. first[r + 1]
    std::byte* window[MOST_RANKS];         // of each rank

    EVERYWHERE int own() const { return first[me + 1] - first[me]; }
    EVERYWHERE static int64_t aligned(int64_t n) { return (n + 15) / 16 * 16; }
    EVERYWHERE static int64_t encoded(Dtype dtype, int D) {
        return aligned(dtype == Dtype::F32 ? 4 * int64_t(D) : dtype == Dtype::BF16 ? 2 * int64_t(D)
                                                                         : D + 3 + 4 * scale_blocks(D));
    }
    EVERYWHERE int64_t row_size() const { return aligned(4 * (2 + 2 * K)) + encoded(there, D); }
    EVERYWHERE int64_t rows() const { return int64_t(R) * most; }
    EVERYWHERE int64_t flags() const { return R * R + 2 * R + first[R]; }
    EVERYWHERE int64_t half() const {
        return aligned(8 * flags()) + rows() * row_size() + int64_t(most) * K * encoded(back, D);
    }
    // The half of rank r's window for this epoch: counts of each source for each rank; flags of rows from
    // each source; of results from each rank, and of each expert; rows; results by (token, k).
    __device__ std::byte* at(int r) const { return window[r] + 16 + epoch % 2 * half(); }
    __device__ volatile uint64_t* counts(int r) const { return reinterpret_cast<uint64_t*>(at(r)); }
    __device__ volatile uint64_t* arrived(int r) const { return counts(r) + R * R; }
    __device__ volatile uint64_t* returned(int r) const { return arrived(r) + R; }
    __device__ volatile uint64_t* expert_done(int r) const { return returned(r) + R; }
    __device__ std::byte* row(int r, int64_t i) const {
        return at(r) + aligned(8 * flags()) + i * row_size();
    }
    // Of a row, its numbers behind what is said of its token.
    __device__ std::byte* numbers(std::byte* row) const { return row + aligned(4 * (2 + 2 * K)); }
    __device__ std::byte* result(int r, int64_t i) const { return row(r, rows()) + i * encoded(back, D); }
    __device__ uint64_t word(int n) const { return uint64_t(epoch) << 32 | unsigned(n); }
    __device__ volatile int* late() const { return reinterpret_cast<int*>(window[me]); }
};
// What a row says of its token: token, source, K experts, K weights.
__device__ inline int* head_of(std::byte* row) { return reinterpret_cast<int*>(row); }

// The count that `who` wrote with the flag of this epoch; 0 where it does not come.
__device__ inline int await(const Peers& p, const volatile uint64_t* flag, int who) {
    for (int64_t poll = 0; poll < p.patience; poll++) {
        const uint64_t word = *flag;
        if (unsigned(word >> 32) == p.epoch) return __threadfence_system(), int(unsigned(word));
        __nanosleep(20);
    }
    *p.late() = who + 1;
    return 0;
}
// What all threads of the block wrote before is seen by who sees the flag.
__device__ inline void release(volatile uint64_t* flag, uint64_t word) {
    __syncthreads();
    if (threadIdx.x != 0) return;
    __threadfence_system();
    *flag = word;
}

// x as `dtype`, by a half-warp. All 32 lanes of a warp call it, those of a half that is not `active` too.
__device__ inline void encode(std::byte* to, const float* x, int D, Dtype dtype, bool active) {
    for (int tile = 0; tile < D; tile += SCALE_BLOCK) {
        const int end = min(tile + SCALE_BLOCK, D);
        uint32_t largest = 0;
        for (int d = tile + half_lane(); active && d < end; d += HALF) {
            const uint32_t bits = magnitude_bits(x[d]);
            largest = bits > largest ? bits : largest;
            if (dtype == Dtype::F32) reinterpret_cast<float*>(to)[d] = x[d];
            if (dtype == Dtype::BF16) reinterpret_cast<uint16_t*>(to)[d] = float_to_bf16(x[d]);
        }
        if (dtype != Dtype::F8_E4M3) continue;
        largest = max_lanes(largest);
        const TileScale s = scale_of(largest, {Fp8Formula::DEEPEP});
        const bool finite = largest < NO_NUMBER;
        for (int d = tile + half_lane(); active && d < end; d += HALF)
            to[d] = std::byte(finite ? float_to_e4m3(x[d] * s.inverse) : E4M3_NAN);
        float* scales = reinterpret_cast<float*>(to + (D + 3) / 4 * 4);
        if (active && half_lane() == 0) scales[tile / SCALE_BLOCK] = s.s;
    }
}
__device__ inline float decoded(const std::byte* from, int D, Dtype dtype, int d) {
    if (dtype == Dtype::F32) return reinterpret_cast<const float*>(from)[d];
    if (dtype == Dtype::BF16) return bf16_to_float(reinterpret_cast<const uint16_t*>(from)[d]);
    const float scale = reinterpret_cast<const float*>(from + (D + 3) / 4 * 4)[d / SCALE_BLOCK];
    return e4m3_to_float(uint8_t(from[d])) * scale;
}

struct Tokens {                            // of a rank
    const float* x;                        // (T, D)
    const int* idx;                        // (T, K), physical experts; -1: none
    const float* weight;                   // (T, K)
    int T;
};

// A block: this rank's tokens for rank r, from row `base` on; then the flag. A half-warp has a token.
__device__ inline void send_rows(const Peers& p, const Tokens& a, int r, int64_t base) {
    const int low = p.first[r], high = p.first[r + 1];
    int before = 0, seen = 0;                                // tokens so far that go there; looked at
    for (int t0 = 0; t0 < a.T; t0 += HALVES) {
        const int t = t0 + half_of_block();
        for (; seen < min(t, a.T); seen++) before += goes(a.idx + int64_t(seen) * p.K, p.K, low, high);
        const bool active = t < a.T && goes(a.idx + int64_t(t) * p.K, p.K, low, high);
        std::byte* row = p.row(r, base + before);
        int* head = head_of(row);
        for (int k = half_lane(); active && k < p.K; k += HALF) {
            head[2 + k] = a.idx[int64_t(t) * p.K + k];
            head[2 + p.K + k] = __float_as_int(a.weight[int64_t(t) * p.K + k]);
        }
        if (active && half_lane() == 0) head[0] = t, head[1] = p.me;
        encode(p.numbers(row), a.x + int64_t(t) * p.D, p.D, p.there, active);
    }
    for (; seen < a.T; seen++) before += goes(a.idx + int64_t(seen) * p.K, p.K, low, high);
    release(p.arrived(r) + p.me, p.word(before));
}

// A thread a pair of ranks: how many of this rank's tokens go to rank r, to all peers.
__global__ void notify_kernel(Peers p, Tokens a) {
    for (int64_t i = item(); i < p.R * p.R; i += int64_t(gridDim.x) * blockDim.x) {
        const int peer = int(i) / p.R, r = int(i) % p.R;
        int n = 0;
        for (int t = 0; t < a.T; t++) n += goes(a.idx + int64_t(t) * p.K, p.K, p.first[r], p.first[r + 1]);
        p.counts(peer)[p.me * p.R + r] = p.word(n);
    }
}
// A block a rank, in turn: its rows begin after those of the sources before this one.
__global__ void send_kernel(Peers p, Tokens a) {
    SHARED(int, before, 1);
    for (int r = int(blockIdx.x); r < p.R; r += int(gridDim.x)) {
        if (threadIdx.x == 0) {
            before[0] = 0;
            for (int s = 0; s < p.me; s++) before[0] += await(p, p.counts(p.me) + s * p.R + r, s);
        }
        __syncthreads();
        send_rows(p, a, r, before[0]);
        __syncthreads();
    }
}

struct Taken {                            // what a rank received: room for R * most rows
    int* n;                                // (1)
    float* x;                              // (n, D)
    int* idx;                              // (n, K), own experts from 0; -1: of another rank
    float* weight;                         // (n, K), 0 there
    int *source, *token;                   // (n)
};
__global__ void take_kernel(Peers p, Taken out) {
    SHARED(int, n, 1);
    if (threadIdx.x == 0) {
        n[0] = 0;
        for (int s = 0; s < p.R; s++) n[0] += await(p, p.arrived(p.me) + s, s);
        if (blockIdx.x == 0) *out.n = n[0];
    }
    __syncthreads();
    const int total = n[0];
    const int64_t step = int64_t(gridDim.x) * HALVES;
    for (int64_t i = int64_t(blockIdx.x) * HALVES + half_of_block(); i < total; i += step) {
        std::byte* row = p.row(p.me, i);
        const int* head = head_of(row);
        for (int k = half_lane(); k < p.K; k += HALF) {
            const bool here = head[2 + k] >= p.first[p.me] && head[2 + k] < p.first[p.me + 1];
            out.idx[i * p.K + k] = here ? head[2 + k] - p.first[p.me] : -1;
            out.weight[i * p.K + k] = here ? __int_as_float(head[2 + p.K + k]) : 0;
        }
        if (half_lane() == 0) out.token[i] = head[0], out.source[i] = head[1];
        for (int d = half_lane(); d < p.D; d += HALF)
            out.x[i * p.D + d] = decoded(p.numbers(row), p.D, p.there, d);
    }
}

struct Slabs {                             // low latency: a slab of R * most rows for each own expert
    float* x;                              // (own, R * most, D), packed by source and token
    int64_t* range;                        // (own, R): begin << 32 | count
    int* whose;                            // (own, R * most, 3): source, token, k
};
// A block an expert: waits for all sources, and packs the rows that are the expert's.
__device__ inline void receive_expert(const Peers& p, const Slabs& out, int e) {
    SHARED(int, n, MOST_RANKS);
    SHARED(int, begin, MOST_RANKS + 1);
    const int expert = p.first[p.me] + e, thread = int(threadIdx.x);
    const int64_t slab = int64_t(e) * p.rows();
    auto has = [&](int s, int i) {
        const int* head = head_of(p.row(p.me, int64_t(s) * p.most + i));
        for (int k = 0; k < p.K; k++) if (head[2 + k] == expert) return k;
        return -1;
    };
    if (thread < p.R) {
        n[thread] = await(p, p.arrived(p.me) + thread, thread);
        begin[thread + 1] = 0;
        for (int i = 0; i < n[thread]; i++) begin[thread + 1] += has(thread, i) >= 0;
    }
    __syncthreads();
    if (thread == 0) {
        begin[0] = 0;
        for (int s = 0; s < p.R; s++) {
            out.range[e * p.R + s] = int64_t(begin[s]) << 32 | begin[s + 1];
            begin[s + 1] += begin[s];
        }
    }
    __syncthreads();
    for (int s = 0; s < p.R; s++) {
        const int rows = n[s];
        for (int i = half_of_block(); i < rows; i += HALVES) {
            const int k = has(s, i);
            if (k < 0) continue;
            int64_t slot = slab + begin[s];
            for (int j = 0; j < i; j++) slot += has(s, j) >= 0;
            std::byte* row = p.row(p.me, int64_t(s) * p.most + i);
            int* whose = out.whose + slot * 3;
            if (half_lane() == 0) whose[0] = s, whose[1] = head_of(row)[0], whose[2] = k;
            for (int d = half_lane(); d < p.D; d += HALF)
                out.x[slot * p.D + d] = decoded(p.numbers(row), p.D, p.there, d);
        }
    }
    __syncthreads();
}
// All blocks must be on the GPU at the same time: each sends first, then waits.
__global__ void low_latency_dispatch_kernel(Peers p, Tokens a, Slabs out) {
    for (int r = int(blockIdx.x); r < p.R; r += int(gridDim.x)) {
        send_rows(p, a, r, int64_t(p.me) * p.most);
        __syncthreads();
    }
    for (int e = int(blockIdx.x); e < p.own(); e += int(gridDim.x)) receive_expert(p, out, e);
}

// -- 15.3  combine: results into the windows of their homes --------------------------------------

// A half-warp a row. EXPERT order: each expert's result goes home; RANK: their sum, behind those of the ranks
// before.   expert_out: (pairs, D), by slot (n, K)
__global__ void return_kernel(Peers p, Taken rows, const float* expert_out, const int* slot, float* sums,
                              bool by_rank) {
    const int total = *rows.n;
    for (int64_t i0 = int64_t(blockIdx.x) * HALVES; i0 < total; i0 += int64_t(gridDim.x) * HALVES) {
        const int64_t i = i0 + half_of_block();
        const bool active = i < total;
        const int home = active ? rows.source[i] : 0;
        const int64_t first = active ? int64_t(rows.token[i]) * p.K : 0;
        const int* head = head_of(p.row(p.me, active ? i : 0));
        int ranks_before = 0;
        for (int r = 0; active && r < p.me; r++)
            ranks_before += goes(head + 2, p.K, p.first[r], p.first[r + 1]);
        for (int d = half_lane(); active && by_rank && d < p.D; d += HALF) {
            float sum = 0;
            for (int64_t k = i * p.K; k < (i + 1) * p.K; k++)
                if (rows.idx[k] >= 0)
                    sum = std::fma(rows.weight[k], expert_out[int64_t(slot[k]) * p.D + d], sum);
            sums[i * p.D + d] = sum;
        }
        if (by_rank) {
            encode(p.result(home, first + ranks_before), sums + i * p.D, p.D, p.back, active);
            continue;
        }
        for (int k = 0; k < p.K; k++) {
            const bool here = active && rows.idx[i * p.K + k] >= 0;
            const float* made = expert_out + (here ? int64_t(slot[i * p.K + k]) * p.D : 0);
            encode(p.result(home, first + k), made, p.D, p.back, here);
        }
    }
}
__global__ void release_kernel(Peers p) {
    const int r = int(threadIdx.x);
    __threadfence_system();
    if (r < p.R) p.returned(r)[p.me] = p.word(1);
}

// A block a token, in turn. `flags`: of each rank, or of each expert.
__device__ inline void sum_results(const Peers& p, const Tokens& a, float* out, bool by_rank,
                                   bool of_experts) {
    for (int t = int(blockIdx.x); t < a.T; t += int(gridDim.x)) {
        const int* idx = a.idx + int64_t(t) * p.K;
        if (threadIdx.x == 0) {
            for (int k = 0; of_experts && k < p.K; k++) {
                int owner = 0;
                while (idx[k] >= p.first[owner + 1]) owner++;
                if (idx[k] >= 0) await(p, p.expert_done(p.me) + idx[k], owner);
            }
            for (int r = 0; !of_experts && r < p.R; r++) await(p, p.returned(p.me) + r, r);
        }
        __syncthreads();
        int ranks = 0;
        for (int r = 0; r < p.R; r++) ranks += goes(idx, p.K, p.first[r], p.first[r + 1]);
        for (int d = int(threadIdx.x); d < p.D; d += THREADS) {
            float sum = 0;
            for (int k = 0; k < (by_rank ? ranks : p.K); k++) {
                if (!by_rank && idx[k] < 0) continue;
                const float made = decoded(p.result(p.me, int64_t(t) * p.K + k), p.D, p.back, d);
                sum = std::fma(by_rank ? 1.0f : a.weight[int64_t(t) * p.K + k], made, sum);
            }
            out[int64_t(t) * p.D + d] = sum;
        }
        __syncthreads();
    }
}
__global__ void sum_kernel(Peers p, Tokens a, float* out, bool by_rank) {
    sum_results(p, a, out, by_rank, false);
}

// One kernel: a block an expert returns its slab's results, made (own, R * most, D); a block a token adds.
__global__ void low_latency_combine_kernel(Peers p, Tokens a, Slabs slabs, const float* made, float* out) {
    for (int e = int(blockIdx.x); e < p.own(); e += int(gridDim.x)) {
        int n = 0;
        for (int s = 0; s < p.R; s++) n += int(slabs.range[e * p.R + s] & 0xFFFFFFFF);
        for (int i0 = 0; i0 < n; i0 += HALVES) {
            const bool active = i0 + half_of_block() < n;
            const int64_t slot = int64_t(e) * p.rows() + (active ? i0 + half_of_block() : 0);
            const int* whose = slabs.whose + slot * 3;
            std::byte* to = active ? p.result(whose[0], int64_t(whose[1]) * p.K + whose[2]) : nullptr;
            encode(to, made + slot * p.D, p.D, p.back, active);
        }
        for (int r = 0; r < p.R; r++) release(p.expert_done(r) + p.first[p.me] + e, p.word(1));
        __syncthreads();
    }
    sum_results(p, a, out, false, true);
}

// -- 15.4  ranks on the GPUs of this machine -----------------------------------------------------

// A window for each of R ranks, which take the GPUs in turn; a queue for each. All ranks' calls of a step are
// asked for before any is waited for.
class PeerGroup {
public:
    // first: (R + 1)   most: tokens of a rank in one call
    PeerGroup(const std::vector<int>& first, int K, int D, int most, Dtype there, Dtype back)
        : R(int(first.size()) - 1) {
        CHECK(R >= 1 && R <= MOST_RANKS, "%d ranks", R);
        Peers p{R, 0, K, D, most, there, back, PATIENCE, 0, {}, {}};
        const auto none = std::adjacent_find(first.begin(), first.end(), std::greater_equal<int>());
        CHECK(none == first.end(), "a rank has no expert");
        std::copy(first.begin(), first.end(), p.first);
        check(cudaGetDeviceCount(&devices_), "the devices");
        for (int d = 0; d < devices_; d++) {
            on(d);
            for (int other = 0; other < devices_; other++)
                if (other != d) allow(cudaDeviceEnablePeerAccess(other, 0));
        }
        for (int r = 0; r < R; r++) {
            on(r);
            check(cudaStreamCreate(&queues_.emplace_back()), "a queue");
            check(cudaMalloc(reinterpret_cast<void**>(&p.window[r]), size_t(16 + 2 * p.half())), "a window");
            check(cudaMemset(p.window[r], 0, size_t(16 + 2 * p.half())), "a window");
            check(cudaDeviceSynchronize(), "a window");
        }
        for (int r = 0; r < R; r++) p.me = r, peers.push_back(p);
        int blocks = 0;
        check(cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, 0), "the device");
        blocks_ = unsigned(std::max(1, blocks / ((R + devices_ - 1) / devices_)));
        on(0);
    }
    ~PeerGroup() {
        for (int r = 0; r < R; r++) {
            cudaSetDevice(r % devices_), cudaFree(peers[0].window[r]);
            cudaStreamDestroy(queues_[size_t(r)]);
        }
        cudaSetDevice(0);
    }
    PeerGroup(const PeerGroup&) = delete;

    static constexpr int64_t PATIENCE = int64_t(1) << 26;    // some ten seconds
    int R;
    std::vector<Peers> peers;                                // (R)

    void on(int r) const { check(cudaSetDevice(r % devices_), "a device"); }
    void next_epoch() { for (Peers& p : peers) p.epoch++; }
    template <class... Params, class... Args> void start(int r, void (*kernel)(Params...), Args... args) {
        on(r);
        launch(kernel, dim3(blocks_), dim3(THREADS), 0, queues_[size_t(r)], args...);
        check(cudaGetLastError(), "a launch");
    }
    // Waits for all ranks; fails where one of them waited too long for another.
    void wait() {
        int late[MOST_RANKS] = {};
        for (int r = 0; r < R; r++) {
            on(r), check(cudaStreamSynchronize(queues_[size_t(r)]), "a kernel");
            check(cudaMemcpy(&late[r], peers[0].window[r], sizeof(int), cudaMemcpyDeviceToHost), "a window");
        }
        on(0);
        for (int r = 0; r < R; r++)
            if (late[r]) fail("cuda: rank %d waited too long for rank %d", r, late[r] - 1);
    }

private:
    int devices_ = 0;
    unsigned blocks_ = 1;                                    // of a kernel: all are on the GPU at once
    std::vector<cudaStream_t> queues_;

    static void allow(cudaError_t error) {
        if (error != cudaErrorPeerAccessAlreadyEnabled) check(error, "access to a peer");
        else cudaGetLastError();
    }
};

}

// =================================================================================================
// Chapter 22. Command line
// =================================================================================================
//
//      deepseek check            every twin against its operation, a line each
//      deepseek check 10         those of chapter 10
//
// What is compared stands in tests/twins/twins.h: for each twin the sizes at which kernels go wrong, each
// case made in both memories, all bits of what can be written compared.

#include "tests/twins/twins.h"

namespace cuda {

// -- 22.1  deepseek check ------------------------------------------------------------------------

struct Twin {
    const char *section, *name;
    void (*run)(Check&);
};
#define CHECKED(section, f) {section, #f, check_##f}
constexpr Twin TWINS[] = {
    CHECKED("5.1", softmax), CHECKED("5.1", silu_times), CHECKED("5.1", add), CHECKED("5.1", add_bias),
    CHECKED("5.2", matmul), CHECKED("5.2", matmul_transposed), CHECKED("5.3", embed),
    CHECKED("5.3", rmsnorm), CHECKED("5.4", top_k), CHECKED("6.1", rope_interleaved),
    CHECKED("6.1", rope_half), CHECKED("7.1", attend), CHECKED("7.2", store), CHECKED("7.3", gqa_attend),
    CHECKED("8.1", mla_naive), CHECKED("8.1", mla_absorbed), CHECKED("8.2", mla_paged),
    CHECKED("9.1", swiglu), CHECKED("10.1", gate_greedy), CHECKED("10.1", gate_group_limited_greedy),
    CHECKED("10.1", gate_noaux_tc), CHECKED("10.2", dispatch), CHECKED("10.3", run_experts),
    CHECKED("10.3", combine), CHECKED("12.1", choose), CHECKED("14.1", quantise_fp8),
    CHECKED("14.1", store_latent),
    CHECKED("14.3", gemm_fp8), CHECKED("14.3", gemm_fp8_contiguous), CHECKED("14.3", gemm_fp8_masked),
    CHECKED("14.3", gemm_fp8_k_grouped), CHECKED("15.1", dispatch_layout), CHECKED("15.2", peers),
    CHECKED("15.2", peers_low_latency), CHECKED("15.2", epochs_in_flight),
    CHECKED("15.2", late_peers)};

// Prints a line a twin of section "10.2", of chapter "10", or of all (""), and the counts; how many failed.
inline int check_twins(const std::string& section) {
    int passed = 0, failed = 0;
    if (std::string why = missing(); !why.empty()) fail("check: %s", why.c_str());
    begin();
    choose_kernels("plain", true);         // the definitions, with weights dequantised
    for (const Twin& twin : TWINS) {
        const std::string name = twin.section;
        if (!section.empty() && name != section && !name.starts_with(section + ".")) continue;
        Check c{twin.section, twin.name};
        twin.run(c);
        std::printf("%-5s %-26s %4d cases   worst %-9.3g bound %-9.3g %s\n", c.section, c.name, c.cases,
                    c.worst, c.bound, c.wrong.empty() ? "ok" : ("FAILED, " + c.wrong).c_str());
        std::fflush(stdout);
        (c.wrong.empty() ? passed : failed)++;
    }
    if (passed + failed == 0) fail("check: no twins in section '%s'", section.c_str());
    std::printf("check: %d passed, %d failed\n", passed, failed);
    return failed;
}

// What deepseek.cpp cannot name: from the start of the program on there is a GPU to choose.
const bool installed = (gpu = &GPU, ::check_twins = cuda::check_twins, true);

}
