"""Registers the task codec with `codecssl.tokenize.registry`, through the entry-point group `codecssl.codecs`."""

from codecssl.tokenize.codec import Backend

BACKEND = Backend(
    module="codecssl.superb.task_codec.codec",
    summary="below 200 bit/s for a task: a layer of a pretrained model, quantised (Kuznetsova et al. 2025)",
    weights="codecssl-superb task-codec, and give the folder that it wrote as --codec PATH",
    model_type="codecssl-machine",
)
