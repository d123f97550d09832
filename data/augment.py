"""Augmentation: pure functions of (frame, rng), in the order the field uses: paste, flip, rotate, scale, shift.

(after: kitti.py; next: nuscenes_tables.py, batch.py)  A frame is never changed, a new one is returned; the random generator is
the caller's, default_rng((seed, epoch, index)), so a frame of an epoch is augmented the same way on every machine.
dims: N points · M boxes (M, 7), or (M, 9) with velocities vx, vy, which turn and grow with the world · n objects cut out
"""

import os
import shutil
import socket
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from boxes import overlap_bev, point_in_box, wrap_angle
from cli import InputError, one_line
from data import Frame


def augment(frame: Frame, rng: np.random.Generator, database: "ObjectDatabase | None", counts: dict[str, int],
            flip: bool, rotation: float, scaling: tuple[float, float], flip_both: bool = False,
            translation: float = 0.0) -> Frame:  # fmt: skip
    """Ground-truth paste, mirrors, rotation in +- `rotation` rad, scaling in `scaling`, shift: SECOND's recipe and order;
    the second mirror and the shift are CenterPoint's for nuScenes."""
    if database is not None and counts:
        frame = paste(frame, rng, database, counts)
    if flip:
        frame = flip_y(frame, rng)
    if flip_both:
        frame = flip_x(frame, rng)
    if rotation:
        frame = rotate(frame, rng, rotation)
    frame = scale(frame, rng, *scaling)
    return shift(frame, rng, translation) if translation else frame


def flip_y(frame: Frame, rng: np.random.Generator, probability: float = 0.5) -> Frame:
    """Mirror left and right: y, yaw and vy change sign."""
    return _mirror(frame, 1) if rng.random() < probability else frame


def flip_x(frame: Frame, rng: np.random.Generator, probability: float = 0.5) -> Frame:
    """Mirror front and back: x and vx change sign, yaw becomes pi - yaw."""
    return _mirror(frame, 0) if rng.random() < probability else frame


def _mirror(frame: Frame, axis: int) -> Frame:
    points, boxes = frame.points.copy(), frame.boxes.copy()
    points[:, axis] *= -1
    boxes[:, axis] *= -1
    boxes[:, 6] = wrap_angle((0 if axis == 1 else np.pi) - boxes[:, 6])
    boxes[:, 7 + axis : 8 + axis] *= -1  # the velocity, if there is one
    return replace(frame, points=points, boxes=boxes)


def shift(frame: Frame, rng: np.random.Generator, deviation: float) -> Frame:
    """Move the world by a normal random vector, `deviation` metres per axis."""
    by = rng.normal(0.0, deviation, 3).astype(np.float32)
    points, boxes = frame.points.copy(), frame.boxes.copy()
    points[:, :3] += by
    boxes[:, :3] += by
    return replace(frame, points=points, boxes=boxes)


def rotate(frame: Frame, rng: np.random.Generator, limit: float) -> Frame:
    """Turn the world about the sensor by an angle uniform in +- limit (rad), counter-clockwise from above."""
    angle = rng.uniform(-limit, limit)
    points, boxes = frame.points.copy(), frame.boxes.copy()
    points[:, :2] = _turn(frame.points[:, :2], angle)
    boxes[:, :2] = _turn(frame.boxes[:, :2], angle)
    boxes[:, 6] = wrap_angle(frame.boxes[:, 6] + angle)
    if boxes.shape[1] > 7:
        boxes[:, 7:] = _turn(frame.boxes[:, 7:], angle)
    return replace(frame, points=points, boxes=boxes)


def _turn(xy: np.ndarray, angle: float) -> np.ndarray:
    """(n, 2) -> (n, 2). Written out: a matrix product would start BLAS threads in every loader process."""
    cos, sin = np.cos(angle, dtype=np.float32), np.sin(angle, dtype=np.float32)
    x, y = xy.T
    return np.stack([cos * x - sin * y, sin * x + cos * y], axis=1)


def scale(frame: Frame, rng: np.random.Generator, low: float, high: float) -> Frame:
    """Make the world larger by a factor uniform in [low, high]: positions, sizes and velocities."""
    factor = np.float32(rng.uniform(low, high))
    points, boxes = frame.points.copy(), frame.boxes.copy()
    points[:, :3] *= factor
    boxes[:, :6] *= factor
    boxes[:, 7:] *= factor
    return replace(frame, points=points, boxes=boxes)


# ------------------------------------------------------------------ ground-truth paste


@dataclass(frozen=True)
class ObjectDatabase:
    """Labelled objects cut out of the training frames: their boxes and the points inside, where they stood."""

    folder: Path  # where they were read from
    names: np.ndarray  # (n,) str
    boxes: np.ndarray  # (n, 7 or 9) float32
    begin: np.ndarray  # (n + 1,) int64: object i has points[begin[i] : begin[i + 1]]
    points: np.ndarray  # float32, with the columns of a frame's points; a view of the file, which all processes share

    def __len__(self) -> int:
        return len(self.names)

    def __reduce__(self) -> tuple:
        """A loading process that is not forked opens the folder itself: it is not sent gigabytes, and shares them."""
        return ObjectDatabase.load, (self.folder,)

    @cached_property
    def rows(self) -> dict[str, np.ndarray]:
        """{class: its objects}."""
        return {str(name): np.flatnonzero(self.names == name) for name in np.unique(self.names)}

    @classmethod
    def build(cls, folder: Path, frames: Sequence[Frame], classes: Sequence[str], min_points: int = 5,
              workers: int = 0) -> "ObjectDatabase":  # fmt: skip
        """Every object of `classes` with at least `min_points` points, into a new folder. Where the data set grades its objects
        (`difficulty`, KITTI), those beyond its levels are left out. The points, 13 GB of nuScenes' ten sweeps, go to the disk
        as they are cut. Written under a temporary name and moved into place: nobody ever reads half of it.

        Raises InputError when no object is left, OSError when the folder cannot be written.
        """
        names, boxes, begin = [], [], [0]
        temporary = folder.with_name(f"{folder.name}.{socket.gethostname()}.{os.getpid()}.tmp")
        temporary.mkdir(parents=True)
        try:
            with open(temporary / "points.bin", "wb") as file:
                cut = DataLoader(_Cut(frames, classes, max(min_points, 1)), None, num_workers=workers, collate_fn=_as_it_is,
                                 generator=torch.Generator())  # its own: torch's global random state stays as it is  # fmt: skip
                with one_line():
                    for found in tqdm(cut, desc="cutting out objects", unit="frame", leave=False, disable=None):
                        for name, box, points in found:
                            names.append(name)
                            boxes.append(box)
                            begin.append(begin[-1] + len(points))
                            file.write(points.tobytes())
            if not names:
                raise InputError(f"ground-truth paste: expected objects ({', '.join(classes)}) of at least {min_points} points, "
                                 f"found none; switch it off with --paste 0")  # fmt: skip
            np.savez(temporary / "objects.npz", names=np.array(names), boxes=np.stack(boxes), begin=np.array(begin))
            with suppress(OSError):  # another process was first
                os.rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return cls.load(folder)

    @classmethod
    def load(cls, folder: Path) -> "ObjectDatabase":
        """Raises InputError when the folder is not one that `build` wrote."""
        try:
            with np.load(folder / "objects.npz", allow_pickle=False) as file:
                names, boxes, begin = file["names"], file["boxes"], file["begin"]
            if not len(names) == len(boxes) == len(begin) - 1:
                raise ValueError("arrays of different lengths")
            points = np.memmap(folder / "points.bin", dtype=np.float32, mode="r")
            if not begin[-1] or len(points) % begin[-1]:
                raise ValueError(f"{len(points)} numbers, not those of {begin[-1]} points")
        except (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
            raise InputError(f"{folder}: expected an object database, found {error}; delete it to have it rebuilt") from None
        return cls(folder.absolute(), names, boxes, begin, points.reshape(begin[-1], -1))


class _Cut(Dataset):
    """Of each frame the objects worth pasting: [(class, box, points inside)]."""

    def __init__(self, frames: Sequence[Frame], classes: Sequence[str], min_points: int) -> None:
        self.frames, self.classes, self.min_points = frames, classes, min_points

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, i: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
        frame = self.frames[i]
        level = self.frames.difficulty(i) if hasattr(self.frames, "difficulty") else np.zeros(len(frame.names))
        wanted = [k for k, name in enumerate(frame.names) if name in self.classes and level[k] >= 0]
        found = zip(wanted, _points_in_each(frame.points, frame.boxes[wanted]), strict=True)
        return [(frame.names[k], frame.boxes[k], frame.points[inside]) for k, inside in found if len(inside) >= self.min_points]


def _as_it_is(found: list) -> list:
    return found  # a DataLoader would make tensors of it


def paste(frame: Frame, rng: np.random.Generator, database: ObjectDatabase, counts: dict[str, int]) -> Frame:
    """Add objects of other frames where they stood there, until each class has `counts` of them in the scene.

    A candidate that overlaps, from above, any object of the scene (of any class) or one pasted before is dropped. The
    scene's own points inside a pasted box are removed: the object would have hidden them.
    """
    # DIFFERS: OpenPCDet's KITTI configs also shift an object to its new scene's ground, with road planes that are no
    # part of KITTI. Here it keeps its height, as in OpenPCDet without the planes. Of two pasted objects that overlap the
    # first stays; there both go.
    wanted = [k for name, count in counts.items() for k in _draw(rng, database, name, count - frame.names.count(name))]
    every = torch.from_numpy(np.concatenate([frame.boxes, database.boxes[wanted]]).astype(np.float64))
    clash = (overlap_bev(every, every) > 0).numpy()
    chosen = list(range(len(frame.boxes)))  # rows of `every`
    for row in range(len(frame.boxes), len(every)):
        if not clash[row, chosen].any():
            chosen.append(row)
    taken = [wanted[row - len(frame.boxes)] for row in chosen[len(frame.boxes) :]]
    free = np.ones(len(frame.points), dtype=bool)
    for inside in _points_in_each(frame.points, database.boxes[taken]):
        free[inside] = False
    points = [frame.points[free]] + [database.points[database.begin[k] : database.begin[k + 1]] for k in taken]
    return replace(frame, points=np.concatenate(points), boxes=np.concatenate([frame.boxes, database.boxes[taken]]),
                   names=frame.names + tuple(database.names[taken].tolist()))  # fmt: skip


def _draw(rng: np.random.Generator, database: ObjectDatabase, name: str, count: int) -> list[int]:
    """Up to `count` different objects of a class."""
    return rng.permutation(database.rows.get(name, np.zeros(0, dtype=np.int64)))[: max(0, count)].tolist()


def _points_in_each(points: np.ndarray, boxes: np.ndarray) -> list[np.ndarray]:
    """For each box the indices of the points in it, in their order, in float64, asked of the few points around it."""
    x, y = points[:, :2].T.copy()  # side by side in memory
    reach = np.hypot(boxes[:, 3], boxes[:, 4]) / 2 + 0.01
    near = [np.flatnonzero((np.abs(x - box[0]) <= r) & (np.abs(y - box[1]) <= r)) for box, r in zip(boxes, reach, strict=True)]
    counts = [len(rows) for rows in near]
    xyz, own = points[np.concatenate([[], *near]).astype(np.int64), :3], np.repeat(boxes, counts, axis=0)
    inside = point_in_box(*(torch.from_numpy(a.astype(np.float64)) for a in (xyz, own))).numpy()
    return [rows[mine] for rows, mine in zip(near, np.split(inside, np.cumsum(counts)[:-1]), strict=True)] if near else []
