"""Outputs of the layers of a fairseq2 encoder."""

from torch import Tensor, nn

from codecssl.pretrain.model.fairseq2_parts import BatchLayout


def layer_outputs(encoder: nn.Module, x: Tensor, layout: BatchLayout) -> list[Tensor]:
    """Run an encoder on packed x [N, D]. Return the output [N, D] of each layer, and that of the encoder last.

    The encoder's output is the last layer's, after the final norm if there is one.
    """
    states: list[Tensor] = []

    def keep(layer_idx: int, layer_output: Tensor, layer_output_layout: BatchLayout, num_layers: int) -> bool:
        states.append(layer_output)
        return True

    hook = encoder.register_layer_hook(keep)  # type: ignore[operator]
    try:
        last: Tensor = encoder(x, layout)
    finally:
        hook.remove()
    return [*states, last]
