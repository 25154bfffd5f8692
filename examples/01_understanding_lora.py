"""The article "Understanding LoRA with a minimal example", line by line, in minilora.

    python examples/01_understanding_lora.py

The comments show the article's R torch code.
"""

import numpy as np

from minilora import Linear, LoRA, LoRALinear, evaluate, train
from minilora.fast import residual_form

rng = np.random.default_rng(0)


def randn(*shape):
    return rng.standard_normal(shape).astype(np.float32)


# 1. Simulate data from a linear model.
theta = randn(1001, 1000)  # thetas <- torch_randn(d_in, d_out)
X = randn(10_000, 1001)
Y = X @ theta  # y <- torch_matmul(X, thetas)

# 2. Train a full-rank model on it: this is the "pre-trained" model.
model = Linear.init(1001, 1000, bias=False, rng=rng)  # nn_linear(d_in, d_out, bias = FALSE)
base_history = train(model, X, Y, rng=rng)  # train(model, X, y)

# 3. The task changes: theta + 1. The article calls it a rotation; it adds a matrix of rank 1, all ones.
X2 = randn(10_000, 1001)
Y2 = X2 @ (theta + 1)

# 4. The model does not fit the new task.
shifted = evaluate(model, X2, Y2)  # nnf_mse_loss(model(X2), y2)

# 5. Fine-tune with LoRA, r = 1: the model is frozen, and only the adapter trains. The article's A and B are our lora_A
#    and lora_B transposed. `gradients` is for speed. Without it, a step is forward, mse and backward, and computes the
#    same gradients. But the model is frozen and the loss is the squared error, so the gradients need the error only
#    inside two thin products, and `residual_form` never forms it.
lora = LoRALinear(model, LoRA(randn(1, 1001), np.zeros((1000, 1), np.float32), alpha=1))  # lora_nn_linear(model)
lora_history = train(lora, X2, Y2, gradients=residual_form, rng=rng)  # train(lora, X2, Y2)

# 6. The adapter has learned the change itself: ones.
delta = lora.adapter.delta()  # torch_matmul(lora$A, lora$B) * lora$scaling

# 7. Merge: one matrix again, as fast as the original model.
merged = lora.merge()  # model$weight$add_(delta_theta$t())

print("epoch      base loss      LoRA loss")
for epoch, base, adapted in zip(base_history.epochs, base_history.losses, lora_history.losses, strict=True):
    print(f"{epoch:5d} {base:14.7g} {adapted:14.7g}")
print(f"\nloss on the new task: base {shifted:.3f}, merged {evaluate(merged, X2, Y2):.7f}")
print(f"delta is between {delta.min():.4f} and {delta.max():.4f}")
