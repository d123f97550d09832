"""Presets, options and the words for a wrong one."""

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args, get_origin

import pytest

import config
import presets
from cli import ArgumentParser, InputError
from config import Config, add_options, from_json, override, to_json
from detector import build
from presets import preset

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_are_complete_named_and_survive_json(name):
    cfg = preset(name)
    assert cfg.preset == name and presets.PRESETS[name].__doc__
    assert from_json(json.loads(json.dumps(to_json(cfg)))) == cfg
    assert override(cfg, {}) == cfg


MODEL_FIELDS = [f.name for f in fields(Config) if f.name in ("tasks", "anchors") or f.metadata.get("group") == config.MODEL]
PILLAR_SIZE = {"voxel_size", "max_points"}
STUDENTS = [  # teacher, student, its data set, the fields of the model in which it may differ
    *(("cp-voxel", f"cp-voxel-{s}", data, {"width"}) for s in ("s", "xs", "xxs") for data in ("kitti", "sim", "nuscenes")),
    *(("cp-pillar", f"cp-pillar-v{s}", "nuscenes", PILLAR_SIZE) for s in ("0.4", "0.64")),
    ("cp-pillar", "cp-pillar-v0.48", "nuscenes", {*PILLAR_SIZE, "point_range"}),
    *((f"{t}", f"{t}-{s}", "kitti", {"width"}) for t in ("second", "pointpillars") for s in ("s", "xs")),
    *(("cp-voxel-cpu", f"cp-voxel-{s}-cpu", data, {"width"}) for s in ("s", "xs", "xxs") for data in ("sim", "nuscenes")),
    *((f"{t}-cpu", f"{t}-{s}-cpu", "sim", {"width"}) for t in ("second", "pointpillars") for s in ("s", "xs")),
    ("cp-pillar-cpu", "cp-pillar-v0.64-cpu", "sim", {"voxel_size"}),
    *(("cp-pillar-cpu", f"cp-pillar-v{s}-cpu", "nuscenes", {"voxel_size"}) for s in ("0.4", "0.64")),
]  # fmt: skip


@pytest.mark.parametrize(("teacher", "student", "data", "may_differ"), STUDENTS)
def test_a_student_is_its_teacher_with_other_widths_or_another_pillar_size_only(teacher, student, data, may_differ):
    """Nothing else of the model, the data or the schedule; how it learns is the command's to say."""
    t, s = preset(teacher, data), preset(student, data)
    others = {f.name for f in fields(Config) if f.metadata.get("group") in (config.DATA, config.OPTIM, config.RUN)}
    assert {k for k in (*MODEL_FIELDS, *others) if getattr(t, k) != getattr(s, k)} == may_differ
    assert s.method == t.method == "none" and t.width == (1.0, 1.0, 1.0)
    assert s.width < t.width if "width" in may_differ else s.voxel_size[:2] > t.voxel_size[:2]


def test_every_preset_is_a_teacher_or_the_student_of_one():
    named = {name for teacher, student, *_ in STUDENTS for name in (teacher, student)}
    assert named | {"cp-pillar-v0.2"} == set(presets.PRESETS)  # v0.2: the published grid, no teacher of the paper's


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_preset_is_made_for_its_data_set_and_refuses_others(name):
    made_for = {"sim", "kitti"} if "cpu" in name or name.startswith(("second", "pointpillars")) else {"nuscenes"}
    if name.startswith("cp-voxel") or name in ("cp-pillar-cpu", "cp-pillar-v0.64-cpu"):
        made_for = {"sim", "kitti", "nuscenes"}
    made_for = {"nuscenes"} if name == "cp-pillar-v0.4-cpu" else made_for  # on KITTI the CPU teacher's pillars are as large
    for data in ("sim", "kitti", "nuscenes"):
        if data in made_for:
            cfg = preset(name, data)
            assert (cfg.data == "nuscenes") == (data == "nuscenes") == (cfg.layout == "nuscenes") and cfg.preset == name
        else:
            with pytest.raises(InputError, match=f"not for {data}") as error:
                preset(name, data)
            assert "\n" not in str(error.value)
    if "nuscenes" in made_for:  # the simulated set: the same but for its name
        simulated = preset(name, "sim-nuscenes")
        assert simulated.layout == "nuscenes" and replace(simulated, data="nuscenes") == preset(name, "nuscenes")
    else:
        with pytest.raises(InputError, match="not for nuscenes"):
            preset(name, "sim-nuscenes")


def test_nuscenes_presets_have_ten_classes_in_six_tasks_and_velocities():
    for cfg in (preset("cp-voxel", "nuscenes"), preset("cp-pillar")):
        assert len(cfg.classes) == len(set(cfg.classes)) == len(cfg.paste) == 10 and len(cfg.task_classes) == 6
        assert [name for task in cfg.tasks for name in task] == list(cfg.classes)
        assert cfg.velocity and len(cfg.code_weights) == 10 and cfg.point_features == 5


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
    assert override(preset("cp-voxel-cpu", "nuscenes"), {"paste": (3,)}).paste == (3,) * 10
    assert parse("--circle-nms", "4,.85") == {"circle_nms": (4.0, 0.85)}  # a field whose default is empty
    assert parse() == {}  # what is not given changes nothing


def test_numbers_with_commas_may_begin_with_a_minus():
    given = {"point_range": (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0)}
    assert parse("--point-range", "-51.2,-51.2,-5,51.2,51.2,3") == parse("--point-range=-51.2,-51.2,-5,51.2,51.2,3") == given
    assert parse("--point-range", "-.5,-1e-3,-5,1,1,1") == {"point_range": (-0.5, -0.001, -5.0, 1.0, 1.0, 1.0)}


@pytest.mark.parametrize(("words", "hint"), [
    (["--learning-rate", "1"], "unknown option --learning-rate"), (["--epoch", "1"], "did you mean --epochs"),
    (["--lr", "fast"], "lr"), (["--flip", "perhaps"], "on or off"), (["extra"], "unexpected argument 'extra'"),
    (["--bev-layers", "1,x"], "--bev-layers: expected whole numbers with commas between them, found '1,x'"),
    (["--width", "1;.5"], "--width: expected numbers with commas between them, found '1;.5'"),
])  # fmt: skip
def test_wrong_words_get_one_line(words, hint):
    with pytest.raises(InputError, match=hint) as error:
        parse(*words)
    assert "\n" not in str(error.value)


def test_some_of_a_preset_s_classes_keep_their_anchors_counts_and_tasks():
    cfg = preset("second")
    car = override(cfg, {"classes": ("Car",)})
    assert car.anchors == cfg.anchors[:1] and car.paste == cfg.paste[:1] and car.tasks == cfg.tasks == ((),)
    other = override(cfg, {"classes": ("Cyclist", "Car"), "paste": (1, 2)})
    assert other.anchors == (cfg.anchors[2], cfg.anchors[0]) and other.paste == (1, 2)
    nuscenes = preset("cp-voxel-cpu", "nuscenes")
    few = override(nuscenes, {"classes": ("truck", "bus", "trailer")})
    assert few.tasks == (("truck",), ("bus", "trailer")) and few.paste == tuple(
        nuscenes.paste[nuscenes.classes.index(name)] for name in few.classes)  # fmt: skip
    for small in (override(preset("second-cpu"), {"classes": ("Car",)}), few):
        assert build(small).head.cfg.classes == small.classes


@pytest.mark.parametrize(("changes", "hint"), [
    ({"method": "rd"}, "did you mean rdd"), ({"select": "tops"}, "did you mean top"), ({"epochs": 0}, "from 1 on"),
    ({"width": (1.0, 2.0)}, "one factor, or three"), ({"point_range": (0, 0, 0, 1, -1, 1)}, "minimum below maximum"),
    ({"paste": (1, 2)}, "one count, or one per class"), ({"kd_weight": 0.0}, "--kd-weight: expected a number above 0"),
    ({"label_score": (0.6, 0.5)}, "one score, or one per class"),
    ({"circle_nms": (1.0, 2.0)}, "one number per task"),
])  # fmt: skip
def test_impossible_values_are_refused(changes, hint):
    with pytest.raises(InputError, match=hint):
        override(Config(), changes)


def test_unknown_preset_and_field():
    with pytest.raises(InputError, match="did you mean cp-voxel-s"):
        preset("cp-voxel-ss")
    with pytest.raises(InputError, match="did you mean pointpillars-s"):
        preset("pointpilars-s", "nuscenes")
    with pytest.raises(InputError, match="did you mean epochs"):
        from_json({"epoch": 3})


def test_a_config_of_before_an_option_is_read_as_what_it_was():
    assert from_json({}).psi_norm and not from_json({"psi_norm": False}).psi_norm
    assert (from_json({"amp": True}).amp, from_json({"amp": False}).amp) == ("float16", "off")


@pytest.mark.parametrize("f", [f for f in fields(Config) if f.metadata.get("group")], ids=lambda f: f.name)
def test_every_option_changes_the_config_and_is_shown(f):
    kind = get_args(f.type)[0] if get_origin(f.type) is tuple else f.type
    other = {bool: "off" if f.default else "on", int: "77", float: "0.375", str: "another"}[kind]
    if f.metadata["choices"]:
        other = next(choice for choice in f.metadata["choices"] if choice != f.default)
    given = parse("--" + f.name.replace("_", "-"), other)
    assert given.keys() == {f.name} and given[f.name] != f.default and f.metadata["help"]
    before, after = (config.show(cfg).splitlines() for cfg in (Config(), replace(Config(), **given)))
    assert [line for line in after if line not in before] == [f"  {f.name:18} {given[f.name]}"]


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "experiments.py", "plot.py", "table.py"])
def test_help_teaches_without_importing_torch(script):
    code = (f"import sys, runpy; sys.argv = ['{script}', '--help']\n"
            f"try: runpy.run_path('{script}', run_name='__main__')\nexcept SystemExit as e: assert not e.code\n"
            "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules, 'heavy import'")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"python {script}" in done.stdout
