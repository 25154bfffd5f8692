"""The language model that is fine-tuned in the browser: its tokens, gradients and files, and its page."""

import contextlib
import importlib
import json
import random
import re
import shutil
import time
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from minilora import Llama, adapt, adapters, attach, cross_entropy, load_adapter, save_adapter
from minilora.language.files.tokens import load_tokenizer
from minilora.language.generation import generate
from minilora.language.text import windows

from .conftest import SITE, built, narrow, resize, served, wait, widths
from .javascript import LIVE, NO_NODE, by_node, node

pytest.importorskip("glassllm", reason="glassllm is not installed: pip install -e '.[models]'")

ROOT = Path(__file__).parents[2]
MODEL_PAGE = ROOT / "docs" / "learn" / "language-model.md"
GLASSLLM = Path(str(distribution("glassllm").locate_file("glassllm/weights/en.npz")))
ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz    ETAOIN.,'\n",
    "the and of in ing er   ",
    "  ▁▁\n\n\t\r\u00a0\u2003\u200b\u2028",
    "éèüÆùßñÅ\u2014\u2018\u2019\u201c\u201d\u2026 " + "e\u0301a\u0308A\u030a\u1100\u1161\u11a8",
    "日本語中文한국어العربيةעבריתहिन्दी",
    "😀👩‍👩‍👧🇫🇷\U0001f1e6\ufe0f\U0010ffff\x00\x7f",
    "0123456789[]{}()_*&!?;:-",
)
TEXT = (
    "It was a bright cold day in the valley, and the mill had stopped. Nobody had seen the miller.\n" * 3
    + (
        "The dog lay by the door and watched the road. In the evening a stranger came, with a lamp and a letter.\n"
        "She read the letter twice, and then she put the lamp out, and sat for a long time at the window.\n"
    )
    * 4
)


# --- the mathematics, by Node -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    """Return the folder that the site serves: float16 weights, the tokenizer, the license."""
    return importlib.import_module("build").write_model() / "glassllm"


def texts():
    """Return 1,000 texts: letters of one alphabet or of several, pieces of real pages, and the shortest ones."""
    rng = random.Random(0)
    pages = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*/*.md"))]
    found = ["", " ", "\n", "▁", "a", "⁇"]
    while len(found) < 700:
        alphabet = "".join(rng.sample(ALPHABETS, rng.choice([1, 1, 2, 3])))
        found.append("".join(rng.choices(alphabet, k=rng.randrange(1, 120))))
    while len(found) < 1000:
        page = rng.choice(pages)
        start = rng.randrange(len(page))
        found.append(page[start : start + rng.randrange(1, 600)])
    return found


@by_node
def test_a_thousand_texts_get_glassllms_ids(model):
    tokenizer, given = load_tokenizer(GLASSLLM), texts()
    assert len(set(given)) > 990
    found = node("model.mjs", LIVE, model, texts=given)
    wrong = [(text, ids) for text, (ids, _) in zip(given, found, strict=True) if ids != tokenizer.encode(text)]
    assert wrong == []
    assert [text for _, text in found] == [tokenizer.decode(ids) for ids, _ in found]


@by_node
@pytest.mark.parametrize(("count", "length"), [(65, 32), (1000, 64), (17, 8), (3000, 64), (5120, 64), (5121, 64)])
def test_windows_are_minilora_texts(model, count, length):
    ids = [int(i) for i in np.random.default_rng(0).integers(0, 1024, count)]
    found = node("model.mjs", LIVE, model, windows=[ids, length])
    X, Y, X_held, Y_held = windows(ids, length, share=1 / 4 if (count - 1) // length < 80 else 1 / 10)
    assert np.array_equal(found["train"], np.hstack([X, Y[:, -1:]]))
    assert np.array_equal(found["held"], np.hstack([X_held, Y_held[:, -1:]])[:8])


@by_node
def test_a_text_of_unknown_letters_is_refused(model):
    """By a quarter of its tokens: German has fewer, Russian and Japanese more."""
    german = "Der Müller öffnete die Tür, und die Gäste grüßten fröhlich: Möge Österreich überall blühen!"
    russian = "Мельник открыл дверь, и гости весело поздоровались: пусть всё цветёт, и завтра тоже."
    japanese = "昔々、ある所に粉ひきが住んでいました。ある晩、見知らぬ人が手紙を持って来ました。"
    found = node("model.mjs", LIVE, model, pasted=[TEXT, german, russian, japanese, "Too short."])
    assert found[:2] == ["", ""]
    tokenizer = load_tokenizer(GLASSLLM)
    for text, said in zip((russian, japanese), found[2:4], strict=True):
        ids = tokenizer.encode(text)
        unknown = sum(i == 1 for i in ids)
        assert unknown > len(ids) / 4
        assert said.startswith(f"{unknown} of the text's {len(ids)} tokens stand for letters that this model does not")
    assert "Paste at least 17" in found[4]


@by_node
def test_the_pages_text_ends_where_the_models_texts_end():
    (end,) = load_tokenizer(GLASSLLM).end
    assert node("parts.mjs", LIVE, ids=[5, 7, end, 6]) == [5, 7]


@pytest.fixture(scope="module")
def compared(model, tmp_path_factory):
    """Return minilora's and JavaScript's numbers on the same float16 weights, with factors that are not at a start."""
    folder, rng = tmp_path_factory.mktemp("model"), np.random.default_rng(0)
    tuned = adapt(Llama.load(model), "all-linear", rank=4, alpha=12, rng=rng)
    for array in tuned.trainable().values():
        array[...] += 0.02 * rng.standard_normal(array.shape)
    save_adapter(folder / "adapter", adapters(tuned))
    ids, targets = rng.integers(0, 1024, (2, 4, 64))
    logits, cache = tuned.forward(ids)
    loss, d_logits = cross_entropy(logits, targets)
    right = {"logits": logits.reshape(-1, 1024), **tuned.backward(d_logits, cache)[1]}
    asked = {"ids": ids.ravel().tolist(), "targets": targets.ravel().tolist(), "T": 64, "rank": 4, "alpha": 12}
    adapter = str(folder / "adapter" / "adapter_model.safetensors")
    said = node("model.mjs", LIVE, model, folder, **asked, adapter=adapter)
    return right, load_file(folder / "answers.safetensors"), float(loss), said


@by_node
def test_logits_and_gradients_are_minilora_s(compared):
    right, found, loss, said = compared
    assert len(right) == 1 + 2 * 28
    assert set(found) == set(right)
    for name, array in right.items():
        assert found[name].dtype == array.dtype == np.float32
        assert np.abs(found[name] - array).max() <= 1e-4 * np.abs(array).max() > 0, name
    assert said["loss"] == pytest.approx(loss, rel=1e-5)


@by_node
def test_a_position_at_a_time_gives_the_whole_texts_logits(compared):
    said = compared[3]
    assert np.allclose(said["last"], said["whole"], rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    """Return a run as the page makes it, and the adapter's folder from its .zip."""
    folder = tmp_path_factory.mktemp("trained")
    settings = {"text": TEXT, "steps": 30, "rank": 4, "alpha": 8, "rate": 0.003, "prompt": "The stranger"}
    run = node("model.mjs", LIVE, model, folder, **settings)
    with zipfile.ZipFile(folder / "adapter.zip") as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["adapter_config.json", "adapter_model.safetensors"]
        archive.extractall(folder / "adapter")
    return run, folder


@by_node
def test_training_in_javascript_learns_the_text(trained):
    run, _ = trained
    assert np.mean(run["losses"][-5:]) < 0.6 * np.mean(run["losses"][:5])
    assert run["held"][-1] < run["held"][0]


@by_node
def test_a_run_ends_twenty_steps_after_its_best(trained):
    run, _ = trained
    for measured, last in enumerate(run["lasts"]):
        assert last == 10 * int(np.argmin(run["held"][: measured + 1])) + 20


@by_node
def test_the_best_factors_are_kept_and_lent(trained):
    run, _ = trained
    assert run["best"]["loss"] == min(run["held"])
    assert run["best"]["again"] == pytest.approx(min(run["held"]), rel=1e-6)  # measured with them in place
    assert run["best"]["after"] == pytest.approx(run["held"][-1], rel=1e-6)  # and training's own stand there again


@by_node
def test_minilora_reads_the_adapter_and_says_the_same_tokens(trained, monkeypatch):
    """By the code that the page shows."""
    run, folder = trained
    monkeypatch.chdir(folder)
    blocks = re.findall(r"^```py\n(.*?)^```", MODEL_PAGE.read_text(encoding="utf-8"), re.S | re.M)
    (code,) = [block for block in blocks if "load_adapter" in block]
    there = {}
    exec(code, there)
    assert [int(token) for token in generate(there["tuned"], run["ids"], 20)] == run["said"]


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@NO_NODE
def test_peft_reads_the_adapter_and_gives_our_logits(trained, model):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    run, folder = trained
    base = transformers.LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    tuned = peft.PeftModel.from_pretrained(base, folder / "adapter")
    ids = [*run["ids"], *run["said"]]
    with torch.no_grad():
        theirs = tuned(torch.tensor([ids])).logits[0].numpy()
    ours = attach(Llama.load(model), load_adapter(folder / "adapter"))(np.array([ids]))[0]
    assert np.abs(theirs - ours).max() < 1e-4 * np.abs(ours).max()
    assert theirs[len(run["ids"]) - 1 : -1].argmax(axis=-1).tolist() == run["said"]


@by_node
def test_the_recorded_run_is_what_the_page_computes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "measure")
    live_model = importlib.import_module("live_model")
    recorded, found = json.loads(live_model.RESULT.read_text(encoding="utf-8")), live_model.run(10)
    assert found["held"] == pytest.approx(recorded["held"][:2], rel=1e-3)
    assert found["windows"] == recorded["windows"]
    assert found["texts"]["before"] == recorded["texts"]["before"]


# --- the page, in a browser -------------------------------------------------------------------------------------------

NAME = "language-model.html"


def find(browser, selector):
    return browser.find_element("css selector", f'[data-live="model"] {selector}')


def click(browser, name):
    browser.execute_script("arguments[0].focus()", find(browser, f"[data-do={name}]"))
    browser.switch_to.active_element.send_keys(" ")


@widths
def test_a_pasted_text_is_learned_with_the_network_cut(browser, width, tmp_path):
    server = contextlib.ExitStack()
    resize(browser, width)
    browser.get(server.enter_context(served(SITE)) + NAME)
    downloads = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", downloads)
    click(browser, "fetch")
    wait(lambda: "The model is here" in find(browser, ".says").text, 60)
    server.close()  # nothing that is asked for from now on comes
    text = find(browser, "[name=text]")
    text.clear()
    text.send_keys(TEXT)
    click(browser, "run")
    losses = []
    wait(lambda: find(browser, "[data-step]").text != "0", 120)
    losses.append(float(find(browser, "[data-loss]").text))
    wait(lambda: int(find(browser, "[data-step]").text) >= 14, 300)
    losses.append(float(find(browser, "[data-loss]").text))
    click(browser, "run")
    assert losses[1] < losses[0] - 0.5
    before, after = (find(browser, f".told.{when}").text for when in ("before", "after"))
    assert before.startswith("And God said")
    assert after.startswith("And God said")
    assert before != after
    click(browser, "save")
    wait((tmp_path / "adapter.zip").is_file, 60)
    with zipfile.ZipFile(tmp_path / "adapter.zip") as archive:
        archive.extractall(tmp_path / "adapter")
    found = load_adapter(tmp_path / "adapter")
    assert len(found) == 28
    assert all(np.abs(adapter.delta()).max() > 0 for adapter in found.values())


def steps(browser):
    return int(find(browser, "[data-step]").text)


def points(browser, curve):
    """Return the places of a curve's points from left to right; the first step is at 44."""
    drawn = browser.execute_script(
        "return arguments[0].querySelector('polyline.' + arguments[1])?.getAttribute('points') ?? ''",
        find(browser, "[data-map=losses]"),
        curve,
    )
    return [float(point.split(",")[0]) for point in drawn.split()]


def to_the_end(browser, *sliders):
    from selenium.webdriver.common.keys import Keys

    for name in sliders:
        find(browser, f"[name={name}]").send_keys(Keys.END)


@narrow
def test_start_again_in_a_run_begins_the_curves_again(visit, width):
    browser = visit(NAME, width)
    assert not find(browser, "[data-map=losses]").is_displayed()  # nothing to draw yet
    click(browser, "run")
    wait(lambda: steps(browser) == 1, 120)
    first = find(browser, "[data-loss]").text
    wait(lambda: steps(browser) > 3, 120)
    assert re.match(r"step (20|30), in \d+ s", find(browser, "[data-last]").text)
    assert points(browser, "above")[0] == 44
    click(browser, "restart")
    wait(lambda: steps(browser) == 0)
    time.sleep(2)  # until the step in flight has come
    assert (steps(browser), find(browser, "[data-loss]").text) == (0, "")
    assert (points(browser, "above"), points(browser, "below")) == ([], [44])
    click(browser, "step")
    wait(lambda: steps(browser) == 1)
    assert points(browser, "above") == [44]
    assert find(browser, "[data-loss]").text == first


@narrow
def test_an_edit_keeps_the_adapter_of_the_run_before(visit, width, tmp_path):
    browser = visit(NAME, width)
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    assert not find(browser, "[data-do=save]").is_enabled()
    click(browser, "run")
    wait(lambda: steps(browser) > 2, 120)
    text = find(browser, "[name=text]")
    text.send_keys("x")
    assert find(browser, "[data-do=run]").text == "Fine-tune on this text"
    assert "The adapter of the run before can still be downloaded" in find(browser, ".says").text
    text.clear()
    text.send_keys("Too short.")
    click(browser, "run")
    wait(lambda: "Paste at least 17" in find(browser, ".says").text)
    time.sleep(1)
    done = steps(browser)
    time.sleep(1)
    assert steps(browser) == done > 2  # it does not go on with the run before
    assert all(find(browser, f"[data-do={name}]").is_enabled() for name in ("save", "write"))
    click(browser, "save")
    wait((tmp_path / "adapter.zip").is_file, 60)
    with zipfile.ZipFile(tmp_path / "adapter.zip") as archive:
        archive.extractall(tmp_path / "adapter")
    assert all(np.abs(adapter.delta()).max() > 0 for adapter in load_adapter(tmp_path / "adapter").values())


@narrow
def test_a_run_ends_and_names_its_best_step(visit, width, tmp_path):
    """A text that is soon learned by heart: the held-out loss turns, twenty steps later the run stops."""
    browser = visit(NAME, width)
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    text = find(browser, "[name=text]")
    text.clear()
    text.send_keys(TEXT[:500])
    to_the_end(browser, "rank")
    find(browser, "[name=rate]").send_keys("\ue014")  # one to the right: 0.01
    click(browser, "run")
    wait(lambda: "Stopped at step" in find(browser, ".says").text, 600)
    stopped, best = map(int, re.search(r"at step (\d+)\..*at step (\d+):", find(browser, ".says").text).groups())
    assert stopped == best + 20 == steps(browser)
    assert find(browser, "[data-best]").text.endswith(f"at step {best}")
    click(browser, "save")
    wait((tmp_path / "adapter.zip").is_file, 60)
    assert f"The adapter after {best} steps" in find(browser, ".says").text


@narrow
def test_a_reload_keeps_the_text_and_the_address_the_settings(visit, width):
    browser = visit(NAME, width)
    text = find(browser, "[name=text]")
    text.clear()
    text.send_keys("My own words.")
    to_the_end(browser, "rank")
    assert "rank=16" in browser.current_url
    assert "words" not in browser.current_url
    browser.refresh()
    wait(lambda: find(browser, ".works").is_displayed())
    assert find(browser, "[name=text]").get_attribute("value") == "My own words."
    assert find(browser, 'output[for="live-rank"]').text == "16"
    browser.execute_script("sessionStorage.clear()")


@narrow
def test_a_loss_that_rises_is_told(visit, width):
    browser = visit(NAME, width)
    to_the_end(browser, "rank", "rate")
    click(browser, "run")
    wait(lambda: "the loss has risen from" in find(browser, ".says").text, 300)
    assert steps(browser) < 60
    before, after = re.search(r"has risen from ([\d.]+) to ([\d.]+):", find(browser, ".says").text).groups()
    assert float(after) > float(before) + 0.3


@narrow
def test_a_model_that_does_not_come_is_told(browser, width, tmp_path):
    site = shutil.copytree(SITE, tmp_path / "site", ignore=shutil.ignore_patterns("glassllm", "library"))
    with served(site) as address:
        resize(browser, width)
        browser.get(address + NAME)
        click(browser, "fetch")
        wait(lambda: "could not be fetched" in find(browser, ".says").text)
        assert find(browser, "[data-do=fetch]").is_enabled()
        browser.get_log("browser")  # its complaint is expected


@widths
def test_the_models_page_is_light_until_a_click(visit, width):
    browser = visit(NAME, width)
    wait(lambda: find(browser, ".works").is_displayed())
    asked = "return performance.getEntriesByType('resource').map(e => e.name)"
    assert not [name for name in browser.execute_script(asked) if "glassllm" in name]
    assert 1_600_000 < (SITE / "_static" / "glassllm" / "model.safetensors").stat().st_size < 1_800_000
    assert "MIT License" in (SITE / "_static" / "glassllm" / "LICENSE.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [pytest.param(page, marks=built) for page in (NAME, "live-layer.html")])
def test_as_a_file_a_live_page_says_so(browser, page):
    browser.get((SITE / page).as_uri())
    assert "http.server" in browser.find_element("css selector", ".live .still").text
    assert not browser.find_element("css selector", ".live .works").is_displayed()
    browser.get_log("browser")  # its complaints are expected
