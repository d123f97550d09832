r"""Boxes: the one convention of this project, and the geometry on it.   (after config.py; next voxelize.py)

A box is a row (x, y, z, length, width, height, yaw[, vx, vy]) in the LiDAR frame: metres, radians, (x, y, z)
the CENTRE of the box. Length lies along the box's own forward axis; yaw turns that axis counter-clockwise
from +x. Data sets convert when they read (KITTI's files store the bottom centre in a camera frame), writers
when they write.

    seen from above (bird's-eye view, BEV)     seen from its right side           yaw, seen from above

              x forward                         z up                               \      x
              ^                                 ^                                   \     ^
              |       front                     |      6 --------- 7          front  \    |
              |     0 ----- 3                   |      |           |                  \yaw|
              |     |       |                   | rear |     +     | front             \  |
              |     |   +   | length            |      |           |                    \ |
              |     |       |                   |      2 --------- 3           y <-------\+
              |     1 ----- 2                   |        length
    y left <--+       width                     +-----------> x forward        here yaw = +0.5 (29 degrees)

    0..3: the corners of the bottom, counter-clockwise from the front left; 4..7: those above them

dims: N, M boxes · P points · K pairs. Functions called `pair_...` take any shapes (..., 7) that broadcast:
two (K, 7) give K numbers, and iou_bev(a, b) is nothing but pair_iou_bev(a[:, None], b[None]), (N, M). Columns
after the seventh (velocity) are ignored. Everything runs in the dtype and on the device of its arguments.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

PAIRS_AT_ONCE = 1 << 19  # clipping needs some 150 numbers a pair: 300 MB in float32
BLOCK = 128  # boxes that non-maximum suppression settles at a time


def wrap_angle(angle):
    """The same angle in [-pi, pi). Takes a tensor, a numpy array or a float."""
    angle = (angle + math.pi) % (2 * math.pi) - math.pi
    return angle - 2 * angle * (angle >= math.pi)  # just under -pi, `%` rounds up to 2 pi: that is -pi again


def corners_bev(boxes: Tensor) -> Tensor:
    """(N, >=7) boxes -> (N, 4, 2): x, y of the corners 0..3 of the drawing, counter-clockwise."""
    along = boxes.new_tensor([1, -1, -1, 1]) * boxes[:, 3:4] / 2  # (N, 4), + to the front
    across = boxes.new_tensor([1, 1, -1, -1]) * boxes[:, 4:5] / 2  # (N, 4), + to the left
    cos, sin = boxes[:, 6:7].cos(), boxes[:, 6:7].sin()
    x = boxes[:, 0:1] + along * cos - across * sin
    y = boxes[:, 1:2] + along * sin + across * cos
    return torch.stack([x, y], dim=-1)


def corners(boxes: Tensor) -> Tensor:
    """(N, >=7) boxes -> (N, 8, 3): x, y, z of the corners 0..7 of the drawing."""
    xy = corners_bev(boxes).repeat(1, 2, 1)  # (N, 8, 2)
    up = boxes.new_tensor([-1] * 4 + [1] * 4)
    z = boxes[:, 2:3] + up * boxes[:, 5:6] / 2  # (N, 8)
    return torch.cat([xy, z[..., None]], dim=-1)


def points_in_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """(P, >=3) points, (N, >=7) boxes -> (P, N) bool: the point lies in the box, its border included."""
    return point_in_box(points[:, None], boxes)


def point_in_box(points: Tensor, boxes: Tensor) -> Tensor:
    """(..., >=3) points, (..., >=7) boxes -> (...) bool: each point in its own box; the shapes are broadcast."""
    # A border met exactly needs an allowance for rounding: a few units in the last place of a coordinate of
    # 100 m (0.05 mm in float32), far below what a LiDAR resolves.
    border = 4 * 100 * torch.finfo(boxes.dtype).eps
    cos, sin = boxes[..., 6].cos(), boxes[..., 6].sin()
    dx, dy = points[..., 0] - boxes[..., 0], points[..., 1] - boxes[..., 1]
    inside = (dx * cos + dy * sin).abs() <= boxes[..., 3] / 2 + border  # along the box
    inside &= (dy * cos - dx * sin).abs() <= boxes[..., 4] / 2 + border  # across it
    inside &= (points[..., 2] - boxes[..., 2]).abs() <= boxes[..., 5] / 2 + border
    return inside & (boxes[..., 3:6] > 0).all(dim=-1)  # a box without volume holds nothing


def _clip_area(a: Tensor, b: Tensor) -> Tensor:
    """(K, 7), (K, 7) -> (K,): area of the intersection of two rotated rectangles.

    In b's own frame b is |x| <= l/2, |y| <= w/2. Walk once around a, and push every point of the way that
    lies outside b straight onto b's border (clamp x, clamp y). The pushed way is a closed polygon around
    exactly the intersection (parts along the border enclose nothing); the shoelace formula gives its area.

    Why not collect the corners of the intersection and sort them, as many kernels do: where an edge lies on
    an edge (a box and itself!) corners appear or vanish with rounding, and the area is off by any amount.
    Here is no decision to get wrong: clamping is continuous, so rounding by 1e-16 moves the area by 1e-16.
    """
    cos, sin = b[:, 6].cos(), b[:, 6].sin()
    dx, dy = a[:, 0] - b[:, 0], a[:, 1] - b[:, 1]
    in_b = torch.stack([dx * cos + dy * sin, dy * cos - dx * sin, a[:, 3], a[:, 4], a[:, 6] - b[:, 6]], dim=1)
    start = corners_bev(in_b[:, [0, 1, 1, 2, 3, 3, 4]])  # (K, 4, 2); columns 2 and 5 (z, height) are not read
    step = start.roll(-1, dims=1) - start  # the four edges of a: start + t * step, 0 <= t <= 1
    half = b[:, None, 3:5] / 2

    # The t at which an edge crosses the lines x = -l/2, x = l/2 and y = -w/2, y = w/2. Of an edge parallel to
    # them it is infinite, or nan (0/0) if it lies on one: then any t is right.
    crossing = torch.stack([-half - start, half - start], dim=-1) / step[..., None]  # (K, 4, 2 axes, 2 lines)
    crossing = crossing.nan_to_num(nan=0.0).clamp(0, 1).sort(dim=-1).values
    t_x, t_y = crossing[:, :, 0], crossing[:, :, 1]  # (K, 4, 2)
    first, last = t_x[..., :1], t_x[..., 1:]  # before and after, clamped x stands still: no area below it
    t = torch.cat([first, t_y.clamp(first, last), last], dim=-1)  # (K, 4, 4): the pushed way's bends

    x = (start[..., :1] + t * step[..., :1]).clamp(-half[..., :1], half[..., :1])
    y = (start[..., 1:] + t * step[..., 1:]).clamp(-half[..., 1:], half[..., 1:])
    trapezoids = (y[..., :-1] + y[..., 1:]) / 2 * (x[..., :-1] - x[..., 1:])  # + going back, - going forward
    area = trapezoids.sum(dim=(1, 2))
    # Of boxes that do not meet, rounding leaves not quite 0. What it can make at most counts as nothing, so
    # that "do they overlap at all?" (> 0) has an answer. In float32, for two cars, that is 0.15 cm^2.
    rounding = torch.finfo(area.dtype).eps * (a[:, 3] + a[:, 4] + b[:, 3] + b[:, 4]).square()
    return area.where(area > rounding, 0)


def _may_overlap(a: Tensor, b: Tensor) -> Tensor:
    """Cheap first look at (..., 7) x (..., 7): the circumscribed circles meet, and each box has an area."""

    def radius(box: Tensor) -> Tensor:  # a flat box gets -inf, so that it meets nothing
        half_diagonal = torch.hypot(box[..., 3], box[..., 4]) / 2
        return half_diagonal.where((box[..., 3:5] > 0).all(dim=-1), -torch.inf)

    return torch.hypot(a[..., 0] - b[..., 0], a[..., 1] - b[..., 1]) < radius(a) + radius(b)


def pair_overlap_bev(a: Tensor, b: Tensor) -> Tensor:
    """Area, in m^2, that two boxes share seen from above; (..., >=7) x (..., >=7), broadcast -> (...)."""
    near = _may_overlap(a, b)  # most pairs of a scene are far apart; only the others are clipped
    area = torch.zeros_like(near, dtype=a.dtype)
    a, b = (box[..., :7].expand(*near.shape, 7)[near] for box in (a, b))  # (K, 7) each
    pieces = zip(a.split(PAIRS_AT_ONCE), b.split(PAIRS_AT_ONCE), strict=True)
    area[near] = torch.cat([_clip_area(*piece) for piece in pieces])
    return area


def _ratio(intersection: Tensor, size_a: Tensor, size_b: Tensor) -> Tensor:
    """Intersection over union, 0 where there is no intersection (so also of two empty boxes)."""
    return torch.where(intersection > 0, intersection / (size_a + size_b - intersection), 0).clamp(max=1)


def pair_iou_bev(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union seen from above; (..., >=7) x (..., >=7), broadcast -> (...)."""
    return _ratio(pair_overlap_bev(a, b), a[..., 3] * a[..., 4], b[..., 3] * b[..., 4])


def pair_iou_3d(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of the volumes; (..., >=7) x (..., >=7), broadcast -> (...)."""
    top = torch.minimum(a[..., 2] + a[..., 5] / 2, b[..., 2] + b[..., 5] / 2)
    bottom = torch.maximum(a[..., 2] - a[..., 5] / 2, b[..., 2] - b[..., 5] / 2)
    shared = pair_overlap_bev(a, b) * (top - bottom).clamp(min=0)
    return _ratio(shared, a[..., 3:6].prod(dim=-1), b[..., 3:6].prod(dim=-1))


def overlap_bev(a: Tensor, b: Tensor) -> Tensor:
    """(N, >=7), (M, >=7) -> (N, M): area, in m^2, that every a shares with every b seen from above."""
    return pair_overlap_bev(a[:, None], b[None])


def iou_bev(a: Tensor, b: Tensor) -> Tensor:
    """(N, >=7), (M, >=7) -> (N, M): intersection over union seen from above."""
    return pair_iou_bev(a[:, None], b[None])


def iou_3d(a: Tensor, b: Tensor) -> Tensor:
    """(N, >=7), (M, >=7) -> (N, M): intersection over union of the volumes."""
    return pair_iou_3d(a[:, None], b[None])


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, limit: int | None = None) -> Tensor:
    """Non-maximum suppression: of boxes that overlap, keep the one with the highest score.

    (N, >=7) boxes, (N,) scores -> indices of the kept boxes by falling score (of equal scores the first comes
    first), at most `limit` of them. A box goes if its BEV IoU with a kept one before it is > `iou_threshold`.
    """
    return _best_first(scores, lambda i, j: iou_bev(boxes[i], boxes[j]) > iou_threshold, limit)


def circle_nms(boxes: Tensor, scores: Tensor, squared_distance: float, limit: int | None = None) -> Tensor:
    """`nms` by the distance of the centres instead of overlap: a box goes if the SQUARE of its distance from a kept one
    before it, seen from above, is <= `squared_distance`, in m^2 (det3d's "min_radius" is compared so)."""
    x, y = boxes[:, :2].unbind(1)

    def too_close(i: Tensor, j: Tensor) -> Tensor:
        return (x[i, None] - x[j]).square() + (y[i, None] - y[j]).square() <= squared_distance

    return _best_first(scores, too_close, limit)


def _best_first(scores: Tensor, too_close: Callable[[Tensor, Tensor], Tensor], limit: int | None) -> Tensor:
    """The rule of both: too_close(i, j) says, (len(i), len(j)) bool, which of the boxes i remove which of the boxes j.

    A block of the best boxes at a time: they are settled among themselves, then remove what they can of all others.
    """
    left, kept = scores.argsort(descending=True, stable=True), []
    while len(left) and (limit is None or sum(map(len, kept)) < limit):
        block, left = left[:BLOCK], left[BLOCK:]
        block = block[_survivors(too_close(block, block).triu(diagonal=1))]
        left = left[~too_close(block, left).any(dim=0)]
        kept.append(block)
    return torch.cat([left[:0], *kept])[:limit]


def _survivors(removes: Tensor) -> Tensor:
    """(n,) bool: who is left when each KEPT box i removes the boxes j > i where removes[i, j], (n, n) bool.

    The rule is circular: start with all boxes kept and apply it until nothing changes. Round k settles at least the k
    best, so this ends, with the same result as the usual one-by-one loop; in practice after a few rounds.
    """
    kept, before = torch.ones(len(removes), dtype=torch.bool, device=removes.device), None
    while before is None or not torch.equal(kept, before):
        before, kept = kept, ~(removes & kept[:, None]).any(dim=0)
    return kept
