"""curves.py: what a log says is what is drawn, by step and by minute, and survives having nothing to show."""

import json

import numpy as np
import pytest
from matplotlib.image import imread
from matplotlib.text import Text

import curves
import plot
from cli import InputError


def is_blank(path):
    pixels = imread(path)[..., :3]
    return bool((pixels == pixels[0, 0]).all())


def write_run(folder, seed=0, steps=(10, 20, 30), final=50.0, pace=6.0, extra=()):
    folder.mkdir(parents=True)
    lines = []
    for step in steps:
        terms = {"cls": 2.0 / step + seed, "reg": 1.0 / step, **dict(extra)}
        lines.append({"kind": "train", "step": step, "epoch": step / 10, "loss": sum(terms.values()), **terms,
                      "seconds": step * pace})  # fmt: skip
        lines.append({"kind": "eval", "step": step, "moderate_map_3d": final * step / steps[-1] + seed,
                      "seconds": step * pace})  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def labelled(ax):
    return {line.get_label().split(":")[0].split(" (")[0]: line for line in ax.lines}


def test_curves_show_detection_loss_and_ap_by_step_and_by_minute(tmp_path):
    alone = write_run(tmp_path / "alone", final=40)
    rdd = write_run(tmp_path / "rdd", final=60, pace=12, extra={"feat": 100.0, "logit": 5.0}.items())
    figure = curves.curves(tmp_path / "c.png", [("student", alone), ("student + RDD", rdd)])
    loss, steps, minutes = figure.axes
    both = [labelled(loss)[name].get_ydata() for name in ("student", "student + RDD")]
    assert np.allclose(*both), "without the distillation terms, or two methods' losses are not comparable"
    assert loss.get_ylabel() == "loss: cls + reg"
    assert list(labelled(steps)["student + RDD"].get_xdata()) == [10, 20, 30]
    assert np.allclose(labelled(steps)["student + RDD"].get_ydata(), [20, 40, 60])
    assert np.allclose(labelled(minutes)["student"].get_xdata(), [1, 2, 3])
    assert np.allclose(labelled(minutes)["student + RDD"].get_xdata(), [2, 4, 6])
    assert labelled(steps)["student"].get_color() == plot.COLOURS["student"]
    assert "60.0" in steps.get_legend().get_texts()[1].get_text()


def test_seeds_become_mean_and_range(tmp_path):
    runs = [write_run(tmp_path / f"rdd-seed{seed}", seed=seed) for seed in (0, 1, 5)]
    _, steps, _ = curves.curves(tmp_path / "c.png", [("rdd", run) for run in runs]).axes
    (line,), (band,) = steps.lines, steps.collections
    assert np.allclose(line.get_ydata()[-1], 50 + 2)
    low, high = band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices[:, 1].max()
    assert np.allclose([low, high], [50 / 3, 55])


def test_one_seed_that_stopped_early_does_not_break_the_mean(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=4, steps=(10, 20), final=100 / 3)]
    _, steps, _ = curves.curves(tmp_path / "c.png", [("rdd", run) for run in runs]).axes
    assert list(steps.lines[0].get_xdata()) == [10, 20, 30]
    assert np.allclose(steps.lines[0].get_ydata(), [50 / 3 + 2, 100 / 3 + 2, 50])
    assert steps.lines[0].get_label().endswith(f": {(50 + 100 / 3 + 4) / 2:.1f}"), "the mean of where each seed ended"


def test_one_step_and_no_evaluation_yet(tmp_path):
    folder = tmp_path / "young"
    folder.mkdir()
    record = {"kind": "train", "step": 1, "cls": 3.0, "reg": 1.0, "seconds": 2}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    loss, steps, _ = curves.curves(tmp_path / "c.png", [("young", folder)]).axes
    assert loss.lines[0].get_marker() == "o", "a line through one point is invisible"
    assert list(loss.lines[0].get_ydata()) == [4.0] and len(steps.lines[0].get_xdata()) == 0
    assert not is_blank(tmp_path / "c.png")


def test_smoothing_keeps_a_constant_and_the_length():
    assert np.allclose(curves._smooth(np.full(20, 3.0), 5), 3.0)
    assert np.allclose(curves._smooth(np.arange(9.0), 3)[1:-1], np.arange(9.0)[1:-1])  # inside, a line stays
    assert len(curves._smooth(np.arange(4.0), 9)) == 4


def test_log_cut_short_by_a_kill_is_read_and_a_broken_one_is_named(tmp_path):
    run = write_run(tmp_path / "run")
    path = run / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"kind": "train", "st')
    assert len(curves.read_metrics(run)) == 6
    path.write_text("nonsense\n" + whole)
    with pytest.raises(InputError, match=r"metrics.jsonl:1: expected a record .* found 'nonsense'"):
        curves.read_metrics(run)
    with pytest.raises(InputError, match="expected the log of a run, found no such file"):
        curves.read_metrics(tmp_path / "no-such-run")
    path.write_text("")
    for runs in ([("run", run)], []):
        with pytest.raises(InputError, match="found none"):
            curves.curves(tmp_path / "c.png", runs)


def test_sweeps_show_every_seed_and_its_mean_and_the_usual_points_where_they_belong(tmp_path):
    def row(method, *values):
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
        mean = float(np.mean(values)) if values else None
        return {"method": method, "metric": "map", "mean": mean, "std": spread, "n": len(values),
                "values": dict(enumerate(values))}  # fmt: skip

    rows = [row("none", 10.0, 12.0), row("rdd", 14.0, 18.0), row("rdd-printed", 15.0), row("lambda 0.5", 13.0),
            row("lambda 0", 12.0, 12.0), row("alpha1 0.05", 11.0, 11.0), row("alpha1 1"), row("alpha2 1", 9.0, 9.0)]  # fmt: skip
    rows += [row | {"metric": "nds", "mean": 99.0} for row in rows]
    usual = {"rdd": {"alpha1": 0.2, "alpha2": 0.2}, "rdd-printed": {"lambda": 0.1}}
    figure = curves.sweeps(tmp_path / "s.png", rows, usual)
    drawn = {}
    for ax, name in zip(figure.axes, ("lambda", "alpha1", "alpha2"), strict=True):
        alone, mean = next(line for line in ax.lines if line.get_linestyle() == "--"), ax.containers[0].lines[0]
        assert set(alone.get_ydata()) == {11.0}
        drawn[name] = [tick.get_text() for tick in ax.get_xticklabels()], list(mean.get_ydata())
    assert drawn == {"lambda": (["0", "0.1", "0.5"], [12, 15, 13]), "alpha1": (["0.05", "0.2"], [11, 16]),
                     "alpha2": (["0.2", "1"], [16, 9])}  # fmt: skip
    bars = figure.axes[1].containers[0].lines[2][0].get_segments()
    assert np.allclose(bars[1][:, 1], [16 - 2, 16 + 2]), "standard error: 2.83 / sqrt(2)"
    assert (tmp_path / "s.png").stat().st_size > 5000
    with pytest.raises(InputError, match="expected runs of the suite sensitivity"):
        curves.sweeps(tmp_path / "t.png", rows[:2], {})


def test_a_comparison_has_every_variant_that_ran_beside_the_line_of_the_student_alone(tmp_path):
    def row(student, method, delta, *finals):
        logs = [[{"step": 5, "map": final / 2}, {"step": 10, "map": final}] for final in finals]
        runs = {seed: {"scores": log} for seed, log in enumerate(logs)}
        mean = float(np.mean(finals)) if finals else None
        low, high = (delta - 1, delta + 2) if delta is not None else (None, None)
        return {"student": student, "method": method, "metric": "map", "mean": mean, "n": len(finals),
                "delta": delta, "low": low, "high": high, "values": dict(enumerate(finals)), "runs": runs,
                "as_long_as": []}  # fmt: skip

    rows = [row("big", "teacher", 9.0, 20.0), row("s", "none", None, 10.0, 12.0), row("s", "hint", 2.0, 14.0, 14.0),
            row("s", "rdd", None), row("s", "none, 8 epochs", 4.0, 15.0),
            row("big", "teacher", 9.0, 20.0), row("xs", "none", None), row("xs", "rdd", None)]  # fmt: skip
    rows += [r | {"metric": "nds", "mean": 99.0} for r in rows]
    figure = curves.comparison(tmp_path / "m.png", rows)
    assert len(figure.axes) == 2, "nobody ran the student xs"
    left, right = figure.axes
    assert [tick.get_text() for tick in left.get_yticklabels()] == ["teacher big", "alone", "+ Hint", "alone, 8 epochs"]
    alone, *bars = left.lines  # of "hint" the seeds that both have are others than all: it starts at 12
    assert set(alone.get_xdata()) == {11.0} and [list(bar.get_xdata()) for bar in bars] == [[19, 22], [13, 16], [14, 17]]
    assert [list(line.get_ydata()) for line in right.lines] == [[10, 20], [5.5, 11], [7, 14], [7.5, 15]]
    early = [row("big", "teacher", None), row("s", "none", None, 10.0), row("big", "teacher", None), row("xs", "none", None, 8.0)]
    figure = curves.comparison(tmp_path / "e.png", early)  # a student alone may be done before its teacher
    assert [ax.get_title() for ax in figure.axes[::2]] == ["s: last epoch", "xs: last epoch"]
    both = [row("big", "teacher", 10.0, 20.0), early[1], row("big", "teacher", 12.0, 20.0) | {"low": 10.5}, early[3]]
    bars = [list(ax.lines[1].get_xdata()) for ax in curves.comparison(tmp_path / "b.png", both).axes[::2]]
    assert bars == [[19, 22], [18.5, 22]], "the teacher stands at its own distance from each student"
    with pytest.raises(InputError, match="expected runs of a suite, the student alone among them; found none"):
        curves.comparison(tmp_path / "n.png", [rows[0], rows[3]])


def test_pulls_stand_at_their_share_and_their_gain_and_no_label_lies_on_another(tmp_path):
    def row(method, delta, *shares, suite="sim-nuscenes", student="cp-voxel-xxs-cpu", metric="map", low=None):
        runs = {seed: {"shares": share, "config": {"method": method.split()[0]}} for seed, share in enumerate(shares)}
        return {"suite": suite, "student": student, "method": method, "metric": metric, "delta": delta, "low": low,
                "high": low and low + 3, "n": len(shares), "runs": runs, "as_long_as": []}  # fmt: skip

    rows = [row("none", None, {}), row("fg", 10.0, {"fg": 0.3}, {"fg": 0.5}, low=9.0), row("fg x100", 11.0, {"fg": 40.0}),
            row("lad", 1.0, {}), row("rdd", 10.0, {"feat": 0.3, "logit": 0.1}), row("hint", None),
            row("rdd", 3.0, {"feat": 1.0}, student="cp-voxel-s-cpu")]  # fmt: skip
    rows += [r | {"metric": "nds", "delta": 99.0} for r in rows if r["n"]] + [row("rdd", 77.0, {"feat": 9.0}, suite="losses")]
    figure = curves.pulls(tmp_path / "p.png", rows)
    (ax,) = figure.axes  # of S there is one row only
    dots = sorted(tuple(np.round(point, 6)) for points in ax.collections for point in points.get_offsets().data)
    assert dots == [(0.4, 10), (0.4, 10), (40, 11)], "means over seeds, sums over terms; LAD has none; RDD once"
    (bar,) = (line for line in ax.lines if set(line.get_xdata()) == {0.4} and len(line.get_xdata()) == 2)
    (alone,) = (line for line in ax.lines if line.get_linestyle() == "--")
    assert list(bar.get_ydata()) == [9, 12] and set(alone.get_ydata()) == {0}
    assert [tuple(line.get_xdata()) for line in ax.lines if line.get_color() == "#bbbbbb"] == [(0.4, 40), (0.4,)]
    assert {text.get_text() for text in ax.texts} == {"FG", "FG x100", "RDD (default)"}
    boxes = [Text.get_window_extent(text) for text in ax.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]), "FG and RDD are at one place"
    second = [r | {"suite": "tuning"} for r in rows]
    assert [a.get_title() for a in curves.pulls(tmp_path / "q.png", rows + second).axes] == [
        "cp-voxel-xxs-cpu: sim-nuscenes", "cp-voxel-xxs-cpu: tuning"]  # fmt: skip
    with pytest.raises(InputError, match="expected runs of three methods of one student, found fewer"):
        curves.pulls(tmp_path / "n.png", rows[:2])
    with pytest.raises(InputError, match="found fewer"):
        curves.pulls(tmp_path / "n.png", [])


def test_without_time_there_are_two_panels(tmp_path):
    run = write_run(tmp_path / "a")
    assert len(curves.curves(tmp_path / "c.png", [("alone", run)], timed=False).axes) == 2


def test_ratios_count_what_reaches_its_goal(tmp_path):
    row = {"subject": "boxes", "peer": "shapely", "goal": 20.0}
    rows = [row | {"ratio": ratio} for ratio in (40.0, 10.0, 20.0, None)]
    rows += [row | {"goal": None, "ratio": 5.0}, {"subject": "detectors", "peer": "", "goal": 0.7, "ratio": 0.35}]
    (ax,) = curves.ratios(tmp_path / "r.png", rows).axes
    assert [tick.get_text() for tick in ax.get_yticklabels()] == [
        "boxes / shapely   2 of 3",
        "detectors: share of the machine's rate   0 of 1",
    ]
    dots = sorted(tuple(point) for points in ax.collections for point in points.get_offsets().data)
    assert np.allclose(dots, [(0.5, 0), (0.5, 1), (1, 0), (2, 0)])
    with pytest.raises(InputError, match="expected benchmark rows with a goal"):
        curves.ratios(tmp_path / "none.png", rows[3:5])
