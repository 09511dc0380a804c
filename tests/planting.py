"""Mistakes planted in a copy of a source file, so that tests can be shown to see them.

One compilation serves all mistakes of a list: each place keeps the right text and the wrong ones, and the
environment variable MISTAKE chooses: `(MISTAKE(3) ? (wrong) : (right))`, or an `if` around a statement.

A place is a piece of source text with the part to replace between « and ». It must occur exactly once (blanks
and line ends count alike), else it is an error: a reworded line must not silence its mistake.
"""
import re

# In front of the patched text. No static local: kernels ask a million times.
CHOOSE = """
#include <cstdlib>
inline const int chosen_mistake = std::getenv("MISTAKE") ? std::atoi(std::getenv("MISTAKE")) : -1;
inline bool MISTAKE(int n) { return n == chosen_mistake; }
"""


def find_place(source, place, file):
    """(begin, end) of the part between « and » in the source text."""
    before, part, after = re.split("[«»]", place)
    words = lambda text: r"\s+".join(map(re.escape, text.split()))
    edge = lambda text, at: r"\s*" if text and text[at].isspace() else ""
    pattern = words(before) + edge(before, -1) + "(" + words(part) + ")" + edge(after, 0) + words(after)
    found = list(re.finditer(pattern, source))
    if len(found) != 1:
        raise ValueError(f"{file} has {len(found)} times, not once: {place}")
    return found[0].span(1)


def plant(source, places, file):
    """The source text with every mistake in it, each behind its number.

    places: (number, place, wrong text) of each; a mistake may have several, a place several mistakes."""
    found = {}
    for number, place, wrong in places:
        found.setdefault(find_place(source, place, file), []).append((number, wrong))
    end = len(source)
    for (begin, stop), wrongs in sorted(found.items(), reverse=True):
        if stop > end:
            raise ValueError(f"{file}: two places overlap: {source[begin:stop]}")
        right, end = source[begin:stop], begin
        if right.endswith(";"):
            text = "".join(f"if (MISTAKE({n})) {{ {wrong} }} else " for n, wrong in wrongs) + f"{{ {right} }}"
        else:
            text = "(" + "".join(f"MISTAKE({n}) ? ({wrong}) : " for n, wrong in wrongs) + f"({right}))"
        source = source[:begin] + text + source[stop:]
    return source
