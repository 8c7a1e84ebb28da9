"""The house stays in order: what importing the package loads, one name a thing, folders one can take in at a glance.

The order of the rooms is a contract of its own: `lint-imports`, in pyproject.toml.
"""

import ast
import collections
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("pallas_kernels", "specformer_jax", "benchmarks")
DATA = {ROOT / "tests" / "golden", ROOT / "benchmarks" / "results", ROOT / "docs" / "figures"}
MOST_FILES = 12

# They have the field's names now: ActiveRequest, PrefixCache, CompiledSteps, DraftLengthPolicy, drafted, measured; and
# `run_file`, which meant three things, is called by what it does.
GONE = {"Answering", "Prefixes", "Programs", "Chooser", "DraftHead", "offered", "happened", "run_file"}
GONE_MODULES = {
    "run_file",
    "engine_file",
    "head_file",
    "gguf_file",
    "engine_config",
    "shards",
    "sharding",
    "jobs",
    "kernels",
}


@functools.cache
def modules() -> list[tuple[Path, ast.Module]]:
    """Every Python file of the packages, parsed."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [(path.relative_to(ROOT), ast.parse(path.read_text())) for path in paths]


@functools.cache
def identifiers() -> dict[str, set[str]]:
    """Name, attribute, argument, keyword, function, class or what an import binds -> the files that have it."""
    found: dict[str, set[str]] = collections.defaultdict(set)
    for path, tree in modules():
        for node in ast.walk(tree):
            for field in ("id", "attr", "arg", "name", "asname"):
                if isinstance(value := getattr(node, field, None), str):
                    found[value].add(str(path))
    return found


def test_importing_the_package_loads_neither_engine_nor_training():
    rooms = [f"specformer_jax.{room}" for room in ("engine", "server", "training", "cli")]
    unwanted = (*rooms, "orbax", "grain", "tensorflow_datasets", "array_record", "fastapi", "uvicorn", "optax")
    program = "import sys, specformer_jax, specformer_jax.decoding.decode; print(*sys.modules, sep='\\n')"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = run.stdout.split()
    assert "specformer_jax.decoding.decode" in loaded
    assert not [name for name in loaded if name.startswith(unwanted)]


def test_a_class_name_means_one_thing():
    where = collections.defaultdict(list)
    for path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                where[node.name].append(f"{path}:{node.lineno}")
    assert where, "no class was found"
    assert not {name: places for name, places in where.items() if len(places) > 1}


def test_a_folder_holds_a_dozen_files_at_most():
    """Counted are the files beside each other, whatever their kind, without what Python or a compiler leaves there."""
    roots = [ROOT / name for name in (*PACKAGES, "tests", "docs", "configs", "notebooks")]
    folders = [folder for root in roots for folder in (root, *root.rglob("*")) if folder.is_dir()]
    sizes = {}
    for folder in folders:
        if folder.name != "__pycache__" and not DATA & {folder, *folder.parents}:
            sizes[folder] = sum(path.is_file() and path.suffix not in (".pyc", ".so") for path in folder.iterdir())
    assert len(sizes) > 20, "the folders were not found"
    assert not {str(folder.relative_to(ROOT)): n for folder, n in sizes.items() if n > MOST_FILES}


@pytest.mark.parametrize("word", sorted(GONE))
def test_a_word_that_went_stays_away(word):
    assert identifiers().get("SamplingParams"), "no identifiers were found"
    assert not identifiers().get(word)


def test_modules_that_went_stay_away():
    names = {path.stem for path, _ in modules()} | {path.parent.name for path, _ in modules()}
    assert "engine" in names and not names & GONE_MODULES


def test_a_name_says_which_parameters_and_which_drafter():
    """`params` is the weights, `sampling_params` how a request is sampled, `drafter` what proposes."""
    wrong = []
    for path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.arg):
                name, annotation = node.arg, node.annotation
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                name, annotation = node.target.id, node.annotation
            else:
                continue
            kind = "" if annotation is None else ast.unparse(annotation).removesuffix(" | None").split(".")[-1]
            wanted = {"SamplingParams": "sampling_params", "Drafter": "drafter"}.get(kind, name)
            if name != wanted or name == "room":
                wrong.append(f"{path}:{node.lineno}: {name}: {kind}")
    assert not wrong


def test_the_cache_has_positions_and_a_slot_is_a_drafts():
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", *(ROOT / "notebooks").glob("*.ipynb")]
    sources = [path for root in PACKAGES for path in (ROOT / root).rglob("*.py")]
    assert not [str(path.relative_to(ROOT)) for path in (*pages, *sources) if "cache slot" in path.read_text()]
