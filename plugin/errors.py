"""The two errors that lorafuse raises on purpose: a wrong flag, an impossible fusion."""


class FuseConfigError(ValueError):
    """A flag is unknown, has a value that is not supported, or contradicts another setting."""


class FuseError(RuntimeError):
    """Fusing was asked for strictly and is not possible, or a third party's plugin failed."""
