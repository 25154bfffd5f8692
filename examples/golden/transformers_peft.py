"""What transformers with PEFT computes of the golden adapters, and answers in the sessions.

    pip install -e '.[models]' torch transformers peft bitsandbytes accelerate
    minilora golden GOLDEN
    python transformers_peft.py GOLDEN RESULTS [float64|float32|bfloat16] [--sessions]
    minilora golden GOLDEN --compare RESULTS

CASES. Beside the logits it writes merged weights. An adapter that PEFT refuses, with an error or with a warning that
its tensors do not fit, gets no answers. Mixtures of experts run "eager", since the usual way takes no float64.

SESSIONS. One model, whose adapters come and go. A name that stands for another folder than before is swapped hot
(`hotswap_adapter`) or, where that refuses, deleted and loaded. A batch with several adapters is one forward with
`adapter_names`. Tokens that follow come from `generate`, with its cache.
"""

import warnings
from contextlib import nullcontext

import torch
from asked import ask_cases, ask_sessions, given, options
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

said, index = options(__doc__, ("float64", "float32", "bfloat16"))
precision = said.way or ("float32" if said.sessions else "float64")
dtype = getattr(torch, precision)
BASE = "__base__"  # PEFT's word for no adapter


def adapted(case):
    """The base with the case's adapter, or with the weighted sum of its adapters."""
    how = {"experts_implementation": "eager"} if "experts" in index["bases"][case["base"]] else {}
    base = AutoModelForCausalLM.from_pretrained(said.golden / case["base"], dtype=dtype, **how)
    adapters = given(case)
    if not adapters:
        return base
    model = PeftModel.from_pretrained(base, said.golden / adapters[0][0], "0", autocast_adapter_dtype=False)
    for i, (folder, _) in enumerate(adapters[1:], start=1):
        model.load_adapter(said.golden / folder, str(i), autocast_adapter_dtype=False)
    if len(adapters) > 1:
        names, weights = [str(i) for i in range(len(adapters))], [weight for _, weight in adapters]
        model.add_weighted_adapter(names, weights, "sum", combination_type="cat")
        model.set_adapter("sum")
    return model


def answered(case):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing adapter keys|invalid shape).*")
        model = adapted(case)
    with torch.no_grad():
        tensors = {"logits": model(input_ids=torch.tensor(case["prompts"])).logits}
    try:
        merged = (model.merge_and_unload() if case["adapter"] else model).state_dict()
    except RuntimeError as error:  # lora_bias, where the layer has no bias to add it to
        print(f"{case['id']}: no merged weights: {str(error)[:100]}")
        return tensors
    return tensors | {
        f"merged.{name}": weight.clone()
        for name, weight in merged.items()
        if weight.ndim >= 2 and weight.is_floating_point()
    }


def notes(case):
    """Beside 4-bit weights, bitsandbytes computes in bfloat16 on processors that have instructions for it."""
    return {"computed_in": "bfloat16" if "quantised" in index["bases"][case["base"]] else precision}


class Engine:
    def __init__(self, base):
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        self.folders = {}

    def load(self, use):
        old = self.folders.get(use.name)
        if old == use.folder:
            return
        self.folders[use.name] = use.folder
        if not isinstance(self.model, PeftModel):
            self.model = PeftModel.from_pretrained(self.model, use.folder, use.name, autocast_adapter_dtype=False)
            return
        if old is not None:
            try:
                hotswap_adapter(self.model, use.folder, adapter_name=use.name)
                return
            except (ValueError, RuntimeError) as error:
                print(f"no hot swap from {old.name} to {use.folder.name}: {str(error).splitlines()[0][:100]}")
                self.model.delete_adapter(use.name)
        self.model.load_adapter(use.folder, use.name, autocast_adapter_dtype=False)

    @torch.no_grad()
    def __call__(self, request):
        for name in request.unload:
            del self.folders[name]
            if self.folders:
                self.model.delete_adapter(name)
            else:  # without an adapter left, PEFT's `disable_adapter` ends with a KeyError
                self.model = self.model.unload()
        uses = [use for use in request.adapters if use is not None]
        for use in (*request.load, *uses):
            self.load(use)
        ids, named = torch.tensor(request.prompts), isinstance(self.model, PeftModel)
        if len(set(request.adapters)) > 1:
            names = [use.name if use else BASE for use in request.adapters]
            return self.logits(request, ids, adapter_names=names)
        if uses:
            self.model.set_adapter(uses[0].name)
        if request.merged:
            self.model.merge_adapter([uses[0].name])
        weight = uses[0].weight if uses else 1.0
        without = self.model.disable_adapter() if named and not uses else nullcontext()
        with without, rescale_adapter_scale(self.model, weight) if weight != 1 else nullcontext():
            logits = self.logits(request, ids)
        if request.merged:
            self.model.unmerge_adapter()
        return logits

    def logits(self, request, ids, **more):
        if request.generate:
            more |= {"attention_mask": torch.ones_like(ids), "do_sample": False}
            more |= {"output_logits": True, "return_dict_in_generate": True}
            made = self.model.generate(input_ids=ids, max_new_tokens=request.generate, **more)
            return torch.stack(made.logits, dim=1).float().numpy()
        found = self.model(input_ids=ids, **more).logits.float().numpy()
        return found[:, :-1] if request.each else found


if said.sessions:
    ask_sessions(said, Engine, precision)
else:
    ask_cases(said, index, answered, notes, save_file)
