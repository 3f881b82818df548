"""What holds for all tests."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# How long an example takes says how busy the machine is; what must be quick is measured in benchmarks/.
settings.register_profile("vmexit", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vmexit")
