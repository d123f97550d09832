"""What makes comparing methods fair: equal time, equal pull, intervals.   (reads after: suites.py  next: experiments.py)

A method that makes a step longer is compared with a student alone that had as much time (`price_of`, `equal_epochs`); a
reading of the paper that pulls harder than another is compared at the same pull as well (`shares`, `equal_share`).
`remembered` makes many methods of one teacher cheaper without changing a result. `statistic` says how sure a difference is.
"""

import hashlib
import os
import shutil
import statistics
import tempfile
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from config import Config
from suites import ALONE

if TYPE_CHECKING:
    from detector import Detector

KITTI = {"moderate_map_3d": "mAP 3D", "moderate_map_bev": "mAP BEV"}
ROOM = 4e9  # bytes of the disk that stay free for checkpoints: the outputs of a full-size teacher, terabytes, would fill it
METRICS = KITTI | {"map": "mAP", "nds": "NDS"}


def price_of(cfg: Config, teacher: "Detector", data: Any, workers: int = 0, turns: int = 5,
             steps: int = 6) -> tuple[float, float]:  # fmt: skip
    """The time of a step with the method, in steps of the student alone: the median over `turns` of the loop itself, on `data`
    (`data.batch.open_run`).

    Second, the same where the teacher's outputs are at hand, as they are for every student of a seed but the first
    (`remembered`, whose reading from the disk is left out).
    """
    from train import train
    from weights import read_checkpoint

    endless = {"epochs": 10**6, "eval_every": 10**6}  # it is left after a few steps
    spent: dict[str, list[float]] = {"alone": [0.0], "taught": [0.0], "outputs kept": [0.0]}
    outputs, asked, forward = [], 0, teacher.forward

    def kept(x: Any) -> Any:  # "taught" and "outputs kept" meet the same batches in the same order
        nonlocal asked
        asked += 1
        if asked > len(outputs):
            outputs.append(forward(x))
        return outputs[asked - 1]

    teacher.forward = kept
    alone_first, alone_last = ("alone", "taught", "outputs kept"), ("taught", "outputs kept", "alone")
    try:
        with tempfile.TemporaryDirectory() as folder:
            for turn in range(turns + 1):
                outputs.clear()  # "taught" meets them for the first time, "outputs kept" meets the same batches again
                for name in (alone_first, alone_last)[turn % 2]:  # in turns, because the first one reads the frames
                    changed = {"method": "none", "label_kd": False} if name == "alone" else {}
                    run, asked = Path(folder, name), 0
                    train(replace(cfg, **endless, **changed), run, None if name == "alone" else teacher, workers,
                          (turn + 1) * steps, data)  # fmt: skip
                    spent[name].append(read_checkpoint(run / "last.pt")["seconds"])
    finally:
        teacher.forward = forward
    alone, *others = ([b - a for a, b in zip(s, s[1:], strict=False)][1:] for s in spent.values())  # the first turn warms up
    price, price_kept = (statistics.median(b / a for a, b in zip(alone, other, strict=True)) for other in others)
    return price, price_kept


def equal_epochs(epochs: int, price: float) -> int:
    """How many epochs the student alone gets for `epochs` of a method, to a quarter of the schedule."""
    quarter = max(1, epochs // 4)
    return max(1, round(epochs * price / quarter) * quarter)


def longer_variant(epochs: int) -> str:
    """The student alone with another number of epochs: one serves all methods that take as long."""
    return f"{ALONE}, {epochs} epochs"


def shares(lines: list[dict[str, Any]]) -> dict[str, float]:
    """{term: norm of its gradient on the student's neck over the detection loss's}, the median of what a run's log holds; without
    steps at which half precision overflowed, which are not taken."""
    measured = [line for line in lines if line.get("pull_detection")
                and all(value is not None for key, value in line.items() if key.startswith("pull_"))]  # fmt: skip
    terms = [key.removeprefix("pull_") for key in (measured[0] if measured else ()) if key.startswith("pull_")]
    return {term: statistics.median(line[f"pull_{term}"] / line["pull_detection"] for line in measured)
            for term in terms if term != "detection"}  # fmt: skip


def equal_share(cfg: Config, record: dict[str, Any], default: dict[str, Any]) -> dict[str, float]:
    """The alphas that give a variant of RDD the default's share of the gradient, from what their first runs measured."""
    if not record or not default or record["variant"] in (ALONE, default["variant"]):
        return {}
    found, wanted = record.get("shares", {}), default.get("shares", {})
    return {alpha: float(f"{getattr(cfg, alpha) * wanted[term] / found[term]:.3g}")
            for alpha, term in (("alpha1", "feat"), ("alpha2", "logit")) if found.get(term) and term in wanted}  # fmt: skip


def remembered(teacher: "Detector", folder: Path) -> Any:
    """The forward pass of a frozen teacher that keeps its outputs on the disk, because every method meets the same batches.

    A seed fixes the data order and the augmentation, so only the first method pays for the teacher. What is read back is
    what was computed, bit for bit. An output is as large as the maps: for the CPU presets 5 MB, 11 GB for 2128 steps. The
    folder belongs to these weights. What cannot be read or written is computed again; ROOM bytes of the disk stay free.
    """
    import torch

    from detector import Output

    forward = teacher.forward

    def call(x: Any) -> Output:
        said = digest(x)
        path = folder / said[:2] / f"{said}.pt"
        with suppress(Exception):  # not there yet, or damaged, which torch.load meets with errors of many kinds
            neck, maps = torch.load(path, map_location=x.points.device, weights_only=True)
            return Output(neck, maps, teacher.head.geometry, teacher.head)
        out = forward(x)
        temporary = path.with_suffix(f".{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(path.parent).free > ROOM:
                torch.save((out.neck, out.maps), temporary)
                os.replace(temporary, path)
        except (OSError, RuntimeError):
            with suppress(OSError):
                temporary.unlink()
        return out

    return call


def digest(x: Any) -> str:
    """What a teacher is asked, as 32 hex digits: the points of a batch."""
    return hashlib.blake2b(x.points.cpu().numpy().tobytes(), digest_size=16, key=bytes([x.batch_size])).hexdigest()


# ------------------------------------------------------------------ how sure one can be


def scores(record: dict[str, Any]) -> dict[str, float]:
    """The two headline numbers of a run's last epoch, percent: moderate mAP 3D and BEV, or nuScenes' mAP and NDS."""
    return {name: record["scores"][-1][name] for name in METRICS if name in record["scores"][-1]}


def paired_interval(ours: dict[int, list[float]], theirs: dict[int, list[float]], draws: int = 4000) -> tuple[float, float]:
    """A 95 % interval of the mean over seeds of ours - theirs, {seed: (K,) values on the K bootstrap samples of the frames}.

    A bootstrap over both: the seeds that both have are drawn with replacement, and one sample of the frames, which is the
    same one for both (`evaluate.resampled`). Every sample meets every way to draw up to five seeds, or `draws` ways to draw
    more. With few seeds such intervals are too narrow: three seeds cannot tell 95 %.
    """
    seeds = sorted(set(ours) & set(theirs))
    difference, n = np.array([ours[s] for s in seeds]) - np.array([theirs[s] for s in seeds]), len(seeds)  # (n, K)
    ways = list(product(range(n), repeat=n)) if n <= 5 else np.random.default_rng(0).integers(n, size=(draws, n))
    means = np.array([difference[list(way)].mean(axis=0) for way in ways])  # (ways, K)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def statistic(runs: dict[int, dict], alone: dict[int, dict], metric: str) -> dict[str, Any]:
    """Mean and spread of a row, and its difference to the student alone; an interval from two common seeds on."""
    values = {seed: scores(run)[metric] for seed, run in sorted(runs.items())}
    row = {
        "mean": statistics.fmean(values.values()) if values else None,
        "n": len(values),
        "values": values,
        "std": statistics.stdev(values.values()) if len(values) > 1 else None,
        "delta": None,
        "low": None,
        "high": None,
    }
    common = sorted(set(runs) & set(alone))
    if common and runs is not alone:
        row["delta"] = statistics.fmean(values[s] - scores(alone[s])[metric] for s in common)
        if len(common) > 1:  # one would count the chance of the scenes, and leave out that of the seed, which is larger
            row["low"], row["high"] = paired_interval(*({s: of[s]["resampled"][metric] for s in common} for of in (runs, alone)))
    return row
