"""Configuration: one dataclass, printed on one screen, and presets that fill it.   (reads first; next: boxes.py)

A preset is a function that returns one complete `Config`: nothing is inherited and nothing is looked up, so two
presets are compared by printing both (`python train.py --student cp-voxel-xxs-cpu --print-config`). The command
line is built from the same fields: every field is an option, its help is written beside it, its default is filled
in by the program. Only the standard library is imported here, so `--help` answers at once.

Also here, because every other file needs them: the error that users see (`InputError`) and the parser that
answers an unknown flag or preset with the nearest known one.
"""

import argparse
import difflib
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: the file, what was expected, what was found."""


def run_cli(main: Callable[[], None]) -> None:
    """Run a command: an `InputError` becomes one line on stderr and exit status 2, an interrupt status 130."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `... --help | head`
        sys.stderr.close()


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' (did you mean ...?)' for the nearest of `known`, or the whole list when nothing is near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else f" (known: {', '.join(known)})"


class ArgumentParser(argparse.ArgumentParser):
    """argparse that keeps the docstring's line breaks, shows defaults, and says "did you mean" for unknown flags."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def parse_args(self, args=None, namespace=None):  # noqa: D102 (argparse's own)
        parsed, unknown = self.parse_known_args(args, namespace)
        for flag in unknown:
            if flag.startswith("-"):
                known = [name for action in self._actions for name in action.option_strings]
                raise InputError(f"unknown option {flag}{did_you_mean(flag.split('=')[0], known)}")
            raise InputError(f"unexpected argument {flag!r}; `--help` lists what this command takes")
        return parsed

    def error(self, message: str) -> None:
        """argparse reports its own errors as usage + message; ours is the one line."""
        raise InputError(message)


def opt(default: Any, help: str, group: str = "", choices: tuple[str, ...] = ()) -> Any:  # noqa: A002 (argparse's word)
    """A field of `Config` that is also an option of the command line."""
    return field(default=default, metadata={"help": help, "group": group, "choices": choices})


DATA, MODEL, OPTIM, DISTIL, RUN = "data", "model", "optimisation", "distillation", "run"


@dataclass(frozen=True)
class Config:
    """Everything one training run depends on. Units: metres, radians, seconds unless the help says otherwise."""

    preset: str = "custom"  # which preset function made it; informative only
    # ---- data: the same for teacher and student
    data: str = opt("sim", "data set; sim = the embedded simulator's KITTI-like set", DATA, ("sim", "kitti"))
    root: str = opt("", "folder of the data set; sim: made on first use (default datasets/sim-kitti)", DATA)
    frames: tuple[str, ...] = opt((), "train AND evaluate on these frames only, e.g. 000000,000003", DATA)
    classes: tuple[str, ...] = opt(("Car", "Pedestrian", "Cyclist"), "what is detected, in label order", DATA)
    fov_only: bool = opt(True, "keep only points that fall into the camera image, as KITTI's labels do", DATA)
    flip: bool = opt(True, "augmentation: mirror y with probability 1/2", DATA)
    rotation: float = opt(0.785, "augmentation: yaw of the whole scene, uniform in +- this", DATA)
    scaling: float = opt(0.05, "augmentation: size of the whole scene, uniform in 1 +- this", DATA)
    paste: tuple[int, ...] = opt((15, 10, 10), "augmentation: objects per class after ground-truth paste; 0 = off", DATA)
    # ---- model
    encoder: str = opt("voxel", "points to bird's-eye view", MODEL, ("voxel",))
    head: str = opt("center", "bird's-eye view to boxes", MODEL, ("center",))
    point_features: int = opt(4, "columns of a point: x, y, z, intensity", MODEL)
    point_range: tuple[float, ...] = opt((0.0, -40.0, -3.0, 70.4, 40.0, 1.0), "x, y, z minimum, then maximum", MODEL)
    voxel_size: tuple[float, ...] = opt((0.05, 0.05, 0.1), "x, y, z", MODEL)
    max_points: int = opt(5, "points averaged in a voxel, the first ones; 0 = all", MODEL)
    max_voxels: int = opt(40000, "voxels kept of one scan; 0 = all", MODEL)
    width: tuple[float, ...] = opt((1.0, 1.0, 1.0), "channel factor of encoder, BEV + neck, head: makes a student", MODEL)
    encoder_channels: tuple[int, ...] = opt((16, 16, 32, 64, 128, 128), "input, one per stage, output; at width 1", MODEL)
    residual: bool = opt(True, "two residual blocks a stage (CenterPoint) instead of plain convolutions (SECOND)", MODEL)
    down_kernel: int = opt(3, "kernel of the stride-2 sparse layers: 3 as published; 2 dilates no sites, 5x faster on CPU", MODEL)
    bev_layers: tuple[int, ...] = opt((5, 5), "3x3 convolutions a level after its first", MODEL)
    bev_strides: tuple[int, ...] = opt((1, 2), "stride of each level", MODEL)
    bev_channels: tuple[int, ...] = opt((128, 256), "channels of each level, at width 1", MODEL)
    up_strides: tuple[int, ...] = opt((1, 2), "upsampling of each level into the neck", MODEL)
    up_channels: tuple[int, ...] = opt((256, 256), "channels each level gives to the neck, at width 1", MODEL)
    head_channels: int = opt(64, "channels of the head's convolutions, at width 1", MODEL)
    tasks: tuple[tuple[str, ...], ...] = ((),)  # groups of classes, one sub-head each; ((),) = all in one
    score_threshold: float = opt(0.1, "detections below this score are dropped", MODEL)
    nms_iou: float = opt(0.01, "rotated NMS inside a task: overlap at which the lower score goes", MODEL)
    # ---- optimisation: the field's one-cycle AdamW
    epochs: int = opt(80, "passes over the training frames", OPTIM)
    batch_size: int = opt(4, "scans a step over ALL processes together", OPTIM)
    lr: float = opt(3e-3, "peak learning rate; halve it if the loss becomes NaN early", OPTIM)
    weight_decay: float = opt(0.01, "decoupled (AdamW)", OPTIM)
    clip: float = opt(10.0, "gradient norm is clipped to this", OPTIM)
    loc_weight: float = opt(2.0, "gamma of Eq. 10, the weight of box regression", OPTIM)
    amp: bool = opt(True, "bfloat16 / float16 autocast; acts on CUDA only", OPTIM)
    # ---- distillation: rdd.py says what each reading means
    method: str = opt("none", "what the student learns from its teacher", DISTIL, ("none", "rdd"))
    normalise: str = opt("none", "Eq. 2 on a region", DISTIL, ("softmax", "none", "standardise"))
    softmax_axis: str = opt("channel", "axis of Eq. 2's softmax", DISTIL, ("channel", "spatial"))
    psi_order: str = opt("psi-first", "1x1 adapter before or after Eq. 2", DISTIL, ("psi-first", "normalise-first"))
    tau: float = opt(4.0, "temperature of Eq. 2", DISTIL)
    select: str = opt("top", "how m* of Eq. 5 is solved", DISTIL,
                      ("threshold", "relative", "top", "soft", "gaussian", "all"))
    lam: float = opt(0.1, "lambda of Eq. 5, in the unit of d (threshold, soft), of mean d (relative), in nats (gaussian)", DISTIL)
    fraction: float = opt(0.6, "share of a scan's region pairs that select=top keeps", DISTIL)
    p_cls: str = opt("sum", "Eq. 9's |differences| over a region: their sum, mean, or at its peak only", DISTIL,
                     ("sum", "mean", "peak"))
    alpha1: float = opt(0.6, "weight of L_feat, Eq. 10; the paper's 0.2 is `--reading printed`", DISTIL)
    alpha2: float = opt(0.6, "weight of L_logit, Eq. 10; the paper's 0.2 is `--reading printed`", DISTIL)
    roi_size: int = opt(7, "cells a side of RoI Align", DISTIL)
    proposals: int = opt(50, "regions a scan and side, the best scored", DISTIL)
    proposal_score: float = opt(0.1, "lowest score of a proposal", DISTIL)
    # ---- run
    seed: int = opt(0, "of initialisation, data order and augmentation", RUN)
    eval_every: int = opt(10, "epochs between evaluations on the validation frames; the last epoch always is", RUN)
    log_every: int = opt(10, "steps between lines of metrics.jsonl", RUN)

    def widths(self, part: int, channels: Iterable[int]) -> tuple[int, ...]:
        """Channels of part 0 (encoder), 1 (BEV + neck) or 2 (head) at this config's width; SparseKD's rule int(c * width)."""
        return tuple(int(c * self.width[part]) for c in channels)

    @property
    def task_classes(self) -> tuple[tuple[str, ...], ...]:
        return (self.classes,) if self.tasks == ((),) else self.tasks


# ------------------------------------------------------------------ presets: each returns one complete Config


def cp_voxel() -> Config:
    """CenterPoint-Voxel as trained on KITTI: residual 8x encoder, 0.05 m voxels. GPU."""
    return Config(preset="cp-voxel")


def cp_voxel_s() -> Config:
    """CP-Voxel-S: the teacher with half of the BEV, neck and head channels. GPU."""
    return Config(preset="cp-voxel-s", width=(1.0, 0.5, 0.5), method="rdd")


def cp_voxel_xs() -> Config:
    """CP-Voxel-XS: 3/4 of the encoder's channels, half of the rest. GPU."""
    return Config(preset="cp-voxel-xs", width=(0.75, 0.5, 0.5), method="rdd")


def cp_voxel_xxs() -> Config:
    """CP-Voxel-XXS: half of the encoder's channels, a quarter of the rest. GPU."""
    return Config(preset="cp-voxel-xxs", width=(0.5, 0.25, 0.25), method="rdd")


def cp_voxel_cpu() -> Config:
    """CP-Voxel sized for minutes on two CPU cores: 51 m, 0.2 m voxels, three plain stages, BEV of 64 x 64 cells.

    Not the paper's network: its stride-2 layers are 2x2x2, which keeps the number of sites down; the published 3x3x3
    (`--down-kernel 3`) multiplies them. Everything else of the design is the same, only smaller.
    """
    return Config(
        preset="cp-voxel-cpu", point_range=(0.0, -25.6, -3.0, 51.2, 25.6, 1.0), voxel_size=(0.2, 0.2, 0.2),
        max_points=0, max_voxels=0, encoder_channels=(16, 16, 32, 48, 64), residual=False, down_kernel=2,
        bev_layers=(3, 3), bev_channels=(48, 96), up_channels=(48, 48), head_channels=32,
        paste=(0, 0, 0), rotation=0.2, epochs=6, batch_size=2, eval_every=3,
    )  # fmt: skip


def cp_voxel_s_cpu() -> Config:
    """CP-Voxel-S of the CPU teacher."""
    return replace(cp_voxel_cpu(), preset="cp-voxel-s-cpu", width=(1.0, 0.5, 0.5), method="rdd")


def cp_voxel_xxs_cpu() -> Config:
    """CP-Voxel-XXS of the CPU teacher: the large gap, and the demo's student."""
    return replace(cp_voxel_cpu(), preset="cp-voxel-xxs-cpu", width=(0.5, 0.25, 0.25), method="rdd")


PRESETS = {f().preset: f for f in (cp_voxel, cp_voxel_s, cp_voxel_xs, cp_voxel_xxs,
                                   cp_voxel_cpu, cp_voxel_s_cpu, cp_voxel_xxs_cpu)}  # fmt: skip
DEFAULT_PAIR = {"sim": ("cp-voxel-cpu", "cp-voxel-xxs-cpu"), "kitti": ("cp-voxel", "cp-voxel-s")}

# `--reading NAME`: the paper's silences, filled in one consistent way each.
READINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "printed": {"normalise": "softmax", "softmax_axis": "channel", "psi_order": "psi-first", "select": "threshold",
                "p_cls": "mean", "tau": 4.0, "lam": 0.1, "alpha1": 0.2, "alpha2": 0.2},
}  # fmt: skip


def preset(name: str) -> Config:
    """The complete config of a preset; raises InputError with the nearest name when there is none."""
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}{did_you_mean(name, PRESETS)}")
    return PRESETS[name]()


# ------------------------------------------------------------------ fields <-> command line <-> JSON


def _parse_as(default: Any) -> Callable[[str], Any]:
    """How an option's text becomes a value of its field's type."""
    if isinstance(default, bool):
        return _parse_bool
    if isinstance(default, tuple):
        item = type(default[0]) if default else str
        return lambda text: tuple(item(x) for x in text.split(",") if x)
    return type(default)


def _parse_bool(text: str) -> bool:
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected on or off, found {text!r}")


def add_options(parser: argparse.ArgumentParser, groups: Iterable[str] = (DATA, MODEL, OPTIM, DISTIL, RUN)) -> None:
    """One option per field of `Config`; an option that is not given is absent from the parsed namespace."""
    for name in groups:
        group = parser.add_argument_group(name)
        for f in (f for f in fields(Config) if f.metadata.get("group") == name):
            shown = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
            group.add_argument(
                "--" + f.name.replace("_", "-"), dest=f.name, default=argparse.SUPPRESS, type=_parse_as(f.default),
                metavar="{" + ",".join(f.metadata["choices"]) + "}" if f.metadata["choices"] else "X",
                help=f"{f.metadata['help']} [{shown}]".replace("%", "%%"))  # fmt: skip


def override(cfg: Config, changes: dict[str, Any]) -> Config:
    """`cfg` with some fields replaced, and checked.

    Raises InputError for an unknown choice or a value that no model could be built from.
    """
    cfg = replace(cfg, **changes)
    for f in fields(cfg):
        choices, value = f.metadata.get("choices"), getattr(cfg, f.name)
        if choices and value not in choices:
            raise InputError(f"--{f.name.replace('_', '-')}: unknown value {value!r}{did_you_mean(value, choices)}")
    if len(cfg.width) == 1:  # --width 0.5: the same factor everywhere
        cfg = replace(cfg, width=cfg.width * 3)
    if len(cfg.width) != 3 or min(cfg.width) <= 0:
        raise InputError(f"--width: expected one factor, or three (encoder, BEV, head), above 0; found {cfg.width}")
    if len(cfg.point_range) != 6 or any(cfg.point_range[i] >= cfg.point_range[i + 3] for i in range(3)):
        raise InputError(f"--point-range: expected x0,y0,z0,x1,y1,z1 with minimum below maximum; found {cfg.point_range}")
    if len(cfg.paste) != len(cfg.classes):
        raise InputError(f"--paste: expected one count per class ({len(cfg.classes)}); found {cfg.paste}")
    for name in ("epochs", "batch_size", "eval_every", "log_every", "roi_size", "lr", "tau"):
        if getattr(cfg, name) <= 0:
            raise InputError(f"--{name.replace('_', '-')}: expected a number above 0; found {getattr(cfg, name)}")
    return cfg


def to_json(cfg: Config) -> dict[str, Any]:
    """Builtins only, so that a checkpoint can hold it and open with weights_only=True."""
    return asdict(cfg)


def from_json(values: dict[str, Any]) -> Config:
    """The inverse of `to_json`, also after a round trip through JSON (lists become tuples again).

    Raises InputError for keys that this version does not know.
    """
    known = {f.name for f in fields(Config)}
    for key in values:
        if key not in known:
            raise InputError(f"config: unknown field {key!r}{did_you_mean(key, known)}")
    return Config(**{k: _tuples(v) for k, v in values.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(x) for x in value) if isinstance(value, list | tuple) else value


def show(cfg: Config) -> str:
    """The whole config, grouped, on one screen."""
    lines = [f"preset {cfg.preset}"]
    for name in (DATA, MODEL, OPTIM, DISTIL, RUN):
        lines.append(f"{name}")
        lines += [f"  {f.name:18} {getattr(cfg, f.name)}" for f in fields(cfg) if f.metadata.get("group") == name]
    return "\n".join(lines)
