"""Trains an expanded model by two plain processes under ZeRO-3: `python expert_ranks.py MODEL OUTPUT.safetensors`.

All sequences of rank 0 are of the old group and use the original FFN alone where there are classifiers; those of rank
1 use the new experts.
"""

import multiprocessing
import os
import socket
import sys

STEPS = 2
RATE = 0.5


def batch_of(rank):
    import torch

    return torch.randint(3, 300, (2, 7), generator=torch.Generator().manual_seed(rank))


def loss_of(model, decoder, rank):
    """Return the loss of a rank's batch, with terms of router and classifier logits."""
    import torch
    from tenfold.methods.layermoe.state import collecting

    ids = batch_of(rank)
    with collecting(decoder, groups=torch.full((2,), rank), route_with="gold") as state:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    logits = [*state.router_logits.values(), *state.classifier_logits.values()]
    return loss + 0.1 * sum(some.logsumexp(-1).square().mean() for some in logits)


def choose(model):
    """Let everything train that expansions and classifiers added."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(any(part in name for part in (".groups.", ".router.", ".classifier.")))
    return [weight for weight in model.parameters() if weight.requires_grad]


def run_rank(rank, port, folder, output):
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in places.items()})
    from tenfold.platform.training.worker import settle_process

    settle_process({"cpus_per_worker": 1, "gpus_per_worker": 0})
    import deepspeed
    import torch
    from safetensors.torch import save_file
    from tenfold.platform.models.loading import load_causal_lm
    from tenfold.platform.models.source import ModelSource
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    torch.distributed.init_process_group("gloo")
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    kept = HfDeepSpeedConfig(settings)
    model = load_causal_lm(ModelSource(model=folder))
    assert all(hasattr(weight, "ds_id") for weight in model.parameters())
    model.gradient_checkpointing_enable()
    model.train()
    optimizer = torch.optim.SGD(choose(model), lr=RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    for _ in range(STEPS):
        engine.backward(loss_of(engine, model, rank))
        engine.step()
    whole = {}
    for name, weight in model.named_parameters():
        with deepspeed.zero.GatheredParameters(weight):
            whole[name] = weight.detach().clone()
    if rank == 0:
        save_file(whole, output)
    del kept
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=run_rank, args=(rank, port, *sys.argv[1:3])) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
        if process.exitcode != 0:
            for other in ranks:
                other.kill()
            sys.exit(f"a rank ended with {process.exitcode}")


if __name__ == "__main__":
    main()
