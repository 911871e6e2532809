"""Chapter 1, exercise 2: give every digit a token of its own."""
CHAPTER = "01_tokenizer"
OLD = r"\p{N}{1,3}"
NEW = r"\p{N}"


def check(chapter):
    tokenizer = chapter.train_bpe(["in 2024, 2024 and 2024 again"] * 3, 300)
    assert len(tokenizer.encode("2024")) == 4
