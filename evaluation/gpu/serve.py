"""Run `transformers serve` under the name that clients use.

`python -m evaluation.gpu.serve MODEL NAME HOST PORT`. The server takes requests for exactly the
path that it was given, so the model is given to it as a link of that name. Its own command would
look for a newer version on the network first, which takes long without one.
"""

import os
import sys
import tempfile
from importlib import import_module
from pathlib import Path


def main() -> int:
    """Become the server."""
    model, name, host, port = sys.argv[1:]
    os.chdir(tempfile.mkdtemp(prefix="transformers-"))
    Path(name).symlink_to(Path(model).absolute())
    sys.argv = ["transformers", "serve", name, "--host", host, "--port", port]
    import_module("transformers.cli.transformers").app()  # only the engine's Python has it
    return 0


if __name__ == "__main__":
    sys.exit(main())
