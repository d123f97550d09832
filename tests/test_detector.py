"""The detector as a whole: sharing of inputs, cost counts, and checkpoints that go wrong."""

import errno
import os
from dataclasses import replace

import pytest
import torch

import detector as det
from config import InputError, preset, to_json
from data.batch import collate
from detector import build, count_macs, count_parameters, load_detector, read_checkpoint, save_checkpoint
from tests.scenes import tiny_config, tiny_frames


def content(cfg):
    return {"format": 1, "config": to_json(cfg), "model": build(cfg).state_dict(), "step": 3}


def test_weights_depend_on_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = build(tiny_config()), build(tiny_config()), build(tiny_config(seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    key = "backbone.levels.0.0.0.weight"
    assert torch.equal(a.state_dict()[key], b.state_dict()[key])
    assert not torch.equal(a.state_dict()[key], c.state_dict()[key])


def test_a_student_that_reads_its_teacher_s_input_gives_the_same_output():
    teacher, student = build(tiny_config(width=(1.0, 1.0, 1.0))).eval(), build(tiny_config()).eval()
    batch = collate(tiny_frames(2), student.cfg)
    assert teacher.shares_input(student)
    alone = student(student.prepare(batch))
    x = student.prepare(batch)
    teacher(x)
    shared = student(x)
    assert torch.equal(alone.neck, shared.neck)
    assert not teacher.shares_input(build(tiny_config(voxel_size=(0.1, 0.2, 0.2))))


def test_batch_of_two_is_two_batches_of_one():
    model = build(tiny_config()).eval()
    frames = tiny_frames(2)
    both = model(model.prepare(collate(frames, model.cfg))).neck
    for b, frame in enumerate(frames):
        alone = model(model.prepare(collate([frame], model.cfg))).neck
        torch.testing.assert_close(both[b : b + 1], alone, atol=1e-4, rtol=1e-4)


def test_macs_of_the_dense_part_by_hand():
    cfg = tiny_config()
    model = build(cfg)
    frames = collate(tiny_frames(2), cfg)
    total = count_macs(model, frames)
    h, w, c_in = 12, 8, model.encoder.out_channels
    level1 = h * w * 9 * (c_in * 12 + 3 * 12 * 12) + h * w * 12 * 12
    level2 = h * w // 4 * (9 * (12 * 24 + 3 * 24 * 24) + 24 * 12 * 4)
    head = h * w * 9 * (24 * 8 + 5 * 8 * 8 + 8 * (2 + 1 + 3 + 2 + 3))
    dense = level1 + level2 + head
    assert total > dense
    empty = collate([f.__class__(f.id, f.points[:0], f.boxes[:0], ()) for f in tiny_frames(1)], cfg)
    assert count_macs(model, empty) == dense  # no sites, no sparse work
    assert model.training


def test_sparse_macs_are_pairs_times_channels():
    """A submanifold layer on one isolated voxel has one pair; the strided ones meet it once."""
    cfg = tiny_config()
    model = build(cfg)
    frame = tiny_frames(1)[0]
    one = frame.__class__("one", frame.points[:1], frame.boxes[:0], ())
    none = frame.__class__("none", frame.points[:0], frame.boxes[:0], ())
    difference = count_macs(model, collate([one], cfg)) - count_macs(model, collate([none], cfg))
    first, a, b, c, last = (8, 8, 16, 24, 32)
    layers = 4 * first + first * a + a * b + 2 * b * b + b * c + 2 * c * c
    assert difference - layers in (0, c * last)  # conv_out may see the voxel's cell or not (three of four do)


def test_parameter_counts_of_the_gap():
    teacher, student = (count_parameters(build(preset(n))) for n in ("cp-voxel-cpu", "cp-voxel-xxs-cpu"))
    assert teacher > 7 * student


@pytest.mark.parametrize(("changes", "hint"), [
    ({"point_range": (0.0, -4.8, -3.0, 6.5, 4.8, 1.0)}, "range along x"),
    ({"point_range": (0.0, -4.0, -3.0, 6.4, 4.8, 1.0)}, "range along y"),
    ({"tasks": (("Car",), ("Pedestrian",))}, "tasks hold"),
])  # fmt: skip
def test_a_config_that_builds_no_model_is_refused(changes, hint):
    with pytest.raises(InputError, match=hint):
        build(tiny_config(**changes))


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
        torch.save({"model_state": {}, "epoch": 3}, path)
    elif how == "foreign list":
        torch.save([1, 2], path)
    elif how == "code":

        class Evil:
            def __reduce__(self):
                return os.system, ("touch pwned",)

        torch.save({"format": 1, "model": Evil()}, path, _use_new_zipfile_serialization=True)


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "flipped", "foreign dict", "foreign list", "code"])
def test_corrupt_and_foreign_files_are_refused_in_one_line(tmp_path, how, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last.pt"
    save_checkpoint(path, content(tiny_config()))
    corrupt(path, how)
    with pytest.raises(InputError, match="last.pt.*expected a checkpoint") as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value) and not (tmp_path / "pwned").exists()


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

    monkeypatch.setattr(det.torch, "save", full)
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

    monkeypatch.setattr(det.os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {**content(tiny_config()), "step": 9})
    assert path.read_bytes() == before and read_checkpoint(path)["step"] == 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_is_really_full(tmp_path):
    os.symlink("/dev/full", tmp_path / "last.pt.tmp")
    with pytest.raises(InputError, match="not written"):
        save_checkpoint(tmp_path / "last.pt", content(tiny_config()))


@pytest.mark.gpu
def test_cuda_equals_cpu():
    cfg = replace(tiny_config(), amp=False)
    batch = collate(tiny_frames(2), cfg)
    cpu, cuda = build(cfg).eval(), build(cfg).eval().cuda()
    a, b = cpu(cpu.prepare(batch)).neck, cuda(cuda.prepare(batch.to(torch.device("cuda")))).neck.cpu()
    torch.testing.assert_close(a, b, atol=1e-3 * float(a.abs().max()), rtol=1e-3)
