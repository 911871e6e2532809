"""How fast is one stream? Tokens per second of chapter 5 with its cache, without it, and of transformers.

Run:    python tests/benchmarks/bench_sampling.py --threads 2
        python tests/benchmarks/bench_sampling.py --threads 1 --tokens 32 --repeats 1 --shapes default
Prints: for the default model and for GPT-2's 124M shape (random weights): ours with the cache, ours without
        at 256 tokens of text, and `generate` of transformers, where it is installed, with equal weights and
        both greedy; each time the ratio. The best of a few repeats counts, since other programs only slow it.
"""
import argparse
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

chapter3, chapter5 = import_module("03_model"), import_module("05_sample")
SHAPES = {"default": "small", "gpt2-124m": "gpt2"}
PROMPT = 16  # tokens


def best_rate(write, count, repeats):
    """Return the most tokens per second that `write`, which writes `count` tokens, has reached."""
    write()                                                    # the first run pays for what is set up once
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        write()
        seconds.append(time.perf_counter() - start)
    return count / min(seconds)


def ours(model, prompt, count, cache=True, temperature=0.0):
    """Return a function that writes `count` tokens after the prompt with chapter 5, and returns their ids."""
    config = chapter5.Config(max_tokens=count, temperature=temperature, cache=cache)
    return lambda: [new[0][0] for new in chapter5.generate(model, [prompt], config)]


def theirs(model, prompt, count):
    """Return the same for transformers with equal weights. Raises ImportError where it is not installed."""
    from transformers import AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([prompt])
    flags = dict(max_new_tokens=count, min_new_tokens=count, do_sample=False, use_cache=True, pad_token_id=0)

    def write():
        with torch.inference_mode():
            return other.generate(ids, attention_mask=torch.ones_like(ids), **flags)[0, len(prompt):].tolist()

    return write


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to write (prompt and text must fit the context)")
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the best counts")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES), help="models to measure")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    print(f"torch {torch.__version__}, {flags.threads} threads, {flags.tokens} tokens after a prompt of {PROMPT}")
    for name in flags.shapes:
        torch.manual_seed(1)
        model = chapter3.GPT(chapter3.GPTConfig(**chapter3.PRESETS[SHAPES[name]])).eval()
        prompt = torch.randint(model.config.vocab_size, (PROMPT,)).tolist()
        count = min(flags.tokens, model.config.context - PROMPT)
        rate = best_rate(ours(model, prompt, count), count, flags.repeats)
        print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters")
        print(f"  ours, greedy                {rate:9.1f} tokens/s")
        drawn = best_rate(ours(model, prompt, count, temperature=0.8), count, flags.repeats)
        print(f"  ours, drawn at 0.8          {drawn:9.1f} tokens/s")
        text, few = torch.randint(model.config.vocab_size, (240,)).tolist(), min(16, flags.tokens)
        slow = best_rate(ours(model, text, few, cache=False), few, flags.repeats)      # texts of 240 to 256 tokens
        print(f"  ours, no cache, 256 tokens  {slow:9.1f} tokens/s   with the cache {rate / slow:5.1f} times as fast")
        try:
            write = theirs(model, prompt, count)
        except ImportError as error:
            print(f"  transformers is not installed ({error})")
            continue
        same = sum(a == b for a, b in zip(ours(model, prompt, count)(), write()))
        peer = best_rate(write, count, flags.repeats)
        print(f"  transformers, greedy        {peer:9.1f} tokens/s   ours {rate / peer:5.2f} times as fast "
              f"({same} of {count} tokens equal)")


if __name__ == "__main__":
    main()
