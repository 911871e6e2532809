"""Chapter 2, exercise (b): a cleaning rule that removes spaces at the ends of lines; the run says how many texts it changed."""
from collections import Counter

CHAPTER = "02_data"
OLD = 'RULES = {\n'
NEW = 'RULES = {\n    "spaces at line ends": lambda text: re.sub(r"[ \\t]+$", "", text, flags=re.M),\n'


def check(chapter):
    text = "def double(value):  \n    return 2 * value\t\n"
    changed = Counter()
    cleaned = [text for _, text in chapter.clean([("train", text)], changed, Counter())]
    assert cleaned == ["def double(value):\n    return 2 * value\n"] and changed == {"spaces at line ends": 1}
