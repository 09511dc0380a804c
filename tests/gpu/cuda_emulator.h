// CUDA on the CPU: what kernels and their tests include in place of nvcc's own declarations.
//
// Can a kernel be tested where there is no GPU? Its source is C++. Compiled by g++ against CUDA's real
// headers, a thread of the GPU becomes a fiber, and all fibers of all devices take turns on one thread of the
// host, so that a run is reproduced from its seed:
//
//      blocked fiber --> scheduler (FIFO, random, or random priorities of warps) --> a fiber that is ready
//
// A fiber gives way at barriers, in collectives of its warp and where it spins. What a GPU leaves undefined
// and mostly gets right is an error here: a wrong mask, a barrier that not all reach, shared memory read
// before it was written, without a barrier after it was, or while a cp.async may still write it, an access
// outside an allocation, a device pointer read by the host, an argument that points to the host, a device's
// memory without peer access. When nothing can go on, each warp says what it waits for.
//
// In a test an error is an exception. A program that knows nothing of the emulator ends with the error's line
// and exit code 3; environment variables choose the order and plan failures, see `options_of_environment`.
//
// What it cannot tell: speed, the weakness of a real memory model, what nvcc makes of the source, races
// between threads in global memory (random orders alone look for those) and those of atomics with other
// accesses.
//
// Namespace ptx has a function for each instruction that CUDA C++ has no word for: named barriers, cp.async,
// ldmatrix, mma.sync. Not in here, as no kernel uses them yet: clusters, TMA, mbarriers, wgmma.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include <cuda_runtime_api.h>
#include <vector_functions.h>

namespace emulator {

// A mistake of the program under test, in one or several lines.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

enum class Order : uint8_t { FIFO, RANDOM, PRIORITY };      // which ready fiber is next
enum class Async : uint8_t { EAGER, LAZY, RANDOM };         // when a stream's work is done: see `reset`

struct Options {
    Order order = Order::FIFO;
    Async async = Async::LAZY;
    uint64_t seed = 1;
    int devices = 1, blocks = 4;           // blocks of a device that are under way at the same time
    size_t memory = size_t(1) << 30;       // bytes of each device
    int capability = 90;                   // ten times CUDA's compute capability
    int fault = 0;                         // which launch fails as one that crashes, counted from 1
    bool throws = true;                    // an Error; if not, says it and ends with exit code 3
};

// EMU_ORDER=fifo, random or priority; EMU_ASYNC=eager, lazy or random; EMU_SEED, EMU_DEVICES (0: there is
// none, -1: nor a driver), EMU_MEMORY, EMU_CAPABILITY and EMU_FAULT are numbers. What is not set is as above.
Options options_of_environment();

// As after the start of a process. Eager: an operation is done when the call that asks for it returns. Lazy:
// no earlier than a call must wait for it. Memory and streams from before are gone.
void reset(const Options& options);
const Options& options();
size_t allocated();                        // bytes of all devices that were not freed

// -- one thread of the device: where it is ---------------------------------------------------------------

struct Index {
    uint3 thread, block;
    dim3 block_dim, grid_dim;
};
inline const Index* here = nullptr;        // of the running fiber; none: the host runs

// -- collectives, barriers -------------------------------------------------------------------------------

enum class Kind : uint8_t {
    SYNC, SHUFFLE, BALLOT, ANY, ALL, ADD, LEAST, LARGEST, AND, OR, XOR, TOGETHER
};

// What the lanes of `mask` make of their values; a shuffle gives that of lane `source`.
uint64_t collective(Kind kind, uint32_t mask, uint64_t value, int source = 0);
int barrier(int line, bool vote = false);  // how many voted for it
void named_barrier(int id, int threads, bool waits);
int lane();
void give_way();                           // maybe: another fiber may run here
void spin();                               // nothing changed yet: others must run
[[noreturn]] void trap();                  // every call to the run time fails from now on

template <class T> uint64_t to_bits(T value) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}
template <class T> T from_bits(uint64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Lane `source` of my segment of `width` lanes; mine where that is outside of it.
template <class T> T shuffle(uint32_t mask, T value, int source, int width) {
    int segment = lane() / width * width;
    bool inside = source >= segment && source < segment + width;
    return from_bits<T>(collective(Kind::SHUFFLE, mask, to_bits(value), inside ? source : lane()));
}

// -- shared memory: an array that knows who touched it ---------------------------------------------------

// Who did something: epoch << 32 | time << 11 | 1024 | thread. The epoch changes at each barrier of the block
// and is never used again, the time is the warp's; 0 is no one.
using Stamp = uint64_t;
constexpr Stamp THREAD = 2047, WARP = 2047 - 31, IN_FLIGHT = ~Stamp(0) << 32;

struct Now {
    Stamp epoch, stamp;                    // the first of the epoch; that of the running thread
};
inline Now now{};

struct Cell {
    // Who wrote it last. Who read it since: the last; before that, the last other lane of a reader's warp;
    // the last reader of another warp.
    Stamp write, read[3];
};
struct SharedArray {
    const void* tag;
    const char* name;
    size_t count, size;
    std::byte* data;
    Cell* cells;
    Stamp born = 0, ended = 0;             // epochs of its block; what is older belongs to another one
    size_t from = 0, until = 0;            // bytes of the dynamic memory; none: it is not dynamic

    SharedArray(const void* tag, const char* name, size_t count, size_t size);
    SharedArray(const SharedArray&) = delete;
    ~SharedArray();
};
SharedArray* shared_array(const void* tag, size_t count, size_t bytes, const char* name);
constexpr size_t WHOLE = ~size_t(0);       // as many elements as there is memory for
SharedArray* dynamic_array(const void* tag, size_t from, size_t count, size_t bytes, const char* name);
void* touch_vector(SharedArray* array, int64_t i, size_t bytes, bool writes);
void* touch(SharedArray* array, int64_t i, bool writes);         // the address of element i
void* address(SharedArray* array, int64_t i);

// Before the last barrier, or by this thread.
inline bool settled(Stamp s) { return s < now.epoch || !((s ^ now.stamp) & THREAD); }
inline void note_read(Cell& c) {
    Stamp last = c.read[0], other = last ^ now.stamp;
    if (other & THREAD) c.read[other & WARP ? 2 : 1] = last;
    c.read[0] = now.stamp;
}
inline void note_write(Cell& c) { c = {now.stamp, {}}; }

// What is plainly right is settled here; `touch` judges the rest.
template <class T> class Shared {
public:
    explicit Shared(SharedArray* array)
        : array_(array), data_(reinterpret_cast<T*>(array->data)), cells_(array->cells), born_(array->born),
          count_(array->count) {}

    class Element {
    public:
        Element(const Shared& a, int64_t i) : a_(a), i_(i) {}
        Element(const Element&) = default;
        operator T() const { return a_.get(i_); }
        T operator=(T value) const { return a_.set(i_, value), value; }
        T operator=(const Element& other) const { return *this = T(other); }
        T operator+=(T value) const { return *this = T(*this) + value; }
        T operator-=(T value) const { return *this = T(*this) - value; }
        T operator*=(T value) const { return *this = T(*this) * value; }
        T* operator&() const { return static_cast<T*>(address(a_.array_, i_)); }     // for atomics: no access

    private:
        const Shared a_;
        int64_t i_;
    };
    Element operator[](int64_t i) const { return {*this, i}; }
    template <class V> void* vector_at(int64_t i, bool writes) const {
        static_assert(sizeof(V) % sizeof(T) == 0 && sizeof(V) <= 16);
        return touch_vector(array_, i, sizeof(V), writes);
    }

private:
    T get(int64_t i) const {
        if (size_t(i) < count_) {
            Cell& c = cells_[i];
            if (c.write >= born_ && settled(c.write)) return note_read(c), data_[i];
        }
        return *static_cast<const T*>(touch(array_, i, false));
    }
    void set(int64_t i, const T& value) const {
        if (size_t(i) < count_) {
            Cell& c = cells_[i];
            bool ours = settled(c.write) && settled(c.read[0]) && settled(c.read[1]) && settled(c.read[2]);
            if (ours) return note_write(c), void(data_[i] = value);
        }
        *static_cast<T*>(touch(array_, i, true)) = value;
    }

    SharedArray* array_;
    T* data_;
    Cell* cells_;
    Stamp born_;
    size_t count_;
};

// -- numbers ---------------------------------------------------------------------------------------------

// As the processor of a GPU converts: to the nearest that T has, and NaN to 0. `x` is rounded already.
template <class T> T saturated(double x) {
    if (std::isnan(x)) return 0;
    if (x >= std::ldexp(1.0, std::numeric_limits<T>::digits)) return std::numeric_limits<T>::max();
    return x <= double(std::numeric_limits<T>::min()) ? std::numeric_limits<T>::min() : T(x);
}

// The sum of four products of the bytes of a and b, each taken as a T.
template <class T, class Sum> Sum dot4(uint32_t a, uint32_t b, Sum sum) {
    uint32_t bits = uint32_t(sum);         // wraps
    for (int i = 0; i < 32; i += 8) bits += uint32_t(int(T(a >> i)) * int(T(b >> i)));
    return Sum(bits);
}

// -- instructions that CUDA C++ has no word for -----------------------------------------------------------

// cp.async: until the thread waits for it, its target is poison or the copy, as Async says, and no one may
// touch it; afterwards it is as if this thread had written it.
void async_copy(void* shared, const void* global, int size, int valid);
void async_commit();
void async_wait(int groups);               // for all but the last `groups`; -1: for all, committed or not

enum class Number : uint8_t { F16, BF16, TF32, E4M3, S8 };
struct Fragments {                         // of a lane
    const uint32_t *a, *b;
    void* sum;
};
void load_matrices(uint32_t* parts, int n, bool transposed, const void* row);
void multiply_matrices(Number type, const Fragments& f, bool saturate = false);

// -- atomics ---------------------------------------------------------------------------------------------

template <class T> using Same = std::type_identity_t<T>;         // is converted to T, and does not tell it

// One thread of the host runs everything: between two chances to give way, anything is atomic.
template <class T, class Change> T atomically(T* p, const Change& change) {
    emulator::give_way();
    T old = *p;
    *p = T(change(old));
    return old;
}

// -- launches --------------------------------------------------------------------------------------------

// `body` is what each thread does; `kernel` is for messages.
void enqueue(const void* kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
             std::function<void()> body);

// An argument that points to the host's memory, or to none, is an error.
void check_pointer(const void* kernel, const void* p);
template <class T> void check_argument(const void* kernel, const T& argument) {
    if constexpr (std::is_pointer_v<T> && !std::is_function_v<std::remove_pointer_t<T>>)
        check_pointer(kernel, const_cast<const void*>(static_cast<const volatile void*>(argument)));
}

}

// -- the words of CUDA C++ -------------------------------------------------------------------------------

#ifndef __launch_bounds__
#define __launch_bounds__(...)
#endif
#undef __shared__
#define __shared__ static_assert(false, "SHARED or DYNAMIC_SHARED: several blocks are under way at once");
#define threadIdx (emulator::here->thread)
#define blockIdx (emulator::here->block)
#define blockDim (emulator::here->block_dim)
#define gridDim (emulator::here->grid_dim)

// The tag is one a place in the source, and one an instance of a template.
#define SHARED(T, name, count)                                                                             \
    static const char name##_tag = 0;                                                                      \
    const emulator::Shared<T> name(emulator::shared_array(&name##_tag, count, sizeof(T), #name))
// The memory that the launch asked for: all of it, or `count` elements from byte `first` on.
#define DYNAMIC_SHARED(T, name) DYNAMIC_PART(T, name, 0, emulator::WHOLE)
#define DYNAMIC_PART(T, name, first, count)                                                                \
    static const char name##_tag = 0;                                                                      \
    const emulator::Shared<T> name(emulator::dynamic_array(&name##_tag, first, count, sizeof(T), #name))

// Several elements at once, from a[i] on: one access of 4, 8 or 16 bytes, as a GPU likes it best.
template <class V, class T> V load_vector(const emulator::Shared<T>& a, int64_t i) {
    V v;
    std::memcpy(&v, a.template vector_at<V>(i, false), sizeof v);
    return v;
}
template <class V, class T> void store_vector(const emulator::Shared<T>& a, int64_t i, const V& v) {
    std::memcpy(a.template vector_at<V>(i, true), &v, sizeof v);
}

#define __syncthreads() void(emulator::barrier(__LINE__))
#define __syncthreads_count(predicate) emulator::barrier(__LINE__, (predicate) != 0)
#define __syncthreads_or(predicate) int(__syncthreads_count(predicate) > 0)
#define __syncthreads_and(predicate) int(__syncthreads_count((predicate) == 0) == 0)
inline void __syncwarp(uint32_t mask = ~0u) { emulator::collective(emulator::Kind::SYNC, mask, 0); }

template <class T> T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
    return emulator::shuffle(mask, value, emulator::lane() / width * width + source % width, width);
}
template <class T> T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32) {
    return emulator::shuffle(mask, value, emulator::lane() ^ bits, width);
}
template <class T> T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
    return emulator::shuffle(mask, value, emulator::lane() - int(delta), width);
}
template <class T> T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32) {
    return emulator::shuffle(mask, value, emulator::lane() + int(delta), width);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
    return uint32_t(emulator::collective(emulator::Kind::BALLOT, mask, predicate != 0));
}
inline int __any_sync(uint32_t mask, int predicate) {
    return int(emulator::collective(emulator::Kind::ANY, mask, predicate != 0));
}
inline int __all_sync(uint32_t mask, int predicate) {
    return int(emulator::collective(emulator::Kind::ALL, mask, predicate != 0));
}
// 32-bit integers, signed or not: both order alike once they are 64 bits wide.
template <class T> T __reduce_add_sync(uint32_t mask, T value) {
    return T(emulator::collective(emulator::Kind::ADD, mask, uint64_t(int64_t(value))));
}
template <class T> T __reduce_min_sync(uint32_t mask, T value) {
    return T(emulator::collective(emulator::Kind::LEAST, mask, uint64_t(int64_t(value))));
}
template <class T> T __reduce_max_sync(uint32_t mask, T value) {
    return T(emulator::collective(emulator::Kind::LARGEST, mask, uint64_t(int64_t(value))));
}
inline unsigned __reduce_and_sync(uint32_t mask, unsigned value) {
    return unsigned(emulator::collective(emulator::Kind::AND, mask, value));
}
inline unsigned __reduce_or_sync(uint32_t mask, unsigned value) {
    return unsigned(emulator::collective(emulator::Kind::OR, mask, value));
}
inline unsigned __reduce_xor_sync(uint32_t mask, unsigned value) {
    return unsigned(emulator::collective(emulator::Kind::XOR, mask, value));
}

template <class T> T atomicAdd(T* p, emulator::Same<T> v) {
    return emulator::atomically(p, [v](T old) { return old + v; });
}
template <class T> T atomicSub(T* p, emulator::Same<T> v) {
    return emulator::atomically(p, [v](T old) { return old - v; });
}
template <class T> T atomicMin(T* p, emulator::Same<T> v) {
    return emulator::atomically(p, [v](T old) { return v < old ? v : old; });
}
template <class T> T atomicMax(T* p, emulator::Same<T> v) {
    return emulator::atomically(p, [v](T old) { return old < v ? v : old; });
}
template <class T> T atomicAnd(T* p, emulator::Same<T> v) {
    return emulator::atomically(p, [v](T old) { return old & v; });
}
template <class T> T atomicOr(T* p, emulator::Same<T> v) {
    return emulator::atomically(p, [v](T old) { return old | v; });
}
template <class T> T atomicXor(T* p, emulator::Same<T> v) {
    return emulator::atomically(p, [v](T old) { return old ^ v; });
}
template <class T> T atomicExch(T* p, emulator::Same<T> v) {
    return emulator::atomically(p, [v](T) { return v; });
}
template <class T> T atomicCAS(T* p, emulator::Same<T> expected, emulator::Same<T> v) {
    return emulator::atomically(p, [=](T old) { return old == expected ? v : old; });
}

inline void __threadfence_block() { emulator::give_way(); }
inline void __threadfence() { emulator::give_way(); }
inline void __threadfence_system() { emulator::give_way(); }
inline void __nanosleep(unsigned) { emulator::spin(); }

[[noreturn]] inline void __trap() { emulator::trap(); }

// Loads and stores with a hint for the caches.
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldca(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T __ldcv(const T* p) { return *p; }
template <class T> void __stcg(T* p, emulator::Same<T> value) { *p = value; }
template <class T> void __stcs(T* p, emulator::Same<T> value) { *p = value; }
template <class T> void __stwb(T* p, emulator::Same<T> value) { *p = value; }
template <class T> void __stwt(T* p, emulator::Same<T> value) { *p = value; }

// Bits.
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __clzll(long long x) { return std::countl_zero(uint64_t(x)); }
inline int __ffs(int x) { return x ? std::countr_zero(unsigned(x)) + 1 : 0; }
inline int __ffsll(long long x) { return x ? std::countr_zero(uint64_t(x)) + 1 : 0; }
inline unsigned __brev(unsigned x) {
    unsigned reversed = 0;
    for (int i = 0; i < 32; i++) reversed |= (x >> i & 1) << (31 - i);
    return reversed;
}
inline unsigned long long __brevll(unsigned long long x) {
    return uint64_t(__brev(unsigned(x))) << 32 | __brev(unsigned(x >> 32));
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline int __mulhi(int a, int b) { return int(int64_t(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    __extension__ using Wide = unsigned __int128;
    return uint64_t(Wide(a) * b >> 64);
}
// Byte i of the result is that of y:x which digit i of the selector names.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    uint64_t both = uint64_t(y) << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; i++)
        result |= unsigned(both >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
    return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return unsigned((uint64_t(high) << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}
inline int __dp4a(int a, int b, int sum) {
    return emulator::dot4<int8_t>(unsigned(a), unsigned(b), sum);
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned sum) { return emulator::dot4<uint8_t>(a, b, sum); }

// The same bits in another type.
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline double __hiloint2double(int high, int low) {
    return std::bit_cast<double>(uint64_t(unsigned(high)) << 32 | unsigned(low));
}
inline int __double2hiint(double x) { return int(std::bit_cast<uint64_t>(x) >> 32); }
inline int __double2loint(double x) { return int(std::bit_cast<uint64_t>(x)); }

// Arithmetic that is rounded to nearest, as the host's is, and never contracted.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frsqrt_rn(float x) { return float(1 / std::sqrt(double(x))); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }

inline int __float2int_rn(float x) { return emulator::saturated<int>(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return emulator::saturated<int>(std::trunc(x)); }
inline int __float2int_ru(float x) { return emulator::saturated<int>(std::ceil(x)); }
inline int __float2int_rd(float x) { return emulator::saturated<int>(std::floor(x)); }
inline unsigned __float2uint_rn(float x) { return emulator::saturated<unsigned>(std::nearbyint(x)); }
inline unsigned __float2uint_rz(float x) { return emulator::saturated<unsigned>(std::trunc(x)); }
inline unsigned __float2uint_ru(float x) { return emulator::saturated<unsigned>(std::ceil(x)); }
inline unsigned __float2uint_rd(float x) { return emulator::saturated<unsigned>(std::floor(x)); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline float __ll2float_rn(long long x) { return float(x); }
inline float __ull2float_rn(unsigned long long x) { return float(x); }
inline float __double2float_rn(double x) { return float(x); }

// What a GPU computes only about: here as the host does. Macros, for libm declares some of the names.
inline float __fdividef(float a, float b) { return a / b; }
#define rsqrtf(x) __frsqrt_rn(x)
#define __expf(x) std::exp(float(x))
#define __logf(x) std::log(float(x))
#define __log2f(x) std::log2(float(x))
#define __powf(x, y) std::pow(float(x), float(y))
#define __sinf(x) std::sin(float(x))
#define __cosf(x) std::cos(float(x))
#define __tanhf(x) std::tanh(float(x))

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline long min(long a, long b) { return a < b ? a : b; }
inline long max(long a, long b) { return a < b ? b : a; }
inline unsigned long min(unsigned long a, unsigned long b) { return a < b ? a : b; }
inline unsigned long max(unsigned long a, unsigned long b) { return a < b ? b : a; }
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

namespace ptx {

// BYTES from global to shared memory, of which the first `valid` are copied and the others zero.
template <int BYTES, class T, class From> void cp_async(T* shared, const From* global, int valid = BYTES) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
    emulator::async_copy(shared, global, BYTES, valid);
}
inline void cp_async_commit() { emulator::async_commit(); }
template <int GROUPS> void cp_async_wait() {
    static_assert(GROUPS >= 0);
    emulator::async_wait(GROUPS);
}
inline void cp_async_wait_all() { emulator::async_wait(-1); }

// All threads of a warp arrive together. bar_sync waits for `threads`, bar_arrive only counts for others.
template <int ID> void bar_sync(int threads) {
    static_assert(ID >= 0 && ID < 16);
    emulator::named_barrier(ID, threads, true);
}
template <int ID> void bar_arrive(int threads) {
    static_assert(ID >= 0 && ID < 16);
    emulator::named_barrier(ID, threads, false);
}

// 8 x 8 matrices of 16-bit numbers in shared memory. Lane l gives the address of row l % 8 of matrix l / 8.
template <class T> void ldmatrix_x1(uint32_t (&r)[1], const T* row) {
    emulator::load_matrices(r, 1, false, row);
}
template <class T> void ldmatrix_x2(uint32_t (&r)[2], const T* row) {
    emulator::load_matrices(r, 2, false, row);
}
template <class T> void ldmatrix_x4(uint32_t (&r)[4], const T* row) {
    emulator::load_matrices(r, 4, false, row);
}
template <class T> void ldmatrix_x1_trans(uint32_t (&r)[1], const T* row) {
    emulator::load_matrices(r, 1, true, row);
}
template <class T> void ldmatrix_x2_trans(uint32_t (&r)[2], const T* row) {
    emulator::load_matrices(r, 2, true, row);
}
template <class T> void ldmatrix_x4_trans(uint32_t (&r)[4], const T* row) {
    emulator::load_matrices(r, 4, true, row);
}

// sum += a b: A has 16 rows, B and the sum 8 columns; k is 16, 16, 8, 32 and 32.
inline void mma_bf16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulator::multiply_matrices(emulator::Number::BF16, {a, b, sum});
}
inline void mma_f16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulator::multiply_matrices(emulator::Number::F16, {a, b, sum});
}
inline void mma_tf32(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulator::multiply_matrices(emulator::Number::TF32, {a, b, sum});
}
inline void mma_e4m3(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulator::multiply_matrices(emulator::Number::E4M3, {a, b, sum});
}
inline void mma_s8(int (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulator::multiply_matrices(emulator::Number::S8, {a, b, sum});
}
inline void mma_s8_satfinite(int (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulator::multiply_matrices(emulator::Number::S8, {a, b, sum}, true);
}

}

// kernel<<<grid, block, shared, stream>>>(args...): the arguments are copied now.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
            Args... args) {
    std::tuple<std::decay_t<Params>...> copies{static_cast<Params>(args)...};
    const auto* any = reinterpret_cast<const void*>(kernel);
    std::apply([any](const auto&... copy) { (emulator::check_argument(any, copy), ...); }, copies);
    emulator::enqueue(any, grid, block, shared, stream, [kernel, copies] { std::apply(kernel, copies); });
}

// What nvcc's cuda_runtime.h adds to the functions of C.
template <class T> cudaError_t cudaMalloc(T** p, size_t bytes) {
    return cudaMalloc(reinterpret_cast<void**>(p), bytes);
}
template <class T> cudaError_t cudaMallocAsync(T** p, size_t bytes, cudaStream_t stream) {
    return cudaMallocAsync(reinterpret_cast<void**>(p), bytes, stream);
}
template <class T> cudaError_t cudaMallocHost(T** p, size_t bytes) {
    return cudaMallocHost(reinterpret_cast<void**>(p), bytes);
}
template <class T> cudaError_t cudaHostAlloc(T** p, size_t bytes, unsigned flags) {
    return cudaHostAlloc(reinterpret_cast<void**>(p), bytes, flags);
}
template <class... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute attribute, int value) {
    return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
template <class... Params>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*kernel)(Params...), int threads,
                                                          size_t shared) {
    const auto* any = reinterpret_cast<const void*>(kernel);
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, any, threads, shared);
}
