"""AnchorHead: the head of SECOND and PointPillars.   (reads after: heads.py  next: detector.py)

Every cell holds 2 anchors per class, boxes of that class's usual size turned by 0 and 90 degrees. Three 1x1
convolutions say of every anchor how likely it is an object of each class (`cls`), how the object's box differs from it
(`box`), and which of its two ends is the front (`direction`). Same methods as CenterHead: `forward`, `loss`, `decode`.
dims: B scans · C neck channels · H, W cells along y, x · K classes · A = 2K anchors a cell · n = H*W*A anchors a scan
      · M objects of a scan · P positives: anchors of all scans that stand for an object
order: of anchors ((y*W + x)*K + class)*2 + rotation; of channels anchor first: anchor_in_cell * (numbers each) + number
Source: SECOND as in OpenPCDet's AnchorHeadSingle; DIFFERS marks where ours is another.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import boxes as box_ops
from config import Config
from heads import Detections, Geometry, gaussian_regions

ROTATIONS = (0.0, 1.57)  # yaw of the anchors; not pi / 2, and the published weights know that
FRONT = 0.78539  # yaw at which direction bin 0 begins: at 45 degrees, where few objects stand
DIRECTION_WEIGHT = 0.2
BEFORE_NMS = 4096  # boxes of a scan that NMS sees, the best scored
BOXES_AT_ONCE = 64  # objects compared with all anchors at a time: some 0.3 GB for PointPillars' 107,136 a class


class Targets(NamedTuple):
    """What the head should say."""

    labels: Tensor  # (B, n) of every anchor: -1 ignored, 0 background, 1 + index into Config.classes
    positive: Tensor  # (P, 2) scan and anchor where labels > 0, in this order
    code: Tensor  # (P, 7) their objects' boxes, see `encode_boxes`
    bin: Tensor  # (P,) their objects' direction bins, 0 or 1


class AnchorHead(nn.Module):
    """Three 1x1 convolutions on the neck: cls (A*K, logits), box (A*7, see `encode_boxes`), direction (A*2, logits)."""

    def __init__(self, cfg: Config, in_channels: int, geometry: Geometry) -> None:
        super().__init__()
        self.cfg, self.geometry = cfg, geometry
        self.classes, self.per_cell = len(cfg.classes), len(cfg.classes) * len(ROTATIONS)
        self.cls = nn.Conv2d(in_channels, self.per_cell * self.classes, 1)
        self.box = nn.Conv2d(in_channels, self.per_cell * 7, 1)
        self.direction = nn.Conv2d(in_channels, self.per_cell * 2, 1)
        # Start from a probability of 0.01 everywhere, so that the first steps are not spent on the background, and
        # from boxes that are the anchors.
        nn.init.constant_(self.cls.bias, -math.log(99))
        nn.init.normal_(self.box.weight, std=0.001)

    def forward(self, neck: Tensor) -> list[dict[str, Tensor]]:
        """(B, C, H, W) -> [{map: (B, channels, H, W)}], in float32 whatever autocast does above."""
        return [{name: getattr(self, name)(neck).float() for name in ("cls", "box", "direction")}]

    def class_logits(self, maps: list[dict[str, Tensor]]) -> Tensor:
        """(B, A*K, H, W): the map that says what is where."""
        return maps[0]["cls"]

    def regression(self, maps: list[dict[str, Tensor]]) -> Tensor:
        """(B, A*7, H, W): the map that says how each box differs from its anchor."""
        return maps[0]["box"]

    def anchors(self, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
        """(n, 7) boxes. The first and last stand ON the border of the range, so their distance is not quite a cell."""
        x0, y0, _, x1, y1, _ = self.cfg.point_range
        exact = {"dtype": torch.float64, "device": device}
        x, y = torch.linspace(x0, x1, width, **exact), torch.linspace(y0, y1, height, **exact)
        prior = torch.tensor(self.cfg.anchors, **exact)  # (K, 6) length, width, height, bottom z, IoUs
        grid = torch.empty(height, width, self.classes, len(ROTATIONS), 7, device=device)
        grid[..., 0], grid[..., 1] = x[:, None, None], y[:, None, None, None]
        grid[..., 2] = (prior[:, 3] + prior[:, 2] / 2)[:, None]
        grid[..., 3:6] = prior[:, None, :3]
        grid[..., 6] = torch.tensor(ROTATIONS, device=device)
        return grid.view(-1, 7)

    def per_anchor(self, channels: Tensor) -> Tensor:
        """A map (B, A*c, H, W) -> (B, n, c), anchors in their order."""
        return channels.unflatten(1, (self.per_cell, -1)).permute(0, 3, 4, 1, 2).flatten(1, 3)

    # ------------------------------------------------------------------ training

    def loss(self, maps: list[dict[str, Tensor]], boxes: list[Tensor], labels: list[Tensor]) -> dict[str, Tensor]:
        """Three weighted losses, {"cls", "reg", "dir": scalar}: `reg` is Eq. 10's gamma * L_reg, the others L_cls.

        boxes: per scan (M, 7); labels: per scan (M,) indices into Config.classes.
        Each is a sum over a scan's anchors / its number of positives (at least 1), then the mean over scans: a scan
        weighs the same with one object or with twenty. So no count has to be shared among processes: the mean over
        this process's scans is right, because gradients are averaged afterwards.
        """
        task = maps[0]
        target = self.targets(boxes, labels, *task["cls"].shape[2:])
        scan, anchor = target.positive.unbind(1)
        positives = (target.labels > 0).sum(dim=1).clamp(min=1)
        weight = 1 / (positives * len(positives)).float()  # (B,)

        one_hot = target.labels[..., None] == torch.arange(1, self.classes + 1, device=scan.device)  # (B, n, K)
        cls = sigmoid_focal_loss(self.per_anchor(task["cls"]), one_hot.float()).sum(dim=2)
        cls = (cls * (target.labels >= 0)).sum(dim=1) * weight
        reg = smooth_l1_sine(self.per_anchor(task["box"])[scan, anchor], target.code).sum(dim=1) * weight[scan]
        front = self.per_anchor(task["direction"])[scan, anchor]  # (P, 2)
        front = F.cross_entropy(front, target.bin, reduction="none") * weight[scan]
        return {"cls": cls.sum(), "reg": self.cfg.loc_weight * reg.sum(), "dir": DIRECTION_WEIGHT * front.sum()}

    @torch.no_grad()
    def targets(self, boxes: list[Tensor], labels: list[Tensor], height: int, width: int) -> Targets:
        """Which anchors stand for which object. A class's anchors meet only objects of that class."""
        anchors = self.anchors(height, width, boxes[0].device)
        of_class = anchors.view(-1, self.classes, len(ROTATIONS), 7)  # (H*W, K, 2, 7)
        found, matched = [], []
        for box, label in zip(boxes, labels, strict=True):  # scan by scan, class by class: (anchors x boxes) is large
            assigned = torch.empty(of_class.shape[:3], dtype=torch.long, device=box.device)
            which = torch.empty_like(assigned)  # index into `box`; meaningless where not positive
            for k, (*_, matched_iou, unmatched_iou) in enumerate(self.cfg.anchors):
                members = (label == k).nonzero()[:, 0]
                state, nearest = match(of_class[:, k].reshape(-1, 7), box[members].float(), matched_iou, unmatched_iou)
                assigned[:, k] = torch.where(state > 0, k + 1, state).view(-1, len(ROTATIONS))
                which[:, k] = (members[nearest] if len(members) else nearest).view(-1, len(ROTATIONS))
            found.append(assigned.flatten())
            matched.append(box[which.flatten()[found[-1] > 0], :7].float())
        all_labels, box = torch.stack(found), torch.cat(matched)
        positive = (all_labels > 0).nonzero()
        return Targets(all_labels, positive, encode_boxes(box, anchors[positive[:, 1]]), direction_bin(box[:, 6]))

    # ------------------------------------------------------------------ inference

    @torch.no_grad()
    def decode_all(self, maps: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
        """Boxes (B, n, 7) and class logits (B, n, K) of all anchors, before threshold and NMS."""
        cls, box, direction = maps[0]["cls"], maps[0]["box"], maps[0]["direction"]
        front = self.per_anchor(direction).argmax(dim=2)
        boxes = decode_boxes(self.per_anchor(box), self.anchors(*cls.shape[2:], cls.device), front)
        return boxes, self.per_anchor(cls)

    @torch.no_grad()
    def decode(self, maps: list[dict[str, Tensor]]) -> list[Detections]:
        """Boxes of every scan, best first, after the score threshold and a rotated NMS that ignores the class."""
        detections = []
        for box, logits in zip(*self.decode_all(maps), strict=True):
            score, label = logits.sigmoid().max(dim=1)
            keep = (score >= self.cfg.score_threshold).nonzero()[:, 0]
            keep = keep[score[keep].argsort(descending=True, stable=True)[:BEFORE_NMS]]
            keep = keep[box_ops.nms(box[keep], score[keep], self.cfg.nms_iou, self.cfg.max_detections)]
            yaw = box_ops.wrap_angle(box[keep, 6:])  # DIFFERS: OpenPCDet leaves yaw in FRONT .. FRONT + 2 pi
            detections.append(Detections(torch.cat([box[keep, :6], yaw], dim=1), score[keep], label[keep]))
        return detections

    @torch.no_grad()
    def proposals(self, maps: list[dict[str, Tensor]], score: float, limit: int) -> Tensor:
        """Regions the head proposes for distillation: (R, 5) = scan, x0, y0, x1, y1 in metres. Detached.

        A region is the square of 2r + 1 cells around the cell that proposes, r the radius of the Gaussian that CenterHead
        would draw for the decoded box: the same rule whichever head proposes.
        """
        # UNSPECIFIED: the paper defines regions by heat-map peaks, which this head has not. Ours: a class's heat map is
        # the probability of the best of a cell's A anchors; from there on as in CenterHead.proposals (local maxima of
        # 3 x 3 cells, above `proposal_score`, the best `proposals` of a scan over all classes, no NMS).
        heat, best = self.class_logits(maps).unflatten(1, (self.per_cell, self.classes)).max(dim=1)  # (B, K, H, W)
        heat = torch.where(heat == F.max_pool2d(heat, 3, 1, 1), heat.sigmoid(), 0.0)
        batch, _, height, width = heat.shape
        value, flat = heat.flatten(1).topk(min(limit, heat[0].numel()))  # (B, limit)
        cell = flat % (height * width)
        anchor = cell * self.per_cell + best.flatten(1).gather(1, flat)
        keep = value > score
        scan = torch.arange(batch, device=heat.device)[:, None].expand_as(flat)[keep]  # (R,)
        i, j, anchor = cell[keep] // width, cell[keep] % width, anchor[keep]

        code = self.per_anchor(self.regression(maps))[scan, anchor]
        front = self.per_anchor(maps[0]["direction"])[scan, anchor].argmax(dim=1)
        box = decode_boxes(code, self.anchors(height, width, heat.device)[anchor], front)
        return gaussian_regions(scan, i, j, self.geometry.radius(box), self.geometry)


# ------------------------------------------------------------------ pure functions: anchors and boxes


def match(anchors: Tensor, boxes: Tensor, matched_iou: float, unmatched_iou: float) -> tuple[Tensor, Tensor]:
    """(n, 7) anchors, (M, >=7) boxes of one class -> state (n,): 1 object, 0 background, -1 neither; box (n,).

    `box` is the box that the anchor overlaps most, the first of equals. An anchor is an object from `matched_iou` on,
    background below `unmatched_iou`. So that no box goes without, its best anchors (all that tie to the last bit) are
    objects too, however small the overlap; but such an anchor takes the box IT overlaps most, which may be another one.
    """
    if len(boxes) == 0:
        return torch.zeros(2, len(anchors), dtype=torch.long, device=anchors.device).unbind()
    iou = torch.cat([nearest_iou(piece, anchors) for piece in boxes.split(BOXES_AT_ONCE)])  # (M, n)
    overlap, box = iou.max(dim=0)
    best = iou.amax(dim=1, keepdim=True)
    best = best.where(best > 0, torch.inf)  # a box that meets no anchor (outside the range, no size) forces none
    state = torch.full_like(box, -1)
    state[overlap < unmatched_iou] = 0
    state[(overlap >= matched_iou) | (iou == best).any(dim=0)] = 1
    return state, box


def nearest_iou(a: Tensor, b: Tensor) -> Tensor:
    """(N, >=7), (M, >=7) -> (N, M): IoU seen from above, after turning every box to the nearest multiple of 90 deg."""
    a, b = _upright(a)[:, None], _upright(b)[None]
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    shared = (high - low).clamp(min=0).prod(dim=-1)
    area_a, area_b = ((box[..., 2:] - box[..., :2]).prod(dim=-1) for box in (a, b))
    return shared / (area_a + area_b - shared).clamp(min=1e-6)


def _upright(boxes: Tensor) -> Tensor:
    """(N, >=7) -> (N, 4): x0, y0, x1, y1 of the box turned to the nearest multiple of 90 degrees."""
    yaw = boxes[:, 6] - torch.floor(boxes[:, 6] / math.pi + 0.5) * math.pi  # in [-pi/2, pi/2)
    across = yaw.abs()[:, None] >= math.pi / 4
    size = torch.where(across, boxes[:, [4, 3]], boxes[:, 3:5])
    return torch.cat([boxes[:, :2] - size / 2, boxes[:, :2] + size / 2], dim=1)


def encode_boxes(boxes: Tensor, anchors: Tensor) -> Tensor:
    """(..., 7), (..., 7) -> codes (..., 7): x, y in anchor diagonals | z in anchor heights | log size ratios | yaw."""
    diagonal = torch.hypot(anchors[..., 3], anchors[..., 4])[..., None]
    shift, size = boxes[..., :3] - anchors[..., :3], boxes[..., 3:6].clamp(min=1e-5) / anchors[..., 3:6]
    return torch.cat([shift[..., :2] / diagonal, shift[..., 2:] / anchors[..., 5:6], size.log(),
                      boxes[..., 6:7] - anchors[..., 6:7]], dim=-1)  # fmt: skip


def decode_boxes(codes: Tensor, anchors: Tensor, front: Tensor) -> Tensor:
    """The inverse of `encode_boxes`: codes and anchors (..., 7), bins (...) -> (..., 7), yaw in FRONT .. FRONT + 2 pi.

    The code's yaw is trained through its sine, which cannot tell front from rear: only its remainder by pi is read, the
    direction bin says the rest.
    """
    diagonal = torch.hypot(anchors[..., 3], anchors[..., 4])[..., None]
    # DIFFERS: OpenPCDet does not clamp. It changes nothing after training, and before keeps the boxes finite.
    size = codes[..., 3:6].clamp(-5, 5).exp() * anchors[..., 3:6]
    yaw = (codes[..., 6] + anchors[..., 6] - FRONT) % math.pi + FRONT + math.pi * front
    shift = torch.cat([codes[..., :2] * diagonal, codes[..., 2:3] * anchors[..., 5:6]], dim=-1)
    return torch.cat([anchors[..., :3] + shift, size, yaw[..., None]], dim=-1)


def direction_bin(yaw: Tensor) -> Tensor:
    """Yaw -> 0 for the half turn from FRONT on, 1 for the other half."""
    return ((yaw - FRONT) % (2 * math.pi) / math.pi).long().clamp(max=1)  # rounding may give the full turn: 2


# ------------------------------------------------------------------ pure functions: losses


def sigmoid_focal_loss(logits: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss of RetinaNet, element by element; target is 0 or 1. (heads.py's is its cousin for soft targets.)"""
    p = logits.sigmoid()
    wrong = torch.where(target > 0, 1 - p, p)
    balance = torch.where(target > 0, alpha, 1 - alpha)
    return balance * wrong.pow(gamma) * F.binary_cross_entropy_with_logits(logits, target, reduction="none")


def smooth_l1_sine(predicted: Tensor, code: Tensor) -> Tensor:
    """Codes (P, 7), (P, 7) -> (P, 7) smooth L1, quadratic below 1/9; of the yaw, that of the difference's sine."""
    difference = torch.cat([predicted[:, :6] - code[:, :6], (predicted[:, 6:] - code[:, 6:]).sin()], dim=1)
    return F.smooth_l1_loss(difference, torch.zeros_like(difference), beta=1 / 9, reduction="none")
