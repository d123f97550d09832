"""Tables: results/ -> the tables of README and docs between table marks, none typed.   (after: experiments.py  next: plot.py)

    python table.py                    rewrite the tables of README.md and docs/*.md from results/
    python table.py --check            fail when one is out of step with results/ or with the code's tags
    python table.py --json OUT         the rows of all suites for machines
    python table.py --compare sim-nuscenes cp-voxel-xxs-cpu fg rdd      how far one row is ahead of another, with its interval

A table stands between `<!-- table NAME -->` and `<!-- end -->`. NAME a suite of experiments.py: the runs of results/NAME, with
`-short` behind it the rows that somebody ran and what matters most, with `-classes` the AP of each class;
sheet: results/sheet.json, as `detector.py sheet --json` wrote it; bench, bench-goals: results/bench.json; readings: what the
code tags UNSPECIFIED (the paper is silent, this is our choice) or DIFFERS (the paper, or its reference, does something else).
"""

import ast
import json
import re
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import Row, amount
from cli import ArgumentParser, InputError, did_you_mean, run_cli
from evaluate import write_json
from experiments import read_records
from fair import KITTI, METRICS, equal_epochs, longer_variant, scores, statistic
from suites import ALONE, METHODS, SUITES, TEACHER

ROOT = Path(__file__).parent
DASH = "—"
NEEDED = ("teacher", "student", "variant", "seed", "epochs", "steps", "parameters", "macs", "scores", "last", "resampled")
LABELS = {"hinton": "Hinton KD", "hint": "Hint", "mimic": "Mimic", "fg": "FG", "gid-f": "GID-F", "gid-l": "GID-L", "lad": "LAD",
          "pp-logit": "PP-Logit", "point-distiller": "PointDistiller", "rdd": "RDD", "rdd-printed": "RDD as printed",
          "rdd-paper-weights": "RDD, the paper's weights", "rdd-feat": "RDD, L_feat only",
          "rdd-logit": "RDD, L_logit only"}  # fmt: skip
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



def classes(record: dict[str, Any]) -> dict[str, float]:
    """AP of each class, percent: KITTI's moderate AP_R40 in 3D (no result counts as 0), nuScenes' mean over distances."""
    last = record["last"]
    if "mean_dist_aps" in last:
        return {name: 100 * ap for name, ap in last["mean_dist_aps"].items()}
    levels = {name: table["AP_R40"]["3d"] for name, table in last["strict"].items()}
    return {f"{name} 3D": level["moderate"] if level else 0.0 for name, level in levels.items()}



def rows_of(name: str, folder: Path) -> list[dict[str, Any]]:
    """What a suite's table says, for machines: one row per teacher, student, variant and metric; None: nobody ran it.

    Keys: suite, teacher, student, method (the variant), metric, mean, std, n, values {seed: value}, delta, low, high (the
    difference to the student alone over the seeds that both have, with its interval), macs_ratio, as_long_as (the variants
    in whose time a longer student alone was trained) and `runs`, the records.
    """
    suite = SUITES[name]
    metrics = [m for m in METRICS if (m in KITTI) == ("nuscenes" not in suite.data)]
    every, rows = checked_records(folder, metrics), []
    for teacher, student in suite.pairs:
        mine = [run for run in every.values() if run["student"] == student]
        more = sorted({run["variant"] for run in mine} - {*suite.variants, TEACHER})  # "none, 8 epochs", "roi 3, equal share"
        variants = []
        for v in suite.variants:
            variants += [v, *(name for name in more if suite.equal_share and name == f"{v}, equal share")]
        variants += [name for name in more if suite.equal_time and name.startswith(f"{ALONE}, ")]
        of = {TEACHER: {r["seed"]: r for r in every.values() if (r["student"], r["variant"]) == (teacher, TEACHER)}}
        of |= {v: {r["seed"]: r for r in mine if (r["teacher"], r["variant"]) == (teacher, v)} for v in variants}
        takes = {v: longer_variant(equal_epochs(runs[0]["epochs"], runs[0]["price"])) for v, runs in of.items()
                 if 0 in runs and runs[0].get("price")}  # fmt: skip
        for variant in [v for v in more if v in of and v.startswith(f"{ALONE}, ") and v not in takes.values()]:
            del of[variant]  # another suite's, "none, 12 epochs" of `longer`
        for variant, runs in of.items():
            method, _, change = variant.partition(", ")
            alone = of[ALONE] if method == ALONE else of.get(f"{ALONE}, {change}", of[ALONE])  # beside "rdd, 12 epochs"
            for metric in metrics:
                rows.append({"suite": name, "teacher": teacher, "student": student if variant != TEACHER else teacher,
                             "method": variant, "metric": metric, **statistic(runs, alone, metric),
                             "macs_ratio": _ratio(runs, of[TEACHER]), "runs": runs,
                             "as_long_as": [v for v, longer in takes.items() if longer == variant]})  # fmt: skip
    return rows


def checked_records(folder: Path, metrics: list[str]) -> dict[str, dict[str, Any]]:
    """{run: record} of a suite. Raises InputError for a record that a table with these metrics cannot be made of."""
    every = read_records(folder)
    for run, record in every.items():
        path = folder / f"{run}.json"
        if lost := [key for key in NEEDED if key not in record]:
            raise InputError(f"{path}: expected the record of a run, found one without {', '.join(lost)}")
        try:
            known = scores(record).keys() & record["resampled"].keys()
            classes(record)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise InputError(f"{path}: expected the record of a run, its scores are none ({error!r})") from None
        if lost := [metric for metric in metrics if metric not in known]:
            raise InputError(f"{path}: expected the record of a run with {' and '.join(lost)}, found {', '.join(sorted(known))}")
    return every



def _ratio(runs: dict[int, dict], teachers: dict[int, dict]) -> float | None:
    both = sorted(set(runs) & set(teachers))
    return runs[both[0]]["macs"] / teachers[both[0]]["macs"] if both else None


def suite_table(name: str, folder: Path, short: bool = False) -> str:
    """A suite as a Markdown table: mean and standard deviation over seeds, every seed's first metric, and each class's mean.

    Of more than five classes `class_table` shows the means; else a row would not fit on a page. short: the first metric of
    the rows that somebody ran, without sizes and classes, with prices, or shares where nobody measured one.
    """
    rows = rows_of(name, folder)
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    if short:
        metrics = metrics[:1]
        rows = [row for row in rows if row["n"] and row["metric"] in metrics]
    ran = [run for row in rows for run in row["runs"].values()]
    kinds = list(classes(ran[0])) if ran and len(classes(ran[0])) <= 5 and not short else []
    others = name == "demo" or SUITES[name].first_seed  # scenes and schedules of no table of the paper
    paper = any((row["student"].removesuffix("-cpu"), row["method"]) in PAPER for row in rows) and not others
    priced = any(run.get("price") for run in ran)
    shared = any(run.get("shares") for run in ran) and not (short and priced)
    costs = ["of teacher", *["price"] * priced] if short else ["params", "GMACs", "of teacher", "steps", "price"]
    head = ["model", *("MACs of teacher" if short and cost == "of teacher" else cost for cost in costs)]
    head += [*["share of the gradient"] * shared, *kinds]
    for metric in metrics:
        head += [METRICS[metric], "vs. alone [95 %]"]
    head += ["seeds", *[f"{METRICS[metric]} of each" for metric in metrics[:1]]] + ["paper"] * paper
    lines = [head, ["---"] + ["--:"] * (len(head) - 1)]
    tried = {row["student"] for row in rows if row["n"] and row["method"] != TEACHER}
    for start in range(0, len(rows), len(metrics)):
        mine = rows[start : start + len(metrics)]
        first = mine[0]
        student = rows[min(start + len(metrics), len(rows) - 1)]["student"] if first["method"] == TEACHER else first["student"]
        if student not in tried and tried:  # one line of dashes, not one a variant
            if first["method"] == TEACHER and not short:
                lines.append([f"`{student}`", *[DASH] * (len(head) - 1)])
            continue
        lines.append([label_of(first), *(_cost(first).get(name, DASH) for name in costs)])
        lines[-1] += [*[_shares(first)] * shared, *_mean_classes(first, kinds)]
        for row in mine:
            lines[-1] += [_plus_minus(row), _ahead(row)]
        lines[-1] += [str(first["n"]) if first["n"] else DASH, ", ".join(f"{v:.1f}" for v in first["values"].values()) or DASH]
        method = "rdd" if first["method"].startswith("rdd-p") else first["method"]  # the paper's figure beside each reading of it
        lines[-1] += [PAPER.get((first["student"].removesuffix("-cpu"), method), DASH)] * paper
    return _markdown(lines)


def class_table(name: str, folder: Path) -> str:
    """Of every row of a suite that somebody ran: each class's AP, its mean over the seeds. A teacher of several stands once."""
    rows = [row for row in rows_of(name, folder) if row["n"]]
    once = {(row["student"], row["method"]): row for row in rows if row["metric"] == rows[0]["metric"]}
    rows = list(once.values())
    kinds = list(classes(next(iter(rows[0]["runs"].values())))) if rows else []
    lines = [["model", *kinds, "seeds"], ["---"] + ["--:"] * (len(kinds) + 1)]
    return _markdown(lines + [[label_of(row), *_mean_classes(row, kinds), str(row["n"])] for row in rows])


def _markdown(lines: list[list[Any]]) -> str:
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


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


def _cost(row: dict[str, Any]) -> dict[str, str]:
    runs = list(row["runs"].values())
    if not runs:
        return {}
    steps, ratio = sorted({r["steps"] for r in runs}), row["macs_ratio"]
    return {"params": f"{runs[0]['parameters'] / 1e3:.0f} k", "GMACs": f"{runs[0]['macs'] / 1e9:.2f}",
            "of teacher": DASH if ratio is None else f"{ratio:.2f}",
            "steps": str(steps[0]) if len(steps) == 1 else f"{steps[0]}–{steps[-1]}", "price": _price(row)}  # fmt: skip


def _price(row: dict[str, Any]) -> str:
    """Of a step, in steps of the student alone; in brackets with the teacher's outputs kept. First seed (fair.price_of)."""
    if row["method"].startswith(ALONE):
        return "1"
    first = row["runs"].get(0, {})
    price, kept = first.get("price"), first.get("price_kept")
    return DASH if price is None else f"{price:.2f}" + (f" ({kept:.2f})" if kept is not None else "")


def _shares(row: dict[str, Any]) -> str:
    """Of each term of the loss, over the detection loss's gradient on the neck (fair.shares); the mean over seeds."""
    found = [run.get("shares") or {} for run in row["runs"].values()]
    terms = dict.fromkeys(term for shares in found for term in shares)
    means = {term: statistics.fmean(shares[term] for shares in found if term in shares) for term in terms}
    return ", ".join(f"{term} {mean:.3f}" for term, mean in means.items()) or DASH


def _mean_classes(row: dict[str, Any], kinds: list[str]) -> list[str]:
    found = [classes(run) for run in row["runs"].values()]
    return [f"{statistics.fmean(aps[kind] for aps in found):.1f}" if found else DASH for kind in kinds]


def _plus_minus(row: dict[str, Any]) -> str:
    if row["mean"] is None:
        return DASH
    return f"{row['mean']:.1f}" + (f" ± {row['std']:.1f}" if row["std"] is not None else "")


def _ahead(row: dict[str, Any]) -> str:
    if row["delta"] is None:
        return ""
    return f"{row['delta']:+.1f}" + (f" [{row['low']:+.1f}, {row['high']:+.1f}]" if row["low"] is not None else "")


def compare(suite: str, student: str, first: str, second: str) -> str:
    """How far one variant of a student is ahead of another on the seeds that both have: a line for each metric.

    Variants are named as in the records ("none, 7 epochs"). Raises InputError for a row that nobody ran.
    """
    if suite not in SUITES:
        raise InputError(f"--compare: unknown suite {suite!r}{did_you_mean(suite, SUITES)}")
    rows = [row for row in rows_of(suite, ROOT / "results" / (SUITES[suite].folder or suite)) if row["n"]]
    of = {row["method"]: row["runs"] for row in rows if row["student"] == student}
    for variant in (first, second):
        if variant not in of:
            raise InputError(f"--compare: {suite} has no run {variant!r} of {student!r}{did_you_mean(variant, of)}")
    seeds = ", ".join(str(seed) for seed in of[first] if seed in of[second]) or DASH
    ahead = {metric: _ahead(statistic(of[first], of[second], metric)) for metric in dict.fromkeys(row["metric"] for row in rows)}
    return "\n".join(f"{METRICS[metric]}: {first} - {second} = {text or DASH}, seeds {seeds}" for metric, text in ahead.items())


def tagged() -> list[tuple[str, str, str, str]]:
    """(tag, file, class or function, text) of every `# UNSPECIFIED:` and `# DIFFERS:` comment of the code, whole sentences."""
    found = []
    for path in sorted([*ROOT.glob("*.py"), *(ROOT / "data").glob("*.py"), *(ROOT / "metrics").glob("*.py")]):
        source = path.read_text(encoding="utf-8")
        named = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef | ast.FunctionDef)]  # outer first
        lines = source.splitlines()
        for number, line in enumerate(lines):
            match = re.search(r"# (UNSPECIFIED|DIFFERS): (.*)", line)
            if not match or "re.search" in line:
                continue
            text = [match[2]]
            for more in lines[number + 1 :]:  # the comment goes on
                if not re.match(r"\s*# ", more) or re.search(r"# (UNSPECIFIED|DIFFERS):", more):
                    break
                text.append(more.strip().lstrip("# "))
            within = ".".join(node.name for node in named if node.lineno <= number + 1 <= node.end_lineno)
            found.append((match[1], path.relative_to(ROOT).as_posix(), within, " ".join(text)))
    return found


def readings_table() -> str:
    rows = [["", "where", "what"], ["---", "---", "---"]]
    rows += [[tag.lower(), f"`{file}`" + f" `{within}`" * bool(within), text] for tag, file, within, text in tagged()]
    return _markdown(rows)


def sheet_table() -> str:
    from sheet import markdown

    path = ROOT / "results" / "sheet.json"
    try:
        return markdown(read_json(path))
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(f"{path}: expected what `detector.py sheet --json` wrote, found something else ({error!r})") from None


def read_json(path: Path) -> Any:
    """What a file of results/ holds. Raises InputError for one that is missing or cut off."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise InputError(f"{path}: expected JSON, found something else ({error})") from None


def bench_records() -> dict[str, dict[str, Any]]:
    """{subject: record} of results/bench.json, as `python -m benchmarks --json` wrote it."""
    path = ROOT / "results" / "bench.json"
    records = read_json(path) if path.is_file() else {}
    try:
        for record in records.values():  # what is not there raises
            {key: record[key] for key in ("command", "date", "machine")}
            [row[key] for row in record["rows"] for key in Row.__dataclass_fields__]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: expected what `benchmarks --json` wrote, found something else ({error!r})") from None
    return records


def bench_table() -> str:
    """Every row that was measured, and how."""
    lines = ["what case ours against theirs ratio goal note".split(), ["---", "---", "--:", "---", *["--:"] * 3, "---"]]
    for row in (row for record in bench_records().values() for row in record["rows"]):
        ratio, goal = (DASH if row[key] is None else f"{row[key]:.2f}" for key in ("ratio", "goal"))
        ours, theirs = amount(row["ours"], row["unit"]), amount(row["theirs"], row["unit"]) if row["peer"] else DASH
        lines.append([row["subject"], row["case"], ours, row["peer"] or DASH, theirs, ratio, goal, row["note"]])
    said = dict.fromkeys(f"`{r['command']}`, {r['date']}, {r['machine']}." for r in bench_records().values())
    return "\n\n".join([_markdown(lines), *said])


def goals_table() -> str:
    """Of each subject, peer and goal: how many cases reach it, and from which ratio to which they go."""
    groups: dict[tuple, list[float]] = {}
    for row in (row for record in bench_records().values() for row in record["rows"]):
        if row["ratio"] is not None and row["goal"]:
            groups.setdefault((row["subject"], row["peer"] or "the machine's own rate", row["goal"]), []).append(row["ratio"])
    lines = ["what|against|cases|lowest ratio|median|highest|goal|reached".split("|"), ["---", "---", *["--:"] * 6]]
    for (subject, peer, goal), found in groups.items():
        spread = (f"{value:.2f}" for value in (min(found), statistics.median(found), max(found)))
        lines.append([subject, peer, len(found), *spread, f"{goal:.2f}", sum(ratio >= goal for ratio in found)])
    return _markdown(lines)


def fill(text: str) -> str:
    """A page's text with every table made anew."""
    tables = {"readings": readings_table, "sheet": sheet_table, "bench": bench_table, "bench-goals": goals_table}
    for name, suite in SUITES.items():
        folder = ROOT / "results" / (suite.folder or name)
        tables |= {name: partial(suite_table, name, folder), f"{name}-short": partial(suite_table, name, folder, short=True),
                   f"{name}-classes": partial(class_table, name, folder)}

    def table(match: re.Match) -> str:
        if match[1] not in tables:
            raise InputError(f"unknown table {match[1]!r} (known: {', '.join(tables)})")
        return f"<!-- table {match[1]} -->\n{tables[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table ([\w-]+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> None:
    parser = ArgumentParser(prog="table.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 2 when a table is out of date")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the rows of all suites here")
    parser.add_argument("--compare", nargs=4, metavar=("SUITE", "STUDENT", "VARIANT", "VARIANT"),
                        help="print how far one row of a suite is ahead of another; change nothing")  # fmt: skip
    args = parser.parse_args()
    if args.compare:
        print(compare(*args.compare))
        return
    if args.json:
        rows = [row for name in SUITES for row in rows_of(name, ROOT / "results" / (SUITES[name].folder or name))]
        write_json(args.json, [{k: v for k, v in row.items() if k != "runs"} for row in rows])
    for path in pages():
        before = path.read_text(encoding="utf-8")
        after = fill(before)
        if args.check and after != before:
            raise InputError(f"{path.name}: its tables are not what results/ and the code give; run python table.py")
        if after != before:
            path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    run_cli(main)
