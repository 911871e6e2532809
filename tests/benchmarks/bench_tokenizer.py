"""Training a tokenizer and encoding by it: chapter 1 beside the Rust libraries of others.

Training: the same texts, split pattern and vocabulary for all; the time does not contain reading the texts.
Each run is a process of its own, so that its peak memory (texts included, about equal for all) can be told.
The tokens must come out equal, one by one: Hugging Face's trainer breaks ties by the order of its alphabet,
so it is given the 256 bytes in raw order. Encoding: one process, document by document, nothing is written.
With a folder that holds GPT-2's tokenizer.json, its ids are compared with tiktoken's as well.

Run:    python tests/benchmarks/bench_tokenizer.py [GPT2_FOLDER] [--source python "$(python -c 'import
        sysconfig; print(sysconfig.get_path("purelib"))')/**/*.py"]      (100 MB or so, of what is installed)
Peers:  pip install tokenizers rustbpe tiktoken; the ones that are not installed are left out.
"""
import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
chapter1 = import_module("01_tokenizer")
TRAINERS = {"ours": "regex", "Hugging Face": "tokenizers", "rustbpe": "rustbpe"}
ENCODERS = {"ours": "regex", "Hugging Face": "tokenizers", "tiktoken": "tiktoken", "rustbpe": "rustbpe"}


def read(source, megabytes):
    """Return the texts of a source up to so many megabytes, without those that spell a special token."""
    texts, size = [], 0
    for text in chapter1.read_source([source]):
        if size >= megabytes * 1e6:
            break
        if not any(special in text for special in chapter1.SPECIAL_TOKENS):     # rustbpe knows of no specials
            texts.append(text)
            size += len(text.encode())
    return texts


def trainer(name, vocab_size):
    """Return a function from texts to [bytes of token 0, 1, ...], the 256 bytes and the merged pairs."""
    room = vocab_size - len(chapter1.SPECIAL_TOKENS)
    if name == "ours":
        def train(texts):
            found = chapter1.train_bpe(texts, vocab_size).bytes_of
            return [found[i] for i in range(min(room, len(found) - len(chapter1.SPECIAL_TOKENS)))]
    elif name == "rustbpe":
        import rustbpe

        def train(texts):
            peer = rustbpe.Tokenizer()
            peer.train_from_iterator(iter(texts), room, pattern=chapter1.PATTERN)
            return [bytes(token) for token, _ in sorted(peer.get_mergeable_ranks(), key=lambda item: item[1])]
    else:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

        def train(texts):
            peer, letters = Tokenizer(models.BPE()), sorted(chapter1.BYTE_OF, key=chapter1.BYTE_OF.get)
            peer.pre_tokenizer = pre_tokenizers.Sequence([
                pre_tokenizers.Split(Regex(chapter1.PATTERN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
            peer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=room, special_tokens=letters, show_progress=False))
            spelled = sorted(peer.get_vocab().items(), key=lambda item: item[1])
            return [bytes(chapter1.BYTE_OF[letter] for letter in token) for token, _ in spelled]
    return train


def encoder(name, folder):
    """Return a function from a text to its ids, special tokens left as plain text."""
    ours = chapter1.Tokenizer.load(folder)
    if name == "ours":
        return ours.encode
    if name == "Hugging Face":
        from tokenizers import Tokenizer
        peer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return lambda text: peer.encode(text, add_special_tokens=False).ids
    if name == "tiktoken":
        import tiktoken
        cut = ours.data["pre_tokenizer"]
        pattern = cut["pretokenizers"][0]["pattern"]["Regex"] if "pretokenizers" in cut else chapter1.GPT2_PATTERN
        return tiktoken.Encoding("same", pat_str=pattern, mergeable_ranks=ours.tokens,
                                 special_tokens=ours.special_tokens).encode_ordinary
    return None                                                # rustbpe opens no file: see child()


def peak_megabytes():
    """Return the peak memory of this process and of the largest of its children, in MB (None on Windows)."""
    try:
        import resource
    except ImportError:
        return None, None
    unit = 1e6 if sys.platform == "darwin" else 1e3            # bytes there, kilobytes on Linux
    return tuple(resource.getrusage(who).ru_maxrss / unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def child(kind, name, source, megabytes, vocab_size, folder):
    """One measurement, in a process of its own; prints a line of JSON."""
    texts = read(source, float(megabytes))
    if kind == "train":
        work = trainer(name, int(vocab_size))
    elif name == "rustbpe":                                    # training is the only way to a tokenizer: not timed
        import rustbpe
        peer = rustbpe.Tokenizer()
        peer.train_from_iterator(iter(texts), int(vocab_size) - len(chapter1.SPECIAL_TOKENS), pattern=chapter1.PATTERN)
        work = lambda texts: [peer.encode(text) for text in texts]
    else:
        encode = encoder(name, Path(folder))
        work = lambda texts: [encode(text) for text in texts]
    start = time.perf_counter()
    made = work(texts)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "bytes": sum(len(text.encode()) for text in texts), "tokens": len(made),
                      "digest": hashlib.sha256(repr(made).encode()).hexdigest(), "peak": peak_megabytes()}))


def measure(*words, threads):
    """Run child(...) in a process with so many threads; return what it measured."""
    environment = {**os.environ, "RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, "--child", *map(str, words)], env=environment,
                          capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        sys.exit(f"{words} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(kind, names, source, megabytes, vocab_size, threads, folder=""):
    """Print a line per library: its time, ours divided by it, memory, and whether the result is the same."""
    results = {name: measure(kind, name, source, megabytes, vocab_size, folder, threads=threads)
               for name, package in names.items() if find_spec(package)}
    ours = results["ours"]
    for name, found in results.items():
        peak = f"{found['peak'][0]:.0f}" if found["peak"][0] else "-"
        print(f"{kind:7}{source[-14:]:15}{ours['bytes'] / 1e6:7.1f}{vocab_size:8}  {name:13}{found['seconds']:9.2f}"
              f"{found['bytes'] / found['seconds'] / 1e6:8.2f}{ours['seconds'] / found['seconds']:13.2f}{peak:>9}"
              + ("" if found["digest"] == ours["digest"] else "   OTHER TOKENS"))


def compare_gpt2(path):
    """Print whether ids by a folder's GPT-2 tokenizer equal tiktoken's, on real text and on random characters."""
    if not find_spec("tiktoken"):
        return print("GPT-2's file: tiktoken is not installed, not compared")
    ours, theirs, chooser = encoder("ours", path), encoder("tiktoken", path), random.Random(0)
    letters = "abc XYZ 0123\n\n\t  .,;'\"()é€ßñЖдא漢字😀👍\u0301\x00"
    texts = read("python", 2) + ["".join(chooser.choices(letters, k=chooser.randint(0, 80))) for _ in range(10_000)]
    other = sum(ours(text) != theirs(text) for text in texts)
    print(f"GPT-2's file: {other} of {len(texts):,} texts differ from tiktoken")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gpt2", nargs="?", type=Path, help="folder with GPT-2's tokenizer.json, to compare with tiktoken")
    parser.add_argument("--source", nargs="+", default=["python"], help="python is about 10 MB; a folder or a glob of more")
    parser.add_argument("--megabytes", type=float, default=100, help="at most so much of each source")
    parser.add_argument("--vocab-size", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--threads", type=int, default=2, help="of the others, for training; ours and encoding use one")
    flags = parser.parse_args()
    for name, package in {**TRAINERS, **ENCODERS}.items():
        if not find_spec(package):
            print(f"{name}: not installed, left out (pip install {package})")
    print(f"{'':7}{'source':15}{'MB':>7}{'tokens':>8}  {'':13}{'seconds':>9}{'MB/s':>8}{'ours / peer':>13}{'peak MB':>9}")
    for source in flags.source:
        for vocab_size in flags.vocab_size:
            compare("train", TRAINERS, source, flags.megabytes, vocab_size, flags.threads)
    with tempfile.TemporaryDirectory() as folder:
        source, vocab_size, megabytes = flags.source[0], flags.vocab_size[0], min(flags.megabytes, 10)
        chapter1.train_bpe(read(source, megabytes), vocab_size).save(folder)
        compare("encode", ENCODERS, source, megabytes, vocab_size, 1, folder)
    if flags.gpt2:
        compare_gpt2(flags.gpt2)


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main()
