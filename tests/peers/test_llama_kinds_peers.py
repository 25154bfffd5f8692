"""Mistral, Qwen and Mixtral as transformers computes them: ours are the same, in folders and in .gguf files."""

import json
from types import ModuleType

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minilora import Llama, adapt, adapters, attach, cross_entropy, load_adapter, save_adapter, train
from minilora.language import next_token_loss, save_llama
from minilora.language.ggufexport import export_adapter
from minilora.language.tokens import load_tokenizer

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from transformers.models.mistral import modeling_mistral as mistral  # noqa: E402
from transformers.models.mixtral import modeling_mixtral as mixtral  # noqa: E402
from transformers.models.qwen2 import modeling_qwen2 as qwen2_  # noqa: E402
from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen2_moe  # noqa: E402
from transformers.models.qwen3 import modeling_qwen3 as qwen3  # noqa: E402
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe  # noqa: E402

from .test_llama_peers import LINEARS, SCALINGS, close, ids_of, targets_of, torch_loss, with_peft  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

drawn = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MODELS = {
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, mistral.MistralRotaryEmbedding),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, qwen2_.Qwen2RotaryEmbedding),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, qwen3.Qwen3RotaryEmbedding),
    "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM, mixtral.MixtralRotaryEmbedding),
    "qwen2_moe": (transformers.Qwen2MoeConfig, transformers.Qwen2MoeForCausalLM, qwen2_moe.Qwen2MoeRotaryEmbedding),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM, qwen3_moe.Qwen3MoeRotaryEmbedding),
}
DENSE, MIXED = ["mistral", "qwen2"], ["mixtral", "qwen2_moe", "qwen3_moe"]


class InDouble(ModuleType):
    """torch, to a module that asks for float32 whatever its arrays are."""

    float32 = float = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture(autouse=True)
def double(monkeypatch):
    """Their norms, angles, softmax and routers stay in float64; as they are, they compute in float32."""
    for module in (mistral, mixtral, qwen2_, qwen2_moe, qwen3, qwen3_moe):
        monkeypatch.setattr(module, "torch", InDouble("torch"))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float", torch.float64)  # in which they make the frequencies


def config_of(kind, seed, **changes):
    rng = np.random.default_rng(seed)
    kv, group, width = (int(rng.integers(1, 4)) for _ in range(3))
    layers, experts = int(rng.integers(1, 4)), int(rng.integers(2, 7))
    sizes = {
        **{"vocab_size": int(rng.integers(20, 40)), "hidden_size": 4 * kv * group, "num_key_value_heads": kv},
        **{"num_attention_heads": kv * group, "intermediate_size": int(rng.integers(5, 30))},
        **{"num_hidden_layers": layers, "rms_norm_eps": 10.0 ** -rng.integers(2, 7)},
        **{"tie_word_embeddings": bool(rng.integers(2)), "rope_parameters": dict(SCALINGS[rng.integers(4)])},
        "max_position_embeddings": 64,
    }
    if kind != "qwen2" or rng.integers(2):
        sizes["head_dim"] = 2 * width
    if kind in DENSE:
        windows = {"sliding_window": [None, 64, 100][rng.integers(3)]}
        sizes |= windows if kind == "mistral" else {"max_window_layers": 1}
    elif kind != "mixtral":
        sizes["qkv_bias" if kind == "qwen2_moe" else "attention_bias"] = bool(rng.integers(2))
    if kind in MIXED:
        sizes["num_local_experts" if kind == "mixtral" else "num_experts"] = experts
        sizes["num_experts_per_tok"] = int(rng.integers(1, experts + 1))
    if kind.endswith("moe"):
        sizes |= {"moe_intermediate_size": int(rng.integers(3, 9)), "norm_topk_prob": bool(rng.integers(2))}
        sizes |= {"decoder_sparse_step": int(rng.integers(1, 3)), "mlp_only_layers": [[], [0], [1, 7]][rng.integers(3)]}
    if kind == "qwen2_moe":
        sizes["shared_expert_intermediate_size"] = int(rng.integers(3, 9))
    return MODELS[kind][0](**sizes | changes)


def written(folder, kind, seed, **changes):
    """A model of random sizes and weights, its biases among them, in transformers and in its folder."""
    torch.manual_seed(seed)
    config = config_of(kind, seed, **changes)
    config._experts_implementation = "eager"
    model = MODELS[kind][1](config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5 if p.ndim > 1 else 1.0)
    model.save_pretrained(folder)
    return in_double(kind, model)


def in_double(kind, model):
    model.double()
    model.config._experts_implementation = "eager"
    model.model.rotary_emb = MODELS[kind][2](model.config)
    return model.eval()


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids), use_cache=False).logits.numpy()


def backward_of(theirs, ours, ids):
    """The gradients of both, after their logits and losses were compared."""
    logits = theirs(torch.tensor(ids)).logits
    z, cache = ours.forward(ids)
    close(z, logits.detach().numpy(), 1e-9)
    loss, dz = cross_entropy(z, targets_of(ids), out=z)
    expected = torch_loss(logits, targets_of(ids))
    close(loss, expected.item(), 1e-9)
    expected.backward()
    return ours.backward(dz, cache)[1]


@pytest.mark.parametrize("kind", MODELS)
@given(seed=st.integers(0, 2**31))
@drawn
def test_logits_losses_and_gradients_are_those_of_transformers(tmp_path_factory, kind, seed):
    folder = tmp_path_factory.mktemp("model")
    theirs = written(folder, kind, seed)
    ours = Llama.load(folder, dtype="float64")
    assert (ours.config.model_type, ours.config.max_position_embeddings) == (kind, 64)
    grads = backward_of(theirs, ours, ids_of(theirs, seed))
    if theirs.config.tie_word_embeddings:
        grads["model.embed_tokens.weight"] += grads.pop("lm_head.weight")
    params = dict(theirs.named_parameters())
    assert grads.keys() == params.keys()
    for name, p in params.items():
        close(grads[name], p.grad.numpy(), 1e-9)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("seed", range(3))
def test_a_saved_model_is_in_transformers_what_it_was(tmp_path, kind, seed):
    theirs = written(tmp_path / "m", kind, seed)
    save_llama(Llama.load(tmp_path / "m", dtype="float64"), tmp_path / "again")
    again, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", dtype=torch.float64, output_loading_info=True
    )
    assert not any(loading.values())
    assert (type(again), again.config.max_position_embeddings) == (MODELS[kind][1], 64)
    ids = ids_of(theirs, seed)
    close(logits_of(in_double(kind, again), ids), logits_of(theirs, ids), 1e-9)


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("options", [{"target_modules": LINEARS}, {"target_modules": ["q_proj"], "use_dora": True}])
def test_adapters_of_peft_are_read_and_trained_on(tmp_path, kind, options):
    theirs = written(tmp_path / "m", kind, 5)
    tuned = with_peft(theirs, **options)
    tuned.save_pretrained(tmp_path / "adapter")
    base = Llama.load(tmp_path / "m", dtype="float64")
    ours = attach(base, load_adapter(tmp_path / "adapter", dtype="float64"))
    ids = ids_of(theirs, 5)
    close(ours(ids), logits_of(tuned, ids), 1e-9)
    rng = np.random.default_rng(0)
    model = adapt(base, rank=2, alpha=4, rng=rng, **options)
    fit = {"epochs": 8, "steps": 1, "batch_size": 2, "lr": 1e-2, "rng": rng, "loss": next_token_loss}
    losses = train(model, ids, targets_of(ids), **fit, log_every=1).losses
    assert losses[-1] < losses[0]
    save_adapter(tmp_path / "ours", adapters(model))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float64)
    loaded = peft.PeftModel.from_pretrained(in_double(kind, again), tmp_path / "ours", autocast_adapter_dtype=False)
    close(logits_of(loaded.double().eval(), ids), model(ids), 1e-9)


WINDOWS = {
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
}


@pytest.mark.parametrize("case", WINDOWS)
def test_an_edited_folder_means_the_same_or_is_refused(tmp_path, case):
    kind, edit, refused = WINDOWS[case]
    heads = 8 if "num_key_value_heads" in edit else 2
    sizes = {"num_attention_heads": 8, "num_key_value_heads": heads, "hidden_size": 16, "head_dim": 2}
    theirs = written(tmp_path, kind, 3, **sizes, num_hidden_layers=2)
    path = tmp_path / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k != "layer_types"} | edit
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
    ids = ids_of(theirs, 3)
    if refused:
        with pytest.raises(ValueError, match="sliding_window is "):
            Llama.load(tmp_path)
        return
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    close(Llama.load(tmp_path, dtype="float64")(ids), logits_of(in_double(kind, again), ids), 1e-9)


# --- .gguf ----------------------------------------------------------------------------------------


def write_qwen2_gguf(path, config, arrays):
    """As llama.cpp's converter writes a Qwen2: rows in transformers' order."""
    gguf = pytest.importorskip("gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_token_merges(["t 0"])
    writer.add_token_types([1] * config.vocab_size)
    for name, array in arrays.items():
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), np.ascontiguousarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def qwen2(tmp_path):
    """A Qwen2 of transformers, its folder and its .gguf file; head_dim is hidden_size / heads, as in real ones."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    theirs = written(tmp_path / "m", "qwen2", 11, **sizes, tie_word_embeddings=False, rope_parameters=SCALINGS[1])
    arrays = {name: p.detach().float().numpy() for name, p in theirs.named_parameters()}
    return theirs, tmp_path / "m", write_qwen2_gguf(tmp_path / "m.gguf", theirs.config, arrays)


def test_a_qwen2_gguf_is_what_transformers_reads_from_it(qwen2):
    theirs, folder, path = qwen2
    ids = ids_of(theirs, 1)
    ours = Llama.load(path, dtype="float64")
    assert (ours.config.model_type, ours.config.max_position_embeddings) == ("qwen2", 64)
    read = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float64,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    close(ours(ids), logits_of(in_double("qwen2", read), ids), 1e-6)  # its base and eps are float32's
    close(ours(ids), Llama.load(folder, dtype="float64")(ids), 1e-6)


def test_an_exported_adapter_of_a_qwen2_keeps_its_rows(qwen2, tmp_path):
    gguf = pytest.importorskip("gguf")
    theirs, folder, path = qwen2
    tuned = with_peft(theirs, target_modules=LINEARS)
    tuned.save_pretrained(tmp_path / "adapter")
    for model in (folder, path):
        names = export_adapter(tmp_path / "adapter", model, tmp_path / "a.gguf")
        reader = gguf.GGUFReader(tmp_path / "a.gguf")
        assert reader.fields["general.architecture"].contents() == "qwen2"
        found = {tensor.name: tensor.data for tensor in reader.tensors}
        assert sorted(found) == sorted(names)
        for module, adapter in load_adapter(tmp_path / "adapter").items():
            if module.endswith(("q_proj", "k_proj")):
                layer, which = module.split(".")[2], module[-6]
                np.testing.assert_allclose(found[f"blk.{layer}.attn_{which}.weight.lora_b"], adapter.lora_B, rtol=1e-6)


TEXT = st.text(st.sampled_from("aAbLlStT'dvVeErRmM 019 \n\r\t(.-_é日😀\u00a0"), max_size=30)


@pytest.fixture(scope="module")
def qwen2_tokenizers(tmp_path_factory):
    """Transformers' tokenizer and ours of one .gguf file, with merges that reach across letters, digits and marks."""
    gguf = pytest.importorskip("gguf")
    letters = sorted(pytest.importorskip("tokenizers").pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in "aAlLstT'rvE(.Ġ0Ċč" for b in "aLlsStTeE'd.1ĠĊč"]
    words = [*letters, *("".join(pair) for pair in pairs)]
    theirs = transformers.Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=pairs)
    theirs._tokenizer.normalizer = None  # llama.cpp leaves a text as it is written
    path = tmp_path_factory.mktemp("tokens") / "m.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(words)
    writer.add_token_types([1] * len(words))
    writer.add_token_merges([" ".join(pair) for pair in pairs])
    writer.add_eos_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return theirs, load_tokenizer(path)


@given(text=TEXT)
@settings(max_examples=500, deadline=None)
def test_a_qwen2_gguf_splits_a_text_as_transformers_does(qwen2_tokenizers, text):
    theirs, ours = qwen2_tokenizers
    assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ours.encode(text)) == text
