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
Prints: what each cleaning rule did, tokens per split, one batch decoded.
Writes: out/data/train.bin, val.bin, test.bin (uint16 or uint32), meta.json, statistics.png.
Source: the flat file of tokens is nanoGPT's idea; the fixed order of blocks is our own.
"""
import hashlib
import json
import os
import re
import threading
import time
import unicodedata
import urllib.request
import zipfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module  # a module whose name starts with a digit cannot follow `import`
from importlib.metadata import distributions
from multiprocessing import Pool
from pathlib import Path

import matplotlib
import numpy as np

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


def download(name, folder):
    """Fetch DOWNLOADS[name] to `folder`/name.txt unless it is there; its sha256 must be right.

    Raises CourseError with the address, the path to put the file at by hand, and the way around.
    """
    url, sha256, about = DOWNLOADS[name]
    path = Path(folder) / f"{name}.txt"
    if path.exists():
        return path
    print(f"downloading {url} ({about})")
    try:
        with replacing(path) as temporary:
            urllib.request.urlretrieve(url, temporary, lambda blocks, size, total: print(
                f"\r  {min(blocks * size, total) / 1e6:,.1f} of {total / 1e6:,.1f} MB ", end="", flush=True))
            digest = hashlib.sha256()
            with open(temporary, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            if digest.hexdigest() != sha256:
                raise OSError(f"its sha256 is {digest.hexdigest()}, not {sha256}")
            if url.endswith(".zip"):
                text = zipfile.ZipFile(temporary).read(name)
                temporary.write_bytes(text)
    except (OSError, zipfile.BadZipFile) as error:
        raise CourseError(f"could not download {url}: {error}. Save its text by hand as {path}, or leave "
                          "--source out to use the source code of Python's own library") from None
    print()
    return path


def describe_packages():
    """Return a line per installed package with the licence it states, for --source site-packages."""
    lines = ["private packages installed here are read too; licences as the packages state them:"]
    for package in sorted(distributions(), key=lambda package: str(package.metadata["Name"]).lower()):
        licence = package.metadata["License-Expression"] or package.metadata["License"] or "not stated"
        lines.append(f"  {package.metadata['Name']} {package.version}: {licence.splitlines()[0][:60]}")
    return "\n".join(lines)


# ---- Cleaning ------------------------------------------------------------------------------------
# Case is kept: "Polish" and "polish" differ, True is Python and true is not, and a model that never
# saw a capital cannot write one. Old advice to lower-case comes from methods that counted words.

RULES = {
    "newlines": lambda text: text.replace("\r\n", "\n").replace("\r", "\n"),
    "control characters": lambda text: re.sub(r"[\x00-\x08\x0b\x0e-\x1f\x7f]", "", text),
    "Unicode (NFC)": lambda text: unicodedata.normalize("NFC", text),
}
SHORTEST = 20  # characters; a shorter document teaches nothing


def clean(documents, report):
    """Yield the cleaned (split, text), without duplicates; counts and examples go into `report`."""
    seen = set()
    for split, text in documents:
        for rule, mend in RULES.items():
            before, text = text, mend(text)
            if text != before:
                report["changed"][rule] += 1
                at = next((i for i, (a, b) in enumerate(zip(before, text)) if a != b), len(text))
                report["examples"].setdefault(rule, (before[max(0, at - 9):at + 9], text[max(0, at - 9):at + 9]))
        digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
        if len(text.strip()) < SHORTEST:
            report["dropped"]["too short"] += 1
        elif digest in seen:
            report["dropped"]["duplicate"] += 1
        else:
            seen.add(digest)
            yield split, text


# ---- Encoding ------------------------------------------------------------------------------------

@lru_cache
def tokenizer_in(folder):
    """Return the tokenizer of a folder, opened once in each process."""
    return Tokenizer.load(folder)


def encode_job(job):
    """Return (split, documents, bytes of text, token ids as bytes) of one job; runs in a worker."""
    folder, dtype, split, texts = job
    tokenizer = tokenizer_in(folder)
    end = tokenizer.special_tokens[END_OF_TEXT]
    ids = [i for text in texts for i in (*tokenizer.encode(text), end)]
    return split, len(texts), sum(len(text.encode()) for text in texts), np.array(ids, dtype).tobytes()


def jobs_of(documents, folder, dtype, slots, size=500_000):
    """Yield jobs of about `size` characters; waits for a free slot, so that memory stays bounded."""
    waiting = {}
    for split, text in documents:
        waiting.setdefault(split, []).append(text)
        if sum(map(len, waiting[split])) >= size:
            slots.acquire()
            yield folder, dtype, split, waiting.pop(split)
    for split, texts in waiting.items():
        slots.acquire()
        yield folder, dtype, split, texts


def encode_documents(documents, tokenizer_folder, dtype, folder, workers):
    """Write {split}.bin files of token ids; returns {split: counts}. Independent of `workers`."""
    totals = {split: Counter(documents=0, tokens=0, bytes=0) for split in ("train", "val", "test")}
    slots, start = threading.Semaphore(4 * workers), time.time()
    with ExitStack() as stack:
        files = {split: open(stack.enter_context(replacing(folder / f"{split}.bin")), "wb") for split in totals}
        pool = stack.enter_context(Pool(workers))
        for split, count, size, ids in pool.imap(encode_job, jobs_of(documents, tokenizer_folder, dtype, slots)):
            slots.release()
            files[split].write(ids)
            totals[split].update(documents=count, tokens=len(ids) // np.dtype(dtype).itemsize, bytes=size)
            done = sum(total["bytes"] for total in totals.values()) / 1e6
            print(f"\r  encoded {done:,.1f} MB, {done / (time.time() - start):.1f} MB/s ", end="", flush=True)
        for file in files.values():
            file.close()
    print()
    return {split: dict(total) for split, total in totals.items()}


# ---- Batches -------------------------------------------------------------------------------------

def open_tokens(folder, split):
    """Return (token ids as a memory-mapped array, meta.json): nothing is read until it is used."""
    meta = read_json(Path(folder) / "meta.json", "02_data.py")
    path = Path(folder) / f"{split}.bin"
    if not meta["splits"][split]["tokens"]:
        return np.zeros(0, meta["dtype"]), meta
    tokens = np.memmap(path, meta["dtype"], "r")
    if len(tokens) != meta["splits"][split]["tokens"]:
        raise CourseError(f"{path} holds {len(tokens):,} tokens, meta.json says {meta['splits'][split]['tokens']:,}: "
                          "run 02_data.py again")
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
    """
    blocks = (len(tokens) - 1) // T
    if blocks < 1:
        raise CourseError(f"the split has {len(tokens):,} tokens, too few for a context of {T:,} (+ 1): "
                          "use more text or a smaller --context")
    numbers = range(step * B, (step + 1) * B)
    starts = [T * block_order(blocks, seed, n // blocks)[n % blocks] for n in numbers]
    rows = np.stack([tokens[start:start + T + 1] for start in starts]).astype(np.int64)    # (B, T + 1)
    return rows[:, :-1], rows[:, 1:]


# ---- The script ----------------------------------------------------------------------------------

def draw_statistics(folder, tokenizer, path):
    """Draw document lengths, token frequencies beside Zipf's law, and what each merge is worth."""
    matplotlib.use("Agg")
    from matplotlib import pyplot
    tokens, _ = open_tokens(folder, "train")
    tokens = np.asarray(tokens[:20_000_000])
    ends = np.flatnonzero(tokens == tokenizer.special_tokens[END_OF_TEXT])
    counts = np.sort(np.bincount(tokens))[::-1]
    counts = counts[counts > 0]
    figure, (lengths, zipf, worth) = pyplot.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    lengths.hist(np.diff(ends, prepend=-1), bins=np.geomspace(10, 1e6, 40), color="#0072b2")
    lengths.set(xscale="log", xlabel="tokens in a document", ylabel="documents")
    rank = np.arange(1, len(counts) + 1)
    zipf.loglog(rank, counts, color="#0072b2", label="this text")
    zipf.loglog(rank, counts[0] / rank, "--", color="#d55e00", label="Zipf's law: 1 / rank")
    zipf.set(xlabel="rank of the token", ylabel="occurrences")
    zipf.legend()
    text = tokenizer.decode(tokens[:200_000].tolist())
    sizes = [n for n in (0, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768) if n < len(tokenizer.merges)]
    sizes.append(len(tokenizer.merges))
    per_token = [len(text.encode()) / len(tokenizer.first_merges(n).encode(text)) for n in sizes]
    worth.plot([256 + n for n in sizes], per_token, "o-", color="#0072b2")
    worth.set(xlabel="vocabulary", ylabel="bytes per token", xscale="log")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


@dataclass
class Config:
    source: list[str] = field(default_factory=list)  # text to encode (default: what chapter 1 learnt from): python, site-packages, shakespeare, tinystories, tinystories-full, enwik8, files, folders, globs
    out: str = "out"  # root folder of the course
    workers: int = os.cpu_count() or 1  # processes that encode; the result does not depend on it
    context: int = 16  # tokens per row of the batch that is shown


def main(config):
    """Clean, split, encode and show."""
    out, report = Path(config.out), {"changed": Counter(), "dropped": Counter(), "examples": {}}
    downloads = out / "downloads"
    for name in set(config.source) & set(DOWNLOADS):
        download(name, downloads)
    recorded = read_json(out / "tokenizer" / "source.json", f"python 01_tokenizer.py {'--source ' if config.source else ''}"
                         + " ".join(config.source))
    source = config.source or recorded["source"]
    if "site-packages" in source:
        print(describe_packages())
    tokenizer = Tokenizer.load(out / "tokenizer")
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"

    def readable():
        for text in chapter1.read_source(source, downloads):
            if text is None:
                report["dropped"]["not UTF-8"] += 1
            else:
                yield text

    documents = clean(chapter1.split_documents(readable()), report)
    totals = encode_documents(documents, out / "tokenizer", dtype, out / "data", config.workers)
    for rule in RULES:
        example = " -> ".join(map(repr, report["examples"].get(rule, ())))
        print(f"{rule:20} changed {report['changed'][rule]:,} documents {example}")
    print("dropped:", ", ".join(f"{n:,} {why}" for why, n in report["dropped"].items()) or "none")
    for split, total in totals.items():
        print(f"{split:5} {total['documents']:8,} documents {total['tokens']:12,} tokens {total['bytes']:14,} bytes"
              f" {total['bytes'] / max(1, total['tokens']):6.2f} bytes per token")
    write_json(out / "data" / "meta.json", {"source": source, "dtype": dtype, "fingerprint": tokenizer.fingerprint(),
                                            "splits": totals, "dropped": report["dropped"]})
    tokens, _ = open_tokens(out / "data", "train")
    x, y = get_batch(tokens, 0, 2, config.context)
    for row in range(2):
        print(f"input  x: {chapter1.show_tokens([tokenizer.decode([i]) for i in x[row].tolist()])!r}")
        print(f"target y: {chapter1.show_tokens([tokenizer.decode([i]) for i in y[row].tolist()])!r}")
    draw_statistics(out / "data", tokenizer, out / "data" / "statistics.png")
    print(f"saved {out / 'data'}; next: python 03_model.py (what is trained) or 04_train.py")


if __name__ == "__main__":
    chapter1.run(main, Config, __doc__)
