"""What merging loses, against the definition written out in float64."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora.audit.auditing import audit
from minilora.audit.changes import STORED_FORMATS, Sums, changed_rows, changes, row_blocks, updates
from minilora.audit.units import Matrix
from minilora.files.dtypes import FLOATS
from minilora.texts import FileRefused

from .adapters import EXPERTS, PREFIX, D, V, change, config, expert_factors, factors, model, pairs, paths, peft, written
from .test_merged import of_gguf


def merged(tmp_path, tensors, settings, **base):
    """The losses by module, and the base's arrays."""
    folder = model(tmp_path / "m", **base)
    report = audit(peft(tmp_path / "a", tensors, settings), folder, merge=True)
    assert report.word in ("SOUND", "SUSPICIOUS"), str(report)
    return report, load_file(folder / "model.safetensors")


def expected(pairs, rounded):
    """The part that is kept and the noise, of pairs of a weight and a change."""
    E = [rounded((W + delta).astype("f4")).astype("f8") - rounded(W.astype("f4")) for W, delta in pairs]
    E, delta = (np.concatenate([np.ravel(a) for a in many]) for many in (E, [delta for _, delta in pairs]))
    kept = E @ delta / (delta @ delta)
    return kept, np.linalg.norm(E - kept * delta) / np.linalg.norm(delta)


def check(loss, pairs):
    for name in ("bfloat16", "float16"):
        kept, noise = expected(pairs, STORED_FORMATS[name])
        assert np.isclose(loss.formats[name].kept, kept, rtol=1e-3)
        assert np.isclose(loss.formats[name].noise, noise, rtol=1e-2)
    size = np.sqrt(sum((delta**2).sum() for _, delta in pairs) / sum((W**2).sum() for W, _ in pairs))
    assert np.isclose(loss.relative, size, rtol=1e-4)


def test_a_linear_layer_and_an_embedding(tmp_path):
    tensors = factors(["model.embed_tokens", *paths("q_proj")])
    report, arrays = merged(tmp_path, tensors, config("embed_tokens", "q_proj"))
    path = "model.layers.1.self_attn.q_proj"
    check(report.merged[path], [(arrays[f"{path}.weight"].astype("f8"), change(tensors, path))])
    A, B = (tensors[f"{PREFIX}model.embed_tokens.lora_embedding_{part}"].astype("f8") for part in "AB")
    check(report.merged["model.embed_tokens"], [(arrays["model.embed_tokens.weight"].astype("f8"), 2 * (B @ A).T)])


def test_a_square_table_is_changed_across(tmp_path):
    rng = np.random.default_rng(0)
    W, A, B = (rng.standard_normal(shape).astype("f4") for shape in ((D, D), (2, D), (D, 2)))
    tensors = {f"{PREFIX}embed_tokens.lora_embedding_{part}": array for part, array in (("A", A), ("B", B))}
    adapter = peft(tmp_path / "a", tensors, config("embed_tokens"))
    report = audit(adapter, written(tmp_path / "m", {"embed_tokens.weight": W}), merge=True)
    check(report.merged["embed_tokens"], [(W.astype("f8"), 2 * (B.astype("f8") @ A).T)])


@pytest.mark.parametrize("beside", [True, False])
def test_a_square_weight_stored_in_out_is_changed_across(tmp_path, beside):
    """GPT-2's c_proj: its shape does not show that it is stored (in, out), and c_attn's beside it does."""
    rng, arrays, tensors = np.random.default_rng(0), {}, {}
    for name, out in (("c_proj", D), *([("c_attn", 3 * D)] if beside else [])):
        arrays[f"h.0.{name}.weight"] = rng.standard_normal((D, out)).astype("f4")
        tensors[f"{PREFIX}h.0.{name}.lora_A.weight"] = rng.standard_normal((2, D)).astype("f4")
        tensors[f"{PREFIX}h.0.{name}.lora_B.weight"] = rng.standard_normal((out, 2)).astype("f4")
    adapter = peft(tmp_path / "a", tensors, config("c_proj", "c_attn", fan_in_fan_out=True))
    report = audit(adapter, written(tmp_path / "m", arrays), merge=True)
    W, delta = arrays["h.0.c_proj.weight"].astype("f8"), change(tensors, "h.0.c_proj").T
    check(report.merged["h.0.c_proj"], [(W, delta)])


def test_a_change_in_float64_is_the_product(tmp_path):
    folder, tensors = model(tmp_path / "m"), factors(paths("q_proj"))
    report = audit(peft(tmp_path / "a", tensors, config("q_proj")), folder)
    for path, module in report.adapter.modules.items():
        ((W, delta),) = (block for one in changes(report.landing, module) for block in row_blocks(*one))
        assert (W.dtype, delta.dtype) == ("float64", "float64")
        np.testing.assert_allclose(delta, change(tensors, path), rtol=1e-12)


def test_a_llamas_rows_in_gguf_are_put_in_order(tmp_path):
    adapter, expected = of_gguf(tmp_path)
    report = audit(adapter, model(tmp_path / "m", head_dim=4))
    for path, module in report.adapter.modules.items():
        ((_, delta),) = row_blocks(*next(changes(report.landing, module)))
        np.testing.assert_allclose(delta, expected[path], rtol=1e-6)


@pytest.mark.parametrize("across", [False, True])
def test_blocks_of_rows_make_no_difference(tmp_path, monkeypatch, across):
    """Also with a magnitude, and in NF4, whose blocks of 64 numbers must not be cut."""
    rng, path = np.random.default_rng(0), "fc"
    W = rng.standard_normal((200, 40)).astype("f4")
    out, width = W.shape[::-1] if across else W.shape
    tensors = {f"{PREFIX}{path}.lora_A.weight": rng.standard_normal((2, width)).astype("f4"),
               f"{PREFIX}{path}.lora_B.weight": rng.standard_normal((out, 2)).astype("f4"),
               f"{PREFIX}{path}.lora_magnitude_vector": rng.uniform(4, 9, out).astype("f4")}  # fmt: skip
    adapter = peft(tmp_path / "a", tensors, config(path, use_dora=True, fan_in_fan_out=across))
    base, losses = written(tmp_path / "m", {"fc.weight": W}), []
    for block in (4000, 10**9):  # a hundred rows, whose last block of NF4 would be cut
        monkeypatch.setattr("minilora.audit.units.NUMBERS_AT_A_TIME", block)
        loss = audit(adapter, base, merge=True).merged[path]
        assert loss.off_axis == 0.0  # which a square weight's can be
        losses.append(loss.formats)
    for name, sums in losses[0].items():
        assert (sums.kept, sums.noise) == pytest.approx((losses[1][name].kept, losses[1][name].noise), rel=1e-6), name


def with_magnitudes(tensors):
    """Of another size."""
    return tensors | {f"{PREFIX}{path}.lora_magnitude_vector": np.ones(D, "f4") for path in paths("q_proj")}


UNKNOWN = {
    "a magnitude of another size": (with_magnitudes, config("q_proj", use_dora=True)),
    "no scaling": (dict, None),
    "not a number": (lambda x: {name: array * np.nan for name, array in x.items()}, config("q_proj")),
    "few bits": (dict, config("q_proj")),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_of_no_known_change_nothing_is_lost(tmp_path, what):
    make, settings = UNKNOWN[what]
    few = {f"{path}.qweight": np.ones((3, V), "u1") for path in paths("q_proj")}
    base = written(tmp_path / "m", few) if what == "few bits" else model(tmp_path / "m")
    report = audit(peft(tmp_path / "a", make(factors(paths("q_proj"))), settings), base, merge=True)
    assert [*report.merged.values()] == [None] * 3
    assert "not checked" in str(report)
    if what == "no scaling":
        assert [[*changes(report.landing, module)] for module in report.adapter.modules.values()] == [[]] * 3


HALF = "the change by {} is unknown: a factor or the scaling is missing"
REFUSED = {
    "no scaling": (lambda m: replace(m, scaling=None), (12, D), HALF),
    "half a pair": (lambda m: replace(m, parts={"A": m.parts["A"]}), (12, D), HALF),
    "other rows": (lambda m: m, (11, D), "{} is for a weight of 12 x 8, but the model's is 11 x 8"),
    "other columns": (lambda m: m, (12, 9), "{} is for a weight of 12 x 8, but the model's is 12 x 9"),
    "a magnitude of another size": (
        lambda m: replace(m, parts=m.parts | {"magnitude": m.parts["A"]}), (12, D),
        "{} is for a weight of 12 x 8, but the model's is 12 x 8"),
    "two weights": (lambda m: m, None, "{} is for 1 expert, but the model has 2"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_change_that_does_not_fit_a_weight_is_refused(tmp_path, what):
    change, shape, message = REFUSED[what]
    report = audit(peft(tmp_path / "a", factors(paths("q_proj")), config("q_proj")), model(tmp_path / "m"))
    module = change(next(iter(report.adapter.modules.values())))
    weight = Matrix(None, "f4", (("w", 0),), *(shape or (12, D)))
    weights = {(0, 0): weight} if shape else {(0, 0): weight, (1, 0): weight}
    with pytest.raises(FileRefused) as refused:
        updates(report.landing, module, weights)
    told = message.format(f"'{module.path}'")
    assert str(refused.value) == f"'{tmp_path / 'a' / 'adapter_model.safetensors'}': {told}"


def test_an_expert_that_is_not_there_is_refused(tmp_path):
    path = "model.layers.0.mlp.experts.3.up_proj"
    base, adapter = model(tmp_path / "m", experts=4, apart=True), pairs({path: (6, D)})
    report = audit(peft(tmp_path / "a", adapter, config("up_proj")), base)
    unit, landing = "model.layers.0.mlp.experts.gate_up_proj", report.landing
    matrices = landing.source.units[unit]
    with pytest.raises(FileRefused) as refused:
        changed_rows(landing, report.adapter.modules[path], matrices[:3])
    assert str(refused.value) == f"'{base}': '{unit}' has no expert 3"
    ((place, rows),) = changed_rows(landing, report.adapter.modules[path], matrices).items()
    assert (place, rows.shape) == ((3, 6), (6, D))
    up = load_file(base / "model.safetensors")[f"{path}.weight"]
    np.testing.assert_array_equal(rows.read(0, 6), up)


def test_sums_of_blocks_are_those_of_the_whole():
    E, delta = np.random.default_rng(0).standard_normal((2, 6, 4)).astype("f4")
    kept = (E * delta).sum() / (delta * delta).sum()
    noise = np.linalg.norm(E - kept * delta) / np.linalg.norm(delta)
    sums = Sums()
    assert (str(sums), sums.kept, sums.noise) == ("-", 0.0, 0.0)
    for rows in (slice(2), slice(2, 6)):
        block = Sums()
        block.add(E[rows], delta[rows])
        sums += block
    assert (sums.kept, sums.noise) == (pytest.approx(kept), pytest.approx(noise))
    assert str(sums) == f"{kept:.1%} + {noise:.2g}"
    same, far = Sums(), np.array([[4096, 0.5]], "f4")
    same.add(far, far)
    assert (same.kept, same.noise) == (1.0, 0.0)
    assert same.intended == 4096**2 + 0.25  # which a float32 does not hold


@pytest.mark.filterwarnings("error")
def test_what_a_half_cannot_hold_becomes_infinity():
    assert STORED_FORMATS["float16"](np.array([1e6, 0.1], "f4")).tolist() == [np.inf, float(np.float16(0.1))]
    assert STORED_FORMATS["bfloat16"](np.array([0.1], "f4")).tolist() == [0.10009765625]


def test_a_change_of_a_weight_of_zeros_has_no_share(tmp_path):
    base = written(tmp_path / "m", {"fc.weight": np.zeros((12, D), "f4")})
    report = audit(peft(tmp_path / "a", pairs({"fc": (12, D)}), config("fc")), base, merge=True)
    assert report.merged["fc"].relative == 0.0
    report = audit(tmp_path / "a", base)
    assert report.shares == {"fc": None}


def test_dora(tmp_path):
    path, rng = "model.layers.1.self_attn.q_proj", np.random.default_rng(1)
    tensors = factors(paths("q_proj"))
    for module in paths("q_proj"):
        tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = rng.uniform(2, 4, 12).astype("f4")
    report, arrays = merged(tmp_path, tensors, config("q_proj", use_dora=True))
    W, m = arrays[f"{path}.weight"].astype("f8"), tensors[f"{PREFIX}{path}.lora_magnitude_vector"]
    changed = W + change(tensors, path)
    check(report.merged[path], [(W, m[:, None] * changed / np.linalg.norm(changed, axis=1, keepdims=True) - W)])


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("exchanged", [False, True])
def test_experts(tmp_path, apart, exchanged):
    tensors, E, r = expert_factors(exchanged=exchanged), 4, 2
    settings = config(target_parameters=EXPERTS, peft_version="0.18.1" if exchanged else "0.21.2")
    report, arrays = merged(tmp_path, tensors, settings, experts=E, apart=apart)
    for name, inside in (("gate_up_proj", "base_layer."), ("down_proj", "")):
        place, pairs = "model.layers.1.mlp.experts.", []
        A, B = (tensors[f"{PREFIX}{place}{inside}lora_{part}.weight"].astype("f8") for part in "AB")
        for e in range(E):
            delta = 2 * B[:, e::E] @ A[e * r : (e + 1) * r]
            parts = ("gate_proj", "up_proj") if name == "gate_up_proj" else (name,)
            W = np.concatenate([arrays[f"{place}{e}.{p}.weight"] for p in parts]) if apart else arrays[place + name][e]
            pairs.append((W.astype("f8"), delta.T if exchanged else delta))
        check(report.merged[place + name], pairs)


def test_a_change_below_half_a_step_is_lost_in_bfloat16(tmp_path):
    folder, path = model(tmp_path / "m"), "model.layers.0.self_attn.q_proj"
    arrays = load_file(folder / "model.safetensors")
    on_grid = {k: a.astype(FLOATS["BF16"]).astype("f4") for k, a in arrays.items()}
    save_file(on_grid, folder / "model.safetensors")
    A, B = np.ones((1, D), "f4"), np.full((12, 1), 1e-6, "f4")
    tensors = {f"{PREFIX}{path}.lora_A.weight": A, f"{PREFIX}{path}.lora_B.weight": B}
    report = audit(peft(tmp_path / "a", tensors, config(path, r=1, lora_alpha=1)), folder, merge=True)
    loss = report.merged[path]
    assert loss.formats["bfloat16"].kept < 0.1
    assert "bfloat16" in str(report)
    assert audit(tmp_path / "a", folder).not_offered == ["what merging loses (--merge)"]


def test_q8_0_is_llama_cpps():
    from gguf import GGMLQuantizationType, dequantize, quantize

    W = np.random.default_rng(0).standard_normal((6, 96)).astype("f4")
    W[0, :32] = 0
    theirs = dequantize(quantize(W, GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0)
    steps = np.abs(W).max() / 127
    ours = STORED_FORMATS["Q8_0"](W)
    assert (ours != theirs).mean() < 0.01  # of a tie, one rounds to even and the other away from zero
    assert np.abs(ours - theirs).max() < 1.01 * steps


@pytest.mark.parametrize(("width", "said"), [(64, True), (48, False)])
def test_q8_0_is_of_rows_that_its_blocks_fill(tmp_path, width, said):
    save_file({"fc.weight": np.ones((4, width), "f4")}, tmp_path / "m.safetensors")
    A, B = np.ones((1, width), "f4"), np.ones((4, 1), "f4")
    tensors = {f"{PREFIX}fc.lora_A.weight": A, f"{PREFIX}fc.lora_B.weight": B}
    report = audit(peft(tmp_path / "a", tensors, config("fc", r=1)), tmp_path / "m.safetensors", merge=True)
    assert ("Q8_0" in report.merged["fc"].formats) is said


@pytest.mark.parametrize("in_out", [False, True])
@pytest.mark.parametrize(
    ("other", "word"), [(0.0, "SOUND"), (0.55, "SOUND"), (0.65, "SUSPICIOUS"), (1.0, "SUSPICIOUS")]
)
def test_a_magnitude_of_a_square_weights_inputs_is_named(tmp_path, other, word, in_out):
    rng, path = np.random.default_rng(0), "fc"
    W = (rng.standard_normal((16, 16)) * rng.uniform(0.5, 2, (16, 1))).astype("f4")
    save_file({"fc.weight": W.T.copy() if in_out else W}, tmp_path / "m.safetensors")
    A, B = rng.standard_normal((2, 16)).astype("f4"), 0.01 * rng.standard_normal((16, 2)).astype("f4")
    m = ((1 - other) * np.linalg.norm(W, axis=1) + other * np.linalg.norm(W, axis=0)).astype("f4")
    parts = {"lora_A.weight": A, "lora_B.weight": B, "lora_magnitude_vector": m}
    tensors = {f"{PREFIX}{path}.{part}": array for part, array in parts.items()}
    adapter = peft(tmp_path / "a", tensors, config(path, use_dora=True, fan_in_fan_out=in_out))
    report = audit(adapter, tmp_path / "m.safetensors", merge=True)
    assert report.word == word, str(report)
    text = (
        "the magnitude of 'fc' is closer to the norms of the weight's columns than of its rows: it is along the "
        "wrong axis, which the shape of a square weight does not reveal"
    )
    assert [finding.text for finding in report.of("suspicious")] == [text] * (word == "SUSPICIOUS")


@pytest.mark.parametrize("piece", [1 << 14, 7])
def test_a_change_has_its_root_mean_square_and_its_share(tmp_path, monkeypatch, piece):
    """Of a large weight some pieces stand for all: here one number of three."""
    monkeypatch.setattr("minilora.audit.changes.PIECE_NUMBERS", piece)
    monkeypatch.setattr("minilora.audit.changes.SAMPLED_PIECES", 96 // piece // 3 or 1)
    folder, tensors, path = model(tmp_path / "m"), factors(paths("q_proj")), "model.layers.1.self_attn.q_proj"
    report = audit(peft(tmp_path / "a", tensors, config("q_proj")), folder)
    W, delta = load_file(folder / "model.safetensors")[f"{path}.weight"].astype("f8"), change(tensors, path)
    rms, share = np.sqrt(np.square(delta).mean()), np.linalg.norm(delta) / np.linalg.norm(W)
    (found,) = (entry for entry in report.json()["modules"] if entry["module"] == path)
    assert np.isclose(found["rms"], rms, rtol=1e-6)
    assert np.isclose(found["share"], share, rtol=1e-6 if piece > 96 else 0.5)
    assert f"{rms:.2g}" in str(report)
