"""The centre head: the neck's feature map -> boxes.   (reads after: backbone.py  next: detector.py; beside: anchors.py)

CenterHead (CenterPoint): an object is a peak of its class's heat map; the other maps, read at the peak's cell, say the
rest: where in the cell, how high, how large, which way, how fast. Three methods: `forward` (maps), `loss`, `decode`;
three more say what a distillation loss may read: `class_logits`, `regression`, `proposals`.
dims: B scans · C neck channels · H, W cells along y, x · K classes of a task · M objects of a scan · R regions
Source: CenterPoint as in OpenPCDet's CenterHead; the differences are named beside the line.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import boxes as box_ops
from config import Config
from parallel import BatchNorm, at_least_one, mean_over_processes

MAX_CANDIDATES = 500  # cells of a scan and task that are decoded


class Geometry(NamedTuple):
    """Where a BEV map lies in the world: cell (i, j) of a map covers x0 + j*cell_x .. + cell_x, y0 + i*cell_y ..."""

    x0: float
    y0: float
    cell_x: float
    cell_y: float

    def to_cells(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Metres -> cells, as real numbers; a cell's corner is an integer."""
        return (x - self.x0) / self.cell_x, (y - self.y0) / self.cell_y

    def radius(self, box: Tensor) -> Tensor:
        """Radius of each box's Gaussian in cells: (n, 7 or 9) -> (n,) integers >= 2."""
        return gaussian_radius(box[:, 3] / self.cell_x, box[:, 4] / self.cell_y).clamp(min=2).long()


class Detections(NamedTuple):
    """What was found in one scan, best first."""

    boxes: Tensor  # (n, 7) x, y, z centre, length, width, height, yaw; nuScenes (n, 9): and vx, vy in m/s
    scores: Tensor  # (n,) in [0, 1]
    labels: Tensor  # (n,) index into Config.classes


class CenterHead(nn.Module):
    """One shared convolution, then for every task (a group of classes) one small branch per map.

    Maps of a task: heatmap (K, logits), center (2, offset inside the cell, in cells), center_z (1, absolute, m),
    dim (3, log m), rot (2, cos and sin of yaw), and with `cfg.velocity` vel (2, m/s).
    """

    def __init__(self, cfg: Config, in_channels: int, geometry: Geometry) -> None:
        super().__init__()
        self.cfg, self.geometry = cfg, geometry
        self.box_maps = {"center": 2, "center_z": 1, "dim": 3, "rot": 2, **({"vel": 2} if cfg.velocity else {})}
        (channels,) = cfg.widths(2, (cfg.head_channels,))
        self.shared = _conv_norm_relu(in_channels, channels)
        self.tasks = nn.ModuleList()
        for classes in cfg.task_classes:
            maps = {**self.box_maps, "heatmap": len(classes)}
            self.tasks.append(nn.ModuleDict({name: _branch(channels, n) for name, n in maps.items()}))
        for task in self.tasks:
            for name in self.box_maps:  # as published: the box branches start from Kaiming's weights, the heat map from torch's
                for conv in (task[name][0], task[name][-1]):
                    nn.init.kaiming_normal_(conv.weight)
                    nn.init.zeros_(conv.bias)
            # log(0.1 / 0.9): start from a probability of 0.1 everywhere, so that the first steps are not spent on the
            # background.
            nn.init.constant_(task["heatmap"][-1].bias, -2.19)
        # Two tables of each task: label_t[k], the label (index into cfg.classes) of its k-th class; class_t[label], the inverse,
        # -1 for a label of another task. As buffers they lie where the network does, so that no step has to copy them.
        for t, names in enumerate(cfg.task_classes):
            class_of = [names.index(name) if name in names else -1 for name in cfg.classes]
            self.register_buffer(f"label_{t}", torch.tensor([cfg.classes.index(name) for name in names]), persistent=False)
            self.register_buffer(f"class_{t}", torch.tensor(class_of), persistent=False)

    def forward(self, neck: Tensor) -> list[dict[str, Tensor]]:
        """(B, C, H, W) -> per task {map: (B, channels, H, W)}, in float32 whatever autocast does above."""
        shared = self.shared(neck)
        return [{name: branch(shared).float() for name, branch in task.items()} for task in self.tasks]

    # ------------------------------------------------------------------ training

    def loss(self, maps: list[dict[str, Tensor]], boxes: list[Tensor], labels: list[Tensor]) -> dict[str, Tensor]:
        """Eq. 10's L_cls and gamma * L_reg, summed over tasks: {"cls": scalar, "reg": scalar}.

        boxes: per scan (M, 7), or (M, 9) with velocities, where NaN = unknown; labels: per scan (M,) indices into
        Config.classes.
        """
        weight = boxes[0].new_tensor(self.cfg.code_weights)
        terms = [self.task_loss(t, task, boxes, labels) for t, task in enumerate(maps)]
        return {"cls": torch.stack([cls for cls, _ in terms]).sum(),
                "reg": self.cfg.loc_weight * torch.stack([(weight * reg).sum() for _, reg in terms]).sum()}  # fmt: skip

    def task_loss(self, t: int, maps: dict[str, Tensor], boxes: list[Tensor], labels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The focal loss of one task's heat map, scalar, and the L1 distance of every box code, (8 or 10,), unweighted."""
        target = self.targets(t, boxes, labels, maps["heatmap"].shape)
        b, i, j = target["cell"].unbind(1)
        at_objects = torch.cat([maps[name] for name in self.box_maps], dim=1)[b, :, i, j]  # (M_task, 8 or 10)
        # An unknown velocity teaches nothing: the prediction stands in for it. (OpenPCDet's mask times NaN is NaN.)
        code = torch.where(target["code"].isnan(), at_objects.detach(), target["code"])
        count = at_least_one(mean_over_processes(code.new_tensor(float(len(b)))))
        return focal_loss(maps["heatmap"], target["heatmap"]), (at_objects - code).abs().sum(dim=0) / count

    def targets(self, task: int, boxes: list[Tensor], labels: list[Tensor], shape: torch.Size) -> dict[str, Tensor]:
        """Heat map and box codes of the objects of one task.

        Returns heatmap (B, K, H, W) with a Gaussian of peak 1 at every object's cell, and of the M_task objects of this task
        in all scans cell (M_task, 3) = (scan, i, j) and code (M_task, 8) = offset x, y | z | log length, width, height |
        cos, sin | (with velocity, M_task, 10) vx, vy.
        """
        batch, _, height, width = shape
        device = boxes[0].device
        scan = torch.cat([torch.full((len(b),), n, device=device) for n, b in enumerate(boxes)])
        box, label = torch.cat(boxes).float(), torch.cat(labels)
        k = getattr(self, f"class_{task}")[label]  # (M,) class inside the task, -1 if of another task
        x, y = self.geometry.to_cells(box[:, 0], box[:, 1])
        # DIFFERS: an object whose centre lies outside the map is no target; OpenPCDet moves it to the nearest cell.
        keep = (k >= 0) & (x >= 0) & (y >= 0) & (x < width) & (y < height)
        scan, box, k, x, y = scan[keep], box[keep], k[keep], x[keep], y[keep]
        j, i = x.long(), y.long()  # floor: both are >= 0
        velocity = box[:, 7:9] if self.cfg.velocity else box[:, 7:7]
        code = torch.stack([x - j, y - i, box[:, 2], *box[:, 3:6].log().unbind(1), box[:, 6].cos(), box[:, 6].sin(),
                            *velocity.unbind(1)], dim=1)  # fmt: skip
        radius = self.geometry.radius(box)
        heatmap = draw_gaussians(scan * shape[1] + k, i, j, radius, (batch * shape[1], height, width))
        return {"heatmap": heatmap.view(shape), "cell": torch.stack([scan, i, j], dim=1), "code": code}

    # ------------------------------------------------------------------ what a distillation loss may read

    def class_logits(self, maps: list[dict[str, Tensor]]) -> Tensor:
        """(B, K of all tasks, H, W): the tasks' class maps side by side, in the order of the tasks."""
        return torch.cat([task["heatmap"] for task in maps], dim=1)

    def regression(self, maps: list[dict[str, Tensor]]) -> None:  # noqa: ARG002 (the same call for every head)
        """None: the paper exempts centre heads from Eq. 9's regression term."""
        return None

    # ------------------------------------------------------------------ inference

    # UNSPECIFIED: the paper's text says the best 100 and no NMS, its frameworks' configs say rotated NMS; ours: NMS.
    # DIFFERS: OpenPCDet also drops boxes whose centre is outside a second range, on nuScenes ten metres wider.
    @torch.no_grad()
    def decode(self, maps: list[dict[str, Tensor]]) -> list[Detections]:
        """Boxes of every scan, best first, after the score threshold and rotated (or circle) NMS inside each task."""
        found = []
        for b in range(len(maps[0]["heatmap"])):
            per_task = []
            for t, task in enumerate(maps):
                # As OpenPCDet: the best cells, peak or not; NMS removes a peak's neighbours.
                box, score, label, _ = self._best(t, {k: v[b] for k, v in task.items()}, MAX_CANDIDATES, peaks=False)
                keep = score > self.cfg.score_threshold
                box, score, label = box[keep], score[keep], label[keep]
                circle = self.cfg.circle_nms
                suppress, threshold = (box_ops.circle_nms, circle[t]) if circle else (box_ops.nms, self.cfg.nms_iou)
                keep = suppress(box[:, :7], score, threshold, self.cfg.max_detections)
                per_task.append((box[keep], score[keep], label[keep]))
            box, score, label = (torch.cat(part) for part in zip(*per_task, strict=True))
            order = score.argsort(descending=True, stable=True)
            found.append(Detections(box[order], score[order], label[order]))
        return found

    @torch.no_grad()
    def proposals(self, maps: list[dict[str, Tensor]], score: float, limit: int) -> Tensor:
        """Regions the head proposes for distillation: (R, 5) = scan, x0, y0, x1, y1 in metres. Detached.

        A region is the square of 2r + 1 cells around a peak of the heat map, r the radius of the Gaussian that the
        decoded box would get as a training target ("the Gaussian area of a heat-map peak").
        """
        # UNSPECIFIED: what a peak is, how many and above which score. Ours: local maxima of 3 x 3 cells in their own
        # class's map, score above `proposal_score`, the best `proposals` of a scan over all tasks; no NMS.
        regions = []
        for b in range(len(maps[0]["heatmap"])):
            parts = [self._best(t, {k: v[b] for k, v in task.items()}, limit, peaks=True) for t, task in enumerate(maps)]
            box, value, _, cell = (torch.cat(part) for part in zip(*parts, strict=True))
            best = value.argsort(descending=True, stable=True)[:limit]
            best = best[value[best] > score]
            i, j = cell[best].unbind(1)
            regions.append(gaussian_regions(torch.full_like(i, b), i, j, self.geometry.radius(box[best]), self.geometry))
        return torch.cat(regions)

    def _best(self, t: int, task: dict[str, Tensor], limit: int, peaks: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The best cells of one scan and task: boxes (n, 7 or 9), scores (n,), labels (n,), cells (n, 2) = i, j."""
        heat = task["heatmap"].sigmoid()  # (K, H, W)
        if peaks:
            heat = torch.where(heat == F.max_pool2d(heat, 3, 1, 1), heat, 0.0)
        _, height, width = heat.shape
        score, flat = heat.flatten().topk(min(limit, heat.numel()))
        k, cell = flat // (height * width), flat % (height * width)
        i, j = cell // width, cell % width
        box = self.boxes_at(torch.cat([task[name] for name in self.box_maps])[:, i, j].T, i, j)
        label = getattr(self, f"label_{t}")[k]
        return box, score, label, torch.stack([i, j], dim=1)

    def boxes_at(self, code: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Box codes (..., 8 or 10) of cells (i, j) -> boxes (..., 7 or 9)."""
        g = self.geometry
        return torch.cat([
            (g.x0 + (j + code[..., 0]) * g.cell_x)[..., None], (g.y0 + (i + code[..., 1]) * g.cell_y)[..., None],
            code[..., 2:3], code[..., 3:6].clamp(-20, 20).exp(), torch.atan2(code[..., 7:8], code[..., 6:7]), code[..., 8:]],
            dim=-1)  # fmt: skip


def _conv_norm_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    # eps and momentum are torch's defaults here, unlike in the backbone; the bias before a norm is as published.
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, padding=1), BatchNorm(out_channels), nn.ReLU())


def _branch(channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(*_conv_norm_relu(channels, channels), nn.Conv2d(channels, out_channels, 3, padding=1))


# ------------------------------------------------------------------ pure functions


def focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Penalty-reduced focal loss of CornerNet / CenterNet (alpha 2, beta 4), divided by the number of peaks.

    logits, target: (B, K, H, W); target is 1 at object cells and falls off as a Gaussian around them.
    """
    p = logits.sigmoid().clamp(1e-4, 1 - 1e-4)
    peak = target == 1
    at_peak = (1 - p).square() * p.log()
    elsewhere = p.square() * (1 - p).log() * (1 - target).pow(4)
    total = -torch.where(peak, at_peak, elsewhere).sum()
    return total / at_least_one(mean_over_processes(peak.sum().to(total.dtype)))


def gaussian_regions(scan: Tensor, i: Tensor, j: Tensor, radius: Tensor, geometry: Geometry) -> Tensor:
    """Squares of 2r + 1 cells around cells (i, j), all (n,): (n, 5) = scan, x0, y0, x1, y1 in metres, float32."""
    g = geometry
    return torch.stack([
        scan, g.x0 + (j - radius) * g.cell_x, g.y0 + (i - radius) * g.cell_y,
        g.x0 + (j + radius + 1) * g.cell_x, g.y0 + (i + radius + 1) * g.cell_y], dim=1).float()  # fmt: skip


def gaussian_radius(length: Tensor, width: Tensor, overlap: float = 0.1) -> Tensor:
    """CornerNet's radius: how far both corners may move, in cells, so that the box keeps `overlap` with the truth.

    length, width: (n,) cells. The three quadratics are divided by 2 instead of 2a, as in CornerNet's code and every
    detector after it; correcting that would change all published heat maps.
    """
    s, p = length + width, length * width
    r1 = (s + (s * s - 4 * p * (1 - overlap) / (1 + overlap)).clamp(min=0).sqrt()) / 2
    r2 = (2 * s + (4 * s * s - 16 * (1 - overlap) * p).clamp(min=0).sqrt()) / 2
    b3 = -2 * overlap * s
    r3 = (b3 + (b3 * b3 - 16 * overlap * (overlap - 1) * p).sqrt()) / 2
    return torch.minimum(torch.minimum(r1, r2), r3)


def draw_gaussians(plane: Tensor, i: Tensor, j: Tensor, radius: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Maps (P, H, W) with a Gaussian of peak 1, sigma (2r + 1) / 6, cut at r cells, at every (plane, i, j).

    plane, i, j, radius: (M,) integers. Where Gaussians meet, the larger value stays.
    """
    planes, height, width = shape
    maps = torch.zeros(planes, height * width, device=i.device)
    if len(i) == 0:
        return maps.view(shape)
    dy = (torch.arange(height, device=i.device) - i[:, None]).abs()  # (M, H)
    dx = (torch.arange(width, device=i.device) - j[:, None]).abs()  # (M, W)
    two_sigma2 = 2 * ((2 * radius + 1) / 6).square()
    gy = torch.exp(-dy.square() / two_sigma2[:, None]) * (dy <= radius[:, None])
    gx = torch.exp(-dx.square() / two_sigma2[:, None]) * (dx <= radius[:, None])
    gaussians = (gy[:, :, None] * gx[:, None, :]).flatten(1)  # (M, H*W)
    maps.scatter_reduce_(0, plane[:, None].expand_as(gaussians), gaussians, "amax")
    return maps.view(shape)
