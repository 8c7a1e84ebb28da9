"""Train a draft head: `train.py distill`, then `fit`, `export` and `evaluate`.

    python train.py distill --config configs/smollm2_135m.py --prompts prompts.jsonl --out answers/
    python train.py fit --config configs/smollm2_135m.py --data answers/ --run runs/a --offline hooks/
    python train.py export --run runs/a --out runs/a/head
    python train.py evaluate --draft runs/a/head --prompts questions.jsonl --record

Launching (mesh is data,fsdp,model; over several hosts it names every device, distill.mesh those of one host):

    one CPU                        JAX_PLATFORMS=cpu python train.py fit ...
    one host with 8 GPUs           python train.py fit ... --set mesh=8,1,1
                                   python train.py distill ... --set distill.mesh=1,1,8
    TPU pod slice, on every host   python train.py fit ... --set mesh=8,4,8 --distributed auto
                                   python train.py distill ... --set distill.mesh=1,1,4 --distributed auto

Elsewhere give each of N processes `--distributed HOST:PORT,N,INDEX`, or that value in SPECFORMER_DISTRIBUTED.
SIGTERM saves a checkpoint and exits with 0; the same command goes on from the newest checkpoint.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from specformer_jax.cli import command_line
from specformer_jax.config import SamplingParams
from specformer_jax.errors import UserError
from specformer_jax.training.config import load_config


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)

    distill = verbs.add_parser("distill", help="let the target answer prompts, to train on")
    _configured(distill)
    distill.add_argument("--prompts", required=True, help="JSONL (prompt, turns or messages), or Hub dataset:split")
    distill.add_argument("--out", required=True, help="directory of the shards; finished ones are not made again")
    distill.add_argument("--draft", default="auto", help="head that speeds the answers up: auto, none or a directory")
    distill.set_defaults(run=_distill, patience=7 * 24 * 3600)  # hosts end when their own shards are done

    fit = verbs.add_parser("fit", help="train a head, or go on training it")
    _configured(fit)
    fit.add_argument("--data", required=True, help="shards of distill, a JSONL of prompt_ids and response_ids, or TFDS")
    fit.add_argument("--drafter", choices=("specformer", "medusa", "eagle"), help="train this one in the config's way")
    fit.add_argument("--run", required=True, dest="folder", help="directory of checkpoints and metrics")
    fit.add_argument("--offline", metavar="DIR", help="store the target's hooks there and train from them")
    fit.add_argument("--stop-at", type=int, metavar="STEP", help="end after this step, with the schedule of all steps")
    fit.add_argument("--tfds", metavar="DIR", help="first write the data there as a TFDS dataset, and read that")
    fit.set_defaults(run=_fit)

    evaluate = verbs.add_parser("evaluate", help="kappa, acceptance by position and tokens by step")
    evaluate.add_argument("--target", default="smollm2-135m")
    evaluate.add_argument("--draft", default="auto", help="auto or a directory of export")
    evaluate.add_argument(
        "--lookup", action="store_true", help="with prompt lookup beside the head, as decoding has it"
    )
    evaluate.add_argument("--prompts", required=True, nargs="+", help="prompt files, JSONL")
    evaluate.add_argument("--draft-length", type=int, nargs="+", help="default: 1 to the head's J")
    evaluate.add_argument("--temperature", type=float, default=0.0)
    evaluate.add_argument("--max-new-tokens", type=int, default=224)
    evaluate.add_argument("--batch-size", type=int, default=8)
    evaluate.add_argument("--dtype", default="bfloat16")
    evaluate.add_argument("--limit", type=int, help="only the first prompts of each file")
    evaluate.add_argument("--decode", action="store_true", help="decode really at every k, instead of once")
    evaluate.add_argument("--json", metavar="FILE", help="also write the report there")
    evaluate.add_argument("--record", action="store_true", help="write how often drafts were right into the head")
    evaluate.set_defaults(run=_evaluate)

    export = verbs.add_parser("export", help="one safetensors file and its config, of a run's checkpoint")
    export.add_argument("--run", required=True, dest="folder")
    export.add_argument("--out", required=True)
    export.add_argument("--step", type=int)
    export.add_argument("--target-name")
    export.set_defaults(run=_export)

    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)

    def command() -> int | None:
        _join(getattr(options, "distributed", None), getattr(options, "patience", 300))
        return options.run(options)

    return command_line.run_command(command)


def _configured(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a file of configs/ with get_config()")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="draft.ffn=768, say")
    parser.add_argument("--distributed", default=os.environ.get("SPECFORMER_DISTRIBUTED"), help="auto or HOST:PORT,N,I")


def _join(where: str | None, patience: int) -> None:
    """Multi-host start-up, before the first use of a device; at the end each waits so many seconds for the others."""
    if not where:
        return
    import jax

    if "cpu" in os.environ.get("JAX_PLATFORMS", ""):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if where == "auto":
        try:
            jax.distributed.initialize(shutdown_timeout_seconds=patience)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"--distributed auto finds no cluster here: give HOST:PORT,PROCESSES,INDEX ({error})"
            ) from error
        return
    try:
        address, count, index = where.rsplit(",", 2)
        jax.distributed.initialize(address, int(count), int(index), shutdown_timeout_seconds=patience)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--distributed {where!r} is not auto or HOST:PORT,PROCESSES,INDEX ({error})") from error


def _distill(options) -> None:
    import jax

    from specformer_jax.loading.language_model import load
    from specformer_jax.nn.mesh import make_mesh
    from specformer_jax.training.distillation import distill

    config = load_config(options.config, options.set)
    prompts = distill.read_prompts(options.prompts)
    mesh = make_mesh(*config.distill.mesh, devices=jax.local_devices())
    lm = load(config.target, draft=options.draft, dtype=config.dtype, mesh=mesh)
    share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    written = distill.distill(lm, prompts, config.distill, options.out, mesh=mesh, **share)
    print(f"wrote {written} answer tokens to {options.out}")


def _fit(options) -> None:
    from specformer_jax.loading import weights
    from specformer_jax.loading.target_config import read_config
    from specformer_jax.loading.tokenizer import load_tokenizer
    from specformer_jax.nn.mesh import make_mesh, param_shardings
    from specformer_jax.training import fit
    from specformer_jax.training.data.documents import check_tokenizer, read_documents

    config = load_config(options.config, options.set, options.drafter)
    fit.check_hosts(config, options.offline)
    path = weights.resolve(config.target)
    target = read_config(path)
    tokenizer = load_tokenizer(path, target)
    config = fit.bind(config, target)
    config.check(target)
    documents = read_documents(options.data, target.vocab_size)
    check_tokenizer(options.data, tokenizer.fingerprint)
    if options.tfds:
        from specformer_jax.training.data import tfds_files

        documents = read_documents(tfds_files.build(documents, options.tfds, tokenizer.fingerprint))
    mesh = make_mesh(*config.mesh)
    places = param_shardings(weights.boxed_params(target), mesh)
    params = weights.load_params(path, target, config.dtype, places)
    inputs = fit.Inputs(target, params, documents, tokenizer.fingerprint)
    fit.fit(config, inputs, options.folder, offline=options.offline, mesh=mesh, stop_at=options.stop_at)


def _evaluate(options) -> None:
    import numpy as np

    from specformer_jax import files
    from specformer_jax.batch import prompt_files
    from specformer_jax.batch.generation import encode_prompt
    from specformer_jax.decoding import pass_counts
    from specformer_jax.loading import head_checkpoint
    from specformer_jax.loading.language_model import load
    from specformer_jax.training import evaluate
    from specformer_jax.training.data.documents import Document

    _check_evaluate(options)
    lm = load(options.target, draft=options.draft, lookup=options.lookup, dtype=options.dtype)
    ks = options.draft_length or list(range(1, lm.model.max_draft_length + 1))
    evaluate.check_draft_lengths(lm, ks)
    longest = max(ks)
    sampling_params = SamplingParams(temperature=options.temperature, max_new_tokens=options.max_new_tokens)
    found: dict[str, dict[str, list[pass_counts.PassCounts]]] = {}
    for file in options.prompts:
        prompts = [encode_prompt(lm, c.turns[:1], False) for c in prompt_files.read_prompts(file)][: options.limit]
        # Real decoding gives the answers; the other draft lengths are then counted along them.
        count, answers = evaluate.decode(lm, prompts, sampling_params, longest, options.batch_size)
        documents = [
            Document(str(i), np.array(prompt + answer, np.int32), len(prompt), options.temperature)
            for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]
        seeds = [sampling_params.seed] * len(documents) if options.temperature else None
        walked = evaluate.offline(lm, documents, ks, seeds)
        decoded = [count]
        if options.decode:
            decoded = [
                evaluate.decode(lm, prompts, sampling_params, k, options.batch_size)[0] for k in ks if k != longest
            ]
            decoded.append(count)
        found[Path(file).name] = {"offline": walked, "decoded": decoded}
        _print_counts(file, found[Path(file).name])
    if len(found) > 1:
        found["all"] = {
            kind: [pass_counts.PassCounts.total(c) for c in zip(*(rows[kind] for rows in found.values()), strict=True)]
            for kind in ("offline", "decoded")
        }
        _print_counts("all files", found["all"])
    if options.json:
        report = {"target": options.target, "draft": options.draft, "temperature": options.temperature}
        report["files"] = {
            name: {kind: [count.report() for count in counts] for kind, counts in kinds.items()}
            for name, kinds in found.items()
        }
        try:
            files.write_whole(options.json, json.dumps(report, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"the report cannot be written to {options.json}: {error}") from error
    if options.record:
        whole = found["all" if len(found) > 1 else Path(options.prompts[0]).name]
        head_checkpoint.record_acceptance(options.draft, whole["offline"][-1].report()["acceptance"])


def _check_evaluate(options) -> None:
    """Refuses before the model is loaded what would fail after it has answered."""
    for flag, value in (("--batch-size", options.batch_size), ("--limit", options.limit)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value} must be at least 1")
    if options.record and options.draft_length:
        raise UserError("--record counts every draft of a head: leave out --draft-length")
    if options.record and (options.draft in ("auto", "ngram") or options.lookup):
        raise UserError("--record writes what a head drafts alone into --draft DIR: name that, and leave out --lookup")
    names = [Path(file).name for file in options.prompts]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two prompt files are called {sorted(twice)[0]}, as the report would call both: rename one")
    if options.json and not Path(options.json).absolute().parent.is_dir():
        raise UserError(f"the report cannot be written to {options.json}: make its folder first")


def _print_counts(name: str, kinds: dict[str, list[Any]]) -> None:
    print(name)
    for kind, counts in kinds.items():
        for count in counts:
            shares = " ".join(f"{x:.3f}" for x in count.acceptance)
            print(
                f"  {kind:8} k={count.draft_length} kappa {count.kappa:.3f}  accepted by position {shares}"
                f"  ({count.answers} answers)"
            )


def _export(options) -> None:
    from specformer_jax.training import fit

    step = fit.export(options.folder, options.out, target_name=options.target_name, step=options.step)
    print(f"wrote the head of step {step} to {options.out}")


if __name__ == "__main__":
    sys.exit(main())
