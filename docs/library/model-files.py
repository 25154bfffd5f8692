"""Checks and computed contents of model-files.md; its parts see the page's own names."""

# %% Models as files

from pathlib import Path

from pages import says

from minilora.language.config import MODEL_KINDS, SIZE_KEYS, from_json
from minilora.language.files import gguf
from minilora.language.files.tokens import NO_TEXT, USERS
from minilora.language.text import LONGEST_PIECE, token_ids


def missing(name):
    """Return the defaults of a missing setting, each with its kinds."""
    found = {}
    for kind, of in MODEL_KINDS.items():
        if name in of.defaults:
            found.setdefault(of.defaults[name], []).append(kind)
    return ", ".join(f"{value:,} for {' and '.join(kinds)}" for value, kinds in found.items())


K, D, experts, eps = map(missing, ("num_key_value_heads", "head_dim", "num_experts_per_tok", "rms_norm_eps"))
sizes = dict.fromkeys(SIZE_KEYS, 8) | {"hidden_size": 32}
llama, mixtral = (from_json(Path(), sizes | {"model_type": kind}) for kind in ("llama", "mixtral"))
others = {kind: of.rope_theta for kind, of in MODEL_KINDS.items() if of.rope_theta != llama.rope["rope_theta"]}
assert others == {"mixtral": mixtral.rope["rope_theta"]} and eps == f"{mixtral.rms_norm_eps} for mixtral"
epsilons = [f"{of.rms_norm_eps:.0e}".replace("e-0", "e-") for of in (mixtral, llama)]
says(
    f"| K, read; default H for llama, {K} |",
    f"| D, read; default {D}, else d / H |",
    f"| read; default {epsilons[0]} for mixtral, else {epsilons[1]} |",
    f"| K, read; default {experts} |",
    f"default {mixtral.rope['rope_theta']:,.0f} for mixtral, else {llama.rope['rope_theta']:,.0f} |",
    f"read: tokens of types {NO_TEXT[0]}, {NO_TEXT[1]} and {USERS} are matched literally; {NO_TEXT[0]} and {NO_TEXT[1]} are not text",
)
fields = {f"llama.{theirs}": 8 for ours, theirs in gguf.GGUF_SIZES.items() if ours in sizes or ours == "rms_norm_eps"}
fields |= {"general.architecture": "llama", "llama.embedding_length": sizes["hidden_size"]}
base = gguf._config(fields, {}).rope["rope_theta"]
says(f"| llama.rope.freq_base | any | the rotary base, read; default {base:,.0f} |")
assert round(LONGEST_PIECE / 1e6) == 2
says("no cut within two million characters")

# Facts from elsewhere: measured once on the machine that the page names, and the name of a model.
says("some 260 bytes of memory for each byte of a text", "OLMoE's and Llama 4's mixtures")
says("50 MB with a token for each byte\n  took 1.6 GB (Linux on x86-64, Python 3.11)")
assert "about 260 bytes of memory for each byte of text" in token_ids.__doc__
