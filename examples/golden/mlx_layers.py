"""What mlx-lm's layers compute of the golden adapters.

    pip install -e ".[files]" "mlx[cpu]" mlx-lm     (on a Mac: mlx)
    minilora golden GOLDEN
    python mlx_layers.py GOLDEN RESULTS
    minilora golden GOLDEN --compare RESULTS

mlx-lm has a layout of its own, with one rank and one scale for all modules, and no reader of PEFT's. So this script
puts its layers beside the base's and gives each its factors and its scale: what is judged is what the layers do.
"""

import json
import re

import mlx.core as mx
from asked import ask_cases, options
from mlx.utils import tree_unflatten
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear
from mlx_lm.utils import load_model

said, index = options(__doc__)


def setting(config, key, patterns, path):
    matching = (value for key, value in config[patterns].items() if re.match(rf"(.*\.)?({key})$", path))
    return next(matching, config[key])


def add(model, folder):
    """Put an adapter in PEFT's layout beside the model's layers."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = mx.load(str(folder / "adapter_model.safetensors"))
    if config["init_lora_weights"] is not True or config["lora_bias"]:
        raise ValueError("mlx-lm has no place for it")
    layers = dict(model.named_modules())
    for key in [key for key in tensors if re.search(r"lora_(embedding_)?A", key)]:
        path = re.fullmatch(r"base_model\.model\.(.*)\.lora_.*", key)[1]
        r = setting(config, "r", "rank_pattern", path)
        scale = setting(config, "lora_alpha", "alpha_pattern", path) / (r**0.5 if config["use_rslora"] else r)
        kind = LoRAEmbedding if "embedding" in key else DoRALinear if config["use_dora"] else LoRALinear
        layer = kind.from_base(layers[path], r=r, scale=scale)
        layer.lora_a, layer.lora_b = tensors[key].T, tensors[re.sub("A(?=$|.weight$)", "B", key)].T
        if config["use_dora"]:
            layer.m = tensors[f"base_model.model.{path}.lora_magnitude_vector"]
        model.update_modules(tree_unflatten([(path, layer)]))


def answered(case):
    model, _ = load_model(said.golden / case["base"])
    if isinstance(case["adapter"], str):
        add(model, said.golden / case["adapter"])
    elif case["adapter"]:
        raise ValueError("mlx-lm has no sum of adapters")
    logits = model(mx.array(case["prompts"]))
    mx.eval(logits)
    return {"logits": logits.astype(mx.float32)}


def save(tensors, file, notes):
    mx.save_safetensors(str(file), tensors)


ask_cases(said, index, answered, save=save)
