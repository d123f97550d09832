"""A simulated KITTI root: single frames, as a 64-beam scanner sees them.

(after: scanner.py, kitti_files.py; next: shapes_nuscenes.py)

By default the scanner looks at the camera's sector only, 45 degrees to both sides, because KITTI labels nothing
else and its loaders crop the cloud to the image anyway; `full_circle` writes whole turns. KITTI has about 4
cars, 0.6 pedestrians and 0.2 cyclists in a frame; these have 6, 4 and 3, since the demo has few frames. Every
frame is a function of (seed, split, index).

Labels follow KITTI's definitions. 2D box: around the projected 3D box, clipped to the image. Truncation: the
share of that box's area outside the image. Occlusion: from the share v of the rays towards the object that
reach it: 0 for v >= 0.8, 1 for v >= 0.4, else 2. DontCare: objects with v < 0.1 or fewer than 5 points in the
image, as one region where their 2D boxes overlap; objects without a point in the image are not labelled.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from cli import InputError, write_bytes, write_text
from data.kitti_files import (
    Calibration,
    Objects,
    image_boxes,
    objects_from_boxes,
    write_calibration,
    write_objects,
)
from data.scanner import HDL64E, Scan, scan
from data.scenes import Scene, make_scene
from data.simulate import begin, run

VERSION = 2  # raised whenever the same settings give other frames
IMAGE = (1242, 375)  # px
SECTOR = 45.0  # half of the camera's sector with a margin, degrees
FEW_POINTS, HIDDEN = 5, 0.1  # below these an object is DontCare


def turn(x: float, y: float, z: float) -> np.ndarray:
    """Rotation by small angles about the three axes, rad."""
    cx, sx, cy, sy, cz, sz = (f(a) for a in (x, y, z) for f in (np.cos, np.sin))
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    return np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]]) @ about_y @ about_x


# KITTI's left colour camera; the LiDAR sits 0.27 m behind it and 0.08 m above, and, as in a real car,
# neither the mounting nor the rectification is exactly straight: a transformation left out or inverted must
# not cancel by luck.
AXES = np.array([[0.0, -1, 0], [0, 0, -1], [1, 0, 0]])  # LiDAR axes -> camera axes
CALIBRATION = Calibration(
    p2=np.array(
        [[721.5377, 0, 609.5593, 44.85728], [0, 721.5377, 172.854, 0.2163791], [0, 0, 1, 0.002745884]]
    ),
    r0_rect=turn(0.0043, -0.0074, -0.0099),
    tr_velo_to_cam=np.c_[turn(-0.0146, 0.0007, 0.0075) @ AXES, [-0.004, -0.076, -0.272]],
)


def dont_care(boxes: np.ndarray) -> Objects:
    """DontCare regions around 2D boxes (n, 4) px; those that overlap become one, as KITTI marks groups."""
    groups: list[np.ndarray] = []
    for box in boxes:
        while True:  # the union may touch further groups
            touching = [g for g in groups if (box[:2] < g[2:]).all() and (g[:2] < box[2:]).all()]
            if not touching:
                break
            groups = [g for g in groups if all(g is not t for t in touching)]
            box = np.r_[np.min([box, *touching], 0)[:2], np.max([box, *touching], 0)[2:]]
        groups.append(box)
    n = len(groups)
    minus = np.full(n, -1)
    return Objects(
        np.full(n, "DontCare"), minus.astype(float), minus, np.full(n, -10.0), np.array(groups).reshape(n, 4),
        np.full((n, 3), -1.0), np.full((n, 3), -1000.0), np.full(n, -10.0), np.full(n, np.nan),
    )  # fmt: skip


def label(scene: Scene, seen: Scan, calib: Calibration) -> Objects:
    """The label file of a frame: what an annotator could see, in KITTI's columns, DontCare last."""
    pixels, depth = calib.project(calib.lidar_to_camera(seen.points[:, :3]))
    inside = (depth > 0) & (pixels >= 0).all(1) & (pixels < IMAGE).all(1)
    counted = seen.owner[inside & (seen.owner >= 0)]
    points = np.bincount(counted, minlength=len(scene.names))
    share = seen.visible / np.maximum(seen.alone, 1)
    rows = np.flatnonzero(points > 0)
    # Row numbers go in as names and come out of the objects that have a 2D box in the image
    objects = objects_from_boxes(scene.boxes[rows], [str(i) for i in rows], None, calib, IMAGE)
    rows = objects.type.astype(int)
    names = np.array([scene.names[i] for i in rows], dtype=str)
    whole = image_boxes(objects.location, objects.dimensions, objects.rotation_y, calib)
    area, kept = ((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (whole, objects.bbox))
    occlusion = np.where(share[rows] >= 0.8, 0, np.where(share[rows] >= 0.4, 1, 2))
    objects = replace(objects, type=names, truncation=np.clip(1 - kept / area, 0, 1), occlusion=occlusion)
    hidden = (points[rows] < FEW_POINTS) | (share[rows] < HIDDEN)
    regions = dont_care(objects.bbox[hidden])
    both = {k: np.concatenate([v[~hidden], getattr(regions, k)]) for k, v in vars(objects).items()}
    return Objects(**both)


def make_frame(seed: int, split: int, index: int, full_circle: bool) -> tuple[np.ndarray, Objects]:
    """Points (N, 4) and labels of one frame: a function of the arguments alone."""
    rng = np.random.default_rng((seed, split, index))
    scene = make_scene(rng)
    seen = scan(scene, HDL64E if full_circle else replace(HDL64E, sector=SECTOR), rng)
    return seen.points, label(scene, seen, CALIBRATION)


def frame_files(root: Path, number: int) -> tuple[Path, Path, Path]:
    """Calibration, label and points of a frame."""
    folder, name = root / "training", f"{number:06d}"
    return (
        folder / "calib" / f"{name}.txt",
        folder / "label_2" / f"{name}.txt",
        folder / "velodyne" / f"{name}.bin",
    )


def write_frame(task: tuple[Path, int, int, int, int, bool]) -> None:
    """Make one frame and write its files, each whole or not at all."""
    root, number, *arguments = task
    points, objects = make_frame(*arguments)
    calibration, labels, cloud = frame_files(root, number)
    write_calibration(calibration, CALIBRATION)
    write_objects(labels, objects)
    write_bytes(cloud, points.astype("<f4").tobytes())


def simulate_kitti(out: str | Path, train: int = 250, val: int = 80, seed: int = 0, workers: int = 0, full_circle: bool = False,
                   progress: bool = True) -> Path:  # fmt: skip
    """Write a KITTI root of simulated frames, or what is missing of it; nothing is done to a complete one.

    out: a folder that is new, empty or was begun with the same settings (InputError otherwise). workers:
    processes, 0 = one per core. Frames 0 .. train-1 are the split train, the others val; trainval has both.
    """
    out = Path(out)
    if train < 0 or val < 0 or train + val < 1 or seed < 0:
        raise InputError(
            f"expected at least one frame and a seed >= 0, found train {train}, val {val}, seed {seed}"
        )
    settings = {"version": VERSION, "train": train, "val": val, "seed": seed, "full_circle": full_circle}
    begin(out, settings, ("training/velodyne", "training/label_2", "training/calib", "ImageSets"))
    jobs = [(split, index) for split, count in enumerate((train, val)) for index in range(count)]
    tasks = [
        (out, number, seed, split, index, full_circle)
        for number, (split, index) in enumerate(jobs)
        if not all(path.is_file() for path in frame_files(out, number))
    ]
    run(write_frame, tasks, workers, len(jobs), "frame" if progress else "")
    numbers = [f"{number:06d}\n" for number in range(len(jobs))]
    for name, lines in (("train", numbers[:train]), ("val", numbers[train:]), ("trainval", numbers)):
        write_text(out / "ImageSets" / f"{name}.txt", "".join(lines))
    return out
