"""How fast a corpus becomes a file of tokens, and in how much memory: chapter 2 beside two Rust libraries.

All use the same tokenizer (trained here), start from a list of texts and end with a file
of uint16; the files must be equal. Ours is one process, the peers get so many threads. Each run is a
process of its own. The second table encodes a text made here, document by document from a file, with its peak memory.

Run:    python tests/benchmarks/bench_encoding.py [--megabytes 10] [--source python] [--memory-megabytes 100]
Peers:  pip install tokenizers tiktoken; the ones that are not installed are left out.
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
from contextlib import redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from bench_tokenizer import peak_megabytes

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
chapter1, chapter2 = import_module("01_tokenizer"), import_module("02_data")
PEERS = {"Hugging Face": "tokenizers", "tiktoken": "tiktoken"}


def make_text(path, megabytes):
    """Write a text of random words in Zipf's frequencies, 2,000 characters or so a document."""
    chooser = random.Random(0)
    words = ["".join(chooser.choices("aabcdeeefghiilmnoopqrsttuvwyz", k=chooser.randint(1, 11))) for _ in range(50_000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1e6:
            file.write(" ".join(chooser.choices(words, weights, k=330)) + f"\n{chapter1.END_OF_TEXT}\n")


def read(source, megabytes):
    """Return the texts of a source up to so many megabytes."""
    texts, size = [], 0
    for text in chapter1.read_source([source]):
        texts.append(text)
        size += len(text.encode())
        if size >= megabytes * 1e6:
            break
    return texts


def encode_ours(texts, folder):
    """Encode by chapter 2 to folder/data/train.bin."""
    with redirect_stdout(sys.stderr):
        chapter2.write_tokens((("train", text) for text in texts), chapter1.Tokenizer.load(folder / "tokenizer"), folder / "data")
    return folder / "data" / "train.bin"


def encode_peer(name, texts, folder, threads):
    """Return a function that encodes by a peer to a file and returns its path; opening the peer is not timed."""
    ours, path = chapter1.Tokenizer.load(folder / "tokenizer"), folder / f"{name}.bin"
    end = ours.special_tokens[chapter1.END_OF_TEXT]
    if name == "Hugging Face":
        import tokenizers
        peer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
        batch_of = lambda texts: [encoding.ids for encoding in peer.encode_batch(texts, add_special_tokens=False)]
    else:
        import tiktoken
        peer = tiktoken.Encoding("ours", pat_str=chapter1.PATTERN, special_tokens=ours.special_tokens,
                                 mergeable_ranks=ours.tokens)
        batch_of = lambda texts: peer.encode_ordinary_batch(texts, num_threads=threads)

    def encode():
        with open(path, "wb") as file:
            for start in range(0, len(texts), 256):
                for ids in batch_of(texts[start:start + 256]):
                    file.write(np.array([*ids, end], np.uint16).tobytes())
        return path

    return encode


def child(kind, name, threads, folder, source, megabytes):
    """One measurement, in a process of its own; prints a line of JSON."""
    folder, threads = Path(folder), int(threads)
    if kind == "memory":
        start = time.time()
        with redirect_stdout(sys.stderr):
            chapter2.main(chapter2.Config(source=[source], out=str(folder)))
        seconds, size, digest = time.time() - start, Path(source).stat().st_size, ""
    else:
        texts = read(source, float(megabytes))
        encode = (lambda: encode_ours(texts, folder)) if name == "ours" else encode_peer(name, texts, folder, threads)
        start = time.time()
        path = encode()
        seconds, size = time.time() - start, sum(len(text.encode()) for text in texts)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    print(json.dumps({"seconds": seconds, "bytes": size, "sha256": digest, "peak": peak_megabytes()}))


def measure(*words, threads):
    """Run child(...) in a process with so many threads; return what it measured."""
    environment = {**os.environ, "RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, "--child", *map(str, words)], env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, encoding="utf-8")
    if done.returncode:
        sys.exit(f"{words} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="python", help="what to encode for speed")
    parser.add_argument("--megabytes", type=float, default=10, help="how much of it")
    parser.add_argument("--memory-megabytes", type=float, default=100, help="size of the text for the memory table")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    flags = parser.parse_args()
    for name, package in PEERS.items():
        if not find_spec(package):
            print(f"{name}: not installed, left out (pip install {package})")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tokenizer = chapter1.train_bpe(read(flags.source, flags.megabytes), flags.vocab_size)
        tokenizer.save(folder / "tokenizer")
        chapter1.write_json(folder / "tokenizer" / "source.json", [flags.source])
        print(f"{flags.source}, {tokenizer.vocab_size:,} tokens\n{'':14}{'threads':>8}{'seconds':>9}{'MB/s':>8}{'ours / peer':>13}")
        for threads in flags.threads:
            results = {name: measure("speed", name, threads, folder, flags.source, flags.megabytes, threads=threads)
                       for name in ("ours", *PEERS) if find_spec(PEERS.get(name, "numpy"))}
            for name, result in results.items():
                ratio = result["seconds"] / results["ours"]["seconds"]           # of speeds: above 1 we are faster
                same = "" if result["sha256"] == results["ours"]["sha256"] else "   OTHER TOKENS"
                print(f"{name:14}{threads:8}{result['seconds']:9.2f}{result['bytes'] / result['seconds'] / 1e6:8.2f}{ratio:13.2f}{same}")
        text = folder / "text.txt"
        make_text(text, flags.memory_megabytes)
        print(f"\n02_data.py on a file of {text.stat().st_size / 1e6:,.0f} MB")
        result = measure("memory", "ours", 1, folder, text, 0, threads=1)
        print(f"{result['seconds']:.2f} s, {result['bytes'] / result['seconds'] / 1e6:.2f} MB/s, peak {result['peak'][0]:.0f} MB")


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main()
