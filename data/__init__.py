"""Data: what every loader returns.   (reads first; next: cli.py, config.py; the loaders: kitti_files.py)

Official layouts -> `Frame`, in one convention: LiDAR frame, x forward, y left, z up, metres (nuScenes mounts its sensor
a quarter turn to the right, so there y is forward); a box is
(x, y, z of the CENTRE, length, width, height, yaw), yaw counter-clockwise from +x, radians.
Your own data: KITTI's layout, or a class with `ids`, `__len__` and `__getitem__` -> Frame (what else it needs: README.md).
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Frame:
    """One LiDAR scan with its labelled objects. Its arrays are never changed in place: augmentation makes new ones."""

    id: str
    points: np.ndarray  # (N, F) float32: x, y, z, intensity in [0, 1]; nuScenes: intensity 0 .. 255, then time lag in s
    boxes: np.ndarray  # (M, 7) float32, or (M, 9) with velocity vx, vy in m/s, NaN = unknown
    names: tuple[str, ...]  # M class names as the data set writes them
    dropped: int = 0  # points with a NaN or infinite coordinate, removed while reading
