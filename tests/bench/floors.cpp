// What this machine can do at most: a line of JSON with
//   read_gb_s      bytes read from memory per second by THREADS threads, 1e9
//   f32_gflop_s    multiply-adds in f32 registers (two operations each), all threads, 1e9
//
//     floors THREADS
//
// Both are the best of several short tries: a floor under the times of others must not be slow itself.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Seconds that the slowest of `threads` calls of body(i) takes.
template <class Body> double time_of(int threads, const Body& body) {
    double begin = now();
    std::vector<std::thread> team;
    for (int i = 0; i < threads; i++) team.emplace_back([&, i] { body(i); });
    for (std::thread& t : team) t.join();
    return now() - begin;
}

using Line = uint64_t __attribute__((vector_size(64)));

// Xor of all lines; fetched `ahead` bytes before their turn, for processors guess only to the end of a page.
static uint64_t read_all(const Line* p, size_t lines, size_t ahead) {
    uint64_t sum = 0;
    for (size_t i = 0; i < lines; i++) {
        __builtin_prefetch(reinterpret_cast<const char*>(p + i) + ahead, 0, 2);
        sum ^= p[i][0] ^ p[i][7];
    }
    return sum;
}

static double read_bandwidth(int threads) {
    size_t bytes = size_t(1) << 30, lines = bytes / sizeof(Line) / size_t(threads);
    void* memory = std::aligned_alloc(1 << 21, bytes);
    if (!memory) return 0;
    std::memset(memory, 1, bytes);
    double best = 0;
    for (size_t ahead : {0, 2048, 4096, 16384}) {
        for (int repeat = 0; repeat < 3; repeat++) {
            double seconds = time_of(threads, [&](int i) {
                auto mine = static_cast<const Line*>(memory) + size_t(i) * lines;
                volatile uint64_t sum = read_all(mine, lines, ahead);
                (void)sum;
            });
            best = std::max(best, double(lines * sizeof(Line) * size_t(threads)) / seconds);
        }
    }
    std::free(memory);
    return best;
}

// 16 independent chains of multiply-adds: enough for two units with a latency of four or five.
#define CHAINS(NAME, TARGET, WIDTH)                                                                      \
    TARGET static float NAME(long n) {                                                                   \
        typedef float V __attribute__((vector_size(4 * WIDTH)));                                         \
        V a[16], m = V{} + 0.999f, s = V{};                                                              \
        for (int j = 0; j < 16; j++) a[j] = V{} + float(j);                                              \
        for (long i = 0; i < n; i++)                                                                     \
            _Pragma("GCC unroll 16") for (int j = 0; j < 16; j++) a[j] = a[j] * m + a[j];                \
        for (int j = 0; j < 16; j++) s += a[j];                                                          \
        return s[0];                                                                                     \
    }

#if defined(__x86_64__)
CHAINS(chains16, __attribute__((target("avx512f"))), 16)
CHAINS(chains8, __attribute__((target("avx2,fma"))), 8)
#endif
CHAINS(chains4, , 4)

static double f32_peak(int threads) {
    float (*chains)(long) = chains4;
    int width = 4;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) chains = chains16, width = 16;
    else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) chains = chains8, width = 8;
#endif
    double best = 0;
    constexpr long N = 2000000;
    for (int repeat = 0; repeat < 9; repeat++) {
        double seconds = time_of(threads, [&](int) {
            volatile float sum = chains(N);
            (void)sum;
        });
        best = std::max(best, 2.0 * 16 * width * double(N) * threads / seconds);
    }
    return best;
}

int main(int argc, char** argv) {
    int threads = argc > 1 ? std::atoi(argv[1]) : 0;
    if (threads < 1) return std::fprintf(stderr, "usage: floors THREADS\n"), 1;
    double bandwidth = read_bandwidth(threads), peak = f32_peak(threads);
    std::printf("{\"read_gb_s\":%.1f,\"f32_gflop_s\":%.0f}\n", bandwidth / 1e9, peak / 1e9);
}
