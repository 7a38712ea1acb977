"""report.html: complete, self-contained, and nothing in it is interpreted."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from condgen.engine.log import Log
from condgen.engine.report import write_report
from condgen.engine.run import RunFolder
from condgen.show.chart import line_chart, ticks

CREDIT = "Icons: OpenMoji, CC BY-SA 4.0"


@pytest.fixture
def run(tmp_path):
    run = RunFolder.create(tmp_path, "text2image-gan_cls")
    log = Log(run, quiet=True)
    for step in range(0, 1000, 2):
        log.scalars(
            step, {"generator/loss": 1 / (step + 1), "critic/real": 0.5, "critic/fake": step / 1000, "lr": 2e-4}
        )
    for step in range(0, 1000, 100):
        log.media(step, "grid", Image.new("RGB", (8, 8), (step // 4, 0, 0)))
    log.close()
    scores = [
        {"name": "r_precision", "value": 0.41234, "floor": 0.1, "ceiling": 0.83, "signature": "rprec|n=500",
         "higher_is_better": True},
        {"name": "fid", "value": 103.2, "floor": None, "ceiling": None, "signature": "fid|ext=pixels",
         "higher_is_better": False},
    ]  # fmt: skip
    (run.evals / "step-00001000.json").write_text(json.dumps({"scores": scores, "attribution": CREDIT}))
    (run.export / "config.json").write_text(json.dumps({"data": {"name": "openmoji", "attribution": CREDIT}}))
    run.write_config("task: text2image\nsystem:\n  name: gan_cls\n")
    run.write_command(["condgen", "train", "task=text2image"])
    run.write_environment()
    run.status("done", 0, "all steps done", 1000)
    return run


class Page(HTMLParser):
    """Every tag and attribute of a page, and its text; complains about tags that do not nest."""

    VOID = ("meta", "img", "br", "hr", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"unclosed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(self.words)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def read(run):
    return Page(write_report(run).read_text(encoding="utf-8"))


def test_a_report_shows_curves_pictures_scores_and_facts(run):
    page = read(run)
    assert [len(page.all(tag)) for tag in ("svg", "img", "h1", "table")] == [3, 5, 1, 1]
    assert len(page.all("polyline")) == 4
    for word in (
        "generator", "critic", "real", "fake", "learning rate", "grid, step 900", "grid, step 0", "r_precision",
        "0.4123", "0.83",
        "rprec|n=500", "103.2", "higher", "lower", "name: gan_cls", "condgen train task=text2image", "torch", "done",
        "step 1000", "all steps done", CREDIT,
    ):  # fmt: skip
        assert word in page.text, word


def test_a_report_loads_nothing_from_anywhere(run):
    page = read(run)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
    for tag, attrs in page.tags:
        for name, value in attrs.items():
            assert not name.startswith("on"), f"{tag} {name}"
            assert name not in ("href", "srcset", "data", "xlink:href")
            assert name != "src" or value.startswith("data:image/")
    text = (run.path / "report.html").read_text()
    assert not re.search(
        r"https?:|//[a-z]|url\(|@import", text.replace("data:image/png;base64,", "").split("<body>")[0]
    )
    assert "default-src 'none'" in text


def test_hostile_names_and_texts_are_shown_not_interpreted(run):
    evil = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>"
    log = Log(run, quiet=True)
    log.scalars(1000, {f"{evil}/a": 1.0, f"b/{evil}": 2.0})
    log.close()
    run.write_config(evil)
    run.status("failed", 1, evil, 3)
    (run.evals / "x.json").write_text(
        json.dumps([{"name": evil, "value": evil, "signature": evil, "attribution": evil}])
    )
    page = read(run)
    assert not page.all("script") and all(attrs["src"].startswith("data:") for attrs in page.all("img"))
    assert page.text.count("alert(1)") >= 8


def test_an_empty_run_still_has_a_report(tmp_path):
    page = read(RunFolder.create(tmp_path, "empty"))
    assert "empty" in page.text and "no status" in page.text and not page.all("svg")


def test_damaged_parts_are_left_out(run):
    (run.samples / "step-00009999-grid.png").write_bytes(b"not a picture")
    (run.evals / "broken.json").write_text("{")
    with open(run.metrics, "ab") as file:
        file.write(b'{"step": 7, "torn')
    page = read(run)
    assert "this picture cannot be read" in page.text and "r_precision" in page.text


def test_a_linked_picture_is_not_embedded(run, tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (2, 2)).save(secret)
    (run.samples / "step-00009999-grid.png").symlink_to(secret)
    assert "step 9999" not in read(run).text


def test_large_pictures_are_embedded_smaller(run):
    path = run.samples / "step-00009999-noise.png"
    Image.effect_noise((2000, 1600), 100).convert("RGB").save(path)
    assert path.stat().st_size > 1_500_000
    page = read(run)
    assert any(attrs["src"].startswith("data:image/jpeg") for attrs in page.all("img"))
    assert (run.path / "report.html").stat().st_size < path.stat().st_size


# charts


@pytest.mark.parametrize(
    "points",
    [[(0, 1.0)], [(0, 2.0), (1, 2.0)], [(0, 0.0), (5, 0.0)], [(0, 1e-12), (1, 1e12)], [(0, -3.0), (10, -1.0)],
     [(0, 1.0), (1, math.nan), (2, 3.0)], [(i, math.sin(i)) for i in range(5000)]],
)  # fmt: skip
def test_points_stay_inside_the_picture(points):
    page = Page(line_chart({"a": points}))
    places = [float(v) for attrs in page.all("polyline") for v in re.split("[ ,]", attrs["points"])]
    assert places and all(math.isfinite(v) for v in places)
    assert all(0 <= x <= 480 for x in places[::2]) and all(0 <= y <= 240 for y in places[1::2])


def test_a_value_that_is_not_finite_is_a_gap():
    assert len(Page(line_chart({"a": [(0, 1), (1, 2), (2, math.nan), (3, 4), (4, 5)]})).all("polyline")) == 2
    assert "no finite values" in line_chart({"a": [(0, math.inf)]})


def test_thinning_keeps_a_single_spike():
    points = [(float(i), 1000.0 if i == 7777 else math.sin(i)) for i in range(20_000)]
    attrs = Page(line_chart({"a": points})).all("polyline")[0]["points"].split()
    heights = [float(pair.split(",")[1]) for pair in attrs]
    assert len(attrs) < 700 and min(heights) < 20 < 200 < sorted(heights)[1]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.013, 0.87), (-5, 5), (1e-9, 2e-9), (0, 123456), (7, 8.1)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 6 and found[0] >= low - 1e-15 and found[-1] <= high * (1 + 1e-9)
    gap = found[1] - found[0]
    assert any(math.isclose(gap / 10 ** math.floor(math.log10(gap * 1.0001)), m, rel_tol=1e-6) for m in (1, 2, 5))
