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
// before it was written or without a barrier after it was, an access outside an allocation, a device pointer
// read by the host, a device's memory without peer access. When nothing can go on, each warp says what it
// waits for.
//
// What it cannot tell: speed, the weakness of a real memory model, what nvcc makes of the source, and races
// between threads in global memory (random orders alone look for those).
//
// Not in here, as no kernel uses it yet: named barriers, cp.async, mma.sync, ldmatrix, clusters.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include <cuda_runtime_api.h>

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
};

// EMU_ORDER=fifo, random or priority; EMU_ASYNC=eager, lazy or random; EMU_SEED=N; what is not set is as
// above.
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

enum class Kind : uint8_t { SYNC, SHUFFLE, BALLOT, ANY, ALL, ADD, LEAST, LARGEST, AND, OR, XOR };

// What the lanes of `mask` make of their values; a shuffle gives that of lane `source`.
uint64_t collective(Kind kind, uint32_t mask, uint64_t value, int source = 0);
void barrier(int line);
int lane();
void give_way();                           // maybe: another fiber may run here
void spin();                               // nothing changed yet: others must run

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

struct SharedArray;
SharedArray* shared_array(const void* tag, size_t count, size_t bytes, const char* name);
SharedArray* dynamic_array(size_t bytes, const char* name);
void* touch(SharedArray* array, int64_t i, bool writes);         // the address of element i
void* address(SharedArray* array, int64_t i);

template <class T> class Shared {
public:
    explicit Shared(SharedArray* array) : array_(array) {}

    class Element {
    public:
        Element(SharedArray* array, int64_t i) : array_(array), i_(i) {}
        Element(const Element&) = default;
        operator T() const { return *static_cast<const T*>(touch(array_, i_, false)); }
        T operator=(T value) const { return *static_cast<T*>(touch(array_, i_, true)) = value; }
        T operator=(const Element& other) const { return *this = T(other); }
        T operator+=(T value) const { return *this = T(*this) + value; }
        T* operator&() const { return static_cast<T*>(address(array_, i_)); }    // for atomics: no access yet

    private:
        SharedArray* array_;
        int64_t i_;
    };
    Element operator[](int64_t i) const { return {array_, i}; }

private:
    SharedArray* array_;
};

// -- launches --------------------------------------------------------------------------------------------

// `body` is what each thread does; `kernel` is for messages.
void enqueue(const void* kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
             std::function<void()> body);

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
#define SHARED(T, name, count)                                                                           \
    static const char name##_tag = 0;                                                                    \
    const emulator::Shared<T> name(emulator::shared_array(&name##_tag, count, sizeof(T), #name))
#define DYNAMIC_SHARED(T, name) const emulator::Shared<T> name(emulator::dynamic_array(sizeof(T), #name))

#define __syncthreads() emulator::barrier(__LINE__)
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

// One thread of the host runs everything: between two chances to give way, anything is atomic.
template <class T, class Change> T atomically(T* p, const Change& change) {
    emulator::give_way();
    T old = *p;
    *p = T(change(old));
    return old;
}
template <class T> T atomicAdd(T* p, T v) { return atomically(p, [v](T old) { return old + v; }); }
template <class T> T atomicMin(T* p, T v) { return atomically(p, [v](T old) { return v < old ? v : old; }); }
template <class T> T atomicMax(T* p, T v) { return atomically(p, [v](T old) { return old < v ? v : old; }); }
template <class T> T atomicAnd(T* p, T v) { return atomically(p, [v](T old) { return old & v; }); }
template <class T> T atomicOr(T* p, T v) { return atomically(p, [v](T old) { return old | v; }); }
template <class T> T atomicExch(T* p, T v) { return atomically(p, [v](T) { return v; }); }
template <class T> T atomicCAS(T* p, T expected, T v) {
    return atomically(p, [=](T old) { return old == expected ? v : old; });
}

inline void __threadfence_block() { emulator::give_way(); }
inline void __threadfence() { emulator::give_way(); }
inline void __threadfence_system() { emulator::give_way(); }
inline void __nanosleep(unsigned) { emulator::spin(); }

template <class T> T __ldg(const T* p) { return *p; }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __ffs(int x) { return x ? std::countr_zero(unsigned(x)) + 1 : 0; }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

// kernel<<<grid, block, shared, stream>>>(args...): the arguments are copied now.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
            Args... args) {
    std::tuple<std::decay_t<Params>...> copies{static_cast<Params>(args)...};
    emulator::enqueue(reinterpret_cast<const void*>(kernel), grid, block, shared, stream,
                      [kernel, copies] { std::apply(kernel, copies); });
}
