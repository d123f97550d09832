"""benchmarks/distillation.py: every method gets its overhead. benchmarks/__init__.py: what is compared is timed in turns."""

from dataclasses import replace

import pytest

import baselines
import benchmarks
import presets
import rdd
from benchmarks import distillation
from data.batch import collate
from detector import Detector
from suites import METHODS
from tests.scenes import tiny_config, tiny_frames


@pytest.fixture()
def takes(monkeypatch):
    """A clock of the test's own, and what moves it: what else the machine does is not asked."""
    now = [0.0]

    def moved(seconds):
        now[0] += seconds

    monkeypatch.setattr(benchmarks.time, "perf_counter", lambda: now[0])
    return moved


def test_the_overhead_of_every_method_is_its_step_over_a_student_s_and_the_teacher_s_forward(takes, monkeypatch):
    """1 s a forward of the student, 1/2 of the teacher, 1/4 for labels and for solving for m*, nothing for all else; on a
    small range."""

    def costs(seconds, function):
        return lambda *args: takes(seconds(args[0]) if callable(seconds) else seconds) or function(*args)

    preset, small = presets.preset, tiny_config().point_range
    monkeypatch.setattr(presets, "preset", lambda name: replace(preset(name), point_range=small))
    monkeypatch.setattr(distillation, "scans", lambda cfg, count: collate(tiny_frames(count), cfg))
    monkeypatch.setattr(distillation, "PAIRS", (("cp-voxel-cpu", "cp-voxel-xxs-cpu", 2),))
    forward = {"cp-voxel-cpu": 0.5, "cp-voxel-xxs-cpu": 1.0}
    monkeypatch.setattr(Detector, "forward", costs(lambda model: forward[model.cfg.preset], Detector.forward))
    monkeypatch.setattr(baselines, "labels_for", costs(0.25, baselines.labels_for))
    monkeypatch.setattr(rdd, "solve_selection", costs(0.25, rdd.solve_selection))
    rows = list(distillation.rows(1))
    steps = {row.case.split(",")[0].removeprefix("a step with "): row for row in rows if row.unit == "s"}
    assert steps.keys() == set(METHODS)
    for method, row in steps.items():
        step = 2.0 if method == "rdd" else 1.75
        assert (row.ours, row.theirs, row.ratio) == (step, 1.5, 1.5 / step), method
        assert row.note == f"overhead {step / 1.5:.2f}, goal 1.15"
    (solving,) = [row for row in rows if row.unit == "%"]
    assert solving.ours == 100 * 0.25 / 2.0


def test_times_are_taken_in_turns_after_a_warm_up_and_ratios_turn_by_turn(takes):
    called, ours, theirs = [], iter((9.0, 1.0, 2.0, 4.0)), iter((9.0, 5.0, 4.0, 8.0))
    row = benchmarks.compare("a", "b", lambda: called.append("ours") or takes(next(ours)), "c",
                             lambda: called.append("theirs") or takes(next(theirs)), repeats=3)  # fmt: skip
    assert called == ["ours", "theirs"] * 4
    assert (row.ours, row.theirs, row.ratio) == (2.0, 5.0, 2.0)
