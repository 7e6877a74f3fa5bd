"""GATES: how good its domains are beside its competitors', and what it costs by the number of cells.

Quality: adjusted Rand index on labelled cells, raw and refined by the vote of neighbours, mean and sample deviation
over seeds. `gates` and `stagate` have the settings of the published scripts (500 epochs at 1e-4, k 7), `smoothed` sees
an input averaged over neighbours. What we recommend, `gates` with refined labels, is the best of ours on the sections
CHOSEN_ON, and only reported on the others. Without --folder the packaged section and a synthetic one are measured;
--folder takes every .h5ad with obs["domain"] in a folder, one section for each value of obs["sample"] where that is
there.

Scale: each number of cells has a process of its own. Synthetic sections with 3,000 genes; seconds to build the graphs,
seconds an epoch (median), peak resident memory. At the smallest size the same model is written plainly as well: dense
expression, dense N x N attention.

    python benchmarks/spatial.py --quick
    python benchmarks/spatial.py --folder SECTIONS --seeds 5 --json spatial.json
    python benchmarks/spatial.py --parts scale --cells 5000 20000 50000 100000 200000
"""

import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from reporting import Report, Target, argument_parser, median

SMOOTHED = {"smooth_input": 2, "learning_rate": 3e-3, "epochs": 300, "alpha": 0.1}
RECOMMENDED = "gates, refined"
CHOSEN_ON = ("starmap_mpfc_3samples BZ5", "dlpfc_151510_svg500")
PUBLISHED = {"expression_graph": {"k": 7}}
METHODS: dict[str, dict[str, Any]] = {
    "gates": {"method": "gates", **PUBLISHED},
    "stagate": {"method": "stagate"},
    "smoothed": {"method": "gates", **SMOOTHED},
    "spatial_pca": {"method": "spatial_pca"},
    "pca_gmm": {"method": "pca_gmm"},
    "pca_leiden": {"method": "pca_leiden"},
    "spagcn": {"method": "spagcn"},
}
OURS = ("gates", "smoothed", "stagate")
QUICK_METHODS = ("gates", "spatial_pca", "pca_gmm")
EPOCHS = 5
GENES = 3000
PLAIN_AT_MOST = 10_000  # cells; dense attention takes N x N


def sections_of(folder: str | None, quick: bool) -> dict[str, dict[str, Any]]:
    """Return name -> options of a section."""
    if folder is None:
        packaged = {"osmfish_sscortex": {"path": "sample:spatial/osmfish_sscortex.h5ad", "labels": "domain"}}
        synthetic = {"synthetic:1500": {"path": "synthetic:1500", "labels": "domain"}}
        return synthetic if quick else packaged | synthetic
    import anndata

    found: dict[str, dict[str, Any]] = {}
    for path in sorted(Path(folder).glob("*.h5ad")):
        obs = anndata.read_h5ad(path, backed="r").obs
        if "domain" not in obs:
            continue
        for sample in sorted(set(obs["sample"])) if "sample" in obs else [None]:
            section: dict[str, Any] = {"path": str(path), "labels": "domain"}
            if sample is not None:
                section |= {"sample_key": "sample", "samples": [str(sample)]}
            found[path.stem if sample is None else f"{path.stem} {sample}"] = section
    return found


def measure_quality(section: dict[str, Any], options: dict[str, Any], seed: int) -> dict[str, float]:
    """Analyse a section once."""
    from tenfold.methods.gates.analysis import analyse
    from tenfold.methods.gates.config import GATESConfig
    from tenfold.methods.gates.preparing import prepare
    from tenfold.methods.gates.reading import read_sections

    config = GATESConfig.model_validate({"sections": [section], **options, "clustering": {"refine": "majority"}})
    adata = read_sections(config.sections)
    start = time.perf_counter()
    prepared = prepare(adata, config, seed)
    found = analyse(adata, prepared, config, seed, truth=adata.obs["truth"].to_numpy(dtype=object))
    return {
        "ari": found.metrics["ari"],
        "refined": found.metrics["refined_ari"],
        "nmi": found.metrics["nmi"],
        "pas": found.metrics["pas"],
        "seconds": time.perf_counter() - start,
    }


def quality(report: Report, sections: dict[str, dict[str, Any]], methods: list[str], seeds: int) -> None:
    """Measure every method on every section and add rows and targets."""
    means: dict[str, dict[str, float]] = {}
    for name, section in sections.items():
        for method in methods:
            print(f"{name}: {method} ...", file=sys.stderr, flush=True)
            runs = [measure_quality(section, METHODS[method], seed) for seed in range(1, seeds + 1)]
            row: dict[str, Any] = {"section": name, "method": method}
            for key in ("ari", "refined", "nmi", "pas", "seconds"):
                row[key] = statistics.fmean(run[key] for run in runs)
            for key in ("ari", "refined"):
                row[f"{key}_sd"] = statistics.stdev(run[key] for run in runs) if seeds > 1 else None
            means.setdefault(method, {})[name] = row["ari"]
            means.setdefault(f"{method}, refined", {})[name] = row["refined"]
            report.rows.append(row)
    for title, left_out in (("mean", ()), ("mean of the others", CHOSEN_ON)):
        for method, values in means.items():
            kept = [value for section, value in values.items() if section not in left_out]
            if kept and (not left_out or len(kept) < len(values)):
                report.rows.append({"section": title, "method": method, "ari": statistics.fmean(kept)})
    rivals = {name: statistics.fmean(each.values()) for name, each in means.items() if name.split(",")[0] not in OURS}
    if rivals and RECOMMENDED in means:
        best = max(rivals, key=lambda name: rivals[name])
        own = statistics.fmean(means[RECOMMENDED].values())
        reason = f"{RECOMMENDED}; best rival: {best}"
        report.targets.append(Target("recommended_mean_ari", own, rivals[best], at_most=False, reason=reason))


def measure_scale(cells: int, tile_cells: int | None, plain: bool) -> dict[str, Any]:
    """Train a few epochs on a synthetic section; in a process of its own."""
    from tenfold.methods.gates.config import GATESOptions
    from tenfold.methods.gates.fit import fit
    from tenfold.methods.gates.preparing import prepare
    from tenfold.methods.gates.synthetic import synthetic_section

    adata = synthetic_section(cells, GENES)
    config = GATESOptions(epochs=EPOCHS, tile_cells=tile_cells, loss="mse" if tile_cells else "frobenius")
    start = time.perf_counter()
    prepared = prepare(adata, config, 0)
    graphs = time.perf_counter() - start
    del adata
    row: dict[str, Any] = {"cells": cells, "tiles": tile_cells or "whole", "graphs_s": graphs}
    after_graphs = peak_gib()
    marks = [time.perf_counter()]
    fit(
        prepared.expression,
        prepared.graphs,
        config,
        0,
        coordinates=prepared.coordinates,
        progress=lambda *_: marks.append(time.perf_counter()),
    )
    row["epoch_s"] = median([after - before for before, after in itertools.pairwise(marks[1:])])
    row |= {"graphs_gib": after_graphs, "peak_gib": peak_gib()}
    if plain:
        row["plain_epoch_s"] = plain_epoch(prepared)
        row["faster"] = row["plain_epoch_s"] / row["epoch_s"]
    return row


def peak_gib() -> float:
    """Return the largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def plain_epoch(prepared: Any) -> float:
    """Return seconds of an epoch of the same model written plainly: dense expression and dense attention."""
    import torch

    expression = torch.from_numpy(prepared.expression.toarray())
    masks = [torch.from_numpy(graph.with_self_loops().to_matrix().toarray()) > 0 for graph in prepared.graphs]
    hidden, latent = 512, 30
    torch.manual_seed(0)
    first = torch.nn.init.xavier_uniform_(torch.empty(expression.shape[1], hidden)).requires_grad_()
    second = torch.nn.init.xavier_uniform_(torch.empty(hidden, latent)).requires_grad_()
    vectors = [torch.nn.init.xavier_uniform_(torch.empty(hidden, 1)).requires_grad_() for _ in range(4)]
    adam = torch.optim.Adam([first, second, *vectors], lr=1e-4)

    def attention(mixed: Any, mask: Any, receiver: Any, sender: Any) -> Any:
        scores = torch.sigmoid(mixed @ receiver + (mixed @ sender).T)
        return torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=1)

    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        mixed = expression @ first
        fused = 0.99 * attention(mixed, masks[0], *vectors[:2]) + 0.01 * attention(mixed, masks[1], *vectors[2:])
        encoded = torch.nn.functional.elu(fused @ mixed) @ second
        decoded = torch.nn.functional.elu(fused @ (encoded @ second.T)) @ first.T
        loss = torch.linalg.norm(expression - decoded) + 5e-5 * (first.square().sum() + second.square().sum())
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([first, second, *vectors], 5.0)
        adam.step()
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])


def scale(report: Report, cells: list[int], tile_cells: int, tiles_above: int) -> None:
    """Measure every number of cells and add rows and targets."""
    rows = []
    for number in cells:
        tiled = tile_cells if number > tiles_above else 0
        print(f"{number} cells ...", file=sys.stderr, flush=True)
        plain = number == min(cells) <= PLAIN_AT_MOST
        command = [sys.executable, __file__, "--one", json.dumps([number, tiled or None, plain])]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
    report.rows += rows
    whole = [row for row in rows if row["tiles"] == "whole"]
    at = {row["cells"]: row for row in rows}
    if "faster" in rows[0]:
        reason = f"{rows[0]['cells']} cells"
        report.targets.append(Target("epoch_faster_than_plain", rows[0]["faster"], 5, at_most=False, reason=reason))
    if 100_000 in at:
        report.targets.append(Target("gib_at_100k_cells", at[100_000]["peak_gib"], 4))
    if len(whole) > 1:
        slopes = np.polyfit(np.log([row["cells"] for row in whole]), np.log([row["epoch_s"] for row in whole]), 1)
        reason = "exponent of seconds an epoch over cells, whole sections"
        report.targets.append(Target("epoch_exponent", float(slopes[0]), 1.1, reason=reason))


def main() -> int:
    parser = argument_parser(__doc__.partition("\n\n")[0])
    parser.add_argument("--parts", nargs="+", choices=("quality", "scale"), default=("quality", "scale"))
    parser.add_argument("--folder", help="labelled sections; default: the packaged one and a synthetic one")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cells", type=int, nargs="+", default=[5000, 20_000, 50_000, 100_000, 200_000])
    parser.add_argument("--tile-cells", type=int, default=20_000, help="cells of a tile above --tiles-above cells")
    parser.add_argument("--tiles-above", type=int, default=100_000)
    parser.add_argument("--one", help="used by the benchmark itself: one measurement in this process")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure_scale(*json.loads(arguments.one))))
        return 0
    if arguments.quick:
        arguments.methods, arguments.seeds, arguments.cells = list(QUICK_METHODS), 1, [2000, 5000]
    report = Report("GATES: domains and cost", {"seeds": arguments.seeds, "smoothed": str(SMOOTHED)})
    if "quality" in arguments.parts:
        quality(report, sections_of(arguments.folder, arguments.quick), arguments.methods, arguments.seeds)
        report.show(
            {
                "section": "section",
                "method": "method",
                "ari": "ARI",
                "ari_sd": "+-",
                "refined": "refined ARI",
                "refined_sd": "+-",
                "nmi": "NMI",
                "pas": "PAS",
                "seconds": "seconds",
            }
        )
    if "scale" in arguments.parts:
        before = len(report.rows)
        scale(report, arguments.cells, arguments.tile_cells, arguments.tiles_above)
        shown = Report("cost by cells", {"genes": GENES, "epochs": EPOCHS}, rows=report.rows[before:])
        shown.show(
            {
                "cells": "cells",
                "tiles": "cells a step",
                "graphs_s": "graphs s",
                "graphs_gib": "peak with graphs GiB",
                "epoch_s": "epoch s",
                "peak_gib": "peak GiB",
                "plain_epoch_s": "plain epoch s",
                "faster": "plain / ours",
            }
        )
    return report.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
