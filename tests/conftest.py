import os

# The arrays here are small: several BLAS threads would only wait for each other, and on a busy machine for long.
# NumPy reads these when it is first imported, which is after this file.
for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

from hypothesis import HealthCheck, settings  # noqa: E402

# Examples differ in size and so in time; a slow machine is no bug. With CI set, Hypothesis's own "ci" profile applies.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
if settings.get_current_profile_name() == "default":
    settings.load_profile("default")
