"""Baselines: what RDD is compared with, in order of publication.   (reads after: rdd.py  next: train.py)

    method           reads           where                                                 what is lowered
    hinton           class logits    everywhere                                            divergence
    hint             neck            everywhere                                            squared difference
    mimic            neck            the student's proposals                               squared difference
    fg               neck            around the ground truth                               squared difference
    gid-f            neck            where the class scores disagree most                  squared difference, and of relations
    gid-l            logits, boxes   where the class scores disagree most                  divergence, box loss
    lad              boxes           where the teacher is sure: these are labels           the detection loss itself
    pp-logit         logits, boxes   around the ground truth, if the teacher sees it       squared difference, L1
    point-distiller  neck            the teacher's strongest cells, and those most like them  squared difference of relations

Each is a module like RDD: its trained layers are made in __init__, and forward(out_s, out_t, batch) returns ({term: weighted
scalar}, {name: number worth logging}). `batch` is read for its labels only. The weights are those published, as far as
they are; `Config.kd_weight` scales them, RDD's too. Of different grids (pillar students), a map of the student is sampled at
the centres of the teacher's cells, in metres. Losses divide by counts of all processes; what is logged counts one's own.
SparseKD is pp-logit with two options that go with any method: --method pp-logit --label-kd --inherit.
dims: B scans · C channels · H, W cells of the teacher's map · K classes · R regions · M objects; `_s` student, `_t` teacher
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import boxes as box_ops
from anchors import AnchorHead, Targets, nearest_iou, smooth_l1_sine
from config import Config
from data.batch import Batch
from detector import Output
from parallel import BatchNorm, at_least_one, mean_over_processes
from rdd import RDD, feature_loss, roi_align

Terms = tuple[dict[str, Tensor], dict[str, Tensor]]


def same_grid(out_s: Output, out_t: Output) -> bool:
    return out_s.geometry == out_t.geometry and out_s.neck.shape[2:] == out_t.neck.shape[2:]


def on_teacher_grid(maps: Tensor, out_s: Output, out_t: Output) -> Tensor:
    """A student's map (B, C, any, any) at the centres of the teacher's cells, in metres: (B, C, H, W), float32."""
    # DIFFERS: SparseKD stretches the student's heat map to the teacher's size, which is the same only if the ranges are.
    if same_grid(out_s, out_t):
        return maps.float()
    g, (height, width) = out_t.geometry, out_t.neck.shape[2:]
    side = max(height, width)  # roi_align cuts squares; what lies beyond the map is cut off again
    square = [[b, g.x0, g.y0, g.x0 + side * g.cell_x, g.y0 + side * g.cell_y] for b in range(len(maps))]
    return roi_align(maps.float(), torch.tensor(square, device=maps.device), out_s.geometry, side)[:, :, :height, :width]


def total(count: Tensor) -> Tensor:
    """A count over all processes (as their mean, so that averaged gradients are right), at least 1."""
    return at_least_one(mean_over_processes(count.float()))


def divergence(logits_s: Tensor, logits_t: Tensor) -> Tensor:
    """KL(p_t || p_s) of every yes-or-no probability, any shape: cross entropy with soft labels, minus the teacher's entropy."""
    p_t = logits_t.sigmoid()
    return (F.binary_cross_entropy_with_logits(logits_s, p_t, reduction="none")
            - F.binary_cross_entropy_with_logits(logits_t, p_t, reduction="none"))  # fmt: skip


def code_distance(out_s: Output, out_t: Output, task: int, cell: Tensor) -> Tensor:
    """L1 between both centre heads' box codes at cells (M, 3) of a task: per code, (8 or 10,), summed over the cells."""
    b, i, j = cell.unbind(1)
    code_s, code_t = (torch.cat([out.maps[task][n] for n in out.head.box_maps], dim=1)[b, :, i, j] for out in (out_s, out_t))
    return (code_s - code_t).abs().sum(dim=0)


def at_positives(out_s: Output, out_t: Output, name: str, target: Targets) -> list[Tensor]:
    """What both anchor heads' maps of this name say of the positive anchors: two (P, numbers)."""
    return [out.head.per_anchor(out.maps[0][name])[tuple(target.positive.T)] for out in (out_s, out_t)]


def all_boxes(out: Output) -> tuple[Tensor, Tensor]:
    """Boxes (B, n, 7 or 9) and logits (B, n, K) of a head, before threshold and NMS: n anchors, or n = tasks * H * W cells.

    Of classes that are not its task's a centre head's cell says -inf.
    """
    if isinstance(out.head, AnchorHead):
        return out.head.decode_all(out.maps)
    found = []
    for t, task in enumerate(out.maps):
        heat = task["heatmap"].flatten(2).transpose(1, 2)  # (B, H*W, classes of the task)
        cell, width = torch.arange(heat.shape[1], device=heat.device), task["heatmap"].shape[3]
        code = torch.cat([task[name] for name in out.head.box_maps], dim=1).flatten(2).transpose(1, 2)
        logits = heat.new_full((*heat.shape[:2], len(out.head.cfg.classes)), -torch.inf)
        logits[..., getattr(out.head, f"label_{t}")] = heat
        found.append((out.head.boxes_at(code, cell // width, cell % width), logits))
    boxes, logits = (torch.cat(part, dim=1) for part in zip(*found, strict=True))
    return boxes, logits


class Hinton(nn.Module):
    """Knowledge distillation (Hinton et al., 2014): the teacher's probabilities are soft labels, at every cell and class.

    Reads the class logits; nothing to align. Term: the divergence of every probability, summed, over the number of objects.
    """

    def __init__(self, cfg: Config, channels_s: int, channels_t: int) -> None:  # noqa: ARG002 (every method's arguments)
        super().__init__()

    def forward(self, out_s: Output, out_t: Output, batch: Batch) -> Terms:
        # UNSPECIFIED: how the "KD" of detection papers is set. Ours: temperature 1, as many yes-or-no questions as the heads
        # ask, weight 1 over all objects of the scans (the focal loss divides each task by its own objects: a larger unit).
        loss = divergence(on_teacher_grid(out_s.class_logits, out_s, out_t), out_t.class_logits).sum()
        return {"hinton": loss / total(loss.new_tensor(sum(map(len, batch.boxes))))}, {}


class Hint(nn.Module):
    """Hint learning (FitNets, Romero et al., 2015; for detectors Chen et al., 2017): features instead of answers.

    Reads the whole neck. Channels: a trained 1x1 convolution on the student's. Term: the mean squared difference.
    """

    def __init__(self, cfg: Config, channels_s: int, channels_t: int) -> None:  # noqa: ARG002
        super().__init__()
        self.adapter = nn.Conv2d(channels_s, channels_t, 1)

    def forward(self, out_s: Output, out_t: Output, batch: Batch) -> Terms:  # noqa: ARG002
        # UNSPECIFIED: RDD's Table 1 gives no weight for its Hint row. Ours: 1, on the mean over all cells and channels.
        adapted = self.adapter(on_teacher_grid(out_s.neck, out_s, out_t)).float()
        return {"hint": F.mse_loss(adapted, out_t.neck.float())}, {}


class Mimic(nn.Module):
    """Mimic (Li et al., 2017): hints only where a region is proposed, because most of a map is empty.

    Reads the neck inside the student's proposals (the small network's, as there), RoI Align `roi_size`. Channels: a trained
    1x1 convolution on the student's regions. Term: 1 / (2R) * sum over regions of the mean squared difference; weight 1.
    """

    def __init__(self, cfg: Config, channels_s: int, channels_t: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.adapter = nn.Conv2d(channels_s, channels_t, 1)

    def forward(self, out_s: Output, out_t: Output, batch: Batch) -> Terms:  # noqa: ARG002
        # DIFFERS: Mimic's proposals are a two-stage detector's; ours are those that RDD takes from the student.
        regions = out_s.proposals(self.cfg.proposal_score, self.cfg.proposals)
        region_s, region_t = (roi_align(out.neck.float(), regions, out.geometry, self.cfg.roi_size) for out in (out_s, out_t))
        per_region = (self.adapter(region_s).float() - region_t).square().mean(dim=(1, 2, 3))  # (R,)
        loss = feature_loss(per_region, torch.ones_like(per_region)) / 2
        return {"mimic": loss}, {"regions": loss.new_tensor(len(regions))}


class FG(nn.Module):
    """Fine-grained feature imitation (Wang et al., 2019): hints only near objects, and near is what the anchors say.

    Reads the neck at the masked cells. Anchor heads: cells with an anchor whose overlap with some object is above NEAR of
    the object's best. Channels: a trained 3x3 convolution and ReLU on the student's. Term: the squared difference summed
    over channels, over twice the masked cells. Weight 1, the largest published (one-stage KITTI; 0.5 for narrow students).
    """

    # DIFFERS: FG's code has this 1 beside detection weights of 75, 100, 5, and an adapter near zero: ours pulls harder (LOG.md).
    NEAR, WEIGHT = 0.5, 1.0

    def __init__(self, cfg: Config, channels_s: int, channels_t: int) -> None:  # noqa: ARG002
        super().__init__()
        self.adapter = nn.Sequential(nn.Conv2d(channels_s, channels_t, 3, padding=1), nn.ReLU())

    def forward(self, out_s: Output, out_t: Output, batch: Batch) -> Terms:
        near = self.mask(out_t, batch)
        difference = self.adapter(on_teacher_grid(out_s.neck, out_s, out_t)).float() - out_t.neck.float()
        loss = (near[:, None] * difference.square()).sum() / (2 * total(near.sum()))
        return {"fg": self.WEIGHT * loss}, {"masked": near.float().mean()}

    def mask(self, out_t: Output, batch: Batch) -> Tensor:
        """(B, H, W) bool: the teacher's cells near an object."""
        head, (height, width) = out_t.head, out_t.neck.shape[2:]
        if not isinstance(head, AnchorHead):
            # DIFFERS: a centre head has no anchors. Ours: where an object's Gaussian is not 0 (SparseKD's FG).
            return torch.cat([head.targets(t, batch.boxes, batch.labels, task["heatmap"].shape)["heatmap"]
                              for t, task in enumerate(out_t.maps)], dim=1).amax(dim=1) > 0  # fmt: skip
        near = torch.zeros(len(batch), height, width, dtype=torch.bool, device=out_t.neck.device)
        anchors = head.anchors(height, width, near.device)
        for b, boxes in enumerate(batch.boxes):
            for few in boxes.split(8):  # (boxes x anchors) is large
                iou = nearest_iou(few, anchors)
                near[b] |= (iou > self.NEAR * iou.amax(dim=1, keepdim=True)).any(dim=0).view(height, width, -1).any(dim=2)
        return near


@torch.no_grad()
def general_instances(out_s: Output, out_t: Output) -> tuple[list[Tensor], list[Tensor]]:
    """GID's selection: per scan up to 10 boxes (r, 7 or 9) and labels (r,), where both models disagree most, no labels needed.

    A place's score is max over classes |p_t - p_s|, its box is that of the more confident side; NMS at 0.3 on that score.
    """
    boxes_s, logits_s = all_boxes(out_s)
    boxes_t, logits_t = all_boxes(out_t)
    if not same_grid(out_s, out_t):  # centre heads only (train.check_pair): what the student says in the cell of the same place
        g_s, g_t, (rows, columns) = out_s.geometry, out_t.geometry, out_s.neck.shape[2:]
        i, j = (torch.arange(length, device=boxes_s.device) + 0.5 for length in out_t.neck.shape[2:])
        i = ((g_t.y0 + i * g_t.cell_y - g_s.y0) / g_s.cell_y).long().clamp(0, rows - 1)
        j = ((g_t.x0 + j * g_t.cell_x - g_s.x0) / g_s.cell_x).long().clamp(0, columns - 1)
        here = torch.cat([(task * rows + i[:, None]) * columns + j for task in range(len(out_s.maps))]).flatten()
        boxes_s, logits_s = boxes_s[:, here], logits_s[:, here]
    p_s, p_t = logits_s.sigmoid(), logits_t.sigmoid()
    score, label = (p_t - p_s).abs().max(dim=2)  # (B, n)
    box = torch.where((p_s.amax(dim=2) > p_t.amax(dim=2))[..., None], boxes_s, boxes_t)
    # UNSPECIFIED: the class of an instance; ours: the one that is disagreed about.
    kept = []
    for b in range(len(box)):
        best = score[b].topk(min(500, score.shape[1])).indices  # theirs: 3000
        kept.append(best[box_ops.nms(box[b, best, :7], score[b, best], 0.3, 10)])
    return [box[b, here] for b, here in enumerate(kept)], [label[b, here] for b, here in enumerate(kept)]


class GIDF(nn.Module):
    """General instance distillation (Dai et al., 2021), its features: neither proposals nor labels say where, but disagreement.

    Reads the neck in the instances' boxes, RoI Align `roi_size`. Channels: a trained linear map of the student's. Terms: the
    squared difference summed over channels, mean over cells and instances, weight 5e-4; the smooth L1 of the distances among a
    scan's instances, over their mean in either model, weight 40 (both the first author's, github.com/daixinghome).
    """

    def __init__(self, cfg: Config, channels_s: int, channels_t: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.adapter = nn.Conv2d(channels_s, channels_t, 1)

    def forward(self, out_s: Output, out_t: Output, batch: Batch) -> Terms:  # noqa: ARG002
        # DIFFERS: RoI Align's regions are upright: here the rectangle around the turned box; theirs have 10 x 10 bins.
        boxes, _ = general_instances(out_s, out_t)
        corners = [box_ops.corners_bev(box) for box in boxes]  # (r, 4, 2)
        regions = torch.cat([torch.cat([torch.full_like(c[:, :1, 0], b), c.amin(dim=1), c.amax(dim=1)], dim=1)
                             for b, c in enumerate(corners)])  # fmt: skip
        region_s, region_t = (roi_align(out.neck.float(), regions, out.geometry, self.cfg.roi_size) for out in (out_s, out_t))
        # DIFFERS: the paper prints the norm of an instance's difference; ours is the square, as the code whose weight it is.
        differ = (self.adapter(region_s).float() - region_t).square().sum(dim=1).mean(dim=(1, 2))  # (R,)
        # UNSPECIFIED: are relations taken before the adapter, summed or averaged? Ours: before, as the released code, so that the
        # student itself has to have them; the mean over pairs, then over scans (there: over the pairs of all scans).
        relation = torch.stack([self.relation(region_s[regions[:, 0] == b], region_t[regions[:, 0] == b])
                                for b in range(len(boxes))]).mean()  # fmt: skip
        terms = {"gid_feat": 5e-4 * feature_loss(differ, torch.ones_like(differ)), "gid_rel": 40 * relation}
        return terms, {"instances": differ.new_tensor(len(differ))}

    @staticmethod
    def relation(region_s: Tensor, region_t: Tensor) -> Tensor:
        """(r, C, S, S) of each model in one scan -> scalar; 0 for fewer than two instances."""
        if len(region_s) < 2:  # pdist's gradient would not survive it
            return 0 * region_s.sum()
        s, t = (F.pdist(region.flatten(1)) for region in (region_s, region_t))
        return F.smooth_l1_loss(*(distance / distance.mean().clamp(min=1e-6) for distance in (s, t)))


class GIDL(nn.Module):
    """General instance distillation, its responses: what both heads say where the instances would be learned as labels.

    Reads the head's maps at the places that its own matching gives to the instances: positive anchors; of a centre head the
    cells under their Gaussians, and for boxes the cells of their centres. Nothing to align. Terms: 0.1 * divergence of the
    class probabilities and loc_weight * box loss, each over its places (the first author's factors: 0.1 and 1, of a plain L1).
    """

    def __init__(self, cfg: Config, channels_s: int, channels_t: int) -> None:  # noqa: ARG002
        super().__init__()
        self.cfg = cfg

    def forward(self, out_s: Output, out_t: Output, batch: Batch) -> Terms:  # noqa: ARG002
        # DIFFERS: GID's is cross entropy, whose gradient is the divergence's, and matches without classes. Boxes: the detector's
        # loss between the two models' codes, with its weights; none between grids, where codes mean different things.
        (boxes, labels), head = general_instances(out_s, out_t), out_t.head
        cls, reg, cells, objects = out_s.class_logits.sum() * 0, out_s.class_logits.sum() * 0, 0, 0
        if isinstance(head, AnchorHead):
            target = head.targets(boxes, labels, *out_t.neck.shape[2:])
            cls = divergence(*at_positives(out_s, out_t, "cls", target)).sum()
            reg = smooth_l1_sine(*at_positives(out_s, out_t, "box", target)).sum()
            cells = objects = len(target.positive)
        else:
            for t, (maps_s, maps_t) in enumerate(zip(out_s.maps, out_t.maps, strict=True)):
                target = head.targets(t, boxes, labels, maps_t["heatmap"].shape)
                here = target["heatmap"].amax(dim=1, keepdim=True) > 0  # (B, 1, H, W)
                differ = divergence(on_teacher_grid(maps_s["heatmap"], out_s, out_t), maps_t["heatmap"])
                cls, cells, objects = cls + (here * differ).sum(), cells + int(here.sum()), objects + len(target["cell"])
                if same_grid(out_s, out_t):
                    reg = reg + (reg.new_tensor(self.cfg.code_weights) * code_distance(out_s, out_t, t, target["cell"])).sum()
        terms = {"gid_cls": 0.1 * cls / total(cls.new_tensor(cells)),
                 "gid_reg": self.cfg.loc_weight * reg / total(cls.new_tensor(objects))}  # fmt: skip
        return terms, {"instances": cls.new_tensor(sum(map(len, boxes)))}


@torch.no_grad()
def labels_for(batch: Batch, out_t: Output, cfg: Config) -> Batch:
    """The detection loss's batch: in label KD (SparseKD) first the teacher's best 500 boxes above `label_score`, without NMS."""
    if not cfg.label_kd and cfg.method != "lad":
        return batch
    boxes, logits = all_boxes(out_t)
    best, label = logits.sigmoid().max(dim=2)  # (B, n)
    sure = best > best.new_tensor(cfg.label_score).expand(logits.shape[2])[label]
    found = [where[best[b, where].argsort(descending=True, stable=True)[:500]]
             for b, where in enumerate(row.nonzero()[:, 0] for row in sure)]  # fmt: skip
    return replace(batch, boxes=[torch.cat([boxes[b, where], batch.boxes[b]]) for b, where in enumerate(found)],
                   labels=[torch.cat([label[b, where], batch.labels[b]]) for b, where in enumerate(found)])  # fmt: skip


class LAD(nn.Module):
    """Label assignment distillation (Nguyen et al., 2022) as SparseKD simplifies it: the teacher says what is an object.

    Reads the teacher's boxes; no term of its own, nothing to align: `labels_for` changes what the detection loss is
    told, heat map and boxes alike (train.py). `Config.label_kd` does so beside any other method, whose own masks keep to the
    ground truth. Score 0.6 as SparseKD's voxel students have it; `label_score` is its one knob, `kd_weight` scales nothing here.
    """

    # UNSPECIFIED: what RDD's LAD rows are. LAD has the teacher's costs assign the labels; SparseKD's rows are this.
    def __init__(self, cfg: Config, channels_s: int, channels_t: int) -> None:  # noqa: ARG002
        super().__init__()

    def forward(self, out_s: Output, out_t: Output, batch: Batch) -> Terms:  # noqa: ARG002
        return {}, {}


class PPLogit(nn.Module):
    """SparseKD's logit distillation (Yang et al., 2022): answers only at pivotal positions, where an object is and is seen.

    Reads the head's maps; nothing to align. Centre heads: the squared difference of probabilities weighed by w = max_c p_t *
    max_c G, G the ground truth's Gaussians, summed over classes, over the sum of w; box codes at the objects' cells, L1. Anchor
    heads: w = 1 in cells with a positive anchor; those anchors' codes, smooth L1, over a scan's number. Mean over tasks.
    Weights, of their configurations: 10 for CP-Voxel-S, 15 for narrower encoders and for anchors, 7 for pillars; boxes 0.2,
    and none for pillars under a centre head or between grids.
    """

    # DIFFERS: SparseKD's teacher normalises by the batch's statistics (train mode); ours is in eval mode for every method.
    def __init__(self, cfg: Config, channels_s: int, channels_t: int) -> None:  # noqa: ARG002
        super().__init__()
        center = {"pillar": 7.0, "voxel": 10.0 if cfg.width[0] >= 1 else 15.0}[cfg.encoder]
        self.weight = 15.0 if cfg.head == "anchor" else center
        self.boxes = cfg.head == "anchor" or cfg.encoder == "voxel"

    def forward(self, out_s: Output, out_t: Output, batch: Batch) -> Terms:
        head, cls, reg, weights = out_t.head, [], [], []
        if isinstance(head, AnchorHead):
            target = head.targets(batch.boxes, batch.labels, *out_t.neck.shape[2:])
            w = (target.labels > 0).view(len(batch), *out_t.neck.shape[2:], -1).any(dim=3).float()  # (B, H, W)
            per_scan = 1 / (target.labels > 0).sum(dim=1, keepdim=True).clamp(min=1) / len(batch)  # (B, 1)
            reg.append((per_scan[target.positive[:, 0]] * smooth_l1_sine(*at_positives(out_s, out_t, "box", target))).sum())
        for t, (maps_s, maps_t) in enumerate(zip(out_s.maps, out_t.maps, strict=True)):
            name = "cls" if isinstance(head, AnchorHead) else "heatmap"
            p_s, p_t = on_teacher_grid(maps_s[name].sigmoid(), out_s, out_t), maps_t[name].sigmoid()
            p_s, p_t = (p.clamp(1e-4, 1 - 1e-4) for p in (p_s, p_t))
            if not isinstance(head, AnchorHead):
                target = head.targets(t, batch.boxes, batch.labels, p_t.shape)
                w = p_t.amax(dim=1) * target["heatmap"].amax(dim=1)  # (B, H, W)
                if same_grid(out_s, out_t):
                    objects = total(p_t.new_tensor(len(target["cell"])))
                    reg.append(code_distance(out_s, out_t, t, target["cell"]).sum() / objects)
            cls.append((w[:, None] * (p_s - p_t).square()).sum() / (mean_over_processes(w.sum()) + 1e-6))
            weights.append(w.mean())
        terms = {"pp_cls": self.weight * torch.stack(cls).mean()}
        if self.boxes and reg:
            terms["pp_reg"] = 0.2 * torch.stack(reg).mean()
        return terms, {"pivotal": torch.stack(weights).mean()}


class PointDistiller(nn.Module):
    """PointDistiller (Zhang et al., 2023): not a cell's features but how they lie among their nearest in feature space.

    Reads the neck: the teacher's 256 cells of the largest channel, and the 128 cells nearest to each in the teacher's feature
    space, the same in both models. Channels: in each model a trained 1x1 convolution, batch norm and ReLU on (neighbour,
    centre), to 64. Term: the mean squared difference; weight 2. Counts, width and weight of its code for nuScenes' neck.
    """

    # DIFFERS: the authors' PointPillars for KITTI compares pillars before the scatter, their SECOND both levels before the neck.
    # DIFFERS: the paper weighs cells by a softmax of their importance; its code takes that over an axis of length 1, so that all
    # weigh the same. With its temperature, 1e-4, one cell would be left.
    CELLS, NEIGHBOURS, WIDTH, WEIGHT = 256, 128, 64, 2.0

    def __init__(self, cfg: Config, channels_s: int, channels_t: int) -> None:  # noqa: ARG002
        super().__init__()
        # A convolution of (neighbour, centre) is one of the neighbour plus one of the centre: done once a cell, not once a pair.
        self.mix_s, self.mix_t = (nn.Linear(channels, 2 * self.WIDTH, bias=False) for channels in (channels_s, channels_t))
        self.norm_s, self.norm_t = BatchNorm(self.WIDTH), BatchNorm(self.WIDTH)

    def forward(self, out_s: Output, out_t: Output, batch: Batch) -> Terms:  # noqa: ARG002
        cells_s, cells_t = (f.flatten(2).transpose(1, 2) for f in (on_teacher_grid(out_s.neck, out_s, out_t),
                                                                   out_t.neck.float()))  # (B, H*W, C)  # fmt: skip
        batch_size, n, _ = cells_t.shape
        row = torch.arange(batch_size, device=cells_t.device)[:, None]
        centre = cells_t.amax(dim=2).topk(min(self.CELLS, n)).indices  # (B, 256)
        near = torch.cdist(cells_t[row, centre], cells_t).topk(min(self.NEIGHBOURS, n), largest=False).indices  # (B, 256, 128)
        graphs = []
        for cells, mix, norm in ((cells_s, self.mix_s, self.norm_s), (cells_t, self.mix_t, self.norm_t)):
            of_neighbour, of_centre = mix(cells).float().split(self.WIDTH, dim=2)
            pairs = of_neighbour[row[..., None], near] + of_centre[row, centre][:, :, None]  # (B, 256, 128, 64)
            graphs.append(F.relu(norm(pairs.permute(0, 3, 1, 2))))
        return {"point": self.WEIGHT * F.mse_loss(*graphs)}, {}


METHODS = {"hinton": Hinton, "hint": Hint, "mimic": Mimic, "fg": FG, "gid-f": GIDF, "gid-l": GIDL, "lad": LAD,
           "pp-logit": PPLogit, "point-distiller": PointDistiller, "rdd": RDD}  # in order of publication  # fmt: skip


def seeded(method: type[nn.Module], cfg: Config, channels_s: int, channels_t: int) -> nn.Module:
    """A method whose trained layers start from weights that depend on `cfg.seed` only; the global random state stays as is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        return method(cfg, channels_s, channels_t)
