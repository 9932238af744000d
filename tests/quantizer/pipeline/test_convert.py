"""The whole conversion of a tiny FLUX through the command line: stages, resuming, plans for the device's memory."""

import contextlib
import hashlib
import io
import json
import shutil
from dataclasses import replace

import pytest
import torch
from ternary_flux.quantizer import cli
from ternary_flux.quantizer.distillation.blockwise import BlockSettings
from ternary_flux.quantizer.files.architecture import Architecture
from ternary_flux.quantizer.files.precision import precisions_of
from ternary_flux.quantizer.files.ternary import open_ternary
from ternary_flux.quantizer.model.flux import Inputs
from ternary_flux.quantizer.pictures import conditioning
from ternary_flux.quantizer.pictures.pool import subset
from ternary_flux.quantizer.pictures.states import Batch
from ternary_flux.quantizer.pipeline.budget import (
    Budget,
    calibration_states,
    held_out_pictures,
    most_pictures,
    plan,
    sampling_seconds,
    steps_between_evaluations,
)
from ternary_flux.quantizer.pipeline.convert import Run
from ternary_flux.quantizer.pipeline.decisions import Decisions, Training
from ternary_flux.quantizer.pipeline.workspace import Workspace
from ternary_flux.tests import builders

pytestmark = pytest.mark.usefixtures("simple_solver")

ARCH = Architecture(1, 128, 1, 1, 16, 16, context_dim=32, vec_dim=24, guidance=False)
DEV = Architecture(1, 3072, 19, 38, 16, 16, context_dim=4096, vec_dim=768, guidance=True)
TOKENS = 4096 + 512
GB = 1 << 30


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert")
    builders.write_flux(folder / "tiny.safetensors", ARCH)
    builders.write_conditioning(folder / "cond.safetensors", ARCH)
    return folder


@pytest.fixture(scope="module", autouse=True)
def steady_clock():
    """The amounts that a budget pays for must not depend on what else the machine does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workspace, "time_state", lambda *_: 1e-3)
        yield


@pytest.fixture(scope="module")
def printed(source, simple_solver):
    """What a conversion of 0.1 minutes prints."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert cli.run(command(source, source / "out.safetensors")) == 0
    return output.getvalue()


@pytest.fixture(scope="module")
def converted(source, printed):
    """The folder of the finished conversion."""
    return source


def command(source, output, *more):
    fixed = ["--conditioning", source / "cond.safetensors", "--size", "64x64", "--sampler-steps", 4, "--device", "cpu"]
    return [str(x) for x in ["convert", source / "tiny.safetensors", "-o", output, *fixed, "--budget", 0.1, *more]]


def test_a_distilled_file_and_the_stages_before_it(converted):
    work = converted / "out.safetensors.work"
    file = open_ternary(converted / "out.safetensors")
    assert file.architecture == ARCH
    assert json.loads(file.metadata["ternary.settings"])["distill"]["codes"]
    digest = hashlib.sha256((converted / "tiny.safetensors").read_bytes()).hexdigest()
    assert file.metadata["ternary.source_sha256"] == digest
    assert {"rounded.safetensors", "calibrated.safetensors", "decisions.json"} <= {path.name for path in work.iterdir()}


def test_a_refused_conversion_leaves_no_work(source, tmp_path, capsys):
    wrong = ["--size", "65x64"]
    assert cli.run([*command(source, tmp_path / "out.safetensors"), *wrong]) == 2
    assert "multiples of 16 pixels" in capsys.readouterr().err
    wrong = ["--conditioning", str(source / "tiny.safetensors")]
    assert cli.run([*command(source, tmp_path / "out.safetensors"), *wrong]) == 2
    assert "quantizer embed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_output_says_what_to_expect(printed):
    table = printed[printed.index("stage ") :].splitlines()[1:4]
    errors = [float(line.split()[1]) for line in table]
    rounded, calibrated, distilled = errors
    assert distilled <= calibrated < rounded
    assert "What to expect: pictures" in printed


@pytest.mark.slow
def test_an_interrupted_conversion_goes_on_to_the_same_file(converted, tmp_path):
    """From the cached pictures and velocities, too: they are those that the first run learned from."""
    first = converted / "out.safetensors"
    work = tmp_path / "again.safetensors.work"
    shutil.copytree(f"{first}.work", work)
    (work / "calibrated.safetensors").unlink()
    (work / "distill.safetensors").unlink(missing_ok=True)
    assert cli.run(command(converted, tmp_path / "again.safetensors")) == 0
    one, other = open_ternary(first), open_ternary(tmp_path / "again.safetensors")
    assert one.file.entries.keys() == other.file.entries.keys()
    assert all((one.file.bytes(key) == other.file.bytes(key)).all() for key in one.file.entries)


@pytest.mark.slow
def test_a_mixed_conversion_grows_as_far_as_it_may(source):
    """The choice is kept with the work: an interrupted run does not make another."""
    output, work = source / "mixed.safetensors", source / "mixed.safetensors.work"
    assert cli.run(command(source, output, "--growth", 0.3)) == 0
    decisions = Decisions.load(work / "decisions.json")
    assert decisions.precisions and decisions.precisions == precisions_of(open_ternary(output))
    size = (work / "rounded.safetensors").stat().st_size
    assert size < output.stat().st_size < 1.3 * size + 16384  # and what calibration saw, in the metadata
    fewer = dict(list(decisions.precisions.items())[1:])
    replace(decisions, precisions=fewer).save(work / "decisions.json")
    for path in (output, work / "calibrated.safetensors"):
        path.unlink()
    shutil.rmtree(work / "calibrate")
    assert cli.run(command(source, output, "--growth", 0.3)) == 0
    assert precisions_of(open_ternary(output)) == fewer


def test_fewer_states_of_all_batches():
    batches = [Batch(Inputs(*(torch.full((4, 1), float(i)) for _ in range(3))), torch.ones(4)) for i in range(10)]
    counts = {count: [len(batch.inputs.t) for batch in subset(batches, count)] for count in (0, 3, 10, 25, 100)}
    assert counts == {0: [1], 3: [1] * 3, 10: [1] * 10, 25: [2] * 10, 100: [4] * 10}
    assert [float(batch.inputs.t[0]) for batch in subset(batches, 3)] == [0, 4, 8]


def test_a_work_folder_of_another_conversion_is_refused(converted, capsys):
    assert cli.run(command(converted, converted / "out.safetensors", "--force", "--rank", 4)) == 2
    assert "its rank is 0, not 4" in capsys.readouterr().err


def test_an_existing_file_is_not_replaced(converted, capsys):
    assert cli.run(command(converted, converted / "out.safetensors")) == 2
    assert "--force" in capsys.readouterr().err


def test_prompts_of_another_model_are_refused(converted, tmp_path, capsys):
    conditioning.write(tmp_path / "cond.safetensors", ["a"] * 4, torch.zeros(4, 3, 48), torch.zeros(4, 24))
    arguments = command(converted, tmp_path / "out.safetensors")
    arguments[arguments.index("--conditioning") + 1] = str(tmp_path / "cond.safetensors")
    assert cli.run(arguments) == 2
    assert "context" in capsys.readouterr().err


@pytest.mark.parametrize("gigabytes", [16, 24])
def test_flux_on_a_consumer_card_trains_scales_with_recomputed_blocks(gigabytes):
    chosen = plan(DEV, TOKENS, gigabytes * GB, torch.device("cuda"))
    assert not chosen.codes and chosen.recompute and chosen.batch == 1
    assert chosen.packed == (gigabytes == 16)


def test_flux_on_a_large_accelerator_trains_codes():
    chosen = plan(DEV, TOKENS, 180 * GB, torch.device("cuda"))
    assert chosen.codes and chosen.eight_bit


def test_a_small_model_trains_everything_in_full_precision():
    chosen = plan(ARCH, 32, 4 * GB, torch.device("cpu"))
    assert chosen.codes and not (chosen.packed or chosen.recompute or chosen.eight_bit)
    assert chosen.batch == 12


def test_amounts_follow_the_budget_and_stay_within_bounds():
    assert sampling_seconds(60, 20) + sampling_seconds(60, 20) * 6 / 20 == pytest.approx(0.2 * 60)
    assert [held_out_pictures(*amounts) for amounts in ((16, 4), (100, 1000), (4096, 1000), (4096, 50))] == [
        2,
        12,
        32,
        5,
    ]


def test_states_get_what_solving_leaves_of_the_share():
    """And half of what it takes where it leaves little; too many, or fewer than 32, in no case."""
    assert calibration_states(600, 500, 0.01, enough=500, solving=0) == 500
    assert calibration_states(60, 50, 0.1, enough=500, solving=0) == int(0.2 * 60 / 0.1)
    assert calibration_states(60, 50, 0.1, enough=500, solving=4.0) == int((0.2 * 60 - 4) / 0.1)
    assert calibration_states(60, 50, 0.1, enough=500, solving=20.0) == int(20 / 2 / 0.1)
    assert calibration_states(60, 10, 0.2, enough=500, solving=0) == 32
    assert calibration_states(1, -5, 10.0, enough=500, solving=0) == 32


def test_evaluations_take_a_twentieth_of_the_forwards_of_training():
    for held_out, batch in ((300, 16), (320, 1), (150, 8)):
        assert 2 * held_out == pytest.approx(0.05 * 4 * batch * steps_between_evaluations(held_out, batch), rel=0.01)
    assert steps_between_evaluations(4, 32) == 20


def test_states_stay_within_the_memory():
    assert most_pictures(3000) * 12 <= 3000 < 12 * most_pictures(10**6) and most_pictures(5) == 16


class Machine:
    """A clock that goes by what was done, as on a machine that changes its speed when half of its budget is used."""

    EACH = {"pictures": 2.0, "teacher velocities": 0.1, "calibrated blocks": 40.0, "training steps": 8.0}

    def __init__(self, budget: float, factor: float):
        self.budget, self.factor, self.now, self.before = budget, factor, 0.0, ("", 0)

    def __call__(self) -> float:
        return self.now

    def show(self, what: str, done: int, total: int) -> None:
        last, count = self.before
        more = done - count if what == last else done
        self.before = what, done
        self.now += self.EACH.get(what, 0.0) * more * (1.0 if self.now < self.budget / 2 else self.factor)


@pytest.mark.slow
def test_a_conversion_takes_its_budget_on_a_machine_that_slows_down(source, tmp_path):
    """And makes the same file again from what it decided, whatever the machine's speed is then."""
    machine, target = Machine(600.0, 3.0), tmp_path / "out.safetensors"
    said: list[str] = []

    def convert(clock=machine, minutes=10.0) -> Run:
        files = source / "tiny.safetensors", source / "cond.safetensors", tmp_path / "work"
        work = Workspace(*files, ((64, 64),), sampler_steps=4, on_progress=clock.show)
        run = Run(work, target, minutes, clock=clock, overwrite=True, on_message=said.append)
        run.run()
        return run

    decisions = convert().decisions
    assert machine.now == pytest.approx(600, rel=0.1), said
    pictures = decisions.budget.pictures
    assert 2 * pictures == pytest.approx(sampling_seconds(600, 4), rel=0.35)
    assert decisions.training.steps == decisions.training.course[-1][2]
    written = open_ternary(target)
    first = {key: written.file.bytes(key).tobytes() for key in written.file.entries}
    slower = Machine(600.0, 5.0)
    slower.now = 300.0
    (tmp_path / "work" / "distill.safetensors").unlink()
    assert convert(slower).decisions.training == decisions.training
    again = open_ternary(target)
    assert {key: again.file.bytes(key).tobytes() for key in again.file.entries} == first


@pytest.mark.slow
def test_amounts_that_are_given_are_not_decided_by_the_clock(source, capsys):
    output = source / "fixed.safetensors"
    fixed = ["--pictures", "17", "--calibration-states", "33", "--steps", "14"]
    assert cli.run(command(source, output, *fixed)) == 0
    printed = capsys.readouterr()
    assert "min left" not in printed.out + printed.err  # nobody can know
    decisions = Decisions.load(source / "fixed.safetensors.work" / "decisions.json")
    assert decisions.budget == Budget(17, 12 * 17, 2, 33)
    assert decisions.training.steps == 14 and decisions.training.course == ((0, 0.0, 14),)
    fixed[1] = "18"
    assert cli.run(command(source, output, "--force", *fixed)) == 2
    assert "its pictures is 17, not 18" in capsys.readouterr().err


@pytest.mark.parametrize("blocks", [None, BlockSettings(7, stream=torch.bfloat16)])
def test_decisions_are_read_as_they_were_made(tmp_path, blocks):
    chosen = plan(DEV, TOKENS, 24 * GB, torch.device("cuda"))
    training = Training(chosen, codes=False, steps=None, seconds=12.5, blocks=blocks, course=((0, 0.0, 9), (5, 0.4, 7)))
    decisions = Decisions(Budget(16, 192, 2, 32), 3.5, 7.25, {"a": "int8"}, training)
    for made in (decisions, replace(decisions, precisions=None, training=None)):
        made.save(tmp_path / "decisions.json")
        assert Decisions.load(tmp_path / "decisions.json") == made
    assert Decisions.load(tmp_path / "other.json") is None
