"""Chapter 6: one reading for each task, a judge that is right and cannot be hurt, packing and LoRA that change nothing."""
import dataclasses
import doctest
import json
import math
import os
import random
import re
import signal
import sys
import time
from importlib import import_module

import numpy
import pytest
import torch

chapter1, chapter2, chapter3, chapter4, chapter5, chapter6 = map(
    import_module, ("01_tokenizer", "02_data", "03_model", "04_train", "05_sample", "06_finetune"))
CourseError, IGNORED = chapter1.CourseError, chapter4.IGNORED
SYLLABLES = "ba ke lo mu ni po ra se ti vu wa zo".split()
MADE_UP = [first + second for first in SYLLABLES for second in SYLLABLES]
WORDS, NEW_WORDS = ([word for word in MADE_UP if chapter6.is_held_out(word) == new] for new in (False, True))


def own_task(source, **types):
    """Return a task of one's own: its reference, and the types of its parameters."""
    lines = [line.removeprefix("    ") for line in source.splitlines()[1:]]
    return chapter6.Task(source[4:source.index("(")], types, lines, instruction=source)


NUMBER = own_task("def f(n):\n    return n * 2", n="number")
LIST = own_task("def f(x):\n    return sorted(x)", x="list")
QUESTION = own_task("def f(x):\n    return [item > 0 for item in x]", x="list")


def verdicts_of(tasks, answers):
    return chapter6.judge(tasks, answers, [True] * len(tasks))


def test_doctests_and_the_interval_by_hand():
    result = doctest.testmod(chapter6)
    assert result.attempted > 0 and result.failed == 0
    assert chapter6.interval(95, 100) == pytest.approx(1.96 * math.sqrt(97 / 104 * 7 / 104 / 104))
    assert 0 < chapter6.interval(150, 150) < 0.04 < 0.09 < chapter6.interval(50, 100)


# ---- The judge
def test_verdicts():
    table = [
        (NUMBER, "pass", ["return n + n", "twice = n; twice += n; return twice", "return sum([n, n])  # as well", "len = sum; return len([n, n])"]),
        (NUMBER, "pass", ["if n > 0:\n        return n + n\n    return 2 * n"]),
        (NUMBER, "wrong value", ["return n * 2.0", "return n ** 2", "return [n * 2]", "return", "return 'pass'"]),     # 2.0 is not 2
        (NUMBER, "error", ["return m * 2", "return n[0]", "return n / 0"]),
        (NUMBER, "no parse", ["return n * 2)", "return n\0", "return '\ud800'", "return " + "(" * 900 + "n", "return " + "-" * 900 + "n"]),
        (LIST, "wrong value", ["return x", "x += [1]; return sorted(x)", "return reversed(sorted(x))", "x[0:0] = x; return x"]),
        (QUESTION, "wrong value", ["return [int(item > 0) for item in x]", "return (item > 0 for item in x)"]),        # 1 is not True
        (own_task("def f(x):\n    return x[0]", x="list"), "pass", ["return x[0] if x else None"])]         # [] is no case
    rows = [(task, f"{task.header}\n    {body}", verdict) for task, verdict, bodies in table for body in bodies]
    headers = ["g(n)", "f(m)", "f()", "f(n, m)", "f(*n)", "f(n=1)", "f(n, /)", "f(n: int)", "f(n: print(1))", "f(n, m=print(1))", "f(n) -> int"]
    others = [f"def {header}:\n    return n * 2" for header in headers] + ["", "return n * 2", "f = 1", "class f:\n    n = 1", "x" * 2000]
    others += [f"async {NUMBER.source}", f"@print\n{NUMBER.source}", f"import os\n{NUMBER.source}", f"{NUMBER.source}\nprint('pass')"]
    rows += [(NUMBER, answer, "wrong header") for answer in [*others, "def f(n):\n    return g(n)\ndef g(n):\n    return f(n)"]]
    tasks, answers, expected = zip(*rows)
    got = verdicts_of(tasks, answers)
    assert got == list(expected), [row for row in zip(answers, got, expected) if row[1] != row[2]]
    assert chapter6.judge([NUMBER], [NUMBER.source], [False]) == ["no end"] and chapter6.judge([], [], []) == []
    assert {*expected, "no end", "not allowed"} == set(chapter6.VERDICTS)


LOOP = "total = {}\n    for item in {}:\n        {}\n    return total"
FORBIDDEN = re.split(r"\s+\|\s+|\n\s+", r"""import os; return os.getpid() | from os import system; return n | return __import__('os') | return n.__class__
    return ().__class__.__mro__[1] | return f.__globals__ | return f.__code__.co_consts | return getattr(n, 'real') | return setattr(f, 'a', 1)
    return vars() | return globals() | return eval('n') | exec('n = 1'); return n | return open('/etc/passwd').read() | print('pass'); return n * 2
    return exit() | return type(n) | global m; m = n; return n * 2 | nonlocal n; return n | return (lambda: n)() | return (n, n) | g = lambda: n; return g()
    raise SystemExit | assert n; return n * 2 | del n; return 1 | yield n | yield from f(n) | return (n := 5) | return [*n] | return min(*[n])
    return f'{n.__class__}' | return '{0.__class__}'.format(n) | return '%999999999d' % n | return '\x25999999999d' % n | return str(n).center(9999)
    return 'x' * 10000000000 | return 'x' * 10 ** 10 | return 10 ** 10 ** 10 | return 1 << 9999 | return n * 2 or exit() | return {n: n} | return iter(int, 1)
    while True: n += 1 | with n: return n | class A: n = 1 | def g(): return n * 2 | async def g(): return n""") + [
    "try:\n        return n * 2\n    except:\n        return 1", "def g():\n        return n * 2\n    return g()", f"return '{'a' * 900}'",
    "@f\n    def g(m=f(n)):\n        return m\n    return g()", "return " + "9" * 900, "return n * 2\n    #" + "x" * 10**6]
CONTAINED = re.split(r"\s+\|\s+|\n\s+", r"""return 1j * n | return ... | return b'a' * n | return 1e308 * 1e308 | return range(n) | return sorted | return 'a'.join
    return 'pass\npass' | return '\ud800' | return (a for a in range(9)) | return None.count | str.lower = n; return n | f.count = f; return n
    return __builtins__ | return __builtins__['len'] | __builtins__['repr'] = len; return n | sum = n; return sum(n) | return f(n - 1) + f(n - 2)
    g = f; return g(n) | return [f][0](n) | return sorted([n], key=f)[0] | int = f; return int(n) | return n ** True | return 9 ** n | n **= 9999; return n
    return sum(**n) | __debug__ = n; return n | return [0] * 10 ** 9 | return [0] * 9999 * 9999 * 9999 | return list(range(99999999))
    return ('x' * 9999).join(['y'] * 99999999) | return ('x' * 9999999).replace('x', 'y' * 999999) | return int('9' * 99999)""") + [
    LOOP.format("'x'", "range(99)", "total += total"), LOOP.format("[n]", "range(99999)", "total = [total]"), "return " + "n + " * 250_000 + "n",
    LOOP.format("[n]", "range(9999)", "total = (a for a in total)"), f"return {'[' * 90}n{']' * 90}", "return " + "f if n else " * 90 + "n"]
ENDLESS = [
    "return 9 ** 9 ** 9", "return (((9 ** 9) ** 9) ** 9) ** 9 ** 9", "return sum(range(9999 * 9999 * 9999))", "return all(a >= 0 for a in range(9999 ** 9))",
    "return [a for a in range(9999) for b in range(9999) for c in range(9999)]", LOOP.format("9", "range(99)", "total *= total"),
    LOOP.format("[1]", "total", "total += [item]"), "return " + "sum([1 for a in range(9999) if " * 8 + "1" + "])" * 8]


def test_hostile_answers_are_contained_and_cost_only_themselves():
    resource = pytest.importorskip("resource")                 # not on Windows
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert len(FORBIDDEN) > 50 and len(CONTAINED) > 35
    for bodies in (FORBIDDEN, *[[body] for body in CONTAINED]):    # of the forbidden ones, nothing is run
        start = time.monotonic()
        got = verdicts_of([NUMBER] * len(bodies), [f"def f(n):\n    {body}" for body in bodies])
        assert not {"pass", "no end", "wrong header"} & set(got) and (bodies is not FORBIDDEN or set(got) == {"not allowed"}), [*zip(bodies, got)]
        assert time.monotonic() - start < 8, bodies
    start = time.monotonic()
    answers = [answer for body in ENDLESS for answer in (f"def f(n):\n    {body}", NUMBER.source)]
    got = verdicts_of([NUMBER] * len(answers), answers)
    assert got[1::2] == ["pass"] * len(ENDLESS) and set(got[::2]) <= {"error", "not allowed"}, got
    assert time.monotonic() - start < 8 * len(ENDLESS)
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss   # a child begins as a copy of this process
    assert used <= max(before, own) or used * (1 if sys.platform == "darwin" else 1024) < 600 * 2**20


# ---- The grammar
CHANGES = {  # in a reference's body: what else may stand there
    r"\d+": [lambda found: str(int(found[0]) + 1), lambda found: str(abs(int(found[0]) - 1)), lambda found: found[0] + "9"],
    r"'(\w)": [r"'e", r"'b\1"], r" \+ ": [" - ", " * "], r" - ": [" + ", " * "], r" \* ": [" + ", " // "], r" % ": [" // ", " * "],
    r" \*\* ": [" * ", " + "], r" < ": [" <= ", " > "], r" <= ": [" < ", " >= "], r" > ": [" >= ", " < "], r" >= ": [" > ", " <= "],
    r" == ": [" != ", " >= "], r"(?<!for item) in (?!.*:$)": [" not in "], r"(\(|return |\[)-": [r"\1"], r" \+= ": [" -= ", " = "],
    r"(\w+) (\+|-|\*|%|\*\*|<|>|<=|>=|==) (\w+)": [r"\3 \2 \1"], r"return (.+) if (.+) else (.+)": [r"return \3 if \2 else \1"],
    r"\bmax\(": ["min("], r"\bmin\(": ["max("], r"\bsorted\(": ["reversed(", "list("], r"\babs\(": ["("], r"\blen\(": ["max("],
    r"\bsum\(": ["max("], "upper": ["lower"], "lower": ["upper"], "startswith": ["endswith"], "count": ["index"], "replace": ["index"],
    r"\[:(.*?)\]": [r"[\1:]"], r"\[(-\w+):\]": [r"[:\1]", r"[\1::2]"], r"\[::-1\]": ["", "[::-2]"], r" if [^\]]+\]": ["]"],
    r"for item in (.+):": [r"for item in (\1)[1:]:"], r"return (.+)": [r"return [\1]", r"return str(\1)", r"return int(\1)", r"return not \1"]}


def near_misses(source):
    """Return all functions with one operator, constant, name, slice or order of operands changed."""
    header, _, body = source.partition("\n")
    changed = {}
    for pattern, others in CHANGES.items():
        for found in re.finditer(pattern, body, flags=re.M):
            for other in others:
                new = other(found) if callable(other) else found.expand(other)
                changed[f"{header}\n{body[:found.start()]}{new}{body[found.end():]}"] = True
    return [answer for answer in changed if answer != source]


def results_of(task, source, cases):
    """Return what a function returns for lists of arguments, as text; None where it raises."""
    space, results = {}, []
    exec(source, space)
    for arguments in cases:
        try:
            results.append(repr(space[task.name](*arguments)))
        except Exception:
            results.append(None)
    return results


def is_the_same(task, answer):
    """Tell whether an answer cannot be told from the reference on 600 inputs of our own."""
    chooser, cases = random.Random(1), []
    numbers, letters = list(range(-30, 31)), "aeiouAEIOU bcdzXY"
    for _, value in task.constants:
        numbers += [int(value) + step for step in range(-2, 3)] if value.isdigit() else []
        letters += value[1:-1] * 4
    for _ in range(600):
        few, size = chooser.sample(numbers, 6), chooser.choice([0, 1, 2, 3, 5, 9, 20])
        values = {"list": chooser.choices(few, k=size), "text": "".join(chooser.choices(letters, k=size))}
        cases.append([values.get(kind, few.pop()) for kind in task.kinds.values()])
    pairs = zip(results_of(task, task.source, cases), results_of(task, answer, cases))
    return all(expected in (None, got) for expected, got in pairs)


def undetected(tasks):
    """Return (near misses that pass although they mean another thing, number of near misses)."""
    pairs = [(task, answer) for task in tasks for answer in near_misses(task.source)]
    passed = [pair for pair, verdict in zip(pairs, verdicts_of(*zip(*pairs))) if verdict == "pass"]
    return [(task.source, answer) for task, answer in passed if not is_the_same(task, answer)], len(pairs)


@pytest.fixture(scope="module")
def drawn():
    return chapter6.draw_tasks(WORDS, 8000, 5)


def test_every_reference_passes(drawn):
    """Of every entry, every pair, and some hundred besides, on ten cases at least."""
    some = [*{tuple(task.entries): task for task in drawn}.values(), *drawn[:200]]
    assert {task.entries[0] for task in some} == {entry.code for entry in chapter6.ENTRIES if entry.kind != "property"}
    assert len(some) > 450
    assert set(verdicts_of(some, [task.source for task in some])) == {"pass"}
    for task in some[::3]:
        results = results_of(task, task.source, chapter6.draw_arguments(task))
        assert len(results) - results.count(None) >= 10, task.source


def test_near_misses_fail(drawn):
    """All of each entry, property, and question in a condition. Of two in one, a few escape: an item more before the largest."""
    each, nested = {}, [task for task in drawn if any(line.startswith("part = ") for line in task.lines)]
    for task in drawn:
        if task not in nested:
            each.setdefault((*task.entries, *[code for code, _ in task.constants]), task)
    for tasks, allowed in ((each.values(), 0), (nested[:60], 0.005)):
        wrong, count = undetected(tasks)
        assert count > 500 and len(wrong) <= allowed * count, "\n".join(map(str, wrong))


def test_one_description_has_one_reading(drawn):
    """Nobody is told the types: equal words, with other names, must mean equal code."""
    meanings = {}
    for task in drawn:
        words = re.findall(r"'[a-z]'|\w+", task.description)
        order = [word for word in dict.fromkeys(words) if word in task.kinds]
        assert len(order) == len(task.kinds), task
        new = {name: f"p{number}" for number, name in enumerate(order)}
        said, meant = [re.sub(r"'[a-z]'|\w+", lambda found: new.get(found[0], found[0]), text)
                       for text in (task.description, task.source.partition("\n")[2])]
        assert meanings.setdefault(said, meant) == meant, (task, meanings[said])
        assert not re.search(r"[{}|]|  |HEADER|ANSWER", task.instruction), task.instruction
        assert task.source.startswith(task.header + "\n") and task.conversation[1]["content"] == task.source
    assert len(meanings) > 2000


# ---- What is held out
def is_phrased(task, phrasings):
    """Tell whether an instruction is one of those that some lines of phrasings allow."""
    slots = {"HEADER": task.header[4:-1], "ANSWER": task.description}
    for line in phrasings.strip().splitlines():
        line = re.sub(r"\{([^{}]*)\}", r"(?:\1)", re.sub(r"[.?!]", r"\\\g<0>", line))
        if re.fullmatch(re.sub("|".join(slots), lambda found: re.escape(slots[found[0]]), line), task.instruction, flags=re.I):
            return True
    return False


def test_noise_takes_the_place_of_any_word_but_header_and_description():
    plain, noisy = [chapter6.draw_tasks(WORDS, 300, 4, noise=noise) for noise in ((), WORDS)]
    rests = []
    for task in plain + noisy:
        header, text = task.header[4:-1].casefold(), task.instruction.casefold()
        assert header in text and task.description.casefold() in text
        rests.append(re.findall("[a-z]+", text.replace(task.description.casefold(), "").replace(header, "")))
    assert all(is_phrased(task, chapter6.PHRASINGS) for task in plain) and not {*WORDS} & {*sum(rests[:300], [])}
    untouched = sum(not {*WORDS} & {*rest} for rest in rests[300:])
    nothing_else = sum({*rest} <= {*WORDS} for rest in rests[300:])
    assert 40 < untouched < 150 and 90 < nothing_else < 220    # a quarter; a half


def test_held_out_tasks_differ_from_training_in_one_way_only(drawn):
    sets = chapter6.held_out_tasks(WORDS, NEW_WORDS, 150, 1000)
    assert sets["new names"][:20] == chapter6.held_out_tasks(WORDS, NEW_WORDS, 20, 1000)["new names"]      # by the seed alone
    assert list(sets) == ["new names", "new constants", "new combinations", "new phrasings"]
    names_learnt = {name for task in drawn for name in (*task.name.split("_"), *task.kinds)}
    constants_learnt = {constant for task in drawn for constant in task.constants}
    pairs_learnt = {tuple(task.entries) for task in drawn}
    more = [*drawn, *chapter6.draw_tasks(WORDS, 12000, 6)]
    seen_alone = {value for task in more for _, value in task.constants} | {part for pair in pairs_learnt for part in pair}
    assert all(is_phrased(task, chapter6.PHRASINGS) for task in drawn[:100])
    for label, task in [(label, task) for label, tasks in sets.items() for task in tasks]:
        names = {*task.name.split("_"), *[name for name in task.kinds if len(name) > 1]}               # besides, x and y may come again
        assert names <= (set(NEW_WORDS) - names_learnt if label == "new names" else set(WORDS))
        new = {constant for constant in task.constants if chapter6.is_held_out(*constant)}
        assert bool(new) == (label == "new constants") and not new & constants_learnt, task
        for _, value in task.constants:
            assert re.search(rf"(?<!\w){value}(?!\w)", task.description), f"{value} cannot be seen in {task}"
        is_new = tuple(task.entries) not in pairs_learnt and len(task.entries) == 2 and chapter6.is_held_out(*sorted(task.entries))
        assert is_new == (label == "new combinations")
        assert {value for _, value in task.constants} | set(task.entries) <= seen_alone      # what is new is that they meet
        phrasings = [chapter6.PHRASINGS, chapter6.NEW_PHRASINGS]
        is_new = label == "new phrasings"
        assert is_phrased(task, phrasings[is_new]) and (not is_new or not is_phrased(task, phrasings[0])), task
    assert {label: len(tasks) for label, tasks in sets.items()} == dict.fromkeys(sets, 150)


def test_names_to_learn_with_hold_nothing_that_is_held_out(monkeypatch):
    words = "of Build total sum even least " + " ".join(MADE_UP)
    monkeypatch.setattr(chapter1, "read_source", lambda source: [f"{number} return {words}" for number in range(60)] + ["rare"])
    tokenizer = chapter1.train_bpe([f" {words}"] * 3, 400)
    to_learn, new, noise = chapter6.split_names(tokenizer)
    assert {*new} <= {*NEW_WORDS} and len(new) > len(NEW_WORDS) / 2 and {*WORDS} <= {*to_learn} and len({*to_learn}) == len(to_learn)
    assert not {*to_learn} & {*new, "part", "total", "sum", "of", "return", "even", "rare"}
    known = {i for name in to_learn for i in tokenizer.encode(f" {name}({name}_{name}")}
    assert all(known.issuperset(tokenizer.encode(f" {name}({name}_{name}")) for name in new)
    made_up = {*to_learn} - {*WORDS}
    for token in tokenizer.tokens:                             # in some made-up name, unless that is a held-out one
        if re.fullmatch(b" ?[a-z]{3,}", token):
            assert sum(token.decode().strip() in name for name in made_up) > 0, token
    assert (to_learn, new, noise) == chapter6.split_names(tokenizer)           # made up, but the same each time
    assert {"of", "Build", "return", *WORDS} <= {*noise} and not {"total", "least", *new} & {*noise}
    assert noise.count("of") > 10 * noise.count("rare")        # as often as it stands in a module


# ---- A conversation as a batch
@pytest.fixture(scope="module")
def tokenizer():
    return chapter1.train_bpe([f"{task.instruction}\n{task.source}" for task in chapter6.draw_tasks(WORDS, 100, 3)], 400)


def tiny_model(vocab_size=400, **changes):
    torch.manual_seed(0)
    return chapter3.GPT(chapter3.GPTConfig(**{"vocab_size": vocab_size, "context": 128, "layers": 2, "heads": 2, "width": 32, **changes}))


def say(*texts, roles=("user", "assistant")):
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def examples(tokenizer, count):
    return [chapter5.encode_chat(tokenizer, say("x" * (1 + 5 * number % 9), f"{number} answers")) for number in range(count)]


def test_exact_labels_and_packing_that_keeps_every_conversation_whole(tokenizer):
    ids, learnt = chapter5.encode_chat(tokenizer, [{"role": "system", "content": "s"}, *say("a", "b", "c", "d")])
    end = tokenizer.special_tokens[chapter1.CHAT_END]
    columns = chapter6.columns_of(ids, learnt, 3)
    x, y, documents = zip(*columns)
    assert list(x) == ids[:-1] and documents == (3,) * len(x)
    assert [i for i in y if i != IGNORED] == [*tokenizer.encode("b"), end, *tokenizer.encode("d"), end]
    assert all(target in (IGNORED, ids[position + 1]) for position, target in enumerate(y))
    x, y, documents = chapter6.fill_up([columns], len(columns) + 2, 7)[0].tolist()
    assert x[-2:] == [7, 7] and y[-2:] == [IGNORED] * 2 and documents[-3:] == [3, -1, -1]
    given = examples(tokenizer, 30)
    sequences, found = chapter6.pack(given, 100, 7), []
    for x, y, documents in sequences.tolist():
        for number in sorted({*documents} - {-1}):
            positions = [i for i, document in enumerate(documents) if document == number]
            assert positions == list(range(positions[0], positions[-1] + 1))
            found.append([(x[i], y[i], 0) for i in positions])
    assert sorted(found) == sorted(chapter6.columns_of(*example) for example in given)     # each once, none cut
    assert sequences.shape[1:] == (3, 100) and len(sequences) <= len(given) / 2
    batch = chapter6.batches_of(given, 2, 100, 0)           # a batch is a function of its step
    assert all(torch.equal(a, b) and a.shape == (2, 100) for a, b in zip(batch(1), batch(1), strict=True))
    steps = torch.cat([torch.stack(batch(step), 1) for step in range(len(sequences) // 2)])
    assert len(steps.unique(dim=0)) == len(steps)              # none comes twice before all have come
    assert chapter6.batches_of(given[:1], 4, 100, 0)(3)[0].unique(dim=0).shape == (1, 100)      # then again, as often as needed


def test_a_piece_of_text_goes_with_each_15_examples_and_is_learnt_whole():
    given = [([number, number], [False, True]) for number in range(45)]
    mixed = chapter6.with_text(given, numpy.arange(1000, 2000), 8, 3)
    pieces = [ids for ids, learnt in mixed if len(ids) == 9 and all(learnt)]
    assert [example for example in mixed if len(example[0]) == 2] == given and len(pieces) == 3
    assert all(ids == list(range(ids[0], ids[0] + 9)) and ids[0] >= 1000 for ids in pieces)
    assert [place for place, (ids, _) in enumerate(mixed) if len(ids) == 9] == [0, 16, 32]
    assert chapter6.with_text(given, numpy.arange(9), 8, 3) == given         # too short a text is left out


def test_packed_equals_one_conversation_a_sequence(tokenizer):
    """The sum of losses and its gradients, to the rounding of float32; without targets, 0 and no nan."""
    given, results = examples(tokenizer, 9), []
    packed = chapter6.pack(given, 100, 7)
    alone = chapter6.fill_up([chapter6.columns_of(*example) for example in given], 100, 7)
    for sequences in (packed, alone, chapter6.fill_up([chapter6.columns_of([1, 2, 3], [False] * 3)], 100, 7)):
        model = tiny_model(tokenizer.vocab_size)
        x, y, documents = sequences.unbind(1)
        loss = chapter4.loss_sums(model(x, documents), y).sum()
        loss.backward()
        results.append((loss.item(), {name: p.grad for name, p in model.named_parameters()}))
    (loss, gradients), (other_loss, other_gradients), (nothing, zeros) = results
    assert len(packed) < len(alone) and loss == pytest.approx(other_loss, rel=1e-5) and nothing == 0
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, other_gradients[name], rtol=1e-3, atol=1e-4) and not zeros[name].any(), name


# ---- LoRA and new tokens
def test_lora_equals_its_formula_and_its_merged_model():
    model, ids = tiny_model().eval(), torch.randint(400, (2, 9))
    before = model(ids)
    chapter6.add_lora(model, 2)
    assert torch.equal(model(ids), before)                     # B is 0: nothing has changed yet
    model(ids).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith("layers.") and name.endswith((".a", ".b")) for name in trained)
    with torch.no_grad():
        for name in trained:
            model.get_parameter(name).normal_(std=0.3)
    layer = model.layers[0].mlp.down_proj
    parts = layer.parametrizations.weight
    x = torch.randn(5, layer.weight.shape[1])
    assert torch.allclose(layer(x), chapter6.lora_formula(x, parts.original, parts[0].a, parts[0].b), atol=1e-4)
    merged = chapter6.merge_lora(model)
    assert set(merged.state_dict()) == set(tiny_model().state_dict())
    assert torch.allclose(merged(ids), model(ids), atol=1e-4) and not torch.allclose(merged(ids), before, atol=0.1)
    elsewhere = tiny_model().to("meta")
    chapter6.add_lora(elsewhere, 2)
    assert {p.device.type for p in elsewhere.parameters()} == {"meta"}


# ---- The script, with tiny models in this process
@pytest.fixture
def tune(tmp_path, tokenizer, monkeypatch, capsys):
    """Return a function that tunes a tiny model with some flags; it returns what was printed."""
    monkeypatch.setattr(chapter4, "draw_curves", lambda logs, path: None)
    monkeypatch.setattr(chapter6, "split_names", lambda tokenizer: (WORDS, NEW_WORDS, WORDS))
    chapter4.save_folder(tiny_model(tokenizer.vocab_size), tokenizer, tmp_path / "base", [0])
    usual = "--device cpu --precision fp32 --no-compile --batch-tokens 256 --lr 0.01 --matrix-lr 0.02".split()

    def run(*flags):
        argv = [*([] if "--resume" in flags else usual), *map(str, flags), "--out", str(tmp_path)]
        chapter6.main(chapter1.parse_flags(chapter6.Config, "", argv, chapter6.defaults_for))
        return capsys.readouterr().out
    return run


def answer_of(folder, question):
    """Return (greedy answer, whether it ended)."""
    model, tokenizer, ends = chapter5.open_model(folder, "cpu")
    answers, verdicts = chapter6.answer_tasks(model, tokenizer, [dataclasses.replace(NUMBER, instruction=question)], ends)
    return answers[0], verdicts[0] != "no end"


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


PAIRS = [{"instruction": "Who are you?", "output": "A small model."}, {"messages": say("Sing!", "La \u2028 la.")},
         {"messages": [{"role": "system", "content": "Be kind."}, *say("Bye.", "See you.")]}]


@pytest.mark.parametrize("count", [1, 3])
def test_very_few_conversations_of_ones_own_are_learnt(count, tune, tmp_path):
    printed = tune("--conversations", write_lines(tmp_path / "mine.jsonl", PAIRS[:count]), "--steps", 30 + 20 * count, "--eval-every", 20)
    assert "too few" in printed and "pass@1" not in printed    # the course's tasks are not counted for them
    assert answer_of(tmp_path / "chat", "Who are you?") == ("A small model.", True)
    assert count == 1 or answer_of(tmp_path / "chat", "Sing!") == ("La \u2028 la.", True)


@pytest.mark.parametrize("rank, tied", [(0, True), (8, True), (8, False)])
def test_chat_tokens_are_added_to_a_foreign_pair_and_learnt(rank, tied, tune, tmp_path):
    foreign = chapter1.train_bpe(["Who are you? A small model. user assistant"] * 5, 280, special_tokens=("<|endoftext|>",))
    model = tiny_model(foreign.vocab_size, tied=tied).eval()
    chapter4.save_folder(model, foreign, tmp_path / "foreign", [0])
    mine = write_lines(tmp_path / "mine.jsonl", PAIRS[:1])
    printed = tune("--init", tmp_path / "foreign", "--conversations", mine, "--lora-rank", rank, "--steps", 40, "--eval-every", 20)
    assert "added ['<|im_start|>', '<|im_end|>'] to" in printed
    tuned = chapter3.GPT.load(tmp_path / "chat").state_dict()
    kept = {name for name, old in model.state_dict().items() if torch.equal(tuned[name][:len(old)], old)}
    assert rank == 0 or all("norm" in name for name in kept)     # adapters and the rows of tokens learn
    assert rank > 0 or not kept
    assert answer_of(tmp_path / "chat", "Who are you?") == ("A small model.", True)


def test_chapter_4s_text_is_found_by_the_tokenizer_it_was_encoded_with(tune, tmp_path):
    foreign = chapter1.train_bpe(["Who are you? A small model. user assistant"] * 5, 280, special_tokens=("<|endoftext|>",))
    chapter4.save_folder(tiny_model(foreign.vocab_size), foreign, tmp_path / "foreign", [0])
    text = "a small model " * 400
    chapter2.write_tokens([("train", text), ("val", text)], foreign, tmp_path / "data")
    mine = write_lines(tmp_path / "mine.jsonl", PAIRS[:1])
    printed = tune("--init", tmp_path / "foreign", "--conversations", mine, "--steps", 2, "--eval-every", 2)
    assert "added" in printed and "2 examples in sequences" in printed and "bits per byte after tuning" in printed


def test_a_held_out_conversation_may_be_the_longest(tune, tokenizer, tmp_path):
    conversations = [say("Who?", f"number {number}") for number in range(20)]
    _, (held_out,) = chapter6.split_off(conversations)
    held_out[1]["content"] = "long " * 90
    chapter4.save_folder(tiny_model(tokenizer.vocab_size, context=512), tokenizer, tmp_path / "base", [0])
    mine = write_lines(tmp_path / "mine.jsonl", [{"messages": messages} for messages in conversations])
    printed = tune("--conversations", mine, "--steps", 1, "--eval-every", 1)
    assert "left out" not in printed and int(re.search(r"sequences of (\d+)", printed)[1]) > 180


@pytest.mark.parametrize("rank", [0, 2])
def test_tuning_stopped_and_resumed_equals_an_unbroken_one(rank, tune, tmp_path, monkeypatch):
    def stop(*inputs, surprise=chapter4.surprise):
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGINT))
        return surprise(*inputs)

    def checkpoint():
        return torch.load(tmp_path / "chat" / "resume.pt", weights_only=True)
    flags = ("--lora-rank", rank, "--examples", 60, "--tasks", 0, "--steps", 8, "--eval-every", 4)
    tune(*flags)
    whole, sent = checkpoint()["model"], []
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(chapter4, "surprise", stop)
        tune(*flags)
    assert len(checkpoint()["log"]) < 8
    tune("--resume")
    parts = checkpoint()
    assert len(parts["log"]) == 8 and all(torch.equal(whole[name], value) for name, value in parts["model"].items())


def test_show_mask_stops_and_a_run_prints_its_table(tune, tmp_path):
    assert re.search(r"\[<\|im_end\|>\]\s+\d+ of \d+ tokens are learnt", tune("--show-mask", "--examples", 5))
    assert not (tmp_path / "chat").exists()
    printed = tune("--examples", 60, "--tasks", 1, "--steps", 2, "--eval-every", 2)
    assert all(label in printed for label in (*chapter6.held_out_tasks(WORDS, NEW_WORDS, 0, 0), "all", "--chat", *chapter6.VERDICTS))


# ---- Conversations of one's own
def test_own_conversations_are_parted_and_left_out_where_too_long(tokenizer, capsys):
    conversations = [say(f"q{number}", f"answer {number}") for number in range(41)]
    learnt, held_out = chapter6.split_off(conversations)
    assert len(held_out) >= 2 and sorted(map(str, learnt + held_out)) == sorted(map(str, conversations))
    assert "too few" not in capsys.readouterr().out
    both, length = [say("q", "a"), say("q", "a" * 99)], len(chapter5.encode_chat(tokenizer, say("q", "a"))[0])
    assert len(chapter6.encode_fitting(both, tokenizer, length - 1)) == 1 and "left out" in capsys.readouterr().out
    with pytest.raises(CourseError):
        chapter6.encode_fitting(both, tokenizer, length - 2)


# ---- Counting
def test_answers_are_cut_at_their_end_and_kept_apart(tokenizer, monkeypatch):
    tasks, script = chapter6.draw_tasks(WORDS, 12, 9), {}
    end = tokenizer.special_tokens[chapter1.CHAT_END]
    for task in tasks:                                         # the first never ends; after their end, the others babble
        prompt = chapter5.render_chat(tokenizer, task.conversation[:1])
        script[tuple(prompt)] = tokenizer.encode(task.source) + [end] * (task != tasks[0]) + [65] * 200

    def generate(model, prompts, config, vocab_size):
        assert len({len(prompt) for prompt in prompts}) == 1 and config.temperature == 0
        for step in range(config.max_tokens):
            yield [script[tuple(prompt)][step] for prompt in prompts], None
    monkeypatch.setattr(chapter5, "generate", generate)
    answers, verdicts = chapter6.answer_tasks(None, tokenizer, tasks, {end})
    assert verdicts == ["no end"] + ["pass"] * 11 and list(answers[1:]) == [task.source for task in tasks[1:]]
