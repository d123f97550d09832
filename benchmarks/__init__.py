"""Benchmarks: how fast, against what, and how that was measured.   (one file a subject; reads last; next: voxels.py)

    python -m benchmarks.sparse            one subject: its table
    make bench                             all of them: one table, results/bench.json, docs/bench.png

A subject is a file with a docstring (what is measured, on which data, against whom) and a function
`rows(repeats) -> Iterator[Row]`. Everything that is compared runs in the same process, in turns (`in_turns`), so that whatever
else the machine does meets all of them alike; what is reported are medians, and the ratio is the median of each turn's ratio.
"""

import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from cli import ArgumentParser, InputError, write_text

REPEATS = 7
REAL = Path("../shared/real")  # real frames, where they lie beside the project; else simulated ones are taken


@dataclass(frozen=True)
class Row:
    """One line of the table. Times in seconds; None: not measured."""

    subject: str  # "sparse convolution", ...
    case: str  # what was done, on which data, with how many threads
    ours: float | None  # median of our times (or another quantity, see `unit`)
    peer: str = ""  # who we are compared with; "" = nobody
    theirs: float | None = None
    ratio: float | None = None  # theirs / ours: above 1 we are faster
    goal: float | None = None  # the ratio to reach
    unit: str = "s"  # of ours and theirs
    note: str = ""  # the accuracy reached, the limit that stands in the way, where theirs was measured


def in_turns(functions: dict[str, Callable[[], object]], repeats: int = REPEATS) -> dict[str, list[float]]:
    """Seconds of every call, {name: (repeats,)}: one warm-up each, then all in turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if turn:
                times[name].append(time.perf_counter() - began)
    return times


def compare(subject: str, case: str, ours: Callable[[], object], peer: str, theirs: Callable[[], object],
            goal: float | None = None, repeats: int = REPEATS, note: str = "") -> Row:  # fmt: skip
    """Both in turns: medians, and the median of the turns' ratios."""
    times = in_turns({"ours": ours, "theirs": theirs}, repeats)
    ratio = statistics.median(t / o for o, t in zip(times["ours"], times["theirs"], strict=True))
    return Row(subject, case, statistics.median(times["ours"]), peer, statistics.median(times["theirs"]), ratio, goal, note=note)


def amount(x: float | None, unit: str) -> str:
    """A quantity with its unit, as the table has it."""
    if x is None:
        return "not measured"
    if unit == "s" and x < 1:
        x, unit = 1000 * x, "ms"
    return f"{x:,.3g} {unit}" if x < 1000 else f"{x:,.0f} {unit}"


def show(row: Row) -> str:
    """A row as a line of text."""
    line = f"{row.subject}: {row.case}: {amount(row.ours, row.unit)}"
    if row.peer:
        line += f", {row.peer} {amount(row.theirs, row.unit)}"
    if row.ratio is not None:
        line += f", ratio {row.ratio:.2f}" + (f" (goal {row.goal:g})" if row.goal else "")
    return line + (f"   [{row.note}]" if row.note else "")


def run(rows: Callable[[int], Iterator[Row]], doc: str) -> None:
    """The command of one subject: prints its rows as they come."""
    p = ArgumentParser(prog=f"python -m benchmarks.{Path(sys.argv[0]).stem}", description=doc)
    p.add_argument("--repeats", type=int, default=REPEATS, metavar="N", help="turns after a warm-up [%(default)s]")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads where a row does not say [torch's choice]")
    p.add_argument("--json", type=Path, metavar="OUT", help="also write the rows here")
    args = p.parse_args()
    if args.repeats < 1:
        raise InputError(f"--repeats: expected at least 1, found {args.repeats}")
    if args.threads is not None:
        if args.threads < 1:
            raise InputError(f"--threads: expected at least 1, found {args.threads}")
        import torch

        torch.set_num_threads(args.threads)
    found = []
    for row in rows(args.repeats):
        print(show(row), flush=True)
        found.append(asdict(row))
    if args.json:
        from runs import commit, machine

        record = {"command": shlex.join(["python", "-m", p.prog.split()[-1], *sys.argv[1:]]), "date": time.strftime("%Y-%m-%d"),
                  "machine": machine(), "commit": commit(), "rows": found}  # fmt: skip
        write_text(args.json, json.dumps(record, indent=1) + "\n")
