"""Presets: every detector and student that has a name.   (reads beside: config.py)

A preset is a function that returns one complete `Config` for a data set; it names what differs from the defaults, and
`python train.py --student cp-voxel-xxs-cpu --print-config` prints the whole.
"""

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from cli import InputError, did_you_mean
from config import READING, Config

KITTI = ("kitti", "sim")
ANCHOR = {"head": "anchor", "alpha1": 0.2}  # the paper's alpha1, which did better than 2 in tuning (docs/experiments.md)

# What CenterPoint changes for nuScenes: ten classes in six task groups, ten sweeps, velocities.
NUSCENES = {
    "data": "nuscenes", "point_features": 5, "fov_only": False, "velocity": True, "sweeps": 10, "flip_x": True, "balance": True,
    "classes": ("car", "truck", "construction_vehicle", "bus", "trailer", "barrier", "motorcycle", "bicycle",
                "pedestrian", "traffic_cone"),
    "tasks": (("car",), ("truck", "construction_vehicle"), ("bus", "trailer"), ("barrier",), ("motorcycle", "bicycle"),
              ("pedestrian", "traffic_cone")),
    "paste": (2, 3, 7, 4, 6, 2, 6, 6, 2, 2), "rotation": 0.3925, "nms_iou": 0.2, "max_detections": 83,
    "loc_weight": 0.25, "code_weights": (1.0,) * 6 + (0.2, 0.2, 1.0, 1.0), "epochs": 20, "lr": 1e-3, "clip": 35.0,
}  # fmt: skip


def cp_voxel(data: str = "kitti") -> Config:
    """CenterPoint-Voxel: residual 8x encoder, centre head; KITTI 0.05 m voxels, nuScenes 0.1 m. GPU."""
    if data == "nuscenes":
        return Config(preset="cp-voxel", **NUSCENES, point_range=(-51.2, -51.2, -5.0, 51.2, 51.2, 3.0),
                      voxel_size=(0.1, 0.1, 0.2), max_points=10, max_voxels=120000)  # fmt: skip
    return Config(preset="cp-voxel")


def cp_voxel_s(data: str = "kitti") -> Config:
    """CP-Voxel-S: the teacher with half of the BEV, neck and head channels. GPU."""
    return replace(cp_voxel(data), preset="cp-voxel-s", width=(1.0, 0.5, 0.5))


def cp_voxel_xs(data: str = "kitti") -> Config:
    """CP-Voxel-XS: 3/4 of the encoder's channels, half of the rest. GPU."""
    return replace(cp_voxel(data), preset="cp-voxel-xs", width=(0.75, 0.5, 0.5))


def cp_voxel_xxs(data: str = "kitti") -> Config:
    """CP-Voxel-XXS: half of the encoder's channels, a quarter of the rest. GPU."""
    return replace(cp_voxel(data), preset="cp-voxel-xxs", width=(0.5, 0.25, 0.25))


def cp_pillar(data: str = "nuscenes") -> Config:
    """CenterPoint-Pillar at 0.32 m, the pillar size that the paper names for its teacher. nuScenes, GPU."""
    # UNSPECIFIED: the paper's pillar grid on nuScenes. Ours: the pillar sizes of its text, strides and points a pillar
    # of the Waymo models whose costs it prints, over +-51.2 m. Its teacher's accuracy is that of a 0.2 m model.
    _check_data("cp-pillar and its students", data, ("nuscenes",))
    return Config(
        preset="cp-pillar", **NUSCENES, encoder="pillar", point_range=(-51.2, -51.2, -5.0, 51.2, 51.2, 3.0),
        voxel_size=(0.32, 0.32, 8.0), max_points=20, max_voxels=60000, encoder_channels=(64, 64), bev_layers=(3, 5, 5),
        bev_strides=(1, 2, 2), bev_channels=(64, 128, 256), up_strides=(1.0, 2.0, 4.0), up_channels=(128, 128, 128),
    )  # fmt: skip


def cp_pillar_v02(data: str = "nuscenes") -> Config:
    """CenterPoint-Pillar as OpenPCDet publishes it: 0.2 m dynamic pillars, neck of stride 4. nuScenes, GPU."""
    return replace(cp_pillar(data), preset="cp-pillar-v0.2", voxel_size=(0.2, 0.2, 8.0), max_points=0, max_voxels=0,
                   any_height=True, bev_strides=(2, 2, 2), up_strides=(0.5, 1.0, 2.0))  # fmt: skip


def cp_pillar_v04(data: str = "nuscenes") -> Config:
    """CP-Pillar-v0.4: the teacher's widths on 0.4 m pillars. nuScenes, GPU."""
    return replace(cp_pillar(data), preset="cp-pillar-v0.4", voxel_size=(0.4, 0.4, 8.0), max_points=28)


def cp_pillar_v048(data: str = "nuscenes") -> Config:
    """CP-Pillar-v0.48: 0.48 m pillars; the range grows to a whole number of them. nuScenes, GPU."""
    return replace(cp_pillar(data), preset="cp-pillar-v0.48", voxel_size=(0.48, 0.48, 8.0), max_points=36,
                   point_range=(-51.84, -51.84, -5.0, 51.84, 51.84, 3.0))  # fmt: skip


def cp_pillar_v064(data: str = "nuscenes") -> Config:
    """CP-Pillar-v0.64: 0.64 m pillars. nuScenes, GPU."""
    return replace(cp_pillar(data), preset="cp-pillar-v0.64", voxel_size=(0.64, 0.64, 8.0), max_points=50)


def second(data: str = "kitti") -> Config:
    """SECOND: plain 8x encoder, anchor head. KITTI, GPU."""
    _check_data("second and its students", data, KITTI)
    return Config(preset="second", **ANCHOR, residual=False, encoder_channels=(16, 16, 32, 64, 64, 128))


def second_s(data: str = "kitti") -> Config:
    """SECOND-S: 3/4 of the encoder's channels, half of the rest. KITTI, GPU."""
    return replace(second(data), preset="second-s", width=(0.75, 0.5, 0.5))


def second_xs(data: str = "kitti") -> Config:
    """SECOND-XS: half of all channels. KITTI, GPU."""
    return replace(second(data), preset="second-xs", width=(0.5, 0.5, 0.5))


def pointpillars(data: str = "kitti") -> Config:
    """PointPillars: 0.16 m pillars, anchor head, neck of stride 2. KITTI, GPU."""
    _check_data("pointpillars and its students", data, KITTI)
    return Config(
        preset="pointpillars", encoder="pillar", **ANCHOR, point_range=(0.0, -39.68, -3.0, 69.12, 39.68, 1.0),
        voxel_size=(0.16, 0.16, 4.0), max_points=32, encoder_channels=(64,), bev_layers=(3, 5, 5), bev_strides=(2, 2, 2),
        bev_channels=(64, 128, 256), up_strides=(1.0, 2.0, 4.0), up_channels=(128, 128, 128), paste=(15, 15, 15),
    )  # fmt: skip


def pointpillars_s(data: str = "kitti") -> Config:
    """PointPillars-S: 3/4 of the pillar encoder's channels, half of the rest. KITTI, GPU."""
    return replace(pointpillars(data), preset="pointpillars-s", width=(0.75, 0.5, 0.5))


def pointpillars_xs(data: str = "kitti") -> Config:
    """PointPillars-XS: half of all channels. KITTI, GPU."""
    return replace(pointpillars(data), preset="pointpillars-xs", width=(0.5, 0.5, 0.5))


def cp_voxel_cpu(data: str = "kitti") -> Config:
    """CP-Voxel sized for minutes on two CPU cores: KITTI 51 m and 0.2 m voxels, nuScenes 38 m and 0.3 m.

    Not the paper's network: its stride-2 layers are 2x2x2, which keeps the number of sites down; the published 3x3x3
    (`--down-kernel 3`) multiplies them; its encoder is plain, not residual, and has three stages (stride 4), not four.
    It pastes many objects into a scene (nuScenes: two to four times CBGS's): in a short run a student learns far more (LOG.md,
    What makes a small student learn more in the same steps?).
    """
    common = {"preset": "cp-voxel-cpu", "max_points": 0, "max_voxels": 0, "encoder_channels": (16, 16, 32, 48, 64),
              "residual": False, "down_kernel": 2, "bev_layers": (3, 3), "bev_channels": (48, 96), "up_channels": (48, 48),
              "head_channels": 32, "rotation": 0.2, "epochs": 8, "batch_size": 2, "eval_every": 4}  # fmt: skip
    if data == "nuscenes":  # 256 x 256 voxels as for KITTI: a BEV of 64 x 64 cells
        return Config(**{**NUSCENES, **common, "balance": False, "sweeps": 3, "lr": 3e-3, "clip": 10.0, "epochs": 4,
                         "eval_every": 2, "paste": (4, 6, 14, 8, 12, 4, 12, 12, 8, 8)},
                      point_range=(-38.4, -38.4, -5.0, 38.4, 38.4, 3.0), voxel_size=(0.3, 0.3, 0.4))  # fmt: skip
    _check_data("cp-voxel-cpu", data, KITTI)
    return Config(**common, point_range=(0.0, -25.6, -3.0, 51.2, 25.6, 1.0), voxel_size=(0.2, 0.2, 0.2), paste=(15, 10, 10))


def cp_voxel_s_cpu(data: str = "kitti") -> Config:
    """CP-Voxel-S of the CPU teacher."""
    return replace(cp_voxel_cpu(data), preset="cp-voxel-s-cpu", width=(1.0, 0.5, 0.5))


def cp_voxel_xs_cpu(data: str = "kitti") -> Config:
    """CP-Voxel-XS of the CPU teacher."""
    return replace(cp_voxel_cpu(data), preset="cp-voxel-xs-cpu", width=(0.75, 0.5, 0.5))


def cp_voxel_xxs_cpu(data: str = "kitti") -> Config:
    """CP-Voxel-XXS of the CPU teacher: the large gap, and the demo's student."""
    return replace(cp_voxel_cpu(data), preset="cp-voxel-xxs-cpu", width=(0.5, 0.25, 0.25))


def second_cpu(data: str = "kitti") -> Config:
    """SECOND for a CPU: the encoder and neck of cp-voxel-cpu under an anchor head."""
    _check_data("second-cpu and its students", data, KITTI)
    return replace(cp_voxel_cpu(data), preset="second-cpu", **ANCHOR)


def second_s_cpu(data: str = "kitti") -> Config:
    """SECOND-S of the CPU teacher."""
    return replace(second_cpu(data), preset="second-s-cpu", width=(0.75, 0.5, 0.5))


def second_xs_cpu(data: str = "kitti") -> Config:
    """SECOND-XS of the CPU teacher."""
    return replace(second_cpu(data), preset="second-xs-cpu", width=(0.5, 0.5, 0.5))


def cp_pillar_cpu(data: str = "kitti") -> Config:
    """CP-Pillar for a CPU: 0.4 m pillars (nuScenes: 0.32 m), neck of stride 2."""
    return replace(cp_voxel_cpu(data), preset="cp-pillar-cpu", encoder="pillar", encoder_channels=(32, 32), bev_strides=(2, 2),
                   voxel_size=(0.32, 0.32, 8.0) if data == "nuscenes" else (0.4, 0.4, 4.0))  # fmt: skip


def cp_pillar_v04_cpu(data: str = "nuscenes") -> Config:
    """CP-Pillar-v0.4 of the CPU teacher. nuScenes: on KITTI the teacher's own pillars are as large."""
    _check_data("cp-pillar-v0.4-cpu", data, ("nuscenes",))
    return replace(cp_pillar_cpu(data), preset="cp-pillar-v0.4-cpu", voxel_size=(0.4, 0.4, 8.0))


def cp_pillar_v064_cpu(data: str = "kitti") -> Config:
    """CP-Pillar-v0.64 of the CPU teacher: another grid, regions meet in metres."""
    teacher = cp_pillar_cpu(data)
    return replace(teacher, preset="cp-pillar-v0.64-cpu", voxel_size=(0.64, 0.64, teacher.voxel_size[2]))


def pointpillars_cpu(data: str = "kitti") -> Config:
    """PointPillars for a CPU: the first layer of cp-pillar-cpu's encoder, and its neck, under an anchor head."""
    _check_data("pointpillars-cpu and its students", data, KITTI)
    return replace(cp_pillar_cpu(data), preset="pointpillars-cpu", **ANCHOR, encoder_channels=(32,))


def pointpillars_s_cpu(data: str = "kitti") -> Config:
    """PointPillars-S of the CPU teacher."""
    return replace(pointpillars_cpu(data), preset="pointpillars-s-cpu", width=(0.75, 0.5, 0.5))


def pointpillars_xs_cpu(data: str = "kitti") -> Config:
    """PointPillars-XS of the CPU teacher."""
    return replace(pointpillars_cpu(data), preset="pointpillars-xs-cpu", width=(0.5, 0.5, 0.5))


def _check_data(name: str, data: str, known: tuple[str, ...]) -> None:
    if data not in known:
        raise InputError(f"{name}: made for {' and '.join(known)}, not for {data}")


PRESETS: dict[str, Callable[..., Config]] = {f().preset: f for f in (
    cp_voxel, cp_voxel_s, cp_voxel_xs, cp_voxel_xxs, cp_pillar, cp_pillar_v02, cp_pillar_v04, cp_pillar_v048,
    cp_pillar_v064, second, second_s, second_xs, pointpillars, pointpillars_s, pointpillars_xs,
    cp_voxel_cpu, cp_voxel_s_cpu, cp_voxel_xs_cpu, cp_voxel_xxs_cpu, second_cpu, second_s_cpu, second_xs_cpu, cp_pillar_cpu,
    cp_pillar_v04_cpu, cp_pillar_v064_cpu, pointpillars_cpu, pointpillars_s_cpu, pointpillars_xs_cpu)}  # fmt: skip
DEFAULT_PAIR = {"sim": ("cp-voxel-cpu", "cp-voxel-xxs-cpu"), "kitti": ("cp-voxel", "cp-voxel-s"),
                "sim-nuscenes": ("cp-voxel-cpu", "cp-voxel-xxs-cpu"), "nuscenes": ("cp-voxel", "cp-voxel-s")}  # fmt: skip

# `--reading NAME`: consistent choices where the paper is silent, and where we depart from it. Each says all of them, so that it
# also holds for a checkpoint that was trained with another.
DEFAULT_READING = {f.name: f.default for f in fields(Config) if f.metadata.get("group") == READING}
DEFAULT_ROOT = {"sim": Path("datasets/sim-kitti"), "sim-nuscenes": Path("datasets/sim-nuscenes"),
                "kitti": Path("datasets/kitti"), "nuscenes": Path("datasets/nuscenes")}  # fmt: skip
READINGS: dict[str, dict[str, Any]] = {
    "default": DEFAULT_READING,
    "paper-weights": {**DEFAULT_READING, "psi_norm": True, "alpha1": 0.2, "alpha2": 0.2},
    "printed": {**DEFAULT_READING, "normalise": "softmax", "softmax_axis": "channel", "psi_order": "psi-first", "psi_norm": True,
                "select": "threshold", "distance": "norm", "regions": "proposals", "p_cls": "sum", "tau": 4.0,
                "lam": 0.1, "alpha1": 0.2, "alpha2": 0.2},
}  # fmt: skip


def reading(name: str | None, head: str) -> dict[str, Any]:
    """What `--reading NAME` changes in the config of a student with that head, which the default's alpha1 goes by."""
    changes = READINGS.get(name, {})
    return {**changes, "alpha1": ANCHOR["alpha1"]} if (name, head) == ("default", "anchor") else changes


def preset(name: str, data: str = "") -> Config:
    """The complete config of a preset, for its own data set or for `data`.

    Raises InputError with the nearest name when there is no such preset, or when it is not made for that data set.
    """
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}{did_you_mean(name, PRESETS)}")
    if data == "sim-nuscenes":
        return replace(PRESETS[name]("nuscenes"), data=data)
    return PRESETS[name](data) if data else PRESETS[name]()


def scenes_of(teacher: Config, student: Config, given: Iterable[str]) -> dict[str, Any]:
    """What the student of a trained teacher takes over from it, where `given`, the options of the command, says nothing else:
    on which scenes it was trained, and how they are read. Raises InputError when the scenes are not where they were."""
    if student.data != teacher.data:
        return {}
    scenes = {name: getattr(teacher, name) for name in ("root", "frames", "version", "sweeps", "fov_only") if name not in given}
    root = scenes.get("root", "")
    if root == str(DEFAULT_ROOT[teacher.data]):  # the simulator makes it where it is missing
        scenes["root"] = ""
    elif root and not Path(root).is_dir():
        raise InputError(f"the teacher was trained on {root}, which is not there; expected the --root to train its student on")
    return scenes
