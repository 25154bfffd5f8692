from hypothesis import HealthCheck, settings

# Examples differ in size and so in time; a slow machine is no bug. With CI set, Hypothesis's own "ci" profile applies.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
if settings.get_current_profile_name() == "default":
    settings.load_profile("default")
