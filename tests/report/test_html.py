"""The page: complete, self-contained, and safe whatever names and texts the results hold."""

import json
import re
from html.parser import HTMLParser

import pytest

from kvq.report.html import html_report


class Page(HTMLParser):
    """Tags that load something, unbalanced tags, and the visible text."""

    LOADING = ("src", "href", "data", "action", "poster", "srcset", "xlink:href")
    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self, text: str):
        super().__init__()
        self.loads, self.open, self.wrong, self.texts, self.tags = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        # Drawings name parts of their own: "#part".
        self.loads += [(tag, name, at) for name, at in attributes if name in self.LOADING and not at.startswith("#")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


@pytest.fixture
def several(make_result):
    return [make_result("fp16", 0.0), make_result("kivi4", 0.004), make_result("kivi2", 0.06)]


def test_the_page_loads_nothing_and_its_tags_are_closed(several):
    for results in (several, several[2:]):
        text = html_report(results)
        page = Page(text)
        assert page.loads == []
        assert page.wrong == []
        assert page.open == []
        assert "@import" not in text
        assert "url(" not in text.replace("url(#", "")
        assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)


def test_the_verdict_comes_first_and_everything_measured_is_there(make_result):
    text = Page(html_report([make_result("kivi2", 0.06)])).text
    order = ["kivi2 changes the model noticeably", "In pictures", "By task", "Needles", "Memory", "To repeat it"]
    places = [text.index(word) for word in order]
    assert places == sorted(places)
    for word in ("0.0600", "arc_easy", "60 asked", "% flipped (", "tokens a second", "0.80x", "3.30"):
        assert word in text
    assert "kvq eval tiny --recipe kivi2" in text
    assert "what token-by-token decoding would have read" in text


def test_charts_are_drawn_from_the_numbers(several):
    text = html_report(several)
    assert text.count("kivi4: 5.20 bits, KL 0.0040") == 1
    assert text.count("kivi2: 3.30 bits, KL 0.0600") == 1
    # 30 layers of two recipes, and a cell for every depth and length of the baseline and three results.
    assert len(re.findall(r"layer \d+: \d", text)) >= 60
    assert text.count("found</title>") == 4 * 6
    assert "Size against score" in text
    for label in (
        "bits per element at 131,072 tokens",
        "KL from baseline, nats a token",
        "mean score, %",
        "layer",
        "depth",
    ):
        assert f">{label}</text>" in text


def test_intervals_are_on_their_side(make_result):
    result = make_result("kivi2", 0.06)
    text = html_report([result])
    title = 'title="difference −10.0 [−18.2, −1.8]: worse"'
    (bar,) = re.findall(rf'<span class="interval bad" role="img" {re.escape(title)}.*?</span>', text)
    left, width, at = map(float, re.findall(r"(?:left|width):([\d.]+)%", bar))
    assert left < at < left + width < 50
    result["results"]["perplexity"] |= {"low": None, "high": None}
    bar = re.search(
        r'<span class="interval \w+" role="img" title="difference \+0.0600:.*?</span>', html_report([result])
    )
    assert "<b " in bar[0]
    assert "<i " not in bar[0]


def test_one_result_has_no_chart_of_several(make_result):
    text = html_report([make_result("kivi2", 0.06)])
    assert "Size against error" not in text
    assert "Error by layer" in text


def test_texts_of_others_cannot_leave_their_place(make_result):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    result = make_result("kivi2", 0.06, model=evil, command=f"kvq eval '{evil}'")
    result["results"]["divergence"]["worst"]["token"] = evil
    result["results"][evil] = result["results"]["arc_easy"]
    page = Page(html_report([result]))
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert page.wrong == []


def test_the_numbers_are_in_the_page(several):
    text = html_report(several)
    data = re.search(r'<script type="application/json" id="results">(.*?)</script>', text, re.DOTALL)[1]
    found = json.loads(data)
    assert [run["recipe"]["name"] for run in found] == ["fp16", "kivi4", "kivi2"]
    assert found[2]["results"]["divergence"]["kl"] == 0.06


def test_infinite_numbers_do_not_break_it(make_result):
    result = make_result("kivi2", 0.06)
    result["results"]["perplexity"]["value"] = float("inf")
    text = html_report([result])
    assert "inf" in Page(text).text
    data = re.search(r'id="results">(.*?)</script>', text, re.DOTALL)[1]
    assert json.loads(data)[0]["results"]["perplexity"]["value"] is None


def test_results_that_cannot_be_compared_say_so(make_result):
    other = make_result("kivi2", 0.06, mode="prefill")
    assert "different modes" in Page(html_report([make_result("kivi4", 0.004), other])).text
    assert "different modes" not in Page(html_report([make_result("kivi4", 0.004), make_result("kivi2")])).text


def test_the_same_results_give_the_same_page(several):
    assert html_report(several) == html_report(json.loads(json.dumps(several)))
