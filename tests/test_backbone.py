"""Encoders and neck: published shapes and counts; a dense twin of the sparse encoder, plain loops for pillars and neck."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from backbone import BEVBackbone, Input, PillarEncoder, ResidualBlock, VoxelEncoder
from data.batch import collate
from detector import build
from presets import preset
from sheet import count_parameters
from tests.scenes import tiny_config, tiny_frames
from voxelize import Voxels, voxelize


def test_residual_encoder_and_neck_have_the_reference_s_parameter_counts(golden):
    """3-D 2,695,312 with five point features, 2-D 4,576,768 (shared/golden/models/README.md)."""
    counts = json.loads((golden / "models" / "parameter_counts.json").read_text())
    assert counts  # the figures below are this file's, quoted in its README
    cfg = replace(preset("cp-voxel"), point_features=5, voxel_size=(0.1, 0.1, 0.2),
                  point_range=(-51.2, -51.2, -5.0, 51.2, 51.2, 3.0))  # fmt: skip
    encoder = VoxelEncoder(cfg)
    assert count_parameters(encoder) == 2_695_312
    assert encoder.out_channels == 256 and encoder.stride == 8
    neck = BEVBackbone(cfg, 256)
    assert count_parameters(neck) == 4_576_768 and neck.out_channels == 512


def test_plain_encoder_has_second_s_parameter_count():
    """SECOND's 3-D part: 711,872 (4 point features, conv4 64 channels, output 128)."""
    cfg = replace(preset("cp-voxel"), residual=False, encoder_channels=(16, 16, 32, 64, 64, 128))
    assert count_parameters(VoxelEncoder(cfg)) == 711_872


@pytest.mark.parametrize(("down_kernel", "residual"), [(2, False), (3, False), (3, True)])
def test_sparse_encoder_equals_its_dense_twin(down_kernel, residual):
    """The same weights through nn.functional.conv3d on the dense grid, with the set of active sites tracked by hand."""
    torch.manual_seed(0)
    cfg = tiny_config(width=(0.5, 0.5, 0.5), down_kernel=down_kernel, residual=residual)
    encoder = VoxelEncoder(cfg).double().eval()
    with torch.no_grad():  # biases and norms that do something
        for parameter in encoder.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    shape = (21, 16, 24)
    dense_sites = torch.rand(2, *shape) < 0.05
    coords = dense_sites.nonzero()
    features = torch.randn(len(coords), 4, dtype=torch.float64)
    encoder.shape = shape
    got = encoder(Input(None, Voxels(coords, features, None, None), 2, {}))

    x = torch.zeros(2, *shape, 4, dtype=torch.float64)
    x[tuple(coords.T)] = features
    x, active = x.permute(0, 4, 1, 2, 3), dense_sites[:, None].double()

    def block(conv, norm, x, active, plus=0.0):
        if type(conv).__name__ != "SubMConv3d":
            ones = torch.ones(1, 1, *conv.kernel_size, dtype=torch.float64)
            active = (F.conv3d(active, ones, stride=conv.stride, padding=conv.padding) > 0).double()
        y = F.conv3d(x, conv.weight.permute(0, 4, 1, 2, 3), conv.bias, conv.stride, conv.padding)
        y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0, norm.eps)
        return F.relu(y + plus) * active, active

    x, active = block(encoder.conv_input.conv, encoder.conv_input.norm, x, active)
    for stage in encoder.stages:
        for module in stage:
            if isinstance(module, ResidualBlock):
                y, _ = block(module.conv1, module.norm1, x, active)
                x, active = block(module.conv2, module.norm2, y, active, plus=x)
            else:
                x, active = block(module.conv, module.norm, x, active)
    x, _ = block(encoder.conv_out.conv, encoder.conv_out.norm, x, active)
    torch.testing.assert_close(got, x.flatten(1, 2), atol=1e-10, rtol=1e-10)
    assert got.abs().sum() > 0


def test_channel_of_the_bev_map_is_c_times_depth_plus_d():
    cfg = tiny_config()
    encoder = VoxelEncoder(cfg)
    assert encoder.out_channels == 32 * 2
    for name, channels, depth in (("cp-voxel", 128, 2), ("cp-voxel-cpu", 64, 2)):
        assert VoxelEncoder(preset(name)).out_channels == channels * depth


def test_empty_and_single_voxel_scans_train():
    from data import Frame

    cfg = tiny_config()
    model = build(cfg).train()
    empty = Frame("e", torch.zeros(0, 4).numpy(), torch.zeros(0, 7).numpy(), ())
    one = Frame("o", torch.tensor([[1.0, 0.0, -1.0, 0.5]]).numpy(), torch.zeros(0, 7).numpy(), ())
    for frames in ([empty], [empty, empty], [one], [empty, one, *tiny_frames(1)]):
        batch = collate(frames, cfg)
        out = model(model.prepare(batch))
        assert out.neck.shape[0] == len(frames) and out.neck.isfinite().all()
        loss = sum(model.loss(out, batch).values())
        loss.backward()
        assert loss.isfinite()
    model.eval()
    assert all(len(found.boxes) == 0 or found.boxes.isfinite().all() for found in model.decode(model(model.prepare(batch))))


# ------------------------------------------------------------------ pillars


def pillar_encoder(**changes) -> PillarEncoder:
    """In float64, with nothing left at its initial value."""
    cfg = tiny_config(encoder="pillar", **{"voxel_size": (0.4, 0.4, 4.0), "encoder_channels": (12, 10), "width": (1.0,) * 3,
                                           **changes})  # fmt: skip
    torch.manual_seed(0)
    encoder = PillarEncoder(cfg).double()
    for layer in encoder.layers:
        for value in (layer.norm.weight, layer.norm.bias, layer.norm.running_mean, layer.norm.running_var):
            value.data.copy_(torch.rand_like(value) + (0.2 if value is layer.norm.running_var else -0.3))
    return encoder


def pillar_input(encoder: PillarEncoder, points: torch.Tensor, batch_size: int) -> Input:
    return Input(points, voxelize(points, encoder.grid, batch_size, encoder.max_points or None), batch_size, {})


def some_points(n: int, batch_size: int, above_and_below: float = 0.0) -> torch.Tensor:
    """(n, 5) in two clusters of a few pillars each, so that pillars hold from one to many points."""
    generator = torch.Generator().manual_seed(3)
    points = torch.rand(n, 5, generator=generator, dtype=torch.float64)
    points[:, 0] = torch.arange(n) % batch_size
    points[:, 1:3] = points[:, 1:3] * 1.5 + torch.tensor([[2.1, -1.3], [4.7, 3.2]])[torch.arange(n) // 2 % 2]
    points[:, 3] = points[:, 3] * (4 + 2 * above_and_below) - 3 - above_and_below
    return points


def loop_pillars(encoder: PillarEncoder, points: torch.Tensor, batch_size: int) -> torch.Tensor:
    """The canvas, pillar by pillar: a table of rows for each, every row through every layer by itself."""
    x0, y0, z0, _, _, z1 = encoder.grid.point_range
    size_x, size_y, _ = encoder.grid.voxel_size
    tables: dict[tuple, list] = {}
    for b, x, y, z, intensity in points.tolist():
        if encoder.grid.any_height or z0 <= z < z1:
            table = tables.setdefault((int(b), math.floor((y - y0) / size_y), math.floor((x - x0) / size_x)), [])
            if not encoder.max_points or len(table) < encoder.max_points:
                table.append([x, y, z, intensity])
    for (_, i, j), table in tables.items():
        mean = [sum(row[k] for row in table) / len(table) for k in range(3)]
        centre = (x0 + (j + 0.5) * size_x, y0 + (i + 0.5) * size_y, (z0 + z1) / 2)
        for row in table:
            row += [row[k] - mean[k] for k in range(3)] + [row[k] - centre[k] for k in range(3)]
        table += [[0.0] * 10 for _ in range(encoder.max_points - len(table))]
    tables = {cell: torch.tensor(table, dtype=torch.float64) for cell, table in tables.items()}
    for n, layer in enumerate(encoder.layers):
        tables = {cell: table @ layer.linear.weight.T for cell, table in tables.items()}
        rows, norm = torch.cat(list(tables.values())), layer.norm
        mean, var = (rows.mean(0), rows.var(0, unbiased=False)) if encoder.training else (norm.running_mean, norm.running_var)
        for cell, table in tables.items():
            table = (table - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias
            table = table.clamp(min=0)
            highest = table.max(dim=0).values
            last = n == len(encoder.layers) - 1
            tables[cell] = highest if last else torch.cat([table, highest.expand_as(table)], dim=1)
    _, height, width = encoder.grid.shape
    canvas = torch.zeros(batch_size, encoder.out_channels, height, width, dtype=torch.float64)
    for (b, i, j), value in tables.items():
        canvas[b, :, i, j] = value
    return canvas


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("changes", [
    {"max_points": 0}, {"max_points": 4}, {"max_points": 32}, {"max_points": 0, "any_height": True},
    {"max_points": 4, "encoder_channels": (12,)}, {"max_points": 0, "encoder_channels": (12, 8, 6)},
])  # fmt: skip
def test_pillars_equal_a_plain_loop(changes, training):
    """Hard pillars (empty rows take part in the maximum and the statistics) and dynamic ones, up to three layers."""
    encoder = pillar_encoder(**changes).train(training)
    points = some_points(160, 2, above_and_below=1.0)
    x = pillar_input(encoder, points, 2)
    assert x.voxels.counts.min() < 4 <= x.voxels.counts.max()  # some pillars are not full, some are at P = 4
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    expected = loop_pillars(encoder, points, 2)
    torch.testing.assert_close(encoder(x), expected, atol=1e-6, rtol=1e-6)
    assert expected.any() and any((v != before[n]).any() for n, v in encoder.state_dict().items()) == training


def test_empty_rows_take_part():
    """P = 32 or 33, never reached: still not the same pillars, nor those without rows."""
    points = some_points(40, 1)
    a, b, c = ((e := pillar_encoder(max_points=p).train())(pillar_input(e, points, 1)) for p in (32, 33, 0))
    assert (a - b).abs().max() > 1e-3 and (a - c).abs().max() > 1e-3


@pytest.mark.parametrize("max_points", [0, 4])
@pytest.mark.parametrize("training", [False, True])
def test_pillars_of_no_points_one_point_and_one_pillar(max_points, training):
    encoder = pillar_encoder(max_points=max_points).train(training)
    one = torch.tensor([[1.0, 2.2, 0.3, -1.0, 0.5]], dtype=torch.float64)  # of the second scan
    cases = ((one[:0], 0), (one, 1), (one.repeat(3, 1) + torch.tensor([[0], [0], [0]]), 1), (one.repeat(9, 1), 1))
    for points, pillars in cases:
        encoder.zero_grad()
        canvas = encoder(pillar_input(encoder, points, 2))
        assert canvas.shape == (2, 10, 24, 16) and canvas.isfinite().all()
        assert not canvas[0].any() and int(canvas[1].any(dim=0).sum()) <= pillars
        canvas.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())
    torch.testing.assert_close(encoder.eval()(pillar_input(encoder, one, 2)), loop_pillars(encoder, one, 2), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("any_height", [False, True])
def test_points_above_and_below_the_pillars(any_height):
    """Alone in their pillars: with any_height they make pillars, seen with their true height; without, none."""
    encoder = pillar_encoder(max_points=0, any_height=any_height).eval()
    points = torch.tensor([[0, 2.2, 0.3, 1.7, 0.5], [0, 4.2, 0.3, -3.6, 0.5], [0, 4.2, 2.3, -1.0, 0.5]], dtype=torch.float64)
    x = pillar_input(encoder, points, 1)
    assert len(x.voxels.coords) == (3 if any_height else 1)
    torch.testing.assert_close(encoder(x), loop_pillars(encoder, points, 1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("max_points", [0, 4])
def test_pillars_of_two_scans_are_two_batches_of_one(max_points):
    encoder = pillar_encoder(max_points=max_points).eval()
    points = some_points(120, 2)
    both = encoder(pillar_input(encoder, points, 2))
    for b in range(2):
        alone = points[points[:, 0] == b]
        alone[:, 0] = 0
        torch.testing.assert_close(encoder(pillar_input(encoder, alone, 1)), both[b : b + 1])


@pytest.mark.parametrize("max_points", [0, 4])
def test_pillars_have_the_right_gradient(max_points):
    """gradcheck of the whole encoder by each weight, batch statistics included; ties in the maximum are away from here."""
    encoder = pillar_encoder(max_points=max_points, encoder_channels=(4, 3)).train()
    x = pillar_input(encoder, some_points(12, 2), 2)
    names = [name for name, _ in encoder.named_parameters()]
    sums = torch.randn(encoder(x).numel(), 6, dtype=torch.float64)  # of the cells; each by itself takes minutes

    def forward(*values):
        return torch.func.functional_call(encoder, dict(zip(names, values, strict=True)), (x,)).flatten() @ sums

    assert torch.autograd.gradcheck(forward, tuple(p.detach().requires_grad_() for p in encoder.parameters()), atol=1e-4)


def test_pillar_encoders_have_the_published_parameter_counts():
    """PointPillars 768; CenterPoint-Pillar 4,640 with five point features (shared/golden/models/README.md)."""
    assert count_parameters(PillarEncoder(preset("pointpillars"))) == 768
    assert count_parameters(PillarEncoder(preset("cp-pillar-v0.2"))) == 4_640


# ------------------------------------------------------------------ neck


def test_neck_up_strides_equal_plain_sums_over_cells():
    """Down by 2: every output is a weighted sum over 2 x 2 cells; 1: over one; up by 2: every cell makes 2 x 2 of its own."""
    torch.manual_seed(0)
    cfg = tiny_config(bev_layers=(0, 0, 0), bev_strides=(1, 2, 2), bev_channels=(4, 5, 6), up_strides=(0.5, 1.0, 2.0),
                      up_channels=(3, 2, 7), width=(1.0,) * 3)  # fmt: skip
    neck = BEVBackbone(cfg, 8).double().eval()
    for module in neck.modules():
        if hasattr(module, "running_mean"):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 8, 8, 12, dtype=torch.float64)
    got, maps = neck(x), []
    for level, up in zip(neck.levels, neck.ups, strict=True):
        x = level(x)
        weight, n = up[0].weight, up[1]
        if len(maps) == 0:  # (out, in, 2, 2)
            cells = x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2))  # (B, C, H/2, 2, W/2, 2)
            y = torch.einsum("bcipjq,ocpq->boij", cells, weight)
        else:  # (in, out, k, k)
            y = torch.einsum("bcij,copq->boipjq", x, weight).flatten(4, 5).flatten(2, 3)
        scale = (n.weight / (n.running_var + 1e-3).sqrt())[:, None, None]
        maps.append(F.relu((y - n.running_mean[:, None, None]) * scale + n.bias[:, None, None]))
    torch.testing.assert_close(got, torch.cat(maps, dim=1))
    assert got.shape == (2, neck.out_channels, 4, 6) and neck.stride == 2 and neck.out_channels == 12


@pytest.mark.parametrize(("name", "data", "channels", "stride"), [
    ("cp-voxel", "nuscenes", 512, 1), ("second", "kitti", 512, 1), ("pointpillars", "kitti", 384, 2),
    ("cp-pillar", "nuscenes", 384, 1), ("cp-pillar-v0.2", "nuscenes", 384, 4), ("cp-pillar-cpu", "kitti", 96, 2)])  # fmt: skip
def test_necks_of_the_presets_give_one_map_of_their_stride(name, data, channels, stride):
    with torch.device("meta"):
        neck = BEVBackbone(preset(name, data), 64)
        assert neck(torch.empty(1, 64, 32, 48)).shape == (1, channels, 32 // stride, 48 // stride)
    assert neck.out_channels == channels and neck.stride == stride
