"""The node "Ternary FLUX Info"."""

from comfy_api.latest import io, ui

from ..quantizer.files.summary import stated_errors, summarize
from . import files, layout
from .charts import layer_map
from .compat import accepted
from .loader import LoadTernaryFlux, check, explain, stage
from .saving import SavesWeights, is_quantized


class TernaryFluxInfo(io.ComfyNode):
    """Says what a ternary model or file is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TernaryFluxInfo",
            display_name="Ternary FLUX Info",
            category="model",
            description="Says what a ternary FLUX model or file is: layers, bits per weight, backend and why, how it "
            "was made; and shows the error of each layer's weight.",
            inputs=[
                io.Combo.Input("file", options=files.names(), tooltip="The file, where no model is connected."),
                io.Model.Input(
                    "model", optional=True, tooltip="A MODEL, with what LoRAs do to it. In the place of file."
                ),
            ],
            outputs=[
                io.String.Output("text", tooltip="What the model is."),
                io.Image.Output("error_map", tooltip="A cell for each Linear; darker is a larger error."),
            ],
            is_output_node=True,
            **accepted(io.Schema, search_aliases=["inspect", "metadata", "model info", "bits per weight", "ternary"]),
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None):
        return True  # the file is not read where a model is connected

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, **_) -> str:
        return LoadTernaryFlux.fingerprint_inputs(file)

    @classmethod
    def execute(cls, file: str, model=None) -> io.NodeOutput:
        if model is None:
            lines, errors = of_file(file)
        else:
            lines, errors = of_model(model)
        text = "\n".join(lines)
        return io.NodeOutput(text, layer_map(errors, "error of each layer's weight"), ui=ui.PreviewText(text))


def of_file(name: str) -> tuple[list[str], dict[str, float]]:
    """Lines about a file, and the errors that it states. Raises ValueError by the name that people know."""
    try:
        path = files.find(str(name))
        files.READ.add(path)
        opened = check(path)
        first, *lines = summarize(path)
    except (OSError, ValueError) as error:
        raise ValueError(explain(error, name)) from None
    return [first.replace(path, name), *(line.strip() for line in lines), stage(opened.metadata)], stated_errors(
        opened.metadata
    )


def of_model(model) -> tuple[list[str], dict[str, float]]:
    """Lines about a MODEL, and the errors that its file states. Raises ValueError where it is not ternary."""
    modules = [module for module in model.model.modules() if is_quantized(module)]
    ternary = [module.weight for module in modules if layout.is_ternary(module.weight)]
    if not isinstance(model, SavesWeights) or not ternary:
        raise ValueError("this MODEL is not ternary: it does not come from Load Ternary FLUX")
    origin = model.origin()
    bits = sum(tensor.nbytes for weight in ternary for tensor in weight.state_dict("").values()) * 8
    weights = sum(weight.shape[0] * weight.shape[1] for weight in ternary)
    params = ternary[0]._params
    choice = layout.choice_for(model.load_device, params.activations, params.backend)
    patched = len(model.quantized_linears().keys() & model.patches.keys())
    lines = [
        "ternary FLUX model" if origin is None else f"{origin.path.name}: {origin.architecture.name}",
        f"{len(ternary)} ternary layers, {weights / 1e6:,.1f} M weights, {bits / weights:.2f} bits per weight",
        f"{len(modules) - len(ternary)} layers in 8 bits, {patched} layers with patches such as LoRAs",
        f"{choice.activations} activations, backend {choice.backend.NAME} ({choice.reason})",
        f"on {model.load_device}, offloaded to {model.offload_device}",
    ]
    if origin is None:
        return lines, {}
    lines.append(stage(origin.metadata))
    if origin.replaced:
        lines.append("its file was replaced or removed since it was loaded")
    return lines, stated_errors(origin.metadata)
