"""What what-do-i-set.md asserts and shows; the names are the page's own."""

import markup
import pictures
import settings
import words
from pages import Drawn, live, picture, shown


def on_site(target):
    return markup.address("learn", target) or (target if "//" in target else target.replace(".md", ".html"))


live("settings", Drawn(settings.control(words.evidence(), on_site)))


def linked(source):
    name, address = settings.SOURCES[source]
    return f"[{name}]({address})"


inputs, _ = settings.read_inputs(settings.DEFAULTS)
answer = settings.advise(inputs)

# %% How memory is counted

rows = []
for name, model in settings.MODELS.items():
    ways = settings.what_fits(model, 0, inputs["tokens"], 8)
    cells = [f"{kept['total']}, {recomputed['total']}" for kept, recomputed in zip(ways[::2], ways[1::2], strict=True)]
    rows.append((name, *cells))
head = ("kept, recomputed", *("full" if not bits else f"{bits} bits" for _, bits in settings.WAYS))
shown("fits", pictures.table(head, rows))
assert inputs["tokens"] == 4096

# %% How rates compare

picture("settings", Drawn(answer["axis"]))
rows = [
    (
        f"{of['name']}, {linked(of['source'])}: {of['for']}",
        f"{of['rank']}, {of['alpha']}",
        *(of[part] for part in ("s", "rate", "product")),
    )
    for of in answer["recipes"]
]
shown("recipes", pictures.table(("recipe", "r, alpha", "s", "rate", "s × rate"), rows))

# %% All the rules

rows = [(settings.WHEN[what], f"{linked(source)}; {size}") for what, (source, size) in settings.SEEN.items()]
shown("rules", pictures.table(("what is said, and when", "seen by, at"), rows))
assert settings.FAR == 2.5 and settings.LOST == 0.5
assert settings.START == words.start() == 0.0001
