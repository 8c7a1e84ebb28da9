"""Measured numbers in the documentation come from files under benchmarks/results/, or say that they have none.

    python -m benchmarks.numbers            rewrites the numbers that are out of date
    python -m benchmarks.numbers --check    only says which, and exits with 1

A number in Markdown is followed by a comment with its source: the file, the path in its JSON, what to divide by if it
is shown in another unit, and the format of Python's `format`:

    kappa is **1.44**<!-- head.json: gsm8k.k4.kappa .2f -->, 25.7 GB/s <!-- machine.json: bytes_per_second / 1e9 .1f -->

Keys that are no words go in brackets, `files["a.jsonl"].decoded[0].kappa`, and so does what picks one record of a list,
`entries[contestant=auto][batch_size=4].speedup`. Markdown, a unit of a few letters or a sign may stand between the
number and its comment. A whole report stands between `<!-- report: decode.json -->` and `<!-- end -->`, as its
benchmark prints it. A paragraph or table marked `<!-- paper -->` quotes the paper, one marked `<!-- setting -->` states
what somebody chose, one marked `<!-- unrecorded -->` what was measured, of earlier heads, and has no file; `unsourced`
finds the decimal numbers and percentages that have none of these.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks import ablations, drafters, lossless, serving
from benchmarks.cpu_peers import report as peers
from benchmarks.harness import client_table, report
from benchmarks.simulate import report as simulation
from benchmarks.verifiers import accuracy
from benchmarks.verifiers import report as verifiers

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CARD = ROOT / "specformer_jax" / "pretrained" / "smollm2-135m" / "README.md"
REPORTS = {
    "ablations.json": ablations.markdown,
    "accuracy.json": accuracy.markdown,
    "clients.json": client_table.markdown,
    "cpu_peers.json": peers.markdown,
    "decode.json": report.markdown,
    "drafters.json": drafters.markdown,
    "drafters_480.json": drafters.markdown,
    "lossless.json": lossless.markdown,
    "serving.json": serving.markdown,
    "serving_project.json": serving.markdown,
    "simulation.json": simulation.markdown,
    "verifiers.json": verifiers.markdown,
}

_NUMBER = r"[-−]?\d[\d,]*(?:\.\d+)?%?"
_SOURCE = r"<!--\s*(?P<file>[\w.-]+\.json):\s*(?P<path>.+?)(?:\s+/\s+(?P<unit>[\d.e]+))?\s+(?P<format>\S+)\s*-->"
_COMMENT = re.compile(r"<!--[^>\n]*\.json:.*?-->")
_SOURCED = re.compile(rf"(?P<number>{_NUMBER})(?P<between>[^\d\n|<]{{0,12}}){_SOURCE}")
_REPORT = re.compile(r"(?P<begin><!-- report: (?P<file>[\w.-]+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
_KEY = re.compile(
    r'\.?(?P<name>[\w-]+)|\[(?P<index>\d+)\]|\["(?P<quoted>[^"]*)"\]|\[(?P<field>\w+)=(?P<value>[^\]]*)\]'
)
# A decimal or a percentage that is no part of a name, a version or a longer number: Qwen2.5, Llama-3.1, 0.10.2.
_MEASURED = re.compile(r"(?<![\w.,\-])(?:\d[\d,]*\.\d+%?|\d[\d,]*\s?%)(?![\w.]*\.?\d)")
_NAMED = re.compile(r"\b(?:Python|arXiv|CUDA|CC BY|temperature|top-p|min-p)\s\d[\d.]*")
_NOT_TEXT = re.compile(r"```.*?```|`[^`\n]*`|\]\([^)\n]*\)|<!--.*?-->|<[^>\n]*>", re.DOTALL)


def documents() -> list[Path]:
    """The Markdown files whose numbers are checked."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), CARD]


def look_up(value: Any, path: str) -> Any:
    """The value at a path such as `a.b[2]["c d"][k=4]`.

    >>> look_up({"a": [{"k": 0, "k = 4": 1.0}, {"k": 4, "k = 4": 1.25}]}, 'a[k=4]["k = 4"]')
    1.25

    Raises:
      LookupError: there is nothing at the path, or more than one record.
    """
    at = 0
    while at < len(path):
        key = _KEY.match(path, at)
        if key is None:
            raise LookupError(f'{path!r} is no path: write a.b[0] or a["b c"]')
        try:
            if key["field"]:
                value = [record for record in value if str(record[key["field"]]) == key["value"]]
            elif key["index"]:
                value = value[int(key["index"])]
            else:
                if isinstance(value, list):
                    (value,) = value
                value = value[key["name"] or key["quoted"]]
        except (LookupError, TypeError, ValueError) as error:
            raise LookupError(f"there is no {path!r}") from error
        at = key.end()
    return value


def render(text: str, results: Path = RESULTS) -> str:
    """The text with every sourced number and report as the results files have them.

    Raises:
      LookupError: a source that is not there; the message names it.
    """

    def whole(match: re.Match) -> str:
        file = match["file"]
        if file not in REPORTS or not (results / file).exists():
            raise LookupError(f"{file}: there is no report of it")
        text = REPORTS[file](json.loads((results / file).read_text())).strip()
        return f"{match['begin']}\n{text}\n\n{match['end']}"

    def current(match: re.Match) -> str:
        source = f"{match['file']}: {match['path']}"
        try:
            value = look_up(json.loads((results / match["file"]).read_text()), match["path"])
            value = value if match["unit"] is None else value / float(match["unit"])
            return format(value, match["format"]) + match[0][len(match["number"]) :]
        except (OSError, LookupError, ValueError, TypeError) as error:
            raise LookupError(f"{source}: {error}") from error

    return _SOURCED.sub(current, _REPORT.sub(whole, text))


def unsourced(text: str) -> list[str]:
    """Decimal numbers and percentages of the text and its tables that come from nowhere, and sources of no number.

    >>> unsourced("Qwen2.5 on Python 3.11: 1.8x and 40 %, `0.9` of it in [a](b-0.1.md), 3 <!-- a.json: x .0f --> of 4")
    ['1.8', '40 %']
    >>> unsourced("1.78 to 1.81 times <!-- paper -->")
    []
    """
    found = []
    text = re.sub(r"```.*?```", "", _REPORT.sub("", text), flags=re.DOTALL)
    for paragraph in re.split(r"\n\s*\n", text):
        if any(f"<!-- {mark} -->" in paragraph for mark in ("paper", "setting", "unrecorded")):
            continue
        paragraph = _SOURCED.sub(" ", paragraph)
        found += _COMMENT.findall(paragraph)
        plain = _NOT_TEXT.sub(" ", paragraph)
        found += [match[0] for match in _MEASURED.finditer(_NAMED.sub(" ", plain))]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if any is out of date")
    options = parser.parse_args()
    stale = 0
    for path in documents():
        old = path.read_text()
        new = render(old)
        for line in difflib.unified_diff(old.splitlines(), new.splitlines(), str(path.relative_to(ROOT)), n=0):
            print(line)
            stale += 1
        if not options.check and new != old:
            path.write_text(new)
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
