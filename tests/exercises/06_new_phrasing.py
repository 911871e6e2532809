"""Chapter 6, exercise 2: one more way to ask for a function."""
CHAPTER = "06_finetune"
OLD = '"Code: {signature}.",'
NEW = '"Code: {signature}.", "Type {signature} for me.",'


def check(chapter):
    assert any(phrasing.startswith("Type ") for phrasing in chapter.PHRASINGS["write"][0])
    function = chapter.Function("add", ("a", "b"), "def add(a, b):\n    return a + b", "")
    asked = {chapter.library_conversations([function, function._replace(name="sub")], seed)[0][0]["content"] for seed in range(60)}
    assert "Type add(a, b) for me." in asked
