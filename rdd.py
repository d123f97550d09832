"""RDD: Representation Disparity-aware Distillation (Li et al., ICCV 2023).   (reads after: detector.py  next: baselines.py)

A compact student cannot copy its teacher everywhere. RDD looks where either of the two believes an object is, measures
how far their features disagree there (the representation disparity), keeps the disparate regions, and pulls the
student's features and class scores towards the teacher's in those only. With the default settings, one step is:

    1. In each scan, teacher and student each name up to 50 squares of the map where they suspect an object.
    2. Each square is sampled at 7 x 7 points of both feature maps: two patches. psi, a 1x1 convolution that is trained
       with the student, brings the student's patch to the teacher's number of channels.
    3. d = Euclidean distance of the two patches: the disparity.
    4. The 60 % of a scan's squares with the largest d are kept.
    5. In those, d and the difference of the class probabilities are lowered, beside the ordinary detection loss.

In the paper's words: an inner problem picks the pairs of least mutual information I (here I := -d), training raises it:

    proposals of teacher (M) and student (N) -> M + N region pairs (R^S, R^T), the same place in both
    Eq. 2 normalise -> Eq. 3 I(R^S; R^T) per pair -> Eq. 5 m* by selection -> Eq. 8 L_feat, Eq. 9 L_logit -> Eq. 10

One function per equation, in their order; `RDD`, at the end, runs them (README.md has it in 15 lines). The paper leaves
much open: every choice is tagged UNSPECIFIED beside its line, what differs from it DIFFERS, and the alternatives are
fields of `Config`. The finished student needs neither teacher nor psi.
dims: B scans · R = M + N region pairs · C neck channels · K classes · S x S sampling points of a region · R^S, R^T a pair
`_s` student, `_t` teacher. Regions are (R, 5): scan, x0, y0, x1, y1 in METRES, so that the two grids may differ.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from config import Config
from data.batch import Batch
from detector import Output
from heads import Geometry, gaussian_regions
from parallel import BatchNorm, at_least_one, mean_over_processes


def bilateral_regions(out_s: Output, out_t: Output, score: float, limit: int) -> tuple[Tensor, Tensor]:
    """The regions of Sec. 3: the teacher's M, then the student's N, detached. A place that both propose counts twice.

    Returns regions (R, 5) and side (R,), 0 for a teacher's and 1 for a student's proposal.
    """
    regions_t, regions_s = (out.proposals(score, limit) for out in (out_t, out_s))
    side = torch.cat([torch.zeros(len(regions_t)), torch.ones(len(regions_s))]).to(regions_t.device, torch.int64)
    return torch.cat([regions_t, regions_s]), side


def labelled_regions(batch: Batch, geometry: Geometry, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """No reading of the paper, but to compare with: the Gaussian areas of the objects whose centre is on the map (its shape
    (height, width)), all as if the teacher's."""
    regions = []
    for b, box in enumerate(batch.boxes):
        x, y = geometry.to_cells(box[:, 0], box[:, 1])
        on_map = (x >= 0) & (y >= 0) & (x < shape[1]) & (y < shape[0])
        i, j = y[on_map].long(), x[on_map].long()
        regions.append(gaussian_regions(torch.full_like(i, b), i, j, geometry.radius(box[on_map]), geometry))
    regions = torch.cat(regions)
    return regions, torch.zeros(len(regions), dtype=torch.int64, device=regions.device)


def roi_align(maps: Tensor, regions: Tensor, geometry: Geometry, size: int) -> Tensor:
    """phi of Eq. 8: (B, C, H, W) maps, (R, 5) regions in metres -> (R, C, S, S), bilinear at the S x S bin centres.

    RoI Align with one sample a bin. Outside the map its border value counts. Gradients reach the maps, not the regions.
    """
    # UNSPECIFIED: how a region is sampled. Ours: at 7 x 7 points (SparseKD's number), bilinearly, whatever its size, which is
    # that of the Gaussian its box would train a centre head with (CenterHead.proposals, AnchorHead.proposals).
    _, channels, height, width = maps.shape
    scan, x0, y0, x1, y1 = regions.unbind(1)
    bins = (torch.arange(size, device=maps.device, dtype=regions.dtype) + 0.5) / size  # (S,) in (0, 1)
    # grid_sample's frame: the map spans [-1, 1], a cell's centre is not its corner (align_corners=False)
    x = ((x0[:, None] + (x1 - x0)[:, None] * bins) - geometry.x0) / (geometry.cell_x * width) * 2 - 1  # (R, S)
    y = ((y0[:, None] + (y1 - y0)[:, None] * bins) - geometry.y0) / (geometry.cell_y * height) * 2 - 1
    grid = torch.stack([x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], dim=-1)  # (R, S, S, 2)
    # Zeros that depend on the maps: a process without regions then still takes part in the backward pass.
    out = 0 * maps[:1, :, :1, :1].expand(len(regions), -1, size, size)
    for b in range(len(maps)):  # grid_sample wants one grid a map: stack a scan's regions on top of each other
        mine = (scan == b).nonzero()[:, 0]
        if len(mine):
            sampled = F.grid_sample(maps[b : b + 1], grid[mine].view(1, -1, size, 2).to(maps.dtype), "bilinear",
                                    "border", align_corners=False)  # (1, C, r*S, S)  # fmt: skip
            out = out.index_copy(0, mine, sampled[0].view(channels, -1, size, size).transpose(0, 1))
    return out


def normalise(region: Tensor, kind: str, axis: str = "channel", tau: float = 4.0) -> Tensor:
    """Eq. 2: Rhat, a region's features made comparable between models of different magnitude. (R, C, S, S) both ways.

    softmax      exp(R_c / tau) / sum_c' exp(R_c' / tau), over channels at each cell as printed, or (axis "spatial")
                 over the cells of each channel
    none         the features as they are
    standardise  zero mean and unit norm over the whole region: then d^2 = 2 (1 - rho), rho the correlation of the pair
    """
    # DIFFERS: the paper has the softmax, with which the gradient of L_feat is below 1 % of the detection loss's (README.md,
    # Where the paper is silent). It stays selectable; the default takes the features as they are.
    # UNSPECIFIED: the axis of the softmax. Channels is what Eq. 2's index says; the group's earlier code has cells.
    if kind == "softmax" and axis == "channel":
        return (region / tau).softmax(dim=1)
    if kind == "softmax":
        return (region / tau).flatten(2).softmax(dim=2).view_as(region)
    if kind == "standardise":
        centred = region - region.mean(dim=(1, 2, 3), keepdim=True)
        return F.normalize(centred.flatten(1), dim=1).view_as(region)
    return region


def disparity(region_s: Tensor, region_t: Tensor) -> Tensor:
    """d_i = || Rhat_i^S - Rhat_i^T ||_2: (R,). The distance of Eq. 8, unsquared as printed."""
    # UNSPECIFIED: over what the norm runs. Ours: all channels and points of a region at once, not point by point. The gradient of
    # ||x|| has length 1 however small x is, that of ||x||^2 shrinks with x: the norm, which Eq. 8 prints, pulls at a pair that is
    # almost matched as hard as before, its square ("l2 loss", Table 1) lets go (--distance squared).
    return torch.linalg.vector_norm((region_s - region_t).flatten(1), dim=1)  # its gradient at 0 is 0, not NaN


# Eq. 3 to 7 as the paper writes them, with I as `information` reads it. Training needs that and `solve_selection` only; the
# sums are here to be read, and tests hold the closed forms against them.


def information(region_s: Tensor, region_t: Tensor, estimator: str) -> Tensor:
    """Eq. 3: I(Rhat^S; Rhat^T) = H(Rhat^S) - H(Rhat^S | Rhat^T) of every pair, (R,). Smaller = more disparate.

    distance  I := -d: the entropy H(Rhat^S) is taken as constant, H(Rhat^S | Rhat^T) as d: the farther apart the two,
              the less one says of the other. The paper takes the same step from Eq. 7 to Eq. 8
    gaussian  -1/2 log(1 - rho^2) nats for jointly Gaussian features with correlation rho; 0 where rho <= 0
    """
    # UNSPECIFIED: the paper names no estimator of I. Ours uses for selecting what it uses for training.
    if estimator == "distance":
        return -disparity(region_s, region_t)
    s, t = (normalise(r, "standardise").flatten(1) for r in (region_s, region_t))
    rho = (s * t).sum(dim=1).clamp(0, 1 - 1e-6)
    return -0.5 * torch.log1p(-rho.square())


def naive_total(info: Tensor) -> Tensor:
    """Eq. 4: the plain sum over all pairs; what Eq. 7 becomes with m = 1."""
    return info.sum()


def inner_objective(m: Tensor, info: Tensor, lam: float | Tensor) -> Tensor:
    """Eq. 5's objective, sum_i m_i I_i + lambda ||m||_1, which the selection minimises over m in [0, 1]^R."""
    return (m * info).sum() + (lam * m.abs()).sum()


def solve_selection(info: Tensor, scan: Tensor, rule: str, lam: float, fraction: float) -> Tensor:
    """Eq. 5: m* = argmin of `inner_objective` over m in [0, 1]^R: (R,) weights. Linear in each m_i, so in closed form.

    threshold  Eq. 5 as it stands: each m_i (I_i + lambda) is smallest at m_i = 1 if I_i + lambda <= 0, else at 0; so
               m_i* = 1[d_i >= lambda]
    relative   the same with lambda in units of the mean d of the pair's scan
    top        the same with, in each scan, the lambda that keeps this fraction of its pairs, the most disparate
    least, random   no reading of the paper but what `top` is compared with: the same fraction, least disparate or any
    soft       one projected gradient step of size 1/lambda from m = 1: clip(1 - (I_i + lambda) / lambda) = clip(d_i / lambda)
    gaussian   for I of the Gaussian estimator: keeps what lies lambda nats or more below the best-agreeing pair of the scan
    all        m = 1
    Where lambda counts, lambda = 0 keeps every pair and a larger lambda fewer, as the paper states.
    """
    # UNSPECIFIED: the sign of I. With I >= 0 Eq. 5 is minimised by m = 0, selecting nothing; so I = -d, or I - max I.
    if rule == "all":
        return torch.ones_like(info)
    if rule == "soft":
        return (-info / lam).clamp(0, 1) if lam > 0 else torch.ones_like(info)
    if rule == "threshold":
        return (info + lam <= 0).to(info.dtype)
    m = torch.zeros_like(info)
    for b in scan.unique():  # per scan: the same selection however a batch is split over processes
        mine = (scan == b).nonzero()[:, 0]
        if rule == "relative":
            m[mine] = (info[mine] <= lam * info[mine].mean()).to(info.dtype)
        elif rule == "gaussian":
            m[mine] = (info[mine] - info[mine].max() + lam <= 0).to(info.dtype)
        else:
            # random: ranked by digits of I that mean nothing, the fourth decimal and on. That needs no generator, whose state a
            # run would have to save to go on exactly.
            order = {"top": info[mine], "least": -info[mine], "random": (1e3 * info[mine]).frac()}[rule]
            keep = max(1, round(fraction * len(mine)))
            m[mine[order.topk(keep, largest=False).indices]] = 1
    return m


def selected_information(info: Tensor, m: Tensor) -> Tensor:
    """Eq. 7: sum_i m_i* I_i, the part of the teacher's information that the student is asked to take over."""
    return (m * info).sum()


def feature_loss(d: Tensor, m: Tensor) -> Tensor:
    """Eq. 8: L_feat = 1/(M+N) sum_i m_i* d_i. Zero, with a gradient path, when there are no pairs."""
    return (m * d).sum() / _pairs(d)


def logit_loss(p_cls_s: Tensor, p_cls_t: Tensor, m: Tensor, reduce: str,
               p_reg_s: Tensor | None = None, p_reg_t: Tensor | None = None) -> Tensor:  # fmt: skip
    """Eq. 9: L_logit = 1/(M+N) sum_i m_i* (||p_cls^S - p_cls^T||_1 + ||p_reg^S - p_reg^T||_1).

    p_cls: (R, K, S, S) class probabilities over the region; p_reg: (R, 7) box codes, None for centre heads as the paper
    says. reduce: the 1-norm's "sum" over a region's values, or their "mean"; "peak", where S is 1, is a sum over classes.
    """
    # UNSPECIFIED: over what p_cls is taken: here the probabilities of the whole region (or at its peak); and whether the
    # norm is the printed sum or a mean, which changes alpha2 by K*S*S (147 for 3 classes, 490 for 10).
    # UNSPECIFIED: how yaw is compared. Ours: by the sine, as heads are trained, which know it up to a half turn.
    distance = (p_cls_s - p_cls_t).abs().flatten(1)
    per_pair = distance.mean(dim=1) if reduce == "mean" else distance.sum(dim=1)
    if p_reg_s is not None:
        distance = p_reg_s - p_reg_t
        distance = torch.cat([distance[:, :6], distance[:, 6:].sin()], dim=1).abs()
        per_pair = per_pair + (distance.mean(dim=1) if reduce == "mean" else distance.sum(dim=1))
    return (m * per_pair).sum() / _pairs(per_pair)


def box_codes(out_s: Output, out_t: Output, regions: Tensor, side: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """p_reg^S and p_reg^T of Eq. 9: (R, 7) box codes of the anchor behind each region; None, None for centre heads."""
    if out_s.regression is None or out_t.regression is None:
        return None, None
    # UNSPECIFIED: where p_reg is read. Ours: at the region's centre, of the anchor that the proposing side scores highest;
    # the cell's other anchors stand for no object, and what they predict was never trained.
    codes_s, codes_t = (roi_align(out.regression, regions, out.geometry, 1).unflatten(1, (-1, 7)).flatten(2)
                        for out in (out_s, out_t))  # (R, A, 7)  # fmt: skip
    anchors = codes_s.shape[1]
    best_s, best_t = (roi_align(out.class_logits, regions, out.geometry, 1).unflatten(1, (anchors, -1))
                      .flatten(2).amax(dim=2).argmax(dim=1) for out in (out_s, out_t))  # (R,)  # fmt: skip
    row, anchor = torch.arange(len(regions), device=regions.device), torch.where(side == 0, best_t, best_s)
    return codes_s[row, anchor], codes_t[row, anchor]


def _pairs(per_pair: Tensor) -> Tensor:
    """M + N, at least 1; of several processes the mean, so that averaged gradients are those of one (parallel.py)."""
    return at_least_one(mean_over_processes(per_pair.new_tensor(float(len(per_pair)))))


def total_loss(detection: dict[str, Tensor], distillation: dict[str, Tensor]) -> Tensor:
    """Eq. 10: L = L_cls + gamma L_reg + alpha1 L_feat + alpha2 L_logit. All terms come weighted, so it is their sum."""
    return torch.stack([*detection.values(), *distillation.values()]).sum()


class RegionPairs(NamedTuple):
    """The pairs of one step, and what RDD thinks of them."""

    regions: Tensor  # (R, 5)
    side: Tensor  # (R,) who proposed: 0 the teacher, 1 the student
    d: Tensor  # (R,) the disparity
    m: Tensor  # (R,) m*: 1 kept, 0 not (`soft`: between)


class RDD(nn.Module):
    """Everything of RDD that is trained (psi) and the order in which the equations are used.

    psi: 1x1 convolution, the paper's batch norm (`psi_norm`), ReLU, from the student's channels to the teacher's: then both
    can be compared (the teacher's neck ends in a ReLU too). Nothing but L_feat trains it, and no head reads it, so the finished
    student runs without it; last.pt keeps it to resume training, and for disparity.py.
    """

    def __init__(self, cfg: Config, channels_s: int, channels_t: int) -> None:
        super().__init__()
        self.cfg = cfg
        # DIFFERS: the paper has a batch norm in psi; with it students learned less.
        norm = [BatchNorm(channels_t)] if cfg.psi_norm else []
        self.psi = nn.Sequential(nn.Conv2d(channels_s, channels_t, 1, bias=not cfg.psi_norm), *norm, nn.ReLU())

    def forward(self, out_s: Output, out_t: Output, batch: Batch | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weighted terms of Eq. 10, {"feat", "logit"}, and what is worth logging of the step (`summary`).

        With no proposals on either side both terms are zero. out_t must come from a frozen teacher under no_grad.
        """
        cfg, pairs = self.cfg, self.compare(out_s, out_t, batch)
        # UNSPECIFIED: which of a cell's anchors p_cls is of. Ours: of each class the surest, so that both heads have K maps.
        size = 1 if cfg.p_cls == "peak" else cfg.roi_size
        p_cls_s, p_cls_t = (roi_align(out.class_logits.sigmoid().unflatten(1, (-1, len(cfg.classes))).amax(dim=1),
                                      pairs.regions, out.geometry, size) for out in (out_s, out_t))  # fmt: skip
        p_reg_s, p_reg_t = box_codes(out_s, out_t, pairs.regions, pairs.side)
        distance = pairs.d if cfg.distance == "norm" else pairs.d.square() / cfg.roi_size**2
        terms = {"feat": cfg.alpha1 * feature_loss(distance, pairs.m),
                 "logit": cfg.alpha2 * logit_loss(p_cls_s, p_cls_t, pairs.m, cfg.p_cls, p_reg_s, p_reg_t)}  # fmt: skip
        return terms, summary(pairs)

    def compare(self, out_s: Output, out_t: Output, batch: Batch | None = None) -> RegionPairs:
        """Eq. 2 to 6: where the two are compared, how far they disagree, and which pairs are kept. Only d has a gradient."""
        cfg = self.cfg
        if cfg.regions == "labels":
            regions, side = labelled_regions(batch, out_t.geometry, out_t.neck.shape[2:])
        else:
            regions, side = bilateral_regions(out_s, out_t, cfg.proposal_score, cfg.proposals)
        region_s, region_t = self.crop(out_s, regions, out_t)
        d = disparity(region_s, region_t)
        with torch.no_grad():  # Eq. 6: the inner problem is solved first and is constant for the outer one
            info = information(region_s, region_t, "gaussian") if cfg.select == "gaussian" else -d
            m = solve_selection(info, regions[:, 0], cfg.select, cfg.lam, cfg.fraction)
        return RegionPairs(regions, side, d, m)

    def crop(self, out_s: Output, regions: Tensor, out_t: Output) -> tuple[Tensor, Tensor]:
        """The pairs (Rhat^S through psi, Rhat^T), (R, C_t, S, S); float32, or `roi_align` would round positions as psi does."""
        cfg, neck_s = self.cfg, out_s.neck.float()
        how = (cfg.normalise, cfg.softmax_axis, cfg.tau)
        region_t = normalise(roi_align(out_t.neck.float(), regions, out_t.geometry, cfg.roi_size), *how)
        # UNSPECIFIED: where psi stands. Eq. 8 prints phi(psi(Rhat)), psi of a normalised region before RoI Align; but Eq. 3 has
        # to compare Rhat^S with Rhat^T, distributions over as many channels only after psi. So:
        #   psi-first (ours): crop, psi, normalise; a batch norm in psi sees the crops alone.
        #   map-first: psi, crop, normalise; it sees the whole map.
        #   normalise-first: crop, normalise, psi; what leaves psi is not normalised again.
        if cfg.psi_order == "map-first":
            return normalise(roi_align(self.psi(neck_s).float(), regions, out_s.geometry, cfg.roi_size), *how), region_t
        region_s = roi_align(neck_s, regions, out_s.geometry, cfg.roi_size)
        if cfg.psi_order == "psi-first":
            return normalise(self.psi(region_s).float(), *how), region_t
        return self.psi(normalise(region_s, *how)).float(), region_t


def summary(pairs: RegionPairs) -> dict[str, Tensor]:
    """Numbers of one step for the log: pairs per side, selected fraction, quantiles of d."""
    log = {"pairs_t": (pairs.side == 0).sum(), "pairs_s": (pairs.side == 1).sum()}
    if len(pairs.d):
        log["selected"] = (pairs.m > 0).float().mean()
        quantiles = pairs.d.detach().quantile(pairs.d.new_tensor([0.05, 0.25, 0.5, 0.75, 0.95]))
        log |= zip(("d_05", "d_25", "d_50", "d_75", "d_95"), quantiles, strict=True)
    return log


def gradient_norms(terms: dict[str, Tensor], neck: Tensor, scale: float = 1.0) -> dict[str, float]:
    """Norm of each term's gradient on the student's neck: how hard each pulls. Share = norm / detection's norm.

    scale: the loss scale of mixed precision, without which small gradients vanish in float16.
    """
    norms = {}
    for name, term in terms.items():
        (grad,) = torch.autograd.grad(term * scale, neck, retain_graph=True, allow_unused=True)
        norms[name] = 0.0 if grad is None else float(torch.linalg.vector_norm(grad.float())) / scale
    return norms
