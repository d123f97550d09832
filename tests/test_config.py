"""Presets, options and the words for a wrong one."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import config
from config import ArgumentParser, Config, InputError, add_options, from_json, override, preset, to_json

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", config.PRESETS)
def test_presets_are_complete_named_and_survive_json(name):
    cfg = preset(name)
    assert cfg.preset == name and config.PRESETS[name].__doc__
    assert from_json(json.loads(json.dumps(to_json(cfg)))) == cfg
    assert override(cfg, {}) == cfg


def test_students_differ_from_their_teacher_in_width_only():
    model = {f.name for f in fields(Config) if f.metadata.get("group") == config.MODEL}
    for teacher, students in (("cp-voxel", ("s", "xs", "xxs")), ("cp-voxel-cpu", ("s-cpu", "xxs-cpu"))):
        for s in students:
            a, b = to_json(preset(teacher)), to_json(preset(f"cp-voxel-{s}"))
            assert {k for k in model if a[k] != b[k]} == {"width"}


def test_widths_follow_the_published_students():
    assert preset("cp-voxel-xs").widths(0, (16, 16, 32, 64, 128, 128)) == (12, 12, 24, 48, 96, 96)
    assert preset("cp-voxel-xxs").widths(1, (128, 256)) == (32, 64)
    assert preset("cp-voxel-s").widths(2, (64,)) == (32,)


def parse(*words):
    parser = ArgumentParser()
    add_options(parser)
    return vars(parser.parse_args(list(words)))


def test_options_become_values_of_their_field_s_type():
    given = parse("--lr", "0.1", "--frames", "000001,000002", "--flip", "off", "--width", "0.5", "--bev-layers", "1,2",
                  "--point-range", "0,-1,-1,4,1,1")  # fmt: skip
    assert given == {"lr": 0.1, "frames": ("000001", "000002"), "flip": False, "width": (0.5,), "bev_layers": (1, 2),
                     "point_range": (0.0, -1.0, -1.0, 4.0, 1.0, 1.0)}  # fmt: skip
    assert override(Config(), given).width == (0.5, 0.5, 0.5)
    assert parse() == {}  # what is not given changes nothing


@pytest.mark.parametrize(("words", "hint"), [
    (["--learning-rate", "1"], "unknown option --learning-rate"), (["--epoch", "1"], "did you mean --epochs"),
    (["--lr", "fast"], "lr"), (["--flip", "perhaps"], "on or off"), (["extra"], "unexpected argument 'extra'"),
])  # fmt: skip
def test_wrong_words_get_one_line(words, hint):
    with pytest.raises(InputError, match=hint) as error:
        parse(*words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("changes", "hint"), [
    ({"method": "rd"}, "did you mean rdd"), ({"select": "tops"}, "did you mean top"), ({"epochs": 0}, "above 0"),
    ({"width": (1.0, 2.0)}, "one factor, or three"), ({"point_range": (0, 0, 0, 1, -1, 1)}, "minimum below maximum"),
    ({"paste": (1,)}, "one count per class"),
])  # fmt: skip
def test_impossible_values_are_refused(changes, hint):
    with pytest.raises(InputError, match=hint):
        override(Config(), changes)


def test_unknown_preset_and_field():
    with pytest.raises(InputError, match="did you mean cp-voxel-s"):
        preset("cp-voxel-ss")
    with pytest.raises(InputError, match="did you mean epochs"):
        from_json({"epoch": 3})


def test_every_option_changes_the_config_and_is_shown():
    shown = config.show(Config())
    for f in fields(Config):
        if f.metadata.get("group"):
            assert f.name in shown and f.metadata["help"]


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "experiments.py", "plot.py", "table.py"])
def test_help_teaches_without_importing_torch(script):
    code = (f"import sys, runpy; sys.argv = ['{script}', '--help']\n"
            f"try: runpy.run_path('{script}', run_name='__main__')\nexcept SystemExit as e: assert not e.code\n"
            "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules, 'heavy import'")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"python {script}" in done.stdout
