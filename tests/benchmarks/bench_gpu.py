"""How fast does the course train on a GPU, and is everything right there? For one NVIDIA GPU.

Run:    python tests/benchmarks/bench_gpu.py                     speeds at 124 million parameters, 240 s at most
        python tests/benchmarks/bench_gpu.py --checks            also what has to be equal or finite there, a minute
        python tests/benchmarks/bench_gpu.py --course            also the six scripts with their default flags
        python tests/benchmarks/bench_gpu.py --variants --checks nothing but the checks
        python tests/benchmarks/bench_gpu.py --preset gpu        speeds of the shape that is trained there by default
        python tests/benchmarks/bench_gpu.py --tiny --device cpu --no-compile --checks     tries the parts without a GPU
Prints: tokens/s, TFLOP/s, share of the chip's peak (MFU), memory and seconds to the first step, for each kind of
        attention and for nanoGPT's settings; a line ok or FAILED for each check; all in one table at the end.

Ours is a preset of chapter 3, modern-124m, under chapter 4's `train`: Muon and AdamW, the numbers of each step fetched.
nanoGPT's settings, in chapter 3's parts: LayerNorm without bias, learned positions, GELU, tied embeddings, fused
attention, AdamW for all weights, in a loop that waits for nothing. Both: bf16, torch.compile, the same micro-batches
of random tokens, as many a step as the preset has, clipping, 6 steps after 3; the median counts. Each variant has a
process of its own, so that one without memory or time ends alone; from the second on, some kernels are compiled
already when it looks for them.
"""
import argparse
import encodings
import io
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

NAMES = ("01_tokenizer", "02_data", "03_model", "04_train", "05_sample", "06_finetune")
chapter1, chapter2, chapter3, chapter4, chapter5, chapter6 = map(import_module, NAMES)
GPT, GPTConfig, CourseError = chapter3.GPT, chapter3.GPTConfig, chapter1.CourseError

NANOGPT = dict(norm="layernorm", positions="learned", mlp="gelu", qk_norm=False, norm_eps=1e-5, attention="fused")
TINY = dict(vocab_size=320, context=64, layers=2, heads=2, width=32)
VARIANTS = ["auto", "nanogpt", "formula", "blocks", "fused"]
PEAKS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "4090": 165, "3090": 71, "V100": 125,
         "T4": 65}  # 10^12 operations a second at 16 bits, without sparsity, as their makers state
WARM = 3  # steps that do not count
GOALS = {"auto": 1.0, "formula": 0.75, "blocks": 0.75}  # least share of the speed of nanoGPT's settings


# ---- Speed of training
class Enough(Exception):
    """Ends chapter 4's loop: nothing is evaluated and nothing saved."""


class Stopwatch:
    """The time at which each step began. On CUDA the GPU notes it, so that nobody has to wait."""

    def __init__(self, device):
        self.on_gpu = device.type == "cuda"
        self.start = time.perf_counter()
        self.marks = {}

    def mark(self, step):
        if step == 1:                                          # the first step, with compiling, is over
            if self.on_gpu:
                torch.cuda.synchronize()
            self.first = time.perf_counter() - self.start
        if self.on_gpu:
            self.marks[step] = torch.cuda.Event(enable_timing=True)
            self.marks[step].record()
        else:
            self.marks[step] = time.perf_counter()

    def seconds(self):
        """Return the seconds of each step after the first WARM."""
        times = [self.marks[step] for step in sorted(self.marks)][WARM:]
        if not self.on_gpu:
            return [end - begin for begin, end in zip(times, times[1:])]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in zip(times, times[1:])]


def make_model(variant, preset, tiny):
    """Return a model of a preset, with nanoGPT's settings if that is the variant."""
    shape = chapter3.shape_of(chapter3.PRESETS[preset])
    if tiny:
        shape.update(TINY)
    shape.update(NANOGPT if variant == "nanogpt" else {"attention": variant})
    torch.manual_seed(1)
    model = GPT(GPTConfig(**shape))
    for part in model.modules():
        if isinstance(part, torch.nn.LayerNorm):
            part.bias = None
    return model


def flops_of(model):
    """Return the operations to train on a token: 6 for each weight that is multiplied, and those of attention."""
    config = model.config
    weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed_positions" not in name)
    return 6 * (weights + config.layers * config.heads * config.head_width * config.context)


def peak_of(machine):
    """Return the chip's peak in operations a second, nan if it is not known."""
    name = torch.cuda.get_device_name(machine.device) if machine.device.type == "cuda" else ""
    return 1e12 * next((peak for part, peak in PEAKS.items() if part in name), math.nan)


def train_ours(model, batch, machine, flags, watch):
    """Train by chapter 4's loop. Returns what it printed."""
    values = {name: value for name, value in chapter3.PRESETS[flags.preset].items() if name not in chapter3.SHAPE}
    config = chapter4.TrainingConfig(**{**values, "micro_batch": flags.micro_batch, "eval_every": 10**9})

    def marked(step):
        watch.mark(step)
        if step == WARM + flags.steps:
            raise Enough
        return batch(step)

    with suppress(Enough), tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()) as printed:
        chapter4.train(model, marked, config, machine, Path(folder), None, None)
    return printed.getvalue()


def train_nanogpt(model, batch, machine, flags, watch):
    """Train as nanoGPT's loop does: the GPU is handed work and never waited for. Returns what was printed: nothing."""
    groups = [{"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
              {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    @torch.compile(disable=not machine.compile)
    def objective(x, y):
        return chapter4.loss_sums(model(x), y)

    for step in range(WARM + flags.steps):
        watch.mark(step)
        for group in optimizer.param_groups:
            group["lr"] = 6e-4 * (step + 1) / 2000
        x, y = [tensor.contiguous() for tensor in batch(step)]
        for micro_batch in machine.split((x, y), flags.micro_batch):
            with machine.autocast():
                loss = objective(*micro_batch)[0] / y.numel()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    watch.mark(WARM + flags.steps)
    return ""


def measure(variant, machine, flags):
    """Return a row of the table: how fast a variant trains, and what it takes."""
    watch = Stopwatch(machine.device)
    model = make_model(variant, flags.preset, flags.tiny).to(machine.device)
    T, V = model.config.context, model.config.vocab_size
    R = flags.micro_batch * flags.accumulate
    tokens = np.random.default_rng(0).integers(V, size=2**22, dtype=np.uint16)

    def batch(step):
        return tuple(map(torch.from_numpy, chapter2.get_batch(tokens, step, R, T, seed=1)))

    printed = (train_nanogpt if variant == "nanogpt" else train_ours)(model, batch, machine, flags, watch)
    speed = R * T / statistics.median(watch.seconds())
    flops = flops_of(model) * speed
    memory = torch.cuda.max_memory_allocated() if watch.on_gpu else math.nan
    return {"tokens/s": speed, "TFLOP/s": flops / 1e12, "MFU": flops / peak_of(machine), "GB": memory / 1e9,
            "first step, s": watch.first, "remark": "not compiled" if "not compiled" in printed else ""}


def measure_apart(variant, argv, seconds):
    """Return the row of a variant that a process of its own measures in so many seconds at most."""
    if seconds < 5:
        return {"remark": "left out: no time"}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "row.json"
        command = [sys.executable, __file__, *argv, "--variant", variant, "--result", str(result)]
        try:
            done = subprocess.run(command, timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"remark": f"stopped after {seconds:.0f} s"}
        return json.loads(result.read_text()) if result.exists() else {"remark": f"ended with {done.returncode}"}


def measure_here(variant, machine, flags):
    """Measure one variant in this process and write its row to --result; memory that runs out is a remark."""
    try:
        row = measure(variant, machine, flags)
    except (CourseError, torch.OutOfMemoryError) as error:
        if "out of memory" not in str(error):
            raise
        row = {"remark": f"out of memory at {flags.micro_batch} sequences"}
    if flags.result:
        flags.result.write_text(json.dumps(row))
    return row


def measure_all(machine, flags, argv):
    """Return {variant: row}; what auto stands for is measured once."""
    stands_for = chapter3.choose_attention("auto", flags.context)
    rows = {}
    end = time.monotonic() + flags.seconds
    for variant in flags.variants:
        start = time.monotonic()
        if variant == stands_for and "auto" in rows:
            rows[variant] = {**rows["auto"], "remark": "is what auto takes"}
            continue
        rows[variant] = measure_apart(variant, argv, end - start)
        print(f"{variant}: {time.monotonic() - start:.0f} s, {rows[variant]}", flush=True)
    return rows


def show_rows(rows, flags):
    """Print the table of variants, and what was hoped for."""
    columns = {"tokens/s": "12,.0f", "TFLOP/s": "9.1f", "MFU": "8.1%", "GB": "8.1f", "first step, s": "15.1f"}
    shape = "tiny shape" if flags.tiny else flags.preset
    print(f"\n{shape}: steps of {flags.accumulate} x {flags.micro_batch} sequences of {flags.context} tokens")
    print("attention   " + "".join(f"{name:>{re.match('[0-9]+', width)[0]}}" for name, width in columns.items())
          + "   of nanoGPT's  goal")
    for variant, row in rows.items():
        if "tokens/s" not in row:
            print(f"{variant:12}{row['remark']}")
            continue
        line = f"{variant:12}" + "".join(f"{row[name]:{width}}" for name, width in columns.items())
        share = row["tokens/s"] / rows.get("nanogpt", {}).get("tokens/s", math.nan)
        goal = f"{GOALS[variant]:6.2f} {'reached' if share >= GOALS[variant] else 'MISSED'}" if variant in GOALS else ""
        print(f"{line}{share:15.3f}{goal}  {row['remark']}")


# ---- Checks: what has to be equal, or finite
@contextmanager
def exactly():
    """Float32 products with all of their digits, instead of TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def small_model(machine, seed=0, std=0.1, **changes):
    """Return a small model whose weights are large enough that each part matters, in evaluation mode."""
    shape = dict(vocab_size=320, context=300, layers=2, heads=4, kv_heads=2, width=64, **changes)
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**shape))
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=std)
    return model.eval().to(machine.device)


def random_ids(R, T, seed=0):
    return torch.randint(320, (R, T), generator=torch.Generator().manual_seed(seed))


def distance(found, expected):
    """Return the largest difference, as a share of the largest number."""
    found, expected = found.detach().float().cpu(), expected.detach().float().cpu()
    return ((found - expected).abs().max() / expected.abs().max()).item()


def outputs(model, machine, documents):
    """Return (logits, gradient of the embeddings) of a model."""
    ids = random_ids(2, 301).to(machine.device)
    x, y = ids[:, :-1], ids[:, 1:]
    with torch.no_grad(), machine.autocast():
        logits = model(x, documents)
    with machine.autocast():
        loss = chapter4.loss_sums(model(x, documents), y)
    loss.sum().backward()
    return logits, model.embed_tokens.weight.grad


def compare_kinds(machine, limit):
    """Formula, blocks and fused kernel: logits and gradients, with and without documents."""
    texts = (torch.arange(300) // 77).expand(2, 300).to(machine.device)
    worst = 0.0
    for documents in (None, texts):
        expected = outputs(small_model(machine, attention="formula"), machine, documents)
        for kind in ("blocks", "fused"):
            for found, right in zip(outputs(small_model(machine, attention=kind), machine, documents), expected):
                worst = max(worst, distance(found, right))
    return worst < limit, f"{worst:.1e} apart"


def check_kinds_in_fp32(machine):
    with exactly():
        return compare_kinds(replace(machine, precision="fp32"), 1e-4)


def check_kinds_in_16_bits(machine):
    return compare_kinds(machine, 0.1)


def check_logits_equal_the_cpus(machine):
    ids = random_ids(2, 300)
    with exactly(), torch.no_grad():
        apart = distance(small_model(machine)(ids.to(machine.device)), small_model(CPU)(ids))
    return apart < 1e-4, f"{apart:.1e} apart"


def check_held_out_loss_equals_the_cpus(machine):
    tokens, sizes = random_ids(1, 2000)[0].numpy().astype(np.uint16), torch.ones(320, dtype=torch.int64)
    with exactly():
        places = [replace(machine, precision="fp32"), CPU]
        found = [chapter4.evaluate(small_model(place), place, tokens, sizes) for place in places]
    apart = max(abs(a / b - 1) for a, b in zip(*found))
    return apart < 1e-4, f"{apart:.1e} apart"


def check_a_folder_and_a_shorter_context(machine):
    ids = random_ids(2, 50).to(machine.device)
    with exactly(), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        model = small_model(machine, positions="learned")
        model.save(folder)
        apart = distance(GPT.load(folder, 50).to(machine.device)(ids), model(ids))
    return apart < 1e-6, f"{apart:.1e} apart"


def check_attention_maps(machine):
    ids = random_ids(1, 37)[0].tolist()
    with exactly():
        maps = [chapter5.attention_maps(small_model(machine, attention=kind), ids) for kind in ("formula", "fused")]
    apart = distance(maps[1], maps[0])
    sums = (maps[0].sum(-1) - 1).abs().max().item()
    return apart < 1e-4 and sums < 1e-4, f"{apart:.1e} apart, sums within {sums:.1e} of 1"


def check_cached_writing_equals_plain_writing(machine):
    """Past the context, greedily."""
    prompt = random_ids(1, 20)[0].tolist()
    settings = chapter5.Config(max_tokens=60, temperature=0.0)
    model = small_model(machine)
    model.config.context = 48
    with exactly():
        plain = list(chapter5.generate_naive(model, prompt, settings))
        cached = [new for (new,), _ in chapter5.generate(model, [prompt], settings)]
    equal = sum(a == b for a, b in zip(plain, cached))
    return equal == 60, f"{equal} of 60 ids equal, {len(set(plain))} different ones"


def learnable(step):
    """Two batches in turn, (8, 64): they can be learnt by heart."""
    ids = random_ids(8, 65, seed=step % 2)
    return ids[:, :-1], ids[:, 1:]


def train_some(machine, model, folder, batch=learnable, **changes):
    """Train by chapter 4's loop. Returns the log and what was printed."""
    config = chapter4.TrainingConfig(**{"steps": 16, "micro_batch": 4, "eval_every": 8, "warmup": 2, **changes})

    def judge(model):
        return 1.0, 1.0

    with redirect_stdout(io.StringIO()) as printed, mock.patch.object(chapter4, "draw_curves"):
        log = chapter4.train(model, batch, config, machine, Path(folder), judge, lambda model: None)
    return log, printed.getvalue()


def learns(log, model):
    """Return (whether a model has learnt, in numbers): it should know two batches by heart after a while."""
    first, last = log[0]["loss"], log[-1]["loss"]
    finite = all(math.isfinite(row["loss"]) for row in log) and all(p.isfinite().all() for p in model.parameters())
    return finite and last < 0.9 * first, f"loss {first:.2f} -> {last:.2f}"


def check_muon_learns(machine):
    model = small_model(machine, std=0.02, dropout=0.1)
    with tempfile.TemporaryDirectory() as folder:
        log, _ = train_some(machine, model, folder)
    return learns(log, model)


def check_fp16_learns(machine):
    model = small_model(machine, std=0.02)
    with tempfile.TemporaryDirectory() as folder:
        log, _ = train_some(replace(machine, precision="fp16"), model, folder, optimizer="adamw")
        scale = chapter4.read_checkpoint(Path(folder))["scaler"]["scale"]
    skipped = sum(not math.isfinite(row["grad_norm"]) for row in log)
    ok, text = learns(log, model)
    return ok and scale == 2.0**(16 - skipped), f"{text}, scale {scale:g}, {skipped} steps left out"


def check_adapters_learn(machine):
    """Adapters alone move; merged, they give the same logits."""
    model = small_model(machine, std=0.1)
    chapter6.add_lora(model, 8)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        log, _ = train_some(machine, model, folder, optimizer="adamw", lr=0.03)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    ids = random_ids(2, 64).to(machine.device)
    with exactly(), torch.no_grad():
        apart = distance(chapter6.merge_lora(model).to(machine.device).eval()(ids), model.eval()(ids))
    ok, text = learns(log, model)
    adapters = {name for name in before if name.endswith((".a", ".b"))}
    return ok and moved == adapters and apart < 1e-4, f"{text}, merged {apart:.1e} apart"


def resume(machine, **changes):
    """Compare a run that stops and goes on with one that does not, dropout included."""
    def ends(step):
        if step == 11:                                         # saved after 8
            raise Enough
        return learnable(step)

    with tempfile.TemporaryDirectory() as folder:
        whole, _ = train_some(machine, small_model(machine, std=0.02, dropout=0.1), Path(folder) / "whole", **changes)
        with suppress(Enough):
            train_some(machine, small_model(machine, std=0.02, dropout=0.1), Path(folder) / "two", batch=ends, **changes)
        saved = chapter4.read_checkpoint(Path(folder) / "two")
        steps = len(saved["log"])
        log, _ = train_some(machine, small_model(machine, seed=5, dropout=0.1), Path(folder) / "two", resume=True, **changes)
    apart = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(log, whole))
    text = f"losses {apart:.1e} apart after {steps} + {len(log) - steps} steps"
    return steps == 8 and len(log) == 16 and apart < 0.01, text


def check_resume(machine):
    return resume(machine)


def check_resume_in_fp16(machine):
    return resume(replace(machine, precision="fp16"), optimizer="adamw")


def check_batches_arrive_whole(machine):
    """Many copies at once, while the device is busy: none may be overwritten before it is read."""
    wholes = [random_ids(64, 257, seed=number) for number in range(40)]
    busy = torch.randn(2048, 2048, device=machine.device)
    copies = []
    for whole in wholes:
        if machine.device.type == "cuda":
            busy = busy @ busy / 2048
        copies.append(list(machine.split((whole[:, :-1], whole[:, 1:]), 16)))
    equal = 0
    for whole, parts in zip(wholes, copies):
        x, y = [torch.cat(tensors).cpu() for tensors in zip(*parts)]
        equal += torch.equal(x, whole[:, :-1]) and torch.equal(y, whole[:, 1:])
    return equal == 40, f"{equal} of 40 equal"


def check_time_of_a_batch(machine):
    """Told, not judged: a step of so many tokens takes a fast GPU 0.5 s."""
    tokens = np.random.default_rng(0).integers(320, size=2**20, dtype=np.uint16)
    best = {"get_batch": math.inf, "the copy": math.inf}
    for step in range(4):
        start = time.perf_counter()
        whole = [torch.from_numpy(ids) for ids in chapter2.get_batch(tokens, step, 512, 1024)]
        made = time.perf_counter()
        x, *_ = [x for x, _ in machine.split(whole, 32)]
        x.sum().item()
        seconds = {"get_batch": made - start, "the copy": time.perf_counter() - made}
        best = {name: min(best[name], seconds[name]) for name in best}
    text = "524,288 tokens: " + ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in best.items())
    if machine.device.type == "cuda":
        for name, ids in (("as they are", whole[0]), ("contiguous", whole[0].contiguous())):
            torch.cuda.synchronize()
            torch.cuda._sleep(2 * 10**8)                       # clock ticks: about 0.1 s
            start = time.perf_counter()
            list(machine.split([ids], 32))
            text += f"; {name}, it waits {1e3 * (time.perf_counter() - start):.1f} ms for a busy GPU"
            torch.cuda.synchronize()
    return None, text


def check_orthogonalise(machine):
    low, high = math.inf, 0.0
    for shape in ((3, 64, 256), (2, 256, 64), (2, 96, 192)):
        matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(machine.device)
        values = torch.linalg.svdvals(chapter4.orthogonalise(matrices).float())
        low, high = min(low, values.min().item()), max(high, values.max().item())
    return low > 0.5 and high < 1.3, f"singular values from {low:.2f} to {high:.2f}"


def check_time_of_optimizers(machine):
    """Told, not judged: at this size, a step of 524,288 tokens takes a fast GPU 0.5 s."""
    if machine.device.type != "cuda":
        return None, "not tried: only on CUDA"
    model = make_model("auto", "modern-124m", tiny=False).to(machine.device)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    found = {}
    for name, optimizer in chapter4.make_optimizers(model, chapter4.TrainingConfig()).items():
        optimizer.step()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(5):
            optimizer.step()
        torch.cuda.synchronize()
        found[name] = (time.perf_counter() - start) / 5
    return None, "124 million parameters: " + ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in found.items())


def check_advice_where_memory_is_full(machine):
    def greedy(step):
        return learnable(step) if step == 0 else torch.empty(2**50, dtype=torch.uint8, device=machine.device)

    with tempfile.TemporaryDirectory() as folder:
        try:
            train_some(replace(machine, compile=False), small_model(machine), folder, batch=greedy)
        except CourseError as error:
            return "--micro-batch" in str(error), str(error)
    return False, "no error"


def check_memory_stays_the_same(machine):
    if machine.device.type != "cuda":
        return None, "not tried: only CUDA tells"
    seen = {}

    def watching(step):
        seen[step] = torch.cuda.memory_allocated()
        return learnable(step)

    with tempfile.TemporaryDirectory() as folder:
        train_some(replace(machine, compile=False), small_model(machine), folder, batch=watching, steps=40, eval_every=20)
    return seen[39] <= 1.01 * seen[3], f"{seen[3] / 1e6:.1f} MB at step 4, {seen[39] / 1e6:.1f} MB at step 40"


def check_compiled_equals_uncompiled(machine):
    if not machine.compile:
        return None, "not tried: --no-compile"
    exact = replace(machine, precision="fp32")
    with exactly(), tempfile.TemporaryDirectory() as folder:
        plain, _ = train_some(replace(exact, compile=False), small_model(machine, std=0.02), folder, steps=4)
        log, printed = train_some(exact, small_model(machine, std=0.02), folder, steps=4)
    apart = max(abs(a[name] / b[name] - 1) for a, b in zip(log, plain) for name in ("loss", "grad_norm"))
    remark = "NOT COMPILED, " if "not compiled" in printed else ""
    return apart < 0.01 and not remark, f"{remark}losses and gradients {apart:.1e} apart"


CPU = chapter4.Machine(torch.device("cpu"), "fp32", False)
CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


def run_checks(machine, seconds):
    """Run all checks, print a line for each; return {verdict: how many}. "told" is neither right nor wrong."""
    print(f"\nchecks on {machine.device}")
    plain = replace(machine, compile=False)
    counts = {"ok": 0, "FAILED": 0, "told": 0, "left out": 0}
    end = time.monotonic() + seconds
    for check in CHECKS:
        start = time.monotonic()
        name = check.__name__.removeprefix("check_").replace("_", " ")
        if start > end:
            verdict, text = "left out", "no time"
        else:
            try:
                ok, text = check(machine if check is check_compiled_equals_uncompiled else plain)
            except Exception as error:
                ok, text = False, f"{type(error).__name__}: {error}".splitlines()[0]
            verdict = {True: "ok", False: "FAILED", None: "told"}[ok]
        counts[verdict] += 1
        print(f"{verdict:8} {name:40} {text} ({time.monotonic() - start:.1f} s)", flush=True)
    return counts


# ---- The course from end to end
COURSE = {  # script: its flags in a tiny run; by default it runs without any
    "01_tokenizer.py": ["--source", str(Path(encodings.__file__).parent), "--vocab-size", "600"],
    "02_data.py": [],
    "03_model.py": [],
    "04_train.py": ["--steps", "20", "--layers", "1", "--width", "32", "--heads", "2", "--batch-tokens", "512",
                    "--eval-every", "10"],
    "05_sample.py": ["--max-tokens", "20"],
    "06_finetune.py": ["--steps", "4", "--examples", "100", "--tasks", "1", "--batch-tokens", "512"],
}


def run_course(flags):
    """Run the six scripts, one after the other; return {script: seconds}, with what they found printed."""
    times = {}
    end = time.monotonic() + flags.course_seconds
    flags.out.mkdir(parents=True, exist_ok=True)
    for script, tiny in COURSE.items():
        command = [sys.executable, str(ROOT / script), "--out", str(flags.out), *(tiny if flags.tiny else [])]
        if script[:2] in ("04", "05", "06") and flags.device:
            command += ["--device", flags.device]
        if script[:2] in ("04", "06") and flags.no_compile:
            command += ["--no-compile"]
        path = flags.out / f"{script}.txt"
        start = time.monotonic()
        with open(path, "w", encoding="utf-8") as file:
            try:
                code = subprocess.run(command, stdout=file, stderr=file, timeout=max(1, end - start)).returncode
            except subprocess.TimeoutExpired:
                code = "no end in time"
        times[script] = time.monotonic() - start
        print(f"{script:18} {times[script]:6.1f} s", flush=True)
        text = path.read_text(encoding="utf-8", errors="replace")
        if code != 0:
            print(f"it ended with {code}:\n{text[-2000:]}")
            break
        for line in found_in(script, text):
            print(line)
    print(f"all {sum(times.values()):.0f} s")
    return times


def found_in(script, text):
    """Return the lines of a script's output that tell how good the model is."""
    if script.startswith("04"):
        found = re.findall(r"held-out loss ([\d.]+), ([\d.]+) bits per byte", text)
        best = min(found, key=lambda pair: float(pair[0]))
        return [f"  best held-out loss {best[0]}, {best[1]} bits per byte, of {len(found)} evaluations"]
    if script.startswith("06"):
        lines = text.splitlines()
        start = max(number for number, line in enumerate(lines) if "pass@1" in line)
        return ["  " + line for line in lines[start:]]
    return []


# ---- The script
def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--variants", nargs="*", default=VARIANTS, choices=VARIANTS, help="whose speed to measure (none: none)")
    parser.add_argument("--checks", action="store_true", help="check what has to be equal, or finite")
    parser.add_argument("--course", action="store_true", help="run the six scripts with their default flags in --out")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="root folder of --course")
    parser.add_argument("--preset", default="modern-124m", choices=chapter3.PRESETS, help="whose shape and settings to measure")
    parser.add_argument("--micro-batch", type=int, default=0, help="sequences at once (default: the preset's)")
    parser.add_argument("--accumulate", type=int, default=0, help="micro-batches a step (default: the preset's)")
    parser.add_argument("--steps", type=int, default=6, help=f"steps that count, after {WARM} that do not")
    parser.add_argument("--seconds", type=float, default=240, help="for the speed of all variants; who comes late is left out")
    parser.add_argument("--check-seconds", type=float, default=60, help="for the checks")
    parser.add_argument("--course-seconds", type=float, default=900, help="for the course")
    parser.add_argument("--device", default="", help="cuda, cuda:1, or cpu to try the parts (default: cuda)")
    parser.add_argument("--tiny", action="store_true", help="tiny models and few steps, to try the parts")
    parser.add_argument("--no-compile", action="store_true", help="do not compile")
    parser.add_argument("--variant", choices=VARIANTS, help="measure this one in this process")
    parser.add_argument("--result", type=Path, help="file for its row")
    flags = parser.parse_args(argv)
    preset = chapter3.PRESETS[flags.preset]
    flags.context = preset.get("context", GPTConfig.context)
    if flags.tiny:
        flags.context, flags.micro_batch, flags.accumulate, flags.steps = TINY["context"], 2, 2, 2
    flags.micro_batch = flags.micro_batch or preset["micro_batch"]
    flags.accumulate = flags.accumulate or preset["batch_tokens"] // (flags.micro_batch * flags.context)
    return flags


def main(argv):
    """Measure, check, run; return 1 if a check failed."""
    flags = parse(argv)
    if not flags.device and not torch.cuda.is_available():
        print("no GPU here, so nothing to measure; --tiny --device cpu --no-compile tries the parts")
        return 0
    begin = time.monotonic()
    settings = chapter4.TrainingConfig(device=flags.device or "cuda", compile=not flags.no_compile)
    machine = chapter4.choose_machine(settings)
    if flags.variant:
        measure_here(flags.variant, machine, flags)
        return 0
    where = torch.cuda.get_device_name(machine.device) if machine.device.type == "cuda" else "a CPU"
    print(f"torch {torch.__version__} on {where}", flush=True)
    rows, counts, times = {}, {}, {}
    if flags.variants:
        rows = measure_all(machine, flags, argv)
    if flags.checks:
        counts = run_checks(machine, flags.check_seconds)
    if flags.course:
        print(f"\nthe course in {flags.out}")
        times = run_course(flags)
    if rows:
        show_rows(rows, flags)
    if counts:
        print("checks: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    if times:
        print("course: " + ", ".join(f"{script[:2]} {seconds:.0f} s" for script, seconds in times.items()))
    print(f"torch {torch.__version__} on {where}, {machine.precision}; all of this took {time.monotonic() - begin:.0f} s")
    return 1 if counts.get("FAILED") else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
