"""Chapter 6's table with what a tuned model has to beat; own sentences; LoRA beside all weights; the folder in transformers.

Run:    python tests/benchmarks/bench_finetune.py [--out out] [--tasks 150 --tasks-seed 2031] [--sentences FILE]
        python tests/benchmarks/bench_finetune.py --ranks 0 8 --steps 150         tunes anew, at these LoRA ranks (0: all weights)
Prints: pass@1 and verdicts of the base model, of two programs without a model, and of out/chat; greedy and at the chat
        temperature; by kind of task; how many bodies stand in the training set. FILE holds a task a line, with its
        reference and the types of its parameters:
            Write twice(x), which doubles x. | x * 2 | x:number
            Write a function called ends that returns the last 2 letters of t. | t[-2:] | t:text
"""
import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from importlib import import_module
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

chapter1, chapter4, chapter5, chapter6 = map(import_module, ("01_tokenizer", "04_train", "05_sample", "06_finetune"))
FEW = 25  # tasks of each held-out set for a base model, which never ends and so writes all of its 100 tokens


# ---- What a tuned model has to beat
def in_order(task):
    """Return the parameters of a task in the order in which its description names them."""
    words = re.findall(r"'[a-z]'|\w+", task.description)
    return [word for word in dict.fromkeys(words) if word in task.kinds]


def masked(text, names):
    """Return a text with p1, p2 ... for some names."""
    new = {name: f"p{number}" for number, name in enumerate(names, 1)}
    return re.sub(r"'[a-z]'|\w+", lambda found: new.get(found[0], found[0]), text)


def body_of(task, source):
    """Return the body of a function, the names of its parameters masked in the order in which the body uses them."""
    body = source.partition("\n")[2].rstrip()
    used = [word for word in dict.fromkeys(re.findall(r"'[a-z]'|\w+", body)) if word in task.kinds]
    return masked(body, used)


def first_parameter(tasks):
    """The program that copies the signature and returns its first parameter."""
    return [f"{task.header}\n    return {next(iter(task.kinds))}" for task in tasks]


def nearest(tasks, training):
    """The program that looks up the training task with most words in common, and puts the new names into its answer.

    It is even told which part of the instruction is the description.
    """
    known = {}
    for task in training:
        known.setdefault(frozenset(masked(task.description, in_order(task)).split()), task)
    answers = []
    for task in tasks:
        asked = set(masked(task.description, in_order(task)).split())
        best = known[max(known, key=lambda words: len(words & asked) / len(words | asked))]
        new = dict(zip(in_order(best), in_order(task)))
        body = re.sub(r"'[a-z]'|\w+", lambda found: new.get(found[0], found[0]), best.source.partition("\n")[2])
        answers.append(f"{task.header}\n{body}")
    return answers


def continued(model, tokenizer, tasks):
    """A base model in its own form: it goes on after a header and a docstring; what belongs to the function is the answer."""
    settings = chapter5.Config(max_tokens=100, temperature=0.0)
    answers = []
    for task in tasks:
        header = task.header
        prompt = tokenizer.encode(f'{header}\n    """Return {task.description}."""\n')
        written = []
        for (token,), _ in chapter5.generate(model, [prompt], settings, tokenizer.vocab_size):
            written.append(token)
            text = tokenizer.decode(written)
            if re.search(r"\n\S", text):                       # a line that begins at the margin: the function is over
                break
        body = re.match(r"(?:(?: {4}.*| *)\n)*", text.rstrip() + "\n")[0]
        answers.append(f"{header}\n{body}")
    return answers


def judged(tasks, answers):
    return chapter6.judge(tasks, answers, [True] * len(tasks))


def show_before(base, tokenizer, ends, tasks, training):
    """Return {label: verdicts} of the base model on a few tasks, and of the two programs on all."""
    few = [task for some in tasks.values() for task in some[:FEW]]
    everything = list(chain.from_iterable(tasks.values()))
    return {"base model, as a chat": chapter6.answer_tasks(base, tokenizer, few, ends)[1],
            "base model, as code": judged(few, continued(base, tokenizer, few)),
            "the first parameter": judged(everything, first_parameter(everything)),
            "the nearest task": judged(everything, nearest(everything, training))}


# ---- The tuned model
def share(verdicts):
    """Return a share of passing answers as text, with its interval."""
    passed, count = verdicts.count("pass"), len(verdicts)
    return f"{passed / max(1, count):4.0%} ± {100 * chapter6.interval(passed, count):.0f} of {count}"


def show_kinds(tasks, verdicts):
    """Print pass@1 by kind of task; of two in one also by its outer part."""
    found = defaultdict(list)
    for task, verdict in zip(tasks, verdicts):
        kinds = {entry.code: entry.kind.strip("*") for entry in chapter6.ENTRIES}
        is_nested = any(line.startswith("part = ") for line in task.lines)
        found["nested" if is_nested else kinds[task.entries[0]]].append(verdict)
        if is_nested:
            found[f"  {task.entries[0]}"].append(verdict)
    print("\npass@1 by kind, greedy; indented: the outer of two in one, where some fail")
    for kind, some in sorted(found.items()):
        if not kind.startswith(" ") or some.count("pass") < len(some):
            print(f"{kind:36}{share(some)}")


def show_copied(tasks, answers, verdicts, training):
    """Print how many bodies, names masked, stand in the training set: of passing answers, and of the references."""
    known = {body_of(task, task.source) for task in training}
    passing = [body_of(task, answer) in known for task, answer, verdict in zip(tasks, answers, verdicts) if verdict == "pass"]
    references = [body_of(task, task.source) in known for task in tasks]
    print(f"\nbodies that stand in the training set, names masked: {sum(passing) / max(1, len(passing)):.0%} of {len(passing)} answers "
          f"that pass, {sum(references) / len(references):.0%} of {len(references)} references")


def show_after(model, tokenizer, ends, tasks, training):
    """Return {label: verdicts} of the tuned model; print what is copied, and pass@1 by kind."""
    results, everything, greedy = {}, [], []
    for temperature in (0.0, chapter5.defaults_for({"chat": True})["temperature"]):
        for label, some in tasks.items():
            answers, verdicts = chapter6.answer_tasks(model, tokenizer, some, ends, temperature)
            results[f"{label}, {temperature}"] = verdicts
            everything += some if not temperature else []
            greedy += zip(answers, verdicts) if not temperature else []
        results[f"all, {temperature}"] = [*chain(*(results[f"{label}, {temperature}"] for label in tasks))]
    answers, verdicts = zip(*greedy)
    show_copied(everything, answers, verdicts, training)
    show_kinds(everything, verdicts)
    return results


def read_sentences(path):
    """Return the tasks of a file of one's own: instruction | code | parameter:type ..."""
    tasks = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            instruction, code, parameters = line.split(" | ")
            types = dict(parameter.split(":") for parameter in parameters.replace(",", " ").split())
            name = re.search(r"(\w+)\(", instruction) or re.search(r"\b(?:called|named) (\w+)", instruction)
            constants = [("own", value) for value in re.findall(r"\b\d+\b|'[a-z]'", code)]
            tasks.append(chapter6.Task(name[1], types, [f"return {code}"], ["own"], constants, instruction=instruction))
    return tasks


def show_sentences(model, tokenizer, ends, tasks):
    """Return the verdicts on the answers to sentences of one's own; print each."""
    assert judged(tasks, [task.source for task in tasks]) == ["pass"] * len(tasks), "a reference does not pass itself"
    answers, verdicts = chapter6.answer_tasks(model, tokenizer, tasks, ends)
    for task, answer, verdict in zip(tasks, answers, verdicts):
        print(f"\n> {task.instruction}\n{answer}\n[{verdict}]")
    return verdicts


# ---- Adapters beside all weights; another library
def tune(out, rank, steps):
    """Run 06_finetune.py in a folder of its own; return (what it printed, its log, its peak memory in MB)."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("tokenizer", "data", "base"):
            (Path(folder) / name).symlink_to((out / name).resolve(), target_is_directory=True)
        command = [sys.executable, ROOT / "06_finetune.py", "--out", folder, "--steps", str(steps), "--tasks", "0",
                   "--eval-every", str(steps), "--lora-rank", str(rank)]
        printed = Path(folder) / "printed.txt"
        with open(printed, "w", encoding="utf-8") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
            peak = os.wait4(process.pid, 0)[2].ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
        log = np.genfromtxt(Path(folder) / "chat" / "log.csv", delimiter=",", names=True, encoding="utf-8")
        return printed.read_text(encoding="utf-8"), log, peak


def compare_ranks(out, ranks, steps):
    """Print for each rank the parameters trained, the loss of held-out answers, the speed and the memory."""
    print(f"{'rank':>5}{'trained':>12}{'answer loss':>13}{'tokens/s':>10}{'peak MB':>9}")
    for rank in ranks:
        printed, log, peak = tune(out, rank, steps)
        trained = re.search(r"([\d,]+) parameters are trained", printed)[1]
        print(f"{rank:5}{trained:>12}{log['val_loss'][-1]:13.3f}{statistics.median(log['tokens_per_second']):10,.0f}{peak:9,.0f}")


def compare_with_transformers(folder, tasks):
    """Print on how many instructions prompt and greedy answer are the same in transformers."""
    import transformers
    model, tokenizer, ends = chapter5.open_model(folder, "cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    template = transformers.AutoTokenizer.from_pretrained(folder)
    settings, equal_ids, equal_answers = chapter5.Config(temperature=0.0, max_tokens=60), 0, 0
    for task in tasks:
        asked = task.conversation[:1]
        prompt, answer = chapter5.render_chat(tokenizer, asked), []
        for (token,), _ in chapter5.generate(model, [prompt], settings, tokenizer.vocab_size):
            answer.append(token)
            if token in ends:
                break
        written = theirs.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False)[0, len(prompt):].tolist()
        equal_ids += template.apply_chat_template(asked, add_generation_prompt=True, return_dict=False) == prompt
        equal_answers += written == answer
    print(f"{folder} in transformers {transformers.__version__}: of {len(tasks)} prompts {equal_ids} have equal ids, and "
          f"{equal_answers} greedy answers are equal token for token")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="course folder with base and chat")
    parser.add_argument("--tasks", type=int, default=150, help="of each held-out set")
    parser.add_argument("--tasks-seed", type=int, help="of the held-out sets (default: that of the run)")
    parser.add_argument("--examples", type=int, help="training tasks to look for copies in (default: those of the run)")
    parser.add_argument("--sentences", type=Path, help="a file of your own tasks, see above")
    parser.add_argument("--only-sentences", action="store_true", help="nothing but those")
    parser.add_argument("--device", default="", help="cpu, cuda ... (default: the fastest there is)")
    parser.add_argument("--ranks", type=int, nargs="*", default=[], help="tune at these LoRA ranks instead")
    parser.add_argument("--steps", type=int, default=300, help="of --ranks")
    parser.add_argument("--transformers", type=int, default=0, help="compare so many answers with transformers' instead")
    flags = parser.parse_args()
    if flags.ranks:
        return compare_ranks(flags.out, flags.ranks, flags.steps)
    run = chapter4.read_checkpoint(flags.out / "chat")["config"]
    seed = run["tasks_seed"] if flags.tasks_seed is None else flags.tasks_seed
    device = chapter4.choose_device(flags.device)
    base, tokenizer, base_ends = chapter5.open_model(run["init"] or flags.out / "base", device)
    tuned, tokenizer_of_chat, ends = chapter5.open_model(flags.out / "chat", device)
    words, new_words, noise = chapter6.split_names(tokenizer_of_chat)
    tasks = chapter6.held_out_tasks(words, new_words, flags.tasks, seed)
    if flags.transformers:
        return compare_with_transformers(flags.out / "chat", list(chain.from_iterable(tasks.values()))[::4][:flags.transformers])
    results, start = {}, time.time()
    if not flags.only_sentences:
        training = chapter6.draw_tasks(words, flags.examples or run["examples"], run["seed"], noise=noise)
        if chapter1.CHAT_START in tokenizer.special_tokens:
            results = show_before(base, tokenizer, base_ends, tasks, training)
        results |= show_after(tuned, tokenizer_of_chat, ends, tasks, training)
    if flags.sentences:
        results["own sentences"] = show_sentences(tuned, tokenizer_of_chat, ends, read_sentences(flags.sentences))
    print(f"\n{flags.tasks} tasks of each set, drawn with seed {seed}; a base model got {FEW} of each. The number in a label is the "
          f"temperature. {time.time() - start:.0f} s")
    chapter6.show_table(results)


if __name__ == "__main__":
    main()
