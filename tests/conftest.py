"""What every test runs under."""

import os

from hypothesis import settings

# Nothing in the tests asserts a time, so an example has no deadline; the same examples every
# time, but for the soak, which looks for new ones.
settings.register_profile("default", deadline=None, derandomize=True)
settings.register_profile("soak", deadline=None, max_examples=5_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Tests reach no network: the hub's client is told so before anything imports it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
