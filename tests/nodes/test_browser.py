"""The pack in ComfyUI's own page, in a real browser: what somebody sees who looks for it, opens it and presses Run.

`--write-docs` keeps the screenshots: docs/loader-node.png and the thumbnails of the miniature's workflows.
"""

import contextlib
import io
import re
from urllib.parse import quote

import pytest
from PIL import Image, ImageOps
from playwright.sync_api import Page, TimeoutError, expect, sync_playwright
from ternary_flux.benchmarks import make_workflows, miniature
from ternary_flux.tests import chromium

pytestmark = [pytest.mark.server, pytest.mark.slow]

PACK = "comfyui-ternary-flux"
WORKFLOWS = sorted(path.stem for path in make_workflows.FOLDER.glob("*.json"))
FIRST, COMPARE, QUANTIZE = (
    make_workflows.name_of(make)
    for make in (
        make_workflows.miniature_text_to_image,
        make_workflows.miniature_dense_and_ternary,
        make_workflows.miniature_quantize,
    )
)
SECONDS = 1000  # the unit of the browser's time-outs
PATIENT = 300 * SECONDS  # a busy machine is not a broken page


@pytest.fixture(scope="module")
def browser():
    path = chromium.find()
    assert path, chromium.MISSING
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        launched = playwright.chromium.launch(executable_path=path, args=options)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def server(graph_server):
    settings = {"Comfy.TutorialCompleted": True, "Comfy.InstalledVersion": "1.0.0", "Comfy.Minimap.Visible": False}
    graph_server.post_json("/settings", settings | {"Comfy.RightSidePanel.IsOpen": False})
    return graph_server


@pytest.fixture(scope="module")
def shared(browser, server):
    """One page for all tests: ComfyUI's takes a while to come up on a busy machine."""
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    page.set_default_timeout(PATIENT)
    expect.set_options(timeout=PATIENT)
    page.complaints = []
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("console", lambda said: page.complaints.append(said.text) if said.type == "error" else None)
    come_up(page, server)
    return page


@pytest.fixture
def page(shared):
    """The page with an empty graph and nothing open."""
    shared.keyboard.press("Escape")
    shared.evaluate("() => { app.graph.clear(); app.canvas.setDirty(true, true) }")
    return shared


def come_up(page: Page, server) -> None:
    page.goto(server.url, wait_until="domcontentloaded")
    page.wait_for_function("() => !!window.app?.graph && 'TernaryFluxLoader' in LiteGraph.registered_node_types")
    page.wait_for_function("() => app.graph.nodes.length > 0")  # the graph that it begins with
    page.locator("[data-testid=queue-button]").wait_for()


def add(page: Page, kind: str) -> None:
    """A node in the middle of the graph, selected."""
    page.evaluate(
        """(kind) => {
            const node = LiteGraph.createNode(kind)
            app.graph.add(node)
            node.pos = [300, 150]
            app.canvas.ds.reset()
            app.canvas.selectNode(node)
            app.canvas.setDirty(true, true)
        }""",
        kind,
    )


def widgets(page: Page, kind: str) -> dict:
    return page.evaluate(
        """(kind) => Object.fromEntries(
            app.graph.nodes.find((node) => node.type === kind).widgets.map((widget) => [widget.name, widget.value]))""",
        kind,
    )


def open_template(page: Page, name: str) -> None:
    """Through the template browser, as one finds it."""
    page.locator("[data-testid=side-toolbar]").get_by_text("Templates").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_text(PACK, exact=True).first.click()
    dialog.get_by_text(name, exact=True).first.click()
    dialog.wait_for(state="hidden")
    page.wait_for_function("() => app.graph.nodes.length > 3")


def run(page: Page) -> None:
    page.locator("[data-testid=queue-button]").click()


def view(page: Page) -> None:
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(SECONDS)


def pictures(page: Page, title: str) -> list[Image.Image]:
    """What the nodes with this title show."""
    sources = page.evaluate(
        "(title) => app.graph.nodes.filter((n) => n.title === title).flatMap((n) => n.imgs.map((i) => i.src))", title
    )
    return [Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB") for source in sources]


def sheet(images: list[Image.Image]) -> bytes:
    """Four pictures as a JPEG of 440 pixels, for a template's card."""
    canvas = Image.new("RGB", (440, 440), "white")
    for i, image in enumerate(images[:4]):
        fitted = ImageOps.contain(image, (218, 218), Image.Resampling.LANCZOS)
        canvas.paste(fitted, (222 * (i % 2) + (218 - fitted.width) // 2, 222 * (i // 2) + (218 - fitted.height) // 2))
    stream = io.BytesIO()
    canvas.save(stream, "JPEG", quality=90)
    return stream.getvalue()


def node_area(page: Page, kinds: list[str], margin: int = 24) -> dict:
    """The rectangle of the page that these nodes take."""
    x0, y0, x1, y1 = page.evaluate(
        """(kinds) => {
            const nodes = app.graph.nodes.filter((node) => kinds.includes(node.type))
            const { offset, scale } = app.canvas.ds
            const rect = app.canvas.canvas.getBoundingClientRect()
            const at = (x, y) => [(x + offset[0]) * scale + rect.left, (y + offset[1]) * scale + rect.top]
            const [x0, y0] = at(Math.min(...nodes.map((n) => n.pos[0])), Math.min(...nodes.map((n) => n.pos[1] - 30)))
            const right = nodes.map((n) => n.pos[0] + n.size[0]), bottom = nodes.map((n) => n.pos[1] + n.size[1])
            return [x0, y0, ...at(Math.max(...right), Math.max(...bottom))]
        }""",
        kinds,
    )
    return {"x": x0 - margin, "y": y0 - margin, "width": x1 - x0 + 2 * margin, "height": y1 - y0 + 2 * margin}


def test_the_page_opens_without_errors(shared):
    ours = [said for said in shared.complaints if re.search("ternary|status.js|locale", said, re.IGNORECASE)]
    assert not ours
    assert shared.evaluate("() => app.extensions.some((extension) => extension.name === 'TernaryFlux.Status')")


@pytest.mark.feature("Node search in the page")
@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("low vram", "TernaryFluxLoader"),
        ("quantize", "TernaryFluxQuantize"),
        ("velocity error", "TernaryFluxCompare"),
        ("bits per weight", "TernaryFluxInfo"),
        ("bake lora", "TernaryFluxSave"),
    ],
)
def test_a_node_is_found_by_search_and_placed(page, words, kind):
    box = page.get_by_placeholder("Add a node")
    for _ in range(20):  # a busy machine takes two clicks that belong together for two
        page.locator("#graph-canvas").dblclick(position={"x": 800, "y": 500})
        with contextlib.suppress(TimeoutError):
            box.wait_for(timeout=10 * SECONDS)
            break
    box.fill(words)
    title = page.evaluate("(kind) => LiteGraph.registered_node_types[kind].title", kind)
    page.locator("[data-testid=result-item]").get_by_text(title, exact=True).first.click()
    page.wait_for_function("() => app.graph.nodes.length === 1")  # it follows the pointer until a click
    page.mouse.move(700, 400)
    page.mouse.click(720, 420)
    assert page.evaluate("() => app.graph.nodes[0].type") == kind


def test_the_loader_starts_with_a_file_that_runs(page):
    add(page, "TernaryFluxLoader")
    values = widgets(page, "TernaryFluxLoader")
    assert values == {
        "file": miniature.TERNARY.name, "activations": "auto", "backend": "auto", "status": "",
    }  # fmt: skip


@pytest.mark.feature("The Run button in the page")
def test_the_miniature_runs_from_the_run_button(page, docs):
    open_template(page, FIRST)
    run(page)
    page.wait_for_function("() => app.graph.nodes.find((node) => node.type === 'SaveImage')?.imgs?.length === 4")
    status = widgets(page, "TernaryFluxLoader")["status"]
    assert status.startswith(miniature.TERNARY.name) and "bits per weight" in status
    docs.keep(f"workflows/{FIRST}.jpg", sheet(pictures(page, "Save Image")))
    view(page)
    loader = page.screenshot(clip=node_area(page, ["TernaryFluxLoader"]))
    assert len(Image.open(io.BytesIO(loader)).convert("RGB").getcolors(1 << 24)) > 50
    everything = page.evaluate("() => [...new Set(app.graph.nodes.map((node) => node.type))]")
    docs.keep("docs/miniature-in-comfyui.png", page.screenshot(clip=node_area(page, everything)))
    page.evaluate("() => { app.canvas.ds.reset(); app.canvas.ds.offset = [200, 120]; app.canvas.setDirty(true, true) }")
    page.wait_for_timeout(SECONDS)
    docs.keep("docs/loader-node.png", page.screenshot(clip=node_area(page, ["TernaryFluxLoader"])))


def test_comparing_shows_both_and_the_error(page, docs):
    open_template(page, COMPARE)
    run(page)
    page.wait_for_function(
        "() => app.graph.nodes.filter((n) => n.type === 'PreviewImage').every((n) => n.imgs?.length > 0)"
    )
    (dense, *_), (ternary, *_), (difference, *_), (curve,) = (
        pictures(page, title) for title in ("dense", "1.58-bit", "difference", "velocity error")
    )
    assert dense.size == ternary.size == difference.size == (64, 64)
    docs.keep(f"workflows/{COMPARE}.jpg", sheet([dense, ternary, difference, curve]))


@pytest.mark.feature("Template browser in the page")
@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_template_opens_without_missing_nodes(page, name):
    path = f"/api/workflow_templates/{PACK}/{quote(name)}.json"
    missing = page.evaluate(
        """async (path) => {
            const graph = await (await fetch(path)).json()
            await app.loadGraphData(graph)
            return app.graph.nodes.map((node) => node.type).filter((type) => !(type in LiteGraph.registered_node_types))
        }""",
        path,
    )
    assert missing == [] and page.evaluate("() => app.graph.nodes.length") > 3
    overlaps = page.evaluate(
        """() => app.graph.nodes.flatMap((a, i) => app.graph.nodes.slice(i + 1)
            .filter((b) => a.pos[0] < b.pos[0] + b.size[0] && b.pos[0] < a.pos[0] + a.size[0]
                && a.pos[1] - 30 < b.pos[1] + b.size[1] && b.pos[1] - 30 < a.pos[1] + a.size[1])
            .map((b) => `${a.type} and ${b.type}`))"""
    )
    assert overlaps == []


@pytest.mark.feature("Help panel in the page")
def test_the_help_panel_shows_our_page(page):
    add(page, "TernaryFluxQuantize")
    page.wait_for_timeout(SECONDS)
    page.locator("[data-testid=info-button]").click()
    panel = page.get_by_role("heading", name="Quantize FLUX to Ternary").first
    expect(panel).to_be_visible()
    expect(page.get_by_text("Cancel at any time", exact=False).first).to_be_visible()


@pytest.mark.feature("Errors in the page", "the file's name first, no path of the server")
def test_an_error_is_readable(page, server):
    """The file's name first, what to do, and no path of the server."""
    open_template(page, FIRST)
    page.evaluate(
        """() => { app.graph.nodes.find((node) => node.type === 'TernaryFluxLoader').widgets[0].value = 'gone.sft' }"""
    )
    run(page)
    page.wait_for_function(
        """() => app.graph.nodes.find((n) => n.type === 'TernaryFluxLoader').widgets.at(-1).value.startsWith('gone')"""
    )
    status = widgets(page, "TernaryFluxLoader")["status"]
    assert status.startswith("gone.sft is not in models/diffusion_models; put it there")
    assert str(server.base) not in page.content()


@pytest.mark.feature("Previews and cancel of a conversion in the page")
def test_quantizing_shows_progress_and_can_be_cancelled(page, server):
    open_template(page, QUANTIZE)
    page.evaluate(
        """() => { const node = app.graph.nodes.find((n) => n.type === 'TernaryFluxQuantize')
            for (const [name, value] of [['name', 'stopped'], ['sampler_steps', 2]])
                node.widgets.find((w) => w.name === name).value = value }"""
    )
    run(page)
    page.wait_for_function(  # a picture that the original painted, and how many there are
        """() => { const node = app.graph.nodes.find((n) => n.type === 'TernaryFluxQuantize')
            return node.imgs?.length > 0 && node.widgets.some((w) => /pictures: \\d+ of \\d+/.test(w.value)) }"""
    )
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Interrupt')")
    page.wait_for_function("async () => (await (await fetch('/queue')).json()).queue_running.length === 0")
    assert not (server.base / "models" / "diffusion_models" / "stopped.safetensors").exists()
    assert list((server.base / "output" / "quantize").glob("stopped-*"))  # it will go on from there


@pytest.mark.feature("Languages: English, French, Japanese, Korean, Chinese, German", "German where the page knows it")
@pytest.mark.parametrize(("locale", "title"), [("fr", "Charger FLUX ternaire"), ("en", "Load Ternary FLUX")])
def test_titles_follow_the_language(shared, server, locale, title):
    server.post_json("/settings", {"Comfy.Locale": locale})
    come_up(shared, server)
    shared.wait_for_function("(title) => LiteGraph.registered_node_types.TernaryFluxLoader.title === title", arg=title)
