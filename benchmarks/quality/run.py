"""Quality on the miniatures: `python -m benchmarks.quality [--quick]` compares ways to make them ternary.

Every model paints the same held-out compositions from the same noise, and an exact checker judges the pictures. With
`--stressed` the stages run on models that compute the same with channels of very different size (`stress`), and on one
with massive residual channels (`massive`). The miniatures show that the pipeline works and rank recipes; they do not
measure FLUX's own quality. Results go to benchmarks/results/quality.json and docs/quality.png, FLUX.2's to
quality-flux2.json and quality-flux2.png. A run that is interrupted goes on where it stopped.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from ternary_flux.benchmarks import miniature
from ternary_flux.benchmarks.quality import chart, massive, peer, stress
from ternary_flux.benchmarks.quality.models import dense_of, round_by_peer, round_to_bits, with_int8_activations
from ternary_flux.benchmarks.quality.scores import Scores, Setup, evaluate
from ternary_flux.benchmarks.report import RESULTS, ROOT, machine
from ternary_flux.quantizer.calibration import calibrate
from ternary_flux.quantizer.calibration.sensitivity import best_upgrades, sensitivities
from ternary_flux.quantizer.distillation.distill import DistillSettings
from ternary_flux.quantizer.files.atomic import write_json
from ternary_flux.quantizer.files.checkpoint import open_checkpoint
from ternary_flux.quantizer.files.container import TensorFile
from ternary_flux.quantizer.files.identity import identify
from ternary_flux.quantizer.files.ternary import open_ternary
from ternary_flux.quantizer.model.flux import Flux
from ternary_flux.quantizer.pictures import conditioning
from ternary_flux.quantizer.pictures.pool import Pool
from ternary_flux.quantizer.pictures.quality import HeldOut, measure
from ternary_flux.quantizer.pictures.sampler import default_shift
from ternary_flux.quantizer.pipeline.distill_file import distill_file
from ternary_flux.quantizer.pipeline.workspace import Workspace
from ternary_flux.quantizer.rounding.round import round_checkpoint

MINIATURES = {"flux1": miniature.FLUX1, "flux2": miniature.FLUX2}


@dataclass(frozen=True)
class Scale:
    """How much to do."""

    prompts: int  # of each category
    seeds: int
    pictures: int  # that the teacher paints for training
    states: int
    steps: int  # of each distillation
    calibration_states: int


@dataclass(frozen=True)
class Trained:
    """What every distillation learns from and is measured on."""

    pool: Pool
    held_out: HeldOut


STAGES = ("original, bf16", "ternary, least squares", "calibrated", "distilled: codes")  # that are stressed
FULL = Scale(prompts=16, seeds=8, pictures=3072, states=36864, steps=1800, calibration_states=5120)
QUICK = Scale(prompts=6, seeds=4, pictures=192, states=2304, steps=80, calibration_states=128)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the same recipes with less data and fewer steps")
    parser.add_argument("--stressed", action="store_true", help="the stages on models with outlier channels, instead")
    parser.add_argument("--miniature", choices=MINIATURES, action="append", help="this one alone (default: both)")
    parser.add_argument("--work", type=Path, help="folder for what is kept between runs (default: output/quality)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "quality.png", help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, help="of each distillation")
    parser.add_argument("--seeds", type=int, help="pictures of each prompt")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if not peer.installed():
        say("OrbitQuant's rows are left out; for them: pip install -r benchmarks/requirements.txt")
    scale = QUICK if args.quick else FULL
    changes = {name: value for name in ("steps", "seeds") if (value := getattr(args, name))}
    scale = replace(scale, **changes)
    for which in args.miniature or MINIATURES:
        suffix = "" if which == "flux1" else f"-{which}"
        kind = suffix + ("-stressed" if args.stressed else "") + ("-quick" if args.quick else "")
        work = (args.work or ROOT / "output") / f"quality{kind}"
        results, weights = args.results / f"quality{kind}.json", MINIATURES[which]
        say(open_checkpoint(weights / "flux-miniature.safetensors").architecture.family)
        if args.stressed:
            run_stressed(scale, work, results, torch.device(args.device), weights)
        else:
            picture = args.picture.with_stem(f"{args.picture.stem}{suffix}{'-quick' if args.quick else ''}")
            run(scale, work, results, picture, torch.device(args.device), weights)


def run(
    scale: Scale,
    folder: Path,
    results: Path,
    picture: Path,
    device: torch.device,
    weights: Path = miniature.FLUX1,
    without: Collection[str] = (),
) -> dict:
    """Make every model that is missing in `folder`, score all, write the JSON and the picture.

    `without`: names of recipes that are left out, and that no other starts from.
    """
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    setup = Setup.load(weights, scale.prompts, scale.seeds, device)
    work = workspace(folder, setup, device, weights)
    say(f"teacher's {scale.pictures} pictures and {scale.states} states")
    states = Trained(work.label_states(scale.pictures, scale.states), work.hold_out(24))  # before anything is timed
    rows: list[dict] = []
    pictures: dict[str, np.ndarray] = {}
    reference = originals_scores(setup, work)
    for label, make in recipes(scale, work, states).items():
        if label in without:
            continue
        path, seconds = timed(folder / "models", label, make)
        row, pictures[label] = scored(path, scale, setup, work, reference)
        rows.append({"name": label, "cpu_seconds": seconds, **row})
        say(f"{label:<34} {told(row)}   {seconds:.0f} CPU seconds to make")
    result = {
        "note": "Measured on the miniature; it ranks recipes and does not measure FLUX's own quality.",
        "scale": vars(scale),
        "machine": machine(device),
        "seconds": time.perf_counter() - started,
        "models": rows,
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    write_json(results, result)
    picture.parent.mkdir(parents=True, exist_ok=True)
    chart.draw(rows, pictures, setup.examples).savefig(picture)
    say(f"{results} and {picture} written, {result['seconds']:.0f} s in all")
    return result


def run_stressed(
    scale: Scale,
    folder: Path,
    results: Path,
    device: torch.device,
    weights: Path = miniature.FLUX1,
    levels: Mapping[str, stress.Level] = stress.LEVELS,
    without: Collection[str] = (),
    fine_tuning: int = massive.STEPS,
) -> dict:
    """The stages on the miniature as it is and stressed; every error beside that of the same stage on the plain one.

    `without`: as for `run`. `fine_tuning`: steps for the model with massive channels.
    """
    rows: list[dict] = []

    def prepared(level: str, weights: Path) -> tuple[Setup, Workspace, Trained]:
        setup = Setup.load(weights, scale.prompts, scale.seeds, device)
        work = workspace(folder / level, setup, device, weights)
        return setup, work, Trained(work.label_states(scale.pictures, scale.states), work.hold_out(24))

    plain_model = prepared("plain", weights)
    makers: dict[str, Callable[[Path, Path], None]] = {
        name: partial(stress.write, level=level) for name, level in levels.items()
    }
    if plain_model[0].arch.version == 1:
        makers["massive"] = partial(massive.write, pool=plain_model[2].pool, steps=fine_tuning)
    for level in ("plain", *makers):
        if level == "plain":
            setup, work, states = plain_model
        else:
            setup, work, states = prepared(level, stressed_weights(weights, folder / level, makers[level]))
        made, reference = recipes(scale, work, states), originals_scores(setup, work)
        for label in made:
            if label in without or label not in (*STAGES, *peer.PEERS):
                continue
            path, seconds = timed(folder / level / "models", label, made[label])
            row, _ = scored(path, scale, setup, work, reference)
            error = row["velocity"]["error"]
            plain = next((before["velocity"]["error"] for before in rows if before["name"] == label), error)
            ratio = error / plain if plain else 1.0
            rows.append({"level": level, "name": label, "cpu_seconds": seconds, "to_plain": ratio, **row})
            int8 = f", with int8 {row['int8_error'] / error:.3f}" if "int8_error" in row else ""
            say(f"{level:<10} {label:<24} {told(row)}, {ratio:.2f} of plain{int8}")
    result = {
        "note": "The miniature with outlier channels; not FLUX's own quality.",
        "scale": vars(scale),
        "machine": machine(device),
        "levels": {name: vars(level) for name, level in levels.items()},
        "models": rows,
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    write_json(results, result)
    say(f"{results} written")
    return result


def originals_scores(setup: Setup, work: Workspace) -> Callable[[], Scores]:
    """Asked for when the first model is scored, if any."""
    return cache(lambda: evaluate(work.teacher, setup, work.teacher, None))


def scored(
    path: Path, scale: Scale, setup: Setup, work: Workspace, reference: Callable[[], Scores]
) -> tuple[dict, np.ndarray]:
    """The row of a model and its example pictures, kept beside its file. `reference`: the original's scores."""
    state = path.stat()
    made_of = [scale.prompts, scale.seeds, state.st_size, state.st_mtime_ns]
    kept, examples = path.with_suffix(".scores"), path.with_suffix(".npy")
    if kept.exists() and (found := json.loads(kept.read_text()))["made_of"] == made_of:
        return found["row"], np.load(examples)
    model, size, bits = dense_of(path, setup.device)
    scores = reference() if path.samefile(work.dense) else evaluate(model, setup, work.teacher, reference())
    row = {"megabytes": size / 1e6, "bits": bits} | scores.summary | with_int8(model, path, setup, work)
    np.save(examples, scores.examples)
    write_json(kept, {"made_of": made_of, "row": row})
    return row, scores.examples


def with_int8(model: Flux, path: Path, setup: Setup, work: Workspace) -> dict[str, float]:
    """The velocity error of a ternary file's model with 8-bit activations; it has them from now on."""
    if identify(TensorFile(path)).kind != "ternary":
        return {}
    held_out = setup.held_out(work.teacher, default_shift(setup.arch))
    return {"int8_error": measure(with_int8_activations(model, path), held_out).error}


def told(row: Mapping) -> str:
    """What a row says of a model: on the model's own schedule, and at evenly spaced times."""
    accuracy = row["accuracy"]["overall"][0]
    own, even = (row[kind]["error"] for kind in ("velocity", "velocity_at_even_times"))
    return f"accuracy {accuracy:.3f}   velocity error {own:.4f}, at even times {even:.4f}"


def stressed_weights(weights: Path, folder: Path, make: Callable[[Path, Path], None]) -> Path:
    """A folder like `weights` with the transformer that `make` writes from that one."""
    stressed = folder / "weights"
    stressed.mkdir(parents=True, exist_ok=True)
    for part in weights.glob("*.safetensors"):
        target = stressed / part.name
        if part.name == "flux-miniature.safetensors":
            if not target.exists():
                make(part, target)
        elif not target.exists():
            target.symlink_to(part.resolve())
    return stressed


def workspace(folder: Path, setup: Setup, device: torch.device, weights: Path) -> Workspace:
    """Training on seen compositions only; what is held out there is for the choice of the best step."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "training-prompts.safetensors"
    if not path.exists():
        prompts = setup.training_prompts()
        conditioning.write(path, prompts, *setup.encode(prompts))
    return Workspace(
        weights / "flux-miniature.safetensors",
        path,
        folder / "work",
        (setup.size,),
        sampler_steps=setup.steps,
        device=device,
    )


def recipes(scale: Scale, work: Workspace, states: Trained) -> dict[str, Callable[[Path], object]]:
    """Name -> what makes the file, in the order of the table; the original comes first."""

    def distilled(start: str, rank: int = 0, codes: bool = False) -> Callable[[Path], object]:
        def make(path: Path) -> None:
            settings = DistillSettings(steps=scale.steps, batch=32, evaluate_every=max(1, scale.steps // 8))
            state = path.with_suffix(".state")
            distill_file(
                work,
                path.with_name(f"{start}.safetensors"),
                path,
                pool=states.pool,
                held_out=states.held_out,
                settings=settings,
                rank=rank,
                codes=codes,
                snapshot=state,
            )
            state.unlink(missing_ok=True)

        return make

    peers = {name: partial(round_by_peer, work.dense, name=name) for name in peer.PEERS} if peer.installed() else {}
    return {
        "original, bf16": lambda path: link(work.dense, path),
        "4-bit rounding": lambda path: round_to_bits(work.dense, path, 4),
        "3-bit rounding": lambda path: round_to_bits(work.dense, path, 3),
        **peers,
        "ternary, absmean": lambda path: round_checkpoint(work.dense, path, method="absmean"),
        "ternary, least squares": lambda path: round_checkpoint(work.dense, path),
        "calibrated": lambda path: calibrated(scale, work, path),
        "calibrated, rank 16": lambda path: calibrated(scale, work, path, 16),
        "distilled: scales": distilled("calibrated"),
        "distilled: scales, rank 16": distilled("calibrated-rank-16", 16),
        "distilled: codes": distilled("calibrated", codes=True),
        "mixed, calibrated": lambda path: mixed(scale, work, states.held_out, path),
        "mixed, distilled: codes": distilled("mixed-calibrated", codes=True),
    }


def calibrated(
    scale: Scale, work: Workspace, path: Path, rank: int = 0, precisions: Mapping[str, str] | None = None
) -> None:
    pictures = work.trajectories.plan("train", scale.pictures)
    states = work.trajectories.states(pictures, scale.calibration_states, 1)
    folder = path.with_suffix(".work")
    settings = calibrate.CalibrationSettings(rank=rank, batch=64, precisions=precisions or {})
    calibrate.calibrate(work.teacher, states, work.conditioning, target=path, folder=folder, settings=settings)


def mixed(scale: Scale, work: Workspace, held_out: HeldOut, path: Path) -> None:
    """Calibrated with the most sensitive Linears in two terms or 8 bits, in a file that is a quarter larger."""
    start = path.with_name("ternary-least-squares.safetensors")
    ranking = sensitivities(open_ternary(start), work.teacher, held_out.batches[::4])
    chosen = best_upgrades(ranking, start.stat().st_size // 4)
    calibrated(scale, work, path, precisions={name: option.precision for name, option in chosen.items()})


def link(source: Path, path: Path) -> None:
    path.symlink_to(source.resolve())


def timed(folder: Path, label: str, make: Callable[[Path], object]) -> tuple[Path, float]:
    """The model's file, made where it is missing, and the CPU seconds that took (of all threads)."""
    folder.mkdir(exist_ok=True)
    name = label.replace(",", "").replace(":", "").replace(" ", "-")
    path, note = folder / f"{name}.safetensors", folder / f"{name}.json"
    if not path.exists():
        before = resource.getrusage(resource.RUSAGE_SELF)
        make(path)
        after = resource.getrusage(resource.RUSAGE_SELF)
        note.write_text(json.dumps({"cpu_seconds": after.ru_utime - before.ru_utime}))
    return path, json.loads(note.read_text())["cpu_seconds"] if note.exists() else 0.0


def say(text: str) -> None:
    print(text, flush=True)
