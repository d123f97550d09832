"""Stops: a training run, looked at while it trains.   (reads after: curves.py  next: disparity.py, plane.py)

`train(..., stop_after=step)` leaves a run at a step and later goes on exactly, so a run that is trained in slices IS the
run trained at once, bit for bit (on a GPU: to rounding). `stops` trains one from stop to stop and hands out the student as
it is there. What a stop holds is kept in the run's folder, stop-STEP.pt: the same command goes on where it was left, and
two programs that look at the same run (the same --out and --stops) train it once.
"""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cli import ArgumentParser, InputError
from config import Config, add_options, override
from presets import READINGS, reading, scenes_of

if TYPE_CHECKING:
    from torch import Tensor

    from detector import Detector

KEPT = ("format", "config", "step", "model", "distil", "teacher")  # of a checkpoint; a look needs no optimiser


@dataclass(frozen=True)
class Stop:
    """A student as it is at a step of its training."""

    step: int  # optimiser steps done
    detector: "Detector"  # in eval mode, frozen
    distil: dict[str, "Tensor"]  # weights of the method's own layers (RDD: psi); empty without a method
    teacher: str = ""  # `runs.fingerprint` of what it learned from; "" of one alone, and in files that do not say


def look(checkpoint: Path) -> Stop:
    """The student of any checkpoint of train.py. Raises InputError for a file that is none."""
    from weights import load_detector

    detector, content = load_detector(checkpoint)
    return Stop(content["step"], detector.requires_grad_(False), content.get("distil", {}), content.get("teacher", ""))


def check_teacher(stop: Stop, teacher: "Detector | None", what: str) -> None:
    """Raises InputError when `what`, a student, has learned from another teacher than this one."""
    from runs import fingerprint

    if teacher is not None and stop.teacher not in ("", fingerprint(teacher)):
        raise InputError(f"{what}: learned from another teacher than --teacher; give that one, or another --out")


def stop_steps(cfg: Config, count: int) -> list[int]:
    """`count` steps at equal distances, the last one the end of the run. Raises InputError when it has fewer steps."""
    from data.batch import TrainingFrames, open_data, steps_per_epoch

    frames = TrainingFrames(open_data(cfg, "train"), cfg, None)
    last = steps_per_epoch(len(frames), cfg.batch_size) * cfg.epochs
    if not 1 <= count <= last:
        raise InputError(f"--stops {count}: expected 1 to {last}, the steps of the run")
    return [last * k // count for k in range(1, count + 1)]


def stops(cfg: Config, folder: Path, teacher: "Detector | None", steps: list[int], workers: int = 0) -> Iterator[Stop]:
    """Train a run of `cfg` into `folder`, and yield it at each of these steps (ascending).

    Raises InputError when the folder holds another run, a run of another teacher, or one that went past a step and kept
    nothing there.
    """
    from runs import check_same_run
    from train import train
    from weights import read_checkpoint, save_checkpoint

    for step in steps:
        kept, before = folder / f"stop-{step}.pt", check_same_run(folder, cfg)
        if not kept.is_file():
            if before and before["step"] > step:
                raise InputError(f"{folder}: this run is at step {before['step']} and kept nothing at step {step}; pass the"
                                 " --stops it was made with, or another --out")  # fmt: skip
            train(cfg, folder, teacher, workers, stop_after=step)
            content = read_checkpoint(folder / "last.pt")
            save_checkpoint(kept, {key: content[key] for key in KEPT})
        stop = look(kept)
        check_teacher(stop, teacher, str(kept))
        yield stop


# ------------------------------------------------------------------ command line


def add_run_options(p: ArgumentParser) -> None:
    """The options of a command that looks at a student in training."""
    p.add_argument("--teacher", required=True, metavar="CHECKPOINT", help="a trained detector, e.g. runs/NAME/last.pt")
    p.add_argument("--stops", type=int, default=4, metavar="N", help="looks, at equal distances, the last at the end [4]")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="runs, numbers and pictures go here")
    p.add_argument("--reading", choices=list(READINGS),
                   help="how RDD is read; paper-weights: the paper's psi and alphas; printed: all [a checkpoint's or default]")
    p.add_argument("--workers", type=int, default=0, metavar="X", help="data loading processes; changes no result [0]")
    names = [f.name for f in fields(Config) if f.name != "method"]
    add_options(p, only=names)


def open_teacher(path: str) -> "Detector":
    """The teacher of --teacher, in eval mode and frozen."""
    from weights import load_detector

    if not path.endswith(".pt"):
        raise InputError(f"--teacher {path}: expected a checkpoint; train one first: python train.py --teacher {path}")
    return load_detector(path)[0].requires_grad_(False)


def student_config(name: str, given: Namespace, teacher: Config) -> Config:
    """The config of a preset (or of a checkpoint's run) on the teacher's data set, with the options given."""
    from data.batch import prepare_data
    from train import resolve

    values = {f.name: getattr(given, f.name) for f in fields(Config) if hasattr(given, f.name)}
    data = values.get("data", teacher.data)
    student, own = resolve(name, 1, data)
    if not own:
        values |= scenes_of(teacher, student, values)
    cfg = override(student, {**reading(given.reading, values.get("head", student.head)), "data": data, **values})
    return prepare_data(replace(cfg, method="rdd"), max(1, given.workers))
