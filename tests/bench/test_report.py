"""The report: its content, the same in both forms, and what it must never do."""

import io
import json
import re
import xml.etree.ElementTree as ET
from collections import Counter
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from measured import measured, one_row, published, with_samples
from PIL import Image

from accelkit.bench.report.document import html, markdown, percent
from accelkit.bench.report.figures import depths as depths_plot
from accelkit.bench.report.figures import saving as saving_plot
from accelkit.bench.report.figures import styles_of
from accelkit.bench.report.findings import Findings, label
from accelkit.bench.report.report import compose, write_report
from accelkit.errors import AccelkitError

EVIL = '<img src="http://x.y/z.png" onerror="alert(1)"> *|* `a` [b](http://c.d) & _e_ $\\frac{$'


class Page(HTMLParser):
    """What is in a page: its elements, its tables, and the text that is not style."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.tables, self.text, self._open = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self._open:
            self.text += data
        if {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += data

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def spoilt():
    """Whatever may be null is, and every name is hostile."""
    results = json.loads(json.dumps(measured()).replace("digits", "<b>digits</b>"))
    results["published"] = published()
    for row in results["rows"][1::2]:
        kept = ("method", "kind", "weights", "sampler", "steps", "skipped", "missing")
        row |= {key: None for key in row if key not in kept}
    for row in results["rows"]:
        row["missing"] = {"kid": EVIL}
        if row["method"] == "pab":
            row["method"] = EVIL
        if row["skipped"]:
            row["skipped"] = EVIL
    for entry in results["published"]:
        entry |= {"source": EVIL, "setting": EVIL, "fid_std": None, "saving": None}
    results["protocol"]["command"] = EVIL
    results["protocol"]["model"]["name"] = EVIL
    return results


def without_quality():
    results = measured()
    for row in results["rows"]:
        times = ("seconds", "saving", "macs", "mean_depth", "denoiser", "first")
        row |= {
            key: None for key in row if isinstance(row[key], float) and not key.startswith(times)
        }
        row |= {"fid_jackknife": None, "images": None, "manifold_images": None}
    results["protocol"] |= {"extractor": None, "reference": None}
    return results


CASES = {
    "whole": lambda: {**measured(), "published": published()},
    "spoilt": spoilt,
    "without quality": without_quality,
    "one row": lambda: one_row(seconds=2.0, fid=3.0),
    "one row, nothing measured": one_row,
    "one row, skipped": lambda: one_row(skipped="cannot run on this model"),
}


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """Write the report of a case, once, and return its folder, paths, page and Markdown."""

    @cache
    def write(case):
        folder = tmp_path_factory.mktemp("report")
        results = CASES[case]()
        if case == "whole":
            results = with_samples(results, folder)
        paths = write_report(folder, results)
        page = Page((folder / "report.html").read_text())
        return folder, paths, page, (folder / "report.md").read_text()

    return write


@pytest.fixture(params=CASES)
def written(request, write):
    folder, _, page, text = write(request.param)
    return folder, page, text


@pytest.fixture
def whole(write):
    return write("whole")[:3]


@pytest.fixture
def words(whole):
    """The text of the whole report, with single spaces."""
    return " ".join(whole[2].text.split())


def report(results):
    """The Markdown of a report, written without its plots."""
    return markdown(compose(Path("nowhere"), results))


def table(page, heading, column=0):
    """The table whose heading has a word at a column, as rows of cells."""
    return next(t for t in page.tables if len(t[0]) > column and t[0][column] == heading)


def test_the_directory_is_whole(whole):
    folder, paths, _ = whole
    names = {path.relative_to(folder).as_posix() for path in paths}
    plots = {f"plots/{name}.png" for name in ("pareto", "saving", "depths")}
    assert names == {"report.html", "report.md"} | plots
    assert not list(folder.rglob("*.partial"))
    for path in paths:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert image.width > 700


def test_the_same_results_give_the_same_bytes(whole, tmp_path):
    folder, paths, _ = whole
    write_report(tmp_path, with_samples(CASES["whole"](), tmp_path))
    for path in paths:
        assert (tmp_path / path.relative_to(folder)).read_bytes() == path.read_bytes(), path


def test_a_page_loads_nothing_and_runs_nothing(written):
    _, page, _ = written
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attrs in page.elements:
        assert not [name for name in attrs if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            assert attrs.get(name, "#").startswith(("#", "data:image/")), (tag, attrs[name])
    (folder, _, _) = written
    assert not re.findall(r"url\((?!#)|@import", (folder / "report.html").read_text())
    policy = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_a_page_can_be_read_without_seeing_it(written):
    _, page, _ = written
    assert page.all("html")[0]["lang"] == "en"
    assert page.all("title")
    assert all(image["alt"] for image in page.all("img"))
    drawn = [svg for svg in page.all("svg") if svg.get("aria-hidden") != "true"]
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in drawn)
    assert all(cell["scope"] in ("col", "row") for cell in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table")) >= 1
    ids = Counter(attrs["id"] for _, attrs in page.elements if "id" in attrs)
    assert max(ids.values()) == 1
    for tag, attrs in page.elements:
        for name in ("aria-labelledby", "href", "xlink:href", "clip-path"):
            if "#" in attrs.get(name, "") or (name == "aria-labelledby" and name in attrs):
                assert re.sub(r"^url\(|[#)]", "", attrs[name]) in ids, (tag, attrs)


def test_no_cell_is_empty_and_every_dash_has_its_reason(written):
    _, page, _ = written
    for rows in page.tables:
        assert len({len(row) for row in rows}) == 1
        for row in rows:
            assert all(cell.strip() for cell in row), row
            assert not [c for c in row if c.strip().startswith("–") and not c.strip()[-1].isdigit()]
    assert "None" not in page.text
    assert "nan" not in page.text.split()


def test_both_forms_say_the_same(written):
    _, page, text = written
    read = Page(MarkdownIt("commonmark", {"html": True}).enable("table").render(text))
    squeezed = [[[" ".join(c.split()) for c in row] for row in rows] for rows in page.tables]
    also = [[[c.replace(" ", "") for c in row] for row in rows] for rows in read.tables]
    assert [[[c.replace(" ", "") for c in row] for row in rows] for rows in squeezed] == also
    words = {word for word in re.findall(r"[\w.%]+", read.text) if len(word) > 4}
    missing = words - set(re.findall(r"[\w.%]+", page.text))
    assert not missing


def test_names_are_shown_and_never_obeyed(write):
    _, _, page, text = write("spoilt")
    read = MarkdownIt("commonmark", {"html": True}).enable("table")
    for form in (page, Page(read.render(text))):
        assert EVIL in form.text
        assert not [image for image in form.all("img") if "x.y" in image["src"]]
        assert not form.all("b")
        assert not [link for link in form.all("a") if "c.d" in link["href"]]
        assert "em" not in {tag for tag, _ in form.elements}


def test_published_figures_are_next_to_measured_ones():
    results = CASES["whole"]()
    results["published"][3]["fid_std"] = None
    results["published"].append({**results["published"][1], "setting": "other", "saving": -0.12})
    rows = results["rows"]
    lines = report(results).split("**Published figures**")[1].splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines[4:9]]
    full, tuned = (next(r for r in rows if label(r) == n) for n in ("full depth", "D4 tuned"))
    source = "Moon et al. 2024, table 3: DiT-XL/2, ImageNet 256"
    measured_full = f"{full['fid']:.2f} ± {full['fid_stderr']:.2f}"
    measured_tuned = f"{tuned['fid']:.2f} ± {tuned['fid_stderr']:.2f}"
    measured_tuned += f" ({100 * tuned['saving']:.1f}%)"
    assert cells[0][:3] == ["full depth", "DDPM 250", "9.078 ± 0.05"]
    assert cells[0][3].strip("*") == measured_full
    assert cells[0][4] == source
    assert cells[1][:3] == ["D4 tuned", "DDPM 250", "8.679 ± 0.07 (30.46%)"]
    assert cells[1][3].strip("*") == measured_tuned
    assert cells[3] == ["D6", "DDIM 50", "8.9 (37%)", "– <sup>1</sup>", source]
    assert cells[4][2] == "8.679 ± 0.07 (−12%)"
    assert cells[4][4].endswith(": other")


def test_the_summary_says_who_wins_and_who_does_not(words):
    gain = "D4 tuned saves the most time without a distinguishable loss of FID: 27.4%"
    assert f"DDIM 50 {gain} (95% interval" in words
    equal = r"By FID at equal time \(within 15%\):"
    assert re.search(rf"Better than fewer steps {equal} D4 tuned", words)
    assert re.search(rf"Worse than fewer steps {equal} D1 \(DDIM 50\), D4", words)
    assert "taylorseer (DDPM 250, DDIM 50 and DDIM 25): cache-dit is not installed" in words
    assert re.search(r"1,000 images per row are too few to distinguish \d+ of 84 pairs", words)
    assert "Not shown: sFID (the digit features are not spatial)" in words


def test_the_front_is_bold(whole):
    text = (whole[0] / "report.html").read_text()
    rows = Findings(measured()).front("ddpm")
    for row in rows:
        assert f"<strong>{row['fid']:.2f} ± " in text


def test_a_method_that_only_loses_is_not_praised():
    results = measured()
    keep = ("full", "D4")
    results["rows"] = [
        r for r in results["rows"] if r["method"] in keep and r["weights"] != "tuned"
    ]
    results["rows"] = [r for r in results["rows"] if r["steps"] == 50]
    results["protocol"]["samplers"] = ["ddim:50"]
    assert "Nothing saves time without a distinguishable loss of FID" in report(results)


def test_too_few_images_for_the_features_give_a_caution():
    results = measured()
    results["protocol"]["images"] = 64
    assert "cannot determine a covariance of 64 features" in report(results)


def test_the_protocol_is_all_there(words):
    def values(value):
        if isinstance(value, dict):
            return [v for inner in value.values() for v in values(inner)]
        return [value]

    for value in values(measured()["protocol"]):
        if isinstance(value, str):
            assert value in words
        elif isinstance(value, int | float):
            assert f"{value:,}" in words or f"{value:g}" in words


def test_pictures_are_in_the_page(whole):
    folder, _, page = whole
    pictures = page.all("img")
    assert [p["alt"] for p in pictures][:2] == [
        "Images generated by full depth, DDIM 50",
        "Images generated by D1, DDIM 50",
    ]
    assert len(pictures) == len(list((folder / "samples").iterdir()))


def test_large_pictures_are_embedded_smaller(tmp_path):
    results = with_samples(measured(), tmp_path)
    path = tmp_path / results["samples"][0]["file"]
    Image.effect_noise((2560, 256), 80).convert("RGB").save(path)
    embedded = Page(html(compose(tmp_path, results))).all("img")[0]
    assert embedded["src"].startswith("data:image/jpeg;base64,")
    assert (embedded["width"], embedded["height"]) == ("2560", "256")


def test_pictures_that_are_gone_are_named(tmp_path):
    results = with_samples(measured(), tmp_path)
    (tmp_path / results["samples"][1]["file"]).unlink()
    assert "Not found next to results.json: samples/1.png" in markdown(compose(tmp_path, results))


@pytest.mark.parametrize("damage", [lambda _: b"no picture", lambda data: data[: len(data) // 2]])
def test_a_broken_or_truncated_picture_is_an_error_that_names_it(damage, tmp_path):
    results = with_samples(one_row(seconds=1.0, fid=3.0), tmp_path)
    path = tmp_path / results["samples"][0]["file"]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(AccelkitError, match=r"0\.png.*restore the picture"):
        write_report(tmp_path, results)


def test_a_plot_without_quality_shows_time(write):
    text = write("without quality")[3]
    assert "There is no FID to compare it with" in text
    assert "Seconds per image with DDPM: full depth in 250 steps, 0.248 s" in text


def test_plots_are_drawn_in_the_page_s_own_colours(whole):
    text = (whole[0] / "report.html").read_text()
    drawings = re.findall(r'<svg role="img".*?</svg>', text, flags=re.DOTALL)
    assert len(drawings) == 4
    for drawing in drawings:
        assert not re.findall(r"(?:fill|stroke): ?#[0-9a-f]+", drawing)
        assert "var(--ink)" in drawing or "var(--muted)" in drawing
        assert "font-family" not in drawing
        ET.parse(io.StringIO(drawing.replace("xlink:href", "href")))


def test_fewer_steps_count_among_what_saves_time():
    results = one_row()
    full = {**results["rows"][0], "seconds": 10.0, "saving": 0.0}
    rows = [{**full, "fid": 2.0, "fid_jackknife": [1.9, 2.0, 2.1]}]
    rows.append({**full, "steps": 40, "seconds": 8.0, "fid": 2.0, "fid_jackknife": [2.0, 2.1, 1.9]})
    rows.append({**full, "method": "pab", "kind": "baseline", "seconds": 9.0, "saving": 0.1})
    rows[2] |= {"fid": 2.0, "fid_jackknife": [2.1, 1.9, 2.0]}
    said = "full depth in 40 steps saves the most time without a distinguishable loss of FID: 20.0%"
    assert said in report({**results, "rows": rows})


def test_fewer_steps_are_called_full_depth(words):
    assert "steps:44" not in words
    assert "full depth DDIM 44" in words


def test_the_protocol_says_how_figures_are_found(words, write):
    assert "the paired jackknife over 10 groups of images, with Student's t" in words
    assert "the 3 nearest neighbours among 1,000 images on either side" in words
    assert "over 100 random subsets of 1,000 images" in words
    assert "mean and SD over splits of 5,000 images" in words
    assert "full depth and schedules run fused kernels where available" in words
    assert "bootstrap of that median: a 95% interval" in words
    results = measured()
    results["protocol"]["kernels"] = "off"
    results["protocol"]["timing"]["rounds"] = 5
    text = report(results)
    assert "off: all rows run the model's own modules" in text
    assert "bootstrap of that median: about the range" in text
    assert "Statistics:** none" in write("without quality")[3]


def test_calls_that_cannot_be_counted_have_no_multiply_adds():
    results = measured()
    for row in results["depths"]:
        row["macs"] = None
    assert "scaled by multiply-adds" not in report(results)
    assert drawn(depths_plot(results["depths"])).lines[0].get_linestyle() != "--"
    assert drawn(depths_plot(measured()["depths"])).lines[0].get_linestyle() == "--"


def drawn(plot):
    """The axes of a plot's first panel."""
    axes = Figure().subplots()
    axes.labels = plot.panels[0].draw(axes)
    return axes


def test_quartiles_of_calls_are_not_cut_off():
    measurements = measured()["depths"]
    measurements[-1]["seconds_quartiles"][1] *= 3
    axes = drawn(depths_plot(measurements))
    assert axes.get_ylim()[1] > 1e3 * measurements[-1]["seconds_quartiles"][1]


def test_savings_are_beside_each_other_and_far_losses_are_marked():
    results = measured()
    for row in results["rows"]:
        if row["method"] == "tome:0.3":
            row |= {"saving": -1.435, "saving_interval": [-1.7, -1.1]}
    held = Findings(results)
    plot = saving_plot(held, styles_of(held.rows))
    axes = drawn(plot)
    marks = [line for line in axes.lines if line.get_marker() not in ("None", "", None)]
    places = [float(line.get_xdata()[0]) for line in marks]
    assert len(set(places)) == len(places)
    assert axes.get_ylim()[0] > -0.8
    assert {text for _, _, text in axes.labels} == {"↓ −143.5%"}
    assert "−143.5%" in plot.alt
    assert "A loss above 50% is drawn at 50%" in plot.caption


def test_the_table_of_times_says_which_time_rows_are_compared_by(words):
    assert "The time saved comes from paired rounds, and rows are compared by it" in words


def test_the_lead_says_what_was_made(words, write):
    assert "1,000 images per row from the same seeds" in words
    text = write("without quality")[3]
    assert "1,000 images" not in text
    assert "batches of 50 images per row, timed without quality figures, from the same" in text


def test_one_label_is_not_called_balanced():
    results = measured()
    results["protocol"]["classes"] = 1
    assert "**Labels:** the same for all images" in report(results)


@pytest.mark.parametrize(
    ("share", "text"), [(-0.0003, "0.0%"), (-0.0006, "−0.1%"), (0.5, "50.0%"), (0, "0.0%")]
)
def test_nothing_is_no_less_than_nothing(share, text):
    assert percent(share) == text


def test_the_scale_of_kid_follows_its_size(whole):
    assert "KID × 1000 ± SD" in whole[2].text
    results = measured()
    for row in results["rows"]:
        if row["kid"] is not None:
            row["kid"] *= 1e4
    text = report(results)
    assert "| KID ± SD |" in text
    assert "KID × 1000" not in text


def test_memory_without_a_gpu_is_the_process_s(words):
    note = "Without a GPU, peak memory is the resident memory of the whole process"
    assert note in words
    results = measured()
    results["protocol"]["machine"]["gpu"] = "H100"
    assert note not in report(results)


def test_plots_of_an_earlier_run_are_removed(tmp_path):
    (tmp_path / "plots").mkdir()
    for name in ("saving.png", "saving.svg", "pareto.svg", "mine.png"):
        (tmp_path / "plots" / name).write_bytes(b"old")
    write_report(tmp_path, one_row(seconds=2.0, fid=3.0))
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {"mine.png", "pareto.png"}
