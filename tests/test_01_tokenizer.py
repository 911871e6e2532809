"""Chapter 1: two trainers that agree, lossless encoding, special tokens, files of other makers, sources, flags."""
import doctest
import os
import random
import subprocess
import sys
import unicodedata
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import pytest
import regex
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
chapter1 = import_module("01_tokenizer")
CourseError, Tokenizer, train_bpe = chapter1.CourseError, chapter1.Tokenizer, chapter1.train_bpe
TEXT = "def add(a, b):\n    return a + b\n\nThe café costs 1234 €, naïve 😀 users say. " * 5
LETTERS = "abcdefghij ABC 0123456789\n\n\t   .,;'\"()é€ßñЖдא漢字😀👍🏽\u200d\u0301\x00"


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([TEXT], 310)


def encode_by_definition(tokenizer, text, pattern=chapter1.PATTERN):
    """Return the ids by the plainest rule: every merge in order, over the bytes of every chunk."""
    ids = []
    for chunk in regex.findall(pattern, text):
        part = [tokenizer.tokens[bytes([byte])] for byte in chunk.encode()]
        for left, right in tokenizer.merges:
            pair = tokenizer.tokens[left], tokenizer.tokens[right]
            part = chapter1.merge(part, pair, tokenizer.tokens[left + right])
        ids += part
    return ids


def test_doctests():
    result = doctest.testmod(chapter1)
    assert result.attempted > 0 and result.failed == 0


# ---- Training
@pytest.mark.parametrize("alphabet", ["a", "ab", "ab ", "abc é\n", "aab'1. "])
def test_the_fast_trainer_equals_the_naive_one(alphabet):
    chooser = random.Random(alphabet)
    for _ in range(60):
        chunks = {}
        for _ in range(chooser.randint(1, 12)):                # few letters: many ties, many runs like "aaaa"
            chunks["".join(chooser.choices(alphabet, k=chooser.randint(0, 30)))] = chooser.randint(1, 5)
        how_many = chooser.randint(0, 40)
        merges = chapter1.learn_merges(chunks, how_many)
        assert merges == chapter1.learn_merges_naive(chunks, how_many)
        data = chapter1.tokenizer_json(merges, chapter1.PATTERN, [])
        assert len(chapter1.read_tokenizer(data).tokens) == 256 + len(merges)            # no two merges make the same token


def test_ties_go_to_the_lowest_ids_and_a_tiny_corpus_stops_early():
    assert train_bpe(["dc", "ba", "dc", "ba"], 258, special_tokens=()).merges == [(b"b", b"a"), (b"d", b"c")]
    parts = [TEXT[i:i + 40] for i in range(0, len(TEXT), 40)]
    assert train_bpe(parts, 300).data == train_bpe(parts[::-1], 300).data
    for texts, learnt in (([], 0), ([""], 0), (["a"], 0), (["aa"], 1), (["aaaa"], 2), (["aaaa", "aa"], 2)):
        small = train_bpe(texts, 1000)
        assert len(small.merges) == learnt and small.vocab_size == 256 + learnt + 3


# ---- Encoding and decoding
def test_encoding_is_what_the_definition_says(tokenizer):
    chooser = random.Random(1)
    for _ in range(200):
        text = "".join(chooser.choices(LETTERS, k=chooser.randint(0, 40))) + TEXT[chooser.randint(0, 60):][:30]
        assert tokenizer.encode(text) == encode_by_definition(tokenizer, text)
    longer = train_bpe(["".join(chooser.choices("abc", k=3000)), "a" * 500], 330)
    for text in ("".join(chooser.choices("abc", k=4000)), "a" * 4000, "\0" * 4000):     # without a space
        assert longer.encode(text) == encode_by_definition(longer, text)


def test_text_comes_back_and_any_ids_are_some_text(tokenizer):
    chooser = random.Random(3)
    for _ in range(3000):
        text = "".join(chooser.choices(LETTERS, k=chooser.randint(0, 20)))
        assert tokenizer.decode(tokenizer.encode(text)) == text
        ids = chooser.choices(range(tokenizer.vocab_size), k=9)
        assert tokenizer.decode(ids) == tokenizer.decode_bytes(ids).decode("utf-8", "replace")
    assert tokenizer.decode([0xff, 0xc3, ord("a")]) == "\ufffd\ufffda"     # not UTF-8
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"         # half of a pair of UTF-16


def test_special_tokens_are_never_made_of_text(tokenizer):
    assert tokenizer.decode([tokenizer.end]) == chapter1.END_OF_TEXT and tokenizer.start is None
    assert [*tokenizer.special_tokens.values()] == [307, 308, 309] and tokenizer.vocab_size == 310
    for one in (tokenizer, train_bpe([" ".join(tokenizer.special_tokens) * 50], 500)):     # one learnt from nothing else
        for text, i in one.special_tokens.items():
            ids = one.encode(f"x{text}y {text}")
            assert not set(one.special_tokens.values()) & set(ids)
            assert one.decode(ids) == f"x{text}y {text}" and one.decode([i]) == text


# ---- Files
def test_save_load_and_fingerprint(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.encode(TEXT) == tokenizer.encode(TEXT) and again.merges == tokenizer.merges
    assert again.special_tokens == tokenizer.special_tokens and again.fingerprint() == tokenizer.fingerprint()
    settings = chapter1.read_json(tmp_path / "tokenizer_config.json", "")
    assert settings["eos_token"] == chapter1.END_OF_TEXT and settings["clean_up_tokenization_spaces"] is False
    others = [train_bpe([TEXT], 280), train_bpe([TEXT], 310, pattern=chapter1.GPT2_PATTERN),
              train_bpe([TEXT], 310, special_tokens=["<|endoftext|>"]), train_bpe([TEXT[::-1]], 310)]
    assert len({one.fingerprint() for one in [tokenizer, *others]}) == 5


SPELL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
SPLIT = {"type": "Split", "pattern": {"Regex": "[a-z]+|[0-9]"}, "behavior": "Isolated", "invert": False}


def foreign(tokenizer, model=(), **changes):
    """Return the tokenizer of a tokenizer.json with some parts changed."""
    data = {**tokenizer.data, **changes}
    return chapter1.read_tokenizer({**data, "model": {**data["model"], **dict(model)}})


def test_gpt2_kind(tokenizer):
    end = chapter1.special_json("<|endoftext|>", 307)
    model = {"merges": [" ".join(pair) for pair in tokenizer.data["model"]["merges"]],         # "a b", the older way
             "vocab": {**tokenizer.data["model"]["vocab"], "<|endoftext|>": 307}}              # named here as well
    gpt2 = foreign(tokenizer, model, pre_tokenizer=SPELL, post_processor=SPELL, added_tokens=[end])
    assert gpt2.encode(TEXT) == encode_by_definition(tokenizer, TEXT, chapter1.GPT2_PATTERN) != tokenizer.encode(TEXT)
    assert gpt2.end == gpt2.special_tokens["<|endoftext|>"] and gpt2.vocab_size == 308 and b"<|endoftext|>" not in gpt2.tokens


def test_the_first_and_the_end_token_go_by_many_names(tokenizer):
    for names, first, end in (("<s> </s>", 307, "</s>"), ("<bos> <eos>", 307, "<eos>"), ("<s>", 307, None),
                              ("<|begin_of_text|> <|end_of_text|>", 307, "<|end_of_text|>"),           # Llama 3
                              ("<|endoftext|> <|im_start|> <|im_end|> <|box_start|> <|box_end|>", None, "<|endoftext|>"),     # Qwen3
                              ("<|endoftext|> <|im_start|> <|im_end|> <repo_name> <issue_start>", None, "<|endoftext|>")):    # SmolLM2
        added = [chapter1.special_json(name, 307 + i) for i, name in enumerate(names.split())]
        other = foreign(tokenizer, added_tokens=added)
        assert other.start == first and other.end == other.special_tokens.get(end), names


def test_smollm_kind_cuts_digits_apart(tokenizer):
    digits = {"type": "Digits", "individual_digits": True}
    smollm = foreign(tokenizer, pre_tokenizer={"type": "Sequence", "pretokenizers": [digits, SPELL]})
    pieces = regex.findall(r"\p{N}|\P{N}+", TEXT)
    assert smollm.encode(TEXT) == [i for piece in pieces for i in encode_by_definition(tokenizer, piece, chapter1.GPT2_PATTERN)]
    assert len(tokenizer.encode("123")) == 1 and len(smollm.encode("123")) == 3


def test_llama3_kind_takes_whole_chunks(tokenizer):
    llama = foreign(tokenizer, {"ignore_merges": True, "merges": []})
    whole = max((token for token in tokenizer.tokens if token.isalpha()), key=len)     # no merge makes it now
    assert len(whole) > 1 and llama.encode(whole.decode()) == [tokenizer.tokens[whole]]


def test_qwen_kind_composes_accents_and_cuts_by_its_own_pattern(tokenizer):
    cut = {"type": "Sequence", "pretokenizers": [SPLIT, {**SPELL, "use_regex": False}]}
    qwen = foreign(tokenizer, normalizer={"type": "NFC"}, pre_tokenizer=cut)
    text, pattern = "The café! +of+ 1234", "[a-z]+|[0-9]|[^a-z0-9]+"       # what the pattern leaves is a chunk, too
    apart = unicodedata.normalize("NFD", text)
    assert qwen.encode(apart) == qwen.encode(text) == encode_by_definition(tokenizer, text, pattern)
    assert tokenizer.decode(tokenizer.encode(apart)) == apart != text


REFUSED, EMPTY = "no byte-level BPE", {"added_tokens": [], "pre_tokenizer": None}


@pytest.mark.parametrize("content, why", [
    ({"model": {"byte_fallback": True, "vocab": {"<0x00>": 0, "▁a": 1}, "merges": []}}, REFUSED),      # Llama 2's
    ({"model": {"type": "Unigram", "vocab": []}}, REFUSED), ({"pre_tokenizer": {"type": "Metaspace"}}, REFUSED),
    (None, None), (b"", None), (b"{", None), (b"[]", None), (b"{}", None), (b"\xff\xfe", None), (b"[" * 100_000, None),
    ({"model": {"vocab": 3, "merges": []}}, None), ({**EMPTY, "model": {"vocab": {"a": -1}, "merges": []}}, None),
    ({**EMPTY, "model": {"vocab": {"a": 0}, "merges": ["a b"]}}, None)])
def test_files_that_would_get_wrong_ids_or_none_are_one_line_that_names_them(tokenizer, tmp_path, content, why):
    path = tmp_path / "tokenizer.json"
    if isinstance(content, dict):
        chapter1.write_json(path, {**tokenizer.data, **content})
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(CourseError, match=why) as caught:
        Tokenizer.load(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert why is None or len(str(caught.value)) < len(str(path)) + 120


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    chapter1.write_json(path, {"old": True})
    with pytest.raises(RuntimeError), chapter1.replacing(path) as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise RuntimeError("the disk is full")
    assert chapter1.read_json(path, "") == {"old": True} and list(tmp_path.iterdir()) == [path]


def test_a_figure_of_an_unknown_kind_leaves_the_old_file(tmp_path):
    for name in ("curve.xyz", "curve"):
        (tmp_path / name).write_text("old", encoding="utf-8")
    with pytest.raises(ValueError, match="xyz.*not supported"):
        chapter1.save_figure(Figure(), tmp_path / "curve.xyz")
    chapter1.save_figure(Figure(), tmp_path / "curve")         # without a suffix: a PNG
    assert {path.name: path.read_bytes()[:4] for path in tmp_path.iterdir()} == {"curve.xyz": b"old", "curve": b"\x89PNG"}


# ---- Sources and splits
def test_files_folders_globs_and_pythons_own_library(tmp_path, capsys):
    folder = tmp_path / "notes [2024]"                         # in a glob, brackets would mean something
    (folder / "deep").mkdir(parents=True)
    for name, content in {"a.md": b"first", "b.txt": b"one\r\n<|endoftext|>\ntwo", "c.html": b"not read", "latin.txt": b"caf\xe9",
                          "deep/d.jsonl": b'{"text": "three\\ud800"}\n\n{"text": "four"}\n'}.items():
        (folder / name).write_bytes(content)
    assert list(chapter1.read_source([str(folder)])) == ["first", "one\r\n", "two", "three?", "four"]
    assert capsys.readouterr().err.startswith(f"skipped {folder / 'latin.txt'}: from here on, UnicodeDecodeError: ")
    assert list(chapter1.read_source([str(folder / "b.txt"), str(tmp_path / "*" / "a.*")])) == ["one\r\n", "two", "first"]
    assert list(chapter1.read_source([str(tmp_path / "**")])) == ["first", "one\r\n", "two", "three?", "four"]     # each once
    assert list(chapter1.read_source(["b"], downloads=folder)) == ["one\r\n", "two"]
    library = {file.name for file in chapter1.find_files("python", "")}
    assert len(library) > 300 and "argparse.py" in library and not {"test_argparse.py", "pytest.py", "regex.py"} & library


@pytest.mark.parametrize("name, content", [
    ("none.txt", None), ("empty.txt", b""), ("spaces.txt", b" \n\n"), ("binary.txt", b"\0\1\2" * 99), ("utf16.txt", "text".encode("utf-16")),
    ("ascii16.txt", "text".encode("utf-16-le")), ("latin.txt", b"caf\xe9"), ("page.html", b"text"), ("no.jsonl", b"{"), ("list.jsonl", b"[1]\n"),
    ("other.jsonl", b'{"no": 1}'), ("number.jsonl", b'{"text": 1}')])
def test_a_source_without_text_is_an_error_that_names_it(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CourseError, match=f"{name}.*{Path.cwd()}"):        # and says where it looked
        list(chapter1.read_source([str(tmp_path / name)]))


def test_the_split_by_hash_is_stable_and_85_5_10_and_by_the_tail_of_few():
    texts = [f"document {number}" for number in range(4000)]
    split = {text: name for name, text in chapter1.split_documents(texts)}
    assert split == {text: name for name, text in chapter1.split_documents(texts[::-1])}
    for name, share in (("train", 0.85), ("val", 0.05), ("test", 0.10)):
        assert abs(list(split.values()).count(name) / 4000 - share) < 0.02
    for few in (texts[:1], texts[:19]):                        # too few: the tail is held out, and there is no test
        (first, train), (second, val) = chapter1.split_documents(few)
        assert (first, second) == ("train", "val") and train + val == "\n".join(few)
        assert len(train) == len(train + val) * 9 // 10


# ---- The command line
@dataclass
class Flags:
    size: int = 3  # how large, say 50% of all
    rate: float | None = None
    names: list[str] = field(default_factory=list)  # some names
    quick: bool = True  # whether to hurry


@dataclass
class MoreFlags(Flags):
    kind: str = "round"  # its shape


def test_a_dataclass_is_a_command_line(capsys):
    assert chapter1.parse_flags(Flags, "", []) == Flags()
    given = chapter1.parse_flags(MoreFlags, "", "--rate 2 --names a b --no-quick --kind flat".split())
    assert given == MoreFlags(3, 2.0, ["a", "b"], False, "flat")
    larger = chapter1.parse_flags(Flags, "", ["--rate", "9"], lambda given: {"size": len(given) + 5, "rate": 1.0})
    assert larger == Flags(size=6, rate=9.0)                   # what is given goes before what follows from it
    with pytest.raises(SystemExit) as caught:
        chapter1.parse_flags(MoreFlags, "what it does", ["--help"])
    printed = " ".join(capsys.readouterr().out.split())        # a flag without a comment is there, without a help
    for part in ("what it does", "--rate RATE --", "say 50% of all (default: 3)", "its shape (default: round)"):
        assert caught.value.code == 0 and part in printed
    for words in ("--size many", "--size -1", "--rate nan", "--rate -0.5", "--siz 3", "--unknown 3", "--names"):
        with pytest.raises(SystemExit) as caught:
            chapter1.parse_flags(Flags, "", words.split())
        assert caught.value.code == 2 and words.split()[0] in capsys.readouterr().err.splitlines()[-1]


SCRIPT = [sys.executable, str(ROOT / "01_tokenizer.py")]


def test_the_script_learns_saves_and_tells_how_to_go_on(tmp_path):
    (tmp_path / "one.txt").write_text("漢 hello hello hello.", encoding="utf-8")
    done = subprocess.run([*SCRIPT, "--source", "one.txt", "--out", "my folder"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and not done.stderr            # a terminal that lacks a letter is no error
    learnt = Tokenizer.load(tmp_path / "my folder" / "tokenizer")
    assert learnt.vocab_size < 300 and f"{learnt.vocab_size:,} tokens" in done.stdout
    assert "hello| hello|" in done.stdout and "\x1b" not in done.stdout
    assert done.stdout.endswith("next: python 02_data.py --out 'my folder'\n")
    source = chapter1.read_json(tmp_path / "my folder" / "tokenizer" / "source.json", "")
    assert source == ["one.txt"]


@pytest.mark.parametrize("flags, status, word", [
    ("--source nowhere.txt", 1, "nowhere.txt"), ("--source letter.txt", 1, "letter.txt"),
    ("--source text.txt --vocab-size 0", 1, "--vocab-size 0 is not over 259"), ("--source text.txt --vocab-size 259", 1, "over 259"),
    ("--source wide.txt", 1, "wide.txt"), ("--vocab-size many", 2, "many")])
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, flags, status, word):
    (tmp_path / "letter.txt").write_text("a", encoding="utf-8")
    (tmp_path / "text.txt").write_text("some text", encoding="utf-8")
    (tmp_path / "wide.txt").write_text("some text", encoding="utf-16")
    done = subprocess.run([*SCRIPT, *flags.split(), "--out", "out"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == status and word in done.stderr and not (tmp_path / "out").exists()
    assert status == 2 or done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr


def test_a_reader_that_leaves_and_ctrl_c_print_no_traceback(tmp_path):
    (tmp_path / "one.txt").write_text("hello hello", encoding="utf-8")
    with subprocess.Popen([*SCRIPT, "--source", "one.txt"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as gone:
        gone.stdout.close()
        assert gone.wait() == 0 and not gone.stderr.read()
    code = ("import os, signal; from importlib import import_module; chapter1 = import_module('01_tokenizer')\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may ignore it\n"
            "chapter1.run(lambda config: os.kill(os.getpid(), signal.SIGINT), chapter1.Config, '')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130 and not done.stderr
