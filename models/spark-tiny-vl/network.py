"""The network of spark-tiny-vl for training: Qwen3VLMoe on packed sequences, every expert computed for every token.

transformers' own module is the reference (check_network.py compares them); it is also what an export is saved with. It
would train at a tenth of this speed: it loops over experts and images, one small launch after another.
"""
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

HERE = Path(__file__).resolve().parent
CONFIG = json.loads((HERE / "bf16" / "config.json").read_text("utf-8"))
TEXT, VISION = CONFIG["text_config"], CONFIG["vision_config"]


def attention(q, k, v, starts, longest, causal):
    """Attention inside each sequence. q, k, v: [tokens, heads, head_dim]; starts: [sequences + 1] int32."""
    if q.is_cuda:
        half = [x.to(torch.bfloat16) for x in (q, k, v)]
        out = torch.ops.aten._flash_attention_forward(*half, starts, starts, longest, longest, 0.0, causal, False)[0]
        return out.to(q.dtype)
    place = torch.arange(q.shape[0])
    sequence = torch.searchsorted(starts[1:].long().contiguous(), place, right=True)
    mask = sequence[:, None] == sequence[None, :]
    if causal:
        mask &= place[:, None] >= place[None, :]
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)


def rotate(x, cos, sin):
    """x: [tokens, heads, head_dim]; cos, sin: [tokens, head_dim / 2]."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def linear(inputs, outputs, scale=1.0):
    return nn.Parameter(torch.randn(outputs, inputs) * scale * inputs**-0.5)


class Lookup(torch.autograd.Function):
    """Rows of a table. Its gradient is a product with the one-hot matrix: adding rows one by one, most of them to the
    same few, takes longer than all the rest of a step."""

    @staticmethod
    def forward(ctx, table, ids):
        ctx.save_for_backward(ids)
        ctx.rows = table.shape[0]
        return table[ids]

    @staticmethod
    def backward(ctx, gradient):
        (ids,) = ctx.saved_tensors
        chosen = (ids[:, None] == torch.arange(ctx.rows, device=ids.device)).to(torch.bfloat16)
        return (chosen.T @ gradient.to(torch.bfloat16)).to(gradient.dtype), None


class Norm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight, TEXT["rms_norm_eps"])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        hidden, size = TEXT["hidden_size"], TEXT["head_dim"]
        self.heads, self.kv_heads, self.size = TEXT["num_attention_heads"], TEXT["num_key_value_heads"], size
        self.q_proj = linear(hidden, self.heads * size)
        self.k_proj = linear(hidden, self.kv_heads * size)
        self.v_proj = linear(hidden, self.kv_heads * size)
        self.o_proj = linear(self.heads * size, hidden, 0.0)
        self.q_norm, self.k_norm = Norm(size), Norm(size)

    def forward(self, x, cos, sin, starts, longest):
        q = self.q_norm(F.linear(x, self.q_proj).view(-1, self.heads, self.size))
        k = self.k_norm(F.linear(x, self.k_proj).view(-1, self.kv_heads, self.size))
        v = F.linear(x, self.v_proj).view(-1, self.kv_heads, self.size)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (y.repeat_interleave(self.heads // self.kv_heads, dim=1) for y in (k, v))
        y = attention(q, k, v.to(q.dtype), starts, longest, True)
        return F.linear(y.reshape(x.shape[0], -1), self.o_proj)


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        hidden, inner = TEXT["hidden_size"], TEXT["intermediate_size"]
        self.gate_proj, self.up_proj = linear(hidden, inner), linear(hidden, inner)
        self.down_proj = linear(inner, hidden, 0.0)

    def forward(self, x):
        return F.linear(F.silu(F.linear(x, self.gate_proj)) * F.linear(x, self.up_proj), self.down_proj), 0.0


class Experts(nn.Module):
    """All experts as two products; the weight of an expert that a token did not choose is zero."""

    def __init__(self):
        super().__init__()
        hidden, self.inner = TEXT["hidden_size"], TEXT["moe_intermediate_size"]
        self.num, self.top_k = TEXT["num_experts"], TEXT["num_experts_per_tok"]
        self.router = linear(hidden, self.num)
        self.gate = nn.Parameter(torch.randn(self.num, self.inner, hidden) * hidden**-0.5)
        self.up = nn.Parameter(torch.randn(self.num, self.inner, hidden) * hidden**-0.5)
        self.down = nn.Parameter(torch.zeros(self.num, hidden, self.inner))

    def forward(self, x):
        logits = F.linear(x.float(), self.router.float())
        probabilities = logits.softmax(-1)
        top, chosen = probabilities.topk(self.top_k, dim=-1)
        top = top / top.sum(-1, keepdim=True)
        weights = torch.zeros_like(probabilities).scatter(1, chosen, top)
        gate = F.linear(x, self.gate.flatten(0, 1))
        up = F.linear(x, self.up.flatten(0, 1))
        inner = (F.silu(gate) * up).view(-1, self.num, self.inner) * weights[:, :, None].to(gate.dtype)
        out = F.linear(inner.flatten(1), self.down.permute(1, 0, 2).flatten(1))
        # Switch Transformer (arXiv 2101.03961), eq. 4: 1 when the load is even.
        share = (weights > 0).float().mean(0) / self.top_k
        return out, self.num * (share * probabilities.mean(0)).sum()


class Layer(nn.Module):
    def __init__(self, index):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(TEXT["hidden_size"]), Norm(TEXT["hidden_size"])
        self.self_attn = Attention()
        self.mlp = Experts() if (index + 1) % TEXT["decoder_sparse_step"] == 0 else Dense()

    def forward(self, x, cos, sin, starts, longest):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, starts, longest)
        out, balance = self.mlp(self.post_attention_layernorm(x))
        return x + out, balance


class LayerNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x):
        return F.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, 1e-6)


class Linear(nn.Module):
    def __init__(self, inputs, outputs, scale=1.0):
        super().__init__()
        self.weight, self.bias = linear(inputs, outputs, scale), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        hidden = VISION["hidden_size"]
        self.heads = VISION["num_heads"]
        self.norm1, self.norm2 = LayerNorm(hidden), LayerNorm(hidden)
        self.qkv, self.proj = Linear(hidden, 3 * hidden), Linear(hidden, hidden, 0.0)
        self.fc1 = Linear(hidden, VISION["intermediate_size"])
        self.fc2 = Linear(VISION["intermediate_size"], hidden, 0.0)

    def forward(self, x, cos, sin, starts, longest):
        q, k, v = self.qkv(self.norm1(x)).view(x.shape[0], 3, self.heads, -1).unbind(1)
        y = attention(rotate(q, cos, sin), rotate(k, cos, sin), v, starts, longest, False)
        x = x + self.proj(y.reshape(x.shape[0], -1))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class Merger(nn.Module):
    def __init__(self, after_merge):
        super().__init__()
        wide = VISION["hidden_size"] * VISION["spatial_merge_size"] ** 2
        self.wide = wide
        self.norm = LayerNorm(wide if after_merge else VISION["hidden_size"])
        self.fc1, self.fc2 = Linear(wide, wide), Linear(wide, VISION["out_hidden_size"])
        self.after_merge = after_merge

    def forward(self, x):
        x = self.norm(x.view(-1, self.wide)) if self.after_merge else self.norm(x).view(-1, self.wide)
        return self.fc2(F.gelu(self.fc1(x)))


class Vision(nn.Module):
    def __init__(self):
        super().__init__()
        hidden, pixels = VISION["hidden_size"], VISION["in_channels"] * VISION["patch_size"] ** 2
        self.patch_embed = Linear(pixels, hidden)
        self.pos_embed = nn.Parameter(torch.randn(VISION["num_position_embeddings"], hidden) * 0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(VISION["depth"]))
        self.merger = Merger(False)
        self.deepstack = nn.ModuleList(Merger(True) for _ in VISION["deepstack_visual_indexes"])
        size = hidden // VISION["num_heads"] // 2
        self.register_buffer("inv_freq", 10000.0 ** -(torch.arange(0, size, 2) / size), persistent=False)

    def forward(self, patches, places, corners, shares, starts, longest):
        """patches: [n, pixels] u8; places: [n, 2] row and column; corners, shares: [n, 4] of the position table."""
        x = self.patch_embed(patches.float() / 127.5 - 1.0)
        # As a product, for the reason of `Lookup`.
        mix = torch.zeros(x.shape[0], self.pos_embed.shape[0], dtype=shares.dtype, device=x.device)
        x = x + F.linear(mix.scatter_add(1, corners, shares), self.pos_embed.T)
        angles = (places.float()[:, :, None] * self.inv_freq).flatten(1)
        cos, sin = angles.cos(), angles.sin()
        deep = []
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, starts, longest)
            if i in VISION["deepstack_visual_indexes"]:
                deep.append(self.deepstack[len(deep)](x))
        return self.merger(x), deep


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        hidden, size = TEXT["hidden_size"], TEXT["head_dim"]
        self.embed = nn.Parameter(torch.randn(TEXT["vocab_size"], hidden) * hidden**-0.5)
        self.layers = nn.ModuleList(Layer(i) for i in range(TEXT["num_hidden_layers"]))
        self.norm = Norm(hidden)
        self.visual = Vision()
        half = size // 2
        inv_freq = TEXT["rope_theta"] ** -(torch.arange(half) / half)
        self.register_buffer("inv_freq", inv_freq.float(), persistent=False)
        # Interleaved M-RoPE: frequency j turns with time, height, width in turn as far as their sections reach.
        axis = torch.zeros(half, dtype=torch.long)
        for a in (1, 2):
            axis[a : 3 * TEXT["rope_scaling"]["mrope_section"][a] : 3] = a
        self.register_buffer("axis", axis, persistent=False)

    def forward(self, batch, longest_text, longest_image):
        """The hidden states of the tokens in `batch["rows"]`, and the balance of the experts."""
        merged, deep = self.visual(
            batch["patches"], batch["places"], batch["corners"], batch["shares"], batch["image_starts"], longest_image
        )
        # One row more, where the rows of padded patches go.
        x = F.pad(Lookup.apply(self.embed, batch["ids"]), (0, 0, 0, 1))
        seen = batch["picture_rows"]
        x = x.index_copy(0, seen, merged.to(x.dtype))[:-1]
        angles = batch["positions"].float()[self.axis].T * self.inv_freq
        cos, sin = angles.cos(), angles.sin()
        balance = 0.0
        for i, layer in enumerate(self.layers):
            x, lost = layer(x, cos, sin, batch["starts"], longest_text)
            balance = balance + lost
            if i < len(deep):
                x = F.pad(x, (0, 0, 0, 1)).index_add(0, seen, deep[i].to(x.dtype))[:-1]
        return self.norm(x[batch["rows"]]), balance


def to_transformers(state):
    """Parameters under their names in transformers' Qwen3VLMoe (version 5: experts as [outputs, inputs])."""
    out = {"model.language_model.embed_tokens.weight": state["embed"], "model.language_model.norm.weight": state["norm.weight"]}
    for i in range(TEXT["num_hidden_layers"]):
        ours, theirs = f"layers.{i}.", f"model.language_model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
            out[f"{theirs}{name}.weight"] = state[f"{ours}{name}.weight"]
        for name in "qkvo":
            out[f"{theirs}self_attn.{name}_proj.weight"] = state[f"{ours}self_attn.{name}_proj"]
        if f"{ours}mlp.router" in state:
            gate_up = torch.cat((state[f"{ours}mlp.gate"], state[f"{ours}mlp.up"]), dim=1)
            out[f"{theirs}mlp.gate.weight"] = state[f"{ours}mlp.router"]
            out[f"{theirs}mlp.experts.gate_up_proj"] = gate_up
            out[f"{theirs}mlp.experts.down_proj"] = state[f"{ours}mlp.down"]
        else:
            for name in ("gate_proj", "up_proj", "down_proj"):
                out[f"{theirs}mlp.{name}.weight"] = state[f"{ours}mlp.{name}"]
    side = VISION["patch_size"]
    frame = state["visual.patch_embed.weight"].view(-1, VISION["in_channels"], 1, side, side)
    frames = VISION["temporal_patch_size"]
    # An image's frame is repeated, so each frame's weights are a share of what was trained.
    out["model.visual.patch_embed.proj.weight"] = (frame / frames).repeat(1, 1, frames, 1, 1)
    out["model.visual.patch_embed.proj.bias"] = state["visual.patch_embed.bias"]
    out["model.visual.pos_embed.weight"] = state["visual.pos_embed"]
    names = {f"blocks.{i}": f"blocks.{i}" for i in range(VISION["depth"])} | {"merger": "merger"}
    names |= {f"deepstack.{i}": f"deepstack_merger_list.{i}" for i in range(len(VISION["deepstack_visual_indexes"]))}
    block = {"norm1": "norm1", "norm2": "norm2", "qkv": "attn.qkv", "proj": "attn.proj"}
    block |= {"fc1": "mlp.linear_fc1", "fc2": "mlp.linear_fc2"}
    merger = {"norm": "norm", "fc1": "linear_fc1", "fc2": "linear_fc2"}
    for ours, theirs in names.items():
        for a, b in (block if "blocks" in ours else merger).items():
            for kind in ("weight", "bias"):
                out[f"model.visual.{theirs}.{b}.{kind}"] = state[f"visual.{ours}.{a}.{kind}"]
    return out
