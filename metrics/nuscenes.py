"""The official nuScenes detection metrics: mAP, five errors of the true positives, NDS.   (after metrics/kitti.py)

A re-implementation, in numpy, of the devkit's evaluation (nuscenes-devkit 1.2.0, eval/detection) in its configuration
detection_cvpr_2019: the leaderboard's. Section 3.1 of the nuScenes paper (CVPR 2020) defines the metrics.

  1. Boxes too far from the ego vehicle, labels without a point in them, and bicycles and motorcycles in a bicycle rack
     are left out (`_filter`).
  2. Within a sample and a class each prediction, by falling score, takes the nearest label that is still free, if
     their centres, seen from above, are nearer than a limit: 0.5, 1, 2, 4 m. There is no overlap (`_match`).
  3. AP is the area under precision over recall, without recall and precision below 0.1; mAP its mean.
  4. An error is the mean over what was matched at 2 m, averaged over the recalls that were reached (`_curve`).
  5. NDS = (5 mAP + sum of 5 max(0, 1 - error)) / 10.
Fast, because `_pairs` sorts out the few pairs nearer than 4 m and `_match` serves all samples, classes and limits at once.

One key frame alone has velocity error 1, however good the detector: a label's velocity is the difference of its places
in the key frames before and after; with neither it is unknown, and an error that nobody can measure counts as 1.

dims: S samples · L labels · D predictions (of all samples, in a row) · P pairs of them · M matches · T limits
"""

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cli import InputError, did_you_mean

if TYPE_CHECKING:
    from data.nuscenes_tables import Annotation, Tables

# A box counts if its centre is nearer to the ego vehicle than this, seen from above, metres.
RANGE = {"car": 50, "truck": 50, "bus": 50, "trailer": 50, "construction_vehicle": 50, "pedestrian": 40,
         "motorcycle": 40, "bicycle": 40, "traffic_cone": 30, "barrier": 30}  # fmt: skip
CLASSES = tuple(RANGE)
ATTRIBUTES = ("", "pedestrian.moving", "pedestrian.sitting_lying_down", "pedestrian.standing", "cycle.with_rider",
              "cycle.without_rider", "vehicle.moving", "vehicle.parked", "vehicle.stopped")  # fmt: skip
LIMITS = np.array([0.5, 1.0, 2.0, 4.0])  # metres, (T,)
TP_LIMIT = 2  # the errors are those of the matches at LIMITS[2]
ERRORS = ("trans_err", "scale_err", "orient_err", "vel_err", "attr_err")  # m, 1 - IoU, rad, m/s, 1 - accuracy
UNDEFINED = {"traffic_cone": ("orient_err", "vel_err", "attr_err"), "barrier": ("vel_err", "attr_err")}
MAX_BOXES = 500  # in a sample
RECALL, FIRST = np.linspace(0, 1, 101), 11  # the first that counts is 0.11
VECTORS = {"translation": 3, "size": 3, "rotation": 4, "velocity": 2}  # of a box: how many numbers


@dataclass(frozen=True)
class Boxes:
    """Labels, predictions or racks of all samples in a row, in the global frame."""

    sample: np.ndarray  # (n,) which of the S samples
    kind: np.ndarray  # (n,) which of CLASSES; -1: a rack
    translation: np.ndarray  # (n, 3) centre, m
    size: np.ndarray  # (n, 3) width, length, height, m
    rotation: np.ndarray  # (n, 4) quaternion w, x, y, z, of any length
    velocity: np.ndarray  # (n, 2) m/s; NaN: unknown
    attribute: np.ndarray  # (n,) which of ATTRIBUTES; 0: none
    score: np.ndarray  # (n,) of predictions
    points: np.ndarray  # (n,) LiDAR and radar points in a label; -1: a prediction

    def __getitem__(self, rows: np.ndarray) -> "Boxes":
        return Boxes(*(getattr(self, field.name)[rows] for field in fields(self)))


def evaluate(tables: "Tables", samples: list[str], path: Path, classes: Sequence[str] = CLASSES) -> tuple[dict, dict]:
    """The official metrics of a results file on samples (tokens): it must hold these and no others.

    classes: over which of the ten means are taken; fewer for a detector that knows no others.

    Returns, named as by the devkit, {"label_aps": {class: {"0.5": AP, ..}}, "mean_dist_aps": {class: AP}, "mean_ap",
    "label_tp_errors": {class: {error: value, None: it has none}}, "tp_errors", "tp_scores", "nd_score"}; and how many boxes
    each filter leaves, {"labels": {step: n}, "predictions": ..}. Raises InputError as told at `read_results`.
    """
    labels, predictions, ego, counts = load(tables, samples, path)
    found = curves(labels, predictions, ego, classes)
    for name, limits in found.items():
        # The devkit stops here too: past the recall that was reached its confidence is 0, which then were a rise.
        if any((np.diff(curve["confidence"]) > 0).any() for curve in limits.values()):
            raise InputError(f"{path}: expected scores (detection_score) of 0 or more, found negative ones of {name}")
    return summary(found), counts


def load(tables: "Tables", samples: list[str], path: Path) -> tuple[Boxes, Boxes, np.ndarray, dict]:
    """The labels and predictions that the filters leave, where the ego vehicle is (S, 2), and `evaluate`'s counts."""
    collecting = gc.isenabled()
    gc.disable()  # millions of boxes, and no garbage: to look through them again and again takes a third of the time
    try:
        labels = read_annotations(lambda token: [a for a in tables.annotations(token) if a.name], samples)
        racks, predictions = read_annotations(tables.bike_racks, samples), read_results(path, samples)
    finally:
        if collecting:
            gc.enable()
    if not labels.kind.size:
        raise InputError(f"{tables.root}: expected labels of the ten classes in {len(samples)} samples, found none")
    ego = np.array([tables.ego_pose(token)[0] for token in samples], dtype=float)[:, :2]  # (S, 2)
    labels, label_counts = _filter(labels, ego, racks)
    predictions, prediction_counts = _filter(predictions, ego, racks)
    return labels, predictions, ego, {"labels": label_counts, "predictions": prediction_counts}


def draw_samples(boxes: Boxes, drawn: np.ndarray) -> Boxes:
    """The boxes of the samples `drawn` (n,), some of them several times, as samples 0 .. n - 1: for a bootstrap."""
    order = np.argsort(boxes.sample, kind="stable")
    first, last = (np.searchsorted(boxes.sample[order], drawn, side) for side in ("left", "right"))
    of, row = _ranges(first, last)
    return replace(boxes[order[row]], sample=of)


def summary(found: dict) -> dict:
    """The numbers of `evaluate` from what `curves` returns."""
    aps, errors = {}, {}
    for name, limits in found.items():
        # Area above precision 0.1 and recall 0.1, of what could be reached.
        aps[name] = {t: float((curve["precision"][FIRST:] - 0.1).clip(min=0).mean() / 0.9) for t, curve in limits.items()}
        curve = limits[str(LIMITS[TP_LIMIT])]
        last = max(np.flatnonzero(curve["confidence"]), default=0)  # the highest recall reached: there confidence ends
        errors[name] = {e: float(curve[e][FIRST : last + 1].mean()) if last >= FIRST else 1.0 for e in ERRORS}
        errors[name] |= dict.fromkeys(UNDEFINED.get(name, ()))
    class_aps = {name: float(np.mean(list(limits.values()))) for name, limits in aps.items()}
    mean_ap = float(np.mean(list(class_aps.values())))
    defined = {e: [row[e] for row in errors.values() if row[e] is not None] for e in ERRORS}
    means = {e: float(np.mean(values or [1.0])) for e, values in defined.items()}  # [1.0]: of barriers alone
    scores = {e: max(0.0, 1 - mean) for e, mean in means.items()}
    return {"label_aps": aps, "mean_dist_aps": class_aps, "mean_ap": mean_ap, "label_tp_errors": errors,
            "tp_errors": means, "tp_scores": scores, "nd_score": (5 * mean_ap + sum(scores.values())) / 10}  # fmt: skip


def curves(labels: Boxes, predictions: Boxes, ego: np.ndarray, classes: Sequence[str] = CLASSES) -> dict:
    """{class: {"0.5": {"precision": (101,), "confidence": (101,)}, ..}} over RECALL; the five errors too at "2.0".

    The boxes are those that the filters left; ego: (S, 2), the ego vehicle's x and y, metres.
    """
    # Here the order is settled for good: falling scores, and of equal ones the LATER in the file comes first.
    predictions = predictions[np.argsort(predictions.score, kind="stable")[::-1]]
    partner = _match(labels, predictions, ego)  # (D, T)
    result: dict = {}
    for c, name in enumerate(CLASSES):
        if name not in classes:
            continue
        rows, count = np.flatnonzero(predictions.kind == c), int((labels.kind == c).sum())
        ours, result[name] = predictions[rows], {}
        for t, limit in enumerate(LIMITS):
            label = partner[rows, t]
            hit = label >= 0
            errors = _errors(labels[label[hit]], ours[hit], name) if t == TP_LIMIT else {}
            result[name][str(limit)] = _curve(ours.score, hit, errors, count)
    return result


def read_annotations(of: "Callable[[str], list[Annotation]]", samples: list[str]) -> Boxes:
    """The annotations that `of` gives for each sample token."""
    rows = [(s, a) for s, token in enumerate(samples) for a in of(token)]
    every = [a for _, a in rows]
    return Boxes(
        sample=np.array([s for s, _ in rows], dtype=int),
        kind=np.array([CLASSES.index(a.name) if a.name else -1 for a in every], dtype=int),
        attribute=_codes([a.attribute for a in every], ATTRIBUTES, "attribute", lambda i: f"sample_annotation {every[i].token}"),
        score=np.full(len(every), np.nan),
        points=np.array([a.lidar_points + a.radar_points for a in every]),
        **{what: np.array([getattr(a, what) for a in every], dtype=float).reshape(-1, n) for what, n in VECTORS.items()},
    )


def nothing_found(classes: Sequence[str] = CLASSES) -> dict:
    """The numbers of a detector without a single box, of which the official tool makes an error: APs 0, errors 1."""
    classes = [name for name in CLASSES if name in classes]
    errors = {name: {e: None if e in UNDEFINED.get(name, ()) else 1.0 for e in ERRORS} for name in classes}
    return {"label_aps": {name: {str(t): 0.0 for t in LIMITS} for name in classes}, "mean_dist_aps": dict.fromkeys(classes, 0.0),
            "mean_ap": 0.0, "label_tp_errors": errors, "tp_errors": dict.fromkeys(ERRORS, 1.0),
            "tp_scores": dict.fromkeys(ERRORS, 0.0), "nd_score": 0.0}  # fmt: skip


def read_results(path: Path, samples: list[str]) -> Boxes:
    """The predictions of an official results file, {"meta": .., "results": {sample: [box, ..]}}, in its order.

    A velocity may be NaN, as for the devkit: like a label's unknown one it is left out of the error. Refused, though the
    devkit notices them late or never: infinite numbers, a missing score, a box whose `sample_token` is not that of
    its list, sizes of 0 or less (the devkit minds those of matched boxes only).
    """
    results = _read_json(path)
    for token, boxes in results.items():
        if not isinstance(boxes, list) or len(boxes) > MAX_BOXES:
            found = len(boxes) if isinstance(boxes, list) else type(boxes).__name__
            raise InputError(f"{path}: sample {token}: expected a list of at most {MAX_BOXES} boxes, found {found}")
    place = {token: s for s, token in enumerate(samples)}
    if odd := [token for token in (*samples, *results) if (token in place) != (token in results)]:
        what = "not of the split" if odd[0] in results else "missing (an empty list would say: nothing found)"
        raise InputError(f"{path}: expected the {len(samples)} samples of the split, {odd[0]} is {what}; {len(odd)} such in all")
    owner = [token for token in results for _ in results[token]]
    boxes = [box for of_sample in results.values() for box in of_sample]
    if not boxes:
        raise InputError(f"{path}: expected at least one box, found none in all {len(samples)} samples")

    where = lambda i: f"{path}: sample {owner[i]}, box {i - owner.index(owner[i])}"  # noqa: E731
    column = lambda what: [box.get(what) for box in boxes]  # noqa: E731
    _demand([isinstance(box, dict) for box in boxes], boxes, "a box {..}", where)
    same = [token == own for token, own in zip(column("sample_token"), owner)]
    _demand(same, column("sample_token"), "the same token as sample_token", where)
    vectors = {what: _numbers(column(what), n, what, where) for what, n in VECTORS.items()}
    _demand((vectors["size"] > 0).all(axis=1), vectors["size"], "a size above 0", where)
    return Boxes(
        sample=np.array([place[token] for token in owner]),
        kind=_codes(column("detection_name"), CLASSES, "detection_name", where),
        attribute=_codes(column("attribute_name"), ATTRIBUTES, "attribute_name", where),
        score=_numbers([[score] for score in column("detection_score")], 1, "detection_score", where)[:, 0],
        points=np.array([0 if points == 0 else -1 for points in column("num_pts")]),  # nobody writes it, the devkit reads it
        **vectors,
    )


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_bytes(), parse_int=float)  # a whole number of any length is a float here
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected JSON, {error}") from None
    if not isinstance(content, dict) or "meta" not in content or not isinstance(content.get("results"), dict):
        raise InputError(f'{path}: expected {{"meta": .., "results": {{sample: [box, ..]}}}}, found {str(content)[:60]}')
    return content["results"]


def _demand(good: Any, values: Any, expected: str, where: Callable[[int], str]) -> None:
    """Raise InputError for the first of n rows whose `good` (n,) is False; `where` tells file, sample and box."""
    if not (good := np.asarray(good, dtype=bool)).all():
        i = int(np.argmin(good))
        found = values[i].tolist() if isinstance(values, np.ndarray) else values[i]
        raise InputError(f"{where(i)}: expected {expected}, found {str(found)[:80]!r}")


def _numbers(values: list, n: int, what: str, where: Callable[[int], str]) -> np.ndarray:
    """Rows of n numbers each -> (D, n). Finite ones, but a velocity may be NaN."""
    flat = list(chain.from_iterable(values)) if set(map(type, values)) == {list} and set(map(len, values)) == {n} else [None]
    if set(map(type, flat)) != {float}:  # slowly, to find the first one
        good = [type(row) is list and len(row) == n and {float}.issuperset(map(type, row)) for row in values]
        _demand(good, values, f"{n} number{'s' * (n > 1)} as {what}", where)
    numbers = np.array(flat, dtype=float).reshape(-1, n)
    fine = ~np.isinf(numbers) if what == "velocity" else np.isfinite(numbers)
    _demand(fine.all(axis=1), numbers, f"a finite {what}", where)
    return numbers


def _codes(values: list, known: tuple[str, ...], what: str, where: Callable[[int], str]) -> np.ndarray:
    """Words -> (n,) their places in `known`."""
    place = {word: k for k, word in enumerate(known)}
    codes = np.array([place.get(word, -1) if isinstance(word, str) else -1 for word in values], dtype=int)
    if (codes < 0).any():
        _demand(codes >= 0, values, f"a known {what}{did_you_mean(str(values[codes.argmin()]), filter(None, known))}", where)
    return codes


def _filter(boxes: Boxes, ego: np.ndarray, racks: Boxes) -> tuple[Boxes, dict[str, int]]:
    """The boxes that count, and how many are left after each step. ego: (S, 2)."""
    away = boxes.translation[:, :2] - ego[boxes.sample]
    keep = np.sqrt((away**2).sum(axis=1)) < np.array(list(RANGE.values()))[boxes.kind]
    counts = {"all": len(keep), "in range": int(keep.sum())}
    keep &= boxes.points != 0
    counts["with points"] = int(keep.sum())
    # Parked bicycles are annotated as one rack, not one by one: so nothing that stands in it can be judged.
    cycles = np.flatnonzero(keep & np.isin(boxes.kind, [CLASSES.index("bicycle"), CLASSES.index("motorcycle")]))
    of, rack = _ranges(*(np.searchsorted(racks.sample, boxes.sample[cycles], side) for side in ("left", "right")))
    away = boxes.translation[cycles[of]] - racks.translation[rack]  # (P, 3)
    local = _turn(racks.rotation[rack] * [1, -1, -1, -1], away)  # back: along the rack's length, width, height
    within = (np.abs(local) <= racks.size[rack][:, [1, 0, 2]] / 2).all(axis=1)
    keep[cycles[of[within]]] = False
    return boxes[keep], counts | {"outside racks": int(keep.sum())}


def _ranges(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n,), (n,): all pairs of a row i and a row of first[i] .. last[i] - 1 -> their two columns (P,), (P,)."""
    count = last - first
    start = np.cumsum(count) - count
    return np.repeat(np.arange(len(first)), count), np.arange(count.sum()) + np.repeat(first - start, count)


def _turn(rotation: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """(n, 4) quaternions w, x, y, z of any length, (n, 3) -> (n, 3) turned vectors."""
    rotation = rotation / np.maximum(np.linalg.norm(rotation, axis=1, keepdims=True), 1e-300)
    w, axis = rotation[:, :1], rotation[:, 1:]
    across = 2 * np.cross(axis, vectors)
    return vectors + w * across + np.cross(axis, across)


def _pairs(labels: Boxes, predictions: Boxes, ego: np.ndarray) -> tuple[np.ndarray, ...]:
    """Label, prediction, distance (P,) of the pairs of one sample and class nearer than the widest limit, ordered by sample
    and class, the prediction's row, distance, the label's row. Few labels lie within the limit along x, side by side
    once sorted: a hundredth of all pairs has to be looked at.
    """
    # x of what counts is at most 50 m from the ego vehicle's: 200 m keep the groups apart.
    group_l, group_d = (boxes.sample * len(CLASSES) + boxes.kind for boxes in (labels, predictions))
    along_l, along_d = (200.0 * group + boxes.translation[:, 0] - ego[boxes.sample, 0]
                        for group, boxes in ((group_l, labels), (group_d, predictions)))  # fmt: skip
    by_x, by_group = np.argsort(along_l), np.argsort(group_d, kind="stable")
    reach, along_l, along_d = LIMITS.max() + 1e-3, along_l[by_x], along_d[by_group]  # a little wider: rounding
    prediction, label = _ranges(*(np.searchsorted(along_l, along_d + side) for side in (-reach, reach)))
    apart = predictions.translation[by_group[prediction], :2] - labels.translation[by_x[label], :2]
    distance = np.sqrt((apart**2).sum(axis=1))
    near = distance < LIMITS.max()
    prediction, label, distance = prediction[near], by_x[label[near]], distance[near]
    order = np.lexsort((label, distance, prediction))
    return label[order], by_group[prediction[order]], distance[order]


def _match(labels: Boxes, predictions: Boxes, ego: np.ndarray) -> np.ndarray:
    """Which label each prediction takes at each limit: (D, T), -1 none. Predictions come in the order they choose: each goes
    through its pairs by distance and takes the first label that is free. The k-th pairs of all samples and classes
    cannot disturb one another, so one round serves them all.
    """
    label, prediction, distance = _pairs(labels, predictions, ego)
    partner = np.full((predictions.kind.size, len(LIMITS)), -1)
    free = np.ones((labels.kind.size, len(LIMITS)), dtype=bool)
    near = distance[:, None] < LIMITS  # (P, T), strictly
    group = labels.sample[label] * len(CLASSES) + labels.kind[label]  # ascending
    place = np.arange(len(label)) - np.searchsorted(group, group)  # of the pair in its group
    for pairs in np.split(np.argsort(place, kind="stable"), np.cumsum(np.bincount(place))):
        row_l, row_d = label[pairs], prediction[pairs]
        take = near[pairs] & free[row_l] & (partner[row_d] < 0)
        free[row_l] &= ~take
        partner[row_d] = np.where(take, row_l[:, None], partner[row_d])
    return partner


def _errors(labels: Boxes, predictions: Boxes, name: str) -> dict[str, np.ndarray]:
    """The five errors of M matches, M labels and M predictions of a class: (M,) each, NaN where there is none."""
    apart = predictions.translation[:, :2] - labels.translation[:, :2]
    smaller = np.minimum(labels.size, predictions.size).prod(axis=1)  # the overlap if centre and heading agreed
    both = labels.size.prod(axis=1) + predictions.size.prod(axis=1) - smaller
    ahead = (_turn(boxes.rotation, np.eye(3)[[0] * len(apart)]) for boxes in (labels, predictions))
    yaw_l, yaw_d = (np.arctan2(y, x) for x, y, _ in (vectors.T for vectors in ahead))
    period = np.pi if name == "barrier" else 2 * np.pi  # a barrier has no front
    return {
        "trans_err": np.sqrt((apart**2).sum(axis=1)),
        "scale_err": 1 - smaller / both,
        "orient_err": np.abs((yaw_l - yaw_d + period / 2) % period - period / 2),
        "vel_err": np.sqrt(((predictions.velocity - labels.velocity) ** 2).sum(axis=1)),
        "attr_err": np.where(labels.attribute == 0, np.nan, labels.attribute != predictions.attribute),
    }


def _curve(score: np.ndarray, hit: np.ndarray, errors: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """Score (D,) and hit (D,) of a class with `count` labels, by falling score, errors (M,) of the hits -> curves (101,) over
    RECALL. No label or no hit: precision and confidence 0, errors 1.
    """
    if not hit.any():
        return dict.fromkeys(("precision", "confidence"), 0 * RECALL) | dict.fromkeys(errors, 0 * RECALL + 1)
    hits = np.cumsum(hit)
    # Interpolated between the predictions, and unlike elsewhere not the best from here on; never reached is 0.
    curve = {"precision": hits / np.arange(1, len(hit) + 1), "confidence": score}
    curve = {key: np.interp(RECALL, hits / count, values, right=0) for key, values in curve.items()}
    for name, values in errors.items():
        known = np.isfinite(values)
        mean = np.cumsum(np.where(known, values, 0)) / np.maximum(np.cumsum(known), 1)
        mean = mean if known.any() else np.ones_like(mean)  # nothing known: the worst
        # To recall by way of confidence, as a hit has a score. np.interp wants rising values: so all is reversed.
        curve[name] = np.interp(curve["confidence"][::-1], score[hit][::-1], mean[::-1])[::-1]
    return curve


def format_table(result: dict, counts: dict | None = None) -> str:
    """All numbers of `evaluate` with their names and a legend."""
    steps_of = (counts or {}).items()
    lines = [f"{what:<12}" + "   ".join(f"{n:,} {step}" for step, n in steps.items()) for what, steps in steps_of]
    rows = {name: [*limits.values(), result["mean_dist_aps"][name], *result["label_tp_errors"][name].values()]
            for name, limits in result["label_aps"].items()}  # fmt: skip
    rows["mean"] = [None] * len(LIMITS) + [result["mean_ap"], *result["tp_errors"].values()]
    lines += ["", f"{'':<20}" + "".join(f"{h:>9}" for h in [*(f"AP {t}m" for t in LIMITS), *"AP ATE ASE AOE AVE AAE".split()])]
    for name, values in rows.items():
        lines.append(f"{name:<20}" + "".join(f"{'-':>9}" if value is None else f"{value:>9.4f}" for value in values))
    known = len(result["label_aps"])
    few = f"    ({known} of nuScenes' {len(CLASSES)} classes)" if known < len(CLASSES) else ""
    return "\n".join([*lines, "", f"mAP {result['mean_ap']:.4f}    NDS {result['nd_score']:.4f}{few}", "", *LEGEND])


LEGEND = (
    "AP    average precision, 0..1, at four distances of the centres and their mean; mAP: its mean over the classes",
    "ATE ASE AOE AVE AAE    mean errors, of what is matched at 2 m, of position (m), size (1 - IoU), heading (rad), velocity",
    "      (m/s), attribute (1 - accuracy); 1 where nothing can be measured; - if the class has none",
    "NDS   (5 mAP + sum of max(0, 1 - mean error) over the five) / 10: nuScenes ranks by it",
)
