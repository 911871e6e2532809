"""Chapter 3 · The model: a GPT with attention by hand, able to open GPT-2, Llama and Qwen3 weights.

Tokens go in, and for every position a score comes out for each token that could be next. Between
them stands a stack of equal blocks. A block does two things: attention lets each position gather
from those before it what it needs, and the MLP lets it think about what it has gathered. Both only
add to a running sum, the residual stream, so that a deep stack can still be trained.

    ids (B, T) -> embed -> x (B, T, C) ->+-----------------------+->+-----------------+-> ... -> norm
                                         |                       ^  |                 ^           |
                                         +-> norm -> attention --+  +-> norm -> MLP --+         head
                                                                                                  |
    GPT-2 (2019)  LayerNorm  learned positions  GELU    biases                      logits (B, T, V)
    today         RMSNorm    RoPE               SwiGLU  QK-norm, grouped heads

Run:    python 03_model.py                   the default for two CPU cores
        python 03_model.py --preset gpt2     the same table for GPT-2
Prints: the parts with shapes and parameters, the first loss, and a proof that no position sees the
        future. Draws out/rope.png.
Source: Vaswani et al. 2017 (attention), Radford et al. 2019 (GPT-2), Su et al. 2021 (RoPE), Shazeer
        2020 (SwiGLU), Zhang & Sennrich 2019 (RMSNorm), Ainslie et al. 2023 (grouped heads).
"""
import json
import math
import struct
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

chapter1 = import_module("01_tokenizer")
CourseError, read_json, write_json, replacing = (
    chapter1.CourseError, chapter1.read_json, chapter1.write_json, chapter1.replacing)

# Legend
#   B  batch: sequences side by side          C  width of the residual stream
#   T  time: positions that ask               H  heads; K of them have keys and values of their own
#   S  positions that are looked at: the      D  width of one head
#      T and what a cache holds of before     F  hidden width of the MLP          V  vocabulary


@dataclass
class GPTConfig:
    """The shape of a model. Raises CourseError for values that cannot work together."""
    vocab_size: int = 4096  # V, the ids it knows
    context: int = 256  # T, the tokens it can look at; more costs memory and time
    layers: int = 4  # blocks on top of each other: more steps of thought
    heads: int = 4  # H, questions asked at once by a position
    kv_heads: int = 0  # K, heads with keys and values of their own, shared by H / K questions (0: H)
    width: int = 256  # C, numbers by which a token is described
    head_width: int = 0  # D, numbers in one question (0: C / H)
    hidden: int = 0  # F, hidden width of the MLP (0: 4 C for gelu, 8/3 C for swiglu)
    norm: str = "rms"  # rms or layer: how x is brought to unit size
    positions: str = "rope"  # rope (rotate queries and keys) or learned (a vector per place)
    mlp: str = "swiglu"  # swiglu or gelu
    bias: bool = False  # add a learned constant in linear and LayerNorm layers
    qk_norm: bool = True  # normalise queries and keys, which keeps attention from saturating
    tied: bool = True  # use the embedding matrix as the head as well
    dropout: float = 0.0  # share of activations set to zero in training, against overfitting
    rope_theta: float = 10000.0  # RoPE's slowest wavelength, over 2 pi
    norm_eps: float = 1e-6  # keeps the norms from dividing by zero
    attention: str = "auto"  # formula, blocks, fused, or auto: see `attention`

    def __post_init__(self):
        self.kv_heads = self.kv_heads or self.heads
        self.head_width = self.head_width or self.width // max(1, self.heads)
        self.hidden = self.hidden or (4 * self.width if self.mlp == "gelu" else (self.width * 8 // 3 + 63) // 64 * 64)
        choices = {"norm": ("rms", "layer"), "positions": ("rope", "learned"), "mlp": ("swiglu", "gelu"),
                   "attention": ("auto", "formula", "blocks", "fused")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise CourseError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        for name in ("vocab_size", "context", "layers", "heads", "kv_heads", "width", "head_width", "hidden"):
            if getattr(self, name) < 1:
                raise CourseError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise CourseError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.positions == "rope" and self.head_width % 2:
            raise CourseError(f"RoPE turns pairs of numbers: head_width ({self.head_width}) must be even")
        if not 0 <= self.dropout < 1:
            raise CourseError(f"dropout must be in [0, 1), not {self.dropout}")


GPT2 = dict(vocab_size=50257, context=1024, norm="layer", positions="learned", mlp="gelu", bias=True,
            qk_norm=False, norm_eps=1e-5)
MODERN = dict(vocab_size=50304, context=1024)
PRESETS = {
    "small": dict(),                                                        # 4 million parameters: two CPU cores
    "gpu": dict(layers=6, heads=6, width=384, dropout=0.2),                    # 12 million: minutes on a GPU
    "gpt2": dict(GPT2, layers=12, heads=12, width=768),                        # 124 million, exactly GPT-2
    "gpt2-medium": dict(GPT2, layers=24, heads=16, width=1024),
    "gpt2-large": dict(GPT2, layers=36, heads=20, width=1280),
    "gpt2-xl": dict(GPT2, layers=48, heads=25, width=1600),
    "modern-124m": dict(MODERN, layers=12, heads=12, width=768),               # GPT-2's size, today's parts
    "modern-350m": dict(MODERN, layers=24, heads=16, width=1024),
}


# ---- Attention -----------------------------------------------------------------------------------

def attention_formula(q, k, v, visible):
    """Attention, as it is defined: weights that sum to one over what may be seen, then a mean.

    q: (B, H, T, D), k and v: (B, H, S, D), visible: bool, broadcast to (B, H, T, S).
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)   # (B, H, T, D) @ (B, H, D, S) -> (B, H, T, S)
    scores = scores.masked_fill(~visible, float("-inf"))       # exp(-inf) is 0: no weight on the future
    weights = scores.softmax(dim=-1)                           # each row sums to 1
    return weights @ v                                         # (B, H, T, S) @ (B, H, S, D) -> (B, H, T, D)


def visible_keys(rows, S, past, documents, device):
    """Return which keys some rows of queries may see: (T, S), or (B, 1, T, S) with documents.

    A position sees itself and what stands before it; with `documents` (B, S), numbers that say which
    text a position belongs to, only its own text.
    """
    visible = torch.arange(S, device=device) <= past + torch.arange(rows.start, rows.stop, device=device)[:, None]
    if documents is None:
        return visible
    asking = documents[:, past + rows.start:past + rows.stop]
    return visible & (asking[:, :, None] == documents[:, None, :S])[:, None]


def attention(q, k, v, kind="auto", documents=None, block=128):
    """Causal attention of queries q (B, H, T, D) over keys and values (B, K, S, D) -> (B, H, T, D).

    The T queries stand at the last T of the S positions. kind:
      formula  the definition: for T = S = 1024 half of its work is masked away again
      blocks   the definition for `block` rows at a time, each against only the keys it may see; no
               (T, S) matrix is kept whole, and about half the work is never done
      fused    torch's own kernel, for comparison
      auto     formula up to 256 keys, where one large product is the fastest, else blocks
    """
    T, S, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    past = S - T
    if groups > 1:                                             # (B, K, S, D) -> (B, H, S, D)
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if kind == "fused":
        plain = documents is None and past == 0
        visible = None if plain else visible_keys(range(T), S, past, documents, q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=plain)
    size = T if kind == "formula" or (kind == "auto" and S <= 256) else block
    parts = []
    for start in range(0, T, size):
        rows = range(start, min(start + size, T))
        seen = past + rows.stop                                # what lies behind is in everyone's future
        visible = visible_keys(rows, seen, past, documents, q.device)
        parts.append(attention_formula(q[:, :, rows.start:rows.stop], k[:, :, :seen], v[:, :, :seen], visible))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


# ---- Positions, norms, MLPs: one switch per idea -------------------------------------------------

def rope_angles(config, places):
    """Return cos and sin, each (T, D), of the angle by which RoPE turns each pair at each place.

    Pair i of D / 2 turns by theta^(-2i / D) per step: the first fast, the last hardly at all.
    """
    pairs = torch.arange(0, config.head_width, 2, device=places.device) / config.head_width      # (D / 2)
    angles = places[:, None].float() * config.rope_theta ** -pairs                               # (T, D / 2)
    angles = torch.cat((angles, angles), dim=-1)                                                 # (T, D)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn the pairs (x[i], x[i + D / 2]) of queries or keys (B, H, T, D) by their angles.

    A product of two turned vectors depends on the difference of their places alone.
    """
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).type_as(x)


class RMSNorm(nn.Module):
    """Scale x to unit root mean square, in float32, then by a learned weight."""

    def __init__(self, width, eps, bias=False):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return scaled.type_as(x) * self.weight


class GELU(nn.Module):
    """GPT-2's MLP: up, bend, down."""

    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.width, config.hidden, bias=config.bias)
        self.down_proj = nn.Linear(config.hidden, config.width, bias=config.bias)

    def forward(self, x):
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))     # (B, T, C) -> (B, T, F) -> (B, T, C)


class SwiGLU(nn.Module):
    """Llama's MLP: a second projection, the gate, decides how much of the first gets through."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.hidden, bias=config.bias)
        self.up_proj = nn.Linear(config.width, config.hidden, bias=config.bias)
        self.down_proj = nn.Linear(config.hidden, config.width, bias=config.bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))     # (B, T, C) -> (B, T, F) -> (B, T, C)


NORMS = {"rms": RMSNorm, "layer": nn.LayerNorm}
MLPS = {"gelu": GELU, "swiglu": SwiGLU}


# ---- The model: names are those of Llama in transformers, so its weights need no translation -----

class KVCache:
    """The keys and values of the positions read so far: (2, layers, B, K, context, D)."""

    def __init__(self, config, batch, device=None, dtype=torch.float32):
        shape = (2, config.layers, batch, config.kv_heads, config.context, config.head_width)
        self.pairs, self.length = torch.zeros(shape, device=device, dtype=dtype), 0

    def append(self, layer, k, v):
        """Add k and v (B, K, T, D) of one layer; return all of them, (B, K, S, D)."""
        end = self.length + k.shape[2]
        self.pairs[0, layer, :, :, self.length:end], self.pairs[1, layer, :, :, self.length:end] = k, v
        return self.pairs[0, layer, :, :, :end], self.pairs[1, layer, :, :, :end]

    def select(self, rows):
        """Keep, drop or repeat sequences: row i of the new batch is row rows[i] of the old."""
        self.pairs = self.pairs[:, :, rows]


def window_start(length, context):
    """Return where the model's view of a text of `length` tokens begins.

    A text that fits is seen whole. When it has outgrown the context, the view moves on by half a
    context at a time, so that a cache is rebuilt once in context / 2 tokens and not at each.

    >>> [window_start(length, 8) for length in (1, 8, 9, 12, 13)]
    [0, 0, 4, 4, 8]
    """
    half = max(1, context // 2)
    return max(0, -(-(length - context) // half) * half)


class Attention(nn.Module):
    """Project x to queries, keys and values, let the heads attend, project back."""

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        C, H, K, D, bias = config.width, config.heads, config.kv_heads, config.head_width, config.bias
        self.q_proj, self.k_proj = nn.Linear(C, H * D, bias=bias), nn.Linear(C, K * D, bias=bias)
        self.v_proj, self.o_proj = nn.Linear(C, K * D, bias=bias), nn.Linear(H * D, C, bias=bias)
        self.q_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()

    def project(self, x, turn):
        """Return queries (B, H, T, D), keys and values (B, K, T, D) of x (B, T, C)."""
        q, k, v = (layer(x).unflatten(-1, (-1, self.config.head_width)).transpose(1, 2)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q), self.k_norm(k)
        return (q, k, v) if turn is None else (rotate(q, *turn), rotate(k, *turn), v)

    def forward(self, x, turn, documents, cache):
        q, k, v = self.project(x, turn)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)                                                # (B, K, S, D)
        y = attention(q, k, v, self.config.attention, documents)                                 # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).flatten(2))                                         # (B, T, C)


class Block(nn.Module):
    """One layer: gather (attention), then think (MLP); each adds to the residual stream."""

    def __init__(self, config, layer):
        super().__init__()
        norm = NORMS[config.norm]
        self.input_layernorm = norm(config.width, config.norm_eps, bias=config.bias)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = norm(config.width, config.norm_eps, bias=config.bias)
        self.mlp = MLPS[config.mlp](config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, turn, documents, cache):
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), turn, documents, cache))    # (B, T, C)
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))                      # (B, T, C)


class GPT(nn.Module):
    """The whole model: model(ids) gives logits (B, T, V)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.embed_places = nn.Embedding(config.context, config.width) if config.positions == "learned" else None
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = NORMS[config.norm](config.width, config.norm_eps, bias=config.bias)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.apply(self._initialise)
        for block in self.layers:                # 2 L terms add up in the stream: start each of them small
            for layer in (block.self_attn.o_proj, block.mlp.down_proj):
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * config.layers))
        if config.tied:
            self.lm_head.weight = self.embed_tokens.weight

    @staticmethod
    def _initialise(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)           # small: all tokens about equally likely at first
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, ids, documents=None, cache=None):
        """Return logits (B, T, V) for ids (B, T); with a cache, ids are the next T after those in it."""
        past = cache.length if cache is not None else 0
        if past + ids.shape[1] > self.config.context:
            raise CourseError(f"{past + ids.shape[1]} tokens do not fit the context of {self.config.context}")
        places = torch.arange(past, past + ids.shape[1], device=ids.device)
        x = self.embed_tokens(ids)                             # (B, T) -> (B, T, C)
        if self.embed_places is not None:
            x = x + self.embed_places(places)                  # (T, C) is added to every sequence
        x = self.dropout(x)
        turn = rope_angles(self.config, places) if self.config.positions == "rope" else None
        for block in self.layers:
            x = block(x, turn, documents, cache)
        if cache is not None:
            cache.length += ids.shape[1]
        return self.lm_head(self.norm(x))                      # (B, T, C) -> (B, T, V)


# ---- safetensors: 8 bytes N, N bytes of JSON, then the numbers -----------------------------------

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "U8": torch.uint8}
LONGEST_HEADER = 100_000_000


def write_safetensors(path, tensors):
    """Write {name: tensor} as one safetensors file, or leave the old one as it was."""
    spelled, header, offset = {dtype: name for name, dtype in DTYPES.items()}, {"__metadata__": {"format": "pt"}}, 0
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": spelled[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                            # numbers start at a multiple of 8
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)        # "<Q": unsigned 64 bits, little end first
        for tensor in tensors.values():
            file.write(tensor.reshape(-1).view(torch.uint8).numpy())


def read_safetensors(path):
    """Return {name: tensor} of a safetensors file. Raises CourseError for anything out of place."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
        if length > min(LONGEST_HEADER, size - 8):
            raise CourseError(f"{path}: a header of {length:,} bytes in a file of {size:,}: truncated or no safetensors")
        try:
            header = json.loads(file.read(length))
            extra = header.pop("__metadata__", {})
            entries = sorted((*entry["data_offsets"], name, DTYPES[entry["dtype"]], entry["shape"])
                             for name, entry in header.items())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CourseError(f"{path}: the header is damaged ({error!r})") from None
        if not all(isinstance(value, str) for value in extra.values()):
            raise CourseError(f"{path}: __metadata__ must hold strings only")
        tensors, expected = {}, 0
        for begin, end, name, dtype, shape in entries:
            if begin != expected or end - begin != math.prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
                raise CourseError(f"{path}: {name} {shape} lies at {begin}..{end}, expected to start at {expected}")
            if 8 + length + end > size:
                raise CourseError(f"{path}: {name} ends at byte {8 + length + end:,} of {size:,}: truncated")
            tensors[name] = torch.frombuffer(bytearray(file.read(end - begin)), dtype=dtype).reshape(shape)
            expected = end
        if 8 + length + expected != size:
            raise CourseError(f"{path}: {size - 8 - length - expected:,} bytes after the last tensor")
    return tensors


# ---- Folders of the ecosystem: config.json and model.safetensors ---------------------------------

LLAMA_FIELDS = {"vocab_size": "vocab_size", "max_position_embeddings": "context", "num_hidden_layers": "layers",
                "num_attention_heads": "heads", "num_key_value_heads": "kv_heads", "hidden_size": "width",
                "head_dim": "head_width", "intermediate_size": "hidden", "rms_norm_eps": "norm_eps",
                "tie_word_embeddings": "tied", "rope_theta": "rope_theta"}
GPT2_FIELDS = {"vocab_size": "vocab_size", "n_positions": "context", "n_layer": "layers", "n_head": "heads",
               "n_embd": "width", "layer_norm_epsilon": "norm_eps", "tie_word_embeddings": "tied", "n_inner": "hidden"}
GPT2_NAMES = {"embed_tokens": "wte", "embed_places": "wpe", "norm": "ln_f", "input_layernorm": "ln_1",
              "post_attention_layernorm": "ln_2", "self_attn": "attn", "q_proj": "c_attn", "k_proj": "c_attn",
              "v_proj": "c_attn", "o_proj": "c_proj", "up_proj": "c_fc", "down_proj": "c_proj", "layers": "h"}


def family_of(config):
    """Return which family of transformers can express a config: gpt2, llama, qwen3 or, if none, course."""
    shape = (config.norm, config.positions, config.mlp, config.bias)
    if shape == ("layer", "learned", "gelu", True) and not config.qk_norm and config.kv_heads == config.heads \
            and config.head_width * config.heads == config.width:
        return "gpt2"
    if shape == ("rms", "rope", "swiglu", False):
        return "qwen3" if config.qk_norm else "llama"
    return "course"


def config_json(config):
    """Return what config.json holds for a config."""
    family, data = family_of(config), {"model_type": family_of(config), "dtype": "float32"}
    if family == "gpt2":
        data.update({theirs: getattr(config, ours) for theirs, ours in GPT2_FIELDS.items()}, n_ctx=config.context,
                    architectures=["GPT2LMHeadModel"], activation_function="gelu_new", resid_pdrop=config.dropout,
                    embd_pdrop=config.dropout, attn_pdrop=0.0)
    elif family == "course":
        data.update(asdict(config))
    else:
        data.update({theirs: getattr(config, ours) for theirs, ours in LLAMA_FIELDS.items()}, hidden_act="silu",
                    architectures=["Qwen3ForCausalLM" if family == "qwen3" else "LlamaForCausalLM"],
                    rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                    attention_bias=False, mlp_bias=False, attention_dropout=0.0, resid_pdrop=config.dropout)
    return data


def config_from_json(data):
    """Return the GPTConfig of a config.json. Raises CourseError naming a setting that is not supported."""
    family = data.get("model_type")
    rope = data.get("rope_parameters") or {}
    refused = {"rope_scaling": data.get("rope_scaling"), "rope_type": rope.get("rope_type", "default") != "default",
               "sliding window": data.get("use_sliding_window") or (data.get("sliding_window") and family != "qwen3"),
               "attention_bias": data.get("attention_bias"), "mlp_bias": data.get("mlp_bias"),
               "quantization_config": data.get("quantization_config"),
               "hidden_act": family in ("llama", "qwen3") and data.get("hidden_act", "silu") != "silu",
               "activation_function": family == "gpt2" and data.get("activation_function", "gelu_new")
               not in ("gelu_new", "gelu_pytorch_tanh"),
               "scale_attn_by_inverse_layer_idx": data.get("scale_attn_by_inverse_layer_idx"),
               "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) != 1.0}
    refused = [f"{name} {data.get(name, '')}" for name, found in refused.items() if found]
    if family not in ("gpt2", "llama", "qwen3", "course") or refused:
        raise CourseError(f"model_type {family!r} with {', '.join(refused) or 'its settings'} is not supported")
    if family == "course":
        return GPTConfig(**{name: data[name] for name in asdict(GPTConfig())})
    if family == "gpt2":
        kinds = dict(GPT2, **{ours: data[theirs] for theirs, ours in GPT2_FIELDS.items() if data.get(theirs) is not None})
        return GPTConfig(**kinds, dropout=data.get("resid_pdrop", 0.0))
    defaults = {"tie_word_embeddings": False, "rope_theta": rope.get("rope_theta", 10000.0)}
    values = {ours: data.get(theirs, defaults.get(theirs)) for theirs, ours in LLAMA_FIELDS.items()}
    values = {name: value for name, value in values.items() if value is not None}
    return GPTConfig(**values, qk_norm=family == "qwen3", dropout=data.get("resid_pdrop", 0.0))


def gpt2_name(name):
    """Return GPT-2's name of one of our tensors, and whether GPT-2 stores it as [in, out]."""
    theirs = ".".join(GPT2_NAMES.get(part, part) for part in name.split("."))
    return theirs, theirs.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def to_family(state, config):
    """Return our tensors as the family stores them: Llama as we do, GPT-2 turned, with q, k, v in one."""
    state = {name: tensor for name, tensor in state.items() if not (config.tied and name == "lm_head.weight")}
    if family_of(config) != "gpt2":
        return {name if name == "lm_head.weight" else "model." + name: tensor for name, tensor in state.items()}
    joined = {}
    for name, tensor in state.items():
        theirs, turned = gpt2_name(name)
        joined.setdefault(theirs if name == "lm_head.weight" else "transformer." + theirs, []).append(
            tensor.T if turned else tensor)
    return {name: torch.cat(parts, dim=-1) for name, parts in joined.items()}


def from_family(found, name, config):
    """Return our tensor `name` out of what a family's file holds; the inverse of to_family."""
    if config.tied and name == "lm_head.weight":
        name = "embed_tokens.weight"
    if family_of(config) != "gpt2":
        return found[name if name == "lm_head.weight" else "model." + name]
    theirs, turned = gpt2_name(name)
    tensor = found[theirs if name == "lm_head.weight" else "transformer." + theirs]
    if ".c_attn." in theirs:
        tensor = tensor.chunk(3, dim=-1)["qkv".index(name.split(".")[-2][0])]
    return tensor.T if turned else tensor


def save(model, folder):
    """Write config.json and model.safetensors, which transformers and vLLM open. Returns the family."""
    write_safetensors(Path(folder) / "model.safetensors", to_family(model.state_dict(), model.config))
    write_json(Path(folder) / "config.json", config_json(model.config))
    return family_of(model.config)


def load(folder):
    """Open a folder of the GPT-2, Llama or Qwen3 family. Raises CourseError naming what does not fit."""
    folder = Path(folder)
    config = config_from_json(read_json(folder / "config.json", "04_train.py"))
    index = folder / "model.safetensors.index.json"
    files = sorted(set(read_json(index, "")["weight_map"].values())) if index.exists() else ["model.safetensors"]
    found = {}
    for file in files:
        found.update(read_safetensors(folder / file))
    if family_of(config) == "gpt2":                             # old files lack the prefix and hold the mask
        found = {name if name.startswith(("transformer.", "lm_head.")) else "transformer." + name: tensor
                 for name, tensor in found.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}
    if config.tied:
        found.pop("lm_head.weight", None)
    model = GPT(config)
    expected = to_family(model.state_dict(), config)
    wrong = [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{name} is unexpected" for name in found if name not in expected]
    wrong += [f"{name} is {list(found[name].shape)}, not {list(tensor.shape)}" for name, tensor in expected.items()
              if name in found and found[name].shape != tensor.shape]
    if wrong:
        raise CourseError(f"{folder}: {len(wrong)} tensors do not fit: {'; '.join(wrong[:5])}")
    model.load_state_dict({name: from_family(found, name, config) for name in model.state_dict()})
    return model


GPT.save, GPT.load = save, staticmethod(load)                   # model.save(folder), GPT.load(folder)


# ---- The script ----------------------------------------------------------------------------------

def flops_per_token(config, parameters):
    """Return floating-point operations to train on one token: 6 a weight, and attention's products."""
    weights = parameters - config.context * config.width * (config.positions == "learned")
    weights += 0 if config.tied else -config.vocab_size * config.width      # looking a row up costs nothing
    return 6 * weights + 12 * config.layers * config.heads * config.head_width * config.context // 2


def draw_rope(config, path):
    """Draw how RoPE turns distance into phase, and what that does to a query and a key alike."""
    import_module("matplotlib").use("Agg")
    pyplot = import_module("matplotlib.pyplot")
    places = torch.arange(config.context)
    cos, sin = rope_angles(config, places)
    figure, (waves, decay) = pyplot.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    for pair in range(0, config.head_width // 2, max(1, config.head_width // 8)):
        waves.plot(places, cos[:, pair], label=f"pair {pair}")
    waves.set(xlabel="place", ylabel="cosine of the angle", title="each pair turns at its own speed")
    waves.legend(fontsize=8)
    ones = torch.ones(config.context, config.head_width)
    decay.plot(places, rotate(ones, cos, sin) @ rotate(ones, cos, sin)[0] / config.head_width, color="#0072b2")
    decay.set(xlabel="distance", ylabel="query · key", title="equal query and key, at a distance")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


@dataclass
class Config:
    preset: str = "small"  # small, gpu, gpt2, gpt2-medium, gpt2-large, gpt2-xl, modern-124m, modern-350m
    out: str = "out"  # root folder of the course
    seed: int = 1  # of the random weights


def main(config):
    """Show a model's parts, its first loss, and that it does not see the future."""
    if config.preset not in PRESETS:
        raise CourseError(f"--preset {config.preset}: choose one of {', '.join(PRESETS)}")
    torch.manual_seed(config.seed)
    model = GPT(GPTConfig(**PRESETS[config.preset])).eval()
    shape, total = model.config, sum(p.numel() for p in model.parameters())
    print(shape)
    for name, parameter in model.named_parameters():
        if ".0." in name or "layers" not in name:
            times = f"x {shape.layers}" if ".0." in name else ""
            print(f"  {name:42} {str(list(parameter.shape)):16} {parameter.numel():12,} {times}")
    print(f"{total:,} parameters, {flops_per_token(shape, total) / 1e6:.1f} MFLOP to train on a token")
    ids = torch.randint(shape.vocab_size, (4, min(shape.context, 256)))
    with torch.no_grad():
        logits = model(ids[:, :-1])                             # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
        changed = ids[:, :-1].clone()
        changed[:, 100] = (changed[:, 100] + 1) % shape.vocab_size
        differs = (model(changed) - logits).abs().amax(dim=(0, 2)) > 0
    print(f"first loss {loss:.3f}; a guess among {shape.vocab_size:,} tokens costs ln({shape.vocab_size}) = "
          f"{math.log(shape.vocab_size):.3f}")
    print(f"token 100 changed: logits before it that differ {int(differs[:100].sum())}, from it on {int(differs[100:].sum())}"
          f" of {len(differs) - 100}")
    if shape.positions == "rope":
        draw_rope(shape, Path(config.out) / "rope.png")
    print("next: python 04_train.py")


if __name__ == "__main__":
    chapter1.run(main, Config, __doc__)
