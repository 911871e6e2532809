"""Chapter 2: cleaning, splits, downloads, encoding, batches."""
import doctest
import hashlib
import http.server
import json
import os
import random
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from importlib import import_module
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
chapter1, chapter2 = import_module("01_tokenizer"), import_module("02_data")
CourseError, END_OF_TEXT = chapter1.CourseError, chapter1.END_OF_TEXT
SPLITS = ("train", "val", "test")


def make_texts(count, words=60, seed=0):
    """Return `count` different texts of random words."""
    chooser = random.Random(seed)
    vocabulary = ["".join(chooser.choices("abcdeimnorstu", k=chooser.randint(1, 9))) for _ in range(300)]
    return [f"text {i}: " + " ".join(chooser.choices(vocabulary, k=words)) + "\n" for i in range(count)]


@pytest.fixture(scope="module")
def tokenizer():
    return chapter1.train_bpe(make_texts(50), 350)


@pytest.fixture
def root(tokenizer, tmp_path):
    """A root folder of the course in which chapter 1 has run on the folder texts/ of 60 files."""
    for i, text in enumerate(make_texts(60)):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{i:02}.txt").write_text(text, encoding="utf-8")
    save_as_chapter_1(tokenizer, tmp_path, [str(tmp_path / "texts")])
    return tmp_path


def save_as_chapter_1(tokenizer, out, source):
    tokenizer.save(out / "tokenizer")
    chapter1.write_json(out / "tokenizer" / "source.json", {"source": source, "fingerprint": tokenizer.fingerprint()})


def encode(documents, out, workers=1, dropped=()):
    """Encode (split, text) pairs with the tokenizer in `out`, to out/data."""
    return chapter2.encode_documents(documents, out / "tokenizer", out / "data", workers,
                                     {"source": ["made here"], "dropped": dropped})


def files_in(folder):
    """Return {name: bytes} of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(*flags, out):
    """Run the chapter in a process of its own; return its result."""
    return subprocess.run([sys.executable, str(ROOT / "02_data.py"), "--out", str(out), "--workers", "1", *map(str, flags)],
                          capture_output=True, text=True, encoding="utf-8", env={**os.environ, "PYTHONIOENCODING": "utf-8"})


def assert_one_error(result, *parts):
    """The run failed with status 1 and one line that holds all the parts."""
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error:"), lines
    for part in parts:
        assert part in lines[0], (part, lines[0])


def test_doctests():
    result = doctest.testmod(chapter2)
    assert result.failed == 0 and result.attempted > 0


# ---- Downloads -----------------------------------------------------------------------------------

def zipped(name, text):
    memory = BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, text)
    return memory.getvalue()


@pytest.fixture
def site(monkeypatch):
    """A web server on this machine; returns (its address, {path: (status, body, announced length)}, [paths asked for])."""
    pages, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            status, body, length = pages.get(self.path, (404, b"", 0))
            self.send_response(status)
            if length is not None:
                self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", pages, asked
    server.shutdown()
    server.server_close()
    thread.join()


BODY = b"once upon a time\n" * 100_000                         # 1.7 MB: more than one block


def table_of(url, body=BODY):
    return {"name": (url, hashlib.sha256(body).hexdigest(), "public domain")}


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json"])
def test_download_keeps_the_file_under_its_name(site, tmp_path, suffix, capsys):
    address, pages, asked = site
    pages["/input" + suffix] = 200, BODY, len(BODY)
    table = table_of(f"{address}/input{suffix}")
    path = chapter2.download("name", tmp_path / "new", table)
    assert path == tmp_path / "new" / f"name{suffix}" and path.read_bytes() == BODY
    assert files_in(tmp_path / "new").keys() == {path.name}
    printed = capsys.readouterr().out
    assert address in printed and "public domain" in printed and "MB/s" in printed and "\r" not in printed
    assert chapter2.download("name", tmp_path / "new", table) == path and len(asked) == 1     # not fetched again


def test_download_of_unannounced_length(site, tmp_path):
    address, pages, _ = site
    pages["/input.txt"] = 200, BODY, None
    assert chapter2.download("name", tmp_path, table_of(f"{address}/input.txt")).read_bytes() == BODY


def test_download_unpacks_a_zip(site, tmp_path):
    address, pages, _ = site
    body = zipped("name", BODY)
    pages["/name.zip"] = 200, body, len(body)
    path = chapter2.download("name", tmp_path, table_of(f"{address}/name.zip", body))
    assert path == tmp_path / "name.txt" and path.read_bytes() == BODY
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("page, why", [
    ((200, BODY[:-1] + b"x", len(BODY)), "sha256"),            # another text
    ((404, b"", 0), "404"),
    ((200, BODY[:1_000_000], len(BODY)), "1000000 of 1700000 bytes"),     # the connection broke
    ((200, b"", 0), "sha256"),
    (None, "refused")], ids=["wrong", "missing", "truncated", "empty", "no server"])
def test_a_failed_download_says_what_to_do_and_leaves_nothing(site, tmp_path, page, why):
    address, pages, _ = site
    url = f"{address}/input.txt" if page else "http://127.0.0.1:1/input.txt"
    pages["/input.txt"] = page
    with pytest.raises(CourseError) as caught:
        chapter2.download("name", tmp_path, table_of(url))
    message = str(caught.value)
    assert url in message and why in message and str(tmp_path / "name.txt") in message and "Python's own library" in message
    assert "\n" not in message and not list(tmp_path.iterdir())


def test_a_download_replaces_nothing_that_was_put_there_by_hand(tmp_path):
    (tmp_path / "name.txt").write_text("by hand", encoding="utf-8")
    path = chapter2.download("name", tmp_path, table_of("http://127.0.0.1:1/input.txt"))
    assert path.read_text(encoding="utf-8") == "by hand"


def test_the_table_of_downloads_is_well_formed():
    assert not chapter2.DOWNLOADS.keys() & chapter2.CONVERSATIONS.keys()
    for url, sha256, about in [*chapter2.DOWNLOADS.values(), *chapter2.CONVERSATIONS.values()]:
        assert url.startswith("https://") and len(sha256) == 64 and int(sha256, 16) and ("MB" in about or "GB" in about)


def test_conversations_are_no_text_to_learn_from(tmp_path):
    with pytest.raises(CourseError, match="06_finetune.py --conversations dolly"):
        chapter2.main(chapter2.Config(source=["dolly"], out=str(tmp_path)))


def test_a_download_and_then_chapter_1(tokenizer, tmp_path):
    """--source NAME: first the text, then the word to run chapter 1 on it, then the rest."""
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "shakespeare.txt").write_text("\n".join(make_texts(40)), encoding="utf-8")
    command = "python 01_tokenizer.py --source shakespeare"
    assert_one_error(run("--source", "shakespeare", out=tmp_path), command)
    save_as_chapter_1(tokenizer, tmp_path, ["shakespeare"])
    result = run("--source", "shakespeare", out=tmp_path)
    assert result.returncode == 0 and command not in result.stdout, result.stderr


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(terminal, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    items = [b"a" * 1_000_000] * 3
    assert list(chapter2.watched(iter(items), "read", 3_000_000)) == items
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "3.0 MB" in printed and "MB/s" in printed
    assert printed.count("\r") == (3 if terminal else 0)       # one line that is written over
    assert printed.count(" s left") == (2 if terminal else 0)


@pytest.mark.parametrize("metadata, licence", [
    ("License-Expression: MIT\n", "MIT"), ("License: BSD\n        and more\n", "BSD"),
    ("Classifier: Private\nClassifier: License :: OSI Approved :: Apache\nLicense-File: LICENSE\n", "Apache"),
    ("License: =====\nClassifier: License :: BSD\n", "BSD"), ("", "not stated")])
def test_packages_are_listed_with_their_licences(tmp_path, capsys, metadata, licence):
    folder = tmp_path / "thing-1.5.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: thing\nVersion: 1.5\n{metadata}", encoding="utf-8")
    chapter2.print_packages(str(tmp_path))
    first, line = capsys.readouterr().out.splitlines()
    assert "private" in first and line.startswith("  thing 1.5: ") and line.endswith(licence)


# ---- Cleaning ------------------------------------------------------------------------------------

def clean(*texts):
    """Return (cleaned texts, changed, dropped) of texts that are all in the train split."""
    changed, dropped = {}, Counter()
    return [text for _, text in chapter2.clean((("train", text) for text in texts), changed, dropped)], changed, dropped


@pytest.mark.parametrize("rule, before, after", [
    ("newlines", "a\r\nb\rc\n", "a\nb\nc\n"),
    ("control characters", "\ufeffa\x00b\x1b[0m\x7f\tc\x0c\n", "ab[0m\tc\x0c\n"),      # tab and form feed stay
    ("Unicode (NFC)", "cafe\u0301", "caf\u00e9")])
def test_rules(rule, before, after):
    end = " and some more text"
    assert chapter2.RULES[rule](before) == after
    texts, changed, _ = clean(before + end)
    assert texts == [after + end] and changed.keys() == {rule} and changed[rule][0] == 1


def test_clean_text_stays_as_it_is_letter_for_letter():
    text = "Polish and polish, True and true:\n\n\tA  b \u00e9 \u4f60\u597d \U0001f600 <|endoftext|> " + END_OF_TEXT
    texts, changed, dropped = clean(text)
    assert texts == [text] and not changed and not dropped


def test_cleaning_shows_the_place_it_changed_and_counts_documents():
    texts, changed, _ = clean("x" * 50 + "\r\n" + "y" * 50, "one line\r\nand another\r\n", "nothing to see here at all")
    assert changed == {"newlines": [2, "x" * 9 + "\r\n" + "y" * 7, "x" * 9 + "\n" + "y" * 8]} and len(texts) == 3


def test_duplicates_and_short_documents_are_dropped_and_counted():
    one, other = "the first document of all", "the second document of all"
    texts, _, dropped = clean(one, other, one, "too short", "", one.replace(" ", "\r\n"), one.replace(" ", "\n"),
                              " " * 50 + "short" + "\n" * 50)
    assert texts == [one, other, one.replace(" ", "\n")]       # equal after cleaning is equal
    assert dropped == {"duplicate": 2, "under 20 characters": 3}


def test_a_document_is_in_one_split_only():
    """A text held out never occurs in train, even if it came with other line ends."""
    texts = make_texts(300)
    both = [t for text in texts for t in (text, text.replace("\n", "\r\n"), text)]
    cleaned = list(chapter2.clean(chapter1.split_documents(both), {}, Counter()))
    assert sorted(text for _, text in cleaned) == sorted(texts)


# ---- Splits --------------------------------------------------------------------------------------

def test_splits_go_by_hash_whatever_the_order():
    texts = make_texts(4000, words=5)
    ordered = dict((text, split) for split, text in chapter1.split_documents(texts))
    shuffled = dict((text, split) for split, text in chapter1.split_documents(random.Random(1).sample(texts, len(texts))))
    assert ordered == shuffled
    shares = {split: 100 * n / 4000 for split, n in Counter(ordered.values()).items()}
    assert abs(shares["train"] - 85) < 2 and abs(shares["val"] - 5) < 1.5 and abs(shares["test"] - 10) < 2


@pytest.mark.parametrize("count", [1, 2, 19])
def test_few_documents_are_split_by_their_tail(count):
    texts = make_texts(count)
    parts = list(chapter1.split_documents(texts))
    assert "".join(text for _, text in parts) == "".join(texts)            # in order, nothing lost
    splits = [split for split, _ in parts]
    assert splits == sorted(splits) and set(splits) == {"train", "val"}    # first all of train, then all of val
    whole = len("".join(texts))
    assert sum(len(text) for split, text in parts if split == "train") == int(0.9 * whole)


# ---- Encoding ------------------------------------------------------------------------------------

def test_files_hold_the_documents_in_order_each_with_an_end(root, tokenizer):
    documents = list(chapter1.split_documents(make_texts(200)))
    totals = encode(documents, root)
    end = tokenizer.special_tokens[END_OF_TEXT]
    for split in SPLITS:
        texts = [text for s, text in documents if s == split]
        tokens, meta = chapter2.open_tokens(root / "data", split)
        assert tokens.tolist() == [i for text in texts for i in (*tokenizer.encode(text), end)]
        assert totals[split] == meta["splits"][split] == {
            "documents": len(texts), "tokens": len(tokens), "bytes": len("".join(texts).encode())}
    assert meta["fingerprint"] == tokenizer.fingerprint() and meta["source"] == ["made here"]


def test_text_never_becomes_a_separator(root, tokenizer):
    encode([("train", f"before {END_OF_TEXT} and after {END_OF_TEXT}")], root)
    tokens, _ = chapter2.open_tokens(root / "data", "train")
    assert tokens.tolist().count(tokenizer.special_tokens[END_OF_TEXT]) == 1


def test_the_result_does_not_depend_on_the_workers(root):
    documents = list(chapter1.split_documents(make_texts(700, words=700)))             # some 5 jobs
    assert len(list(chapter2.jobs_of(documents))) > 3
    written = []
    for workers in (1, 2, 3):
        encode(documents, root, workers)
        written.append(files_in(root / "data"))
    assert written[0] == written[1] == written[2] and written[0].keys() == {"meta.json", "train.bin", "val.bin", "test.bin"}


def test_jobs_are_all_documents_in_order_in_bounded_pieces():
    documents = [("train", "a" * n) for n in (1, 5, 100, 3, 7, 1, 1, 1)]
    jobs = list(chapter2.jobs_of(documents, size=10))
    assert [document for job in jobs for document in job] == documents
    assert all(sum(len(text) for _, text in job[:-1]) < 10 for job in jobs) and len(jobs) == 3


@pytest.mark.parametrize("end, dtype", [(2**16 - 1, "uint16"), (2**16, "uint32")])
def test_large_vocabularies_get_wider_integers(tokenizer, tmp_path, end, dtype):
    """The separator has the highest id: it must come back from the file."""
    data = json.loads(json.dumps(tokenizer.data))
    data["added_tokens"] = [{**data["added_tokens"][0], "id": end}]
    save_as_chapter_1(chapter1.Tokenizer(data), tmp_path, [])
    encode([("train", "the only document of all")], tmp_path)
    tokens, meta = chapter2.open_tokens(tmp_path / "data", "train")
    assert tokens.dtype == meta["dtype"] == dtype and tokens[-1] == end


def test_a_failure_in_the_middle_leaves_the_old_files_whole(root):
    encode([("train", text) for text in make_texts(20)], root)
    before = files_in(root / "data")

    def documents():
        yield from (("train", text) for text in make_texts(300, words=1000, seed=1))
        raise CourseError("the disk is gone")

    for workers in (1, 2):
        with pytest.raises(CourseError, match="the disk is gone"):
            encode(documents(), root, workers)
        assert files_in(root / "data") == before                # nor is anything left beside them


KILLED = """
import os, signal, sys
from importlib import import_module
from pathlib import Path
chapter2 = import_module("02_data")
def documents():
    for i in range(4):
        yield "train", f"document {i}: " + "some words that take their time " * 20_000
    print("half way", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
out = Path(sys.argv[1])
chapter2.encode_documents(documents(), out / "tokenizer", out / "data", 1, {"source": [], "dropped": {}})
"""


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_kill_in_the_middle_leaves_the_old_files_whole(root):
    encode([("train", text) for text in make_texts(20)], root)
    before = files_in(root / "data")
    result = subprocess.run([sys.executable, "-c", KILLED, str(root)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == -9 and "half way" in result.stdout, result.stderr
    after = files_in(root / "data")
    assert {name: after[name] for name in before} == before
    encode([("train", text) for text in make_texts(30)], root)  # and the next run is not disturbed
    assert len(chapter2.open_tokens(root / "data", "train")[0]) > 0


FAILING = """
import sys
from importlib import import_module
from pathlib import Path
chapter2 = import_module("02_data")
out = Path(sys.argv[1])
documents = (("train", f"z {i} " + "some words " * 50_000) for i in range(40))
try:
    chapter2.encode_documents(documents, out / "tokenizer", out / "data", 2, {"source": [], "dropped": {}})
except chapter2.CourseError as error:
    print(error)
"""


def test_an_error_in_a_worker_ends_the_run(tokenizer, tmp_path):
    """Even while more jobs wait than there are workers: it must not hang."""
    data = json.loads(json.dumps(tokenizer.data))
    data["model"]["merges"] = []
    data["model"]["vocab"] = {token: i for token, i in data["model"]["vocab"].items() if i < 256 and token != "z"}
    save_as_chapter_1(chapter1.Tokenizer(data), tmp_path, [])
    result = subprocess.run([sys.executable, "-c", FAILING, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "no token for the byte" in result.stdout, result.stderr
    assert not list((tmp_path / "data").iterdir())


def test_nothing_to_train_on_leaves_the_old_files_whole(root):
    encode([("train", text) for text in make_texts(20)], root)
    before = files_in(root / "data")
    with pytest.raises(CourseError, match="made here.*3"):
        encode([("val", "held out text alone")], root, dropped={"too short": 3})
    assert files_in(root / "data") == before


# ---- Opening the files ---------------------------------------------------------------------------

def test_tokens_are_mapped_not_read(root):
    encode([("train", text) for text in make_texts(20)], root)
    tokens, _ = chapter2.open_tokens(root / "data", "train")
    assert isinstance(tokens, np.memmap)
    empty, _ = chapter2.open_tokens(root / "data", "test")
    assert len(empty) == 0


@pytest.mark.parametrize("name, content", [
    ("train.bin", b"\0\0"), ("train.bin", b"\0\0\0"), ("train.bin", b""), ("train.bin", None), ("meta.json", None),
    ("meta.json", b"{"), ("meta.json", b"{}"), ("meta.json", b"[]"), ("meta.json", b'{"splits": {"train": 3}}')])
def test_damaged_files_are_one_clear_error(root, name, content):
    encode([("train", text) for text in make_texts(20)], root)
    path = root / "data" / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(CourseError, match="02_data.py"):
        chapter2.open_tokens(root / "data", "train")


# ---- Batches -------------------------------------------------------------------------------------

TOKENS = np.arange(1000, 1000 + 10 * 24 + 7, dtype=np.uint16)  # 24 blocks of 10, a rest of 6 and the last target


def test_targets_are_the_inputs_moved_by_one():
    for step in range(20):
        x, y = chapter2.get_batch(TOKENS, step, B=5, T=10, seed=3)
        assert x.shape == y.shape == (5, 10) and x.dtype == y.dtype == np.int64
        assert (x[:, 1:] == y[:, :-1]).all()
        assert (y == x + 1).all()                              # TOKENS counts up, so that is the next token


@pytest.mark.parametrize("B", [1, 5, 8, 24, 50])
def test_each_block_comes_once_an_epoch(B):
    starts = [row[0] for step in range(5 * 24) for row in chapter2.get_batch(TOKENS, step, B, 10)[0].tolist()]
    blocks = list(range(1000, 1240, 10))
    epochs = [starts[i:i + 24] for i in range(0, 24 * (len(starts) // 24), 24)]
    assert all(sorted(epoch) == blocks for epoch in epochs)
    assert len(set(map(tuple, epochs[:5]))) == 5 and blocks not in epochs[:5]         # each in an order of its own


def test_batches_depend_on_seed_and_step_alone():
    first = [chapter2.get_batch(TOKENS, step, 4, 10, seed=1)[0] for step in range(12)]
    chapter2.block_order.cache_clear()                         # nothing is kept from one call to the next
    again = [chapter2.get_batch(TOKENS, step, 4, 10, seed=1)[0] for step in reversed(range(12))][::-1]
    other = [chapter2.get_batch(TOKENS, step, 4, 10, seed=2)[0] for step in range(12)]
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert np.array_equal(np.concatenate(first), np.concatenate(           # the size of a batch only cuts the same order
        [chapter2.get_batch(TOKENS, step, 8, 10, seed=1)[0] for step in range(6)]))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_the_blocks_of_an_epoch(world):
    """Rank r takes the rows r, r + world, ... of every batch (chapter 4)."""
    seen = [[row[0] for step in range(2) for row in chapter2.get_batch(TOKENS, step, 12, 10)[0][rank::world].tolist()]
            for rank in range(world)]
    assert sum(map(len, seen)) == len(set().union(*seen)) == 24


def test_a_split_of_one_block_is_enough_and_one_less_is_an_error():
    x, y = chapter2.get_batch(np.arange(11), 0, 3, 10)
    assert x.tolist() == [list(range(10))] * 3 and y[0].tolist() == list(range(1, 11))
    for tokens in (np.arange(10), np.zeros(0, np.uint16)):
        with pytest.raises(CourseError, match=rf"\b{len(tokens)} tokens.*context of 10\b"):
            chapter2.get_batch(tokens, 0, 3, 10)


def test_sizes_of_tokens_add_up_to_the_text(tokenizer):
    text, end = make_texts(1)[0], tokenizer.special_tokens[END_OF_TEXT]
    sizes = chapter2.token_sizes(tokenizer, tokenizer.vocab_size + 9)
    assert sizes.shape == (tokenizer.vocab_size + 9,) and sizes[end] == 0 == sizes[-9:].sum()
    assert sizes[tokenizer.encode(text) + [end]].sum() == len(text.encode())


# ---- The script ----------------------------------------------------------------------------------

def main(root, *source, **settings):
    chapter2.main(chapter2.Config(source=list(map(str, source)), out=str(root), workers=1, **settings))


def test_the_script_from_files_to_batches(root, tokenizer, capsys):
    texts = make_texts(60)
    (root / "texts" / "60.txt").write_bytes(texts[0].replace("\n", "\r\n").encode())  # a duplicate with other line ends
    (root / "texts" / "61.txt").write_bytes(b"caf\xe9 is not UTF-8 in this file of one line")
    (root / "texts" / "62.txt").write_text("short", encoding="utf-8")
    (root / "texts" / "63.jsonl").write_text('{"text": "a line of JSON with a text"}\n', encoding="utf-8")
    main(root)
    printed = capsys.readouterr().out
    meta = json.loads((root / "data" / "meta.json").read_text(encoding="utf-8"))
    assert meta["dropped"] == {"not UTF-8": 1, "duplicate": 1, "under 20 characters": 1} and meta["source"] == [str(root / "texts")]
    held = [tokenizer.decode(chapter2.open_tokens(root / "data", split)[0].tolist()) for split in SPLITS]
    found = [text for split in held for text in split.split(END_OF_TEXT)[:-1]]
    assert sorted(found) == sorted([*texts, "a line of JSON with a text"])
    for part in ("1 not UTF-8", "1 duplicate", "1 under 20 characters", "newlines", "\\r\\n", "documents", "MB/s"):
        assert part in printed, part
    assert "\r" not in printed and "\x1b" not in printed       # not a terminal
    lines = [line[10:].split("|") for line in printed.splitlines() if line.startswith(("input  x", "target y"))]
    assert len(lines) == 4 and all(len(row) == 16 for row in lines)
    assert lines[0][1:] == lines[1][:-1] and lines[2][1:] == lines[3][:-1]
    assert (root / "data" / "statistics.png").read_bytes().startswith(b"\x89PNG")
    assert files_in(root / "data").keys() == {"train.bin", "val.bin", "test.bin", "meta.json", "statistics.png"}


@pytest.mark.parametrize("text", ["just enough letters, yes", "a text of a few lines, with é\n" * 30])
def test_a_small_text_without_a_test_split_works(root, text, capsys):
    (root / "small.txt").write_text(text, encoding="utf-8")
    main(root, root / "small.txt")
    _, meta = chapter2.open_tokens(root / "data", "train")
    assert meta["splits"]["train"]["documents"] == 1 and meta["splits"]["test"]["tokens"] == 0
    assert "the tokenizer learnt from" in capsys.readouterr().out


def test_another_source_than_the_tokenizers_is_said_in_one_line(root, capsys):
    main(root)
    assert "learnt from" not in capsys.readouterr().out
    main(root, root / "texts" / "*1.txt")
    lines = [line for line in capsys.readouterr().out.splitlines() if "learnt from" in line]
    assert len(lines) == 1 and "python 01_tokenizer.py --source" in lines[0] and "*1.txt" in lines[0]


def test_the_order_of_the_sources_does_not_change_the_splits(root):
    kept = []
    for source in (("0", "1", "2", "3", "4", "5"), ("5", "3", "1", "0", "2", "4")):
        main(root, *(root / "texts" / f"{first}*.txt" for first in source))
        tokens = [chapter2.open_tokens(root / "data", split)[0].tolist() for split in SPLITS]
        kept.append([sorted(Counter(part).items()) for part in tokens])
    assert kept[0] == kept[1]


def test_another_tokenizer_takes_the_place_of_chapter_1s(root, tokenizer, capsys):
    other = chapter1.train_bpe(make_texts(50, seed=7), 300)
    other.save(root / "theirs")
    for out in (root, root / "fresh"):                         # with and without one of chapter 1
        main(out, root / "texts", tokenizer=str(root / "theirs"))
        meta = json.loads((out / "data" / "meta.json").read_text(encoding="utf-8"))
        source = json.loads((out / "tokenizer" / "source.json").read_text(encoding="utf-8"))
        assert meta["fingerprint"] == source["fingerprint"] == other.fingerprint() != tokenizer.fingerprint()
        assert chapter1.Tokenizer.load(out / "tokenizer").fingerprint() == other.fingerprint()
        assert source["source"] == [str(root / "texts")] and "learnt from" not in capsys.readouterr().out
        tokens, _ = chapter2.open_tokens(out / "data", "train")
        assert tokens.max() < other.vocab_size
    main(root / "fresh", tokenizer=str(root / "theirs"))       # the text of the run before, not Python's library
    meta = json.loads((root / "fresh" / "data" / "meta.json").read_text(encoding="utf-8"))
    assert meta["source"] == [str(root / "texts")]
    main(root / "fresh")                                       # the next run goes on with it


def test_bad_tokenizers_are_one_line(root, tokenizer):
    data = json.loads(json.dumps(tokenizer.data))
    data["added_tokens"] = data["added_tokens"][1:]
    chapter1.Tokenizer(data).save(root / "endless")
    before = files_in(root / "tokenizer")
    assert_one_error(run("--tokenizer", root / "endless", out=root), "endless", END_OF_TEXT)
    assert_one_error(run("--tokenizer", root / "nowhere", out=root), "nowhere")
    assert files_in(root / "tokenizer") == before


def test_bad_sources_are_one_line(root):
    (root / "empty.txt").write_text("", encoding="utf-8")
    (root / "short.txt").write_text("short", encoding="utf-8")
    (root / "bad.jsonl").write_text("{", encoding="utf-8")
    assert_one_error(run("--source", root / "empty.txt", out=root), "empty.txt", "nothing to train on")
    assert_one_error(run("--source", root / "short.txt", out=root), "short.txt", "under 20 characters")
    assert_one_error(run("--source", root / "bad.jsonl", out=root), "bad.jsonl")
    assert_one_error(run("--source", root / "nowhere", out=root), "nowhere")
    assert_one_error(run(out=root / "new"), "01_tokenizer.py")
    assert not (root / "data").exists() or not list((root / "data").iterdir())


def test_bad_flags_exit_with_2(root):
    for flags in (["--no-such-flag"], ["--workers", "many"], ["--sourc", "x"]):
        assert run(*flags, out=root).returncode == 2
