"""Encoder and neck: the published shapes, channels and counts; a dense twin of the sparse encoder."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from backbone import BEVBackbone, VoxelEncoder
from config import preset
from data.batch import collate
from detector import build, count_parameters
from sparse import SparseTensor
from tests.scenes import tiny_config, tiny_frames


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


@pytest.mark.parametrize("down_kernel", [2, 3])
def test_sparse_encoder_equals_its_dense_twin(down_kernel):
    """The same weights through nn.functional.conv3d on the dense grid, with the set of active sites tracked by hand."""
    torch.manual_seed(0)
    cfg = tiny_config(width=(0.5, 0.5, 0.5), down_kernel=down_kernel)
    encoder = VoxelEncoder(cfg).double().eval()
    shape = (21, 16, 24)
    dense_sites = torch.rand(2, *shape) < 0.05
    coords = dense_sites.nonzero()
    features = torch.randn(len(coords), 4, dtype=torch.float64)
    got = encoder(SparseTensor(features, coords, shape, 2))

    x = torch.zeros(2, *shape, 4, dtype=torch.float64)
    x[tuple(coords.T)] = features
    x, active = x.permute(0, 4, 1, 2, 3), dense_sites[:, None].double()

    def block(module, x, active):
        conv = module.conv
        weight = conv.weight.permute(0, 4, 1, 2, 3)
        submanifold = type(conv).__name__ == "SubMConv3d"
        if not submanifold:
            ones = torch.ones(1, 1, *conv.kernel_size, dtype=torch.float64)
            active = (F.conv3d(active, ones, stride=conv.stride, padding=conv.padding) > 0).double()
        y = F.conv3d(x, weight, None, conv.stride, conv.padding)
        n = module.norm
        y = F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, False, 0, n.eps)
        return F.relu(y) * active, active

    x, active = block(encoder.conv_input, x, active)
    for stage in encoder.stages:
        for module in stage:
            x, active = block(module, x, active)
    x, _ = block(encoder.conv_out, x, active)
    torch.testing.assert_close(got, x.flatten(1, 2), atol=1e-10, rtol=1e-10)
    assert got.abs().sum() > 0


def test_channel_of_the_bev_map_is_c_times_depth_plus_d():
    cfg = tiny_config()
    encoder = VoxelEncoder(cfg)
    assert encoder.out_channels == 32 * 2 and encoder._out_depth(cfg, 3) == 2
    for name, depth in (("cp-voxel", 2), ("cp-voxel-cpu", 2)):
        cfg = preset(name)
        assert VoxelEncoder._out_depth(cfg, len(cfg.encoder_channels) - 2) == depth


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
