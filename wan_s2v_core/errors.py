"""The errors a user can cause. Each message has three parts: the value, the rule, the way out."""


class WanS2VError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(WanS2VError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class CheckpointError(WanS2VError, ValueError):
    """A weights file or folder that is missing, damaged, unsafe or of another model."""


class BackendUnavailable(WanS2VError, RuntimeError):
    """An optional package or device that a chosen setting needs and that is not usable here."""


class OutOfMemory(WanS2VError, RuntimeError):
    """A stage needs more memory than its device has."""


def shown(value: object, longest: int = 100) -> str:
    """A value as messages show it: on one line, printable, and cut at `longest` characters."""
    text = value if isinstance(value, str) else str(value)
    cut = text if len(text) <= longest else text[:longest] + f"... ({len(text):,} characters)"
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in cut)
