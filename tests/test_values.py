"""values.py: what an option may hold, one line for all else."""

import pytest

from cli import InputError
from config import Config, override
from presets import PRESETS, preset
from values import check_values


@pytest.mark.parametrize(("changes", "said"), [
    ({"lr": float("nan")}, "--lr: expected a finite number; found nan"), ({"lr": float("inf")}, "--lr: expected a finite"),
    ({"weight_decay": -1.0}, "--weight-decay: expected a number from 0 on; found -1.0"), ({"seed": -1}, "--seed"),
    ({"rotation": -1.0}, "--rotation"), ({"scaling": 2.0}, "--scaling: expected a number from 0 to 1"),
    ({"voxel_size": (0.0, 0.0, 0.0)}, "--voxel-size: expected a number above 0; found 0.0,0.0,0.0"),
    ({"voxel_size": (0.2,)}, "--voxel-size: expected x,y,z"), ({"point_range": (0.0, 1.0)}, "--point-range"),
    ({"encoder_channels": (16,)}, "--encoder-channels: expected 4 numbers or more; found 16"),
    ({"width": (0.01,)}, "--width: 0.01 leaves a layer of 16 channels none"), ({"down_kernel": 0}, "--down-kernel"),
    ({"down_kernel": 4}, "--down-kernel: expected 2 or 3; found 4"), ({"seed": 2**63}, "--seed: expected a number below 2^63"),
    ({"head_channels": 0}, "--head-channels: expected a whole number from 1 on; found 0"), ({"bev_channels": (0, 0)}, "--bev-"),
    ({"classes": ("Car",) * 3}, "--classes: expected each class once; found Car,Car,Car"), ({"classes": ("Van",)}, "give both"),
    ({"clip": float("nan")}, "--clip"), ({"max_voxels": -1}, "--max-voxels"), ({"max_points": -1}, "--max-points"),
    ({"max_detections": 0}, "--max-detections"),
    ({"data": "nuscenes", "tasks": (("Car",), ("Pedestrian", "Cyclist")), "max_detections": 251}, "at most 250; found 251"),
    ({"nms_iou": -1.0}, "--nms-iou"), ({"alpha1": -1.0}, "--alpha1"),
    ({"proposal_score": 2.0}, "--proposal-score"), ({"score_threshold": 5.0}, "--score-threshold"),
    ({"loc_weight": float("nan")}, "--loc-weight"), ({"fraction": 1.5}, "--fraction"), ({"lam": -0.1}, "--lam"),
])  # fmt: skip
def test_what_makes_no_sense_is_one_line_that_names_the_option(changes, said):
    with pytest.raises(InputError) as error:
        override(Config(), changes)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_holds_what_it_may(name):
    for data in ("kitti", "nuscenes"):
        try:
            cfg = preset(name, data)
        except InputError:  # not made for that data
            continue
        check_values(cfg)
