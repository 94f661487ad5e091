"""A process that is one command: `python -m wan_s2v_core` and generate.py. Ctrl-C ends it in one line at any moment.

Nothing is imported here before it is watched: whoever is impatient stops a command while it loads.
"""

import sys


def run_command(*arguments: object) -> int:
    """`cli.main`, from its import on -> the exit code. Once it has ended, Ctrl-C changes nothing any more.

    Args:
        arguments: those of `main`.
    """
    try:
        import signal

        from .cli import main

        code = main(*arguments)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what was made is there; only Python's own end follows
        return code
    except KeyboardInterrupt:
        print("error: stopped.", file=sys.stderr)
        if "--json" in sys.argv:
            print('{"error": "stopped."}')
        return 130
