"""The peers of `benchmark.py`: the same training step in torch and in PEFT, each written as its users write it."""

import warnings
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import linear, mse_loss

Step = Callable[[], object]


def step(task, model: torch.nn.Module, *, fused: bool = False, compiled: bool = False, residual: bool = False) -> Step:
    """Return a function that takes one training step, on the arrays of `task` and with its draws."""
    X, Y = torch.from_numpy(task.X), torch.from_numpy(task.residual if residual else task.Y)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, **({"fused": True} if fused else {}))
    forward = torch.compile(model) if compiled else model

    def one_step() -> None:
        rows = torch.from_numpy(task.draw())
        # index_select, not X[rows]: it is the faster of the two
        loss = mse_loss(forward(X.index_select(0, rows)), Y.index_select(0, rows))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    if compiled:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one_step()  # compiles, or raises here and not in the middle of the laps
    return one_step


def full(task) -> torch.nn.Module:
    """Return a linear layer, every weight of it trainable."""
    layer = torch.nn.Linear(task.in_features, task.out_features, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(task.W))
    return layer


class ArticleModule(torch.nn.Module):
    """The article's module: it forms A B, a matrix as large as the weight, in every step."""

    def __init__(self, task) -> None:
        super().__init__()
        self.linear = full(task).requires_grad_(False)
        self.A = torch.nn.Parameter(torch.randn(task.in_features, task.rank))
        self.B = torch.nn.Parameter(torch.zeros(task.rank, task.out_features))
        self.scaling = 1 / task.rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + torch.matmul(x, torch.matmul(self.A, self.B) * self.scaling)


class Adapter(torch.nn.Module):
    """The adapter alone, for a residual that was taken off by hand."""

    def __init__(self, task) -> None:
        super().__init__()
        self.A = torch.nn.Parameter(torch.randn(task.rank, task.in_features))
        self.B = torch.nn.Parameter(torch.zeros(task.out_features, task.rank))
        self.scaling = 1 / task.rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(linear(x, self.A), self.B) * self.scaling


def peft_model(task) -> torch.nn.Module:
    """Return a module with one linear layer, and PEFT's adapter on it."""
    model = torch.nn.Sequential(full(task))
    return get_peft_model(model, LoraConfig(r=task.rank, lora_alpha=1, target_modules=["0"]))


PEERS: dict[str, Callable[..., Step]] = {
    "full: torch": lambda task: step(task, full(task)),
    "full: torch, fused Adam": lambda task: step(task, full(task), fused=True),
    "full: torch, fused, compiled": lambda task: step(task, full(task), fused=True, compiled=True),
    "lora: the article's module": lambda task: step(task, ArticleModule(task)),
    "lora: the article's, compiled": lambda task: step(task, ArticleModule(task), compiled=True),
    "lora: PEFT": lambda task: step(task, peft_model(task)),
    "residual: torch": lambda task: step(task, Adapter(task), residual=True),
    "residual: torch, fused": lambda task: step(task, Adapter(task), residual=True, fused=True),
    "residual: torch, compiled": lambda task: step(task, Adapter(task), residual=True, fused=True, compiled=True),
}


def train_as_the_article_does(task, model: torch.nn.Module, epochs: int) -> None:
    """Run the article's `train`, line by line: Adam as it comes, the loss over all rows every ten epochs."""
    one_step, X, Y = step(task, model), torch.from_numpy(task.X), torch.from_numpy(task.Y)
    for epoch in range(1, epochs + 1):
        for _ in range(task.n // task.batch):
            one_step()
        if epoch % 10 == 0 or epoch == epochs:
            with torch.no_grad():
                mse_loss(model(X), Y).item()
