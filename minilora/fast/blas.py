"""The environment variables for the threads of NumPy's BLAS. This file does not need NumPy.

A BLAS reads these variables once, when it is loaded with NumPy, so they must be set before that, or for another
process.
"""

BLAS_THREADS = (
    "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS",
)  # fmt: skip
"""The variables with the number of threads, for each BLAS that NumPy may use."""
