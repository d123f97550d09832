"""nuScenes' JSON tables -> arrays, without the official devkit.   (after: augment.py; next: nuscenes.py)

A root holds one folder of tables for each version (v1.0-mini, v1.0-trainval, v1.0-test). Of the 13 tables these ten are read:

    scene <- sample <- sample_annotation -> instance -> category      key frames (2 a second) and their boxes
                    |                    -> attribute
                    <- sample_data -> ego_pose                        every scan of every sensor, chained by `prev`
                                   -> calibrated_sensor -> sensor     of which only those of LIDAR_TOP are kept

Parsing 3 GB of JSON takes a minute, so what is left of it is kept as one .npz beside the tables.
Translations in metres, rotations as quaternions (w, x, y, z), times in microseconds, everything in the GLOBAL frame.
dims: S samples · L scans of LIDAR_TOP · A annotations, ordered by sample
"""

import gc
import json
import os
import re
import zipfile
from collections.abc import Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cli import InputError, did_you_mean

TABLES = "scene sample sensor calibrated_sensor sample_data ego_pose category attribute instance sample_annotation".split()
CACHE = "rdd-index.npz"  # beside the tables; may be deleted at any time
FORMAT = "rdd-index 1"  # counted up when the columns change
BLOCK = 1 << 26  # bytes of a table in memory at once

# The detection task's ten classes. Categories that are not here (animals, strollers, ...) are no class of it.
CLASS_OF = {
    "vehicle.car": "car", "vehicle.truck": "truck", "vehicle.construction": "construction_vehicle", "vehicle.trailer": "trailer",
    "vehicle.bus.bendy": "bus", "vehicle.bus.rigid": "bus", "vehicle.motorcycle": "motorcycle", "vehicle.bicycle": "bicycle",
    "movable_object.barrier": "barrier", "movable_object.trafficcone": "traffic_cone",
} | {f"human.pedestrian.{who}": "pedestrian" for who in ("adult", "child", "construction_worker", "police_officer")}  # fmt: skip
BICYCLE_RACK = "static_object.bicycle_rack"
NONE, SEVERAL = -1, -2  # in annotation_attribute, beside rows of the table attribute

# The official splits, as numbers of scenes. What v1.0-trainval holds beside val is train, v1.0-test holds nothing but test.
VERSION_OF = {"train": "trainval", "val": "trainval", "test": "test", "mini_train": "mini", "mini_val": "mini"}
_NUMBERS = {
    "val": "3 12-18 35-36 38-39 92-110 221 268-278 329-332 344-346 519-524 552-565 625-627 629-630 632-638 770-771 775 "
           "777-778 780-784 794-800 802 904-917 919-931 962-963 966-969 971-972 1059-1073",
    "mini_train": "61 553 655 757 796 1077 1094 1100", "mini_val": "103 916",
}  # fmt: skip
SCENES = {split: {f"scene-{number:04d}" for first, last in re.findall(r"(\d+)-?(\d*)", text)
                  for number in range(int(first), int(last or first) + 1)} for split, text in _NUMBERS.items()}  # fmt: skip


class Annotation(NamedTuple):
    """One labelled box of a key frame, in the GLOBAL frame."""

    token: str
    name: str | None  # one of the ten detection classes, or None
    category: str
    attribute: str  # "" = none
    translation: tuple[float, float, float]  # m, the centre
    size: tuple[float, float, float]  # m: WIDTH, LENGTH, height
    rotation: tuple[float, float, float, float]  # w, x, y, z
    velocity: tuple[float, float]  # m/s: vx, vy; NaN where the neighbours do not tell
    lidar_points: int
    radar_points: int


class Scan(NamedTuple):
    """One turn of LIDAR_TOP: sensor -> vehicle (ego) -> global, each a translation (3,) and a rotation (4,), float64."""

    file: str  # relative to the root
    time: int  # microseconds
    sensor_translation: np.ndarray
    sensor_rotation: np.ndarray
    ego_translation: np.ndarray
    ego_rotation: np.ndarray


class Tables:
    """The tables of one version. Raises InputError, naming file and token: tables of another version, a missing table or
    field, a token that no table has, a sample without LIDAR_TOP, a box with a size of zero."""

    def __init__(self, root: str | Path, version: str) -> None:
        self.root, self.version = Path(root), version
        self.folder = self.root / version
        if not self.folder.is_dir():
            others = ", ".join(sorted(path.parent.name for path in self.root.glob("*/sample.json")))
            found = others or ("no tables" if self.root.is_dir() else "no such folder")
            raise InputError(f"{self.root}: expected a nuScenes root with the tables of {version}, found {found}")
        paths = [self.folder / f"{name}.json" for name in TABLES]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise InputError(f"{self.folder}: expected the tables of {version}, missing: {', '.join(missing)}")
        stamp = np.array([FORMAT] + [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths])
        cache = self.folder / CACHE
        self.columns = _load(cache, stamp) or _save(cache, _build(self.folder) | {"stamp": stamp})
        self.samples, self._scenes, self._categories, self._attributes = (  # samples: their tokens, in the table's order
            [word.decode() for word in self.columns[name].tolist()] for name in ("sample", "scene", "category", "attribute"))
        self._row = {token: i for i, token in enumerate(self.samples)}

    def split(self, name: str) -> list[str]:
        """Sample tokens of train, val, test, mini_train, mini_val or all, in the order of the table. Own splits are files
        {split: [scene names]}: VERSION/splits.json, where the devkit looks for names that are not official, and
        ROOT/splits.json, which goes before the official lists too."""
        path = self.root / "splits.json"
        own, every = _own_splits(path), set(self._scenes)
        official = SCENES | {"train": every - SCENES["val"], "test": every, "all": every}
        known = _own_splits(self.folder / path.name) | official | own
        if name not in known:
            raise InputError(f"expected a split, found {name!r}{did_you_mean(name, known)}")
        if name in VERSION_OF and name not in own and not self.version.endswith(VERSION_OF[name]):
            raise InputError(f"split {name}: expected a version v1.0-{VERSION_OF[name]}, found {self.version} in {self.root}")
        chosen = np.array([scene in known[name] for scene in self._scenes], dtype=bool)[self.columns["sample_scene"]]
        if not chosen.any():
            raise InputError(f"{self.folder / 'scene.json'}: expected scenes of the split {name}, found others ("
                             f"{', '.join(self._scenes[:3])}, ...); your own splits: {path}, {{split: [scene names]}}")
        return [self.samples[i] for i in np.flatnonzero(chosen)]

    def annotations(self, sample_token: str, category: str = "") -> list[Annotation]:
        """The labels of a key frame (of one category), in the order of the table. Raises InputError for a label of the
        ten classes with more than one attribute, as the official evaluation does."""
        rows, found = self.rows(sample_token), []
        if category:
            kinds = enumerate(self.columns["annotation_category"][rows].tolist(), rows.start)
            rows = [i for i, kind in kinds if self._categories[kind] == category]
        names = ("token", "category", "attribute", "translation", "size", "rotation", "velocity", "lidar_points", "radar_points")
        columns = [self.columns[f"annotation_{name}"][rows].tolist() for name in names]
        for token, kind, attribute, xyz, size, rotation, velocity, lidar, radar in zip(*columns):
            token, kind = token.decode(), self._categories[kind]
            name = CLASS_OF.get(kind)
            if attribute == SEVERAL and name:
                raise InputError(f"{self.folder / 'sample_annotation.json'}: {token}: expected one attribute, found several")
            attribute = self._attributes[attribute] if attribute >= 0 else ""
            found.append(Annotation(token, name, kind, attribute, tuple(xyz), tuple(size), tuple(rotation), tuple(velocity[:2]),
                                    lidar, radar))  # fmt: skip
        return found

    def bike_racks(self, sample_token: str) -> list[Annotation]:
        """The labels of the category static_object.bicycle_rack: bicycles inside are neither asked for nor counted."""
        return self.annotations(sample_token, BICYCLE_RACK)

    def rows(self, sample_token: str) -> slice:
        """Which rows of the columns annotation_... are a key frame's labels."""
        row = self.row(sample_token)
        return slice(*self.columns["annotation_begin"][row : row + 2].tolist())

    def classes(self, rows: slice) -> list[str | None]:
        """The detection class of each annotation, or None."""
        return [CLASS_OF.get(self._categories[i]) for i in self.columns["annotation_category"][rows].tolist()]

    def ego_pose(self, sample_token: str) -> tuple[np.ndarray, np.ndarray]:
        """Translation (3,) and rotation (4,) of the vehicle when LIDAR_TOP took the key frame."""
        return self.scans(sample_token, 1)[0][-2:]

    def scans(self, sample_token: str, count: int) -> list[Scan]:
        """The key frame and the scans before it, newest first; fewer than `count` at the beginning of a scene."""
        c, row = self.columns, int(self.columns["key_scan"][self.row(sample_token)])
        found = []
        while row >= 0 and len(found) < count:
            sensor = c["scan_sensor"][row]
            found.append(Scan(c["scan_file"][row].decode(), int(c["scan_time"][row]), c["sensor_translation"][sensor],
                              c["sensor_rotation"][sensor], c["ego_translation"][row], c["ego_rotation"][row]))  # fmt: skip
            row = int(c["scan_prev"][row])
        return found

    def row(self, token: str) -> int:
        """Which row of the columns sample... is a sample's."""
        if token not in self._row:
            raise InputError(f"{self.folder / 'sample.json'}: expected a sample {token!r}, found none")
        return self._row[token]


def _own_splits(path: Path) -> dict[str, set[str]]:
    """{split: scene names} of a splits.json; none without the file."""
    try:
        return {key: set(scenes) for key, scenes in json.loads(path.read_bytes()).items()} if path.is_file() else {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: expected {{split: [scene names]}}, found something else ({error})") from None


def _build(folder: Path) -> dict[str, np.ndarray]:
    """Read and join the tables. One after the other, so that the memory of each is free before the next; but the labels
    of a large version, half of the work, in a process of their own."""
    gc.disable()  # millions of dicts that are no garbage: looking through them again and again takes a third of the time
    try:
        scene, sample = _Table(folder, "scene", "token name"), _Table(folder, "sample", "token timestamp scene_token")
        own = {"scene": scene.words("name"), "sample": sample.words("token"), "sample_scene": sample.join("scene_token", scene)}
        if (folder / "sample_annotation.json").stat().st_size <= BLOCK:
            return own | _scans(folder, sample) | _labels(folder, sample)
        with ProcessPoolExecutor(1) as pool:  # which inherits the switched-off gc, or (spawn) is a little slower
            labels = pool.submit(_labels, folder, sample)
            return own | _scans(folder, sample) | labels.result()
    finally:
        gc.enable()


def _scans(folder: Path, sample: "_Table") -> dict[str, np.ndarray]:
    """Scans of LIDAR_TOP with their poses, and the one that is each sample's key frame."""
    sensor = _Table(folder, "sensor", "token channel")
    lidars = {token for token, channel in zip(sensor["token"], sensor["channel"]) if channel == "LIDAR_TOP"}
    mounted = _Table(folder, "calibrated_sensor", "token sensor_token translation rotation", "sensor_token", lidars)
    scan = _Table(folder, "sample_data", "token sample_token ego_pose_token calibrated_sensor_token timestamp is_key_frame "
                  "filename prev", "calibrated_sensor_token", set(mounted["token"]))  # fmt: skip
    ego = _Table(folder, "ego_pose", "token translation rotation", "token", set(scan["ego_pose_token"]))
    pose = scan.join("ego_pose_token", ego)
    key = np.full(len(sample["token"]), -1)
    is_key = np.array(scan["is_key_frame"], dtype=bool)
    key[scan.join("sample_token", sample)[is_key]] = np.flatnonzero(is_key)
    for i in np.flatnonzero(key < 0)[:1]:
        raise InputError(f"{scan.path}: expected a key frame of LIDAR_TOP for every sample, found none for {sample['token'][i]}")
    return {"key_scan": key, "scan_file": scan.words("filename"), "scan_time": scan.numbers("timestamp").astype(np.int64),
            "scan_prev": scan.join("prev", scan), "scan_sensor": scan.join("calibrated_sensor_token", mounted),
            "sensor_translation": mounted.numbers("translation", 3), "sensor_rotation": mounted.numbers("rotation", 4),
            "ego_translation": ego.numbers("translation", 3)[pose], "ego_rotation": ego.numbers("rotation", 4)[pose]}  # fmt: skip


def _labels(folder: Path, sample: "_Table") -> dict[str, np.ndarray]:
    """Labels ordered by sample: those of sample s are the rows begin[s] .. begin[s + 1]."""
    category, attribute = (_Table(folder, name, "token name") for name in ("category", "attribute"))
    instance = _Table(folder, "instance", "token category_token")
    category_of_instance = instance.join("category_token", category)
    label = _Table(folder, "sample_annotation", "token sample_token instance_token attribute_tokens translation size rotation "
                   "prev next num_lidar_pts num_radar_pts")  # fmt: skip
    xyz, size, in_sample = label.numbers("translation", 3), label.numbers("size", 3), label.join("sample_token", sample)
    for i in np.flatnonzero((size <= 0).any(axis=1))[:1]:
        raise InputError(f"{label.path}: {label['token'][i]}: expected a size above 0, found {label['size'][i]}")
    label.values["first_attribute"] = [tokens[0] if tokens else "" for tokens in label["attribute_tokens"]]
    attributes = label.join("first_attribute", attribute)
    attributes[[len(tokens) > 1 for tokens in label["attribute_tokens"]]] = SEVERAL
    time = 1e-6 * sample.numbers("timestamp")[in_sample]  # s; float64 as the devkit, for the limits' sake
    columns = {"token": label.words("token"), "translation": xyz, "size": size, "rotation": label.numbers("rotation", 4),
               "velocity": velocities(xyz, time, label.join("prev", label), label.join("next", label)),
               "category": category_of_instance[label.join("instance_token", instance)], "attribute": attributes,
               "lidar_points": label.numbers("num_lidar_pts").astype(np.int32),
               "radar_points": label.numbers("num_radar_pts").astype(np.int32)}  # fmt: skip
    order = np.argsort(in_sample, kind="stable")
    begin = np.searchsorted(in_sample[order], np.arange(len(sample["token"]) + 1))
    columns = {f"annotation_{name}": column[order] for name, column in columns.items()}
    return columns | {"annotation_begin": begin, "category": category.words("name"), "attribute": attribute.words("name")}


def velocities(xyz: np.ndarray, time: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """(A, 3) m, (A,) s, rows of the object's neighbours (-1: none) -> (A, 3) m/s by the devkit's rule: from the one before
    to the one after, one-sided at the ends; NaN without any, or if they are more than 1.5 s (two-sided: 3 s) apart."""
    own = np.arange(len(xyz))
    first, last = np.where(before < 0, own, before), np.where(after < 0, own, after)
    gap = time[last] - time[first]
    known = (first != last) & (gap <= np.where((before >= 0) & (after >= 0), 3.0, 1.5)) & (gap != 0)
    return np.where(known[:, None], (xyz[last] - xyz[first]) / np.where(known, gap, 1)[:, None], np.nan)


class _Table:
    """Some fields of one table, a list each; with `key`, of the records whose `key` is one of `wanted` only."""

    def __init__(self, folder: Path, name: str, fields: str, key: str = "", wanted: Collection[str] = ()) -> None:
        self.path = folder / f"{name}.json"
        self.values: dict[str, list] = {field: [] for field in fields.split()}
        records, wanted = [], frozenset(wanted)
        try:
            for records in self._records(key, {token.encode() for token in wanted}):
                chosen = [record for record in records if not key or record[key] in wanted]
                for field, values in self.values.items():
                    values += [record[field] for record in chosen]
        except KeyError as error:
            token = next(record.get("token", "?") for record in records if error.args[0] not in record)
            raise InputError(f"{self.path}: {token}: expected a field {error.args[0]!r}, found none") from None
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{self.path}: expected a JSON list of flat records, found something else ({error})") from None
        self.row = {token: i for i, token in enumerate(self["token"])}

    def _records(self, key: str, wanted: set[bytes]) -> Iterator[list[dict]]:
        """A small table comes at once; a large one in blocks, cut at the closing braces: no table that grows large has
        braces in its strings. There, records that are not wanted are left out before they are parsed."""
        if self.path.stat().st_size <= BLOCK:
            return (yield json.loads(self.path.read_bytes()))
        pattern, rest = re.compile(rb'"%s"\s*:\s*"([^"]*)"' % key.encode()), b""
        with self.path.open("rb") as file:
            while block := file.read(BLOCK):
                *texts, rest = (rest + block).split(b"}")
                if key:
                    texts = [text for text in texts if (match := pattern.search(text)) and match[1] in wanted]
                yield json.loads(b"[" + b"}".join([*texts, b""]).lstrip(b"[, \r\n\t") + b"]")
        if rest.strip() != b"]":
            raise ValueError("the end is missing")

    def __getitem__(self, field: str) -> list:
        return self.values[field]

    def join(self, field: str, other: "_Table") -> np.ndarray:
        """Rows of `other` that the tokens in `field` name, int64; -1 for the empty token of prev, next and no attribute."""
        row = other.row | {"": NONE} if field in ("prev", "next", "first_attribute") else other.row
        try:
            return np.array([row[token] for token in self[field]], dtype=np.int64)
        except KeyError as error:
            token = self["token"][self[field].index(error.args[0])]
            raise InputError(f"{self.path}: {token}: expected {field} of {other.path.name}, found {error.args[0]!r}") from None

    def numbers(self, field: str, width: int = 1) -> np.ndarray:
        """(n, width) float64, (n,) for width 1; an InputError names the record whose numbers are others or not finite."""
        try:
            array = np.array(self[field], dtype=np.float64).reshape(len(self["token"]), width)
        except (ValueError, TypeError):
            array = np.array([[np.nan]])
        if np.isfinite(array).all():
            return array if width > 1 else array[:, 0]
        for token, value in zip(self["token"], self[field]):  # slowly, to find the first one
            with suppress(ValueError, TypeError):
                if np.isfinite(np.array(value, dtype=np.float64).reshape(width)).all():
                    continue
            raise InputError(f"{self.path}: {token}: expected {field} of {width} finite numbers, found {value}")

    def words(self, field: str) -> np.ndarray:
        """(n,) UTF-8 bytes: a quarter of the memory of numpy's strings, and .npz keeps them without pickle."""
        return np.array([word.encode() for word in self[field]], dtype=np.bytes_)


def _load(path: Path, stamp: np.ndarray) -> dict[str, np.ndarray] | None:
    """The columns of the cache; None when it is missing, broken or made from other tables."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files} if np.array_equal(file["stamp"], stamp) else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _save(path: Path, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Written under a temporary name and moved into place. A folder that nobody may write is left alone, also by root."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with suppress(OSError):  # a read-only disk, a full one: it is only a cache
        if path.parent.stat().st_mode & 0o222:
            with open(temporary, "wb") as file:
                np.savez(file, **columns)
            os.replace(temporary, path)
    with suppress(OSError):
        temporary.unlink(missing_ok=True)
    return columns
