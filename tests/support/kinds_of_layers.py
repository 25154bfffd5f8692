"""A net with a layer of each kind that has adapters, and what PEFT calls their arrays."""

from safetensors.numpy import load_file

from minilora import Conv1d, Conv2d, Embedding, Linear, Sequential, adapt, adapters

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


def sizes(rng):
    return [int(n) for n in rng.integers(1, 6, 4)]


def model_of(rng, dtype="float64"):
    """A layer of each kind, in a net of nets, so that paths have dots. Nobody runs it as a whole."""

    def draw(*shape):
        return rng.standard_normal(shape).astype(dtype)

    (i, o, k, l), (v, d, c, h) = sizes(rng), sizes(rng)  # noqa: E741
    enc = Sequential(
        linear=Linear(draw(o, i), draw(o)),
        embedding=Embedding(draw(v, d)),
        conv1d=Conv1d(draw(o, c, k), padding=k),
    )
    return Sequential(enc=enc, conv2d=Conv2d(draw(o, c, h, l), draw(o), padding=(h, l), stride=2))


PATHS = {"linear": "enc.linear", "embedding": "enc.embedding", "conv1d": "enc.conv1d", "conv2d": "conv2d"}


def layer_of(model, path):
    for name in path.split("."):
        model = vars(model)[name]
    return model


def trained(model, rng):
    """Move every array of every adapter, as if the model had been trained."""
    for adapter in adapters(model).values():
        for array in adapter.trainable().values():
            array += (0.3 * rng.standard_normal(array.shape)).astype(array.dtype)
    return model


def adapted_by_module(model, rng, **options):
    """Ranks and alphas that differ from module to module."""
    found = {}
    for path in PATHS.values():
        rank, alpha = int(rng.integers(1, 5)), float(rng.choice([1, 2.5, 16, 0.3]))
        one = adapt(layer_of(model, path), "", rank=rank, alpha=alpha, rng=rng, **options)
        found[path] = adapters(trained(one, rng))[""]
    return found


def tensors_of(folder):
    return load_file(folder / WEIGHTS)


IMG, EMB = PREFIX + "img.", PREFIX + "emb."
