"""Every format of a report: the same numbers, nothing foreign in them, nothing loaded from elsewhere."""

import csv
import dataclasses
import html.parser
import importlib
import io
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest

from ghostify.distillation.history import Epoch
from ghostify.errors import ArtefactError, MissingExtraError, OptionError
from ghostify.reporting import (
    Accuracy,
    Environment,
    Latency,
    ModelNumbers,
    Pair,
    Point,
    Report,
    Timing,
    figures,
    page,
)
from ghostify.spec import Call, Decision, GhostSpec, Plan, Site

HOSTILE = '<script>alert(1)</script>|"$\\frac{$&`'


def decision(name, *, keep="", params=2304, macs=2_359_296):
    site = Site(
        name=name,
        kind="Conv2d",
        in_channels=16,
        out_channels=16,
        kernel_size=(3, 3),
        stride=(1, 1),
        groups=1,
        bias=False,
        params=params,
        channel_params=params // 16,
        calls=(Call((16, 32, 32), (16, 32, 32)),),
        order=0,
    )
    after = (params, macs) if keep else (params // 2 + 72, macs // 2 + 73_728)
    return Decision(site, None if keep else GhostSpec(), keep, params, after[0], macs, after[1])


def sample(names=("stem", "layer1.0.conv1"), *, model="CifarResNet"):
    decisions = tuple(decision(name, keep="the first layer" if not index else "") for index, name in enumerate(names))
    plan = Plan(
        model=model,
        fingerprint="abc",
        trace_way="fx",
        trace_note="",
        input_shapes=((2, 3, 32, 32),),
        params=269_722,
        macs=40_551_040,
        uncounted={},
        decisions=decisions,
    )
    return Report(
        original=ModelNumbers(model, 269_722, 1_084_544, 40_551_040, {"aten.bmm": 7, "aten.mv": None}),
        compressed=ModelNumbers(model, 139_114, 562_112, 21_271_168, {}),
        input_shapes=((2, 3, 32, 32),),
        latency=Latency(
            original=Timing(5.5, 5.25, 5.75, 5.125),
            compressed=Timing(4.5, 4.25, 4.75, 4.125),
            ratio=1.22,
            ratio_q25=1.2,
            ratio_q75=1.25,
            pairs=12,
            pairs_asked=30,
            warmup=5,
            threads=1,
            backend="torch eager, AMD EPYC",
            dtype="float32",
            channels_last=False,
        ),
        accuracy=Accuracy(10_000, 10, Pair(0.9173, 0.9015), Pair(0.997, 0.995), 0.9312, 0.25),
        plan=plan,
        history=(Epoch(0, 2.0, 0.1, 0.85, 0.87, 1.5, 80.0, 560.0), Epoch(1, 1.0, val_accuracy=0.88)),
        environment=Environment("2026-01-02T03:04:05+00:00", "2.13.0", "3.11.7", "Linux x86_64", "AMD EPYC", 1),
        remarks=("Outside this definition of MACs, original: aten.bmm, 7.",),
    )


class Outline(html.parser.HTMLParser):
    """Tags that are opened, whether all are closed, and the text outside of styles."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


def test_json_round_trip():
    report = sample()
    assert Report.from_json(report.to_json()) == report
    bare = dataclasses.replace(report, latency=None, accuracy=None, plan=None, history=())
    assert Report.from_json(bare.to_json()) == bare


def test_json_of_another_kind_is_refused():
    document = json.loads(sample().to_json())
    document["latency"]["surprise"] = 1
    with pytest.raises(ArtefactError, match=r"latency\.surprise"):
        Report.from_json(json.dumps(document))
    with pytest.raises(ArtefactError, match="not a ghostify report"):
        Report.from_json("{")


def test_print_shows_the_table_and_how_it_was_measured():
    shown = str(sample())
    lines = {line.split("  ")[0]: line.split() for line in shown.splitlines()}
    assert lines["parameters"] == ["parameters", "269,722", "139,114", "1.94×", "fewer"]
    assert lines["FLOPs (2 × MACs)"][-4:] == ["81,102,080", "42,542,336", "1.91×", "fewer"]
    assert lines["top-1 accuracy"][-6:] == ["91.73", "%", "90.15", "%", "−1.58", "points"]
    assert lines["latency, median"][-7:] == ["4.500", "ms", "1.22×", "faster", "(1.20", "to", "1.25)"]
    for fact in ("2×3×32×32", "1 thread,", "torch eager, AMD EPYC", "float32", "12 runs", "before 30", "aten.bmm, 7"):
        assert fact in shown


def test_a_slower_or_unclear_latency_is_called_so():
    report = sample()
    slower = dataclasses.replace(report.latency, ratio=0.8, ratio_q25=0.79, ratio_q75=0.82)
    assert "0.80×, slower (0.79 to 0.82)" in str(dataclasses.replace(report, latency=slower))
    unclear = dataclasses.replace(report.latency, ratio=1.02, ratio_q25=0.97, ratio_q75=1.04)
    report = dataclasses.replace(report, latency=unclear)
    assert "1.02× (0.97 to 1.04), no clear difference" in str(report)
    assert any("no clear difference" in item.label for item in page.headlines(report))


def test_more_parameters_are_called_so():
    report = sample()
    worse = dataclasses.replace(report, original=report.compressed, compressed=report.original)
    assert "0.52×, more" in str(worse)
    assert (page.headlines(worse)[0].value, page.headlines(worse)[0].label) == ("1.94×", "more parameters")


def test_nothing_left_is_no_division_by_zero():
    report = sample()
    empty = dataclasses.replace(report, compressed=ModelNumbers("Empty", 0, 0, 0, {}))
    assert "269,722" in str(empty)
    assert "0" in page.html(empty)


def test_markdown_tables_have_as_many_cells_everywhere(tmp_path):
    path = tmp_path / "report.md"
    sample(("stem", HOSTILE)).save(path)
    text = path.read_text(encoding="utf-8")
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    assert "<script" not in text.replace("\\<script", "")
    assert "2,304 → 1,224" in text


def test_csv_holds_every_layer_and_total(tmp_path):
    path = tmp_path / "report.csv"
    sample(("stem", "=1+1", 'with, "quotes"')).save(path)
    rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    layers = {(row["name"], row["quantity"]): row for row in rows if row["scope"] == "layer"}
    assert len(layers) == 6
    assert layers["stem", "MACs"]["decision"] == "keep"
    assert layers['with, "quotes"', "parameters"]["ghost"] == "1224"
    assert layers['with, "quotes"', "parameters"]["ratio"] == "2.0"
    assert layers["'=1+1", "parameters"]["original"] == "2304"
    totals = {row["quantity"]: row for row in rows if row["scope"] == "model"}
    assert (totals["MACs"]["original"], totals["MACs"]["ghost"]) == ("40551040", "21271168")
    assert float(totals["latency, median"]["original/ghost"]) == 1.22
    assert float(totals["top-1 accuracy"]["ghost"]) == 0.9015


def test_txt_holds_layers_and_definitions(tmp_path):
    sample().save(tmp_path / "report.txt")
    text = (tmp_path / "report.txt").read_text(encoding="utf-8")
    assert "layer1.0.conv1" in text
    assert "FLOPs = 2 × MACs" in text
    assert str(sample()) in text


def test_an_unknown_suffix_names_the_known(tmp_path):
    for name in ("report.pdf", "report"):
        with pytest.raises(OptionError, match=r"\.html, \.md, \.json, \.csv, \.txt"):
            sample().save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_html_is_whole_and_needs_nothing_else(tmp_path):
    path = tmp_path / "report.HTML"
    sample().save(path)
    text = path.read_text(encoding="utf-8")
    outline = Outline(text)
    assert outline.open == []
    assert outline.tags.count("svg") == 3
    assert not {"script", "link", "img", "iframe"} & set(outline.tags)
    names = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # name spaces: never loaded
    assert set(re.findall(r"https?://[^\s\"'<>)]+", text)) <= names
    for _, name, value in outline.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith("#")
    assert not re.search(r"@import|url\((?!#)", text)
    words = " ".join(outline.words)
    for fact in (
        "1.94×",
        "269,722",
        "−1.58",
        "93.12 %",
        "the first layer",
        "1 thread,",
        "FLOPs = 2 × MACs",
        "aten.bmm",
    ):
        assert fact in words


def test_html_without_plan_data_and_history_has_no_plots():
    report = dataclasses.replace(sample(), latency=None, accuracy=None, plan=None, history=(), remarks=())
    outline = Outline(page.html(report))
    assert outline.open == []
    assert "svg" not in outline.tags


def test_html_escapes_names():
    report = dataclasses.replace(sample((HOSTILE, "b"), model=HOSTILE), remarks=(HOSTILE,))
    text = page.html(report, points=[Point(HOSTILE, 1e6, 0.9)])
    outline = Outline(text)
    assert "script" not in outline.tags
    assert "<script" not in text
    assert HOSTILE in "".join(outline.words)


def test_ids_on_the_page_are_unique_and_every_reference_leads_somewhere():
    outline = Outline(page.html(sample()))
    ids = [value for _, name, value in outline.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    references = [value[1:] for _, name, value in outline.attributes if name == "xlink:href"]
    clips = [value[5:-1] for _, name, value in outline.attributes if name == "clip-path"]
    assert references
    assert clips
    assert set(references) | set(clips) <= set(ids)


def svg_of(text):
    return ET.fromstring(text)


def test_figures_are_svg_and_the_same_every_time():
    report = sample()
    for draw in (
        lambda: figures.layer_macs(report.plan),
        lambda: figures.site_fits(started(report.plan)),
        lambda: figures.accuracy_against_macs([Point("a", 1e6, 0.9), Point("b", 5e5, 0.89), Point("c", 6e5, 0.889)]),
        lambda: figures.training_curves(report.history, 0.9173),
    ):
        first = draw()
        assert svg_of(first).tag.endswith("svg")
        assert draw() == first


def started(plan):
    """A plan whose start was measured at the replaced sites."""
    decisions = (dataclasses.replace(d, explained=0.8, error=0.1) if d.replaced else d for d in plan)
    return dataclasses.replace(plan, decisions=tuple(decisions))


def widths_of(svg, name):
    patches = (
        element.find("{*}path").get("d")
        for element in svg_of(svg).iter("{http://www.w3.org/2000/svg}g")
        if (element.get("id") or "").startswith(f"{name}-patch")
    )
    x = ([float(number) for number in re.findall(r"[ML] ([\d.]+)", path)] for path in patches)
    return [round(max(places) - min(places), 1) for places in x]


def test_the_bars_are_as_long_as_what_is_missed():
    report = sample()
    assert len(report.plan.replaced) == 1
    widths = widths_of(figures.site_fits(started(report.plan)), "fits")
    assert any(one == pytest.approx(2 * other, abs=0.3) for one in widths for other in widths if other > 50)
    shown = "What every Ghost unit missed"
    assert shown in page.html(dataclasses.replace(report, plan=started(report.plan)))
    assert shown not in page.html(report)


def test_the_bars_are_as_long_as_the_macs():
    few = figures.layer_macs(sample().plan)
    many = figures.layer_macs(sample(tuple(f"layer{index}" for index in range(60))).plan)

    def height(text):
        return float(svg_of(text).get("viewBox").split()[3])

    assert height(many) > height(few) + 50 * 14  # at least 14 points for every layer
    widths = sorted(widths_of(few, "layers"))
    before, after = 2_359_296, 2_359_296 // 2 + 73_728
    full = max(value for value in widths if widths.count(value) == 3)  # two originals, and the layer that is kept
    assert any(value == pytest.approx(full * after / before, abs=0.2) for value in widths)


def test_the_callers_matplotlib_is_untouched():
    matplotlib = importlib.import_module("matplotlib")
    with matplotlib.rc_context({"axes.facecolor": "black", "svg.fonttype": "none"}):
        before = dict(matplotlib.rcParams)
        styled = figures.layer_macs(sample().plan)
        assert dict(matplotlib.rcParams) == before
    assert styled == figures.layer_macs(sample().plan)


@pytest.mark.parametrize("module", ["jinja2", "matplotlib"])
def test_only_html_needs_the_extra(module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # what the import system sees as "not found"
    with pytest.raises(MissingExtraError, match=r"ghostify\[report\]"):
        sample().save(tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []
    for suffix in (".md", ".json", ".csv", ".txt"):
        sample().save(tmp_path / f"report{suffix}")
    assert len(list(tmp_path.iterdir())) == 4


def test_importing_does_not_import_the_extra():
    code = "import sys, ghostify.reporting; print({'matplotlib', 'jinja2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
