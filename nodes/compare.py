"""The node "Compare Models": two models from the same noise, and how far their velocities are apart at each step."""

from comfy_api.latest import io, ui
from torch import Tensor

from .charts import curve
from .compat import accepted, core
from .replay import Question, Recorded, replayer

comfy = core()


class CompareModels(io.ComfyNode):
    """Samples with two models and measures the second one along the first one's path."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TernaryFluxCompare",
            display_name="Compare Models",
            category="model/sampling",
            description="Samples two models from the same noise. Gives both results, their difference, and the second "
            "model's velocity error at each step of the first one's path.",
            inputs=[
                io.Model.Input("model", tooltip="The reference, such as the dense model."),
                io.Model.Input("other", tooltip="The model that is judged, such as the ternary one."),
                io.Conditioning.Input("positive", tooltip="What the pictures should show."),
                io.Conditioning.Input("negative", tooltip="Used where cfg is not 1."),
                io.Latent.Input("latent_image", tooltip="The size, or a picture to start from with a lower denoise."),
                io.Vae.Input("vae", tooltip="Decodes the pictures."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of the noise that both models start from.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Steps of the sampler."),
                io.Float.Input(
                    "cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="1 for FLUX, whose guidance is built in."
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=list(comfy.SAMPLER_NAMES),
                    default="euler",
                    tooltip="The sampler of both models.",
                    **accepted(io.Combo.Input, advanced=True),
                ),
                io.Combo.Input(
                    "scheduler",
                    options=list(comfy.SCHEDULER_NAMES),
                    default="simple",
                    tooltip="The noise levels of both models.",
                    **accepted(io.Combo.Input, advanced=True),
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1, part of latent_image is kept.",
                    **accepted(io.Float.Input, advanced=True),
                ),
            ],
            outputs=[
                io.Image.Output("image", tooltip="The pictures of model."),
                io.Image.Output("other_image", tooltip="The pictures of other."),
                io.Image.Output("difference", tooltip="The absolute difference of both."),
                io.Image.Output("error_curve", tooltip="The velocity error at each step."),
                io.String.Output("report", tooltip="The numbers as text."),
            ],
            **accepted(
                io.Schema,
                search_aliases=[
                    "ab test",
                    "side by side",
                    "quantization error",
                    "velocity error",
                    "ternary",
                    "xy plot",
                ],
                has_intermediate_output=True,
            ),
        )

    @classmethod
    def execute(
        cls, model, other, positive, negative, latent_image, vae, seed, steps, cfg, sampler_name, scheduler, denoise
    ) -> io.NodeOutput:
        sampling = model.get_model_object("model_sampling")
        sigmas = comfy.calculate_sigmas(sampling, scheduler, int(steps / denoise))[-(steps + 1) :]
        latent = comfy.fix_empty_latent_channels(model, latent_image["samples"])
        noise = comfy.prepare_noise(latent, seed, latent_image.get("batch_index"))
        path: list[Question] = []

        def sample(patcher, sampler, callback):
            return comfy.sample_custom(
                patcher, noise, cfg, sampler, sigmas, positive, negative, latent, callback=callback, seed=seed,
                noise_mask=latent_image.get("noise_mask"),
            )  # fmt: skip

        show = comfy.prepare_callback(model, steps)
        results = [sample(model, Recorded(comfy.sampler_object(sampler_name), path), show)]
        errors: list[float] = []

        def meet(asked: Question, denoised: Tensor) -> None:
            # Velocities are (x - denoised) / sigma; the sigmas cancel.
            errors.append(_relative((asked.x - asked.denoised).float(), (asked.x - denoised).float()))

        sample(other, replayer(path, meet), None)
        path.clear()
        results.append(sample(other, comfy.sampler_object(sampler_name), comfy.prepare_callback(other, steps)))
        first, second = (_decode(vae, samples) for samples in results)
        difference = (first - second).abs()
        latent_error = _relative(*(samples.float() for samples in results))
        lines = [
            f"velocity error {sum(errors) / len(errors):.4f} (mean of {len(errors)} evaluations)",
            f"largest {max(errors):.4f}, in evaluation {errors.index(max(errors)) + 1}",
            f"difference of the latents {latent_error:.4f}, of the pixels {difference.mean().item():.4f}",
        ]
        report = "\n".join(lines)
        chart = curve(errors, "velocity error at each step", "step of the first model's path")
        return io.NodeOutput(first, second, difference, chart, report, ui=ui.PreviewText(report))


def _relative(reference: Tensor, other: Tensor) -> float:
    """Squared distance of `other` from `reference`, relative to the latter's."""
    return float((other - reference).square().sum() / reference.square().sum().clamp_min(1e-30))


def _decode(vae, samples: Tensor) -> Tensor:
    images = vae.decode(samples)
    return images.reshape(-1, *images.shape[-3:])
