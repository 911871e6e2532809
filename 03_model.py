"""Chapter 3 · The model: a GPT with attention by hand, able to open GPT-2, Llama and Qwen3 weights.

Tokens go in, and for every position a score comes out for each token that could be next. In between
stands a stack of equal blocks. In each, attention lets a position gather what it needs from the
positions before it, and the MLP, a small network, thinks about what was gathered. Both only add to
a running sum, the residual stream x, so that no layer can lose what an earlier one has found:

    ids (B, T) -> embed -> x (B, T, C) ->+-----------------------+->+-----------------+-> ...-> norm
                                         |                       ^  |                 ^          |
                                         +-> norm -> attention --+  +-> norm -> MLP --+        head
    GPT-2 (2019)  LayerNorm  learned positions  GELU    biases                                   |
    today         RMSNorm    RoPE               SwiGLU  QK-norm, grouped heads   logits (B, T, V)

Run:    python 03_model.py                  the parts, what they cost, the first loss, a test
        python 03_model.py --preset gpt2    of another shape; every setting is a flag, see --help
Draws:  out/rope.png
Source: Vaswani 2017 (attention), Radford 2019 (GPT-2), Su 2021 (RoPE), Zhang 2019 (RMSNorm),
        Shazeer 2020 (SwiGLU), Ainslie 2023 (grouped heads), Henry 2020 (QK-norm)
"""
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

chapter1 = import_module("01_tokenizer")
CourseError = chapter1.CourseError

# Legend
#   B  sequences in a batch     T  positions that ask     S  positions seen: T and those in a cache
#   H  heads     K  heads with keys of their own     D  numbers of one head     L  layers
#   C  width of the residual stream     F  hidden width of the MLP     V  vocabulary
# Folders that transformers opens (save, load) are tools: they stand at the file's end.


# ---- Attention, by its definition ----------------------------------------------------------------
# Each position asks a question (its query), bears a label (its key) and has something to give (its
# value): three lists of numbers that the model learns to make. The better a label fits a question,
# the larger their product, and the more of that value is taken. "sat" asks who does it, say:
#     query of "sat" (0, 2); keys: the (2, 0), cat (0, 2), sat (1, 1); products: 0, 4, 2
#     over sqrt(2): 0, 2.8, 1.4; softmax: .05, .77, .19: so "sat" takes .77 of the value of "cat"
# Why sqrt(D)? A sum of D random products grows like sqrt(D). With large scores, softmax gives all
# weight to one winner; then small changes change nothing, there is no gradient, nothing is learnt.
def attention_formula(q, k, v, visible=None):
    """Average the values by how well the queries fit the keys (Vaswani et al. 2017).

    q (B, H, T, D), k and v (B, H, S, D), visible: bool, (T, S) or (B, 1, T, S) -> (B, H, T, D)
    """
    q = q / math.sqrt(q.shape[-1])
    scores = q @ k.transpose(-2, -1)             # (B, H, T, D) @ (B, H, D, S) -> (B, H, T, S)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))       # exp(-inf) is 0: no weight there
    weights = scores.softmax(dim=-1)             # each query's weights sum to 1
    return weights @ v                           # (B, H, T, S) @ (B, H, S, D) -> (B, H, T, D)


def who_sees(T, S, documents=None, device=None):
    """Return the causal mask: True where one of the last T of S positions may look at one of all S.

    A position sees itself and those before it: it is to guess the next token, not to copy it. With
    `documents` (B, S), a number per text, it sees its own text only. (T, S), or (B, 1, T, S).

    >>> who_sees(2, 3).tolist()
    [[True, True, False], [True, True, True]]
    """
    seen = torch.arange(S, device=device)                          # (S)
    asks = seen[S - T:, None]                                      # (T, 1)
    visible = seen <= asks                                         # (T, S)
    if documents is not None:
        same = documents[:, S - T:, None] == documents[:, None, :]             # (B, T, S)
        visible = visible & same[:, None]                                      # (B, 1, T, S)
    return visible


# ---- Attention, for real: the same, with less work and memory ------------------------------------
def attention_in_blocks(q, k, v, visible, block=128):
    """Return attention_formula's result, for `block` queries at a time.

    The formula computes all (T, S) scores, and the mask throws half of them away. A block of
    queries is held only against the keys up to its last one: less work, and never (T, S) at once.
    """
    parts = []
    T, S = visible.shape[-2:]
    for i in range(0, T, block):
        end = S - T + i + block                                    # no key from here on is visible
        mask = visible[..., i:i + block, :end]
        parts.append(attention_formula(q[:, :, i:i + block], k[:, :, :end], v[:, :, :end], mask))
    return torch.cat(parts, dim=2)                                 # (B, H, T, D)


def attention(q, k, v, visible=None, kind="formula"):
    """Attention of queries (B, H, T, D) over keys and values (B, K, S, D) -> (B, H, T, D).

    kind: formula, blocks, or fused, torch's own kernel. visible: see who_sees; without it, a
    single query sees all, and the fused kernel takes the causal mask, which it knows by heart.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:                               # grouped heads: so many queries share a key
        k = k.repeat_interleave(groups, dim=1)   # (B, K, S, D) -> (B, H, S, D)
        v = v.repeat_interleave(groups, dim=1)
    if kind == "fused":
        is_causal = visible is None and q.shape[2] > 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=is_causal)
    if kind == "blocks" and visible is not None:
        return attention_in_blocks(q, k, v, visible)
    return attention_formula(q, k, v, visible)


def choose_attention(kind, S, device):
    """Return what "auto" stands for: up to 256 keys, one large product is the fastest anyway."""
    if kind != "auto":
        return kind
    long = "fused" if device.type == "cuda" else "blocks"
    return "formula" if S <= 256 else long


# ---- Where a token stands: RoPE ------------------------------------------------------------------
# Attention alone does not see the order of words. RoPE turns each pair of numbers (x, y) of a query
# or key by an angle that grows with the position: at position m by m times w,
#     (x cos(m w) - y sin(m w),  x sin(m w) + y cos(m w))
# The product of two such pairs depends on the angle between them: for a query at m and a key at n
# that is the angle they had, plus (m - n) w. So only the distance counts, wherever the two stand.
# Every pair turns at a speed w of its own: the fast ones tell neighbours apart, but a full circle
# later they look the same; the slow ones tell near from far.
def rope_angles(config, positions):
    """Return cos and sin, each (T, D), of the angles at each position (T)."""
    pairs = torch.arange(0, config.head_width, 2, device=positions.device) / config.head_width
    speeds = config.rope_theta ** -pairs                           # (D/2), from 1 to 1 / theta
    angles = positions[:, None] * speeds                           # (T, 1) * (D/2) -> (T, D/2)
    angles = angles.repeat(1, 2)                                   # (T, D)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn the pairs (x[i], x[i + D/2]) of queries or keys (B, H, T, D) by the angles (T, D)."""
    first, second = x.chunk(2, dim=-1)                             # (B, H, T, D/2) each
    turned = torch.cat((-second, first), dim=-1)                   # by a right angle
    return (x * cos + turned * sin).type_as(x)


# ---- The parts to choose from, and the shape of a model ------------------------------------------
# For those new to torch: an nn.Module holds weights and other modules, and module(x) calls its
# `forward`. nn.Linear(a, b) is the product x @ W.T + bias with a matrix W (b, a) that is learnt;
# nn.Embedding(V, C) is a table (V, C): indexed by an id, it gives that row of C numbers.
class RMSNorm(nn.Module):
    """Scale x (..., width) to unit root mean square, in float32, then by learned weights."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        # x / sqrt(mean(x^2) + eps): torch does it in one step, which sampling feels
        scaled = F.rms_norm(x.float(), self.weight.shape, None, self.eps)
        return scaled.type_as(x) * self.weight


NORMS = {  # name: norm(width, config)
    "rmsnorm": lambda width, config: RMSNorm(width, config.norm_eps),
    "layernorm": lambda width, config: nn.LayerNorm(width, config.norm_eps, bias=config.bias),
}
MLPS = {  # name: (what bends the numbers, whether it is a gate for others)
    "swiglu": (F.silu, True),                                      # x sigmoid(x)
    "gelu": (partial(F.gelu, approximate="tanh"), False),          # x P(a normal number < x)
}
KINDS = {
    "norm": NORMS,
    "positions": ("rope", "learned"),
    "mlp": MLPS,
    "attention": ("auto", "formula", "blocks", "fused"),
}


@dataclass
class GPTConfig:
    """The shape of a model. Raises CourseError for values that cannot work together."""
    vocab_size: int = 4096  # V, the ids that it knows
    context: int = 256  # the most tokens it can look at; more costs memory and time
    layers: int = 4  # L, blocks on top of each other: more steps of thought
    heads: int = 4  # H, questions that a position asks at once
    kv_heads: int = 0  # K, heads with keys and values of their own, shared by H / K queries (0: H)
    width: int = 256  # C, numbers that describe a token: the width of the residual stream
    head_width: int = 0  # D, numbers in one query (0: C / H)
    hidden: int = 0  # F, hidden width of the MLP (0: 4 C, or 8/3 C if it has a gate)
    norm: str = "rmsnorm"  # rmsnorm, or layernorm, which also takes the mean out
    positions: str = "rope"  # rope, or learned: a learned vector for each position
    mlp: str = "swiglu"  # swiglu, or gelu, which bends each number by itself, without a gate
    bias: bool = False  # add a learned constant in linear and LayerNorm layers
    qk_norm: bool = True  # normalise queries and keys, so that no score grows too large
    tied: bool = True  # use the embedding matrix as the head as well
    dropout: float = 0.0  # share of activations set to zero in training, against overfitting
    rope_theta: float = 10000.0  # 1 / speed of RoPE's slowest pair; more for a longer context
    norm_eps: float = 1e-6  # keeps the norms from dividing by zero
    attention: str = "auto"  # how to compute it: formula, blocks, fused, or auto: the fastest

    def __post_init__(self):
        for name, kinds in KINDS.items():
            if getattr(self, name) not in kinds:
                raise CourseError(f"--{name} {getattr(self, name)}: choose of {', '.join(kinds)}")
        _, has_gate = MLPS[self.mlp]
        # A gate is a third matrix: with two thirds of the width, three are as large as two.
        hidden = math.ceil(self.width * 8 / 3 / 64) * 64 if has_gate else 4 * self.width
        self.hidden = self.hidden or hidden
        self.kv_heads = self.kv_heads or self.heads
        if min(self.vocab_size, self.context, self.layers, self.heads, self.width) < 1:
            raise CourseError("vocabulary, context, layers, heads and width must be at least 1")
        if self.width % self.heads or self.heads % self.kv_heads:
            raise CourseError(f"--width {self.width} must be a multiple of --heads {self.heads}, "
                              f"and that of --kv-heads {self.kv_heads}")
        self.head_width = self.head_width or self.width // self.heads
        if self.positions == "rope" and self.head_width % 2:
            raise CourseError(f"RoPE turns pairs, but a head has {self.head_width} numbers")


# ---- The model: its parts bear the names that Llama's have in transformers -----------------------
class Attention(nn.Module):
    """Project x to queries, keys and values, let the heads attend, project back."""

    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        self.layer = layer
        C, H, K, D = config.width, config.heads, config.kv_heads, config.head_width
        self.q_proj = nn.Linear(C, H * D, bias=config.bias)
        self.k_proj = nn.Linear(C, K * D, bias=config.bias)        # with K < H, fewer keys and
        self.v_proj = nn.Linear(C, K * D, bias=config.bias)        # values have to be kept in the
        self.o_proj = nn.Linear(H * D, C, bias=config.bias)        # cache of chapter 5
        self.q_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()

    def into_heads(self, x):
        """(B, T, H D) -> (B, H, T, D)"""
        return x.unflatten(-1, (-1, self.config.head_width)).transpose(1, 2)

    def project(self, x, angles):
        """Return queries (B, H, T, D), keys and values (B, K, T, D) of x (B, T, C)."""
        q = self.q_norm(self.into_heads(self.q_proj(x)))
        k = self.k_norm(self.into_heads(self.k_proj(x)))
        v = self.into_heads(self.v_proj(x))
        if angles is not None:
            q = rotate(q, *angles)
            k = rotate(k, *angles)
        return q, k, v

    def forward(self, x, angles, visible, kind, cache):
        q, k, v = self.project(x, angles)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)                  # (B, K, T, D) -> (B, K, S, D)
        y = attention(q, k, v, visible, kind)                      # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).flatten(2))           # -> (B, T, H D) -> (B, T, C)


class MLP(nn.Module):
    """Up, bend, down. A gate, where there is one, says how much of each number gets through."""

    def __init__(self, config):
        super().__init__()
        self.bend, has_gate = MLPS[config.mlp]
        self.up_proj = nn.Linear(config.width, config.hidden, bias=config.bias)
        self.down_proj = nn.Linear(config.hidden, config.width, bias=config.bias)
        self.gate_proj = None
        if has_gate:
            self.gate_proj = nn.Linear(config.width, config.hidden, bias=config.bias)

    def forward(self, x):
        up = self.up_proj(x)                                       # (B, T, C) -> (B, T, F)
        if self.gate_proj is None:
            up = self.bend(up)
        else:
            up = self.bend(self.gate_proj(x)) * up
        return self.down_proj(up)                                  # (B, T, F) -> (B, T, C)


class Block(nn.Module):
    """Gather, then think: both add to the stream x (B, T, C)."""

    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = NORMS[config.norm](config.width, config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = NORMS[config.norm](config.width, config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, angles, visible, kind, cache):
        gathered = self.self_attn(self.input_layernorm(x), angles, visible, kind, cache)
        x = x + self.dropout(gathered)
        thought = self.mlp(self.post_attention_layernorm(x))
        return x + self.dropout(thought)


class GPT(nn.Module):
    """The whole model: model(ids) gives logits (B, T, V)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.embed_positions = None
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.context, config.width)
        self.layers = nn.ModuleList([Block(config, layer) for layer in range(config.layers)])
        self.norm = NORMS[config.norm](config.width, config)
        self.dropout = nn.Dropout(config.dropout)
        self.lm_head = None
        if not config.tied:
            self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.start()

    def start(self):
        """Set the weights to small random numbers, so that all tokens are about equally likely."""
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                std = 0.02
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= math.sqrt(2 * self.config.layers)       # so many of them add up in x
                nn.init.normal_(weight, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, ids, documents=None, cache=None, last_only=False):
        """Return logits (B, T, V) for ids (B, T), the next T after those in the cache.

        documents (B, T): a number per text, where several share a sequence; last_only: logits of
        the last position alone, (B, 1, V). Raises CourseError past the context.
        """
        past = 0 if cache is None else cache.length
        T, S = ids.shape[1], past + ids.shape[1]
        if S > self.config.context:
            raise CourseError(f"{S} tokens do not fit the context of {self.config.context}")
        kind = choose_attention(self.config.attention, S, ids.device)
        visible = None                                             # see `attention`
        if T > 1 and (kind != "fused" or documents is not None or past > 0):
            visible = who_sees(T, S, documents, ids.device)        # (T, S) or (B, 1, T, S)

        x = self.embed_tokens(ids)                                 # (B, T) -> (B, T, C)
        positions = torch.arange(past, S, device=ids.device)       # (T)
        angles = None
        if self.embed_positions is None:
            angles = rope_angles(self.config, positions)
        else:
            x = x + self.embed_positions(positions)
        x = self.dropout(x)
        for block in self.layers:
            x = block(x, angles, visible, kind, cache)             # (B, T, C) -> (B, T, C)
        if cache is not None:
            cache.length = S
        if last_only:
            x = x[:, -1:]                                          # (B, T, C) -> (B, 1, C)
        # Why may the embedding be the head? Both hold C numbers for each token: what it means when
        # it is read, and what x must look like for it to come next. It saves V x C weights.
        head = self.lm_head or self.embed_tokens
        return F.linear(self.norm(x), head.weight)                 # (B, T, C) -> (B, T, V)

    def save(self, folder):
        """Write config.json and model.safetensors; transformers and vLLM open most shapes."""
        save_model(self, folder)

    @staticmethod
    def load(folder, context=0):
        """Open a folder: ours, or of the GPT-2, Llama, Qwen3 family; `context` can shorten that."""
        return load_model(folder, context)


# ---- Looking at it -------------------------------------------------------------------------------
def show_parts(config):
    """Print the parameters of a model, those of one block for all of them, and what they cost.

    To train on a token takes 6 operations a weight: each weight is multiplied and added once on the
    way forward (2), and twice as often on the way back, for the gradients of weights and inputs
    (4). The scores of attention have no weights, but cost likewise: C products with each of T keys.
    """
    with torch.device("meta"):                                     # shapes without numbers
        parts = dict(GPT(config).named_parameters())
    multiplied = config.vocab_size * config.width                  # the head
    for name, part in parts.items():
        if "proj" in name:
            multiplied += part.numel()
        if ".0." in name:
            print(f"{name:42} {str(list(part.shape)):14} {part.numel():12,} x {config.layers}")
        elif "layers." not in name:
            print(f"{name:42} {str(list(part.shape)):14} {part.numel():12,}")
    scores = config.layers * config.heads * config.head_width * config.context
    total = sum(part.numel() for part in parts.values())
    print(f"{total:,} parameters, {6 * (multiplied + scores) / 1e6:,.1f} MFLOP to train on a token")


@torch.no_grad()
def show_causality(config):
    """Print the first loss of a random model of two layers, and that it sees no later token."""
    V = config.vocab_size
    model = GPT(replace(config, layers=2, dropout=0.0))
    T = min(128, config.context)
    ids = torch.randint(V, (8, T))                                 # (B, T)
    others = ids.clone()
    others[:, T // 2:] = ids.flip(0)[:, T // 2:]                   # another second half
    logits = model(ids)                                            # (B, T, V)
    change = (model(others) - logits).abs()
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    print(f"first loss {loss:.2f} (2 layers); a guess among {V:,} tokens: {math.log(V):.2f}")
    print("another second half changes logits by "
          f"{change[:, :T // 2].max():.0e} in the first half, "
          f"{change[:, T // 2:].max():.0e} in the second")


def draw_rope(config, path):
    """Draw how alike RoPE leaves two positions at a distance: for some pairs, and their mean."""
    cosines, _ = rope_angles(config, torch.arange(config.context))
    cosines = cosines[:, :config.head_width // 2]                  # (T, D/2)
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axis = figure.add_subplot(xlabel="distance in tokens", ylabel="cosine of the angle")
    axis.set_title("RoPE: each pair turns at its own speed; black: the mean of all pairs")
    axis.plot(cosines[:, ::max(1, config.head_width // 8)], linewidth=1)
    axis.plot(cosines.mean(dim=1), "k")
    chapter1.save_figure(figure, path)
    print(f"drew {path}")


# ---- The script ----------------------------------------------------------------------------------
GPT2 = dict(norm="layernorm", positions="learned", mlp="gelu", bias=True, qk_norm=False,
            norm_eps=1e-5, vocab_size=50257, context=1024)
LARGE = dict(steps=5000, batch_tokens=524288, micro_batch=32, lr=3e-3, matrix_lr=4e-3,
             eval_every=250)
PRESETS = {  # name: a shape, where it is not the default, and how chapter 4 trains it
    "small": dict(steps=2800, batch_tokens=2048, micro_batch=8, lr=6e-3, matrix_lr=0.01,
                  eval_every=400),                                 # 4 million weights, for a CPU
    "gpu": dict(layers=6, heads=6, width=384, dropout=0.2,         # 12 million
                steps=640, batch_tokens=32768, micro_batch=128, lr=3e-3, matrix_lr=6e-3,
                eval_every=80),
    "modern-124m": dict(LARGE, vocab_size=50304, context=1024, layers=12, heads=12, width=768),
    "gpt2": dict(LARGE, **GPT2, layers=12, heads=12, width=768),
    "gpt2-medium": dict(LARGE, **GPT2, layers=24, heads=16, width=1024),
    "gpt2-large": dict(LARGE, **GPT2, layers=36, heads=20, width=1280),
    "gpt2-xl": dict(LARGE, **GPT2, layers=48, heads=25, width=1600),
}
SHAPE = [item.name for item in fields(GPTConfig)]


def describe_presets():
    """Return the presets as text for --help."""
    lines = [f"  {name}: {values}" for name, values in PRESETS.items()]
    return "\n".join(["", "presets, where not as the defaults:", *lines])


def find_preset(name):
    """Return the values of a preset. Raises CourseError if there is none of that name."""
    if name not in PRESETS:
        raise CourseError(f"--preset {name}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def shape_of(settings):
    """Return the GPTConfig among the settings of a run, which has all of its fields."""
    return GPTConfig(**{name: getattr(settings, name) for name in SHAPE})


@dataclass
class Config(GPTConfig):
    preset: str = "small"  # a set of values for the other flags, see below
    out: str = "out"  # root folder of the course


def defaults_for(given):
    """Return the shape that --preset stands for; flags that were given change it."""
    preset = find_preset(given.get("preset", "small"))
    return {name: value for name, value in preset.items() if name in SHAPE}


def main(config):
    """Show parts and cost, the first loss, and that the model sees no later token; draw RoPE."""
    shape = shape_of(config)
    print(shape)
    show_parts(shape)
    show_causality(shape)
    if shape.positions == "rope":
        draw_rope(shape, Path(config.out) / "rope.png")
    print(f"next: {chapter1.command('04_train.py', config)}")


# ---- Tools: folders for transformers, config.json and model.safetensors --------------------------
FAMILIES = {  # model_type: its class in transformers, and the parts that all its models have
    "gpt2": ("GPT2LMHeadModel", dict(norm="layernorm", positions="learned", mlp="gelu", bias=True,
                                     qk_norm=False, tied=True)),
    "llama": ("LlamaForCausalLM", dict(qk_norm=False, tied=False)),
    "qwen3": ("Qwen3ForCausalLM", dict(qk_norm=True, tied=False)),
}
SETTINGS = {  # ours: (Llama's name, GPT-2's)
    "vocab_size": ("vocab_size", "vocab_size"), "dropout": ("resid_pdrop", "resid_pdrop"),
    "context": ("max_position_embeddings", "n_positions"), "layers": ("num_hidden_layers", "n_layer"),
    "heads": ("num_attention_heads", "n_head"), "width": ("hidden_size", "n_embd"),
    "hidden": ("intermediate_size", "n_inner"), "norm_eps": ("rms_norm_eps", "layer_norm_epsilon"),
    "tied": ("tie_word_embeddings", "tie_word_embeddings"), "rope_theta": ("rope_theta", None),
    "kv_heads": ("num_key_value_heads", None), "head_width": ("head_dim", None),
}
ACCEPTED = {  # other settings: the values that we can honour, of which the first is written
    "hidden_act": ["silu"], "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
    "rope_type": ["default"], "rope_scaling": [None], "quantization_config": [None],
    "attention_bias": [False], "mlp_bias": [False], "use_sliding_window": [False],
    "scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False],
}
GPT2_NAMES = {
    "embed_tokens": "wte", "embed_positions": "wpe", "norm": "ln_f", "layers": "h",
    "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "self_attn": "attn",
    "q_proj": "c_attn", "k_proj": "c_attn", "v_proj": "c_attn", "o_proj": "c_proj",
    "up_proj": "c_fc", "down_proj": "c_proj",
}
# A safetensors file: 8 bytes N, N bytes of JSON {name: {dtype, shape, data_offsets}}, the numbers.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "U8": torch.uint8, "BOOL": torch.bool}


def write_config(config, family):
    """Return what config.json holds for a config under a family's model_type."""
    if family == "course":                       # transformers has no model with these parts
        return {"model_type": "course", "course": asdict(config)}
    data = {name: values[0] for name, values in ACCEPTED.items()}
    data.update(model_type=family, architectures=[FAMILIES[family][0]], dtype="float32",
                bos_token_id=None, eos_token_id=None)
    for ours, names in SETTINGS.items():
        data[names[family == "gpt2"]] = getattr(config, ours)
    data.pop(None, None)                         # what GPT-2 has no name for
    if family != "gpt2":                         # transformers 5 reads only this, 4 only the other
        data["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    return data


def read_config(data):
    """Return the GPTConfig of a parsed config.json. Raises CourseError for what we do not know."""
    family = data.get("model_type")
    if family == "course":
        return GPTConfig(**data["course"])
    if family not in FAMILIES:
        raise CourseError(f"a model of type {family} is not supported")
    data = {**data, **(data.get("rope_parameters") or {})}
    for name, values in ACCEPTED.items():
        if data.get(name, values[0]) not in values:
            raise CourseError(f"a model with {name} {data[name]} is not supported")
    found = {}
    for ours, names in SETTINGS.items():
        value = data.get(names[family == "gpt2"])
        if value is not None:
            found[ours] = value
    if "heads" not in found or "context" not in found:         # the weights would not tell
        raise CourseError("the number of heads or the context is missing")
    return GPTConfig(**{**FAMILIES[family][1], **found})


def family_of(config):
    """Return the model_type under which transformers opens a config and loses nothing, or "course".

    A setting that a family does not know, a new one of yours too, would not come back.
    """
    for family in FAMILIES:
        if read_config(write_config(config, family)) == replace(config, attention="auto"):
            return family
    return "course"


def family_tensors(model):
    """Return {name in the family's file: [views of our parameters, side by side in it]}.

    Llama's names are ours. In GPT-2's, matrices are (in, out), and q, k and v are joined.
    """
    tensors = {}
    is_gpt2 = family_of(model.config) == "gpt2"
    for name, parameter in model.named_parameters():
        view = parameter.detach()
        prefix = "model."
        if is_gpt2:
            prefix = "transformer."
            name = ".".join([GPT2_NAMES.get(part, part) for part in name.split(".")])
            if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                view = view.T
        if name != "lm_head.weight":
            name = prefix + name
        tensors.setdefault(name, []).append(view)
    return tensors


def save_model(model, folder):
    """Write config.json and model.safetensors (float32)."""
    tensors = {}
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, views in family_tensors(model).items():
        tensor = torch.cat(views, dim=-1).float().cpu().contiguous()
        tensors[name] = tensor
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)              # the numbers start at a multiple of 8
    path = Path(folder) / "model.safetensors"
    with chapter1.replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.numpy())
    data = write_config(model.config, family_of(model.config))
    chapter1.write_json(Path(folder) / "config.json", data)


def read_safetensors(path):
    """Return {name: tensor} of a safetensors file. Raises CourseError if it is damaged."""
    tensors = {}
    try:
        size = path.stat().st_size
        data = torch.from_file(str(path), size=size, dtype=torch.uint8)        # mapped, not read
        start = 8 + int.from_bytes(data[:8].numpy().tobytes(), "little")
        header = json.loads(data[8:min(start, size)].numpy().tobytes())
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            numbers = data[start + begin:start + end].clone()  # a copy: views need aligned bytes
            tensors[name] = numbers.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise CourseError(f"{path} is damaged: {error!r}"[:300]) from None
    return tensors


def crop_context(model, context):
    """Let a model look at `context` tokens only: its full context may need too much memory."""
    if context > model.config.context:
        raise CourseError(f"--context {context}: the model knows {model.config.context} positions")
    model.config.context = context
    if model.embed_positions is not None:
        table = model.embed_positions.weight.detach()[:context]
        model.embed_positions = nn.Embedding.from_pretrained(table.clone(), freeze=False)


def read_tensors(folder, prefix):
    """Return {name: tensor} of all weight files of a folder, each name with its family's prefix."""
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):     # large models come in several
        for name, tensor in read_safetensors(file).items():
            if not name.startswith((prefix, "lm_head")):       # GPT-2's own file has none
                name = prefix + name
            if not name.endswith((".attn.bias", ".attn.masked_bias")):         # old: the mask
                found[name] = tensor
    return found


def load_model(folder, context):
    """Open a folder of ours, or of the GPT-2, Llama or Qwen3 family. Raises CourseError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CourseError(f"there is no folder {folder} with a model")
    data = chapter1.read_json(folder / "config.json", "04_train.py or 06_finetune.py")
    try:
        with torch.device("meta"):                             # shapes without numbers
            model = GPT(read_config(data))
    except (CourseError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise CourseError(f"{folder / 'config.json'}: {error}") from None
    targets = family_tensors(model.to_empty(device="cpu"))
    prefix = "transformer." if "transformer.wte.weight" in targets else "model."
    found = read_tensors(folder, prefix)
    if model.config.tied:
        found.pop("lm_head.weight", None)
    strange = sorted(found.keys() ^ targets.keys())
    if strange:
        raise CourseError(f"{folder}: tensors missing or not expected: {', '.join(strange[:5])}")
    for name, views in targets.items():
        for view, part in zip(views, found[name].chunk(len(views), dim=-1)):
            if view.shape != part.shape:
                raise CourseError(f"{folder}: {name} is {list(part.shape)}, not {list(view.shape)}")
            view.copy_(part)                                   # whatever its dtype was, float32 now
    if context:
        crop_context(model, context)
    return model


if __name__ == "__main__":
    chapter1.run(main, Config, __doc__ + describe_presets(), defaults_for)
