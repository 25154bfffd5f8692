"""What derivation.md asserts and shows; the names are the page's own."""

# %% By hand, with numbers
import drawings
from pages import picture, shown

picture("derivation-1", drawings.graph())

assert L == 12 and dx.tolist() == [[5, -2], [-9, 8], [7, -5]]
assert dA.tolist() == [[-10, 14]] and dB.tolist() == [[-12], [22]]
assert np.allclose(A, [[2.1, -1.1]], atol=1e-8) and after.round(4) == 7.0151
assert np.allclose(B, [[1.1], [-1.1]], atol=1e-8)

# %% Clipping

plain, clipped = moves(), moves(max_grad_norm=1.0)
assert plain[200:220].mean() > 1.5 * plain[100:200].mean() > 30 * plain[300:].mean()
assert clipped[200:220].mean() < clipped[100:200].mean() < 1.5 * clipped[300:].mean()

# %% A task for all rungs

import rungs

shown("derivation-2", rungs.table("linear"))
