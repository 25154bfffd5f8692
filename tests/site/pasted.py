"""What a reader of the instrument pastes, a config.json or lines of losses: what `settings.js` is to answer."""

import json
import math
import re
from collections.abc import Sequence

from settings import CONFIG, FAR, KINDS, LOST, REFUSED, SEEN, WORDS, Evidence, Model, fill, plain


def read_config(text: str) -> tuple[Model | None, str]:
    """Return the model that a config.json describes, or None and why not."""
    try:
        settings = json.loads(text, parse_constant=int)  # which refuses NaN, as JavaScript does
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        return None, REFUSED["json"]
    kind = settings.get("model_type")
    if kind not in KINDS:
        return None, fill(REFUSED["kind"], kind=kind if isinstance(kind, str) else "missing", kinds=", ".join(KINDS))
    for name in ("attention_bias", "mlp_bias"):
        if kind not in ("qwen2",) and settings.get(name) is True:
            return None, fill(REFUSED["bias"], name=name)
    sizes: dict[str, int] = {}
    for letter, (name, most) in CONFIG.items():
        value = settings.get(name)
        if value is None and letter == "K":
            value = sizes["H"]
        if value is None and letter == "D":
            value = 128 if kind == "qwen3" else sizes["d"] // sizes["H"]
        if not isinstance(value, int | float) or isinstance(value, bool) or value % 1 or not 1 <= value <= most:
            return None, fill(REFUSED["size"], name=name, most=f"{most:,}")
        sizes[letter] = int(value)
    if sizes["H"] % sizes["K"] or sizes["D"] % 2:
        return None, fill(REFUSED["heads"], H=sizes["H"], K=sizes["K"])
    tied = settings.get("tie_word_embeddings")
    family = {"llama": "Llama", "qwen2": "Qwen", "qwen3": "Qwen"}.get(kind, "")
    return Model(kind, **sizes, tied=kind == "gemma" if tied is None else tied is True, family=family), ""


def read_losses(text: str) -> tuple[list[tuple[int, float, float | None]], float | None, str]:
    """Return the runs (rank, rate, loss; None where it diverged), the untouched model's loss, and what is wrong."""
    runs: list[tuple[int, float, float | None]] = []
    base = None
    lines = re.split(r"\r\n|\r|\n", text)
    if len(lines) > 200:
        return [], None, REFUSED["many"]
    for n, line in enumerate(lines, start=1):
        words = re.split(r"[ \t,;|]+", re.sub(r"^[ \t,;|]+|[ \t,;|]+$", "", line.lower()))
        if words == [""] or words[0].startswith("#") or words == ["rank", "rate", "loss"]:
            continue
        if words[0] in ("base", "untouched"):
            value = _real(words[1]) if len(words) == 2 else None
            if value is None or base is not None:
                return [], None, fill(REFUSED["base"], line=n)
            base = value
            continue
        if len(words) != 3:
            return [], None, fill(REFUSED["parts"], line=n, parts=len(words))
        if not re.fullmatch(r"[1-9][0-9]{0,5}", words[0]):
            return [], None, fill(REFUSED["line rank"], line=n, word=words[0])
        rate, loss = _real(words[1]), _real(words[2])
        if rate is None or not 0 < rate <= 1:
            return [], None, fill(REFUSED["line rate"], line=n, word=words[1])
        if loss is None and words[2] not in ("nan", "inf", "diverged"):
            return [], None, fill(REFUSED["line loss"], line=n, word=words[2])
        runs.append((int(words[0]), rate, loss))
    return (runs, base, "") if runs else ([], None, REFUSED["none"])


def _real(word: str) -> float | None:
    """Return the number from 0 that a word is, None where it is none."""
    return float(word) if re.fullmatch(r"([0-9]{1,9}(\.[0-9]{0,17})?|\.[0-9]{1,17})(e[-+]?[0-9]{1,2})?", word) else None


def _mean(values: Sequence[float]) -> float:
    """Return the mean, summed in order: `sum` compensates in newer Pythons, and JavaScript does not."""
    total = 0.0
    for value in values:
        total += value
    return total / len(values)


def judge(runs: Sequence[tuple[int, float, float | None]], base: float | None, seen: Evidence) -> list[dict[str, str]]:
    """Return what held-out losses say, line by line, each with its source and the size that it was seen at."""
    lines: list[dict[str, str]] = []

    def say(what: str, **values: object) -> None:
        source, size = SEEN[what]
        lines.append({"what": what, "says": fill(WORDS[what], **values), "source": source, "seen": size})

    losses = [loss for _, _, loss in runs if loss is not None]
    if len(runs) > 1 and len(losses) == len(runs) and len({(r, lr) for r, lr, _ in runs}) > 1 and len(set(losses)) == 1:
        say("nothing moved", loss=plain(losses[0], 9))
        return lines
    groups: dict[int, dict[float, list[float | None]]] = {}
    for rank, rate, loss in runs:
        groups.setdefault(rank, {}).setdefault(rate, []).append(loss)
    means = {
        rank: {rate: None if None in of else _mean([x for x in of if x is not None]) for rate, of in sorted(by.items())}
        for rank, by in sorted(groups.items())
    }
    repeated = [of for by in groups.values() for of in by.values() if len(of) > 1 and None not in of]
    squares, freedom = 0.0, 0
    for of in repeated:
        values = [x for x in of if x is not None]
        centre = _mean(values)
        for value in values:
            squares += (value - centre) * (value - centre)
        freedom += len(values) - 1
    spread = math.sqrt(squares / freedom) if freedom else seen.spread

    def noise(one: int, other: int) -> float:
        return 2 * spread * math.sqrt(1 / one + 1 / other)

    finite = [loss for by in means.values() for loss in by.values() if loss is not None]
    if base is not None and finite and min(finite) > base - noise(1, 1):
        say("nothing learned", base=plain(base, 9), noise=plain(noise(1, 1), 2))
        return lines
    if base is None:
        say("no base")
    found: dict[int, tuple[float, float, bool]] = {}  # rank: the best rate, its loss, whether it is found
    for rank, by in means.items():
        rates = list(by)
        if all(of is None for of in by.values()):
            say("all broke", rank=rank, next=plain(rates[0] / 4))
            continue
        loss, best = min((of, rate) for rate, of in by.items() if of is not None)
        higher = [rate for rate in rates if rate > best]
        lower = [rate for rate in rates if rate < best]
        worst = math.inf if base is None else loss + (base - loss) * LOST
        dead = [rate for rate in higher if (of := by[rate]) is None or of > worst]
        if dead:
            say("broke", rank=rank, at=plain(dead[0]))
        settled = False
        if len(rates) == 1:
            say("one rate", rank=rank, below=plain(best / 2), above=plain(best * 2))
        elif not lower:
            say("search lower", rank=rank, next=plain(best / 2))
        elif not higher:
            say("search higher", rank=rank, next=plain(best * 2))
        else:
            wide = [plain(best / 2)] if best / lower[-1] > FAR else []
            wide += [plain(best * 2)] if higher[0] / best > FAR else []
            settled = not wide
            if wide:
                say("search between", rank=rank, rate=plain(best), next=" and ".join(wide))
            else:
                say("rate found", rank=rank, rate=plain(best), loss=plain(loss, 4), half=percent(seen.half),
                    four=percent(seen.four))  # fmt: skip
        found[rank] = (best, loss, settled)
    if len(found) == 1:
        ((rank, (rate, _, _)),) = found.items()
        say("one rank", next=2 * rank, rate=plain(rate), below=plain(rate / 2))
    elif found:
        low, high = list(found)[-2:]
        (low_rate, low_loss, low_settled), (rate, loss, settled) = found[low], found[high]
        within = noise(len(groups[low][low_rate]), len(groups[high][rate]))
        if not (low_settled and settled):
            say("cannot compare", low=low, high=high)
        elif low_loss - loss > within:
            say("limit", low=low, high=high, less=plain(low_loss - loss, 2), next=2 * high, rate=plain(rate),
                below=plain(rate / 2))  # fmt: skip
        elif loss - low_loss > within:
            say("worse", low=low, high=high, more=plain(loss - low_loss, 2))
        else:
            say("no limit", low=low, high=high, noise=plain(within, 2), rate=plain(low_rate))
    say("noise", noise=plain(noise(1, 1), 2), whose=WORDS["yours" if freedom else "ours"])
    return lines


def percent(share: float) -> str:
    """Return a share in whole percent; a half is rounded up."""
    return f"{math.floor(100 * share + 0.5)} %"
