"""The errors a user can cause. Each message has three parts: the value, the rule, the way out."""

LONGEST_MESSAGE = 2000
"""Characters of an error: what files are called and hold is shown shorter, this bounds what slips through."""


class WanS2VError(Exception):
    """Base of every error this package raises on purpose."""

    def __str__(self) -> str:
        return _cut(super().__str__(), LONGEST_MESSAGE)


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
    cut = _cut(value if isinstance(value, str) else str(value), longest)
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in cut)


def shown_path(path: object, longest: int = 300) -> str:
    """A file as messages show it: its end tells most, so a long one is cut at the start."""
    text = str(path)
    return shown(text if len(text) <= longest else f"...{text[-longest:]}", longest + 3)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[:longest] + f"... ({len(text):,} characters)"
