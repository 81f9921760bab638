"""Images in tar shards: packing, random access, order, resume, and storage with faults."""

import http.server
import json
import logging
import multiprocessing
import os
import pickle
import tarfile
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from detectron2.utils.file_io import PathManager
from PIL import Image
from torch.utils.data import DataLoader

from locreweight.data.datasets import shard_cache, shard_writer
from locreweight.data.datasets.image_folders import load_folder
from locreweight.data.datasets.shard_cache import ShardCache, ShardFile
from locreweight.data.datasets.shard_writer import write_shards
from locreweight.data.datasets.shards import BLOCK_TYPE, WINDOW, ShardedImages, load_shards
from locreweight.data.image_io import UnreadableImage, read_rgb
from locreweight.data.loader import Stream, StreamDataset, StreamPosition
from locreweight.engine.prediction import training_files
from locreweight.errors import UsageError
from tests.tiny_project import Project

LONG = "ä" * 70 + "/" + "b" * 90
COUNT = 23


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    (folder / LONG).mkdir(parents=True)
    for i in range(COUNT):
        name = f"{LONG}/{i}.jpg" if i % 5 == 0 else f"{i:03d}.png"
        Image.new("RGB", (8 + i, 9), (i, 0, 0)).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def packed(images, tmp_path_factory):
    return write_shards(images, tmp_path_factory.mktemp("shards"), images_per_shard=4)


@pytest.fixture
def cache(tmp_path):
    return ShardCache(tmp_path / "cache", max_bytes=10**9)


def content_of(images):
    """The bytes of all images, by name if they are in files."""
    with_path_manager = []
    for record in images:
        with PathManager.open(record["file_name"], "rb") as file:
            with_path_manager.append(file.read())
    return with_path_manager


class TestWrite:
    def test_images_are_those_of_the_folder(self, images, packed, cache):
        shards = load_shards(str(packed), cache)
        folder = load_folder(str(images))
        assert len(shards) == len(folder) == COUNT
        assert content_of(shards[:]) == content_of(folder[:])
        for shard, file in zip(shards[:], folder[:], strict=True):
            assert np.array_equal(read_rgb(shard["file_name"]), read_rgb(file["file_name"]))
        assert not cache.folder.exists()

    def test_tar_files_are_ordinary(self, images, packed):
        names = []
        for shard in json.loads(packed.read_text())["shardlist"]:
            with tarfile.open(packed.parent / shard["url"]) as tar:
                assert len(tar.getmembers()) == shard["nsamples"]
                names += tar.getnames()
        folder = load_folder(str(images))
        assert names == [os.path.relpath(r["file_name"], images) for r in folder]

    def test_stopped_and_resumed(self, images, packed, tmp_path, monkeypatch):
        output = tmp_path / "shards"
        write, calls = shard_writer._write_tar, []

        def stop(*args):
            calls.append(args)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return write(*args)

        monkeypatch.setattr(shard_writer, "_write_tar", stop)
        with pytest.raises(KeyboardInterrupt):
            write_shards(images, output, 4)
        assert not (output / "index.json").exists()
        write_shards(images, output, 4)
        assert len(calls) == 3 + 4  # 6 shards, the first two are kept
        assert {p.name: p.read_bytes() for p in output.iterdir()} == {
            p.name: p.read_bytes() for p in packed.parent.iterdir()
        }

    def test_damaged_shard_of_stopped_run_is_written_again(self, images, packed, tmp_path):
        output = tmp_path / "shards"
        shard_writer.write_shards(images, output, 4)
        (output / "index.json").unlink()
        (output / "shard-000000.tar").write_bytes(b"")
        write_shards(images, output, 4)
        assert (output / "index.json").read_bytes() == packed.read_bytes()

    def test_resumed_with_other_shards(self, images, packed, tmp_path, monkeypatch):
        def stop(*args):
            raise KeyboardInterrupt

        output = tmp_path / "shards"
        with monkeypatch.context() as patch:
            patch.setattr(shard_writer, "_write_index", stop)
            with pytest.raises(KeyboardInterrupt):
                write_shards(images, output, 2)
        write_shards(images, output, 4)
        assert {p.name for p in output.iterdir()} == {p.name for p in packed.parent.iterdir()}

    @pytest.mark.parametrize(
        ("output", "count", "message"),
        [("x", 0, "at least 1"), ("images/x", 1, "is in the image folder")],
    )
    def test_bad_arguments(self, tmp_path, output, count, message):
        (tmp_path / "images").mkdir()
        with pytest.raises(UsageError, match=message):
            write_shards(tmp_path / "images", tmp_path / output, count)

    def test_existing_index_and_empty_folder(self, images, packed, tmp_path):
        with pytest.raises(UsageError, match="exists already"):
            write_shards(images, packed.parent, 4)
        (tmp_path / "empty").mkdir()
        with pytest.raises(UsageError, match="no image"):
            write_shards(tmp_path / "empty", tmp_path / "out", 4)


class FakeMapper:
    """Reads images like ViewMapper, and returns names."""

    def unlabeled(self, record):
        read_rgb(record["file_name"])
        return record["file_name"]


def stream(shards, seed=1):
    dataset = StreamDataset([], shards, FakeMapper(), seed)
    return lambda number: dataset.record(StreamPosition(Stream.UNLABELED, number))["image_id"]


class TestOrder:
    @pytest.fixture
    def shards(self, tmp_path, cache):
        sizes = [3, 1, 5, 2] * 5
        blocks = tmp_path / "index.blocks"
        np.arange(sum(sizes), dtype=BLOCK_TYPE).tofile(blocks)
        files = [ShardFile(str(tmp_path / f"{i}.tar"), 1, str(i)) for i in range(len(sizes))]
        return ShardedImages(files, sizes, blocks, cache)

    def test_each_image_once_per_epoch(self, shards):
        at = stream(shards)
        size = len(shards)
        epochs = [[at(size * e + i) for i in range(size)] for e in range(3)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2]
        assert [stream(shards, seed=2)(i) for i in range(size)] != epochs[0]

    def test_any_position_without_those_before(self, shards):
        numbers = range(3 * len(shards))
        forward = [stream(shards)(i) for i in numbers]
        assert [stream(shards)(i) for i in reversed(numbers)] == forward[::-1]

    def test_few_shards_at_a_time(self, shards):
        starts = [0, *shards._ends.tolist()]
        at, done = stream(shards), 0
        while done < len(shards):
            seen, first = set(), done
            while done < len(shards):
                seen.add(int(np.searchsorted(starts, at(done), side="right")) - 1)
                if len(seen) > WINDOW:
                    break
                done += 1
            members = seen if len(seen) <= WINDOW else None
            assert done > first
            if members is None:
                # All images of the first WINDOW shards came before the next shard.
                assert done - first >= WINDOW

    def test_same_in_another_process(self, shards):
        copy = pickle.loads(pickle.dumps(shards))
        assert [stream(copy)(i) for i in range(50)] == [stream(shards)(i) for i in range(50)]
        assert copy[5] == shards[5]

    def test_pickle_is_small(self, shards):
        shards[0]
        assert len(pickle.dumps(shards)) < 10_000


class FaultyStore:
    """HTTP server of a folder that answers the first requests for each file with faults."""

    def __init__(self, folder):
        self.faults, self.requests = {}, []
        store = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args):
                super().__init__(*args, directory=str(folder))

            def do_GET(self):
                store.requests.append(self.path)
                remaining = store.faults.get(self.path.rpartition("/")[2], [])
                fault = remaining.pop(0) if remaining else None
                if not self.file().exists():
                    self.send_error(404)
                    return
                content = self.file().read_bytes()
                if fault == "fails":
                    self.send_error(503)
                    return
                if fault == "slow":
                    time.sleep(0.3)
                if fault == "changed":
                    content = content[:-1] + b"x"
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if fault == "truncated" else content)

            def do_HEAD(self):
                if self.file().exists():
                    self.send_response(200)
                    self.send_header("Content-Length", str(self.file().stat().st_size))
                    self.end_headers()
                else:
                    self.send_error(404)

            def file(self):
                return folder / self.path.lstrip("/").partition("?")[0]

            def log_message(self, *args):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def store(packed):
    pytest.importorskip("aiohttp")
    store = FaultyStore(packed.parent)
    yield store
    store.close()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(shard_cache, "FIRST_PAUSE", 0.001)


class TestRemote:
    def test_same_as_local(self, packed, store, cache):
        remote = load_shards(f"{store.url}/index.json", cache)
        local = load_shards(str(packed), cache)
        assert remote.digest == local.digest
        # The handler opens images of the index that was loaded last.
        local_content = content_of(local[:])
        remote = load_shards(f"{store.url}/index.json", cache)
        assert content_of(remote[:]) == local_content

    @pytest.mark.parametrize("fault", ["fails", "slow", "truncated", "changed"])
    def test_faults_are_overcome(self, packed, store, cache, fault):
        expected = content_of(load_shards(str(packed), cache)[:])
        remote = load_shards(f"{store.url}/index.json", cache)
        shards = json.loads(packed.read_text())["shardlist"]
        store.faults = {shard["url"]: [fault] * 2 for shard in shards}
        assert content_of(remote[:]) == expected
        assert not list(cache.folder.glob("*.partial"))

    def test_lasting_fault_names_the_shard(self, store, cache):
        remote = load_shards(f"{store.url}/index.json", cache)
        store.faults = {"shard-000000.tar": ["truncated"] * 100}
        with pytest.raises(UnreadableImage, match=r"shard-000000.tar, attempt 5 of 5"):
            read_rgb(remote[0]["file_name"])
        assert read_rgb(remote[4]["file_name"]).shape[2] == 3

    def test_index_is_read_again_after_a_fault(self, store, cache):
        store.faults = {"index.json": ["fails"] * 2}
        assert len(load_shards(f"{store.url}/index.json", cache)) == COUNT

    def test_missing_shard_is_not_tried_again(self, store, cache):
        with pytest.raises(OSError, match=r"none.tar, attempt 1 of 5: FileNotFoundError"):
            cache.open(ShardFile(f"{store.url}/none.tar", 1, "0" * 64))

    def test_damaged_copy_is_replaced(self, packed, store, cache):
        expected = content_of(load_shards(str(packed), cache)[:])
        content_of(load_shards(f"{store.url}/index.json", cache)[:])
        for file in cache.folder.glob("*.tar"):
            file.write_bytes(b"short")
        again = load_shards(f"{store.url}/index.json", cache)
        assert content_of(again[:]) == expected

    def test_size_of_signed_urls_is_bounded(self, store, tmp_path):
        cache = ShardCache(tmp_path / "cache", max_bytes=1)
        cache.folder.mkdir()
        (cache.folder / "mine.tar").touch()  # left alone
        remote = load_shards(f"{store.url}/index.json", cache)
        for i in range(3):
            file = remote.file(i)
            cache.open(ShardFile(f"{file.url}?key=a.b", file.size, file.sha256)).close()
        assert len(list(cache.folder.glob("*.tar*"))) == 2
        assert (cache.folder / "mine.tar").exists()

    def test_process_forked_during_a_download_does_not_keep_the_lock(self, cache):
        path = cache.folder / "a.tar"
        release, hold = os.pipe()
        with cache._locked(path, wait=True):
            child = os.fork()
            if child == 0:
                os.close(hold)
                os.read(release, 1)  # until the parent closes its end
                os._exit(0)
        try:
            with cache._locked(path, wait=False) as is_locked:
                assert is_locked
        finally:
            os.close(hold)
            os.close(release)
            os.waitpid(child, 0)

    def test_downloads_each_shard_once(self, store, cache):
        remote = load_shards(f"{store.url}/index.json", cache)
        store.requests.clear()
        content_of(remote[:])
        again = load_shards(f"{store.url}/index.json", cache)
        content_of(again[:])
        tars = [path for path in store.requests if path.endswith(".tar")]
        assert len(tars) == len(set(tars)) == remote.num_shards

    def test_bounded_size(self, packed, store, tmp_path, caplog):
        largest = max(s["filesize"] for s in json.loads(packed.read_text())["shardlist"])
        cache = ShardCache(tmp_path / "cache", max_bytes=2 * largest)
        remote = load_shards(f"{store.url}/index.json", cache)
        remote.check_cache()
        assert "CACHE_GB" in caplog.text
        expected = content_of(load_shards(str(packed), cache)[:])
        remote = load_shards(f"{store.url}/index.json", cache)
        assert content_of(remote[:]) == expected
        files = list(cache.folder.glob("*.tar"))
        assert sum(file.stat().st_size for file in files) <= cache.max_bytes

    def test_prefetch(self, store, cache):
        remote = load_shards(f"{store.url}/index.json", cache)
        remote.index_at((1, 1, 0), 0)
        deadline = time.monotonic() + 30
        while len(list(cache.folder.glob("*.tar"))) < remote.num_shards:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def test_workers_share_the_cache(self, store, cache):
        remote = load_shards(f"{store.url}/index.json", cache)
        store.requests.clear()
        with multiprocessing.get_context("fork").Pool(4) as processes:
            contents = processes.map(content_of, [remote[:]] * 4, chunksize=1)
        assert contents == [content_of(remote[:])] * 4
        tars = [path for path in store.requests if path.endswith(".tar")]
        assert len(tars) == len(set(tars)) == remote.num_shards


class TestErrors:
    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"shardlist": [{}]}'])
    def test_not_an_index(self, tmp_path, cache, content):
        (tmp_path / "index.json").write_text(content)
        with pytest.raises(UsageError, match="is not an index of shards"):
            load_shards(str(tmp_path / "index.json"), cache)

    def test_checksum_that_is_a_path(self, packed, tmp_path, cache):
        content = json.loads(packed.read_text())
        content["shardlist"][0] |= {"url": "http://localhost/a.tar", "sha256": "../../a"}
        (tmp_path / "index.json").write_text(json.dumps(content))
        with pytest.raises(UsageError, match=r"the SHA-256 of http://localhost/a.tar is '../../a'"):
            load_shards(str(tmp_path / "index.json"), cache)

    def test_blocks_of_another_index(self, packed, tmp_path, cache):
        for file in packed.parent.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "index.blocks").write_bytes(b"1234")
        with pytest.raises(UsageError, match="has 4 bytes, not 92"):
            load_shards(str(tmp_path / "index.json"), cache)

    def test_truncated_local_shard(self, packed, tmp_path, cache):
        for file in packed.parent.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        tar = tmp_path / "shard-000000.tar"
        tar.write_bytes(tar.read_bytes()[:-1])
        shards = load_shards(str(tmp_path / "index.json"), cache)
        with pytest.raises(UnreadableImage, match="bytes instead of"):
            read_rgb(shards[0]["file_name"])

    def test_wrong_block(self, packed, tmp_path, cache):
        shards = load_shards(str(packed), cache)
        blocks = tmp_path / "index.blocks"
        (np.fromfile(packed.parent / "index.blocks", BLOCK_TYPE) + 1).tofile(blocks)
        sizes = [shards.shard_size(i) for i in range(shards.num_shards)]
        files = [shards.file(i) for i in range(shards.num_shards)]
        shifted = ShardedImages(files, sizes, blocks, cache)
        with pytest.raises(UnreadableImage, match="no tar member"):
            read_rgb(shifted[0]["file_name"])

    @pytest.mark.parametrize("change", [lambda name: name + "99", lambda name: name[:-1] + "9"])
    def test_name_of_another_index(self, packed, cache, change):
        name = load_shards(str(packed), cache)[0]["file_name"]
        with pytest.raises(UnreadableImage, match="is not in the index that was loaded last"):
            read_rgb(change(name))


class TestTrainingSets:
    @pytest.fixture
    def project(self, tmp_path, packed):
        project = Project(tmp_path)
        project.set("DATASETS.UNLABELED", [f"shards:{packed}"])
        return project

    def test_samples(self, project):
        sets, dataset = project.read()
        assert isinstance(sets.unlabeled, ShardedImages)
        assert sets.fingerprint["unlabeled"].startswith(f"{COUNT} images (")
        sample = dataset[StreamPosition(Stream.UNLABELED, 5)]
        again = dataset[StreamPosition(Stream.UNLABELED, 5)]
        assert sample.file_name.startswith("shard://")
        assert sample.weak.image.equal(again.weak.image)
        assert sample.strong.image.equal(again.strong.image)

    def test_same_samples_in_forked_workers(self, project):
        _, dataset = project.read()
        positions = [StreamPosition(Stream.UNLABELED, i) for i in range(30)]
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=positions,
            num_workers=2,
            multiprocessing_context="fork",
        )
        for position, sample in zip(positions, loader, strict=True):
            expected = dataset[position]
            assert sample.file_name == expected.file_name
            assert sample.strong.image.equal(expected.strong.image)

    def test_damaged_image_is_replaced(self, project, packed, tmp_path):
        for file in packed.parent.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        tar = tmp_path / "shard-000001.tar"
        tar.write_bytes(bytes(tar.stat().st_size))
        project.set("DATASETS.UNLABELED", [f"shards:{tmp_path / 'index.json'}"])
        _, dataset = project.read()
        samples = [dataset[StreamPosition(Stream.UNLABELED, i)] for i in range(COUNT)]
        assert sum(bool(sample.read_errors) for sample in samples) == 4
        assert not any("000001" in sample.file_name for sample in samples)

    def test_monitored_images_are_of_one_shard(self, project):
        project.set("VIS_PERIOD", 1)
        sets, _ = project.read()
        names = {record["file_name"].partition("#")[0] for record in sets.monitored}
        assert len(names) == 1

    def test_changed_shards_stop_a_resumed_run(self, project, images, tmp_path):
        sets, _ = project.read()
        other = write_shards(images, tmp_path / "other", images_per_shard=5)
        project.set("DATASETS.UNLABELED", [f"shards:{other}"])
        changed, _ = project.read()
        with pytest.raises(UsageError, match="have changed since this run stopped"):
            changed.check_same(sets.fingerprint, allow_changed=False)

    def test_not_with_other_unlabeled_images(self, project):
        project.set("DATASETS.LABELED_PERCENT", 50.0)
        with pytest.raises(UsageError, match="cannot be combined with other unlabeled images"):
            project.read()

    def test_not_with_ground_truth(self, project):
        project.set("VIS_PERIOD", 1)
        project.set("DATASETS.UNLABELED_TRUTH", project.settings["DATASETS.TRAIN"])
        with pytest.raises(UsageError, match="cannot be used with images in shards"):
            project.read()

    def test_checks_of_the_other_sets_are_kept(self, project, caplog):
        project.set("DATASETS.TEST", project.settings["DATASETS.TRAIN"])
        caplog.set_level(logging.INFO)
        project.read()
        assert "labeled images are also in the test sets" in caplog.text
        assert "images in shards are not compared with the labeled and test images" in caplog.text
        project.set("SOLVER.IMS_PER_BATCH_UNLABELED", 0)
        with pytest.raises(UsageError, match="SOLVER.IMS_PER_BATCH_UNLABELED above 0"):
            project.read()

    def test_tools_that_write_names_of_files_refuse_shards(self, project):
        detector = SimpleNamespace(cfg=project.config())
        with pytest.raises(UsageError, match="are in shards, not in files: give --input"):
            training_files(detector)

    def test_not_as_labeled_images(self, project, packed):
        project.set("DATASETS.TRAIN", [f"shards:{packed}"])
        with pytest.raises(UsageError, match="has no annotations"):
            project.read()

    def test_missing_index(self, project, tmp_path):
        project.set("DATASETS.UNLABELED", [f"shards:{tmp_path / 'none.json'}"])
        with pytest.raises(UsageError, match=r"none\.json' of the data set .* does not exist"):
            project.read()
