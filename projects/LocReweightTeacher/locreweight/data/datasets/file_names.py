"""File names from annotation files and folders: checks, search, and their form in messages."""

from __future__ import annotations

import codecs
import difflib
import logging
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from ...errors import UsageError

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}


def printable_name(name: str) -> str:
    """A file name for messages: on one line and in characters that every log can hold."""
    return name if name.isprintable() else ascii(name)


def check_inside(name: str, index_file: str, folder: str, *, allow_outside: bool) -> None:
    """Check that a file name from an annotation file stays in the image folder.

    Only the name counts: absolute names and names with ``..`` may lead outside. Symbolic links in
    the folder are followed.

    Args:
        name: relative to ``folder``.
        index_file: the annotation file or list that contains the name.
        folder: the image folder.
        allow_outside: ``DATASETS.CHECKS.ALLOW_OUTSIDE_PATHS``.

    Raises:
        UsageError: names the annotation file and the name.
    """
    if not name.strip() or "\0" in name or not _is_encodable(name):
        raise UsageError(
            f"{printable_name(index_file)} contains {name!r}, which cannot be a file name"
        )
    if not allow_outside and (os.path.isabs(name) or ".." in name.split(os.sep)):
        raise UsageError(
            f"{printable_name(index_file)} contains {printable_name(name)}, which may lie outside "
            f"of {printable_name(folder)}. If you trust the file, set "
            "DATASETS.CHECKS.ALLOW_OUTSIDE_PATHS True"
        )


def _is_encodable(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # json can contain lone surrogates
        return False
    return True


# -- companion files -------------------------------------------------------------------------------


def is_companion(name: str) -> bool:
    """Whether the name alone shows that a file or folder is not data: hidden, or metadata of macOS.

    macOS puts a file ``._a.jpg`` beside each ``a.jpg`` on foreign disks, and these into the folder
    ``__MACOSX`` of archives. They have the suffix of an image but are none.
    """
    return name.startswith(".") or name == "__MACOSX"


def files_with_suffix(folder: str, suffix: str) -> list[str]:
    """Files in a folder and its subfolders, relative to it and sorted, without companion files."""
    found = []
    for parent, files in _walk(folder):
        found += [
            os.path.relpath(os.path.join(parent, name), folder)
            for name in files
            if os.path.splitext(name)[1].lower() == suffix and not is_companion(name)
        ]
    return sorted(found)


def _walk(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder and its files, below symbolic links too, without companion folders.

    Each folder is yielded once, by its own path if that is below ``folder``, not by that of a link.
    Links to folders that contain ``folder`` are not followed.
    """
    own = os.path.realpath(folder)
    visited: set[str] = set()  # links can form cycles
    starts = [folder]
    while starts:
        links: list[str] = []
        for parent, folders, files in chain(*map(os.walk, starts)):
            real = os.path.realpath(parent)
            contains_own = real != own and own.startswith(os.path.join(real, ""))
            if real in visited or contains_own:
                folders.clear()
                continue
            visited.add(real)
            folders[:] = sorted(name for name in folders if not is_companion(name))
            paths = (os.path.join(parent, name) for name in folders)
            links += filter(os.path.islink, paths)  # os.walk does not enter these
            yield parent, sorted(files)
        starts = links


# -- text files ------------------------------------------------------------------------------------

_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_text(file: str | Path) -> str:
    """Read a text file in UTF-8, or in the encoding that its byte order mark tells.

    Raises:
        OSError: if the file cannot be read.
        UnicodeDecodeError: if it is in another encoding.
    """
    return decode_text(Path(file).read_bytes())


def decode_text(content: bytes) -> str:
    """Decode a text in UTF-8, or in the encoding that its byte order mark tells.

    Raises:
        UnicodeDecodeError: if it is in another encoding.
    """
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if content.startswith(mark):
            return content.decode(encoding)
    return content.decode()


# -- names that nearly match -----------------------------------------------------------------------


def spelling_key(name: str) -> str:
    """The form of a name in which letter case and Unicode normal form make no difference."""
    return unicodedata.normalize("NFC", name).casefold()


def describe_missing(file: str) -> str:
    """Describe a file that does not exist, with the existing file of the most similar name."""
    name = printable_name(file)
    folder, base = os.path.split(file)
    try:
        names = [entry for entry in os.listdir(folder or ".") if not is_companion(entry)]
    except OSError:
        return f"{name} (there is no folder {printable_name(folder)})"
    keys = {spelling_key(entry): entry for entry in sorted(names)}
    nearest = difflib.get_close_matches(spelling_key(base), keys, n=1)
    return f"{name} (nearest: {printable_name(keys[nearest[0]])})" if nearest else name


class ImageFinder:
    """Finds the images of an annotation file, whose names may differ from those on the disk.

    A name that exists is used as it is. The folder is listed only if one does not. Then a name also
    matches a file that differs in

    - letter case or Unicode normal form,
    - backslashes, percent-encoding, or blanks at its ends,
    - leading folders that are those of the image folder itself, or missing folders in it,
    - for URLs, absolute paths and uploads to Label Studio, which come from another machine: any
      leading folders, and the prefix that Label Studio gives to uploads,

    provided that exactly one file matches.
    """

    def __init__(self, index_file: str, folder: str, *, allow_outside: bool) -> None:
        """
        Args:
            index_file: the annotation file, for messages.
            folder: the image folder.
            allow_outside: names may lead out of the folder.
        """
        self._index_file = index_file
        self._folder = folder
        self._allow_outside = allow_outside

    def find_all(self, names: Sequence[str]) -> list[str]:
        """Paths of images; of a missing image, where it should be.

        Raises:
            UsageError: for a name that leads out of the folder, or two names of the same image.
        """
        paths, matched = [], {}
        ambiguous: dict[str, list[str]] = {}
        for name in names:
            path = os.path.join(self._folder, name)
            is_usable = self._check(name)
            if not (is_usable and os.path.lexists(path)):
                matches = self._match(name)
                if len(matches) == 1:
                    path = matched[name] = os.path.join(self._folder, matches[0])
                elif not is_usable:
                    self._check_inside(name)
                elif matches:
                    ambiguous[name] = matches
            paths.append(path)
        self._check_unique(names, paths, matched)
        self._report(matched, ambiguous, len(names))
        return paths

    def find_with_stem(self, stem: str, name: str = "") -> str:
        """Path of the image with a name up to its suffix.

        Args:
            stem: path of the image without suffix, relative to the folder.
            name: file name that the annotation gives it, if any. It decides between images that
                differ only in their suffix, and is used if there is no image with the stem.

        Raises:
            UsageError: if several images match.
        """
        for suffix in (*_suffixes_in(name, stem), ".jpg"):
            path = os.path.join(self._folder, stem + suffix)
            if os.path.lexists(path):
                return path
        found = self._files[2].get(spelling_key(os.path.normpath(stem)), [])
        if name and len(found) != 1:
            base = spelling_key(name.replace("\\", "/").rpartition("/")[2])
            same = [
                file for file in found or self._match(name) if spelling_key(file).endswith(base)
            ]
            found = same or found
        if len(found) > 1:
            raise UsageError(
                f"the image of {printable_name(self._index_file)} may be "
                f"{' or '.join(map(printable_name, found[:3]))} in {printable_name(self._folder)}: "
                "remove or rename the others"
            )
        return os.path.join(self._folder, found[0]) if found else path

    def has(self, stem: str) -> bool:
        """Whether there is an image with a name up to its suffix, relative to the folder."""
        return spelling_key(os.path.normpath(stem)) in self._files[2]

    def _check(self, name: str) -> bool:
        """Whether a name may be used as it is. Raises if it must not be used at all."""
        check_inside(name, self._index_file, self._folder, allow_outside=True)
        if self._allow_outside or not _leads_outside(name):
            return True
        if os.path.lexists(os.path.join(self._folder, name)):
            self._check_inside(name)
        return False

    def _check_inside(self, name: str) -> None:
        check_inside(name, self._index_file, self._folder, allow_outside=self._allow_outside)

    def _match(self, name: str) -> list[str]:
        """Files that a name may mean, relative to the folder."""
        own_folders = spelling_key(os.path.abspath(self._folder)).split("/")
        by_path, by_base, _ = self._files
        for path, is_foreign in _readings(name):
            parts = [part for part in spelling_key(path).split("/") if part not in ("", ".", "..")]
            if not parts:
                continue
            for start in range(len(parts)):
                is_own = parts[:start] == own_folders[len(own_folders) - start :]
                if (is_foreign or is_own) and (found := by_path.get("/".join(parts[start:]))):
                    return found
            below = "/" + "/".join(parts)
            same_base = by_base.get(parts[-1], [])
            if found := [
                file for file in same_base if is_foreign or spelling_key(file).endswith(below)
            ]:
                return found
            original = _LABEL_STUDIO_UPLOAD.sub("", parts[-1])
            if original != parts[-1] and (found := by_base.get(original)):
                return found
        return []

    @cached_property
    def _files(self) -> tuple[dict[str, list[str]], dict[str, list[str]], dict[str, list[str]]]:
        """Files of the folder, relative to it.

        Returns:
            all files by path, all by base name, and images by path without suffix; in the form that
            :func:`spelling_key` gives.
        """
        by_path, by_base, by_stem = defaultdict(list), defaultdict(list), defaultdict(list)
        for parent, files in _walk(self._folder):
            relative = os.path.relpath(parent, self._folder)
            for file in files:
                path = os.path.normpath(os.path.join(relative, file))
                by_path[spelling_key(path)].append(path)
                by_base[spelling_key(file)].append(path)
                stem, suffix = os.path.splitext(path)
                if suffix.lower() in IMAGE_SUFFIXES and not is_companion(file):
                    by_stem[spelling_key(stem)].append(path)
        return dict(by_path), dict(by_base), dict(by_stem)

    def _check_unique(
        self, names: Sequence[str], paths: Sequence[str], matched: dict[str, str]
    ) -> None:
        if not matched:
            return
        name_of: dict[str, str] = {}
        for name, path in zip(names, paths, strict=True):
            other = name_of.setdefault(path, name)
            if other != name:
                raise UsageError(
                    f"{printable_name(self._index_file)} contains {printable_name(other)} and "
                    f"{printable_name(name)}, but only one such image is in "
                    f"{printable_name(self._folder)}: {printable_name(path)}. Put both images "
                    "there, under the names in the file"
                )

    def _report(self, matched: dict[str, str], ambiguous: dict[str, list[str]], total: int) -> None:
        if matched:
            name, path = next(iter(matched.items()))
            logger.info(
                "%s: %d of %d file names differ from those on the disk, such as %s, which is %s",
                printable_name(self._index_file),
                len(matched),
                total,
                printable_name(name),
                printable_name(path),
            )
        if ambiguous:
            name, paths = next(iter(ambiguous.items()))
            logger.warning(
                "%s: %d of %d file names are not on the disk, and several files are similar, such "
                "as %s, which may be %s. Correct the names in the file",
                printable_name(self._index_file),
                len(ambiguous),
                total,
                printable_name(name),
                " or ".join(map(printable_name, paths[:3])),
            )


def _suffixes_in(name: str, stem: str) -> list[str]:
    """The suffix of a name, in both letter cases, if it is the name of the image with the stem."""
    base, suffix = os.path.splitext(name.replace("\\", "/").rpartition("/")[2])
    is_own = spelling_key(base) == spelling_key(os.path.basename(stem))
    if not (is_own and suffix.lower() in IMAGE_SUFFIXES):
        return []
    return [suffix, suffix.lower(), suffix.upper()]


_LABEL_STUDIO_UPLOAD = re.compile(r"^[0-9a-f]{8}-")  # before the name of an uploaded file
_URL = re.compile(r"^[a-z][a-z0-9+.-]+:/", re.IGNORECASE)
_DRIVE = re.compile(r"^[a-z]:/", re.IGNORECASE)


def _leads_outside(name: str) -> bool:
    return os.path.isabs(name) or ".." in name.split(os.sep)


def _readings(name: str) -> Iterator[tuple[str, bool]]:
    """Paths that a name may mean, and whether each is a path on another machine."""
    for text in dict.fromkeys([name.strip(), name.strip().replace("\\", "/")]):
        for decoded in dict.fromkeys([text, unquote(text)]):
            parts = decoded.split("/")
            if _URL.match(decoded):
                url = urlsplit(text)
                # Label Studio serves local files as /data/local-files/?d=<path>.
                yield from ((path, True) for path in parse_qs(url.query).get("d", []))
                yield unquote(url.path), True
                yield decoded, True  # "#" and "?" may belong to the name
            elif local := parse_qs(urlsplit(text).query).get("d"):
                yield local[0], True
            else:
                is_foreign = _leads_outside(decoded) or "upload" in parts
                yield decoded, is_foreign or _DRIVE.match(decoded) is not None
