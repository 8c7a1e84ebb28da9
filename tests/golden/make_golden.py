"""Makes the golden files: tiny random models and the logits that transformers computes for them in float32.

    python tests/golden/make_golden.py

needs torch, transformers and the built-in target. Each model is a folder as `save_pretrained` leaves it, weights in
bfloat16, and golden.npz with `tokens` i32[2, 40] and `logits` f32[2, 40, V]. builtin.npz holds every 64th logit of the
built-in target for a few prompts, and each position's argmax. sp/ is not made here: a random Llama with a tokenizer as
Llama 2 has it (words begin with a low line, unknown characters are byte tokens).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import transformers

from specformer_jax.loading import fetch
from specformer_jax.loading.target_config import read_config
from specformer_jax.loading.tokenizer import load_tokenizer

HERE = Path(__file__).parent
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
}
LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,  # so that 40 positions reach all three ranges of wavelengths
}
MODELS = {
    "llama": ("Llama", {"num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama_gqa_tied": ("Llama", {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama_head_size": ("Llama", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}),
    "llama31": (
        "Llama",
        {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "rope_parameters": LLAMA31},
    ),
    "qwen2": ("Qwen2", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "qwen2_tied": ("Qwen2", {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}),
    "qwen3_tied": (
        "Qwen3",
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": True},
    ),
}
TRANSFORMERS_4 = ("llama31", "qwen2")  # config.json rewritten as transformers 4 wrote it
PROMPTS = ("Gravity is", "def fibonacci(n):\n    ", "Nähe: 12 345 €, 日本語 🙂")


def make_model(name: str) -> None:
    family, variant = MODELS[name]
    torch.manual_seed(sorted(MODELS).index(name))
    rope = variant.get("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0})
    config = getattr(transformers, f"{family}Config")(
        **SIZES | variant | {"rope_parameters": rope, "bos_token_id": 1, "eos_token_id": [2, 3]}
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for key, weight in model.named_parameters():
        # Scales and biases away from 1 and 0, products of order 1: a mistake in any of them shows in the logits.
        spread = 0.3 if weight.ndim == 1 else 1.5 * weight.shape[-1] ** -0.5
        centre = 1.0 if key.endswith("norm.weight") else 0.0
        values = centre + spread * torch.randn_like(weight)
        weight.data = values.to(torch.bfloat16).to(torch.float32)
    tokens = torch.randint(0, config.vocab_size, (2, 40))
    with torch.no_grad():
        logits = model(tokens).logits.float()
    folder = HERE / name
    model.to(torch.bfloat16).save_pretrained(folder)
    np.savez(folder / "golden.npz", tokens=tokens.numpy().astype(np.int32), logits=logits.numpy())
    if name in TRANSFORMERS_4:
        rewrite_config(folder / "config.json")


def rewrite_config(file: Path) -> None:
    """`rope_parameters` -> `rope_theta` and `rope_scaling`."""
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    file.write_text(json.dumps(config, indent=2) + "\n")


def make_builtin() -> None:
    path = fetch.builtin_gguf()
    tokenizer = load_tokenizer(path, read_config(path))
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    arrays = {}
    for i, prompt in enumerate(PROMPTS):
        ids = tokenizer.chat([{"role": "user", "content": prompt}]) if i == 0 else tokenizer.encode(prompt)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].float().numpy()
        arrays |= {f"tokens_{i}": np.array(ids, np.int32), f"logits_{i}": logits[:, ::64]}
        arrays[f"argmax_{i}"] = logits.argmax(-1).astype(np.int32)
    np.savez(HERE / "builtin.npz", **arrays)


if __name__ == "__main__":
    for name in MODELS:
        make_model(name)
    make_builtin()
