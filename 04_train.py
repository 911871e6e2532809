"""Chapter 4 · Training: show the model text, and nudge every weight so that it is less surprised.

One step: take a batch, let the model guess each next token, measure its surprise (the loss, in nats: minus the natural
log of the probability it gave to what really came; perplexity is e^loss), compute for every weight in which direction
the loss falls (the gradient), and move it a little that way (the learning rate). Then again, some thousand times.

Run:    python 04_train.py                    picks device, precision and preset, and says why
        python 04_train.py --resume           goes on where the last run stopped (Ctrl-C is safe)
        python 04_train.py --compare out b    draws the runs in out/ and b/ in one picture
        torchrun --nproc-per-node=8 04_train.py --preset modern-124m
Writes: out/base/: the best weights so far as a folder for transformers, resume.pt, log.csv, loss.png.
Source: Micikevicius et al. 2018 (mixed precision), Loshchilov & Hutter 2019 (AdamW), Jordan et al. 2024 (Muon).
"""
import atexit
import gc
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import distributed, nn

chapter1, chapter2, chapter3 = map(import_module, ("01_tokenizer", "02_data", "03_model"))
CourseError, replacing, GPT = chapter1.CourseError, chapter1.replacing, chapter3.GPT

# Legend
#   R  rows (sequences) of a whole step       T  tokens of a row        V  vocabulary
#   micro-batch   rows that go through the model at once; a step adds up the gradients of several
IGNORED = -100  # a target, that is a next token in y, from which nothing is to be learnt
RECIPES = {  # how the presets of chapter 3 are trained ("124m": all larger ones), unless a flag says otherwise
    "small": dict(steps=2800, batch_tokens=2048, micro_batch=8, lr=6e-3, matrix_lr=0.01, eval_every=400),
    "gpu": dict(steps=2500, batch_tokens=32768, micro_batch=128, lr=3e-3, matrix_lr=0.02, eval_every=250),
    "124m": dict(steps=5000, batch_tokens=524288, micro_batch=32, lr=3e-3, matrix_lr=0.02, eval_every=250),
}


@dataclass
class TrainingConfig:
    steps: int | None = None  # updates of the weights; the learning rate reaches zero at the last
    batch_tokens: int | None = None  # tokens that one step learns from; more is smoother and slower
    micro_batch: int | None = None  # rows at once in memory; lower it when memory runs out, the step stays the same
    optimizer: str = "muon"  # muon (for the matrices, with adamw for the rest) or adamw
    lr: float | None = None  # AdamW's learning rate; too high diverges, too low is slow
    matrix_lr: float | None = None  # Muon's learning rate for matrices
    weight_decay: float = 0.1  # pull of matrices towards zero, per step and unit of learning rate
    warmup: int = 20  # steps over which the learning rate rises from zero
    clip: float = 1.0  # longest gradient that is taken as it is; a longer one is shortened to it (0: none is)
    seed: int = 1  # of the weights, of the order of the data and of dropout
    eval_every: int | None = None  # steps between evaluations (each also saves)
    patience: int = 0  # stop after so many evaluations without improvement (0: never)
    stop_at: int = 0  # stop after this step as Ctrl-C would, under the same schedule (0: at the end)
    device: str | None = None  # cpu, cuda, cuda:1, mps (default: the fastest there is)
    precision: str | None = None  # fp32, bf16 or fp16 of the products (default: by the device)
    compile: bool | None = None  # let torch.compile join operations (default: where it pays)
    attention: str = "auto"  # formula, blocks, fused or auto
    init: str = ""  # folder with weights and tokenizer to start from
    resume: bool = False  # go on from resume.pt in the folder that is being written
    out: str = "out"  # root folder of the course


# ---- The machine: device, precision, compilation, processes --------------------------------------
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


def choose_machine(config):
    """Return the Machine: what the flags ask for, else what the hardware is good at. Prints the reasons."""
    rank, world, local = (int(os.environ.get(*pair)) for pair in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    found = f"cuda:{local}" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=config.device or found).device
    except (RuntimeError, AssertionError) as error:
        raise CourseError(f"--device {config.device} cannot be used here: {str(error).splitlines()[0]}") from None
    best = "bf16" if device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)() else "fp32"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        best = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    precision = config.precision or best
    if precision not in ("fp32", "bf16", "fp16") or (precision == "fp16" and device.type != "cuda"):
        raise CourseError(f"--precision {precision}: choose fp32, bf16 or, on a CUDA GPU, fp16; this is {device}")
    compiles = config.compile if config.compile is not None else device.type != "mps"
    if rank == 0:
        print(f"device {device} ({'as asked' if config.device else 'the fastest there is'}), precision {precision} ("
              f"{best} is best here), compile {compiles} ({'as asked' if config.compile is not None else 'default'})")
    if world > 1 and not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(distributed.destroy_process_group)
    return Machine(device, precision, compiles, rank, world)


# ---- What a step needs: optimizer, schedule, loss ------------------------------------------------
def make_optimizers(model, config):
    """Return {name: optimizer}: Muon for the matrices inside the blocks, AdamW for the rest, or for all.

    AdamW averages gradients over time (momentum) and divides each number by its usual size, so that all weights move
    at a like pace. A gradient matrix, though, is dominated by a few directions: Muon makes the average orthogonal, all
    directions equally strong, in five steps of matrix products (Newton-Schulz). An embedding is a table of rows, not
    a map between directions, so it stays with AdamW, as do norms and biases.
    """
    if config.optimizer not in ("muon", "adamw"):
        raise CourseError(f"--optimizer {config.optimizer}: choose muon or adamw")
    groups, decay = {"muon": [], "tables": [], "vectors": []}, config.weight_decay
    for name, p in model.named_parameters():
        matrix = "muon" if config.optimizer == "muon" and "layers." in name else "tables"
        groups[matrix if p.ndim == 2 else "vectors"] += [p] if p.requires_grad else []
    rest = [{"params": groups["tables"]}, {"params": groups["vectors"], "weight_decay": 0.0}]
    made = {"adamw": torch.optim.AdamW(rest, config.lr, betas=(0.9, 0.95), weight_decay=decay, fused=True)}
    if groups["muon"]:
        made["muon"] = torch.optim.Muon(groups["muon"], config.matrix_lr, decay, adjust_lr_fn="match_rms_adamw")
    return made


def lr_share(step, config):
    """Return the share of the peak learning rate at a step: a linear rise, then a linear fall to zero."""
    return min(1.0, (step + 1) / max(1, config.warmup)) * max(0.0, 1 - step / config.steps)


class Objective(nn.Sequential):
    """The model together with its loss, so that both are compiled as one: Objective(model)(x, y)."""

    def forward(self, x, y, documents=None):
        """Return the summed loss in nats of a micro-batch's targets y (B, T), without the IGNORED ones."""
        logits = self[0](x, documents).float()                 # (B, T) -> (B, T, V)
        return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=IGNORED, reduction="sum")


def evaluate(model, machine, tokens, bytes_of, limit, rows=8):
    """Return (nats per token, bits per byte) of the first `limit` tokens; bytes_of (V,): how long each token is."""
    T, objective, nats = model.config.context, Objective(model).eval(), 0.0
    if len(tokens) <= T:
        raise CourseError(f"{len(tokens):,} held-out tokens, too few for a context of {T:,}: add text, or join its files")
    count = min(len(tokens) - 1, max(T, limit)) // T * T
    ids = torch.from_numpy(tokens[:count + 1].astype(np.int64))
    with torch.no_grad(), machine.autocast():
        for x, y in zip(ids[:-1].view(-1, T).split(rows), ids[1:].view(-1, T).split(rows)):   # (rows, T)
            nats += objective(x.to(machine.device), y.to(machine.device)).item()
    return nats / count, nats / math.log(2) / max(1, bytes_of[ids[1:]].sum().item())


def sample(model, ids, count, seed=0, vocab=None):
    """Return `count` more ids (all below `vocab`) after some: the shortest sampler there is. Chapter 5 does better."""
    generator, device = torch.Generator().manual_seed(seed), model.embed_tokens.weight.device
    for _ in range(count):
        logits = model(torch.tensor([ids[-model.config.context:]], device=device))[0, -1, :vocab]   # (V)
        ids = ids + torch.multinomial(logits.float().softmax(-1).cpu(), 1, generator=generator).tolist()
    return ids


# ---- A run: picture, checkpoint, the loop itself --------------------------------------------------
def draw_curves(logs, path):
    """Draw log.csv files {name: file} against the tokens read: values pale, their running mean strong."""
    figure, colors = Figure(figsize=(12, 6), layout="constrained"), ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
    for place, column in enumerate("loss val_loss val_bits_per_byte grad_norm lr_share tokens_per_second".split(), 1):
        axis = figure.add_subplot(2, 3, place, title=column.replace("_", " "), xlabel="tokens read")
        for color, (name, file) in zip(colors * len(logs), logs.items()):
            table = np.genfromtxt(file, delimiter=",", names=True, ndmin=1, encoding="utf-8")
            tokens, values = (table[key][np.isfinite(table[column])] for key in ("tokens", column))
            window = 1 + len(values) // 50
            mean = np.convolve(values, np.full(window, 1 / window), "valid") if len(values) else values
            axis.plot(tokens, values, color=color, alpha=0.3, linewidth=0.8)
            axis.plot(tokens[window // 2:][:len(mean)], mean, color=color, label=name, marker="." if window == 1 else None)
    figure.axes[0].legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)


def save_run(path, run, parts):
    """Write resume.pt (run: plain values; parts: what has a state_dict), log.csv and loss.png, each whole or not."""
    if not all(p.isfinite().all() for p in parts["model"].parameters()):
        raise CourseError(f"the weights are no longer finite, {path} stays as it was: try a lower --lr and --matrix-lr")
    log, rows = path.with_name("log.csv"), [list(row.values()) for row in run["log"]]
    with replacing(path) as temporary:
        torch.save({**run, **{name: part.state_dict() for name, part in parts.items()}}, temporary)
    with replacing(log) as temporary:
        np.savetxt(temporary, rows, "%.12g", ",", header=",".join(run["log"][0]), comments="", encoding="utf-8")
    draw_curves({path.parent.name: log}, path.with_name("loss.png"))


def take_stock(path, run, parts, judge, keep):
    """Evaluate the model, write its folder anew (`keep`) if it is the best so far, and save the run."""
    loss, bits, remark = judge(parts["model"].eval())
    parts["model"].train()
    print(f"step {run['step']:,}: held-out loss {loss:.3f} (perplexity {math.exp(min(50, loss)):.1f}), {bits:.3f} bits "
          f"per byte; {sum(row['clipped'] for row in run['log']):,} steps clipped; {remark}")
    run["log"][-1].update(val_loss=loss, val_bits_per_byte=bits)
    run.update(worse=0 if loss < run["best"] else run["worse"] + 1, best=min(run["best"], loss))
    if run["worse"] == 0:
        keep(parts["model"])
    save_run(path, run, parts)


def read_checkpoint(path, config):
    """Return (checkpoint, its config) for --resume. Raises CourseError naming a flag that contradicts it."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        old = type(config)(**saved["config"])
    except Exception as error:                                 # a damaged file fails in many ways
        raise CourseError(f"no run can be resumed from {path} ({type(error).__name__}): leave --resume out") from None
    typed, defaults, new = {word.split("=")[0] for word in sys.argv}, asdict(type(config)()), {}
    for name, value in asdict(config).items():
        flag, was = "--" + name.replace("_", "-"), getattr(old, name)
        given = value != defaults[name] or flag in typed       # --seed 1 is given, though 1 is the default
        if name in ("resume", "stop_at", "out") or (given and name in ("patience", "device")):
            new[name] = value
        elif given and value != was:
            raise CourseError(f"{flag} {value} contradicts the run to resume, which has {was}: leave one flag out")
    return saved, replace(old, **new)


def train(model, batch, config, machine, folder, judge, keep, facts=None, saved=None):
    """Train a model and return its log, a list of rows for log.csv.

    batch(step) -> x, y, documents (None, or as in chapter 3), each (R, T). judge(model) -> held-out loss, bits per
    byte, a remark. keep(model) stores the best. facts: what a resumed run must share; saved: its checkpoint.
    """
    for name in "steps batch_tokens micro_batch eval_every seed stop_at lr matrix_lr weight_decay clip".split():
        if not getattr(config, name) >= (least := int(name in "steps batch_tokens micro_batch eval_every")):
            raise CourseError(f"--{name.replace('_', '-')} {getattr(config, name)}: it must be at least {least}")
    if saved and saved["facts"] != facts:
        raise CourseError(f"the run began with {saved['facts']}, here is {facts}: bring that back or drop --resume")
    objective, optimizers = Objective(model.to(machine.device).train()), make_optimizers(model, config)
    if machine.world > 1:                                      # its `backward` averages gradients over all processes
        objective = nn.parallel.DistributedDataParallel(objective)
    objective = torch.compile(objective, disable=not machine.compile)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.precision == "fp16")
    parts, path = {"model": model, "scaler": scaler, **optimizers}, Path(folder) / "resume.pt"
    run = {"step": 0, "log": [], "best": math.inf, "worse": 0, **(saved or {}), "facts": facts,
           "config": asdict(replace(config, precision=machine.precision, compile=machine.compile)),
           "model_config": asdict(model.config)}
    for name, part in parts.items() if saved else ():
        part.load_state_dict(run.pop(name))
    first, skipped, signals, reasons, chief = run["step"], 0, [], torch.zeros(3), machine.rank == 0
    handlers = {n: signal.signal(n, lambda number, _: signals.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        for step in range(first, min(config.steps, config.stop_at or config.steps)):
            # 1. The learning rate and dropout's random numbers follow from the step, and need no saving.
            start, share = time.time(), lr_share(step, config)
            for name, optimizer in optimizers.items():
                for group in optimizer.param_groups:
                    group["lr"] = share * (config.matrix_lr if name == "muon" else config.lr)
            torch.manual_seed(int(np.random.default_rng((config.seed, step, machine.rank)).integers(2**32)))
            # 2. Gradients of all micro-batches add up to that of the whole step: each loss is a sum over targets,
            #    divided by the targets of the whole step, not of the micro-batch, which may have fewer.
            whole = [tensor for tensor in batch(step) if tensor is not None]             # x, y, ...: (R, T) each
            targets, nats = int((whole[1] != IGNORED).sum()) or 1, torch.zeros((), device=machine.device)
            mine = [x[machine.rank::machine.world].to(machine.device).split(config.micro_batch) for x in whole]
            for i, micro_batch in enumerate(zip(*mine), 1):
                with machine.autocast(), objective.no_sync() if machine.world > 1 and i < len(mine[0]) else nullcontext():
                    loss = objective(*micro_batch)
                scaler.scale(loss * machine.world / targets).backward()          # the last also asks the other processes
                nats += loss.detach()
            # 3. All processes share the loss, and the reasons to stop, which one alone may know.
            reasons = torch.tensor([0 < config.patience <= run["worse"], *(n in signals for n in handlers)]).to(nats)
            for tensor in (nats, reasons) if machine.world > 1 else ():
                distributed.all_reduce(tensor)
            # 4. Take out the factor by which `scaler` keeps fp16's small gradients from becoming 0; shorten long ones.
            for optimizer in optimizers.values():
                scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf).item()
            # 5. Move the weights, unless the numbers have left their range (with fp16, that mends itself).
            skipped = 0 if math.isfinite(norm) else skipped + 1
            if skipped > (20 if scaler.is_enabled() else 4):
                raise CourseError(f"no finite gradient in {skipped} steps: lower --lr and --matrix-lr; the last good "
                                  f"state {'was not saved' if run['best'] == math.inf else f'is {path}'}")
            for optimizer in () if skipped else optimizers.values():
                scaler.step(optimizer)
            scaler.update()
            model.zero_grad(set_to_none=True)
            # 6. Log; now and then evaluate and save.
            loss, tokens, seconds, run["step"] = nats.item() / targets, whole[0].numel(), time.time() - start, step + 1
            run["log"].append({"step": step + 1, "tokens": (step + 1) * tokens, "seconds": seconds, "loss": loss,
                               "val_loss": math.nan, "val_bits_per_byte": math.nan, "grad_norm": norm,
                               "clipped": norm > config.clip > 0, "lr_share": share, "tokens_per_second": tokens / seconds})
            if chief and ((step + 1) % config.eval_every == 0 or step + 1 == config.steps):
                take_stock(path, run, parts, judge, keep)
            elif chief and (sys.stdout.isatty() or step == first or (step + 1) % 100 == 0):
                when = f"{seconds:.1f} s" if step == first else f"{(config.steps - step) * seconds / 60:.0f} min left"
                print(f"step {step + 1}/{config.steps}: loss {loss:.3f}, gradient {norm:.2f}, {tokens / seconds:,.0f} "
                      f"tokens/s, {when}", end="\x1b[K\r" if sys.stdout.isatty() else "\n", flush=True)
            if reasons.any():
                break
        if chief and run["step"] < config.steps:
            save_run(path, run, parts)
            print(f"stopped after step {run['step']}: --resume goes on from {path}")
    except (RuntimeError, OSError) as error:
        words, half = str(error), max(1, config.micro_batch // 2)
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")) and run["step"] == first:
            print(f"not compiled, a third slower: {words.splitlines()[0]}")
            return train(model, batch, config, replace(machine, compile=False), folder, judge, keep, facts, saved)
        if "out of memory" in words or "can't allocate memory" in words:                     # of a GPU, of a CPU
            raise CourseError(f"out of memory with --micro-batch {config.micro_batch}: {half} needs half, and twice as "
                              "many of them make the same step; a smaller --context helps too") from None
        if isinstance(error, OSError) or "unexpected pos" in words:                          # torch's full disk
            raise CourseError(f"cannot write {path.parent} ({error}): what is there is whole, see --resume") from None
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        objective = None                                       # else DDP keeps the processes connected to the very end,
        gc.collect()                                           # when gloo's threads can only abort
    if run["step"] < config.steps and not reasons[0]:          # stopped by a signal or --stop-at, not by patience
        sys.exit(130 if reasons[1] else 143 if reasons[2] else 0)
    return run["log"]


# ---- The script ----------------------------------------------------------------------------------
@dataclass
class Config(TrainingConfig):
    preset: str | None = None  # shape of the model, see 03_model.py --help (default: by the device)
    context: int | None = None  # tokens of a row
    dropout: float | None = None  # share of activations dropped in training, for small data read often
    eval_tokens: int = 65536  # held-out tokens looked at in each evaluation
    compare: list[str] = field(default_factory=list)  # root folders whose runs to draw in one picture; no training


def save_folder(model, tokenizer, folder, stops, template=""):
    """Write weights, config, tokenizer and generation_config.json: a folder that transformers opens."""
    model.save(folder)
    tokenizer.save(folder)
    ids = dict.fromkeys(("bos_token_id", "pad_token_id"), tokenizer.special_tokens.get(chapter1.END_OF_TEXT))
    chapter1.write_json(Path(folder) / "generation_config.json", {**ids, "eos_token_id": stops})
    if template:
        with replacing(Path(folder) / "chat_template.jinja") as temporary:
            temporary.write_text(template, encoding="utf-8")


def start_model(config, vocab_size, saved_shape):
    """Return the model of a checkpoint, of --init, or of the preset's shape, with V a multiple of 64 for speed."""
    given = {name: getattr(config, name) for name in ("context", "dropout") if getattr(config, name) is not None}
    if config.init and given:
        raise CourseError(f"--{min(given)} belongs to the model of --init: leave it out")
    shape = {**chapter3.PRESETS[config.preset], "vocab_size": -(-vocab_size // 64) * 64, **given, **saved_shape}
    shape = chapter3.GPTConfig(**{**shape, "attention": config.attention})                   # checks them, too
    model = GPT.load(config.init) if config.init and not saved_shape else GPT(shape)
    model.config.attention = config.attention
    return model


def main(config):
    """Train on out/data and keep the best model in out/base."""
    out, folder = Path(config.out), Path(config.out) / "base"
    if config.compare:
        draw_curves({root: Path(root) / "base" / "log.csv" for root in config.compare}, out / "compare.png")
        return print(f"drew {out / 'compare.png'}")
    saved, config = read_checkpoint(folder / "resume.pt", config) if config.resume else (None, config)
    machine = choose_machine(config)
    preset = config.preset or ("small" if machine.device.type == "cpu" else "gpu")
    if preset not in chapter3.PRESETS:
        raise CourseError(f"--preset {preset}: choose one of {', '.join(chapter3.PRESETS)}")
    recipe = RECIPES.get(preset, RECIPES["124m"]).items()
    config = replace(config, preset=preset, **{name: value for name, value in recipe if getattr(config, name) is None})
    tokenizer = chapter1.Tokenizer.load(own := config.init or out / "tokenizer")
    opened = {split: chapter2.open_tokens(out / "data", split) for split in ("train", "val", "test")}
    texts, meta = {split: tokens for split, (tokens, _) in opened.items()}, opened["train"][1]
    if meta["fingerprint"] != tokenizer.fingerprint():
        raise CourseError(f"{out}/data has other tokens: run 02_data.py --tokenizer {own} --out {out}")
    torch.manual_seed(config.seed)
    model = start_model(config, tokenizer.vocab_size, saved["model_config"] if saved else {}).to(machine.device)
    T, V, R = model.config.context, model.config.vocab_size, max(1, config.batch_tokens // model.config.context)
    bytes_of = torch.from_numpy(chapter2.token_sizes(tokenizer, V))
    if machine.rank == 0:
        loss, _ = evaluate(model, machine, texts["val"], bytes_of, T)                         # fails early, if it does
        print(f"preset {preset}, {sum(p.numel() for p in model.parameters()):,} parameters; {config.steps:,} steps of "
              f"{R} x {T} tokens; the loss is {loss:.2f} now (a guess among {V:,} tokens: {math.log(V):.2f})")
    batch = lambda step: (*map(torch.from_numpy, chapter2.get_batch(texts["train"], step, R, T, config.seed)), None)
    judge = lambda model: (*evaluate(model, machine, texts["val"], bytes_of, config.eval_tokens),
                           repr(tokenizer.decode(sample(model, texts["val"][:8].tolist(), 24, vocab=tokenizer.vocab_size))))
    keep = lambda model: save_folder(model, tokenizer, folder, [tokenizer.special_tokens[chapter1.END_OF_TEXT]])
    facts = {"tokenizer": tokenizer.fingerprint(), "data": meta["splits"]}
    train(model, batch, config, machine, folder, judge, keep, facts, saved)
    if machine.rank > 0:
        return
    for split in [split for split in ("val", "test") if len(texts[split]) > T]:
        loss, bits = evaluate(GPT.load(folder).to(machine.device), machine, texts[split], bytes_of, len(texts[split]))
        print(f"{split}: loss {loss:.4f}, perplexity {math.exp(loss):.2f}, {bits:.4f} bits per byte")
    print(f"saved {folder}; next: python 05_sample.py")


if __name__ == "__main__":
    chapter1.run(main, Config, __doc__)
