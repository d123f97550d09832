"""Detector: voxels -> encoder -> BEV backbone -> head, checkpoints, and what it costs.   (after: heads.py  next: rdd.py)

One class for every detector: {voxel, pillar} encoder x {center, anchor} head.  Here: CenterPoint-Voxel.
Follow one scan through `Detector.forward` and you have read how LiDAR detection works.
`Output` is all that a distillation loss may see of a model: its neck's features, its head's maps, and where they lie.
dims: B scans · N points · V voxels · C, H, W of a BEV map
"""

import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbone import BEVBackbone, VoxelEncoder
from config import Config, InputError, did_you_mean, from_json
from data.batch import Batch
from heads import CenterHead, Detections, Geometry
from sparse import SparseConv3d, SparseTensor
from voxelize import Grid, Voxels, voxelize


@dataclass
class Input:
    """A batch as the encoder takes it. A same-grid student reads its teacher's: same voxels, same rule books."""

    voxels: Voxels
    rules: dict
    batch_size: int


@dataclass
class Output:
    """What a model says about a batch, for the losses, for decoding and for distillation."""

    neck: Tensor  # (B, C, H, W) the feature map f of the paper
    maps: list[dict[str, Tensor]]  # the head's maps, per task
    geometry: Geometry  # metres <-> cells of neck and maps
    head: CenterHead  # what reads the maps

    @property
    def class_logits(self) -> Tensor:
        """(B, K, H, W): all tasks' class maps side by side, in the order of the tasks."""
        return torch.cat([task["heatmap"] for task in self.maps], dim=1)

    @property
    def regression(self) -> Tensor | None:
        """(B, R, H, W) box maps for Eq. 9's regression term; None for a centre head, which the paper exempts."""
        return None

    def proposals(self, score: float, limit: int) -> Tensor:
        """(R, 5) regions the model believes in: scan, x0, y0, x1, y1 in metres."""
        return self.head.proposals(self.maps, score, limit)


class Detector(nn.Module):
    """A LiDAR detector built from its config.

    Raises InputError when the range is not a whole number of voxels x stride, or tasks and classes disagree.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.grid = Grid(cfg.point_range, cfg.voxel_size)
        self.encoder = VoxelEncoder(cfg)
        cell_x, cell_y = (cfg.voxel_size[a] * self.encoder.stride for a in (0, 1))
        geometry = Geometry(cfg.point_range[0], cfg.point_range[1], cell_x, cell_y)
        _check(cfg, self.encoder.stride)
        self.backbone = BEVBackbone(cfg, self.encoder.out_channels)
        self.head = CenterHead(cfg, self.backbone.out_channels, geometry)
        # The memory order that 2-D convolutions are fastest in, on CPU and CUDA; results do not depend on it.
        self.backbone.to(memory_format=torch.channels_last)
        self.head.to(memory_format=torch.channels_last)

    def prepare(self, batch: Batch) -> Input:
        """Points -> voxels. Not part of the network, so a teacher and its same-grid student do it once."""
        voxels = voxelize(batch.points, self.grid, len(batch), self.cfg.max_points or None, self.cfg.max_voxels or None)
        return Input(voxels, {}, len(batch))

    def forward(self, x: Input) -> Output:
        depth, height, width = self.grid.shape
        # One more cell along z than the range has, as in SECOND: 41, 21, 11, 5, 2.
        sparse = SparseTensor(x.voxels.features, x.voxels.coords, (depth + 1, height, width), x.batch_size, x.rules)
        bev = self.encoder(sparse).contiguous(memory_format=torch.channels_last)  # (B, C*D, H, W)
        neck = self.backbone(bev)  # (B, C, H, W)
        return Output(neck, self.head(neck), self.head.geometry, self.head)

    def loss(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        """The detection loss's terms, weighted: their sum is what is minimised."""
        return self.head.loss(output.maps, batch.boxes, batch.labels)

    def decode(self, output: Output) -> list[Detections]:
        return self.head.decode(output.maps)

    def shares_input(self, other: "Detector") -> bool:
        """Whether both voxelise alike and downsample alike, so that one `Input` serves both."""
        keys = ("point_range", "voxel_size", "max_points", "max_voxels", "point_features", "down_kernel")
        return all(getattr(self.cfg, k) == getattr(other.cfg, k) for k in keys)


def _check(cfg: Config, stride: int) -> None:
    for axis, name in enumerate("xy"):
        size = cfg.voxel_size[axis] * stride * (cfg.bev_strides[-1] if len(cfg.bev_strides) > 1 else 1)
        cells = (cfg.point_range[axis + 3] - cfg.point_range[axis]) / size
        if abs(cells - round(cells)) > 1e-3:
            raise InputError(f"preset {cfg.preset}: the range along {name} is {cells:.3f} cells of {size:g} m (voxel x"
                             " strides); expected a whole number")  # fmt: skip
    named = sorted(name for task in cfg.task_classes for name in task)
    if named != sorted(cfg.classes):
        raise InputError(f"preset {cfg.preset}: tasks hold {named}, classes are {sorted(cfg.classes)}")


def build(cfg: Config) -> Detector:
    """A new detector; its weights depend on `cfg.seed` only, and the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        return Detector(cfg)


# ------------------------------------------------------------------ checkpoints: tensors and builtins, nothing else


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to a temporary name, then move it into place: a crash or a full disk leaves the old file whole.

    Raises InputError when the disk refuses it.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: checkpoint not written ({reason}); the previous one is untouched") from None


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint of this project. Nothing in the file is executed (weights_only).

    Raises InputError for a file that is missing, truncated, not a checkpoint, or some other program's.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint{_nearby(path)}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        reason = (str(error).splitlines() or ["unreadable"])[0]
        raise InputError(f"{path}: expected a checkpoint written by train.py, found a file torch cannot read safely: "
                         f"{reason[:120]}") from None  # fmt: skip
    if not isinstance(content, dict) or content.get("format") != 1 or "model" not in content:
        found = f"a dict with keys {sorted(map(str, content))[:6]}" if isinstance(content, dict) else type(content).__name__
        raise InputError(f"{path}: expected a checkpoint written by train.py (format 1), found {found}")
    return content


def _nearby(path: Path) -> str:
    runs = [str(p) for p in Path("runs").glob("*/last.pt")]
    return did_you_mean(str(path), runs) if runs else ""


def load_weights(model: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Strict loading, with one line that says what does not fit. Raises InputError."""
    own = model.state_dict()
    problems = [f"missing {k}" for k in own if k not in weights] + [f"unexpected {k}" for k in weights if k not in own]
    problems += [f"{k} has shape {tuple(weights[k].shape)}, expected {tuple(own[k].shape)}"
                 for k in own if k in weights and weights[k].shape != own[k].shape]  # fmt: skip
    if problems:
        raise InputError(f"{path}: made for another model: {problems[0]}"
                         + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""))  # fmt: skip
    model.load_state_dict(weights)


def load_detector(path: str | Path) -> tuple[Detector, dict[str, Any]]:
    """A trained detector from its checkpoint, in eval mode, and the checkpoint's content."""
    content = read_checkpoint(path)
    detector = Detector(from_json(content["config"]))
    load_weights(detector, content["model"], path)
    return detector.eval(), content


# ------------------------------------------------------------------ cost


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def count_macs(detector: Detector, batch: Batch) -> float:
    """Multiply-accumulates of one forward pass, a scan, on these scans: convolutions only, norms and ReLUs left out.

    A sparse layer costs (pairs in its rule book) x C_in x C_out, so the number depends on the scan: name it. A
    transposed convolution costs (input cells) x k^2 x C_in x C_out.
    """
    total = 0
    handles = []

    def count(module: nn.Module, inputs: tuple, output: Any) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            k = module.kernel_size[0] * module.kernel_size[1]
            total += output.numel() * module.in_channels // module.groups * k
        elif isinstance(module, nn.ConvTranspose2d):
            k = module.kernel_size[0] * module.kernel_size[1]
            total += inputs[0].numel() * module.out_channels * k
        else:
            book = module.rule_book(inputs[0])
            pairs = len(book.src) + (len(book.coords) if book.centre is not None else 0)
            total += pairs * module.weight[:, 0, 0, 0].numel()  # C_out x C_in

    for module in detector.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | SparseConv3d):
            handles.append(module.register_forward_hook(count))
    training = detector.training
    detector.eval()(detector.prepare(batch))
    detector.train(training)
    for handle in handles:
        handle.remove()
    return total / len(batch)


