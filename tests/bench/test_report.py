"""The report: what it says, that both its forms say it, and what it must never do."""

import io
import json
import re
import xml.etree.ElementTree as ET
from collections import Counter
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from measured import measured, one_row, published, with_samples
from PIL import Image

from accelkit.bench.report.figures import depths as depths_plot
from accelkit.bench.report.figures import saving as saving_plot
from accelkit.bench.report.figures import styles_of
from accelkit.bench.report.findings import Findings
from accelkit.bench.report.formats import percent
from accelkit.bench.report.report import write_report
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


@pytest.fixture(scope="module", params=CASES)
def written(request, tmp_path_factory):
    """The directory, the page and the Markdown of a case."""
    folder = tmp_path_factory.mktemp("report")
    results = json.loads(json.dumps(CASES[request.param]()))
    if request.param == "whole":
        results = with_samples(results, folder)
    write_report(folder, results)
    return folder, Page((folder / "report.html").read_text()), (folder / "report.md").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    results = with_samples(CASES["whole"](), folder)
    paths = write_report(folder, results)
    return folder, paths, Page((folder / "report.html").read_text())


def table(page, heading, column=0):
    """The table whose heading has a word at a column, as rows of cells."""
    return next(t for t in page.tables if len(t[0]) > column and t[0][column] == heading)


def test_the_directory_is_whole(whole):
    folder, paths, _ = whole
    names = {path.relative_to(folder).as_posix() for path in paths}
    plots = {f"plots/{n}.{form}" for n in ("pareto", "saving", "depths") for form in ("png", "svg")}
    assert names == {"report.html", "report.md"} | plots
    assert not list(folder.rglob("*.partial"))
    for path in paths:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert image.width > 700
        if path.suffix == ".svg":
            assert ET.parse(path).getroot().tag.endswith("svg")


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


def test_names_are_shown_and_never_obeyed(tmp_path):
    write_report(tmp_path, spoilt())
    page = Page((tmp_path / "report.html").read_text())
    read = MarkdownIt("commonmark", {"html": True}).enable("table")
    told = Page(read.render((tmp_path / "report.md").read_text()))
    for form in (page, told):
        assert EVIL in form.text
        assert not [image for image in form.all("img") if "x.y" in image["src"]]
        assert not form.all("b")
        assert not [link for link in form.all("a") if "c.d" in link["href"]]
        assert "em" not in {tag for tag, _ in form.elements}


def test_published_figures_stand_beside_measured_ones(whole):
    rows = table(whole[2], "DDPM 250, published", 2)
    cells = {row[0]: row[1:] for row in rows}
    assert cells["full depth"][1] == "9.078 ± 0.05"
    assert cells["D4 tuned"][1] == "8.679 ± 0.07 (30.46%)"
    assert cells["D4"][1].startswith("–")
    assert cells["D6"][0].startswith("–")
    assert cells["D6"][3] == "8.900 ± 0.10 (37.00%)"
    measured_row = next(r for r in measured()["rows"] if r["weights"] == "tuned")
    expected = f"{measured_row['fid']:.2f} ± {measured_row['fid_stderr']:.2f} "
    assert cells["D4 tuned"][0] == expected + f"({100 * measured_row['saving']:.1f}%)"
    assert "Moon et al. 2024, table 3 (DiT-XL/2, ImageNet 256)" in whole[2].text


def test_the_summary_says_who_wins_and_who_does_not(whole):
    text = " ".join(whole[2].text.split())
    assert "D4 tuned saves most without a distinguishable loss of FID: 27.4% of the time" in text
    equal = r"At equal time \(within 15%\), by FID:"
    assert re.search(rf"Better than fewer steps {equal} D4 tuned", text)
    assert re.search(rf"Worse than fewer steps {equal} D1 \(DDIM 50\), D4", text)
    assert "Caches, other baselines On the Pareto front of time and FID: first_block_cache" in text
    assert "41.9% saved with DDIM 50, alone D4 27.4% and pab 22.0%" in text
    assert "taylorseer (DDPM 250, DDIM 50 and DDIM 25): cache-dit is not installed" in text
    assert re.search(r"1,000 images per row are too few to tell \d+ of 84 pairs", text)
    assert "Not shown: sFID (the digit features are not spatial)" in text


def test_a_method_that_only_loses_is_not_praised(tmp_path):
    results = measured()
    keep = ("full", "D4")
    results["rows"] = [
        r for r in results["rows"] if r["method"] in keep and r["weights"] != "tuned"
    ]
    results["rows"] = [r for r in results["rows"] if r["steps"] == 50]
    results["protocol"]["samplers"] = ["ddim:50"]
    write_report(tmp_path, results)
    text = (tmp_path / "report.md").read_text()
    assert "Nothing saves time against full depth without a distinguishable loss of FID" in text


def test_fewer_images_than_features_are_warned_of(tmp_path):
    results = measured()
    results["protocol"] = {**results["protocol"], "images": 64}
    write_report(tmp_path, results)
    assert "do not determine a covariance of 64 features" in (tmp_path / "report.md").read_text()


def test_the_protocol_is_all_there(whole):
    def values(value):
        if isinstance(value, dict):
            return [v for inner in value.values() for v in values(inner)]
        return [value]

    told = " ".join(whole[2].text.split())
    for value in values(measured()["protocol"]):
        if isinstance(value, str):
            assert value in told
        elif isinstance(value, int | float):
            assert f"{value:,}" in told or f"{value:g}" in told


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
    write_report(tmp_path, results)
    embedded = Page((tmp_path / "report.html").read_text()).all("img")[0]
    assert embedded["src"].startswith("data:image/jpeg;base64,")
    assert (embedded["width"], embedded["height"]) == ("2560", "256")


def test_pictures_that_are_gone_are_named(tmp_path):
    results = with_samples(measured(), tmp_path)
    (tmp_path / results["samples"][1]["file"]).unlink()
    write_report(tmp_path, results)
    assert "Not found beside results.json: samples/1.png" in (tmp_path / "report.html").read_text()


def test_a_broken_picture_is_an_error_that_names_it(tmp_path):
    results = with_samples(measured(), tmp_path)
    (tmp_path / results["samples"][1]["file"]).write_bytes(b"no picture")
    with pytest.raises(AccelkitError, match=r"1\.png"):
        write_report(tmp_path, results)


def test_a_picture_that_is_cut_off_is_an_error_however_small(tmp_path):
    results = with_samples(measured(), tmp_path)
    path = tmp_path / results["samples"][1]["file"]
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(AccelkitError, match=r"1\.png"):
        write_report(tmp_path, results)


def test_a_plot_without_quality_shows_time(tmp_path):
    write_report(tmp_path, without_quality())
    text = (tmp_path / "report.html").read_text()
    assert "There is no FID to draw it against" in text
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


def test_fewer_steps_count_among_what_saves_time(tmp_path):
    results = one_row()
    full = {**results["rows"][0], "seconds": 10.0, "saving": 0.0}
    rows = [{**full, "fid": 2.0, "fid_jackknife": [1.9, 2.0, 2.1]}]
    rows.append({**full, "steps": 40, "seconds": 8.0, "fid": 2.0, "fid_jackknife": [2.0, 2.1, 1.9]})
    rows.append({**full, "method": "pab", "kind": "baseline", "seconds": 9.0, "saving": 0.1})
    rows[2] |= {"fid": 2.0, "fid_jackknife": [2.1, 1.9, 2.0]}
    write_report(tmp_path, {**results, "rows": rows})
    said = "full depth in 40 steps saves most without a distinguishable loss of FID: 20.0% of"
    assert said in (tmp_path / "report.md").read_text()


def report(tmp_path, results):
    write_report(tmp_path, results)
    return (tmp_path / "report.md").read_text()


def test_fewer_steps_stand_with_full_depth(whole):
    text = " ".join(whole[2].text.split())
    assert re.search(r"Full depth, fewer steps On the Pareto[^:]*: full depth \(.*DDIM 44", text)
    assert not re.search(r"Caches, other baselines [^A-Z]*On the [^.]*full depth \(DDIM 44", text)
    assert "steps:44" not in text


def test_the_protocol_says_how_figures_are_found(whole, tmp_path):
    text = " ".join(whole[2].text.split())
    assert "the paired jackknife over 10 groups of images, with Student's t" in text
    assert "by the 3 nearest neighbours among 1,000 images on either side" in text
    assert "over 100 random subsets of 1,000 images" in text
    assert "mean and SD over runs of 5,000 images" in text
    assert "full depth in any number of steps and schedules run fused forwards" in text
    results = measured()
    results["protocol"]["kernels"] = "off"
    assert "off: all rows run the model's own modules" in report(tmp_path, results)
    assert "Statistics:** none" in report(tmp_path, without_quality())


def test_calls_that_cannot_be_counted_have_no_multiply_adds(tmp_path):
    results = measured()
    for row in results["depths"]:
        row["macs"] = None
    text = report(tmp_path, results)
    assert "| Blocks run | ms per call | quartiles | of full time |\n" in text
    assert "scaled by multiply-adds" not in text
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
    assert "What costs more than 50% is drawn there" in plot.caption


def test_published_figures_of_settings_that_were_not_run_are_shown(tmp_path):
    results = {**measured(), "published": published()}
    for entry in results["published"]:
        entry["sampler"] = "flow"
    results["published"][1]["saving"] = -0.12
    text = report(tmp_path, results)
    assert "**Published for settings that were not run**" in text
    assert "| full depth | FLOW 250 | 9.078 ± 0.05 | DiT-XL/2, ImageNet 256 |" in text
    assert "| full depth | FLOW 50 | 9.120 | DiT-XL/2, ImageNet 256 |" in text
    assert "| D4 | FLOW 250 | 8.679 ± 0.07 (−12%) |" in text
    assert text.count("Moon et al. 2024, table 3 (DiT") == 1


def test_several_trainings_of_a_method_have_a_row_each(tmp_path):
    results = {**measured(), "published": published()}
    base = results["published"][1]
    base["setting"] += ", 1,300,000 steps"
    other = {**base, "fid": 5.0, "setting": "DiT-XL/2, ImageNet 256, 2,500,000 steps"}
    results["published"].append(other)
    write_report(tmp_path, results)
    page = Page((tmp_path / "report.html").read_text())
    cells = {row[0]: row[2] for row in table(page, "DDPM 250, published", 2)}
    assert cells["D4 tuned, 1,300,000 steps"] == "8.679 ± 0.07 (30.46%)"
    assert cells["D4 tuned, 2,500,000 steps"] == "5.000 ± 0.07 (30.46%)"
    assert cells["D4 tuned"].startswith("–")


def test_the_table_of_times_says_which_time_rows_are_compared_by(whole):
    text = " ".join(whole[2].text.split())
    assert "Seconds are each row's own median; the time saved is of paired rounds" in text


def test_the_lead_says_what_was_made(tmp_path, whole):
    assert "1,000 images per row at equal seeds" in " ".join(whole[2].text.split())
    text = report(tmp_path, without_quality())
    assert "1,000 images" not in text
    assert "batches of 50 images per row, timed without quality figures, at equal seeds" in text


def test_one_label_is_not_called_balanced(tmp_path):
    results = measured()
    results["protocol"]["classes"] = 1
    assert "**Labels:** the same for all images" in report(tmp_path, results)


@pytest.mark.parametrize(
    ("share", "text"), [(-0.0003, "0.0%"), (-0.0006, "−0.1%"), (0.5, "50.0%"), (0, "0.0%")]
)
def test_nothing_is_no_less_than_nothing(share, text):
    assert percent(share) == text


def test_the_scale_of_kid_follows_its_size(tmp_path, whole):
    assert "KID × 1000 ± SD" in whole[2].text
    results = measured()
    for row in results["rows"]:
        if row["kid"] is not None:
            row["kid"] *= 1e4
    text = report(tmp_path, results)
    assert "| KID ± SD |" in text
    assert "KID × 1000" not in text


def test_memory_without_a_gpu_is_the_process_s(tmp_path, whole):
    note = "Peak memory without a GPU is the process's resident memory"
    assert note in " ".join(whole[2].text.split())
    results = measured()
    results["protocol"]["machine"]["gpu"] = "H100"
    assert note not in report(tmp_path, results)


def test_plots_of_an_earlier_run_are_removed(tmp_path):
    (tmp_path / "plots").mkdir()
    for name in ("saving.png", "saving.svg", "mine.png"):
        (tmp_path / "plots" / name).write_bytes(b"old")
    write_report(tmp_path, one_row(seconds=2.0, fid=3.0))
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {"mine.png", "pareto.png", "pareto.svg"}
