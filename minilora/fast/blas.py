"""The BLAS, which has NumPy's products of matrices, and the threads that it takes. This file does without NumPy.

A BLAS reads these variables once, when it is loaded with NumPy: whoever wants to set them does so before that, or for
another process.
"""

BLAS_THREADS = (
    "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS",
)  # fmt: skip
"""The variables of the environment in which the libraries that NumPy may have look for a number of threads."""
