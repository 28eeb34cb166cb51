"""Answers tool calls in the Model Context Protocol, one JSON message a line, as ``MCPToolTransform`` asks.

TorchRL 0.14.1 sends no ``initialize``, so servers of the ``mcp`` package refuse its requests.
"""

from __future__ import annotations

import json
import sys

TOOL = {"name": "add", "inputSchema": {"type": "object"}}


def main() -> None:
    """Answer until the input ends."""
    for line in sys.stdin:
        message = json.loads(line)
        result = {"tools": [TOOL]}
        if message["method"] == "tools/call":
            result = {
                "content": [{"type": "text", "text": str(sum(message["params"]["arguments"].values()))}]
            }
        print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}), flush=True)


if __name__ == "__main__":
    main()
