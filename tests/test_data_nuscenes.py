"""nuScenes' tables and loader against plain loops, golden tables, a real key frame, and what users get wrong."""

import json
import math
import os
import shutil

import numpy as np
import pytest
import torch

import data.nuscenes_tables as tables_module
from boxes import points_in_boxes, wrap_angle
from cli import InputError, run_cli
from data.nuscenes import (
    NuScenes,
    balanced_indices,
    boxes_to_global,
    boxes_to_lidar,
    main,
    move,
    quaternion_product,
    rotation_matrix,
)
from data.nuscenes_tables import CACHE, CLASS_OF, SCENES, Annotation, Scan, Tables

VERSION = "v1.0-mini"


# ------------------------------------------------------------------ oracles: quaternions written out, one vector at a time


def hamilton(p, q):
    a, b, c, d = p
    w, x, y, z = q
    return (a * w - b * x - c * y - d * z, a * x + b * w + c * z - d * y, a * y - b * z + c * w + d * x,
            a * z + b * y - c * x + d * w)  # fmt: skip


def unit(q):
    n = math.sqrt(sum(v * v for v in q))
    return tuple(v / n for v in q)


def turn(q, v):
    q = unit(q)
    return hamilton(hamilton(q, (0, *v)), (q[0], -q[1], -q[2], -q[3]))[1:]


def turn_back(q, v):
    return turn((q[0], -q[1], -q[2], -q[3]), v)


def to_global(v, sensor, ego):
    """A point of the sensor's frame; sensor and ego are records with translation and rotation."""
    for pose in (sensor, ego):
        v = [a + b for a, b in zip(turn(pose["rotation"], v), pose["translation"])]
    return v


def to_sensor(v, sensor, ego):
    for pose in (ego, sensor):
        v = turn_back(pose["rotation"], [a - b for a, b in zip(v, pose["translation"])])
    return v


def plain_velocity(label, labels, samples):
    """From the definition, over the JSON's links."""
    before, after = labels.get(label["prev"]), labels.get(label["next"])
    if not before and not after:
        return math.nan, math.nan
    first, last = before or label, after or label
    gap = 1e-6 * samples[last["sample_token"]]["timestamp"] - 1e-6 * samples[first["sample_token"]]["timestamp"]
    if gap > (3 if before and after else 1.5):
        return math.nan, math.nan
    return tuple((last["translation"][k] - first["translation"][k]) / gap for k in (0, 1))


# ------------------------------------------------------------------ a tiny root

GAPS = {"scene-0103": [0, 0.5, 1.0, 2.6, 3.0], "scene-0061": [0, 0.55]}  # s, the key frames; between two, two sweeps


def random_pose(rng, spread):
    tilt = rng.uniform(-0.03, 0.03, 2)
    yaw = rng.uniform(-3, 3) / 2
    rotation = unit(hamilton((math.cos(yaw), 0, 0, math.sin(yaw)), (1, *tilt, 0)))
    return {"translation": rng.uniform(-spread, spread, 3).tolist(), "rotation": list(rotation)}


def synthetic_tables(rng) -> dict[str, list[dict]]:
    """Two scenes of linked samples, scans of LIDAR_TOP and one camera, three objects (one leaves and comes back)."""
    t = {name: [] for name in (*tables_module.TABLES, "log", "map", "visibility")}
    t["sensor"] = [dict(token="s-lidar", channel="LIDAR_TOP", modality="lidar"),
                   dict(token="s-cam", channel="CAM_FRONT", modality="camera")]  # fmt: skip
    names = ("vehicle.car", "human.pedestrian.adult", "animal", "static_object.bicycle_rack", "vehicle.bus.rigid")
    t["category"] = [dict(token=f"c-{name}", name=name, description="a {brace} of it") for name in names]
    t["attribute"] = [dict(token=f"a-{name}", name=name) for name in ("vehicle.moving", "vehicle.parked")]
    for number, (scene, times) in enumerate(GAPS.items()):
        t["scene"].append(dict(token=scene[::-1], name=scene, description="with } in it"))
        for sensor in ("lidar", "cam"):
            mount = dict(token=f"m-{sensor}-{number}", sensor_token=f"s-{sensor}", **random_pose(rng, 1))
            t["calibrated_sensor"].append(mount)
        previous = dict(lidar="", cam="")
        start = 1532402927000000 + number * 10**9
        for k, time in enumerate(times):
            sample = f"sample-{number}-{k}"
            last, count = k == len(times) - 1, 3
            t["sample"].append(dict(token=sample, timestamp=start + int(time * 1e6), scene_token=scene[::-1],
                                    prev=f"sample-{number}-{k - 1}" if k else "",
                                    next="" if last else f"sample-{number}-{k + 1}"))  # fmt: skip
            step = 0 if k == 0 else (time - times[k - 1]) / count
            for sensor in ("lidar", "cam"):
                for back in range(count - 1 if k else 0, -1, -1):  # two sweeps, then the key frame
                    token = f"{sensor}-{number}-{k}-{back}"
                    kind, stamp = "sweeps" if back else "samples", start + int((time - back * step) * 1e6)
                    t["ego_pose"].append(dict(token=f"e-{token}", timestamp=stamp, **random_pose(rng, 1000)))
                    t["sample_data"].append(dict(
                        token=token, sample_token=sample, ego_pose_token=f"e-{token}", is_key_frame=back == 0,
                        calibrated_sensor_token=f"m-{sensor}-{number}", timestamp=stamp, fileformat="pcd", height=0, width=0,
                        filename=f"{kind}/{'LIDAR_TOP' if sensor == 'lidar' else 'CAM'}/{token}.pcd.bin",
                        prev=previous[sensor], next=""))  # fmt: skip
                    previous[sensor] = token
    objects = {"car": ("vehicle.car", 0, (0, 1, 2, 3, 4)), "man": ("human.pedestrian.adult", 0, (0, 2, 4)),
               "dog": ("animal", 0, (1,)), "rack": ("static_object.bicycle_rack", 0, (0, 1)),
               "bus": ("vehicle.bus.rigid", 1, (0, 1))}  # fmt: skip
    for name, (category, scene, frames) in objects.items():
        t["instance"].append(dict(token=f"i-{name}", category_token=f"c-{category}"))
        for k, frame in enumerate(frames):
            t["sample_annotation"].append(dict(
                token=f"{name}-{frame}", sample_token=f"sample-{scene}-{frame}", instance_token=f"i-{name}",
                visibility_token="", attribute_tokens=["a-vehicle.moving"] if name == "car" and k else [],
                size=rng.uniform(0.5, 5, 3).tolist(), num_lidar_pts=int(k != 1) * 5, num_radar_pts=k,
                prev=f"{name}-{frames[k - 1]}" if k else "",
                next=f"{name}-{frames[k + 1]}" if k + 1 < len(frames) else "", **random_pose(rng, 1000)))  # fmt: skip
    # the real tables are in no order at all
    for name in t:
        t[name] = [t[name][i] for i in rng.permutation(len(t[name]))] if name != "sample" else t[name]
    return t


def write(root, tables, version=VERSION):
    (root / version).mkdir(parents=True, exist_ok=True)
    for name, records in tables.items():
        (root / version / f"{name}.json").write_text(json.dumps(records, indent=0))


def by_token(tables, name):
    return {record["token"]: record for record in tables[name]}


@pytest.fixture
def tables():
    return synthetic_tables(np.random.default_rng(3))


@pytest.fixture
def root(tmp_path, tables):
    rng, root = np.random.default_rng(4), tmp_path / "nuscenes"
    write(root, tables)
    for record in tables["sample_data"]:
        path = root / record["filename"]
        path.parent.mkdir(parents=True, exist_ok=True)
        if "LIDAR_TOP" in record["filename"]:
            points = rng.uniform((-3, -3, -2, 0, 0), (3, 3, 2, 255, 31), (int(rng.integers(20, 40)), 5)).astype("<f4")
            points.tofile(path)
    return root


# ------------------------------------------------------------------ tables


def test_annotations_equal_the_tables_and_velocities_their_definition(root, tables):
    found = Tables(root, VERSION)
    labels, samples, instances = (by_token(tables, name) for name in ("sample_annotation", "sample", "instance"))
    count = 0
    for sample in samples:
        wanted = [label for label in tables["sample_annotation"] if label["sample_token"] == sample]
        ours = found.annotations(sample)
        assert [a.token for a in ours] == [label["token"] for label in wanted]
        for a, label in zip(ours, wanted):
            category = instances[label["instance_token"]]["category_token"][2:]
            assert a.category == category and a.name == CLASS_OF.get(category)
            assert a.attribute == "".join(token[2:] for token in label["attribute_tokens"])
            assert a.translation == tuple(label["translation"]) and a.size == tuple(label["size"])
            assert a.rotation == tuple(label["rotation"])
            assert (a.lidar_points, a.radar_points) == (label["num_lidar_pts"], label["num_radar_pts"])
            assert np.allclose(a.velocity, plain_velocity(label, labels, samples), rtol=1e-9, equal_nan=True), a.token
            assert type(a.velocity[0]) is float and type(a.lidar_points) is int and isinstance(a, Annotation)
            count += 1
        assert found.bike_racks(sample) == [a for a in ours if a.category == "static_object.bicycle_rack"]
    assert count == len(labels) == 13
    velocity = {a.token: a.velocity for sample in samples for a in found.annotations(sample)}
    known = {token for token, (vx, _) in velocity.items() if not math.isnan(vx)}
    # key frames at 0, 0.5, 1, 2.6, 3 s. man: one-sided 1 s, two-sided 3 s, one-sided 2 s; dog: seen once
    assert known == {"car-0", "car-1", "car-2", "car-3", "car-4", "man-0", "man-2", "rack-0", "rack-1", "bus-0", "bus-1"}


@pytest.mark.parametrize("seconds, both, known", [(1.5, False, True), (1.500001, False, False), (3.0, True, True),
                                                  (3.000002, True, False), (1.6, True, True)])  # fmt: skip
def test_velocity_ends_at_the_devkits_gaps(seconds, both, known):
    time = np.array([0, seconds / 2, seconds]) if both else np.array([0, seconds, 0])
    xyz = np.array([[0.0, 0, 0], [5, 5, 5], [9, 6, 3]]) if both else np.array([[0.0, 0, 0], [9, 6, 3], [0, 0, 0]])
    row = 1
    before, after = np.full(3, -1), np.full(3, -1)
    before[row], after[row] = 0, 2 if both else -1
    found = tables_module.velocities(xyz, time, before, after)[row]
    assert np.allclose(found, np.array([9, 6, 3]) / seconds) if known else np.isnan(found).all()


def test_splits_are_the_official_ones(root, tables):
    assert {name: len(scenes) for name, scenes in SCENES.items()} == {"val": 150, "mini_train": 8, "mini_val": 2}
    assert SCENES["mini_val"] == {"scene-0103", "scene-0916"} and "scene-1073" in SCENES["val"]
    found = Tables(root, VERSION)
    assert found.split("mini_val") == [f"sample-0-{k}" for k in range(5)]
    assert found.split("mini_train") == [f"sample-1-{k}" for k in range(2)]
    assert found.split("all") == [sample["token"] for sample in tables["sample"]]
    write(root, tables, "v1.0-trainval")
    found = Tables(root, "v1.0-trainval")  # scene-0103 is of val
    assert found.split("val") == [f"sample-0-{k}" for k in range(5)]
    assert found.split("train") == [f"sample-1-{k}" for k in range(2)]
    (root / "splits.json").write_text(json.dumps({"val": ["scene-0061"], "mine": ["scene-0061", "scene-0103"]}))
    assert found.split("val") == [f"sample-1-{k}" for k in range(2)] and len(found.split("mine")) == 7
    (root / "splits.json").unlink()  # the devkit's own place: for other names than the official ones only
    (root / "v1.0-trainval" / "splits.json").write_text(json.dumps({"val": ["scene-0061"], "theirs": ["scene-0061"]}))
    assert found.split("val") == [f"sample-0-{k}" for k in range(5)]
    assert found.split("theirs") == [f"sample-1-{k}" for k in range(2)]


def test_large_tables_are_read_in_blocks_with_the_same_result(root, monkeypatch):
    whole = Tables(root, VERSION).columns
    (root / VERSION / CACHE).unlink()
    size = {name: (root / VERSION / f"{name}.json").stat().st_size for name in tables_module.TABLES}
    assert max(size["scene"], size["category"]) < 1000 < min(size["sample_data"], size["ego_pose"], size["sample_annotation"]) / 3
    monkeypatch.setattr(tables_module, "BLOCK", 1000)  # some records; scene and category have braces in their strings
    blocks = Tables(root, VERSION).columns
    assert whole.keys() == blocks.keys()
    for name, column in whole.items():
        assert column.dtype == blocks[name].dtype and column.tobytes() == blocks[name].tobytes(), name
    sound = (root / VERSION / "sample_annotation.json").read_text()
    for text in (sound[: len(sound) // 2], sound.rstrip("]\n"), sound.replace(":", "", 1), sound.replace("{", "", 1)):
        (root / VERSION / "sample_annotation.json").write_text(text)
        with pytest.raises(InputError, match="sample_annotation.json: expected a JSON list of flat records"):
            Tables(root, VERSION)


def test_index_is_cached_rebuilt_when_a_table_changes_and_not_needed(root, tables, monkeypatch):
    folder = root / VERSION
    first = Tables(root, VERSION).columns
    assert (folder / CACHE).is_file() and not list(folder.glob("*.tmp"))
    with monkeypatch.context() as m:
        m.setattr(tables_module, "_build", lambda folder: pytest.fail("the cache should serve"))
        again = Tables(root, VERSION)
    assert all(np.array_equal(again.columns[k], v, equal_nan=v.dtype.kind == "f") for k, v in first.items())

    tables["sample_annotation"][0]["num_lidar_pts"] = 77
    write(root, tables)
    token = tables["sample_annotation"][0]["sample_token"]
    assert 77 in [a.lidar_points for a in Tables(root, VERSION).annotations(token)]
    path = folder / "sample_annotation.json"
    path.write_text(path.read_text().replace("77", "66"))  # of the same size: the time tells
    os.utime(path, ns=(1, 1))
    assert 66 in [a.lidar_points for a in Tables(root, VERSION).annotations(token)]

    for broken in (b"", b"no archive", (folder / CACHE).read_bytes()[:3000]):
        (folder / CACHE).write_bytes(broken)
        assert 66 in [a.lidar_points for a in Tables(root, VERSION).annotations(token)]
    (folder / CACHE).unlink()
    folder.chmod(0o555)
    try:
        assert len(Tables(root, VERSION).samples) == 7 and not (folder / CACHE).exists()
    finally:
        folder.chmod(0o755)
    monkeypatch.setattr(np, "savez", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    assert len(Tables(root, VERSION).samples) == 7
    assert not (folder / CACHE).exists() and not list(folder.glob("*.tmp"))


def test_test_split_without_any_label(root, tables):
    write(root, tables | {"sample_annotation": [], "instance": []}, "v1.0-test")
    found = Tables(root, "v1.0-test")
    assert len(found.split("test")) == 7 and found.annotations("sample-0-1") == found.bike_racks("sample-0-1") == []
    frame = NuScenes(root, "v1.0-test", "test", sweeps=2)[0]
    assert frame.boxes.shape == (0, 9) and frame.names == () and len(frame.points)


@pytest.fixture(scope="module")
def golden_tables(golden, tmp_path_factory):
    root = tmp_path_factory.mktemp("golden")
    shutil.copytree(golden / "nuscenes_eval" / VERSION, root / VERSION, copy_function=shutil.copyfile)
    (root / VERSION).chmod(0o755)
    return Tables(root, VERSION)


def test_golden_tables_give_the_devkits_counts(golden, golden_tables):
    counts = json.loads((golden / "nuscenes_eval/expected.json").read_text())["counts"]
    config = json.loads((golden / "nuscenes_eval/expected.json").read_text())["config"]
    split = json.loads((golden / "nuscenes_eval/split.json").read_text())
    samples = golden_tables.split("mini_val")
    assert set(samples) == set(split["samples"]) and len(samples) == counts["samples"]
    kept = [(s, a) for s in samples for a in golden_tables.annotations(s) if a.name]
    wanted = counts["boxes"]["ground_truth"]
    assert len(kept) == wanted["original"]
    ego = {s: golden_tables.ego_pose(s)[0] for s in samples}
    kept = [(s, a) for s, a in kept if math.dist(a.translation[:2], ego[s][:2]) < config["class_range"][a.name]]
    assert len(kept) == wanted["after_distance"]
    kept = [(s, a) for s, a in kept if a.lidar_points + a.radar_points]
    assert len(kept) == wanted["after_points"]

    def racked(s, a):
        for rack in golden_tables.bike_racks(s):
            offset = turn_back(rack.rotation, [p - q for p, q in zip(a.translation, rack.translation)])
            width, length, height = rack.size
            if all(abs(x) <= size / 2 for x, size in zip(offset, (length, width, height))):
                return True
        return False

    kept = [(s, a) for s, a in kept if a.name not in ("bicycle", "motorcycle") or not racked(s, a)]
    assert len(kept) == wanted["after_bike_rack"]
    for name, number in counts["per_class"]["ground_truth_evaluated"].items():
        assert sum(a.name == name for _, a in kept) == number
    assert sum(math.isnan(a.velocity[0]) for _, a in kept) == counts["ground_truth_without_velocity"]
    without = [a.name for _, a in kept if not a.attribute and a.name not in ("barrier", "traffic_cone")]  # these never have one
    assert len(without) == counts["ground_truth_without_attribute"]


def test_golden_velocities_and_chains_equal_plain_loops(golden, golden_tables):
    raw = {name: {r["token"]: r for r in json.loads((golden / f"nuscenes_eval/{VERSION}/{name}.json").read_text())}
           for name in ("sample", "sample_annotation", "sample_data", "ego_pose", "calibrated_sensor", "sensor")}  # fmt: skip
    lidar = {r["sample_token"]: r for r in raw["sample_data"].values() if r["is_key_frame"] and raw["sensor"][
        raw["calibrated_sensor"][r["calibrated_sensor_token"]]["sensor_token"]]["channel"] == "LIDAR_TOP"}  # fmt: skip
    for sample in golden_tables.samples:
        for a in golden_tables.annotations(sample):
            wanted = plain_velocity(raw["sample_annotation"][a.token], raw["sample_annotation"], raw["sample"])
            assert np.allclose(a.velocity, wanted, rtol=1e-12, equal_nan=True)
        chain, record = [], lidar[sample]
        while record and len(chain) < 10:
            chain.append(record)
            record = raw["sample_data"].get(record["prev"])
        scans = golden_tables.scans(sample, 10)
        assert [(s.file, s.time) for s in scans] == [(r["filename"], r["timestamp"]) for r in chain]
        for scan, record in zip(scans, chain):
            assert scan.ego_translation.tolist() == raw["ego_pose"][record["ego_pose_token"]]["translation"]
            assert scan.sensor_rotation.tolist() == raw["calibrated_sensor"][record["calibrated_sensor_token"]]["rotation"]
        assert golden_tables.ego_pose(sample)[1].tolist() == scans[0].ego_rotation.tolist()


def edit(table, token, **fields):
    """A change of one record; None removes the field."""

    def change(root, tables):
        record = by_token(tables, table)[token]
        record.update(fields)
        for name in [name for name, value in fields.items() if value is None]:
            del record[name]
        write(root, tables)

    return change


def drop(table, token):
    def change(root, tables):
        write(root, tables | {table: [record for record in tables[table] if record["token"] != token]})

    return change


def text_of(table, text):
    return lambda root, tables: (root / VERSION / f"{table}.json").write_text(text)


BAD_TABLES = {
    "no root": (lambda root, _: root.rename(root.with_name("gone")),
                "nuscenes: expected a nuScenes root with the tables of v1.0-mini, found no such folder"),
    "another version": (lambda root, _: (root / VERSION).rename(root / "v1.0-trainval"),
                        "with the tables of v1.0-mini, found v1.0-trainval"),
    "no tables": (lambda root, _: shutil.rmtree(root / VERSION), "found no tables"),
    "tables missing": (lambda root, _: [(root / VERSION / f"{name}.json").unlink() for name in ("instance", "scene")],
                       "v1.0-mini: expected the tables of v1.0-mini, missing: scene.json, instance.json"),
    "no JSON": (text_of("sample", "[{"), "sample.json: expected a JSON list of flat records, found something else"),
    "no list": (text_of("sample", '{"a": 1}'), "sample.json: expected a JSON list of flat records"),
    "empty file": (text_of("sample_data", ""), "sample_data.json: expected a JSON list"),
    "an object": (text_of("sample_annotation", "{}"), "sample_annotation.json: expected a JSON list of flat records"),
    "no word": (edit("sample_annotation", "man-2", instance_token=7),
                "sample_annotation.json: man-2: expected a text as instance_token, found 7"),
    "no list of words": (edit("sample_annotation", "man-2", attribute_tokens="moving"),
                         "sample_annotation.json: man-2: expected a list as attribute_tokens, found moving"),
    "a field missing": (edit("sample_annotation", "man-2", num_radar_pts=None),
                        "sample_annotation.json: man-2: expected a field 'num_radar_pts', found none"),
    "a key missing": (edit("sample_data", "lidar-0-1-0", calibrated_sensor_token=None),
                      "sample_data.json: lidar-0-1-0: expected a field 'calibrated_sensor_token'"),
    "a link's end gone": (drop("sample_data", "lidar-0-2-2"),
                          "sample_data.json: lidar-0-2-1: expected prev of sample_data.json, found 'lidar-0-2-2'"),
    "no LIDAR_TOP": (edit("sample_data", "lidar-1-1-0", calibrated_sensor_token="m-cam-1"),
                     "sample_data.json: expected a key frame of LIDAR_TOP for every sample, found none for sample-1-1"),
    "no key frame": (edit("sample_data", "lidar-0-2-0", is_key_frame=False),
                     "sample_data.json: expected a key frame of LIDAR_TOP for every sample, found none for sample-0-2"),
    "no sensor of that name": (edit("sensor", "s-lidar", channel="LIDAR"), "found none for sample-0-0"),
    "zero size": (edit("sample_annotation", "car-3", size=[1.0, 0.0, 2.0]),
                  "sample_annotation.json: car-3: expected a size above 0, found [1.0, 0.0, 2.0]"),
    "a size short": (edit("sample_annotation", "dog-1", size=[1.0, 2.0]),
                     "sample_annotation.json: dog-1: expected size of 3 finite numbers, found [1.0, 2.0]"),
    "NaN": (edit("ego_pose", "e-lidar-0-1-1", translation=[0.0, math.nan, 0.0]),
            "ego_pose.json: e-lidar-0-1-1: expected translation of 3 finite numbers, found [0.0, nan, 0.0]"),
    "no number": (edit("sample", "sample-0-0", timestamp="noon"),
                  "sample.json: sample-0-0: expected timestamp of 1 finite numbers, found noon"),
    "unknown instance": (drop("instance", "i-bus"), "expected instance_token of instance.json, found 'i-bus'"),
    "unknown pose": (drop("ego_pose", "e-lidar-0-1-0"),
                     "sample_data.json: lidar-0-1-0: expected ego_pose_token of ego_pose.json, found 'e-lidar-0-1-0'"),
    "broken link": (edit("sample_annotation", "car-2", next="car-9"),
                    "sample_annotation.json: car-2: expected next of sample_annotation.json, found 'car-9'"),
    "unknown attribute": (edit("sample_annotation", "car-0", attribute_tokens=["x"]), "of attribute.json, found 'x'"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", BAD_TABLES.values(), ids=BAD_TABLES)
def test_bad_tables_are_one_line_that_names_file_and_token(root, tables, change, message):
    change(root, tables)
    with pytest.raises(InputError) as error:
        Tables(root, VERSION)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_two_attributes_are_an_error_only_where_the_evaluation_asks(root, tables):
    both = ["a-vehicle.moving", "a-vehicle.parked"]
    edit("sample_annotation", "car-1", attribute_tokens=both)(root, tables)
    edit("sample_annotation", "dog-1", attribute_tokens=both)(root, tables)
    found = Tables(root, VERSION)
    assert len(found.annotations("sample-0-0")) == 3
    with pytest.raises(InputError, match="sample_annotation.json: car-1: expected one attribute, found several"):
        found.annotations("sample-0-1")
    assert [rack.token for rack in found.bike_racks("sample-0-1")] == ["rack-1"]


@pytest.mark.parametrize("split, text, message", [
    ("vall", None, "expected a split, found 'vall' (did you mean val?)"),
    ("train", None, "split train: expected a version v1.0-trainval, found v1.0-mini"),
    ("test", None, "split test: expected a version v1.0-test"),
    ("mine", '{"mine": ["scene-9999"]}', "scene.json: expected scenes of the split mine, found others (scene-0"),
    ("mine", '["scene-9999"]', "splits.json: expected {split: [scene names]}"),
])  # fmt: skip
def test_wrong_split_is_an_input_error(root, split, text, message):
    if text:
        (root / "splits.json").write_text(text)
    with pytest.raises(InputError) as error:
        Tables(root, VERSION).split(split)
    assert message in str(error.value)


def test_unknown_sample_is_an_input_error(root):
    with pytest.raises(InputError, match="sample.json: expected a sample 'nobody', found none"):
        Tables(root, VERSION).annotations("nobody")


# ------------------------------------------------------------------ poses and boxes


def scan_of(rng, spread=1000.0):
    sensor, ego = random_pose(rng, 2), random_pose(rng, spread)
    return Scan("", 0, *(np.array(pose[name]) for pose in (sensor, ego) for name in ("translation", "rotation"))), sensor, ego


def test_quaternions_equal_the_written_out_ones():
    rng = np.random.default_rng(0)
    p, q, v = rng.normal(size=(20, 4)), rng.normal(size=(20, 4)), rng.normal(size=(20, 3))
    for i in range(20):
        assert np.allclose(rotation_matrix(q)[i] @ v[i], turn(q[i], v[i]))
        assert np.allclose(quaternion_product(p, q)[i], hamilton(p[i], q[i]))
    assert np.allclose(rotation_matrix(-q), rotation_matrix(q))
    assert np.allclose(rotation_matrix(quaternion_product(p, q)), rotation_matrix(p) @ rotation_matrix(q))


def test_move_equals_a_plain_chain_and_keeps_a_standing_object_in_place():
    rng = np.random.default_rng(1)
    (a, sensor_a, ego_a), (b, sensor_b, ego_b) = scan_of(rng), scan_of(rng)
    xyz = rng.uniform(-50, 50, (30, 3))
    plain = [to_sensor(to_global(v, sensor_a, ego_a), sensor_b, ego_b) for v in xyz.tolist()]
    assert np.allclose(move(xyz, a, b), plain, atol=1e-9)
    assert np.allclose(move(xyz, a, a), xyz, atol=1e-12)
    pole = [400.0, -300.0, 2.0]
    seen = [np.array([to_sensor(pole, sensor, ego)]) for sensor, ego in ((sensor_a, ego_a), (sensor_b, ego_b))]
    assert np.allclose(move(seen[0], a, b), seen[1], atol=1e-9)


def test_boxes_go_to_global_and_back():
    rng = np.random.default_rng(2)
    key, sensor, ego = scan_of(rng)
    boxes = np.c_[rng.uniform(-50, 50, (40, 3)), rng.uniform(0.3, 12, (40, 3)), rng.uniform(-np.pi, np.pi, 40),
                  rng.normal(0, 5, (40, 2))]  # fmt: skip
    boxes[3, 7:] = np.nan
    translation, size, rotation, velocity = boxes_to_global(boxes, key)
    for i, box in enumerate(boxes):
        assert np.allclose(translation[i], to_global(box[:3], sensor, ego), atol=1e-9)
        assert size[i].tolist() == [box[4], box[3], box[5]], "width, length, height"
        front = turn(ego["rotation"], turn(sensor["rotation"], (math.cos(box[6]), math.sin(box[6]), 0)))
        assert np.allclose(turn(rotation[i], (1, 0, 0)), front)
        moving = turn(ego["rotation"], turn(sensor["rotation"], (box[7], box[8], 0)))
        assert np.allclose(velocity[i], moving, equal_nan=True)
    assert np.allclose(np.linalg.norm(rotation, axis=1), 1)
    back = boxes_to_lidar(translation, size, rotation, velocity, key)
    assert np.allclose(back, boxes, atol=1e-9, equal_nan=True)
    # A results file holds vx and vy only: what is lost is the slope's share.
    back = boxes_to_lidar(translation, size, rotation, velocity[:, :2], key)
    assert np.allclose(back[:, :7], boxes[:, :7]) and np.nanmax(np.abs(back - boxes)) < 0.02 * np.nanmax(np.abs(boxes[:, 7:]))
    empty = boxes_to_lidar(*boxes_to_global(boxes[:0], key), key)
    assert empty.shape == (0, 9)


# ------------------------------------------------------------------ frames


def plain_points(root, tables, sample, sweeps):
    """The key frame and its sweeps by the rules, point by point."""
    data, egos, mounts = (by_token(tables, name) for name in ("sample_data", "ego_pose", "calibrated_sensor"))
    key = next(r for r in tables["sample_data"] if r["sample_token"] == sample and r["is_key_frame"] and "LIDAR" in r["filename"])
    chain = [key]
    while len(chain) < sweeps and chain[-1]["prev"]:
        chain.append(data[chain[-1]["prev"]])
    if len(chain) == 1:
        chain.append(key)
    while len(chain) < sweeps:
        chain.append(chain[-1])
    rows = []
    for i, record in enumerate(chain[:sweeps]):
        for x, y, z, intensity, _ in np.fromfile(root / record["filename"], "<f4").reshape(-1, 5).tolist():
            if i and abs(x) < 1 and abs(y) < 1:
                continue
            poses = [(mounts[r["calibrated_sensor_token"]], egos[r["ego_pose_token"]]) for r in (record, key)]
            moved = to_sensor(to_global((x, y, z), *poses[0]), *poses[1]) if i else (x, y, z)
            rows.append([*moved, intensity, 1e-6 * (key["timestamp"] - record["timestamp"])])
    return rows


@pytest.mark.parametrize("index, sweeps", [(0, 1), (0, 4), (1, 3), (1, 10), (2, 4), (4, 10)])
def test_points_are_the_key_frame_and_its_moved_sweeps(root, tables, index, sweeps):
    frame = NuScenes(root, VERSION, "mini_val", sweeps)[index]
    wanted = np.array(plain_points(root, tables, f"sample-0-{index}", sweeps))
    assert frame.points.shape == wanted.shape and frame.points.dtype == np.float32
    # poses lie 1,000 m apart here: float32 of the result, not of the way there
    assert np.allclose(frame.points, wanted, rtol=2e-7, atol=1e-6)
    assert frame.id == f"sample-0-{index}" and frame.dropped == 0
    assert (np.abs(frame.points[:, :2]) < 1).all(axis=1).any(), "the key frame keeps what is near"


def test_boxes_are_the_labels_of_the_ten_classes_that_have_points(root, tables):
    every, training = NuScenes(root, VERSION, "mini_val", 2, min_points=0), NuScenes(root, VERSION, "mini_val", 2)
    labels = by_token(tables, "sample_annotation")
    names = [(every[i].names, training[i].names, training.names(i)) for i in range(5)]
    both = {"car", "pedestrian"}
    assert [set(a) for a, _, _ in names] == [both, {"car"}, both, {"car"}, both]
    assert names[1][1] == (), "no point of the LiDAR is in car-1"
    labelled = [{"car": labels[f"car-{i}"], "pedestrian": labels.get(f"man-{i}")} for i in range(5)]
    for (a, _, c), of in zip(names, labelled):  # class balancing, as in OpenPCDet, counts what only the radar hit too
        assert c == tuple(name for name in a if of[name]["num_lidar_pts"] + of[name]["num_radar_pts"])
    assert names[1][2] == ("car",), "but one of the radar"
    assert [every.names(i) for i in range(5)] == [a for a, _, _ in names]
    assert set(names[2][1]) == {"car"}, "man-2 has no points"
    data, mounts, egos = (by_token(tables, name) for name in ("sample_data", "calibrated_sensor", "ego_pose"))
    samples = by_token(tables, "sample")
    for i in range(5):
        frame = every[i]
        record = data[f"lidar-0-{i}-0"]
        sensor, ego = mounts[record["calibrated_sensor_token"]], egos[record["ego_pose_token"]]
        assert frame.boxes.shape == (len(frame.names), 9) and frame.boxes.dtype == np.float32
        for name, box in zip(frame.names, frame.boxes):
            label = labels[f"{'car' if name == 'car' else 'man'}-{i}"]
            assert np.allclose(box[:3], to_sensor(label["translation"], sensor, ego), atol=1e-3)
            assert np.allclose(box[3:6], [label["size"][k] for k in (1, 0, 2)])
            front = turn_back(sensor["rotation"], turn_back(ego["rotation"], turn(label["rotation"], (1, 0, 0))))
            assert abs(wrap_angle(box[6] - math.atan2(front[1], front[0]))) < 1e-5
            before, after = labels.get(label["prev"], label), labels.get(label["next"], label)
            gap = 1e-6 * (samples[after["sample_token"]]["timestamp"] - samples[before["sample_token"]]["timestamp"])
            if not np.isnan(box[7]):
                moved = [(b - a) / gap for a, b in zip(before["translation"], after["translation"])]
                assert np.allclose(box[7:], turn_back(sensor["rotation"], turn_back(ego["rotation"], moved))[:2], rtol=1e-4)
    assert np.isnan(every[4].boxes[every[4].names.index("pedestrian"), 7:]).all()


def test_points_that_are_not_finite_are_left_out_and_counted(root):
    for file, row in (("samples/LIDAR_TOP/lidar-0-1-0", 2), ("sweeps/LIDAR_TOP/lidar-0-1-1", 0)):
        points = np.fromfile(root / f"{file}.pcd.bin", "<f4").reshape(-1, 5)
        points[row, 1], points[row + 1, 4] = np.nan, np.inf  # the ring is not read
        points.tofile(root / f"{file}.pcd.bin")
    data = NuScenes(root, VERSION, "mini_val", 3)
    assert data[1].dropped == 2 and np.isfinite(data[1].points).all() and data[4].dropped == 0
    (root / "samples/LIDAR_TOP/lidar-0-0-0.pcd.bin").write_bytes(b"")
    empty = data[0]
    assert empty.points.shape == (0, 5) and empty.points.dtype == np.float32


def test_missing_clouds_are_one_error_that_names_them_and_the_complete_samples(root, tables):
    lost = ["sweeps/LIDAR_TOP/lidar-0-4-1.pcd.bin", "samples/LIDAR_TOP/lidar-0-0-0.pcd.bin"]
    for file in lost:
        (root / file).unlink()
    with pytest.raises(InputError) as error:
        NuScenes(root, VERSION, "mini_val", 3)
    assert str(error.value) == (f"{root}: expected 13 clouds, found 11 (missing: {lost[1]}, {lost[0]}); "
                                "3 samples have all: --frames sample-0-1,sample-0-2,sample-0-3")  # fmt: skip
    assert len(NuScenes(root, VERSION, "mini_val", 3, frames=["sample-0-2"])[0].points)
    assert len(NuScenes(root, VERSION, "mini_train", 3)) == 2
    shutil.rmtree(root / "samples")
    with pytest.raises(InputError, match=r"expected 13 clouds, found 7 \(missing: samples/LIDAR_TOP/lidar-0-0-0.*, \.\.\.\)$"):
        NuScenes(root, VERSION, "mini_val", 10)


def test_broken_cloud_and_bad_options_are_input_errors(root):
    with pytest.raises(InputError, match="at least 1 sweep"):
        NuScenes(root, VERSION, "mini_val", 0)
    with pytest.raises(InputError, match="expected a sample 'x'"):
        NuScenes(root, VERSION, "mini_val", frames=["x"])
    data = NuScenes(root, VERSION, "mini_val", 1)
    (root / "samples/LIDAR_TOP/lidar-0-0-0.pcd.bin").write_bytes(bytes(30))
    with pytest.raises(InputError, match=r"lidar-0-0-0.pcd.bin: expected 20 bytes a point \(5 float32\), found 30 bytes"):
        data[0]
    (root / "samples/LIDAR_TOP/lidar-0-1-0.pcd.bin").unlink()
    with pytest.raises(InputError, match="lidar-0-1-0.pcd.bin: cannot be read"):
        data[1]


# ------------------------------------------------------------------ python -m data.nuscenes


def check(monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["nuscenes", *map(str, words)])
    with pytest.raises(SystemExit) as status:
        run_cli(main)
    return int(status.value.code), *capsys.readouterr()


def test_report_on_a_root_counts_and_names_scenes_with_problems(root, tables, monkeypatch, capsys):
    status, text, errors = check(monkeypatch, capsys, root, "--version", VERSION)
    scenes = [record["name"] for record in tables["scene"]]
    lines = text.splitlines()
    assert (status, errors, lines[-1]) == (0, "", "no problems found")
    assert lines[0] == f"{root}: {len(tables['sample'])} samples, {len(scenes)} of {len(scenes)} scenes without problems"
    found = {line.split()[0]: [int(word) for word in line.split()[1:]] for line in lines[2:-1]}
    kinds = {record["token"]: CLASS_OF.get(record["name"]) for record in tables["category"]}
    kind = {record["token"]: kinds[record["category_token"]] for record in tables["instance"]}
    labels = [(kind[a["instance_token"]], a["num_lidar_pts"]) for a in tables["sample_annotation"]]
    points = {name: [count for of, count in labels if of == name] for name in found}
    assert found == {name: [len(p), p.count(0), round(np.median(p)) if p else 0] for name, p in points.items()}
    assert found.keys() == set(CLASS_OF.values())

    (root / "samples/LIDAR_TOP/lidar-0-0-0.pcd.bin").write_bytes(bytes(30))
    (root / "samples/LIDAR_TOP/lidar-0-1-0.pcd.bin").unlink()
    status, text, _ = check(monkeypatch, capsys, root, "--version", VERSION)
    (line,) = [line for line in text.splitlines() if line.startswith("problem: ")]
    assert status == 1 and line == ("problem: scene-0103: 2 clouds, samples/LIDAR_TOP/lidar-0-0-0.pcd.bin: 30 bytes; "
                                    "samples/LIDAR_TOP/lidar-0-1-0.pcd.bin: missing")  # fmt: skip
    assert check(monkeypatch, capsys, root, "--version", VERSION, "--splits")[0] == 2, "the mini version is one part"


def test_a_download_in_parts_gets_splits_of_its_complete_scenes(tmp_path, tables, monkeypatch, capsys):
    from data.simulate_nuscenes import simulate_nuscenes

    root = tmp_path / "parts"
    simulate_nuscenes(root, train=2, val=2, sweeps=1, samples=(2, 2), progress=False)
    whole = Tables(root, "v1.0-trainval")
    lost = {split: whole.scene_of(whole.split(split))[0] for split in ("train", "val")}
    for split in lost:
        (root / whole.scans(whole.split(split)[0], 1)[0].file).unlink()
    with pytest.raises(InputError, match=r"clouds, found .* or whole scenes: python -m data\.nuscenes .* --splits$"):
        NuScenes(root, "v1.0-trainval", "all", 1)
    (root / "splits.json").write_text('{"mine": ["scene-0001"]}')
    status, text, _ = check(monkeypatch, capsys, root, "--splits", "--sweeps", "1")
    assert json.loads((root / "splits.json").read_text())["mine"] == ["scene-0001"], "a user's own stay"
    assert status == 0 and text.endswith("splits.json: 1 scenes of train, 1 scenes of val\n")
    for split in lost:
        data = NuScenes(root, "v1.0-trainval", split, 1)
        assert len(data) == 2 and lost[split] not in data.tables.scene_of(data.ids)


# ------------------------------------------------------------------ the real key frame


@pytest.fixture(scope="module")
def real(real_nuscenes):
    # The published boxes' own 68; the tables lie in a read-only folder, so no index is written.
    return NuScenes(real_nuscenes, VERSION, "mini_val", sweeps=1, min_points=0)


def test_real_boxes_hold_the_points_that_their_labels_say(real):
    frame = real[0]
    assert len(real) == 1 and frame.points.shape == (34688, 5) and frame.boxes.shape == (68, 9) and frame.dropped == 0
    assert frame.points[:, 3].min() == 0 and frame.points[:, 3].max() == 255 and not frame.points[:, 4].any()
    points, boxes = torch.from_numpy(frame.points).double(), torch.from_numpy(real.boxes(0)[0])
    counted = points_in_boxes(points[:, :3], boxes).sum(dim=0).numpy()
    labelled = [a.lidar_points for a in real.tables.annotations(real.ids[0])]
    assert (np.abs(counted - labelled) <= 2).sum() == 66
    assert np.isnan(frame.boxes[:, 7:]).all(), "one frame defines no velocity"


def test_real_velocities_of_the_lidar_frame_survive_the_way_to_global_and_back(real, real_nuscenes):
    published = json.loads((real_nuscenes / "lidar_frame_velocity.json").read_text())
    tokens = [a.token for a in real.tables.annotations(real.ids[0])]
    boxes, key = real.boxes(0)[0], real.tables.scans(real.ids[0], 1)[0]
    boxes[:, 7:] = [published[token] for token in tokens]
    translation, size, rotation, velocity = boxes_to_global(boxes, key)
    back = boxes_to_lidar(translation, size, rotation, velocity, key)
    assert np.allclose(np.delete(back, 6, axis=1), np.delete(boxes, 6, axis=1), atol=1e-9, equal_nan=True)
    assert np.allclose(wrap_angle(back[:, 6] - boxes[:, 6]), 0, atol=1e-9)
    for a, xyz, wlh, q in zip(real.tables.annotations(real.ids[0]), translation, size, rotation):
        assert np.allclose(a.translation, xyz, atol=1e-6) and np.allclose(a.size, wlh)
        front, ours = turn(a.rotation, (1, 0, 0)), turn(q, (1, 0, 0))
        assert math.dist(front[:2], ours[:2]) < 0.02, "up to the vehicle's tilt"
    # What drives, drives along its own length: a sign or an axis mixed up would turn these away.
    fast = np.linalg.norm(boxes[:, 7:], axis=1) > 2
    heading = np.arctan2(boxes[fast, 8], boxes[fast, 7])
    assert fast.sum() >= 5 and (np.abs(wrap_angle(heading - boxes[fast, 6])) < 0.2).all()


def test_real_frame_alone_repeats_itself(real_nuscenes, real):
    frame = NuScenes(real_nuscenes, VERSION, "mini_val", sweeps=3)[0]
    key = real[0].points
    far = (np.abs(key[:, :2]) >= 1).any(axis=1)
    assert len(frame.points) == len(key) + 2 * far.sum() and np.array_equal(frame.points[: len(key)], key)
    assert np.allclose(frame.points[-far.sum() :], key[far], atol=1e-5) and not frame.points[:, 4].any()
    assert not (real_nuscenes / VERSION / CACHE).exists()


# ------------------------------------------------------------------ class balancing


def test_balanced_indices_draw_each_class_as_often():
    rng = np.random.default_rng(0)
    classes = ("car", "bus", "bicycle", "trailer")
    present = [("car",) + ("bus",) * (i % 4 == 0) + ("bicycle", "bicycle") * (i % 50 == 0) for i in range(1000)]
    drawn = balanced_indices(rng, present, classes)
    pairs, share = 1000 + 250 + 20, []
    for name in classes:
        frames = sum(name in names for names in present)
        share.append(int(frames * ((1 / 4) / (frames / pairs))) if frames else 0)  # as the reference computes it
    assert share == [317, 317, 317, 0] and len(drawn) == sum(share) and drawn.dtype == np.int64
    for k, name in enumerate(classes):
        part = drawn[sum(share[:k]) : sum(share[: k + 1])]
        assert all(name in present[i] for i in part)
    assert set(drawn[634:]) == set(range(0, 1000, 50)), "with replacement: 317 draws of 20 frames"
    assert np.array_equal(drawn, balanced_indices(np.random.default_rng(0), present, classes))
    assert len(balanced_indices(rng, [(), ()], classes)) == len(balanced_indices(rng, [], classes)) == 0


# ------------------------------------------------------------------ results, resampling, training


def test_perfect_detections_written_as_a_submission_have_no_error(real_nuscenes, tmp_path):
    """Labels -> Frame -> results file in the global frame -> official metric: the whole chain there and back."""
    from evaluate import headline, nuscenes_scores
    from metrics.nuscenes import CLASSES

    data = NuScenes(real_nuscenes, VERSION, "all", sweeps=1)
    (boxes, names), (token,) = data.boxes(0), data.ids
    result = nuscenes_scores(data, {token: (np.nan_to_num(boxes), np.full(len(boxes), 0.9), list(names))}, tmp_path, CLASSES)
    written = json.loads((tmp_path / "results.json").read_text())
    assert set(written["results"]) == {token} and written["meta"]["use_lidar"] is True
    found = {name for name, ap in result["mean_dist_aps"].items() if ap > 0}
    assert {"car", "pedestrian", "barrier"} <= found <= set(names)
    for name in found:
        assert result["label_aps"][name]["0.5"] == pytest.approx(1)
        for error in ("trans_err", "scale_err", "orient_err"):
            # The tilt of the vehicle is no part of a Frame's boxes: a thousandth is lost on the way.
            assert (result["label_tp_errors"][name][error] or 0) < 2e-3, (name, error)
    assert headline(result) == {"nds": 100 * result["nd_score"], "map": 100 * result["mean_ap"]}
    nothing = nuscenes_scores(data, {token: (np.zeros((0, 9)), np.zeros(0), []) for token in data.ids}, None, CLASSES)
    assert nothing["nd_score"] == 0 and nothing.keys() == result.keys()
    assert nothing["label_tp_errors"].keys() == result["label_tp_errors"].keys()


MIXED = ("sample-0-3", "sample-1-1", "sample-0-0", "sample-0-4", "sample-1-0", "sample-0-1", "sample-0-2")


@pytest.mark.parametrize("frames", [(), MIXED, MIXED[1:4]])
def test_scenes_are_those_of_the_tables(root, tables, frames):
    data, samples = NuScenes(root, VERSION, "all", frames=frames), by_token(tables, "sample")
    numbers, scenes = data.scenes(), [samples[token]["scene_token"] for token in frames or samples]
    assert [tables["scene"][number]["token"] for number in numbers] == scenes and len(set(scenes)) == 2


def test_resampling_draws_whole_scenes(root, tables, tmp_path):
    from config import override
    from evaluate import headline, nuscenes_scores, resampled
    from metrics.nuscenes import evaluate

    rng, egos, samples = np.random.default_rng(5), by_token(tables, "ego_pose"), by_token(tables, "sample")
    for label in tables["sample_annotation"]:  # near the vehicle, where labels count
        ego = egos[label["sample_token"].replace("sample", "e-lidar") + "-0"]
        label["translation"] = (ego["translation"] + rng.uniform(-15, 15, 3)).tolist()
    write(root, tables)
    data, found, cfg = NuScenes(root, VERSION, "all", sweeps=1, frames=MIXED), {}, small_config(root)
    for i, token in enumerate(data.ids):
        boxes, names = data.boxes(i)
        boxes = np.nan_to_num(boxes) + rng.uniform(-1.5, 1.5, (len(boxes), 9)) * [1, 1, 0, 0, 0, 0, 0, 0, 0]
        found[token] = boxes, rng.random(len(boxes)), names

    class Copies:
        """The tables, asked for copies of their samples: "TOKEN k"."""

        def __getattr__(self, name):
            return lambda token: getattr(data.tables, name)(token.split()[0])

    written, draws, expected = data.submission(found)["results"], np.random.default_rng(0), {"nds": [], "map": []}
    for _ in range(20):  # the samples of the drawn scenes, written as often as drawn
        drawn = [token for scene in draws.integers(2, size=2) for token in data.ids
                 if samples[token]["scene_token"] == tables["scene"][scene]["token"]]  # fmt: skip
        results = {f"{token} {k}": [box | {"sample_token": f"{token} {k}"} for box in written[token]]
                   for k, token in enumerate(drawn)}  # fmt: skip
        (tmp_path / "drawn.json").write_text(json.dumps({"meta": {}, "results": results}))
        for name, value in headline(evaluate(Copies(), list(results), tmp_path / "drawn.json")[0]).items():
            expected[name].append(value)
    assert all(len({round(value, 3) for value in values}) == 3 for values in expected.values()), "one, the other, both"
    assert resampled(data, found, cfg, draws=20) == {name: pytest.approx(row, abs=1e-3) for name, row in expected.items()}
    alone = NuScenes(root, VERSION, "mini_val", sweeps=1)  # one scene: every draw is itself
    found = {token: found[token] for token in alone.ids}
    plain = headline(nuscenes_scores(alone, found, None, cfg.classes))
    assert resampled(alone, found, cfg, draws=5) == {name: pytest.approx([value] * 5, abs=1e-3) for name, value in plain.items()}
    few = override(cfg, {"classes": ("car", "barrier")})  # a detector of two classes: the means are theirs
    plain = nuscenes_scores(alone, found, None, few.classes)
    assert plain["mean_ap"] == np.mean([plain["mean_dist_aps"][name] for name in few.classes]) != 0
    assert resampled(alone, found, few, draws=2) == {name: pytest.approx([value] * 2, abs=1e-3)
                                                     for name, value in headline(plain).items()}  # fmt: skip
    nothing = dict.fromkeys(data.ids, (np.zeros((0, 9)), np.zeros(0), []))
    assert resampled(data, nothing, cfg, draws=2) == {"nds": [0, 0], "map": [0, 0]}


@pytest.mark.parametrize(("name", "speed", "attribute"), [
    ("car", 3.0, "vehicle.moving"), ("car", 0.1, "vehicle.parked"), ("bus", 0.1, "vehicle.stopped"), ("barrier", 9.0, ""),
    ("bicycle", 0.3, "cycle.with_rider"), ("motorcycle", 0.0, "cycle.without_rider"), ("pedestrian", 1.0, "pedestrian.moving"),
    ("pedestrian", 0.0, "pedestrian.standing"), ("traffic_cone", 0.0, ""), ("trailer", 0.21, "vehicle.moving"),
])  # fmt: skip
def test_attributes_follow_class_and_speed(name, speed, attribute):
    from data.nuscenes import attribute_of
    from metrics.nuscenes import ATTRIBUTES

    assert attribute_of(name, speed) == attribute and attribute in ATTRIBUTES


def small_config(root, **changes):
    from dataclasses import replace

    from presets import preset

    cfg = replace(preset("cp-voxel-cpu", "nuscenes"), root=str(root), version=VERSION, width=(0.25, 0.25, 0.25),
                  point_range=(-6.4, -6.4, -5.0, 6.4, 6.4, 3.0), voxel_size=(0.4, 0.4, 0.4), batch_size=1, epochs=1,
                  frames=("sample-0-0", "sample-0-1"), log_every=1, eval_every=1, paste=(0,) * 10)  # fmt: skip
    return replace(cfg, **changes)


def test_a_detector_trains_and_is_scored_on_nuscenes(root, tmp_path):
    from train import train

    train(small_config(root), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert len(steps) == 2 and all(math.isfinite(line["reg"]) for line in steps)
    assert {"nds", "map"} < lines[-1].keys() and "tp_errors" in lines[-1]["result"]


def test_balanced_training_draws_frames_of_rare_classes_more_often_and_the_same_way_again(root):
    from data.batch import TrainingFrames

    class Frames(list):
        def names(self, i):
            return self[i]

    cfg = small_config(root, balance=True)
    frames = Frames([("car",)] * 90 + [("car", "bus")] * 10)
    training = TrainingFrames(frames, cfg, None)
    orders = [training.order(epoch) for epoch in (0, 1)]
    assert all(len(order) == len(training) == 22 for order in orders) and not np.array_equal(*orders)  # 2 x int(110 / 10)
    assert all((order >= 90).sum() >= 11 for order in orders)  # the buses' share, beside what the cars' draws add
    assert np.array_equal(orders[0], TrainingFrames(frames, cfg, None).order(0))
    assert sorted(TrainingFrames(frames, small_config(root), None).order(0)) == list(range(100))


def test_the_mini_version_has_splits_of_its_own(root):
    from data.batch import open_data

    found = {split: open_data(small_config(root, frames=()), split).ids for split in ("train", "val")}
    assert {split: len(set(ids)) for split, ids in found.items()} == {"train": 2, "val": 5}


@pytest.mark.parametrize(("changes", "hint"), [
    ({"classes": ("car", "lorry")}, "class 'lorry'"), ({"velocity": False}, "no velocity head"),
    ({"version": "v1.0-trainval"}, "found v1.0-mini"),
])  # fmt: skip
def test_a_config_for_other_data_is_refused(root, changes, hint):
    from data.batch import open_data

    with pytest.raises(InputError, match=hint):
        open_data(small_config(root, **changes), "val")
