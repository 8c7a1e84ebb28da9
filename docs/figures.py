"""Draws the figures of the documentation into docs/figures/ (extra docs).

    python docs/figures.py            draws them all
    python docs/figures.py --record   first decodes the answer of step.svg into benchmarks/results/trace.json

The rooms are drawn from the imports of the code, the mask from the predicate that the kernels call, the decode steps
from a recorded answer, the curves from the evaluation's results. Each SVG carries its data as its description, which
tests/docs/test_docs.py compares.
"""

from __future__ import annotations

import argparse
import ast
import json
import tomllib
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from pallas_kernels import may_attend

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "figures"
RESULTS = ROOT / "benchmarks" / "results"
PROMPT = "Write a Python function that adds two numbers."
DRAFT_LENGTH = 4
PASSES = 8  # of the recorded answer that fit into the picture

INK, GREY, PALE = "#212529", "#868e96", "#e9ecef"
BLUE, GREEN, RED = "#1971c2", "#2f9e44", "#e03131"


def rooms_data() -> dict[str, dict]:
    """room, from the top -> {"line": the first of its docstring, "imports": the rooms whose modules it imports}.

    The order is that of the contract in pyproject.toml.
    """
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [c["layers"] for c in contracts if c.get("containers") == ["specformer_jax"]]
    paths = {name: ROOT / "specformer_jax" / name for layer in layers for name in layer.split(" | ")}
    paths = {"benchmarks": ROOT / "benchmarks", **paths, "pallas_kernels": ROOT / "pallas_kernels"}
    rooms = {}
    for name, path in paths.items():
        files = sorted(path.rglob("*.py")) or [path.with_suffix(".py")]
        imported = {room for file in files for room in _imported_rooms(file)} - {name}
        docstring = ast.get_docstring(ast.parse(files[0].read_text())) or ""
        rooms[name] = {"line": docstring.splitlines()[0], "imports": [room for room in paths if room in imported]}
    return rooms


def _imported_rooms(file: Path) -> set[str]:
    modules = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):  # `from specformer_jax import files` names a module, too
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    return {module.removeprefix("specformer_jax.").split(".")[0] for module in modules}


def head_data() -> list[str]:
    """The parts of the head in the order of the data."""
    return [
        "grouped RMS norm,\n4D → D",
        "context causal\nattention",
        "positional FFN\nD → J·D",
        "draft bidirectional\nattention, SwiGLU",
        "frozen norm,\nLM head",
    ]


def mask_data() -> dict[str, list[list[int]]]:
    """title -> 0 or 1 for each query (row) and key (column), from `may_attend`."""
    segments = jnp.array([1, 1, 1, 1, 2, 2, 2, 0])
    position, anchor, slot = jnp.arange(8), jnp.arange(8) // 4, jnp.arange(8) % 4
    block = {"q_slot": slot[:, None], "k_slot": slot}
    packed = {"q_segment": segments[:, None], "k_segment": segments}
    panels = {
        "three tokens of a row\nover its cache": may_attend(position[4:7, None], position),
        "two documents and padding\nin a packed training row": may_attend(position[:, None], position, **packed),
        "draft blocks of two\nanchors, bidirectional": may_attend(anchor[:, None], anchor, **block),
        "the same, causal\n(the paper's ablation)": may_attend(anchor[:, None], anchor, **block, bidirectional=False),
    }
    return {title: np.asarray(panel).astype(int).tolist() for title, panel in panels.items()}


def step_data() -> list[dict]:
    """The first passes of the recorded answer: {"drafts": [text], "tokens": [text], "accepted": int}."""
    return json.loads((RESULTS / "trace.json").read_text())["passes"][:PASSES]


def kappa_data() -> dict[str, list[list[float]]]:
    """label -> [k, kappa] of the built-in head, from `train.py evaluate`."""
    curves = {}
    for label, file in (("greedy", "kappa.json"), ("temperature 0.8", "kappa_sampled.json")):
        (rows,) = json.loads((RESULTS / file).read_text())["files"].values()
        curves[label] = [[0, 1.0], *([row["draft_length"], row["kappa"]] for row in rows["offline"])]
    return curves


def training_data() -> list[list[float]]:
    """[answer tokens trained on, kappa on its batches] of the shipped head's last runs, from `curve.json`."""
    return [[p["tokens"], p["kappa"]] for p in json.loads((RESULTS / "curve.json").read_text())["points"]]


def draw_rooms(rooms, figure):
    axis = _canvas(figure, (10, 5.2), (-0.2, 20.2), (len(rooms) + 0.2, -3.0))
    left = 20 - len(rooms) * 0.46  # where the columns of the matrix begin
    for row, (name, room) in enumerate(rooms.items()):
        _cell(axis, 0, row + 0.08, 2.6, 0.84, name, BLUE)
        axis.text(2.8, row + 0.5, room["line"].replace("`", ""), va="center", fontsize=6.5, color=INK)
        axis.text(left + 0.46 * row + 0.23, -0.15, name, rotation=90, ha="center", va="bottom", fontsize=7, color=INK)
        axis.plot([left, 20], [row + 0.5] * 2, color=PALE, linewidth=1, zorder=0)
        for column, other in enumerate(rooms):
            x = left + 0.46 * column + 0.23
            if other == name:
                axis.plot(x, row + 0.5, "s", color=GREY, markersize=5)
            elif other in room["imports"]:
                axis.plot(x, row + 0.5, "o", color=GREEN if column > row else RED, markersize=6)
    axis.text(0, -0.5, "rooms, the top one first", fontsize=8, color=GREY)
    axis.text(left - 0.2, -0.5, "imports →", fontsize=8, color=GREY, ha="right")


def draw_head(parts, figure):
    axis = _canvas(figure, (10, 2.6), (0, 20.6), (5.2, 0))
    for i, name in enumerate(("HS[0]", "HS[L/2]", "HS[L-1]", "HS[L]")):
        _cell(axis, 0.1, 0.9 + 0.95 * i, 1.7, 0.75, name, GREY)
        _arrow(axis, (1.85, 1.27 + 0.95 * i), (2.6, 2.7))
    axis.text(0.95, 0.5, "hooks of the\nverifying pass", ha="center", va="center", fontsize=8, color=INK)
    for i, (name, colour) in enumerate(zip(parts, (BLUE, BLUE, GREEN, GREEN, GREY), strict=True)):
        x = 2.7 + 3.4 * i
        _cell(axis, x, 1.9, 2.8, 1.6, name, colour)
        _arrow(axis, (x + 2.85, 2.7), (x + 3.35, 2.7))
    axis.text(20.0, 2.7, "k\ndrafts", ha="center", va="center", fontsize=8, color=INK)
    _arrow(axis, (7.5, 4.5), (7.5, 3.6))
    axis.text(7.5, 4.9, "layer L + 1 of the KV cache", ha="center", fontsize=8, color=INK)
    for x0, x1, label in (
        (2.7, 8.9, "at every token read [T, D], causal"),
        (9.5, 15.7, "at the last accepted position [B, J, D],\nall J slots at once"),
        (16.3, 19.1, "the target's own"),
    ):
        axis.plot([x0, x0, x1, x1], [1.5, 1.3, 1.3, 1.5], color=GREY, linewidth=1)
        axis.text((x0 + x1) / 2, 1.1, label, ha="center", va="bottom", fontsize=8, color=INK)


def draw_mask(panels, figure):
    from matplotlib.colors import ListedColormap

    figure.set_size_inches(10, 3.1)
    axes = figure.subplots(1, len(panels))
    for axis, (title, panel) in zip(axes, panels.items(), strict=True):
        axis.pcolormesh(panel, cmap=ListedColormap([PALE, BLUE]), edgecolors="white", linewidth=2)
        axis.set(xlim=(0, 8), ylim=(8, 0), aspect="equal", xticks=[], yticks=[])
        axis.set_title(title, fontsize=9, color=INK)
        axis.set_xlabel("keys", fontsize=8)
        axis.set_ylabel("queries", fontsize=8)
        axis.spines[:].set_visible(False)
    figure.tight_layout()


def draw_step(passes, figure):
    columns = max(sum(len(p["tokens"]) for p in passes[:i]) + DRAFT_LENGTH for i in range(1, len(passes) + 1))
    axis = _canvas(figure, (10, 5.4), (-2.2, columns), (2.6 * len(passes), -1.2))
    axis.text(0, -0.6, "position in the answer →", fontsize=8, color=GREY)
    at, last = 0, None  # where this pass's first new token stands, and the token before it
    for i, one in enumerate(passes):
        y, accepted = 2.6 * i, one["accepted"]
        axis.text(-2.1, y + 0.5, "prompt" if last is None else f"pass {i}", va="center", fontsize=8, color=INK)
        if last is not None:
            _cell(axis, at - 1, y, 0.92, 0.9, _visible(last), GREY)
        for j, text in enumerate(one["drafts"]):
            _cell(axis, at + j, y, 0.92, 0.9, _visible(text), GREEN if j < accepted else RED)
        for j, text in enumerate(one["tokens"]):
            colour = GREEN if j < accepted else BLUE
            _cell(axis, at + j, y + 1.05, 0.92, 0.9, _visible(text), colour, colour)
        at, last = at + len(one["tokens"]), one["tokens"][-1]
    legend = {"last token": GREY, "accepted draft": GREEN, "rejected draft": RED, "the target's own token": BLUE}
    for i, (label, colour) in enumerate(legend.items()):
        axis.text(columns, 0.3 + 1.1 * i, f"■ {label}", color=colour, fontsize=8, ha="right", va="center")


def draw_kappa(curves, figure):
    figure.set_size_inches(5.5, 3.4)
    axis = figure.subplots()
    for (label, points), colour in zip(curves.items(), (BLUE, GREEN), strict=True):
        k, kappa = zip(*points, strict=True)
        axis.plot(k, kappa, "o-", color=colour, label=label)
    axis.set_xticks(range(max(k) + 1))
    axis.set_xlabel("k, drafts a step")
    axis.set_ylabel("kappa, tokens a target pass")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.tight_layout()


def draw_training(points, figure):
    figure.set_size_inches(5.5, 3.4)
    axis = figure.subplots()
    axis.plot(*zip(*points, strict=True), "o-", color=BLUE)
    axis.set_xlabel("answer tokens trained on")
    axis.set_ylabel("kappa on the training batches")
    axis.grid(alpha=0.3)
    figure.tight_layout()


FIGURES = {
    "rooms": (rooms_data, draw_rooms),
    "head": (head_data, draw_head),
    "mask": (mask_data, draw_mask),
    "step": (step_data, draw_step),
    "kappa": (kappa_data, draw_kappa),
    "training": (training_data, draw_training),
}


def _canvas(figure, size, x, y):
    figure.set_size_inches(*size)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=x, ylim=y)
    axis.axis("off")
    return axis


def _cell(axis, x, y, width, height, text, edge, face="white"):
    from matplotlib.patches import FancyBboxPatch

    style = f"round,pad=0,rounding_size={0.12 * min(width, height)}"
    axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, edgecolor=edge, facecolor=face, linewidth=1.3))
    colour = INK if face == "white" else "white"
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8, color=colour)


def _visible(token: str) -> str:
    return token.replace("\n", "↵").strip() or "␣"


def _arrow(axis, start, end):
    axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": GREY})


def draw(name: str, folder: Path) -> Path:
    """Draws one figure; the same data gives the same file."""
    import matplotlib
    from matplotlib.figure import Figure

    data, picture = FIGURES[name]
    values = data()
    path = folder / f"{name}.svg"
    options = {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}
    with matplotlib.rc_context(options):
        figure = Figure(facecolor="white")
        picture(values, figure)
        figure.savefig(path, metadata={"Date": None, "Description": json.dumps(values)})
    return path


def record() -> None:
    """Decodes `PROMPT` pass by pass with the built-in target and head."""
    import specformer_jax as sf
    from specformer_jax.batch.trace import trace

    lm = sf.load(lookup=False)
    prompt = lm.tokenizer.chat([{"role": "user", "content": PROMPT}])
    text = lambda ids: [lm.tokenizer.token_text(id) for id in ids]
    passes = [
        {"drafts": text(one.drafts), "tokens": text(one.tokens), "accepted": one.accepted}
        for one in trace(lm, prompt, sf.SamplingParams(max_new_tokens=48), draft_length=DRAFT_LENGTH)
    ]
    content = {"prompt": PROMPT, "draft_length": DRAFT_LENGTH, "passes": passes}
    (RESULTS / "trace.json").write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="decode the answer of step.svg anew")
    if parser.parse_args().record:
        record()
    for name in FIGURES:
        print(draw(name, FOLDER))


if __name__ == "__main__":
    main()
