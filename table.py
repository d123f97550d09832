"""Tables: results/ -> the README's tables, so that no figure in it is typed by hand.   (reads after: experiments.py)

    python table.py                    rewrite the README's tables from results/
    python table.py --check            fail when the README is out of step with results/ or with the code's tags

A table stands between `<!-- table NAME -->` and `<!-- end -->`. NAME demo: all runs of results/demo; sheet:
results/sheet.json, as `detector.py sheet --json` wrote it; readings: what the code tags UNSPECIFIED (the paper is silent,
this is our choice) or DIFFERS (the paper, or its reference, does something else).
"""

import json
import re
import statistics
from pathlib import Path
from typing import Any

from cli import ArgumentParser, InputError, run_cli

ROOT = Path(__file__).parent
CLASSES = ("Car", "Pedestrian", "Cyclist")
LABELS = {"teacher": "teacher", "none": "student alone", "rdd": "student + RDD",
          "none, equal time": "student alone, RDD's time"}  # fmt: skip


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The records of a suite, ordered by role and seed. Raises InputError when there are none."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not records:
        raise InputError(f"{folder}: expected result files *.json, found none; run experiments.py first")
    return sorted(records, key=lambda r: (list(LABELS).index(r["role"]), r["seed"]))


def score(record: dict[str, Any], metric: str, name: str | None = None) -> float:
    """Moderate AP_R40 at the strict overlaps, of one class or their mean. No result counts as 0."""
    table = record["last"]["strict"]
    levels = [table[c]["AP_R40"][metric] for c in ((name,) if name else CLASSES)]
    return statistics.fmean(level["moderate"] if level else 0.0 for level in levels)


def demo_table(records: list[dict[str, Any]]) -> str:
    """One row per role: mean over its seeds, and every seed's mAP."""
    seeds = sorted({r["seed"] for r in records})
    head = ["model", "params", "GMACs", "steps", "min", *(f"{c} 3D" for c in CLASSES), "mAP 3D", *(f"{c} BEV" for c in CLASSES),
            "mAP BEV"]  # fmt: skip
    if len(seeds) > 1:
        head.append("mAP 3D of seeds " + ", ".join(map(str, seeds)))
    rows = [head, ["---"] + ["--:"] * (len(head) - 1)]
    for role, label in LABELS.items():
        runs = [r for r in records if r["role"] == role]
        if not runs:
            rows.append([label] + ["—"] * (len(head) - 1))
            continue
        first = runs[0]
        steps = sorted({r["steps"] for r in runs})
        row = [label, f"{first['parameters'] / 1e3:.0f} k", f"{first['macs'] / 1e9:.2f}",
               str(steps[0]) if len(steps) == 1 else f"{steps[0]}–{steps[-1]}",
               f"{statistics.fmean(r['seconds'] for r in runs) / 60:.1f}"]  # fmt: skip
        for metric in ("3d", "bev"):
            for name in (*CLASSES, None):
                row.append(f"{statistics.fmean(score(r, metric, name) for r in runs):.1f}")
        if len(seeds) > 1:
            row.append(", ".join(f"{score(r, '3d'):.1f}" for r in runs))
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def tagged() -> list[tuple[str, str, str]]:
    """(tag, file, text) of every `# UNSPECIFIED:` and `# DIFFERS:` comment of the code, whole sentences."""
    found = []
    for path in sorted([*ROOT.glob("*.py"), *(ROOT / "data").glob("*.py"), *(ROOT / "metrics").glob("*.py")]):
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines):
            match = re.search(r"# (UNSPECIFIED|DIFFERS): (.*)", line)
            if not match or "re.search" in line:
                continue
            text = [match[2]]
            for more in lines[number + 1 :]:  # the comment goes on
                if not re.match(r"\s*# ", more) or re.search(r"# (UNSPECIFIED|DIFFERS):", more):
                    break
                text.append(more.strip().lstrip("# "))
            found.append((match[1], path.relative_to(ROOT).as_posix(), " ".join(text)))
    return found


def readings_table() -> str:
    rows = [["", "where", "what"], ["---", "---", "---"]]
    rows += [[tag.lower(), f"`{file}`", text.replace("|", "\\|")] for tag, file, text in tagged()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def sheet_table() -> str:
    from sheet import markdown

    return markdown(json.loads((ROOT / "results" / "sheet.json").read_text()))


def fill(readme: str) -> str:
    """The README's text with every table made anew."""
    tables = {"demo": lambda: demo_table(read_results(ROOT / "results" / "demo")), "readings": readings_table,
              "sheet": sheet_table}  # fmt: skip

    def table(match: re.Match) -> str:
        if match[1] not in tables:
            raise InputError(f"README.md: unknown table {match[1]!r} (known: {', '.join(tables)})")
        return f"<!-- table {match[1]} -->\n{tables[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->.*?<!-- end -->", table, readme, flags=re.DOTALL)


def main() -> None:
    parser = ArgumentParser(prog="table.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 2 when a table is out of date")
    args = parser.parse_args()
    path = ROOT / "README.md"
    before = path.read_text()
    after = fill(before)
    if args.check and after != before:
        raise InputError("README.md: its tables are not what results/ and the code give; run python table.py")
    if not args.check:
        path.write_text(after)


if __name__ == "__main__":
    run_cli(main)
