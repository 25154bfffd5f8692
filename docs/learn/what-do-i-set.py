"""What what-do-i-set.md asserts and shows; the names are the page's own."""

import markup
import pictures
import settings
import words
from pages import live, picture, shown
from settings import FACTS

from minilora.language.memory import training_memory


def on_site(target):
    return markup.address("learn", target) or (target if "//" in target else target.replace(".md", ".html"))


live("settings", settings.control(words.evidence(), on_site))


def linked(source):
    name, address = FACTS["sources"][source]
    return f"[{name}]({address})"


# %% How memory is counted


def gigabytes(model, **way):
    total = sum(training_memory(settings.config(model), tokens=4096, **way).values()) / 1e9
    return f"{total:.2f}" if total < 9.995 else f"{total:,.1f}"


WAYS = [{"rank": 8, "bits": bits} for bits in (16, 8, 4)] + [{}]
rows = [
    (name, *(f"{gigabytes(model, **way)}, {gigabytes(model, **way, recompute=True)}" for way in WAYS))
    for name, model in FACTS["models"].items()
]
shown("fits", pictures.table(("kept, recomputed", "16 bits", "8 bits", "4 bits", "full"), rows))
assert FACTS["defaults"]["tokens"] == "4096"

# %% How rates compare

(answer,) = settings.ask(FACTS | {"evidence": words.evidence()}, inputs=[{}])["answers"]
picture("settings", answer["axis"])
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

rows = [(FACTS["when"][what], f"{linked(source)}; {size}") for what, (source, size) in FACTS["seen"].items()]
shown("rules", pictures.table(("what is said, and when", "seen by, at"), rows))
assert FACTS["far"] == 2.5 and FACTS["lost"] == 0.5
assert FACTS["start"] == words.SCALING * words.start() == 0.0002
