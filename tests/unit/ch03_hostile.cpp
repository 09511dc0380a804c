// What hostile files and full machines do to chapters 1 and 3, where the command line cannot show it; the
// rest is in tests/hostile.
#include "unit.h"

TEST(ParallelFor, CarriesAnExceptionOut) {
    for (int threads : {1, 3}) {
        ScopedThreads scope(threads);
        auto body = [](int64_t i) { if (i % 7 == 3) throw std::bad_alloc(); };
        EXPECT_THROW(parallel_for(100, body), std::bad_alloc) << threads;
    }
}

TEST(AtomicFile, LeavesNothingWhenItCannotBeRenamed) {
    fs::path folder = scratch("rename");
    {
        AtomicFile file((folder / "f").string());
        file.write("abc", 3);
        fs::create_directory(folder / "f");               // in the meantime
        EXPECT_TRUE(refuses([&] { file.commit(); }, (folder / "f").string()));
    }
    for (const auto& entry : fs::directory_iterator(folder)) EXPECT_EQ(entry.path().filename(), "f");
}

TEST(AtomicFile, DoesNotFollowALinkInATemporaryName) {
    fs::path folder = scratch("planted");
    write_text(folder / "victim", "precious");
    fs::create_symlink("victim", folder / "f.a1B2c3.tmp");
    { AtomicFile((folder / "f").string()).write("abc", 3); }
    EXPECT_EQ(read_file(folder / "victim"), "precious");
    EXPECT_TRUE(fs::is_symlink(folder / "f.a1B2c3.tmp"));
}

TEST(AtomicFile, DoesNotReplaceADevice) {
    fs::path link = scratch("device") / "link";           // a failure must not cost the machine its device
    fs::create_symlink("/dev/null", link);
    EXPECT_TRUE(refuses([&] { AtomicFile(link.string()); }, "link: not a regular file"));
}

TEST(Fields, RefuseAKeyWithNul) {
    Document document(R"({"a\u0000b": 1})", "f");
    EXPECT_TRUE(refuses([&] { Fields(document.root, "f"); }, "NUL"));
}

// A vector of weights is read whole when it is bound, so damage in it shows at once.
TEST(Binder, RefusesAVectorThatIsNotFinite) {
    Checkpoint checkpoint;
    float values[2] = {1, std::numeric_limits<float>::infinity()};
    checkpoint.tensors["x"] = {"file", "F32", {2}, reinterpret_cast<const std::byte*>(values), sizeof values};
    Binder binder(&checkpoint, "folder", false);
    EXPECT_TRUE(refuses([&] { binder.vector("x", 2); }, "file: tensor 'x'"));
}
