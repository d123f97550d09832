"""Does the simulator look like the sensor? Statistics of simulated and of real frames: a table and a picture.

    python -m data.simulate compare --root datasets/sim-kitti --real /data/kitti --out figure.png
    python -m data.simulate compare --root datasets/sim-nuscenes --real /data/nuscenes               the table alone

Both sets go through the official loader. KITTI's frames are cropped to the image, so whole turns and camera sectors compare
alike; of nuScenes, key frames without sweeps. Of the real frames only statistics are shown. (reads after: simulate.py)
"""

from pathlib import Path

import numpy as np

from cli import ArgumentParser, InputError
from data.kitti import Kitti
from data.nuscenes import NuScenes
from data.nuscenes_tables import CLASS_OF, Tables
from data.scanner import HDL64E

CLASSES = ("Car", "Pedestrian", "Cyclist")
ELEVATIONS = np.radians(np.arange(4, -18.5, -1.0))  # three upper rings or two lower ones in each bin


def points_inside(points: np.ndarray, box: np.ndarray) -> np.ndarray:
    """(N,) bool: which points lie in one box (7,)."""
    c, s = np.cos(box[6]), np.sin(box[6])
    local = (points[:, :3] - box[:3]) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    return (np.abs(local) <= box[3:6] / 2).all(1)


def rays_in_image(dataset: Kitti) -> int:
    """How many rays of the 64-beam grid look into the image, judged at 15 m."""
    elevation, azimuth = HDL64E.grid()
    e, a = np.meshgrid(elevation, azimuth, indexing="ij")
    xyz = 15 * np.stack([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)], -1).reshape(-1, 3)
    calib = dataset.calibration(0)
    pixels, depth = calib.project(calib.lidar_to_camera(xyz))
    return int(((depth > 0) & (pixels >= 0).all(1) & (pixels < (1242, 375)).all(1)).sum())


def measure(dataset: Kitti) -> dict:
    """Means per frame of everything compared; `objects`: class -> (n, 2) range and number of points."""
    rays = rays_in_image(dataset)
    totals, rings, heights, ranges, intensity, in_boxes = [], [], [], [], [], []
    objects: dict[str, list] = {name: [] for name in CLASSES}
    counts: dict[str, int] = {}
    for i in range(len(dataset)):
        frame = dataset[i]
        xyz = frame.points[:, :3].astype(np.float64)
        distance = np.linalg.norm(xyz, axis=1)
        totals.append(len(xyz))
        elevation = np.arcsin(xyz[:, 2] / np.maximum(distance, 1e-6))
        rings.append(np.histogram(-elevation, -ELEVATIONS)[0])
        heights.append(np.histogram(xyz[:, 2] + 1.73, np.linspace(-1, 4, 51))[0])
        ranges.append(np.histogram(distance, np.arange(0, 81, 2))[0])
        intensity.append(np.histogram(frame.points[:, 3], np.linspace(0, 1, 41))[0])
        inside = 0
        for box, name in zip(frame.boxes, frame.names, strict=True):
            n = int(points_inside(frame.points, box).sum())
            inside += n
            counts[name] = counts.get(name, 0) + 1
            if name in objects:
                objects[name].append((float(np.hypot(*box[:2])), n))
        in_boxes.append(inside)
    mean = {
        k: np.mean(v, axis=0)
        for k, v in (("rings", rings), ("heights", heights), ("ranges", ranges), ("intensity", intensity))
    }
    return mean | {
        "points": np.array(totals), "no_return": 1 - np.array(totals) / rays, "in_boxes": np.array(in_boxes),
        "objects": {k: np.array(v).reshape(-1, 2) for k, v in objects.items()},
        "counts": {k: v / len(dataset) for k, v in counts.items()}, "frames": len(dataset),
    }  # fmt: skip


def share(histogram: np.ndarray, low: int, high: int) -> float:
    """Percent of a histogram between two of its bins."""
    return 100 * histogram[low:high].sum() / histogram.sum()


def rows(m: dict) -> dict[str, str]:
    """The lines of the table for one set."""
    out = {
        "frames": f"{m['frames']}",
        "points in the image, mean": f"{m['points'].mean():.0f}",
        "points in the image, std over frames": f"{m['points'].std():.0f}",
        "rays without return, %": f"{100 * m['no_return'].mean():.1f}",
        "points in labelled boxes, mean": f"{m['in_boxes'].mean():.0f}",
    }
    for low, high in ((0, 10), (10, 20), (20, 40), (40, 80)):
        out[f"points at {low}-{high} m, %"] = f"{share(m['ranges'], low // 2, high // 2):.1f}"
    for low, high in ((-0.5, 0.3), (0.3, 1.0), (1.0, 2.0), (2.0, 4.0)):
        a, b = round((low + 1) * 10), round((high + 1) * 10)
        out[f"points {low} .. {high} m above ground, %"] = f"{share(m['heights'], a, b):.1f}"
    for low, high in ((4, -1), (-1, -5), (-5, -10), (-10, -17)):
        out[f"points of rings at {low} .. {high} deg, %"] = f"{share(m['rings'], 4 - low, 4 - high):.1f}"
    levels = (np.arange(40) + 0.5) / 40
    out["intensity, mean"] = f"{(m['intensity'] * levels).sum() / m['intensity'].sum():.3f}"
    for name in CLASSES:
        distance, points = m["objects"][name].T
        out[f"{name} per frame"] = f"{m['counts'].get(name, 0):.1f}"
        for low, high in ((0, 15), (15, 30), (30, 50)):
            here = points[(distance >= low) & (distance < high)]
            out[f"points per {name} at {low}-{high} m, median (n)"] = (
                f"{np.median(here):.0f} ({len(here)})" if len(here) else "- (0)"
            )
    for name in sorted(set(m["counts"]) - set(CLASSES)):
        out[f"{name} per frame"] = f"{m['counts'][name]:.2f}"
    return out


def table(simulated: dict, real: dict) -> str:
    """A markdown table of both sets."""
    return table_of(rows(simulated), rows(real))


def table_of(simulated: dict[str, str], real: dict[str, str]) -> str:
    lines = ["| statistic | simulated | real |", "|---|---|---|"]
    return "\n".join(lines + [f"| {name} | {value} | {real.get(name, '0')} |" for name, value in simulated.items()])


# What no statistic here shows, or what the numbers cannot say by themselves
KNOWN = """Different on purpose: more objects in a frame, above all people.
Not simulated: the sensor's own car (its bonnet shades the lowest rings, which the image does not show),
movement during a turn, rain and dust, reflections, the width of a beam (no mixed points at edges), errors of
annotators (boxes are exact). Houses are plain blocks, things have few materials, rare objects are missing."""


def mismatches(simulated: dict, real: dict, limit: float = 0.25) -> str:
    """The statistics that differ by more than `limit` of the real value, and of how many objects."""
    ours, theirs = rows(simulated), rows(real)
    out = []
    for name, value in theirs.items():
        a, b = (text.split()[0] for text in (ours.get(name, "0"), value))
        if name != "frames" and "-" not in (a, b) and abs(float(a) - float(b)) > limit * abs(float(b)):
            out.append(
                f"- {name}: {a} against {b}"
                + (f", of {value.split('(')[1][:-1]} objects" if "(" in value else "")
            )
    return f"Further apart than {limit:.0%}:\n" + "\n".join(out or ["- nothing"])


def figure(simulated: dict, real: dict, path: str | Path) -> None:
    """Eight panels, simulated against real."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(2, 4, figsize=(18, 8.5), layout="constrained")
    curves = (
        ("rings", np.degrees(ELEVATIONS), "elevation, degrees", "points per degree and frame"),
        ("ranges", np.arange(0, 81, 2), "range, m", "points per 2 m and frame"),
        (
            "heights",
            np.linspace(-1, 4, 51),
            "height above the road under the sensor, m",
            "points per 0.1 m and frame",
        ),
        ("intensity", np.linspace(0, 1, 41), "intensity", "points per 0.025 and frame"),
    )
    sets = (("simulated", simulated, "tab:blue"), ("real", real, "tab:orange"))
    for ax, (key, edges, x, y) in zip(axes[0], curves, strict=True):
        for name, m, colour in sets:
            ax.plot((edges[1:] + edges[:-1]) / 2, m[key], label=name, color=colour, drawstyle="steps-mid")
        ax.set(xlabel=x, ylabel=y, yscale="log" if key in ("ranges", "heights") else "linear")
    axes[0, 0].legend()
    for ax, name in zip(axes[1], CLASSES, strict=False):
        for label, m, colour in sets:
            distance, points = m["objects"][name].T
            dots = dict(s=8, alpha=0.35) if label == "simulated" else dict(s=40, marker="x")
            ax.scatter(
                distance, np.maximum(points, 0.7), label=f"{label} ({len(points)})", color=colour, **dots
            )
        ax.set(xlabel="range, m", ylabel=f"points per {name}", yscale="log", xlim=(0, 80))
        ax.legend()
    for label, m, colour in sets:
        axes[1, 3].hist(
            m["points"], bins=np.arange(8000, 24001, 500), density=True, alpha=0.6, label=label, color=colour
        )
    axes[1, 3].set(xlabel="points in the image", ylabel="density of frames")
    fig.suptitle(f"{simulated['frames']} simulated and {real['frames']} real frames, cropped to the image")
    fig.savefig(path, dpi=80)
    plt.close(fig)


# ------------------------------------------------------------------ nuScenes


def nuscenes_rows(root: str | Path, most: int = 200) -> dict[str, str]:
    """The lines of the table for a nuScenes root, of up to `most` key frames spread over it.

    Raises InputError if the root holds no tables, or not the clouds.
    """
    found = sorted(path.parent.name for path in Path(root).glob("v1.0-*/sample.json"))
    if not found:
        raise InputError(f"{root}: expected a KITTI or a nuScenes root, found neither")
    ids = Tables(root, found[0]).split("all")
    dataset = NuScenes(root, found[0], "all", sweeps=1, frames=ids[:: max(1, len(ids) // most)])
    of_points: dict[str, list] = {}
    objects: dict[str, list] = {name: [] for name in dict.fromkeys(CLASS_OF.values())}
    for i, id in enumerate(dataset.ids):
        points = dataset[i].points
        distance = np.linalg.norm(points[:, :3], axis=1)
        outside = distance > 2.5  # nearer are silent rays and the vehicle itself
        elevation = np.degrees(np.arcsin(points[outside, 2] / distance[outside]))
        values = {"points and silent rays of a turn": len(points), "no echo (nearer than 0.6 m)": (distance < 0.6).sum(),
                  "on the vehicle itself (0.6 to 2.5 m)": ((distance >= 0.6) & ~outside).sum()}  # fmt: skip
        for low, high in ((-31.5, -20.5), (-20.5, -10), (-10, 0.6), (0.6, 11)):
            values[f"of beams at {low:g} .. {high:g} degrees"] = ((elevation > low) & (elevation <= high)).sum()
        for low, high in ((2.5, 5), (5, 10), (10, 20), (20, 40), (40, 110)):
            share_of = ((distance > low) & (distance <= high)).sum() / outside.sum()
            values[f"at {low:g}-{high:g} m, % of those beyond 2.5 m"] = 100 * share_of
        for percent in (5, 25, 50, 75, 95):
            values[f"intensity, {percent}th percentile"] = np.percentile(points[outside, 3], percent)
        for name, value in values.items():
            of_points.setdefault(name, []).append(value)
        for label, box in zip((a for a in dataset.tables.annotations(id) if a.name and a.lidar_points), dataset.boxes(i)[0]):
            objects[label.name].append((float(np.hypot(*box[:2])), label.lidar_points))
    out = {"key frames": str(len(dataset))} | {name: f"{np.mean(v):.0f}" for name, v in of_points.items()}
    for name, seen in objects.items():
        out[f"{name} a frame"] = f"{len(seen) / len(dataset):.1f}"
    for name in ("car", "truck", "pedestrian", "barrier", "traffic_cone"):
        distance, points = np.array(objects[name]).reshape(-1, 2).T
        for low, high in ((0, 15), (15, 30), (30, 50)):
            here = points[(distance >= low) & (distance < high)]
            middle = f"{np.median(here):.0f}" if len(here) else "-"
            out[f"points on a {name} at {low}-{high} m, median (n)"] = f"{middle} ({len(here)})"
    return out


def compare_main(arguments: list[str]) -> None:
    """The command line of `python -m data.simulate compare`."""
    parser = ArgumentParser(prog="python -m data.simulate compare", description=__doc__)
    parser.add_argument("--root", required=True, help="simulated KITTI or nuScenes root")
    parser.add_argument("--real", required=True, help="real root of the same layout")
    parser.add_argument("--out", default="", help="the picture, .png (KITTI; default: none)")
    parser.add_argument("--frames", nargs="+", default=[], help="real frames (default: all that are there)")
    given = parser.parse_args(arguments)
    if not (Path(given.root) / "training").is_dir():
        if given.out:
            raise InputError(f"--out: expected a simulated KITTI root for a picture, found {given.root}")
        return print(table_of(nuscenes_rows(given.root), nuscenes_rows(given.real)))
    found = sorted(path.stem for path in (Path(given.real) / "training" / "velodyne").glob("*.bin"))
    if not found and not given.frames:
        raise InputError(f"{given.real}: expected frames in training/velodyne, found none")
    simulated = measure(Kitti(given.root, "trainval"))
    real = measure(Kitti(given.real, "trainval", frames=given.frames or found))
    print(f"{table(simulated, real)}\n\n{mismatches(simulated, real)}\n\n{KNOWN}")
    if given.out:
        figure(simulated, real, given.out)
