"""What a CPU's user could run instead: transformers and llama.cpp beside this project, on the same file, in turns.

    pip install -e ".[peers]" && python -m benchmarks.cpu_peers [--json FILE]

First whole greedy answers, one at a time: this project plainly, at two fixed draft lengths and with `auto`;
transformers in bfloat16; on the Q4_1 file itself llama.cpp, plainly and with its library's prompt lookup, and OpenVINO.
Then requests that come as soon as one ends, 4 and 16 at a time: this project's engine without drafts and with `auto`,
and llama.cpp with as many sequences in each of its passes, as its server has them. Last the memory of each in a process
of its own. (Where llama.cpp takes a virtual machine's AMX for usable it crashes: build it for other sets, with
`CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON"`.)

Compared are the medians of the ratios of what ran side by side. llama.cpp reads 98 MB of weights a token where this
project reads 123 (with AVX512-BF16, where weights stay in four bits; else 270), and its answers are of the quantised
products, so they are not the same tokens; what is counted is tokens a second.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import decode, serving
from benchmarks.cpu_peers import report
from benchmarks.cpu_peers.llama_cpp import LlamaCpp, llama_cpp, llama_cpp_lookup
from benchmarks.cpu_peers.openvino import openvino
from benchmarks.harness import contestants, machine, prompts
from benchmarks.harness.console import add_answer_arguments, numbers, say, show
from benchmarks.harness.contestants import Contestant
from benchmarks.harness.report import paired
from specformer_jax.cli import command_line
from specformer_jax.config import SamplingParams, bucket
from specformer_jax.engine import Engine, EngineConfig
from specformer_jax.engine.request import Request
from specformer_jax.errors import UserError
from specformer_jax.loading import fetch
from specformer_jax.loading.language_model import LanguageModel, load

DRAFT_LENGTHS = (0, 2, 4, None)  # None is auto
LOOKUP_DRAFTS = 2  # what llama-cpp-python's page proposes for a machine without a GPU
PROMPT = "Explain in a few sentences why the sky is blue."
Served = Callable[[Sequence[Sequence[int]], int], tuple[float, list[float]]]  # tokens a second, seconds to first tokens


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", default="builtin", metavar="builtin|FILE.jsonl")
    parser.add_argument("--rounds", type=int, default=16, help="prompts that each answers alone")
    parser.add_argument("--concurrency", default="4,16", metavar="N,N,...")
    parser.add_argument("--requests", type=int, default=48, help="of a round at each concurrency")
    parser.add_argument("--served-rounds", type=int, default=3)
    add_answer_arguments(parser)
    options = parser.parse_args(arguments)
    return command_line.run_command(lambda: print_report(options))


def print_report(options: argparse.Namespace) -> None:
    """Runs the benchmark and shows it."""
    found = run(options)
    show(found, report.markdown(found), options.json)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole benchmark, as `--json` writes it.

    Raises:
      UserError: a peer is not installed, or a prompt file that cannot be read.
    """
    sizes = numbers("--concurrency", options.concurrency, least=1)
    command_line.keep_compiled_programs()
    lm = load(dtype="bfloat16")
    encoded = prompts.encode(lm, options.prompts)
    sampling_params = SamplingParams(max_new_tokens=options.max_new_tokens)
    batches = [[encoded[i % len(encoded)]] for i in range(options.rounds)]
    runs = contestants.interleave(alone(lm, sampling_params, batches), batches, "one at a time")
    rates = {name: [r.tokens / r.seconds for r in found] for name, found in runs.items()}
    one = [
        {
            "contestant": name,
            "tokens_per_second": round(statistics.median(rates[name]), 1),
            "over": {other: round(paired(rates[name], rates[other]), 3) for other in rates if other != name},
            "first_token_ms": round(statistics.median(r.seconds - r.decode_seconds for r in found) * 1e3, 1),
            "kappa": round(sum(r.tokens - 1 for r in found) / sum(max(r.passes, 1) for r in found), 3),
        }
        for name, found in runs.items()
    ]
    served = [e for size in sizes for e in compare(lm, sampling_params, encoded, size, options)]
    return {
        "target": lm.name,
        "max_new_tokens": options.max_new_tokens,
        "rounds": options.rounds,
        "machine": machine.measure("bfloat16"),
        "alone": one,
        "served": served,
        "peak_mb": {name: peak_mb(command) for name, command in answering().items()},
    }


def alone(
    lm: LanguageModel, sampling_params: SamplingParams, batches: Sequence[Sequence[Sequence[int]]]
) -> list[Contestant]:
    """Everyone who answers one prompt at a time.

    Raises:
      UserError: a peer is not installed.
    """
    eos, most = lm.config.eos_ids, sampling_params.max_new_tokens
    context = bucket(max(len(prompt) for batch in batches for prompt in batch) + most)
    mine = [
        c for c in decode.ours(lm, DRAFT_LENGTHS, sampling_params, batches, strict=False) if "head alone" not in c.name
    ]
    try:
        model = contestants.load_transformers(fetch.BUILTIN, "bfloat16")
        return [
            *[c for c in mine if "head alone" not in c.name],
            contestants.transformers(model, "transformers", eos, most, lookup=None),
            llama_cpp(LlamaCpp(fetch.builtin_gguf(), sequences=1, context=context), eos, most),
            llama_cpp_lookup(fetch.builtin_gguf(), context, eos, most, LOOKUP_DRAFTS),
            openvino(fetch.builtin_gguf(), eos, most),
        ]
    except ImportError as error:
        raise UserError(f'{error.name} is not installed: pip install -e ".[peers]"') from error


def compare(
    lm: LanguageModel, sampling_params: SamplingParams, encoded: list[list[int]], size: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Everyone who answers so many requests at a time."""
    context = bucket(max(map(len, encoded)) + sampling_params.max_new_tokens)
    peer = LlamaCpp(fetch.builtin_gguf(), sequences=size, context=context)
    with Engine(lm, EngineConfig(rows=size, max_context=min(context, lm.config.context), max_queue=1024)) as engine:

        def ours(policy) -> Served:
            def answer(asked, concurrency):
                engine.planner = policy
                requests = [Request(tuple(p), sampling_params, streams=False) for p in asked]
                found = serving.answer(engine, requests, concurrency)
                return found.rate, [u.time_to_first_token for u in found.usages]

            return answer

        def theirs(asked, concurrency):
            found = peer.serve(asked, concurrency, lm.config.eos_ids, sampling_params.max_new_tokens)
            return found.rate, found.first_token_seconds

        policies = serving.choose_policies(engine, "")
        taking_part: dict[str, Served] = {name: ours(policy) for name, policy in policies.items()}
        taking_part["llama.cpp"] = theirs
        rates: dict[str, list[float]] = {name: [] for name in taking_part}
        firsts: dict[str, list[float]] = {name: [] for name in taking_part}
        for number in range(options.served_rounds):
            asked = [encoded[(number * options.requests + i) % len(encoded)] for i in range(options.requests)]
            for name, answer in taking_part.items():
                if number == 0:
                    answer(asked[:size], size)  # warms up
                rate, seconds = answer(asked, size)
                rates[name].append(rate)
                firsts[name] += seconds
            say(f"{size} at a time, tokens/s: " + ", ".join(f"{n} {found[-1]:.0f}" for n, found in rates.items()))
    return [
        {
            "concurrency": size,
            "contestant": name,
            "tokens_per_second": round(statistics.median(rates[name]), 1),
            "over_llama_cpp": round(paired(rates[name], rates["llama.cpp"]), 3),
            "first_token_ms": round(statistics.median(firsts[name]) * 1e3, 1),
        }
        for name in taking_part
    ]


def peak_mb(command: Sequence[str]) -> int:
    """The most megabytes that a command held, by Linux's own count of its memory."""
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            # What wait4 tells begins with the memory of whoever started the process.
            if (line := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())) is not None:
                peak = max(peak, int(line[1]))
            time.sleep(0.02)
    if process.returncode:
        raise UserError(f"{' '.join(command)} ended with exit code {process.returncode}")
    return peak // 1024


def answering() -> dict[str, list[str]]:
    """A command for each that loads the model and answers a prompt, as its user would."""
    gguf = fetch.builtin_gguf()
    python = [sys.executable, "-c"]
    return {
        "this project": [sys.executable, "serve.py", "generate", "--max-new-tokens", "64", "--prompt", PROMPT],
        "llama.cpp": [
            *python,
            f"from llama_cpp import Llama\nLlama({str(gguf)!r}, n_ctx=1024, verbose=False)({PROMPT!r}, max_tokens=64)",
        ],
        "transformers": [
            *python,
            "import torch, transformers\n"
            f"where = dict(pretrained_model_name_or_path={str(gguf.parent)!r}, gguf_file={gguf.name!r})\n"
            "words = transformers.AutoTokenizer.from_pretrained(**where)\n"
            "model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)\n"
            f"model.generate(**words({PROMPT!r}, return_tensors='pt'), max_new_tokens=64)",
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
