"""Merging on the disk gives what PEFT's merge_and_unload gives in memory, to one unit in the last place."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minilora import merge_adapter

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

drawn = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def unit_in_the_last_place(tensor):
    """Return the distance to the next number of the tensor's own type."""
    mantissa = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23, torch.float64: 52}[tensor.dtype]
    least = torch.finfo(tensor.dtype).smallest_normal
    return torch.exp2(torch.floor(torch.log2(tensor.abs().double().clamp(min=least))) - mantissa)


@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(["float16", "bfloat16", "float32", "float64"]),
    adapter_dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    conv1d=st.booleans(),
)
@drawn
def test_a_merge_equals_peft_s_merge_and_unload(tmp_path_factory, seed, dtype, adapter_dtype, conv1d):
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("merge")
    torch.manual_seed(seed % 2**31)
    n_in, n_out = (int(n) for n in rng.integers(1, 40, 2))
    layer = Conv1D(n_out, n_in) if conv1d else torch.nn.Linear(n_in, n_out)
    model = torch.nn.ModuleDict({"fc": layer, "head": torch.nn.Linear(n_out, 3)})
    model.forward = lambda x: x
    model = model.to(getattr(torch, dtype))
    save_file(model.state_dict(), folder / "base.safetensors", {"format": "pt"})
    base = load_file(folder / "base.safetensors")
    config = peft.LoraConfig(
        r=int(rng.integers(1, 9)),
        lora_alpha=float(rng.choice([1, 2.5, 16])),
        use_rslora=bool(rng.integers(2)),
        target_modules=["fc"],
        fan_in_fan_out=conv1d,
    )
    theirs = peft.get_peft_model(model, config)
    adapter_type = getattr(torch, adapter_dtype)
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.data = (torch.randn(p.shape, dtype=torch.float64) * 0.3).to(adapter_type).to(p.dtype)
    state = {k: v.to(adapter_type) for k, v in peft.get_peft_model_state_dict(theirs).items()}
    theirs.save_pretrained(folder / "adapter", state_dict=state)

    merge_adapter(folder / "base.safetensors", folder / "adapter", folder / "out.safetensors")
    ours, merged = load_file(folder / "out.safetensors"), theirs.merge_and_unload().state_dict()
    assert ours.keys() == merged.keys() == base.keys()
    for name in base:
        assert ours[name].dtype == merged[name].dtype == base[name].dtype
        if name != "fc.weight":
            assert torch.equal(ours[name], base[name])
    got, want = ours["fc.weight"], merged["fc.weight"]
    assert ((got.double() - want.double()).abs() <= unit_in_the_last_place(want)).all()


def test_the_unit_in_the_last_place_is_numpy_s_spacing():
    numbers = torch.randn(1000, dtype=torch.float64)
    for kind in (torch.float16, torch.float32, torch.float64):
        rounded = numbers.to(kind)
        np.testing.assert_array_equal(unit_in_the_last_place(rounded), np.spacing(rounded.abs().numpy()).astype(float))
