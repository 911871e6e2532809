"""How fast does chapter 4 learn? Our default beside nanoGPT's settings, for the same seconds on the same data.

Run:    python tests/benchmarks/bench_training.py                     both for 180 s on out/data (CPU)
        python tests/benchmarks/bench_training.py --speeds --memory   also tokens/s, and memory at steps 10 and 500
        python tests/benchmarks/bench_training.py --seconds 10 --only speeds
        python tests/benchmarks/bench_training.py --width 192 --dropout 0.1 --matrix-lr 0.02    ours with other values
All on the CPU; for a GPU there is bench_gpu.py.
Prints: bits per byte of both on the whole validation split, their ratio, tokens/s, and when ours passed the
        baseline's last loss. Seconds are those of training steps, compiling included, evaluations left out.

The baseline is nanoGPT as its train.py and its README's CPU command set it, written with the parts of chapter 3:
LayerNorm without bias, learned positions, GELU, tied embeddings, fused attention, 12 sequences a step, AdamW at 1e-3 with
betas 0.9 and 0.99 and decay 0.1 on matrices, warm-up over 100 steps, then a cosine to 1e-4, clipped at 1.0, float32,
not compiled. Its layers, heads, width and context are those of our default. The cosine ends with the seconds. It runs
before this process keeps freed memory (Linux), as every script of the course does and nanoGPT does not.
"""
import argparse
import ctypes
import math
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import replace
from importlib import import_module
from io import StringIO
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch

chapter1, chapter2, chapter3, chapter4 = map(import_module, ("01_tokenizer", "02_data", "03_model", "04_train"))
GPT, GPTConfig = chapter3.GPT, chapter3.GPTConfig
NANOGPT = dict(norm="layernorm", positions="learned", mlp="gelu", bias=False, qk_norm=False, tied=True, norm_eps=1e-5,
               attention="fused")


class Data:
    """The encoded text of a course folder, its tokens' bytes, and the vocabulary of a model of it."""

    def __init__(self, out):
        tokenizer = chapter1.Tokenizer.load(out / "tokenizer")
        self.train, _ = chapter2.open_tokens(out / "data", "train")
        self.val, _ = chapter2.open_tokens(out / "data", "val")
        self.vocab_size = -(-tokenizer.vocab_size // 64) * 64
        self.bytes_of = torch.from_numpy(chapter2.token_sizes(tokenizer, self.vocab_size))

    def batch(self, step, R, T):
        """Return x and y, each (R, T)."""
        return tuple(map(torch.from_numpy, chapter2.get_batch(self.train, step, R, T, 1)))


def shape_of(preset, **changes):
    """Return the values of a preset that are a model's shape, with some of them changed."""
    return {**chapter3.shape_of(chapter3.PRESETS[preset]), **changes}


def train_baseline(data, shape, sequences, seconds):
    """Train nanoGPT's model with its settings. Returns (model, steps, seconds used)."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(**{**shape, **NANOGPT}))
    groups = [{"params": [p for p in model.parameters() if (p.ndim >= 2) == matrix], "weight_decay": 0.1 * matrix}
              for matrix in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    start, step = time.time(), 0
    while (done := (time.time() - start) / seconds) < 1:
        rate = min((step + 1) / 100, 0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * rate
        x, y = data.batch(step, sequences, shape["context"])
        loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    return model, step, time.time() - start


def keep_memory():
    """Set what chapter 1's `run` sets for each script."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-1, 1_000_000_000)
        ctypes.CDLL(None).mallopt(-3, 32_000_000)


def train_ours(data, shape, machine, steps, evaluations=0, limit=65536, on_batch=lambda step: None, **changes):
    """Train by chapter 4's loop with the settings of its default preset. Returns (model, log)."""
    eval_every = max(1, steps // evaluations) if evaluations else steps
    config = chapter4.TrainingConfig(**{"steps": steps, "eval_every": eval_every, **changes})
    torch.manual_seed(config.seed)
    model = GPT(GPTConfig(**shape))
    sequences = max(1, config.batch_tokens // shape["context"])

    asked = []                                                 # when; `train` compiles between the first two times

    def batch(step):
        asked.append(time.time())
        on_batch(step)
        return data.batch(step, sequences, shape["context"])

    def judge(model):
        return chapter4.evaluate(model, machine, data.val, data.bytes_of, limit if evaluations else 1)

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()) as printed:
        log = chapter4.train(model, batch, config, machine, Path(folder), judge, lambda model: None)
    print("".join(line + "\n" for line in printed.getvalue().splitlines() if line.startswith("not compiled")), end="")
    log[0]["seconds"] += asked[1] - asked[0]
    return model, log


def pace(log):
    """Return (seconds of the first step, with compiling; seconds of a usual one)."""
    return log[0]["seconds"], statistics.median(row["seconds"] for row in log[len(log) // 3:])


def compare(data, shape, machine, seconds, sequences, ours_shape, recipe):
    """Train both for the same seconds and print what they reached; ours may have another shape and recipe."""
    bits = lambda model, machine: chapter4.evaluate(model.eval(), machine, data.val, data.bytes_of)[1]
    model, steps, used = train_baseline(data, shape, sequences, seconds)
    plain = replace(machine, precision="fp32", compile=False)
    baseline, early = bits(model, plain), chapter4.evaluate(model, plain, data.val, data.bytes_of, 65536)[1]
    print(f"nanoGPT's settings: {baseline:.3f} bits per byte after {used:.0f} s, {steps:,} steps, "
          f"{steps * sequences * shape['context'] / used:,.0f} tokens/s")
    keep_memory()
    first, usual = pace(train_ours(data, ours_shape, machine, 60, **recipe)[1])      # pays for compiling
    steps = max(2, round((seconds - first) / usual))
    model, log = train_ours(data, ours_shape, machine, steps, evaluations=20, **recipe)
    clock, passed = first - log[0]["seconds"], None      # what the trial paid for compiling counts
    for row in log:
        clock += row["seconds"]
        if passed is None and row.get("val_bits_per_byte", math.inf) <= early:
            passed = clock
    ours = bits(model, machine)
    print(f"ours:               {ours:.3f} bits per byte after {clock:.0f} s, {steps:,} steps, "
          f"{log[-1]['tokens'] / clock:,.0f} tokens/s (compiling took {first - usual:.0f} s of them)")
    print(f"ratio {ours / baseline:.3f} (goal: at most 0.67 on Python, 0.82 on tinyshakespeare)")
    print("ours did not reach the baseline's last loss" if passed is None else
          f"ours passed the baseline's last loss after {passed:.0f} s, {passed / used:.3f} of its time (goal: 0.167)")


def speeds(data, shape, machine, steps):
    """Print tokens/s of our default, compiled and not, in both precisions."""
    keep_memory()
    for precision in ("bf16", "fp32"):
        for compiles in (True, False):
            log = train_ours(data, shape, replace(machine, precision=precision, compile=compiles), steps)[1]
            first, usual = pace(log)
            print(f"{precision} {'compiled' if compiles else 'as it is'} {log[0]['tokens'] / usual:10,.0f} tokens/s, "
                  f"first step {first:5.1f} s")


def resident():
    """Return the resident memory of this process in MB. Linux tells."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 / 1e6


def memory(data, shape, machine, steps):
    """Print resident memory early and late in a run."""
    if not Path("/proc/self/statm").exists():
        return print("resident memory: only Linux tells")
    seen = {}
    watch = lambda step: seen.update({step: resident()}) if step in (10, steps) else None
    train_ours(data, shape, machine, steps + 1, on_batch=watch)
    print(f"resident memory: {seen[10]:,.0f} MB at step 10, {seen[steps]:,.0f} MB at step {steps}, "
          f"ratio {seen[steps] / seen[10]:.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180, help="of training for each of the two")
    parser.add_argument("--out", type=Path, default=Path("out"), help="course folder with tokenizer and data")
    parser.add_argument("--sequences", type=int, default=12, help="a step of the baseline")
    parser.add_argument("--speeds", action="store_true", help="also measure tokens/s, compiled and not, bf16 and fp32")
    parser.add_argument("--memory", action="store_true", help="also measure resident memory, early and late")
    parser.add_argument("--only", choices=("speeds", "memory"), help="measure nothing but this")
    parser.add_argument("--steps", type=int, default=500, help="last step at which memory is measured")
    parser.add_argument("--context", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--no-compile", action="store_true", help="do not compile ours")
    parser.add_argument("--width", type=int, default=256, help="of ours; the baseline has 256")
    parser.add_argument("--dropout", type=float, default=0.0, help="of ours")
    parser.add_argument("--matrix-lr", type=float, default=0.01, help="of ours")
    flags = parser.parse_args()
    machine = chapter4.choose_machine(chapter4.TrainingConfig(device="cpu", compile=not flags.no_compile))
    data = Data(flags.out)
    shape = shape_of("small", vocab_size=data.vocab_size, context=flags.context)
    usual = GPTConfig(**shape)
    print(f"{usual.layers} layers of width {usual.width}, context {usual.context}, {torch.get_num_threads()} threads")
    if flags.only is None:
        ours = {**shape, "width": flags.width, "dropout": flags.dropout}
        compare(data, shape, machine, flags.seconds, flags.sequences, ours, {"matrix_lr": flags.matrix_lr})
    if flags.speeds or flags.only == "speeds":
        speeds(data, shape, machine, 24)
    if flags.memory or flags.only == "memory":
        memory(data, shape, machine, flags.steps)


if __name__ == "__main__":
    main()
