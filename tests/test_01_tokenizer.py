"""Chapter 1: two trainers that agree, lossless encoding, special tokens, files of other makers, sources and splits."""
import doctest
import gzip
import json
import os
import random
import subprocess
import sys
import unicodedata
from importlib import import_module
from itertools import product
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
    """Return text over assigned characters of several scripts, with runs of spaces and newlines."""
    letters = "abcdefghij ABC 0123456789\n\n\t   .,;'\"()é€ßñЖдא漢字😀👍🏽\u200d\u0301\x00"
    return "".join(chooser.choice(letters) for _ in range(length))


def encode_by_definition(tokenizer, text, pattern=chapter1.PATTERN):
    """Return ids by the plainest rule: in each chunk, merge the leftmost pair of lowest rank until none is left."""
    ranks, ids = {pair: rank for rank, pair in enumerate(tokenizer.merges)}, []
    for chunk in regex.findall(pattern, text):
        parts = [bytes([byte]) for byte in chunk.encode()]
        while True:
            found = [(ranks[pair], i) for i, pair in enumerate(zip(parts, parts[1:])) if pair in ranks]
            if not found:
                break
            i = min(found)[1]
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        ids += [tokenizer.tokens[part] for part in parts]
    return ids


def test_doctests():
    failures, attempted = doctest.testmod(chapter1)
    assert attempted > 0 and failures == 0


# ---- Training

@pytest.mark.parametrize("alphabet", ["a", "ab", "ab ", "abc é\n", "aab'1. "])
def test_fast_trainer_equals_the_naive_one(alphabet):
    chooser = random.Random(alphabet)
    for _ in range(40):
        documents = ["".join(chooser.choice(alphabet) for _ in range(chooser.randint(0, 60))) for _ in range(chooser.randint(1, 6))]
        pattern = chooser.choice([chapter1.PATTERN, r"[\s\S]+"])
        size = 264 + chooser.randint(0, 40)
        fast = train_bpe(documents, size, pattern)
        assert fast.merges == train_bpe(documents, size, pattern, learn=chapter1.learn_merges_naive).merges


def test_ties_go_to_the_lowest_ids():
    merges = train_bpe(["dc", "ba", "dc", "ba"], 258, special_tokens=()).merges
    assert merges == [(b"b", b"a"), (b"d", b"c")]


def test_workers_and_order_do_not_matter(tokenizer):
    documents = [TEXT[i:i + 40] for i in range(0, len(TEXT), 40)]
    assert train_bpe(documents, 350, workers=2).data == train_bpe(documents[::-1], 350).data


@pytest.mark.parametrize("documents, learnt", [([], 0), ([""], 0), (["a"], 0), (["\n"], 0), (["aa"], 1), (["aaaa"], 2)])
def test_a_tiny_corpus_stops_early(documents, learnt):
    small = train_bpe(documents, 1000)
    assert len(small.merges) == learnt and small.vocab_size == 256 + learnt + len(chapter1.SPECIAL_TOKENS)


def test_text_that_spells_a_special_token_is_not_learnt_from():
    assert train_bpe(["<|endoftext|>" * 50], 300).merges == []


def test_a_vocabulary_without_room_is_refused():
    with pytest.raises(CourseError, match="--vocab-size 260"):
        train_bpe(["abc"], 260)


def test_a_megabyte_without_a_space_and_ten_thousand_equal_letters():
    chooser = random.Random(0)
    blob = "".join(chooser.choices("abcdefghijklmnopqrstuvwxyz0123456789+/", k=1_000_000))
    learnt = train_bpe([blob], 400, pattern=r"[\s\S]+")
    ids = learnt.encode(blob)
    assert learnt.decode(ids) == blob and len(ids) < len(blob)
    for text in ("a" * 10_000, "\x00" * 10_000):
        assert learnt.decode(learnt.encode(text)) == text
    equal = train_bpe(["a" * 10_000], 300)
    assert len(equal.encode("a" * 8192)) == 1 and equal.merges[0] == (b"a", b"a")


# ---- Encoding and decoding

def test_encoding_is_what_the_definition_says(tokenizer):
    chooser = random.Random(1)
    for _ in range(300):
        text = random_text(chooser, chooser.randint(0, 40))
        assert tokenizer.encode(text) == encode_by_definition(tokenizer, text)


def test_ten_thousand_texts_and_byte_strings_come_back(tokenizer):
    chooser = random.Random(2)
    for _ in range(10_000):
        text = random_text(chooser, chooser.randint(0, 12))
        assert tokenizer.decode(tokenizer.encode(text)) == text
        data = chooser.randbytes(chooser.randint(0, 12))
        assert tokenizer.decode_bytes(tokenizer.encode(data)) == data


def test_the_memory_of_chunks_is_bounded(tokenizer):
    letters = "abcdefghijklmnopqrstuvwxyzé"                    # 27^4 = 531,441 different words
    tokenizer.encode(" ".join(map("".join, product(letters, repeat=4))))
    assert tokenizer._ids_of.cache_info().currsize == 500_000


def test_text_and_its_bytes_have_equal_ids(tokenizer):
    assert tokenizer.encode(TEXT) == tokenizer.encode(TEXT.encode())


def test_half_a_utf16_pair_becomes_the_replacement_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_decode_never_fails_on_valid_ids(tokenizer):
    chooser = random.Random(3)
    for _ in range(200):
        assert isinstance(tokenizer.decode([chooser.randrange(tokenizer.vocab_size) for _ in range(9)]), str)


def test_a_bad_id_names_itself(tokenizer):
    for bad in (tokenizer.vocab_size, -1):
        with pytest.raises(CourseError, match=str(bad)):
            tokenizer.decode([1, bad])


def test_every_token_is_bytes_that_encode_to_it_or_to_its_parts(tokenizer):
    for (a, b), i in zip(tokenizer.merges, range(256, 400)):
        assert tokenizer.tokens[a + b] == i and tokenizer.bytes_of[i] == a + b
    assert [tokenizer.bytes_of[i] for i in range(256)] == [bytes([i]) for i in range(256)]


# ---- Special tokens

def test_specials_are_one_id_each_but_never_out_of_user_text(tokenizer):
    specials = set(tokenizer.special_tokens.values())
    assert len(specials) == len(chapter1.SPECIAL_TOKENS) and max(specials) == tokenizer.vocab_size - 1
    for text, i in tokenizer.special_tokens.items():
        assert tokenizer.encode(text, allow_special=True) == [i]
        assert not specials & set(tokenizer.encode(f"x{text}y"))
        assert tokenizer.decode(tokenizer.encode(f"x{text}y")) == f"x{text}y"
        assert tokenizer.encode(f"ab{text}{text}cd", allow_special=True) == [*tokenizer.encode("ab"), i, i, *tokenizer.encode("cd")]


def test_the_longer_of_two_specials_wins():
    both = train_bpe(["ab"], 300, special_tokens=("<x>", "<x><y>"))
    assert both.encode("<x><y><x>", allow_special=True) == [both.special_tokens["<x><y>"], both.special_tokens["<x>"]]


# ---- Files

def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = Tokenizer.load(path)
        assert again.encode(TEXT) == tokenizer.encode(TEXT) and again.merges == tokenizer.merges
        assert again.fingerprint() == tokenizer.fingerprint() and again.special_tokens == tokenizer.special_tokens
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and settings["clean_up_tokenization_spaces"] is False


def test_the_fingerprint_differs_with_every_part(tokenizer):
    others = [train_bpe([TEXT], 300), train_bpe([TEXT], 400, pattern=chapter1.GPT2_PATTERN),
              train_bpe([TEXT], 400, special_tokens=("<|endoftext|>",)), train_bpe([TEXT[::-1]], 400)]
    assert len({t.fingerprint() for t in [tokenizer, *others]}) == 5


def foreign(tokenizer, **changes):
    """Return the tokenizer.json of a tokenizer with some parts changed, as text read anew."""
    return json.loads(json.dumps({**tokenizer.data, **changes}))


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def test_gpt2_kind(tokenizer):
    data = foreign(tokenizer, pre_tokenizer=BYTE_LEVEL, post_processor={**BYTE_LEVEL, "add_prefix_space": True}, normalizer=None)
    data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    text = "It's 2024, isn't it?  \n\n  yes"
    assert Tokenizer(data).encode(text) == encode_by_definition(tokenizer, text, chapter1.GPT2_PATTERN)


def test_smollm_kind_splits_digits_first(tokenizer):
    data = foreign(tokenizer, pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]})
    ids = Tokenizer(data).encode("a 1234 b")
    assert [tokenizer.decode([i]) for i in ids if tokenizer.decode([i]).strip().isdigit()] == list("1234")


def test_llama3_kind_puts_a_first_token_and_takes_whole_chunks(tokenizer):
    data = foreign(tokenizer, post_processor={"type": "Sequence", "processors": [BYTE_LEVEL, {
        "type": "TemplateProcessing", "pair": [], "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]}]})
    data["model"]["ignore_merges"] = True
    whole = max((t for t in tokenizer.tokens if t.isalpha()), key=len)
    data["model"]["merges"] = []                               # only whole chunks can become long tokens now
    llama = Tokenizer(data)
    assert llama.first == tokenizer.special_tokens["<|im_start|>"]
    assert llama.encode(whole.decode()) == [tokenizer.tokens[whole]] and tokenizer.first is None


def test_qwen_kind_composes_accents(tokenizer):
    qwen = Tokenizer(foreign(tokenizer, normalizer={"type": "NFC"}))
    assert qwen.encode(unicodedata.normalize("NFD", "café")) == tokenizer.encode("café") != tokenizer.encode(unicodedata.normalize("NFD", "café"))


def test_what_a_pattern_leaves_between_its_matches_is_kept(tokenizer):
    split = {"type": "Split", "pattern": {"Regex": "[a-z]+"}, "behavior": "Isolated", "invert": False}
    other = Tokenizer(foreign(tokenizer, pre_tokenizer={"type": "Sequence", "pretokenizers": [split, {**BYTE_LEVEL, "use_regex": False}]}))
    assert other.encode("ab12!cd") == encode_by_definition(tokenizer, "ab12!cd", r"[a-z]+|[^a-z]+")


def test_a_missing_byte_is_named(tokenizer):
    data = foreign(tokenizer)
    data["model"]["vocab"].pop("z")
    with pytest.raises(CourseError, match="0x7a"):
        Tokenizer(data).encode("fuzz")


@pytest.mark.parametrize("change", [
    {"normalizer": {"type": "Lowercase"}}, {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}]}},
    {"pre_tokenizer": {"type": "Whitespace"}}, {"pre_tokenizer": None}, {"pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": True}},
    {"pre_tokenizer": {"type": "Metaspace"}}, {"post_processor": {"type": "BertProcessing"}},
    {"model": {"type": "Unigram", "vocab": []}}, {"model": {"type": "WordPiece", "vocab": {}}},
])
def test_what_cannot_be_honoured_is_refused(tokenizer, tmp_path, change):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**tokenizer.data, **change}), encoding="utf-8")
    with pytest.raises(CourseError, match="tokenizer.json"):
        Tokenizer.load(path)


@pytest.mark.parametrize("setting", ["dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"])
def test_settings_that_are_not_supported_are_named(tokenizer, setting):
    data = foreign(tokenizer)
    data["model"][setting] = 0.1 if setting == "dropout" else "x"
    with pytest.raises(CourseError, match="not supported"):
        Tokenizer(data)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"null", b"\xff\xfe", b'{"model": {}}', b'{"model": {"type": "BPE", "vocab": 3}}',
                                     b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b c"]}, "added_tokens": [], '
                                     b'"pre_tokenizer": {"type": "ByteLevel"}}'])
def test_damaged_files_give_one_clear_line(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(CourseError) as caught:
        Tokenizer.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# ---- Sources and splits

def test_files_folders_globs_and_gzip(tmp_path):
    (tmp_path / "b.txt").write_text("one\r\n<|endoftext|>\ntwo", encoding="utf-8", newline="")
    (tmp_path / "a.md").write_text("first", encoding="utf-8")
    (tmp_path / "skip.bin").write_bytes(b"no")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write('{"text": "three"}\n\n{"text": "four"}\n')                    # an empty line is no document
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe")
    expected = ["first", "one\r\n", "two", "three", "four", None]
    assert list(chapter1.read_source([str(tmp_path)])) == expected
    assert list(chapter1.read_source([str(tmp_path / "*.txt")])) == ["one\r\n", "two", None]
    with pytest.raises(CourseError, match="nothing_here"):
        list(chapter1.read_source(["nothing_here"]))
    (tmp_path / "e.jsonl").write_text('{"no": 1}', encoding="utf-8")
    with pytest.raises(CourseError, match="e.jsonl"):
        list(chapter1.read_source([str(tmp_path / "e.jsonl")]))


@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_a_damaged_gzip_file_is_one_clear_error(tmp_path, damage):
    packed = bytearray(gzip.compress(random.Random(0).randbytes(5000).hex().encode()))
    packed = packed[:-20] if damage == "cut" else packed[:60] + b"\xff" * 140 + packed[200:]
    (tmp_path / "f.txt.gz").write_bytes(packed)
    with pytest.raises(CourseError, match="f.txt.gz"):
        list(chapter1.read_source([str(tmp_path / "f.txt.gz")]))


def test_the_embedded_corpus_is_the_standard_library_without_tests():
    texts = list(chapter1.read_source(["python"]))
    assert len(texts) > 300 and sum(len(text) for text in texts if text) > 5_000_000
    assert any(text and "class ArgumentParser" in text for text in texts)


def test_split_by_hash_is_stable_and_85_5_10():
    documents = [f"document {number}" for number in range(4000)]
    split = dict((text, name) for name, text in chapter1.split_documents(documents))
    assert split == dict((text, name) for name, text in chapter1.split_documents(documents[::-1]))
    shares = [list(split.values()).count(name) / 4000 for name in ("train", "val", "test")]
    assert all(abs(share - wanted) < 0.02 for share, wanted in zip(shares, (0.85, 0.05, 0.10)))


def test_few_documents_are_split_by_their_tail():
    parts = list(chapter1.split_documents(["a" * 600, "b" * 400]))
    assert parts == [("train", "a" * 600), ("train", "b" * 300), ("val", "b" * 100)]


# ---- The command line

def run(*flags):
    return subprocess.run([sys.executable, str(ROOT / "01_tokenizer.py"), *map(str, flags)], capture_output=True, text=True, encoding="utf-8")


def test_the_script_reports_the_vocabulary_it_got_and_shows_no_colour_in_a_pipe(tmp_path):
    (tmp_path / "one.txt").write_text("hello hello hello", encoding="utf-8")
    done = run("--source", tmp_path / "one.txt", "--out", tmp_path / "out", "--vocab-size", 500)
    assert done.returncode == 0, done.stderr
    got = Tokenizer.load(tmp_path / "out" / "tokenizer").vocab_size
    assert f"{got:,} tokens learnt of 500" in done.stdout and "\x1b" not in done.stdout and "|" in done.stdout


def test_a_terminal_that_lacks_letters_and_a_reader_that_leaves_are_no_errors(tmp_path):
    (tmp_path / "one.txt").write_text("é漢 é漢 é漢", encoding="utf-8")
    words = [sys.executable, str(ROOT / "01_tokenizer.py"), "--source", str(tmp_path / "one.txt"), "--out", str(tmp_path / "out"),
             "--workers", "1"]
    done = subprocess.run(words, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and not done.stderr and b"?" in done.stdout
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as gone:
        gone.stdout.close()
        assert gone.wait() == 0 and not gone.stderr.read()


@pytest.mark.parametrize("flags, status, words", [
    (["--source", "nowhere.txt"], 1, "nowhere.txt"), (["--vocab-size", "100"], 1, "100"),
    (["--vocab-size", "many"], 2, "many"), (["--vocab", "300"], 2, "--vocab")])
def test_bad_flags_and_input(tmp_path, flags, status, words):
    (tmp_path / "t.txt").write_text("text", encoding="utf-8")
    flags = flags if "--source" in flags else ["--source", str(tmp_path / "t.txt"), *flags]
    done = run(*flags, "--out", tmp_path / "out")
    assert done.returncode == status and words in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "tokenizer" / "tokenizer.json").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    chapter1.write_json(path, {"old": True})
    with pytest.raises(RuntimeError):
        with chapter1.replacing(path) as temporary:
            temporary.write_text("half", encoding="utf-8")
            raise RuntimeError("the disk is full")
    assert json.loads(path.read_text(encoding="utf-8")) == {"old": True} and list(tmp_path.iterdir()) == [path]
