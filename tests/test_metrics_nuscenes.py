"""metrics/nuscenes.py against the official evaluator's stored results, a slow readable twin, and rules by hand."""

import json
import math
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import evaluate
from cli import InputError
from metrics import nuscenes as N
from tests.scenes import assert_same

ROOT = Path(__file__).resolve().parents[1]
EDGE = ("class_absent class_never_predicted large_errors low_recall no_velocity one_sample one_sample_predicted "
        "score_ties zero_scores").split()  # fmt: skip
KEYS = "label_aps mean_dist_aps mean_ap label_tp_errors tp_errors tp_scores nd_score".split()
NAN = math.nan


# ---- the official evaluator's own numbers


def arguments(folder: Path) -> list[str]:
    split = json.loads((folder / "split.json").read_text())
    return ["--root", str(folder), "--version", split["version"], "--split", split["split"],
            "--results", str(folder / "results.json")]  # fmt: skip


@pytest.mark.parametrize("name", ["main", *EDGE])
def test_the_official_evaluators_numbers(golden, tmp_path, capsys, name):
    folder = golden / "nuscenes_eval"
    folder = folder if name == "main" else folder / "edge" / name
    expected = json.loads((folder / "expected.json").read_text())
    evaluate.nuscenes_main([*arguments(folder), "--json", str(tmp_path / "scores.json")])
    assert_same(json.loads((tmp_path / "scores.json").read_text()), {key: expected[key] for key in KEYS}, 1e-9)
    printed = [line.replace(",", "").split() for line in capsys.readouterr().out.splitlines()]
    assert ["mAP", f"{expected['mean_ap']:.4f}", "NDS", f"{expected['nd_score']:.4f}"] in printed
    for ours, theirs in (("labels", "ground_truth"), ("predictions", "predictions")):  # after each filter
        line = next(line for line in printed if line[:1] == [ours])
        assert [int(word) for word in line if word.isdigit()] == list(expected["counts"]["boxes"][theirs].values())


def test_all_stored_cases_are_tested(golden):
    assert sorted(path.name for path in (golden / "nuscenes_eval" / "edge").iterdir()) == EDGE


def test_the_official_evaluators_curves(golden, monkeypatch):
    from data.nuscenes_tables import Tables

    folder, kept = golden / "nuscenes_eval", []
    summary = N.summary
    monkeypatch.setattr(N, "summary", lambda found: kept.append(found) or summary(found))
    tables = Tables(folder, "v1.0-mini")
    N.evaluate(tables, tables.split("mini_val"), folder / "results.json")
    for key, official in json.loads((folder / "curves.json").read_text())["curves"].items():
        name, limit = key.split(":")
        for what, values in official.items():
            expected = np.array([NAN if value is None else value for value in values])
            assert kept[0][name][limit][what] == pytest.approx(expected, abs=1e-6, nan_ok=True), (key, what)  # stored with 7


def test_the_real_key_frame_and_its_labels_as_results(tmp_path):
    """Perfect boxes; but in a single key frame no velocity is known: that error is 1, and NDS stays below 1."""
    from data.nuscenes_tables import Tables

    root = ROOT.parent / "shared" / "real" / "nuscenes"
    if not root.is_dir():
        pytest.skip("needs real/nuscenes in a folder `shared` beside the repository (not part of it)")
    tables = Tables(root, "v1.0-mini")
    (token,) = samples = tables.split("all")
    boxes = [box(a.name, a.translation, size=a.size, rotation=a.rotation, attribute_name=a.attribute, sample_token=token)
             for a in tables.annotations(token) if a.name and a.lidar_points + a.radar_points]  # fmt: skip
    result, _ = N.evaluate(tables, samples, write(tmp_path, {token: boxes}))
    assert result["tp_errors"]["vel_err"] == 1
    for name, aps in result["label_aps"].items():
        assert len(set(aps.values())) == 1, name
        if aps["0.5"]:
            assert aps["0.5"] == pytest.approx(1)
            errors = result["label_tp_errors"][name]
            assert [errors[e] or 0 for e in N.ERRORS[:3]] == pytest.approx([0] * 3)


# ---- samples by hand: a stand-in for the tables, boxes, a results file


class Label(NamedTuple):
    """As data.nuscenes_tables.Annotation."""

    token: str
    name: str | None
    category: str
    attribute: str
    translation: tuple
    size: tuple
    rotation: tuple
    velocity: tuple
    lidar_points: int
    radar_points: int


class Tables:
    """Samples s0, s1, .. with these labels and racks; the vehicle stands at (1000, -500)."""

    root = Path("root")

    def __init__(self, *samples: list[Label]) -> None:
        self.every = {f"s{i}": sample for i, sample in enumerate(samples)}

    def annotations(self, token: str) -> list[Label]:
        return self.every[token]

    def bike_racks(self, token: str) -> list[Label]:
        return [a for a in self.every[token] if a.category == "static_object.bicycle_rack"]

    def ego_pose(self, token: str) -> tuple[np.ndarray, np.ndarray]:
        assert token in self.every
        return np.array([1000.0, -500.0, 0.0]), np.array([1.0, 0.0, 0.0, 0.0])


def at(x: float, y: float = 0.0, z: float = 0.0) -> tuple:
    """Metres from the vehicle -> global."""
    return (1000.0 + x, -500.0 + y, z)


def yaw(angle: float) -> tuple:
    return (math.cos(angle / 2), 0.0, 0.0, math.sin(angle / 2))


def label(name: str | None = "car", where: tuple = at(10), **other) -> Label:
    usual = {"token": "a0", "category": "", "attribute": "", "size": (2.0, 4.0, 1.5), "rotation": yaw(0.3),
             "velocity": (1.0, 0.0), "lidar_points": 5, "radar_points": 0}  # fmt: skip
    return Label(name=name, translation=where, **usual | other)


def box(name: str = "car", where: tuple = at(10), score: float = 0.5, **other) -> dict:
    usual = {"sample_token": "s0", "size": (2.0, 4.0, 1.5), "rotation": yaw(0.3), "velocity": (1.0, 0.0), "attribute_name": ""}
    found = {"detection_name": name, "translation": where, "detection_score": score} | usual | other
    return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}


def write(folder: Path, results: dict) -> Path:
    path = folder / "results.json"
    path.write_text(json.dumps({"meta": {"use_lidar": True}, "results": results}))
    return path


def score(folder: Path, *samples: tuple[list[Label], list[dict]]) -> dict:
    results = {f"s{i}": [found | {"sample_token": f"s{i}"} for found in boxes] for i, (_, boxes) in enumerate(samples)}
    return N.evaluate(Tables(*[labels for labels, _ in samples]), list(results), write(folder, results))[0]


# ---- a slow twin, written straight from the rules: one prediction, one label at a time


def twin_curve(samples, name: str, limit: float) -> dict:
    """precision, confidence and errors at 101 recalls, of boxes that all count."""
    found = [(b["detection_score"], i, s, b) for i, (s, b) in enumerate((s, b) for s, (_, boxes) in enumerate(samples)
             for b in boxes if b["detection_name"] == name)]  # fmt: skip
    taken, rows = set(), []
    for confidence, _, s, b in sorted(found, key=lambda row: row[:2], reverse=True):
        free = [(math.dist(a.translation[:2], b["translation"][:2]), k) for k, a in enumerate(samples[s][0])
                if a.name == name and (s, k) not in taken]  # fmt: skip
        distance, k = min(free, default=(math.inf, -1))
        if distance < limit:
            taken.add((s, k))
        rows.append((confidence, (samples[s][0][k], b) if distance < limit else None))
    labels = sum(a.name == name for annotations, _ in samples for a in annotations)
    if not taken:
        return {"precision": np.zeros(101), "confidence": np.zeros(101)} | dict.fromkeys(N.ERRORS, np.ones(101))
    hits = np.cumsum([match is not None for _, match in rows])
    recall, precision = hits / labels, hits / np.arange(1, len(rows) + 1)
    curve = {"precision": np.interp(N.RECALL, recall, precision, right=0),
             "confidence": np.interp(N.RECALL, recall, [row[0] for row in rows], right=0)}  # fmt: skip
    matches = [(confidence, *match) for confidence, match in rows if match]
    for error in N.ERRORS:
        known, means = [], []
        for _, a, b in matches:
            value = twin_error(error, a, b, name)
            known += [] if math.isnan(value) else [value]
            means.append(sum(known) / len(known) if known else 0)
        means = means if known else [1] * len(means)
        curve[error] = np.interp(curve["confidence"][::-1], [m[0] for m in matches][::-1], means[::-1])[::-1]
    return curve


def twin_error(error: str, a: Label, b: dict, name: str) -> float:
    if error == "trans_err":
        return math.dist(a.translation[:2], b["translation"][:2])
    if error == "scale_err":
        smaller = math.prod(map(min, a.size, b["size"]))
        return 1 - smaller / (math.prod(a.size) + math.prod(b["size"]) - smaller)
    if error == "vel_err":
        return math.dist(a.velocity, b["velocity"])
    if error == "attr_err":
        return float(a.attribute != b["attribute_name"]) if a.attribute else NAN
    headings = [2 * math.atan2(q[3], q[0]) for q in (a.rotation, b["rotation"])]  # these turn about z only
    period = math.pi if name == "barrier" else 2 * math.pi
    return abs(math.remainder(headings[0] - headings[1], period))


def crowded(seed: int, samples: int = 4) -> list[tuple[list[Label], list[dict]]]:
    """Places on a grid of 0.25 m, so that distances tie and lie on the limits; scores in steps of 0.1."""
    rng = np.random.default_rng(seed)
    names, attributes = ("car", "barrier", "pedestrian"), ("", "vehicle.moving", "vehicle.parked")
    result = []
    for _ in range(samples):
        def place() -> tuple:
            return at(*(rng.integers(-16, 17, 2) / 4).tolist())

        def common() -> dict:
            velocity = tuple(rng.normal(0, 1, 2).tolist())
            return {"size": tuple(rng.uniform(1, 3, 3).tolist()), "rotation": yaw(rng.uniform(-6, 6)), "velocity": velocity}

        labels = [label(str(rng.choice(names)), place(), attribute=str(rng.choice(attributes)), **common())
                  for _ in range(rng.integers(0, 20))]  # fmt: skip
        labels = [a._replace(velocity=(NAN, NAN)) if rng.random() < 0.2 else a for a in labels]
        boxes = [box(str(rng.choice(names)), place(), float(rng.integers(0, 11) / 10),
                     attribute_name=str(rng.choice(attributes)), **common()) for _ in range(rng.integers(0, 60))]  # fmt: skip
        result.append((labels, boxes))
    return result


@pytest.mark.parametrize("seed", range(6))
def test_a_slow_twin_agrees_in_a_crowd(tmp_path, monkeypatch, seed):
    samples, kept, summary = crowded(seed), [], N.summary
    monkeypatch.setattr(N, "summary", lambda found: kept.append(found) or summary(found))
    score(tmp_path, *samples)
    points = []
    for name in N.CLASSES:
        for limit in N.LIMITS:
            expected = twin_curve(samples, name, limit)
            for what, values in kept[0][name][str(limit)].items():
                assert values == pytest.approx(expected[what], abs=1e-12), (name, limit, what)
            points += expected["precision"].tolist()
    assert sum(0 < point < 1 for point in points) > 100  # many, and not trivial ones


# ---- rules by hand


def test_perfect_predictions(tmp_path):
    kinds = {name: "" if "err" in "".join(N.UNDEFINED.get(name, "")) else "vehicle.moving" for name in N.CLASSES}
    samples = [([label(name, at(3 * k), attribute=a) for k, (name, a) in enumerate(kinds.items())],
                [box(name, at(3 * k), attribute_name=a) for k, (name, a) in enumerate(kinds.items())])]  # fmt: skip
    result = score(tmp_path, *samples)
    assert result["mean_ap"] == pytest.approx(1) and result["nd_score"] == pytest.approx(1)
    assert result["label_tp_errors"]["traffic_cone"] == {"trans_err": 0, "scale_err": 0} | dict.fromkeys(N.ERRORS[2:])
    assert [result["label_tp_errors"]["barrier"][e] for e in ("vel_err", "attr_err")] == [None, None]
    assert result["label_tp_errors"]["barrier"]["orient_err"] == 0
    json.dumps(result, allow_nan=False)


def test_a_class_without_labels_or_matches_has_ap_0_and_errors_1(tmp_path):
    result = score(tmp_path, ([label()], [box(), box("bus"), box("barrier")]))
    assert result["mean_dist_aps"]["car"] == pytest.approx(1) and result["mean_ap"] == pytest.approx(0.1)
    assert result["label_tp_errors"]["bus"] == dict.fromkeys(N.ERRORS, 1)
    assert result["tp_errors"]["trans_err"] == pytest.approx(0.9)


# AP of one hit and then one miss, for two labels: precision 1 up to recall 0.49, and 0.5 at recall 0.5.
HALF = (39 * 0.9 + 0.4) / 90 / 0.9
# First the miss: precision rises from 0 to 0.5 as recall does.
MISS_FIRST = sum(recall / 100 - 0.1 for recall in range(11, 51)) / 90 / 0.9


def car_aps(result: dict) -> list[float]:
    return list(result["label_aps"]["car"].values())


@pytest.mark.parametrize("distance, hits", [(0.49, 4), (0.5, 3), (1.0, 2), (2.0, 1), (3.99, 1), (4.0, 0)])
def test_distances_must_be_below_the_limit(tmp_path, distance, hits):
    aps = car_aps(score(tmp_path, ([label()], [box(where=at(10, distance, z=9.0))])))  # height does not matter
    assert aps == pytest.approx([0] * (4 - hits) + [1] * hits)


def test_nearest_free_label(tmp_path):
    """The first takes the nearer label, though the second has no other within the limit."""
    labels = [label(where=at(10)), label(where=at(13.1))]
    result = score(tmp_path, (labels, [box(where=at(11.2), score=0.9), box(where=at(9), score=0.8)]))
    ap = car_aps(result)
    assert result["label_tp_errors"]["car"]["trans_err"] == pytest.approx(1.2)
    assert ap[:2] == [0, 0] and ap[2:] == pytest.approx([HALF] * 2)
    labels[1] = label(where=at(12.5))  # within 4 m of the second: both hit
    assert car_aps(score(tmp_path, (labels, [box(where=at(11.2)), box(where=at(9), score=0.4)])))[3] == pytest.approx(1)


def test_of_equal_scores_the_later_in_the_file_comes_first(tmp_path):
    near, far = box(where=at(10.1)), box(where=at(10.4))
    errors = [score(tmp_path, ([label()], boxes))["label_tp_errors"]["car"]["trans_err"] for boxes in ([near, far], [far, near])]
    assert errors == pytest.approx([0.4, 0.1])
    # Also over samples, whose order is that of the file, not of the split.
    tables, hit, miss = Tables([label()], [label()]), box(), box(where=at(30), sample_token="s1")
    for results, ap in (({"s0": [hit], "s1": [miss]}, MISS_FIRST), ({"s1": [miss], "s0": [hit]}, HALF)):
        assert car_aps(N.evaluate(tables, ["s0", "s1"], write(tmp_path, results))[0]) == pytest.approx([ap] * 4)


@pytest.mark.parametrize("name", N.CLASSES)
def test_range_of_each_class(tmp_path, name):
    limit = N.RANGE[name]
    for distance, counts in ((limit, False), (limit - 1e-6, True)):
        place = at(distance * 0.6, distance * 0.8, 70.0)  # height does not matter
        result = score(tmp_path, ([label(name, place)], [box(name, place)]))
        assert (result["mean_dist_aps"][name] > 0) == counts
    result = score(tmp_path, ([label(name)], [box(name, score=0.1), *[box(name, at(limit), 0.9)] * 9]))
    assert result["mean_dist_aps"][name] == pytest.approx(1)  # predictions out of range are no false positives


def test_labels_without_points_are_left_out_predictions_never(tmp_path):
    for lidar, radar, counts in ((0, 0, False), (0, 1, True), (1, 0, True)):
        aps = car_aps(score(tmp_path, ([label(lidar_points=lidar, radar_points=radar)], [box()])))
        assert (aps[0] == pytest.approx(1)) == counts
    assert car_aps(score(tmp_path, ([label()], [box(num_pts=0)]))) == [0] * 4  # the devkit reads this field, if it is there


@pytest.mark.parametrize("name, place, inside", [
    ("bicycle", (3.9, 0, 1), True), ("motorcycle", (-3.9, 0, 1), True), ("bicycle", (4.1, 0, 1), False),
    ("bicycle", (0, 0.9, 1), True), ("bicycle", (0, 1.1, 1), False), ("bicycle", (0, 0, 2.1), False),
    ("pedestrian", (0, 0, 1), False),
])  # fmt: skip
def test_cycles_in_a_rack_are_left_out(tmp_path, name, place, inside):
    """A rack 2 m wide, 8 m long, 2 m high, turned by 0.7."""
    along, across, up = place
    where = at(10 + along * math.cos(0.7) - across * math.sin(0.7), along * math.sin(0.7) + across * math.cos(0.7), up)
    rack = label(None, at(10, 0, 1), category="static_object.bicycle_rack", size=(2.0, 8.0, 2.0), rotation=yaw(0.7))
    other = label(name, at(-10))
    free = box(name, at(-10), 0.1)
    result = score(tmp_path, ([rack, label(name, where), other], [free]))
    assert (result["mean_dist_aps"][name] == pytest.approx(1)) == inside  # the label in it is not missed
    result = score(tmp_path, ([rack, other], [free, box(name, where, 0.9)]))
    assert (result["mean_dist_aps"][name] == pytest.approx(1)) == inside  # the prediction in it is no false positive
    result = score(tmp_path, ([other], [free]), ([rack, other], []), ([other], [free, box(name, where, 0.9)]))
    assert result["mean_dist_aps"][name] < 0.9  # a rack of another sample excuses nothing


@pytest.mark.parametrize("name, turn, error", [("car", math.pi, math.pi), ("car", 3, 3), ("car", 2 * math.pi - 0.2, 0.2),
                                               ("barrier", math.pi, 0), ("barrier", 3, math.pi - 3)])  # fmt: skip
def test_orientation(tmp_path, name, turn, error):
    for factor in (1, -1, 3):  # q and -q are one rotation, the length does not matter
        rotation = tuple(factor * x for x in yaw(0.3 + turn))
        result = score(tmp_path, ([label(name)], [box(name, rotation=rotation)]))
        assert result["label_tp_errors"][name]["orient_err"] == pytest.approx(error, abs=1e-9)


def test_heading_of_a_tilted_box(tmp_path):
    """Pitched by 90 degrees less a little, the x axis still points where it did."""
    pitched = (math.cos(0.75), 0.0, math.sin(0.75), 0.0)
    result = score(tmp_path, ([label(rotation=yaw(0))], [box(rotation=pitched)]))
    assert result["label_tp_errors"]["car"]["orient_err"] == pytest.approx(0, abs=1e-12)


def test_what_is_unknown_is_left_out_and_nothing_known_is_1(tmp_path):
    def errors(labels, boxes):
        return score(tmp_path, (labels, boxes))["label_tp_errors"]["car"]

    unknown, far = label(velocity=(NAN, NAN)), label(where=at(20), attribute="vehicle.moving")
    found = [box(velocity=(3.0, 0.0)), box(where=at(20), velocity=(3.0, 0.0))]
    both = errors([unknown, far], found)
    assert both["vel_err"] == pytest.approx(2) and both["attr_err"] == pytest.approx(1)
    alone = errors([unknown], found[:1])
    assert alone["vel_err"] == 1 and alone["attr_err"] == 1
    assert errors([label()], [box(velocity=(NAN, NAN))])["vel_err"] == 1  # a prediction may leave it open too
    assert errors([label()], [box(velocity=(9.0, 0.0))])["vel_err"] == pytest.approx(8)


def test_errors_need_a_recall_above_a_tenth(tmp_path):
    for n, error in ((10, 1), (9, 0.2)):  # one of n labels found, 0.2 m off
        labels = [label(where=at(4.5 * k - 20)) for k in range(n)]
        result = score(tmp_path, (labels, [box(where=at(-20, 0.2))]))
        assert result["label_tp_errors"]["car"]["trans_err"] == pytest.approx(error)


def test_errors_above_1_score_0(tmp_path):
    result = score(tmp_path, ([label()], [box(velocity=(50.0, 0.0))]))
    assert result["tp_errors"]["vel_err"] > 1 and result["tp_scores"]["vel_err"] == 0


def test_inputs_stay_and_order_of_the_split_changes_nothing(tmp_path):
    samples = crowded(99)
    tables, results = Tables(*[labels for labels, _ in samples]), {}
    for i, (_, boxes) in enumerate(samples):
        results[f"s{i}"] = [found | {"sample_token": f"s{i}"} for found in boxes]
    path = write(tmp_path, results)
    one, other = (N.evaluate(tables, order, path)[0] for order in (list(results), list(results)[::-1]))
    assert one == other
    labels, predictions = N.read_annotations(tables.annotations, list(results)), N.read_results(path, list(results))
    before = [getattr(o, f.name).copy() for o in (labels, predictions) for f in fields(N.Boxes)]
    N.curves(labels, predictions, np.full((len(results), 2), [1000.0, -500.0]))
    after = [getattr(o, f.name) for o in (labels, predictions) for f in fields(N.Boxes)]
    assert all(np.array_equal(x, y, equal_nan=x.dtype.kind == "f") for x, y in zip(before, after))


@pytest.mark.parametrize("drawn", [[2, 0, 2], [1, 1], [4, 3, 4, 0], [3, 2, 1, 0]])
def test_drawn_samples_score_as_if_they_had_been_written_so_often(tmp_path, drawn):
    samples = [*crowded(0), ([], [])]
    results = {f"s{i}": [found | {"sample_token": f"s{i}"} for found in boxes] for i, (_, boxes) in enumerate(samples)}
    file = write(tmp_path, dict(reversed(results.items())))  # in another order than the split's
    labels, predictions, ego, _ = N.load(Tables(*[labels for labels, _ in samples]), list(results), file)
    found = N.summary(N.curves(*(N.draw_samples(boxes, np.array(drawn)) for boxes in (labels, predictions)), ego[drawn]))
    assert found == score(tmp_path, *[samples[i] for i in drawn]) != score(tmp_path, *samples)
    assert 0 < found["mean_ap"] < 1


# ---- errors, and what people read

BAD = [  # what to do to the content of the file, what the message says
    (lambda c: c.pop("meta"), r"expected \{\"meta\""),
    (lambda c: c.pop("results"), r"expected \{\"meta\""),
    (lambda c: c.update(results=[]), r"expected \{\"meta\""),
    (lambda c: c["results"].pop("s1"), r"2 samples of the split, s1 is missing"),
    (lambda c: c["results"].update(s7=[]), r"s7 is not of the split"),
    (lambda c: c["results"].update(s1={}), r"sample s1: expected a list of at most 500 boxes, found dict"),
    (lambda c: c["results"].update(s1=[box(sample_token="s1")] * 501), r"sample s1: .* at most 500 boxes, found 501"),
    (lambda c: c["results"].update(s0=[]), r"at least one box, found none in all 2 samples"),
    (lambda c: c["results"].update(s1=["car"]), r"sample s1, box 0: expected a box"),
]
BAD_BOX = [
    ({"detection_name": "cra"}, r"known detection_name \(did you mean car\?\), found 'cra'"),
    ({"detection_name": ["car"]}, r"known detection_name"),
    ({"attribute_name": "vehicle.movin"}, r"known attribute_name \(did you mean vehicle.moving\?\)"),
    ({"attribute_name": None}, r"known attribute_name"),
    ({"translation": [1.0, NAN, 2.0]}, r"finite translation"),
    ({"translation": [1.0, 2.0]}, r"3 numbers as translation"),
    ({"translation": [10**400, 0, 0]}, r"finite translation"),
    ({"size": [1.0, math.inf, 2.0]}, r"finite size"),
    ({"size": [1.0, -2.0, 2.0]}, r"size above 0"),
    ({"size": [1.0, 0, 2.0]}, r"size above 0"),
    ({"rotation": [1.0, 0, 0, "0"]}, r"4 numbers as rotation"),
    ({"rotation": None}, r"4 numbers as rotation"),
    ({"velocity": [math.inf, 0]}, r"finite velocity"),
    ({"velocity": [None, None]}, r"2 numbers as velocity"),
    ({"velocity": 3.0}, r"2 numbers as velocity"),
    ({"detection_score": NAN}, r"finite detection_score"),
    ({"detection_score": None}, r"1 number as detection_score"),
    ({"detection_score": True}, r"1 number as detection_score"),
    ({"sample_token": "s0"}, r"same token as sample_token, found 's0'"),
    ({"sample_token": None}, r"same token as sample_token"),
]


def refusal(path: Path, tables: Tables | None = None) -> str:
    with pytest.raises(InputError) as error:
        N.evaluate(tables or Tables([label()], [label()]), ["s0", "s1"], path)
    assert "\n" not in str(error.value)
    return str(error.value)


def content() -> dict:
    return {"meta": {}, "results": {"s0": [box()], "s1": [box(sample_token="s1"), box(sample_token="s1")]}}


@pytest.mark.parametrize("damage, message", BAD)
def test_bad_files(tmp_path, damage, message):
    bad = content()
    damage(bad)
    if "at least one" in message:
        bad["results"]["s1"] = []
    (tmp_path / "results.json").write_text(json.dumps(bad))
    found = refusal(tmp_path / "results.json")
    assert found.startswith(f"{tmp_path / 'results.json'}: ")
    assert re.search(message, found)


@pytest.mark.parametrize("change, message", BAD_BOX)
def test_bad_boxes_are_named(tmp_path, change, message):
    bad = content()
    bad["results"]["s1"][1].update(change)
    (tmp_path / "results.json").write_text(json.dumps(bad))
    found = refusal(tmp_path / "results.json")
    assert found.startswith(f"{tmp_path / 'results.json'}: sample s1, box 1: expected ")
    assert re.search(message, found)


@pytest.mark.parametrize("field", ["sample_token", "translation", "size", "rotation", "velocity", "detection_name",
                                   "detection_score", "attribute_name"])  # fmt: skip
def test_missing_fields_are_named(tmp_path, field):
    bad = content()
    del bad["results"]["s1"][0][field]
    (tmp_path / "results.json").write_text(json.dumps(bad))
    assert field in (found := refusal(tmp_path / "results.json")) and "sample s1, box 0" in found


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"meta": {}, "results": NaN}', "[" * 100_000, "\xff\xfe"])
def test_no_results_file_at_all(tmp_path, text):
    (tmp_path / "results.json").write_bytes(text.encode("latin-1"))
    assert "results.json: expected" in refusal(tmp_path / "results.json")
    assert "cannot be read" in refusal(tmp_path / "nothing.json")
    assert "cannot be read" in refusal(tmp_path)


def test_negative_scores(tmp_path):
    """As by the devkit: refused where a match has one, as confidence then rises to 0 where recall ends."""
    labels = [label(), label(where=at(20))]
    good, bad = box(score=0.5), box(where=at(20), score=-1)
    with pytest.raises(InputError, match="results.json: expected scores .* of 0 or more, found negative ones of car"):
        score(tmp_path, ([*labels, label(where=at(30))], [good, bad]))
    assert score(tmp_path, (labels[:1] * 3, [good, bad]))["mean_dist_aps"]["car"] > 0  # it matched nothing


def test_bad_labels(tmp_path):
    path = write(tmp_path, content()["results"])
    assert "found none" in refusal(path, Tables([], [label(None)]))
    assert "annotation a0: expected a known attribute (did" in refusal(path, Tables([label(attribute="vehicle.movin")], []))


def test_nothing_that_counts_is_no_error(tmp_path):
    result = score(tmp_path, ([label(where=at(60))], [box(where=at(60))]))
    assert result["mean_ap"] == 0 and result["nd_score"] == 0


def test_the_table_names_every_number(tmp_path):
    samples = crowded(5)
    results = {f"s{i}": [found | {"sample_token": f"s{i}"} for found in boxes] for i, (_, boxes) in enumerate(samples)}
    result, counts = N.evaluate(Tables(*[labels for labels, _ in samples]), list(results), write(tmp_path, results))
    lines = [line.split() for line in N.format_table(result, counts).splitlines()]
    for name in N.CLASSES:
        errors = result["label_tp_errors"][name].values()
        values = [*result["label_aps"][name].values(), result["mean_dist_aps"][name], *errors]
        assert [name, *("-" if value is None else f"{value:.4f}" for value in values)] in lines
    assert ["mAP", f"{result['mean_ap']:.4f}", "NDS", f"{result['nd_score']:.4f}"] in lines


@pytest.mark.parametrize("classes", [("truck", "car"), ("barrier",), ("pedestrian", "traffic_cone", "bus")])
def test_a_detector_of_fewer_classes_is_scored_over_them(tmp_path, classes):
    """Class by class nothing changes; the means are those of its classes, and an error that none of them has counts as 1."""
    samples = crowded(6)
    results = {f"s{i}": [found | {"sample_token": f"s{i}"} for found in boxes] for i, (_, boxes) in enumerate(samples)}
    of, path = Tables(*[labels for labels, _ in samples]), write(tmp_path, results)
    (every, counts), (few, counted) = N.evaluate(of, list(results), path), N.evaluate(of, list(results), path, classes)
    assert counts == counted and list(few["label_aps"]) == [name for name in N.CLASSES if name in classes]
    for key in ("label_aps", "mean_dist_aps", "label_tp_errors"):
        assert few[key] == {name: every[key][name] for name in classes}
    aps = [every["mean_dist_aps"][name] for name in classes]
    assert few["mean_ap"] == pytest.approx(sum(aps) / len(aps)) != every["mean_ap"]
    for e in N.ERRORS:
        values = [v for name in classes if (v := every["label_tp_errors"][name][e]) is not None] or [1.0]
        assert few["tp_errors"][e] == pytest.approx(sum(values) / len(values))
    assert few["nd_score"] == pytest.approx((5 * few["mean_ap"] + sum(max(0, 1 - few["tp_errors"][e]) for e in N.ERRORS)) / 10)
    assert f"({len(classes)} of nuScenes' 10 classes)" in N.format_table(few) and " classes)" not in N.format_table(every)
    nothing = N.nothing_found(classes)
    assert nothing["label_tp_errors"].keys() == few["label_tp_errors"].keys() and nothing["nd_score"] == 0


# ---- as a program


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_help_comes_without_torch():
    done = run("-X", "importtime", "evaluate.py", "nuscenes", "--help")
    assert done.returncode == 0 and "usage: evaluate.py nuscenes" in done.stdout and "--version" in done.stdout
    assert not any(name in done.stderr for name in ("torch", "numpy", "matplotlib"))


def test_an_error_is_one_line_and_status_2(tmp_path):
    words = ["--root", str(tmp_path), "--version", "v1.0-mini", "--split", "mini_val", "--results", str(tmp_path / "r.json")]
    done = run("evaluate.py", "nuscenes", *words)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and str(tmp_path) in done.stderr
