"""Every error that this project raises on purpose."""


class TaesdStreamError(Exception):
    """Base of every error this project raises on purpose."""


class WireError(TaesdStreamError):
    """A peer's bytes break the protocol: drop the message, count it, keep running."""


class ConfigError(TaesdStreamError):
    """A setting, a file or an address that the user gave cannot be used; the message says which, and the way out."""


class WeightsError(ConfigError):
    """A weight file is missing, broken, or does not fit the latent format that names it."""


class RefusedError(TaesdStreamError):
    """The broker refused a stream; `code` is the protocol's word for why, `use` a name that would be taken."""

    def __init__(self, text: str, *, code: str, use: str | None = None) -> None:
        super().__init__(text)
        self.code = code
        self.use = use


class StreamAbsentError(TaesdStreamError):
    """Nobody publishes a stream of that name."""


class UnreachableError(TaesdStreamError):
    """No daemon answers at the address that was given."""
