"""boxes.py against shapely, closed forms, a published oracle file and a naive loop."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import boxes as B

F64 = torch.float64


def box(x=0.0, y=0.0, z=0.0, length=4.0, width=2.0, height=1.5, yaw=0.0) -> torch.Tensor:
    return torch.tensor([[x, y, z, length, width, height, yaw]], dtype=F64)


def random_boxes(n: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    columns = [rng.normal(0, spread, (n, 3)), rng.uniform(0.3, 6, (n, 3)), rng.uniform(-8, 8, (n, 1))]
    return torch.from_numpy(np.concatenate(columns, axis=1))


def shapely_overlaps(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """(N, M) intersection areas by another library, from corners computed here, not by boxes.py."""
    geometry = pytest.importorskip("shapely.geometry")
    affinity = pytest.importorskip("shapely.affinity")

    def polygon(row):
        x, y, _, length, width, _, yaw = row[:7]
        flat = geometry.box(-length / 2, -width / 2, length / 2, width / 2)
        return affinity.translate(affinity.rotate(flat, yaw, origin=(0, 0), use_radians=True), x, y)

    polygons_a, polygons_b = ([polygon(row) for row in rows.double().tolist()] for rows in (a, b))
    return np.array([[p.intersection(q).area for q in polygons_b] for p in polygons_a])


# ---- the convention


def test_corners_are_those_of_the_drawing():
    at_rest = B.corners(box(10, 20, 1, length=4, width=2, height=1.5))[0]
    front_left, rear_left, rear_right, front_right = [12, 21], [8, 21], [8, 19], [12, 19]
    around = [front_left, rear_left, rear_right, front_right]
    assert at_rest[:4, :2].tolist() == at_rest[4:, :2].tolist() == around
    assert at_rest[:, 2].tolist() == [0.25] * 4 + [1.75] * 4

    turned_left = B.corners_bev(box(length=4, width=2, yaw=math.pi / 2))[0]  # its front now looks to +y
    assert torch.allclose(turned_left, torch.tensor([[-1, 2], [-1, -2], [1, -2], [1, 2]], dtype=F64))


def test_columns_after_the_seventh_are_ignored():
    a, b, velocity = random_boxes(5, 0), random_boxes(6, 1), torch.full((6, 2), 9.0, dtype=F64)
    longer = torch.cat([b, velocity], dim=1)
    for function in (B.overlap_bev, B.iou_bev, B.iou_3d, B.points_in_boxes):
        assert torch.equal(function(a, longer), function(a, b)), function.__name__
    assert torch.equal(B.corners(longer), B.corners(b))
    assert torch.equal(B.nms(longer, torch.ones(6), 0.1), B.nms(b, torch.ones(6), 0.1))


ANGLES = [0.0, 1.0, -7.5, 99.0, math.pi, 3 * math.pi, -math.pi, math.nextafter(-math.pi, -4), -math.pi - 1e-9, -math.pi - 3e-7]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_wrap_angle(dtype):
    given_ = np.array(ANGLES, dtype=dtype)
    wrapped, again = B.wrap_angle(given_), B.wrap_angle(torch.from_numpy(given_))
    assert wrapped.dtype == given_.dtype and again.dtype == getattr(torch, dtype)
    pi = np.array(math.pi, dtype=dtype)
    for values in (wrapped, again.numpy()):
        assert ((values >= -pi) & (values < pi)).all()  # half open
        tolerance = 1e-5 if dtype == "float32" else 1e-12
        np.testing.assert_allclose(np.exp(1j * values), np.exp(1j * given_), atol=tolerance)
    assert B.wrap_angle(math.pi) == B.wrap_angle(-math.pi) == -math.pi and B.wrap_angle(1.5) == 1.5


# ---- overlap


def test_overlap_is_shapelys():
    a, b = random_boxes(70, 2), random_boxes(50, 3)
    expected = shapely_overlaps(a, b)
    assert (expected > 0).mean() > 0.2 and (expected == 0).mean() > 0.2  # both kinds are there
    np.testing.assert_allclose(B.overlap_bev(a, b).numpy(), expected, atol=1e-9)
    np.testing.assert_allclose(B.overlap_bev(a.float(), b.float()).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_boxes_that_do_not_meet_share_exactly_nothing(dtype):
    """Ground-truth pasting and NMS with threshold 0 ask for > 0; circumscribed circles may well cross."""
    shapely = pytest.importorskip("shapely")
    a, b = random_boxes(60, 10).to(dtype), random_boxes(60, 11).to(dtype)
    rings_a, rings_b = (shapely.polygons(B.corners_bev(rows.double()).numpy()) for rows in (a, b))
    apart = shapely.distance(rings_a[:, None], rings_b[None]) > 1e-4
    near = torch.hypot(*(a[:, None, :2] - b[None, :, :2]).unbind(-1)) < 3
    assert (apart & near.numpy()).sum() > 20
    assert (B.overlap_bev(a, b).numpy()[apart] == 0).all()
    assert (B.overlap_bev(a, b).numpy()[~apart] > 0).mean() > 0.99


@pytest.mark.parametrize("yaw", [0.0, 0.3, math.pi / 4, math.pi / 2, 2.0, math.pi, -2.7, 31.0])
def test_overlap_of_boxes_that_share_edges(yaw):
    """The cases that break kernels which sort intersection points. All moved and turned as one."""
    pairs = [  # (a, b, shared area), both along the axes
        (box(), box(), 8.0),  # identical
        (box(), box(yaw=math.pi), 8.0),  # turned half round
        (box(), box(yaw=math.pi / 2), 4.0),  # a cross: 2 x 2
        (box(length=2), box(length=2, yaw=-math.pi / 2), 4.0),  # a square on itself
        (box(length=2), box(length=2, yaw=math.pi / 4), 8 * (math.sqrt(2) - 1)),  # ... an octagon
        (box(), box(x=1), 6.0),  # two long edges shared
        (box(), box(x=1, length=2), 4.0),  # inside, three edges shared
        (box(), box(length=1, width=0.5, yaw=0.7), 0.5),  # wholly inside
        (box(), box(x=4), 0.0),  # touching in an edge
        (box(), box(x=4, y=2), 0.0),  # touching in a corner
        (box(), box(x=4, length=4 + 1e-12), 0.0),  # touching but for rounding
        (box(), box(x=2.5, length=2, width=1, yaw=math.pi / 4), None),  # pokes in with a corner
        (box(), box(x=50), 0.0),
    ]
    turn = torch.tensor([[math.cos(yaw), math.sin(yaw)], [-math.sin(yaw), math.cos(yaw)]], dtype=F64)
    for a, b, area in pairs:
        for row in (a, b):
            row[:, :2] = row[:, :2] @ turn + torch.tensor([33.3, -17.7], dtype=F64)
            row[:, 6] += yaw
        expected = shapely_overlaps(a, b).item() if area is None else area
        for one, other in ((a, b), (b, a)):
            for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
                area = B.overlap_bev(one.to(dtype), other.to(dtype)).item()
                assert area == pytest.approx(expected, abs=tolerance), (a, b)


def test_iou_of_an_oracle_file(golden):
    """Box pairs in KITTI's labels' own terms, with overlaps by shapely 2.0.7."""
    pairs = json.loads((golden / "kitti_eval" / "rotated_iou_pairs.json").read_text())["pairs"]

    def lidar(values):  # h, w, l, x, y, z, rotation_y: bottom centre, x right, y down, z forward
        h, w, l, x, y, z, ry = values  # noqa: E741
        return [z, -x, -(y - h / 2), l, w, h, -ry - math.pi / 2]

    a, b = (torch.tensor([lidar(pair[key]) for pair in pairs], dtype=F64) for key in "ab")
    assert len(pairs) > 350 and len({pair["kind"] for pair in pairs}) == 10
    for function, key in ((B.pair_iou_bev, "iou_bev"), (B.pair_iou_3d, "iou_3d")):
        expected = np.array([pair[key] for pair in pairs])
        np.testing.assert_allclose(function(a, b).numpy(), expected, atol=5e-8)  # stored with few digits
        np.testing.assert_allclose(function(a.float(), b.float()).numpy(), expected, atol=1e-4)


def test_iou_by_hand():
    a, b = box(length=4, width=2, height=2), box(x=1, z=1, length=4, width=2, height=2)
    assert B.iou_bev(a, b).item() == pytest.approx(6 / 10)
    assert B.iou_3d(a, b).item() == pytest.approx(6 / 26)  # 3 x 2 x 1 shared of 16 + 16
    assert B.iou_3d(a, box(z=2, height=2)).item() == 0  # stacked
    assert B.iou_3d(a, box(z=9)).item() == 0 and B.iou_bev(a, box(z=9)).item() > 0


def test_rounding_does_not_lift_an_iou_above_1():
    for dtype in (torch.float32, torch.float64):
        rows = random_boxes(500, 12, spread=50).to(dtype)
        turned = rows + torch.tensor([0, 0, 0, 0, 0, 0, math.pi], dtype=dtype)
        for iou in (B.pair_iou_bev, B.pair_iou_3d):
            assert (iou(rows, turned) <= 1).all() and (iou(rows, turned) > 0.9999).all()


def test_pairs_and_tables_agree_and_pieces_do_not_matter(monkeypatch):
    a, b = random_boxes(9, 4), random_boxes(7, 5)
    tables, pairs = (B.overlap_bev, B.iou_bev, B.iou_3d), (B.pair_overlap_bev, B.pair_iou_bev, B.pair_iou_3d)
    for table, pair in zip(tables, pairs):
        whole = table(a, b)
        assert whole.shape == (9, 7)
        assert torch.equal(pair(a[:7], b), whole.diagonal())
        with monkeypatch.context() as patch:
            patch.setattr(B, "PAIRS_AT_ONCE", 3)
            assert torch.equal(table(a, b), whole)


def test_boxes_without_size_overlap_nothing():
    no_area = [box(length=0), box(width=0), box(length=0, width=0), box(length=-4, width=-2)]
    flat = torch.cat([*no_area, box(height=0), box()])
    bev, volume = B.iou_bev(flat, flat), B.iou_3d(flat, flat)
    assert torch.isfinite(bev).all() and torch.isfinite(volume).all()
    assert (bev[:4] == 0).all() and (bev[:, :4] == 0).all()
    assert (bev[4:, 4:] == 1).all()  # height is none of BEV's business
    assert (volume[:5] == 0).all() and volume[5, 5] == 1
    assert not B.points_in_boxes(torch.zeros(1, 3, dtype=F64), flat)[:, :5].any()


def test_nothing_in_nothing_out():
    none, some, points = torch.zeros(0, 7), random_boxes(3, 6).float(), torch.zeros(5, 4)
    for function in (B.overlap_bev, B.iou_bev, B.iou_3d):
        assert function(none, some).shape == (0, 3) and function(some, none).shape == (3, 0)
        assert function(none, none).shape == (0, 0)
    assert B.points_in_boxes(points, none).shape == (5, 0)
    assert B.points_in_boxes(points[:0], some).shape == (0, 3)
    assert B.corners(none).shape == (0, 8, 3) and B.nms(none, torch.zeros(0), 0.5).shape == (0,)


def coordinates(limit: float):
    return st.floats(-limit, limit, allow_nan=False, width=32)


A_BOX = st.tuples(*[coordinates(3)] * 3, *[st.floats(0.125, 6, width=32)] * 3, coordinates(7))


@settings(max_examples=150, deadline=None)
@given(A_BOX, A_BOX, coordinates(60), coordinates(60), coordinates(4))
def test_iou_is_symmetric_and_does_not_care_where_the_pair_is(one, other, dx, dy, turn):
    a, b = torch.tensor([one], dtype=F64), torch.tensor([other], dtype=F64)
    cos, sin = math.cos(turn), math.sin(turn)

    def moved(row):
        x, y, z, *size, yaw = row[0].tolist()
        at = [cos * x - sin * y + dx, sin * x + cos * y + dy, z]
        return torch.tensor([[*at, *size, yaw + turn]], dtype=F64)

    for iou in (B.iou_bev, B.iou_3d):
        value = iou(a, b).item()
        assert 0 <= value <= 1
        assert iou(b, a).item() == pytest.approx(value, abs=1e-9)
        assert iou(moved(a), moved(b)).item() == pytest.approx(value, abs=1e-9)
        assert iou(a, a).item() == pytest.approx(1, abs=1e-9)
        b_backwards = b + torch.tensor([0, 0, 0, 0, 0, 0, math.pi], dtype=F64)
        assert iou(a, b_backwards).item() == pytest.approx(value, abs=1e-9)
    assert B.iou_3d(a, b).item() <= B.iou_bev(a, b).item() + 1e-9


# ---- points


def test_points_in_boxes_is_a_loops_answer():
    rng = np.random.default_rng(7)
    points, rows = torch.from_numpy(rng.uniform(-4, 4, (400, 4))), random_boxes(11, 8, spread=1)
    expected = np.zeros((400, 11), dtype=bool)
    for j, (x, y, z, length, width, height, yaw) in enumerate(rows.tolist()):
        for i, (px, py, pz, _) in enumerate(points.tolist()):
            along = complex(px - x, py - y) * complex(math.cos(yaw), -math.sin(yaw))
            offset = np.abs([along.real, along.imag, pz - z])
            expected[i, j] = (offset <= np.array([length, width, height]) / 2).all()
    assert 0.03 < expected.mean() < 0.5
    assert torch.equal(B.points_in_boxes(points, rows), torch.from_numpy(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_border_belongs_to_the_box(dtype):
    rows = random_boxes(200, 9, spread=30).to(dtype)
    corners = B.corners(rows)  # (N, 8, 3)
    centre, own = rows[:, None, :3], torch.arange(200)

    def contained(scale: float) -> torch.Tensor:
        points = centre + (corners - centre) * scale
        return B.points_in_boxes(points.reshape(-1, 3), rows).reshape(200, 8, 200)[own, :, own]

    assert contained(1.0).all() and contained(0.999).all()
    assert not contained(1.001).any()


def test_points_in_real_labelled_boxes(real_kitti):
    """Counts published with the frames: a wrong yaw, size order or centre changes them."""
    from data.kitti import Kitti

    for frame, name, count in (("000000", "Pedestrian", 377), ("000003", "Car", 674)):
        scan = Kitti(real_kitti, frames=[frame])[0]
        inside = B.points_in_boxes(torch.from_numpy(scan.points), torch.from_numpy(scan.boxes))
        assert dict(zip(scan.names, inside.sum(dim=0).tolist()))[name] == count


# ---- non-maximum suppression


def greedy(rows: torch.Tensor, scores: torch.Tensor, threshold: float) -> list[int]:
    """The textbook loop."""
    iou, kept = B.iou_bev(rows, rows), []
    for i in sorted(range(len(rows)), key=lambda i: (-scores[i].item(), i)):
        if all(iou[k, i] <= threshold for k in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.2, 0.7])
def test_nms_is_the_greedy_loop(threshold):
    for seed in range(5):
        rows = random_boxes(120, 20 + seed, spread=4)
        scores = torch.from_numpy(np.random.default_rng(seed).integers(0, 30, 120) / 30)  # many ties
        expected = greedy(rows, scores, threshold)
        assert B.nms(rows, scores, threshold).tolist() == expected
        assert B.nms(rows, scores, threshold, limit=7).tolist() == expected[:7]
        assert B.nms(rows.float(), scores.float(), threshold, limit=500).tolist() == expected


def test_a_suppressed_box_suppresses_nothing():
    row = torch.cat([box(x=1.5 * i, length=4) for i in range(40)])  # each overlaps the next two
    scores = torch.linspace(1, 0, 40)
    assert B.nms(row, scores, 0.4).tolist() == list(range(0, 40, 2))  # neighbours: 2.5 / 5.5 = 0.45
    assert B.nms(row, scores.flip(0), 0.4).tolist() == list(range(39, 0, -2))


def test_nms_keeps_the_first_of_equals_and_falls_by_score():
    rows = torch.cat([box(), box(), box(x=30), box(x=30)])
    assert B.nms(rows, torch.tensor([0.5, 0.5, 0.9, 0.9]), 0.5).tolist() == [2, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_gives_the_same():
    a, b = random_boxes(300, 30), random_boxes(200, 31)
    scores = torch.linspace(0, 1, 300)
    for function in (B.overlap_bev, B.iou_bev, B.iou_3d, B.points_in_boxes):
        here, there = function(a, b), function(a.cuda(), b.cuda())
        assert torch.allclose(there.cpu().double(), here.double(), atol=1e-9)
    assert torch.equal(B.nms(a.cuda(), scores.cuda(), 0.2).cpu(), B.nms(a, scores, 0.2))


@pytest.mark.parametrize("squared", [0.0, 0.175, 4.0, 12.0])
def test_circle_nms_is_the_greedy_loop_over_squared_distances(squared):
    rng = np.random.default_rng(3)
    rows = random_boxes(150, 5, spread=5)
    rows[:, :2] = (rows[:, :2] * 2).round() / 2  # distances that meet the limit exactly, and equal centres
    scores = torch.from_numpy(rng.integers(0, 30, 150) / 30)
    kept = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if all(float((rows[i, 0] - rows[k, 0]) ** 2 + (rows[i, 1] - rows[k, 1]) ** 2) > squared for k in kept):
            kept.append(i)
    assert B.circle_nms(rows, scores, squared).tolist() == kept
    assert B.circle_nms(rows, scores, squared, limit=9).tolist() == kept[:9]
    assert 1 < len(kept) < 150
    assert B.circle_nms(rows[:0], scores[:0], squared).shape == (0,)
