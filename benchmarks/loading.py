"""Data loading: frames per second of one worker, and how long a training step waits for its batch.   (after: detectors.py)

A frame is read, cropped to the image or merged from ten sweeps, given pasted objects and augmented, as in training. KITTI: the
real frames, else simulated ones; nuScenes: one simulated scene of ten-sweep frames, written to a temporary folder. What
waits is the cheapest detector there is, so that its steps ask for data most often: cp-voxel-xxs-cpu, batch 2.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks import Row, in_turns, run
from benchmarks.detectors import kitti
from cli import run_cli

STEPS = 20


def data_sets(folder: Path):
    """(name, frames as training sees them) of both layouts."""
    from data.augment import ObjectDatabase
    from data.batch import TrainingFrames, open_data
    from data.simulate_nuscenes import simulate_nuscenes
    from presets import preset

    simulate_nuscenes(folder, train=1, val=0, sweeps=9, samples=(8, 8), progress=False)
    cpu = preset("cp-voxel-xxs-cpu", "kitti")
    cfgs = {"KITTI": replace(cpu, paste=preset("second").paste, batch_size=2),
            "nuScenes, 10 sweeps": replace(preset("cp-voxel-xxs-cpu", "sim-nuscenes"), paste=preset("cp-voxel", "nuscenes").paste,
                                           batch_size=2, sweeps=10, root=str(folder))}  # fmt: skip
    for name, cfg in cfgs.items():
        frames = kitti() if name == "KITTI" else open_data(cfg, "train")
        yield name, TrainingFrames(frames, cfg, ObjectDatabase.build(folder / f"objects-{len(name)}", frames, cfg.classes))


def every(frames, keys) -> list:
    return [frames[key] for key in keys]


def waiting(training, workers: int) -> tuple[float, float]:
    """Median seconds that a step waits for its batch, and that it takes in all."""
    import torch

    from benchmarks.detectors import training_step
    from data.batch import training_batches
    from detector import build

    detector = build(training.cfg)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-4)
    waits, steps = [], []
    began = time.perf_counter()
    for batch in training_batches(training, 0, STEPS, workers):
        waits.append(time.perf_counter() - began)
        training_step(detector, batch)
        optimizer.step()
        steps.append(time.perf_counter() - began)
        began = time.perf_counter()
    return median(waits[3:]), median(steps[3:])  # the first ones start the worker, and warm up


def rows(repeats: int) -> Iterator[Row]:
    import torch

    import parallel

    parallel.keep_freed_memory()
    usual = torch.get_num_threads()
    with TemporaryDirectory() as folder:
        for name, training in data_sets(Path(folder)):
            frames, n = training.frames, len(training.frames)
            torch.set_num_threads(1)  # as a worker has
            calls = {"read": partial(every, frames, range(n)), "all": partial(every, training, [(0, i) for i in range(n)])}
            times = in_turns(calls, repeats)
            torch.set_num_threads(usual)
            points = sum(len(frame.points) for frame in every(frames, range(n))) / n
            yield Row("loading", f"{name}: frames of one worker, {points:,.0f} points each", n / median(times["all"]),
                      unit="a second", note=f"{n / median(times['read']):.0f} without pasting and augmenting")  # fmt: skip
            for workers in (0, 1):
                wait, step = waiting(training, workers)
                yield Row("loading", f"{name}: share of a step spent waiting, {workers} workers, {usual} threads",
                          100 * wait / step, unit="%", note=f"{1000 * wait:.1f} of {1000 * step:.0f} ms")  # fmt: skip


if __name__ == "__main__":
    run_cli(lambda: run(rows, __doc__))
