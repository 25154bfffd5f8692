"""What embeddings-and-convolutions.md asserts and shows; the names are the page's own."""

from pages import holds

from minilora import Conv1d

# %% A convolution is a linear layer on patches

own = np.random.default_rng(1)
W, b, s, d = own.standard_normal((4, 3, 2)), own.standard_normal(4), 3, 2
signal = own.standard_normal((5, 3, 11))
y = Conv1d(W, b, stride=s, padding=1, dilation=d)(signal)
holds("y_{n,o,p} =", y=y, W=W, x=np.pad(signal, ((0, 0), (0, 0), (1, 1))), b=b, s=s, d=d)
