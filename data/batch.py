"""Frames -> batches, in an order and with an augmentation that depend on nothing but the seed.

(after: augment.py, nuscenes.py; next: shapes.py)

The frames of step s, and how each is augmented, are functions of (seed, epoch, index). So the number of worker
processes changes nothing, resuming at step s needs no saved random state, and two processes share a global batch by
taking every second of its frames.
"""

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import parallel
from cli import InputError, did_you_mean, one_line
from config import Config
from data import Frame
from data.augment import ObjectDatabase, augment
from data.kitti import Kitti
from data.nuscenes import NuScenes, balanced_indices
from data.nuscenes_tables import CLASS_OF
from metrics.kitti import CLASSES
from presets import DEFAULT_ROOT


@dataclass
class Batch:
    """Several scans as tensors."""

    ids: list[str]
    points: Tensor  # (N, 1 + F): number of the scan, then the point
    boxes: list[Tensor]  # per scan (M, 7), nuScenes (M, 9)
    labels: list[Tensor]  # per scan (M,) int64, index into Config.classes
    dropped: dict[str, int]  # scans with points that are not finite, and how many were left out; 0: a scan without points

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device) -> "Batch":
        return replace(self, points=self.points.to(device), boxes=[b.to(device) for b in self.boxes],
                       labels=[k.to(device) for k in self.labels])  # fmt: skip


def collate(frames: list[Frame], cfg: Config) -> Batch:
    """Frames -> Batch. Objects of other classes (Van, Person_sitting, ...) are not training targets."""
    points, boxes, labels = [], [], []
    for n, frame in enumerate(frames):
        if frame.points.shape[1] < cfg.point_features:
            found = frame.points.shape[1]
            raise InputError(f"frame {frame.id}: expected {cfg.point_features} values a point, found {found}")
        scan = np.full((len(frame.points), 1), n, dtype=np.float32)
        points.append(np.concatenate([scan, frame.points[:, : cfg.point_features]], axis=1))
        known = [i for i, name in enumerate(frame.names) if name in cfg.classes]
        boxes.append(torch.from_numpy(frame.boxes[known].astype(np.float32)))
        labels.append(torch.tensor([cfg.classes.index(frame.names[i]) for i in known], dtype=torch.int64))
    dropped = {frame.id: frame.dropped for frame in frames if frame.dropped or not len(frame.points)}
    return Batch([f.id for f in frames], torch.from_numpy(np.concatenate(points)), boxes, labels, dropped)


def report_dropped(batch: Batch, told: set[str]) -> None:
    """Say once per scan that points were left out because they are not finite, or that it has none at all."""
    for id in batch.dropped.keys() - told:
        count = batch.dropped[id]
        tqdm.write(f"frame {id}: " + (f"{count} points are NaN or infinite and were left out" if count else "has no points"))
        told.add(id)


def prepare_data(cfg: Config, workers: int) -> Config:
    """Fill in the root, and make the simulated set if it is what is asked for and is not there."""
    if cfg.data in ("sim", "sim-nuscenes"):
        parallel.start()
        root, kitti = Path(cfg.root or DEFAULT_ROOT[cfg.data]), cfg.layout == "kitti"
        if cfg.root and not root.is_dir():
            command = f"python -m data.simulate {'' if kitti else 'nuscenes '}--out {root}"
            raise InputError(f"--root {root}: no such folder; make a simulated set there: {command}")
        if parallel.rank() == 0 and not (root / ("ImageSets/val.txt" if kitti else "v1.0-trainval/scene.json")).is_file():
            from data.simulate_kitti import simulate_kitti
            from data.simulate_nuscenes import simulate_nuscenes

            print(f"no data in {root}: simulating it (pass --data {cfg.layout} --root DIR for real data)")
            (simulate_kitti if kitti else simulate_nuscenes)(root, workers=workers)
        parallel.wait_for_all()
        return replace(cfg, root=str(root))
    return replace(cfg, root=cfg.root or str(DEFAULT_ROOT[cfg.data]))


def open_data(cfg: Config, split: str) -> "Kitti | NuScenes":
    """The data set a config names; `split` is train or val, or both are the frames the user chose.

    Raises InputError when the config was made for other data.
    """
    if cfg.layout == "nuscenes":
        unknown = [name for name in cfg.classes if name not in CLASS_OF.values()]
        if unknown or not cfg.velocity:
            found = f"class {unknown[0]!r}{did_you_mean(unknown[0], CLASS_OF.values())}" if unknown else "no velocity head"
            raise InputError(f"preset {cfg.preset} does not fit {cfg.root}: expected nuScenes' ten classes; it has {found}")
        split = f"mini_{split}" if cfg.version == "v1.0-mini" and split in ("train", "val") else split
        return NuScenes(cfg.root, cfg.version, split, cfg.sweeps, frames=cfg.frames)
    unknown = [name for name in cfg.classes if name not in CLASSES]  # KITTI's metrics, which a run ends with, know no others
    if unknown or cfg.point_features > 4 or cfg.velocity:
        found = f"class {unknown[0]!r}{did_you_mean(unknown[0], CLASSES)}" if unknown else "velocities" if cfg.velocity else (
            f"{cfg.point_features} values")  # fmt: skip
        raise InputError(f"preset {cfg.preset} does not fit {cfg.root}: expected classes of {', '.join(CLASSES)} without"
                         f" velocities, and 4 values a point; it has {found}")  # fmt: skip
    return Kitti(cfg.root, split, cfg.frames, cfg.fov_only)


def object_database(cfg: Config, frames: "Kitti | NuScenes", spare: Path, workers: int = 0) -> ObjectDatabase | None:
    """The objects that ground-truth paste draws from, or None when it is off. Cut out once, by the first process of a machine,
    for which the others wait; kept in the data's root or, where nothing can be written there, in the folder `spare`."""
    if not any(cfg.paste):
        return None
    chosen = hashlib.sha256(repr((frames.ids, cfg.classes, cfg.fov_only, cfg.sweeps)).encode()).hexdigest()[:12]
    root = hashlib.sha256(str(Path(cfg.root).resolve()).encode()).hexdigest()[:6]  # frames of another root may have these names
    places = [Path(cfg.root) / f"objects-{chosen}", spare / f"objects-{chosen}-{root}"]
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    while not (found := next((path for path in places if path.is_dir()), None)):
        if first:
            try:
                return ObjectDatabase.build(places[0], frames, cfg.classes, workers=workers)
            except OSError:
                return ObjectDatabase.build(places[1], frames, cfg.classes, workers=workers)
        time.sleep(1)  # no barrier: nccl gives up after ten minutes, and ten sweeps of nuScenes take twenty
    return ObjectDatabase.load(found)


class TrainingFrames(Dataset):
    """The augmented view of a data set; an item is asked for by (epoch, index, copy), of the frames that a pass draws several
    times copy 0, 1, ...: each is augmented anew."""

    def __init__(self, frames: Kitti | NuScenes, cfg: Config, database: ObjectDatabase | None) -> None:
        self.frames, self.cfg, self.database = frames, cfg, database
        # Which classes each frame shows, for class-balanced resampling; None: every frame once.
        self.present = [frames.names(i) for i in range(len(frames))] if cfg.balance else None
        self.draws = len(self.order(0))

    def __len__(self) -> int:
        """Frames in one pass; with class balancing some come several times."""
        return self.draws

    def order(self, epoch: int) -> np.ndarray:
        """The frames of a pass, as indices, in their order."""
        rng = np.random.default_rng((self.cfg.seed, epoch))
        if self.present is None:
            return rng.permutation(len(self.frames))
        return rng.permutation(balanced_indices(rng, self.present, self.cfg.classes))

    def __getitem__(self, key: tuple[int, int, int]) -> Frame:
        epoch, index, copy = key
        cfg, frame = self.cfg, self.frames[index]
        rng = np.random.default_rng((cfg.seed, epoch, index, copy))
        paste = dict(zip(cfg.classes, cfg.paste, strict=True)) if self.database else {}
        frame = augment(frame, rng, self.database, paste, cfg.flip, cfg.rotation, (1 - cfg.scaling, 1 + cfg.scaling),
                        cfg.flip_x, cfg.translation)  # fmt: skip
        if cfg.max_points or cfg.max_voxels:  # these keep the first ones: it must not be pasted objects that are cut
            frame = replace(frame, points=rng.permutation(frame.points))
        return frame


def open_run(cfg: Config, spare: Path, workers: int = 0) -> tuple[TrainingFrames, Kitti | NuScenes]:
    """What a run reads: its training frames, and those that it is evaluated on. Made once for runs that differ in how they learn
    only. Of a machine's processes the first goes ahead, because it leaves an index of nuScenes' tables for the others."""
    ahead = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not ahead:
        parallel.wait_for_all()
    frames, validation = open_data(cfg, "train"), open_data(cfg, "val")
    if ahead:
        parallel.wait_for_all()
    return TrainingFrames(frames, cfg, object_database(cfg, frames, spare, workers)), validation


def steps_per_epoch(frames: int, batch_size: int) -> int:
    """Whole batches in one pass; the frames left over take their turn in another epoch's order."""
    if frames < batch_size:
        raise InputError(f"--batch-size {batch_size}: more than the {frames} training frames there are")
    return frames // batch_size


def training_batches(frames: TrainingFrames, first_step: int, last_step: int, workers: int = 0,
                     rank: int = 0, world: int = 1) -> Iterator[Batch]:  # fmt: skip
    """This process's share of the global batches first_step .. last_step - 1."""
    cfg = frames.cfg
    per_epoch = steps_per_epoch(len(frames), cfg.batch_size)

    def keys() -> Iterator[list[tuple[int, int, int]]]:
        order, order_epoch = [], -1
        for step in range(first_step, last_step):
            epoch, position = divmod(step, per_epoch)
            if epoch != order_epoch:
                order_epoch, indices = epoch, frames.order(epoch)
                order = [(epoch, *pair) for pair in zip(indices.tolist(), copies(indices).tolist(), strict=True)]
            batch = order[position * cfg.batch_size : (position + 1) * cfg.batch_size]
            yield batch[rank::world]

    yield from load(frames, keys(), cfg, workers)


def copies(indices: np.ndarray) -> np.ndarray:
    """(n,) -> (n,) how often each index has come before: 3, 5, 3, 3 -> 0, 0, 1, 2."""
    by_index = indices.argsort(kind="stable")
    ordered = indices[by_index]
    found = np.empty_like(indices)
    found[by_index] = np.arange(len(indices)) - np.searchsorted(ordered, ordered)
    return found


def load(frames: Dataset, batches: Iterable[Sequence[Any]], cfg: Config, workers: int = 0) -> Iterator[Batch]:
    """A Batch of each list of items of a data set, read by so many processes; torch's global random state stays as it is."""
    with one_line():
        yield from DataLoader(frames, batch_sampler=batches, num_workers=workers, collate_fn=_Collate(cfg),
                              generator=torch.Generator())  # fmt: skip


class _Collate:
    """`collate` with its config, picklable for worker processes on every platform."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def __call__(self, frames: list[Frame]) -> Batch:
        return collate(frames, self.cfg)
