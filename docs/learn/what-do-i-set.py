"""What what-do-i-set.md asserts and shows; the names are the page's own."""

import re
from inspect import signature

import markup
import pictures
import settings
import words
from formulas import difference
from pages import live, picture, says, shown
from settings import FACTS

from minilora import quantize_nf4
from minilora.language.memory import CONSTANTS, MATRICES, count_numbers, training_memory
from minilora.layers.nf4 import SCALES_IN_A_BLOCK


def on_site(target):
    return markup.address("learn", target) or (target if "//" in target else target.replace(".md", ".html"))


live("settings", settings.control(words.evidence(), on_site))


def linked(source):
    name, address = FACTS["sources"][source]
    return f"[{name}]({address})"


# %% How memory is counted


def gigabytes(model, **way):
    total = sum(training_memory(settings.config(model), tokens=TOKENS, **way).values()) / 1e9
    return f"{total:.2f}" if total < 9.995 else f"{total:,.1f}"


TOKENS, RANK = int(FACTS["defaults"]["tokens"]), 8
WAYS = [{"rank": RANK, "bits": bits} for bits in (16, 8, 4)] + [{}]
rows = [
    (name, *(f"{gigabytes(model, **way)}, {gigabytes(model, **way, recompute=True)}" for way in WAYS))
    for name, model in FACTS["models"].items()
]
shown("fits", pictures.table(("kept, recomputed", "16 bits", "8 bits", "4 bits", "full"), rows), exact=True)
beside, stored = {0: set(), RANK: set()}, set()  # bytes a number, in full and of an adapter; of a weight
for of in FACTS["models"].values():  # the page's formulas
    V, d, m, L, H, K, D = (of[size] for size in "VdmLHKD")
    two, three = of["kind"] == "qwen2", of["kind"] == "qwen3"
    M = L * (2 * d * H * D + 2 * d * K * D + 3 * d * m)
    rest = (1 if of["tied"] else 2) * V * d + 2 * d * L + d + two * L * (H + 2 * K) * D + three * 2 * L * D
    assert count_numbers(settings.config(of)) == (M, rest)
    for r in (0, RANK):
        P = r * L * (2 * (d + H * D) + 2 * (d + K * D) + 3 * (d + m)) if r else M + rest
        counted = training_memory(settings.config(of), tokens=TOKENS, rank=r or None)
        kept = L * (4 * d + 2 * D * (H + K) + 3 * m + 7 * r) + three * L * D * (H + K)
        assert counted["activations"] == 2 * TOKENS * kept and counted["logits"] == 4 * V * TOKENS
        state = sum(counted[part] for part in ("trained", "gradients", "Adam"))
        beside[r].add(state / P)
        stored.add(counted["weights"] / (M + rest))
        least = training_memory(settings.config(of), tokens=TOKENS, rank=r or None, recompute=True)["activations"]
        assert least == 2 * TOKENS * ((L - 1) * d + kept // L)
    printed = {  # in the page, with what each is, at the last rank above
        r"M = L\,(2dHD + 2dKD + 3dm)": M,
        "2dL + d": 2 * d * L + d,
        "L(H + 2K)D": L * (H + 2 * K) * D,
        "2LD": 2 * L * D,
        r"P = rL\,(2(d + HD) + 2(d + KD) + 3(d + m))": P,
        r"L\,(4d + 2D(H + K) + 3m + 7r)": kept - three * L * D * (H + K),
        "LD(H + K)": L * D * (H + K),
        r"(L - 1)\,d": (L - 1) * d,
        "4V": 4 * V,
    }
    for tex, value in printed.items():
        stated = re.sub(r"(?<=[A-Za-z])(?=[A-Za-z])", " ", tex if " = " in tex else f"Q = {tex}")
        assert not difference(stated, {size: of[size] for size in "VdmLHKD"} | {"r": r, stated[0]: value}, []), tex
says(*(f"${tex}$" for tex in printed))
(full,), (adapter,), (weight,) = *beside.values(), stored
block = signature(quantize_nf4).parameters["block_size"].default
assert len(MATRICES) == 7
assert CONSTANTS[4] == 8 / block + 32 / (block * SCALES_IN_A_BLOCK)
says(
    f"for {TOKENS:,} tokens a step, with adapters of rank {RANK} beside all seven matrices of each layer. "
    "*Recomputed* (gradient checkpointing) runs each forward twice.",
    f"Block scales add {CONSTANTS[4]:.3f} bits at 4 (NF4: a byte for {block} weights, a float32 for {SCALES_IN_A_BLOCK} bytes), "
    f"{CONSTANTS[8]:.4f} at 8 (a float32 for {32 / CONSTANTS[8]:,.0f} weights).",
    f"**The rest** stays in {8 * weight:g} bits:",
    "Qwen 3 $2LD$ for norms.",
    f"numbers of {adapter:g} bytes: number, gradient, Adam's two means. "
    f"Full fine-tuning adds {full:g} bytes to the {weight:g} of each weight.",
    "Qwen 3 adds $LD(H + K)$.",
)

# %% How rates compare

(answer,) = settings.ask(FACTS | {"evidence": words.evidence()}, inputs=[{}])["answers"]
picture("settings", answer["axis"], exact=True)
rows = [
    (
        f"{of['name']}, {linked(of['source'])}: {of['for']}",
        f"{of['rank']}, {of['alpha']}",
        *(of[part] for part in ("s", "rate", "product")),
    )
    for of in answer["recipes"]
]
shown("recipes", pictures.table(("recipe", "r, alpha", "s", "rate", "s × rate"), rows), exact=True)
qlora = FACTS["qlora"]
runs = [(int(run["rank"]), float(run["rate"])) for run in answer["runs"]]
rank, rate = runs[1]
assert runs == [(rank, rate / 2), (rank, rate), (rank, 2 * rate), (2 * rank, rate)]
says(
    "what others set, and four runs to make.",
    "Three runs take half, once and twice the rate; the fourth doubles the rank.",
    f"QLoRA ({qlora['rate']} below {qlora['up to'] / 1e9:.0f} billion weights, {qlora['above']} above)",
    f"Elsewhere it is {FACTS['start']} over your $s$",
)

# Facts from elsewhere: Schulman et al. 2025, https://thinkingmachines.ai/blog/lora/
says("By bits, 2 a number and about 1 a token, half as many could [hold it]")

# %% All the rules

rows = [(FACTS["when"][what], f"{linked(source)}; {size}") for what, (source, size) in FACTS["seen"].items()]
shown("rules", pictures.table(("what is said, and when", "seen by, at"), rows), exact=True)
assert FACTS["far"] == 2.5 and FACTS["lost"] == 0.5
assert FACTS["start"] == words.SCALING * words.start() == 0.0002
