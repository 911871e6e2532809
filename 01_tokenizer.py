"""Chapter 1 · Text to tokens: a byte-level BPE tokenizer, trained from scratch.

A language model reads numbers. The plainest are the bytes of a text, but a page is thousands of
bytes and the model pays for each. Byte-pair encoding (BPE) shortens the sequence: give the pair of
neighbours that occurs most often a number of its own, and repeat a few thousand times. Frequent
words become one token, rare ones a few; nothing is unknown, since every byte is a token too.

    l o w   l o w e r   l o w e s t      12 tokens; the pair (l, o) occurs 3 times
    lo w    lo w e r    lo w e s t        9 tokens; the pair (lo, w) occurs 3 times
    low     low e r     low e s t         6 tokens after two merges

Run:    python 01_tokenizer.py                      learns from the source of Python's own library
        python 01_tokenizer.py --source my_notes/   or from your own files, folders, globs
Prints: the first merges, a sample in tokens, the longest tokens, bytes per token.
Writes: out/tokenizer/, a folder that Hugging Face's AutoTokenizer opens too.
Source: Sennrich et al. 2016 (BPE), Radford et al. 2019 (bytes; GPT-2), Hugging Face (file format).
"""
import argparse
import glob
import gzip
import hashlib
import heapq
import inspect
import json
import os
import re
import sys
import sysconfig
import time
import typing
import unicodedata
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import chain, groupby, islice
from multiprocessing import Pool
from pathlib import Path

import regex  # like `re`, but it knows \p{L}, "a letter of any script"

# Legend
#   document   one text: a Python module, a story, a line of a .jsonl file
#   chunk      a word-like piece of a document, cut out by PATTERN; merges never cross its borders
#   id         the number of a token: 0..255 are the bytes, then the merges in order, then specials
#   pair       two neighbouring ids; a merge gives it an id of its own, its rank is its turn
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
           r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END_OF_TEXT, CHAT_START, CHAT_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, CHAT_START, CHAT_END, *(f"<|spare_{i}|>" for i in range(5)))


# ---- Tools for every chapter: one-line errors, safe files, a command line from a dataclass -------

class CourseError(ValueError):
    """Something the reader can mend; a script prints it as one line and exits with status 1."""


@contextmanager
def replacing(path):
    """Yield a temporary path, moved to `path` if the block succeeds: a crash leaves the old file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Write `value` as JSON to `path`, all of it or nothing."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def read_json(path, made_by):
    """Read a JSON file; `made_by` tells the reader what makes it. Raises CourseError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CourseError(f"{path} does not exist: {made_by} makes it") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CourseError(f"{path} is damaged ({error}): {made_by} makes it anew") from None


def parse_flags(config_class, about, argv=None):
    """Make a command line of a dataclass: a flag per field, the field's comment as its help.

    `max_tokens: int = 100  # tokens to write` becomes `--max-tokens 100`, a bool `--flag` and
    `--no-flag`. `int | None = None` means: chosen by the script unless given.
    """
    source = "".join(map(inspect.getsource, config_class.__mro__[-2::-1]))      # base classes first
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.M))
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for item in fields(config_class):
        default = getattr(config_class(), item.name)
        kind = next(iter(typing.get_args(item.type)), item.type)    # list[str], int | None -> str, int
        shown = f" (default: {default})" if default and kind is not bool else ""
        options = {"default": default, "help": (comments[item.name] + shown).replace("%", "%%")}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options.update(type=kind, metavar=kind.__name__.upper())
        if typing.get_origin(item.type) is list:
            options["nargs"] = "+"
        parser.add_argument("--" + item.name.replace("_", "-"), **options)
    return config_class(**vars(parser.parse_args(argv)))


def run(main, config_class, about):
    """Run a script: flags in, `main(config)`, errors out as one line with status 1."""
    try:
        main(parse_flags(config_class, about))
    except CourseError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


# ---- Where text comes from, and which part of it is held out -------------------------------------

NOT_READ = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "lib2to3", "ensurepip"}


def read_file(path):
    """Yield a file's documents: each .jsonl line's "text", else the text, cut at END_OF_TEXT lines."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="\n") as lines:           # keeps "\r\n" as it is
        if ".jsonl" in path.suffixes:
            yield from (json.loads(line)["text"] for line in lines)
            return
        for is_end, part in groupby(lines, lambda line: line.strip() == END_OF_TEXT):
            while not is_end and (text := "".join(islice(part, 100_000))):      # bounds the memory
                yield text


def read_source(source, downloads="out/downloads"):
    """Yield the documents of a list of names, files, folders, globs, in order; None for one not UTF-8.

    "python" is the standard library, "site-packages" what is installed beside it, any other name a
    file of that name in `downloads`. Raises CourseError where nothing is found or can be read.
    """
    for name in source:
        if name in ("python", "site-packages"):
            root = Path(sysconfig.get_paths()["stdlib" if name == "python" else "purelib"])
            skip = NOT_READ if name == "python" else set()
            files = [file for file in root.rglob("*.py") if not skip & set(file.relative_to(root).parts)]
        else:
            found = glob.glob(os.path.expanduser(name), recursive=True) or glob.glob(f"{downloads}/{name}.*")
            files = [file for path in map(Path, found) for file in (path.rglob("*") if path.is_dir() else [path])
                     if file.name.removesuffix(".gz").endswith((".txt", ".md", ".py", ".jsonl"))]
        if not files:
            raise CourseError(f"--source {name}: found no .txt, .md, .py or .jsonl file (or .gz of one). "
                              f"If it is the name of a download, `python 02_data.py --source {name}` fetches it")
        for file in sorted(files):
            try:
                yield from read_file(file)
            except UnicodeDecodeError:
                yield None
            except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
                raise CourseError(f"{file} cannot be read as text, or as JSON lines with \"text\": {error!r}") from None


def split_of(text):
    """Return "train" (85%), "val" (5%) or "test" (10%), decided by the text's hash alone.

    >>> [split_of(text) for text in ("import os", "import re", "import ast")]
    ['val', 'train', 'train']
    """
    point = int(hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:8], 16) / 16**8   # in [0, 1)
    return "train" if point < 0.85 else "val" if point < 0.90 else "test"


def split_documents(documents):
    """Yield (split, text). Of fewer than 20 documents, the last 10% of characters are val instead."""
    documents = iter(documents)
    first = list(islice(documents, 20))
    if len(first) == 20:
        yield from ((split_of(text), text) for text in chain(first, documents))
        return
    left = int(0.9 * sum(map(len, first)))                     # characters that still go to train
    for text in first:
        yield from ((split, part) for split, part in (("train", text[:left]), ("val", text[left:])) if part)
        left = max(0, left - len(text))


# ---- Training, first by its definition -----------------------------------------------------------
# A word is written as a string with one character per token, chr(id). A pair is then a string of two
# characters and a merge is str.replace; strings compare just as their ids do.

def pairs_in(word):
    """Return the neighbours in a word, as strings of two: "abc" -> "ab", "bc"."""
    return map(str.__add__, word, word[1:])


def learn_merges_naive(chunks, how_many):
    """Count all pairs, merge the commonest (ties: the lowest ids), repeat. Returns pairs of ids.

    chunks: {text: how often it occurs}.

    >>> learn_merges_naive({"low": 2, "lower": 1}, 2)          # l is 108, o 111, w 119
    [(108, 111), (256, 119)]
    """
    words = {"".join(map(chr, chunk.encode())): n for chunk, n in chunks.items()}
    merges = []
    while len(merges) < how_many:
        counts = Counter()
        for word, n in words.items():
            for pair in pairs_in(word):
                counts[pair] += n
        if not counts:
            break                                              # every word is one token by now
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        words = {word.replace(best, chr(256 + len(merges))): n for word, n in words.items()}
        merges.append(tuple(map(ord, best)))
    return merges


# ---- Training, fast: the same merges -------------------------------------------------------------
# A merge changes only the pairs beside it. So count once, remember for each pair which words hold
# it, and update both in place; a heap of (-count, pair) has the commonest pair on top.

def learn_merges(chunks, how_many):
    """Return what learn_merges_naive returns, thousands of times sooner."""
    words, frequency = ["".join(map(chr, chunk.encode())) for chunk in chunks], list(chunks.values())
    counts, where = defaultdict(int), defaultdict(set)
    for i, (word, n) in enumerate(zip(words, frequency)):
        for pair in pairs_in(word):
            counts[pair] += n
            where[pair].add(i)
    heap = [(-n, pair) for pair, n in counts.items()]
    heapq.heapify(heap)
    merges = []
    while heap and len(merges) < how_many:
        n, pair = heapq.heappop(heap)
        if counts[pair] != -n:                                 # the count fell since: queue it anew
            if counts[pair]:
                heapq.heappush(heap, (-counts[pair], pair))
            continue
        new, changes = chr(256 + len(merges)), defaultdict(int)
        runs = re.compile(f"(?:{re.escape(pair)})+")
        for i in where.pop(pair):
            for run in runs.finditer(words[i]):                # "xababy": the pairs of this span go,
                span = words[i][max(0, run.start() - 1):run.end() + 1]
                for old in pairs_in(span):
                    changes[old] -= frequency[i]
                for fresh in pairs_in(span.replace(pair, new)):          # those of "xNNy" come
                    changes[fresh] += frequency[i]
                    where[fresh].add(i)
            words[i] = words[i].replace(pair, new)
        for other, change in changes.items():
            counts[other] += change
            if change > 0:
                heapq.heappush(heap, (-counts[other], other))
        merges.append((ord(pair[0]), ord(pair[1])))
    return merges


# ---- The tokenizer: text to ids and back ---------------------------------------------------------

def byte_letters():
    """Return the printable letter by which tokenizer.json spells each of the 256 bytes (GPT-2's map)."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}          # these spell themselves
    other = iter(range(256, 512))
    return [chr(byte if byte in plain else next(other)) for byte in range(256)]


def tokenizer_json(pairs, pattern, special_tokens):
    """Return what tokenizer.json holds for a tokenizer of 256 bytes, merged `pairs` and specials."""
    spelled = byte_letters()
    for a, b in pairs:
        spelled.append(spelled[a] + spelled[b])
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": len(spelled) + i, "content": text, **flags, "special": True}
                         for i, text in enumerate(special_tokens)],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {token: i for i, token in enumerate(spelled)},
                  "merges": [[spelled[a], spelled[b]] for a, b in pairs]}}


def parts_of(step, inside):
    """Return the steps of a "Sequence" in tokenizer.json, or the single step, or none."""
    return step[inside] if step and step["type"] == "Sequence" else [step] if step else []


class Tokenizer:
    """A byte-level BPE tokenizer, made from the content of a tokenizer.json.

    merges: [(bytes, bytes)] in order; special_tokens: {text: id}; vocab_size: the number of ids;
    first: the id that this kind of model wants before every text, or None.
    """

    def __init__(self, data):
        """data: the parsed JSON. Raises CourseError naming what cannot be honoured."""
        model, self.data = data["model"], data
        odd = [f"{name} {model[name]!r}" for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix",
                                                      "byte_fallback") if model.get(name)]
        odd += [f"model {model['type']}"] if model["type"] != "BPE" else []
        steps = parts_of(data.get("normalizer"), "normalizers")
        odd += [f"normalizer {step['type']}" for step in steps if step["type"] != "NFC"]
        self.nfc, self.whole_chunks, self.first, patterns = bool(steps), model.get("ignore_merges"), None, []
        for step in parts_of(data["pre_tokenizer"], "pretokenizers"):
            if step["type"] == "Split" and step["behavior"] == "Isolated" and not step.get("invert"):
                patterns.append(step["pattern"].get("Regex") or regex.escape(step["pattern"]["String"]))
            elif step["type"] == "Digits":
                patterns.append(r"\p{N}" if step["individual_digits"] else r"\p{N}+")
            elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
                patterns += [GPT2_PATTERN] if step.get("use_regex", True) else []
            else:
                odd.append(f"pre-tokenizer {step}")
        for step in parts_of(data.get("post_processor"), "processors"):
            if step["type"] == "TemplateProcessing" and "Sequence" in step["single"][-1]:
                starts = [part["SpecialToken"]["id"] for part in step["single"][:-1]]
                self.first = step["special_tokens"][starts[0]]["ids"][0] if starts else None
            elif step["type"] != "ByteLevel":
                odd.append(f"post-processor {step['type']}")
        if odd:
            raise CourseError(f"this kind of tokenizer is not supported: {'; '.join(odd)}")
        byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
        read = lambda spelled: bytes(byte_of[letter] for letter in spelled)
        self.special_tokens = {token["content"]: token["id"] for token in data["added_tokens"]}
        self.tokens = {read(token): i for token, i in model["vocab"].items() if token not in self.special_tokens}
        self.merges = [tuple(map(read, m.split(" ") if isinstance(m, str) else m)) for m in model["merges"]]
        self.bytes_of = {i: token for token, i in self.tokens.items()}
        self.bytes_of.update((i, text.encode()) for text, i in self.special_tokens.items())
        self.vocab_size = max(self.bytes_of) + 1
        self._ranks = {(self.tokens[a], self.tokens[b]): (rank, self.tokens[a + b])
                       for rank, (a, b) in enumerate(self.merges)}
        # what a pattern leaves between its matches is a chunk too
        self._splits = [regex.compile(f"{p}|(?:(?!{p})[\\s\\S])+") for p in patterns]
        self._special = regex.compile("(" + "|".join(map(regex.escape, self.special_tokens)) + ")")
        self._cache = {}

    def fingerprint(self):
        """Return 16 hex digits that change when vocabulary, merges, pattern or specials do."""
        return hashlib.sha256(json.dumps(self.data, sort_keys=True).encode()).hexdigest()[:16]

    def _encode_chunk(self, chunk):
        """Return the ids of one chunk (bytes): do the merge of lowest rank until none is left.

        The pairs wait in a heap, the ids form a doubly linked list: n bytes take about n log n.
        """
        if self.whole_chunks and chunk in self.tokens:
            return [self.tokens[chunk]]
        try:
            ids = [self.tokens[chunk[i:i + 1]] for i in range(len(chunk))]
        except KeyError as error:
            raise CourseError(f"the tokenizer has no token for the byte {error}") from None
        left, right = list(range(-1, len(ids) - 1)), list(range(1, len(ids) + 1))
        heap = [(self._ranks[pair], i) for i, pair in enumerate(zip(ids, ids[1:])) if pair in self._ranks]
        heapq.heapify(heap)
        while heap:
            (rank, new), i = heapq.heappop(heap)
            j = right[i]
            if j == len(ids) or self._ranks.get((ids[i], ids[j])) != (rank, new):
                continue                                       # one of the two was merged meanwhile
            ids[i], ids[j], right[i] = new, None, right[j]
            if right[i] < len(ids):
                left[right[i]] = i
            for a, b in ((left[i], i), (i, right[i])):
                if a >= 0 and b < len(ids) and (ids[a], ids[b]) in self._ranks:
                    heapq.heappush(heap, (self._ranks[ids[a], ids[b]], a))
        return [i for i in ids if i is not None]

    def _encode_plain(self, text):
        """Return the ids of text without special tokens; a chunk seen before costs one look-up."""
        chunks = [unicodedata.normalize("NFC", text) if self.nfc else text]
        for split in self._splits:
            chunks = chain.from_iterable(map(split.findall, chunks))
        ids, cache = [], self._cache
        for chunk in chunks:
            if chunk in cache:
                ids += cache[chunk]
                continue
            fresh = self._encode_chunk(chunk.encode("utf-8", "surrogateescape"))
            ids += fresh
            if len(chunk) < 50 and len(cache) < 1_000_000:      # bounded memory
                cache[chunk] = fresh
        return ids

    def encode(self, text, allow_special=False):
        """Return the ids of `text`. Only with allow_special is "<|endoftext|>" one id, not 7 letters."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")   # lone surrogates: U+FFFD
        if not (allow_special and self.special_tokens):
            return self._encode_plain(text)
        return list(chain.from_iterable([self.special_tokens[part]] if part in self.special_tokens
                                        else self._encode_plain(part) for part in self._special.split(text)))

    def encode_bytes(self, data):
        """Return the ids of any bytes, UTF-8 or not; decode_bytes gives the same bytes back."""
        return self._encode_plain(data.decode("utf-8", "surrogateescape"))

    def decode_bytes(self, ids):
        """Return the bytes that `ids` stand for. Raises CourseError for an id that is no token."""
        try:
            return b"".join([self.bytes_of[i] for i in ids])
        except KeyError as error:
            raise CourseError(f"{error} is not the id of a token: there are {self.vocab_size:,}") from None

    def decode(self, ids):
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD, the replacement character."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def first_merges(self, how_many):
        """Return the tokenizer as it was after its first merges: a smaller vocabulary."""
        model = {**self.data["model"], "merges": self.data["model"]["merges"][:how_many]}
        return Tokenizer({**self.data, "model": model})

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer opens."""
        end = END_OF_TEXT if END_OF_TEXT in self.special_tokens else None
        write_json(Path(folder) / "tokenizer.json", self.data)
        write_json(Path(folder) / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end, "pad_token": end,
            "clean_up_tokenization_spaces": False})

    @classmethod
    def load(cls, path):
        """Open a tokenizer.json or its folder: ours, GPT-2's, the Llama-3, Qwen and SmolLM2 kinds."""
        path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        data = read_json(path, "01_tokenizer.py")
        try:
            return cls(data)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError, regex.error) as error:
            raise CourseError(f"{path}: {error if isinstance(error, CourseError) else 'damaged: ' + repr(error)}") from None


def count_chunks(job):
    """Count the chunks of some documents; text that spells a special token is not learnt from."""
    documents, pattern, special_tokens = job
    specials = regex.compile("|".join(map(regex.escape, special_tokens)) or "(?!)")
    return Counter(chain.from_iterable(regex.findall(pattern, part) for text in documents
                                       for part in specials.split(text)))


def train_bpe(documents, vocab_size, pattern=PATTERN, special_tokens=SPECIAL_TOKENS, workers=1, learn=learn_merges):
    """Train a Tokenizer of `vocab_size` tokens in all; fewer where the text runs out of pairs.

    Raises CourseError if vocab_size has no room for the 256 bytes and the special tokens.
    """
    room = vocab_size - 256 - len(special_tokens)
    if room < 0:
        raise CourseError(f"--vocab-size {vocab_size} is too small for 256 bytes and {len(special_tokens)} special tokens")
    documents, chunks = iter(documents), Counter()
    jobs = ((batch, pattern, special_tokens) for batch in iter(lambda: list(islice(documents, 32)), []))
    with Pool(workers) as pool:
        for counts in pool.imap_unordered(count_chunks, jobs):
            chunks.update(counts)
    return Tokenizer(tokenizer_json(learn(chunks, room), pattern, special_tokens))


# ---- The script ----------------------------------------------------------------------------------

def show_tokens(pieces, marks=(24, 53, 22, 94)):
    """Return the pieces side by side, coloured in turn on a terminal, else parted by bars."""
    if not sys.stdout.isatty():
        return "|".join(pieces)
    return "".join(f"\x1b[48;5;{marks[i % len(marks)]}m{piece}\x1b[0m" for i, piece in enumerate(pieces))


@dataclass
class Config:
    source: list[str] = field(default_factory=lambda: ["python"])  # text to learn from: python (the standard library), site-packages, files, folders, globs
    vocab_size: int = 4096  # tokens in all, special ones included; more makes text shorter and the model larger
    out: str = "out"  # root folder of the course: everything is written below it
    workers: int = os.cpu_count() or 1  # processes that cut the text into chunks


def main(config):
    """Train on the train split, show what was learnt, save."""
    start, folder, counted = time.time(), Path(config.out) / "tokenizer", Counter()
    train = []
    for split, text in split_documents(filter(None, read_source(config.source, Path(config.out) / "downloads"))):
        counted[split] += 1
        train += [text] if split == "train" else []
    print(f"{config.source}: {sum(counted.values())} documents, {counted['train']} of them to learn from")
    tokenizer = train_bpe(train, config.vocab_size, workers=config.workers)
    print(f"{tokenizer.vocab_size:,} tokens in {time.time() - start:.1f} s", end="")
    print("" if tokenizer.vocab_size == config.vocab_size else f" (not {config.vocab_size:,}: no pair is left to merge)")
    print("first merges:  ", "  ".join(f"{a.decode(errors='replace')!r}+{b.decode(errors='replace')!r}" for a, b in tokenizer.merges[:8]))
    longest = sorted(tokenizer.tokens, key=len, reverse=True)[:8]
    print("longest tokens:", "  ".join(repr(token.decode(errors="replace")) for token in longest))
    sample = max(train, key=len, default="")[:300]
    print(f"a sample:\n{show_tokens([tokenizer.decode([i]) for i in tokenizer.encode(sample)])}")
    text = "".join(train)[:1_000_000]
    print(f"{len(text.encode()) / max(1, len(tokenizer.encode(text))):.2f} bytes per token on text it has learnt from")
    tokenizer.save(folder)
    write_json(folder / "source.json", {"source": config.source, "fingerprint": tokenizer.fingerprint()})
    print(f"saved {folder}; next: python 02_data.py")


if __name__ == "__main__":
    run(main, Config, __doc__)
