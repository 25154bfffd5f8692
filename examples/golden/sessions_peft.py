"""What transformers with PEFT answers in the golden sessions: one model, whose adapters come and go.

    pip install -e '.[models]' torch transformers peft
    minilora golden GOLDEN
    python sessions_peft.py GOLDEN RESULTS [float64|float32|bfloat16]
    minilora golden GOLDEN --compare RESULTS

A name that stands for another folder than before is swapped hot (`hotswap_adapter`) or, where that refuses, deleted
and loaded. A batch with several adapters is one forward with `adapter_names`. Tokens that follow come from `generate`,
with its cache.
"""

import sys
from contextlib import nullcontext

import torch
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from transformers import AutoModelForCausalLM

from minilora.conformance.golden.asking import ask

golden, results = sys.argv[1:3]
precision = sys.argv[3] if len(sys.argv) > 3 else "float32"
BASE = "__base__"  # PEFT's word for no adapter


class Engine:
    def __init__(self, base):
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, precision))
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

    def logits(self, request, ids, **options):
        if request.generate:
            options |= {"attention_mask": torch.ones_like(ids), "do_sample": False}
            options |= {"output_logits": True, "return_dict_in_generate": True}
            made = self.model.generate(input_ids=ids, max_new_tokens=request.generate, **options)
            return torch.stack(made.logits, dim=1).float().numpy()
        found = self.model(input_ids=ids, **options).logits.float().numpy()
        return found[:, :-1] if request.each else found


for id, error in ask(golden, Engine, results, computed_in=precision).items():
    print(f"{id}: {error[:160]}")
