// cli.h: the command line. What each command of the program does: it opens a model, places the options where
// the chapters of deepseek.cpp want them, and prints. Whatever can be wrong with a path, a number or the
// memory is found before the work begins.
//
//      deepseek run -p "Which is larger, 9.11 or 9.9?"            the model in weights/
//      deepseek run -m DeepSeek-R1-Distill-Qwen-1.5B -f question.txt --temp 0.6
//      deepseek chat
//      echo '["hello"]' | deepseek tokenize --lines
//      deepseek logits -m M --ids 1,2,3 --taps --out taps.safetensors
//      deepseek perplexity -f text.txt      deepseek info      deepseek bench
//      deepseek quantize -m M -o M.gguf --type q4_k_m           deepseek check
//
// Results go to stdout, progress and statistics to stderr. Exit code 0: done; 1: the input is wrong; 2: a
// check failed; 130: interrupted.
//
// Contents: 1 options; 2 ranks; 3 run, chat; 4 tokenize, logits, perplexity, quantize; 5 bench --traffic;
//           6 info, bench, check; 7 pipeline; 8 what an option may be; 9 the commands and their options;
//           10 signals and main.
//
// Needs all chapters of deepseek.cpp before 22, and CLI11.
#pragma once

#include <CLI/CLI.hpp>

// -- 1  options ----------------------------------------------------------------------------------

struct Options {
    std::string model, device = "auto", quant = "none", type, mla = "absorbed", kv = "f32", arith = "f32";
    std::string prompt, file, dash, system, ids, out, save_kv, load_kv, section, chat_template, seed = "0";
    int threads = 0, context = 0, chunk = 512, max_tokens = -1, think_budget = -1;
    int bench_prompt = 512, bench_tokens = 128, repeats = 5, depth = 0;
    std::optional<double> temperature, top_p, min_p, repeat_penalty;
    std::optional<int> top_k;
    bool exact = false, raw = false, mtp = false, taps = false, force = false, allow_requantize = false;
    Display display;
    TokenizeOptions tokenize;
    int past = 0, top = 0;                               // of logits, and print
    std::vector<std::string> print;
    // of ranks
    double timeout = 60;
    int ranks_per_node = 0, redundant = 0;
    std::string dispatch = "f32", combine = "f32", combine_order = "expert", routing;
    std::vector<std::string> arguments;                  // the command line
    // of a pipeline, and of ranks on paper
    std::string schedule;
    int ranks = 8, microbatches = 20;
    Costs costs;
    bool plan = false, traffic = false;
};

constexpr int DEFAULT_CONTEXT = 32768;   // the length at which DeepSeek evaluates R1 and its distills

// The model in weights/, beside the program or above it.
inline fs::path shipped_model() {
    std::error_code error;
    fs::path here = fs::read_symlink("/proc/self/exe", error).parent_path();
    for (const fs::path& folder : {here, here.parent_path()})
        if (fs::exists(folder / "weights" / "tiny" / "config.json")) return folder / "weights" / "tiny";
    fail("no model: -m is missing, and there is no weights/tiny beside the program");
}

inline fs::path model_path(const Options& o) {
    fs::path model = o.model.empty() ? shipped_model() : fs::path(o.model);
    protect_model(model);
    return model;
}

inline Tokenizer open_tokenizer(const Options& o, const fs::path& model) {
    Tokenizer t = load_tokenizer(model);
    if (!o.chat_template.empty()) t.set_chat_template(o.chat_template);
    return t;
}

// Common checks; sets the number of threads and the kernels.
inline void prepare(const Options& o) {
    if (world.rank > 0) quiet = true;                    // rank 0 speaks
    if (o.device == "cuda" && !gpu)
        fail("--device cuda: this build has no CUDA (nvcc was not found when it was made)");
    if (o.device == "cuda" && o.arith != "f32") fail("--arith %s: not with --device cuda", o.arith.c_str());
    if (o.device == "cuda" && world.size > 1) fail("--device cuda: the ranks of mpirun compute on CPUs");
    int unasked = std::getenv("OMP_NUM_THREADS") ? omp_get_max_threads()
                                                 : std::max(1, world.share_of(processors()));
    set_threads(o.threads > 0 ? o.threads : unasked);
    const char* wish = std::getenv("DEEPSEEK_SIMD");
    choose_kernels(wish ? wish : "", o.exact);
    use_arith(o.arith == "fp8" ? Arith::FP8 : o.arith == "bf16" ? Arith::BF16 : Arith::F32);
}

// Where to compute: as asked, or else on a GPU where that can be; then a person at a terminal is told.
inline const Device& pick_device(const Options& o) {
    if (!gpu || o.device == "cpu" || world.size > 1) return CPU;
    const std::string why = o.arith == "f32" ? gpu->missing() : "--arith " + o.arith;
    if (o.device == "cuda" && !why.empty()) fail("--device cuda: %s", why.c_str());
    const Device& device = why.empty() ? *gpu : CPU;
    if (o.device == "auto" && isatty(STDERR_FILENO))
        notice(text_of("device: %s%s", device.name, why.empty() ? "" : (" (" + why + ")").c_str()));
    return device;
}

inline SessionOptions session_options(const Options& o, const Config& c, int default_context) {
    SessionOptions s;
    s.context = o.context > 0 ? o.context : std::min(c.max_context, default_context);
    s.chunk = std::min(std::max(o.chunk, 2), std::max(s.context, 2));   // 2: a token and a draft
    s.mla = o.mla == "naive" ? MlaForm::NAIVE : MlaForm::ABSORBED;
    s.kv = o.kv == "bf16" ? Dtype::BF16 : o.kv == "q8_0" ? Dtype::Q8_0 : REAL;
    for (int n : {cache_part_width(c), c.Rkv})           // MLA's values are the first Rkv numbers of a row
        if (n % format_of(s.kv).values)
            fail("--kv %s: a cache row has %d numbers, which is no multiple of 32", o.kv.c_str(), n);
    if (s.context > c.max_context)
        fail("--ctx %d: the model's context is %d tokens", s.context, c.max_context);
    return s;
}

inline Generation make_generation(const Options& o, const fs::path& folder, const Config& c,
                                  const Tokenizer& t) {
    auto [defaults, eos] = read_generation_config(folder, c, t.eos);
    Generation g;
    g.sampling = {o.temperature.value_or(defaults.temperature), o.top_p.value_or(defaults.top_p),
                  o.min_p.value_or(defaults.min_p), o.top_k.value_or(defaults.top_k),
                  o.repeat_penalty.value_or(defaults.repeat_penalty)};
    g.stops = eos;
    if (o.max_tokens >= 0) g.max_tokens = o.max_tokens;
    g.think_begin = t.token_id("<think>"), g.think_end = t.token_id("</think>");
    g.think_budget = o.think_budget;
    if (g.think_budget >= 0 && g.think_end < 0) fail("--think-budget: this model has no token </think>");
    g.drafting = o.mtp ? &MTP_DRAFTS : nullptr;
    if (o.mtp && c.n_mtp == 0) fail("--mtp: %s has no MTP module", folder.c_str());
    if (o.mtp && o.display.logprobs) fail("--logprobs: not with --mtp");
    if (o.display.logprobs && !o.display.json) fail("--logprobs: goes with --json");
    if (o.display.json && o.display.answer_only) fail("--answer-only: --json has the answer apart");
    g.rng.state = o.seed == "-1" ? std::random_device()() : std::stoull(o.seed);
    if (o.seed == "-1") notice(text_of("seed %ju", uintmax_t(g.rng.state)));
    return g;
}

// One line on stderr, whatever bytes a file or an argument brought into the message.
inline int complain(std::string message) {
    message.resize(std::min(message.size(), size_t(1000)));
    std::replace_if(message.begin(), message.end(), [](char c) { return uint8_t(c) < 32; }, ' ');
    std::fflush(stdout);
    std::fprintf(stderr, "deepseek: %s\n", disarmed(message).c_str());
    return 1;
}

// -- 2  ranks ------------------------------------------------------------------------------------

// What must be the same on all ranks: the program, what it is asked for, the model. Not where the model lies,
// nor the number of threads.
inline void require_same_run(const Options& o, const fs::path& model) {
    if (world.size == 1) return;
    Fnv1a words;
    for (size_t i = 0; i < o.arguments.size(); i++) {
        const std::string& word = o.arguments[i];
        if (word == "-m" || word == "--model" || word == "-t" || word == "--threads") i++;
        else if (!word.starts_with("--model=") && !word.starts_with("--threads="))
            words.add(word.c_str(), word.size() + 1);
    }
    Mapping program("/proc/self/exe");
    world.require_same("build", sample(program.data(), program.size(), program.size()));
    world.require_same("command line", words.h);
    const Model opened = open_model(model);
    world.require_same("model", fingerprint(opened) ^ fingerprint(opened.config));
}

// Copies of experts on R ranks, by the loads of the layers that have any.
inline Placement balanced(const std::map<int, std::vector<double>>& load, Placement even, int redundant,
                          int groups, int per_node) {
    const int P = even.E + redundant, nodes = (even.R + per_node - 1) / per_node;
    if (P % even.R)
        fail("--redundant-experts %d: %d experts are not equally many on %d ranks", redundant, P, even.R);
    const bool equal = even.R % per_node == 0;
    for (int r = 0; r <= even.R; r++) even.first[size_t(r)] = P / even.R * r;
    for (size_t l = 0; l < even.expert.size(); l++) {
        const auto found = load.find(int(l));
        const bool known = found != load.end();
        const std::vector<double> of = known ? found->second : std::vector<double>(size_t(even.E));
        even.expert[l] = rebalance_experts(of, P, equal ? std::max(groups, 1) : 1, equal ? nodes : 1, even.R);
    }
    return even;
}

// The loads of each layer's experts, as bench --traffic writes them.
inline std::map<int, std::vector<double>> read_loads(const std::string& path, int layers, int E) {
    Mapping mapping(path);
    std::map<int, std::vector<double>> out;
    const TensorFile parsed = parse_safetensors({mapping.data(), mapping.size()}, path);
    const std::vector<uint64_t> shape = {uint64_t(layers), uint64_t(E)};
    for (const TensorInfo& t : parsed.tensors) {
        if (t.name != "expert_load" || t.dtype != "F32" || t.shape != shape) continue;
        for (int i = 0; i < layers * E; i++) {
            const float load = ::load<float>(mapping.data() + parsed.data_begin + t.begin + 4 * size_t(i));
            if (!(load >= 0 && load < 1e30f)) refuse(path, "holds a load that is no number of tokens");
            out[i / E].push_back(double(load));
        }
    }
    if (out.empty()) refuse(path, "no tensor 'expert_load' of F32 (%d, %d)", layers, E);
    return out;
}

// Which rank has which experts; from here on, what is loaded is this rank's.
inline Placement place_experts(const Options& o, const fs::path& model, const Config& c) {
    require_same_run(o, model);
    if (c.E && world.size > c.E) fail("%d ranks: the model has %d experts a layer", world.size, c.E);
    const int layers = c.n_layers + c.n_mtp;
    Placement p = Placement::even(layers, c.E, world.size);
    if (o.redundant && o.routing.empty())
        fail("--redundant-experts: copies of which? --routing FILE says it (bench --traffic --out)");
    if (!o.routing.empty() && c.E) {
        const int per_node = o.ranks_per_node ? o.ranks_per_node : world.size;
        p = balanced(read_loads(o.routing, layers, c.E), p, o.redundant, c.n_group, per_node);
    }
    if (world.size > 1) has_expert = [p](int l, int e) { return p.has(world.rank, l, e); };
    return p;
}

inline Trip trip_of(const Options& o, int ranks) {
    auto dtype = [](const std::string& name) {
        return name == "fp8" ? Dtype::F8_E4M3 : name == "bf16" ? Dtype::BF16 : REAL;
    };
    Trip trip{{ranks, o.ranks_per_node ? o.ranks_per_node : ranks, nullptr}, 0, 0, dtype(o.dispatch),
              dtype(o.combine)};
    trip.order = o.combine_order == "rank" ? CombineOrder::RANK
        : o.combine_order == "hierarchical" ? CombineOrder::HIERARCHICAL : CombineOrder::EXPERT;
    return trip;
}

// One rank that asks for nothing of a way needs none.
inline std::unique_ptr<ExpertRanks> make_crew(const Options& o, Model& m, const Placement& p) {
    const bool asked = o.dispatch != "f32" || o.combine != "f32" || o.combine_order != "expert";
    if (world.size == 1 && (!asked || m.config.E == 0)) return nullptr;
    return std::make_unique<ExpertRanks>(world, m, p, trip_of(o, world.size));
}

// A rank without requests of its own.
inline void serve_experts(const Options& o) {
    const fs::path folder = model_path(o);
    const Config c = read_config(folder);
    const SessionOptions options = session_options(o, c, DEFAULT_CONTEXT);
    const Placement placement = place_experts(o, folder, c);
    Model model = load_planned(folder, o.quant, c, options, CPU);
    make_crew(o, model, placement)->finish();
}

// -- 3  run, chat --------------------------------------------------------------------------------

// Model, tokenizer and session of run, chat and perplexity. All that can be wrong is found before the
// weights are loaded.
struct Talk {
    const Options& o;
    fs::path folder;
    Config config;
    Tokenizer tokenizer;
    Generation generation;
    SessionOptions options;
    const Device& device;
    std::unique_ptr<AtomicFile> kv;
    Placement placement;
    Model model;
    std::unique_ptr<ExpertRanks> crew;
    std::unique_ptr<Session> session;
    std::optional<Conversation> conversation;

    explicit Talk(const Options& o)
        : o(o), folder(model_path(o)), config(read_config(folder)), tokenizer(open_tokenizer(o, folder)),
          generation(make_generation(o, folder, config, tokenizer)),
          options(session_options(o, config, DEFAULT_CONTEXT)), device(pick_device(o)) {
        if (tokenizer.vocab_size() > config.V)
            fail("%s: tokenizer.json has ids up to %d, config.json has 'vocab_size' %d", folder.c_str(),
                 tokenizer.vocab_size() - 1, config.V);
        if (!simdjson::validate_utf8(o.system)) fail("--system: not valid UTF-8");
        for (const std::string& text : o.display.stops)
            if (!simdjson::validate_utf8(text)) fail("--stop: not valid UTF-8");
        if (!o.save_kv.empty()) kv = std::make_unique<AtomicFile>(o.save_kv, o.force);
        placement = place_experts(o, folder, config);
        model = load_planned(folder, o.quant, config, options, device);
        crew = make_crew(o, model, placement);
        session = std::make_unique<Session>(model, options, device);
        session->crew = crew.get();
        if (!o.load_kv.empty()) load_cache(*session, o.load_kv);
        conversation.emplace(Conversation{*session, tokenizer, generation, o.display, generation.rng.state});
        set_system(o.system);
    }
    void set_system(const std::string& text) {
        std::vector<Message>& all = conversation->messages;
        std::erase_if(all, [](const Message& m) { return m.role == "system"; });
        if (!text.empty()) all.insert(all.begin(), {"system", text, {}});
    }
    void clear() { conversation->messages.clear(), set_system(o.system); }
    void save() { if (kv) save_cache(*session, *kv), kv.reset(); }
    void finish() { if (crew) crew->finish(); }
};

// What Ctrl-C ended is over, and what there is has been shown and saved.
inline void exit_if_interrupted(bool so) { if (so) throw CLI::RuntimeError(130); }

inline std::string prompt_of(const Options& o) {
    bool dash = o.dash == "-" || o.file == "-", file = !o.file.empty() && o.file != "-";
    if (!o.dash.empty() && o.dash != "-")
        fail("run: unexpected argument '%s' (a prompt is given with -p)", o.dash.c_str());
    if (dash + !o.prompt.empty() + file != 1 || (!o.dash.empty() && !o.file.empty()))
        fail("run: give one prompt: -p TEXT, -f FILE, or - for stdin");
    if (!dash && !file) return o.prompt;
    std::string prompt = dash ? read_stream(std::cin, "stdin", TEXT_LIMIT) : read_file(o.file);
    if (!o.raw && prompt.ends_with('\n')) prompt.pop_back();             // an editor's, not the question's
    if (!o.raw && prompt.ends_with('\r')) prompt.pop_back();
    if (prompt.empty()) fail("run: the prompt is empty");
    return prompt;
}

inline void command_run(const Options& o) {
    if (world.rank > 0) return serve_experts(o);
    std::string prompt = prompt_of(o);
    if (o.raw && !o.system.empty()) fail("--system has no place in a --raw prompt");
    Talk talk(o);
    if (o.raw) talk.conversation->reply(prompt, true);
    else talk.conversation->ask(prompt);
    talk.save();
    exit_if_interrupted(talk.conversation->stop == Stop::INTERRUPTED);
    talk.finish();
}

// A line of a person at a terminal that is a command. False: it ends the chat.
inline bool chat_command(Talk& talk, const std::string& line) {
    const size_t blank = std::min(line.find(' '), line.size());
    const std::string name = line.substr(0, blank), rest = line.substr(std::min(blank + 1, line.size()));
    const bool file = name == "/save" || name == "/load";
    if (file && rest.empty()) fail("%s: which FILE?", name.c_str());
    if (name == "/exit" || name == "/quit") return false;
    if (name == "/clear") talk.clear();
    else if (name == "/retry") talk.conversation->retry();
    else if (name == "/system") talk.set_system(rest);
    else if (name == "/save") save_conversation(*talk.conversation, rest, talk.o.force);
    else if (name == "/load") load_conversation(*talk.conversation, rest);
    else if (name == "/help")
        std::fputs("/clear          forget the conversation, but for --system\n"
                   "/retry          ask the last question again\n"
                   "/system TEXT    another system message; without TEXT none\n"
                   "/save FILE      the messages as JSON, and the cache in FILE.kv\n"
                   "/load FILE      go on with those\n"
                   "/exit           end (also Ctrl-D)\n"
                   "A line that ends with \\ goes on in the next; \"\"\" begins and ends several lines. "
                   "Ctrl-C ends an answer.\n", stderr);
    else fail("no command %s (/help lists them; a blank before it makes it a question)", name.c_str());
    return true;
}

// One turn; what is wrong with it is said, and the conversation goes on. False: it ends here. `commands`:
// they are known; several lines are none
inline bool take_turn(Talk& talk, const std::string& turn, bool commands) {
    const bool command = commands && turn.starts_with('/') && turn.find('\n') == turn.npos;
    bool on = true, asks = !command || turn == "/retry";
    if (turn.find_first_not_of(" \n\r\t") == turn.npos) return true;
    try {
        if (command) on = chat_command(talk, turn);
        else talk.conversation->ask(turn);
    } catch (const BrokenModel&) {
        throw;
    } catch (const LostRank&) {
        throw;
    } catch (const std::runtime_error& e) {
        complain(e.what());
    }
    if (asks && talk.conversation->stop == Stop::CONTEXT && talk.conversation->messages.size() > 1)
        notice(commands ? "the context is full: /clear begins anew" : "the context is full");
    return on;
}

// The lines of a pipe or a file, until that or a signal ends.
inline void take_lines(Talk& talk) {
    for (std::string bytes; !interrupted;) {
        size_t end = 0, seen = 0;
        bool more = true;
        while ((end = bytes.find('\n', seen)) == bytes.npos && more)
            seen = bytes.size(), more = more_input(bytes, [] {});
        if (interrupted || (!more && bytes.empty())) return;
        std::string line = bytes.substr(0, end);
        bytes.erase(0, std::min(line.size() + 1, bytes.size()));
        if (line.ends_with('\r')) line.pop_back();
        take_turn(talk, line, false);
    }
}

inline void chat_turns(Talk& talk) {
    if (!isatty(STDIN_FILENO) || !isatty(STDERR_FILENO)) return take_lines(talk);
    notice(text_of("%s: %s, context %d", talk.folder.c_str(), talk.config.model_type.c_str(),
                   talk.options.context));
    notice("/help lists the commands; Ctrl-C ends an answer, Ctrl-D the chat");
    LineEditor editor;
    while (std::optional<std::string> turn = read_turn(editor)) {
        if (!take_turn(talk, *turn, true) || ended_by) return;
        interrupted = 0;                 // Ctrl-C ends an answer; at the prompt it ends the chat
    }
}

inline void command_chat(const Options& o) {
    if (world.rank > 0) return serve_experts(o);
    Talk talk(o);
    Heed heed;
    try {
        chat_turns(talk);
    } catch (...) {
        talk.save();
        throw;
    }
    talk.save();
    exit_if_interrupted(interrupted);
    talk.finish();
}

// -- 4  tokenize, logits, perplexity, quantize ---------------------------------------------------

inline void command_tokenize(const Options& o) {
    if (o.tokenize.decode && o.tokenize.chat) fail("tokenize: --decode and --chat exclude each other");
    if (o.tokenize.as_ids && !o.tokenize.chat) fail("tokenize: --ids goes with --chat");
    Tokenizer tokenizer = open_tokenizer(o, model_path(o));
    if (!o.tokenize.lines) {
        std::string out = tokenize(tokenizer, read_stream(std::cin, "stdin", TEXT_LIMIT), o.tokenize);
        bool text = o.tokenize.decode || (o.tokenize.chat && !o.tokenize.as_ids);
        if (text && o.display.json) out = json_quote(out);
        else if (text && on_terminal(STDOUT_FILENO)) out = disarmed(out);
        std::cout << out << (text && !o.display.json ? "" : "\n") << std::flush;   // a text: exactly
        return;
    }
    size_t number = 1;
    for (std::string line; std::getline(std::cin, line); number++) {
        try {
            std::cout << tokenize(tokenizer, line, o.tokenize) << '\n' << std::flush;
        } catch (const std::runtime_error& e) {
            fail("line %zu: %s", number, e.what());
        }
    }
}

// 1,2,3 or [1, 2, 3]
inline std::vector<int> parse_id_list(const std::string& text, int V) {
    auto trimmed = [](std::string s) {
        s.erase(0, s.find_first_not_of(' '));
        return s.erase(s.find_last_not_of(' ') + 1);
    };
    std::vector<int> ids;
    std::string list = trimmed(text);
    if (list.starts_with('[') && list.ends_with(']')) list = list.substr(1, list.size() - 2);
    std::stringstream in(list + ",");                    // so that nothing after a last comma is an item too
    for (std::string item; std::getline(in, item, ',');) {
        item = trimmed(item);
        bool digits = !item.empty() && item.find_first_not_of("0123456789") == item.npos && item.size() <= 9;
        if (!digits) fail("--ids: '%s' is not a token id", Fields::printable(item).c_str());
        int id = std::stoi(item);
        if (id >= V) fail("--ids: %d is outside the vocabulary of %d", id, V);
        ids.push_back(id);
    }
    return ids;
}

inline bool has_tokenizer(const fs::path& model) {
    if (is_gguf(model)) return open_gguf(model).keys.has("tokenizer.ggml.tokens");
    return fs::exists(model / "tokenizer.json");
}

inline void command_logits(const Options& o) {
    if (world.rank > 0) return serve_experts(o);
    fs::path folder = model_path(o);
    Config c = read_config(folder);
    if (o.out.empty() && !o.top && o.print.empty()) fail("logits: give --out FILE, --top K or --print NAME");
    if (o.ids.empty() == o.prompt.empty()) fail("logits: give a prompt, by -p TEXT or by --ids 1,2,3");
    if (o.display.json && (!o.top || !o.print.empty()))
        fail("logits: --json goes with --top, and not with --print");
    std::optional<Tokenizer> tokenizer;
    if (!o.prompt.empty() || (o.top && has_tokenizer(folder))) tokenizer.emplace(load_tokenizer(folder));
    std::vector<int> ids = tokenizer && !o.prompt.empty()
        ? encode_prompt(*tokenizer, o.prompt, tokenizer->add_bos) : parse_id_list(o.ids, c.V);
    const int T = int(ids.size());
    for (int id : ids) if (id >= c.V) fail("-p: token %d is outside the vocabulary of %d", id, c.V);
    if (T > c.max_context) fail("-p, --ids: %d tokens, the model's context is %d", T, c.max_context);
    if (o.past >= T) fail("--past %d: nothing is left of %d tokens", o.past, T);
    SessionOptions options = session_options(o, c, T);
    options.chunk = std::min(o.chunk, T);
    const bool taps = o.taps || !o.print.empty();
    const Device& device = pick_device(o);
    std::optional<AtomicFile> file;
    if (!o.out.empty()) file.emplace(o.out, o.force);
    const Placement placement = place_experts(o, folder, c);
    Model model = load_planned(folder, o.quant, c, options, device, {c, options.mla, T - o.past, taps});
    const std::unique_ptr<ExpertRanks> crew = make_crew(o, model, placement);
    Session s(model, options, device);
    s.tokens = ids, s.crew = crew.get();
    Progress progress("reading", ids.size(), " tokens");
    Inside in = look_inside(s, o.past, taps, [&](size_t n) { progress.at(n); });
    const Tokenizer* words = tokenizer ? &*tokenizer : nullptr;
    std::string text = o.top ? likeliest(in, ids, o.top, words, o.display.json) : "";
    for (const std::string& name : o.print) text += text_of(in.tensors(true), name);
    std::map<std::string, std::string> about = about_pass(s, o.past);
    Utf8Stream path;                                     // of what bytes a path may have
    about["model"] = path.push(folder.native()), about["model"] += path.finish();
    about["quant"] = o.quant;
    if (crew) crew->finish();
    if (file) write_safetensors(*file, in.tensors(o.taps), about);
    std::cout << text;
}

inline void command_perplexity(const Options& o) {
    bool dash = o.file == "-";
    if (dash && world.size > 1) fail("perplexity: of several ranks only one has stdin; give -f FILE");
    std::string text = dash ? read_stream(std::cin, "stdin", TEXT_LIMIT) : read_file(o.file);
    Talk talk(o);
    if (talk.options.context < 2) fail("%s: a context of one token predicts nothing", talk.folder.c_str());
    std::vector<int> ids = talk.tokenizer.encode(text);
    int bos = talk.tokenizer.add_bos ? talk.tokenizer.bos : -1;
    if (ids.size() + (bos >= 0) < 2) fail("%s: too short: %zu tokens", o.file.c_str(), ids.size());
    Progress progress("reading", ids.size(), " tokens");
    std::vector<Perplexity> windows = perplexities(*talk.session, ids, bos, size_t(world.rank),
                                                   size_t(world.size), [&](size_t n) { progress.at(n); });
    talk.finish(), world.collect(windows);
    const Perplexity p = sum(windows);
    double nll = p.nll / double(std::max<int64_t>(p.tokens, 1));
    const char* format = o.display.json ? "{\"tokens\":%lld,\"nll\":%.6f,\"perplexity\":%.6f}\n"
                                        : "tokens %lld  nll %.6f  perplexity %.6f\n";
    std::printf(format, static_cast<long long>(p.tokens), nll, std::exp(nll));
}

inline void command_quantize(const Options& o) {
    if (o.quant != "none") fail("quantize: the type of the weights is given with --type");
    if (o.type == "fp8") fail("--type fp8: not in GGUF files (--quant fp8 makes such weights while loading)");
    fs::path source = model_path(o);
    const FileType& type = file_type(o.type == "q4_k" ? "q4_k_m" : o.type);
    AtomicFile file(o.out, o.force);
    Model model = load_model(source);                    // finds what is wrong with it
    if (is_quantised(model.checkpoint) && !o.allow_requantize)
        refuse(source, "its weights are quantised; --allow-requantize adds the errors of another type");
    Progress progress("writing", 100, " %");
    auto at = [&](uint64_t done, uint64_t total) {
        progress.at(size_t(100 * done / std::max<uint64_t>(total, 1)));
    };
    const GenerationConfig generation = read_generation_config(source, model.config, -1);
    write_gguf(file, model.checkpoint, model.config, source, type, generation, at);
    const Bill bill = make_bill(model.config, source, REAL);
    const uint64_t bytes = fs::file_size(o.out);
    const double bits = 8 * double(bytes) / double(bill.total + bill.mtp);
    if (o.display.json)
        std::printf("{\"file\":%s,\"type\":\"%s\",\"bytes\":%ju,\"bits_per_weight\":%.3f}\n",
                    json_quote(o.out).c_str(), type.name, uintmax_t(bytes), bits);
    else notice(o.out + text_of(": %.3f GB, %s, %.2f bits a weight", gigabytes(bytes), type.name, bits));
}

// -- 5  bench --traffic --------------------------------------------------------------------------

// Which experts tokens went to.
struct Recording {
    std::string name;
    int layers, E, K, D, groups;
    std::map<int, std::vector<int>> idx;                 // layer -> (T, K)

    int tokens() const { return idx.empty() ? 0 : int(idx.begin()->second.size()) / K; }
    std::vector<double> load(int layer) const {
        std::vector<double> out(static_cast<size_t>(E));
        for (int e : idx.at(layer)) out[size_t(e)]++;
        return out;
    }
};

// Writes down where a session's tokens go, and computes as without it.
struct Recorder : Crew {
    std::map<int, std::vector<int>> idx;
    void begin(Pass) override {}
    void experts(Session& s, const Moe& w, int l, int T) override {
        const Config& c = s.model.config;
        Activations& a = s.a;
        idx[l].insert(idx[l].end(), a.expert_idx, a.expert_idx + T * c.K);
        dispatch(a.first, a.slot, a.slot_token, a.expert_idx, T, c.K, c.E);
        run_experts(
            {a.u, T, c.K, a.first, a.slot_token, a.expert_in, a.expert_out, a.expert_in, a.gate, a.up}, w);
    }
};

inline Recording record_model(const Options& o, const fs::path& folder, const Config& c) {
    std::vector<int> ids(size_t(o.bench_prompt), 0);
    for (size_t i = 0; i < ids.size(); i++) ids[i] = int(i * 7919 % size_t(c.V));
    if (!o.file.empty()) ids = load_tokenizer(folder).encode(read_file(o.file));
    if (ids.empty()) fail("bench: no tokens to route");
    ids.resize(std::min(ids.size(), size_t(c.max_context)));
    const SessionOptions options = session_options(o, c, int(ids.size()));
    Model model = load_planned(folder, o.quant, c, options, CPU);
    Session s(model, options);
    Recorder recorder;
    s.crew = &recorder;
    prefill(s, ids, 0, [](int, int) {});
    return {folder.lexically_normal().string(), c.n_layers + c.n_mtp, c.E, c.K, c.D, c.n_group,
            std::move(recorder.idx)};
}

// V3's gate on random logits; `skew`: as words of a language, a few experts are asked most.
inline Recording record_random(const char* name, double skew) {
    const GateShape g{256, 8, 8, 4, Affinity::SIGMOID, true, true, 2.5};
    constexpr int T = 4096;
    Rng rng{7};
    Vector logits(size_t(T) * size_t(g.E)), affinity(logits), choice(logits), bias(size_t(g.E));
    Vector weight(size_t(T) * size_t(g.K)), group_score(size_t(T) * size_t(g.n_group));
    std::vector<int> idx(weight.size());
    for (size_t i = 0; i < logits.size(); i++) {
        const double noise = -std::log(-std::log(std::max(rng.uniform(), 1e-300)));
        logits[i] = real(noise - skew * std::log(1 + double(i % size_t(g.E) * 37 % size_t(g.E))));
    }
    gate_noaux_tc({T, logits.data(), affinity.data(), choice.data(), idx.data(), weight.data(),
                   group_score.data()}, bias.data(), g);
    return {name, 1, g.E, g.K, 7168, g.n_group, {{0, idx}}};
}

// What ranks send, counted on ranks that are threads and computed from the layout: nodes, ranks and bytes of
// all tokens.
struct Sent {
    Traffic there, back, computed;
    uint64_t nodes = 0, ranks = 0, tokens = 0;
    int most_nodes = 0;
};

inline void compute_traffic(Sent& sent, const Trip& v, const int* idx, int T, int rank) {
    const RankShape& s = v.shape;
    std::vector<int> per_rank(size_t(s.R)), per_node(size_t(s.nodes())), per_expert(size_t(s.first[s.R]));
    std::vector<uint8_t> in_rank(size_t(T) * size_t(s.R));
    dispatch_layout({per_rank.data(), per_node.data(), per_expert.data(), in_rank.data()}, idx, T, v.K, s);
    for (int n : per_node) sent.nodes += uint64_t(n);
    for (int n : per_rank) sent.ranks += uint64_t(n);
    sent.tokens += uint64_t(T);
    for (int n = 0; n < s.nodes(); n++) {
        if (n != s.node(rank)) sent.computed.slow += uint64_t(per_node[size_t(n)]) * v.packet();
        for (int r = s.begin(n); r < s.end(n); r++)      // all but who hands on what it has itself
            if (r != s.forwarder(rank, n)) sent.computed.fast += uint64_t(per_rank[size_t(r)]) * v.packet();
    }
    for (int t = 0; t < T; t++) {
        int nodes = 0;
        for (int n = 0; n < s.nodes(); n++) {
            const uint8_t* ranks = in_rank.data() + int64_t(t) * s.R;
            nodes += *std::max_element(ranks + s.begin(n), ranks + s.end(n));
        }
        sent.most_nodes = std::max(sent.most_nodes, nodes);
    }
}

inline Sent count_traffic(const Recording& recording, Trip v, const Placement& p, int layer) {
    const std::vector<int>& idx = recording.idx.at(layer);
    const int T = recording.tokens(), R = p.R;
    v.shape.R = R, v.shape.first = p.first.data(), v.K = recording.K, v.D = recording.D;
    Sent all;
    std::mutex mutex;
    on_ranks(R, [&](Wire& wire) {
        const int begin = int(int64_t(T) * wire.rank / R), end = int(int64_t(T) * (wire.rank + 1) / R);
        const int n = end - begin;
        const Vector x(size_t(n) * size_t(v.D)), weight(size_t(n) * size_t(v.K));
        Received got;
        dispatch(got, wire, v, x.data(), idx.data() + begin * v.K, weight.data(), n);
        const Vector made(got.row.size() * size_t(v.D));
        Vector rows(size_t(n) * size_t(v.K) * size_t(v.D)), factor(weight);
        bring_home(rows.data(), factor.data(), n, wire, v, got, made.data());
        std::lock_guard lock(mutex);
        all.there.slow += got.there.slow, all.there.fast += got.there.fast;
        all.back.slow += got.back.slow, all.back.fast += got.back.fast;
        compute_traffic(all, v, idx.data() + begin * v.K, n, wire.rank);
    });
    return all;
}

inline void traffic_line(const Options& o, const Recording& recording, int R, int per_node) {
    Options asked = o;
    asked.ranks_per_node = per_node;
    Sent sum;
    for (auto& [layer, idx] : recording.idx) {
        const Placement even = Placement::even(1, recording.E, R);
        const Sent one = count_traffic(recording, trip_of(asked, R), even, layer);
        for (auto part : {&Sent::there, &Sent::back, &Sent::computed})
            (sum.*part).slow += (one.*part).slow, (sum.*part).fast += (one.*part).fast;
        sum.nodes += one.nodes, sum.ranks += one.ranks, sum.tokens += one.tokens;
        sum.most_nodes = std::max(sum.most_nodes, one.most_nodes);
    }
    const double n = double(sum.tokens), nodes = double(sum.nodes) / n;
    CHECK(sum.there.slow == sum.computed.slow && sum.there.fast == sum.computed.fast, "bytes differ");
    std::printf("{\"test\":\"traffic\",\"routing\":%s,\"tokens\":%d,\"layers\":%zu,\"ranks\":%d,"
                "\"ranks_per_node\":%d,\"dispatch\":\"%s\",\"combine\":\"%s\",\"combine_order\":\"%s\","
                "\"nodes_per_token\":%.3f,\"most_nodes\":%d,\"ranks_per_token\":%.3f,"
                "\"experts_per_node\":%.3f,\"hidden_up_to\":3.2,"
                "\"bytes_per_token\":{\"dispatch_slow\":%.1f,\"dispatch_slow_computed\":%.1f,"
                "\"dispatch_fast\":%.1f,\"dispatch_fast_computed\":%.1f,\"combine_slow\":%.1f,"
                "\"combine_fast\":%.1f}}\n",
                json_quote(recording.name).c_str(), recording.tokens(), recording.idx.size(), R, per_node,
                o.dispatch.c_str(), o.combine.c_str(), o.combine_order.c_str(), nodes, sum.most_nodes,
                double(sum.ranks) / n, recording.K / nodes, double(sum.there.slow) / n,
                double(sum.computed.slow) / n, double(sum.there.fast) / n, double(sum.computed.fast) / n,
                double(sum.back.slow) / n, double(sum.back.fast) / n);
}

// The most loaded rank's work, in that of the mean, of one layer.
inline double imbalance(const Placement& p, int layer, const std::vector<double>& load) {
    std::vector<double> copies(load.size());
    double most = 0, sum = 0;
    for (int e : p.expert[size_t(layer)]) copies[size_t(e)]++;
    for (int r = 0; r < p.R; r++) {
        double work = 0;
        for (int e : p.of(r, layer)) work += load[size_t(e)] / copies[size_t(e)];
        most = std::max(most, work), sum += work;
    }
    return sum > 0 ? most * p.R / sum : 1;
}

inline void load_line(const Options& o, const Recording& recording, int R, int per_node, int redundant) {
    const int layers = recording.layers;
    std::map<int, std::vector<double>> load;
    for (auto& [layer, idx] : recording.idx) load[layer] = recording.load(layer);
    const Placement before = Placement::even(layers, recording.E, R);
    const Placement after = balanced(load, before, redundant, recording.groups, per_node);
    double mean[2] = {}, worst[2] = {};
    for (auto& [layer, of] : load) {
        const double got[2] = {imbalance(before, layer, of), imbalance(after, layer, of)};
        for (int i : {0, 1}) mean[i] += got[i] / double(load.size()), worst[i] = std::max(worst[i], got[i]);
    }
    std::printf("{\"test\":\"load\",\"routing\":%s,\"ranks\":%d,\"ranks_per_node\":%d,\"redundant\":%d,"
                "\"most_over_mean\":{\"before\":%.3f,\"after\":%.3f,\"worst_before\":%.3f,"
                "\"worst_after\":%.3f}}\n", json_quote(recording.name).c_str(), R, per_node, redundant,
                mean[0], mean[1], worst[0], worst[1]);
    if (o.out.empty() || recording.name.starts_with("random")) return;
    Vector all(size_t(layers) * size_t(recording.E));
    for (auto& [layer, of] : load) std::copy(of.begin(), of.end(), all.begin() + layer * recording.E);
    const std::vector<float> stored(all.begin(), all.end());
    AtomicFile file(o.out, o.force);
    write_safetensors(file, {{{"expert_load", "F32", {size_t(layers), size_t(recording.E)}, stored.data(),
                               4 * stored.size()}}});
}

// DeepEP's low-latency kernels on H800, 128 tokens a rank, top-8, 7168 numbers, FP8 there and BF16 back, by
// bandwidth and latency: bytes to other ranks over NVLink (one node; 200 GB/s) or over a 400 Gb/s card (50
// GB/s; the node's own eighth stays), and 40 us for launch, flags and the way. Published: DeepEP's README.
inline void predicted_lines() {
    struct Published { int ranks; double dispatch, combine; };
    constexpr Published PUBLISHED[] = {{8, 77, 114}, {16, 118, 195}, {32, 155, 273},
                                       {64, 173, 314}, {128, 192, 369}, {256, 194, 360}};
    const double there = 128 * 8 * (7168 + 4 * 56 + 16), back = 128 * 8 * 2 * 7168;
    for (const Published& p : PUBLISHED) {
        const double share = p.ranks == 8 ? 7 / 8.0 : 1 - 8.0 / p.ranks, speed = p.ranks == 8 ? 200e3 : 50e3;
        std::printf("{\"test\":\"deepep low latency\",\"ranks\":%d,\"predicted_us\":{\"dispatch\":%.0f,"
                    "\"combine\":%.0f},\"published_us\":{\"dispatch\":%.0f,\"combine\":%.0f}}\n", p.ranks,
                    40 + there * share / speed, 40 + back * share / speed, p.dispatch, p.combine);
    }
}

inline void bench_traffic(const Options& o, const fs::path& folder, const Config& c) {
    if (world.size > 1) fail("bench --traffic: counts its ranks in one process; run it without mpirun");
    if (c.E == 0) fail("bench --traffic: %s has no experts", folder.c_str());
    const int R = o.ranks, per_node = o.ranks_per_node ? o.ranks_per_node : std::max(1, R / 2);
    if (R > c.E) fail("--ranks %d: the model has %d experts a layer", R, c.E);
    const Recording model = record_model(o, folder, c);
    traffic_line(o, model, R, per_node);
    load_line(o, model, R, per_node, o.redundant ? o.redundant : (R - c.E % R) % R);
    Options v3 = o;
    v3.dispatch = "fp8", v3.combine = "bf16", v3.combine_order = "hierarchical";
    const Recording even = record_random("random, V3's gate", 0);
    const Recording skewed = record_random("random, skewed", 0.5);
    traffic_line(v3, even, 64, 8);
    for (int redundant : {0, 32}) load_line(o, skewed, 32, 8, redundant);
    predicted_lines();
}

// -- 6  info, bench, check -----------------------------------------------------------------------

inline void command_info(const Options& o) {
    fs::path folder = model_path(o);
    Config c = read_config(folder);
    SessionOptions s = session_options(o, c, DEFAULT_CONTEXT);
    Bill b = make_bill(c, folder, s.kv);
    const Device& device = pick_device(o);
    MemoryPlan plan = memory_plan(weight_bytes(folder, c, o.quant, device), c, s, device);
    std::string chat = "none: no tokenizer";
    try {
        if (has_tokenizer(folder)) chat = open_tokenizer(o, folder).chat_template_name();
    } catch (const TokenizerError& e) {
        chat = std::string("none: ") + e.what();
    }
    show_remarks();
    if (o.display.json) return print_bill_json(c, b, s, plan, chat);
    print_bill(c, b, folder, chat);
    print_memory_plan(b, s, plan, o.quant);
}

// Seconds of one prefill of n tokens after a past of `depth`, or of n tokens one by one.
inline double time_tokens(Session& s, int n, bool one_by_one, int depth) {
    std::vector<int> ids;
    for (int64_t i = 0; i < n; i++) ids.push_back(int(i * 7919 % s.model.config.V));
    double start = seconds();
    int step = one_by_one ? 1 : n;
    auto logits = [&](int pos, int T) {
        if ((pos - depth + T) % step == 0) require_finite(last_logits(s, 1).data(), s.model.config.V);
    };
    with_team([&] {
        for (int i = 0; i < n; i += step)
            prefill(s, std::span(ids).subspan(size_t(i), size_t(step)), depth + i, logits);
    });
    return seconds() - start;
}

inline void bench_line(Session& s, const Options& o, const std::string& about, bool decode) {
    int n = decode ? o.bench_tokens : o.bench_prompt;
    if (n == 0) return;
    time_tokens(s, std::min(n, 8), decode, 0);           // warm up: page in the weights
    if (o.depth) time_tokens(s, o.depth, false, 0);      // the past
    double sum = 0, squares = 0;
    std::string list;
    for (int r = 0; r < o.repeats; r++) {
        double speed = world.size * n / time_tokens(s, n, decode, o.depth);    // each rank has a request
        list += text_of("%s%.2f", r ? ", " : "", speed);
        sum += speed, squares += speed * speed;
    }
    double mean = sum / o.repeats, variance = std::max(0.0, squares / o.repeats - mean * mean);
    double deviation = o.repeats > 1 ? std::sqrt(variance * o.repeats / (o.repeats - 1)) : 0;
    std::printf("{\"test\":\"%s\",\"n\":%d,\"depth\":%d,\"tokens_per_s\":[%s],\"mean\":%.2f,"
                "\"deviation\":%.2f,\"threads\":%d,%s\"quant\":\"%s\",\"arith\":\"%s\",\"kernels\":\"%s\","
                "\"device\":\"%s\"}\n",
                decode ? "decode" : "prefill", n, o.depth, list.c_str(), mean, deviation, n_threads(),
                about.c_str(), o.quant.c_str(), o.arith.c_str(), kernels.name, s.device.name);
    std::fflush(stdout);
}

inline void command_bench(const Options& o) {
    fs::path folder = model_path(o);
    Config c = read_config(folder);
    if (o.traffic) return bench_traffic(o, folder, c);
    int longest = std::max(o.bench_prompt, o.bench_tokens) + o.depth;
    if (longest > c.max_context) fail("bench: %d tokens, the model's context is %d", longest, c.max_context);
    SessionOptions options = session_options(o, c, std::max(longest, 1));
    const Device& device = pick_device(o);
    const Placement placement = place_experts(o, folder, c);
    Model model = load_planned(folder, o.quant, c, options, device);
    const std::unique_ptr<ExpertRanks> crew = make_crew(o, model, placement);
    Session s(model, options, device);
    s.crew = crew.get();
    Bill b = make_bill(c, folder, options.kv);
    std::string types;
    uint64_t bytes = 0;
    for (auto& [dtype, n] : b.bytes) types += (types.empty() ? "" : "+") + dtype, bytes += n;
    std::string about = text_of("\"model\":%s,\"parameters\":%ju,\"bytes\":%ju,\"type\":\"%s\",",
                                json_quote(folder.lexically_normal().string()).c_str(), uintmax_t(b.total),
                                uintmax_t(bytes), types.c_str());
    if (world.size > 1) about += text_of("\"ranks\":%d,", world.size);
    for (bool decode : {false, true}) bench_line(s, o, about, decode);
    if (crew) crew->finish();
}

inline void command_check(const Options& o) {
    if (o.display.json) fail("check: --json means nothing here");
    if (!check_twins) fail("check: this build has no CUDA, so there is nothing to compare");
    if (check_twins(o.section) > 0) throw CLI::RuntimeError(2);
}

// -- 7  pipeline ---------------------------------------------------------------------------------

constexpr std::pair<const char*, Schedule> SCHEDULES[] = {
    {"gpipe", Schedule::GPIPE}, {"1f1b", Schedule::ONE_F_ONE_B}, {"zb1p", Schedule::ZB1P},
    {"dualpipe", Schedule::DUALPIPE}, {"dualpipev", Schedule::DUALPIPEV}};

inline void command_pipeline(const Options& o) {
    const auto* found = std::find_if(std::begin(SCHEDULES), std::end(SCHEDULES),
                                     [&](auto& s) { return o.schedule == s.first; });
    const Plan plan = make_plan(found->second, o.ranks, o.microbatches);
    const Costs& costs = o.costs;
    std::optional<AtomicFile> file;
    if (!o.out.empty()) file.emplace(o.out, o.force);
    const Timetable t = run_plan(plan, costs);
    CHECK(t.wrong.empty(), "%s", t.wrong.c_str());
    const Measured m = measure(plan, costs, t);
    const Formula f = formula_of(plan, costs);
    if (file) {
        const std::string svg = timetable_svg(plan, costs, t);
        file->write(svg.data(), svg.size()), file->commit();
    }
    if (o.display.json) return void(std::cout << pipeline_json(plan, costs, t, m, f));
    double unit = t.end;
    for (double cost : {costs.f, costs.b, costs.w}) if (cost > 0) unit = std::min(unit, cost);
    std::cout << (o.plan ? plan_text(plan) : timetable_text(plan, costs, t, unit));
    const auto [least, most] = std::minmax_element(m.bubble.begin(), m.bubble.end());
    const auto [fewest, alive] = std::minmax_element(m.alive.begin(), m.alive.end());
    std::cout << text_of("time %g; bubble a rank %g to %g, by the formula %s = %g\n", t.end, *least, *most,
                         f.text, f.bubble)
              << text_of("memory a rank: parameters %dx; micro-batches alive %d to %d, the papers: %d\n",
                         f.parameters, *fewest, *alive, f.activations);
    if (costs.comm > 0)
        std::cout << text_of("communication %g, of which %.1f %% is hidden behind work\n", m.communication,
                             100 * m.hidden / m.communication);
}

// -- 8  what an option may be --------------------------------------------------------------------

// An empty path is a shell variable that was not set; it must not mean the default.
inline std::string check_path(const std::string& text) { return text.empty() ? "an empty path" : ""; }

// A number from `low` to `high`; `range` is how the message calls that.
template <class T>
std::function<std::string(const std::string&)> between(T low, T high, std::string range = "") {
    auto text = [](T x) { return std::is_integral_v<T> ? std::to_string(x) : text_of("%g", double(x)); };
    if (range.empty()) range = "from " + text(low) + " to " + text(high);
    return [low, high, range](const std::string& given) -> std::string {
        T value{};
        auto [end, error] = std::from_chars(given.data(), given.data() + given.size(), value);
        const char* kind = std::is_integral_v<T> ? "whole number" : "number";
        if (error == std::errc::invalid_argument || end != given.data() + given.size())
            return text_of("'%s' is no %s", given.c_str(), kind);
        bool inside = error == std::errc() && value >= low && value <= high;
        return inside ? "" : text_of("%s is not %s", given.c_str(), range.c_str());
    };
}
inline std::string check_seed(const std::string& text) {
    bool natural = !text.empty() && text.size() < 20 && text.find_first_not_of("0123456789") == text.npos;
    return natural || text == "-1" ? "" : "neither a natural number below 10^19 nor -1 (any): " + text;
}

// An option: its name, where the value goes, what that may be, what --help says.
template <class T, class Check>
CLI::Option* option(CLI::App* command, const char* name, T& to, const Check& check, const char* what) {
    CLI::Option* o = command->add_option(name, to, what);
    if constexpr (std::is_same_v<Check, CLI::IsMember>) return o->transform(check);      // in any case
    else return o->check(check);
}
inline CLI::IsMember one_of(const std::vector<std::string>& words) {
    return CLI::IsMember(words, CLI::ignore_case);
}

inline std::vector<std::string> type_names(bool none) {
    std::vector<std::string> names;
    if (none) names.push_back("none");
    for (const FileType& t : FILE_TYPES) names.push_back(t.name);
    return names;
}

// -- 9  the commands and their options -----------------------------------------------------------

// A command with the options that all commands have.
inline CLI::App* add_command(CLI::App& app, const char* name, const char* what, const char* example,
                             Options& o, void (*run)(const Options&)) {
    CLI::App* c = app.add_subcommand(name, what);
    c->footer(std::string("Example:\n  ") + example);
    c->callback([&o, c, run] {
        const bool ranks = c->get_option_no_throw("--timeout");
        if (world.rank > 0 && !ranks) return;            // one rank is enough for what has no experts
        world.timeout = o.timeout;
        prepare(o), run(o);
    });
    option(c, "-m,--model", o.model, check_path,
           "Hugging Face folder or GGUF file (default: the model in weights/)");
    option(c, "-t,--threads", o.threads, between(1, 4096), "threads (default: all cores)");
    option(c, "--device", o.device, one_of({"auto", "cpu", "cuda"}), "auto, cpu or cuda");
    option(c, "--quant", o.quant, one_of(type_names(true)), "quantise while loading: q8_0, q4_k, fp8, ...");
    option(c, "--kv", o.kv, one_of({"f32", "bf16", "q8_0"}), "store keys and values as f32, bf16 or q8_0");
    option(c, "--arith", o.arith, one_of({"f32", "bf16", "fp8"}),
           "f32, bf16 or fp8: what activations are rounded to");
    c->add_flag("--exact", o.exact, "dequantise weights, not multiply in integers; sum --arith fp8 in f64");
    c->add_flag("--json", o.display.json, "machine-readable result");
    c->add_flag("--quiet", quiet, "no statistics, no progress, no notices");
    return c;
}

const std::string TEMPLATES = "chat template: " + Tokenizer::template_names();
const auto COUNT = between(0, MOST), POSITIVE = between(1, MOST), COUNT_OR_ALL = between(-1, MOST);

inline void add_pass_options(CLI::App* c, Options& o) {
    option(c, "--mla", o.mla, one_of({"absorbed", "naive"}), "absorbed or naive");
    option(c, "--chunk", o.chunk, between(1, 65536), "tokens per prefill step (default: 512)");
}

// Of the commands that run a model.
inline void add_rank_options(CLI::App* c, Options& o) {
    option(c, "--timeout", o.timeout, between(1.0, 1e6), "with mpirun: seconds to wait for a rank (60)");
    option(c, "--ranks-per-node", o.ranks_per_node, POSITIVE, "ranks that share a machine (default: all)");
    option(c, "--dispatch", o.dispatch, one_of({"f32", "bf16", "fp8"}), "what travels to experts");
    option(c, "--combine", o.combine, one_of({"f32", "bf16"}), "what travels back");
    option(c, "--combine-order", o.combine_order, one_of({"expert", "rank", "hierarchical"}),
           "how results are added: expert (as one process does), rank, hierarchical");
    option(c, "--redundant-experts", o.redundant, COUNT, "copies of those that are asked most");
    option(c, "--routing", o.routing, check_path, "by which loads: a file of bench --traffic --out");
}

inline void add_generation_options(CLI::App* c, Options& o) {
    option(c, "-n", o.max_tokens, COUNT_OR_ALL, "at most N tokens (default: -1, until the model ends)");
    option(c, "--temp", o.temperature, between(0.0, 100.0), "temperature, 0: greedy");
    option(c, "--top-p", o.top_p, between(1e-9, 1.0, "above 0 and at most 1 (--temp 0 is greedy)"),
           "likeliest tokens that hold this share");
    option(c, "--top-k", o.top_k, COUNT, "K likeliest tokens, 0: all");
    option(c, "--min-p", o.min_p, between(0.0, 1.0), "at least so likely, relative to the best");
    option(c, "--repeat-penalty", o.repeat_penalty, between(0.01, 100.0),
           "make tokens of the text so far less likely, 1: no");
    option(c, "-s,--seed", o.seed, check_seed, "seed of the random numbers (default: 0), -1: any");
    option(c, "-c,--ctx", o.context, POSITIVE, "tokens of context (default: the model's, at most 32768)");
    c->add_option("--system", o.system, "system message");
    option(c, "--chat-template", o.chat_template, check_path, TEMPLATES.c_str());
    option(c, "--stop", o.display.stops, check_path, "end before this text; may be given again")
        ->allow_extra_args(false);
    option(c, "--think-budget", o.think_budget, COUNT, "end the thought after N tokens");
    add_pass_options(c, o), add_rank_options(c, o);
    option(c, "--save-kv", o.save_kv, check_path, "keep keys and values of the conversation in this file");
    option(c, "--load-kv", o.load_kv, check_path, "begin with those of that file");
    c->add_flag("--force", o.force, "replace an existing file");
    c->add_flag("--mtp", o.mtp, "draft with the MTP module");
    c->add_flag("--answer-only", o.display.answer_only, "print what follows the thought alone");
    option(c, "--logprobs", o.display.logprobs, between(1, 1000), "with --json: also the K likeliest tokens");
    c->add_flag("--show-prompt", o.display.show_prompt, "print the prompt's text and ids to stderr");
}

inline void add_commands(CLI::App& app, Options& o) {
    CLI::App* c = add_command(app, "run", "generate and stream",
                              "deepseek run -p \"Which is larger, 9.11 or 9.9?\"", o, command_run);
    c->add_option("-p,--prompt", o.prompt, "the prompt");
    option(c, "-f,--file", o.file, check_path, "a file that holds the prompt, or -");
    c->add_option("stdin", o.dash, "-: read the prompt from stdin");
    c->add_flag("--raw", o.raw, "no chat template: continue the text");
    add_generation_options(c, o);

    c = add_command(app, "chat", "a conversation; each line of stdin is a turn",
                    "deepseek chat --system \"Be brief.\"", o, command_chat);
    add_generation_options(c, o);

    c = add_command(app, "tokenize", "text to ids and back", "echo -n hello | deepseek tokenize", o,
                    command_tokenize);
    c->add_flag("--add-bos", o.tokenize.add_bos, "begin with BOS");
    c->add_flag("--decode", o.tokenize.decode, "stdin: a JSON array of ids; stdout: text");
    c->add_flag("--chat", o.tokenize.chat, "stdin: a JSON list of messages; stdout: the rendered prompt");
    c->add_flag("--ids", o.tokenize.as_ids, "with --chat: the prompt's ids");
    option(c, "--chat-template", o.chat_template, check_path, TEMPLATES.c_str());
    c->add_flag("--lines", o.tokenize.lines, "one JSON value a line, in and out");

    c = add_command(app, "logits", "logits of every position, and every intermediate",
                    "deepseek logits -p \"Add 6 and 77.\" --top 3", o, command_logits);
    c->add_option("-p,--prompt", o.prompt, "a text, read as `run --raw` reads it");
    c->add_option("--ids", o.ids, "in place of a text, token ids: 1,2,3 or [1, 2, 3]");
    option(c, "--out", o.out, check_path, "safetensors file to write");
    c->add_flag("--force", o.force, "replace an existing file");
    c->add_flag("--taps", o.taps,
                "every named intermediate that is computed: q_absorbed and z not by --mla naive, "
                "group_score not by a greedy gate");
    option(c, "--top", o.top, between(1, 1000), "print the K likeliest tokens after each position");
    c->add_option("--print", o.print, "print logits or a tap as text (repeatable)")->allow_extra_args(false);
    option(c, "--past", o.past, COUNT, "only read the first N tokens: results are those of the others");
    add_pass_options(c, o), add_rank_options(c, o);

    c = add_command(app, "perplexity", "negative log-likelihood of a text",
                    "deepseek perplexity -f README.md", o, command_perplexity);
    option(c, "-f,--file", o.file, check_path, "the text, or - for stdin")->required();
    option(c, "-c,--ctx", o.context, between(2, MOST), "tokens per window (default: the model's context)");
    add_rank_options(c, o);

    c = add_command(app, "info", "architecture, parameters, cache, memory plan",
                    "deepseek info --ctx 4096", o, command_info);
    option(c, "-c,--ctx", o.context, POSITIVE, "tokens of context to plan for");

    c = add_command(app, "quantize", "write the model as one GGUF file",
                    "deepseek quantize -m M -o M.q4_k_m.gguf --type q4_k_m", o, command_quantize);
    option(c, "-o,--out", o.out, check_path, "the file to write")->required();
    option(c, "--type", o.type, one_of(type_names(false)), "format of the weights: q4_k_m, ...")->required();
    c->add_flag("--force", o.force, "replace an existing file");
    c->add_flag("--allow-requantize", o.allow_requantize, "from weights that are quantised already");

    c = add_command(app, "bench", "speed of prefill and decode, a line of JSON each",
                    "deepseek bench -p 128 -n 32 -r 3", o, command_bench);
    option(c, "-p", o.bench_prompt, COUNT, "tokens to prefill (default: 512)");
    option(c, "-n", o.bench_tokens, COUNT, "tokens to decode (default: 128)");
    option(c, "-d,--depth", o.depth, COUNT, "tokens that come before (default: 0)");
    option(c, "-r", o.repeats, between(1, 1000), "runs (default: 5)");
    c->add_flag("--traffic", o.traffic, "bytes between ranks and their balance, from recorded routings");
    option(c, "--ranks", o.ranks, between(1, 256), "with --traffic: ranks (default: 8)");
    option(c, "-f,--file", o.file, check_path, "with --traffic: the text whose routing is recorded");
    option(c, "--out", o.out, check_path, "with --traffic: write the experts' loads, for --routing");
    c->add_flag("--force", o.force, "replace an existing file");
    add_rank_options(c, o);

    c = add_command(app, "pipeline", "a pipeline schedule: timetable, bubble, memory",
                    "deepseek pipeline --schedule dualpipe --ranks 8 --microbatches 20", o, command_pipeline);
    std::vector<std::string> names;
    for (auto& [name, schedule] : SCHEDULES) names.push_back(name);
    option(c, "--schedule", o.schedule, one_of(names), "gpipe, 1f1b, zb1p, dualpipe, dualpipev")->required();
    option(c, "--ranks", o.ranks, between(2, 1024), "ranks (default: 8)");
    option(c, "--microbatches", o.microbatches, between(1, 100000), "micro-batches (default: 20)");
    const auto cost = between(1e-9, 1e9), free = between(0.0, 1e9);
    option(c, "--f", o.costs.f, cost, "time of a forward (default: 1)");
    option(c, "--b", o.costs.b, cost, "time of a backward for the inputs (default: 1)");
    option(c, "--w", o.costs.w, cost, "time of a backward for the weights (default: 1)");
    option(c, "--fb", o.costs.fb, cost,
           "time of a forward and a backward that overlap (default: max(f + b + w, 2 comm))");
    option(c, "--comm", o.costs.comm, free, "communication of a forward or backward (default: 0)");
    option(c, "--svg", o.out, check_path, "write the timetable to this file");
    c->add_flag("--force", o.force, "replace an existing file");
    c->add_flag("--plan", o.plan, "print the steps of each rank, with what they send and receive");

    c = add_command(app, "check", "compare the GPU's operations with the CPU's, a line each",
                    "deepseek check 10.2", o, command_check);
    c->add_option("section", o.section, "a chapter or section of deepseek.cpp (default: all)");
}

// -- 10  signals and main ------------------------------------------------------------------------

constexpr const char* VERSION = "deepseek 1.0";

// How many letters must be changed, added or left out.
inline size_t distance(const std::string& a, const std::string& b) {
    std::vector<size_t> row(b.size() + 1);
    std::iota(row.begin(), row.end(), size_t(0));
    for (size_t i = 0; i < a.size(); i++) {
        size_t corner = std::exchange(row[0], i + 1);
        for (size_t j = 0; j < b.size(); j++)
            corner = std::exchange(row[j + 1],
                                   std::min({row[j] + 1, row[j + 1] + 1, corner + (a[i] != b[j])}));
    }
    return row.back();
}

// What to say of an option or a command that is not known: the nearest that is.
inline std::string unknown_option(const CLI::App& app, const std::string& given) {
    if (given == "-ngl" || given == "--n-gpu-layers" || given == "--gpu-layers")
        return given + ": the whole model is on one device here: --device cuda or --device cpu";
    std::vector<std::string> known;
    for (const CLI::App* command : app.get_subcommands())
        for (const CLI::Option* option : command->get_options())
            for (const std::string& name : option->get_lnames()) known.push_back("--" + name);
    if (known.empty())
        for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; }))
            known.push_back(command->get_name());
    std::string best;
    const std::string word = given.substr(0, given.find('='));
    for (const std::string& name : known)
        if (best.empty() || distance(word, name) < distance(word, best)) best = name;
    bool near = !best.empty() && distance(word, best) <= word.size() / 2;
    return "unexpected argument '" + given + "'" + (near ? " (" + best + "?)" : "");
}

// What ends this rank. The first one speaks first: mostly it has the same to say, and ends the others.
inline int last_words(const std::string& message) {
    if (world.rank > 0) usleep(useconds_t(400000 * std::min(world.rank, 8)));
    return complain(world.rank > 0 && !world.blamed ? text_of("rank %d: ", world.rank) + message : message);
}

inline int end_ranks() {
    try {
        world.finish();
        return 0;
    } catch (const std::runtime_error& e) {
        return last_words(e.what());
    }
}

// The command line; returns the exit code.
inline int run_command(CLI::App& app, int argc, char** argv) {
    try {
        world.join();
        if (world.rank > 0 && !std::freopen("/dev/null", "w", stdout)) fail("/dev/null cannot be opened");
        for (int i = 1; i < argc; i++)                   // CLI11 would read -n gl
            if (std::string_view(argv[i]) == "-ngl") fail("%s", unknown_option(app, "-ngl").c_str());
        app.parse(argc, argv);
    } catch (const CLI::Success& e) {                    // --help, --version
        return app.exit(e);
    } catch (const CLI::RuntimeError& e) {               // a check failed, or Ctrl-C
        return app.exit(e);
    } catch (const CLI::ExtrasError&) {
        return last_words(unknown_option(app, app.remaining(true).at(0)));
    } catch (const std::bad_alloc&) {
        return last_words("out of memory");
    } catch (const std::length_error&) {                 // beyond the address space
        return last_words("out of memory");
    } catch (const std::runtime_error& e) {              // CLI::ParseError, UserError, TokenizerError
        return last_words(e.what());
    }
    if (app.get_subcommands().empty()) return last_words("which command? (deepseek --help lists them)");
    std::cout.flush();
    bool written = std::fflush(stdout) == 0 && !std::ferror(stdout) && std::cout;
    return written ? 0 : complain("stdout cannot be written");
}

int main(int argc, char** argv) {
    set_patience(argv);
    set_signals();
    std::setlocale(LC_CTYPE, "C.UTF-8");                 // for the line editor
    Options o;
    o.arguments.assign(argv, argv + argc);
    CLI::App app{"DeepSeek V2, V3, R1 and the R1-Distills."};
    app.name("deepseek")
        ->require_subcommand(0, 1)
        ->footer("Example:\n  deepseek run -p \"How many r are in strawberry?\"");
    app.set_version_flag("--version", VERSION);
    add_commands(app, o);
    int code = run_command(app, argc, argv);
    if (ended_by) leave(ended_by);
    if (code == 0) code = end_ranks();
    if (code != 0 && world.size > 1) world.abandon(code);
    return code;
}
