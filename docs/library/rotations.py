"""Checks and computed contents of rotations.md; its parts see the page's own names."""

# %% Rotary positions

from pages import holds

t, u = 3, 7
R = {at: np.hstack([rotary.forward(row[None], at)[0].T for row in np.eye(8)]) for at in (t, u, u - t)}
q, k = one_q.T, one_k.T
score = rotary.forward(one_q, t)[0] @ rotary.forward(one_k, u)[0].T
names = {"R_t": R[t], "R_u": R[u], "R_u-t": R[u - t], "q_t": q, "k_u": k}
holds(r"(R_t\, q_t) \cdot", **{"(R_tq_t)cdot(R_uk_u)": score}, **names)
