"""How fast is one stream? Tokens per second of chapter 5, of its plain sampler, of transformers, and
of other copies of the course, say an earlier commit.

Run:    python tests/benchmarks/bench_sampling.py
        python tests/benchmarks/bench_sampling.py --against ../first    # beside another copy of the course
        python tests/benchmarks/bench_sampling.py --threads 1 --tokens 32 --rounds 1 --shapes default
Prints: for the default model and for the 124M shape (random weights, float32, greedy), the median rate
        of each and how much faster ours is. All take turns, round after round, and a ratio is the
        median of the rounds' ratios, since other programs slow the machine now and then.
"""
import argparse
import sys
import tempfile
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch

SHAPES = {
    "default": {},
    "124m": dict(vocab_size=50304, context=1024, layers=12, heads=12, width=768),
}
PROMPT = 16  # tokens


def open_course(folder):
    """Return chapters 3 and 5 of the course in a folder, whatever copy of it was imported before."""
    for name in [name for name in sys.modules if name[:2].isdigit()]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    chapters = import_module("03_model"), import_module("05_sample")
    sys.path.remove(str(folder))
    return chapters


def write_ours(chapter5, model, prompt, count):
    """Return the ids that a copy of chapter 5 writes."""
    config = chapter5.Config(max_tokens=count, temperature=0.0)
    with torch.inference_mode():
        return [new[0][0] for new in chapter5.generate(model, [prompt], config)]


def write_naive(chapter5, model, prompt, count):
    """Return the ids that the plain sampler writes: without a cache, all is read again each time."""
    return list(chapter5.generate_naive(model, prompt, chapter5.Config(max_tokens=count, temperature=0.0)))


def write_theirs(model, prompt, count):
    """Return the ids that transformers' model writes."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
                                 do_sample=False, use_cache=True, pad_token_id=0)
    return written[0, len(prompt):].tolist()


def make_contenders(shape, against, prompt):
    """Return {name: function of a count that returns ids}, of equal weights."""
    chapter3, chapter5 = open_course(ROOT)
    torch.manual_seed(1)
    model = chapter3.GPT(chapter3.GPTConfig(**shape)).eval()
    contenders = {"ours": partial(write_ours, chapter5, model, prompt)}
    if not shape:                                              # a large one would take minutes
        contenders["ours, no cache"] = partial(write_naive, chapter5, model, prompt)
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        for path in against:
            other3, other5 = open_course(path)
            contenders[str(path)] = partial(write_ours, other5, other3.GPT.load(folder).eval(), prompt)
        try:
            from transformers import AutoModelForCausalLM
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            contenders["transformers"] = partial(write_theirs, theirs, prompt)
        except ImportError as error:
            print(f"transformers is not installed ({error})")
    return contenders


def race(contenders, count, rounds):
    """Print each one's rate, how much faster ours is, and how many ids are equal to ours."""
    ids = {name: write(count) for name, write in contenders.items()}         # also pays for what is set up once
    seconds = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, write in contenders.items():
            start = time.perf_counter()
            write(count)
            seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        ratio = median(other / ours for other, ours in zip(times, seconds["ours"]))
        equal = sum(a == b for a, b in zip(ids[name], ids["ours"]))
        print(f"  {name:28}{count / median(times):9.1f} tokens/s   ours {ratio:5.2f} times as fast"
              f"   ({equal} of {count} ids equal)")


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to write")
    parser.add_argument("--rounds", type=int, default=7, help="how often all take their turn")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES), help="models to measure")
    parser.add_argument("--against", nargs="*", default=[], type=Path, help="folders of other copies of the course")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    print(f"torch {torch.__version__}, {flags.threads} threads, {flags.tokens} tokens after a prompt of {PROMPT}")
    for name in flags.shapes:
        torch.manual_seed(2)
        prompt = torch.randint(4096, (PROMPT,)).tolist()
        print(f"{name}:")
        race(make_contenders(SHAPES[name], flags.against, prompt), flags.tokens, flags.rounds)


if __name__ == "__main__":
    main()
