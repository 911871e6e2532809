"""Chapter 1: two trainers that agree, lossless encoding, special tokens, files of other makers, sources, flags."""
import doctest
import json
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

ROOT = Path(__file__).resolve().parent.parent
chapter1 = import_module("01_tokenizer")
CourseError, Tokenizer, train_bpe = chapter1.CourseError, chapter1.Tokenizer, chapter1.train_bpe
TEXT = "def add(a, b):\n    return a + b\n\nThe café costs 1234 €, naïve 😀 users say. " * 5


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([TEXT], 400)


def random_text(chooser, length):
    """Return text over several scripts, with runs of spaces and newlines, marks and emoji of many code points."""
    letters = "abcdefghij ABC 0123456789\n\n\t   .,;'\"()é€ßñЖдא漢字😀👍🏽\u200d\u0301\x00"
    return "".join(chooser.choices(letters, k=length))


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
        assert merges == chapter1.learn_merges_naive(chunks, how_many) and len(merges) <= how_many
        data = chapter1.tokenizer_json(merges, chapter1.PATTERN, [])
        assert len(Tokenizer(data).tokens) == 256 + len(merges)            # no two merges make the same token


def test_ties_go_to_the_lowest_ids_whatever_the_order():
    texts = ["dc", "ba", "dc", "ba"]
    assert train_bpe(texts, 258, special_tokens=()).merges == [(b"b", b"a"), (b"d", b"c")]
    parts = [TEXT[i:i + 40] for i in range(0, len(TEXT), 40)]
    assert train_bpe(parts, 350).data == train_bpe(parts[::-1], 350).data


@pytest.mark.parametrize("texts, learnt", [([], 0), ([""], 0), (["a"], 0), (["aa"], 1), (["aaaa"], 2), (["<|endoftext|>"] * 9, 8)])
def test_a_tiny_corpus_stops_early(texts, learnt):
    """The mark of the end is plain text here: "<|", "endoftext", "|>" have 1, 8 and no new pair, "|>" 1."""
    small = train_bpe(texts, 1000)
    assert len(small.merges) == learnt or (learnt == 8 and len(small.merges) == 10)
    assert small.vocab_size == 256 + len(small.merges) + len(chapter1.SPECIAL_TOKENS)


# ---- Encoding and decoding

def test_encoding_is_what_the_definition_says(tokenizer):
    chooser = random.Random(1)
    for _ in range(150):
        text = random_text(chooser, chooser.randint(0, 40)) + TEXT[chooser.randint(0, 60):][:30]
        assert tokenizer.encode(text) == encode_by_definition(tokenizer, text)


def test_chunks_without_a_space_are_encoded_by_the_same_rule():
    chooser = random.Random(2)
    learnt = train_bpe(["".join(chooser.choices("abc", k=3000)), "a" * 500], 330)
    for length in (999, 1000, 1001, 4000):
        for text in ("".join(chooser.choices("abc", k=length)), "a" * length, "\0" * length):
            assert learnt.encode(text) == encode_by_definition(learnt, text)
    long = "".join(chooser.choices("abcdefgh", k=300_000))     # must take seconds, not hours
    assert learnt.decode(learnt.encode(long)) == long


def test_thousands_of_texts_come_back(tokenizer):
    chooser = random.Random(3)
    for _ in range(3000):
        text = random_text(chooser, chooser.randint(0, 20))
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()


def test_every_sequence_of_ids_decodes(tokenizer):
    assert tokenizer.decode([0xff, 0xc3, ord("a")]) == "\ufffd\ufffda"     # these are no UTF-8
    chooser = random.Random(4)
    for _ in range(200):
        ids = [chooser.randrange(tokenizer.vocab_size) for _ in range(9)]
        assert tokenizer.decode(ids) == tokenizer.decode_bytes(ids).decode("utf-8", "replace")


def test_half_a_character_is_no_error(tokenizer):
    """A lone surrogate, half of a pair of UTF-16, stands for no character: it becomes a question mark."""
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_special_tokens_are_never_made_of_text(tokenizer):
    specials = tokenizer.special_tokens
    assert sorted(specials.values()) == [397, 398, 399] and tokenizer.vocab_size == 400
    assert tokenizer.end == chapter1.END_OF_TEXT and tokenizer.first is None
    learnt = train_bpe([" ".join(specials) * 50], 500)         # not even where the text is full of them
    for text in specials:
        for one in (tokenizer, learnt):
            ids = one.encode(f"x{text}y {text}")
            assert not set(one.special_tokens.values()) & set(ids)
            assert one.decode(ids) == f"x{text}y {text}" and one.decode([one.special_tokens[text]]) == text


# ---- Files

def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.encode(TEXT) == tokenizer.encode(TEXT) and again.merges == tokenizer.merges
    assert again.special_tokens == tokenizer.special_tokens and again.vocab_size == tokenizer.vocab_size
    assert again.fingerprint() == tokenizer.fingerprint()
    again.save(tmp_path / "twice")
    assert (tmp_path / "twice" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["eos_token"] == chapter1.END_OF_TEXT and settings["clean_up_tokenization_spaces"] is False


def test_the_fingerprint_differs_with_every_part(tokenizer):
    others = [train_bpe([TEXT], 300), train_bpe([TEXT], 400, pattern=chapter1.GPT2_PATTERN),
              train_bpe([TEXT], 400, special_tokens=["<|endoftext|>"]), train_bpe([TEXT[::-1]], 400)]
    assert len({one.fingerprint() for one in [tokenizer, *others]}) == 5


SPELL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
QWEN = regex.sub(r"\{1,3\}", "", chapter1.PATTERN)             # one digit a chunk


def sequence(kind, *steps):
    return {"type": "Sequence", kind: list(steps)}


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def foreign(tokenizer, model=(), **changes):
    """Return the tokenizer of a tokenizer.json with some parts changed, written and read anew."""
    data = json.loads(json.dumps({**tokenizer.data, **changes}))
    data["model"].update(model)
    return Tokenizer(data)


def test_gpt2_kind(tokenizer):
    pairs = [" ".join(pair) for pair in tokenizer.data["model"]["merges"]]             # "a b", as it was once written
    vocab = {**tokenizer.data["model"]["vocab"], "<|endoftext|>": 397}                 # named here as well
    end = [chapter1.special_json("<|endoftext|>", 397)]
    gpt2 = foreign(tokenizer, {"merges": pairs, "vocab": vocab}, pre_tokenizer=SPELL, post_processor=SPELL, added_tokens=end)
    text = "It's 20245, isn't it?  \n\n  yes <|endoftext|>"
    assert gpt2.encode(text) == encode_by_definition(tokenizer, text, chapter1.GPT2_PATTERN) != tokenizer.encode(text)
    assert gpt2.end == "<|endoftext|>" and gpt2.vocab_size == 398 and b"<|endoftext|>" not in gpt2.tokens


def test_smollm_kind_cuts_digits_apart_first(tokenizer):
    digits = {"type": "Digits", "individual_digits": True}
    smollm = foreign(tokenizer, pre_tokenizer=sequence("pretokenizers", digits, SPELL))
    assert tokenizer.decode(tokenizer.encode("1234")[:1]) == "123"
    for text in ("1234", "a 1234 b", "x12"):
        pieces = regex.findall(r"\p{N}|[^\p{N}]+", text)
        assert smollm.encode(text) == [i for piece in pieces for i in encode_by_definition(tokenizer, piece, chapter1.GPT2_PATTERN)]


@pytest.mark.parametrize("wrapped", [False, True])
def test_llama3_kind_has_a_first_token_and_takes_whole_chunks(tokenizer, wrapped):
    template = {"type": "TemplateProcessing", "pair": [], "special_tokens": {},
                "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]}
    processor = sequence("processors", SPELL, template) if wrapped else template
    llama = foreign(tokenizer, {"ignore_merges": True, "merges": []}, post_processor=processor)
    assert llama.first == tokenizer.special_tokens["<|im_start|>"]
    whole = max((token for token in tokenizer.tokens if token.isalpha()), key=len)     # no merge makes it now
    assert llama.encode(whole.decode()) == [tokenizer.tokens[whole]]
    last = {**template, "single": template["single"][::-1]}    # a token behind each text is not one before it
    assert foreign(tokenizer, post_processor=last).first is None


def test_qwen_kind_composes_accents(tokenizer):
    cut = sequence("pretokenizers", split(QWEN), {**SPELL, "use_regex": False})
    qwen = foreign(tokenizer, normalizer={"type": "NFC"}, pre_tokenizer=cut)
    apart = unicodedata.normalize("NFD", "The café of 1234")
    assert qwen.encode(apart) == encode_by_definition(tokenizer, "The café of 1234", QWEN) != tokenizer.encode(apart)
    none = foreign(tokenizer, normalizer=sequence("normalizers"))
    assert none.decode(none.encode(apart)) == apart


def test_what_a_pattern_leaves_between_its_matches_is_kept(tokenizer):
    cut = sequence("pretokenizers", split("[a-z]+"), {**SPELL, "use_regex": False})
    other = foreign(tokenizer, pre_tokenizer=cut)
    assert other.encode("ab12!cd") == encode_by_definition(tokenizer, "ab12!cd", r"[a-z]+|[^a-z]+")


@pytest.mark.parametrize("names, end", [(["<s>", "</s>"], "</s>"), (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], "<|end_of_text|>"),
                                        (["<pad>"], None)])
def test_a_foreign_tokenizer_uses_the_end_it_has(tokenizer, names, end):
    added = [chapter1.special_json(name, 397 + i) for i, name in enumerate(names)]
    assert foreign(tokenizer, added_tokens=added).end == end


@pytest.mark.parametrize("change", [
    {"normalizer": {"type": "Lowercase"}}, {"pre_tokenizer": {"type": "Metaspace"}}, {"pre_tokenizer": {**SPELL, "add_prefix_space": True}},
    {"pre_tokenizer": {**split("a"), "behavior": "Removed"}}, {"model": {"type": "Unigram", "vocab": []}},
    {"model": {"type": "BPE", "byte_fallback": True, "vocab": {"<0x00>": 0, "▁a": 1}, "merges": []}}])
def test_kinds_that_would_get_wrong_ids_are_refused(tokenizer, tmp_path, change):
    """Among them Llama 2's, the last one."""
    chapter1.write_json(tmp_path / "tokenizer.json", {**tokenizer.data, **change})
    with pytest.raises(CourseError, match="not supported") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("content", [
    None, b"", b"{", b"[]", b"{}", b"null", b"\xff\xfe", b"[" * 100_000, b'{"model": {}}', b'{"model": {"vocab": 3, "merges": []}}',
    b'{"model": {"vocab": {"a": -1}, "merges": []}, "added_tokens": [], "pre_tokenizer": null}',
    b'{"model": {"vocab": {"a": 0}, "merges": ["a b c"]}, "added_tokens": [], "pre_tokenizer": null}',
    b'{"model": {"vocab": {"a": 0}, "merges": [["a", "b"]]}, "added_tokens": [], "pre_tokenizer": null}'])
def test_damaged_files_are_one_line_that_names_them(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CourseError) as caught:
        Tokenizer.load(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    chapter1.write_json(path, {"old": True})
    with pytest.raises(RuntimeError):
        with chapter1.replacing(path) as temporary:
            temporary.write_text("half", encoding="utf-8")
            raise RuntimeError("the disk is full")
    assert chapter1.read_json(path, "") == {"old": True} and list(tmp_path.iterdir()) == [path]


# ---- Sources and splits

def test_files_folders_and_globs(tmp_path):
    folder = tmp_path / "notes [2024]"                         # brackets would mean something in a glob
    (folder / "deep").mkdir(parents=True)
    (folder / "a.md").write_text("first", encoding="utf-8")
    (folder / "b.txt").write_text("one\r\n<|endoftext|>\ntwo", encoding="utf-8", newline="")
    (folder / "c.html").write_bytes(b"no")
    (folder / "deep" / "d.jsonl").write_text('{"text": "three\\ud800"}\n\n{"text": "four"}\n', encoding="utf-8")
    assert list(chapter1.read_source([str(folder)])) == ["first", "one\r\n", "two", "three?", "four"]
    assert list(chapter1.read_source([str(folder / "b.txt"), str(tmp_path / "*" / "a.*")])) == ["one\r\n", "two", "first"]
    assert list(chapter1.read_source([str(tmp_path / "**" / "*.jsonl")])) == ["three?", "four"]
    assert list(chapter1.read_source(["a"], downloads=tmp_path / "none") if (folder / "x").exists() else []) == []


@pytest.mark.parametrize("name, content", [
    ("none.txt", None), ("empty.txt", b""), ("spaces.txt", b" \n\n"), ("binary.txt", b"\0\1\2" * 99), ("utf16.txt", "text".encode("utf-16")),
    ("ascii16.txt", "text".encode("utf-16-le")), ("latin.txt", b"caf\xe9"), ("page.html", b"text"), ("no.jsonl", b"{"),
    ("list.jsonl", b"[1]\n"), ("other.jsonl", b'{"no": 1}'), ("number.jsonl", b'{"text": 1}')])
def test_a_source_without_text_is_an_error_that_names_it(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CourseError, match=name) as caught:
        list(chapter1.read_source([str(tmp_path / name)]))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_skipped_is_named(tmp_path, capsys):
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    (tmp_path / "good.txt").write_text("café", encoding="utf-8")
    assert list(chapter1.read_source([str(tmp_path)])) == ["café"]
    printed = capsys.readouterr()
    assert "bad.txt" in printed.err and "good.txt" not in printed.err and not printed.out


def test_python_is_its_own_library_without_the_tests():
    files = chapter1.find_files("python", "")
    assert {"argparse.py", "heapq.py"} <= {file.name for file in files} and len(files) > 300
    assert not [file for file in files if {"test", "site-packages"} & set(file.parts[-3:])]


def test_the_split_by_hash_is_stable_and_85_5_10():
    texts = [f"document {number}" for number in range(4000)]
    split = {text: name for name, text in chapter1.split_documents(texts)}
    assert split == {text: name for name, text in chapter1.split_documents(texts[::-1])}
    for name, share in (("train", 0.85), ("val", 0.05), ("test", 0.10)):
        assert abs(list(split.values()).count(name) / 4000 - share) < 0.02


@pytest.mark.parametrize("count", [1, 2, 19])
def test_few_documents_are_split_by_their_tail(count):
    texts = [f"{number}" * 100 for number in range(count)]
    (first, train), (second, val) = chapter1.split_documents(texts)
    assert (first, second) == ("train", "val") and train + val == "\n".join(texts)
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
    printed = capsys.readouterr().out                          # a flag without a comment has no help, but is there
    assert caught.value.code == 0 and "--rate" in printed
    assert "50% of all (default: 3)" in printed and "its shape (default: round)" in printed and "what it does" in printed


@pytest.mark.parametrize("words", ["--size many", "--size -1", "--rate nan", "--rate -0.5", "--siz 3", "--unknown 3", "--names"])
def test_bad_flags_exit_with_2(words, capsys):
    with pytest.raises(SystemExit) as caught:
        chapter1.parse_flags(Flags, "", words.split())
    assert caught.value.code == 2 and words.split()[0] in capsys.readouterr().err


def run(*flags, **how):
    words = [sys.executable, str(ROOT / "01_tokenizer.py"), *map(str, flags)]
    return subprocess.run(words, capture_output=True, text=True, encoding="utf-8", **how)


def test_the_script_learns_saves_and_tells_how_to_go_on(tmp_path):
    (tmp_path / "one.txt").write_text("hello hello hello 漢", encoding="utf-8")
    done = run("--source", "one.txt", "--out", "my folder", cwd=tmp_path, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and not done.stderr            # a terminal that lacks a letter is no error
    learnt = Tokenizer.load(tmp_path / "my folder" / "tokenizer")
    assert f"{learnt.vocab_size:,} tokens" in done.stdout and learnt.vocab_size < 300
    assert "hello| hello|" in done.stdout and "\x1b" not in done.stdout
    assert "python 02_data.py --out 'my folder'" in done.stdout.splitlines()[-1]
    source = json.loads((tmp_path / "my folder" / "tokenizer" / "source.json").read_text(encoding="utf-8"))
    assert source == [str(tmp_path / "one.txt")]               # found from another folder, too


@pytest.mark.parametrize("flags, status, word", [
    ("--source nowhere.txt", 1, "nowhere.txt"), ("--source letter.txt", 1, "letter.txt"), ("--source text.txt --vocab-size 100", 1, "259"),
    ("--vocab-size many", 2, "many")])
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, flags, status, word):
    (tmp_path / "letter.txt").write_text("a", encoding="utf-8")
    (tmp_path / "text.txt").write_text("some text", encoding="utf-8")
    done = run(*flags.split(), "--out", "out", cwd=tmp_path)
    assert done.returncode == status and word in done.stderr and not (tmp_path / "out").exists()
    assert status == 2 or (len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: "))


def test_a_reader_that_leaves_is_no_error(tmp_path):
    (tmp_path / "one.txt").write_text("hello hello", encoding="utf-8")
    words = [sys.executable, str(ROOT / "01_tokenizer.py"), "--source", "one.txt"]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as gone:
        gone.stdout.close()
        assert gone.wait() == 0 and not gone.stderr.read()


def test_ctrl_c_prints_no_traceback():
    code = ("import os, signal; from importlib import import_module; chapter1 = import_module('01_tokenizer')\n"
            "chapter1.run(lambda config: os.kill(os.getpid(), signal.SIGINT), chapter1.Config, '')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130 and not done.stderr
