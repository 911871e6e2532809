"""What does each kind of attention cost? Chapter 3's formula and blocks against the fused kernel of torch.

Run:    python tests/benchmarks/bench_attention.py                  all lengths, float32 and bfloat16
        python tests/benchmarks/bench_attention.py --lengths 256 --heads 2 --repeats 1
        python tests/benchmarks/bench_attention.py --device cuda --compile
Prints: milliseconds for the value and the gradients of q, k and v under the causal mask, the memory that
        one call adds at its peak, and both as a share of the fused kernel's, all from one run. The kinds
        take turns and the median counts, since other programs slow the machine now and then. On CUDA
        torch counts memory itself; on a CPU its profiler does, so that only tensors are counted.
"""
import argparse
import os
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces each start otherwise
import torch

chapter3 = import_module("03_model")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KINDS = ("fused", "formula", "blocks")


def step(function, inputs):
    """Compute attention and the gradients of q, k and v."""
    function(*inputs).sum().backward()
    for x in inputs:
        x.grad = None


def seconds_of(work, device):
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_bytes(work, device):
    """Return the most bytes that `work` has allocated and not yet freed at one time."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    used = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        used += event.nbytes()
        peak = max(peak, used)
    return peak


def measure(dtype, T, config, device):
    """Return {kind: (median seconds, bytes)} at one length, None for a kind that does not fit."""
    torch.manual_seed(0)
    shape = (config.batch, config.heads, T, config.width)
    inputs = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in "qkv"]
    works, found = {}, {}
    for kind in KINDS:
        visible = None if kind == "fused" else chapter3.who_sees(T, T, device=device)            # as GPT.forward does
        function = partial(chapter3.attention, visible=visible, kind=kind)
        works[kind] = partial(step, torch.compile(function, dynamic=False) if config.compile else function, inputs)
    for kind, work in list(works.items()):
        try:
            work()                                             # pays for what is set up once
            found[kind] = ([], peak_bytes(work, device))
        except torch.OutOfMemoryError:
            del works[kind]
    for _ in range(config.repeats):
        for kind, work in works.items():
            found[kind][0].append(seconds_of(work, device))
    return {kind: (median(found[kind][0]), found[kind][1]) if kind in found else None for kind in KINDS}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048], help="tokens in a sequence")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES, help="of q, k and v")
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--heads", type=int, default=12, help="heads")
    parser.add_argument("--width", type=int, default=64, help="width of a head")
    parser.add_argument("--repeats", type=int, default=7, help="turns that each kind takes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads on a CPU")
    parser.add_argument("--compile", action="store_true", help="let torch.compile join operations")
    config = parser.parse_args()
    torch.set_num_threads(config.threads)
    device = torch.device(config.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {config.threads} threads"
    print(f"{name}, torch {torch.__version__}, compile {config.compile}: B {config.batch}, H {config.heads}, D {config.width}")
    print(f"{'dtype':9} {'T':>5} {'kind':8} {'ms':>10} {'of fused':>9} {'MB':>9} {'of fused':>9}")
    for dtype in config.dtypes:
        for T in config.lengths:
            found = measure(DTYPES[dtype], T, config, device)
            for kind, result in found.items():
                if result is None or found["fused"] is None:
                    print(f"{dtype:9} {T:5} {kind:8} does not fit into memory")
                    continue
                (seconds, size), (fused_seconds, fused_size) = result, found["fused"]
                print(f"{dtype:9} {T:5} {kind:8} {1e3 * seconds:10.2f} {seconds / fused_seconds:9.2f} "
                      f"{size / 1e6:9.1f} {size / fused_size:9.2f}", flush=True)


if __name__ == "__main__":
    main()
