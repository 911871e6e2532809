"""Chapter 1 · Text to tokens: a byte-level BPE tokenizer, trained from scratch.

A language model reads numbers. The plainest are the bytes of a text, but a page is thousands of them and
the model pays for each. Byte-pair encoding (BPE) makes the row shorter: give the pair of neighbours that
occurs most often a number of its own, and repeat. Nothing is unknown, since every byte is a token too.

    l o w   l o w e r   l o w e s t      14 tokens; the pair (l, o) occurs 3 times
    lo w    lo w e r    lo w e s t       11 tokens; the pair (lo, w) occurs 3 times
    low     low e r     low e s t         8 tokens after two merges

Run:    python 01_tokenizer.py                      learns from the source of Python's own library
        python 01_tokenizer.py --source my_notes/   or from your own files, folders, globs
Gives:  the first merges, a sample in tokens, bytes per token; out/tokenizer/, which AutoTokenizer opens too.
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
import sys
import sysconfig
import unicodedata
from array import array
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import lru_cache
from itertools import chain, groupby, islice
from multiprocessing.pool import Pool, ThreadPool
from operator import add
from pathlib import Path

import regex  # like `re`, but it knows \p{L}, "a letter of any script"

# Legend
#   document   one text: a Python module, a story, a line of a .jsonl file
#   chunk      a word-like piece of a document, cut out by PATTERN; merges never cross its borders
#   id         the number of a token: 0..255 are the bytes, then merged pairs in order, then specials
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"   # 's | a word, " the" | up to 3 digits
           r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")         # | signs, " +=" | line ends | spaces
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END_OF_TEXT, CHAT_START, CHAT_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"    # special: marks, not text
SPECIAL_TOKENS = (END_OF_TEXT, CHAT_START, CHAT_END, *(f"<|spare_{i}|>" for i in range(5)))   # spare: for your own


# ---- Tools for every chapter: one-line errors, safe files, a command line from a dataclass -------
class CourseError(ValueError):
    """Something the reader can mend; a script prints it as one line and exits with status 1."""


@contextmanager
def replacing(path):
    """Yield a temporary path, moved to `path` if the block succeeds: a crash leaves the old file."""
    temporary = Path(path).with_name(f"{os.getpid()}.tmp.{Path(path).name}")
    temporary.parent.mkdir(parents=True, exist_ok=True)
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
    except (OSError, ValueError, RecursionError) as error:
        raise CourseError(f"cannot read {path} ({error}): {made_by} makes it") from None


def parse_flags(config_class, about, argv=None):
    """Make a command line of a dataclass: `max_tokens: int = 100  # its help` becomes --max-tokens 100."""
    source = "".join(map(inspect.getsource, config_class.__mro__[-2::-1]))      # base classes first
    comments = dict(regex.findall(r"(?m)^    (\w+): .*?  # (.*)$", source))
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for item in fields(config_class):
        default = getattr(config_class(), item.name)
        kind = getattr(item.type, "__args__", [item.type])[0]                   # list[str], int | None -> str, int
        many = "+" if isinstance(default, list) else None
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind, "nargs": many}
        text = comments[item.name] + (f" (default: {default})" if default and kind is not bool else "")
        parser.add_argument("--" + item.name.replace("_", "-"), default=default, help=text.replace("%", "%%"), **how)
    return config_class(**vars(parser.parse_args(argv)))


def run(script, config_class, about):
    """Run a chapter: flags in, `script(config)`, errors out as one line with status 1."""
    sys.stdout.reconfigure(errors="replace")                   # a letter the terminal lacks is no error
    try:
        script(parse_flags(config_class, about))
        sys.stdout.flush()
    except BrokenPipeError:                                    # the reader, say `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (CourseError, OSError, KeyboardInterrupt) as error:
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else f"error: {error}")


# ---- Where text comes from, and which part of it is held out -------------------------------------
NOT_READ = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "lib2to3", "ensurepip"}


def read_file(path):
    """Yield a file's documents, cut at END_OF_TEXT or 10,000 lines, or each .jsonl line's "text"; None if not UTF-8."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="\n") as lines:
            if ".jsonl" in path.suffixes:                      # JSON may hold half a character: it becomes "?"
                yield from (json.loads(row)["text"].encode(errors="replace").decode() for row in lines if row.strip())
            for is_end, part in groupby(lines, lambda line: line.strip() == END_OF_TEXT):
                while not is_end and (text := "".join(islice(part, 10_000))):       # bounds the memory
                    yield text
    except UnicodeDecodeError:
        yield None
    except Exception as error:                                 # whatever a damaged file brings about
        raise CourseError(f'{path} is no text, or no JSON lines with a "text": {error!r}') from None


def read_source(source, downloads="out/downloads"):
    """Yield the documents of files, folders, globs, or of names: "python" (the standard library), "site-packages"
    (what is installed beside it), a download of chapter 2. Raises CourseError where there are none."""
    installed = {"python": sysconfig.get_path("stdlib"), "site-packages": sysconfig.get_path("purelib")}
    for name in source:
        kinds = (".py",) if name in installed else (".txt", ".md", ".py", ".jsonl")
        found = glob.glob(os.path.expanduser(installed.get(name, name)), recursive=True) or [f"{downloads}/{name}.txt"]
        files = sorted(file for path in map(Path, found) for file in (path.rglob("*") if path.is_dir() else [path])
                       if file.name.removesuffix(".gz").endswith(kinds) and file.is_file()
                       and not (name == "python" and NOT_READ & set(file.relative_to(path).parts)))
        if not files:
            raise CourseError(f"--source {name}: no {'/'.join(kinds)} file there (a download: run 02_data.py first)")
        yield from chain.from_iterable(map(read_file, files))


def split_documents(documents):
    """Yield (split, text): 85% "train", 5% "val" to choose by, 10% "test" for the end; the text's hash decides.

    Whole, as half a text gives away the rest. Of fewer than 20, "val" is the last 10% of all characters; no "test".
    """
    documents = iter(documents)
    first = list(islice(documents, 20))
    left = int(0.9 * sum(map(len, first)))                     # characters that still go to train
    for text in chain(first, documents):
        point = int(hashlib.sha256(text.encode(errors="replace")).hexdigest()[:8], 16) / 16**8      # in [0, 1)
        split = "train" if point < 0.85 else "val" if point < 0.90 else "test"
        parts = [(split, text)] if len(first) == 20 else [("train", text[:left]), ("val", text[left:])]
        yield from (part for part in parts if part[1])
        left = max(0, left - len(text))


# ---- Training, first by its definition -----------------------------------------------------------
def learn_merges_naive(chunks, how_many):
    """Count all pairs, merge the commonest (ties: the lowest ids), repeat. Returns pairs of ids.

    A word is held as a string of one character per token, chr(id): a merge is then str.replace.

    >>> learn_merges_naive({"low": 2, "lower": 1}, 2)          # {chunk: how often}; l is 108, o 111, w 119
    [(108, 111), (256, 119)]
    """
    words, merges = {"".join(map(chr, chunk.encode())): n for chunk, n in chunks.items()}, []
    while len(merges) < how_many and any(len(word) > 1 for word in words):
        counts = Counter(chain.from_iterable(list(zip(word, word[1:])) * n for word, n in words.items()))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        words = {word.replace("".join(best), chr(256 + len(merges))): n for word, n in words.items()}
        merges.append(tuple(map(ord, best)))
    return merges


# ---- Training, fast: the same merges -------------------------------------------------------------
# A merge changes only the pairs beside it. So put all words in one row with a GAP between them, count once, remember
# the places of each pair, and visit those. Tokens never move: the id of a long one stands at its first and last
# byte.   GAP l o w GAP  ->  GAP lo lo w GAP  ->  GAP low GAP low GAP
GAP = -1


def learn_merges(chunks, how_many):
    """Return what learn_merges_naive returns, thousands of times sooner."""
    row, times = [GAP], [0]                                    # times: how often the word at a place occurs
    for chunk, n in chunks.items():
        row += [*chunk.encode(), GAP]
        times += [n] * (len(row) - len(times))
    counts, changes, places = Counter(), Counter(), defaultdict(lambda: array("i"))
    for i, pair in enumerate(zip(row, row[1:])):
        changes[pair] += times[i]
        places[pair].append(i)
    heap, merges, size = [], [], {GAP: 0, **dict.fromkeys(range(256), 1)}       # size: bytes of each id
    while len(merges) < how_many:
        for pair, change in changes.items():
            counts[pair] += change
            if change > 0 and GAP not in pair:
                heapq.heappush(heap, (-counts[pair], pair))    # the commonest pair is on top, heap[0]
        while heap and counts[heap[0][1]] != -heap[0][0]:      # its count fell since: queue it anew
            heapq.heapreplace(heap, (-counts[heap[0][1]], heap[0][1]))
        if not heap or heap[0][0] == 0:
            break
        (a, b), new, changes = heapq.heappop(heap)[1], 256 + len(merges), Counter()
        merges.append((a, b))
        size[new] = size[a] + size[b]
        for i in places.pop((a, b)):
            j, end = i + size[a], i + size[new]
            if row[i] == a and row[j] == b:                    # not so in "aaa" after the merge of the first two
                row[j - 1] = row[j] = GAP
                row[i] = row[end - 1] = new
                before, after = row[i - 1], row[end]
                for old, fresh, at in (((before, a), (before, new), i - size[before]), ((b, after), (new, after), i)):
                    changes[old] -= times[i]
                    changes[fresh] += times[i]
                    places[fresh].append(at)
    return merges


# ---- The tokenizer: text to ids and back, in the form of Hugging Face's tokenizer.json -----------
# JSON holds no bytes, so GPT-2 spells each by a letter, unprintable ones by those from 256 on: " " is "Ġ".
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF = dict(zip(map(chr, [*PRINTABLE, *range(256, 324)]), [*PRINTABLE, *sorted({*range(256)} - {*PRINTABLE})]))
NOT_HONOURED = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "add_prefix_space",
                "invert", "lstrip", "rstrip", "single_word")   # a file from elsewhere must leave these off


def tokenizer_json(pairs, pattern, special_tokens):
    """Return what tokenizer.json holds for a tokenizer of 256 bytes, merged `pairs` and specials."""
    spelled = sorted(BYTE_OF, key=BYTE_OF.get)
    for a, b in pairs:
        spelled.append(spelled[a] + spelled[b])
    flags = {**dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False), "special": True}
    added = [{"id": i, "content": text, **flags} for i, text in enumerate(special_tokens, len(spelled))]
    merges, vocab = [[spelled[a], spelled[b]] for a, b in pairs], {token: i for i, token in enumerate(spelled)}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"version": "1.0", "added_tokens": added, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "decoder": byte_level, "model": {"type": "BPE", "vocab": vocab, "merges": merges}}


class Tokenizer:
    """A byte-level BPE tokenizer made of `data`, a parsed tokenizer.json. Raises CourseError for what it cannot honour.

    tokens: {bytes: id}; special_tokens: {text: id}; bytes_of: {id: bytes}; merges: [(bytes, bytes)] in order;
    vocab_size: the highest id + 1; first: the id that this kind wants before a text, or None.
    """
    def __init__(self, data):
        self.data, self.nfc, self.first, self.special_tokens, patterns = data, False, None, {}, []
        for part, inside in (("added_tokens", ""), ("model", ""), ("normalizer", "normalizers"),
                             ("post_processor", "processors"), ("pre_tokenizer", "pretokenizers")):
            steps = data.get(part) or []                       # a list, or a "Sequence" with one, or a single step
            for step in steps if isinstance(steps, list) else steps.get(inside, [steps]):
                match part, {**step, "plain": not any(map(step.get, NOT_HONOURED))}:
                    case "added_tokens", {"content": text, "id": i, "plain": True}: self.special_tokens[text] = i
                    case "model", {"type": "BPE", "vocab": vocab, "merges": merges, "plain": True}: pass
                    case "normalizer", {"type": "NFC"}: self.nfc = True
                    case "post_processor", {"single": [{"SpecialToken": {"id": text}}, {"Sequence": _}]}:
                        self.first = self.special_tokens[text]
                    case "post_processor", {"type": "ByteLevel"} | {"single": [{"Sequence": _}]}: pass
                    case "pre_tokenizer", {"type": "Digits", "individual_digits": single}:
                        patterns.append(r"\p{N}" if single else r"\p{N}+")
                    case "pre_tokenizer", {"type": "Split", "behavior": "Isolated", "pattern": how, "plain": True}:
                        patterns.append(how.get("Regex") or regex.escape(how["String"]))
                    case "pre_tokenizer", {"type": "ByteLevel", "plain": True}:
                        patterns += [GPT2_PATTERN] if step.get("use_regex", True) else []
                    case _: raise CourseError(f"a tokenizer with this {part} is not supported: {step}"[:300])
        # what a pattern leaves between its matches is a chunk too
        self._cuts = [regex.compile(f"{pattern}|(?:(?!{pattern})[\\s\\S])+") for pattern in patterns]
        if "'ByteLevel'" not in str(data["pre_tokenizer"]) or any(cut.groups for cut in self._cuts):
            raise CourseError("a pre_tokenizer without ByteLevel, or with groups in a pattern, is not supported")
        longest_first = sorted(self.special_tokens, key=len, reverse=True)      # as one may begin another
        self._special = regex.compile(f"({'|'.join(map(regex.escape, longest_first)) or '(?!)'})")
        read = lambda spelled: bytes(BYTE_OF[letter] for letter in spelled)
        self.tokens = {read(token): i for token, i in vocab.items() if token not in self.special_tokens}
        self.bytes_of = {i: token for token, i in self.tokens.items()}
        self.bytes_of.update((i, text.encode()) for text, i in self.special_tokens.items())
        self.vocab_size = max(self.bytes_of) + 1
        self.merges = [tuple(map(read, m.split(" ") if isinstance(m, str) else m)) for m in merges]
        char = {token: chr(i) for token, i in self.tokens.items()}              # as in learn_merges_naive
        self._char_of = {byte: char[bytes([byte])] for byte in range(256) if bytes([byte]) in char}
        self._ranks = {char[a] + char[b]: (rank, char[a + b]) for rank, (a, b) in enumerate(self.merges)}
        self._ids_of = lru_cache(500_000)(self._encode_chunk)   # most chunks come back

    def fingerprint(self):
        """Return 16 hex digits that change when vocabulary, merges, pattern or specials do."""
        return hashlib.sha256(json.dumps(self.data, sort_keys=True).encode()).hexdigest()[:16]

    def _encode_chunk(self, text):
        """Return the ids of one chunk: the merge of lowest rank first, wherever it stands, until none is left."""
        chunk = text.encode("utf-8", "surrogateescape")
        if self.data["model"].get("ignore_merges") and chunk in self.tokens:
            return [self.tokens[chunk]]
        for byte in set(chunk) - self._char_of.keys():
            raise CourseError(f"the tokenizer has no token for the byte {byte:#04x}")
        word, ranks = "".join(map(self._char_of.get, chunk)), self._ranks
        pairs = set(map(add, word, word[1:])) & ranks.keys()
        while pairs:
            first = min(pairs, key=ranks.get)
            new = ranks[first][1]
            word = word.replace(first, new)
            found = map(add, word, word[1:])                   # all pairs, or of a long word the new token's
            if len(word) > 64:
                parts = word.split(new)
                found = pairs - {first} | {p for a, b in zip(parts, parts[1:]) for p in (a[-1:] + new, new + b[:1], new + new)}
            pairs = ranks.keys() & found
        return list(map(ord, word))

    def encode(self, text, allow_special=False):
        """Return the ids of a text, or of any bytes. Only with allow_special is "<|endoftext|>" one id."""
        text = text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else text.encode(
            "utf-16", "surrogatepass").decode("utf-16", "replace")              # half a UTF-16 pair becomes U+FFFD
        ids = []
        for i, part in enumerate(self._special.split(text) if allow_special else [text]):
            chunks = [] if i % 2 else [unicodedata.normalize("NFC", part) if self.nfc else part]
            for cut in self._cuts:
                chunks = chain.from_iterable(map(cut.findall, chunks))
            ids += [self.special_tokens[part]] if i % 2 else chain.from_iterable(map(self._ids_of, chunks))
        return ids

    def decode_bytes(self, ids):
        """Return the bytes that `ids` stand for. Raises CourseError for an id that is no token."""
        for i in set(ids) - self.bytes_of.keys():
            raise CourseError(f"{i} is not the id of a token: there are {self.vocab_size:,}")
        return b"".join(map(self.bytes_of.get, ids))

    def decode(self, ids):
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD, the replacement character."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer opens."""
        end = END_OF_TEXT if END_OF_TEXT in self.special_tokens else None
        write_json(Path(folder) / "tokenizer.json", self.data)
        write_json(Path(folder) / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            "bos_token": end, "eos_token": end, "pad_token": end})

    @classmethod
    def load(cls, path):
        """Open a tokenizer.json or its folder: ours, GPT-2's, the Llama-3, Qwen, SmolLM2 kinds. Raises CourseError."""
        path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        try:
            return cls(read_json(path, "01_tokenizer.py"))
        except (KeyError, TypeError, AttributeError, ValueError, IndexError, UnboundLocalError, regex.error) as error:
            raise CourseError(f"{path}: {error if isinstance(error, CourseError) else 'damaged: ' + repr(error)}") from None


def count_chunks(texts, special, pattern):
    """Count the chunks of some texts. What spells a special token is not learnt from."""
    parts = chain.from_iterable(special.split(text.encode(errors="replace").decode())[::2] for text in texts)
    return Counter(chain.from_iterable(map(regex.compile(pattern).findall, parts)))


def train_bpe(documents, vocab_size, pattern=PATTERN, special_tokens=SPECIAL_TOKENS, workers=1, learn=learn_merges):
    """Train a Tokenizer of `vocab_size` tokens in all; fewer where the text runs out of pairs. Raises CourseError."""
    room = vocab_size - 256 - len(special_tokens)
    if room < 0:
        raise CourseError(f"--vocab-size {vocab_size} is less than 256 bytes and {len(special_tokens)} special tokens")
    special = Tokenizer(tokenizer_json([], pattern, special_tokens))._special
    documents, chunks = iter(documents), Counter()
    with (Pool if workers > 1 else ThreadPool)(workers) as pool:
        for wave in iter(lambda: list(islice(documents, 64 * workers)), []):    # so that few texts wait in memory
            for counts in pool.starmap(count_chunks, [(wave[i::workers], special, pattern) for i in range(workers)]):
                chunks.update(counts)
    return Tokenizer(tokenizer_json(learn(chunks, room), pattern, special_tokens))


def show_tokens(pieces, marks=(24, 53, 22, 94)):
    """Return the pieces side by side, coloured in turn on a terminal, else parted by bars."""
    coloured = (f"\x1b[48;5;{marks[i % len(marks)]}m{piece}\x1b[0m" for i, piece in enumerate(pieces))
    return "".join(coloured) if sys.stdout.isatty() else "|".join(pieces)


@dataclass
class Config:
    source: list[str] = field(default_factory=lambda: ["python"])  # python, site-packages, files, folders, globs
    vocab_size: int = 4096  # tokens in all, special ones included; more makes text shorter and the model larger
    out: str = "out"  # root folder of the course: everything is written below it
    workers: int = os.cpu_count() or 1  # processes that cut the text into chunks


def main(config):
    """Learn from the train split, show what was learnt, save."""
    texts = lambda: (text for split, text in split_documents(       # one by one: they may not fit in memory
        filter(None, read_source(config.source, f"{config.out}/downloads"))) if split == "train")
    tokenizer = train_bpe(texts(), config.vocab_size, workers=max(1, config.workers))
    print(f"{tokenizer.vocab_size:,} tokens learnt of {config.vocab_size:,} (fewer if no pair was left to merge)")
    print("first merges:  ", *(f"{(a + b).decode(errors='replace')!r}" for a, b in tokenizer.merges[:12]))
    print("longest tokens:", *(repr(t.decode(errors="replace")) for t in sorted(tokenizer.tokens, key=len)[:-7:-1]), sep="\n    ")
    ids = tokenizer.encode(text := "".join(islice(texts(), 10))[:1_000_000])
    print(f"a sample, token by token:\n{show_tokens([tokenizer.decode([i]) for i in ids[:80]])}")
    print(f"{len(text.encode()) / max(1, len(ids)):.2f} bytes per token on text it has learnt from")
    tokenizer.save(f"{config.out}/tokenizer")
    write_json(f"{config.out}/tokenizer/source.json", {"source": config.source, "fingerprint": tokenizer.fingerprint()})
    print(f"saved {config.out}/tokenizer; next: python 02_data.py")


if __name__ == "__main__":
    run(main, Config, __doc__)
