"""Chapter 6, exercise 2: one more way to ask for a function."""
CHAPTER = "06_finetune"
OLD = '"write": (("{Write|'
NEW = '"write": (("Spell {signature} out.", "{Write|'


def check(chapter):
    functions = [chapter.Function(name, ("a", "b"), f"def {name}(a, b):\n    return a + b", "") for name in ("add", "sum")]
    asked = {turns[0]["content"] for seed in range(60) for _, _, turns in chapter.make_tasks(functions, 0, seed)}
    assert "Spell add(a, b) out." in asked
