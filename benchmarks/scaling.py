"""Scaling: what a training step of cp-voxel-cpu costs against points, scans, threads and processes.   (after: detectors.py)

A step is forward, loss, backward and AdamW, as in train.py, on simulated turns; the points are those inside the range.
Ratio: how many times the work of the first line of a group is done in the first line's time (1 = no gain from growing it).
Processes are started as torchrun starts them, each on one thread, and share the batch.
"""

import time
from collections.abc import Iterator
from functools import cache
from statistics import median

from benchmarks import Row, in_turns, run
from cli import run_cli

PRESET = "cp-voxel-cpu"
POINTS, BATCHES, THREADS, PROCESSES = (10_000, 30_000, 100_000, 300_000), (1, 2, 4, 8), (1, 2), (1, 2)
USUAL = 20_000  # points of a scan where their number does not vary


@cache
def cloud():
    """(N, 4) at least 300,000 simulated points inside the preset's range, of several scenes, shuffled."""
    import numpy as np

    from data.simulate_kitti import make_frame
    from presets import preset

    low, high = np.array(preset(PRESET).point_range).reshape(2, 3)
    parts, index = [], 0
    while sum(map(len, parts)) < max(POINTS):
        points, _ = make_frame(0, 0, index, full_circle=True)
        parts.append(points[((points[:, :3] >= low) & (points[:, :3] < high)).all(axis=1)])
        index += 1
    return np.random.default_rng(0).permutation(np.concatenate(parts))


def batch_of(points: int, count: int):
    """`count` scans of so many points, each with a car where the first point is."""
    import numpy as np

    from data import Frame
    from data.batch import collate
    from presets import preset

    scans = [np.roll(cloud(), n * points, axis=0)[:points] for n in range(count)]
    boxes = [np.array([[*scan[0, :3], 3.9, 1.6, 1.5, 0.3]], np.float32) for scan in scans]
    frames = [Frame(str(n), scan, box, ("Car",)) for n, (scan, box) in enumerate(zip(scans, boxes, strict=True))]
    return collate(frames, preset(PRESET))


def make_step(batch):
    """One call = one training step on the batch."""
    import torch

    import parallel
    from detector import build
    from presets import preset
    from rdd import total_loss

    detector = build(preset(PRESET)).train()
    parameters = list(detector.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        total_loss(detector.loss(detector(detector.prepare(batch)), batch), {}).backward()
        parallel.average_gradients(parameters)
        optimizer.step()

    return step


def one_of_several(scans: int, repeats: int) -> float:
    """What each process of a group does: median seconds of a step on its share of the scans."""
    import torch

    import parallel

    torch.set_num_threads(1)
    _, world, _ = parallel.start()
    step = make_step(batch_of(USUAL, scans // world))
    times = []
    for _ in range(repeats + 1):
        parallel.wait_for_all()
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return median(times[1:])


def rows(repeats: int) -> Iterator[Row]:
    import torch
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    import parallel

    parallel.keep_freed_memory()
    usual = torch.get_num_threads()
    times = in_turns({n: make_step(batch_of(n, 1)) for n in POINTS}, repeats)
    for n in POINTS:
        gain = n / POINTS[0] * median(a / b for a, b in zip(times[POINTS[0]], times[n], strict=True))
        yield Row("scaling", f"{n:,} points, batch 1, {usual} threads", median(times[n]), ratio=gain)
    times = in_turns({n: make_step(batch_of(USUAL, n)) for n in BATCHES}, repeats)
    for n in BATCHES:
        gain = n * median(a / b for a, b in zip(times[1], times[n], strict=True))
        yield Row("scaling", f"batch {n} of {USUAL:,} points, {usual} threads", median(times[n]), ratio=gain)

    step = make_step(batch_of(USUAL, 2))

    def on(threads: int):
        def call() -> None:
            torch.set_num_threads(threads)
            step()

        return call

    times = in_turns({n: on(n) for n in THREADS}, repeats)
    torch.set_num_threads(usual)
    for n in THREADS:
        gain = median(a / b for a, b in zip(times[1], times[n], strict=True))
        yield Row("scaling", f"{n} thread{'s' * (n > 1)}, batch 2 of {USUAL:,} points", median(times[n]), ratio=gain)
    seconds = {}
    for n in PROCESSES:
        config = LaunchConfig(1, 1, n, run_id="scaling", rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="spawn")
        seconds[n] = max(elastic_launch(config, one_of_several)(4, repeats).values())
        yield Row("scaling", f"{n} process{'es' * (n > 1)} of one thread, batch 4 of {USUAL:,} points together", seconds[n],
                  ratio=seconds[PROCESSES[0]] / seconds[n])  # fmt: skip


if __name__ == "__main__":
    run_cli(lambda: run(rows, __doc__))
