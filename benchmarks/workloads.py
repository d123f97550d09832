"""Files as large as the real data sets', to time the evaluation on.   (no subject of its own; used by evaluation.py)

    python -m benchmarks.workloads kitti --out DIR       label_2/ and results/: the size of KITTI's val split, 3,769 frames
    python -m benchmarks.workloads nuscenes --out DIR    all 13 tables and results.json: val, 6,019 samples in 150 scenes
    python -m benchmarks.workloads tables --out DIR      all 13 tables of trainval: 850 scenes, 12 sensors, 2.6 GB

Drawn from a seeded generator, nothing of the real sets is inside: their numbers of frames, objects, scans and bytes, not their
looks. Written scene by scene, so that memory stays small. There are no clouds and no images: the metrics read none.
dims: S samples of a scene · O objects of a scene · n rows
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from cli import ArgumentParser, run_cli

SEED = 20241125
# What stands on a street: its share of all objects, length, width, height in m, m/s when it moves, share that moves. nuScenes'
# categories; KITTI has other shares and names.
NUSCENES = {
    "vehicle.car": (0.40, 4.6, 1.9, 1.7, 8, 0.3), "human.pedestrian.adult": (0.19, 0.7, 0.7, 1.8, 1.3, 0.7),
    "movable_object.barrier": (0.13, 0.5, 2.5, 1.0, 0, 0), "movable_object.trafficcone": (0.08, 0.4, 0.4, 1.1, 0, 0),
    "vehicle.truck": (0.06, 6.9, 2.5, 2.8, 6, 0.3), "vehicle.trailer": (0.02, 12.3, 2.9, 3.9, 5, 0.2),
    "vehicle.bus.rigid": (0.015, 11.0, 2.9, 3.5, 6, 0.4), "vehicle.construction": (0.01, 6.4, 2.7, 3.2, 1, 0.2),
    "vehicle.motorcycle": (0.02, 2.1, 0.8, 1.5, 6, 0.4), "vehicle.bicycle": (0.02, 1.7, 0.6, 1.3, 3, 0.4),
    "movable_object.pushable_pullable": (0.02, 0.7, 0.6, 1.1, 0, 0), "movable_object.debris": (0.015, 1.0, 1.1, 0.5, 0, 0),
    "static_object.bicycle_rack": (0.02, 8.5, 2.7, 1.4, 0, 0),
}  # fmt: skip
KITTI = {
    "Car": (0.53, 3.9, 1.6, 1.5), "Pedestrian": (0.09, 0.8, 0.6, 1.75), "Cyclist": (0.04, 1.8, 0.6, 1.75),
    "Van": (0.06, 5.1, 1.9, 2.2), "Person_sitting": (0.01, 0.8, 0.6, 1.3), "Truck": (0.02, 10.0, 2.6, 3.2),
    "Tram": (0.01, 16.0, 2.5, 3.5), "Misc": (0.02, 3.6, 1.5, 1.9), "DontCare": (0.22, 3.0, 2.0, 1.7),
}  # fmt: skip
TABLES = ("category attribute visibility instance sensor calibrated_sensor ego_pose log scene sample sample_data "
          "sample_annotation map").split()  # fmt: skip
# Sensors and their turns or images from one key frame to the next.
LIDAR = {"LIDAR_TOP": 10}
SENSORS = LIDAR | {f"CAM_{place}": 6 for place in "FRONT FRONT_LEFT FRONT_RIGHT BACK BACK_LEFT BACK_RIGHT".split()} | {
    f"RADAR_{place}": 6 for place in "FRONT FRONT_LEFT FRONT_RIGHT BACK_LEFT BACK_RIGHT".split()}  # fmt: skip


# ------------------------------------------------------------------ KITTI


def kitti(out: Path, frames: int = 3769, objects: float = 8.9, alarms: float = 13.4) -> None:
    """label_2/NNNNNN.txt and results/NNNNNN.txt; objects, false alarms: a frame, before those outside the image are left out."""
    from data.kitti_files import Calibration, objects_from_boxes, write_objects

    rng, names = np.random.default_rng(SEED), np.array(list(KITTI))
    shares, shapes = np.array([row[0] for row in KITTI.values()]), np.array([row[1:] for row in KITTI.values()])
    axes = np.array([[0, -1, 0, 0], [0, 0, -1, -0.1], [1, 0, 0, -0.3]])
    calib = Calibration(np.array([[720.0, 0, 610, 45], [0, 720, 173, 0.2], [0, 0, 1, 0]]), np.eye(3), axes)

    def boxes(n: int, kinds: np.ndarray) -> np.ndarray:
        far, size = rng.uniform(6, 70, n), shapes[kinds] * rng.normal(1, 0.08, (n, 3)).clip(0.7, 1.3)
        place = [far, far * rng.uniform(-0.8, 0.8, n), rng.normal(-0.9, 0.15, n)]
        return np.stack([*place, *size.T, rng.uniform(-np.pi, np.pi, n)], axis=1)

    for folder in ("label_2", "results"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for frame in range(frames):
        kinds = rng.choice(len(names), rng.poisson(objects), p=shares / shares.sum())
        there = boxes(len(kinds), kinds)
        label = objects_from_boxes(there, names[kinds].tolist(), None, calib, (1242, 375))
        n = len(label)
        label = replace(label, truncation=np.where(rng.random(n) < 0.1, rng.uniform(0, 0.9, n), 0).round(2),
                        occlusion=rng.choice(4, n, p=[0.5, 0.25, 0.2, 0.05]))  # fmt: skip
        write_objects(out / "label_2" / f"{frame:06d}.txt", label)
        # Found: most objects, some twice, with errors from nothing to far too much. Also the ones nobody asks for, as cars.
        rows = np.flatnonzero(rng.random(len(kinds)) < 0.85)
        rows = np.concatenate([rows, rows[rng.random(len(rows)) < 0.1]])
        error = rng.choice([0.3, 1.0, 3.0], len(rows))
        near = there[rows] + error[:, None] * rng.normal(0, [0.15, 0.08, 0.05, 0.15, 0.05, 0.05, 0.08], (len(rows), 7))
        near[:, 3:6] = near[:, 3:6].clip(0.2)
        false = rng.choice(3, rng.poisson(alarms), p=[0.6, 0.25, 0.15])
        found = np.concatenate([near, boxes(len(false), false)])
        called = [*np.where(kinds[rows] < 3, kinds[rows], 0), *false]
        score = 1 / (1 + np.exp(-np.concatenate([rng.normal(1.5 - 0.6 * error, 1), rng.normal(-1.5, 1, len(false))])))
        detections = objects_from_boxes(found, names[called].tolist(), score, calib, (1242, 375))
        write_objects(out / "results" / f"{frame:06d}.txt", detections)


# ------------------------------------------------------------------ nuScenes


def nuscenes(out: Path, scenes: int = 150, samples: int = 6019, sensors: dict[str, int] = LIDAR, crowd: float = 87,
             predictions: bool = True) -> None:  # fmt: skip
    """v1.0-trainval/*.json: `samples` key frames in `scenes`, the val split's first; crowd: objects of a scene, of which the
    far ones are not annotated. With predictions also results.json, for every sample."""
    from data.nuscenes_tables import SCENES

    rng, folder = np.random.default_rng(SEED), out / "v1.0-trainval"
    names = sorted(SCENES["val"]) + [name for i in range(1, 1201) if (name := f"scene-{i:04d}") not in SCENES["val"]]
    folder.mkdir(parents=True, exist_ok=True)
    (out / "maps").mkdir(exist_ok=True)
    (out / "maps" / "map.png").write_bytes(b"")  # the official devkit asks whether it is there; it opens it for drawing only
    with ExitStack() as stack:
        tables = {name: stack.enter_context(_List(folder / f"{name}.json")) for name in TABLES}
        fixed = _fixed_tables(rng, sensors)
        for name, records in fixed.items():
            tables[name].add(records)
        results = stack.enter_context((out / "results.json").open("w")) if predictions else None
        meta = {f"use_{sensor}": sensor == "lidar" for sensor in ("camera", "lidar", "radar", "map", "external")}
        start = f'{{"meta": {json.dumps(meta)}, "results": {{'
        for i in range(scenes):
            n = samples // scenes + (i < samples % scenes)
            made, found = _scene(rng, names[i], n, sensors, fixed, rng.poisson(crowd), predictions)
            for name, records in made.items():
                tables[name].add(records)
            if results:
                results.write((", " if i else start) + json.dumps(found)[1:-1])
        if results:
            results.write("}}")


class _List:
    """A table on its way to the disk: `add` puts records behind those written before. One value a line, as in the real tables."""

    encode = json.JSONEncoder(separators=(",\n", ": ")).encode

    def __init__(self, path: Path) -> None:
        self.file, self.before = path.open("w"), "[\n"

    def __enter__(self) -> "_List":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.write("\n]" if self.before == ",\n" else "[]")
        self.file.close()

    def add(self, records: list[dict]) -> None:
        if records:
            self.file.write(self.before + self.encode(records)[1:-1])
            self.before = ",\n"


def _tokens(rng: np.random.Generator, n: int) -> list[str]:
    text = rng.bytes(16 * n).hex()
    return [text[i : i + 32] for i in range(0, 32 * n, 32)]


def _linked(tokens: list[str]) -> Iterator[tuple[str, str, str]]:
    """Tokens of a chain -> token, the one before, the one after; "" at the ends."""
    return zip(tokens, ["", *tokens[:-1]], [*tokens[1:], ""], strict=True)


def _fixed_tables(rng: np.random.Generator, sensors: dict[str, int]) -> dict[str, list[dict]]:
    """The small tables, which no scene adds to (but all share one log and one car)."""
    from metrics.nuscenes import ATTRIBUTES

    named = lambda names: [{"token": t, "name": name, "description": ""}  # noqa: E731
                           for t, name in zip(_tokens(rng, len(names)), names)]  # fmt: skip
    sensor = [{"token": t, "channel": name, "modality": {"L": "lidar", "C": "camera", "R": "radar"}[name[0]]}
              for t, name in zip(_tokens(rng, len(sensors)), sensors)]  # fmt: skip
    mounted = [{"token": t, "sensor_token": s["token"], "translation": [0.94, 0.0, 1.84], "rotation": [0.7071, 0.0, 0.0, -0.7071],
                "camera_intrinsic": []} for t, s in zip(_tokens(rng, len(sensor)), sensor)]  # fmt: skip
    log, map_token = _tokens(rng, 2)
    return {"category": named(list(NUSCENES)), "attribute": named(ATTRIBUTES[1:]),
            "visibility": [{"token": str(i), "level": f"v{i}", "description": ""} for i in range(1, 5)],
            "sensor": sensor, "calibrated_sensor": mounted,
            "log": [{"token": log, "logfile": "drawn", "vehicle": "n0", "date_captured": "2000-01-01", "location": "nowhere"}],
            "map": [{"token": map_token, "category": "semantic_prior", "filename": "maps/map.png", "log_tokens": [log]}]}


def _scene(rng: np.random.Generator, name: str, n: int, sensors: dict[str, int], fixed: dict, crowd: int,
           predictions: bool) -> tuple[dict[str, list[dict]], dict[str, list[dict]]]:  # fmt: skip
    """The records that a scene adds to the tables, and the predictions of its samples."""
    (scene,), tokens = _tokens(rng, 1), _tokens(rng, n)
    begin = 1_500_000_000_000_000 + int(rng.integers(10**13))
    stamps = begin + 500_000 * np.arange(n) + rng.integers(-20_000, 20_000, n)
    speed, heading, bend = rng.uniform(1, 8), rng.uniform(-np.pi, np.pi), rng.uniform(0.005, 0.05)
    origin = rng.uniform(300, 2000, 2)

    def drive(microseconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the vehicle is then, (n, 2), on its circle, and its heading, (n,)."""
        yaw = heading + bend * 1e-6 * (microseconds - begin)
        circle = np.stack([np.sin(yaw) - np.sin(heading), np.cos(heading) - np.cos(yaw)], axis=1)
        return origin + speed / bend * circle, yaw

    made: dict[str, list[dict]] = {
        "scene": [{"token": scene, "log_token": fixed["log"][0]["token"], "nbr_samples": n, "first_sample_token": tokens[0],
                   "last_sample_token": tokens[-1], "name": name, "description": "drawn"}],
        "sample": [{"token": t, "timestamp": time, "prev": before, "next": after, "scene_token": scene}
                   for (t, before, after), time in zip(_linked(tokens), stamps.tolist(), strict=True)],
        "sample_data": [], "ego_pose": [], "instance": [], "sample_annotation": []}  # fmt: skip
    for (channel, turns), mounted in zip(sensors.items(), fixed["calibrated_sensor"], strict=True):
        times = (stamps[:, None] - 500_000 // turns * np.arange(turns)[::-1]).ravel()  # the last of `turns` is the key frame's
        ego, yaw = drive(times)
        scans, end = _tokens(rng, n * turns), {"L": "pcd.bin", "C": "jpg", "R": "pcd"}[channel[0]]
        rotation = np.stack([np.cos(yaw / 2), *rng.normal(0, 0.004, (2, len(yaw))), np.sin(yaw / 2)], axis=1)  # it rolls a little
        pose = ego.tolist(), (rotation / np.linalg.norm(rotation, axis=1, keepdims=True)).tolist()
        for i, ((t, before, after), time, xy, quaternion) in enumerate(zip(_linked(scans), times.tolist(), *pose, strict=True)):
            is_key = i % turns == turns - 1
            file = f"{'samples' if is_key else 'sweeps'}/{channel}/n015-2000-01-01-00-00-00+0800__{channel}__{time}.{end}"
            made["sample_data"].append({
                "token": t, "sample_token": tokens[i // turns], "ego_pose_token": t,
                "calibrated_sensor_token": mounted["token"], "timestamp": time, "fileformat": end[:3], "is_key_frame": is_key,
                "height": 900 * (end == "jpg"), "width": 1600 * (end == "jpg"), "filename": file,
                "prev": before, "next": after})  # fmt: skip
            made["ego_pose"].append({"token": t, "timestamp": time, "rotation": quaternion, "translation": [*xy, 0.0]})
    return made, _objects(rng, made, tokens, stamps, drive(stamps)[0], crowd, fixed, predictions)


def _objects(rng: np.random.Generator, made: dict[str, list[dict]], tokens: list[str], stamps: np.ndarray, ego: np.ndarray,
             crowd: int, fixed: dict, predictions: bool) -> dict[str, list[dict]]:  # fmt: skip
    """Adds a scene's instances and annotations to `made`; returns the predictions of each sample. ego: (S, 2)."""
    table = np.array(list(NUSCENES.values()))
    kind = rng.choice(len(table), crowd, p=table[:, 0] / table[:, 0].sum())  # (O,)
    size = table[kind][:, [2, 1, 3]] * rng.normal(1, 0.08, (crowd, 3)).clip(0.7, 1.3)  # width, length, height
    yaw = rng.uniform(-np.pi, np.pi, crowd)
    pace = table[kind, 4] * (rng.random(crowd) < table[kind, 5]) * rng.uniform(0.5, 1.3, crowd)
    velocity = pace[:, None] * np.stack([np.cos(yaw), np.sin(yaw)], axis=1)  # (O, 2)
    middle, far = len(stamps) // 2, 75 * np.sqrt(rng.random((crowd, 1)))
    around, where = rng.uniform(-np.pi, np.pi, crowd), ego[rng.integers(len(stamps), size=crowd)]
    where = where + far * np.stack([np.cos(around), np.sin(around)], axis=1)
    xy = where[:, None] + velocity[:, None] * (1e-6 * (stamps - stamps[middle]))[:, None]  # (O, S, 2)
    away = np.linalg.norm(xy - ego, axis=2)  # (O, S)
    points = np.where(rng.random(away.shape) < 0.1, 0, rng.poisson(800 * size[:, 1:2] * size[:, 2:] / away.clip(3) ** 2 + 0.5))
    results: dict[str, list[dict]] = {token: [] for token in tokens}
    for o in range(crowd):
        seen = np.flatnonzero(away[o] < 62)
        if not len(seen):
            continue
        words = _attributes(list(NUSCENES)[kind[o]], pace[o])
        attribute = [fixed["attribute"][_row_of(fixed, words[0])]["token"]] if words and rng.random() < 0.97 else []
        (instance,), labels = _tokens(rng, 1), _tokens(rng, len(seen))
        made["instance"].append({"token": instance, "category_token": fixed["category"][kind[o]]["token"],
                                 "nbr_annotations": len(seen), "first_annotation_token": labels[0],
                                 "last_annotation_token": labels[-1]})  # fmt: skip
        rotation = [float(np.cos(yaw[o] / 2)), 0.0, 0.0, float(np.sin(yaw[o] / 2))]
        wlh, height = size[o].round(3).tolist(), float(size[o, 2] / 2)
        centres, counts = xy[o, seen].round(3).tolist(), points[o, seen].tolist()
        for (t, before, after), s, centre, count in zip(_linked(labels), seen.tolist(), centres, counts, strict=True):
            made["sample_annotation"].append({
                "token": t, "sample_token": tokens[s], "instance_token": instance, "visibility_token": "4",
                "attribute_tokens": attribute, "translation": [*centre, height], "size": wlh, "rotation": rotation,
                "prev": before, "next": after, "num_lidar_pts": count, "num_radar_pts": 0})  # fmt: skip
        if predictions:
            _predict(rng, results, tokens, seen, xy[o, seen], kind[o], size[o], yaw[o], velocity[o], words)
    if predictions:
        _false_alarms(rng, results, tokens, ego)
    return results


def _row_of(fixed: dict, attribute: str) -> int:
    return next(i for i, row in enumerate(fixed["attribute"]) if row["name"] == attribute)


def _attributes(category: str, pace: float) -> list[str]:
    """The right attribute of an object, then the wrong ones; none for things."""
    if category.startswith("human"):
        words = ["pedestrian.moving", "pedestrian.standing", "pedestrian.sitting_lying_down"]
    elif category in ("vehicle.bicycle", "vehicle.motorcycle"):
        words = ["cycle.with_rider", "cycle.without_rider"]
    else:
        words = ["vehicle.moving", "vehicle.parked", "vehicle.stopped"] if category.startswith("vehicle") else []
    return words if pace else words[1:] + words[:1]


def _predict(rng: np.random.Generator, results: dict, tokens: list[str], seen: np.ndarray, xy: np.ndarray, kind: int,
             size: np.ndarray, yaw: float, velocity: np.ndarray, words: list[str]) -> None:  # fmt: skip
    """Most of an object's annotations are found, some twice, with errors of position from 0 to 5 m."""
    from data.nuscenes_tables import CLASS_OF

    name = CLASS_OF.get(list(NUSCENES)[kind])
    rows = np.flatnonzero(rng.random(len(seen)) < 0.85)
    rows = np.concatenate([rows, rows[rng.random(len(rows)) < 0.15]])
    if name is None or not len(rows):
        return
    n, error = len(rows), rng.choice([0.15, 0.5, 1.5], len(rows))
    centre = np.concatenate([xy[rows] + error[:, None] * rng.normal(0, 1, (n, 2)), rng.normal(size[2] / 2, 0.1, (n, 1))], axis=1)
    half = (yaw + rng.normal(0, 0.1, n) + np.pi * (rng.random(n) < 0.1)) / 2
    chosen = rng.choice(len(words), n, p=[0.8, *[0.2 / (len(words) - 1)] * (len(words) - 1)]).tolist() if words else [0] * n
    _add(results, [tokens[s] for s in seen[rows]], [name] * n, [words[c] if words else "" for c in chosen], centre,
         size * np.exp(rng.normal(0, 0.08, (n, 3))), half, velocity + rng.normal(0, 0.3, (n, 2)),
         rng.normal(1.5 - error, 1))  # fmt: skip


def _false_alarms(rng: np.random.Generator, results: dict, tokens: list[str], ego: np.ndarray, alarms: float = 38) -> None:
    """`alarms` boxes a sample where nothing is, less sure of themselves."""
    from data.nuscenes_tables import CLASS_OF

    kinds = [category for category in NUSCENES if category in CLASS_OF]
    counts = rng.poisson(alarms, len(tokens))
    n, of = int(counts.sum()), np.repeat(np.arange(len(tokens)), counts)
    chosen = rng.choice(len(kinds), n)
    size = np.array([NUSCENES[category][1:4] for category in kinds])[chosen][:, [1, 0, 2]]
    far, around = 60 * np.sqrt(rng.random(n)), rng.uniform(-np.pi, np.pi, n)
    centre = np.stack([ego[of, 0] + far * np.cos(around), ego[of, 1] + far * np.sin(around), size[:, 2] / 2], axis=1)
    words = [(_attributes(kinds[c], 0) or [""])[0] for c in chosen]
    _add(results, [tokens[s] for s in of], [CLASS_OF[kinds[c]] for c in chosen], words, centre, size,
         rng.uniform(-np.pi, np.pi, n) / 2, rng.normal(0, 1, (n, 2)), rng.normal(-1.5, 1, n))  # fmt: skip


def _add(results: dict, tokens: list[str], names: list[str], words: list[str], centre: np.ndarray, size: np.ndarray,
         half: np.ndarray, velocity: np.ndarray, logit: np.ndarray) -> None:  # fmt: skip
    """n boxes as the results file has them; half: half the yaw."""
    arrays = centre, size, np.cos(half), np.sin(half), velocity, 1 / (1 + np.exp(-logit))
    for token, name, word, c, s, w, z, v, score in zip(tokens, names, words, *(a.tolist() for a in arrays), strict=True):
        results[token].append({"sample_token": token, "translation": c, "size": s, "rotation": [w, 0.0, 0.0, z], "velocity": v,
                               "detection_name": name, "detection_score": score, "attribute_name": word})  # fmt: skip


def trainval(out: Path) -> None:
    """The tables of v1.0-trainval in their real size."""
    nuscenes(out, scenes=850, samples=34149, sensors=SENSORS, crowd=62, predictions=False)


def main() -> None:
    p = ArgumentParser(prog="python -m benchmarks.workloads", description=__doc__)
    p.add_argument("which", choices=("kitti", "nuscenes", "tables"))
    p.add_argument("--out", type=Path, metavar="DIR", help="where to [a new temporary folder]")
    args = p.parse_args()
    out = args.out or Path(tempfile.mkdtemp(prefix=f"{args.which}-"))
    {"kitti": kitti, "nuscenes": nuscenes, "tables": trainval}[args.which](out)
    files = [path for path in out.rglob("*") if path.is_file()]
    print(f"{out}: {len(files):,} files, {sum(path.stat().st_size for path in files) / 1e6:,.0f} MB", file=sys.stdout)


if __name__ == "__main__":
    run_cli(main)
