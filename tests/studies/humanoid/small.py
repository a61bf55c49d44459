"""Define a small task. Its demonstrations are made once and take a few seconds."""

from studies.humanoid.task import Humanoid

KNOBS = {"demonstrations": 1, "length": 60, "width": 16}
SMALL = Humanoid(**KNOBS)
SPEC = ",".join([Humanoid.name, *(f"{key}={value}" for key, value in KNOBS.items())])
