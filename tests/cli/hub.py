"""A local stand-in for the Hugging Face hub, with every fault that a network can have.

    with Hub({"org/name": {"config.json": b"..."}}) as hub:
        hub.fault("model.safetensors", "cut", "wrong byte")     # at the first and the second request
"""
import hashlib
import http.server
import json
import re
import socketserver
import threading

LARGE = 4096      # files of this size and more are listed as LFS files, with their SHA-256


def listed(path, content):
    """The hub's entry of a file."""
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"type": "file", "oid": blob, "size": len(content), "path": path}
    if len(content) >= LARGE:
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 135}
    return entry


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.close_connection = True
        hub = self.server.hub
        hub.requests.append((self.path, self.headers.get("Range")))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/main\?recursive=true(?:&cursor=(\d+))?", self.path):
            return self.answer_list(hub, match[1], int(match[2] or 0))
        if match := re.fullmatch(r"(/cdn)?/([^/]+/[^/]+)/resolve/main/(.+)", self.path):
            return self.answer_file(hub, match[2], match[3], redirected=bool(match[1]))
        self.send_error(404)

    def answer_list(self, hub, repo, begin):
        faults = hub.faults.get("list", [])
        fault = faults.pop(0) if faults else None
        if isinstance(fault, int):
            return self.send_error(fault)
        if repo not in hub.repos:
            return self.send_error(401)
        entries = hub.entries(repo)
        page, rest = entries[begin:begin + hub.page], entries[begin + hub.page:]
        body = fault if isinstance(fault, bytes) else json.dumps(page).encode()
        self.send_response(200)
        if rest:
            url = f"{hub.url}/api/models/{repo}/tree/main?recursive=true&cursor={begin + hub.page}"
            self.send_header("Link", f'<{url}>; rel="next"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer_file(self, hub, repo, path, redirected):
        content = hub.repos.get(repo, {}).get(path)
        if content is None:
            return self.send_error(404)
        if hub.redirect and not redirected:
            self.send_response(302)
            self.send_header("Location", f"{hub.url}/cdn{self.path}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        faults = hub.faults.get(path, [])
        fault = faults.pop(0) if faults else None
        if isinstance(fault, int):
            return self.send_error(fault)
        self.send_content(hub, fault, content)

    def send_content(self, hub, fault, content):
        if fault == "wrong byte":
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]
        elif fault == "longer":
            content += bytes(100000)
        elif fault == "shorter":
            content = content[:-1]
        begin, size = 0, len(content)
        wish = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if wish and hub.ranges:
            begin = int(wish[1])
            if begin >= size:
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{size - 1}/{size}")
        else:
            self.send_response(200)
        body = content[begin:]
        if fault != "no length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault in ("cut", "no length"):
            body = body[:len(body) // 2]
        elif fault == "nothing":
            body = b""
        self.wfile.write(body)


class Hub:
    def __init__(self, repos, page=2, ranges=True, redirect=False):
        self.repos, self.page, self.ranges, self.redirect = repos, page, ranges, redirect
        self.faults, self.requests, self.lies = {}, [], []
        # Not HTTPServer: that one asks the network for this machine's name.
        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def fault(self, path, *kinds):
        self.faults[path] = list(kinds)

    def entries(self, repo):
        """The list of a repository; self.lies are entries that replace or join the true ones."""
        entries = {path: listed(path, content) for path, content in self.repos[repo].items()}
        entries.update({entry["path"]: entry for entry in self.lies})
        return list(entries.values())

    def fetched(self, path):
        """The Range headers of all requests for a file."""
        return [wish for url, wish in self.requests if url.endswith(f"/resolve/main/{path}")]

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *ignored):
        self.server.shutdown()
        self.server.server_close()
