"""Two endless streams, labeled and unlabeled images, in one loader.

What a sample is follows from (seed, stream, position in the stream) alone: which image, and what
the augmentations draw. So it does not matter how many loader workers or processes there are, and
a run can go on from any iteration without replaying the ones before it.
"""

from __future__ import annotations

import contextlib
import logging
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

from ..errors import UsageError
from .datasets.packed_records import Packed, PackedRecords
from .image_io import UnreadableImage
from .mapper import ViewMapper
from .transforms.views import UnlabeledSample, View

# An unreadable unlabeled image is replaced by another; so many in a row mean that there is none
# left. It is far beyond what happens by chance at any share that may be tolerated: 0.8 ** 100 is
# 2e-10.
MAX_REPLACEMENTS = 100


class Stream(IntEnum):
    """Which of the two streams; the number enters the random seed."""

    LABELED = 0
    UNLABELED = 1


class Position(NamedTuple):
    """A place in a stream; it says everything of the sample there."""

    stream: Stream
    number: int


@dataclass(frozen=True)
class Batch:
    """What one process trains on in one iteration."""

    labeled: list[dict]
    unlabeled: list[UnlabeledSample]

    @property
    def file_names(self) -> list[str]:
        """All images in the batch, to name them when something goes wrong."""
        return [x["file_name"] for x in self.labeled] + [x.file_name for x in self.unlabeled]

    def to(self, device: torch.device) -> Batch:
        """Images on a device; the host does not wait for what is pinned.

        Labels stay: Detectron2 copies them itself, and draws them where they are.
        """
        return self._with_images(lambda image: image.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same in memory that a GPU can copy from by itself; the loader calls it."""
        return self._with_images(torch.Tensor.pin_memory)

    def _with_images(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        def view(before: View) -> View:
            return replace(before, image=change(before.image))

        return Batch(
            [sample | {"image": change(sample["image"])} for sample in self.labeled],
            [replace(x, weak=view(x.weak), strong=view(x.strong)) for x in self.unlabeled],
        )

    @property
    def unread(self) -> list[str]:
        """Of each unlabeled image that was to be in the batch but could not be read: why."""
        return [message for sample in self.unlabeled for message in sample.unread]


class StreamDataset(Dataset):
    """The samples of both streams, by position."""

    def __init__(
        self, labeled: Sequence[dict], unlabeled: Sequence[dict], mapper: ViewMapper, seed: int
    ) -> None:
        """
        Args:
            labeled, unlabeled: records; packed if they are not, so that worker processes share
                and do not copy them.
            mapper: makes the views.
            seed: of both streams, the same in every process.
        """
        self._records = {
            stream: records if isinstance(records, Packed) else PackedRecords(records)
            for stream, records in ((Stream.LABELED, labeled), (Stream.UNLABELED, unlabeled))
        }
        self._mapper = mapper
        self._seed = seed

    def __getitem__(self, position: Position) -> list[dict] | UnlabeledSample:
        """The labeled views, or the unlabeled sample, at a position.

        Raises:
            UnreadableImage: for a labeled image, or when unlabeled images keep being unreadable.
        """
        with _seeded(self._seed, *position):
            if position.stream is Stream.LABELED:
                return self._mapper.labeled(self.record(position))
            return self._first_readable(position)

    def record(self, position: Position) -> dict:
        """The record at a position; each epoch shows every record once, in a new order."""
        records = self._records[position.stream]
        epoch, offset = divmod(position.number, len(records))
        order = _epoch_order(self._seed, position.stream, epoch, len(records))
        return records[int(order[offset])]

    def _first_readable(self, position: Position) -> UnlabeledSample:
        unread: list[str] = []
        while len(unread) < MAX_REPLACEMENTS:
            try:
                sample = self._mapper.unlabeled(self.record(position))
                return replace(sample, unread=tuple(unread))
            except UnreadableImage as error:
                unread.append(str(error))
                other = np.random.randint(len(self._records[position.stream]))
                position = Position(position.stream, other)
        raise UnreadableImage(
            f"{MAX_REPLACEMENTS} unlabeled images in a row, at last: {unread[-1]}"
        )


# Two epochs of each stream: a batch can reach over the end of one. Four bytes an image each.
@lru_cache(maxsize=2 * len(Stream))
def _epoch_order(seed: int, stream: Stream, epoch: int, size: int) -> np.ndarray:
    order = np.arange(size, dtype=np.int32)
    # As permutation(size) would have it, which makes numbers of twice the size first.
    np.random.default_rng([seed, stream, epoch]).shuffle(order)
    return order


class BatchSchedule(Sampler[list[Position]]):
    """The positions of one process's share of each batch, iteration after iteration, endlessly."""

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
            labeled_batch, unlabeled_batch: images of one iteration over all processes; multiples
                of ``world_size``.
            burn_in: number of iterations at first that take labeled images only.
            start: the iteration to begin with.
            rank, world_size: this process and the number of all.
        """
        self._batch = {Stream.LABELED: labeled_batch, Stream.UNLABELED: unlabeled_batch}
        self._begins = {Stream.LABELED: 0, Stream.UNLABELED: burn_in}
        self._start = start
        self._rank = rank
        self._world_size = world_size

    def __iter__(self) -> Iterator[list[Position]]:
        iteration = self._start
        while True:
            yield [p for stream in Stream for p in self._share(stream, iteration)]
            iteration += 1

    def _share(self, stream: Stream, iteration: int) -> list[Position]:
        turn = iteration - self._begins[stream]
        if turn < 0:
            return []
        share = self._batch[stream] // self._world_size
        first = turn * self._batch[stream] + self._rank * share
        return [Position(stream, number) for number in range(first, first + share)]


def build_loader(
    dataset: StreamDataset,
    schedule: BatchSchedule,
    num_workers: int,
    *,
    begin_worker: Callable[[int], None] | None = None,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """A loader of :class:`Batch` for one process; its workers make whole batches ahead.

    Args:
        dataset: the samples.
        schedule: which of them make a batch; endless, so that workers start once.
        num_workers: processes; 0 for none.
        begin_worker: called in each of them, with its number, before anything else.
        pin_memory: put images where a GPU can fetch them while the host goes on.
    """
    _use_one_thread()
    return DataLoader(
        dataset,
        batch_sampler=schedule,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=_collate,
        worker_init_fn=partial(_begin_worker, begin_worker),
    )


def _begin_worker(begin: Callable[[int], None] | None, worker: int) -> None:
    if begin:
        begin(worker)
    _use_one_thread()


def _use_one_thread() -> None:
    # As torch in a worker: there are as many workers as cores, not one with as many threads.
    # A forked worker must not change the number: OpenCV would wait for the threads that only the
    # main process has. So that one does it before, and workers that start afresh for themselves.
    if cv2.getNumThreads() != 1:
        cv2.setNumThreads(1)


def _collate(samples: list[list[dict] | UnlabeledSample]) -> Batch:
    return Batch(
        labeled=[view for sample in samples if isinstance(sample, list) for view in sample],
        unlabeled=[sample for sample in samples if isinstance(sample, UnlabeledSample)],
    )


@contextlib.contextmanager
def _seeded(*key: int) -> Iterator[None]:
    """Seeds what augmentations draw from, and puts it back: this may be the trainer's process."""
    saved = np.random.get_state(), random.getstate(), torch.get_rng_state()
    state = np.random.SeedSequence(key).generate_state(3)
    np.random.seed(state[0])
    random.seed(int(state[1]))
    # torch.manual_seed would seed the GPU as well, which is not put back and takes longer.
    torch.default_generator.manual_seed(int(state[2]))
    try:
        yield
    finally:
        np.random.set_state(saved[0])
        random.setstate(saved[1])
        torch.set_rng_state(saved[2])


# --------------------------------------------------------------------------------------------------
# Unlabeled images that cannot be read: how many are tolerated.


logger = logging.getLogger(__name__)

MIN_DRAWN = 100  # images drawn before a share of them says anything
_NAMED = 1000  # so many files are named one by one


class UnreadableImages:
    """Counts them from the start of this process on, names each once, and says when to stop.

    One file alone never ends a run, nor does any share of the first images.
    """

    def __init__(self, max_share: float) -> None:
        """
        Args:
            max_share: greatest tolerated share of the images drawn; with 0 the first one is an
                error.

        Raises:
            UsageError: for a share outside of [0, 1].
        """
        if not 0 <= max_share <= 1:
            raise UsageError(
                f"DATASETS.CHECKS.MAX_UNREADABLE_SHARE must lie in [0, 1], got {max_share}"
            )
        self._max_share = max_share
        self._messages: set[str] = set()
        self._drawn = 0
        self._unread = 0

    @property
    def files(self) -> int:
        """Number of different files so far."""
        return len(self._messages)

    def update(self, unread: list[list[str]], read: int) -> None:
        """Take note of one iteration. All processes are told the same, and decide alike.

        Args:
            unread: of each process, why images could not be read: a message for each time, which
                names the file.
            read: number of unlabeled images that each process read.

        Raises:
            UsageError: if too many are unreadable.
        """
        messages = [message for of_process in unread for message in of_process]
        for message in messages:
            if message not in self._messages and self.files < _NAMED:
                logger.warning("skipped an unlabeled image: %s", message)
            self._messages.add(message)
            if self.files == _NAMED:
                logger.warning("further unreadable images are counted, but not named")
        self._unread += len(messages)
        self._drawn += len(messages) + read * len(unread)
        if check_unreadable_share(self.files, self._unread, self._drawn, self._max_share):
            return
        raise UsageError(
            f"{self._unread} of {self._drawn} unlabeled images drawn could not be read, which is "
            f"more than DATASETS.CHECKS.MAX_UNREADABLE_SHARE {self._max_share:g}. One is: "
            f"{min(self._messages)}, or raise that share; then go on with --resume, and with "
            "DATASETS.CHECKS.ALLOW_CHANGED True if files were removed"
        )


def check_unreadable_share(files: int, unread: float, drawn: float, max_share: float) -> bool:
    """Whether training goes on although unlabeled images could not be read.

    Args:
        files: how many different ones.
        unread: how often one of them was drawn.
        drawn: how many images were drawn.
        max_share: ``DATASETS.CHECKS.MAX_UNREADABLE_SHARE``.
    """
    too_few = drawn < MIN_DRAWN or files < 2
    return unread <= max_share * drawn or (max_share > 0 and too_few)
