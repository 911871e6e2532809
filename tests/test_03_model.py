"""Chapter 3: attention against its definition, the model against plain re-statements, its folders by hand."""
import doctest
import json
import math
import subprocess
import sys
from dataclasses import dataclass, fields
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

chapter1, chapter3 = import_module("01_tokenizer"), import_module("03_model")
CourseError, GPT, GPTConfig = chapter1.CourseError, chapter3.GPT, chapter3.GPTConfig

TINY = dict(vocab_size=97, context=24, layers=2, heads=4, width=32, hidden=128)
SHAPES = {
    "gpt2": {**chapter3.GPT2, **TINY},
    "llama": dict(TINY, qk_norm=False, kv_heads=2, tied=False, rope_theta=5000.0),
    "qwen3": dict(TINY, kv_heads=2, head_width=6),                             # D is not C / H
    "course": dict(TINY, norm="layernorm", bias=True, kv_heads=1),
}
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 3 + [2] * 11, [7] * 12 + [-1] * 7])  # (2, 19)
each_shape = pytest.mark.parametrize("name", SHAPES)
each_kind = pytest.mark.parametrize("kind", ["formula", "blocks", "fused"])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny products are faster so, and much faster where other programs run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(name="qwen3", noise=0.2, **changes):
    """Return a small model in evaluation mode, with weights large enough that each of its parts matters."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SHAPES[name], **changes})).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * noise
    return model


def some_ids(B=2, T=24):
    return torch.randint(97, (B, T), generator=torch.Generator().manual_seed(1))


class Cache(dict):
    """What GPT asks of a cache, as plain as can be (chapter 5 has a fast one)."""
    length = 0

    def append(self, layer, *new):
        self[layer] = [torch.cat(pair, dim=2) for pair in zip(self[layer], new)] if layer in self else new
        return self[layer]


def test_doctests():
    result = doctest.testmod(chapter3)
    assert result.failed == 0 and result.attempted > 0


# ---- Attention, positions, norms -----------------------------------------------------------------

def attention_by_loops(q, k, v, documents=None):
    """The definition, one query at a time, in float64: what every kind of attention must give."""
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    y = torch.zeros(B, H, T, D, dtype=torch.float64)
    for b, h, t in product(range(B), range(H), range(T)):
        position, group = S - T + t, h // (H // K)
        seen = [s for s in range(position + 1) if documents is None or documents[b, s] == documents[b, position]]
        weights = torch.stack([q[b, h, t].double() @ k[b, group, s].double() / math.sqrt(D) for s in seen]).softmax(0)
        y[b, h, t] = sum(weight * v[b, group, s].double() for weight, s in zip(weights, seen))
    return y


def value_and_gradients(function, T, K, S=19):
    """Return function(q, k, v) and the gradients of a sum of it; equal numbers go in for an equal T."""
    generator = torch.Generator().manual_seed(T)
    inputs = [torch.randn(2, heads, length, 8, generator=generator).requires_grad_() for heads, length in ((4, T), (K, S), (K, S))]
    y = function(*inputs)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return torch.cat([x.detach().double().flatten() for x in (y, *(x.grad for x in inputs))])


@each_kind
@pytest.mark.parametrize("T, K, packed", [(19, 4, False), (19, 2, True), (19, 1, False), (1, 2, False), (6, 2, True)])
def test_every_kind_is_the_definition_in_values_and_gradients(kind, T, K, packed, monkeypatch):
    """With grouped heads, behind a cache (T < S), with documents; blocks of 4 do not divide 19."""
    monkeypatch.setattr(chapter3, "attention_in_blocks", partial(chapter3.attention_in_blocks, size=4))
    documents = DOCUMENTS if packed else None
    visible = chapter3.who_sees(T, 19, documents)
    right = value_and_gradients(partial(attention_by_loops, documents=documents), T, K)
    assert torch.allclose(value_and_gradients(partial(chapter3.attention, visible=visible, kind=kind), T, K), right, atol=1e-5)
    if kind == "fused" and T == 19 and not packed:             # which makes the causal mask itself
        assert torch.allclose(value_and_gradients(partial(chapter3.attention, kind=kind), T, K), right, atol=1e-5)


def test_the_weights_of_a_query_sum_to_1():
    """With unit vectors as values, the result is the weights themselves. Then the example of the comment."""
    q, k = torch.randn(2, 2, 4, 19, 8, generator=torch.Generator().manual_seed(0))
    visible = chapter3.who_sees(19, 19, DOCUMENTS)
    weights = chapter3.attention_formula(q, k, torch.eye(19).expand(2, 4, 19, 19), visible)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 19)) and torch.equal(weights > 0, visible.expand(2, 4, 19, 19))
    q, k = torch.tensor([[[[0.0, 2.0]]]]), torch.tensor([[[[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]]]])
    weights = chapter3.attention_formula(q, k, torch.eye(3).expand(1, 1, 3, 3))
    assert [round(weight, 2) for weight in weights.flatten().tolist()] == [0.05, 0.77, 0.19]


def test_blocks_never_hold_all_scores_and_auto_takes_the_fastest(monkeypatch):
    calls, formula = [], chapter3.attention_formula
    monkeypatch.setattr(chapter3, "attention_formula", lambda q, k, v, m: calls.append((q.shape[2], k.shape[2])) or formula(q, k, v, m))
    for T in (300, 1):
        chapter3.attention(*torch.randn(3, 1, 1, 300, 8)[:, :, :, -T:], chapter3.who_sees(T, T), "blocks")
    assert calls == [(128, 128), (128, 256), (44, 300), (1, 1)]
    assert [chapter3.choose_attention("auto", S) for S in (1, 256, 257)] == ["formula", "formula", "fused"]
    assert chapter3.choose_attention("formula", 9999) == "formula"


@torch.no_grad()
def test_a_mask_is_made_only_where_one_is_needed(monkeypatch):
    """The fused kernel masks a whole text itself, packed texts take one masked call a layer, a lone query sees all."""
    calls, fused, masks, who = [], F.scaled_dot_product_attention, [], chapter3.who_sees

    def record(q, k, v, mask, is_causal):
        calls.append((mask is not None, is_causal))
        return fused(q, k, v, mask, is_causal=is_causal)
    monkeypatch.setattr(chapter3.F, "scaled_dot_product_attention", record)
    monkeypatch.setattr(chapter3, "who_sees", lambda *given: masks.append(who(*given)) or masks[-1])
    model, ids, cache = make(attention="fused"), some_ids(2, 19), Cache()
    model(ids)
    assert calls == [(False, True)] * 2                        # of 2 layers
    model(ids, DOCUMENTS)
    assert calls[2:] == [(True, False)] * 2
    for part in ids.split([9, 9, 1], dim=1):
        model(part, cache=cache)
    assert calls[4:] == [(False, True)] * 2 + [(True, False)] * 2 + [(False, False)] * 2
    assert [mask if mask is None else mask.shape for mask in masks] == [(2, 1, 19, 19), (9, 18)]     # one a forward at most


def test_rope_knows_distances_only():
    angles = chapter3.rope_angles(GPTConfig(**SHAPES["qwen3"]), torch.arange(200))
    q, k = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    products = chapter3.rotate(q, *angles) @ chapter3.rotate(k, *angles).T     # (200, 200)
    for distance in (0, 1, 17):
        diagonal = products.diagonal(-distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-4)
    assert (products[:, 0] - products[0, 0]).abs().max() > 0.1                 # and they do matter


def test_rotate_is_the_formula_of_the_comment():
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))          # D = 8: pair i is (i, i + 4)
    turned = chapter3.rotate(x, *chapter3.rope_angles(GPTConfig(width=32, heads=4, rope_theta=100.0), torch.arange(5)))
    for m, i in product(range(5), range(4)):
        a, b, angle = x[m, i], x[m, i + 4], m * 100.0 ** (-2 * i / 8)
        right = torch.stack([a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)])
        assert torch.allclose(turned[m, [i, i + 4]], right, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_its_definition(dtype):
    norm = chapter3.RMSNorm(64, 1e-6)
    norm.weight.data = torch.linspace(-1, 2, 64).to(dtype)
    x = torch.randn(10, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(norm(x), exact.to(dtype) * norm.weight, atol=1e-6 if dtype == torch.float32 else 0, rtol=0)


# ---- The model -----------------------------------------------------------------------------------

@torch.no_grad()
@each_shape
@each_kind
def test_a_token_never_changes_the_logits_before_it_and_a_cache_changes_none(name, kind):
    model, ids, cache = make(name, attention=kind), some_ids(1), Cache()
    before = model(ids)
    for t in (0, 9, 23):
        after = model(torch.cat((ids[:, :t], (ids[:, t:t + 1] + 1) % 97, ids[:, t + 1:]), dim=1))
        changes = (after - before)[0].abs().amax(dim=-1)                       # (T)
        assert changes[:t].le(1e-6).all() and changes[t:].ge(1e-4).all()
    assert torch.allclose(model(ids, last_only=True), before[:, -1:], atol=1e-6)
    parts = [model(part, cache=cache) for part in ids.split([7, 1, 16], dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), before, atol=1e-5)


@torch.no_grad()
@each_kind
def test_documents_in_a_sequence_are_read_as_if_each_stood_alone(kind):
    """RoPE tells distances only, so it does not matter where a text stands; with a cache, token by token, too."""
    model, ids, documents, cache = make(attention=kind), some_ids(1, 19), DOCUMENTS[:1], Cache()
    packed = model(ids, documents)
    alone = torch.cat([model(part) for part in ids.split([5, 3, 11], dim=1)], dim=1)
    cached = [model(ids[:, t:t + 1], documents[:, :t + 1], cache) for t in range(19)]
    assert torch.allclose(packed, alone, atol=1e-5) and torch.allclose(torch.cat(cached, dim=1), alone, atol=1e-5)
    assert not torch.allclose(packed, model(ids), atol=1e-2)


@each_shape
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_works_with_every_part(name, dtype):
    for kind in ("formula", "blocks", "fused"):
        model, ids = make(name, attention=kind, noise=0.02), some_ids()
        with torch.autocast("cpu", dtype):
            logits = model(ids, torch.zeros(2, 24, dtype=torch.int64), Cache()).float()
        F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
        assert torch.allclose(logits, model(ids), atol=0.05) and all(torch.isfinite(p.grad).all() for p in model.parameters())
        assert torch.allclose(logits, model.to(dtype)(ids).float(), atol=0.05)


@each_shape
@each_kind
def test_masks_and_angles_are_made_on_the_device_of_the_model(name, kind, tmp_path):
    """The meta device stands for a GPU: what is made on the CPU by mistake cannot be joined with its tensors."""
    make(name).save(tmp_path)
    model, ids, cache = GPT.load(tmp_path, context=20).to("meta"), some_ids(2, 19).to("meta"), Cache()
    model.config.attention = kind
    for logits in model(ids, DOCUMENTS.to("meta")), model(ids[:, :9], cache=cache), model(ids[:, 9:], cache=cache):
        assert logits.device.type == "meta"


def test_what_adds_to_the_stream_starts_smaller():
    for name, weight in GPT(GPTConfig(**{**SHAPES["gpt2"], "width": 128, "layers": 8})).named_parameters():
        std = 0.02 / 4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02              # sqrt(2 * 8 layers) is 4
        right = (weight.std() / std - 1).abs() < 0.05 if weight.ndim == 2 else (weight == name.endswith("norm.weight")).all()
        assert right, name


def test_presets_have_the_published_sizes():
    counts, larger = {}, {"medium": (24, 16, 1024), "large": (36, 20, 1280), "xl": (48, 25, 1600)}
    with torch.device("meta"):
        for name in chapter3.PRESETS:
            counts[name] = sum(p.numel() for p in GPT(flags("--preset", name)).parameters())
        for name, (layers, heads, width) in larger.items():
            shape = GPTConfig(**{**chapter3.GPT2, "layers": layers, "heads": heads, "width": width})
            counts[name] = sum(p.numel() for p in GPT(shape).parameters())
    assert [counts[name] for name in ("gpt2", *larger)] == [124_439_808, 354_823_168, 774_030_080, 1_557_611_200]
    assert counts["small"] < 5e6 and 1e7 < counts["gpu"] < 2e7 and 1.2e8 < counts["modern-124m"] < 1.3e8


@pytest.mark.parametrize("shape, named", [
    (dict(heads=3), "--width 256 .* --heads 3"), (dict(heads=0), "heads is 0: .*at least 1"), (dict(kv_heads=3), "--kv-heads 3"),
    (dict(head_width=5), "--head-width 5"), (dict(attention="flash"), "--attention flash: choose one of .*formula"),
    (dict(width=0), "width is 0"), (dict(width=6, heads=2), "--head-width 3"), (dict(layers=0), "layers is 0"),
    (dict(vocab_size=0), "vocab_size is 0"), (dict(context=0), "context is 0"), (dict(mlp="relu"), "--mlp relu: choose one of .*swiglu.*gelu"), (dict(norm=""), "--norm"), (dict(positions="x"), "--positions x")])
def test_a_shape_that_cannot_work_is_one_line_with_its_numbers(shape, named):
    with pytest.raises(CourseError, match=named) as caught:
        GPT(GPTConfig(**shape))
    assert "\n" not in str(caught.value)


# ---- Folders of the families: names and shapes by hand, logits straight from the tensors ---------

LLAMA = dict(vocab_size=97, max_position_embeddings=24, hidden_size=32, intermediate_size=128, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6)
CONFIGS = {  # the least of what transformers writes
    "gpt2": dict(model_type="gpt2", vocab_size=97, n_positions=24, n_ctx=24, n_embd=32, n_layer=2, n_head=4, n_inner=None,
                 layer_norm_epsilon=1e-5, activation_function="gelu_new", summary_type="cls_index"),
    "llama": dict(LLAMA, model_type="llama", rope_theta=5000.0, rope_scaling=None, hidden_act="silu", mlp_bias=False),
    "qwen3": dict(LLAMA, model_type="qwen3", head_dim=6, tie_word_embeddings=True, use_sliding_window=False, hidden_act="silu",
                  rope_parameters={"rope_theta": 5000.0, "rope_type": "default"}),
}
each_family = pytest.mark.parametrize("family", CONFIGS)


def softmax_attend(q, k, v):
    """q, k, v: (T, D) of one head."""
    future = torch.triu(torch.ones(len(q), len(q), dtype=torch.bool), 1)
    return torch.softmax((q @ k.T / math.sqrt(q.shape[1])).masked_fill(future, -1e30), dim=-1) @ v


def gpt2_literally(w, config, ids):
    """GPT-2 for one text, straight from its tensors: weights are (in, out), q, k and v stand side by side."""
    def layer_norm(x, name):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / torch.sqrt(variance + config["layer_norm_epsilon"]) * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"] + w[name + ".bias"]

    x, D = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][:len(ids)], config["n_embd"] // config["n_head"]
    for block in (f"transformer.h.{i}" for i in range(config["n_layer"])):
        q, k, v = linear(layer_norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").split(config["n_embd"], dim=-1)
        heads = [softmax_attend(*parts) for parts in zip(q.split(D, -1), k.split(D, -1), v.split(D, -1))]
        x = x + linear(torch.cat(heads, dim=-1), f"{block}.attn.c_proj")
        h = linear(layer_norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        x = x + linear(0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3))), f"{block}.mlp.c_proj")
    return layer_norm(x, "transformer.ln_f") @ w["transformer.wte.weight"].T


def llama_literally(w, config, ids):
    """Llama, and Qwen3 where q_norm and k_norm are there, for one text, straight from its tensors: (out, in)."""
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    H, K, D = config["num_attention_heads"], config["num_key_value_heads"], config.get("head_dim") or 8

    def rms_norm(x, name):
        scale = w.get(name + ".weight")                                        # Llama has no q_norm and k_norm
        return x if scale is None else x / torch.sqrt((x * x).mean(-1, keepdim=True) + config["rms_norm_eps"]) * scale

    def turned(x):
        angles = torch.arange(len(x))[:, None] * theta ** (-torch.arange(0, D, 2).double() / D)
        z = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)       # pair i is (i, i + D/2)
        return torch.cat((z.real, z.imag), -1)

    x = w["model.embed_tokens.weight"][ids]
    for block in (f"model.layers.{i}" for i in range(config["num_hidden_layers"])):
        h, heads = rms_norm(x, f"{block}.input_layernorm"), []
        q, k, v = ((h @ w[f"{block}.self_attn.{name}_proj.weight"].T).split(D, -1) for name in "qkv")
        for head, group in ((head, head // (H // K)) for head in range(H)):
            qh, kh = rms_norm(q[head], f"{block}.self_attn.q_norm"), rms_norm(k[group], f"{block}.self_attn.k_norm")
            heads.append(softmax_attend(turned(qh), turned(kh), v[group]))
        x = x + torch.cat(heads, dim=-1) @ w[f"{block}.self_attn.o_proj.weight"].T
        h = rms_norm(x, f"{block}.post_attention_layernorm")
        gate, up = (h @ w[f"{block}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ w[f"{block}.mlp.down_proj.weight"].T
    return rms_norm(x, "model.norm") @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def same_logits(model, tensors, config):
    literally, ids = gpt2_literally if config["model_type"] == "gpt2" else llama_literally, some_ids(1, 17)
    right = literally({name: tensor.double() for name, tensor in tensors.items()}, config, ids[0])
    with torch.no_grad():
        return (model.eval()(ids)[0] - right).abs().max() < 1e-4 * right.abs().max()


def write_plainly(path, tensors, dtype="F32"):
    """Write a file in another order and layout than ours: names reversed, no metadata, no padding."""
    header, data = {}, b""
    for name in sorted(tensors, reverse=True):
        tensor = tensors[name].to({"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[dtype])
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {"data_offsets": [len(data), len(data) + len(raw)], "shape": list(tensor.shape), "dtype": dtype}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def read_plainly(folder):
    """Read a folder of ours with no check but that the numbers are aligned; return (its tensors, its config)."""
    data = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    assert start % 8 == 0 and header.pop("__metadata__") == {"format": "pt"} and {part["dtype"] for part in header.values()} == {"F32"}
    tensors = {name: torch.from_numpy(np.frombuffer(data[start:][slice(*part["data_offsets"])], "<f4").reshape(part["shape"]).copy())
               for name, part in header.items()}
    return tensors, json.loads((folder / "config.json").read_text(encoding="utf-8"))


def foreign(family, folder, **changes):
    """Write a folder as others do, with numbers that bfloat16 can hold; return (its tensors, its config)."""
    make(family).save(folder)
    tensors = {name: tensor.bfloat16().float() for name, tensor in read_plainly(folder)[0].items()}
    config = {name: value for name, value in {**CONFIGS[family], **changes}.items() if value != "absent"}
    write_plainly(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return tensors, config


@each_family
def test_what_is_saved_has_the_names_of_transformers_and_computes_the_same(family, tmp_path):
    model = make(family)
    model.save(tmp_path)
    tensors, config = read_plainly(tmp_path)
    assert same_logits(model, tensors, config)                 # which reads each tensor by its name; there are no others:
    assert len(tensors) == {"gpt2": 4 + 2 * 12, "llama": 3 + 2 * 9, "qwen3": 2 + 2 * 11}[family] and len(config["architectures"]) == 1
    expected = {**CONFIGS[family], "n_inner": 128} if family == "gpt2" else CONFIGS[family]
    assert all(config[name] == value for name, value in expected.items() if name in config and "rope" not in name)
    model.bfloat16().save(tmp_path)                            # float32 again, of rounded numbers
    assert all(torch.equal(tensor, tensors[name].bfloat16().float()) for name, tensor in read_plainly(tmp_path)[0].items())


@each_family
@pytest.mark.parametrize("form", ["plain", "no prefix", "old", "shards", "BF16", "F16"])
def test_folders_of_others_open(family, form, tmp_path):
    tensors, config = foreign(family, tmp_path)
    path, names = tmp_path / "model.safetensors", sorted(tensors)
    if form == "no prefix":
        write_plainly(path, {name.removeprefix("transformer.").removeprefix("model."): tensors[name] for name in names})
    elif form == "old":                                        # GPT-2s hold masks and a copy of the head
        masks = {f"h.{i}.attn.{name}": torch.ones(size) for i in range(2) for name, size in (("bias", (1, 1, 24, 24)), ("masked_bias", ()))}
        head = {"lm_head.weight": tensors.get("lm_head.weight", torch.ones(97, 32))}
        write_plainly(path, {**tensors, **(masks if family == "gpt2" else {}), **head})
    elif form == "shards":
        path.unlink()
        for part in range(3):
            write_plainly(tmp_path / f"model-0000{part + 1}-of-00003.safetensors", {name: tensors[name] for name in names[part::3]})
    elif form != "plain":
        write_plainly(path, tensors, form)
    model = GPT.load(tmp_path)
    assert same_logits(model, tensors, config) and all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("family, changes, named", [
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling"), ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5}}, "rope_type yarn"), ("qwen3", {"use_sliding_window": True}, "use_sliding_window"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"), ("llama", {"model_type": "mistral"}, "type mistral"),
    ("gpt2", {"activation_function": "relu"}, "activation_function relu"), ("gpt2", {"n_head": "absent"}, "heads is 0"),
    ("qwen3", {"tie_word_embeddings": "absent"}, "missing.*lm_head.weight"), ("gpt2", {"n_inner": 64}, "c_fc.weight is .*128.* not .*64")])
def test_what_cannot_be_honoured_is_named(family, changes, named, tmp_path):
    foreign(family, tmp_path, **changes)
    with pytest.raises(CourseError, match=named) as caught:
        GPT.load(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_tensors_that_are_missing_or_not_expected_are_named(tmp_path):
    tensors, _ = foreign("llama", tmp_path)
    biases = {f"model.layers.0.{name}_proj.bias": torch.ones(32) for name in ("self_attn.q", "mlp.down")}      # attention_bias, mlp_bias
    for odd, named in (({"extra.weight": torch.ones(2)}, r"not expected: \['extra.weight'\]$"), (biases, "down_proj.bias.*q_proj.bias"), ({"lm_head.weight": None}, r"missing.*: \['lm_head.weight'\]$")):
        write_plainly(tmp_path / "model.safetensors", {name: tensor for name, tensor in {**tensors, **odd}.items() if tensor is not None})
        with pytest.raises(CourseError, match=named):
            GPT.load(tmp_path)
    with pytest.raises(CourseError, match=f"cannot read {tmp_path}/nowhere/config.json .*04_train.py"):
        GPT.load(tmp_path / "nowhere")


# ---- Our own folders: any mix, and nothing lost --------------------------------------------------

def family_of(config):
    return chapter3.write_config(config)["model_type"]


FAMILY_OF = {("layernorm", "learned", "gelu", True, False): "gpt2", ("rmsnorm", "rope", "swiglu", False, False): "llama",
             ("rmsnorm", "rope", "swiglu", False, True): "qwen3"}


@torch.no_grad()
def test_every_mix_is_saved_and_opens_with_equal_logits(tmp_path):
    for mix in product(["rmsnorm", "layernorm"], ["rope", "learned"], ["swiglu", "gelu"], *[[True, False]] * 3):
        model = make("gpt2", **dict(zip(("norm", "positions", "mlp", "bias", "qk_norm", "tied"), mix)))
        assert family_of(model.config) == FAMILY_OF.get(mix[:5], "course"), mix
        model.save(tmp_path)
        state = torch.get_rng_state()
        again = GPT.load(tmp_path).eval()
        assert again.config == model.config and torch.equal(model(some_ids()), again(some_ids())), mix
        assert torch.equal(torch.get_rng_state(), state)       # opening draws no random numbers


@pytest.mark.parametrize("shape, family", [
    (dict(SHAPES["gpt2"], hidden=48, dropout=0.1, tied=False), "gpt2"), (dict(SHAPES["gpt2"], kv_heads=2), "course"),
    (dict(SHAPES["gpt2"], head_width=4), "course"), (dict(SHAPES["qwen3"], width=36, head_width=10), "qwen3"), (dict(SHAPES["llama"], head_width=10), "llama"),
    (dict(SHAPES["qwen3"], dropout=0.1, rope_theta=1e6), "qwen3"), (dict(SHAPES["qwen3"], width=40, positions="learned"), "course")])
def test_a_family_is_named_only_if_it_loses_nothing(shape, family, tmp_path):
    assert family_of(GPTConfig(**shape, attention="blocks")) == family         # how to compute is no part of a model
    GPT(GPTConfig(**shape)).save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["model_type"] == family
    assert GPT.load(tmp_path).config == GPTConfig(**shape)
    GPT(chapter3.Config(**shape)).save(tmp_path)               # a script's config has more than a shape
    assert GPT.load(tmp_path).config == GPTConfig(**shape)


@dataclass
class Windowed(GPTConfig):
    window: int = 0


def test_a_new_setting_is_never_lost(tmp_path, monkeypatch):
    """Somebody adds a field: where it is used, no family has it; folders from before open with its default."""
    for name in SHAPES:
        make(name).save(tmp_path / name)
    monkeypatch.setattr(chapter3, "GPTConfig", Windowed)
    monkeypatch.setattr(chapter3, "SHAPE", [*chapter3.SHAPE, "window"])
    monkeypatch.setitem(chapter3.FAMILIES, "course", ("", {name: name for name in chapter3.SHAPE}, {}))       # as SHAPE would have it
    for name in SHAPES:
        used = Windowed(**SHAPES[name], window=8)
        assert GPT.load(tmp_path / name).config == Windowed(**SHAPES[name]) != used
        assert family_of(Windowed(**SHAPES[name])) == name and family_of(used) == "course"
        GPT(used).save(tmp_path / "new")
        assert GPT.load(tmp_path / "new").config == used


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_a_shorter_context_changes_no_logits_of_short_inputs(name, tmp_path):
    model, ids = make(name), some_ids(2, 8)
    model.save(tmp_path)
    short = GPT.load(tmp_path, context=8).eval()
    assert torch.equal(short(ids), model(ids)) and short.config.context == 8 and all(p.requires_grad for p in short.parameters())
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in short.parameters()) == (name == "gpt2") * 16 * 32
    with pytest.raises(CourseError, match="9 tokens do not fit"):
        short(some_ids(2, 9))
    with pytest.raises(CourseError, match="--context 25: the model knows 24"):
        GPT.load(tmp_path, context=25)


# ---- Damaged and hostile files -------------------------------------------------------------------

DAMAGED = [
    "", "{", "[]", "null", "{}", '"llama"', "[" * 100_000, '{"model_type": "llama"}', '{"model_type": []}', '{"model_type": "course"}',
    '{"model_type": "course", "course": {"no_such_setting": 1}}', '{"model_type": "course", "course": {"layers": "2"}}',
    '{"model_type": "llama", "rope_parameters": [1]}', *('{"model_type": "gpt2", "n_head": %s}' % more for more in (
        -2, '2, "n_embd": "a"', '2, "n_embd": 8.0', '2, "resid_pdrop": 7', '2, "n_positions": 9e99', f'2, "n_positions": {2 ** 40}',
        f'2, "n_positions": {2 ** 70}'))]


def file_of(header, data=b"\0" * 24, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape=(2, 3), offsets=(0, 24), dtype="F32"):
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


HOSTILE = {
    "empty": b"", "three bytes": b"abc", "no header": (2 ** 20).to_bytes(8, "little"), "header of 2^63": file_of(entry(), length=2 ** 63),
    "header of 2^64 - 1": file_of(entry(), length=2 ** 64 - 1), "header cut off": file_of(entry(), length=20), "no JSON": file_of(b"{w}"),
    "no UTF-8": file_of(b'{"\xff": 1}'), "a list": file_of([1, 2]), "null": file_of(b"null"), "text": file_of(b'"w"'),
    "nested": file_of(b"[" * 200_000 + b"]" * 200_000), "a huge number": file_of(b'{"w": ' + b"9" * 10_000 + b"}"),
    "no entry": file_of({"w": "x"}), "no dtype": file_of({"w": {"shape": [6], "data_offsets": [0, 24]}}),
    "unknown dtype": file_of(entry(dtype="F33")), "dtype a list": file_of(entry(dtype=["F32"])), "shape null": file_of(entry(None)),
    "truncated": file_of(entry(), b"\0" * 23), "backwards": file_of(entry(offsets=[24, 0])), "negative": file_of(entry(offsets=[-24, 0])),
    "three offsets": file_of(entry(offsets=[0, 12, 24])), "offsets text": file_of(entry(offsets=["0", "24"])),
    "offsets floats": file_of(entry(offsets=[0.0, 24.0])), "negative shape": file_of(entry([-2, -3])), "too large": file_of(entry([7])),
    "a terabyte": file_of(entry([2 ** 38], [0, 2 ** 40])), "beyond 64 bits": file_of(entry([2 ** 62, 2 ** 62], [0, 2 ** 126])),
    "beyond all bits": file_of(entry([2 ** 200], [0, 2 ** 202])),
}


def test_hostile_and_truncated_files_give_one_line_and_ask_for_no_memory(tmp_path):
    resource = pytest.importorskip("resource")
    foreign("gpt2", tmp_path)
    config, path, peak = tmp_path / "config.json", tmp_path / "model.safetensors", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sound, text = path.read_bytes(), config.read_text(encoding="utf-8")
    truncated = {length: sound[:length] for length in (*range(0, 3000, 290), len(sound) // 2, len(sound) - 1)}
    cases = [(case, text, data) for case, data in {**HOSTILE, **truncated}.items()] + [(bad, bad, sound) for bad in DAMAGED]
    for case, text, data in cases:
        path.write_bytes(data)
        config.write_text(text, encoding="utf-8")
        with pytest.raises(CourseError) as caught:
            GPT.load(tmp_path)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value), case
        if data is HOSTILE.get(case):                          # not only because its names are not those of a model
            with pytest.raises(Exception):
                print(case, chapter3.read_safetensors(path))
    scale = 1 if sys.platform == "darwin" else 1024            # ru_maxrss: bytes or kilobytes
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * scale < 100e6


# ---- The script ----------------------------------------------------------------------------------

def flags(*argv):
    return chapter1.parse_flags(chapter3.Config, chapter3.PRESET_HELP, list(argv), chapter3.defaults_for)


def test_every_setting_is_a_flag_with_help(capsys):
    with pytest.raises(SystemExit):
        flags("--help")
    printed = capsys.readouterr().out
    lines = Path(chapter3.__file__).read_text(encoding="utf-8").splitlines()
    for field in fields(GPTConfig):
        comment = next(line for line in lines if line.startswith(f"    {field.name}: ")).split("  # ")[1]
        assert f"--{field.name.replace('_', '-')}" in printed and comment in " ".join(printed.split()), field.name
    assert all(f"  {name}: " in printed for name in chapter3.PRESETS) and "'batch_tokens': 524288" in printed


def test_a_flag_wins_over_the_preset():
    config = flags("--preset", "gpt2", "--layers", "3", "--no-bias", "--norm", "rmsnorm")
    assert (config.layers, config.bias, config.norm) == (3, False, "rmsnorm")
    assert (config.width, config.context, config.mlp, config.hidden) == (768, 1024, "gelu", 3072)


def test_the_script_prints_parts_and_their_cost_and_draws(tmp_path, capsys):
    """torch itself counts the cost: forward and backward over one context, the attention at half, as causal is half."""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        GPT(GPTConfig())(torch.zeros(1, 256, dtype=torch.int64)).sum().backward()
    right = counter.get_total_flops() / 256 - 3 * 4 * 2 * 256 * 256            # less half of q k and of weights v, thrice, in 4 layers
    chapter3.main(flags("--out", str(tmp_path)))
    printed = capsys.readouterr().out
    assert abs(float(printed.split(" MFLOP")[0].split()[-1]) * 1e6 / right - 1) < 0.01
    assert "4,262,656 parameters" in printed and "1,048,576  embed_tokens.weight [4096, 256]" in printed
    assert "those before by 0e+00\n" in printed and f"04_train.py --out {tmp_path}" in printed
    assert (tmp_path / "rope.png").read_bytes().startswith(b"\x89PNG")


def test_bad_flags_are_one_line_and_status_1(tmp_path):
    for argv, line in ((["--preset", "nope"], f"error: --preset nope: choose one of {[*chapter3.PRESETS]}\n"),
                       (["--heads", "3"], "error: --width 256 must be a multiple of --heads 3, and that one of --kv-heads 3\n")):
        done = subprocess.run([sys.executable, chapter3.__file__, "--out", str(tmp_path), *argv], capture_output=True, text=True)
        assert (done.returncode, done.stderr, list(tmp_path.iterdir())) == (1, line, [])
