"""What `minilora finetune` saves works in transformers with the real PEFT; and what is said there is said here."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from minilora import Linear, Llama, LoRA, adapt, adapters, attach, load_adapter, merge, save_adapter
from minilora.cli import main
from minilora.language.generation import generate
from minilora.language.text import windows
from minilora.schedule import Schedule
from minilora.training import Passes
from minilora.variants.dropout import DroppingLoRALinear

from ..support.language import LETTERS, TEXT, arrays_of
from ..support.peers import PEERS, peft, torch, transformers

pytestmark = PEERS

SMALL = ["--steps", "20", "--batch-size", "4", "--length", "8", "--rank", "2", "--lr", "0.02"]


@pytest.mark.parametrize(("n", "size"), [(10, 4), (12, 4), (3, 3), (7, 1)])
def test_a_pass_is_cut_as_torch_cuts_an_epoch(n, size):
    passes = Passes(n, size, 5)
    cut = torch.utils.data.DataLoader(torch.arange(n), batch_size=size, sampler=passes.order(1).tolist())
    ours = [passes(passes.steps + k).tolist() for k in range(1, passes.steps + 1)]
    assert ours == [batch.tolist() for batch in cut]


def in_transformers(folder):
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def assert_same_logits(ours, theirs, ids):
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(ours(ids), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("targets", ["q_proj,v_proj", "all-linear", r".*\.1\.mlp\..*"])
def test_a_finetuned_adapter_gives_the_same_logits_in_peft(folder, targets):
    """Beside a base that is given, merged, and by the class that finds the base by itself."""
    base = str(folder / "model")
    assert main(["finetune", "text", "--save", "a", "--model", base, *SMALL, "--target-modules", targets]) == 0
    ids, found = np.random.default_rng(0).integers(len(LETTERS), size=(2, 11)), load_adapter("a")
    plain, adapted = Llama.load("model"), attach(Llama.load("model"), found)
    assert np.abs(adapted(ids) - plain(ids)).max() > 0.1
    assert_same_logits(plain, in_transformers("model"), ids)
    auto = peft.AutoPeftModelForCausalLM.from_pretrained("a", dtype=torch.float32).eval()
    assert isinstance(auto, peft.PeftModelForCausalLM)
    theirs_have = {name.split(".lora_A")[0] for name, _ in auto.named_parameters() if ".lora_A." in name}
    assert theirs_have == {f"base_model.model.{path}" for path in found}
    beside = peft.PeftModel.from_pretrained(in_transformers("model"), "a")
    for theirs in (auto, beside):
        assert_same_logits(adapted, theirs, ids)
    assert_same_logits(merge(adapted), beside.merge_and_unload(), ids)


def test_greedy_generation_is_that_of_transformers(folder):
    assert main(["finetune", "text", "--save", "a", "--model", "model", *SMALL]) == 0
    ours = attach(Llama.load("model"), load_adapter("a"))
    theirs = peft.PeftModel.from_pretrained(in_transformers("model"), "a")
    for prompt in ("the", "a dog on"):
        ids = [LETTERS.index(c) for c in prompt]
        given = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        expected = theirs.generate(**given, **options)[0].tolist()
        assert [*ids, *generate(ours, ids, 30)] == expected


def test_finetuning_takes_the_steps_of_torch_and_peft(folder):
    """The same start, batches and Adam: torch's gradients lead to the adapter that ours lead to."""
    command = ["finetune", "text", "--save", "a", "--model", "model", *SMALL, "--dtype", "float64", "--steps", "6"]
    assert main(command) == 0
    rng = np.random.default_rng(0)
    start = Llama.load("model", dtype="float64")
    save_adapter("start", adapters(adapt(start, "all-linear", rank=2, alpha=16, rng=rng)))
    base = transformers.LlamaForCausalLM.from_pretrained("model", dtype=torch.float64)
    model = peft.PeftModel.from_pretrained(base, "start", is_trainable=True, autocast_adapter_dtype=False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    X, Y, *_ = windows([LETTERS.index(c) for c in TEXT], 8)
    batches = torch.utils.data.BatchSampler(Passes(len(X), len(X), 0)(1).tolist(), batch_size=4, drop_last=False)
    for rows in islice(batches, 6):
        logits = model(torch.from_numpy(X[rows])).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(Y[rows]).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    theirs = dict(model.named_parameters())
    for path, adapter in load_adapter("a").items():
        for name in ("lora_A", "lora_B"):
            expected = theirs[f"base_model.model.{path}.{name}.default.weight"].detach().numpy()
            np.testing.assert_allclose(getattr(adapter, name), expected, atol=1e-5)


def test_glassllms_adapter_works_over_the_same_weights_in_transformers(folder):
    pytest.importorskip("glassllm")
    assert main(["finetune", "text", "--save", "a", "--steps", "3", "--batch-size", "2", "--length", "16"]) == 0
    import glassllm

    ours = Llama.load(Path(glassllm.__file__).parent / "weights" / "en.npz")
    c = ours.config
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size, head_dim=c.head_dim,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads, rms_norm_eps=c.rms_norm_eps,
        num_key_value_heads=c.num_key_value_heads, tie_word_embeddings=True, max_position_embeddings=128,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config)
    weights = {name: torch.from_numpy(a) for name, a in arrays_of(ours).items()}
    assert not base.load_state_dict(weights, strict=False).unexpected_keys
    ids = np.random.default_rng(0).integers(c.vocab_size, size=(2, 40))
    assert_same_logits(ours, base, ids)
    assert_same_logits(attach(ours, load_adapter("a")), peft.PeftModel.from_pretrained(base, "a"), ids)


@pytest.mark.parametrize(("decay", "name"), [("constant", "constant_with_warmup"), ("linear",) * 2, ("cosine",) * 2])
@pytest.mark.parametrize("warmup", [0, 5])
def test_the_rates_are_those_of_transformers_behind_the_warmup(decay, name, warmup):
    """There the first step of a warmup has the rate 0, here the one that there has the second."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=20)
    theirs = []
    for _ in range(20):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    ours = [Schedule(decay, 20, warmup)(t) for t in range(1, 21)]
    np.testing.assert_allclose(ours[warmup:], theirs[warmup:], rtol=1e-12)
    np.testing.assert_allclose(ours[: max(0, warmup - 1)], theirs[1:warmup], rtol=1e-12)


class Masked(torch.nn.Module):
    """In the place of a dropout: a mask that is given."""

    def __init__(self, mask, share):
        super().__init__()
        self.mask, self.share = torch.from_numpy(mask), share

    def forward(self, x):
        return self.mask * x / (1 - self.share)


def test_the_layer_with_a_mask_and_its_gradients_are_pefts():
    rng, share = np.random.default_rng(0), 0.25
    net = torch.nn.Sequential(torch.nn.Linear(7, 5)).double()
    theirs = peft.get_peft_model(net, peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], lora_dropout=share))
    layer = theirs.base_model.model[0]
    A, B = (rng.standard_normal(shape) for shape in ((3, 7), (5, 3)))
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = torch.tensor(A), torch.tensor(B)
    assert (layer.lora_dropout["default"].p, layer.lora_dropout["default"].training) == (share, True)
    base = Linear(layer.base_layer.weight.detach().numpy(), layer.base_layer.bias.detach().numpy())
    ours = DroppingLoRALinear(base, LoRA(A, B, 6.0), share, (1, 2))
    x, dy = rng.standard_normal((2, 4, 7)), rng.standard_normal((2, 4, 5))
    layer.lora_dropout["default"] = Masked(ours.mask(x), share)
    at = torch.tensor(x, requires_grad=True)
    expected = theirs(at)
    expected.backward(torch.tensor(dy))
    y, cache = ours.forward(x)
    dx, grads = ours.backward(dy, cache)
    np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(dx, at.grad.numpy(), rtol=1e-10)
    for name in ("lora_A", "lora_B"):
        np.testing.assert_allclose(grads[name], getattr(layer, name)["default"].weight.grad.numpy(), rtol=1e-10)
