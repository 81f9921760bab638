"""Runs of a comparison that share a burn-in."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase

from locreweight.engine.run_queue import Run, RunQueue
from locreweight.engine.shared_burn_in import SharedBurnIn, start_from_burn_in
from locreweight.errors import UsageError
from tests.engine.tiny_training import TRAINING, build_trainer, copy_of, make_datasets, same
from tests.modeling.tiny_model import TINY, as_options

ROOT = Path(__file__).parents[2]
METHODS = ROOT / "configs/methods"
BURN_IN = TRAINING["SEMI.BURN_IN_ITERS"]
SAVES_BURN_IN = {"SOLVER.CHECKPOINT_PERIOD": BURN_IN, "SOLVER.KEEP_CHECKPOINTS": 1}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    return make_datasets(tmp_path_factory.mktemp("data")) | {"DATASETS.TEST": ()}


@pytest.fixture
def run_of(datasets, tmp_path):
    def make(method, seed=1, folder=tmp_path, **changed):
        settings = TINY | TRAINING | SAVES_BURN_IN | datasets | changed
        settings.pop("SEED", None)
        if method == "supervised":  # its burn-in never ends
            settings.pop("SEMI.BURN_IN_ITERS")
        return Run(
            config=ROOT / "configs/Base-LocReweight.yaml",
            method=METHODS / f"{method}.yaml",
            seed=seed,
            output=folder / method.replace("/", "-") / f"seed-{seed}",
            options=tuple(as_options(settings)),
        )

    return make


class KeepCheckpoints(HookBase):
    def __init__(self, shared):
        self.shared = shared

    def after_step(self):
        self.shared.keep_checkpoints()


def train(run):
    """Train a run, or resume it; returns the weights of student and teacher."""
    trainer = build_trainer(run.cfg, resume=True)
    start = trainer.start_iter
    trainer.train()
    return start, copy_of(trainer.student), copy_of(trainer.teacher)


@pytest.mark.parametrize(
    ("first", "others"),
    [
        ("loc_reweight", ["teacher_student", "ablation/shuffled"]),
        ("soft_teacher", ["supervised"]),
    ],
)
def test_run_that_continues_a_shared_burn_in_has_the_same_result(run_of, tmp_path, first, others):
    runs = [run_of(method) for method in (first, *others)]
    shared = SharedBurnIn(runs, tmp_path / "burn-in")
    assert shared.num_shared == len(others) and shared.order(runs[::-1])[0] is runs[0]
    trainer = build_trainer(runs[0].cfg)
    # The first run deletes its checkpoint of the burn-in, because it keeps only one.
    trainer.register_hooks([KeepCheckpoints(shared)])
    trainer.train()
    for run, method in zip(runs[1:], others, strict=True):
        shared.prepare(run)
        start, *weights = train(run)
        assert start == BURN_IN
        alone_start, *alone = train(run_of(method, folder=tmp_path / "alone"))
        assert alone_start == 0
        for one, other in zip(weights, alone, strict=True):
            assert same(one, other)
        lines = (run.output / "metrics.json").read_text().splitlines()
        iterations = [json.loads(line)["iteration"] for line in lines]
        assert iterations == sorted(set(iterations))


def test_runs_with_another_burn_in_are_not_shared(run_of, tmp_path):
    runs = [
        run_of("loc_reweight"),
        run_of("loc_reweight", seed=2),
        run_of("soft_teacher"),  # smooth L1 on labeled images
        run_of("unbiased_teacher"),  # focal loss, another augmentation
        run_of("stac"),  # a frozen pseudo-labeler
    ]
    shared = SharedBurnIn(runs, tmp_path / "burn-in")
    assert shared.num_shared == 0 and shared.order(runs) == runs


@pytest.mark.parametrize("changed", [{"SOLVER.BASE_LR": 0.002}, {"SOLVER.MAX_ITER": 5}])
def test_another_schedule_is_another_burn_in(run_of, tmp_path, changed):
    runs = [run_of("loc_reweight"), run_of("teacher_student", **changed)]
    assert SharedBurnIn(runs, tmp_path / "burn-in").num_shared == 0


def test_runs_without_burn_in_are_not_shared(run_of, tmp_path):
    none = {"SEMI.BURN_IN_ITERS": 0}
    runs = [run_of("loc_reweight", **none), run_of("teacher_student", **none)]
    assert SharedBurnIn(runs, tmp_path / "burn-in").num_shared == 0


@pytest.mark.parametrize("period", [0, 1000])
def test_burn_in_that_is_not_saved_is_an_error(run_of, tmp_path, period):
    never = {"SOLVER.CHECKPOINT_PERIOD": period}
    runs = [run_of("loc_reweight", **never), run_of("teacher_student", **never)]
    with pytest.raises(UsageError, match=rf"SOLVER.CHECKPOINT_PERIOD is {period}: set it to 2"):
        SharedBurnIn(runs, tmp_path / "burn-in")


def test_run_without_the_shared_checkpoint_trains_its_own_burn_in(run_of, tmp_path, caplog):
    runs = [run_of("loc_reweight"), run_of("teacher_student")]
    shared = SharedBurnIn(runs, tmp_path / "burn-in")
    shared.prepare(runs[1])
    assert "teacher_student, seed 1 trains its own burn-in" in caplog.text
    assert not runs[1].folder.has_checkpoint


def write_checkpoint(file, iteration):
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"trainer": {"iteration": iteration}}, file)


def end_of_burn_in(run):
    return run.output / f"model_{BURN_IN - 1:07d}.pth"


@pytest.mark.parametrize(
    ("changed", "is_used"),
    [
        ({}, True),
        ({"SOLVER.BASE_LR": 0.002}, False),
        ({"SEMI.BURN_IN_ITERS": 2 * BURN_IN}, False),
    ],
)
def test_kept_checkpoint_of_other_settings_is_not_used(run_of, tmp_path, changed, is_used):
    """The folder of a comparison whose runs were removed, to repeat it with other settings."""
    methods = ("loc_reweight", "teacher_student")
    first, _ = runs = [run_of(method) for method in methods]
    write_checkpoint(end_of_burn_in(first), BURN_IN - 1)
    SharedBurnIn(runs, tmp_path / "burn-in").keep_checkpoints()
    end_of_burn_in(first).unlink()
    runs = [run_of(method, **changed) for method in methods]
    SharedBurnIn(runs, tmp_path / "burn-in").prepare(runs[1])
    assert end_of_burn_in(runs[1]).is_file() == is_used


def test_several_slots_keep_the_same_checkpoint(run_of, tmp_path):
    runs = [run_of(method) for method in ("loc_reweight", "teacher_student")]
    write_checkpoint(end_of_burn_in(runs[0]), BURN_IN - 1)
    write_checkpoint(runs[0].output / "model_best.pth", BURN_IN - 1)
    for i in range(20):
        shared = SharedBurnIn(runs, tmp_path / f"burn-in-{i}")
        with ThreadPoolExecutor(4) as slots:
            for done in [slots.submit(shared.keep_checkpoints) for _ in range(4)]:
                done.result()
        (kept,) = (tmp_path / f"burn-in-{i}").iterdir()
        assert (kept / "model_best.pth").is_file()


def test_complete_metrics_of_a_kept_burn_in_stay(run_of, tmp_path):
    """The run that trained it was removed and has started again."""
    first, other = runs = [run_of(method) for method in ("loc_reweight", "teacher_student")]
    write_checkpoint(end_of_burn_in(first), BURN_IN - 1)
    metrics = first.output / "metrics.json"
    metrics.write_text(f'{{"iteration": {BURN_IN - 1}}}\n')
    SharedBurnIn(runs, tmp_path / "burn-in").keep_checkpoints()
    end_of_burn_in(first).unlink()
    metrics.write_text('{"iteration": 0}\n')
    SharedBurnIn(runs, tmp_path / "burn-in").prepare(other)
    assert str(BURN_IN - 1) in (other.output / "metrics.json").read_text()


@pytest.mark.parametrize(
    ("iteration", "is_copied"), [(0, True), (BURN_IN - 1, True), (BURN_IN, False)]
)
def test_best_checkpoint_of_burn_in_is_copied(run_of, tmp_path, iteration, is_copied):
    """Without it, a run that does not improve on burn-in would end without a best checkpoint."""
    source, target = run_of("loc_reweight"), tmp_path / "target"
    write_checkpoint(end_of_burn_in(source), BURN_IN - 1)
    write_checkpoint(source.output / "model_best.pth", iteration)
    start_from_burn_in(target, source.output, BURN_IN)
    assert (target / "model_best.pth").is_file() == is_copied


def test_run_waits_only_while_its_burn_in_is_trained(run_of, tmp_path):
    first, other, foreign = (run_of(m) for m in ("loc_reweight", "teacher_student", "stac"))
    shared = SharedBurnIn([first, other, foreign], tmp_path / "burn-in")
    assert shared.must_wait(other, {first}) and not shared.must_wait(other, {foreign})
    assert not shared.must_wait(first, {other}) and not shared.must_wait(foreign, {first})
    write_checkpoint(end_of_burn_in(first), BURN_IN - 1)
    assert not shared.must_wait(other, {first})


def test_queue_starts_waiting_runs_after_the_others(run_of, tmp_path, monkeypatch):
    """In two slots: the second run waits for the first, so the third starts before it."""
    first, second, third = runs = [run_of("loc_reweight", seed) for seed in (1, 2, 3)]
    script = (
        "import pathlib, sys, time\n"
        "here = pathlib.Path(sys.argv[1]); (here / 'started').touch()\n"
        "while sys.argv[2] == '1' and not (here.parent / 'seed-3/started').exists():\n"
        "    time.sleep(0.01)\n"
    )
    monkeypatch.setattr(
        Run, "command", property(lambda run: ["-c", script, str(run.output), str(run.seed)])
    )
    prepared = []
    queue = RunQueue(
        runs,
        [None, None],
        must_wait=lambda run, active: run is second and first in active,
        prepare=prepared.append,
    )
    queue.work(lambda run, attempt: None, lambda: None)
    assert prepared.index(third) < prepared.index(second)
    assert all((run.output / "started").exists() for run in runs)
