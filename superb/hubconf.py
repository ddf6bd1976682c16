"""`codecssl` as an upstream of s3prl's hub, from outside s3prl.

In Python: `hubconf.register()`, then `S3PRLUpstream("codecssl", MODEL)`. On the command line, s3prl's own
runner with the upstream registered: `python -m codecssl.superb.hubconf -m train -u codecssl -k MODEL -d
speech_commands ...`.
"""

import sys
from typing import Any

from codecssl.superb.patches import import_patches
from codecssl.tokenize.common.errors import UserError


def codecssl(ckpt: str | None = None, model_config: str | None = None, refresh: bool = False) -> Any:
    """Build the upstream of an exported model's folder, or of any name that codecssl-superb accepts.

    `refresh` is s3prl's: nothing is downloaded here. UserError without `ckpt`, and for a `model_config`.
    """
    import torch

    from codecssl.superb.upstreams.build import UpstreamBuilder
    from codecssl.superb.upstreams.names import parse

    if not ckpt:
        raise UserError("upstream codecssl: -k is missing; give -k MODEL, an exported model's folder or a name")
    if model_config is not None:
        raise UserError(f"upstream codecssl: -g {model_config}: a model contains its configuration; omit -g")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return UpstreamBuilder(device=device).build(parse(ckpt))


def register() -> None:
    """Add `codecssl` to s3prl's hub; idempotent."""
    import_patches.install()
    import s3prl.hub as hub

    hub.codecssl = codecssl


def refuse_trainable() -> None:
    """Make s3prl's runner refuse to fine-tune `codecssl`, which is frozen by construction; idempotent.

    Without this, the option would be accepted, and frozen results would pass as fine-tuned ones.
    """
    from s3prl.downstream.runner import Runner

    build = Runner._get_upstream
    if hasattr(build, "refuses_trainable"):
        return

    def get_upstream(self: Any) -> Any:
        if self.args.upstream == "codecssl" and self.args.upstream_trainable:
            raise UserError("upstream codecssl: -f/--upstream_trainable: it is always frozen; omit the option")
        return build(self)

    get_upstream.refuses_trainable = True  # type: ignore[attr-defined]
    Runner._get_upstream = get_upstream


def main() -> None:
    """s3prl's classic runner, with `codecssl` among its upstreams."""
    register()
    refuse_trainable()
    from s3prl.run_downstream import main as run_downstream

    try:
        run_downstream()
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
