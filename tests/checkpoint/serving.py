"""Model zoos for tests: folders with small files, and a local web server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from locreweight.checkpoint.zoo import CONFIG, ENTRY, ZooEntry, write_index
from locreweight.file_io import sha256_of


class _Handler(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Serve a folder on a free port; ``requests`` lists the requested paths."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
        self.requests: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def write_entry(
    zoo: Path, name: str, weights: bytes = b"weights", config: str = "VERSION: 2\n"
) -> ZooEntry:
    """Add a model with arbitrary bytes as weights to a zoo."""
    folder = zoo / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / CONFIG).write_text(config)
    entry = ZooEntry(
        name=name,
        weights="model.safetensors",
        sha256={file: sha256_of(folder / file) for file in ("model.safetensors", CONFIG)},
        class_names=["cat", "dog"],
    )
    (folder / ENTRY).write_text(entry.as_json())
    write_index(zoo)
    return entry
