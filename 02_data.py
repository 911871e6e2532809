"""Chapter 2 · Tokens to batches: clean the text, encode it once, and serve it in blocks.

Training reads the same text several times, in pieces of equal length. So the text is cleaned and
turned into tokens once, all documents in a row with a separator between them, and written to a flat
file of integers. A batch is then B slices of T tokens out of that file. What the model should answer
at each position is simply the next token, so the targets are the inputs moved by one:

    file      def  add ( a , b )  :  return  a + b  <|endoftext|>  import ...
    input x   def  add ( a , b )
    target y  add  (   a , b )  :

Run:    python 02_data.py                          the text that chapter 1 learnt from
        python 02_data.py --source shakespeare     another one (a download, files, folders, globs)
Writes: out/data/train.bin, val.bin, test.bin (uint16 or uint32), meta.json, statistics.png.
Source: the flat file of tokens is nanoGPT's idea; the fixed order of blocks is our own.
"""
import hashlib
import os
import re
import signal
import sys
import sysconfig
import time
import unicodedata
import urllib.request
import zipfile
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib import import_module  # a module whose name starts with a digit cannot follow `import`
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

chapter1 = import_module("01_tokenizer")
CourseError, Tokenizer, END_OF_TEXT = chapter1.CourseError, chapter1.Tokenizer, chapter1.END_OF_TEXT
read_json, write_json, replacing = chapter1.read_json, chapter1.write_json, chapter1.replacing

# Legend
#   B   batch: how many blocks are read at once
#   T   time: the tokens of one block, also called the context
#   step       one update of the model; it reads one batch
#   epoch      one pass over all blocks of the train split

# ---- Texts to download ---------------------------------------------------------------------------
HUB = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/"
DOWNLOADS = {  # name: (address, sha256, size and licence)
    "shakespeare": ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed", "1.1 MB, public domain"),
    "tinystories": (HUB + "TinyStoriesV2-GPT4-valid.txt",
        "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d", "23 MB, CDLA-Sharing-1.0"),
    "tinystories-full": (HUB + "TinyStoriesV2-GPT4-train.txt",
        "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443", "2.2 GB, CDLA-Sharing-1.0"),
    "enwik8": ("https://mattmahoney.net/dc/enwik8.zip",
        "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc", "36 MB, CC BY-SA 3.0"),
}
CONVERSATIONS = {  # for chapter 6
    "dolly": ("https://huggingface.co/datasets/databricks/databricks-dolly-15k/resolve/"
        "bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a/databricks-dolly-15k.jsonl",
        "2df9083338b4abd6bceb5635764dab5d833b393b55759dffb0959b6fcbf794ec", "13 MB, CC BY-SA 3.0"),
    "alpaca": ("https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json",
        "2eddafc6b977608d778aaab8dfc7e50e547b3af9826dfb9e909d9fc362e4a419", "23 MB, CC BY-NC 4.0"),
}


def watched(items, what, total, size=len):
    """Yield the items and print how far they are: size(item) is the bytes of one, `total` of all or 0."""
    start, done, line = time.time(), 0, ""
    for item in items:
        yield item
        done += size(item)
        speed = max(done, 1) / max(time.time() - start, 1e-3)  # bytes per second
        left = f", {(total - done) / speed:,.0f} s left" if total > done else ""
        line = f"  {what} {done / 1e6:,.1f} MB, {speed / 1e6:,.1f} MB/s{left}"
        if sys.stdout.isatty():                                # "\r": write over the line; a file gets the last only
            print(f"\r{line:60}", end="", flush=True)
    print("" if sys.stdout.isatty() else line)


def download(name, folder, table=DOWNLOADS):
    """Fetch table[name], an (address, sha256, remark), into `folder` unless it is there; returns its path.

    The file is called after `name`, with the suffix of the address; of a .zip the text inside is kept.
    Raises CourseError with the address, the path to put the file at by hand, and the way around.
    """
    (url, sha256, about), digest = table[name], hashlib.sha256()
    path = Path(folder) / (name + Path(url).suffix.replace(".zip", ".txt"))
    if path.exists():
        return path
    print(f"downloading {url} ({about})")
    try:
        with replacing(path) as temporary:
            with urllib.request.urlopen(url, timeout=30) as response, open(temporary, "wb") as file:
                total = int(response.headers["Content-Length"] or 0)
                for block in watched(iter(partial(response.read, 1 << 20), b""), "downloaded", total):
                    file.write(block)
                    digest.update(block)
            if (found := digest.hexdigest()) != sha256:
                raise OSError(f"{temporary.stat().st_size} of {total} bytes came, with sha256 {found}, not {sha256}")
            if url.endswith(".zip"):
                temporary.write_bytes(zipfile.ZipFile(temporary).read(name))
    except Exception as error:                                 # whatever a network or a disk brings about
        raise CourseError(f"could not download {url}: {error}. Save it (unpacked) by hand as {path}, or leave "
                          f"{name} out to use the source code of Python's own library") from None
    return path


def print_packages(folder):
    """Print the packages installed in `folder` with the licences that they state."""
    print("all packages installed here are read, private ones too; licences as they state them:")
    for package in sorted(distributions(path=[folder]), key=lambda package: package.name.lower()):
        stated = [value for key, value in package.metadata.items()
                  if key in ("License", "License-Expression") or value.startswith("License ::")]
        print(f"  {package.name} {package.version}: {stated[-1].splitlines()[0][:60] if stated else 'not stated'}")


# ---- Cleaning ------------------------------------------------------------------------------------
# Case is kept: "Polish" and "polish" differ, True is Python and true is not, and a model that never
# saw a capital cannot write one. Old advice to lower-case comes from methods that counted words.

RULES = {
    "newlines": lambda text: text.replace("\r\n", "\n").replace("\r", "\n"),
    "control characters": lambda text: re.sub("[\x00-\x08\x0b\x0e-\x1f\x7f\ufeff]", "", text),
    "Unicode (NFC)": lambda text: unicodedata.normalize("NFC", text),     # "e" + "´" becomes "é"
}
SHORTEST = 20  # characters; a shorter document teaches nothing


def clean(documents, changed, dropped):
    """Yield the cleaned (split, text); fill changed {rule: [count, before, after]} and dropped {reason: count}."""
    seen = set()
    for split, text in documents:
        for rule, mend in RULES.items():
            before, text = text, mend(text)
            if text != before:
                at = len(os.path.commonprefix([before, text]))
                changed.setdefault(rule, [0, before[max(0, at - 9):at + 9], text[max(0, at - 9):at + 9]])[0] += 1
        digest = hashlib.sha256(text.encode()).digest()
        if len(text.strip()) < SHORTEST or digest in seen:
            dropped["duplicate" if digest in seen else f"under {SHORTEST} characters"] += 1
            continue
        seen.add(digest)
        yield split, text


# ---- Encoding ------------------------------------------------------------------------------------
load_once = lru_cache(maxsize=1)(Tokenizer.load)  # each process opens the tokenizer once


def jobs_of(documents, size=500_000):
    """Gather (split, text) to lists of about `size` characters, in order."""
    job, length = [], 0
    for document in documents:
        job.append(document)
        if (length := length + len(document[1])) >= size:
            yield job
            job, length = [], 0
    yield job


def encode_job(folder, dtype, job):
    """Return [(split, token ids as bytes, bytes of text)] of a list of (split, text)."""
    tokenizer = load_once(folder)
    end = [tokenizer.special_tokens[END_OF_TEXT]]
    return [(split, np.array(tokenizer.encode(text) + end, dtype).tobytes(), len(text.encode())) for split, text in job]


def on_all_cores(work, jobs, workers):
    """Yield work(job) for each job, in order; at most 4 jobs a worker are under way, which bounds the memory."""
    ahead, ignore_ctrl_c = deque(), (signal.SIGINT, signal.SIG_IGN)       # the main process alone ends the work
    with ProcessPoolExecutor(workers, initializer=signal.signal, initargs=ignore_ctrl_c) as pool:
        for job in jobs:
            ahead.append(pool.submit(work, job))
            if len(ahead) > 4 * workers:
                yield ahead.popleft().result()
        yield from (future.result() for future in ahead)


def encode_documents(documents, tokenizer_folder, folder, workers, facts, total=0):
    """Write {split}.bin and, last, meta.json with `facts`. Raises CourseError if there is nothing to train on."""
    load_once.cache_clear()                                    # chapter 1 may have run again
    tokenizer = load_once(tokenizer_folder)
    dtype = np.dtype("uint16" if tokenizer.vocab_size <= 2**16 else "uint32")
    totals = {split: Counter(documents=0, tokens=0, bytes=0) for split in ("train", "val", "test")}
    work, jobs = partial(encode_job, tokenizer_folder, dtype), jobs_of(documents)
    encoded = on_all_cores(work, jobs, workers) if workers > 1 else map(work, jobs)
    with ExitStack() as stack:                                 # moves the files in reverse order, meta.json last
        meta = stack.enter_context(replacing(folder / "meta.json"))
        files = {split: stack.enter_context(open(stack.enter_context(replacing(folder / f"{split}.bin")), "wb"))
                 for split in totals}
        for job in watched(encoded, "encoded", total, lambda job: sum(size for *_, size in job)):
            for split, ids, size in job:
                files[split].write(ids)
                totals[split].update(documents=1, tokens=len(ids) // dtype.itemsize, bytes=size)
        if not totals["train"]["tokens"]:
            raise CourseError(f"nothing to train on is left of {facts['source']}, dropped: {dict(facts['dropped'])}")
        write_json(meta, {"dtype": dtype.name, "fingerprint": tokenizer.fingerprint(), "splits": totals, **facts})
    return totals


# ---- Batches -------------------------------------------------------------------------------------
def open_tokens(folder, split):
    """Return (token ids as a memory-mapped array, meta.json): nothing is read until it is used."""
    meta, path = read_json(Path(folder) / "meta.json", "02_data.py"), Path(folder) / f"{split}.bin"
    try:
        count, dtype = meta["splits"][split]["tokens"], meta["dtype"]
        tokens = np.memmap(path, dtype, "r") if count else np.zeros(0, dtype)         # no empty file can be mapped
        if len(tokens) != count:
            raise ValueError(f"{len(tokens):,} tokens, not {count:,}")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CourseError(f"{path} is not what meta.json says ({error!r}): run 02_data.py again") from None
    return tokens, meta


@lru_cache(maxsize=4)
def block_order(blocks, seed, epoch):
    """Return the order in which an epoch reads its blocks: a permutation of range(blocks)."""
    return np.random.default_rng((seed, epoch)).permutation(blocks)


def get_batch(tokens, step, B, T, seed=0):
    """Return inputs x and targets y, both int64 of shape (B, T), of one step.

    A pure function: nothing to save when training stops, nothing to restore when it goes on. Block
    number n of a run is place n % blocks in the order of epoch n // blocks, so each block is read
    once an epoch. Raises CourseError if the split is shorter than one block.

    >>> get_batch(np.arange(5), step=0, B=1, T=4)
    (array([[0, 1, 2, 3]]), array([[1, 2, 3, 4]]))
    """
    blocks = (len(tokens) - 1) // T
    if blocks < 1:
        raise CourseError(f"the split has {len(tokens):,} tokens, too few for a context of {T:,} (+ 1): "
                          "use more text or a smaller --context")
    starts = [T * block_order(blocks, seed, n // blocks)[n % blocks] for n in range(step * B, (step + 1) * B)]
    rows = np.stack([tokens[start:start + T + 1] for start in starts]).astype(np.int64)    # (B, T + 1)
    return rows[:, :-1], rows[:, 1:]                                                       # (B, T) each


def token_sizes(tokenizer, V):
    """Return how many bytes of text each id below V stands for, (V,); 0 for special tokens and ids that only pad."""
    return np.bincount([*tokenizer.tokens.values()], [*map(len, tokenizer.tokens)], V)


# ---- The script ----------------------------------------------------------------------------------
def draw_statistics(tokens, tokenizer, path):
    """Draw document lengths, token frequencies beside Zipf's law, and what each merge is worth."""
    tokens = np.asarray(tokens[:20_000_000])
    ends = np.flatnonzero(tokens[:-1] == tokenizer.special_tokens[END_OF_TEXT])
    sizes = np.diff(ends, prepend=-1, append=len(tokens) - 1)
    counts = np.sort(np.unique(tokens, return_counts=True)[1])[::-1]
    rank = np.arange(1, len(counts) + 1)
    text = tokenizer.decode(tokens[:200_000].tolist())
    merges = [n for n in (0, *(2**i for i in range(6, 18))) if n < len(tokenizer.merges)] + [len(tokenizer.merges)]
    model = tokenizer.data["model"]
    smaller = lambda n: Tokenizer({**tokenizer.data, "model": {**model, "merges": model["merges"][:n]}})
    per_token = [len(text.encode()) / len(smaller(n).encode(text)) for n in merges]
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.hist(sizes, bins=np.geomspace(sizes.min() / 2, sizes.max() * 2, 40), color="#0072b2")
    left.set(title="How long documents are", xscale="log", xlabel="tokens in a document", ylabel="documents")
    middle.loglog(rank, counts, color="#0072b2")
    middle.loglog(rank, counts[0] / rank, "--", color="#d55e00")
    middle.set(title="How often tokens occur (dashed: Zipf's law)", xlabel="rank of the token", ylabel="times")
    right.semilogx([256 + n for n in merges], per_token, "o-", color="#0072b2", base=2)
    right.set(title="What merges are worth", xlabel="tokens in the vocabulary", ylabel="bytes per token")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


@dataclass
class Config:
    source: list[str] = field(default_factory=list)  # python, site-packages, a download, files, folders, globs
    tokenizer: str = ""  # use the tokenizer of this folder, for example GPT-2's, instead of chapter 1's
    out: str = "out"  # root folder of the course
    workers: int = os.cpu_count() or 1  # processes that encode; the result does not depend on it


def choose_tokenizer(config):
    """Return (tokenizer, source): those of the flags, else what chapter 1 left in `out`."""
    folder, kept = Path(config.out) / "tokenizer", Path(config.out) / "tokenizer" / "source.json"
    source = config.source or (read_json(kept, "chapter 1") if kept.exists() else vars(chapter1.Config()))["source"]
    if config.tokenizer:
        if END_OF_TEXT not in (tokenizer := Tokenizer.load(config.tokenizer)).special_tokens:
            raise CourseError(f"--tokenizer {config.tokenizer}: it has no token {END_OF_TEXT} to part documents")
        tokenizer.save(folder)                                 # as if chapter 1 had made it
        write_json(kept, {"source": source, "fingerprint": tokenizer.fingerprint()})
    train_one = f"python 01_tokenizer.py --source {' '.join(source)} --out {config.out}"
    learnt_from = read_json(kept, f"`{train_one}`")["source"]
    if config.source not in ([], learnt_from):
        print(f"the tokenizer learnt from {' '.join(learnt_from)}; `{train_one}` would make one for this text")
    return Tokenizer.load(folder), config.source or learnt_from


def main(config):
    """Clean, split, encode and show."""
    folder, downloads, changed, dropped = Path(config.out) / "data", Path(config.out) / "downloads", {}, Counter()
    for name in CONVERSATIONS.keys() & set(config.source):
        raise CourseError(f"--source {name}: conversations, no text: `06_finetune.py --conversations {name}` reads it")
    fetched = sum(download(name, downloads).stat().st_size for name in config.source if name in DOWNLOADS)   # bytes
    tokenizer, source = choose_tokenizer(config)
    if "site-packages" in source:
        print_packages(sysconfig.get_paths()["purelib"])

    def readable():                                            # read_source gives None for what is not UTF-8
        for text in chapter1.read_source(source, downloads):
            dropped["not UTF-8"] += text is None
            yield text

    documents = clean(chapter1.split_documents(filter(None, readable())), changed, dropped)
    totals = encode_documents(documents, Path(config.out) / "tokenizer", folder, config.workers,
                              {"source": source, "dropped": dropped}, fetched if set(source) <= set(DOWNLOADS) else 0)
    for rule, (count, before, after) in changed.items():
        print(f"{rule:20} changed {count:,} documents, first {before!a} -> {after!a}")
    print("dropped:", ", ".join(f"{n:,} {why}" for why, n in dropped.items()))
    for split, n in totals.items():
        print(f"{split:5} {n['documents']:9,} documents {n['tokens']:13,} tokens {n['bytes']:14,} bytes")
    tokens, _ = open_tokens(folder, "train")
    for rows in zip(*get_batch(tokens, step=0, B=2, T=min(16, len(tokens) - 1))):
        for name, row in zip(("input  x", "target y"), rows):
            print(f"{name}: {chapter1.show_tokens([repr(tokenizer.decode([i]))[1:-1] for i in row.tolist()])}")
    draw_statistics(tokens, tokenizer, folder / "statistics.png")
    print(f"saved {folder}; next: python 03_model.py (what is trained) or 04_train.py")


if __name__ == "__main__":
    chapter1.run(main, Config, __doc__)
