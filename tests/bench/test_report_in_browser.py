"""The report in headless Chromium: on a phone, on a desktop, in dark mode, on paper."""

import html
import json
import re
import shutil
import subprocess
import zlib

import pytest
from measured import measured, one_row, published, with_samples

from accelkit.bench.report.report import write_report

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")

WIDTHS = (320, 360, 768, 1280)
DARK = "--blink-settings=preferredColorScheme=0"
# The report runs no scripts, so a page around it measures it, in one frame per width and mode.
# Contrast is that of WCAG 2.1: https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio
LOOKING = """
<!doctype html><meta charset="utf-8"><body>
{frames}
<script>
const look = (frame) => {{
  const view = frame.contentWindow, page = view.document;
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
  return {{
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
}};
addEventListener("load", () => {{
  const frames = [...document.querySelectorAll("iframe")];
  const seen = document.createElement("pre");
  seen.id = "seen";
  seen.textContent = JSON.stringify(Object.fromEntries(frames.map((f) => [f.id, look(f)])));
  document.body.replaceChildren(seen);
}});
</script>
"""
FRAME = """<iframe id="{name}" width="{width}" height="800" style="border:0; color-scheme: {mode}"
srcdoc="{page}"></iframe>"""


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


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, with_samples({**measured(), "published": published()}, folder))
    return folder / "report.html"


@pytest.fixture(scope="module")
def seen(report, tmp_path_factory):
    """What one browser sees of the report in all widths and modes, by the frame's name."""
    folder = tmp_path_factory.mktemp("looking")
    long = "m" * 300
    write_report(folder, one_row(method=long, skipped=f"{long} is not installed"))
    frames = [(f"{width}", width, "light", report) for width in WIDTHS]
    frames += [("dark", 1024, "dark", report), ("long", 360, "light", folder / "report.html")]
    looking = folder / "looking.html"
    text = "".join(
        FRAME.format(name=name, width=width, mode=mode, page=html.escape(path.read_text()))
        for name, width, mode, path in frames
    )
    looking.write_text(LOOKING.format(frames=text), encoding="utf-8")
    dumped = browse(folder, "--window-size=1400,900", "--dump-dom", looking.as_uri())
    return json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', dumped, re.S)[1]))


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_is_as_wide_as_the_window(seen, width):
    page = seen[f"{width}"]
    assert page["width"] == width
    assert page["sections"][0] == "Summary"
    assert page["sections"][-1] == "Protocol"
    assert len(page["pictures"]) == 8
    for alt, natural, shown in page["pictures"]:
        assert alt
        assert natural == 320
        assert 0 < shown <= width
    assert len(page["drawings"]) == 4
    assert min(page["drawings"]) > min(250, width / 2)
    assert min(page["letters"]) > 7


@pytest.mark.parametrize("name", ["1280", "dark"])
def test_every_word_stands_out(seen, name):
    contrast, text = seen[name]["worst"]
    assert contrast >= 4.5, text


def test_the_page_is_dark_where_dark_is_preferred(seen):
    light, dark = seen["768"], seen["dark"]
    assert min(light["paper"]) > 240 > 60 > max(light["ink"])
    assert max(dark["paper"]) < 60 < 200 < min(dark["ink"])


def test_plots_have_the_typeface_of_the_page(seen):
    assert seen["768"]["font"].startswith("system-ui")


def test_the_page_requests_nothing(seen):
    assert not [name for name in seen["768"]["loaded"] if not name.startswith("data:")]


def test_one_row_without_figures_fits_too(seen):
    assert seen["long"]["width"] == 360


def test_it_prints_black_on_white_even_in_dark_mode(report, tmp_path):
    paper = tmp_path / "paper.pdf"
    browse(tmp_path, DARK, f"--print-to-pdf={paper}", report.as_uri())
    data = paper.read_bytes()
    assert 4 <= len(re.findall(rb"/Type ?/Page\b", data)) <= 12
    streams = re.findall(rb"FlateDecode.*?stream\r?\n(.*?)endstream", data, re.S)
    drawn = b"".join(zlib.decompressobj().decompress(stream) for stream in streams)
    colors = {
        tuple(round(255 * float(part)) for part in found)
        for found in re.findall(rb"([\d.]+) ([\d.]+) ([\d.]+) rg\b", drawn)
    }
    assert (0x1C, 0x20, 0x24) in colors  # the ink of light mode
    assert (0xE9, 0xEB, 0xEE) not in colors  # the ink of dark mode
