"""What a method of an adapter does at the sites of a base, in its trainable form. By default: nothing."""

from torch import Tensor, nn

from quiver_peft.base.sites import Linear, Site, StackName


class Method(nn.Module):
    """One method of one adapter. An adapter's methods act in a fixed order, whatever the order of its list.

    Around a linear: every `scale_input`, the linear, every `add_output` (LoRA), every `scale_output` (IA3).

    num_virtual_tokens: rows it puts before every sequence; they come to `virtual_embeddings` and `key_values` first.
    virtual_stack: of an encoder-decoder, whose sequences.
    """

    name: str
    num_virtual_tokens: int = 0
    virtual_stack: StackName = ""

    def num_virtual_in(self, stack: StackName) -> int:
        """Rows it puts before every sequence of this stack."""
        return self.num_virtual_tokens if stack in ("", self.virtual_stack) else 0

    @property
    def needs_rng(self) -> bool:
        """Whether it needs random numbers now: for dropout while training."""
        return False

    def scale_input(self, linear: Linear, x: Tensor) -> Tensor:
        """What the linear and everything added to it see. x: [*, K] -> [*, K]."""
        return x

    def add_output(self, linear: Linear, x: Tensor, y: Tensor) -> Tensor:
        """x: [*, K] (scaled already), y: [*, N] -> [*, N]."""
        return y

    def scale_output(self, linear: Linear, y: Tensor) -> Tensor:
        """y: [*, N] -> [*, N]."""
        return y

    def sublayer(self, site: Site, out: Tensor, residual: Tensor) -> Tensor:
        """What is added to the residual stream. out, residual: [*, D] -> [*, D]."""
        return out

    def virtual_embeddings(self) -> Tensor | None:
        """The embeddings of the method's virtual tokens, [n, D]; None where they have none of their own."""
        return None

    def virtual_key_values(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Keys (rotated) and values of the method's virtual tokens in a layer, both [n, G, E]; None: computed."""
        return None
