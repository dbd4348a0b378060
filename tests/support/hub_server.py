"""A Hugging Face Hub on the loopback interface that serves one folder, and misbehaves on request.

It speaks what huggingface_hub 2.x asks for: `/api/models/.../revision/...` (sizes and LFS hashes of the files) and
`/ORG/NAME/resolve/COMMIT/FILE` with HEAD, GET and ranges; large files are redirected to a "CDN" with another name.
"""

import hashlib
import json
import re
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = 1000  # bytes from which a file is in LFS


class Hub:
    """The server's state; tests set the flags and read the log.

    `served` counts body bytes by file name; `intervals` has (file, start, end) of every answer with a body.
    """

    def __init__(self, root: Path, repo_id: str = "lab/gengram"):
        self.root = root
        self.repo_id = repo_id
        self.revisions = {"main": "a" * 40, "v1": "a" * 40}
        self.token = ""  # if set, only it opens the files
        self.gated = False
        self.ranges = True
        self.sizes_in_info = True
        self.busy: list[int] = []  # status codes of the next answers
        self.retry_after = "0"  # what they say, unless it is empty
        self.cut_every = 0  # the answer to a range is cut after that many bytes
        self.cut_always = False  # no byte of a body ever arrives
        self.silent_at = ""  # requests for paths with this in them are never answered
        self.drips = False  # bodies come byte by byte, with rests
        self.ended = threading.Event()  # frees what waits
        self.lie_about: dict[str, bytes] = {}  # file -> content that is served instead
        self.api_answer: bytes | None = None  # what the API says instead of the truth
        self.on_request = lambda method, path: None
        self.lock = threading.Lock()
        self.log: list[tuple[str, str, str | None, int]] = []
        self.intervals: list[tuple[str, int, int]] = []
        self.leaked_tokens: list[str] = []

    @property
    def served(self) -> Counter:
        counts: Counter = Counter()
        for name, start, end in self.intervals:
            counts[name] += end - start
        return counts

    def content(self, name: str) -> bytes:
        return self.lie_about.get(name) or (self.root / name).read_bytes()

    def files(self) -> list[str]:
        return sorted(path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file())

    def info(self, commit: str, blobs: bool) -> dict:
        siblings = []
        for name in self.files():
            data = (self.root / name).read_bytes()
            entry: dict = {"rfilename": name}
            if blobs and self.sizes_in_info:
                entry |= {"size": len(data), "blobId": git_hash(data)}
                if len(data) >= LARGE:
                    sha256 = hashlib.sha256(data).hexdigest()
                    entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        return {"id": self.repo_id, "modelId": self.repo_id, "sha": commit, "siblings": siblings}

    def tree(self) -> list[dict]:
        entries = []
        for name in self.files():
            data = (self.root / name).read_bytes()
            entry: dict = {"type": "file", "path": name, "size": len(data), "oid": git_hash(data)}
            if len(data) >= LARGE:
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            entries.append(entry)
        return entries


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # headers and body leave together
    hub: Hub

    def log_message(self, *words) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub, parts = self.hub, urlsplit(self.path)
        path = unquote(parts.path)
        hub.on_request(self.command, path)
        if hub.silent_at and hub.silent_at in path:
            hub.ended.wait()
            self.close_connection = True
            return
        with hub.lock:
            status = hub.busy.pop(0) if hub.busy else 0
        if status:
            self.reply(status, b"busy", {"Retry-After": hub.retry_after} if hub.retry_after else {})
            return
        if path.startswith("/cdn/"):
            if "Authorization" in self.headers:
                hub.leaked_tokens.append(path)
            self.send_file(path.removeprefix("/cdn/"), {})
            return
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
        if api and hub.api_answer is not None:
            self.reply(200, hub.api_answer, {"Content-Type": "application/json"})
            return
        if api:
            commit = self.commit(api[1], api[3] or "main", may_list=hub.gated)
            if commit and api[2] == "tree":
                self.reply(200, json.dumps(hub.tree()).encode(), {"Content-Type": "application/json"})
            elif commit:
                body = json.dumps(hub.info(commit, "blobs" in parts.query)).encode()
                self.reply(200, body, {"Content-Type": "application/json"})
            return
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not resolve:
            self.reply(404, b"")
            return
        commit = self.commit(resolve[1], resolve[2])
        if not commit:
            return
        name = resolve[3]
        if name not in hub.files():
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        data = hub.content(name)
        headers = {"X-Repo-Commit": commit}
        if len(data) < LARGE:
            self.send_file(name, {**headers, "ETag": f'"{git_hash(data)}"'})
            return
        port = self.server.server_address[1]
        headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        self.reply(302, b"", {**headers, "Location": f"http://localhost:{port}/cdn/{name}"})

    def commit(self, repo_id: str, revision: str, may_list: bool = False) -> str:
        """The commit, or an answer that says why there is none."""
        hub = self.hub
        if repo_id != hub.repo_id:
            self.reply(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif (hub.token or hub.gated) and not may_list and self.headers.get("Authorization") != f"Bearer {hub.token}":
            code = "GatedRepo" if hub.gated else "RepoNotFound"
            self.reply(403 if hub.gated else 401, b"", {"X-Error-Code": code, "X-Error-Message": "no access"})
        else:
            commit = hub.revisions.get(revision) or (revision if revision in hub.revisions.values() else "")
            if commit:
                return commit
            self.reply(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        return ""

    def send_file(self, name: str, headers: dict[str, str]) -> None:
        hub = self.hub
        data = hub.content(name)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked or not hub.ranges:
            self.reply(200, data, headers, name)
            return
        start, end = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        if start > end:
            self.reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return
        headers = {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"}
        self.reply(206, data[start : end + 1], headers, name, start)

    def reply(self, status: int, body: bytes, headers: dict | None = None, name: str = "", start: int = 0) -> None:
        hub = self.hub
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        sent = 0 if self.command == "HEAD" else len(body)
        if name and sent and hub.cut_always:
            sent = 0
        elif status == 206 and hub.cut_every and sent > hub.cut_every:
            sent = hub.cut_every
        with hub.lock:
            hub.log.append((self.command, urlsplit(self.path).path, self.headers.get("Range"), status))
            if name and sent:
                hub.intervals.append((name, start, start + sent))
        if self.command == "HEAD":
            return
        if hub.drips and name:
            self.drip(body)
            return
        self.wfile.write(body[:sent])
        self.close_connection = sent < len(body)

    def drip(self, body: bytes) -> None:
        for i in range(len(body)):
            try:
                self.wfile.write(body[i : i + 1])
                self.wfile.flush()
            except OSError:  # the client has gone
                break
            if self.hub.ended.wait(0.02):
                break
        self.close_connection = True


@contextmanager
def serving(hub: Hub):
    """Runs the server; the address is the Hub's endpoint."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        hub.ended.set()
        server.shutdown()
        server.server_close()
        thread.join(10)
