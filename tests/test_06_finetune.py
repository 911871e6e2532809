"""Chapter 6: the checker of answers, the loss mask, packing, LoRA, and files of conversations."""
import ast
import doctest
import json
import random
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
chapter1, chapter3, chapter4, chapter5, chapter6 = map(
    import_module, ("01_tokenizer", "03_model", "04_train", "05_sample", "06_finetune"))
IGNORED = chapter4.IGNORED


@pytest.fixture(scope="module")
def tokenizer():
    return chapter1.train_bpe(["def add(a, b):\n    return a + b\n", "user assistant system Write the function."] * 3, 300)


def tiny_model(vocab_size, **changes):
    torch.manual_seed(0)
    shape = {"vocab_size": vocab_size, "context": 64, "layers": 2, "heads": 2, "width": 32, **changes}
    return chapter3.GPT(chapter3.GPTConfig(**shape))


def function(source, purpose=""):
    node = ast.parse(source).body[0]
    return chapter6.Function(node.name, chapter6.parameters_of(node.args), source, purpose)


def test_doctests():
    failures, attempted = doctest.testmod(chapter6)
    assert attempted > 0 and failures == 0


# ---- The checker

ADD = "def add(a, b=1):\n    return a + b"


@pytest.mark.parametrize("answer, parses, obeys", [
    (ADD, True, True),
    ("def add(a, b=1):\n    '''Add.'''\n    return a + b", True, True),
    ("def add(a, b):\n    return a + b", True, False),                       # the default was asked for
    ("def add(b=1, a=0):\n    return a + b", True, False),
    ("def plus(a, b=1):\n    return a + b", True, False),
    ("def add(a, b=1):\n    pass", True, False),
    ("def add(a, b=1):\n    '''Only words.'''\n    ...", True, False),
    ("def add(a, b=1):\n    a += b\n    a += b\n    a += b", True, False),     # a loop on one line
    ("def add(a, b=1):\n    a += b\n    a += b\n    return a", True, True),
    (ADD + "\n\n" + ADD, True, False),                                         # two functions
    ("x = 1", True, False),
    ("", True, False),
    ("def add(a, b=1)\n    return a + b", False, False),
    ("(" * 5000, False, False),
])
def test_judge_code(answer, parses, obeys):
    assert chapter6.judge_answer("write", function(ADD), answer) == (parses, obeys)


def test_judge_other_kinds():
    asked = function(ADD, "Return the total.")
    assert chapter6.judge_answer("parameters", asked, "a, b=1") == (None, True)
    assert chapter6.judge_answer("parameters", asked, "a, b") == (None, False)
    assert chapter6.judge_answer("parameters", function("def f():\n    return 1"), "none") == (None, True)
    assert chapter6.judge_answer("purpose", asked, "Gives the total of two numbers.") == (None, True)
    assert chapter6.judge_answer("purpose", asked, "Opens a file.") == (None, False)
    assert chapter6.judge_answer("purpose", asked, "the total\nthe total") == (None, False)
    assert chapter6.judge_answer("purpose", function(ADD, "Sum the total"), "the total") == (None, True)


# ---- Conversations from the library

MODULE = '''
import os

class Box:
    """A box."""

    @property
    def size(self) -> int:
        """Return the size.

        More words.
        """
        return self.width * 2

    def empty(self):
        pass

async def wait(): return 1

def add(a: int, *rest, b=1, **options):
    """Add."""
    total = a + b
    return total
'''


MORE = [chapter6.Function(name, (name + "_value",), f"def {name}({name}_value):\n    return {name}_value", "Return it.")
        for name in ("one", "two", "three", "four", "five", "six")]


def test_functions_in_takes_real_functions_without_docstrings_and_annotations():
    found = {f.name: f for f in chapter6.functions_in(MODULE)}
    assert set(found) == {"size", "add"}
    assert found["size"].source == "def size(self):\n    return self.width * 2"
    assert found["size"].purpose == "Return the size."
    assert found["add"].parameters == ("a", "*rest", "b=1", "**options")


def test_every_function_obeys_its_own_instruction():
    for f in chapter6.functions_in(MODULE):
        assert chapter6.judge_answer("write", f, f.source) == (True, True)


def test_renamed_is_the_same_function_under_other_names():
    original = function("def add(a, b=1):\n    total = a + b\n    return total.a")
    other = chapter6.renamed(original, ["one", "two", "three", "four"], random.Random(0))
    back = dict(zip((other.name, *(p.split("=")[0] for p in other.parameters)), ("add", "a", "b")))
    assert set(back) <= {"one", "two", "three", "four"} and len(back) == 3
    restored = other.source
    for new, old in back.items():
        restored = restored.replace(new, old)
    assert restored == original.source                                     # the attribute .a stayed as it was
    assert chapter6.judge_answer("write", other, other.source) == (True, True)


def test_split_and_phrasings_are_held_out():
    functions, words = chapter6.library_functions()
    assert len(functions["train"]) > 2000 and len(words) > 20_000 and "deque" in words and "class" not in words
    known = {(f.name, f.parameters) for f in functions["train"]}
    tasks = chapter6.held_out_tasks(functions, 100, 0)
    assert len(tasks) == 100 and all((f.name, f.parameters) not in known for _, f, _ in tasks)
    assert {kind for kind, _, _ in tasks} == {"write", "parameters", "purpose"}
    new = {turns[0]["content"] for _, _, turns in chapter6.held_out_tasks(functions, 100, 1)}
    trained = {turns[0]["content"] for _, _, turns in chapter6.make_tasks(functions["train"], 0, 1)}
    assert not new & trained
    assert all(text.startswith(("I need a function", "Could you implement", "Give me", "What are the parameters", "Describe this"))
               for text in new)
    assert not any(text.startswith(("I need a function", "Could you implement", "Give me")) for text in trained)


def test_every_answer_obeys_its_own_instruction():
    functions = chapter6.functions_in(MODULE)
    for seed in range(30):
        names = ["one", "two", "three", "four", "self", "a", "return_it", "x9"] if seed > 9 else ()
        for kind, made, turns in chapter6.make_tasks(functions * 3 + MORE, seed % 2, seed, names):
            assert [turn["role"] for turn in turns] == ["user", "assistant"]
            if kind != "purpose":                              # a docstring may well share no word with its function
                assert chapter6.judge_answer(kind, made, turns[1]["content"])[1], (made, turns)
            if kind == "write":
                assert turns[1]["content"].splitlines()[0][4:-1] in turns[0]["content"]


# ---- Loss mask and packing

def test_exact_labels_of_a_small_conversation(tokenizer):
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
             {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    ids, learnt = chapter5.encode_chat(tokenizer, turns)
    rows = chapter6.pack([(ids, learnt)], len(ids) + 2, 0, 0)
    x, y, documents = rows[0].tolist()
    end = tokenizer.special_tokens["<|im_end|>"]
    encode = lambda text: tokenizer.encode(text)
    assert [i for i in y if i != IGNORED] == [*encode("b"), end, *encode("d"), end]
    assert x == ids[:-1] + [0, 0, 0] and y[-3:] == [IGNORED] * 3 and documents == [0] * (len(ids) - 1) + [-1] * 3
    for place, target in enumerate(y):
        assert target in (IGNORED, ids[place + 1] if place + 1 < len(ids) else IGNORED)


def examples(tokenizer, count):
    chooser = random.Random(1)
    return [chapter5.encode_chat(tokenizer, [{"role": "user", "content": "x" * chooser.randint(1, 9)},
                                             {"role": "assistant", "content": f"{number} answers"}]) for number in range(count)]


def test_packing_keeps_every_conversation_whole(tokenizer):
    given = examples(tokenizer, 30)
    rows = chapter6.pack(given, 100, 7, "seed")
    found = []
    for x, y, documents in rows.tolist():
        assert len(x) == 100
        for number in range(max(documents) + 1):
            places = [i for i, d in enumerate(documents) if d == number]
            assert places == list(range(places[0], places[-1] + 1))
            found.append(([x[i] for i in places], [y[i] for i in places]))
    expected = [(ids[:-1], [t if l else IGNORED for t, l in zip(ids[1:], learnt[1:])]) for ids, learnt in given]
    assert sorted(found) == sorted(expected)
    assert len(rows) < len(given)                                          # several share a row


def test_packed_conversations_do_not_see_each_other(tokenizer):
    model = tiny_model(tokenizer.vocab_size, context=100).eval()
    (ids, learnt), other = examples(tokenizer, 2)
    alone, together = chapter6.pack([(ids, learnt)], 100, 0, 0), chapter6.pack([(ids, learnt), other], 100, 0, 0)
    assert len(together) == 1
    with torch.no_grad():
        both, one = (model(rows[:, 0], rows[:, 2]) for rows in (together, alone))
    start = next(i for i in range(100) if together[0, 0, i:i + len(ids) - 1].tolist() == ids[:-1])
    assert torch.allclose(both[0, start:start + len(ids) - 1], one[0, :len(ids) - 1], atol=1e-5)


def test_batches_are_a_function_of_the_step(tokenizer):
    given = examples(tokenizer, 30)
    forwards, jumping = chapter6.packed_batches(given, 2, 100, 0, 5), chapter6.packed_batches(given, 2, 100, 0, 5)
    seen = [forwards(step) for step in range(12)]
    for step in (11, 3, 0):
        assert all(torch.equal(a, b) for a, b in zip(jumping(step), seen[step]))


def test_a_batch_without_targets_gives_no_nan(tokenizer):
    model = tiny_model(tokenizer.vocab_size)
    ids = torch.zeros(2, 8, dtype=torch.long)
    loss = chapter4.Objective(model)(ids, torch.full_like(ids, IGNORED), torch.full_like(ids, -1))
    loss.backward()
    assert loss.item() == 0 and all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


# ---- LoRA

def test_lora_changes_nothing_at_first_and_trains_adapters_only(tokenizer):
    model = tiny_model(300)
    ids = torch.randint(300, (2, 9))
    before = model(ids)
    chapter6.add_lora(model, 2)
    assert torch.equal(model(ids), before)
    model(ids).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained and all(name.endswith((".a", ".b")) for name in trained)
    assert all(p.requires_grad == (name in trained) for name, p in model.named_parameters())


def test_merged_equals_unmerged(tokenizer, tmp_path):
    model = chapter6.tiny = tiny_model(300).eval()
    chapter6.add_lora(model, 2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".b"):
                p.normal_()
    ids = torch.randint(300, (2, 9))
    merged = chapter6.merge_lora(model)
    assert set(merged.state_dict()) == set(tiny_model(300).state_dict())
    assert torch.allclose(merged(ids), model(ids), atol=1e-5)
    merged.save(tmp_path)
    assert torch.equal(chapter3.GPT.load(tmp_path)(ids), merged(ids))


def test_chat_tokens_are_added_to_a_foreign_pair():
    tokenizer = chapter1.train_bpe(["abcabc"] * 5, 260, special_tokens=("<|endoftext|>",))
    model = tiny_model(tokenizer.vocab_size)
    grown, with_chat = chapter6.with_chat_tokens(model, tokenizer)
    assert set(with_chat.special_tokens) == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    assert grown.config.vocab_size >= with_chat.vocab_size == tokenizer.vocab_size + 2
    ids = torch.tensor([tokenizer.encode("abcab")])
    assert torch.allclose(grown(ids)[..., :tokenizer.vocab_size], model(ids), atol=1e-6)
    assert with_chat.encode("abcab") == tokenizer.encode("abcab")
    assert not grown.training                                  # no dropout while instructions are counted


# ---- Conversations of one's own

def test_three_forms_are_read(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [{"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            {"instruction": "q", "context": "more", "response": "a"}, {"instruction": "q", "input": "", "output": "ä"}]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    read = chapter6.read_conversations(path)
    assert [turns[-1]["content"] for turns in read] == ["a", "a", "ä"]
    assert read[1][0]["content"] == "q\n\nmore" and read[2][0]["content"] == "q"
    path.write_text(json.dumps(rows), encoding="utf-8")
    assert chapter6.read_conversations(path) == read


def test_every_bad_line_is_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    good = b'{"instruction": "q", "output": "a"}'
    bad = [b'{"instruction": "q", "output": ""}', b'not json', b'\xff\xfe', b'{"messages": [{"role": "robot", "content": "x"}]}',
           b'{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}', b'[1, 2]', b'{"instruction": "q"}',
           b'{"messages": [{"role": "user", "content": "x"}]}', b'{"messages": []}', b'{"instruction": null, "output": "a"}',
           b'{"messages": [{"role": "system", "content": null}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}']
    path.write_bytes(b"\n".join([good, *bad, good]))
    with pytest.raises(chapter1.CourseError) as caught:
        chapter6.read_conversations(path)
    for number in range(2, 2 + len(bad)):
        assert f"line {number}:" in str(caught.value)
    assert "line 1:" not in str(caught.value) and f"line {len(bad) + 2}:" not in str(caught.value)
    assert len(chapter6.read_conversations(path, tolerated=len(bad))) == 2       # as for a published file


@pytest.mark.parametrize("content", [b"", b"\n\n", b"[", b"{}"])
def test_a_file_without_conversations_is_one_clear_error(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(chapter1.CourseError):
        chapter6.read_conversations(path)


def test_own_conversations_are_parted_and_long_ones_left_out(tokenizer, tmp_path, capsys):
    rows = [{"instruction": f"q{n}", "output": f"answer {n}"} for n in range(40)] + [{"instruction": "q", "output": "long " * 100}]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = chapter6.Config(conversations=str(tmp_path / "mine.jsonl"), out=str(tmp_path))
    learn, held = chapter6.read_examples(config, {"train": [], "val": []}, [], tokenizer, 64)
    texts = [{tokenizer.decode(ids) for ids, _ in part} for part in (learn, held)]
    assert [len(part) for part in texts] == [37, 3] and not texts[0] & texts[1]
    assert "1 longer than the context of 64" in capsys.readouterr().out


# ---- What is reported, and what is kept

def test_obedience_is_counted_by_kind(tokenizer, monkeypatch):
    end, said = tokenizer.special_tokens["<|im_end|>"], [ADD, ADD, "x = 1", "a, b=1"]      # the second never ends
    tasks = [(kind, function(ADD), [{"role": "user", "content": f"task {n}" + "x" * (n % 2)}])
             for n, kind in enumerate(("write", "write", "write", "parameters"))]

    def scripted(model, prompts, settings, ends, vocab):
        numbers = [int(tokenizer.decode(prompt).split("task ")[1][0]) for prompt in prompts]
        written = [tokenizer.encode(said[n]) + [end] * (n != 1) for n in numbers]
        for step in range(max(map(len, written))):
            yield {i: (ids[step], None) for i, ids in enumerate(written) if step < len(ids)}

    monkeypatch.setattr(chapter5, "generate", scripted)
    counts, answers = chapter6.count_obeyed(None, tokenizer, tasks, None, {end}, {ADD})
    assert answers == said
    assert dict(counts["write"]) == dict(tasks=3, ends=2, code=3, parses=3, obeys=1, copied=2)
    assert dict(counts["parameters"]) == dict(tasks=1, ends=1, code=0, parses=0, obeys=1, copied=0)
    assert dict(counts["all"]) == dict(tasks=4, ends=3, code=3, parses=3, obeys=2, copied=2)


def test_held_out_loss_by_its_definition(tokenizer):
    rows, model = chapter6.pack(examples(tokenizer, 30), 100, 0, 0), tiny_model(tokenizer.vocab_size, context=100).eval()
    bytes_of, learnt = torch.arange(tokenizer.vocab_size) % 7 + 1.0, rows[:, 1] != chapter6.IGNORED
    with torch.no_grad():
        log_p = model(rows[:, 0], rows[:, 2]).log_softmax(-1)[learnt]
    nats = -log_p.gather(1, rows[:, 1][learnt][:, None]).sum().item()
    machine = chapter4.Machine(torch.device("cpu"), "fp32", False)
    loss, bits, _ = chapter6.judge_rows(model, machine, rows, bytes_of)
    assert loss == pytest.approx(nats / int(learnt.sum()), rel=1e-4)
    assert bits == pytest.approx(nats / 0.6931472 / bytes_of[rows[:, 1][learnt]].sum().item(), rel=1e-4)


@pytest.mark.parametrize("rank", [0, 2])
def test_tuning_stopped_and_resumed_equals_unbroken(tokenizer, tmp_path, monkeypatch, rank):
    monkeypatch.setattr(chapter4, "draw_curves", lambda logs, path: None)

    def tuned(folder, saved=None, **more):
        model = tiny_model(tokenizer.vocab_size)
        if rank:
            chapter6.add_lora(model, rank)
        config = chapter6.Config(steps=4, micro_batch=2, eval_every=2, optimizer="adamw" if rank else "muon", **more)
        chapter4.train(model, chapter6.packed_batches(examples(tokenizer, 30), 2, 64, 0, 1), config,
                       chapter4.Machine(torch.device("cpu"), "fp32", False), tmp_path / folder,
                       lambda model: (1.0, 1.0, ""), chapter6.merge_lora, None, saved)
        return chapter6.merge_lora(model).state_dict()

    whole = tuned("whole")
    with pytest.raises(SystemExit):
        tuned("parts", stop_at=3)
    parts = tuned("parts", torch.load(tmp_path / "parts" / "resume.pt", weights_only=True))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    before = tiny_model(tokenizer.vocab_size).state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, whole[name])}
    assert changed and (not rank or all("_proj" in name for name in changed))    # adapters touch linear layers only


def test_flags_are_those_of_chapter_4_and_more():
    shown = subprocess.run([sys.executable, str(ROOT / "06_finetune.py"), "--help"], capture_output=True, text=True, check=True).stdout
    for flag in ("--lora-rank", "--conversations", "--show-mask", "--resume", "--init", "--micro-batch"):
        assert flag in shown
