"""What the demo shows: tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from vllm_kl.demo.loop import UpdateRow
    from vllm_kl.demo.run import BatchRow, Rollout


def print_table(rows: Sequence[BatchRow], rollouts: Sequence[Rollout], console: Console) -> None:
    """Print one line per batch, and one rollout so that there is something to read."""
    table = Table(title="KL(policy || reference) per response token, nats")
    for name in ("batch", "reward", "KL k1", "KL k3", "tokens/s", "largest |KL - float64|"):
        table.add_column(name, justify="right")
    for i, row in enumerate(rows):
        table.add_row(
            str(i),
            f"{row.reward:.3f}",
            f"{row.kl_k1:.4f}",
            f"{row.kl_k3:.4f}",
            f"{row.tok_per_s:,.0f}",
            f"{row.max_abs_err:.1e}",
        )
    console.print(table)
    last = rollouts[-1]
    kl = sum(last.log_probs) - sum(last.ref_log_probs)
    console.print(
        f"[dim]{last.query}[/dim] -> [bold]{last.response}[/bold]   reward {last.reward:.0f}, KL {kl:+.3f} nats over "
        f"{len(last.log_probs)} tokens",
        highlight=False,
    )


def plot(path: Path, rows: Sequence[BatchRow]) -> Path:
    """Draw KL and reward per batch."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    batches = range(len(rows))
    top.plot(batches, [row.kl_k1 for row in rows], marker="o", label="k1")
    top.plot(batches, [row.kl_k3 for row in rows], marker="s", label="k3")
    top.set_ylabel("KL, nats per token")
    top.axhline(0, color="gray", linewidth=0.8)  # k1 may be negative
    top.legend()
    bottom.plot(batches, [row.reward for row in rows], marker="o", color="tab:green")
    bottom.set_ylabel("mean reward")
    bottom.set_ylim(0, 1.05)
    bottom.set_xlabel("batch")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    top.set_title("policy against reference")
    figure.savefig(path, dpi=120)
    return path


def print_updates(rows: Sequence[UpdateRow], console: Console) -> None:
    """Print one line per update; of many updates every so many-th, and the last."""
    table = Table(title="GRPO: KL(policy || reference) per response token, nats")
    for name in ("policy", "reward", "KL k1", "KL k3", "staleness", "mismatch", "|KL - float64|"):
        table.add_column(name, justify="right")
    every = max(1, len(rows) // 15)
    for i, row in enumerate(rows):
        if i % every and i + 1 < len(rows):
            continue
        table.add_row(
            f"v{row.policy_version}",
            f"{row.collected.reward:.3f}",
            f"{row.collected.kl_k1:.4f}",
            f"{row.collected.kl_k3:.4f}",
            f"{row.staleness:.2f}",
            f"{row.mismatch:.1e}",
            f"{row.collected.max_abs_err:.1e}",
        )
    console.print(table)


def plot_training(path: Path, rows: Sequence[UpdateRow]) -> Path:
    """Draw reward, KL, staleness and mismatch per update."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 6), layout="constrained")
    (reward, kl), (staleness, error) = figure.subplots(2, 2, sharex=True)
    updates = [row.policy_version for row in rows]
    reward.plot(updates, [row.collected.reward for row in rows], marker="o", markersize=3, color="tab:green")
    reward.set_ylabel("mean reward")
    kl.plot(updates, [row.collected.kl_k1 for row in rows], marker="o", markersize=3, label="k1")
    kl.plot(updates, [row.collected.kl_k3 for row in rows], marker="s", markersize=3, label="k3")
    kl.axhline(0, color="gray", linewidth=0.8)  # k1 may be negative
    kl.set_ylabel("KL to the reference, nats per token")
    kl.legend()
    staleness.step(updates, [row.staleness for row in rows], where="mid", color="tab:purple")
    staleness.set_ylabel("staleness trained on, versions")
    staleness.set_ylim(bottom=0)
    error.semilogy(updates, [row.mismatch for row in rows], marker="o", markersize=3, color="tab:red")
    error.set_ylabel("sampler against trainer:\ntoken_mult_prob_error - 1")
    for axes in (staleness, error):
        axes.set_xlabel("version of the policy")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (reward, kl, staleness, error):
        axes.grid(alpha=0.3)
    figure.suptitle("GRPO: a policy that moves, a reference that does not")
    figure.savefig(path, dpi=120)
    return path
