"""Chapter 1, exercise (b): give every digit a token of its own, so that 2024 is four tokens and not two."""
CHAPTER = "01_tokenizer"
OLD = r"\p{N}{1,3}"
NEW = r"\p{N}"


def check(chapter):
    tokenizer = chapter.train_bpe(["in 2024, 2024 and 2024 again"] * 3, 300)
    assert len(tokenizer.encode("2024")) == 4 and tokenizer.decode(tokenizer.encode("2024")) == "2024"
    assert all(len(piece) == 1 for piece in tokenizer.tokens if piece.strip().isdigit())
