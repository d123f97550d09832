"""The simulated nuScenes: its tables by their own links, its points and boxes by hand-made worlds whose answer is known."""

import hashlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import data.simulate_nuscenes as sim
from cli import InputError
from data.nuscenes import NuScenes
from data.nuscenes_tables import SCENES, Tables
from data.scanner import HDL32E
from data.scenes import Ground
from data.shapes import BOX, PART, POST, part
from data.shapes_nuscenes import SHAPES, ego
from data.simulate_kitti import simulate_kitti
from data.simulate_nuscenes import simulate_nuscenes
from data.traffic import EGO, MAIN, STEP, Mover, World
from metrics.nuscenes import evaluate

V = "v1.0-trainval"
SMALL = dict(train=1, val=1, seed=3, sweeps=2, samples=(3, 4), progress=False)


def digest(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file() and path.name != "rdd-index.npz")
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def tables_of(root: Path) -> dict[str, list[dict]]:
    return {path.stem: json.loads(path.read_text()) for path in (root / V).glob("*.json")}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return simulate_nuscenes(tmp_path_factory.mktemp("sim") / "set", workers=1, **SMALL)


# ------------------------------------------------------------------ tables


def test_all_tables_are_there_and_every_token_leads_somewhere(small):
    tables = tables_of(small)
    assert sorted(tables) == sorted("category attribute visibility instance sensor calibrated_sensor ego_pose log scene sample "
                                    "sample_data sample_annotation map".split())  # fmt: skip
    rows = {name: {row["token"]: row for row in table} for name, table in tables.items()}
    for name, table in tables.items():
        assert len(rows[name]) == len(table) > 0, f"{name}: a token twice"
        for row in table:
            assert name == "visibility" or re.fullmatch("[0-9a-f]{32}", row["token"])
            for field, value in row.items():
                if field.endswith("_token") and field != "token":
                    other = next(t for t in sorted(tables, key=len, reverse=True) if field.removesuffix("_token").endswith(t)
                                 or (t == "sample_annotation" and "annotation" in field))  # fmt: skip
                    assert value in rows[other], (name, field)
                if field in ("prev", "next") and value:
                    back = "next" if field == "prev" else "prev"
                    assert rows[name][value][back] == row["token"]
            assert all(token in rows["attribute"] for token in row.get("attribute_tokens", ()))
    assert tables["map"][0]["log_tokens"] == [row["token"] for row in tables["log"]]
    assert (small / tables["map"][0]["filename"]).read_bytes().startswith(b"\x89PNG")


def test_scenes_are_chains_of_key_frames_with_sweeps_between(small):
    tables = tables_of(small)
    rows = {row["token"]: row for table in tables.values() for row in table}
    for scene in tables["scene"]:
        assert "simulated" in scene["description"].lower()
        token, samples = scene["first_sample_token"], []
        while token:
            samples.append(rows[token])
            token = rows[token]["next"]
        assert len(samples) == scene["nbr_samples"] and samples[-1]["token"] == scene["last_sample_token"]
        assert 3 <= len(samples) <= 4 and all(sample["scene_token"] == scene["token"] for sample in samples)
        np.testing.assert_allclose(np.diff([s["timestamp"] for s in samples]), 500_000, atol=700)
        data = [d for d in tables["sample_data"] if rows[d["sample_token"]]["scene_token"] == scene["token"]]
        assert [d["is_key_frame"] for d in data] == [True] + [False, False, True] * (len(samples) - 1)
        assert data[0]["prev"] == "" and all(b["prev"] == a["token"] for a, b in zip(data, data[1:]))
        gaps = np.diff([d["timestamp"] for d in data])
        np.testing.assert_allclose(gaps, [400_000, 50_000, 50_000] * (len(samples) - 1), atol=700)
        for d in data:
            assert d["filename"].startswith("samples/" if d["is_key_frame"] else "sweeps/")
            assert rows[d["ego_pose_token"]]["timestamp"] == d["timestamp"]
    assert len(list((small / "sweeps" / "LIDAR_TOP").iterdir())) == sum(not d["is_key_frame"] for d in tables["sample_data"])


def test_labels_of_an_object_are_one_chain(small):
    tables = tables_of(small)
    rows = {row["token"]: row for name in ("sample_annotation", "sample") for row in tables[name]}
    for instance in tables["instance"]:
        token, found = instance["first_annotation_token"], []
        assert rows[token]["prev"] == ""
        while token:
            found.append(rows[token])
            token = rows[token]["next"]
        assert len(found) == instance["nbr_annotations"] and found[-1]["token"] == instance["last_annotation_token"]
        assert all(label["instance_token"] == instance["token"] for label in found)
        samples = [rows[label["sample_token"]] for label in found]
        assert all(b["prev"] == a["token"] for a, b in zip(samples, samples[1:])), "a key frame is left out"
        assert found[0]["num_lidar_pts"] > 0 < found[-1]["num_lidar_pts"]
        assert len({tuple(label["size"]) for label in found}) == 1
    assert {label["visibility_token"] for label in tables["sample_annotation"]} == {"1", "2", "3", "4"}


def test_nothing_cancels_by_luck(small):
    tables = tables_of(small)
    for row in tables["ego_pose"]:
        assert min(np.abs(row["translation"][:2])) > 300 and max(np.abs(row["rotation"][1:3])) > 0.002
    for row in tables["calibrated_sensor"]:
        w, x, y, z = row["rotation"]
        assert abs(w + z) < 0.02 and 1e-4 < max(abs(x), abs(y)) < 0.03  # a quarter turn to the right, and a little beside it


def test_official_scene_numbers():
    train, val = sim.scene_names(0, 700), sim.scene_names(1, 150)
    assert len(set(train)) == 700 and set(val) == SCENES["val"] and not set(train) & SCENES["val"]
    assert {"scene-0001", "scene-0061", "scene-0575", "scene-1110"} <= set(train)
    assert "scene-0077" not in train  # that one is test
    with pytest.raises(InputError, match="at most 150 held-out"):
        sim.scene_names(1, 151)
    with pytest.raises(InputError, match="at most 700 training"):
        sim.scene_names(0, 701)


# ------------------------------------------------------------------ the set through our loader


def turned(q, v):
    """(n, 3) turned by the quaternion, as q v q*: no rotation matrix."""
    w, u = q[0], np.array(q[1:])
    return v + 2 * np.cross(u, np.cross(u, v) + w * v)


def test_boxes_hold_the_points_that_their_labels_say(small):
    """From the tables alone, by quaternions; and roughly through the loader, whose boxes stand upright on the sensor."""
    tables = tables_of(small)
    rows = {row["token"]: row for table in tables.values() for row in table}
    clouds = {}
    for d in tables["sample_data"]:
        if d["is_key_frame"]:
            xyz = np.fromfile(small / d["filename"], "<f4").reshape(-1, 5)[:, :3].astype(float)
            for pose in (rows[d["calibrated_sensor_token"]], rows[d["ego_pose_token"]]):
                xyz = turned(pose["rotation"], xyz) + pose["translation"]
            clouds[d["sample_token"]] = xyz
    wrong = 0
    for label in tables["sample_annotation"]:
        w, x, y, z = label["rotation"]
        local = turned((w, -x, -y, -z), clouds[label["sample_token"]] - label["translation"])
        width, length, height = label["size"]
        inside = (np.abs(local) <= np.array([length, width, height]) / 2).all(1).sum()
        assert abs(inside - label["num_lidar_pts"]) <= 1  # a point on a face, rounded
        wrong += inside != label["num_lidar_pts"]
    assert wrong <= 0.01 * len(tables["sample_annotation"])
    frames = NuScenes(small, V, "val", sweeps=1)
    found, said = [], []
    for i in range(len(frames)):
        points, labels = frames[i].points, [a for a in frames.tables.annotations(frames.ids[i]) if a.name and a.lidar_points]
        for box, label in zip(frames.boxes(i)[0], labels, strict=True):
            flat = (points[:, 0] + 1j * points[:, 1] - complex(*box[:2])) * np.exp(-1j * box[6])
            inside = (np.abs(flat.real) < box[3] / 2) & (np.abs(flat.imag) < box[4] / 2)
            found.append(int((inside & (np.abs(points[:, 2] - box[2]) < box[5] / 2)).sum()))
            said.append(label.lidar_points)
    found, said = np.array(found), np.array(said)
    assert len(said) > 20 and (np.abs(found - said) <= np.maximum(2, 0.1 * said)).mean() > 0.9


def test_perfect_results_score_one(small, tmp_path):
    frames = NuScenes(small, V, "val", sweeps=3)  # labels with points
    rng, found, present = np.random.default_rng(0), {}, set()
    for i, id in enumerate(frames.ids):
        boxes, names = frames.boxes(i)
        boxes[:, 7:] = np.nan_to_num(boxes[:, 7:])
        found[id] = boxes, rng.uniform(0.1, 1, len(boxes)), names
        present |= {name for name, box in zip(names, boxes) if np.hypot(*box[:2]) < 28}  # in the range of every class
    path = tmp_path / "results.json"
    path.write_text(json.dumps(frames.submission(found)))
    result, _ = evaluate(frames.tables, frames.ids, path)
    scores = {name: ap for name, ap in result["mean_dist_aps"].items() if name in present}
    assert len(scores) >= 4 and np.mean(list(scores.values())) > 0.99
    for error in ("trans_err", "scale_err", "orient_err", "vel_err"):
        assert result["label_tp_errors"]["car"][error] < 0.01


def test_velocities_of_the_tables_are_those_of_the_world(small):
    """Central differences over a second against the speed that the traffic had: near it unless somebody brakes or turns."""
    rng = np.random.default_rng((3, 1, 0))
    keys = int(rng.integers(3, 5))
    world = sim.make_world(rng, 10 * (keys - 1) + 1)
    tables = Tables(small, V)
    scene, now = world.scene(10), tables.split("val")[1]
    place = sim.Place(rng)
    compared = 0
    for label in tables.annotations(now):
        street = turned([place.turn[0], *-place.turn[1:]], np.array([label.translation]) - place.origin)[0]
        k = int(np.linalg.norm(scene.boxes[:, :3] - street, axis=1).argmin())
        assert np.linalg.norm(scene.boxes[k, :3] - street) < 1e-6
        if np.isfinite(label.velocity).all():
            turned_back = turned([place.turn[0], *-place.turn[1:]], np.array([[*label.velocity, 0.0]]))[0]
            assert np.hypot(*(turned_back[:2] - scene.velocity[k])) < 0.25 + 0.2 * np.hypot(*scene.velocity[k])
            compared += np.hypot(*scene.velocity[k]) > 1
    assert compared >= 5


# ------------------------------------------------------------------ hand-made worlds


class Line:
    """A path for movers whose track is given."""


def mover(name: str, size, parts) -> Mover:
    return Mover(name, Line(), 0.0, 0.0, MAIN, size, np.array(parts, PART))


def hand_made(steps: int, still: list[tuple], cars: list[tuple[float, float, float]], ego_speed: float = 0.0) -> World:
    """A flat plane with parts that stand and cars (x, y at the start, speed along x); the ego starts at the origin."""
    movers = [mover("ego", EGO, ego())]
    size, rng = (4.6, 1.9, 1.7), np.random.default_rng(0)
    movers += [mover("vehicle.car", size, SHAPES["vehicle.car"](*size, rng)) for _ in cars]
    starts = np.array([(0.0, 0.0, ego_speed), *cars])
    time = STEP * np.arange(steps)[:, None]
    track = np.stack([starts[:, 0] + starts[:, 2] * time, starts[:, 1] + 0 * time, 0 * time + 0 * starts[:, 0],
                      starts[:, 2] + 0 * time], axis=-1)  # fmt: skip
    return World(Ground(height=0.0), np.array(still, PART).reshape(-1), np.zeros((0, 7)), (), movers, track)


@pytest.fixture
def written(tmp_path, monkeypatch):
    def write(world_of, sweeps: int, keys: int) -> Path:
        monkeypatch.setattr(sim, "make_world", lambda _rng, steps: world_of(steps))
        return simulate_nuscenes(tmp_path / "hand", 0, 1, 0, 1, sweeps, (keys, keys), progress=False)

    return write


def test_sweeps_fall_onto_each_other_and_moving_cars_leave_a_trail(written):
    """The ego goes 8 m/s past a post; a car goes ahead of it at 10 m/s."""
    post = part(POST, (14, 6, 2), (0.1, 0.1, 2), "plate")
    root = written(lambda steps: hand_made(steps, [post], [(15.0, 3.0, 10.0)], 8.0), 9, 3)
    frames = NuScenes(root, V, "val", sweeps=10)
    frame = frames[2]  # at 1 s the ego is at 8 m, the car at 25 m; the post 6 m ahead of the vehicle's middle, 6 m left
    assert sorted({round(float(lag), 2) for lag in frame.points[:, 4]}) == pytest.approx(np.arange(10) * 0.05, abs=0.011)
    # the sensor's frame: x right, y forward; it stands 0.41 m behind the vehicle's middle
    near = np.hypot(frame.points[:, 0] + 6, frame.points[:, 1] - 6.41) < 0.8
    post = frame.points[near & (frame.points[:, 2] > -1.2)]
    assert len(np.unique(post[:, 4])) == 10, "the post is not in every sweep"
    away = np.hypot(post[:, 0] + 6, post[:, 1] - 6.41)
    assert away.max() < 0.35, "the sweeps lie beside each other"  # noise and the mounting: a few cm
    centres = np.array([np.median(post[post[:, 4] == lag, :2], axis=0) for lag in np.unique(post[:, 4])])
    assert np.abs(centres - centres[0]).max() < 0.08
    (box,), names = frames.boxes(2)
    assert names == ("car",) and np.hypot(*box[7:9]) == pytest.approx(10, rel=0.01)
    for lag in np.unique(frame.points[:, 4]):
        at = frame.points[(frame.points[:, 4] == lag) & (frame.points[:, 2] > -1.4)]
        car = at[(np.abs(at[:, 0] + 3) < 1.5) & (at[:, 1] > 10)]
        back = car[:, 1].min() - (box[1] - box[3] / 2)  # the rear, which is what the scanner sees
        assert len(car) > 5 and back == pytest.approx(-10 * lag, abs=0.35)


def test_a_hidden_object_stays_labelled_until_it_was_seen_last(written):
    """A car passes behind a wall: seen, hidden, seen."""
    wall = part(BOX, (0, 8, 2.0), (4.5, 0.2, 2.5), "stone", reflectance=0.5)
    root = written(lambda steps: hand_made(steps, [wall], [(-20.0, 14.0, 10.0)]), 0, 9)
    labels = tables_of(root)["sample_annotation"]
    assert len(labels) == 9 and len({label["instance_token"] for label in labels}) == 1
    points, levels = [label["num_lidar_pts"] for label in labels], [label["visibility_token"] for label in labels]
    assert points[4] == 0 and levels[4] == "1"  # at x = 0, right behind it
    assert min(points[:2]) > 20 < min(points[-2:]) and levels[0] == "4"
    moving = next(row["token"] for row in tables_of(root)["attribute"] if row["name"] == "vehicle.moving")
    assert all(label["attribute_tokens"] == [moving] for label in labels)


def test_the_file_runs_through_the_firings_clockwise(written):
    root = written(lambda steps: hand_made(steps, [], [(15.0, 3.0, 0.0)], 10.0), 0, 2)
    for path in (root / "samples" / "LIDAR_TOP").iterdir():
        points = np.fromfile(path, "<f4").reshape(-1, 32, 5)
        assert points.shape == (1084, 32, 5) and np.isfinite(points).all()
        assert (points[..., 4] == np.arange(32)).all()
        assert points[..., 3].min() >= 0 and points[..., 3].max() <= 255 and (points[..., 3] == np.round(points[..., 3])).all()
        ring = points[:, 12]  # meets the ground all around, over the vehicle's own edges
        azimuth = np.degrees(np.unwrap(np.arctan2(ring[:, 1], ring[:, 0])))[np.hypot(ring[:, 0], ring[:, 1]) > 3]
        assert (np.diff(azimuth) < 0).all() and azimuth[0] - azimuth[-1] == pytest.approx(360, abs=8)
        elevation = np.degrees(np.arcsin(ring[:, 2] / np.linalg.norm(ring[:, :3], axis=1)))
        assert np.median(elevation) == pytest.approx(HDL32E.elevations[31 - 12], abs=0.2)
        silent = points[:, 31]  # the highest beam meets the car at most
        silent = silent[np.hypot(silent[:, 0], silent[:, 1]) < 1]
        assert len(silent) > 900 and (silent[:, [0, 2]] == 0).all()
        assert silent[0, 1] == pytest.approx(-0.5, abs=0.01) and abs(silent[-1, 1]) < 0.01  # 10 m/s, a twentieth of a second


def test_a_street_without_objects_has_empty_tables(written):
    root = written(lambda steps: hand_made(steps, [part(BOX, (9, 0, 1), (1, 1, 1), "stone")], []), 0, 1)
    tables = tables_of(root)
    assert tables["instance"] == tables["sample_annotation"] == [] and len(tables["sample"]) == 1
    (frame,) = [NuScenes(root, V, "val", sweeps=1)[0]]
    assert frame.boxes.shape == (0, 9) and len(frame.points) == 34_688


def test_poses_follow_the_ground():
    """On a slope of 5 % along and 3 % across: nose up, right side down, and wheels on the ground."""
    world = hand_made(1, [], [])
    world.ground = Ground(height=0.0, slope=(0.05, 0.03))
    xyz, turn = sim.vehicle_pose(world, 0)
    assert xyz[2] == pytest.approx(0.05 * xyz[0] + 0.03 * xyz[1], abs=1e-6)
    ahead, left = turned(turn, np.array([[1.0, 0, 0], [0, 1.0, 0]]))
    assert ahead[2] / ahead[0] == pytest.approx(0.05, abs=0.006) and left[2] / left[1] == pytest.approx(0.03, abs=0.006)


@pytest.mark.parametrize(
    "name, speed, movable, expected",
    [("vehicle.car", 3.0, True, "vehicle.moving"), ("vehicle.car", 0.0, True, "vehicle.stopped"),
     ("vehicle.bus.rigid", 0.0, False, "vehicle.parked"), ("vehicle.bicycle", 0.0, False, "cycle.without_rider"),
     ("with_rider.vehicle.motorcycle", 0.0, True, "cycle.with_rider"), ("human.pedestrian.child", 1.0, True, "pedestrian.moving"),
     ("human.pedestrian.adult", 0.0, False, "pedestrian.standing"), ("movable_object.barrier", 0.0, False, ""),
     ("sitting.human.pedestrian.adult", 0.0, False, "pedestrian.sitting_lying_down"),
     ("static_object.bicycle_rack", 0.0, False, "")])  # fmt: skip
def test_attributes(name, speed, movable, expected):
    assert sim.attribute(name, speed, movable) == expected
    assert expected == "" or expected in sim.ATTRIBUTES


def test_every_kind_has_an_official_category():
    for name in SHAPES:
        assert name.removeprefix("with_rider.").removeprefix("sitting.") in sim.CATEGORIES
    assert len(sim.CATEGORIES) == 23 and len(sim.ATTRIBUTES) == 8


# ------------------------------------------------------------------ the set on the disk


def test_set_does_not_depend_on_workers_or_interruptions(small, tmp_path, monkeypatch):
    expected = digest(small)
    assert digest(simulate_nuscenes(tmp_path / "two", workers=2, **SMALL)) == expected

    calls = []

    def interrupted(path, content, real=sim.write_bytes):
        calls.append(path)
        if len(calls) == 13:  # in the middle of the second scene
            path.with_name(path.name + ".1.tmp").write_bytes(content[:100])
            raise KeyboardInterrupt
        real(path, content)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(sim, "write_bytes", interrupted)
        simulate_nuscenes(tmp_path / "cut", workers=1, **SMALL)
    assert len(list((tmp_path / "cut" / "parts").iterdir())) == 1 and not list((tmp_path / "cut" / V).iterdir())
    made = []
    with monkeypatch.context() as patched:
        patched.setattr(sim, "write_scene", lambda task, real=sim.write_scene: (made.append(task[1]), real(task)))
        simulate_nuscenes(tmp_path / "cut", workers=1, **SMALL)
    assert made == ["scene-0003"], "what was complete is made again"
    assert digest(tmp_path / "cut") == expected  # and no temporary files are left

    lost = next((tmp_path / "cut" / "sweeps" / "LIDAR_TOP").iterdir())
    lost.unlink()
    simulate_nuscenes(tmp_path / "cut", workers=1, **SMALL)
    assert digest(tmp_path / "cut") == expected
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut" / V).iterdir()}
    simulate_nuscenes(tmp_path / "cut", workers=1, **SMALL)  # nothing to do: the tables, and a cache of them, stay
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cut" / V).iterdir()} == times


def test_other_settings_folders_and_numbers_are_refused(small, tmp_path):
    before = digest(small)
    with pytest.raises(InputError, match=r"other settings: seed 3 \(asked for: 4\)"):
        simulate_nuscenes(small, workers=1, **SMALL | {"seed": 4})
    with pytest.raises(InputError, match="sweeps 2"):
        simulate_nuscenes(small, workers=1, **SMALL | {"sweeps": 9})
    with pytest.raises(InputError, match="other settings"):
        simulate_kitti(small, 1, 1, progress=False)
    assert digest(small) == before
    simulate_kitti(tmp_path / "kitti", 1, 0, workers=1, progress=False)
    with pytest.raises(InputError, match=r"layout None \(asked for: 'nuscenes'\)"):
        simulate_nuscenes(tmp_path / "kitti", 1, 1, progress=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(InputError, match="empty or new folder"):
        simulate_nuscenes(tmp_path / "other", 1, 1, progress=False)
    with pytest.raises(InputError, match="file/new: expected a folder to write a set in, found: "):
        simulate_nuscenes(tmp_path / "other" / "file" / "new", 1, 1, progress=False)
    for wrong in ({"train": 0, "val": 0}, {"seed": -1}, {"sweeps": 10}, {"samples": (5, 4)}, {"samples": (0, 4)}, {"val": 151}):
        with pytest.raises(InputError, match="expected"):
            simulate_nuscenes(tmp_path / "none", workers=1, **SMALL | wrong)
    assert not (tmp_path / "none").exists()


def test_other_seeds_and_splits_are_other_worlds():
    worlds = [sim.make_world(np.random.default_rng(which), 2) for which in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))]
    assert len({world.parts.tobytes() for world in worlds}) == 4


def test_comparison_with_a_real_key_frame(small, real_nuscenes, capsys, tmp_path):
    """Coarse on purpose: it fails when scanner or streets drift away from the sensor, not from chance."""
    from data.resemblance import compare_main, nuscenes_rows

    compare_main(["--root", str(small), "--real", str(real_nuscenes)])
    assert capsys.readouterr().out.count("|") > 100
    ours, theirs = nuscenes_rows(small), nuscenes_rows(real_nuscenes)
    assert theirs["points and silent rays of a turn"] == ours["points and silent rays of a turn"] == "34688"
    for name, limit in (("of beams at -20.5 .. -10 degrees", 0.15), ("of beams at -10 .. 0.6 degrees", 0.25),
                        ("of beams at 0.6 .. 11 degrees", 0.5), ("intensity, 50th percentile", 0.5)):  # fmt: skip
        assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=limit), name
    with pytest.raises(InputError, match="neither"):
        nuscenes_rows(tmp_path)
    with pytest.raises(InputError, match="expected a simulated KITTI root for a picture"):
        compare_main(["--root", str(small), "--real", str(real_nuscenes), "--out", str(tmp_path / "x.png")])


def test_command_line(tmp_path):
    root = Path(__file__).resolve().parents[1]

    def command(*words: str) -> subprocess.CompletedProcess:
        line = [sys.executable, "-m", "data.simulate", "nuscenes", *words]
        return subprocess.run(line, cwd=root, capture_output=True, text=True, timeout=120)

    out = str(tmp_path / "set")
    done = command("--out", out, "--train", "0", "--val", "1", "--workers", "1", "--samples", "1", "1")
    assert done.returncode == 0, done.stderr
    assert "0 training and 1 held-out scenes" in done.stdout and "simulating" in done.stderr
    wrong = command("--out", out, "--sweps", "3")
    assert wrong.returncode == 2 and "did you mean --sweeps" in wrong.stderr and "Traceback" not in wrong.stderr
    assert math.isclose(len(Tables(out, V).split("val")), 1)
