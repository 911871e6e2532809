"""Chapter 2, exercise 2: a cleaning rule that removes spaces at the ends of lines."""
CHAPTER = "02_data"
OLD = 'RULES = {\n'
NEW = 'RULES = {\n    "trailing spaces": lambda text: re.sub(r"[ \\t]+$", "", text, flags=re.M),\n'


def check(chapter):
    assert chapter.RULES["trailing spaces"]("a  \n  b\t\nc") == "a\n  b\nc"
