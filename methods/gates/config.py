"""Every option of GATES: type, unit, range, default and source."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from tenfold.platform.experiment import StrictModel

MethodName = Literal[
    "gates", "stagate", "stagate_pyg", "pca_gmm", "pca_leiden", "spatial_pca", "spagcn", "precomputed"
]
DEFAULT_ALPHA = 0.01  # the only one above 0 in the published scripts
NETWORKS = ("gates", "stagate", "stagate_pyg")  # the methods that train the attention auto-encoder


class Section(StrictModel):
    """One file (or folder) with a tissue section, or with several."""

    path: str = Field(
        min_length=1,
        description=".h5ad, a 10x Visium folder, a counts table (.csv, .tsv, .mtx, .npz) or synthetic:CELLS; "
        "sample:PATH for the packaged ones",
    )
    coordinates: str | None = Field(None, description="table of cell id, x, y[, z]; only beside a counts table")
    truth: str | None = Field(None, description="two-column table without header: cell id, domain")
    labels: str | None = Field(None, description="column of obs with the true domains; only read by the metrics")
    layer: str | None = Field(None, description="layer that holds the raw counts; default: X")
    spatial_key: str = Field("spatial", description="key of obsm with the coordinates")
    sample_key: str | None = Field(None, description="column of obs that tells sections of one file apart")
    samples: list[str] | None = Field(None, min_length=1, description="only these values of sample_key")
    transpose: bool = Field(False, description="the counts table has genes in rows")


class Preprocessing(StrictModel):
    """From raw counts to log-normalised expression (GATES demo)."""

    enabled: bool = Field(True, description="false: X is log-normalised already and is taken as it is")
    num_genes: int = Field(3000, ge=1, description="highly variable genes; all if there are no more (GATES: 3000)")
    flavor: Literal["seurat_v3", "seurat", "cell_ranger"] = Field(
        "seurat_v3", description="of scanpy's highly_variable_genes; seurat_v3 reads raw counts (GATES)"
    )
    target_sum: float = Field(1e4, gt=0, description="counts of a cell after normalisation (GATES: 1e4)")
    min_cells: int | Literal["auto"] = Field(
        "auto", description="drop genes seen in fewer cells; auto: 3 above 3000 genes, else 0 (GATES: 0)"
    )


class SpatialGraph(StrictModel):
    """Which cells are neighbours in space."""

    kind: Literal["radius", "knn", "delaunay", "existing"] = Field(
        "radius", description="existing: obsp['spatial_connectivities'], as squidpy writes it"
    )
    radius: float | Literal["auto"] = Field(
        "auto",
        description="in the coordinates' unit; auto: 1.1 x the median distance to the 6th nearest cell (our choice; "
        "GATES: 150 pixels)",
    )
    k: int = Field(6, ge=1, description="neighbours of kind knn (GATES: 6)")
    z_radius: float | None = Field(None, gt=0, description="links between consecutive sections (STAGATE's 3-D option)")

    @model_validator(mode="after")
    def _positive_radius(self) -> SpatialGraph:
        if self.radius != "auto" and self.radius <= 0:
            raise ValueError(f"radius = {self.radius}: give a positive number or auto")
        return self


class ExpressionGraph(StrictModel):
    """Which cells are neighbours in expression."""

    k: int = Field(6, ge=1, description="most similar cells (GATES: 6 in its demo, 7 in the mouse scripts)")
    similarity: Literal["cosine", "euclidean", "pearson"] = Field("cosine", description="(GATES: cosine)")
    direction: Literal["own", "reverse"] = Field(
        "own", description="own: a cell receives from its k most similar; reverse: as the official code does"
    )
    symmetrize: bool = Field(False, description="link both ways")
    scope: Literal["all", "section"] = Field("all", description="most similar among all sections, or in its own")
    exact_up_to: int = Field(
        50_000, ge=0, description="cells up to which neighbours are exact; above, approximate on 50 components"
    )


class Clustering(StrictModel):
    """From the embedding to domains."""

    kind: Literal["gmm", "leiden", "louvain", "kmeans"] = Field(
        "gmm", description="gmm: multi-start Gaussian mixture with one covariance, in place of R's mclust EEE"
    )
    n_domains: int | Literal["auto"] = Field(
        "auto",
        description="K; auto: the number of labelled classes; without labels the smallest BIC over 2..20, where cells "
        "that resemble their neighbours in space count as fewer (ours): a first guess, look at more numbers",
    )
    resolution: float | None = Field(None, gt=0, description="of leiden and louvain; default: searched for K")
    refine: Literal["none", "majority", "spagcn"] = Field("none", description="label refinement (GATES: none)")
    refine_neighbours: int | Literal["auto"] = Field(
        "auto", description="cells that vote; auto: min(50, cells / 20), at least 6; spagcn: 6"
    )

    @model_validator(mode="after")
    def _positive(self) -> Clustering:
        if self.n_domains != "auto" and self.n_domains < 1:
            raise ValueError(f"n_domains = {self.n_domains}: give at least 1, or auto")
        if self.refine_neighbours != "auto" and self.refine_neighbours < 1:
            raise ValueError(f"refine_neighbours = {self.refine_neighbours}: give at least 1, or auto")
        return self


class GATESOptions(StrictModel):
    """Options of a spatial domain analysis (arXiv 2410.20159), whatever section it is of."""

    method: MethodName = Field("gates", description="gates, or one of the methods that it is compared with")
    preprocessing: Preprocessing = Field(default_factory=Preprocessing)
    spatial_graph: SpatialGraph = Field(default_factory=SpatialGraph)
    expression_graph: ExpressionGraph = Field(default_factory=ExpressionGraph)
    mode: Literal["spatial-similarity", "spatial-prune", "prune-similarity"] = Field(
        "spatial-similarity", description="which two graphs are fused (GATES: spatial-similarity)"
    )
    pre_resolution: float = Field(
        0.2, gt=0, description="of the clustering that prunes the spatial graph (GATES: 0.2)"
    )
    pre_labels: str | None = Field(None, description="column of obs that prunes the spatial graph instead")
    alpha: float | None = Field(
        None, ge=0, le=1, description="weight of the second graph; default 0.01 (GATES scripts), 0 for stagate methods"
    )
    hidden_dims: list[Annotated[int, Field(ge=1)]] = Field(
        [512, 30], min_length=2, description="widths of the encoder (GATES: [512, 30])"
    )
    nonlinear: bool = Field(True, description="ELU after attention (GATES: true)")
    smooth_input: int = Field(
        0, ge=0, description="rounds of averaging the expression over spatial neighbours before the network (ours)"
    )
    loss: Literal["frobenius", "mse"] | None = Field(
        None, description="default frobenius (GATES), for stagate_pyg mse"
    )
    weight_decay: float = Field(1e-4, ge=0, description="lambda of the penalty lambda/2 |W|^2 (GATES: 1e-4)")
    weight_decay_scope: Literal["all", "last"] = Field(
        "all", description="matrices that are penalised; last: as the official code does"
    )
    epochs: int | None = Field(
        None, ge=1, description="passes over the whole graph; default 500 (GATES), for stagate_pyg 1000"
    )
    learning_rate: float | None = Field(None, gt=0, description="of Adam; default 1e-4 (GATES), for stagate_pyg 1e-3")
    max_grad_norm: float = Field(5.0, gt=0, description="clip the global gradient norm to this (GATES: 5)")
    save_steps: int = Field(100, ge=1, description="steps between checkpoints of a run")
    tile_cells: int | None = Field(
        None, ge=1, description="cells of a tile in training; default: the whole graph is one step (GATES)"
    )
    fanout: list[Annotated[int, Field(ge=1)]] | None = Field(
        None, description="most senders a cell in the first and second graph while training on tiles; default: all"
    )
    num_components: int = Field(30, ge=1, description="principal components of the PCA methods")
    precomputed_key: str | None = Field(
        None, description="method precomputed: key of obs (domains) or obsm (embedding) to evaluate"
    )
    clustering: Clustering = Field(default_factory=Clustering)

    @model_validator(mode="after")
    def _options_fit_the_method(self) -> GATESOptions:
        if (self.method == "precomputed") != (self.precomputed_key is not None):
            raise ValueError("method precomputed needs precomputed_key, and only that method reads it")
        if self.method in ("stagate", "stagate_pyg") and self.alpha:
            raise ValueError(
                f"alpha = {self.alpha}: {self.method} has one graph; leave alpha out, or use method gates"
            )
        return self

    @property
    def fusion_weight(self) -> float:
        """Alpha of the network that is trained: 0 for the STAGATE methods."""
        if self.method != "gates":
            return 0.0
        return DEFAULT_ALPHA if self.alpha is None else self.alpha


class GATESConfig(GATESOptions):
    """Options of a run: those of the analysis, and what is analysed."""

    sections: list[Section] = Field(min_length=1, description="the tissue sections, analysed together")
