"""Decoders that transformers wrote: their logits, losses and gradients are ours, and adapters go both ways."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from minilora import (
    Linear,
    Llama,
    adapt,
    adapters,
    attach,
    cross_entropy,
    load_adapter,
    merge,
    merge_adapter,
    save_adapter,
)
from minilora.language import found_by_weight, save_llama
from minilora.language.files.tokens import load_tokenizer
from minilora.layer import walk

from ..support.peers import (
    DENSE,
    LINEARS,
    MIXED,
    MODELS,
    PEERS,
    SCALINGS,
    backward_of,
    beside_again,
    close,
    drawn,
    factors_of,
    ids_of,
    in_double,
    logits_of,
    read_again,
    targets_of,
    torch,
    torch_loss,
    transformers,
    with_peft,
    written,
)

pytestmark = PEERS
tokenizers = pytest.importorskip("tokenizers")


@pytest.mark.parametrize("kind", MODELS)
@given(seed=st.integers(0, 2**31))
@drawn
def test_logits_gradients_and_a_saved_model_are_those_of_transformers(tmp_path_factory, double, kind, seed):
    folder = tmp_path_factory.mktemp("model")
    theirs = written(folder, kind, seed, shard="4KB")
    ours = Llama.load(folder, dtype="float64")
    assert (ours.config.model_type, ours.config.max_position_embeddings) == (kind, 64)
    grads = backward_of(theirs, ours, ids_of(theirs, seed))
    if theirs.config.tie_word_embeddings:
        grads["model.embed_tokens.weight"] += grads.pop("lm_head.weight")
    params = dict(theirs.named_parameters())
    assert grads.keys() == params.keys()
    for name, p in params.items():
        close(grads[name], p.grad.numpy(), 1e-9)
    save_llama(ours, folder / "again")
    options = {"dtype": torch.float64, "output_loading_info": True}
    again, loading = transformers.AutoModelForCausalLM.from_pretrained(folder / "again", **options)
    assert not any(loading.values())
    assert (type(again), again.config.max_position_embeddings) == (MODELS[kind][1], 64)
    close(logits_of(in_double(kind, again), ids_of(theirs, seed)), logits_of(theirs, ids_of(theirs, seed)), 1e-9)


@pytest.mark.parametrize("seed", range(2))
def test_without_patches_the_difference_is_their_float32(tmp_path, seed):
    theirs = written(tmp_path, "llama", seed)
    ids = ids_of(theirs, seed)
    z = Llama.load(tmp_path, dtype="float64")(ids)
    expected = theirs(torch.tensor(ids)).logits.detach().numpy()
    close(z, expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shard", ["1GB", "4KB"])
def test_every_float_type_and_every_shard_is_read(tmp_path, double, dtype, shard):
    theirs = written(tmp_path, "llama", 3, dtype, shard)
    shards = len(list(tmp_path.glob("*.safetensors")))
    assert (shards > 1) == (shard == "4KB")
    ids = ids_of(theirs, 3)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    close(Llama.load(tmp_path, dtype="float64")(ids), expected, 1e-9)
    z = Llama.load(tmp_path)(ids)
    assert z.dtype == np.float32
    assert np.abs(z - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("rope", SCALINGS, ids=lambda rope: rope["rope_type"])
def test_version_4_configurations_are_read_as_version_5(tmp_path, rope):
    theirs = written(tmp_path, "llama", 4, rope_parameters=rope)
    ids = ids_of(theirs, 4)
    z = Llama.load(tmp_path)(ids)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    config["torch_dtype"] = config.pop("dtype")
    for key in ("rope_type", "type"):  # version 4 knew both
        kind = scaling["rope_type"]
        other = {**{k: v for k, v in scaling.items() if k != "rope_type"}, key: kind}
        path.write_text(json.dumps(config | {"rope_scaling": None if kind == "default" else other}))
        np.testing.assert_array_equal(Llama.load(tmp_path)(ids), z)


def test_modules_are_named_as_in_transformers(tmp_path):

    theirs = written(tmp_path, "llama", 5, tie_word_embeddings=False)
    ours = Llama.load(tmp_path)
    assert list(ours.trainable()) != []
    assert ours.trainable().keys() == dict(theirs.named_parameters()).keys()
    linears = {path for path, layer in walk(ours) if isinstance(layer, Linear)}
    assert linears == {path for path, layer in theirs.named_modules() if isinstance(layer, torch.nn.Linear)}


# --- adapters -------------------------------------------------------------------------------------

GATE_UP, DOWN, ROUTER = "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"
ADAPTERS = {
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "every linear": {"target_modules": LINEARS},
    "all-linear": {"target_modules": "all-linear"},
    "a regular expression": {"target_modules": r".*\.layers\.0\.(mlp\.down|self_attn\.k)_proj"},
    "rsLoRA": {"target_modules": LINEARS, "use_rslora": True},
    "DoRA": {"target_modules": ["o_proj", "up_proj"], "use_dora": True},
    "the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}
OF_EXPERTS = {
    "one array": {"target_parameters": [DOWN]},
    "gate and up": {"target_parameters": [GATE_UP]},
    "both": {"target_parameters": [DOWN, GATE_UP]},
    "both, rsLoRA": {"target_parameters": [DOWN, GATE_UP], "use_rslora": True},
    "the router": {"target_parameters": [ROUTER]},
    "all, and attention": {"target_parameters": [ROUTER, GATE_UP, DOWN], "target_modules": ["q_proj", "v_proj"]},
    "all, and attention, rsLoRA": {
        "target_parameters": [ROUTER, GATE_UP, DOWN], "target_modules": ["q_proj"], "use_rslora": True},
    "ranks and alphas": {
        "target_parameters": [GATE_UP, DOWN], "rank_pattern": {DOWN: 5}, "alpha_pattern": {GATE_UP: 9.0}},
}  # fmt: skip
OF_KIND = [
    *(("llama", name) for name in ADAPTERS),
    *((kind, name) for kind in DENSE if kind != "llama" for name in ("every linear", "DoRA")),
    *((kind, name) for kind in MIXED for name in OF_EXPERTS),
]


@pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning")  # PEFT's, which did match
@pytest.mark.parametrize(("kind", "adapter"), OF_KIND)
def test_an_adapter_is_the_same_in_peft_and_here(tmp_path, double, kind, adapter):
    """PEFT's file read by us, ours by PEFT; gradients, the merged model, and one position after another."""
    options = (ADAPTERS | OF_EXPERTS)[adapter]
    layers = {"mlp_only_layers": [0], "decoder_sparse_step": 1} if kind in MIXED[1:] else {}
    theirs = written(tmp_path / "m", kind, 21, num_hidden_layers=3, **layers)
    tuned, ids = with_peft(theirs, **options), ids_of(theirs, 21)
    tuned.save_pretrained(tmp_path / "theirs")
    base = Llama.load(tmp_path / "m", dtype="float64")
    read = attach(base, load_adapter(tmp_path / "theirs", dtype="float64"))
    grads, factors = backward_of(tuned, read, ids), factors_of(tuned)
    assert grads.keys() == factors.keys()
    for name, p in factors.items():
        close(grads[name], p.grad.numpy(), 1e-9)
    expected = logits_of(tuned, ids)
    assert np.abs(base(ids) - expected).max() > 1e-3
    if not options.keys() & {"rank_pattern", "alpha_pattern"}:
        own = {"target_modules": []} | options
        made = adapt(base, own.pop("target_modules"), rank=3, alpha=5, rng=np.random.default_rng(0), **own)
        assert made.trainable().keys() == factors.keys()
        for name, p in made.trainable().items():
            p[...] = read.trainable()[name]
        read = made
    save_adapter(tmp_path / "ours", adapters(read))
    close(logits_of(beside_again(tmp_path / "m", kind, tmp_path / "ours"), ids), expected, 1e-9)
    save_llama(merge(read), tmp_path / "merged")
    close(logits_of(read_again(kind, tmp_path / "merged"), ids), expected, 1e-9)
    z, past = read.extend(ids[:, :9])
    for t in range(9, 17):
        z, past = read.extend(ids[:, t : t + 1], past)
    close(z, expected[:, -1], 1e-9)


def test_in_float32_gradients_differ_by_rounding_alone(tmp_path):
    theirs = written(tmp_path / "base", "llama", 9).float()
    model = with_peft(theirs, target_modules=LINEARS).float()
    model.save_pretrained(tmp_path / "adapter")
    ours = attach(Llama.load(tmp_path / "base"), load_adapter(tmp_path / "adapter"))
    ids = ids_of(theirs, 9)
    logits = model(torch.tensor(ids)).logits
    torch_loss(logits, targets_of(ids)).backward()
    z, cache = ours.forward(ids)
    assert np.abs(z - logits.detach().numpy()).max() <= 1e-4 * np.abs(z).max()
    _, grads = ours.backward(cross_entropy(z, targets_of(ids), out=z)[1], cache)
    for name, p in model.named_parameters():
        if p.grad is not None:
            path = name.removeprefix("base_model.model.").replace(".default.weight", "")
            assert grads[path].dtype == np.float32
            close(grads[path], p.grad.numpy(), 1e-4)


# --- mixtures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MIXED)
def test_fused_tensors_and_other_spellings_are_the_same_model(tmp_path, double, kind):
    theirs = written(tmp_path / "m", kind, 3)
    ids = ids_of(theirs, 3)
    theirs.float().save_pretrained(tmp_path / "fused", save_original_format=False)
    ours = Llama.load(tmp_path / "m", dtype="float64")
    assert (Llama.load(tmp_path / "fused", dtype="float64")(ids) == ours(ids)).all()
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    count = config.pop("num_experts", None) or config.pop("num_local_experts")
    for name in ("num_experts",) if kind == "qwen2_moe" else ("num_experts", "num_local_experts"):
        (tmp_path / "m" / "config.json").write_text(json.dumps(config | {name: count}))
        assert (Llama.load(tmp_path / "m", dtype="float64")(ids) == ours(ids)).all()


@pytest.mark.parametrize("layout", ["each", "fused"])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", MIXED)
def test_files_are_merged_as_pefts_merge_and_unload_does(tmp_path, double, kind, rslora, layout):
    everywhere = {} if kind == "mixtral" else {"decoder_sparse_step": 1, "mlp_only_layers": []}
    theirs = written(tmp_path / "m", kind, 11, num_hidden_layers=2, **everywhere).float()
    if layout == "fused":
        theirs.save_pretrained(tmp_path / "m", save_original_format=False)
    names = [GATE_UP, DOWN, ROUTER]
    tuned = with_peft(theirs, use_rslora=rslora, target_modules=["q_proj"], target_parameters=names).float()
    tuned.save_pretrained(tmp_path / "a")
    merge_adapter(tmp_path / "m", tmp_path / "a", tmp_path / "ours")
    tuned.merge_and_unload().save_pretrained(tmp_path / "theirs", save_original_format=layout == "each")
    ours, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        close(ours[name], array, 2e-6)
    before = load_file(tmp_path / "m" / "model.safetensors")
    assert sum((before[name] != array).any() for name, array in ours.items()) >= 2 * (1 + 1 + 2)


@pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning")  # PEFT's, which did match
@pytest.mark.parametrize("ranks", [(3, 3), (3, 5)])
def test_dense_layers_of_a_qwen3_moe_reach_peft(tmp_path, double, ranks):
    """By the names of their modules PEFT takes them for the experts', and all but drops them."""
    theirs = written(tmp_path / "m", "qwen3_moe", 21, num_hidden_layers=3, mlp_only_layers=[0], decoder_sparse_step=2)
    base, rng = Llama.load(tmp_path / "m", dtype="float64"), np.random.default_rng(1)
    dense, others = ["up_proj"], ["gate_proj", "down_proj", "q_proj"]
    ours = adapt(base, others, rank=ranks[0], alpha=5.0, rng=rng)
    ours = adapt(ours, dense, rank=ranks[1], alpha=5.0, rng=rng)
    for p in ours.trainable().values():
        p[...] = rng.standard_normal(p.shape) / 4
    by_weight = found_by_weight(ours)
    assert len(by_weight) == 3 * 2
    ids = ids_of(theirs, 21)
    for names in ([], by_weight):
        save_adapter(tmp_path / "a", adapters(ours), target_parameters=names, overwrite=True)
        if names or ranks[0] == ranks[1]:
            loaded = beside_again(tmp_path / "m", "qwen3_moe", tmp_path / "a")
            apart = np.abs(logits_of(loaded, ids) - ours(ids)).max()
            assert (apart < 1e-9) == bool(names)
        close(attach(base, load_adapter(tmp_path / "a", dtype="float64"))(ids), ours(ids), 1e-12)


# --- edited folders -------------------------------------------------------------------------------


def same_or_refused(folder, kind, ids):
    """Hold our logits against transformers', which may refuse the folder; return whether we refused it."""
    try:
        ours = Llama.load(folder, dtype="float64")
    except ValueError:
        return True
    try:
        theirs = read_again(kind, folder)
    except Exception:
        return False
    close(ours(ids), logits_of(theirs, ids), 1e-9)
    return False


LINEAR, YARN = {"rope_type": "linear", "factor": 3.0}, {"rope_type": "yarn", "factor": 2.0}
EDITS = {
    "rope_scaling beside": ("llama", {"rope_scaling": LINEAR}, True),
    "yarn beside": ("llama", {"rope_scaling": YARN}, True),
    "rope_scaling alone": ("llama", {"rope_parameters": None, "rope_scaling": LINEAR, "rope_theta": 300.0}, False),
    "rope_theta alone": ("llama", {"rope_parameters": None, "rope_theta": 300.0}, False),
    "rope_theta beside": ("llama", {"rope_theta": 300.0}, True),
    "both ways": ("llama", {"is_causal": False}, True),
    "both ways by null": ("llama", {"is_causal": None}, True),
    "length beside": ("llama", {"original_max_position_embeddings": 20}, True),
    "kinds of layers": ("llama", {"layer_types": ["full_attention"]}, False),
    "a part of the turns": ("llama", {"partial_rotary_factor": 0.5}, True),
    "other layers": ("llama", {"per_layer_config": {"0": {"head_dim": 2}}}, True),
    "dropout": ("llama", {"attention_dropout": 0.5, "pretraining_tp": 2, "use_cache": False}, False),
    "granite's": ("llama", {"attention_multiplier": 3.0, "logits_scaling": 4.0, "embedding_multiplier": 2.0}, False),
    "softcaps": (
        "llama", {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 3}, False),
    "length": ("llama", {"max_position_embeddings": 5}, False),
    "mistral with none": ("mistral", {"sliding_window": None}, False),
    "mistral with one of the context": ("mistral", {"sliding_window": 64}, False),
    "mistral with a shorter one": ("mistral", {"sliding_window": 8}, True),
    "mistral by default": ("mistral", {"sliding_window": "absent"}, False),
    "mistral by default, and a long context": (
        "mistral",
        {"sliding_window": "absent", "max_position_embeddings": 5000},
        True,
    ),
    "qwen2 with one that is not used": ("qwen2", {"sliding_window": 8, "use_sliding_window": False}, False),
    "qwen2 with one of the context": ("qwen2", {"sliding_window": 64, "use_sliding_window": True}, False),
    "qwen2 with a shorter one": ("qwen2", {"sliding_window": 8, "use_sliding_window": True}, True),
    "mistral with biases it does not read": ("mistral", {"attention_bias": True, "mlp_bias": True}, False),
    "qwen2 without the biases it has": ("qwen2", {"attention_bias": False}, False),
    "mistral of a usual number of key heads": ("mistral", {"num_key_value_heads": "absent"}, False),
}  # fmt: skip


@pytest.mark.parametrize("case", EDITS)
def test_an_edited_folder_means_the_same_or_is_refused(tmp_path, double, case):
    kind, edit, refused = EDITS[case]
    heads = 8 if "num_key_value_heads" in edit else 2
    sizes = {"num_attention_heads": 8, "num_key_value_heads": heads, "hidden_size": 16, "head_dim": 2}
    rope = {"rope_parameters": SCALINGS[3]} if kind == "llama" else {}
    theirs = written(tmp_path, kind, 3, **sizes, **rope, num_hidden_layers=1, tie_word_embeddings=False)
    path = tmp_path / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k != "layer_types"} | edit
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
    assert same_or_refused(tmp_path, kind, ids_of(theirs, 3)) == refused


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize(("window", "refused"), [(64, False), (65, False), (63, True), (4, True)])
def test_a_window_is_read_as_transformers_writes_it(tmp_path, double, kind, window, refused):
    """It writes layer_types: here the first layer attends to everything, and the others through the window."""
    used = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1, "num_hidden_layers": 3}
    theirs = written(tmp_path, kind, 5, **used)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention"]
    assert settings["max_position_embeddings"] == 64
    assert same_or_refused(tmp_path, kind, ids_of(theirs, 5)) == refused


@pytest.mark.parametrize("same", [True, False])
def test_a_head_beside_a_tied_embedding_means_the_same(tmp_path, double, same):
    theirs = written(tmp_path / "m", "llama", 4, tie_word_embeddings=False)
    file, path = tmp_path / "m" / "model.safetensors", tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    arrays = load_file(file)
    if same:
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
    save_file(arrays, file, metadata={"format": "pt"})
    assert same_or_refused(tmp_path / "m", "llama", ids_of(theirs, 4)) != same


@pytest.mark.parametrize("template", [["<s>", "A"], ["<s>", "A", "</s>"], ["A", "</s>"]])
def test_a_cutting_tokenizer_gives_transformers_ids(tmp_path, template):
    """Truncation and padding in the file, and a template that puts tokens around a text."""
    words = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *"abcdefgh"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    made.add_special_tokens(["<s>", "</s>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=" ".join("$A" if part == "A" else part for part in template),
        special_tokens=[("<s>", 0), ("</s>", 1)],
    )
    made.enable_truncation(4)
    made.enable_padding(length=20)
    written(tmp_path / "m", "llama", 5)
    made.save(str(tmp_path / "m" / "tokenizer.json"))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "m" / "tokenizer.json"))
    ours = load_tokenizer(tmp_path / "m")
    ids, end = theirs("abcdefgh")["input_ids"], (1,) if template[-1] == "</s>" else ()
    assert ids == [*ours.begin, *ours.encode("abcdefgh"), *end]
    assert len(ids) > 8


@pytest.mark.parametrize("language", ["en", "pt"])
def test_glassllm_agrees_with_its_own_forward_and_backward(language):
    glassllm = pytest.importorskip("glassllm")
    from glassllm.model import GlassLM

    path = Path(glassllm.__file__).parent / "weights" / f"{language}.npz"
    theirs, ours = GlassLM.load(path, dtype=np.float64), Llama.load(path, dtype="float64")
    ids = np.random.default_rng(0).integers(0, 1024, (2, 30))
    targets = np.roll(ids, -1, axis=1)
    z, cache = ours.forward(ids)
    close(z, theirs(ids).data, 1e-12)
    loss, dz = cross_entropy(z, targets, out=z)
    expected = theirs.loss(ids, targets)
    close(loss, expected.data, 1e-12)
    expected.backward()
    _, grads = ours.backward(dz, cache)
    close(grads["lm_head.weight"] + grads["model.embed_tokens.weight"], theirs.E.grad, 1e-11)
    named = theirs.named_parameters()
    for i in range(4):
        for name, key in (("self_attn.v_proj", "attn.W_V"), ("mlp.gate_proj", "ffn.W1"), ("mlp.down_proj", "ffn.W2")):
            close(grads[f"model.layers.{i}.{name}.weight"], named[f"blocks.{i}.{key}"].grad.T, 1e-11)
