"""The numbers of the documentation are those of the results files, and no measured number comes from nowhere."""

import doctest
import json

import pytest

from benchmarks import numbers

DOCUMENTS = [path for path in numbers.documents() if path != numbers.CARD or (numbers.RESULTS / "head.json").exists()]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(numbers.ROOT)))
def test_numbers_are_those_of_the_results(path):
    text = path.read_text()
    assert numbers.render(text) == text, "run `python -m benchmarks.numbers`"
    assert not numbers.unsourced(text), "give each a source (see benchmarks/numbers.py)"


@pytest.fixture
def results(tmp_path):
    value = {"a b": [{"x.y": 1.256}], "count": 12345, "bytes": 25.7e9, "share": 0.043}
    (tmp_path / "r.json").write_text(json.dumps(value))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('**9.9**<!-- r.json: ["a b"][0]["x.y"] .2f -->', "**1.26**"),
        ("-3x <!-- r.json: count , --> and 4", "12,345x "),
        ("| 1.0 GB/s <!-- r.json: bytes / 1e9 .1f --> |", "| 25.7 GB/s "),
        ("7%<!-- r.json: share .1% -->", "4.3%"),
    ],
)
def test_render_writes_what_the_file_says(results, text, wanted):
    rendered = numbers.render(text, results)
    assert rendered.startswith(wanted) and rendered[len(wanted) :] == text[text.index("<!--") :]
    assert numbers.render(rendered, results) == rendered


def test_a_report_stands_as_its_benchmark_prints_it(results, monkeypatch):
    monkeypatch.setitem(numbers.REPORTS, "r.json", lambda found: f"| {found['count']} | 1.5x |\n")
    rendered = numbers.render("a\n\n<!-- report: r.json -->\nold, 2.5\n<!-- end -->\n\n3.5 b", results)
    assert rendered == "a\n\n<!-- report: r.json -->\n\n| 12345 | 1.5x |\n\n<!-- end -->\n\n3.5 b"
    assert numbers.render(rendered, results) == rendered and numbers.unsourced(rendered) == ["3.5"]
    with pytest.raises(LookupError, match="none.json"):
        numbers.render("<!-- report: none.json -->\n<!-- end -->", results)


@pytest.mark.parametrize(
    "comment", ["none.json: a .2f", "r.json: missing .2f", "r.json: count[0] d", "r.json: count q"]
)
def test_a_source_that_is_not_there_is_named(results, comment):
    with pytest.raises(LookupError, match="json: "):
        numbers.render(f"1.5<!-- {comment} -->", results)


@pytest.mark.parametrize("comment", ["<!-- r.json: count d -->", "<!-- r.json: count -->"])
def test_a_source_of_no_number_is_found(comment):
    """Too far from its number or not of the right form: it would hide a number that nobody checks."""
    assert numbers.unsourced(f"1.5 is what came out of it in the end {comment}") == [comment, "1.5"]


def test_the_examples_in_the_docstrings():
    found = doctest.testmod(numbers)
    assert found.attempted and not found.failed
