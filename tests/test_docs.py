"""Code in the documentation runs, its numbers are the measured ones, and its links lead somewhere."""

import importlib.util
import json
import re

import pytest
import torch
from ternary_flux.benchmarks.quality import table
from ternary_flux.ops import TernaryWeight
from ternary_flux.ops.backends.triton import configs
from ternary_flux.quantizer.files.layer import LayerPlan
from ternary_flux.quantizer.files.ternary import create_ternary

import _pack

DOCS = sorted(f"docs/{path.name}" for path in (_pack.ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("packing", ["planes32", "base3"])
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("k", [100, 300])
@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("column", [None, torch.bfloat16, torch.float32])
def test_the_formats_numpy_decoder(tmp_path, packing, grouped, k, terms, column):
    (source,) = re.findall(
        r"```python\n(.*?)```", (_pack.ROOT / "docs" / "format.md").read_text(encoding="utf-8"), re.DOTALL
    )
    (tmp_path / "decoder.py").write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("decoder", tmp_path / "decoder.py")
    decoder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(decoder)
    codes = torch.randint(-1, 2, (6, terms * k), dtype=torch.int8)
    group = torch.randint(1, 128, (terms * -(-k // 128), 6), dtype=torch.uint8) if grouped else None
    column = None if column is None else torch.rand(k).to(column)
    weight = TernaryWeight.from_codes(codes, torch.rand(6), group, terms=terms, column=column)
    path = tmp_path / "one.safetensors"
    with create_ternary(path, {"layer": LayerPlan.of(weight, packing)}, {}, {}) as writer:
        writer.layer("layer", weight)
    assert torch.equal(torch.from_numpy(decoder.dense_weight(str(path), "layer")), weight.dequantize())


def text(*path: str) -> str:
    return _pack.ROOT.joinpath(*path).read_text(encoding="utf-8")


def results(name: str):
    return json.loads(text("benchmarks", "results", name))


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("quality.json", table.lines),
        ("quality-stressed-quick.json", table.stressed_lines),
        ("quality-flux2-stressed-quick.json", table.stressed_lines),
    ],
)
def test_the_tables_of_quality(name, of):
    page = text("docs", "quality.md").split("\n")
    assert [line for line in of(results(name)["models"]) if line not in page] == []


def test_what_the_readme_says_of_pictures():
    rows = {row["name"]: row["accuracy"]["overall"][0] for row in results("quality.json")["models"]}
    names = "original, bf16", "ternary, least squares", "calibrated", "distilled: codes"
    shares = [f"{rows[name]:.0%}".replace("%", " %") for name in names]
    said = "{} of the pictures, with weights that were only rounded {}, calibrated {}, calibrated and trained {}"
    assert said.format(*shares) in " ".join(text("README.md").split())


def test_the_kernels_measured_times():
    def faster(ours: str, theirs: str, *layers: str, tokens: int = 4608) -> list[float]:
        """How many times faster, for these layers, or the least and the most of all, in one run."""
        times: dict[tuple[str, int], dict[str, float]] = {}
        for row in results(f"kernels{'-gemlite' * ('gemlite' in theirs)}-NVIDIA-H200.json")["rows"]:
            if "seconds" in row:
                times.setdefault((row["layer"], row["m"]), {})[row["method"]] = row["seconds"]
        found = {name: by[theirs] / by[ours] for (name, m), by in times.items() if m == tokens and theirs in by}
        return [found[f"single {layer}"] for layer in layers] or [min(found.values()), max(found.values())]

    bf16, a8w158, a16w2 = "bf16 F.linear", "gemlite A8W158", "gemlite A16W2 g128 fp16"
    both = ("linear1", "linear2")
    expected = {
        "`full`: dequantize + matmul, with bf16": faster("ours full, dequantize + matmul", bf16),
        "`full`: the fused kernel, with bf16": faster("ours full, fused kernel", bf16),
        "`full`: the fused kernel, 1 token, with bf16": faster("ours full, fused kernel", bf16, tokens=1),
        "int8, row scales, with bf16: linear1, linear2": faster("ours int8, row scales", bf16, *both),
        "int8, group scales, with bf16: linear1, linear2": faster("ours int8, group scales", bf16, *both),
        "int8, group scales, 1 token, with bf16: linear1": faster("ours int8, group scales", bf16, "linear1", tokens=1),
        "int8, group scales, with gemlite's int8 (A8W158), earlier": faster("ours int8, group scales", a8w158),
        "int8, group scales, with gemlite's A16W2 in groups of 128, earlier": faster("ours int8, group scales", a16w2),
        "`full`, with gemlite's A16W2 in groups of 128, earlier": faster("ours full, group scales", a16w2),
        "e4m3, row scales, with bf16: linear1, linear2": faster("ours e4m3, row scales", bf16, *both),
    }
    transformer = results("transformer-FLUX.1-dev-NVIDIA-H200.json")
    steps = {mode: row["sizes"] for mode, row in transformer["modes"].items()}
    for pixels in ("1024", "512"):
        bf16_step, step = steps["bf16"][pixels], steps["int8"][pixels]
        name = f"FLUX.1 [dev] step at {pixels} pixels, int8, with bf16"
        expected[name] = [bf16_step["step"] / step["step"]]
        graphs = [transformer["graphs"][mode][pixels]["graph"] for mode in ("bf16", "int8")]
        name = f"FLUX.1 [dev] step at {pixels} pixels from a CUDA graph, int8, with bf16"
        expected[name] = [graphs[0] / graphs[1]]
    page = text("docs", "kernels.md")
    rows = dict(re.findall(r"^\| (.+?) \| [^|]*\| (.+?) \|$", page, re.MULTILINE))
    for name, ratios in expected.items():
        stated = [float(number) for number in re.findall(r"([\d.]+)x(?! less)", rows[name])]
        digits = len(re.search(r"\.(\d+)x", rows[name]).group(1))
        rounded = [round(ratio, digits) for ratio in ratios]
        assert stated == rounded or (len(set(rounded)) == 1 and stated == rounded[:1]), name
    assert f"{steps['bf16']['1024']['peak'] / steps['int8']['1024']['peak']:.1f}x less memory" in page
    readme = text("README.md")
    for pixels in ("1024", "512"):
        ours, theirs = (f"{steps[mode][pixels]['step']:.3f} s" for mode in ("int8", "bf16"))
        assert re.search(rf"{re.escape(ours)} instead of\s+{re.escape(theirs)}", readme)


def test_the_checks_on_a_gpu():
    checks, page = results("checks-NVIDIA-H200.json"), text("docs", "kernels.md")
    kernels = checks["kernels"]
    assert kernels["wrong"] == 0 and f"{kernels['cases']} cases" in page
    assert f"error is {max(kernels['largest error'].values()):.4f}" in page
    for part in ("nodes", "nodes, dynamic VRAM"):
        assert len(checks[part]) == 27 and "27 of the nodes" in page and all(row["right"] for row in checks[part])
    for row in checks["solver"]:
        assert row["right"] and 77 <= round(row["torch"] / row["kernel"]) <= 137
    for run in checks["quantizer"]:
        numbers = [run["calibrated"], run["distilled: scales"], run["distilled: codes"]]
        assert all(f"{number:.4f}" in page for number in numbers)


def test_the_tiles_of_the_machine_codes_table():
    """Those of the table that kernels run with, which for sm_90 are the measured ones."""
    measured = results("tiles-NVIDIA-H200.json")["NVIDIA H200"]
    for kernel, entries in configs.TABLE["sm_90"].items():
        assert [configs._row(limit, tile) for limit, tile in entries] == measured[kernel], kernel
    rows = re.findall(
        r"^\| (\d+)\.(\d) \| (int8|e4m3|full), (row|group)s?(?: scales)?(?:, (\d+) tokens)? \| (.+?) \|",
        text("docs", "kernels.md"),
        re.MULTILINE,
    )
    assert len(rows) == 10
    for major, minor, activations, scales, tokens, stated in rows:
        kernel = "a16" if activations == "full" else f"{activations}_{scales}"
        tile = configs.tile(configs.nvidia("", int(major + minor), 1), kernel, int(tokens or 4608))
        assert stated == f"{tile.block_m} x {tile.block_n}, {tile.warps}, {tile.stages}", (major, kernel, tokens)


def test_what_the_file_commands_take():
    files = [results(f"files-{model}.json")["models"][0]["rows"] for model in ("FLUX.1-dev", "FLUX.2-klein-4B")]
    page = text("docs", "convert.md")
    for rows in zip(*files, strict=True):
        cells = [f"{row['seconds']:.0f} s, {row['peak'] / 1e9:.1f} GB" for row in rows]
        assert f"| {rows[0]['command']} | {' | '.join(cells)} |\n" in page


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (_pack.ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page):
    def anchors(file) -> set[str]:
        headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    folder = (_pack.ROOT / page).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = folder / path if path else _pack.ROOT / page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_the_commands_of_the_sources_parse():
    """README's table of what a FLUX may be, one command each."""
    from ternary_flux.quantizer import cli

    commands = re.findall(r"^\| .+ \| `python -m quantizer (.+)` \|$", text("README.md"), re.MULTILINE)
    assert len(commands) == 8
    for command in commands:
        arguments = cli.parse(command.split())
        assert arguments.source and arguments.output
