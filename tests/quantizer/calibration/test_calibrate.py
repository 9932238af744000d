"""Calibration of tiny FLUX.1 and FLUX.2 models with random weights."""

import hashlib
from copy import deepcopy
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from ternary_flux.quantizer.calibration import calibrate
from ternary_flux.quantizer.calibration.calibrate import CalibrationSettings
from ternary_flux.quantizer.calibration.columns import EXPONENTS
from ternary_flux.quantizer.calibration.sensitivity import rounded
from ternary_flux.quantizer.calibration.streams import STUDENT, TEXT_IMPORTANCE, Streams, inputs_of, many_vectors
from ternary_flux.quantizer.files.architecture import Architecture
from ternary_flux.quantizer.files.checkpoint import open_checkpoint
from ternary_flux.quantizer.files.precision import precisions_of
from ternary_flux.quantizer.files.ternary import open_ternary
from ternary_flux.quantizer.model.flux import Flux, Part, Tier
from ternary_flux.quantizer.model.teacher import Placement, Teacher
from ternary_flux.quantizer.pictures import trajectories
from ternary_flux.quantizer.pictures.conditioning import Conditioning
from ternary_flux.quantizer.report.statistics import stated_statistics, statistics_table
from ternary_flux.quantizer.rounding.round import round_checkpoint

MODELS = {
    1: Architecture(1, 128, 1, 1, 16, 16, context_dim=12, vec_dim=5, guidance=True),
    2: Architecture(2, 128, 1, 1, 128, 128, context_dim=12, vec_dim=None, guidance=False),
}


class Case:
    def __init__(self, version: int, folder):
        arch = MODELS[version]
        generator = torch.Generator().manual_seed(version)
        self.folder, self.path = folder, folder / "dense.safetensors"
        weights = {}
        for name, shape in arch.shapes.items():
            values = torch.randn(shape, generator=generator)
            norm = name.endswith("scale")
            weights[name] = values.abs() if norm else values * (2 * shape[-1] ** -0.5 if values.ndim == 2 else 0.1)
        safetensors.torch.save_file(weights, self.path)
        names = tuple(f"prompt {i}" for i in range(10))
        pooled = torch.randn(10, 5, generator=generator) if version == 1 else None
        self.conditioning = Conditioning(torch.randn(10, 3, 12, generator=generator), pooled, names)
        self.teacher = Teacher(open_checkpoint(self.path))
        sizes = ((64, 64), (32, 64)) if version == 1 else ((64, 64), (48, 64))
        settings = trajectories.PictureSettings(sizes, steps=2)
        self.trajectories = trajectories.Trajectories(folder / "pictures", arch, self.conditioning, settings, "random")
        pictures = self.trajectories.plan("train", 6)
        self.trajectories.generate(self.teacher.velocities, pictures)
        self.states = self.trajectories.states(pictures, 24)

    def run(self, name: str, work: str, **arguments):
        settings = CalibrationSettings(batch=4, sweeps=1, **({"exponents": ()} | arguments))
        target = self.folder / f"{name}.safetensors"
        report = calibrate.calibrate(
            self.teacher, self.states, self.conditioning, target=target, folder=self.folder / work, settings=settings
        )
        return target, report

    def error(self, path) -> float:
        """Relative squared velocity error of a ternary file on the calibration states."""
        file = open_ternary(path)
        model = Flux(file.architecture)
        model.load_state_dict({name: file.parameter(name).float() for name in file.architecture.shapes})
        error = power = 0.0
        for group in self.states:
            inputs = group.inputs(slice(None), self.conditioning)
            theirs = self.teacher(*inputs)
            with torch.no_grad():
                error += (model(*inputs) - theirs).square().sum().item()
            power += theirs.square().sum().item()
        return error / power


@pytest.fixture(scope="module", params=[1, 2], ids=["flux1", "flux2"])
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("calibrate"))


def test_is_better_than_rounding(case):
    path, report = case.run("calibrated", "work", exponents=EXPONENTS)
    file = open_ternary(path)
    arch = case.teacher.arch
    assert file.architecture == arch and set(file.layers) == set(arch.linears)
    assert {f"{block}.{name}" for block, b in report.items() for name in b.layers} == set(arch.linears)
    rounded = case.folder / "rounded.safetensors"
    round_checkpoint(case.path, rounded)
    assert case.error(path) < 0.8 * case.error(rounded)
    assert file.metadata["ternary.method"] == "calibrate"
    assert file.metadata["ternary.source_sha256"] == hashlib.sha256(case.path.read_bytes()).hexdigest()
    assert not (case.folder / "work" / "activations").exists()


def test_the_final_linear_makes_up_for_the_blocks(case):
    path, _ = case.run("refitted", "refitted-work")
    frozen, _ = case.run("frozen", "frozen-work", freeze_dense=True)
    assert case.error(path) < 0.9 * case.error(frozen)
    original, files = case.teacher.checkpoint, [open_ternary(p) for p in (path, frozen)]
    assert files[0].file.entries.keys() == files[1].file.entries.keys()
    for name in files[1].dense:
        if name.removesuffix(".bias") not in files[1].layers:
            assert torch.equal(files[1].tensor(name), original.tensor(name).bfloat16())
            changed = not torch.equal(files[0].tensor(name), files[1].tensor(name))
            assert changed == name.startswith("final_layer.linear."), name


def test_a_linear_whose_inputs_have_outliers_gets_full_activations(case, tmp_path):
    """One hidden unit of an MLP that is far larger than all others, as FLUX has them; mlp.2 makes up for it."""
    state = safetensors.torch.load_file(case.path)
    single = "single_blocks.0"
    hidden = case.teacher.arch.hidden
    if case.teacher.arch.version == 1:
        state["double_blocks.0.img_mlp.0.weight"][3] *= 3000
        state["double_blocks.0.img_mlp.2.weight"][:, 3] /= 3000
        marked = "double_blocks.0.img_mlp.2"
    else:
        state[f"{single}.linear1.weight"][-5] *= 3000
        state[f"{single}.linear2.weight"][:, -5] /= 3000
        marked = f"{single}.linear2"
    assert state[f"{single}.linear1.weight"].shape[1] == hidden
    safetensors.torch.save_file(state, tmp_path / "dense.safetensors")
    settings = CalibrationSettings(batch=4, sweeps=1, exponents=())
    target = tmp_path / "target.safetensors"
    fits = calibrate.calibrate(
        Teacher(open_checkpoint(tmp_path / "dense.safetensors")),
        case.states,
        case.conditioning,
        target=target,
        folder=tmp_path / "work",
        settings=settings,
    )
    file = open_ternary(target)
    full = {name for name, plan in file.layers.items() if plan.full_precision}
    assert marked in full and len(full) < len(file.layers)
    block, _, linear = marked.partition(".0.")
    seen = fits[f"{block}.0"].statistics[linear]
    stated = stated_statistics(file)
    assert stated.keys() == set(file.layers)
    assert stated[marked]["crest"] == pytest.approx(seen.crest, rel=0.01) and seen.largest_two > 0.9
    noise = {name: values["int8_noise"] for name, values in stated.items()}
    assert noise[marked] > 5 * sorted(noise.values())[len(noise) // 2]
    table = statistics_table(file)
    assert sum(line.endswith("     1") for line in table) == len(full) and len({len(line) for line in table}) == 1


def some_precisions(case) -> dict[str, str]:
    """The first Linear in 8 bits, the last one in two terms."""
    return {case.teacher.arch.linears[0]: "int8", case.teacher.arch.linears[-1]: "two-terms"}


@pytest.mark.slow
@pytest.mark.parametrize("mixed", [False, True])
def test_an_interrupted_run_gives_the_same_file(case, tmp_path, mixed):
    precisions = some_precisions(case) if mixed else {}

    class Stop(Exception):
        pass

    def stop(name, report):
        raise Stop

    path = tmp_path / "resumed.safetensors"
    arguments, places = (case.teacher, case.states, case.conditioning), {"target": path, "folder": tmp_path / "resumed"}
    settings = CalibrationSettings(batch=4, sweeps=1, exponents=(), precisions=precisions)
    with pytest.raises(Stop):
        calibrate.calibrate(*arguments, **places, settings=settings, on_block=stop)
    assert not path.exists()
    done = []
    resumed = calibrate.calibrate(*arguments, **places, settings=settings, on_block=lambda name, _: done.append(name))
    first, report = case.run(f"again-{mixed}", f"once-{mixed}", precisions=precisions)
    assert report == resumed and done == list(case.teacher.arch.block_names)
    files = [open_ternary(p) for p in (path, first)]
    assert files[0].file.entries == files[1].file.entries
    assert all((files[0].file.bytes(key) == files[1].file.bytes(key)).all() for key in files[0].file.entries)
    with pytest.raises(ValueError, match="its batch is 4, not 8"):
        calibrate.calibrate(*arguments, **places, settings=replace(settings, batch=8), overwrite=True)
    with pytest.raises(FileExistsError):
        calibrate.calibrate(*arguments, **places, settings=settings)


@pytest.mark.slow
def test_low_rank_factors_and_packing(case):
    path, report = case.run("rank", "rank", rank=8, packing="base3", exponents=(0.0,))
    weight = open_ternary(path).weight("single_blocks.0.linear1")
    assert weight.up.shape == (weight.shape[0], 8) and weight.down.shape == (8, weight.shape[1])
    plain = case.run("plain", "plain", exponents=(0.0,))[1]
    for block, found in report.items():
        for name, layer in found.layers.items():
            assert layer.output_error < 1.02 * plain[block].layers[name].output_error, f"{block}.{name}"


def test_the_teacher_reads_blocks_when_they_are_needed(case):
    streaming = Teacher(open_checkpoint(case.path), placement=Placement(False, 0))
    inputs = case.states[0].inputs(slice(0, 3), case.conditioning)
    dense = Flux(case.teacher.arch)
    dense.load_state_dict(safetensors.torch.load_file(case.path))
    with torch.no_grad():
        expected = dense(*inputs)
    for teacher in (streaming, case.teacher):
        torch.testing.assert_close(teacher(*inputs), expected)
    assert not streaming._blocks and len(case.teacher._blocks) == 2


def test_stages_have_every_linear_once_and_in_order(case):
    arch = case.teacher.arch
    order = {"double": ["attn.qkv", "attn.proj", "mlp.0", "mlp.2"], "single": ["linear1", "linear2"]}
    modulation = {"double": ["mod.lin"], "single": ["modulation.lin"]}
    for name in arch.block_names:
        kind, tiers = name.split("_")[0], [tier for part in case.teacher.block(name).parts for tier in part.tiers]
        flat = [linear for tier in tiers for linear in tier.linears]
        assert sorted(flat) == sorted(arch.block_linears(name))
        first = [tier.linears[0].removeprefix("img_") for tier in tiers]
        assert first == (modulation[kind] if arch.version == 1 else []) + order[kind]


def test_gates_are_those_of_the_branch_that_a_linear_is_in(case):
    """Another output of a Linear that adds to the tokens changes them by its gate, and nothing else."""
    with torch.inference_mode():
        for name in case.teacher.arch.block_names:
            block = deepcopy(case.teacher.block(name))
            tokens = case.teacher.prepare(case.states[0].inputs(slice(0, 2), case.conditioning))
            gates = block.gates(tokens)
            tiers = [(part, tier) for part in block.parts for tier in part.tiers]
            assert set(gates) == {linear for _, t in tiers if t.role != "modulate" for linear in t.linears}
            for part, tier in ((part, tier) for part, tier in tiers if tier.role == "add"):
                for linear in tier.linears:
                    run = part.of(block)
                    before = block.stream(linear, run(tokens))
                    handle = block.get_submodule(linear).register_forward_hook(lambda _, inputs, output: output + 1)
                    changed = block.stream(linear, run(tokens)) - before
                    handle.remove()
                    torch.testing.assert_close(changed, gates[linear].expand_as(changed), rtol=1e-3, atol=1e-4)


def test_moments_are_of_what_the_linears_get(case):
    with torch.inference_mode():
        streams = Streams(case.teacher, case.states, case.conditioning, case.folder / "streams", batch=5)
        block = case.teacher.block("double_blocks.0")
        names = ("img_mlp.0", "txt_mlp.0")
        part = Part("forward", (Tier(names, "inner"),))
        moments = streams.moments(block, block, part, part.tiers[0])
        tokens = streams.groups[0].tokens(case.teacher.stem, slice(0, 5), 0)
        seen = inputs_of(block, names, tokens, part)
    assert {name: x.shape[-1] for name, x in seen.items()} == {name: 128 for name in names}
    count = sum(len(group) * group.latent.shape[2] * group.latent.shape[3] for group in case.states)
    assert moments["img_mlp.0"].tokens == count // case.teacher.arch.patch_size**2
    assert moments["txt_mlp.0"].tokens == 24 * 3
    assert not moments["img_mlp.0"].shift.any()
    streams.remove()
    assert not (case.folder / "streams").exists()


def test_text_counts_less_beside_images_and_not_at_all_at_the_end(case):
    """Moments of a single block's Linears, by hand; image tokens count by the square of the gate."""
    block, importances = case.teacher.block("single_blocks.0"), {"linear1": TEXT_IMPORTANCE, "linear2": 0.0}
    with torch.inference_mode(), Streams(case.teacher, case.states, case.conditioning, case.folder / "last") as streams:
        (part,) = block.parts
        for tier in part.tiers:
            for linear in importances.keys() & set(tier.linears):
                found = streams.moments(block, block, part, tier, last=True)[linear]
                second = torch.zeros_like(found.second)
                for group in streams.groups:
                    tokens = group.tokens(case.teacher.stem, slice(None), STUDENT)  # the teacher's are behind linear2
                    x, gate = inputs_of(block, [linear], tokens, part)[linear], block.gates(tokens)[linear]
                    for some, weight in ((x[:, 3:], 1.0), (x[:, :3], importances[linear])):
                        power = gate.square().mean(2, keepdim=True)
                        second += weight * ((power * some).flatten(0, 1).t() @ some.flatten(0, 1)).double()
                assert (found.second - second).norm() < 1e-4 * second.norm()


@pytest.mark.parametrize("kind", ["double_blocks", "single_blocks"])
def test_at_the_end_errors_count_by_what_the_final_layer_makes_of_them(case, kind):
    """The metric of the last Linears' outputs against small changes of them that go through the final layer."""
    name = next(name for name in reversed(case.teacher.arch.block_names) if name.startswith(kind))
    block, final, generator = case.teacher.block(name), case.teacher.stem.final_layer, torch.Generator().manual_seed(0)
    with torch.inference_mode(), Streams(case.teacher, case.states, case.conditioning, case.folder / "end") as streams:
        part = block.parts[-1]
        tier = part.tiers[-1]
        before = [group.tokens(case.teacher.stem, slice(None), STUDENT) for group in streams.groups]
        found = streams.moments(block, block, part, tier, last=True)
        linear = next(linear for linear in tier.linears if not linear.startswith("txt_"))
        assert all(moments.metric is None for other, moments in found.items() if other != linear)
        ratios = []
        for _ in range(8):
            error, power = 1e-3 * torch.randn(block.get_submodule(linear).out_features, generator=generator), 0.0
            for tokens in before:
                after = part.of(block)(tokens)
                gate = block.gates(tokens)[linear]
                moved = final(after.img + gate * error, tokens.vec) - final(after.img, tokens.vec)
                power += float(moved.double().square().sum())
            ratios.append(float(error.double() @ found[linear].metric @ error.double()) / power)
    # A change of all channels alike, or along the token itself, is taken away by the layer norm.
    assert 1 <= sum(ratios) / len(ratios) < 1.1
    with torch.inference_mode(), Streams(case.teacher, case.states, case.conditioning, case.folder / "end") as streams:
        assert all(m.metric is None for m in streams.moments(block, block, part, tier).values())


def test_the_teacher_goes_through_each_block_once(case):
    """For all tiers and for what comes after; several times it would be most of what calibration computes."""
    last = {"double": "img_mlp.2", "single": "linear2"}
    calls = dict.fromkeys(case.teacher.arch.block_names, 0)

    def count(name: str):
        linear = case.teacher.block(name).get_submodule(last[name.split("_")[0]])

        def hook(module, inputs, _) -> None:
            calls[name] += module is linear and inputs[0].shape[1] > 1  # copies of the block have the hook too

        return linear.register_forward_hook(hook)

    handles = [count(name) for name in calls]
    case.run("once", "once-work")
    for handle in handles:
        handle.remove()
    batches = sum(-(-len(group) // 4) for group in case.states)
    assert calls == dict.fromkeys(calls, batches)


def test_the_largest_linear_gets_enough_tokens():
    arch = MODELS[1]
    assert calibrate.enough_states(arch, 16) == 32 * 128 * 5 // 16
    assert calibrate.enough_states(arch, 10_000) == 256


def test_vectors_combine_times_prompts_and_guidance(case):
    if case.teacher.arch.version == 2:
        assert case.teacher.arch.block_linears("double_blocks.0").keys().isdisjoint({"img_mod.lin"})
        return
    vectors = many_vectors(case.teacher, case.states, case.conditioning, 100)
    assert vectors.shape == (100, 128)
    assert len(vectors.unique(dim=0)) > 2 * sum(len(group) for group in case.states)


@pytest.mark.slow
def test_linears_of_other_precisions(case):
    precisions = some_precisions(case)
    (int8, terms), (target, _) = precisions, case.run("precisions", "precisions-work", precisions=precisions)
    file = open_ternary(target)
    assert precisions_of(file) == precisions and file.int8 == (int8,)
    assert [name for name, plan in file.layers.items() if plan.terms == 2] == [terms]
    dense = case.teacher.checkpoint.tensor(f"{int8}.weight")
    assert torch.equal(file.parameter(f"{int8}.weight").float(), rounded(dense, "int8"))
    plain, _ = case.run("all-ternary", "all-ternary")
    assert case.error(target) < 0.95 * case.error(plain)
