"""Chapter 4 · Training: show the model text, and nudge every weight so that it is less surprised.

One step: take a batch, let the model guess each next token, measure its surprise (the loss: minus
the log of the probability it gave to what really came), compute for every weight in which direction
the loss falls (the gradient), and move the weights a little that way. Then again, some thousand times.

    batch -> model -> loss -> gradients -> clip -> optimizer moves the weights
      ^                                                            |
      +------------------------ next step -------------------------+    now and then: evaluate, save

Run:    python 04_train.py                   picks device, precision and preset, and says why
        python 04_train.py --resume          goes on where the last run stopped (Ctrl-C is safe)
        torchrun --nproc-per-node=8 04_train.py --preset modern-124m
        python 04_train.py --compare out other_out     draws the curves of several runs
Prints: a line of progress; at each evaluation the held-out loss and a few words by the model.
Writes: out/base/: the best weights so far as a folder for transformers, resume.pt, log.csv, loss.png.
Source: Micikevicius et al. 2018 (mixed precision), Jordan et al. 2024 (Muon), Loshchilov & Hutter
        2019 (AdamW), nanoGPT and modded-nanogpt (what matters for speed).
"""
import csv
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

chapter1, chapter2, chapter3 = map(import_module, ("01_tokenizer", "02_data", "03_model"))
CourseError, Tokenizer, replacing = chapter1.CourseError, chapter1.Tokenizer, chapter1.replacing
GPT, GPTConfig = chapter3.GPT, chapter3.GPTConfig

# Legend
#   R  rows (sequences) of a whole step       T  tokens of a row        V  vocabulary
#   micro-batch   rows that go through the model at once; a step adds up the gradients of several
#   targets       y, the next token at each place; IGNORED where nothing is to be learnt
#   rank, world   number of this process and of all processes, when several GPUs train together
IGNORED = -100

RECIPES = {  # how each preset of chapter 3 is trained, unless a flag says otherwise
    "small": dict(steps=3200, batch_tokens=2048, micro_batch=8, lr=3e-3, matrix_lr=0.02, eval_every=400),
    "gpu": dict(steps=2500, batch_tokens=32768, micro_batch=128, lr=3e-3, matrix_lr=0.02, eval_every=250),
    "124m": dict(steps=5000, batch_tokens=524288, micro_batch=32, lr=3e-3, matrix_lr=0.02, eval_every=250),
}


@dataclass
class TrainingConfig:
    """Settings of a training run; chapter 6 has the same with other defaults."""
    steps: int | None = None  # updates of the weights; the learning rate reaches zero at the last
    batch_tokens: int | None = None  # tokens that one step learns from; more is smoother and slower
    micro_batch: int | None = None  # rows at once in memory; lower it when memory runs out, the step stays the same
    optimizer: str = "muon"  # muon (for the matrices, with adamw for the rest) or adamw
    lr: float | None = None  # AdamW's learning rate; too high diverges, too low is slow
    matrix_lr: float | None = None  # Muon's learning rate for matrices
    weight_decay: float = 0.1  # pull of matrices towards zero, per step and unit of learning rate
    warmup: int = 20  # steps over which the learning rate rises from zero
    clip: float = 1.0  # longest gradient that is taken as it is; a longer one is shortened to it
    seed: int = 1  # of the weights and of the order of the data
    eval_every: int | None = None  # steps between evaluations (each also saves)
    patience: int = 0  # stop after so many evaluations without improvement (0: never)
    stop_at: int = 0  # stop after this step, under the same schedule (0: at the end)
    device: str | None = None  # cpu, cuda, cuda:1, mps (default: the fastest there is)
    precision: str | None = None  # fp32, bf16 or fp16 of the products (default: by the device)
    compile: bool | None = None  # let torch.compile join operations (default: where it pays)
    attention: str = "auto"  # formula, blocks, fused or auto
    init: str = ""  # folder with weights to start from
    resume: bool = False  # go on from resume.pt in the folder that is being written
    out: str = "out"  # root folder of the course


@dataclass
class Config(TrainingConfig):
    """Settings of pre-training."""
    preset: str | None = None  # shape of the model, see 03_model.py --help (chosen by the device)
    context: int | None = None  # tokens of a row
    dropout: float | None = None  # share of activations dropped in training, for small data read often
    eval_tokens: int = 65536  # held-out tokens looked at in each evaluation
    compare: list[str] = field(default_factory=list)  # root folders whose curves to draw in one picture, instead of training


# ---- The machine: device, precision, compilation, processes --------------------------------------

@dataclass
class Machine:
    """Where and how to compute."""
    device: torch.device
    precision: str
    compile: bool
    rank: int = 0
    world: int = 1

    def autocast(self):
        """Return a context in which products run in the chosen precision; weights stay float32."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(self.device.type, dtype) if dtype else nullcontext()


def cpu_likes_bf16():
    """Tell whether this processor multiplies bfloat16 in hardware (else it is slower than float32)."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def choose_machine(config):
    """Return the Machine for the flags given, and print each choice with its reason."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(config.device or (f"cuda:{local}" if found == "cuda" else found))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CourseError(f"--device {config.device} cannot be used here: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        precision = ("bf16", "this GPU multiplies it in hardware") if torch.cuda.is_bf16_supported(False) \
            else ("fp16", "this GPU is older than bfloat16; losses are scaled against underflow")
    elif device.type == "cpu" and cpu_likes_bf16():
        precision = "bf16", "this processor multiplies it in hardware"
    else:
        precision = "fp32", "this processor has no fast half precision"
    compiles = (False, "not on Windows or Apple's GPU") if os.name == "nt" or device.type == "mps" else (True, "it pays")
    machine = Machine(device, config.precision or precision[0],
                      compiles[0] if config.compile is None else config.compile, rank, world)
    if machine.precision not in ("fp32", "bf16", "fp16"):
        raise CourseError(f"--precision {machine.precision}: choose fp32, bf16 or fp16")
    if machine.precision == "fp16" and device.type != "cuda":
        raise CourseError(f"--precision fp16 needs a CUDA GPU, not {device.type}: use bf16 or fp32")
    if rank == 0:
        print(f"device {device} ({'--device' if config.device else 'the fastest there is'}); "
              f"precision {machine.precision} ({'--precision' if config.precision else precision[1]}); "
              f"compile {machine.compile} ({compiles[1] if config.compile is None else 'as asked'})"
              + (f"; {world} processes" if world > 1 else ""))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return machine


# ---- Optimizer and schedule ----------------------------------------------------------------------

def make_optimizers(model, config):
    """Return the optimizers of a model: Muon for the matrices inside the blocks, AdamW for the rest.

    A gradient matrix is dominated by a few directions. Muon averages gradients over time (momentum)
    and then makes the update orthogonal: all directions equally strong, the weak ones included. Five
    steps of a polynomial iteration (Newton-Schulz) do that with matrix products alone. An embedding is
    a table of rows, not a map between directions, so it stays with AdamW, as do norms and biases.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = [p for name, p in trained if p.ndim == 2 and "layers." in name]
    tables = [p for name, p in trained if p.ndim == 2 and "layers." not in name]
    vectors = [p for name, p in trained if p.ndim != 2]
    groups = [{"params": tables + ([] if config.optimizer == "muon" else hidden), "weight_decay": config.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    optimizers = [torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)] if groups else []
    if config.optimizer == "muon" and hidden:
        optimizers.append(torch.optim.Muon(hidden, lr=config.matrix_lr, weight_decay=config.weight_decay,
                                           momentum=0.95, adjust_lr_fn="match_rms_adamw"))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def lr_share(step, config):
    """Return the share of the peak learning rate at a step: a linear rise, then a linear fall to zero."""
    return min(1.0, (step + 1) / max(1, config.warmup)) * max(0.0, 1 - step / config.steps)


# ---- Loss and evaluation -------------------------------------------------------------------------

class Objective(nn.Module):
    """The model together with its loss, so that both are compiled and shared among GPUs as one."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y, documents=None):
        """Return the summed loss in nats of targets y (R, T), without the IGNORED ones."""
        logits = self.model(x, documents)                      # (R, T) -> (R, T, V)
        return F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), ignore_index=IGNORED, reduction="sum")


def evaluate(model, machine, tokens, bytes_of, limit, rows=8):
    """Return (loss in nats per token, bits per byte) over the first blocks of held-out tokens.

    bytes_of: (V,), the bytes of each token, so that models with other tokenizers can be compared.
    """
    T, objective = model.config.context, Objective(model)
    blocks = min(len(tokens) - 1, max(T, limit)) // T
    if blocks < 1:
        raise CourseError(f"the held-out split has {len(tokens):,} tokens, too few for a context of {T:,} (+ 1): "
                          "use more text or a smaller --context")
    total = torch.zeros(3, dtype=torch.float64)                # nats, tokens, bytes
    model.eval()
    with torch.no_grad(), machine.autocast():
        for start in range(0, blocks, rows):
            count = min(rows, blocks - start)
            part = torch.from_numpy(np.asarray(tokens[start * T:(start + count) * T + 1]).astype(np.int64))
            x, y = part[:-1].view(count, T), part[1:].view(count, T)
            nats = objective(x.to(machine.device), y.to(machine.device)).item()
            total += torch.tensor([nats, y.numel(), bytes_of[y].sum().item()], dtype=torch.float64)
    model.train()
    nats, count, size = total.tolist()
    return nats / count, nats / math.log(2) / max(1, size)


def sample(model, ids, count, seed=0):
    """Return `count` more ids after a list of ids: the shortest sampler there is. Chapter 5 does better."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([ids[-model.config.context:]], device=model.embed_tokens.weight.device))
        ids = ids + torch.multinomial(logits[0, -1].float().softmax(-1).cpu(), 1, generator=generator).tolist()
    return ids


# ---- Checkpoints and logs ------------------------------------------------------------------------

def save_checkpoint(path, step, model, optimizers, scaler, config, log, facts):
    """Write all that a run needs to go on exactly, to one file, moved into place when it is whole."""
    random = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}
    with replacing(path) as temporary:
        torch.save({"step": step, "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                    "scaler": scaler.state_dict(), "random": random, "config": asdict(config),
                    "model_config": asdict(model.config), "log": log, "facts": facts}, temporary)


def read_checkpoint(path, config):
    """Return (checkpoint, its config with the new --stop-at). Raises CourseError for a flag that contradicts."""
    if not Path(path).exists():
        raise CourseError(f"{path} does not exist: there is no run to resume; leave --resume out to start one")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        old = type(config)(**saved["config"])
    except (RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
        raise CourseError(f"{path} is damaged: {str(error).splitlines()[0]}") from None
    free = {"resume", "stop_at", "out", "patience"}
    for item in fields(config):
        given, default = getattr(config, item.name), getattr(type(config)(), item.name)
        if item.name not in free and given not in (default, getattr(old, item.name)):
            raise CourseError(f"--{item.name.replace('_', '-')} {given} contradicts the run being resumed, which has "
                              f"{getattr(old, item.name)}: leave the flag out, or start a new run without --resume")
    return saved, replace(old, **{name: getattr(config, name) for name in free})


COLUMNS = ("step", "tokens", "seconds", "loss", "grad_norm", "lr_share", "tokens_per_second", "val_loss", "val_bits_per_byte")


def write_log(path, log):
    """Write the rows of a run to log.csv."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(log)


def draw_curves(logs, path):
    """Draw loss, held-out bits per byte, gradient norm and speed of runs {name: rows} against tokens."""
    import_module("matplotlib").use("Agg")
    pyplot = import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6), layout="constrained")
    panels = (("loss", "training loss (nats per token)"), ("val_bits_per_byte", "held-out bits per byte"),
              ("grad_norm", "gradient norm, and share of the peak learning rate"), ("tokens_per_second", "tokens per second"))
    for name, rows in logs.items():
        for axis, (column, title) in zip(axes.flat, panels):
            points = [(float(row["tokens"]), float(row[column])) for row in rows if row.get(column) not in (None, "")]
            axis.plot(*zip(*points) if points else ((), ()), label=name, marker="o" if column.startswith("val") else None)
            axis.set(title=title, xlabel="tokens read")
        axes[1, 0].plot([float(row["tokens"]) for row in rows], [float(row["lr_share"]) for row in rows], "--", color="gray")
    axes[0, 1].legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
    pyplot.close(figure)


def report(text, final=False):
    """Print one updating line on a terminal, plain lines elsewhere."""
    print(f"\r{text}\x1b[K" if sys.stdout.isatty() else text, end="\n" if final or not sys.stdout.isatty() else "", flush=True)


# ---- The loop ------------------------------------------------------------------------------------

def out_of_memory(error):
    """Tell whether an error means that memory ran out (CPU and GPU say it differently)."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def compiled(objective, machine, rows):
    """Return the objective compiled, or as it is after one printed line if that is not possible."""
    if not machine.compile:
        return objective
    start, fast, random = time.time(), torch.compile(objective), torch.get_rng_state()
    try:
        with machine.autocast():
            fast(*rows).backward()
        print(f"compiled in {time.time() - start:.0f} s") if machine.rank == 0 else None
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        print(f"not compiled ({type(error).__name__}): training goes on without, about a third slower")
        fast = objective
    objective.zero_grad(set_to_none=True)
    torch.set_rng_state(random)
    return fast


def train(model, batch, config, machine, folder, judge, keep, facts=None, saved=None):
    """Train a model and return its log, a list of rows for log.csv.

    batch(step) -> (x, y, documents): the rows of a whole step, ids (R, T) and targets (R, T), IGNORED
    where nothing is learnt; documents (R, T) or None, see chapter 3. judge(model) -> (held-out loss,
    bits per byte, a remark). keep(model) stores the best model for the world. facts: what must be
    equal in a resumed run. saved: a checkpoint to go on from.
    """
    path, first, log = Path(folder) / "resume.pt", 0, []
    model.to(machine.device).train()
    optimizers = make_optimizers(model, config)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.precision == "fp16")
    if saved:
        for name, value in (facts or {}).items():
            if saved["facts"].get(name) != value:
                raise CourseError(f"the {name} is not the one this run was started with: {value}, then {saved['facts'].get(name)}")
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        scaler.load_state_dict(saved["scaler"])
        first, log = saved["step"], saved["log"]

    def rows_of(step):
        """Return this process's micro-batches of a step, and the targets in the whole step."""
        x, y, documents = batch(step)
        mine = slice(machine.rank, None, machine.world)
        parts = zip(*(part[mine].split(config.micro_batch) for part in ((x, y) if documents is None else (x, y, documents))))
        return [[part.to(machine.device) for part in rows] for rows in parts], max(1, int((y != IGNORED).sum()))

    objective = compiled(Objective(model), machine, rows_of(first)[0][0])
    if machine.world > 1:
        objective = DistributedDataParallel(objective)
    if saved:
        torch.set_rng_state(saved["random"]["cpu"])
        torch.cuda.set_rng_state_all(saved["random"]["cuda"]) if saved["random"]["cuda"] else None
    stop = []                                                  # signals that have arrived
    handlers = {number: signal.signal(number, lambda got, _: stop.append(got)) for number in (signal.SIGINT, signal.SIGTERM)}
    last = min(config.stop_at or config.steps, config.steps)
    best = min((row["val_loss"] for row in log if row["val_loss"] is not None), default=math.inf)
    seconds, tokens = (log[-1]["seconds"], log[-1]["tokens"]) if log else (0.0, 0)
    skipped = worse = 0
    clock = time.time()
    for step in range(first, last):
        # 1. The learning rate of this step.
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak_lr"] * lr_share(step, config)
        # 2. Gradients of all micro-batches add up to the gradient of the whole step: each loss is a sum
        #    over targets, divided by the targets of the whole step (not of the micro-batch, which may
        #    have fewer). DDP averages over processes, so it is multiplied by their number first.
        micro_batches, targets = rows_of(step)
        nats = torch.zeros(2, dtype=torch.float64, device=machine.device)         # the step's loss; a wish to stop
        try:
            for i, rows in enumerate(micro_batches):
                waits = machine.world > 1 and i < len(micro_batches) - 1          # exchange gradients once
                with objective.no_sync() if waits else nullcontext():
                    with machine.autocast():
                        loss = objective(*rows)
                    scaler.scale(loss * (machine.world / targets)).backward()
                nats[0] += loss.detach()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            half = max(1, config.micro_batch // 2)
            raise CourseError(f"out of memory with --micro-batch {config.micro_batch} rows of {rows[0].shape[1]} tokens: "
                              f"--micro-batch {half} needs half, and {2 * len(micro_batches)} of them make the same step") from None
        nats[1] = len(stop) + (0 < config.patience <= worse)
        if machine.world > 1:
            dist.all_reduce(nats)
        # 3. Take the scale of fp16 out, then shorten a gradient that is too long.
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip).item()
        # 4. Move the weights, unless the numbers have left the range.
        skipped = 0 if math.isfinite(norm) else skipped + 1
        if skipped > (20 if scaler.is_enabled() else 4):
            raise CourseError(f"the gradient is not finite for {skipped} steps up to step {step}: the last good state is "
                              f"{path}; try a lower --lr and --matrix-lr, or --precision fp32")
        for optimizer in optimizers:
            if math.isfinite(norm):
                scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()
        # 5. Log.
        done, ends = step + 1, step + 1 == last or nats[1].item() > 0
        tokens, now = tokens + sum(rows[0].numel() for rows in micro_batches) * machine.world, time.time()
        speed = (tokens - (log[-1]["tokens"] if log else 0)) / max(1e-9, now - clock)
        seconds, clock = seconds + now - clock, now
        row = {"step": done, "tokens": tokens, "seconds": round(seconds, 3), "loss": nats[0].item() / targets, "grad_norm": norm,
               "lr_share": lr_share(step, config), "tokens_per_second": round(speed), "val_loss": None, "val_bits_per_byte": None}
        log.append(row)
        if machine.rank == 0 and (sys.stdout.isatty() or done % 100 == 0):
            left = (last - done) * seconds / done
            report(f"step {done:,}/{last:,}  loss {row['loss']:.3f}  gradient {norm:.2f}  {speed:,.0f} tokens/s  "
                   f"{left // 60:.0f}:{left % 60:02.0f} left")
        # 6. Evaluate and save, now and then and at the end.
        if machine.rank == 0 and (ends or done % config.eval_every == 0):
            row["val_loss"], row["val_bits_per_byte"], remark = judge(model)
            report(f"step {done:,}  held-out loss {row['val_loss']:.3f} (perplexity {math.exp(min(50, row['val_loss'])):.1f}), "
                   f"{row['val_bits_per_byte']:.3f} bits per byte  {remark}", final=True)
            worse = 0 if row["val_loss"] < best else worse + 1
            if row["val_loss"] < best:
                best = row["val_loss"]
                keep(model)
            save_checkpoint(path, done, model, optimizers, scaler, config, log, facts)
            write_log(Path(folder) / "log.csv", log)
            draw_curves({Path(folder).name: log}, Path(folder) / "loss.png")
            clock = time.time()
        if ends:
            break
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if stop:
        print(f"stopped after step {log[-1]['step']}; everything is in {path}: add --resume to go on")
        sys.exit(128 + stop[0])
    return log


# ---- The script ----------------------------------------------------------------------------------

def with_recipe(config, preset, recipe):
    """Return the config with everything that was not given filled in from a recipe."""
    unset = {name: value for name, value in recipe.items() if getattr(config, name) is None}
    return replace(config, preset=preset, **unset)


def save_folder(model, tokenizer, folder, stops):
    """Write weights, config, tokenizer and generation_config.json: a folder that transformers opens."""
    model.save(folder)
    tokenizer.save(folder)
    end = tokenizer.special_tokens.get(chapter1.END_OF_TEXT)
    chapter1.write_json(Path(folder) / "generation_config.json", {"bos_token_id": end, "eos_token_id": stops, "pad_token_id": end})


def start_model(config, tokenizer):
    """Return the model to train: from --init, or a new one of the preset's shape."""
    if config.init:
        model = GPT.load(config.init)
        if config.context:
            raise CourseError("--context cannot be set with --init: the folder's own is used")
        return model
    shape = {**chapter3.PRESETS[config.preset], "vocab_size": (tokenizer.vocab_size + 63) // 64 * 64}
    shape.update({name: getattr(config, name) for name in ("context", "dropout") if getattr(config, name) is not None})
    return GPT(GPTConfig(**shape, attention=config.attention))


def main(config):
    """Train on out/data and keep the best model in out/base."""
    if config.compare:
        logs = {}
        for root in config.compare:
            with open(Path(root) / "base" / "log.csv", encoding="utf-8", newline="") as file:
                logs[root] = list(csv.DictReader(file))
        draw_curves(logs, Path(config.out) / "compare.png")
        print(f"drew {Path(config.out) / 'compare.png'}")
        return
    out, folder, saved = Path(config.out), Path(config.out) / "base", None
    tokenizer = Tokenizer.load(config.init or out / "tokenizer")
    train_tokens, meta = chapter2.open_tokens(out / "data", "train")
    val_tokens, test_tokens = (chapter2.open_tokens(out / "data", split)[0] for split in ("val", "test"))
    if meta["fingerprint"] != tokenizer.fingerprint():
        raise CourseError(f"{out / 'data'} was encoded with another tokenizer than {config.init or out / 'tokenizer'}: "
                          "run 02_data.py again")
    if config.resume:
        saved, config = read_checkpoint(folder / "resume.pt", config)
    machine = choose_machine(config)
    preset = config.preset or ("small" if machine.device.type == "cpu" else "gpu")
    if preset not in chapter3.PRESETS:
        raise CourseError(f"--preset {preset}: choose one of {', '.join(chapter3.PRESETS)}")
    config = with_recipe(config, preset, RECIPES.get(preset, RECIPES["124m"]))
    torch.manual_seed(config.seed)
    model = GPT(GPTConfig(**saved["model_config"])) if saved else start_model(config, tokenizer)
    T, parameters = model.config.context, sum(p.numel() for p in model.parameters())
    R = max(1, config.batch_tokens // T)
    bytes_of = torch.zeros(model.config.vocab_size)
    for i, token in tokenizer.bytes_of.items():
        bytes_of[i] = len(token) if i not in tokenizer.special_tokens.values() else 0
    if machine.rank == 0:
        print(f"preset {preset}: {parameters:,} parameters; {config.steps:,} steps of {R} x {T} tokens, "
              f"{config.steps * R * T / max(1, len(train_tokens)):.1f} epochs; first loss should be near {math.log(model.config.vocab_size):.2f}")

    def batch(step):
        x, y = chapter2.get_batch(train_tokens, step, R, T, config.seed)
        return torch.from_numpy(x.copy()), torch.from_numpy(y.copy()), None

    def judge(model):
        loss, bits = evaluate(model, machine, val_tokens, bytes_of, config.eval_tokens)
        text = tokenizer.decode(sample(model, val_tokens[:8].tolist(), 24))
        return loss, bits, repr(text)

    keep = partial(save_folder, tokenizer=tokenizer, folder=folder, stops=[tokenizer.special_tokens[chapter1.END_OF_TEXT]])
    train(model, batch, config, machine, folder, judge, keep, {"tokenizer": tokenizer.fingerprint(), "data": len(train_tokens)}, saved)
    if machine.rank == 0:
        best = GPT.load(folder).to(machine.device)
        for split, tokens in (("val", val_tokens), ("test", test_tokens)):
            if len(tokens) > T:
                loss, bits = evaluate(best, machine, tokens, bytes_of, len(tokens))
                print(f"{split}: loss {loss:.4f}, perplexity {math.exp(loss):.2f}, {bits:.4f} bits per byte")
        print(f"saved {folder}; next: python 05_sample.py")
    if machine.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    chapter1.run(main, Config, __doc__)
