"""Run a program that loads models through transformers: `python -m camera_serve.hf lm_eval …`.

Importing this package, which Python does first, is all the program needs to know CAMERA.
"""

import runpy
import sys
from importlib.util import find_spec

USAGE = "usage: python -m camera_serve.hf MODULE [ARGUMENT]..., as after `python -m`"


def main() -> None:
    """Run the module named first, with the arguments after it.

    Ends with code 2 where none is named, as other commands do, and 1 where it is not installed.
    """
    if len(sys.argv) < 2:
        print(USAGE, file=sys.stderr)
        sys.exit(2)
    del sys.argv[0]
    if find_spec(sys.argv[0]) is None:
        sys.exit(f"error: {sys.argv[0]} is not installed; {USAGE}")
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
