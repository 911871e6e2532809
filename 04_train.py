"""Chapter 4 · Training: show the model text, and nudge every weight so that it is less surprised.

One step: take a batch, let the model guess each next token, and measure its surprise (the loss, in
nats: minus the natural log of the probability that it gave to what really came). Compute for every
weight how the loss would change with it (the gradient), and move the weight a little the other way
(the learning rate says how far). Then again, a few thousand times:

    batch -> model -> loss -> backward -> gradients -> optimizer -> weights -+
      ^-------------------------- the next step -----------------------------+

Run:    python 04_train.py                    picks device, precision and preset; all are flags
        python 04_train.py --resume           goes on where the last run stopped (Ctrl-C is safe)
        python 04_train.py --test             the best model on all of val and test: look once
Writes: out/base/: the best weights, as a folder for transformers; resume.pt, log.csv, loss.png
Source: Micikevicius 2018 (mixed precision), Loshchilov 2019 (AdamW), Jordan 2024, Liu 2025 (Muon)
"""
import atexit
import math
import os
import signal
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import distributed, nn

chapter1 = import_module("01_tokenizer")
chapter2 = import_module("02_data")
chapter3 = import_module("03_model")
CourseError = chapter1.CourseError

# Legend
#   B  sequences of a micro-batch, R of a step (B in chapter 2)     T  tokens each     V  vocabulary
#   micro-batch   sequences that go through the model at once; a step may add up several
# Tools, at the file's end: checkpoint, log, `rescue` (Ctrl-C); Machine: `split` cuts a step into
# micro-batches (each GPU runs this file and takes its share), `total` sums over GPUs.
IGNORED = -100  # a target (a next token in y) from which nothing is to be learnt, in chapter 6


# ---- Training, by its definition -----------------------------------------------------------------
def lr_scale(step, config):
    """Return what the learning rates are multiplied by: a short rise, times a linear fall to zero.
    Why rise? An optimizer averages gradients, and at first it has seen too few of them. Why fall?
    Large steps cover ground but jump about; small ones reach the bottom."""
    return min(1.0, (step + 1) / max(1, config.warmup)) * (1 - step / config.steps)


def train_naive(model, batch, config):
    """Train a model and return its losses: the core of what `train` does safely and fast."""
    # AdamW moves the weights: how, the next section says. cross_entropy is the surprise: of logits
    # it makes probabilities, and takes minus the log of the one that the right token got.
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0, fused=True)
    losses = []
    for step in range(config.steps):
        x, y = batch(step)                                         # inputs, targets: (R, T) each
        logits = model(x)                                          # (R, T) -> (R, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())  # (R T, V), (R T) -> mean, nats
        loss.backward()                                            # adds each gradient to .grad
        optimizer.param_groups[0]["lr"] = config.lr * lr_scale(step, config)   # of all weights
        optimizer.step()                                           # moves the weights
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# ---- What a step needs: loss and optimizers ------------------------------------------------------
TERMS = ["loss"]  # each a column of the log; for a second one, add a sum to the stack below, too


def loss_sums(logits, y):
    """Return sums over the targets y (B, T) that count: first of all, the surprise in nats."""
    logits = logits.float().flatten(0, 1)                          # (B, T, V) -> (B T, V)
    nats = F.cross_entropy(logits, y.flatten(), ignore_index=IGNORED, reduction="sum")
    return torch.stack([nats])


# Three ways to move a weight w against its gradient g, at a learning rate lr:
#   SGD     w -= lr g. Rare tokens have small gradients and hardly move, common ones too much.
#   AdamW   m = average of g, v = of g^2, over 10 and 1,000 steps (betas 0.9, 0.999; for large
#           batches often 0.95), fewer at first; w -= lr m / sqrt(v): mostly by 0.2 lr, be g large
#           or not (up to 3 lr, if it is rare). And w -= lr decay w pulls w, if unused, to zero.
#   Muon    Any matrix is U s V^T: turn by V^T, stretch by the numbers s (singular values), turn by
#           U. A few large s in a gradient drown the rest. Muon averages gradients (momentum) and
#           makes all s near 1, (10, 0.1) to (1, 1): so rare directions are learnt.
def orthogonalise(matrices):
    """Return U V^T, nearly, of each of the matrices X = U s V^T (N, rows, columns): all s near 1.
    X X^T X is U s^3 V^T, as V^T V = U^T U = 1 (turns undo each other): so products change all s.
    Newton-Schulz: a s + b s^3 + c s^5 with the a, b, c below, five times over, brings any s between
    0.01 and 1 to between 0.68 and 1.14. bfloat16 will do."""
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonalise(matrices.mT).mT                       # X X^T is smaller that way
    length = matrices.norm(dim=(-2, -1), keepdim=True)             # no s is larger
    x = (matrices / length.clamp(min=1e-7)).bfloat16().contiguous()    # laid out anew: .mT is slow
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        square = x @ x.mT                                          # X X^T, (N, rows, rows)
        bend = torch.baddbmm(square, square, square, beta=b, alpha=c)  # b X X^T + c X X^T X X^T
        x = torch.baddbmm(x, bend, x, beta=a)                      # a x + bend @ x
    return x


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal; all matrices of one shape at once. Torch saves the `state`."""

    def __init__(self, matrices, lr, weight_decay):
        by_shape = {}
        for p in matrices:
            by_shape.setdefault(p.shape, []).append(p)
        groups = [{"params": same} for same in by_shape.values()]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()                                               # no gradients of these moves
    def step(self):
        for group in self.param_groups:
            gradient = torch.stack([p.grad for p in group["params"]])          # (N, rows, columns)
            state = self.state[group["params"][0]]                 # one for all, under the first
            if not state:
                state["average"] = torch.zeros_like(gradient)
            average = state["average"].lerp_(gradient, 0.05)       # .95 old + .05 new, in place
            update = orthogonalise(average.lerp(gradient, 0.05))   # Nesterov: lean to the newest
            # Numbers of U V^T are about 1 / sqrt(longer side) in size. Times 0.2 sqrt(longer side),
            # they are about 0.2, as AdamW's: so its usual rates are a start (Liu 2025).
            for p, change in zip(group["params"], update):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(change, alpha=-0.2 * group["lr"] * max(change.shape) ** 0.5)


OPTIMIZERS = {"muon": Muon, "adamw": None}  # for the blocks' matrices (None: as for the rest)
GENTLE = dict(lr=3e-5, matrix_lr=2e-4)  # rates for weights that know something already (--init)


def make_optimizers(model, config):
    """Return {name: optimizer}: --optimizer's for the blocks' matrices, AdamW for the rest: tables
    (embeddings), and vectors, which are not pulled to zero: a norm's usual weight is 1."""
    kind = OPTIMIZERS[config.optimizer]
    matrices, others, vectors = [], [], []
    for name, p in model.named_parameters():
        if p.ndim < 2:
            vectors.append(p)
        elif kind and "layers." in name and p.requires_grad:       # not frozen, as by LoRA
            matrices.append(p)
        else:
            others.append(p)
    groups = [{"params": others, "weight_decay": config.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    optimizers = {"adamw": torch.optim.AdamW(groups, config.lr, fused=True)}
    if matrices:
        optimizers[config.optimizer] = kind(matrices, config.matrix_lr, config.weight_decay)
    return optimizers


# ---- Training, for real --------------------------------------------------------------------------
# Numbers in 16 bits take half the memory, and products of them are faster. Weights stay in fp32:
# with 3 digits, 1 + 0.0001 is rounded to 1, and all small steps would come to nothing.
#   fp32   8 bits for the range, 24 for the digits: 1e-38 to 3e38, 7 digits
#   bf16   8 and 8: the same range, 2 to 3 digits. What gradients need is range, so this just works
#   fp16   5 and 11: 6e-8 to 65504, 3 digits. Small gradients become 0, so a scaler multiplies the
#          loss, and so all gradients, by a factor (1 elsewhere): on overflow, no step, and halve it
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16, "": None}


def train(model, batch, config, machine, folder, measure, keep):
    """Train a model; return its log, a row a step. batch(step) -> x, y (and, in chapter 6, which
    text each token is of), (R, T); measure(model) -> val loss, bits a byte; keep(model) saves."""
    model.train()                                                  # a mode: dropout is on
    optimizers = make_optimizers(model, config)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.precision == "fp16")
    to_save = {"model": model, "scaler": scaler, **optimizers}
    with rescue() as interrupts:                                   # Ctrl-C fills that list
        log = restore(to_save, folder, config) if config.resume else []
        compiled_sums = compile_parts(model, batch(0), config, machine)        # blocks, in place
        for step in range(len(log), config.steps):
            start = time.time()

            # 1. Learning rates and dropout's random numbers follow from the step: nothing to save.
            schedule = lr_scale(step, config)
            for optimizer in optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = schedule * optimizer.defaults["lr"]          # --lr, --matrix-lr
            torch.manual_seed(hash((config.seed, step, machine.rank)))

            # 2. Sum each micro-batch's loss and divide by the targets of the whole step: so the
            #    gradients add up to those of one large batch. (Means would not, if counts differ.)
            whole = batch(step)                                    # x, y ...: (R, T) each
            count = max(1, int((whole[1] != IGNORED).sum()))       # targets
            step_terms = 0.0
            for x, y, *documents in machine.split(whole, config.micro_batch):
                with machine.autocast():
                    terms = compiled_sums(model(x, *documents), y) / count     # (len(TERMS))
                scaler.scale(terms.sum()).backward()
                step_terms += terms.detach()                       # the numbers alone

            # 3. Several GPUs had other sequences of this step: add theirs, too.
            machine.total(step_terms)
            for p in model.parameters():
                if p.grad is not None:
                    machine.total(p.grad)

            # 4. Divide by the scaler's factor; then shorten a gradient (of all weights, as one
            #    vector) that is too long: it would rule the averages.
            for optimizer in optimizers.values():
                scaler.unscale_(optimizer)
            length = nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)
            *values, grad_norm = torch.cat((step_terms, length[None])).tolist()    # waits once

            # 5. Move the weights.
            for optimizer in optimizers.values():
                scaler.step(optimizer)
            scaler.update()
            model.zero_grad()

            # 6. Log; now and then, and at the end, evaluate and save.
            tokens = whole[0].numel()
            seconds = time.time() - start
            log.append({"step": step + 1, "tokens": tokens * (step + 1), "seconds": seconds,
                        **dict(zip(TERMS, values)), "grad_norm": grad_norm, "lr_scale": schedule,
                        "tokens_per_second": tokens / seconds})
            if step == 0 or len(log) % 100 == 0:
                shown = [f"{name} {value:,.6g}" for name, value in log[-1].items()]
                print(", ".join(shown), flush=True)
            if not math.isfinite(grad_norm) and scaler.get_scale() <= 1:       # fp16 halves first
                write_log(log, folder / "diverged")                # beside the best so far
                raise CourseError(f"loss or gradient is {grad_norm}: lower --lr and --matrix-lr")
            stops = machine.total(torch.tensor(len(interrupts))) > 0           # of any process
            if stops or len(log) % config.eval_every == 0 or len(log) == config.steps:
                if machine.rank == 0:
                    take_stock(to_save, log, config, folder, measure, keep)
                machine.total(torch.zeros(1))                      # all wait for process 0
            if stops and len(log) < config.steps:
                print(f"stopped after step {len(log)} and saved: --resume goes on")
                sys.exit(130)
    return log


# ---- Looking at it: held-out loss, curves --------------------------------------------------------
@torch.no_grad()
def surprise(model, machine, sequences, sizes):
    """Return nats a target, bits a byte of x, y (, documents), (N, 2 or 3, T); sizes: bytes (V)."""
    targets = sequences[:, 1][sequences[:, 1] != IGNORED]
    at_once = 2**24 // (sequences.shape[2] * model.config.vocab_size) or 1     # logits fit memory
    nats = 0.0
    for part in sequences.to(machine.device).split(at_once):       # (at_once, 2 or 3, T)
        with machine.autocast():
            x, y, *documents = part.unbind(1)
            nats += loss_sums(model(x, *documents), y)[0].item()
    return nats / len(targets), nats / math.log(2) / sizes[targets].sum().item()


def evaluate(model, machine, tokens, sizes, limit=0):
    """Return `surprise` at about `limit` tokens, spread over a split (0: at all of it)."""
    T = model.config.context
    if len(tokens) <= T:
        raise CourseError(f"{len(tokens)} held-out tokens: use more text or a smaller --context "
                          "(fewer than 20 documents have no test split)")
    ids = torch.from_numpy(tokens.astype("int64")).unfold(0, T + 1, T)         # (N, T + 1)
    stride = math.ceil(T * len(ids) / (limit or len(tokens)))
    x_and_y = torch.stack((ids[::stride, :-1], ids[::stride, 1:]), dim=1)      # (N, 2, T)
    return surprise(model, machine, x_and_y, sizes)


def draw_curves(log, path):
    """Draw the columns of a log, from the fourth on, against tokens read."""
    columns = list(log[-1])[3:]
    figure = Figure(figsize=(13, 6), layout="constrained")
    for i, column in enumerate(columns, 1):
        rows = [row for row in log if column in row]               # held-out values are few
        axis = figure.add_subplot(2, math.ceil(len(columns) / 2), i, title=column)
        axis.plot([row["tokens"] for row in rows], [row[column] for row in rows])
    figure.supxlabel("tokens read")
    chapter1.save_figure(figure, path)


# ---- The script ----------------------------------------------------------------------------------
@dataclass
class TrainingConfig:
    """How to train. Of all settings the learning rates matter most, so tune them first: try a third
    of them, and three times as much. Larger models want lower ones."""
    steps: int = 2300  # updates of the weights; the learning rate falls to zero after the last
    batch_tokens: int = 2048  # tokens that one step learns from; more is smoother and slower
    micro_batch: int = 16  # sequences at once in memory; lower it when memory runs out
    optimizer: str = "muon"  # of the blocks' matrices: muon or adamw; the rest has adamw
    lr: float = 6e-3  # AdamW's learning rate; too high diverges, too low is slow
    matrix_lr: float = 0.01  # Muon's learning rate for matrices
    weight_decay: float = 0.1  # pull towards zero, per step and unit of learning rate
    warmup: int = 20  # steps over which the learning rate rises
    clip: float = 1.0  # longest gradient taken as it is; a longer one is shortened (0: none)
    seed: int = 1  # of the weights, of the order of the data and of dropout
    eval_every: int = 400  # steps between evaluations (each also saves)
    eval_tokens: int = 65536  # held-out tokens looked at, spread over the split (0: all)
    device: str = ""  # cpu, cuda, cuda:1, mps (default: the fastest there is)
    precision: str = ""  # of the products: fp32, bf16 or fp16 (default: by the device)
    compile: bool = True  # let torch.compile join operations: fewer trips to memory (never on mps)
    init: str = ""  # folder with weights and tokenizer to start from
    resume: bool = False  # go on with the run that stopped, with its settings
    out: str = "out"  # folder below which everything is written

    def __post_init__(self):
        if min(self.steps, self.batch_tokens, self.micro_batch, self.eval_every) < 1:
            raise CourseError("--steps, --batch-tokens, --micro-batch, --eval-every: at least 1")
        if self.optimizer not in OPTIMIZERS or self.precision not in DTYPES:
            raise CourseError(f"--optimizer: one of {[*OPTIMIZERS]}; --precision: of {[*DTYPES]}")


@dataclass
class Config(TrainingConfig, chapter3.GPTConfig):
    vocab_size: int = 0  # V, ids it knows: at least the tokenizer's, and a multiple of 64 for speed
    preset: str = ""  # values from chapter 3's PRESETS (default: gpu on CUDA, else small)
    test: bool = False  # evaluate the best model on all of val and test, and stop


def main(config):
    """Train on out/data and keep the best model in out/base."""
    out = Path(config.out)
    folder = out / "base"
    machine = choose_machine(config)
    if (folder / "resume.pt").exists() and not (config.resume or config.test):
        print(f"this run replaces the one in {folder} once evaluated: to keep that, Ctrl-C twice")

    # 1. The text, and the tokenizer that it was encoded with.
    source = config.init or out / "tokenizer"
    tokenizer = chapter1.Tokenizer.load(source)
    texts = {}
    for split in chapter2.SPLITS:
        texts[split], meta = chapter2.open_tokens(out / "data", split)
    if meta["fingerprint"] != tokenizer.fingerprint():
        raise CourseError(f"{out}/data has the tokens of another tokenizer: run "
                          f"`{chapter1.command('02_data.py', config)} --tokenizer {source}`")

    # 2. The model, and how well it guesses now.
    torch.manual_seed(config.seed)
    if config.init:                                                # with --test, it is out/base
        model = chapter3.GPT.load(config.init, config.context)
    else:
        V = max(config.vocab_size, tokenizer.vocab_size)
        config.vocab_size = math.ceil(V / 64) * 64
        model = chapter3.GPT(chapter3.GPTConfig(**chapter3.shape_of(vars(config))))
    vars(config).update(vars(model.config))        # the shape of --init's, and what was 0 so far
    model.to(machine.device).eval()
    sizes = torch.from_numpy(chapter2.token_sizes(tokenizer, config.vocab_size))
    if config.test:
        for split in ("val", "test"):
            loss, bits = evaluate(model, machine, texts[split], sizes)
            print(f"all of {split}: loss {loss:.4f}, {bits:.4f} bits per byte")
        return
    print(config)
    if not config.resume:
        loss, _ = evaluate(model, machine, texts["val"], sizes, 4096)
        print(f"loss {loss:.2f}; of a guess among all tokens, {math.log(config.vocab_size):.2f}")

    # 3. Training.
    def batch(step):
        # A sequence may span documents: the model learns that all before END_OF_TEXT is past.
        R = max(1, config.batch_tokens // config.context)
        x, y = chapter2.get_batch(texts["train"], step, R, config.context, config.seed)
        return torch.from_numpy(x), torch.from_numpy(y)

    def measure(model):
        return evaluate(model, machine, texts["val"], sizes, config.eval_tokens)

    def keep(model):
        save_folder(model, tokenizer, folder, [tokenizer.end])

    train(model, batch, config, machine, folder, measure, keep)
    print(f"saved {folder}; next: {chapter1.command('05_sample.py', config)}")


# ---- Tools: flags, machine, compilation, interruptions, checkpoint, folder -----------------------
def defaults_for(given):
    """Return values for flags that are not given: a resumed run's, --init's, or a preset's."""
    base = Path(given.get("out", "out")) / "base"
    fixed = {"preset", *chapter3.SHAPE} - {"context"}              # for new models only
    if given.get("resume") and not given.get("test"):
        fixed |= {"optimizer", "weight_decay"}
        defaults = {**read_checkpoint(base)["config"], "out": str(base.parent)}
    elif given.get("init") or given.get("test"):
        defaults = {"init": str(base), "context": 0, **GENTLE}
    else:
        on_gpu = choose_device(given.get("device")).type == "cuda"
        name = given.get("preset") or ("gpu" if on_gpu else "small")
        return {**chapter3.find_preset(name), "preset": name, "vocab_size": 0}
    for name in given.keys() & fixed:
        raise CourseError(f"--{name.replace('_', '-')} is for new models: leave it out here")
    return defaults


@dataclass
class Machine:
    """Where and how to compute."""
    device: torch.device
    precision: str
    compile: bool
    rank: int = 0  # number of this process, when several GPUs train together
    world: int = 1  # how many they are

    def autocast(self):
        """Return a context in which products run in the chosen precision; weights stay fp32."""
        dtype = DTYPES[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def split(self, whole, size):
        """Yield this process's part of tensors (R, T) on its device, `size` sequences at once."""
        mine = [tensor[self.rank::self.world].to(self.device) for tensor in whole]
        return zip(*[tensor.split(size) for tensor in mine])

    def total(self, tensor):
        """Add to a tensor those of the other processes, which it waits for; return it."""
        if self.world > 1:
            distributed.all_reduce(tensor)
        return tensor


def choose_device(name):
    """Return a device; each process that torchrun starts has its own GPU. Raises CourseError."""
    name = name or str(torch.accelerator.current_accelerator(True) or "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise CourseError(f"--device {name}: {str(error).splitlines()[0]}") from None


def choose_machine(config):
    """Return the Machine: what the flags ask for, else what is best here. Sets AdamW for fp16."""
    device = choose_device(config.device)
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()         # not in every torch
    precision = "bf16" if has_bf16 else "fp32"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")                 # TF32, where fp32 is asked for
        precision = "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
    machine = Machine(device, config.precision or precision,
                      config.compile and device.type != "mps",
                      int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    if machine.rank > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")       # one process talks for all
    print(machine)
    if machine.precision == "fp16":
        config.optimizer = "adamw"
        print("fp16: adamw for all weights, as muon needs bf16")
    if machine.world > 1:
        distributed.init_process_group()
        atexit.register(distributed.destroy_process_group)
    return machine


def compile_parts(model, whole, config, machine):
    """Compile a model's blocks (one code for all) and norm in place; return loss_sums, compiled."""
    if not machine.compile:
        return loss_sums
    print("compiling: up to half a minute")
    for part in [*model.layers, model.norm]:
        part.compile()
    sums = torch.compile(loss_sums)
    torch._dynamo.config.recompile_limit = 100                     # with adapters, no two are alike
    x, y, *documents = next(machine.split(whole, config.micro_batch))
    try:
        with machine.autocast():
            terms = sums(model(x, *documents), y)
        terms.sum().backward()                                     # a trial: it may fail
    except torch._dynamo.exc.TorchDynamoException as error:
        print(f"not compiled, so slower: {str(error).splitlines()[0]}")
        torch.compiler.set_stance("force_eager")                   # from now on, nothing is
    model.zero_grad()                                              # that was no step
    return sums


@contextmanager
def rescue():
    """Yield a list that Ctrl-C adds to (twice: ends at once); say what to do if memory is full."""
    interrupts = []

    def interrupt(number, frame):
        os.write(2, b"\nstopping after this step (once more: at once, unsaved)\n")
        interrupts.append(number)
        signal.signal(number, signal.default_int_handler)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupts
    except RuntimeError as error:
        if "alloc" in str(error).lower() or "out of memory" in str(error):     # CPU; MPS, CUDA
            raise CourseError("out of memory: a smaller --micro-batch makes the same step in more "
                              "parts; else lower --context") from None
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# A checkpoint holds parts, log and config. Without ... a resumed run would
#   model        begin anew
#   optimizers   go astray for some steps, until they have averages again
#   scaler       overflow in fp16, and leave some steps out
#   log          read the same data again, and take a worse model for the best
#   config       go on with other settings
def take_stock(parts, log, config, folder, measure, keep):
    """Evaluate the model, keep it if it is the best so far, and save the run."""
    model = parts["model"]
    with torch.compiler.set_stance("force_eager"):                 # only training is compiled
        loss, bits = measure(model.eval())
    model.train()
    print(f"held-out loss {loss:.3f}, {bits:.3f} bits per byte")
    if loss <= min([row.get("val_loss", loss) for row in log]):    # of rows that have one
        keep(model)
    log[-1].update(val_loss=loss, val_bits_per_byte=bits)
    states = {name: part.state_dict() for name, part in parts.items()}
    # Opened here, as torch.save would report a full disk by no OSError.
    with chapter1.replacing(folder / "resume.pt") as path, open(path, "wb") as file:
        torch.save({**states, "log": log, "config": asdict(config)}, file)
    write_log(log, folder)


def write_log(log, folder):
    """Write log.csv and loss.png, unless a viewer holds one open (on Windows): training goes on."""
    with suppress(PermissionError):
        chapter1.write_table(folder / "log.csv", log)
        draw_curves(log, folder / "loss.png")


def read_checkpoint(folder):
    """Return what resume.pt in a folder holds."""
    return torch.load(folder / "resume.pt", map_location="cpu", weights_only=True)


def restore(parts, folder, config):
    """Take up the run that stopped, where it stopped: return its log."""
    saved = read_checkpoint(folder)
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    print(f"{len(saved['log'])} of {config.steps} steps are done")
    return saved["log"]


def save_folder(model, tokenizer, folder, stops):
    """Write weights, config, tokenizer and generation_config.json, for transformers and vLLM."""
    model.save(folder)
    tokenizer.save(folder)
    settings = {"bos_token_id": tokenizer.end, "pad_token_id": tokenizer.end, "eos_token_id": stops}
    chapter1.write_json(folder / "generation_config.json", settings)


if __name__ == "__main__":
    chapter1.run(main, Config, __doc__ + chapter3.PRESET_HELP, defaults_for)
