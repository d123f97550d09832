"""KITTI's files <-> arrays: labels, results, calibration, clouds.   (reads after: boxes.py; next: kitti.py)

Three frames of reference meet here:

    LiDAR   x forward, y left, z up       points; boxes of a `Frame`: CENTRE, yaw counter-clockwise from +x
    camera  x right, y down, z forward    labels: rectified camera, BOTTOM centre, rotation_y about the y axis
    image   u right, v down, pixels       2D boxes; and the crop: only what the image shows has been labelled

Errors name the file and line, what was expected and what was found. dims: N points · n lines of a file
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from cli import InputError, did_you_mean, write_text

TYPES = ("Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc", "DontCare")
COLUMNS = (
    "type truncation occlusion alpha left top right bottom height width length x y z rotation_y score".split()
)


@dataclass(frozen=True)
class Objects:
    """The lines of one label or result file as arrays: KITTI's own columns, units and frame of reference."""

    type: np.ndarray  # (n,) str
    truncation: np.ndarray  # (n,) float64, 0 wholly inside the image .. 1; -1 unknown
    occlusion: np.ndarray  # (n,) int64, 0 visible, 1 partly, 2 largely occluded, 3 unknown; -1 not given
    alpha: np.ndarray  # (n,) rad: rotation_y as seen along the ray to the object; -10 not given
    bbox: np.ndarray  # (n, 4) px: left, top, right, bottom
    dimensions: np.ndarray  # (n, 3) m: height, width, length
    location: np.ndarray  # (n, 3) m: BOTTOM centre, rectified camera
    rotation_y: np.ndarray  # (n,) rad
    score: np.ndarray  # (n,) float64; NaN in labels

    def __len__(self) -> int:
        return len(self.type)

    def __getitem__(self, index: np.ndarray | slice) -> "Objects":
        """The objects that a mask, an index array or a slice selects."""
        return Objects(*(getattr(self, field.name)[index] for field in fields(self)))


def read_objects(path: str | Path, scored: bool) -> Objects:
    """Read a label file (15 columns) or, if `scored`, a result file (16). An empty file has no objects.

    Raises InputError "FILE:LINE: expected ..., found ..." for a wrong number of columns or a column that is not
    a finite number; in labels also for an unknown type or a box without volume. Results are the detector's own
    affair: the official evaluator skips other classes, and a 2D detector has no sizes to give.
    """
    types, rows = [], []
    for number, words in lines_of(path):
        here = f"{path}:{number}"
        if len(words) != 15 + scored:
            kind = "a result: the last is the score" if scored else "a label"
            raise InputError(f"{here}: expected {15 + scored} columns ({kind}), found {len(words)}")
        row = [_number(word, f"{here}, column {i} ({COLUMNS[i - 1]})") for i, word in enumerate(words[1:], 2)]
        if not row[1].is_integer():
            raise InputError(f"{here}, column 3 (occlusion): expected an integer, found {words[2]}")
        if not scored and words[0] not in TYPES:
            raise InputError(f"{here}: expected a type, found {words[0]!r}{did_you_mean(words[0], TYPES)}")
        if not scored and words[0] != "DontCare" and min(row[7:10]) <= 0:
            raise InputError(f"{here}: expected height, width, length > 0, found {' '.join(words[8:11])}")
        types.append(words[0])
        rows.append(row if scored else [*row, np.nan])
    return _objects(types, rows)


def _objects(types: list[str], rows: list[list[float]]) -> Objects:
    """Type words and the 15 numbers behind each -> Objects."""
    t = np.array(rows, dtype=np.float64).reshape(-1, 15)
    occlusion = t[:, 1].astype(np.int64)
    return Objects(np.array(types, dtype=str), t[:, 0], occlusion, t[:, 2], t[:, 3:7], t[:, 7:10],
                   t[:, 10:13], t[:, 13], t[:, 14])  # fmt: skip


def no_objects() -> Objects:
    """What an empty label file holds."""
    return _objects([], [])


def write_objects(path: str | Path, objects: Objects) -> None:
    """Write a label file (no object has a score: 15 columns, 2 decimals) or a result file (16 columns, 4)."""
    unscored = np.isnan(objects.score)
    if unscored.any() and not unscored.all():
        raise ValueError("some objects have a score and some have none: neither labels nor results")
    lines = []
    for i, name in enumerate(objects.type):
        decimals = ".2f" if unscored[i] else ".4f"
        # The unknown is written bare: -1 for a result's truncation, all but the 2D box of a DontCare.
        short = "g" if name == "DontCare" else decimals
        truncation = format(objects.truncation[i], short if unscored[i] else "g")
        words = [name, truncation, str(objects.occlusion[i]), format(objects.alpha[i], short)]
        words += [format(pixel, decimals) for pixel in objects.bbox[i]]
        metres = [*objects.dimensions[i], *objects.location[i], objects.rotation_y[i]]
        words += [format(value, short) for value in metres]
        # Eight decimals: two float32 scores that differ should not become a tie.
        lines.append(" ".join(words) + ("\n" if unscored[i] else f" {objects.score[i]:.8f}\n"))
    write_text(Path(path), "".join(lines))


@dataclass(frozen=True)
class Calibration:
    """The chain LiDAR -> reference camera -> rectified camera -> pixels of the left colour camera."""

    p2: np.ndarray  # (3, 4) float64: rectified camera -> homogeneous pixels
    r0_rect: np.ndarray  # (3, 3): reference camera -> rectified camera
    tr_velo_to_cam: np.ndarray  # (3, 4): LiDAR -> reference camera

    def lidar_to_camera(self, xyz: np.ndarray) -> np.ndarray:
        """(n, 3) m in the LiDAR frame -> (n, 3) m in the rectified camera frame."""
        chain = self.r0_rect @ self.tr_velo_to_cam  # (3, 4)
        return _matmul(np.asarray(xyz, dtype=np.float64), chain[:, :3]) + chain[:, 3]

    def camera_to_lidar(self, xyz: np.ndarray) -> np.ndarray:
        """The inverse of `lidar_to_camera`."""
        chain = self.r0_rect @ self.tr_velo_to_cam
        return _matmul(np.asarray(xyz, dtype=np.float64) - chain[:, 3], np.linalg.inv(chain[:, :3]))

    def project(self, xyz: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n, 3) m in the rectified camera frame -> (n, 2) px (u, v), and (n,) depth in m; the pixels mean
        nothing where depth <= 0, behind the camera."""
        xyz = np.asarray(xyz, dtype=np.float64)
        homogeneous = _matmul(xyz, self.p2[:, :3]) + self.p2[:, 3]  # (n, 3)
        with np.errstate(divide="ignore", invalid="ignore"):
            return homogeneous[:, :2] / homogeneous[:, 2:], xyz[:, 2]


def _matmul(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """rows @ matrix.T without BLAS: on (100,000, 3) its threads cost more than they bring, and where every
    loader process starts some of its own, ten times as much as the rest of reading a frame."""
    return np.einsum("nj,ij->ni", rows, matrix)


def read_calibration(path: str | Path) -> Calibration:
    """Read P2, R0_rect and Tr_velo_to_cam of a calib file. Raises InputError naming the file and the line."""
    shapes = {"P2": (3, 4), "R0_rect": (3, 3), "Tr_velo_to_cam": (3, 4)}
    found: dict[str, np.ndarray] = {}
    lines = lines_of(path)
    for number, (key, *words) in lines:
        name, here = key.rstrip(":"), f"{path}:{number}"
        if name in shapes:
            size = shapes[name][0] * shapes[name][1]
            if len(words) != size:
                raise InputError(f"{here}: expected {size} values of {name}, found {len(words)}")
            values = [_number(word, f"{here}, value {i} of {name}") for i, word in enumerate(words, 1)]
            found[name] = np.array(values, dtype=np.float64).reshape(shapes[name])
            if abs(np.linalg.det(found[name][:, :3])) < 1e-6:
                raise InputError(f"{here}: expected an invertible matrix {name}, found one of determinant 0")
    for name in shapes:
        if name not in found:
            keys = ", ".join(words[0].rstrip(":") for _, words in lines)
            raise InputError(f"{path}: expected a line '{name}: ...', found {keys or 'an empty file'}")
    return Calibration(*(found[name] for name in shapes))


def write_calibration(path: str | Path, calib: Calibration) -> None:
    """Write a calib file of the official layout. Our one camera stands for all four: nobody reads but P2."""
    matrices = {f"P{i}": calib.p2 for i in range(4)}
    matrices |= {
        "R0_rect": calib.r0_rect,
        "Tr_velo_to_cam": calib.tr_velo_to_cam,
        "Tr_imu_to_velo": np.eye(3, 4),
    }
    lines = [f"{name}: {' '.join(f'{value:.12e}' for value in matrices[name].flat)}\n" for name in matrices]
    write_text(Path(path), "".join(lines))


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def lines_of(path: str | Path) -> list[tuple[int, list[str]]]:
    """(line number from 1, words) of every line that is not blank."""
    text = _read(path).decode("utf-8", errors="replace")
    return [(number, line.split()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _number(word: str, what: str) -> float:
    """A finite number, or an InputError that says which value of which line is none."""
    try:
        value = float(word)
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise InputError(f"{what}: expected a number, found {word!r}")
    return value


def boxes_from_objects(objects: Objects, calib: Calibration) -> np.ndarray:
    """Objects -> (n, 7) float64 LiDAR boxes. As in OpenPCDet, the bottom centre goes to the LiDAR frame first
    and is raised there by half the height: the two frames' verticals differ by about a degree."""
    height, width, length = objects.dimensions.T
    x, y, z = calib.camera_to_lidar(objects.location).T
    yaw = _wrap(-objects.rotation_y - np.pi / 2)  # rotation_y is clockwise seen from above, 0 = to the right
    return np.stack([x, y, z + height / 2, length, width, height, yaw], axis=1)


def objects_from_boxes(boxes: np.ndarray, names: Sequence[str], scores: np.ndarray | None, calib: Calibration,
                       image_size: tuple[int, int]) -> Objects:  # fmt: skip
    """(n, >=7) LiDAR boxes -> Objects, the inverse of `boxes_from_objects`; image_size is (width, height) px.

    The 2D box is the one around the projected 3D box, clipped to the image. Objects that are not in the image
    are left out. Truncation and occlusion are -1 (unknown); scores None means labels (NaN).
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(len(names), -1 if len(names) else 7)
    length, width, height = boxes[:, 3:6].T
    location = calib.lidar_to_camera(boxes[:, :3] - height[:, None] / 2 * [0, 0, 1])
    dimensions, rotation_y = np.stack([height, width, length], axis=1), _wrap(-boxes[:, 6] - np.pi / 2)
    alpha = _wrap(rotation_y - np.arctan2(location[:, 0], location[:, 2]))
    last_pixel = np.array([*image_size, *image_size]) - 1
    bbox = np.clip(image_boxes(location, dimensions, rotation_y, calib), 0, last_pixel)
    seen = (bbox[:, 2] > bbox[:, 0]) & (bbox[:, 3] > bbox[:, 1])  # False for NaN, that is behind the camera
    scores = np.full(len(boxes), np.nan) if scores is None else np.asarray(scores, dtype=np.float64)
    unknown = np.full(len(boxes), -1)
    return Objects(np.array(names, dtype=str), unknown.astype(np.float64), unknown, alpha, bbox, dimensions,
                   location, rotation_y, scores)[seen]  # fmt: skip


def image_boxes(location: np.ndarray, dimensions: np.ndarray, rotation_y: np.ndarray,
                calib: Calibration) -> np.ndarray:  # fmt: skip
    """Columns of Objects -> (n, 4) px: left, top, right, bottom of the projected 3D boxes, NOT clipped to the
    image; NaN for a box wholly behind the camera."""
    height, width, length = dimensions.T[..., None]  # (n, 1)
    front, side, up = np.array([[i & 1, i >> 1 & 1, i >> 2] for i in range(8)]).T  # a corner is three bits
    along, across = (front - 0.5) * length, (side - 0.5) * width  # (n, 8)
    cos, sin = np.cos(rotation_y)[:, None], np.sin(rotation_y)[:, None]
    offset = [along * cos + across * sin, -up * height, across * cos - along * sin]
    corners = location[:, None] + np.stack(offset, axis=-1)  # (n, 8, 3)
    # DIFFERS: OpenPCDet projects corners behind the camera too, though they have no picture. Here what is left
    # of such a box ends where its edges, between corners that differ in one bit, cross the near plane.
    near = 0.1  # m
    first, second = np.array([(i, i | bit) for bit in (1, 2, 4) for i in range(8) if not i & bit]).T
    a, b = corners[:, first], corners[:, second]  # (n, 12, 3)
    crosses = (a[..., 2:] < near) != (b[..., 2:] < near)  # (n, 12, 1)
    cuts = a + (b - a) * (near - a[..., 2:]) / np.where(crosses, b[..., 2:] - a[..., 2:], 1)
    shown = np.concatenate([corners[..., 2:] >= near, crosses], axis=1)  # (n, 20, 1)
    pixels = calib.project(np.concatenate([corners, cuts], axis=1).reshape(-1, 3))[0].reshape(-1, 20, 2)
    low, high = np.where(shown, pixels, np.inf).min(axis=1), np.where(shown, pixels, -np.inf).max(axis=1)
    return np.where(shown.any(axis=1), np.concatenate([low, high], axis=1), np.nan)


def read_cloud(path: str | Path, columns: int) -> tuple[np.ndarray, int]:
    """(N, 4) float32 x, y, z, intensity, the first of a file's `columns` (KITTI 4, nuScenes 5); and how many points were left
    out (not finite). Raises InputError when the file cannot be read or does not hold whole points."""
    data, size = _read(path), 4 * columns
    if len(data) % size:
        raise InputError(f"{path}: expected {size} bytes a point ({columns} float32), found {len(data)} bytes: broken?")
    points = np.frombuffer(data, dtype="<f4").reshape(-1, columns)[:, :4]
    finite = np.isfinite(points)
    if finite.all():  # as in every sound file; asking row by row takes ten times as long
        return points.copy(), 0
    finite = finite.all(axis=1)
    return points[finite], int((~finite).sum())


def image_size(root: str | Path, id: str, folder: str = "training") -> tuple[int, int]:  # noqa: A002
    """(width, height) px from the header of a frame's PNG; without one the commonest, (1242, 375)."""
    path = Path(root) / folder / "image_2" / f"{id}.png"
    if not path.is_file():
        return 1242, 375
    with path.open("rb") as file:
        header = file.read(24)
    if len(header) < 24 or header[:8] != b"\x89PNG\r\n\x1a\n":
        raise InputError(f"{path}: expected a PNG image, found something else")
    return struct.unpack(">II", header[16:])


def _wrap(angle: np.ndarray) -> np.ndarray:
    """The same angle in [-pi, pi): boxes.wrap_angle, without importing torch for a label file."""
    return (angle + np.pi) % (2 * np.pi) - np.pi
