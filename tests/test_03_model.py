"""Chapter 3: attention against its definition, the model against literal re-statements, files against hostile ones."""
import doctest
import json
import math
import os
import subprocess
import sys
from importlib import import_module
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

chapter1, chapter3 = map(import_module, ("01_tokenizer", "03_model"))
CourseError, GPT, GPTConfig, GPT2 = chapter1.CourseError, chapter3.GPT, chapter3.GPTConfig, chapter3.GPT2
SCRIPT = Path(chapter3.__file__)

TINY = dict(vocab_size=97, context=24, layers=2, heads=4, width=32)
SHAPES = {
    "gpt2": dict(TINY, **GPT2, norm_eps=1e-5),
    "llama": dict(TINY, qk_norm=False, kv_heads=2, tied=False, rope_theta=5000.0),
    "qwen3": dict(TINY, kv_heads=2, head_width=6),                            # D is not C / H
    "course": dict(TINY, layernorm=True, bias=True, kv_heads=1),
}


def make(name="qwen3", seed=0, noise=0.2, **changes):
    """Return a small model in evaluation mode, with weights large enough that every part of it matters."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SHAPES[name], **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return model


def some_ids(B=2, T=24, seed=1):
    return torch.randint(97, (B, T), generator=torch.Generator().manual_seed(seed))


def test_doctests():
    result = doctest.testmod(chapter3)
    assert result.failed == 0 and result.attempted > 0


# ---- Attention -----------------------------------------------------------------------------------

def attention_by_loops(q, k, v, documents=None):
    """The definition, one query at a time, in float64: what every kind of attention must give."""
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    y = torch.zeros(B, H, T, D, dtype=torch.float64)
    for b, h, t in product(range(B), range(H), range(T)):
        place, group = S - T + t, h // (H // K)
        seen = [s for s in range(place + 1) if documents is None or documents[b, s] == documents[b, place]]
        scores = [q[b, h, t].double() @ k[b, group, s].double() / math.sqrt(D) for s in seen]
        weights = torch.stack(scores).softmax(0)
        y[b, h, t] = sum(w * v[b, group, s].double() for w, s in zip(weights, seen))
    return y


def some_attention(T, S, K, dtype=torch.float32, B=2, H=4, D=8):
    generator = torch.Generator().manual_seed(T * 100 + S)
    shapes = (B, H, T, D), (B, K, S, D), (B, K, S, D)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


DOCUMENTS = torch.tensor([[0] * 5 + [1] * 3 + [2] * 11, [7] * 12 + [-1] * 7])


@pytest.mark.parametrize("kind", ["formula", "blocks", "fused", "auto"])
@pytest.mark.parametrize("T, K, packed", [(19, 4, False), (19, 2, True), (19, 1, False), (1, 2, False), (6, 2, True)])
def test_every_kind_is_the_definition(kind, T, K, packed):
    """With grouped heads, behind a cache (T < S), with documents; blocks of 4 do not divide T."""
    q, k, v = some_attention(T, 19, K)
    documents = DOCUMENTS if packed else None
    y = chapter3.attention(q, k, v, kind, documents, block=4)
    assert torch.allclose(y.double(), attention_by_loops(q, k, v, documents), atol=1e-5)


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("T, K, packed", [(19, 4, False), (19, 2, True), (5, 2, False)])
def test_gradients_of_all_kinds_are_equal(dtype, close, T, K, packed):
    gradients = {}
    for kind in ("formula", "blocks", "fused"):
        inputs = some_attention(T, 19, K, dtype)
        y = chapter3.attention(*inputs, kind, DOCUMENTS if packed else None, block=4)
        (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        gradients[kind] = [y.detach()] + [x.grad for x in inputs]
    exact = some_attention(T, 19, K, torch.float64 if dtype == torch.float32 else dtype)
    y = attention_by_loops(*exact, DOCUMENTS if packed else None)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    for kind, found in gradients.items():
        for ours, right in zip(found, [y.detach()] + [x.grad for x in exact]):
            assert torch.allclose(ours.double(), right.double(), atol=close, rtol=close), kind


@pytest.mark.parametrize("kind", ["formula", "blocks"])
def test_gradients_agree_with_finite_differences(kind):
    inputs = [x.detach().double().requires_grad_() for x in some_attention(5, 7, 1, B=1, H=2, D=3)]
    assert torch.autograd.gradcheck(lambda q, k, v: chapter3.attention(q, k, v, kind, block=2), inputs)


@pytest.mark.parametrize("kind", ["formula", "blocks", "fused"])
def test_padding_gives_no_nan(kind):
    """A row whose text is itself alone still sees one key; so does padding, whose document is -1."""
    documents = torch.tensor([[0, 1, 2, 3, -1, -1], [0, 0, 0, 0, 0, -1]])
    inputs = some_attention(6, 6, 2)
    y = chapter3.attention(*inputs, kind, documents, block=2)
    y.sum().backward()
    assert all(torch.isfinite(x).all() for x in [y] + [x.grad for x in inputs])
    alone = inputs[2].repeat_interleave(2, dim=1)[0, :, :4]                    # the value of each is all it sees
    assert torch.allclose(y[0, :, :4], alone, atol=1e-6)


def test_auto_is_the_formula_for_short_and_blocks_for_long_texts(monkeypatch):
    calls = []
    formula = chapter3.attention_formula
    monkeypatch.setattr(chapter3, "attention_formula", lambda q, k, v, m: calls.append((q.shape[2], k.shape[2]))
                        or formula(q, k, v, m))
    for T, S in ((256, 256), (300, 300), (1, 300)):
        chapter3.attention(*some_attention(T, S, 1, B=1, H=1))
    assert calls == [(256, 256), (128, 128), (128, 256), (44, 300), (1, 300)]


# ---- Positions -----------------------------------------------------------------------------------

def test_rope_knows_distances_only():
    config = GPTConfig(**SHAPES["qwen3"])
    cos, sin = chapter3.rope_angles(config, torch.arange(200))
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, config.head_width)
    turned_q, turned_k = chapter3.rotate(q, cos, sin)[0, 0], chapter3.rotate(k, cos, sin)[0, 0]       # (200, D)
    products = turned_q @ turned_k.T
    for distance in (0, 1, 17):
        diagonal = products.diagonal(-distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-4)
    assert (products[:, 0] - products[0, 0]).abs().max() > 0.1                 # and they do matter
    assert torch.allclose(turned_q.norm(dim=1), q.norm().expand(200), atol=1e-5)


def test_rope_turns_pair_i_by_theta_to_the_minus_2i_over_D():
    config = GPTConfig(width=32, heads=4, rope_theta=100.0)                    # D = 8
    cos, sin = chapter3.rope_angles(config, torch.tensor([3]))
    x = torch.zeros(1, 1, 1, 8)
    x[..., 1] = 1.0                                                            # pair 1 is (x[1], x[5])
    angle = 3 * 100.0 ** (-2 / 8)
    right = torch.zeros(8)
    right[1], right[5] = math.cos(angle), math.sin(angle)
    assert torch.allclose(chapter3.rotate(x, cos, sin)[0, 0, 0], right, atol=1e-6)


@pytest.mark.parametrize("context", [1, 2, 3, 8, 9, 256])
def test_the_window_holds_the_end_of_the_text_and_moves_seldom(context):
    starts = [chapter3.window_start(length, context) for length in range(1, 5 * context + 2)]
    assert starts[:context] == [0] * context
    for length, start in enumerate(starts, 1):
        assert length - context <= start < length and (start == 0 or length - start > context - max(1, context // 2))
    assert {b - a for a, b in zip(starts, starts[1:])} <= {0, max(1, context // 2)}


# ---- The model -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["formula", "blocks", "fused"])
def test_a_token_never_changes_the_logits_before_it(name, kind):
    model, ids = make(name, attention=kind), some_ids(1)
    with torch.no_grad():
        before = model(ids)
        for t in (0, 9, 23):
            changed = ids.clone()
            changed[0, t] = (ids[0, t] + 1) % 97
            after = model(changed)
            assert torch.allclose(after[:, :t], before[:, :t], atol=1e-6)
            assert all((after[0, u] - before[0, u]).abs().max() > 1e-4 for u in range(t, 24))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["formula", "blocks", "fused"])
def test_the_cache_equals_the_full_forward(name, kind):
    """Prefill of several tokens, single ones, several again; two rows at once; to the last place of the context."""
    model, ids = make(name, attention=kind), some_ids()
    cache = chapter3.KVCache(model.config, 2)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in ids.split([7, 1, 1, 5, 10], dim=1)]
        assert cache.length == 24
        assert torch.allclose(torch.cat(parts, dim=1), model(ids), atol=1e-5)
    with pytest.raises(CourseError, match="25 tokens do not fit the context of 24"):
        model(ids[:, :1], cache=cache)


def test_the_cache_selects_rows():
    model, ids = make(), some_ids(3)
    cache = chapter3.KVCache(model.config, 3)
    with torch.no_grad():
        model(ids[:, :10], cache=cache)
        cache.select([2, 0, 0])
        kept = ids[[2, 0, 0]]
        assert torch.allclose(model(kept[:, 10:15], cache=cache), model(kept[:, :15])[:, 10:], atol=1e-5)


def test_documents_in_a_row_are_read_as_if_each_stood_alone():
    """RoPE tells distances only, so it does not matter where in the row a text stands; with a cache too."""
    model, ids = make(), some_ids(1, 19)
    documents = DOCUMENTS[:1]                                                  # 5, 3 and 11 tokens
    cache = chapter3.KVCache(model.config, 1)
    with torch.no_grad():
        packed = model(ids, documents)
        alone = torch.cat([model(part) for part in ids.split([5, 3, 11], dim=1)], dim=1)
        model(ids[:, :6], documents[:, :6], cache)
        cached = model(ids[:, 6:], documents, cache)
        assert torch.allclose(packed, alone, atol=1e-5) and torch.allclose(cached, alone[:, 6:], atol=1e-5)
        assert not torch.allclose(packed, model(ids), atol=1e-2)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_works_with_every_part(name, dtype):
    documents = torch.zeros(2, 24, dtype=torch.int64)
    for kind in ("formula", "blocks", "fused"):
        model, ids = make(name, attention=kind, noise=0.02), some_ids()
        with torch.no_grad():
            right = model(ids)
        with torch.autocast("cpu", dtype):
            logits = model(ids, documents)
            with torch.no_grad():
                cache = chapter3.KVCache(model.config, 2)
                steps = torch.cat([model(part, cache=cache) for part in ids.split([20, 4], dim=1)], dim=1)
        F.cross_entropy(logits.float().flatten(0, 1), ids.flatten()).backward()
        assert torch.allclose(logits.float(), right, atol=0.05) and torch.allclose(steps.float(), right, atol=0.05)
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_model_in_bfloat16_works_with_its_cache():
    model, ids = make(noise=0.02), some_ids()
    with torch.no_grad():
        right = model(ids)
        model.bfloat16()
        cache = chapter3.KVCache(model.config, 2)
        steps = torch.cat([model(part, cache=cache) for part in ids.split([20, 4], dim=1)], dim=1)
    assert steps.dtype == torch.bfloat16 and torch.allclose(steps.float(), right, atol=0.05)


def test_rms_norm_is_computed_in_float32():
    norm = chapter3.RMSNorm(64, 1e-6)
    x = torch.randn(10, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(norm.bfloat16()(x), exact.bfloat16())


def test_dropout_drops_in_training_only():
    """After the embedding, and after attention and MLP of each of the two blocks."""
    model, ids, calls = make(dropout=0.5), some_ids(), []
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))
    model.dropout.register_forward_hook(lambda module, inputs, output: calls.append((output == 0).float().mean().item()))
    model(ids)
    assert len(calls) == 5 and all(0.4 < share < 0.6 for share in calls)


@pytest.mark.parametrize("shape, share", [({}, 0.01), (dict(GPT2, norm_eps=1e-5, vocab_size=2048, width=128, layers=3), 0.02)])
def test_the_first_loss_is_that_of_a_guess(shape, share):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape))
    ids = torch.randint(model.config.vocab_size, (4, 129))
    with torch.no_grad():
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).item()
    assert abs(loss / math.log(model.config.vocab_size) - 1) < share


def test_what_adds_to_the_stream_starts_smaller():
    model = GPT(GPTConfig(**{**SHAPES["gpt2"], "width": 128, "layers": 8}))
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert abs(weight.std().item() / (0.02 / 4) - 1) < 0.05, name       # sqrt(2 * 8 layers) = 4
        elif weight.ndim == 2:
            assert abs(weight.std().item() / 0.02 - 1) < 0.05, name
        else:
            assert torch.equal(weight, torch.full_like(weight, float(name.endswith("norm.weight")))), name


def test_presets_have_the_published_sizes():
    sizes = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in GPT(GPTConfig(**shape)).parameters()) for name, shape in chapter3.PRESETS.items()}
    assert {name: counts[name] for name in sizes} == sizes
    assert counts["small"] < 5e6 and 1e7 < counts["gpu"] < 2e7 and 1.2e8 < counts["modern-124m"] < 1.3e8
    assert GPTConfig(**chapter3.PRESETS["gpt2"]).hidden == 3072 and GPTConfig(**chapter3.PRESETS["gpt2"]).norm_eps == 1e-5


@pytest.mark.parametrize("shape, named", [
    (dict(heads=3), "width must be a multiple of heads"), (dict(heads=4, kv_heads=3), "heads must be a multiple of kv_heads"),
    (dict(head_width=5), "head_width must be even"), (dict(dropout=1.0), "dropout"), (dict(dropout=float("nan")), "dropout"),
    (dict(attention="flash"), "attention must be"), (dict(layers=0), "at least 1"), (dict(heads=0), "at least 1"),
    (dict(vocab_size=-5), "at least 1"), (dict(context=0), "at least 1"), (dict(width=0), "at least 1")])
def test_a_shape_that_cannot_work_is_refused(shape, named):
    with pytest.raises(CourseError, match=named) as caught:
        GPTConfig(**shape)
    field, value = next(iter(shape.items()))
    assert f"{field}={value!r}" in str(caught.value) and "\n" not in str(caught.value)


# ---- Literal re-statements, on the tensors of the saved file -------------------------------------

def read_plainly(folder):
    """Read a sound float32 model.safetensors with no check at all: {name: (array)} in float64."""
    data = (Path(folder) / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    assert start % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        assert entry["dtype"] == "F32"
        tensors[name] = torch.from_numpy(np.frombuffer(data[start + begin:start + end], "<f4").reshape(entry["shape"]).copy()).double()
    return tensors


def softmax_attend(q, k, v):
    """q, k, v: (T, D) of one head."""
    scores = q @ k.T / math.sqrt(q.shape[1])
    future = torch.triu(torch.ones(len(q), len(q), dtype=torch.bool), 1)
    return torch.softmax(scores.masked_fill(future, -1e30), dim=-1) @ v


def gpt2_literally(w, config, ids):
    """GPT-2 for one text, straight from its tensors: weights are (in, out), q, k and v stand side by side."""
    def layer_norm(x, name):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / torch.sqrt(variance + config["layer_norm_epsilon"]) * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"] + w[name + ".bias"]

    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][:len(ids)]
    for i in range(config["n_layer"]):
        block = f"transformer.h.{i}"
        q, k, v = linear(layer_norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").split(config["n_embd"], dim=-1)
        D = config["n_embd"] // config["n_head"]
        heads = [softmax_attend(q[:, h:h + D], k[:, h:h + D], v[:, h:h + D]) for h in range(0, config["n_embd"], D)]
        x = x + linear(torch.cat(heads, dim=-1), f"{block}.attn.c_proj")
        h = linear(layer_norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3)))
        x = x + linear(h, f"{block}.mlp.c_proj")
    return layer_norm(x, "transformer.ln_f") @ w["transformer.wte.weight"].T


def llama_literally(w, config, ids):
    """Llama, and Qwen3 where q_norm and k_norm are there, for one text, straight from its tensors: (out, in)."""
    H, K, D, T = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"], len(ids)

    def rms_norm(x, name):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config["rms_norm_eps"]) * w[name + ".weight"]

    def turned(x):
        y = torch.zeros_like(x)
        for t, i in product(range(T), range(D // 2)):
            angle = t * config["rope_parameters"]["rope_theta"] ** (-2 * i / D)
            a, b = x[t, i], x[t, i + D // 2]
            y[t, i], y[t, i + D // 2] = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
        return y

    x = w["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        block, heads = f"model.layers.{i}", []
        h = rms_norm(x, f"{block}.input_layernorm")
        q, k, v = (h @ w[f"{block}.self_attn.{name}_proj.weight"].T for name in "qkv")
        for head in range(H):
            one, group = slice(head * D, head * D + D), slice(head // (H // K) * D, head // (H // K) * D + D)
            qh, kh = q[:, one], k[:, group]
            if config["model_type"] == "qwen3":
                qh, kh = rms_norm(qh, f"{block}.self_attn.q_norm"), rms_norm(kh, f"{block}.self_attn.k_norm")
            heads.append(softmax_attend(turned(qh), turned(kh), v[:, group]))
        x = x + torch.cat(heads, dim=-1) @ w[f"{block}.self_attn.o_proj.weight"].T
        h = rms_norm(x, f"{block}.post_attention_layernorm")
        gate, up = (h @ w[f"{block}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ w[f"{block}.mlp.down_proj.weight"].T
    return rms_norm(x, "model.norm") @ w["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"].T


LITERAL = {"gpt2": gpt2_literally, "llama": llama_literally, "qwen3": llama_literally}


@pytest.mark.parametrize("name", LITERAL)
def test_the_saved_file_computes_the_same_by_the_book(name, tmp_path):
    model, ids = make(name), some_ids(1, 17)
    assert model.save(tmp_path) == name
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    right = LITERAL[name](read_plainly(tmp_path), config, ids[0])
    with torch.no_grad():
        ours = model(ids)[0].double()
    assert config["model_type"] == name and (ours - right).abs().max() < 1e-4 * right.abs().max()


# ---- Folders: saved and loaded -------------------------------------------------------------------

@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("tied", [True, False])
def test_save_then_load_gives_the_same_bits(name, tied, tmp_path, capsys):
    model, ids = make(name, tied=tied), some_ids()
    assert model.save(tmp_path) == name
    told = capsys.readouterr().out
    assert told.count("\n") == (name == "course") and ("GPT.load" in told) == (name == "course")
    again = GPT.load(tmp_path).eval()
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert torch.equal(model(ids), again(ids))
    assert not list(tmp_path.glob("*.tmp*"))


@pytest.mark.parametrize("shape, family", [
    (dict(SHAPES["gpt2"], bias=False), "course"), (dict(SHAPES["gpt2"], kv_heads=2), "course"),
    (dict(SHAPES["gpt2"], head_width=4), "course"), (dict(SHAPES["gpt2"], hidden=48), "gpt2"),
    (dict(SHAPES["qwen3"], learned_places=True), "course"), (dict(SHAPES["llama"], bias=True), "course"),
    (dict(SHAPES["llama"], gelu=True), "course"), (dict(SHAPES["llama"], head_width=10), "llama"),
    (dict(SHAPES["qwen3"], dropout=0.1, rope_theta=1e6), "qwen3")])
def test_the_family_is_the_one_that_has_all_parts(shape, family, tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape)).eval()
    assert model.save(tmp_path) == family
    again = GPT.load(tmp_path).eval()
    assert again.config == model.config and torch.equal(again(some_ids()), model(some_ids()))


def test_a_half_precision_model_is_saved_in_float32(tmp_path):
    model = make("gpt2").bfloat16()
    model.save(tmp_path)
    again = GPT.load(tmp_path)
    assert all(torch.equal(a.float(), b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_loading_leaves_the_random_numbers_alone(tmp_path):
    make().save(tmp_path)
    torch.manual_seed(5)
    right = torch.rand(3)
    torch.manual_seed(5)
    GPT.load(tmp_path)
    assert torch.equal(torch.rand(3), right)


# ---- Folders made by others ----------------------------------------------------------------------

def write_plainly(path, tensors, dtype="F32"):
    """Write a safetensors file in another order and layout than ours: names reversed, no metadata, no padding."""
    header, data = {}, b""
    for name in sorted(tensors, reverse=True):
        tensor = tensors[name].float()
        if dtype != "F32":
            tensor = tensor.to({"BF16": torch.bfloat16, "F16": torch.float16}[dtype])
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {"data_offsets": [len(data), len(data) + len(raw)], "shape": list(tensor.shape), "dtype": dtype}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def saved(name, folder, **changes):
    """Save a small model; return (model, its tensors as the family names them, config.json)."""
    model = make(name, **changes)
    model.save(folder)
    return model, read_plainly(folder), json.loads((folder / "config.json").read_text(encoding="utf-8"))


def write_config(folder, config):
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def same(model, folder, atol=0.0):
    with torch.no_grad():
        return torch.allclose(GPT.load(folder).eval()(some_ids()), model(some_ids()), atol=atol, rtol=0)


@pytest.mark.parametrize("name, prefix", [("gpt2", "transformer."), ("qwen3", "model.")])
def test_files_without_the_prefix_open(name, prefix, tmp_path):
    model, tensors, _ = saved(name, tmp_path)
    write_plainly(tmp_path / "model.safetensors", {key.removeprefix(prefix): value for key, value in tensors.items()})
    assert same(model, tmp_path)


def test_old_gpt2_files_hold_masks_and_a_copy_of_the_head(tmp_path):
    model, tensors, config = saved("gpt2", tmp_path)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    for i in range(2):
        tensors[f"transformer.h.{i}.attn.bias"] = torch.tril(torch.ones(1, 1, 24, 24))
        tensors[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)     # of shape []
    write_plainly(tmp_path / "model.safetensors", tensors)
    for setting in ("tie_word_embeddings", "n_inner", "rope_parameters", "resid_pdrop"):
        del config[setting]                                                    # the published gpt2 lacks them
    write_config(tmp_path, config)
    assert same(model, tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_sharded_files_open(name, tmp_path):
    model, tensors, _ = saved(name, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    for part in range(3):
        write_plainly(tmp_path / f"model-0000{part + 1}-of-00003.safetensors", {key: tensors[key] for key in names[part::3]})
    assert same(model, tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CourseError, match="is missing"):
        GPT.load(tmp_path)


@pytest.mark.parametrize("dtype, close", [("BF16", 2 ** -8), ("F16", 2 ** -11)])
def test_half_precision_becomes_float32(dtype, close, tmp_path):
    model, tensors, _ = saved("llama", tmp_path)
    write_plainly(tmp_path / "model.safetensors", tensors, dtype)
    loaded = GPT.load(tmp_path)
    for (name, ours), right in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert ours.dtype == torch.float32 and ours.requires_grad
        assert torch.allclose(ours, right, rtol=close, atol=1e-6), name
        assert ours.numel() < 100 or not torch.equal(ours, right)


def test_rope_theta_is_read_from_old_and_new_places(tmp_path):
    model, _, config = saved("llama", tmp_path)                                # theta is 5000
    del config["rope_parameters"]
    write_config(tmp_path, config)
    assert GPT.load(tmp_path).config.rope_theta == 5000.0
    del config["rope_theta"]
    write_config(tmp_path, config)
    assert GPT.load(tmp_path).config.rope_theta == 10000.0
    write_config(tmp_path, {**config, "rope_parameters": {"rope_theta": 77.0, "rope_type": "default"}})
    assert GPT.load(tmp_path).config.rope_theta == 77.0


def test_untied_without_a_head_is_refused(tmp_path):
    _, _, config = saved("qwen3", tmp_path)                                    # it is tied, so there is no head
    write_config(tmp_path, {**config, "tie_word_embeddings": False})
    with pytest.raises(CourseError, match="lm_head.weight is missing"):
        GPT.load(tmp_path)
    del config["tie_word_embeddings"]                                          # false, where a Qwen3 says nothing
    write_config(tmp_path, config)
    with pytest.raises(CourseError, match="lm_head.weight is missing"):
        GPT.load(tmp_path)


@pytest.mark.parametrize("name, changes", [
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}), ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}), ("llama", {"hidden_act": "gelu"}), ("llama", {"quantization_config": {"bits": 4}}),
    ("llama", {"model_type": "mistral"}), ("llama", {"model_type": ["llama"]}), ("qwen3", {"use_sliding_window": True}),
    ("gpt2", {"activation_function": "relu"}), ("gpt2", {"scale_attn_weights": False}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}), ("llama", {"attention_bias": True, "hidden_act": "relu"})])
def test_settings_that_cannot_be_honoured_are_all_named(name, changes, tmp_path):
    _, _, config = saved(name, tmp_path)
    write_config(tmp_path, {**config, **changes})
    with pytest.raises(CourseError) as caught:
        GPT.load(tmp_path)
    assert all(setting in str(caught.value) and repr(value) in str(caught.value) for setting, value in changes.items())


@pytest.mark.parametrize("rope, named", [
    ({"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}, ["llama3", "factor"]), ({"rope_type": "yarn"}, ["yarn"]),
    ({"rope_type": "default", "partial_rotary_factor": 0.5}, ["partial_rotary_factor"])])
def test_other_kinds_of_rope_are_refused(rope, named, tmp_path):
    _, _, config = saved("llama", tmp_path)
    write_config(tmp_path, {**config, "rope_parameters": rope})
    with pytest.raises(CourseError, match=named[0]) as caught:
        GPT.load(tmp_path)
    assert all(name in str(caught.value) for name in named)


@pytest.mark.parametrize("text", [
    "", "{", "[]", "null", "{}", '"llama"', '{"model_type": "llama"}', '{"model_type": "course"}',
    '{"model_type": "llama", "rope_parameters": [1]}', '{"model_type": "gpt2", "n_head": 2, "n_positions": 8, "n_embd": "a"}',
    '{"model_type": "gpt2", "n_head": 2, "n_positions": 8, "n_embd": 8.0}',
    '{"model_type": "gpt2", "n_head": 0, "n_positions": 8}', '{"model_type": "gpt2", "n_head": 2, "n_positions": 9e99}'])
def test_a_damaged_config_gives_one_line(text, tmp_path):
    saved("gpt2", tmp_path)
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CourseError) as caught:
        GPT.load(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path / "config.json") in str(caught.value)


def test_the_number_of_heads_is_never_guessed(tmp_path):
    """All shapes would fit with another number of heads, and the logits would be wrong."""
    _, _, config = saved("gpt2", tmp_path)
    del config["n_head"], config["num_attention_heads"]
    write_config(tmp_path, config)
    with pytest.raises(CourseError, match="no num_attention_heads or n_head"):
        GPT.load(tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_tensors_that_do_not_fit_are_named(name, tmp_path):
    _, tensors, _ = saved(name, tmp_path)
    first, second = list(tensors)[2:4]
    for change, message in (({first: None}, f"{first} is missing"), ({"extra.weight": torch.ones(2)}, "extra.weight is [2], not expected"),
                            ({second: torch.ones(3, 5)}, f"{second} is [3, 5], not {list(tensors[second].shape)}")):
        changed = {key: value for key, value in {**tensors, **change}.items() if value is not None}
        write_plainly(tmp_path / "model.safetensors", changed)
        with pytest.raises(CourseError) as caught:
            GPT.load(tmp_path)
        assert message in str(caught.value).replace("model.extra", "extra").replace("transformer.extra", "extra")
        assert "1 tensors do not fit" in str(caught.value)


def test_a_half_written_file_does_not_hide_the_old_model(tmp_path):
    model, _, _ = saved("qwen3", tmp_path)
    with pytest.raises(KeyError), chapter3.replacing(tmp_path / "model.safetensors") as temporary:
        temporary.write_bytes(b"half of it")                   # lies there while another saves, or after a kill
        assert same(model, tmp_path)
        raise KeyError


def test_a_folder_without_weights_says_what_is_missing(tmp_path):
    saved("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CourseError, match="lm_head.weight is missing"):
        GPT.load(tmp_path)
    with pytest.raises(CourseError, match="04_train.py or 06_finetune.py makes it"):
        GPT.load(tmp_path / "nowhere")


# ---- Hostile safetensors -------------------------------------------------------------------------

def file_of(header, data=b"\0" * 24, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape=(2, 3), offsets=(0, 24), dtype="F32", **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


HOSTILE = {
    "empty": b"",
    "three bytes": b"abc",
    "no header": (2 ** 20).to_bytes(8, "little"),
    "header longer than the file": file_of({"w": entry()}, length=10 ** 6),
    "header of 2^64 bytes": file_of({"w": entry()}, length=2 ** 64 - 1),
    "header cut off": file_of({"w": entry()}, length=20),
    "not JSON": file_of(b"this is no JSON at all"),
    "not UTF-8": file_of(b'{"\xff\xfe": 1}'),
    "a list": file_of([1, 2]),
    "null": file_of(b"null"),
    "deep nesting": file_of(b"[" * 200_000 + b"]" * 200_000),
    "a huge number": file_of(b'{"w": ' + b"9" * 10_000 + b"}"),
    "an entry that is a string": file_of({"w": "x"}),
    "an entry without dtype": file_of({"w": {"shape": [6], "data_offsets": [0, 24]}}),
    "an entry without shape": file_of({"w": {"dtype": "F32", "data_offsets": [0, 24]}}),
    "an entry without offsets": file_of({"w": {"dtype": "F32", "shape": [6]}}),
    "unknown dtype": file_of({"w": entry(dtype="F33")}),
    "dtype that is a list": file_of({"w": entry(dtype=["F32"])}),
    "metadata with a number": file_of({"__metadata__": {"format": 1}, "w": entry()}),
    "metadata that is a list": file_of({"__metadata__": ["pt"], "w": entry()}),
    "a name twice": file_of(b'{"w": %s, "w": %s}' % ((json.dumps(entry()).encode(),) * 2)),
    "truncated": file_of({"w": entry()}, b"\0" * 23),
    "nothing but a header": file_of({"w": entry()}, b""),
    "trailing bytes": file_of({"w": entry()}, b"\0" * 25),
    "a hole": file_of({"v": entry((1,), (0, 4)), "w": entry((4,), (8, 24))}),
    "a hole at the start": file_of({"w": entry((5,), (4, 24))}),
    "overlap": file_of({"v": entry((4,), (0, 16)), "w": entry((4,), (8, 24))}),
    "the same bytes twice": file_of({"v": entry(), "w": entry()}),
    "offsets backwards": file_of({"w": entry((2, 3), (24, 0))}),
    "negative offsets": file_of({"w": entry((2, 3), (-24, 0))}),
    "three offsets": file_of({"w": entry((2, 3), (0, 12, 24))}),
    "offsets of booleans": file_of({"w": entry((1,), (False, 4))}, b"\0" * 4),
    "offsets of floats": file_of({"w": entry((2, 3), (0.0, 24.0))}),
    "offsets of strings": file_of({"w": entry((2, 3), ("0", "24"))}),
    "mixed offsets": file_of({"v": entry(offsets=("0", 24)), "w": entry()}),
    "shape too small": file_of({"w": entry((5,))}),
    "shape too large": file_of({"w": entry((7,))}),
    "shape of a terabyte": file_of({"w": entry((2 ** 38,), (0, 2 ** 40))}),
    "shape beyond 64 bits": file_of({"w": entry((2 ** 62, 2 ** 62), (0, 2 ** 126))}),
    "shape that wraps around": file_of({"w": entry((4, 2 + 2 ** 62), (0, 32))}, b"\0" * 32),
    "negative shape": file_of({"w": entry((-2, -3))}),
    "shape with -1": file_of({"w": entry((-1,))}),
    "shape with -1 that ends before it begins": file_of(json.dumps({"w": entry((-1,), (0, -4))}).encode() + b" " * 8, b"")[:-4],
    "shape of booleans": file_of({"w": entry((True, 6))}),
    "shape of floats": file_of({"w": entry((2.0, 3.0))}),
    "shape that is a string": file_of({"w": {**entry(), "shape": "23"}}),
    "shape that is null": file_of({"w": {**entry(), "shape": None}}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_gives_one_clear_line(case, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE[case])
    with pytest.raises(CourseError) as caught:
        chapter3.read_safetensors(path)
    message = str(caught.value)
    assert message.startswith(f"{path} is damaged: ") and "\n" not in message and len(message) < 500 + len(str(path))


@pytest.mark.parametrize("case, named", [
    ("truncated", "[0, 24] of 23"), ("trailing bytes", "1 bytes after"), ("a hole", "'w' [4] should be at [4, 20]"),
    ("overlap", "'w' [4] should be at [16, 32]"), ("shape too large", "'w' [7] should be at [0, 28]"), ("unknown dtype", "F33"),
    ("a name twice", "a name occurs twice"), ("metadata with a number", "__metadata__"), ("offsets of floats", "[0.0, 24.0]")])
def test_the_line_says_what_is_wrong(case, named, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE[case])
    with pytest.raises(CourseError) as caught:
        chapter3.read_safetensors(path)
    assert named in str(caught.value)


def test_a_sound_file_of_others_is_read(tmp_path):
    """The fixtures above are refused for their faults alone: without them they are read."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of({"__metadata__": {"format": "pt"}, "w": entry((1,), (20, 24)), "v": entry((5,), (0, 20))},
                             np.arange(6, dtype="<f4").tobytes()))
    found = chapter3.read_safetensors(path)
    assert torch.equal(found["v"], torch.arange(5.0)) and torch.equal(found["w"], torch.tensor([5.0]))
    path.write_bytes(file_of({"w": entry(())}, np.float32(7).tobytes()).replace(b"[0, 24]", b"[0, 4] "))
    assert chapter3.read_safetensors(path)["w"].shape == ()


def test_hostile_headers_do_not_ask_for_memory(tmp_path):
    """Claims of terabytes are refused, not tried."""
    pytest.importorskip("resource")
    code = ("import resource, sys; sys.path.insert(0, sys.argv[1])\n"
            "from importlib import import_module; from pathlib import Path; m = import_module('03_model')\n"
            "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "for path in map(Path, sys.argv[2:]):\n"
            "    try:\n        m.read_safetensors(path); sys.exit('read')\n"
            "    except m.CourseError as error:\n        assert 'alloc' not in str(error), error\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)")
    paths = []
    for i, case in enumerate(("header of 2^64 bytes", "shape of a terabyte", "shape beyond 64 bits", "deep nesting")):
        paths.append(tmp_path / f"{i}.safetensors")
        paths[-1].write_bytes(HOSTILE[case])
    done = subprocess.run([sys.executable, "-c", code, str(SCRIPT.parent), *map(str, paths)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scale = 1 if sys.platform == "darwin" else 1024                            # ru_maxrss: bytes or kilobytes
    assert int(done.stdout) * scale < 100e6


# ---- The script ----------------------------------------------------------------------------------

def run(*flags):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, flags)], capture_output=True, text=True, encoding="utf-8",
                          env={**os.environ, "PYTHONIOENCODING": "utf-8"})


def test_the_script_prints_parts_and_draws(tmp_path):
    done = run("--preset", "gpt2-xl", "--out", tmp_path)                        # shapes only: 1.6 billion take no memory
    assert done.returncode == 0, done.stderr
    assert "1,557,611,200 parameters" in done.stdout and "x 48" in done.stdout
    assert (tmp_path / "rope.png").read_bytes().startswith(b"\x89PNG")


def test_bad_flags_are_one_line(tmp_path):
    done = run("--preset", "gpt5", "--out", tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: --preset gpt5") and done.stderr.count("\n") == 1
    assert run("--no-such-flag").returncode == 2


def test_the_cost_of_a_token_counts_every_product(tmp_path):
    """Counted by torch itself: forward and backward over one context, the attention at half, as causal is half."""
    from torch.utils.flop_counter import FlopCounterMode
    model, T = GPT(GPTConfig()), 256
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, T, dtype=torch.int64)).sum().backward()
    scores = 3 * model.config.layers * 2 * 2 * T * T * model.config.width       # q k and weights v, forward and backward
    right = (counter.get_total_flops() - scores / 2) / T
    printed = run("--out", tmp_path).stdout
    assert abs(float(printed.split(" MFLOP")[0].split()[-1]) * 1e6 / right - 1) < 0.01
