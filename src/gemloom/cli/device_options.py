"""Which device holds what, for people and programs: the plan made before a model is loaded."""

from typing import TYPE_CHECKING, Any

from gemloom.cli.terminal import size, table

if TYPE_CHECKING:
    from rich.table import Table

    from gemloom.compute.placement import Placement


def plan_facts(placement: "Placement") -> dict[str, Any]:
    """A plan as JSON can hold it."""
    return {
        "context": placement.choice.context,
        "kv_type": placement.choice.kv_type,
        "layers": [placement.table[index].name for index in placement.layers],
        "head": placement.table[placement.head].name,
        "kept_on_host": placement.stranded,
        "devices": [
            {
                "name": use.name, "layers": use.layers, "weights": use.weights, "kv": use.kv,
                "compute": use.compute, "total": use.total, "free": use.free,
            }
            for use in placement.table
        ],
    }  # fmt: skip


def plan_table(placement: "Placement") -> "Table":
    """A plan for a terminal: bytes by device and kind."""
    made = table("device", ">layers", ">weights", ">K/V", ">compute", ">all", ">free")
    for use in placement.table:
        sizes = (use.weights, use.kv, use.compute, use.total)
        free = "?" if use.free is None else size(use.free)
        made.add_row(use.name, str(use.layers), *map(size, sizes), free)
    choice = placement.choice
    made.caption = f"context {choice.context:,}, K/V cells {choice.kv_type}"
    if kept := placement.stranded:
        made.caption += f"; {len(kept)} matrices of these layers stay on the CPU: {kept[0]} ..."
    made.caption_justify = "left"
    return made
