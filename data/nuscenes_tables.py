"""nuScenes' JSON tables -> arrays, without the official devkit.   (after: augment.py; next: nuscenes.py)

A root holds one folder of tables for each version (v1.0-mini, v1.0-trainval, v1.0-test). Of the 13 tables these ten are read:

    scene <- sample <- sample_annotation -> instance -> category      key frames (2 a second) and their boxes
                    |                    -> attribute
                    <- sample_data -> ego_pose                        every scan of every sensor, chained by `prev`
                                   -> calibrated_sensor -> sensor     of which only those of LIDAR_TOP are kept

Parsing 3 GB of JSON takes a while, even by several processes, so what is left of it is kept as one .npz beside the tables.
Translations in metres, rotations as quaternions (w, x, y, z), times in microseconds, everything in the GLOBAL frame.
dims: S samples · L scans of LIDAR_TOP · A annotations, ordered by sample
"""

import gc
import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cli import InputError, did_you_mean, write_bytes

# What is read of each table: how many numbers a field holds; 0: a word, -1: a list of words.
WORD, WORDS = 0, -1
TABLES: dict[str, dict[str, int]] = {
    "scene": {"token": WORD, "name": WORD},
    "sample": {"token": WORD, "timestamp": 1, "scene_token": WORD},
    "sensor": {"token": WORD, "channel": WORD},
    "calibrated_sensor": {"token": WORD, "sensor_token": WORD, "translation": 3, "rotation": 4},
    "sample_data": {"token": WORD, "sample_token": WORD, "ego_pose_token": WORD, "calibrated_sensor_token": WORD, "timestamp": 1,
                    "is_key_frame": 1, "filename": WORD, "prev": WORD},
    "ego_pose": {"token": WORD, "translation": 3, "rotation": 4},
    "category": {"token": WORD, "name": WORD}, "attribute": {"token": WORD, "name": WORD},
    "instance": {"token": WORD, "category_token": WORD},
    "sample_annotation": {"token": WORD, "sample_token": WORD, "instance_token": WORD, "attribute_tokens": WORDS,
                          "translation": 3, "size": 3, "rotation": 4, "prev": WORD, "next": WORD,
                          "num_lidar_pts": 1, "num_radar_pts": 1},
}  # fmt: skip
CACHE = "rdd-index.npz"  # beside the tables; may be deleted at any time
FORMAT = "rdd-index 1"  # counted up when the columns change
BLOCK = 1 << 25  # bytes of a table that a process parses at once: ten times as many of memory
PROCESSES = 4  # at most: of more each waits for the disk

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
        self.samples, self.scenes, self._categories, self._attributes = (  # samples: their tokens, in the table's order
            [word.decode() for word in self.columns[name].tolist()] for name in ("sample", "scene", "category", "attribute"))
        self._row = {token: i for i, token in enumerate(self.samples)}

    def split(self, name: str) -> list[str]:
        """Sample tokens of train, val, test, mini_train, mini_val or all, in the order of the table. Own splits are files
        {split: [scene names]}: VERSION/splits.json, where the devkit looks for names that are not official, and
        ROOT/splits.json, which goes before the official lists too."""
        path = self.root / "splits.json"
        own, every = _own_splits(path), set(self.scenes)
        official = SCENES | {"train": every - SCENES["val"], "test": every, "all": every}
        known = _own_splits(self.folder / path.name) | official | own
        if name not in known:
            raise InputError(f"expected a split, found {name!r}{did_you_mean(name, known)}")
        if name in VERSION_OF and name not in own and not self.version.endswith(VERSION_OF[name]):
            raise InputError(f"split {name}: expected a version v1.0-{VERSION_OF[name]}, found {self.version} in {self.root}")
        chosen = np.array([scene in known[name] for scene in self.scenes], dtype=bool)[self.columns["sample_scene"]]
        if not chosen.any():
            raise InputError(f"{self.folder / 'scene.json'}: expected scenes of the split {name}, found others ("
                             f"{', '.join(self.scenes[:3])}, ...); your own splits: {path}, {{split: [scene names]}}")
        return [self.samples[i] for i in np.flatnonzero(chosen)]

    def scene_of(self, samples: Sequence[str]) -> list[str]:
        """The name of the scene of each sample."""
        return [self.scenes[k] for k in self.columns["sample_scene"][[self.row(token) for token in samples]]]

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
    """Read and join the tables; large ones in blocks, by some processes: parsing is nearly all of the work."""
    collecting = gc.isenabled()
    gc.disable()  # millions of dicts that are no garbage: looking through them again and again takes a third of the time
    try:
        if max((folder / f"{name}.json").stat().st_size for name in TABLES) <= BLOCK:
            return _join(folder, map)
        # Not by spawn, which would run a script again that has no guard around its main part: these only parse.
        pool = ProcessPoolExecutor(min(PROCESSES, os.cpu_count() or 1), initializer=gc.disable)
        try:
            return _join(folder, pool.map)
        finally:
            pool.shutdown(cancel_futures=True)  # after an error nobody waits for the other tables
    finally:
        if collecting:
            gc.enable()


def _join(folder: Path, run: Callable) -> dict[str, np.ndarray]:
    scene, sample = _Table(folder, "scene"), _Table(folder, "sample")
    sensor = _Table(folder, "sensor")
    mounted = _Table(folder, "calibrated_sensor", map, "sensor_token", sensor["token"][sensor["channel"] == b"LIDAR_TOP"])
    scan = _Table(folder, "sample_data", run, "calibrated_sensor_token", mounted["token"])
    label = _Table(folder, "sample_annotation", run)  # from here on both are read in the background
    ego = _Table(folder, "ego_pose", run, "token", scan["ego_pose_token"])
    return {"scene": scene["name"], "sample": sample["token"], "sample_scene": sample.join("scene_token", scene),
            **_labels(folder, sample, label), **_scans(sample, mounted, scan, ego)}  # fmt: skip


def _scans(sample: "_Table", mounted: "_Table", scan: "_Table", ego: "_Table") -> dict[str, np.ndarray]:
    """Scans of LIDAR_TOP with their poses, and the one that is each sample's key frame."""
    pose, is_key = scan.join("ego_pose_token", ego), scan["is_key_frame"] != 0
    key = np.full(len(sample["token"]), -1)
    key[scan.join("sample_token", sample)[is_key]] = np.flatnonzero(is_key)
    for i in np.flatnonzero(key < 0)[:1]:
        found = f"found none for {sample['token'][i].decode()}"
        raise InputError(f"{scan.path}: expected a key frame of LIDAR_TOP for every sample, {found}")
    return {"key_scan": key, "scan_file": scan["filename"], "scan_time": scan["timestamp"].astype(np.int64),
            "scan_prev": scan.join("prev", scan), "scan_sensor": scan.join("calibrated_sensor_token", mounted),
            "sensor_translation": mounted["translation"], "sensor_rotation": mounted["rotation"],
            "ego_translation": ego["translation"][pose], "ego_rotation": ego["rotation"][pose]}  # fmt: skip


def _labels(folder: Path, sample: "_Table", label: "_Table") -> dict[str, np.ndarray]:
    """Labels ordered by sample: those of sample s are the rows begin[s] .. begin[s + 1]."""
    category, attribute, instance = (_Table(folder, name) for name in ("category", "attribute", "instance"))
    xyz, size, in_sample = label["translation"], label["size"], label.join("sample_token", sample)
    for i in np.flatnonzero((size <= 0).any(axis=1))[:1]:
        raise InputError(f"{label.path}: {label['token'][i].decode()}: expected a size above 0, found {size[i].tolist()}")
    words = [tokens.split() for tokens in label["attribute_tokens"].tolist()]
    attributes = label.join("attribute_tokens", attribute, [tokens[0] if tokens else b"" for tokens in words])
    attributes[[len(tokens) > 1 for tokens in words]] = SEVERAL
    time = 1e-6 * sample["timestamp"][in_sample]  # s; float64 as the devkit, for the limits' sake
    columns = {"token": label["token"], "translation": xyz, "size": size, "rotation": label["rotation"],
               "velocity": velocities(xyz, time, label.join("prev", label), label.join("next", label)),
               "category": instance.join("category_token", category)[label.join("instance_token", instance)],
               "attribute": attributes, "lidar_points": label["num_lidar_pts"].astype(np.int32),
               "radar_points": label["num_radar_pts"].astype(np.int32)}  # fmt: skip
    order = np.argsort(in_sample, kind="stable")
    begin = np.searchsorted(in_sample[order], np.arange(len(sample["token"]) + 1))
    columns = {f"annotation_{name}": column[order] for name, column in columns.items()}
    return columns | {"annotation_begin": begin, "category": category["name"], "attribute": attribute["name"]}


def velocities(xyz: np.ndarray, time: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """(A, 3) m, (A,) s, rows of the object's neighbours (-1: none) -> (A, 3) m/s by the devkit's rule: from the one before
    to the one after, one-sided at the ends; NaN without any, or if they are more than 1.5 s (two-sided: 3 s) apart."""
    own = np.arange(len(xyz))
    first, last = np.where(before < 0, own, before), np.where(after < 0, own, after)
    gap = time[last] - time[first]
    known = (first != last) & (gap <= np.where((before >= 0) & (after >= 0), 3.0, 1.5)) & (gap != 0)
    return np.where(known[:, None], (xyz[last] - xyz[first]) / np.where(known, gap, 1)[:, None], np.nan)


class _Table:
    """The fields of TABLES[name] as columns: words (n,) UTF-8 bytes (a quarter of the memory of numpy's strings, and .npz
    keeps them without pickle), lists of words joined by spaces, numbers (n, width) or, one in a field, (n,) float64.
    With `key`, only the records whose `key` is one of `wanted`. `run` (a `map`) starts to read; the first use waits for it."""

    def __init__(self, folder: Path, name: str, run: Callable = map, key: str = "", wanted: np.ndarray | None = None) -> None:
        self.path, size = folder / f"{name}.json", (folder / f"{name}.json").stat().st_size
        begins = range(0, max(size, 1), BLOCK)
        self._parts = run(_read, *zip(*((self.path, begin, TABLES[name], key, wanted) for begin in begins)))

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        parts = list(self._parts)
        return {field: np.concatenate([part[field] for part in parts]) for field in parts[0]}

    @cached_property
    def row(self) -> dict[bytes, int]:
        return {token: i for i, token in enumerate(self["token"].tolist())}

    def __getitem__(self, field: str) -> np.ndarray:
        return self.columns[field]

    def join(self, field: str, other: "_Table", tokens: list[bytes] | None = None) -> np.ndarray:
        """Rows of `other` that the tokens in `field` (or given) name, int64; NONE for the empty token of prev, next and no
        attribute."""
        row = other.row | {b"": NONE} if field in ("prev", "next", "attribute_tokens") else other.row
        tokens = self[field].tolist() if tokens is None else tokens
        try:
            return np.array([row[token] for token in tokens], dtype=np.int64)
        except KeyError as error:
            here, found = self["token"][tokens.index(error.args[0])].decode(), error.args[0].decode()
            raise InputError(f"{self.path}: {here}: expected {field} of {other.path.name}, found {found!r}") from None


def _read(path: Path, begin: int, fields: dict[str, int], key: str, wanted: np.ndarray | None) -> dict[str, np.ndarray]:
    """The columns of the records that begin in the BLOCK bytes from `begin`. Raises InputError naming file and record."""
    try:
        chosen = frozenset(wanted.tolist()) if wanted is not None else frozenset()
        records = _parse(path, begin, key, chosen)
        if key:
            records = [record for record, word in zip(records, _column(path, key, WORD, records).tolist()) if word in chosen]
        return {field: _column(path, field, width, records) for field, width in fields.items()}
    except InputError:
        raise
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: expected a JSON list of flat records, found something else ({error})") from None


def _parse(path: Path, begin: int, key: str, wanted: frozenset[bytes]) -> list[dict]:
    """A small table comes at once. A block of a large one is cut behind closing braces, as no table that grows large has
    braces in its strings; there, records that are not wanted are left out before they are parsed."""
    size = path.stat().st_size
    if size <= BLOCK:
        if not isinstance(records := json.loads(path.read_bytes()), list):
            raise ValueError(f"{type(records).__name__} instead of list")
        return records
    with path.open("rb") as file:
        file.seek(begin)
        text = file.read(BLOCK)
        while (brace := (more := file.read(4096)).find(b"}")) < 0 and more:  # the last record ends in the next block
            text += more
    text += more[: brace + 1]
    text = text[text.find(b"}") + 1 if begin else 0 :]  # the first one is the block's before: it looked for a brace, too
    *records, rest = text.split(b"}")
    if begin + BLOCK >= size and rest.strip() != b"]":
        raise ValueError("the end is missing")
    if key:
        pattern = re.compile(rb'"%s"\s*:\s*"([^"]*)"' % key.encode())
        records = [text for text in records if (match := pattern.search(text)) and match[1] in wanted]
    return json.loads(b"[" + b"}".join([*records, b""]).lstrip(b"[, \r\n\t") + b"]")


def _column(path: Path, field: str, width: int, records: list[dict]) -> np.ndarray:
    """One field of all records; an InputError names the first record whose value is no word, or not `width` finite numbers."""
    try:
        values = [record[field] for record in records]
    except KeyError:
        token = next(record.get("token", "?") for record in records if field not in record)
        raise InputError(f"{path}: {token}: expected a field {field!r}, found none") from None
    if width <= 0:
        good = [type(value) is (str if width == WORD else list) for value in values]
        if not all(good):
            i = good.index(False)
            expected = "a text" if width == WORD else "a list"
            raise InputError(f"{path}: {records[i].get('token', '?')}: expected {expected} as {field}, found {values[i]}")
        return np.array([(value if width == WORD else " ".join(value)).encode() for value in values], dtype=np.bytes_)
    try:
        array = np.array(values, dtype=np.float64).reshape(len(values), width)
    except (ValueError, TypeError):
        array = np.array([[np.nan]])
    if np.isfinite(array).all():
        return array if width > 1 else array[:, 0]
    for record, value in zip(records, values):  # slowly, to find the first one
        with suppress(ValueError, TypeError):
            if np.isfinite(np.array(value, dtype=np.float64).reshape(width)).all():
                continue
        raise InputError(f"{path}: {record.get('token', '?')}: expected {field} of {width} finite numbers, found {value}")
    raise ValueError(field)


def _load(path: Path, stamp: np.ndarray) -> dict[str, np.ndarray] | None:
    """The columns of the cache; None when it is missing, broken or made from other tables."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files} if np.array_equal(file["stamp"], stamp) else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _save(path: Path, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The columns as they are, after writing them. A folder that nobody may write is left alone, also by root."""
    with suppress(OSError):  # a read-only disk, a full one: it is only a cache
        if path.parent.stat().st_mode & 0o222:
            np.savez(file := io.BytesIO(), **columns)
            write_bytes(path, file.getbuffer())
    return columns
