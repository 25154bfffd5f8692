"""What variants.md asserts and shows; the names are the page's own."""

from pages import DOCS, own_picture

from minilora import DoRA, DoRAAdapter, Linear

# %% DoRA: another layer

layer = DoRA(
    Linear(np.array([[2.4, 0.5]])),
    DoRAAdapter(np.array([[-0.1, 1.4]]), np.array([[1.0]]), 1.0, magnitude=np.array([2.2])),
)
drawn = own_picture(DOCS / "library" / "variants.md", "variants-3")
assert f"a row of W, {np.linalg.norm(layer.base.weight):.2f} long" in drawn and f", n = {layer.norm()[0]:.2f}<" in drawn
assert np.isclose(np.linalg.norm(layer.merge().weight), 2.2) and ">m = 2.2<" in drawn

# %% Adapters put together

c1, c2 = 0.7 * one.scaling, -0.3 * two.scaling
crossed = (c1 * -c2) ** 0.5 * (two.lora_B @ one.lora_A - one.lora_B @ two.lora_A)
assert np.allclose(both.delta() - wanted, crossed, rtol=0, atol=1e-12)
