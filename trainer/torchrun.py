"""Read and check the environment variables that torchrun sets."""

import os

from trainer.settings import ConfigError


def environment_number(key: str, default: int) -> int:
    """Return a number that torchrun sets.

    Raises:
        ConfigError: it is not a number.
    """
    text = os.environ.get(key, str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"the environment variable {key}={text!r} must be a whole number; start several "
            f"processes with torchrun, or unset {key} to train in one process"
        ) from None


def world_size() -> int:
    """Return the number of processes that torchrun started; 1 without torchrun."""
    return environment_number("WORLD_SIZE", 1)


def environment_problems() -> list[str]:
    """Return a message for each variable of torchrun that is not usable."""
    lowest = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 0}
    problems = []
    for key, low in lowest.items():
        try:
            if (value := environment_number(key, low)) < low:
                problems.append(f"the environment variable {key}={value} must be at least {low}")
        except ConfigError as error:
            problems.append(str(error))
    if not problems and world_size() > 1 and environment_number("RANK", 0) >= world_size():
        problems.append(
            f"the environment variable RANK={os.environ['RANK']} must be below "
            f"WORLD_SIZE={world_size()}"
        )
    return problems
