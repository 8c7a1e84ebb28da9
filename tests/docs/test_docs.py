"""The documentation tells the truth: commands exist, links lead somewhere, figures show today's data, examples run."""

import argparse
import ast
import importlib
import itertools
import json
import re
import runpy
import shlex
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import serve
import train
from benchmarks.numbers import CARD, ROOT
from specformer_jax.training.config import load_config

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKING = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", CARD]

# Every command of the README and the docs begins with one of these; the value says who runs it, or why nobody does.
COMMANDS = {
    "pip install -e . && python serve.py generate --prompt": ".ci/run",
    'pip install -e ".[test]" && pytest': ".ci/run",
    'pip install -e ".[test,tpu-aot,gpu-aot]" && pytest -m "tpu_aot or gpu_aot"': ".ci/run, in steps",
    "python serve.py generate --target Qwen/": "needs the Hub; test_cli.py runs the same on a tiny target",
    "python serve.py generate --prompt": "the README's, with another flag; test_cli.py",
    "python serve.py generate --prompts": "minutes; test_cli.py runs the same flags on a tiny target",
    'pip install -e ".[serve]" && python serve.py http': "tests/server runs it on a tiny target",
    "python serve.py http": "the same",
    "python serve.py batch": "tests/server/wire/test_batch_file.py answers the same rows",
    "python train.py all": "hours; test_all.py shrinks it",
    "python train.py card": "test_the_training_commands_run",
    'pip install -e ".[train]"': "test_run_report.py has matplotlib or does without",
    "python train.py distill": "hours; test_the_training_commands_run shrinks it",
    "python train.py fit": "hours; test_the_training_commands_run shrinks it",
    "JAX_PLATFORMS=cpu python train.py fit": "minutes; test_the_training_commands_run shrinks it",
    "python train.py evaluate": "minutes; test_the_training_commands_run shrinks it",
    "python train.py export": "test_the_training_commands_run",
    "python -m benchmarks.accelerator": "needs a device; test_accelerator.py runs it dry",
    "python -m benchmarks.": "minutes to measure; what it wrote is under benchmarks/results",
    "TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python -m benchmarks.tpu_aot": "test_aot_step.py, with fewer layers",
    "JAX_PLATFORMS=cpu python -m benchmarks.gpu_aot": "test_aot_step.py, with fewer layers",
}


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """The commands of a page, one a line."""
    lines = "\n".join(fenced(text, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in map(str.strip, lines) if line and not line.startswith("#")]


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_command_is_known(page):
    for command in commands(page.read_text()):
        assert any(command.startswith(known) for known in COMMANDS), f"say in COMMANDS who runs: {command}"


class Parsed(Exception):
    """A command line was understood."""


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_flag_exists(page, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser, *arguments):
        parse(parser, *arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    for command in commands(page.read_text()):
        if (program := re.search(r"\bpython (-m [\w.]+|\w+\.py)", command)) is None:
            continue
        arguments = shlex.split(command[program.end() :])
        with pytest.raises(Parsed):
            if program[1].startswith("-m "):
                monkeypatch.setattr(sys, "argv", [program[1], *arguments])
                module = importlib.import_module(program[1][3:])
                if hasattr(module, "__path__"):
                    module = importlib.import_module(f"{module.__name__}.__main__")
                module.main()
            elif program[1] == "docs/figures.py":
                runpy.run_path(str(ROOT / program[1]), run_name="__main__")
            else:
                {"serve.py": serve, "train.py": train}[program[1]].main(arguments)


def test_a_configuration_answers_and_trains_with_one_target():
    """Answers of one target are refused by a head of another, after hours."""
    docstrings = [ast.get_docstring(ast.parse(path.read_text())) for path in (ROOT / "configs").glob("*.py")]
    lines = [line.strip() for text in docstrings for line in text.replace("\\\n", " ").splitlines()]
    lines += [command for page in PAGES for command in commands(page.read_text())]
    targets = {}
    for line in lines:
        if re.match(r"(JAX_PLATFORMS=cpu )?python train\.py (distill|fit)", line):
            arguments = shlex.split(line)
            flags = list(itertools.pairwise(arguments))
            (config,) = [value for flag, value in flags if flag == "--config"]
            settings = [value for flag, value in flags if flag == "--set"]
            targets.setdefault(config, set()).add(load_config(ROOT / config, settings).target)
    assert targets["configs/paper.py"] == {"Qwen/Qwen3-4B"}
    assert all(len(names) == 1 for names in targets.values()), targets


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_the_training_commands_run(tiny_target, tmp_path, monkeypatch):
    """Those of docs/training.md up to the first head, on a tiny target."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for name in ("prompts.jsonl", "benchmarks/prompts.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps({"prompt": f"w{i} w{i + 1}"}) + "\n" for i in range(4, 10)))
    monkeypatch.chdir(tmp_path)
    small = ["anchors=48", "sequence_length=64", "batch_rows=2", "steps=2", "draft.draft_vocab_size=8", "draft.ffn=16"]
    small += ["distill.max_new_tokens=12", "distill.batch_size=4", f"target={tiny_target}"]
    smaller = [argument for setting in small for argument in ("--set", setting)]
    extra = {
        "distill": [*smaller, "--draft", "none"],
        "fit": smaller,
        "export": [],
        "evaluate": ["--target", str(tiny_target), "--max-new-tokens", "8", "--dtype", "float32"],
        "card": [],
    }
    block = fenced((ROOT / "docs" / "training.md").read_text(), "bash")[1]
    for line in block.replace("\\\n", "").splitlines():
        arguments = shlex.split(line)[2:]
        assert train.main([*arguments, *extra.pop(arguments[0])]) == 0
    assert not extra


def anchors(path: Path) -> set[str]:
    """What a link into a Markdown file may name: its headings, and the objects of an API page."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    slugs = {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.lower())) for heading in headings}
    return slugs | set(re.findall(r"^::: (\S+)", text, flags=re.MULTILINE))


@pytest.mark.parametrize("page", LINKING, ids=page_id)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(\s*([^)\s]+)", text):
        if re.match(r"https?://", link):
            continue
        file, _, anchor = link.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), link
        assert found.is_relative_to(ROOT / "docs") or page.parent != ROOT / "docs", f"{link} is not part of the site"
        assert not anchor or anchor in anchors(found), link


# Hops of each walk, at most: two thirds of what they were when everything lay in one folder.
WALKS = {
    "A prompt to a committed token": 30,
    "An HTTP request to a streamed token": 26,
    "A JSONL row to a gradient": 30,
}


def defined(tree: ast.AST, name: str) -> bool:
    """Whether a file defines a function, by its dotted name."""
    for part in name.split("."):
        inside = [node for node in ast.walk(tree) if getattr(node, "name", None) == part and hasattr(node, "body")]
        if not inside:
            return False
        tree = inside[0]
    return isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef)


def test_the_walks_lead_through_code_that_is_there():
    _, *sections = re.split(r"^## ", (ROOT / "docs" / "architecture.md").read_text(), flags=re.MULTILINE)
    walks = {section.splitlines()[0]: section for section in sections}
    assert walks.keys() == WALKS.keys()
    for name, text in walks.items():
        hops = re.findall(r"^(\d+)\. `([\w/]+\.py):([\w.]+)`", text, flags=re.MULTILINE)
        assert [int(number) for number, *_ in hops] == list(range(1, len(hops) + 1)) and len(hops) <= WALKS[name]
        assert f", in {len(hops)} hops." in text, f"{name}: say how many hops there are"
    for file, function in re.findall(r"`([\w/]+\.py):([\w.]+)`", "".join(sections)):
        path = next(path for path in (ROOT / file, ROOT / "specformer_jax" / file) if path.exists())
        assert defined(ast.parse(path.read_text()), function), f"{file} has no {function}"


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_the_map_says_what_the_rooms_say_of_themselves(page):
    rooms = runpy.run_path(str(ROOT / "docs" / "figures.py"))["rooms_data"]()
    rows = [f"| `{name}` | {room['line']} |" for name, room in rooms.items()]
    assert "\n".join(rows) in (ROOT / page).read_text(), "\n".join(rows)


def test_figures_show_todays_data():
    figures = runpy.run_path(str(ROOT / "docs" / "figures.py"))
    for name, (data, _) in figures["FIGURES"].items():
        root = ElementTree.parse(figures["FOLDER"] / f"{name}.svg").getroot()
        drawn = json.loads(root.find(".//{http://purl.org/dc/elements/1.1/}description").text)
        assert drawn == data(), f"run `python docs/figures.py` to draw {name}.svg again"


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/targets.md", "docs/kernels.md"])
def test_the_python_of_a_page_runs(page, builtin_path, capsys):
    blocks = fenced((ROOT / page).read_text(), "python")
    # A client of a running server: tests/server/test_openai_client.py has it talk to one.
    blocks = [block for block in blocks if "from openai import" not in block]
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    if page == "README.md":
        assert "sky" in capsys.readouterr().out
        state = names["state"]
        assert (state.known - state.prompt).min() > 1


def test_ci_finds_the_two_commands():
    """`.ci/run` takes them from here by how the lines begin."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert 'pip install -e ".[test]" && pytest' in lines
    assert any(line.startswith("pip install -e . && python serve.py generate --prompt") for line in lines)
