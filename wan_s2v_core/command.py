"""A process that is one command: `python -m wan_s2v_core` and generate.py. Ctrl-C ends it in one line at any moment.

Nothing is imported here before it is watched: whoever is impatient stops a command while it loads.
"""

import sys


def run_command(*arguments: object) -> int:
    """`cli.main`, from its import on -> the exit code. Once it has ended, Ctrl-C changes nothing any more.

    Args:
        arguments: those of `main`.
    """
    presses: list[int] = []

    def press(number: int, frame: object) -> None:
        presses.append(number)
        raise KeyboardInterrupt

    try:
        import signal

        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, press)
        from .cli import main

        code = main(*arguments, stopped=lambda: bool(presses))
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what was made is there; only Python's own end follows
        return code
    except BaseException as error:  # libraries make errors of their own of a Ctrl-C while they are imported
        if not presses and not isinstance(error, KeyboardInterrupt):
            raise
        print("error: stopped.", file=sys.stderr)
        if "--json" in sys.argv:
            print('{"error": "stopped."}')
        return 130
