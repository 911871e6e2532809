"""Chapter 4 · Training: show the model text, and nudge every weight so that it is less surprised.

One step: take a batch, let the model guess each next token, measure its surprise (the loss, in
nats: minus the natural log of the probability that it gave to what really came), compute for every
weight in which direction the loss falls (the gradient), and move it a little that way (the learning
rate). Then again, some thousand times:

    batch -> model -> loss -> backward -> gradients -> clip -> optimizer -> weights -+
      ^------------------------------ the next step ---------------------------------+

Run:    python 04_train.py                    picks device, precision and preset, and says which
        python 04_train.py --layers 8 --width 128 --norm layernorm     every setting is a flag
        python 04_train.py --resume           goes on where the last run stopped (Ctrl-C is safe)
        python 04_train.py --test             the best model on the test split: look once
        python 04_train.py --compare out b    draws the runs in out/ and b/ in one picture
        torchrun --nproc-per-node=8 04_train.py --preset modern-124m
Writes: out/base/: the best weights so far, as a folder for transformers; resume.pt, log.csv,
        loss.png
Source: Micikevicius et al. 2018 (mixed precision), Loshchilov & Hutter 2019 (AdamW),
        Jordan et al. 2024 (Muon)
"""
import atexit
import csv
import math
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import import_module
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import distributed, nn

chapter1 = import_module("01_tokenizer")
chapter2 = import_module("02_data")
chapter3 = import_module("03_model")
CourseError = chapter1.CourseError

# Legend
#   R  sequences of a whole step       T  tokens of a sequence        V  vocabulary
#   micro-batch   sequences that go through the model at once; a step may add up several
#   held-out      text that is never trained on: val to choose by, test for the very end
# Machine, files and flags are tools: they stand at the file's end.
IGNORED = -100  # a target (a next token in y) from which nothing is to be learnt


# ---- Training, by its definition -----------------------------------------------------------------
def lr_scale(step, config):
    """Return what the learning rates are multiplied by: a linear rise, then a linear fall to zero.

    Why rise? The first gradients of random weights point anywhere, and the optimizer knows too few
    to average. Why fall? Large steps cover ground but overshoot; small ones find the bottom.
    """
    rise = (step + 1) / max(1, config.warmup)
    return min(1.0, rise) * (1 - step / config.steps)


def train_naive(model, batch, config):
    """Train a model and return its losses: what all of this file does, only not safely and fast.

    batch(step) -> inputs x and targets y, each (R, T)
    """
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0, fused=True)
    losses = []
    for step in range(config.steps):
        x, y = batch(step)
        logits = model(x)                                          # (R, T) -> (R, T, V)
        nats = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum")
        loss = nats / y.numel()
        loss.backward()                                            # adds to each weight's .grad
        for group in optimizer.param_groups:
            group["lr"] = config.lr * lr_scale(step, config)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# ---- What a step needs: loss and optimizers ------------------------------------------------------
class Objective(nn.Module):
    """The model together with its loss, so that both are compiled as one."""
    COLUMNS = ["loss"]

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y, documents=None):
        """Return the terms of COLUMNS, in nats, each summed over the targets y that count.

        x, y (B, T) -> (terms). All terms are trained on; each is a column of the log.
        """
        logits = self.model(x, documents).float()                  # (B, T) -> (B, T, V)
        nats = nn.functional.cross_entropy(
            logits.flatten(0, 1), y.flatten(), ignore_index=IGNORED, reduction="sum")
        return torch.stack([nats])


# Three ways to move a weight w against its gradient g, at a learning rate lr:
#   SGD     w -= lr g. Rare tokens have small gradients and hardly move, common ones too much.
#   AdamW   m = average of g, v = average of g^2, both over the last steps; w -= lr m / sqrt(v).
#           Every weight moves at about lr a step, whatever the size of its gradient. Besides,
#           w -= lr decay w pulls it towards zero, so that none grows without being needed.
#   Muon    sees that a matrix is a map from directions to directions. Its gradient is dominated by
#           a few of them. Muon makes all equally strong, so that the rare ones are learnt as well.
def orthogonalise(matrices):
    """Return matrices (N, rows, columns) with all singular values near 1, their directions kept.

    Newton-Schulz: of a matrix X with singular values s, a X + b (X X^T) X + c (X X^T)^2 X has the
    singular values a s + b s^3 + c s^5. With these a, b, c, five rounds bring any s between 0.01
    and 1 to between 0.7 and 1.2: no decomposition is needed, and bfloat16 will do.
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices                       # X X^T is the smaller product
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).bfloat16()
    for _ in range(5):
        square = x @ x.mT                                          # (N, rows, rows)
        change = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, change, x, beta=3.4445)               # (N, rows, columns)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal (Jordan et al. 2024); all matrices of one shape at once."""

    def __init__(self, matrices, lr, weight_decay, momentum=0.95):
        by_shape = {}
        for p in matrices:
            by_shape.setdefault(p.shape, []).append(p)
        groups = [{"params": same} for same in by_shape.values()]
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            gradient = torch.stack([p.grad for p in group["params"]])          # (N, rows, columns)
            state = self.state[group["params"][0]]
            average = state.setdefault("average", torch.zeros_like(gradient))
            average.lerp_(gradient, 1 - group["momentum"])
            update = orthogonalise(gradient.lerp(average, group["momentum"]))
            # its numbers have a mean size of 1 / sqrt(longer side); AdamW's moves of about 0.2 lr
            size = 0.2 * max(gradient.shape[-2:]) ** 0.5
            for p, change in zip(group["params"], update):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(change, alpha=-group["lr"] * size)


def make_optimizers(model, config):
    """Return {name: optimizer}: Muon for the matrices in the blocks, AdamW for the rest, or for all.

    An embedding is a table, not a map between directions, so it stays with AdamW, as do norms and
    biases. Those two are not pulled towards zero either: a norm's usual weight is 1.
    """
    matrices, tables, vectors = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.ndim < 2:
            vectors.append(p)
        elif config.optimizer == "muon" and "layers." in name:
            matrices.append(p)
        else:
            tables.append(p)
    groups = [{"params": tables, "weight_decay": config.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    optimizers = {"adamw": torch.optim.AdamW(groups, config.lr, betas=(0.9, 0.95), fused=True)}
    if matrices:
        optimizers["muon"] = Muon(matrices, config.matrix_lr, config.weight_decay)
    return optimizers


# ---- Training, for real --------------------------------------------------------------------------
@dataclass
class TrainingConfig:
    steps: int = 2800  # updates of the weights; the learning rate reaches zero at the last
    batch_tokens: int = 2048  # tokens that one step learns from; more is smoother and slower
    micro_batch: int = 8  # sequences at once in memory; lower it when memory runs out
    optimizer: str = "muon"  # muon (for the matrices, with adamw for the rest) or adamw
    lr: float = 6e-3  # AdamW's learning rate; too high diverges, too low is slow
    matrix_lr: float = 0.01  # Muon's learning rate for matrices
    weight_decay: float = 0.1  # pull of matrices towards zero, per step and unit of learning rate
    warmup: int = 20  # steps over which the learning rate rises from zero
    clip: float = 1.0  # longest gradient taken as it is; a longer one is shortened (0: none)
    seed: int = 1  # of the weights, of the order of the data and of dropout
    eval_every: int = 400  # steps between evaluations (each also saves)
    eval_tokens: int = 65536  # held-out tokens looked at, spread over the split (0: all)
    patience: int = 0  # stop after so many evaluations without improvement (0: never)
    device: str = ""  # cpu, cuda, cuda:1, mps (default: the fastest there is)
    precision: str = ""  # of the products: fp32, bf16 or fp16 (default: by the device)
    compile: bool | None = None  # let torch.compile join operations (default: where it pays)
    init: str = ""  # folder with weights and tokenizer to start from
    resume: bool = False  # go on with the run that stopped, with its settings
    out: str = "out"  # root folder of the course

    def __post_init__(self):
        for name in ("steps", "batch_tokens", "micro_batch", "eval_every"):
            if getattr(self, name) < 1:
                raise CourseError(f"--{name.replace('_', '-')}: it must be at least 1")
        if self.optimizer not in ("muon", "adamw"):
            raise CourseError(f"--optimizer {self.optimizer}: choose muon or adamw")


# Numbers in 16 bits take half the memory, and products of them are faster:
#   fp32   8 bits for the range, 24 for the digits: 1e-38 to 3e38, 7 digits
#   bf16   8 and 8: the same range, 2 to 3 digits. What training needs is range, so this just works
#   fp16   5 and 11: 6e-8 to 65504, 3 digits. Small gradients become 0: so a scaler multiplies the
#          loss by a large factor, divides the gradients by it, and lowers it when they overflow
def train(model, batch, config, machine, folder, judge, keep, saved=None):
    """Train a model and return its log, a list of rows for log.csv.

    batch(step) -> x, y and perhaps documents (see chapter 3), each (R, T). judge(model) -> held-out
    loss, bits per byte, a remark. keep(model) stores the best so far. saved: a checkpoint to go on
    from. Raises CourseError where memory is full or the gradient is no number.
    """
    optimizers = make_optimizers(model.train(), config)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.precision == "fp16")
    run = Run(folder, {"model": model, "scaler": scaler, **optimizers}, config, machine, saved)
    saved, skipped = None, 0                                       # else it stays in memory
    with run.guarded():
        objective = compile_objective(Objective(model), batch(run.step), config, machine)
        for step in range(run.step, config.steps):
            start = time.time()

            # 1. Learning rates and dropout's random numbers follow from the step: nothing to save.
            scale = lr_scale(step, config)
            for name, optimizer in optimizers.items():
                for group in optimizer.param_groups:
                    group["lr"] = scale * (config.matrix_lr if name == "muon" else config.lr)
            random = np.random.default_rng((config.seed, step, machine.rank))
            torch.manual_seed(int(random.integers(2**32)))

            # 2. The gradients of all micro-batches add up to that of the whole step. Each loss is a
            #    sum over targets, divided by the targets of the step: a mean of means would give a
            #    micro-batch with few targets the weight of a full one.
            whole = batch(step)                                    # x, y, documents: (R, T) each
            targets = max(1, int((whole[1] != IGNORED).sum()))
            mine = [machine.send(tensor).split(config.micro_batch) for tensor in whole]
            losses = torch.zeros(len(Objective.COLUMNS), device=machine.device)
            for micro_batch in zip(*mine):
                with machine.autocast():
                    terms = objective(*micro_batch) / targets
                scaler.scale(terms.sum()).backward()
                losses += terms.detach()

            # 3. So do those of several GPUs, which had other sequences of the same step.
            stop = torch.full((1,), float(run.wants_to_stop()), device=machine.device)
            if machine.world > 1:
                gradients = [p.grad for p in model.parameters() if p.grad is not None]
                for tensor in [stop, losses, *gradients]:
                    distributed.all_reduce(tensor)

            # 4. Divide by the scaler's factor, and only then look at the length of the gradient: one
            #    that is too long is shortened. All numbers come from the device at once.
            for optimizer in optimizers.values():
                scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)
            *losses, norm, stop = torch.cat((losses, norm[None], stop)).tolist()

            # 5. Move the weights, unless numbers have left their range: in fp16, the scaler mends it.
            skipped = 0 if math.isfinite(norm) else skipped + 1
            if skipped > 20 or (skipped > 0 and not scaler.is_enabled()):
                run.diverged(norm)
            for optimizer in optimizers.values():
                scaler.step(optimizer)
            scaler.update()
            model.zero_grad(set_to_none=True)

            # 6. Log; now and then evaluate and save.
            run.log_step(losses, norm, scale, whole[0].numel(), time.time() - start)
            if stop > 0 or run.step == config.steps or run.step % config.eval_every == 0:
                run.take_stock(judge, keep)
            if stop > 0:
                break
    return run.finish()


# ---- Looking at it: held-out loss, a sample, curves ----------------------------------------------
@torch.no_grad()
def evaluate(model, machine, tokens, bytes_of, limit=0):
    """Return (nats per token, bits per byte) of about `limit` tokens, spread over a split (0: all).

    bytes_of (V,): how many bytes of text each token stands for. Bits per byte can be compared
    between tokenizers. Raises CourseError if the split is shorter than one sequence.
    """
    T, V = model.config.context, model.config.vocab_size
    count = (len(tokens) - 1) // T                                 # sequences in the split
    if count < 1:
        raise CourseError(f"{len(tokens):,} held-out tokens are too few for a context of {T:,}: "
                          "use more text or a smaller --context")
    chosen = np.linspace(0, count - 1, min(count, math.ceil(limit / T) or count)).astype(int)
    parts = math.ceil(len(chosen) * T * V / 2**24)                 # so that the logits fit memory
    objective = Objective(model)
    nats, size = 0.0, 0
    for part in np.array_split(chosen, parts):
        ids = np.stack([tokens[T * i:T * i + T + 1] for i in part]).astype(np.int64)
        x, y = torch.from_numpy(ids[:, :-1]), torch.from_numpy(ids[:, 1:])     # (len(part), T) each
        size += bytes_of[y].sum().item()
        with machine.autocast():
            nats += objective(x.to(machine.device), y.to(machine.device))[0].item()
    return nats / (len(chosen) * T), nats / math.log(2) / max(1, size)


@torch.no_grad()
def sample(model, ids, count, vocab_size, seed=0):
    """Return `count` more ids, drawn by the model's probabilities; chapter 5 does better."""
    generator = torch.Generator().manual_seed(seed)
    device = model.embed_tokens.weight.device
    for _ in range(count):
        seen = torch.tensor([ids[-model.config.context:]], device=device)      # (1, T)
        logits = model(seen, last_only=True)[0, 0, :vocab_size]                # (V,)
        chances = logits.float().softmax(-1).cpu()
        ids = ids + torch.multinomial(chances, 1, generator=generator).tolist()
    return ids


def draw_curves(logs, path):
    """Draw the columns of log.csv files {name: file} against the tokens read."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    axes = {}
    for name, file in logs.items():
        table = np.genfromtxt(file, delimiter=",", names=True, ndmin=1, encoding="utf-8")
        for column in table.dtype.names[3:]:                       # after step, tokens, seconds
            if column not in axes:
                axes[column] = figure.add_subplot(2, 4, len(axes) + 1, xlabel="tokens read")
                axes[column].set_title(column.replace("_", " "))
            known = np.isfinite(table[column])                     # held-out values are few
            axes[column].plot(table["tokens"][known], table[column][known], lw=0.8, label=name)
    axes["loss"].legend()
    chapter1.save_figure(figure, path)


# ---- The script ----------------------------------------------------------------------------------
GENTLE = dict(lr=3e-5, matrix_lr=2e-4)  # rates for weights that know something already (--init)
RECIPE = fields(TrainingConfig)


@dataclass
class Config(TrainingConfig, chapter3.GPTConfig):
    vocab_size: int = 0  # V, the ids that it knows (0: the tokenizer's, up to a multiple of 64)
    preset: str = ""  # values for shape and training, see below (default: gpu on CUDA, else small)
    test: bool = False  # evaluate the best model on all of val and test, and stop
    compare: list[str] = field(default_factory=list)  # root folders whose runs to draw, no training


def defaults_for(given):
    """Return the values of flags not given: of the run to resume, else of a preset."""
    if given.get("resume"):
        return resumed_settings(Path(given.get("out", "out")) / "base", given)
    if given.get("init") or given.get("test"):
        for name in given.keys() & {"preset", *chapter3.SHAPE} - {"context", "attention"}:
            raise CourseError(f"--{name.replace('_', '-')} is for new models; this one has a shape")
        return {**GENTLE, "context": 0}
    on_gpu = torch.cuda.is_available() and given.get("device", "cuda").startswith("cuda")
    name = given.get("preset") or ("gpu" if on_gpu else "small")
    return {**chapter3.find_preset(name), "preset": name, "vocab_size": 0}


def start_model(config, tokenizer, saved):
    """Return the model of --init, --test or --resume, or a new one of the shape of the flags."""
    if config.init or config.test:
        model = chapter3.GPT.load(config.init or Path(config.out) / "base", config.context)
        model.config.attention = config.attention
    else:
        vocab_size = config.vocab_size or math.ceil(tokenizer.vocab_size / 64) * 64     # for speed
        if vocab_size < tokenizer.vocab_size:
            raise CourseError(f"--vocab-size {vocab_size}: the tokenizer has {tokenizer.vocab_size}")
        model = chapter3.GPT(chapter3.shape_of(replace(config, vocab_size=vocab_size)))
    if saved:
        model.load_state_dict(saved["model"])
    return model


def main(config):
    """Train on out/data and keep the best model in out/base."""
    out, folder = Path(config.out), Path(config.out) / "base"
    if config.compare:
        logs = {root: Path(root) / "base" / "log.csv" for root in config.compare}
        draw_curves(logs, out / "compare.png")
        print(f"drew {out / 'compare.png'}")
        return
    machine = choose_machine(config)

    # 1. The text, and the tokenizer that it was encoded with.
    tokenizer = chapter1.Tokenizer.load(config.init or out / "tokenizer")
    texts = {}
    for split in ("train", "val", "test"):
        texts[split], meta = chapter2.open_tokens(out / "data", split)
    if meta["fingerprint"] != tokenizer.fingerprint():
        raise CourseError(f"{out / 'data'} has other tokens: `{chapter1.command('02_data.py', config)}`"
                          " makes them anew (with --tokenizer, by that of --init)")

    # 2. The model, and its first guess.
    torch.manual_seed(config.seed)
    saved = read_checkpoint(folder) if config.resume else None
    model = start_model(config, tokenizer, saved).to(machine.device)
    T, V = model.config.context, model.config.vocab_size
    R = max(1, config.batch_tokens // T)
    bytes_of = torch.from_numpy(chapter2.token_sizes(tokenizer, V))
    if config.test:
        for split in ("val", "test"):
            loss, bits = evaluate(model.eval(), machine, texts[split], bytes_of)
            print(f"all of {split}: loss {loss:.4f}, {bits:.4f} bits per byte")
        return
    if machine.rank == 0:
        loss, _ = evaluate(model.eval(), machine, texts["val"], bytes_of, T)
        print(model.config, {item.name: getattr(config, item.name) for item in RECIPE}, sep="\n")
        print(f"{R} x {T} tokens a step; the loss is {loss:.2f} now (a guess among {V:,} tokens: "
              f"{math.log(V):.2f})")

    # 3. Training.
    def batch(step):
        x, y = chapter2.get_batch(texts["train"], step, R, T, config.seed)
        return torch.from_numpy(x), torch.from_numpy(y)

    def judge(model):
        loss, bits = evaluate(model, machine, texts["val"], bytes_of, config.eval_tokens)
        ids = sample(model, texts["val"][:8].tolist(), 24, tokenizer.vocab_size)
        return loss, bits, repr(tokenizer.decode(ids))

    def keep(model):
        save_folder(model, tokenizer, folder, [tokenizer.special_tokens[tokenizer.end]])

    train(model, batch, config, machine, folder, judge, keep, saved)
    if machine.rank == 0:
        print(f"saved {folder}; next: {chapter1.command('05_sample.py', config)}")


# ---- Tools: device, precision, compilation, processes --------------------------------------------
@dataclass
class Machine:
    """Where and how to compute."""
    device: torch.device
    precision: str
    compile: bool
    rank: int = 0  # number of this process, when several GPUs train together
    world: int = 1  # how many they are

    def autocast(self):
        """Return a context in which products run in the chosen precision; weights stay float32."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def send(self, tensor):
        """Return this process's sequences of a tensor (R, T), on its device."""
        mine = tensor[self.rank::self.world]
        if self.device.type == "cuda":
            mine = mine.pin_memory()                               # copied while the GPU computes
        return mine.to(self.device, non_blocking=True)

    def usage(self, model, speed):
        """Return, on a CUDA GPU, what share of it is used: see chapter 3 on the 6 operations."""
        if self.device.type != "cuda":
            return ""
        flops = 6 * speed * sum(p.numel() for p in model.parameters())
        memory = torch.cuda.max_memory_allocated() / 2**30
        return f", {flops / 1e12:.0f} TFLOP/s, at most {memory:.1f} GB"


def choose_device(name):
    """Return a device; each process that torchrun starts has its own GPU. Raises CourseError."""
    if not name and torch.cuda.is_available():
        name = "cuda"
    elif not name:
        name = "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise CourseError(f"--device {name} cannot be used here: {reason}") from None


def choose_machine(config):
    """Return the Machine: what the flags ask for, else what the hardware is good at."""
    rank, world = (int(os.environ.get(*pair)) for pair in (("RANK", 0), ("WORLD_SIZE", 1)))
    device = choose_device(config.device)
    best = "fp32"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")                 # fp32 products in TF32
        best = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif device.type == "cpu" and hasattr(torch.cpu, "_is_avx512_bf16_supported"):
        best = "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
    precision = config.precision or best
    if precision not in ("fp32", "bf16", "fp16") or (precision == "fp16" and device.type != "cuda"):
        raise CourseError(f"--precision {precision}: fp32, bf16 or, on CUDA, fp16; not on {device}")
    compiles = device.type != "mps" if config.compile is None else config.compile
    if rank == 0:
        print(f"device {device}, precision {precision} ({best} is best here), compile {compiles}")
    if world > 1 and not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(distributed.destroy_process_group)
    return Machine(device, precision, compiles, rank, world)


def compile_objective(objective, whole, config, machine):
    """Return the objective, compiled if that works: it is tried on a micro-batch of `whole`."""
    if not machine.compile:
        return objective
    compiled, start = torch.compile(objective), time.time()
    try:
        with machine.autocast():
            terms = compiled(*[machine.send(tensor)[:config.micro_batch] for tensor in whole])
        terms.sum().backward()
        words = f"compiled in {time.time() - start:.0f} s"
    except Exception as error:                                     # torch has many for this
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        words = f"not compiled, so slower: {str(error).splitlines()[0]}"
        compiled = objective
    objective.zero_grad(set_to_none=True)                          # that was no step
    if machine.rank == 0:
        print(words)
    return compiled


# ---- Tools: a run, its checkpoint and its files --------------------------------------------------
class Run:
    """What a run knows besides its weights; it writes resume.pt, log.csv, loss.png, the best model.

    A checkpoint holds all of this. Without ... a resumed run would
        model                          begin anew
        adamw, muon (their averages)   take some steps astray: the loss jumps
        scaler                         overflow in fp16, and skip some steps
        step                           read the same data again, at the first learning rates
        best_loss, evals_without_gain  take a worse model for the best, or stop too late
        config                         go on with other settings
    Dropout and the order of the data follow from seed and step, and need no saving.
    """
    KEPT = ("step", "log", "best_loss", "evals_without_gain")

    def __init__(self, folder, parts, config, machine, saved):
        self.folder = Path(folder)
        self.parts = parts                                         # what has a state_dict
        self.config = config
        self.machine = machine
        self.step = 0
        self.log = []
        self.best_loss = math.inf
        self.evals_without_gain = 0
        self.signals = []
        if saved:
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            vars(self).update({name: saved[name] for name in self.KEPT})

    def note_signal(self, number, frame):
        """Ctrl-C ends a run after its step; asked twice, at once."""
        if self.signals:
            raise KeyboardInterrupt
        self.signals.append(number)
        os.write(2, b"\nstopping after this step (once more: at once, unsaved)\n")

    @contextmanager
    def guarded(self):
        """Within, Ctrl-C saves, and full memory is explained."""
        both = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self.note_signal) for number in both]
        try:
            yield
        except RuntimeError as error:
            if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
                raise
            half = max(1, self.config.micro_batch // 2)
            raise CourseError(f"out of memory with --micro-batch {self.config.micro_batch}: {half} "
                              "needs half, and twice as many of them make the same step; a smaller "
                              "--context helps too") from None
        finally:
            for number, handler in zip(both, before):
                signal.signal(number, handler)

    def wants_to_stop(self):
        return bool(self.signals) or 0 < self.config.patience <= self.evals_without_gain

    def log_step(self, losses, norm, scale, tokens, seconds):
        """Add a row to the log; print the first, every hundredth and, on a terminal, all."""
        self.step += 1
        on_terminal = sys.stdout.isatty()
        self.log.append({
            "step": self.step, "tokens": self.step * tokens, "seconds": seconds,
            **dict(zip(Objective.COLUMNS, losses)), "val_loss": math.nan,
            "val_bits_per_byte": math.nan, "grad_norm": norm, "lr_scale": scale,
            "tokens_per_second": tokens / seconds})
        if self.machine.rank == 0 and (len(self.log) == 1 or self.step % 100 == 0 or on_terminal):
            minutes = (self.config.steps - self.step) * seconds / 60
            print(f"step {self.step:,}/{self.config.steps:,}: loss {losses[0]:.3f}, gradient "
                  f"{norm:.2f}, {tokens / seconds:,.0f} tokens/s, {minutes:.0f} min left"
                  f"{self.machine.usage(self.parts['model'], tokens / seconds)}",
                  end="\x1b[K\r" if on_terminal else "\n", flush=True)

    def take_stock(self, judge, keep):
        """Evaluate the model, keep it if it is the best so far, and save the run."""
        if self.machine.rank > 0:
            return
        loss, bits, remark = judge(self.parts["model"].eval())
        self.parts["model"].train()
        self.log[-1].update(val_loss=loss, val_bits_per_byte=bits)
        print(f"step {self.step:,}: held-out loss {loss:.3f} (perplexity "
              f"{math.exp(min(50, loss)):.1f}), {bits:.3f} bits per byte; {remark}")
        self.evals_without_gain += 1
        if loss < self.best_loss:
            self.best_loss = loss
            self.evals_without_gain = 0
            keep(self.parts["model"])
        run = {name: getattr(self, name) for name in self.KEPT}
        states = {name: part.state_dict() for name, part in self.parts.items()}
        with chapter1.replacing(self.folder / "resume.pt") as temporary:
            torch.save({**run, **states, "config": asdict(self.config)}, temporary)
        self.write_log(self.folder)

    def write_log(self, folder):
        """Write log.csv and loss.png. Where a viewer holds them open (Windows), the run goes on."""
        columns = list(dict.fromkeys(chain.from_iterable(self.log)))
        try:
            with chapter1.replacing(folder / "log.csv") as temporary:
                with open(temporary, "w", encoding="utf-8", newline="") as file:
                    writer = csv.DictWriter(file, columns, restval="nan")
                    writer.writeheader()
                    writer.writerows(self.log)
            draw_curves({folder.name: folder / "log.csv"}, folder / "loss.png")
        except OSError as error:
            print(f"log.csv and loss.png were not written: {error}")

    def diverged(self, norm):
        """End the run: from what is no number, nothing can be learnt. Raises CourseError."""
        folder = self.folder / "diverged"
        if self.log:
            self.write_log(folder)
        raise CourseError(f"after step {self.step} the gradient is {norm}: lower --lr and "
                          f"--matrix-lr. The curves are in {folder}, the last state in "
                          f"{self.folder / 'resume.pt'}")

    def finish(self):
        """Return the log; where a signal stopped the run, end the script with the usual status."""
        if self.signals:
            print(f"stopped after step {self.step:,} and saved: --resume goes on")
            sys.exit(128 + self.signals[0])
        return self.log


def read_checkpoint(folder):
    """Return what resume.pt in a folder holds. Raises CourseError."""
    path = folder / "resume.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                     # it may be damaged in many ways
        raise CourseError(f"no run can be resumed from {path} ({type(error).__name__}): leave "
                          "--resume out") from None


def resumed_settings(folder, given):
    """Return the settings of the run in a folder. Raises CourseError if flags contradict them."""
    settings = read_checkpoint(folder)["config"]
    for name, value in given.items():
        free = name in ("resume", "out", "device", "patience", "compile", "test")
        if not free and value != settings.get(name):
            raise CourseError(f"--{name.replace('_', '-')} {value} contradicts the run to resume, "
                              f"which has {settings.get(name)}: leave one of the two flags out")
    return settings


def save_folder(model, tokenizer, folder, stops, template=""):
    """Write weights, config, tokenizer and generation_config.json, for transformers and vLLM."""
    folder = Path(folder)
    model.save(folder)
    tokenizer.save(folder)
    end = tokenizer.special_tokens.get(tokenizer.end)
    chapter1.write_json(folder / "generation_config.json",
                        {"bos_token_id": end, "pad_token_id": end, "eos_token_id": stops})
    if template:
        with chapter1.replacing(folder / "chat_template.jinja") as temporary:
            temporary.write_text(template, encoding="utf-8")


if __name__ == "__main__":
    chapter1.run(main, Config, __doc__ + chapter3.describe_presets(), defaults_for)
