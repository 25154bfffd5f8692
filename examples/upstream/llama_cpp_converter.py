"""What llama.cpp's convert_lora_to_gguf.py writes, in the place of `minilora export`: lora_alpha, and the factors.

    python llama_cpp_converter.py export ADAPTER --model BASE -o FILE.gguf

The script in llama.cpp (read at commit 0b03adaa) writes ``lora_alpha`` of adapter_config.json as the one alpha of the
file, and the factors as they are. llama.cpp divides it by each factor's own rank. So rank_pattern is right, and
use_rslora and alpha_pattern are passed over. To see it, put a program `minilora` that runs this file into the PATH
of llama_cpp.mjs, as the first. `minilora golden --compare` then names "rsLoRA's root is ignored" and "alpha_pattern is
dropped".
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

from minilora.language.files.gguf import gguf_tensor

_, _, adapter, _, base, _, out = sys.argv
config = json.loads((Path(adapter) / "adapter_config.json").read_text())
head_dim = json.loads((Path(base) / "config.json").read_text())["head_dim"]
if config["use_dora"] or config["lora_bias"] or "embed_tokens" in config["target_modules"]:
    sys.exit("not for this script")
writer = gguf.GGUFWriter(out, "llama")
writer.add_type("adapter")
writer.add_string("adapter.type", "lora")
writer.add_float32("adapter.lora.alpha", float(config["lora_alpha"]))
for key, factor in load_file(Path(adapter) / "adapter_model.safetensors").items():
    path, _, part = key.removeprefix("base_model.model.").partition(".lora_")
    if part == "B.weight":
        name, factor = gguf_tensor(f"{path}.weight", factor, head_dim)
    else:
        name, _ = gguf_tensor(f"{path}.weight", np.zeros((head_dim, 1)), head_dim)
    writer.add_tensor(f"{name}.lora_{part[0].lower()}", np.ascontiguousarray(factor))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
