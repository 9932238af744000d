"""Pictures of the teacher: sampler, plan, cache, states."""

import itertools

import pytest
import torch
from ternary_flux.benchmarks import comfyui
from ternary_flux.quantizer.files.architecture import Architecture
from ternary_flux.quantizer.files.container import TensorFile
from ternary_flux.quantizer.pictures import sampler
from ternary_flux.quantizer.pictures.conditioning import Conditioning
from ternary_flux.quantizer.pictures.pool import hold_out, training_pool
from ternary_flux.quantizer.pictures.trajectories import PictureSettings, Trajectories, initial_noise
from ternary_flux.quantizer.pipeline.workspace import choose_device

ARCH = Architecture(1, 128, 1, 1, 16, 16, context_dim=12, vec_dim=5, guidance=True)


def prompts(count: int = 20) -> Conditioning:
    names = tuple(f"prompt {i}" for i in range(count))
    values = torch.arange(count).float()
    return Conditioning(values[:, None, None].expand(count, 3, 12), values[:, None].expand(count, 5), names)


def velocity(latent, t, context, pooled, guidance):
    """Straight to a picture that is all prompt number / 10."""
    picture = pooled[:, :1, None, None] / 10
    return (latent[:, :16] - picture) / t[:, None, None, None]


def make(folder, arch=ARCH, count=20, **settings) -> Trajectories:
    return Trajectories(folder, arch, prompts(count), PictureSettings(**{"sizes": ((64, 96),), **settings}), "teacher")


def latent_of(trajectories: Trajectories, picture) -> torch.Tensor:
    return TensorFile(trajectories.folder / f"{picture.name}.safetensors").tensor("latent")


@pytest.mark.parametrize(("shift", "kind"), [(1.15, "Flux"), (0.0, "FluxSchnell"), (2.02, "Flux2")])
def test_noise_levels_are_comfyuis(shift, kind):
    comfyui.make_importable()
    import comfy.model_sampling
    import comfy.samplers
    import comfy.supported_models

    config = getattr(comfy.supported_models, kind)
    sampling = comfy.model_sampling.ModelSamplingFlux
    if kind == "FluxSchnell":
        sampling = comfy.model_sampling.ModelSamplingDiscreteFlow
    holder = type("Config", (), {"sampling_settings": config.sampling_settings})
    theirs = comfy.samplers.calculate_sigmas(sampling(holder), "simple", 20)
    torch.testing.assert_close(sampler.noise_levels(20, shift).float(), theirs, rtol=1e-3, atol=1e-3)


def test_a_models_own_settings():
    plain = Architecture(1, 3072, 19, 38, 16, 16, context_dim=4096, vec_dim=768, guidance=False)
    flux2 = Architecture(2, 3072, 5, 20, 128, 128, context_dim=7680, vec_dim=None, guidance=False)
    assert [sampler.default_shift(arch) for arch in (ARCH, plain, flux2)] == [1.15, 0.0, 2.02]
    assert [sampler.default_steps(arch) for arch in (ARCH, plain, flux2)] == [20, 4, 4]


def test_sampling_follows_the_velocity():
    conditions = prompts().batch([3, 7]) + (None,)
    noise = torch.randn(2, 16, 4, 4)
    path = list(sampler.sample(velocity, noise, sampler.noise_levels(5, 1.0), ARCH, conditions))
    assert len(path) == 6 and path[0][0] == 1 and path[-1][0] == 0
    assert torch.equal(path[0][1], noise)
    for (t, latent, used), (after, reached, _) in itertools.pairwise(path):
        torch.testing.assert_close(used, velocity(latent, torch.full((2,), t), *conditions))
        torch.testing.assert_close(reached, latent + (after - t) * used)
    torch.testing.assert_close(path[-1][1], torch.tensor([0.3, 0.7])[:, None, None, None].expand(2, 16, 4, 4))


def test_pictures_are_cached_and_continued(tmp_path):
    calls = []

    def counted(latent, *rest):
        calls.append(len(latent))
        return velocity(latent, *rest)

    trajectories = make(tmp_path / "pictures", steps=2, sizes=((64, 64), (32, 64)))
    pictures = trajectories.plan("train", 6)
    trajectories.generate(sampler.one_by_one(counted), pictures[:3], batch=2)
    first = {path: path.read_bytes() for path in trajectories.folder.glob("train-*")}
    assert len(first) == 3
    calls.clear()
    seen = []
    again = make(tmp_path / "pictures", steps=2, sizes=((64, 64), (32, 64)))
    again.generate(sampler.one_by_one(counted), pictures, 2, on_progress=seen.append)
    assert sum(calls) == 2 * 4 and seen[0] == 3 and sum(seen) == 6  # a batch that was cut is painted whole
    assert all(path.read_bytes() == data for path, data in first.items())
    trajectories.generate(sampler.one_by_one(counted), pictures)
    assert sum(calls) == 2 * 4
    for picture in pictures:
        latent = latent_of(trajectories, picture)
        assert latent.shape == picture.shape
        torch.testing.assert_close(latent, torch.full(picture.shape, picture.prompt / 10))


def test_pictures_do_not_depend_on_batches_and_how_many_run_together(tmp_path):
    ways = [(1, 1), (3, 1), (2, 2), (1, 5)]
    made = [make(tmp_path / f"{way}", steps=2, sizes=((64, 96), (32, 64))) for way in ways]
    for (batch, together), trajectories in zip(ways, made, strict=True):
        velocities = sampler.one_by_one(lambda latent, *_: 0.1 * latent)
        trajectories.generate(velocities, trajectories.plan("train", 5), batch, together)
    for picture in made[0].plan("train", 5):
        first, *others = [(trajectories.folder / f"{picture.name}.safetensors").read_bytes() for trajectories in made]
        assert all(other == first for other in others)


def test_held_out_states_do_not_depend_on_how_many_run_together(tmp_path):
    alone, together = (
        hold_out(
            sampler.one_by_one(velocity),
            make(tmp_path / f"pictures-{number}", count=60, steps=12),
            6,
            folder=tmp_path / str(number),
            batch=2,
            together=number,
        )
        for number in (1, 2)
    )
    assert len(alone.batches) == 3 * 6 and len(alone.swapped) == 18
    for one, other in zip(alone.batches, together.batches, strict=True):
        assert torch.equal(one.velocity, other.velocity) and torch.equal(one.inputs.latent, other.inputs.latent)
    assert all(map(torch.equal, alone.swapped, together.swapped))


def test_other_settings_or_models_are_refused(tmp_path):
    make(tmp_path, steps=3)
    with pytest.raises(ValueError, match="steps is 3, not 4"):
        make(tmp_path, steps=4)
    with pytest.raises(ValueError, match="model is teacher, not another"):
        Trajectories(tmp_path, ARCH, prompts(), PictureSettings(((64, 96),), steps=3), "another")
    with pytest.raises(ValueError, match="prompts"):
        make(tmp_path, count=19, steps=3)


def test_held_out_prompts_are_never_painted_for_training(tmp_path):
    trajectories = make(tmp_path, guidance=(2.5, 4.0))
    train, held = trajectories.plan("train", 100), trajectories.plan("holdout", 5)
    assert not {p.prompt for p in train} & {p.prompt for p in held}
    assert len({p.prompt for p in train}) == 18 and len({p.prompt for p in held}) == 2
    assert len({p.seed for p in train + held}) == 105
    assert {p.guidance for p in train} == {2.5, 4.0}
    assert trajectories.plan("train", 10) == train[:10]


def test_few_pictures_show_prompts_from_all_of_the_list(tmp_path):
    trajectories = make(tmp_path, count=200)
    chosen = [p.prompt for p in trajectories.plan("train", 20)]
    assert len(set(chosen)) == 20
    assert all(any(part * 50 <= prompt < part * 50 + 50 for prompt in chosen) for part in range(4))


def test_one_prompt_serves_both(tmp_path):
    trajectories = make(tmp_path, count=1)
    assert trajectories.plan("train", 1)[0].prompt == trajectories.plan("holdout", 1)[0].prompt == 0


def painted(folder, pictures: int, **settings) -> tuple[Trajectories, list]:
    trajectories = make(folder, **{"steps": 12, "sizes": ((64, 64), (32, 64)), **settings})
    plan = trajectories.plan("train", pictures)
    trajectories.generate(sampler.one_by_one(velocity), plan)
    return trajectories, plan


def test_half_of_the_states_are_those_that_the_sampler_passed(tmp_path):
    trajectories, plan = painted(tmp_path, 4)
    levels = sampler.noise_levels(12, trajectories.shift).float()
    ways = {}  # (prompt, time) -> every state that was passed there
    for picture in plan:
        noise = initial_noise([picture])
        for t, latent, _ in sampler.sample(velocity, noise, levels.double(), ARCH, trajectories.conditions([picture])):
            ways.setdefault((picture.prompt, round(t, 4)), []).append(latent[0])
    passed = fresh = 0
    times = []
    for group in trajectories.states(plan, 40, seed=3):
        for latent, t, prompt in zip(group.latent, group.t, group.prompt, strict=True):
            way = ways.get((int(prompt), round(float(t), 4)))
            if way is not None:
                assert any(torch.allclose(latent, state, rtol=1e-2, atol=1e-2) for state in way)
                passed += 1
                times.append((int(prompt), float(t)))
            else:
                noise = (latent - (1 - t) * prompt / 10) / t
                assert noise.std().item() == pytest.approx(1, abs=0.1) and noise.mean().abs() < 0.15
                fresh += 1
    assert passed == fresh == 20
    assert len(set(times)) == 20, "a state that was passed is used once"
    assert {round(t, 4) for _, t in times} <= {round(float(t), 4) for t in levels[:-1]}


def test_velocities_come_with_the_states_that_were_passed(tmp_path):
    trajectories, plan = painted(tmp_path, 4)
    levels = sampler.noise_levels(12, trajectories.shift).float()
    for plain, group in zip(trajectories.states(plan, 40), trajectories.labelled_states(plan, 40), strict=True):
        assert torch.equal(plain.latent, group.states.latent)
        assert torch.equal(group.known, torch.isin(plain.t, levels))
        theirs = velocity(*plain.inputs(slice(None), trajectories.conditioning))
        torch.testing.assert_close(group.velocity[group.known], theirs[group.known], rtol=1e-2, atol=1e-2)


def test_the_teacher_answers_for_fresh_noise_only_and_only_once(tmp_path):
    trajectories, plan = painted(tmp_path / "pictures", 4)
    asked, counted = [], []

    def teacher(latent, *rest):
        asked.append(len(latent))
        return velocity(latent, *rest)

    pools = [
        training_pool(
            sampler.one_by_one(teacher),
            trajectories,
            plan,
            count=40,
            folder=tmp_path / "velocities",
            on_progress=counted.append,
        )
        for _ in "ab"
    ]
    assert sum(asked) == 20 and sum(counted) == 2 * 40
    for group, again in zip(*(pool.groups for pool in pools), strict=True):
        assert torch.equal(group.velocity, again.velocity)
        theirs = velocity(*group.states.inputs(slice(None), trajectories.conditioning))
        torch.testing.assert_close(group.velocity, theirs, rtol=1e-2, atol=1e-2)


def test_few_states_are_spread_over_the_path(tmp_path):
    trajectories, plan = painted(tmp_path, 32, sizes=((64, 64),))
    levels = sampler.noise_levels(12, trajectories.shift).float()
    (group,) = trajectories.states(plan, 32)
    passed = torch.isin(group.t, levels)
    assert passed.sum() == 16
    assert len(group.t[passed].unique()) >= 8


def test_more_states_than_were_kept_get_fresh_noise(tmp_path):
    trajectories, plan = painted(tmp_path, 2, steps=2)
    groups = trajectories.states(plan, 20)
    passed = [torch.isin(group.t, sampler.noise_levels(2, trajectories.shift).float()).sum().item() for group in groups]
    assert sum(passed) == 2 * 2
    assert all(torch.isfinite(group.latent).all() for group in groups)


def test_states_are_the_same_every_time(tmp_path):
    trajectories, plan = painted(tmp_path, 4)
    groups, again = trajectories.states(plan, 40, seed=3), trajectories.states(plan, 40, seed=3)
    assert sum(len(group) for group in groups) == 40 and len(groups) == 2
    assert all(torch.equal(a.latent, b.latent) and torch.equal(a.t, b.t) for a, b in zip(groups, again, strict=True))
    assert not torch.equal(groups[0].latent, trajectories.states(plan, 40, seed=4)[0].latent)
    for group in groups:
        assert torch.equal(group.guidance, torch.full((len(group),), 3.5))
    latent, t, context, pooled, guidance = groups[0].inputs(slice(0, 2), trajectories.conditioning)
    assert latent.shape[0] == t.shape[0] == context.shape[0] == pooled.shape[0] == guidance.shape[0] == 2


def test_times_with_fresh_noise_are_spread_evenly_and_around_the_shift():
    times = sampler.draw_times(4001, 1.15)
    assert times.min() > 0 and times.max() <= 1
    ordered = times.sort().values
    around = torch.special.ndtr(torch.logit(ordered.double()) - 1.15)
    torch.testing.assert_close((ordered + around) / 2, torch.linspace(0, 1, 4001).double(), atol=2e-3, rtol=0)
    assert torch.corrcoef(torch.stack([times, torch.arange(4001.0)]))[0, 1].abs() < 0.1
    assert sampler.draw_times(1, 0.0).shape == (1,) and sampler.draw_times(0, 0.0).shape == (0,)


def test_states_cover_every_time_whatever_the_shift(tmp_path):
    """Image to image visits the times that a shifted schedule hurries through."""
    trajectories, plan = painted(tmp_path, 4, shift=2.02)
    times = torch.cat([group.t for group in trajectories.states(plan, 80)])
    assert sampler.noise_levels(4, 2.02)[-2] > 0.7
    assert torch.histc(times, 5, 0, 1).min() >= 3


def test_inpainting_and_control_models_get_their_channels():
    fill = Architecture(1, 128, 1, 1, 96, 16, context_dim=12, vec_dim=5, guidance=True)
    full = sampler.with_control_channels(torch.ones(2, 16, 4, 6), fill)
    assert full.shape == (2, 96, 4, 6)
    assert not full[:, 16:32].any() and full[:, 32:].eq(1).all()
    control = Architecture(1, 128, 1, 1, 32, 16, context_dim=12, vec_dim=5, guidance=True)
    assert not sampler.with_control_channels(torch.ones(2, 16, 4, 6), control)[:, 16:].any()


def test_sizes():
    assert sampler.parse_sizes("1024x1024,832X1216") == ((1024, 1024), (832, 1216))
    assert sampler.latent_shape(ARCH, (832, 1216)) == (16, 152, 104)
    flux2 = Architecture(2, 128, 1, 1, 128, 128, context_dim=12, vec_dim=None, guidance=False)
    assert sampler.latent_shape(flux2, (832, 1216)) == (128, 76, 52)
    for text in ("1024", "axb", "1x2x3", ""):
        with pytest.raises(ValueError, match="form 1024x1024"):
            sampler.parse_sizes(text)
    with pytest.raises(ValueError, match="multiples of 16"):
        sampler.latent_shape(ARCH, (1000, 1024))
    with pytest.raises(ValueError, match="8208 pixels are too many, 8192"):
        sampler.parse_sizes("8208x1024")


def test_devices_that_do_not_compute():
    for name in ("meta", "cuda:99", "nonsense"):
        with pytest.raises(ValueError, match=f"device '{name}' cannot be used"):
            choose_device(name)


def test_broken_teachers_are_noticed(tmp_path):
    trajectories = make(tmp_path, steps=1)
    with pytest.raises(ValueError, match="not finite"):
        nothing = sampler.one_by_one(lambda latent, *_: latent * torch.nan)
        trajectories.generate(nothing, trajectories.plan("train", 1))
    assert not list(trajectories.folder.glob("train-*"))
