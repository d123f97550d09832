"""A simulated nuScenes root: scenes of linked key frames, all 13 tables.   (after: traffic.py, nuscenes.py; next: resemblance.py)

One scene is one task and a function of (seed, split, index): its world (traffic.py), looked at by a 32-beam scanner on a car. The
scanner turns 20 times a second, every tenth turn is a labelled key frame. Of the turns between only the last `sweeps` before
each key frame are written, and linked; before the first key frame there is none, as in nuScenes. Scenes bear official numbers,
so train and val are the official splits of v1.0-trainval; their descriptions say that they are simulated.

Poses expose mistakes: the place is far from the origin of the global frame, which leans a little against the street's own; the
car rolls and pitches with the ground; the scanner is mounted almost, but not exactly, a quarter turn to the right. A ray without
echo is a point too, as in the official files, at the sensor (or where the sensor was when it fired, as seen at the turn's end).

Labels. An object is labelled from the first to the last key frame in which a point lies in its box, and between also when it is
hidden. Visibility: the share of the rays towards it that reach it. num_lidar_pts: all points of the key frame inside the box.
dims: B beams, A firings a turn, N = A*B points · M objects of a scene · K key frames
"""

import hashlib
import json
import math
import os
import re
import struct
import zlib
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from cli import InputError, write_bytes, write_text
from data.nuscenes import MOVING, quaternion_product, rotation_matrix
from data.nuscenes_tables import SCENES
from data.scanner import HDL32E, Pose, scan
from data.scenes import Scene
from data.simulate import begin, run
from data.traffic import STEP, World, make_world

VERSION = 1  # raised whenever the same settings give other files
TABLES = "v1.0-trainval"
EVERY = 10  # turns from one key frame to the next
REAR_AXLE, WHEELBASE, TRACK = -1.35, 2.6, 1.5  # m: nuScenes' vehicle frame starts on the ground under the rear axle
MOUNTING = np.array([0.94, 0.0, 1.84])  # m, the scanner in the vehicle frame
MAP = 1400  # m, the sides of the map; all scenes lie well inside
EPOCH = 1530000000_000000  # microseconds
CHANNEL = "LIDAR_TOP"
TRAIN = (  # the numbers of the official training scenes
    "1-2 4-11 19-34 41-76 120-135 138-139 149-152 154-155 157-168 170-185 187-188 190-196 199-200 202-204 206-214 218-220 222 "
    "224-264 283-306 315-318 321 323-324 328 347-386 388-403 405-408 410-459 461-465 467-469 471-472 474-480 499-502 504-515 "
    "517-518 525-539 541-546 566 568 570-578 580 582-600 639-679 681 683-689 695-698 700-701 703-719 726-728 730-731 733-741 "
    "744 746-747 749-752 757-765 767-769 786-787 789-792 803-806 808-813 815-817 819-822 847-856 858 860-866 868-873 875-878 "
    "880 882-903 945 947 949 952-953 955-961 975-984 988-992 994-1025 1044-1058 1074-1102 1104-1110"
)
CATEGORIES = (
    "human.pedestrian.adult human.pedestrian.child human.pedestrian.wheelchair human.pedestrian.stroller "
    "human.pedestrian.personal_mobility human.pedestrian.police_officer human.pedestrian.construction_worker animal vehicle.car "
    "vehicle.motorcycle vehicle.bicycle vehicle.bus.bendy vehicle.bus.rigid vehicle.truck vehicle.construction "
    "vehicle.emergency.ambulance vehicle.emergency.police vehicle.trailer movable_object.barrier movable_object.trafficcone "
    "movable_object.pushable_pullable movable_object.debris static_object.bicycle_rack"
).split()
ATTRIBUTES = ("vehicle.moving vehicle.stopped vehicle.parked cycle.with_rider cycle.without_rider pedestrian.sitting_lying_down "
              "pedestrian.standing pedestrian.moving").split()  # fmt: skip
LEVELS = ("v0-40", "v40-60", "v60-80", "v80-100")  # visibility, whose tokens are 1 .. 4


def scene_names(split: int, count: int) -> list[str]:
    """The first `count` official scenes of train (0) or val (1)."""
    numbers = [n for first, last in re.findall(r"(\d+)-?(\d*)", TRAIN) for n in range(int(first), int(last or first) + 1)]
    names = [f"scene-{n:04d}" for n in numbers] if split == 0 else sorted(SCENES["val"])
    if count > len(names):
        raise InputError(f"expected at most {len(names)} {('training', 'held-out')[split]} scenes, found {count}")
    return names[:count]


def token(*words: object) -> str:
    """32 hex digits, a function of the words."""
    return hashlib.md5("/".join(map(str, words)).encode(), usedforsecurity=False).hexdigest()


# ------------------------------------------------------------------ poses


def quaternion(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """(4,) w, x, y, z: first roll about x, then pitch about y (nose down is positive), then yaw about z."""
    turns = [np.array([math.cos(a / 2), *(math.sin(a / 2) * np.eye(3)[axis])]) for a, axis in ((yaw, 2), (pitch, 1), (roll, 0))]
    return quaternion_product(quaternion_product(turns[0], turns[1]), turns[2])


def vehicle_pose(world: World, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the ego is in the street: translation (3,), quaternion (4,). Its four wheels follow the ground, its springs swing."""
    x, y, yaw, _ = world.track[step, 0]
    c, s = math.cos(yaw), math.sin(yaw)

    def height(ahead: float, left: float) -> float:
        return float(world.ground.z(x + ahead * c - left * s, y + ahead * s + left * c))

    rear, front = height(REAR_AXLE, 0), height(REAR_AXLE + WHEELBASE, 0)
    left, right = height(0, TRACK / 2), height(0, -TRACK / 2)
    swing = 0.004 * np.sin([9.0 * step * STEP, 7.0 * step * STEP])
    turn = quaternion(yaw, math.atan2(rear - front, WHEELBASE) + swing[0], math.atan2(left - right, TRACK) + swing[1])
    return np.array([x + REAR_AXLE * c, y + REAR_AXLE * s, rear]), turn


class Place:
    """Where a scene lies in the world, and how its scanner is mounted: the transformations of the tables."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.turn = quaternion(rng.uniform(-np.pi, np.pi), 0.009, -0.012)  # street -> global
        self.origin = np.array([rng.uniform(650, 850), rng.uniform(850, 1050), rng.uniform(-2, 2)])
        self.mounted = quaternion(-np.pi / 2 + rng.normal(0, 0.004), rng.normal(0, 0.008), rng.normal(0, 0.008))

    def to_global(self, xyz: np.ndarray, turn: np.ndarray) -> tuple[list[float], list[float]]:
        """A pose in the street, (3,) and (4,) -> translation and rotation of the tables."""
        moved = np.einsum("ij,j->i", rotation_matrix(self.turn), xyz) + self.origin
        return moved.tolist(), quaternion_product(self.turn, turn).tolist()

    def sensor(self, xyz: np.ndarray, turn: np.ndarray) -> Pose:
        """The vehicle's pose in the street -> the scanner's."""
        vehicle = rotation_matrix(turn)
        return Pose(vehicle @ rotation_matrix(self.mounted), vehicle @ MOUNTING + xyz)


# ------------------------------------------------------------------ one scene


def look(world: World, step: int, pose: Pose, rng: np.random.Generator) -> tuple[Scene, np.ndarray, np.ndarray]:
    """One turn: what was there, the points (N, 5) x, y, z, intensity, ring in the file's order, and the visible share (M,)."""
    scene = world.scene(step)
    seen = scan(scene, HDL32E, rng, pose)
    beams, firings = len(HDL32E.elevations), len(HDL32E.grid()[1])
    points = np.zeros((beams * firings, 5), np.float32)
    points[:, 3] = np.minimum(np.round(rng.exponential(14, len(points))), 255)  # what is written where nothing was heard
    points[seen.ray, :4] = seen.points
    points = points.reshape(beams, firings, 5)[::-1]  # rings count from the lowest beam
    points[..., 4] = np.arange(beams)[:, None]
    # The file runs through the firings, clockwise as the scanner turns, from the left of the sensor
    points = np.roll(points[:, ::-1], -firings // 40, axis=1).transpose(1, 0, 2)
    left = world.track[step, 0, 3] * STEP * np.linspace(1, 0, firings)[:, None]  # m that the car goes until the turn ends
    silent = (points[..., :3] == 0).all(-1)
    points[..., 1] -= np.where(silent, left, 0).astype(np.float32)
    return scene, points.reshape(-1, 5), seen.visible / np.maximum(seen.alone, 1)


def count_inside(points: np.ndarray, boxes: np.ndarray, pose: Pose) -> np.ndarray:
    """(N, 3) points of the sensor, (M, 7) boxes of the street -> (M,) how many of them each box holds."""
    xyz = points.astype(np.float64) @ pose.rotation.T + pose.origin
    xyz = xyz[np.argsort(xyz[:, 0])]
    reach = np.hypot(boxes[:, 3], boxes[:, 4]) / 2
    first, last = np.searchsorted(xyz[:, 0], boxes[:, 0] - reach), np.searchsorted(xyz[:, 0], boxes[:, 0] + reach, side="right")
    counts = np.zeros(len(boxes), int)
    for k, box in enumerate(boxes):
        away = xyz[first[k] : last[k]] - box[:3]
        c, s = math.cos(box[6]), math.sin(box[6])
        along, across = away[:, 0] * c + away[:, 1] * s, away[:, 1] * c - away[:, 0] * s
        counts[k] = (np.abs(np.stack([along, across, away[:, 2]])) <= box[3:6, None] / 2).all(0).sum()
    return counts


def attribute(name: str, speed: float, movable: bool) -> str:
    """What an annotator would say of an object of SHAPES; "" for kinds that have no attribute."""
    if "human" in name:
        return f"pedestrian.{'sitting_lying_down' if 'sitting' in name else 'moving' if speed > MOVING else 'standing'}"
    if "cycle" in name and "vehicle" in name:
        return f"cycle.{'with' if 'with_rider' in name else 'without'}_rider"
    if name.startswith("vehicle"):
        return f"vehicle.{'moving' if speed > MOVING else 'stopped' if movable else 'parked'}"
    return ""


def written(keys: int, sweeps: int) -> list[int]:
    """The turns of a scene that become files, in time."""
    return [step for k in range(keys) for step in range(EVERY * k - (sweeps if k else 0), EVERY * k + 1)]


def write_scene(task: tuple[Path, str, int, int, int, int, tuple[int, int]]) -> None:
    """Make one scene: its clouds, and last its share of the tables; a scene with that file is complete."""
    out, name, seed, split, index, sweeps, samples = task
    rng = np.random.default_rng((seed, split, index))
    keys = int(rng.integers(samples[0], samples[1] + 1))
    world, place, start = make_world(rng, EVERY * (keys - 1) + 1), Place(rng), EPOCH + 3600_000000 * int(name[-4:])
    log, mounted = f"simulated-seed{seed}-{name}", token(seed, "calibrated_sensor", name)
    rows: dict[str, list[dict]] = {table: [] for table in ("sample_data", "ego_pose", "sample")}
    labels = []
    for step in written(keys, sweeps):
        own = np.random.default_rng((seed, split, index, step))
        time, key = start + round(1e6 * STEP * step) + int(own.integers(-300, 301)), step % EVERY == 0
        pose = vehicle_pose(world, step)
        scene, points, share = look(world, step, place.sensor(*pose), own)
        file = f"{'samples' if key else 'sweeps'}/{CHANNEL}/{log}__{CHANNEL}__{time}.pcd.bin"
        write_bytes(out / file, points.astype("<f4").tobytes())
        translation, rotation = place.to_global(*pose)
        sample = -(-step // EVERY)  # sweeps belong to the key frame that they lead to
        rows["ego_pose"].append({"token": token(seed, "ego_pose", name, step), "timestamp": time, "rotation": rotation,
                                 "translation": translation})  # fmt: skip
        rows["sample_data"].append({
            "token": token(seed, "sample_data", name, step), "ego_pose_token": token(seed, "ego_pose", name, step),
            "sample_token": token(seed, "sample", name, sample), "calibrated_sensor_token": mounted,
            "timestamp": time, "fileformat": "pcd", "is_key_frame": key, "height": 0, "width": 0, "filename": file})  # fmt: skip
        if key:
            rows["sample"].append({"token": token(seed, "sample", name, sample), "timestamp": time,
                                   "scene_token": token(seed, "scene", name)})  # fmt: skip
            labels.append((scene, count_inside(points[:, :3], scene.boxes, place.sensor(*pose)), share))
    chain(rows["sample_data"])
    chain(rows["sample"])
    ends = {f"{end}_sample_token": rows["sample"][k]["token"] for end, k in (("first", 0), ("last", -1))}
    rows["scene"] = [{"token": token(seed, "scene", name), "log_token": token(seed, "log", name), "nbr_samples": keys, **ends,
                      "name": name, "description": "Simulated, not recorded: a street with traffic"}]  # fmt: skip
    rows["log"] = [{"token": token(seed, "log", name), "logfile": log, "vehicle": "simulated", "date_captured": "2018-06-26",
                    "location": "simulated"}]  # fmt: skip
    rows["calibrated_sensor"] = [{"token": mounted, "sensor_token": token("sensor", CHANNEL),
                                  "translation": MOUNTING.tolist(), "rotation": place.mounted.tolist(), "camera_intrinsic": []}]
    rows |= annotations(labels, place, len(world.names), seed, name)
    write_text(out / "parts" / f"{name}.json", json.dumps(rows))


def annotations(labels: list[tuple], place: Place, still: int, seed: int, name: str) -> dict[str, list[dict]]:
    """Tables of a scene's objects. labels: for each key frame the scene, points (M,) and visible share (M,) of its objects;
    the first `still` of them never move."""
    instances, boxes = [], []
    points = np.stack([count for _, count, _ in labels])  # (K, M)
    for m in np.flatnonzero(points.any(0)):
        what = labels[0][0].names[m]
        own, (first, last) = token(seed, "instance", name, m), np.flatnonzero(points[:, m])[[0, -1]]
        chained = []
        for k in range(first, last + 1):
            scene, _, share = labels[k]
            x, y, z, length, width, height, yaw = scene.boxes[m]
            translation, rotation = place.to_global(np.array([x, y, z]), quaternion(yaw, 0, 0))
            says = attribute(what, float(np.hypot(*scene.velocity[m])), m >= still)
            level = 1 + int(np.searchsorted((0.4, 0.6, 0.8), share[m], side="right"))
            chained.append({
                "token": token(seed, "sample_annotation", name, m, k), "sample_token": token(seed, "sample", name, k),
                "instance_token": own, "visibility_token": str(level),
                "attribute_tokens": [token("attribute", says)] if says else [], "translation": translation, "rotation": rotation,
                "size": [width, length, height], "num_lidar_pts": int(points[k, m]), "num_radar_pts": 0})  # fmt: skip
        chain(chained)
        category, ends = what.removeprefix("with_rider.").removeprefix("sitting."), (("first", 0), ("last", -1))
        instances.append({"token": own, "category_token": token("category", category), "nbr_annotations": len(chained),
                          **{f"{end}_annotation_token": chained[k]["token"] for end, k in ends}})  # fmt: skip
        boxes += chained
    return {"instance": instances, "sample_annotation": boxes}


def chain(records: list[dict]) -> None:
    """Link records to the ones before and after."""
    tokens = ["", *(record["token"] for record in records), ""]
    for record, before, after in zip(records, tokens, tokens[2:]):
        record |= {"prev": before, "next": after}


# ------------------------------------------------------------------ the set on the disk


def blank_map(side: int) -> bytes:
    """A PNG of side x side black pixels, 8 bits each: to the devkit, 0.1 m of no drivable surface."""
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packed = zlib.compressobj(9)
    body = b"".join([packed.compress(bytes(side + 1)) for _ in range(side)] + [packed.flush()])
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def is_complete(out: Path, name: str) -> bool:
    """Whether a scene's share of the tables is there, and every cloud that it names."""
    try:
        rows = json.loads((out / "parts" / f"{name}.json").read_bytes())
    except (OSError, ValueError):
        return False
    return all((out / row["filename"]).is_file() for row in rows["sample_data"])


def write_tables(out: Path, names: list[str]) -> None:
    """Join the scenes' shares, one after the other; the table of scenes, by which a complete set is known, comes last."""
    logs = [{"token": token("map"), "log_tokens": [], "category": "semantic_prior", "filename": "maps/blank.png"}]
    common = {
        "category": [{"token": token("category", name), "name": name, "description": ""} for name in CATEGORIES],
        "attribute": [{"token": token("attribute", name), "name": name, "description": ""} for name in ATTRIBUTES],
        "visibility": [{"token": str(k), "level": level, "description": ""} for k, level in enumerate(LEVELS, 1)],
        "sensor": [{"token": token("sensor", CHANNEL), "channel": CHANNEL, "modality": "lidar"}], "map": logs}  # fmt: skip
    write_bytes(out / "maps" / "blank.png", blank_map(10 * MAP))
    with ExitStack() as stack:
        files, before = {}, {}
        for name in names:
            for table, rows in json.loads((out / "parts" / f"{name}.json").read_bytes()).items():
                if table not in files:
                    path = out / TABLES / f"{table}.json.{os.getpid()}.tmp"  # row by row: never all in memory
                    files[table] = stack.enter_context(open(path, "w", encoding="utf-8"))
                    before[table] = "[\n"
                for row in rows:
                    files[table].write(before[table] + json.dumps(row))
                    before[table] = ",\n"
                logs[0]["log_tokens"] += [row["token"] for row in rows if table == "log"]
        for table, file in files.items():
            file.write("[]\n" if before[table] == "[\n" else "\n]\n")
    for table, rows in common.items():
        write_text(out / TABLES / f"{table}.json", json.dumps(rows, indent=0))
    for table in sorted(files, key=lambda table: table == "scene"):
        os.replace(files[table].name, out / TABLES / f"{table}.json")


def simulate_nuscenes(out: str | Path, train: int = 24, val: int = 8, seed: int = 0, workers: int = 0, sweeps: int = 2,
                      samples: tuple[int, int] = (10, 20), progress: bool = True) -> Path:  # fmt: skip
    """Write a nuScenes root of simulated scenes, or what is missing of it; nothing is done to a complete one.

    out: a folder that is new, empty or was begun with the same settings (InputError otherwise). workers: processes, 0 = one per
    core. sweeps: scans written before each key frame. samples: least and most key frames of a scene.
    """
    out, (least, most) = Path(out), samples
    if train < 0 or val < 0 or train + val < 1 or seed < 0:
        raise InputError(f"expected at least one scene and a seed >= 0, found train {train}, val {val}, seed {seed}")
    if not 0 <= sweeps < EVERY or not 1 <= least <= most:
        raise InputError(f"expected 0 to {EVERY - 1} sweeps and samples 1 <= LEAST <= MOST, found {sweeps}, {least}, {most}")
    names = [scene_names(split, count) for split, count in enumerate((train, val))]
    begin(out, {"layout": "nuscenes", "version": VERSION, "train": train, "val": val, "seed": seed, "sweeps": sweeps,
                "samples": [least, most]}, (f"samples/{CHANNEL}", f"sweeps/{CHANNEL}", "maps", "parts", TABLES))  # fmt: skip
    every = [*names[0], *names[1]]
    tasks = [(out, name, seed, split, index, sweeps, samples) for split in (0, 1) for index, name in enumerate(names[split])
             if not is_complete(out, name)]  # fmt: skip
    run(write_scene, tasks, workers, len(every), "scene" if progress else "")
    if tasks or not (out / TABLES / "scene.json").is_file():
        for leftover in out.rglob("*.tmp"):  # of a run that was killed
            leftover.unlink(missing_ok=True)
        write_tables(out, every)
    return out
