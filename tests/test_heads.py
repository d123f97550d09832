"""The centre head: targets, losses and decoding against plain loops and against each other."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import heads
from heads import CenterHead, Geometry
from presets import preset
from tests.scenes import tiny_config

G = Geometry(0.0, -4.8, 0.8, 0.8)


@pytest.fixture()
def head() -> CenterHead:
    torch.manual_seed(0)
    return CenterHead(tiny_config(), 16, G)


BOXES = torch.tensor([[2.1, -2.0, -1.0, 3.9, 1.6, 1.5, 0.7], [5.0, 3.3, -0.8, 0.8, 0.6, 1.7, -2.9],
                      [1.0, 4.0, -0.9, 1.8, 0.6, 1.7, 3.1]])  # fmt: skip
LABELS = torch.tensor([0, 1, 2])


def maps_of(head: CenterHead, target: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The maps that a perfect head would give for these targets."""
    b, i, j = target["cell"].unbind(1)
    maps = {"heatmap": torch.full_like(target["heatmap"], -9.0)}
    maps["heatmap"][target["heatmap"] == 1] = 9.0
    start = 0
    for name, n in head.box_maps.items():
        maps[name] = torch.zeros(len(target["heatmap"]), n, *target["heatmap"].shape[2:])
        maps[name][b, :, i, j] = target["code"][:, start : start + n]
        start += n
    return [maps]


def test_decode_inverts_the_targets(head):
    target = head.targets(0, [BOXES, BOXES[:0]], [LABELS, LABELS[:0]], torch.Size((2, 3, 12, 8)))
    first, second = head.decode(maps_of(head, target))
    assert len(second.boxes) == 0
    order = first.labels.argsort()
    torch.testing.assert_close(first.boxes[order], BOXES, atol=1e-4, rtol=0)
    assert first.labels[order].tolist() == [0, 1, 2] and (first.scores > 0.99).all()


def test_a_perfect_head_has_no_regression_loss_and_little_class_loss(head):
    target = head.targets(0, [BOXES], [LABELS], torch.Size((1, 3, 12, 8)))
    perfect = maps_of(head, target)
    loss = head.loss(perfect, [BOXES], [LABELS])
    assert float(loss["reg"]) < 1e-4 and float(loss["cls"]) < 0.01
    perfect[0]["center_z"] += 0.5  # every object 0.5 m off: mean over objects, times loc_weight
    assert float(head.loss(perfect, [BOXES], [LABELS])["reg"]) == pytest.approx(0.5 * head.cfg.loc_weight, rel=1e-4)


def test_the_box_is_a_cell_and_an_offset(head):
    target = head.targets(0, [BOXES], [LABELS], torch.Size((1, 3, 12, 8)))
    assert target["cell"].tolist() == [[0, 3, 2], [0, 10, 6], [0, 11, 1]]  # (y + 4.8) / 0.8, x / 0.8
    assert target["code"][0].tolist() == pytest.approx(
        [2.1 / 0.8 - 2, 2.8 / 0.8 - 3, -1.0, math.log(3.9), math.log(1.6), math.log(1.5), math.cos(0.7), math.sin(0.7)], abs=1e-5)


def test_objects_outside_the_map_are_no_targets(head):
    far = BOXES.clone()
    far[0, 0], far[1, 1], far[2, 0] = -0.01, 4.81, 6.41
    target = head.targets(0, [far], [LABELS], torch.Size((1, 3, 12, 8)))
    assert len(target["cell"]) == 0 and float(target["heatmap"].sum()) == 0


def test_no_objects_give_a_finite_loss_with_gradient(head):
    neck = torch.randn(2, 16, 12, 8)
    loss = head.loss(head(neck), [BOXES[:0]] * 2, [LABELS[:0]] * 2)
    total = loss["cls"] + loss["reg"]
    total.backward()
    assert total.isfinite() and float(loss["reg"].detach()) == 0
    assert head.shared[0].weight.grad.abs().sum() > 0


def gaussian_loop(shape, plane, i, j, radius):
    maps = torch.zeros(shape)
    for p, a, b, r in zip(plane.tolist(), i.tolist(), j.tolist(), radius.tolist(), strict=True):
        sigma = (2 * r + 1) / 6
        for y in range(max(0, a - r), min(shape[1], a + r + 1)):
            for x in range(max(0, b - r), min(shape[2], b + r + 1)):
                value = math.exp(-((y - a) ** 2 + (x - b) ** 2) / (2 * sigma**2))
                maps[p, y, x] = max(float(maps[p, y, x]), value)
    return maps


def test_gaussians_equal_a_plain_loop_overlapping_and_over_the_border():
    plane, i, j = torch.tensor([0, 0, 1, 3]), torch.tensor([0, 2, 11, 5]), torch.tensor([0, 3, 19, 5])
    radius = torch.tensor([2, 4, 3, 2])
    got = heads.draw_gaussians(plane, i, j, radius, (4, 12, 20))
    torch.testing.assert_close(got, gaussian_loop((4, 12, 20), plane, i, j, radius))
    assert heads.draw_gaussians(plane[:0], i[:0], j[:0], radius[:0], (4, 12, 20)).sum() == 0


def test_gaussian_radius_equals_the_three_quadratics():
    """CornerNet's code as it is, division by 2 included; the smallest of three solutions."""
    for length, width in ((4.9, 2.0), (1.0, 0.8), (60.0, 20.0)):
        o, s, p = 0.1, length + width, length * width
        r = [(s + math.sqrt(s * s - 4 * p * (1 - o) / (1 + o))) / 2,
             (2 * s + math.sqrt(4 * s * s - 16 * (1 - o) * p)) / 2,
             (-2 * o * s + math.sqrt(4 * o * o * s * s - 16 * o * (o - 1) * p)) / 2]  # fmt: skip
        got = heads.gaussian_radius(torch.tensor([length]), torch.tensor([width]))
        assert float(got) == pytest.approx(min(r), rel=1e-5)


def test_focal_loss_equals_a_plain_loop():
    torch.manual_seed(1)
    logits, target = torch.randn(2, 3, 4, 5), torch.rand(2, 3, 4, 5) * 0.9
    target[0, 1, 2, 3] = target[1, 0, 0, 0] = 1
    total = 0.0
    for x, t in zip(logits.flatten().tolist(), target.flatten().tolist(), strict=True):
        p = min(max(1 / (1 + math.exp(-x)), 1e-4), 1 - 1e-4)
        total -= (1 - p) ** 2 * math.log(p) if t == 1 else p**2 * math.log(1 - p) * (1 - t) ** 4
    assert float(heads.focal_loss(logits, target)) == pytest.approx(total / 2, rel=1e-5)


def test_losses_have_the_right_gradient():
    torch.manual_seed(2)
    logits = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.rand(1, 2, 3, 4, dtype=torch.float64) * 0.9
    target[0, 0, 1, 1] = 1
    assert torch.autograd.gradcheck(lambda x: heads.focal_loss(x, target), logits)


def test_task_groups_put_every_class_in_its_own_map_and_name_it_back():
    """Two tasks, classes in another order than in `classes`, as nuScenes has them."""
    head = CenterHead(tiny_config(tasks=(("Cyclist",), ("Pedestrian", "Car"))), 16, G)
    maps = [maps_of(head, head.targets(t, [BOXES], [LABELS], torch.Size((1, n, 12, 8))))[0] for t, n in ((0, 1), (1, 2))]
    found = head.decode(maps)[0]
    order = found.labels.argsort()
    assert found.labels[order].tolist() == [0, 1, 2]
    torch.testing.assert_close(found.boxes[order], BOXES, atol=1e-4, rtol=0)
    assert float(head.loss(maps, [BOXES], [LABELS])["reg"]) < 1e-3


# ------------------------------------------------------------------ nuScenes: velocities, code weights, six tasks

MOVING = torch.cat([BOXES, torch.tensor([[3.5, -0.5], [0.0, 1.25], [-7.0, 2.0]])], dim=1)
SHAPE = torch.Size((1, 3, 12, 8))


@pytest.fixture()
def moving_head() -> CenterHead:
    torch.manual_seed(0)
    return CenterHead(tiny_config(velocity=True, code_weights=(1.0,) * 10), 16, G)


def test_velocities_are_the_last_two_codes_and_come_back(moving_head):
    target = moving_head.targets(0, [MOVING, MOVING[:0]], [LABELS, LABELS[:0]], torch.Size((2, 3, 12, 8)))
    assert torch.equal(target["code"][:, 8:], MOVING[:, 7:])
    maps = maps_of(moving_head, target)
    assert float(moving_head.loss(maps, [MOVING, MOVING[:0]], [LABELS, LABELS[:0]])["reg"]) < 1e-4
    first, second = moving_head.decode(maps)
    torch.testing.assert_close(first.boxes[first.labels.argsort()], MOVING, atol=1e-4, rtol=0)
    assert second.boxes.shape == (0, 9)


def test_a_head_without_velocities_leaves_them_alone(head):
    """Boxes with nine columns, eight codes: the same targets as without."""
    with_velocity, without = (head.targets(0, [boxes], [LABELS], SHAPE)["code"] for boxes in (MOVING, BOXES))
    assert torch.equal(with_velocity, without) and without.shape == (3, 8)


@pytest.mark.parametrize("unknown", [(7, 8), (7,), (8,)])
def test_an_unknown_velocity_teaches_nothing_and_leaves_the_loss_finite(moving_head, unknown):
    """By hand: its |difference| counts as 0, all others as ever; and no gradient at its place in the vel map."""
    boxes = MOVING.clone()
    boxes[1, list(unknown)] = torch.nan
    maps = moving_head(torch.randn(1, 16, 12, 8))
    for m in maps[0].values():
        m.retain_grad()
    loss = moving_head.loss(maps, [boxes], [LABELS])["reg"]
    loss.backward()

    target = moving_head.targets(0, [MOVING], [LABELS], SHAPE)
    _, i, j = target["cell"].unbind(1)
    said = torch.cat([maps[0][name] for name in moving_head.box_maps], dim=1)[0, :, i, j].T
    distance = (said - target["code"]).abs()
    for k in unknown:
        distance[1, k + 1] = 0
    assert float(loss.detach()) == pytest.approx(moving_head.cfg.loc_weight * float(distance.detach().sum()) / 3, rel=1e-5)
    taught = maps[0]["vel"].grad[0, :, i, j].T != 0  # (3 objects, vx and vy)
    assert taught.tolist() == [[True, True], [7 not in unknown, 8 not in unknown], [True, True]]
    assert (maps[0]["center_z"].grad[0, :, i, j] != 0).all()
    assert all(maps[0][name].grad.isfinite().all() for name in moving_head.box_maps)


def test_velocities_that_are_all_unknown_give_a_finite_step(moving_head):
    boxes = MOVING.clone()
    boxes[:, 7:] = torch.nan
    sum(moving_head.loss(moving_head(torch.randn(1, 16, 12, 8)), [boxes], [LABELS]).values()).backward()
    assert all(p.grad.isfinite().all() for p in moving_head.parameters())
    assert not moving_head.tasks[0]["vel"][-1].weight.grad.any()


@pytest.mark.parametrize(("name", "data", "map_", "weight"), [
    ("cp-voxel", "nuscenes", "center", 1.0), ("cp-voxel", "nuscenes", "center_z", 1.0), ("cp-voxel", "nuscenes", "dim", 1.0),
    ("cp-voxel", "nuscenes", "rot", 0.2), ("cp-voxel", "nuscenes", "vel", 1.0), ("cp-pillar", "nuscenes", "rot", 0.2),
    ("cp-pillar", "nuscenes", "vel", 1.0), ("cp-voxel", "kitti", "rot", 1.0)])  # fmt: skip
def test_the_published_code_weights_land_on_cos_and_sin(name, data, map_, weight):
    """All is perfect but one map's first channel, which is off by one: what is left is that code's weight."""
    cfg = replace(preset(name, data), head_channels=8)
    head = CenterHead(cfg, 16, G)
    boxes = MOVING[:1] if cfg.velocity else BOXES[:1]
    maps = [maps_of(head, head.targets(t, [boxes], [LABELS[:1]], torch.Size((1, len(c), 12, 8))))[0]
            for t, c in enumerate(cfg.task_classes)]  # fmt: skip
    for task in maps:  # tasks without objects say nothing
        task[map_][:, 0] += 1
    loss = head.loss(maps, [boxes], [LABELS[:1]])["reg"]
    assert float(loss) == pytest.approx(cfg.loc_weight * weight, rel=1e-4)


def test_nuscenes_classes_stand_in_six_maps_and_come_back():
    """One object of each of the ten classes: each in its own group's heat map only, and decoded under its own label."""
    cfg = replace(preset("cp-voxel", "nuscenes"), head_channels=8)
    head = CenterHead(cfg, 16, G)
    boxes = MOVING[:1].repeat(10, 1)
    boxes[:, 0] = torch.tensor([0.4, 2.8, 5.2] * 3 + [0.4])
    boxes[:, 1] = torch.tensor([-4.4] * 3 + [-2.0] * 3 + [0.4] * 3 + [3.6])
    boxes[:, 3:5], labels = 0.5, torch.arange(10)
    targets = [head.targets(t, [boxes], [labels], torch.Size((1, len(c), 12, 8))) for t, c in enumerate(cfg.task_classes)]
    assert [len(target["cell"]) for target in targets] == [1, 2, 2, 1, 2, 2]
    found = head.decode([maps_of(head, target)[0] for target in targets])[0]
    order = found.labels.argsort()
    assert found.labels[order].tolist() == list(range(10))
    torch.testing.assert_close(found.boxes[order], boxes, atol=1e-4, rtol=0)


def test_circle_nms_has_a_radius_for_every_task_and_takes_the_place_of_overlap():
    """Two tasks, each with a pair of equal boxes 1.6 m apart: far enough for the one, not for the other."""
    head = CenterHead(tiny_config(tasks=(("Car",), ("Pedestrian", "Cyclist")), circle_nms=(1.0, 4.0)), 16, G)
    box = torch.tensor([[2.0, -2.0, -1.0, 0.6, 0.6, 1.7, 0.0]]).repeat(4, 1)
    box[2:, 1], box[[1, 3], 0] = 2.0, 3.6  # no pair overlaps
    labels = torch.tensor([0, 0, 1, 2])
    maps = [maps_of(head, head.targets(t, [box], [labels], torch.Size((1, n, 12, 8))))[0] for t, n in ((0, 1), (1, 2))]
    assert sorted(head.decode(maps)[0].labels.tolist()) in ([0, 0, 1], [0, 0, 2])
    rotated = CenterHead(replace(head.cfg, circle_nms=()), 16, G)
    assert sorted(rotated.decode(maps)[0].labels.tolist()) == [0, 0, 1, 2]


@pytest.mark.parametrize("kind", [0, 1])
def test_a_hot_cell_beside_an_object_s_is_removed_by_rotated_nms_whatever_its_class(head, kind):
    """The car's box once more, a cell ahead and less sure: they share 2/3 of their union, which an IoU of 1 lets pass."""
    boxes = BOXES.clone()
    boxes[0, 6] = 0.0
    maps = maps_of(head, head.targets(0, [boxes], [LABELS], SHAPE))
    for name in head.box_maps:
        maps[0][name][0, :, 3, 3] = maps[0][name][0, :, 3, 2]
    maps[0]["heatmap"][0, kind, 3, 3] = 5.0
    assert head.decode(maps)[0].labels.sort().values.tolist() == [0, 1, 2]
    ahead = boxes[0] + torch.tensor([0.8, 0, 0, 0, 0, 0, 0])
    for nms_iou, stays in ((0.65, False), (0.67, True), (1.0, True)):  # IoU: (3.9 - 0.8) / (3.9 + 0.8) = 0.6596
        head.cfg = replace(head.cfg, nms_iou=nms_iou)
        found = head.decode(maps)[0]
        assert len(found.boxes) == 3 + stays
        if stays:
            assert found.labels[3] == kind and float(found.scores[3]) == pytest.approx(1 / (1 + math.exp(-5)))
            torch.testing.assert_close(found.boxes[3], ahead, atol=1e-4, rtol=0)


def test_at_most_so_many_detections_are_kept_after_nms_and_so_many_cells_decoded_before(head, monkeypatch):
    """The best ones: of the three objects the car is the least sure; a second hot cell of the surest is no detection."""
    maps = maps_of(head, head.targets(0, [BOXES], [LABELS], SHAPE))
    maps[0]["heatmap"][0, 0, 3, 2], maps[0]["heatmap"][0, 1, 10, 6] = 7.0, 8.0
    for name in head.box_maps:
        maps[0][name][0, :, 11, 2] = maps[0][name][0, :, 11, 1]
    maps[0]["heatmap"][0, 2, 11, 2] = 8.5
    for limit, labels in ((500, [2, 1, 0]), (2, [2, 1]), (1, [2])):
        head.cfg = replace(head.cfg, max_detections=limit)
        assert head.decode(maps)[0].labels.tolist() == labels
    head.cfg = replace(head.cfg, max_detections=500)
    for candidates, labels in ((4, [2, 1, 0]), (3, [2, 1]), (2, [2])):
        monkeypatch.setattr(heads, "MAX_CANDIDATES", candidates)
        assert head.decode(maps)[0].labels.tolist() == labels


def test_what_scores_below_the_threshold_is_no_detection(head):
    maps = maps_of(head, head.targets(0, [BOXES], [LABELS], SHAPE))
    maps[0]["heatmap"] -= torch.arange(3.0).view(1, 3, 1, 1)  # each class less sure than the one before
    every = head.decode(maps)[0]
    assert every.labels.tolist() == [0, 1, 2]
    for k, score in enumerate(every.scores.tolist()):
        head.cfg = replace(head.cfg, score_threshold=score - 1e-4)
        assert head.decode(maps)[0].labels.tolist() == [0, 1, 2][: k + 1]


def test_wild_sizes_stay_above_0_and_finite(head):
    """A young network may say anything of a size; a results file with a size of 0 or infinity is refused."""
    maps = maps_of(head, head.targets(0, [BOXES], [LABELS], torch.Size((1, 3, 12, 8))))
    maps[0]["dim"][:, 0], maps[0]["dim"][:, 1] = 1e4, -1e4
    size = head.decode(maps)[0].boxes[:, 3:6]
    assert len(size) and (size > 0).all() and size.isfinite().all()


def test_batch_of_two_is_two_batches_of_one(head):
    torch.manual_seed(3)
    head.eval()
    neck = torch.randn(2, 16, 12, 8)
    both = head.decode(head(neck))
    for b in range(2):
        alone = head.decode(head(neck[b : b + 1]))[0]
        assert torch.equal(alone.labels, both[b].labels)
        torch.testing.assert_close(alone.boxes, both[b].boxes, atol=1e-4, rtol=1e-4)


def test_proposals_are_the_gaussian_areas_of_the_peaks(head):
    target = head.targets(0, [BOXES], [LABELS], torch.Size((1, 3, 12, 8)))
    maps = maps_of(head, target)
    regions = head.proposals(maps, 0.1, 50)
    assert len(regions) == 3
    radius = head.geometry.radius(BOXES)
    for (_, i, j), r in zip(target["cell"].tolist(), radius.tolist(), strict=True):
        expected = [0, (j - r) * 0.8, -4.8 + (i - r) * 0.8, (j + r + 1) * 0.8, -4.8 + (i + r + 1) * 0.8]
        assert any(row.tolist() == pytest.approx(expected, abs=1e-5) for row in regions)
    assert len(head.proposals(maps, 0.1, 2)) == 2 and head.proposals(maps, 0.99999, 50).shape == (0, 5)


def test_a_plateau_is_cut_to_the_limit_and_untrained_maps_give_no_crash(head):
    maps = head(torch.zeros(1, 16, 12, 8))
    assert len(head.proposals(maps, 0.0, 7)) == 7
    found = head.decode(maps)[0]
    assert len(found.boxes) and found.boxes.isfinite().all()


def test_start_probability_is_a_tenth():
    head = CenterHead(preset("cp-voxel-cpu"), 128, G)
    assert float(head.tasks[0]["heatmap"][-1].bias[0].detach().sigmoid()) == pytest.approx(0.1, abs=0.01)


def test_box_branches_start_from_kaiming_s_weights_and_the_heat_map_from_torch_s():
    """Over fan_in weights normal with variance 2 / fan_in, or uniform with 1 / (3 fan_in)."""
    head = CenterHead(preset("cp-voxel-cpu"), 128, G)
    for name in ("center", "dim", "heatmap"):
        for conv in (head.tasks[0][name][0], head.tasks[0][name][-1]):
            fan_in = conv.weight[0].numel()
            expected = math.sqrt((1 / 3 if name == "heatmap" else 2) / fan_in)
            assert float(conv.weight.detach().std()) == pytest.approx(expected, rel=0.1), name
            assert name == "heatmap" or not conv.bias.any()


def test_losses_are_over_the_objects_of_all_processes(head, monkeypatch):
    """Where two other processes saw nothing, the mean count is a third of this one's: its terms count three times."""
    maps = head(torch.randn(1, 16, 12, 8))
    alone = head.loss(maps, [BOXES], [LABELS])
    monkeypatch.setattr(heads, "mean_over_processes", lambda count: count / 3)
    shared = head.loss(maps, [BOXES], [LABELS])
    for name in ("cls", "reg"):
        torch.testing.assert_close(shared[name], 3 * alone[name])


def test_a_proposal_is_the_highest_of_its_own_class_around_it(head):
    maps = maps_of(head, head.targets(0, [BOXES[:0]], [LABELS[:0]], torch.Size((1, 3, 12, 8))))
    for kind, i, j, logit in ((0, 3, 2, 8.0), (0, 3, 3, 7.0), (1, 4, 3, 7.0)):
        maps[0]["heatmap"][0, kind, i, j] = logit
    regions = head.proposals(maps, 0.1, 50)
    middle = [((row[2] + row[4]) / 2, (row[1] + row[3]) / 2) for row in regions.tolist()]
    assert middle == [pytest.approx((-4.8 + (i + 0.5) * 0.8, (j + 0.5) * 0.8)) for i, j in ((3, 2), (4, 3))]


def test_the_limit_is_a_scan_s_over_all_its_tasks():
    cfg = tiny_config(tasks=(("Car",), ("Pedestrian", "Cyclist")))
    head, maps = CenterHead(cfg, 16, G), []
    for classes in (1, 2):
        task = {name: torch.zeros(2, n, 12, 8) for name, n in head.box_maps.items()}
        maps.append(task | {"heatmap": torch.full((2, classes, 12, 8), -9.0)})
        for k in range(3):  # peaks 1, 3, 5 of the first task, 2, 4, 6 of the second, the same in both scans
            maps[-1]["heatmap"][:, 0, 3 * k + 1, 2 * k + 1] = 2.0 * k + classes
    regions = head.proposals(maps, 0.1, 4)
    assert regions[:, 0].tolist() == [0.0] * 4 + [1.0] * 4
    for scan in (regions[:4], regions[4:]):
        rows = ((scan[:, 2] + scan[:, 4]) / 2 + 4.8) / 0.8 - 0.5
        assert rows.round().tolist() == [7.0, 7.0, 4.0, 4.0]
