"""Which replicas run, as Serve has told this process.

This is not in the router's module: Ray 2.60 makes a copy of that one, its variables included, in each process
(``ray/serve/config.py``: ``register_pickle_by_value``).
"""

from __future__ import annotations

# Name of the Serve application -> the ids of its replicas.
RUNNING: dict[str, tuple[str, ...]] = {}
