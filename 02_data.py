"""Chapter 2 · Tokens to batches: clean the text, encode it once, and serve it in sequences.

Training reads the same text several times, in sequences of equal length. So the text is cleaned and
turned into tokens once: a flat file of integers, the documents one after the other, a separator
after each. A batch is B sequences of T tokens out of that file. What the model should answer at
each position is the next token, so the targets are the inputs moved by one:

    file      def  add ( a , b )  :  return  a + b  <|endoftext|>  import ...
    input x   def  add ( a , b )
    target y  add  (   a , b )  :

Run:    python 02_data.py                          the text that chapter 1 learnt from
        python 02_data.py --source shakespeare     another one (a download, files, folders, globs)
Prints: what was cleaned and dropped, the size of each split, a batch with inputs above targets.
Writes: out/data/train.bin, val.bin, test.bin (uint16 or uint32), meta.json, statistics.png
Source: the flat file of tokens is nanoGPT's idea, which draws at random; here the order is fixed
"""
import hashlib
import json
import re
import shlex
import sys
import unicodedata
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module  # `import 01_tokenizer` is a syntax error
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

chapter1 = import_module("01_tokenizer")
CourseError = chapter1.CourseError

# Legend
#   B   batch: how many sequences one step reads
#   T   time: the tokens of one sequence, also called the context
#   split      "train" to learn from, "val" to choose settings by, "test" for the end, read once
#   step       one update of the model's weights; it reads one batch
#   epoch      one pass over all sequences of the train split


# ---- Cleaning ------------------------------------------------------------------------------------
# Case is kept: "Polish" and "polish" differ, True is Python and true is not, and a model that never
# saw a capital cannot write one. Old advice to lower-case comes from methods that counted words.
RULES = {
    "line ends of Windows": lambda text: re.sub("\r\n?", "\n", text),
    "control characters": lambda text: re.sub("[\x00-\x08\x0b\x0e-\x1f\x7f\ufeff]", "", text),
    "Unicode (NFC)": lambda text: unicodedata.normalize("NFC", text),     # "e" + accent is "é"
}
SHORTEST = 20  # characters; a shorter document teaches little


def clean(documents, changed, dropped):
    """Yield the cleaned (split, text); meanwhile, count in changed {rule: n}, dropped {reason: n}.
    Why drop duplicates? A text that is read often is learnt by heart, at the cost of the others.
    And if it is in train and in test as well (texts that differed before cleaning, in line ends,
    say), the test is an exam whose questions were known."""
    seen = set()  # hashes, as all the texts would fill the memory
    for split, text in documents:
        for rule, mend in RULES.items():
            mended = mend(text)
            if mended != text:
                changed[rule] += 1
                text = mended
        if len(text.strip()) < SHORTEST:
            dropped["too short"] += 1
        elif hash(text) in seen:
            dropped["duplicate"] += 1
        else:
            seen.add(hash(text))
            yield split, text


# ---- Encoding ------------------------------------------------------------------------------------
SPLITS = ("train", "val", "test")


def write_tokens(documents, tokenizer, folder):
    """Write {split}.bin, flat files of token ids, and return how much each split holds. meta.json,
    which describes them, is removed first and written last: where it stands, they are whole."""
    # Two bytes hold the ids below 65,536; more tokens than that take four bytes each.
    dtype = "uint16" if tokenizer.vocab_size <= 65_536 else "uint32"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").unlink(missing_ok=True)
    totals = {split: Counter(documents=0, tokens=0, bytes=0) for split in SPLITS}
    files = {split: open(folder / f"{split}.bin", "wb") for split in SPLITS}
    for split, text in documents:
        # By this end, the model learns that the next text has nothing to do with it.
        ids = [*tokenizer.encode(text), tokenizer.end]
        files[split].write(np.array(ids, dtype))
        totals[split].update(documents=1, tokens=len(ids), bytes=len(text.encode()))   # adds
        show_progress(files["train"].tell())
    for file in files.values():
        file.close()
    if not totals["train"]["tokens"]:
        raise CourseError("nothing to train on is left of --source: all was short or a duplicate")
    meta = {"dtype": dtype, "fingerprint": tokenizer.fingerprint(), "splits": totals}
    chapter1.write_json(folder / "meta.json", meta)
    return totals


# ---- Batches -------------------------------------------------------------------------------------
def open_tokens(folder, split):
    """Return (token ids as a memory-mapped array, meta.json): nothing is read until it is used."""
    meta = chapter1.read_json(folder / "meta.json", "02_data.py")
    length = meta["splits"][split]["tokens"]
    if not length:
        return np.zeros(0, meta["dtype"]), meta                # no empty file can be mapped
    return np.memmap(folder / f"{split}.bin", meta["dtype"], "r", shape=length), meta


@lru_cache(maxsize=4)                                          # else each step would shuffle anew
def sequence_order(count, seed, epoch):
    """Return the order in which an epoch reads its sequences: a permutation of range(count).
    Shuffled, as neighbours are alike: a batch out of one file would pull the model towards it."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def get_batch(tokens, step, B, T, seed=0):
    """Return inputs x and targets y, both int64 of shape (B, T), of one step.

    A pure function: which tokens step 700 reads follows from its arguments alone. So nothing has to
    be saved when training stops or restored when it goes on, and any step can be looked at again.
    The split is cut into `count` sequences of T tokens. They are numbered by n as they are read,
    epoch after epoch, and a step reads the next B: with B = 4, step 2 those of n = 8 to 11. If
    count is 5, n = 8 is place 3 of epoch 1. Raises CourseError if there is not even one.

    >>> get_batch(np.arange(5), step=0, B=1, T=4)
    (array([[0, 1, 2, 3]]), array([[1, 2, 3, 4]]))
    """
    count = (len(tokens) - 1) // T                             # the last token is only a target
    if count < 1:
        raise CourseError(f"the split has {len(tokens):,} tokens, too few for a context of "
                          f"{T:,} (+ 1): use more text or a smaller --context")
    sequences = []
    for n in range(step * B, (step + 1) * B):
        epoch, place = divmod(n, count)
        start = T * sequence_order(count, seed, epoch)[place]
        sequences.append(tokens[start:start + T + 1])          # one more, for the last target
    ids = np.stack(sequences).astype(np.int64)                 # (B, T + 1)
    return ids[:, :-1], ids[:, 1:]                             # (B, T) each


# ---- Looking at it -------------------------------------------------------------------------------
def show_batch(tokens, tokenizer):
    """Print a small batch: inputs above targets."""
    x, y = get_batch(tokens, step=0, B=2, T=min(16, len(tokens) - 1))
    for sequence in zip(x, y):
        for name, ids in zip(("input  x", "target y"), sequence):
            pieces = [repr(tokenizer.decode([i]))[1:-1] for i in ids]
            print(f"{name}:", "|".join(pieces))


def draw_statistics(tokens, tokenizer, path):
    """Draw how long documents are, and how often tokens occur, beside Zipf's law: in any language,
    the commonest word occurs twice as often as the second, three times as often as the third: a
    straight line on logarithmic axes. So a few tokens are seen all the time and learnt first; most
    are rare, and for them a model needs all the text there is."""
    tokens = tokens[:20_000_000]                               # enough for a picture
    lengths = np.diff(np.flatnonzero(tokens == tokenizer.end), prepend=-1)     # from end to end
    _, counts = np.unique(tokens, return_counts=True)
    counts = np.sort(counts)[::-1]                             # the commonest first
    rank = np.arange(1, len(counts) + 1)
    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(lengths, bins=2 ** np.arange(24))                # each bin twice as wide as the last
    left.set(xscale="log", xlabel="tokens in a document", ylabel="documents")
    right.loglog(rank, counts, label="here")
    right.loglog(rank, counts[0] / rank, "--", label="Zipf's law")
    right.set(xlabel="rank of a token, the commonest first", ylabel="times that it occurs")
    right.legend()
    chapter1.save_figure(figure, path)


# ---- The script ----------------------------------------------------------------------------------
@dataclass
class Config:
    source: list[str] = field(default_factory=list)  # a download, files (default: as chapter 1)
    tokenizer: str = ""  # folder with a tokenizer to use, say GPT-2's (default: chapter 1's)
    out: str = "out"  # folder below which everything is written


def choose_source(config):
    """Return what --source says, else what chapter 1 learnt from; put --tokenizer in place."""
    folder = Path(config.out) / "tokenizer"
    kept = folder / "source.json"                              # chapter 1 writes it last
    source = config.source or ["python"]
    if config.tokenizer:                                       # as if chapter 1 had made it
        tokenizer = chapter1.Tokenizer.load(config.tokenizer)
        if tokenizer.end is None:
            raise CourseError(f"--tokenizer {config.tokenizer} has no token that ends a document")
        tokenizer.save(folder)
        if config.source or not kept.exists():
            chapter1.write_json(kept, source)
    make = f"{chapter1.command('01_tokenizer.py', config)} --source {shlex.join(source)}"
    learnt_from = chapter1.read_json(kept, f"`{make}`")        # an error, if it has not run
    return config.source or learnt_from


def main(config):
    """Clean, split, encode and show."""
    out = Path(config.out)
    folder = out / "data"
    for name in DOWNLOADS.keys() & config.source:
        download(name, out / "downloads")
    source = choose_source(config)
    changed, dropped = Counter(), Counter()
    # Chapter 1 split uncleaned texts, so this does: both hold out the same. Nothing is read yet:
    # these are generators, and work when write_tokens asks for the next document.
    documents = chapter1.split_documents(chapter1.read_source(source, out / "downloads"))
    tokenizer = chapter1.Tokenizer.load(out / "tokenizer")
    totals = write_tokens(clean(documents, changed, dropped), tokenizer, folder)
    print(f"encoded {shlex.join(source)}; changed: {dict(changed)}, dropped: {dict(dropped)}")
    for split, n in totals.items():
        print("{:5} {documents:9,} documents {tokens:13,} tokens {bytes:14,} bytes"
              .format(split, **n))
    tokens, _ = open_tokens(folder, "train")
    show_batch(tokens, tokenizer)
    draw_statistics(tokens, tokenizer, folder / "statistics.png")
    print(f"saved {folder}; next: {chapter1.command('03_model.py', config)}")


# ---- Tools: texts to download --------------------------------------------------------------------
DOWNLOADS = {  # name: (address, sha256, size and licence)
    "shakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        "1.1 MB, public domain"),
    "tinystories-full": (
        "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/"
        "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/TinyStoriesV2-GPT4-train.txt",
        "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443",
        "2.2 GB, CDLA-Sharing-1.0"),
    "dolly": (  # conversations, for chapter 6
        "https://huggingface.co/datasets/databricks/databricks-dolly-15k/resolve/"
        "bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a/databricks-dolly-15k.jsonl",
        "2df9083338b4abd6bceb5635764dab5d833b393b55759dffb0959b6fcbf794ec",
        "13 MB, CC BY-SA 3.0"),
}


def show_progress(done):
    """Write over the line on a terminal how many bytes are done; a file gets no such lines."""
    if sys.stdout.isatty():
        print(f"  {done / 1e6:,.1f} MB", end="\x1b[K\r", flush=True)


def download(name, folder):
    """Return the path of a file of the table, fetched into `folder` unless it is there."""
    url, expected, remark = DOWNLOADS[name]
    path = folder / (name + Path(url).suffix)
    if path.exists():
        return path
    print(f"downloading {url} ({remark})")
    digest = hashlib.sha256()
    try:
        with chapter1.replacing(path) as temporary, open(temporary, "wb") as file:
            with urllib.request.urlopen(url, timeout=30) as response:
                while piece := response.read(1_000_000):
                    file.write(piece)
                    digest.update(piece)
                    show_progress(file.tell())
            if digest.hexdigest() != expected:
                raise OSError("what came has another sha256")
    except Exception as error:                                 # a network can fail in many ways
        raise CourseError(f"no download of {url}: {error}. Save it by hand as {path}") from None
    return path


# ---- Tools: for later chapters -------------------------------------------------------------------
def matching_tokens(folder, split, tokenizer):
    """Return the tokens of a split; none if there are none, or another tokenizer made them."""
    if (folder / "meta.json").exists():
        tokens, meta = open_tokens(folder, split)
        if meta["fingerprint"] == tokenizer.fingerprint():
            return tokens
    return np.zeros(0, np.uint16)


def token_sizes(tokenizer, V):
    """Return the number of bytes of each id below V, (V,), for bits per byte; 0 if special."""
    sizes = np.zeros(V, np.int64)
    for token, i in tokenizer.tokens.items():
        sizes[i] = len(token)
    return sizes


def messages_of(data):
    """Return the messages of {"messages": [...]}, or of {"instruction": ..., "output": ...}."""
    messages = data.get("messages")
    if not messages:
        question = data["instruction"] + "\n\n" + (data.get("input") or data.get("context") or "")
        answer = data.get("output") or data["response"]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(f"user and assistant should take turns, the assistant last, not {roles}")
    if not all(message["content"].strip() for message in messages):
        raise ValueError("a message is empty")
    return messages


def open_conversations(name, downloads):
    """Return the conversations of a download, or of a file of JSON lines. Raises CourseError."""
    path = download(name, downloads) if name in DOWNLOADS else Path(name)
    conversations = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            conversations.append(messages_of(json.loads(line)))
        except Exception as error:                             # a line may hold anything
            raise CourseError(f"{path}, line {number}: {error!r}; it should hold messages (role, "
                              "content) or instruction and output") from None
    if not conversations:
        raise CourseError(f"{path} holds no conversations")
    return conversations


if __name__ == "__main__":
    chapter1.run(main, Config, __doc__)
