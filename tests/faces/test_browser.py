"""Panels in JupyterLab and a real Chromium, moved and tried as a reader would: notebook 05's, and the precision's.

``make browser`` runs it. Without Chromium or playwright it is skipped, or fails where LOWVRAM_REQUIRE_BROWSER=1.
Pictures of the panels, or of what was there when it failed, are kept in build/browser, or in the folder that
LOWVRAM_BROWSER_ARTEFACTS names.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

try:
    from playwright.sync_api import expect, sync_playwright
except ImportError:
    sync_playwright = None

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "05_split_the_layers.ipynb"
ARTEFACTS = Path(os.environ.get("LOWVRAM_BROWSER_ARTEFACTS") or ROOT / "build" / "browser")
AS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
WINDOW = {"width": 1500, "height": 1250}  # pixels; room for a whole panel with its answer
TOKEN = "of-this-test-alone"
START, RUN_ALL, REFRESH, TRY = 60_000, 600_000, 30_000, 180_000  # how long each may take at most, in ms
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # cells out of view stay in the page
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},  # ask nothing, fetch nothing
}
READY = """() => {
    const session = window.jupyterapp?.shell.currentWidget?.sessionContext;  // what the page draws is idle too early
    return session?.isReady && session.session?.kernel?.status === 'idle';
}"""


def missing(what: str) -> None:
    (pytest.fail if os.environ.get("LOWVRAM_REQUIRE_BROWSER") == "1" else pytest.skip)(what)


@pytest.fixture
def browser():
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        missing("no Chromium found: apt-get install chromium")
    if sync_playwright is None:
        missing("no playwright found: make browser, or pip install -c constraints.txt -e '.[browser]'")
    expect.set_options(timeout=REFRESH)
    options = {"args": ["--disable-dev-shm-usage"], "chromium_sandbox": not AS_ROOT}  # root has no sandbox
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=program, **options) as browser:
        yield browser


PRECISION = (
    "import lowvram_lab as lab",
    "source = lab.find_source('smollm2-135m')\n"
    "plan = lab.Plan.uniform(source.spec(), 'int4+4', context=1024)\n"
    "model = lab.load(plan, lab.open_gpu(), checkpoint=source.checkpoint(), progress=False)",
    "session = lab.ChatSession(model, source.tokenizer(), max_new_tokens=500, compiled=False, progress=False)\n"
    "panel = lab.PrecisionPanel(session)\n"
    "panel",
)
"""Cells of section 5 of notebook 08, whose conversion would take a minute."""


@pytest.fixture
def cells(request):
    """Code that the notebook has; by default that of notebook 05."""
    if hasattr(request, "param"):
        return request.param
    return [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]


@pytest.fixture
def lab(browser, cells, tmp_path):
    """The address of a notebook without outputs, in a JupyterLab that knows nothing of the user's own."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    (tmp_path / "notebooks").mkdir()
    nbformat.write(notebook, tmp_path / "notebooks" / NOTEBOOK.name)
    for name, settings in SETTINGS.items():
        file = tmp_path / f"config/lab/user-settings/@jupyterlab/{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(settings))
    # Neither the hub nor a GPU: this is about the page. Only the built-in model then has weights, hence a live button.
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "LOWVRAM_"))},
        **{name: os.environ[name] for name in ("LOWVRAM_CACHE",) if name in os.environ},
        **{f"JUPYTER_{name}_DIR": str(tmp_path / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")},
        **{"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):  # these would go before HF_HOME
        environment.pop(name, None)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", "--port=0"]
    command += [f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={tmp_path / 'notebooks'}"]
    command += ["--LabApp.expose_app_in_browser=True", *(["--allow-root"] if AS_ROOT else [])]
    log = tmp_path / "jupyterlab.log"
    with log.open("w") as output:
        # In this process group: what ends the test run from outside ends the server as well.
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        server = psutil.Popen(command, env=environment, **streams)
    try:
        yield f"{address(server, tmp_path / 'runtime')}lab/tree/{NOTEBOOK.name}?token={TOKEN}"
    finally:
        started = server.children(recursive=True) if server.is_running() else []
        server.terminate()  # JupyterLab then ends its kernels
        for process in psutil.wait_procs([server, *started], timeout=15)[1]:
            process.kill()
        print(log.read_text()[-5000:])  # seen where the test failed


def address(server: psutil.Popen, runtime: Path) -> str:
    until = time.monotonic() + START / 1000
    while server.poll() is None and time.monotonic() < until:
        for file in runtime.glob("jpserver-*.json"):
            if found := re.search(r'"url": "(.+?)"', file.read_text()):
                return found[1]
        time.sleep(0.1)
    raise AssertionError("JupyterLab did not start; its log is below")


@pytest.fixture
def page(browser, lab):
    """A window on the notebook; a picture of how it was left is kept."""
    page = browser.new_page(viewport=WINDOW)
    page.wrongs = {"page": [], "kernel": []}
    page.on("pageerror", lambda error: page.wrongs["page"].append(error.stack or str(error)))
    page.on("console", lambda message: note_console(page, message))
    page.on("websocket", lambda socket: socket.on("framereceived", lambda frame: note_kernel(page, frame)))
    try:
        page.goto(lab, timeout=START)
        yield page
    finally:
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=ARTEFACTS / f"{NOTEBOOK.stem}.png")


def note_console(page, message) -> None:
    if message.type == "error":
        page.wrongs["page"].append(f"{message.text} ({message.location['url']})")


def note_kernel(page, frame: str | bytes) -> None:
    """What a cell or a widget's callback raises: the latter's traceback would be seen in no output."""
    text = frame if isinstance(frame, str) else frame.decode(errors="replace")
    if re.search(r'"msg_type":\s*"error"', text):
        traceback = re.sub(r"\\u001b\[[\d;]*m", "", text[text.find('"traceback"') :])  # its colours
        page.wrongs["kernel"].append(traceback.replace("\\n", "\n"))


def run_all(page) -> None:
    page.wait_for_function(READY, timeout=START)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    prompts, until = page.locator(".jp-CodeCell .jp-InputPrompt"), time.monotonic() + RUN_ALL / 1000
    while not (page.wrongs["kernel"] or all(re.search(r"\d", prompt) for prompt in prompts.all_text_contents())):
        assert time.monotonic() < until, f"not every cell has run: {prompts.all_text_contents()}"
        page.wait_for_timeout(200)
    assert_nothing_went_wrong(page)
    page.wait_for_function(READY, timeout=REFRESH)


def assert_nothing_went_wrong(page) -> None:
    assert not page.wrongs["kernel"], "\n".join(page.wrongs["kernel"])
    wrongs = [wrong for wrong in page.wrongs["page"] if "widget" in wrong.lower()]
    assert not wrongs, "\n".join(wrongs)
    for text in ("Traceback (most recent call last)", "Error displaying widget", "Error creating widget"):
        assert page.locator(".jp-OutputArea-output", has_text=text).count() == 0, text


class Panel:
    """A ``LayerSplitPanel`` as it is seen."""

    def __init__(self, root):
        self.root = root
        self.slider = root.locator(".widget-slider", has_text="GPU layers").get_by_role("slider")
        self.picture = root.get_by_role("img")
        self.verdict, self.message = root.locator(".widget-html").first, root.locator(".widget-html").last
        self.button = root.get_by_role("button", name="Load and try")
        self.layers = int(float(self.slider.get_attribute("aria-valuemax")))

    def choose_weights(self, recipe: str) -> None:
        self.root.get_by_label("weights").select_option(recipe)
        expect(self.verdict).to_contain_text(f"{recipe} weights")

    def press(self, key: str, layers: int) -> dict:
        """Presses a key on the slider; what the panel then shows, once it has come round to that many layers."""
        shown, picture = self.slider.get_attribute("aria-valuetext"), self.picture.get_attribute("src")
        self.slider.press(key)
        expect(self.slider).to_have_attribute("aria-valuetext", str(layers))
        expect(self.root.locator(".widget-readout").first).to_have_text(str(layers))
        summary = re.compile(rf"\b{layers} of {self.layers} layers on the GPU")
        expect(self.verdict).to_have_text(summary)
        if shown != str(layers):
            expect(self.picture).not_to_have_attribute("src", picture)
        headline = self.verdict.locator("b").first
        return {
            "headline": headline.inner_text(),
            "colour": headline.evaluate("it => getComputedStyle(it).color.match(/\\d+/g).slice(0, 3).map(Number)"),
            "sizes": re.findall(r"[\d.]+ [KMG]iB", self.verdict.inner_text()),
        }


def keep(page, panel: Panel, suffix: str = "") -> None:
    panel.root.evaluate("it => it.scrollIntoView()")
    page.screenshot(path=ARTEFACTS / f"{NOTEBOOK.stem}{suffix}.png")


def looks(shown: dict) -> str:
    red, green, blue = shown["colour"]
    return "red" if red > 1.5 * max(green, blue) else "green" if green > 1.5 * max(red, blue) else str(shown["colour"])


def test_the_panels_of_notebook_05(page):
    run_all(page)
    found = page.locator(".jp-OutputArea-output", has=page.get_by_role("button", name="Load and try"))
    panels = [Panel(each) for each in found.all()]
    large = next(panel for panel in panels if panel.button.is_disabled())
    small = next(panel for panel in panels if panel.button.is_enabled())

    # Forecasts follow the keys, and too much for the card is red before anything is loaded.
    large.choose_weights("bf16")
    none, one = large.press("Home", 0), large.press("ArrowRight", 1)
    every = large.press("End", large.layers)
    assert len({str(shown["sizes"]) for shown in (none, one, every)}) == 3
    assert "fits" in none["headline"] and looks(none) == looks(one) == "green"
    assert "out of memory" in every["headline"] and looks(every) == "red"
    assert large.picture.evaluate("it => it.complete && it.naturalWidth") > 500
    assert large.root.locator("table").count() == 0
    keep(page, large, "_out_of_memory")

    # The small model is asked; its answer comes with what was predicted and what was measured.
    small.press("Home", 0)
    assert looks(small.press("ArrowRight", 1)) == "green"
    said = small.message.text_content()
    small.button.click()
    expect(small.message).not_to_have_text(said)
    outcome = small.message.locator("tbody tr:last-child, b:has-text('✗')").first
    expect(outcome).to_be_visible(timeout=TRY)
    keep(page, small)
    assert "✗" not in outcome.inner_text()
    assert re.search(r"answer: \w+", small.message.inner_text())
    expect(small.message.locator("th").filter(has_text="predicted")).to_have_count(3)
    expect(small.message.locator("th").filter(has_text="measured")).to_have_count(3)
    row = outcome.locator("td").all_inner_texts()
    assert row[0] == "1"
    assert len(row) == 9 and all(re.match(r"\d+\.\d+\b", cell) for cell in row[3:])
    expect(small.button).to_be_enabled()
    assert_nothing_went_wrong(page)


@pytest.mark.parametrize("cells", [PRECISION], indirect=True, ids=["precision"])
def test_the_precision_panel(page):
    run_all(page)
    root = page.locator(".jp-OutputArea-output", has=page.get_by_role("button", name="precise"))
    answer, message, memory = (root.locator(".widget-html").nth(at) for at in (-3, -2, -1))
    for plane in ("high planes", "low planes"):
        expect(memory).to_contain_text(plane)
    root.get_by_label("message").fill("Tell me about the sea and the ships on it.")
    root.get_by_role("button", name="Send").click()
    expect(message).to_contain_text("tokens/s", timeout=TRY)
    root.get_by_role("button", name="fast").click()  # while it answers
    expect(root.get_by_role("button", name="Send")).to_be_visible(timeout=TRY)  # it says Stop until it is done
    expect(answer).to_contain_text("the high plane alone")
    expect(answer).to_contain_text("both planes")
    assert "alone: 0 " not in answer.inner_text()
    looks = answer.locator("span").evaluate_all("them => new Set(them.map(it => it.style.background)).size")
    assert looks >= 2
    root.evaluate("it => it.scrollIntoView()")
    page.screenshot(path=ARTEFACTS / "precision_panel.png")
    assert_nothing_went_wrong(page)
