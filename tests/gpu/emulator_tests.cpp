// The emulator: each primitive does what CUDA says, and each mistake that it is there for is reported.
//
//   build/gpu/emulator_tests       from anywhere
#include "cuda_emulator.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

using emulator::Async;
using emulator::Order;

// -- what the tests share -----------------------------------------------------------------------------

// Numbers on the device.
template <class T> struct Numbers {
    T* data = nullptr;
    size_t n;

    explicit Numbers(size_t n) : n(n) {
        EXPECT_EQ(cudaMalloc(reinterpret_cast<void**>(&data), n * sizeof(T)), cudaSuccess);
    }
    explicit Numbers(const std::vector<T>& v) : Numbers(v.size()) {
        EXPECT_EQ(cudaMemcpy(data, v.data(), n * sizeof(T), cudaMemcpyHostToDevice), cudaSuccess);
    }
    ~Numbers() { cudaFree(data); }
    std::vector<T> host() const {
        std::vector<T> v(n);
        EXPECT_EQ(cudaMemcpy(v.data(), data, n * sizeof(T), cudaMemcpyDeviceToHost), cudaSuccess);
        return v;
    }
};

// body() in every order and with every way to complete; a few seeds for the random ones.
static void in_all_orders(const std::function<void()>& body, int devices = 1) {
    for (Order order : {Order::FIFO, Order::RANDOM, Order::PRIORITY}) {
        for (Async async : {Async::EAGER, Async::LAZY, Async::RANDOM}) {
            for (uint64_t seed : {1, 2, 3}) {
                SCOPED_TRACE(testing::Message()
                             << "order " << int(order) << ", async " << int(async) << ", seed " << seed);
                emulator::reset({order, async, seed, devices});
                body();
                EXPECT_EQ(emulator::allocated(), 0u);
            }
        }
    }
    emulator::reset({});
}

// Does body() end in an emulator::Error that contains each of `parts`, in every order?
static void reports(const std::function<void()>& body, const std::vector<std::string>& parts,
                    int devices = 1) {
    for (Order order : {Order::FIFO, Order::RANDOM, Order::PRIORITY}) {
        for (uint64_t seed : {1, 2, 3}) {
            emulator::reset({order, Async::LAZY, seed, devices});
            std::string text = "nothing";
            try {
                body();
                cudaDeviceSynchronize();
            } catch (const emulator::Error& error) {
                text = error.what();
            }
            for (const std::string& part : parts)
                EXPECT_NE(text.find(part), text.npos) << "'" << text << "' does not say '" << part << "'";
        }
    }
    emulator::reset({});
}

static void run(void (*kernel)(int*, int), unsigned blocks, unsigned threads, int* p, int n) {
    launch(kernel, blocks, threads, 0, nullptr, p, n);
}

// -- threads and blocks -------------------------------------------------------------------------------

__global__ void write_position(int* out, int) {
    unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    unsigned threads = blockDim.x * blockDim.y * blockDim.z;
    out[block * threads + thread] = int(block * 1000 + thread);
}
TEST(Launch, EachThreadKnowsWhereItIs) {
    in_all_orders([] {
        Numbers<int> out(24 * 30);
        launch(write_position, dim3(2, 3, 4), dim3(5, 3, 2), 0, nullptr, out.data, 0);
        std::vector<int> v = out.host();
        for (int i = 0; i < 24 * 30; i++) ASSERT_EQ(v[size_t(i)], i / 30 * 1000 + i % 30);
    });
}
TEST(Launch, RefusesWhatNoDeviceTakes) {
    for (auto [blocks, threads] : {std::pair{0, 32}, std::pair{1, 0}, std::pair{1, 1025}}) {
        run(write_position, unsigned(blocks), unsigned(threads), nullptr, 0);
        EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidConfiguration);
        EXPECT_EQ(cudaGetLastError(), cudaSuccess);
    }
    launch(write_position, 1, 1, 1 << 20, nullptr, static_cast<int*>(nullptr), 0);
    EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidValue);
}
TEST(Launch, RefusesPointersToTheHost) {
    emulator::reset({});
    Numbers<int> p(4);
    int here = 0, *pinned = nullptr, *gone = nullptr;
    auto says = [](int* pointer) {
        try {
            run(write_position, 1, 1, pointer, 0);
        } catch (const emulator::Error& error) {
            return std::string(error.what());
        }
        return std::string("nothing");
    };
    cudaMalloc(&gone, 4), cudaFree(gone), cudaMallocHost(&pinned, 4);
    EXPECT_EQ(says(&here).find("launch of write_position: address 0x"), 0u);
    EXPECT_EQ(says(gone).find("launch of write_position: address 0x"), 0u);
    EXPECT_EQ(says(p.data + 3), "nothing");
    EXPECT_EQ(says(pinned), "nothing");
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_EQ(*pinned, 0);
    cudaFreeHost(pinned);
}
struct Large {
    int numbers[100];
};
__global__ void sum_large(Large large, int* out) {
    for (int v : large.numbers) *out += v;
}
TEST(Launch, CopiesItsArguments) {
    in_all_orders([] {
        Numbers<int> out(std::vector<int>{0});
        Large large{};
        std::iota(large.numbers, large.numbers + 100, 0);
        launch(sum_large, 1, 1, 0, nullptr, large, out.data);
        large = {};
        EXPECT_EQ(out.host()[0], 4950);
    });
}

// -- barriers and shared memory -----------------------------------------------------------------------

__global__ void reverse(int* p, int n) {
    SHARED(int, copy, 1024);
    int i = int(threadIdx.x);
    copy[i] = p[i];
    __syncthreads();
    p[i] = copy[n - 1 - i];
}
TEST(Barrier, OrdersSharedMemory) {
    in_all_orders([] {
        for (size_t n : {1, 31, 32, 33, 1000, 1024}) {
            std::vector<int> v(n);
            std::iota(v.begin(), v.end(), 0);
            Numbers<int> p(v);
            run(reverse, 1, unsigned(n), p.data, int(n));
            std::reverse(v.begin(), v.end());
            ASSERT_EQ(p.host(), v);
        }
    });
}
__global__ void rotate_by_blocks(int* p, int rounds) {
    DYNAMIC_SHARED(int, ring);
    int i = int(threadIdx.x), n = int(blockDim.x);
    for (int r = 0; r < rounds; r++) {
        ring[i] = p[int(blockIdx.x) * n + i];
        __syncthreads();
        p[int(blockIdx.x) * n + i] = ring[(i + 1) % n];
        __syncthreads();
    }
}
TEST(Barrier, ManyBlocksShareADevice) {
    in_all_orders([] {
        Numbers<int> p(10 * 40);
        launch(write_position, 10, 40, 0, nullptr, p.data, 0);
        launch(rotate_by_blocks, 10, 40, 40 * sizeof(int), nullptr, p.data, 7);
        std::vector<int> v = p.host();
        for (int i = 0; i < 400; i++) ASSERT_EQ(v[size_t(i)], i / 40 * 1000 + (i % 40 + 7) % 40);
    });
}

__global__ void no_barrier(int* p, int n) {
    SHARED(int, copy, 1024);
    int i = int(threadIdx.x);
    copy[i] = p[i];
    if (n < 0) __syncthreads();
    p[i] = copy[n - 1 - i];
}
TEST(Barrier, AMissingOneIsReported) {
    reports([] {
        Numbers<int> p(std::vector<int>(64));
        run(no_barrier, 1, 64, p.data, 64);
        cudaDeviceSynchronize();
    }, {"copy["});
}
__global__ void one_barrier_of_two(int* p, int rounds) {
    SHARED(int, ring, 64);
    int i = int(threadIdx.x);
    for (int r = 0; r < rounds; r++) {
        ring[i] = r;
        __syncthreads();
        p[i] += ring[(i + 33) % 64];
    }
}
TEST(Barrier, OneBeforeTheNextWriteIsNeededToo) {
    reports([] {
        Numbers<int> p(std::vector<int>(64));
        run(one_barrier_of_two, 1, 64, p.data, 2);
        cudaDeviceSynchronize();
    }, {"race: ring[", "no barrier in between", "one_barrier_of_two"});
}
__global__ void barrier_in_a_branch(int* p, int) {
    if (threadIdx.x < 32) __syncthreads();
    p[threadIdx.x] = 1;
}
TEST(Barrier, OneThatNotAllReachIsReported) {
    reports([] {
        Numbers<int> p(64);
        run(barrier_in_a_branch, 1, 64, p.data, 0);
        cudaDeviceSynchronize();
    }, {"__syncthreads (line "});
}
__global__ void barriers_in_two_branches(int* p, int) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    p[threadIdx.x] = 1;
}
TEST(Barrier, TwoPlacesAreNotOne) {
    reports([] {
        Numbers<int> p(64);
        run(barriers_in_two_branches, 1, 64, p.data, 0);
        cudaDeviceSynchronize();
    }, {"where others wait at that of line"});
}

__global__ void vote(int* p, int n) {
    int i = int(threadIdx.x), sum = 0;
    for (int round = 0; round < 3; round++) {
        sum += __syncthreads_count(i < n + round) + 1000 * __syncthreads_or(i == n);
        sum += 10000 * __syncthreads_and(i != n);
    }
    p[i] = sum;
}
TEST(Barrier, CountsVotes) {
    in_all_orders([] {
        Numbers<int> p(50);
        run(vote, 1, 50, p.data, 7);
        EXPECT_EQ(p.host(), std::vector<int>(50, 3024));
        run(vote, 1, 50, p.data, 50);
        EXPECT_EQ(p.host(), std::vector<int>(50, 30150));
    });
}

__global__ void shared_bounds(int* p, int n) {
    SHARED(int, few, 8);
    few[int(threadIdx.x) + n] = 1;
    *p = 1;
}
TEST(Shared, AnIndexOneTooFarIsReported) {
    reports([] {
        Numbers<int> p(1);
        run(shared_bounds, 1, 8, p.data, 1);
        cudaDeviceSynchronize();
    }, {"shared array few has 8 elements, not 8"});
    reports([] {
        Numbers<int> p(1);
        run(shared_bounds, 1, 8, p.data, -1);
        cudaDeviceSynchronize();
    }, {"shared array few has 8 elements, not -1"});
}
__global__ void read_unwritten(int* p, int) {
    SHARED(int, few, 8);
    if (threadIdx.x > 0) few[threadIdx.x] = 1;
    __syncthreads();
    p[threadIdx.x] = few[threadIdx.x];
}
TEST(Shared, WhatNoOneWroteIsReported) {
    reports([] {
        Numbers<int> p(8);
        run(read_unwritten, 1, 8, p.data, 0);
        cudaDeviceSynchronize();
    }, {"few[0] is read, and no one wrote it"});
}

// What a block left behind is nothing to the next one.
__global__ void read_of_an_earlier_block(int* p, int) {
    SHARED(int, few, 8);
    if (blockIdx.x == gridDim.x - 1 || blockIdx.x == 0) few[threadIdx.x] = 1;
    if (p[0] == 0 || blockIdx.x == 1) p[threadIdx.x] = few[threadIdx.x];
}
TEST(Shared, WhatAnEarlierBlockWroteIsReported) {
    for (Order order : {Order::FIFO, Order::RANDOM}) {
        emulator::Options o;
        o.order = order, o.blocks = 1;
        emulator::reset(o);
        Numbers<int> p(std::vector<int>(8));
        run(read_of_an_earlier_block, 3, 8, p.data, 0);
        EXPECT_THROW(cudaDeviceSynchronize(), emulator::Error);
    }
    emulator::reset({});
}
// Whoever reads last does not hide the others: neither those of its warp nor those of another one.
__global__ void many_readers(int* p, int writer) {
    SHARED(int, one, 1);
    int i = int(threadIdx.x), warp = i / 32;
    if (i == 0) one[0] = 5;
    __syncthreads();
    if (warp == 0) __syncwarp();
    if (warp == 0 || i == 33 || i == 34) p[i] = one[0];
    if (warp == 0 && writer == 0) __syncwarp();
    if (i == writer) one[0] = p[i];
}
TEST(Shared, NoReaderIsForgotten) {
    for (int writer : {0, 34, 40}) {
        reports([=] {
            Numbers<int> p(64);
            run(many_readers, 1, 64, p.data, writer);
            cudaDeviceSynchronize();
        }, {"race: one[0] is"});
    }
}

#if defined(__SANITIZE_ADDRESS__)
__global__ void beyond_by_pointer(int* p, int n) {
    SHARED(int, few, 9);
    int* q = &few[0];
    q[n] = 1;
    *p = q[n];
}
TEST(Shared, ThroughAPointerTheSanitizerSeesIt) {
    emulator::reset({});
    Numbers<int> p(1);
    run(beyond_by_pointer, 1, 1, p.data, 8);
    EXPECT_EQ(p.host()[0], 1);
    run(beyond_by_pointer, 1, 1, p.data, 9);
    EXPECT_DEATH(cudaDeviceSynchronize(), "use-after-poison");
    emulator::reset({});
}
#endif

__global__ void parts(int* p, int mistake) {
    DYNAMIC_PART(float, floats, 0, 8);
    DYNAMIC_PART(unsigned char, bytes, mistake == 1 ? 28 : 32, mistake == 2 ? 17 : 16);
    int i = int(threadIdx.x);
    floats[i] = float(i);
    if (i < 4) store_vector(bytes, 4 * i, 0x01010101 * i);
    if (mistake != 3) __syncthreads();
    float2 two = load_vector<float2>(floats, mistake == 4 ? 1 : mistake == 5 ? 8 : i / 2 * 2);
    p[i] = int(two.x) * 100 + int(two.y) * 10 + bytes[i];
}
TEST(Shared, TheDynamicMemoryHasParts) {
    in_all_orders([] {
        Numbers<int> p(8);
        launch(parts, 1, 8, 48, nullptr, p.data, 0);
        EXPECT_EQ(p.host(), (std::vector<int>{10, 10, 230, 230, 451, 451, 671, 671}));
    });
    const std::vector<std::pair<int, std::string>> says = {
        {1, "DYNAMIC_PART bytes lies where floats does"}, {2, "DYNAMIC_PART bytes ends at byte 49 of 48"},
        {3, "["}, {4, "shared array floats: element 1 is not aligned to 8 bytes"},
        {5, "shared array floats has 8 elements, not 8"}};
    for (auto& [mistake, text] : says) {
        SCOPED_TRACE(mistake);
        reports([mistake = mistake] {
            Numbers<int> p(8);
            launch(parts, 1, 8, 48, nullptr, p.data, mistake);
            cudaDeviceSynchronize();
        }, {text});
    }
}

// -- collectives --------------------------------------------------------------------------------------

__global__ void butterfly(int* p, int) {
    int sum = p[threadIdx.x];
    for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(~0u, sum, bits);
    p[threadIdx.x] = sum;
}
TEST(Warp, ShufflesAddUp) {
    in_all_orders([] {
        std::vector<int> v(96), expected(96);
        for (int i = 0; i < 96; i++) v[size_t(i)] = i * i, expected[size_t(i / 32 * 32)] += i * i;
        for (int i = 0; i < 96; i++) expected[size_t(i)] = expected[size_t(i / 32 * 32)];
        Numbers<int> p(v);
        run(butterfly, 1, 96, p.data, 0);
        EXPECT_EQ(p.host(), expected);
    });
}
// Each half on its own, as a dot of sixteen lanes does it.
__global__ void halves(int* p, int) {
    unsigned i = threadIdx.x, mask = 0xFFFFu << (i & 16);
    for (unsigned r = 0; r < 1 + 3 * (i / 16); r++) p[i] = __shfl_xor_sync(mask, p[i], 1);
    __syncwarp();
}
TEST(Warp, MasksWithoutACommonLaneAreIndependent) {
    in_all_orders([] {
        std::vector<int> v(32), expected;
        std::iota(v.begin(), v.end(), 0);
        for (int i = 0; i < 32; i++) expected.push_back(i ^ 1);
        Numbers<int> p(v);
        run(halves, 1, 32, p.data, 0);
        expected.resize(16);
        std::vector<int> host = p.host();
        host.resize(16);
        EXPECT_EQ(host, expected);
    });
}
__global__ void all_collectives(int* p, int) {
    int i = int(threadIdx.x), at = 0;
    auto put = [&](int value) { p[32 * at++ + i] = value; };
    put(__shfl_sync(~0u, i, 5)), put(__shfl_sync(~0u, i, 5, 8));
    put(__shfl_up_sync(~0u, i, 3)), put(__shfl_down_sync(~0u, i, 3)), put(__shfl_down_sync(~0u, i, 3, 8));
    put(int(__ballot_sync(~0u, i % 3 == 0))), put(__any_sync(~0u, i == 7)), put(__any_sync(~0u, i == 77));
    put(__all_sync(~0u, i < 32)), put(__all_sync(~0u, i < 31));
    put(__reduce_add_sync(~0u, i - 16)), put(__reduce_min_sync(~0u, i - 16));
    put(__reduce_max_sync(~0u, i - 16));
    put(int(__reduce_min_sync(~0u, unsigned(i) + 0x80000000u))), put(int(__reduce_or_sync(~0u, 1u << i)));
    put(int(__reduce_and_sync(~0u, ~(1u << i)))), put(int(__reduce_xor_sync(~0u, unsigned(i) + 1)));
}
TEST(Warp, CollectivesAreCudas) {
    in_all_orders([] {
        Numbers<int> p(17 * 32);
        run(all_collectives, 1, 32, p.data, 0);
        std::vector<int> v = p.host();
        unsigned thirds = 0, all = 0;
        for (unsigned i = 0; i < 32; i++) thirds |= unsigned(i % 3 == 0) << i, all ^= i + 1;
        for (int i = 0; i < 32; i++) {
            std::vector<int> expected = {5, i / 8 * 8 + 5, i < 3 ? i : i - 3, i > 28 ? i : i + 3,
                                         i % 8 > 4 ? i : i + 3, int(thirds), 1, 0, 1, 0, -16, -16, 15,
                                         int(0x80000000), -1, 0, int(all)};
            for (size_t k = 0; k < expected.size(); k++) ASSERT_EQ(v[32 * k + size_t(i)], expected[k]) << k;
        }
    });
}
__global__ void exchange(int* p, int) {
    SHARED(int, mine, 32);
    mine[threadIdx.x] = int(threadIdx.x);
    __syncwarp();
    p[threadIdx.x] = mine[31 - threadIdx.x];
}
TEST(Warp, SyncwarpOrdersSharedMemory) {
    in_all_orders([] {
        Numbers<int> p(32);
        run(exchange, 1, 32, p.data, 0);
        EXPECT_EQ(p.host()[3], 28);
    });
}
__global__ void exchange_by_shuffle(int* p, int) {
    SHARED(int, mine, 32);
    mine[threadIdx.x] = int(threadIdx.x);
    p[threadIdx.x] = __shfl_sync(~0u, 1, 0);
    p[threadIdx.x] = mine[31 - threadIdx.x];
}
TEST(Warp, AShuffleDoesNot) {
    reports([] {
        Numbers<int> p(32);
        run(exchange_by_shuffle, 1, 32, p.data, 0);
        cudaDeviceSynchronize();
    }, {"race: mine["});
}

__global__ void whole_mask(int* p, int n) {
    if (int(threadIdx.x) < n) p[threadIdx.x] = __shfl_xor_sync(~0u, 1, 1);
}
TEST(Warp, AMaskOfLanesThatDoNotComeIsReported) {
    reports([] {
        Numbers<int> p(32);
        run(whole_mask, 1, 32, p.data, 24);
        cudaDeviceSynchronize();
    }, {"__shfl_sync", "ffffffff"});
    reports([] {                               // the block ends in the middle of a warp
        Numbers<int> p(24);
        run(whole_mask, 1, 24, p.data, 24);
        cudaDeviceSynchronize();
    }, {"names lanes that the block has not"});
}
__global__ void two_masks(int* p, int) {
    p[threadIdx.x] = __any_sync(threadIdx.x < 8 ? 0xFFu : 0xFFFFFFF0u, 1);
}
TEST(Warp, MasksThatOverlapAreReported) {
    reports([] {
        Numbers<int> p(32);
        run(two_masks, 1, 32, p.data, 0);
        cudaDeviceSynchronize();
    }, {"__any_sync"});
}
__global__ void foreign_mask(int* p, int) { p[threadIdx.x] = __any_sync(1, 1); }
TEST(Warp, AMaskWithoutItsOwnLaneIsReported) {
    reports([] {
        Numbers<int> p(32);
        run(foreign_mask, 1, 32, p.data, 0);
        cudaDeviceSynchronize();
    }, {"leaves out its own lane"});
}
__global__ void foreign_lane(int* p, int) {
    if (threadIdx.x < 16) p[threadIdx.x] = __shfl_xor_sync(0xFFFF, 1, 16);
}
TEST(Warp, AShuffleFromOutsideTheMaskIsReported) {
    reports([] {
        Numbers<int> p(32);
        run(foreign_lane, 1, 32, p.data, 0);
        cudaDeviceSynchronize();
    }, {"is not in mask 0000ffff"});
}
__global__ void two_kinds(int* p, int) {
    p[threadIdx.x] = threadIdx.x < 16 ? __any_sync(~0u, 1) : __all_sync(~0u, 1);
}
TEST(Warp, TwoKindsAreNotOne) {
    reports([] {
        Numbers<int> p(32);
        run(two_kinds, 1, 32, p.data, 0);
        cudaDeviceSynchronize();
    }, {"where others wait in"});
}

// -- cp.async -----------------------------------------------------------------------------------------

// Two buffers in turns: while one is read, the other one is filled.
__global__ void add_up_tiles(int* p, int tiles) {
    SHARED(int, ring, 2 * 256);
    int i = int(threadIdx.x), sum = 0;
    auto fetch = [&](int tile) {
        if (tile < tiles) ptx::cp_async<16>(&ring[tile % 2 * 256 + 4 * i], p + 256 * tile + 4 * i);
        ptx::cp_async_commit();
    };
    fetch(0);
    for (int tile = 0; tile < tiles; tile++) {
        fetch(tile + 1);
        ptx::cp_async_wait<1>();
        __syncthreads();
        for (int k = 0; k < 4; k++) sum += ring[tile % 2 * 256 + (4 * i + k + 100) % 256];
        __syncthreads();
    }
    p[i] = sum;
}
TEST(Async, CopiesAreThereOnceWaitedFor) {
    in_all_orders([] {
        std::vector<int> v(256 * 5);
        std::iota(v.begin(), v.end(), 0);
        Numbers<int> p(v);
        run(add_up_tiles, 1, 64, p.data, 5);
        std::vector<int> host = p.host();
        for (int i = 0; i < 64; i++) {
            int sum = 0;
            for (int k = 0; k < 4; k++) sum += 5 * ((4 * i + k + 100) % 256) + 256 * (1 + 2 + 3 + 4);
            ASSERT_EQ(host[size_t(i)], sum);
        }
    });
}
template <int BYTES> __global__ void copy_in_part(int* p, int valid) {
    SHARED(unsigned char, bytes, 3 * BYTES);
    ptx::cp_async<BYTES>(&bytes[BYTES], p, valid);
    ptx::cp_async_wait_all();
    for (int i = 0; i < BYTES; i++) p[16 + i] = bytes[BYTES + i];
}
TEST(Async, TheRestIsZero) {
    for (int bytes : {4, 8, 16}) {
        auto kernel = bytes == 4 ? copy_in_part<4> : bytes == 8 ? copy_in_part<8> : copy_in_part<16>;
        for (int valid = 0; valid <= bytes; valid++) {
            emulator::reset({});
            Numbers<int> p(std::vector<int>(32, 0x05050505));
            run(kernel, 1, 1, p.data, valid);
            std::vector<int> host = p.host();
            for (int i = 0; i < bytes; i++) ASSERT_EQ(host[size_t(16 + i)], i < valid ? 5 : 0);
        }
    }
}

enum { NO_WAIT, ONE_LATE, NOT_COMMITTED, NO_BARRIER, WRITE, SHARED_UNALIGNED, GLOBAL_UNALIGNED, BEYOND,
       NOT_SHARED, GLOBAL_BEYOND, NO_END, TOO_EARLY, NO_MISTAKE };
__global__ void copy_wrongly(int* p, int mistake) {
    SHARED(int, tile, 32);
    int i = int(threadIdx.x);
    if (mistake == TOO_EARLY) {
        tile[4 * i] = 1;
        __syncwarp(0xFF);
        p[i] = tile[(4 * i + 4) % 32];
    }
    int* to = &tile[mistake == BEYOND && i == 7 ? 24 : 4 * i];
    if (mistake == BEYOND && i == 7) to += 8;
    if (mistake == SHARED_UNALIGNED && i == 5) to--;
    if (mistake == NOT_SHARED) to = p;
    int from = mistake == GLOBAL_UNALIGNED ? 3 : mistake == GLOBAL_BEYOND ? 64 : 4 * i;
    ptx::cp_async<16>(to, p + from);
    if (mistake != NOT_COMMITTED) ptx::cp_async_commit();
    if (mistake == WRITE) tile[4 * i] = 0;
    if (mistake == ONE_LATE) ptx::cp_async_wait<1>();
    if (mistake != NO_WAIT && mistake != ONE_LATE && mistake != NO_END) ptx::cp_async_wait<0>();
    if (mistake == NO_END) return;
    if (mistake == NO_BARRIER) p[i] = tile[(4 * i + 4) % 32];
    __syncthreads();
    p[i] = tile[4 * i + 1];
}
TEST(Async, MistakesAreReported) {
    const std::vector<std::pair<int, std::string>> says = {
        {NO_WAIT, "is read, and a cp_async of thread"},
        {ONE_LATE, "is read, and a cp_async of thread"},
        {NOT_COMMITTED, "is read, and a cp_async of thread"},
        {NO_BARRIER, "tile["},
        {WRITE, "is written, and a cp_async of thread"},
        {TOO_EARLY, "tile["},
        {SHARED_UNALIGNED, "tile + 76 bytes is not aligned to 16"},
        {GLOBAL_UNALIGNED, "in global memory is not aligned to 16"},
        {BEYOND, "is no shared memory of this block"},
        {NOT_SHARED, "is no shared memory of this block"},
        {GLOBAL_BEYOND, "cp_async: an access 0 bytes beyond an allocation"},
        {NO_END, "a cp_async that it did not wait for"}};
    for (auto& [mistake, text] : says) {
        SCOPED_TRACE(mistake);
        reports([mistake = mistake] {
            Numbers<int> p(std::vector<int>(64));
            run(copy_wrongly, 1, 8, p.data, mistake);
            cudaDeviceSynchronize();
        }, {text});
    }
    in_all_orders([] {
        Numbers<int> p(std::vector<int>(64));
        run(copy_wrongly, 1, 8, p.data, NO_MISTAKE);
        EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    });
}
// The shuffle makes one order of the two, and orders no memory.
__global__ void overwrite_what_others_read(int* p, int) {
    SHARED(int, tile, 4);
    int i = int(threadIdx.x);
    if (i < 4) tile[i] = 1;
    __syncwarp();
    if (i == 1) p[i] = tile[0];
    p[i] = __shfl_sync(~0u, 1, 1);
    if (i == 0) ptx::cp_async<16>(&tile[0], p);
    ptx::cp_async_wait_all();
}
TEST(Async, ACopyIsAWriteFromItsBegin) {
    reports([] {
        Numbers<int> p(std::vector<int>(64));
        run(overwrite_what_others_read, 1, 32, p.data, 0);
        cudaDeviceSynchronize();
    }, {"race: tile[0] is written, and thread 1 read it"});
}
TEST(Async, AnOlderDeviceHasNone) {
    emulator::Options older;
    older.capability = 75;
    emulator::reset(older);
    Numbers<int> p(64);
    run(copy_wrongly, 1, 8, p.data, NO_MISTAKE);
    EXPECT_THROW(cudaDeviceSynchronize(), emulator::Error);
    emulator::reset({});
}

// -- named barriers -----------------------------------------------------------------------------------

enum { FULL = 1, EMPTY = 2 };
// Warp 0 fills two slots in turns, warps 1 and 2 read them.
__global__ void produce_and_consume(int* p, int without) {
    SHARED(int, slot, 32);
    int i = int(threadIdx.x), sum = 0;
    for (int round = 0; round < 6; round++) {
        if (i < 32) {
            if (round && without != EMPTY) ptx::bar_sync<EMPTY>(96);
            slot[i] = round * i;
            if (without != FULL) ptx::bar_arrive<FULL>(96);
        } else {
            if (without != FULL) ptx::bar_sync<FULL>(96);
            sum += slot[(i + 1) % 32];
            if (round < 5 && without != EMPTY) ptx::bar_arrive<EMPTY>(96);
        }
    }
    p[i] = sum;
}
TEST(NamedBarrier, ProducerAndConsumers) {
    in_all_orders([] {
        Numbers<int> p(128);
        run(produce_and_consume, 3, 96, p.data, 0);
        std::vector<int> host = p.host();
        for (int i = 32; i < 96; i++) ASSERT_EQ(host[size_t(i)], 15 * ((i + 1) % 32));
    });
}
TEST(NamedBarrier, AMissingOneIsReported) {
    reports([] {
        Numbers<int> p(128);
        run(produce_and_consume, 1, 96, p.data, EMPTY);
        cudaDeviceSynchronize();
    }, {"slot["});
    reports([] {
        Numbers<int> p(128);
        run(produce_and_consume, 1, 96, p.data, FULL);
        cudaDeviceSynchronize();
    }, {"slot["});
}
// What warp 0 tells warp 1, which then tells warp 2, warp 2 knows.
__global__ void pass_on(int* p, int all) {
    SHARED(int, one, 1);
    int warp = int(threadIdx.x) / 32;
    if (threadIdx.x == 0) one[0] = 7;
    if (warp < 2) ptx::bar_sync<5>(64);
    if (warp && all) ptx::bar_sync<6>(64);
    p[threadIdx.x] = one[0];
}
TEST(NamedBarrier, WhatOneWarpKnowsItPassesOn) {
    in_all_orders([] {
        Numbers<int> p(96);
        run(pass_on, 1, 96, p.data, 1);
        EXPECT_EQ(p.host(), std::vector<int>(96, 7));
    });
    reports([] {
        Numbers<int> p(96);
        run(pass_on, 1, 96, p.data, 0);
        cudaDeviceSynchronize();
    }, {"one[0]"});
}
// bar_arrive lets others see what came before it, and shows its own warp nothing.
__global__ void arrive_and_read(int* p, int other_warp) {
    SHARED(int, two, 2);
    int warp = int(threadIdx.x) / 32;
    if (threadIdx.x % 32 == 0) two[warp] = 1;
    if (warp == 0) ptx::bar_arrive<1>(64);
    if (warp == 1) ptx::bar_sync<1>(64);
    if (warp == 1) p[threadIdx.x] = two[0];
    if (threadIdx.x == 0) p[threadIdx.x] = two[other_warp];
    if (threadIdx.x == 1) p[threadIdx.x] = two[0];
}
TEST(NamedBarrier, WhoeverOnlyArrivesSeesNothing) {
    reports([] {
        Numbers<int> p(64);
        run(arrive_and_read, 1, 64, p.data, 1);
        cudaDeviceSynchronize();
    }, {"two["});
    reports([] {
        Numbers<int> p(64);
        run(arrive_and_read, 1, 64, p.data, 0);
        cudaDeviceSynchronize();
    }, {"two[0]", "thread (1, 0, 0)"});
}

enum { COUNT_OF_33, COUNT_TOO_LARGE, TWO_COUNTS, TWICE, SYNCTHREADS_FIRST, SYNCTHREADS_LAST, LANES_APART,
       LANES_DIFFER, ONE_MISSING, NOTHING_WRONG };
__global__ void bar_wrongly(int* p, int mistake) {
    int i = int(threadIdx.x), warp = i / 32;
    switch (mistake) {
    case COUNT_OF_33: ptx::bar_sync<1>(33); break;
    case COUNT_TOO_LARGE: ptx::bar_sync<1>(128); break;
    case TWO_COUNTS: if (warp < 2) ptx::bar_sync<1>(warp ? 64 : 96); break;
    case TWICE: if (warp == 1) ptx::bar_arrive<1>(96), ptx::bar_arrive<1>(96); break;
    case SYNCTHREADS_FIRST:
    case SYNCTHREADS_LAST:
        if ((warp == 0) == (mistake == SYNCTHREADS_FIRST)) __syncthreads();
        else ptx::bar_sync<0>(96);
        break;
    case LANES_APART: if (i != 40) ptx::bar_sync<1>(96); break;
    case LANES_DIFFER: if (i % 2) ptx::bar_sync<1>(96); else ptx::bar_sync<2>(96); break;
    case ONE_MISSING: if (warp < 2) ptx::bar_sync<3>(96); break;
    default: ptx::bar_sync<0>(96), __syncthreads(), ptx::bar_sync<0>(96);
    }
    p[i] = 1;
}
TEST(NamedBarrier, MistakesAreReported) {
    const std::vector<std::pair<int, std::string>> says = {
        {COUNT_OF_33, "33 threads are no multiple of 32"},
        {COUNT_TOO_LARGE, "128 threads are no multiple of 32 up to the block's 96"},
        {TWO_COUNTS, "others are there for"},
        {TWICE, "bar_sync<1>: its warp has arrived already"},
        {SYNCTHREADS_FIRST, ", which is the same"},
        {SYNCTHREADS_LAST, ", which is the same"},
        {LANES_APART, "bar_sync"},
        {LANES_DIFFER, "another lane of its warp is at bar_sync<"},
        {ONE_MISSING, "block (0, 0, 0), warp 1: 32 lanes at bar_sync<3>, 96 threads"}};
    for (auto& [mistake, text] : says) {
        SCOPED_TRACE(mistake);
        reports([mistake = mistake] {
            Numbers<int> p(96);
            run(bar_wrongly, 1, 96, p.data, mistake);
            cudaDeviceSynchronize();
        }, {text});
    }
    in_all_orders([] {
        Numbers<int> p(96);
        run(bar_wrongly, 1, 96, p.data, NOTHING_WRONG);
        EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    });
}

// -- matrices -----------------------------------------------------------------------------------------

constexpr int PITCH = 24;                  // of a row in shared memory: 16 numbers of 16 bits, and some more

// Four matrices of 8 x 8: the left half's upper and lower one, then the right half's.
template <bool TRANSPOSED> __global__ void load_matrices(uint32_t* p, int mistake) {
    SHARED(uint16_t, tile, 16 * PITCH);
    int i = int(threadIdx.x);
    if (!mistake || i)
        for (int k = i; k < 16 * PITCH; k += 32) tile[k] = uint16_t(k / PITCH * 100 + k % PITCH);
    if (mistake != 2) __syncwarp();
    const uint16_t* row = &tile[i % 16 * PITCH + i / 16 * 8 + (mistake == 3 ? i / 31 : 0)];
    uint32_t four[4], two[2], one[1];
    if (TRANSPOSED) {
        ptx::ldmatrix_x4_trans(four, row), ptx::ldmatrix_x2_trans(two, row), ptx::ldmatrix_x1_trans(one, row);
    } else {
        ptx::ldmatrix_x4(four, row), ptx::ldmatrix_x2(two, row), ptx::ldmatrix_x1(one, row);
    }
    const uint32_t all[7] = {four[0], four[1], four[2], four[3], two[0], two[1], one[0]};
    for (int k = 0; k < 7; k++) p[7 * i + k] = all[k];
}
TEST(Matrices, LoadAsTheManualSays) {
    for (bool transposed : {false, true}) {
        in_all_orders([=] {
            Numbers<uint32_t> p(32 * 7);
            launch(transposed ? load_matrices<true> : load_matrices<false>, 1, 32, 0, nullptr, p.data, 0);
            std::vector<uint32_t> host = p.host();
            constexpr int MATRIX[7] = {0, 1, 2, 3, 0, 1, 0};
            for (int i = 0; i < 32 * 7; i++) {
                int lane = i / 7, m = MATRIX[i % 7];
                for (int half = 0; half < 2; half++) {
                    int row = lane / 4, column = lane % 4 * 2 + half;
                    if (transposed) std::swap(row, column);
                    int value = (m % 2 * 8 + row) * 100 + m / 2 * 8 + column;
                    ASSERT_EQ(int(host[size_t(i)] >> 16 * half & 0xFFFF), value) << lane << " " << m;
                }
            }
        });
    }
}
TEST(Matrices, MistakesInLoadingAreReported) {
    for (auto [mistake, text] : {std::pair{1, "tile["}, {2, "tile["}, {3, "bytes is not aligned to 16"}}) {
        reports([mistake = mistake] {
            Numbers<uint32_t> p(32 * 7);
            launch(load_matrices<false>, 1, 32, 0, nullptr, p.data, mistake);
            cudaDeviceSynchronize();
        }, {text});
    }
}

// A kind of mma.sync: how many numbers a register holds, and k.
struct Kind {
    const char* name;
    int per, k;
    void (*kernel)(const uint32_t*, uint32_t*);
};
template <class Sum, class Mma> void multiply(const uint32_t* in, uint32_t* out, const Mma& mma) {
    unsigned i = threadIdx.x;
    uint32_t a[4], b[2];
    Sum sum[4];
    for (int r = 0; r < 4; r++) a[r] = in[10 * i + unsigned(r)];
    for (int r = 0; r < 2; r++) b[r] = in[10 * i + 4 + unsigned(r)];
    for (int r = 0; r < 4; r++) sum[r] = std::bit_cast<Sum>(in[10 * i + 6 + unsigned(r)]);
    mma(sum, a, b);
    for (int r = 0; r < 4; r++) out[4 * i + unsigned(r)] = std::bit_cast<uint32_t>(sum[r]);
}
__global__ void run_bf16(const uint32_t* in, uint32_t* out) { multiply<float>(in, out, ptx::mma_bf16); }
__global__ void run_f16(const uint32_t* in, uint32_t* out) { multiply<float>(in, out, ptx::mma_f16); }
__global__ void run_tf32(const uint32_t* in, uint32_t* out) { multiply<float>(in, out, ptx::mma_tf32); }
__global__ void run_e4m3(const uint32_t* in, uint32_t* out) { multiply<float>(in, out, ptx::mma_e4m3); }
__global__ void run_s8(const uint32_t* in, uint32_t* out) { multiply<int>(in, out, ptx::mma_s8); }
__global__ void run_s8_satfinite(const uint32_t* in, uint32_t* out) {
    multiply<int>(in, out, ptx::mma_s8_satfinite);
}
static const Kind KINDS[] = {{"bf16", 2, 16, run_bf16}, {"f16", 2, 16, run_f16}, {"tf32", 1, 8, run_tf32},
                             {"e4m3", 4, 32, run_e4m3}, {"s8", 4, 32, run_s8},
                             {"s8_satfinite", 4, 32, run_s8_satfinite}};

static uint32_t encoded(const std::string& kind, float x) {
    if (kind == "bf16") return __nv_bfloat16_raw(__float2bfloat16(x)).x;
    if (kind == "f16") return __half_raw(__float2half(x)).x;
    if (kind == "tf32") return std::bit_cast<uint32_t>(x) | 0x1FFF;     // which is to be ignored
    if (kind == "e4m3") return __nv_fp8_e4m3(x).__x;
    return uint8_t(int8_t(x));
}
// The places of number i of a lane, in the words of PTX's manual.
static std::pair<int, int> place_in_a(const Kind& kind, int lane, int i) {
    int group = lane >> 2, in_group = lane % 4;
    if (kind.k == 8) return {group + (i % 2 ? 8 : 0), in_group + (i >= 2 ? 4 : 0)};
    if (kind.k == 16)
        return {group + ((i >= 2 && i < 4) || i >= 6 ? 8 : 0), in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0)};
    return {group + ((i >= 4 && i < 8) || i >= 12 ? 8 : 0), in_group * 4 + (i & 3) + (i >= 8 ? 16 : 0)};
}
static std::pair<int, int> place_in_b(const Kind& kind, int lane, int i) {
    int group = lane >> 2, in_group = lane % 4;
    if (kind.k == 8) return {in_group + (i == 1 ? 4 : 0), group};
    if (kind.k == 16) return {in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0), group};
    return {in_group * 4 + (i & 3) + (i >= 4 ? 16 : 0), group};
}
static std::pair<int, int> place_in_sum(int lane, int i) {
    return {(lane >> 2) + (i >= 2 ? 8 : 0), lane % 4 * 2 + (i & 1)};
}

// A (16 x k, in bits), B (k x 8, in bits) and the sum (16 x 8), as one warp does it.
static std::vector<uint32_t> product(const Kind& kind, const std::vector<uint32_t>& a,
                                     const std::vector<uint32_t>& b, const std::vector<uint32_t>& sum) {
    std::vector<uint32_t> in(320), result(128);
    const int bits = 32 / kind.per;
    for (int lane = 0; lane < 32; lane++) {
        uint32_t* mine = in.data() + 10 * lane;
        for (int i = 0; i < 4 * kind.per; i++) {
            auto [row, k] = place_in_a(kind, lane, i);
            mine[i / kind.per] |= a[size_t(row * kind.k + k)] << i % kind.per * bits;
        }
        for (int i = 0; i < 2 * kind.per; i++) {
            auto [k, column] = place_in_b(kind, lane, i);
            mine[4 + i / kind.per] |= b[size_t(k * 8 + column)] << i % kind.per * bits;
        }
        for (int i = 0; i < 4; i++) {
            auto [row, column] = place_in_sum(lane, i);
            mine[6 + i] = sum[size_t(row * 8 + column)];
        }
    }
    Numbers<uint32_t> from(in), to(128);
    launch(kind.kernel, 1, 32, 0, nullptr, from.data, to.data);
    std::vector<uint32_t> out = to.host();
    for (int i = 0; i < 128; i++) {
        auto [row, column] = place_in_sum(i / 4, i % 4);
        result[size_t(row * 8 + column)] = out[size_t(i)];
    }
    return result;
}
TEST(Matrices, ProductsAreTheNaiveOnes) {
    for (const Kind& kind : KINDS) {
        SCOPED_TRACE(kind.name);
        const bool integers = kind.name[0] == 's';
        in_all_orders([&] {
            std::vector<uint32_t> a, b, sum, expected;
            auto a_of = [](int row, int k) { return float((row * 7 + k * 5) % 13 - 6); };
            auto b_of = [](int k, int column) { return float((k * 3 + column * 11) % 9 - 4); };
            auto bits = [&](int x) { return integers ? uint32_t(x) : std::bit_cast<uint32_t>(float(x)); };
            for (int i = 0; i < 16 * kind.k; i++)
                a.push_back(encoded(kind.name, a_of(i / kind.k, i % kind.k)));
            for (int i = 0; i < 8 * kind.k; i++) b.push_back(encoded(kind.name, b_of(i / 8, i % 8)));
            for (int i = 0; i < 128; i++) {
                int naive = i;
                for (int k = 0; k < kind.k; k++) naive += int(a_of(i / 8, k) * b_of(k, i % 8));
                sum.push_back(bits(i)), expected.push_back(bits(naive));
            }
            ASSERT_EQ(product(kind, a, b, sum), expected);
        });
    }
}
TEST(Matrices, OnlySatfiniteStopsAtTheLargest) {
    emulator::reset({});
    std::vector<uint32_t> a(16 * 32, 0x80), b(32 * 8, 0x80), most(128, 0x7FFFFFF0), least(128, 0x80000010);
    std::vector<uint32_t> minus(32 * 8, 0x7F);
    EXPECT_EQ(product(KINDS[4], a, b, most), std::vector<uint32_t>(128, 0x7FFFFFF0u + 32 * 16384));
    EXPECT_EQ(product(KINDS[5], a, b, most), std::vector<uint32_t>(128, 0x7FFFFFFF));
    EXPECT_EQ(product(KINDS[5], a, minus, least), std::vector<uint32_t>(128, 0x80000000));
}
// All numbers of 8 and of 16 bits, times one, as CUDA's own headers convert them.
TEST(Matrices, EachNumberIsWhatItsTypeSays) {
    emulator::reset({});
    auto value_of = [](const Kind& kind, unsigned bits) {
        if (kind.per == 4) {
            __nv_fp8_e4m3 x;
            x.__x = uint8_t(bits);
            return float(x);
        }
        if (kind.kernel == run_f16) return __half2float(__half(__half_raw{uint16_t(bits)}));
        return __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{uint16_t(bits)}));
    };
    for (const Kind* kind : {&KINDS[0], &KINDS[1], &KINDS[3]}) {
        std::vector<uint32_t> one(size_t(kind->k) * 8);
        for (size_t i = 0; i < 8; i++) one[9 * i] = encoded(kind->name, 1);
        const unsigned count = kind->per == 4 ? 256 : 65536;
        for (unsigned first = 0; first < count; first += 128) {
            std::vector<uint32_t> a(16 * size_t(kind->k));
            for (unsigned i = 0; i < 128; i++) a[i / 8 * size_t(kind->k) + i % 8] = first + i;
            std::vector<uint32_t> sum = product(*kind, a, one, std::vector<uint32_t>(128, 0x80000000));
            for (unsigned row = 0; row < 16; row++) {
                bool finite = true;        // a NaN or an infinity makes one of most of its row
                for (unsigned i = 0; i < 8; i++)
                    finite &= std::isfinite(value_of(*kind, first + row * 8 + i));
                for (unsigned i = row * 8; finite && i < row * 8 + 8; i++)
                    ASSERT_EQ(std::bit_cast<float>(sum[i]), value_of(*kind, first + i)) << first + i;
            }
        }
    }
}
TEST(Matrices, NotANumberStaysOne) {
    emulator::reset({});
    for (auto [kind, bits] : {std::pair{0, 0x7FC0}, {1, 0x7E00}, {2, 0x7FC00000}, {3, 0x7F}, {3, 0xFF}}) {
        std::vector<uint32_t> a(16 * size_t(KINDS[kind].k)), b(8 * size_t(KINDS[kind].k)), sum(128);
        a[0] = uint32_t(bits), b[0] = encoded(KINDS[kind].name, 1);
        std::vector<uint32_t> out = product(KINDS[kind], a, b, sum);
        EXPECT_TRUE(std::isnan(std::bit_cast<float>(out[0])));
        EXPECT_EQ(out[8], 0u);
    }
}
__global__ void half_a_warp(int* p, int) {
    float sum[4] = {};
    uint32_t a[4] = {}, b[2] = {};
    if (threadIdx.x < 16) ptx::mma_bf16(sum, a, b);
    p[threadIdx.x] = int(sum[0]);
}
__global__ void two_kinds_of_mma(int* p, int) {
    float sum[4] = {};
    uint32_t a[4] = {}, b[2] = {};
    if (threadIdx.x < 16) ptx::mma_bf16(sum, a, b);
    else ptx::mma_f16(sum, a, b);
    p[threadIdx.x] = int(sum[0]);
}
__global__ void one_e4m3(int* p, int) {
    float sum[4] = {};
    uint32_t a[4] = {}, b[2] = {};
    ptx::mma_e4m3(sum, a, b);
    *p = int(sum[0]);
}
TEST(Matrices, MistakesInMultiplyingAreReported) {
    reports([] {
        Numbers<int> p(32);
        run(half_a_warp, 1, 32, p.data, 0);
        cudaDeviceSynchronize();
    }, {"mma_bf16"});
    reports([] {
        Numbers<int> p(32);
        run(two_kinds_of_mma, 1, 32, p.data, 0);
        cudaDeviceSynchronize();
    }, {"where others wait in mma_"});
    emulator::Options older;
    older.capability = 80;
    emulator::reset(older);
    Numbers<int> p(1);
    run(one_e4m3, 1, 32, p.data, 0);
    EXPECT_THROW(cudaDeviceSynchronize(), emulator::Error);
    emulator::reset({});
}

// -- memory -------------------------------------------------------------------------------------------

__global__ void write_at(int* p, int i) { p[i] = 1; }
__global__ void read_at(int* p, int i) {
    if (p[i] == 12345) p[0] = 1;
}
TEST(Memory, AnIndexOneTooFarIsReported) {
    for (size_t n : {4, 20, 1000, 1024, 5000}) {
        for (auto kernel : {write_at, read_at}) {
            reports([=] {
                Numbers<int> p(n);
                run(kernel, 1, 1, p.data, int(n));
                cudaDeviceSynchronize();
            }, {"an access 0 bytes beyond an allocation of " + std::to_string(4 * n) + " bytes"});
        }
    }
}
TEST(Memory, AWriteBetweenItsEndAndThePagesIsReported) {
    reports([] {
        Numbers<int> p(17);
        EXPECT_EQ(reinterpret_cast<uintptr_t>(p.data) % 16, 0u);
        run(write_at, 1, 1, p.data, 17);
        cudaDeviceSynchronize();
    }, {"beyond the end of an allocation of 68 bytes"});
}
TEST(Memory, AWriteBeforeItsBeginIsReported) {
    reports([] {
        Numbers<int> p(17);
        run(write_at, 1, 1, p.data, -1);
        cudaDeviceSynchronize();
    }, {"before the begin of an allocation of 68 bytes"});
}
TEST(Memory, AnIndexFarOffIsReported) {
    reports([] {
        Numbers<int> p(4);
        run(read_at, 1, 1, p.data, 1 << 30);
        cudaDeviceSynchronize();
    }, {"no memory of a device (the nearest below it ends 4294967280 bytes before)"});
}
TEST(Memory, NoAddressIsReported) {
    reports([] {
        run(write_at, 1, 1, nullptr, 3);
        cudaDeviceSynchronize();
    }, {"which is no memory of a device"});
}
__global__ void recurse(int* p, int n) {
    volatile int page[1024];
    page[n % 1024] = n;
    if (n) recurse(p, n - 1);
    *p = page[n % 1024];
}
TEST(Memory, AFullStackIsReported) {
    reports([] {
        Numbers<int> p(1);
        run(recurse, 1, 1, p.data, 1000);
        cudaDeviceSynchronize();
    }, {"bytes of stack"});
}
TEST(Memory, IsNotANumberAtFirst) {
    emulator::reset({});
    Numbers<float> p(100);
    for (float x : p.host()) EXPECT_TRUE(std::isnan(x));
}
TEST(Memory, TheHostCannotTouchIt) {
    emulator::reset({});
    Numbers<int> p(17);
    EXPECT_EXIT(p.data[3] = 1, testing::ExitedWithCode(3), "the host accesses memory of device 0");
    cudaMemset(p.data, 0, 68);
    cudaDeviceSynchronize();
    EXPECT_EXIT(std::exit(p.data[3]), testing::ExitedWithCode(3), "the host accesses memory of device 0");
}
TEST(Memory, TheHostCannotTouchItAmongMany) {
    emulator::reset({});
    std::vector<int*> many(100);
    for (int*& p : many) cudaMalloc(&p, 4);
    cudaDeviceSynchronize();
    EXPECT_EXIT(*many[50] = 1, testing::ExitedWithCode(3), "the host accesses memory of device 0");
    for (int i = 0; i < 300; i++) run(write_at, 1, 1, many[7], 0), cudaDeviceSynchronize();
    run(write_at, 1, 1, many[7], -1);
    EXPECT_THROW(for (int i = 0; i < 100; i++) cudaDeviceSynchronize(), emulator::Error);
}
TEST(Memory, RunsOut) {
    emulator::Options small;
    small.memory = 1000;
    emulator::reset(small);
    void *a = nullptr, *b = nullptr;
    EXPECT_EQ(cudaMalloc(&a, 600), cudaSuccess);
    EXPECT_EQ(cudaMalloc(&b, 600), cudaErrorMemoryAllocation);
    EXPECT_EQ(b, nullptr);
    EXPECT_EQ(cudaFree(a), cudaSuccess);
    EXPECT_EQ(cudaFree(a), cudaErrorInvalidValue);
    EXPECT_EQ(cudaMalloc(&b, 600), cudaSuccess);
    EXPECT_EQ(cudaFree(b), cudaSuccess);
}
TEST(Memory, CopiesStayInside) {
    emulator::reset({});
    Numbers<int> p(4);
    int five[5] = {};
    EXPECT_EQ(cudaMemcpy(p.data, five, 20, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
    EXPECT_EQ(cudaMemcpy(five, p.data + 1, 16, cudaMemcpyDeviceToHost), cudaErrorInvalidValue);
    EXPECT_EQ(cudaMemcpy(five, p.data, 16, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
    EXPECT_EQ(cudaMemcpy(five, p.data, 16, cudaMemcpyDeviceToHost), cudaSuccess);
}

// How a graph's memory comes and goes; what it held before a launch is gone.
TEST(Memory, MayBeAPartOfAGraph) {
    in_all_orders([] {
        cudaStream_t s = nullptr;
        cudaGraph_t graph = nullptr;
        cudaGraphExec_t exec = nullptr;
        int* scratch = nullptr;
        cudaStreamCreate(&s);
        Numbers<int> p(1);
        cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal);
        EXPECT_EQ(cudaMallocAsync(&scratch, 4, s), cudaSuccess);
        cudaMemsetAsync(scratch, 1, 4, s);
        cudaMemcpyAsync(p.data, scratch, 4, cudaMemcpyDeviceToDevice, s);
        EXPECT_EQ(cudaFree(scratch), cudaErrorInvalidValue);
        EXPECT_EQ(cudaFreeAsync(scratch, s), cudaSuccess);
        EXPECT_EQ(cudaFreeAsync(scratch, s), cudaErrorInvalidValue);
        EXPECT_EQ(cudaStreamEndCapture(s, &graph), cudaSuccess);
        cudaGraphInstantiate(&exec, graph, 0);
        for (int i = 0; i < 2; i++) cudaGraphLaunch(exec, s);
        EXPECT_EQ(p.host()[0], 0x01010101);
        EXPECT_EQ(emulator::allocated(), 8u);
        cudaGraphExecDestroy(exec), cudaGraphDestroy(graph), cudaStreamDestroy(s);
        EXPECT_EQ(emulator::allocated(), 4u);
    });
}
TEST(Memory, GoesInTheOrderOfItsStream) {
    in_all_orders([] {
        int *a = nullptr, *b = nullptr;
        EXPECT_EQ(cudaMallocAsync(&a, 4, nullptr), cudaSuccess);
        cudaMemsetAsync(a, 0, 4, nullptr);
        run(write_at, 1, 1, a, 0);
        EXPECT_EQ(cudaFreeAsync(a, nullptr), cudaSuccess);
        EXPECT_NE(cudaFreeAsync(a, nullptr), cudaSuccess);
        EXPECT_EQ(cudaMallocAsync(&b, size_t(1) << 40, nullptr), cudaErrorMemoryAllocation);
        EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    });
}
TEST(Memory, SaysHowMuchIsFree) {
    emulator::Options small;
    small.memory = 1000;
    emulator::reset(small);
    size_t free = 0, total = 0;
    Numbers<int> p(100);
    EXPECT_EQ(cudaMemGetInfo(&free, &total), cudaSuccess);
    EXPECT_EQ(free, 600u);
    EXPECT_EQ(total, 1000u);
}

__global__ void count_up(int* p, int n) {
    int mine = int(threadIdx.x);
    for (int i = 0; i < n; i++) atomicAdd(p, 1), atomicMax(p + 1, mine), atomicMin(p + 2, -mine);
    atomicOr(p + 3, 1 << threadIdx.x % 32), atomicAnd(p + 4, ~(1 << threadIdx.x % 32));
    int old = p[5];
    for (int seen; (seen = atomicCAS(p + 5, old, old + 2)) != old;) old = seen;
}
TEST(Memory, AtomicsLoseNothing) {
    in_all_orders([] {
        Numbers<int> p(std::vector<int>{0, 0, 0, 0, -1, 0});
        run(count_up, 5, 50, p.data, 4);
        EXPECT_EQ(p.host(), (std::vector<int>{1000, 49, -49, -1, 0, 500}));
    });
}
// What is no atomic loses something in some order.
__global__ void count_up_wrongly(int* p, int) {
    int old = *p;
    __threadfence();
    *p = old + 1;
}
TEST(Memory, RandomOrdersShowARaceInGlobalMemory) {
    int lost = 0;
    for (uint64_t seed = 1; seed <= 5; seed++) {
        emulator::reset({Order::RANDOM, Async::LAZY, seed});
        Numbers<int> p(std::vector<int>{0});
        run(count_up_wrongly, 1, 32, p.data, 0);
        lost += p.host()[0] < 32;
    }
    EXPECT_EQ(lost, 5);
    emulator::reset({});
}

// -- streams, events, graphs --------------------------------------------------------------------------

__global__ void add_one(int* p, int) { *p += 1; }
__global__ void times_ten(int* p, int) { *p *= 10; }

TEST(Streams, KeepTheirOrder) {
    in_all_orders([] {
        cudaStream_t s = nullptr;
        cudaStreamCreate(&s);
        Numbers<int> p(std::vector<int>{0});
        for (int i = 1; i <= 4; i++) {
            launch(times_ten, 1, 1, 0, s, p.data, 0);
            for (int k = 0; k < i; k++) launch(add_one, 1, 1, 0, s, p.data, 0);
        }
        cudaStreamSynchronize(s);
        EXPECT_EQ(p.host()[0], 1234);
        cudaStreamDestroy(s);
    });
}
TEST(Streams, TheDefaultOneWaitsForTheOthersAndTheyForIt) {
    in_all_orders([] {
        cudaStream_t s = nullptr;
        cudaStreamCreate(&s);
        Numbers<int> p(std::vector<int>{0});
        for (int i = 0; i < 3; i++) launch(add_one, 1, 1, 0, s, p.data, 0), run(times_ten, 1, 1, p.data, 0);
        EXPECT_EQ(p.host()[0], 1110);
        cudaStreamDestroy(s);
    });
}
TEST(Streams, EventsOrderTwo) {
    in_all_orders([] {
        cudaStream_t a = nullptr, b = nullptr;
        cudaEvent_t e = nullptr;
        cudaStreamCreate(&a), cudaStreamCreate(&b), cudaEventCreate(&e);
        Numbers<int> p(std::vector<int>{0});
        cudaDeviceSynchronize();
        launch(add_one, 1, 1, 0, a, p.data, 0);
        cudaEventRecord(e, a);
        cudaStreamWaitEvent(b, e, 0);
        launch(times_ten, 1, 1, 0, b, p.data, 0);
        cudaEventSynchronize(e);
        EXPECT_EQ(cudaEventQuery(e), cudaSuccess);
        EXPECT_EQ(p.host()[0], 10);
        cudaEventDestroy(e), cudaStreamDestroy(a), cudaStreamDestroy(b);
    });
}
TEST(Streams, WithoutAnEventSomeOrderIsWrong) {
    int wrong = 0;
    for (uint64_t seed = 1; seed <= 8; seed++) {
        emulator::reset({Order::RANDOM, Async::LAZY, seed});
        cudaStream_t a = nullptr, b = nullptr;
        cudaStreamCreate(&a), cudaStreamCreate(&b);
        Numbers<int> p(std::vector<int>{0});
        cudaDeviceSynchronize();
        launch(add_one, 1, 1, 0, a, p.data, 0), launch(times_ten, 1, 1, 0, b, p.data, 0);
        wrong += p.host()[0] != 10;
    }
    EXPECT_GT(wrong, 0);
    emulator::reset({});
}
TEST(Streams, ACopyToTheHostIsNotThereUntilSomeoneWaits) {
    emulator::reset({});
    Numbers<int> p(std::vector<int>{7});
    int host = 0;
    cudaMemcpyAsync(&host, p.data, 4, cudaMemcpyDeviceToHost, nullptr);
    EXPECT_EQ(host, 0);
    cudaStreamSynchronize(nullptr);
    EXPECT_EQ(host, 7);
}
TEST(Streams, ACopyFromPinnedMemoryReadsItLate) {
    emulator::reset({});
    Numbers<int> p(1);
    int *pinned = nullptr, pageable = 1;
    cudaMallocHost(reinterpret_cast<void**>(&pinned), 4);
    *pinned = 1;
    cudaMemcpyAsync(p.data, pinned, 4, cudaMemcpyHostToDevice, nullptr);
    *pinned = 2;
    EXPECT_EQ(p.host()[0], 2);
    cudaMemcpyAsync(p.data, &pageable, 4, cudaMemcpyHostToDevice, nullptr);
    pageable = 2;
    EXPECT_EQ(p.host()[0], 1);
    cudaFreeHost(pinned);
}
TEST(Graphs, RepeatWhatWasAsked) {
    in_all_orders([] {
        cudaStream_t s = nullptr;
        cudaGraph_t graph = nullptr;
        cudaGraphExec_t exec = nullptr;
        cudaStreamCreate(&s);
        Numbers<int> p(std::vector<int>{0});
        cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal);
        launch(times_ten, 1, 1, 0, s, p.data, 0), launch(add_one, 1, 1, 0, s, p.data, 0);
        cudaStreamEndCapture(s, &graph);
        EXPECT_EQ(p.host()[0], 0);
        cudaGraphInstantiate(&exec, graph, 0);
        for (int i = 0; i < 3; i++) cudaGraphLaunch(exec, s);
        cudaStreamSynchronize(s);
        EXPECT_EQ(p.host()[0], 111);
        cudaGraphExecDestroy(exec), cudaGraphDestroy(graph), cudaStreamDestroy(s);
    });
}

// A graph reads the host's memory when it is launched, each time.
static cudaError_t capture_copy(int* to, const int* from, cudaGraphExec_t* exec) {
    cudaStream_t s = nullptr;
    cudaGraph_t graph = nullptr;
    cudaStreamCreate(&s);
    cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal);
    cudaError_t copied = cudaMemcpyAsync(to, from, 4, cudaMemcpyDefault, s);
    cudaError_t ended = cudaStreamEndCapture(s, &graph);
    EXPECT_EQ(ended, copied ? cudaErrorStreamCaptureInvalidated : cudaSuccess);
    EXPECT_EQ(graph == nullptr, copied != cudaSuccess);
    if (graph) cudaGraphInstantiate(exec, graph, 0);
    cudaGraphDestroy(graph), cudaStreamDestroy(s);
    return copied;
}
TEST(Graphs, CopyFromPinnedMemoryAtEachLaunch) {
    in_all_orders([] {
        Numbers<int> p(1);
        int* pinned = nullptr;
        cudaGraphExec_t exec = nullptr;
        cudaHostAlloc(&pinned, 4, cudaHostAllocDefault);
        EXPECT_EQ(capture_copy(p.data, pinned, &exec), cudaSuccess);
        for (int i = 0; i < 3; i++) {
            *pinned = i;
            cudaGraphLaunch(exec, nullptr);
            EXPECT_EQ(p.host()[0], i);
        }
        cudaGraphExecDestroy(exec), cudaFreeHost(pinned);
    });
}
TEST(Graphs, DoNotCopyPageableMemory) {
    emulator::reset({});
    Numbers<int> p(std::vector<int>{3});
    int pageable = 1;
    EXPECT_EQ(capture_copy(p.data, &pageable, nullptr), cudaErrorStreamCaptureUnsupported);
    EXPECT_EQ(capture_copy(&pageable, p.data, nullptr), cudaErrorStreamCaptureUnsupported);
    cudaGraphExec_t exec = nullptr;
    cudaHostRegister(&pageable, 4, cudaHostRegisterDefault);
    EXPECT_EQ(capture_copy(&pageable, p.data, &exec), cudaSuccess);
    cudaGraphLaunch(exec, nullptr);
    EXPECT_EQ(cudaHostUnregister(&pageable), cudaSuccess);
    EXPECT_EQ(pageable, 3);
    cudaGraphExecDestroy(exec);
}
TEST(Graphs, ACaptureEndsWhereTheHostWaits) {
    emulator::reset({});
    void* p = nullptr;
    auto after = [](const std::function<cudaError_t()>& call) {
        cudaStream_t s = nullptr;
        cudaGraph_t graph = nullptr;
        cudaStreamCreate(&s);
        cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal);
        EXPECT_EQ(call(), cudaErrorStreamCaptureUnsupported);
        EXPECT_EQ(cudaStreamEndCapture(s, &graph), cudaErrorStreamCaptureInvalidated);
        cudaStreamDestroy(s);
    };
    after([] { return cudaDeviceSynchronize(); });
    after([] { return cudaStreamSynchronize(nullptr); });
    after([&] { return cudaMalloc(&p, 4); });
}
TEST(Streams, TimeGoesOnBetweenEvents) {
    emulator::reset({});
    cudaEvent_t a = nullptr, b = nullptr, untimed = nullptr;
    float ms = -1;
    cudaEventCreate(&a), cudaEventCreate(&b), cudaEventCreateWithFlags(&untimed, cudaEventDisableTiming);
    EXPECT_EQ(cudaEventElapsedTime(&ms, a, b), cudaErrorInvalidResourceHandle);
    cudaEventRecord(a, nullptr), cudaEventRecord(b, nullptr), cudaEventRecord(untimed, nullptr);
    EXPECT_EQ(cudaEventElapsedTime(&ms, a, b), cudaErrorNotReady);
    cudaDeviceSynchronize();
    EXPECT_EQ(cudaEventElapsedTime(&ms, a, b), cudaSuccess);
    EXPECT_GE(ms, 0);
    EXPECT_EQ(cudaEventElapsedTime(&ms, a, untimed), cudaErrorInvalidResourceHandle);
}
TEST(Streams, ANonBlockingOneDoesNotWaitForTheDefaultOne) {
    int other = 0;
    for (uint64_t seed = 1; seed <= 8; seed++) {
        emulator::reset({Order::RANDOM, Async::LAZY, seed});
        cudaStream_t s = nullptr;
        cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking);
        Numbers<int> p(std::vector<int>{0});
        launch(add_one, 1, 1, 0, s, p.data, 0), run(times_ten, 1, 1, p.data, 0);
        cudaDeviceSynchronize();
        other += p.host()[0] != 10;
    }
    EXPECT_GT(other, 0);
    EXPECT_LT(other, 8);
    emulator::reset({});
}

// -- large shared memory, failing kernels, machines without a device ----------------------------------

__global__ void fill_dynamic(int* p, int n) {
    DYNAMIC_SHARED(int, large);
    large[n - 1] = 5;
    *p = large[n - 1];
}
TEST(Shared, TheLimitIsRaisedByAsking) {
    emulator::reset({});
    int n = 227 * 256, value = 0;
    Numbers<int> p(1);
    launch(fill_dynamic, 1, 1, size_t(n) * 4, nullptr, p.data, n);
    EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidValue);
    auto raise = [](int bytes) {
        return cudaFuncSetAttribute(fill_dynamic, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    };
    EXPECT_EQ(raise(n * 4 + 4), cudaErrorInvalidValue);
    EXPECT_EQ(raise(n * 4), cudaSuccess);
    cudaGetLastError();
    launch(fill_dynamic, 1, 1, size_t(n) * 4, nullptr, p.data, n);
    EXPECT_EQ(cudaGetLastError(), cudaSuccess);
    EXPECT_EQ(p.host()[0], 5);
    cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
    EXPECT_EQ(value, n * 4);
    emulator::Options older;
    older.capability = 80;
    emulator::reset(older);
    EXPECT_EQ(raise(n * 4), cudaErrorInvalidValue);
    EXPECT_EQ(raise(163 * 1024), cudaSuccess);
}
__global__ void too_much_shared(int* p, int) {
    SHARED(int, half, 6 * 1024);
    SHARED(int, other_half, 6 * 1024 + 1);
    half[0] = other_half[0] = 1;
    *p = half[0];
}
TEST(Shared, MoreThanABlockHasIsReported) {
    reports([] {
        Numbers<int> p(1);
        run(too_much_shared, 1, 1, p.data, 0);
        cudaDeviceSynchronize();
    }, {"with other_half the block has 49156 bytes in SHARED"});
}

__global__ void trapped(int* p, int) {
    if (threadIdx.x == 7) __trap();
    __syncthreads();
    *p = 1;
}
TEST(Failure, ATrapIsTheErrorOfEveryLaterCall) {
    for (Order order : {Order::FIFO, Order::RANDOM}) {
        emulator::reset({order});
        int* p = nullptr;
        void* q = nullptr;
        cudaMalloc(&p, 4);
        run(trapped, 2, 64, p, 0);
        EXPECT_EQ(cudaGetLastError(), cudaSuccess);
        EXPECT_EQ(cudaDeviceSynchronize(), cudaErrorLaunchFailure);
        EXPECT_EQ(cudaGetLastError(), cudaErrorLaunchFailure);
        EXPECT_EQ(cudaGetLastError(), cudaErrorLaunchFailure);
        EXPECT_EQ(cudaMalloc(&q, 4), cudaErrorLaunchFailure);
        EXPECT_EQ(cudaMemset(p, 0, 4), cudaErrorLaunchFailure);
        EXPECT_STREQ(cudaGetErrorString(cudaGetLastError()), "unspecified launch failure");
    }
    emulator::reset({});
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
}
TEST(Failure, MayBePlanned) {
    for (Async async : {Async::EAGER, Async::LAZY}) {
        emulator::Options o;
        o.fault = 3, o.async = async;
        emulator::reset(o);
        Numbers<int> p(std::vector<int>{0});
        for (int i = 0; i < 2; i++) run(add_one, 1, 1, p.data, 0);
        EXPECT_EQ(p.host()[0], 2);
        run(add_one, 1, 1, p.data, 0);
        EXPECT_EQ(cudaDeviceSynchronize(), cudaErrorLaunchFailure);
    }
    emulator::reset({});
}
TEST(Failure, AMachineMayHaveNoDevice) {
    emulator::Options none;
    for (int devices : {0, -1}) {
        const cudaError_t error = devices ? cudaErrorInsufficientDriver : cudaErrorNoDevice;
        none.devices = devices;
        emulator::reset(none);
        int count = 7, version = 0;
        void* p = nullptr;
        cudaStream_t s = nullptr;
        EXPECT_EQ(cudaGetDeviceCount(&count), error);
        EXPECT_EQ(count, 0);
        EXPECT_EQ(cudaSetDevice(0), error);
        EXPECT_EQ(cudaMalloc(&p, 4), error);
        EXPECT_EQ(cudaStreamCreate(&s), error);
        EXPECT_EQ(cudaDeviceSynchronize(), error);
        run(write_position, 1, 1, nullptr, 0);
        EXPECT_EQ(cudaGetLastError(), error);
        cudaDriverGetVersion(&version);
        EXPECT_EQ(version == 0, devices < 0);
    }
    emulator::reset({});
}
TEST(Failure, OfAProgramIsSaidAndItsExitCodeIsThree) {
    emulator::Options program;
    program.throws = false;
    auto fail = [&] {
        emulator::reset(program);
        run(write_at, 1, 1, nullptr, 3);
        try {
            cudaDeviceSynchronize();
        } catch (...) {
            std::exit(1);
        }
    };
    EXPECT_EXIT(fail(), testing::ExitedWithCode(3), "^emulator: device 0, write_at, .*\n$");
}
TEST(Failure, TheEnvironmentMayAskForIt) {
    setenv("EMU_DEVICES", "0", 1), setenv("EMU_MEMORY", "12345678901", 1), setenv("EMU_FAULT", "4", 1);
    setenv("EMU_CAPABILITY", "80", 1), setenv("EMU_SEED", "9", 1);
    emulator::Options o = emulator::options_of_environment();
    for (const char* name : {"DEVICES", "MEMORY", "FAULT", "CAPABILITY", "SEED"})
        unsetenv((std::string("EMU_") + name).c_str());
    EXPECT_EQ(o.devices, 0);
    EXPECT_EQ(o.memory, 12345678901u);
    EXPECT_EQ(o.fault, 4);
    EXPECT_EQ(o.capability, 80);
    EXPECT_EQ(o.seed, 9u);
    EXPECT_EQ(emulator::options_of_environment().devices, 1);
}
TEST(Devices, SayWhatTheyAre) {
    emulator::reset({});
    cudaDeviceProp p{};
    int major = 0, version = 0, blocks = 0;
    EXPECT_EQ(cudaGetDeviceProperties(&p, 0), cudaSuccess);
    EXPECT_EQ(cudaGetDeviceProperties(&p, 1), cudaErrorInvalidDevice);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
    EXPECT_EQ(p.major, major);
    EXPECT_STREQ(p.name, "an emulated GPU");
    EXPECT_EQ(p.totalGlobalMem, size_t(1) << 30);
    cudaRuntimeGetVersion(&version);
    EXPECT_EQ(version, CUDART_VERSION);
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, write_position, 256, 100 << 10);
    EXPECT_EQ(blocks, 2);
}

// -- numbers ------------------------------------------------------------------------------------------

TEST(Numbers, BitsAreCudas) {
    EXPECT_EQ(__byte_perm(0x33221100, 0x77665544, 0x7041), 0x77004411u);
    EXPECT_EQ(__byte_perm(0x33221100, 0x77665544, 0xFFFF8), 0x77777700u);   // three bits of each digit
    EXPECT_EQ(__brev(1), 0x80000000u);
    EXPECT_EQ(__brev(0x12345678), 0x1E6A2C48u);
    EXPECT_EQ(__brevll(1), 1ull << 63);
    EXPECT_EQ(__umulhi(0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFEu);
    EXPECT_EQ(__mulhi(-1, 1), -1);
    EXPECT_EQ(__umul64hi(~0ull, ~0ull), ~0ull - 1);
    EXPECT_EQ(__clz(0), 32);
    EXPECT_EQ(__clzll(1), 63);
    EXPECT_EQ(__ffs(0), 0);
    EXPECT_EQ(__ffsll(1ll << 40), 41);
    EXPECT_EQ(__funnelshift_l(0x80000000, 1, 1), 3u);
    EXPECT_EQ(__funnelshift_r(0, 1, 33), 0x80000000u);
    EXPECT_EQ(__hiloint2double(0x3FF80000, 0), 1.5);
    EXPECT_EQ(__hiloint2double(__double2hiint(-1e300), __double2loint(-1e300)), -1e300);
}
TEST(Numbers, FourProductsOfBytesAddUp) {
    EXPECT_EQ(__dp4a(0x04030201, 0x01010101, 5), 15);
    EXPECT_EQ(__dp4a(int(0x80808080), int(0x80808080), 0), 4 * 16384);
    EXPECT_EQ(__dp4a(int(0xFF000000), 0x7F000000, 0), -127);
    EXPECT_EQ(__dp4a(0xFF000000u, 0x7F000000u, 0u), 255u * 127);
    EXPECT_EQ(__dp4a(0x7F, 1, 0x7FFFFFFF), int(0x8000007E));     // wraps
}
TEST(Numbers, ConversionsRoundAndSaturate) {
    const float infinity = INFINITY;
    EXPECT_EQ(__float2int_rn(2.5f), 2);
    EXPECT_EQ(__float2int_rn(-3.5f), -4);
    EXPECT_EQ(__float2int_rz(-3.9f), -3);
    EXPECT_EQ(__float2int_ru(3.1f), 4);
    EXPECT_EQ(__float2int_rd(-3.1f), -4);
    EXPECT_EQ(__float2int_rn(3e9f), 0x7FFFFFFF);
    EXPECT_EQ(__float2int_rn(-infinity), int(0x80000000));
    EXPECT_EQ(__float2int_rn(NAN), 0);
    EXPECT_EQ(__float2uint_rn(3e9f), 3000000000u);
    EXPECT_EQ(__float2uint_rn(infinity), 0xFFFFFFFFu);
    EXPECT_EQ(__float2uint_rn(-1), 0u);
    EXPECT_EQ(__int2float_rn(16777217), 16777216.0f);
    EXPECT_EQ(__uint2float_rn(0xFFFFFFFF), 4294967296.0f);
    EXPECT_EQ(__saturatef(NAN), 0);
    EXPECT_EQ(__saturatef(2), 1);
}
TEST(Numbers, ArithmeticIsRoundedOnce) {
    float x = 1 + std::ldexp(1.0f, -12), square = 1 + std::ldexp(1.0f, -11);
    EXPECT_EQ(__fmul_rn(x, x), square);
    EXPECT_EQ(__fmaf_rn(x, x, -square), std::ldexp(1.0f, -24));
    EXPECT_EQ(__fadd_rn(__fmul_rn(x, x), -square), 0);
    EXPECT_EQ(__frcp_rn(3), 1.0f / 3);
    EXPECT_EQ(__fdiv_rn(2, 3), 2.0f / 3);
    EXPECT_EQ(__fsqrt_rn(2), std::sqrt(2.0f));
    EXPECT_EQ(__frsqrt_rn(4), 0.5f);
    EXPECT_NEAR(__expf(1), 2.7182818f, 1e-6f);
}

// -- several devices, deadlock, livelock --------------------------------------------------------------

// Device 0 and 1 add to each other's number in turns.
__global__ void ping_pong(volatile int* mine, volatile int* other, int rounds) {
    for (int r = 1; r <= rounds; r++) {
        *other = r;
        while (*mine < r) emulator::spin();
    }
}
static void two_devices(bool both, bool peer) {
    int* p[2] = {};
    cudaStream_t s[2] = {};
    for (int d : {0, 1}) {
        cudaSetDevice(d);
        if (peer || d == 0) cudaDeviceEnablePeerAccess(1 - d, 0);
        cudaMalloc(reinterpret_cast<void**>(&p[d]), 4);
        cudaMemset(p[d], 0, 4);
        cudaStreamCreate(&s[d]);
    }
    cudaDeviceSynchronize();
    for (int d = 0; d < (both ? 2 : 1); d++) launch(ping_pong, 1, 1, 0, s[d], p[d], p[1 - d], 20);
    cudaDeviceSynchronize();
    int host = 0;
    for (int d : {0, 1}) {
        cudaMemcpy(&host, p[d], 4, cudaMemcpyDeviceToHost);
        EXPECT_EQ(host, 20);
        cudaFree(p[d]);
    }
}
TEST(Devices, TalkThroughPeerPointers) {
    for (Order order : {Order::FIFO, Order::RANDOM, Order::PRIORITY}) {
        for (uint64_t seed : {1, 2, 3}) {
            emulator::reset({order, Async::LAZY, seed, 2});
            two_devices(true, true);
        }
    }
    emulator::reset({});
}
TEST(Devices, AMissingPeerIsReported) {
    reports([] { two_devices(false, true); }, {"livelock", "device 0, ping_pong"}, 2);
}
TEST(Devices, MissingPeerAccessIsReported) {
    reports([] { two_devices(true, false); },
            {"device 1, ping_pong", "memory of device 0 without peer access"}, 2);
}

__global__ void crossed(int* p, int) {
    if (threadIdx.x < 16) p[threadIdx.x] = __any_sync(0x1FFFF, 1);
    else if (threadIdx.x > 16) p[threadIdx.x] = __any_sync(0xFFFE0000, 1);
    __syncthreads();
}
TEST(Deadlock, EachWarpSaysWhatItWaitsFor) {
    reports([] {
        Numbers<int> p(32);
        run(crossed, 1, 32, p.data, 0);
        cudaDeviceSynchronize();
    }, {"deadlock:", "device 0, crossed, block (0, 0, 0), warp 0: 16 lanes at __any_sync, mask 0001ffff",
        "warp 0: 16 lanes at __syncthreads, line "});
}
__global__ void never(int* p, int) {
    for (volatile int i = 0; i >= 0;) i = i % 2;
    *p = 1;
}
TEST(Livelock, ALoopThatNeverGivesWayIsReported) {
    emulator::reset({});
    Numbers<int> p(1);
    run(never, 1, 1, p.data, 0);
    EXPECT_THROW(cudaDeviceSynchronize(), emulator::Error);
    emulator::reset({});
}
