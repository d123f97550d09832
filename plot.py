"""Pictures: scenes from above, the regions RDD selects, loss and AP curves.   (reads after: evaluate.py)

    python plot.py runs/NAME                      loss and AP against steps and time -> runs/NAME/curves.png
    python plot.py runs/demo/*-seed*              several runs; the seeds of one name become mean and range
    python plot.py alone=runs/A "with RDD=runs/B" --out both.png             under names of your own
    python plot.py scene --root /data/kitti --frame 000008                   is my data all right? look at it

Every function writes one PNG and returns its matplotlib Figure. From above means: x (forward) is UP and y
(left) is LEFT, as from the driver's seat. A role has one colour in every picture, of Okabe and Ito's palette,
which the colour-blind can tell apart. matplotlib is imported only to draw, so `--help` answers at once.
dims: N points · M boxes (x, y, z, length, width, height, yaw) · R regions (x0, y0, x1, y1) · S logged steps
"""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cli import ArgumentParser, InputError, run_cli

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"ground truth": "#1a1a1a", "teacher": "#0072B2", "student": "#D55E00", "student + RDD": "#009E73"}
OTHERS = ("#CC79A7", "#E69F00", "#56B4E9", "#7F6A45", "#8E6CBF")  # further methods, in order of appearance
KITTI_RANGE = (0.0, -40.0, 70.4, 40.0)  # m: x0, y0, x1, y1
DETECTION = ("cls", "reg", "dir")  # loss terms that every run has: "loss" also holds a distillation's
DASHED = (0, (2, 1.5))


def colours(labels: Iterable[str]) -> dict[str, str]:
    """A colour for each label: that of the role it is or names ("x-rdd": student + RDD), else a free one."""
    labels = list(dict.fromkeys(labels))
    found = {label: COLOURS[label] for label in labels if label in COLOURS}
    for role, word in (("student + RDD", "rdd"), ("teacher", "teacher"), ("student", "student"),
                       ("student", "none")):
        for label in labels:
            if label not in found and word in label.lower() and COLOURS[role] not in found.values():
                found[label] = COLOURS[role]
    free = [c for c in (*OTHERS, *COLOURS.values()) if c not in found.values()]
    rest = [label for label in labels if label not in found]
    return found | {label: free[i % len(free)] for i, label in enumerate(rest)}


def _figure(width: float, height: float) -> "Figure":
    """A figure of its own (inches), outside pyplot's global state: no window, nothing to close."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _tidy(ax: "Axes", title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=10)
    ax.set_xlabel(x, fontsize=9)
    ax.set_ylabel(y, fontsize=9)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="#e9e9e9", linewidth=0.6)
    ax.set_axisbelow(True)


def _save(figure: "Figure", path: str | Path) -> "Figure":
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return figure


# ------------------------------------------------------------------ scenes from above


def outlines(boxes: np.ndarray) -> np.ndarray:
    """(M, >=7) boxes -> (M, 7, 2) lines (x, y): centre, middle of the FRONT, round the corners to it."""
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, np.shape(boxes)[-1] if np.size(boxes) else 7)
    x, y, _, length, width, _, yaw = boxes.T[:7, :, None]  # (M, 1) each
    along = np.array([0, 1, 1, -1, -1, 1, 1]) / 2 * length  # (M, 7)
    across = np.array([0, 0, 1, 1, -1, -1, 0]) / 2 * width
    cos, sin = np.cos(yaw), np.sin(yaw)
    return np.stack([x + along * cos - across * sin, y + along * sin + across * cos], axis=-1)


def _flat(point_range: Sequence[float]) -> Sequence[float]:
    """(x0, y0, x1, y1) of itself or of (x0, y0, z0, x1, y1, z1)."""
    return point_range if len(point_range) == 4 else [point_range[i] for i in (0, 1, 3, 4)]


def _ground(ax: "Axes", points: np.ndarray, point_range: Sequence[float], title: str) -> None:
    """An empty scene: axes in metres, x up and y to the left, the points, and the sensor."""
    x0, y0, x1, y1 = _flat(point_range)
    points = np.asarray(points).reshape(-1, np.shape(points)[-1] if np.size(points) else 3)
    _tidy(ax, title, "y, to the left (m)", "x, forward (m)")
    ax.set(xlim=(y1, y0), ylim=(x0, x1), aspect="equal")
    ax.scatter(points[:, 1], points[:, 0], s=0.6, c="#a0a0a0", linewidths=0)
    ax.plot([0], [0], marker="^", color="black", markersize=7, clip_on=False, zorder=5)


def bev_scene(path: str | Path, panels: Sequence[dict[str, Any]],
              point_range: Sequence[float] = KITTI_RANGE) -> "Figure":  # fmt: skip
    """One or several scenes side by side, with the boxes of each role; a box has a line to its front.

    A panel: title; points (N, >=3); boxes {role: (M, >=7)}; and if wanted scores {role: (M,)}, by which boxes
    fade; names {role: (M,) texts} written beside them; point_range (x0, y0, [z0,] x1, y1, [z1]) m of its own.
    """
    from matplotlib.collections import LineCollection, PolyCollection
    from matplotlib.colors import to_rgba
    from matplotlib.lines import Line2D

    colour = colours(role for panel in panels for role in panel["boxes"])
    ranges = [_flat(panel.get("point_range", point_range)) for panel in panels]
    columns = len(panels) if len(panels) <= 4 else 3
    rows = -(-len(panels) // columns)
    width = 6.0 if columns == 1 else 4.0  # inches of a panel
    height = max((x1 - x0) / (y1 - y0) for x0, y0, x1, y1 in ranges) * (width - 0.5)
    figure = _figure(columns * width, rows * (height + 0.6) + 0.4)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[len(panels) :]:
        ax.remove()
    for ax, panel, point_range in zip(axes, panels, ranges, strict=False):
        _ground(ax, panel["points"], point_range, panel.get("title", ""))
        for role, boxes in panel["boxes"].items():
            lines = outlines(boxes)[..., ::-1]  # (M, 7, 2): y goes across, x up
            truth = role == "ground truth"  # filled, so that it shows beneath a prediction
            if truth:
                face = to_rgba(colour[role], 0.2)
                ax.add_collection(PolyCollection(lines[:, 2:6], facecolor=face, edgecolor="none"))
            scores = np.clip(panel.get("scores", {}).get(role, np.ones(len(lines))), 0, 1)
            shades = [to_rgba(colour[role], 0.25 + 0.75 * score) for score in np.ravel(scores)]
            thick = 1.0 if truth else 1.5
            ax.add_collection(LineCollection(lines, colors=shades, linewidths=thick, label=role))
            for line, name in zip(lines, panel.get("names", {}).get(role, ()), strict=False):
                at = line[:, 0].min(), line[:, 1].mean()  # beside the box, on its right
                ax.text(*at, f" {name}", color=colour[role], fontsize=7, va="center", clip_on=True)
    keys = [Line2D([], [], color=colour[role], linewidth=2, label=role) for role in colour]
    if keys:
        figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False)
    return _save(figure, path)


# ------------------------------------------------------------------ what RDD selects


def regions(path: str | Path, points: np.ndarray, regions: np.ndarray, side: np.ndarray, d: np.ndarray,
            m: np.ndarray, point_range: Sequence[float] = KITTI_RANGE, threshold: float | None = None,
            boxes: np.ndarray | None = None, title: str = "region pairs of one scan") -> "Figure":
    """The M + N region pairs of ONE scan: where they are, how disparate, and which ones RDD selects (Eq. 5).

    regions (R, 4) m or (R, 5) with the scan first; side (R,) 0 = teacher's proposal, 1 = student's; d (R,)
    disparity; m (R,) the solution m*, selected where above 0; threshold: the d from which pairs are selected,
    where there is one; boxes (M, >=7): ground truth.
    """
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    regions = np.asarray(regions, dtype=np.float64)[..., -4:].reshape(-1, 4)
    side, d, chosen = np.ravel(side), np.ravel(d).astype(np.float64), np.ravel(m) > 0
    # The light end of the colour map would vanish on white paper: it is left out.
    plasma = matplotlib.colormaps["plasma_r"](np.linspace(0.15, 1, 256))
    shades = LinearSegmentedColormap.from_list("disparity", plasma)
    low, high = (d.min(), d.max()) if len(d) else (0.0, 1.0)
    norm = Normalize(low, high if high > low else low + 1)

    figure = _figure(11.0, 5.4)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.25, 1), height_ratios=(1, 0.05))
    scene, histogram, bar = (figure.add_subplot(grid[at]) for at in ((slice(None), 0), (0, 1), (1, 1)))
    _ground(scene, points, point_range, title)
    if boxes is not None:
        lines = outlines(boxes)[..., ::-1]
        scene.add_collection(LineCollection(lines, colors=COLOURS["ground truth"], linewidths=1.4))
    for i in np.lexsort((d, chosen)):  # the most disparate selected ones on top
        x0, y0, x1, y1 = regions[i]
        look = {"color": shades(norm(d[i])), "linewidth": 1.8 if chosen[i] else 0.8}
        scene.plot([y0, y0, y1, y1, y0], [x0, x1, x1, x0, x0], ls="-" if chosen[i] else DASHED, **look)
        scene.plot([(y0 + y1) / 2], [(x0 + x1) / 2], marker="o" if side[i] else "s", markersize=3.5, **look)
    _region_legend(scene, boxes is not None)

    edges = np.linspace(norm.vmin, norm.vmax, 31)
    middles, width = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    kept, dropped = np.histogram(d[chosen], edges)[0], np.histogram(d[~chosen], edges)[0]
    edge = {"edgecolor": "white", "linewidth": 0.4}
    histogram.bar(middles, kept, width, color=shades(norm(middles)), **edge)
    histogram.bar(middles, dropped, width, bottom=kept, color="#d4d4d4", label="not selected", **edge)
    if threshold is not None:
        histogram.axvline(threshold, color="black", ls="--", lw=1, label=f"threshold {threshold:.3g}")
    share = f" ({chosen.mean():.0%})" if len(d) else ""
    _tidy(histogram, f"{chosen.sum()} of {len(d)} pairs selected{share}", "", "region pairs")
    histogram.set_xlim(norm.vmin, norm.vmax)
    histogram.tick_params(labelbottom=False)
    histogram.legend(frameon=False, fontsize=8)
    colourbar = figure.colorbar(ScalarMappable(norm, shades), cax=bar, orientation="horizontal")
    colourbar.set_label("disparity d of the pair", fontsize=9)
    bar.tick_params(labelsize=8)
    return _save(figure, path)


def _region_legend(ax: "Axes", with_boxes: bool) -> None:
    from matplotlib.lines import Line2D

    looks = [("selected", {"linewidth": 1.8}), ("not selected", {"linewidth": 0.8, "ls": DASHED}),
             ("teacher's proposal", {"marker": "s", "ls": "", "markersize": 4}),
             ("student's proposal", {"marker": "o", "ls": "", "markersize": 4})]  # fmt: skip
    keys = [Line2D([], [], color="#9c2f86", label=label, **look) for label, look in looks]
    if with_boxes:
        keys.append(Line2D([], [], color=COLOURS["ground truth"], linewidth=1.4, label="ground truth"))
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.1)}
    ax.legend(handles=keys, ncols=3, frameon=False, fontsize=8, **below)


# ------------------------------------------------------------------ curves


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The records of a run folder's metrics.jsonl. A last line that a kill cut short is left out.

    Raises InputError for a missing file, and with its number for any other line that is no record.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{path}: expected the log of a run, found no such file")
    lines, records = path.read_text().splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records.append({"kind": record["kind"], "step": record["step"], **record})
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                found = f"found {line[:60]!r}"
                raise InputError(f"{path}:{number}: expected a record with kind and step, {found}") from None
    return records


def _series(runs: list[list[dict[str, Any]]], kind: str, keys: Sequence[str]) -> np.ndarray:
    """The sum of `keys` over one label's runs (seeds): (S, 5) step, minutes, mean, lowest, highest.

    Row k is the runs' k-th record: their steps differ when they were trained for equal time.
    """
    found = []
    for records in runs:
        points = []
        for r in records:
            values = [r[key] for key in keys if r.get(key) is not None]
            if r["kind"] == kind and values:
                points.append((r["step"], r.get("seconds", np.nan) / 60, sum(values)))
        found.append(points)
    rows = []
    for k in range(max(map(len, found), default=0)):
        step, minutes, value = np.array([points[k] for points in found if k < len(points)]).T
        rows.append((step.mean(), minutes.mean(), value.mean(), value.min(), value.max()))
    return np.array(rows).reshape(-1, 5)


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Running mean over `window` neighbours, over fewer at the ends."""
    if not 1 < window < len(values):
        return values
    sums, counts = (np.convolve(x, np.ones(window), "same") for x in (values, np.ones(len(values))))
    return sums / counts


def _line(ax: "Axes", rows: np.ndarray, across: int, colour: str, label: str, mark: str = "") -> None:
    """Mean against step (across = 0) or minutes (1), in a band from the lowest to the highest seed."""
    rows = rows[np.isfinite(rows[:, across])]
    x, mean, low, high = rows[:, [across, 2, 3, 4]].T
    ax.plot(x, mean, color=colour, linewidth=1.5, marker=mark, markersize=3.5, label=label)
    ax.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def curves(path: str | Path, runs: Sequence[tuple[str, str | Path]], metric: str = "moderate_map_3d",
           terms: Sequence[str] = DETECTION) -> "Figure":  # fmt: skip
    """Loss against steps, AP against steps, AP against training time, of (label, run folder) pairs.

    Runs of one label are its seeds: their mean, in a band from the lowest to the highest. The loss is the sum
    of those `terms` that a run logs, as a running mean. Raises InputError when no run has anything to draw.
    """
    logs: dict[str, list[list[dict[str, Any]]]] = {}
    for label, run in runs:
        logs.setdefault(label, []).append(read_metrics(run))
    colour = colours(logs)
    figure = _figure(12.0, 3.8)
    loss, steps, time = figure.subplots(1, 3)
    everything = []
    for label, log in logs.items():
        train, points = _series(log, "train", terms), _series(log, "eval", (metric,))
        everything += [train[:, 2], points[:, 2]]
        seeds = f" ({len(log)} seeds)" if len(log) > 1 else ""
        window = max(1, len(train) // 25)
        if len(log) == 1 and window > 1:
            loss.plot(train[:, 0], train[:, 2], color=colour[label], alpha=0.25, linewidth=0.6)
        smooth = np.column_stack([train[:, :2], *(_smooth(train[:, k], window) for k in (2, 3, 4))])
        _line(loss, smooth, 0, colour[label], label + seeds, "o" if len(train) == 1 else "")
        final = f": {points[-1, 2]:.1f}" if len(points) else ""
        for ax, across in ((steps, 0), (time, 1)):
            _line(ax, points, across, colour[label], label + final, "o")
    if not sum(map(len, everything)):
        where = ", ".join(str(run) for _, run in runs) or "no run"
        raise InputError(f"{where}: expected records with {', '.join((*terms, metric))}, found none")
    used = [t for t in terms if any(t in record for log in logs.values() for run in log for record in run)]
    _tidy(loss, "training loss", "step", f"loss: {' + '.join(used)}")
    values = np.concatenate(everything[::2])
    if len(values) and values.min() > 0 and values.max() > 20 * values.min():
        loss.set_yscale("log")
    name = metric.replace("_map_", " mAP ").replace("3d", "3D").replace("bev", "BEV")
    _tidy(steps, "accuracy at equal steps", "step", f"{name} (AP_R40, %)")
    _tidy(time, "accuracy at equal time", "training time (min)", f"{name} (AP_R40, %)")
    figure.get_layout_engine().set(w_pad=0.12)
    for ax in (loss, steps, time):
        ax.set_xlim(left=0)
    for ax in (steps, time):
        ax.set_ylim(bottom=0)
    for ax in (loss, steps):
        ax.legend(frameon=False, fontsize=8)
    return _save(figure, path)


# ------------------------------------------------------------------ command line


def scene_main(words: list[str]) -> None:
    """`plot.py scene`: the points and labels of one frame, and a detector's results on it."""
    parser = ArgumentParser(prog="plot.py scene", description="One frame of a KITTI root and its labels.")
    parser.add_argument("--root", required=True, help="folder that holds training/ with the frames")
    parser.add_argument("--frame", required=True, help="which one, e.g. 000008")
    parser.add_argument("--results", help="folder of result files (16 columns) to draw over the labels")
    parser.add_argument("--score", type=float, default=0.3, help="draw detections from this score on [%(default)s]")
    parser.add_argument("--out", help="picture to write [FRAME.png]")
    parser.add_argument("--full-circle", action="store_true", help="also what the camera does not see")
    args = parser.parse_args(words)
    from data.kitti import Kitti, boxes_from_objects, read_objects

    data = Kitti(args.root, frames=(args.frame,), fov_only=not args.full_circle)
    frame = data[0]
    title = f"frame {frame.id}: {len(frame.points)} points, {len(frame.boxes)} objects"
    boxes, scores = {"ground truth": frame.boxes}, {}
    if args.results:
        objects = read_objects(Path(args.results) / f"{frame.id}.txt", scored=True)
        good = objects.score >= args.score
        boxes["detections"] = boxes_from_objects(objects, data.calibration(0))[good]
        scores["detections"] = objects.score[good]
        title += f", {good.sum()} detections from {args.score:g} on"
    panel = {"title": title, "points": frame.points, "boxes": boxes, "scores": scores,
             "names": {"ground truth": frame.names}}  # fmt: skip
    out = args.out or f"{frame.id}.png"
    bev_scene(out, [panel], (-70.4, -70.4, 70.4, 70.4) if args.full_circle else KITTI_RANGE)
    print(out)


def main() -> None:
    if sys.argv[1:2] == ["scene"]:
        return scene_main(sys.argv[2:])
    parser = ArgumentParser(prog="plot.py", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="[LABEL=]RUN", help="run folders [label: their name]")
    parser.add_argument("--out", help="picture to write [curves.png in the run, or beside several]")
    parser.add_argument("--metric", default="moderate_map_3d", help="what to plot as AP [%(default)s]")
    parser.add_argument("--terms", default=",".join(DETECTION), help="loss terms to add up [%(default)s]")
    args = parser.parse_args()
    runs = []
    for text in args.runs:
        label, _, run = text.rpartition("=")
        label = label or re.sub(r"[-_.]?seed\d+$", "", Path(run).resolve().name)
        runs.append((label, Path(run)))
    first = runs[0][1]
    out = args.out or (first.parent if len(runs) > 1 else first) / "curves.png"
    curves(out, runs, args.metric, args.terms.split(","))
    print(out)


if __name__ == "__main__":
    run_cli(main)
