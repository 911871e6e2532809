"""The whole course as a reader runs it: six scripts, one after the other, on a tiny corpus and model."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted(ROOT.glob("0[1-6]_*.py"))
TINY = ["--no-compile", "--batch-tokens", "256", "--micro-batch", "2", "--eval-every", "20"]


def run(script, *flags, out, text=None):
    """Run a chapter as a subprocess and return what it printed; fails with its errors shown."""
    done = subprocess.run([sys.executable, str(ROOT / script), "--out", str(out), *map(str, flags)], input=text,
                          capture_output=True, text=True, encoding="utf-8", env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, f"{script}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """Run all six chapters once; return (root folder, {script: output})."""
    root = tmp_path_factory.mktemp("course")
    corpus = root / "corpus"
    corpus.mkdir()
    for number in range(150):                                  # 150 small modules that differ
        (corpus / f"module_{number}.py").write_text(
            f"import os\n\n\ndef double_{number}(value):\n    return value * {number}\n\n\n"
            f"class Box{number}:\n    def open(self, key={number}):\n        return self.{'abc'[number % 3]} + key\n" * 3,
            encoding="utf-8")
    out, printed = root / "out", {}
    printed["01"] = run("01_tokenizer.py", "--source", corpus, "--vocab-size", 400, "--workers", 1, out=out)
    printed["02"] = run("02_data.py", "--workers", 1, out=out)
    printed["03"] = run("03_model.py", out=out)
    printed["04"] = run("04_train.py", "--steps", 40, "--context", 128, *TINY, out=out)
    printed["05"] = run("05_sample.py", "--max-tokens", 20, "--prompt", "def ", out=out)
    printed["06"] = run("06_finetune.py", "--steps", 4, "--tasks", 6, *TINY, out=out)
    return out, printed


def test_each_chapter_leaves_what_the_next_one_needs(course):
    out, _ = course
    for path in ("tokenizer/tokenizer.json", "data/train.bin", "data/meta.json", "base/model.safetensors", "base/config.json",
                 "base/tokenizer.json", "base/log.csv", "base/loss.png", "chat/model.safetensors", "chat/chat_template.jinja",
                 "chat/generation_config.json"):
        assert (out / path).stat().st_size > 0, path


def test_one_tokenizer_travels_from_data_to_chat(course):
    out, _ = course
    meta = json.loads((out / "data" / "meta.json").read_text(encoding="utf-8"))
    files = [(out / folder / "tokenizer.json").read_bytes() for folder in ("tokenizer", "base", "chat")]
    assert files[0] == files[1] == files[2]
    assert meta["fingerprint"] == json.loads((out / "tokenizer" / "source.json").read_text(encoding="utf-8"))["fingerprint"]


def test_the_model_learns_something(course):
    out, _ = course
    lines = (out / "base" / "log.csv").read_text(encoding="utf-8").splitlines()
    column = lines[0].split(",").index("loss")
    losses = [float(line.split(",")[column]) for line in lines[1:]]
    assert len(losses) == 40 and losses[-1] < 0.8 * losses[0]


def test_the_sampler_writes_after_the_prompt(course):
    assert course[1]["05"].startswith("def ")


def test_the_table_shows_before_and_after(course):
    table = course[1]["06"]
    assert "before" in table and "after" in table and "obeys" in table


def test_chat_answers_and_ends_at_the_end_of_input(course):
    printed = run("05_sample.py", "--chat", "--max-tokens", 8, out=course[0], text="Write the function add(a, b).\n/reset\n")
    assert printed.count("> ") == 3


def test_a_missing_input_names_the_script_that_makes_it(tmp_path):
    for script, maker in (("02_data.py", "01_tokenizer.py"), ("04_train.py", "01_tokenizer.py"), ("05_sample.py", "04_train.py"),
                          ("06_finetune.py", "04_train.py")):
        done = subprocess.run([sys.executable, str(ROOT / script), "--out", str(tmp_path)], capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith("error:") and maker in done.stderr, (script, done.stderr)
        assert "Traceback" not in done.stderr


def test_unknown_flags_exit_with_2():
    for script in CHAPTERS:
        done = subprocess.run([sys.executable, str(script), "--no-such-flag"], capture_output=True, text=True)
        assert done.returncode == 2, script


def test_the_card():
    """Top level, sizes and imports are as promised in the README."""
    import ast
    allowed = {"README.md", "requirements.txt", "tests", "out", "__pycache__", *(chapter.name for chapter in CHAPTERS)}
    assert len(CHAPTERS) == 6 and {p.name for p in ROOT.iterdir() if not p.name.startswith(".")} <= allowed
    sizes = {chapter.name: len(chapter.read_text(encoding="utf-8").splitlines()) for chapter in CHAPTERS}
    assert max(sizes.values()) <= 400 and sum(sizes.values()) <= 2300, sizes
    known = {*sys.stdlib_module_names, "numpy", "torch", "regex", "matplotlib"}
    for chapter in CHAPTERS:
        for node in ast.walk(ast.parse(chapter.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
            assert all(name.split(".")[0] in known for name in names), (chapter.name, names)
            if isinstance(node, ast.FunctionDef) and node.name != "train":
                assert node.end_lineno - node.lineno < 40, (chapter.name, node.name)
