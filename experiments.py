"""Experiments: suites of runs with seeds, resumable, one JSON per run.   (reads after: fair.py  next: rows.py)

    python experiments.py demo                              simulate, teacher, students, table, pictures  (make demo)
    python experiments.py demo --seeds 3                    the README's table; finished runs are kept, a killed suite goes on
    python experiments.py sim-nuscenes --jobs 2 --remember  two processes side by side, each with its share of the cores
    python experiments.py sim-nuscenes --students cp-voxel-xxs-cpu --variants none rdd      some of its rows

The protocol, the same for every method: one teacher per seed; the student's initialisation, data order and schedule
depend on the seed only; the last epoch is reported, whatever the best was; every seed is reported. Weights are the
published ones (RDD's in the row rdd-paper-weights); the suite `tuning` tries three of each method, and more where the
strongest wins, the same rule for all. Because distilling makes a step longer, the student alone is also trained for the
time that each method takes: epochs x the price of a step, which is measured in turns with the student alone's
(`fair.price_of`), because wall time of whole runs depends on what else the machine does. A teacher's weights lie beside
its record, so that students of its seed can be added on any machine (--results, --from-seed). --remember makes a suite
of many methods about one and a half times as fast, with the same results.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from cli import ArgumentParser, InputError, did_you_mean, run_cli, write_text
from config import Config, from_json, override
from fair import equal_epochs, equal_share, longer_variant, price_of, remembered, shares
from presets import preset
from rows import read_records, record_name
from suites import ALONE, SCENES, SUITES, TEACHER, Suite

if TYPE_CHECKING:
    from detector import Detector


@dataclass(frozen=True)
class Job:
    """One run of a suite."""

    name: str
    teacher: str  # preset
    student: str  # preset; of a teacher's own run, the teacher
    variant: str
    cfg: Config
    needs: str = ""  # the teacher's run; "" = none


def jobs(suite: Suite, root: str, variants: list[str], seeds: int | None, records: dict[str, dict]) -> list[Job]:
    """The runs of a suite, seed by seed, each seed's teacher first.

    What depends on what others measured, `records`, is known once they have: runs of equal time, and of equal share.
    """
    found: dict[str, Job] = {}

    def add(teacher: str, student: str, variant: str, cfg: Config) -> None:
        name, teachers_run = record_name(student, variant, cfg.seed), record_name(teacher, TEACHER, cfg.seed)
        needs = teachers_run if cfg.method != "none" or cfg.inherit else ""
        found.setdefault(name, Job(name, teacher, student, variant, cfg, needs))

    for teacher, student in suite.pairs:
        for variant in variants:
            for seed in range(suite.first_seed, suite.first_seed + (seeds or suite.seeds.get(variant, suite.seeds[""]))):
                base = {**suite.changes, "data": suite.data, "root": root, "seed": seed}
                add(teacher, teacher, TEACHER, override(preset(teacher, suite.data), base))
                cfg = override(preset(student, suite.data), {**base, **suite.variants[variant]})
                add(teacher, student, variant, cfg)
                if suite.equal_share and (changes := alphas_at_equal_share(records, cfg, student, variant)):
                    add(teacher, student, f"{variant}, equal share", override(cfg, changes))
                price = records.get(record_name(student, variant, 0), {}).get("price")  # that of seed 0
                if suite.equal_time and price:
                    epochs = equal_epochs(cfg.epochs, price)
                    longer = override(preset(student, suite.data), {**base, **suite.variants[ALONE], "epochs": epochs})
                    add(teacher, student, longer_variant(epochs), longer)
    return sorted(found.values(), key=lambda job: (job.cfg.seed, job.variant != TEACHER))


def alphas_at_equal_share(records: dict[str, dict], cfg: Config, student: str, variant: str) -> dict[str, float]:
    """The alphas of a variant of RDD at the default's share of the gradient: those of the row's runs, if it has any, so that
    all its seeds have the same; else by what was measured on the lowest seed that has the variant and the default; else {}."""
    seeds = sorted({record["seed"] for record in records.values()})
    for seed in seeds:
        if run := records.get(record_name(student, f"{variant}, equal share", seed)):
            return {alpha: run["config"][alpha] for alpha in ("alpha1", "alpha2")}
    for seed in seeds:
        names = record_name(student, variant, seed), record_name(student, "rdd", seed)
        if all(name in records for name in names):
            return equal_share(cfg, *(records[name] for name in names))
    return {}


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Whether this process may do the job of that file; the claim ends with the block, or with the process. Raises OSError
    on a disk without locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(path).acquire(blocking=False)
    except Timeout:
        yield False
        return
    with lock:
        yield True


def run_suite(name: str, given: Any, root: str) -> None:
    """Do jobs until every one has its record. Several processes may do this at once, on one machine or a shared disk.

    given: the options of `parser`, by name. One job a turn of the outer loop: its record may open others (equal time).
    Raises InputError at the end for runs that could not be finished, when all others are, and at once for a record that is
    another run's.
    """
    whole, failed = SUITES[name], {}
    suite = replace(whole, pairs=tuple(pair for pair in whole.pairs if pair[1] in given.students))
    while True:
        records = read_records(given.results)
        every = [job for job in jobs(suite, root, given.variants, given.seeds, records) if job.cfg.seed >= given.from_seed]
        check_same_runs(every, records, given.results)
        open_jobs = [job for job in every if job.name not in records and not {job.name, job.needs} & failed.keys()]
        if given.remember:  # while any run of the suite may ask again, also one that this command leaves out
            others = jobs(whole, root, list(whole.variants), None, records)
            asking = {job.needs for job in [*every, *others] if job.name not in records}
            for needed in {job.needs for job in every} - asking - {""}:
                shutil.rmtree(given.runs / needed / "outputs", ignore_errors=True)
        if not open_jobs:
            break
        for job in open_jobs:
            needed = job.needs and not (given.results / f"{job.needs}.pt").is_file()
            if needed:  # its teacher first, which may have a record, but no weights here
                job = next(j for j in every if j.name == job.needs)
            finished = given.results / f"{job.name}{'.pt' if needed else '.json'}"
            with claim(given.runs / f"{job.name}.lock") as mine:
                if mine and not finished.is_file():  # nobody has finished it since the records were read
                    try:
                        run_once(name, job, given.runs, given.results, given.remember, given.workers)
                    except InputError as error:  # as of a loss that is not finite: the others can still be run
                        print(f"{job.name}: {error}")
                        failed[job.name] = str(error)  # not the error: its traceback would hold the run's tensors
                    break
        else:  # every open job has been claimed: others are at what is left
            time.sleep(2)
    if failed:
        raise InputError("; ".join(f"{name}: {error}" for name, error in failed.items()))


def check_same_runs(every: list[Job], records: dict[str, dict[str, Any]], results: Path) -> None:
    """A record counts for the run that the suite means today. Raises InputError for another one, naming what differs."""
    from runs import differences, made_with

    for job in every:
        if job.name in records:
            data, trained_on = made_with(job.cfg.root), records[job.name].get("data")
            if data and trained_on not in (None, data):  # None: older records do not know theirs
                raise InputError(f"{results / job.name}.json: a run on {trained_on or 'data not simulated'}, in {job.cfg.root} "
                                 f"there is {data}; move results and runs away to start anew")  # fmt: skip
            try:
                before = from_json(records[job.name]["config"])
            except InputError as error:
                raise InputError(f"{results / job.name}.json: {error}") from None
            if other := [k for k in differences(before, job.cfg) if k not in ("root", "eval_every")]:  # no part of training
                raise InputError(f"{results / job.name}.json: a run with {other[0]} = {getattr(before, other[0])}, the suite has "
                                 f"now {getattr(job.cfg, other[0])}; move results and runs away to start anew")  # fmt: skip


def teacher_of(job: Job, results: Path) -> "Detector | None":
    """The trained teacher of a job, results/NAME.pt, None for a student alone. One teacher a seed, the same for all, also for who
    adds rows on another machine: raises InputError where the weights are not of the run that has the record."""
    from runs import fingerprint
    from weights import load_detector

    if not job.needs:
        return None
    teacher = load_detector(results / f"{job.needs}.pt")[0]
    known = read_records(results).get(job.needs, {}).get("weights")
    if known and known != fingerprint(teacher):
        raise InputError(f"{results / job.needs}.pt: expected the teacher of {results / job.needs}.json, found other weights; "
                         "bring its own, or move results away to start anew")  # fmt: skip
    return teacher


def run_once(suite: str, job: Job, runs: Path, results: Path, keep_outputs: bool = False, workers: int = 0) -> None:
    """Train one run, or what is missing of it, and write its record, results/NAME.json; of a teacher its weights, NAME.pt."""
    from data.batch import collate, open_run
    from evaluate import detect, resampled
    from runs import fingerprint
    from sheet import count_macs, count_parameters
    from train import train
    from weights import save_checkpoint

    folder, teacher = runs / job.name, teacher_of(job, results)
    measured = teacher is not None and job.cfg.method != "none" and job.cfg.seed == 0 and ", " not in job.variant
    data = open_run(job.cfg, runs, workers)
    price, kept = price_of(job.cfg, teacher, data, workers) if measured else (None, None)
    if teacher is not None and keep_outputs:
        teacher.forward = remembered(teacher, runs / job.needs / "outputs" / fingerprint(teacher))
    detector, validation = train(job.cfg, folder, teacher, workers, data=data), data[1]
    device = next(detector.parameters()).device
    found = detect(detector, validation, device, workers=workers)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    clipped = [line["grad_norm"] > job.cfg.clip for line in lines
               if line["kind"] == "train" and line["grad_norm"] is not None]  # else half precision overflowed  # fmt: skip
    key = "nds" if "nds" in evaluations[-1] else "moderate_map_3d"
    sample = collate([validation[i] for i in range(min(8, len(validation)))], job.cfg).to(device)
    began = dict(line.split(" ", 1) for line in (folder / "environment.txt").read_text().splitlines())
    record = {
        "suite": suite, "teacher": job.teacher, "student": job.student, "variant": job.variant, "seed": job.cfg.seed,
        "method": job.cfg.method, "epochs": job.cfg.epochs, "steps": evaluations[-1]["step"],
        "seconds": evaluations[-1]["seconds"], "price": price, "price_kept": kept, "shares": shares(lines),
        "clipped": sum(clipped) / max(1, len(clipped)),  # at how many of the logged steps the gradient was longer than `clip`
        "parameters": count_parameters(detector), "macs": count_macs(detector, sample),
        "scores": [{k: v for k, v in e.items() if k not in ("kind", "result")} for e in evaluations],
        "last": evaluations[-1]["result"], "best": max(evaluations, key=lambda e: e[key])["result"],
        "resampled": resampled(validation, found, job.cfg), "commit": began["commit"],
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": began["machine"], "threads": int(began["threads"]), "date": time.strftime("%Y-%m-%d"),
        "data": began.get("data"), "weights": fingerprint(detector), "teacher_weights": fingerprint(teacher) if teacher else None,
        "config": json.loads((folder / "config.json").read_text()),
    }  # fmt: skip
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{job.name}.json"
    if not path.is_file():  # a finished run keeps the record it had when it was trained
        write_text(path, json.dumps(record, indent=1) + "\n")
    if job.variant == TEACHER:
        if read_records(results)[job.name].get("weights") not in (None, record["weights"]):
            raise InputError(f"{path}: the teacher trained here has other weights than that of the record, whose students need "
                             "its own; bring its .pt, or choose another --results")  # fmt: skip
        save_checkpoint(path.with_suffix(".pt"), {"format": 1, "config": record["config"], "model": detector.state_dict(),
                                                  "step": record["steps"]})  # fmt: skip


def side_by_side(count: int, words: list[str], runs: Path) -> None:
    """The same command in `count` processes, each with its share of the cores; what they say goes to files."""
    import torch

    runs.mkdir(parents=True, exist_ok=True)
    share = str(max(1, torch.get_num_threads() // count))  # the cores that this process may use
    environment = {**os.environ, "OMP_NUM_THREADS": share, "MKL_NUM_THREADS": share}
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    logs = [runs / f"job{k}.log" for k in range(count)]
    print(f"{count} processes of {share} threads; what they say: {', '.join(map(str, logs))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: the children end with it
    children = [subprocess.Popen([sys.executable, __file__, *words, "--jobs", "1", "--no-pictures"],
                                 env={**environment, "CUDA_VISIBLE_DEVICES": gpus[k % len(gpus)]},
                                 stdout=open(log, "a"), stderr=subprocess.STDOUT) for k, log in enumerate(logs)]  # fmt: skip
    try:
        ended = [child.wait() for child in children]
    except BaseException:
        for child in children:
            child.terminate()
        raise
    for log, status in zip(logs, ended, strict=True):
        if status:
            said = log.read_text().strip().splitlines() or ["it said nothing"]
            raise InputError(f"{log}: its process ended with status {status}: {said[-1]}")


# ------------------------------------------------------------------ what a suite looks like


def pictures(suite: Suite, runs: Path, results: Path, out: Path, timed: bool) -> None:
    """What the runs of seed 0 look like: scenes, selected regions; and the curves of all seeds (`timed`: over time too)."""
    import torch

    import plot
    from curves import curves
    from data.batch import collate, open_data
    from rdd import RDD
    from weights import load_detector

    name_t, name_s = suite.pairs[-1]
    files = {"teacher": results / f"{name_t}-seed0.pt", "student": runs / f"{name_s}-{ALONE}-seed0" / "last.pt",
             "student + RDD": runs / f"{name_s}-rdd-seed0" / "last.pt"}  # fmt: skip
    if lost := [path for path in files.values() if not path.is_file()]:
        print(f"no pictures: {lost[0]} is not there; its record says what it found")
        return
    out.mkdir(parents=True, exist_ok=True)
    models = {role: load_detector(path) for role, path in files.items()}
    cfg = models["student + RDD"][0].cfg
    validation = open_data(cfg, "val")
    # The scenes with the most objects say the most; two of them, far from each other in the list.
    counts = [sum(name in cfg.classes for name in validation[i].names) for i in range(len(validation))]
    half = len(counts) // 2
    chosen = sorted({max(part, key=lambda i: counts[i]) for part in (range(half), range(half, len(counts))) if len(part)})
    turn = plot.face_forward if cfg.velocity else lambda points, boxes: (points, boxes)
    panels = []
    for i in chosen:
        frame = validation[i]
        batch = collate([frame], cfg)
        points, truth = turn(frame.points, batch.boxes[0].numpy())
        for role, (model, _) in models.items():
            with torch.no_grad():
                found = model.decode(model(model.prepare(batch)))[0]
            boxes = turn(frame.points[:0], found.boxes[found.scores > 0.3].numpy())[1]
            panels.append({"title": f"frame {frame.id[:8]}: {role}", "points": points, "point_range": cfg.point_range,
                           "boxes": {"ground truth": truth, role: boxes}})  # fmt: skip
    plot.bev_scene(out / "scenes.png", panels)

    (teacher, _), (student, content) = models["teacher"], models["student + RDD"]
    distil = RDD(cfg, student.backbone.out_channels, teacher.backbone.out_channels).eval()
    distil.load_state_dict(content["distil"])
    frame = validation[chosen[0]]
    with torch.no_grad():
        batch = collate([frame], cfg)
        x = student.prepare(batch)
        pairs = distil.compare(student(x), teacher(x if teacher.shares_input(student) else teacher.prepare(batch)))
    points, truth = turn(frame.points, batch.boxes[0].numpy())
    squares = pairs.regions[:, 1:].numpy()
    squares = squares[:, [1, 2, 3, 0]] * [1, -1, 1, -1] if cfg.velocity else squares  # x ahead, y to the left, as `turn`
    plot.regions(out / "regions.png", points, squares, *(x.numpy() for x in (pairs.side, pairs.d, pairs.m)), cfg.point_range,
                 boxes=truth, title=f"region pairs of frame {frame.id[:8]}")  # fmt: skip
    drawn = {"teacher": f"{name_t}-seed*", "student": f"{name_s}-{ALONE}-seed*", "student + RDD": f"{name_s}-rdd-seed*",
             "student, longer": f"{name_s}-{ALONE}-*epochs-seed*"}  # fmt: skip
    curves(out / "curves.png", [(label, folder) for label, pattern in drawn.items()
                                for folder in sorted(runs.glob(pattern)) if folder.is_dir()], timed=timed)  # fmt: skip


def parser() -> ArgumentParser:
    p = ArgumentParser(prog="experiments.py", description=__doc__)
    p.add_argument("suite", choices=list(SUITES), help="which set of runs")
    p.add_argument("--seeds", type=int, metavar="N", help="how many seeds of a variant, from the suite's first on [the suite's]")
    p.add_argument("--from-seed", type=int, default=0, metavar="K",
                   help="leave out seeds below K; --seeds 4 --from-seed 3: seed 3 only [none]")  # fmt: skip
    p.add_argument("--variants", nargs="+", metavar="V", help="some of the suite's variants [all]")
    p.add_argument("--students", nargs="+", metavar="PRESET", help="some of the suite's students [all]")
    p.add_argument("--jobs", type=int, default=1, metavar="N", help="processes side by side, on a GPU each if there are [1]")
    p.add_argument("--workers", type=int, default=0, metavar="N", help="data loading processes of each; change no result [0]")
    p.add_argument("--remember", action="store_true",
                   help="keep what a teacher says of each batch on the disk until no run of the suite asks again: of each "
                        "teacher and seed 5 MB a step with the CPU presets")  # fmt: skip
    p.add_argument("--root", default="", metavar="DIR", help="the data set [its usual place]")
    p.add_argument("--runs", type=Path, metavar="DIR", help="where checkpoints and logs go [runs/SUITE]")
    p.add_argument("--results", type=Path, metavar="DIR", help="where the records go [runs/SUITE/results]")
    p.add_argument("--figures", type=Path, metavar="DIR", help="where the pictures go [runs/SUITE/figures]")
    p.add_argument("--no-pictures", action="store_true", help="runs and records only")
    return p


def main() -> None:
    given = parser().parse_args()
    suite = SUITES[given.suite]
    given.runs = given.runs or Path("runs") / (suite.folder or given.suite)
    given.results, figures = given.results or given.runs / "results", given.figures or given.runs / "figures"
    known = {"variants": list(suite.variants), "students": [student for _, student in suite.pairs]}
    for option, names in known.items():
        setattr(given, option, getattr(given, option) or names)
        for name in getattr(given, option):
            if name not in names:
                raise InputError(f"--{option}: unknown {name!r}{did_you_mean(name, names)}")
    for option, number in (("--jobs", given.jobs), ("--seeds", given.seeds)):
        if number is not None and number < 1:
            raise InputError(f"{option}: expected a number from 1 on; found {number}")
    if given.workers < 0:
        raise InputError(f"--workers: expected a number from 0 on; found {given.workers}")
    import parallel
    from evaluate import writable_folder

    parallel.alone("experiments.py")  # it starts others by itself (--jobs)

    for folder in (given.runs, given.results, *([] if given.no_pictures else [figures])):
        writable_folder(folder)
    from data.batch import prepare_data

    if suite.scenes and not given.root:
        from data.simulate_kitti import simulate_kitti
        from data.simulate_nuscenes import simulate_nuscenes

        given.root = f"datasets/{suite.scenes}"
        (simulate_nuscenes if "nuscenes" in suite.data else simulate_kitti)(given.root, **SCENES[suite.scenes])
    first = replace(preset(suite.pairs[0][0], suite.data), data=suite.data, root=given.root)
    root = prepare_data(first, workers=os.cpu_count() or 1).root
    if given.jobs > 1:
        side_by_side(given.jobs, sys.argv[1:], given.runs)
    else:
        run_suite(given.suite, given, root)
    if given.no_pictures:
        return
    from table import suite_table

    print("\n" + suite_table(given.suite, given.results))
    if "rdd" in given.variants and ALONE in given.variants:
        chosen = replace(suite, pairs=tuple(pair for pair in suite.pairs if pair[1] in given.students))
        pictures(chosen, given.runs, given.results, figures, timed=not given.remember)
        if drawn := sorted(figures.glob("*.png")):
            print(f"\npictures: {', '.join(map(str, drawn))}")


if __name__ == "__main__":
    run_cli(main)
