"""An analyser for tests of the application: it reads and checks as GATES does, and its domains are a k-means."""

import csv
import io
import json
import os
import time

import anndata
import numpy as np
from tenfold.methods.gates.checks import check_file, check_section
from tenfold.methods.gates.config import Section
from tenfold.methods.gates.limits import Limits
from tenfold.methods.gates.reading import read_section
from tenfold.platform.errors import DataError, ModelError

EPOCH_SECONDS = 0.02
HOLD = "hold"  # jobs do not end while the storage has a file of this name


class KMeansAnalyser:
    def check(self, files, params, limits):
        if params.get("method") == "hang":
            time.sleep(60)
        if params.get("method") == "crash":
            os.abort()
        if params.get("method") == "eat":
            return {"n_obs": len(bytearray(64 * 2**30))}
        limits = Limits(**vars(limits))
        for path in files.values():
            check_file(path, limits)
        adata = self._read(files, params, limits)
        notes = check_section(adata, n_domains=params.get("n_domains", "auto"), spatial_key=self._key(params))
        return {"n_obs": adata.n_obs, "n_vars": adata.n_vars, "notes": notes}

    def run(self, files, params, folder, progress):
        from sklearn.cluster import KMeans
        from sklearn.decomposition import PCA

        progress({"stage": "read"})
        adata = self._read(files, params, None)
        log = np.log1p(np.asarray(adata.X.todense() if hasattr(adata.X, "todense") else adata.X, dtype=np.float32))
        epochs = params.get("epochs", 5)
        for epoch in range(1, epochs + 1):
            progress({"stage": "train", "epoch": epoch, "epochs": epochs, "loss": 100.0 / epoch})
            if params.get("method") == "die" and epoch == 3:
                os.abort()
            time.sleep(EPOCH_SECONDS)
        hold = next(iter(files.values())).parents[3] / HOLD  # STORAGE/jobs/ID/upload/FILE
        while hold.exists():
            progress({"stage": "hold"})
            time.sleep(EPOCH_SECONDS)
        if params.get("method") == "fail":
            raise DataError("X has only zeros. Send counts")
        progress({"stage": "write"})
        num_domains = params.get("n_domains", 4)
        num_domains = 4 if num_domains == "auto" else num_domains
        latent = PCA(min(10, *log.shape), random_state=0).fit_transform(log).astype(np.float32)
        labels = KMeans(num_domains, n_init=1, random_state=params.get("seed", 0)).fit_predict(latent).astype(np.int16)
        xy = np.asarray(adata.obsm[self._key(params)], dtype=np.float32)
        ids = [str(name) for name in adata.obs_names]
        rows = [{"id": name, "domain": str(label), "p": 1.0} for name, label in zip(ids, labels, strict=True)]
        document = {"n_obs": len(ids), "n_domains": num_domains, "domains": rows, "metrics": {}}
        (folder / "result.json").write_text(json.dumps(document))
        with (folder / "domains.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["id", "domain", "p"], *([row["id"], row["domain"], 1.0] for row in rows)])
        np.savez(folder / "embedding.npz", X=latent)
        adata.write_h5ad(folder / "result.h5ad")
        ones = np.ones(len(ids), np.float32)
        np.savez(folder / "view.npz", x=xy[:, 0], y=xy[:, 1], umap=latent[:, :2], domain=labels, probability=ones)

    def genes(self, folder):
        return [str(name) for name in anndata.read_h5ad(folder / "result.h5ad", backed="r").var_names]

    def gene(self, folder, name):
        genes = self.genes(folder)
        if name not in genes:
            raise DataError(f"gene {name!r} is unknown; there is {genes[0]}")
        column = anndata.read_h5ad(folder / "result.h5ad")[:, name].X
        return np.asarray(column.todense() if hasattr(column, "todense") else column, dtype=np.float32).ravel()

    def plot(self, folder, color, size, dpi):
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib.figure import Figure

        values = np.load(folder / "view.npz")["domain"] if color == "domain" else self.gene(folder, color)
        view = np.load(folder / "view.npz")
        figure = Figure((3, 3))
        figure.subplots().scatter(view["x"], view["y"], c=values, s=size or 2)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=dpi, format="png")
        return buffer.getvalue()

    def describe_model(self, model_folder):
        try:
            return json.loads((model_folder / "model.json").read_text())
        except OSError as error:
            raise ModelError(f"{model_folder}: holds no model") from error

    def predict(self, files, model_folder, params):
        adata = self._read(files, params, None)
        domain = self.describe_model(model_folder)["domain"]
        return {"n_obs": adata.n_obs, "domains": [{"id": str(name), "domain": domain} for name in adata.obs_names]}

    def _key(self, params):
        return params.get("spatial_key", "spatial")

    def _read(self, files, params, limits):
        coordinates = str(files["coordinates"]) if "coordinates" in files else None
        path = str(files.get("file") or files["counts"])
        return read_section(Section(path=path, coordinates=coordinates, spatial_key=self._key(params)), limits)
