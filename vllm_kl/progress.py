"""Shows a progress bar during a long call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def show_progress(num_requests: int, *, enabled: bool) -> Iterator[Callable[[int], None] | None]:
    """Show a bar while the block runs; yield the function that takes how many more requests are done.

    Without ``enabled`` there is no bar, and ``None`` is yielded.
    """
    if not enabled:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=num_requests)
        yield lambda num_done: bar.update(task, advance=num_done)
