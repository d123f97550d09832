"""Voxelisation: against spconv's C++ PointToVoxel and numpy.   (subject: voxelize.py   next: sparse.py)

    python -m benchmarks.voxels

One scan is cut into SECOND's voxels (KITTI, 0.05 m), CenterPoint's voxels (nuScenes, 0.1 m) or pillars, and each cell gets the
mean of its points. spconv's PointToVoxel runs as the published detectors use it: caps of 5 (10) points a voxel, 32 a
pillar, its table (V, P, F) then averaged, and, as ours, the voxel of every point; ours runs with the same caps and must give
the same voxels and, to 1e-5, the same means. numpy: one `unique` and a `bincount` a column, without caps. The clouds: a KITTI
frame, and nuScenes' ten merged sweeps; where they
are absent, simulated frames.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks import REAL, Row, compare, in_turns, run
from cli import run_cli
from voxelize import Grid, Voxels, voxelize

KITTI = Grid((0, -40, -3, 70.4, 40, 1), (0.05, 0.05, 0.1))
KITTI_PILLARS = Grid((0, -39.68, -3, 69.12, 39.68, 1), (0.16, 0.16, 4))
NUSCENES = Grid((-51.2, -51.2, -5, 51.2, 51.2, 3), (0.1, 0.1, 0.2))
NUSCENES_PILLARS = Grid((-51.2, -51.2, -5, 51.2, 51.2, 3), (0.2, 0.2, 8))


def kitti_cloud(image_crop: bool = False) -> tuple[str, np.ndarray]:
    """(name, points (N, 4) float32) of one KITTI frame: the whole turn of the scanner, or what the camera sees."""
    root = REAL / "kitti"
    if root.is_dir():
        if image_crop:
            from data.kitti import Kitti

            return "KITTI 000000, image crop", Kitti(root, "train", frames=("000000",))[0].points
        from data.kitti_files import read_cloud

        return "KITTI 000000", read_cloud(root / "training/velodyne/000000.bin", 4)[0]
    from data.simulate_kitti import make_frame

    return "simulated frame" + ", sector" * image_crop, make_frame(0, 0, 0, not image_crop)[0]


def nuscenes_cloud() -> tuple[str, np.ndarray]:
    """(name, points (N, 5) float32): ten merged sweeps of nuScenes, about 270 000 points; else simulated frames in one."""
    path = REAL / "nuscenes/aggregated_10_sweeps_float16.bin"
    if path.is_file():
        return "nuScenes, 10 sweeps", np.fromfile(path, np.float16).reshape(-1, 5).astype(np.float32)
    from data.simulate_kitti import make_frame

    clouds = [make_frame(0, 0, i, True)[0] for i in range(3)]
    return "3 simulated frames in one", np.hstack([points := np.concatenate(clouds), np.zeros_like(points[:, :1])])


def one_scan(points: np.ndarray) -> Tensor:
    """(N, F) -> (N, 1 + F): the batch of this scan alone, as `voxelize` takes it."""
    return torch.from_numpy(np.pad(points, ((0, 0), (1, 0))).astype(np.float32))


def spconv_voxelizer(grid: Grid, points: Tensor, max_points: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """A function -> coords (V, 3), means (V, F). It has room for every voxel; its tables are made here, not timed."""
    from spconv.pytorch.utils import PointToVoxel

    points = points[:, 1:].contiguous()
    make = PointToVoxel(list(grid.voxel_size), list(grid.point_range), points.shape[1], len(points), max_points)

    def voxels() -> tuple[Tensor, Tensor]:
        table, coords, counts, _ = make.generate_voxel_with_id(points)  # (V, P, F), (V, 3), (V,), (N,)
        return coords, table.sum(1) / counts[:, None]

    return voxels


def numpy_voxelizer(grid: Grid, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """points (N, F) -> coords (V, 3), means (V, F)."""
    cell = np.floor((points[:, :3] - np.float32(grid.point_range[:3])) / np.float32(grid.voxel_size))
    inside = ((cell >= 0) & (cell < grid.shape[::-1])).all(1)
    x, y, z = cell[inside].astype(np.int64).T
    key = (z * grid.shape[1] + y) * grid.shape[2] + x
    key, voxel, counts = np.unique(key, return_inverse=True, return_counts=True)
    sums = [np.bincount(voxel, weights=column) for column in points[inside].T]
    return np.stack(np.unravel_index(key, grid.shape), 1), np.stack(sums, 1) / counts[:, None]


def largest_difference(ours: Voxels, theirs: tuple[Tensor, Tensor]) -> float:
    """Of the means, relative to the largest; infinite where the voxels are not the same."""
    key = [np.ravel_multi_index(np.asarray(coords).T.astype(int), (1 << 12,) * 3) for coords in (ours.coords[:, 1:], theirs[0])]
    order = key[1].argsort()
    if not np.array_equal(key[0], key[1][order]):
        return float("inf")
    means = np.asarray(theirs[1])[order]
    return float(np.abs(ours.features.numpy() - means).max() / np.abs(means).max())


def against(case: str, points: Tensor, grid: Grid, cap: int, repeats: int) -> Iterator[Row]:
    """One cloud, one grid: ours against spconv with `cap` points a voxel, against numpy without a cap."""
    ours, by_numpy = partial(voxelize, points, grid, 1), partial(numpy_voxelizer, grid, points[:, 1:].numpy())
    try:
        theirs = spconv_voxelizer(grid, points, cap)
    except ImportError:
        yield Row("voxelisation", case, None, note="spconv is not installed")
    else:
        voxels = ours(cap)
        note = f"{len(voxels.coords):,} voxels, same to {largest_difference(voxels, theirs()):.0e}"
        yield compare("voxelisation", case, partial(ours, cap), "spconv C++", theirs, 1.0, repeats, note)
    note = f"same to {largest_difference(ours(), by_numpy()):.0e}"
    yield compare("voxelisation", case, ours, "numpy", by_numpy, 1.0, repeats, note)


def rows(repeats: int) -> Iterator[Row]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    clouds = [(kitti_cloud(True), KITTI, 5, KITTI_PILLARS), (kitti_cloud(), KITTI, 5, KITTI_PILLARS),
              (nuscenes_cloud(), NUSCENES, 10, NUSCENES_PILLARS)]  # fmt: skip
    for (name, cloud), voxels, most, pillars in clouds:
        points = one_scan(cloud)
        for what, grid, cap in (("voxels", voxels, most), ("pillars", pillars, 32)):
            case = f"{what}, {name}, {len(cloud):,} points, 1 thread"
            yield from against(case, points, grid, cap, repeats)
    # The cost of a point: parts of the largest cloud, thinned evenly, so that only the number changes.
    (name, cloud), *_ = clouds[-1]
    for n in (20_000, 60_000, 120_000, 240_000):
        part = partial(voxelize, one_scan(cloud[np.linspace(0, len(cloud) - 1, n).astype(int)]), NUSCENES, 1)
        seconds = np.median(in_turns({"ours": part}, repeats)["ours"])
        yield Row("voxelisation", f"a point of {n:,}, {name}, 1 thread", float(1e9 * seconds / n), unit="ns")
    torch.set_num_threads(before)


if __name__ == "__main__":
    run_cli(lambda: run(rows, __doc__))
