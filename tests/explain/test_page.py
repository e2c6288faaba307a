"""The page in a real browser, headless Chromium: it renders, is quiet, stays alone, fits a phone, a desk and paper."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
from PIL import Image
from plan_samples import WORK, large, lowered, model, report, skipped, small
from typer.testing import CliRunner

from moepass import cli
from moepass.explain.analysis import Analysis, SiteAnalysis, Timing
from moepass.explain.report import GraphPlan, KernelSource, PlanReport
from moepass.lowering.hardware import Hardware
from moepass.lowering.sweep import sweep

pytestmark = pytest.mark.skipif(
    browser.find() is None, reason=f"no browser: none of {', '.join(browser.NAMES)} is installed (.ci/run asks apt)"
)

PHONE, DESK = (390, 844), (1280, 900)
EVIL = (
    "<script>window.hacked = 1</script><img src='http://example.invalid/x.png' onerror='window.hacked = 1'>\"'&</style>"
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Browser]:
    with browser.Browser() as opened:
        yield opened


def kernel(text: str | None = None) -> KernelSource:
    return KernelSource(
        name=text or "forward_up",
        site=text or "layers.0.mlp",
        target=text or "sm_90",
        source=text or "def up():\n    pass\n",
        registers=168,
        spills=0,
        shared_bytes=98304,
        tile=text or "128x128x64",
    )


def everything(layers: int = 4) -> PlanReport:
    """A report with all that a page can show."""
    ids = [f"layers.{i}.mlp" for i in range(layers)]
    sites = [lowered(name, plan, f"{plan.tokens}") for name in ids for plan in (small(), large())]
    timings = tuple(
        Timing(lowering=name, seconds=s, fastest=s, slowest=2 * s, runs=5, peak_bytes=1 << 20, padding_rows=7)
        for name, s in (("grouped", 1.3e-3), ("dense", 9e-3))
    )
    seen = tuple(
        SiteAnalysis(
            id=name,
            tokens=4096,
            load=tuple((7 * i + 13 * e) % 50 for e in range(8)),
            dropped=i,
            timed_as=name,
            timings=timings,
        )
        for i, name in enumerate(ids)
    )
    before = "def forward(self, x):\n" + "".join(f"    a{i} = torch.relu(x)  # {'long ' * 40}\n" for i in range(30))
    return report(
        *sites,
        skipped("head"),
        kind="analyze",
        settings={"inner": "inductor"},
        graphs=(GraphPlan(index=0, before=before, after=before.replace("relu", "moepass.experts_grouped", 3)),),
        notes=("a note",),
        sweeps=(sweep(WORK.model_copy(update={"tokens": 0}), Hardware.preset("H100")),),
        analysis=Analysis(source="made by hand", machine={"processor": "none"}, load_average=0.5, sites=seen),
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "plan.html"
    path.write_text(everything().to_html())
    return path


BOXES = """[...document.querySelectorAll('%s')].map(e => {
  const b = e.getBoundingClientRect(); return [b.left, b.top + scrollY, b.right, b.bottom + scrollY]; })"""


def boxes(chromium: browser.Browser, selector: str) -> list[list[float]]:
    found: list[list[float]] = chromium.evaluate(BOXES % selector)
    return found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_the_page_renders_fits_and_is_quiet(chromium, page, size, dark):
    width, height = size
    chromium.open(page, width=width, height=height, dark=dark)

    assert chromium.evaluate("document.title") == f"moepass plan {everything().fingerprint}"
    assert chromium.problems() == []
    assert chromium.requests() == []
    assert chromium.evaluate("innerWidth") == width
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width
    cards = boxes(chromium, "section.card")
    assert len(cards) == 3, "two kinds of blocks, and the graph"
    assert all(0 <= left < right <= width and bottom - top > 50 for left, top, right, bottom in cards)
    assert all(above[3] <= below[1] for above, below in itertools.pairwise(cards)), "one below the other"
    inside = boxes(chromium, ":is(td, th, h2, h3, p, figure, summary):not(.scroll *, thead *)")
    assert all(0 <= left <= right <= width for left, _, right, _ in inside), "nothing sticks out"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_the_screenshot_shows_the_charts_where_the_layout_has_them(chromium, page, size, dark):
    chromium.open(page, width=size[0], height=size[1], dark=dark)
    shot = Image.open(io.BytesIO(chromium.screenshot())).convert("RGB")
    assert shot.width == size[0]
    assert shot.height == chromium.evaluate("document.documentElement.scrollHeight")

    paper = shot.getpixel((2, 2))
    assert (sum(paper) < 150) == dark
    charts = boxes(chromium, "figure svg")
    assert len(charts) == 3, "time, roofline, heat map"
    for left, top, right, bottom in charts:
        assert right - left >= 300, "wide enough to read"
        colours = shot.crop((int(left), int(top), int(right), int(bottom))).getcolors(1 << 24)
        assert len(colours) > 50
        assert shot.getpixel((int(left) + 2, int(top) + 2)) == paper, "the chart stands on the page's own colour"
    if size == DESK:
        assert charts[0][1] == charts[1][1], "two charts side by side on a desk"
    else:
        assert charts[0][3] <= charts[1][1], "one below the other on a phone"


def test_letters_in_charts_can_be_read_on_a_phone(chromium, page):
    chromium.open(page, width=PHONE[0], height=PHONE[1])
    heights = chromium.evaluate(
        "[...document.querySelectorAll('figure svg text')].filter(t => t.textContent.trim() && !t.textContent.includes("
        "'seconds') && !t.textContent.includes('FLOP')).map(t => t.getBoundingClientRect().height)"
    )
    assert len(heights) > 20
    assert sorted(heights)[len(heights) // 10] >= 7, "CSS pixels"


def test_tables_become_labelled_lines_on_a_phone(chromium, page):
    label = "getComputedStyle(document.querySelector('table.stack td.bar'), '::before').content"
    chromium.open(page, width=PHONE[0], height=PHONE[1])
    assert chromium.evaluate(label) == '"estimated"'
    chromium.open(page, width=DESK[0], height=DESK[1])
    assert chromium.evaluate(label) == "none"


def test_measured_and_estimated_times_stand_in_tables_of_their_own(chromium, page):
    chromium.open(page, width=DESK[0], height=DESK[1])
    heads = chromium.evaluate("[...document.querySelectorAll('table.measured thead')].map(h => h.innerText)")
    assert heads
    assert all("measured" in h and "of its estimate" in h for h in heads)
    assert "Measured at T = 4096, medians over 4 sites" in chromium.evaluate("document.body.innerText")
    legend = chromium.evaluate("document.querySelector('figure svg').textContent")
    assert "grouped, measured" in legend
    assert "lines estimated, dots measured" in legend


def test_paper_shows_what_the_screen_folds_away(chromium, page):
    tables = "[...document.querySelectorAll('details:not([open]) table')]"
    folded = f"{tables}.map(e => e.getBoundingClientRect().height)"
    visible = f"{tables}.map(e => e.checkVisibility({{contentVisibilityAuto: true}}))"
    chromium.open(page, width=DESK[0], height=DESK[1])
    assert not any(chromium.evaluate(visible))
    chromium.open(page, width=DESK[0], height=DESK[1], media="print")
    assert all(chromium.evaluate(visible))
    assert all(height > 20 for height in chromium.evaluate(folded))
    printed = chromium.pdf()
    assert printed.startswith(b"%PDF")
    assert printed.count(b"/Type /Page\n") >= 2 or b"/Count" in printed


def test_nothing_in_a_report_can_run_load_or_escape(chromium, tmp_path):
    site = skipped(EVIL).model_copy(update={"detail": EVIL, "hint": EVIL, "reason": EVIL})
    seen = SiteAnalysis(
        id="a", tokens=64, load=(1, 2), timed_as="a", timings=(Timing(lowering=EVIL, failed=EVIL),), skipped=EVIL
    )
    hostile = report(
        site,
        lowered("a", small(), EVIL),
        settings={EVIL: EVIL},
        notes=(EVIL,),
        hardware=EVIL,
        graphs=(GraphPlan(index=0, guards=(EVIL,), cache=EVIL, before=f"a\n{EVIL}", after=f"{EVIL}\nb"),),
        analysis=Analysis(source=EVIL, machine={"processor": EVIL}, sites=(seen,)),
        kernels=(kernel(EVIL),),
    )
    path = tmp_path / "evil.html"
    path.write_text(hostile.to_html())
    chromium.open(path, width=PHONE[0], height=PHONE[1])

    assert chromium.evaluate("window.hacked") is None
    assert chromium.evaluate("document.querySelectorAll('script, img, iframe, object').length") == 0
    assert chromium.requests() == []
    assert chromium.problems() == []
    assert chromium.evaluate("document.body.innerText.split('window.hacked = 1').length - 1") >= 10
    assert chromium.evaluate("document.documentElement.scrollWidth") <= PHONE[0]


def test_kernels_are_shown_with_their_budget(chromium, tmp_path):
    path = tmp_path / "kernels.html"
    path.write_text(model().model_copy(update={"kernels": (kernel(),)}).to_html())
    chromium.open(path, width=DESK[0], height=DESK[1])
    shown = " ".join(chromium.evaluate("document.querySelector('#kernels').innerText").split())
    told = ("forward_up for sm_90", "layers.0.mlp", "tile 128x128x64", "registers 168", "spills 0", "memory 96 KiB")
    for words in told:
        assert words in shown
    assert chromium.evaluate("document.querySelector('#kernels pre').textContent").startswith("def up():")


def test_many_layers_and_a_report_without_anything_render_too(chromium, tmp_path):
    for name, made in (("many", model(60)), ("none", report())):
        path = tmp_path / f"{name}.html"
        path.write_text(made.to_html())
        chromium.open(path, width=PHONE[0], height=PHONE[1])
        assert chromium.problems() == []
        assert chromium.evaluate("document.documentElement.scrollWidth") <= PHONE[0]


def test_forms_of_expert_parallelism_have_a_table_of_their_own(chromium, tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))\n"
    )
    path = tmp_path / "mesh.html"
    asked = ["--mesh", "node=2,ep=4", "--hardware", "h200", "--tokens", "16384", "--format", "html", "-o", str(path)]
    result = CliRunner().invoke(cli.app, ["explain", f"{tmp_path}/net.py:net", *asked])
    assert result.exit_code == 0, result.stderr
    for width, height in (PHONE, DESK):
        chromium.open(path, width=width, height=height)
        assert chromium.problems() == []
        assert chromium.evaluate("document.documentElement.scrollWidth") <= width
        heads = chromium.evaluate("[...document.querySelectorAll('table.forms tbody th')].map(e => e.innerText)")
        assert {"all_to_all", "all_gather", "hierarchical"} <= set(heads)
        assert "tokens of each rank" in chromium.evaluate("document.body.innerText")
