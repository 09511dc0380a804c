// pipeline.h: a pipeline's plan (15.6), and the plan on paper: how long each step takes is given; what
// follows is when it runs, how long each rank waits, what it has to remember, and how much of the
// communication is hidden.
//
// Contents: 1 the plan; 2 costs and the timetable; 3 bubble, memory, communication; 4 as text, SVG, JSON.
//
// Needs chapter 1 of deepseek.cpp and Plan (15.6).
#pragma once

// -- 1  the plan ---------------------------------------------------------------------------------

// Fails where a schedule has no plan for so many ranks and micro-batches.
inline void check_schedule(Schedule schedule, int P, int M) {
    const bool dual = schedule == Schedule::DUALPIPE, folded = schedule == Schedule::DUALPIPEV;
    if (dual && P % 2) fail("dualpipe: %d ranks are odd; each is paired with its mirror", P);
    if (dual && M % 2) fail("dualpipe: %d micro-batches are odd; half of them come from each end", M);
    if ((dual || folded) && M < 2 * P) fail("%d micro-batches: this schedule needs 2 a rank, %d", M, 2 * P);
    if ((schedule == Schedule::ONE_F_ONE_B || schedule == Schedule::ZB1P) && M < P)
        fail("%d micro-batches: this schedule needs one a rank, %d", M, P);
}

// Turns the words of rank r's table into its steps: counts its micro-batches, and remembers what it put off.
struct Writer {
    const Plan& plan;
    int r;
    std::map<std::pair<char, int>, int> done = {};       // F or B, and chunk: how many
    std::deque<Op> put_off = {};

    Op op(const char* word) {
        const bool dual = plan.two_ways(), mirrored = dual && r >= plan.P / 2;
        if (word[0] == 'W') {
            const Op of = put_off.front();
            put_off.pop_front();
            return {'W', of.micro, of.stage};
        }
        const int chunk = (word[1] - '0') ^ int(mirrored), last = (dual ? plan.P : plan.stages) - 1;
        const int first = dual && chunk ? plan.M / 2 : 0;
        const Op made{word[0], first + done[{word[0] == 'F' ? 'F' : 'B', chunk}]++, chunk ? last - r : r};
        if (made.kind == 'b') put_off.push_back(made);
        return made;
    }
    void add(std::vector<Step>& steps, const char* words) {
        std::istringstream in(words);
        for (std::string word; in >> word;) {
            Step& step = steps.emplace_back(Step{op(word.c_str())});
            if (word.size() == 4) step.push_back(op(word.c_str() + 2));
        }
    }
};

inline Plan make_plan(Schedule schedule, int P, int M) {
    check_schedule(schedule, P, M);
    const int stages = schedule == Schedule::DUALPIPEV ? 2 * P : P;
    Plan plan{schedule, P, M, stages, std::vector<std::vector<Step>>(size_t(P))};
    for (int r = 0; r < P; r++) {
        Writer writer{plan, r};
        for (const Phase& phase : phases(schedule, P, M, r))
            for (int i = 0; i < phase.times; i++) writer.add(plan.ranks[size_t(r)], phase.steps);
    }
    return plan;
}

// -- 2  costs and the timetable ------------------------------------------------------------------

// Seconds. A forward and a backward each also communicate (dispatch and combine of the experts, 15.2): alone
// they wait for it; in an overlapped pair one computes while the other communicates. Messages from stage to
// stage are small beside that, and take no time here.
struct Costs {
    double f = 1, b = 1, w = 1, comm = 0;
    double fb = 0;                         // an overlapped pair; 0: as long as its work or its communication

    double forward() const { return f + comm; }
    double backward() const { return b + w + comm; }
    double pair() const { return fb > 0 ? fb : std::max(f + b + w, 2 * comm); }
    double of(const Step& step) const {
        if (step.size() == 2) return pair();
        const char kind = step[0].kind;
        return kind == 'F' ? forward() : kind == 'W' ? w : kind == 'b' ? b + comm : backward();
    }
};
struct Timetable {
    std::vector<std::vector<double>> start;        // (P) of each step
    double end = 0;
    std::string wrong;                             // why the plan cannot be executed, or ""
};

// A plan as it is executed: each rank in its order, a step as soon as what it needs has arrived.
struct Execution {
    const Plan& plan;
    const Costs& costs;
    Timetable t = {std::vector<std::vector<double>>(size_t(plan.P)), 0, ""};
    std::vector<double> free = std::vector<double>(size_t(plan.P));      // (P): from when on
    std::map<std::tuple<char, int, int>, double> done = {};              // when: kind, micro-batch, stage

    // When what an op needs is there; infinity: not yet.
    double arrival(const Op& op) const {
        double at = 0;
        auto need = [&](char kind, int stage) {
            const auto found = done.find({kind, op.micro, stage});
            at = std::max(at, found == done.end() ? INFINITY : found->second);
        };
        const bool backward = op.kind == 'B' || op.kind == 'b';
        if (op.kind == 'F' && op.stage > 0) need('F', op.stage - 1);
        if (backward) need('F', op.stage);
        if (backward && op.stage + 1 < plan.stages) need('B', op.stage + 1);
        if (op.kind == 'W') need('B', op.stage);
        return at;
    }
    void finish(const Op& op, double at, int r) {
        auto once = [&](char kind) {
            if (!done.try_emplace({kind, op.micro, op.stage}, at).second)
                t.wrong = text_of("%c%d on stage %d comes twice", kind, op.micro, op.stage);
        };
        if (plan.rank_of(op) != r) t.wrong = text_of("rank %d has not stage %d", r, op.stage);
        once(op.kind == 'b' ? 'B' : op.kind);
        if (op.kind == 'B') once('W');
    }
    // Whether rank r could do its next step.
    bool advance(int r) {
        std::vector<double>& start = t.start[size_t(r)];
        if (start.size() == plan.ranks[size_t(r)].size() || !t.wrong.empty()) return false;
        const Step& step = plan.ranks[size_t(r)][start.size()];
        double at = free[size_t(r)];
        for (const Op& op : step) at = std::max(at, arrival(op));
        if (std::isinf(at)) return false;
        start.push_back(at), free[size_t(r)] = at + costs.of(step), t.end = std::max(t.end, free[size_t(r)]);
        for (const Op& op : step) finish(op, free[size_t(r)], r);
        return true;
    }
};

// Finds a rank that would wait for ever, a step that comes twice or on a rank that has not its stage, and one
// that is missing: then `wrong` says it.
inline Timetable run_plan(const Plan& plan, const Costs& costs) {
    Execution e{plan, costs};
    for (bool moved = true; moved;) {
        moved = false;
        for (int r = 0; r < plan.P; r++)
            while (e.advance(r)) moved = true;
    }
    Timetable t = std::move(e.t);
    for (int r = 0; r < plan.P && t.wrong.empty(); r++)
        if (t.start[size_t(r)].size() < plan.ranks[size_t(r)].size())
            t.wrong = text_of("rank %d waits for ever before its step %zu", r, t.start[size_t(r)].size());
    if (t.wrong.empty() && e.done.size() != 3 * size_t(plan.M) * size_t(plan.stages))
        t.wrong = text_of("%zu of %d F, B and W", e.done.size(), 3 * plan.M * plan.stages);
    return t;
}

// -- 3  bubble, memory, communication ------------------------------------------------------------

// The bubble as the papers have it, where B is a whole backward and F&B an overlapped pair. Where a pair
// takes less than its two, the ranks in the middle, which have most pairs, wait longest: it is theirs. Exact
// where F and the halves of B are equal; where they are not, the timetable's bubble may be another.
struct Formula {
    const char* text;
    double bubble;
    int parameters, activations;           // of a rank: copies; micro-batches
};
inline Formula formula_of(const Plan& p, const Costs& c) {
    const double F = c.forward(), B = c.backward(), W = c.w, FB = c.pair(), n = p.P - 1;
    switch (p.schedule) {
    case Schedule::GPIPE: return {"(P-1)(F+B)", n * (F + B), 1, p.M};
    case Schedule::ONE_F_ONE_B: return {"(P-1)(F+B)", n * (F + B), 1, p.P};
    case Schedule::ZB1P: return {"(P-1)(F+B-2W)", n * (F + B - 2 * W), 1, p.P};
    case Schedule::DUALPIPE: return {"(P/2-1)(F&B+B-3W)", (p.P / 2 - 1) * (FB + B - 3 * W), 2, p.P + 1};
    case Schedule::DUALPIPEV: break;
    }
    return {"(P-1)(F&B+B-3W)", n * (FB + B - 3 * W), 2, 2 * p.P + 1};
}

// What a timetable says of each rank, and of its communication.
struct Measured {
    std::vector<double> bubble;                          // (P): of the whole time, from 0 on
    std::vector<int> alive;                              // (P): most micro-batches whose W is still to come
    double communication = 0, hidden = 0;                // seconds of all ranks; behind another's work
};
inline Measured measure(const Plan& plan, const Costs& costs, const Timetable& t) {
    Measured m;
    for (const std::vector<Step>& steps : plan.ranks) {
        double busy = 0;
        int alive = 0, most = 0;
        for (const Step& step : steps) {
            busy += costs.of(step);
            for (const Op& op : step) {
                alive += op.kind == 'F';
                if (op.kind != 'W') m.communication += costs.comm;
            }
            most = std::max(most, alive);
            for (const Op& op : step) alive -= op.kind == 'B' || op.kind == 'W';
            if (step.size() == 2) m.hidden += std::min(2 * costs.comm, costs.f + costs.b + costs.w);
        }
        m.bubble.push_back(t.end - busy), m.alive.push_back(most);
    }
    return m;
}

// -- 4  as text, SVG, JSON -----------------------------------------------------------------------

inline std::string label(const Step& step) {
    std::string text;
    for (const Op& op : step) text += text_of("%c%d", op.kind, op.micro);
    return text;
}

// A line for each rank; a column of `unit` seconds takes four letters. `.`: it waits.
inline std::string timetable_text(const Plan& plan, const Costs& costs, const Timetable& t, double unit) {
    std::string out;
    auto column = [&](double at) { return size_t(std::lround(at / unit * 4)); };
    for (int r = 0; r < plan.P; r++) {
        std::string line(column(t.end), '.');
        for (size_t i = 0; i < t.start[size_t(r)].size(); i++) {
            const Step& step = plan.ranks[size_t(r)][i];
            const double begin = t.start[size_t(r)][i];
            std::string cell = label(step);
            cell.resize(std::max<size_t>(column(begin + costs.of(step)) - column(begin), 1), ' ');
            line.replace(column(begin), cell.size(), cell);
        }
        out += text_of("%3d %s\n", r, line.c_str());
    }
    return out;
}

inline std::string timetable_svg(const Plan& plan, const Costs& costs, const Timetable& t) {
    constexpr int HEIGHT = 24, LEFT = 60;
    const double scale = std::clamp(1400 / t.end, 2.0, 24.0);
    std::string out = text_of("<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%.0f\" height=\"%d\" "
                              "font-family=\"sans-serif\" font-size=\"9\">\n"
                              "<rect width=\"100%%\" height=\"100%%\" fill=\"#fff\"/>\n",
                              LEFT + t.end * scale + 10, (plan.P + 1) * HEIGHT);
    auto color = [](const Step& step) {
        if (step.size() == 2) return "#8dc891";
        const char kind = step[0].kind;
        return kind == 'F' ? "#8fb4e3" : kind == 'W' ? "#d9d9d9" : kind == 'b' ? "#f7d58b" : "#f0b27a";
    };
    for (int r = 0; r < plan.P; r++) {
        out += text_of("<text x=\"4\" y=\"%d\">rank %d</text>\n", r * HEIGHT + 20, r);
        for (size_t i = 0; i < t.start[size_t(r)].size(); i++) {
            const Step& step = plan.ranks[size_t(r)][i];
            const double x = LEFT + t.start[size_t(r)][i] * scale;
            out += text_of("<rect x=\"%.1f\" y=\"%d\" width=\"%.1f\" height=\"%d\" fill=\"%s\" "
                           "stroke=\"#555\" stroke-width=\"0.4\"/><text x=\"%.1f\" y=\"%d\">%s</text>\n",
                           x, r * HEIGHT + 6, costs.of(step) * scale, HEIGHT - 4, color(step), x + 2,
                           r * HEIGHT + 19, label(step).c_str());
        }
    }
    return out + "</svg>\n";
}

// The messages of one op on rank r.
inline std::string messages_text(const Plan& plan, const Op& op, int r) {
    std::string out;
    const int by = op.kind == 'F' ? 1 : -1;
    const char kind = op.kind == 'F' ? 'F' : 'B';
    auto other = [&](int stage, const char* what, const char* word) {
        const bool any = op.kind != 'W' && stage >= 0 && stage < plan.stages;
        const int rank = any ? plan.rank_of({op.kind, op.micro, stage}) : r;
        if (rank != r) out += text_of("  %s %c%d %s %d", what, kind, op.micro, word, rank);
    };
    other(op.stage - by, "receive", "from"), other(op.stage + by, "send", "to");
    return out;
}

// What a rank does, a line a step, with its messages.
inline std::string plan_text(const Plan& plan) {
    std::string out;
    for (int r = 0; r < plan.P; r++) {
        out += text_of("rank %d\n", r);
        for (const Step& step : plan.ranks[size_t(r)]) {
            out += "  " + label(step);
            for (const Op& op : step) out += messages_text(plan, op, r);
            out += "\n";
        }
    }
    return out;
}

inline std::string pipeline_json(const Plan& plan, const Costs& costs, const Timetable& t, const Measured& m,
                                 const Formula& f) {
    std::string bubbles, alive, steps;
    for (int r = 0; r < plan.P; r++) {
        bubbles += text_of("%s%g", r ? "," : "", m.bubble[size_t(r)]);
        alive += text_of("%s%d", r ? "," : "", m.alive[size_t(r)]);
        steps += r ? ",[" : "[";
        for (size_t i = 0; i < t.start[size_t(r)].size(); i++) {
            const Step& step = plan.ranks[size_t(r)][i];
            const double begin = t.start[size_t(r)][i];
            steps += text_of("%s[\"%s\",%g,%g]", i ? "," : "", label(step).c_str(), begin,
                             begin + costs.of(step));
        }
        steps += "]";
    }
    return text_of("{\"ranks\":%d,\"microbatches\":%d,\"end\":%g,\"bubble\":[%s],\"formula\":\"%s\","
                   "\"formula_bubble\":%g,\"parameters\":%d,\"activations\":[%s],\"formula_activations\":%d,"
                   "\"communication\":%g,\"hidden\":%g,\"steps\":[%s]}\n",
                   plan.P, plan.M, t.end, bubbles.c_str(), f.text, f.bubble, f.parameters, alive.c_str(),
                   f.activations, m.communication, m.hidden, steps.c_str());
}
