"""Errors that are reported to the user."""

from __future__ import annotations

from typing import Any


class UsageError(ValueError):
    """Error in the user's config, data or command line.

    Its message names the file, key or image and says how to fix the problem. The command line
    prints the message without a traceback.
    """


def get_registered(registry: Any, key: str, name: str) -> Any:
    """Return the object that a config key names.

    Args:
        registry: a Detectron2 ``Registry``.
        key: the config key, for the error message.
        name: the value of the key.

    Raises:
        UsageError: if no object of this name is registered.
    """
    known = [registered for registered, _ in registry]
    if name not in known:
        raise UsageError(
            f"unknown {key} {name!r}; known names: {', '.join(known)}. Register your own in "
            f"{registry._name}_REGISTRY"
        )
    return registry.get(name)
