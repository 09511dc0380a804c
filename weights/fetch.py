#!/usr/bin/env python3
"""Fetches a published model into weights/NAME. Called by `make weights/NAME`.

NAME is a model of deepseek-ai on the hub, or any ORG/NAME. The hub's list says which files there are, how
large they are and what they hash to; curl fetches them into weights/NAME.part; when each one's hash is
right, the folder gets its name. So a folder weights/NAME is whole, and a stop at any moment costs nothing:
the next call goes on where this one ended. HF_ENDPOINT names another hub (default https://huggingface.co).
"""
import fcntl
import fnmatch
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time

WANTED = ("config.json", "generation_config.json", "tokenizer*.json", "chat_template.jinja", "*.safetensors",
          "*.safetensors.index.json")
TRIES = 3        # of a file, without a byte of progress
OFFLINE = (5, 6, 7, 28)                 # curl's: no proxy, no such host, no connection, none in time
PAUSE = float(os.environ.get("FETCH_PAUSE", "3"))     # seconds before the next of them


class Stop(Exception):
    """One line for the user."""


def human(size):
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} bytes"


def say(text):
    print(text, flush=True)


def curl(url, arguments, limit=None):
    """Runs curl; returns its exit code and the HTTP status. No file it writes grows beyond `limit` bytes."""
    def before():
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    command = ["curl", "--location", "--max-redirs", "10", "--proto", "=http,https", "--fail", "--globoff",
               "--connect-timeout", "30", "--speed-limit", "1", "--speed-time", "60",
               "--write-out", "%{http_code}", *arguments, "--", url]
    done = subprocess.run(command, stdout=subprocess.PIPE, preexec_fn=before)
    status = done.stdout.decode(errors="replace").strip()
    return done.returncode, int(status) if status.isdigit() else 0


# -- the hub's list --------------------------------------------------------------------------------------

def entry_of(item):
    """(path, size, hash kind, hash) of a file that we want, else None."""
    path, size = item["path"], item["size"]
    if item["type"] != "file" or not any(fnmatch.fnmatchcase(path, w) for w in WANTED):
        return None
    if "/" in path:
        return None                       # a variant in a folder of its own, not the model
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", path, re.ASCII):
        raise Stop(f"the hub's list holds a file name that cannot be right: {path!r}")
    kind, oid = ("sha256", item["lfs"]["oid"]) if item.get("lfs") is not None else ("sha1", item["oid"])
    if not re.fullmatch("[0-9a-f]{64}" if kind == "sha256" else "[0-9a-f]{40}", oid):
        raise Stop(f"the hub's list holds no usable hash for {path}")
    if not isinstance(size, int) or not 0 <= size < 1 << 50:
        raise Stop(f"the hub's list holds no usable size for {path}")
    return path, size, kind, oid


def fetch_page(url, repo, folder):
    """One page of the list, and the address of the next or None."""
    body, headers = os.path.join(folder, "body"), os.path.join(folder, "headers")
    code, status = curl(url, ["--silent", "--output", body, "--dump-header", headers], limit=1 << 28)
    if status in (401, 403, 404):
        raise Stop(f"the hub has no public model '{repo}' (HTTP {status} from {url})")
    if code in OFFLINE:
        raise Stop(f"no connection to {url.split('/api/')[0]} (offline? HF_ENDPOINT names another hub; "
                   f"curl error {code})")
    if code != 0:
        raise Stop(f"the hub's list cannot be read: curl error {code}, HTTP {status} from {url}")
    with open(body, encoding="utf-8") as f:
        page = json.load(f)
    if not isinstance(page, list):
        raise ValueError("not a list")
    with open(headers, encoding="latin-1") as f:
        link = re.findall(r'^link:.*<([^>]+)>\s*;\s*rel="?next', f.read(), re.IGNORECASE | re.MULTILINE)
    return page, link[-1] if link else None


def file_list(hub, repo):
    url = f"{hub}/api/models/{repo}/tree/main?recursive=true"
    files = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(1000):
            try:
                page, url = fetch_page(url, repo, folder)
                entries = [e for e in map(entry_of, page) if e]
            except (ValueError, TypeError, KeyError) as error:
                raise Stop(f"the hub's list is not what it should be: {error!r} from {url}") from None
            for entry in entries:
                if files.setdefault(entry[0], entry) != entry:
                    raise Stop(f"the hub's list holds {entry[0]} twice")
            if not url:
                break
    if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
        raise Stop(f"'{repo}' holds no config.json with safetensors files (only GGUF or .bin?)")
    # Small files first: whatever is wrong with the model shows before the large ones.
    return sorted(files.values(), key=lambda e: (e[1] > 1 << 25, e[0]))


# -- one file --------------------------------------------------------------------------------------------

def digest(path, kind, size):
    """SHA-256 of the content; for small files git's blob hash, which is what the hub lists."""
    h = hashlib.new(kind, b"blob %d\0" % size if kind == "sha1" else b"")
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            h.update(block)
    return h.hexdigest()


def size_of(path):
    return os.path.getsize(path) if os.path.exists(path) else 0


def transfer(url, partial, size):
    """Downloads until `partial` has `size` bytes; goes on after each cut as long as bytes arrive."""
    failures, best = 0, size_of(partial)
    while (have := size_of(partial)) != size or not os.path.exists(partial):
        if have > size:
            os.unlink(partial)
            have = 0
        meter = ["--progress-bar"] if sys.stderr.isatty() else ["--silent"]
        resume = ["--continue-at", "-"] if have else []
        code, status = curl(url, [*meter, *resume, "--output", partial], limit=size + 1)
        if status in (401, 403, 404):
            raise Stop(f"HTTP {status} from {url}")
        if code == 0 and size_of(partial) == size:
            break
        if code == 33 or status == 416:   # the server cannot resume, or what we have is not a part of it
            if os.path.exists(partial):
                os.unlink(partial)
        got = size_of(partial)
        failures = 0 if best < got < size else failures + 1
        best = max(best, min(got, size))
        why = f"{human(got)} of {human(size)}, curl error {code}, HTTP {status}"
        if got > size:
            why = f"the server sends more than the {size} bytes of the hub's list"
        if failures >= TRIES:
            raise Stop(f"{os.path.basename(url)}: {why}; given up after {TRIES} tries")
        say(f"    cut off ({why}), going on" if got < size else f"    {why}, once more")
        time.sleep(PAUSE if failures else 0)


def fetch_file(url, folder, entry):
    path, size, kind, oid = entry
    partial = os.path.join(folder, f"{path}.{oid[:16]}.incomplete")    # never resumes another version
    for attempt in range(TRIES):
        transfer(url, partial, size)
        if digest(partial, kind, size) == oid:
            os.replace(partial, os.path.join(folder, path))
            return
        os.unlink(partial)
        name = "SHA-256" if kind == "sha256" else "SHA-1"
        if attempt + 1 < TRIES:
            say(f"    {path}: corrupted, its {name} is not the one in the hub's list; fetching it again")
    raise Stop(f"{path}: corrupted {TRIES} times, its {name} is not the one in the hub's list")


# -- the folder --------------------------------------------------------------------------------------------

def read_verified(folder):
    """path -> hash of the files that an earlier call has checked."""
    try:
        with open(os.path.join(folder, ".verified"), encoding="ascii") as f:
            return dict(reversed(line.split()) for line in f if line.endswith("\n"))
    except FileNotFoundError:
        return {}


def still_missing(folder, files):
    verified = read_verified(folder)
    return [e for e in files
            if verified.get(e[0]) != e[3] or size_of(os.path.join(folder, e[0])) != e[1]]


def require_disk(folder, missing):
    need = sum(e[1] - min(e[1], size_of(os.path.join(folder, f"{e[0]}.{e[3][:16]}.incomplete")))
               for e in missing)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise Stop(f"{human(need)} to fetch, but only {human(free)} free on the disk of weights/")
    return need, free


def discard_strangers(folder, files):
    """Removes what this version of the model does not have: leftovers of an older one."""
    keep = {".verified"} | {e[0] for e in files} | {f"{e[0]}.{e[3][:16]}.incomplete" for e in files}
    for name in set(os.listdir(folder)) - keep:
        os.unlink(os.path.join(folder, name))


def open_part(part):
    """Makes the folder for the files so far, locked until the end; .verified shows that it is one."""
    os.makedirs(part, exist_ok=True)
    lock = os.open(part, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise Stop(f"another fetch into {part} is running") from None
    names = os.listdir(part)
    if names and ".verified" not in names and not any(name.endswith(".incomplete") for name in names):
        raise Stop(f"{part} holds what no fetch has left there; move it away")
    open(os.path.join(part, ".verified"), "a", encoding="ascii").close()


def fetch(name, weights):
    repo = name if "/" in name else f"deepseek-ai/{name}"
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repo, re.ASCII) or ".." in repo:
        raise Stop(f"'{name}' is no model name: NAME (of deepseek-ai) or ORG/NAME")
    if name.endswith(".part"):
        raise Stop(f"'{name}' is no model name: .part is the end of what is not yet fetched")
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    target = os.path.join(weights, name)
    if os.path.exists(target):
        return say(f"{target} is there already")
    if not shutil.which("curl"):
        raise Stop("curl is missing (Debian: apt-get install curl)")
    files = file_list(hub, repo)
    part = target + ".part"
    open_part(part)
    discard_strangers(part, files)
    missing = still_missing(part, files)
    need, free = require_disk(part, missing)
    say(f"{repo} from {hub}: {len(files)} files, {human(sum(e[1] for e in files))}; "
        f"{human(need)} to fetch, {human(free)} free")
    for number, entry in enumerate(missing, len(files) - len(missing) + 1):
        say(f"[{number}/{len(files)}] {entry[0]}  {human(entry[1])}")
        fetch_file(f"{hub}/{repo}/resolve/main/{entry[0]}", part, entry)
        with open(os.path.join(part, ".verified"), "a", encoding="ascii") as f:
            f.write(f"{entry[3]} {entry[0]}\n")
    os.rename(part, target)
    if os.path.exists(os.path.join(target, ".verified")):
        os.unlink(os.path.join(target, ".verified"))
    say(f"{target} is whole: every file's hash is the hub's. Try\n"
        f"  ./deepseek run -m {target} -p \"How many r are in strawberry?\"")


def main():
    if len(sys.argv) != 2:
        print("usage: make weights/NAME, for example make weights/DeepSeek-R1-Distill-Qwen-1.5B",
              file=sys.stderr)
        return 1
    weights = os.path.relpath(os.path.dirname(os.path.abspath(__file__)))
    try:
        fetch(sys.argv[1], weights)
    except (Stop, OSError) as error:
        print(f"fetch: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nfetch: stopped; `make weights/{sys.argv[1]}` goes on from here", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
