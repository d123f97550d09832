"""Values: what the fields of a config may hold, and how text becomes it.   (reads beside: config.py, whose `override` asks)

One table of lower and upper bounds, and what several fields have to agree on. What concerns the network as a whole, such as
strides that fit a range, is asked where it is built (`detector.check`). And what stays of a config that takes some of its
classes only (`of_classes`).
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_args, get_origin

from cli import InputError, did_you_mean

if TYPE_CHECKING:
    from config import Config

ABOVE_0, FROM_0, FROM_1, SHARE = "a number above 0", "a number from 0 on", "a whole number from 1 on", "a number from 0 to 1"
HOLDS = {
    ABOVE_0: lambda x: x > 0, FROM_0: lambda x: x >= 0, FROM_1: lambda x: x >= 1, SHARE: lambda x: 0 <= x <= 1,
}  # fmt: skip
BOUNDS = {
    ABOVE_0: "lr clip tau fraction kd_weight voxel_size width up_strides",
    FROM_0: "seed rotation translation paste max_points max_voxels weight_decay loc_weight code_weights alpha1 alpha2 lam "
            "circle_nms",
    FROM_1: "epochs batch_size eval_every log_every sweeps roi_size proposals max_detections point_features encoder_channels "
            "bev_strides bev_channels up_channels head_channels",
    SHARE: "fraction scaling nms_iou score_threshold proposal_score label_score",
}  # fmt: skip


def parse_as(kind: Any) -> Callable[[str], Any]:
    """How an option's text becomes a value of its field's type: bool, tuple[float, ...], str, ..."""
    if kind is bool:
        return _parse_bool
    return _parse_several(get_args(kind)[0]) if get_origin(kind) is tuple else kind


def _parse_bool(text: str) -> bool:
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected on or off, found {text!r}")


def _parse_several(item: type) -> Callable[[str], tuple]:
    def parse(text: str) -> tuple:
        try:
            return tuple(item(part.strip()) for part in text.split(",") if part.strip())
        except ValueError:
            what = {int: "whole numbers", float: "numbers"}[item]  # of str there is no wrong one
            raise argparse.ArgumentTypeError(f"expected {what} with commas between them, found {text!r}") from None

    return parse


def check_values(cfg: "Config") -> None:
    """Raises InputError, one line that names the option, for an unknown choice or a value that makes no sense."""
    for f in fields(cfg):
        value, option = getattr(cfg, f.name), _option(f.name)
        if f.metadata.get("choices") and value not in f.metadata["choices"]:
            raise InputError(f"{option}: unknown value {value!r}{did_you_mean(value, f.metadata['choices'])}")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise InputError(f"{option}: expected a finite number; found {number}")
    for rule, names in BOUNDS.items():
        for name in names.split():
            value = getattr(cfg, name)
            if not all(HOLDS[rule](number) for number in (value if isinstance(value, tuple) else (value,))):
                raise InputError(f"{_option(name)}: expected {rule}; found {_shown(value)}")
    _agree(cfg)


def of_classes(cfg: "Config", classes: tuple[str, ...]) -> dict[str, Any]:
    """Some of a config's classes: what stays of the fields that say something of each (--classes Car)."""
    if classes == cfg.classes or not set(classes) <= set(cfg.classes):
        return {}
    rows = [cfg.classes.index(name) for name in classes]
    tasks = (tuple(name for name in task if name in classes) for task in cfg.tasks)
    return {**{name: tuple(getattr(cfg, name)[row] for row in rows) for name in ("anchors", "paste")
               if len(getattr(cfg, name)) == len(cfg.classes)}, "tasks": tuple(filter(None, tasks)) or ((),)}  # fmt: skip


def _agree(cfg: "Config") -> None:
    """What concerns a field's length, or several fields."""
    if len(cfg.width) != 3:
        raise InputError(f"--width: expected one factor, or three (encoder, BEV, head); found {_shown(cfg.width)}")
    if len(cfg.voxel_size) != 3:
        raise InputError(f"--voxel-size: expected x,y,z in metres; found {_shown(cfg.voxel_size)}")
    if len(cfg.point_range) != 6 or any(cfg.point_range[i] >= cfg.point_range[i + 3] for i in range(3)):
        raise InputError("--point-range: expected x0,y0,z0,x1,y1,z1 with minimum below maximum; "
                         f"found {_shown(cfg.point_range)}")  # fmt: skip
    if cfg.down_kernel not in (2, 3):  # of another size a stride-2 layer would not halve the grid
        raise InputError(f"--down-kernel: expected 2 or 3; found {cfg.down_kernel}")
    if cfg.seed >= 2**63:
        raise InputError(f"--seed: expected a number below 2^63; found {cfg.seed}")
    if len(set(cfg.classes)) != len(cfg.classes) or not cfg.classes:
        raise InputError(f"--classes: expected each class once; found {_shown(cfg.classes)}")
    if len(cfg.paste) != len(cfg.classes):
        raise InputError(f"--paste: expected one count, or one per class ({len(cfg.classes)}); found {_shown(cfg.paste)}; "
                         "give both --classes and --paste")  # fmt: skip
    if cfg.circle_nms and len(cfg.circle_nms) != len(cfg.task_classes):
        raise InputError(f"--circle-nms: expected one number per task ({len(cfg.task_classes)}); found {_shown(cfg.circle_nms)}")
    if len(cfg.label_score) not in (1, len(cfg.classes)):
        raise InputError(f"--label-score: expected one score, or one per class ({len(cfg.classes)}); "
                         f"found {_shown(cfg.label_score)}")  # fmt: skip
    if cfg.layout == "nuscenes" and cfg.max_detections * len(cfg.task_classes) > 500:
        raise InputError(f"--max-detections: nuScenes takes 500 boxes of a frame, so of each of {len(cfg.task_classes)} tasks at "
                         f"most {500 // len(cfg.task_classes)}; found {cfg.max_detections}")  # fmt: skip
    stages = 4 if cfg.encoder == "voxel" else 1
    if len(cfg.encoder_channels) < stages:
        raise InputError(f"--encoder-channels: expected {stages} numbers or more; found {_shown(cfg.encoder_channels)}")
    for part, channels in enumerate((cfg.encoder_channels, (*cfg.bev_channels, *cfg.up_channels), (cfg.head_channels,))):
        if min(cfg.widths(part, channels)) < 1:
            raise InputError(f"--width: {cfg.width[part]:g} leaves a layer of {min(channels)} channels none")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
