"""Chapter 6, exercise (b): a kind of task of one's own. One line of the grammar: what it returns, its code, its description."""
CHAPTER = "06_finetune"
OLD = 'GRAMMAR = """\n'
NEW = OLD + "number | max(L) - min(L) | the {spread|range} of {the|all} {items|elements} {of|in} L\n"
LETTERS = "bdfgklmnprstvz"
WORDS = [f"{first}a{second}o" for first in LETTERS for second in LETTERS]


def check(chapter):
    tasks = [task for task in chapter.draw_tasks(WORDS, 4000, 1) if "max(L) - min(L)" in task.entries]
    assert {len(task.entries) for task in tasks} == {1, 2}       # alone, of a sorted list, the square of it ...
    assert all("the spread of" in task.description or "the range of" in task.description for task in tasks)
    answers = [task.source for task in tasks]
    assert set(chapter.judge(tasks, answers, [True] * len(tasks))) == {"pass"}
    alone = [task for task in tasks if len(task.entries) == 1]
    for name, other in (("max", "sum"), ("min", "len"), ("max", "min")):
        wrong = [task.source.replace(f"{name}(", f"{other}(") for task in alone]
        assert "pass" not in chapter.judge(alone, wrong, [True] * len(alone))
