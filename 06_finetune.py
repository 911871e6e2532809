"""Chapter 6 · Fine-tuning: from a model that continues text to one that does what it is told.

The base model has only ever continued text. Now it reads conversations, written as one text with
marks for who speaks (the ChatML template), and some of chapter 4's text, so that less is
forgotten. Each conversation asks for a small function, made by a grammar: so there are as many as
we like, and a program can judge any answer by running it. Of a conversation only the answer counts
in the loss (what users ask is not for the model to guess), and its end mark, to learn when to stop:

    <|im_start|>user Write f(x), the square of x.<|im_end|> <|im_start|>assistant def f...<|im_end|>
    ----------------------- read, but not learnt --------------------------------- ---- learnt -----

Run:    python 06_finetune.py                              tunes out/base, writes out/chat
        python 06_finetune.py --show-mask                  what is learnt of one (with noise words)
        python 06_finetune.py --conversations mine.jsonl   your own questions and answers
        python 06_finetune.py --lora-rank 8                trains thin adapters, not all weights
Prints: how many answers, run on test inputs, return what they should, and what went wrong (pass@1:
        the share of tasks whose first answer passes); what is left of chapter 4's skill
Source: Ouyang et al. 2022 (instruction tuning), Hu et al. 2021 (LoRA), OpenAI 2023 (ChatML),
        Chen et al. 2021 (pass@1)
"""
import ast
import builtins
import json
import keyword
import math
import random
import re
import string
import subprocess
import sys
import zlib
from collections import Counter, namedtuple
from dataclasses import dataclass, field, replace
from importlib import import_module
from itertools import chain
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import parametrize

chapter1 = import_module("01_tokenizer")
chapter2 = import_module("02_data")
chapter3 = import_module("03_model")
chapter4 = import_module("04_train")
chapter5 = import_module("05_sample")
CourseError = chapter1.CourseError
IGNORED = chapter4.IGNORED

# Legend
#   example    (ids, learnt) of a conversation, a list of messages: see chapter 5's encode_chat
#   entry      a line of the grammar below
#   task       an instruction, and the reference: a function that does what it asks for
#   held out   in no task to learn from: a name, constant of an entry, pair of entries, phrasing
#   verdict    what became of an answer: "pass" if it returns what the reference returns
#   N  sequences in all, R of a step     T  tokens of a sequence
# Tools, at the file's end: your own conversations, which names are held out, how an answer is run.


# ---- A conversation as a batch, by its definition ------------------------------------------------
# Chapter 5's encode_chat gives its ids, and `learnt`, the loss mask: for each, whether it counts in
# the loss (the answer and its end mark do).
def columns_of(ids, learnt, document=0):
    """Return for each position but the last a column: (id, target, number of the document).
    A target is the next id where that is learnt, else IGNORED; the last id has no next one.

    >>> columns_of([7, 8, 9], [False, False, True])
    [(7, -100, 0), (8, 9, 0)]
    """
    targets = [i if is_learnt else IGNORED for i, is_learnt in zip(ids, learnt)]
    return [(i, target, document) for i, target in zip(ids, targets[1:])]


def fill_up(sequences, T, filler):
    """Return lists of columns as a tensor (N, 3, T): ids, targets, documents; what a list lacks to
    T is filled with any id, never learnt. By the definition, a list holds one conversation."""
    filled = [columns + [(filler, IGNORED, -1)] * (T - len(columns)) for columns in sequences]
    return torch.tensor(filled).transpose(1, 2)                # (N, T, 3) -> (N, 3, T)


# ---- For real: several conversations in a sequence -----------------------------------------------
def pack(examples, T, filler):
    """Join examples [(ids, learnt)] to sequences, as with one in each most would be filler; return
    fill_up's tensor. An example's number, as document, keeps it apart: chapter 3's who_sees hides
    all others; and with RoPE only distances count, so it does not matter where one begins."""
    sequences = []
    for document, example in enumerate(examples):
        columns = columns_of(*example, document)
        # Only the last eight are looked at: with all, it would take long and hardly fill more.
        with_room = [sequence for sequence in sequences[-8:] if len(sequence) + len(columns) <= T]
        if with_room:
            with_room[0].extend(columns)
        else:
            sequences.append(columns)
    return fill_up(sequences, T, filler)


def batches_of(examples, R, T, filler):
    """Return batch(step) -> ids, targets, documents, (R, T) each: a pure function of the step."""
    sequences = pack(examples, T, filler)                      # (N, 3, T)

    def batch(step):
        rows = torch.arange(step * R, (step + 1) * R) % len(sequences)         # then from the first
        return sequences[rows].unbind(1)                       # (R, T) each
    return batch


def with_text(examples, tokens, T, seed):
    """Return examples with a piece of chapter 4's text, learnt whole, before each 15 of them. Being
    long, it is a quarter of what counts in the loss."""
    if len(tokens) <= T + 1:
        return examples
    mixed = []
    for i in range(0, len(examples), 15):
        piece, _ = chapter2.get_batch(tokens, i // 15, 1, T + 1, seed)     # (1, T + 1): T columns
        ids = piece[0].tolist()
        mixed += [(ids, [True] * len(ids)), *examples[i:i + 15]]
    return mixed


def show_mask(tokenizer, ids, learnt):
    """Print a conversation token by token; what is learnt is in brackets."""
    for i, is_learnt in zip(ids, learnt):
        piece = tokenizer.decode([i])
        print(f"[{piece}]" if is_learnt else piece, end="")
    print(f"{sum(learnt)} of {len(ids)} tokens are learnt")


# ---- LoRA: thin adapters instead of all weights --------------------------------------------------
# The rank of a matrix is how many directions it tells apart: one, if all rows are multiples of one.
# To tune, a change of low rank often does: B A, with B (out, r) and A (r, in), has rank r at most,
# and r (in + out) weights instead of in x out. A large model needs memory for fewer gradients and
# averages; at this size it saves neither time nor memory.
def lora_formula(x, weight, a, b):
    """Return what a linear layer with an adapter, a (r, in) and b (out, r), computes."""
    return x @ weight.T + (x @ a.T) @ b.T        # (T, in) @ (in, r) @ (r, out) -> (T, out)


class LoRA(nn.Module):
    """The same as a parametrization: torch calls `forward(weight)` whenever `layer.weight` is read,
    so that the model of chapter 3 need not change."""

    def __init__(self, weight, rank):
        super().__init__()
        outputs, inputs = weight.shape
        a = torch.randn(rank, inputs, device=weight.device) / math.sqrt(inputs)
        self.a = nn.Parameter(a)                               # (r, in)
        # B A = 0: no change yet. Were A 0 as well, neither would ever get a gradient.
        self.b = nn.Parameter(a.new_zeros(outputs, rank))      # (out, r)

    def forward(self, weight):
        return weight + self.b @ self.a                        # (out, in) + (out, r) @ (r, in)


def add_lora(model, rank):
    """Freeze a model, and give an adapter to the weight of each linear layer of its blocks."""
    model.requires_grad_(False)
    for layer in model.layers.modules():
        if isinstance(layer, nn.Linear):
            parametrize.register_parametrization(layer, "weight", LoRA(layer.weight, rank))


@torch.no_grad()
def merge_lora(model):
    """Return a plain model, the adapters added into its weights."""
    merged = chapter3.GPT(model.config)
    for name, weight in merged.state_dict().items():           # `weight` shares its memory
        layer, _, attribute = name.rpartition(".")             # "layers.0.mlp.up_proj", "weight"
        weight.copy_(getattr(model.get_submodule(layer), attribute))           # weight + B A
    return merged


# ---- Tasks that can be checked -------------------------------------------------------------------
# An entry of the grammar has a kind, code, a description of it. A task is made of one, or of two:
# `max(N, X)`, with `abs(X)` as its X, gives
#     Write top(x, y), which returns the larger of x and the absolute value of y.
#     def top(x, y):
#         part = abs(y)
#         return max(x, part)
# {a|b} is a or b; "/" parts the lines of a loop, between "total = 0" and "return total". Capitals
# are slots, not sizes; each slot of the code stands once in the description:
#   N M number, L list, T text      a parameter
#   X number, Y list, Z text        another entry, or a parameter
#   K number, S small one           a constant, or a parameter
#   W number                        another entry, a constant or a parameter
#   P property, Q question          another entry; a property is of an `item`, never alone
#   C letter                        a constant
# No slot takes a kind with a star: "the square of x plus 7" would have two readings.
GRAMMAR = """
number    | N + X                     | the {sum|total} of N and X
number    | N - X                     | the difference {of|between} N and X
number    | N * X                     | the product of N and X
number    | max(N, X)                 | the {larger|greater|bigger|maximum} of N and X
number    | min(N, X)                 | the {smaller|lesser|minimum} of N and X
number    | abs(N - X)                | the {distance|absolute difference} {between|of} N and X
number    | N % S                     | the remainder {of N divided by S|when N is divided by S}
number*   | N + W                     | {N plus W|N increased by W}
number*   | N - W                     | {N minus W|N decreased by W}
number*   | N * W                     | {N times W|N multiplied by W}
number    | X ** 2                    | the square of X
number    | abs(X)                    | the absolute value of X
number    | sum(Y)                    | the {sum|total} of {|the items of |all elements in }Y
number    | max(Y)                    | the {largest|biggest|greatest} {item|element} {of|in} Y
number    | min(Y)                    | the {smallest|lowest} {item|element} {of|in} Y
number    | len(Y)                    | the number of {items|elements} {of|in} Y
number    | Y[0]                      | the first {item|element} {of|in} Y
number    | Y[-1]                     | the last {item|element} {of|in} Y
number    | len(Z)                    | {the length of|the number of characters in} Z
number*   | Z.count(C)                | {how often C occurs in|how many times C is in} Z
property  | item % 2 == 0             | even
property  | item % 2 == 1             | odd
property  | item > 0                  | positive
property  | item < 0                  | negative
property  | item % S == 0             | divisible by S
property  | item > K                  | {greater|larger|more} than K
property  | item < K                  | {less|smaller} than K
property  | item >= K                 | at least K
property  | item <= K                 | at most K
question  | N % 2 == 0                | whether N is even
question  | N % 2 == 1                | whether N is odd
question  | N % S == 0                | whether N is divisible by S
question  | N > 0                     | whether N is positive
question  | N < 0                     | whether N is negative
question  | N >= K                    | whether N is at least K
question  | N <= K                    | whether N is at most K
question  | N > W                     | whether N is {greater|larger|more} than W
question  | N < W                     | whether N is {less|smaller} than W
question  | N == W                    | whether N {equals|is equal to} W
question  | N in Y                    | whether N is {in|one of} Y
question  | Z == Z[::-1]              | whether Z {is a palindrome|reads the same backwards}
question  | T.startswith(C)           | whether T {starts|begins} with C
question  | C in T                    | whether T {contains|has} C
condition | N if Q else M             | N if Q, {otherwise|else} M
list      | sorted(Y)                 | the sorted {items|elements} of Y
list      | Y[::-1]                   | the reversed {items|elements} of Y
list      | Y[:S]                     | the first S {items|elements} {of|in} Y
list      | Y[-S:]                    | the last S {items|elements} {of|in} Y
list*     | [item for item in L if P] | {the|all} {items|elements} {of|in} L that are P
list*     | [item * S for item in L]  | {each|every} {item|element} {of|in} L times S
list*     | [item + S for item in L]  | {each|every} {item|element} {of|in} L plus S
list      | [item ** 2 for item in Y] | the squares of {the|all} {items|elements} {of|in} Y
text      | Z.upper()                 | the upper case of Z
text      | Z.lower()                 | the lower case of Z
text      | Z[::-1]                   | the reverse of Z
text      | Z[:S]                     | the first S {characters|letters} {of|in} Z
text      | Z[-S:]                    | the last S {characters|letters} {of|in} Z
text*     | Z * S                     | S copies of Z
text*     | T + Z                     | {T followed by Z|T joined with Z}
loop | for item in L:/    if P:/        total += 1 | how many {items|elements} {of|in} L are P
loop | for item in L:/    if P:/        total += item | the sum of the items {of|in} L that are P
loop | for item in Z:/    if item.lower() in 'aeiou':/        total += 1 | the number of vowels in Z
"""
PHRASINGS = """
{Write|Define|Create} {a|the} {|Python }function {|called |named }HEADER that returns ANSWER.
{Please|Now} {write|define|create} {|a function |the function }HEADER {that|which} gives ANSWER.
{Can|Could} you {write|define|make} {|me |a function }HEADER{ that|, which} returns ANSWER?
{I|We} {need|want|would like} {|a function |the function }HEADER{ that|: it|, it} computes ANSWER.
{Write|Define|Code|Give me} HEADER{, which|: it| so that it|; it|. It} returns ANSWER.
{Write|Create|Make} {a|the} function HEADER {to return|to get|for|returning} ANSWER.
{The|A} function HEADER {should|must|has to|is to} {return|give} ANSWER.
{Return|Give back|Compute} ANSWER {in|with|by} {a|the} function HEADER.
{My program|Our module} {needs|lacks} HEADER{, which|: it|. It} {returns|calculates} ANSWER.
{Let|Make|Have} HEADER {return|give} ANSWER.
{Task|To do|Exercise}: {|a function |write }HEADER{ that returns|, returning|:} ANSWER.
{How|In what way} {do|can|would} {I|you|we} write HEADER to {give|get} ANSWER?
"""
NEW_PHRASINGS = """
Show me a function HEADER whose result is ANSWER.
Add HEADER to the program; calling it yields ANSWER.
Help me with HEADER, a function that works out ANSWER.
What I am looking for is HEADER, and it should produce ANSWER.
Build a function HEADER that finds ANSWER.
It would be nice to have HEADER for ANSWER.
"""


# ---- How a task is drawn -------------------------------------------------------------------------
Entry = namedtuple("Entry", "kind code words")
ENTRIES = [Entry(*re.split(r" +\| +", line)) for line in GRAMMAR.strip().splitlines()]
KINDS = {"N": "number", "M": "number", "X": "number", "W": "number", "K": "number", "S": "number",
         "L": "list", "Y": "list", "T": "text", "Z": "text", "C": "letter",
         "P": "property", "Q": "question"}
NESTED = {"X": 0.8, "Y": 0.8, "Z": 0.8, "W": 0.4, "P": 1, "Q": 1}  # how often one is put in
CONSTANTS = {"K": range(101), "W": range(101), "S": range(2, 11), "C": string.ascii_lowercase}
SLOT = rf"\b[{''.join(KINDS)}]\b"


@dataclass
class Task:
    """What `draw_task` makes: an instruction, and the lines of its reference."""
    name: str
    kinds: dict = field(default_factory=dict)  # {parameter: its kind}
    lines: list = field(default_factory=list)  # of the function, below its header
    entries: list = field(default_factory=list)  # the code of its entry, or of two in one
    constants: list = field(default_factory=list)  # (code of an entry, value in it)
    description: str = ""
    instruction: str = ""

    @property
    def header(self):
        return f"def {self.name}({', '.join(self.kinds)}):"

    @property
    def source(self):
        return "\n    ".join([self.header, *self.lines])

    @property
    def conversation(self):
        return [{"role": "user", "content": self.instruction},
                {"role": "assistant", "content": self.source}]


def vary(text, chooser):
    """Choose one of each {a|b}."""
    return re.sub(r"\{([^{}]*)\}", lambda found: chooser.choice(found[1].split("|")), text)


def fill(text, values):
    """Put values for the slots of a text: "max(N, X)" and {"N": "x", "X": "y"} give "max(x, y)"."""
    return re.sub(SLOT, lambda found: values[found[0]], text)


def compose(entry, task, parameters, chooser):
    """Return (code, description) of an entry, its slots filled: by a parameter's name, a constant,
    or another entry, whose code becomes a line `part = ...`. The task notes what it is made of."""
    task.entries.append(entry.code)
    words = vary(entry.words, chooser)
    codes, texts = {}, {}
    for slot in re.findall(SLOT, words):
        may_nest = len(task.entries) == 1                      # until a second entry is in
        if may_nest and chooser.random() < NESTED.get(slot, 0):
            others = [e for e in ENTRIES if e.kind == KINDS[slot] and e != entry]
            code, text = compose(chooser.choice(others), task, parameters, chooser)
            texts[slot] = text.removeprefix("whether ")        # "x if y is even, otherwise z"
            codes[slot] = code
            if slot not in "PQ":                               # P and Q stay within the line
                task.lines.append(f"part = {code}")
                codes[slot] = "part"
        elif slot == "C" or (slot in CONSTANTS and chooser.random() < 0.8):
            codes[slot] = texts[slot] = repr(chooser.choice(CONSTANTS[slot]))
            task.constants.append((entry.code, codes[slot]))
        else:
            codes[slot] = texts[slot] = parameters.pop()
            task.kinds[codes[slot]] = KINDS[slot]
    return fill(entry.code, codes), fill(words, texts)


def phrase(task, phrasing, noise, chooser):
    """Return an instruction: a phrasing with the task's header and description in it. With noise,
    "Write a function f(x) that gives ..." becomes "Bytes a turbo f(x) with raise ...". So a model
    learns to look for header and description: without noise, half as many new phrasings pass."""
    share = chooser.choice([0, 0.5, 1, 1])                     # of words that are noise
    header = task.header[4:-1]                                 # without "def " and the colon
    fixed = {"HEADER": header, "ANSWER": task.description}
    words = re.split(r"\b", vary(phrasing, chooser))           # words, and what stands between them
    for i, word in enumerate(words):
        if word in fixed:
            words[i] = fixed[word]
        elif noise and word.isalpha() and chooser.random() < share:
            words[i] = " ".join(chooser.choices(noise, k=chooser.choice([1, 1, 2])))
    return "".join(words)


def draw_task(names, phrasings, noise, chooser):
    """Return a Task: an entry or two, some of the names, a phrasing. noise: words that replace some
    of the phrasing's, so that the model does not lean on them; see `phrase`."""
    entry = chooser.choice([entry for entry in ENTRIES if entry.kind != "property"])
    name, second, *parameters = chooser.sample(names, 8)
    if chooser.random() < 0.15:
        name = f"{name}_{second}"
    if chooser.random() < 0.25:                                # single letters, as in f(x)
        parameters = chooser.sample(string.ascii_lowercase, 6)
    task = Task(name)
    # This notes entries and parameters' kinds in the task, and adds `part = ...` to its lines.
    code, task.description = compose(entry, task, parameters, chooser)
    if chooser.random() < 0.3:                                 # parameters in another order
        task.kinds = dict(chooser.sample(list(task.kinds.items()), len(task.kinds)))
    if entry.kind == "loop":
        task.lines += ["total = 0", *code.split("/"), "return total"]
    else:
        task.lines.append(f"return {code}")
    task.instruction = phrase(task, chooser.choice(phrasings), noise, chooser)
    return task


# ---- What is held out ----------------------------------------------------------------------------
def is_held_out(*what):
    """Tell whether a name, a constant of an entry, or a pair of entries is held out: by a hash."""
    return zlib.crc32(repr(what).encode()) % 8 == 0            # an eighth of all


def draw_tasks(names, count, seed, phrasings=PHRASINGS, new="", noise=()):
    """Draw `count` tasks. Of constants and pairs, just `new` is held out in them ("": nothing)."""
    chooser = random.Random(seed)
    sentences = phrasings.strip().splitlines()
    wanted = (new == "constant", new == "pair")
    tasks = []
    while len(tasks) < count:
        task = draw_task(names, sentences, noise, chooser)
        has_constant = any(is_held_out(*constant) for constant in task.constants)
        has_pair = len(task.entries) == 2 and is_held_out(*sorted(task.entries))
        if (has_constant, has_pair) == wanted:
            tasks.append(task)
    return tasks


def held_out_tasks(names, new_names, count, seed):
    """Return {what is new in them: tasks}: one thing in each; all else training has. No noise."""
    return {"new names": draw_tasks(new_names, count, seed),
            "new constants": draw_tasks(names, count, seed + 1, new="constant"),
            "new combinations": draw_tasks(names, count, seed + 2, new="pair"),
            "new phrasings": draw_tasks(names, count, seed + 3, NEW_PHRASINGS)}


# ---- The judge runs the answer -------------------------------------------------------------------
# What a model writes is a stranger's code. Only what `is_allowed` allows is run: no import, no
# `while`, no attribute but methods of texts and lists. And that (by `run_answer`) in a process of
# its own, with little time and memory.
VERDICTS = ("no end", "no parse", "wrong header", "not allowed", "error", "wrong value", "pass")
SYNTAX = set("""Return Assign AugAssign For If IfExp Name Load Store keyword BinOp UnaryOp BoolOp
    Compare Add Sub Mult Div FloorDiv Mod Pow USub Not And Or Eq NotEq Lt LtE Gt GtE In NotIn List
    Subscript Slice ListComp GeneratorExp comprehension""".split())
METHODS = set("count endswith index join lower replace split startswith strip upper".split())
BUILTINS = "abs all any bool int len list max min range reversed sorted str sum".split()


def is_allowed(node):
    """Tell whether a node of an answer's syntax tree may be run."""
    if isinstance(node, ast.Call):
        # x.upper(): `x.upper` is a node of its own, and is looked at, too.
        return isinstance(node.func, ast.Attribute) or getattr(node.func, "id", "") in BUILTINS
    if isinstance(node, ast.Attribute):
        return node.attr in METHODS
    if isinstance(node, ast.Constant):                         # "%9999d" % 1 would be a long text
        return len(repr(node.value)) <= 8 and "%" not in repr(node.value)
    return type(node).__name__ in SYNTAX


def verdict_on(task, answer, has_ended):
    """Return the verdict on an answer: first it is read, and run only if all in it is allowed."""
    if not has_ended:
        return "no end"
    if len(answer) > 2000:
        return "not allowed"
    try:
        statements = ast.parse(answer).body
        text = ast.unparse(statements)                         # with the usual spaces
    except Exception:                                          # which, depends on Python's version
        return "no parse"
    if len(statements) != 1 or text.partition("\n")[0] != task.header:
        return "wrong header"
    large_power = re.search(r"\*\*(?! \d\b)", text)           # x ** 3 is fine; no x ** 12, x ** y
    nodes = chain.from_iterable(map(ast.walk, statements[0].body))
    if large_power or not all(map(is_allowed, nodes)):
        return "not allowed"
    return run_answer(task, answer)


def judge(tasks, answers, ended):
    """Return the verdict on each answer; ended: whether it came to an end by itself."""
    with ThreadPool() as pool:                                 # several answers run at once
        return pool.starmap(verdict_on, zip(tasks, answers, ended))


# ---- Counting ------------------------------------------------------------------------------------
def answer_tasks(model, tokenizer, tasks, ends, temperature=0.0):
    """Return (answers, verdicts) of a model."""
    settings = chapter5.Config(max_tokens=100, temperature=temperature)
    prompts = [chapter5.render_chat(tokenizer, task.conversation[:1]) for task in tasks]
    answers, ended = [], []
    for ids in chapter5.generate_all(model, prompts, settings, ends, tokenizer.vocab_size):
        ended.append(ids[-1] in ends)
        answers.append(tokenizer.decode(ids[:-1] if ended[-1] else ids))
    return answers, judge(tasks, answers, ended)


def interval(passed, count):
    """Return the half width of a share's 95% interval (Agresti and Coull 1998: two more of each,
    as else it would be 0 where all pass): of 95 among 100, 0.05."""
    share = (passed + 2) / (count + 4)
    return 1.96 * math.sqrt(share * (1 - share) / (count + 4))


def show_table(results):
    """Print {label: verdicts}: the share that passes, and how many got each verdict."""
    print(f"\n{'':26}{'tasks':>6}  {'pass@1':10}" + "".join(f"{name:>13}" for name in VERDICTS))
    for label, verdicts in results.items():
        passed = verdicts.count("pass")
        count = len(verdicts)
        share = f"{passed / count:.0%} ± {100 * interval(passed, count):.0f}"
        counts = "".join(f"{verdicts.count(name):13}" for name in VERDICTS)
        print(f"{label:26}{count:6}  {share:10}{counts}")


def show_results(model, tokenizer, new_tasks, ends):
    """Run the answers to {what is new: tasks}; print two of each, and the table."""
    results = {}
    for new, tasks in new_tasks.items():
        answers, results[new] = answer_tasks(model, tokenizer, tasks, ends)
        for task, answer in zip(tasks[:2], answers):
            print(f"\n> {task.instruction}\n{answer}")
    results["all"] = sum(results.values(), [])
    show_table(results)


# ---- The script ----------------------------------------------------------------------------------
@dataclass
class Config(chapter4.TrainingConfig):
    init: str = ""  # another model's folder, to tune at gentler rates (default: out/base)
    steps: int = 800  # updates of the weights
    batch_tokens: int = 4096  # tokens that one step reads: questions, answers, text, filler
    lr: float = 1e-3  # AdamW's; with chapter 4's 6e-3, the embeddings would forget
    matrix_lr: float = 0.014  # Muon's; more for the larger batch
    context: int = 0  # shorten what the model can look at, to save memory (0: leave it)
    conversations: str = ""  # instead of tasks: JSON lines of your own, or dolly
    examples: int = 45000  # tasks to learn from
    lora_rank: int = 0  # train adapters of this rank, by AdamW; more change more (0: all weights)
    show_mask: bool = False  # print one training example with the learnt tokens marked, and stop
    tasks: int = 150  # held-out tasks of each sort whose answers are run (0: none)
    tasks_seed: int = 2031  # draws those; whoever tunes settings by them should then take another


def find_conversations(config, tokenizer):
    """Return (conversations to learn from, {what is new: held-out tasks}): your own have none."""
    if config.conversations:
        downloads = Path(config.out) / "downloads"
        return chapter2.open_conversations(config.conversations, downloads), {}
    names, new_names, noise = split_names(tokenizer)
    tasks = draw_tasks(names, config.examples, config.seed, noise=noise)
    new_tasks = held_out_tasks(names, new_names, config.tasks, config.tasks_seed)
    return [task.conversation for task in tasks], new_tasks


def main(config):
    """Tune, save, and run the answers to held-out tasks."""
    out = Path(config.out)
    folder = out / "chat"
    machine = chapter4.choose_machine(config)
    torch.manual_seed(config.seed)

    # 1. The model (on the CPU, as it may grow by marks that GPT-2 lacks); ids that end an answer.
    model, tokenizer, _ = chapter5.open_model(config.init or out / "base", "cpu", config.context)
    train_text = chapter2.matching_tokens(out / "data", "train", tokenizer)    # or empty
    val_text = chapter2.matching_tokens(out / "data", "val", tokenizer)
    model, tokenizer, added = chapter5.with_chat_tokens(model, tokenizer)
    model.to(machine.device)
    end = tokenizer.special_tokens[chapter1.CHAT_END]
    ends = {end, tokenizer.end} - {None}

    # 2. Conversations, a few held out for the loss; and tasks with something new, for pass@1.
    conversations, new_tasks = find_conversations(config, tokenizer)
    fitting = encode_fitting(conversations, tokenizer, model.config.context)
    examples, val_examples = split_off(fitting)
    if config.show_mask:
        return show_mask(tokenizer, *examples[0])
    longest = max(len(ids) for ids, _ in fitting)
    T = min(model.config.context, max(128, longest))           # no more: attention costs T x T
    val_sequences = pack(val_examples, T, end)                 # (N, 3, T)
    examples = with_text(examples, train_text, T, config.seed)

    # 3. Training, as in chapter 4.
    if config.lora_rank:
        config = replace(config, optimizer="adamw")            # as is usual for adapters
        add_lora(model, config.lora_rank)
        if added:                                              # the marks' rows are random
            model.embed_tokens.requires_grad_()
            (model.lm_head or model.embed_tokens).requires_grad_()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{len(examples):,} examples in sequences of {T}; {trained:,} parameters are trained")
    batch = batches_of(examples, max(1, config.batch_tokens // T), T, end)
    sizes = torch.from_numpy(chapter2.token_sizes(tokenizer, model.config.vocab_size))

    def measure(model):
        return chapter4.surprise(model, machine, val_sequences, sizes)

    def keep(model):
        if config.lora_rank:
            model = merge_lora(model)
        chapter4.save_folder(model, tokenizer, folder, sorted(ends))
        (folder / "chat_template.jinja").write_text(chapter5.CHAT_TEMPLATE, encoding="utf-8")

    chapter4.train(model, batch, config, machine, folder, measure, keep)

    # 4. What the best model can do now, and what it has forgotten.
    if machine.rank == 0:
        tuned, *_ = chapter5.open_model(folder, machine.device)
        if new_tasks and config.tasks:
            show_results(tuned, tokenizer, new_tasks, ends)
        if len(val_text) > tuned.config.context:
            _, bits = chapter4.evaluate(tuned, machine, val_text, sizes, config.eval_tokens)
            print(f"chapter 4's held-out text: {bits:.3f} bits per byte after tuning")
        print(f"saved {folder}; next: {chapter1.command('05_sample.py', config)} --chat")


# ---- Tools: flags, conversations, names ----------------------------------------------------------
def defaults_for(given):
    """Return the values of flags not given: of the run to resume, or rates for --init's weights."""
    if given.get("resume"):
        out = given.get("out", "out")
        return {**chapter4.read_checkpoint(Path(out) / "chat")["config"], "out": out}
    if given.get("init") and given.get("lora_rank"):
        return {"lr": 10 * chapter4.GENTLE["lr"]}              # adapters bear more (Schulman 2025)
    return chapter4.GENTLE if given.get("init") else {}


def encode_fitting(conversations, tokenizer, context):
    """Return [(ids, learnt)] of those that fit: cut short, they would teach never to end."""
    examples = [chapter5.encode_chat(tokenizer, messages) for messages in conversations]
    fitting = [example for example in examples if len(example[0]) <= context + 1]
    left_out = len(examples) - len(fitting)
    if left_out:
        print(f"left out, as longer than the context of {context}: {left_out:,} conversations")
    if not fitting:
        raise CourseError(f"no conversation fits the context of {context}: use shorter ones")
    return fitting


def split_off(examples):
    """Return (examples to learn from, some of the same sorts, to tell how well that goes)."""
    if len(examples) < 20:
        print(f"too few to hold some out ({len(examples)}): the loss below is of all")
        return examples, examples
    shuffled = random.Random(0).sample(examples, len(examples))
    cut = min(200, len(shuffled) // 20)
    return shuffled[cut:], shuffled[:cut]


def split_names(tokenizer):
    """Return (names to learn with, names held out, words for noise), from Python's train modules.
    Names are copied token by token, and a token never seen in a name is hard to copy. So there are
    made-up names to learn with, and only names whose tokens are in them are held out."""
    counts = Counter()
    for split, text in chapter1.split_documents(chapter1.read_source(["python"])):
        if split == "train":
            counts.update(re.findall(r"\b[A-Za-z]{2,10}\b", text))
    taken = {"part", *keyword.kwlist, *dir(builtins), *re.findall("[a-z]+", GRAMMAR + PHRASINGS)}
    words = [word for word in sorted(counts)
             if counts[word] > 20 and word not in taken and re.fullmatch("[a-z]{3,}", word)]
    held_out = list(filter(is_held_out, words))
    pieces = [token.decode().strip() for token in tokenizer.tokens
              if re.fullmatch(b" ?[a-z]+", token)]
    endings = random.Random(0).sample(pieces, len(pieces))     # each begins one name, and ends one
    made_up = map("".join, zip(pieces, endings))
    to_learn = sorted({*words, *made_up} - {*held_out} - taken)
    # Not used as noise: held-out names, as they would be learnt, and descriptions' longer words.
    not_noise = {*held_out, *re.findall("[a-z]{5,}", GRAMMAR)}
    noise = [word for word in counts.elements() if word not in not_noise]      # common ones often

    def tokens_of(name):                                       # with a space before it, and without
        return set(tokenizer.encode(f" {name}({name}"))

    known = set().union(*map(tokens_of, to_learn))
    return to_learn, [name for name in held_out if tokens_of(name) <= known], noise


# ---- Tools: running an answer beside its reference -----------------------------------------------
def draw_arguments(task):
    """Return lists of arguments for a task: of few different values, so that equal ones meet, and
    often near its constants. Else a near miss, > for >= say, would pass."""
    chooser = random.Random(task.instruction)
    pools = [range(-9, 10), range(-1, 3)]
    sizes = [0, 1, 2, 3, 5, 30]
    letters = string.ascii_lowercase + "aeiouAB    "
    for _, value in task.constants:
        if value.isdigit():
            near = range(int(value) - 1, int(value) + 2)
            pools += [near, near]                              # twice: more often
            sizes += near
        else:
            letters += value[1] * 5                            # value: a letter in quotes
    draws = []
    for _ in range(200):
        variety = chooser.choice([1, 2, 3, 4, 20])
        numbers = chooser.choices(chooser.choice(pools), k=variety)
        characters = chooser.choices(letters, k=variety)
        arguments = []
        for kind in task.kinds.values():
            size = chooser.choice(sizes)
            values = {"number": chooser.choice(numbers), "list": chooser.choices(numbers, k=size),
                      "text": "".join(chooser.choices(characters, k=size))}
            arguments.append(values[kind])
        draws.append(arguments)
    return draws


CHILD = """
import builtins, json, sys
try:
    import resource                              # not on Windows
    resource.setrlimit(resource.RLIMIT_CPU, (1, 1))                    # a second
    resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))         # bytes; macOS refuses
except (ImportError, ValueError, OSError):
    pass
reference, answer, name, allowed, draws = json.load(sys.stdin)

def results(source):
    space = {"__builtins__": {word: getattr(builtins, word) for word in allowed}}
    exec(source, space)
    for arguments in draws:
        try:
            yield repr(space[name](*arguments))  # as text, 1 is not True
        except Exception:
            yield "error"                        # a text would be "'error'"

verdict = "pass"
for expected, found in zip(results(reference), results(answer)):
    if expected != "error" and found != expected:      # an error is no case: x[0] of []
        verdict = "error" if found == "error" else "wrong value"
        break
print(verdict)
"""


def run_answer(task, answer):
    """Return the verdict on an answer: it is run beside the reference, in a process of its own."""
    job = json.dumps([task.source, answer, task.name, BUILTINS, draw_arguments(task)])
    try:
        child = subprocess.run([sys.executable, "-I", "-S", "-c", CHILD], input=job, timeout=9,
                               capture_output=True, text=True, encoding="utf-8")
    except subprocess.TimeoutExpired:
        return "error"
    return child.stdout.strip() or "error"       # nothing: it was ended, as it took too long


if __name__ == "__main__":
    chapter1.run(main, Config, __doc__, defaults_for)
