"""A small server that answers as the Hugging Face hub does, for tests with the hub's own client."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT, OLD = "c" * 40, "0" * 40
"""The commits of `main` and of the tag `v1`."""


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's protocol that listing and fetching files take."""

    repositories: Mapping[str, Mapping[str, bytes]]
    """`owner/name`, or `datasets/owner/name` -> file -> content."""
    fetched: list[str]
    """Files whose content was asked for."""

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, body: bool) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        api = parts[0] == "api"
        own = parts[1:] if api else parts
        if own[0] == "models":  # of models the API alone names the kind
            own = own[1:]
        depth = 3 if own[0] == "datasets" else 2
        repo, rest = "/".join(own[:depth]), own[depth:]
        files = self.repositories.get(repo)
        commit = OLD if "v1" in rest or OLD in rest else COMMIT
        if files is None:
            return self.send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        if not api:
            name = "/".join(rest[2:])
            if body:
                self.fetched.append(name)
            data = files[name]
            tag = f'"{hashlib.sha256(data).hexdigest()}"'
            return self.send(200, data, {"ETag": tag, "X-Repo-Commit": commit}, body)
        told: Any = {"id": repo, "sha": commit, "siblings": [{"rfilename": f} for f in files]}
        if "tree" in rest:
            told = [
                {"type": "file", "path": f, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for f, d in files.items()
            ]
        return self.send(200, json.dumps(told).encode(), {}, body)

    def send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@contextlib.contextmanager
def serving(repositories: Mapping[str, Mapping[str, bytes]]) -> Iterator[str]:
    """The address of a hub with these repositories; `Hub.fetched` has what was asked for."""
    Hub.repositories, Hub.fetched = repositories, []
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_port}"
        finally:
            running.shutdown()
            thread.join()
