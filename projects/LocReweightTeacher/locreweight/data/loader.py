"""The training data loader: two endless streams of labeled and unlabeled images.

A sample depends only on (seed, stream, position in the stream). These three numbers determine which
image is loaded and everything that its augmentations draw at random. Batches are therefore the same
for any number of loader workers and processes, and training can resume at any iteration without
replaying the ones before it.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache, partial
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .datasets.packed_records import Packed, PackedRecords
from .datasets.shards import ShardedImages
from .image_io import UnreadableImage
from .mapper import ViewMapper
from .transforms.views import UnlabeledSample, View

# Give up after this many unreadable unlabeled images in a row. Chance alone does not produce such a
# row: even if 80 % of the images are unreadable, its probability is 0.8 ** 100 = 2e-10.
MAX_REPLACEMENTS = 100


class Stream(IntEnum):
    """The two streams. The value is part of the random seed."""

    LABELED = 0
    UNLABELED = 1


class StreamPosition(NamedTuple):
    """The number of a sample in a stream, from 0. With the seed, it determines the sample."""

    stream: Stream
    number: int


@dataclass(frozen=True)
class Batch:
    """The training batch of one process for one iteration."""

    labeled: list[dict]
    unlabeled: list[UnlabeledSample]

    @property
    def file_names(self) -> list[str]:
        """The files of all images in the batch, for error messages."""
        return [x["file_name"] for x in self.labeled] + [x.file_name for x in self.unlabeled]

    @property
    def read_errors(self) -> list[str]:
        """One message for each unlabeled image that was drawn but could not be read."""
        return [error for sample in self.unlabeled for error in sample.read_errors]

    def to(self, device: torch.device) -> Batch:
        """Copy the images to a device, without blocking if they are in pinned memory.

        Labels stay on the CPU. Detectron2 moves them itself, and its drawing code needs them there.
        """
        return self._map_images(lambda image: image.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Copy the images to pinned memory. The DataLoader calls this if ``pin_memory`` is set."""
        return self._map_images(torch.Tensor.pin_memory)

    def _map_images(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        def map_view(view: View) -> View:
            return replace(view, image=function(view.image))

        return Batch(
            [sample | {"image": function(sample["image"])} for sample in self.labeled],
            [
                replace(
                    x,
                    weak=map_view(x.weak),
                    strong=map_view(x.strong),
                    further_strong=tuple(map(map_view, x.further_strong)),
                )
                for x in self.unlabeled
            ],
        )


class StreamDataset(Dataset):
    """Map-style dataset of both streams, indexed by :class:`StreamPosition`."""

    def __init__(
        self, labeled: Sequence[dict], unlabeled: Sequence[dict], mapper: ViewMapper, seed: int
    ) -> None:
        """
        Args:
            labeled, unlabeled: dataset records in Detectron2's format. They are packed into one
                block of memory, if they are not yet, so that worker processes share them.
            mapper: makes the augmented views.
            seed: seed of both streams; the same in every process.
        """
        self._records = {
            stream: records if isinstance(records, Packed) else PackedRecords(records)
            for stream, records in ((Stream.LABELED, labeled), (Stream.UNLABELED, unlabeled))
        }
        self._mapper = mapper
        self._seed = seed

    def __getitem__(self, position: StreamPosition) -> list[dict] | UnlabeledSample:
        """Make the sample at a position.

        The global random generators are seeded with (seed, stream, number) for the duration of the
        call and restored afterwards. An unlabeled image that cannot be read is replaced by another
        one, which is drawn from the same generators.

        Returns:
            the views of a labeled image in Detectron2's format, or an unlabeled sample.

        Raises:
            UnreadableImage: if a labeled image cannot be read, or ``MAX_REPLACEMENTS`` unlabeled
                images in a row cannot.
        """
        with _seeded(self._seed, *position):
            if position.stream is Stream.LABELED:
                return self._mapper.labeled(self.record(position))
            return self._unlabeled_sample(position)

    def record(self, position: StreamPosition) -> dict:
        """Return the record at a position.

        Every epoch contains each record once, in a new random order.
        """
        records = self._records[position.stream]
        epoch, offset = divmod(position.number, len(records))
        if isinstance(records, ShardedImages):
            return records[records.index_at((self._seed, position.stream, epoch), offset)]
        order = _epoch_order(self._seed, position.stream, epoch, len(records))
        return records[int(order[offset])]

    def _unlabeled_sample(self, position: StreamPosition) -> UnlabeledSample:
        errors: list[str] = []
        while len(errors) < MAX_REPLACEMENTS:
            try:
                sample = self._mapper.unlabeled(self.record(position))
                return replace(sample, read_errors=tuple(errors))
            except UnreadableImage as error:
                errors.append(str(error))
                position = self._replacement(position)
        raise UnreadableImage(
            f"{MAX_REPLACEMENTS} unlabeled images in a row could not be read. The last error: "
            f"{errors[-1]}"
        )

    def _replacement(self, position: StreamPosition) -> StreamPosition:
        """Draw another position from the global generator."""
        records = self._records[position.stream]
        if isinstance(records, ShardedImages):  # one that soon needs the same shards
            return position._replace(
                number=position.number + 1 + np.random.randint(MAX_REPLACEMENTS)
            )
        return position._replace(number=np.random.randint(len(records)))


# Two epochs per stream are kept, since a batch can span the end of one. An order takes four bytes
# per image.
@lru_cache(maxsize=2 * len(Stream))
def _epoch_order(seed: int, stream: Stream, epoch: int, size: int) -> np.ndarray:
    order = np.arange(size, dtype=np.int32)
    # The same order as permutation(size), which would create 64-bit integers first.
    np.random.default_rng([seed, stream, epoch]).shuffle(order)
    return order


@contextlib.contextmanager
def _seeded(*key: int) -> Iterator[None]:
    """Seed the global generators of numpy, random and torch from a key, and restore them at exit.

    They are restored because with no loader workers this runs in the training process.
    """
    saved = np.random.get_state(), random.getstate(), torch.get_rng_state()
    state = np.random.SeedSequence(key).generate_state(3)
    np.random.seed(state[0])
    random.seed(int(state[1]))
    # torch.manual_seed would also seed the GPU generators, which is slower and is not restored.
    torch.default_generator.manual_seed(int(state[2]))
    try:
        yield
    finally:
        np.random.set_state(saved[0])
        random.setstate(saved[1])
        torch.set_rng_state(saved[2])


class TwoStreamBatchSampler(Sampler[list[StreamPosition]]):
    """Endless batch sampler that takes a fixed number of images from each stream.

    It yields the positions of one process's share of each batch. The positions in an iteration
    depend on the iteration alone.
    """

    def __init__(
        self,
        *,
        labeled_batch: int,
        unlabeled_batch: int,
        burn_in: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """
        Args:
            labeled_batch, unlabeled_batch: images per iteration, summed over all processes;
                multiples of ``world_size``.
            burn_in: number of iterations at the start that use labeled images only. The unlabeled
                stream starts after them.
            start: first iteration.
            rank, world_size: index of this process, and number of processes.
        """
        self._batch_size = {Stream.LABELED: labeled_batch, Stream.UNLABELED: unlabeled_batch}
        self._first_iteration = {Stream.LABELED: 0, Stream.UNLABELED: burn_in}
        self._start = start
        self._rank = rank
        self._world_size = world_size

    def __iter__(self) -> Iterator[list[StreamPosition]]:
        iteration = self._start
        while True:
            yield [p for stream in Stream for p in self._positions(stream, iteration)]
            iteration += 1

    def _positions(self, stream: Stream, iteration: int) -> list[StreamPosition]:
        batches_before = iteration - self._first_iteration[stream]
        if batches_before < 0:
            return []
        share = self._batch_size[stream] // self._world_size
        first = batches_before * self._batch_size[stream] + self._rank * share
        return [StreamPosition(stream, number) for number in range(first, first + share)]


def build_loader(
    dataset: StreamDataset,
    batch_sampler: TwoStreamBatchSampler,
    num_workers: int,
    *,
    worker_init_fn: Callable[[int], None] | None = None,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """Build the :class:`Batch` loader of one process.

    Args:
        dataset: both streams.
        batch_sampler: the positions of each batch. It is endless, so workers are started once.
        num_workers: number of worker processes; 0 loads in this process.
        worker_init_fn: called first in each worker, with the worker's index.
        pin_memory: put images in pinned memory, so that copies to a GPU do not block.
    """
    _use_one_opencv_thread()
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=_collate,
        worker_init_fn=partial(_init_worker, worker_init_fn),
    )


def _init_worker(worker_init_fn: Callable[[int], None] | None, worker: int) -> None:
    if worker_init_fn:
        worker_init_fn(worker)
    _use_one_opencv_thread()


def _use_one_opencv_thread() -> None:
    # One thread per worker, as PyTorch does: there are about as many workers as cores. The main
    # process sets this before it forks workers. A forked worker must not change the number, since
    # OpenCV would then wait forever for threads that exist in the main process only. A spawned
    # worker sets it itself.
    if cv2.getNumThreads() != 1:
        cv2.setNumThreads(1)


def _collate(samples: list[list[dict] | UnlabeledSample]) -> Batch:
    return Batch(
        labeled=[view for sample in samples if isinstance(sample, list) for view in sample],
        unlabeled=[sample for sample in samples if isinstance(sample, UnlabeledSample)],
    )
