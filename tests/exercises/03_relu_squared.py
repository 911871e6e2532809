"""Chapter 3, exercise (b): gate the MLP with a squared ReLU, one entry in the table; train it with --mlp relu2."""
import tempfile

import torch

CHAPTER = "03_model"
OLD = '''    "gelu": (nn.GELU("tanh"), False), '''
NEW = '''    "relu2": (lambda x: F.relu(x).square(), True),
    "gelu": (nn.GELU("tanh"), False), '''


def check(chapter):
    assert "relu2" in chapter.MLPS
    config = chapter.GPTConfig(vocab_size=50, context=8, layers=1, width=8, heads=2, hidden=16, mlp="relu2")
    mlp, x = chapter.MLP(config), torch.randn(2, 3, 8)
    expected = mlp.down_proj(mlp.gate_proj(x).clamp(min=0) ** 2 * mlp.up_proj(x))
    assert torch.allclose(mlp(x), expected)
    with tempfile.TemporaryDirectory() as folder:              # saved as what it is, and opened again
        model, ids = chapter.GPT(config), torch.arange(8)[None]
        model.save(folder)
        assert chapter.write_config(config)["model_type"] == "course" and torch.equal(chapter.GPT.load(folder)(ids), model(ids))
