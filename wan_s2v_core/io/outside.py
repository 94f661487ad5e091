"""What comes in from outside: files, JSON and text that others made. Every reader of them begins here.

Foreign parsers raise what they like, and special files block or never end. Here each becomes one line of ours.
"""

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import ConfigError, WanS2VError, shown, shown_path

LARGEST_JSON_BYTES = 64_000_000
"""umT5's tokenizer.json, the largest that is read, takes 17 MB."""
LONGEST_TEXT = 100_000
"""Characters of a prompt. umT5 reads the first 512 tokens."""
LONGEST_NAME_BYTES, LONGEST_PATH_BYTES = 255, 4095
"""What Linux and most file systems take."""


def file_size(path: str | Path, largest_bytes: int | None = None, error: type[WanS2VError] = ConfigError) -> int:
    """Bytes of a regular file.

    Raises:
        error: if it is not there, is a folder, pipe or device, or is larger than `largest_bytes`.
    """
    try:
        facts = Path(path).stat()
    except (OSError, ValueError) as problem:  # ValueError: a null character in the name
        reason = f"cannot be opened: {getattr(problem, 'strerror', None) or problem}"
        reason = "is not there" if isinstance(problem, FileNotFoundError) else reason
        raise error(f"{shown_path(path)} {reason}. Check the name and the folder.") from problem
    if not stat.S_ISREG(facts.st_mode):
        kind = "a folder" if stat.S_ISDIR(facts.st_mode) else "a pipe, socket or device"
        raise error(f"{shown_path(path)} is {kind}, not a regular file. Choose a file.")
    if largest_bytes is not None and facts.st_size > largest_bytes:
        raise error(
            f"{shown_path(path)} has {facts.st_size:,} bytes; at most {largest_bytes:,} are read. "
            "Check that it is the right one."
        )
    return facts.st_size


def inside(root: str | Path, name: Any, paths: ModuleType = os.path) -> Path | None:
    """The absolute path of `name` below the folder `root`; None for names that lead out of it or are the folder itself.

    Links are not followed: whoever made one inside of the folder wanted it there.

    Args:
        paths: os.path, or that of another system.
    """
    if not isinstance(name, str) or "\0" in name:
        return None
    folder = paths.abspath(root)
    path = paths.abspath(paths.join(folder, name))
    beginning = paths.normcase(folder if folder.endswith(paths.sep) else folder + paths.sep)
    return Path(path) if paths.normcase(path).startswith(beginning) else None


def read_bytes(path: str | Path, largest_bytes: int, error: type[WanS2VError] = ConfigError) -> bytes:
    """A whole small file.

    Raises:
        error: as `file_size`, and if it cannot be read.
    """
    file_size(path, largest_bytes, error)
    try:
        return Path(path).read_bytes()
    except OSError as problem:
        raise error(f"{shown_path(path)} cannot be read: {problem.strerror}. Check its permissions.") from problem


def read_json(
    path: str | Path, error: type[WanS2VError] = ConfigError, largest_bytes: int = LARGEST_JSON_BYTES
) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        error: if there is none, or the file is no regular one or too large.
    """
    return parse_json(read_bytes(path, largest_bytes, error), str(path), error)


def parse_json(text: str | bytes, origin: str, error: type[WanS2VError] = ConfigError) -> dict[str, Any]:
    """The JSON object in `text`, which came from `origin`.

    Raises:
        error: if it is none: no JSON, nested too deeply, numbers of thousands of digits, not UTF-8.
    """
    try:
        content = json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except (ValueError, RecursionError) as problem:
        raise error(f"{shown_path(origin)} cannot be read as JSON: {shown(problem)}. Replace the file.") from problem
    if not isinstance(content, dict):
        raise error(f"{shown_path(origin)} holds a {type(content).__name__}, not a JSON object. Replace the file.")
    return content


@contextlib.contextmanager
def foreign_parser(
    origin: Any, cure: str, error: type[WanS2VError] = ConfigError, what: str = "cannot be read"
) -> Iterator[None]:
    """Within, whatever a parser that is not ours raises becomes one line with the file and the reason.

    Only the call of the parser belongs inside: callbacks of ours, such as a cancel, must not.

    Raises:
        error: in place of what was raised. Errors of ours pass as they are.
    """
    try:
        yield
    except (WanS2VError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as problem:  # a panic of a library in Rust is no Exception
        reason = shown(str(problem).strip() or type(problem).__name__, 200)
        raise error(f"{shown_path(origin)} {what}: {reason}. {cure}") from problem


def check_text(name: str, text: Any, longest: int = LONGEST_TEXT) -> str:
    """`text`, if it can be written, sent and read by a tokenizer.

    Raises:
        ConfigError: if it is no text, too long, or not valid Unicode (a lone surrogate, as a wrong locale makes them).
    """
    if not isinstance(text, str):
        raise ConfigError(f"{name} is a {type(text).__name__}, not text. Give text.")
    if len(text) > longest:
        raise ConfigError(f"{name} has {len(text):,} characters; at most {longest:,} are taken. Shorten it.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise ConfigError(
            f"{name} is not valid Unicode at character {problem.start + 1}: {shown(text)}. Type it again; on a "
            "terminal, set a UTF-8 locale such as LANG=C.UTF-8."
        ) from problem
    return text


def check_path(name: str, path: str | Path, spare_bytes: int = 0) -> None:
    """Whether a file system can take a path, which need not be there.

    Args:
        spare_bytes: what is added to its last name.
    Raises:
        ConfigError: if it is too long, or is not valid Unicode.
    """
    text = check_text(name, str(path), LONGEST_PATH_BYTES)
    if "\0" in text:
        raise ConfigError(f"{name} {shown(text)} has a null character. Type it again.")
    names = Path(text).parts
    longest = max((len(part.encode()) for part in names[:-1]), default=0)
    last = len(names[-1].encode()) + spare_bytes if names else 0
    whole = len(os.path.abspath(text).encode("utf-8", "surrogateescape")) + spare_bytes
    if max(longest, last) > LONGEST_NAME_BYTES or whole > LONGEST_PATH_BYTES:
        raise ConfigError(
            f"{name} {shown(text)} is too long: a name may have {LONGEST_NAME_BYTES - spare_bytes} bytes, a path "
            f"{LONGEST_PATH_BYTES - spare_bytes}; some letters take 2 to 4. Shorten it."
        )
