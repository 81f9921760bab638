"""Shards in an S3 object store, with injected faults. The store is moto's server."""

import http.client
import http.server
import threading
import time

import pytest
from detectron2.utils.file_io import PathManager
from PIL import Image

from locreweight.data.datasets import shard_cache
from locreweight.data.datasets.shard_cache import ShardCache
from locreweight.data.datasets.shard_writer import write_shards
from locreweight.data.datasets.shards import load_shards

pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")


class FaultyProxy:
    """Forwards to the object store, and answers some downloads of shards with a fault."""

    def __init__(self, port):
        self.faults, self.injected = [], 0
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self):
                length = int(self.headers.get("Content-Length", 0))
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                body = self.rfile.read(length) if length else None
                connection.request(self.command, self.path, body, dict(self.headers))
                response = connection.getresponse()
                content = response.read()
                connection.close()
                is_download = self.command == "GET" and ".tar" in self.path
                fault = proxy.faults.pop() if is_download and proxy.faults else ""
                proxy.injected += bool(fault)
                if fault == "slow":
                    time.sleep(0.3)
                self.send_response(500 if fault == "fails" else response.status)
                for key, value in response.getheaders():
                    if key.lower() not in ("connection", "transfer-encoding", "content-length"):
                        self.send_header(key, value)
                sent = response.getheader("Content-Length")
                size = sent if self.command == "HEAD" and sent else str(len(content))
                self.send_header("Content-Length", size)
                self.send_header("Connection", "close")
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(
                        content[: len(content) // 2] if fault == "truncated" else content
                    )
                self.close_connection = True

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

            def log_message(self, *args):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    images = tmp_path_factory.mktemp("images")
    for i in range(9):
        Image.new("RGB", (64, 64), (i, 9, 9)).save(images / f"{i}.png")
    return write_shards(images, tmp_path_factory.mktemp("shards"), images_per_shard=3)


@pytest.fixture(scope="module")
def proxy(packed):
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = FaultyProxy(server.get_host_and_port()[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        import s3fs

        storage = s3fs.S3FileSystem()
        storage.mkdir("bucket")
        for file in packed.parent.iterdir():
            storage.pipe_file(f"bucket/shards/{file.name}", file.read_bytes())
        yield proxy
    proxy.close()
    server.stop()


@pytest.mark.parametrize("fault", ["", "slow", "fails", "truncated"])
def test_same_images_as_locally(packed, proxy, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(shard_cache, "FIRST_PAUSE", 0.001)
    cache = ShardCache(tmp_path / "cache", max_bytes=10**9)

    def contents(index):
        found = []
        for record in load_shards(index, cache):
            with PathManager.open(record["file_name"], "rb") as file:
                found.append(file.read())
        return found

    expected = contents(str(packed))
    proxy.faults, proxy.injected = [fault] * 2 if fault else [], 0
    assert contents("s3://bucket/shards/index.json") == expected
    assert proxy.injected == (2 if fault else 0)
