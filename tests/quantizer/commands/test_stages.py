"""The stages as separate commands, on the command line: calibrate, distill (interrupted and resumed), mixed."""

import json
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from ternary_flux.quantizer import cli, console
from ternary_flux.quantizer.calibration.sensitivity import write_mixed
from ternary_flux.quantizer.distillation.blockwise import BlockSettings, block_run
from ternary_flux.quantizer.files.checkpoint import open_checkpoint
from ternary_flux.quantizer.files.ternary import check_original, open_ternary
from ternary_flux.quantizer.files.work_folder import keep_settings
from ternary_flux.quantizer.pipeline.distill_file import distill_file
from ternary_flux.quantizer.pipeline.workspace import Workspace
from ternary_flux.quantizer.rounding.round import round_checkpoint
from ternary_flux.tests import builders
from ternary_flux.tests.quantizer import synthetic


@pytest.fixture(scope="module")
def folder(tmp_path_factory, simple_solver):
    """A dense checkpoint, prompts, and the file that `calibrate` makes of them."""
    folder = tmp_path_factory.mktemp("stages")
    arch = synthetic.FLUX1
    synthetic.write(folder / "dense.safetensors")
    builders.write_conditioning(folder / "cond.safetensors", arch, 8)
    more = ("--pictures", 4, "--states", 16, "--sweeps", 1, "--packing", "base3", "--rank", 2)
    assert run("calibrate", folder / "dense.safetensors", "-o", folder / "calibrated.safetensors", *more) == 0
    return folder


def run(command, start, dash, output, *more):
    cond = output.parent / "cond.safetensors"
    fixed = ["--conditioning", cond, "--size", "64x64", "--sampler-steps", 2, "--guidance", 2.5, 4, "--device", "cpu"]
    return cli.run([str(x) for x in (command, start, dash, output, *fixed, *more)])


def distill(folder, name, *more):
    fixed = ["--teacher", folder / "dense.safetensors", "--pictures", 4, "--states", 16, "--held-out", 2]
    fixed += ["--steps", 6, "--evaluate-every", 3, "--rank", 2, "--codes", "--batch", 4]
    return run("distill", folder / "calibrated.safetensors", "-o", folder / name, *fixed, *more)


@pytest.fixture(scope="module")
def distilled(folder):
    assert distill(folder, "distilled.safetensors") == 0
    return folder / "distilled.safetensors"


def test_calibrate_keeps_its_choices(folder):
    file = open_ternary(folder / "calibrated.safetensors")
    assert file.metadata["ternary.method"] == "calibrate"
    assert {plan.packing for plan in file.layers.values()} == {"base3"}


def test_distill_keeps_the_factors_and_the_source(distilled):
    file = open_ternary(distilled)
    calibrated = open_ternary(distilled.parent / "calibrated.safetensors")
    assert file.metadata["ternary.method"] == "distill"
    assert file.metadata["ternary.source_sha256"] == calibrated.metadata["ternary.source_sha256"]
    assert all(file.weight(name).up.shape[1] == 2 for name in file.layers)


@pytest.mark.slow
def test_distill_adds_no_factors_to_calibrated_codes(folder, capsys):
    plain = folder / "plain.safetensors"
    more = ("--pictures", 4, "--states", 16, "--sweeps", 1)
    assert run("calibrate", folder / "dense.safetensors", "-o", plain, *more) == 0
    more = ("--teacher", folder / "dense.safetensors", "--pictures", 4, "--rank", 2)
    assert run("distill", plain, "-o", folder / "factors.safetensors", *more) == 2
    assert "calibrate --rank 2" in capsys.readouterr().err


def test_distill_adds_factors_to_rounded_codes(folder):
    start, output = folder / "start.safetensors", folder / "from-rounded.safetensors"
    assert cli.run(["round", str(folder / "dense.safetensors"), "-o", str(start)]) == 0
    more = ("--teacher", folder / "dense.safetensors", "--pictures", 4, "--states", 16, "--held-out", 2)
    assert run("distill", start, "-o", output, *more, "--steps", 2, "--batch", 4, "--rank", 2) == 0
    assert {plan.rank for plan in open_ternary(output).layers.values()} == {2}


def test_an_interrupted_distillation_resumes_to_the_same_file(folder, distilled, monkeypatch, capsys):
    show = console.Bars.show

    def interrupting(self, what, done, total):
        show(self, what, done, total)
        if what == "training steps" and done == 4:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(console.Bars, "show", interrupting)
    assert distill(folder, "again.safetensors") == cli.INTERRUPTED
    assert "--resume" in capsys.readouterr().err and not (folder / "again.safetensors").exists()
    monkeypatch.undo()
    assert distill(folder, "again.safetensors") == 2
    assert "--resume" in capsys.readouterr().err
    assert distill(folder, "again.safetensors", "--resume") == 0
    one, other = open_ternary(distilled), open_ternary(folder / "again.safetensors")
    assert all((one.file.bytes(key) == other.file.bytes(key)).all() for key in one.file.entries)


@pytest.mark.slow
def test_a_resumed_run_keeps_its_pictures(folder, monkeypatch):
    """A run of so many minutes has as many as its machine's speed allows; on resuming that may be another."""
    show, output = console.Bars.show, folder / "timed.safetensors"
    more = ("--teacher", folder / "dense.safetensors", "--held-out", 2, "--minutes", 0.05, "--rank", 2, "--batch", 4)

    def interrupting(self, what, done, total):
        show(self, what, done, total)
        if what == "training steps" and done == 13:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Workspace, "time_state", lambda *_: 0.05 * 60 / 4 / (8 * 70))
    with monkeypatch.context() as context:
        context.setattr(console.Bars, "show", interrupting)
        assert run("distill", folder / "calibrated.safetensors", "-o", output, *more) == cli.INTERRUPTED
    monkeypatch.setattr(Workspace, "time_state", lambda *_: 0.05 * 60 / 4 / (8 * 90))
    assert run("distill", folder / "calibrated.safetensors", "-o", output, *more, "--resume") == 0
    settings = json.loads(open_ternary(output).metadata["ternary.settings"])
    assert settings["distill"]["states"] == 12 * 70
    assert len(list((folder / "timed.safetensors.work" / "pictures").glob("train-*"))) == 70


def test_longer_runs_get_more_pictures(folder):
    work = Workspace(folder / "dense.safetensors", folder / "cond.safetensors", folder, ((64, 64),), sampler_steps=2)
    assert [work.pictures_for(seen) for seen in (10, 8000, 10**9)] == [64, 1000, 4096]


@pytest.mark.slow
def test_mixed_grows_as_far_as_it_may(folder, capsys):
    start, output, more = folder / "rounded.safetensors", folder / "mixed.safetensors", ("--rank", 2, "--sweeps", 1)
    assert cli.run(["round", str(folder / "dense.safetensors"), "-o", str(start), "--packing", "base3"]) == 0
    chosen = ("--teacher", folder / "dense.safetensors", "--growth", 0.3, "--pictures", 2, "--precisions", "two-terms")
    assert run("mixed", start, "-o", output, *chosen) == 0
    file = open_ternary(output)
    double = {name for name, plan in file.layers.items() if plan.terms == 2}
    assert double and not file.int8
    assert f"of {len(file.layers)} Linears {len(double)} in two ternary terms" in capsys.readouterr().out
    assert start.stat().st_size < output.stat().st_size <= 1.3 * start.stat().st_size + 4096
    again, more = folder / "like.safetensors", (*more, "--pictures", 4, "--states", 16, "--like", output)
    assert run("calibrate", folder / "dense.safetensors", "-o", again, *more) == 0
    layers = open_ternary(again).layers
    assert {name for name, plan in layers.items() if plan.terms == 2} == double
    assert all(plan.rank == (0 if name in double else 2) for name, plan in layers.items())


@pytest.mark.slow
def test_an_original_that_says_nothing_is_refused(folder, tmp_path, capsys):
    """Its velocities are zero, and nothing can be measured against them."""
    state = synthetic.tensors()
    for part in ("weight", "bias"):
        state[f"final_layer.linear.{part}"].zero_()
    silent, rounded = tmp_path / "silent.safetensors", tmp_path / "rounded.safetensors"
    synthetic.save_file(state, silent)
    (tmp_path / "cond.safetensors").write_bytes((folder / "cond.safetensors").read_bytes())
    round_checkpoint(silent, rounded)
    output = tmp_path / "out.safetensors"
    for command, start, *more in (
        ("calibrate", silent, "--pictures", 2),
        ("mixed", rounded, "--teacher", silent, "--pictures", 2),
        ("distill", rounded, "--teacher", silent, "--pictures", 2, "--steps", 1),
        ("convert", silent, "--budget", 0.01),
    ):
        assert run(command, start, "-o", output, *more) == 2
        assert "the original's velocities are all zero" in capsys.readouterr().err
        assert not output.exists()


@pytest.mark.slow
def test_dead_parts_of_a_model_are_converted(folder, tmp_path, capsys):
    """A block that is skipped by its modulation, and Linears of zeros, before which and behind which all is zero."""
    state = synthetic.tensors()
    for name, tensor in state.items():
        if name.startswith(("single_blocks.1.modulation", "double_blocks.0.img_attn.qkv", "single_blocks.0.linear2")):
            tensor.zero_()
    synthetic.save_file(state, tmp_path / "dead.safetensors")
    (tmp_path / "cond.safetensors").write_bytes((folder / "cond.safetensors").read_bytes())
    output, more = tmp_path / "out.safetensors", ("--pictures", 2, "--states", 4, "--sweeps", 1, "--rank", 1)
    assert run("calibrate", tmp_path / "dead.safetensors", "-o", output, *more) == 0
    file = open_ternary(output)
    assert all(file.weight(name).dequantize().isfinite().all() for name in file.layers)
    assert "velocity error nan" not in capsys.readouterr().out


@pytest.mark.slow
def test_blocks_of_another_run_are_not_taken(folder, tmp_path, capsys):
    """Finished blocks are kept for the run that trained them; another start or other settings are another run."""
    more = ("--block-steps", 2, "--codes", "--work", tmp_path / "work")
    assert distill(folder, "blocks.safetensors", *more) == 0
    assert not list((tmp_path / "work").glob("blocks*"))
    work = Workspace(folder / "dense.safetensors", folder / "cond.safetensors", tmp_path / "other", ((64, 64),))
    settings = BlockSettings(2, batch=4, rank=2)
    start, pool = open_ternary(folder / "calibrated.safetensors"), SimpleNamespace(fingerprint="states")
    (tmp_path / "other" / "blocks").mkdir(parents=True)
    (tmp_path / "other" / "blocks.safetensors").write_bytes((folder / "blocks.safetensors").read_bytes())
    keep_settings(tmp_path / "other" / "blocks", block_run(start, pool, settings))
    for changed in (replace(settings, steps=60), replace(settings, rates={"scale": 1.0})):
        with pytest.raises(ValueError, match="holds the work of another run: its"):
            distill_file(
                work,
                folder / "calibrated.safetensors",
                tmp_path / "out.safetensors",
                pool=pool,
                held_out=None,
                settings=None,
                rank=2,
                block_settings=changed,
            )
    other = tmp_path / "rounded.safetensors"
    round_checkpoint(folder / "dense.safetensors", other)
    assert block_run(open_ternary(other), pool, settings) != block_run(start, pool, settings)


def test_an_original_of_the_same_shape_but_another_model_is_refused(folder, tmp_path, capsys):
    generator = torch.Generator().manual_seed(7)
    state = {name: torch.randn(t.shape, generator=generator).bfloat16() for name, t in synthetic.tensors().items()}
    synthetic.save_file(state, tmp_path / "other.safetensors")
    rounded = tmp_path / "rounded.safetensors"
    round_checkpoint(folder / "dense.safetensors", rounded)
    for file in (rounded, folder / "calibrated.safetensors"):
        check_original(open_ternary(file), open_checkpoint(folder / "dense.safetensors"))
        with pytest.raises(ValueError, match="was not made from .*other.safetensors.*dense.safetensors"):
            check_original(open_ternary(file), open_checkpoint(tmp_path / "other.safetensors"))


@pytest.mark.slow
def test_nothing_to_gain_is_said_and_not_written(folder, tmp_path, capsys):
    rounded, output = folder / "for-mixed.safetensors", folder / "nothing.safetensors"
    round_checkpoint(folder / "dense.safetensors", rounded)
    more = ("--teacher", folder / "dense.safetensors", "--growth", 1e-6, "--pictures", 1, "--precisions", "int8")
    assert run("mixed", rounded, "-o", output, *more) == 2
    assert "no Linear gains within --growth 1e-06" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.slow
def test_one_state_is_enough_to_train_on(folder, capsys):
    assert distill(folder, "one.safetensors", "--states", 1, "--pictures", 1, "--steps", 1) == 0


def test_mixed_wants_a_rounded_file(folder, capsys):
    more = ("--teacher", folder / "dense.safetensors")
    assert run("mixed", folder / "calibrated.safetensors", "-o", folder / "no.safetensors", *more) == 2
    assert "give the file of `round`" in capsys.readouterr().err
    more = ("--like", folder / "calibrated.safetensors")
    assert run("calibrate", folder / "dense.safetensors", "-o", folder / "no.safetensors", *more) == 2
    assert "give a file of `mixed`" in capsys.readouterr().err
    deeper = synthetic.write(folder / "deeper.safetensors", replace(synthetic.FLUX1, depth_single=3))
    round_checkpoint(deeper, folder / "deeper-rounded.safetensors")
    file, other = open_ternary(folder / "deeper-rounded.safetensors"), folder / "other.safetensors"
    write_mixed(other, file, open_checkpoint(deeper), {"single_blocks.2.linear1": "two-terms"})
    assert run("calibrate", folder / "dense.safetensors", "-o", folder / "no.safetensors", "--like", other) == 2
    assert "give the checkpoint that it was made from" in capsys.readouterr().err
    assert not (folder / "no.safetensors").exists()
