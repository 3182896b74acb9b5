"""What holds for every test, of whatever kind?

Only how property tests draw: new examples on each run, with what repeats a failure printed; and
never failed for being slow, since a busy machine says nothing about the code.
"""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "project", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "mutants",
    settings.get_profile("project"),
    # That it fails is all that is asked; not how simple the failure can be made.
    phases=[Phase.explicit, Phase.generate],
    database=None,
)
settings.load_profile("project")
