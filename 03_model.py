"""Chapter 3 · The model: a GPT with attention by hand, able to open GPT-2, Llama and Qwen3 weights.

Tokens go in, and for every position a score comes out for each token that could be next. In between stands a
stack of equal blocks. In each, attention matches the query of a place with the keys of those before it and gathers
their values, and the MLP, a small network, thinks about them. Both only add to a running sum, the residual stream x.

    ids (B, T) -> embed -> x (B, T, C) ->+-----------------------+->+-----------------+-> ... -> norm
                                         |                       ^  |                 ^           |
                                         +-> norm -> attention --+  +-> norm -> MLP --+         head
    GPT-2 (2019)  LayerNorm  learned places  GELU    biases                                       |
    today         RMSNorm    RoPE            SwiGLU  QK-norm, grouped heads         logits (B, T, V)

Run:    python 03_model.py    prints the parts, what they cost and the first loss, draws out/rope.png
Source: Vaswani 2017 (attention), Radford 2019 (GPT-2), Su 2021 (RoPE), Shazeer 2020 (SwiGLU), Ainslie 2023 (heads)
"""
import json
import math
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

chapter1 = import_module("01_tokenizer")
CourseError, replacing = chapter1.CourseError, chapter1.replacing

# Legend: B sequences, T places that ask, S places seen (T and the cached); the numbers V, C, H, K, D, F: see GPTConfig


@dataclass
class GPTConfig:
    """The shape of a model. Raises CourseError for values that cannot work together."""
    vocab_size: int = 4096  # V, the ids it knows
    context: int = 256  # the most tokens it can look at; more costs memory and time (longer texts: `window_start`)
    layers: int = 4  # blocks (attention and MLP) on top of each other: more steps of thought
    heads: int = 4  # H, questions asked at once by a place
    kv_heads: int = 0  # K, heads with keys and values of their own, shared by H / K questions (0: H)
    width: int = 256  # C, numbers by which a token is described: the width of the residual stream
    head_width: int = 0  # D, numbers in one question (0: C / H)
    hidden: int = 0  # F, hidden width of the MLP (0: 4 C for GELU, 8/3 C for SwiGLU)
    layernorm: bool = False  # LayerNorm, which also centres x, in place of RMSNorm
    learned_places: bool = False  # a learned vector per place, in place of RoPE
    gelu: bool = False  # an MLP that bends each number by itself, in place of SwiGLU's gate
    bias: bool = False  # add a learned constant in linear and LayerNorm layers
    qk_norm: bool = True  # normalise queries and keys, which keeps attention from saturating
    tied: bool = True  # use the embedding matrix as the head as well
    dropout: float = 0.0  # share of activations set to zero in training, against overfitting
    rope_theta: float = 10000.0  # RoPE's slowest pair turns once in nearly 2 pi times as many places
    norm_eps: float = 1e-6  # keeps the norms from dividing by zero
    attention: str = "auto"  # formula, blocks, fused, or auto: see `attention`

    def __post_init__(self):
        self.kv_heads = self.kv_heads or self.heads
        self.head_width = self.head_width or self.width // max(1, self.heads)
        self.hidden = self.hidden or (4 * self.width if self.gelu else (self.width * 8 // 3 + 63) // 64 * 64)
        rules = {
            "every size must be at least 1": min(size for size in vars(self).values() if type(size) is int) > 0,
            "width must be a multiple of heads": self.width % (self.heads or 1) == 0,
            "heads must be a multiple of kv_heads": self.heads % (self.kv_heads or 1) == 0,
            "head_width must be even, as RoPE turns pairs": self.learned_places or self.head_width % 2 == 0,
            "dropout must be at least 0 and below 1": 0 <= self.dropout < 1,
            "attention must be auto, formula, blocks or fused": self.attention in "auto formula blocks fused".split()}
        if not all(rules.values()):
            raise CourseError(f"{', '.join(rule for rule, holds in rules.items() if not holds)}: {self}")


GPT2 = dict(layernorm=True, learned_places=True, gelu=True, bias=True, qk_norm=False)
PRESETS = {  # small: 4 million parameters, for two CPU cores; gpu: 12 million; gpt2: 124 million, exactly GPT-2
    "small": dict(), "gpu": dict(layers=6, heads=6, width=384, dropout=0.2),
    "modern-124m": dict(vocab_size=50304, context=1024, layers=12, heads=12, width=768),
    **{f"gpt2{size}": dict(GPT2, vocab_size=50257, context=1024, norm_eps=1e-5, layers=L, heads=H, width=64 * H)
       for size, L, H in (("", 12, 12), ("-medium", 24, 16), ("-large", 36, 20), ("-xl", 48, 25))}}


# ---- Attention, and where a token stands ---------------------------------------------------------
def attention_formula(q, k, v, visible):
    """Average v by how well q fits k: q (B, H, T, D), k, v (B, H, S, D); visible: bool, (T, S) or (B, 1, T, S)."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)   # -> (B, H, T, S); over sqrt(D): large scores have one winner
    scores = scores.masked_fill(~visible, float("-inf"))       # exp(-inf) is 0: no weight on the future
    weights = scores.softmax(dim=-1)                           # each row sums to 1
    return weights @ v                                         # (B, H, T, S) @ (B, H, S, D) -> (B, H, T, D)


def attention(q, k, v, kind="auto", documents=None, block=128):
    """Causal attention of queries q (B, H, T, D) over keys and values (B, K, S, D) -> (B, H, T, D).

    The T queries stand at the last T of the S places. With `documents` (B, S), a number per text,
    each sees its own text only. kind:
      formula  the definition: half of what it computes is masked away again
      blocks   the definition for `block` queries at a time, each against only the keys they may see
      fused    torch's own kernel, for comparison; with a cache or documents, blocks
      auto     formula up to 256 keys, where one large product is the fastest, else blocks
    """
    T, S, groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k, v))    # (B, K, S, D) -> (B, H, S, D)
    if kind == "fused" and T == S and documents is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    rows = T if kind == "formula" or (kind == "auto" and S <= 256) else block
    places, parts = torch.arange(S, device=q.device), []
    for i in range(0, T, rows):
        asks, seen = slice(i, i + rows), slice(S - T + i + rows)                 # who asks, who may be seen
        visible = places[seen] <= places[S - T:][asks, None]   # (T, S), here and below of one block
        if documents is not None:                              # (T, S) -> (B, 1, T, S)
            visible = visible & (documents[:, None, S - T:][..., asks, None] == documents[:, None, None, seen])
        parts.append(attention_formula(q[:, :, asks], k[:, :, seen], v[:, :, seen], visible))
    return torch.cat(parts, dim=2)                             # (B, H, T, D)


def rope_angles(config, places):
    """Return cos and sin, each (T, D), of the angles by which RoPE turns the D / 2 pairs of numbers at each place."""
    pairs = torch.arange(0, config.head_width, 2, device=places.device) / config.head_width      # (D / 2)
    angles = (places[:, None] / config.rope_theta ** pairs).repeat(1, 2)         # (T, D), fast to hardly turning at all
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn the pairs (x[i], x[i + D / 2]) of queries or keys (B, H, T, D): their product then tells their distance."""
    first, second = x.chunk(2, dim=-1)                         # (B, H, T, D) -> twice (B, H, T, D / 2)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).type_as(x)


def window_start(length, context):
    """Return where the view of a text begins: past the context it moves on by half, so a cache is built anew seldom.
    >>> [window_start(length, 8) for length in (1, 8, 9, 12, 13)]
    [0, 0, 4, 4, 8]
    """
    half = max(1, context // 2)
    return max(0, -(-(length - context) // half) * half)       # -(-a // b) rounds up


# ---- The model: its parts bear the names that Llama's have in transformers -----------------------
class KVCache:
    """The keys and values of the `length` positions read so far: (2, layers, B, K, context, D)."""

    def __init__(self, config, batch, device=None, dtype=torch.float32):
        shape = (2, config.layers, batch, config.kv_heads, config.context, config.head_width)
        self.pairs, self.length = torch.zeros(shape, device=device, dtype=dtype), 0

    def append(self, layer, k, v):
        """Add k and v (B, K, T, D) of one layer; return all of them, (B, K, S, D) each."""
        end = self.length + k.shape[2]
        self.pairs[:, layer, :, :, self.length:end] = torch.stack((k, v))
        return self.pairs[:, layer, :, :, :end].type_as(k)

    def select(self, rows):
        """Keep, drop or repeat sequences: row i of the new batch is row rows[i] of the old."""
        self.pairs = self.pairs[:, :, rows]


class RMSNorm(nn.RMSNorm):
    """Scale x to unit root mean square, in float32, then by a learned weight."""

    def forward(self, x):
        scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return scaled.type_as(x) * self.weight


class Attention(nn.Module):
    """Project x to queries, keys and values, let the heads attend, project back."""
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        C, H, K, D, bias = config.width, config.heads, config.kv_heads, config.head_width, config.bias
        self.q_proj, self.k_proj = nn.Linear(C, H * D, bias=bias), nn.Linear(C, K * D, bias=bias)
        self.v_proj, self.o_proj = nn.Linear(C, K * D, bias=bias), nn.Linear(H * D, C, bias=bias)
        self.q_norm, self.k_norm = (RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity() for _ in "qk")

    def project(self, x, turn):
        """Return queries (B, H, T, D), keys and values (B, K, T, D) of x (B, T, C)."""
        q, k, v = (linear(x).unflatten(-1, (-1, self.config.head_width)).transpose(1, 2)
                   for linear in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q), self.k_norm(k)
        return (q, k, v) if turn is None else (rotate(q, *turn), rotate(k, *turn), v)

    def forward(self, x, turn, documents, cache):
        q, k, v = self.project(x, turn)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)              # (B, K, T, D) -> (B, K, S, D)
        y = attention(q, k, v, self.config.attention, documents)
        return self.o_proj(y.transpose(1, 2).flatten(2))       # (B, H, T, D) -> (B, T, H D) -> (B, T, C)


class MLP(nn.Module):
    """Up, bend, down. SwiGLU has a third matrix, the gate, which decides how much of each number gets through."""
    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.width, config.hidden, bias=config.bias)
        self.gate_proj = None if config.gelu else nn.Linear(config.width, config.hidden, bias=config.bias)
        self.down_proj = nn.Linear(config.hidden, config.width, bias=config.bias)

    def forward(self, x):
        up = self.up_proj(x)                                   # (B, T, C) -> (B, T, F)
        up = F.silu(self.gate_proj(x)) * up if self.gate_proj else F.gelu(up, approximate="tanh")
        return self.down_proj(up)                              # (B, T, F) -> (B, T, C)


class GPT(nn.Module):
    """The whole model: model(ids) gives logits (B, T, V). Its `save` and `load` stand below."""
    def __init__(self, config):
        super().__init__()
        C, eps, self.config = config.width, config.norm_eps, config
        norm = lambda: nn.LayerNorm(C, eps, bias=config.bias) if config.layernorm else RMSNorm(C, eps)
        self.embed_tokens = nn.Embedding(config.vocab_size, C)
        self.embed_places = nn.Embedding(config.context, C) if config.learned_places else None
        self.layers = nn.ModuleList(nn.ModuleDict({
            "input_layernorm": norm(), "self_attn": Attention(config, layer),
            "post_attention_layernorm": norm(), "mlp": MLP(config)}) for layer in range(config.layers))
        self.norm, self.dropout = norm(), nn.Dropout(config.dropout)
        self.lm_head = None if config.tied else nn.Linear(C, config.vocab_size, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:                 # small, so that all tokens are about equally likely at first,
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))    # smaller where 2 * layers terms add up
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.layers if adds else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, ids, documents=None, cache=None):
        """Return logits (B, T, V) for ids (B, T), the next T after those in the cache; documents: (B, S)."""
        past = cache.length if cache is not None else 0
        if past + ids.shape[1] > self.config.context:
            raise CourseError(f"{past + ids.shape[1]} tokens do not fit the context of {self.config.context}")
        places = torch.arange(past, past + ids.shape[1], device=ids.device)                      # (T)
        turn = None if self.config.learned_places else rope_angles(self.config, places)
        x = self.embed_tokens(ids)                             # (B, T) -> (B, T, C)
        x = self.dropout(x + self.embed_places(places) if self.config.learned_places else x)
        for block in self.layers:                              # gather, think: (B, T, C) -> (B, T, C)
            x = x + self.dropout(block.self_attn(block.input_layernorm(x), turn, documents, cache))
            x = x + self.dropout(block.mlp(block.post_attention_layernorm(x)))
        if cache is not None:
            cache.length += ids.shape[1]
        return F.linear(self.norm(x), (self.lm_head or self.embed_tokens).weight)               # (B, T, C) -> (B, T, V)


# ---- Folders for transformers: config.json; model.safetensors: 8 bytes N, N bytes of JSON, the numbers
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8, "BOOL": torch.bool}
FAMILIES = {  # model_type: its class in transformers, and what all its models have in common
    "gpt2": ("GPT2LMHeadModel", GPT2), "llama": ("LlamaForCausalLM", dict.fromkeys(GPT2, False)),
    "qwen3": ("Qwen3ForCausalLM", {**dict.fromkeys(GPT2, False), "qk_norm": True}), "course": ("GPT", {})}
SETTINGS = {  # ours: Llama's and, where it differs, GPT-2's. A file holds both, each reader takes its own
    "vocab_size": ["vocab_size"], "context": ["max_position_embeddings", "n_positions"], "rope_theta": ["rope_theta"],
    "layers": ["num_hidden_layers", "n_layer"], "heads": ["num_attention_heads", "n_head"], "head_width": ["head_dim"],
    "kv_heads": ["num_key_value_heads"], "width": ["hidden_size", "n_embd"], "hidden": ["intermediate_size", "n_inner"],
    "norm_eps": ["rms_norm_eps", "layer_norm_epsilon"], "tied": ["tie_word_embeddings"], "dropout": ["resid_pdrop"]}
ACCEPTED = {  # other settings: the values that we can honour, of which the first is written
    "hidden_act": ["silu"], "activation_function": ["gelu_new", "gelu_pytorch_tanh"], "scale_attn_weights": [True],
    "rope_type": ["default"], "attention_bias": [False], "use_sliding_window": [False], "quantization_config": [],
    "rope_scaling": [], "mlp_bias": [False], "scale_attn_by_inverse_layer_idx": [False], "model_type": [*FAMILIES]}
GPT2_NAMES = {"embed_tokens": "wte", "embed_places": "wpe", "norm": "ln_f", "input_layernorm": "ln_1", "layers": "h",
              "post_attention_layernorm": "ln_2", "self_attn": "attn", "q_proj": "c_attn", "k_proj": "c_attn",
              "v_proj": "c_attn", "o_proj": "c_proj", "up_proj": "c_fc", "down_proj": "c_proj"}


def read_safetensors(path):
    """Return {name: tensor} of a safetensors file. Raises CourseError for anything out of place."""
    tensors, begin, size = {}, 0, path.stat().st_size
    try:                                                       # mapped, not read: a header cannot ask for memory
        data = torch.from_file(str(path), size=size, dtype=torch.uint8)
        start = 8 + int.from_bytes(data[:8].numpy().tobytes(), "little")
        text = data[8:min(start, 100_000_000)].numpy().tobytes()
        header = json.loads(text)
        plain = all(isinstance(value, str) for value in header.pop("__metadata__", {}).values())
        if not plain or text.count(b'"data_offsets"') != len(header):
            raise ValueError("__metadata__ holds more than strings, or a name occurs twice")
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, place = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            end = begin + dtype.itemsize * math.prod(shape)
            if str(place) != f"[{begin}, {end}]" or not begin <= end <= size - start:
                raise ValueError(f"{name!r} {shape} should be at [{begin}, {end}] of {size - start}, not at {place}")
            tensors[name], begin = data[start + begin:start + end].clone().view(dtype).reshape(shape), end
        if start + begin != size:
            raise ValueError(f"{size - start - begin:,} bytes after the last tensor")
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:    # RuntimeError: shape, depth
        raise CourseError(f"{path} is damaged: {type(error).__name__}: {str(error)[:300]}") from None
    return tensors


def family_of(config):
    """Return the model_type under which transformers can open a config, or "course"."""
    plain = config.kv_heads == config.heads and config.heads * config.head_width == config.width
    return next(family for family, (_, kinds) in FAMILIES.items()
                if kinds.items() <= vars(config).items() and (plain or family != "gpt2"))


def family_tensors(model):
    """Return {name in the family's file: [views of our parameters, side by side in it]}. Llama's names are ours."""
    tensors, gpt2 = {}, family_of(model.config) == "gpt2"
    for name, parameter in model.named_parameters():
        view, prefix = parameter.detach(), "" if name == "lm_head.weight" else "transformer." if gpt2 else "model."
        if gpt2:                                               # matrices are (in, out); q, k and v are joined
            name = ".".join(GPT2_NAMES.get(part, part) for part in name.split("."))
            view = view.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else view
        tensors.setdefault(prefix + name, []).append(view)
    return tensors


def save(model, folder):
    """Write config.json and model.safetensors (float32) for transformers and vLLM. Returns the family."""
    config, family = model.config, family_of(model.config)
    data = {name: values[0] for name, values in ACCEPTED.items() if values}
    data |= {name: getattr(config, ours) for ours, names in SETTINGS.items() for name in names}
    data |= {kind: getattr(config, kind) for kind in GPT2} if family == "course" else {}
    data |= {"model_type": family, "architectures": [FAMILIES[family][0]], "dtype": "float32", "bos_token_id": None,
             "eos_token_id": None, "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}
    tensors = {name: torch.cat(views, dim=-1).float() for name, views in family_tensors(model).items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end := end + tensor.nbytes]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                            # the numbers start at a multiple of 8
    with replacing(Path(folder) / "model.safetensors") as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.cpu().contiguous().numpy())
    chapter1.write_json(Path(folder) / "config.json", data)
    if family == "course":
        print(f"{folder}: no model of transformers has these parts together; GPT.load of this course opens it")
    return family


def load(folder):
    """Open a folder of the GPT-2, Llama or Qwen3 family. Raises CourseError naming all that does not fit."""
    folder, data = Path(folder), chapter1.read_json(Path(folder) / "config.json", "04_train.py or 06_finetune.py")
    try:                                                       # 1. The config
        rope = data.get("rope_parameters") or {}
        data = {name: value for name, value in {**data, **rope}.items() if value is not None}
        odd = [f"{name} {value!r}" for name, value in data.items() if name in {**rope, **ACCEPTED}
               and name != "rope_theta" and value not in ACCEPTED.get(name, [])]
        odd += [f"no {' or '.join(SETTINGS[ours])}" for ours in ("heads", "context") if not {*SETTINGS[ours]} & {*data}]
        if odd:
            raise CourseError(f"not supported: {', '.join(odd)}")
        kinds = FAMILIES[data["model_type"]][1] or {kind: data[kind] for kind in GPT2}
        sizes = {ours: data[name] for ours, names in SETTINGS.items() for name in names if name in data}
        config = GPTConfig(**{"tied": kinds is GPT2, **sizes, **kinds})
        with torch.device("meta"):                             # shapes without numbers
            model = GPT(config)
    except (CourseError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CourseError(f"{folder / 'config.json'}: {error if type(error) is CourseError else repr(error)}") from None
    # 2. The tensors, in one file or several. Some files lack the prefix, old ones hold the mask too.
    prefix = "transformer." if kinds is GPT2 else "model."
    ignored = (".attn.bias", ".attn.masked_bias") + ("lm_head.weight",) * config.tied
    found = {name if name.startswith((prefix, "lm_head")) else prefix + name: tensor
             for file in sorted(folder.glob("model*.safetensors"))
             for name, tensor in read_safetensors(file).items() if not name.endswith(ignored)}
    have = {name: list(tensor.shape) for name, tensor in found.items()}
    want = {name: list(torch.cat(views, dim=-1).shape) for name, views in family_tensors(model).items()}
    wrong = [f"{name} is {have.get(name, 'missing')}, not {want.get(name, 'expected')}"
             for name in sorted({**want, **have}) if have.get(name) != want.get(name)]
    if wrong:
        raise CourseError(f"{folder}: {len(wrong)} tensors do not fit: {'; '.join(wrong[:5])}")
    for name, views in family_tensors(model.to_empty(device="cpu")).items():                     # 3. The copy
        for view, part in zip(views, found[name].chunk(len(views), dim=-1)):
            view.copy_(part)                                   # whatever its dtype was, it is float32 now
    return model


GPT.save, GPT.load = save, staticmethod(load)                   # model.save(folder), GPT.load(folder)


# ---- The script ----------------------------------------------------------------------------------
@dataclass
class Config:
    preset: str = "small"  # small, gpu, modern-124m, gpt2, gpt2-medium, gpt2-large or gpt2-xl
    out: str = "out"  # root folder of the course


def main(config):
    """Show parts and cost; of a copy with 2 layers the first loss, and that it sees no later token; draw RoPE."""
    if config.preset not in PRESETS:
        raise CourseError(f"--preset {config.preset}: choose one of {', '.join(PRESETS)}")
    shape = GPTConfig(**PRESETS[config.preset])
    with torch.device("meta"):                                 # shapes without numbers
        parts = dict(GPT(shape).named_parameters())
    for name, part in parts.items():
        if ".0." in name or "layers." not in name:
            print(f"{name:42} {str(list(part.shape)):14} {part.numel():12,}", f"x {shape.layers}" * (".0." in name))
    multiplied = shape.vocab_size * shape.width + sum(part.numel() for name, part in parts.items() if "proj" in name)
    flops = 6 * (multiplied + shape.layers * shape.heads * shape.head_width * shape.context)
    print(f"{sum(part.numel() for part in parts.values()):,} parameters, {flops / 1e6:,.1f} MFLOP to train on a token")
    model, ids = GPT(replace(shape, layers=2, dropout=0.0)), torch.randint(shape.vocab_size, (8, 128))       # (B, T)
    with torch.no_grad():                                      # the same first half, another second half
        logits, other = model(ids), model(torch.cat((ids[:, :64], ids.flip(0)[:, 64:]), dim=1))    # (B, T, V) each
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    print(f"first loss {loss:.2f} (2 layers); a guess among {shape.vocab_size:,} tokens: {math.log(shape.vocab_size):.2f}")
    changed = [(part - before).abs().max().item() for part, before in zip(other.split(64, 1), logits.split(64, 1))]
    print(f"another second half changes logits by {changed[0]:.0e} in the first half, {changed[1]:.0e} in the second")
    cosines = rope_angles(shape, torch.arange(shape.context))[0][:, :shape.head_width // 2]      # (T, D / 2)
    axis = Figure(figsize=(9, 3.5), layout="constrained").add_subplot(
        xlabel="distance", ylabel="cosine", title="RoPE: each pair turns at its own speed; black: their mean")
    axis.plot(cosines[:, ::max(1, shape.head_width // 8)], linewidth=1)
    axis.plot(cosines.mean(dim=1), "k")
    with replacing(Path(config.out) / "rope.png") as temporary:
        axis.figure.savefig(temporary, dpi=120)
    print(f"drew {Path(config.out) / 'rope.png'}; next: python 04_train.py")


if __name__ == "__main__":
    chapter1.run(main, Config, __doc__)
