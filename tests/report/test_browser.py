"""Pages in a real browser: light and dark, narrow and wide.

Needs Chromium or Chrome (``KVQ_BROWSER`` names another place) and playwright; skipped without. With ``KVQ_SCREENSHOTS``
set to a folder, what was seen is kept there.
"""

import os
import shutil
from pathlib import Path

import pytest

from kvq.report.diagnosis_charts import losses_figure
from kvq.report.diagnosis_html import diagnosis_html
from kvq.report.html import html_report
from kvq.report.pareto import pareto_figure, pareto_page

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTHS = {"narrow": 360, "wide": 1400}
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


def find_browser() -> str | None:
    return os.environ.get("KVQ_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.fixture(scope="module")
def browser():
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium or Chrome is on this machine")
    with sync_api.sync_playwright() as playwright:
        own = playwright.chromium.launch(executable_path=path, args=QUIET)
        yield own
        own.close()


@pytest.fixture
def opened(browser, tmp_path):
    """``opened(results, width, scheme) -> page``: a report, or a page as text, opened as a file; fails on any request
    or script error."""
    contexts, problems = [], []

    def open_page(results, width="wide", scheme="light"):
        file = tmp_path / "report.html"
        text = results if isinstance(results, str) else html_report(results)
        file.write_text(text, encoding="utf-8")
        context = browser.new_context(viewport={"width": WIDTHS[width], "height": 900}, color_scheme=scheme)
        # A busy machine may take its time.
        context.set_default_timeout(180_000)
        contexts.append(context)
        page = context.new_page()
        inside = ("data:", file.as_uri())
        page.on("request", lambda own: None if own.url.startswith(inside) else problems.append(own.url))
        page.on("console", lambda own: problems.append(own.text))
        page.on("pageerror", lambda own: problems.append(str(own)))
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture
def several(make_result):
    names = ("fp16", "int8", "kivi4", "int4", "int3", "klt4", "klt2", "kivi2")
    errors = (0.0, 0.0003, 0.0041, 0.0039, 0.03, 0.0035, 0.02, 0.06)
    return [make_result(name, kl) for name, kl in zip(names, errors)]


# Elements wider than the window that no scrolling box holds.
OVERFLOW = """() => {
    const width = document.documentElement.clientWidth;
    const held = own => own.closest('.scroll') !== null;
    return [...document.querySelectorAll('body *')]
        .filter(own => own.getBoundingClientRect().right > width + 1 && !held(own))
        .map(own => own.tagName + '.' + (own.className.baseVal ?? own.className));
}"""

# Texts of drawings that stick out of them, and pairs that lie on each other.
DRAWN = """() => {
    const found = [];
    for (const svg of document.querySelectorAll('svg')) {
        const box = svg.getBoundingClientRect();
        const texts = [...svg.querySelectorAll('text')].map(own => [own.textContent, own.getBoundingClientRect()]);
        for (const [text, own] of texts)
            if (own.left < box.left - 1 || own.right > box.right + 1
                || own.top < box.top - 2 || own.bottom > box.bottom + 2)
                found.push('outside: ' + text + ' of ' + svg.getAttribute('aria-label'));
        for (let i = 0; i < texts.length; i++) for (let j = 0; j < i; j++) {
            const [a, one] = texts[i], [b, other] = texts[j];
            const wide = Math.min(one.right, other.right) - Math.max(one.left, other.left);
            const high = Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top);
            if (wide > 1 && high > 4) found.push(a + ' on ' + b + ' in ' + svg.getAttribute('aria-label'));
        }
    }
    return found;
}"""

# Texts whose colour is too near to what is behind them (WCAG 2.2, 1.4.3: 4.5 to 1, large ones 3 to 1).
CONTRAST = """() => {
    const draw = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const rgb = colour => { draw.clearRect(0, 0, 1, 1); draw.fillStyle = colour; draw.fillRect(0, 0, 1, 1);
        return [...draw.getImageData(0, 0, 1, 1).data]; };
    const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const light = ([r, g, b]) => {
        const [x, y, z] = [r, g, b].map(v => linear(v / 255)); return 0.2126 * x + 0.7152 * y + 0.0722 * z; };
    const behind = own => { for (; own; own = own.parentElement) {
        const colour = getComputedStyle(own).backgroundColor; if (rgb(colour)[3] > 250) return colour; }
        return 'white'; };
    const found = [];
    for (const own of document.querySelectorAll('body *:not(script)')) {
        const words = [...own.childNodes].filter(n => n.nodeType === 3).map(n => n.textContent.trim()).join('');
        if (!words || !own.getBoundingClientRect().width) continue;
        const style = getComputedStyle(own), drawn = own instanceof SVGElement;
        let under = behind(own);
        if (drawn && own.tagName === 'text') {
            const box = own.getBoundingClientRect(), x = box.left + box.width / 2, y = box.top + box.height / 2;
            for (const shape of own.closest('svg').querySelectorAll('path')) {
                const b = shape.getBoundingClientRect(), look = getComputedStyle(shape);
                if (look.fill !== 'none' && look.opacity === '1' && b.left < x && x < b.right && b.top < y
                    && y < b.bottom && shape.compareDocumentPosition(own) & Node.DOCUMENT_POSITION_FOLLOWING)
                    under = look.fill;
            }
        }
        const [one, other] = [drawn ? style.fill : style.color, under].map(rgb).map(light).sort((a, b) => b - a);
        const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.6 && style.fontWeight >= 700);
        const ratio = (one + 0.05) / (other + 0.05);
        if (ratio < (large ? 3 : 4.5)) found.push(ratio.toFixed(2) + ': ' + words.slice(0, 40));
    }
    return [...new Set(found)];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", [1, 8])
def test_it_fits_and_can_be_read(opened, several, width, scheme, count):
    page = opened(several[-count:], width, scheme)
    page.evaluate("() => document.querySelectorAll('details').forEach(own => own.open = true)")
    keep = os.environ.get("KVQ_SCREENSHOTS")
    if keep:
        page.screenshot(path=Path(keep) / f"{count}-{width}-{scheme}.png", full_page=True)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= WIDTHS[width]
    assert page.evaluate(OVERFLOW) == []
    assert page.evaluate(DRAWN) == []
    assert page.evaluate(CONTRAST) == []


LONG = "principal bits=4/2/2/2 clip=0.97/0.65/0.65/0.65 + rotated-book bits=2"


def search_page() -> str:
    measured = {"kl": 0.01, "kl_stderr": 0.001, "top1": 0.95}
    rows = [{"name": name, "bits": 2.5, "measured": measured, "predicted": 0.008} for name in ("auto-2.5", LONG)]
    layers = {side: [{"layer": i, "damage": 10.0**-i} for i in range(4)] for side in ("key", "value")}
    data = {"model": "builtin", "text": "builtin", "metric": "kl", "bits_of": "asymptotic", "layers": layers}
    data |= {"points": rows[:1], "uniform": rows[1:], "front": []}
    return pareto_page(data, pareto_figure(data))


def diagnosis_page() -> str:
    def row(recipe, loss, verdict):
        return {"recipe": recipe, "bits_per_element": 2.5, "loss": loss, "verdict": verdict, "why_not": ""}

    refused = {**row("biassafe4", None, None), "why_not": "this model has no bias of keys"}
    predictions = [row("klt2", 0.02, "good"), row("kivi2", 0.2, "lossy"), row("int2", 2.0, "collapse"), refused]
    diagnosis = {"verdict": "Use klt2.", "causes": [], "predictions": predictions, "recommended": "klt2"}
    errors = {i: {side: {2: 0.1, 3: 0.05, 4: 0.02, 8: 0.001} for side in ("key", "value")} for i in range(3)}
    figures = {"losses": losses_figure(predictions[:3], 0.05, 0.5)}
    return diagnosis_html("Statistics of a model", {"text": "x" * 80}, diagnosis, errors, "kivi2", figures)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("make", [search_page, diagnosis_page])
def test_pages_of_searches_and_diagnoses_fit_and_can_be_read(opened, width, scheme, make):
    page = opened(make(), width, scheme)
    assert page.locator("svg").count() == 1
    assert page.locator("svg").bounding_box()["height"] > 100
    assert page.evaluate("() => document.documentElement.scrollWidth") <= WIDTHS[width]
    assert page.evaluate(OVERFLOW) == []
    assert page.evaluate(CONTRAST) == []


def test_dark_and_light_are_different_pages(opened, several):
    colours = {
        scheme: opened(several, "wide", scheme).evaluate("() => getComputedStyle(document.body).backgroundColor")
        for scheme in ("light", "dark")
    }
    assert colours["light"] != colours["dark"]


def test_the_verdict_is_on_the_first_screen(opened, several):
    for width in WIDTHS:
        page = opened(several[-1:], width)
        box = page.locator(".headline").bounding_box()
        assert box["y"] + box["height"] < 500
        assert "kivi2 changes the model noticeably" in page.locator(".headline").inner_text()


def test_details_open_and_their_maps_are_drawn(opened, several):
    page = opened(several)
    section = page.locator("details", has_text="Error by layer and head")
    assert not section.locator("svg").first.is_visible()
    section.locator("summary").click()
    assert section.locator("svg").first.is_visible()


def test_the_checks_notice(opened, several):
    """Negative controls: each check finds what was broken on purpose."""
    page = opened(several, "narrow")
    page.add_style_tag(content=".headline { color: #999; background: #aaa } h1 { width: 900px }")
    assert any("kivi2" in line for line in page.evaluate(CONTRAST))
    assert "H1." in page.evaluate(OVERFLOW)
    page.evaluate("() => document.querySelectorAll('svg.chart text').forEach(own => own.setAttribute('x', 5))")
    assert page.evaluate(DRAWN)
