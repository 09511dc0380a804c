// The emulator: each primitive does what CUDA says, and each mistake that it is there for is reported.
//
//   build/gpu/emulator_tests       from anywhere
#include "cuda_emulator.h"

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
    EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidConfiguration);
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

// -- memory -------------------------------------------------------------------------------------------

__global__ void write_at(int* p, int i) { p[i] = 1; }
__global__ void read_at(int* p, int i) {
    if (p[i] == 12345) p[0] = 1;
}
TEST(Memory, AnIndexOneTooFarIsReported) {
    for (size_t n : {1, 17, 1000, 1024, 5000}) {
        for (auto kernel : {write_at, read_at}) {
            reports([=] {
                Numbers<int> p(n);
                run(kernel, 1, 1, p.data, int(n));
                cudaDeviceSynchronize();
            }, {"an access 0 bytes beyond an allocation of " + std::to_string(4 * n) + " bytes"});
        }
    }
}
TEST(Memory, AWriteBeforeItsBeginIsReported) {
    reports([] {
        Numbers<int> p(17);
        run(write_at, 1, 1, p.data, -1);
        cudaDeviceSynchronize();
    }, {"before the begin of an allocation of 68 bytes"});
}
TEST(Memory, NoAddressIsReported) {
    reports([] {
        run(write_at, 1, 1, nullptr, 3);
        cudaDeviceSynchronize();
    }, {"which is no memory of a device"});
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
