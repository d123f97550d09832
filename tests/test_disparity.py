"""disparity.py: every pair counted once in its bin, against loops; both heads, both layouts; a picture of what is there."""

import json
import math
import statistics
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.image import imread

import disparity
from cli import InputError
from data.batch import Batch, collate, open_data
from detector import build
from disparity import BACKGROUND, POINTS, RANGE_STEP, Pairs, describe, groups, locate, measure, picture, summarise
from parallel import BatchNorm
from presets import preset
from rdd import RDD
from stops import Stop, look
from tests.scenes import few_points, tiny_config, tiny_frames
from tests.test_train import config, root, train_module_teacher  # noqa: F401 (root is a fixture)
from train import train


def some_pairs(count=400, seed=0, classes=3) -> Pairs:
    rng = np.random.default_rng(seed)
    label = rng.integers(-1, classes, count)
    points = np.where(label < 0, -1, rng.integers(0, 150, count))
    return Pairs(rng.uniform(0, 9, count), rng.choice([0.0, 0.3, 1.0], count), rng.integers(0, 2, count),
                 rng.uniform(0, 8, count), label, points)  # fmt: skip


# ------------------------------------------------------------------ where a region is


def test_a_region_is_of_the_nearest_object_in_it_with_the_points_in_its_box():
    cfg = tiny_config()
    batch = collate(tiny_frames(3), cfg)
    rng = np.random.default_rng(1)
    centre, half = rng.uniform((0, -5), (6, 5), (60, 2)), rng.uniform(0.2, 3, (60, 1))
    scan = rng.integers(0, 3, (60, 1))
    regions = torch.tensor(np.concatenate([scan, centre - half, centre + half], axis=1), dtype=torch.float32)
    distance, label, points = locate(regions, batch)
    kinds = set()
    for k, (b, x0, y0, x1, y1) in enumerate(regions.tolist()):
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        assert float(distance[k]) == pytest.approx(math.hypot(x, y), abs=1e-5)
        best = (math.inf, -1, -1)
        for box, kind in zip(batch.boxes[int(b)].tolist(), batch.labels[int(b)].tolist(), strict=True):
            if x0 <= box[0] < x1 and y0 <= box[1] < y1:
                inside = 0
                for n, px, py, pz, _ in batch.points.tolist():
                    dx, dy, c, s = px - box[0], py - box[1], math.cos(box[6]), math.sin(box[6])
                    inside += (n == b and abs(dx * c + dy * s) <= box[3] / 2 and abs(dy * c - dx * s) <= box[4] / 2
                               and abs(pz - box[2]) <= box[5] / 2)  # fmt: skip
                best = min(best, (math.hypot(x - box[0], y - box[1]), kind, inside))
        assert (int(label[k]), int(points[k])) == best[1:]
        kinds.add(best[1])
    assert kinds == {-1, 0, 1}, "cars, pedestrians and background were all among them"


def test_scans_without_objects_or_regions_are_background():
    empty = Batch(["0"], torch.zeros(0, 5), [torch.zeros(0, 7)], [torch.zeros(0, dtype=torch.int64)], {})
    distance, label, points = locate(torch.tensor([[0.0, 2, -1, 4, 1]]), empty)
    assert (distance.tolist(), label.tolist(), points.tolist()) == ([3.0], [-1], [-1])
    assert all(len(column) == 0 for column in locate(torch.zeros(0, 5), empty))


# ------------------------------------------------------------------ bins


def test_bins_are_what_a_loop_sorts():
    cfg, pairs = tiny_config(), some_pairs()
    cfg = replace(cfg, point_range=(0.0, -20.0, -3.0, 20.0, 20.0, 1.0))
    pairs = replace(pairs, distance=pairs.distance * 3.5)
    record = summarise(pairs, cfg, 7)
    kept: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for d, m, side, distance, label, points in zip(*vars(pairs).values(), strict=True):
        low = int(distance // RANGE_STEP) * 10
        where = [("range", f"{low}-{low + 10}"), ("side", ("teacher", "student")[side]),
                 ("class", (*cfg.classes, BACKGROUND)[label])]  # fmt: skip
        if label >= 0:
            where.append(("points", "0" if points < 1 else "1-5" if points < 6 else "6-20" if points < 21 else
                          "21-100" if points < 101 else "101+"))  # fmt: skip
        for key in where:
            kept.setdefault(key, []).append((d, m))
    for name in ("range", "class", "points", "side"):
        for row in record[name]:
            values = kept.pop((name, row["bin"]), [])
            assert row["count"] == len(values)
            if not values:
                assert row["median"] is None and row["selected"] is None
                continue
            low, middle, high = statistics.quantiles([d for d, _ in values], n=4, method="inclusive")
            assert (row["q25"], row["median"], row["q75"]) == pytest.approx((low, middle, high))
            assert row["selected"] == pytest.approx(sum(m > 0 for _, m in values) / len(values))
    assert not kept, "a pair in no bin"
    assert record["step"] == 7 and record["all"]["count"] == 400
    assert sum(row["count"] for row in record["points"]) == (pairs.label >= 0).sum()
    assert [row["bin"] for row in record["range"]] == ["0-10", "10-20", "20-30"], "up to the map's far corner, 28 m"


def test_a_bin_without_a_pair_is_none_and_never_zero():
    pairs = some_pairs(0)
    record = summarise(pairs, tiny_config(), 0)
    rows = [record["all"], *(row for name in ("range", "class", "points", "side") for row in record[name])]
    assert all(row["count"] == 0 and [row[k] for k in ("q25", "median", "q75", "selected")] == [None] * 4 for row in rows)
    one = Pairs(*(np.array([value]) for value in (2.5, 0.0, 1, 3.0, 0, 4)))
    assert describe(one, np.array([True])) == {"count": 1, "q25": 2.5, "median": 2.5, "q75": 2.5, "selected": 0.0}


def test_edges_belong_to_the_upper_bin():
    cfg = tiny_config(point_range=(0.0, -20.0, -3.0, 20.0, 20.0, 1.0))
    pairs = Pairs(*(np.array(column) for column in ([1.0] * 5, [1.0] * 5, [0] * 5, [10.0] * 5, [0] * 5, list(POINTS))))
    found = groups(pairs, cfg)
    assert [int(chosen.sum()) for chosen in found["range"].values()] == [0, 5, 0]
    assert [chosen.nonzero()[0].tolist() for chosen in found["points"].values()] == [[0], [1], [2], [3], [4]]


# ------------------------------------------------------------------ measuring


def settled(detector, data):
    """The detector, its norms at one batch's statistics: an untrained one in eval mode gives next to nothing."""
    for module in detector.modules():
        if isinstance(module, BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        detector.train()(detector.prepare(collate([data[0], data[1]], detector.cfg)))
    return detector.eval()


def seen_by_rdd(cfg, student, teacher, distil, frames):
    """(d, m, side) scan by scan, as RDD itself tells."""
    rows = []
    for frame in frames:
        batch = collate([frame], cfg)
        with torch.no_grad():
            pairs = distil.compare(student(student.prepare(batch)), teacher(teacher.prepare(batch)))
        rows += list(zip(pairs.side.tolist(), pairs.d.tolist(), pairs.m.tolist(), strict=True))
    return sorted(rows)


@pytest.mark.parametrize("changes", [{}, {"head": "anchor"}, {"encoder": "pillar", "voxel_size": (0.8, 0.8, 4.0),
                                     "encoder_channels": (8, 8)}], ids=["centre", "anchor", "other grid"])  # fmt: skip
def test_measured_pairs_are_those_of_rdd(root, changes):  # noqa: F811
    cfg = config(root, method="rdd", proposal_score=0.001, **changes)
    data, size = open_data(cfg, "val"), {"voxel_size": (0.4, 0.4, 4.0)} if "encoder" in changes else {}
    student = settled(build(cfg), data)
    teacher = settled(build(replace(cfg, method="none", width=(1.0,) * 3, seed=1, **size)), data)
    distil = RDD(cfg, student.backbone.out_channels, teacher.backbone.out_channels).eval()
    pairs = measure(Stop(5, student, distil.state_dict()), teacher, cfg, data, torch.device("cpu"), batch_size=3)
    expected = seen_by_rdd(cfg, student, teacher, distil, [data[i] for i in range(4)])
    found = sorted(zip(pairs.side.tolist(), pairs.d.tolist(), pairs.m.tolist(), strict=True))
    assert len(found) == len(expected) > 20 and min(d for _, d, _ in found) > 0.01
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-5) and {m for *_, m in found} == {0.0, 1.0}


def test_psi_s_norm_is_as_it_was_learned_not_that_of_the_frames_measured(root):  # noqa: F811
    cfg = config(root, method="rdd", proposal_score=0.001, psi_norm=True)
    data = open_data(cfg, "val")
    student, teacher = settled(build(cfg), data), settled(build(replace(cfg, method="none", seed=1)), data)
    distil = RDD(cfg, student.backbone.out_channels, teacher.backbone.out_channels)
    (norm,) = (module for module in distil.psi if hasattr(module, "running_mean"))
    norm.running_mean.fill_(0.3)
    norm.running_var.fill_(4.0)
    expected = seen_by_rdd(cfg, student, teacher, distil.eval(), [data[i] for i in range(4)])
    for size in (1, 3):
        pairs = measure(Stop(5, student, distil.state_dict()), teacher, cfg, data, torch.device("cpu"), batch_size=size)
        found = sorted(zip(pairs.side.tolist(), pairs.d.tolist(), pairs.m.tolist(), strict=True))
        assert len(found) == len(expected) > 20 and np.allclose(found, expected, rtol=1e-4, atol=1e-5)


class Scans:
    """A data set of two scans with nuScenes' classes."""

    def __init__(self, cfg):
        self.batch, self.cfg = few_points(cfg), cfg

    def __len__(self):
        return 2

    def __getitem__(self, i):
        from data import Frame

        mine = self.batch.points[:, 0] == i
        names = tuple(self.cfg.classes[k] for k in self.batch.labels[i])
        return Frame(str(i), self.batch.points[mine, 1:].numpy(), self.batch.boxes[i].numpy(), names)


def test_nuscenes_classes_and_boxes_with_velocity():
    cfg = replace(preset("cp-voxel-xxs-cpu", "nuscenes"), point_range=(-9.6, -7.2, -5.0, 9.6, 7.2, 3.0), proposal_score=0.01,
                  method="rdd")
    student, teacher = build(cfg).eval(), build(replace(preset("cp-voxel-cpu", "nuscenes"), point_range=cfg.point_range)).eval()
    distil = RDD(cfg, student.backbone.out_channels, teacher.backbone.out_channels)
    pairs = measure(Stop(1, student, distil.state_dict()), teacher, cfg, Scans(cfg), torch.device("cpu"))
    record = summarise(pairs, cfg, 1)
    assert [row["bin"] for row in record["class"]] == [*cfg.classes, BACKGROUND]
    assert record["all"]["count"] == len(pairs.d) > 0 and set(pairs.label) > {-1}


def test_a_student_without_psi_is_refused(root):  # noqa: F811
    cfg = config(root)
    stop = Stop(1, build(cfg), {})
    with pytest.raises(InputError, match="expected one distilled with rdd, whose psi is needed; found method none"):
        measure(stop, train_module_teacher(cfg), cfg, open_data(cfg, "val"), torch.device("cpu"))
    with pytest.raises(InputError, match="psi of student .* made for another model: missing psi.0.weight"):
        measure(Stop(1, build(replace(cfg, method="rdd")), {}), train_module_teacher(cfg), cfg, open_data(cfg, "val"), "cpu")
    of_another = Stop(1, build(replace(cfg, method="rdd")), {}, "0123456789abcdef")
    with pytest.raises(InputError, match="learned from another teacher than --teacher"):
        measure(of_another, train_module_teacher(cfg), cfg, open_data(cfg, "val"), "cpu")


# ------------------------------------------------------------------ picture and command


def test_picture_shows_the_medians_and_leaves_empty_bins_out(tmp_path):
    cfg = tiny_config(point_range=(0.0, -20.0, -3.0, 20.0, 20.0, 1.0))
    records = [summarise(some_pairs(300, seed), cfg, step) for seed, step in ((0, 10), (1, 20))]  # nothing beyond 8 m
    axes = picture(tmp_path / "d.png", records).axes
    by_range = [line for line in axes[0].lines if len(line.get_xdata())]
    assert all(len(line.get_xdata()) == 1 for line in by_range), "two of the three bins are empty"
    assert by_range[-1].get_ydata()[0] == records[1]["range"][0]["median"]
    over_training = [line for line in axes[3].lines if len(line.get_xdata()) == 2]
    assert list(over_training[0].get_ydata()) == [record["side"][0]["median"] for record in records]
    pixels = imread(tmp_path / "d.png")[..., :3]
    assert not (pixels == pixels[0, 0]).all()
    picture(tmp_path / "none.png", [summarise(some_pairs(0), cfg, 1)])
    far = replace(some_pairs(300), side=np.ones(300, dtype=int), d=np.where(some_pairs(300).side, 50.0, 1.0))
    record = {**summarise(far, cfg, 1), **{name: [] for name in disparity.TITLES}}
    top = picture(tmp_path / "side.png", [record]).axes[0].get_ylim()[1]
    assert top > record["side"][1]["q75"] == 50, "the last column's markers are within the axis too"


def test_command_trains_looks_and_draws(root, tmp_path, monkeypatch, capsys):  # noqa: F811
    torch.set_num_threads(1)
    cfg = config(root, epochs=2)
    train(replace(cfg, width=(1.0,) * 3), tmp_path / "teacher", stop_after=1)
    words = ["--root", str(root), "--point-range", ",".join(map(str, cfg.point_range)), "--fov-only", "off", "--epochs", "2",
             "--proposal-score", "0.01", "--paste", "0,0,0"]  # fmt: skip
    pair = ["--teacher", str(tmp_path / "teacher" / "last.pt"), "--student"]

    def run(student, out, *more):
        monkeypatch.setattr(sys, "argv", ["disparity.py", *pair, student, "--out", str(out), *words, *more])
        disparity.main()
        return json.loads((out / "disparity.json").read_text())

    content = run("cp-voxel-xxs-cpu", tmp_path / "out", "--stops", "2")
    assert [record["step"] for record in content["stops"]] == [2, 4] and (tmp_path / "out" / "disparity.png").is_file()
    last = tmp_path / "out" / "rdd-seed0" / "last.pt"
    as_it_stands = run(str(last), tmp_path / "again")
    assert as_it_stands["stops"] == content["stops"][1:] and look(last).step == 4
    assert not (tmp_path / "again" / "rdd-seed0").exists(), "a checkpoint is not trained"
    every = run(str(last), tmp_path / "all", "--select", "all")
    assert every["stops"][0]["all"]["selected"] == 1.0, "how pairs are selected can be asked anew"
