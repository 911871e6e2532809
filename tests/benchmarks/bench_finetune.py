"""Tuning all weights beside tuning thin adapters (LoRA), and the tuned folder beside transformers.

Run:    python tests/benchmarks/bench_finetune.py [--steps 300] [--ranks 0 8 32] [--out out]
Prints: for each rank (0: all weights) the parameters trained, the loss on held-out answers, tokens/s and the
        peak memory of the process; then, where transformers is installed, whether out/chat gives there the
        same prompt ids by apply_chat_template and the same greedy answers by generate.
"""
import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

chapter1, chapter5, chapter6 = map(import_module, ("01_tokenizer", "05_sample", "06_finetune"))
try:
    import transformers
except ImportError:
    transformers = None


def tune(out, rank, steps):
    """Run 06_finetune.py in a folder of its own; return (its first lines, log, peak MB or None)."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("tokenizer", "data", "base"):
            (Path(folder) / name).symlink_to((out / name).resolve(), target_is_directory=True)
        command = [sys.executable, ROOT / "06_finetune.py", "--out", folder, "--steps", str(steps), "--tasks", "1",
                   "--eval-every", str(steps), "--lora-rank", str(rank)]
        printed = Path(folder) / "printed.txt"
        with open(printed, "w", encoding="utf-8") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
            peak = os.wait4(process.pid, 0)[2].ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
        log = np.genfromtxt(Path(folder) / "chat" / "log.csv", delimiter=",", names=True, encoding="utf-8")
        return printed.read_text(encoding="utf-8"), log, peak


def compare_with_transformers(folder, count):
    """Print on how many instructions prompt and greedy answer are the same in transformers."""
    model, tokenizer, ends = chapter5.open_model(folder, "cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    template = transformers.AutoTokenizer.from_pretrained(folder)
    tasks = chapter6.held_out_tasks(chapter6.library_functions()[0], count, 0)
    settings, same = replace(chapter5.Config(), temperature=0.0, max_tokens=60), [0, 0]
    for _, _, turns in tasks:
        prompt = chapter5.render_chat(tokenizer, turns[:1])
        ids = template.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
        answer = [new[0][0] for new in chapter5.generate(model, [prompt], settings, ends, tokenizer.vocab_size)]
        written = theirs.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False)[0, len(prompt):].tolist()
        same = [same[0] + (ids == prompt), same[1] + (written == answer)]
    print(f"{folder} in transformers {transformers.__version__}: {same[0]} of {len(tasks)} prompts have equal ids, "
          f"{same[1]} greedy answers are equal token for token")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--ranks", type=int, nargs="*", default=[0, 8, 32])
    parser.add_argument("--out", type=Path, default=Path("out"), help="course folder with data, base and chat")
    parser.add_argument("--count", type=int, default=50, help="instructions compared with transformers")
    flags = parser.parse_args()
    print(f"{'rank':>5}{'trained':>12}{'answer loss':>13}{'tokens/s':>10}{'peak MB':>9}")
    for rank in flags.ranks:
        printed, log, peak = tune(flags.out, rank, flags.steps)
        trained = re.search(r"([\d,]+) parameters are trained", printed)
        print(f"{rank:5}{trained[1] if trained else 'all':>12}{log['val_loss'][-1]:13.3f}"
              f"{statistics.median(log['tokens_per_second']):10,.0f}{peak:9,.0f}")
    if transformers is None:
        print("transformers: not installed, not compared (pip install transformers jinja2)")
    else:
        compare_with_transformers(flags.out / "chat", flags.count)


if __name__ == "__main__":
    main()
