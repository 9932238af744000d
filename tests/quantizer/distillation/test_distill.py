"""Distillation on a tiny FLUX: it learns, what it evaluates is what it writes, and interrupted runs resume exactly."""

import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from ternary_flux.quantizer.distillation.course import Course
from ternary_flux.quantizer.distillation.distill import Collapse, Distiller, DistillSettings, distill
from ternary_flux.quantizer.distillation.schedule import RATES, learning_rates, schedule
from ternary_flux.quantizer.files.architecture import Architecture
from ternary_flux.quantizer.files.checkpoint import open_checkpoint
from ternary_flux.quantizer.files.ternary import open_ternary
from ternary_flux.quantizer.model.flux import Inputs
from ternary_flux.quantizer.model.student import add_low_rank, load_student, save_student, ternary_linears, train_codes
from ternary_flux.quantizer.pictures import conditioning
from ternary_flux.quantizer.pictures.pool import Pool
from ternary_flux.quantizer.pictures.quality import HeldOut, measure
from ternary_flux.quantizer.pictures.sampler import one_by_one
from ternary_flux.quantizer.pictures.states import LabelledStates, States
from ternary_flux.quantizer.rounding.round import round_checkpoint
from ternary_flux.tests import builders

ARCH = Architecture(1, 128, 1, 1, 16, 16, context_dim=32, vec_dim=24, guidance=True)
PROMPTS, STATES = 12, 48


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The dense teacher's file, the rounded start, and the conditioning."""
    folder = tmp_path_factory.mktemp("distill")
    builders.write_flux(folder / "teacher.safetensors", ARCH)
    round_checkpoint(folder / "teacher.safetensors", folder / "start.safetensors")
    builders.write_conditioning(folder / "cond.safetensors", ARCH, PROMPTS)
    return folder


@pytest.fixture(scope="module")
def data(files):
    """Teacher, pool, and what is held out."""
    teacher = builders.flux(ARCH)
    cond = conditioning.read(files / "cond.safetensors", ARCH)
    generator = torch.Generator().manual_seed(2)

    def states(count, prompts):
        latent, t = torch.randn(count, 16, 4, 4, generator=generator), torch.rand(count, generator=generator)
        prompt, guidance = torch.arange(count) % len(prompts) + prompts[0], torch.full((count,), 3.5)
        with torch.no_grad():
            velocity = teacher(latent, t, *cond.batch(prompt), guidance)
        return LabelledStates(States(latent, t, prompt, guidance), velocity)

    pool = Pool([states(STATES, range(PROMPTS - 4))], cond)
    held = Pool([states(8, range(PROMPTS - 4, PROMPTS))], cond)
    return teacher, pool, HeldOut.of([held.batch(0, torch.arange(8))], one_by_one(teacher))


def make(files, data, rank=0, codes=False, clock=time.monotonic, **settings):
    start, teacher = open_ternary(files / "start.safetensors"), open_checkpoint(files / "teacher.safetensors")
    model = load_student(start)
    if rank:
        add_low_rank(ternary_linears(model), teacher, rank)
    if codes:
        train_codes(ternary_linears(model), teacher)
    settings = {"steps": 24, "batch": 8, "evaluate_every": 6, "warmup": 4, "average": 0.9} | settings
    settings["rates"] = RATES | {"code": 1e-2}  # so that codes change within so few steps
    return Distiller(model, start, *data[1:], DistillSettings(**settings), clock), start


def rates_of(groups, step, total):
    """In an even run of so many steps."""
    return schedule(groups, step, Course() if total is None else Course([(0, 0.0, total)]), 20)


def test_chance_moves_codes_as_far_in_a_long_run_as_in_a_short_one():
    groups = {"w.log_scale": "scale", "w.latent": "code"}

    def distance(name, total):
        return sum(rates_of(groups, step, total)[name] ** 2 for step in range(total)) ** 0.5

    assert distance("w.latent", 3000) == pytest.approx(distance("w.latent", 500), rel=0.1)
    assert distance("w.log_scale", 3000) > 2 * distance("w.log_scale", 500)


def test_codes_rest_earlier_beside_low_rank_factors():
    alone = {"w.log_scale": "scale", "w.latent": "code"}
    beside = alone | {"w.up": "rank"}

    def last(groups, total):
        return max(step for step in range(total) if rates_of(groups, step, total)["w.latent"] > 0)

    assert last(alone, 2000) == 1199 and last(beside, 2000) == 299
    assert last(alone, 300) == last(beside, 300) == 179
    assert last(alone, 150) == last(beside, 150) == 119, "codes need some steps to move at all"
    assert last(alone, 80) == last(beside, 80) == 79


def test_the_first_steps_do_not_depend_on_the_length_of_the_run():
    groups = {"w.log_scale": "scale", "w.latent": "code"}
    for step in range(12):
        assert rates_of(groups, step, None) == rates_of(groups, step, 100) == rates_of(groups, step, 5000)
    assert rates_of(groups, 12, 200)["w.latent"] > rates_of(groups, 12, 5000)["w.latent"] > 0


def test_codes_rest_in_the_last_part_of_a_run(files, data, monkeypatch):
    monkeypatch.setattr("ternary_flux.quantizer.distillation.schedule._CODES_LEAST", 20)
    distiller, _ = make(files, data, codes=True, steps=40)
    latents = {name: p for name, p in distiller.parameters.items() if name.endswith(".latent")}
    seen = []
    for _ in range(40):
        before = {name: p.detach().clone() for name, p in distiller.parameters.items()}
        distiller.advance()
        seen.append(sum(not torch.equal(p, before[name]) for name, p in latents.items()))
        assert not torch.equal(distiller.model.img_in.weight, before["img_in.weight"])
    assert seen == [0] * 12 + [len(latents)] * 12 + [0] * 16


@pytest.mark.parametrize("rank, codes", [(0, False), (4, False), (0, True), (4, True)])
def test_learns_and_writes_what_it_evaluated(files, data, tmp_path, rank, codes):
    distiller, start = make(files, data, rank, codes, steps=48)
    before = measure(distiller.model, data[2]).error
    distill(distiller)
    assert distiller.best_error < 0.8 * before
    save_student(tmp_path / "out.safetensors", distiller.model, start, metadata=start.metadata)
    written = open_ternary(tmp_path / "out.safetensors")
    quality = measure(load_student(written), data[2])
    assert quality.error == pytest.approx(distiller.best_error, rel=1e-5)
    same = all(torch.equal(written.weight(n).trits, start.weight(n).trits) for n in start.layers)
    assert same == (not codes)
    assert all(plan.rank == rank for plan in written.layers.values())
    assert not torch.equal(written.tensor("img_in.weight"), start.tensor("img_in.weight"))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"codes": True, "rank": 4}, {"codes": True, "eight_bit": True}])
def test_an_interrupted_run_resumes_to_the_same_bits(files, data, tmp_path, options):
    through, _ = make(files, data, **options)
    distill(through)
    stopped, _ = make(files, data, **options)

    def stop(row):
        if row["step"] == 13:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        distill(stopped, tmp_path / "run.safetensors", stop)
    assert stopped.step == 13
    resumed, _ = make(files, data, **options)
    distill(resumed, tmp_path / "run.safetensors")
    assert resumed.step == through.step and resumed.log == through.log
    for (name, a), b in zip(through.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_of_other_settings_is_refused(files, data, tmp_path):
    distiller, _ = make(files, data, steps=2)
    distill(distiller)
    distiller.save(tmp_path / "run.safetensors")
    other, _ = make(files, data, steps=2, batch=4)
    with pytest.raises(ValueError, match="other settings"):
        other.resume(tmp_path / "run.safetensors")


def test_recomputing_activations_changes_nothing(files, data):
    kept, _ = make(files, data)
    recomputed, _ = make(files, data, recompute=True)
    assert kept.advance() == recomputed.advance()
    for (name, a), b in zip(kept.model.named_parameters(), recomputed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_accumulated_batches_equal_one_large_batch(files, data):
    large, _ = make(files, data, batch=STATES)
    small, _ = make(files, data, batch=STATES // 3, accumulate=3)
    assert large.advance() == pytest.approx(small.advance(), rel=1e-5)


def test_a_budget_in_seconds_becomes_a_number_of_steps(files, data):
    distiller, _ = make(files, data, steps=None, seconds=1.0)
    distill(distiller)
    assert distiller.total == distiller.step >= 12
    assert distiller.log[-1]["step"] == distiller.total


def test_a_budget_in_seconds_pays_for_evaluations_too(files, data):
    distiller, _ = make(files, data, steps=None, seconds=100.0, evaluate_every=10)
    distiller.evaluation_seconds = distiller.used = 20.0  # as after that of the start
    for _ in range(12):
        distiller.advance()
    assert distiller.total <= 12 + (100 - 2 * 20) / (20 / 10), "thousands of these steps alone would fit"


def test_no_evaluation_shortly_before_the_last(files, data):
    distiller, _ = make(files, data, steps=20, evaluate_every=6)
    distill(distiller)
    assert [row["step"] for row in distiller.log] == [0, 6, 12, 20]


class Clock:
    """Time that passes where the test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.slow
@pytest.mark.parametrize("factor", [3.0, 1 / 3])
def test_a_run_ends_in_time_on_a_machine_that_changes_its_speed(files, data, factor):
    """Steps take a second each in the first half of the time, and three times as long or a third from there on."""
    clock, seconds = Clock(), 60.0
    distiller, _ = make(files, data, clock=clock, steps=None, seconds=seconds, evaluate_every=1000, batch=2)
    learn = distiller.learn

    def timed(batches):
        clock.now += 1.0 if clock.now < seconds / 2 else factor
        return learn(batches)

    distiller.learn = timed
    rows = []
    distill(distiller, on_step=rows.append)
    assert clock.now == pytest.approx(seconds, rel=0.1)
    assert distiller.total == pytest.approx(seconds / 2 + seconds / 2 / factor, rel=0.1)
    assert 2 <= len(distiller.course.legs) <= 4
    assert distiller.course.progress(distiller.step) == 1
    again, _ = make(files, data, steps=distiller.total, course=rows[-1]["course"], evaluate_every=1000, batch=2)
    distill(again)
    assert again.step == distiller.step and [row["error"] for row in again.log] == [
        row["error"] for row in distiller.log
    ]


def test_the_course_of_a_run():
    even = Course([(0, 0.0, 8)])
    assert [even.progress(step) for step in (0, 4, 8)] == [0, 0.5, 1] and even.total(3) == 8
    timed = Course()
    assert timed.total(5) is None and timed.progress(5) == 0 and not timed.knows(0)
    timed.head_for(100, 12)
    timed.head_for(105, 40)  # not worth a turn
    assert timed.legs == [(0, 0.0, 100)]
    timed.head_for(60, 50)
    assert timed.legs[1] == (50, 0.5, 60) and timed.progress(55) == pytest.approx(0.75) and timed.progress(60) == 1
    assert timed.total(49) == 100 and timed.total(50) == 60 and timed.knows(50) and not timed.knows(51)
    assert Course(tuple(leg) for leg in timed.legs).legs == timed.legs


def test_timed_steps_cost_what_steps_with_trained_codes_do(files, data):
    distiller, _ = make(files, data, codes=True, steps=None, seconds=1.0)
    before = {name: p.detach().clone() for name, p in distiller.parameters.items() if name.endswith(".latent")}
    distiller.advance()
    assert before and all(distiller.optimizer.second[name].any() for name in before)
    assert all(torch.equal(distiller.parameters[name], latent) for name, latent in before.items())


def test_lost_conditioning_stops_the_run(files, data):
    distiller, _ = make(files, data)
    distiller.evaluate()
    with torch.no_grad():
        for name in ("txt_in", "vector_in.out_layer"):
            for parameter in (distiller.average[f"{name}.weight"], distiller.average[f"{name}.bias"]):
                parameter.zero_()
    assert distiller.evaluate().response < 1e-6  # once may be chance
    with pytest.raises(Collapse, match="prompts have 0% of the influence"):
        distiller.evaluate()


def test_quality_of_the_teacher_itself(data):
    teacher, _, held_out = data
    quality = measure(teacher, held_out)
    assert quality.error == 0
    assert quality.response == pytest.approx(1) and quality.alignment == pytest.approx(1)
    assert all(error in (0, None) for error in quality.by_timestep)
    assert quality.detail == pytest.approx(1) and quality.by_kind == {}


def test_detail_shows_what_blurs_and_the_error_hardly_does(data):
    """A model whose predicted pictures are blurred, by time, beside one with as much noise."""
    teacher, _, held_out = data
    blurred_t = 0.4

    def blurring(latent, t, *conditions):
        velocity, times = teacher(latent, t, *conditions), t.view(-1, 1, 1, 1)
        picture = latent - times * velocity
        smooth = torch.nn.functional.avg_pool2d(picture, 3, 1, 1)
        return torch.where(times < blurred_t, velocity, (latent - smooth) / times)

    quality = measure(blurring, held_out)
    for number, ratio in enumerate(quality.detail_by_timestep):
        assert ratio is None or (ratio < 0.2 if number >= 10 * blurred_t else ratio == pytest.approx(1))
    assert 0 < quality.detail < 0.8


def test_errors_by_kind_of_prompt(data):
    """Rows of a batch count for the kinds of their prompts."""
    teacher, _, held_out = data
    kinds = [["lettering", "other"] * 4]
    quiet = torch.tensor([0.9, 0.5] * 4).view(-1, 1, 1, 1)
    quality = measure(lambda *inputs: quiet * teacher(*inputs), replace(held_out, kinds=kinds))
    assert quality.by_kind == pytest.approx({"lettering": 0.01, "other": 0.25}, rel=1e-4)


def test_frozen_dense_layers_stay(files, data, tmp_path):
    distiller, start = make(files, data, steps=12, freeze_dense=True)
    before = measure(distiller.model, data[2]).error
    distill(distiller)
    assert distiller.best_error < before
    save_student(tmp_path / "out.safetensors", distiller.model, start, metadata=start.metadata)
    written = open_ternary(tmp_path / "out.safetensors")
    outside = [name for name in start.dense if not name.startswith(("double_blocks", "single_blocks"))]
    assert outside and all(torch.equal(written.tensor(name), start.tensor(name)) for name in outside)
    inside = [name for name in start.dense if name.endswith("img_attn.qkv.bias")]
    assert inside and not any(torch.equal(written.tensor(name), start.tensor(name)) for name in inside)


def test_quality_of_silence(data):
    _, _, held_out = data
    quality = measure(lambda latent, *_: torch.zeros_like(latent), held_out)
    assert quality.error == pytest.approx(1) and quality.response == 0


def test_rates_follow_the_size_of_the_parameters(files, data):
    distiller, _ = make(files, data, rank=2)
    rates = learning_rates(distiller.model, RATES)
    assert rates["single_blocks.0.linear1.log_scale"] == RATES["scale"]
    weight = distiller.model.img_in.weight
    assert rates["img_in.weight"] == pytest.approx(
        RATES["dense"] * float(weight.detach().square().mean().sqrt()), rel=1e-5
    )
    with torch.no_grad():
        weight *= 10
        distiller.model.double_blocks[0].img_attn.proj.up[3] *= 10
        distiller.model.double_blocks[0].img_attn.proj.down[:, 5] *= 10
        distiller.model.final_layer.linear.weight[2] *= 10
    larger = learning_rates(distiller.model, RATES)
    assert larger["img_in.weight"] == pytest.approx(10 * rates["img_in.weight"], rel=1e-5)
    # One channel that is larger than the others changes the rates of no other.
    for name, place in (
        ("double_blocks.0.img_attn.proj.up", (3,)),
        ("double_blocks.0.img_attn.proj.down", (slice(None), 5)),
        ("final_layer.linear.bias", (2,)),
    ):
        grown = larger[name] / rates[name]
        assert grown[place].flatten().tolist() == pytest.approx([10], rel=1e-5)
        grown[place] = 1
        assert torch.allclose(grown, torch.ones(()), rtol=1e-5)


def test_an_epoch_draws_every_state_once(data):
    pool = data[1]
    drawn = torch.cat([pool.draw(i, 8, seed=3).inputs.t for i in range(STATES // 8)])
    assert torch.equal(drawn.sort().values, pool.groups[0].states.t.sort().values)
    again = torch.cat([pool.draw(i + STATES // 8, 8, seed=3).inputs.t for i in range(STATES // 8)])
    assert not torch.equal(drawn, again) and torch.equal(again.sort().values, drawn.sort().values)


def test_batches_of_several_sizes_do_not_mix(data):
    pool = data[1]
    states, velocity = pool.groups[0].states, pool.groups[0].velocity
    wide = States(states.latent.repeat(1, 1, 1, 2)[:16], states.t[:16], states.prompt[:16], None)
    group = LabelledStates(states, velocity)
    both = Pool([group, LabelledStates(wide, velocity[:16])], pool.conditioning)
    shapes = [tuple(both.draw(i, 8, seed=0).inputs.latent.shape) for i in range(8)]
    assert shapes.count((8, 16, 4, 4)) == 6 and shapes.count((8, 16, 4, 8)) == 2


def test_swapping_needs_neighbours():
    x = torch.arange(3.0)[:, None, None]
    assert Inputs(x[..., None], x[:, 0, 0], x).swapped().context.flatten().tolist() == [2, 0, 1]
