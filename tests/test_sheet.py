"""The sheet: counts against hand arithmetic and published totals, the memory tracker against a toy, the command."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import sheet
from cli import InputError
from data import Frame
from data.batch import collate
from detector import Detector, build
from presets import preset
from sheet import LiveBytes, count_macs, count_parameters, read_cloud, simulated_cloud, time_and_memory
from sparse import SparseConv3d, SparseTensor, SubMConv3d
from tests.scenes import tiny_config, tiny_frames

PAIR = "cp-voxel-cpu,cp-voxel-xxs-cpu"
CPU = torch.device("cpu")


class Toy(nn.Module):
    """A layer that looks like a detector to `count_macs`; a batch is a list of one input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def prepare(self, batch: list) -> object:
        return batch[0]

    def forward(self, x: object) -> object:
        return self.layer(x)


# ------------------------------------------------------------------ multiply-accumulates, layer by layer


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (2, 2)])
def test_convolution_against_loops(stride, groups):
    layer, x = nn.Conv2d(4, 6, (3, 2), stride, groups=groups), torch.zeros(1, 4, 7, 9)
    total = 0
    for i, j in itertools.product(range(0, 7 - 2, stride), range(0, 9 - 1, stride)):  # where the kernel's corner lies
        for tap in itertools.product(range(3), range(2)):
            assert i + tap[0] < 7 and j + tap[1] < 9
            for c_in, c_out in itertools.product(range(4), range(6)):
                total += c_in // (4 // groups) == c_out // (6 // groups)  # connected
    assert count_macs(Toy(layer), [x]) == total


def test_transposed_convolution_against_loops():
    """Every input value is multiplied by k x k weights for each output channel: not k^2 times as often."""
    layer, x = nn.ConvTranspose2d(5, 3, 2, 2), torch.zeros(1, 5, 4, 6)
    total = sum(1 for _ in itertools.product(range(4), range(6), range(2), range(2), range(5), range(3)))
    assert layer(x).shape == (1, 3, 8, 12)
    assert count_macs(Toy(layer), [x]) == total == 4 * 6 * 4 * 15


def test_linear_costs_its_rows():
    assert count_macs(Toy(nn.Linear(7, 5)), [torch.zeros(11, 7)]) == 11 * 7 * 5


@pytest.mark.parametrize("submanifold", [True, False])
def test_sparse_convolution_against_loops(submanifold):
    shape, rng = (4, 5, 6), np.random.default_rng(0)
    sites = [s for s in itertools.product(*map(range, shape)) if rng.random() < 0.3]
    layer = SubMConv3d(3, 7, 3) if submanifold else SparseConv3d(3, 7, 3, 2, 1)
    outputs = sites if submanifold else itertools.product(range(2), range(3), range(3))
    stride, pairs = (1 if submanifold else 2), 0
    for out in outputs:
        for tap in itertools.product(range(3), repeat=3):
            pairs += tuple(stride * o + t - 1 for o, t in zip(out, tap, strict=True)) in sites
    coords = torch.tensor([(0, *s) for s in sites])
    x = SparseTensor(torch.zeros(len(sites), 3), coords, shape, 1)
    assert pairs > len(sites) and count_macs(Toy(layer), [x]) == pairs * 3 * 7


@pytest.mark.parametrize(("max_points", "rows"), [(0, 5), (4, 3 * 4), (2, 3 * 2)])
def test_pillar_layers_cost_their_rows(max_points, rows):
    """Five points in three pillars: five rows, or three tables of `max_points` rows."""
    cfg = replace(preset("cp-pillar-cpu"), max_points=max_points)
    xy = [(0.1, 0.1), (0.2, 0.3), (0.3, 0.3), (10.1, 0.1), (20.1, -8.1)]
    points = np.array([(x, y, -1.0, 0.5) for x, y in xy], np.float32)
    some, none = (collate([Frame("f", p, np.zeros((0, 7), np.float32), ())], cfg) for p in (points, points[:0]))
    model = build(cfg)
    # 10 = x, y, z, intensity + 6 offsets; the first of two layers makes 16 channels, the pillar's maximum joins them
    assert count_macs(model, some) - count_macs(model, none) == rows * (10 * 16 + 32 * 32)


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
    assert model.training and not any(m._forward_hooks for m in model.modules())


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


# ------------------------------------------------------------------ published models, at full size but without memory


def on_meta(name, data, **changes):
    with torch.device("meta"):
        return Detector(replace(preset(name, data), **changes))


@pytest.mark.parametrize(("name", "data", "changes", "total"), [
    ("second", "kitti", {}, 5_325_576),
    ("second-s", "kitti", {}, 1_601_960),
    ("second-xs", "kitti", {}, 1_342_824),
    ("pointpillars", "kitti", {}, 4_834_888),
    ("pointpillars-s", "kitti", {"width": (1.0, 0.5, 0.5)}, 1_226_952),
    ("cp-voxel", "nuscenes", {}, 8_941_590),
    ("cp-voxel-s", "nuscenes", {}, 4_343_926),
    ("cp-voxel-xs", "nuscenes", {}, 3_128_946),
    ("cp-voxel-xxs", "nuscenes", {}, 1_094_110),
    ("cp-pillar-v0.2", "nuscenes", {}, 5_989_030),
])  # fmt: skip
def test_parameters_are_the_reference_framework_s(name, data, changes, total):
    assert count_parameters(on_meta(name, data, **changes)) == total


def dense_macs(model, cells):
    """Backbone and head on a bird's-eye view of so many cells."""
    x = torch.empty(1, model.encoder.out_channels, *cells, device="meta")
    return count_macs(Toy(nn.Sequential(model.backbone, model.head)), [x])


def test_second_s_dense_layers():
    """69.6 G, counted by hand elsewhere; 76.6 when a transposed convolution counts k^2 times."""
    macs = dense_macs(on_meta("second", "kitti"), (200, 176))
    assert macs / 1e9 == pytest.approx(69.6, abs=0.05)
    again = 3 * 100 * 88 * 256 * 256 * 4  # k = 2 counted four times instead of once
    assert (macs + again) / 1e9 == pytest.approx(76.6, abs=0.1)


@pytest.mark.parametrize(("name", "giga"), [
    ("cp-voxel", 85.8), ("cp-voxel-s", 24.1), ("cp-voxel-xs", 22.8), ("cp-voxel-xxs", 6.05)])  # fmt: skip
def test_dense_layers_of_sparsekd_s_waymo_voxel_models(name, giga):
    """One head, three classes, 188 x 188 cells: KITTI's preset has that network."""
    assert dense_macs(on_meta(name, "kitti"), (188, 188)) / 1e9 == pytest.approx(giga, rel=0.005)


@pytest.mark.parametrize(("cells", "giga"), [(464, 220.1), (368, 138.4), (312, 99.5), (232, 55.0)])
def test_dense_layers_of_sparsekd_s_waymo_pillar_models(cells, giga):
    three = {"classes": ("Vehicle", "Pedestrian", "Cyclist"), "tasks": ((),), "velocity": False, "paste": (0, 0, 0),
             "code_weights": (1.0,) * 8}  # fmt: skip
    assert dense_macs(on_meta("cp-pillar", "nuscenes", **three), (cells, cells)) / 1e9 == pytest.approx(giga, rel=0.005)


def test_parameter_counts_of_the_gap():
    teacher, student = (count_parameters(build(preset(n))) for n in ("cp-voxel-cpu", "cp-voxel-xxs-cpu"))
    assert teacher > 7 * student


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize(("inplace", "peak"), [(False, 3200 + 3200), (True, 3200 + 64)])
def test_peak_of_a_toy_network(inplace, peak):
    """(8, 4) -> (8, 100) -> ReLU -> (8, 2) in float32: 3200, 3200 and 64 bytes, of which two live at a time."""
    toy = nn.Sequential(nn.Linear(4, 100, bias=False), nn.ReLU(inplace), nn.Linear(100, 2, bias=False))
    x = torch.zeros(8, 4)
    milliseconds, found = time_and_memory(lambda: toy(x), CPU)
    assert found == peak and milliseconds > 0


def test_views_inputs_and_freed_tensors_do_not_count():
    x = torch.zeros(10, 10)
    with LiveBytes() as live:
        y = x.t()[2:].add_(1)  # a view of the input, changed in place
        assert live.peak == 0
        y = x + 1
        z = y.view(100)[::2]
        assert live.now == live.peak == 400
        del y
        assert live.now == 400  # z holds it
        del z
        assert live.now == 0
        parts = torch.cat([x, x]).split(4)
    assert live.peak == live.now == 800
    del parts
    assert live.now == 0


def test_what_one_operation_returns_twice_counts_once():
    with LiveBytes() as live:
        low, high = torch.aminmax(torch.zeros(0, 5, 3) + 1, dim=1)  # two results, nothing in them
        values, order = torch.zeros(6).sort()
    assert live.peak == 6 * 4 + 6 * 4 + 6 * 8 and live.now == 6 * 4 + 6 * 8
    assert len(low) == len(high) == 0 and len(values) == len(order)


def test_the_buffer_that_sparse_layers_keep_is_counted_and_is_this_model_s():
    shape, coords = (3, 3, 3), torch.tensor([(0, *s) for s in itertools.product(range(3), repeat=3)])
    layer, wide = SubMConv3d(2, 2, 3), SubMConv3d(2, 64, 3)
    features = torch.zeros(27, 2)

    def run(layer):
        return layer(SparseTensor(features, coords, shape, 1))

    alone = time_and_memory(lambda: run(layer), CPU)[1]
    run(wide)  # leaves a large buffer behind
    assert time_and_memory(lambda: run(layer), CPU)[1] == alone
    pairs = 7**3 - 27  # each axis: 3 sites with 2, 3 and 2 neighbours; the centre tap has no pairs
    assert alone > pairs * 2 * 4


def test_a_detector_s_memory_grows_with_its_width():
    batch = collate(tiny_frames(1), tiny_config())
    peaks = []
    for width in ((0.5, 0.25, 0.25), (1.0, 1.0, 1.0)):
        model = build(tiny_config(width=width)).eval()
        peaks.append(time_and_memory(lambda model=model: model(model.prepare(batch)), CPU)[1])
        again = time_and_memory(lambda model=model: model(model.prepare(batch)), CPU)[1]
        assert again == peaks[-1]
    assert peaks[0] < peaks[1]


# ------------------------------------------------------------------ frames


def test_simulated_frames():
    camera, circle = simulated_cloud(4, True), simulated_cloud(5, False)
    assert camera.dtype == circle.dtype == np.float32
    assert camera.shape[1] == 4 and 15_000 < len(camera) < 25_000 and (camera[:, 0] > 0).all()
    assert circle.shape[1] == 5 and len(circle) > 4 * len(camera) and (circle[:, 4] == 0).all()


def test_real_clouds_are_read_and_what_is_not_finite_goes(tmp_path):
    points = np.arange(24, dtype=np.float32).reshape(4, 6)
    points[1, 2], points[2, 5] = np.nan, np.inf
    np.save(tmp_path / "a.npy", points)
    np.testing.assert_array_equal(read_cloud(tmp_path / "a.npy", 6), points[[0, 3]])
    np.testing.assert_array_equal(read_cloud(tmp_path / "a.npy", 4), points[[0, 2, 3], :4])
    points[:, :4].astype("<f4").tofile(tmp_path / "a.bin")
    np.testing.assert_array_equal(read_cloud(tmp_path / "a.bin", 4), points[[0, 2, 3], :4])
    np.save(tmp_path / "half.npy", points.astype(np.float16))
    assert read_cloud(tmp_path / "half.npy", 5).dtype == np.float32


def test_bad_clouds(tmp_path):
    np.save(tmp_path / "narrow.npy", np.zeros((5, 3), np.float32))
    np.save(tmp_path / "flat.npy", np.zeros(12, np.float32))
    np.save(tmp_path / "deep.npy", np.zeros((2, 4, 3), np.float32))
    np.save(tmp_path / "words.npy", np.array([["a"] * 4]))
    np.save(tmp_path / "nan.npy", np.full((3, 4), np.nan))
    np.save(tmp_path / "objects.npy", np.array([None, 1], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "zip.npy.npz", a=np.zeros((5, 4)))
    (tmp_path / "zip.npy.npz").rename(tmp_path / "zip.npy")
    for name, size in (("odd.bin", 30), ("bytes.bin", 33), ("empty.bin", 0), ("empty.npy", 0), ("text.npy", 40)):
        (tmp_path / name).write_bytes(b"7" * size)
    (tmp_path / "folder.bin").mkdir()
    for path in [*tmp_path.iterdir(), tmp_path / "missing.bin", tmp_path / "missing.npy"]:
        with pytest.raises(InputError, match=f"{path.name}: expected points of 4 float32.*found") as error:
            read_cloud(path, 4)
        assert "\n" not in str(error.value)


# ------------------------------------------------------------------ the command


def test_the_command_prints_the_table_and_writes_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sheet, "REPEATS", 1)
    readme, out, before = tmp_path / "README.md", tmp_path / "sheet.json", "# x\n<!-- table demo -->\n1\n<!-- end -->\n"
    readme.write_text(before + "<!-- table sheet -->\nold \\1\n<!-- end -->\nafter\n")
    threads = torch.get_num_threads()
    sheet.main(["--presets", PAIR, "--json", str(out), "--readme", str(readme), "--threads", str(threads)])
    printed = capsys.readouterr().out
    assert readme.read_text() == before + f"<!-- table sheet -->\n{printed}<!-- end -->\nafter\n"
    head, align, *rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")]
    assert head[:3] == ["model", "data", "parameters"] and set(align[2:10]) == {"--:"}
    assert [row[0] for row in rows] == ["`cp-voxel-cpu`", "`cp-voxel-xxs-cpu`"]
    assert rows[0][2] == "721,995" and rows[1][2:4] == ["90,387", "0.13"] and rows[0][8:10] == ["—", "—"]
    last = printed.splitlines()[-1]
    assert f"python detector.py sheet --presets {PAIR}" in last and f"{threads} thread" in last
    assert all(word in last for word in ("64 beams", "points (kitti)", "cores"))
    record = json.loads(out.read_text())
    assert printed == sheet.markdown(record) + "\n"
    teacher, student = record["rows"]
    assert teacher["parameters"] == 721_995 and student["macs_of_teacher"] == student["macs"] / teacher["macs"] < 0.2
    assert all(row["memory_bytes"] > 1e6 and row["latency_ms"] > 0 for row in record["rows"])
    sheet.main(["--presets", PAIR, "--no-latency", "--readme", str(readme)])  # the second time replaces the first
    assert readme.read_text() == before + f"<!-- table sheet -->\n{capsys.readouterr().out}<!-- end -->\nafter\n"


def test_real_points_and_no_timing(tmp_path, capsys):
    frame = tiny_frames(1)[0]
    frame.points.astype("<f4").tofile(tmp_path / "scan.bin")
    sheet.main(["--presets", "cp-voxel-xxs-cpu", "--points", str(tmp_path / "scan.bin"), "--no-latency"])
    printed = capsys.readouterr().out
    cfg = preset("cp-voxel-xxs-cpu")
    row = printed.splitlines()[2].strip("| ").split(" | ")
    assert row[4] == f"{count_macs(build(cfg), collate([frame], cfg)) / 1e9:,.2f}"
    assert row[3] == row[5] == row[6] == row[7] == "—"  # no teacher, no timing
    assert f"scan.bin: {len(frame.points)} points" in printed and "beams" not in printed


def test_the_paper_s_models_exist_and_the_notes_are_used(monkeypatch, capsys):
    """Every default row, with the measuring left out: presets, data sets, ratios and notes."""
    seen = []

    def fake(cfg, points, timed):
        seen.append((cfg.preset, cfg.data))
        data = cfg.data if cfg.data in sheet.PAPER else "kitti"
        paper = dict(zip(("paper_f", "paper_p", "notes"), sheet.PAPER[data][cfg.preset], strict=True))
        return {"preset": cfg.preset, "data": data, "points": len(points), "parameters": 2 + 2 * (len(seen) == 1),
                "macs": 10**9, **paper}  # fmt: skip

    monkeypatch.setattr(sheet, "measure", fake)
    monkeypatch.setattr(sheet, "simulated_cloud", lambda features, fov_only: np.zeros((7 if fov_only else 9, features)))
    sheet.main([])
    printed = capsys.readouterr().out
    assert len(seen) == len(set(seen)) == 16 and sum(data == "nuscenes" for _, data in seen) == 9
    assert "7 points (kitti)" in printed and "9 points (nuscenes)" in printed
    assert all(f"- {note}: {text}" in printed for note, text in sheet.NOTES.items())
    cells = [line.strip("| ").split(" | ") for line in printed.splitlines()[2:18]]
    rows = {(row[0], row[1]): row for row in cells}
    assert rows["`second-xs`", "kitti"][8:] == ["1.4", "—", "e"]  # the paper prints no #F
    assert rows["`cp-voxel-s`", "nuscenes"][3] == "0.50" and rows["`pointpillars-xs`", "kitti"][3] == "1.00"
    assert rows["`cp-pillar-v0.64`", "nuscenes"][8:] == ["5.2", "85.1", "b"]


@pytest.mark.parametrize(("arguments", "hint"), [
    (["--presets", "cp-voxel-cpo"], r"unknown preset 'cp-voxel-cpo' \(did you mean cp-voxel-cpu\?\)"),
    (["--presets", "second-cpu", "--points", "none.bin"], "none.bin: expected points of 4 float32.*no such file"),
    (["--preset", "second"], "unknown option --preset.*--presets"),
    (["--threads", "0"], "--threads from 1 on"),
    (["--json", "no/such/folder/a.json"], "folder for --json"),
    (["--readme", "none.md"], "none.md: expected a file with the lines <!-- table sheet -->"),
    (["--readme", "plain.md"], "plain.md: expected a file with the lines <!-- table sheet -->"),
])  # fmt: skip
def test_bad_arguments_are_one_line_before_any_work(arguments, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("plain.md").write_text("<!-- table demo -->\n<!-- end -->\n")
    monkeypatch.setattr(sheet, "measure", lambda *_: pytest.fail("worked first"))
    with pytest.raises(InputError, match=hint) as error:
        sheet.main(arguments)
    assert "\n" not in str(error.value)


def test_from_the_shell():
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "detector.py", "sheet", "--presets", "secnd"]
    answer = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600, check=False)
    assert answer.returncode == 2 and answer.stdout == ""
    assert answer.stderr == "error: unknown preset 'secnd' (did you mean second?)\n"
