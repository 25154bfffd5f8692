"""What the documentation counts of a step is what it does."""

import costs
from hypothesis import given
from hypothesis import strategies as st

from minilora import Linear, LoRA, LoRALinear
from minilora.fast import residual_form

sizes = st.integers(2, 30)


def test_the_ledger_of_a_small_step_by_hand():
    ways = costs.ways(N=10, n_in=4, n_out=3, r=1)
    assert ways["full training"].multiply_adds == 10 * 4 * 3 * 2
    assert ways["LoRA, the article's module"].multiply_adds == 10 * 4 * 3 * 3 + 4 * 3 * 3
    assert ways["LoRA beside its base"].multiply_adds == 10 * 4 * 3 + 10 * (4 + 3) + 10 * (3 + 3 + 4)
    assert ways["LoRA beside its base, residual form"].multiply_adds == 166 + 2 * 10 * 4 + 2 * 4 * 3
    assert ways["LoRA on the residual"].multiply_adds == 10 * (4 + 3) + 10 * (3 + 3 + 4)
    assert ways["LoRA on the residual, residual form"].multiply_adds == 10 * (4 + 3 + 3 + 4) + 2 * (10 + 3)
    assert (ways["full training"].optimizer_bytes, ways["LoRA on the residual"].optimizer_bytes) == (8 * 12, 8 * 7)
    assert ways["full training"].least_bytes == 4 * ((40 + 12 + 30) + (30 + 40 + 12) + 7 * 12)


@given(st.integers(1, 30), sizes, sizes, st.integers(1, 30))
def test_residual_form_runs_the_base_where_that_is_less(N, n_in, n_out, r):
    layer = LoRALinear(Linear(costs.watched(n_out, n_in)), LoRA(costs.watched(r, n_in), costs.watched(n_out, r), 1))
    x, y = costs.watched(N, n_in), costs.watched(N, n_out)
    on_residual, beside = (costs.watch(lambda of=of: residual_form(of, x, y)) for of in (layer.adapter, layer))
    both = {"running it": N * n_in * n_out, "its thin side": 2 * r * n_in * (n_out + N)}
    more = beside.multiply_adds - on_residual.multiply_adds
    assert more == both["running it" if 2 * r > N else "its thin side"]
