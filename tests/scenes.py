"""What several tests share: tiny frames and configs (clusters on a plane), and a comparison of nested numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from config import Config
from data import Frame
from data.batch import Batch
from data.scanner import rotations
from data.shapes import BALL
from presets import preset


def tiny_config(**changes) -> Config:
    """The CPU student on a small, non-square range: 8 x 12 BEV cells."""
    small = dict(point_range=(0.0, -4.8, -3.0, 6.4, 4.8, 1.0), paste=(0, 0, 0), batch_size=2, epochs=2, eval_every=2,
                 log_every=1)  # fmt: skip
    return replace(preset("cp-voxel-xxs-cpu"), **{**small, "method": "none", **changes})


def tiny_frame(seed: int) -> Frame:
    """A noisy ground plane, a car and a pedestrian, with their boxes."""
    rng = np.random.default_rng(seed)
    ground = rng.uniform((0, -4.8, -1.75, 0), (6.4, 4.8, -1.7, 0.4), (400, 4))
    boxes = np.array([[3 + rng.uniform(-1, 1), -2, -1, 3.9, 1.6, 1.5, rng.uniform(-3, 3)],
                      [2 + rng.uniform(-1, 1), 3, -0.85, 0.8, 0.6, 1.7, 0.5]])  # fmt: skip
    clusters = [box[:3] + rng.uniform(-0.5, 0.5, (150, 3)) * box[3:6].min() for box in boxes]
    objects = np.concatenate([np.concatenate([c, rng.uniform(0, 1, (150, 1))], axis=1) for c in clusters])
    points = np.concatenate([ground, objects]).astype(np.float32)
    return Frame(f"{seed:06d}", points, boxes.astype(np.float32), ("Car", "Pedestrian"))


def tiny_frames(n: int) -> list[Frame]:
    return [tiny_frame(i) for i in range(n)]


def few_points(cfg: Config, seed: int = 0) -> Batch:
    """Two scans of random points around one object of every class."""
    g = torch.Generator().manual_seed(seed)
    points, boxes, labels = [], [], []
    for scan in range(2):
        n = len(cfg.classes)
        box = torch.cat([torch.rand(n, 2, generator=g) * 10 - 5, torch.full((n, 1), -1.0),
                         torch.rand(n, 3, generator=g) + 1, torch.rand(n, 1, generator=g) * 6 - 3], dim=1)  # fmt: skip
        box = torch.cat([box, torch.randn(n, 2, generator=g)], dim=1) if cfg.velocity else box
        xyz = (box[:, None, :3] + torch.randn(n, 60, 3, generator=g) * 0.5).flatten(0, 1)
        rest = torch.rand(len(xyz), cfg.point_features - 3, generator=g)
        points.append(torch.cat([torch.full((len(xyz), 1), float(scan)), xyz, rest], dim=1))
        boxes.append(box)
        labels.append(torch.arange(n))
    return Batch(["0", "1"], torch.cat(points), boxes, labels, {})


def assert_same(found, expected, tolerance: float, where: tuple = ()) -> None:
    """Same keys, same None, numbers within the tolerance."""
    if isinstance(expected, dict):
        assert isinstance(found, dict) and set(found) == set(expected), (where, found, expected)
        for key in expected:
            assert_same(found[key], expected[key], tolerance, (*where, key))
    elif expected is None or found is None:
        assert found is expected, (where, found, expected)
    else:
        assert found == pytest.approx(expected, abs=tolerance), where


def extent(parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest x, y, z (3,) that the parts of a simulated thing reach, exactly (a post as its box)."""
    rotation = rotations(parts)
    ball = np.sqrt(((rotation * parts["half"][:, None]) ** 2).sum(-1))
    reach = np.where((parts["shape"] == BALL)[:, None], ball, (np.abs(rotation) * parts["half"][:, None]).sum(-1))
    return (parts["centre"] - reach).min(0), (parts["centre"] + reach).max(0)
