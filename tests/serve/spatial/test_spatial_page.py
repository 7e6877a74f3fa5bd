"""The page in headless Chromium, with a real upload."""

import shutil
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")]


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, client):
    """The page; whatever the browser complains about fails the test, and nothing but the server is asked."""
    context = browser.new_context(viewport={"width": 1400, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(15_000)
    complaints = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if is_complaint(message) else None)
    page.on("request", lambda request: complaints.append(request.url) if foreign(request.url, client) else None)
    page.goto(f"{client.base_url}")
    yield page
    context.close()
    assert complaints == []


def is_complaint(message):
    # Chromium also reports refusals, which are answers like others.
    return message.type == "error" and "the server responded with a status of 4" not in message.text


def foreign(url, client):
    return not url.startswith((str(client.base_url), "blob:", "data:"))


def analyse(page, path, num_domains=3):
    page.set_input_files("#files", str(path))
    page.fill("#k", str(num_domains))
    page.click("#start")
    page.wait_for_selector("#result:visible", timeout=30_000)


def painted(page, plot):
    """How many pixels of a plot are not white, and how many colours they have."""
    return page.evaluate(
        """async (name) => {
            await new Promise(requestAnimationFrame); await new Promise(requestAnimationFrame);
            const canvas = window.tissue.plots[name].base;
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            const pixels = new Uint32Array(data.buffer), seen = new Map();
            for (const pixel of pixels) if (pixel) seen.set(pixel, (seen.get(pixel) || 0) + 1);
            return [...seen.values()].filter((count) => count > 200).length;
        }""",
        plot,
    )


def test_a_dropped_file_becomes_a_coloured_tissue(page, make_section):
    section = make_section(400, 40, seed=11)
    page.set_input_files("#files", str(section))
    assert "section.h5ad" in page.inner_text("#chosen")
    page.check("input[name=k][value=number]")
    page.fill("#k", "3")
    page.fill("#epochs", "60") if page.is_visible("#epochs") else page.evaluate("epochs.value = 60")
    page.click("#start")
    page.wait_for_selector("#numbers:has-text('loss')")
    assert "of 60" in page.inner_text("#numbers")
    page.wait_for_selector("#result:visible", timeout=30_000)
    assert "400 spots in 3 domains" in page.inner_text("#summary")
    assert page.locator("#legend button").count() == 3
    assert painted(page, "tissue") == 3
    assert painted(page, "umap") == 3


def test_pointing_colouring_and_downloads(page, make_section):
    analyse(page, make_section(400, 40, seed=12))
    box = page.locator("#tissue").bounding_box()
    place = page.evaluate(
        """(() => {
            const plot = window.tissue.plots.tissue;
            return [(plot.x[7] - plot.originX) * plot.scale, (plot.y[7] - plot.originY) * plot.scale];
        })()"""
    )
    page.mouse.move(box["x"] + place[0], box["y"] + place[1])
    assert page.inner_text("#spot").startswith("cell7 ")
    assert page.evaluate("window.tissue.plots.umap.marked") == 7
    page.focus("#tissue canvas:last-child")
    page.keyboard.press("ArrowRight")
    assert not page.inner_text("#spot").startswith("cell7 ")
    page.keyboard.press("+")
    assert page.evaluate("window.tissue.plots.tissue.scale > 1.3 * window.tissue.plots.tissue.whole")
    page.locator("#legend button").nth(1).click()
    assert page.locator("#legend button[aria-pressed=true]").count() == 1
    page.focus("#tissue canvas:last-child")
    page.keyboard.press("0")
    page.mouse.move(box["x"] + place[0], box["y"] + place[1])
    page.fill("#gene", "GENE1")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_selector("#scale:visible")
    assert page.inner_text("#scale-high").startswith("gene1")
    assert page.inner_text("#spot").startswith("cell7 ")
    assert "gene1" in page.inner_text("#spot")
    for form, start in (("h5ad", b"\x89HDF"), ("csv", b"id,domain"), ("png", b"\x89PNG")):
        with page.expect_download() as got:
            page.click(f"[data-format={form}]")
        assert Path(got.value.path()).read_bytes().startswith(start)
    page.reload()
    page.wait_for_selector("#result:visible")
    page.click("#remove")
    page.wait_for_selector("#result", state="hidden")


def test_what_is_wrong_is_said_and_can_be_mended(page, make_section, tmp_path):
    def without_coordinates(adata):
        del adata.obsm["spatial"]

    page.set_input_files("#files", str(make_section(change=without_coordinates)))
    page.click("#start")
    page.wait_for_selector("#problem:visible")
    assert "obsm['spatial'] is missing" in page.inner_text("#problem")
    large = tmp_path / "large.h5ad"
    large.write_bytes(bytes(2_100_000))
    page.set_input_files("#files", str(large))
    assert page.is_hidden("#problem")
    page.click("#start")
    assert "the server takes 2 MB" in page.inner_text("#problem-list")
    analyse(page, make_section(120, seed=13), 2)
    assert page.is_hidden("#problem")


def test_a_running_analysis_can_be_cancelled(page, make_section):
    page.set_input_files("#files", str(make_section(seed=14)))
    page.evaluate("epochs.value = 1500")
    page.click("#start")
    page.wait_for_selector("#numbers:has-text('loss')")
    page.click("#cancel")
    page.wait_for_selector("#working", state="hidden")
    assert page.is_enabled("#start")


def test_fifty_thousand_spots_are_drawn_and_found_quickly(page):
    times = page.evaluate(
        """async () => {
            const { ScatterPlot, colourByDomain } = await import(new URL("page/drawing.js", document.baseURI));
            document.getElementById("result").hidden = false;
            const plot = new ScatterPlot(document.getElementById("tissue"), "test", () => {});
            const n = 50000, x = new Float32Array(n), y = new Float32Array(n), domain = new Int16Array(n);
            for (let i = 0; i < n; i++) { x[i] = i % 250; y[i] = Math.floor(i / 250); domain[i] = i % 12; }
            let start = performance.now();
            plot.setSpots(x, y);
            plot.setColours(colourByDomain(domain, null));
            const built = performance.now() - start;
            await new Promise(requestAnimationFrame); await new Promise(requestAnimationFrame);
            plot.paint();
            const painted = plot.paintedIn;
            start = performance.now();
            let found = 0;
            for (let i = 0; i < 1000; i++) {
                const wanted = (i * 7919) % n;
                const px = (x[wanted] - plot.originX) * plot.scale, py = (y[wanted] - plot.originY) * plot.scale;
                found += plot.spotAt(px, py) === wanted;
            }
            return { built, painted, hover: (performance.now() - start) / 1000, found };
        }"""
    )
    assert times["found"] == 1000
    # Generous: a busy machine without a GPU. The point is that nothing is quadratic.
    assert times["built"] < 1500
    assert times["painted"] < 1500
    assert times["hover"] < 5
