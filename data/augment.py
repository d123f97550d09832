"""Augmentation: pure functions of (frame, rng), in the order the field uses: paste, flip, rotate, scale.

(reads after: kitti.py  next: batch.py)  A frame is never changed, a new one is returned; the random generator is the
caller's, default_rng((seed, epoch, index)), so a frame of an epoch is augmented the same way on every machine.
dims: N points · M boxes (M, 7), or (M, 9) with velocities vx, vy, which turn and grow with the world
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import boxes as box_ops
from config import InputError
from data import Frame


def augment(frame: Frame, rng: np.random.Generator, database: "ObjectDatabase | None", counts: dict[str, int],
            flip: bool, rotation: float, scaling: tuple[float, float]) -> Frame:  # fmt: skip
    """Ground-truth paste, mirror, rotation in +- `rotation` rad, scaling in `scaling`: SECOND's recipe and order."""
    if database is not None and counts:
        frame = paste(frame, rng, database, counts)
    if flip:
        frame = flip_y(frame, rng)
    if rotation:
        frame = rotate(frame, rng, rotation)
    return scale(frame, rng, *scaling)


def flip_y(frame: Frame, rng: np.random.Generator, probability: float = 0.5) -> Frame:
    """Mirror left and right: y, yaw and vy change sign."""
    if rng.random() >= probability:
        return frame
    points, boxes = frame.points.copy(), frame.boxes.copy()
    points[:, 1] *= -1
    boxes[:, 1] *= -1
    boxes[:, 6] *= -1
    boxes[:, 8:9] *= -1
    return replace(frame, points=points, boxes=boxes)


def rotate(frame: Frame, rng: np.random.Generator, limit: float) -> Frame:
    """Turn the world about the sensor by an angle uniform in +- limit (rad); yaw stays in [-pi, pi)."""
    angle = rng.uniform(-limit, limit)
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, sin], [-sin, cos]], dtype=np.float32)  # for row vectors
    points, boxes = frame.points.copy(), frame.boxes.copy()
    points[:, :2] = points[:, :2] @ turn
    boxes[:, :2] = boxes[:, :2] @ turn
    boxes[:, 6] = box_ops.wrap_angle(boxes[:, 6] + angle)
    velocities = boxes.shape[1] - 7  # 0 or 2
    boxes[:, 7:] = boxes[:, 7:] @ turn[:velocities, :velocities]
    return replace(frame, points=points, boxes=boxes)


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
    """Labelled objects cut out of the training frames: their boxes and the points inside."""

    names: np.ndarray  # (n,) str
    boxes: np.ndarray  # (n, 7 or 9) float32
    begin: np.ndarray  # (n + 1,) int64: object i has points[begin[i] : begin[i + 1]]
    points: np.ndarray  # (P, F) float32

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def build(cls, frames: Sequence[Frame], classes: Sequence[str], min_points: int = 5) -> "ObjectDatabase":
        """Every object of `classes` with at least `min_points` points. Raises InputError when there is none."""
        names, boxes, points = [], [], []
        for i in range(len(frames)):
            frame = frames[i]
            inside = _inside(frame.points, frame.boxes)  # (N, M)
            for k, name in enumerate(frame.names):
                if name in classes and inside[:, k].sum() >= min_points:
                    names.append(name)
                    boxes.append(frame.boxes[k])
                    points.append(frame.points[inside[:, k]])
        if not names:
            raise InputError(f"ground-truth paste: no object of {', '.join(classes)} has {min_points} points; use --paste"
                             f" {','.join('0' * len(classes))}")  # fmt: skip
        begin = np.cumsum([0] + [len(p) for p in points])
        return cls(np.array(names), np.stack(boxes), begin, np.concatenate(points))

    def save(self, path: Path) -> None:
        """One .npz, written under a temporary name and moved into place."""
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with open(temporary, "wb") as file:
            np.savez(file, names=self.names, boxes=self.boxes, begin=self.begin, points=self.points)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> "ObjectDatabase":
        """Raises InputError when the file is not one that `save` wrote."""
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls(file["names"], file["boxes"], file["begin"], file["points"])
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise InputError(f"{path}: expected an object database, found {error}; delete it to have it rebuilt") from None


def paste(frame: Frame, rng: np.random.Generator, database: ObjectDatabase, counts: dict[str, int]) -> Frame:
    """Add objects of other frames where they stood there, until each class has `counts` of them in the scene.

    A candidate that overlaps, from above, any object of the scene (of any class) or one pasted before is dropped. The
    scene's own points inside a pasted box are removed: the object would have hidden them.
    """
    wanted = [k for name, count in counts.items() for k in _draw(rng, database, name, count - frame.names.count(name))]
    if not wanted:
        return frame
    candidates = database.boxes[wanted]
    every = torch.from_numpy(np.concatenate([frame.boxes, candidates]).astype(np.float64))
    clash = (box_ops.overlap_bev(every, every) > 0).numpy()
    chosen = list(range(len(frame.boxes)))  # rows of `every`
    for row in range(len(frame.boxes), len(every)):
        if not clash[row, chosen].any():
            chosen.append(row)
    taken = [wanted[row - len(frame.boxes)] for row in chosen[len(frame.boxes) :]]
    if not taken:
        return frame
    hidden = _inside(frame.points, database.boxes[taken]).any(axis=1)
    points = [frame.points[~hidden]] + [database.points[database.begin[k] : database.begin[k + 1]] for k in taken]
    return replace(frame, points=np.concatenate(points), boxes=np.concatenate([frame.boxes, database.boxes[taken]]),
                   names=frame.names + tuple(database.names[taken].tolist()))  # fmt: skip


def _draw(rng: np.random.Generator, database: ObjectDatabase, name: str, count: int) -> list[int]:
    of_class = np.flatnonzero(database.names == name)
    return rng.permutation(of_class)[: max(0, count)].tolist()


def _inside(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(N, M) bool, computed in float64."""
    xyz = torch.from_numpy(points[:, :3].astype(np.float64))
    return box_ops.points_in_boxes(xyz, torch.from_numpy(boxes.astype(np.float64))).numpy()
