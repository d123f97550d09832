"""The information plane of figure 5b: what the student's features keep of their input, and what of the labels.

(reads after: disparity.py, whose sibling it is; next: benchmarks/; the paper's Sec. 4.2)

    python plane.py --teacher runs/NAME/last.pt --student cp-voxel-xxs-cpu --stops 6 --out DIR
    python plane.py --teacher runs/NAME/last.pt --student cp-voxel-xxs-cpu --seeds 3 --methods none rdd --out DIR
    python plane.py ... --input points                   reconstruct the scan's own density instead of the encoder's map

The information bottleneck (Eq. 1) asks for features f that say much of the labels y and little else of the input X. Figure
5b draws a training run as a path in that plane. As there, I(y; f) is read off the validation mAP, and I(X; f) from a
decoder that reconstructs the backbone's input, the encoder's BEV map, from f, the neck. The student is never touched: it
is frozen, and the decoder is fitted to its features of training frames and judged on validation frames:

    R^2     = 1 - squared error / variance, over all cells and channels of the held-out maps: the share explained
    I(X; f) = -1/2 log(1 - R^2)   nats per value of the map; 0 where R^2 < 0

That is the mutual information of two Gaussians with correlation R, so it takes error and input to be jointly Gaussian,
every value by itself, which sparse maps after a ReLU are not; read it as R^2 on another scale. A decoder can only miss
what is there: it gives a lower bound. And every encoder has a map of its own, so that paths of several runs compare shares
of different things; `--input points` asks all of them for one and the same.
DIR/plane.json holds every point, DIR/plane.png the picture; the runs are DIR/METHOD-seedN.
dims: B scans · C channels of the input, N of the neck · H, W cells of the neck · s stride of the neck in cells of the input
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cli import ArgumentParser, InputError, did_you_mean, run_cli
from curves import ACCURACY
from evaluate import write_json
from plot import colours, new_figure, save, tidy
from stops import add_run_options, open_teacher, stop_steps, stops, student_config
from suites import ALONE, METHODS

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from data.kitti import Kitti
    from data.nuscenes import NuScenes
    from detector import Detector

LABELS = {ALONE: "student alone", "rdd": "student + RDD"}
RIDGE = 1e-6  # added to the features' correlation matrix, so that channels that repeat each other have a solution
INPUTS = {"map": "the input", "points": "log(1 + points in a cell)"}  # --input: what is reconstructed
MAPS = ("map", "moderate_map_3d")  # what is read off as I(y; f): nuScenes' mAP, KITTI's


# ------------------------------------------------------------------ the decoder


@dataclass(frozen=True)
class Decoder:
    """A linear map from k x k cells of the neck to the s x s cells of the input below the middle one.

    As layers: a k x k convolution and a pixel shuffle, which is one transposed convolution of stride s.
    """

    # UNSPECIFIED: figure 5b's decoder. Ours: linear, 3 x 3, because a cell's features say something of its neighbours' input;
    # its least-squares solution is exact, so no learning rate, seed or length of training of the decoder's own is in the
    # figure, and it is the best decoder there is if all is Gaussian, as the estimate in nats supposes anyway.
    weight: "Tensor"  # (s*s*C, N, k, k)
    bias: "Tensor"  # (s*s*C,)
    stride: int  # s

    def __call__(self, neck: "Tensor") -> "Tensor":
        """(B, N, H, W) -> (B, C, s*H, s*W)."""
        from torch.nn import functional as F

        out = F.conv2d(neck.double(), self.weight, self.bias, padding=self.weight.shape[-1] // 2)
        return F.pixel_shuffle(out, self.stride)


def fit_decoder(pairs: Iterable[tuple["Tensor", "Tensor"]], kernel: int = 3) -> Decoder:
    """The decoder of least squared error on (neck (B, N, H, W), input (B, C, s*H, s*W)) pairs.

    Least squares from sums over all cells, in float64: with P = N*k*k the memory is P^2 numbers, however many the frames.
    Features are standardised first, so that their scale changes nothing; those that never change get weight 0.
    Raises InputError when the input's size is no multiple of the neck's.
    """
    import torch
    from torch.nn import functional as F

    count, sum_x, sum_y, gram, cross = 0, 0.0, 0.0, 0.0, 0.0
    for neck, target in pairs:
        stride, rest = divmod(target.shape[-1], neck.shape[-1])
        if rest or target.shape[-2] != stride * neck.shape[-2]:
            found = f"{tuple(neck.shape[-2:])} and {tuple(target.shape[-2:])}"
            raise InputError(f"expected an input whose size is a multiple of the neck's, found {found} cells")
        x = F.unfold(neck.double(), kernel, padding=kernel // 2).transpose(1, 2).flatten(0, 1)  # (B*H*W, P)
        y = F.pixel_unshuffle(target.double(), stride).permute(0, 2, 3, 1).flatten(0, 2)  # (B*H*W, C*s*s)
        count, sum_x, sum_y = count + len(x), sum_x + x.sum(dim=0), sum_y + y.sum(dim=0)
        gram, cross = gram + x.T @ x, cross + x.T @ y
    mean_x, mean_y = sum_x / count, sum_y / count
    covariance, cross = gram / count - torch.outer(mean_x, mean_x), cross / count - torch.outer(mean_x, mean_y)
    spread = covariance.diagonal().clamp(min=0).sqrt()
    scale = torch.where(spread > 1e-6 * (mean_x.abs() + 1e-6), 1 / spread, 0.0)  # below: rounding
    correlation = scale[:, None] * covariance * scale + RIDGE * torch.eye(len(scale), dtype=scale.dtype, device=scale.device)
    weight = scale[:, None] * torch.linalg.solve(correlation, scale[:, None] * cross)  # (P, C*s*s)
    shape = (weight.shape[1], neck.shape[1], kernel, kernel)
    return Decoder(weight.T.reshape(shape), mean_y - mean_x @ weight, stride)


def explained(decoder: Decoder, pairs: Iterable[tuple["Tensor", "Tensor"]]) -> float:
    """R^2 on held-out pairs: 1 - squared error / squared distance to the mean of each channel, both summed over all."""
    count, error, total, squares = 0, 0.0, 0.0, 0.0
    for neck, target in pairs:
        y = target.double()
        error = error + (decoder(neck) - y).square().sum()
        count, total = count + y[:, 0].numel(), total + y.sum(dim=(0, 2, 3))
        squares = squares + y.square().sum(dim=(0, 2, 3))
    variance = float((squares - total.square() / count).sum())
    if variance <= 0:
        raise InputError("the input is the same in every cell of the validation frames: there is nothing to reconstruct")
    return 1 - float(error) / variance


def nats(r2: float) -> float:
    """I of two Gaussians with correlation R, -1/2 log(1 - R^2); 0 below 0, where the decoder is worse than the mean."""
    return float(-0.5 * np.log1p(-np.clip(r2, 0.0, 1 - 1e-12)))


# ------------------------------------------------------------------ one point of the plane


def features(detector: "Detector", data: "Kitti | NuScenes", chosen: Iterable[int], kind: str,
             device: Any) -> Iterator[tuple["Tensor", "Tensor"]]:  # fmt: skip
    """(neck (1, N, H, W), input (1, C, s*H, s*W)) of these frames, frame by frame, of the frozen detector.

    kind: "map", the encoder's BEV map, as in the paper; "points", log(1 + points) in each of its cells (C = 1).
    """
    import torch

    from data.batch import collate

    for i in chosen:
        batch = collate([data[i]], detector.cfg).to(device)
        with torch.no_grad():
            bev = detector.encoder(detector.prepare(batch)).contiguous(memory_format=torch.channels_last)
            yield detector.backbone(bev), bev if kind == "map" else density(batch.points, detector, bev.shape[-2:])


def density(points: "Tensor", detector: "Detector", shape: tuple[int, int]) -> "Tensor":
    """(n, 1 + F) points of one scan -> (1, 1, H, W): log(1 + points) in every cell of the encoder's map, at any height."""
    import torch

    x0, y0, _, x1, y1, _ = detector.cfg.point_range
    low, high = points.new_tensor([x0, y0]), points.new_tensor([x1, y1])
    cells = points.new_tensor(shape[::-1])  # W, H
    j, i = ((points[:, 1:3] - low) / (high - low) * cells).floor().unbind(1)
    inside = (i >= 0) & (i < shape[0]) & (j >= 0) & (j < shape[1])
    number = (i[inside] * shape[1] + j[inside]).long()
    return torch.bincount(number, minlength=shape[0] * shape[1]).view(1, 1, *shape).log1p()


def point_of(detector: "Detector", training: "Kitti | NuScenes", validation: "Kitti | NuScenes", frames: int, kind: str,
             device: Any) -> dict[str, float]:  # fmt: skip
    """r2, nats and the headline scores in percent: a detector's place in the plane. Its decoder is fitted to `frames`
    training frames, at equal distances in their list, without augmentation."""
    from evaluate import evaluate_detector, headline

    detector = detector.to(device).eval()
    chosen = np.unique(np.linspace(0, len(training) - 1, min(frames, len(training))).round().astype(int))
    decoder = fit_decoder(features(detector, training, chosen.tolist(), kind, device))
    r2 = explained(decoder, features(detector, validation, range(len(validation)), kind, device))
    return {"r2": r2, "nats": nats(r2), **headline(evaluate_detector(detector, validation, device))}


# ------------------------------------------------------------------ picture


def picture(path: Path, points: Sequence[dict[str, Any]], teacher: dict[str, Any] | None, title: str = "",
            kind: str = "map") -> "Figure":  # fmt: skip
    """The paths of all runs: thin a seed, thick with arrows their mean, markers growing from stop to stop; a star the teacher.

    points: {"method", "seed", "step", "r2", "nats", and a key of MAPS}; kind: a key of INPUTS. All runs have the same stops: the
    first and the last are named, once.
    """
    score = next(key for key in MAPS if key in points[0])
    methods = list(dict.fromkeys(point["method"] for point in points))
    labels = {method: LABELS.get(method, f"student + {method}") for method in methods}
    colour = colours([*labels.values(), "teacher"])
    figure = new_figure(7.0, 5.4)
    ax = figure.subplots()
    for method, label in labels.items():
        mine = [point for point in points if point["method"] == method]
        seeds = sorted({point["seed"] for point in mine})
        paths = np.array([sorted((p["step"], p["nats"], p[score]) for p in mine if p["seed"] == seed) for seed in seeds])
        for one in paths if len(seeds) > 1 else ():
            ax.plot(*one[:, 1:].T, color=colour[label], linewidth=0.7, alpha=0.5)
        step, x, y = paths.mean(axis=0).T
        sizes = np.linspace(15, 60, len(step)) if len(step) > 1 else 60
        said = f"{label} ({len(seeds)} seeds)" if len(seeds) > 1 else label
        ax.scatter(x, y, s=sizes, color=colour[label], zorder=3, label=said)
        look = {"arrowstyle": "->", "color": colour[label], "linewidth": 1.6, "shrinkA": 3, "shrinkB": 4}
        for k in range(len(step) - 1):
            ax.annotate("", (x[k + 1], y[k + 1]), (x[k], y[k]), arrowprops=look)
        for k in {0, len(step) - 1} if method == methods[-1] else ():
            ax.annotate(f"step {step[k]:g}", (x[k], y[k]), xytext=(6, -11), textcoords="offset points", fontsize=7,
                        color=colour[label])  # fmt: skip
    if teacher is not None:
        ax.scatter(teacher["nats"], teacher[score], marker="*", s=180, color=colour["teacher"], zorder=3, label="teacher")
    tidy(ax, title, f"I(X; f), nats per value of {INPUTS[kind]}: −1/2 log(1 − R²)", f"I(y; f), read off the {ACCURACY[score]}")
    top = ax.secondary_xaxis("top", functions=(lambda x: 1 - np.exp(-2 * np.asarray(x)),
                                               lambda r2: -0.5 * np.log1p(-np.clip(r2, None, 1 - 1e-12))))  # fmt: skip
    top.set_xlabel(f"R², variance of {INPUTS[kind]} explained", fontsize=9)
    top.tick_params(labelsize=8)
    ax.margins(x=0.12)
    highest = max(1.0, *(point[score] for point in (*points, *([teacher] if teacher else ()))))
    ax.set_ylim(-0.08 * highest, 1.12 * highest)
    ax.legend(frameon=False, fontsize=8)
    return save(figure, path)


# ------------------------------------------------------------------ command line


def parser() -> ArgumentParser:
    p = ArgumentParser(prog="plane.py", description=__doc__)
    p.add_argument("--student", required=True, metavar="PRESET", help="what is trained, once a method and seed")
    p.add_argument("--methods", nargs="+", default=[ALONE, "rdd"], metavar="M", help="whose runs: none = alone [none rdd]")
    p.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds a method, from --seed on; one teacher for all [1]")
    p.add_argument("--input", choices=tuple(INPUTS), default="map", help="what is reconstructed [the encoder's map]")
    p.add_argument("--decoder-frames", type=int, default=100, metavar="N", help="training frames a decoder is fitted to [100]")
    add_run_options(p)
    return p


def main() -> None:
    given = parser().parse_args()
    for name in ("seeds", "decoder_frames"):
        if getattr(given, name) < 1:
            raise InputError(f"--{name.replace('_', '-')}: expected a number from 1 on, found {getattr(given, name)}")
    for method in given.methods:
        if method not in (ALONE, *METHODS):
            raise InputError(f"--methods: unknown {method!r}{did_you_mean(method, (ALONE, *METHODS))}")
    if given.student.endswith(".pt"):
        raise InputError(f"--student {given.student}: expected a preset, which is trained here; a checkpoint is one point")
    import parallel
    from data.batch import open_data
    from train import check_pair

    parallel.alone("plane.py")
    _, _, device = parallel.start()
    teacher = open_teacher(given.teacher)
    cfg = student_config(given.student, given, teacher.cfg)
    runs = [replace(cfg, method=method, seed=cfg.seed + k) for k in range(given.seeds) for method in given.methods]
    for run in runs:
        check_pair(teacher.cfg, run)
    steps = stop_steps(cfg, given.stops)
    training, validation = open_data(cfg, "train"), open_data(cfg, "val")
    place = {"frames": given.decoder_frames, "kind": given.input, "device": device}
    content = {"data": cfg.data, "student": cfg.preset, "input": given.input, "decoder_frames": given.decoder_frames,
               "teacher": {"preset": teacher.cfg.preset, **point_of(teacher, training, validation, **place)},
               "points": []}  # fmt: skip
    for run in runs:
        name = f"{run.method}-seed{run.seed}"
        learns = run.method != ALONE or run.inherit
        for stop in stops(run, given.out / name, teacher if learns else None, steps, given.workers):
            point = {"method": run.method, "seed": run.seed, "step": stop.step,
                     **point_of(stop.detector, training, validation, **place)}  # fmt: skip
            content["points"].append(point)
            score = next(key for key in MAPS if key in point)
            print(f"{name} step {stop.step}: R^2 {point['r2']:.3f}, I(X; f) {point['nats']:.3f} nats, {score} {point[score]:.2f}")
            write_json(given.out / "plane.json", content)
    picture(given.out / "plane.png", content["points"], content["teacher"], f"{cfg.preset} in training, {cfg.data}", given.input)
    print(given.out / "plane.png")


if __name__ == "__main__":
    run_cli(main)
