"""The report as headless Chromium shows it: on a phone, on a desk, in the dark, on paper."""

import html
import json
import re
import shutil
import subprocess

import pytest
from measured import measured, one_row, published, with_samples

from accelkit.bench.report.report import write_report

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")

DARK = "--blink-settings=preferredColorScheme=0"
# Beside the page, which runs no scripts of its own, one that looks at it from outside. Contrast is
# that of WCAG 2.1: https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio
LOOKING = """
<!doctype html><meta charset="utf-8"><body>
<iframe width="{width}" height="800" style="border:0" srcdoc="{page}"></iframe>
<script>
addEventListener("load", () => {{
  const view = document.querySelector("iframe").contentWindow, page = view.document;
  const parsed = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
    .map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {{
    for (; element; element = element.parentElement) {{
      const color = parsed(view.getComputedStyle(element).backgroundColor);
      if (color.length < 4 || color[3] > 0) return color;
    }}
    return [255, 255, 255];
  }};
  const contrasts = [], walk = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  for (let node = walk.nextNode(); node; node = walk.nextNode()) {{
    if (!node.textContent.trim()) continue;
    const style = view.getComputedStyle(node.parentElement);
    const ink = node.parentElement.closest("svg") ? style.fill : style.color;
    const pair = [light(parsed(ink)), light(behind(node.parentElement))].sort((a, b) => b - a);
    contrasts.push([(pair[0] + 0.05) / (pair[1] + 0.05), node.textContent.trim()]);
  }}
  const seen = {{
    width: page.documentElement.scrollWidth,
    paper: parsed(view.getComputedStyle(page.body).backgroundColor),
    ink: parsed(view.getComputedStyle(page.body).color),
    font: view.getComputedStyle(page.querySelector("svg text") || page.body).fontFamily,
    loaded: view.performance.getEntriesByType("resource").map((entry) => entry.name),
    pictures: [...page.images].map((image) => [image.alt, image.naturalWidth, image.clientWidth]),
    drawings: [...page.querySelectorAll("svg[role=img]")].map((svg) => svg.clientWidth),
    letters: [...page.querySelectorAll("svg text")]
      .map((text) => text.getBoundingClientRect().height),
    worst: contrasts.sort((a, b) => a[0] - b[0])[0],
    sections: [...page.querySelectorAll("h2")].map((heading) => heading.textContent),
  }};
  const told = document.createElement("pre");
  told.id = "seen";
  told.textContent = JSON.stringify(seen);
  document.body.replaceChildren(told);
}});
</script>
"""


def browse(folder, *arguments):
    """Run the browser once and return what it printed."""
    done = subprocess.run(
        [
            BROWSER,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--hide-scrollbars",
            "--disable-background-networking",
            f"--user-data-dir={folder / 'profile'}",
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def look(report, folder, width, *arguments):
    """Return what is seen of the report in a window of ``width`` pixels."""
    looking = folder / "looking.html"
    page = html.escape(report.read_text(encoding="utf-8"))
    looking.write_text(LOOKING.format(width=width, page=page), encoding="utf-8")
    size = f"--window-size={max(width, 500) + 100},900"
    dumped = browse(folder, size, *arguments, "--dump-dom", looking.as_uri())
    return json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', dumped, re.S)[1]))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, with_samples({**measured(), "published": published()}, folder))
    return folder / "report.html"


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_the_page_is_as_wide_as_the_window(report, tmp_path, width):
    seen = look(report, tmp_path, width)
    assert seen["width"] == width
    assert seen["sections"][0] == "Summary"
    assert seen["sections"][-1] == "Protocol"
    assert len(seen["pictures"]) == 8
    for alt, natural, shown in seen["pictures"]:
        assert alt
        assert natural == 320
        assert 0 < shown <= width
    assert len(seen["drawings"]) == 4
    assert min(seen["drawings"]) > min(250, width / 2)
    assert min(seen["letters"]) > 7


@pytest.mark.parametrize("mode", [[], [DARK]], ids=["light", "dark"])
def test_every_word_stands_out(report, tmp_path, mode):
    contrast, text = look(report, tmp_path, 1024, *mode)["worst"]
    assert contrast >= 4.5, text


def test_the_page_is_dark_where_dark_is_preferred(report, tmp_path):
    light, dark = look(report, tmp_path, 800), look(report, tmp_path, 800, DARK)
    assert min(light["paper"]) > 240 > 60 > max(light["ink"])
    assert max(dark["paper"]) < 60 < 200 < min(dark["ink"])


def test_plots_have_the_page_s_typeface(report, tmp_path):
    assert look(report, tmp_path, 800)["font"].startswith("system-ui")


def test_nothing_is_asked_of_the_network(report, tmp_path):
    loaded = look(report, tmp_path, 800)["loaded"]
    assert not [name for name in loaded if not name.startswith("data:")]


def test_one_row_without_figures_fits_too(tmp_path):
    long = "m" * 300
    write_report(tmp_path, one_row(method=long, skipped=f"{long} is not installed"))
    assert look(tmp_path / "report.html", tmp_path, 360)["width"] == 360


def test_it_prints_black_on_white_whatever_the_screen_has(report, tmp_path):
    paper = tmp_path / "paper.pdf"
    browse(tmp_path, DARK, f"--print-to-pdf={paper}", report.as_uri())
    light = tmp_path / "light.pdf"
    browse(tmp_path, f"--print-to-pdf={light}", report.as_uri())
    pages = [len(re.findall(rb"/Type ?/Page\b", p.read_bytes())) for p in (paper, light)]
    assert pages[0] == pages[1]
    assert 4 <= pages[0] <= 12
    # both modes give the same drawing: only the time and the names of the two files differ
    sizes = [p.stat().st_size for p in (paper, light)]
    assert abs(sizes[0] - sizes[1]) < 200
