"""PEFT's add_weighted_adapter: under rsLoRA the new adapter is too large by the root of its rank.

    pip install torch peft; python peft_weighted_adapter.py

PEFT 0.21.2: the new adapter's configuration is the first one's with r and lora_alpha set to the new rank. Its
use_rslora stays, so that its scaling is r / sqrt(r) = sqrt(r), and should be 1: the factors have the scalings already.
"cat" of two adapters of rank 2 comes out twice as large, "svd" of rank 8 by 2.83 (huggingface/peft #3761).
"linear" is too large in the same way. Of one adapter, "svd" with svd_rank=1 has the adapter's own rank.
Up to 0.20.0, "svd" has each scaling twice besides.
"""

import peft
import torch


def model_of(names, use_rslora):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"], use_rslora=use_rslora)
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False)), config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    layer = model.base_model.model[0]
    for name in names:
        torch.nn.init.normal_(layer.lora_B[name].weight)
    return model, layer


print("peft", peft.__version__)
for use_rslora in (False, True):
    for kind, rank in (("cat", None), ("svd", 8)):
        model, layer = model_of(["one", "two"], use_rslora)
        wanted = 0.7 * layer.get_delta_weight("one") - 0.4 * layer.get_delta_weight("two")
        model.add_weighted_adapter(["one", "two"], [0.7, -0.4], "both", combination_type=kind, svd_rank=rank)
        times = (layer.get_delta_weight("both") * wanted).sum() / (wanted * wanted).sum()
        print(f"{'rsLoRA' if use_rslora else 'LoRA':6} {kind}: {times:.4f} times 0.7 d1 - 0.4 d2")
model, layer = model_of(["one"], False)
model.add_weighted_adapter(["one"], [1.0], "smaller", combination_type="svd", svd_rank=1)
rank = torch.linalg.matrix_rank(layer.get_delta_weight("smaller")).item()
print(f"one adapter, svd_rank=1: the new one has rank {rank}")
