"""Talk to a VM's control socket without pyhv: JSON-RPC 2.0, one object a line (docs/control.md).

    pyhv run ticker --name t --detach
    control_socket.py t status
    control_socket.py t save path=/tmp/t.pyhv
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any


def socket_of(name: str) -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime, "pyhv", f"{name}.sock") if runtime else Path(f"/tmp/pyhv-{os.getuid()}", f"{name}.sock")


def call(name: str, method: str, params: dict[str, Any]) -> Any:
    """The result of one call. Raises RuntimeError with the VM's own words."""
    request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(socket_of(name)))
        connection.sendall(json.dumps(request).encode() + b"\n")
        for line in connection.makefile("rb"):
            answer = json.loads(line)
            if answer.get("id") != 1:
                continue  # a notification: how far a save or a migration is
            if "error" in answer:
                raise RuntimeError(answer["error"]["message"])
            return answer["result"]
    raise RuntimeError("the VM hung up")


def main() -> int:
    if len(sys.argv) < 3:
        print(__doc__, file=sys.stderr)
        return 2
    name, method, *given = sys.argv[1:]
    try:
        print(json.dumps(call(name, method, dict(word.split("=", 1) for word in given)), indent=2))
    except (OSError, RuntimeError) as error:
        print(f"control_socket: {name}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
