"""From GPT-2's recipe of 2019 to today's, one change a row: what does each bring in equal time on this machine?

Each row keeps the changes of those above it. All train the shape of the small preset on out/data for the same
seconds of training steps (compiling and evaluations are not counted; a dozen steps beforehand tell how many fit),
2,048 tokens a step, a linear fall of the learning rate to zero at the last step. The column "equal tokens" reads
the logs where the slowest row ended; the faster ones had not lowered their learning rate there as far, which
speaks against them.

Run:    python tests/benchmarks/bench_ablation.py [--seconds 90] [--seeds 1 2] [--figure out/ablation.png]
Prints: bits per byte on held-out text at the end and at equal tokens, mean over the seeds and half their range;
        tokens/s; draws the curves. On two CPU cores it takes about 40 minutes; nothing else should run beside it.
"""
import argparse
from pathlib import Path

import numpy as np
from bench_training import Data, chapter1, chapter3, chapter4, pace, shape_of, train_ours
from matplotlib.figure import Figure

FIRST = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "bias": True, "qk_norm": False, "precision": "fp32",
         "compile": False, "optimizer": "adamw", "lr": 1e-3, "matrix_lr": 1e-3}
CHANGES = {  # a row's name, and what it changes: each is a flag of 04_train.py
    "GPT-2's recipe, 2019": {},
    "+ RMSNorm, no biases": {"norm": "rmsnorm", "bias": False},
    "+ RoPE": {"positions": "rope"},
    "+ SwiGLU": {"mlp": "swiglu"},
    "+ QK-norm": {"qk_norm": True},
    "+ a learning rate of 3e-3": {"lr": 3e-3},
    "+ bf16": {"precision": "bf16"},
    "+ torch.compile": {"compile": True},
    "+ Muon: the default": {"optimizer": "muon", "lr": chapter4.TrainingConfig.lr, "matrix_lr": chapter4.TrainingConfig.matrix_lr},
}
TRAINING = ("optimizer", "lr", "matrix_lr")


def curve_of(data, base, settings, seconds, seeds):
    """Train one row for each seed; return (tokens read, bits per byte (seeds, evaluations), tokens/s)."""
    machine = chapter4.choose_machine(chapter4.TrainingConfig(device="cpu", precision=settings["precision"],
                                                              compile=settings["compile"]))
    changes = {name: settings[name] for name in TRAINING}
    shape = {**base, **chapter3.shape_of(settings)}
    _, usual = pace(train_ours(data, shape, machine, 24, **changes)[1])
    steps, curves, speeds = max(20, round(seconds / usual)), [], []
    for seed in seeds:
        log = train_ours(data, shape, machine, steps, evaluations=8, limit=16384, seed=seed, **changes)[1]
        seen = [row for row in log if "val_bits_per_byte" in row]
        curves.append([row["val_bits_per_byte"] for row in seen])
        speeds.append(log[0]["tokens"] / pace(log)[1])
    return np.array([row["tokens"] for row in seen]), np.array(curves), np.mean(speeds)


def draw(results, path):
    """Draw bits per byte against tokens and against the share of the time."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    styles = [(color, line) for line in ("-", "--", ":") for color in ("#000000", "#0072b2", "#d55e00")]
    for (color, line), (name, (tokens, curves, speed)) in zip(styles, results.items()):
        mean = curves.mean(axis=0)
        left.plot(tokens / 1e6, mean, line, color=color, label=name)
        right.plot(tokens / speed, mean, line, color=color)
    left.set(xlabel="million tokens read", ylabel="bits per byte, held out", yscale="log")
    right.set(xlabel="seconds of training")
    for axis in (left, right):
        axis.yaxis.set_minor_formatter("{x:.1f}")
        axis.yaxis.set_major_formatter("{x:.1f}")
    left.legend(fontsize=8)
    chapter1.save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90, help="of training steps for each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path("out"), help="course folder with tokenizer and data")
    parser.add_argument("--figure", type=Path, default=Path("out/ablation.png"), help="the picture to draw")
    flags = parser.parse_args()
    data, results, settings = Data(flags.out), {}, FIRST
    for name, change in CHANGES.items():
        settings = {**settings, **change}
        base = shape_of("small", vocab_size=data.vocab_size, context=256)
        results[name] = tokens, curves, speed = curve_of(data, base, settings, flags.seconds, flags.seeds)
        print(f"{name}: {curves[:, -1]} after {tokens[-1]:,} tokens, {speed:,.0f} tokens/s", flush=True)
    fewest = min(tokens[-1] for tokens, _, _ in results.values())
    print(f"\n| {flags.seconds:.0f} s each, seeds {flags.seeds} | bits per byte | at {fewest / 1e6:.2f} M tokens | tokens/s |"
          "\n|---|---|---|---|")
    for name, (tokens, curves, speed) in results.items():
        equal = [np.interp(fewest, tokens, curve) for curve in curves]
        print(f"| {name} | {curves[:, -1].mean():.3f} ± {np.ptp(curves[:, -1]) / 2:.3f} "
              f"| {np.mean(equal):.3f} | {speed:,.0f} |")
    draw(results, flags.figure)
    print(f"drew {flags.figure}")


if __name__ == "__main__":
    main()
