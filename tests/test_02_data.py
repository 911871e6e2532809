"""Chapter 2: cleaning, encoding, batches, the script, downloads."""
import doctest
import hashlib
import http.server
import json
import random
import subprocess
import sys
import threading
from collections import Counter
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
chapter1, chapter2 = import_module("01_tokenizer"), import_module("02_data")
CourseError, END_OF_TEXT, SPLITS = chapter1.CourseError, chapter1.END_OF_TEXT, chapter2.SPLITS


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
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(make_texts(60)):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(text, encoding="utf-8")
    tokenizer.save(tmp_path / "tokenizer")
    chapter1.write_json(tmp_path / "tokenizer" / "source.json", [str(tmp_path / "texts")])
    return tmp_path


def encode(documents, out):
    return chapter2.write_tokens(documents, chapter1.Tokenizer.load(out / "tokenizer"), out / "data")


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def main(root, *source, **settings):
    chapter2.main(chapter2.Config(source=list(map(str, source)), out=str(root), **settings))


def test_doctests():
    result = doctest.testmod(chapter2)
    assert result.failed == 0 and result.attempted > 0


# ---- Cleaning
def clean(*texts):
    changed, dropped = Counter(), Counter()
    cleaned = chapter2.clean((("train", text) for text in texts), changed, dropped)
    return [text for _, text in cleaned], changed, dropped


@pytest.mark.parametrize("before, after", [
    ("a\r\nb\rc\n", "a\nb\nc\n"), ("cafe\u0301", "caf\u00e9"),
    ("\ufeffa\x00b\x1b[0m\x7f\tc\x0c\n", "ab[0m\tc\x0c\n")])   # tab and form feed stay
def test_each_rule_mends_and_is_counted(before, after):
    text = " and some more text"
    cleaned, changed, dropped = clean(before + text, text + before, "nothing to see here at all")
    assert cleaned == [after + text, text + after, "nothing to see here at all"]
    assert [*changed.values()] == [2] and not dropped          # by one rule, in two documents
    good = "Polish and polish, True and true:\n\n\tA  b \u00e9 \u4f60\u597d \U0001f600 <|endoftext|> " + END_OF_TEXT
    assert clean(good) == ([good], {}, {})                     # stays as it is, letter for letter


def test_duplicates_and_short_documents_are_dropped_and_counted():
    one, other = "the first document of all", "the second document of all"
    texts, _, dropped = clean(one, other, one, "too short", "", one.replace(" ", "\r\n"), one.replace(" ", "\n"), " " * 50 + "short" + "\n" * 50)
    assert texts == [one, other, one.replace(" ", "\n")]       # equal after cleaning is equal
    assert sorted(dropped.values()) == [2, 3] and dropped["duplicate"] == 2
    texts = make_texts(300)                                    # in one split only, even if there are copies with other line ends
    copies = chapter1.split_documents([copy for text in texts for copy in (text, text.replace("\n", "\r\n"))])
    cleaned = list(chapter2.clean(copies, Counter(), Counter()))
    assert sorted(text for _, text in cleaned) == sorted(texts) and {split for split, _ in cleaned} == set(SPLITS)


# ---- Encoding
def test_files_hold_the_documents_in_order_each_with_an_end(root, tokenizer):
    documents = list(chapter1.split_documents(make_texts(200)))
    totals = encode(documents, root)
    end = tokenizer.special_tokens[END_OF_TEXT]
    for split in SPLITS:
        texts = [text for s, text in documents if s == split]
        tokens, meta = chapter2.open_tokens(root / "data", split)
        assert tokens.tolist() == [i for text in texts for i in (*tokenizer.encode(text), end)]
        assert totals[split] == meta["splits"][split] == {"documents": len(texts), "tokens": len(tokens), "bytes": len("".join(texts).encode())}
    assert meta["fingerprint"] == tokenizer.fingerprint()
    encode([("train", f"before {END_OF_TEXT} and after {END_OF_TEXT}")], root)         # text never becomes a separator
    assert chapter2.open_tokens(root / "data", "train")[0].tolist().count(end) == 1


@pytest.mark.parametrize("end, dtype", [(2**16 - 1, "uint16"), (2**16, "uint32")])
def test_large_vocabularies_get_wider_integers(tokenizer, tmp_path, end, dtype):
    data = {**tokenizer.data, "added_tokens": [chapter1.special_json(END_OF_TEXT, end)]}
    chapter1.read_tokenizer(data).save(tmp_path / "tokenizer")
    encode([("train", "the only document of all")], tmp_path)
    tokens, meta = chapter2.open_tokens(tmp_path / "data", "train")
    assert tokens.dtype == meta["dtype"] == dtype and tokens[-1] == end


def test_an_encoding_that_dies_leaves_no_meta_json(root):
    """So nobody trains on half of the text."""
    def failing():
        yield from (("train", text) for text in make_texts(1100, seed=1))
        assert (root / "data" / "train.bin").exists() and not (root / "data" / "meta.json").exists()   # were it killed here
        raise CourseError("the disk is gone")

    for documents, why in ((failing(), "the disk is gone"), ([("val", "held out")], "nothing to train on")):
        encode([("train", text) for text in make_texts(20)], root)
        with pytest.raises(CourseError, match=why):
            encode(documents, root)
        with pytest.raises(CourseError, match="02_data.py"):
            chapter2.open_tokens(root / "data", "train")


@pytest.mark.parametrize("name, content, why", [
    ("train.bin", None, "train.bin"), *[("train.bin", content, None) for content in (b"", b"\0\0", b"\0\0\0")],
    *[("meta.json", content, "02_data.py") for content in (None, b"{")],
    *[("meta.json", content, None) for content in (b"{}", b"[]", b'{"splits": {"train": 3}}')]])
def test_damaged_files_are_an_error(root, name, content, why):
    encode([("train", text) for text in make_texts(20)], root)
    assert isinstance(chapter2.open_tokens(root / "data", "train")[0], np.memmap)      # mapped, not read
    path = root / "data" / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises((OSError, ValueError, LookupError, TypeError), match=why):
        chapter2.open_tokens(root / "data", "train")


# ---- Batches
TOKENS = np.arange(1000, 1000 + 10 * 24 + 7, dtype=np.uint16)  # 24 sequences of 10, a rest of 6 and the last target


def test_targets_are_the_inputs_moved_by_one():
    x, y = chapter2.get_batch(np.arange(11), 0, B=3, T=10)     # one sequence is enough, one token less is an error
    assert x.tolist() == [list(range(10))] * 3 and y.tolist() == [list(range(1, 11))] * 3
    for tokens in (np.arange(10), np.zeros(0, np.uint16)):
        with pytest.raises(CourseError, match=rf"\b{len(tokens)} tokens.*context of 10\b.*--context"):
            chapter2.get_batch(tokens, 0, B=3, T=10)
    for step in range(20):
        x, y = chapter2.get_batch(TOKENS, step, B=5, T=10, seed=3)
        assert x.shape == y.shape == (5, 10) and x.dtype == y.dtype == np.int64
        assert (x[:, 1:] == y[:, :-1]).all() and (y == x + 1).all()        # TOKENS counts up


@pytest.mark.parametrize("B", [1, 5, 8, 24, 50])
def test_each_sequence_comes_once_an_epoch(B):
    starts = [row[0] for step in range(5 * 24) for row in chapter2.get_batch(TOKENS, step, B, 10)[0].tolist()]
    in_order = list(range(1000, 1240, 10))
    epochs = [starts[i:i + 24] for i in range(0, 24 * (len(starts) // 24), 24)]
    assert all(sorted(epoch) == in_order for epoch in epochs)
    assert len(set(map(tuple, epochs[:5]))) == 5 and in_order not in epochs[:5]        # each in an order of its own


def test_batches_depend_on_seed_and_step_alone():
    first = [chapter2.get_batch(TOKENS, step, 4, 10, seed=1)[0] for step in range(12)]
    chapter2.sequence_order.cache_clear()                      # nothing is kept from one call to the next
    again = [chapter2.get_batch(TOKENS, step, 4, 10, seed=1)[0] for step in reversed(range(12))][::-1]
    other = [chapter2.get_batch(TOKENS, step, 4, 10, seed=2)[0] for step in range(12)]
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    larger = [chapter2.get_batch(TOKENS, step, 8, 10, seed=1)[0] for step in range(6)]
    assert np.array_equal(np.concatenate(first), np.concatenate(larger))               # a batch only cuts the same order


def test_sizes_of_tokens_add_up_to_the_text(tokenizer):
    text, end = make_texts(1)[0], tokenizer.special_tokens[END_OF_TEXT]
    sizes = chapter2.token_sizes(tokenizer, tokenizer.vocab_size + 9)
    assert sizes.shape == (tokenizer.vocab_size + 9,) and sizes[end] == 0 == sizes[-9:].sum()
    assert sizes[tokenizer.encode(text) + [end]].sum() == len(text.encode())


# ---- The script
def test_the_script_from_files_to_batches(root, tokenizer, capsys):
    texts = make_texts(60)
    (root / "texts" / "60.txt").write_bytes(texts[0].replace("\n", "\r\n").encode())   # a duplicate with other line ends
    (root / "texts" / "61.txt").write_bytes(b"caf\xe9 is not UTF-8 in this file of one line")
    (root / "texts" / "62.txt").write_text("short", encoding="utf-8")
    (root / "texts" / "63.jsonl").write_text('{"text": "a line of JSON with a text"}\n', encoding="utf-8")
    main(root)
    printed, errors = capsys.readouterr()
    held = [tokenizer.decode(chapter2.open_tokens(root / "data", split)[0].tolist()) for split in SPLITS]
    found = [text for split in held for text in split.split(END_OF_TEXT)[:-1]]
    assert sorted(found) == sorted([*texts, "a line of JSON with a text"])
    assert "'duplicate': 1" in printed and "'too short': 1" in printed and "61.txt" in errors
    assert "\r" not in printed and "\x1b" not in printed       # not a terminal
    shown = printed.replace(END_OF_TEXT, "END").splitlines()
    lines = [line[10:].split("|") for line in shown if line.startswith(("input  x", "target y"))]
    assert len(lines) == 4 and all(len(row) == 16 for row in lines)
    assert lines[0][1:] == lines[1][:-1] and lines[2][1:] == lines[3][:-1]
    assert (root / "data" / "statistics.png").read_bytes().startswith(b"\x89PNG")
    assert files_in(root / "data").keys() == {"train.bin", "val.bin", "test.bin", "meta.json", "statistics.png"}


def test_a_small_text_without_a_test_split_works(root, tokenizer):
    (root / "small.txt").write_text("just enough letters, yes", encoding="utf-8")
    main(root, root / "small.txt")
    assert [len(chapter2.open_tokens(root / "data", split)[0]) > 0 for split in SPLITS] == [True, False, False]
    chapter2.draw_statistics(np.arange(40), tokenizer, root / "figure.png")            # the middle of a long document: no end
    assert (root / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_another_tokenizer_takes_the_place_of_chapter_1s(root, tokenizer):
    other = chapter1.train_bpe(make_texts(50, seed=7), 300, special_tokens=["</s>"])
    other.save(root / "theirs")
    sizes = []
    for out, source, theirs in ((root, [root / "texts"], "theirs"), (root / "fresh", [root / "texts"], "theirs"), (root / "fresh", [], "")):
        main(out, *source, tokenizer=theirs and str(root / theirs))        # the third goes on with what the second used
        tokens, meta = chapter2.open_tokens(out / "data", "train")
        assert meta["fingerprint"] == chapter1.Tokenizer.load(out / "tokenizer").fingerprint() == other.fingerprint()
        assert tokens[-1] == tokens.max() == other.special_tokens["</s>"]
        sizes.append(meta["splits"])
    assert sizes[0] == sizes[1] == sizes[2]


def test_chapter_1s_source_is_looked_for_in_the_working_folder(root, monkeypatch, capsys):
    (root / "elsewhere").mkdir()
    monkeypatch.chdir(root)
    chapter1.main(chapter1.Config(source=["texts"], vocab_size=300, out="my folder"))
    main("my folder")
    assert "next: python 03_model.py --out 'my folder'" in capsys.readouterr().out
    monkeypatch.chdir(root / "elsewhere")
    with pytest.raises(CourseError, match="--source texts .*elsewhere"):
        main("../my folder")
    main("../my folder", "../texts", tokenizer="../my folder/tokenizer")       # a source of chapter 2's own is kept, too
    main("../my folder")


def test_bad_input(root, tokenizer):
    (root / "short.txt").write_text("short", encoding="utf-8")
    before = files_in(root / "tokenizer")
    for name, source in (("nowhere", "short.txt"), ("", "nowhere")):
        with pytest.raises(CourseError, match=name or source):
            main(root, root / source, tokenizer=name and str(root / name))
    assert files_in(root / "tokenizer") == before
    with pytest.raises(CourseError, match="01_tokenizer.py"):
        main(root / "new")
    words = [sys.executable, str(ROOT / "02_data.py"), "--out", str(root), "--source", str(root / "short.txt")]
    short, unknown = [subprocess.run([*words, *more], capture_output=True, text=True) for more in ([], ["--nonsense"])]
    assert short.returncode == 1 and len(short.stderr.splitlines()) == 1 and short.stderr.startswith("error: ")
    assert unknown.returncode == 2 and not (root / "data" / "meta.json").exists()


# ---- Downloads
@pytest.fixture
def site(monkeypatch):
    """A web server on this machine: (its address, {path: (status, body, announced length)})."""
    pages = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, body, length = pages.get(self.path, (404, b"", 0))
            self.send_response(status)
            if length is not None:
                self.send_header("Transfer-Encoding" if length == "chunked" else "Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        log_message = lambda *_: None

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", pages
        server.shutdown()


BODY = b"once upon a time\n" * 100_000                         # 1.7 MB: more than is read at once
SHA256 = hashlib.sha256(BODY).hexdigest()


@pytest.mark.parametrize("length", [len(BODY), None])
def test_a_download_keeps_the_file_under_its_name(site, tmp_path, length, capsys, monkeypatch):
    address, pages = site
    pages["/input.txt"] = 200, BODY, length
    monkeypatch.setitem(chapter2.DOWNLOADS, "name", (f"{address}/input.txt", SHA256, "public domain"))
    path = chapter2.download("name", tmp_path / "new")
    assert path == tmp_path / "new" / "name.txt" and files_in(tmp_path / "new") == {"name.txt": BODY}
    printed = capsys.readouterr().out
    assert address in printed and "public domain" in printed and "\r" not in printed
    path.write_text("put there by hand", encoding="utf-8")
    assert chapter2.download("name", tmp_path / "new") == path                  # not fetched again
    assert path.read_text(encoding="utf-8") == "put there by hand"


@pytest.mark.parametrize("page, why", [
    ((200, BODY[:-1] + b"x", len(BODY)), "sha256"), ((404, b"", 0), "404"), ((200, BODY[:1_000_000], len(BODY)), ""), ((200, b"", 0), "sha256"),
    ((200, b"ffff\r\nonce", "chunked"), "IncompleteRead"), (None, "refused")], ids=["wrong", "missing", "cut off", "empty", "cut in a chunk", "no server"])
def test_a_failed_download_says_what_to_do_and_leaves_nothing(site, tmp_path, page, why, monkeypatch):
    address, pages = site
    pages["/input.txt"] = page
    url = f"{address}/input.txt" if page else "http://127.0.0.1:1/input.txt"
    monkeypatch.setitem(chapter2.DOWNLOADS, "name", (url, SHA256, ""))
    with pytest.raises(CourseError) as caught:
        chapter2.download("name", tmp_path)
    message = str(caught.value)
    assert url in message and why in message and str(tmp_path / "name.txt") in message
    assert "\n" not in message and not list(tmp_path.iterdir())


def test_a_download_and_then_chapter_1(tokenizer, tmp_path):
    """--source NAME: first the text, then the word to run chapter 1 on it, then the rest."""
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "shakespeare.txt").write_text("\n".join(make_texts(40)), encoding="utf-8")
    with pytest.raises(CourseError, match="python 01_tokenizer.py --out .* --source shakespeare"):
        main(tmp_path, "shakespeare")
    tokenizer.save(tmp_path / "tokenizer")
    chapter1.write_json(tmp_path / "tokenizer" / "source.json", ["shakespeare"])
    main(tmp_path, "shakespeare")
    assert len(chapter2.open_tokens(tmp_path / "data", "train")[0]) > 1000
    for url, sha256, about in chapter2.DOWNLOADS.values():
        assert url.startswith("https://") and len(sha256) == 64 and int(sha256, 16) and "B, " in about


# ---- Conversations
def say(*texts, roles=("user", "assistant")):
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


PAIRS = [{"instruction": "Who are you?", "output": "A small model."}, {"messages": say("Sing!", "La \u2028 la.")},
         {"messages": [{"role": "system", "content": "Be kind."}, *say("Bye.", "See you.")]},
         {"instruction": "q", "context": "more", "response": "a"}, {"instruction": "q", "input": "", "output": "ä"}]


def test_conversations_are_read_from_a_file_or_a_download(tmp_path):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in PAIRS)
    for name in ("mine.jsonl", "dolly.jsonl"):
        (tmp_path / name).write_text(lines, encoding="utf-8")
    read = chapter2.open_conversations(str(tmp_path / "mine.jsonl"), tmp_path / "downloads")
    assert [messages[-1]["content"] for messages in read] == ["A small model.", "La \u2028 la.", "See you.", "a", "ä"]
    assert [message["role"] for message in read[2]] == ["system", "user", "assistant"]
    assert [messages[0]["content"].strip() for messages in read[3:]] == ["q\n\nmore", "q"]
    assert chapter2.open_conversations("dolly", tmp_path) == read
    (tmp_path / "empty").touch()
    for name in ("empty", "missing"):
        with pytest.raises((CourseError, OSError), match=name):
            chapter2.open_conversations(str(tmp_path / name), tmp_path)


@pytest.mark.parametrize("bad", [
    "not json", b"\xff", [1, 2], {"instruction": "q"}, {"instruction": "q", "output": ""}, {"messages": []}, {"messages": say("x")},
    {"messages": say("x", "y", roles=("robot", "assistant"))}, {"messages": say("x", "y", roles=("user", "user"))},
    {"messages": say("x", roles=("system",) * 2)}, {"messages": say(" ", "y")}, {"messages": say(None, "y")}, {"messages": [{"role": "user"}]}])
def test_a_bad_line_is_named(bad, tmp_path):
    good = json.dumps(PAIRS[0]).encode()
    bad = bad if isinstance(bad, bytes) else json.dumps(bad).encode()[1 if bad == "not json" else 0:]
    (tmp_path / "mine.jsonl").write_bytes(b"\n".join([good, bad, good]))
    with pytest.raises(CourseError, match="line 2"):
        chapter2.open_conversations(str(tmp_path / "mine.jsonl"), tmp_path)
