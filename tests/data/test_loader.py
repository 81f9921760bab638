"""Samples depend only on (seed, stream, position)."""

import collections
import dataclasses
import gc
import pickle
import random
import types
from itertools import islice

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from tiny_data import make_folder

from locreweight.config import load_config
from locreweight.data import loader as loader_module
from locreweight.data.datasets.image_folders import load_folder
from locreweight.data.image_io import UnreadableImage
from locreweight.data.loader import (
    Stream,
    StreamDataset,
    StreamPosition,
    TwoStreamBatchSampler,
    build_loader,
)
from locreweight.data.mapper import ViewMapper
from locreweight.data.transforms.policies import AugmentationPolicy, build_augmentation_policy

LABELED, UNLABELED = Stream.LABELED, Stream.UNLABELED
BURN_IN = 2
SAMPLER = {"labeled_batch": 2, "unlabeled_batch": 4, "burn_in": BURN_IN}


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "images", images=9, size=32)


def records_of(folder):
    box = {"bbox": [4, 4, 20, 28], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    return [{**record, "annotations": [dict(box)]} for record in load_folder(str(folder))]


def config(policy="SoftTeacherPolicy"):
    sizes = ["INPUT.MIN_SIZE_TRAIN", "(24, 48)", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"]
    return load_config("", ["INPUT.AUGMENTATION_POLICY", policy, *sizes])


def dataset_of(records, labeled=3, seed=7, mapper=None):
    """Use the first records as labeled images, the others as unlabeled ones."""
    mapper = mapper or ViewMapper(config())
    return StreamDataset(records[:labeled], records[labeled:], mapper, seed)


def batches(dataset, count, num_workers=0, **sampler):
    loader = build_loader(dataset, TwoStreamBatchSampler(**SAMPLER | sampler), num_workers)
    return list(islice(loader, count))


def content(sample):
    """Return all of a sample in a form that can be compared."""
    if isinstance(sample, list):
        return [content(view) for view in sample]
    if isinstance(sample, dict):
        boxes = sample["instances"].gt_boxes.tensor
        return sample["file_name"], sample["image"].tolist(), boxes.tolist()
    views = [(view.image.tolist(), view.matrix.tolist()) for view in (sample.weak, sample.strong)]
    return sample.file_name, views


def contents(batch):
    return content(batch.labeled), content(batch.unlabeled)


def are_equal(first, second):
    return [contents(batch) for batch in first] == [contents(batch) for batch in second]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(folder, num_workers):
    dataset = dataset_of(records_of(folder))
    assert are_equal(batches(dataset, 5, num_workers=num_workers), batches(dataset, 5))


def test_workers_start_after_opencv_used_threads(folder):
    """OpenCV's threads do not exist in a forked worker, which would wait for them forever."""
    cv2.setNumThreads(4)
    image = np.zeros((2000, 2000, 3), np.uint8)
    cv2.warpAffine(image, np.eye(2, 3), (2000, 2000))  # starts the threads
    dataset = dataset_of(records_of(folder))
    loader = build_loader(dataset, TwoStreamBatchSampler(**SAMPLER), num_workers=2)
    loader.timeout = 60
    assert are_equal(list(islice(loader, 3)), batches(dataset, 3))
    assert cv2.getNumThreads() == 1


def test_processes_split_the_batch(folder):
    dataset = dataset_of(records_of(folder))
    ranks = [batches(dataset, 5, rank=rank, world_size=2) for rank in (0, 1)]
    for batch, first, second in zip(batches(dataset, 5), *ranks, strict=True):
        assert len(first.labeled) == len(second.labeled) == 1
        assert content(batch.labeled) == content(first.labeled) + content(second.labeled)
        assert content(batch.unlabeled) == content(first.unlabeled) + content(second.unlabeled)


@pytest.mark.parametrize("start", [1, BURN_IN, 5])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_loader_continues_the_batches(folder, start, num_workers):
    records = records_of(folder)
    resumed = batches(dataset_of(records), 2, start=start, num_workers=num_workers)
    assert are_equal(resumed, batches(dataset_of(records), start + 2)[start:])


def test_samples_do_not_depend_on_earlier_samples(folder):
    dataset = dataset_of(records_of(folder))
    once = content(dataset[StreamPosition(UNLABELED, 3)])
    dataset[StreamPosition(LABELED, 1)]
    np.random.rand(5)
    assert content(dataset[StreamPosition(UNLABELED, 3)]) == once


@pytest.mark.parametrize("labeled", [1, 3, 8])
def test_every_epoch_contains_every_image_once(folder, labeled):
    records = records_of(folder)
    dataset = dataset_of(records, labeled)
    for stream, size in ((LABELED, labeled), (UNLABELED, len(records) - labeled)):
        names = [dataset.record(StreamPosition(stream, i))["file_name"] for i in range(5 * size)]
        epochs = [names[i : i + size] for i in range(0, len(names), size)]
        assert all(len(set(epoch)) == size for epoch in epochs)
        assert len(set(names)) == size
        if size > 5:
            assert len({tuple(epoch) for epoch in epochs}) == 5  # each has another order


def test_epoch_order_never_changes():
    """Runs that were started by earlier versions resume in the same order."""
    for size in (1, 2, 9, 1000, 70_000):
        for key in ((7, LABELED, 0), (7, UNLABELED, 3)):
            order = loader_module._epoch_order(*key, size)
            assert order.dtype == np.int32
            assert (order == np.random.default_rng(key).permutation(size)).all()
    assert loader_module._epoch_order(1, UNLABELED, 2, 9).tolist() == [0, 2, 6, 5, 3, 1, 4, 8, 7]


@pytest.mark.parametrize("size", [(24, 40), (40, 24)])
def test_all_images_are_used_if_all_have_the_same_orientation(tmp_path, size):
    records = records_of(make_folder(tmp_path / "images", images=7, size=size))
    made = batches(dataset_of(records), 3, burn_in=0)
    labeled = collections.Counter(x["file_name"] for batch in made for x in batch.labeled)
    assert labeled == dict.fromkeys((r["file_name"] for r in records[:3]), 2)
    unlabeled = collections.Counter(x.file_name for batch in made for x in batch.unlabeled)
    assert unlabeled == dict.fromkeys((r["file_name"] for r in records[3:]), 3)


def test_one_labeled_image_gives_batches_of_different_views(folder):
    made = batches(dataset_of(records_of(folder), labeled=1), 3)
    views = [x for batch in made for x in batch.labeled]
    assert len(views) == 6
    assert len({x["file_name"] for x in views}) == 1
    assert len({str(content(x)) for x in views}) == 6


def test_labeled_images_may_have_no_boxes(folder):
    records = records_of(folder)
    for record in records[:3]:
        record["annotations"] = []
    (batch,) = batches(dataset_of(records), 1)
    for sample in batch.labeled:
        assert len(sample["instances"]) == 0
        assert sample["instances"].gt_boxes.tensor.shape == (0, 4)
        assert sample["instances"].gt_classes.dtype == torch.int64


def test_batch_has_all_labeled_views_of_a_policy(folder):
    mapper = ViewMapper(config("UnbiasedTeacherPolicy"))
    (batch,) = batches(dataset_of(records_of(folder), mapper=mapper), 1)
    assert len(batch.labeled) == 2 * SAMPLER["labeled_batch"]


def test_batch_file_names(folder):
    made = batches(dataset_of(records_of(folder)), 4)[-1]
    assert len(made.file_names) == 6
    assert made.file_names[:2] == [x["file_name"] for x in made.labeled]
    assert made.file_names[2:] == [x.file_name for x in made.unlabeled]


def test_burn_in_needs_no_unlabeled_images(folder):
    made = batches(dataset_of(records_of(folder), labeled=9), 4, burn_in=10)
    assert [len(batch.labeled) for batch in made] == [2] * 4


class TestRandomness:
    def samples(self, dataset, count=8):
        return [dataset[StreamPosition(UNLABELED, i)] for i in range(count)]

    def test_weak_and_strong_view_are_independent(self, folder):
        policy = build_augmentation_policy(config())
        mapper = ViewMapper(
            policy=dataclasses.replace(policy, strong=policy.weak), image_format="BGR"
        )
        samples = self.samples(dataset_of(records_of(folder), mapper=mapper), 16)
        scales = [[abs(v.matrix[0, 0].item()) for v in (s.weak, s.strong)] for s in samples]
        flipped = [[v.matrix[0, 0].item() < 0 for v in (s.weak, s.strong)] for s in samples]
        assert sum(weak != strong for weak, strong in scales) > 12
        assert {tuple(pair) for pair in flipped} == {
            (weak, strong) for weak in (True, False) for strong in (True, False)
        }

    def test_positions_differ_for_the_same_image(self, folder):
        dataset = dataset_of(records_of(folder), labeled=8)
        assert len({str(content(sample)) for sample in self.samples(dataset)}) == 8

    def test_streams_differ(self, folder):
        records = records_of(folder)[:1]
        weak = build_augmentation_policy(config()).weak
        mapper = ViewMapper(policy=AugmentationPolicy([weak], weak, []), image_format="BGR")
        dataset = StreamDataset(records, records, mapper, seed=7)
        shapes = [
            (
                dataset[StreamPosition(LABELED, i)][0]["image"].shape,
                dataset[StreamPosition(UNLABELED, i)].weak.image.shape,
            )
            for i in range(8)
        ]
        assert any(labeled != unlabeled for labeled, unlabeled in shapes)

    def test_seeds_differ_in_order_and_views(self, folder):
        ours, theirs = (dataset_of(records_of(folder), seed=seed) for seed in (7, 8))
        orders = [
            [d.record(StreamPosition(UNLABELED, i))["file_name"] for i in range(12)]
            for d in (ours, theirs)
        ]
        assert orders[0] != orders[1]
        two_records = records_of(folder)[:2]
        views = {
            str(content(dataset_of(two_records, 1, seed)[StreamPosition(UNLABELED, 0)]))
            for seed in (7, 8)
        }
        assert len(views) == 2

    def test_position_seeds_numpy_random_and_torch(self, folder):
        class RecordDraws(T.Augmentation):
            draws = ()

            def get_transform(self, image):
                RecordDraws.draws = (np.random.rand(), random.random(), torch.rand(()).item())
                return T.NoOpTransform()

        policy = AugmentationPolicy([[]], [RecordDraws()], [])
        dataset = dataset_of(
            records_of(folder), mapper=ViewMapper(policy=policy, image_format="RGB")
        )
        drawn = []
        for index in (0, 1, 0):
            dataset[StreamPosition(UNLABELED, index)]
            drawn.append(RecordDraws.draws)
        assert drawn[0] == drawn[2]
        assert all(first != second for first, second in zip(drawn[0], drawn[1], strict=True))


def generator_states():
    name, keys, *numbers = np.random.get_state()
    return name, keys.tolist(), numbers, random.getstate(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("stream", Stream)
def test_samples_do_not_change_the_global_generators(folder, stream):
    dataset = dataset_of(records_of(folder))
    before = generator_states()
    dataset[StreamPosition(stream, 0)]
    assert generator_states() == before


def test_failed_samples_do_not_change_the_global_generators(folder):
    records = records_of(folder)
    records[0]["file_name"] = "nowhere.png"
    before = generator_states()
    with pytest.raises(UnreadableImage):
        dataset_of(records, labeled=1)[StreamPosition(LABELED, 0)]
    assert generator_states() == before


class TestTwoStreamBatchSampler:
    def positions(self, count, **sampler):
        return list(islice(TwoStreamBatchSampler(**SAMPLER | sampler), count))

    def test_burn_in_batches_have_labeled_images_only(self, folder):
        made = batches(dataset_of(records_of(folder)), 4)
        assert [len(batch.unlabeled) for batch in made] == [0, 0, 4, 4]
        assert [len(batch.labeled) for batch in made] == [2, 2, 2, 2]

    @pytest.mark.parametrize("burn_in", [0, 1, 3])
    def test_unlabeled_stream_starts_after_burn_in(self, burn_in):
        unlabeled = [p for batch in self.positions(6, burn_in=burn_in) for p in batch]
        numbers = [number for stream, number in unlabeled if stream is UNLABELED]
        assert numbers == list(range(4 * (6 - burn_in)))

    def test_labeled_stream_is_contiguous(self):
        numbers = [n for batch in self.positions(6) for stream, n in batch if stream is LABELED]
        assert numbers == list(range(12))

    @pytest.mark.parametrize("world_size", [2, 4])
    def test_processes_have_equal_disjoint_shares(self, world_size):
        shares = [
            self.positions(5, unlabeled_batch=8, labeled_batch=4, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        whole = self.positions(5, unlabeled_batch=8, labeled_batch=4)
        for batch, parts in zip(whole, zip(*shares, strict=True), strict=True):
            assert len({len(part) for part in parts}) == 1
            assert sorted(batch) == sorted(position for part in parts for position in part)


class TestUnreadable:
    def test_unlabeled_image_is_replaced_deterministically(self, folder):
        records = records_of(folder)
        broken = folder / "0005.png"
        broken.write_bytes(b"not an image")
        datasets = [dataset_of(records), dataset_of(records)]
        index = next(
            i
            for i in range(6)
            if datasets[0].record(StreamPosition(UNLABELED, i))["file_name"] == str(broken)
        )
        first, second = (d[StreamPosition(UNLABELED, index)] for d in datasets)
        assert first.file_name != str(broken)
        assert first.file_name in {r["file_name"] for r in records[3:]}
        assert content(first) == content(second)
        assert {str(broken) in message for message in first.read_errors} == {True}
        assert first.read_errors == second.read_errors

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_batches_report_replaced_images(self, folder, num_workers):
        (folder / "0005.png").unlink()
        records = records_of(folder)
        missing = {"file_name": str(folder / "0005.png")}
        made = batches(dataset_of([*records, missing]), 3, num_workers=num_workers, burn_in=0)
        assert [len(batch.unlabeled) for batch in made] == [4] * 3
        assert missing["file_name"] not in {n for batch in made for n in batch.file_names}
        # Twelve samples of seven images, of which one is missing.
        errors = [error for batch in made for error in batch.read_errors]
        assert errors
        assert all(missing["file_name"] in error for error in errors)

    def test_no_readable_unlabeled_image_is_an_error(self, folder):
        for file in folder.iterdir():
            file.write_bytes(b"")
        dataset = dataset_of(records_of(folder))
        with pytest.raises(
            UnreadableImage, match=rf"{loader_module.MAX_REPLACEMENTS} .* in a row.*\.png"
        ):
            dataset[StreamPosition(UNLABELED, 0)]

    def test_single_readable_unlabeled_image_is_found(self, folder):
        files = sorted(folder.iterdir())
        for file in files[3:-1]:
            file.write_bytes(b"")
        dataset = dataset_of(records_of(folder))
        samples = [dataset[StreamPosition(UNLABELED, i)] for i in range(6)]
        assert {sample.file_name for sample in samples} == {str(files[-1])}

    @pytest.mark.parametrize("damage", ["missing", "empty", "text", "truncated", "absurd size"])
    def test_unreadable_labeled_image_is_an_error(self, folder, damage):
        records = records_of(folder)
        file = folder / "0000.png"
        damaged = {
            "empty": b"",
            "text": b"not an image",
            "truncated": file.read_bytes()[:-900],
            # Flipped bits in a header can result in 4e9 x 4e9 pixels.
            "absurd size": b"BM" + bytes(8) + b"\x36\0\0\0\x0c\0\0\0\xff\xff\xff\xff\x01\0\x18\0",
        }
        if damage == "missing":
            file.unlink()
        else:
            file.write_bytes(damaged[damage])
        dataset = dataset_of(records, labeled=1)
        with pytest.raises(UnreadableImage, match=r"0000\.png.*repair or remove"):
            dataset[StreamPosition(LABELED, 0)]

    def test_labeled_image_with_another_size_than_its_record_is_an_error(self, folder):
        records = records_of(folder)
        records[0] |= {"height": 99, "width": 32}
        with pytest.raises(UnreadableImage, match=r"0000\.png.*99"):
            dataset_of(records, labeled=1)[StreamPosition(LABELED, 0)]


def reachable_records(root):
    """Count the record dicts that are reachable from an object."""
    stack, visited, count = [root], set(), 0
    while stack:
        item = stack.pop()
        if id(item) in visited or isinstance(
            item, (type, types.ModuleType, types.FunctionType, types.FrameType)
        ):
            continue
        visited.add(id(item))
        count += isinstance(item, dict) and "file_name" in item
        stack += gc.get_referents(item)
    return count


def test_records_are_packed():
    records = [{"file_name": f"{i}.png", "annotations": []} for i in range(500)]
    assert reachable_records(records) == 500
    dataset = dataset_of(records, labeled=200)
    assert reachable_records(dataset) == 0
    assert reachable_records(pickle.loads(pickle.dumps(dataset))) == 0  # as in a worker
    assert dataset.record(StreamPosition(LABELED, 0))["file_name"].endswith(".png")
