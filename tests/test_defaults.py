"""Defaults that change what people compute. A new name needs no row here; another number belongs into the changelog.

cli/options.txt has those of the commands.
"""

import inspect
from importlib import import_module

from minilora.language.recipe import ADAPTER_DEFAULTS

PYTHON = {
    "article.run": {
        **{"rank": 1, "alpha": 1.0, "epochs": 100, "batch_size": 128, "lr": 0.001, "seed": 0, "dtype": "float32"},
        **{"n": 10_000, "in_features": 1001, "out_features": 1000},
    },
    "optim.Adam": {"lr": 0.001, "betas": (0.9, 0.999), "eps": 1e-8},
    "training.train": {"epochs": 100, "batch_size": None, "lr": 0.001, "log_every": 10},
    "linear.Linear.init": {"bias": True, "dtype": "float32"},
    "lora.LoRA.init": {"dtype": "float32"},
    "layers.mlp.MLP.init": {"activation": "relu", "dtype": "float32"},
    "layers.norm.RMSNorm": {"eps": 1e-6},
    "layers.convolution.Conv1d": {"stride": 1, "padding": 0, "dilation": 1, "groups": 1},
    "layers.convolution.Conv2d": {"stride": 1, "padding": 0, "dilation": 1, "groups": 1},
    "layers.rotary.Rotary.forward": {"start": 0},
    "layers.nf4.code_book": {"levels": 16},
    "layers.nf4.quantize_nf4": {"block_size": 64},
    "layers.nf4.dequantize_nf4": {"block_size": 64, "dtype": "float32"},
    "layers.quantized.QuantizedLinear": {"block_size": 64, "mean": 0.0, "dtype": "float32"},
    "layers.quantized.QuantizedLinear.from_linear": {"block_size": 64, "double_quant": True},
    "quantization.quantize": {"target_modules": "all-linear", "block_size": 64, "double_quant": True},
    "quantization.loftq": {"target_modules": "all-linear", "rounds": 1, "block_size": 64, "double_quant": True},
    "adaptation.adapt": {"use_rslora": False, "use_dora": False, "dora_norm": "constant", "init": "lora"},
    "adaptation.merge": {"requantize": False},
    "variants.scaling.loraplus": {"ratio": 16.0},
    "variants.pissa.pissa": {"use_rslora": False},
    "verify.closed_form.best_adapter": {"alpha": 1.0},
    "verify.closed_form.best_adapter_from_gram": {"alpha": 1.0},
    "verify.gradcheck.gradcheck": {"method": "auto", "allow_zero": (), "every_entry_below": 1000, "directions": 8},
    "files.adapters.save_adapter": {"fan_in_fan_out": False},
    "language.llama.Llama.load": {"dtype": "float32", "keep_blocks": False},
    "language.config.LlamaConfig": {"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False},
    "language.generation.generate": {"temperature": 0.0, "top_p": 1.0},
    "language.memory.training_memory": {"bits": 16, "recompute": False},
}


def named(path):
    """Return what a dotted path below `minilora` names: attributes of the longest module."""
    parts, names = path.split("."), []
    while True:
        try:
            value = import_module(".".join(["minilora", *parts]))
        except ModuleNotFoundError:
            names.insert(0, parts.pop())
            continue
        for name in names:
            value = getattr(value, name)
        return value


def test_a_default_in_python_is_as_published():
    parameters = {call: inspect.signature(named(call)).parameters for call in PYTHON}
    assert {call: {name: parameters[call][name].default for name in names} for call, names in PYTHON.items()} == PYTHON


def test_a_new_adapters_defaults_are_published():
    """The parser has none: an adapter that goes on from another takes what that one is."""
    assert ADAPTER_DEFAULTS == {"target_modules": "all-linear", "rank": 8, "alpha": 16.0}
