"""Chapter 4: training equals its definition, a resumed run an unbroken one, Muon torch's own; and what is refused.

Tiny models in float32 on one core; nothing is compiled but where that is the subject.
"""
import csv
import math
import os
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
chapter1, chapter2, chapter3, chapter4 = map(import_module, ("01_tokenizer", "02_data", "03_model", "04_train"))
CourseError, IGNORED, GPT, read_checkpoint = chapter1.CourseError, chapter4.IGNORED, chapter3.GPT, chapter4.read_checkpoint
CPU = chapter4.Machine(torch.device("cpu"), "fp32", False)
SETTINGS = chapter4.TrainingConfig(steps=8, batch_tokens=64, micro_batch=4, lr=3e-3, matrix_lr=0.02, warmup=2, eval_every=4)
ADAMW = replace(SETTINGS, optimizer="adamw")
TINY = dict(vocab_size=320, context=16, layers=2, heads=2, width=32)
DRAW = chapter4.draw_curves


def model_of(seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(chapter3.GPTConfig(**{**TINY, **changes}))


def full_batch(step):
    """Random ids: x and y, each (4, 16)."""
    ids = torch.randint(320, (4, 17), generator=torch.Generator().manual_seed(step))
    return ids[:, :-1], ids[:, 1:].clone()


def batch(step):
    """The same, with few targets in the first two sequences."""
    x, y = full_batch(step)
    y[0, 2:], y[1, 9:] = IGNORED, IGNORED
    return x, y


def sums_of(model, x, y, documents=None):
    return chapter4.loss_sums(model(x, documents), y)


def judge(model):
    """A held-out loss that depends on the weights; dropout is off."""
    assert not model.training
    with torch.no_grad():
        return sums_of(model, *batch(10**6))[0].item() / 42, 1.0


def train(folder, config=SETTINGS, model=None, machine=CPU, judge=judge, keep=lambda model: None, batch=batch, resume=False):
    """Train a tiny model; returns (model, log)."""
    model = model or model_of()
    return model, chapter4.train(model, batch, replace(config, resume=resume), machine, Path(folder), judge, keep)


def signalled(at, times=1):
    """A batch that sends this process Ctrl-C in step `at`."""
    def interrupted(step):
        for _ in range(times * (step == at)):
            os.kill(os.getpid(), signal.SIGINT)
        return batch(step)
    return interrupted


def same(first, second):
    """Tell whether two nests of dicts and tensors are equal to the bit."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[name], second[name]) for name in first)
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def column(log, name):
    return [row[name] for row in log if name in row]


def use_sgd(monkeypatch):
    """Plain SGD: AdamW and Muon magnify rounding where a gradient is nearly 0."""
    monkeypatch.setattr(chapter4, "make_optimizers",
                        lambda model, config: {"adamw": torch.optim.SGD(model.parameters(), lr=1.0)})


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def rows_of(path):
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One core, and no pictures, which take a second each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(chapter4, "draw_curves", lambda logs, path: Path(path).write_text("drawn"))
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """Return a root folder with a tokenizer and data, as chapters 1 and 2 leave them."""
    root = tmp_path_factory.mktemp("course")
    (root / "corpus").mkdir()
    for number in range(60):
        (root / "corpus" / f"{number}.py").write_text(
            f"def scale_{number}(value):\n    return value * {number}\n\n\nclass Box{number}:\n    pass\n" * 3,
            encoding="utf-8")
    chapter1.main(chapter1.Config(source=[str(root / "corpus")], vocab_size=300, out=str(root / "out")))
    chapter2.main(chapter2.Config(out=str(root / "out")))
    return root / "out"


@pytest.fixture
def main(course, tmp_path):
    """Return a function that runs the chapter on the course's data with some flags; it returns out/base."""
    def with_flags(*flags, out=tmp_path / "out"):
        out.mkdir(exist_ok=True)
        for part in ("tokenizer", "data"):
            if not (out / part).exists():
                (out / part).symlink_to(course / part)
        argv = ["--out", str(out), *map(str, flags)]
        chapter4.main(chapter1.parse_flags(chapter4.Config, "", argv, chapter4.defaults_for))
        return out / "base"
    return with_flags


HERE = ("--no-compile", "--device", "cpu", "--precision", "fp32")
QUICK = ("--steps", 8, "--batch-tokens", 64, "--eval-every", 4, "--eval-tokens", 64, *HERE)
SHAPE = ("--layers", 2, "--heads", 2, "--width", 32, "--context", 16)


# ---- The definition, and what is equal to it

def test_train_equals_its_definition_to_the_bit(tmp_path):
    config = replace(ADAMW, weight_decay=0.0, clip=0.0)
    naive, fast = model_of(), model_of()
    learnable = lambda step: full_batch(step % 2)
    losses = chapter4.train_naive(naive, learnable, config)
    _, log = train(tmp_path, config, fast, batch=learnable)
    assert losses == column(log, "loss") and losses[-1] < losses[0] and same(naive.state_dict(), fast.state_dict())


@pytest.mark.parametrize("micro_batch", [8, 4, 2, 1, 3])       # 1 x 4 = 2 x 2 = 4 x 1
def test_accumulated_gradients_equal_the_definition_under_masks(tmp_path, monkeypatch, micro_batch):
    model, (x, y) = model_of(), batch(0)
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=IGNORED)
    loss.backward()
    found, clip = [], torch.nn.utils.clip_grad_norm_
    def spying(parameters, limit):
        parameters = list(parameters)
        found.extend(p.grad.clone() for p in parameters)
        return clip(parameters, limit)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spying)
    _, log = train(tmp_path, replace(SETTINGS, steps=1, micro_batch=micro_batch))
    assert log[0]["loss"] == pytest.approx(loss.item(), rel=1e-6) and log[0]["tokens"] == 64
    for p, gradient in zip(model.parameters(), found, strict=True):
        assert torch.allclose(gradient, p.grad, rtol=1e-4, atol=1e-7)


def test_documents_reach_the_model(tmp_path):
    x, y = batch(0)
    documents = torch.arange(16).expand(4, 16) // 8
    expected = sums_of(model_of(), x, y, documents).item() / int((y != IGNORED).sum())
    _, log = train(tmp_path, replace(SETTINGS, steps=1, micro_batch=3), batch=lambda step: (x, y, documents))
    assert log[0]["loss"] == pytest.approx(expected, rel=1e-6)


def test_a_seed_gives_the_same_losses(tmp_path):
    losses = lambda seed: column(train(tmp_path, replace(SETTINGS, seed=seed), model_of(dropout=0.3))[1], "loss")
    assert losses(1) == losses(1) != losses(2)                 # the weights are equal: this is dropout alone


SETUP = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from test_04_train import *
torch.set_num_threads(1)
chapter4.draw_curves = lambda logs, path: None
"""


def script(code, *arguments, **environment):
    """Start a Python that runs some code after SETUP."""
    return subprocess.Popen([sys.executable, "-c", SETUP + code, *map(str, arguments)], text=True, encoding="utf-8",
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **environment})


PROCESSES = """
import torch._dynamo                                           # takes seconds, so before the processes part

def child(world, rank, port):
    names = dict(WORLD_SIZE=world, RANK=rank, LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in names.items()})
    sys.stdout = open(folder / f"{rank}.out", "w")
    machine = chapter4.choose_machine(chapter4.TrainingConfig(device="cpu", precision="fp32", compile=False))
    model, log = train(folder, config, machine=machine)
    torch.save({"model": model.state_dict(), "log": log}, folder / f"{rank}.pt")
    batch_of = signalled(5) if rank == world - 1 else batch
    train(folder / "stopped", replace(config, steps=10**6), machine=machine, batch=batch_of)

chapter4.make_optimizers = lambda model, config: {"adamw": torch.optim.SGD(model.parameters(), lr=1.0)}
config = replace(SETTINGS, steps=3, micro_batch=1, lr=1.0, eval_every=100)
folder, world, port = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
folder.mkdir()
started = []
for rank in range(world):
    started.append(os.fork())
    if started[-1] == 0:
        sys.exit(child(world, rank, port))
print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started])
"""


def test_processes_equal_one_and_stop_together(tmp_path, monkeypatch):
    """Two, and three, which share four sequences unevenly."""
    started = {}
    for world in (2, 3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            started[world] = script(PROCESSES, tmp_path / str(world), world, free.getsockname()[1])
    use_sgd(monkeypatch)
    model, log = train(tmp_path / "one", replace(SETTINGS, steps=3, lr=1.0, eval_every=100))
    start = model_of().state_dict()
    for world, process in started.items():
        out, error = process.communicate(timeout=120)
        assert out.split("\n")[0] == str([130] * world), error  # one was asked to stop, all do
        folder = tmp_path / str(world)
        assert len(read_checkpoint(folder / "stopped")["log"]) == 6
        assert [(folder / f"{rank}.out").stat().st_size > 0 for rank in range(world)] == [True] + [False] * (world - 1)
        for rank in range(world):
            found = torch.load(folder / f"{rank}.pt", weights_only=True)
            for name in ("loss", "grad_norm", "tokens"):
                assert column(found["log"], name) == pytest.approx(column(log, name), rel=1e-5)
            for name, value in model.state_dict().items():
                moved, expected = found["model"][name] - start[name], value - start[name]
                assert (moved - expected).norm() <= 1e-5 * expected.norm() + 1e-7, name


def test_compiled_equals_uncompiled_and_saves_plain_names(tmp_path, monkeypatch):
    """All of torch.compile but the C++ compiler, which takes half a minute."""
    use_sgd(monkeypatch)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    config = replace(SETTINGS, steps=2, lr=1.0)
    _, log = train(tmp_path / "plain", config)
    _, compiled = train(tmp_path, config, machine=replace(CPU, compile=True), keep=lambda model: model.save(tmp_path))
    for name in ("loss", "grad_norm"):
        assert column(compiled, name) == pytest.approx(column(log, name), rel=1e-5)
    saved = read_checkpoint(tmp_path)["model"]
    assert not any("_orig_mod" in name for name in saved) and same(saved, GPT.load(tmp_path).state_dict())


def test_without_a_compiler_training_goes_on(tmp_path):
    """Neither gradients of the attempt are left, nor has dropout's random state moved on."""
    process = script("train(sys.argv[1], replace(SETTINGS, steps=2), model_of(dropout=0.3), replace(CPU, compile=True))",
                     tmp_path, CXX="/nonexistent", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
                     TORCHINDUCTOR_COMPILE_THREADS="1")
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in error, error
    assert len([line for line in out.splitlines() if "not compiled" in line]) == 1
    _, log = train(tmp_path / "plain", replace(SETTINGS, steps=2), model_of(dropout=0.3))
    for name in ("loss", "grad_norm"):
        assert column(read_checkpoint(tmp_path)["log"], name) == column(log, name)


def test_one_block_is_compiled_and_evaluation_compiles_nothing(tmp_path, monkeypatch):
    """One piece for all blocks, one for the norm, one for the loss; with adapters, no two blocks are alike."""
    pieces = []
    def backend(graph, inputs):
        pieces.append(graph)
        return graph.forward
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    machine = replace(CPU, compile=True)
    torch._dynamo.reset()
    train(tmp_path, replace(SETTINGS, steps=12), model_of(layers=10), machine, batch=full_batch)
    assert len(pieces) == 3
    adapted = model_of(layers=10)
    for block in adapted.layers:
        torch.nn.utils.parametrize.register_parametrization(block.mlp.up_proj, "weight", torch.nn.Identity())
    chapter4.compile_parts(adapted, full_batch(0), SETTINGS, machine)
    assert len(pieces) == 3 + 10
    torch._dynamo.reset()


# ---- Schedule and optimizers

def test_the_learning_rate_at_its_corners():
    scale = lambda step, **more: chapter4.lr_scale(step, chapter4.TrainingConfig(**{"steps": 100, "warmup": 10, **more}))
    assert scale(0, steps=10**9) == pytest.approx(0.1)         # the first step is not lost
    assert scale(9, steps=10**9) == pytest.approx(1.0) and scale(50) == pytest.approx(0.5)
    assert scale(99) == pytest.approx(0.01) and scale(100) == 0
    assert scale(0, warmup=0) == 1 and 0 < scale(1, steps=2, warmup=10) < 0.2


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_every_weight_has_one_optimizer_and_the_scheduled_rate(tmp_path, monkeypatch, kind):
    model = model_of(tied=False, bias=True, norm="layernorm")
    frozen = model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    before = frozen.clone()
    made = chapter4.make_optimizers(model, replace(SETTINGS, optimizer=kind))
    groups = [(name, group) for name, optimizer in made.items() for group in optimizer.param_groups]
    owned = [id(p) for _, group in groups for p in group["params"]]
    assert sorted(owned) == sorted(map(id, model.parameters()))
    decayed = {id(p) for _, group in groups for p in group["params"] if group["weight_decay"]}
    assert decayed == {id(p) for p in model.parameters() if p.ndim == 2}
    hidden = {id(p) for name, p in model.named_parameters() if name.startswith("layers.") and p.ndim == 2}
    for_muon = {id(p) for name, group in groups if name == "muon" for p in group["params"]}
    assert for_muon == (hidden - {id(frozen)} if kind == "muon" else set())
    monkeypatch.setattr(chapter4, "make_optimizers", lambda *_: made)
    _, log = train(tmp_path, model=model)
    last = chapter4.lr_scale(7, SETTINGS)
    assert log[-1]["lr_scale"] == last and torch.equal(frozen, before)
    assert all(group["lr"] == last * (3e-3 if name == "adamw" else 0.02) for name, group in groups)


def test_muon_equals_torchs_and_stacks_equal_single_matrices():
    """Within the noise of bf16: 3% of the way, in six steps."""
    torch.manual_seed(0)
    start = [torch.randn(shape) * 0.05 for shape in ((64, 24), (24, 64), (32, 32), (24, 64))]          # tall, wide, square
    stacked, single, torchs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(3))
    optimizers = [chapter4.Muon(stacked, 0.02, 0.1), *[chapter4.Muon([p], 0.02, 0.1) for p in single],
                  torch.optim.Muon(torchs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")]
    for step in range(6):
        for parameters in zip(stacked, single, torchs):
            gradient = torch.randn(parameters[0].shape) * 0.01
            for p in parameters:
                p.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
        for began, p, alone, theirs in zip(start, stacked, single, torchs):
            assert (p - theirs).norm() < 0.03 * (theirs - began).norm()
            assert (p - alone).norm() < 0.01 * (alone - began).norm()


@pytest.mark.parametrize("shape", [(3, 20, 80), (2, 80, 20), (1, 48, 64)])
def test_orthogonalise_gives_singular_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = chapter4.orthogonalise(matrices).float()
    values = torch.linalg.svdvals(made)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    assert values.min() > 0.6 and values.max() < 1.3
    assert F.cosine_similarity((u @ v).flatten(1), made.flatten(1)).min() > 0.97           # the same directions


def test_another_device_is_reached_by_all():
    """On meta, numbers that stay on the CPU are an error."""
    model = model_of().to("meta")
    sums_of(model, *[tensor.to("meta") for tensor in full_batch(0)]).sum().backward()
    optimizer = chapter4.Muon([p for p in model.layers.parameters() if p.ndim == 2], 0.02, 0.1)
    optimizer.step()
    assert {state["average"].device.type for state in optimizer.state.values()} == {"meta"}


# ---- Precision, clipping, numbers out of range

class Scaled(chapter4.Machine):
    """fp16's loss scaling with products in float32: a power of two must leave no trace."""

    def autocast(self):
        return nullcontext()


SCALED = Scaled(torch.device("cpu"), "fp16", False)


def test_gradients_are_clipped_after_the_scale_is_out(tmp_path):
    plain, log = train(tmp_path, replace(ADAMW, clip=0.1))
    scaled, scaled_log = train(tmp_path, replace(ADAMW, clip=0.1), machine=SCALED)
    assert column(scaled_log, "grad_norm") == pytest.approx(column(log, "grad_norm"), rel=1e-4)
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(plain.parameters(), scaled.parameters()))


def test_clipping_shortens_the_gradient(tmp_path, monkeypatch):
    use_sgd(monkeypatch)
    before = torch.cat([p.detach().flatten().clone() for p in model_of().parameters()])
    for clip in (0.25, 0.0):                                   # 0: as it is
        after, log = train(tmp_path, replace(SETTINGS, steps=1, clip=clip, lr=1.0, warmup=0))
        moved = torch.cat([p.detach().flatten() for p in after.parameters()]) - before
        assert log[0]["grad_norm"] > 0.25 and moved.norm().item() == pytest.approx(clip or log[0]["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_weights_stay_float32(tmp_path, precision):
    model, log = train(tmp_path, ADAMW, machine=replace(CPU, precision=precision))
    exact = column(train(tmp_path, ADAMW)[1], "loss")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert column(log, "loss") != exact and column(log, "loss") == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("masked", [slice(2), slice(None)])    # a micro-batch, a whole step
def test_what_has_no_targets_is_no_nan(tmp_path, masked):
    def masking(step):
        x, y = full_batch(step)
        y[masked] = IGNORED
        return x, y
    model, log = train(tmp_path, replace(SETTINGS, micro_batch=2), batch=masking)
    assert all(p.isfinite().all() for p in model.parameters()) and all(map(math.isfinite, column(log, "loss")))


def spoil(monkeypatch, steps):
    """Let the loss be nan in some steps (of one micro-batch each)."""
    loss_sums, calls = chapter4.loss_sums, []
    def spoiled(logits, y):
        is_step = torch.is_grad_enabled()
        calls.extend([1] * is_step)
        return loss_sums(logits, y) * (math.nan if is_step and len(calls) - 1 in steps else 1)
    monkeypatch.setattr(chapter4, "loss_sums", spoiled)


def test_fp16_lowers_its_scale_and_goes_on_but_not_for_ever(tmp_path, monkeypatch):
    spoil(monkeypatch, range(3))
    model, log = train(tmp_path, ADAMW, machine=SCALED)
    assert [math.isfinite(norm) for norm in column(log, "grad_norm")] == [False] * 3 + [True] * 5
    assert read_checkpoint(tmp_path)["scaler"]["scale"] == 2**16 / 2**3
    assert not same(model_of().state_dict(), model.state_dict()) and all(p.isfinite().all() for p in model.parameters())
    spoil(monkeypatch, range(10**6))
    with pytest.raises(CourseError, match="lower --lr"):
        train(tmp_path, replace(ADAMW, steps=40), machine=SCALED)


@pytest.mark.parametrize("first_bad", [2, 6])                  # before the first evaluation, and after it
def test_nan_ends_a_run_and_leaves_what_was_good(tmp_path, monkeypatch, first_bad):
    train(tmp_path, replace(SETTINGS, steps=4))
    before = files_in(tmp_path)
    spoil(monkeypatch, range(first_bad, 100))
    with pytest.raises(CourseError, match="loss or gradient is nan: lower --lr and --matrix-lr"):
        train(tmp_path, judge=lambda model: (1.0, 1.0))
    assert (files_in(tmp_path) == before) == (first_bad == 2) and files_in(tmp_path).keys() == before.keys()
    rows = rows_of(tmp_path / "diverged" / "log.csv")          # beside the good ones, with its picture
    assert [row["loss"] == "nan" for row in rows] == [False] * first_bad + [True]
    assert files_in(tmp_path / "diverged").keys() == {"log.csv", "loss.png"}


@pytest.mark.parametrize("held", ["log.csv", "loss.png"])
def test_a_viewer_that_holds_log_or_picture_open_ends_no_run(tmp_path, monkeypatch, held):
    def refuse(path, content):
        if path.name == held:                                  # as Windows does
            raise PermissionError(13, "held open", str(path))
        path.write_text("drawn", encoding="utf-8")
    monkeypatch.setattr(chapter1, "write_table", refuse)
    monkeypatch.setattr(chapter4, "draw_curves", lambda log, path: refuse(path, log))
    _, log = train(tmp_path)
    assert len(log) == 8 and len(read_checkpoint(tmp_path)["log"]) == 8 and not (tmp_path / held).exists()


def test_a_held_out_loss_that_is_no_number_is_not_kept(tmp_path):
    _, log = train(tmp_path, judge=lambda model: (math.nan, 1.0), keep=lambda model: pytest.fail("kept"))
    assert len(log) == 8


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")])
def test_out_of_memory_names_the_flags_that_help(tmp_path, monkeypatch, error):
    def full(*_):
        raise error
    monkeypatch.setattr(chapter4, "loss_sums", full)
    with pytest.raises(CourseError, match="out of memory: .*--micro-batch .* --context"):
        train(tmp_path)


# ---- Stopping and resuming

CASES = {"plain": {}, "dropout": dict(dropout=0.3), "accumulation": dict(micro_batch=1),
         "adamw": dict(optimizer="adamw"), "bf16": dict(precision="bf16")}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stop", [3, 4])                       # between evaluations, and at one
def test_stopped_and_resumed_equals_unbroken_to_the_bit(tmp_path, capfd, case, stop):
    changes = dict(CASES[case])
    dropout = changes.pop("dropout", 0.0)
    config, handler = replace(SETTINGS, **changes), signal.getsignal(signal.SIGINT)
    machine = replace(CPU, precision=config.precision or "fp32")
    train(tmp_path / "whole", config, model_of(5, dropout=dropout), machine)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "parts", config, model_of(5, dropout=dropout), machine, batch=signalled(stop - 1))
    printed = capfd.readouterr()
    assert stopped.value.code == 130 and "stopping after this step" in printed.err and "--resume" in printed.out
    assert signal.getsignal(signal.SIGINT) == handler
    saved = read_checkpoint(tmp_path / "parts")
    assert len(saved["log"]) == stop
    torch.manual_seed(123)                                     # the new process stands elsewhere in its random numbers
    train(tmp_path / "parts", config, model_of(99, dropout=dropout), machine, resume=True)
    whole, parts = read_checkpoint(tmp_path / "whole"), read_checkpoint(tmp_path / "parts")
    for end in (whole, parts):
        end["config"].pop("resume")
        for row in end["log"]:
            for name in ("seconds", "tokens_per_second", *["val_loss", "val_bits_per_byte"] * (row["step"] % 4 > 0)):
                row.pop(name, None)                            # to stop is to evaluate
    assert same(whole, parts)


def test_asked_before_its_first_step_a_run_takes_one_and_saves(tmp_path, monkeypatch):
    monkeypatch.setattr(chapter4, "compile_parts", lambda *_: os.kill(os.getpid(), signal.SIGINT) or chapter4.loss_sums)
    with pytest.raises(SystemExit):
        train(tmp_path)
    assert len(read_checkpoint(tmp_path)["log"]) == 1


def test_asked_in_its_last_step_a_run_is_over_as_usual(tmp_path, capfd):
    _, log = train(tmp_path, batch=signalled(7))
    assert len(log) == 8 and "stopped" not in capfd.readouterr().out and len(read_checkpoint(tmp_path)["log"]) == 8


def test_asked_twice_it_stops_at_once_and_other_errors_pass(tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, batch=signalled(2, times=2))
    for error in (RuntimeError("something else"), BrokenPipeError(32, "Broken pipe")):     # as with `| head`
        monkeypatch.setattr(chapter4, "lr_scale", lambda *_: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            train(tmp_path)
    assert not list(tmp_path.iterdir()) and signal.getsignal(signal.SIGINT) == handler


def test_killed_in_the_middle_of_a_save_then_resumed(tmp_path):
    killed = script("""
save, calls = torch.save, []
def dying(state, file):
    calls.append(1)
    if len(calls) == 2:
        file.write(b"half of it")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, file)
torch.save = dying
train(sys.argv[1])
""", tmp_path)
    _, error = killed.communicate(timeout=60)
    saved = read_checkpoint(tmp_path)
    assert killed.returncode == -signal.SIGKILL and len(saved["log"]) == 4, error
    parts, _ = train(tmp_path, model=model_of(9), resume=True)
    assert same(train(tmp_path / "whole")[0].state_dict(), parts.state_dict())


def test_a_full_disk_leaves_the_last_save_whole(tmp_path, monkeypatch):
    train(tmp_path, replace(SETTINGS, steps=4))
    before, opened = files_in(tmp_path), open
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", lambda path, *more, **named: opened(
            "/dev/full" if str(path).endswith(".tmp") else path, *more, **named))
        with pytest.raises(OSError, match="No space left"):    # which `chapter1.run` prints as one line
            train(tmp_path)
    assert files_in(tmp_path) == before


def test_the_best_is_kept(tmp_path):
    losses, kept = iter([3.0, 2.0, 2.5, 2.1, 1.0, 1.5, 1.4]), []
    more = dict(judge=lambda model: (next(losses), 1.0), keep=lambda model: kept.append(1))
    _, log = train(tmp_path, replace(SETTINGS, steps=16), **more)
    assert column(log, "val_loss") == [3.0, 2.0, 2.5, 2.1] and len(kept) == 2 and len(log) == 16
    _, log = train(tmp_path, replace(SETTINGS, steps=28), resume=True, **more)
    assert column(log, "val_loss")[4:] == [1.0, 1.5, 1.4] and len(kept) == 3


def test_a_finished_run_says_so_and_goes_on_with_more_steps(tmp_path, capsys):
    train(tmp_path)
    _, log = train(tmp_path, resume=True)
    assert "8 of 8 steps are done" in capsys.readouterr().out and len(log) == 8
    saved = read_checkpoint(tmp_path)
    for row in saved["log"]:                                   # a log may have had other columns
        row["older"] = row.pop("lr_scale")
    torch.save(saved, tmp_path / "resume.pt")
    _, log = train(tmp_path, replace(SETTINGS, steps=12), resume=True)
    rows = rows_of(tmp_path / "log.csv")
    assert [float(row["tokens"]) for row in rows] == [64 * step for step in range(1, 13)]
    assert [row["lr_scale"] == "nan" for row in rows] == [True] * 8 + [False] * 4 and "older" not in rows[0]
    assert [row["val_loss"] != "nan" for row in rows] == [False, False, False, True] * 3
    DRAW(log, tmp_path / "all.png")
    assert (tmp_path / "all.png").read_bytes()[:4] == b"\x89PNG"


# ---- Evaluation

def test_evaluation_by_its_definition(monkeypatch):
    model = model_of().eval()
    tokens = np.random.default_rng(0).integers(0, 320, 16 * 11 + 5).astype(np.uint16)
    bytes_of = torch.arange(320) % 7 + 1
    nats, size = {}, {}
    for start in range(0, 16 * 11, 16):                        # eleven whole sequences
        with torch.no_grad():
            chances = model(torch.tensor(tokens[None, start:start + 16].astype(np.int64))).log_softmax(-1)[0]
        targets = tokens[start + 1:start + 17].astype(int)
        nats[start] = -sum(chances[position, target].item() for position, target in enumerate(targets))
        size[start] = sum(target % 7 + 1 for target in targets)
    calls, forward = [], GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda self, ids, *more: calls.append(len(ids)) or forward(self, ids, *more))
    for at_once in (11, 2):                                    # as if so many sequences fitted the memory
        model.config.vocab_size = 2**24 // 16 // at_once
        for limit, chosen in ((0, range(11)), (10**6, range(11)), (16 * 11, range(11)), (16 * 4, (0, 3, 6, 9)), (1, (0,))):
            total = sum(nats[16 * i] for i in chosen)
            loss, bits = chapter4.evaluate(model, CPU, tokens, bytes_of, limit)
            assert loss == pytest.approx(total / (16 * len(chosen)), rel=1e-5), limit
            assert bits == pytest.approx(total / math.log(2) / sum(size[16 * i] for i in chosen), rel=1e-5)
        assert max(calls[-4:]) == min(2, at_once) or at_once == 11
    with pytest.raises(CourseError, match="16 held-out tokens: use more text or a smaller --context"):
        chapter4.evaluate(model, CPU, np.arange(16), bytes_of, 100)


# ---- The script

def test_the_script_says_what_it_uses_and_leaves_the_best_for_the_world(main, capsys):
    base = main(*SHAPE, *QUICK)
    printed = capsys.readouterr().out
    for words in ("precision='fp32'", "compile=False", "layers=2", "hidden=128", "vocab_size=320", "steps=8", "lr=0.006",
                  "micro_batch=16", "preset='small'", "bits per byte", "loss 5.7", f"{math.log(320):.2f}"):
        assert words in printed, words
    assert same(GPT.load(base).state_dict(), read_checkpoint(base)["model"])
    assert set(files_in(base)) == {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json",
                                   "tokenizer_config.json", "resume.pt", "log.csv", "loss.png"}
    rows = rows_of(base / "log.csv")
    assert len(rows) == 8 and float(rows[0]["loss"]) == pytest.approx(math.log(320), rel=0.03)
    main("--test", *HERE)
    tested = capsys.readouterr().out
    assert "all of val: loss" in tested and "all of test: loss" in tested and "replaces" not in tested
    assert "all of test" not in printed                        # one looks once, on request


def test_the_script_resumes_to_the_bit_with_its_own_settings(main, tmp_path, monkeypatch, capsys):
    flags = (*SHAPE, *QUICK, "--norm", "layernorm", "--positions", "learned", "--mlp", "gelu", "--dropout", 0.2)
    whole = GPT.load(main(*flags, "--preset", "small", out=tmp_path / "whole")).state_dict()
    get_batch, calls = chapter2.get_batch, []
    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return get_batch(*arguments)
    monkeypatch.setattr(chapter2, "get_batch", interrupted)
    with pytest.raises(SystemExit):
        main(*flags)
    base = main("--resume")                                    # the checkpoint is all that it needs
    assert same(whole, GPT.load(base).state_dict()) and GPT.load(base).config.norm == "layernorm"
    main("--resume")
    printed = capsys.readouterr().out
    assert "8 of 8 steps are done" in printed and "replaces" not in printed
    main("--resume", "--steps", 10)                            # a flag that is given wins
    saved = read_checkpoint(base)
    assert len(saved["log"]) == 10 and saved["config"]["steps"] == 10 and saved["config"]["dropout"] == 0.2
    capsys.readouterr()
    main(*flags)
    assert "\nthis run replaces the one in" in capsys.readouterr().out


def test_presets_hold_shape_and_recipe():
    names, usual = {item.name for item in fields(chapter4.Config)}, chapter4.TrainingConfig()
    for name, preset in chapter3.PRESETS.items():
        assert preset.keys() <= names and (not preset or {"steps", "batch_tokens", "micro_batch", "lr", "matrix_lr"} <= preset.keys()), name
    assert chapter3.PRESETS["small"] == {} and usual.steps > 0                 # the defaults
    config = chapter1.parse_flags(chapter4.Config, "", ["--preset", "gpu", "--layers", "9"], chapter4.defaults_for)
    assert (config.layers, config.width, config.steps, config.vocab_size) == (9, 384, chapter3.PRESETS["gpu"]["steps"], 0)


def test_a_model_that_is_there_keeps_its_shape_but_may_be_cropped(main, tmp_path, capsys):
    base = main(*SHAPE, *QUICK)
    new = main(*QUICK, "--init", base, "--steps", 1, "--lr", 0, "--matrix-lr", 0, out=tmp_path / "new")
    assert same(GPT.load(base).state_dict(), GPT.load(new).state_dict())
    capsys.readouterr()
    cropped = main(*QUICK, "--init", base, "--context", 8, out=tmp_path / "cropped")
    printed = capsys.readouterr().out
    assert GPT.load(cropped).config.context == 8 and "context=8" in printed
    assert f"lr={chapter4.GENTLE['lr']}" in printed and "layers=2" in printed
    for start in (("--resume",), ("--init", base), ("--test",)):
        for flag in (("--layers", 3), ("--preset", "gpu"), ("--norm", "layernorm")):
            with pytest.raises(CourseError, match=f"{flag[0]} is for new models"):
                main(*start, *flag)
    with pytest.raises(CourseError, match="--optimizer is for new"):
        main("--resume", "--optimizer", "adamw")


def test_another_tokenizer_is_refused_with_the_command_that_mends_it(main, tmp_path):
    chapter1.train_bpe(["some other text " * 9], 290).save(tmp_path / "other")
    model_of().save(tmp_path / "other")
    with pytest.raises(CourseError, match=f"02_data.py --out .*out --tokenizer {tmp_path / 'other'}`"):
        main(*QUICK, "--init", tmp_path / "other")


@pytest.mark.parametrize("flags, words", [
    (("--preset", "huge"), "small.*gpu"), (("--optimizer", "sgd"), "muon.*adamw"), (("--precision", "fp8"), "fp16"),
    (("--resume",), "resume.pt"), (("--device", "nonsense"), "--device nonsense"), (("--init", "nowhere"), "nowhere"),
    (("--context", 10**6), "smaller --context"), (("--attention", "flash"), "choose one of"), (("--steps", 0), "--steps"),
    (("--micro-batch", 0), "at least 1"), (("--width", 33), "multiple of --heads")])
def test_bad_flags_are_explained_in_one_line(main, monkeypatch, flags, words):
    monkeypatch.setattr(chapter4, "draw_curves", DRAW)
    with pytest.raises((CourseError, OSError), match=words) as error:          # `run` prints both as one line
        main(*QUICK, *flags)
    assert "\n" not in str(error.value)


def test_what_argparse_refuses_has_status_2_and_fp16_takes_adamw(main, capsys):
    for flags in (("--warmup", "-3"), ("--clip", "-1"), ("--lr", "nan"), ("--lr", "fast"), ("--no-such-flag",)):
        with pytest.raises(SystemExit) as stopped:
            main(*flags)
        assert stopped.value.code == 2
    config = chapter4.TrainingConfig(device="cpu", precision="fp16")
    machine = chapter4.choose_machine(config)
    assert (machine.precision, config.optimizer) == ("fp16", "adamw") and "adamw" in capsys.readouterr().out


def test_a_reader_that_leaves_is_no_disk_error(course, tmp_path):
    for part in ("tokenizer", "data"):
        (tmp_path / part).symlink_to(course / part)
    command = [sys.executable, ROOT / "04_train.py", "--out", tmp_path, *SHAPE, *QUICK, "--steps", 10**6]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "Machine" in process.stdout.readline()
    process.stdout.close()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0 and error == "", error
