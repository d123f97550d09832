"""nuScenes: a root of the official layout -> `Frame`s of several sweeps.   (after: nuscenes_tables.py; next: batch.py)

    python -m data.nuscenes DIR --version v1.0-trainval      what a root holds, problems too

A root holds the tables (v1.0-mini/*.json, ...) and the clouds, samples/LIDAR_TOP (key frames) and sweeps/LIDAR_TOP (the
turns between them). Three frames of reference meet here, each a translation and a rotation away from the next:

    LIDAR_TOP  x right, y forward, z up      points, and the boxes of a `Frame`: both as the key frame's sensor sees them
    vehicle    x forward, y left, z up       (calibrated_sensor, fixed in a scene)
    global     x east, y north, z up         labels and results (ego_pose, another one for every scan)

nuScenes mounts its sensor a quarter turn to the right. As in all published models the boxes and points stay so; only what
"forward" is called differs from KITTI. Poses are float64: global coordinates of 1,000 m leave float32 0.1 mm.
dims: N points · M boxes of a frame · L scans of a frame, the key frame first
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cli import ArgumentParser, InputError, run_cli
from data import Frame
from data.kitti_files import read_cloud
from data.nuscenes_tables import CLASS_OF, SCENES, Scan, Tables

MOVING = 0.2  # m/s
COLUMNS = 5  # of a .pcd.bin: x, y, z, intensity 0 .. 255, ring; float32


class NuScenes:
    """The key frames of a split: `NuScenes(root, "v1.0-mini", "mini_val")[i]` is a `Frame`.

    points: (N, 5) x, y, z, intensity, time lag in s (0 for the key frame, else above). The intensity is the file's, 0 .. 255:
    the published models take it raw. boxes: (M, 9) with vx, vy in m/s, NaN where the tables do not tell. names: detection
    classes only. The id is the sample's token.

    sweeps: scans of a frame, the key frame counted. min_points: labels with fewer LiDAR points are left out; 1 as the
    published models train, 0 keeps all. frames: the sample tokens to use instead of the whole split.
    Raises InputError: as `Tables` does, and when clouds are missing, with their names and a count.
    """

    def __init__(self, root: str | Path, version: str, split: str, sweeps: int = 10, min_points: int = 1,
                 frames: Sequence[str] = ()) -> None:  # fmt: skip
        if sweeps < 1:
            raise InputError(f"expected at least 1 sweep, the key frame, found {sweeps}")
        self.root, self.sweeps, self.min_points = Path(root), sweeps, min_points
        self.tables = Tables(root, version)
        self.ids = list(frames) or self.tables.split(split)
        self._check_files(hint=not frames)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> Frame:
        key, *history = self.tables.scans(self.ids[i], self.sweeps)
        points, dropped = read_cloud(self.root / key.file, COLUMNS)
        parts = [np.concatenate([points, np.zeros((len(points), 1), np.float32)], axis=1)]
        if not history and self.sweeps > 1:  # the first frame of a scene stands in for its own sweeps
            parts.append(self._sweep(points, key, key))
        for scan in history:
            points, bad = read_cloud(self.root / scan.file, COLUMNS)
            parts.append(self._sweep(points, scan, key))
            dropped += bad
        # DIFFERS: OpenPCDet shuffles the sweeps. Here they stand newest first, which matters only where the number of
        # points in a voxel is limited (and training shuffles the points then).
        parts += parts[-1:] * (self.sweeps - len(parts))  # a short history: the oldest again and again
        boxes, names = self.boxes(i)
        return Frame(self.ids[i], np.concatenate(parts), boxes.astype(np.float32), names, dropped)

    def _sweep(self, points: np.ndarray, scan: Scan, key: Scan) -> np.ndarray:
        """(n, 4) points as `scan` saw them -> (n', 5) as points of the key frame, with their time lag."""
        # The vehicle's own roof goes. Only from the sweeps, which would smear it along the way; the key frame keeps it.
        points = points[(np.abs(points[:, 0]) >= 1) | (np.abs(points[:, 1]) >= 1)]
        xyz = move(points[:, :3], scan, key).astype(np.float32)
        lag = np.full((len(points), 1), 1e-6 * (key.time - scan.time), dtype=np.float32)
        return np.concatenate([xyz, points[:, 3:], lag], axis=1)

    def boxes(self, i: int) -> tuple[np.ndarray, tuple[str, ...]]:
        """The frame's labels without its points: (M, 9) float64, and the M detection classes."""
        rows, columns = self.tables.rows(self.ids[i]), self.tables.columns
        names, enough = self.tables.classes(rows), columns["annotation_lidar_points"][rows] >= self.min_points
        kept = [k for k, name in enumerate(names) if name and enough[k]]
        of_box = (columns[f"annotation_{name}"][rows][kept] for name in ("translation", "size", "rotation", "velocity"))
        return boxes_to_lidar(*of_box, self.tables.scans(self.ids[i], 1)[0]), tuple(names[k] for k in kept)

    def names(self, i: int) -> tuple[str, ...]:
        """The classes of the frame's labels: what `balanced_indices` asks for. No point is read. As in OpenPCDet labels that only
        the radar hit count here (unless min_points is 0: then all do), though `boxes` leaves them out."""
        rows, columns = self.tables.rows(self.ids[i]), self.tables.columns
        hit = columns["annotation_lidar_points"][rows] + columns["annotation_radar_points"][rows] > 0
        return tuple(name for name, seen in zip(self.tables.classes(rows), hit) if name and (seen or not self.min_points))

    def scenes(self) -> np.ndarray:
        """(len,) number of the scene of each frame."""
        return self.tables.columns["sample_scene"][[self.tables.row(id) for id in self.ids]]

    def submission(self, found: dict[str, tuple]) -> dict:
        """Detections {id: (boxes (n, 9), scores (n,), n classes)} as the official results file: in the global frame."""
        results = {}
        for token, (boxes, scores, names) in found.items():
            centre, size, rotation, velocity = boxes_to_global(boxes, self.tables.scans(token, 1)[0])
            columns = (centre.tolist(), size.tolist(), rotation.tolist(), velocity[:, :2].tolist(), scores.tolist(), names)
            results[token] = [
                {"sample_token": token, "translation": c, "size": s, "rotation": r, "velocity": v, "detection_name": name,
                 "detection_score": score, "attribute_name": attribute_of(name, float(np.hypot(*v)))}
                for c, s, r, v, score, name in zip(*columns)]  # fmt: skip
        meta = {f"use_{sensor}": sensor == "lidar" for sensor in ("camera", "lidar", "radar", "map", "external")}
        return {"meta": meta, "results": results}

    def _check_files(self, hint: bool) -> None:
        """Every scan of every frame has its file. One listing a folder: 300,000 questions are slow on a network disk."""
        here: dict[str, set[str]] = {}
        needed, missing, complete = set(), {}, []  # missing: a dict keeps the order
        for id in self.ids:
            files = [scan.file for scan in self.tables.scans(id, self.sweeps)]
            needed.update(files)
            lost = []
            for file in files:
                folder, _, name = file.rpartition("/")
                if folder not in here:
                    path = self.root / folder
                    here[folder] = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
                lost += [file] * (name not in here[folder])
            missing |= dict.fromkeys(lost)
            complete += [id] * (not lost)
        if missing:
            some = ",".join(complete[:3]) + ",..." * (len(complete) > 3)
            advice = f"; {len(complete)} samples have all: --frames {some}" if some and hint else ""
            advice += f", or whole scenes: python -m data.nuscenes {self.root} --splits" if len(complete) > 3 and hint else ""
            raise InputError(f"{self.root}: expected {len(needed)} clouds, found {len(needed) - len(missing)} (missing: "
                             f"{', '.join(list(missing)[:3])}{', ...' * (len(missing) > 3)}){advice}")  # fmt: skip


# ------------------------------------------------------------------ poses


def rotation_matrix(q: np.ndarray) -> np.ndarray:
    """(..., 4) quaternions w, x, y, z of any length but 0 -> (..., 3, 3), float64; q and -q are the same rotation."""
    q = np.asarray(q, dtype=np.float64)
    w, x, y, z = np.moveaxis(q / np.linalg.norm(q, axis=-1, keepdims=True), -1, 0)
    rows = [[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]]  # fmt: skip
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def quaternion_product(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """(..., 4) x (..., 4) -> (..., 4): first turn by q, then by p."""
    (a, b, c, d), (w, x, y, z) = (np.moveaxis(np.asarray(r, dtype=np.float64), -1, 0) for r in (p, q))
    return np.stack([a * w - b * x - c * y - d * z, a * x + b * w + c * z - d * y,
                     a * y - b * z + c * w + d * x, a * z + b * y - c * x + d * w], axis=-1)  # fmt: skip


def lidar_to_global(scan: Scan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pose of the sensor in the world: rotation matrix (3, 3), translation (3,), quaternion (4,)."""
    ego = rotation_matrix(scan.ego_rotation)
    rotation = ego @ rotation_matrix(scan.sensor_rotation)
    quaternion = quaternion_product(scan.ego_rotation, scan.sensor_rotation)
    return rotation, ego @ scan.sensor_translation + scan.ego_translation, quaternion / np.linalg.norm(quaternion)


def move(xyz: np.ndarray, source: Scan, target: Scan) -> np.ndarray:
    """(n, 3) m in the sensor's frame at `source` -> (n, 3) float64 in that at `target`: over the vehicle and the world.
    Objects that moved meanwhile leave a trail; the time lag tells the network of it."""
    (rotation, origin, _), (rotation_t, origin_t, _) = lidar_to_global(source), lidar_to_global(target)
    chain = rotation_t.T @ rotation  # (3, 3)
    # einsum: a matrix product would start BLAS threads in every loader process
    return np.einsum("nj,ij->ni", xyz.astype(np.float64), chain) + rotation_t.T @ (origin - origin_t)


def boxes_to_lidar(translation: np.ndarray, size: np.ndarray, rotation: np.ndarray, velocity: np.ndarray,
                   key: Scan) -> np.ndarray:  # fmt: skip
    """Labels in the global frame -> (M, 9) float64 boxes in the frame of the key frame's LIDAR_TOP.

    translation (M, 3) m, size (M, 3) WIDTH, LENGTH, height, rotation (M, 4) quaternions, velocity (M, 3) or (M, 2) m/s,
    NaN where unknown. A box keeps the yaw of its x axis; what is left of roll and pitch (the vehicle's) is dropped.
    """
    r, origin, _ = lidar_to_global(key)
    front = np.einsum("ji,mj->mi", r, rotation_matrix(rotation)[:, :, 0])  # (M, 3), where each box's x axis points
    velocity = np.pad(np.asarray(velocity, dtype=np.float64), ((0, 0), (0, 3 - np.shape(velocity)[1])))
    centre, velocity = (np.einsum("ji,mj->mi", r, v) for v in (translation - origin, velocity))
    yaw = np.arctan2(front[:, 1], front[:, 0])
    return np.concatenate([centre, size[:, [1, 0, 2]], yaw[:, None], velocity[:, :2]], axis=1)


def boxes_to_global(boxes: np.ndarray, key: Scan) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(M, 9) boxes in LIDAR_TOP's frame -> translation (M, 3), size (M, 3), rotation (M, 4), velocity (M, 3): float64, the
    inverse of `boxes_to_lidar`. A results file wants vx, vy of the velocity: velocity[:, :2]."""
    boxes = np.asarray(boxes, dtype=np.float64)
    r, origin, quaternion = lidar_to_global(key)
    half, zero = boxes[:, 6] / 2, np.zeros(len(boxes))
    turn = np.stack([np.cos(half), zero, zero, np.sin(half)], axis=1)  # (M, 4), about z
    velocity = np.einsum("ij,mj->mi", r[:, :2], boxes[:, 7:9])
    return (np.einsum("ij,mj->mi", r, boxes[:, :3]) + origin, boxes[:, [4, 3, 5]],
            quaternion_product(quaternion, turn), velocity)  # fmt: skip


# ------------------------------------------------------------------ results


def attribute_of(name: str, speed: float) -> str:
    """The attribute that goes with a detection class at a speed in m/s: OpenPCDet's rule, the commonest otherwise."""
    if name in ("barrier", "traffic_cone"):
        return ""
    if name == "pedestrian":
        return "pedestrian.moving" if speed > MOVING else "pedestrian.standing"
    if name in ("bicycle", "motorcycle"):
        return "cycle.with_rider" if speed > MOVING else "cycle.without_rider"
    return "vehicle.moving" if speed > MOVING else "vehicle.stopped" if name == "bus" else "vehicle.parked"


# ------------------------------------------------------------------ class balancing


def balanced_indices(rng: np.random.Generator, present: Sequence[Sequence[str]], classes: Sequence[str]) -> np.ndarray:
    """CBGS: which frames to train on, int64, some of them several times, so that every class is in as many draws.

    present: the class names in each frame. Of the frames that show class c, so many are drawn with replacement that each
    class gets the same share of as many draws as there are (frame, class) pairs: about four times the frames of nuScenes.
    Source: Zhu et al. 2019, arXiv 1908.09492, as OpenPCDet does it. The draws come class by class: shuffle them.
    """
    of_class = [np.array([i for i, names in enumerate(present) if c in names], dtype=np.int64) for c in classes]
    pairs = sum(map(len, of_class))
    # Written as the reference rounds it: its int() turns a quotient just below a whole number into one less.
    draws = [int(len(frames) * ((1 / len(classes)) / (len(frames) / pairs))) if len(frames) else 0 for frames in of_class]
    return np.concatenate([rng.choice(frames, n) if n else frames[:0] for frames, n in zip(of_class, draws)])


# ------------------------------------------------------------------ what a root holds


def broken_clouds(tables: Tables, sweeps: int) -> dict[str, list[str]]:
    """{scene: what is wrong with the clouds of its samples}: missing, empty, or of a size that holds no whole points."""
    from tqdm import tqdm

    scene, wrong = dict(zip(tables.samples, tables.scene_of(tables.samples), strict=True)), {}
    seen = {scan.file: id for id in tables.samples for scan in tables.scans(id, sweeps)}
    for file, id in tqdm(seen.items(), desc="looking at clouds", unit="file", leave=False, disable=None):
        path = tables.root / file
        size = path.stat().st_size if path.is_file() else None
        if not size or size % (4 * COLUMNS):
            wrong.setdefault(scene[id], []).append(f"{file}: " + ("missing" if size is None else f"{size} bytes"))
    return wrong


def main() -> None:
    """`python -m data.nuscenes ROOT`: a table, then one line for each scene with problems; status 1 if there is any."""
    parser = ArgumentParser(prog="python -m data.nuscenes", description="What a nuScenes root holds, problems too.")
    parser.add_argument("root", help="the folder that holds samples/, sweeps/ and the tables' folder")
    parser.add_argument("--version", default="v1.0-trainval", metavar="V", help="which tables [%(default)s]")
    parser.add_argument("--sweeps", type=int, default=10, metavar="X", help="scans of a frame that are looked for [%(default)s]")
    parser.add_argument("--splits", action="store_true", help="of a download in parts: write ROOT/splits.json, so that "
                        "train and val of v1.0-trainval are their scenes without problems")  # fmt: skip
    args = parser.parse_args()
    if args.splits and args.version != "v1.0-trainval":
        raise InputError(f"--splits: expected --version v1.0-trainval, which comes in parts; found {args.version}")
    tables = Tables(args.root, args.version)
    wrong = broken_clouds(tables, max(1, args.sweeps))
    whole = [name for name in tables.scenes if name not in wrong]
    print(f"{tables.root}: {len(tables.samples)} samples, {len(whole)} of {len(tables.scenes)} scenes without problems")
    print(f"{'class':<22}{'objects':>9}{'without points':>16}{'points (median)':>17}")
    kinds, hits = np.array(tables.classes(slice(None)), dtype=object), tables.columns["annotation_lidar_points"]
    for name in sorted(set(CLASS_OF.values()), key=lambda name: -(kinds == name).sum()):
        points = hits[kinds == name]
        print(f"{name:<22}{len(points):>9}{(points == 0).sum():>16}{np.median(points) if len(points) else 0:>17.0f}")
    for name, found in wrong.items():
        print(f"problem: {name}: {len(found)} clouds, {'; '.join(found[:2])}{'; ...' * (len(found) > 2)}")
    print("no problems found" if not wrong else f"{len(wrong)} scenes have problems")
    if args.splits:
        chosen = {"train": [name for name in whole if name not in SCENES["val"]],
                  "val": [name for name in whole if name in SCENES["val"]]}  # fmt: skip
        from evaluate import write_json

        path = tables.root / "splits.json"
        write_json(path, (json.loads(path.read_bytes()) if path.is_file() else {}) | chosen)  # other names are the user's own
        print(f"{path}: " + ", ".join(f"{len(found)} scenes of {split}" for split, found in chosen.items()))
    raise SystemExit(bool(wrong) and not args.splits)


if __name__ == "__main__":
    run_cli(main)
