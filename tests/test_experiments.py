"""experiments.py: a suite is all of its runs, each once, whatever stopped it and however many work at it."""

import gc
import json
import re
import sys
import weakref
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import evaluate
import experiments
from cli import InputError
from config import Config, override, to_json
from evaluate import headline, resampled
from experiments import check_same_runs, claim, jobs, read_records, run_suite
from fair import equal_epochs, longer_variant
from presets import PRESETS
from rows import record_name
from suites import BEYOND, METHODS, SCENES, SUITES, TUNED, TUNING, TUNING_ANCHOR, Suite
from tests.scenes import tiny_config
from tests.test_train import root  # noqa: F401 (a fixture)
from train import check_pair

TINY = {"fov_only": False, "paste": (0, 0, 0), "epochs": 2, "eval_every": 1}
VARIANTS = {"none": {"method": "none"}, "rdd": {"method": "rdd"}}


@pytest.fixture()
def suite(monkeypatch):
    monkeypatch.setitem(PRESETS, "big", lambda data: tiny_config(preset="big", data="kitti"))
    monkeypatch.setitem(PRESETS, "small", lambda data: tiny_config(preset="small", data="kitti", width=(0.5, 0.5, 0.5)))
    suite = Suite("kitti", (("big", "small"),), VARIANTS, {"": 2, "rdd": 1}, TINY)
    monkeypatch.setitem(experiments.SUITES, "trial", suite)
    return suite


def given(tmp_path, **changes):
    chosen = {"variants": list(VARIANTS), "students": ["small"], "seeds": None, "from_seed": 0, "remember": False,
              "workers": 0}
    return Namespace(**{**chosen, "runs": tmp_path / "runs", "results": tmp_path / "results", **changes})


@pytest.mark.parametrize("name", [name for name in SUITES if name != "trial"])
def test_every_suite_can_be_built(name):
    suite = SUITES[name]
    every = jobs(suite, "", list(suite.variants), None, {})
    for job in every:
        assert job.cfg.layout == ("nuscenes" if "nuscenes" in suite.data else "kitti") and job.cfg.data == suite.data
        if job.needs:
            (teacher,) = [other for other in every if other.name == job.needs]
            check_pair(teacher.cfg, job.cfg)
    for other in SUITES.values():  # runs of one name are one run
        if (other.folder or "") == name:
            shared = {job.name: job.cfg for job in jobs(other, "", list(other.variants), None, {})}
            assert all(shared[job.name] == job.cfg for job in every if job.name in shared)


def test_one_teacher_a_seed_and_the_same_student_for_every_variant(suite):
    every = {job.name: job for job in jobs(suite, "somewhere", list(VARIANTS), None, {})}
    assert list(every) == ["big-seed0", "small-none-seed0", "small-rdd-seed0", "big-seed1", "small-none-seed1"]
    alone, rdd = every["small-none-seed0"].cfg, every["small-rdd-seed0"].cfg
    assert replace(rdd, method="none") == alone and alone.root == "somewhere" and alone.epochs == 2
    assert every["small-rdd-seed0"].needs == "big-seed0" and not every["small-none-seed0"].needs
    assert len(jobs(suite, "", ["none"], 3, {})) == 6, "--seeds and --variants narrow or widen a suite"


def test_tuning_gives_every_method_the_same_budget_on_other_seeds_and_scenes():
    suite = SUITES["tuning"]
    budget = {}
    for job in jobs(suite, "", list(suite.variants), None, {}):
        budget[job.cfg.method] = budget.get(job.cfg.method, 0) + (job.variant not in ("teacher", "none"))
    assert budget.pop("none") == 0 and set(budget) == set(METHODS)
    assert budget == {method: 3 + len(BEYOND.get(method, ())) for method in METHODS}
    tried = [what["method"] for what in TUNING_ANCHOR.values()]
    assert {method: tried.count(method) for method in METHODS} == {**dict.fromkeys(METHODS, 3), "fg": 4, "rdd": 4}
    seeds = {name: {job.cfg.seed for job in jobs(SUITES[name], "", list(SUITES[name].variants), None, {})} for name in SUITES}
    for name, other in SUITES.items():
        apart = "seed" in SCENES.get(other.scenes, {})
        assert apart == (name in ("tuning", "tuning-kitti", "diagnosis", "diagnosis-kitti")), "scenes of no table"
        assert name in ("tuning", "tuning-kitti") or max(seeds[name]) < min(seeds["tuning"]), "a seed of its own"
        assert not apart or min(seeds[name]) >= 100 > max(seeds["sim-nuscenes"])
    for layout in ("nuscenes", "kitti"):  # a frame is a function of its set's seed, its split and its number
        made = [scenes.get("seed", 0) for name, scenes in SCENES.items() if layout in name]
        assert len(set(made)) == len(made) == 2


def test_tuned_rows_are_what_won_the_tuning_where_that_is_not_the_published_weight():
    suite, won = SUITES["tuning"], {}
    records = read_records(Path(__file__).parent.parent / "results" / "tuning")
    for method in METHODS:
        tried = [name for name in TUNING if TUNING[name]["method"] == method]
        names = {name: record_name("cp-voxel-xxs-cpu", name, suite.first_seed) for name in tried}
        scores = {name: records[names[name]]["scores"][-1]["map"] for name in tried if names[name] in records}
        if set(tried[:3]) <= set(scores):
            best = max(scores, key=scores.get)
            if override(Config(), TUNING[best]) != override(Config(), {"method": method}):
                won[best] = TUNING[best]
        for k in range(3, len(tried) + 1):  # ten times as much where the strongest so far won, and nowhere else
            if method != "lad" and set(tried[:k]) <= set(scores):
                strongest_won = max(tried[:k], key=scores.get) == tried[k - 1]
                assert strongest_won == (k < len(tried)), f"BEYOND, {method}: {scores}"
    assert won == TUNED


@pytest.mark.parametrize("name", SUITES)
def test_committed_records_are_runs_that_the_suite_still_means(name):
    suite = SUITES[name]
    folder = Path(__file__).parent.parent / "results" / (suite.folder or name)
    records = read_records(folder)
    every = jobs(suite, "", list(suite.variants), 9, records)
    check_same_runs(every, records, folder)
    known = {job.name for other in SUITES for job in jobs(SUITES[other], "", list(SUITES[other].variants), 9, records)
             if (SUITES[other].folder or other) == folder.name}  # fmt: skip
    assert set(records) <= known, "a record of no suite"


@pytest.mark.parametrize("path", sorted((Path(__file__).parent.parent / "results").glob("*/*.pt")), ids=lambda path: path.stem)
def test_committed_teachers_are_those_of_their_records(path):
    from runs import fingerprint
    from weights import load_detector

    detector, content = load_detector(path)
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["variant"] == "teacher" and fingerprint(detector) == record["weights"]
    assert content["config"] == record["config"] and content["step"] == record["steps"]


def test_equal_time_runs_come_with_the_records_they_equal(suite):
    last = jobs(suite, "", list(VARIANTS), None, {"small-rdd-seed0": {"price": 2.6}})[3]
    assert (last.name, last.cfg.epochs, last.cfg.method) == ("small-none-5epochs-seed0", 5, "none")


def test_a_variant_at_the_default_s_share_comes_with_the_records_that_say_what_shares_are(suite):
    parts = {"rdd": {"method": "rdd"}, "mean": {"method": "rdd", "p_cls": "mean", "alpha1": 0.4}}
    suite = replace(suite, variants=VARIANTS | parts, equal_time=False, equal_share=True, seeds={"": 1})
    records = {"small-rdd-seed0": {"variant": "rdd", "shares": {"feat": 0.7, "logit": 0.7}},
               "small-rdd-seed3": {"variant": "rdd", "shares": {"feat": 0.3, "logit": 0.1}},
               "small-none-seed3": {"variant": "none", "shares": {}},
               "small-mean-seed3": {"variant": "mean", "shares": {"feat": 0.6, "logit": 0.004}},
               "small-mean-seed4": {"variant": "mean", "shares": {"feat": 0.1, "logit": 0.1}}}  # fmt: skip
    for name, record in records.items():
        record["seed"] = int(name[-1])
    names = ["none", "rdd", "mean"]
    before, after = ({job.name: job for job in jobs(suite, "", names, None, known)} for known in ({}, records))
    (new,) = set(after) - set(before)
    assert new == "small-mean-equal-share-seed0" and after[new].variant == "mean, equal share" and after[new].needs == "big-seed0"
    assert after[new].cfg == replace(before["small-mean-seed0"].cfg, alpha1=0.2, alpha2=5.0), "half of .4, 25 times .2"
    ran = {"variant": "mean, equal share", "seed": 3, "config": to_json(after[new].cfg)}
    lower = {"variant": "mean", "seed": 0, "shares": {"feat": 0.1, "logit": 0.1}}
    every = {**records, "small-mean-equal-share-seed3": ran, "small-mean-seed0": lower}
    again = {job.name: job for job in jobs(suite, "", names, None, every)}[new]
    assert again.cfg == after[new].cfg, "a row keeps its alphas, whatever is measured later"


def test_a_suite_runs_to_its_end_once_and_goes_on_after_a_kill(suite, root, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(evaluate, "resampled", partial(resampled, draws=5))
    real, calls = experiments.run_once, []

    def killed_at_the_third(name, job, *folders):
        calls.append(job.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(name, job, *folders)

    monkeypatch.setattr(experiments, "run_once", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_suite("trial", given(tmp_path), str(root))
    done = {path: path.read_bytes() for path in (tmp_path / "results").glob("*.json")}
    assert len(done) == 2
    run_suite("trial", given(tmp_path), str(root))
    records = read_records(tmp_path / "results")
    assert len({records[name]["teacher_weights"] for name in records if "rdd" in name} | {records["big-seed0"]["weights"]}) == 1
    assert calls.count(calls[2]) == 2 and len(set(calls)) == len(calls) - 1, "only the killed one was done twice"
    assert all(path.read_bytes() == before for path, before in done.items())
    longer = record_name("small", longer_variant(equal_epochs(2, records["small-rdd-seed0"]["price"])), 0)
    assert records["small-none-seed0"]["price"] is None
    assert set(records) == {"big-seed0", "big-seed1", "small-none-seed0", "small-none-seed1", "small-rdd-seed0", longer}
    record = records["small-rdd-seed0"]
    assert record["method"] == "rdd" and record["steps"] == 4 and len(record["scores"]) == 2
    assert record["shares"].keys() == {"feat", "logit"} and not records["small-none-seed0"]["shares"]
    log = map(json.loads, (tmp_path / "runs" / "small-rdd-seed0" / "metrics.jsonl").read_text().splitlines())
    norms = [line["grad_norm"] for line in log if line["kind"] == "train"]
    assert norms and record["clipped"] == np.mean(np.array(norms) > record["config"]["clip"])
    assert record["config"]["seed"] == 0 and len(record["resampled"]["moderate_map_3d"]) == 5
    run_suite("trial", given(tmp_path, runs=tmp_path / "elsewhere"), str(root))
    assert not (tmp_path / "elsewhere").exists(), "what has a record is not trained again, though its checkpoints are gone"
    teacher = tmp_path / "results" / "big-seed0.pt"
    for weights, expected in ((True, {"small-rdd-seed0"}), (False, {"small-rdd-seed0", "big-seed0"})):
        if not weights:  # the teacher's record alone does not teach: it is trained again, and is the same
            teacher.unlink()
        (tmp_path / "results" / "small-rdd-seed0.json").unlink()
        folder = tmp_path / f"elsewhere-{weights}"
        run_suite("trial", given(tmp_path, runs=folder), str(root))
        assert {path.name for path in folder.iterdir() if path.is_dir() and "epochs" not in path.name} == expected
        assert read_records(tmp_path / "results")["small-rdd-seed0"]["teacher_weights"] == record["teacher_weights"]
    assert teacher.is_file()
    (tmp_path / "results" / "small-none-seed1.json").unlink()
    run_suite("trial", given(tmp_path, variants=["none"]), str(root))  # its checkpoint is here: only the record is made again
    again = read_records(tmp_path / "results")
    assert again["small-none-seed1"]["last"] == records["small-none-seed1"]["last"]
    assert again["big-seed0"] == records["big-seed0"] and again["small-rdd-seed0"]["last"] == record["last"]


def test_a_record_has_the_last_evaluation_and_the_best(suite, root, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(evaluate, "resampled", partial(resampled, draws=5))
    monkeypatch.setitem(experiments.SUITES, "trial", replace(suite, changes={**TINY, "epochs": 3}))
    scores = iter([1.0, 3.0, 2.0] * 2)  # of the teacher, of the student alone
    monkeypatch.setattr("runs.evaluate_detector", lambda *_, **__: {"says": next(scores)})
    monkeypatch.setattr("runs.headline", lambda result: {"moderate_map_3d": result["says"]})
    run_suite("trial", given(tmp_path, variants=["none"], seeds=1), str(root))
    records = read_records(tmp_path / "results")
    assert len(records) == 2 and all(r["last"] == {"says": 2.0} and r["best"] == {"says": 3.0} for r in records.values())


def test_a_run_that_fails_leaves_the_others_their_turn(suite, root, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(evaluate, "resampled", partial(resampled, draws=5))
    real = experiments.run_once

    def without_rdd(name, job, *folders):
        if job.cfg.method == "rdd":
            raise InputError("step 3: loss term 'feat' is nan")
        real(name, job, *folders)

    monkeypatch.setattr(experiments, "run_once", without_rdd)
    with pytest.raises(InputError, match="small-rdd-seed0: step 3: loss term 'feat' is nan"):
        run_suite("trial", given(tmp_path), str(root))
    assert set(read_records(tmp_path / "results")) == {"big-seed0", "big-seed1", "small-none-seed0", "small-none-seed1"}


def test_a_run_that_failed_is_let_go(suite, root, tmp_path, monkeypatch):  # noqa: F811
    """An error's traceback holds the frames it came through, with model and optimiser; the suite goes on without them."""
    alive = []

    class Model:
        pass

    def fails(name, job, *folders):
        gc.collect()
        assert not [model for model in alive if model() is not None]
        model = Model()
        alive.append(weakref.ref(model))
        raise InputError("step 3: loss term 'feat' is nan")

    monkeypatch.setattr(experiments, "run_once", fails)
    with pytest.raises(InputError, match="big-seed1: step 3"):
        run_suite("trial", given(tmp_path), str(root))
    assert len(alive) == 4  # both teachers, both students alone; the others' teachers are missing


def test_a_record_of_other_settings_or_of_another_teacher_is_not_mixed_in(suite, root, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(evaluate, "resampled", partial(resampled, draws=5))
    run_suite("trial", given(tmp_path, variants=["none"], seeds=1), str(root))
    teacher = tmp_path / "results" / "big-seed0.json"
    record = json.loads(teacher.read_text())
    teacher.write_text(json.dumps(record | {"weights": "those of another"}))
    with pytest.raises(InputError, match="expected the teacher of .*big-seed0.json, found other weights"):
        run_suite("trial", given(tmp_path, variants=["rdd"], seeds=1), str(root))
    monkeypatch.setitem(experiments.SUITES, "trial", replace(suite, changes={**TINY, "epochs": 3}))
    with pytest.raises(InputError, match="seed0.json: a run with epochs = 2, the suite has now 3; move"):
        run_suite("trial", given(tmp_path, variants=["none"], seeds=1), str(root))
    monkeypatch.setitem(experiments.SUITES, "trial", replace(suite, changes={**TINY, "eval_every": 2}))  # the same training
    monkeypatch.setattr(experiments, "run_once", lambda *_: pytest.fail("nothing is left to run"))
    run_suite("trial", given(tmp_path, variants=["none"], seeds=1), str(root))


def test_a_record_of_other_data_is_not_mixed_in(suite, root, tmp_path, monkeypatch):  # noqa: F811
    """A simulated root says with which settings and version it was made; whoever simulates it anew may get other scenes."""
    monkeypatch.setattr(evaluate, "resampled", partial(resampled, draws=5))
    one = given(tmp_path, variants=["none"], seeds=1)
    (root / "simulation.json").write_text(json.dumps({"version": 1, "train": 4}, indent=2) + "\n")
    run_suite("trial", one, str(root))
    records = read_records(tmp_path / "results")
    assert {record["data"] for record in records.values()} == {'{ "version": 1, "train": 4 }'}
    monkeypatch.setattr(experiments, "run_once", lambda *_: pytest.fail("nothing is left to run"))
    run_suite("trial", one, str(root))
    (root / "simulation.json").write_text(json.dumps({"version": 2, "train": 4}))
    with pytest.raises(InputError, match=r'a run on { "version": 1, "train": 4 }, in .*kitti there is {"version": 2, '):
        run_suite("trial", one, str(root))
    for path in (tmp_path / "results").glob("*.json"):  # of a time when records did not know
        path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "data"}))
    run_suite("trial", one, str(root))
    for path in (tmp_path / "results").glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"data": ""}))
    with pytest.raises(InputError, match="seed0.json: a run on data not simulated, in "):
        run_suite("trial", one, str(root))


def test_pictures_of_runs_that_are_not_here_are_one_line(suite, tmp_path, capsys):
    experiments.pictures(suite, tmp_path, tmp_path, tmp_path / "figures", timed=True)
    assert capsys.readouterr().out.startswith(f"no pictures: {tmp_path}/big-seed0.pt is not there")
    assert not (tmp_path / "figures").exists()


def test_a_claim_is_for_one_and_ends_with_its_block(tmp_path):
    with claim(tmp_path / "deep" / "job.lock") as first:
        with claim(tmp_path / "deep" / "job.lock") as second:
            assert first and not second
    with claim(tmp_path / "deep" / "job.lock") as third:
        assert third


def test_a_broken_record_is_named(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"seconds": 3}))
    with pytest.raises(InputError, match=r"x.json: expected the record of a run, found KeyError\('variant'\)"):
        read_records(tmp_path)
    assert read_records(tmp_path / "nowhere") == {}


def test_resampled_scores_are_those_of_the_drawn_frames(root):  # noqa: F811
    from data.batch import open_data
    from data.kitti import objects_from_boxes
    from metrics import kitti

    cfg = tiny_config(data="kitti", root=str(root), fov_only=False)
    data, found, objects = open_data(cfg, "val"), {}, []
    for i, id in enumerate(data.ids):  # found are: all, all but too high (a hit from above only), nothing, the first
        n, frame = (2, 2, 0, 1)[i], data[i]
        boxes = frame.boxes[:n] + [0, 0, i == 1, 0, 0, 0, 0]
        found[id] = boxes, np.full(n, 0.9), frame.names[:n]
        objects.append(objects_from_boxes(boxes, frame.names[:n], np.full(n, 0.9), data.calibration(i), (1242, 375)))
    rng, expected = np.random.default_rng(0), {"moderate_map_3d": [], "moderate_map_bev": []}
    for _ in range(12):
        drawn = rng.integers(4, size=4)
        score = kitti.evaluate([data.objects(k) for k in drawn], [objects[k] for k in drawn], cfg.classes)
        for name, value in headline(score).items():
            expected[name].append(value)
    assert all(len(set(values)) > 3 for values in expected.values()) and len(set(map(tuple, expected.values()))) == 2
    assert resampled(data, found, cfg, draws=12) == {name: pytest.approx(values, abs=1e-3) for name, values in expected.items()}


@pytest.mark.parametrize(("option", "name", "meant"), [("--variants", "rdx", "rdd"), ("--students", "cp-voxel-xs-cpu", "xxs")])
def test_a_row_that_the_suite_has_not_is_named(monkeypatch, option, name, meant):
    monkeypatch.setattr("sys.argv", ["experiments.py", "demo", option, name])
    with pytest.raises(InputError, match=f"{option}: unknown '{name}'.*{meant}"):
        experiments.main()


def test_students_choose_among_the_pairs(suite, root, tmp_path):  # noqa: F811
    run_suite("trial", given(tmp_path, students=["another"]), str(root))
    assert not list(tmp_path.glob("r*")), "nothing of this suite is of that student"


def test_seeds_before_one_are_left_out(suite, root, tmp_path, monkeypatch):  # noqa: F811
    done = []

    def noted(name, job, runs, results, *rest):
        done.append(job.name)
        results.mkdir(exist_ok=True)
        record = {"variant": job.variant, "seed": job.cfg.seed, "seconds": 0, "config": to_json(job.cfg)}
        (results / f"{job.name}.json").write_text(json.dumps(record))

    monkeypatch.setattr(experiments, "run_once", noted)
    run_suite("trial", given(tmp_path, variants=["none"], seeds=3, from_seed=1), str(root))
    assert done == ["big-seed1", "small-none-seed1", "big-seed2", "small-none-seed2"]


def test_processes_side_by_side_share_the_cores_and_the_gpus(tmp_path, monkeypatch):
    class Child:
        def __init__(self, command, env, **_):
            said.append((command[-3:], env["CUDA_VISIBLE_DEVICES"]))
            assert env["OMP_NUM_THREADS"] == env["MKL_NUM_THREADS"] == "2"  # of 6, for each of 3

        def wait(self):
            return 0

    monkeypatch.setattr("subprocess.Popen", Child)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.get_num_threads", lambda: 6)
    for visible, expected in ((None, ["0", "1", "0"]), ("5,3", ["5", "3", "5"]), ("", ["", "", ""])):
        said = []
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        experiments.side_by_side(3, ["trial"], tmp_path)
        assert said == [(["--jobs", "1", "--no-pictures"], gpu) for gpu in expected]


def test_torchrun_is_not_for_suites(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["experiments.py", "demo"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="under torchrun: expected one process"):
        experiments.main()


def test_a_suite_of_real_data_asks_for_it(monkeypatch, tmp_path):
    """Presets are the simulated set's by default: a suite's data set must win."""
    monkeypatch.setattr("sys.argv", ["experiments.py", "kitti", "--root", "/nowhere/kitti"])
    asked = []
    monkeypatch.setattr("data.batch.prepare_data", lambda cfg, workers: asked.append((cfg.data, cfg.root)) or cfg)
    monkeypatch.setattr(experiments, "run_suite", lambda *args: None)
    monkeypatch.setattr("sys.argv", [*sys.argv, "--no-pictures"])
    monkeypatch.chdir(tmp_path)
    experiments.main()
    assert asked == [("kitti", "/nowhere/kitti")]


@pytest.mark.parametrize(("name", "scenes"), [("sim-nuscenes", "sim-nuscenes-many"), ("tuning", "sim-nuscenes-tuning"),
                                              ("sim-kitti", "sim-kitti-many"), ("demo", "")])  # fmt: skip
def test_a_suite_s_own_scenes_are_made_first_and_used(monkeypatch, tmp_path, name, scenes):
    import inspect

    from data import simulate_kitti, simulate_nuscenes

    made, used = [], []
    for module, word in ((simulate_kitti, "simulate_kitti"), (simulate_nuscenes, "simulate_nuscenes")):
        bind = inspect.signature(getattr(module, word)).bind  # raises for settings that the simulator has not
        monkeypatch.setattr(module, word, lambda *args, bind=bind, **settings: made.append(bind(*args, **settings).args[0]))
    monkeypatch.setattr("data.batch.prepare_data", lambda cfg, workers: used.append(cfg.root) or cfg)
    monkeypatch.setattr(experiments, "run_suite", lambda *args: None)
    monkeypatch.setattr("sys.argv", ["experiments.py", name, "--no-pictures"])
    monkeypatch.chdir(tmp_path)
    experiments.main()
    expected = [f"datasets/{scenes}"] if scenes else []
    assert made == expected and used == (expected or [""])


def test_a_folder_that_cannot_be_made_is_named_before_the_work(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr("sys.argv", ["experiments.py", "demo", "--runs", str(tmp_path / "file")])
    with pytest.raises(InputError, match="file: expected a folder to write in"):
        experiments.main()


def test_the_page_counts_every_suite_s_runs():
    page = (Path(__file__).parent.parent / "docs" / "experiments.md").read_text(encoding="utf-8")
    counted = {}
    for names, runs in re.findall(r"^\| (`[^|]*`) \| [^|]* \| ([\d, ]+) \|", page, re.MULTILINE):
        counted |= dict(zip(re.findall("`([^`]+)`", names), map(int, runs.split(", ")), strict=True))
    assert counted == {name: len(jobs(suite, "", list(suite.variants), None, {})) for name, suite in SUITES.items()}


def test_a_disk_without_locks_is_no_claim_of_another(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(OSError, match="No locks"), claim(tmp_path / "job.lock"):
        pass


def test_a_teacher_that_became_another_does_not_take_its_place(suite, root, tmp_path, monkeypatch):  # noqa: F811
    """On another kind of CPU the same run ends with other weights: the record's students need the record's."""
    monkeypatch.setattr(evaluate, "resampled", partial(resampled, draws=5))
    run_suite("trial", given(tmp_path, variants=["none"], seeds=1), str(root))
    record, weights = (tmp_path / "results" / f"big-seed0.{kind}" for kind in ("json", "pt"))
    record.write_text(json.dumps(json.loads(record.read_text()) | {"weights": "those of another"}))
    weights.unlink()
    with pytest.raises(InputError, match="big-seed0: .*the teacher trained here has other weights than that of the record"):
        run_suite("trial", given(tmp_path, variants=["rdd"], seeds=1, runs=tmp_path / "elsewhere"), str(root))
    assert not weights.is_file()


def test_pictures_ask_teacher_and_student_each_on_its_own_grid(suite, root, tmp_path, monkeypatch):  # noqa: F811
    import torch

    from data.batch import collate, open_data
    from rdd import RDD
    from weights import load_detector

    coarse = tiny_config(preset="small", data="kitti", voxel_size=(0.4, 0.4, 0.2))
    monkeypatch.setitem(PRESETS, "small", lambda data: coarse)
    monkeypatch.setattr(evaluate, "resampled", partial(resampled, draws=5))
    drawn = {}
    monkeypatch.setattr("plot.regions", lambda path, points, squares, side, d, *args, **words: drawn.update(squares=squares, d=d))
    suite = replace(suite, equal_time=False, seeds={"": 1})
    monkeypatch.setitem(experiments.SUITES, "trial", suite)
    run_suite("trial", given(tmp_path), str(root))
    experiments.pictures(suite, tmp_path / "runs", tmp_path / "results", tmp_path / "figures", timed=False)
    teacher, _ = load_detector(tmp_path / "results" / "big-seed0.pt")
    student, content = load_detector(tmp_path / "runs" / "small-rdd-seed0" / "last.pt")
    distil = RDD(student.cfg, student.backbone.out_channels, teacher.backbone.out_channels).eval()
    distil.load_state_dict(content["distil"])
    found = []
    for frame in open_data(student.cfg, "val"):
        batch = collate([frame], student.cfg)
        with torch.no_grad():
            found.append(distil.compare(student(student.prepare(batch)), teacher(teacher.prepare(batch))).d)
    assert len(drawn["d"]) and any(np.array_equal(d, drawn["d"]) for d in found)
