"""Chapter 3, exercise 2: gate with a squared ReLU instead of SiLU."""
import torch

CHAPTER = "03_model"
OLD = "F.silu(self.gate_proj(x))"
NEW = "F.relu(self.gate_proj(x)).square()"


def check(chapter):
    mlp = chapter.MLP(chapter.GPTConfig(width=8, heads=2, hidden=16))
    x = torch.randn(2, 3, 8)
    expected = mlp.down_proj(mlp.gate_proj(x).clamp(min=0) ** 2 * mlp.up_proj(x))
    assert torch.allclose(mlp(x), expected)
