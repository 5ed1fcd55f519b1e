"""TrainableAdapter sections of a recipe: one for each method, with the defaults of its PEFT config."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from quiver_peft.adapters.methods.bottleneck import PLACES, CanonicalAdaptersPEFTConfig
from quiver_peft.adapters.methods.configs import PEFTConfig
from quiver_peft.adapters.methods.ia3 import IA3PEFTConfig
from quiver_peft.adapters.methods.lora import LoraPEFTConfig
from quiver_peft.adapters.methods.prefix import PrefixPEFTConfig
from quiver_peft.adapters.methods.prompt import PromptTuningPEFTConfig, PtuningPEFTConfig
from quiver_peft.errors import AdapterError

_LORA = LoraPEFTConfig()
_CANONICAL = CanonicalAdaptersPEFTConfig()
_PTUNING = PtuningPEFTConfig()
_PROMPT = PromptTuningPEFTConfig()
_PREFIX = PrefixPEFTConfig()


class Section(BaseModel):
    """A group of settings. Unknown keys are errors, so that a misspelled one is never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class MethodSection(Section):
    """What the sections of the methods share: they are the configuration that `add_adapter` takes."""

    def to_peft(self) -> PEFTConfig:
        """Raises AdapterError."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        try:
            self.to_peft()
        except AdapterError as error:
            raise ValueError(str(error)) from None
        return self


_LAYERS = "numbers of the layers to adapt, from 1; null: all"


class LoraSection(MethodSection):
    """The LoRA of an adapter: `LoraPEFTConfig`, whose defaults these are."""

    method: Literal["lora"] = Field(description="low-rank additions to linears (Hu et al. 2021)")
    adapter_dim: int = Field(default=_LORA.adapter_dim, ge=1, description="the rank")
    alpha: float | None = Field(
        default=_LORA.alpha, description="scale numerator; null: as adapter_dim, which is scale 1"
    )
    adapter_dropout: float = Field(default=_LORA.adapter_dropout, ge=0, lt=1, description="dropout rate while training")
    dropout_position: Literal["pre", "post"] = Field(
        default=_LORA.dropout_position, description="dropout on the input (pre) or on the low-rank product (post)"
    )
    target_modules: str | tuple[str, ...] = Field(
        default=tuple(_LORA.target_modules),
        description="places: attention_qkv, attention_dense, mlp_fc1, mlp_fc2, attention, mlp, all; "
        "or module names of the base's checkpoint",
    )
    variant: Literal["nemo", "canonical"] = Field(
        default=_LORA.variant,
        description="one low-rank input for query, key and value together (nemo) or one each (canonical)",
    )
    column_init_method: Literal["xavier", "normal", "kaiming"] = Field(
        default=_LORA.column_init_method, description="how the first factor starts; the second starts at zero"
    )
    use_rslora: bool = Field(default=_LORA.use_rslora, description="divide alpha by the square root of the rank")
    use_dora: bool = Field(default=_LORA.use_dora, description="train the length of each row apart from its direction")
    rank_pattern: dict[str, int] = Field(
        default=_LORA.rank_pattern, description="{end of a module name: its own rank}; regular expressions"
    )
    alpha_pattern: dict[str, float] = Field(
        default=_LORA.alpha_pattern, description="{end of a module name: its own alpha}; regular expressions"
    )
    layer_selection: tuple[int, ...] | None = Field(default=None, description=_LAYERS)

    def to_peft(self) -> PEFTConfig:
        return LoraPEFTConfig(**self.model_dump(exclude={"method"}))


class IA3Section(MethodSection):
    """`IA3PEFTConfig`."""

    method: Literal["ia3"] = Field(description="learned scales on keys, values and the MLP (Liu et al. 2022)")
    target_modules: str | tuple[str, ...] | None = Field(
        default=None, description="module names of the base's checkpoint; null: keys, values and the MLP's inner values"
    )
    feedforward_modules: str | tuple[str, ...] | None = Field(
        default=None, description="those of target_modules whose input is scaled, not their output"
    )
    layer_selection: tuple[int, ...] | None = Field(default=None, description=_LAYERS)

    def to_peft(self) -> PEFTConfig:
        return IA3PEFTConfig(**self.model_dump(exclude={"method"}))


class CanonicalSection(MethodSection):
    """`CanonicalAdaptersPEFTConfig`."""

    method: Literal["canonical"] = Field(description="bottleneck adapters after sub-layers (Houlsby et al. 2019)")
    adapter_dim: int = Field(default=_CANONICAL.adapter_dim, ge=1, description="width of the bottleneck")
    adapter_dropout: float = Field(default=_CANONICAL.adapter_dropout, ge=0, lt=1, description="while training")
    norm_position: Literal["pre", "post"] | None = Field(
        default=_CANONICAL.norm_position, description="a LayerNorm before or after the bottleneck; null: none"
    )
    column_init_method: Literal["xavier", "normal", "kaiming", "zero"] = Field(
        default=_CANONICAL.column_init_method, description="how the way down starts; the way up starts at zero"
    )
    activation: Literal["swish", "relu", "gelu", "gelu_tanh"] = Field(
        default=_CANONICAL.activation, description="in the bottleneck"
    )
    weight_tying: bool = Field(default=_CANONICAL.weight_tying, description="one bottleneck for all layers")
    layer_selection: tuple[int, ...] | None = Field(default=None, description=_LAYERS)
    places: tuple[Literal["attention", "mlp", "cross_attention"], ...] = Field(
        default=PLACES, description="after which sub-layers; cross_attention: of a T5's decoder"
    )
    bias: bool = Field(default=_CANONICAL.bias, description="of both linears")
    scale: float = Field(default=_CANONICAL.scale, description="on what is added")
    source: Literal["output", "output_before_bias", "sum", "residual"] = Field(
        default=_CANONICAL.source,
        description="what enters: the sub-layer's output, with or without its last bias; its sum with the residual "
        "(Pfeiffer et al. 2021); or the residual alone, beside the sub-layer (He et al. 2022)",
    )

    def to_peft(self) -> PEFTConfig:
        return CanonicalAdaptersPEFTConfig(**self.model_dump(exclude={"method"}))


class PtuningSection(MethodSection):
    """`PtuningPEFTConfig`."""

    method: Literal["ptuning"] = Field(description="virtual tokens made by a prompt encoder (Liu et al. 2021)")
    virtual_tokens: int = Field(default=_PTUNING.virtual_tokens, ge=1, description="how many")
    bottleneck_dim: int = Field(default=_PTUNING.bottleneck_dim, ge=1, description="hidden size of the nemo encoder")
    embedding_dim: int = Field(default=_PTUNING.embedding_dim, ge=1, description="input size of the nemo encoder")
    init_std: float = Field(default=_PTUNING.init_std, gt=0, description="of the encoder's input")
    encoder: Literal["nemo", "mlp", "lstm"] = Field(
        default=_PTUNING.encoder, description="nemo: two linears; mlp, lstm: those of Hugging Face PEFT"
    )
    encoder_hidden_size: int | None = Field(
        default=None, ge=1, description="of the encoders mlp and lstm; null: as the base"
    )
    encoder_num_layers: int = Field(default=_PTUNING.encoder_num_layers, ge=1, description="of the encoder lstm")
    encoder_dropout: float = Field(default=_PTUNING.encoder_dropout, ge=0, lt=1, description="of the encoder lstm")

    def to_peft(self) -> PEFTConfig:
        return PtuningPEFTConfig(**self.model_dump(exclude={"method"}))


class PromptTuningSection(MethodSection):
    """`PromptTuningPEFTConfig`."""

    method: Literal["prompt_tuning"] = Field(description="virtual tokens learnt directly (Lester et al. 2021)")
    virtual_tokens: int = Field(default=_PROMPT.virtual_tokens, ge=1, description="how many")
    init: Literal["vocabulary", "random"] = Field(
        default=_PROMPT.init, description="start at embeddings of random words, or at noise"
    )

    def to_peft(self) -> PEFTConfig:
        return PromptTuningPEFTConfig(**self.model_dump(exclude={"method"}))


class PrefixSection(MethodSection):
    """`PrefixPEFTConfig`."""

    method: Literal["prefix"] = Field(description="learned keys and values in every layer (Li & Liang 2021)")
    virtual_tokens: int = Field(default=_PREFIX.virtual_tokens, ge=1, description="how many")
    projection: bool = Field(default=_PREFIX.projection, description="learn them through a small network")
    encoder_hidden_size: int | None = Field(
        default=None, ge=1, description="hidden size of that network; null: as the base"
    )

    def to_peft(self) -> PEFTConfig:
        return PrefixPEFTConfig(**self.model_dump(exclude={"method"}))


AnyMethodSection = Annotated[
    LoraSection | IA3Section | CanonicalSection | PtuningSection | PromptTuningSection | PrefixSection,
    Field(discriminator="method"),
]
METHOD_SECTIONS: dict[str, type[MethodSection]] = {
    "lora": LoraSection,
    "ia3": IA3Section,
    "canonical": CanonicalSection,
    "ptuning": PtuningSection,
    "prompt_tuning": PromptTuningSection,
    "prefix": PrefixSection,
}
