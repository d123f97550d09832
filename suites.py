"""Suites: which runs make which table.   (reads after: evaluate.py  next: fair.py)

A suite is data: pairs of teacher and student, the variants of the student, how many seeds. A run is one of them, with one seed;
its record, results/FOLDER/NAME.json, is what experiments.py writes when it is done. Two suites over the same pair share their
runs where they name the same folder. The headline: the pair CP-Voxel -> XXS of the suite sim-nuscenes.
"""

from dataclasses import dataclass
from typing import Any

from config import METHODS
from presets import READINGS

TEACHER, ALONE = "teacher", "none"


@dataclass(frozen=True)
class Suite:
    """Students of teachers on one data set, each trained with every variant."""

    data: str
    pairs: tuple[tuple[str, str], ...]  # presets: (teacher, student)
    variants: dict[str, dict[str, Any]]  # name -> what it changes in the student's config; ALONE: no teacher
    seeds: dict[str, int]  # variant -> how many seeds, from first_seed on; "" = every other variant
    changes: dict[str, Any]  # in the config of teacher and student
    equal_time: bool = True  # also the student alone for the time of each variant
    equal_share: bool = False  # also each variant of RDD with alphas that give it the default's share of the gradient
    folder: str = ""  # of its runs and records, where it is another suite's
    first_seed: int = 0
    scenes: str = ""  # which of SCENES; "" = the usual ones of the data set


def rdd(**changes: Any) -> dict[str, Any]:
    return {"method": "rdd", **changes}


PRINTED, PAPER = READINGS["printed"], READINGS["paper-weights"]
DEMO = {ALONE: {"method": "none"}, "rdd": rdd()}
EVERY = {ALONE: {"method": "none"}, **{name: {"method": name} for name in METHODS}, "rdd-paper-weights": rdd(**PAPER),
         "rdd-printed": rdd(**PRINTED)}  # fmt: skip
CP = ("cp-voxel-cpu", "cp-voxel-xxs-cpu")
PAIRS = (("cp-voxel-cpu", "cp-voxel-s-cpu"), CP)
TABLE_3 = (PAIRS[0], ("cp-voxel-cpu", "cp-voxel-xs-cpu"), CP, ("cp-pillar-cpu", "cp-pillar-v0.4-cpu"),
           ("cp-pillar-cpu", "cp-pillar-v0.64-cpu"))  # fmt: skip
TABLE_4 = tuple((f"{t}-cpu", f"{t}-{s}-cpu") for t in ("second", "pointpillars") for s in ("s", "xs"))
# Simulated roots beside the usual ones, datasets/NAME: many short scenes, because rare classes are few objects in few scenes
SCENES = {
    "sim-nuscenes-many": {"train": 144, "val": 32, "samples": (5, 10)},
    "sim-nuscenes-tuning": {"train": 48, "val": 16, "samples": (5, 10), "seed": 1},
    "sim-kitti-many": {"train": 1000, "val": 240},
    "sim-kitti-tuning": {"train": 240, "val": 80, "seed": 1000},
}
LONGER = {"epochs": 4, "eval_every": 1}  # on sim-nuscenes-many, 2128 steps
LONGEST = {"epochs": 12, "eval_every": 3}
# The same small budget for every method: three strengths of its own loss, short runs, on scenes of no table and a seed that no
# other suite has looked at. The published one (RDD: the default) among them, the others upwards where it pulls with less than a
# tenth of the detection loss's gradient (LOG.md, Which method helps a student with a tenth of its teacher's MACs?).
WEAK = ("hint", "mimic", "gid-l", "point-distiller")
STRENGTHS = {name: (1.0, 10.0, 100.0) if name in WEAK else (0.1, 1.0, 10.0) for name in METHODS}
# Where the strongest of the three won, ten times as much, and on until it does not
BEYOND = {"hinton": (100.0,), "hint": (1000.0,), "fg": (100.0, 1000.0), "pp-logit": (100.0,), "rdd": (100.0,),
          "point-distiller": (1000.0, 10000.0)}  # fmt: skip
SCORES = (0.45, 0.6, 0.75)  # what LAD has instead: how sure the teacher must be
TUNING = {f"{name} x{x:g}": {"method": name, "kd_weight": x}
          for name in METHODS if name != "lad" for x in (*STRENGTHS[name], *BEYOND.get(name, ()))}  # fmt: skip
TUNING |= {f"lad above {x:g}": {"method": "lad", "label_score": (x,)} for x in SCORES}
# What won the suite `tuning` by its mAP, of the methods whose three strengths have run, where it is not the published one:
# a second row of the method in the headline's table
TUNED = {name: TUNING[name] for name in ("hinton x10", "hint x100", "mimic x10", "fg x100", "lad above 0.75", "pp-logit x10",
                                         "point-distiller x1000", "rdd x10")}  # fmt: skip

# With an anchor head: the same three of each baseline, RDD by its alpha1, 0.2 to 2; and less of both that won by their weakest
TUNING_ANCHOR = {name: what for name, what in TUNING.items()
                 if what["method"] != "rdd" and what.get("kd_weight") not in BEYOND.get(what["method"], ())}  # fmt: skip
TUNING_ANCHOR |= {"fg x0.01": {"method": "fg", "kd_weight": 0.01},
                  **{f"alpha1 {x:g}": rdd(alpha1=x) for x in (0.06, 0.2, 0.6, 2.0)}}  # fmt: skip


def over_headline(*pairs: tuple[str, str], variants: dict[str, dict[str, Any]], seeds: dict[str, int] | None = None,
                  equal_time: bool = False, equal_share: bool = False) -> Suite:  # fmt: skip
    """A suite on the scenes and schedule of the headline; its runs and records are the headline's."""
    return Suite("sim-nuscenes", pairs or (CP,), {ALONE: {"method": "none"}, **variants}, seeds or {"": 3}, LONGER, equal_time,
                 equal_share, "sim-nuscenes", scenes="sim-nuscenes-many")  # fmt: skip


def over_tuning(variants: dict[str, dict[str, Any]], seeds: dict[str, int] | None = None, data: str = "sim-nuscenes",
                first_seed: int = 100, pair: tuple[str, str] = CP) -> Suite:  # fmt: skip
    """A suite on scenes and seeds of no table, about 1000 steps."""
    changes, scenes = {"sim": ({}, "sim-kitti-tuning"),
                       "sim-nuscenes": ({"epochs": 6, "eval_every": 3}, "sim-nuscenes-tuning")}[data]  # fmt: skip
    return Suite(data, (pair,), {ALONE: {"method": "none"}, **variants}, seeds or {"": 1}, changes, equal_time=False,
                 first_seed=first_seed, scenes=scenes)  # fmt: skip


SUITES = {
    "demo": Suite("sim", (CP,), DEMO, {"": 1}, {}),
    # The paper's tables 3 and 4 on simulated data, sized for two CPU cores
    "sim-nuscenes": over_headline(*TABLE_3, variants={**EVERY, **TUNED}, seeds={"": 3, ALONE: 5, "pp-logit": 5, "rdd": 5},
                                  equal_time=True),
    # The headline's students, trained three times as long (squared, fade: with a pull that lets go); and their teachers as
    # well: what is left of a gain when everybody has learned what they can?
    "longer": over_headline(seeds={"": 5}, variants={"fg": EVERY["fg"], "rdd": rdd(),
        **{f"{name}, 12 epochs": {"method": name, **LONGEST} for name in (ALONE, "fg", "rdd")},
        "squared, 12 epochs": rdd(distance="squared", **LONGEST), "fade, 12 epochs": rdd(kd_fade=True, **LONGEST),
        "fg fade, 12 epochs": {"method": "fg", "kd_fade": True, **LONGEST}}),
    "converged": Suite("sim-nuscenes", (CP,), {**{name: EVERY[name] for name in (ALONE, "fg", "rdd", "rdd-paper-weights")},
        "fg fade": {"method": "fg", "kd_fade": True}, "fade": rdd(kd_fade=True)},
        {"": 5}, LONGEST, equal_time=False, scenes="sim-nuscenes-many"),
    "sim-kitti": Suite("sim", TABLE_4, {**EVERY, "alpha1 2": rdd(alpha1=2.0)}, {"": 3}, {"epochs": 4, "eval_every": 1},
                       scenes="sim-kitti-many"),
    "tuning": over_tuning(TUNING, first_seed=103),
    "tuning-kitti": over_tuning(TUNING_ANCHOR, {"": 2}, "sim", first_seed=103, pair=TABLE_4[0]),
    # What RDD with the paper's psi and alphas lacks beside FG: pull, other pairs, finer regions, the labels' places, a square, or
    # something in psi (docs/experiments.md)
    "diagnosis": over_tuning({**{name: TUNING[name] for name in ("hint x100", "fg x0.1", "fg x1")},
        "rdd-paper-weights": rdd(**PAPER), "paper weights x10": rdd(**PAPER, kd_weight=10.0), "norm": rdd(psi_norm=True),
        "norm all pairs": rdd(psi_norm=True, select="all"), "norm roi 5": rdd(psi_norm=True, roi_size=5),
        "norm squared": rdd(psi_norm=True, distance="squared"),
        "norm labels": rdd(psi_norm=True, regions="labels", select="all"),
        "norm map first": rdd(psi_norm=True, psi_order="map-first"), "alpha1 0.2": rdd(alpha1=0.2), "rdd x1": TUNING["rdd x1"]},
        {"": 1, **dict.fromkeys((ALONE, "fg x1", "rdd-paper-weights", "norm", "alpha1 0.2", "rdd x1"), 3)}),
    "diagnosis-kitti": over_tuning({"fg": {"method": "fg"}, "rdd-paper-weights": rdd(**PAPER), "norm": rdd(psi_norm=True),
        "alpha1 0.2": rdd(alpha1=0.2), "alpha1 0.6": rdd(alpha1=0.6), "rdd": rdd()}, {"": 3}, "sim"),
    # Tables 1 and 2, figure 5a, and the paper's silences one at a time: over the runs of sim-nuscenes, its XXS pair
    "regions": over_headline(variants={"hint": {"method": "hint"}, "fg": {"method": "fg"}, "rdd-feat": rdd(alpha2=0.0),
        "rdd-feat labels": rdd(alpha2=0.0, regions="labels", select="all")}),
    "losses": over_headline(variants={"rdd-feat": rdd(alpha2=0.0), "rdd-logit": rdd(alpha1=0.0),
        "rdd-logit x10": rdd(alpha1=0.0, alpha2=2.0), "rdd": rdd(), "alpha2 2": rdd(alpha2=2.0)}),
    "sensitivity": over_headline(variants={"rdd": rdd(), "rdd-printed": rdd(**PRINTED),  # lambda 0.1
        **{f"lambda {x:g}": rdd(**{**PRINTED, "lam": x}) for x in (0.0, 0.02, 0.05, 0.2, 0.5)},
        **{f"alpha1 {x:g}": rdd(alpha1=x) for x in (0.05, 0.1, 0.2, 0.5, 1.0, 5.0)},
        **{f"alpha2 {x:g}": rdd(alpha2=x) for x in (0.05, 0.1, 0.5, 1.0, 2.0)}}),
    "silences": over_headline(equal_share=True, variants={"rdd": rdd(), "rdd-printed": rdd(**PRINTED),
        "spatial softmax": rdd(**{**PRINTED, "softmax_axis": "spatial"}), "standardise": rdd(normalise="standardise"),
        "normalise first": rdd(**{**PRINTED, "psi_order": "normalise-first"}), "select all": rdd(select="all"),
        "select random": rdd(select="random"), "select least": rdd(select="least"),
        "select threshold": rdd(select="threshold", lam=30.0), "select relative": rdd(select="relative", lam=1.0),
        "select soft": rdd(select="soft", lam=30.0), "select gaussian": rdd(select="gaussian"),
        "p_cls mean": rdd(p_cls="mean"), "p_cls peak": rdd(p_cls="peak"), "roi 3": rdd(roi_size=3), "roi 5": rdd(roi_size=5),
        "squared": rdd(distance="squared"), "proposals 20": rdd(proposals=20), "proposals 200": rdd(proposals=200),
        "proposal score .3": rdd(proposal_score=0.3), "norm": rdd(psi_norm=True), "map first": rdd(psi_order="map-first")}),
    # What the suite diagnosis found on tuning scenes, on the headline's (docs/experiments.md)
    "psi": over_headline(*PAIRS, variants={"fg": {"method": "fg"}, "rdd-paper-weights": rdd(**PAPER),
        "norm": rdd(psi_norm=True), "alpha1 0.2": rdd(alpha1=0.2), "rdd": rdd()}),
    # The paper's own pairs, at their full size: real data, GPUs
    "nuscenes": Suite("nuscenes", (*(("cp-voxel", f"cp-voxel-{s}") for s in ("s", "xs", "xxs")),
                                   *(("cp-pillar", f"cp-pillar-v{v}") for v in ("0.4", "0.48", "0.64"))), EVERY, {"": 3}, {}),
    "kitti": Suite("kitti", tuple((t, f"{t}-{s}") for t in ("second", "pointpillars") for s in ("s", "xs")), EVERY, {"": 3}, {}),
}  # fmt: skip
