"""Import the package once and fork processes that run one script, faster than a new interpreter for each process.

The argument is a JSON object: `script, options, fds`. Each child has one file descriptor: it writes its pid, then reads
and writes lines of JSON. No pid is reused before the standard input of this program ends.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import redis.asyncio  # noqa: F401 -- what a child would else import by itself


def main() -> None:
    order = json.loads(sys.argv[1])
    path = Path(__file__).with_name(order["script"])
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for number, fd in enumerate(order["fds"]):
        if os.fork() == 0:
            for other in order["fds"]:
                if other != fd:
                    os.close(other)
            os.dup2(fd, 0)
            os.dup2(fd, 1)
            os.close(fd)
            print(json.dumps(os.getpid()), flush=True)
            module.run({**order["options"], "worker": number})
            sys.stdout.flush()
            os._exit(0)
    for fd in order["fds"]:
        os.close(fd)
    sys.stdin.read()
    for _ in order["fds"]:
        os.wait()


main()
