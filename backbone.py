"""Backbone: voxels -> sparse 3-D encoder -> bird's-eye view -> neck.   (reads after: sparse.py  next: heads.py)

    points -> voxelize -> VoxelEncoder  (B, C*D, H, W)  -> BEVBackbone  (B, N, H, W)   "the neck", what RDD distils
dims: B scans · V voxels · C channels · D, H, W cells along z, y, x · N neck channels

`Config.width` scales every channel count and leaves the depth alone: that is all a student is.
Sources: SECOND (plain) and CenterPoint (residual) encoders as in OpenPCDet's VoxelBackBone8x / VoxelResBackBone8x,
neck as in its BaseBEVBackbone.
"""

import torch
from torch import Tensor, nn

from config import Config
from parallel import BatchNorm
from sparse import SparseConv3d, SparseTensor, SubMConv3d


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
        self.conv_input = SparseBlock(SubMConv3d(cfg.point_features, first, 3))
        self.stages = nn.ModuleList()
        before = first
        for i, channels in enumerate(stages):
            layers: list[nn.Module] = []
            if i > 0:
                # DIFFERS: down_kernel 2 (the CPU presets) is a non-overlapping 2x2x2; the paper's networks use 3x3x3.
                # The fourth published stage pads z by 0 (41 -> 21 -> 11 -> 5 cells), the ones before by 1.
                padding = ((0, 1, 1) if i == 3 else 1) if cfg.down_kernel == 3 else 0
                layers.append(SparseBlock(SparseConv3d(before, channels, cfg.down_kernel, 2, padding)))
            if cfg.residual:
                layers += [ResidualBlock(channels), ResidualBlock(channels)]
            else:  # SECOND: one submanifold layer in the first stage, two in the others
                layers += [SparseBlock(SubMConv3d(channels, channels, 3)) for _ in range(1 if i == 0 else 2)]
            self.stages.append(nn.Sequential(*layers))
            before = channels
        self.conv_out = SparseBlock(SparseConv3d(before, last, (3, 1, 1), (2, 1, 1), 0))
        self.stride = 2 ** (len(stages) - 1)
        self.out_channels = last * self._out_depth(cfg, len(stages))

    @staticmethod
    def _out_depth(cfg: Config, stages: int) -> int:
        """Cells along z that are left after the last layer."""
        depth = round((cfg.point_range[5] - cfg.point_range[2]) / cfg.voxel_size[2]) + 1
        for i in range(1, stages):
            padding = (0 if i == 3 else 1) if cfg.down_kernel == 3 else 0
            depth = (depth + 2 * padding - cfg.down_kernel) // 2 + 1
        return (depth - 3) // 2 + 1

    def forward(self, x: SparseTensor) -> Tensor:
        x = self.conv_input(x)
        for stage in self.stages:
            x = stage(x)
        dense = self.conv_out(x).dense()  # (B, C, D, H, W)
        return dense.flatten(1, 2)  # (B, C*D, H, W), channel c*D + d


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
            self.ups.append(nn.Sequential(nn.ConvTranspose2d(c, c_up, up, up, bias=False), norm(c_up), nn.ReLU()))
            in_channels = c
        self.out_channels = sum(up_channels)

    def forward(self, x: Tensor) -> Tensor:
        neck = []
        for level, up in zip(self.levels, self.ups, strict=True):
            x = level(x)
            neck.append(up(x))  # (B, c_up, H, W)
        return torch.cat(neck, dim=1)  # (B, N, H, W)


def conv_norm_relu(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, norm(out_channels), nn.ReLU())
