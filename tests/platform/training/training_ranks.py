"""Trains jobs one after another on plain processes, without Ray: `python training_ranks.py JOBS.json WORLD_SIZE`.

A job is what `launch.train_job` hands to a worker, with the folder `output`: there the model is saved, and
`result.json` has the losses of all steps and the number of steps. Its checkpoints stay where `checkpoints` says; a job
with `resume`, the path of one, goes on from there.
"""

import contextlib
import gc
import json
import multiprocessing
import os
import socket
import sys
import tempfile
from pathlib import Path

PLAIN = {"cpus_per_worker": 1, "gpus_per_worker": 0}


def train(job, rank, world_size):
    import torch
    from accelerate.state import AcceleratorState
    from tenfold.platform.training.worker import make_trainer
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer({**PLAIN, **job}, rank, world_size, Path(job.get("checkpoints", scratch)))
        trainer.train(resume_from_checkpoint=job.get("resume"))
        trainer.save_model(job["output"])
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        result = {"losses": losses, "steps": trainer.state.max_steps}
        if rank == 0:
            Path(job["output"], "result.json").write_text(json.dumps(result))
        with contextlib.suppress(AttributeError):
            trainer.model_wrapped.destroy()
    del trainer
    # the next job has another DeepSpeed configuration; both libraries keep the first one in a global
    AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()
    gc.collect()
    gc.freeze()  # what is left are modules; accelerate collects often, and takes half a second with them
    torch.distributed.barrier()


def run_rank(rank, jobs, world_size, port):
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update(places | {name: str(value) for name, value in ranks.items()})
    from tenfold.platform.training.worker import settle_process

    settle_process(PLAIN)
    import torch

    torch.distributed.init_process_group("gloo")
    for job in jobs:
        train(job, rank, world_size)
    torch.distributed.destroy_process_group()


def main(jobs_file, world_size):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    jobs = json.loads(Path(jobs_file).read_text())
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=run_rank, args=(rank, jobs, world_size, port)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode) for process in ranks))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
