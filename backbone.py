"""Backbone: points in cells -> bird's-eye view -> neck.   (reads after: sparse.py  next: heads.py)

    voxels   VoxelEncoder   sparse 3-D convolutions, then z is folded into the channels  (B, C*D, H, W)
    pillars  PillarEncoder  a small network on the points of each column                 (B, C, H, W)
    either   BEVBackbone    2-D convolutions at several strides; their outputs,          (B, C, H, W)
                            upsampled and concatenated, are the neck: the map that heads read and RDD compares
dims: B scans · P points a pillar · F values a point · V cells · C channels · D, H, W cells along z, y, x

`Config.width` scales every channel count, never the depth: all that makes a voxel student; a pillar one has larger pillars.
Sources: SECOND (plain) and CenterPoint (residual) encoders as in OpenPCDet's VoxelBackBone8x / VoxelResBackBone8x,
pillars as in its PillarVFE / DynamicPillarVFE, neck as in its BaseBEVBackbone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cli import InputError
from config import Config
from parallel import BatchNorm
from sparse import SparseConv3d, SparseTensor, SubMConv3d
from voxelize import Grid, Voxels


@dataclass
class Input:
    """A batch as the encoders take it. One `Input` can serve a teacher and its same-grid student: the cells are found once,
    and so are the rule books (sparse.py: which cell meets which under a kernel), as neither depends on any weight."""

    points: Tensor  # (points, 1 + F) number of the scan, x, y, z, ...
    voxels: Voxels
    batch_size: int
    rules: dict  # rule books: empty at first, filled by the first network that runs on this Input, found there by the second


def norm(channels: int) -> BatchNorm:
    """The backbone's batch norm: eps 1e-3, momentum 0.01, as both reference frameworks set it."""
    return BatchNorm(channels, eps=1e-3, momentum=0.01)


class SparseBlock(nn.Module):
    """Sparse convolution, batch norm, ReLU."""

    def __init__(self, conv: SubMConv3d | SparseConv3d) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm(conv.weight.shape[0])

    def forward(self, x: SparseTensor) -> SparseTensor:
        x = self.conv(x)
        return x.replace(torch.relu(self.norm(x.features)))


class ResidualBlock(nn.Module):
    """Two submanifold convolutions around an identity. They carry a bias although a norm follows, as published."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = SubMConv3d(channels, channels, 3, bias=True), norm(channels)
        self.conv2, self.norm2 = SubMConv3d(channels, channels, 3, bias=True), norm(channels)

    def forward(self, x: SparseTensor) -> SparseTensor:
        y = self.conv1(x)
        y = y.replace(torch.relu(self.norm1(y.features)))
        y = self.conv2(y)
        return y.replace(torch.relu(self.norm2(y.features) + x.features))


class VoxelEncoder(nn.Module):
    """Sparse 3-D encoder: stages at full, 1/2, 1/4, 1/8 resolution, then z is folded into the channels.

    With the published four stages the BEV map has stride 8; `encoder_channels` with one entry fewer gives stride 4.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        first, *stages, last = cfg.widths(0, cfg.encoder_channels)
        depth, height, width = Grid(cfg.point_range, cfg.voxel_size).shape
        # One more cell along z than the range has, as in SECOND, so that shapes match published checkpoints (41, 21,
        # 11, 5, 2); that layer of cells stays empty.
        self.shape = (depth + 1, height, width)
        self.conv_input = SparseBlock(SubMConv3d(cfg.point_features, first, 3))
        self.stages = nn.ModuleList()
        before, depth = first, self.shape[0]
        for i, channels in enumerate(stages):
            layers: list[nn.Module] = []
            if i > 0:
                # DIFFERS: down_kernel 2 (the CPU presets) is a non-overlapping 2x2x2; the paper's networks use 3x3x3.
                # The fourth published stage pads z by 0, the ones before by 1.
                padding = ((0, 1, 1) if i == 3 else (1, 1, 1)) if cfg.down_kernel == 3 else (0, 0, 0)
                layers.append(SparseBlock(SparseConv3d(before, channels, cfg.down_kernel, 2, padding)))
                depth = (depth + 2 * padding[0] - cfg.down_kernel) // 2 + 1
            if cfg.residual:
                layers += [ResidualBlock(channels), ResidualBlock(channels)]
            else:  # SECOND: one submanifold layer in the first stage, two in the others
                layers += [SparseBlock(SubMConv3d(channels, channels, 3)) for _ in range(1 if i == 0 else 2)]
            self.stages.append(nn.Sequential(*layers))
            before = channels
        # Halves z once more before it is folded into the channels.
        self.conv_out = SparseBlock(SparseConv3d(before, last, (3, 1, 1), (2, 1, 1), 0))
        self.stride = 2 ** (len(stages) - 1)
        self.out_channels = last * ((depth - 3) // 2 + 1)
        if depth < 3:
            raise InputError(f"preset {cfg.preset}: {self.shape[0]} layers of voxels along z are too few for {len(stages)}"
                             " stages; expected a smaller --voxel-size in z, or a higher --point-range")  # fmt: skip

    def forward(self, x: Input) -> Tensor:
        x = SparseTensor(x.voxels.features, x.voxels.coords, self.shape, x.batch_size, x.rules)
        x = self.conv_input(x)
        for stage in self.stages:
            x = stage(x)
        dense = self.conv_out(x).dense()  # (B, C, D, H, W)
        return dense.flatten(1, 2)  # (B, C*D, H, W), channel c*D + d


class PillarLayer(nn.Module):
    """Linear, batch norm, ReLU on every point, then the maximum over the points of its pillar.

    All but the last layer hand on each point's own half of the channels beside its pillar's maximum.
    """

    def __init__(self, in_channels: int, out_channels: int, last: bool) -> None:
        super().__init__()
        self.last = last
        self.linear = nn.Linear(in_channels, out_channels if last else out_channels // 2, bias=False)
        self.norm = norm(self.linear.out_features)

    def forward(self, x: Tensor, pillar_of: Tensor, n_pillars: int) -> Tensor:
        """x (n, F) values of the points, pillar_of (n,) the row of each point's pillar -> (n, C), of the last layer (V, C)."""
        x = torch.relu(self.norm(self.linear(x)))
        highest = x.new_zeros(n_pillars, x.shape[1])  # after a ReLU nothing is below 0
        highest = highest.scatter_reduce(0, pillar_of[:, None].expand_as(x), x, "amax")
        return highest if self.last else torch.cat([x, highest[pillar_of]], dim=1)


class PillarEncoder(nn.Module):
    """PointPillars: every point, seen from its pillar, through a small shared network; the maximum is the pillar.

    A point's values: its own F, its offset from the mean of the pillar's points (3), and from the pillar's centre (3).
    `max_points` = P > 0: the pillar is a table of P rows, as the published models were trained: rows without a point
    are zeros, and take part in the norm's statistics and in the maximum (a norm does not map 0 to 0). 0: points only.
    """

    stride = 1

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.grid, self.max_points = Grid(cfg.point_range, cfg.voxel_size, cfg.any_height), cfg.max_points
        channels = (cfg.point_features + 6, *cfg.widths(0, cfg.encoder_channels))
        last = len(channels) - 2
        self.layers = nn.ModuleList(
            PillarLayer(c_in, c_out, i == last) for i, (c_in, c_out) in enumerate(zip(channels[:-1], channels[1:], strict=True)))
        self.out_channels = channels[-1]

    def forward(self, x: Input) -> Tensor:
        row, n_pillars = x.voxels.point_voxel, len(x.voxels.coords)
        points, pillar_of = x.points[row >= 0, 1:], row[row >= 0]  # (n, F), (n,)
        xyz = points[:, :3]
        mean, centre = x.voxels.features[:, :3], self.grid.centers(x.voxels.coords)
        values = torch.cat([points, xyz - mean[pillar_of], xyz - centre[pillar_of]], dim=1)  # (n, F + 6)
        if self.max_points:
            empty = self.max_points - x.voxels.counts  # (V,) rows of zeros below each pillar's points
            values = torch.cat([values, values.new_zeros(int(empty.sum()), values.shape[1])])
            pillar_of = torch.cat([pillar_of, torch.arange(n_pillars, device=empty.device).repeat_interleave(empty)])
        for layer in self.layers:
            values = layer(values, pillar_of, n_pillars)  # after the last layer (V, C)
        _, height, width = self.grid.shape
        batch, _, i, j = x.voxels.coords.unbind(1)
        canvas = values.new_zeros(x.batch_size, height, width, self.out_channels)
        return canvas.index_put((batch, i, j), values).permute(0, 3, 1, 2)  # (B, C, H, W)


class BEVBackbone(nn.Module):
    """2-D convolutions at several strides, each upsampled to one map and concatenated: the neck's feature map."""

    def __init__(self, cfg: Config, in_channels: int) -> None:
        super().__init__()
        self.levels, self.ups = nn.ModuleList(), nn.ModuleList()
        channels, up_channels = cfg.widths(1, cfg.bev_channels), cfg.widths(1, cfg.up_channels)
        for layers, stride, c, up, c_up in zip(cfg.bev_layers, cfg.bev_strides, channels, cfg.up_strides,
                                               up_channels, strict=True):  # fmt: skip
            level = [conv_norm_relu(in_channels, c, 3, stride)]
            level += [conv_norm_relu(c, c, 3) for _ in range(layers)]
            self.levels.append(nn.Sequential(*level))
            # Stride 1 is a transposed convolution too, as in OpenPCDet (det3d: an ordinary 1x1).
            conv, k = (nn.ConvTranspose2d, int(up)) if up >= 1 else (nn.Conv2d, round(1 / up))
            self.ups.append(nn.Sequential(conv(c, c_up, k, k, bias=False), norm(c_up), nn.ReLU()))
            in_channels = c
        self.stride = cfg.bev_strides[0] / cfg.up_strides[0]
        self.out_channels = sum(up_channels)

    def forward(self, x: Tensor) -> Tensor:
        neck = []
        for level, up in zip(self.levels, self.ups, strict=True):
            x = level(x)
            neck.append(up(x))  # (B, c_up, H, W)
        return torch.cat(neck, dim=1)  # (B, C, H, W)


def conv_norm_relu(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, norm(out_channels), nn.ReLU())
