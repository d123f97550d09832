"""Detector: cells -> encoder -> BEV backbone -> head.   (after: heads.py  next: rdd.py; beside: weights.py, sheet.py)

    python detector.py sheet                                       what every teacher and student costs
    python detector.py import CHECKPOINT --preset NAME --out FILE  a teacher from an OpenPCDet checkpoint

One class for every detector, the grid {voxel, pillar} encoder x {centre, anchor} head:

              centre head           anchor head
    voxels    CenterPoint-Voxel     SECOND
    pillars   CenterPoint-Pillar    PointPillars

Follow one scan through `Detector.forward` and you have read how LiDAR detection works.
`Output` is all that a distillation loss may see of a model: its neck's features, its head's maps, and where they lie.
dims: B scans · C, H, W of a BEV map · K classes · A anchors a cell · R regions
"""

import sys
from dataclasses import dataclass
from importlib import import_module
from math import prod

import torch
from torch import Tensor, nn

from anchors import AnchorHead
from backbone import BEVBackbone, Input, PillarEncoder, VoxelEncoder
from cli import InputError, did_you_mean, run_cli
from config import Config
from data.batch import Batch  # points (N, 1 + F), the scan's number first; per scan boxes (M, 7) and labels (M,)
from heads import CenterHead, Detections, Geometry
from voxelize import Grid, voxelize


@dataclass
class Output:
    """What a model says about a batch, for the losses, for decoding and for distillation."""

    neck: Tensor  # (B, C, H, W) the feature map f of the paper
    maps: list[dict[str, Tensor]]  # the head's maps, per task
    geometry: Geometry  # metres <-> cells of neck and maps
    head: CenterHead | AnchorHead  # what reads the maps

    @property
    def class_logits(self) -> Tensor:
        """(B, K, H, W) a centre head's heat maps, (B, A*K, H, W) the class logits of an anchor head's A anchors a cell."""
        return self.head.class_logits(self.maps)

    @property
    def regression(self) -> Tensor | None:
        """(B, A*7, H, W) box codes for Eq. 9's regression term; None for a centre head, which the paper exempts."""
        return self.head.regression(self.maps)

    def proposals(self, score: float, limit: int) -> Tensor:
        """(R, 5) regions the model believes in: scan, x0, y0, x1, y1 in metres."""
        return self.head.proposals(self.maps, score, limit)


class Detector(nn.Module):
    """A LiDAR detector built from its config. Raises InputError for a config that makes no network (`check`)."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        check(cfg)
        self.cfg = cfg
        self.grid = Grid(cfg.point_range, cfg.voxel_size, cfg.any_height)
        self.encoder = VoxelEncoder(cfg) if cfg.encoder == "voxel" else PillarEncoder(cfg)
        self.backbone = BEVBackbone(cfg, self.encoder.out_channels)
        cell_x, cell_y = (size * self.encoder.stride * self.backbone.stride for size in cfg.voxel_size[:2])
        geometry = Geometry(cfg.point_range[0], cfg.point_range[1], cell_x, cell_y)
        self.head = (CenterHead if cfg.head == "center" else AnchorHead)(cfg, self.backbone.out_channels, geometry)
        # The memory order that 2-D convolutions are fastest in, on CPU and CUDA; results do not depend on it.
        self.backbone.to(memory_format=torch.channels_last)
        self.head.to(memory_format=torch.channels_last)

    def prepare(self, batch: Batch) -> Input:
        """Points -> cells. Not part of the network, so a teacher and its same-grid student do it once."""
        voxels = voxelize(batch.points, self.grid, len(batch), self.cfg.max_points or None, self.cfg.max_voxels or None)
        return Input(batch.points, voxels, len(batch), {})

    def forward(self, x: Input) -> Output:
        device = x.points.device.type
        half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
        with torch.autocast(device, torch.float16, enabled=half):  # bfloat16 is for the dense layers: spconv does not know it
            bev = self.encoder(x).contiguous(memory_format=torch.channels_last)  # (B, C, H, W)
        neck = self.backbone(bev)  # (B, C', H', W'): the (B, C, H, W) of `Output` and rdd.py
        return Output(neck, self.head(neck), self.head.geometry, self.head)

    def loss(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """The detection loss's terms, weighted: their sum is what is minimised."""
        return self.head.loss(output.maps, batch.boxes, batch.labels)

    def decode(self, output: Output) -> list[Detections]:
        return self.head.decode(output.maps)

    def shares_input(self, other: "Detector") -> bool:
        """Whether cells and rule books, which no weight enters, are the same in both, so that one `Input` serves both."""
        keys = ("encoder", "point_range", "voxel_size", "any_height", "max_points", "max_voxels", "point_features", "down_kernel")
        return all(getattr(self.cfg, k) == getattr(other.cfg, k) for k in keys)


def check(cfg: Config) -> None:
    """Raises InputError, one line, when no network fits the config."""
    levels = (cfg.bev_layers, cfg.bev_strides, cfg.bev_channels, cfg.up_strides, cfg.up_channels)
    if len({len(level) for level in levels}) != 1 or not cfg.bev_layers:
        raise InputError(f"preset {cfg.preset}: expected one --bev-layers, --bev-strides, --bev-channels, --up-strides,"
                         f" --up-channels a level; found {', '.join(str(len(level)) for level in levels)}")  # fmt: skip
    if any(abs(max(up, 1 / up) - round(max(up, 1 / up))) > 1e-3 for up in cfg.up_strides):
        raise InputError(f"--up-strides: expected whole numbers, or 1 over one; found {','.join(map(str, cfg.up_strides))}")
    sizes = [prod(cfg.bev_strides[: i + 1]) / up for i, up in enumerate(cfg.up_strides)]
    if max(sizes) - min(sizes) > 1e-3:
        raise InputError(f"preset {cfg.preset}: the neck's levels would have strides {sizes}; expected --bev-strides and"
                         " --up-strides that bring all to the same")  # fmt: skip
    stride = (2 ** (len(cfg.encoder_channels) - 3) if cfg.encoder == "voxel" else 1) * max(prod(cfg.bev_strides), *sizes)
    for axis, name in enumerate("xyz"):
        size = cfg.voxel_size[axis] * (stride if name != "z" else 1)
        cells = (cfg.point_range[axis + 3] - cfg.point_range[axis]) / size
        if abs(cells - round(cells)) > 1e-3 or round(cells) < 1:
            raise InputError(f"preset {cfg.preset}: the range along {name} is {cells:.3f} cells of {size:g} m (voxel x"
                             " strides); expected a whole number")  # fmt: skip
    if cfg.encoder == "pillar" and round((cfg.point_range[5] - cfg.point_range[2]) / cfg.voxel_size[2]) != 1:
        raise InputError(f"preset {cfg.preset}: a pillar is {cfg.voxel_size[2]:g} m high; expected the height of the range")
    if cfg.encoder == "pillar" and any(channels % 2 for channels in cfg.widths(0, cfg.encoder_channels)[:-1]):
        raise InputError(f"preset {cfg.preset}: a pillar layer before the last has an odd number of channels at --width"
                         f" {cfg.width[0]:g}; expected an even one, half for the points and half for their maximum")  # fmt: skip
    named = sorted(name for task in cfg.task_classes for name in task)
    if cfg.head == "center" and named != sorted(cfg.classes):
        raise InputError(f"preset {cfg.preset}: tasks hold {named}, classes are {sorted(cfg.classes)}")
    if cfg.head == "anchor" and len(cfg.anchors) != len(cfg.classes):
        raise InputError(f"preset {cfg.preset}: {len(cfg.anchors)} anchors for {len(cfg.classes)} classes; expected one each")
    if cfg.head == "center" and len(cfg.code_weights) != 8 + 2 * cfg.velocity:
        raise InputError(f"--code-weights: expected {8 + 2 * cfg.velocity} weights, found {len(cfg.code_weights)}")


def build(cfg: Config) -> Detector:
    """A new detector; its weights depend on `cfg.seed` only, and the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        return Detector(cfg)


def main() -> None:
    modules, command = {"sheet": "sheet", "import": "weights"}, sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        print(__doc__)
        return
    if command not in modules:
        raise InputError(f"unknown command {command!r}{did_you_mean(command, modules)}")
    import_module(modules[command]).main(sys.argv[2:])


if __name__ == "__main__":
    run_cli(main)
