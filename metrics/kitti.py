"""The official KITTI object detection metrics: AP in the image, from above, in 3D, AOS.   (after: boxes.py; next: nuscenes.py)

A re-implementation of the evaluator of KITTI's object development kit (C++), in its version of October 2019,
whose average precision is the mean over 40 recall points; it agrees with it to the last printed digit. Where
a rule is surprising, the function of the kit that has it is named beside the line (cleanData, ...).

How a number comes about, for one class, one level of difficulty and one kind of overlap:
  1. every label and every detection is counted, ignored, or absent (`_label_roles`, `_detection_roles`);
  2. first pass: match labels and detections; the scores of the hits, at steps of recall, are up to 41
     thresholds;
  3. second pass: match again at each threshold; its hits and false positives give a point of precision each;
  4. AP_R40 is the mean of points 1..40 (official since 2019); AP_R11, of points 0, 4, .., 40, is what older
     papers print. AOS is the same with each hit weighted by how well its orientation fits.
Matching is sequential within a frame, but frames and thresholds know nothing of each other: `_match` serves
all frames and all thresholds at once, and that is what makes this fast.

dims: L labels · D detections (each of all frames, in a row) · P pairs of them in one frame · T thresholds
"""

from dataclasses import dataclass, fields
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import boxes
from cli import InputError, did_you_mean
from data.kitti_files import Objects

CLASSES = ("Car", "Pedestrian", "Cyclist")
METRICS = ("bbox", "bev", "3d", "aos")
# A label of this class is no miss if it is not found, and a detection on it no false positive (cleanData).
NEIGHBOUR = {"Car": "van", "Pedestrian": "person_sitting", "Cyclist": None}
# A match needs an overlap above this, for bbox (and so aos), bev, 3d. Only "strict" is official.
LIMITS = {
    "strict": {"Car": (0.7, 0.7, 0.7), "Pedestrian": (0.5, 0.5, 0.5), "Cyclist": (0.5, 0.5, 0.5)},
    "loose": {"Car": (0.7, 0.5, 0.5), "Pedestrian": (0.5, 0.25, 0.25), "Cyclist": (0.5, 0.25, 0.25)},
}
POINTS = 41  # of a curve: recall 0, 1/40, .., 1


class Level(NamedTuple):
    """What a label must be like to count. A level holds all labels of the one before it."""

    min_height: float  # px, in the image
    max_occlusion: int  # 0 visible, 1 partly occluded, 2 largely
    max_truncation: float  # share outside the image


LEVELS = {"easy": Level(40, 0, 0.15), "moderate": Level(25, 1, 0.30), "hard": Level(25, 2, 0.50)}


@dataclass(frozen=True)
class Workload:
    """All frames in one: their objects in a row, and everything about them that no class or level changes."""

    labels: Objects  # L rows, by frame
    detections: Objects  # D rows, by frame
    frame: np.ndarray  # (P,) frame of the pair; pairs are ordered by frame, then label, then detection
    label: np.ndarray  # (P,) row of its label
    detection: np.ndarray  # (P,) row of its detection
    overlap: dict[str, np.ndarray]  # "bbox", "bev", "3d" -> (P,) intersection over union
    on_dontcare: np.ndarray  # (D,) largest share of the detection's 2D box that lies in one DontCare region
    frame_l: np.ndarray  # (L,) frame of the label
    frame_d: np.ndarray  # (D,) frame of the detection


def evaluate(labels: list[Objects], detections: list[Objects], classes=CLASSES, progress=False) -> dict:
    """The official metrics of detections against labels: two lists, one `Objects` per frame, in one order.

    Returns {"strict": {class: {"AP_R40": {metric: {level: percent}}, "AP_R11": ...}}, "loose": ...}, where
    None replaces {level: percent} if the official evaluator gives no result: the class was never detected or,
    for "aos", a detection has no orientation. Raises InputError for no frames, unequal lengths, a class that
    the benchmark does not have, a score that is not finite.
    """
    return _averaged(curves(labels, detections, classes, progress))


def moderate(work: Workload, classes=CLASSES) -> dict:
    """Like `evaluate`, but of a workload, and only what `moderate_map` reads: a tenth of the work, for many draws of frames."""
    return _averaged(curves_of(work, classes, tables=("strict",), metrics=("bev", "3d"), levels=("moderate",)))


def _averaged(result: dict) -> dict:
    """What `curves` returns -> what `evaluate` returns."""
    for table in result.values():
        for name, metrics in table.items():
            # The 40-point mean leaves out recall 0. With n < 41 labels a curve has n points, the rest is 0:
            # then even perfect detections stay below 100 (5 labels: 10, 20: 47.5, 40: 97.5) (eval_class).
            table[name] = {
                "AP_R40": {metric: _percent(metrics[metric], slice(1, None)) for metric in METRICS},
                "AP_R11": {metric: _percent(metrics[metric], slice(0, None, 4)) for metric in METRICS},
            }
    return result


def _percent(levels: dict[str, np.ndarray] | None, points: slice) -> dict[str, float] | None:
    return levels and {level: 100 * float(curve[points].mean()) for level, curve in levels.items()}


def curves(labels: list[Objects], detections: list[Objects], classes=CLASSES, progress=False) -> dict:
    """Like `evaluate`, but {"strict": {class: {metric: {level: (41,) precision, 0..1}}}, "loose": ...}."""
    return curves_of(gather(labels, detections, classes), classes, progress=progress)


def curves_of(work: Workload, classes=CLASSES, tables=tuple(LIMITS), metrics=METRICS[:3], levels=tuple(LEVELS),
              progress=False) -> dict:  # fmt: skip
    """Like `curves`, but of a workload, and only the tables, kinds of overlap and levels asked for; "aos" comes with "bbox"."""
    oriented = not (work.detections.alpha == -10).any()  # one missing orientation is enough (loadDetections)
    result: dict = {table: {name: dict.fromkeys(METRICS) for name in classes} for table in tables}
    known: dict = {}  # some settings are in both tables
    settings = list(product(tables, classes, metrics))
    for table, name, metric in tqdm(settings, desc="KITTI metrics", leave=False, disable=not progress):
        setting = name, metric, LIMITS[table][name][METRICS.index(metric)]
        if not _detected(work.detections, name, metric):
            continue
        if setting not in known:
            known[setting] = {level: _curve(work, *setting, LEVELS[level]) for level in levels}
        result[table][name][metric] = {level: curve[0] for level, curve in known[setting].items()}
        if metric == "bbox" and oriented:
            result[table][name]["aos"] = {level: curve[1] for level, curve in known[setting].items()}
    return result


def _check(labels: list[Objects], detections: list[Objects], classes) -> None:
    if len(labels) != len(detections):
        found = f"{len(labels)} frames of labels and {len(detections)} of detections"
        raise InputError(f"expected labels and detections of the same frames, found {found}")
    if not labels:
        raise InputError("expected at least one frame to evaluate, found none")
    if not classes:
        raise InputError(f"expected at least one class of {', '.join(CLASSES)}, found none")
    for name in classes:
        if name not in CLASSES:
            raise InputError(f"KITTI's benchmark has no class {name!r}{did_you_mean(name, CLASSES)}")
    for i, objects in enumerate(detections):
        if not np.isfinite(objects.score).all():
            raise InputError(f"frame {i} of {len(labels)}: expected a finite score for each detection")


# ---- What no class or level changes: the objects of all frames in a row, the overlaps of all pairs at once.


def gather(labels: list[Objects], detections: list[Objects], classes=CLASSES) -> Workload:
    """All frames as one `Workload`, with those pairs that overlap enough for some setting. Raises InputError as `evaluate`."""
    _check(labels, detections, classes)
    all_l, frame_l = _concatenate(labels)
    all_d, frame_d = _concatenate(detections)
    label, detection = _same_frame(frame_l, frame_d)
    bbox_l, bbox_d = all_l.bbox[label], all_d.bbox[detection]
    shared = _shared_pixels(bbox_l, bbox_d)
    union = _pixels(bbox_l) + _pixels(bbox_d) - shared
    box_l, box_d = _upright(all_l)[label], _upright(all_d)[detection]  # (P, 7)
    overlap = {
        "bbox": np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0),
        "bev": boxes.pair_iou_bev(box_l, box_d).numpy(),
        "3d": boxes.pair_iou_3d(box_l, box_d).numpy(),
    }
    lowest = min(min(limits) for table in LIMITS.values() for limits in table.values())
    keep = np.max(list(overlap.values()), axis=0) > lowest
    overlap = {metric: values[keep] for metric, values in overlap.items()}

    # Of DontCare regions counts the share of the DETECTION, not intersection over union (computeStatistics).
    region = np.flatnonzero(all_l.type == "dontcare")
    pair, inside = _same_frame(frame_l[region], frame_d)
    shared, area = _shared_pixels(all_l.bbox[region[pair]], all_d.bbox[inside]), _pixels(all_d.bbox[inside])
    share = np.divide(shared, area, out=np.zeros_like(shared), where=shared > 0)
    on_dontcare = np.zeros(len(all_d))
    np.maximum.at(on_dontcare, inside, share)
    frame, label, detection = frame_l[label[keep]], label[keep], detection[keep]
    return Workload(all_l, all_d, frame, label, detection, overlap, on_dontcare, frame_l, frame_d)


def draw_frames(work: Workload, drawn: np.ndarray) -> Workload:
    """The frames `drawn` (n,), some of them several times, as frames 0 .. n - 1: for a bootstrap, without new overlaps."""
    frame_l, row_l = _same_frame(drawn, work.frame_l)
    frame_d, row_d = _same_frame(drawn, work.frame_d)
    frame, pair = _same_frame(drawn, work.frame)
    new = np.arange(len(drawn))
    shift_l = np.searchsorted(frame_l, new) - np.searchsorted(work.frame_l, drawn)  # (n,) rows that a frame's labels move
    shift_d = np.searchsorted(frame_d, new) - np.searchsorted(work.frame_d, drawn)
    label, detection = work.label[pair] + shift_l[frame], work.detection[pair] + shift_d[frame]
    overlap = {metric: values[pair] for metric, values in work.overlap.items()}
    return Workload(work.labels[row_l], work.detections[row_d], frame, label, detection, overlap, work.on_dontcare[row_d],
                    frame_l, frame_d)  # fmt: skip


def _concatenate(frames: list[Objects]) -> tuple[Objects, np.ndarray]:
    """The objects of all frames in a row, types in lower case (the kit ignores case); the frame of each."""
    names = [field.name for field in fields(Objects)]
    columns = {name: np.concatenate([getattr(frame, name) for frame in frames]) for name in names}
    columns["type"] = np.char.lower(columns["type"].astype(str))
    return Objects(**columns), np.repeat(np.arange(len(frames)), [len(frame) for frame in frames])


def _same_frame(frame_a: np.ndarray, frame_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frame numbers of two tables' rows, those of b sorted -> the rows of all pairs in one frame: (P,), (P,), a's in order."""
    first = np.searchsorted(frame_b, frame_a, side="left")
    count = np.searchsorted(frame_b, frame_a, side="right") - first
    start = np.cumsum(count) - count
    row_b = np.arange(count.sum()) + np.repeat(first - start, count)
    return np.repeat(np.arange(len(frame_a)), count), row_b


def _pixels(bbox: np.ndarray) -> np.ndarray:
    """(P, 4) left, top, right, bottom -> (P,) area."""
    return (bbox[:, 2] - bbox[:, 0]) * (bbox[:, 3] - bbox[:, 1])


def _shared_pixels(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(P, 4), (P, 4) -> (P,) area of the intersection."""
    size = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    return size.clip(min=0).prod(axis=1)


def _upright(objects: Objects) -> torch.Tensor:
    """(n, 7) boxes by the convention of boxes.py, at the camera: axes turned to forward, left, up."""
    right, down, forward = objects.location.T
    height, width, length = objects.dimensions.T
    yaw = -objects.rotation_y - np.pi / 2  # rotation_y is 0 to the right and turns clockwise, seen from above
    columns = [forward, -right, height / 2 - down, length, width, height, yaw]
    return torch.from_numpy(np.stack(columns, axis=1))


# ---- One class, one kind of overlap, one level.

COUNTED, IGNORED, ABSENT = 0, 1, -1  # ignored: may be matched, but then neither counts for nor against


def _label_roles(labels: Objects, name: str, level: Level) -> np.ndarray:
    """(L,) roles (cleanData). `<=`: a label exactly as high as the limit is too small."""
    ours, neighbour = labels.type == name.lower(), labels.type == NEIGHBOUR[name]
    too_hard = labels.bbox[:, 3] - labels.bbox[:, 1] <= level.min_height
    too_hard |= (labels.occlusion > level.max_occlusion) | (labels.truncation > level.max_truncation)
    return np.select([ours & ~too_hard, ours | neighbour], [COUNTED, IGNORED], ABSENT)


def _detection_roles(detections: Objects, name: str, level: Level) -> np.ndarray:
    """(D,) roles (cleanData). The height comes before the class: a small one of ANY class can take a label"""
    # (The kit cuts the height to whole pixels. The limits are whole, so that changes nothing.)
    small = np.abs(detections.bbox[:, 3] - detections.bbox[:, 1]) < level.min_height
    return np.select([small, detections.type == name.lower()], [IGNORED, COUNTED], ABSENT)


def _detected(detections: Objects, name: str, metric: str) -> bool:
    """A class has a result if some detection of it has the columns that the metric needs (loadDetections)."""
    ours, (height, width, length) = detections.type == name.lower(), detections.dimensions.T
    on_ground = (detections.location[:, [0, 2]] != -1000).all(axis=1) & (width > 0) & (length > 0)
    in_space = on_ground & (detections.location[:, 1] != -1000) & (height > 0)
    in_image = detections.bbox[:, 0] >= 0
    return bool((ours & {"bbox": in_image, "bev": on_ground, "3d": in_space}[metric]).any())


def _curve(work: Workload, name: str, metric: str, limit: float, level: Level) -> tuple[np.ndarray, ...]:
    """Precision (41,) and orientation similarity (41,), 0..1, at recall 0, 1/40, .., 1 (eval_class)."""
    role_l = _label_roles(work.labels, name, level)
    role_d = _detection_roles(work.detections, name, level)
    pairs = work.overlap[metric] > limit  # strictly
    pairs &= (role_l[work.label] != ABSENT) & (role_d[work.detection] != ABSENT)
    frame, label, detection = work.frame[pairs], work.label[pairs], work.detection[pairs]  # (P,), fewer now
    overlap, score = work.overlap[metric][pairs], work.detections.score
    countable = (role_l[label] == COUNTED) & (role_d[detection] == COUNTED)

    # First pass: a label takes the detection with the highest score; of equal ones, the first in the file.
    order = np.lexsort((detection, -score[detection], label))  # by label, then falling score, then file
    matched = _match(frame[order], label[order], detection[order], np.ones((len(order), 1), dtype=bool))
    hit = order[matched[:, 0] & countable[order]]
    thresholds = _thresholds(score[detection[hit]], int((role_l == COUNTED).sum()))  # (T,)

    # Second pass: it takes the largest overlap; an ignored detection (the first) only if nothing else fits.
    ignored = role_d[detection] == IGNORED
    order = np.lexsort((detection, np.where(ignored, 0, -overlap), ignored, label))
    label, detection, countable = label[order], detection[order], countable[order]
    matched = _match(frame[order], label, detection, score[detection, None] >= thresholds)  # (P, T)
    hit = matched & countable[:, None]
    hits = hit.sum(axis=0)  # (T,)

    # False positives: counted detections that no label took and, in the image, no DontCare region covers.
    # (In bev and 3d the kit asks too, but DontCare has no box there, so it excuses nothing.)
    exposed = (role_d == COUNTED) & ((work.on_dontcare <= limit) | (metric != "bbox"))
    reached = np.searchsorted(np.sort(-score[exposed]), -thresholds, side="right")  # (T,) with such a score
    false_positives = reached - (matched & exposed[detection][:, None]).sum(axis=0)

    angle = work.labels.alpha[label] - work.detections.alpha[detection]
    similarity = (hit * ((1 + np.cos(angle)) / 2)[:, None]).sum(axis=0)  # that of a false positive is 0
    # DIFFERS: where all is ignored at a threshold KITTI's evaluator divides 0 by 0; here the point is 0.
    total = np.maximum(hits + false_positives, 1)
    return _best_from_here_on(hits / total), _best_from_here_on(similarity / total)


def _match(frame: np.ndarray, label: np.ndarray, detection: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """Which pairs match at which threshold: (P, T) bool (computeStatistics).

    Pairs come ordered by frame, then label (as in the file), then the label's preference. A label takes the
    first detection on its list that is still free, and alive (P, T): its score reaches the threshold. The
    k-th pairs of all frames cannot disturb one another, so one round serves them all.
    """
    matched = np.zeros_like(alive)
    label, detection = (np.unique(rows, return_inverse=True)[1] for rows in (label, detection))
    label_free, detection_free = np.ones_like(alive), np.ones_like(alive)  # (there are at most P of either)
    place = np.arange(len(frame)) - np.searchsorted(frame, frame)  # of the pair in its frame
    rounds = np.split(np.argsort(place, kind="stable"), np.cumsum(np.bincount(place)))
    for pairs in rounds:
        take = alive[pairs] & label_free[label[pairs]] & detection_free[detection[pairs]]
        matched[pairs] = take
        label_free[label[pairs]] &= ~take
        detection_free[detection[pairs]] &= ~take
    return matched


def _thresholds(scores: np.ndarray, labels: int) -> np.ndarray:
    """Scores of hits, how many labels count -> (T,) scores nearest to recall 0, 1/40, .. (getThresholds)."""
    scores = np.sort(scores)[::-1]
    thresholds, recall = [], 0.0
    for i, score in enumerate(scores):
        here, after = (i + 1) / labels, (i + 2) / labels
        if i < len(scores) - 1 and after - recall < recall - here:
            continue  # the next score is nearer
        thresholds.append(score)
        recall += 1 / (POINTS - 1)
    return np.array(thresholds)


def _best_from_here_on(values: np.ndarray) -> np.ndarray:
    """(T,) -> (41,): filled up with 0, then each point is the best of itself and those at higher recall."""
    curve = np.zeros(POINTS)
    curve[: len(values)] = values
    return np.maximum.accumulate(curve[::-1])[::-1]


# ---- For people.


def count_labels(labels: list[Objects], classes=CLASSES) -> dict[str, dict[str, int]]:
    """{class: {level: number of labels that count}}, the denominators of recall."""
    every = _concatenate(labels)[0]

    def count(name: str, level: str) -> int:
        return int((_label_roles(every, name, LEVELS[level]) == COUNTED).sum())

    return {name: {level: count(name, level) for level in LEVELS} for name in classes}


def moderate_map(result: dict, metric: str = "3d", which: str = "AP_R40") -> float:
    """Mean over the classes of one metric, moderate level, strict; a class without a result counts as 0."""
    values = [aps[which][metric] for aps in result["strict"].values()]
    return sum(value["moderate"] if value else 0.0 for value in values) / len(values)


def format_table(result: dict, counts: dict[str, dict[str, int]] | None = None) -> str:
    """All numbers of `evaluate` with their names and a legend, and those of `count_labels` where given."""
    levels = "".join(f"{level:>10}" for level in LEVELS)
    lines = []
    for table, classes in result.items():
        title = "strict: the official table" if table == "strict" else "loose: not official, but customary"
        lines += [f"{title:<38}{'AP_R40':>30}    {'AP_R11':>30}", f"{'':<38}{levels}    {levels}"]
        for name, aps in classes.items():
            if not any(aps["AP_R40"].values()):
                lines += [f"{name:<12}no result: never detected", ""]
                continue
            for metric in METRICS:
                limit = LIMITS[table][name][METRICS.index(metric) % 3]  # aos as bbox
                r40, r11 = (_numbers(aps[which][metric]) for which in ("AP_R40", "AP_R11"))
                lines.append(f"{name:<12}{metric:<6}overlap > {limit:<10.2f}{r40}    {r11}")
            lines.append("")
    for name, numbers in (counts or {}).items():
        lines.append(f"{name:<12}{'labels that count':<26}" + "".join(f"{n:>10}" for n in numbers.values()))
    if any(0 < n < POINTS for numbers in (counts or {}).values() for n in numbers.values()):
        lines.append("Fewer than 41 labels: by KITTI's rules even perfect detections then get less than 100.")
    return "\n".join([*lines, "", *LEGEND])


def _numbers(levels: dict[str, float] | None) -> str:
    return "".join(f"{levels[level]:>10.4f}" if levels else f"{'-':>10}" for level in LEVELS)


LEGEND = (
    "Average precision in percent.",
    "AP_R40  mean over 40 steps of recall: KITTI's own number since October 2019",
    "AP_R11  mean over 11 steps, as in older papers; do not compare the two",
    "bbox    boxes in the image       bev  boxes seen from above       3d  volumes",
    "aos     bbox, each hit weighted by how well its orientation fits",
    "-       no result: the class was never detected or, for aos, an orientation is missing",
    "overlap > x: the intersection over union that a hit needs. easy, moderate, hard: which labels count, by",
    "height in the image, occlusion, truncation, each with those before it; the benchmark ranks by moderate.",
)
