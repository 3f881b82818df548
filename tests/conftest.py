"""For all tests."""

from __future__ import annotations

import signal

from hypothesis import HealthCheck, settings

# A shell that starts `make test` in the background, and nohup, have these ignored; what is started would inherit that, and tests
# that press Ctrl-C or close a terminal would wait in vain.
for ignored in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, signal.default_int_handler if ignored is signal.SIGINT else signal.SIG_DFL)

# How long an example takes says how busy the machine is; what must be quick is measured in benchmarks/.
settings.register_profile("vmexit", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vmexit")
