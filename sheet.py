"""The sheet: what every teacher and student costs, beside what the paper prints.   (after: detector.py)

    python detector.py sheet                      the paper's models on simulated frames (minutes on a CPU)
    python detector.py sheet --readme README.md   also rewrite the table there

Memory and latency: one forward pass of one scan in float32, from points to the head's maps. Decoding is left out: what
there is to decode depends on training, and these weights are random.
"""

import datetime
import json
import re
import shlex
import time
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import sparse
from cli import ArgumentParser, InputError
from config import Config
from data import Frame
from data.batch import Batch, collate
from detector import Detector, build
from parallel import keep_freed_memory
from presets import preset

REPEATS = 5  # of the timing
# The paper's #F (G) and #P (M), arXiv 2308.10308, tables 3 and 4, and which NOTES apply. The figures in the notes are
# arithmetic on the published configurations, compared with SparseKD's README.
PAPER: dict[str, dict[str, tuple[float | None, float | None, str]]] = {
    "nuscenes": {
        "cp-voxel": (114.8, 7.8, "a"), "cp-voxel-s": (47.8, 4.0, "a"), "cp-voxel-xs": (36.0, 2.8, "a"),
        "cp-voxel-xxs": (12.0, 1.0, "a"), "cp-pillar": (333.9, 5.2, "b"), "cp-pillar-v0.2": (None, None, "c"),
        "cp-pillar-v0.4": (212.9, 5.2, "b"), "cp-pillar-v0.48": (149.4, 5.2, "b"), "cp-pillar-v0.64": (85.1, 5.2, "b")},
    "kitti": {
        "cp-voxel": (None, None, ""), "second": (80.5, 5.3, "d"), "second-s": (23.0, 1.6, "d"),
        "second-xs": (None, 1.4, "e"), "pointpillars": (34.3, 4.8, ""), "pointpillars-s": (9.8, 1.5, "f"),
        "pointpillars-xs": (8.7, 1.3, "f")},
}  # fmt: skip
NOTES = {
    "a": "SparseKD's figures for Waymo: one head, 3 classes, 188 x 188 cells (nuScenes: six, 10, 128 x 128), transposed"
         " convolutions counted k² times. Counted right, those models cost about 107.9, 46.1, 35.2, 11.6 G.",
    "b": "SparseKD's for Waymo, likewise; 0.32 m: 464 x 464. Right, dense layers only: 220.1, 138.4, 99.5, 55.0 G.",
    "c": "Not in the paper by name, but the accuracy that it prints for its 0.32 m teacher is this model's.",
    "d": "#F counts transposed convolutions k² times: 76.6 G for the dense layers of SECOND instead of 69.6.",
    "e": "#F is missing in the paper; counted in its way it would be about 20.4.",
    "f": "Not reproduced: the widths that the paper names give less than it prints.",
}  # fmt: skip
COLUMNS = (("parameters", "parameters", 1, ",d"), ("of teacher", "parameters_of_teacher", 1, ".2f"),
           ("GMACs", "macs", 1e9, ",.2f"), ("of teacher", "macs_of_teacher", 1, ".2f"),
           ("memory, MiB", "memory_bytes", 2**20, ",.1f"), ("latency, ms", "latency_ms", 1, ",.1f"),
           ("paper #P, M", "paper_p", 1, ".1f"), ("paper #F, G", "paper_f", 1, ".1f"))  # fmt: skip


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def count_macs(detector: Detector, batch: Batch) -> float:
    """Multiply-accumulates of one forward pass, a scan, on these scans; norms, ReLUs and additions left out.

    A sparse layer costs (pairs in its rule book) x C_in x C_out, so the number depends on the scan: name it. A pillar
    encoder's layer costs (rows) x C_in x C_out: the points, or with `max_points` whole tables, rows of zeros too.
    """
    total = 0

    def count(module: nn.Module, inputs: tuple, output: Any) -> None:
        nonlocal total
        if isinstance(module, sparse.SparseConv3d):
            book = module.rule_book(inputs[0])
            pairs = len(book.src) + (len(book.coords) if book.centre is not None else 0)
            total += pairs * module.weight[:, 0, 0, 0].numel()  # C_out x C_in
        else:  # weight[0]: what one output value costs; of a transposed convolution, what one INPUT value does
            x = inputs[0] if isinstance(module, nn.ConvTranspose2d) else output
            total += x.numel() * module.weight[0].numel()

    layers, training = nn.Conv2d | nn.ConvTranspose2d | nn.Linear | sparse.SparseConv3d, detector.training
    handles = [module.register_forward_hook(count) for module in detector.modules() if isinstance(module, layers)]
    detector.eval()(detector.prepare(batch))
    detector.train(training)
    for handle in handles:
        handle.remove()
    return total / len(batch)


class LiveBytes(TorchDispatchMode):
    """Follows every storage that an operation makes until it is freed; `peak`: the most bytes alive at one time.

    A view has the storage of an argument: weights and inputs never count. Unseen: what a kernel takes while it runs.
    """

    now = peak = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        before, after = ({x.untyped_storage()._cdata: x.untyped_storage() for x in tree_leaves(values)
                          if isinstance(x, torch.Tensor)} for values in ((args, kwargs), result))  # fmt: skip
        for storage in (after[key] for key in after.keys() - before.keys()):
            self.add(storage.nbytes())
            weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


@torch.no_grad()
def time_and_memory(forward: Callable[[], Any], device: torch.device) -> tuple[float, int]:
    """Milliseconds of `forward()`, the median of REPEATS; the most bytes it holds beyond what existed before it."""
    kept, times = sparse._kept.__dict__, []
    kept.clear()  # the buffer that sparse layers keep on a CPU: let it be this model's, and count it
    forward()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        for _ in range(REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            forward()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return float(np.median(times)), torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as live:
        forward()
    for _ in range(REPEATS):
        begin = time.perf_counter()
        forward()
        times.append(1e3 * (time.perf_counter() - begin))
    return float(np.median(times)), live.peak + sum(buffer.nbytes for buffer in kept.values())


def read_cloud(path: Path, features: int) -> np.ndarray:
    """(N, features) float32 of a raw .bin or an .npy file, without the points that are not finite."""
    try:
        raw = np.load(path) if path.suffix == ".npy" else np.frombuffer(path.read_bytes(), "<f4").reshape(-1, features)
        points = np.asarray(raw)[:, :features].astype(np.float32)
        points = points[np.isfinite(points).all(axis=1)]
    except (OSError, EOFError, ValueError, IndexError, TypeError):  # no file; no array of numbers
        points = np.zeros((0, 0))
    if not len(points) or points.shape[1:] != (features,):
        found = f"{path.stat().st_size} bytes of something else" if path.is_file() else "no such file"
        raise InputError(f"{path}: expected points of {features} float32 (.bin, or .npy with N rows), found {found}")
    return points


@cache
def simulated_cloud(features: int, fov_only: bool) -> np.ndarray:
    """(N, features) of the simulator's first frame: what the camera sees, or the full circle."""
    from data.simulate_kitti import CALIBRATION, IMAGE, make_frame

    points, _ = make_frame(0, 0, 0, full_circle=not fov_only)
    if fov_only:
        pixels, depth = CALIBRATION.project(CALIBRATION.lidar_to_camera(points[:, :3]))
        points = points[(depth >= 0) & (pixels >= 0).all(1) & (pixels < IMAGE).all(1)]
    return np.pad(points, ((0, 0), (0, features - points.shape[1])))  # nuScenes' time lag: 0


def measure(cfg: Config, points: np.ndarray, timed: bool) -> dict[str, Any]:
    """One row of the sheet, without the ratios."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    detector = build(cfg).to(device).eval()
    batch = collate([Frame("sheet", points, np.zeros((0, 7), np.float32), ())], cfg).to(device)
    row = {"preset": cfg.preset, "data": cfg.data if cfg.data in PAPER else "kitti", "points": len(points),
           "parameters": count_parameters(detector), "macs": int(count_macs(detector, batch))}  # fmt: skip
    row["paper_f"], row["paper_p"], row["notes"] = PAPER[row["data"]].get(cfg.preset, (None, None, ""))
    if timed:
        row["latency_ms"], row["memory_bytes"] = time_and_memory(lambda: detector(detector.prepare(batch)), device)
    return row


def markdown(record: dict[str, Any]) -> str:
    """The table and what must be said with it, of a record as --json writes it."""
    lines = [["model", "data", *(head for head, *_ in COLUMNS), "note"], ["---", "---", *["--:"] * len(COLUMNS), "---"]]
    for row in record["rows"]:
        cells = ["—" if row.get(key) is None else format(row[key] / unit if unit > 1 else row[key], form)
                 for _, key, unit, form in COLUMNS]  # fmt: skip
        lines.append([f"`{row['preset']}`", row["data"], *cells, row["notes"]])
    notes = [f"- {note}: {NOTES[note]}" for note in sorted({row["notes"] for row in record["rows"]} - {""})]
    said = f"`{record['command']}`, {record['date']}: {record['frame']}; {record['machine']}."
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", *notes, *[""] * bool(notes), said])


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="detector.py sheet", description=__doc__)
    parser.add_argument("--presets", metavar="A,B", help="these; ratios need the teacher among them [the paper's]")
    parser.add_argument("--points", type=Path, metavar="FILE", help="a real scan, taken whole, instead of simulated "
                        "ones: raw .bin (float32, N x the preset's point_features) or .npy")  # fmt: skip
    parser.add_argument("--no-latency", action="store_true", help="neither memory nor latency")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU [%(default)s]")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the same rows for machines")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="rewrite its <!-- table sheet --> ... <!-- end -->")
    args = parser.parse_args(argv)
    block = re.compile(r"(?<=<!-- table sheet -->\n).*?(?=<!-- end -->)", re.DOTALL)
    if args.readme and not (args.readme.is_file() and block.search(args.readme.read_text(encoding="utf-8"))):
        raise InputError(f"{args.readme}: expected a file with the lines <!-- table sheet --> and <!-- end -->")
    if args.threads < 1 or (args.json and not args.json.parent.is_dir()):
        raise InputError(f"expected --threads from 1 on and a folder for --json; found {args.threads} and {args.json}")
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as in training and evaluation
    names = args.presets.split(",") if args.presets else list(dict.fromkeys([*PAPER["nuscenes"], *PAPER["kitti"]]))
    cfgs = [preset(name, data) for name in names for data in [d for d in PAPER if name in PAPER[d]] or [""]]
    clouds = [read_cloud(args.points, features) if args.points else simulated_cloud(features, fov_only)
              for features, fov_only in ((cfg.point_features, cfg.fov_only) for cfg in cfgs)]  # fmt: skip
    rows = [measure(cfg, points, not args.no_latency) for cfg, points in zip(tqdm(cfgs, disable=None), clouds)]
    for row in rows:
        teacher = re.sub(r"-(s|xs|xxs|v[\d.]+)(?=-cpu$|$)", "", row["preset"])
        for other in (r for r in rows if (r["preset"], r["data"]) == (teacher, row["data"])):
            row |= {f"{key}_of_teacher": row[key] / other[key] for key in ("parameters", "macs")}
    from runs import machine

    source = args.points or "one simulated sweep of 64 beams, of which kitti's presets get what the camera sees"
    record = {"command": shlex.join(["python", "detector.py", "sheet", *argv]), "date": f"{datetime.date.today()}",
              "frame": f"{source}: " + ", ".join({f"{r['points']:,} points ({r['data']})": 0 for r in rows}),
              "machine": f"{machine()}, {args.threads} thread{'s' * (args.threads > 1)}", "rows": rows}  # fmt: skip
    print(table := markdown(record))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if args.readme:
        page = args.readme.read_text(encoding="utf-8")
        args.readme.write_text(block.sub(lambda _: table + "\n", page, count=1), encoding="utf-8")
