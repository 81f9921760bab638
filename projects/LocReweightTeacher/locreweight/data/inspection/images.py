"""Every image of some data sets, read once: does it decode, how large is it, which are copies."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image
from tqdm import tqdm

from ..image_io import UnreadableImage, read_rgb, single_line

_ORIENTATION = 0x0112  # of EXIF; 1 is upright
_HASH_SIDE = 16  # dHash of 16 x 16 = 256 bits
# Bits in which images may differ and still be taken for copies. Copies that were recompressed,
# halved in size or made brighter differ in up to 38 (in 8, if they are photographs); different
# photographs of blood cells, which are much alike, in at least 84.
_ALIKE_BITS = 40
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class ImageFacts:
    """What an image file is.

    Attributes:
        file: its path.
        fault: why it cannot be read; empty if it can.
        size: ``(width, height)`` in pixels, upright.
        rotated: whether its EXIF asks for a rotation or a flip.
        digest: of the file's content.
        look: ``(4,)`` uint64, a hash of the upright image that copies share but for some bits.
    """

    file: str
    fault: str
    size: tuple[int, int] = (0, 0)
    rotated: bool = False
    digest: str = ""
    look: np.ndarray = field(default_factory=lambda: np.zeros(4, np.uint64))


@dataclass(frozen=True)
class Copy:
    """An image that is another one as well; ``exact`` if their files have the same content."""

    file: str
    of: str
    exact: bool


def survey(files: Iterable[str]) -> dict[str, ImageFacts]:
    """Read images, several at a time, with a progress bar on terminals.

    Returns:
        the facts by file, each once.
    """
    unique = list(dict.fromkeys(files))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        facts = tqdm(
            threads.map(read_facts, unique), "reading images", total=len(unique), disable=None
        )
        return {found.file: found for found in facts}


def read_facts(file: str) -> ImageFacts:
    """Read one image as training reads it."""
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
        digest=hashlib.sha256(Path(file).read_bytes()).hexdigest(),
        look=np.packbits(bits).view(np.uint64),
    )


def copies_within(images: list[ImageFacts]) -> list[Copy]:
    """Images that another one before them in the list is a copy of."""
    first: dict[str, ImageFacts] = {}
    found, others = [], []
    for image in _readable(images):
        original = first.setdefault(image.digest, image)
        if original is image:
            others.append(image)
        else:
            found.append(Copy(image.file, original.file, exact=True))
    return found + _alike(others, others, only_before=True)


def copies_between(originals: list[ImageFacts], images: list[ImageFacts]) -> list[Copy]:
    """Images that are among the originals, but for those that are the very same file."""
    known = {os.path.realpath(original.file) for original in originals}
    by_digest = {original.digest: original for original in reversed(_readable(originals))}
    found, others = [], []
    for image in _readable(images):
        if os.path.realpath(image.file) in known:
            continue
        # Many images may look alike, as dark ones do: which one has the same content is looked up.
        if image.digest in by_digest:
            found.append(Copy(image.file, by_digest[image.digest].file, exact=True))
        else:
            others.append(image)
    return found + _alike(_readable(originals), others, only_before=False)


def _readable(images: list[ImageFacts]) -> list[ImageFacts]:
    return [image for image in images if not image.fault]


def _alike(originals: list[ImageFacts], images: list[ImageFacts], only_before: bool) -> list[Copy]:
    """Images of other content that look like an original: each with the one that it is closest to.

    Args:
        originals, images: that can be read.
        only_before: both are the same list, and only originals before an image count.
    """
    if not originals or not images:
        return []
    known, looks = (np.stack([x.look for x in group]) for group in (originals, images))
    found = []
    for start in range(0, len(images), _ROWS_AT_ONCE):
        rows = looks[start : start + _ROWS_AT_ONCE, None]
        differ = np.bitwise_count(rows ^ known).sum(axis=2, dtype=np.uint16)
        for i, distances in enumerate(differ, start):
            candidates = distances[:i] if only_before else distances
            if len(candidates) and candidates.min() <= _ALIKE_BITS:
                original = originals[int(candidates.argmin())]
                found.append(Copy(images[i].file, original.file, exact=False))
    return found
