"""Byte ranges of a Hub model's files at its commit, read straight into memory and never kept on the disk.

The Hub answers a request for a file with the address of its content, which is valid for a while. Ranges are requested
there. A range that breaks off resumes after the last byte that came, so that no byte is fetched twice.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from ...errors import InputError
from .errors import hub_errors, network_error, status_of
from .guarded import origin_of
from .patience import Patience
from .repository import OTHERWISE, HubModel

# The stores behind the Hub answer like this to an expired address.
_EXPIRED = frozenset({400, 401, 403, 410})
_TIMEOUT_SECONDS = 30.0


class RangeReader:
    """Reads ranges of one model's files, and is safe to use from several threads."""

    def __init__(self, model: HubModel) -> None:
        self.model = model
        self._ended = threading.Event()
        self._addresses: dict[str, str] = {}
        self._lock = threading.Lock()

    def end(self) -> None:
        """End all present waits for the network. Later reads are not affected."""
        self._ended.set()
        self._ended = threading.Event()

    def read_into(self, name: str, begin: int, buffer: memoryview) -> None:
        """Fill `buffer` from the byte `begin` of a file on.

        Raises:
            InputError: the Hub refuses, cannot be reached or has other content than it published for the commit, or
                `end` was called.
        """
        ended, done = self._ended, 0
        patience = Patience(ended)
        doing = f"{name} of {self.model.repo}"
        with hub_errors("model", self.model.repo, self.model.commit[:12], OTHERWISE):
            while done < len(buffer):
                try:
                    for piece in self._pieces(name, begin + done, begin + len(buffer)):
                        buffer[done : done + len(piece)] = piece
                        done += len(piece)
                        patience.progressed()
                        if ended.is_set():
                            raise InputError("the run has ended.")
                except network_error() as error:
                    if not self._has_expired(name, error):
                        patience.wait_after(error, f"{doing} at byte {begin + done:,}")

    def _pieces(self, name: str, begin: int, end: int) -> Iterator[bytes]:
        """The bytes `begin` to `end` as they come, in order. They may end early."""
        from huggingface_hub import get_session, get_token, hf_raise_for_status

        address = self._address(name)
        headers = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        token = get_token()
        if token is not None and self._is_the_hub(address):  # it is for nobody else
            headers["Authorization"] = f"Bearer {token}"
        with get_session().stream("GET", address, headers=headers, timeout=_TIMEOUT_SECONDS) as response:
            hf_raise_for_status(response)
            self._check_range(name, begin, response)
            left = end - begin
            for piece in response.iter_raw():
                yield piece[:left]
                left -= len(piece)
                if left <= 0:
                    return
        if left > 0:
            raise network_error()(f"the connection ended {left} bytes early")

    def _check_range(self, name: str, begin: int, response: Any) -> None:
        size = self.model.file(name).size
        stated = response.headers.get("Content-Range") or ""
        if response.status_code == 200 and begin == 0:
            return
        if response.status_code != 206:
            raise InputError(
                f"the server does not send {name} in ranges (HTTP {response.status_code})",
                where=f"Hub model {self.model.repo}",
                hint="run without --low-disk, or download the model first",
            )
        first, _, total = stated.removeprefix("bytes ").partition("/")
        if not first.startswith(f"{begin}-") or (total.isdigit() and size is not None and int(total) != size):
            raise InputError(
                f"the server sent another range of {name} than requested ({stated or 'none'} of {size})",
                where=f"Hub model {self.model.repo}",
                hint="check HF_ENDPOINT and the network",
            )

    def _address(self, name: str) -> str:
        """The present address of the content. The Hub's ETag and commit must be the published ones."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        with self._lock:
            if name not in self._addresses:
                model, file = self.model, self.model.file(name)
                url = hf_hub_url(model.repo, name, revision=model.commit, endpoint=model.endpoint)
                found = get_hf_file_metadata(url, endpoint=model.endpoint)
                if (found.etag, found.size, found.commit_hash) != (file.etag, file.size, model.commit):
                    raise InputError(
                        f"{name} has another ETag or size than published at commit {model.commit[:12]}",
                        where=f"Hub model {model.repo}",
                        hint="try again later",
                    )
                self._addresses[name] = found.location
            return self._addresses[name]

    def _has_expired(self, name: str, error: Exception) -> bool:
        """Whether an address that worked has expired, so that the next read requests a new one."""
        with self._lock:
            address = self._addresses.get(name)
            if address is None or self._is_the_hub(address) or status_of(error) not in _EXPIRED:
                return False
            del self._addresses[name]
            return True

    def _is_the_hub(self, address: str) -> bool:
        return origin_of(address) == origin_of(self.model.endpoint)
