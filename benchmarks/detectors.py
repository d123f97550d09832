"""Whole detectors: SECOND and PointPillars at full size on one full KITTI frame, batch 1, on the CPU.   (after: __init__.py)

    forward    eval mode, from points to the head's maps: voxels, encoder, bird's-eye view, head
    step       train mode: the same, the targets, the loss, its gradient; no optimiser, no data loading
    dense      the BEV backbone alone: the share of the rate that the machine reaches in one large convolution, and bfloat16

The frame is KITTI's 000003 cut to the image, where ../shared/real lies; else a simulated one. Weights are random: no time
here depends on them. OpenPCDet's modules were measured the same way (median of 3 after a warm-up) on the same class of
machine, on another day and not in turns with ours: read those ratios to the first digit.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks import REAL, Row, compare, in_turns, run
from cli import run_cli

# Seconds of OpenPCDet (commit 8cacccec, torch 2.13.0, spconv 2.3.8's CPU wheel) by preset, threads; its sparse layers, and
# SECOND's whole backward, on one thread, because that wheel's pair search is not safe with more. Its forward decodes the
# boxes of all anchors too, which takes ours 10 ms.
OPENPCDET = {
    ("second", 1): {"forward": 2.056, "step": 6.090}, ("second", 2): {"forward": 1.452, "step": 5.698},
    ("pointpillars", 1): {"forward": 1.245, "step": 3.867}, ("pointpillars", 2): {"forward": 0.764, "step": 2.858},
}  # fmt: skip


@cache
def kitti():
    """A KITTI data set of full frames to measure on: the real ones, or as many simulated ones in a temporary folder."""
    from data.kitti import Kitti

    if (REAL / "kitti").is_dir():
        return Kitti(REAL / "kitti", frames=("000003", "000000", "000001", "000002", "000004", "000005", "000008"))
    from data.simulate_kitti import simulate_kitti

    folder = TemporaryDirectory()  # lives as long as the data set
    data = Kitti(simulate_kitti(folder.name, train=7, val=0))
    data.folder_of_simulation = folder
    return data


def scans(cfg, count: int = 1):
    """A batch of `count` of those frames for a config."""
    from data.batch import collate

    return collate([kitti()[i % len(kitti())] for i in range(count)], cfg)


def training_step(detector, batch) -> None:
    """Forward, targets, loss, backward; the gradients are dropped."""
    from rdd import total_loss

    detector.train()
    loss = total_loss(detector.loss(detector(detector.prepare(batch)), batch), {})
    loss.backward()
    detector.zero_grad()


def forward(detector, batch) -> None:
    import torch

    detector.eval()
    with torch.no_grad():
        detector(detector.prepare(batch))


def in_bfloat16(function: Callable[[], object]) -> Callable[[], object]:
    """The same call as `--amp bfloat16` makes it."""
    import torch

    return lambda: torch.autocast("cpu", torch.bfloat16)(function)()


def rows(repeats: int) -> Iterator[Row]:
    import torch

    import parallel
    from detector import build
    from presets import preset

    parallel.keep_freed_memory()
    threads_before = torch.get_num_threads()
    where = "KITTI frame 000003" if (REAL / "kitti").is_dir() else "a simulated frame"
    for (name, threads), theirs in OPENPCDET.items():
        torch.set_num_threads(threads)
        detector = build(preset(name))
        batch = scans(detector.cfg)
        case = f"{name}, {where}, {threads} thread{'s' * (threads > 1)}"
        for what, function in (("forward", forward), ("step", training_step)):
            ours = median(in_turns({what: partial(function, detector, batch)}, repeats)[what])
            yield Row("detectors", f"{what}, {case}", ours, "OpenPCDet", theirs[what], theirs[what] / ours,
                      1.5 if threads == 2 else None, note="theirs: measured on another day")  # fmt: skip
        if threads == 1:
            continue
        for what, function in (("forward", forward), ("step", training_step)):
            call = partial(function, detector, batch)
            times = in_turns({"bfloat16": in_bfloat16(call), "float32": call}, repeats)
            ours, again = median(times["bfloat16"]), median(f / b for b, f in zip(*times.values(), strict=True))
            peer = "OpenPCDet in float32, ours in bfloat16"
            yield Row("detectors", f"{what} in bfloat16, {case}", ours, peer, theirs[what], theirs[what] / ours,
                      2.5, note=f"theirs: measured on another day; {again:.2f} times our own float32, in turns")  # fmt: skip
        yield from dense_rows(detector, batch, case, repeats)
    torch.set_num_threads(threads_before)


def dense_rows(detector, batch, case: str, repeats: int) -> Iterator[Row]:
    """The BEV backbone beside one large convolution, and in bfloat16."""
    import torch
    from torch import nn
    from torch.utils.flop_counter import FlopCounterMode

    detector.eval()
    with torch.no_grad():
        bev = detector.encoder(detector.prepare(batch)).contiguous(memory_format=torch.channels_last)
        with FlopCounterMode(display=False) as counter:
            neck = detector.backbone(bev)
        flops = counter.get_total_flops()
        with torch.autocast("cpu", torch.bfloat16):
            error = float((detector.backbone(bev).float() - neck).norm() / neck.norm())

    # 128 channels at 200 x 176 cells, SECOND's commonest layer: no other size or order of memory was faster here.
    conv = nn.Conv2d(128, 128, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    x = torch.randn(1, 128, 200, 176).to(memory_format=torch.channels_last)
    conv_flops = 2 * 128 * 128 * 9 * 200 * 176

    def eval_of(module: nn.Module, x: torch.Tensor) -> None:
        with torch.no_grad():
            module.eval()(x)

    def step_of(module: nn.Module, x: torch.Tensor) -> None:
        x = x.detach().requires_grad_()
        y = module.train()(x)
        y.backward(torch.ones_like(y))
        module.zero_grad()

    for what, call, passes in (("forward", eval_of, 1), ("forward and backward", step_of, 3)):
        backbone, plain = partial(call, detector.backbone, bev), partial(call, conv, x)
        times = in_turns({"backbone": backbone, "conv": plain}, repeats)
        rates = [(passes * flops / b, passes * conv_flops / c) for b, c in zip(times["backbone"], times["conv"], strict=True)]
        share = median(b / c for b, c in rates)
        note = "{:.0f} of {:.0f} GFLOP/s".format(*(median(rate) / 1e9 for rate in zip(*rates, strict=True)))
        yield Row("detectors", f"dense {what}, {case}: share of the machine's convolution rate", share, ratio=share, goal=0.7,
                  unit="of it", note=note)  # fmt: skip
        yield compare("detectors", f"dense {what} in bfloat16, {case}", in_bfloat16(backbone), "ours in float32", backbone, None,
                      repeats, f"relative error of the neck {error:.1e}; the limit is the next line")  # fmt: skip
        plain_times = in_turns({"float32": plain, "bfloat16": in_bfloat16(plain)}, repeats)
        limit = median(a / b for a, b in zip(*plain_times.values(), strict=True))
        yield Row("detectors", f"one large convolution, {what} in bfloat16",
                  median(plain_times["bfloat16"]), "in float32", median(plain_times["float32"]), limit)  # fmt: skip


if __name__ == "__main__":
    run_cli(lambda: run(rows, __doc__))
