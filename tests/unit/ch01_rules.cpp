// Chapter 1: errors, memory, the parallel loop, random numbers, taps.
#include "unit.h"

#include <atomic>
#include <condition_variable>

// -- 1.1 fail, CHECK --------------------------------------------------------------------------------

TEST(Fail, ThrowsOneLineWithItsArguments) {
    EXPECT_TRUE(refuses([] { fail("%s: no tensor '%s', %d of %.2f", "a.safetensors", "x", 3, 4.5); },
                        "a.safetensors: no tensor 'x', 3 of 4.50"));
}
TEST(Fail, KeepsALongLineWhole) {
    std::string name(5000, 'n');
    EXPECT_TRUE(
        refuses([&] { fail("tensor '%s' is missing", name.c_str()); }, "tensor '" + name + "' is missing"));
}
TEST(Fail, TextOfFormatsNothing) { EXPECT_EQ(text_of("%s", ""), ""); }
TEST(Fail, IsARuntimeError) { EXPECT_THROW(fail("no"), std::runtime_error); }

TEST(CheckDeathTest, AbortsWithPlaceConditionAndText) {
    EXPECT_DEATH(CHECK(1 + 1 == 3, "layer %d", 7),
                 "ch01_rules.cpp:[0-9]+: CHECK.1 . 1 == 3. failed: layer 7");
}
TEST(Check, EvaluatesItsConditionOnce) {
    int n = 0;
    CHECK(++n == 1, "%d", n);
    EXPECT_EQ(n, 1);
}

// -- 1.2 Pages, Arena -------------------------------------------------------------------------------

TEST(Pages, AreZeroAndWritable) {
    Pages pages(10000);
    for (size_t i = 0; i < pages.size(); i++) ASSERT_EQ(pages.data()[i], std::byte{0});
    std::memset(pages.data(), 1, pages.size());
}
TEST(Pages, Move) {
    Pages a(4096), b(std::move(a));
    EXPECT_EQ(b.size(), 4096u);
    EXPECT_EQ(a.data(), nullptr);   // NOLINT: a moved-from Pages is empty
}
TEST(Pages, OfNothingAreNothing) { EXPECT_EQ(Pages(0).data(), nullptr); }
TEST(Pages, RefuseWhatNoMachineHas) {
    EXPECT_TRUE(refuses([] { Pages(size_t(1) << 62); }, "not enough memory"));
}

TEST(Arena, CountsWithoutABlock) {
    Arena counter;
    EXPECT_EQ(counter.take<float>(1), nullptr);
    EXPECT_EQ(counter.used, 64u);
}
TEST(Arena, TakesNoBytesForNothing) {
    Arena counter;
    counter.take<float>(0);
    EXPECT_EQ(counter.used, 0u);
}
TEST(Arena, BillEqualsWhatIsHandedOut) {
    const std::vector<size_t> sizes = {1, 0, 15, 16, 17, 1000, 3};
    Arena counter;
    for (size_t n : sizes) counter.take<double>(n);
    Pages pages(counter.used);
    Arena arena{pages.data(), 0};
    std::byte* end = pages.data();
    for (size_t n : sizes) {
        double* p = arena.take<double>(n);
        EXPECT_EQ(reinterpret_cast<uintptr_t>(p) % 64, 0u);
        EXPECT_GE(reinterpret_cast<std::byte*>(p), end);        // no overlap with the one before
        end = reinterpret_cast<std::byte*>(p + n);
    }
    EXPECT_LE(end, pages.data() + pages.size());
    EXPECT_EQ(arena.used, counter.used);
}
TEST(Arena, ASessionTakesExactlyItsBill) {
    for (int threads : {1, 3}) {
        ScopedThreads scoped(threads);
        for (const Keys& keys :
             {tiny_v3(), tiny_v2_lite(), tiny_fp8(), tiny_dense("qwen2"), tiny_dense("llama")}) {
            for (MlaForm form : {MlaForm::ABSORBED, MlaForm::NAIVE}) {
                Model model;
                model.config = config_of(keys);
                Session s(model, {40, 7, form});
                EXPECT_EQ(s.arena.used, Activations::bytes(model.config, s.options, CPU));
            }
        }
    }
}

// -- 1.3 Team, parallel_for -------------------------------------------------------------------------

TEST(ParallelFor, VisitsEachIndexOnce) {
    for (int threads = 1; threads <= 8; threads++) {
        ScopedThreads scoped(threads);
        for (int64_t n : {0, 1, 2, 7, 100, 1001}) {
            std::vector<std::atomic<int>> visits(static_cast<size_t>(n));
            parallel_for(n, [&](int64_t i) { visits[size_t(i)]++; });
            for (auto& count : visits) ASSERT_EQ(count, 1) << n << " indices, " << threads << " threads";
        }
    }
}
TEST(ParallelFor, NumbersItsThreadsBelowTheLimit) {
    for (int threads : {1, 2, 3, 8}) {
        ScopedThreads scoped(threads);
        std::atomic<int> most = 0, least = 0;
        parallel_for(100, [&](int64_t) {
            int here = thread_index();
            for (int seen = most; here > seen && !most.compare_exchange_weak(seen, here);) {}
            for (int seen = least; here < seen && !least.compare_exchange_weak(seen, here);) {}
        });
        EXPECT_LT(most, threads);
        EXPECT_EQ(least, 0);
        EXPECT_EQ(thread_index(), 0);                 // of the thread that asks
    }
}

// Neighbours read neighbouring memory: a thread takes its own share, then those of others, each in its order.
TEST(ParallelFor, TakesEachShareInOrder) {
    for (int threads : {2, 3, 8}) {
        ScopedThreads scoped(threads);
        std::vector<std::vector<int64_t>> taken(static_cast<size_t>(threads));
        parallel_for(1000, [&](int64_t i) { taken[size_t(thread_index())].push_back(i); });
        int backwards = 0;
        size_t indices = 0;
        for (const std::vector<int64_t>& mine : taken) {
            for (size_t k = 1; k < mine.size(); k++) backwards += mine[k] < mine[k - 1];
            indices += mine.size();
        }
        EXPECT_EQ(indices, 1000u);
        EXPECT_LE(backwards, 2 * threads);           // from the last share to the first, to a task not begun
    }
}
// A thread that is held up in one index keeps nothing else waiting: here until all others are done.
TEST(ParallelFor, HelpsWithTheShareOfAnother) {
    for (int64_t held : {0, 50, 99}) {
        ScopedThreads scoped(2);
        std::mutex mutex;
        std::condition_variable change;
        int done = 0;
        bool all = false;
        parallel_for(100, [&](int64_t i) {
            std::unique_lock lock(mutex);
            if (i == held) all = change.wait_for(lock, std::chrono::minutes(1), [&] { return done == 99; });
            done++;
            change.notify_all();
        });
        EXPECT_TRUE(all) << held;
    }
}

// Whether a loop of `n` indices of `cost` has them on different threads: the first and the last wait for each
// other. A loop on one thread meets the first of them alone; its minute of patience is no measure of speed.
static bool shares(int64_t n, int64_t cost) {
    std::mutex mutex;
    std::condition_variable arrival;
    int arrived = 0;
    bool met = false;
    parallel_for(n, [&](int64_t i) {
        if (i > 0 && i < n - 1) return;
        std::unique_lock lock(mutex);
        arrived++;
        arrival.notify_all();
        if (in_loop) met = arrival.wait_for(lock, std::chrono::minutes(1), [&] { return arrived == 2; });
    }, cost);
    return met;
}

TEST(ParallelFor, SharesALoopThatIsWorthIt) {
    for (int threads : {2, 3, 8}) {
        ScopedThreads scoped(threads);
        EXPECT_TRUE(shares(2, WORTH_WAKING / 2));
        EXPECT_TRUE(shares(2, WORTH_WAKING));
        EXPECT_TRUE(shares(100, WORTH_WAKING / 100 + 1));
    }
}
TEST(ParallelFor, RunsALoopThatIsNotWorthItAlone) {
    ScopedThreads scoped(3);
    const std::pair<int64_t, int64_t> small[] = {{1, WORTH_WAKING * 10}, {2, WORTH_WAKING / 2 - 1},
                                                 {1000, WORTH_WAKING / 1000}, {WORTH_WAKING - 1, 1}};
    for (auto [n, cost] : small) {
        std::vector<int64_t> order;                // no lock: the sanitizers would see a second thread
        std::set<std::thread::id> threads;
        parallel_for(n, [&](int64_t i) { order.push_back(i), threads.insert(std::this_thread::get_id()); },
                     cost);
        EXPECT_EQ(threads, std::set{std::this_thread::get_id()}) << n << " of " << cost;
        ASSERT_EQ(order.size(), size_t(n));
        EXPECT_TRUE(std::is_sorted(order.begin(), order.end())) << n << " of " << cost;
    }
}
// Each loop sees what the one before it wrote: a team that starts a loop too early, or leaves one before its
// last index is done, gives another number.
TEST(ParallelFor, ManySmallLoopsOneAfterAnother) {
    for (int threads : {2, 3, 8}) {
        ScopedThreads scoped(threads);
        std::vector<int64_t> cell(5);
        int64_t wrong = 0, last = 0;
        for (int round = 1; round <= 20000; round++) {
            int64_t n = 2 + round % 4;
            parallel_for(n, [&](int64_t i) { cell[size_t(i)] = last + i + 1; });
            for (int64_t i = 0; i < n; i++) wrong += cell[size_t(i)] != last + i + 1;
            last = cell[size_t(n) - 1];
        }
        EXPECT_EQ(wrong, 0) << threads << " threads";
    }
}
TEST(ParallelFor, WakesATeamThatHasGoneToSleep) {
    ScopedThreads scoped(3);
    for (int round = 0; round < 20; round++) {
        std::this_thread::sleep_for(std::chrono::milliseconds(2));     // more than a team stays awake
        EXPECT_TRUE(shares(2, WORTH_WAKING)) << round;
    }
}
TEST(ParallelFor, ALoopInALoopRunsOnItsThread) {
    ScopedThreads scoped(3);
    std::atomic<int> visits = 0, strangers = 0;
    parallel_for(7, [&](int64_t) {
        std::thread::id outer = std::this_thread::get_id();
        std::vector<int64_t> order;
        parallel_for(50, [&](int64_t i) {
            visits++, strangers += std::this_thread::get_id() != outer;
            order.push_back(i);
        });
        strangers += !std::is_sorted(order.begin(), order.end()) || order.size() != 50;
    });
    EXPECT_EQ(visits, 7 * 50);
    EXPECT_EQ(strangers, 0);
    EXPECT_TRUE(shares(2, WORTH_WAKING));          // and then a loop is shared again
}
TEST(ParallelFor, HandsOutAnException) {
    for (int threads : {1, 2, 8}) {
        ScopedThreads scoped(threads);
        for (int64_t bad : {0, 57, 99}) {
            auto body = [&](int64_t i) {
                if (i == bad) fail("index %d", int(i));
            };
            EXPECT_TRUE(refuses([&] { parallel_for(100, body); }, text_of("index %d", int(bad))));
        }
        EXPECT_THROW(parallel_for(100, [](int64_t) { throw std::bad_alloc(); }), std::bad_alloc);   // many
        std::atomic<int> visits = 0;
        parallel_for(100, [&](int64_t) { visits++; });
        EXPECT_EQ(visits, 100);                    // the team is none the worse for it
        EXPECT_FALSE(in_loop);
    }
}
TEST(ParallelFor, WithFarMoreThreadsThanCores) {
    ScopedThreads scoped(50);
    EXPECT_EQ(n_threads(), 50);
    for (int round = 0; round < 50; round++) {
        std::vector<std::atomic<int>> visits(200);
        parallel_for(200, [&](int64_t i) { visits[size_t(i)]++; });
        for (auto& count : visits) ASSERT_EQ(count, 1) << round;
    }
}
// Work that another thread did is visible after the loop, and teams come and go.
TEST(ParallelFor, SumsTheSameForEveryTeam) {
    for (int round = 0; round < 30; round++) {
        ScopedThreads scoped(1 + round % 8);
        std::vector<int64_t> squares(1000);
        parallel_for(1000, [&](int64_t i) { squares[size_t(i)] = i * i; });
        EXPECT_EQ(std::accumulate(squares.begin(), squares.end(), int64_t(0)), 332833500);
    }
}
TEST(WithTeam, RunsItsBodyOnceOnTheCallersThread) {
    for (int threads : {1, 3}) {
        ScopedThreads scoped(threads);
        int runs = 0;
        std::thread::id here = std::this_thread::get_id();
        with_team([&] { runs += std::this_thread::get_id() == here; });
        EXPECT_EQ(runs, 1);
        EXPECT_TRUE(refuses([] { with_team([] { fail("inside"); }); }, "inside"));
    }
}
TEST(WithTeam, SharesTheLoopsInsideIt) {
    ScopedThreads scoped(3);
    with_team([] {
        for (int round = 0; round < 3; round++) EXPECT_TRUE(shares(2, WORTH_WAKING));
    });
}
// Ctrl-C ends what the calling thread waits for: it is not another thread that gets the signal.
TEST(WithTeam, LeavesTheSignalToTheCaller) {
    ScopedThreads scoped(3);
    std::atomic<int> blocked = 0;
    std::thread::id here = std::this_thread::get_id();
    parallel_for(300, [&](int64_t) {
        sigset_t set;
        pthread_sigmask(SIG_BLOCK, nullptr, &set);
        blocked += (std::this_thread::get_id() == here) == bool(sigismember(&set, SIGINT));
    });
    EXPECT_EQ(blocked, 0);
}

// -- 1.4 Rng ----------------------------------------------------------------------------------------

// The outputs for seed 1234567 that the algorithm's authors' C code prints.
TEST(Rng, IsSplitMix64) {
    Rng rng{1234567};
    for (uint64_t expected : {6457827717110365317u, 3203168211198807973u, 9817491932198370423u,
                              4593380528125082431u, 16408922859458223821u})
        EXPECT_EQ(rng.next(), expected);
}
TEST(Rng, SeedZeroIsAsGoodAsAnother) { EXPECT_EQ(Rng{0}.next(), 0xE220A8397B1DCDAFu); }
TEST(Rng, UniformIsTheTopOfTheBits) {
    Rng a{42}, b{42};
    for (int i = 0; i < 1000; i++) {
        double u = a.uniform();
        EXPECT_EQ(u, std::ldexp(double(b.next() >> 11), -53));
        EXPECT_TRUE(u >= 0 && u < 1);
    }
}
// The mean of n uniform numbers has a standard deviation of 1 / sqrt(12 n); 5 of them are missed once in 1.7
// M.
TEST(Rng, UniformHasMeanOneHalf) {
    Rng rng{7};
    double sum = 0;
    int n = 100000;
    for (int i = 0; i < n; i++) sum += rng.uniform();
    EXPECT_LT(std::fabs(sum / n - 0.5), 5 / std::sqrt(12.0 * n));
}

// -- 1.5 Taps ---------------------------------------------------------------------------------------

TEST(Taps, AppendTheRowsOfLaterChunks) {
    Taps taps;
    real first[] = {1, 2, 3, 4, 5, 6}, second[] = {7, 8, 9};
    taps.add("layers.0.q_rope", first, 2, {3});
    taps.add("layers.0.q_rope", second, 1, {3});
    EXPECT_EQ(taps.entries.size(), 1u);
    EXPECT_EQ(taps.entries[0].values, (Vector{1, 2, 3, 4, 5, 6, 7, 8, 9}));
}
TEST(Taps, KeepTheOrderOfTheNetwork) {
    Taps taps;
    real x = 0;
    for (const char* name : {"embed", "b", "a", "embed", "b"}) taps.add(name, &x, 1, {1});
    ASSERT_EQ(taps.entries.size(), 3u);
    EXPECT_EQ(taps.entries[0].name + taps.entries[1].name + taps.entries[2].name, "embedba");
}
TEST(Taps, KnowTheirInnerShape) {
    Taps taps;
    real x[12] = {};
    taps.add("q", x, 2, {2, 3});
    EXPECT_EQ(taps.entries[0].inner, (std::vector<size_t>{2, 3}));
    EXPECT_EQ(taps.entries[0].values.size(), 12u);
}
TEST(Taps, KeepIntegersApart) {
    Taps taps;
    int ids[] = {5, 6, 7, 8};
    taps.add("expert_idx", ids, 2, 2);
    EXPECT_EQ(taps.entries[0].integers, (std::vector<int32_t>{5, 6, 7, 8}));
    EXPECT_TRUE(taps.entries[0].values.empty());
}
