"""Weights: checkpoints, teachers that other people trained, students that start from their teacher.   (after: detector.py)

    python detector.py import CHECKPOINT --preset NAME --out FILE [--data nuscenes]

reads a checkpoint of OpenPCDet (SECOND, PointPillars, CenterPoint with voxels or pillars) and writes one of ours, which
`train.py --teacher FILE` and `evaluate.py FILE` take like any other. Nothing that a file carries is executed: it is read
with weights_only. OpenPCDet's names and ours differ only in how the layers are numbered; `openpcdet_name` is the rule.
"""

import codecs
import os
import pickle
import re
import zipfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cli import ArgumentParser, InputError, did_you_mean
from config import MODEL, OPTIM, Config, add_options, from_json, override, to_json
from detector import Detector
from presets import PRESETS, preset

# ------------------------------------------------------------------ checkpoints: tensors and builtins, nothing else


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to a temporary name, then move it into place: a crash or a full disk leaves the old file whole.

    Raises InputError when the disk refuses it.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: checkpoint not written ({reason}); the previous one is untouched") from None


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint of this project. Nothing in the file is executed (weights_only).

    Raises InputError for a file that is missing, truncated, not a checkpoint, or some other program's.
    """
    content = _load(Path(path), "a checkpoint written by train.py")
    if not isinstance(content, dict) or content.get("format") != 1 or "model" not in content:
        found = f"a dict with keys {sorted(map(str, content))[:6]}" if isinstance(content, dict) else type(content).__name__
        hint = "; OpenPCDet's are read by: python detector.py import" if "model_state" in found else ""
        raise InputError(f"{path}: expected a checkpoint written by train.py (format 1), found {found}{hint}")
    if lost := [key for key in ("config", "step") if key not in content]:
        raise InputError(f"{path}: expected a checkpoint written by train.py, found one without {' and '.join(map(repr, lost))}")
    return content


# OpenPCDet's optimizer keeps numpy's float64 in its state. These build a number, and run nothing.
_NUMPY_NUMBERS = [(np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
_NUMPY_NUMBERS += [np.dtype, type(np.dtype("float64")), (codecs.encode, "_codecs.encode")]


def _load(path: Path, expected: str) -> Any:
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint{_nearby(path)}")
    try:
        with torch.serialization.safe_globals(_NUMPY_NUMBERS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        found = f"a file torch cannot read safely: {(str(error).splitlines() or ['unreadable'])[0][:120]}"
        if not isinstance(error, OSError) and not _is_whole(path):
            found = f"a truncated one or no checkpoint ({path.stat().st_size} bytes)"
        raise InputError(f"{path}: expected {expected}, found {found}") from None


def _is_whole(path: Path) -> bool:
    """Whether a file is an archive with its table of contents, which is at its end, or a pickle of torch before 1.6."""
    with open(path, "rb") as file:
        return zipfile.is_zipfile(path) or file.read(1) == b"\x80"


def _nearby(path: Path) -> str:
    runs = [str(p) for p in Path("runs").glob("*/last.pt")]
    return did_you_mean(str(path), runs, most=3) if runs else ""


def load_weights(model: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Strict loading, with one line that says what does not fit. Raises InputError."""
    own = model.state_dict()
    problems = [f"missing {k}" for k in own if k not in weights] + [f"unexpected {k}" for k in weights if k not in own]
    problems += [f"{k} has shape {tuple(weights[k].shape)}, expected {tuple(own[k].shape)}"
                 for k in own if k in weights and weights[k].shape != own[k].shape]  # fmt: skip
    if problems:
        raise InputError(f"{path}: made for another model: {problems[0]}"
                         + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""))  # fmt: skip
    model.load_state_dict(weights)


def load_detector(path: str | Path, **changes: Any) -> tuple[Detector, dict[str, Any]]:
    """A trained detector from its checkpoint, in eval mode, and the checkpoint's content. changes: fields of its config
    that are to differ (those of decoding: the weights must still fit)."""
    content = read_checkpoint(path)
    detector = Detector(override(from_json(content["config"]), changes))
    load_weights(detector, content["model"], path)
    return detector.eval(), content


# ------------------------------------------------------------------ teachers from OpenPCDet


def openpcdet_name(name: str) -> str:
    """Our state_dict name -> OpenPCDet's for the same tensor.

    encoder.stages.1.2.conv.weight   -> backbone_3d.conv2.2.0.weight      (sparse blocks: .0 convolution, .1 norm)
    encoder.layers.0.linear.weight   -> vfe.pfn_layers.0.linear.weight
    backbone.levels.0.3.1.bias       -> backbone_2d.blocks.0.11.bias      (a flat list: pad, then 3 layers a block)
    head.tasks.2.heatmap.3.bias      -> dense_head.heads_list.2.hm.1.bias
    """
    for pattern, theirs in _RULES:
        match = re.fullmatch(pattern, name)
        if match:
            return theirs(*match.groups()) if callable(theirs) else match.expand(theirs)
    raise KeyError(name)


_LAYER = {"conv": "0", "norm": "1", "conv1": "conv1", "norm1": "bn1", "conv2": "conv2", "norm2": "bn2"}
_RULES = [
    (r"encoder\.(conv_input|conv_out)\.(conv|norm)(\..+)", lambda part, kind, rest: f"backbone_3d.{part}.{_LAYER[kind]}{rest}"),
    (r"encoder\.stages\.(\d)\.(\d)\.(\w+)(\..+)",
     lambda stage, layer, kind, rest: f"backbone_3d.conv{int(stage) + 1}.{layer}.{_LAYER[kind]}{rest}"),
    (r"encoder\.layers\.(.+)", r"vfe.pfn_layers.\1"),
    (r"backbone\.levels\.(\d)\.(\d+)\.([01])(\..+)",
     lambda level, layer, kind, rest: f"backbone_2d.blocks.{level}.{1 + 3 * int(layer) + int(kind)}{rest}"),
    (r"backbone\.ups\.(.+)", r"backbone_2d.deblocks.\1"),
    (r"head\.shared\.(.+)", r"dense_head.shared_conv.\1"),
    (r"head\.tasks\.(\d)\.(\w+)\.([013])(\..+)",
     lambda task, name, kind, rest: f"dense_head.heads_list.{task}.{'hm' if name == 'heatmap' else name}."
                                    f"{'1' if kind == '3' else '0.' + kind}{rest}"),
    (r"head\.(cls|box)(\..+)", r"dense_head.conv_\1\2"),
    (r"head\.direction(\..+)", r"dense_head.conv_dir_cls\1"),
]  # fmt: skip


def from_openpcdet(state: dict[str, Tensor], detector: Detector, path: str | Path) -> dict[str, Tensor]:
    """OpenPCDet's `model_state` under our names and in our layouts. Raises InputError with what does not fit.

    A sparse convolution is stored (out, kz, ky, kx, in), as here, by spconv 2, and (kz, ky, kx, in, out) by spconv 1:
    they are told apart by their shapes.
    """
    state = {name.removeprefix("module."): value for name, value in state.items()}
    weights, missing, shapes, known = {}, [], [], {"global_step"}
    for name, own in detector.state_dict().items():
        theirs = openpcdet_name(name)
        known.add(theirs)
        value = state.get(theirs)
        if value is None:
            missing.append(theirs)
            continue
        if value.dim() == 5 and value.shape != own.shape and value.permute(4, 0, 1, 2, 3).shape == own.shape:
            value = value.permute(4, 0, 1, 2, 3)
        if value.shape != own.shape:
            shapes.append(f"{theirs} has shape {tuple(value.shape)}, expected {tuple(own.shape)}")
        weights[name] = value.contiguous().to(own.dtype)
    unexpected = sorted(set(state) - known)
    problems = [*shapes, *(f"missing {n}" for n in missing), *(f"unexpected {n}" for n in unexpected)]
    if problems:
        raise InputError(
            f"{path}: not the weights of preset {detector.cfg.preset}: {len(missing)} tensors missing, {len(unexpected)}"
            f" unexpected, {len(shapes)} of another shape:\n  " + "\n  ".join(_shortened(problems)))  # fmt: skip
    return weights


def _shortened(lines: list[str], most: int = 20) -> list[str]:
    return lines if len(lines) <= most else [*lines[:most], f"... and {len(lines) - most} more"]


def read_openpcdet(path: str | Path) -> dict[str, Tensor]:
    """The state_dict of an OpenPCDet checkpoint, or a bare one. Raises InputError for anything else."""
    content = _load(Path(path), "an OpenPCDet checkpoint")
    state = content.get("model_state", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        found = f"a dict with keys {sorted(map(str, content))[:6]}" if isinstance(content, dict) else type(content).__name__
        raise InputError(f"{path}: expected an OpenPCDet checkpoint (a dict with 'model_state'), found {found}")
    return state


# ------------------------------------------------------------------ a student that starts from its teacher


@torch.no_grad()
def inherit(student: Detector, teacher: Detector) -> None:
    """SparseKD's teacher-guided initialisation: every student tensor takes the first channels of its teacher's, in place.

    Where a layer reads several maps laid side by side (the neck's levels; a pillar layer's two halves), the first
    channels of each map. Raises InputError when the student is no narrower twin of the teacher.
    """
    own, theirs = student.state_dict(), teacher.state_dict()
    for name, tensor in own.items():
        source = theirs.get(name)
        kernel = {4: slice(2, 4), 5: slice(1, 4)}.get(tensor.dim(), slice(0))  # (out, in, k, k); sparse (out, k, k, k, in)
        if (source is None or source.dim() != tensor.dim() or tensor.shape[kernel] != source.shape[kernel]
                or any(a > b for a, b in zip(tensor.shape, source.shape))):  # fmt: skip
            raise InputError(f"--inherit: {name} of {student.cfg.preset} {tuple(tensor.shape)} is no part of"
                             f" {teacher.cfg.preset}'s {tuple(source.shape) if source is not None else '(none)'}")  # fmt: skip
        for axis, size in enumerate(tensor.shape):
            parts = _parts(name, axis, student.cfg, teacher.cfg) or [(size, source.shape[axis])]
            chosen, begin = [], 0
            for mine, whole in parts:
                chosen.append(torch.arange(begin, begin + mine))
                begin += whole
            source = source.index_select(axis, torch.cat(chosen).to(source.device))
        tensor.copy_(source)


def _parts(name: str, axis: int, cfg_s: Config, cfg_t: Config) -> list[tuple[int, int]]:
    """(student's, teacher's) channels of each map that this layer finds side by side along `axis`; [] for just one."""
    if axis == 1 and re.fullmatch(r"head\.(shared\.0|cls|box|direction)\.weight", name):
        return list(zip(cfg_s.widths(1, cfg_s.up_channels), cfg_t.widths(1, cfg_t.up_channels)))
    layer = re.fullmatch(r"encoder\.layers\.([1-9]\d*)\.linear\.weight", name)
    if axis == 1 and layer:  # a point's own values, then its pillar's maxima
        before = int(layer[1]) - 1
        halves = tuple(cfg.widths(0, cfg.encoder_channels)[before] // 2 for cfg in (cfg_s, cfg_t))
        return [halves, halves]
    return []


# ------------------------------------------------------------------ command line


def main(argv: list[str]) -> None:
    p = ArgumentParser(prog="detector.py import", description=__doc__, epilog="presets: " + ", ".join(PRESETS))
    p.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint written by OpenPCDet")
    p.add_argument("--preset", required=True, metavar="NAME", help="the preset that describes the same network")
    p.add_argument("--data", default="", metavar="{kitti,nuscenes}", help="which of the preset's data sets [its own]")
    p.add_argument("--out", required=True, type=Path, metavar="FILE", help="the checkpoint to write, e.g. teacher.pt")
    add_options(p, (MODEL, OPTIM))
    args = vars(p.parse_args(argv))
    name, data = args.pop("preset"), args.pop("data")
    cfg = preset(name, data)
    cfg = replace(cfg, data=data or {"sim": "kitti"}.get(cfg.data, cfg.data))
    path, out = args.pop("checkpoint"), args.pop("out")
    detector = Detector(override(cfg, args))
    weights = from_openpcdet(read_openpcdet(path), detector, path)
    save_checkpoint(out, {"format": 1, "config": to_json(detector.cfg), "model": weights, "step": 0})
    print(f"{out}: {len(weights)} tensors, {sum(p.numel() for p in detector.parameters()):,} parameters, as {cfg.preset}"
          f" on {cfg.data}; its AP: python evaluate.py {out} --root DIR")  # fmt: skip
