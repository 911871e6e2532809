"""Chapter 3 · The model: a GPT with attention by hand, able to open GPT-2, Llama and Qwen3 weights.

Tokens go in; out comes, at every position, a number (logit) for each token that could be next. In
between stand blocks of one shape: attention lets a position gather what it needs from those before,
and the MLP, two or three matrices, works on it. Both only add to a running sum, the residual stream
x: so a block need only mend what is there, and gradients reach the first blocks, too.

    ids (B, T) -> embed -> x (B, T, C) ->+-----------------------+->+-----------------+-> ...
                                         |                       ^  |                 ^
                                         +-> norm -> attention --+  +-> norm -> MLP --+
                       ... -> norm -> lm_head -> logits (B, T, V)

    GPT-2 (2019)  LayerNorm  learned positions  GELU    biases
    today         RMSNorm    RoPE               SwiGLU  no biases, QK-norm; often grouped heads

Run:    python 03_model.py                  the parts, their cost, causality; draws out/rope.png
        python 03_model.py --preset gpt2    of another shape; every setting is a flag, see --help
Source: Vaswani 2017 (attention), Radford 2019 (GPT-2), Su 2021 (RoPE), Zhang 2019 (RMSNorm),
        Shazeer 2020 (SwiGLU), Ainslie 2023 (grouped heads), Henry 2020 (QK-norm)
"""
import json
import math
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

chapter1 = import_module("01_tokenizer")
CourseError = chapter1.CourseError

# Legend
#   B  sequences in a batch     T  positions read now     S  those and, in chapter 5, earlier
#   H  heads     K  heads of keys and values, each for H / K of queries     D  numbers of one head
#   L  blocks     C  width of the residual stream     M  hidden width of the MLP     V  vocabulary
# Tools, at the file's end: kinds of attention, presets, `model.save` and `GPT.load`.


# ---- Attention, by its definition ----------------------------------------------------------------
# Each position asks a question (its query), bears a label (its key) and has something to give (its
# value): three lists of numbers that the model learns to make. The better a label fits a question,
# the larger their dot product (the sum of the products of their numbers), and the more of that
# value is taken. "sat" asks who does it, say:
#     query of "sat" (0, 2); keys: "the" (2, 0), "cat" (0, 2), "sat" (1, 1); dot products: 0, 4, 2
#     over sqrt(D), D = 2: 0, 2.8, 1.4; softmax, each e^x over the sum of all e^x: .05, .77, .19
# So "sat" takes .77 of the value of "cat". Heads do so side by side, each with queries of its own:
# one may look for who does it, another for where.
# Why sqrt(D)? A sum of D random products grows like sqrt(D). With large scores, softmax gives all
# weight to one winner; then small changes change nothing, there is no gradient, nothing is learnt.
def attention_formula(q, k, v, visible=None):
    """Average the values by how well queries fit keys. q (B, H, T, D), k and v (B, H, S, D)."""
    q = q / math.sqrt(q.shape[-1])               # q, not the scores: those are more
    scores = q @ k.transpose(-2, -1)             # (B, H, T, D) @ (B, H, D, S) -> (B, H, T, S)
    if visible is not None:                      # (T, S) or (B, 1, T, S): True where one may look
        scores = scores.masked_fill(~visible, float("-inf"))       # exp(-inf) is 0: no weight there
    weights = scores.softmax(dim=-1)             # each query's weights sum to 1
    return weights @ v                           # (B, H, T, S) @ (B, H, S, D) -> (B, H, T, D)


def who_sees(T, S, documents=None, device=None):
    """Return the causal mask (T, S), True where one may look: each position sees itself and those
    before it, as it is to guess the next token, not to copy it. The T that ask are the last of S:
    all of them, until chapter 5. With `documents` (B, S), a number per text (chapter 6), a position
    sees its own text only.

    >>> who_sees(3, 3).tolist()
    [[True, False, False], [True, True, False], [True, True, True]]
    """
    positions = torch.arange(S, device=device)
    visible = positions <= positions[S - T:, None]             # (S) <= (T, 1) -> (T, S)
    if documents is not None:
        same = documents[:, S - T:, None] == documents[:, None, :]             # (B, T, S)
        visible = visible & same[:, None]        # (B, 1, T, S): alike for all heads
    return visible


# ---- Attention, for real -------------------------------------------------------------------------
def attention(q, k, v, visible=None, kind="formula"):
    """Attention of queries (B, H, T, D) over keys and values (B, K, S, D) -> (B, H, T, D): by the
    formula or, for longer texts, "fused": torch's kernel, which never holds all scores at once."""
    kind = choose_attention(kind, k.shape[2])
    # Why grouped heads? Sampling (chapter 5) keeps keys and values of all positions, and reads them
    # again for each token: fewer heads, so less memory.
    sharers = q.shape[1] // k.shape[1]           # so many share each head of keys and values
    if sharers > 1:
        k = k.repeat_interleave(sharers, dim=1)  # (B, K, S, D) -> (B, H, S, D)
        v = v.repeat_interleave(sharers, dim=1)
    if kind == "fused":                          # no mask, T = S: it hides later ones itself
        causal = visible is None and q.shape[2] == k.shape[2]
        return F.scaled_dot_product_attention(q, k, v, visible, is_causal=causal)
    if kind == "blocks" and visible is not None:
        return attention_in_blocks(q, k, v, visible)
    return attention_formula(q, k, v, visible)


# ---- Where a token stands: RoPE ------------------------------------------------------------------
# But for its mask, attention sees no order. RoPE turns each pair (a, b), numbers i and i + D/2 of a
# query or key, by an angle that grows with the position: at position m by m times w,
#     (a cos(m w) - b sin(m w),  a sin(m w) + b cos(m w))
# The dot product of two such pairs is their lengths times the cosine of the angle between them. To
# turn a query at m and a key at n adds (m - n) w to it. So only the distance counts: with w = 0.1,
# it grows by 0.2 for positions 7 and 5, as for 102 and 100. Each pair has its own speed w: fast
# ones tell neighbours apart, but repeat after a full circle; slow ones tell near from far.
def rope_angles(config, positions):
    """Return cos and sin, (T, D) each, of the angles at positions (T), for `rotate`."""
    exponents = torch.arange(0, config.head_width, 2, device=positions.device) / config.head_width
    speeds = config.rope_theta ** -exponents                   # (D/2), from 1 to about 1 / theta
    angles = positions[:, None] * speeds                           # (T, 1) * (D/2) -> (T, D/2)
    angles = torch.cat((angles, angles), dim=-1)                   # (T, D): a and b of a pair alike
    return angles.cos(), angles.sin()


def rotate(heads, cos, sin):
    """Turn all pairs of queries or keys (B, H, T, D) at once: (a, b) cos + (-b, a) sin."""
    a, b = heads.chunk(2, dim=-1)                                  # (B, H, T, D/2) each
    turned = heads * cos + torch.cat((-b, a), dim=-1) * sin        # (B, H, T, D), float32
    return turned.type_as(heads)


# ---- The parts to choose from, and the shape of a model ------------------------------------------
# New to torch? module(x) calls its `forward`; super().__init__() lets torch find the weights in it.
class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) times learned weights. x (..., width) grows from block to block;
    divided so, it has one size at any depth."""

    def forward(self, x):
        # torch has the formula; nn.RMSNorm's own forward warns at 16 bits (chapter 4).
        return F.rms_norm(x, self.weight.shape, eps=self.eps) * self.weight


NORMS = {"rmsnorm": RMSNorm, "layernorm": nn.LayerNorm}
MLPS = {  # name: (activation function, which bends numbers; whether there is a gate matrix)
    "swiglu": (F.silu, True),                    # x / (1 + e^-x): x far above 0, 0 far below
    "gelu": (nn.GELU("tanh"), False),            # much the same curve
}
KINDS = {"norm": NORMS, "positions": ["rope", "learned"], "mlp": MLPS,
         "attention": ["auto", "formula", "blocks", "fused"]}


@dataclass
class GPTConfig:
    """The shape of a model. Deeper or wider? Usual are a width of 20 to 130 times the layers, and
    heads of 64 or 128 numbers. Raises CourseError for values that cannot work together."""
    vocab_size: int = 4096  # V, the ids that it knows
    context: int = 256  # the most tokens it can look at; more costs memory and time
    layers: int = 4  # L, blocks on top of each other: more steps of thought
    heads: int = 4  # H, questions that a position asks at once
    kv_heads: int = 0  # K, heads with keys and values of their own, shared by H / K queries (0: H)
    width: int = 256  # C, numbers that describe a token: the width of the residual stream
    head_width: int = 0  # D, numbers in one query (0: C / H)
    hidden: int = 0  # M, hidden width of the MLP (0: 4 C, or 8/3 C if it has a gate)
    norm: str = "rmsnorm"  # rmsnorm, or layernorm, which also takes the mean out
    positions: str = "rope"  # rope, or learned: a learned vector for each position
    mlp: str = "swiglu"  # swiglu, or gelu, which bends each number by itself, without a gate
    bias: bool = False  # add a learned constant in linear layers (LayerNorm has one anyway)
    qk_norm: bool = True  # normalise queries and keys, so that no score grows too large
    tied: bool = True  # use the embedding matrix as lm_head as well
    dropout: float = 0.0  # share of numbers set to zero in training: less is learnt by heart
    rope_theta: float = 10000.0  # about 1 / speed of RoPE's slowest pair; more for longer contexts
    norm_eps: float = 1e-6  # keeps the norms from dividing by zero
    attention: str = "auto"  # how to compute it: formula, blocks, fused, or auto: by the length

    def __post_init__(self):
        for name, kinds in KINDS.items():
            if getattr(self, name) not in kinds:
                raise CourseError(f"--{name} {getattr(self, name)}: choose one of {[*kinds]}")
        self.kv_heads = self.kv_heads or self.heads
        for name in ("vocab_size", "context", "layers", "width", "heads"):
            if getattr(self, name) < 1:
                raise CourseError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.width % self.heads or self.heads % self.kv_heads:
            raise CourseError(f"--width {self.width} must be a multiple of --heads {self.heads}, "
                              f"and that one of --kv-heads {self.kv_heads}")
        self.head_width = self.head_width or self.width // self.heads
        if self.head_width % 2:
            raise CourseError(f"--head-width {self.head_width} must be even: RoPE turns pairs")
        if not self.hidden:
            _, has_gate = MLPS[self.mlp]
            # A gate is a third matrix: three of 8/3 C (in steps of 64) are as large as two of 4 C.
            self.hidden = math.ceil(8 * self.width / 3 / 64) * 64 if has_gate else 4 * self.width


# ---- The model -----------------------------------------------------------------------------------
class Attention(nn.Module):
    """Project x to queries, keys and values, let the heads attend, project back."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        C, H, K, D = config.width, config.heads, config.kv_heads, config.head_width
        self.q_proj = nn.Linear(C, H * D, config.bias)
        self.k_proj = nn.Linear(C, K * D, config.bias)
        self.v_proj = nn.Linear(C, K * D, config.bias)
        self.o_proj = nn.Linear(H * D, C, config.bias)
        norm = RMSNorm if config.qk_norm else nn.Identity          # which gives back what it gets
        self.q_norm = norm(D, config.norm_eps)
        self.k_norm = norm(D, config.norm_eps)

    def project(self, x, angles):
        """Return queries (B, H, T, D), keys and values (B, K, T, D) of x (B, T, C)."""
        split = (-1, self.config.head_width)                       # -1: as many as there are
        # Cut into heads, (B, T, H*D) -> (B, T, H, D); transpose swaps two axes: -> (B, H, T, D)
        q = self.q_proj(x).unflatten(-1, split).transpose(1, 2)
        k = self.k_proj(x).unflatten(-1, split).transpose(1, 2)    # (B, K, T, D)
        v = self.v_proj(x).unflatten(-1, split).transpose(1, 2)    # (B, K, T, D)
        q = self.q_norm(q)
        k = self.k_norm(k)
        if self.config.positions == "rope":                        # not v: it tells what, not where
            q = rotate(q, *angles)
            k = rotate(k, *angles)
        return q, k, v

    def forward(self, x, angles, visible, cache):
        q, k, v = self.project(x, angles)
        if cache is not None:                                      # see chapter 5: all k, v so far
            k, v = cache.append(self, k, v)                        # (B, K, T, D) -> (B, K, S, D)
        y = attention(q, k, v, visible, self.config.attention)     # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).flatten(2))           # -> (B, T, H*D) -> (B, T, C)


class MLP(nn.Module):
    """Widen x, bend each number (else both matrices were as good as one), and narrow it again. With
    a gate, down(bend(gate x) * up x), a third matrix lets numbers pass or not. In large models it
    pays; why is not known."""

    def __init__(self, config):
        super().__init__()
        self.bend, self.has_gate = MLPS[config.mlp]
        self.up_proj = nn.Linear(config.width, config.hidden, config.bias)
        self.down_proj = nn.Linear(config.hidden, config.width, config.bias)
        if self.has_gate:
            self.gate_proj = nn.Linear(config.width, config.hidden, config.bias)

    def forward(self, x):
        up = self.up_proj(x)                                       # (B, T, C) -> (B, T, M)
        if self.has_gate:
            hidden = self.bend(self.gate_proj(x)) * up
        else:
            hidden = self.bend(up)
        return self.down_proj(hidden)                              # (B, T, M) -> (B, T, C)


class Block(nn.Module):
    """Gather, then think: both add to x. (Names of Llama: `post_attention...` is for the MLP.)"""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = NORMS[config.norm](config.width, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = NORMS[config.norm](config.width, config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, angles, visible, cache):
        y = self.self_attn(self.input_layernorm(x), angles, visible, cache)
        x = x + self.dropout(y)
        y = self.mlp(self.post_attention_layernorm(x))
        return x + self.dropout(y)


class GPT(nn.Module):
    """The whole model: model(ids) gives logits (B, T, V)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        learned = config.positions == "learned"
        self.embed_positions = nn.Embedding(config.context, config.width) if learned else None
        self.layers = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.norm = NORMS[config.norm](config.width, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        # Why may the embedding be lm_head? Both hold C numbers for each token: what it means when
        # it is read, and what x must look like for it to come next. It saves V x C weights.
        self.lm_head = None if config.tied else nn.Linear(config.width, config.vocab_size, False)
        # Random, as equal ones would stay equal; small, so that the first loss is that of a guess.
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                std = 0.02
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= math.sqrt(2 * config.layers)            # 2 L of them add up in x
                nn.init.normal_(weight, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, ids, documents=None, cache=None, last_only=False):
        """Return logits (B, T, V) for ids (B, T). For later chapters: the next T after those in a
        cache; with last_only, of the last position alone, (B, 1, V); documents, see who_sees."""
        past = 0 if cache is None else cache.length                # 0 until chapter 5: S is T
        T = ids.shape[1]
        S = past + T
        if S > self.config.context:
            raise CourseError(f"{S} tokens do not fit the context of {self.config.context}")
        positions = torch.arange(past, S, device=ids.device)       # (T)
        angles = rope_angles(self.config, positions)               # (T, D) each, for RoPE
        visible = choose_mask(self.config.attention, T, S, documents, ids.device)  # mask or None
        x = self.embed_tokens(ids)                                 # (B, T) -> (B, T, C)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions)                # (B, T, C) + (T, C)
        x = self.dropout(x)
        for block in self.layers:
            x = block(x, angles, visible, cache)                   # (B, T, C) -> (B, T, C)
        if cache is not None:
            cache.length = S                                       # once, after all layers
        if last_only:
            x = x[:, -1:]                                          # (B, T, C) -> (B, 1, C)
        table = (self.lm_head or self.embed_tokens).weight         # (V, C)
        return F.linear(self.norm(x), table)                       # x @ table.T: -> (B, T, V)


# ---- Looking at it -------------------------------------------------------------------------------
def show_parts(config):
    """Print the parameters of a model, of its blocks the first only, and what they cost.

    To train on a token takes about 6 operations a weight (FLOP): each is multiplied and added on
    the way forward (2), twice so on the way back, for the gradients of weights and of inputs (4).
    In attention, a token meets T / 2 keys and as many values: like H D T weights more a block."""
    with torch.device("meta"):                                     # shapes without numbers
        model = GPT(config)
    total = 0
    for name, part in model.named_parameters():
        total += part.numel()
        if "layers." not in name or ".0." in name:
            print(f"{part.numel():12,}  {name}", list(part.shape))
    attention_work = config.layers * config.heads * config.head_width * config.context
    print(f"{total:,} parameters with all {config.layers} layers, "
          f"{6 * (total + attention_work) / 1e6:,.1f} MFLOP to train on a token")


def show_causality(config):
    """Print how much other tokens in the second half change the logits there, and before: by 0."""
    model = GPT(replace(config, layers=2)).eval()                  # eval: without dropout
    half = min(64, config.context // 2) or 1
    ids = torch.randint(config.vocab_size, (1, 2 * half))          # (B, T)
    logits = model(ids)                                            # (B, T, V)
    ids[:, half:] = 0                                              # another second half
    before, after = (model(ids) - logits).abs().split(half, dim=1)             # (1, half, V) each
    print(f"another second half changes its logits by {after.max():.0e}, "
          f"those before by {before.max():.0e}")


def draw_rope(config, path):
    """Draw how alike RoPE leaves two positions at a distance: some pairs, and the mean of all."""
    cosines, _ = rope_angles(config, torch.arange(config.context))             # (T, D)
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axis = figure.add_subplot(xlabel="distance in tokens", ylabel="cosine of the angle",
                              title="RoPE: every fourth pair of numbers; black: the mean of all")
    axis.plot(cosines[:, :config.head_width // 2:4], linewidth=1)
    axis.plot(cosines.mean(dim=1), "k")
    chapter1.save_figure(figure, path)
    print(f"drew {path}")


# ---- The script ----------------------------------------------------------------------------------
@dataclass
class Config(GPTConfig):
    preset: str = "small"  # a set of values for the other flags, see below
    out: str = "out"  # folder below which everything is written


def defaults_for(given):
    """Return the shape that --preset stands for; flags that were given change it."""
    return shape_of(find_preset(given.get("preset", "small")))


def main(config):
    """Show parts and cost, and that the model sees no later token; draw RoPE."""
    print(config)
    show_parts(config)
    show_causality(config)
    if config.positions == "rope":
        draw_rope(config, f"{config.out}/rope.png")
    print(f"next: {chapter1.command('04_train.py', config)}")


# ---- Tools (no lesson): kinds of attention, presets ----------------------------------------------
def choose_attention(kind, S):
    """Return what "auto" stands for: the formula is fast up to 256 keys, as by default; for more,
    torch's kernel, which never holds all scores: its parts fit the processor's fastest memory."""
    if kind == "auto":
        return "formula" if S <= 256 else "fused"
    return kind


def choose_mask(kind, T, S, documents, device):
    """Return who_sees, or None where no mask is needed: a lone query sees all, and "fused" hides
    later positions by itself, which is faster, but not other documents."""
    kind = choose_attention(kind, S)
    if documents is None and (T == 1 or (kind == "fused" and T == S)):
        return None
    return who_sees(T, S, documents, device)


def attention_in_blocks(q, k, v, visible, size=128):
    """Return what attention_formula does, `size` queries at a time, with the keys up to the last
    of them: half of all scores are of later keys."""
    parts = []
    end = k.shape[2] - q.shape[2]                # keys read before the first query
    for queries, mask in zip(q.split(size, dim=2), visible.split(size, dim=-2)):
        end += queries.shape[2]                                    # no key from here on is visible
        parts.append(attention_formula(queries, k[:, :, :end], v[:, :, :end], mask[..., :end]))
    return torch.cat(parts, dim=2)                                 # (B, H, T, D)


GPT2 = dict(norm="layernorm", positions="learned", mlp="gelu", bias=True, qk_norm=False,
            norm_eps=1e-5, vocab_size=50257, context=1024)
LARGE = dict(steps=5000, batch_tokens=524288, micro_batch=32, lr=3e-3, matrix_lr=4e-3)
PRESETS = {  # name: a shape, where it is not the default, and how chapter 4 trains it
    "small": {},                                 # the defaults: 4 million weights, for a CPU
    "gpu": dict(layers=6, heads=6, width=384, dropout=0.2, steps=640, batch_tokens=32768,
                micro_batch=128, lr=3e-3, matrix_lr=6e-3, eval_every=80),      # 12 million
    "modern-124m": dict(LARGE, vocab_size=50304, context=1024, layers=12, heads=12, width=768),
    "gpt2": dict(LARGE, **GPT2, layers=12, heads=12, width=768)}
PRESET_HELP = "\npresets (in training, vocab_size is the tokenizer's):" + "".join(
    f"\n  {name}: {values}" for name, values in PRESETS.items())
SHAPE = [*vars(GPTConfig())]  # the names of its settings


def find_preset(name):
    """Return the values of a preset. Raises CourseError if there is none of that name."""
    if name not in PRESETS:
        raise CourseError(f"--preset {name}: choose one of {[*PRESETS]}")
    return PRESETS[name]


def shape_of(values):
    """Return those of a preset's or a run's values that GPTConfig has."""
    return {name: value for name, value in values.items() if name in SHAPE}


# ---- Tools: folders for transformers -------------------------------------------------------------
GPT2_SETTINGS = dict(  # ours=theirs, in config.json
    vocab_size="vocab_size", context="n_positions", layers="n_layer", heads="n_head",
    width="n_embd", hidden="n_inner", norm_eps="layer_norm_epsilon", tied="tie_word_embeddings",
    dropout="resid_pdrop")
LLAMA_SETTINGS = dict(
    vocab_size="vocab_size", context="max_position_embeddings", layers="num_hidden_layers",
    heads="num_attention_heads", kv_heads="num_key_value_heads", head_width="head_dim",
    width="hidden_size", hidden="intermediate_size", norm_eps="rms_norm_eps",
    tied="tie_word_embeddings", dropout="resid_pdrop", rope_theta="rope_theta")
FAMILIES = {  # model_type: (its class in transformers, its settings, what else its models have)
    "gpt2": ("GPT2LMHeadModel", GPT2_SETTINGS, GPT2),
    "llama": ("LlamaForCausalLM", LLAMA_SETTINGS, {"qk_norm": False, "tied": False}),
    "qwen3": ("Qwen3ForCausalLM", LLAMA_SETTINGS, {"tied": False}),
    "course": ("", dict(zip(SHAPE, SHAPE)), {})}               # any mix, unknown to transformers
EXPECTED = dict(  # other settings: the only value that we can honour; biases show as odd tensors
    activation_function="gelu_new", hidden_act="silu", rope_type="default", rope_scaling=None,
    use_sliding_window=False, scale_attn_by_inverse_layer_idx=False, quantization_config=None)
GPT2_NAMES = dict(  # ours=theirs, in model.safetensors; Llama's are ours
    embed_tokens="wte", embed_positions="wpe", norm="ln_f", layers="h", self_attn="attn",
    input_layernorm="ln_1", post_attention_layernorm="ln_2", q_proj="c_attn", k_proj="c_attn",
    v_proj="c_attn", o_proj="c_proj", up_proj="c_fc", down_proj="c_proj")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_config(data):
    """Return the GPTConfig of a parsed config.json. Raises CourseError for what we do not know."""
    family = data["model_type"]
    if family not in FAMILIES:
        raise CourseError(f"a model of type {family} is not supported")
    _, settings, parts = FAMILIES[family]
    data = {**data, **(data.get("rope_parameters") or {})}
    for name, value in EXPECTED.items():
        if data.get(name, value) != value:
            raise CourseError(f"a model with {name} {data[name]} is not supported")
    found = {ours: data[theirs] for ours, theirs in settings.items() if theirs in data}
    return GPTConfig(**{"heads": 0, **parts, **found})         # heads must be told: 0 fails


def write_config(config):
    """Return what config.json holds, of the first family that loses no setting: "course" has all,
    a new one of yours included."""
    config = replace(config, attention="auto")   # how to compute it is no part of a model
    for family, (architecture, settings, _) in FAMILIES.items():
        data = {"model_type": family, "architectures": [architecture],
                "bos_token_id": None, "eos_token_id": None}
        for ours, theirs in settings.items():
            data[theirs] = getattr(config, ours)
        with suppress(CourseError):              # a shape that the family cannot have
            if vars(read_config(data)) == shape_of(vars(config)):  # a script's Config has more
                return data


def family_tensors(model, family):
    """Return {name in a family's file, less its prefix: [our parameters, side by side in it]}."""
    tensors = {}
    for name, view in model.state_dict().items():
        if family == "gpt2":
            name = ".".join([GPT2_NAMES.get(part, part) for part in name.split(".")])
            if name.startswith("h.") and view.ndim == 2:
                view = view.T                    # and its matrices are (in, out)
        tensors.setdefault(name, []).append(view)                  # GPT-2's q, k, v are joined
    return tensors


# A safetensors file: 8 bytes N, N bytes of JSON {name: {dtype, shape, data_offsets}}, the numbers.
def save_model(model, folder):
    """Write config.json and model.safetensors (float32)."""
    data = write_config(model.config)
    family = data["model_type"]
    prefix = "transformer." if family == "gpt2" else "model."
    header = {"__metadata__": {"format": "pt"}}
    arrays = []
    end = 0
    for name, views in family_tensors(model, family).items():
        array = torch.cat(views, dim=-1).float().cpu().numpy()
        arrays.append(array)
        if name != "lm_head.weight":
            name = prefix + name
        header[name] = {"dtype": "F32", "shape": array.shape,
                        "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)              # the numbers start at a multiple of 8
    with chapter1.replacing(Path(folder) / "model.safetensors") as path, open(path, "wb") as file:
        file.writelines([len(text).to_bytes(8, "little"), text, *arrays])
    chapter1.write_json(Path(folder) / "config.json", data)


def read_safetensors(path):
    """Return {name, less the prefix of its family, which some files lack: tensor}."""
    data = np.memmap(path, mode="c")             # its bytes: mapped, not read; files stay as is
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:start].tobytes()).items():
        if name.endswith(("__metadata__", ".attn.bias", ".attn.masked_bias")):
            continue                             # no weights: the last two are masks, in GPT-2's
        begin, end = entry["data_offsets"]
        numbers = torch.from_numpy(data[start:][begin:end]).view(DTYPES[entry["dtype"]])
        name = name.removeprefix("transformer.").removeprefix("model.")
        tensors[name] = numbers.reshape(entry["shape"])
    return tensors


def load_model(folder, context=0):
    """Open a folder of ours, or of the GPT-2, Llama or Qwen3 family. Raises CourseError."""
    data = chapter1.read_json(Path(folder) / "config.json", "a typo? 04_train.py or 06_finetune.py")
    found = {}
    try:
        config = read_config(data)
        if context > config.context:
            raise CourseError(f"--context {context}: the model knows {config.context} positions")
        config.context = context or config.context                 # the full one needs memory
        with torch.device("meta"):                                 # shapes without numbers
            model = GPT(config).to_empty(device="cpu")
        for path in Path(folder).glob("model*.safetensors"):       # a large model comes in several
            found.update(read_safetensors(path))
        expected = family_tensors(model, data["model_type"])
        if config.tied:
            found.pop("lm_head.weight", None)                      # it is the embedding
        odd = sorted(expected.keys() ^ found.keys())
        if odd:
            raise CourseError(f"tensors missing, or not expected: {odd[:9]}")
        for name, views in expected.items():
            for view, part in zip(views, found[name].chunk(len(views), dim=-1)):
                if name in ("wpe.weight", "embed_positions.weight"):
                    part = part[:config.context]
                if view.shape != part.shape:
                    raise CourseError(f"{name} is {part.shape}, not {view.shape}")
                view.copy_(part)                                   # float32 now, whatever it was
    except Exception as error:                                     # whatever damage leads to
        raise CourseError(f"{folder}: {error}".splitlines()[0])
    return model


GPT.save, GPT.load = save_model, load_model      # model.save(folder), GPT.load(folder)

if __name__ == "__main__":
    chapter1.run(main, Config, __doc__ + PRESET_HELP, defaults_for)
