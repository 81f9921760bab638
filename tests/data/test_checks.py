"""The check of many boxes together agrees with the check of one box at a time."""

import copy
import logging
import math
import random

import pytest
from detectron2.structures import BoxMode

from locreweight.data import checks
from locreweight.errors import UsageError

NUMBERS = [
    *(0, 1, -1, 2.5, 7, 10, 10.0, 30.0, 29.999999, 1e-9, 1e39, -1e39, 2**24 + 1, 10**400),
    *(math.nan, math.inf, -math.inf, True, None, "1"),
]
MODES = [BoxMode.XYWH_ABS, BoxMode.XYXY_ABS]


def random_records(rng, modes, is_plain):
    def box():
        if is_plain:
            return [rng.uniform(0, 10), rng.uniform(0, 10), rng.uniform(10, 20), 15.0]
        return rng.choice(
            [
                [rng.choice(NUMBERS[:14]) for _ in range(4)],
                [rng.choice(NUMBERS) for _ in range(4)],
                *([1, 2, 3], None, [], (1, 2, 3, 4)),
            ]
        )

    records = []
    for i in range(rng.randrange(1, 12)):
        annotations = [
            {"bbox": box(), "bbox_mode": rng.choice(modes), "category_id": 0}
            for _ in range(rng.choice([0, 0, 1, 3]))
        ]
        record = {"file_name": f"{i}.jpg", "annotations": annotations}
        if rng.random() < 0.8:
            record |= {"width": 30, "height": rng.choice([20, 30])}
        records.append(record)
    return records


def outcome(records, caplog, drop_bad):
    caplog.clear()
    try:
        result = repr(checks.check_boxes(records, drop_bad=drop_bad))
    except UsageError as error:
        result = str(error)
    return result, [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("drop_bad", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_same_as_one_box_at_a_time(caplog, monkeypatch, chunk, drop_bad):
    monkeypatch.setattr(checks, "_CHECKED_TOGETHER", chunk)
    caplog.set_level(logging.WARNING)
    one_at_a_time = pytest.MonkeyPatch()
    decided_together = 0
    for seed in range(300):
        rng = random.Random(seed)
        modes = rng.choice([MODES[:1], MODES[1:], MODES])
        records = random_records(rng, modes, is_plain=seed % 3 == 0)
        before = copy.deepcopy(records)
        decided_together += sum(checks._are_sound(records))
        found = outcome(records, caplog, drop_bad)
        with one_at_a_time.context() as patch:
            patch.setattr(checks, "_are_sound", lambda chunk: [False] * len(chunk))
            assert found == outcome(records, caplog, drop_bad), f"seed {seed}"
        assert repr(records) == repr(before)
    assert decided_together > 300


def test_a_mixed_chunk_is_decided_one_box_at_a_time():
    annotations = [{"bbox": [1, 2, 3, 4], "bbox_mode": mode} for mode in MODES]
    assert checks._are_sound([{"annotations": annotations}]) == [False]


def test_float32_decides_as_in_training():
    # 1e8 + 1 is 1e8 in float32: the box has no area.
    annotation = {"bbox": [1e8, 0, 1, 5], "bbox_mode": BoxMode.XYWH_ABS}
    assert checks._are_sound([{"annotations": [annotation]}]) == [False]


def test_no_records():
    assert checks.check_boxes([], drop_bad=False) == []


def test_iterator():
    annotation = {"bbox": [1, 2, 3, 4], "bbox_mode": BoxMode.XYWH_ABS}
    records = [{"file_name": "a.jpg", "annotations": [annotation]}, {"file_name": "b.jpg"}]
    assert checks.check_boxes(iter(records), drop_bad=False) == [
        records[0],
        records[1] | {"annotations": []},
    ]
