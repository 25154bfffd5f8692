"""LoRA on convolutions: a small network learns handwritten digits, then the same digits rotated by 90 degrees.

    python examples/04_convolution.py

Every gradient is written by hand: convolutions, ReLU, the linear layer, cross-entropy. The digits come from
scikit-learn: 1797 images of 8 x 8 (pip install scikit-learn).
"""

import copy
import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the arrays are small: more threads would only wait

import numpy as np
from sklearn.datasets import load_digits

from minilora import Conv2d, Flatten, Linear, ReLU, Sequential, adapt, cross_entropy, merge, train

EPOCHS = 30


def conv(n_in, n_out, rng, **steps):
    bound = 1 / np.sqrt(9 * n_in)  # PyTorch's initialisation
    weight = rng.uniform(-bound, bound, (n_out, n_in, 3, 3))
    return Conv2d(weight.astype("f4"), rng.uniform(-bound, bound, n_out).astype("f4"), padding=1, **steps)


def accuracy(model, X, labels):
    return (model(X).argmax(axis=1) == labels).mean()


def trained(model, X, labels, lr):
    train(model, X, labels, loss=cross_entropy, epochs=EPOCHS, batch_size=64, lr=lr, rng=np.random.default_rng(1))
    return model


rng = np.random.default_rng(0)
digits = load_digits()
order = rng.permutation(len(digits.target))
images, labels = (digits.images[order, None] / 16).astype("f4"), digits.target[order]
rotated = np.rot90(images, axes=(2, 3)).copy()
training, test = slice(0, 1200), slice(1200, None)

# 1. Train a network on upright digits.
net = Sequential(
    conv1=conv(1, 16, rng),  # (N, 1, 8, 8) -> (N, 16, 8, 8)
    act1=ReLU(),
    conv2=conv(16, 32, rng, stride=2),  # -> (N, 32, 4, 4)
    act2=ReLU(),
    flat=Flatten(),  # -> (N, 512)
    fc=Linear.init(512, 10, rng=rng),
)
trained(net, images[training], labels[training], lr=2e-3)

# 2. Rotate the digits: the filters detect strokes that now run the other way. A few numbers learn the difference.
models = {"unchanged": net}
for rank in (1, 2, 4, 8):
    start = adapt(net, ["conv1", "conv2", "fc"], rank=rank, alpha=2 * rank, rng=rng)
    models[f"LoRA, r = {rank}"] = trained(start, rotated[training], labels[training], lr=5e-3)
models["all weights"] = trained(copy.deepcopy(net), rotated[training], labels[training], lr=2e-3)

print(f"{'':16}{'trained':>9}  {'rotated digits':>14}  {'upright digits':>14}")
for name, model in models.items():
    count = 0 if model is net else sum(p.size for p in model.trainable().values())
    scores = [accuracy(merge(model), X[test], labels[test]) for X in (rotated, images)]
    print(f"{name:16}{count:9,}  {scores[0]:14.1%}  {scores[1]:14.1%}")
print("\nThe network itself is unchanged: without its adapter it still reads upright digits as in the first line.")
