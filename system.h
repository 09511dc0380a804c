// system.h: what the operating system and a person at a terminal ask for. Files that are written whole or not
// at all, what the machine gives to this process, a terminal that is left as it was found, lines that can be
// edited, and signals that end a program without leaving half of anything behind.
//
// Nothing here is about models. The book can be read without it.
//
// Contents: 1 files that are written; 2 memory and processors; 3 a terminal; 4 lines from a person;
//           5 signals.
//
// Needs chapters 1 and 3.1 (fail, refuse, notice) of deepseek.cpp, and the UTF-8 of tokenizer.h.
#pragma once

// -- 1  files that are written -------------------------------------------------------------------

// A file, whatever it is called.
struct FileId {
    dev_t device;
    ino_t number;
    auto operator<=>(const FileId&) const = default;
};
inline std::optional<FileId> file_id(const fs::path& path) {
    struct stat status {};
    if (stat(path.c_str(), &status) != 0) return {};
    return FileId{status.st_dev, status.st_ino};
}
inline std::set<FileId> in_use;          // the files of the model that is used: nothing is written over them

// Temporary names of files that are being written; a signal's handler has no time for destructors.
inline std::array<std::atomic<const char*>, 4> unfinished{};
inline void remove_unfinished() {
    for (auto& name : unfinished) if (const char* path = name.exchange(nullptr)) unlink(path);
}

// Writes to a temporary name beside the target and renames, so that a reader never sees half a file. The
// name is new each time; who writes holds a lock on it, so that those left behind by a kill can be told and
// are removed by the next who writes the same target. `replace`: an existing file may be.
class AtomicFile {
public:
    explicit AtomicFile(const std::string& path, bool replace = false) : path_(path), replace_(replace) {
        std::error_code error;
        std::optional<FileId> there = file_id(path);
        if (path.empty()) fail("an empty path");
        if (fs::is_directory(path, error)) refuse(path, "is a directory");
        if (fs::is_other(path, error)) refuse(path, "not a regular file");
        if (there && in_use.count(*there)) refuse(path, "is a file of the model in use");
        if (there && !replace) refuse(path, "exists already (--force replaces it)");
        if (there) target_ = fs::canonical(path);        // not the link, what it names
        remove_left_behind();
        sigset_t all, before;                            // no signal between making and knowing the file
        sigfillset(&all), pthread_sigmask(SIG_BLOCK, &all, &before);
        int fd = mkostemps(temporary_.data(), 4, O_CLOEXEC), wrong = errno;
        for (size_t i = 0; fd >= 0 && i < unfinished.size() && !slot_; i++)
            if (!unfinished[i]) unfinished[i] = temporary_.c_str(), slot_ = &unfinished[i];
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        if (fd < 0) refuse(path, "cannot be written: %s", std::strerror(wrong));
        CHECK(slot_, "too many files are written at once");
        flock(fd, LOCK_EX | LOCK_NB);
        mode_t mask = umask(0);
        umask(mask), fchmod(fd, 0666 & ~mask);           // mkostemps gives 0600
        file_ = fdopen(fd, "wb");
    }
    ~AtomicFile() { if (file_) std::remove(temporary_.c_str()), close(); }
    AtomicFile(const AtomicFile&) = delete;
    void write(const void* data, size_t bytes) {
        require(bytes == 0 || std::fwrite(data, 1, bytes, file_) == bytes);
    }
    void commit() {
        require(std::fflush(file_) == 0 && fsync(fileno(file_)) == 0 && rename());
        close();
    }

private:
    std::string path_, target_ = path_, temporary_;
    bool replace_;
    std::atomic<const char*>* slot_ = nullptr;
    std::FILE* file_ = nullptr;

    void require(bool done) const { if (!done) refuse(path_, "%s", std::strerror(errno)); }
    // What has come into being under that name meanwhile is not replaced either.
    bool rename() const {
        const char *from = temporary_.c_str(), *to = target_.c_str();
        if (!replace_ && renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_NOREPLACE) == 0) return true;
        const bool unknown = !replace_ && (errno == EINVAL || errno == ENOSYS) && !file_id(target_);
        return (replace_ || unknown) && std::rename(from, to) == 0;
    }
    void close() { *slot_ = nullptr, std::fclose(std::exchange(file_, nullptr)); }
    void remove_left_behind() {
        temporary_ = target_ + ".XXXXXX.tmp";
        const std::string name = fs::path(temporary_).filename(), ours = name.substr(0, name.size() - 10);
        std::error_code error;
        for (auto& entry : fs::directory_iterator(fs::path(target_ + "/..").lexically_normal(), error)) {
            std::string other = entry.path().filename();
            if (other.size() != name.size() || !other.starts_with(ours) || !other.ends_with(".tmp") ||
                !entry.is_regular_file(error) || entry.is_symlink(error))
                continue;
            int fd = open(entry.path().c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
            if (fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) == 0) unlink(entry.path().c_str());
            if (fd >= 0) ::close(fd);
        }
    }
};

// -- 2  memory and processors --------------------------------------------------------------------

// The number after `key` in a file of the system, if it says one.
inline std::optional<uint64_t> system_number(const fs::path& file, const std::string& key = "") {
    std::ifstream in(file);
    for (std::string line; std::getline(in, line);) {
        unsigned long long n = 0;
        if (line.starts_with(key) && std::sscanf(line.c_str() + key.size(), " %llu", &n) == 1) return n;
    }
    return {};
}

// A control group of the process, of the system's first or second kind.
struct ControlGroup {
    fs::path path;
    bool first_kind;
};

// Those that limit `controller` ("memory", "cpu"): its own group and all above it.
inline std::vector<ControlGroup> control_groups(const std::string& controller) {
    std::vector<ControlGroup> groups;
    std::ifstream in("/proc/self/cgroup");             // lines NUMBER:CONTROLLERS:/PATH
    for (std::string line; std::getline(in, line);) {
        size_t names = line.find(':') + 1, path = line.find(":/", names);
        if (names == 0 || path == line.npos) continue;
        std::string controllers = "," + line.substr(names, path - names) + ",";
        bool first_kind = controllers.find("," + controller + ",") != controllers.npos;
        if (!first_kind && !line.starts_with("0::/")) continue;
        fs::path group = first_kind ? "/sys/fs/cgroup/" + controller : "/sys/fs/cgroup";
        groups.push_back({group, first_kind});
        for (const fs::path& part : fs::path(line.substr(path + 2)))
            groups.push_back({group /= part, first_kind});
    }
    return groups;
}

// Bytes that a control group leaves to its processes. Pages of files count as free, for they are given up
// when others are needed.
inline uint64_t left_in_group(const ControlGroup& g) {
    auto limit = system_number(g.path / (g.first_kind ? "memory.limit_in_bytes" : "memory.max"));
    auto used = system_number(g.path / (g.first_kind ? "memory.usage_in_bytes" : "memory.current"));
    if (!limit || !used) return UINT64_MAX;
    for (std::string key : {"inactive_file", "active_file"}) {
        auto pages = system_number(g.path / "memory.stat", (g.first_kind ? "total_" : "") + key);
        *used -= std::min(*used, pages.value_or(0));
    }
    return *limit - std::min(*used, *limit);
}

// Bytes that the system can give this process without swapping; 0 where it does not say.
uint64_t available_memory() {
    uint64_t available = system_number("/proc/meminfo", "MemAvailable:").value_or(0) * 1024;
    if (available == 0) return 0;
    for (const ControlGroup& g : control_groups("memory"))
        available = std::clamp<uint64_t>(left_in_group(g), 1, available);
    return available;
}

// Processors whose time a control group gives, rounded down, at least one; INT_MAX where it does not say.
inline int processors_of_group(const ControlGroup& g) {
    std::optional<uint64_t> quota, period;
    if (g.first_kind) {
        quota = system_number(g.path / "cpu.cfs_quota_us");
        period = system_number(g.path / "cpu.cfs_period_us");
        if (quota && *quota > uint64_t(INT64_MAX)) quota.reset();        // -1: no limit
    } else {                                                            // QUOTA PERIOD, or max PERIOD
        std::ifstream in(g.path / "cpu.max");
        uint64_t q = 0, p = 0;
        if (in >> q >> p) quota = q, period = p;
    }
    if (!quota || !period || *period == 0) return std::numeric_limits<int>::max();
    return int(std::clamp<uint64_t>(*quota / *period, 1, 1 << 20));
}

// Processors that this process may run on: by its affinity, and by the time that its control groups give.
inline int processors() {
    int n = omp_get_num_procs();
    for (const ControlGroup& g : control_groups("cpu")) n = std::min(n, processors_of_group(g));
    return std::max(n, 1);
}

// How long a thread that waits for the next loop stays awake: ten microseconds. The default of OpenMP's run
// times, which read it before main, is a thousand times that and takes the time of other programs. Not where
// the user has a say in it, nor where threads are bound: the first one's processor would be passed on.
inline void set_patience(char** argv) {
    for (const char* chosen : {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_PROC_BIND",
                               "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"})
        if (std::getenv(chosen)) return;
    setenv("GOMP_SPINCOUNT", "2000", 1), setenv("KMP_BLOCKTIME", "0", 1);
    std::error_code error;                               // by its name, which ps and killall go by
    execv(fs::read_symlink("/proc/self/exe", error).c_str(), argv);    // where refused, it works all the same
}

// -- 3  a terminal -------------------------------------------------------------------------------

// Whether a person reads what is written there. mpirun gives its processes a terminal of its own (`relayed`)
// wherever its output goes.
inline bool relayed = false;
inline bool on_terminal(int fd) {
    std::error_code error;
    if (!relayed || !isatty(fd)) return isatty(fd);
    const fs::path file = fs::read_symlink(text_of("/proc/%d/fd/%d", getppid(), fd), error);
    return file.native().starts_with("/dev/pts/") || file.native().starts_with("/dev/tty");
}

// Whether escape codes may go to a terminal (no-color.org; TERM=dumb has none).
inline bool plain_terminal() {
    const char *term = std::getenv("TERM"), *none = std::getenv("NO_COLOR");
    return !term || !*term || std::string_view(term) == "dumb" || (none && *none);
}

// Text whose control characters are shown and do nothing: C0 but newline and tab, C1, and the marks that turn
// the direction of writing. So are bytes that are no UTF-8: to some terminals 9B begins a code.
inline std::string disarmed(std::string_view text) {
    auto acts = [](int32_t c) {
        return (c < 32 && c != '\n' && c != '\t') || (c >= 127 && c < 160) || c == 0x061C || c == 0x200E ||
               c == 0x200F || (c >= 0x202A && c <= 0x202E) || (c >= 0x2066 && c <= 0x2069);
    };
    std::string out;
    for (int32_t c = 0, n = 0; !text.empty(); text.remove_prefix(size_t(std::max(n, 1)))) {
        auto bytes = reinterpret_cast<const uint8_t*>(text.data());
        n = int32_t(utf8proc_iterate(bytes, int64_t(text.size()), &c));
        if (n <= 0) out += text_of("<%02X>", bytes[0]);
        else if (acts(c)) out += text_of("<U+%04X>", unsigned(c));
        else out.append(text.substr(0, size_t(n)));
    }
    return out;
}

// The state in which the terminal is found is the state in which it is left, whatever ends or stops the
// program. Called by signal handlers, too. A program in the background has no say: it would be stopped.
struct Terminal {
    termios before{};
    bool known = ours() && tcgetattr(STDIN_FILENO, &before) == 0;
    volatile std::sig_atomic_t dimmed = 0, pasting = 0;   // escape codes that are in effect
    volatile std::sig_atomic_t disturbed = 0;             // has another size, or was another program's

    static bool ours() { return tcgetpgrp(STDIN_FILENO) == getpgrp(); }
    static void set(const termios& state) { if (ours()) tcsetattr(STDIN_FILENO, TCSANOW, &state); }
    static void put(int fd, std::string_view code) { if (::write(fd, code.data(), code.size()) < 0) return; }
    void dim(bool on) { dimmed = on, put(STDOUT_FILENO, on ? "\033[2m" : "\033[0m"); }
    void paste(bool on) { pasting = on, put(STDERR_FILENO, on ? "\033[?2004h" : "\033[?2004l"); }
    void restore() {
        if (dimmed) put(STDOUT_FILENO, "\033[0m");
        if (pasting) put(STDERR_FILENO, "\033[?2004l");
        if (known) set(before);
    }
};
inline Terminal terminal;

// Ctrl-C ends the program; but while somebody heeds `interrupted`, only what he does. A second one ends all.
inline volatile std::sig_atomic_t heeded = 0, ended_by = 0;              // ended_by: SIGTERM, SIGHUP, or 0
struct Heed {
    std::sig_atomic_t before = std::exchange(heeded, 1);
    ~Heed() { heeded = before; }
};

// A bar on a terminal, with the time left; nothing elsewhere.
class Progress {
public:
    Progress(const std::string& what, size_t total, const std::string& unit = "")
        : what_(what), unit_(unit), total_(std::max<size_t>(total, 1)),
          shown_(!quiet && isatty(STDERR_FILENO)) {}
    ~Progress() { if (width_) std::fprintf(stderr, "\r%*s\r", int(width_), ""); }
    Progress(const Progress&) = delete;
    void at(size_t n) {
        const double now = seconds(), took = now - start_;
        if (!shown_ || took < 0.5 || now - drawn_ < 0.1) return;
        drawn_ = now;
        std::string bar(std::min(n, total_) * 30 / total_, '#');
        std::string line = what_ + text_of(" [%-30s] %zu / %zu", bar.c_str(), n, total_) + unit_;
        if (n > 0) line += text_of(", %.0f s left", took * double(total_ - std::min(n, total_)) / double(n));
        std::fprintf(stderr, "\r%-*s", int(width_), line.c_str());      // over what was longer
        width_ = std::max(width_, line.size());
    }

private:
    std::string what_, unit_;
    size_t total_, width_ = 0;
    bool shown_;
    double start_ = seconds(), drawn_ = 0;
};

// -- 4  lines from a person ----------------------------------------------------------------------

#ifndef DEEPSEEK_NO_MAIN
#define Tokenizer EditTokenizer          // libedit has a type of that name, too
#include <histedit.h>
#undef Tokenizer

// Appends what comes in at stdin, as soon as something does; false at the end, and after a signal that ends.
// Those are let in only while this waits: between a look at `interrupted` and a read that then waits for ever
// there would be a gap. `disturbed()`: what was on the screen may no longer be
inline bool more_input(std::string& bytes, const std::function<void()>& disturbed) {
    sigset_t held, before;
    sigemptyset(&held);
    for (int signal : {SIGINT, SIGTERM, SIGHUP, SIGTSTP, SIGWINCH}) sigaddset(&held, signal);
    pthread_sigmask(SIG_BLOCK, &held, &before);
    pollfd input{STDIN_FILENO, POLLIN, 0};
    int ready = 0;
    do {
        if (terminal.disturbed) terminal.disturbed = 0, disturbed();
        ready = interrupted ? 0 : ppoll(&input, 1, nullptr, &before);
    } while (ready < 0 && errno == EINTR);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    char part[4096];
    ssize_t n = interrupted || ready <= 0 ? 0 : read(STDIN_FILENO, part, sizeof part);
    if (n > 0) bytes.append(part, size_t(n));
    return n > 0;
}

// Lines that are edited, with a history. What is pasted (terminals say so by codes, "bracketed paste") does
// not go through the editor if it has several lines or is long: a mark stands for it until the line is done.
class LineEditor {
public:
    LineEditor() : editor_(el_init("deepseek", stdin, stderr, stderr)), history_(history_init()) {
        HistEvent event;
        history(history_, &event, H_SETSIZE, 1000);
        el_set(editor_, EL_CLIENTDATA, this);
        if (plain_terminal()) el_set(editor_, EL_TERMINAL, "dumb");
        el_set(editor_, EL_EDITOR, "emacs");
        el_set(editor_, EL_PROMPT, &prompt_of);
        el_set(editor_, EL_HIST, history, history_);
        el_set(editor_, EL_SIGNAL, 0);
        el_set(editor_, EL_GETCFN, &next_character);
        el_source(editor_, nullptr);
    }
    ~LineEditor() { history_end(history_), el_end(editor_); }
    LineEditor(const LineEditor&) = delete;
    // A line without its end; nothing at the end of the input, or after Ctrl-C (then `interrupted` is set).
    std::optional<std::string> line(const char* prompt) {
        Heed heed;
        terminal.disturbed = 0, prompt_ = prompt;
        if (!plain_terminal()) terminal.paste(true);
        int n = 0;
        const char* read = interrupted ? nullptr : el_gets(editor_, &n);
        if (!plain_terminal()) terminal.paste(false);
        terminal.restore();
        if (!read || n <= 0 || interrupted) return std::fputc('\n', stderr), std::nullopt;
        std::string text(read, size_t(n));
        if (text.back() == '\n') text.pop_back();
        HistEvent event;
        if (!text.empty()) history(history_, &event, H_ENTER, text.c_str());
        return unmarked(text);
    }

private:
    EditLine* editor_;
    History* history_;
    const char* prompt_ = "";
    std::string bytes_;                                  // read, not yet given to the editor
    // Marks, and what they stand for: bytes that are no character, and pastes. The history needs them all.
    std::vector<std::pair<std::string, std::string>> marks_ = {{"\U0010FFFF", "\xFF"}};

    static LineEditor& self(EditLine* editor) {
        void* data = nullptr;
        el_get(editor, EL_CLIENTDATA, &data);
        return *static_cast<LineEditor*>(data);
    }
    std::string unmarked(const std::string& line) const {
        std::string out;
        for (size_t at = 0; at < line.size();) {
            auto here = [&](const auto& m) { return line.compare(at, m.first.size(), m.first) == 0; };
            auto mark = std::find_if(marks_.begin(), marks_.end(), here);
            if (mark == marks_.end()) out += line[at++];
            else out += mark->second, at += mark->first.size();
        }
        return out;
    }
    static char* prompt_of(EditLine* editor) { return const_cast<char*>(self(editor).prompt_); }
    // A window of another size, or a program that was stopped, needs the line once more.
    bool fill() {
        return more_input(bytes_, [&] {
            Terminal::put(STDERR_FILENO, "\r"), el_resize(editor_), el_set(editor_, EL_REFRESH);
        });
    }
    // All that is pasted becomes one text, which a mark stands for, or, if it is short, itself.
    void take_paste() {
        constexpr std::string_view END = "\033[201~";
        size_t end;
        while ((end = bytes_.find(END)) == bytes_.npos) if (!fill()) return;
        std::string text = bytes_.substr(0, end);
        bytes_.erase(0, end + END.size());
        std::replace(text.begin(), text.end(), '\r', '\n');
        auto acts = [](char c) { return uint8_t(c) < 32 || c == 127; };
        if (text.size() < 200 && std::none_of(text.begin(), text.end(), acts))
            return void(bytes_.insert(0, text));
        std::string mark = text_of("[pasted %zu: %zu lines, %zu bytes]", marks_.size(),
                                   size_t(std::count(text.begin(), text.end(), '\n')) + 1, text.size());
        marks_.emplace_back(mark, text);
        bytes_.insert(0, mark);
    }
    // A character for the editor: 1, or 0 at the end.
    static int next_character(EditLine* editor, wchar_t* out) {
        LineEditor& e = self(editor);
        constexpr std::string_view PASTE = "\033[200~";
        while (e.bytes_.empty() || tokenizer_detail::utf8_part(e.bytes_) == 0 ||
               (e.bytes_.size() < PASTE.size() && PASTE.starts_with(e.bytes_)))
            if (!e.fill()) return 0;
        if (e.bytes_.starts_with(PASTE)) {
            e.bytes_.erase(0, PASTE.size());
            e.take_paste();
            return next_character(editor, out);
        }
        int32_t c = 0;
        int n = tokenizer_detail::utf8_part(e.bytes_);
        if (n > 0) utf8proc_iterate(reinterpret_cast<const uint8_t*>(e.bytes_.data()), n, &c);
        *out = n > 0 ? wchar_t(c) : L'\U0010FFFF';
        e.bytes_.erase(0, size_t(std::abs(n)));
        return 1;
    }
};

// A turn: a line; lines that end with a backslash and the one after them; or all lines between two of `"""`.
inline std::optional<std::string> read_turn(LineEditor& editor) {
    std::optional<std::string> line = editor.line("> ");
    if (!line) return {};
    if (*line == "\"\"\"") {
        std::string text;
        while ((line = editor.line(". ")) && *line != "\"\"\"") text += (text.empty() ? "" : "\n") + *line;
        return line ? std::optional(text) : std::nullopt;
    }
    std::string text = *line;
    while (text.ends_with('\\')) {
        if (!(line = editor.line(". "))) return {};
        text.back() = '\n', text += *line;
    }
    return text;
}
#endif

// -- 5  signals ----------------------------------------------------------------------------------

// What the signal does where it has no handler.
inline void raise_plain(int signal) {
    sigset_t own;
    sigemptyset(&own), sigaddset(&own, signal);
    std::signal(signal, SIG_DFL), pthread_sigmask(SIG_UNBLOCK, &own, nullptr);
    raise(signal);
}
inline void (*farewell)() = nullptr;                     // what is still to be said, from a signal's handler
// From a signal: at once, but with the terminal as it was and no half file left.
inline void leave(int signal) {
    terminal.restore(), remove_unfinished();
    if (farewell) farewell();
    if (signal == SIGINT) Terminal::put(STDERR_FILENO, "\ndeepseek: interrupted\n"), _exit(130);
    raise_plain(signal);
}
inline void on_end(int signal) {
    const bool again = interrupted && signal != SIGPIPE; // each write into a broken pipe brings that
    if (!heeded || again) leave(signal);
    ended_by = signal == SIGINT ? 0 : signal;
    interrupted = 1;
    if (ended_by) std::signal(SIGTTOU, SIG_IGN);         // to put a terminal back that is another's by now
}
// A mapped file was cut short while in use, or its disk failed: no way leads back into the loop that read it.
inline void on_bus_error(int) {
    static std::atomic_flag said;                        // of several threads one speaks
    while (said.test_and_set()) pause();
    terminal.restore(), remove_unfinished();
    Terminal::put(STDERR_FILENO, "deepseek: a weight file was cut short, or cannot be read any more\n");
    _exit(1);
}
// Ctrl-Z, and on again. The signal itself stops us: the system passes over it where nobody could say `fg`.
inline void on_stop(int signal) {
    termios now{};
    bool known = tcgetattr(STDIN_FILENO, &now) == 0;
    terminal.restore(), raise_plain(signal), std::signal(signal, on_stop);
    if (known) Terminal::set(now);
    if (terminal.dimmed) terminal.dim(true);
    if (terminal.pasting) terminal.paste(true);
    terminal.disturbed = 1;
}

// What ends the program also ends a read or write that waits; a window of another size, or a stop, does not.
// What is ignored (nohup) stays ignored.
inline void set_signals() {
    auto set = [](int signal, void (*handler)(int), int flags = 0) {
        struct sigaction action {}, before {};
        action.sa_handler = handler, action.sa_flags = flags;
        if (sigaction(signal, nullptr, &before) == 0 && before.sa_handler != SIG_IGN)
            sigaction(signal, &action, nullptr);
    };
    for (int signal : {SIGINT, SIGTERM, SIGHUP, SIGPIPE}) set(signal, on_end);
    for (int signal : {SIGQUIT, SIGABRT, SIGXCPU}) set(signal, leave);
    set(SIGXFSZ, SIG_IGN);                               // then the write says that the file is too large
    set(SIGBUS, on_bus_error), set(SIGTSTP, on_stop, SA_RESTART);
    set(SIGWINCH, [](int) { terminal.disturbed = 1; }, SA_RESTART);
}
