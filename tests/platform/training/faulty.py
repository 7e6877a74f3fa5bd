"""A training in which rank 1 finds a mistake while rank 0 waits for it."""

from tenfold.platform.errors import ConfigError


def build(context):
    import torch.distributed

    if context.rank == 1:
        raise ConfigError("config.teacher: rank 1 cannot use it")
    torch.distributed.barrier()
    raise AssertionError("nobody else arrives")
