"""On a GPU: sparse convolution against spconv, steps in every precision, latency, the rate reached.   (after: detectors.py)

    sparse     the encoders of second and cp-voxel, forward and backward, this project's engine beside spconv's kernels, and
               how far their outputs and gradients are apart (1e-3 of the largest is the goal)
    step       forward, loss, backward: float32, TF32, float16, bfloat16, and bfloat16 with the dense layers compiled; memory
    latency    one scan from points to boxes, the 50th and 90th percentile, every published detector and student
    rate       the BEV backbone's share of the card's own rate in one large matrix product

Times are CUDA events. Without a GPU every row says "not measured"; and these lines have not been run on one yet.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median, quantiles

from benchmarks import Row, run
from benchmarks.detectors import forward, scans, training_step
from cli import run_cli

ENCODERS, STEPS, RATES = ("second", "cp-voxel"), ("second", "pointpillars", "cp-voxel"), ("second", "pointpillars")
LATENCY_RUNS = 100
PRECISIONS = ("float32", "TF32", "float16", "bfloat16", "bfloat16, compiled")


def names_of(kind: str) -> tuple[str, ...]:
    """The presets of a kind of row; latency: those of KITTI that are not made for a CPU."""
    from presets import PRESETS

    known = {"sparse": ENCODERS, "step": STEPS, "rate": RATES}
    return known.get(kind) or tuple(n for n, make in PRESETS.items() if not n.endswith("-cpu") and make().data != "nuscenes")


def seconds(function: Callable[[], object], times: int) -> list[float]:
    """CUDA's own seconds of every call, after three to warm up."""
    import torch

    for _ in range(3):
        function()
    found = []
    for _ in range(times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / 1000)
    return found


@contextmanager
def precision(name: str) -> Iterator[None]:
    """What --amp, and the switches of torch and spconv, make of a precision."""
    import torch

    import sparse

    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(name.split(",")[0])
    switches = [(torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32")]
    if sparse.find_spconv():
        switches.append((importlib.import_module("spconv.constants"), "SPCONV_ALLOW_TF32"))  # its own; read in every call
    before = [getattr(*switch) for switch in switches]
    for switch in switches:
        setattr(*switch, name != "float32")
    try:
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            setattr(*switch, value)


def on_gpu(name: str):
    """A detector and one KITTI frame on the card."""
    import torch

    from detector import build
    from presets import preset

    cfg = preset(name, "kitti")
    return build(cfg).cuda(), scans(cfg).to(torch.device("cuda"))


def sparse_row(name: str, repeats: int) -> Row:
    import sparse
    from benchmarks.sparse import difference

    detector, batch = on_gpu(name)
    encoder, times, found = detector.encoder.train(), {}, {}

    def call() -> list:
        encoder.zero_grad()
        out = encoder(detector.prepare(batch))
        out.sum().backward()
        return [out.detach(), *(p.grad for p in encoder.parameters())]

    before = sparse.engine
    for engine in ("torch", "spconv") if sparse.find_spconv() else ("torch",):
        sparse.engine = engine
        times[engine], found[engine] = median(seconds(call, repeats)), call()
    sparse.engine = before
    theirs, note = times.get("spconv"), "spconv is not installed"
    if theirs:
        (out, *grads), (their_out, *their_grads) = found["torch"], found["spconv"]
        note = f"output same to {difference([out], [their_out]):.0e}, gradients to {difference(grads, their_grads):.0e}"
    return Row("gpu", f"sparse encoder of {name}, forward and backward", times["torch"], "spconv", theirs,
               theirs and theirs / times["torch"], note=note)  # fmt: skip


def step_rows(name: str, repeats: int) -> Iterator[Row]:
    import torch

    detector, batch = on_gpu(name)
    for what in PRECISIONS:
        if "compiled" in what:
            detector.backbone.compile(), detector.head.compile()
        torch.cuda.reset_peak_memory_stats()
        with precision(what):
            took = median(seconds(partial(training_step, detector, batch), repeats))
        memory = torch.cuda.max_memory_allocated() / 2**20
        yield Row("gpu", f"step of {name}, batch 1, {what}", took, note=f"{memory:,.0f} MiB")


def latency_row(name: str) -> Row:
    import torch

    detector, batch = on_gpu(name)
    detector.eval()

    def call() -> None:
        with torch.no_grad(), precision("float32"):
            detector.decode(detector(detector.prepare(batch)))

    found = quantiles(seconds(call, LATENCY_RUNS), n=10)
    return Row("gpu", f"latency of {name}, batch 1, float32", found[4], note=f"90 % within {1000 * found[8]:.1f} ms")


def rate_row(name: str, repeats: int) -> Row:
    """In TF32, both."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    detector, batch = on_gpu(name)
    forward(detector, batch)
    square = torch.randn(8192, 8192, device="cuda")
    with precision("TF32"), torch.no_grad():
        bev = detector.encoder(detector.prepare(batch)).contiguous(memory_format=torch.channels_last)
        with FlopCounterMode(display=False) as counter:
            detector.backbone(bev)
        rate = counter.get_total_flops() / median(seconds(lambda: detector.backbone(bev), repeats))
        peak = 2 * 8192**3 / median(seconds(lambda: square @ square, repeats))
    return Row("gpu", f"BEV backbone of {name}, TF32: share of the card's matrix rate", rate / peak, unit="of it",
               note=f"{rate / 1e12:.1f} of {peak / 1e12:.1f} TFLOP/s")  # fmt: skip


def rows(repeats: int) -> Iterator[Row]:
    import torch

    if not torch.cuda.is_available():
        cases = {"sparse": "sparse encoder of {}, forward and backward", "step": "step of {}, batch 1, in every precision",
                 "latency": "latency of {}, batch 1", "rate": "BEV backbone of {}: share of the card's matrix rate"}  # fmt: skip
        for kind, case in cases.items():
            for name in names_of(kind):
                yield Row("gpu", case.format(name), None, note="no GPU here")
        return
    for name in names_of("sparse"):
        yield sparse_row(name, repeats)
    for name in names_of("step"):
        yield from step_rows(name, repeats)
    for name in names_of("latency"):
        yield latency_row(name)
    for name in names_of("rate"):
        yield rate_row(name, repeats)


if __name__ == "__main__":
    run_cli(lambda: run(rows, __doc__))
