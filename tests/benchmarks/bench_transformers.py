"""Do transformers and the course read each other's folders? Logits of both for the same folder, both ways.

Run:    python tests/benchmarks/bench_transformers.py
Prints: per family the largest difference of logits, beside the largest logit, where transformers makes a random
        small model and chapter 3 opens it (also cut into shards and in bfloat16), and the other way round; and
        whether AutoTokenizer gives the same ids as chapter 1 from a tokenizer of its making. Exits with 1 if a
        difference is larger than rounding explains.
"""
import argparse
import re
import sys
import tempfile
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

chapter1, chapter3 = import_module("01_tokenizer"), import_module("03_model")
try:
    import transformers
except ImportError:
    transformers = None

LIMIT = 1e-4  # of the largest logit: float32 rounding, summed up in another order
T = 48  # tokens in a sequence, which is also the context
SMALL = dict(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
             max_position_embeddings=T, tie_word_embeddings=False)


def their_models():
    """Yield (name, a random model of transformers): the three families, tied or not, grouped heads, other D."""
    gpt2 = dict(vocab_size=320, n_embd=64, n_layer=3, n_head=4, n_positions=T)
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    yield "GPT-2", transformers.GPT2LMHeadModel(transformers.GPT2Config(**gpt2))
    yield "GPT-2, MLP of 100", transformers.GPT2LMHeadModel(transformers.GPT2Config(**gpt2, n_inner=100))
    yield "Llama", transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    yield "Llama, grouped, tied", transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **{**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": rope}))
    yield "Qwen3", transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, num_key_value_heads=4, head_dim=16))
    yield "Qwen3, grouped, D 24", transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        **{**SMALL, "num_key_value_heads": 1, "head_dim": 24, "tie_word_embeddings": True, "rope_parameters": rope}))


def our_models():
    """Yield (name, a random model of chapter 3)."""
    shape = dict(vocab_size=320, context=T, layers=3, heads=4, width=64)
    yield "GPT-2", {**chapter3.GPT2, **shape}
    yield "GPT-2, untied", {**chapter3.GPT2, **shape, "hidden": 100, "tied": False}
    yield "Llama", dict(shape, qk_norm=False, norm_eps=1e-5)
    yield "Llama, grouped, D 24", dict(shape, qk_norm=False, kv_heads=2, head_width=24, tied=False, rope_theta=5000.0)
    yield "Qwen3", dict(shape)
    yield "Qwen3, grouped, D 24", dict(shape, kv_heads=1, head_width=24, tied=False, rope_theta=1e6)


def shake(model):
    """Make weights large and norms and biases uneven, so that each of them shows in the logits."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def report(direction, name, ours, theirs):
    """Print the largest difference; return whether it is more than rounding."""
    difference, largest = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    print(f"{direction:36} {name:22} largest difference {difference:.1e}, largest logit {largest:6.2f}", flush=True)
    return not difference <= LIMIT * largest


@torch.no_grad()
def compare_models(folder):
    """Open each side's folders by the other; return how many differ."""
    ids, wrong = torch.randint(320, (2, T), generator=torch.Generator().manual_seed(1)), 0
    for name, theirs in their_models():
        logits = shake(theirs)(ids).logits
        for form, options in (("", {}), (", shards", {"max_shard_size": "100KB"})):
            path = folder / f"theirs {name}{form}"
            theirs.save_pretrained(path, **options)
            if options and len(list(path.glob("model-*.safetensors"))) < 2:
                raise SystemExit(f"{path} was not cut into shards")
            wrong += report(f"theirs, opened by chapter 3{form}", name, chapter3.GPT.load(path).eval()(ids), logits)
        path = folder / f"theirs {name} bf16"
        theirs.to(torch.bfloat16).save_pretrained(path)
        rounded = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        wrong += report("theirs, opened by chapter 3, bf16", name, chapter3.GPT.load(path).eval()(ids), rounded(ids).logits)
    for name, shape in our_models():
        torch.manual_seed(0)
        ours, path = shake(chapter3.GPT(chapter3.GPTConfig(**shape))), folder / f"ours {name}"
        ours.save(path)
        theirs, found = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        odd = {what: names for what, names in found.items() if names and what != "error_msgs"}
        if odd:
            print(f"transformers says of ours, {name}: {odd}")
        wrong += bool(odd) + report(f"ours, opened as {type(theirs).__name__}", name, ours(ids), theirs.eval()(ids).logits)
    return wrong


def encode_marked(tokenizer, text):
    """Encode a text in which the names of special tokens stand for them, which ours never does by itself."""
    ids = []
    for part in re.split(r"(<\|\w+\|>)", text):
        mark = tokenizer.special_tokens.get(part)
        ids += tokenizer.encode(part) if mark is None else [mark]
    return ids


def compare_tokenizers(folder):
    """Train a tokenizer on the chapters themselves and encode them; return whether any ids differ."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(chapter1.__file__).parent.glob("0*.py"))]
    tokenizer = chapter1.train_bpe(texts, 600)
    texts += ["Grüße,\r\n\t東京 🙂 1234567 don't  ", "a\n\n\n  b   \n", "<|endoftext|>x<|im_start|>user\nhello<|im_end|>"]
    tokenizer.save(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    wrong = [text for text in texts if encode_marked(tokenizer, text) != theirs.encode(text)]
    print(f"AutoTokenizer on chapter 1's folder: ids equal on {len(texts) - len(wrong)} of {len(texts)} texts")
    return bool(wrong)


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False).parse_args()
    if transformers is None:
        print("transformers is not installed: nothing to compare with")
        return
    transformers.utils.logging.disable_progress_bar()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, float32")
    with tempfile.TemporaryDirectory() as folder:
        wrong = compare_models(Path(folder)) + compare_tokenizers(Path(folder) / "tokenizer")
    if wrong:
        sys.exit(f"{wrong} of these differ by more than rounding")


if __name__ == "__main__":
    main()
