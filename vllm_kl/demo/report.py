"""Prints the demo's tables and draws its plots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from vllm_kl.demo.types import BatchRow, Rollout, UpdateRow


def print_table(rows: Sequence[BatchRow], rollouts: Sequence[Rollout], console: Console) -> None:
    """Print one line per batch, and one rollout as an example."""
    columns = {
        "batch": range(len(rows)),
        **_figures(rows),
        "tokens/s": (f"{row.tok_per_s:,.0f}" for row in rows),
        "largest |KL - float64|": (f"{row.max_abs_err:.1e}" for row in rows),
    }
    console.print(_table("KL(policy || reference) per response token, nats", columns))
    last = rollouts[-1]
    kl = sum(last.log_probs) - sum(last.ref_log_probs)
    console.print(
        f"[dim]{last.query}[/dim] -> [bold]{last.response}[/bold]   reward {last.reward:.0f}, KL {kl:+.3f} "
        f"nats over {len(last.log_probs)} tokens",
        highlight=False,
    )


def print_updates(rows: Sequence[UpdateRow], console: Console) -> None:
    """Print one line per update. Of many updates, print about 15, evenly spaced, and the last."""
    every = max(1, len(rows) // 15)
    shown = [row for i, row in enumerate(rows) if i % every == 0 or i + 1 == len(rows)]
    columns = {
        "policy": (f"v{row.policy_version}" for row in shown),
        **_figures([row.collected for row in shown]),
        "staleness": (f"{row.staleness:.2f}" for row in shown),
        "mismatch": (f"{row.mismatch:.1e}" for row in shown),
        "|KL - float64|": (f"{row.collected.max_abs_err:.1e}" for row in shown),
    }
    console.print(_table("GRPO: KL(policy || reference) per response token, nats", columns))


def plot(path: Path, batches: Sequence[BatchRow], updates: Sequence[UpdateRow] = ()) -> Path:
    """Draw reward and KL per batch; with ``updates``, also staleness and mismatch per policy version."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels: dict[str, dict[str, list[float]]] = {
        "mean reward": {"": [row.reward for row in batches]},
        "KL to the reference,\nnats per token": {
            "k1": [row.kl_k1 for row in batches],
            "k3": [row.kl_k3 for row in batches],
        },
    }
    if updates:
        panels["staleness trained on,\nversions"] = {"": [row.staleness for row in updates]}
        panels["sampler against trainer:\ntoken_mult_prob_error - 1"] = {
            "": [row.mismatch for row in updates]
        }
    figure = Figure(figsize=(7, 2.5 * len(panels)), layout="constrained")
    for axes, (what, lines) in zip(figure.subplots(len(panels), sharex=True), panels.items(), strict=True):
        for name, values in lines.items():
            axes.plot(values, marker="o", markersize=3, label=name)
        if len(lines) > 1:
            axes.legend()
        axes.axhline(0, color="gray", linewidth=0.8)  # k1 may be negative
        axes.set_ylabel(what)
        axes.grid(alpha=0.3)
    axes.set_xlabel("version of the policy" if updates else "batch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=120)
    return path


def _figures(rows: Sequence[BatchRow]) -> dict[str, Iterable[str]]:
    return {
        "reward": (f"{row.reward:.3f}" for row in rows),
        "KL k1": (f"{row.kl_k1:.4f}" for row in rows),
        "KL k3": (f"{row.kl_k3:.4f}" for row in rows),
    }


def _table(title: str, columns: Mapping[str, Iterable[object]]) -> Table:
    table = Table(*(Column(name, justify="right") for name in columns), title=title)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*map(str, cells))
    return table
