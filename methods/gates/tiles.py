"""Parts of a section that give exactly what the whole gives: core cells and all that they receive from (10.3).

The network is a fixed number of hops deep (two with the paper's widths): a core cell's reconstruction needs the cells
from which it receives, directly and over one more cell. A tile holds its core first, then one ring a hop; receivers
in all rings but the last have all their senders, so that their attention is that of the whole graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tenfold.methods.gates.graph import Graph


@dataclass(frozen=True)
class Tile:
    """Core cells with their rings.

    Attributes:
        cells: int64 [n_K], numbers in the section; core first, then ring by ring.
        counts: n_0 <= ... <= n_K: cells up to each ring; n_0 is the core.
        graphs: for each graph local CSR arrays (offsets [n_{K-1} + 1], senders), self loops included.
    """

    cells: np.ndarray
    counts: tuple[int, ...]
    graphs: tuple[tuple[np.ndarray, np.ndarray], ...]


def split_cells(coordinates: np.ndarray, size: int, sections: np.ndarray | None = None) -> list[np.ndarray]:
    """Split cells into compact groups of at most `size` by recursive medians of the wider coordinate.

    Args:
        coordinates: [N, 2 or 3].
        size: most cells of a group.
        sections: [N] numbers; groups do not mix sections.

    Returns:
        Groups of cell numbers, each ascending.
    """
    waiting = [np.arange(len(coordinates))]
    if sections is not None:
        waiting = [np.flatnonzero(sections == section) for section in np.unique(sections)]
    done = []
    while waiting:
        cells = waiting.pop()
        if len(cells) <= size:
            done.append(np.sort(cells))
            continue
        places = coordinates[cells]
        axis = int(np.argmax(places.max(axis=0) - places.min(axis=0)))
        order = cells[np.argsort(places[:, axis], kind="stable")]
        waiting += [order[: len(order) // 2], order[len(order) // 2 :]]
    return sorted(done, key=lambda cells: int(cells[0]))


def whole(graphs: Sequence[Graph], hops: int) -> Tile:
    """Return the whole section as one tile; `graphs` without self loops."""
    number = graphs[0].num_nodes
    looped = [graph.with_self_loops() for graph in graphs]
    arrays = tuple((graph.offsets, graph.senders) for graph in looped)
    return Tile(np.arange(number), (number,) * (hops + 1), arrays)


def cut_tile(
    graphs: Sequence[Graph],
    core: np.ndarray,
    hops: int,
    *,
    fanout: Sequence[int] | None = None,
    generator: np.random.Generator | None = None,
) -> Tile:
    """Cut a tile out of graphs with self loops.

    Args:
        graphs: each [N], self loops included.
        core: cells of the core.
        hops: K.
        fanout: most senders of a cell in each graph, its self loop not counted; they are drawn anew for every ring.
            Attention is then a softmax over those that are kept. None keeps all: exact.
        generator: for `fanout`.
    """
    cells, counts = np.asarray(core, dtype=np.int64), [len(core)]
    place = np.full(graphs[0].num_nodes, -1, dtype=np.int64)
    place[cells] = np.arange(len(cells))
    kept: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in graphs]
    begin = 0
    for _ in range(hops):
        ring = cells[begin:]
        begin = len(cells)
        found = []
        for index, graph in enumerate(graphs):
            limit = None if fanout is None else fanout[min(index, len(fanout) - 1)]
            sizes, senders = _senders(graph, ring, limit, generator)
            kept[index].append((sizes, senders))
            found.append(senders)
        new = np.unique(np.concatenate(found))
        new = new[place[new] < 0]
        place[new] = np.arange(len(cells), len(cells) + len(new))
        cells = np.concatenate([cells, new])
        counts.append(len(cells))
    arrays = []
    for parts in kept:
        sizes = np.concatenate([part[0] for part in parts])
        local = place[np.concatenate([part[1] for part in parts])]
        arrays.append((np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), local))
    return Tile(cells, tuple(counts), tuple(arrays))


def _senders(
    graph: Graph, ring: np.ndarray, limit: int | None, generator: np.random.Generator | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of senders of each cell of a ring, and all of them one after another."""
    sizes = np.diff(graph.offsets)[ring]
    starts = np.repeat(graph.offsets[ring] - np.concatenate([[0], np.cumsum(sizes)[:-1]]), sizes)
    edges = starts + np.arange(int(sizes.sum()))
    senders = graph.senders[edges]
    if limit is None:
        return sizes, senders
    assert generator is not None
    rows = np.repeat(np.arange(len(ring)), sizes)
    # the self loop comes first, the others in random order
    order = np.lexsort((generator.random(len(edges)), senders != ring[rows], rows))
    rank = np.arange(len(edges)) - np.repeat(np.concatenate([[0], np.cumsum(sizes)[:-1]]), sizes)
    chosen = order[rank <= limit]
    return np.minimum(sizes, limit + 1), senders[np.sort(chosen)]


def parts_for(coordinates: np.ndarray, number: int, sections: np.ndarray | None = None) -> list[np.ndarray]:
    """Split cells into exactly `number` compact groups of nearly equal size, for as many workers.

    As in `split_cells`, but a group is cut in the ratio of the parts that it is to give, and between sections first.
    """
    waiting = [(np.arange(len(coordinates)), number)]
    done = []
    while waiting:
        cells, parts = waiting.pop()
        if parts == 1:
            done.append(np.sort(cells))
            continue
        places = coordinates[cells]
        along = places[:, int(np.argmax(np.ptp(places, axis=0)))] if len(cells) else np.empty(0)
        if sections is not None and len(np.unique(sections[cells])) > 1:
            along = sections[cells]
        cells = cells[np.argsort(along, kind="stable")]
        cut = len(cells) * (parts // 2) // parts
        waiting += [(cells[:cut], parts // 2), (cells[cut:], parts - parts // 2)]
    return done
