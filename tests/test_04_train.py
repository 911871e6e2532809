"""Chapter 4: the loop, its checkpoints, and what it refuses. Tiny models, one core, no network."""
import csv
import math
import os
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
chapter1, chapter2, chapter3, chapter4 = map(import_module, ("01_tokenizer", "02_data", "03_model", "04_train"))
CourseError, IGNORED, GPT = chapter1.CourseError, chapter4.IGNORED, chapter3.GPT
CPU = chapter4.Machine(torch.device("cpu"), "fp32", False)
SETTINGS = chapter4.TrainingConfig(steps=8, batch_tokens=64, micro_batch=4, lr=3e-3, matrix_lr=0.02, warmup=2,
                                   eval_every=4)
TINY = dict(vocab_size=320, context=16, layers=2, heads=2, width=32)


def model_of(seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(chapter3.GPTConfig(**{**TINY, **changes}))


def batch(step):
    """Random ids; what is learnt from differs much between the rows."""
    random = torch.Generator().manual_seed(step)
    rows = torch.randint(320, (4, 17), generator=random)
    y = rows[:, 1:].clone()
    y[0, 2:], y[1, 9:] = IGNORED, IGNORED
    return rows[:, :-1], y, None


def judge(model):
    """A held-out loss that depends on the weights."""
    with torch.no_grad():
        x, y, _ = batch(10**6)
        return chapter4.Objective(model)(x, y).item() / 42, 1.0, "remark"


def train(folder, config=SETTINGS, model=None, machine=CPU, judge=judge, keep=lambda model: None, batch=batch, **more):
    """Train a tiny model; returns (model, log)."""
    model = model or model_of()
    return model, chapter4.train(model, batch, config, machine, folder, judge, keep, **more)


def resumed(folder, **flags):
    """Return (checkpoint, config) as --resume would."""
    return chapter4.read_checkpoint(Path(folder) / "resume.pt", chapter4.TrainingConfig(resume=True, **flags))


def same(first, second):
    """Tell whether two state dicts are equal to the bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def untimed(log):
    """Return a log without the clock; NaN, which is not equal to itself, becomes None."""
    return [{name: None if value != value else value for name, value in row.items()
             if name not in ("seconds", "tokens_per_second")} for row in log]


DRAW = chapter4.draw_curves


@pytest.fixture(autouse=True)
def usual(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["04_train.py"])          # a flag that was typed counts as given
    monkeypatch.setattr(chapter4, "draw_curves", lambda logs, path: None)                  # half a second each


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """Return a root folder with a tokenizer and data, as chapters 1 and 2 leave them."""
    root = tmp_path_factory.mktemp("course")
    (root / "corpus").mkdir()
    for number in range(40):
        (root / "corpus" / f"{number}.py").write_text(
            f"def scale_{number}(value):\n    return value * {number}\n\n\nclass Box{number}:\n    pass\n" * 3,
            encoding="utf-8")
    chapter1.main(chapter1.Config(source=[str(root / "corpus")], vocab_size=300, out=str(root / "out"), workers=1))
    chapter2.main(chapter2.Config(out=str(root / "out"), workers=1))
    return root / "out"


@pytest.fixture
def main(course, tmp_path, monkeypatch):
    """Return a function that runs the chapter on the course's data with some flags; it returns out/base."""
    monkeypatch.setitem(chapter3.PRESETS, "small", TINY)
    for part in ("tokenizer", "data"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / part).symlink_to(course / part)

    def with_flags(*flags, out=tmp_path / "out"):
        argv = ["--out", str(out), *map(str, flags)]
        monkeypatch.setattr(sys, "argv", ["04_train.py", *argv])
        chapter4.main(chapter1.parse_flags(chapter4.Config, "", argv))
        return out / "base"

    return with_flags


FLAGS = ("--steps", 8, "--batch-tokens", 64, "--micro-batch", 2, "--eval-every", 4, "--eval-tokens", 64, "--no-compile",
         "--device", "cpu", "--precision", "fp32")


# ---- Schedule and optimizers

def test_the_learning_rate_at_its_corners():
    usual = dict(steps=100, warmup=10)
    share = lambda step, **more: chapter4.lr_share(step, chapter4.TrainingConfig(**{**usual, **more}))
    assert share(0, steps=10**9) == pytest.approx(0.1)         # first step: 1 / warmup, not 0
    assert share(9, steps=10**9) == pytest.approx(1.0) and share(50) == pytest.approx(0.5)
    assert share(99) == pytest.approx(0.01) and share(100) == 0 == share(101)
    assert share(0, warmup=0) == 1 and 0 < share(1, steps=2, warmup=10) < 0.2


def test_each_optimizer_gets_the_scheduled_rate(tmp_path, monkeypatch):
    seen, make = [], chapter4.make_optimizers
    def spying(model, config):
        made = make(model, config)
        groups = [group for optimizer in made.values() for group in optimizer.param_groups]
        made["adamw"].register_step_pre_hook(lambda *_: seen.append([group["lr"] for group in groups]))
        return made
    monkeypatch.setattr(chapter4, "make_optimizers", spying)
    _, log = train(tmp_path)
    for step, (row, rates) in enumerate(zip(log, seen, strict=True)):
        share = chapter4.lr_share(step, SETTINGS)
        assert row["lr_share"] == share and rates == pytest.approx([share * 3e-3, share * 3e-3, share * 0.02])


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_every_weight_has_one_optimizer(kind):
    model = model_of(tied=False, bias=True)
    model.norm.weight.requires_grad_(False)
    made = chapter4.make_optimizers(model, replace(SETTINGS, optimizer=kind))
    groups = [(name, group) for name, optimizer in made.items() for group in optimizer.param_groups]
    owned = [id(p) for _, group in groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    decayed = {id(p) for _, group in groups for p in group["params"] if group["weight_decay"]}
    assert decayed == {id(p) for p in model.parameters() if p.ndim == 2}
    hidden = {id(p) for name, p in model.named_parameters() if name.startswith("layers.") and p.ndim == 2}
    for_muon = {id(p) for name, group in groups if name == "muon" for p in group["params"]}
    assert for_muon == (hidden if kind == "muon" else set())


# ---- One step: gradients, precision, clipping

def gradients(monkeypatch, folder, micro_batch, machine=CPU):
    """Return the gradients of step 0 as they reach the clipping, and the logged loss."""
    found, clip, model = [], torch.nn.utils.clip_grad_norm_, model_of()
    def spying(parameters, limit):
        parameters = list(parameters)
        found.append([p.grad.clone() for p in parameters])
        return clip(parameters, limit)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", spying)
        _, log = train(folder, replace(SETTINGS, steps=1, micro_batch=micro_batch), model, machine)
    return found[0], log[0]["loss"]


@pytest.mark.parametrize("micro_batch", [8, 4, 2, 1, 3])
def test_accumulated_gradients_equal_the_definition_under_masks(tmp_path, monkeypatch, micro_batch):
    model, (x, y, _) = model_of(), batch(0)
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=IGNORED)
    loss.backward()
    found, logged = gradients(monkeypatch, tmp_path, micro_batch)
    assert logged == pytest.approx(loss.item(), rel=1e-6)
    for p, gradient in zip(model.parameters(), found, strict=True):
        assert torch.allclose(gradient, p.grad, rtol=1e-4, atol=1e-7)


def test_documents_reach_the_model(tmp_path, monkeypatch):
    x, y, _ = batch(0)
    documents = torch.arange(16).expand(4, 16) // 8
    expected = chapter4.Objective(model_of())(x, y, documents).item() / int((y != IGNORED).sum())
    _, log = train(tmp_path, replace(SETTINGS, steps=1, micro_batch=3), batch=lambda step: (x, y, documents))
    assert log[0]["loss"] == pytest.approx(expected, rel=1e-6)


def test_a_step_without_targets_is_no_nan(tmp_path):
    nothing = lambda step: (batch(step)[0], torch.full((4, 16), IGNORED), None)
    model, log = train(tmp_path, batch=nothing)
    assert [row["loss"] for row in log] == [0.0] * 8 and all(p.isfinite().all() for p in model.parameters())


class Scaled(chapter4.Machine):
    """fp16's loss scaling with products in float32: a power of two must leave no trace."""

    def autocast(self):
        return nullcontext()


def test_gradients_are_clipped_after_the_scale_is_out(tmp_path):
    config = replace(SETTINGS, clip=0.1)
    plain, log = train(tmp_path, config)
    scaled, scaled_log = train(tmp_path, config, machine=Scaled(torch.device("cpu"), "fp16", False))
    assert [row["grad_norm"] for row in scaled_log] == pytest.approx([row["grad_norm"] for row in log], rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(plain.parameters(), scaled.parameters()))
    assert all(row["clipped"] for row in log)
    assert not any(row["clipped"] for row in train(tmp_path, replace(SETTINGS, clip=1e9))[1])


def test_clipping_shortens_the_gradient(tmp_path, monkeypatch):
    monkeypatch.setattr(chapter4, "make_optimizers", lambda model, config: {"sgd": torch.optim.SGD(model.parameters())})
    before = torch.cat([p.detach().flatten().clone() for p in model_of().parameters()])
    after, log = train(tmp_path, replace(SETTINGS, steps=1, clip=0.25, lr=1.0, warmup=0))
    moved = torch.cat([p.detach().flatten() for p in after.parameters()]) - before
    assert log[0]["grad_norm"] > 0.25 and moved.norm().item() == pytest.approx(0.25, rel=1e-3)


def test_weights_stay_float32_under_bf16(tmp_path):
    model, log = train(tmp_path, machine=replace(CPU, precision="bf16"))
    _, exact = train(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    losses, expected = [row["loss"] for row in log], [row["loss"] for row in exact]
    assert losses != expected and losses == pytest.approx(expected, rel=0.02)


def test_a_seed_gives_the_same_losses(tmp_path):
    run = lambda seed: train(tmp_path, replace(SETTINGS, seed=seed), model_of(dropout=0.3))
    losses = lambda seed: [row["loss"] for row in run(seed)[1]]
    assert losses(1) == losses(1) != losses(2)                 # the weights are equal: this is dropout alone


# ---- Resuming

CASES = {"plain": {}, "dropout": dict(dropout=0.3), "accumulation": dict(micro_batch=1),
         "adamw": dict(optimizer="adamw"), "bf16": dict(precision="bf16")}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stop", [3, 4])                       # between evaluations, and at one
def test_stopped_and_resumed_equals_unbroken_to_the_bit(tmp_path, case, stop):
    changes = dict(CASES[case])
    make = lambda seed=5: model_of(seed, dropout=changes.get("dropout", 0.0))
    config = replace(SETTINGS, **{name: value for name, value in changes.items() if name != "dropout"})
    machine = replace(CPU, precision=config.precision or "fp32")
    whole, log = train(tmp_path / "whole", config, make(), machine)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "parts", replace(config, stop_at=stop), make(), machine)
    assert stopped.value.code == 0
    saved, config = resumed(tmp_path / "parts")
    assert saved["step"] == stop and len(saved["log"]) == stop and config.stop_at == 0
    torch.manual_seed(123)                                     # the new process stands elsewhere in its random numbers
    parts, parts_log = train(tmp_path / "parts", config, make(99), machine, saved=saved)
    assert same(whole.state_dict(), parts.state_dict())
    assert untimed(log) == untimed(parts_log)
    ends = [torch.load(tmp_path / name / "resume.pt", weights_only=True) for name in ("whole", "parts")]
    for name in set(ends[0]) & {"adamw", "muon"}:
        first, second = (end[name]["state"] for end in ends)
        assert first.keys() == second.keys() and all(same(first[i], second[i]) for i in first)
    assert (ends[0]["best"], ends[0]["worse"]) == (ends[1]["best"], ends[1]["worse"])


def test_the_log_and_its_picture_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(chapter4, "draw_curves", DRAW)
    with pytest.raises(SystemExit):
        train(tmp_path, replace(SETTINGS, stop_at=5))
    rows = lambda: list(csv.DictReader((tmp_path / "log.csv").read_text(encoding="utf-8").splitlines()))
    assert [int(row["step"]) for row in rows()] == [1, 2, 3, 4, 5]
    saved, config = resumed(tmp_path)
    _, log = train(tmp_path, config, saved=saved)
    assert [int(row["tokens"]) for row in rows()] == [64 * step for step in range(1, 9)]
    assert [float(row["loss"]) for row in rows()] == pytest.approx([row["loss"] for row in log])
    assert [row["val_loss"] != "nan" for row in rows()] == [False, False, False, True] * 2
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_the_checkpoint_holds_the_choices_made(main):
    base = main("--batch-tokens", 32, "--steps", 2, "--eval-every", 2, "--eval-tokens", 32, "--no-compile",
                "--device", "cpu")
    saved = torch.load(base / "resume.pt", weights_only=True)["config"]
    assert saved["precision"] in ("fp32", "bf16") and saved["compile"] is False
    assert (saved["preset"], saved["micro_batch"], saved["matrix_lr"]) == ("small", 8, 0.01)


@pytest.mark.parametrize("flag, value", [
    ("seed", 2), ("lr", 0.1), ("micro_batch", 8), ("steps", 9), ("batch_tokens", 128), ("precision", "bf16"),
    ("compile", True), ("optimizer", "adamw"), ("init", "x")])
def test_a_flag_that_contradicts_is_refused_by_name(tmp_path, flag, value):
    with pytest.raises(SystemExit):
        train(tmp_path, replace(SETTINGS, stop_at=2))
    with pytest.raises(CourseError, match=f"--{flag.replace('_', '-')} {value} contradicts"):
        resumed(tmp_path, **{flag: value})


def test_flags_that_agree_or_may_change_are_taken(tmp_path, monkeypatch):
    with pytest.raises(SystemExit):
        train(tmp_path, replace(SETTINGS, stop_at=2, seed=7, patience=5))
    _, config = resumed(tmp_path, seed=7, lr=3e-3, stop_at=6)
    assert (config.stop_at, config.patience, config.seed, config.resume) == (6, 5, 7, True)
    assert resumed(tmp_path, patience=9)[1].patience == 9
    monkeypatch.setattr(sys, "argv", ["04_train.py", "--resume", "--seed=1"])              # the default, but typed
    with pytest.raises(CourseError, match="--seed 1 contradicts"):
        resumed(tmp_path)


def test_another_preset_or_context_is_refused(main):
    main(*FLAGS)
    for flag, value in (("--preset", "gpu"), ("--context", 8), ("--dropout", 0.5)):
        with pytest.raises(CourseError, match=f"{flag} {value} contradicts"):
            main("--resume", flag, value)


def test_other_data_or_tokenizer_is_refused(tmp_path):
    with pytest.raises(SystemExit):
        train(tmp_path, replace(SETTINGS, stop_at=2), facts={"tokenizer": "abc", "data": 1})
    saved, config = resumed(tmp_path)
    for facts in ({"tokenizer": "abd", "data": 1}, {"tokenizer": "abc", "data": 2}):
        with pytest.raises(CourseError, match="--resume"):
            train(tmp_path, config, facts=facts, saved=saved)
    train(tmp_path, config, facts={"tokenizer": "abc", "data": 1}, saved=saved)


def test_a_damaged_or_missing_checkpoint_is_one_line(tmp_path):
    with pytest.raises(CourseError, match="FileNotFoundError"):
        resumed(tmp_path)
    with pytest.raises(SystemExit):
        train(tmp_path, replace(SETTINGS, stop_at=2))
    data = (tmp_path / "resume.pt").read_bytes()
    for damaged in (data[:len(data) // 2], b"", b"hello"):
        (tmp_path / "resume.pt").write_bytes(damaged)
        with pytest.raises(CourseError, match="no run can be resumed") as error:
            resumed(tmp_path)
        assert "\n" not in str(error.value)


def test_a_finished_run_may_be_resumed(tmp_path):
    model, log = train(tmp_path)
    saved, config = resumed(tmp_path)
    again, again_log = train(tmp_path, config, model_of(9), saved=saved)
    assert same(model.state_dict(), again.state_dict()) and len(again_log) == len(log) == 8


# ---- Saving that fails

@pytest.mark.parametrize("where", ["torch.save", "os.replace"])
def test_a_save_that_fails_leaves_the_last_one_whole(tmp_path, monkeypatch, where):
    with pytest.raises(SystemExit):
        train(tmp_path, replace(SETTINGS, stop_at=3))
    before = (tmp_path / "resume.pt").read_bytes()
    saved, config = resumed(tmp_path)

    def half(state, path):
        Path(path).write_bytes(before[:1000])
        raise OSError(28, "No space left on device")

    def refused(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((torch, "save", half) if where == "torch.save" else (os, "replace", refused)))
        with pytest.raises(CourseError, match="No space left"):
            train(tmp_path, config, model_of(), saved=saved)
    assert (tmp_path / "resume.pt").read_bytes() == before and not list(tmp_path.glob("*.tmp*"))
    whole, _ = train(tmp_path / "whole")
    saved, config = resumed(tmp_path)
    parts, _ = train(tmp_path, config, model_of(9), saved=saved)
    assert same(whole.state_dict(), parts.state_dict())


SETUP = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch
from test_04_train import *
chapter4.draw_curves = lambda logs, path: None
"""


def script(code, *arguments, **environment):
    """Start a Python that runs some code after SETUP."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([sys.executable, "-c", SETUP + code, *map(str, arguments)], text=True, encoding="utf-8",
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def test_killed_in_the_middle_of_a_save_then_resumed(tmp_path):
    killed = script("""
save, calls = torch.save, []
def dying(state, path):
    calls.append(1)
    if len(calls) == 2:
        Path(path).write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, path)
torch.save = dying
train(sys.argv[1])
""", tmp_path)
    out, error = killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL, error
    saved, config = resumed(tmp_path)
    assert saved["step"] == 4
    parts, _ = train(tmp_path, config, model_of(9), saved=saved)
    assert same(train(tmp_path / "whole")[0].state_dict(), parts.state_dict())


# ---- Numbers out of range

def spoil(monkeypatch, steps):
    """Let the loss be NaN in some steps (counted by micro-batches: one a step)."""
    forward, calls = chapter4.Objective.forward, []
    def spoiled(self, *rows):
        calls.append(self.training)
        loss = forward(self, *rows)
        return loss * math.nan if self.training and calls.count(True) - 1 in steps else loss
    monkeypatch.setattr(chapter4.Objective, "forward", spoiled)


def test_one_bad_step_is_skipped(tmp_path, monkeypatch):
    spoil(monkeypatch, {2})
    model, log = train(tmp_path, judge=lambda model: (1.0, 1.0, ""))
    assert [math.isfinite(row["grad_norm"]) for row in log] == [True, True, False] + [True] * 5
    assert all(p.isfinite().all() for p in model.parameters())


def test_lasting_nan_stops_and_names_the_last_good_state(tmp_path, monkeypatch):
    spoil(monkeypatch, range(5, 100))
    with pytest.raises(CourseError, match="last good state is .*resume.pt"):
        train(tmp_path, replace(SETTINGS, steps=40), judge=lambda model: (1.0, 1.0, ""))
    saved = torch.load(tmp_path / "resume.pt", weights_only=True)
    assert saved["step"] <= 8 and all(value.isfinite().all() for value in saved["model"].values())
    spoil(monkeypatch, range(100))
    with pytest.raises(CourseError, match="was not saved"):
        train(tmp_path / "other", replace(SETTINGS, steps=40, eval_every=40))


def test_bad_weights_do_not_replace_a_good_checkpoint(tmp_path):
    calls = []
    def poison(model):
        calls.append(1)
        if len(calls) == 2:
            model.norm.weight.data.fill_(math.nan)
        return math.nan if len(calls) == 2 else 1.0, 1.0, ""
    kept = []
    with pytest.raises(CourseError, match="no longer finite"):
        train(tmp_path, judge=poison, keep=lambda model: kept.append(1))
    saved = torch.load(tmp_path / "resume.pt", weights_only=True)
    assert saved["step"] == 4 and saved["model"]["norm.weight"].isfinite().all() and kept == [1]


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")])
@pytest.mark.parametrize("compile", [False, True])
def test_out_of_memory_names_the_flag(tmp_path, monkeypatch, error, compile):
    def full(self, *_):
        raise error
    monkeypatch.setattr(chapter4.Objective, "forward", full)
    monkeypatch.setattr(torch, "compile", lambda module, disable: module)                  # as if in its first call
    with pytest.raises(CourseError, match="--micro-batch 4: 2 needs half, and twice as many"):
        train(tmp_path, machine=replace(CPU, compile=compile))


def test_other_errors_pass(tmp_path):
    def broken(step):
        raise RuntimeError("something else")
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="something else"):
        train(tmp_path, batch=broken)
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


@pytest.mark.parametrize("name", ["steps", "batch_tokens", "micro_batch", "eval_every"])
def test_impossible_settings_name_the_flag(tmp_path, name):
    with pytest.raises(CourseError, match=f"--{name.replace('_', '-')} 0"):
        train(tmp_path, replace(SETTINGS, **{name: 0}))


# ---- Stopping: signals and patience

@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_saves(tmp_path, capsys, number, status):
    def signalled(step):
        if step == 5:
            os.kill(os.getpid(), number)
        return batch(step)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path, batch=signalled)
    assert stopped.value.code == status and "--resume" in capsys.readouterr().out
    assert signal.getsignal(number) == before
    saved, config = resumed(tmp_path)
    assert saved["step"] == 6                                  # the step was finished
    parts, log = train(tmp_path, config, model_of(9), saved=saved)
    whole, whole_log = train(tmp_path / "whole")
    assert same(whole.state_dict(), parts.state_dict()) and untimed(log) == untimed(whole_log)


def test_clip_0_takes_gradients_as_they_are(tmp_path):
    assert same(*(train(tmp_path, replace(SETTINGS, clip=clip))[0].state_dict() for clip in (0.0, 1e9)))


def test_fp16_lowers_its_scale_and_goes_on(tmp_path, monkeypatch):
    spoil(monkeypatch, range(7))                               # more in a row than fp32 puts up with
    machine = Scaled(torch.device("cpu"), "fp16", False)
    model, log = train(tmp_path, machine=machine, judge=lambda model: (1.0, 1.0, ""))
    assert [math.isfinite(row["grad_norm"]) for row in log][:8] == [False] * 7 + [True]
    saved = torch.load(tmp_path / "resume.pt", weights_only=True)
    assert saved["scaler"]["scale"] == 2**16 / 2**7
    assert not same(model_of().state_dict(), model.state_dict()) and all(p.isfinite().all() for p in model.parameters())


def test_patience_stops_and_the_best_is_kept(tmp_path):
    losses, kept = iter([3.0, 2.0, 2.5, 2.0, 1.0]), []
    config = replace(SETTINGS, steps=40, patience=2)
    model, log = train(tmp_path, config, judge=lambda model: (next(losses), 1.0, ""), keep=lambda model: kept.append(1))
    seen = [row["val_loss"] for row in log if row["val_loss"] == row["val_loss"]]
    assert seen == [3.0, 2.0, 2.5, 2.0] and len(kept) == 2 and len(log) <= 17


def test_patience_counts_on_after_a_resume(tmp_path):
    config = replace(SETTINGS, steps=40, patience=2)
    losses, kept = iter([2.0, 2.5, 2.2, 1.0]), []
    more = dict(judge=lambda model: (next(losses), 1.0, ""), keep=lambda model: kept.append(1))
    with pytest.raises(SystemExit):
        train(tmp_path, replace(config, stop_at=9), **more)
    saved, config = resumed(tmp_path)
    assert (saved["best"], saved["worse"]) == (2.0, 1)
    _, log = train(tmp_path, config, saved=saved, **more)
    assert [row["val_loss"] for row in log if row["val_loss"] == row["val_loss"]] == [2.0, 2.5, 2.2] and len(kept) == 1


# ---- Several processes

def test_two_processes_equal_one_and_stop_together(tmp_path, monkeypatch):
    """Plain SGD, since Muon's bfloat16 iteration magnifies rounding; then one of the two gets a signal."""
    code = """
chapter4.make_optimizers = lambda model, config: {"sgd": torch.optim.SGD(model.parameters())}
machine = chapter4.choose_machine(chapter4.TrainingConfig(device="cpu", precision="fp32", compile=False))
config = replace(SETTINGS, steps=3, micro_batch=1, lr=1.0, eval_every=100)
folder = Path(sys.argv[1])
model, log = train(folder / "sgd", config, machine=machine)
torch.save({"model": model.state_dict(), "losses": [row["loss"] for row in log],
            "norms": [row["grad_norm"] for row in log]}, folder / f"{machine.rank}.pt")
def signalled(step):
    if step == 5 and machine.rank == 1:
        os.kill(os.getpid(), signal.SIGINT)
    return batch(step)
train(folder / "stopped", replace(config, steps=10**6), machine=machine, batch=signalled)
"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    pair = [script(code, tmp_path, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in (0, 1)]
    ends = [process.communicate(timeout=120) for process in pair]
    assert [process.returncode for process in pair] == [130, 130], ends
    assert torch.load(tmp_path / "stopped" / "resume.pt", weights_only=True)["step"] == 6
    assert ends[1][0] == "", "only the first process prints"

    monkeypatch.setattr(chapter4, "make_optimizers", lambda model, config: {"sgd": torch.optim.SGD(model.parameters())})
    model, log = train(tmp_path / "one", replace(SETTINGS, steps=3, micro_batch=2, lr=1.0, eval_every=100))
    start = model_of().state_dict()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["losses"] == pytest.approx([row["loss"] for row in log], rel=1e-5)
        assert found["norms"] == pytest.approx([row["grad_norm"] for row in log], rel=1e-5)
        for name, value in model.state_dict().items():
            moved, expected = found["model"][name] - start[name], value - start[name]
            assert (moved - expected).norm() <= 1e-5 * expected.norm() + 1e-7, name


# ---- Evaluation and sampling

def test_evaluation_by_its_definition():
    model = model_of().eval()
    tokens = np.random.default_rng(0).integers(0, 320, 16 * 11 + 5).astype(np.uint16)
    bytes_of = torch.arange(320) % 7
    nats = count = size = 0
    for start in range(0, 16 * 10, 16):                        # limit 170: ten whole blocks of 16
        with torch.no_grad():
            chances = model(torch.tensor(tokens[None, start:start + 16].astype(np.int64))).log_softmax(-1)[0]
        for place in range(16):
            target = int(tokens[start + place + 1])
            nats, count, size = nats - chances[place, target].item(), count + 1, size + target % 7
    loss, bits = chapter4.evaluate(model, CPU, tokens, bytes_of, 170, rows=3)
    assert loss == pytest.approx(nats / count, rel=1e-5) and bits == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_evaluation_ignores_dropout_and_refuses_too_little_text():
    tokens, bytes_of = np.arange(40).astype(np.uint16), torch.ones(320)
    model = model_of(dropout=0.5).train()
    assert chapter4.evaluate(model, CPU, tokens, bytes_of, 100) == chapter4.evaluate(model, CPU, tokens, bytes_of, 100)
    with pytest.raises(CourseError, match="16 held-out tokens, too few for a context of 16"):
        chapter4.evaluate(model, CPU, tokens[:16], bytes_of, 100)
    chapter4.evaluate(model, CPU, tokens[:17], bytes_of, 100)


def test_the_loop_trains_with_dropout_and_judges_without(tmp_path):
    modes = []
    def watching(model):
        modes.append(model.training)
        return 1.0, 1.0, ""
    model, log = train(tmp_path, model=model_of(dropout=0.5), judge=watching)
    assert modes == [False, False] and model.training


def test_the_sampler_follows_the_probabilities():
    model = model_of().eval()
    ids = chapter4.sample(model, [1, 2, 3], 30, seed=4)        # past the context of 16
    assert ids[:3] == [1, 2, 3] and len(ids) == 33 and ids == chapter4.sample(model, [1, 2, 3], 30, seed=4)
    assert ids != chapter4.sample(model, [1, 2, 3], 30, seed=5)
    with torch.no_grad():
        model.embed_tokens.weight.zero_()
        model.embed_tokens.weight[7, 0] = 1e4                  # after token 7, token 7 is certain
    assert chapter4.sample(model, [7], 5) == [7] * 6


# ---- The script

def test_the_script_leaves_the_best_model_for_the_world(main, capsys):
    base = main(*FLAGS)
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("device cpu (", "precision fp32 (", "compile False (", "bits per byte"))
    saved = torch.load(base / "resume.pt", weights_only=True)
    model = GPT.load(base)
    assert same(model.state_dict(), saved["model"]) and not any("_orig_mod" in name for name in saved["model"])
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= {path.name for path in base.iterdir()}
    rows = list(csv.DictReader((base / "log.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 8 and float(rows[0]["loss"]) == pytest.approx(math.log(320), rel=0.03)
    assert "test: loss" in printed


def test_the_script_resumes_to_the_bit(main):
    whole = GPT.load(main(*FLAGS)).state_dict()
    with pytest.raises(SystemExit):
        main(*FLAGS, "--stop-at", 3)
    assert same(whole, GPT.load(main("--resume")).state_dict())            # the checkpoint is all that it needs


def test_init_starts_from_a_folder(main, tmp_path, capsys):
    base = main(*FLAGS)
    start = GPT.load(base).state_dict()
    (tmp_path / "new").mkdir()
    for part in ("tokenizer", "data"):
        (tmp_path / "new" / part).symlink_to(tmp_path / "out" / part)
    new = main(*FLAGS, "--init", base, "--steps", 1, "--lr", 0, "--matrix-lr", 0, out=tmp_path / "new")
    assert same(start, GPT.load(new).state_dict())
    for flag in ("--context", "--dropout"):
        with pytest.raises(CourseError, match=f"{flag} belongs to the model of --init"):
            main(*FLAGS, "--init", base, flag, 0)


def test_another_tokenizer_is_refused(main, tmp_path):
    chapter1.train_bpe(["some other text " * 9], 290).save(tmp_path / "other")
    model_of().save(tmp_path / "other")
    with pytest.raises(CourseError, match="02_data.py --tokenizer .*other"):
        main(*FLAGS, "--init", tmp_path / "other")


def test_too_little_held_out_text_fails_before_training(main, monkeypatch):
    opened = chapter2.open_tokens
    def shorter(folder, split):
        tokens, meta = opened(folder, split)
        return tokens[:9] if split == "val" else tokens, meta
    monkeypatch.setattr(chapter2, "open_tokens", shorter)
    monkeypatch.setattr(chapter4, "train", lambda *_: pytest.fail("training began"))
    with pytest.raises(CourseError, match="too few"):
        main(*FLAGS)


@pytest.mark.parametrize("flags, word", [
    (("--preset", "huge"), "small, gpu"), (("--optimizer", "sgd"), "muon or adamw"),
    (("--precision", "fp8"), "choose fp32"), (("--precision", "fp16"), "CUDA"), (("--resume",), "resume.pt"),
    (("--device", "nonsense"), "--device nonsense"), (("--init", "nowhere"), "nowhere"),
    (("--lr", "-1"), "--lr -1"), (("--lr", "nan"), "--lr nan"), (("--stop-at", "-1"), "--stop-at -1"),
    (("--seed", "-1"), "--seed -1"), (("--clip", "-1"), "--clip -1"), (("--clip", "nan"), "--clip nan"), (("--attention", "flash"), "attention must be"), (("--compare", "nowhere"), "log.csv not found")])
def test_bad_flags_are_explained_in_one_line(main, monkeypatch, flags, word):
    monkeypatch.setattr(chapter4, "draw_curves", DRAW)
    with pytest.raises((CourseError, OSError), match=word) as error:             # `run` prints both as one line
        main(*FLAGS, *flags)
    assert "\n" not in str(error.value)


def test_compare_draws_several_runs(main, monkeypatch, tmp_path, capsys):
    main(*FLAGS)
    monkeypatch.setattr(chapter4, "draw_curves", DRAW)
    main("--compare", tmp_path / "out", tmp_path / "out")
    assert (tmp_path / "out" / "compare.png").read_bytes()[:4] == b"\x89PNG"
    assert "compare.png" in capsys.readouterr().out


def test_the_command_line_ends_with_one_line(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "04_train.py"), "--out", str(tmp_path), "--resume"],
                          capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 1 and done.stderr.startswith("error:") and len(done.stderr.splitlines()) == 1


def test_a_flag_of_the_wrong_type_has_status_2(main):
    with pytest.raises(SystemExit) as stopped:
        main("--lr", "fast")
    assert stopped.value.code == 2


def test_without_a_compiler_training_goes_on(tmp_path):
    process = script("""
train(sys.argv[1], replace(SETTINGS, steps=2), model_of(dropout=0.3), replace(CPU, compile=True))
""", tmp_path, CXX="/nonexistent", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"), TORCHINDUCTOR_COMPILE_THREADS="1")
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0 and [line for line in out.splitlines() if "not compiled" in line][1:] == [], error
    assert "not compiled" in out and "Traceback" not in error
    plain, _ = train(tmp_path / "plain", replace(SETTINGS, steps=2), model_of(dropout=0.3))
    saved = torch.load(tmp_path / "resume.pt", weights_only=True)
    assert same(plain.state_dict(), saved["model"])            # not even dropout's random numbers moved on
    assert saved["config"]["compile"] is False                 # what --resume will repeat
