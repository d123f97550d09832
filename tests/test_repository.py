"""The rules of the house that a program can check: commands in the README, help, sizes, versions, lint."""

import ast
import importlib.metadata
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import table

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("", "data", "metrics", "benchmarks", "tests")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
CODE = [path for path in SOURCES if path.parent.name != "tests"]
CORE = ("config", "voxelize", "backbone", "heads", "detector", "rdd", "train")
SCRIPTS = [path for path in CODE if '__name__ == "__main__"' in path.read_text(encoding="utf-8")]
# Not light: what is the network itself, or measures functions of torch line by line
HEAVY = ("detector.py", "tests/conformance.py", "benchmarks/boxes.py", "benchmarks/sparse.py", "benchmarks/voxels.py")
LIGHT = [path for path in SCRIPTS if path.relative_to(ROOT).as_posix() not in HEAVY]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def as_command(script: Path) -> list[str]:
    """How it is run from the root: `python train.py`, `python -m data.kitti`."""
    return [name_of(script)] if script.parent == ROOT else ["-m", name_of(script)[:-3].replace("/", ".")]


@cache
def run(*words: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    command = [sys.executable, *flags, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


# ------------------------------------------------------------------ README


def command_lines(page: Path) -> list[tuple[int, list[str]]]:
    """(line number, words) of every command in a page's ```bash blocks; a backslash continues a line."""
    commands, inside, waiting = [], False, ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            inside = not inside and line[3:].strip() in ("bash", "sh", "console")
            continue
        if inside:
            waiting += " " + line.strip().removeprefix("$ ")
            if waiting.endswith("\\"):
                waiting = waiting[:-1]
                continue
            lexer = shlex.shlex(waiting, posix=True, punctuation_chars=True)  # && ; | are words of their own
            lexer.whitespace_split = True
            commands.append((number, []))
            for word in lexer:
                if set(word) <= set("&;|"):
                    commands.append((number, []))
                else:
                    commands[-1][1].append(word)
            waiting = ""
    return [(number, words) for number, words in commands if words]


def script_and_arguments(words: list[str]) -> tuple[list[str], list[str]] | None:
    """(["train.py"] or ["-m", "data.kitti"], the rest) of a python or torchrun command, None of another."""
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # environment
        words = words[1:]
    if not words or not re.fullmatch(r"(\.venv/bin/)?(python3?|torchrun)", words[0]):
        return None
    for i, word in enumerate(words):
        if word.endswith(".py") and "/" not in word.removeprefix("./"):
            return [word.removeprefix("./")], words[i + 1 :]
        if word == "-m" and words[i + 1] not in ("pip", "pytest", "venv", "ruff"):
            return words[i : i + 2], words[i + 2 :]
    return None


def known_flags(script: list[str], arguments: list[str]) -> set[str]:
    """The options that its --help lists, and that of its subcommand, if the first argument names one."""
    pages = [run(*script, "--help")]
    if arguments and re.fullmatch(r"[a-z-]+", arguments[0]) and not arguments[0].startswith("-"):
        pages.append(run(*script, arguments[0], "--help"))
    return {flag for page in pages for flag in re.findall(r"(?<![\w-])--?[a-z][\w-]*", page.stdout)}


@pytest.mark.parametrize("page", [page for page in table.pages() if "```bash" in page.read_text(encoding="utf-8")], ids=name_of)
def test_every_command_of_a_page_exists_with_its_flags(page):
    commands = command_lines(page)
    assert commands, "an empty ```bash block"
    problems = []
    for number, words in commands:
        found = script_and_arguments(words)
        if found is None:
            continue
        script, arguments = found
        path = ROOT / (script[0] if len(script) == 1 else script[1].replace(".", "/") + ".py")
        if not path.is_file():
            problems.append(f"{page.name}:{number}: no such script: {' '.join(script)}")
            continue
        given = {word.split("=")[0] for word in arguments if re.match(r"--?[a-z]", word)}
        for flag in given - known_flags(script, arguments):
            problems.append(f"{page.name}:{number}: {' '.join(script)} --help does not know {flag}")
    assert not problems, "\n".join(problems)


def test_every_make_target_of_the_readme_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    makes = [words[1:] for _, words in command_lines(ROOT / "README.md") if words[0] == "make"]
    asked = {word for words in makes for word in words if "=" not in word}
    assert asked <= targets, f"README.md: make {asked - targets}; the Makefile has {targets}"


@pytest.mark.parametrize("page", table.pages(), ids=name_of)
def test_tables_are_in_step_with_results_and_tags(page):
    assert table.fill(page.read_text(encoding="utf-8")) == page.read_text(), "run `python table.py`"


def test_a_page_has_every_choice_that_the_code_tags():
    assert table.readings_table() in (ROOT / "docs" / "readings.md").read_text(encoding="utf-8"), "run `python table.py`"


def test_tags_are_collected_whole(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text(
        "class A:\n    def f(self):\n"
        "        # UNSPECIFIED: the first\n        # and its second line.\n        y = 2\n\n"
        "    # DIFFERS: another.\n    # UNSPECIFIED: right after it\n    z = 3\n\n\n"
        "x = 1  # DIFFERS: in nothing\n"
    )
    monkeypatch.setattr(table, "ROOT", tmp_path)
    first, *others = table.tagged()
    assert first == ("UNSPECIFIED", "a.py", "A.f", "the first and its second line.")
    assert others == [("DIFFERS", "a.py", "A", "another."), ("UNSPECIFIED", "a.py", "A", "right after it"),
                      ("DIFFERS", "a.py", "", "in nothing")]  # fmt: skip


# ------------------------------------------------------------------ help


@pytest.mark.parametrize("script", LIGHT, ids=name_of)
def test_help_answers_without_torch_and_matplotlib(script):
    page = run(*as_command(script), "--help", flags=("-X", "importtime"))
    assert page.returncode == 0, page.stderr[-500:]
    assert page.stdout.startswith("usage:")
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in page.stderr.splitlines()}
    assert "argparse" in imported, "importtime's format has changed: this test sees nothing"
    assert not imported & {"torch", "matplotlib", "spconv"}, "import it in main(), after parsing"


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_unknown_option_is_one_line_and_status_2(script):
    answer = run(*as_command(script), "--no-such-option")
    assert answer.returncode == 2 and answer.stdout == ""
    assert re.fullmatch(r"error: .*\n", answer.stderr), answer.stderr


# ------------------------------------------------------------------ size


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_no_file_over_400_lines_and_no_function_over_60(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400, "one concept a file: split it, or make it simpler"
    limit = 90 if name_of(path) == "train.py" else 60  # the training loop fits one screen, a tall one
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    long = {f.name: n for f in functions if (n := f.end_lineno - f.lineno + 1) > limit}
    assert not long, f"over {limit} lines: {long}"


def test_core_can_be_read_in_one_sitting():
    lines = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8").count("\n") for name in CORE}
    assert sum(lines.values()) <= 1600, lines


# ------------------------------------------------------------------ versions


def locked() -> list[Requirement]:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    lines = (line.split(" #")[0].strip() for line in text.splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_lock_holds_exact_versions_and_nothing_of_one_machine():
    for pin in locked():
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and "+" not in specifier.version, pin
        assert pin.url is None, pin
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert not re.search(r"://|--hash|^-", text, re.MULTILINE)


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_range_admits_its_pin_on_every_python(python):
    """pyproject.toml says what may be installed, requirements.lock what is: once each, within the range."""
    machine = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux",
               "platform_machine": "x86_64", "platform_system": "Linux"}  # fmt: skip
    here = [pin for pin in locked() if pin.marker is None or pin.marker.evaluate(machine)]
    pins = {canonical(pin.name): next(iter(pin.specifier)).version for pin in here}
    assert len(pins) == len(here), "a package is pinned twice"
    ranges = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["dev"]
    for wanted in map(Requirement, ranges):
        if wanted.marker is None or wanted.marker.evaluate(machine):
            version = pins.get(canonical(wanted.name))
            assert version and wanted.specifier.contains(version), f"{wanted}: the lock has {version}"


def test_lock_is_complete():
    """What a pinned package needs is pinned too. Torch's own CUDA packages are left to it."""
    here = [pin for pin in locked() if pin.marker is None or pin.marker.evaluate()]
    pins = {canonical(pin.name): next(iter(pin.specifier)).version for pin in here}
    missing = set()
    for name, version in pins.items():
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if found.version.split("+")[0] != version:  # not the locked environment: it may need other things
            continue
        needs = [r for r in map(Requirement, found.requires or []) if name != "torch" or not r.marker]
        missing |= {f"{need.name} (for {name})" for need in needs if canonical(need.name) not in pins
                    and (need.marker is None or need.marker.evaluate({"extra": ""}))}  # fmt: skip
    assert not missing


def test_ci_runs_what_a_user_runs():
    path = ROOT / ".ci" / "run"
    assert path.stat().st_mode & 0o100, ".ci/run is not executable"
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert lines[0] == "set -eu" and lines[-1] == "make test"


# ------------------------------------------------------------------ style


def test_ruff_finds_nothing():
    answer = run("-m", "ruff", "check", "--output-format", "concise", ".")
    assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_file_says_what_it_is_and_names_no_private_folder(path):
    text = path.read_text(encoding="utf-8")
    assert not text or ast.get_docstring(ast.parse(text)), "the first line says what the file is"
    private = re.search(r"[\"'` =](/home|/root|/Users|/opt|/mnt|/work|/tmp)/\S*", text)
    assert not private, f"a path of one machine: {private[0]}"
