"""Train a LiDAR detector, and distil a compact student from it.   (reads after: baselines.py  next: evaluate.py)

    python train.py --teacher --student                 the main job: teacher, then a student distilled with RDD
    python train.py --student                           the same student without a teacher, to compare with
    python train.py --teacher                           the teacher alone
    python train.py --data kitti --root /data/kitti --teacher cp-voxel --student cp-voxel-s
    python train.py --teacher runs/NAME/last.pt --student cp-voxel-xxs-cpu --lr 0.002 --seed 1

--teacher and --student take a preset or a checkpoint; without a value, the data set's default pair. A teacher given by
preset is trained first, or taken from runs/ if it is there; a checkpoint's scenes are its student's too. Without data on
the disk the simulated set is made and used. A run is a folder, runs/NAME; the same command continues it where it stopped,
exactly (on a GPU: to rounding). Results: last.pt, best.pt, metrics.jsonl. Many processes: torchrun --nproc-per-node 8
train.py ... with the same meaning of every option. --workers 8 keeps a GPU from waiting for data.
"""

import math
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import ArgumentParser, InputError, did_you_mean, run_cli
from config import DISTIL, MODEL, READING, Config, add_options, from_json, override, show
from presets import DEFAULT_PAIR, PRESETS, READINGS, preset, reading, scenes_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from data.batch import Batch, TrainingFrames
    from detector import Detector

DEFAULT = "(default)"
SAVE_EVERY = 900  # seconds between checkpoints, if an epoch is longer


# ------------------------------------------------------------------ the loop


def train(cfg: Config, folder: Path, teacher: "Detector | None" = None, workers: int = 0,
          stop_after: int | None = None, data: "tuple[TrainingFrames, Any] | None" = None) -> "Detector":  # fmt: skip
    """Train one detector into `folder`, from where it stopped; with a teacher, distil by `cfg.method`.

    `stop_after` leaves the run unfinished at that step (it can be continued); `data`, what `open_run` made, saves opening it
    again. Returns the detector in eval mode.
    Raises InputError when a loss is not finite, naming the term and the frames.
    """
    import torch  # here, as every slow import, so that --help answers at once
    from tqdm import tqdm

    import parallel
    from data.batch import open_run, report_dropped, steps_per_epoch, training_batches
    from detector import build
    from rdd import gradient_norms, total_loss
    from runs import RunFolder

    rank, world, device = parallel.start()
    if cfg.batch_size % world:
        raise InputError(f"--batch-size {cfg.batch_size}: expected a multiple of the {world} processes")
    training, validation = data or open_run(cfg, folder.parent, workers)
    student = build(cfg).to(device)
    distil = start_distilling(cfg, student, teacher, device)
    parameters = list(student.parameters()) + (list(distil.parameters()) if distil else [])  # psi is trained along
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, weight_decay=cfg.weight_decay, betas=(0.95, 0.99))
    amp = parallel.autocast_dtype(cfg.amp, device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    run = RunFolder(folder, cfg, student, distil, optimizer, scaler, teacher)
    step = run.restore()
    if len(set(parallel.gather(step))) > 1:
        raise InputError(f"{folder}: the processes found different checkpoints; --runs: expected a disk that all of them see")
    per_epoch = steps_per_epoch(len(training), cfg.batch_size)
    last_step = per_epoch * cfg.epochs
    stop = min(last_step, stop_after or last_step)
    if run.unevaluated:  # it was killed, or failed, in the evaluation after its last save
        run.evaluate(step, step / per_epoch, validation, device, workers)

    student.train()
    batches = training_batches(training, step, stop, workers, rank, world)
    bar = tqdm(batches, total=stop, initial=step, desc=folder.name, unit="step", disable=rank > 0, dynamic_ncols=True)
    run.clock.start()
    reported: set[str] = set()
    for k, batch in enumerate(bar):
        if workers and k == 0:
            run.clock.start()  # anew: what it takes to start the loading processes is no training
        report_dropped(batch, reported)
        lr, beta1 = one_cycle(step, last_step, cfg.lr)
        for group in optimizer.param_groups:
            group["lr"], group["betas"] = lr, (beta1, 0.99)

        weight = cfg.kd_weight * (1 - step / last_step if cfg.kd_fade else 1)
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            detection, distillation, seen, neck = losses(student, batch.to(device), teacher, distil, weight)
            loss = total_loss(detection, distillation)
        check_finite({**detection, **distillation}, batch.ids, step)

        # Which term pulls how hard on the student's neck: about ten times a run, because it costs extra backward passes.
        pulls = {}
        if distil is not None and step % max(1, last_step // 10) == 0:
            terms = {"detection": total_loss(detection, {}), **distillation}
            pulls = {f"pull_{k}": v for k, v in gradient_norms(terms, neck, scaler.get_scale()).items()}

        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        parallel.average_gradients(parameters)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.clip)  # psi's gradient counts
        scaler.step(optimizer)
        scaler.update()
        step += 1

        if pulls or (step - 1) % cfg.log_every == 0 or step == last_step:
            terms = {k: float(parallel.mean_over_processes(v)) for k, v in {**detection, **distillation}.items()}
            record = {"step": step, "epoch": step / per_epoch, "loss": sum(terms.values()), **terms, "lr": lr,
                      "grad_norm": float(norm), **pulls, **{k: float(v) for k, v in seen.items()}}  # fmt: skip
            run.log("train", record)
            bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
        epoch_ends = step % per_epoch == 0
        if epoch_ends or step == stop or run.clock.running() > SAVE_EVERY:
            parallel.finish(device)  # else a GPU would be timed without its last step
            run.clock.stop()
            run.unevaluated = step == last_step or (epoch_ends and step // per_epoch % cfg.eval_every == 0)
            run.save(step)  # before the evaluation: what fails there costs no training
            if run.unevaluated:
                run.evaluate(step, step / per_epoch, validation, device, workers)
            run.clock.start()
    return student.eval()


def losses(student: "Detector", batch: "Batch", teacher: "Detector | None", distil: "Module | None",
           weight: float) -> tuple[Any, ...]:  # fmt: skip
    """What is lowered on one batch: {term: weighted scalar} of the detection loss and of the distillation (empty without a
    method), what the method saw of it ({name: number worth logging}), and the student's neck, to measure gradients on."""
    import torch

    from baselines import labels_for

    x = student.prepare(batch)
    if distil is None:
        out_s = student(x)
        return student.loss(out_s, batch), {}, {}, out_s.neck
    with torch.no_grad():  # voxels and rule books are shared where both cut space alike
        out_t = teacher(x if teacher.shares_input(student) else teacher.prepare(batch))
    out_s = student(x)
    detection = student.loss(out_s, labels_for(batch, out_t, student.cfg))  # label KD: the teacher's sure boxes too
    terms, seen = distil(out_s, out_t, batch)
    return detection, {name: weight * term for name, term in terms.items()}, seen, out_s.neck


def start_distilling(cfg: Config, student: "Detector", teacher: "Detector | None", device: Any) -> "Module | None":
    """The method with its trainable layers, or None. The teacher stays outside the student: frozen, in eval mode, never saved."""
    from baselines import METHODS, seeded
    from weights import inherit

    if teacher is None:
        return None
    check_pair(teacher.cfg, cfg)
    teacher.to(device).eval().requires_grad_(False)
    if cfg.inherit:
        inherit(student, teacher)
    if cfg.method == "none":
        return None
    return seeded(METHODS[cfg.method], cfg, student.backbone.out_channels, teacher.backbone.out_channels).to(device)


def one_cycle(step: int, steps: int, peak: float, warm: float = 0.4, start: float = 10, end: float = 1e5) -> tuple[float, float]:
    """Learning rate and AdamW's beta1 at a step: peak/10 up to peak in the first 40 %, down to peak/1e5, both as half
    a cosine; beta1 runs the other way, .95 -> .85 -> .95. A function of the step, so resuming needs no state."""
    turn = warm * steps
    if step < turn:
        up = (1 - math.cos(math.pi * step / turn)) / 2
        return peak / start + (peak - peak / start) * up, 0.95 - 0.1 * up
    down = (1 - math.cos(math.pi * (step - turn) / max(1, steps - turn))) / 2
    return peak + (peak / end - peak) * down, 0.85 + 0.1 * down


def check_finite(terms: dict[str, "Tensor"], ids: list[str], step: int) -> None:
    """Stop at the first loss that is NaN or infinite; weights and checkpoint are still those before it."""
    for name, value in terms.items():
        if not value.isfinite():
            raise InputError(f"step {step}: loss term {name!r} is {float(value.detach())} on frames {', '.join(ids)}; the last "
                             "checkpoint is intact. Try half the --lr under another --name, or see plot.py")  # fmt: skip


# ------------------------------------------------------------------ command line


def resolve(value: str, which: int, data: str) -> tuple[Config, Path | None]:
    """What --teacher / --student names: its config, and its checkpoint if it is one. `data` "": the simulated set."""
    if value == DEFAULT:
        value = DEFAULT_PAIR[data or "sim"][which]
    if value.endswith(".pt") or os.sep in value:
        from weights import read_checkpoint

        return from_json(read_checkpoint(value)["config"]), Path(value)
    return replace(preset(value, data or "sim"), data=data or "sim"), None


def check_pair(teacher: Config, student: Config) -> None:
    """A student learns class maps from its teacher: both must mean the same by them. Raises InputError."""
    if student.label_kd and student.method == "none":
        raise InputError("--label-kd with --method none: label KD alone is --method lad")
    names, reason = ("head", "classes", "task_classes", "point_features", "velocity"), ""
    if student.head == "anchor" and student.method in ("hinton", "gid-f", "gid-l", "pp-logit", "rdd"):
        names += ("anchors", "point_range", "voxel_size", "bev_strides", "up_strides")
        reason = f"; --method {student.method} compares anchor with anchor"
    for name in names:
        if getattr(teacher, name) != getattr(student, name):
            raise InputError(f"teacher {teacher.preset} and student {student.preset} differ in {name}: "
                             f"{getattr(teacher, name)} and {getattr(student, name)}{reason}")  # fmt: skip


def run_name(cfg: Config) -> str:
    """The folder of a run that was given no --name."""
    method = "" if cfg.method == "none" else f"-{cfg.method}"
    own = cfg.preset not in PRESETS or cfg.width == preset(cfg.preset).width
    width = "" if own else "-width" + ",".join(f"{w:g}" for w in dict.fromkeys(cfg.width))
    return f"{cfg.data}-{cfg.preset}{width}{method}-seed{cfg.seed}"


def parser() -> ArgumentParser:
    p = ArgumentParser(prog="train.py", description=__doc__, epilog="In brackets: what holds where the preset or checkpoint says "
                       "nothing else (--print-config shows a run's own). Presets: " + ", ".join(PRESETS))  # fmt: skip
    p.add_argument("--teacher", nargs="?", const=DEFAULT, metavar="PRESET|CHECKPOINT", help="the detector to learn from")
    p.add_argument("--student", nargs="?", const=DEFAULT, metavar="PRESET|CHECKPOINT",
                   help="the detector to train; of a checkpoint only the config is taken, not the weights")
    p.add_argument("--reading", choices=list(READINGS),
                   help="how RDD is read; paper-weights: the paper's psi and alphas; printed: all [a checkpoint's or default]")
    p.add_argument("--teacher-epochs", type=int, metavar="X", help="epochs of a teacher that is trained first [--epochs]")
    p.add_argument("--name", metavar="X", help="folder of the run under --runs [DATA-PRESET-METHOD-seedN]")
    p.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where runs are kept [runs]")
    p.add_argument("--workers", type=int, default=0, metavar="X", help="data loading processes; changes no result [0]")
    p.add_argument("--stop-after", type=int, metavar="STEP", help="leave the run unfinished at this step")
    p.add_argument("--print-config", action="store_true", help="print the complete config and exit")
    add_options(p)
    return p


def main() -> None:
    args = vars(parser().parse_args())
    given = {f.name: args[f.name] for f in fields(Config) if f.name in args}
    for option, lowest in (("workers", 0), ("stop_after", 1), ("teacher_epochs", 1)):
        if args[option] is not None and args[option] < lowest:
            raise InputError(f"--{option.replace('_', '-')}: expected a number from {lowest} on; found {args[option]}")
    if args["teacher"] is None and args["student"] is None:
        raise InputError("nothing to train: give --teacher, --student or both (see --help)")
    data = given.get("data", "")
    if data and data not in DEFAULT_PAIR:
        raise InputError(f"--data: unknown data set {data!r}{did_you_mean(data, DEFAULT_PAIR)}")

    # Data, optimisation and run options hold for both; model and distillation options are the student's.
    distil_or_model = {f.name for f in fields(Config) if f.metadata.get("group") in (MODEL, DISTIL, READING)}
    common = {k: v for k, v in given.items() if k not in distil_or_model}
    cfg_t = checkpoint = cfg_s = None
    if args["teacher"] is not None:
        cfg_t, checkpoint = resolve(args["teacher"], 0, data)
        if checkpoint is None:  # a trained teacher stays what it was trained as
            epochs = {"epochs": args["teacher_epochs"]} if args["teacher_epochs"] else {}
            cfg_t = override(cfg_t, {**(common if args["student"] else given), "method": "none", **epochs})
    if args["student"] is not None:
        cfg_s, own = resolve(args["student"], 1, data or (cfg_t.data if cfg_t else ""))
        if checkpoint and not own:  # a preset's data is its teacher's
            given |= scenes_of(cfg_t, cfg_s, given)
        learns = {"method": "rdd"} if cfg_t is not None and cfg_s.method == "none" else {}  # a checkpoint has its own
        cfg_s = override(cfg_s, {**reading(args["reading"], given.get("head", cfg_s.head)), **learns, **given})
        if cfg_t is not None:
            check_pair(cfg_t, cfg_s)
        elif cfg_s.method != "none" or cfg_s.inherit or cfg_s.label_kd:
            option = "--inherit or --label-kd" if cfg_s.method == "none" else f"--method {cfg_s.method}"
            raise InputError(f"{option}: needs a --teacher to learn from")
    if args["print_config"]:
        print("\n\n".join(show(c) for c in (cfg_t, cfg_s) if c is not None))
        return
    run_jobs(cfg_t, checkpoint, cfg_s, args)


def run_jobs(cfg_t: Config | None, checkpoint: Path | None, cfg_s: Config | None, args: dict[str, Any]) -> None:
    """Teacher (loaded, or trained first), its AP, then the student."""
    import parallel
    from data.batch import open_run, prepare_data
    from evaluate import evaluate_detector, headline
    from runs import check_same_run, machine
    from weights import load_detector

    _, _, device = parallel.start()
    if parallel.rank() == 0:  # a GPU that torch does not see, or a missing spconv, would otherwise go unnoticed
        print(f"on {machine()}, {parallel.autocast_dtype((cfg_s or cfg_t).amp, device) or 'float32'}".replace("torch.", ""))
    base = prepare_data(cfg_s or cfg_t, args["workers"])
    if cfg_s is not None:
        cfg_s = replace(cfg_s, root=base.root)
        folder = args["runs"] / (args["name"] or run_name(cfg_s))
        check_same_run(folder, cfg_s)  # before hours go into a teacher
    teacher = load_detector(checkpoint)[0] if checkpoint else None
    if cfg_t is not None and checkpoint is None:
        cfg_t = replace(cfg_t, root=base.root)
        folder_t = args["runs"] / ((args["name"] if cfg_s is None else None) or run_name(cfg_t))
        check_same_run(folder_t, cfg_t)  # before its data is read and its objects are cut out
        teacher = train(cfg_t, folder_t, None, args["workers"], None if cfg_s else args["stop_after"])
    if cfg_s is None:
        return
    data = None
    if teacher is not None and not (folder / "last.pt").is_file():
        # A teacher that was loaded wrongly teaches nonsense, silently: look at its AP before a long run.
        data = open_run(cfg_s, folder.parent, args["workers"])
        score = headline(evaluate_detector(teacher.to(device), data[1], device, workers=args["workers"]))
        if parallel.rank() == 0:
            print("teacher: " + ", ".join(f"{k} {v:.2f}" for k, v in score.items()) + "  (if this is low, stop here)")
    train(cfg_s, folder, teacher, args["workers"], args["stop_after"], data)


if __name__ == "__main__":
    run_cli(main)
