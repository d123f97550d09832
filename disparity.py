"""Where disparity lives: at which range, in which class, on how few points, and when.   (reads after: stops.py  next: plane.py)

    python disparity.py --teacher runs/NAME/last.pt --student cp-voxel-xxs-cpu --out DIR     train with RDD, look 4 times
    python disparity.py --teacher runs/NAME/last.pt --student runs/NAME-rdd/last.pt --out DIR     as it stands, no training
    python disparity.py ... --student runs/NAME-rdd/last.pt --normalise standardise --out DIR     the same without magnitude

RDD (rdd.py) measures, for every pair of regions, the disparity d = ||Rhat^S - Rhat^T||_2 of Eq. 3 and 7, and selects by it
(m*, Eq. 5). Here both are collected over all validation frames, at several stops of the student's training, and sorted

    range    by the distance from the sensor to the region's centre, m
    class    by the labelled object whose centre lies in the region (of several, the one nearest to the region's centre);
             'background' where there is none, or one of a class that is not detected
    points   by the number of LiDAR points in that object's box; background is left out
    side     by who proposed the region, the teacher or the student

DIR/disparity.json holds each bin's pairs: count, quartiles of d, selected share (null where there is no pair), and
DIR/disparity.png shows them. Student and psi are in eval mode: d differs from the training log's, where batch norms (the
student's, and psi's if it has one) use the batch's statistics. d is in the unit of the features, which training changes: compare
bins of a stop rather than stops of a bin. And features are larger where there are more points: `--normalise standardise`
measures the same pairs by their correlation.
dims: R region pairs · M objects of a scan
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cli import ArgumentParser, InputError, run_cli
from config import Config
from evaluate import write_json
from plot import COLOURS, new_figure, save, tidy
from stops import Stop, add_run_options, check_teacher, look, open_teacher, stop_steps, stops, student_config

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor
    from torch.nn import Module

    from data.batch import Batch
    from data.kitti import Kitti
    from data.nuscenes import NuScenes
    from detector import Detector

RANGE_STEP = 10.0  # m, a bin of the range
POINTS = (0, 1, 6, 21, 101)  # lowest number of points of a bin
BACKGROUND = "background"
SIDES = ("teacher", "student")
TITLES = {"range": "by range (m)", "class": "by class", "points": "by points of the object"}


@dataclass(frozen=True)
class Pairs:
    """Region pairs of many scans, one value each: (R,) arrays."""

    d: np.ndarray  # disparity
    m: np.ndarray  # m*, selected where above 0
    side: np.ndarray  # 0 the teacher's proposal, 1 the student's
    distance: np.ndarray  # m, sensor to the region's centre
    label: np.ndarray  # class of the object in the region, -1 background
    points: np.ndarray  # LiDAR points in that object's box, -1 background


# ------------------------------------------------------------------ measuring


def measure(stop: Stop, teacher: "Detector", cfg: Config, validation: "Kitti | NuScenes", device: Any,
            batch_size: int = 4) -> Pairs:  # fmt: skip
    """All region pairs of a data set; `cfg` says how they are proposed, normalised and selected.

    Raises InputError for a student that was not distilled with RDD: it has no psi.
    """
    import torch
    from tqdm import tqdm

    from data.batch import collate

    student, teacher = stop.detector.to(device), teacher.to(device)
    distil = psi_of(stop, teacher, cfg).to(device)
    shared, parts = teacher.shares_input(student), []
    for start in tqdm(range(0, len(validation), batch_size), desc=f"disparity at step {stop.step}", unit="batch", leave=False,
                      dynamic_ncols=True):  # fmt: skip
        frames = [validation[i] for i in range(start, min(start + batch_size, len(validation)))]
        batch = collate(frames, student.cfg).to(device)
        with torch.no_grad():
            x = student.prepare(batch)
            pairs = distil.compare(student(x), teacher(x if shared else teacher.prepare(batch)), batch)
            parts.append((pairs.d, pairs.m, pairs.side, *locate(pairs.regions, batch)))
    return Pairs(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))


def psi_of(stop: Stop, teacher: "Detector", cfg: Config) -> "Module":
    """RDD with the psi of that stop, in eval mode."""
    from rdd import RDD
    from weights import load_weights

    method = stop.detector.cfg.method
    if method != "rdd":
        raise InputError(f"student {cfg.preset}: expected one distilled with rdd, whose psi is needed; found method {method}")
    check_teacher(stop, teacher, f"student {cfg.preset}")
    distil = RDD(cfg, stop.detector.backbone.out_channels, teacher.backbone.out_channels)
    load_weights(distil, stop.distil, f"psi of student {cfg.preset} with teacher {teacher.cfg.preset}")
    return distil.eval()


def locate(regions: "Tensor", batch: "Batch") -> tuple["Tensor", "Tensor", "Tensor"]:
    """(R, 5) regions -> distance (R,) m, label (R,) and points (R,) of the object in each, both -1 for background."""
    import torch

    from boxes import points_in_boxes

    x, y = (regions[:, 1] + regions[:, 3]) / 2, (regions[:, 2] + regions[:, 4]) / 2
    label, points = (torch.full((len(regions),), -1, device=regions.device) for _ in range(2))
    for b, (boxes, classes) in enumerate(zip(batch.boxes, batch.labels, strict=True)):
        rows = (regions[:, 0] == b).nonzero()[:, 0]
        if not len(rows) or not len(boxes):
            continue
        _, x0, y0, x1, y1 = regions[rows, :, None].unbind(1)  # (r, 1) each
        inside = (x0 <= boxes[:, 0]) & (boxes[:, 0] < x1) & (y0 <= boxes[:, 1]) & (boxes[:, 1] < y1)  # (r, M)
        away = torch.hypot(x[rows, None] - boxes[:, 0], y[rows, None] - boxes[:, 1])
        nearest, found = away.masked_fill(~inside, torch.inf).argmin(dim=1), inside.any(dim=1)
        count = points_in_boxes(batch.points[batch.points[:, 0] == b, 1:], boxes).sum(dim=0)  # (M,)
        label[rows[found]], points[rows[found]] = classes[nearest[found]], count[nearest[found]]
    return torch.hypot(x, y), label, points


# ------------------------------------------------------------------ bins


def describe(pairs: Pairs, chosen: np.ndarray) -> dict[str, Any]:
    """count, quartiles of d and selected share of the chosen pairs (R,) bool; None for what no pair can tell."""
    count = int(chosen.sum())
    q25, median, q75 = np.quantile(pairs.d[chosen], [0.25, 0.5, 0.75]).tolist() if count else (None,) * 3
    selected = float((pairs.m[chosen] > 0).mean()) if count else None
    return {"count": count, "q25": q25, "median": median, "q75": q75, "selected": selected}


def groups(pairs: Pairs, cfg: Config) -> dict[str, dict[str, np.ndarray]]:
    """{"range" | "class" | "points" | "side": {bin: (R,) bool which pairs}}. A pair is in one bin of each at most."""
    x0, y0, _, x1, y1, _ = cfg.point_range
    far = np.hypot(max(abs(x0), abs(x1)), max(abs(y0), abs(y1)))  # no point of the map is farther from the sensor
    starts = np.arange(0, far, RANGE_STEP)
    by_range = {f"{low:g}-{low + RANGE_STEP:g}": (pairs.distance >= low) & (pairs.distance < low + RANGE_STEP)
                for low in starts}  # fmt: skip
    by_class = {name: pairs.label == k for k, name in enumerate((*cfg.classes, BACKGROUND)) if name != BACKGROUND}
    by_class[BACKGROUND] = pairs.label < 0
    by_points = {}
    for low, above in zip(POINTS, (*POINTS[1:], np.inf), strict=True):
        name = f"{low}+" if above == np.inf else f"{low}" if above == low + 1 else f"{low}-{above - 1}"
        by_points[name] = (pairs.points >= low) & (pairs.points < above)
    return {"range": by_range, "class": by_class, "points": by_points,
            "side": {name: pairs.side == k for k, name in enumerate(SIDES)}}  # fmt: skip


def summarise(pairs: Pairs, cfg: Config, step: int) -> dict[str, Any]:
    """What the JSON says of a stop: step; "all"; and per grouping a list of bins, {"bin": its name, **describe}."""
    tables = {name: [{"bin": label, **describe(pairs, chosen)} for label, chosen in bins.items()]
              for name, bins in groups(pairs, cfg).items()}  # fmt: skip
    return {"step": step, "all": describe(pairs, np.ones(len(pairs.d), dtype=bool)), **tables}


# ------------------------------------------------------------------ picture


def picture(path: Path, records: Sequence[dict[str, Any]], title: str = "") -> "Figure":
    """d (median, bars from quartile to quartile) above, the selected share below; a colour a stop, the darkest the last.

    Of several stops the last column is over training, by who proposed. In brackets: the last stop's pairs.
    """
    import matplotlib

    over_training = len(records) > 1
    figure = new_figure(16.0 if over_training else 12.5, 7.0)
    axes = figure.subplots(2, 4 if over_training else 3, sharex="col")
    shades = matplotlib.colormaps["plasma_r"](np.linspace(0.2, 0.9, len(records)) if over_training else [0.9])
    for column, (name, heading) in enumerate(TITLES.items()):
        for k, (record, shade) in enumerate(zip(records, shades, strict=True)):
            shift = (k - (len(records) - 1) / 2) * 0.6 / len(records)  # bars of several stops side by side
            x = np.arange(len(record[name])) + shift
            _marks(axes[:, column], x, record[name], shade, f"step {record['step']}", "" if name == "class" else "-")
        last = records[-1][name]
        tidy(axes[0, column], f"disparity {heading}", "", "d" if column == 0 else "")
        tidy(axes[1, column], "", "", "selected share of the pairs" if column == 0 else "")
        axes[1, column].set_xticks(range(len(last)), [f"{bin['bin']} ({bin['count']})" for bin in last], rotation=60, ha="right",
                                   rotation_mode="anchor", fontsize=8)  # fmt: skip
        axes[1, column].set_xlim(-0.6, len(last) - 0.4)
    for k, side in enumerate(SIDES if over_training else ()):
        bins = [record["side"][k] for record in records]
        steps = [record["step"] for record in records]
        _marks(axes[:, 3], steps, bins, COLOURS[side], f"proposed by the {side} ({bins[-1]['count']})", "-")
    if over_training:
        tidy(axes[0, 3], "over training", "", "")
        tidy(axes[1, 3], "", "step", "")
        axes[1, 3].set_xlim(0, 1.05 * records[-1]["step"])
    every = [bin for record in records for name in (*TITLES, "side") for bin in record[name]]
    highest = max((bin["q75"] for bin in every if bin["count"]), default=1)
    for ax in axes[0]:
        ax.set_ylim(0, 1.05 * highest or 1)
    for ax in axes[1]:
        ax.set_ylim(0, 1.02)
    for ax in axes[0, ::3]:
        ax.legend(frameon=False, fontsize=8, loc="lower left")
    figure.suptitle(title, fontsize=11)
    return save(figure, path)


def _marks(axes: Sequence["Axes"], x: Sequence[float], bins: list[dict[str, Any]], colour: Any, label: str, line: str) -> None:
    """A bin's median and quartiles in the upper axes, its selected share in the lower; nothing for a bin without a pair."""
    at = np.array([i for i, bin in enumerate(bins) if bin["count"]], dtype=int)
    values = np.array([[bins[i][key] for key in ("median", "q25", "q75", "selected")] for i in at]).reshape(-1, 4)
    median, low, high, selected = values.T
    x = np.asarray(x, dtype=float)[at]
    style = {"color": colour, "marker": "o", "markersize": 4, "linestyle": line, "linewidth": 1.2}
    axes[0].vlines(x, low, high, colors=[colour], linewidth=1)
    axes[0].plot(x, median, label=label, **style)
    axes[1].plot(x, selected, **style)


# ------------------------------------------------------------------ command line


def parser() -> ArgumentParser:
    p = ArgumentParser(prog="disparity.py", description=__doc__)
    p.add_argument("--student", required=True, metavar="PRESET|CHECKPOINT",
                   help="a preset, trained here with RDD and looked at --stops times; or a distilled checkpoint")
    add_run_options(p)
    return p


def main() -> None:
    given = parser().parse_args()
    import parallel
    from data.batch import open_data
    from train import check_pair

    parallel.alone("disparity.py")
    _, _, device = parallel.start()
    teacher = open_teacher(given.teacher)
    cfg = student_config(given.student, given, teacher.cfg)
    check_pair(teacher.cfg, cfg)
    if given.student.endswith(".pt"):
        found = iter([look(Path(given.student))])
    else:
        found = stops(cfg, given.out / f"rdd-seed{cfg.seed}", teacher, stop_steps(cfg, given.stops), given.workers)
    validation = open_data(cfg, "val")
    records = []
    for stop in found:
        records.append(summarise(measure(stop, teacher, cfg, validation, device), cfg, stop.step))
        every = records[-1]["all"]
        if not every["count"]:
            print(f"step {stop.step}: no region above --proposal-score {cfg.proposal_score:g} yet")
        else:
            print(f"step {stop.step}: {every['count']} pairs, median d {every['median']:.3g}, selected {every['selected']:.1%}")
    write_json(given.out / "disparity.json", {"teacher": teacher.cfg.preset, "student": cfg.preset, "data": cfg.data,
                                              "select": cfg.select, "frames": len(validation), "stops": records})  # fmt: skip
    picture(given.out / "disparity.png", records, f"{cfg.preset} and its teacher {teacher.cfg.preset}: region pairs of "
            f"{len(validation)} validation frames of {cfg.data}")  # fmt: skip
    print(given.out / "disparity.png")


if __name__ == "__main__":
    run_cli(main)
