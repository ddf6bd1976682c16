"""A rank that leaves after rank 0 prints nothing: rank 0 reports the error of all."""

import os
import socket
import subprocess
import sys
import textwrap

RANK = textwrap.dedent(
    """
    import os
    import torch
    from codecssl.pretrain.engine.distributed import ProcessGroup
    from codecssl.pretrain.ranks import Ranks
    from codecssl.tokenize.common.errors import UserError

    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    group = ProcessGroup(Ranks(rank=rank, world_size=2, local_rank=rank))
    try:
        group.agree(UserError("no such data") if rank else None)
    except UserError:
        os._exit(3)
    """
)


def test_only_rank_0_reports_an_error_that_all_have() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [3, 1]
    assert printed[1] == "", "not even a native library may print"
