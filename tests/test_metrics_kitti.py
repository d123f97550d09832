"""metrics/kitti.py against the official evaluator's stored results, a slow readable twin, and rules by hand."""

import json
import warnings
from dataclasses import fields, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from cli import InputError
from data.kitti_files import Objects, read_objects
from metrics import kitti as K
from tests.scenes import assert_same

SHARED = Path(__file__).resolve().parents[2] / "shared"
EDGE = ("few_gt height_boundary near_perfect negative_scores neighbours_and_dontcare no_alpha no_detections "
        "no_gt_of_class one_class_never_detected score_ties single_frame").split()  # fmt: skip


# ---- the official evaluator's own numbers


def read_case(folder: Path) -> tuple[list[Objects], list[Objects]]:
    names = sorted(path.name for path in (folder / "label_2").glob("*.txt"))
    labels = [read_objects(folder / "label_2" / name, scored=False) for name in names]
    return labels, [read_objects(folder / "pred" / name, scored=True) for name in names]


@pytest.mark.parametrize("name", ["main", *EDGE])
def test_the_official_evaluators_numbers(golden, name):
    folder = golden / "kitti_eval"
    folder = folder if name == "main" else folder / "edge" / name
    expected = json.loads((folder / "expected.json").read_text())
    labels, detections = read_case(folder)
    assert_same(K.evaluate(labels, detections), expected["expected"], 1e-6)  # stored with 6 decimals
    assert_same(K.count_labels(labels), expected["counts"]["valid_gt"], 0)

    official, ours = json.loads((folder / "curves.json").read_text())["curves"], K.curves(labels, detections)
    for table, classes in official.items():
        for c, metrics in classes.items():
            for metric, levels in metrics.items():
                expected_levels = levels and dict(zip(K.LEVELS, map(np.array, levels)))
                assert_same(ours[table][c][metric], expected_levels, 1e-8, (table, c, metric))


def test_all_stored_cases_are_tested(golden):
    assert sorted(path.name for path in (golden / "kitti_eval" / "edge").iterdir()) == EDGE


def test_real_detections(real_kitti):
    """A real detector on five real frames; the C++ and the numba evaluator agree on these."""
    ids = ["000001", "000002", "000004", "000005", "000008"]
    labels = [read_objects(real_kitti / "training" / "label_2" / f"{id}.txt", scored=False) for id in ids]
    detections = [read_objects(real_kitti / "detections" / f"{id}.txt", scored=True) for id in ids]
    car = K.evaluate(labels, detections)["strict"]["Car"]
    r11 = {"bbox": [9.0909, 18.1818, 18.1818], "aos": [9.0868, 18.1784, 18.1784], "bev": [0, 16.6667, 16.6667],
           "3d": [0, 14.7727, 14.7727]}  # fmt: skip
    r40 = {"bbox": [0, 12.5, 12.5], "bev": [0, 9.1667, 9.1667], "3d": [0, 8.2292, 8.2292]}
    for which, metrics in (("AP_R11", r11), ("AP_R40", r40)):
        for metric, numbers in metrics.items():
            assert list(car[which][metric].values()) == pytest.approx(numbers, abs=5e-5), (which, metric)


# ---- a slow twin, written straight from the rules: one frame, one label, one detection at a time


def twin_overlap(metric: str, a: Objects, i: int, b: Objects, j: int) -> float:
    """Intersection over union of boxes that all stand along the axes (rotation_y 0: length to the right)."""
    def intervals(o, k):
        (h, w, length), (x, y, z), (left, top, right, bottom) = o.dimensions[k], o.location[k], o.bbox[k]
        ground = [(x - length / 2, x + length / 2), (z - w / 2, z + w / 2)]
        return {"bbox": [(left, right), (top, bottom)], "bev": ground, "3d": [*ground, (y - h, y)]}[metric]

    shared = size_a = size_b = 1.0
    for (low_a, high_a), (low_b, high_b) in zip(intervals(a, i), intervals(b, j)):
        shared *= max(min(high_a, high_b) - max(low_a, low_b), 0)
        size_a, size_b = size_a * (high_a - low_a), size_b * (high_b - low_b)
    return shared / (size_a + size_b - shared)


def twin_frame(gt: Objects, dt: Objects, name: str, metric: str, limit: float, level, threshold) -> tuple:
    """One frame: scores of the hits (threshold None: first pass), hits, false positives, similarity."""
    min_height, max_occlusion, max_truncation = level
    neighbour = {"Car": "Van", "Pedestrian": "Person_sitting"}.get(name)

    def label_role(i):
        if gt.type[i] == neighbour:
            return "ignored"
        if gt.type[i] != name:
            return "absent"
        height = gt.bbox[i, 3] - gt.bbox[i, 1]
        hard = height <= min_height or gt.occlusion[i] > max_occlusion or gt.truncation[i] > max_truncation
        return "ignored" if hard else "counted"

    def detection_role(j):
        if int(abs(dt.bbox[j, 3] - dt.bbox[j, 1])) < min_height:
            return "ignored"
        return "counted" if dt.type[j] == name else "absent"

    able = [j for j in range(len(dt)) if threshold is None or dt.score[j] >= threshold]
    used, scores, similarity = set(), [], 0.0
    for i in range(len(gt)):
        if label_role(i) == "absent":
            continue
        fits = [j for j in able if j not in used and detection_role(j) != "absent"
                and twin_overlap(metric, gt, i, dt, j) > limit]  # fmt: skip
        if not fits:
            continue
        if threshold is None:
            best = max(fits, key=lambda j: dt.score[j])  # max: the first of equals
        else:
            counted = [j for j in fits if detection_role(j) == "counted"]
            best = max(counted, key=lambda j: twin_overlap(metric, gt, i, dt, j)) if counted else fits[0]  # noqa: B023
        used.add(best)
        if label_role(i) == "counted" and detection_role(best) == "counted":
            scores.append(dt.score[best])
            similarity += (1 + np.cos(gt.alpha[i] - dt.alpha[best])) / 2
    wrong = 0
    for j in able:
        if j in used or detection_role(j) != "counted":
            continue
        covered = False
        for i in range(len(gt)):
            if metric == "bbox" and gt.type[i] == "DontCare":
                sides = np.minimum(gt.bbox[i, 2:], dt.bbox[j, 2:]) - np.maximum(gt.bbox[i, :2], dt.bbox[j, :2])
                covered |= max(sides[0], 0) * max(sides[1], 0) / np.prod(dt.bbox[j, 2:] - dt.bbox[j, :2]) > limit
        wrong += not covered
    valid = sum(label_role(i) == "counted" for i in range(len(gt)))
    return scores, len(scores), wrong, similarity, valid


def twin(labels, detections, name, metric, limit, level) -> tuple[list[float], list[float]]:
    def all_frames(threshold):
        found = [twin_frame(g, d, name, metric, limit, level, threshold) for g, d in zip(labels, detections)]
        return [sum((f[k] for f in found), [] if k == 0 else 0) for k in range(5)]

    scores, _, _, _, valid = all_frames(None)
    thresholds, recall = [], 0.0
    scores.sort(reverse=True)
    for i, score in enumerate(scores):
        is_last = i == len(scores) - 1
        if is_last or abs((i + 2) / valid - recall) >= abs((i + 1) / valid - recall) or (i + 1) / valid > recall:
            thresholds.append(score)
            recall += 1 / 40
    precision, similarity = [0.0] * 41, [0.0] * 41
    for t, threshold in enumerate(thresholds):
        _, hits, wrong, sim, _ = all_frames(threshold)
        precision[t], similarity[t] = hits / max(hits + wrong, 1), sim / max(hits + wrong, 1)
    return [max(precision[t:]) for t in range(41)], [max(similarity[t:]) for t in range(41)]


def crowded(seed: int, frames: int = 25) -> tuple[list[Objects], list[Objects]]:
    """Small crowded frames: labels overlap each other, detections overlap several, scores tie, heights and 2D
    overlaps lie on the limits."""
    rng = np.random.default_rng(seed)

    def some_labels(n: int) -> Objects:
        left, top = rng.integers(0, 9, n) * 4.0, rng.integers(0, 5, n) * 2.0
        height = rng.choice([20, 25, 25.5, 40, 40.5, 50, 50], n)
        types = "Car Car Car Van Pedestrian Pedestrian Person_sitting Cyclist Cyclist DontCare".split()
        return Objects(
            type=rng.choice(types, n),
            truncation=rng.choice([0, 0, 0, 0.15, 0.3, 0.31, 0.5, 0.6], n),
            occlusion=rng.choice([0, 0, 0, 1, 2, 3], n),
            alpha=rng.uniform(-3, 3, n),
            bbox=np.stack([left, top, left + 40, top + height], axis=1),
            dimensions=rng.uniform([1.4, 1.4, 3], [1.6, 2, 4], (n, 3)),
            location=np.array([0, 1.5, 20]) + rng.uniform(-1.5, 1.5, (n, 3)) * [1, 0.1, 1],
            rotation_y=np.zeros(n),
            score=np.full(n, np.nan),
        )

    def some_detections(labels: Objects) -> Objects:
        of = labels[rng.integers(0, len(labels), rng.integers(0, 10))] if len(labels) else labels
        n = len(of)
        other = rng.random(n) < 0.2
        types = np.where(other | (of.type == "DontCare"), rng.choice(["Car", "Cyclist", "Truck"], n), of.type)
        return replace(
            of,
            type=np.where(types == "Van", "Car", types),
            alpha=of.alpha + rng.normal(0, 0.5, n),
            bbox=of.bbox + rng.choice([-4, 0, 0, 2], (n, 4)) * [1, 1, 1, rng.random() < 0.5],
            dimensions=of.dimensions * rng.uniform(0.95, 1.05, (n, 3)),
            location=of.location + rng.normal(0, 0.1, (n, 3)),
            score=rng.integers(0, 16, n) / 16,
        )

    labels = [some_labels(n) for n in rng.integers(0, 9, frames)]
    return labels, [some_detections(frame) for frame in labels]


def test_a_slow_twin_agrees_in_a_crowd():
    points = []
    for seed in range(8):
        labels, detections = crowded(seed)
        found = K.curves(labels, detections)
        for table, name, i, level in product(K.LIMITS, K.CLASSES, range(3), K.LEVELS):
            metric, limit = K.METRICS[i], K.LIMITS[table][name][i]
            if found[table][name][metric] is None:
                assert not any((d.type == name).any() for d in detections)
                continue
            precision, similarity = twin(labels, detections, name, metric, limit, K.LEVELS[level])
            here = (seed, table, name, metric, level)
            assert found[table][name][metric][level] == pytest.approx(precision, abs=1e-12), here
            if metric == "bbox":
                assert found[table][name]["aos"][level] == pytest.approx(similarity, abs=1e-12), here
            points += precision
    assert sum(0 < point < 1 for point in points) > 500  # many, and not trivial ones


# ---- rules by hand


def objects(*rows: dict, scored: bool) -> Objects:
    """Objects from what is not as usual: a car that counts as easy, upright, 10 m before the camera."""
    usual = {"type": "Car", "truncation": 0.0, "occlusion": 0, "alpha": 0.5, "bbox": (100, 100, 200, 150),
             "dimensions": (1.5, 1.6, 3.9), "location": (0, 1.7, 10), "rotation_y": 0.3,
             "score": 0.9 if scored else np.nan}  # fmt: skip
    shapes = {"bbox": (-1, 4), "dimensions": (-1, 3), "location": (-1, 3)}
    kinds = {"type": str, "occlusion": np.int64}
    columns = {key: [row.get(key, usual[key]) for row in rows] for key in usual}
    return Objects(**{key: np.array(column, dtype=kinds.get(key, np.float64)).reshape(shapes.get(key, (-1,)))
                      for key, column in columns.items()})  # fmt: skip


def score_frames(*frames: tuple[list[dict], list[dict]], table: str = "strict", name: str = "Car") -> dict:
    """AP_R40 of the class: {metric: {level: percent} or None}."""
    labels = [objects(*label, scored=False) for label, _ in frames]
    detections = [objects(*found, scored=True) for _, found in frames]
    return K.evaluate(labels, detections)[table][name]["AP_R40"]


@pytest.mark.parametrize("n, r40, r11", [(1, 0, 100 / 11), (5, 10, 200 / 11), (20, 47.5, 500 / 11), (40, 97.5, 1000 / 11),
                                         (41, 100, 100), (60, 100, 100)])  # fmt: skip
def test_perfect_detections_of_few_labels_do_not_get_100(n, r40, r11):
    labels, found = objects({}, scored=False), objects({}, scored=True)
    detections = [replace(found, score=np.array([0.5 + i / 1000])) for i in range(n)]
    car = K.evaluate([labels] * n, detections)["strict"]["Car"]
    for metric in K.METRICS:
        for level in K.LEVELS:
            assert car["AP_R40"][metric][level] == pytest.approx(r40), (metric, level)
            assert car["AP_R11"][metric][level] == pytest.approx(r11), (metric, level)


FULL = [([{}], [{"score": 0.5 + i / 1000}]) for i in range(41)]  # 41 frames, each car found: AP 100


@pytest.mark.parametrize("label, levels", [
    ({}, "easy moderate hard"),
    ({"bbox": (100, 100, 200, 140)}, "moderate hard"),  # exactly 40 px: too small for easy
    ({"bbox": (100, 100, 200, 125)}, ""),
    ({"occlusion": 1}, "moderate hard"),
    ({"occlusion": 2}, "hard"),
    ({"occlusion": 3}, ""),
    ({"truncation": 0.15}, "easy moderate hard"),  # the limits of truncation are inside
    ({"truncation": 0.16}, "moderate hard"),
    ({"truncation": 0.5}, "hard"),
    ({"truncation": 0.51}, ""),
    ({"type": "Van"}, ""),
    ({"type": "Pedestrian"}, ""),
])  # fmt: skip
def test_which_missed_labels_cost_recall(label, levels):
    """One more label that nothing finds: 42 are to be found, 41 are, so one point of the 40 is lost."""
    assert K.count_labels([objects(label, scored=False)])["Car"] == {v: int(v in levels.split()) for v in K.LEVELS}
    scores = score_frames(*FULL, ([label], []))
    for level in K.LEVELS:
        assert (scores["3d"][level] < 100) == (level in levels.split()), level


@pytest.mark.parametrize("row, costs", [
    ({"type": "Car"}, "bbox bev 3d aos"),
    ({"type": "car"}, "bbox bev 3d aos"),  # the kit ignores case
    ({"type": "Pedestrian"}, ""),
    ({"type": "Car", "bbox": (100, 100, 200, 124.9)}, ""),  # too small to count, in bev and 3d too
    ({"type": "Car", "bbox": (100, 100, 200, 125)}, "bbox bev 3d aos"),
])  # fmt: skip
def test_which_detections_on_nothing_are_false_positives(row, costs):
    scores = score_frames(*FULL, ([], [{"score": 0.99, **row}]))
    for metric in K.METRICS:
        assert (scores[metric]["hard"] < 100) == (metric in costs.split()), metric


def test_detections_on_ignored_labels_count_neither_way():
    for label in ({"type": "Van"}, {"occlusion": 3}, {"truncation": 0.9}):
        scores = score_frames(*FULL, ([label], [{"score": 0.99}]))
        assert all(scores[metric] == {level: 100 for level in K.LEVELS} for metric in K.METRICS), label
    scores = score_frames(*FULL, ([{"type": "Truck"}], [{"score": 0.99}]))  # no neighbour: it costs
    assert all(scores[metric]["easy"] < 100 for metric in K.METRICS)


def test_dontcare_excuses_detections_in_the_image_only():
    half = {"type": "DontCare", "bbox": (100, 100, 200, 130), "dimensions": (-1, -1, -1), "location": (-1000,) * 3}
    most = half | {"bbox": (90, 90, 200, 136)}  # covers 36 of its 50 px: 0.72
    for region, excused in ((half, False), (most, True)):
        scores = score_frames(*FULL, ([region], [{"score": 0.99}]))
        assert (scores["bbox"]["easy"] == 100) == (scores["aos"]["easy"] == 100) == excused
        assert scores["bev"]["easy"] < 100 and scores["3d"]["easy"] < 100


def test_overlap_must_exceed_the_limit():
    for bottom, hit in ((135.0, False), (135.1, True)):  # 35 of 50 px is 0.7 exactly
        scores = score_frames(*[([{}], [{"bbox": (100, 100, 200, bottom), "score": i}]) for i in range(41)])
        assert scores["bbox"]["moderate"] == (100 if hit else 0)
        assert scores["3d"]["moderate"] == 100  # unmoved


def test_loose_limits_hold_for_bev_and_3d_only():
    shifted = [([{}], [{"location": (0.8, 1.7, 10), "bbox": (100, 100, 200, 130), "score": i}]) for i in range(41)]
    strict, loose = score_frames(*shifted), score_frames(*shifted, table="loose")
    assert strict["3d"]["moderate"] == strict["bev"]["moderate"] == 0
    assert loose["3d"]["moderate"] == loose["bev"]["moderate"] == 100
    assert strict["bbox"]["moderate"] == loose["bbox"]["moderate"] == 0


def test_orientation():
    for turn, expected in ((0, 100), (np.pi / 2, 50), (np.pi, 0), (2 * np.pi, 100)):
        frames = [([{}], [{"alpha": 0.5 + turn, "score": i}]) for i in range(41)]
        scores = score_frames(*frames)
        assert scores["aos"]["easy"] == pytest.approx(expected, abs=1e-9) and scores["bbox"]["easy"] == 100
    # One detection without orientation, of whatever class, switches AOS off for all.
    scores = score_frames(*FULL, ([], [{"type": "Tram", "alpha": -10}]))
    assert scores["aos"] is None and scores["bbox"]["easy"] == 100


def test_a_class_needs_one_detection_with_the_columns_of_the_metric():
    def which(*found):
        return {metric for metric, levels in score_frames(([{}], list(found))).items() if levels}

    assert which({}) == {"bbox", "bev", "3d", "aos"}
    assert which() == which({"type": "Pedestrian"}) == set()
    image_only = {"dimensions": (-1, -1, -1), "location": (-1000, -1000, -1000)}
    assert which(image_only) == {"bbox", "aos"}
    assert which(image_only, {}) == {"bbox", "bev", "3d", "aos"}
    assert which({"bbox": (-1, -1, -1, -1)}) == {"bev", "3d"}
    assert which({"location": (0, -1000, 10), "dimensions": (-1, 1.6, 3.9)}) == {"bbox", "bev", "aos"}


def test_a_point_where_all_is_ignored_is_0_and_no_nan():
    """First pass: the Van takes the small high-scoring detection, the car the other. Second: the Van takes that."""
    van, car = {"type": "Van", "bbox": (100, 100, 200, 126)}, {"bbox": (100, 102, 200, 128)}
    small, other = {"bbox": (100, 99, 200, 123.9), "score": 0.9}, {"bbox": (100, 101, 200, 127), "score": 0.5}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = score_frames(([van, car], [small, other]))
    assert scores["bbox"] == {level: 0 for level in K.LEVELS}


def test_boxes_without_area_harm_nobody():
    flat = {"bbox": (150, 100, 150, 150), "dimensions": (0, 0, 0), "score": 0.1}
    point = {"bbox": (150, 100, 150, 100), "score": 0.1}
    dontcare = {"type": "DontCare", "bbox": (0, 0, 300, 300), "dimensions": (-1,) * 3, "location": (-1000,) * 3}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = score_frames(*FULL, ([dontcare], [flat, point]))
    assert scores["3d"] == {level: 100 for level in K.LEVELS}


def test_order_of_frames_and_empty_frames_change_nothing_and_inputs_stay():
    labels, detections = crowded(99, frames=8)
    before = [getattr(o, f.name).copy() for o in labels + detections for f in fields(Objects)]
    expected = K.evaluate(labels, detections)
    after = [getattr(o, f.name) for o in labels + detections for f in fields(Objects)]
    assert all(np.array_equal(x, y, equal_nan=x.dtype.kind == "f") for x, y in zip(before, after))
    assert_same(K.evaluate(labels[::-1], detections[::-1]), expected, 1e-9)
    nothing = labels[0][:0]
    assert_same(K.evaluate([nothing, *labels, nothing], [nothing, *detections, nothing]), expected, 1e-9)
    only = K.evaluate(labels, detections, classes=("Cyclist",))
    assert_same(only, {table: {"Cyclist": expected[table]["Cyclist"]} for table in expected}, 0)


def test_drawn_frames_score_as_the_full_evaluator_on_a_list_of_them():
    """To the last bit; with frames drawn several times, without labels, without detections, without both, classes not found."""
    rng, scores = np.random.default_rng(3), set()
    for seed, absent in ((20, ()), (21, ("Car", "Cyclist")), (22, K.CLASSES)):
        labels, detections = crowded(seed, frames=20)
        a, b, c, d = [k for k in range(20) if len(labels[k]) and len(detections[k])][:4]
        detections = [frame[~np.isin(frame.type, absent)] for frame in detections]
        labels[a], detections[b], labels[c], detections[c] = (frames[0][:0] for frames in (labels, detections) * 2)
        detections[d] = replace(detections[d], alpha=np.full(len(detections[d]), -10.0))  # no "aos" of a draw that has this one
        assert any((frame.type == "DontCare").any() for frame in labels)
        work, others = K.gather(labels, detections), np.delete(np.arange(20), d)
        by_hand = np.array([b, a, c, b, a, d, b]), np.array([c])
        for drawn in (*rng.integers(20, size=(2, 20)), *rng.choice(others, (2, 20)), *by_hand):
            of = [labels[k] for k in drawn], [detections[k] for k in drawn]
            draw, full = K.draw_frames(work, drawn), K.evaluate(*of)
            assert_same(K.curves_of(draw), K.curves(*of), 0, (seed, drawn))
            for classes, metric in product((K.CLASSES, ("Cyclist", "Car")), ("3d", "bev")):
                part = {"strict": {name: full["strict"][name] for name in classes}}
                assert K.moderate_map(K.moderate(draw, classes), metric) == K.moderate_map(part, metric), (seed, drawn)
            scores.add(K.moderate_map(full))
    assert len(scores) > 6  # no two draws with something found are alike


# ---- errors, and what people read


@pytest.mark.parametrize("change, message", [
    (lambda gt, dt: ([], [], {}), "at least one frame"),
    (lambda gt, dt: (gt, dt[:1], {}), "2 frames of labels and 1 of detections"),
    (lambda gt, dt: (gt, dt, {"classes": ("Car", "Pedestrain")}), "did you mean Pedestrian"),
    (lambda gt, dt: (gt, dt, {"classes": ()}), "at least one class"),
    (lambda gt, dt: (gt, [dt[0], replace(dt[1], score=np.array([np.nan]))], {}), "frame 1 of 2: .* finite score"),
])  # fmt: skip
def test_bad_input(change, message):
    gt, dt = [objects({}, scored=False)] * 2, [objects({}, scored=True)] * 2
    labels, detections, options = change(gt, dt)
    with pytest.raises(InputError, match=message):
        K.evaluate(labels, detections, **options)


def test_moderate_map():
    result = K.evaluate([objects({}, {"type": "Cyclist"}, scored=False)] * 41, [objects({}, scored=True)] * 41)
    assert K.moderate_map(result) == pytest.approx(100 / 3)  # the classes that were not detected count 0
    result["strict"]["Cyclist"]["AP_R11"]["bev"] = {"easy": 1, "moderate": 50, "hard": 2}
    assert K.moderate_map(result, "bev", "AP_R11") == pytest.approx(50)


def test_the_table_names_every_number():
    labels, detections = crowded(5, frames=60)
    detections = [d[d.type != "Cyclist"] for d in detections]
    result = K.evaluate(labels, detections)
    text = K.format_table(result, K.count_labels(labels))
    strict, loose = text.split("loose: ")
    for table, part in (("strict", strict), ("loose", loose)):
        for name in ("Car", "Pedestrian"):
            for i, metric in enumerate(K.METRICS):
                aps = result[table][name]
                numbers = [f"{aps[which][metric][level]:.4f}" for which in ("AP_R40", "AP_R11") for level in K.LEVELS]
                row = [name, metric, "overlap", ">", f"{K.LIMITS[table][name][i % 3]:.2f}", *numbers]
                assert row in [line.split() for line in part.splitlines()], row
        assert "Cyclist     no result: never detected" in part
        assert "AP_R40" in part and "AP_R11" in part and "moderate" in part
    counts = K.count_labels(labels)["Car"]
    assert ["Car", "labels", "that", "count", *map(str, counts.values())] in [line.split() for line in text.splitlines()]
    assert ("Fewer than 41" in text) == any(0 < n < 41 for c in K.count_labels(labels).values() for n in c.values())
