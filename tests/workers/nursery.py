"""Imports the package once, and forks the processes that run one script: faster than one interpreter for each.

One JSON argument: `script, options, fds`. Each child reads and writes lines of JSON on its file descriptor, its pid
first. The pid is not reused before the end of the nursery's standard input.
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
