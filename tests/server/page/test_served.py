"""The page's files as they are served."""

import fnmatch
import re
import tomllib
from pathlib import Path

import pytest

from specformer_jax.server.routes.page import FOLDER
from tests.server.loopback import running
from tests.server.page.paced import PacedEngine

ROOT = Path(__file__).parents[3]
FILES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file())
OWN = [name for name in FILES if not name.startswith("vendor/")]
KINDS = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_says_what_it_is_and_what_may_run(served, name):
    status, headers, body = served.request("GET", f"/page/{name}")
    assert status == 200 and body == (FOLDER / name).read_bytes()
    assert headers["content-type"].partition(";")[0] == KINDS[Path(name).suffix]
    policy = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'" and policy["trusted-types"] == "'none'"
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


def test_the_page_needs_no_key_and_other_files_are_not_there():
    with running(PacedEngine(), api_keys=["secret"]) as served:
        assert served.request("GET", "/")[2] == (FOLDER / "index.html").read_bytes()
        assert all(served.request("GET", f"/page/{name}")[0] == 200 for name in FILES)
        assert served.request("GET", "/v1/models")[0] == 401
        for elsewhere in ("missing.js", "../service.py", "..%2fservice.py", "%2e%2e/service.py", "/etc/passwd", ""):
            assert served.request("GET", f"/page/{elsewhere}")[0] in (401, 404), elsewhere


def test_what_the_page_names_is_there():
    """Names are relative, so that the page works behind any prefix."""
    html = (FOLDER / "index.html").read_text()
    assert re.findall(r"<script[^>]*>", html) == ['<script type="module" src="page/main.js">'], "no script within it"
    assert " style=" not in html and not re.search(r"\son\w+=", html)
    for link in re.findall(r'(?:src|href)="([^"]+)"', html):
        assert link.removeprefix("page/") in FILES and link.startswith("page/")
    for name in OWN:
        text = (FOLDER / name).read_text()
        assert len(text.splitlines()) <= 300 and max(map(len, text.splitlines())) <= 120, name
        assert not re.search(r"https?://(?!www\.w3\.org)", text), name
        for module in re.findall(r'from "([^"]+)"', text):
            assert (FOLDER / name).parent.joinpath(module).resolve().is_file(), f"{name}: {module}"


def test_no_text_is_ever_parsed_as_html():
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\(|new Function|srcdoc"
    assert not [name for name in OWN if re.search(sinks, (FOLDER / name).read_text())]


def test_the_package_holds_all_of_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["specformer_jax"]
    assert all(
        any(fnmatch.fnmatch(f"server/page/{name}", pattern.replace("**/", "*")) for pattern in patterns)
        for name in FILES
    )
    assert "specformer_jax/server/page/vendor/marked.LICENSE.txt" in project["project"]["license-files"]
    assert "MIT" in (FOLDER / "vendor" / "marked.js").read_text()[:300]
