"""Packed records: round trips, in every process, without Python objects."""

import os
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from locreweight.data.datasets.packed_records import ImageFiles, PackedBytes, PackedRecords
from locreweight.data.training_sets import TrainingSets

PATHS = [
    "a.png",
    "/b.png",
    "images/c.png",
    "images/d.png",
    "/data/images/c.png",
    "images/deep/er/c.png",
    "images//c.png",
    "./c.png",
    "images/",
    "images/ä ö\n\udcff.png",
    "",
]


def files(records):
    return [record["file_name"] for record in records]


def image_files(*paths):
    return ImageFiles.of(map(os.fsencode, paths))


class TestBytes:
    @pytest.mark.parametrize("strings", [[], [b""], [b"", b"a", b"", b"bc\0d", b""], [b"x" * 9999]])
    def test_round_trip_of_strings(self, strings):
        packed = PackedBytes.of(iter(strings))
        assert len(packed) == len(strings)
        assert list(packed) == strings == [packed[i] for i in range(len(strings))]

    def test_concatenate(self):
        parts = [[b"a", b""], [], [b"bcd"], [b""]]
        joined = PackedBytes.concatenate([PackedBytes.of(part) for part in parts])
        assert list(joined) == [b"a", b"", b"bcd", b""]

    @pytest.mark.parametrize("chosen", [(0, 0, 0), (1, 1, 1), (0, 1, 1), (1, 0, 1)])
    def test_select(self, chosen):
        strings = [b"ab", b"", b"cde"]
        packed = PackedBytes.of(strings).select(torch.tensor(chosen, dtype=torch.bool))
        assert list(packed) == [s for s, keep in zip(strings, chosen, strict=True) if keep]


class TestRecords:
    RECORDS = ({"file_name": "a", "annotations": [{"bbox": [1, 2.5, 3, 4]}]}, {}, {"height": 3})

    def test_each_access_creates_a_new_record(self):
        packed = PackedRecords(self.RECORDS)
        assert list(packed) == list(self.RECORDS)
        packed[0]["annotations"].clear()
        assert packed[0] == self.RECORDS[0]

    def test_none(self):
        assert len(PackedRecords([])) == 0
        assert list(PackedRecords([])) == []


@pytest.mark.parametrize("packed", [PackedRecords([{"n": i} for i in range(5)]), range(5)])
def test_indices_as_in_lists(packed):
    if isinstance(packed, range):
        packed = image_files(*(f"{i}.png" for i in packed))
    expected = list(packed)
    assert packed[-1] == expected[4]
    assert packed[1:4] == expected[1:4]
    assert packed[::-2] == expected[::-2]
    for outside in (5, -6):
        with pytest.raises(IndexError):
            packed[outside]


class TestImageFiles:
    def test_round_trip_of_paths(self):
        packed = image_files(*PATHS)
        assert files(packed) == PATHS == files(packed[i] for i in range(len(PATHS)))
        assert [record["image_id"] for record in packed] == list(range(len(PATHS)))
        assert all(record == packed[record["image_id"]] for record in packed)

    def test_none(self):
        assert list(image_files()) == []
        assert list(ImageFiles.concatenate([image_files(), image_files()])) == []
        assert bytes(image_files().base_names) == b""

    @pytest.mark.parametrize("folder", ["", "images", "/images/", "a\udcff b"])
    def test_relative_paths(self, folder):
        packed = ImageFiles.of(map(os.fsencode, PATHS), below=folder)
        assert files(packed) == [os.path.join(folder, path) for path in PATHS]

    def test_of_records(self):
        records = [{"file_name": path, "annotations": []} for path in PATHS]
        assert files(ImageFiles.of_records(records)) == PATHS

    def test_concatenated_images_are_renumbered(self):
        joined = ImageFiles.concatenate(
            [image_files(*PATHS[:3]), image_files(), image_files(*PATHS)]
        )
        assert files(joined) == PATHS[:3] + PATHS
        assert [record["image_id"] for record in joined] == list(range(3 + len(PATHS)))

    def test_concatenating_one_part_does_not_copy(self):
        alone = image_files(*PATHS)
        assert ImageFiles.concatenate([image_files(), alone, image_files()]) is alone

    @pytest.mark.parametrize("left_out", [[], [0], [3, 4, 10], list(range(len(PATHS)))])
    def test_without(self, left_out):
        kept = image_files(*PATHS).without(left_out)
        assert files(kept) == [path for i, path in enumerate(PATHS) if i not in left_out]

    def test_in_folders(self):
        packed = image_files("a/1", "b/2", "a/3", "4")
        assert packed.folders == ["a/", "b/", ""]
        assert packed.in_folders([True, False, True]) == [0, 2, 3]
        assert image_files().in_folders([]) == []

    def test_memory_of_a_million_images(self):
        names = [f"images/{i:012d}.jpg" for i in range(1000)]
        assert len(pickle.dumps(image_files(*names))) < 1000 * (13 + len("000000000000.jpg")) + 2000


def test_fingerprint_equals_that_of_earlier_versions():
    """Values of the code that held lists of dictionaries: checkpoints have them."""
    paths = ["a/1.png", "b/c/2.png", "3.png", "a/\udcff\n.png"]
    sets = TrainingSets(PackedRecords([{"file_name": p} for p in paths]), image_files(*paths), [])
    assert sets.fingerprint == dict.fromkeys(("labeled", "unlabeled"), FINGERPRINT)
    assert TrainingSets(PackedRecords([]), image_files(), []).fingerprint["labeled"] == NOTHING


FINGERPRINT = "4 images (99975d1e4e88)"
NOTHING = "0 images (e3b0c44298fc)"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_share_memory(method):
    packed = image_files(*PATHS)
    loader = DataLoader(packed, batch_size=None, num_workers=2, multiprocessing_context=method)
    assert list(loader) == list(packed)
    blocks = (packed._names.block, packed._names.ends, packed._folder_of, packed._folders.block)
    # A forked worker has what its parent has; a spawned one what torch has moved there, once.
    assert {block.is_shared() for block in blocks} == {method == "spawn"}
    assert list(packed) == list(pickle.loads(pickle.dumps(packed)))
