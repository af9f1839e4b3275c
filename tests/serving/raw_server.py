"""Servers that mean harm: answers without an end, answers that lead elsewhere, and one that notes every header."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

END = b"\r\n\r\n"


@contextmanager
def _listening(answer: Callable[[socket.socket, bytes, threading.Event], None]) -> Iterator[str]:
    """Accept connections until the block ends; `answer` gets each with the head of its request."""
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)

        def one(connection: socket.socket) -> None:
            with connection, suppress(OSError):
                head = b""
                while END not in head:
                    head += connection.recv(65536)
                answer(connection, head, ended)
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(1)
                while connection.recv(65536):
                    pass

        def accept() -> None:
            while not ended.is_set():
                with suppress(TimeoutError):
                    threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            ended.set()
            thread.join()


@contextmanager
def endless(piece: bytes, pause: float, head: bytes = b"HTTP/1.1 200 OK\r\n\r\n", drip: bytes = b"") -> Iterator[str]:
    """A server whose answer begins with `head` and goes on with a piece (or `drip`) again and again."""

    def answer(connection: socket.socket, _: bytes, ended: threading.Event) -> None:
        connection.sendall(head)
        while not ended.is_set():
            connection.sendall(piece or drip)
            time.sleep(pause)

    with _listening(answer) as url:
        yield url


@contextmanager
def redirecting(status: int, to: str) -> Iterator[str]:
    """A server that sends every request to another address."""

    def answer(connection: socket.socket, head: bytes, _: threading.Event) -> None:
        path = head.split()[1].decode()
        connection.sendall(f"HTTP/1.1 {status} Moved\r\nLocation: {to}{path}\r\nContent-Length: 0\r\n\r\n".encode())

    with _listening(answer) as url:
        yield url


@contextmanager
def recording() -> Iterator[tuple[str, list[bytes]]]:
    """A server that answers `{}` and notes the heads of the requests."""
    seen: list[bytes] = []

    def answer(connection: socket.socket, head: bytes, _: threading.Event) -> None:
        seen.append(head)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    with _listening(answer) as url:
        yield url, seen
