"""What every test stands on: shape annotations checked at run time, and Hypothesis without chance where CI runs.

HYPOTHESIS_PROFILE=dev searches anew on every run; ci draws the same examples every time and is the default under CI.
"""

import os

import hypothesis
import jaxtyping

# Before the first import of an operator file: the hook rewrites modules while they are loaded.
jaxtyping.install_import_hook("refimpl.ops", "beartype.beartype")

# No deadline: a loaded machine is no failure of the code under test.
_COMMON = {"deadline": None, "max_examples": 25, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("ci", derandomize=True, database=None, print_blob=True, **_COMMON)
hypothesis.settings.register_profile("dev", print_blob=True, **_COMMON)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))
