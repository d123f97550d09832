"""Pictures: scenes from above, the regions RDD selects.   (reads after: table.py  next: curves.py)

    python plot.py runs/NAME                      loss and AP against steps and time -> runs/NAME/curves.png
    python plot.py runs/demo/*-seed*/             several runs; the seeds of one name become mean and range
    python plot.py alone=runs/A "with RDD=runs/B" --out both.png             under names of your own
    python plot.py scene --root /data/kitti --frame 000008                   is my data all right? look at it
    python plot.py suite sim-nuscenes --out docs/methods.png                 every method of a suite, from results/
    python plot.py pulls sim-nuscenes losses tuning --out docs/pulls.png     what they gain against how hard they pull
    python plot.py sweeps --out docs/sweeps.png                              figure 5a of the paper, from results/
    python plot.py scene --data nuscenes --root /data/nuscenes --version v1.0-mini --frame TOKEN --sweeps 10

Every function writes one PNG and returns its matplotlib Figure. From above means: x (forward) is UP and y
(left) is LEFT, as from the driver's seat. A role has one colour in every picture, of Okabe and Ito's palette,
which the colour-blind can tell apart. matplotlib is imported only to draw, so `--help` answers at once.
dims: N points · M boxes (x, y, z, length, width, height, yaw[, vx, vy]) · R regions (x0, y0, x1, y1)
"""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
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
NUSCENES_RANGE = (-51.2, -51.2, 51.2, 51.2)
DASHED = (0, (2, 1.5))


def colours(labels: Iterable[str]) -> dict[str, str]:
    """A colour for each label: that of the role it is or names ("x-rdd": student + RDD), else a free one."""
    labels = list(dict.fromkeys(labels))
    found = {label: COLOURS[label] for label in labels if label in COLOURS}
    for role, word in (("student + RDD", "rdd"), ("teacher", "teacher"), ("student", "student alone"), ("student", "none"),
                       ("student", "student")):  # the last one, or "student + hint" would take what is the student's own
        for label in labels:
            if label not in found and word in label.lower() and COLOURS[role] not in found.values():
                found[label] = COLOURS[role]
    free = [c for c in (*OTHERS, *COLOURS.values()) if c not in found.values()]
    rest = [label for label in labels if label not in found]
    return found | {label: free[i % len(free)] for i, label in enumerate(rest)}


def new_figure(width: float, height: float) -> "Figure":
    """A figure of its own (inches), outside pyplot's global state: no window, nothing to close."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def tidy(ax: "Axes", title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=10)
    ax.set_xlabel(x, fontsize=9)
    ax.set_ylabel(y, fontsize=9)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="#e9e9e9", linewidth=0.6)
    ax.set_axisbelow(True)


def save(figure: "Figure", path: str | Path) -> "Figure":
    """Write the picture, in the format that the name's ending says. Raises InputError where that cannot be done."""
    kind, known = Path(path).suffix[1:].lower(), figure.canvas.get_supported_filetypes()
    if kind and kind not in known:
        raise InputError(f"{path}: expected a picture's name, ending in .{', .'.join(sorted(known))}; found .{kind}")
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except OSError as error:
        raise InputError(f"{path}: expected where a picture can be written, found: {error.strerror or error}") from None
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
    tidy(ax, title, "y, to the left (m)", "x, forward (m)")
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
    figure = new_figure(columns * width, rows * (height + 0.6) + 0.4)
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
            if np.shape(boxes)[-1] > 7:
                _arrows(ax, boxes, colour[role])
            for line, name in zip(lines, panel.get("names", {}).get(role, ()), strict=False):
                at = line[:, 0].min(), line[:, 1].mean()  # beside the box, on its right
                ax.text(*at, f" {name}", color=colour[role], fontsize=7 if len(lines) < 30 else 5, va="center", clip_on=True)
    keys = [Line2D([], [], color=colour[role], linewidth=2, label=role) for role in colour]
    if keys:
        figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False)
    return save(figure, path)


def _arrows(ax: "Axes", boxes: np.ndarray, colour: str) -> None:
    """From each box (M, 9) to where its centre will be in a second; none where the velocity is unknown or a walk's crawl."""
    x, y, vx, vy = np.asarray(boxes, dtype=np.float64)[:, [0, 1, 7, 8]].T
    moving = np.hypot(vx, vy) > 0.2  # NaN is not
    if moving.any():
        start, step = np.stack([y, x])[:, moving], np.stack([vy, vx])[:, moving]
        ax.quiver(*start, *step, color=colour, angles="xy", scale_units="xy", scale=1, width=0.004, zorder=4)


def face_forward(points: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points (N, >=3) and boxes (M, >=7) of a nuScenes frame, whose sensor has x to the right and y ahead, a quarter turn
    to the right: x ahead, y to the left."""
    points, boxes = np.array(points), np.array(boxes)
    for rows, x in ((points, 0), (boxes, 0), *([(boxes, 7)] if boxes.shape[1] > 7 else [])):
        rows[:, x], rows[:, x + 1] = rows[:, x + 1].copy(), -rows[:, x]
    boxes[:, 6] -= np.pi / 2
    return points, boxes


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

    figure = new_figure(11.0, 5.4)
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
    tidy(histogram, f"{chosen.sum()} of {len(d)} pairs selected{share}", "", "region pairs")
    histogram.set_xlim(norm.vmin, norm.vmax)
    histogram.tick_params(labelbottom=False)
    histogram.legend(frameon=False, fontsize=8)
    colourbar = figure.colorbar(ScalarMappable(norm, shades), cax=bar, orientation="horizontal")
    colourbar.set_label("disparity d of the pair", fontsize=9)
    bar.tick_params(labelsize=8)
    return save(figure, path)


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


# ------------------------------------------------------------------ command line


def scene_main(words: list[str]) -> None:
    """`plot.py scene`: the points and labels of one frame, and a detector's results on it."""
    parser = ArgumentParser(prog="plot.py scene", description="One frame and its labels; an arrow: a second of motion.")
    parser.add_argument("--root", required=True, help="folder of the data set")
    parser.add_argument("--frame", required=True, help="which one: 000008, or a nuScenes sample's token or place in the split")
    parser.add_argument("--data", default="kitti", choices=("kitti", "nuscenes"), help="its layout [%(default)s]")
    parser.add_argument("--results", help="KITTI: folder of result files; nuScenes: a submission file; to draw over the labels")
    parser.add_argument("--score", type=float, default=0.3, help="draw detections from this score on [%(default)s]")
    parser.add_argument("--out", help="picture to write [FRAME.png]")
    parser.add_argument("--full-circle", action="store_true", help="KITTI: also what the camera does not see")
    parser.add_argument("--version", default="v1.0-trainval", help="nuScenes: whose tables [%(default)s]")
    parser.add_argument("--split", default="all", help="nuScenes: which samples a place in the split counts [%(default)s]")
    parser.add_argument("--sweeps", type=int, default=1, help="nuScenes: scans to merge [%(default)s]")
    parser.add_argument("--velocities", type=Path, metavar="FILE", help="nuScenes: JSON {annotation token: [vx, vy]}, m/s in "
                        "the LiDAR frame, for a root of single key frames, whose tables cannot tell")  # fmt: skip
    args = parser.parse_args(words)
    if args.data == "nuscenes":
        panel, area = nuscenes_panel(args), NUSCENES_RANGE
    else:
        panel, area = kitti_panel(args), (-70.4, -70.4, 70.4, 70.4) if args.full_circle else KITTI_RANGE
    out = args.out or f"{panel['id']}.png"
    bev_scene(out, [panel], area)
    print(out)


def _panel(frame: Any, boxes: np.ndarray, found: tuple[np.ndarray, np.ndarray] | None, score: float) -> dict[str, Any]:
    """A frame's panel; found: the boxes and scores of a detector."""
    title = f"frame {frame.id[:8]}: {len(frame.points)} points, {len(boxes)} objects"
    panel = {"id": frame.id, "title": title, "points": frame.points, "boxes": {"ground truth": boxes},
             "names": {"ground truth": frame.names}}  # fmt: skip
    if found is not None:
        good = found[1] >= score
        panel["boxes"]["detections"], panel["scores"] = found[0][good], {"detections": found[1][good]}
        panel["title"] += f", {good.sum()} detections from {score:g} on"
    return panel


def kitti_panel(args: Any) -> dict[str, Any]:
    """The panel of a frame of a KITTI root."""
    from data.kitti import Kitti, boxes_from_objects, read_objects

    data = Kitti(args.root, frames=(args.frame,), fov_only=not args.full_circle)
    frame, found = data[0], None
    if args.results:
        objects = read_objects(Path(args.results) / f"{frame.id}.txt", scored=True)
        found = boxes_from_objects(objects, data.calibration(0)), objects.score
    return _panel(frame, frame.boxes, found, args.score)


def nuscenes_panel(args: Any) -> dict[str, Any]:
    """The panel of a sample of a nuScenes root, turned so that ahead is up."""
    from data.nuscenes import NuScenes, boxes_to_lidar
    from data.nuscenes_tables import Tables
    from metrics.nuscenes import read_results

    token = args.frame
    if token.isdecimal() and len(token) < 8:  # a place, no token
        samples = Tables(args.root, args.version).split(args.split)
        if int(token) >= len(samples):
            raise InputError(f"--frame {token}: expected a place below {len(samples)}, the samples of {args.split}")
        token = samples[int(token)]
    data = NuScenes(args.root, args.version, "all", args.sweeps, min_points=0, frames=(token,))
    frame = data[0]
    if args.velocities:
        frame = replace(frame, boxes=_with_velocities(frame.boxes, data.tables.annotations(token), args.velocities))
    found = None
    if args.results:
        try:
            every = list(json.loads(Path(args.results).read_bytes())["results"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{args.results}: expected a nuScenes submission, {{meta, results}}, found {error!r}") from None
        boxes = read_results(Path(args.results), every)
        mine = boxes[np.flatnonzero(boxes.sample == every.index(token))] if token in every else boxes[:0]
        boxes_found = boxes_to_lidar(mine.translation, mine.size, mine.rotation, mine.velocity, data.tables.scans(token, 1)[0])
        found = face_forward(np.zeros((0, 3)), boxes_found)[1], mine.score
    points, boxes = face_forward(frame.points, frame.boxes)
    return _panel(replace(frame, points=points), boxes, found, args.score)


def _with_velocities(boxes: np.ndarray, annotations: list[Any], path: Path) -> np.ndarray:
    """The boxes (M, 9) of a frame with the velocities of a file."""
    try:
        known = json.loads(path.read_bytes())
        rows = [known.get(a.token, (np.nan, np.nan)) for a in annotations if a.name]
        return np.concatenate([boxes[:, :7], np.array(rows, dtype=np.float32).reshape(-1, 2)], axis=1)
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: expected {{annotation token: [vx, vy]}}, found something else ({error})") from None


def main() -> None:
    if sys.argv[1:2] == ["scene"]:
        return scene_main(sys.argv[2:])
    if sys.argv[1:2] and sys.argv[1] in ("suite", "pulls", "sweeps"):
        from curves import records_main

        return records_main(sys.argv[1], sys.argv[2:])
    parser = ArgumentParser(prog="plot.py", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="[LABEL=]RUN", help="run folders [label: their name]")
    parser.add_argument("--out", help="picture to write [curves.png in the run, or beside several]")
    parser.add_argument("--metric", help="what to plot as accuracy [moderate_map_3d, nuScenes: nds]")
    parser.add_argument("--terms", default="cls,reg,dir", help="loss terms to add up [%(default)s]")
    parser.add_argument("--steps-only", action="store_true", help="not against time, which --remember makes another's")
    args = parser.parse_args()
    runs = []
    for text in args.runs:
        label, _, run = text.rpartition("=")
        label = label or re.sub(r"[-_.]?seed\d+$", "", Path(run).resolve().name)
        runs.append((label, Path(run)))
    first = runs[0][1]
    out = args.out or (first.parent if len(runs) > 1 else first) / "curves.png"
    from curves import curves

    curves(out, runs, args.metric, args.terms.split(","), timed=not args.steps_only)
    print(out)


if __name__ == "__main__":
    run_cli(main)
