"""Chapter 6 · Fine-tuning: from a model that continues text to one that does what it is told.

The base model has only ever continued text. Now it reads conversations, written as one text with
marks for who speaks (the ChatML template), and learns to write the assistant's part. The loss is taken
on the answers alone, and on the mark that ends them, so that the model also learns when to stop:

    <|im_start|>user  Write the function add(a, b).<|im_end|>  <|im_start|>assistant  def add(a, b): ...<|im_end|>
    ..................... read, not learnt from ..............................................  ^^^ trained on ^^^

The conversations are made from Python's own library, so each answer can be checked by a program: does
it end, does it parse, has the function the name and the parameters that were asked for?

Run:    python 06_finetune.py                                  tunes out/base, writes out/chat
        python 06_finetune.py --show-mask                      shows one example, trained tokens marked
        python 06_finetune.py --conversations mine.jsonl       your own questions and answers
        python 06_finetune.py --lora-rank 8                    trains small adapters instead of all weights
Prints: obeyed instructions before and after, three answers, what was forgotten.
Writes: out/chat/ (for transformers, vLLM and 05_sample.py --chat), before_after.png.
Source: Ouyang et al. 2022 (instruction tuning), Hu et al. 2021 (LoRA), OpenAI (ChatML).
"""
import ast
import copy
import json
import math
import random
import re
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import parametrize

chapter1, chapter2, chapter3, chapter4, chapter5 = map(
    import_module, ("01_tokenizer", "02_data", "03_model", "04_train", "05_sample"))
CourseError, IGNORED = chapter1.CourseError, chapter4.IGNORED

# Legend
#   turn          {"role": "user", "content": text}; a conversation is a list of turns
#   instruction   what the user asks; answer: what the assistant should write
#   task          an instruction together with what a program needs to check the answer
#   R, T          rows of a step, tokens of a row


@dataclass
class Config(chapter4.TrainingConfig):
    """Training settings as in chapter 4, with other defaults, and what is new here."""
    init: str = ""  # folder with the model to tune, ours or any that chapter 3 opens (default: out/base)
    steps: int = 700  # updates of the weights
    batch_tokens: int = 2048  # tokens of a step, padding included
    micro_batch: int = 8  # rows at once in memory
    lr: float = 1e-3  # AdamW's learning rate: lower than in chapter 4, there is less to change
    matrix_lr: float = 0.005  # Muon's learning rate for matrices
    eval_every: int = 350  # steps between evaluations
    conversations: str = ""  # JSONL of your own, or dolly or alpaca (default: made from Python's library)
    lora_rank: int = 0  # train adapters of this rank instead of all weights (0: all weights)
    show_mask: bool = False  # print one training example with the trained tokens marked, and stop
    tasks: int = 200  # held-out instructions on which obedience is counted


# ---- Conversations from Python's own library -----------------------------------------------------

PHRASINGS = {  # kind: (phrasings to train on, phrasings kept for the test)
    "write": (("Write the function {signature}.", "Write a Python function {signature}.", "Define {signature}.",
               "Implement the function {signature}.", "Please write {signature}.", "Can you write {signature}?",
               "Code: {signature}.", "Write me the function {signature}, please."),
              ("I need a function {signature}.", "Could you implement {signature} for me?", "Give me {signature}.")),
    "parameters": (("List the parameters of this function:\n\n{source}", "Which parameters does this function have?\n\n{source}",
                    "{source}\n\nName the parameters."),
                   ("What are the parameters of this function?\n\n{source}",)),
    "purpose": (("What does this function do?\n\n{source}", "Explain this function in one sentence:\n\n{source}",
                 "{source}\n\nSay what it does."),
                ("Describe this function:\n\n{source}",)),
}


@dataclass(frozen=True)
class Function:
    """A function of a module: its parts as text, written by ast.unparse without comments or decorators."""
    name: str
    parameters: tuple                      # as written: ("self", "size=-1", "*args")
    body: str                              # indented lines, without the docstring
    purpose: str                           # first line of the docstring, or ""

    @property
    def signature(self):
        return f"{self.name}({', '.join(self.parameters)})"

    @property
    def source(self):
        return f"def {self.signature}:\n{self.body}"


def parameters_of(arguments):
    """Return the parameters of an ast.arguments as written, without annotations.

    >>> parameters_of(ast.parse("def f(a, b: int = 2, *, c): pass").body[0].args)
    ('a', 'b=2', '*', 'c')
    """
    arguments = copy.deepcopy(arguments)
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return tuple(filter(None, (part.strip() for part in ast.unparse(arguments).split(", "))))


def does_something(node):
    """Tell whether a function has a statement besides docstring, pass and ..., and does not loop on a line."""
    real = [s for s in node.body if not isinstance(s, ast.Pass) and not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    lines = Counter(line.strip() for line in ast.unparse(node).splitlines() if line.strip())
    return bool(real) and max(lines.values()) < 3


def functions_in(text):
    """Return the Functions of a module that are short enough to be answers."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and does_something(node):
            purpose = (ast.get_docstring(node) or "").split("\n")[0].strip()
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            source = "\n".join("    " + line for s in body for line in ast.unparse(s).splitlines())
            if body and len(source) < 360 and source.count("\n") < 12 and len(purpose) < 120:
                found.append(Function(node.name, parameters_of(node.args), source, purpose))
    return found


def library_functions():
    """Return {split: [Function]} of the standard library, whole modules held out as in chapter 1."""
    functions = defaultdict(dict)
    for split, text in chapter1.split_documents(filter(None, chapter1.read_source(["python"]))):
        functions[split].update(dict.fromkeys(functions_in(text)))
    return {split: list(found) for split, found in functions.items()}


def renamed(function, names, chooser):
    """Return the function under another name and with other parameters, the same throughout.

    A model that has seen each name once learns the names; one that sees names at random must copy.
    """
    words = [function.name] + [word for word in re.findall(r"\w+", " ".join(p.split("=")[0] for p in function.parameters)) if word != "self"]
    new = {word: chooser.choice(names) for word in words}
    swap = lambda text: re.sub(r"(?<![\w.'\"])[A-Za-z_]\w*", lambda match: new.get(match[0], match[0]), text)
    if len(set(new.values())) < len(new):
        return function
    return Function(new[function.name], tuple(map(swap, function.parameters)), swap(function.body), function.purpose)


def make_task(kind, function, phrasing, with_purpose):
    """Return (instruction, answer) of one kind about a function."""
    instruction = phrasing.format(signature=function.signature, source=function.source)
    if kind == "write":
        return instruction + (f" {function.purpose}" if with_purpose and function.purpose else ""), function.source
    return instruction, ", ".join(function.parameters) or "none" if kind == "parameters" else function.purpose


def library_conversations(functions, seed, copies=3):
    """Return conversations about functions: each in `copies` phrasings, most of them renamed."""
    chooser, conversations = random.Random(seed), []
    names = sorted({function.name for function in functions} | {
        p for function in functions for p in function.parameters if p.isidentifier() and p != "self"})
    for copy_number in range(copies):
        for function in functions:
            kind = chooser.choices(("write", "parameters", "purpose"), (6, 1, 1))[0]
            if kind == "purpose" and not function.purpose:
                kind = "write"
            shown = renamed(function, names, chooser) if copy_number and kind != "purpose" else function
            instruction, answer = make_task(kind, shown, chooser.choice(PHRASINGS[kind][0]), chooser.random() < 0.5)
            conversations.append([{"role": "user", "content": instruction}, {"role": "assistant", "content": answer}])
    return conversations


def held_out_tasks(functions, count, seed, phrasing):
    """Return tasks (kind, function, instruction) on the test split; (name, parameters) never occur in train."""
    chooser = random.Random(seed)
    known = {(function.name, function.parameters) for function in functions["train"]}
    fresh = [function for function in functions["test"] if (function.name, function.parameters) not in known]
    chooser.shuffle(fresh)
    tasks = []
    for i, function in enumerate(fresh):
        kind = ("write", "write", "write", "parameters", "purpose")[i % 5]
        if kind == "purpose" and not function.purpose:
            kind = "write"
        instruction, _ = make_task(kind, function, chooser.choice(PHRASINGS[kind][phrasing]), False)
        tasks.append((kind, function, instruction))
    return tasks[:count]


def judge_answer(kind, function, answer):
    """Return (parses, obeys) of an answer; see the chapter's docstring."""
    if kind == "parameters":
        return True, answer.strip() == (", ".join(function.parameters) or "none")
    if kind == "purpose":
        words = lambda text: {word for word in re.findall(r"[a-z]{4,}", text.lower())}
        return True, "\n" not in answer.strip() and bool(words(answer) & words(f"{function.purpose} {function.source}"))
    try:
        tree = ast.parse(answer)
    except (SyntaxError, ValueError, RecursionError):
        return False, False
    node = tree.body[0] if len(tree.body) == 1 else None
    return True, (isinstance(node, ast.FunctionDef) and node.name == function.name
                  and parameters_of(node.args) == function.parameters and does_something(node))


# ---- Conversations of one's own ------------------------------------------------------------------

def turns_of(data):
    """Return the turns of one JSON object, in any of the three common forms. Raises ValueError."""
    if "messages" in data:
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in data["messages"]]
    else:
        extra = data.get("input") or data.get("context") or ""
        answer = data.get("output", data.get("response"))
        turns = [{"role": "user", "content": data["instruction"] + (f"\n\n{extra}" if extra else "")},
                 {"role": "assistant", "content": answer}]
    expected = "user"
    for i, turn in enumerate(turns):
        if turn["role"] == "system" and i == 0:
            continue
        if turn["role"] not in ("user", "assistant"):
            raise ValueError(f"unknown role {turn['role']!r}: use user, assistant, or system at the start")
        if turn["role"] != expected:
            raise ValueError(f"turn {i + 1} should be by the {expected}, not the {turn['role']}")
        if not isinstance(turn["content"], str) or not turn["content"].strip():
            raise ValueError(f"the {turn['role']}'s turn {i + 1} is empty")
        expected = "assistant" if expected == "user" else "user"
    if not turns or turns[-1]["role"] != "assistant":
        raise ValueError("the last turn must be an answer by the assistant")
    return turns


def read_conversations(path):
    """Return the conversations of a JSONL file or JSON list. Raises CourseError naming every bad line."""
    data, conversations, wrong = Path(path).read_bytes(), [], []
    if data.lstrip()[:1] == b"[":
        lines = [json.dumps(item).encode() for item in json.loads(data)]
    else:
        lines = data.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                conversations.append(turns_of(json.loads(line.decode("utf-8"))))
        except UnicodeDecodeError as error:
            wrong.append(f"line {number}: not UTF-8 ({error.reason} at byte {error.start})")
        except json.JSONDecodeError as error:
            wrong.append(f"line {number}: not JSON ({error})")
        except (KeyError, TypeError, AttributeError) as error:
            wrong.append(f"line {number}: neither messages nor instruction and output ({error!r})")
        except ValueError as error:
            wrong.append(f"line {number}: {error}")
    if wrong or not conversations:
        raise CourseError(f"{path}: " + ("\n  ".join(["", *wrong]) if wrong else "no conversation in it"))
    return conversations


# ---- From conversations to batches ---------------------------------------------------------------

def pack(examples, T, filler, seed):
    """Lay whole conversations side by side in rows of T; returns ids, targets, documents, each (rows, T).

    examples: [(ids, trained)]. Targets are the next ids where these are trained on, else IGNORED.
    documents numbers the conversations of a row, so that none sees another (chapter 3).
    """
    order, rows = random.Random(seed).sample(examples, len(examples)), []
    for ids, trained in order:
        x = ids[:-1]
        y = [target if learnt else IGNORED for target, learnt in zip(ids[1:], trained[1:])]
        row = next((row for row in rows[-8:] if len(row[0]) + len(x) <= T), None)       # first that has room
        if row is None:
            rows.append(row := ([], [], []))
        row[2].extend([row[2][-1] + 1 if row[2] else 0] * len(x))
        row[0].extend(x)
        row[1].extend(y)
    padded = [[part + [fill] * (T - len(part)) for part, fill in zip(row, (filler, IGNORED, -1))] for row in rows]
    return torch.tensor(padded).unbind(1)


def packed_batches(examples, R, T, filler, seed):
    """Return batch(step) -> (x, y, documents), each (R, T): a pure function of the step, as in chapter 2."""
    rows = []                                                  # one entry a row, grown by an epoch at a time

    def batch(step):
        while len(rows) < (step + 1) * R:
            rows.extend(zip(*pack(examples, T, filler, f"{seed}, after row {len(rows)}")))
        return [torch.stack(part) for part in zip(*rows[step * R:(step + 1) * R])]

    return batch


def show_mask(tokenizer, ids, trained):
    """Print a conversation token by token; those that are trained on are coloured, or in brackets."""
    pieces = [tokenizer.decode([i]) for i in ids]
    if sys.stdout.isatty():
        print(chapter1.show_tokens(pieces, [28 if learnt else 236 for learnt in trained]))
    else:
        print("".join(f"[{piece}]" if learnt else piece for piece, learnt in zip(pieces, trained)))
    print(f"{sum(trained)} of {len(ids)} tokens are trained on")


# ---- LoRA ----------------------------------------------------------------------------------------

class LoRA(nn.Module):
    """A weight plus a product of two thin matrices: W + B A, of which only A and B are trained.

    W is (out, in), A (rank, in), B (out, rank). B starts at zero, so at first nothing changes.
    """

    def __init__(self, weight, rank):
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, weight.shape[1]) / math.sqrt(weight.shape[1]))
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight):
        return weight + self.b @ self.a                        # (out, rank) @ (rank, in) -> (out, in)


def add_lora(model, rank):
    """Freeze a model and put an adapter on each linear layer of its blocks."""
    model.requires_grad_(False)
    for layer in [module for module in model.layers.modules() if isinstance(module, nn.Linear)]:
        parametrize.register_parametrization(layer, "weight", LoRA(layer.weight, rank))
    return model


def merge_lora(model):
    """Return a copy of a model with its adapters added into the weights: an ordinary model again."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return model


# ---- Obedience, counted --------------------------------------------------------------------------

def answer_all(model, tokenizer, instructions, config, ends):
    """Return (answer, ended by itself) for each instruction; equally long prompts are written together."""
    prompts = [chapter5.render_chat(tokenizer, [{"role": "user", "content": text}]) for text in instructions]
    groups, answers = defaultdict(list), {}
    for i, prompt in enumerate(prompts):
        groups[len(prompt)].append(i)
    for members in groups.values():
        written = defaultdict(list)
        for new in chapter5.generate(model, [prompts[i] for i in members], config, ends):
            for stream, (token, _) in new.items():
                written[members[stream]].append(token)
        for i, ids in written.items():
            ended = ids[-1] in ends
            answers[i] = (tokenizer.decode(ids[:-1] if ended else ids), ended)
    return [answers[i] for i in range(len(prompts))]


def count_obeyed(model, tokenizer, tasks, config, ends, known=()):
    """Return ({kind: Counter}, [(instruction, answer, obeys)]) of a model on tasks."""
    counts, shown = defaultdict(Counter), []
    model.eval()
    for (kind, function, instruction), (answer, ended) in zip(tasks, answer_all(model, tokenizer, [t[2] for t in tasks], config, ends)):
        parses, obeys = judge_answer(kind, function, answer)
        for group in (kind, "all"):
            counts[group].update(tasks=1, ends=ended, parses=parses, obeys=obeys and ended, copied=answer in known)
        shown.append((instruction, answer, obeys and ended))
    return counts, shown


def print_table(results):
    """Print the counts of several evaluations {name: counts} as one table of percentages."""
    print(f"{'':34}{'tasks':>6}{'ends':>7}{'parses':>8}{'obeys':>7}{'copied':>8}")
    for name, counts in results.items():
        for kind, count in counts.items():
            share = {key: f"{100 * count[key] / count['tasks']:.0f}%" for key in ("ends", "parses", "obeys", "copied")}
            print(f"{name + ', ' + kind:34}{count['tasks']:6}{share['ends']:>7}{share['parses']:>8}{share['obeys']:>7}{share['copied']:>8}")


# ---- The script ----------------------------------------------------------------------------------

def add_chat_tokens(model, tokenizer):
    """Add the marks of the chat template to a foreign tokenizer and model that lack them."""
    data = copy.deepcopy(tokenizer.data)
    missing = [text for text in (chapter5.CHAT_START, chapter5.CHAT_END) if text not in tokenizer.special_tokens]
    for i, text in enumerate(missing):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        data["added_tokens"].append({"id": tokenizer.vocab_size + i, "content": text, **flags, "special": True})
    tokenizer = chapter1.Tokenizer(data)
    if tokenizer.vocab_size > model.config.vocab_size:
        grown = chapter3.GPT(replace(model.config, vocab_size=(tokenizer.vocab_size + 63) // 64 * 64))
        old = model.state_dict()
        state = {name: tensor.clone() for name, tensor in grown.state_dict().items()}
        for name, tensor in old.items():
            state[name][:len(tensor)] = tensor
        grown.load_state_dict(state)
        model = grown
        print(f"added {', '.join(missing)} to the tokenizer, and rows for them to the embeddings")
    return model, tokenizer


def main(config):
    """Tune, count obedience before and after, save."""
    out = Path(config.out)
    folder, saved = out / "chat", None
    if config.resume:
        saved, config = chapter4.read_checkpoint(folder / "resume.pt", config)
    machine = chapter4.choose_machine(config)
    torch.manual_seed(config.seed)
    model, tokenizer, _ = chapter5.open_model(config.init or out / "base", "cpu")
    model, tokenizer = add_chat_tokens(model, tokenizer)
    end, T = tokenizer.special_tokens[chapter1.CHAT_END], model.config.context
    filler = tokenizer.special_tokens.get(chapter1.END_OF_TEXT, end)
    functions = library_functions()
    if config.conversations:
        conversations = read_conversations(config.conversations)
    else:
        conversations = library_conversations(functions["train"], config.seed)
    examples = [chapter5.encode_chat(tokenizer, turns) for turns in conversations]
    fitting = [example for example in examples if len(example[0]) <= T + 1]
    print(f"{len(fitting):,} conversations; {len(examples) - len(fitting):,} longer than the context of {T} are left out")
    if config.show_mask:
        return show_mask(tokenizer, *fitting[0])
    R = max(1, config.batch_tokens // T)
    batch = packed_batches(fitting, R, T, filler, config.seed)
    ends, decoding = {end, filler}, chapter5.Config(temperature=0.3, max_tokens=130)
    tasks = [held_out_tasks(functions, config.tasks, config.seed, phrasing) for phrasing in (0, 1)]
    known = {function.source for function in functions["train"]}
    results = {"before": count_obeyed(model, tokenizer, tasks[0][:50], decoding, ends, known)}
    val_tokens, meta = chapter2.open_tokens(out / "data", "val")
    bytes_of = torch.tensor([len(tokenizer.bytes_of.get(i, b"")) for i in range(model.config.vocab_size)])
    forgotten = [chapter4.evaluate(model, machine, val_tokens, bytes_of, 65536)[1]]
    held_out = [chapter5.encode_chat(tokenizer, turns) for turns in library_conversations(functions["val"], 0, 1)]
    x, y, documents = pack([example for example in held_out if len(example[0]) <= T], T, filler, 0)

    def judge(model):
        objective, nats = chapter4.Objective(model).eval(), 0.0
        with torch.no_grad(), machine.autocast():
            for part in zip(x.split(8), y.split(8), documents.split(8)):
                nats += objective(*(p.to(machine.device) for p in part)).item()
        model.train()
        count = int((y != IGNORED).sum())
        size = bytes_of[y[y != IGNORED]].sum().item()
        return nats / count, nats / math.log(2) / size, ""

    def keep(model):
        chapter4.save_folder(merge_lora(model), tokenizer, folder, sorted(ends))
        (folder / "chat_template.jinja").write_text(chapter5.CHAT_TEMPLATE, encoding="utf-8")

    if config.lora_rank:
        model = add_lora(model, config.lora_rank)
        config = replace(config, optimizer="adamw")
    chapter4.train(model, batch, config, machine, folder, judge, keep, {"tokenizer": tokenizer.fingerprint()}, saved)
    tuned, tokenizer, ends = chapter5.open_model(folder, machine.device)
    forgotten.append(chapter4.evaluate(tuned, machine, val_tokens, bytes_of, 65536)[1])
    results["after"] = count_obeyed(tuned, tokenizer, tasks[0], decoding, ends, known)
    results["after, greedy"] = count_obeyed(tuned, tokenizer, tasks[0], replace(decoding, temperature=0.0), ends, known)
    results["after, new phrasings"] = count_obeyed(tuned, tokenizer, tasks[1], decoding, ends, known)
    for (instruction, before, _), (_, after, obeys) in list(zip(results["before"][1], results["after"][1]))[:3]:
        print(f"\n> {instruction}\nbefore: {before[:200]!r}\nafter{'' if obeys else ' (not obeyed)'}:\n{after}")
    print_table({name: counts for name, (counts, _) in results.items()})
    print(f"base validation text: {forgotten[0]:.3f} bits per byte before, {forgotten[1]:.3f} after")


if __name__ == "__main__":
    chapter1.run(main, Config, __doc__)
