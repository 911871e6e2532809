"""Every command in the README names scripts and flags that exist; those that fit a CPU are also run."""
import dataclasses
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = {path.name: path.read_text(encoding="utf-8") for path in ROOT.glob("0[1-6]_*.py")}
OWN_PAIRS = re.search(r"^```json\n(.*?)^```", README, re.M | re.S)[1]
NOT_RUN = ("# GPU", "# network", "# long", "# needs", "# package")          # marks in the README
TINY = {"04_train.py": "--steps 6 --context 256 --batch-tokens 512 --micro-batch 2 --eval-every 3 --eval-tokens 1000 --no-compile",
        "06_finetune.py": "--steps 4 --batch-tokens 256 --micro-batch 4 --eval-every 2 --tasks 2 --examples 300 --no-compile"}


def commands():
    """Return (words, line) of each `python 0N_*.py ...` or `torchrun ...` in the README's shell blocks and in backquotes."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"`((?:python|torchrun) [^`]+\.py[^`]*)`", README)
    found = []
    for line in lines:
        for part in re.split(r"&&|;", line.split("#")[0]):
            words = shlex.split(part)
            scripts = [number for number, word in enumerate(words) if word.endswith(".py")]
            if scripts:
                found.append((words[scripts[0]:], line))
    return found


def flags_of(script):
    """Return the flags of a chapter or benchmark; a chapter's come from its Config."""
    if not re.match(r"0\d_", script):
        return set(re.findall(r"--[\w-]+", (ROOT / script).read_text(encoding="utf-8")))
    names = [item.name.replace("_", "-") for item in dataclasses.fields(import_module(script[:-3]).Config)]
    return {f"--{name}" for name in names} | {f"--no-{name}" for name in names} | {"--help"}


def test_the_readme_has_commands():
    assert len(commands()) > 20


@pytest.mark.parametrize("words, line", commands(), ids=[" ".join(words)[:70] for words, _ in commands()])
def test_command_names_what_exists(words, line):
    assert (ROOT / words[0]).exists(), line
    unknown = [word for word in words if word.startswith("--") and word.split("=")[0] not in flags_of(words[0])]
    assert not unknown, (line, unknown)


def test_every_linked_file_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r'src="([^"]+)"', README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_the_messages_in_the_table_of_troubles_are_those_of_the_scripts():
    code = "".join(CODE.values())
    rows = re.findall(r"^\| `([^`]+)` \|", README, re.M)
    assert len(rows) > 5
    for message in rows:
        for part in re.split(r"\.\.\.|--[\w-]+|\b\d+\b|:", message):
            assert part.strip() in code, (part, message)


def test_every_flag_exists():
    """Those in tables and in the text, too."""
    known = set().union(*map(flags_of, CODE)) | {"--index-url", "--local-dir", "--nproc-per-node"}
    for span in re.findall(r"`([^`\n]+)`", README):
        if ".py" not in span:                                  # of a script's own: see above
            assert set(re.findall(r"(?<!\S)--[\w-]+", span)) <= known, span


def test_names_linked_to_a_chapter_stand_in_it():
    links = re.findall(r"\[((?:`\w+`(?:, )?)+)\]\((\w+\.py)\)", README)
    assert len(links) > 10
    for names, script in links:
        for name in re.findall(r"\w+", names):
            assert re.search(rf"^ *((class|def) {name}\b|{name} =)", CODE[script], re.M), (name, script)


def test_each_chapter_has_three_exercises_an_answer_and_a_way_to_see_success():
    chapters = re.findall(r"^### ([1-6])\. (.*?)(?=^###? )", README, re.M | re.S)
    assert [number for number, _ in chapters] == list("123456")
    for number, text in chapters:
        a, b, c, fold = map(text.index, ("*(a)*", "*(b)*", "*(c)*", "<details><summary>Answer to (a)</summary>"))
        assert a < b < c < fold < text.index("</details>")
        assert re.search(rf"\(tests/exercises/0{number}_\w+\.py\)", text[b:c]), number
        assert "t worked if " in text[c:fold].replace("\n", " "), number


def test_torch_in_half_a_page_runs_and_prints_what_its_comments_say():
    half_page = README[README.index("### Torch in half"):]
    code = re.search(r"^```python\n(.*?)^```", half_page, re.M | re.S)[1]
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    shapes = re.findall(r"torch\.Size\(\[(.*)\]\)", printed)
    for line, shape in zip(re.findall(r".*\.shape\).*", code), shapes, strict=True):
        assert f"({shape})" in line
    *_, gradient, nudged = printed.split("\n")[:-1]
    assert gradient == "tensor(20.)" and abs(float(nudged) - 20) < 0.1


def test_the_rows_from_2019_to_today_are_those_of_the_benchmark(monkeypatch):
    """The flags of the rows down to each, one behind the other, set what the benchmark trained with."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    bench = import_module("bench_ablation")
    chapter1, chapter4 = import_module("01_tokenizer"), import_module("04_train")
    section = README[README.index("## From 2019"):README.index("## Benchmarks")]
    rows = re.findall(r"^\| ([^|]+) \| `(--[^`]+)` \|", section, re.M)
    assert [name for name, _ in rows] == list(bench.CHANGES)
    flags, settings = ["--preset", "small"], bench.FIRST
    for name, more in rows:
        flags += shlex.split(more)
        settings = {**settings, **bench.CHANGES[name]}
        config = chapter1.parse_flags(chapter4.Config, "", flags, chapter4.defaults_for)
        unused = {"matrix_lr"} if settings["optimizer"] == "adamw" else set()
        assert all(getattr(config, key) == value for key, value in settings.items() if key not in unused), name


def test_every_figure_is_shown():
    for figure in (ROOT / ".github" / "figures").glob("*"):
        assert figure.name in README, figure


def test_the_readme_is_short_enough():
    lines = README.splitlines()
    prose = [line for line in re.sub(r"^```.*?^```", "", README, flags=re.M | re.S).splitlines() if line[:1] != "|"]
    assert len(lines) <= 450
    assert max(map(len, prose)) <= 110, max(prose, key=len)


@pytest.mark.readme
def test_commands_run(tmp_path):
    """Run what fits a CPU in a copy of the course, on a few modules and with tiny models."""
    for chapter in ROOT.glob("0[1-6]_*.py"):
        shutil.copy(chapter, tmp_path)
    (tmp_path / "my_notes").mkdir()
    for number in range(150):
        (tmp_path / "my_notes" / f"{number}.txt").write_text(f"note {number}: " + "how to boil an egg, " * number, encoding="utf-8")
    (tmp_path / "mine.jsonl").write_text(OWN_PAIRS, encoding="utf-8")
    for source in ("01_tokenizer.py --source my_notes --vocab-size 400", "02_data.py",
                   "04_train.py " + TINY["04_train.py"], "06_finetune.py " + TINY["06_finetune.py"]):
        subprocess.run([sys.executable, *shlex.split(source)], cwd=tmp_path, check=True)
    ran = 0
    for words, line in commands():
        if not re.match(r"0\d_", words[0]) or "torchrun" in line or "gpt2 --out" in line or any(mark in line for mark in NOT_RUN):
            continue
        after = README[README.find(line) + len(line):]             # in a sentence, the mark follows in brackets
        if re.match(r"`[^`]{0,20}(`[^`]+`)?[^`]{0,20}\b(GPU|network|long|needs|package)\b", after):
            continue
        extra = [] if "--resume" in words or "--help" in words else shlex.split(TINY.get(words[0], ""))
        done = subprocess.run([sys.executable, *words, *extra], cwd=tmp_path, input="", capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, (line, done.stderr[-1500:])
        ran += 1
    assert ran > 10
