"""Pack the images of a folder into tar shards with an index. See :mod:`.shards` for the format."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from ...errors import UsageError
from ...file_io import atomic_write, atomic_write_bytes, sha256_of
from .file_names import printable_name
from .image_folders import image_paths
from .shards import BLOCK, BLOCK_TYPE

INDEX_FILE = "index.json"
BLOCKS_FILE = "index.blocks"
PROGRESS_FOLDER = "progress"


@dataclass(frozen=True)
class _Shard:
    """A finished shard.

    Attributes:
        source: SHA-256 of the names, sizes and modification times of its images.
        sha256: of the tar file.
        filesize: of the tar file, in bytes.
        blocks: where the tar header of each image starts, in blocks.
    """

    source: str
    sha256: str
    filesize: int
    blocks: list[int]


def write_shards(images: Path, output: Path, images_per_shard: int) -> Path:
    """Pack a folder. If an earlier call was stopped, its finished shards are kept.

    The shards depend only on the names and contents of the images. Images are in the order of
    ``folder:``, under their path in the folder.

    Args:
        images: folder of the images.
        output: folder of the shards, which must be new or hold an unfinished one.
        images_per_shard: of all but the last shard.

    Returns:
        the index.

    Raises:
        UsageError: if there is no image, an image cannot be read, or the output cannot be written.
    """
    index = output / INDEX_FILE
    if images_per_shard < 1:
        raise UsageError(f"a shard must have at least 1 image, not {images_per_shard}")
    if index.exists():
        raise UsageError(f"{index} exists already: use another output folder, or remove this one")
    if not images.is_dir():
        raise UsageError(f"the image folder {images} does not exist")
    if output.resolve().is_relative_to(images.resolve()):
        raise UsageError(f"the output folder {output} is in the image folder {images}")
    files = [os.path.relpath(path, images) for path in sorted(image_paths(str(images)))]
    if not files:
        raise UsageError(f"there is no image in {images}")
    try:
        (output / PROGRESS_FOLDER).mkdir(parents=True, exist_ok=True)
        shards = _write_all(images, output, files, images_per_shard)
        _write_index(output, index, shards)
    except OSError as error:
        name = printable_name(str(error.filename or output))
        raise UsageError(f"{name}: {error.strerror or error}") from error
    return index


def _write_all(
    images: Path, output: Path, files: Sequence[str], images_per_shard: int
) -> dict[str, _Shard]:
    shards = {}
    with tqdm(total=len(files), desc="packing", unit="image", disable=None) as progress:
        for number, start in enumerate(range(0, len(files), images_per_shard)):
            part = files[start : start + images_per_shard]
            name = f"shard-{number:06d}.tar"
            shards[name] = _write_or_keep(images, output, name, part)
            progress.update(len(part))
    return shards


def _write_or_keep(images: Path, output: Path, name: str, files: Sequence[str]) -> _Shard:
    source = _describe(images, files)
    record = output / PROGRESS_FOLDER / f"{name}.json"
    tar = output / name
    if record.exists():
        shard = _Shard(**json.loads(record.read_text()))
        if shard.source == source and tar.exists() and tar.stat().st_size == shard.filesize:
            return shard
    blocks: list[int] = []
    atomic_write(tar, lambda file: blocks.extend(_write_tar(images, files, file)))
    shard = _Shard(source, sha256_of(tar), tar.stat().st_size, blocks)
    atomic_write_bytes(record, json.dumps(asdict(shard)).encode())
    return shard


def _describe(images: Path, files: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for file in files:
        status = os.stat(images / file)
        digest.update(repr((file, status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()


def _write_tar(images: Path, files: Sequence[str], output: BinaryIO) -> list[int]:
    """Write a tar file whose bytes depend only on names and contents; returns the blocks."""
    blocks = []
    for name in files:
        content = (images / name).read_bytes()
        member = tarfile.TarInfo(name)
        member.size = len(content)
        # A long name is written before the header that the index points to.
        header = member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
        blocks.append((output.tell() + len(header)) // BLOCK - 1)
        output.write(header + content + bytes(-len(content) % BLOCK))
    output.write(bytes(2 * BLOCK))
    return blocks


def _write_index(output: Path, index: Path, shards: dict[str, _Shard]) -> None:
    blocks = np.concatenate([np.array(shard.blocks, BLOCK_TYPE) for shard in shards.values()])
    atomic_write_bytes(output / BLOCKS_FILE, blocks.tobytes())
    content = {
        "wids_version": 1,
        "shardlist": [
            {
                "url": name,
                "nsamples": len(shard.blocks),
                "filesize": shard.filesize,
                "sha256": shard.sha256,
            }
            for name, shard in shards.items()
        ],
        "blocks": {"url": BLOCKS_FILE, "sha256": sha256_of(output / BLOCKS_FILE)},
    }
    atomic_write_bytes(index, json.dumps(content, indent=1).encode() + b"\n")
    for file in (output / PROGRESS_FOLDER).iterdir():
        if file.suffix == ".json" and file.stem not in shards:  # of a call with other arguments
            (output / file.stem).unlink(missing_ok=True)
        file.unlink()
    (output / PROGRESS_FOLDER).rmdir()
