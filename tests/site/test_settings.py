"""What to set: the rules against the published, against the recordings, and the page's script against the rules."""

import json
import random
import re
import sys
from itertools import product
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
sys.path.insert(0, str(DOCS / "_ext"))

import settings  # noqa: E402
import words  # noqa: E402

from minilora.language.memory import training_memory  # noqa: E402

from ..support.sample import one_in  # noqa: E402
from . import pasted  # noqa: E402
from .conftest import built, wait  # noqa: E402
from .javascript import LIVE, by_node, node  # noqa: E402

SCRIPT = LIVE / "settings.js"
LABORATORY, SEEN = words.laboratory(), words.evidence()
BASE = LABORATORY.before[LABORATORY.chooses]
KNOWN = [windows for windows in LABORATORY.windows if "alpha = 2r" in LABORATORY.rules(windows)]


def inputs(**changed):
    found, wrong = settings.read_inputs(settings.DEFAULTS | changed)
    assert not wrong
    return found


def answer(fields, model=None):
    found, wrong = settings.read_inputs(fields, model)
    return {"wrong": wrong} if wrong else settings.advise(found)


def judged(text):
    runs, base, says = pasted.read_losses(text)
    return {"says": says} if says else pasted.judge(runs, base, SEEN)


def by_what(text):
    return {line["what"]: line["says"] for line in judged(text)}


# --- against what others publish ---

PUBLISHED = {  # the numbers of each checkpoint, as the index of its files says
    "SmolLM2-135M": 134_515_008,
    "Qwen2.5-0.5B": 494_032_768,
    "Llama-3.2-1B": 1_235_814_400,
    "Gemma-2B": 2_506_172_416,
    "Llama-3.2-3B": 3_212_749_824,
    "Qwen3-4B": 4_022_468_096,
    "Llama-2-7B": 6_738_415_616,
    "Mistral-7B": 7_241_732_096,
    "Qwen2.5-7B": 7_615_616_512,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-2-13B": 13_015_864_320,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Llama-3.1-70B": 70_553_706_496,
}
TINKER_PER_RANK = {  # the adapters' numbers at rank 1, MLP and attention, as Tinker's servers count them
    "Qwen3-4B": 1_327_104 + 737_280,
    "Llama-3.1-8B": 1_769_472 + 851_968,
    "Llama-3.2-1B": 491_520 + 212_992,
    "Llama-3.2-3B": 946_176 + 573_440,
    "Llama-3.1-70B": 8_847_360 + 4_096_000,
}


def test_every_model_has_the_numbers_that_are_published():
    assert {key: model.weights for key, model in settings.MODELS.items()} == PUBLISHED


@pytest.mark.parametrize("key", TINKER_PER_RANK)
def test_adapters_have_the_numbers_that_tinker_counts(key):
    trained = training_memory(settings.MODELS[key].config(), tokens=1, rank=3)["trained"]
    assert trained == 4 * 3 * TINKER_PER_RANK[key]


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma"])
@pytest.mark.peers
def test_a_config_json_is_counted_as_transformers_counts_it(kind):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    architecture = getattr(transformers, f"{kind}ForCausalLM")
    config = architecture.config_class(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=96, vocab_size=1000, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        theirs = sum(p.numel() for p in architecture(config).parameters())
    model, says = pasted.read_config(config.to_json_string())
    assert says == ""
    assert model.weights == theirs


# --- the rules ---

MEMORIES, TOKENS = ("0.5", "8", "24", "79.5", "141"), ("1", "512", "4,096", "1000000")
EACH = [*product(settings.MODELS, settings.CONVENTIONS)]
CASES = [  # every model under every convention, each with one of the other settings
    settings.DEFAULTS | dict(zip(("model", "convention", "memory", "tokens", "rank"), values, strict=True))
    for model, convention in EACH
    for draw in [random.Random(f"{model} {convention}")]
    for values in [(model, convention, *map(draw.choice, (MEMORIES, TOKENS, ("", "1", "16", "256"))))]
]


@pytest.mark.parametrize("model", one_in(7, [*settings.MODELS], settings.MODELS))
def test_one_token_more_than_the_most_does_not_fit(model):
    for way in settings.advise(inputs(model=model, memory="24"))["ways"]:
        most, bits = int(way["most"].replace(",", "")), int(way["way"].split()[0]) if "bits" in way["way"] else 0
        options = {"rank": 8, "bits": bits} if bits else {}
        takes = [
            sum(training_memory(settings.MODELS[model].config(), tokens=tokens, **options,
                                recompute="recomputed" in way["way"]).values())
            for tokens in (max(1, most), most + 1)
        ]  # fmt: skip
        assert takes[1] > 24e9, way["way"]
        assert takes[0] <= 24e9 or not most, way["way"]


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.long)])
def test_the_way_that_is_chosen_is_the_first_that_fits(every):
    for found in map(answer, CASES[::every]):
        fit = [way["way"] for way in found["ways"] if way["fits"] and "bits" in way["way"]]
        words = "Take the first that fits: LoRA over " + fit[0] if fit else "Nothing fits"
        assert found["fits"].startswith(words)


@pytest.mark.parametrize(("model", "convention"), one_in(7, EACH, map(" ".join, EACH)))
def test_the_four_runs_are_three_rates_and_twice_the_rank(model, convention):
    found = settings.advise(inputs(model=model, convention=convention))
    first, second, third, fourth = (
        {name: float(run[name]) for name in ("rank", "alpha", "s", "rate")} for run in found["runs"]
    )
    assert first["rank"] == second["rank"] == third["rank"] == fourth["rank"] / 2
    assert (first["rate"], third["rate"], fourth["rate"]) == (second["rate"] / 2, second["rate"] * 2, second["rate"])
    for run in (first, second, third, fourth):
        root = convention == "root"
        assert run["s"] == pytest.approx(run["alpha"] / (run["rank"] ** 0.5 if root else run["rank"]), rel=0.01)
    if "begins" in found["why"]:
        assert second["s"] * second["rate"] == pytest.approx(2 * words.start(), rel=0.06)
    else:
        of = {"torchtune": "torchtune", "qlora": "QLoRA", "tinker": "Tinker"}[convention]
        recipe = next(recipe for recipe in found["recipes"] if recipe["name"] == of)
        assert second["rate"] == pytest.approx(float(recipe["rate"]), rel=0.06)
        assert (second["rank"], second["alpha"]) == (int(recipe["rank"]), float(recipe["alpha"]))


def test_the_named_rank_has_a_number_for_each_token():
    per_rank = TINKER_PER_RANK["Llama-3.1-8B"]
    for rows, need in ((1, 1), (2 * per_rank, 2), (2 * per_rank + 1, 3), (100 * per_rank, 100)):
        found = settings.advise(inputs(rows=str(rows), length="1", rank="16"))
        assert f"Rank {need} would" in found["capacity"]
        assert ("at least one for each token" in found["capacity"]) == (need <= 16)


def test_halves_are_rounded_up_and_no_number_has_exponents():
    numbers = {0.125: "0.13", 0.375: "0.38", 2.5: "2.5", 1234.0: "1200", 5e-7: "0.0000005", 0.0996: "0.1", 0.0: "0"}
    assert {x: settings.plain(x, 2) for x in numbers} == numbers
    bytes_ = {0: "0.00", 4_999_999: "0.00", 5_000_000: "0.01", 9_994_999_999: "9.99", 9_995_000_000: "10.0"}
    assert {n: settings.gigabytes(n) for n in bytes_} == bytes_
    assert settings.gigabytes(1_234_567_890_123) == "1,234.6"


# --- what losses say, against the recordings ---


def recorded(rank, windows):
    losses = LABORATORY.losses("LoRA", rank, windows=windows, what=LABORATORY.chooses)
    return "\n".join(f"{rank} {lr:.10f} {loss}" for lr, loss in losses.items())


@pytest.mark.parametrize("windows", KNOWN)
@pytest.mark.parametrize("rank", words.RANKS)
def test_of_each_recorded_curve_the_best_rate_is_found(rank, windows):
    found = by_what(f"base {BASE}\n{recorded(rank, windows)}")
    assert f"at {settings.plain(LABORATORY.best('LoRA', rank, windows=windows))}, loss" in found["rate found"]
    assert "one rank" in found


@pytest.mark.parametrize("windows", KNOWN)
@pytest.mark.parametrize(("low", "high"), [(1, 4), (4, 16)])
def test_rank_was_the_limit_where_a_higher_one_ended_lower(low, high, windows):
    found = by_what(f"base {BASE}\n{recorded(high, windows)}\n{recorded(low, windows)}")
    of = [LABORATORY.losses("LoRA", rank, windows=windows, what=LABORATORY.chooses) for rank in (low, high)]
    noticed = min(of[0].values()) - min(of[1].values()) > 2 * SEEN.spread * 2**0.5
    assert noticed == ("limit" in found) != ("no limit" in found)


@pytest.mark.parametrize("windows", KNOWN)
@pytest.mark.parametrize("rank", words.RANKS)
@pytest.mark.skipif(LABORATORY.split, reason="the recordings look for a broken rate on the windows that report")
def test_where_a_training_broke_its_rate_is_named(rank, windows):
    at = LABORATORY.breaks("LoRA", rank, windows=windows)
    found = by_what(f"base {BASE}\n{recorded(rank, windows)}").get("broke", "")
    assert found == "" if at is None else f"broke at {settings.plain(at)}." in found


VALLEY = "base 3\n8 .001 2.5\n8 .002 2.4\n8 .004 2.45\n"
LOSSES = [
    (VALLEY + "16 .001 2.5\n16 .002 2.39\n16 .004 2.45", "no limit", "rank 8 at 0.002"),
    (VALLEY + "16 .001 2.5\n16 .002 2.2\n16 .004 2.45", "limit", "rank 32 at 0.002"),
    (VALLEY + "4 .001 2.5\n4 .002 2.2\n4 .004 2.45", "worse", "Rank 8 ends 0.2 above"),
    (VALLEY + "8 .004 2.65\n16 .001 2.5\n16 .002 2.3\n16 .004 2.6", "no limit", "within 0.4"),
    (VALLEY + "16 .002 2.2", "cannot compare", "Ranks 8 and 16"),
    ("base 3\n8 .001 2.5\n8 .002 2.4", "search higher", "Search wider: 0.004"),
    ("base 3\n8 .001 2.4\n8 .002 2.5", "search lower", "Search wider: 0.0005"),
    ("base 3\n8 .001 2.5\n8 .01 2.3\n8 .1 2.9", "search between", "0.005 and 0.02"),
    ("base 3\n8 .001 2.4", "one rate", "0.0005 and 0.002"),
    ("base 3\n8 .001 nan\n8 .002 inf", "all broke", "0.00025"),
    ("base 3\n8 .001 2.99\n8 .002 2.98", "nothing learned", "untouched model's 3"),
    ("8 .001 2.99\n8 .1 2.99\n16 .1 2.99", "nothing moved", "not applied"),
]


@pytest.mark.parametrize(("text", "what", "words"), LOSSES)
def test_losses_are_told_what_they_say(text, what, words):
    assert words in by_what(text)[what]


def test_an_adapter_that_does_nothing_is_sent_to_the_doctor():
    for text in ("8 .001 2.99\n8 .1 2.99", "base 3\n8 .001 2.99\n8 .1 3.01"):
        (line,) = judged(text)
        assert settings.SOURCES[line["source"]][0] == "minilora audit"


def test_every_line_has_its_source_and_size():
    assert {source for source, _ in (settings.SEEN | settings.ADVISED).values()} <= settings.SOURCES.keys()
    assert settings.SEEN.keys() == settings.WHEN.keys() <= settings.WORDS.keys()
    assert all(size for _, size in settings.SEEN.values())


# --- nonsense ---

NONSENSE = {
    "memory": ("", "a lot", "-3", "0", "1e400", "24 GB", "nan", "1,00"),
    "rows": ("", "0", "2.5", "-1", "2e9", "12345678901"),
    "length": ("0", "x", "1.5"),
    "tokens": ("0", "99999999", "4 096"),
    "rank": ("0", "8.5", "eight", "4097", "-8"),
    "model": ("", "gpt-2", "__proto__", "constructor"),
    "convention": ("", "3r", "toString"),
}
SIZES = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
    "intermediate_size": 128, "vocab_size": 100,
}  # fmt: skip
CONFIGS = [
    json.dumps(SIZES | more)
    for more in (
        {},
        {"model_type": "qwen3", "hidden_size": 65, "num_key_value_heads": 2, "tie_word_embeddings": True},
        {"model_type": "qwen2", "num_hidden_layers": 3.0, "num_key_value_heads": None, "attention_bias": True},
        {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 256, "intermediate_size": 77},
    )
]
NO_CONFIGS = [
    *("", "{", "[]", "3", "null", "NaN", '{"a": NaN}', "{}", '{"model_type": "gpt2"}', '{"model_type": 3}'),
    *(json.dumps(SIZES | {"hidden_size": wrong}) for wrong in (0, "64", True, 64.5, 1e9, None, [64])),
    *(json.dumps(SIZES | more) for more in ({"num_key_value_heads": 3}, {"mlp_bias": True}, {"head_dim": 255})),
]
NO_LOSSES = [
    *("", "\n\n", "rank rate loss", "8", "8 .001", "8 .001 2 3", "0 .001 2", "-8 .001 2", "8.5 .001 2", "r8 .001 2"),
    *("8 0 2", "8 -1 2", "8 2 2", "8 1e-3x 2", "8 .001 two", "8 .001 -2", "base", "base 3\nbase 4\n8 .1 2", "base x"),
    *("8 .001 2\n9 .001", "8 0,001 2,5", "\n".join(["8 .001 2"] * 201), "<b>8</b> 1 2", "8 .001 {rank}"),
    "\u0663 .001 2",
]


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_refused_in_words(name):
    for text in NONSENSE[name]:
        wrong = answer(settings.DEFAULTS | {name: text})["wrong"]
        assert list(wrong) == [name], text
        assert wrong[name].endswith("."), text


def test_what_is_no_model_or_run_is_refused_in_words():
    for text in NO_CONFIGS:
        model, says = pasted.read_config(text)
        assert model is None, text
        assert re.fullmatch(r"[^{}]*\.|.*from { to }\.", says), text
    for text in NO_LOSSES:
        assert judged(text).keys() == {"says"}, text


# --- the page's script ---


def curves(seed):
    """Return lines of made-up trainings: valleys over rates, with noise, repeats, and runs that diverged."""
    draw = random.Random(seed)
    lines = [f"base {draw.choice((2.5, 3, 5.2914))}"] * draw.choice((0, 1, 1))
    for rank in draw.sample((1, 2, 4, 8, 16, 64), draw.choice((1, 2, 2, 3))):
        valley, depth = draw.randrange(-12, -4), draw.uniform(0, 2.4)
        for power in draw.sample(range(-13, -3), draw.randrange(1, 7)):
            for _ in range(draw.choice((1, 1, 1, 2, 3))):
                loss = 2.5 - depth + 0.07 * (power - valley) ** 2 + draw.gauss(0, 0.02)
                broke = power - valley > 4 and draw.random() < 0.5
                between = draw.choice((" ", ", ", "\t", " | "))
                lines.append(between.join((str(rank), repr(2.0**power), "nan" if broke else f"{max(0, loss):.4f}")))
    draw.shuffle(lines)
    return draw.choice(("\n", "\r\n")).join(["# mine", "rank rate loss", *lines, ""])


@by_node
def test_the_front_pages_models_are_the_same():
    (models,) = node("front.mjs", LIVE, models=[[]])["models"]
    besides = {"tied": False, "biases": False, "normed": False}
    assert models.keys() <= settings.MODELS.keys()
    for name, model in models.items():
        assert (besides | model).items() <= settings.MODELS[name].sizes().items(), name


@by_node
@pytest.mark.long
def test_page_and_rules_answer_alike_to_the_last_digit():
    """Fourteen models, six conventions, a grid of the rest; sizes of no list; curves; and all the nonsense above."""
    nonsense = [settings.DEFAULTS | {name: text} for name, texts in NONSENSE.items() for text in texts]
    configs = [(text, settings.DEFAULTS | {"rank": rank}) for text in CONFIGS + NO_CONFIGS for rank in ("", "5")]
    texts = [curves(seed) for seed in range(300)] + NO_LOSSES
    texts += [text for text, _, _ in LOSSES]
    texts += [f"base {BASE}\n{recorded(4, w)}\n{recorded(16, w)}" for w in LABORATORY.windows]
    found = node(
        "settings.mjs", SCRIPT, data=settings.data(SEEN), inputs=CASES + nonsense, configs=configs, texts=texts
    )

    def config(text, fields):
        model, says = pasted.read_config(text)
        return answer(fields, model) if model else {"says": says}

    ours = {
        "answers": list(map(answer, CASES + nonsense)),
        "configs": [config(*of) for of in configs],
        "judged": [judged(text) for text in texts],
    }
    for part, of in ours.items():
        for here, there in zip(json.loads(json.dumps(of)), found[part], strict=True):
            assert here == there
    said = {line["what"] for lines in ours["judged"] if isinstance(lines, list) for line in lines}
    assert said == settings.SEEN.keys()  # each rule was asked


# --- the page, in a browser ---

PAGE = "what-do-i-set.html"
widths = pytest.mark.parametrize("width", [pytest.param(390, marks=built), pytest.param(1280, marks=built)])


def part(browser, selector):
    return browser.find_element("css selector", f"[data-live=settings] {selector}")


def write(browser, name, text):
    """Replace what a field has by keyboard alone."""
    from selenium.webdriver.common.keys import Keys

    element = part(browser, f"[name={name}]")
    browser.execute_script("arguments[0].focus()", element)
    browser.switch_to.active_element.send_keys(Keys.CONTROL, "a")
    browser.switch_to.active_element.send_keys(text)


@widths
def test_a_keyboards_answers_are_kept_in_the_address(visit, width):
    browser = visit(PAGE, width)
    write(browser, "memory", "12")
    write(browser, "rank", "32")
    write(browser, "model", "Mistral-7B")
    expected = settings.advise(inputs(model="Mistral-7B", memory="12", rank="32"))
    for again in (False, True):
        if again:
            wait(lambda: "rank=32" in browser.current_url)
            browser.refresh()
        for name in ("fits", "data", "capacity", "why"):
            assert part(browser, f"[data-says={name}]").text.startswith(expected[name])
        numbers = [cell.text for cell in browser.find_elements("css selector", "[data-table=runs] td")]
        assert numbers[1:6] == [expected["runs"][0][of] for of in ("rank", "alpha", "s", "rate", "product")]
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    text = LOSSES[0][0]
    write(browser, "losses", text)
    told = [line.text for line in browser.find_elements("css selector", "[data-lines] li")]
    assert [line.rpartition(" (")[0] for line in told] == [line["says"] for line in judged(text)]
    assert all(link.get_attribute("href") for link in browser.find_elements("css selector", "[data-lines] a"))


@widths
def test_a_reader_is_told_what_is_no_number_or_model(visit, width):
    browser = visit(PAGE, width)
    write(browser, "memory", "a lot")
    assert part(browser, ".wrong").text == settings.REFUSED["memory"]
    assert not part(browser, ".answer").is_displayed()
    write(browser, "memory", "24")
    write(browser, "model", "another")
    assert part(browser, ".wrong").text == settings.REFUSED["json"]
    write(browser, "config", CONFIGS[1])
    model, _ = pasted.read_config(CONFIGS[1])
    assert part(browser, "[data-says=fits]").text.startswith(answer(settings.DEFAULTS, model)["fits"])
    wait(lambda: "config=" in browser.current_url)
    browser.refresh()
    assert part(browser, "[data-says=fits]").text.startswith(answer(settings.DEFAULTS, model)["fits"])
    write(browser, "losses", "8 .001")
    assert part(browser, "[data-wrong=losses]").text.startswith("Line 1 has 2 parts")


@pytest.mark.parametrize("width", [pytest.param(390, marks=built)])
def test_without_javascript_the_tables_stand(visit, width):
    browser = visit(PAGE, width, script=False)
    assert not part(browser, ".works").is_displayed()
    assert part(browser, ".still").is_displayed()
    cells = {cell.text for cell in browser.find_elements("css selector", "article table td")}
    assert settings.MODELS.keys() <= cells
