"""A small real HTTP server that answers as a test says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Any]
Respond = Callable[[str, Any], Reply | None]


@dataclass
class Site:
    """A running server: its address, and every request so far as (path, body)."""

    url: str
    port: int
    requests: list[tuple[str, Any]] = field(default_factory=list)


@contextmanager
def running(respond: Respond | Mapping[str, Reply]) -> Iterator[Site]:
    """Serve on a free port until the block ends.

    Args:
        respond: gives (status, body) for a path and a request's JSON; a body that is no string is sent as JSON, and
            None closes the connection without an answer.
    """
    answers = respond if callable(respond) else lambda path, _: respond.get(path, (404, {"error": "no such path"}))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: Any) -> None:
            site.requests.append((self.path, body))
            reply = answers(self.path, body)
            if reply is None:
                self.close_connection = True
                return
            content = reply[1].encode() if isinstance(reply[1], str) else json.dumps(reply[1]).encode()
            self.send_response(reply[0])
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site = Site(f"http://127.0.0.1:{server.server_port}", server.server_port)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
