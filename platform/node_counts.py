"""How many nodes a cluster has over time: asked of its dashboard, said when it changes, kept as JSON and as a plot.

Only the dashboard's address is needed, which `ray dashboard` or an SSH tunnel brings to any machine.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tenfold.platform.errors import ClusterError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NODE_GROUP = "ray.io/node-group"  # Ray's label with the node type; nodes that nobody launched have none
ANSWER_SECONDS = 30
MAX_NODES = 10_000
LOOK_SECONDS = 2.0
ATTEMPTS = 3
RETRY_SECONDS = 2.0


@dataclass(frozen=True)
class NodeCount:
    """Worker nodes that are alive, so many seconds after the record began.

    Attributes:
        seconds: since the record began.
        nodes: number of nodes by node type; types without nodes are left out. The head is not counted.
    """

    seconds: float
    nodes: dict[str, int]

    @property
    def total(self) -> int:
        """Number of worker nodes of all types."""
        return sum(self.nodes.values())


@dataclass(frozen=True)
class Event:
    """Something that happened meanwhile, to be seen in the plot."""

    seconds: float
    text: str


def node_types(address: str) -> dict[str, str]:
    """Return {node id: node type} of a cluster's worker nodes that are alive.

    Args:
        address: the dashboard's, such as http://127.0.0.1:8265.

    Raises:
        ClusterError: it does not answer, or refuses us.
    """
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    try:
        # Filtered here: with a filter of Ray's, a node that dies meanwhile is an answer "truncated".
        found = list_nodes(address, limit=MAX_NODES, timeout=ANSWER_SECONDS, raise_on_missing_output=False)
    except (RayStateApiException, OSError) as error:
        raise ClusterError(
            f"dashboard {address}: {' '.join(str(error).split())[:300]}. Give the dashboard's address (`ray dashboard "
            f"cluster.yaml` brings it to http://127.0.0.1:8265); for a cluster with token authentication set "
            f"RAY_AUTH_MODE=token and have its token in ~/.ray/auth_token"
        ) from error
    workers = [node for node in found if node.state == "ALIVE" and not node.is_head_node]
    return {node.node_id: (node.labels or {}).get(NODE_GROUP) or "worker" for node in workers}


class NodeRecord:
    """A cluster's node counts from now on; only changes are kept."""

    def __init__(self, address: str, say: Callable[[str], None]) -> None:
        """Begin a record.

        Args:
            address: the dashboard's.
            say: gets one line for every change and event.
        """
        self.address = address
        self.counts: list[NodeCount] = []
        self.events: list[Event] = []
        self.types: dict[str, str] = {}  # {node id: node type} of all worker nodes that were seen
        self.seconds = 0.0  # of the newest look or event
        self._say = say
        self._begin = time.monotonic()
        self._started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

    def look(self) -> NodeCount:
        """Ask the cluster once and return what it has now.

        Raises:
            ClusterError: the dashboard does not answer.
        """
        found = self._ask()
        self.types |= found
        nodes = dict(sorted(Counter(found.values()).items()))
        now = NodeCount(self._now(), nodes)
        if not self.counts or self.counts[-1].nodes != nodes:
            self.counts.append(now)
            kinds = ", ".join(f"{count} {name}" for name, count in nodes.items())
            self._say(f"{now.seconds:6.1f} s  {now.total} worker node(s){': ' + kinds if kinds else ''}")
        return now

    def mark(self, text: str) -> None:
        """Keep that something happened now."""
        self.events.append(Event(self._now(), text))
        self._say(f"{self.seconds:6.1f} s  {text}")

    def save(self, folder: Path) -> tuple[Path, Path]:
        """Write nodes.json and nodes.png; returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        data, picture = folder / "nodes.json", folder / "nodes.png"
        content = {
            "started": self._started,
            "seconds": self.seconds,
            "counts": [asdict(count) for count in self.counts],
            "events": [asdict(event) for event in self.events],
        }
        data.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        figure(self.counts, self.events, self.seconds).savefig(picture, dpi=150)
        return data, picture

    def keep_looking(self, folder: Path, interval_s: float = LOOK_SECONDS) -> tuple[Path, Path]:
        """Look until Ctrl-C, then save to `folder`; also when the cluster goes away.

        Raises:
            ClusterError: the dashboard does not answer, or no longer.
        """
        try:
            while True:
                self.look()
                time.sleep(interval_s)
        except KeyboardInterrupt:
            return self.save(folder)
        except ClusterError:
            if self.counts:
                self.save(folder)
            raise

    def _ask(self) -> dict[str, str]:
        """Ask again when there is no answer: a head with much to do is not a cluster that is gone."""
        for _ in range(ATTEMPTS - 1):
            with contextlib.suppress(ClusterError):
                return node_types(self.address)
            time.sleep(RETRY_SECONDS)
        return node_types(self.address)

    def _now(self) -> float:
        self.seconds = round(time.monotonic() - self._begin, 1)
        return self.seconds


def figure(counts: list[NodeCount], events: list[Event], seconds: float) -> Figure:
    """Draw node counts as areas on each other, one for a node type, with events as vertical lines.

    Args:
        counts: changes, in order of time.
        events: what happened.
        seconds: end of the time axis.
    """
    from matplotlib.ticker import MaxNLocator
    from tenfold.platform.figures import new_figure

    drawn = new_figure(9, 4)
    axes = drawn.add_subplot()
    kinds = list(
        dict.fromkeys(name for count in counts for name in count.nodes)
    )  # whoever came first is at the bottom
    times = [count.seconds for count in counts] + [seconds]
    levels = [[count.nodes.get(kind, 0) for count in counts] for kind in kinds]
    levels = [[*level, level[-1]] for level in levels]
    if kinds:
        axes.stackplot(times, levels, labels=kinds, step="post", alpha=0.75)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), title="node type", frameon=False)
    most = max((count.total for count in counts), default=0)
    for event in events:
        axes.axvline(event.seconds, color="black", linewidth=1, linestyle="--")
        axes.annotate(
            event.text, (event.seconds, most + 0.9), xytext=(4, 0), textcoords="offset points", rotation=90, va="top"
        )
    axes.set_xlim(0, max(seconds, 1) * 1.04)
    axes.set_ylim(0, most + 1)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("seconds")
    axes.set_ylabel("worker nodes")
    return drawn
