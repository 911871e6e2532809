"""Chapter 1 · Text to tokens: a byte-level BPE tokenizer, trained from scratch.

A language model reads numbers. Bytes are the plainest, but a page is thousands of them, and the
model pays for each; of words there are millions, and ever new ones. Byte-pair encoding (BPE) is in
between: give the pair of neighbours that occurs most often a number of its own, and repeat. Each
byte and each merged pair is called a token. No text is unknown, as every byte is one. Three words:

    l o w   l o w e r   l o w e s t      14 tokens; the pair (l, o) occurs 3 times
    lo w    lo w e r    lo w e s t       11 tokens; the pair (lo, w) occurs 3 times
    low     low e r     low e s t         8 tokens after two merges

Run:    python 01_tokenizer.py                      learns from the source of Python's own library
        python 01_tokenizer.py --source my_notes/   or from your own files, folders, globs
Prints: the first merges, a sample in tokens, bytes per token. Writes: out/tokenizer/
Source: Sennrich et al. 2016 (BPE), Radford et al. 2019 (bytes; GPT-2), Hugging Face (file format)
"""
import argparse
import ctypes
import csv
import glob
import hashlib
import heapq
import inspect
import json
import os
import shlex
import sys
import unicodedata
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import lru_cache
from itertools import chain, groupby, islice
from pathlib import Path
from typing import get_args

import regex  # like `re`, but it knows \p{L}, "a letter of any script"

# Legend
#   document   one text: a Python module, a story, a line of a .jsonl file
#   chunk      a word-like piece of a document, cut out by PATTERN
#   id         the number of a token; in ours, 0..255 are the bytes, then pairs, then special tokens
# Tools, at the file's end: errors, flags, files, and tokenizer.json with Tokenizer.save and .load.

# Why cut a text before merging? So that a token is a word or a part of one: else "dog.", "dog!" and
# "(dog" would be three tokens, and a model would have to learn "dog" three times. It also saves
# time: millions of chunks are mostly the same few. \p{L}: letter, \p{N}: digit, \s: white space.
PATTERN = "|".join([                # between GPT-2's pattern and GPT-4's
    r"'(?i:[sdmt]|ll|ve|re)",       # the ends of it's, we'll, they've
    r" ?\p{L}+",                    # a word, with the space before it: " the"; in "_name", "name"
    r"\p{N}{1,3}",                  # up to three digits, without a space: 2026 is "202", "6"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",   # signs: " +=", or "):" with the line end after it
    r"\s*[\r\n]",                   # line ends, with the spaces before them
    r"\s+(?!\S)|\s+",               # spaces; of several, the last is left to what comes after
])
# Special tokens are marks between texts, never text: "<|im_start|>" in a text is encoded as any
# text. Only a program can set a mark, by its id: so no user can speak for another in a chat.
END_OF_TEXT = "<|endoftext|>"
CHAT_START = "<|im_start|>"
CHAT_END = "<|im_end|>"
SPECIAL_TOKENS = [END_OF_TEXT, CHAT_START, CHAT_END]


# ---- Training, by its definition -----------------------------------------------------------------
def merge(tokens, pair, new):
    """Return tokens with each `pair` of neighbours replaced by `new`.

    >>> merge([97, 97, 97, 98], (97, 97), 256)     # from left to right
    [256, 97, 98]
    """
    left, right = pair
    merged = []
    for token in tokens:
        if merged and merged[-1] == left and token == right:       # the left one was just appended
            merged[-1] = new
        else:
            merged.append(token)
    return merged


def learn_merges_naive(chunks, how_many):
    """Count all pairs, merge the commonest, as that saves most tokens, and repeat; return the
    merged pairs of ids, in order. chunks: {chunk: how often it occurs}. Of equally common pairs the
    one of the lowest ids wins, else the order of the texts would change the ids.

    >>> learn_merges_naive({"low": 2, "lower": 1}, 2)    # l is byte 108, o 111, w 119
    [(108, 111), (256, 119)]
    """
    merges = []
    ids_of = {chunk: list(chunk.encode()) for chunk in chunks}
    for new in range(256, 256 + how_many):
        counts = Counter()
        for chunk, ids in ids_of.items():
            for pair in zip(ids, ids[1:]):
                counts[pair] += chunks[chunk]
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        for chunk, ids in ids_of.items():
            ids_of[chunk] = merge(ids, best, new)
        merges.append(best)
    return merges


# ---- Training, for real: the same merges, far sooner (may be skipped at first) -------------------
# A merge changes only the pairs beside it. So each different chunk is laid down once, a GAP between
# them, and pairs are counted once, their positions kept: a merge visits those and mends counts.
# Tokens never move: a long one's id stands at its first and last byte, where neighbours look.
#     position          0    1    2    3    4
#     ids             GAP    l    o    w  GAP
#     after (l, o)    GAP   lo   lo    w  GAP           one (l, o) and (o, w) less, one (lo, w) more
#     after (lo, w)   GAP  low  GAP  low  GAP           i = 1, middle = 3, end = 4 (see step 3)
GAP = -1  # between chunks, and inside a long token


def learn_merges(chunks, how_many):
    """Return what learn_merges_naive returns."""
    # 1. Lay the chunks side by side, note where each pair stands, and how often: a change from 0.
    ids = [GAP]
    copies = [0]                                 # how often the chunk there is in the texts
    counts = Counter()                           # {pair: how often it occurs}
    changes = Counter()                          # {pair: what step 2 adds to its count}
    positions = defaultdict(list)                # {pair: where its left one begins, or once began}
    size = {GAP: 0, **dict.fromkeys(range(256), 1)}      # {id: its bytes}; GAP's is never used
    queue = []                                   # a heap of (-count, pair): the commonest on top
    merges = []
    for chunk, n in chunks.items():
        piece = chunk.encode()
        for i, pair in enumerate(zip(piece, piece[1:]), start=len(ids)):
            changes[pair] += n
            positions[pair].append(i)
        ids += [*piece, GAP]
        copies += [n] * (len(piece) + 1)
    while len(merges) < how_many:
        # 2. Add what step 1 or the last merge changed, and choose the commonest pair.
        for pair, change in changes.items():
            counts[pair] += change
            if counts[pair] > 0 and GAP not in pair:       # no pair with a gap is merged
                heapq.heappush(queue, (-counts[pair], pair))
        changes.clear()
        if not queue:
            break
        priority, best = heapq.heappop(queue)
        if priority != -counts[best]:
            continue                             # out of date: it was queued again, if still there
        del counts[best]                         # all are merged below
        left, right = best
        new = 256 + len(merges)
        merges.append(best)
        size[new] = size[left] + size[right]
        # 3. Merge it wherever it stands; only the pairs beside it change.
        for i in positions.pop(best):
            middle = i + size[left]              # where the right one begins
            end = i + size[new]                  # where the next token begins
            if ids[i] != left or ids[middle] != right:
                continue                         # gone: an earlier merge took one; as in "aaa"
            ids[middle - 1] = ids[middle] = GAP  # inside: old positions there no longer fit
            ids[i] = ids[end - 1] = new          # after that: a token of two bytes has no inside
            before, after, n = ids[i - 1], ids[end], copies[i]
            changes[before, left] -= n
            changes[right, after] -= n
            changes[before, new] += n
            changes[new, after] += n
            positions[before, new].append(i - size[before])
            positions[new, after].append(i)
    return merges


# ---- The tokenizer: text to ids and back ---------------------------------------------------------
@dataclass
class Tokenizer:
    """Text to ids and back."""
    tokens: dict  # {bytes: id}
    merges: list  # pairs of tokens, (bytes, bytes), in the order in which they were learnt
    special_tokens: dict  # {text: id}
    start: int | None  # the id that begins a text (ours: None) ...
    end: int | None  # ... and the one that ends it
    patterns: list  # that cut a text: PATTERN; other people's may be several
    data: dict  # what tokenizer.json holds; `read_tokenizer` (tools) takes the above from it

    def __post_init__(self):
        self.bytes_of = {i: token for token, i in self.tokens.items()}
        self.bytes_of |= {i: text.encode() for text, i in self.special_tokens.items()}
        self.vocab_size = max(self.bytes_of) + 1
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self._ids_of = lru_cache(500_000)(self._encode_chunk)      # most chunks recur

    def _encode_chunk(self, chunk):
        """Return the ids of one chunk: what was learnt first is merged first, as in training."""
        whole = chunk.encode("utf-8", "replace")
        if self.data["model"].get("ignore_merges") and whole in self.tokens:     # Llama 3 only
            return [self.tokens[whole]]
        parts = [bytes([byte]) for byte in whole]  # elsewhere, the id of byte 97 need not be 97
        while mergeable := self._ranks.keys() & zip(parts, parts[1:]):     # neighbours to merge
            pair = min(mergeable, key=self._ranks.get)
            parts = merge(parts, pair, b"".join(pair))
        return [self.tokens[part] for part in parts]

    def encode(self, text):
        """Return the ids of a text; "<|endoftext|>" in it is text, no special token."""
        if self.data.get("normalizer"):                    # Qwen's, NFC: "e" + accent is "é"
            text = unicodedata.normalize(self.data["normalizer"]["type"], text)
        chunks = [text]
        for pattern in self.patterns:                      # ours is one; more cut its chunks on
            chunks = chain.from_iterable(map(pattern.findall, chunks))
        return list(chain.from_iterable(map(self._ids_of, chunks)))

    def decode_bytes(self, ids):
        """Return the bytes that `ids` stand for."""
        return b"".join([self.bytes_of[i] for i in ids])

    def decode(self, ids):
        """Return the text of `ids`; bytes that are not UTF-8, say half a letter, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def fingerprint(self):
        """Return 16 hex digits that change with the tokenizer: ids made by another are noticed."""
        return hashlib.sha256(json.dumps(self.data).encode()).hexdigest()[:16]


def train_bpe(documents, vocab_size, pattern=PATTERN, special_tokens=SPECIAL_TOKENS):
    """Train a Tokenizer of `vocab_size` tokens in all; fewer where the text runs out of pairs."""
    chunks = Counter()
    for text in documents:
        chunks.update(regex.findall(pattern, text))
    pairs = learn_merges(chunks, vocab_size - 256 - len(special_tokens))
    return read_tokenizer(tokenizer_json(pairs, pattern, special_tokens))      # 256 -> b"lo"


# ---- Which texts are held out, from the tokenizer as well ----------------------------------------
def split_of(text):
    """85% "train", 5% "val" to choose settings by, 10% "test" for the end. A hash, a number that
    looks random but follows from the text, decides: so no text ever moves from test to train."""
    point = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 16**8     # in [0, 1)
    if point < 0.85:
        return "train"
    return "val" if point < 0.90 else "test"


def split_documents(documents):
    """Yield (split, text). Documents stay whole, as half a text gives away the rest; but where
    there are fewer than 20, they are joined, "val" is the last tenth, and there is no "test"."""
    documents = iter(documents)
    first = list(islice(documents, 20))                    # not all: they may fill the memory
    if len(first) < 20:
        text = "\n".join(first)
        cut = len(text) * 9 // 10
        yield "train", text[:cut]
        yield "val", text[cut:]
    else:
        for text in chain(first, documents):
            yield split_of(text), text


# ---- Looking at it -------------------------------------------------------------------------------
def show_tokenizer(tokenizer, sample):
    """Print the first merges, and a sample text token by token."""
    print(f"{tokenizer.vocab_size:,} tokens: 256 bytes, {len(tokenizer.merges):,} merges, "
          f"{len(tokenizer.special_tokens)} special tokens")
    merged = [(left + right).decode("utf-8", "replace") for left, right in tokenizer.merges[:12]]
    print("first merges:  ", *map(repr, merged))
    ids = tokenizer.encode(sample)
    pieces = [tokenizer.decode([i]) for i in ids[:80]]
    print("a sample, token by token:", "|".join(pieces), sep="\n")
    print(f"{len(sample.encode()) / len(ids):.2f} bytes per token on text it has learnt from")


# ---- The script: each field is a flag, its comment the help --------------------------------------
@dataclass
class Config:
    source: list[str] = field(default_factory=lambda: ["python"])  # python, files, folders, globs
    vocab_size: int = 4096  # tokens in all: 500 for 1 MB of text, 4,096 for 10 MB
    out: str = "out"  # folder below which everything is written


def main(config):
    """Learn from the train split alone (held-out text must be new to the tokenizer too), save."""
    folder = Path(config.out) / "tokenizer"
    documents = split_documents(read_source(config.source, f"{config.out}/downloads"))
    texts = (text for split, text in documents if split == "train")      # read one by one
    first = list(islice(texts, 10))                        # kept, to show them in tokens
    tokenizer = train_bpe(chain(first, texts), config.vocab_size)
    if not tokenizer.merges:
        raise CourseError(f"nothing to merge: --source {shlex.join(config.source)} is too short, "
                          f"or --vocab-size {config.vocab_size} is not over 259")
    show_tokenizer(tokenizer, "".join(first)[:1_000_000])
    tokenizer.save(folder)
    write_json(folder / "source.json", config.source)       # for chapter 2
    print(f"saved {folder}; next: {command('02_data.py', config)}")


# ---- Tools for every chapter: no lesson, skip them on a first reading ----------------------------
class CourseError(ValueError):
    """Something the reader can mend; a script prints it as one line and exits with status 1."""


def parse_flags(config_class, about, argv=None, defaults_for=dict):
    """Make a command line of a dataclass: `seed: int = 1  # its help` becomes --seed 1.
    defaults_for(given) -> {name: value}: where defaults depend on the flags that were given."""
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    code = "".join(map(inspect.getsource, config_class.__mro__[-2::-1]))       # base class first
    helps = dict(regex.findall(r"(?m)^    (\w+): .*?  # (.*)$", code))
    for item in fields(config_class):
        default = getattr(config_class(), item.name)
        kind = (get_args(item.type) or [item.type])[0]             # list[str], int | None
        text = helps.get(item.name, "").replace("%", "%%")
        how = {"type": kind, "nargs": "+" if isinstance(default, list) else None}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif default:
            text += f" (default: {default})"
        parser.add_argument("--" + item.name.replace("_", "-"), help=text, **how)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        if isinstance(value, (int, float)) and not value >= 0:     # nan is not either
            parser.error(f"--{name.replace('_', '-')} {value}: it must be at least 0")
    return config_class(**{**defaults_for(given), **given})


def run(script, config_class, about, defaults_for=dict):
    """Run a chapter: flags in, `script(config)`, errors that can be mended out as one line."""
    sys.stdout.reconfigure(errors="replace")           # a letter that the terminal lacks: "?"
    if sys.platform == "linux":
        # Else freed memory goes back to the system, and comes anew, cleared: 8% of a training step.
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 1_000_000_000)                     # M_TRIM_THRESHOLD, in bytes
        mallopt(-3, 32_000_000)                        # M_MMAP_THRESHOLD
    try:
        script(parse_flags(config_class, about, None, defaults_for))
        sys.stdout.flush()
    except BrokenPipeError:                            # the reader, say `head`, has seen enough
        os._exit(0)                                    # at once: nothing more can be printed
    except KeyboardInterrupt:
        sys.exit(130)
    except (CourseError, OSError, UnicodeDecodeError) as error:
        sys.exit(f"error: {error}")


def command(script, config):
    """Return how to run a chapter: with --out, where that is not the usual folder."""
    place = "" if config.out == "out" else f" --out {shlex.quote(config.out)}"
    return f"python {script}{place}"


@contextmanager
def replacing(path):
    """Yield a temporary path, moved to `path` if all goes well: a crash leaves the old file."""
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_figure(figure, path):
    """Draw a figure of matplotlib to a file; without a suffix, as a PNG."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format=Path(path).suffix[1:] or "png")


def write_json(path, value):
    """Write `value` as JSON to `path`, all of it or nothing."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def write_table(path, rows):
    """Write rows, dicts, as CSV; a column that a row lacks gets "nan" there."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, rows[-1], restval="nan", extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)


def read_json(path, made_by):
    """Read a JSON file; `made_by` tells the reader what makes it. Raises CourseError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CourseError(f"cannot read {path} ({error}): {made_by} makes it") from None


# ---- Tools: where texts come from ----------------------------------------------------------------
KINDS = (".txt", ".md", ".py", ".jsonl")
NOT_READ = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "lib2to3"}


def find_files(name, downloads):
    """Return the files of "python" (most of its library), a file, folder, glob or download."""
    if name == "python":
        library = Path(os.__file__).parent
        return sorted(file for file in library.rglob("*.py")
                      if NOT_READ.isdisjoint(file.relative_to(library).parts))
    found = [name] if os.path.exists(name) else glob.glob(name, recursive=True)
    files = set()                                  # "notes/**" finds a folder and each file in it
    for path in map(Path, found or [f"{downloads}/{name}.txt"]):
        files.update([path, *path.rglob("*")])
    return sorted(file for file in files if file.suffix in KINDS and file.is_file())


def read_file(path):
    """Yield a file's documents: each "text" of a .jsonl, else what lines of END_OF_TEXT part."""
    try:
        with open(path, encoding="utf-8", newline="\n") as lines:
            if path.suffix == ".jsonl":
                for line in filter(str.strip, lines):
                    yield json.loads(line)["text"].encode("utf-8", "replace").decode()
                return
            for is_end, part in groupby(lines, lambda line: line.strip() == END_OF_TEXT):
                if not is_end:
                    yield "".join(part)
    except Exception as error:                     # a file may hold anything
        print(f"skipped {path}: from here on, {type(error).__name__}: {error}", file=sys.stderr)


def read_source(source, downloads="out/downloads"):
    """Yield the documents of all that --source names. Raises CourseError where there are none."""
    for name in source:
        found = 0
        for text in chain.from_iterable(map(read_file, find_files(name, downloads))):
            if text.strip() and "\0" not in text:    # a zero byte: a program or a picture
                found += 1
                yield text
        if not found:
            raise CourseError(f"--source {name} (seen from {Path.cwd()}): no UTF-8 text in *.txt, "
                              "*.md, *.py or *.jsonl there; for a download, run 02_data.py first")


# ---- Tools: tokenizer.json as Hugging Face's libraries read and write it -------------------------
# JSON holds no bytes: GPT-2 writes printable ones as themselves, the others as letters 256, 257...
OTHERS = [*range(33), *range(127, 161), 173]
BYTE_OF = {chr(byte): byte for byte in range(256) if byte not in OTHERS}
BYTE_OF.update({chr(i): byte for i, byte in enumerate(OTHERS, 256)})
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def to_bytes(spelled):
    """Return the bytes of a spelled token: "Ġthe" -> b" the"."""
    return bytes(map(BYTE_OF.get, spelled))


def read_pair(pair):
    """Return the bytes of the two tokens of a merge: ["a", "b"], or "a b" in older files."""
    left, right = pair.split(" ") if isinstance(pair, str) else pair
    return to_bytes(left), to_bytes(right)


def special_json(text, i):
    """Return how tokenizer.json writes a special token."""
    return {"id": i, "content": text, "special": True, "normalized": False,
            "single_word": False, "lstrip": False, "rstrip": False}


def tokenizer_json(pairs, pattern, special_tokens):
    """Return what tokenizer.json holds for 256 bytes, merged `pairs` of ids and special tokens."""
    spelled = sorted(BYTE_OF, key=BYTE_OF.get)             # of the bytes 0, 1, 2...
    merges = []
    for left, right in pairs:
        merges.append([spelled[left], spelled[right]])
        spelled.append(spelled[left] + spelled[right])
    vocab = {token: i for i, token in enumerate(spelled)}
    added = [special_json(text, i) for i, text in enumerate(special_tokens, len(spelled))]
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    spell = {"type": "ByteLevel", "use_regex": False,
             "add_prefix_space": False, "trim_offsets": True}
    return {"version": "1.0", "added_tokens": added, "decoder": spell,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, spell]},
            "model": {"type": "BPE", "vocab": vocab, "merges": merges}}


def read_patterns(cutter):
    """Return the patterns by which a text is cut. Raises KeyError for a step that is not known."""
    known = {"ByteLevel": GPT2_PATTERN, "Digits": r"\p{N}"}     # Digits: SmolLM's
    cuts = []
    for step in cutter.get("pretokenizers", [cutter]):         # several steps, or a single one
        if step["type"] == "Split":
            cuts.append(step["pattern"]["Regex"])
        elif step.get("use_regex", True):
            cuts.append(known[step["type"]])
    # What a cut leaves between its matches is a chunk too.
    return [regex.compile(f"{cut}|(?:(?!{cut})[\\s\\S])+") for cut in cuts]


def read_tokenizer(data):
    """Return the Tokenizer that tokenizer.json tells of."""
    special = {token["content"]: token["id"] for token in data["added_tokens"]}
    tokens = {to_bytes(token): i for token, i in data["model"]["vocab"].items()
              if token not in special}
    merges = list(map(read_pair, data["model"]["merges"]))
    # A file does not say which mark begins a text, and which ends it: names tell.
    starts = filter(regex.compile("begin|bos|<s>").search, special)
    ends = filter(regex.compile("end|eos|</s>").search, special)
    return Tokenizer(tokens, merges, special, special.get(next(starts, None)),
                     special.get(next(ends, None)), read_patterns(data["pre_tokenizer"]), data)


def save_tokenizer(tokenizer, folder):
    """Write tokenizer.json and tokenizer_config.json, as transformers' AutoTokenizer wants."""
    write_json(Path(folder) / "tokenizer.json", tokenizer.data)
    end = tokenizer.bytes_of.get(tokenizer.end, b"").decode() or None
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end,
                "pad_token": end, "clean_up_tokenization_spaces": False}
    write_json(Path(folder) / "tokenizer_config.json", settings)


def load_tokenizer(folder):
    """Open a folder's tokenizer.json: ours, GPT-2's, the Llama-3, Qwen and SmolLM2 kinds."""
    path = Path(folder) / "tokenizer.json"
    data = read_json(path, "a typo? 01_tokenizer.py")
    try:
        return read_tokenizer(data)
    except Exception as error:                         # a file may hold anything
        raise CourseError(f"{path}: no byte-level BPE, or damaged ({error!r})") from None


Tokenizer.save, Tokenizer.load = save_tokenizer, load_tokenizer

if __name__ == "__main__":
    run(main, Config, __doc__)
