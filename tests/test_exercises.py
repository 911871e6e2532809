"""The answers to the README's exercises (b) still fit the chapters and still do what they should.

Run as a script, it checks a reader's own change: `python tests/test_exercises.py 1` that of chapter 1.
"""
import importlib.util
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ANSWERS = sorted((ROOT / "tests" / "exercises").glob("0*.py"))


def load(path, name):
    """Import a file under a name of its own."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module                                 # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_each_chapter_has_an_answer():
    assert [answer.name[:2] for answer in ANSWERS] == ["01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("path", ANSWERS, ids=[answer.stem for answer in ANSWERS])
def test_answer(path, tmp_path):
    """The edit fits, does what it should, and is needed: the check fails on the chapter as it is."""
    answer = load(path, f"answer_{path.stem}")
    with pytest.raises((AssertionError, AttributeError, KeyError)):
        answer.check(import_module(answer.CHAPTER))
    text = (ROOT / f"{answer.CHAPTER}.py").read_text(encoding="utf-8")
    assert text.count(answer.OLD) == 1, f"the lines that {path.name} changes are not in the chapter exactly once"
    changed = tmp_path / f"{answer.CHAPTER}.py"
    changed.write_text(text.replace(answer.OLD, answer.NEW), encoding="utf-8")
    answer.check(load(changed, f"changed_{path.stem}"))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    for path in ANSWERS:
        if path.name[1] in sys.argv[1:]:
            answer = load(path, "answer")
            answer.check(import_module(answer.CHAPTER))
            print(f"chapter {path.name[1]}: your change does what it should")
