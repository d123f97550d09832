"""Rotated boxes: IoU and non-maximum suppression, against shapely and plain loops.   (subject: boxes.py)

    python -m benchmarks.boxes

IoU of 1000 x 1000 boxes, and NMS of 4096, on a scene (boxes strewn over 70 x 80 m) and on what an untrained detector gives (many
boxes on top of each other). shapely: its vectorised `intersection` and `area` on all pairs, polygons made beforehand, and the
loop over pairs, of which some rows are run and the time scaled to all. numpy: a plain loop that clips polygons (Sutherland,
Hodgman 1974), of some pairs, scaled too. The notes state the largest difference of an IoU: ours in float64 must be within
1e-5. NMS in shapely or numpy: the usual loop, best box first, over the same IoUs. Ours runs in float32, as detectors do.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks import Row, compare, run
from boxes import corners_bev, iou_bev, nms
from cli import run_cli

PLAIN = 4_000  # pairs of a plain loop that are really run


def scene(n: int, seed: int) -> Tensor:
    """(n, 7) cars strewn over 70 x 80 m."""
    rng = np.random.default_rng(seed)
    place, size = rng.uniform((0, -40, -2), (70, 40, 0), (n, 3)), rng.normal((4, 1.7, 1.5), 0.2, (n, 3))
    yaw = rng.uniform(-3, 3, (n, 1))
    return torch.from_numpy(np.hstack([place, size, yaw]))


def heap(n: int, seed: int) -> Tensor:
    """(n, 7) boxes of an untrained detector: around 40 places, n / 40 on each, within a metre or so."""
    rng = np.random.default_rng(seed)
    boxes = scene(40, seed).numpy()[rng.integers(0, 40, n)]
    return torch.from_numpy(boxes + rng.normal(0, (1, 1, 0.3, 0.3, 0.1, 0.1, 0.8), (n, 7)))


def clip(subject: np.ndarray, window: np.ndarray) -> float:
    """Area of the intersection of two convex polygons (4, 2), counter-clockwise, edge after edge of the window."""
    points = list(subject)
    for a, b in zip(window, np.roll(window, -1, 0), strict=True):
        side = [(b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0]) for p in points]
        kept = []
        for i, p in enumerate(points):
            if side[i - 1] * side[i] < 0:  # the edge from the point before crosses the line
                kept.append(points[i - 1] + (p - points[i - 1]) * side[i - 1] / (side[i - 1] - side[i]))
            if side[i] >= 0:
                kept.append(p)
        points = kept
    x, y = np.array(points).reshape(-1, 2).T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def some_pairs(n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, n, PLAIN), rng.integers(0, m, PLAIN)


def numpy_loop(a: Tensor, b: Tensor) -> np.ndarray:
    """IoU of `some_pairs`, one after the other."""
    i, j = some_pairs(len(a), len(b))
    corners_a, corners_b = corners_bev(a).numpy(), corners_bev(b).numpy()
    area_a, area_b = (a[:, 3] * a[:, 4]).numpy(), (b[:, 3] * b[:, 4]).numpy()
    shared = np.array([clip(corners_a[p], corners_b[q]) for p, q in zip(i, j, strict=True)])
    return shared / (area_a[i] + area_b[j] - shared)


def shapely_loop(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The same, of polygons."""
    found = []
    for i, j in zip(*some_pairs(len(a), len(b)), strict=True):
        shared = a[i].intersection(b[j]).area
        found.append(shared / (a[i].area + b[j].area - shared))
    return np.array(found)


def shapely_all(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N,), (M,) polygons -> (N, M) IoU, vectorised."""
    import shapely

    shared = shapely.area(shapely.intersection(a[:, None], b[None]))
    return shared / (shapely.area(a)[:, None] + shapely.area(b)[None] - shared)


def loop_nms(iou_with_rest: Callable[[int, np.ndarray], np.ndarray], scores: np.ndarray, threshold: float) -> np.ndarray:
    """The usual loop: the best box left is kept, those it overlaps go."""
    left, kept = np.argsort(-scores, kind="stable"), []
    while len(left):
        kept.append(left[0])
        left = left[1:][iou_with_rest(left[0], left[1:]) <= threshold]
    return np.array(kept)


def scaled(row: Row, share: float) -> Row:
    """A row whose peer ran on a share of the work."""
    return Row(**vars(row) | {"theirs": row.theirs / share, "ratio": row.ratio / share})


def rows(repeats: int) -> Iterator[Row]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        import shapely
    except ImportError:
        shapely = None
    for name, make in (("scene", scene), ("heap", heap)):
        a, b = make(1000, 1), make(1000, 1 if name == "heap" else 2)
        ours, exact = partial(iou_bev, a.float(), b.float()), iou_bev(a, b).numpy()
        case, share = f"1000 x 1000 IoU, {name}, 1 thread", PLAIN / 1e6
        i, j = some_pairs(1000, 1000)
        note = f"same to {np.abs(numpy_loop(a, b) - exact[i, j]).max():.0e}; {PLAIN:,} pairs run, scaled to all"
        yield scaled(compare("boxes", case, ours, "numpy loop", partial(numpy_loop, a, b), 20, repeats, note), share)
        if shapely:
            polygons = [shapely.polygons(corners_bev(boxes).numpy()) for boxes in (a, b)]
            yield scaled(compare("boxes", case, ours, "shapely loop", partial(shapely_loop, *polygons), 20, repeats,
                                 note=f"{PLAIN:,} pairs run, scaled to all"), share)  # fmt: skip
            note = f"same to {np.abs(shapely_all(*polygons) - exact).max():.0e}, {(exact > 0).mean():.0%} of the pairs overlap"
            yield compare("boxes", case, ours, "shapely vectorised", partial(shapely_all, *polygons), 20, repeats, note)
        boxes, scores = make(4096, 3), np.random.default_rng(4).random(4096)
        ours = partial(nms, boxes.float(), torch.from_numpy(scores), 0.1)
        case = f"NMS of 4096, {name}, 1 thread"
        if shapely:
            polygons = shapely.polygons(corners_bev(boxes).numpy())
            area = shapely.area(polygons)

            def iou(i: int, rest: np.ndarray, polygons: np.ndarray = polygons, area: np.ndarray = area) -> np.ndarray:
                shared = shapely.area(shapely.intersection(polygons[i], polygons[rest]))
                return shared / (area[i] + area[rest] - shared)

            theirs = partial(loop_nms, iou, scores, 0.1)
            kept = nms(boxes, torch.from_numpy(scores), 0.1).numpy()
            note = f"{len(kept)} kept, {'the same' if np.array_equal(kept, theirs()) else 'NOT THE SAME'}"
            yield compare("boxes", case, ours, "shapely vectorised", theirs, 20, repeats, note)
        else:
            yield Row("boxes", case, None, note="shapely is not installed")
    torch.set_num_threads(before)


if __name__ == "__main__":
    run_cli(lambda: run(rows, __doc__))
