"""The review app, a page where people view predictions and prototypes, and the service, which answers programs."""

from importlib.util import find_spec

from protopush.errors import InputError


def require_extra(what: str) -> None:
    """Refuse, with an InputError, to start what needs gradio, or what gradio brings along, without it."""
    if find_spec("gradio") is None:
        raise InputError(f"{what} needs gradio; pip install protopush[app]")
