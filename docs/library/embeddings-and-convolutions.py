"""What embeddings-and-convolutions.md asserts and shows; the names are the page's own."""

from pages import holds

from minilora import Conv1d

# %% A convolution is a linear layer on patches

W, b, s, d = rng.standard_normal((4, 3, 2)), rng.standard_normal(4), 3, 2
signal = rng.standard_normal((5, 3, 11))
y = Conv1d(W, b, stride=s, padding=1, dilation=d)(signal)
holds("y_{n,o,p} =", y=y, W=W, x=np.pad(signal, ((0, 0), (0, 0), (1, 1))), b=b, s=s, d=d)
