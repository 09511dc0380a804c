// The fibers, the scheduler, the memory and the run time behind cuda_emulator.h.
//
//   1  Switching               from a fiber to the scheduler and back
//   2  What is under way       devices, streams, grids, blocks, warps, fibers
//   3  Errors                  where they are, and how a run that has one ends
//   4  Memory                  allocations that end at a guarded page
//   5  Collectives, barriers   who waits for whom
//   6  Shared memory           who touched what since the last barrier; cp.async
//   7  Matrices                ldmatrix, mma.sync
//   8  The scheduler           which fiber is next; deadlock
//   9  The run time            cudaMalloc and the other functions
#include "cuda_emulator.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <iterator>
#include <map>
#include <memory>
#include <set>
#include <string_view>
#include <utility>
#include <vector>

#include <csignal>
#include <cxxabi.h>
#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>
#if !defined(__x86_64__)
#define EMULATOR_UCONTEXT                  // or where it is asked for, to test it
#endif
#if defined(EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif
#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATOR_ASAN
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define EMULATOR_ASAN
#endif
#if defined(EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace emulator {

// -- 1  Switching --------------------------------------------------------------------------------
//
// By hand where we know how: swapcontext asks the system to save a signal mask, and takes ten times as long.

constexpr size_t PAGE = 4096;
#if defined(EMULATOR_ASAN)
constexpr size_t STACK = 64 * PAGE;        // its frames are larger
#else
constexpr size_t STACK = 32 * PAGE;
#endif

#if !defined(EMULATOR_UCONTEXT)
using Context = void*;                     // the stack pointer; what a function must keep lies on the stack
extern "C" void emulator_switch(Context* from, Context to);
asm(R"(
.text
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch, .-emulator_switch
)");
static void switch_context(Context& from, const Context& to) { emulator_switch(&from, to); }
static void prepare_context(Context& context, std::byte* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + STACK) - 2;    // 16-aligned before the call that never was
    *top = reinterpret_cast<void*>(entry);
    context = top - 6;
}
#else
using Context = ucontext_t;
static void switch_context(Context& from, const Context& to) { swapcontext(&from, &to); }
static void prepare_context(Context& context, std::byte* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack, context.uc_stack.ss_size = STACK, context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}
#endif

// The address sanitizer wants to know on which stack it is. `fake` keeps what it has of the stack that is
// left; none: that stack is left for good.
struct Stack {
    const void* bottom = nullptr;
    size_t size = 0;
};
#if defined(EMULATOR_ASAN)
static void before_switch(void** fake, const Stack& to) {
    __sanitizer_start_switch_fiber(fake, to.bottom, to.size);
}
static void after_switch(void* fake, Stack* from) {
    __sanitizer_finish_switch_fiber(fake, from ? &from->bottom : nullptr, from ? &from->size : nullptr);
}
// What a function left there that never returned.
static void clean_stack(std::byte* stack, size_t size) { __asan_unpoison_memory_region(stack, size); }
static void forbid(std::byte* from, std::byte* until) {
    __asan_poison_memory_region(from, size_t(until - from));
}
static void permit(std::byte* from, std::byte* until) { clean_stack(from, size_t(until - from)); }
#else
static void before_switch(void**, const Stack&) {}
static void after_switch(void*, Stack*) {}
static void clean_stack(std::byte*, size_t) {}
static void forbid(std::byte*, std::byte*) {}
static void permit(std::byte*, std::byte*) {}
#endif

// -- 2  What is under way ------------------------------------------------------------------------

struct Block;

struct Copy {                              // a cp.async that no one waited for
    SharedArray* array;
    size_t offset;                         // in bytes
    const std::byte* from;
    size_t size, valid;                    // of which the first are copied, the others zero
    int group;                             // of its thread; -1: not committed
    bool done;
};

struct Fiber {
    enum class State : uint8_t { READY, WAITING, DONE };

    Context context;
    void* fake = nullptr;                  // see before_switch
    Index index;                           // of the thread
    Block* block = nullptr;
    std::byte* stack = nullptr;
    int thread = 0;                        // in the block
    State state = State::READY;
    const char* waits = nullptr;           // at what, for the list of a deadlock
    uint64_t detail = 0;                   // line of a barrier, mask of a collective
    uint64_t result = 0;                   // of a collective
    uint64_t priority = 0, ready_since = 0;
    std::vector<Copy> copies;
    int groups = 0;                        // of copies, committed

    int lane() const { return thread % 32; }
    int warp() const { return thread / 32; }
};

using Together = void (*)(void* const* lanes);

struct Collective {
    Kind kind;
    const char* name;
    Together all;
    uint32_t mask;
};
struct Gather : Collective {               // that not all lanes have reached
    uint32_t arrived = 0;
    std::array<uint64_t, 32> value;
    std::array<int, 32> source;

    explicit Gather(const Collective& c) : Collective(c) {}
};

struct Warp {
    std::vector<Gather> gathers;
    uint32_t lanes = 0, done = 0;
    uint32_t time = 0;                     // counts __syncwarp and arrivals at named barriers
    uint32_t all_met = 0;                  // when all lanes last met in one
    std::array<std::array<uint32_t, 32>, 32> met{};      // when two lanes did that not all took part in
    std::array<uint32_t, 32> clock{};      // what each warp did before lies behind a named barrier
    std::array<const void*, 32> rows;      // the addresses that its lanes gave the last ldmatrix
};

struct Grid {
    const void* kernel;
    std::function<void()> body;
    dim3 size, block;
    size_t shared;
    int device;
    size_t most;                           // shared memory of a block, all of it
    uint64_t next = 0, done = 0;           // blocks started, ended

    uint64_t blocks() const { return uint64_t(size.x) * size.y * size.z; }
};

struct NamedBarrier {
    int threads = 0, arrived = 0;          // expected; there
    uint32_t warps = 0, waiting = 0;       // that are there, of which these wait
    uint64_t generation = 0;
    std::array<uint32_t, 32> clock{};      // what they know together
};

struct Block {
    Grid* grid;
    uint3 index;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::array<NamedBarrier, 16> named;
    std::vector<std::unique_ptr<SharedArray>> arrays;
    size_t shared = 0;                     // bytes of the arrays that are not dynamic
    int arrived = 0, ended = 0, line = 0;  // at the barrier; threads that are done; where the barrier stands
    int votes = 0, counted = 0;            // of those at the barrier; of those at the last one
    uint64_t epoch = 0;                    // changes at each barrier
    uint64_t born = 0;                     // the first of them
};

struct Operation {                         // of a stream
    std::shared_ptr<Grid> grid;            // a launch, or
    std::function<void()> run;             // what is done at once,
    std::function<bool()> ready;           // not before this holds
    uint64_t number = 0;
};

}

struct CUgraph_st {
    std::vector<emulator::Operation> operations;
    bool relaxed = false, spoiled = false; // while it is captured: may memory be allocated; did a call fail
};
struct CUgraphExec_st : CUgraph_st {};
struct CUstream_st {
    int device = 0;
    bool is_default = false, waits = true; // does it and the default stream wait for each other
    std::deque<emulator::Operation> operations;
    std::shared_ptr<emulator::Grid> running;
    uint64_t number = 0;                   // of what runs
    std::unique_ptr<CUgraph_st> capture;
};
struct CUevent_st {
    uint64_t asked = 0, reached = 0;       // numbers of the operation that records it
    bool timed = true;
    std::chrono::steady_clock::time_point time;
};

namespace emulator {

struct Device {
    CUstream_st legacy;                    // the default stream, which the others wait for
    std::set<int> peers;                   // whose memory its kernels may touch
    int resident = 0;                      // blocks under way
    size_t used = 0;
};

struct World {
    Options options;
    uint64_t random = 1;
    std::vector<Device> devices;
    std::vector<std::unique_ptr<CUstream_st>> streams;
    std::vector<std::unique_ptr<CUevent_st>> events;
    std::vector<std::unique_ptr<Block>> blocks;          // under way
    std::deque<Fiber*> ready;
    std::vector<std::unique_ptr<SharedArray>> arrays;    // of blocks that have ended, for the next ones
    uint64_t epochs = 0;                   // of all blocks so far
    uint64_t numbers = 0;
    int device = 0;                        // that the host chose
    cudaError_t error = cudaSuccess;       // of the last call that failed
    cudaError_t broken = cudaSuccess;      // of a kernel: every call returns it from then on
    int launches = 0;                      // started
    std::map<std::pair<int, const void*>, size_t> raised;        // limits of dynamic shared memory
    std::string failure;                   // why the run has to end
    Fiber* running = nullptr;
    Context host;
    Stack host_stack;
    bool from_host = true;                 // the last switch
    bool changed = true;                   // something may start that could not before
    uint64_t spins = 0, switches = 0;
    size_t drains = 0;                     // how often the host waited
    pthread_t thread;                      // of the host, on which the fibers run
};
static World world;

static uint64_t random_number() {          // SplitMix64
    uint64_t z = (world.random += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// -- 3  Errors -----------------------------------------------------------------------------------

__attribute__((format(printf, 1, 2))) static std::string text_of(const char* format, ...) {
    char text[1024];
    va_list args;
    va_start(args, format);
    std::vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return text;
}

static std::string text_of(uint3 i) { return text_of("(%u, %u, %u)", i.x, i.y, i.z); }

// The program is linked with -rdynamic, so that kernels have names.
static std::string name_of(const void* kernel) {
    Dl_info info{};
    if (!dladdr(kernel, &info) || !info.dli_sname) return "a kernel";
    int status = 0;
    char* name = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
    std::string text = status == 0 ? name : info.dli_sname;
    std::free(name);
    return text.substr(0, text.find('('));
}

static std::string place_of(const Block& b) {
    std::string kernel = name_of(b.grid->kernel);
    return text_of("device %d, %s, block ", b.grid->device, kernel.c_str()) + text_of(b.index);
}

// To a test, which catches it; or out of a program, which might take an exception for one of its own.
[[noreturn]] static void say(const std::string& what) {
    if (world.options.throws) throw Error(what);
    std::fflush(nullptr);
    std::fprintf(stderr, "emulator: %s\n", what.c_str());
    _exit(3);
}

// Whatever stack the processor is on: from this fiber's there is no way back.
[[noreturn]] static void abandon() {
    Context nowhere;
    before_switch(nullptr, world.host_stack);
    switch_context(nowhere, world.host);
    std::abort();
}

// Ends the run: in a fiber by way of `drain`.
[[noreturn]] static void stop(const std::string& what) {
    if (!world.running) say(what);
    Fiber& f = *world.running;
    world.failure = place_of(*f.block) + ", thread " + text_of(f.index.thread) + ": " + what;
    abandon();
}

void trap() {
    if (!world.running) stop("__trap outside of a kernel");
    world.broken = cudaErrorLaunchFailure;
    abandon();
}

// -- 4  Memory -----------------------------------------------------------------------------------
//
// An allocation ends where a page ends, less what aligns it, and the next page cannot be touched. So an
// access beyond it is seen at once; a write to what remains of its first page, and to the few bytes between
// its end and the page's, after the kernels. While no kernel runs that may touch it, none of it can be
// touched: the host must copy. All that takes longer than most kernels where allocations are many; then it is
// not done every time.

constexpr int CLOSED = -1, ALL = -2;       // instead of a device: whose kernels run
constexpr unsigned char POISON = 0xFF;     // NaN as f32, bf16 and e4m3, -1 as an integer
constexpr size_t ALIGNMENT = 16;           // what a kernel loads at once at most

struct Allocation {
    std::byte *map, *data;                 // pages from `map` on: those of the numbers, then a guard
    size_t pages, bytes;
    int device;
    bool open = true, given_back = false;  // by a cudaFreeAsync that is not done yet

    std::byte* end() const { return data + bytes; }
    std::byte* guard() const { return map + pages * PAGE; }

    void protect(bool wanted) {
        if (wanted == open) return;
        open = wanted;
        mprotect(map, pages * PAGE, wanted ? PROT_READ | PROT_WRITE : PROT_NONE);
    }
};
static std::map<const void*, Allocation> allocations;            // by `data`
static std::map<const std::byte*, size_t> pinned;                // memory of the host: copied late
static int view = ALL;
struct GraphMemory;
static std::map<const void*, std::weak_ptr<GraphMemory>> graph_memory;       // by its address

static void open_memory(int device) {
    if (view == device && device != CLOSED) return;
    view = device;
    for (auto& [data, a] : allocations)
        a.protect(device == ALL || a.device == device ||
                  (device >= 0 && world.devices[size_t(device)].peers.count(a.device)));
}

static std::byte* allocate(size_t bytes, int device) {
    size_t pages = std::max<size_t>((bytes + PAGE - 1) / PAGE, 1);
    void* map = mmap(nullptr, (pages + 1) * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) return nullptr;
    auto* base = static_cast<std::byte*>(map);
    std::memset(map, POISON, pages * PAGE);
    mprotect(base + pages * PAGE, PAGE, PROT_NONE);
    std::byte* data = base + (pages * PAGE - bytes) / ALIGNMENT * ALIGNMENT;
    Allocation a{base, data, pages, bytes, device};
    a.protect(view == ALL || view == device);
    allocations.emplace(data, a);
    return data;
}

static void forget(std::map<const void*, Allocation>::iterator at) {
    world.devices[size_t(at->second.device)].used -= at->second.bytes;
    munmap(at->second.map, (at->second.pages + 1) * PAGE);
    allocations.erase(at);
}

// Is all of it poison? If not, it is afterwards: an error is said once.
static bool untouched(std::byte* begin, std::byte* end) {
    size_t n = size_t(end - begin);
    if (n == 0 || (*begin == std::byte(POISON) && !std::memcmp(begin, begin + 1, n - 1))) return true;
    std::memset(begin, POISON, n);
    return false;
}

// Empty, or which allocation was written to before its begin or behind its end.
static std::string damage() {
    for (auto& [data, a] : allocations) {
        a.protect(true);
        if (!untouched(a.map, a.data))
            return text_of("an access before the begin of an allocation of %zu bytes", a.bytes);
        if (!untouched(a.end(), a.guard()))
            return text_of("an access beyond the end of an allocation of %zu bytes", a.bytes);
    }
    return "";
}

static bool is_time_to_look() {
    constexpr size_t FEW = 32, AT_FIRST = 50, OFTEN = 8;
    return world.drains++ < AT_FIRST || allocations.size() < FEW ||
           world.drains % (allocations.size() / OFTEN) == 0;
}

// The allocation that holds `bytes` from p on, whole.
static const Allocation* holder(const void* p, size_t bytes) {
    auto at = allocations.upper_bound(p);
    if (at == allocations.begin()) return nullptr;
    const Allocation& a = std::prev(at)->second;
    const auto* q = static_cast<const std::byte*>(p);
    return q + bytes <= a.end() ? &a : nullptr;
}

static bool is_pinned(const void* p, size_t bytes) {
    const auto* q = static_cast<const std::byte*>(p);
    auto at = pinned.upper_bound(q);
    return at != pinned.begin() && q + bytes <= std::prev(at)->first + std::prev(at)->second;
}

static bool is_kernel();

static std::string describe_address(const void* p) {
    const auto* q = static_cast<const std::byte*>(p);
    for (auto& [data, a] : allocations) {
        if (q < a.map || q >= a.map + (a.pages + 1) * PAGE) continue;
        if (q >= a.end())
            return text_of("an access %zu bytes beyond an allocation of %zu bytes on device %d",
                           size_t(q - a.data) - a.bytes, a.bytes, a.device);
        return is_kernel() ? text_of("an access to memory of device %d without peer access", a.device)
                           : text_of("the host accesses memory of device %d", a.device);
    }
    const std::byte* stack = is_kernel() ? world.running->stack : nullptr;
    if (stack && q < stack && q >= stack - PAGE)
        return text_of("it needs more than %zu bytes of stack", STACK);
    std::string text = text_of("an access to address %p, which is no memory of a device", p);
    auto at = allocations.upper_bound(p);
    if (at == allocations.begin()) return text;
    const Allocation& below = std::prev(at)->second;
    return text + text_of(" (the nearest below it ends %zu bytes before)", size_t(q - below.end()));
}

static bool is_kernel() { return world.running && pthread_equal(world.thread, pthread_self()); }

static void on_fault(int signal, siginfo_t* info, void*) {
    if (is_kernel()) stop(describe_address(info->si_addr));
    if (!holder(info->si_addr, 1)) {       // none of our business
        std::signal(signal, SIG_DFL);
        return;
    }
    std::string line = "emulator: " + describe_address(info->si_addr) + "\n";
    _exit(write(STDERR_FILENO, line.data(), line.size()) > 0 ? 3 : 4);
}

static void on_timer(int signal) {         // a loop that waits for nothing we know
    static uint64_t before = 0;
    if (!pthread_equal(world.thread, pthread_self())) return void(pthread_kill(world.thread, signal));
    if (world.running && world.switches == before) stop("it has run for seconds without giving way");
    before = world.switches;
}

static std::byte signal_stack[16 * PAGE];

static void catch_signals() {
    stack_t other{};
    other.ss_sp = signal_stack, other.ss_size = sizeof signal_stack;
    sigaltstack(&other, nullptr);
    struct sigaction action {};
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    action.sa_sigaction = on_fault;
    sigaction(SIGSEGV, &action, nullptr);
    action.sa_flags = SA_ONSTACK | SA_NODEFER | SA_RESTART;
    action.sa_handler = on_timer;
    sigaction(SIGPROF, &action, nullptr);
}

static void set_timer(int period) {        // seconds of our processor's time
    itimerval timer{{period, 0}, {period, 0}};
    setitimer(ITIMER_PROF, &timer, nullptr);
}

// -- 5  Collectives, barriers --------------------------------------------------------------------

static void open_memory(int device);
static Fiber* choose();

// Where the running thread stands, for its accesses to shared memory.
static void stamp_running() {
    const Fiber& f = *world.running;
    uint64_t time = f.block->warps[size_t(f.warp())].time;
    now = {f.block->epoch << 32, f.block->epoch << 32 | time << 11 | 1024u | unsigned(f.thread)};
}

// The next one, which the processor is about to switch to.
static Fiber& next_fiber(bool from_host) {
    Fiber& f = *choose();
    open_memory(f.block->grid->device);
    world.running = &f, here = &f.index, world.switches++, world.from_host = from_host;
    stamp_running();
    return f;
}

// To another fiber, until someone makes this one ready; by way of the scheduler if it has something to do.
static void leave(Fiber& f) {
    bool done = f.state == Fiber::State::DONE;
    void** fake = done ? nullptr : &f.fake;
    if (world.ready.empty() || world.changed || (done && f.block->ended == int(f.block->fibers.size()))) {
        before_switch(fake, world.host_stack);
        switch_context(f.context, world.host);
    } else if (Fiber& next = next_fiber(false); &next != &f) {
        before_switch(fake, {next.stack, STACK});
        switch_context(f.context, next.context);
    } else {
        return;
    }
    after_switch(f.fake, nullptr);
}

static void wait_at(const char* what, uint64_t detail) {
    Fiber& f = *world.running;
    f.state = Fiber::State::WAITING, f.waits = what, f.detail = detail;
    leave(f);
}

// Of equals, as those are that have long waited in loops, who was ready first is next: none starves.
static bool less_urgent(const Fiber* a, const Fiber* b) {
    return std::pair(a->priority, b->ready_since) < std::pair(b->priority, a->ready_since);
}

static void make_ready(Fiber& f) {
    static uint64_t times = 0;
    f.state = Fiber::State::READY, f.ready_since = ++times;
    world.ready.push_back(&f);
    if (world.options.order == Order::PRIORITY)                  // then they are a heap
        std::push_heap(world.ready.begin(), world.ready.end(), less_urgent);
}

static void wake(Fiber& f) {
    if (f.state != Fiber::State::WAITING) return;
    make_ready(f);
    world.spins = 0;                       // something happens
}

int lane() { return world.running->lane(); }

static void do_some_copies(Fiber& f);

void give_way() {
    if (world.running) do_some_copies(*world.running);
    if (!world.running || world.options.order == Order::FIFO || random_number() % 4) return;
    make_ready(*world.running);
    leave(*world.running);
}

void spin() {
    constexpr uint64_t TOO_MANY = 1 << 20;
    Fiber& f = *world.running;
    if (++world.spins > TOO_MANY) stop("livelock: nothing happens any more, and this thread waits in a loop");
    f.priority /= 2, f.waits = "in a loop", f.detail = 0;
    world.changed = true;                  // others may have to start first
    make_ready(f);
    leave(f);
}

static const char* name_of(Kind kind) {
    constexpr const char* NAMES[] = {"__syncwarp", "__shfl_sync", "__ballot_sync", "__any_sync", "__all_sync",
                                     "__reduce_add_sync", "__reduce_min_sync", "__reduce_max_sync",
                                     "__reduce_and_sync", "__reduce_or_sync", "__reduce_xor_sync",
                                     "a collective of the warp"};
    return NAMES[size_t(kind)];
}

static uint64_t combined(Kind kind, uint64_t a, uint64_t b) {
    switch (kind) {
    case Kind::ADD: return a + b;
    case Kind::LEAST: return int64_t(a) < int64_t(b) ? a : b;
    case Kind::LARGEST: return int64_t(a) < int64_t(b) ? b : a;
    case Kind::ALL:
    case Kind::AND: return a & b;
    case Kind::XOR: return a ^ b;
    default: return a | b;                 // ballots are shifted to their lanes before
    }
}

static void tick(Warp& w) {
    if (++w.time >> 21) stop("more __syncwarp and named barriers in one block than can be counted");
}

// The lanes of mask have met.
static void meet(Warp& w, uint32_t mask) {
    tick(w);
    if (mask == w.lanes) return void(w.all_met = w.time);
    for (int l = 0; l < 32; l++)
        for (int m = 0; mask >> l & 1 && m < 32; m++)
            if (mask >> m & 1) w.met[size_t(l)][size_t(m)] = w.time;
}

// All have arrived: each gets its result.
static void complete(Block& b, Warp& w, int warp, const Gather& g) {
    uint64_t all = 0;
    bool first = true;
    if (g.kind == Kind::SYNC) meet(w, g.mask);
    if (g.kind == Kind::TOGETHER) {
        void* lanes[32];
        for (size_t l = 0; l < 32; l++) lanes[l] = from_bits<void*>(g.value[l]);
        g.all(lanes);
    }
    for (int l = 0; l < 32; l++) {
        if (!(g.mask >> l & 1)) continue;
        uint64_t mine = g.kind == Kind::BALLOT ? g.value[size_t(l)] << l : g.value[size_t(l)];
        all = first ? mine : combined(g.kind, all, mine);
        first = false;
    }
    for (int l = 0; l < 32; l++) {
        if (!(g.mask >> l & 1)) continue;
        Fiber& f = b.fibers[size_t(warp * 32 + l)];
        f.result = g.kind == Kind::SHUFFLE ? g.value[size_t(g.source[size_t(l)])] : all;
        wake(f);
    }
}

// The collective that this lane takes part in; a new one, or one that others wait in.
static Gather& join(Warp& w, const Collective& mine, int lane) {
    const char* name = mine.name;
    uint32_t mask = mine.mask;
    if (!(mask >> lane & 1)) stop(text_of("%s: mask %08x leaves out its own lane %d", name, mask, lane));
    if (mask & ~w.lanes) stop(text_of("%s: mask %08x names lanes that the block has not", name, mask));
    if (mask & w.done) stop(text_of("%s: mask %08x names lanes that have ended", name, mask));
    for (Gather& g : w.gathers) {
        if (g.mask == mask && g.kind == mine.kind && g.all == mine.all) return g;
        // Lanes that wait there wait for this one, which would wait for them.
        if (!(g.arrived & mask) || !(g.mask >> lane & 1)) continue;
        stop(text_of("%s with mask %08x, where others wait in %s with mask %08x", name, mask, g.name,
                     g.mask));
    }
    return w.gathers.emplace_back(mine);
}

static uint64_t gather(const Collective& mine, uint64_t value, int source) {
    if (!world.running) stop("a collective outside of a kernel");
    give_way();
    Fiber& f = *world.running;
    Warp& w = f.block->warps[size_t(f.warp())];
    Gather& g = join(w, mine, f.lane());
    g.value[size_t(f.lane())] = value, g.source[size_t(f.lane())] = source;
    g.arrived |= 1u << f.lane();
    if (g.arrived != g.mask) {
        wait_at(g.name, g.mask);
        return f.result;
    }
    Gather whole = g;
    w.gathers.erase(w.gathers.begin() + (&g - w.gathers.data()));
    complete(*f.block, w, f.warp(), whole);
    stamp_running();
    return f.result;
}

uint64_t collective(Kind kind, uint32_t mask, uint64_t value, int source) {
    if (kind == Kind::SHUFFLE && (source < 0 || source > 31 || !(mask >> source & 1)))
        stop(text_of("__shfl_sync: lane %d is not in mask %08x", source, mask));
    return gather({kind, name_of(kind), nullptr, mask}, value, source);
}

// What all lanes of a warp do at once: the last one to come calls all(what each of them passed).
static void together(const char* name, uint32_t mask, void* mine, Together all) {
    gather({Kind::TOGETHER, name, all, mask}, to_bits(mine), 0);
}

constexpr const char* BARRIERS[] = {
    "bar_sync<0>", "bar_sync<1>", "bar_sync<2>",  "bar_sync<3>",  "bar_sync<4>",  "bar_sync<5>",
    "bar_sync<6>", "bar_sync<7>", "bar_sync<8>",  "bar_sync<9>",  "bar_sync<10>", "bar_sync<11>",
    "bar_sync<12>", "bar_sync<13>", "bar_sync<14>", "bar_sync<15>"};

int barrier(int line, bool vote) {
    if (!world.running) stop("__syncthreads outside of a kernel");
    give_way();
    Fiber& f = *world.running;
    Block& b = *f.block;
    if (b.ended) stop(text_of("__syncthreads (line %d), where threads of the block have ended", line));
    if (b.named[0].arrived)
        stop(text_of("__syncthreads (line %d), where others wait at %s, which is the same", line,
                     BARRIERS[0]));
    if (b.arrived && b.line != line)
        stop(text_of("__syncthreads (line %d), where others wait at that of line %d", line, b.line));
    b.line = line, b.votes += vote;
    if (++b.arrived < int(b.fibers.size())) {
        wait_at("__syncthreads, line", uint64_t(line));
        return b.counted;
    }
    b.arrived = 0, b.epoch = ++world.epochs, b.counted = std::exchange(b.votes, 0);
    for (Fiber& other : b.fibers) wake(other);
    stamp_running();
    return b.counted;
}

// What a lane brings to a named barrier, and takes from it.
struct Arrival {
    int id, threads;
    bool waits;
    uint64_t generation = 0;               // of the barrier; when it has changed, this one is over
};

static void release(Block& b, NamedBarrier& named, int id) {
    for (size_t w = 0; w < b.warps.size(); w++) {
        Warp& warp = b.warps[w];
        if (named.waiting >> w & 1)
            for (size_t i = 0; i < 32; i++) warp.clock[i] = std::max(warp.clock[i], named.clock[i]);
    }
    for (Fiber& f : b.fibers)
        if (f.waits == BARRIERS[id]) wake(f);
    named = {0, 0, 0, 0, named.generation + 1, {}};
}

// A warp arrives. All its lanes are here: the instruction is the warp's.
static void arrive(void* const* lanes) {
    Fiber& f = *world.running;
    Block& b = *f.block;
    const size_t warp = size_t(f.warp());
    Warp& w = b.warps[warp];
    auto arrival = [&](int l) { return static_cast<Arrival*>(lanes[l]); };
    const Arrival mine = *arrival(f.lane());
    NamedBarrier& named = b.named[size_t(mine.id)];
    const char* name = BARRIERS[mine.id];
    for (int l = 0; l < 32; l++) {
        if (!(w.lanes >> l & 1)) continue;
        if (arrival(l)->id != mine.id || arrival(l)->threads != mine.threads)
            stop(text_of("%s, %d threads: another lane of its warp is at %s, %d threads", name, mine.threads,
                         BARRIERS[arrival(l)->id], arrival(l)->threads));
        arrival(l)->generation = named.generation;
    }
    if (mine.id == 0 && b.arrived)
        stop(text_of("%s, where others wait at __syncthreads (line %d), which is the same", name, b.line));
    if (named.arrived && named.threads != mine.threads)
        stop(text_of("%s, %d threads: others are there for %d threads", name, mine.threads, named.threads));
    if (named.warps >> warp & 1) stop(text_of("%s: its warp has arrived already", name));
    if (mine.waits) meet(w, w.lanes);
    else tick(w);
    for (size_t i = 0; i < 32; i++) named.clock[i] = std::max(named.clock[i], w.clock[i]);
    named.clock[warp] = w.time;
    named.threads = mine.threads, named.arrived += 32, named.warps |= 1u << warp;
    named.waiting |= uint32_t(mine.waits) << warp;
    if (named.arrived == named.threads) release(b, named, mine.id);
}

static void arrive_and_wait(void* const* lanes) { arrive(lanes); }

void named_barrier(int id, int threads, bool waits) {
    if (!world.running) stop("a named barrier outside of a kernel");
    Fiber& f = *world.running;
    int most = int(f.block->warps.size()) * 32;
    if (threads <= 0 || threads % 32 || threads > most)
        stop(text_of("%s: %d threads are no multiple of 32 up to the block's %d", BARRIERS[id], threads,
                     most));
    Arrival mine{id, threads, waits};
    uint32_t warp = f.block->warps[size_t(f.warp())].lanes;
    together(waits ? "bar_sync" : "bar_arrive", warp, &mine, waits ? arrive_and_wait : arrive);
    if (waits && f.block->named[size_t(id)].generation == mine.generation)
        wait_at(BARRIERS[id], uint64_t(threads));
}

// -- 6  Shared memory ----------------------------------------------------------------------------
//
// Two accesses of which one writes need something between them that orders them: a barrier, a named one at
// which both threads' warps arrive and the second one's waits, or, in a warp, a __syncwarp that both lanes
// take part in. Shuffles do not order memory. A cp.async is a write of the thread that waits for it, when it
// does.

static bool ordered(Stamp s, const Fiber& f) {
    if (settled(s)) return true;
    int thread = int(s & 1023);
    if (s >= IN_FLIGHT) return false;
    const Warp& w = f.block->warps[size_t(f.warp())];
    uint32_t time = uint32_t(s) >> 11;
    if (thread / 32 != f.warp()) return w.clock[size_t(thread / 32)] > time;
    return w.all_met > time || w.met[size_t(thread % 32)][size_t(f.lane())] > time;
}

constexpr size_t SHARED_ALIGNED = 128;     // as nvcc's SHARED does it
static std::byte* end_of(const SharedArray& a) {
    return a.data + (a.count * a.size / SHARED_ALIGNED + 1) * SHARED_ALIGNED;
}

SharedArray::SharedArray(const void* tag, const char* name, size_t count, size_t size)
    : tag(tag), name(name), count(count), size(size), data(nullptr) {
    data = static_cast<std::byte*>(std::aligned_alloc(SHARED_ALIGNED, size_t(end_of(*this) - data)));
    cells = static_cast<Cell*>(std::calloc(count + 1, sizeof(Cell)));
    if (!data || !cells) throw std::bad_alloc();
    forbid(data + count * size, end_of(*this));
}
SharedArray::~SharedArray() {
    permit(data + count * size, end_of(*this));
    std::free(data), std::free(cells);
}

constexpr size_t USUAL_SHARED = 48 * 1024; // of a block, unless cudaFuncSetAttribute allows more

// Stamps are never used again: an array of a block that ended before this one began needs new numbers, but
// not new cells.
static std::unique_ptr<SharedArray> take_array(const void* tag, size_t count, size_t bytes,
                                               const char* name) {
    const Stamp born = world.running->block->born << 32;
    auto fits = [&](auto& a) {
        return a->tag == tag && a->count == count && a->size == bytes && a->ended < born;
    };
    auto at = std::find_if(world.arrays.begin(), world.arrays.end(), fits);
    if (at == world.arrays.end()) return std::make_unique<SharedArray>(tag, name, count, bytes);
    std::unique_ptr<SharedArray> taken = std::move(*at);
    world.arrays.erase(at);
    return taken;
}

static SharedArray* find_array(const void* tag) {
    for (auto& a : world.running->block->arrays)
        if (a->tag == tag) return a.get();
    return nullptr;
}

static SharedArray* make_array(const void* tag, size_t count, size_t bytes, const char* name) {
    Block& b = *world.running->block;
    SharedArray* a = b.arrays.emplace_back(take_array(tag, count, bytes, name)).get();
    a->name = name, a->born = b.born << 32;
    std::memset(a->data, POISON, count * bytes);
    return a;
}

SharedArray* shared_array(const void* tag, size_t count, size_t bytes, const char* name) {
    if (SharedArray* known = find_array(tag)) return known;
    Block& b = *world.running->block;
    b.shared += count * bytes;
    if (b.shared > USUAL_SHARED || b.shared + b.grid->shared > b.grid->most)
        stop(text_of("with %s the block has %zu bytes in SHARED, and %zu in DYNAMIC_SHARED: too many", name,
                     b.shared, b.grid->shared));
    return make_array(tag, count, bytes, name);
}

SharedArray* dynamic_array(const void* tag, size_t from, size_t count, size_t bytes, const char* name) {
    if (SharedArray* known = find_array(tag)) return known;
    Block& b = *world.running->block;
    size_t all = b.grid->shared;
    if (from % std::min<size_t>(bytes & -bytes, 16))
        stop(text_of("DYNAMIC_PART %s: %zu is no multiple of its elements' size", name, from));
    if (count == WHOLE) count = all / bytes;
    if (from + count * bytes > all)
        stop(text_of("DYNAMIC_PART %s ends at byte %zu of %zu", name, from + count * bytes, all));
    for (auto& a : b.arrays)
        if (a->from < from + count * bytes && from < a->until)
            stop(text_of("DYNAMIC_PART %s lies where %s does", name, a->name));
    SharedArray* a = make_array(tag, count, bytes, name);
    a->from = from, a->until = from + count * bytes;
    return a;
}

void* address(SharedArray* a, int64_t i) {
    if (i < 0 || size_t(i) >= a->count)
        stop(text_of("shared array %s has %zu elements, not %jd", a->name, a->count, intmax_t(i)));
    return a->data + size_t(i) * a->size;
}

static void touch_bytes(SharedArray& a, size_t offset, size_t bytes, bool writes) {
    for (size_t i = uint32_t(offset) / uint32_t(a.size); i * a.size < offset + bytes; i++) {
        Cell& c = a.cells[i];
        if (!writes && c.write >= a.born && settled(c.write)) note_read(c);
        else touch(&a, int64_t(i), writes);
    }
}

void* touch_vector(SharedArray* a, int64_t i, size_t bytes, bool writes) {
    auto* p = static_cast<std::byte*>(address(a, i));
    size_t offset = size_t(p - a->data);
    if (offset % bytes)
        stop(text_of("shared array %s: element %jd is not aligned to %zu bytes", a->name, intmax_t(i),
                     bytes));
    address(a, i + int64_t(bytes / a->size) - 1);
    touch_bytes(*a, offset, bytes, writes);
    return p;
}

void* touch(SharedArray* a, int64_t i, bool writes) {
    void* p = address(a, i);
    Fiber& f = *world.running;
    Cell& cell = a->cells[i];
    auto accuse = [&](Stamp other, const char* what) {
        if (other >= IN_FLIGHT)
            stop(text_of("%s[%jd] is %s, and a cp_async of thread %d writes it, which no one waited for",
                         a->name, intmax_t(i), writes ? "written" : "read", int(other & 1023)));
        stop(text_of("race: %s[%jd] is %s thread %d %s, with no barrier in between", a->name, intmax_t(i),
                     writes ? "written, and" : "read, and", int(other & 1023), what));
    };
    if (!writes && cell.write < a->born)
        stop(text_of("%s[%jd] is read, and no one wrote it", a->name, intmax_t(i)));
    if (!ordered(cell.write, f)) accuse(cell.write, "wrote it");
    for (Stamp r : cell.read)
        if (writes && !ordered(r, f)) accuse(r, "read it");
    if (writes) note_write(cell);
    else note_read(cell);
    return p;
}

// The array that holds `bytes` from p on; where in it.
static SharedArray& array_at(const void* p, size_t bytes, const char* what, size_t& offset) {
    const auto* q = static_cast<const std::byte*>(p);
    for (auto& a : world.running->block->arrays) {
        if (q < a->data || q >= a->data + a->count * a->size) continue;
        offset = size_t(q - a->data);
        if (offset % bytes)
            stop(text_of("%s: %s + %zu bytes is not aligned to %zu", what, a->name, offset, bytes));
        if (offset + bytes > a->count * a->size)
            stop(text_of("%s: %zu bytes reach beyond the end of %s", what, bytes, a->name));
        return *a;
    }
    stop(text_of("%s: address %p is no shared memory of this block", what, p));
}

static void do_copy(Copy& c) {
    if (std::exchange(c.done, true)) return;
    if (c.valid) std::memcpy(c.array->data + c.offset, c.from, c.valid);
    std::memset(c.array->data + c.offset + c.valid, 0, c.size - c.valid);
}

static void do_some_copies(Fiber& f) {
    if (f.copies.empty() || world.options.async != Async::RANDOM) return;
    for (Copy& c : f.copies)
        if (random_number() % 4 == 0) do_copy(c);
}

static void needs(int capability, const char* what) {
    if (!world.running) stop(text_of("%s outside of a kernel", what));
    if (world.options.capability < capability)
        stop(text_of("%s needs compute capability %d.%d", what, capability / 10, capability % 10));
}

void async_copy(void* shared, const void* global, int size, int valid) {
    constexpr const char* NAME = "cp_async";
    needs(80, NAME);
    Fiber& f = *world.running;
    if (valid < 0 || valid > size) stop(text_of("cp_async: %d valid bytes of %d", valid, size));
    Copy c{nullptr, 0, static_cast<const std::byte*>(global), size_t(size), size_t(valid), -1, false};
    c.array = &array_at(shared, c.size, NAME, c.offset);
    if (reinterpret_cast<uintptr_t>(global) % c.size)
        stop(text_of("cp_async: address %p in global memory is not aligned to %zu", global, c.size));
    if (valid && !holder(global, c.valid)) stop(text_of("cp_async: %s", describe_address(global).c_str()));
    touch_bytes(*c.array, c.offset, c.size, true);
    for (size_t i = c.offset / c.array->size; i <= (c.offset + c.size - 1) / c.array->size; i++)
        c.array->cells[i].write = IN_FLIGHT | unsigned(f.thread);
    std::memset(c.array->data + c.offset, POISON, c.size);
    if (world.options.async == Async::EAGER) do_copy(c);
    f.copies.push_back(c);
    give_way();
}

void async_commit() {
    needs(80, "cp_async_commit");
    Fiber& f = *world.running;
    for (Copy& c : f.copies)
        if (c.group < 0) c.group = f.groups;
    f.groups++;
    give_way();
}

void async_wait(int groups) {
    needs(80, "cp_async_wait");
    Fiber& f = *world.running;
    give_way();
    auto over = [&](Copy& c) {
        if (groups >= 0 && (c.group < 0 || c.group >= f.groups - groups)) return false;
        do_copy(c);
        for (size_t i = c.offset / c.array->size; i <= (c.offset + c.size - 1) / c.array->size; i++)
            note_write(c.array->cells[i]);
        return true;
    };
    std::erase_if(f.copies, over);
}

// -- 7  Matrices ---------------------------------------------------------------------------------
//
// A warp holds a matrix in parts. A register has n = 1, 2 or 4 numbers. Those of lane 4 g + t are columns n t
// and following of row g (or g + 8) of A, and rows n t and following of column g of B; in the second half of
// the registers as much further on as half of k. Its sums are those of columns 2 t and 2 t + 1 of row g, then
// of row g + 8.

static Warp& running_warp() {
    const Fiber& f = *world.running;
    return f.block->warps[size_t(f.warp())];
}

// They stay as they are until all lanes have come to the next ldmatrix, and so are through with this one.
static void share_rows(void* const* rows) { std::copy(rows, rows + 32, running_warp().rows.begin()); }

template <class T> static uint32_t read_shared(const void* row, int i) {
    size_t offset = 0;
    const void* p = static_cast<const T*>(row) + i;
    SharedArray& a = array_at(p, sizeof(T), "ldmatrix", offset);
    touch_bytes(a, offset, sizeof(T), false);
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

void load_matrices(uint32_t* parts, int n, bool transposed, const void* row) {
    needs(75, "ldmatrix");
    Fiber& f = *world.running;
    size_t offset = 0;
    if (f.lane() < 8 * n) array_at(row, 16, "ldmatrix", offset);
    together("ldmatrix", ~0u, const_cast<void*>(row), share_rows);
    int g = f.lane() / 4, t = f.lane() % 4;
    for (int m = 0; m < n; m++) {
        const void* const* matrix = running_warp().rows.data() + 8 * m;
        if (transposed)
            parts[m] = read_shared<uint16_t>(matrix[2 * t], g) |
                       read_shared<uint16_t>(matrix[2 * t + 1], g) << 16;
        else
            parts[m] = read_shared<uint32_t>(matrix[g], t);
    }
}

// Number i of a register.
template <Number TYPE> static float decoded(uint32_t bits, int i) {
    if constexpr (TYPE == Number::TF32) return std::bit_cast<float>(bits & ~0x1FFFu);
    if constexpr (TYPE == Number::BF16) return std::bit_cast<float>(bits >> 16 * i << 16);
    if constexpr (TYPE == Number::S8) return int8_t(bits >> 8 * i);
    constexpr int SIZE = TYPE == Number::F16 ? 16 : 8, MANTISSA = TYPE == Number::F16 ? 10 : 3;
    constexpr int BIAS = TYPE == Number::F16 ? 15 : 7;
    // As an f32 with the same digits its exponent is too small, also where it is subnormal.
    uint32_t number = bits >> SIZE * i, digits = number & ((1u << (SIZE - 1)) - 1);
    float x = std::bit_cast<float>(digits << (23 - MANTISSA)) * std::ldexp(1.0f, 127 - BIAS);
    if (TYPE == Number::F16 && digits >= 0x7C00) x = digits == 0x7C00 ? INFINITY : NAN;
    if (TYPE == Number::E4M3 && digits == 0x7F) x = NAN;
    return number >> (SIZE - 1) & 1 ? -x : x;
}

template <Number TYPE> struct Product {
    static constexpr int PER = TYPE == Number::TF32 ? 1 : TYPE == Number::E4M3 || TYPE == Number::S8 ? 4 : 2;
    static constexpr int K = 8 * PER;
    float a[16][K], b[K][8];

    // Adds the products to the sums one by one, in the order of k.
    void add_to(float (&sums)[16][8]) const {
        for (int row = 0; row < 16; row++)
            for (int k = 0; k < K; k++)
                for (int column = 0; column < 8; column++) sums[row][column] += a[row][k] * b[k][column];
    }
    explicit Product(void* const* lanes) {
        for (int l = 0; l < 32; l++) {
            const Fragments& f = *static_cast<const Fragments*>(lanes[l]);
            int g = l / 4, t = l % 4 * PER;
            for (int i = 0; i < 4 * PER; i++) {
                int r = i / PER;
                a[g + 8 * (r % 2)][t + i % PER + K / 2 * (r / 2)] = decoded<TYPE>(f.a[r], i % PER);
                if (r < 2) b[t + i % PER + K / 2 * r][g] = decoded<TYPE>(f.b[r], i % PER);
            }
        }
    }
};

// Calls change(row, column, number of the sum) for each.
template <class T, class Change> static void each_sum(void* const* lanes, const Change& change) {
    for (int l = 0; l < 32; l++) {
        T* sum = static_cast<T*>(static_cast<const Fragments*>(lanes[l])->sum);
        for (int i = 0; i < 4; i++) change(l / 4 + i / 2 * 8, l % 4 * 2 + i % 2, sum[i]);
    }
}

// From the sum so far on, each step rounded to f32. A GPU adds several products at once, and cuts off what a
// shift moves out.
template <Number TYPE> static void multiply_floats(void* const* lanes) {
    float sums[16][8];
    each_sum<float>(lanes, [&](int row, int column, float& sum) { sums[row][column] = sum; });
    Product<TYPE>(lanes).add_to(sums);
    each_sum<float>(lanes, [&](int row, int column, float& sum) { sum = sums[row][column]; });
}

template <bool SATURATE> static void multiply_bytes(void* const* lanes) {
    float sums[16][8] = {};                // exact: below 2^20
    Product<Number::S8>(lanes).add_to(sums);
    each_sum<int>(lanes, [&](int row, int column, int& sum) {
        int64_t exact = int64_t(sum) + int(sums[row][column]);
        sum = SATURATE ? int(std::clamp<int64_t>(exact, INT32_MIN, INT32_MAX)) : int(uint32_t(exact));
    });
}

void multiply_matrices(Number type, const Fragments& f, bool saturate) {
    const char* name = "mma";
    needs(type == Number::E4M3 ? 89 : 80, type == Number::E4M3 ? "mma_e4m3" : name);
    Together all = nullptr;
    switch (type) {
    case Number::F16: name = "mma_f16", all = multiply_floats<Number::F16>; break;
    case Number::BF16: name = "mma_bf16", all = multiply_floats<Number::BF16>; break;
    case Number::TF32: name = "mma_tf32", all = multiply_floats<Number::TF32>; break;
    case Number::E4M3: name = "mma_e4m3", all = multiply_floats<Number::E4M3>; break;
    case Number::S8: name = "mma_s8", all = saturate ? multiply_bytes<true> : multiply_bytes<false>; break;
    }
    Fragments mine = f;
    together(name, ~0u, &mine, all);
}

// -- 8  The scheduler ----------------------------------------------------------------------------

static std::vector<std::byte*> free_stacks;

static std::byte* take_stack() {
    if (!free_stacks.empty()) {
        std::byte* stack = free_stacks.back();
        free_stacks.pop_back();
        clean_stack(stack, STACK);
        return stack;
    }
    void* map = mmap(nullptr, STACK + PAGE, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) throw Error("not enough memory for the stacks of a block");
    mprotect(map, PAGE, PROT_NONE);        // a stack grows down
    return static_cast<std::byte*>(map) + PAGE;
}

// What a fiber does: the kernel, then its end.
static void fiber_main() {
    Stack from;
    after_switch(nullptr, &from);
    if (world.from_host) world.host_stack = from;
    Fiber& f = *world.running;
    Block& b = *f.block;
    b.grid->body();
    Warp& w = b.warps[size_t(f.warp())];
    w.done |= 1u << f.lane();
    for (const Gather& g : w.gathers)
        if (g.mask >> f.lane() & 1)
            stop(text_of("it ends, while others wait for its lane %d in %s with mask %08x", f.lane(),
                         g.name, g.mask));
    if (!f.copies.empty()) stop("it ends, and there is a cp_async that it did not wait for");
    if (b.arrived)
        stop(text_of("it ends, while others wait for it at __syncthreads (line %d)", b.line));
    b.ended++;
    f.state = Fiber::State::DONE;
    leave(f);
    std::abort();
}

static uint3 position(uint64_t i, dim3 size) {
    return {unsigned(i % size.x), unsigned(i / size.x % size.y), unsigned(i / size.x / size.y)};
}

static void start_block(Grid& g) {
    uint64_t number = g.next++;
    if (world.options.order != Order::FIFO && world.options.seed % 2) number = g.blocks() - 1 - number;
    auto block = std::make_unique<Block>();
    int threads = int(g.block.x * g.block.y * g.block.z);
    block->grid = &g, block->index = position(number, g.size);
    block->epoch = block->born = ++world.epochs;
    block->fibers.resize(size_t(threads)), block->warps.resize(size_t(threads + 31) / 32);
    for (int i = 0; i < threads; i++) {
        Fiber& f = block->fibers[size_t(i)];
        f.thread = i, f.block = block.get(), f.stack = take_stack();
        f.index = {position(uint64_t(i), g.block), block->index, g.block, g.size};
        f.priority = i % 32 ? block->fibers[size_t(i - 1)].priority : random_number();
        block->warps[size_t(f.warp())].lanes |= 1u << f.lane();
        prepare_context(f.context, f.stack, fiber_main);
        make_ready(f);
    }
    world.devices[size_t(g.device)].resident++;
    world.blocks.push_back(std::move(block));
}

static void end_block(Block* b) {
    Grid& g = *b->grid;
    g.done++;
    world.devices[size_t(g.device)].resident--, world.spins = 0;
    for (Fiber& f : b->fibers) free_stacks.push_back(f.stack);
    for (auto& a : b->arrays) a->ended = b->epoch << 32;
    std::move(b->arrays.begin(), b->arrays.end(), std::back_inserter(world.arrays));
    std::erase_if(world.blocks, [b](auto& owned) { return owned.get() == b; });
    world.changed = true;
}

static std::vector<CUstream_st*> all_streams() {
    std::vector<CUstream_st*> all;
    for (Device& d : world.devices) all.push_back(&d.legacy);
    for (auto& s : world.streams) all.push_back(s.get());
    return all;
}

// May the first operation of s start? The default stream waits for what the others were asked before, and
// they for it.
static bool may_start(const CUstream_st& s) {
    if (s.running || s.operations.empty()) return false;
    const Operation& op = s.operations.front();
    if (op.ready && !op.ready()) return false;
    for (CUstream_st* other : all_streams()) {
        if (other == &s || other->device != s.device || other->is_default == s.is_default) continue;
        if (!s.waits || !other->waits) continue;
        if (other->running && other->number < op.number) return false;
        if (!other->operations.empty() && other->operations.front().number < op.number) return false;
    }
    return true;
}

static void start(CUstream_st& s) {
    Operation op = std::move(s.operations.front());
    s.operations.pop_front();
    if (op.grid && ++world.launches == world.options.fault) {
        world.broken = cudaErrorLaunchFailure;
        return;
    }
    if (op.grid) {
        s.running = op.grid, s.number = op.number;
        return;
    }
    open_memory(ALL);
    op.run();
}

// Starts operations and blocks; true if something happened.
static bool start_what_can() {
    bool happened = false;
    world.changed = false;
    std::vector<CUstream_st*> streams = all_streams();
    if (world.options.order != Order::FIFO)
        for (size_t i = streams.size(); i > 1; i--) std::swap(streams[i - 1], streams[random_number() % i]);
    for (bool more = true; more;) {
        more = false;
        for (CUstream_st* s : streams) {
            if (s->running && s->running->done == s->running->blocks()) s->running.reset(), more = true;
            if (may_start(*s)) start(*s), more = true;
            if (world.broken) return true;
        }
        happened |= more;
    }
    for (CUstream_st* s : streams) {
        Grid* g = s->running.get();
        while (g && g->next < g->blocks() && world.devices[size_t(g->device)].resident < world.options.blocks)
            start_block(*g), happened = true;
    }
    return happened;
}

static Fiber* choose() {
    std::deque<Fiber*>& ready = world.ready;
    if (world.options.order == Order::RANDOM)
        std::swap(ready[random_number() % ready.size()], ready.front());
    if (world.options.order == Order::PRIORITY) {
        std::pop_heap(ready.begin(), ready.end(), less_urgent);
        Fiber* most_urgent = ready.back();
        return ready.pop_back(), most_urgent;
    }
    Fiber* first = ready.front();
    return ready.pop_front(), first;
}

// Until a fiber comes back that leaves the scheduler something to do.
static void run_fibers() {
    Fiber& f = next_fiber(true);
    void* fake = nullptr;
    before_switch(&fake, {f.stack, STACK});
    switch_context(world.host, f.context);
    after_switch(fake, nullptr);
    Fiber& last = *std::exchange(world.running, nullptr);
    here = nullptr;
    if (!world.failure.empty() || world.broken) return;
    if (last.state == Fiber::State::DONE && last.block->ended == int(last.block->fibers.size()))
        end_block(last.block);
}

// A line for each warp and each thing that some of its lanes wait for.
static std::string waiting_list() {
    std::string text;
    for (auto& b : world.blocks) {
        std::map<std::tuple<int, std::string, uint64_t>, int> lanes;
        for (Fiber& f : b->fibers)
            if (f.state == Fiber::State::WAITING) lanes[{f.warp(), f.waits, f.detail}]++;
        for (auto& [key, n] : lanes) {
            auto& [warp, waits, detail] = key;
            const char* form = waits.starts_with("__syncthreads") ? "%s %ju"
                               : waits.starts_with("bar_sync<")   ? "%s, %ju threads"
                                                                  : "%s, mask %08jx";
            text += "\n  " + place_of(*b) + text_of(", warp %d: %d lanes at ", warp, n);
            text += text_of(form, waits.c_str(), uintmax_t(detail));
        }
    }
    return text;
}

static void forget_work() {
    for (auto& b : world.blocks)
        for (Fiber& f : b->fibers) free_stacks.push_back(f.stack);
    world.blocks.clear(), world.ready.clear();
    for (CUstream_st* s : all_streams()) s->operations.clear(), s->running.reset();
    for (Device& d : world.devices) d.resident = 0;
}

static void give_up() {
    clean_stack(signal_stack, sizeof signal_stack);              // its function may have stopped a fiber
    std::string failure = std::exchange(world.failure, "");
    forget_work();
    open_memory(CLOSED), set_timer(0);
    say(failure);
}

// Does all that streams were asked to do, or ends in the error of a kernel. Not `to_the_end`: stops, too,
// once nothing happens but that threads wait in loops, for what the host may ask for next.
static void drain(bool to_the_end = true) {
    constexpr uint64_t ENOUGH = 1 << 12;
    set_timer(2);
    world.spins = 0, world.thread = pthread_self();
    while (world.failure.empty() && !world.broken) {
        bool happened = world.changed && start_what_can();
        if (!world.ready.empty()) {
            run_fibers();
            if (!to_the_end && world.spins > ENOUGH) break;
            continue;
        }
        if (happened || world.changed) continue;
        bool pending = false;
        for (CUstream_st* s : all_streams()) pending |= s->running || !s->operations.empty();
        if (!pending) break;
        world.failure = world.blocks.empty() ? "deadlock: a stream waits for what no stream does"
                                             : "deadlock:" + waiting_list();
    }
    set_timer(0);
    if (world.broken) forget_work();
    bool look = is_time_to_look();
    if (look && world.failure.empty()) world.failure = damage();
    if (!world.failure.empty()) give_up();
    if (look) open_memory(CLOSED);
}

static cudaError_t fails(cudaError_t error) { return world.error = error; }

// An error, if no call can succeed any more.
static cudaError_t state() {
    int devices = world.options.devices;
    cudaError_t none = devices < 0 ? cudaErrorInsufficientDriver : cudaErrorNoDevice;
    cudaError_t error = devices <= 0 ? none : world.broken;
    return error ? fails(error) : cudaSuccess;
}

static Device& device() { return world.devices[size_t(world.device)]; }
static CUstream_st& stream_of(cudaStream_t s) { return s ? *s : device().legacy; }

// A call that cannot be part of a graph: is a stream being captured? Then the call fails, and the capture.
static bool spoils_capture(bool allocates = false) {
    bool spoils = false;
    for (auto& s : world.streams) {
        if (!s->capture || (allocates && s->capture->relaxed)) continue;
        s->capture->spoiled = spoils = true;
    }
    if (spoils) fails(cudaErrorStreamCaptureUnsupported);
    return spoils;
}

// What waits for the streams. Whoever waits for one waits for all of them: that is allowed, and the lazy
// order is lazy enough.
static cudaError_t wait_for_all() {
    if (cudaError_t error = state()) return error;
    if (spoils_capture()) return cudaErrorStreamCaptureUnsupported;
    drain();
    return state();
}

static void ask(cudaStream_t stream, Operation op) {
    CUstream_st& s = stream_of(stream);
    op.number = ++world.numbers;
    if (s.capture) return s.capture->operations.push_back(std::move(op));
    s.operations.push_back(std::move(op));
    world.changed = true;
    Async async = world.options.async;
    if (async == Async::EAGER || (async == Async::RANDOM && random_number() % 2)) drain(false);
}

// The shared memory that a block may ask for, where it does.
static size_t most_shared() {
    int capability = world.options.capability;
    bool small = capability == 86 || capability == 89 || capability >= 120;
    return (small ? 99 : capability == 87 || capability < 90 ? 163 : 227) * size_t(1024);
}

void enqueue(const void* kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
             std::function<void()> body) {
    if (state()) return;
    uint64_t threads = uint64_t(block.x) * block.y * block.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
    bool too_large = threads > 1024 || block.z > 64 || grid.y > 65535 || grid.z > 65535;
    if (threads == 0 || blocks == 0 || too_large) return void(fails(cudaErrorInvalidConfiguration));
    int device = stream_of(stream).device;
    auto raised = world.raised.find({device, kernel});
    bool usual = raised == world.raised.end();
    if (shared > (usual ? USUAL_SHARED : raised->second)) return void(fails(cudaErrorInvalidValue));
    size_t most = usual ? USUAL_SHARED : most_shared();
    auto g = std::make_shared<Grid>(Grid{kernel, std::move(body), grid, block, shared, device, most});
    ask(stream, {std::move(g), {}, {}});
}

void check_pointer(const void* kernel, const void* p) {
    const auto* q = static_cast<const std::byte*>(p);
    auto at = allocations.upper_bound(p);
    bool ours = at != allocations.begin() && q <= std::prev(at)->second.end();
    if (!p || ours || is_pinned(p, 1) || state()) return;
    stop(text_of("launch of %s: address %p is no memory of a device", name_of(kernel).c_str(), p));
}

Options options_of_environment() {
    Options o;
    auto value = [](const char* name) {
        const char* text = std::getenv(name);
        return std::string_view(text ? text : "");
    };
    if (value("EMU_ORDER") == "random") o.order = Order::RANDOM;
    if (value("EMU_ORDER") == "priority") o.order = Order::PRIORITY;
    if (value("EMU_ASYNC") == "eager") o.async = Async::EAGER;
    if (value("EMU_ASYNC") == "random") o.async = Async::RANDOM;
    auto number = [&](const char* name, auto& to) {
        if (value(name).empty()) return;
        to = std::decay_t<decltype(to)>(std::strtoll(value(name).data(), nullptr, 10));
    };
    number("EMU_SEED", o.seed), number("EMU_DEVICES", o.devices), number("EMU_MEMORY", o.memory);
    number("EMU_FAULT", o.fault), number("EMU_CAPABILITY", o.capability);
    return o;
}

void reset(const Options& options) {
    forget_work();
    while (!allocations.empty()) forget(allocations.begin());
    pinned.clear(), graph_memory.clear();
    world.streams.clear(), world.events.clear(), world.devices.clear();
    world.devices.resize(size_t(std::max(options.devices, 0)));
    for (int d = 0; d < options.devices; d++)
        world.devices[size_t(d)].legacy.device = d, world.devices[size_t(d)].legacy.is_default = true;
    world.options = options, world.random = options.seed, world.device = 0;
    world.error = world.broken = cudaSuccess, world.launches = 0, world.raised.clear();
    world.drains = 0;
    catch_signals();
    open_memory(CLOSED);
}

const Options& options() { return world.options; }

size_t allocated() {
    size_t sum = 0;
    for (Device& d : world.devices) sum += d.used;
    return sum;
}

#if defined(EMULATOR_ASAN)
extern "C" int __lsan_is_turned_off() { return 1; }              // a fiber that stops keeps what it has
#endif

// The world exists before main begins, as a program needs it; a test makes its own.
static const bool begun = [] {
    Options o = options_of_environment();
    o.throws = false;
    return reset(o), true;
}();

static cudaError_t copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    if (cudaError_t error = state()) return error;
    auto wrong = [&](const void* p, bool on_device) {
        return on_device ? !holder(p, bytes) : holder(p, 1) != nullptr;
    };
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (kind == cudaMemcpyDefault) to_device = holder(to, 1), from_device = holder(from, 1);
    if (bytes == 0) return cudaSuccess;
    if (wrong(to, to_device) || wrong(from, from_device)) return fails(cudaErrorInvalidValue);
    bool late = (to_device || is_pinned(to, bytes)) && (from_device || is_pinned(from, bytes));
    if (CUgraph_st* graph = stream_of(stream).capture.get(); graph && !late) {
        graph->spoiled = true;             // a graph has no place to stage it
        return fails(cudaErrorStreamCaptureUnsupported);
    }
    if (from_device || is_pinned(from, bytes)) {
        ask(stream, {nullptr, [=] { std::memcpy(to, from, bytes); }, {}});
        return cudaSuccess;
    }
    std::string now(static_cast<const char*>(from), bytes);      // pageable: staged before the call returns
    ask(stream, {nullptr, [to, now] { std::memcpy(to, now.data(), now.size()); }, {}});
    return cudaSuccess;
}

// Memory that a captured stream asks for is that of its graph, and goes with it.
struct GraphMemory {
    std::byte* data;
    bool freed = false;                    // a later operation of the graph is its cudaFreeAsync

    explicit GraphMemory(std::byte* data) : data(data) {}
    GraphMemory(const GraphMemory&) = delete;
    ~GraphMemory() {
        if (graph_memory.erase(data)) forget(allocations.find(data));
    }
};

static void capture_allocation(std::byte* data, size_t bytes, cudaStream_t stream) {
    allocations.find(data)->second.given_back = true;            // not to be freed by others
    auto memory = std::make_shared<GraphMemory>(data);
    graph_memory[data] = memory;
    ask(stream, {nullptr, [memory, bytes] { std::memset(memory->data, POISON, bytes); }, {}});
}

static cudaError_t capture_free(std::byte* data, size_t bytes, cudaStream_t stream) {
    auto at = graph_memory.find(data);
    std::shared_ptr<GraphMemory> memory = at == graph_memory.end() ? nullptr : at->second.lock();
    if (!memory || std::exchange(memory->freed, true)) return fails(cudaErrorInvalidValue);
    ask(stream, {nullptr, [memory, bytes] { std::memset(memory->data, POISON, bytes); }, {}});
    return cudaSuccess;
}

}

// -- 9  The run time -----------------------------------------------------------------------------

using namespace emulator;

cudaError_t cudaGetDeviceCount(int* count) {
    *count = std::max(world.options.devices, 0);
    return *count ? cudaSuccess : state();
}
cudaError_t cudaGetDevice(int* device) { return *device = world.device, state(); }
cudaError_t cudaSetDevice(int device) {
    if (cudaError_t error = state()) return error;
    if (device < 0 || device >= world.options.devices) return fails(cudaErrorInvalidDevice);
    return world.device = device, cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
    return *version = world.options.devices < 0 ? 0 : CUDART_VERSION, cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }

static int attribute_of(cudaDeviceAttr attribute) {
    switch (attribute) {
    case cudaDevAttrMultiProcessorCount: return world.options.blocks;
    case cudaDevAttrComputeCapabilityMajor: return world.options.capability / 10;
    case cudaDevAttrComputeCapabilityMinor: return world.options.capability % 10;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMaxRegistersPerBlock: return 65536;
    case cudaDevAttrMaxSharedMemoryPerBlock: return USUAL_SHARED;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return int(most_shared());
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return int(most_shared() + 1024);
    case cudaDevAttrReservedSharedMemoryPerBlock: return 1024;
    case cudaDevAttrL2CacheSize: return 1 << 20;
    case cudaDevAttrGlobalMemoryBusWidth: return 128;
    case cudaDevAttrMemoryPoolsSupported:
    case cudaDevAttrUnifiedAddressing: return 1;
    case cudaDevAttrIntegrated:
    case cudaDevAttrManagedMemory:
    case cudaDevAttrPageableMemoryAccess:
    case cudaDevAttrCooperativeLaunch: return 0;
    default: return -1;
    }
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    if (cudaError_t error = state()) return error;
    if (device < 0 || device >= world.options.devices) return fails(cudaErrorInvalidDevice);
    *value = attribute_of(attribute);
    return *value < 0 ? fails(cudaErrorInvalidValue) : cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
    if (cudaError_t error = state()) return error;
    if (device < 0 || device >= world.options.devices) return fails(cudaErrorInvalidDevice);
    *p = {};
    std::snprintf(p->name, sizeof p->name, "an emulated GPU");
    p->totalGlobalMem = world.options.memory;
    p->major = world.options.capability / 10, p->minor = world.options.capability % 10;
    p->multiProcessorCount = world.options.blocks;
    p->warpSize = 32, p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048;
    p->regsPerBlock = 65536, p->memoryBusWidth = 128, p->l2CacheSize = 1 << 20;
    p->sharedMemPerBlock = USUAL_SHARED, p->sharedMemPerBlockOptin = most_shared();
    p->sharedMemPerMultiprocessor = most_shared() + 1024, p->unifiedAddressing = 1;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    if (cudaError_t error = state()) return error;
    if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
    bool ours = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (!ours || value < 0 || size_t(value) > most_shared()) return fails(cudaErrorInvalidValue);
    world.raised[{world.device, kernel}] = std::max(size_t(value), USUAL_SHARED);
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads,
                                                          size_t shared) {
    if (cudaError_t error = state()) return error;
    if (threads < 1 || threads > 1024) return fails(cudaErrorInvalidValue);
    size_t most = std::min(32, 2048 / ((threads + 31) / 32 * 32));
    *blocks = int(std::min(most, (most_shared() + 1024) / (shared + 1024)));
    return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
    return *can = device != peer, state();
}
cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned) {
    if (cudaError_t error = state()) return error;
    if (peer < 0 || peer >= world.options.devices || peer == world.device)
        return fails(cudaErrorInvalidDevice);
    return device().peers.insert(peer).second ? cudaSuccess : fails(cudaErrorPeerAccessAlreadyEnabled);
}

cudaError_t cudaGetLastError() { return std::exchange(world.error, world.broken); }
cudaError_t cudaPeekAtLastError() { return world.error; }
const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorInsufficientDriver: return "cudaErrorInsufficientDriver";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorNotReady: return "cudaErrorNotReady";
    case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated: return "cudaErrorStreamCaptureInvalidated";
    case cudaErrorPeerAccessAlreadyEnabled: return "cudaErrorPeerAccessAlreadyEnabled";
    default: return "an error";
    }
}
const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInsufficientDriver: return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    default: return cudaGetErrorName(error);
    }
}

static cudaError_t take_memory(void** p, size_t bytes) {
    *p = nullptr;
    if (cudaError_t error = state()) return error;
    if (bytes == 0) return cudaSuccess;
    if (bytes > world.options.memory - device().used) return fails(cudaErrorMemoryAllocation);
    *p = allocate(bytes, world.device);
    if (!*p) return fails(cudaErrorMemoryAllocation);
    device().used += bytes;
    return cudaSuccess;
}
cudaError_t cudaMalloc(void** p, size_t bytes) {
    if (spoils_capture(true)) return *p = nullptr, cudaErrorStreamCaptureUnsupported;
    return take_memory(p, bytes);
}
cudaError_t cudaFree(void* p) {
    if (!p) return state();
    auto at = allocations.find(p);
    if (at == allocations.end() || at->second.given_back) return fails(cudaErrorInvalidValue);
    if (spoils_capture(true)) return cudaErrorStreamCaptureUnsupported;
    drain();
    return forget(at), state();
}
cudaError_t cudaMallocAsync(void** p, size_t bytes, cudaStream_t stream) {
    cudaError_t error = take_memory(p, bytes);
    if (*p && stream_of(stream).capture) capture_allocation(static_cast<std::byte*>(*p), bytes, stream);
    return error;
}
cudaError_t cudaFreeAsync(void* p, cudaStream_t stream) {
    if (!p || state()) return state();
    auto at = allocations.find(p);
    bool known = at != allocations.end();
    if (known && stream_of(stream).capture) return capture_free(at->second.data, at->second.bytes, stream);
    if (!known || at->second.given_back) return fails(cudaErrorInvalidValue);
    at->second.given_back = true;
    ask(stream, {nullptr, [p] { forget(allocations.find(p)); }, {}});
    return cudaSuccess;
}
cudaError_t cudaHostRegister(void* p, size_t bytes, unsigned) {
    if (cudaError_t error = state()) return error;
    if (!p || !bytes || is_pinned(p, 1)) return fails(cudaErrorInvalidValue);
    return pinned[static_cast<std::byte*>(p)] = bytes, cudaSuccess;
}
cudaError_t cudaHostUnregister(void* p) {
    drain();
    return pinned.erase(static_cast<std::byte*>(p)) ? cudaSuccess : fails(cudaErrorInvalidValue);
}
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) {
    *p = nullptr;
    if (cudaError_t error = state()) return error;
    *p = std::malloc(std::max<size_t>(bytes, 1));
    if (!*p) return fails(cudaErrorMemoryAllocation);
    return pinned[static_cast<std::byte*>(*p)] = bytes, cudaSuccess;
}
cudaError_t cudaMallocHost(void** p, size_t bytes) { return cudaHostAlloc(p, bytes, cudaHostAllocDefault); }
cudaError_t cudaFreeHost(void* p) {
    if (!p) return cudaSuccess;
    if (cudaError_t error = cudaHostUnregister(p)) return error;
    return std::free(p), state();
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    *total = *free = 0;
    if (cudaError_t error = state()) return error;
    *total = world.options.memory, *free = *total - device().used;
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
    return copy(to, from, bytes, kind, stream);
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
    return copy(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    if (spoils_capture()) return cudaErrorStreamCaptureUnsupported;
    cudaError_t error = copy(to, from, bytes, kind, nullptr);
    return error ? error : wait_for_all();
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream) {
    if (cudaError_t error = state()) return error;
    if (bytes && !holder(p, bytes)) return fails(cudaErrorInvalidValue);
    ask(stream, {nullptr, [=] { if (bytes) std::memset(p, value, bytes); }, {}});
    return cudaSuccess;
}
cudaError_t cudaMemset(void* p, int value, size_t bytes) {
    if (spoils_capture()) return cudaErrorStreamCaptureUnsupported;
    return cudaMemsetAsync(p, value, bytes, nullptr);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned flags) {
    *s = nullptr;
    if (cudaError_t error = state()) return error;
    world.streams.push_back(std::make_unique<CUstream_st>());
    *s = world.streams.back().get();
    (*s)->device = world.device, (*s)->waits = flags != cudaStreamNonBlocking;
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* s) { return cudaStreamCreateWithFlags(s, cudaStreamDefault); }
cudaError_t cudaStreamDestroy(cudaStream_t s) {
    drain();
    bool known = std::erase_if(world.streams, [s](auto& owned) { return owned.get() == s; });
    return known ? state() : fails(cudaErrorInvalidResourceHandle);
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return wait_for_all(); }
cudaError_t cudaDeviceSynchronize() { return wait_for_all(); }
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    if (cudaError_t error = state()) return error;
    const CUstream_st& s = stream_of(stream);
    return s.running || !s.operations.empty() ? cudaErrorNotReady : cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned flags) {
    *e = nullptr;
    if (cudaError_t error = state()) return error;
    world.events.push_back(std::make_unique<CUevent_st>());
    *e = world.events.back().get();
    (*e)->timed = !(flags & cudaEventDisableTiming);
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* e) { return cudaEventCreateWithFlags(e, cudaEventDefault); }
cudaError_t cudaEventDestroy(cudaEvent_t e) {
    drain();
    bool known = std::erase_if(world.events, [e](auto& owned) { return owned.get() == e; });
    return known ? state() : fails(cudaErrorInvalidResourceHandle);
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t stream) {
    if (cudaError_t error = state()) return error;
    uint64_t number = e->asked = world.numbers + 1;
    ask(stream, {nullptr, [=] {
        e->reached = std::max(e->reached, number), e->time = std::chrono::steady_clock::now();
    }, {}});
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return wait_for_all(); }
cudaError_t cudaEventQuery(cudaEvent_t e) {
    if (cudaError_t error = state()) return error;
    return e->reached >= e->asked ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
    if (cudaError_t error = state()) return error;
    bool recorded = from->asked && to->asked;
    if (!from->timed || !to->timed || !recorded) return fails(cudaErrorInvalidResourceHandle);
    if (cudaEventQuery(from) || cudaEventQuery(to)) return fails(cudaErrorNotReady);
    *milliseconds = std::chrono::duration<float, std::milli>(to->time - from->time).count();
    return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t e, unsigned) {
    if (cudaError_t error = state()) return error;
    uint64_t number = e->asked;
    ask(stream, {nullptr, [] {}, [=] { return e->reached >= number; }});
    return cudaSuccess;
}

// A graph is the list of what its stream was asked.
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    if (cudaError_t error = state()) return error;
    CUstream_st& s = stream_of(stream);
    if (s.is_default || s.capture) return fails(cudaErrorInvalidValue);
    s.capture = std::make_unique<CUgraph_st>();
    s.capture->relaxed = mode == cudaStreamCaptureModeRelaxed;
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    const CUgraph_st* graph = stream_of(stream).capture.get();
    *status = !graph           ? cudaStreamCaptureStatusNone
              : graph->spoiled ? cudaStreamCaptureStatusInvalidated
                               : cudaStreamCaptureStatusActive;
    return state();
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    CUstream_st& s = stream_of(stream);
    *graph = nullptr;
    if (!s.capture) return fails(cudaErrorInvalidValue);
    std::unique_ptr<CUgraph_st> captured = std::move(s.capture);
    if (captured->spoiled) return fails(cudaErrorStreamCaptureInvalidated);
    return *graph = captured.release(), state();
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
    *exec = nullptr;
    if (cudaError_t error = state()) return error;
    *exec = new CUgraphExec_st;
    (*exec)->operations = graph->operations;
    return cudaSuccess;
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return state(); }
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    for (Operation op : exec->operations) {
        if (state()) break;
        if (op.grid) {                     // once more from its first block
            op.grid = std::make_shared<Grid>(*op.grid);
            op.grid->next = op.grid->done = 0;
        }
        ask(stream, std::move(op));
    }
    return state();
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return drain(), delete exec, state(); }
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, state(); }
