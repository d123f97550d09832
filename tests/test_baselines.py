"""Every baseline against a plain-loop twin: where it looks, what it lowers, whom it teaches."""

import copy
import math
from dataclasses import fields, replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import baselines
import boxes as box_ops
from baselines import METHODS, general_instances, labels_for, on_teacher_grid, seeded
from cli import InputError
from config import Config
from detector import Output, build
from heads import Geometry
from presets import preset
from tests.scenes import few_points, tiny_config
from train import check_pair, losses, start_distilling

KINDS = ("center", "six tasks", "anchor", "two grids")
ADAPTED = ("hint", "mimic", "fg", "gid-f")


def pair(kind) -> tuple[Config, Config]:
    """Teacher's and student's config: 12 x 8 cells; two grids: 32 x 16 and 20 x 10; with six tasks 40 x 20 and 20 x 10."""
    if kind == "six tasks":
        small = {"point_range": (-4.8, -7.2, -5.0, 4.8, 7.2, 3.0)}
        return tuple(replace(preset(name, "nuscenes"), **small) for name in ("cp-voxel-cpu", "cp-voxel-xxs-cpu"))
    if kind == "six tasks, two grids":
        small = {"point_range": (-6.4, -12.8, -5.0, 6.4, 12.8, 3.0)}
        return tuple(replace(preset(name, "nuscenes"), **small) for name in ("cp-pillar-cpu", "cp-pillar-v0.64-cpu"))
    if kind == "two grids":
        small = {"point_range": (-6.4, -12.8, -3.0, 6.4, 12.8, 1.0)}
        return tuple(replace(preset(name), **small) for name in ("cp-pillar-cpu", "cp-pillar-v0.64-cpu"))
    return tuple(tiny_config(width=(w,) * 3, head=kind) for w in (1.0, 0.25))


@cache
def models(kind):
    cfg_t, cfg_s = pair(kind)
    batch = few_points(cfg_s)
    shift = (cfg_s.point_range[0] + cfg_s.point_range[3]) / 2
    boxes = [b + b.new_tensor([shift] + [0] * (b.shape[1] - 1)) for b in batch.boxes]
    batch = replace(batch, boxes=boxes)
    teacher = build(cfg_t)
    for module in teacher.modules():  # statistics of this batch: without any, an untrained neck in eval mode is all but zero
        module.momentum = 1.0
    with torch.no_grad():
        teacher(teacher.prepare(batch))
    return teacher.eval(), build(cfg_s), batch


def outputs(kind):
    """The student's output, with gradients; the teacher's, which believes in a few places; the batch."""
    teacher, student, batch = models(kind)
    with torch.no_grad():
        out_t = teacher(teacher.prepare(batch))
    for task in out_t.maps:
        task["heatmap" if "heatmap" in task else "cls"][:, :, 3:9:5, 2:7:4] += 4.0 if "heatmap" in task else 6.5
    boxes, labels = ([x.clone() for x in each] for each in (batch.boxes, batch.labels))
    return student(student.prepare(batch)), out_t, replace(batch, boxes=boxes, labels=labels)


def method(name, kind, **changes):
    teacher, student, _ = models(kind)
    return seeded(METHODS[name], replace(student.cfg, method=name, **changes), student.backbone.out_channels,
                  teacher.backbone.out_channels)  # fmt: skip


def one_scan(out: Output, b: int) -> Output:
    return Output(out.neck[b : b + 1], [{k: v[b : b + 1] for k, v in task.items()} for task in out.maps], out.geometry, out.head)


def of_scan(batch, b):
    return replace(batch, ids=batch.ids[b : b + 1], boxes=batch.boxes[b : b + 1], labels=batch.labels[b : b + 1])


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def kl(z_s, z_t):
    p, q = sigmoid(z_t), sigmoid(z_s)
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


# ---------------------------------------------------------------- all of them


def test_the_names_are_the_options_in_order_of_publication():
    choices = next(f for f in fields(Config) if f.name == "method").metadata["choices"]
    assert ("none", *METHODS) == choices


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("lad", "rdd")])
def test_a_student_that_is_its_teacher_loses_nothing_and_another_does(name, kind):
    """Adapters that pass through; every term is exactly zero, and none is after a change of every map."""
    _, out_t, batch = outputs(kind)
    teacher, student, _ = models(kind)
    same = METHODS[name](replace(student.cfg, method=name), *(teacher.backbone.out_channels,) * 2)
    if name in ADAPTED:
        same.adapter = nn.Identity()
    if name == "point-distiller":
        same.mix_s.load_state_dict(same.mix_t.state_dict())
    terms, _ = same(copy.deepcopy(out_t), out_t, batch)
    assert terms and all(float(term.detach()) == 0 for term in terms.values()), terms
    torch.manual_seed(0)
    other = Output(out_t.neck + torch.rand_like(out_t.neck), [{k: v + torch.randn_like(v) for k, v in task.items()}
                                                              for task in out_t.maps], out_t.geometry, out_t.head)  # fmt: skip
    terms, _ = same(other, out_t, batch)
    assert all(float(term.detach()) > 0 for term in terms.values()), terms


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_gradients_reach_the_student_and_the_adapters_and_nothing_moves_the_teacher(name, kind):
    teacher, student, _ = models(kind)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    distil = method(name, kind)
    student.zero_grad()
    out_s, out_t, batch = outputs(kind)
    if kind == "anchor":  # an untrained anchor head proposes nothing
        out_s.maps[0]["cls"] = out_s.maps[0]["cls"] + 4
    terms, seen = distil(out_s, out_t, batch)
    assert bool(terms) != (name == "lad") and all(term.isfinite() for term in terms.values())
    assert all(torch.as_tensor(value).isfinite().all() for value in seen.values())
    if terms:
        sum(terms.values()).backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.encoder.parameters())
        for which, p in distil.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, which
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_empty_scenes_are_finite_and_what_asks_labels_or_proposals_is_zero(name, kind):
    out_s, out_t, batch = outputs(kind)
    nothing = replace(batch, boxes=[b[:0] for b in batch.boxes], labels=[k[:0] for k in batch.labels])
    terms, _ = method(name, kind, proposal_score=0.999)(out_s, out_t, nothing)
    for term in terms.values():
        assert term.isfinite() and (name not in ("mimic", "fg", "pp-logit") or float(term.detach()) == 0)
        (grad,) = torch.autograd.grad(term, out_s.neck, retain_graph=True, allow_unused=True)
        assert grad is None or grad.isfinite().all()
    if terms:
        assert torch.autograd.grad(sum(terms.values()), out_s.neck)[0].isfinite().all()  # the path is there


@pytest.mark.parametrize(("name", "kind", "terms"), [
    ("hint", "center", ("hint",)), ("gid-f", "center", ("gid_rel", "gid_feat")), ("pp-logit", "anchor", ("pp_reg",)),
    ("point-distiller", "center", ("point",)), ("hinton", "six tasks", ("hinton",)),
])  # fmt: skip
def test_a_batch_is_the_mean_of_its_scans_where_a_scan_is_the_unit(name, kind, terms):
    out_s, out_t, batch = outputs(kind)
    distil = method(name, kind).eval()
    both, _ = distil(out_s, out_t, batch)
    single = [distil(one_scan(out_s, b), one_scan(out_t, b), of_scan(batch, b))[0] for b in (0, 1)]
    for term in terms:
        torch.testing.assert_close(both[term], (single[0][term] + single[1][term]) / 2)


def test_adapters_depend_on_the_seed_only_and_leave_the_random_state_alone():
    teacher, student, _ = models("center")
    for name, wanted in METHODS.items():
        first = seeded(wanted, student.cfg, 24, 96).state_dict()
        torch.rand(7)
        before = torch.get_rng_state()
        second = seeded(wanted, student.cfg, 24, 96).state_dict()
        assert torch.equal(before, torch.get_rng_state())
        assert all(torch.equal(first[k], second[k]) for k in first)
        other = seeded(wanted, replace(student.cfg, seed=1), 24, 96).state_dict()
        assert not first or any(not torch.equal(first[k], other[k]) for k in first), name
        assert bool(first) == (name in (*ADAPTED, "point-distiller", "rdd")), name


# ---------------------------------------------------------------- grids


def test_a_teacher_of_another_grid_gets_its_own_cells(monkeypatch):
    teacher, student, batch = models("two grids")
    asked, forward = [], teacher.forward
    monkeypatch.setattr(teacher, "forward", lambda x: asked.append(x) or forward(x))
    losses(student, batch, teacher, method("hint", "two grids"), 1.0)
    assert torch.equal(asked[0].voxels.coords, teacher.prepare(batch).voxels.coords)
    assert len(asked[0].voxels.coords) != len(student.prepare(batch).voxels.coords)


def ramps(head=None):
    """Student's and teacher's neck: one function of metres, 3 y + x, on other cells, with other borders, of other shape."""
    found = []
    for g, height, width in ((Geometry(-8, -8, 0.5, 0.8), 30, 40), (Geometry(-4, -6, 0.7, 0.9), 12, 9)):
        y, x = g.y0 + (torch.arange(height) + 0.5) * g.cell_y, g.x0 + (torch.arange(width) + 0.5) * g.cell_x
        found.append(Output((3 * y[:, None] + x[None]).expand(2, 1, -1, -1), [], g, head))
    return found


def test_a_map_on_the_teacher_s_grid_is_the_same_function_of_metres():
    """A linear ramp is sampled exactly inside the student's map."""
    out_s, out_t = ramps()
    torch.testing.assert_close(on_teacher_grid(out_s.neck, out_s, out_t), out_t.neck.contiguous())
    assert on_teacher_grid(out_t.neck, out_t, out_t) is out_t.neck


def test_between_grids_a_region_is_cut_of_both_necks_in_the_same_place(monkeypatch):
    boxes = torch.tensor([[x, y, 0.0, length, 1.5, 1.5, 0.3] for x, y, length in ((-1, -3, 3), (0.5, 1.5, 2), (-2, 2.5, 1))])
    monkeypatch.setattr(baselines, "general_instances", lambda *_: ([boxes, boxes[:1]], None))
    proposed = torch.tensor([[0, -2.0, -4.0, 0.0, -2.0], [1, -0.5, 0.5, 1.5, 2.5]])
    out_s, out_t = ramps(SimpleNamespace(proposals=lambda *_: proposed))
    for name in ("mimic", "gid-f"):
        distil = METHODS[name](tiny_config(), 1, 1)
        distil.adapter = nn.Identity()
        for term, value in distil(out_s, out_t, None)[0].items():
            assert float(value) == pytest.approx(0, abs=1e-6), term


@pytest.mark.parametrize(("kind", "task", "label", "i", "j"), [("two grids", 0, 2, 13, 4), ("six tasks, two grids", 3, 5, 7, 3)])
def test_between_grids_an_instance_is_what_each_says_in_the_same_place(kind, task, label, i, j):
    """The student is sure of one cell of its own: the teacher's cells whose centres lie there have that score and box."""
    out_s, out_t, _ = outputs(kind)
    for out in (out_s, out_t):
        for maps in out.maps:
            maps["heatmap"] = torch.full_like(maps["heatmap"], -9.0)
    in_task, k = place(out_s.head.cfg, label)
    assert in_task == task
    out_s.maps[task]["heatmap"][1, k, i, j] = 9.0
    boxes, labels = general_instances(out_s, out_t)
    every, logits = baselines.all_boxes(out_s)
    height, width = out_s.neck.shape[2:]
    here = (task * height + i) * width + j
    assert torch.equal(boxes[1][0], every[1, here]) and int(labels[1][0]) == label and logits[1, here, label] == 9


@pytest.mark.parametrize("name", ["hinton", "gid-f", "gid-l", "pp-logit", "rdd"])
def test_anchors_are_not_compared_with_other_anchors(name):
    teacher, student = tiny_config(head="anchor"), tiny_config(head="anchor", voxel_size=(0.4, 0.4, 0.2), method=name)
    with pytest.raises(InputError, match=f"differ in voxel_size: .*--method {name} compares anchor with anchor"):
        check_pair(teacher, student)
    check_pair(teacher, replace(student, method="fg"))
    with pytest.raises(InputError, match="compares anchor with anchor"):
        start_distilling(student, build(student), build(teacher), torch.device("cpu"))


# ---------------------------------------------------------------- each against plain loops


@pytest.mark.parametrize("kind", KINDS[:3])
def test_hinton_is_the_divergence_over_every_question(kind):
    out_s, out_t, batch = outputs(kind)
    terms, _ = method("hinton", kind)(out_s, out_t, batch)
    pairs = zip(*(out.class_logits.detach().double().flatten().tolist() for out in (out_s, out_t)), strict=True)
    objects = sum(len(b) for b in batch.boxes)
    assert float(terms["hinton"]) == pytest.approx(sum(kl(s, t) for s, t in pairs) / objects, rel=1e-4)


def test_hint_and_mimic_are_mean_squares():
    out_s, out_t, batch = outputs("center")
    hint, mimic = method("hint", "center"), method("mimic", "center")
    weight, bias = hint.adapter.weight[:, :, 0, 0], hint.adapter.bias
    adapted = torch.einsum("oc,bchw->bohw", weight, out_s.neck) + bias[:, None, None]
    torch.testing.assert_close(hint(out_s, out_t, batch)[0]["hint"], (adapted - out_t.neck).square().mean())
    regions = out_s.proposals(0.1, 50)
    total = 0.0
    for r in range(len(regions)):  # the student's proposals only
        crop_s, crop_t = (baselines.roi_align(o.neck, regions[r : r + 1], o.geometry, 7) for o in (out_s, out_t))
        total += float((mimic.adapter(crop_s) - crop_t).square().mean()) / 2
    got, seen = mimic(out_s, out_t, batch)
    assert float(got["mimic"]) == pytest.approx(total / len(regions), rel=1e-4) and int(seen["regions"]) == len(regions) > 0
    _, seen = method("mimic", "center", proposal_score=1.0)(out_s, out_t, batch)
    assert int(seen["regions"]) == 0  # the divisor is at least 1, the log says what there was


def upright(box):
    """x0, y0, x1, y1 of a box turned to the nearest multiple of 90 degrees; plain Python."""
    x, y, _, length, width, _, yaw = box[:7]
    turned = yaw - math.floor(yaw / math.pi + 0.5) * math.pi
    if abs(turned) >= math.pi / 4:
        length, width = width, length
    return x - length / 2, y - width / 2, x + length / 2, y + width / 2


def upright_iou(a, b):
    a, b = upright(a), upright(b)
    shared = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return shared / (sum(area) - shared)


def test_fg_masks_the_cells_whose_anchors_come_near_an_object_s_best():
    out_s, out_t, batch = outputs("anchor")
    batch.boxes[0][0, :2] = torch.tensor([900.0, 0.0])  # meets no anchor: masks nothing
    distil = method("fg", "anchor")
    _, _, height, width = out_t.neck.shape
    anchors = out_t.head.anchors(height, width).tolist()
    expected = torch.zeros(2, height, width, dtype=torch.bool)
    for b, boxes in enumerate(batch.boxes):
        for box in boxes.tolist():
            ious = [upright_iou(box, anchor) for anchor in anchors]
            for a, iou in enumerate(ious):
                if iou > 0.5 * max(ious):
                    expected[b, a // 6 // width, a // 6 % width] = True
    assert torch.equal(distil.mask(out_t, batch), expected) and 0 < int(expected.sum()) < expected.numel()
    difference = (distil.adapter(out_s.neck) - out_t.neck).square().sum(dim=1)
    loss = sum(float(difference[b, i, j]) for b, i, j in expected.nonzero().tolist()) / (2 * int(expected.sum()))
    assert float(distil(out_s, out_t, batch)[0]["fg"]) == pytest.approx(loss, rel=1e-4)


def place(cfg, label):
    """Task and class inside the task."""
    return next((t, names.index(cfg.classes[label])) for t, names in enumerate(cfg.task_classes) if cfg.classes[label] in names)


def gaussians(out_t, batch, t):
    """A task's target heat map, (B, K, H, W), object by object and cell by cell."""
    head, heat = out_t.head, torch.zeros_like(out_t.maps[t]["heatmap"])
    g = head.geometry
    for b, (boxes, labels) in enumerate(zip(batch.boxes, batch.labels, strict=True)):
        for box, label in zip(boxes, labels.tolist(), strict=True):
            task, k = place(head.cfg, label)
            i, j = math.floor((float(box[1]) - g.y0) / g.cell_y), math.floor((float(box[0]) - g.x0) / g.cell_x)
            if task != t or not (0 <= i < heat.shape[2] and 0 <= j < heat.shape[3]):
                continue
            r = int(head.geometry.radius(box[None])[0])
            for y in range(max(0, i - r), min(heat.shape[2], i + r + 1)):
                for x in range(max(0, j - r), min(heat.shape[3], j + r + 1)):
                    value = math.exp(-((y - i) ** 2 + (x - j) ** 2) / (2 * ((2 * r + 1) / 6) ** 2))
                    heat[b, k, y, x] = max(float(heat[b, k, y, x]), value)
    return heat


@pytest.mark.parametrize("kind", ["center", "six tasks", "two grids"])
def test_fg_of_a_centre_head_masks_the_gaussians(kind):
    _, out_t, batch = outputs(kind)
    expected = torch.stack([(gaussians(out_t, batch, t) > 0).any(dim=1) for t in range(len(out_t.maps))]).any(dim=0)
    assert torch.equal(method("fg", kind).mask(out_t, batch), expected) and 0 < int(expected.sum()) < expected.numel()


@pytest.mark.parametrize("kind", KINDS[:3])
def test_general_instances_are_the_ten_most_disputed_after_nms(kind):
    out_s, out_t, _ = outputs(kind)
    (boxes_s, logits_s), (boxes_t, logits_t) = baselines.all_boxes(out_s), baselines.all_boxes(out_t)
    boxes, labels = general_instances(out_s, out_t)
    for b in range(2):
        disputed = []
        for n in range(boxes_s.shape[1]):
            p_s, p_t = logits_s[b, n].sigmoid().tolist(), logits_t[b, n].sigmoid().tolist()
            gaps = [abs(x - y) for x, y in zip(p_s, p_t, strict=True)]
            disputed.append((max(gaps), gaps.index(max(gaps)), (boxes_s if max(p_s) > max(p_t) else boxes_t)[b, n]))
        disputed.sort(key=lambda one: -one[0])
        kept = []
        for one in disputed:
            if all(float(box_ops.iou_bev(one[2][None, :7], other[2][None, :7])) <= 0.3 for other in kept):
                kept.append(one)
            if len(kept) == 10:
                break
        assert labels[b].tolist() == [one[1] for one in kept]
        torch.testing.assert_close(boxes[b], torch.stack([one[2] for one in kept]))


def test_all_boxes_of_a_centre_head_are_what_it_decodes():
    """The best of them, threshold and NMS aside, are CenterHead's own candidates; other tasks' classes are impossible."""
    out_s, _, _ = outputs("six tasks")
    boxes, logits = baselines.all_boxes(out_s)
    cells = out_s.neck.shape[2] * out_s.neck.shape[3]
    assert boxes.shape == (2, 6 * cells, 9) and logits.shape == (2, 6 * cells, 10)
    for t, task in enumerate(out_s.maps):
        box, score, label, cell = out_s.head._best(t, {k: v[1] for k, v in task.items()}, 7, peaks=False)
        here = t * cells + cell[:, 0] * out_s.neck.shape[3] + cell[:, 1]
        torch.testing.assert_close(boxes[1, here], box)
        torch.testing.assert_close(logits[1, here, label].sigmoid(), score)
        others = [k for k in range(10) if place(out_s.head.cfg, k)[0] != t]
        assert (logits[:, t * cells : (t + 1) * cells, others] == -torch.inf).all()


def test_gid_features_are_squares_and_relations_of_the_instances():
    out_s, out_t, batch = outputs("center")
    distil = method("gid-f", "center")
    boxes, _ = general_instances(out_s, out_t)
    feat, relation, instances = 0.0, 0.0, 0
    for b in range(2):
        crops_s, crops_t = [], []
        for box in boxes[b]:
            corners = box_ops.corners_bev(box[None])[0]
            region = torch.tensor([[b, *corners.min(dim=0).values, *corners.max(dim=0).values]])
            s, t = (baselines.roi_align(o.neck, region, o.geometry, 7) for o in (out_s, out_t))
            feat += float((distil.adapter(s) - t).square().sum()) / 49
            crops_s.append(s), crops_t.append(t)
        pairs = [(i, j) for i in range(10) for j in range(i)]
        far = [[float((c[i] - c[j]).square().sum().sqrt()) for i, j in pairs] for c in (crops_s, crops_t)]
        far = [[d / (sum(row) / len(row)) for d in row] for row in far]
        errors = [abs(x - y) for x, y in zip(*far, strict=True)]
        relation += sum(e * e / 2 if e < 1 else e - 0.5 for e in errors) / len(errors) / 2
        instances += len(boxes[b])
    terms, seen = distil(out_s, out_t, batch)
    assert instances == int(seen["instances"]) == 20
    assert float(terms["gid_feat"]) == pytest.approx(5e-4 * feat / instances, rel=1e-4)
    assert float(terms["gid_rel"]) == pytest.approx(40 * relation, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_gid_features_pull_at_the_neck_and_not_at_the_maps_that_chose_the_instances(kind):
    out_s, out_t, batch = outputs(kind)
    terms, seen = method("gid-f", kind)(out_s, out_t, batch)
    maps = [value for task in out_s.maps for value in task.values()]
    assert int(seen["instances"]) > 1 and all(value.requires_grad for value in maps)
    neck, *others = torch.autograd.grad(sum(terms.values()), [out_s.neck, *maps], allow_unused=True)
    assert neck.abs().sum() > 0 and all(grad is None for grad in others)


def test_instances_that_are_all_alike_to_the_student_have_a_finite_relation():
    region = torch.zeros(3, 2, 2, 2, requires_grad=True)
    loss = baselines.GIDF.relation(region, torch.rand(3, 2, 2, 2, generator=torch.Generator().manual_seed(0)))
    loss.backward()
    assert 0 < float(loss.detach()) < 1 and region.grad.isfinite().all()


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_instances_have_no_relation(n):
    region = torch.rand(n, 3, 2, 2, requires_grad=True)
    loss = baselines.GIDF.relation(region, torch.rand(n, 3, 2, 2))
    loss.backward()
    assert float(loss) == 0 and (region.grad is None or region.grad.isfinite().all())


@pytest.mark.parametrize("kind", ["center", "six tasks"])
def test_gid_responses_of_a_centre_head_are_read_under_the_instances_gaussians(kind):
    out_s, out_t, batch = outputs(kind)
    boxes, labels = general_instances(out_s, out_t)
    instances = replace(batch, boxes=boxes, labels=labels)
    weights, cls, reg, cells, objects = models(kind)[1].cfg.code_weights, 0.0, 0.0, 0, 0
    for t, (task_s, task_t) in enumerate(zip(out_s.maps, out_t.maps, strict=True)):
        heat = gaussians(out_t, instances, t)
        for b, i, j in (heat > 0).any(dim=1).nonzero().tolist():
            cells += 1
            logits_s, logits_t = (task["heatmap"][b, :, i, j].tolist() for task in (task_s, task_t))
            cls += sum(kl(x, y) for x, y in zip(logits_s, logits_t, strict=True))
        for b, i, j in out_t.head.targets(t, boxes, labels, heat.shape)["cell"].tolist():
            codes = [[float(v) for name in out_t.head.box_maps for v in task[name][b, :, i, j]] for task in (task_s, task_t)]
            reg += sum(w * abs(x - y) for w, x, y in zip(weights, *codes, strict=True))
            objects += 1
    terms, _ = method("gid-l", kind)(out_s, out_t, batch)
    assert cells and objects
    assert float(terms["gid_cls"]) == pytest.approx(0.1 * cls / cells, rel=1e-3)
    assert float(terms["gid_reg"]) == pytest.approx(models(kind)[1].cfg.loc_weight * reg / objects, rel=1e-3)


def smooth_l1(x):
    return x * x / 2 * 9 if abs(x) < 1 / 9 else abs(x) - 1 / 18


def per_anchor(maps, name, b, a, width):
    """The numbers that a map holds for anchor a of scan b: channel = anchor in its cell * numbers + number."""
    numbers = maps[name].shape[1] // 6
    i, j, k = a // 6 // width, a // 6 % width, a % 6
    return maps[name][b, k * numbers : (k + 1) * numbers, i, j].tolist()


@pytest.mark.parametrize("name", ["gid-l", "pp-logit"])
def test_logits_of_an_anchor_head_are_read_at_the_positive_anchors(name):
    """gid-l: at those of the instances, anchor by anchor. pp-logit: at those of the ground truth; classes of the whole cell."""
    out_s, out_t, batch = outputs("anchor")
    _, _, height, width = out_t.neck.shape
    truth = general_instances(out_s, out_t) if name == "gid-l" else (batch.boxes, batch.labels)
    labels = out_t.head.targets(*truth, height, width).labels
    cls, reg, cells = 0.0, 0.0, set()
    for b, a in (labels > 0).nonzero().tolist():
        (cls_s, box_s), (cls_t, box_t) = ([per_anchor(out.maps[0], key, b, a, width) for key in ("cls", "box")]
                                          for out in (out_s, out_t))  # fmt: skip
        error = smooth_l1(math.sin(box_s[6] - box_t[6])) + sum(smooth_l1(box_s[n] - box_t[n]) for n in range(6))
        cells.add((b, a // 6 // width, a // 6 % width))
        if name == "gid-l":
            cls += sum(kl(x, y) for x, y in zip(cls_s, cls_t, strict=True))
            reg += error / int((labels > 0).sum())
        else:
            reg += error / int((labels[b] > 0).sum()) / 2
    assert cells and len(cells) < 2 * height * width
    terms, _ = method(name, "anchor")(out_s, out_t, batch)
    if name == "gid-l":
        assert float(terms["gid_cls"]) == pytest.approx(0.1 * cls / int((labels > 0).sum()), rel=1e-3)
        assert float(terms["gid_reg"]) == pytest.approx(2.0 * reg, rel=1e-3)
    else:
        p_s, p_t = (out.maps[0]["cls"].sigmoid().clamp(1e-4, 1 - 1e-4) for out in (out_s, out_t))
        cls = sum(float((p_s[b, :, i, j] - p_t[b, :, i, j]).square().sum()) for b, i, j in cells) / len(cells)
        assert float(terms["pp_cls"]) == pytest.approx(15 * cls, rel=1e-3)
        assert float(terms["pp_reg"]) == pytest.approx(0.2 * reg, rel=1e-3)


@pytest.mark.parametrize("kind", ["center", "six tasks", "two grids"])
def test_pp_logit_weighs_cells_by_the_gaussians_and_the_teacher(kind):
    out_s, out_t, batch = outputs(kind)
    cls, reg = 0.0, 0.0
    for t, (task_s, task_t) in enumerate(zip(out_s.maps, out_t.maps, strict=True)):
        heat, p_t = gaussians(out_t, batch, t), task_t["heatmap"].sigmoid()
        p_s = on_teacher_grid(task_s["heatmap"].sigmoid(), out_s, out_t)
        loss = weight = 0.0
        for b, i, j in (heat > 0).any(dim=1).nonzero().tolist():
            w = float(p_t[b, :, i, j].max()) * float(heat[b, :, i, j].max())
            loss += w * sum((float(p_s[b, k, i, j]) - float(p_t[b, k, i, j])) ** 2 for k in range(heat.shape[1]))
            weight += w
        cls += loss / (weight + 1e-6) / len(out_t.maps)
        cells = out_t.head.targets(t, batch.boxes, batch.labels, heat.shape)["cell"].tolist()
        for b, i, j in cells if kind != "two grids" else ():
            for name in out_t.head.box_maps:
                reg += float((task_s[name][b, :, i, j] - task_t[name][b, :, i, j]).abs().sum()) / len(cells) / len(out_t.maps)
    terms, _ = method("pp-logit", kind)(out_s, out_t, batch)
    assert float(terms["pp_cls"]) == pytest.approx({"two grids": 7}.get(kind, 15) * cls, rel=1e-3) and cls > 0
    assert ("pp_reg" in terms) == (kind != "two grids")
    if kind != "two grids":
        assert float(terms["pp_reg"]) == pytest.approx(0.2 * reg, rel=1e-3)


def test_pp_logit_has_the_published_weights():
    weights = {name: baselines.PPLogit(preset(name), 1, 1).weight for name in (
        "cp-voxel-s", "cp-voxel-xs", "cp-voxel-xxs", "cp-pillar-v0.4", "cp-pillar-v0.64", "second-s", "second-xs")}  # fmt: skip
    assert list(weights.values()) == [10, 15, 15, 7, 7, 15, 15]


@pytest.mark.parametrize(("name", "boxes"), [("cp-voxel-xxs-cpu", True), ("cp-pillar-cpu", False), ("pointpillars-cpu", True)])
def test_pp_logit_has_boxes_but_for_pillars_under_a_centre_head(name, boxes):
    cfg = replace(preset(name), method="pp-logit")
    model, batch = build(cfg).eval(), few_points(cfg)
    with torch.no_grad():
        out = model(model.prepare(batch))
    terms, _ = baselines.PPLogit(cfg, 1, 1)(out, out, batch)
    assert ("pp_reg" in terms) == boxes


def test_point_distiller_compares_each_strong_cell_s_nearest_in_the_teacher():
    out_s, out_t, batch = outputs("center")
    distil = method("point-distiller", "center").eval()
    distil.CELLS, distil.NEIGHBOURS = 5, 3
    total = 0.0
    for b in range(2):
        f_s, f_t = (out.neck[b].flatten(1).T for out in (out_s, out_t))  # (96, C)
        strongest = sorted(range(96), key=lambda n: -float(f_t[n].max()))[:5]
        for n in strongest:
            nearest = sorted(range(96), key=lambda m: float((f_t[m].double() - f_t[n].double()).square().sum()))[:3]
            assert n in nearest
            for m in nearest:
                sides = []
                for f, mix, norm in ((f_s, distil.mix_s, distil.norm_s), (f_t, distil.mix_t, distil.norm_t)):
                    weight = torch.cat([mix.weight[:64], mix.weight[64:]], dim=1)  # of (neighbour, centre) as one convolution
                    mixed = weight @ torch.cat([f[m], f[n]])
                    mixed = (mixed - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
                    sides.append(mixed.clamp(min=0))
                total += float((sides[0] - sides[1]).square().mean())
    assert float(distil(out_s, out_t, batch)[0]["point"]) == pytest.approx(2 * total / 2 / 5 / 3, rel=1e-4)


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize("kind", KINDS[:3])
def test_label_kd_puts_the_teacher_s_sure_boxes_before_the_truth(kind):
    """All above the score, no NMS, best first; a score per class counts for that class."""
    _, out_t, batch = outputs(kind)
    boxes, logits = baselines.all_boxes(out_t)
    classes = logits.shape[2]
    for score in ((0.6,), (0.6,) * (classes - 1) + (0.999,)):
        taught = labels_for(batch, out_t, tiny_config(label_kd=True, label_score=score))
        for b in range(2):
            sure = []
            for n in range(boxes.shape[1]):
                p = logits[b, n].sigmoid().tolist()
                k = p.index(max(p))
                if p[k] > (score * classes if len(score) == 1 else score)[k]:
                    sure.append((p[k], k, n))
            sure.sort(key=lambda one: -one[0])
            assert sure and taught.labels[b].tolist() == [k for _, k, _ in sure] + batch.labels[b].tolist()
            torch.testing.assert_close(taught.boxes[b], torch.cat([boxes[b, [n for *_, n in sure]], batch.boxes[b]]))
    unsure = labels_for(batch, out_t, tiny_config(method="lad", label_score=(1.0,)))
    assert labels_for(batch, out_t, tiny_config(method="fg")) is batch
    assert all(torch.equal(x, y) for x, y in zip(unsure.boxes + unsure.labels, batch.boxes + batch.labels, strict=True))


def test_label_kd_teaches_the_best_500_boxes_and_no_more():
    _, out_t, batch = outputs("center")
    torch.manual_seed(0)
    out_t.maps = [{name: torch.randn_like(m.repeat(1, 1, 3, 4)) for name, m in task.items()} for task in out_t.maps]
    taught = labels_for(batch, out_t, tiny_config(label_kd=True, label_score=(0.6,)))
    boxes, logits = baselines.all_boxes(out_t)
    for b in range(2):
        p = logits[b].sigmoid().amax(dim=1).tolist()
        sure = sorted((n for n in range(len(p)) if p[n] > 0.6), key=lambda n: -p[n])
        assert len(sure) > 500
        assert torch.equal(taught.boxes[b], torch.cat([boxes[b, sure[:500]], batch.boxes[b]]))
        assert torch.equal(taught.labels[b], torch.cat([logits[b, sure[:500]].argmax(dim=1), batch.labels[b]]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_detector_trains_on_the_teacher_s_labels(kind):
    """Ninefold boxes of nuScenes, anchors, other grids: the detection loss takes them, and says something else."""
    out_s, out_t, batch = outputs(kind)
    plain, taught = (sum(out_s.head.loss(out_s.maps, b.boxes, b.labels).values())
                     for b in (batch, labels_for(batch, out_t, tiny_config(label_kd=True))))  # fmt: skip
    assert taught.isfinite() and float(taught.detach()) != float(plain.detach())


def test_label_kd_alone_has_one_name():
    with pytest.raises(InputError, match="label KD alone is --method lad"):
        check_pair(tiny_config(), tiny_config(label_kd=True))


# ---------------------------------------------------------------- two processes


def _terms(part) -> dict[str, float]:
    """Every method's terms on the chosen scans of three kinds of pair, from the same networks in every process."""
    found = {}
    for kind in KINDS[:3]:
        out_s, out_t, batch = outputs(kind)
        batch.boxes[0], batch.labels[0] = batch.boxes[0][:1], batch.labels[0][:1]  # the scans weigh differently
        for name, changes in (*((name, {}) for name in METHODS), ("rdd", {"psi_norm": True})):
            distil = method(name, kind, **changes)
            if part is None:
                terms, _ = distil(out_s, out_t, batch)
            else:
                terms, _ = distil(one_scan(out_s, part), one_scan(out_t, part), of_scan(batch, part))
            found |= {f"{kind}: {name} {changes}: {term}": float(value.detach()) for term, value in terms.items()}
    return found


def _process(rank, folder):
    import torch.distributed as dist

    torch.set_num_threads(1)
    models.cache_clear()
    for kind in KINDS[:3]:  # networks first: the statistics of their norms are those of both scans
        models(kind)
    if rank == 0:  # alone, on as many threads: GID's choice of boxes turns on the last bits
        torch.save(_terms(None), f"{folder}/one.pt")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(_terms(rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_with_a_scan_each_have_the_mean_loss_of_one_with_both(tmp_path):
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    one, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", 0, 1))
    assert one.keys() == first.keys() == second.keys() and len(one) == 3 * 15
    for term, value in one.items():
        assert (first[term] + second[term]) / 2 == pytest.approx(value, rel=1e-4, abs=1e-7), term


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_half_precision_every_term_is_near_float32(kind, dtype):
    """float16 is what a GPU trains in by default. GID picks the places where the models differ most, which may be others then."""
    student, found = models(kind)[1], []
    for half in (False, True):
        with torch.autocast("cpu", dtype, enabled=half):
            out_s, out_t, batch = outputs(kind)
            terms = {(name, key): term for name in METHODS for key, term in method(name, kind)(out_s, out_t, batch)[0].items()}
            terms |= {("detection", key): term for key, term in student.loss(out_s, batch).items()}
        (gradient,) = torch.autograd.grad(sum(terms.values()), out_s.neck)
        assert out_s.neck.dtype == (dtype if half else torch.float32) and gradient.isfinite().all()
        assert all(term.dtype == torch.float32 for term in terms.values())
        found.append({name: float(term.detach()) for name, term in terms.items()})
    exact, rough = found
    for name, value in exact.items():
        assert rough[name] == pytest.approx(value, rel=0.4 if name[0].startswith("gid") else 0.03, abs=1e-3), name
    assert exact["rdd", "feat"] > 1
