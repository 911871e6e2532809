"""Chapter 6 · Fine-tuning: from a model that continues text to one that does what it is told.

The base model has only ever continued text. Now it reads conversations, written as one text with marks for who speaks
(the ChatML template), and a little of chapter 4's text, so that less is forgotten. The conversations are made from
Python's own library: a program can check each answer. In them only the answers count in the loss, and the mark that
ends each, so that the model also learns when to stop:

    <|im_start|>user Write the function add(a, b).<|im_end|> <|im_start|>assistant def add(a, b): ...<|im_end|>
    ------------------------- read, but not learnt ------------------------------- ------- learnt ---------

Run:    python 06_finetune.py                              tunes out/base, writes out/chat
        python 06_finetune.py --conversations mine.jsonl   your own questions and answers (or dolly, alpaca)
        python 06_finetune.py --lora-rank 8                trains thin adapters instead of all weights
Gives:  the share of instructions obeyed before and after; out/chat/ for chapter 5, transformers and vLLM.
Source: Ouyang et al. 2022 (instruction tuning), Hu et al. 2021 (LoRA), OpenAI 2023 (ChatML).
"""
import ast
import json
import keyword
import math
import random
import re
from collections import Counter, defaultdict, namedtuple
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.utils import parametrize

chapter1, chapter2, chapter3, chapter4, chapter5 = map(
    import_module, ("01_tokenizer", "02_data", "03_model", "04_train", "05_sample"))
CourseError, IGNORED = chapter1.CourseError, chapter4.IGNORED

# Legend
#   turn       {"role": "user", "content": text}; a conversation is a list of turns
#   function   name; parameters as written, ("self", "size=-1"); bare source; purpose, the docstring's first line
#   task       (kind, function, conversation): all that a program needs to check another answer
Function = namedtuple("Function", "name parameters source purpose")
PHRASINGS = {  # kind: (phrasings that are trained on, phrasings kept for the test); {a|b} is a or b
    "write": (("{Write|Define|Implement|Make|Create|Add|Type|Show|Write me|Make me|Program|Code|Now write|Next, define}"
               "{| the function| a function| a Python function| the method| code for} {signature}{.|.|, please.| now.| here.|!}",
               "{Can|Will|Would} you {write|define|make|create|show me}{| the function| Python for} {signature}{?| please?| now?}",
               "{Please|Kindly|Now|First,} {write|define|implement|make|create|show}{| the function| the method} {signature}.",
               "{I want|We want|My program lacks|Missing is|Code:|Task:|To do:|Wanted:}{| the function| a method} {signature}{.|}"),
              ("I need a function {signature}.", "Could you implement {signature} for me?", "Give me {signature}.")),
    "parameters": (("{List|Name|Show|Write|State|Print} {the|all} parameters{| of this function| in order}:\n\n{source}",
                    "{Which|How many and which} parameters {does this function have|are taken here}?\n\n{source}"),
                   ("What are the parameters of this function?\n\n{source}",)),
    "purpose": (("What {does this function|is this function made to|does this code} do?\n\n{source}",
                 "{source}\n\n{Say|Explain|Tell me|State} what {it|this|the function} does."),
                ("Describe this function:\n\n{source}",)),
}


@dataclass
class Config(chapter4.TrainingConfig):
    init: str = ""  # folder with the model to tune, ours or any that chapter 3 opens (default: out/base)
    steps: int = 1200  # updates of the weights
    batch_tokens: int = 2048  # tokens of a step, padding included
    micro_batch: int = 8  # rows at once in memory
    lr: float = 3e-3  # AdamW's learning rate: half of that in chapter 4, as there is less to change
    matrix_lr: float = 6e-3  # Muon's learning rate for matrices
    eval_every: int = 300  # steps between evaluations (each also saves)
    conversations: str = ""  # JSON lines of your own, or dolly or alpaca (default: made from Python's library)
    lora_rank: int = 0  # train adapters of this rank instead of all weights; more can change more (0: all weights)
    show_mask: bool = False  # print one training example with the learnt tokens marked, and stop
    tasks: int = 240  # held-out instructions on which obedience is counted (0: do not count)


# ---- Conversations from Python's own library -----------------------------------------------------
def parameters_of(arguments):
    """Return the parameters of an ast.arguments as written, without annotations.

    >>> parameters_of(ast.parse("def f(a, b: int = 2, *, c): pass").body[0].args)
    ('a', 'b=2', '*', 'c')
    """
    for part in ast.walk(arguments):
        if isinstance(part, ast.arg):
            part.annotation = None
    return tuple(ast.unparse(arguments).split(", ")) if ast.unparse(arguments) else ()


def does_something(node):
    """Tell whether a function does more than docstring, pass and ..., and repeats no line three times."""
    idle = [type(part) is ast.Pass or type(part) is ast.Expr and type(part.value) is ast.Constant for part in node.body]
    lines = Counter(line.strip() for line in ast.unparse(node).splitlines() if line.strip())
    return not all(idle) and max(lines.values()) < 3


def functions_in(text, longest=160, widest=64):
    """Return the Functions of a module that a small model can learn: short, and without brackets inside brackets."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and does_something(node):
            docstring, parameters = ast.get_docstring(node), parameters_of(node.args)
            body = [line for part in node.body[docstring is not None:] for line in ast.unparse(part).splitlines()]
            source = "\n    ".join([f"def {node.name}({', '.join(parameters)}):", *body])
            nested = re.search(r"[([{][^])}\n]*[([{]", "\n".join(body))            # it would forget to close them
            if len(source) <= longest and max(map(len, source.splitlines())) <= widest and not nested:
                found.append(Function(node.name, parameters, source, (docstring or "").split("\n")[0].strip()))
    return found


def library_functions():
    """Return ({split: [Function]}, names): whole modules are held out; names are all words of the train modules."""
    functions, names = defaultdict(dict), set()                # a dict keeps the order and drops duplicates
    for split, text in chapter1.split_documents(filter(None, chapter1.read_source(["python"]))):
        with suppress(SyntaxError, ValueError):                # a template or an example, not a module
            functions[split].update(dict.fromkeys(functions_in(text)))
        names.update(re.findall(r"\b[A-Za-z_]\w{1,24}\b", text) if split == "train" else ())
    return {split: list(found) for split, found in functions.items()}, sorted(names - set(keyword.kwlist))


def renamed(function, names, chooser):
    """Return the function under another name and with other parameters, the same all through its body."""
    words = {function.name, *(p.lstrip("*").split("=")[0] for p in function.parameters)} - {"self", "cls", ""}
    new = dict(zip(sorted(words), (name for name in chooser.sample(names, min(60, len(names))) if name not in function.source)))
    swap = lambda text: re.sub(r"(?<![\w.'\"])[A-Za-z_]\w*", lambda match: new.get(match[0], match[0]), text)
    return Function(swap(function.name), tuple(map(swap, function.parameters)), swap(function.source), function.purpose)


def make_tasks(functions, phrasing, seed, names=()):
    """Return a task for each function, in the phrasings to train on (0) or those of the test (1).

    names: if given, functions get other names out of these: where a name can be any, all one can learn is to copy it.
    """
    chooser, tasks = random.Random(seed), []
    for function in functions:
        kind = chooser.choice((*["write"] * 4, "parameters", "purpose" if function.purpose else "write"))
        if names and kind != "purpose":
            function = renamed(function, names, chooser)
        pattern = re.sub(r"\{([^{}]*\|[^{}]*)\}", lambda match: chooser.choice(match[1].split("|")),
                         chooser.choice(PHRASINGS[kind][phrasing]))
        parameters = ", ".join(function.parameters)
        instruction = pattern.format(signature=f"{function.name}({parameters})", source=function.source)
        if kind == "write" and chooser.random() < 0.5:
            instruction = f"{instruction} {function.purpose}".strip()
        answer = {"write": function.source, "parameters": parameters or "none", "purpose": function.purpose}[kind]
        tasks.append((kind, function, [{"role": "user", "content": instruction}, {"role": "assistant", "content": answer}]))
    return tasks


def held_out_tasks(functions, count, phrasing, seed=1):
    """Return tasks on functions of the test split whose (name, parameters) the train split does not have."""
    known = {(function.name, function.parameters) for function in functions["train"]}
    fresh = [function for function in functions["test"] if (function.name, function.parameters) not in known]
    return make_tasks(random.Random(seed).sample(fresh, min(max(0, count), len(fresh))), phrasing, seed)


def judge_answer(kind, function, answer):
    """Return (parses, obeys) of an answer; parses is None where no code was asked for.

    Code: one function with just the name and parameters asked for, that does something. Parameters: exactly
    those. Purpose: one line that shares a word with the function or its docstring.
    """
    words = lambda text: set(re.findall(r"[a-z]{4,}", text.lower()))
    if kind == "parameters":
        return None, answer.strip() == (", ".join(function.parameters) or "none")
    if kind == "purpose":
        return None, "\n" not in answer.strip() and bool(words(answer) & words(" ".join(function[2:])))
    try:
        nodes = ast.parse(answer).body
    except (SyntaxError, ValueError, RecursionError):
        return False, False
    return True, (len(nodes) == 1 and isinstance(nodes[0], ast.FunctionDef) and nodes[0].name == function.name
                  and parameters_of(nodes[0].args) == function.parameters and does_something(nodes[0]))


# ---- Conversations of one's own ------------------------------------------------------------------
def turns_of(data):
    """Return the turns of one JSON object, with messages or with instruction and output. Raises ValueError."""
    if "messages" in data:
        turns = [{"role": turn["role"], "content": turn["content"].strip()} for turn in data["messages"]]
    else:
        context = data.get("input") or data.get("context") or ""
        turns = [{"role": "user", "content": f"{data['instruction'].strip()}\n\n{context}".strip()},
                 {"role": "assistant", "content": data["output"] if "output" in data else data["response"]}]
    spoken = turns[1:] if turns and turns[0]["role"] == "system" else turns
    for number, turn in enumerate(spoken):
        expected = ("user", "assistant")[number % 2]
        if turn["role"] != expected or not turn["content"].strip():
            raise ValueError(f"turn {number + 1} should be a text by the {expected}, not {turn}")
    if not spoken or len(spoken) % 2:
        raise ValueError("the last turn must be the assistant's answer")
    return turns


def read_conversations(path, tolerated=0):
    """Return the conversations of JSON lines or of one JSON list. Raises CourseError naming all bad lines, if many."""
    conversations, wrong = [], []
    try:
        data = Path(path).read_bytes()
        lines = [json.dumps(item).encode() for item in json.loads(data)] if data.lstrip()[:1] == b"[" else data.splitlines()
    except (OSError, ValueError) as error:
        raise CourseError(f"--conversations {path} cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            conversations += [turns_of(json.loads(line.decode("utf-8")))] if line.strip() else []
        except (KeyError, TypeError, AttributeError):
            wrong.append(f"line {number}: neither messages (role, content) nor instruction and output")
        except ValueError as error:                            # not UTF-8, not JSON, or turns_of's own
            wrong.append(f"line {number}: {error}")
    if len(wrong) > tolerated or not conversations:
        raise CourseError("\n  ".join([f"--conversations {path}: {len(wrong)} bad lines, {len(conversations)} good", *wrong]))
    return conversations


# ---- From conversations to batches ---------------------------------------------------------------
def pack(examples, T, filler, seed):
    """Lay whole conversations side by side in rows of T tokens; return (rows, 3, T): ids, targets, documents.

    examples: [(ids, learnt)], none longer than T + 1. A target is the next id where that is learnt, else
    IGNORED. documents numbers the conversations of a row, so that none sees another (see chapter 3).
    """
    rows = []
    for ids, learnt in random.Random(seed).sample(examples, len(examples)):
        targets = [target if is_learnt else IGNORED for target, is_learnt in zip(ids[1:], learnt[1:])]
        row = next((row for row in rows[-8:] if len(row) + len(targets) <= T), None)      # one that has room
        if row is None:
            rows.append(row := [])
        row.extend(zip(ids, targets, [row[-1][2] + 1 if row else 0] * len(targets)))
    rows = [row + [(filler, IGNORED, -1)] * (T - len(row)) for row in rows]
    return torch.tensor(rows).transpose(1, 2)                  # (rows, T, 3) -> (rows, 3, T)


def packed_batches(examples, R, T, filler, seed):
    """Return batch(step) -> ids, targets, documents, each (R, T): as in chapter 2, a pure function of the step."""
    rows = []                                                  # grows by an epoch at a time, each in an order of its own

    def batch(step):
        while len(rows) < (step + 1) * R:
            rows.extend(pack(examples, T, filler, f"{seed} {len(rows)}"))
        return torch.stack(rows[step * R:(step + 1) * R]).unbind(1)              # (R, 3, T) -> 3 x (R, T)
    return batch


def show_mask(tokenizer, ids, learnt):
    """Print a conversation token by token; what is learnt is in brackets, and coloured on a terminal."""
    pieces = [f"[{tokenizer.decode([i])}]" if is_learnt else tokenizer.decode([i]) for i, is_learnt in zip(ids, learnt)]
    print(chapter1.show_tokens(pieces, [28 if is_learnt else 236 for is_learnt in learnt]))
    print(f"{sum(learnt)} of {len(ids)} tokens are learnt")


# ---- LoRA ----------------------------------------------------------------------------------------
class LoRA(nn.Module):
    """A frozen weight W (out, in) plus B A, two thin matrices (out, rank) and (rank, in) that are trained."""
    def __init__(self, weight, rank):
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, weight.shape[1]) / math.sqrt(weight.shape[1]))
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank))               # at first nothing changes

    def forward(self, weight):
        return weight + self.b @ self.a                        # (out, rank) @ (rank, in) -> (out, in)


def add_lora(model, rank):
    """Freeze a model and put an adapter on every linear layer of its blocks."""
    model.requires_grad_(False)
    for layer in [module for module in model.layers.modules() if isinstance(module, nn.Linear)]:
        parametrize.register_parametrization(layer, "weight", LoRA(layer.weight, rank))


def merge_lora(model):
    """Return a model with the adapters, if any, added into its weights: an ordinary model again."""
    state = {name: tensor for name, tensor in model.state_dict().items() if "parametrizations" not in name}
    state |= {f"{name}.weight": layer.weight for name, layer in model.named_modules() if parametrize.is_parametrized(layer)}
    merged = chapter3.GPT(model.config)
    merged.load_state_dict(state)
    return merged


# ---- Obedience, counted --------------------------------------------------------------------------
def count_obeyed(model, tokenizer, tasks, settings, ends, known):
    """Return ({kind: Counter}, answers): how many answers end, parse, obey, and are copied from `known` ones."""
    groups, written, answers, counts = defaultdict(list), defaultdict(list), [], defaultdict(Counter)
    for number, (_, _, turns) in enumerate(tasks):
        prompt = chapter5.render_chat(tokenizer, turns[:1])
        groups[len(prompt)].append((number, prompt))           # prompts of equal length are answered together
    for members in groups.values():
        for new in chapter5.generate(model, [prompt for _, prompt in members], settings, ends, tokenizer.vocab_size):
            for stream, (token, _) in new.items():
                written[members[stream][0]].append(token)
    for number, (kind, function, _) in enumerate(tasks):
        answers.append(tokenizer.decode([i for i in written[number] if i not in ends]))
        ended, (parses, obeys) = written[number][-1] in ends, judge_answer(kind, function, answers[-1])
        for group in ("all", kind):
            counts[group].update(tasks=1, ends=ended, code=parses is not None, parses=bool(parses), obeys=obeys and ended,
                                 copied=answers[-1] in known)
    return counts, answers


def show_results(results, tasks, path):
    """Print {evaluation: (counts, answers)} as three answers and a table of shares, and draw it to `path`."""
    for number, (_, _, turns) in enumerate(tasks[:3]):
        print(f"\n> {turns[0]['content']}\nbefore: {results['before'][1][number][:150]!r}\nafter:\n{results['after'][1][number]}")
    axis = Figure(figsize=(8, 4.5), layout="constrained").add_subplot(xlabel="instructions obeyed (%)")
    print(f"\n{'':32}{'tasks':>7}{'ends':>8}{'parses':>8}{'obeys':>8}{'copied':>8}")
    for number, (name, (counts, _)) in enumerate(results.items()):
        for kind, count in counts.items():
            of = {"ends": "tasks", "parses": "code", "obeys": "tasks", "copied": "tasks"}
            shares = "".join(f"{count[what] / max(1, count[all_of]):8.1%}" for what, all_of in of.items())
            print(f"{f'{name}, {kind}':32}{count['tasks']:7}{shares}")
            axis.barh(f"{name}, {kind}", 100 * count["obeys"] / count["tasks"], color=("#999", "#07b", "#5be", "#e90")[number])
    with chapter1.replacing(path) as temporary:
        axis.figure.savefig(temporary, dpi=110)


# ---- The script ----------------------------------------------------------------------------------
def with_chat_tokens(model, tokenizer):
    """Return (model, tokenizer) that know the marks of ChatML; a foreign pair may lack them."""
    missing = [text for text in (chapter5.CHAT_START, chapter5.CHAT_END) if text not in tokenizer.special_tokens]
    if not missing:
        return model, tokenizer
    print(f"added {' and '.join(missing)} to the tokenizer and the embeddings")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": tokenizer.vocab_size + i, "content": text, **flags, "special": True} for i, text in enumerate(missing)]
    tokenizer = chapter1.Tokenizer({**tokenizer.data, "added_tokens": tokenizer.data["added_tokens"] + added})
    grown = chapter3.GPT(replace(model.config, vocab_size=max(tokenizer.vocab_size, model.config.vocab_size)))
    for name, tensor in model.state_dict().items():            # a state_dict shares its memory with the model
        grown.state_dict()[name][:len(tensor)] = tensor
    return grown.eval().to(model.embed_tokens.weight.device), tokenizer


def read_examples(config, functions, names, tokenizer, T):
    """Return the encoded conversations that fit the context, to learn from and held out; counts the others."""
    path = config.conversations
    if path in chapter2.CONVERSATIONS:
        path = chapter2.download(path, Path(config.out) / "downloads", chapter2.CONVERSATIONS)
    made = [task for copy in range(4) for task in make_tasks(functions["train"], 0, config.seed + copy, names if copy else ())]
    conversations = read_conversations(path, 0 if path == config.conversations else 100) if path else [turns for *_, turns in made]
    examples = [chapter5.encode_chat(tokenizer, turns) for turns in conversations]
    fitting = [example for example in examples if len(example[0]) <= T + 1]      # cut short, they would teach not to end
    print(f"{len(fitting):,} conversations; {len(examples) - len(fitting):,} longer than the context of {T} are left out")
    if len(fitting) < 2:
        raise CourseError(f"--conversations {path}: too few fit the context of {T} tokens: use shorter ones")
    if path:
        return fitting[len(fitting) // 20 + 1:], fitting[:len(fitting) // 20 + 1]
    held_out = [turns for kind, _, turns in make_tasks(functions["val"], 0, 0, names) if kind != "purpose"]
    for _, answer in held_out:                                 # any body will do: the answer's first line is judged,
        answer["content"] = answer["content"].split("\n")[0]   # less 3 tokens: one that may join "\n", the mark, "\n"
    encoded = [chapter5.encode_chat(tokenizer, turns) for turns in held_out]
    return fitting, [(ids, learnt[:-3] + [False] * 3) for ids, learnt in encoded if len(ids) <= T + 1]


def judge_rows(model, machine, rows, bytes_of):
    """Return (nats per answer token, bits per byte, no remark) on held-out packed rows (rows, 3, T)."""
    objective, learnt = chapter4.Objective(model).eval(), rows[:, 1][rows[:, 1] != IGNORED]
    with torch.no_grad(), machine.autocast():
        nats = sum(objective(*part.unbind(1)).item() for part in rows.to(machine.device).split(8))
    return nats / len(learnt), nats / math.log(2) / bytes_of[learnt].sum().item(), ""


def main(config):
    """Tune, save, and count obedience before and after."""
    out, folder = Path(config.out), Path(config.out) / "chat"
    saved, config = chapter4.read_checkpoint(folder / "resume.pt", config) if config.resume else (None, config)
    machine, (functions, names) = chapter4.choose_machine(config), library_functions()
    torch.manual_seed(config.seed)
    model, tokenizer = with_chat_tokens(*chapter5.open_model(config.init or out / "base", machine.device)[:2])
    T, model.config.attention = model.config.context, replace(model.config, attention=config.attention).attention
    ends = {i for text, i in tokenizer.special_tokens.items() if text in (chapter5.CHAT_END, chapter1.END_OF_TEXT)}
    examples, held_out = read_examples(config, functions, names, tokenizer, T)
    if config.show_mask:
        return show_mask(tokenizer, *examples[0])
    tasks, new_tasks = (held_out_tasks(functions, config.tasks, phrasing) for phrasing in (0, 1))
    known, settings = {function.source for function in functions["train"]}, chapter5.Config(max_tokens=120)
    count = lambda model, tasks=tasks, temperature=chapter5.CHAT_TEMPERATURE: count_obeyed(
        model, tokenizer, tasks, replace(settings, temperature=temperature), ends, known)
    bytes_of = torch.from_numpy(chapter2.token_sizes(tokenizer, model.config.vocab_size))
    (text, meta), (val, _) = (chapter2.open_tokens(out / "data", split) for split in ("train", "val"))
    if own := meta["fingerprint"] == tokenizer.fingerprint():  # some of chapter 4's text, so that less is forgotten
        starts = range(0, len(text) - T, 16 * T)[:len(examples) // 30]
        examples += [(text[start:start + T + 1].tolist(), [True] * (T + 1)) for start in starts]
    remembers = lambda model: chapter4.evaluate(model, machine, val, bytes_of, 65536)[1] if own else math.nan
    results, bits = {"before": count(model)}, remembers(model)
    if config.lora_rank > 0:
        config = replace(config, optimizer="adamw")            # adapters are too thin for Muon
        add_lora(model, config.lora_rank)
        print(f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters are trained")
    batch = packed_batches(examples, max(1, config.batch_tokens // T), T, min(ends), config.seed)
    judge = lambda model, rows=pack(held_out, T, min(ends), 0): judge_rows(model, machine, rows, bytes_of)
    keep = lambda model: chapter4.save_folder(merge_lora(model), tokenizer, folder, sorted(ends), chapter5.CHAT_TEMPLATE)
    facts = {"tokenizer": tokenizer.fingerprint(), "sum of all ids": sum(sum(ids) for ids, _ in examples + held_out)}
    chapter4.train(model, batch, config, machine, folder, judge, keep, facts, saved)
    if machine.rank == 0:
        tuned, *_ = chapter5.open_model(folder, machine.device)
        results |= {"after": count(tuned), "after, greedy": count(tuned, temperature=0.0),
                    "after, new phrasings": count(tuned, new_tasks)}
        show_results(results, tasks, folder / "before_after.png")
        print(f"chapter 4's held-out text: {bits:.3f} bits per byte before, {remembers(tuned):.3f} after")
        print(f"saved {folder}; next: python 05_sample.py --chat")


if __name__ == "__main__":
    chapter1.run(main, Config, __doc__)
