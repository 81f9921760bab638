"""Survey of image files: whether they can be decoded, their size, and which are copies."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import imagehash
import numpy as np
from PIL import Image
from tqdm import tqdm

from ...file_io import sha256_of
from ..image_io import UnreadableImage, read_rgb, single_line

_ORIENTATION = 0x0112  # of EXIF; 1 is upright
_HASH_SIDE = 16  # dHash of 16 x 16 = 256 bits
# Images count as copies if at most this many bits differ. Measured: copies that were recompressed,
# halved in size or brightened differ in up to 38 bits (photographs in 8), different photographs of
# blood cells, which are very similar, in at least 84.
_MAX_DIFFERENT_BITS = 40
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class ImageFacts:
    """Properties of an image file.

    Attributes:
        file: path.
        fault: why it cannot be read; empty if it can.
        size: ``(width, height)`` in pixels after EXIF rotation.
        rotated: whether its EXIF orientation is a rotation or flip.
        digest: SHA-256 of the file.
        perceptual_hash: ``(4,)`` uint64, dHash of the upright image; copies differ in few bits.
    """

    file: str
    fault: str
    size: tuple[int, int] = (0, 0)
    rotated: bool = False
    digest: str = ""
    perceptual_hash: np.ndarray = field(default_factory=lambda: np.zeros(4, np.uint64))


@dataclass(frozen=True)
class Copy:
    """An image that is a copy of another; ``exact`` if the files have the same content."""

    file: str
    of: str
    exact: bool


def survey(files: Iterable[str]) -> dict[str, ImageFacts]:
    """Read images in threads, with a progress bar on terminals.

    Returns:
        file -> its properties.
    """
    unique = list(dict.fromkeys(files))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        facts = tqdm(
            threads.map(read_facts, unique), "reading images", total=len(unique), disable=None
        )
        return {found.file: found for found in facts}


def read_facts(file: str) -> ImageFacts:
    """Read an image in the way training does."""
    try:
        pixels = Image.fromarray(read_rgb(file))
        with Image.open(file) as image:
            rotated = image.getexif().get(_ORIENTATION, 1) != 1
    except UnreadableImage as error:
        return ImageFacts(file, fault=single_line(error.__cause__ or error))
    bits = imagehash.dhash(pixels, hash_size=_HASH_SIDE).hash
    return ImageFacts(
        file,
        fault="",
        size=pixels.size,
        rotated=rotated,
        digest=sha256_of(file),
        perceptual_hash=np.packbits(bits).view(np.uint64),
    )


def copies_within(images: list[ImageFacts]) -> list[Copy]:
    """Find images that are copies of an earlier image in the list."""
    first: dict[str, ImageFacts] = {}
    copies, others = [], []
    for image in _readable(images):
        original = first.setdefault(image.digest, image)
        if original is image:
            others.append(image)
        else:
            copies.append(Copy(image.file, original.file, exact=True))
    return copies + _similar(others, others, only_before=True)


def copies_between(originals: list[ImageFacts], images: list[ImageFacts]) -> list[Copy]:
    """Find images that are copies of originals, without images that are the same file."""
    known = {os.path.realpath(original.file) for original in originals}
    by_digest = {original.digest: original for original in reversed(_readable(originals))}
    copies, others = [], []
    for image in _readable(images):
        if os.path.realpath(image.file) in known:
            continue
        # By content first: many images, such as dark ones, have similar perceptual hashes.
        if image.digest in by_digest:
            copies.append(Copy(image.file, by_digest[image.digest].file, exact=True))
        else:
            others.append(image)
    return copies + _similar(_readable(originals), others, only_before=False)


def _readable(images: list[ImageFacts]) -> list[ImageFacts]:
    return [image for image in images if not image.fault]


def _similar(
    originals: list[ImageFacts], images: list[ImageFacts], only_before: bool
) -> list[Copy]:
    """Find images that look like an original, and the most similar original of each.

    Args:
        originals, images: readable images.
        only_before: both are the same list, and only earlier originals count.
    """
    if not originals or not images:
        return []
    known, hashes = (np.stack([x.perceptual_hash for x in group]) for group in (originals, images))
    copies = []
    for start in range(0, len(images), _ROWS_AT_ONCE):
        rows = hashes[start : start + _ROWS_AT_ONCE, None]
        differ = np.bitwise_count(rows ^ known).sum(axis=2, dtype=np.uint16)
        for i, distances in enumerate(differ, start):
            candidates = distances[:i] if only_before else distances
            if len(candidates) and candidates.min() <= _MAX_DIFFERENT_BITS:
                original = originals[int(candidates.argmin())]
                copies.append(Copy(images[i].file, original.file, exact=False))
    return copies
