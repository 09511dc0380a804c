// ranks.h: processes that compute together, on one machine or on several, through MPI. A build without MPI,
// or a program that mpirun did not start, is one rank of one.
//
// What is asked of MPI is little: bytes to every rank and bytes from every rank, as chapter 15's Wire has it.
// What takes the lines is the rest of the story: a rank may die, stop, or be slow, and MPI alone would wait
// for it for ever. So each rank tells the others once a second that it is alive, and every wait has an end,
// at which the rank is named that was waited for.
//
// Contents: 1 a wire and rows on it; 2 who takes part; 3 who is alive; 4 exchange; 5 the same everywhere;
//           6 the end.
//
// Needs chapters 1 to 5 and 14.2 of deepseek.cpp, and system.h.
#pragma once

// -- 1  a wire and rows on it --------------------------------------------------------------------

using Parcel = std::vector<std::byte>;
using Parcels = std::vector<Parcel>;      // (R): for each rank, or from each

// How ranks reach each other. All call `exchange` together, each with a parcel for every rank, and get what
// every rank had for them. `patient`: somebody may be thinking, and no wait is too long.
class Wire {
public:
    virtual ~Wire() = default;
    int rank = 0, size = 1;
    virtual void exchange(const Parcels& out, Parcels& in, bool patient = false) = 0;
};

// Bytes that left a rank: to another machine, and to another rank of its own.
struct Traffic {
    uint64_t slow = 0, fast = 0;

    void count(const Parcels& out, int rank, int per_node) {
        for (int r = 0; r < int(out.size()); r++)
            if (r != rank) (r / per_node == rank / per_node ? fast : slow) += out[size_t(r)].size();
    }
};

inline void append(Parcel& to, const std::byte* from, size_t n) { to.insert(to.end(), from, from + n); }
template <class T> void put(Parcel& to, const T& value) {
    append(to, reinterpret_cast<const std::byte*>(&value), sizeof value);
}
// f(p) for each of the packets of `size` bytes in a parcel.
template <class F> void each_packet(const Parcel& parcel, size_t size, const F& f) {
    CHECK(parcel.size() % size == 0, "%zu bytes are no packets of %zu", parcel.size(), size);
    for (const std::byte* p = parcel.data(); p < parcel.data() + parcel.size(); p += size) f(p);
}

// A row of D numbers on a wire: REAL, BF16, or F8_E4M3 with a scale for each 128 numbers, as DeepEP makes
// them (14.1).
inline size_t encoded_bytes(Dtype dtype, int D) {
    return row_bytes(dtype, D) + (dtype == Dtype::F8_E4M3 ? 4 * size_t(scale_blocks(D)) : 0);
}
inline void encode(Parcel& to, const real* x, int D, Dtype dtype) {
    to.resize(to.size() + encoded_bytes(dtype, D));
    std::byte* row = to.data() + to.size() - encoded_bytes(dtype, D);
    if (dtype != Dtype::F8_E4M3) return store_row(row, x, D, dtype);
    std::vector<float> scale(size_t(scale_blocks(D)));
    quantise_fp8(reinterpret_cast<uint8_t*>(row), scale.data(), {x, D}, 1, D, {Fp8Formula::DEEPEP});
    std::memcpy(row + D, scale.data(), 4 * scale.size());
}
inline void decode(real* x, const std::byte* from, int D, Dtype dtype) {
    kernels.widen(x, {from, dtype == Dtype::F8_E4M3 ? from + D : nullptr, dtype, 1, D}, 0);
}

// Ranks as threads of this process. One that throws ends the others.
class ThreadWire : public Wire {
public:
    struct Table {
        explicit Table(int R) : barrier(R), posted(size_t(R)) {}
        std::barrier<> barrier;
        std::vector<const Parcels*> posted;              // (R)
        std::atomic<bool> failed = false;
    };
    ThreadWire(Table& table, int r) : table_(table) { rank = r, size = int(table.posted.size()); }

    void exchange(const Parcels& out, Parcels& in, bool) override {
        table_.posted[size_t(rank)] = &out;
        table_.barrier.arrive_and_wait();
        if (table_.failed) throw Interrupted();
        in.resize(size_t(size));
        for (size_t r = 0; r < in.size(); r++) in[r] = (*table_.posted[r])[size_t(rank)];
        table_.barrier.arrive_and_wait();
    }

private:
    Table& table_;
};

// body(wire) for each of R ranks, at the same time; their loops run on their own threads.
inline void on_ranks(int R, const std::function<void(Wire&)>& body) {
    ThreadWire::Table table(R);
    std::exception_ptr error;
    std::mutex mutex;
    std::vector<std::thread> threads;
    for (int r = 0; r < R; r++) {
        threads.emplace_back([&, r] {
            ThreadWire wire(table, r);
            in_loop = true;
            try {
                body(wire);
            } catch (...) {
                std::lock_guard lock(mutex);
                if (!table.failed.exchange(true)) error = std::current_exception();
            }
            table.barrier.arrive_and_drop();
        });
    }
    for (std::thread& t : threads) t.join();
    if (error) std::rethrow_exception(error);
}

// -- 2  who takes part ---------------------------------------------------------------------------

struct LostRank : UserError { using UserError::UserError; };

// Where a rank runs. `space`: numbers of processes mean the same in it.
struct Place {
    char host[64];
    uint64_t space;
    int process;

    static Place here() {
        Place p{};
        gethostname(p.host, sizeof p.host - 1);
        struct stat file {};
        if (stat("/proc/self/ns/pid", &file) == 0) p.space = file.st_ino;
        p.process = getpid();
        return p;
    }
    bool beside(const Place& p) const { return !std::strcmp(host, p.host) && space == p.space; }
    bool gone() const { return kill(process, 0) < 0 && errno == ESRCH; }   // of a place beside this one
};

// What mpirun, or another launcher, tells a process that it starts.
inline bool launched() {
    for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMI_RANK", "PMIX_RANK"})
        if (std::getenv(name)) return true;
    return false;
}

// The ranks of this run.
class World : public Wire {
public:
    World() = default;
    World(const World&) = delete;
    double timeout = 60;                                 // seconds
    std::atomic<bool> blamed = false;                    // it is said, or being said, whose fault the end is
    std::vector<Place> places{Place::here()};            // (size)

    bool beside(int r) const { return places[size_t(r)].beside(places[size_t(rank)]); }
    // Ranks on this machine, this one among them.
    int local() const {
        int n = 0;
        for (int r = 0; r < size; r++) n += beside(r);
        return n;
    }
    // Of so many processors that this process may use: what the ranks beside it leave, if they share them.
    int share_of(int n) const { return n < int(sysconf(_SC_NPROCESSORS_ONLN)) ? n : n / local(); }
    // Starts MPI where a launcher has started this program.
    void join();
    // Fails, on every rank, where `value` is not what rank 0 has.
    void require_same(const char* what, uint64_t value);
    // Of each item what the one rank has that has it; the others have zeros.
    template <class T> void collect(std::vector<T>& items) {
        Parcel mine(items.size() * sizeof(T));
        std::memcpy(mine.data(), items.data(), mine.size());
        Parcels out(size_t(size), mine), in;
        exchange(out, in, true);
        for (size_t i = 0; i < mine.size(); i++)
            for (int r = 0; r < size; r++)
                if (r != rank) reinterpret_cast<std::byte*>(items.data())[i] |= in[size_t(r)].at(i);
    }
    // The others are told that this rank ends for a reason that it has said; all end. Does not return.
    [[noreturn]] void abandon(int code);
    // All ranks have done their work.
    void finish();
    void exchange(const Parcels& out, Parcels& in, bool patient) override;

private:
    struct Transfer;
    std::string name(int r) const {
        return text_of("rank %d (process %d on %s)", r, places[size_t(r)].process, places[size_t(r)].host);
    }
    [[noreturn]] void blame(int r, const std::string& what);
    void look(const std::vector<char>& missing, double since, bool patient);
};
inline World world;

#ifndef DEEPSEEK_MPI

inline void World::join() {
    const char* size = std::getenv("OMPI_COMM_WORLD_SIZE");
    if (!size) size = std::getenv("PMI_SIZE");
    if (size && std::atoi(size) > 1)
        fail("started as one of %s ranks, but this build has no MPI (no mpicc when it was made)", size);
}
inline void World::exchange(const Parcels& out, Parcels& in, bool) { in = out; }
inline void World::require_same(const char*, uint64_t) {}
inline void World::abandon(int code) { std::exit(code); }
inline void World::finish() {}

#else

#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>

// -- 3  who is alive -----------------------------------------------------------------------------

// A thread that says once a second that this rank is alive, and hears who else is. It and the main thread
// call MPI in turn.
struct Alive {
    enum Word : char { HERE, ENDING };
    std::mutex turn;
    std::atomic<int> waiting = 0;                        // for its turn: who polls gives way
    MPI_Comm data = MPI_COMM_NULL, words = MPI_COMM_NULL;
    std::vector<std::atomic<double>> heard;              // (R): when
    std::atomic<int> ending = -1;                        // a rank that has said why it ends
    std::atomic<bool> over = false;
    std::thread thread;

    static void check(int code, const char* what) { if (code != MPI_SUCCESS) fail("MPI: %s failed", what); }

    std::unique_lock<std::mutex> my_turn() {
        waiting = 1;
        std::unique_lock lock(turn);
        waiting = 0;
        return lock;
    }
    void hear() {
        const auto lock = my_turn();
        for (;;) {
            int there = 0;
            MPI_Status status;
            check(MPI_Iprobe(MPI_ANY_SOURCE, 0, words, &there, &status), "a probe");
            if (!there) return;
            char word = HERE;
            MPI_Recv(&word, 1, MPI_CHAR, status.MPI_SOURCE, 0, words, MPI_STATUS_IGNORE);
            heard[size_t(status.MPI_SOURCE)] = seconds();
            if (word == ENDING) ending = status.MPI_SOURCE;
        }
    }
    // One letter to each, which MPI keeps until it is fetched: no wait.
    void say(const World& w, Word word) {
        static const char letters[] = {HERE, ENDING};
        const auto lock = my_turn();
        for (int r = 0; r < w.size; r++) {
            MPI_Request request;
            if (r == w.rank) continue;
            MPI_Isend(letters + word, 1, MPI_CHAR, r, 0, words, &request);
            MPI_Request_free(&request);
        }
    }
    void end() {
        over = true;
        if (thread.joinable()) thread.join();
    }
    void live(const World& w) {
        for (double said = 0; !over;) {
            if (seconds() - said > std::min(1.0, w.timeout / 8)) say(w, HERE), said = seconds();
            hear();
            usleep(30000);
        }
    }
};
inline Alive alive;

// From a signal: whose death it was, if one beside this rank is gone. Of those that live the first says it.
inline std::vector<std::string> obituaries;              // (R)
inline void name_the_dead() {
    const auto dead = [](int r) { return world.beside(r) && world.places[size_t(r)].gone(); };
    int first = 0;
    if (world.blamed.exchange(true) || alive.ending >= 0) return;
    while (first < world.rank && dead(first)) first++;
    for (int r = 0; first == world.rank && r < world.size; r++)
        if (dead(r)) return Terminal::put(STDERR_FILENO, obituaries[size_t(r)].c_str());
}

inline void World::join() {
    if (!launched()) return;
    relayed = true;
    int level = 0;
    if (MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &level) != MPI_SUCCESS)
        fail("MPI could not be started");
    MPI_Comm_rank(MPI_COMM_WORLD, &rank), MPI_Comm_size(MPI_COMM_WORLD, &size);
    if (size == 1) return;
    if (level < MPI_THREAD_SERIALIZED) fail("this MPI lets only one thread call it");
    MPI_Comm_dup(MPI_COMM_WORLD, &alive.data), MPI_Comm_dup(MPI_COMM_WORLD, &alive.words);
    for (MPI_Comm comm : {alive.data, alive.words}) MPI_Comm_set_errhandler(comm, MPI_ERRORS_RETURN);
    const Place here = places[0];
    places.resize(size_t(size));
    MPI_Allgather(&here, sizeof here, MPI_BYTE, places.data(), sizeof here, MPI_BYTE, alive.data);
    alive.heard = std::vector<std::atomic<double>>(size_t(size));
    for (auto& when : alive.heard) when = seconds();
    for (int r = 0; r < size; r++) obituaries.push_back("deepseek: " + name(r) + " has died\n");
    sigset_t all, before;                                // signals are the main thread's
    sigfillset(&all), pthread_sigmask(SIG_BLOCK, &all, &before);
    alive.thread = std::thread([this] { alive.live(*this); });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    farewell = name_the_dead;
}

// -- 4  exchange ---------------------------------------------------------------------------------

inline void World::blame(int r, const std::string& what) {
    if (blamed.exchange(true)) for (;;) pause();         // a signal has said it, and ends us
    throw LostRank(name(r) + " " + what);
}

// Fails where one of those that are waited for is dead or silent, or, unless we are patient, slow. All within
// four fifths of the time that the user gives: the rest is for the end.
inline void World::look(const std::vector<char>& missing, double since, bool patient) {
    const double now = seconds(), limit = 0.8 * timeout;
    if (interrupted) throw Interrupted();
    if (alive.ending >= 0) {
        usleep(2000000);                                 // mpirun ends us by then
        blamed = true;
        throw LostRank(name(alive.ending) + " has ended");
    }
    for (int r = 0; r < size; r++) {
        if (r != rank && beside(r) && places[size_t(r)].gone()) blame(r, "has died");
        if (r != rank && now - alive.heard[size_t(r)] > limit)
            blame(r, text_of("has been silent for %.0f s: dead, stopped or out of reach (--timeout)", limit));
    }
    for (int r = 0; r < size; r++)
        if (missing[size_t(r)] && !patient && now - since > limit)
            blame(r, text_of("is slow: nothing came for %.0f s (--timeout)", limit));
}

// What is on its way in one exchange. One message goes to each other rank, an empty one where there is
// nothing to say, so that nobody need be told sizes before.
struct World::Transfer {
    const World& w;
    const Parcels& out;
    Parcels& in;
    std::vector<MPI_Request> sends, receives;
    std::vector<char> missing;                           // (R)

    Transfer(const World& w, const Parcels& out, Parcels& in)
        : w(w), out(out), in(in), missing(size_t(w.size), 1) {
        std::lock_guard lock(alive.turn);
        receives.assign(size_t(w.size), MPI_REQUEST_NULL), missing[size_t(w.rank)] = 0;
        for (int i = 1; i < w.size; i++) {               // each begins with its neighbour
            const int r = (w.rank + i) % w.size;
            const auto& bytes = out[size_t(r)];
            CHECK(bytes.size() <= size_t(MOST), "%zu bytes for rank %d", bytes.size(), r);
            Alive::check(MPI_Isend(bytes.data(), int(bytes.size()), MPI_BYTE, r, 0, alive.data,
                                   &sends.emplace_back()), "a send");
        }
    }
    // Fetches what has come; whether all is done.
    bool poll() {
        std::lock_guard lock(alive.turn);
        bool all = true;
        for (int r = 0; r < w.size; r++) {
            if (!missing[size_t(r)]) continue;
            int there = 0, n = 0;
            MPI_Message message;
            MPI_Status status;
            Alive::check(MPI_Improbe(r, 0, alive.data, &there, &message, &status), "a probe");
            all &= there != 0;
            if (!there) continue;
            MPI_Get_count(&status, MPI_BYTE, &n);
            in[size_t(r)].resize(size_t(n)), missing[size_t(r)] = 0;
            MPI_Imrecv(in[size_t(r)].data(), n, MPI_BYTE, &message, &receives[size_t(r)]);
        }
        int sent = 0, received = 0;
        MPI_Testall(int(sends.size()), sends.data(), &sent, MPI_STATUSES_IGNORE);
        MPI_Testall(w.size, receives.data(), &received, MPI_STATUSES_IGNORE);
        return all && sent && received;
    }
};

inline void World::exchange(const Parcels& out, Parcels& in, bool patient) {
    in.resize(size_t(size));
    in[size_t(rank)] = out[size_t(rank)];
    if (size == 1) return;
    if (alive.over) throw LostRank("interrupted while they talked, the ranks cannot go on together");
    Transfer transfer(*this, out, in);
    const double begin = seconds();
    double looked = begin;
    try {
        for (int64_t polls = 0; !transfer.poll(); polls++) {
            if (polls < 2000 && !alive.waiting) sched_yield();
            else usleep(patient && polls > 4000 ? 1000 : 20);
            if (seconds() - looked > 0.02) looked = seconds(), look(transfer.missing, begin, patient);
        }
    } catch (...) {
        alive.end();                                     // MPI must not go on with what `out` held
        throw;
    }
}

// -- 5  the same everywhere ----------------------------------------------------------------------

inline void World::require_same(const char* what, uint64_t value) {
    const auto* bytes = reinterpret_cast<const std::byte*>(&value);
    Parcels out(size_t(size), std::vector<std::byte>(bytes, bytes + sizeof value)), in;
    exchange(out, in, false);
    for (int r = 0; r < size; r++)
        if (in[size_t(r)] != in[0])
            blamed = true, fail("%s has another %s than rank 0", name(r).c_str(), what);
}

// -- 6  the end ----------------------------------------------------------------------------------

inline void World::abandon(int code) {
    blamed = true;
    if (!alive.over && alive.ending < 0) alive.say(*this, Alive::ENDING), usleep(200000);
    alive.end(), remove_unfinished();
    MPI_Abort(MPI_COMM_WORLD, code);
    std::_Exit(code);
}

inline void World::finish() {
    int running = 0;
    if (!launched() || MPI_Initialized(&running) != MPI_SUCCESS || !running) return;
    if (size > 1) {
        Parcels none{size_t(size)}, in;
        exchange(none, in, true);                            // so that nobody is missed by who still looks
        alive.end();
        farewell = nullptr;
    }
    MPI_Finalize();
}
#endif
