"""plane.py: R^2 where it is known beforehand; the student untouched; both heads, both layouts; a picture of the paths."""

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.image import imread

import plane
from cli import InputError
from data.batch import open_data
from detector import build
from evaluate import evaluate_detector, headline
from plane import density, explained, features, fit_decoder, nats, picture, point_of
from presets import preset
from tests.scenes import tiny_config
from tests.test_disparity import Scans, settled
from tests.test_train import config, root, same  # noqa: F401 (root is a fixture)
from train import train

CPU = torch.device("cpu")


def maps(count, channels, shape, seed=0):
    return torch.randn(count, channels, *shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ the decoder, where the answer is known


@pytest.mark.parametrize("stride", [1, 2])
def test_features_that_hold_the_input_explain_all_of_it(stride):
    """The neck is an invertible linear map of the input's values in each cell, at any scale and offset."""
    target = maps(6, 3, (8 * stride, 12 * stride)) * 5 - 2
    values = torch.nn.functional.pixel_unshuffle(target, stride)  # (6, 3*s*s, 8, 12)
    mix = torch.randn(values.shape[1], values.shape[1], generator=torch.Generator().manual_seed(1))
    neck = 1e-3 * torch.einsum("nc,bchw->bnhw", mix, values) + 7
    decoder = fit_decoder([(neck[:2], target[:2]), (neck[2:4], target[2:4])])
    assert decoder(neck).shape == target.shape
    assert explained(decoder, [(neck[4:5], target[4:5]), (neck[5:], target[5:])]) == pytest.approx(1, abs=1e-3)


def test_features_of_a_neighbour_are_found_by_3x3_and_not_by_1x1():
    target = maps(8, 2, (10, 14))
    neck = target.roll(1, dims=3)
    assert explained(fit_decoder([(neck, target)]), [(neck, target)]) > 0.9  # the last column has no neighbour
    assert abs(explained(fit_decoder([(neck, target)], kernel=1), [(neck, target)])) < 0.02


def test_noise_explains_nothing_and_a_known_share_is_found():
    target, noise = maps(30, 1, (20, 30)), maps(30, 2, (20, 30), seed=1)
    held = slice(20, 30)
    for share, tolerance in ((0.0, 0.005), (0.3, 0.02), (0.8, 0.01)):  # neck = signal and noise in known parts
        neck = torch.cat([math.sqrt(share) * target + math.sqrt(1 - share) * noise[:, :1], noise[:, 1:]], dim=1)
        r2 = explained(fit_decoder([(neck[:20], target[:20])]), [(neck[held], target[held])])
        assert r2 == pytest.approx(share, abs=tolerance) and r2 > -0.005


def test_the_error_and_variance_are_those_of_a_loop():
    target, neck = maps(4, 2, (6, 10)).square(), maps(4, 3, (3, 5), seed=2)
    neck = neck + target[:, :1, ::2, ::2]
    decoder = fit_decoder([(neck[:3], target[:3])])
    out, y = decoder(neck[3:]), target[3:].double()
    error = variance = 0.0
    for c in range(2):
        mean = sum(float(v) for v in y[0, c].flatten()) / 60
        for i in range(6):
            for j in range(10):
                error += float(out[0, c, i, j] - y[0, c, i, j]) ** 2
                variance += (float(y[0, c, i, j]) - mean) ** 2
    assert explained(decoder, [(neck[3:], target[3:])]) == pytest.approx(1 - error / variance)


def test_it_is_the_least_squares_solution():
    """Against numpy's solver on the patches written out, cell by cell."""
    target, neck = maps(2, 1, (8, 12)), maps(2, 2, (4, 6), seed=3)
    neck = neck + torch.nn.functional.avg_pool2d(target, 2)
    padded = np.pad(neck.numpy().astype(float), ((0, 0), (0, 0), (1, 1), (1, 1)))
    rows, values = [], []
    for b in range(2):
        for i in range(4):
            for j in range(6):
                rows.append([1.0, *padded[b, :, i : i + 3, j : j + 3].ravel()])
                values.append(target[b, 0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].numpy().ravel())
    rows, values = np.array(rows), np.array(values)
    best = rows @ np.linalg.lstsq(rows, values, rcond=None)[0]
    out = torch.nn.functional.pixel_unshuffle(fit_decoder([(neck, target)])(neck), 2).permute(0, 2, 3, 1).reshape(-1, 4)
    assert np.allclose(out.numpy(), best, atol=1e-4)


def test_channels_that_are_dead_or_doubled_do_no_harm():
    target = maps(6, 1, (8, 12))
    neck = torch.cat([target, target, torch.full_like(target, 0.3), torch.zeros_like(target)], dim=1)
    decoder = fit_decoder([(neck[:4], target[:4])], kernel=1)
    assert explained(decoder, [(neck[4:], target[4:])]) == pytest.approx(1, abs=1e-4)
    assert decoder.weight.isfinite().all() and not decoder.weight[:, 2:].any()
    dead = fit_decoder([(0 * neck, target)])
    assert explained(dead, [(neck, target)]) == pytest.approx(0, abs=1e-3)


def test_what_cannot_be_decoded_is_one_line():
    with pytest.raises(InputError, match=r"multiple of the neck's, found \(4, 6\) and \(9, 12\) cells"):
        fit_decoder([(maps(1, 1, (4, 6)), maps(1, 1, (9, 12)))])
    flat = torch.zeros(1, 1, 4, 6)
    with pytest.raises(InputError, match="nothing to reconstruct"):
        explained(fit_decoder([(maps(1, 1, (4, 6)), flat)]), [(maps(1, 1, (4, 6)), flat)])


def test_nats_are_those_of_two_gaussians():
    assert nats(0.0) == nats(-0.3) == 0.0 and nats(0.75) == pytest.approx(math.log(2))
    assert nats(0.19) == pytest.approx(-0.5 * math.log(0.81)) and math.isfinite(nats(1.0))


# ------------------------------------------------------------------ a detector's point


STRIDE_2 = {"encoder": "pillar", "voxel_size": (0.8, 0.4, 4.0), "encoder_channels": (8, 8), "bev_strides": (2, 1),
            "up_strides": (1.0, 1.0)}  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"head": "anchor"}, STRIDE_2], ids=["centre", "anchor", "pillar, stride 2"])
def test_a_point_leaves_the_student_alone_and_repeats_itself(root, changes):  # noqa: F811
    cfg = config(root, **changes)
    data = open_data(cfg, "val")
    student = settled(build(cfg), data)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    neck, bev = next(features(student, data, [0], "map", CPU))
    out = student(student.prepare(plane_batch(data, cfg)))
    assert torch.equal(neck, out.neck) and bev.shape[2] % neck.shape[2] == 0
    torch.manual_seed(3)
    first = point_of(student, data, data, 3, "map", CPU)
    torch.manual_seed(4)
    assert point_of(student, data, data, 3, "map", CPU) == first
    assert 0 < first["r2"] <= 1 and first["nats"] == nats(first["r2"])
    assert {k: v for k, v in first.items() if "map" in k} == headline(evaluate_detector(student, data, CPU))
    assert same(student.state_dict(), before)


def test_a_decoder_is_fitted_to_other_frames_than_it_is_judged_by(root):  # noqa: F811
    cfg = config(root)
    student = settled(build(cfg), open_data(cfg, "val"))
    some, others = (open_data(replace(cfg, frames=ids), "val") for ids in (("000000", "000001"), ("000002", "000003")))
    judged = list(features(student, others, [0, 1], "map", CPU))
    expected = explained(fit_decoder(features(student, some, [0, 1], "map", CPU)), judged)
    assert point_of(student, some, others, 2, "map", CPU)["r2"] == expected != explained(fit_decoder(judged), judged)


def plane_batch(data, cfg):
    from data.batch import collate

    return collate([data[0]], cfg)


def test_nuscenes_students_have_a_place_too():
    cfg = replace(preset("cp-voxel-xxs-cpu", "nuscenes"), point_range=(-9.6, -7.2, -5.0, 9.6, 7.2, 3.0))
    scans = Scans(cfg)
    student = settled(build(cfg), scans)
    for kind in ("map", "points"):
        decoder = fit_decoder(features(student, scans, range(2), kind, CPU))
        assert 0 < explained(decoder, features(student, scans, range(2), kind, CPU)) <= 1


def test_density_counts_the_points_of_each_cell():
    cfg = tiny_config()  # x 0 .. 6.4, y -4.8 .. 4.8
    points = torch.tensor(np.random.default_rng(0).uniform((0, -1, -6, -9, 0), (0, 8, 6, 9, 1), (500, 5)), dtype=torch.float32)
    found = density(points, build(cfg), (6, 8))
    expected = np.zeros((6, 8))
    for _, x, y, *_ in points.tolist():
        if 0 <= x < 6.4 and -4.8 <= y < 4.8:
            expected[math.floor((y + 4.8) / 1.6), math.floor(x / 0.8)] += 1
    assert found.shape == (1, 1, 6, 8) and np.allclose(found[0, 0].numpy(), np.log1p(expected))


# ------------------------------------------------------------------ picture and command


def some_points(seeds=2, score="map"):
    return [{"method": method, "seed": seed, "step": step, "r2": 0.1 * k + 0.02 * seed, "nats": nats(0.1 * k + 0.02 * seed),
             score: 10.0 * k + seed} for method in ("none", "rdd") for seed in range(seeds)
            for k, step in enumerate((50, 100, 150), 1)]  # fmt: skip


def test_picture_has_every_seed_their_mean_and_the_teacher(tmp_path):
    ax = picture(tmp_path / "p.png", some_points(), {"nats": 0.4, "map": 50.0}).axes[0]
    assert len(ax.lines) == 4 and list(ax.lines[1].get_ydata()) == [11, 21, 31]
    paths = [np.asarray(c.get_offsets()) for c in ax.collections]
    assert [len(p) for p in paths] == [3, 3, 1]
    assert np.allclose(paths[0][:, 1], [10.5, 20.5, 30.5]) and np.allclose(paths[0][0, 0], (nats(0.1) + nats(0.12)) / 2)
    said = [text.get_text() for text in ax.get_legend().get_texts()]
    assert said == ["student alone (2 seeds)", "student + RDD (2 seeds)", "teacher"]
    assert "mAP (%)" in ax.get_ylabel() and "value of the input:" in ax.get_xlabel()
    assert [text.get_text() for text in ax.texts if text.get_text()] == ["step 50", "step 150"], "not once a method"
    ax = picture(tmp_path / "p.png", some_points(), None, kind="points").axes[0]
    assert "value of log(1 + points in a cell):" in ax.get_xlabel()
    pixels = imread(tmp_path / "p.png")[..., :3]
    assert not (pixels == pixels[0, 0]).all()
    ax = picture(tmp_path / "one.png", some_points(1, "moderate_map_3d")[:1], None).axes[0]
    assert not ax.lines and "mAP 3D" in ax.get_ylabel()


def test_command_draws_both_runs_at_the_same_stops(root, tmp_path, monkeypatch):  # noqa: F811
    torch.set_num_threads(1)
    cfg = config(root, epochs=2)
    train(replace(cfg, width=(1.0,) * 3), tmp_path / "teacher", stop_after=1)
    words = ["plane.py", "--teacher", str(tmp_path / "teacher" / "last.pt"), "--student", "cp-voxel-xxs-cpu", "--root", str(root),
             "--point-range", ",".join(map(str, cfg.point_range)), "--fov-only", "off", "--epochs", "2", "--paste", "0,0,0",
             "--stops", "2", "--out", str(tmp_path / "out")]  # fmt: skip
    monkeypatch.setattr(sys, "argv", words)
    plane.main()
    content = json.loads((tmp_path / "out" / "plane.json").read_text())
    assert [(p["method"], p["seed"], p["step"]) for p in content["points"]] == [
        ("none", 0, 2), ("none", 0, 4), ("rdd", 0, 2), ("rdd", 0, 4)]  # fmt: skip
    assert {"r2", "nats", "moderate_map_3d"} < set(content["teacher"]) and (tmp_path / "out" / "plane.png").is_file()
    monkeypatch.setattr(sys, "argv", [*words, "--seeds", "2"])
    plane.main()
    again = json.loads((tmp_path / "out" / "plane.json").read_text())
    assert again["points"][:4] == content["points"] and again["teacher"] == content["teacher"], "runs are kept, figures repeat"
    assert [p["seed"] for p in again["points"][4:]] == [1] * 4 and again["points"][5]["r2"] != content["points"][1]["r2"]
    for more, said in ((["--methods", "rddd"], "unknown 'rddd' .did you mean rdd"), (["--head", "anchor"], "differ in head"),
                       (["--seeds", "0"], "--seeds: expected a number from 1 on"),
                       (["--student", "runs/x/last.pt"], "expected a preset, which is trained here")):  # fmt: skip
        monkeypatch.setattr(sys, "argv", [*words, *more])
        with pytest.raises(InputError, match=said):
            plane.main()
