"""Memory: the most that the process of one training step holds, every preset, on the CPU.   (after: detectors.py)

Each preset in a process of its own: forward, targets, loss, backward and one optimiser step on one full scan, in float32.
KITTI's presets see a KITTI frame, nuScenes' one simulated turn of 64 beams without labels (a centre head's targets do not
depend on how many there are). About 230 MiB are Python and torch.
"""

import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from benchmarks import Row, run
from cli import run_cli


def peak(name: str, data: str) -> int:
    """Bytes: the highest resident memory of this process after one step of a preset."""
    import resource

    import numpy as np
    import torch

    import parallel
    from benchmarks.detectors import scans
    from data import Frame
    from data.batch import collate
    from detector import build
    from presets import preset
    from rdd import total_loss
    from sheet import simulated_cloud

    parallel.keep_freed_memory()
    cfg = preset(name, data)
    if data == "nuscenes":
        cloud = simulated_cloud(cfg.point_features, False)
        batch = collate([Frame("simulated", cloud, np.zeros((0, 9), np.float32), ())], cfg)
    else:
        batch = scans(cfg)
    detector = build(cfg)
    optimizer = torch.optim.AdamW(detector.parameters())
    total_loss(detector.loss(detector(detector.prepare(batch)), batch), {}).backward()
    optimizer.step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def rows(repeats: int) -> Iterator[Row]:  # noqa: ARG001 (a peak is measured once)
    from presets import PRESETS

    for name, make in PRESETS.items():
        data = "nuscenes" if make().data == "nuscenes" else "kitti"
        # spawn: a forked process would begin with what this one holds
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            size = pool.submit(peak, name, data).result()
        yield Row("memory", f"a training step of {name}, {data}, batch 1", size / 2**20, unit="MiB")


if __name__ == "__main__":
    run_cli(lambda: run(rows, __doc__))
