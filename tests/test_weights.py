"""Checkpoints that go wrong, teachers from OpenPCDet's files, and students that start from their teacher."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import weights
from cli import InputError
from config import to_json
from data.batch import collate
from detector import Detector, build
from parallel import BatchNorm
from presets import preset
from tests.conformance import MODELS, recipe_state
from tests.scenes import tiny_config, tiny_frames
from weights import from_openpcdet, inherit, load_detector, openpcdet_name, read_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
TEACHERS = {keys: (name, data) for keys, name, data in MODELS.values()}  # keys file -> our preset and its data set
SPARSE = ("second", "centerpoint_voxel")


def content(cfg):
    return {"format": 1, "config": to_json(cfg), "model": build(cfg).state_dict(), "step": 3}


def one_line(error) -> bool:
    return "\n" not in str(error.value)


# ---------------------------------------------------------------- checkpoints


def test_checkpoint_round_trip(tmp_path):
    cfg = tiny_config()
    save_checkpoint(tmp_path / "last.pt", content(cfg))
    model, read = load_detector(tmp_path / "last.pt")
    assert model.cfg == cfg and read["step"] == 3 and not model.training
    for key, value in build(cfg).state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    assert os.listdir(tmp_path) == ["last.pt"]


def test_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "last.pt")


def test_of_many_runs_three_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for k in range(5):
        (tmp_path / "runs" / f"x{k}").mkdir(parents=True)
        (tmp_path / "runs" / f"x{k}" / "last.pt").touch()
    with pytest.raises(InputError, match=r"no such checkpoint \(known: (runs/x\d/last\.pt, ){3}\.\.\.\)$"):
        read_checkpoint("somewhere/quite/else/best-of-all-detectors")
    with pytest.raises(InputError, match=r"did you mean runs/x3/last\.pt"):
        read_checkpoint("runs/x3/lats.pt")


@pytest.mark.parametrize("key", ["config", "step"])
def test_a_key_that_is_missing_is_named(tmp_path, key):
    save_checkpoint(tmp_path / "last.pt", {k: v for k, v in content(tiny_config()).items() if k != key})
    with pytest.raises(InputError, match=f"last.pt: expected a checkpoint .* found one without '{key}'") as error:
        read_checkpoint(tmp_path / "last.pt")
    assert one_line(error)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="new/last.pt: checkpoint not written") as error:
        save_checkpoint(tmp_path / "file" / "new" / "last.pt", content(tiny_config()))
    assert one_line(error)


class WritesAFile:
    """What a malicious pickle looks like: unpickling it calls a function of its author's choice."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def corrupt(path, how):
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("not a checkpoint\n")
    elif how == "flipped":
        path.write_bytes(data[:100] + bytes(b ^ 255 for b in data[100:400]) + data[400:])
    elif how == "foreign dict":
        torch.save({"weights": {}, "epoch": 3}, path)
    elif how == "foreign list":
        torch.save([1, 2], path)
    elif how == "code":
        torch.save({"format": 1, "model": WritesAFile(), "model_state": WritesAFile()}, path)
    elif how == "code, old format":
        torch.save({"format": 1, "model": WritesAFile(), "model_state": WritesAFile()}, path,
                   _use_new_zipfile_serialization=False)  # fmt: skip
    elif how == "truncated, old format":
        torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "flipped", "foreign dict", "foreign list", "code",
                                 "code, old format", "truncated, old format"])  # fmt: skip
@pytest.mark.parametrize(("read", "expected"), [
    (read_checkpoint, "a checkpoint written by train.py"), (weights.read_openpcdet, "an OpenPCDet checkpoint")])  # fmt: skip
def test_corrupt_and_foreign_files_are_refused_in_one_line_and_run_nothing(tmp_path, how, read, expected, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last.pt"
    save_checkpoint(path, content(tiny_config()))
    corrupt(path, how)
    with pytest.raises(InputError, match=f"last.pt.*expected {expected}") as error:
        read(path)
    assert one_line(error) and not (tmp_path / "pwned").exists()
    if how in ("truncated", "empty", "text"):
        assert str(error.value).endswith(f"found a truncated one or no checkpoint ({path.stat().st_size} bytes)")


def test_the_malicious_pickle_of_these_tests_is_one(tmp_path, monkeypatch):
    """Read without weights_only, it does run: the test above proves something."""
    monkeypatch.chdir(tmp_path)
    torch.save(WritesAFile(), "evil.pt")
    torch.load("evil.pt", weights_only=False)
    assert (tmp_path / "pwned").exists()


def test_a_checkpoint_of_another_model_names_what_does_not_fit(tmp_path):
    wide = build(tiny_config(width=(1.0, 1.0, 1.0)))
    save_checkpoint(tmp_path / "a.pt", {**content(tiny_config()), "model": wide.state_dict()})
    with pytest.raises(InputError, match="made for another model: .* has shape"):
        load_detector(tmp_path / "a.pt")
    short = {k: v for k, v in build(tiny_config()).state_dict().items() if "head" not in k}
    save_checkpoint(tmp_path / "b.pt", {**content(tiny_config()), "model": short})
    with pytest.raises(InputError, match="missing head"):
        load_detector(tmp_path / "b.pt")


def test_a_full_disk_leaves_the_previous_checkpoint_whole(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(path, content(tiny_config()))
    before = path.read_bytes()

    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights.torch, "save", full)
    with pytest.raises(InputError, match="No space left.*previous one is untouched"):
        save_checkpoint(path, content(tiny_config()))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["last.pt"]


def test_a_kill_while_writing_leaves_the_previous_checkpoint_whole(tmp_path, monkeypatch):
    """The process dies between the write and the move: the old file is untouched, the half one has another name."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, content(tiny_config()))
    before = path.read_bytes()

    def die(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(weights.os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {**content(tiny_config()), "step": 9})
    assert path.read_bytes() == before and read_checkpoint(path)["step"] == 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_is_really_full(tmp_path):
    os.symlink("/dev/full", tmp_path / "last.pt.tmp")
    with pytest.raises(InputError, match="not written"):
        save_checkpoint(tmp_path / "last.pt", content(tiny_config()))


# ---------------------------------------------------------------- teachers from OpenPCDet


def their_state(golden: Path, keys: str) -> dict[str, Tensor]:
    """The state_dict of one of the reference's detectors: its names and shapes, weights by the golden recipe."""
    return recipe_state(json.loads((golden / "models" / f"keys_{keys}.json").read_text()))


def their_file(path: Path, state: dict[str, Tensor], **more) -> Path:
    """A checkpoint as OpenPCDet's train_utils.save_checkpoint writes it."""
    optimizer = {"state": {0: {"step": 7, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.003, "betas": (0.9, 0.99)}]}
    torch.save({"epoch": 80, "it": 1000, "model_state": state, "optimizer_state": optimizer,
                "version": "pcdet+0.6.0+8cacccec", **more}, path)  # fmt: skip
    return path


def run_import(path: Path, out: Path, keys: str, *more: str) -> dict[str, Tensor]:
    """`python detector.py import` inside this process; the weights of the detector that its file holds."""
    name, data = TEACHERS[keys]
    weights.main([str(path), "--preset", name, "--data", data, "--out", str(out), *more])
    detector, read = load_detector(out)
    assert detector.cfg == replace(preset(name, data), data=data) and read["step"] == 0
    return detector.state_dict()


@pytest.mark.parametrize("keys", TEACHERS)
def test_our_names_and_openpcdet_s_stand_for_the_same_tensors(golden, keys):
    """One of ours for each of theirs but `global_step`, none twice, shapes equal: the keys file is the oracle."""
    name, data = TEACHERS[keys]
    own = Detector(preset(name, data)).state_dict()
    theirs = json.loads((golden / "models" / f"keys_{keys}.json").read_text())["tensors"]
    renamed = {openpcdet_name(key): list(value.shape) for key, value in own.items()}
    assert len(renamed) == len(own)
    assert renamed == {key: value["shape"] for key, value in theirs.items() if key != "global_step"}


def test_a_name_that_is_not_ours_has_no_other_name():
    with pytest.raises(KeyError):
        openpcdet_name("encoder.unknown.weight")


@pytest.mark.parametrize("keys", TEACHERS)
def test_an_imported_file_holds_every_tensor_of_its_source(golden, tmp_path, keys, capsys):
    source = their_state(golden, keys)
    own = run_import(their_file(tmp_path / "theirs.pth", source), tmp_path / "made" / "teacher.pt", keys)
    assert len(own) == len(source) - 1  # without global_step
    for name, value in own.items():
        assert torch.equal(value, source[openpcdet_name(name)]), name
    said = capsys.readouterr().out
    assert f"{len(own)} tensors" in said and TEACHERS[keys][0] in said and os.listdir(tmp_path / "made") == ["teacher.pt"]


def test_import_from_a_shell(golden, tmp_path):
    """`python detector.py import CHECKPOINT --preset NAME --out FILE`, with the reference's own parameter count."""
    path = their_file(tmp_path / "theirs.pth", source := their_state(golden, "pointpillars"))
    command = [sys.executable, "detector.py", "import", path, "--preset", "pointpillars", "--out", tmp_path / "own.pt"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "4,834,888 parameters" in done.stdout, done.stderr
    for name, value in load_detector(tmp_path / "own.pt")[0].state_dict().items():
        assert torch.equal(value, source[openpcdet_name(name)])


@pytest.mark.parametrize("keys", SPARSE)
def test_spconv_1_and_module_prefixes_give_the_same_weights(golden, tmp_path, keys):
    """Sparse kernels (out, kz, ky, kx, in) moved to spconv 1's (kz, ky, kx, in, out); every name behind `module.`"""
    source = their_state(golden, keys)
    old = {f"module.{name}": v.permute(1, 2, 3, 4, 0).contiguous() if v.dim() == 5 else v for name, v in source.items()}
    assert any(value.dim() == 5 for value in old.values())
    own = run_import(their_file(tmp_path / "theirs.pth", old), tmp_path / "teacher.pt", keys)
    assert all(torch.equal(value, source[openpcdet_name(name)]) for name, value in own.items())


def test_a_bare_state_dict_in_half_precision_is_imported_too(golden, tmp_path):
    source = {name: v.half() if v.is_floating_point() else v for name, v in their_state(golden, "pointpillars").items()}
    torch.save(source, tmp_path / "bare.pth", _use_new_zipfile_serialization=False)  # as torch before 1.6 wrote them
    own = run_import(tmp_path / "bare.pth", tmp_path / "teacher.pt", "pointpillars")
    for name, value in own.items():
        assert value.dtype in (torch.float32, torch.int64) and torch.equal(value, source[openpcdet_name(name)].to(value.dtype))


def test_numpy_numbers_in_the_optimizer_s_state_do_not_stand_in_the_way(golden, tmp_path):
    """OpenPCDet's one-cycle schedule leaves numpy.float64 learning rates in the files that its users train."""
    optimizer = {"state": {}, "param_groups": [{"lr": np.float64(3e-8), "betas": (np.float64(0.95), 0.99)}]}
    path = their_file(tmp_path / "theirs.pth", their_state(golden, "pointpillars"), optimizer_state=optimizer)
    run_import(path, tmp_path / "teacher.pt", "pointpillars")


def test_another_model_s_checkpoint_gives_one_error_with_counts_and_names(golden, tmp_path):
    """PointPillars' file as SECOND: the counts are those of the two keys files, compared here as sets."""
    pillars, second = their_state(golden, "pointpillars"), their_state(golden, "second")
    path = their_file(tmp_path / "theirs.pth", pillars)
    missing, unexpected = set(second) - set(pillars), set(pillars) - set(second)
    shapes = {name for name in set(second) & set(pillars) if second[name].shape != pillars[name].shape}
    with pytest.raises(InputError) as error:
        run_import(path, tmp_path / "teacher.pt", "second")
    said = str(error.value)
    assert f"{len(missing)} tensors missing, {len(unexpected)} unexpected, {len(shapes)} of another shape" in said
    assert "not the weights of preset second" in said and str(path) in said and len(said.splitlines()) == 22
    assert f"and {len(missing) + len(unexpected) + len(shapes) - 20} more" in said
    assert not (tmp_path / "teacher.pt").exists()


def test_every_tensor_that_does_not_fit_is_named(golden, tmp_path):
    source = their_state(golden, "pointpillars")
    source["dense_head.conv_box.bias"] = source["dense_head.conv_box.bias"][:-1]
    source["roi_head.extra"] = source.pop("vfe.pfn_layers.0.linear.weight")
    with pytest.raises(InputError, match="1 tensors missing, 1 unexpected, 1 of another shape") as error:
        run_import(their_file(tmp_path / "theirs.pth", source), tmp_path / "teacher.pt", "pointpillars")
    for line in ("missing vfe.pfn_layers.0.linear.weight", "unexpected roi_head.extra",
                 "dense_head.conv_box.bias has shape (41,), expected (42,)"):  # fmt: skip
        assert line in str(error.value)


def test_a_sparse_kernel_in_neither_layout_is_of_another_shape():
    detector = build(tiny_config())
    state = {openpcdet_name(name): value for name, value in detector.state_dict().items()}
    key = "backbone_3d.conv2.0.0.weight"
    state[key] = state[key].permute(1, 2, 3, 0, 4)  # (kz, ky, kx, out, in)
    with pytest.raises(InputError, match=f"{key} has shape"):
        from_openpcdet(state, detector, "x.pth")


@pytest.mark.parametrize(("words", "hint"), [
    (["--preset", "secnd"], "unknown preset 'secnd' .did you mean second"),
    (["--preset", "second", "--data", "nuscenes"], "second and its students: made for kitti and sim, not for nuscenes"),
    (["--preset", "cp-pillar-v0.2", "--data", "kitti"], "made for nuscenes, not for kitti"),
    (["--preset", "second"], "no such checkpoint"), ([], "required: --preset"),
    (["--preset", "second", "--widht", "1"], "did you mean --width"),
])  # fmt: skip
def test_wrong_words_of_import_get_one_line(tmp_path, words, hint):
    with pytest.raises(InputError, match=hint) as error:
        weights.main([str(tmp_path / "none.pth"), "--out", str(tmp_path / "teacher.pt"), *words])
    assert one_line(error) and os.listdir(tmp_path) == []


def test_the_same_preset_on_the_other_data_set_does_not_fit(golden, tmp_path):
    """cp-voxel has a nuScenes and a KITTI version: five values a point and six tasks, or four and one."""
    path = their_file(tmp_path / "theirs.pth", source := their_state(golden, "centerpoint_voxel"))
    more = sum(name.startswith("dense_head.heads_list") and not name.startswith("dense_head.heads_list.0") for name in source)
    velocity = sum(name.startswith("dense_head.heads_list.0.vel") for name in source)
    # of another shape: the first kernel, and the heat map's last convolution, which has three classes instead of one
    with pytest.raises(InputError, match=f"0 tensors missing, {more + velocity} unexpected, 3 of another shape"):
        weights.main([str(path), "--preset", "cp-voxel", "--out", str(tmp_path / "teacher.pt")])


# ---------------------------------------------------------------- a student that starts from its teacher

PILLAR = {"encoder": "pillar", "voxel_size": (0.4, 0.4, 4.0), "encoder_channels": (32, 32), "bev_strides": (2, 2)}
VELOCITY = {"velocity": True, "code_weights": (1.0,) * 10, "tasks": (("Car",), ("Pedestrian", "Cyclist"))}
GAPS = {  # model, the student's widths: on tiny_config's small grid
    "cp-voxel-s-cpu": ({}, (1.0, 0.5, 0.5)),
    "cp-voxel-xxs-cpu": ({}, (0.5, 0.25, 0.25)),
    "residual, four stages": ({"residual": True, "down_kernel": 3, "voxel_size": (0.2, 0.2, 0.1),
                               "encoder_channels": (16, 16, 32, 48, 48, 64), "bev_strides": (1, 1),
                               "up_strides": (1.0, 1.0)}, (0.75, 0.5, 0.25)),
    "second-cpu": ({"head": "anchor"}, (0.75, 0.5, 0.5)),
    "pillars of two layers": (PILLAR, (0.5, 0.5, 0.5)),
    "pillars of three layers, hard": ({**PILLAR, "encoder_channels": (32, 24, 16), "max_points": 4}, (0.75, 0.5, 1.0)),
    "pointpillars-cpu": ({**PILLAR, "head": "anchor", "encoder_channels": (32,)}, (0.75, 0.5, 0.5)),
    "three levels, two tasks": ({**VELOCITY, "bev_layers": (1, 1, 1), "bev_strides": (1, 2, 1), "bev_channels": (16, 24, 32),
                                 "up_strides": (0.5, 1.0, 1.0), "up_channels": (24, 8, 16)}, (1.0, 0.5, 0.5)),
}  # fmt: skip


def pair(gap: str) -> tuple[Detector, Detector]:
    """Teacher and student of a gap, with nothing left at its initial value, in float64 and eval mode."""
    changes, width = GAPS[gap]
    both = build(tiny_config(**changes, width=(1.0, 1.0, 1.0))), build(tiny_config(**changes, width=width, seed=1))
    generator = torch.Generator().manual_seed(2)
    for detector in both:
        for value in detector.state_dict().values():
            if value.dim() == 1:  # norms, their statistics, biases
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
        detector.double().eval()
    return both


def all_maps(detector: Detector) -> list[Tensor]:
    batch = collate(tiny_frames(2), detector.cfg)
    batch = replace(batch, points=batch.points.double())
    with torch.no_grad():
        return [m for task in detector(detector.prepare(batch)).maps for m in task.values()]


def silence_extra_channels(teacher: Detector, student: Detector) -> None:
    """After every norm of the teacher, the channels that the student has not got become 0, so they can say nothing."""
    narrow = dict(student.named_modules())
    for name, module in teacher.named_modules():
        if isinstance(module, BatchNorm):
            kept = narrow[name].num_features
            module.weight.data[kept:] = 0
            module.bias.data[kept:] = 0


@pytest.mark.parametrize("gap", GAPS)
def test_a_student_equals_a_teacher_whose_other_channels_are_silent(gap):
    """The oracle is the teacher itself, and knows nothing of how the layers' inputs are laid side by side.

    Its extra channels are 0 behind every norm, so its output depends on the first channels of each map only: exactly what
    a student may inherit. One wrong channel anywhere, and the outputs differ.
    """
    teacher, student = pair(gap)
    silence_extra_channels(teacher, student)
    before = all_maps(student)
    inherit(student, teacher)
    theirs, ours = all_maps(teacher), all_maps(student)
    assert len(ours) == len(theirs)
    for ours_, theirs_, before_ in zip(ours, theirs, before, strict=True):
        torch.testing.assert_close(ours_, theirs_, atol=1e-9, rtol=1e-9)
        assert (before_ - theirs_).abs().max() > 1e-3 and theirs_.std() > 0


@pytest.mark.parametrize("gap", ["cp-voxel-s-cpu", "second-cpu", "pillars of two layers"])
def test_that_oracle_sees_maps_that_were_not_kept_apart(gap, monkeypatch):
    teacher, student = pair(gap)
    silence_extra_channels(teacher, student)
    monkeypatch.setattr(weights, "_parts", lambda *_: [])
    inherit(student, teacher)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(all_maps(student), all_maps(teacher), strict=True))


@pytest.mark.parametrize(("teacher_s", "student_s"), [
    ("cp-voxel-cpu", "cp-voxel-s-cpu"), ("cp-voxel-cpu", "cp-voxel-xxs-cpu"), ("second-cpu", "second-s-cpu"),
    ("pointpillars-cpu", "pointpillars-s-cpu")])  # fmt: skip
def test_every_tensor_is_a_plain_slice_of_the_teacher_s(teacher_s, student_s):
    """Written out by shape: all first channels, but where the neck's two maps of 48 teacher channels are read."""
    teacher, student = build(preset(teacher_s)), build(preset(student_s))
    inherit(student, teacher)
    n = student.cfg.widths(1, (48,))[0]
    source = teacher.state_dict()
    for name, value in student.state_dict().items():
        whole = source[name]
        if name in ("head.shared.0.weight", "head.cls.weight", "head.box.weight", "head.direction.weight"):
            whole = torch.cat([whole[:, :n], whole[:, 48 : 48 + n]], dim=1)
        assert torch.equal(value, whole[tuple(slice(0, k) for k in value.shape)]), name


def test_a_second_pillar_layer_takes_half_of_the_points_and_half_of_the_maxima():
    teacher, student = build(tiny_config(**PILLAR, width=(1.0,) * 3)), build(tiny_config(**PILLAR, width=(0.5,) * 3))
    inherit(student, teacher)
    theirs, ours = (d.encoder.layers[1].linear.weight for d in (teacher, student))  # (32, 16 + 16), (16, 8 + 8)
    assert torch.equal(ours, torch.cat([theirs[:16, :8], theirs[:16, 16:24]], dim=1))


@pytest.mark.parametrize("changes", [{}, {"head": "anchor"}, {**PILLAR, "voxel_size": (0.8, 0.8, 4.0), "bev_strides": (1, 2)}])
def test_a_student_of_the_same_widths_is_a_copy(changes):
    """Also on another grid: a pillar student differs in the size of its pillars only."""
    teacher = build(tiny_config(**{**PILLAR, **changes} if "encoder" in changes else changes))
    student = build(tiny_config(**changes, seed=1))
    inherit(student, teacher)
    assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in student.state_dict().items())


def test_the_teacher_is_left_as_it_was_and_shares_no_memory():
    teacher, student = build(tiny_config()), build(tiny_config(seed=1))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    inherit(student, teacher)
    for value in student.state_dict().values():
        value.zero_()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.requires_grad and p.is_leaf for p in student.parameters())


@pytest.mark.parametrize(("changes", "hint"), [
    ({"width": (1.0, 1.0, 1.0)}, r"--inherit: .* of cp-voxel-xxs-cpu .* is no part of cp-voxel-xxs-cpu's"),
    ({"head": "anchor"}, "head.cls.weight .*is no part of"), ({"residual": True}, r"encoder.stages.0.0.conv1.weight .*\(none\)"),
    (PILLAR, r"encoder.layers.0.linear.weight .*\(none\)"), ({"bev_layers": (3, 4)}, r"backbone.levels.1.4.0.weight .*\(none\)"),
    ({"down_kernel": 3}, r"encoder.stages.1.0.conv.weight"),
])  # fmt: skip
def test_a_wider_student_or_one_of_another_kind_cannot_inherit(changes, hint):
    with pytest.raises(InputError, match=hint) as error:
        inherit(build(tiny_config(**changes)), build(tiny_config()))
    assert one_line(error)


def test_a_corner_of_a_larger_kernel_is_no_smaller_kernel():
    with pytest.raises(InputError, match=r"--inherit: encoder.stages.1.0.conv.weight of .* is no part of"):
        inherit(build(tiny_config()), build(tiny_config(down_kernel=3)))
