"""Pictures of numbers: loss and accuracy against steps and time, and who is faster.   (reads after: plot.py  next: stops.py)

Their command is `python plot.py RUN ...`; from results/ `python plot.py suite NAME` compares methods, `python plot.py pulls NAME`
shows what they gain against how hard they pull, and `python plot.py sweeps` draws figure 5a; `python -m benchmarks --figure`
draws the ratios.
dims: S logged steps
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cli import ArgumentParser, InputError
from plot import COLOURS, OTHERS, colours, new_figure, save, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DETECTION = ("cls", "reg", "dir")  # loss terms that every run has: "loss" also holds a distillation's
ACCURACY = {"moderate_map_3d": "moderate mAP 3D (AP_R40, %)", "moderate_map_bev": "moderate mAP BEV (AP_R40, %)",
            "nds": "NDS (%)", "map": "mAP (%)"}  # fmt: skip


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The records of a run folder's metrics.jsonl. A last line that a kill cut short is left out.

    Raises InputError for a missing file, and with its number for any other line that is no record.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{path}: expected the log of a run, found no such file")
    lines, records = path.read_text().splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records.append({"kind": record["kind"], "step": record["step"], **record})
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                found = f"found {line[:60]!r}"
                raise InputError(f"{path}:{number}: expected a record with kind and step, {found}") from None
    return records


def _series(runs: list[list[dict[str, Any]]], kind: str, keys: Sequence[str]) -> np.ndarray:
    """The sum of `keys` over one label's runs (seeds): (S, 5) step, minutes, mean, lowest, highest.

    Row k is the runs' k-th record: their steps differ when they were trained for equal time.
    """
    found = []
    for records in runs:
        points = []
        for r in records:
            values = [r[key] for key in keys if r.get(key) is not None]
            if r["kind"] == kind and values:
                points.append((r["step"], r.get("seconds", np.nan) / 60, sum(values)))
        found.append(points)
    rows = []
    for k in range(max(map(len, found), default=0)):
        step, minutes, value = np.array([points[k] for points in found if k < len(points)]).T
        rows.append((step.mean(), minutes.mean(), value.mean(), value.min(), value.max()))
    return np.array(rows).reshape(-1, 5)


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Running mean over `window` neighbours, over fewer at the ends."""
    if not 1 < window < len(values):
        return values
    sums, counts = (np.convolve(x, np.ones(window), "same") for x in (values, np.ones(len(values))))
    return sums / counts


def _line(ax: "Axes", rows: np.ndarray, across: int, colour: str, label: str, mark: str = "") -> None:
    """Mean against step (across = 0) or minutes (1), in a band from the lowest to the highest seed."""
    rows = rows[np.isfinite(rows[:, across])]
    x, mean, low, high = rows[:, [across, 2, 3, 4]].T
    ax.plot(x, mean, color=colour, linewidth=1.5, marker=mark, markersize=3.5, label=label)
    ax.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def curves(path: str | Path, runs: Sequence[tuple[str, str | Path]], metric: str | None = None,
           terms: Sequence[str] = DETECTION, timed: bool = True) -> "Figure":  # fmt: skip
    """Loss against steps, accuracy against steps and, if `timed`, against training time, of (label, run folder) pairs.

    Runs of one label are its seeds: their mean, in a band from the lowest to the highest. The loss is the sum
    of those `terms` that a run logs, as a running mean. metric: a key of the log's evaluations [the first of ACCURACY
    that they have]. Raises InputError when no run has anything to draw.
    """
    logs: dict[str, list[list[dict[str, Any]]]] = {}
    for label, run in runs:
        logs.setdefault(label, []).append(read_metrics(run))
    logged = {key for log in logs.values() for run in log for record in run if record["kind"] == "eval" for key in record}
    metric = metric or next((name for name in ACCURACY if name in logged), next(iter(ACCURACY)))
    colour = colours(logs)
    figure = new_figure(12.0 if timed else 8.4, 3.8)
    loss, steps, *time = figure.subplots(1, 2 + timed)
    everything = []
    for label, log in logs.items():
        train, points = _series(log, "train", terms), _series(log, "eval", (metric,))
        everything += [train[:, 2], points[:, 2]]
        seeds = f" ({len(log)} seeds)" if len(log) > 1 else ""
        window = max(1, len(train) // 25)
        if len(log) == 1 and window > 1:
            loss.plot(train[:, 0], train[:, 2], color=colour[label], alpha=0.25, linewidth=0.6)
        smooth = np.column_stack([train[:, :2], *(_smooth(train[:, k], window) for k in (2, 3, 4))])
        _line(loss, smooth, 0, colour[label], label + seeds, "o" if len(train) == 1 else "")
        ends = [[r[metric] for r in run if r["kind"] == "eval" and r.get(metric) is not None][-1:] for run in log]
        final = f": {np.mean([end for (end,) in filter(None, ends)]):.1f}" if any(ends) else ""  # of each seed's own last
        for across, ax in enumerate((steps, *time)):
            _line(ax, points, across, colour[label], label + final, "o")
    if not sum(map(len, everything)):
        where = ", ".join(str(run) for _, run in runs) or "no run"
        raise InputError(f"{where}: expected records with {', '.join((*terms, metric))}, found none")
    used = [t for t in terms if any(t in record for log in logs.values() for run in log for record in run)]
    tidy(loss, "training loss", "step", f"loss: {' + '.join(used)}")
    values = np.concatenate(everything[::2])
    if len(values) and values.min() > 0 and values.max() > 20 * values.min():
        loss.set_yscale("log")
    name = ACCURACY.get(metric, metric)
    tidy(steps, "accuracy at equal steps", "step", name)
    for ax in time:
        tidy(ax, "accuracy at equal time", "training time (min)", name)
    figure.get_layout_engine().set(w_pad=0.12)
    for ax in (loss, steps, *time):
        ax.set_xlim(left=0)
    for ax in (steps, *time):
        ax.set_ylim(bottom=0)
    for ax in (loss, steps):
        ax.legend(frameon=False, fontsize=8)
    return save(figure, path)


SWEPT = {"lambda": "lambda of Eq. 5, as printed", "alpha1": "alpha1, weight of L_feat", "alpha2": "alpha2, weight of L_logit"}


def sweeps(path: str | Path, rows: Sequence[dict[str, Any]], usual: dict[str, dict[str, float]]) -> "Figure":
    """Figure 5a of the paper: accuracy against lambda, alpha1 and alpha2, the others as usual.

    rows: `rows.rows_of` of the suite "sensitivity", whose variants are named "lambda 0.1" and so on; those without a run
    are left out. usual: {variant: {"alpha1": value, ..}} of those that belong to sweeps too by another name. A dot is a seed, the
    line their mean, the bars its standard error; dashed: the student alone. Raises InputError when nothing was run.
    """
    rows = [row for row in rows if row["n"] and row["metric"] == rows[0]["metric"]]
    panels = {name: [] for name in SWEPT}
    for row in rows:
        name, _, value = row["method"].partition(" ")
        if name in panels:
            panels[name].append((float(value), row))
        for swept, value in usual.get(row["method"], {}).items():
            panels[swept].append((value, row))
    if not any(len(points) > 1 for points in panels.values()):
        raise InputError(f"{path}: expected runs of the suite sensitivity, found none")
    figure = new_figure(12.0, 3.6)
    for ax, (name, points) in zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True):
        points.sort(key=lambda point: point[0])
        places = np.arange(len(points))  # evenly: the values are spread over decades, and lambda has a 0
        errors = [(row["std"] or 0) / row["n"] ** 0.5 for _, row in points]
        ax.errorbar(places, [row["mean"] for _, row in points], errors, marker="o", capsize=3, color=COLOURS["student + RDD"])
        for place, (_, row) in zip(places, points, strict=True):
            ax.scatter([place] * row["n"], list(row["values"].values()), s=9, color=COLOURS["student + RDD"], alpha=0.4)
        for row in rows:
            if row["method"] == "none":
                ax.axhline(row["mean"], color=COLOURS["student"], linestyle="--", linewidth=1, label="student alone")
                ax.legend(frameon=False, fontsize=8)
        ax.set_xticks(places, [f"{value:g}" for value, _ in points])
        tidy(ax, SWEPT[name], "", ACCURACY.get(rows[0]["metric"], rows[0]["metric"]) if name == "lambda" else "")
    return save(figure, path)


def comparison(path: str | Path, rows: Sequence[dict[str, Any]]) -> "Figure":
    """A suite in one picture: for every student a row, left the last epoch of every variant, right accuracy against steps.

    rows: `rows.rows_of` of a suite; its first metric is drawn, variants that nobody ran are left out. Left: a small dot a
    seed, a large one their mean, a bar the 95 % interval of the difference to the student alone, drawn from what that has on
    the same seeds. Right: means over the seeds. Raises InputError when nothing was run.
    """
    from rows import label_of
    from suites import ALONE, TEACHER

    rows = [row for row in rows if row["metric"] == rows[0]["metric"]]
    parts: list[list[dict[str, Any]]] = []  # of each student: its teacher's row (its distance to this student) and its own
    for row in rows:
        if row["method"] == TEACHER:
            parts.append([])
        if row["n"]:
            parts[-1].append(row)
    parts = [part for part in parts if any(row["method"] == ALONE for row in part)]
    if not parts:
        raise InputError(f"{path}: expected runs of a suite, the student alone among them; found none")
    metric = rows[0]["metric"]
    name = ACCURACY.get(metric, metric)
    figure = new_figure(12.0, 0.9 + sum(0.6 + 0.24 * max(len(part), 9) for part in parts))
    panels = figure.subplots(len(parts), 2, squeeze=False, gridspec_kw={"width_ratios": [1.25, 1]})
    named = {TEACHER: "teacher", ALONE: "student", "rdd": "student + RDD"}
    for (left, right), part in zip(panels, parts, strict=True):
        (alone,) = (row for row in part if row["method"] == ALONE)
        left.axvline(alone["mean"], color=COLOURS["student"], linestyle="--", linewidth=1)
        for place, row in enumerate(part):
            method, _, change = row["method"].partition(", ")  # "rdd, 12 epochs" has RDD's colour
            known = method in named
            colour = COLOURS[named[method]] if known else "#777777"
            left.scatter(list(row["values"].values()), [place] * row["n"], s=10, color=colour, alpha=0.45)
            left.scatter(row["mean"], place, s=42, color=colour, zorder=3)
            if row["low"] is not None:
                start = row["mean"] - row["delta"]
                left.plot([start + row["low"], start + row["high"]], [place, place], color=colour, linewidth=1.2)
            logs = [[(score["step"], score[metric]) for score in run["scores"]] for run in row["runs"].values()]
            steps, values = np.mean([log for log in logs if len(log) == len(logs[0])], axis=0).T
            right.plot(steps, values, color=colour, linewidth=1.6 if known else 0.8, alpha=1.0 if known else 0.6,
                       marker="o" if known else "", markersize=3.5, linestyle="--" if change else "-",
                       label=f"{named[method]}, {change}".removesuffix(", ") if known else None)  # fmt: skip
        student = alone["student"]
        labels = [label_of(row).replace("`", "").replace(f"{student} + ", "+ ").replace(f"{student} ", "") for row in part]
        left.set_yticks(range(len(part)), labels, fontsize=8)
        left.invert_yaxis()
        tidy(left, f"{student}: last epoch", name, "")
        tidy(right, "against steps (grey: the others)", "step", name)
        right.set_xlim(left=0)
        right.set_ylim(bottom=0)
        right.legend(frameon=False, fontsize=8)
    return save(figure, path)


def pulls(path: str | Path, rows: Sequence[dict[str, Any]]) -> "Figure":
    """What methods gain over the student alone against how hard they pull: a panel for each student of each folder of records.

    rows: `rows.rows_of` of several suites, whose mAP is drawn; a row of two suites is drawn once. Across: the share
    of the gradient, a mean over the seeds of the sum of a method's terms (`fair.shares`); upwards: the difference to the student
    alone and its 95 % interval; the larger a dot, the more seeds. Grey lines join one method's --kd-weights. Rows without a share
    are left out, as LAD's, which has no term, and students of fewer than three rows. Raises InputError when nothing is left.
    """
    from rows import label_of
    from suites import METHODS, SUITES

    panels: dict[tuple[str, str], dict[str, tuple[float, dict[str, Any]]]] = {}
    for row in rows:
        shares = [sum(run["shares"].values()) for run in row["runs"].values() if run.get("shares")]
        if shares and row["delta"] is not None and row["metric"] in ("map", "moderate_map_3d"):
            of = SUITES[row["suite"]].folder or row["suite"], row["student"]
            panels.setdefault(of, {}).setdefault(row["method"], (float(np.mean(shares)), row))
    panels = {of: points for of, points in panels.items() if len(points) > 2}
    if not panels:
        raise InputError(f"{path}: expected runs of three methods of one student, found fewer")
    free = iter((*OTHERS, COLOURS["teacher"], "#777777", "#1a1a1a", COLOURS["student"]))
    colour = {method: COLOURS["student + RDD"] if method == "rdd" else next(free) for method in METHODS}
    figure = new_figure(11.0, 4.8 * len(panels))
    for ax, ((folder, student), points) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True):
        ladders: dict[str, list[tuple[float, float]]] = {}  # of variants that differ in --kd-weight only
        labels = []
        for share, row in sorted(points.values(), key=lambda point: point[0]):
            changes = SUITES[row["suite"]].variants.get(row["method"], {"method": row["method"]})
            ladders.setdefault(str(changes | {"kd_weight": None}), []).append((share, row["delta"]))
            method = next(iter(row["runs"].values()))["config"]["method"]
            if row["low"] is not None:
                ax.plot([share, share], [row["low"], row["high"]], color=colour[method], linewidth=0.8, alpha=0.5)
            ax.scatter(share, row["delta"], s=10 + 10 * row["n"], color=colour[method], zorder=3)
            name = label_of(row).partition(" + ")[2].removeprefix("RDD: ")
            line = {"arrowstyle": "-", "linewidth": 0.5, "color": colour[method]}  # from the label to its dot
            labels.append(ax.annotate(name, (share, row["delta"]), (9, 0), textcoords="offset points", fontsize=7.5,
                                      va="center", color=colour[method], arrowprops=line))  # fmt: skip
        for ladder in ladders.values():
            ax.plot(*zip(*ladder, strict=True), color="#bbbbbb", linewidth=0.8, zorder=1)
        ax.axhline(0, color=COLOURS["student"], linestyle="--", linewidth=1)
        ax.set_xscale("log")
        gain = f"{ACCURACY.get(row['metric'], row['metric'])} ahead of the student alone"
        tidy(ax, f"{student}: {folder}", "shares of the gradient on the neck: 1 = as much as the detection loss's", gain)
        _apart(labels)
    return save(figure, path)


def _apart(labels: Sequence[Any]) -> None:
    """Put every label right or left of its dot, as near as it can be without lying on another label or dot."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    labels[0].figure.draw_without_rendering()  # settles where the axes are
    points = [label.axes.transData.transform(label.xy) for label in labels]
    taken = [Bbox([point - 9, point + 9]) for point in points]
    for label, _ in sorted(zip(labels, points, strict=True), key=lambda pair: -pair[1][1]):
        for rise, side in ((rise, side) for rise in sorted(range(-90, 91, 9), key=abs) for side in (1, -1)):
            label.set(position=(9 * side, rise), ha="left" if side > 0 else "right")
            label.update_positions(label.figure.canvas.get_renderer())
            words = Text.get_window_extent(label)  # without its line
            if words.x0 > label.axes.bbox.x0 and not any(words.overlaps(other) for other in taken):
                break
        taken.append(words)


def ratios(path: str | Path, rows: Sequence[dict[str, Any]]) -> "Figure":
    """How the benchmark rows that have a goal (`benchmarks.Row` as dicts) stand to it: a dot is a case, at its ratio over the
    goal; 1 = reached. One line for each subject and peer, with how many of its cases reach theirs. The axis is logarithmic.
    Raises InputError when no row has a goal."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        if row["ratio"] is not None and row["goal"]:
            name = f"{row['subject']} / {row['peer']}" if row["peer"] else f"{row['subject']}: share of the machine's rate"
            groups.setdefault(name, []).append(row["ratio"] / row["goal"])
    if not groups:
        raise InputError(f"{path}: expected benchmark rows with a goal, found none")
    figure = new_figure(9.0, 1.4 + 0.36 * len(groups))
    ax = figure.subplots()
    for y, values in enumerate(groups.values()):
        for reached, colour in ((True, COLOURS["student + RDD"]), (False, COLOURS["student"])):
            some = [value for value in values if (value >= 1) == reached]
            ax.scatter(some, [y] * len(some), s=28, color=colour, alpha=0.55, linewidth=0)
    ax.axvline(1, color="#1a1a1a", linewidth=1)
    tidy(ax, "speed of this project over the goal: a dot is a case, right of the line it is reached", "ratio / goal", "")
    told = [f"{name}   {sum(value >= 1 for value in values)} of {len(values)}" for name, values in groups.items()]
    ax.set_yticks(range(len(groups)), told, fontsize=8)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    ax.set_ylim(len(groups) - 0.4, -0.6)
    return save(figure, path)


def records_main(picture: str, words: list[str]) -> None:
    """The command line of the pictures that are drawn from results/."""
    from config import Config
    from rows import rows_of
    from suites import SUITES

    what = {"suite": "every variant of a suite: last epoch, accuracy against steps",
            "pulls": "what methods gain against how hard they pull: a panel for each student and folder",
            "sweeps": "accuracy against lambda, alpha1, alpha2 (figure 5a)"}  # fmt: skip
    parser = ArgumentParser(prog=f"plot.py {picture}", description=what[picture])
    if picture == "sweeps":
        parser.set_defaults(suites=["sensitivity"])
    else:
        count = 1 if picture == "suite" else "+"
        parser.add_argument("suites", metavar="SUITE", nargs=count, choices=list(SUITES), help=", ".join(SUITES))
    parser.add_argument("--results", type=Path, help="records [results/, the suite's folder]")
    parser.add_argument("--out", required=True, help="picture to write")
    args = parser.parse_args(words)
    rows = [row for name in args.suites for row in rows_of(name, args.results or Path("results") / (SUITES[name].folder or name))]
    if picture == "sweeps":
        usual = {"rdd": {"alpha1": Config.alpha1, "alpha2": Config.alpha2}, "rdd-printed": {"lambda": Config.lam}}
        sweeps(args.out, rows, usual)
    else:
        {"suite": comparison, "pulls": pulls}[picture](args.out, rows)
    print(args.out)
