"""`codecssl` as an upstream of s3prl's hub, from outside s3prl.

In Python: `hubconf.register()`, then `S3PRLUpstream("codecssl", MODEL)`. On the command line, s3prl's own
runner with the upstream registered: `python -m codecssl.superb.hubconf -m train -u codecssl -k MODEL -d
speech_commands ...`.
"""

from typing import Any

from codecssl.superb import compat


def codecssl(ckpt: str, *arguments: Any, **options: Any) -> Any:
    """The upstream of an exported model's folder, or of any name that codecssl-superb takes."""
    import torch

    from codecssl.superb.expert import Shelf, parse

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Shelf(device=device).build(parse(ckpt))


def register() -> None:
    """Add `codecssl` to s3prl's hub; idempotent."""
    compat.install()
    import s3prl.hub as hub

    hub.codecssl = codecssl


def main() -> None:
    """s3prl's classic runner, with `codecssl` among its upstreams."""
    register()
    from s3prl.run_downstream import main as run_downstream

    run_downstream()


if __name__ == "__main__":
    main()
