"""Configuration: one dataclass, printed group by group.   (reads after: data/__init__.py, cli.py  next: presets.py, boxes.py)

Its defaults are CenterPoint-Voxel on KITTI; a preset changes some of them. The command line is built from the same fields: each
with a help text is an option. Only the standard library is imported here, so `--help` answers at once. On a first reading
leave out the groups of distillation: they belong to rdd.py.
"""

import argparse
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from cli import InputError, did_you_mean
from values import check_values, of_classes, parse_as


def opt(default: Any, help: str, group: str = "", choices: tuple[str, ...] = ()) -> Any:  # noqa: A002 (argparse's word)
    """A field of `Config` that is also an option of the command line."""
    return field(default=default, metadata={"help": help, "group": group, "choices": choices})


# SECOND's and PointPillars' anchors for KITTI: one size a class, at two headings.
ANCHORS = ((3.9, 1.6, 1.56, -1.78, 0.6, 0.45), (0.8, 0.6, 1.73, -0.6, 0.5, 0.35), (1.76, 0.6, 1.73, -0.6, 0.5, 0.35))

GROUPS = DATA, MODEL, OPTIM, DISTIL, READING, RUN = "data", "model", "optimisation", "distillation", "reading of RDD", "run"
# What a student can learn from its teacher, by publication (baselines.py)
METHODS = ("hinton", "hint", "mimic", "fg", "gid-f", "gid-l", "lad", "pp-logit", "point-distiller", "rdd")


@dataclass(frozen=True)
class Config:
    """Everything one training run depends on. Units: metres, radians, seconds unless the help says otherwise."""

    preset: str = "custom"  # which preset function made it; informative only
    # ---- data: the same for teacher and student
    data: str = opt("sim", "data set; sim and sim-nuscenes are made by the embedded simulator, in KITTI's and nuScenes' layouts",
                    DATA, ("sim", "sim-nuscenes", "kitti", "nuscenes"))
    root: str = opt("", "folder of the data set; simulated ones are made on first use (default datasets/sim-...)", DATA)
    frames: tuple[str, ...] = opt((), "train AND evaluate on these frames only, e.g. 000000,000003", DATA)
    version: str = opt("v1.0-trainval", "nuScenes: whose tables; v1.0-mini, v1.0-trainval, v1.0-test", DATA)
    sweeps: int = opt(1, "nuScenes: scans merged into one frame, the key frame counted; published: 10", DATA)
    classes: tuple[str, ...] = opt(("Car", "Pedestrian", "Cyclist"), "what is detected, in label order", DATA)
    fov_only: bool = opt(True, "keep only points that fall into the camera image, as KITTI's labels do", DATA)
    flip: bool = opt(True, "augmentation: mirror y with probability 1/2", DATA)
    flip_x: bool = opt(False, "augmentation: mirror x with probability 1/2; nuScenes: on", DATA)
    rotation: float = opt(0.785, "augmentation: yaw of the whole scene, uniform in +- this", DATA)
    scaling: float = opt(0.05, "augmentation: size of the whole scene, uniform in 1 +- this", DATA)
    translation: float = opt(0.0, "augmentation: shift of the whole scene, m, one standard deviation per axis", DATA)
    balance: bool = opt(False, "class-balanced resampling of the training frames (CBGS); nuScenes: on", DATA)
    paste: tuple[int, ...] = opt((20, 15, 15), "augmentation: objects per class after ground-truth paste; 0 = off", DATA)
    # ---- model
    encoder: str = opt("voxel", "points to bird's-eye view: sparse 3-D convolutions, or pillars", MODEL, ("voxel", "pillar"))
    head: str = opt("center", "bird's-eye view to boxes: peaks of a heat map, or anchors", MODEL, ("center", "anchor"))
    point_features: int = opt(4, "columns of a point: x, y, z, intensity; nuScenes: and time lag", MODEL)
    point_range: tuple[float, ...] = opt((0.0, -40.0, -3.0, 70.4, 40.0, 1.0), "x, y, z minimum, then maximum", MODEL)
    voxel_size: tuple[float, ...] = opt((0.05, 0.05, 0.1), "x, y, z; a pillar is as high as the range", MODEL)
    any_height: bool = opt(False, "pillars take points above and below the range too", MODEL)
    max_points: int = opt(5, "points of a voxel that are used, the first ones; 0 = all", MODEL)
    # DIFFERS: OpenPCDet keeps 16000 voxels of a KITTI scan in training, 40000 in testing (nuScenes: 90000, 120000). Ours: one
    # number for both, 40000 (nuScenes 120000).
    max_voxels: int = opt(40000, "voxels kept of one scan; 0 = all", MODEL)
    width: tuple[float, ...] = opt((1.0, 1.0, 1.0), "channel factor of encoder, BEV backbone, head: makes a student", MODEL)
    encoder_channels: tuple[int, ...] = opt((16, 16, 32, 64, 128, 128), "voxel: input, one per stage, output; "
                                            "pillar: one per layer; at width 1", MODEL)  # fmt: skip
    residual: bool = opt(True, "two residual blocks a stage (CenterPoint) instead of plain convolutions (SECOND)", MODEL)
    down_kernel: int = opt(3, "kernel of stride-2 sparse layers: 3 as published; 2 dilates no sites, on CPUs 5x as fast", MODEL)
    bev_layers: tuple[int, ...] = opt((5, 5), "3x3 convolutions a level after its first", MODEL)
    bev_strides: tuple[int, ...] = opt((1, 2), "stride of each level", MODEL)
    bev_channels: tuple[int, ...] = opt((128, 256), "channels of each level, at width 1", MODEL)
    up_strides: tuple[float, ...] = opt((1.0, 2.0), "upsampling of each level into the neck; 0.5 = downsampling", MODEL)
    up_channels: tuple[int, ...] = opt((256, 256), "channels each level gives to the neck, at width 1", MODEL)
    head_channels: int = opt(64, "channels of the centre head's convolutions, at width 1", MODEL)
    tasks: tuple[tuple[str, ...], ...] = ((),)  # groups of classes, one sub-head each; ((),) = all in one
    velocity: bool = opt(False, "the centre head also predicts vx, vy", MODEL)
    anchors: tuple[tuple[float, ...], ...] = ANCHORS  # per class: length, width, height, bottom z, matched, unmatched IoU
    score_threshold: float = opt(0.1, "detections below this score are dropped", MODEL)
    nms_iou: float = opt(0.01, "rotated NMS inside a task: overlap at which the lower score goes", MODEL)
    circle_nms: tuple[float, ...] = opt((), "centre head: NMS by distance instead; squared metres, one a task", MODEL)
    max_detections: int = opt(500, "at most so many detections of a scan and task after NMS", MODEL)
    # ---- optimisation: AdamW under a one-cycle schedule, as LiDAR detectors are usually trained
    # DIFFERS: OpenPCDet's lr of 3e-3 goes with 4 scans on each of 8 GPUs; here the batch is that of all processes together,
    # so 8 GPUs want --batch-size 32.
    epochs: int = opt(80, "passes over the training frames", OPTIM)
    batch_size: int = opt(4, "scans a step over ALL processes together", OPTIM)
    lr: float = opt(3e-3, "peak learning rate; halve it if the loss becomes NaN early", OPTIM)
    weight_decay: float = opt(0.01, "decoupled (AdamW)", OPTIM)
    clip: float = opt(10.0, "gradient norm is clipped to this", OPTIM)
    loc_weight: float = opt(2.0, "gamma of Eq. 10, the weight of box regression", OPTIM)
    # DIFFERS: the paper's framework gives nuScenes' weight of 0.2 to vx, vy; OpenPCDet's list gives it to cos, sin, as ours does.
    code_weights: tuple[float, ...] = opt((1.0,) * 8, "centre head: offset x, y, z, log l, w, h, cos, sin, vx, vy", OPTIM)
    amp: str = opt("float16", "mixed precision: float16, with loss scaling, on CUDA only; bfloat16 on CPUs that compute in it"
                              " too, nearly twice as fast there", OPTIM, ("off", "float16", "bfloat16"))  # fmt: skip
    # ---- distillation: what every method, or more than one, reads (baselines.py)
    inherit: bool = opt(False, "start from the teacher's first channels (SparseKD's TGI)", DISTIL)
    label_kd: bool = opt(False, "the teacher's sure boxes are labels too (SparseKD's label KD); goes with any method", DISTIL)
    label_score: tuple[float, ...] = opt((0.6,), "lad, label_kd: score that makes a teacher's box a label; or per class", DISTIL)
    method: str = opt("none", "what the student learns from its teacher (baselines.py)", DISTIL, ("none", *METHODS))
    kd_weight: float = opt(1.0, "factor on the terms of any method", DISTIL)
    kd_fade: bool = opt(False, "that factor falls linearly to 0 over the run; none of the papers measured here does so", DISTIL)
    roi_size: int = opt(7, "RoI Align: sampling points along a side of a region", DISTIL)
    proposals: int = opt(50, "regions a scan and side, the best scored", DISTIL)
    proposal_score: float = opt(0.1, "lowest score of a proposal", DISTIL)
    # ---- how RDD is read: rdd.py says what each choice is
    normalise: str = opt("none", "Eq. 2 on a region (rdd.normalise)", READING, ("softmax", "none", "standardise"))
    softmax_axis: str = opt("channel", "axis of Eq. 2's softmax", READING, ("channel", "spatial"))
    tau: float = opt(4.0, "temperature of Eq. 2's softmax", READING)
    psi_order: str = opt("psi-first", "psi on the whole map (map-first), on its regions (psi-first), or on normalised regions",
                         READING, ("map-first", "psi-first", "normalise-first"))  # fmt: skip
    psi_norm: bool = opt(False, "batch norm in psi, as printed; with it students learned less (docs/experiments.md)", READING)
    # DIFFERS: the paper selects by lambda = 0.1, in the unit of its softmax. No lambda suits features as they are, whose d
    # depends on the network and the step; a fixed share is kept instead, the 60 % of IDa-Det, earlier code of its authors' group.
    select: str = opt("top", "how m* of Eq. 5 is solved (rdd.solve_selection)", READING,
                      ("threshold", "relative", "top", "soft", "gaussian", "all", "least", "random"))  # fmt: skip
    lam: float = opt(0.1, "lambda of Eq. 5: in units of d (threshold, soft), mean d (relative), nats (gaussian)", READING)
    fraction: float = opt(0.6, "share of a scan's pairs that top, least and random keep; they read no lambda", READING)
    regions: str = opt("proposals", "where pairs are cut out: both's proposals, or labels", READING, ("proposals", "labels"))
    distance: str = opt("norm", "Eq. 8's distance: a pair's norm, or its square over the cells", READING, ("norm", "squared"))
    p_cls: str = opt("sum", "Eq. 9's |differences| over a region: their sum, mean, or at its peak only", READING,
                     ("sum", "mean", "peak"))
    # DIFFERS: the paper's alpha1 is 0.2, with which centre heads learned less on simulated nuScenes; anchor heads have it.
    alpha1: float = opt(2.0, "weight of L_feat, Eq. 10; presets with an anchor head: 0.2", READING)
    alpha2: float = opt(0.2, "weight of L_logit, Eq. 10", READING)
    # ---- run
    seed: int = opt(0, "of initialisation, data order and augmentation", RUN)
    eval_every: int = opt(10, "epochs between evaluations on the validation frames; the last epoch always is", RUN)
    log_every: int = opt(10, "steps between lines of metrics.jsonl", RUN)

    def widths(self, part: int, channels: Iterable[int]) -> tuple[int, ...]:
        """Channels of part 0 (encoder), 1 (BEV backbone) or 2 (head) at this config's width; SparseKD's rule int(c * width)."""
        return tuple(int(c * self.width[part]) for c in channels)

    @property
    def layout(self) -> str:
        """Whose files, classes and metrics: kitti or nuscenes."""
        return "nuscenes" if "nuscenes" in self.data else "kitti"

    @property
    def task_classes(self) -> tuple[tuple[str, ...], ...]:
        return (self.classes,) if self.tasks == ((),) else self.tasks


# ------------------------------------------------------------------ fields <-> command line <-> JSON


def add_options(parser: argparse.ArgumentParser, groups: Iterable[str] = GROUPS, only: Iterable[str] = ()) -> None:
    """One option per field of `Config` (or `only` of these); an option that is not given is absent from the parsed namespace."""
    for name in groups:
        group = parser.add_argument_group(name)
        for f in (f for f in fields(Config) if f.metadata.get("group") == name and f.name in (only or (f.name,))):
            shown = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
            flag = {"nargs": "?", "const": True} if isinstance(f.default, bool) else {}  # --inherit is --inherit on
            group.add_argument(
                "--" + f.name.replace("_", "-"), dest=f.name, default=argparse.SUPPRESS, type=parse_as(f.type), **flag,
                metavar="{" + ",".join(f.metadata["choices"]) + "}" if f.metadata["choices"] else "X",
                help=f"{f.metadata['help']} [{shown}]".replace("%", "%%"))  # fmt: skip


def override(cfg: Config, changes: dict[str, Any]) -> Config:
    """`cfg` with some fields replaced. Raises InputError for a value that makes no sense (`values.check_values`)."""
    cfg = replace(cfg, **{**of_classes(cfg, changes.get("classes", cfg.classes)), **changes})
    for name, n in (("width", 3), ("paste", len(cfg.classes))):  # --width 0.5, --paste 0: the same everywhere
        cfg = replace(cfg, **{name: getattr(cfg, name) * (n if len(getattr(cfg, name)) == 1 else 1)})
    check_values(cfg)
    return cfg


def to_json(cfg: Config) -> dict[str, Any]:
    """Builtins only, so that a checkpoint can hold it and open with weights_only=True."""
    return asdict(cfg)


def from_json(values: dict[str, Any]) -> Config:
    """The inverse of `to_json`, also after a round trip through JSON (lists become tuples again).

    Raises InputError for keys that this version does not know.
    """
    known = {f.name for f in fields(Config)}
    for key in sorted(values.keys() - known):
        raise InputError(f"config: unknown field {key!r}{did_you_mean(key, known)}")
    values = {"psi_norm": True, **values}  # older checkpoints: there was always a norm, and no bfloat16
    if isinstance(values.get("amp"), bool):
        values["amp"] = "float16" if values["amp"] else "off"
    return Config(**{k: _tuples(v) for k, v in values.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(x) for x in value) if isinstance(value, list | tuple) else value


def show(cfg: Config) -> str:
    """The whole config, group by group."""
    lines = [f"preset {cfg.preset}"]
    for name in GROUPS:
        lines.append(f"{name}")
        lines += [f"  {f.name:18} {getattr(cfg, f.name)}" for f in fields(cfg) if f.metadata.get("group") == name]
    return "\n".join(lines)
