"""EAGLE-3 and DFlash heads in plain torch, read from their files, without caches: the reference of the parity tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.functional import silu

from specformer_jax.nn.cache import page_size


class Head:
    """What both kinds share: weights by their stored names, and a decoder layer's parts."""

    def __init__(self, folder: Path, embedding: torch.Tensor, lm_head: torch.Tensor):
        self.config = json.loads((folder / "config.json").read_text())
        self.layer = self.config.get("transformer_layer_config", self.config)
        self.w = load_file(folder / "model.safetensors")
        self.embedding = embedding
        self.lm_head = self.w.get("lm_head.weight", lm_head)

    def norm(self, x, name):
        mean = x.pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(mean + self.layer["rms_norm_eps"]) * self.w[f"{name}.weight"]

    def ffn(self, x, prefix):
        gate, up, down = (self.w[f"{prefix}mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return (silu(x @ gate.T) * (x @ up.T)) @ down.T

    def heads(self, x, prefix, part, positions):
        """The query, key or value heads [tokens, heads, H] of x, normed where there is a norm, and turned."""
        heads = (x @ self.w[f"{prefix}self_attn.{part}_proj.weight"].T).reshape(len(x), -1, self.layer["head_dim"])
        if part == "v":
            return heads
        if f"{prefix}self_attn.{part}_norm.weight" in self.w:
            heads = self.norm(heads, f"{prefix}self_attn.{part}_norm")
        half = self.layer["head_dim"] // 2
        frequency = self.layer["rope_theta"] ** -(torch.arange(half) / half)
        angles = positions[:, None, None] * frequency
        low, high = heads[..., :half], heads[..., half:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)

    def attend(self, q, k, v, allowed, prefix):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qnh,knh->nqk", q, k) / self.layer["head_dim"] ** 0.5
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        heads = torch.einsum("nqk,knh->qnh", weights, v)
        return heads.reshape(len(q), -1) @ self.w[f"{prefix}self_attn.o_proj.weight"].T

    def token(self, slot):
        column = int((slot @ self.lm_head.T).argmax())
        return column + int(self.w["d2t"][column]) if "d2t" in self.w else column


class Eagle3(Head):
    """The chain of an EAGLE-3 head."""

    def draft(self, hidden, tokens, count):
        """The drafts after `tokens`, of which the target has read all but the last: hidden states HS[i] [read, D]."""
        prefix = "layers.0." if "layers.0.hidden_norm.weight" in self.w else "midlayer."
        layers, read = len(hidden) - 1, len(tokens) - 1
        hooks = self.config.get("eagle_aux_hidden_state_layer_ids")
        if hooks is None and "eagle_config" in self.config:
            hooks = [i + 1 for i in self.config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]]
        hooks = [hidden[i][:read] for i in hooks or (2, layers // 2, layers - 3)]
        if self.config.get("fc_norm"):
            hooks = [self.norm(hook, f"fc_norm.{i}") for i, hook in enumerate(hooks)]
        states = torch.cat(hooks, -1)
        if self.config.get("norm_before_fc"):
            states = self.norm(states, "input_norm")
        states = states @ self.w["fc.weight"].T
        table = self.w["embed_tokens.weight"] if self.config.get("embed_requires_grad") else self.embedding
        tokens, drafts = list(tokens[1:]), []
        for _ in range(count):  # a state for each token; those of drafts are the layer's own output
            out = self.run(table[torch.tensor(tokens)], states, prefix)
            normed = self.norm(out, "norm")
            drafts.append(self.token(normed[-1]))
            fed = normed if self.config.get("norm_output") else out
            states = torch.cat([states, fed[-1:]])
            tokens.append(drafts[-1])
        return drafts

    def run(self, embedded, states, prefix):
        positions = torch.arange(len(states))
        embedded, normed = self.norm(embedded, f"{prefix}input_layernorm"), self.norm(states, f"{prefix}hidden_norm")
        both = torch.cat([embedded, normed], -1)
        q, k, v = (self.heads(both, prefix, part, positions) for part in "qkv")
        causal = positions[:, None] >= positions
        x = normed if self.config.get("norm_before_residual") else states
        x = x + self.attend(q, k, v, causal, prefix)
        return x + self.ffn(self.norm(x, f"{prefix}post_attention_layernorm"), prefix)


class DFlash(Head):
    """The block of a DFlash head."""

    def draft(self, hidden, tokens, count):
        """As `Eagle3.draft`."""
        read, nested = len(tokens) - 1, self.config.get("dflash_config", self.config)
        hooks = self.config.get("aux_hidden_state_layer_ids") or [i + 1 for i in nested["target_layer_ids"]]
        context = torch.cat([hidden[i][:read] for i in hooks], -1) @ self.w["fc.weight"].T
        context = self.norm(context, "hidden_norm")
        block = self.config["block_size"]
        x = self.embedding[torch.tensor([tokens[-1], *[nested["mask_token_id"]] * (block - 1)])]
        positions = torch.arange(read + block)
        everything = torch.ones(block, read + block, dtype=torch.bool)
        begin = (read - self.window()) // page_size() * page_size()  # of the page where the window begins
        behind = positions < begin
        later = positions > positions[read:, None]
        for i, (slides, causal) in enumerate(self.spans()):
            allowed = everything & ~(behind & slides) & ~(later & causal)
            prefix = f"layers.{i}."
            normed = self.norm(x, f"{prefix}input_layernorm")
            q = self.heads(normed, prefix, "q", positions[read:])
            k, v = (self.heads(torch.cat([context, normed]), prefix, part, positions) for part in "kv")
            x = x + self.attend(q, k, v, allowed, prefix)
            x = x + self.ffn(self.norm(x, f"{prefix}post_attention_layernorm"), prefix)
        return [self.token(slot) for slot in self.norm(x, "norm")[1 : 1 + count]]

    def window(self):
        return self.config.get("dflash_config", {}).get("swa_window_size") or self.layer.get("sliding_window") or 0

    def spans(self):
        """Whether each layer has a window, and whether it is causal within the block."""
        nested, count = self.config.get("dflash_config", {}), self.layer["num_hidden_layers"]
        slides = [kind == "sliding_attention" for kind in self.layer.get("layer_types", ["full_attention"] * count)]
        if nested.get("use_swa"):
            return [(True, nested.get("causal", False))] * count
        if (both := self.config.get("is_causal")) is not None:
            return [(slide, both) for slide in slides]
        return [(slide, slide and not self.config.get("sliding_window_non_causal")) for slide in slides]
