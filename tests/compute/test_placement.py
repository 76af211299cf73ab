"""Plans: nothing over what is free, everything somewhere, and errors that say what to do."""

from collections.abc import Callable
from contextlib import suppress
from itertools import combinations_with_replacement, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemloom.compute.placement import CellChoice, Placement, Sizes, Space, Wishes, plan
from gemloom.errors import DeviceError
from gemloom.models.layout import Role, Roles

MIB = 1 << 20
TIED: Roles = {
    "token_embd.weight": Role.TABLE,
    "per_layer_token_embd.weight": Role.PER_LAYER_TABLE,
    "output_norm.weight": Role.FINAL,
    "rope_freqs.weight": Role.SHARED,
}
UNTIED = {**TIED, "output.weight": Role.HEAD}
CHOICES = [
    CellChoice(8192, "f16"),
    CellChoice(4096, "f16"),
    CellChoice(8192, "q8_0"),
    CellChoice(4096, "q8_0"),
]
sizes_of_mib = st.integers(0, 400).map(lambda n: n * MIB)


def sizes_for(
    layers: tuple[int, ...], cells: int, readers: int = 0, **more: int
) -> Callable[[CellChoice], Sizes]:
    """Sizes by choice: cells grow with the context and the bytes of the type.

    The last ``readers`` layers read by turns the cells of the two before them.
    """
    own = len(layers) - readers

    def sizes(choice: CellChoice) -> Sizes:
        each = cells * choice.context // 8192 * (2 if choice.kv_type == "f16" else 1)
        kinds = {
            "head": 100 * MIB,
            "shared": MIB,
            "tables": 300 * MIB,
            "compute": 50 * MIB,
            "inputs": 20 * MIB,
        }
        owners = (*range(own), *(max(0, own - 1 - i % 2) for i in range(readers)))
        held = (each,) * own + (0,) * readers
        return Sizes(layers=layers, cells=held, owners=owners, **(kinds | more))

    return sizes


@st.composite
def cases(draw: st.DrawFn) -> tuple[object, list[Space], Wishes]:
    layers = tuple(draw(st.lists(sizes_of_mib, min_size=1, max_size=12)))
    frees = draw(st.lists(st.integers(0, 4000), max_size=3))
    spaces = [Space(f"gpu{i}", free * MIB, free * MIB) for i, free in enumerate(frees)]
    spaces.append(Space("cpu", draw(st.sampled_from([None, 300 * MIB, 20_000 * MIB]))))
    count = draw(st.none() | st.integers(0, len(layers) + 1))
    insists = count is None and draw(st.booleans())
    readers = draw(st.integers(0, len(layers) - 1))
    sizes = sizes_for(layers, draw(sizes_of_mib), readers, head=draw(sizes_of_mib))
    return sizes, spaces, Wishes(count, None, insists)


def attempt(case: tuple, roles: Roles = TIED) -> Placement | None:
    sizes, spaces, wanted = case
    with suppress(DeviceError):
        return plan(sizes, CHOICES, spaces, wanted, roles)
    with pytest.raises(DeviceError, match=r"^no memory for [^\n]* needs [^\n]*$"):
        plan(sizes, CHOICES, spaces, wanted, roles)
    return None


@given(cases())
def test_nothing_is_over_what_is_free(case: tuple) -> None:
    sizes, spaces, wanted = case
    if (placed := attempt(case)) is None:
        return
    size, host = sizes(placed.choice), len(spaces) - 1
    for use, space in zip(placed.table, spaces, strict=True):
        if use.layers and use.name != "cpu":
            assert use.total <= space.usable
    assert len(placed.layers) == len(size.layers)
    assert sum(use.kv for use in placed.table) == sum(size.cells)
    shared = sum(size.shared for _ in set(placed.layers))
    weights = sum(size.layers) + size.head + size.tables + shared
    assert sum(use.weights for use in placed.table) == weights
    if wanted.gpu_layers is not None and host:
        moved = [index for index in placed.layers if index != host]
        assert len(moved) == min(wanted.gpu_layers, len(size.layers))


@given(cases())
def test_devices_hold_one_run_of_the_last_layers_in_order(case: tuple) -> None:
    if (placed := attempt(case)) is None:
        return
    first = next((i for i, at in enumerate(placed.layers) if at != placed.host), None)
    if first is None:
        assert placed.head == placed.host and placed.on_host
        return
    moved = placed.layers[first:]
    assert placed.host not in moved and all(a <= b for a, b in pairwise(moved))
    assert placed.head == moved[-1]
    runs = list(placed.runs(0, len(placed.layers)))
    assert [i for index, start, stop in runs for i in [index] * (stop - start)] == list(
        placed.layers
    )


def parted(size: Sizes, layers: tuple[int, ...], cells: tuple[int, ...]) -> int:
    """Layers that read cells which lie elsewhere."""
    return sum(at != cells[owner] for at, owner in zip(layers, size.owners, strict=True))


@given(cases())
def test_layers_are_beside_the_cells_they_read_where_that_fits(case: tuple) -> None:
    """Against every way to cut the same layers in as many runs as there are devices."""
    sizes, spaces, _ = case
    if (placed := attempt(case)) is None or placed.on_host:
        return
    size, host = sizes(placed.choice), placed.host
    first = placed.layers.index(next(at for at in placed.layers if at != host))
    n = len(placed.layers)
    fewest = sum(first <= i and size.owners[i] < first for i in range(n))  # the host has the cells
    for cuts in combinations_with_replacement(range(first, n + 1), host - 1):
        bounds = [first, *cuts, n]
        runs = [[i] * (b - a) for i, (a, b) in enumerate(pairwise(bounds))]
        layers = (host,) * first + tuple(at for run in runs for at in run)
        if parted(size, layers, layers) == fewest and fits(size, layers, spaces):
            assert parted(size, placed.layers, placed.cells) == fewest
            return


def fits(size: Sizes, layers: tuple[int, ...], spaces: list[Space]) -> bool:
    for index, space in enumerate(spaces[:-1]):
        own = [i for i, at in enumerate(layers) if at == index]
        needed = sum(size.layers[i] + size.cells[i] for i in own) + size.shared + size.compute
        if own and needed + size.head * (layers[-1] == index) > space.usable:
            return False
    return True


def test_a_cut_moves_to_before_the_owners_of_cells() -> None:
    """As on E2B: 15 layers with cells of their own, 20 that read those of the last two."""
    spaces = [Space("a", 4000 * MIB), Space("b", 4000 * MIB), Space("cpu", None)]
    sizes = sizes_for((20 * MIB,) * 35, MIB, 20)
    placed = plan(sizes, CHOICES, spaces, Wishes(None, None, False), TIED)
    assert placed.layers == (0,) * 13 + (1,) * 22
    # What was asked for is not changed, nor where it would not fit.
    asked = plan(sizes, CHOICES, spaces, Wishes(None, (1, 1), False), TIED)
    assert 16 <= asked.layers.count(0) <= 22
    small = [Space("a", 800 * MIB), Space("b", 620 * MIB), Space("cpu", None)]
    assert plan(sizes, CHOICES, small, Wishes(None, None, False), TIED).layers.count(0) > 13
    swapped = [small[1], small[0], small[2]]
    more = plan(sizes, CHOICES, swapped, Wishes(None, None, False), TIED)
    assert more.layers.count(0) == 13


@given(cases())
def test_more_free_memory_never_moves_fewer_layers(case: tuple) -> None:
    sizes, spaces, wanted = case
    wider = [
        Space(space.name, None if space.free is None else 2 * space.free, space.total)
        for space in spaces
    ]
    small, large = attempt(case), attempt((sizes, wider, wanted))
    if small is None:
        return
    assert large is not None
    before, after = CHOICES.index(small.choice), CHOICES.index(large.choice)
    count = sum(at != small.host for at in small.layers)
    assert after < before or sum(at != large.host for at in large.layers) >= count


def test_the_tables_stay_and_a_tied_head_is_copied() -> None:
    spaces = [Space("gpu0", 8000 * MIB, 8000 * MIB), Space("cpu", None)]
    placed = plan(sizes_for((MIB,) * 4, MIB), CHOICES, spaces, Wishes(2, None, False), TIED)
    assert placed.layers == (1, 1, 0, 0) and placed.choice == CHOICES[0]
    assert placed.places("token_embd.weight") == (0, 1)
    assert placed.places("per_layer_token_embd.weight") == (1,)
    assert placed.places("rope_freqs.weight") == (0, 1)
    assert placed.places("output_norm.weight") == (0,)
    assert placed.places("blk.0.attn_q.weight") == (1,)
    assert placed.products("token_embd.weight") == (1,)
    untied = plan(sizes_for((MIB,) * 4, MIB), CHOICES, spaces, Wishes(2, None, False), UNTIED)
    assert untied.places("token_embd.weight") == (1,)
    assert untied.places("output.weight") == (0,)


def test_what_is_left_open_gives_way_in_order() -> None:
    """First layers, then context, then the type of K/V cells."""

    def choice(free: int, layers: int | None) -> tuple[int, CellChoice]:
        spaces = [Space("gpu0", free * MIB, 0), Space("cpu", None)]
        sizes = sizes_for((10 * MIB,) * 10, 100 * MIB)
        placed = plan(sizes, CHOICES, spaces, Wishes(layers, None, False), TIED)
        return sum(at == 0 for at in placed.layers), placed.choice

    assert choice(3000, None) == (10, CHOICES[0])
    assert choice(2000, None) == (8, CHOICES[0])
    assert choice(2000, 10) == (10, CHOICES[1])
    with pytest.raises(DeviceError, match=r"gpu0 needs 751 MiB .* 372 can be used; .*gpu_layers"):
        choice(500, 10)


def test_shares_are_of_bytes() -> None:
    spaces = [Space("gpu0", None), Space("gpu1", None), Space("cpu", None)]
    sizes = sizes_for((100 * MIB,) * 10, 0, head=0)
    placed = plan(sizes, CHOICES, spaces, Wishes(10, (3, 1), False), TIED)
    assert placed.layers.count(0) in (7, 8)
    one = plan(sizes, CHOICES, spaces, Wishes(10, (0, 1), False), TIED)
    assert set(one.layers) == {1}


def test_a_named_device_is_not_passed_over_in_silence() -> None:
    spaces = [Space("gpu0", 100 * MIB, 0), Space("cpu", None)]
    sizes = sizes_for((200 * MIB,) * 3, MIB)
    assert plan(sizes, CHOICES, spaces, Wishes(None, None, False), TIED).on_host
    with pytest.raises(DeviceError, match="gpu0 needs"):
        plan(sizes, CHOICES, spaces, Wishes(None, None, True), TIED)
