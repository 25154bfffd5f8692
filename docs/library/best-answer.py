"""What best-answer.md asserts and shows; the names are the page's own."""

from pages import holds, says

# %% The best answer there is

D = best_adapter(X, R, rank=20, alpha=3).delta()  # rank 20 is no bound here
other = rng.standard_normal(D.shape)
loss = ((R - X @ other.T) ** 2).sum()
holds(r"\text{loss} =", X=X, R=R, D=D, loss=loss, **{"D'": other})

V_r = np.linalg.svd(X @ D.T, full_matrices=False)[2][:3].T
D_r = best.delta()
holds("F_r &=", X=X, D=D, V_r=V_r, D_r=D_r, F_r=best(X))

# Facts from elsewhere: Eckart and Young, The approximation of one matrix by another of lower rank; Izenman,
# Reduced-rank regression for the multivariate linear model.
says("Eckart and Young found it in 1936", "*reduced-rank regression* (Izenman, 1975)")
