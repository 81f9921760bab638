"""Unlabeled images in tar shards, on disks or in object storage.

``tools/make_shards.py`` writes the shards and their index::

    {"wids_version": 1,
     "shardlist": [{"url": "shard-000000.tar", "nsamples": 2000, "filesize": 1, "sha256": "..."}],
     "blocks": {"url": "index.blocks", "sha256": "..."}}

URLs are relative to the index. The tar files and the list of shards are those of WebDataset. The
file of blocks holds one little-endian uint32 per image: the number of 512-byte blocks before its
tar header. It is mapped into memory, so that an index of any size takes little of it.

An image is named ``shard://<url of the tar file>#<image_id>``. Detectron2's ``PathManager`` opens
such names once an index has been loaded.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler

from ...errors import UsageError
from .packed_records import Packed, PackedBytes
from .shard_cache import ShardCache, ShardFile, is_local, open_url, with_retries

logger = logging.getLogger(__name__)

PREFIX = "shard://"
BLOCK = 512  # bytes, of tar
BLOCK_TYPE = np.dtype("<u4")
WINDOW = 8  # shards whose images are mixed
_MAX_OPEN = 2 * WINDOW  # files in each process


class ShardedImages(Packed):
    """Records of the images of an index: ``file_name`` and ``image_id``, the index.

    An epoch reads the shards in a new random order, :data:`WINDOW` at a time. The images of a
    window are mixed, so few shards are needed at the same time.
    """

    def __init__(
        self, files: Sequence[ShardFile], sizes: Sequence[int], blocks: Path, cache: ShardCache
    ) -> None:
        """
        Args:
            files: the shards.
            sizes: number of images in each.
            blocks: local file with the block of each image.
            cache: of remote shards.
        """
        self._files = PackedBytes.of(json.dumps([f.url, f.size, f.sha256]).encode() for f in files)
        self._ends = np.cumsum(np.array(sizes, np.int64))
        self._blocks_file = blocks
        self._cache = cache
        self._map: np.ndarray | None = None
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()  # by shard
        self._prefetched: tuple[int, ...] = ()  # epoch and window
        self._orders: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}
        self.digest = hashlib.sha256("".join(file.sha256 for file in files).encode()).hexdigest()
        _HANDLER.images = self

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = state
        _HANDLER.images = self  # in a spawned worker

    def __getstate__(self) -> dict:
        # The map would be pickled with its content; descriptors are of this process.
        return self.__dict__ | {"_map": None, "_open": OrderedDict(), "_prefetched": ()}

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def num_shards(self) -> int:
        return len(self._ends)

    def file(self, shard: int) -> ShardFile:
        """A shard."""
        return ShardFile(*json.loads(self._files[shard]))

    def shard_size(self, shard: int) -> int:
        """Number of images in a shard."""
        return int(self._ends[shard] - (self._ends[shard - 1] if shard else 0))

    def check_cache(self) -> None:
        """Warn if the cache is smaller than the shards that are used at the same time."""
        files = [self.file(i) for i in range(min(self.num_shards, 2 * WINDOW))]
        needed = sum(file.size for file in files if not is_local(file.url))
        if needed > self._cache.max_bytes:
            logger.warning(
                "DATASETS.SHARDS.CACHE_GB is %.3g, but %d shards, which are used at the same time, "
                "take about %.3g GB: shards will be downloaded again and again",
                self._cache.max_bytes / 1e9,
                len(files),
                needed / 1e9,
            )

    def index_at(self, seed: Sequence[int], offset: int) -> int:
        """The image at a position in an epoch.

        Also starts to download the shards of the next window.

        Args:
            seed: of the epoch.
            offset: position in the epoch, below the number of images.
        """
        order, ends = self._shard_order(tuple(seed))
        window = int(np.searchsorted(ends, offset, side="right"))
        start = int(ends[window - 1]) if window else 0
        shards = order[window * WINDOW : (window + 1) * WINDOW]
        if self._prefetched != (*seed, window):
            self._prefetched = (*seed, window)
            soon = order[window * WINDOW : (window + 2) * WINDOW]
            self._cache.prefetch([self.file(int(shard)) for shard in soon])
        mixed = _mixed((*seed, window), int(ends[window]) - start)
        place = int(mixed[offset - start])
        for shard in map(int, shards):
            size = self.shard_size(shard)
            if place < size:
                return int(self._ends[shard]) - size + place
            place -= size
        raise AssertionError("the window ends after its shards")

    def open(self, name: str) -> BinaryIO:
        """Open an image by its ``file_name``.

        Raises:
            OSError: if it cannot be downloaded, or is not in the shard.
        """
        url, _, number = name.removeprefix(PREFIX).rpartition("#")
        index = int(number)
        shard = self._shard_of(index)
        if index >= len(self) or self.file(shard).url != url:
            raise OSError(f"{name} is not in the index that was loaded last")
        block = self._block(index)
        descriptor = self._opened(shard).fileno()
        header = os.pread(descriptor, BLOCK, block * BLOCK)
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise OSError(f"there is no tar member at block {block} of {url}: {error}") from error
        content = os.pread(descriptor, member.size, (block + 1) * BLOCK)
        if len(content) != member.size:
            raise OSError(f"{url} ends within its member {member.name}")
        return io.BytesIO(content)

    def _record(self, index: int) -> dict:
        return {
            "file_name": f"{PREFIX}{self.file(self._shard_of(index)).url}#{index}",
            "image_id": index,
        }

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, side="right"))

    def _block(self, index: int) -> int:
        if self._map is None:
            self._map = np.memmap(self._blocks_file, BLOCK_TYPE, "r")
        return int(self._map[index])

    def _opened(self, shard: int) -> BinaryIO:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        file = self.file(shard)
        opened = self._cache.open(file)
        size = os.fstat(opened.fileno()).st_size
        if size != file.size:
            opened.close()
            raise OSError(f"{file.url} has {size} bytes instead of {file.size}")
        self._open[shard] = opened
        if len(self._open) > _MAX_OPEN:
            self._open.popitem(last=False)[1].close()
        return opened

    def _shard_order(self, seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of an epoch, and the end of each window in the epoch."""
        if seed not in self._orders:
            order = np.random.default_rng(seed).permutation(self.num_shards)
            sizes = np.diff(self._ends, prepend=0)[order]
            ends = np.cumsum(np.add.reduceat(sizes, np.arange(0, len(sizes), WINDOW)))
            # A batch can span the end of an epoch.
            self._orders = dict([*self._orders.items()][-1:]) | {seed: (order, ends)}
        return self._orders[seed]


@lru_cache(maxsize=4)
def _mixed(seed: tuple[int, ...], size: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(size).astype(np.int32)


class _ShardHandler(PathHandler):
    """Opens images of the index that was loaded last."""

    def __init__(self) -> None:
        super().__init__()
        self.images: ShardedImages | None = None

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **_: Any) -> BinaryIO:
        if self.images is None:
            raise OSError("no index of shards is loaded")
        return self.images.open(path)


_HANDLER = _ShardHandler()
PathManager.register_handler(_HANDLER, allow_override=True)


def _read_index(index: str) -> bytes:
    def read() -> bytes:
        with open_url(index) as file:
            return file.read()

    return read() if is_local(index) else with_retries(read, index)


def load_shards(index: str, cache: ShardCache) -> ShardedImages:
    """Read an index.

    Args:
        index: path or URL of the json file.
        cache: of remote files.

    Raises:
        UsageError: if a file of the index cannot be read or is not one.
    """
    base = index.rpartition("/")[0]

    def resolve(url: str) -> str:
        return url if "://" in url or os.path.isabs(url) or not base else f"{base}/{url}"

    try:
        content = json.loads(_read_index(index))
        shards = content["shardlist"]
        files = [ShardFile(resolve(s["url"]), s["filesize"], s["sha256"]) for s in shards]
        sizes = [shard["nsamples"] for shard in shards]
        total = sum(sizes)
        blocks = content["blocks"]
        blocks_file = ShardFile(
            resolve(blocks["url"]), BLOCK_TYPE.itemsize * total, blocks["sha256"]
        )
        path = cache.local_path(blocks_file)
        if path.stat().st_size != blocks_file.size:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, not {blocks_file.size}")
    except UsageError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(
            f"{index} is not an index of shards ({type(error).__name__}: {error}); write one with "
            "tools/make_shards.py"
        ) from error
    except Exception as error:  # each kind of storage has its own exceptions
        raise UsageError(
            f"the index {index} cannot be read: {type(error).__name__}: {error}"
        ) from error
    if not total:
        raise UsageError(f"{index} lists no image")
    if min(sizes) <= 0:
        raise UsageError(f"{index} has a shard without images: write it again")
    return ShardedImages(files, sizes, path, cache)
