"""Plans which device holds which part of a model, before loading. Pure: bytes in, plan out.

A device is an index into the requested devices, in their order; the index after the last is the
host. Devices get the head and the last layers, as one run: the first device has the first of
them, and the head goes with the last layer. A step reads only some rows of the token embeddings
and of the per-layer table, so these stay on the host. If the head is the same matrix, its device
has a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise, repeat

from gemloom.errors import OutOfMemoryError
from gemloom.models.layout import Role, Roles, head_of
from gemloom.models.tensor_names import HEAD, layer_of

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Space:
    """A device or the host before loading."""

    name: str
    free: int | None  # bytes; None if unknown
    total: int = 0
    limiter: str = ""  # what sets the total, if known

    @property
    def usable(self) -> int | None:
        """Bytes the plan may use: drivers need some memory, and more than they report."""
        if self.free is None:
            return None
        return max(0, self.free - min(max(self.total // 20, 128 * _MIB), 1024 * _MIB))


@dataclass(frozen=True, slots=True)
class OnHost:
    """Bytes of the host's memory that are not pages of a file."""

    layers: tuple[int, ...] = ()  # of each layer's weights, if it is on the host; (): none
    head: int = 0  # of the head, if it is on the host
    tables: int = 0
    tokenizer: int = 0  # while it is built, at the same time as weights are packed


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Bytes that a model needs with one context and one type of K/V cells."""

    layers: tuple[int, ...]  # weights of each
    cells: tuple[int, ...]  # K/V cells of each; 0 where it reads another's
    head: int  # the matrix and the norm before it
    shared: int  # tensors that every device with layers has
    tables: int  # of which rows are read, always on the host
    compute: int  # for intermediate results, where layers run
    inputs: int  # for the inputs, on a host without layers and cells
    duplicate: int = 0  # bytes of the head that the host has too, among its tables
    on_host: OnHost = OnHost()
    moves: tuple[bool, ...] = ()  # whether devices can compute with each layer's cells; (): all
    owners: tuple[int, ...] = ()  # the layer whose cells each layer reads; (): its own

    def cells_move(self, layer: int) -> bool:
        """Whether a layer's K/V cells may be on the device that runs it."""
        return not self.moves or self.moves[layer]


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user asked for."""

    gpu_layers: int | None  # None: as many as fit
    split: tuple[float, ...] | None  # None: by free memory
    insists: bool  # on a device: an error if nothing fits there


@dataclass(frozen=True, slots=True)
class CellChoice:
    """A context and a type of the cells."""

    context: int
    kv_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """Bytes on one device, by kind."""

    name: str
    layers: int
    weights: int
    kv: int
    compute: int
    free: int | None
    own: int  # weights that are not pages of a file
    tokenizer: int = 0  # on the host

    @property
    def needed(self) -> int:
        """Bytes that must be free for it."""
        return self.own + self.kv + self.compute + self.tokenizer

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return self.weights + self.kv + self.compute


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where everything goes."""

    layers: tuple[int, ...]  # the device of each
    head: int
    host: int  # index of the host
    choice: CellChoice
    table: tuple[Use, ...]  # a row a device, the host's last
    roles: Roles  # of the tensors outside the layers
    cells: tuple[int, ...]  # where the K/V cells of each layer are
    kept: frozenset[str] = frozenset()  # matrices that devices cannot multiply with

    @property
    def on_host(self) -> bool:
        """Whether all is on the host."""
        return all(index == self.host for index in (*self.layers, self.head))

    @property
    def stranded(self) -> list[str]:
        """The matrices that stay on the host although layers on devices need them."""
        return sorted(name for name in self.kept if set(self._users(name)) != {self.host})

    def places(self, name: str) -> tuple[int, ...]:
        """The devices that hold a tensor of this name, the host last."""
        return (self.host,) if name in self.kept else self._users(name)

    def _users(self, name: str) -> tuple[int, ...]:
        if (layer := layer_of(name)) is not None:
            return (self.layers[layer],)
        if self.by_row(name):
            copy = name == head_of(self.roles) and self.head != self.host
            return (self.head, self.host) if copy else (self.host,)
        if self.roles.get(name) is Role.SHARED:
            return tuple(sorted(set(self.layers)))
        return (self.head,)

    def by_row(self, name: str) -> bool:
        """Whether rows of a tensor are read, which the host does."""
        role = self.roles.get(name)
        return role is not None and role.by_row

    def products(self, name: str) -> tuple[int, ...]:
        """The devices on which products with a tensor run, or its rows are read."""
        if self.by_row(name):
            return (self.host,)
        return (self.logits,) if name == HEAD else self.places(name)

    @property
    def logits(self) -> int:
        """The device on which the logits are made."""
        return self.places(head_of(self.roles))[0]

    def runs(self, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The layers from ``first`` to ``stop`` in runs on one device: its index, first, stop."""
        start = first
        for i in range(first, stop):
            if i + 1 == stop or self.layers[i + 1] != self.layers[start]:
                yield self.layers[start], start, i + 1
                start = i + 1


def plan(
    sizes: Callable[[CellChoice], Sizes],
    choices: Sequence[CellChoice],
    spaces: Sequence[Space],
    wanted: Wishes,
    roles: Roles,
    kept: frozenset[str] = frozenset(),
) -> Placement:
    """Place a model by the first of ``choices`` that fits; ``spaces`` are the devices and the host.

    If ``wanted.gpu_layers`` is None, as many layers go to devices as fit. OutOfMemoryError if no
    choice fits.
    """
    problem = ""
    for choice in choices:
        found = _fit(sizes(choice), choice, spaces, wanted, roles)
        if isinstance(found, Placement):
            return replace(found, kept=kept)
        problem = found  # that of the last one, which asks for least
    raise OutOfMemoryError(problem)


def _fit(
    sizes: Sizes, choice: CellChoice, spaces: Sequence[Space], wanted: Wishes, roles: Roles
) -> Placement | str:
    """A placement, or the reason why there is none."""
    n, host = len(sizes.layers), len(spaces) - 1
    most = n if wanted.gpu_layers is None else min(n, wanted.gpu_layers)
    least = most if wanted.gpu_layers is not None else int(wanted.insists)
    problem = ""
    for count in range(most if host else 0, (least if host else 0) - 1, -1):
        for layers in _splits(sizes, count, spaces, wanted):
            head = layers[-1] if count else host
            cells = tuple(at if sizes.cells_move(i) else host for i, at in enumerate(layers))
            table = tuple(_table(sizes, layers, cells, head, spaces))
            lacking = _lacking(table, spaces)
            if lacking is None:
                return Placement(
                    layers=layers,
                    head=head,
                    host=host,
                    choice=choice,
                    table=table,
                    roles=roles,
                    cells=cells,
                )
            problem = _problem(*lacking, count if host else 0, choice)
    return problem


def _splits(
    sizes: Sizes, count: int, spaces: Sequence[Space], wanted: Wishes
) -> Iterator[tuple[int, ...]]:
    """Ways to give the last ``count`` layers to the devices, best first.

    First by shares, then by filling one device after another. First with layers beside the layer
    whose cells they read, then without. If the user gave shares, only those are tried.
    """
    n, host = len(sizes.layers), len(spaces) - 1
    first = n - count
    here = (host,) * first
    if not count:
        yield here
        return
    each = [sizes.layers[i] + sizes.cells[i] * sizes.cells_move(i) for i in range(first, n)]
    each[-1] += sizes.head
    devices = spaces[:host]
    shares = wanted.split or tuple(float(space.usable or 0) for space in devices)
    if not sum(shares):
        shares = (1.0,) * host
    if wanted.split is not None or host == 1:
        yield here + _by_share(each, shares)
        return
    rooms = [_room(space, sizes) for space in devices]
    for starts in (_cuts(sizes, first), range(first, n)):
        lengths = [b - a for a, b in pairwise((*starts, n))]
        sums = [sum(each[a - first : b - first]) for a, b in pairwise((*starts, n))]
        for chosen in (_by_share(sums, shares), _filling(sums, rooms)):
            yield here + tuple(chain.from_iterable(map(repeat, chosen, lengths)))


def _cuts(sizes: Sizes, first: int) -> list[int]:
    """Layers from ``first`` on where a cut parts no layer from the cells it reads."""
    n = len(sizes.layers)
    owners = [i if first <= i and sizes.cells_move(i) else n for i in sizes.owners or range(n)]
    return [i for i in range(first, n) if min(owners[i:]) >= i]


def _room(space: Space, sizes: Sizes) -> float:
    return float("inf") if space.usable is None else space.usable - sizes.shared - sizes.compute


def _by_share(each: Sequence[int], shares: Sequence[float]) -> tuple[int, ...]:
    """Lay the devices' shares end to end; each layer goes where its middle lies."""
    bounds = list(accumulate(share / sum(shares) for share in shares))
    last = max(i for i, share in enumerate(shares) if share)
    total, before, layers = sum(each) or 1, 0.0, []
    for size in each:
        middle = (before + size / 2) / total
        layers.append(next((i for i, bound in enumerate(bounds) if middle < bound), last))
        before += size
    return tuple(layers)


def _filling(each: Sequence[int], rooms: Sequence[float]) -> tuple[int, ...]:
    """Fill one device after another; the last takes the rest."""
    left, index, layers = list(rooms), 0, []
    for size in each:
        while index < len(left) - 1 and size > left[index]:
            index += 1
        left[index] -= size
        layers.append(index)
    return tuple(layers)


def _table(
    sizes: Sizes, layers: Sequence[int], cells: Sequence[int], head: int, spaces: Sequence[Space]
) -> Iterator[Use]:
    host = len(spaces) - 1
    for index, space in enumerate(spaces):
        own = [i for i, device in enumerate(layers) if device == index]
        weights = sum(sizes.layers[i] for i in own) + (sizes.shared if own else 0)
        weights += sizes.head if index == head else 0
        weights += sizes.tables - (sizes.duplicate if head == host else 0) if index == host else 0
        kv = sum(size for size, at in zip(sizes.cells, cells, strict=True) if at == index)
        idle = sizes.inputs if index == host else 0
        compute = sizes.compute if own or kv else idle
        held, tokenizer = _held(sizes, own, head == host) if index == host else (weights, 0)
        yield Use(
            name=space.name,
            layers=len(own),
            weights=weights,
            kv=kv,
            compute=compute,
            free=space.free,
            own=held,
            tokenizer=tokenizer,
        )


def _held(sizes: Sizes, layers: Sequence[int], head: bool) -> tuple[int, int]:
    """Bytes of the host's own memory for the weights and for the tokenizer."""
    own, each = sizes.on_host, sizes.on_host.layers or (0,) * len(sizes.layers)
    weights = sum(each[i] for i in layers) + own.tables + (own.head if head else 0)
    return weights, own.tokenizer


def _lacking(table: Sequence[Use], spaces: Sequence[Space]) -> tuple[Use, Space] | None:
    """The first device without enough memory."""
    for use, space in zip(table, spaces, strict=True):
        on_host = space is spaces[-1]
        usable = space.free if on_host else space.usable
        if usable is not None and use.needed > usable and (use.layers or on_host):
            return use, space
    return None


def _problem(use: Use, space: Space, moved: int, choice: CellChoice) -> str:
    """One line: the need, the limit and a remedy. ``moved`` counts the layers on devices."""
    what = f"{moved} layers and the head on devices" if moved else "the model"
    kinds = [f"{use.own / _MIB:,.0f} of weights"]
    kinds += [f"{use.tokenizer / _MIB:,.0f} of tokenizer"] if use.tokenizer else []
    kinds.append(
        f"{use.kv / _MIB:,.0f} of K/V cells for a context of {choice.context:,} in {choice.kv_type}"
    )
    kinds.append(f"{use.compute / _MIB:,.0f} to compute")
    usable = (space.free if space.limiter else space.usable) or 0
    limit = f" of {space.total / _MIB:,.0f} ({space.limiter})" if space.limiter else ""
    ways = ["fewer gpu_layers"] if moved else []
    ways += ["a smaller context or chunk", *(["kv_type q8_0"] if choice.kv_type != "q8_0" else [])]
    ways += [] if moved else ["a smaller file"]
    return (
        f"no memory for {what}: {use.name} needs {use.needed / _MIB:,.0f} MiB "
        f"({', '.join(kinds)}), {usable / _MIB:,.0f}{limit} can be used; "
        f"take {', '.join(ways[:-1])} or {ways[-1]}"
    )
