"""Experiments: suites of runs with seeds, resumable, one JSON per run.   (reads after: train.py  next: table.py)

    python experiments.py demo                     one seed: simulate, teacher, students, table, pictures  (make demo)
    python experiments.py demo --seeds 0 1 2       the README's table; finished runs are kept, a killed suite goes on

The protocol, the same for every method: one teacher per seed; the student's initialisation, data order and schedule
depend on the seed only; the last epoch is reported, whatever the best was; every seed is reported. Because distilling
makes a step longer, the student alone is also trained for the wall-clock time that the distilled one took.
"""

import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from cli import ArgumentParser, run_cli
from config import Config
from presets import DEFAULT_PAIR, preset

ROLES = ("teacher", "none", "rdd", "none, equal time")


def run_once(cfg: Config, folder: Path, teacher: Any, results: Path, role: str) -> dict[str, Any]:
    """Train (or find) one run, and its record: results/NAME.json."""
    from data.batch import collate, open_data
    from runs import commit, machine
    from sheet import count_macs, count_parameters
    from train import train

    detector = train(cfg, folder, teacher)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    validation = open_data(cfg, "val")
    sample = collate([validation[i] for i in range(min(8, len(validation)))], cfg)
    record = {
        "suite": folder.parent.name, "role": role, "seed": cfg.seed, "preset": cfg.preset, "method": cfg.method,
        "epochs": cfg.epochs, "steps": evaluations[-1]["step"], "seconds": evaluations[-1]["seconds"],
        "parameters": count_parameters(detector), "macs": count_macs(detector, sample),
        "last": evaluations[-1]["result"],
        "best": max(evaluations, key=lambda e: e["moderate_map_3d"])["result"],
        "command": shlex.join(sys.argv), "commit": commit(), "machine": machine(),
        "config": json.loads((folder / "config.json").read_text()),
    }  # fmt: skip
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{folder.name}.json"
    if not path.is_file():  # a finished run keeps the record it had when it was trained
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(temporary, path)
    return json.loads(path.read_text())


def demo(seeds: list[int], runs: Path, results: Path) -> None:
    """Teacher, student alone, student + RDD, student alone for RDD's time; on the simulated KITTI-like set."""
    from train import prepare_data
    from weights import load_detector

    name_t, name_s = DEFAULT_PAIR["sim"]
    base = prepare_data(Config(data="sim"), workers=os.cpu_count() or 1)
    for seed in seeds:
        cfg_t = replace(preset(name_t), root=base.root, seed=seed)
        cfg_s = replace(preset(name_s), root=base.root, seed=seed)
        run_once(cfg_t, runs / f"teacher-seed{seed}", None, results, "teacher")
        teacher, _ = load_detector(runs / f"teacher-seed{seed}" / "last.pt")
        alone = run_once(replace(cfg_s, method="none"), runs / f"none-seed{seed}", None, results, "none")
        rdd = run_once(replace(cfg_s, method="rdd"), runs / f"rdd-seed{seed}", teacher, results, "rdd")
        equal = max(1, round(cfg_s.epochs * rdd["seconds"] / alone["seconds"]))
        longer = replace(cfg_s, method="none", epochs=equal, eval_every=equal)
        run_once(longer, runs / f"equal-time-seed{seed}", None, results, "none, equal time")


def pictures(seed: int, runs: Path, out: Path) -> None:
    """What the runs of one seed look like: scenes, selected regions, curves."""
    import torch

    import plot
    from curves import curves
    from data.batch import collate, open_data
    from rdd import RDD
    from weights import load_detector

    out.mkdir(parents=True, exist_ok=True)
    models = {role: load_detector(runs / f"{name}-seed{seed}" / "last.pt")
              for role, name in (("teacher", "teacher"), ("student", "none"), ("student + RDD", "rdd"))}  # fmt: skip
    cfg = models["student + RDD"][0].cfg
    validation = open_data(cfg, "val")
    # The scenes with the most objects say the most; two of them.
    counts = [sum(name in cfg.classes for name in validation[i].names) for i in range(len(validation))]
    chosen = sorted(range(len(validation)), key=lambda i: -counts[i])[:2]
    panels = []
    for i in chosen:
        frame = validation[i]
        batch = collate([frame], cfg)
        boxes = {"ground truth": batch.boxes[0].numpy()}
        for role, (model, _) in models.items():
            with torch.no_grad():
                found = model.decode(model(model.prepare(batch)))[0]
            boxes[role] = found.boxes[found.scores > 0.3].numpy()
        for role in models:
            panels.append({"title": f"frame {frame.id}: {role}", "points": frame.points,
                           "boxes": {k: boxes[k] for k in ("ground truth", role)}, "point_range": cfg.point_range})  # fmt: skip
    plot.bev_scene(out / "scenes.png", panels)

    (teacher, _), (student, content) = models["teacher"], models["student + RDD"]
    distil = RDD(cfg, student.backbone.out_channels, teacher.backbone.out_channels).eval()
    distil.load_state_dict(content["distil"])
    frame = validation[chosen[0]]
    with torch.no_grad():
        batch = collate([frame], cfg)
        x = student.prepare(batch)
        _, seen = distil(student(x), teacher(x))
    plot.regions(out / "regions.png", frame.points, seen["regions"][:, 1:].numpy(),
                 *(seen[k].numpy() for k in ("side", "d", "m")), cfg.point_range, boxes=batch.boxes[0].numpy(),
                 title=f"region pairs of frame {frame.id}")  # fmt: skip
    names = {"teacher": "teacher", "none": "student", "rdd": "student + RDD", "equal-time": "student, RDD's time"}
    curves(out / "curves.png", [(label, folder) for name, label in names.items()
                                     for folder in sorted(runs.glob(f"{name}-seed*"))])  # fmt: skip


def parser() -> ArgumentParser:
    p = ArgumentParser(prog="experiments.py", description=__doc__)
    p.add_argument("suite", choices=["demo"], help="which set of runs")
    p.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="seeds to run [0]")
    p.add_argument("--runs", type=Path, metavar="DIR", help="where checkpoints and logs go [runs/SUITE]")
    p.add_argument("--results", type=Path, metavar="DIR", help="where the records go [runs/SUITE/results]")
    p.add_argument("--figures", type=Path, metavar="DIR", help="where the pictures go [runs/SUITE/figures]")
    return p


def main() -> None:
    args = parser().parse_args()
    runs = args.runs or Path("runs") / args.suite
    results, figures = args.results or runs / "results", args.figures or runs / "figures"
    demo(args.seeds, runs, results)
    from table import demo_table, read_results

    print("\n" + demo_table(read_results(results)))
    pictures(args.seeds[0], runs, figures)
    print(f"\npictures: {', '.join(str(p) for p in sorted(figures.glob('*.png')))}")


if __name__ == "__main__":
    run_cli(main)
