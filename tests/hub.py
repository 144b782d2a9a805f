"""A stand-in for the model hub on this machine: its answers have the hub's status codes and headers."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SHA = "a" * 40
TOKEN = "hf_accepted"


class Hub:
    """Repositories by id: `files` of bytes, and `gated` for those that want a token and accepted terms."""

    def __init__(self):
        self.repos, self.requests, self.cut_after = {}, [], None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                hub.answer(self, body=False)

            def do_GET(self):
                hub.answer(self, body=True)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def add(self, repo, files, gated=False):
        self.repos[repo] = {"files": files, "gated": gated}

    def answer(self, request, body):
        path = request.path.split("?")[0].strip("/")
        self.requests.append((request.command, path, request.headers.get("Range")))
        parts = path.split("/")
        api = parts[:2] == ["api", "models"]
        repo, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token == "hf_wrong":
            return self.fail(request, 401, None, "Invalid credentials in Authorization header")
        if repo not in self.repos:  # the hub does not tell strangers what exists
            return self.fail(request, 404 if token else 401, "RepoNotFound", "Repository not found")
        if self.repos[repo]["gated"] and not api and token != TOKEN:
            return self.fail(request, 403 if token else 401, "GatedRepo", f"Access to model {repo} is restricted.")
        files = self.repos[repo]["files"]
        if len(rest) > 1 and rest[1] not in ("main", SHA):
            return self.fail(request, 404, "RevisionNotFound", "Invalid rev id")
        if api and rest[:1] == ["revision"]:
            return self.send(request, json.dumps({"id": repo, "sha": SHA, "siblings": []}).encode(), body)
        if api:
            listed = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            return self.send(request, json.dumps(listed).encode(), body)
        name = "/".join(rest[2:])
        if name not in files:
            return self.fail(request, 404, "EntryNotFound", "Entry not found")
        return self.send(request, files[name], body, name)

    def fail(self, request, status, code, message):
        request.send_response(status)
        if code:
            request.send_header("X-Error-Code", code)
        request.send_header("X-Error-Message", message)
        request.send_header("Content-Length", "0")
        request.end_headers()

    def send(self, request, data, body, name=None):
        start, total = 0, len(data)
        if body and (asked := request.headers.get("Range")):
            start = int(asked.removeprefix("bytes=").split("-")[0])
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(total - start))
        request.send_header("Accept-Ranges", "bytes")
        if start:
            request.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if name is not None:
            request.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            request.send_header("X-Repo-Commit", SHA)
        request.end_headers()
        if body:
            cut = self.cut_after if name and name.endswith(".safetensors") else None
            request.wfile.write(data[start:] if cut is None else data[start:cut])
            if cut is not None:
                request.wfile.flush()
                request.connection.close()
