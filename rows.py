"""Rows: what a suite's table says, made of the records of its runs.   (reads after: experiments.py  next: table.py)

A row is one model of a suite and one metric: its mean and spread over the seeds, how far it is ahead of the student alone
(`fair.statistic`), and the records it comes from. `table.py` writes them in Markdown or JSON, `curves.py` draws them.
"""

import json
from pathlib import Path
from typing import Any

from cli import InputError
from fair import KITTI, METRICS, equal_epochs, longer_variant, scores, statistic
from suites import ALONE, METHODS, SUITES, TEACHER, Suite

NEEDED = ("teacher", "student", "variant", "seed", "epochs", "steps", "parameters", "macs", "scores", "last", "resampled")
LABELS = {"hinton": "Hinton KD", "hint": "Hint", "mimic": "Mimic", "fg": "FG", "gid-f": "GID-F", "gid-l": "GID-L", "lad": "LAD",
          "pp-logit": "PP-Logit", "point-distiller": "PointDistiller", "rdd": "RDD (default)", "rdd-printed": "RDD as printed",
          "rdd-paper-weights": "RDD, the paper's psi and alphas", "rdd-feat": "RDD, L_feat only",
          "rdd-feat labels": "RDD, L_feat only, around the labels", "rdd-logit": "RDD, L_logit only",
          "rdd-logit x10": "RDD, L_logit only x10", "fade": "RDD, fading", "fg fade": "FG, fading"}  # fmt: skip
# The paper's tables 3 and 4 (arXiv 2308.10308): nuScenes mAP / NDS, KITTI moderate mAP 3D (R40).
PAPER = {
    ("cp-voxel", "teacher"): "56.6/64.7", ("cp-pillar", "teacher"): "49.1/59.7", ("second", "teacher"): "67.2",
    ("pointpillars", "teacher"): "60.3"}  # fmt: skip
for _variants, _table in (
    ("none gid-l gid-f fg lad pp-logit rdd", {
        "cp-voxel-s": "54.0/62.1 54.1/62.1 53.4/61.8 54.3/62.6 53.0/61.7 55.7/64.3 57.1/65.0",
        "cp-voxel-xs": "53.0/61.8 53.2/61.6 52.9/61.3 53.3/61.8 53.0/61.5 53.5/61.7 54.0/62.1",
        "cp-voxel-xxs": "46.7/55.5 46.8/56.5 47.0/56.4 47.1/56.2 46.6/55.3 47.9/57.8 49.4/57.9",
        "cp-pillar-v0.4": "46.5/55.5 47.3/56.4 47.6/56.8 47.7/57.2 46.9/55.7 48.6/57.5 50.0/58.9",
        "cp-pillar-v0.48": "45.3/54.2 45.4/54.5 46.1/55.3 47.0/56.2 45.2/54.4 47.3/57.5 48.8/58.5",
        "cp-pillar-v0.64": "44.0/52.3 44.2/52.6 44.4/53.9 44.7/53.7 43.9/53.2 45.0/55.9 45.8/56.1"}),
    ("none gid-l gid-f fg lad point-distiller pp-logit rdd", {
        "second-s": "65.6 66.3 66.8 66.6 67.0 67.8 67.7 68.2", "second-xs": "64.2 65.0 65.2 65.3 65.7 66.3 66.4 67.0",
        "pointpillars-s": "58.6 58.9 59.1 59.4 59.2 62.3 62.2 63.0",
        "pointpillars-xs": "58.9 59.2 59.6 59.4 59.7 60.0 60.2 60.9"})):  # fmt: skip
    for _student, _values in _table.items():
        PAPER |= {(_student, variant): value for variant, value in zip(_variants.split(), _values.split(), strict=True)}

Runs = dict[int, dict[str, Any]]  # {seed: record}


def rows_of(name: str, folder: Path) -> list[dict[str, Any]]:
    """What a suite's table says, for machines: one row per teacher, student, variant and metric; mean None: nobody ran it.

    Keys: suite, teacher, student, method (the variant), metric, mean, std, n, values {seed: value}, delta, low, high (the
    difference to the student alone over the seeds that both have, with its interval), macs_ratio, as_long_as (the variants
    in whose time a longer student alone was trained) and `runs`, the records.
    """
    suite = SUITES[name]
    metrics = [m for m in METRICS if (m in KITTI) == ("nuscenes" not in suite.data)]
    records, rows = list(checked_records(folder, metrics).values()), []
    for teacher, student in suite.pairs:
        of, takes = runs_of(suite, records, teacher, student)
        for variant, runs in of.items():
            method, _, change = variant.partition(", ")
            alone = of[ALONE] if method == ALONE else of.get(f"{ALONE}, {change}", of[ALONE])  # beside "rdd, 12 epochs"
            whose = [v for v, longer in takes.items() if longer == variant]
            for metric in metrics:
                rows.append({"suite": name, "teacher": teacher, "student": student if variant != TEACHER else teacher,
                             "method": variant, "metric": metric, **statistic(runs, alone, metric),
                             "macs_ratio": _ratio(runs, of[TEACHER]), "as_long_as": whose, "runs": runs})  # fmt: skip
    return rows


def runs_of(suite: Suite, records: list[dict[str, Any]], teacher: str, student: str) -> tuple[dict[str, Runs], dict[str, str]]:
    """{variant: its runs} of a pair, in the order of a table: the teacher, the suite's variants, each followed by itself at
    equal share, the student alone for as long as a method takes; and {variant: the student alone that had its time}."""
    mine = [record for record in records if (record["teacher"], record["student"]) == (teacher, student)]
    found = sorted({record["variant"] for record in mine})
    names = []
    for variant in suite.variants:
        names += [variant, *(name for name in found if suite.equal_share and name == f"{variant}, equal share")]
    of = {TEACHER: {r["seed"]: r for r in records if (r["student"], r["variant"]) == (teacher, TEACHER)}}
    of |= {name: {r["seed"]: r for r in mine if r["variant"] == name} for name in names}
    takes = {name: longer_variant(equal_epochs(runs[0]["epochs"], runs[0]["price"])) for name, runs in of.items()
             if 0 in runs and runs[0].get("price")}  # fmt: skip
    # Where equal time is asked for; not another suite's, as "none, 12 epochs" of `longer`
    longer = [name for name in found if suite.equal_time and name in takes.values() and name not in of]
    return of | {name: {r["seed"]: r for r in mine if r["variant"] == name} for name in longer}, takes


def record_name(student: str, variant: str, seed: int) -> str:
    """The folder of a run and the name of its record."""
    if variant == TEACHER:
        return f"{student}-seed{seed}"
    return f"{student}-{variant}-seed{seed}".replace(", ", "-").replace(" epochs", "epochs").replace(" ", "-")


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """{run: record} of a suite. Raises InputError for a file that is none."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            found[path.stem] = json.loads(path.read_text())
            [found[path.stem][key] for key in ("variant", "seed", "seconds", "config")]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: expected the record of a run, found {error!r}") from None
    return found


def checked_records(folder: Path, metrics: list[str]) -> dict[str, dict[str, Any]]:
    """{run: record} of a suite. Raises InputError for a record that a table with these metrics cannot be made of, that is another
    run's than its name says, or that had another teacher than the record of its seed's teacher."""
    every = read_records(folder)
    for run, record in every.items():
        path = folder / f"{run}.json"
        if lost := [key for key in NEEDED if key not in record]:
            raise InputError(f"{path}: expected the record of a run, found one without {', '.join(lost)}")
        if run != (name := record_name(record["student"], record["variant"], record["seed"])):
            raise InputError(f"{path}: expected the record of a run of that name, found that of {name}")
        taught_by = every.get(record_name(record["teacher"], TEACHER, record["seed"]), {}).get("weights")
        if taught_by and record.get("teacher_weights") not in (None, taught_by):
            raise InputError(f"{path}: this student had another teacher than that of the records of seed {record['seed']}")
        try:
            known = scores(record).keys() & record["resampled"].keys()
            classes(record)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise InputError(f"{path}: expected the record of a run, its scores are none ({error!r})") from None
        if lost := [metric for metric in metrics if metric not in known]:
            raise InputError(f"{path}: expected the record of a run with {' and '.join(lost)}, found {', '.join(sorted(known))}")
    return every


def _ratio(runs: Runs, teachers: Runs) -> float | None:
    both = sorted(set(runs) & set(teachers))
    return runs[both[0]]["macs"] / teachers[both[0]]["macs"] if both else None


def classes(record: dict[str, Any]) -> dict[str, float]:
    """AP of each class, percent: KITTI's moderate AP_R40 in 3D (no result counts as 0), nuScenes' mean over distances."""
    last = record["last"]
    if "mean_dist_aps" in last:
        return {name: 100 * ap for name, ap in last["mean_dist_aps"].items()}
    levels = {name: table["AP_R40"]["3d"] for name, table in last["strict"].items()}
    return {f"{name} 3D": level["moderate"] if level else 0.0 for name, level in levels.items()}


def label_of(row: dict[str, Any]) -> str:
    variant = row["method"]
    if variant == TEACHER:
        return f"teacher `{row['student']}`"
    if variant.startswith(ALONE):
        whose = [LABELS.get(v, v) for v in row["as_long_as"]]
        equals = f": the time of {', '.join(whose) if len(whose) < 4 else f'{len(whose)} methods'}" if whose else ""
        return f"`{row['student']}` alone{variant.removeprefix(ALONE)}{equals}"
    name, *change = variant.split(", ")
    method, _, rest = name.partition(" ")
    known = f"{LABELS.get(method, method)} {rest}" if method in METHODS and rest else f"RDD: {name}"  # "fg x10", "roi 3"
    known = LABELS.get(name) or (name if name in METHODS else known)
    return f"`{row['student']}` + {', '.join([known, *change])}"
