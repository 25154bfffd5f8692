"""Our side of `benchmark.py`: the task, our three ways to a training step, and the floors under them."""

from collections.abc import Callable
from itertools import cycle

import numpy as np

from minilora import Adam, Linear, LoRA, LoRALinear
from minilora.fast import residual_form
from minilora.training import backpropagate, draw_batches, take_rows

Step = Callable[[], object]


class Task:
    """Data, weights and draws for every contender; the article's sizes by default."""

    def __init__(self, n=10_000, in_features=1001, out_features=1000, batch=128, rank=1):
        self.n, self.in_features, self.out_features, self.batch, self.rank = n, in_features, out_features, batch, rank
        self.rng, self.drawn = np.random.default_rng(0), []
        self.X = self.rng.standard_normal((n, in_features), dtype=np.float32)
        self.Y = self.rng.standard_normal((n, out_features), dtype=np.float32)
        self.W = self.rng.standard_normal((out_features, in_features), dtype=np.float32)
        self.W *= in_features**-0.5
        self.residual = self.Y  # its values cost nothing and change no time: as good as Y - X W^T here

    def draw(self):
        """Return the rows of the next batch; an epoch's batches are drawn at once, as `train` does."""
        if not self.drawn:
            self.drawn = list(draw_batches(self.rng, self.n, self.batch))[::-1]
        return self.drawn.pop()


def ours(task, model, gradients=backpropagate):
    """Return the step that `minilora.train` takes, from the same public pieces."""
    optimizer, x, y = Adam(model.trainable()), task.X[: task.batch].copy(), task.Y[: task.batch].copy()

    def step():
        rows = task.draw()
        optimizer.step(gradients(model, take_rows(task.X, rows, out=x), take_rows(task.Y, rows, out=y)))

    return step


def linear(task):
    return Linear(task.W.copy())


def adapter(task):
    return LoRA.init(task.in_features, task.out_features, rank=task.rank, alpha=1, rng=task.rng)


def floor(task, gathers, products):
    """Return the least that a step must do: some of gathering its rows, x W^T, and dy^T x."""
    batches = cycle([task.draw() for _ in range(1000)])
    x, y = task.X[: task.batch].copy(), task.Y[: task.batch].copy()

    def step():
        if gathers:
            rows = next(batches)
            take_rows(task.X, rows, out=x)
            take_rows(task.Y, rows, out=y)
        if products >= 1:
            x @ task.W.T
        if products >= 2:
            y.T @ x

    return step


OURS: dict[str, Callable[[Task], Step]] = {
    "full: minilora": lambda task: ours(task, linear(task)),
    "lora: minilora": lambda task: ours(task, LoRALinear(linear(task), adapter(task))),
    "lora: minilora, residual form": lambda task: ours(
        task, LoRALinear(linear(task), adapter(task)), gradients=residual_form
    ),
    "residual: minilora": lambda task: ours(task, adapter(task)),
    "residual: minilora, residual form": lambda task: ours(task, adapter(task), gradients=residual_form),
}
FLOORS: dict[str, Callable[[Task], Step]] = {
    "full: floor, two products": lambda task: floor(task, False, 2),
    "full: floor, and gathers": lambda task: floor(task, True, 2),
    "lora: floor, if the base is run": lambda task: floor(task, True, 1),
    "residual: floor, gathers": lambda task: floor(task, True, 0),
}
