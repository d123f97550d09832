"""Tables: results/ -> the tables of README and docs between table marks, none typed.   (reads after: rows.py  next: plot.py)

    python table.py                    rewrite the tables of README.md and docs/*.md from results/
    python table.py --check            fail when one is out of step with results/ or with the code's tags
    python table.py --json OUT         the rows of all suites for machines
    python table.py --compare sim-nuscenes cp-voxel-xxs-cpu fg rdd      how far one row is ahead of another, with its interval

A table stands between `<!-- table NAME -->` and `<!-- end -->`. NAME a suite of experiments.py: the runs of results/NAME, with
`-short` behind it the rows that somebody ran and what matters most, with `-seeds` those of two seeds or more, with `-classes`
the AP of each class;
sheet: results/sheet.json, as `detector.py sheet --json` wrote it; bench, bench-goals: results/bench.json; readings: what the
code tags UNSPECIFIED (the paper is silent, this is our choice) or DIFFERS (the paper, or its reference, does something else).
"""

import ast
import json
import re
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import Row, amount
from cli import ArgumentParser, InputError, did_you_mean, run_cli
from evaluate import write_json
from fair import METRICS, statistic
from rows import PAPER, classes, label_of, rows_of
from suites import ALONE, SUITES, TEACHER

ROOT = Path(__file__).parent
DASH = "—"
Model = list[dict[str, Any]]  # what a line of a table is about: a row of rows.py for each metric


def suite_table(name: str, folder: Path, short: int = 0) -> str:
    """A suite as a Markdown table: mean and standard deviation over seeds, every seed's first metric, and each class's mean.

    Of more than five classes `class_table` shows the means; else a row would not fit on a page. short: the first metric of
    the rows of at least so many seeds, without sizes and classes, with prices, or shares where nobody measured one or where
    the suite is about them.
    """
    rows = rows_of(name, folder)
    metrics = len({row["metric"] for row in rows})
    models = [rows[k : k + metrics] for k in range(0, len(rows), metrics)]
    if short:
        models = [model[:1] for model in models if model[0]["n"] >= short]
    columns = columns_of(name, models, short)
    lines = [[head for head, _ in columns], ["---"] + ["--:"] * (len(columns) - 1)]
    tried = {model[0]["student"] for model in models if model[0]["n"] and model[0]["method"] != TEACHER}
    for model, after in zip(models, [*models[1:], *models[-1:]], strict=True):
        is_teacher = model[0]["method"] == TEACHER
        student = (after if is_teacher else model)[0]["student"]
        if student in tried or not tried:
            lines.append([cell(model) for _, cell in columns])
        elif is_teacher and not short:  # a student that nobody ran: one line of dashes, not one a variant
            lines.append([f"`{student}`", *[DASH] * (len(columns) - 1)])
    return _markdown(lines)


def columns_of(name: str, models: list[Model], short: int) -> list[tuple[str, Callable[[Model], str]]]:
    """The columns of a suite's table: what stands above each, and what it says of a model."""
    ran = [run for model in models for run in model[0]["runs"].values()]
    kinds = list(classes(ran[0])) if ran and len(classes(ran[0])) <= 5 and not short else []
    priced = any(run.get("price") for run in ran) and not (short and not SUITES[name].equal_time)
    shared = any(run.get("shares") for run in ran) and not (short and priced)
    others = name == "demo" or SUITES[name].first_seed  # scenes and schedules of no table of the paper
    paper = any(_paper(model) != DASH for model in models) and not others

    columns: list[tuple[str, Callable[[Model], str]]] = [("model", lambda model: label_of(model[0]))]
    if short:
        columns += [("MACs of teacher", _ratio), *[("price", _price)] * priced]
    else:
        columns += [("params", _params), ("GMACs", _macs), ("of teacher", _ratio), ("steps", _steps), ("price", _price)]
    columns += [("share of the gradient", _shares)] * shared
    columns += [(kind, partial(_mean_class, kind=kind)) for kind in kinds]
    for k, row in enumerate(models[0] if models else []):
        columns += [(METRICS[row["metric"]], partial(_plus_minus, k=k)), ("vs. alone [95 %]", partial(_ahead_of_alone, k=k))]
    columns += [("seeds", _seeds)]
    columns += [(f"{METRICS[row['metric']]} of each", _each) for row in (models[0][:1] if models else [])]
    return columns + [("paper", _paper)] * paper


def class_table(name: str, folder: Path) -> str:
    """Of every model of a suite that somebody ran: each class's AP, its mean over the seeds. A teacher of several stands once."""
    once = {}
    for row in rows_of(name, folder):
        if row["n"]:
            once.setdefault((row["student"], row["method"]), [row])
    kinds = list(classes(_runs(next(iter(once.values())))[0])) if once else []
    lines = [["model", *kinds, "seeds"], ["---"] + ["--:"] * (len(kinds) + 1)]
    return _markdown(lines + [[label_of(m[0]), *(_mean_class(m, kind) for kind in kinds), _seeds(m)] for m in once.values()])


def compare(suite: str, student: str, first: str, second: str) -> str:
    """How far one variant of a student is ahead of another on the seeds that both have: a line for each metric.

    Variants are named as in the records ("none, 7 epochs"), "teacher" is the student's. Raises InputError for what nobody ran.
    """
    if suite not in SUITES:
        raise InputError(f"--compare: unknown suite {suite!r}{did_you_mean(suite, SUITES)}")
    rows = [row for row in rows_of(suite, ROOT / "results" / (SUITES[suite].folder or suite)) if row["n"]]
    teacher = {s: t for t, s in SUITES[suite].pairs}.get(student)
    of = {row["method"]: row["runs"] for row in rows
          if row["student"] == student or (row["method"], row["student"]) == (TEACHER, teacher)}  # fmt: skip
    for variant in (first, second):
        if variant not in of:
            raise InputError(f"--compare: {suite} has no run {variant!r} of {student!r}{did_you_mean(variant, of)}")
    seeds = ", ".join(str(seed) for seed in of[first] if seed in of[second]) or DASH
    ahead = {metric: _ahead(statistic(of[first], of[second], metric)) for metric in dict.fromkeys(row["metric"] for row in rows)}
    return "\n".join(f"{METRICS[metric]}: {first} - {second} = {text or DASH}, seeds {seeds}" for metric, text in ahead.items())


# ------------------------------------------------------------------ cells: what one says of a model


def _runs(model: Model) -> list[dict[str, Any]]:
    return list(model[0]["runs"].values())


def _params(model: Model) -> str:
    return f"{_runs(model)[0]['parameters'] / 1e3:.0f} k" if _runs(model) else DASH


def _macs(model: Model) -> str:
    return f"{_runs(model)[0]['macs'] / 1e9:.2f}" if _runs(model) else DASH


def _ratio(model: Model) -> str:
    return DASH if model[0]["macs_ratio"] is None else f"{model[0]['macs_ratio']:.2f}"


def _steps(model: Model) -> str:
    steps = sorted({run["steps"] for run in _runs(model)})
    return "–".join(str(count) for count in dict.fromkeys((*steps[:1], *steps[-1:]))) or DASH


def _price(model: Model) -> str:
    """Of a step, in steps of the student alone; in brackets with the teacher's outputs kept. First seed (fair.price_of)."""
    if model[0]["method"].startswith(ALONE):
        return "1" if _runs(model) else DASH
    first = model[0]["runs"].get(0, {})
    price, kept = first.get("price"), first.get("price_kept")
    return DASH if price is None else f"{price:.2f}" + (f" ({kept:.2f})" if kept is not None else "")


def _shares(model: Model) -> str:
    """Of each term of the loss, over the detection loss's gradient on the neck (fair.shares); the mean over seeds."""
    found = [run.get("shares") or {} for run in _runs(model)]
    terms = dict.fromkeys(term for shares in found for term in shares)
    means = {term: statistics.fmean(shares[term] for shares in found if term in shares) for term in terms}
    return ", ".join(f"{term} {mean:.3f}" for term, mean in means.items()) or DASH


def _mean_class(model: Model, kind: str) -> str:
    return f"{statistics.fmean(classes(run)[kind] for run in _runs(model)):.1f}" if _runs(model) else DASH


def _plus_minus(model: Model, k: int) -> str:
    mean, std = model[k]["mean"], model[k]["std"]
    return DASH if mean is None else f"{mean:.1f}" + (f" ± {std:.1f}" if std is not None else "")


def _ahead_of_alone(model: Model, k: int) -> str:
    return _ahead(model[k])


def _ahead(row: dict[str, Any]) -> str:
    if row["delta"] is None:
        return ""
    return f"{row['delta']:+.1f}" + (f" [{row['low']:+.1f}, {row['high']:+.1f}]" if row["low"] is not None else "")


def _seeds(model: Model) -> str:
    return str(model[0]["n"] or DASH)


def _each(model: Model) -> str:
    return ", ".join(f"{value:.1f}" for value in model[0]["values"].values()) or DASH


def _paper(model: Model) -> str:
    """The paper's figure, beside each reading of it."""
    student, method = model[0]["student"].removesuffix("-cpu"), model[0]["method"]
    return PAPER.get((student, "rdd" if method.startswith("rdd-p") else method), DASH)


def _markdown(lines: list[list[Any]]) -> str:
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


# ------------------------------------------------------------------ other tables


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
        tables |= {name: partial(suite_table, name, folder), f"{name}-short": partial(suite_table, name, folder, short=1),
                   f"{name}-seeds": partial(suite_table, name, folder, short=2),
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
