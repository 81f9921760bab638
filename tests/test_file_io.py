"""Tests of atomic writes and checksums of files."""

import hashlib

import pytest

from locreweight.file_io import atomic_write, atomic_write_bytes, sha256_of


def test_atomic_write_bytes_replaces_the_content(tmp_path):
    file = tmp_path / "file"
    for content in (b"old", b"new"):
        atomic_write_bytes(file, content)
        assert file.read_bytes() == content
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("bug"), KeyboardInterrupt()])
def test_failed_atomic_write_keeps_the_previous_content(tmp_path, error):
    def write(stream):
        stream.write(b"half")
        raise error

    file = tmp_path / "file"
    file.write_bytes(b"old")
    with pytest.raises(type(error)):
        atomic_write(file, write)
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_sha256_of_reads_the_whole_file(tmp_path):
    content = bytes(range(256)) * 10000  # larger than the blocks that are read
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()
