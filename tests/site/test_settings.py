"""What to set: the page's rules against the package, what others publish, the recordings, and approved answers."""

import json
import random
import re
from itertools import product

import pytest
import settings
import words

from minilora.language.memory import count_numbers, training_memory

from .conftest import narrow, wait, widths
from .javascript import NO_NODE, SCRIPTS, by_node

FACTS, LABORATORY = settings.FACTS, words.laboratory()
MODELS = {name: settings.config(model) for name, model in FACTS["models"].items()}
APPROVED = json.loads((SCRIPTS / "settings.json").read_text(encoding="utf-8"))
BASE = LABORATORY.before[LABORATORY.chooses]


def ask(**asked):
    return settings.ask(FACTS | {"evidence": APPROVED["evidence"]}, **asked)


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


def test_models_and_adapters_have_the_numbers_that_are_published():
    assert {name: sum(count_numbers(config)) for name, config in MODELS.items()} == PUBLISHED
    trained = {name: training_memory(MODELS[name], tokens=1, rank=1)["trained"] for name in TINKER_PER_RANK}
    assert trained == {name: 4 * numbers for name, numbers in TINKER_PER_RANK.items()}


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma"])
@pytest.mark.peers
@NO_NODE
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
    (found,) = ask(configs=[config.to_json_string()])["configs"]
    assert sum(found["counted"]) == theirs


@by_node
def test_the_lessons_rates_of_tinker_are_the_instruments():
    names = {"Llama-3.2-1B": "Llama 3.2 1B", "Llama-3.1-8B": "Llama 3.1 8B", "Llama-3.1-70B": "Llama 3.1 70B"}
    rates = {recipe.models: recipe.rate for recipe in words.RECIPES if recipe.name == words.TINKER[0]}
    for answer, said in zip(ask(inputs=[{"model": name} for name in names])["answers"], names.values(), strict=True):
        (recipe,) = [recipe for recipe in answer["recipes"] if recipe["name"] == "Tinker"]
        assert float(recipe["rate"]) == pytest.approx(rates[said], rel=5e-3)


# --- the rules ---

CASES = [  # every model under every convention, each with one of the other settings
    dict(zip(("model", "convention", "memory", "tokens", "rank"), values, strict=True))
    for model, convention in product(FACTS["models"], FACTS["conventions"])
    for draw in [random.Random(f"{model} {convention}").choice]
    for memory, tokens in [(draw(("0.5", "8", "24", "79.5", "141")), draw(("1", "512", "4,096", "1000000")))]
    for values in [(model, convention, memory, tokens, draw(("", "1", "16", "256")))]
]


@pytest.fixture(scope="module")
def answers():
    """Return what the script answers to each of the cases."""
    return list(zip(CASES, ask(inputs=CASES)["answers"], strict=True))


@by_node
def test_bytes_are_the_packages_and_another_token_does_not_fit(answers):
    for case, answer in answers[::6]:  # one of each model
        tokens, config = int(case["tokens"].replace(",", "")), MODELS[case["model"]]
        for way in answer["ways"]:
            most, options = int(way["most"].replace(",", "")), {"recompute": "recomputed" in way["way"]}
            if "bits" in way["way"]:
                options |= {"rank": int(answer["runs"][0]["rank"]), "bits": int(way["way"].split()[0])}

            def takes(tokens, config=config, options=options):
                return sum(training_memory(config, tokens=tokens, **options).values())

            memory = float(case["memory"]) * 1e9
            assert way["bytes"] == takes(tokens), (case, way)
            assert takes(most + 1) > memory >= (takes(most) if most else 0), (case, way)
            assert way["fits"] == (most >= tokens)


@by_node
def test_the_way_that_is_chosen_is_the_first_that_fits(answers):
    for _, answer in answers:
        fit = [way["way"] for way in answer["ways"] if way["fits"] and "bits" in way["way"]]
        assert answer["fits"].startswith(f"Take the first that fits: LoRA over {fit[0]}" if fit else "Nothing fits")


@by_node
def test_the_four_runs_are_three_rates_and_twice_the_rank(answers):
    for case, answer in answers:
        first, second, third, fourth = (
            {name: float(run[name]) for name in ("rank", "alpha", "s", "rate", "product")} for run in answer["runs"]
        )
        assert first["rank"] == second["rank"] == third["rank"] == fourth["rank"] / 2
        assert [first["rate"], third["rate"]] == pytest.approx([second["rate"] / 2, second["rate"] * 2], rel=1e-12)
        assert fourth["rate"] == second["rate"]
        for run in (first, second, third, fourth):
            over = run["rank"] ** 0.5 if case["convention"] == "root" else run["rank"]
            assert run["s"] == pytest.approx(run["alpha"] / over, rel=0.01)
            assert run["product"] == pytest.approx(run["s"] * run["rate"], rel=0.01)
        if "begins" in answer["why"]:
            assert second["s"] * second["rate"] == pytest.approx(2 * words.start(), rel=0.06)
        else:
            of = {"torchtune": "torchtune", "qlora": "QLoRA", "tinker": "Tinker"}[case["convention"]]
            recipe = next(recipe for recipe in answer["recipes"] if recipe["name"] == of)
            assert second["rate"] == pytest.approx(float(recipe["rate"]), rel=0.06)
            if not case["rank"]:
                assert (second["rank"], second["alpha"]) == (int(recipe["rank"]), float(recipe["alpha"]))


@by_node
def test_the_named_rank_has_a_number_for_each_token():
    per_rank = TINKER_PER_RANK["Llama-3.1-8B"]
    need = {1: 1, 2 * per_rank: 2, 2 * per_rank + 1: 3, 100 * per_rank: 100}
    answers = ask(inputs=[{"rows": str(rows), "length": "1", "rank": "16"} for rows in need])["answers"]
    for rank, answer in zip(need.values(), answers, strict=True):
        assert f"Rank {rank} would" in answer["capacity"]
        assert ("at least one for each token" in answer["capacity"]) == (rank <= 16)


@by_node
def test_halves_are_rounded_up_and_no_number_has_exponents():
    numbers = {0.125: "0.13", 0.375: "0.38", 2.5: "2.5", 1234.0: "1200", 5e-7: "0.0000005", 0.0996: "0.1", 0.0: "0"}
    assert [plain for plain, _ in ask(numbers=[*numbers])["printed"]] == [*numbers.values()]
    bytes_ = {0: "0.00", 4_999_999: "0.00", 5_000_000: "0.01", 9_994_999_999: "9.99", 9_995_000_000: "10.0"}
    bytes_ |= {1_234_567_890_123: "1,234.6"}
    assert [gigabytes for _, gigabytes in ask(numbers=[*bytes_])["printed"]] == [*bytes_.values()]


# --- what losses say, against the recordings ---


def recorded(rank, windows):
    losses = LABORATORY.losses("LoRA", rank, windows=windows, what=LABORATORY.chooses)
    return "\n".join(f"{rank} {lr:.10f} {loss}" for lr, loss in losses.items())


def by_what(*texts):
    return [{line["what"]: line["says"] for line in lines} for lines in ask(texts=texts)["judged"]]


@by_node
def test_of_each_recorded_curve_the_best_rate_is_found():
    curves = list(product(words.RANKS, LABORATORY.windows))
    for (rank, windows), found in zip(
        curves, by_what(*(f"base {BASE}\n{recorded(*of)}" for of in curves)), strict=True
    ):
        best = f"{LABORATORY.best('LoRA', rank, windows=windows):f}".rstrip("0")
        assert f"at {best}, loss" in found["rate found"]
        assert "one rank" in found


@by_node
def test_rank_was_the_limit_where_a_higher_one_ended_lower():
    pairs = list(product(((1, 4), (4, 16)), LABORATORY.windows))
    texts = (f"base {BASE}\n{recorded(high, windows)}\n{recorded(low, windows)}" for (low, high), windows in pairs)
    for (ranks, windows), found in zip(pairs, by_what(*texts), strict=True):
        of = [LABORATORY.losses("LoRA", rank, windows=windows, what=LABORATORY.chooses) for rank in ranks]
        noticed = min(of[0].values()) - min(of[1].values()) > 2 * APPROVED["evidence"]["spread"] * 2**0.5
        assert noticed == ("limit" in found) != ("no limit" in found)


# --- each answer whole ---


def short(answer):
    """Return an answer's words and numbers; of nonsense, what is wrong with it."""
    if isinstance(answer, list):
        return [f"{line['what']}: {line['says']}" for line in answer]
    if "ways" not in answer:
        return answer

    def row(of, *names):
        return " ".join(of[name] for name in (*names, "rank", "alpha", "s", "rate", "product"))

    kept = ("way", "weights", "trained", "activations", "logits", "total", "most")
    ways = [" | ".join(way[name] for name in kept) + " fits" * way["fits"] for way in answer["ways"]]
    told = {name: answer[name] for name in ("fits", "data", "capacity", "why")}
    recipes = [f"{of['name']}: {of['for']}: {row(of)}" for of in answer["recipes"]]
    return {"ways": ways, **told, "recipes": recipes, "runs": [row(run) for run in answer["runs"]]}


@by_node
def test_each_answer_is_the_approved_one(request):
    """To settings, files and losses, sound ones and nonsense. Rules in Python, apart from these, once gave the same."""
    given = {part: [asked for asked, _ in APPROVED[part]] for part in ("inputs", "configs", "losses")}
    found = ask(inputs=given["inputs"], configs=given["configs"], texts=given["losses"])
    parts = {"inputs": "answers", "configs": "configs", "losses": "judged"}
    now = {part: [[*of] for of in zip(given[part], map(short, found[key]), strict=True)] for part, key in parts.items()}
    if request.config.getoption("--approve"):
        text = json.dumps({"evidence": APPROVED["evidence"], **now}, indent=1, ensure_ascii=False)
        (SCRIPTS / "settings.json").write_text(f"{text}\n", encoding="utf-8")
    else:
        assert {part: APPROVED[part] for part in parts} == now


def test_every_rule_was_asked_and_every_refusal_is_a_sentence():
    said = {line.partition(":")[0] for _, lines in APPROVED["losses"] if isinstance(lines, list) for line in lines}
    assert said == FACTS["seen"].keys() == FACTS["when"].keys() <= FACTS["words"].keys()
    refused = [answer["says"] for part in ("configs", "losses") for _, answer in APPROVED[part] if "says" in answer]
    refused += [text for _, answer in APPROVED["inputs"] for text in answer.get("wrong", {}).values()]
    assert len(refused) > 60
    left = [text for text in refused if re.search(r"\{\w+\}", text.replace("not {rank}.", "")) or text[-1] != "."]
    assert left == []  # one reader wrote {rank}


def test_every_line_has_its_source_and_size():
    told = FACTS["seen"] | FACTS["advised"]
    assert {source for source, _ in told.values()} <= FACTS["sources"].keys()
    assert all(size for _, size in told.values())
    assert {what for what, (source, _) in told.items() if source == "audit"} == {"nothing moved", "nothing learned"}


# --- the page, in a browser ---

PAGE = "what-do-i-set.html"


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
    (expected,) = ask(inputs=[{"model": "Mistral-7B", "memory": "12", "rank": "32"}])["answers"]
    for again in (False, True):
        if again:
            wait(lambda: "rank=32" in browser.current_url)
            browser.refresh()
        for name in ("fits", "data", "capacity", "why"):
            assert part(browser, f"[data-says={name}]").text.startswith(expected[name])
        numbers = [cell.text for cell in browser.find_elements("css selector", "[data-table=runs] td")]
        assert numbers[1:6] == [expected["runs"][0][of] for of in ("rank", "alpha", "s", "rate", "product")]
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    text, lines = APPROVED["losses"][0]
    write(browser, "losses", text)
    told = [line.text for line in browser.find_elements("css selector", "[data-lines] li")]
    assert [line.rpartition(" (")[0] for line in told] == [line.partition(": ")[2] for line in lines]
    assert all(link.get_attribute("href") for link in browser.find_elements("css selector", "[data-lines] a"))


@widths
def test_a_reader_is_told_what_is_no_number_or_model(visit, width):
    browser = visit(PAGE, width)
    write(browser, "memory", "a lot")
    assert part(browser, ".wrong").text == FACTS["refused"]["memory"]
    assert not part(browser, ".answer").is_displayed()
    write(browser, "memory", "24")
    write(browser, "model", "another")
    assert part(browser, ".wrong").text == FACTS["refused"]["json"]
    config = APPROVED["configs"][1][0]
    write(browser, "config", config)
    (expected,) = ask(configs=[config])["configs"]
    for again in (False, True):
        if again:
            wait(lambda: "config=" in browser.current_url)
            browser.refresh()
        assert part(browser, "[data-says=fits]").text.startswith(expected["fits"])
    write(browser, "losses", "8 .001")
    assert part(browser, "[data-wrong=losses]").text.startswith("Line 1 has 2 parts")


@narrow
def test_without_javascript_the_tables_stand(visit, width):
    browser = visit(PAGE, width, script=False)
    assert not part(browser, ".works").is_displayed()
    assert part(browser, ".still").is_displayed()
    cells = {cell.text for cell in browser.find_elements("css selector", "article table td")}
    assert FACTS["models"].keys() <= cells
