"""Decoders with mixtures of experts: their folders, refusals, and commands."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora import Llama, adapt, adapters, attach, load_adapter, merge, save_adapter
from minilora.language import found_by_weight, save_llama
from minilora.language.config import LlamaConfig, MixtureConfig
from minilora.language.files.ggufexport import export_adapter
from minilora.language.memory import active_numbers, training_memory
from minilora.layer import parameter_count
from minilora.layers.rotary import frequencies
from minilora.texts import FileRefused

from ..support.adapter_folder import change_json
from ..support.command_line import FINETUNE
from ..support.language import adapted as adapted_model
from ..support.language import drawn, tiny_llama, tiny_mixture

pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")
IDS = np.random.default_rng(0).integers(0, 29, (2, 7))
KINDS = ["mixtral", "qwen2_moe", "qwen3_moe"]
WEIGHTS = "model.safetensors"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_loaded(tmp_path, kind):
    """A missing or unexpected tensor is refused by name."""
    model = tiny_mixture(kind)
    save_llama(model, tmp_path / "m")
    again = Llama.load(tmp_path / "m", dtype="float64")
    assert again.config == model.config
    said = json.loads((tmp_path / "m" / "config.json").read_text())
    assert ("num_local_experts" in said, "norm_topk_prob" in said) == (kind == "mixtral", kind != "mixtral")
    assert (again(IDS) == model(IDS)).all()
    tensors = load_file(tmp_path / "m" / WEIGHTS)
    each = "block_sparse_moe.experts.3.w2" if kind == "mixtral" else "mlp.experts.3.down_proj"
    assert f"model.layers.1.{each}.weight" in tensors
    assert f"model.layers.1.{each.partition('.')[0]}.gate.weight" in tensors
    assert not any("gate_up_proj" in name for name in tensors)
    name = next(name for name in tensors if "experts.2" in name)
    for changed, message in (
        ({key: value for key, value in tensors.items() if key != name}, f"there is no '{name}', expected 4 experts"),
        (tensors | {name: tensors[name][:-1].copy()}, f"'{name}' has shape .* expected"),
        (
            tensors | {name.replace("experts.2", "experts.4"): tensors[name]},
            r"there is '.*experts.4.*', expected only 4",
        ),
    ):
        save_file(changed, tmp_path / "m" / WEIGHTS)
        with pytest.raises(FileRefused, match=message):
            Llama.load(tmp_path / "m")


@pytest.mark.parametrize("kind", ["qwen2_moe", "qwen3_moe"])
def test_biases_and_plain_layers_of_a_mixture_are_kept(tmp_path, kind):
    shared = 5 if kind == "qwen2_moe" else None
    mixture = MixtureConfig(4, 2, 10, False, shared, mlp_only_layers=(0,))
    sizes = {"vocab_size": 29, "intermediate_size": 10, "attention_bias": True}
    model = drawn(0, "float64", **sizes, model_type=kind, mixture=mixture)
    save_llama(model, tmp_path / "m")
    again = Llama.load(tmp_path / "m", dtype="float64")
    assert again.config == model.config
    assert (again(IDS) == model(IDS)).all()


def test_another_number_of_experts_is_refused_at_once(tmp_path):
    save_llama(tiny_mixture(), tmp_path / "m")
    for count in (2**31 - 1, 3, 5):
        change_json(tmp_path / "m" / "config.json", num_local_experts=count)
        with pytest.raises(FileRefused, match=r"there is|is unexpected|missing arrays|has shape"):
            Llama.load(tmp_path / "m")


def test_a_position_uses_only_its_own_experts_parameters():
    model = tiny_mixture("qwen2_moe")
    assert parameter_count(model) - active_numbers(model.config) == 2 * 2 * 3 * 10 * 12  # layers, idle experts
    assert active_numbers(tiny_llama().config) == parameter_count(tiny_llama())


@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_training_is_that_of_real_adapters(kind):
    model = tiny_mixture(kind)
    for modules, arrays in (
        (["q_proj", "o_proj"], []),
        *([(["gate_proj", "down_proj"], [])] if kind == "qwen2_moe" else []),  # of the shared expert
        ([], ["experts.gate_up_proj"]),
        ([], ["experts.down_proj"]),
        (["v_proj"], ["experts.gate_up_proj", "experts.down_proj"]),
    ):
        parameters = [f"mlp.{name}" for name in arrays] or None
        rng = np.random.default_rng(0)
        adapted = adapt(model, modules, rank=2, alpha=2, rng=rng, target_parameters=parameters)
        numbers = sum(p.size for p in adapted.trainable().values())
        found = training_memory(model.config, tokens=4, rank=2, targets=modules + arrays)
        assert (found["trained"], found["gradients"], found["Adam"]) == (4 * numbers, 4 * numbers, 8 * numbers)
        assert found["weights"] == 2 * parameter_count(model)
    if kind != "qwen2_moe":  # no shared expert, and no MLP
        assert training_memory(model.config, tokens=4, rank=2, targets=["gate_proj", "down_proj"])["trained"] == 0


def test_a_mixture_keeps_the_sum_of_the_table():
    shared = MixtureConfig(16, 3, 1000, True, 400, decoder_sparse_step=2)
    config = LlamaConfig(
        7, 100, 5000, 2, 10, 1, 12, 1e-5, frequencies(12, 100.0), attention_bias=True, model_type="qwen2_moe",
        mixture=shared,
    )  # fmt: skip
    attention = 2 * 100 + 2 * 12 * (10 + 1)
    dense, mixed = attention + 2 * 5000, attention + 100 + 16 + 3 * 2 * 1000 + 2 * 400 + 100 + 1

    def kept(*targets, **more):
        return training_memory(config, tokens=1, rank=2, targets=targets, **more)["activations"] // 2

    assert kept("o_proj") == dense + mixed + 2 * 2
    assert kept("experts.down_proj") == dense + mixed + 3 * (1000 + 2)
    assert kept("experts.gate_up_proj") == dense + mixed + 3 * 2
    assert kept("down_proj") == dense + mixed + 5000 + 400 + 2 * 2
    assert kept("gate_proj", recompute=True) == 100 + max(dense + 100 + 2, mixed + 2)
    inputs, products = 3 * 100, 5000 + 3 * 1000 + 400  # which dW of all matrices needs besides
    assert training_memory(config, tokens=1)["activations"] // 2 == dense + mixed + inputs + products


@pytest.mark.filterwarnings("ignore:.* change no weight:UserWarning")  # a start is saved
def test_adapters_of_a_mixture_are_not_written_for_llama_cpp(tmp_path):
    pytest.importorskip("gguf")
    model = tiny_mixture()
    save_llama(model, tmp_path / "m")
    adapted = adapt(model, ["q_proj"], rank=1, alpha=1, rng=np.random.default_rng(0))
    save_adapter(tmp_path / "a", adapters(adapted))
    with pytest.raises(FileRefused, match=r"a mixtral, whose adapters cannot be exported to llama\.cpp$"):
        export_adapter(tmp_path / "a", tmp_path / "m", tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def in_place_of_the_model(mixture):
    """Replace the model in the working folder with a mixture, but keep its tokenizer."""
    tokenizer = Path("model/tokenizer.json").read_bytes()
    shutil.rmtree("model")
    save_llama(mixture, "model")
    Path("model/tokenizer.json").write_bytes(tokenizer)


def test_experts_are_finetuned_by_the_names_of_their_arrays(folder, shell):
    in_place_of_the_model(tiny_mixture("qwen2_moe"))
    names = "--target-parameters mlp.experts.gate_up_proj,mlp.experts.down_proj --target-modules"
    for modules, more in (("q_proj", {"q_proj"}), ("", set())):
        reached = {"experts.gate_up_proj", "experts.down_proj"} | more
        assert f"adapter  rank 2 in {2 * len(reached)} layers" in shell(FINETUNE + names, modules)
        found = load_adapter("a")
        assert {path.partition(".self_attn.")[2] or path.partition(".mlp.")[2] for path in found} == reached
    shell("generate 'the cat' --model model --adapter a --tokens 3")
    base = Llama.load("model")
    model = attach(base, found)
    assert np.abs(model(IDS) - base(IDS)).max() > 1e-3
    np.testing.assert_allclose(merge(model)(IDS), model(IDS), atol=1e-5)


def dense_qwen3_moe():
    """Return a Qwen3-MoE with two blocks, the first of which has an MLP."""
    mixture = MixtureConfig(4, 2, 10, mlp_only_layers=(0,))
    return drawn(0, "float64", vocab_size=29, intermediate_size=10, model_type="qwen3_moe", mixture=mixture)


def test_a_qwen3_moes_dense_layers_are_named_by_their_weights(tmp_path):
    base = dense_qwen3_moe()
    adapted = adapted_model(["gate_proj", "down_proj", "q_proj"], base)
    names = [f"model.layers.0.mlp.{name}.weight" for name in ("gate_proj", "down_proj")]
    assert found_by_weight(adapted) == names
    assert found_by_weight(adapted_model(model=tiny_mixture("qwen2_moe"))) == []
    save_adapter(tmp_path / "a", adapters(adapted), target_parameters=names)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_parameters"] == names
    assert config["target_modules"] == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert (attach(base, load_adapter(tmp_path / "a"))(IDS) == adapted(IDS)).all()


def test_finetune_writes_dense_layers_as_peft_reads_them(folder, shell):
    in_place_of_the_model(dense_qwen3_moe())
    said = (
        "--use-dora and --dropout do not work for the dense layers of a Qwen3-MoE, such as "
        "model.layers.0.mlp.gate_proj: PEFT loads their adapters without either"
    )
    for option in ("--use-dora", "--dropout=0.1"):
        assert shell.refused(FINETUNE, option) == said
    experts = "mlp.experts.gate_up_proj,mlp.experts.down_proj"
    assert "have none" not in shell(FINETUNE, "--target-parameters", experts)
    out = shell(FINETUNE)
    numbers, active = parameter_count(dense_qwen3_moe()), active_numbers(dense_qwen3_moe().config)
    assert f"{numbers:,} parameters ({active:,} of them active per token)" in out
    share = 4 * 3 * 12 * 10 / numbers
    assert f"the experts, {share:.0%} of the weights, are not adapted: --target-parameters {experts} adapts them" in out
    config = json.loads((folder / "a" / "adapter_config.json").read_text())
    assert config["target_parameters"] == [f"model.layers.0.mlp.{n}_proj.weight" for n in ("gate", "up", "down")]
    shell("generate 'the ' --model model --adapter a --tokens 2")
