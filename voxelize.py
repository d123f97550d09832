"""Voxels: from a list of points to the occupied cells of a grid.   (reads after: boxes.py   next: sparse.py)

dims: N points of all B scans of a batch · F values a point (x, y, z, intensity, ...) · V occupied voxels · P points kept of one ·
      D, H, W cells along z, y, x

A LiDAR scan fills about one cell in a thousand, so a voxel is a row in a list (batch, z, y, x), not an entry
of a dense array. One stable sort does the work: number the cells, sort the points by the cell, and the
points of a voxel lie side by side:

    cell of each point    7  2  7  9  2  7          (in the order the scanner saw them)
    sorted, stable        2  2 | 7  7  7 | 9        <- three runs = three voxels
    point                 1  4 | 0  2  5 | 3        <- first point of a run = first appearance of the voxel
    place in its run      0  1 | 0  1  2 | 0        <- "keep the first P points of a voxel" is `place < P`

A pillar is a voxel as high as the grid (D = 1); nothing else differs.
Published models were trained with caps (P points a voxel, so many voxels a scan): their voxelisers write into
arrays of fixed size. Both caps are here, so that their checkpoints see the voxels they were trained on.
"""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """A box of space cut into equal cells. Cell 0 is at the lower corner; its upper borders are outside."""

    point_range: tuple[float, float, float, float, float, float]  # x0, y0, z0, x1, y1, z1 in metres
    voxel_size: tuple[float, float, float]  # x, y, z in metres
    any_height: bool = False  # points above the grid belong to its top layer, those below to its lowest one

    @property
    def shape(self) -> tuple[int, int, int]:
        """Cells along (z, y, x) = (D, H, W)."""
        low, high = self.point_range[:3], self.point_range[3:]
        cells = [round((b - a) / size) for a, b, size in zip(low, high, self.voxel_size, strict=True)]
        return cells[2], cells[1], cells[0]

    def centers(self, coords: Tensor) -> Tensor:
        """(V, 4) [batch, z, y, x] -> (V, 3) x, y, z of the cells' centres, metres, float32."""
        size = torch.tensor(self.voxel_size, device=coords.device)
        low = torch.tensor(self.point_range[:3], device=coords.device)
        return (coords[:, [3, 2, 1]] + 0.5) * size + low


class Voxels(NamedTuple):
    """The occupied cells of a batch, sorted by (batch, z, y, x)."""

    coords: Tensor  # (V, 4) int64: batch, z, y, x
    features: Tensor  # (V, F) mean over the points kept in the voxel
    counts: Tensor  # (V,) int64: how many were kept, 1 .. max_points
    point_voxel: Tensor  # (N,) int64: row of the voxel that keeps the point; -1: outside, NaN, over a cap


def voxelize(points: Tensor, grid: Grid, batch_size: int, max_points: int | None = None,
             max_voxels: int | None = None) -> Voxels:  # fmt: skip
    """Points (N, 1 + F) float, column 0 the number of the scan, then x, y, z in metres, ... -> `Voxels`.

    Points outside the grid and points with a NaN or infinite value are left out. `max_points`: a voxel keeps
    its first P points, in the order given. `max_voxels`: a scan keeps its first so many voxels, in the order
    in which points appear in them. None: no cap. Both caps are those of spconv's PointToVoxel. A scan without
    points has no rows. The result is the same on CPU and CUDA, and in every run.
    Raises ValueError when a scan number lies outside 0 .. batch_size - 1.
    """
    point, key = cell_keys(points, grid, batch_size)  # (n,) points inside, (n,) their cells
    key, order = key.sort(stable=True)
    point = point.index_select(0, order)
    # (V,) a voxel is a run of equal keys; (n,) the voxel of each sorted point; (V,) its points
    key, run, counts = torch.unique_consecutive(key, return_inverse=True, return_counts=True)

    if max_points is not None or max_voxels is not None:
        first = counts.cumsum(0) - counts  # (V,) where each run begins
        place = torch.arange(len(run), device=run.device) - first.index_select(0, run)
        kept = place < (len(run) if max_points is None else max_points)
        counts = counts if max_points is None else counts.clamp(max=max_points)
        if max_voxels is not None:
            scan = key.long() // prod(grid.shape)
            kept_voxel = appearance_rank(scan, point.index_select(0, first), len(points)) < max_voxels  # (V,)
            kept &= kept_voxel[run]
            run = (kept_voxel.cumsum(0) - 1)[run]  # rows move up; rows of dropped voxels are not used below
            key, counts = key[kept_voxel], counts[kept_voxel]
        row = kept.nonzero()[:, 0]
        point, run = point.index_select(0, row), run.index_select(0, row)

    begin = counts.cumsum(0) - counts
    # embedding_bag adds the points of a run one after the other: the same bits in every run, on CUDA too
    features = F.embedding_bag(point, points[:, 1:], begin, mode="sum") / counts[:, None]  # (V, F)
    point_voxel = torch.full((len(points),), -1, device=points.device).index_copy_(0, point, run)
    return Voxels(split_keys(key, grid.shape), features, counts, point_voxel)


def cell_keys(points: Tensor, grid: Grid, batch_size: int) -> tuple[Tensor, Tensor]:
    """Rows (n,) of the points inside, and their cells' numbers ((batch*D + z)*H + y)*W + x (n,), of `cell_dtype`."""
    scan = points[:, 0]
    if len(points) and not (0 <= scan.min() and scan.max() < batch_size):  # written so that NaN fails too
        raise ValueError(f"scan numbers (column 0) must be 0 to {batch_size - 1}, found {scan.min():g} to {scan.max():g}")
    low, size = (points.new_tensor(metres, dtype=torch.float32) for metres in (grid.point_range[:3], grid.voxel_size))
    # Features that are finite: 0 times NaN or infinity is NaN. And z (column 3), where the clamp below would bring it inside.
    inside, cells = (points[:, 3 if grid.any_height else 4 :] * 0).sum(1) == 0, []
    for axis, length in enumerate(grid.shape[::-1]):
        cell = ((points[:, 1 + axis].float() - low[axis]) / size[axis]).floor()  # float32, as the reference
        if axis == 2 and grid.any_height:
            cell = cell.clamp(0, length - 1)
        inside &= (cell >= 0) & (cell < length)  # as floats: NaN and infinity lie in no cell
        cells.append(cell)
    point = inside.nonzero()[:, 0]
    b, x, y, z = (column.index_select(0, point).to(cell_dtype(batch_size, grid.shape)) for column in (scan, *cells))
    return point, ((b * grid.shape[0] + z) * grid.shape[1] + y) * grid.shape[2] + x


def cell_dtype(batch_size: int, shape: tuple[int, int, int]) -> torch.dtype:
    """int32 where it can number all cells: what sorts, searches and divides cells takes half the time. Else int64."""
    return torch.int32 if batch_size * prod(shape) < 2**31 else torch.int64


def split_keys(key: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Cell numbers (V,) -> coords (V, 4) [batch, z, y, x]."""
    parts = []
    for length in shape[::-1]:
        row = key // length  # one division for quotient and remainder
        parts.append(key - row * length)
        key = row
    return torch.stack([key, *parts[::-1]], 1).long()


def appearance_rank(batch: Tensor, first_point: Tensor, n_points: int) -> Tensor:
    """(V,) place of each voxel among those of its scan, in the order in which points first fall into them.

    `batch` (V,) is sorted; `first_point` (V,) is the row of the first point in each voxel, of `n_points`.
    """
    order = (batch * n_points + first_point).argsort()  # scan by scan, by appearance
    voxels_of_scan = torch.bincount(batch)
    begin = voxels_of_scan.cumsum(0) - voxels_of_scan  # (B,)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - begin[batch]  # batch[order] is batch
    return rank
