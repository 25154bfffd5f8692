"""Five wrong merges by PEFT and transformers, each with the first line that `minilora audit --merged` prints.

    python examples/broken_merges.py                    a small random Llama with an adapter
    python examples/broken_merges.py BASE ADAPTER       your model's folder and your PEFT folder

It needs torch, peft and transformers. It writes the merged models into a temporary folder, each as large as the base.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from minilora.cli import main as minilora


def loaded(dtype="auto"):
    """Return the base with its adapter."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base", dtype=dtype), "adapter")


def right(out):
    """Merge with merge_and_unload()."""
    loaded().merge_and_unload().save_pretrained(out)


def unloaded(out):
    """Call unload(), which removes the adapter, instead of merge_and_unload()."""
    loaded().unload().save_pretrained(out)


def again(out):
    """Load and merge the adapter a second time, into the merged model."""
    PeftModel.from_pretrained(loaded().merge_and_unload(), "adapter").merge_and_unload().save_pretrained(out)


def without_root(out):
    """Merge with a loader that ignores use_rslora."""
    model = loaded()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling |= {name: scaling / module.r[name] ** 0.5 for name, scaling in module.scaling.items()}
    model.merge_and_unload().save_pretrained(out)


def in_half(out):
    """Merge a float32 model in bfloat16, then save it in float32."""
    loaded(torch.bfloat16).merge_and_unload().float().save_pretrained(out)


def state(out):
    """Save the state of the model with its adapter, without merging."""
    os.makedirs(out)
    save_file({name: x.clone() for name, x in loaded().state_dict().items()}, f"{out}/model.safetensors")
    AutoConfig.from_pretrained("base").save_pretrained(out)


MERGES = (right, unloaded, again, without_root, in_half, state)


def small(folder):
    """Write a small random Llama, and a rank-stabilised adapter for all its linear layers."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4))
    model.save_pretrained(folder / "base")
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules="all-linear"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.01)
    model.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def first_line(*words):
    """Run a minilora command, and return its exit code and first line."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = minilora(list(words))
    return status, printed.getvalue().partition("\n")[0]


def run(folders=()):
    """Make each merge, then print the audit command with the first line of its output."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, adapter = folders or small(folder)
        for link, target in (("base", base), ("adapter", adapter)):
            if not (folder / link).exists():
                (folder / link).symlink_to(target, target_is_directory=True)
        rooted = json.loads((folder / "adapter" / "adapter_config.json").read_text()).get("use_rslora")
        with contextlib.chdir(folder):
            for merge in MERGES:
                if merge is without_root and not rooted:
                    continue
                with contextlib.redirect_stderr(io.StringIO()):
                    merge(merge.__name__)
                status, line = first_line("audit", "adapter", "--model", "base", "--merged", merge.__name__)
                print(f"# {merge.__doc__}\n$ minilora audit adapter --model base --merged {merge.__name__}")
                print(f"{line}\n(exit code {status})\n", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="*", type=lambda text: Path(text).resolve(), metavar="BASE ADAPTER")
    options = parser.parse_args()
    if len(options.folders) not in (0, 2):
        sys.exit("expected no folder, or two: BASE ADAPTER")
    run(options.folders)
