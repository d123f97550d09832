"""A run is a folder: what it was, what it did, where to go on.   (reads beside: train.py)

    runs/NAME/  config.json  command.txt  environment.txt  metrics.jsonl  last.pt  best.pt

metrics.jsonl has one JSON object a line, kind "train" (a step's loss terms) or "eval" (official metrics). `seconds` is
the time spent training up to there, evaluation left out. last.pt holds all that an exact resume needs; the data order
and the augmentation need nothing, they are functions of the step (data/batch.py). A file `lock` keeps a second process out.
"""

import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
import weakref
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import parallel
from cli import InputError, write_text
from config import DISTIL, READING, Config, from_json, to_json
from detector import Detector
from evaluate import evaluate_detector, headline
from sparse import find_spconv
from weights import load_weights, read_checkpoint, save_checkpoint

if TYPE_CHECKING:
    from data.kitti import Kitti


@cache  # a process of many runs keeps the code that it began with
def commit() -> str:
    """The commit of the code, with -dirty when it was changed since; "unknown" outside a repository."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False,
                              cwd=Path(__file__).parent)  # fmt: skip
    except OSError:  # no git here
        return "unknown"
    return done.stdout.strip() or "unknown"


def machine() -> str:
    """Cores, their kind (runs are equal to the last bit on one kind of CPU only), GPU, whether with spconv, torch."""
    gpu = "no GPU"
    if torch.cuda.is_available():
        gpu = f"{torch.cuda.get_device_name()} {'with' if find_spconv() else 'without'} spconv"
    kind = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"{os.cpu_count()} cores, {kind}, {gpu}, torch {torch.__version__.split('+')[0]}"


def made_with(root: str) -> str:
    """The settings and version of a simulated data set, which fix its scenes, in one line; "" of other data."""
    path = Path(root) / "simulation.json"
    return " ".join(path.read_text(encoding="utf-8", errors="replace").split()) if path.is_file() else ""


def check_same_run(folder: Path, cfg: Config) -> dict[str, Any] | None:
    """The last checkpoint in a folder, or None. Raises InputError when it is another run's, naming what differs."""
    last = folder / "last.pt"
    if not last.is_file():
        return None
    content = read_checkpoint(last)
    before = from_json(content["config"])  # options younger than the run: as they were then
    for k in differences(before, cfg):
        # Data may have moved, or be called by another name; but of two sets that are both there one is another run's
        if k == "root" and (not Path(before.root).is_dir() or Path(before.root).resolve() == Path(cfg.root).resolve()):
            continue
        advice = f"; to keep it as the teacher: --teacher {last}" if before.method == "none" else ""
        raise InputError(f"{folder} holds a run with {k} = {getattr(before, k)}, this one has {getattr(cfg, k)}; choose another "
                         f"--name or --runs, or delete the folder{advice}")  # fmt: skip
    return content


def differences(before: Config, now: Config) -> list[str]:
    """The options in which two runs differ, of those that `now` reads: alone none of distilling, a baseline none of RDD's."""
    groups = {"none": (DISTIL, READING), "rdd": ()}.get(now.method, (READING,))
    unread = {f.name for f in fields(Config) if f.metadata.get("group") in groups} - {"method", "inherit", "label_kd"}
    return [f.name for f in fields(Config) if f.name not in unread and getattr(before, f.name) != getattr(now, f.name)]


def fingerprint(detector: Detector) -> str:
    """Of its weights: what a run remembers of its teacher."""
    digest = hashlib.sha256()
    for name, value in detector.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class Clock:
    """The seconds that a run has trained: those between `start` and `stop`, evaluation left out."""

    def __init__(self) -> None:
        self.before, self.started = 0.0, None

    def start(self) -> None:
        self.started = time.perf_counter()

    def running(self) -> float:
        """Seconds since the last start; 0 while it stands."""
        return 0.0 if self.started is None else time.perf_counter() - self.started

    def stop(self) -> None:
        self.before, self.started = self.seconds, None

    @property
    def seconds(self) -> float:
        return self.before + self.running()


class RunFolder:
    """runs/NAME: config.json, command.txt, environment.txt, metrics.jsonl, last.pt, best.pt."""

    def __init__(self, path: Path, cfg: Config, student: Detector, distil: nn.Module | None, optimizer: Any, scaler: Any,
                 teacher: Detector | None = None) -> None:  # fmt: skip
        self.path, self.cfg, self.student, self.distil = path, cfg, student, distil
        self.optimizer, self.scaler = optimizer, scaler
        self.teacher = fingerprint(teacher) if teacher else ""
        self.clock = Clock()
        self.best = -1.0
        self.unevaluated = False  # the evaluation that is due at the step of last.pt has still to be done

    def restore(self) -> int:
        """The step to go on from: 0 in a new folder, else where last.pt stands. Raises InputError for another config, and while
        another process trains the run."""
        if parallel.rank() == 0:
            self._hold()
        last, content = self.path / "last.pt", check_same_run(self.path, self.cfg)
        if content is None:
            if parallel.rank() == 0:
                self._begin()
            return 0
        if content.get("teacher", self.teacher) != self.teacher:  # older checkpoints do not know theirs
            raise InputError(f"{self.path}: this run was begun with another teacher; choose another --name, or delete the folder")
        load_weights(self.student, content["model"], last)
        if self.distil is not None:
            load_weights(self.distil, content["distil"], last)
        self.optimizer.load_state_dict(content["optimizer"])
        if content["scaler"]:  # empty when the run began without mixed precision
            self.scaler.load_state_dict(content["scaler"])
        self.clock.before, self.best = content["seconds"], content["best"]
        self.unevaluated = content.get("unevaluated", False)
        if parallel.rank() == 0:
            self._forget_after(content["step"])
        return content["step"]

    def _hold(self) -> None:
        """Make the folder, and lock it until this object or the process ends."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise InputError(f"{self.path}: the folder of the run cannot be made ({error.strerror or error})") from None
        weakref.finalize(self, os.close, file)
        try:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InputError(f"{self.path}: another process is training this run; choose another --name, or wait") from None
        except (ImportError, OSError):  # Windows, and disks that know no locks
            pass

    def _begin(self) -> None:
        (self.path / "config.json").write_text(json.dumps(to_json(self.cfg), indent=1))
        (self.path / "command.txt").write_text(shlex.join(sys.argv) + "\n")
        (self.path / "environment.txt").write_text(
            f"commit {commit()}\npython {platform.python_version()}\nmachine {machine()}\nthreads {torch.get_num_threads()}\n"
            f"data {made_with(self.cfg.root)}\n")
        (self.path / "metrics.jsonl").write_text("")

    def _forget_after(self, step: int) -> None:
        """Drop log lines of what was done after the checkpoint and will be done again, and a line cut in two."""
        path = self.path / "metrics.jsonl"
        kept = []
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                done = json.loads(line)
                again = done["step"] > step or (done["kind"] == "eval" and done["step"] == step and self.unevaluated)
                kept += [line + "\n"] * (not again)
            except json.JSONDecodeError:  # the process was killed, or the disk full, in the middle of it
                continue
        write_text(path, "".join(kept))

    def log(self, kind: str, record: dict[str, Any]) -> None:
        """Append a line. Numbers that are not finite, as half precision's first gradients may be, become null: JSON has none."""
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        if parallel.rank() == 0:
            with open(self.path / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"kind": kind, **record, "seconds": round(self.clock.seconds, 2)}) + "\n")

    def evaluate(self, step: int, epoch: float, validation: "Kitti", device: Any, workers: int = 0) -> None:
        result = evaluate_detector(self.student, validation, device, workers=workers)
        self.student.train()
        score = headline(result)
        self.log("eval", {"step": step, "epoch": epoch, **score, "result": result})
        if parallel.rank() == 0:
            print(f"{self.path.name}: epoch {epoch:g}: " + ", ".join(f"{k} {v:.2f}" for k, v in score.items()))
        self.unevaluated = False
        value = next(iter(score.values()))
        if value > self.best:
            self.best = value
            self.save(step, "best.pt")
        self.save(step)

    def save(self, step: int, name: str = "last.pt") -> None:
        """Raises InputError instead when a weight is NaN or infinite: the loss of a last step comes before its update."""
        for key, value in self.student.state_dict().items():
            if not value.isfinite().all():
                raise InputError(f"step {step}: the update made {key} NaN or infinite; nothing was saved. Try half "
                                 "the --lr under another --name")  # fmt: skip
        if parallel.rank() == 0:
            save_checkpoint(self.path / name, {
                "format": 1, "config": to_json(self.cfg), "step": step, "seconds": self.clock.seconds, "best": self.best,
                "unevaluated": self.unevaluated,
                "model": self.student.state_dict(), "distil": self.distil.state_dict() if self.distil else {},
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "teacher": self.teacher})  # fmt: skip
