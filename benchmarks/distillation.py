"""The overhead of distilling: a step with each method beside (a step of the student alone + the teacher's forward).

(after: detectors.py)  Ratio = (student step + teacher forward) / step with distillation; 1 would mean that the method itself
costs nothing. Both heads are made to name as many regions as they may (as untrained networks they would name other numbers
in every run). Also: how much of RDD's step its inner problem takes. KITTI frames, CPU, torch's own number of threads.
"""

from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from itertools import product
from statistics import median

from benchmarks import REPEATS, Row, in_turns, run
from benchmarks.detectors import scans, training_step
from cli import run_cli

PAIRS = (("cp-voxel-cpu", "cp-voxel-xxs-cpu", 2), ("second", "second-s", 1))  # teacher, student, scans
GOAL = 1 / 1.15


def name_many_regions(detector) -> None:
    """Class scores around 1/2, so that every local maximum is above `proposal_score`."""
    from torch import nn

    heads = [detector.head.cls] if detector.cfg.head == "anchor" else [task["heatmap"][-1] for task in detector.head.tasks]
    for conv in heads:
        nn.init.zeros_(conv.bias)


def overhead(method: str, teacher, student, distil, batch, repeats: int) -> dict[str, list[float]]:
    """Seconds of {"student", "teacher", "distilling"}, in turns."""
    import torch

    from baselines import labels_for
    from rdd import total_loss

    def teacher_forward() -> None:
        with torch.no_grad():
            teacher(teacher.prepare(batch))

    def distilling_step() -> None:
        x = student.prepare(batch)
        with torch.no_grad():
            out_t = teacher(x if teacher.shares_input(student) else teacher.prepare(batch))
        out_s = student(x)
        terms, _ = distil(out_s, out_t, batch)
        taught = labels_for(batch, out_t, replace(student.cfg, method=method))
        total_loss(student.loss(out_s, taught), terms).backward()
        student.zero_grad(), distil.zero_grad()

    calls = {"student": partial(training_step, student, batch), "teacher": teacher_forward, "distilling": distilling_step}
    return in_turns(calls, repeats)


def rows(repeats: int) -> Iterator[Row]:
    import torch

    import parallel
    from config import Config
    from detector import build
    from presets import preset
    from rdd import solve_selection
    from train import start_distilling

    parallel.keep_freed_memory()
    (methods,) = (f.metadata["choices"] for f in fields(Config) if f.name == "method")
    for (name_t, name_s, count), method in product(PAIRS, [m for m in methods if m != "none"]):
        teacher, student = build(preset(name_t)), build(preset(name_s))
        name_many_regions(teacher), name_many_regions(student)
        cfg, batch = replace(student.cfg, method=method), scans(student.cfg, count)
        distil = start_distilling(cfg, student, teacher, torch.device("cpu"))
        times = overhead(method, teacher, student, distil, batch, repeats)
        alone = [s + t for s, t in zip(times["student"], times["teacher"], strict=True)]
        ratio = median(a / d for a, d in zip(alone, times["distilling"], strict=True))
        pair = f"{name_t} -> {name_s}, batch {count}, {torch.get_num_threads()} threads"
        yield Row("distillation", f"a step with {method}, {pair}", median(times["distilling"]), "student + teacher's forward",
                  median(alone), ratio, GOAL, note=f"overhead {1 / ratio:.2f}, goal 1.15")  # fmt: skip
        if method == "rdd":
            with torch.no_grad():
                pairs = distil.compare(student(student.prepare(batch)), teacher(teacher.prepare(batch)))
            solve = partial(solve_selection, -pairs.d, pairs.regions[:, 0], cfg.select, cfg.lam, cfg.fraction)
            share = 100 * median(in_turns({"m": solve}, REPEATS)["m"]) / median(times["distilling"])
            yield Row("distillation", f"solving for m* of {len(pairs.d)} regions, share of that step", share, unit="%",
                      note="goal: below 1")  # fmt: skip


if __name__ == "__main__":
    run_cli(lambda: run(rows, __doc__))
