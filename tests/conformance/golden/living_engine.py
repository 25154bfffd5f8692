"""An engine that lives from request to request: it merges, caches, and keeps adapters under names.

Its numbers are those of the foreign reader. `bug` is what it does wrong; the tests plant each.
"""

import json

import numpy as np

from .foreign_reader import add_adapter, base_of, logits


def to_bfloat16(x):
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32).astype(np.float64)


def alpha(folder, name):
    config = json.loads((folder / "adapter_config.json").read_text())
    return config["alpha_pattern"].get(name.split(".")[-2], config["lora_alpha"])


class Engine:
    def __init__(self, base, bug=None):
        self.bug, (self.config, self.W) = bug, base_of(base, None)
        self.names = {}  # what stands under each name: its folder, and the change of each weight at scale 1
        self.loaded = {}  # of these, what was to be loaded before anyone asked for it
        self.scales = {}
        self.prefixes = {}  # by what is taken for the same prefix: the tokens, and the keys and values
        self.merged = None
        self.responses = {}
        self.compiled = None
        self.before = None

    def __call__(self, request):
        uses = list(request.adapters)
        for name in request.unload:
            self.unload(name)
        for use in request.load:
            self.load(use)
            self.loaded[use.name] = self.names[use.name]
            if self.bug == "loading adds":  # and asking for it adds nothing more
                changes = self.names[use.name][1]
                self.W = {name: W + changes.get(name, 0) for name, W in self.W.items()}
                self.names[use.name] = (use.folder, {})
        self.request = request
        if self.bug == "first of the batch":
            uses = uses[:1] * len(uses)
        if self.bug == "last of the batch":
            uses = uses[-1:] * len(uses)
        if self.bug == "batch sorted":
            uses.sort(key=lambda use: use.name if use else "")
        if self.bug == "base rows take slot 0":
            uses = [use or next(filter(None, uses), None) for use in uses]
        if self.bug == "base rows take the last":
            uses = [use or next(filter(None, uses[::-1]), None) for use in uses]
        if self.bug == "next of the batch":
            uses = [*uses[1:], uses[0]]
        if self.bug == "the one before of the batch":
            uses = [uses[-1], *uses[:-1]]
        self.weights = {use.name: self.scale(use) for use in dict.fromkeys(uses) if use is not None}
        if request.merged:
            return self.while_merged(uses[0], request.prompts)
        pairs = list(zip(request.prompts, uses, strict=True))
        if self.bug == "answers sorted":
            pairs.sort(key=lambda pair: pair[1].name if pair[1] else "")
        return np.stack([self.answer(prompt, use) for prompt, use in pairs])

    def answer(self, prompt, use):
        if self.bug == "responses by prompt" and (key := prompt.tobytes()) in self.responses:
            return self.responses[key]
        if self.bug == "compiled":
            self.compiled = use = self.compiled or use
            self.weights.setdefault(use and use.name, 1.0)
        W = self.applied(use)
        if use is None and self.bug in ("loaded is on", "loaded last is on"):
            for _, changes in [*self.loaded.values()][-1 if self.bug == "loaded last is on" else 0 :]:
                W = {name: w + changes.get(name, 0) for name, w in W.items()}
        if self.bug == "never switched off" and use is not None and use != self.before:
            self.W, self.before = W, use
        if self.bug == "added on loading":
            W = self.W
        if self.request.each:
            z = self.within(prompt, W)
        elif self.request.generate:
            z = self.following(prompt, use, W)
        else:
            z = self.with_prefix(prompt, use, W)
        self.responses[prompt.tobytes()] = z
        return z

    def applied(self, use):
        W = dict(self.W)
        if use is not None:
            self.load(use)
            for name, change in self.names[use.name][1].items():
                W[name] = W[name] + self.weights[use.name] * change
        return W

    def within(self, prompt, W):
        if self.bug == "base within":
            W = self.W
        if self.bug == "no head within":
            W = {**W, "lm_head.weight": self.W["lm_head.weight"]}
        if self.bug == "first of the batch within":
            W = self.applied(self.request.adapters[0])
        z = logits(self.config, W, prompt)
        return z[1:] if self.bug == "late within" else z[:-1]

    def following(self, prompt, use, W):
        z, ids = [self.with_prefix(prompt, use, W)], prompt
        while len(z) < self.request.generate:
            ids = np.append(ids, z[-1].argmax())
            if self.bug in ("base follows", "first of the batch follows"):
                if len(z) == 1:
                    kept = {}
                    logits(self.config, W, ids, cache=kept)  # the prompt's keys and values
                first = self.request.adapters[0] if self.bug == "first of the batch follows" else None
                z.append(logits(self.config, self.applied(first), ids, cache=kept)[-1])
            else:
                z.append(self.with_prefix(ids, use, W))
        return np.stack(z)

    def load(self, use):
        old = self.names.get(use.name)
        if old is not None and (old[0] == use.folder or self.bug == "weights by name"):
            return
        swapped = self.bug == "swapped without patterns" and old is not None
        changes = self.changes(use.folder, "no alpha_pattern" if swapped else None)
        if self.bug == "old alpha" and old is not None:
            changes = {name: alpha(old[0], name) / alpha(use.folder, name) * W for name, W in changes.items()}
            self.names[use.name] = (old[0], changes)
            return
        if self.bug == "old modules stay" and old is not None:
            changes = {**old[1], **changes}
        if self.bug == "added on loading":
            self.W = {name: W + changes.get(name, 0) for name, W in self.W.items()}
        self.names[use.name] = (use.folder, changes)

    def changes(self, folder, bug=None):
        after = dict(self.W)
        add_adapter(after, folder, 1.0, bug)
        return {name: W - self.W[name] for name, W in after.items() if W is not self.W[name]}

    def unload(self, name):
        old = self.names.pop(name, None)
        self.loaded.pop(name, None)
        if self.bug == "unloading takes off" and old is not None:
            self.W = {name: W - old[1].get(name, 0) for name, W in self.W.items()}

    def scale(self, use):
        if self.bug == "no scale":
            return 1.0
        if self.bug == "scale squared":
            return use.weight**2
        if self.bug == "scale sticks":
            return self.scales.setdefault(use.name, use.weight)
        if self.bug == "scale of before":
            old = self.scales.get(use.name, use.weight)
            self.scales[use.name] = use.weight
            return old
        if self.bug == "scale adds up":
            self.scales[use.name] = use.weight * self.scales.get(use.name, 1.0)
            return self.scales[use.name]
        return use.weight

    def with_prefix(self, prompt, use, W):
        if self.bug and not self.bug.startswith("prefixes"):  # an engine that changes its weights keeps no prefix
            return logits(self.config, W, prompt)[-1]
        key = use and (use.name, use.folder, use.weight)
        if self.bug == "prefixes by tokens":
            key = ""
        if self.bug == "prefixes by name":
            key = use and use.name
        known, kept = self.prefixes.get(key, (np.empty(0, int), {}))
        pairs = zip(known, prompt[:-1], strict=False)
        count = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(known), len(prompt) - 1))
        count -= count % (16 if len(prompt) > 16 else 1)  # blocks, as servers keep them
        cache = {i: (k[:count], v[:count]) for i, (k, v) in kept.items()} if count else {}
        z = logits(self.config, W, prompt, cache=cache)[-1]
        if not count:
            self.prefixes[key] = (prompt[:-1], cache)
        return z

    def while_merged(self, use, prompts):
        changes = self.changes(use.folder)
        rounded = to_bfloat16 if self.bug == "merges in bfloat16" else lambda x: x
        inside = {**self.W, **{name: rounded(self.W[name] + change) for name, change in changes.items()}}
        if self.bug == "merged and beside":
            inside = {name: W + changes.get(name, 0) for name, W in inside.items()}
        z = np.stack([logits(self.config, inside, prompt)[-1] for prompt in prompts])
        self.W = {**inside, **{name: rounded(inside[name] - change) for name, change in changes.items()}}
        if self.bug == "merged and beside":
            self.W = {name: W - changes.get(name, 0) for name, W in self.W.items()}
        if self.bug == "unmerging does nothing":
            self.W = inside
        if self.bug == "unmerged twice":
            self.W = {name: W - changes.get(name, 0) for name, W in self.W.items()}
        return z
