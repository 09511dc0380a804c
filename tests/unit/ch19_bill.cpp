// Chapter 19: what this machine gives to the process, and the memory plan.
#include "unit.h"

// -- 19.2, 19.3 memory, processors ------------------------------------------------------------------

TEST(Memory, AControlGroupLeavesItsLimitLessWhatIsNotAFile) {
    fs::path v1 = scratch("group_v1"), v2 = scratch("group_v2");
    write_text(v1 / "memory.limit_in_bytes", "1000000\n");
    write_text(v1 / "memory.usage_in_bytes", "700000\n");
    write_text(v1 / "memory.stat", "inactive_file 1\ntotal_inactive_file 100000\ntotal_active_file 50000\n");
    EXPECT_EQ(left_in_group({v1, true}), 450000u);
    EXPECT_EQ(left_in_group({v1, false}), UINT64_MAX);
    write_text(v2 / "memory.max", "1000000\n");
    write_text(v2 / "memory.current", "700000\n");
    write_text(v2 / "memory.stat", "anon 550000\ninactive_file 100000\nactive_file 50000\n");
    EXPECT_EQ(left_in_group({v2, false}), 450000u);
    write_text(v2 / "memory.current", "1300000\n");
    EXPECT_EQ(left_in_group({v2, false}), 0u);
    write_text(v2 / "memory.max", "max\n");
    EXPECT_EQ(left_in_group({v2, false}), UINT64_MAX);
}
TEST(Memory, WeightsGetWhatTheSessionAndOtherProgramsLeave) {
    EXPECT_EQ((MemoryPlan{0, 300, 100, 1000}.left_for_weights()), 500u);
    EXPECT_EQ((MemoryPlan{0, 850, 100, 1000}.left_for_weights()), 0u);
    EXPECT_EQ((MemoryPlan{0, 300, 100, 0}.left_for_weights()), 0u);   // the system does not say
}
TEST(Memory, SomeIsAvailable) {
    EXPECT_GT(available_memory(), 0u);
    EXPECT_LE(available_memory(), system_number("/proc/meminfo", "MemTotal:").value() * 1024);
}

TEST(Processors, AreOneOrMore) { EXPECT_GE(processors(), 1); }
TEST(Processors, AControlGroupGivesItsQuotaRoundedDown) {
    fs::path v1 = scratch("cpu_v1"), v2 = scratch("cpu_v2");
    int no_limit = std::numeric_limits<int>::max();
    EXPECT_EQ(processors_of_group({v1, true}), no_limit);
    EXPECT_EQ(processors_of_group({v2, false}), no_limit);
    const std::pair<const char*, int> quotas[] = {{"250000", 2}, {"100000", 1}, {"99999", 1}, {"1000", 1},
                                                  {"399999", 3}, {"-1", no_limit}};
    write_text(v1 / "cpu.cfs_period_us", "100000\n");
    for (auto [quota, n] : quotas) {
        write_text(v1 / "cpu.cfs_quota_us", std::string(quota) + "\n");
        EXPECT_EQ(processors_of_group({v1, true}), n) << quota;
        if (n == no_limit) continue;
        write_text(v2 / "cpu.max", std::string(quota) + " 100000\n");
        EXPECT_EQ(processors_of_group({v2, false}), n) << quota;
    }
    write_text(v2 / "cpu.max", "max 100000\n");
    EXPECT_EQ(processors_of_group({v2, false}), no_limit);
}

// -- 19.3, 19.4 a device with memory of its own -----------------------------------------------------

static int uploads = 0;
static Device far_device(uint64_t (*available)()) {
    Device d = CPU;
    d.name = "far", d.available = available;
    d.upload = [](Model&, const std::function<void(size_t, size_t)>&) { uploads++; };
    return d;
}

// All bytes of the file count: each tensor is e4m3 with scales or bf16, but vectors, which are widened.
TEST(WeightBytes, AreThoseOfTheFileWhereTheyAreCopied) {
    Device far = far_device([] { return uint64_t(0); });
    for (auto [keys, dtype] : {std::pair{tiny_fp8(), "F8_E4M3"}, std::pair{tiny_v3(), "BF16"}}) {
        std::vector<FileTensor> tensors = random_tensors(keys, dtype, 1);
        uint64_t bytes = 0;
        for (const FileTensor& t : tensors)
            bytes += t.shape.size() == 1 ? t.shape[0] * sizeof(real) : t.data.size();
        fs::path folder = write_model("far", keys, tensors);
        Config c = config_of(keys);
        EXPECT_EQ(weight_bytes(folder, c, "none", far), bytes) << dtype;
        EXPECT_EQ(weight_bytes(folder, c, "none", CPU), 0u);
        EXPECT_GT(weight_bytes(folder, c, "q8_0", CPU), 0u);
    }
}
TEST(LoadPlanned, FillsADeviceOrSaysWhatIsMissing) {
    Device large = far_device([] { return uint64_t(1) << 40; });
    Device small = far_device([] { return uint64_t(1000); });
    fs::path folder = write_model("far", tiny_v3(), random_tensors(tiny_v3(), "BF16", 1));
    Config c = config_of(tiny_v3());
    SessionOptions s{10, 8, MlaForm::ABSORBED};
    EXPECT_TRUE(refuses([&] { load_planned(folder, "none", c, s, small); },
                        "not enough memory on far for --ctx 10: weights 0.00 GB, cache"));
    EXPECT_EQ(uploads, 0);
    load_planned(folder, "none", c, s, CPU);
    EXPECT_EQ(uploads, 0);
    load_planned(folder, "none", c, s, large);
    EXPECT_EQ(uploads, 1);
}
