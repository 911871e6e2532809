"""Chapter 4, exercise (b): let the learning rate fall along a cosine instead of a line."""
import math
from types import SimpleNamespace

CHAPTER = "04_train"
OLD = "(1 - step / config.steps)"
NEW = "(0.5 + 0.5 * math.cos(math.pi * step / config.steps))"


def check(chapter):
    config = SimpleNamespace(steps=100, warmup=10)
    for step in (10, 50, 75, 99):
        assert math.isclose(chapter.lr_scale(step, config), (1 + math.cos(math.pi * step / 100)) / 2)
