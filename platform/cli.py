"""The `tenfold` command. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tenfold.platform.experiment import LoadedExperiment

INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Ten papers as methods on one platform: train, sweep, track and serve from one YAML file.",
)

Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, e.g. config.training.max_steps=50")]
PlanOnly = Annotated[bool, typer.Option("--plan", help="check everything, print the plan, start nothing")]
Reference = Annotated[str, typer.Argument(help="method/name of a packaged experiment, or a path to a YAML file")]
Run = Annotated[str, typer.Argument(help="a run's id, the unique start of it, or its folder")]
StoragePlace = Annotated[str, typer.Option("--storage", help="where the runs are")]


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="explain this method")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """List the methods, or explain one."""
    from tenfold.platform import show

    show.methods(name, as_json)


@app.command()
def run(
    experiment: Reference,
    overrides: Overrides = None,
    plan: PlanOnly = False,
    new: Annotated[
        bool, typer.Option("--new", help="start afresh beside an earlier run of the same experiment")
    ] = False,
) -> None:
    """Run an experiment, or resume it where it stopped."""
    from tenfold.platform import show
    from tenfold.platform.experiment import load_experiment
    from tenfold.platform.run import plan as make_plan
    from tenfold.platform.run import run as run_experiment

    loaded = load_experiment(experiment, overrides or [])
    show.plan(make_plan(loaded))
    if _capacity(loaded, plan):
        show.result(run_experiment(loaded, new=new), loaded.experiment.tracking.uri)


@app.command()
def sweep(
    experiment: Reference,
    overrides: Overrides = None,
    plan: PlanOnly = False,
    new: Annotated[
        bool, typer.Option("--new", help="start afresh beside an earlier sweep of the same experiment")
    ] = False,
) -> None:
    """Run an experiment's sweep as a Ray Tune study, or go on with it where it was interrupted."""
    from tenfold.platform import show
    from tenfold.platform.experiment import load_experiment
    from tenfold.platform.tuning.study import plan_sweep, run_sweep

    loaded = load_experiment(experiment, overrides or [])
    show.plan(plan_sweep(loaded))
    wanted = loaded.experiment.sweep
    if _capacity(loaded, plan, concurrent=wanted.max_concurrent if wanted else 1):
        show.sweep(run_sweep(loaded, new=new), loaded.experiment.tracking.uri)


@app.command()
def submit(
    experiment: Reference,
    overrides: Overrides = None,
    address: Annotated[
        str | None, typer.Option(help="the cluster's dashboard, http://HEAD:8265; default: RAY_API_SERVER_ADDRESS")
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="run it as `tenfold sweep` does")] = False,
    plan: PlanOnly = False,
    new: Annotated[
        bool, typer.Option("--new", help="start afresh beside an earlier run of the same experiment")
    ] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="leave when it is submitted")] = False,
    blind: Annotated[
        bool,
        typer.Option("--blind", help="this machine sees neither data nor storage: leave checking them to the job"),
    ] = False,
) -> None:
    """Run an experiment as a job of a cluster: check it here, send it with this tenfold, follow its log.

    Ends with the exit code of the job's command. Ctrl-C leaves the job alone; the same command follows it again.
    """
    from tenfold.platform import show, submission
    from tenfold.platform.experiment import load_experiment

    loaded = load_experiment(experiment, overrides or [])
    show.plan(submission.check(loaded, sweep=sweep, new=new, blind=blind))
    if plan:
        typer.echo("the plan fits; nothing was sent")
        return
    server = submission.JobServer.at(submission.job_server(address))
    job, attached = server.submit(loaded, sweep=sweep, new=new)
    typer.echo(f"job {job} {'runs already' if attached else 'is submitted'}: {server.address}")
    where = f"--address {server.address} {job}"
    hints = f"ray job logs --follow {where}; stop it with: ray job stop {where}"
    if no_wait:
        typer.echo(f"follow it with the same command or: {hints}")
        return
    try:
        code = server.follow(job, lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt:
        typer.echo(f"\njob {job} goes on without us. Follow it with: {hints}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    typer.echo(f"job {job} {'finished' if code == 0 else f'ended with exit code {code}'}")
    raise typer.Exit(code)


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="run ids")],
    latest: Annotated[
        int, typer.Option("--latest", help="take the newest N runs whose id starts so, not one run")
    ] = 0,
    storage: StoragePlace = "runs",
) -> None:
    """Show the metrics of several runs side by side."""
    from tenfold.platform import show
    from tenfold.platform.run import find_run, newest_runs

    names = [found for start in runs for found in newest_runs(start, latest, storage)] if latest else runs
    show.comparison([find_run(name, storage) for name in names])


@app.command()
def evaluate(run: Run, storage: StoragePlace = "runs") -> None:
    """Compute the paper's metrics for what came out of a run."""
    from tenfold.platform import cluster, show
    from tenfold.platform.run import evaluate as evaluate_run
    from tenfold.platform.run import find_run

    found = find_run(run, storage)
    _ = found.model_folder
    cluster.connect()
    show.metrics(found.run_id, evaluate_run(found))


@app.command()
def export(
    run: Run,
    folder: Annotated[Path, typer.Argument(help="new or empty folder")],
    storage: StoragePlace = "runs",
) -> None:
    """Write a run's model to a folder of its own (a plain Hugging Face folder where it is one), digests checked."""
    from tenfold.platform.models.export import export_model
    from tenfold.platform.run import find_run

    export_model(find_run(run, storage).model_folder, folder)
    typer.echo(f"{folder}: verified; its README.md says how to load it")


@app.command()
def serve(
    runs: Annotated[list[str], typer.Argument(help="runs whose models are served; clients ask for them by run id")],
    host: Annotated[str, typer.Option(help="interface to listen on; 0.0.0.0 lets other machines in")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port")] = 8000,
    api_keys_env: Annotated[
        str | None, typer.Option(help="environment variable with the keys that clients must send")
    ] = None,
    latest: Annotated[bool, typer.Option("--latest", help="take the newest run whose id starts so")] = False,
    ask: Annotated[
        str | None, typer.Option(help="send this one chat request over HTTP, print the answer, stop")
    ] = None,
    storage: StoragePlace = "runs",
) -> None:
    """Serve what came out of runs: OpenAI-compatible HTTP under /v1."""
    import importlib

    from tenfold.platform.run import find_run, newest_runs

    # by name: the platform imports no application
    configuration, launch = (importlib.import_module(f"tenfold.serve.{name}") for name in ("config", "launch"))
    names = [name for start in runs for name in newest_runs(start, 1, storage)] if latest else runs
    found = [find_run(name, storage) for name in names]
    models = [{"name": each.run_id, "model": each.model_folder} for each in found]
    keys = {"api_keys": {"env": api_keys_env}} if api_keys_env else {}
    config = configuration.parse_config({"models": models, **keys})
    url = launch.run_server(config, host=host, port=port, blocking=ask is None)
    if ask is not None:
        try:
            typer.echo(f"{ask}\n-> {launch.ask(url, found[0].run_id, ask)}")
        finally:
            launch.stop_server()


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Say whether this machine, this cluster and this storage are fit."""
    import rich
    from tenfold.platform import doctor as examination

    found = examination.checks()
    if as_json:
        typer.echo(json.dumps([check.__dict__ for check in found], indent=1))
    else:
        rich.print(examination.render(found))
    if any(check.status == "fail" for check in found):
        raise typer.Exit(1)


@app.command()
def nodes(
    address: Annotated[str, typer.Option(help="the cluster's dashboard")] = "http://127.0.0.1:8265",
    folder: Annotated[Path, typer.Option(help="where nodes.json and nodes.png go")] = Path(),
) -> None:
    """Record how many nodes a cluster has, until Ctrl-C: a line for every change, then JSON and a plot."""
    from tenfold.platform.node_counts import NodeRecord

    data, picture = NodeRecord(address, typer.echo).keep_looking(folder)
    typer.echo(f"{picture}, {data}")


def _capacity(loaded: LoadedExperiment, plan: bool, concurrent: int = 1) -> bool:
    """Connect and make sure that the cluster has room; return whether to go on, which a plan does not."""
    from tenfold.platform import cluster
    from tenfold.platform.training.sizes import plan_sizes

    compute = loaded.experiment.compute
    workers, _ = plan_sizes(loaded.config, compute)
    available = None
    if plan and cluster.cluster_address() is None:
        available = cluster.local_capacity()  # a plan starts nothing, not even a local cluster
    else:
        cluster.connect()
    cluster.check_capacity(
        workers, compute.cpus_per_worker, compute.gpus_per_worker, concurrent=concurrent, available=available
    )
    if plan:
        typer.echo("the plan fits; nothing was started")
    return not plan


def main() -> None:
    """Run the command line; errors that are the user's to mend are one message without a traceback."""
    import os
    import sys

    from tenfold.platform.errors import TenfoldError

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("tenfold").setLevel(logging.INFO)
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # it sets its own loggers when it is imported
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # a log file has no use for bars
    try:
        app()
    except TenfoldError as error:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        sys.exit(2)
    except SystemExit as leaving:
        if leaving.code == INTERRUPTED:  # typer's code after Ctrl-C
            typer.secho("interrupted; the same command goes on from here", err=True, fg=typer.colors.YELLOW)
        raise


if __name__ == "__main__":
    main()
