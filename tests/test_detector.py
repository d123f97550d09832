"""The detector as a whole: every preset's network trains and decodes, inputs are shared, and configs that fit no network."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cli import InputError
from config import Config
from data import Frame
from data.batch import Batch, collate
from detector import Detector, build
from presets import PRESETS, preset
from tests.scenes import tiny_config, tiny_frames

EVERY = [(name, preset(name).data) for name in PRESETS]
EVERY += [(name, "nuscenes") for name in ("cp-voxel", "cp-voxel-s", "cp-voxel-xs", "cp-voxel-xxs")]
KITTI_PILLAR = {"encoder": "pillar", "voxel_size": (0.4, 0.4, 4.0), "encoder_channels": (32, 32), "bev_strides": (2, 2)}


def cropped(cfg: Config) -> Config:
    """The same network on a range of 2 x 3 of its coarsest cells. Only the range is small: widths and cells are the preset's."""
    coarsest = 2 ** (len(cfg.encoder_channels) - 3) if cfg.encoder == "voxel" else 1
    for stride in cfg.bev_strides:
        coarsest *= stride
    x, y = cfg.voxel_size[0] * coarsest, cfg.voxel_size[1] * coarsest
    low, high = cfg.point_range[2], cfg.point_range[5]
    return replace(cfg, point_range=(0.0, -1.5 * y, low, 2 * x, 1.5 * y, high), score_threshold=0.005, max_detections=5)


def two_scans(cfg: Config) -> Batch:
    """Random points, and a box of the first and one of the last class in the first scan; the second has no objects."""
    rng = np.random.default_rng(0)
    low, high = np.array(cfg.point_range[:3]), np.array(cfg.point_range[3:])
    frames = []
    for n, names in enumerate(((cfg.classes[0], cfg.classes[-1]), ())):
        points = np.hstack([rng.uniform(low, high, (300, 3)), rng.uniform(0, 1, (300, cfg.point_features - 3))])
        centre = low + (high - low) * (0.3, 0.4, 0.5)
        box = np.array([*centre, 1.9, 0.8, 1.6, 0.3, *((1.5, np.nan) if cfg.velocity else ())])
        frames.append(Frame(f"{n}", points.astype(np.float32), np.tile(box, (len(names), 1)).astype(np.float32), names))
    return collate(frames, cfg)


@pytest.mark.parametrize(("name", "data"), EVERY)
def test_every_preset_trains_a_step_and_decodes(name, data):
    """All parameters get a finite gradient, a short step downhill lowers the loss, boxes have the data set's columns."""
    cfg = cropped(preset(name, data))
    model = build(cfg).train()
    batch = two_scans(cfg)
    losses = model.loss(model(model.prepare(batch)), batch)
    before = sum(losses.values())
    before.backward()
    assert before.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    steepness = sum(p.grad.square().sum() for p in model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p -= 1e-3 * float(before) / steepness * p.grad
        after = sum(model.loss(model(model.prepare(batch)), batch).values())
    assert 0.99 * before < after < before
    assert set(losses) == ({"cls", "reg"} if cfg.head == "center" else {"cls", "reg", "dir"})
    found = model.eval().decode(model(model.prepare(batch)))
    assert len(found) == 2 and all(d.boxes.shape == (len(d.scores), 9 if cfg.velocity else 7) for d in found)
    assert all(len(d.boxes) > 0 and d.boxes.isfinite().all() and d.labels.max() < len(cfg.classes) for d in found)


@pytest.mark.parametrize(("name", "data"), EVERY)
def test_every_preset_s_network_covers_its_range_exactly(name, data):
    """At its full size, without memory for it: cells of the neck x their size = the range."""
    with torch.device("meta"):
        model = Detector(preset(name, data))
    cfg, g = model.cfg, model.head.geometry
    assert (g.x0, g.y0) == cfg.point_range[:2]
    for axis, cell in enumerate((g.cell_x, g.cell_y)):
        cells = (cfg.point_range[axis + 3] - cfg.point_range[axis]) / cell
        assert cells == pytest.approx(round(cells), abs=1e-6) and cells >= 16


@pytest.mark.parametrize(("name", "data", "cells"), [
    ("second", "kitti", (200, 176)), ("pointpillars", "kitti", (248, 216)), ("cp-pillar-v0.2", "nuscenes", (128, 128)),
    ("cp-voxel", "nuscenes", (128, 128)), ("cp-pillar-v0.48", "nuscenes", (216, 216))])  # fmt: skip
def test_size_of_the_published_maps(name, data, cells):
    with torch.device("meta"):
        model = Detector(preset(name, data))
    _, height, width = model.grid.shape
    stride = model.encoder.stride * model.backbone.stride
    assert (height / stride, width / stride) == cells


def test_weights_depend_on_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = build(tiny_config()), build(tiny_config()), build(tiny_config(seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    key = "backbone.levels.0.0.0.weight"
    assert torch.equal(a.state_dict()[key], b.state_dict()[key])
    assert not torch.equal(a.state_dict()[key], c.state_dict()[key])


def test_a_student_that_reads_its_teacher_s_input_gives_the_same_output():
    teacher, student = build(tiny_config(width=(1.0, 1.0, 1.0))).eval(), build(tiny_config()).eval()
    batch = collate(tiny_frames(2), student.cfg)
    assert teacher.shares_input(student)
    alone = student(student.prepare(batch))
    x = student.prepare(batch)
    teacher(x)
    shared = student(x)
    assert torch.equal(alone.neck, shared.neck)


@pytest.mark.parametrize("changes", [
    {"voxel_size": (0.1, 0.2, 0.2)}, {"point_range": (0.0, -4.8, -3.0, 12.8, 4.8, 1.0)}, {"max_points": 5}, {"max_voxels": 9},
    {"down_kernel": 3}, {"point_features": 3}, {**KITTI_PILLAR, "point_range": (0.0, -4.8, -3.0, 6.4, 4.8, 1.0)},
], ids=lambda changes: next(iter(changes)))  # fmt: skip
def test_an_input_is_shared_only_where_cells_and_rule_books_are_the_same(changes):
    model, other = build(tiny_config()), build(tiny_config(**changes))
    assert not model.shares_input(other) and not other.shares_input(model) and other.shares_input(build(other.cfg))


def test_any_height_is_another_input():
    pillars = {**KITTI_PILLAR, "point_range": (0.0, -4.8, -3.0, 6.4, 4.8, 1.0)}
    inside, every = (build(tiny_config(**pillars, any_height=any_height)) for any_height in (False, True))
    assert not inside.shares_input(every) and not every.shares_input(inside)


def test_points_and_voxels_are_capped_as_the_options_say():
    batch = collate(tiny_frames(2), tiny_config())
    every = build(tiny_config()).prepare(batch).voxels
    few = build(tiny_config(max_voxels=9)).prepare(batch).voxels
    assert len(every.coords) > 100 and len(few.coords) == 18
    thin = build(tiny_config(max_points=1)).prepare(batch).voxels
    assert torch.equal(thin.coords, every.coords) and not torch.equal(thin.features, every.features)
    kept = {tuple(point) for point in batch.points[:, 1:].tolist()}
    assert all(tuple(feature) in kept for feature in thin.features.tolist()), "of one point a mean is that point"


def test_batch_of_two_is_two_batches_of_one():
    model = build(tiny_config()).eval()
    frames = tiny_frames(2)
    both = model(model.prepare(collate(frames, model.cfg))).neck
    for b, frame in enumerate(frames):
        alone = model(model.prepare(collate([frame], model.cfg))).neck
        torch.testing.assert_close(both[b : b + 1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("changes", "hint"), [
    ({"point_range": (0.0, -4.8, -3.0, 6.5, 4.8, 1.0)}, "range along x is 4.062 cells of 1.6 m"),
    ({"point_range": (0.0, -4.8, -3.0, 7.2, 4.8, 1.0), "bev_strides": (2, 2)}, "range along x is 2.250 cells of 3.2 m"),
    ({"point_range": (0.0, -4.0, -3.0, 6.4, 4.8, 1.0)}, "range along y"),
    ({"point_range": (0.0, -4.8, -3.0, 6.4, 4.8, 1.1)}, "range along z is 20.500 cells of 0.2 m"),
    ({**KITTI_PILLAR, "voxel_size": (0.4, 0.3, 4.0), "bev_strides": (1, 2)}, None),
    ({**KITTI_PILLAR, "voxel_size": (0.4, 0.36, 4.0)}, "range along y"),
    ({**KITTI_PILLAR, "voxel_size": (0.4, 0.4, 2.0)}, "a pillar is 2 m high; expected the height of the range"),
    ({**KITTI_PILLAR, "voxel_size": (0.4, 0.4, 8.0)}, "range along z"),
    ({"up_strides": (1.5, 3.0)}, "--up-strides: expected whole numbers, or 1 over one; found 1.5,3.0"),
    ({"bev_strides": (1, 1), "up_strides": (0.5, 0.5), "point_range": (0.0, -4.8, -3.0, 7.2, 4.8, 1.0)}, "x is 4.500 cells"),
    ({"tasks": (("Car",), ("Pedestrian",))}, "tasks hold"),
    ({"tasks": (("Car",), ("Car", "Pedestrian", "Cyclist"))}, "tasks hold"),
    ({"tasks": (("Car",), ("Pedestrian", "Cyclist", "Van"))}, "tasks hold"),
    ({"head": "anchor", "classes": ("Car",), "paste": (0,)}, "3 anchors for 1 classes"),
    ({"velocity": True}, "--code-weights: expected 10 weights, found 8"),
    ({"code_weights": (1.0,) * 10}, "--code-weights: expected 8 weights, found 10"),
])  # fmt: skip
def test_a_config_that_builds_no_model_is_refused(changes, hint):
    if hint is None:  # the same change made fitting: the rule is not simply "no"
        assert build(tiny_config(**changes))
        return
    with pytest.raises(InputError, match=hint) as error:
        build(tiny_config(**changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("changes", "hint"), [
    pytest.param({"voxel_size": (0.2, 0.2, 2.0)}, "3 layers of voxels along z are too few for 3 stages",
                 id="too few cells along z for the strides: no channels are left"),
    pytest.param({"up_strides": (1.0, 4.0)}, r"neck's levels would have strides \[1.0, 0.5\]", id="levels of different sizes"),
    pytest.param({"bev_layers": (3,)}, "--up-channels a level; found 1, 2, 2, 2, 2", id="one level too few"),
    pytest.param({**KITTI_PILLAR, "width": (0.3, 0.5, 0.5)}, "odd number of channels at --width 0.3",
                 id="an odd width cannot be halved between points and maxima"),
])  # fmt: skip
def test_a_config_whose_layers_do_not_meet_is_refused(changes, hint):
    with pytest.raises(InputError, match=hint):
        build(tiny_config(**changes))


@pytest.mark.parametrize("changes", [{}, KITTI_PILLAR], ids=["voxels", "pillars"])
def test_bfloat16_is_for_the_dense_layers_and_near_float32(changes):
    """Eight bits of mantissa: errors of some 0.4 % a value. The encoder and the maps stay float32."""
    cfg = tiny_config(**changes)
    model, batch = build(cfg), collate(tiny_frames(2), cfg)
    encoded = []
    model.encoder.register_forward_hook(lambda _module, _inputs, bev: encoded.append(bev))
    exact = model(model.prepare(batch))
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(model.prepare(batch))
    assert torch.equal(*encoded) and encoded[1].dtype == torch.float32 and rough.neck.dtype == torch.bfloat16
    assert all(m.dtype == torch.float32 for task in rough.maps for m in task.values())
    error = (rough.neck.float() - exact.neck).norm() / exact.neck.norm()
    assert 1e-4 < error < 0.02
    sum(model.loss(rough, batch).values()).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_equals_cpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # its default, True, rounds to 11 bits
    cfg = replace(tiny_config(), amp="off")
    batch = collate(tiny_frames(2), cfg)
    cpu, cuda = build(cfg).eval(), build(cfg).eval().cuda()
    a, b = cpu(cpu.prepare(batch)).neck, cuda(cuda.prepare(batch.to(torch.device("cuda")))).neck.cpu()
    torch.testing.assert_close(a, b, atol=1e-3 * float(a.abs().max()), rtol=1e-3)
