"""The anchor head: assignment, codes, losses and decoding against plain loops and the reference's own numbers."""

import json
import math
import runpy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import anchors as A
from anchors import AnchorHead
from config import ANCHORS
from heads import Geometry, gaussian_radius
from tests.scenes import tiny_config

G = Geometry(0.0, -4.8, 0.8, 0.8)
H, W = 12, 8  # cells of tiny_config's range
BOXES = torch.tensor([[2.1, -2.0, -1.0, 3.9, 1.6, 1.5, 0.7], [5.0, 3.3, -0.8, 0.8, 0.6, 1.7, -2.9],
                      [1.0, 4.0, -0.9, 1.8, 0.6, 1.7, 3.1]])  # fmt: skip
LABELS = torch.tensor([0, 1, 2])


@pytest.fixture()
def head() -> AnchorHead:
    torch.manual_seed(0)
    return AnchorHead(tiny_config(), 16, G)


def to_map(per_anchor: Tensor, height: int, width: int) -> Tensor:
    """(B, n, c) -> (B, 6*c, H, W), written out cell by cell: the inverse of AnchorHead.per_anchor."""
    batch, _, c = per_anchor.shape
    out = torch.zeros(batch, 6 * c, height, width)
    for y in range(height):
        for x in range(width):
            first = (y * width + x) * 6
            out[:, :, y, x] = per_anchor[:, first : first + 6].reshape(batch, 6 * c)
    return out


def perfect_maps(target: A.Targets, height: int = H, width: int = W) -> list[dict[str, Tensor]]:
    """The maps that a perfect head would give for these targets."""
    batch, n = target.labels.shape
    cls, box, front = torch.full((batch, n, 3), -12.0), torch.zeros(batch, n, 7), torch.zeros(batch, n, 2)
    for row, (b, a) in enumerate(target.positive.tolist()):
        cls[b, a, target.labels[b, a] - 1] = 12.0
        box[b, a] = target.code[row]
        front[b, a, target.bin[row]] = 20.0
    return [{"cls": to_map(cls, height, width), "box": to_map(box, height, width),
             "direction": to_map(front, height, width)}]  # fmt: skip


# ------------------------------------------------------------------ anchors


def test_anchors_equal_a_plain_loop(head):
    expected = []
    for y in range(H):
        for x in range(W):
            for length, width, height, bottom, *_ in ANCHORS:
                for yaw in (0, 1.57):
                    place = [6.4 * x / (W - 1), -4.8 + 9.6 * y / (H - 1), bottom + height / 2]
                    expected.append([*place, length, width, height, yaw])
    torch.testing.assert_close(head.anchors(H, W, "cpu"), torch.tensor(expected))


def test_layers_start_as_published(head):
    shapes = {name: tuple(p.shape) for name, p in head.state_dict().items()}
    assert shapes == {"cls.weight": (18, 16, 1, 1), "cls.bias": (18,), "box.weight": (42, 16, 1, 1), "box.bias": (42,),
                      "direction.weight": (12, 16, 1, 1), "direction.bias": (12,)}  # fmt: skip
    assert head.cls.bias.sigmoid().tolist() == pytest.approx([0.01] * 18)
    assert float(head.box.weight.detach().std()) == pytest.approx(0.001, rel=0.1)
    parameters = sum(p.numel() for p in AnchorHead(tiny_config(), 512, G).parameters())
    assert parameters == 36936  # SECOND's head


def test_channels_are_anchor_first(head):
    with torch.no_grad():
        for name, each in (("cls", 3), ("box", 7), ("direction", 2)):
            layer = getattr(head, name)
            layer.weight.zero_()
            layer.bias.copy_(torch.arange(float(6 * each)))
            rows = head.per_anchor(head(torch.zeros(1, 16, H, W))[0][name])
            assert rows.shape == (1, H * W * 6, each)
            assert rows[0, 6 * 5 + 4].tolist() == [4 * each + c for c in range(each)]
    neck = torch.randn(2, 16, H, W)
    maps = head(neck)
    assert torch.equal(head.class_logits(maps), maps[0]["cls"]) and torch.equal(head.regression(maps), maps[0]["box"])
    place = torch.zeros(1, 6, H, W)
    place[0, :] = torch.arange(float(H * W)).view(H, W)
    assert head.per_anchor(place)[0, :, 0].tolist() == [n // 6 for n in range(H * W * 6)]  # cells row by row


# ------------------------------------------------------------------ which anchor stands for which object


def iou_loop(a: list[float], b: list[float]) -> float:
    """IoU of two boxes turned to the nearest axis; every number a Python float."""

    def sides(box):
        turned = abs((box[6] + math.pi / 2) % math.pi - math.pi / 2) >= math.pi / 4
        return (box[4], box[3]) if turned else (box[3], box[4])

    shared = 1.0
    for axis in range(2):
        p, q = sides(a)[axis], sides(b)[axis]
        shared *= max(0.0, min(a[axis] + p / 2, b[axis] + q / 2) - max(a[axis] - p / 2, b[axis] - q / 2))
    sizes = [box[3] * box[4] for box in (a, b)]
    return shared / max(sum(sizes) - shared, 1e-6)


def match_loop(anchors, boxes, matched, unmatched):
    """The rule of SECOND, one anchor at a time. 1e-9: two overlaps that differ by rounding only are tied."""
    table = [[iou_loop(a, b) for b in boxes] for a in anchors]
    best_of_box = [max(row[m] for row in table) for m in range(len(boxes))]
    kinds, which = [], []
    for row in table:
        top = max(row, default=0.0)
        which.append(next((m for m, value in enumerate(row) if value > top - 1e-9), 0))
        forced = any(best > 0 and value > best - 1e-9 for value, best in zip(row, best_of_box, strict=True))
        kinds.append(1 if forced or (boxes and top >= matched) else 0 if top < unmatched else -1)
    return kinds, which


def eighths(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-24, 25, shape, generator=generator) / 8


@pytest.mark.parametrize("seed", range(6))
def test_matching_equals_a_plain_loop_with_ties(seed):
    """Every length is a multiple of 1/8 and every box snaps to an axis: float32 rounds no overlap, ties are exact."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(-3, 3.5, 0.5), torch.arange(-3, 3.5, 0.5), indexing="ij")
    anchors = torch.zeros(*x.shape, 2, 7)
    anchors[..., 0], anchors[..., 1], anchors[..., 3:6] = x[..., None], y[..., None], torch.tensor([2.0, 1.0, 1.5])
    anchors[..., 1, 6] = 1.57
    anchors = anchors.view(-1, 7)
    boxes = torch.zeros(seed * 2, 7)
    boxes[:, :2] = eighths(g, len(boxes), 2).mul(2).round() / 2  # some exactly between cells: ties
    boxes[:, 3:6] = eighths(g, len(boxes), 3).abs() + 0.5
    turns = torch.randint(-9, 9, (len(boxes),), generator=g)
    boxes[:, 6] = turns * math.pi / 2 + torch.rand(len(boxes), generator=g) - 0.5  # snaps to the turn
    if len(boxes) > 4:
        boxes[1] = boxes[0]  # the same box twice: the first is taken
        boxes[2, 0] = 40.0  # far outside
        boxes[3, 3:5] = 0.125  # smaller than any threshold: only forced anchors
        boxes[4, 3] = 0.0  # no area
    kind, which = A.match(anchors, boxes, 0.6, 0.45)
    expected_kind, expected_which = match_loop(anchors.tolist(), boxes.tolist(), 0.6, 0.45)
    assert kind.tolist() == expected_kind
    positive = kind > 0
    assert which[positive].tolist() == torch.tensor(expected_which)[positive].tolist()
    if len(boxes) > 4:
        assert positive.any() and not (which[positive] == 2).any()


def test_matching_in_pieces_is_matching_at_once(monkeypatch, head):
    boxes = BOXES[torch.arange(11) % 3] + torch.linspace(0, 1, 11)[:, None]
    once = A.match(head.anchors(H, W), boxes, 0.5, 0.35)
    monkeypatch.setattr(A, "BOXES_AT_ONCE", 3)
    for a, b in zip(once, A.match(head.anchors(H, W), boxes, 0.5, 0.35), strict=True):
        assert torch.equal(a, b)


def test_a_forced_anchor_takes_the_box_it_overlaps_most():
    """A small box is best met by an anchor that a larger box covers better: forced by one, given to the other."""
    anchor = torch.tensor([[0.0, 0, 0, 4, 2, 1, 0]])
    small, large = [1.5, 0, 0, 0.5, 0.5, 1, 0], [0.5, 0, 0, 4, 2, 1, 0.0]
    kind, which = A.match(anchor, torch.tensor([small, large]), 0.99, 0.98)
    assert kind.tolist() == [1] and which.tolist() == [1]


def test_targets_match_each_class_by_itself_scan_by_scan(head):
    """Two scans and an empty one, against match_loop on every class's own anchors.

    No box is so large that two anchors lie inside it: float32's rounding decides such a tie (the reference's too).
    """
    g = torch.Generator().manual_seed(3)
    far = BOXES.clone()
    far[:, 0] += 500
    boxes = [torch.cat([BOXES + torch.rand(3, 7, generator=g) / 10, far, BOXES]), BOXES[:0], BOXES[1:2]]
    labels = [torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 0]), LABELS[:0], LABELS[1:2]]
    target = head.targets(boxes, labels, H, W)
    anchors = head.anchors(H, W)
    rows = []
    for b in range(3):
        for k, (*_, matched, unmatched) in enumerate(ANCHORS):
            own = [n for n in range(H * W * 6) if n // 2 % 3 == k]
            members = (labels[b] == k).nonzero()[:, 0].tolist()
            kind, which = match_loop(anchors[own].tolist(), boxes[b][members].tolist(), matched, unmatched)
            assert target.labels[b, own].tolist() == [k + 1 if s == 1 else s for s in kind]
            rows += [(b, n, members[m]) for n, s, m in zip(own, kind, which, strict=True) if s == 1]
    rows.sort()
    assert target.positive.tolist() == [[b, n] for b, n, _ in rows] and len(rows) >= 5
    assert (target.labels[0] == -1).any()
    assert (target.labels[1] == 0).all()
    for (b, n, m), code, half in zip(rows, target.code.tolist(), target.bin.tolist(), strict=True):
        box, a = boxes[b][m].tolist(), anchors[n].tolist()
        d = math.hypot(a[3], a[4])
        assert code == pytest.approx(
            [(box[0] - a[0]) / d, (box[1] - a[1]) / d, (box[2] - a[2]) / a[5],
             *(math.log(box[i] / a[i]) for i in (3, 4, 5)), box[6] - a[6]], abs=1e-5)  # fmt: skip
        assert half == ((box[6] - 0.78539) % (2 * math.pi) >= math.pi)


# ------------------------------------------------------------------ codes


def test_decode_inverts_encode_at_all_angles():
    g = torch.Generator().manual_seed(4)
    yaw = torch.arange(-9.0, 9.0, 0.01)
    boxes = torch.cat([torch.randn(len(yaw), 3, generator=g) * 20, torch.rand(len(yaw), 3, generator=g) * 5 + 0.1,
                       yaw[:, None]], dim=1)  # fmt: skip
    for rotation in A.ROTATIONS:
        anchors = torch.tensor([[3.0, -4.0, -1.0, 3.9, 1.6, 1.56, rotation]]).expand_as(boxes)
        codes = A.encode_boxes(boxes, anchors)
        back = A.decode_boxes(codes, anchors, A.direction_bin(yaw))
        torch.testing.assert_close(back[:, :6], boxes[:, :6], atol=2e-5, rtol=1e-5)
        assert (back[:, 6] >= A.FRONT - 1e-4).all() and (back[:, 6] < A.FRONT + 2 * math.pi + 1e-4).all()
        assert ((back[:, 6] - yaw).cos() > 1 - 1e-5).all()
        codes[:, 6] += math.pi  # the sine loss cannot tell: the bin alone says which end is the front
        assert ((A.decode_boxes(codes, anchors, A.direction_bin(yaw))[:, 6] - yaw).cos() > 1 - 1e-5).all()
        other = A.decode_boxes(codes, anchors, 1 - A.direction_bin(yaw))
        assert ((other[:, 6] - yaw).cos() < -1 + 1e-5).all()


def test_direction_bins_are_half_turns_from_45_degrees():
    degrees = torch.tensor([46.0, 180, 224, 226, 0, 44, -134, -136, 360 + 46, -360 + 44])
    assert A.direction_bin(degrees.deg2rad()).tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 0, 1]
    assert A.direction_bin(torch.tensor([A.FRONT - 1e-7, A.FRONT, A.FRONT + 2 * math.pi])).max() <= 1


# ------------------------------------------------------------------ losses


def loss_loop(head, maps, target):
    """The three losses one anchor at a time, as Python floats."""
    total = {"cls": 0.0, "reg": 0.0, "dir": 0.0}
    batch, n = target.labels.shape
    row_of = {tuple(place): row for row, place in enumerate(target.positive.tolist())}
    for b in range(batch):
        count = max(1, int((target.labels[b] > 0).sum()))
        for anchor in range(n):
            label = int(target.labels[b, anchor])
            cell, a = divmod(anchor, 6)
            y, x = divmod(cell, W)
            cls, box, front = (maps[0][name][b, a * c : (a + 1) * c, y, x].tolist()
                               for name, c in (("cls", 3), ("box", 7), ("direction", 2)))  # fmt: skip
            if label >= 0:
                for k, logit in enumerate(cls):
                    p = 1 / (1 + math.exp(-logit))
                    value = -0.25 * (1 - p) ** 2 * math.log(p) if label == k + 1 else -0.75 * p**2 * math.log(1 - p)
                    total["cls"] += value / count / batch
            if label > 0:
                code = target.code[row_of[b, anchor]].tolist()
                for i in range(7):
                    d = abs(math.sin(box[6] - code[6]) if i == 6 else box[i] - code[i])
                    total["reg"] += 2.0 * (4.5 * d * d if d < 1 / 9 else d - 1 / 18) / count / batch
                half = int(target.bin[row_of[b, anchor]])
                total["dir"] += 0.2 * (math.log(sum(map(math.exp, front))) - front[half]) / count / batch
    return total


def random_maps(head, seed):
    g = torch.Generator().manual_seed(seed)
    return [{name: torch.randn(3, 6 * c, H, W, generator=g).requires_grad_() for name, c in
             (("cls", 3), ("box", 7), ("direction", 2))}]  # fmt: skip


SCANS = [BOXES, BOXES[:0], BOXES[:2]], [LABELS, LABELS[:0], LABELS[:2]]


def test_losses_equal_a_plain_loop(head):
    maps = random_maps(head, 5)
    got = {name: float(value.detach()) for name, value in head.loss(maps, *SCANS).items()}
    assert got == pytest.approx(loss_loop(head, maps, head.targets(*SCANS, H, W)), rel=1e-4)


def test_the_box_loss_has_the_weight_of_the_options(head):
    maps, before = random_maps(head, 5), head.cfg.loc_weight
    once = head.loss(maps, *SCANS)
    head.cfg = replace(head.cfg, loc_weight=3 * before)
    torch.testing.assert_close(head.loss(maps, *SCANS), {**once, "reg": 3 * once["reg"]})


def test_gradients_reach_what_counts_and_nothing_else(head):
    maps = random_maps(head, 6)
    sum(head.loss(maps, *SCANS).values()).backward()
    labels = head.targets(*SCANS, H, W).labels
    assert (labels == -1).any()
    for name, counts in (("cls", labels >= 0), ("box", labels > 0), ("direction", labels > 0)):
        grad = head.per_anchor(maps[0][name].grad)
        assert grad.isfinite().all()
        assert torch.equal(grad.abs().sum(dim=2) > 0, counts), name


def test_extreme_logits_have_a_finite_loss_and_gradient(head):
    maps = [{name: m.detach().mul(200).requires_grad_() for name, m in random_maps(head, 7)[0].items()}]
    total = sum(head.loss(maps, *SCANS).values())
    total.backward()
    assert total.isfinite() and all(m.grad.isfinite().all() for m in maps[0].values())


def test_loss_functions_have_the_right_gradient():
    g = torch.Generator().manual_seed(8)
    logits = torch.randn(4, 3, dtype=torch.float64, generator=g, requires_grad=True)
    target = (torch.rand(4, 3, generator=g) > 0.5).double()
    assert torch.autograd.gradcheck(lambda x: A.sigmoid_focal_loss(x, target), logits)
    code = torch.randn(4, 7, dtype=torch.float64, generator=g)
    assert torch.autograd.gradcheck(lambda x: A.smooth_l1_sine(x, code), code.clone().add(0.05).requires_grad_())
    turned = code.clone()
    turned[:, 6] += math.pi  # front or rear: no loss, that is the direction's task
    assert float(A.smooth_l1_sine(turned, code).abs().max()) < 1e-12


def test_a_perfect_head_has_hardly_any_loss(head):
    target = head.targets(*SCANS, H, W)
    loss = head.loss(perfect_maps(target), *SCANS)
    assert all(float(value.detach()) < 1e-4 for value in loss.values())


def test_a_scan_without_boxes_is_all_background(head):
    neck = torch.randn(2, 16, H, W)
    loss = head.loss(head(neck), [BOXES[:0]] * 2, [LABELS[:0]] * 2)
    sum(loss.values()).backward()
    loss = {name: value.detach() for name, value in loss.items()}
    assert float(loss["cls"]) > 0 and float(loss["reg"]) == 0 and float(loss["dir"]) == 0
    assert head.cls.weight.grad.abs().sum() > 0 and head.box.weight.grad.abs().sum() == 0


def test_a_scan_weighs_the_same_whatever_it_holds(head):
    """Per scan, then averaged: not one normaliser for the batch."""
    maps = random_maps(head, 9)
    maps = [{name: m.detach() for name, m in maps[0].items()}]
    both = head.loss(maps, *SCANS)
    alone = [head.loss([{k: v[b : b + 1] for k, v in maps[0].items()}], SCANS[0][b : b + 1], SCANS[1][b : b + 1])
             for b in range(3)]  # fmt: skip
    for name, value in both.items():
        assert float(value) == pytest.approx(sum(float(one[name]) for one in alone) / 3, rel=1e-5)


# ------------------------------------------------------------------ decoding and proposals


def test_decode_inverts_the_targets(head):
    boxes = BOXES.clone()
    boxes[:, :2] = torch.tensor([[2.5, -2.0], [5.5, 1.0], [1.0, 4.0]])  # apart: the NMS ignores the class
    target = head.targets([boxes, boxes[:0]], [LABELS, LABELS[:0]], H, W)
    first, second = head.decode(perfect_maps(target))
    assert second.boxes.shape == (0, 7) and second.scores.shape == (0,) and second.labels.shape == (0,)
    order = first.labels.argsort()
    assert first.labels[order].tolist() == [0, 1, 2] and (first.scores > 0.99).all()
    torch.testing.assert_close(first.boxes[order], boxes, atol=1e-4, rtol=0)


def test_decode_applies_threshold_order_limits_and_class_agnostic_nms(head, monkeypatch):
    n = H * W * 6
    cls = torch.full((1, n, 3), -20.0)
    place = {"far": 0, "best": (5 * W + 3) * 6, "same spot": (5 * W + 3) * 6 + 2, "below": (9 * W + 6) * 6}
    for name, (k, score) in {"far": (2, 0.5), "best": (0, 0.9), "same spot": (1, 0.8), "below": (0, 0.09)}.items():
        cls[0, place[name], k] = math.log(score / (1 - score))
    maps = [{"cls": to_map(cls, H, W), "box": torch.zeros(1, 42, H, W), "direction": torch.zeros(1, 12, H, W)}]
    maps[0]["direction"][:, ::2] = 1.0  # bin 0
    found = head.decode(maps)[0]
    assert found.scores.tolist() == pytest.approx([0.9, 0.5]) and found.labels.tolist() == [0, 2]
    anchors = head.anchors(H, W)[[place["best"], place["far"]]]
    torch.testing.assert_close(found.boxes[:, :6], anchors[:, :6])
    assert found.boxes[:, 6].abs().tolist() == pytest.approx([math.pi] * 2, abs=1e-5)  # yaw 0, bin 0: its rear ahead
    head.cfg = replace(head.cfg, max_detections=1)
    assert head.decode(maps)[0].scores.tolist() == pytest.approx([0.9])
    head.cfg = replace(head.cfg, max_detections=500)
    monkeypatch.setattr(A, "BEFORE_NMS", 2)
    assert head.decode(maps)[0].scores.tolist() == pytest.approx([0.9])  # "far" was third
    head.cfg = replace(head.cfg, score_threshold=0.95)
    assert head.decode(maps)[0].boxes.shape == (0, 7)


def test_batch_of_two_is_two_batches_of_one(head):
    with torch.no_grad():
        head.cls.bias += 3
    neck = torch.randn(2, 16, H, W)
    both = head.decode(head(neck))
    for b in range(2):
        alone = head.decode(head(neck[b : b + 1]))[0]
        assert len(alone.boxes) > 0 and torch.equal(alone.labels, both[b].labels)
        torch.testing.assert_close(alone.boxes, both[b].boxes, atol=1e-4, rtol=1e-4)


def test_a_proposal_is_the_gaussian_area_around_the_decoded_box(head):
    n = H * W * 6
    cls, box = torch.full((2, n, 3), -9.0), torch.zeros(2, n, 7)
    peaks = [(1, (4 * W + 2) * 6 + 1, 0, 3.0), (0, (9 * W + 5) * 6 + 4, 2, 2.0), (1, (10 * W + 6) * 6 + 2, 0, 1.0)]
    for b, a, k, logit in peaks:
        cls[b, a, k] = logit
        cls[b, a + 6, k] = logit - 0.5  # the next cell of the same class: higher than the rest, but no peak
        box[b, a] = torch.tensor([0.3, -0.2, 0.1, 0.4, 0.2, -0.1, 0.5])
    maps = [{"cls": to_map(cls, H, W), "box": to_map(box, H, W), "direction": torch.randn(2, 12, H, W)}]
    maps[0]["cls"].requires_grad_()
    regions = head.proposals(maps, 0.1, 50)
    assert not regions.requires_grad and regions.dtype == torch.float32
    boxes, _ = head.decode_all(maps)
    expected = []
    for b, a, *_ in sorted(peaks, key=lambda peak: (peak[0], -peak[3])):
        length, width = boxes[b, a, 3:5].tolist()
        r = max(2, int(gaussian_radius(torch.tensor([length / 0.8]), torch.tensor([width / 0.8]))))
        i, j = divmod(a // 6, W)  # the cell that proposes
        expected.append([b, (j - r) * 0.8, -4.8 + (i - r) * 0.8, (j + r + 1) * 0.8, -4.8 + (i + r + 1) * 0.8])
    torch.testing.assert_close(regions, torch.tensor(expected), atol=1e-5, rtol=0)
    assert head.proposals(maps, 0.1, 1)[:, 0].tolist() == [0, 1]  # the limit is per scan
    assert len(head.proposals(maps, 0.8, 50)) == 2 and head.proposals(maps, 0.99, 50).shape == (0, 5)


def test_proposals_of_an_untrained_head_stay_finite_and_touch_the_map(head):
    maps = [{name: m.detach() * 100 for name, m in random_maps(head, 10)[0].items()}]
    regions = head.proposals(maps, 0.0, 7)
    assert len(regions) <= 21 and regions.isfinite().all()
    assert (regions[:, 1] < 6.4).all() and (regions[:, 3] > 0).all()
    assert (regions[:, 2] < 4.8).all() and (regions[:, 4] > -4.8).all()


# ------------------------------------------------------------------ the reference's own numbers


@pytest.fixture(params=["second", "pointpillars"])
def case(request, golden):
    """(npz, head) of a case of shared/golden/models, at the case's range and cell."""
    folder = golden / "models"
    if not (folder / f"{request.param}.npz").is_file():
        pytest.skip(f"needs golden/models/{request.param}.npz in a folder `shared` beside the repository")
    arrays = dict(np.load(folder / f"{request.param}.npz"))
    meta = json.loads(str(arrays["meta"]))
    x0, y0, *_ = area = meta["point_cloud_range"]
    cell = meta["voxel_size"][0] * meta["feature_map_stride"]
    cfg = tiny_config(point_range=tuple(map(float, area)), classes=tuple(meta["class_names"]))
    return arrays, AnchorHead(cfg, arrays["bev_out_val"].shape[1], Geometry(x0, y0, cell, cell)), folder, request.param


def golden_boxes(arrays) -> tuple[list[Tensor], list[Tensor]]:
    rows = [torch.from_numpy(scan[scan[:, 7] > 0]) for scan in arrays["gt_boxes"]]
    return [r[:, :7] for r in rows], [r[:, 7].long() - 1 for r in rows]


def test_the_references_anchors(case):
    arrays, head, *_ = case
    _, height, width = arrays["map_shape_hw"]
    found = head.anchors(height, width)[arrays["rand_anchor"]]
    torch.testing.assert_close(found, torch.from_numpy(arrays["rand_anchor_values"]), atol=1e-5, rtol=1e-6)


def test_the_references_targets(case):
    arrays, head, *_ = case
    _, height, width = arrays["map_shape_hw"]
    target = head.targets(*golden_boxes(arrays), height, width)
    assert np.array_equal(target.labels.numpy(), arrays["tgt_labels"])
    assert np.array_equal(target.positive.numpy(), arrays["tgt_pos"])
    np.testing.assert_allclose(target.code.numpy(), arrays["tgt_reg_at_pos"], atol=1e-5)
    assert np.array_equal(target.bin.numpy(), arrays["tgt_dir_at_pos"])


def test_the_references_maps_and_decoded_boxes(case):
    """Where the file holds the neck's cells, its maps; where it holds the maps' cells, its boxes and logits."""
    arrays, head, folder, name = case
    weights = runpy.run_path(str(folder / "recipe.py"))["state_dict"](folder / f"keys_{name}.json")
    for ours, theirs in (("cls", "conv_cls"), ("box", "conv_box"), ("direction", "conv_dir_cls")):
        getattr(head, ours).load_state_dict({k: weights[f"dense_head.{theirs}.{k}"] for k in ("weight", "bias")})
    batch, height, width = (int(n) for n in arrays["map_shape_hw"])

    both, at_neck, at_map = np.intersect1d(arrays["bev_out_idx"], arrays["map_idx"], return_indices=True)
    assert len(both) > 20
    neck = torch.from_numpy(arrays["bev_out_val"][at_neck]).T[None, :, None]  # (1, N, 1, cells)
    with torch.no_grad():
        maps = head(neck)[0]
    for ours, theirs in (("cls", "cls"), ("box", "box"), ("direction", "dir")):
        np.testing.assert_allclose(maps[ours][0, :, 0].T, arrays[f"map_{theirs}_val"][at_map], atol=1e-4)

    full = {}
    for ours, theirs in (("cls", "cls"), ("box", "box"), ("direction", "dir")):
        values = torch.from_numpy(arrays[f"map_{theirs}_val"])
        flat = torch.zeros(batch * height * width, values.shape[1])
        flat[torch.from_numpy(arrays["map_idx"]).long()] = values
        full[ours] = flat.view(batch, height, width, -1).permute(0, 3, 1, 2)
    boxes, logits = head.decode_all([full])
    compared = 0
    for b in range(batch):
        for anchors, expected in ((arrays["dec_anchor"][b], arrays["dec_boxes"][b]),
                                  (arrays["rand_anchor"], arrays["rand_boxes"][b])):  # fmt: skip
            known = np.isin(b * height * width + anchors // 6, arrays["map_idx"])
            np.testing.assert_allclose(boxes[b, anchors[known]], expected[known], atol=1e-4, rtol=1e-4)
            compared += known.sum()
        known = np.isin(b * height * width + arrays["dec_anchor"][b] // 6, arrays["map_idx"])
        best = logits[b, arrays["dec_anchor"][b][known]].sigmoid().max(dim=1)
        np.testing.assert_allclose(best.values, arrays["dec_scores"][b][known], atol=1e-4)
        assert np.array_equal(best.indices + 1, arrays["dec_labels"][b][known])
        known = np.isin(b * height * width + arrays["rand_anchor"] // 6, arrays["map_idx"])
        expected = arrays["rand_scores_logit"][b][known]
        np.testing.assert_allclose(logits[b, arrays["rand_anchor"][known]], expected, atol=1e-4)
    assert compared > 50
