"""The tools beside training: the table of a run, and pictures of detections."""

import json

import numpy as np
import pytest
import torch
import yaml
from detectron2.structures import Boxes, Instances

from draw_predictions import draw, montage
from summarize import results_of, table


def write_run(folder, burn_in, end, evaluations):
    folder.mkdir()
    config = {"SEMI": {"BURN_IN_ITERS": burn_in}, "SOLVER": {"MAX_ITER": end}}
    (folder / "config.yaml").write_text(yaml.dump(config))
    lines = [{"iteration": 5, "total_loss": 1.0}]
    for iteration, teacher, student in evaluations:
        lines.append(
            {"iteration": iteration}
            | {f"bbox/{m}": teacher for m in ("AP", "AP50", "AP75")}
            | {f"student/bbox/{m}": student for m in ("AP", "AP50", "AP75")}
        )
    (folder / "metrics.json").write_text("\n".join(json.dumps(line) for line in lines))
    return folder


def test_summary_names_the_teacher_at_the_end_of_burn_in_and_both_final_models(tmp_path):
    run = write_run(tmp_path / "a", 20, 60, [(19, 1.0, 1.0), (39, 2.0, 3.0), (60, 5.0, 4.0)])
    rows = [(r.model, r.iteration, r.values[0]) for r in results_of(run)]
    assert rows == [
        ("teacher, end of burn-in", 20, 1.0),
        ("final student", 60, 4.0),
        ("final teacher", 60, 5.0),
    ]


def test_summary_of_a_supervised_run_has_one_row(tmp_path):
    run = write_run(tmp_path / "a", 100, 60, [(39, 2.0, 2.0), (60, 5.0, 5.0)])
    assert [(r.model, r.values) for r in results_of(run)] == [("supervised", (5.0, 5.0, 5.0))]


def test_summary_without_evaluation_is_empty(tmp_path):
    assert results_of(write_run(tmp_path / "a", 20, 60, [])) == []


def test_table_is_markdown_with_one_line_for_each_result(tmp_path):
    run = write_run(tmp_path / "mine", 20, 60, [(19, 1.0, 1.0), (60, 5.125, 4.0)])
    lines = table(results_of(run)).splitlines()
    assert len(lines) == 2 + 3
    assert "mine" in lines[-1] and "5.12" in lines[-1] and lines[0].startswith("|")


def test_summary_of_a_folder_that_is_no_run_fails(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.yaml"):
        results_of(tmp_path)


def instances(boxes):
    count = len(boxes)
    return Instances(
        (60, 90),
        pred_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)),
        pred_classes=torch.zeros(count, dtype=torch.long),
        scores=torch.full((count,), 0.9),
        localization_quality=torch.full((count,), 0.4),
    )


def test_small_images_are_enlarged_and_boxes_drawn_where_they_are():
    image = np.full((60, 90, 3), 128, np.uint8)
    empty, boxed = (
        draw(image, instances(b), ["cell"]).astype(int) for b in ([], [[50.0, 20.0, 80.0, 50.0]])
    )
    assert empty.shape == (480, 720, 3)
    rows, columns = np.nonzero(np.abs(boxed - empty).sum(axis=2) > 60)
    assert 140 <= rows.min() and 390 <= columns.min()  # eight times the box, and its label
    assert 380 <= rows.max() <= 420 and 630 <= columns.max() <= 650


def test_draw_keeps_the_order_of_channels():
    image = np.zeros((480, 480, 3), np.uint8)
    image[..., 0] = 255  # blue
    assert draw(image, instances([]), ["cell"])[240, 240].tolist() == [255, 0, 0]


def test_montage_lays_pictures_of_different_sizes_in_rows(tmp_path):
    import cv2

    files = []
    for i, (height, width) in enumerate([(10, 10), (10, 20), (20, 10)]):
        files.append(tmp_path / f"{i}.png")
        cv2.imwrite(str(files[-1]), np.zeros((height, width, 3), np.uint8))
    assert montage(files, columns=2, height=10).shape == (20, 30, 3)
