"""What decoder.md asserts and shows; the names are the page's own."""

import re

import costs
import rungs
from pages import DOCS, holds, own_picture, says, shown

from minilora import Llama, LlamaConfig
from minilora.language.llama import checkpointed
from minilora.language.memory import cache_bytes, step_bytes
from minilora.layer import rebuild
from minilora.layers.rotary import frequencies
from minilora.training import backpropagate

# %% The whole model

assert gradcheck(loss, some, found).passed and len(some) == 3
assert sum(".mlp." in name for name in arrays) == 3 * config.num_hidden_layers
says("A third layer leads back to the width", "measures three of its arrays through the whole model")

# %% Where LoRA goes

says(f"the {len(every)} places for adapters")
everywhere = adapt(model, "all-linear", rank=4, alpha=8, rng=rng)
assert len(every) == 7 and everywhere.trainable().keys() == adapted.trainable().keys()
says("LoRA goes beside the seven linear layers of each block", '`"all-linear"` for all seven.')

# %% How far the gradient goes


def small_model(targets, blocks=3):
    """Return a model of the page's sizes, by default of as many blocks, with adapters of rank 4 or with none."""
    config = LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=blocks, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, frequencies=frequencies(8, base=10_000.0),
        tie_word_embeddings=True,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape) / np.sqrt(shape[-1]) for name, shape in config.shapes().items()}
    model = Llama.build(config, arrays)
    return model if targets is None else adapt(model, targets, rank=4, alpha=8, rng=rng)


WHERE = {
    "all weights": (None, "the embedding"),
    "all seven, all blocks": ("all-linear", "block 0, attention"),
    "q and v of block 2": (r".*layers\.2\.self_attn\.[qv]_proj", "block 2, attention"),
    "down of block 1": (r".*layers\.1\.mlp\.down_proj", "block 1, MLP"),
    "q and v of block 1": (r".*layers\.1\.self_attn\.[qv]_proj", "block 1, attention"),
    "q and v of block 0": (r".*layers\.0\.self_attn\.[qv]_proj", "block 0, attention"),
}
keeps, lines = {}, []
for what, (targets, lowest) in WHERE.items():
    decoder = small_model(targets).model
    caches = decoder.forward(ids[:, :-1])[1].kept[-1]
    of = {name: 0 if c is None else cache_bytes(c) for (name, _), c in zip(decoder.steps(), caches, strict=True)}
    place = {"the embedding": "embed_tokens"}.get(lowest, lowest.partition(",")[0].replace("block ", "layers."))
    assert next(name for name, size in of.items() if size) == place  # below it nothing is kept, for nothing comes down
    keeps[what] = sum(of.values())
    lines.append(f"| {what} | {lowest} | {keeps[what] / 1000:.1f} kB |\n")
    if what == "all seven, all blocks":
        drawn = own_picture(DOCS / "learn" / "decoder.md", "way")
        said = {f"{float(kB):.1f}" for kB in re.findall(r"keeps ([\d.]+) kB", drawn)}
        assert said == {f"{size / 1000:.1f}" for size in of.values()}
shown("way", "| what trains | dy goes down to | kept for backward |\n|---|---|--:|\n" + "".join(lines))
says("with adapters beside all seven layers of all blocks, that is a little *more*")
assert 1 < keeps["all seven, all blocks"] / keeps["all weights"] < 1.1

# %% What need not be kept

lines, costs_of = [], {}
for what, targets in {"LoRA": "all-linear", "all weights": None}.items():
    for blocks in (3, 24):
        deep = small_model(targets, blocks)
        deep.model.embed_tokens.frozen = True  # it has no product
        seen = rebuild(deep, array=lambda a: a.view(costs.Watched))
        forward = costs.watch(lambda: seen(ids)).multiply_adds
        cells = [f"{what}, {blocks} blocks"]
        for way in (seen, checkpointed(seen)):
            kept = step_bytes(way.forward(ids)[1]) / 1e3
            step = costs.watch(lambda: backpropagate(way, ids, ids, cross_entropy)).multiply_adds
            costs_of.setdefault(f"{what}, {blocks}", []).append(step / forward)
            cells += [f"{kept:,.0f} kB", f"{step / forward:.1f} forwards"]
        lines.append(f"| {' | '.join(cells)} |\n")
shown(
    "forwards", "| | kept | a step costs | recomputed, kept | a step costs |\n|---|--:|--:|--:|--:|\n" + "".join(lines)
)

lora, full = costs_of["LoRA, 24"], costs_of["all weights, 24"]
assert [round(of) for of in (*lora, *full)] == [2, 3, 3, 4] and 0.4 < lora[1] / lora[0] - 1 < 0.6
assert abs(full[1] / full[0] - 1 - 1 / 3) < 0.02
says("recomputed it has three. A weight that trains has $dW$ too: four in the place of three.")
says("recomputing add about half to LoRA's computation, and a third where all weights train", "that trains has three.")

deep = small_model("all-linear", 24)
plain, lean = (step_bytes(m.forward(ids)[1]) for m in (deep, checkpointed(deep)))
assert lean < plain / 8
c = plain - step_bytes(small_model("all-linear", 23).forward(ids)[1])  # of a block
e = ids.size * config.hidden_size * arrays[names["q"]].itemsize
holds(r"\text{kept}", kept=lean - (plain - 24 * c), L=24, e=e, c=c)  # but for what the embedding and the head keep
gradients = [backpropagate(m, ids, ids, cross_entropy) for m in (deep, checkpointed(deep))]
assert all(np.array_equal(g, gradients[1][name]) for name, g in gradients[0].items())

# %% One task, four networks

shown("rungs", rungs.table("decoder"))
rows = list(rungs.RECORDED.values())
assert len(rows) == 4
says("## One task, four networks", "On people the last three are nearly level")
after, people = ([row[key] for row in rows] for key in ("dinosaurs after", "people"))
assert after == sorted(after, reverse=True) and after[0] - after[-1] > 0.4
assert people[0] > max(people[1:]) + 0.15 and max(people[1:]) - min(people[1:]) < 0.03
assert all(row["LoRA numbers"] < row["numbers"] / 3 for row in rows)
assert all(row["dinosaurs after"] < row["dinosaurs before"] - 0.5 for row in rows)
