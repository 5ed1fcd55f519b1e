"""Makes what AdapterHub's own code computes: tiny bases, bottleneck adapters on them, and the logits of both together.

AdapterHub needs an older transformers than the rest of the tests, so this runs by hand in an environment of its own,
and its results are committed beside it:

    python -m venv VENV
    VENV/bin/pip install torch==2.13.0 adapters==1.3.0 transformers==4.57.6
    VENV/bin/python tests/parity/adapterhub/make_goldens.py
"""

import json
import shutil
from pathlib import Path

import adapters
import torch
from adapters import DoubleSeqBnConfig, ParBnConfig, SeqBnConfig
from safetensors.torch import save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

HERE = Path(__file__).parent / "goldens"
VOCABULARY = 96
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=12,
            decoder_start_token_id=0,
        )
    ),
}
CONFIGS = {
    "double_seq_bn": DoubleSeqBnConfig(reduction_factor=4),
    "seq_bn": SeqBnConfig(reduction_factor=8),
    "par_bn": ParBnConfig(reduction_factor=4),
    "gelu_scaled": SeqBnConfig(reduction_factor=4, non_linearity="gelu", scaling=0.5),
    "gelu_new_attention": DoubleSeqBnConfig(reduction_factor=4, non_linearity="gelu_new", output_adapter=False),
    "one_layer_out": DoubleSeqBnConfig(reduction_factor=4, leave_out=[0]),
    "cross": DoubleSeqBnConfig(reduction_factor=4, cross_adapter=True),
}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Numbers large enough that every mistake shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        mean = 1.0 if parameter.ndim == 1 and "bias" not in name and "adapter" not in name else 0.0
        parameter.data.copy_(mean + 0.2 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def main() -> None:
    """Write goldens/MODEL/{base,ADAPTER} and goldens/MODEL/logits.safetensors."""
    shutil.rmtree(HERE, ignore_errors=True)
    for family, make in MODELS.items():
        model = make()
        randomise(model, 1)
        model.save_pretrained(HERE / family / "base")
        adapters.init(model)
        tokens = torch.randint(3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(2))
        inputs = {"input_ids": tokens}
        if family == "t5":
            inputs["decoder_input_ids"] = tokens.flip(1)
        model.eval()
        found = {"tokens": tokens, "base": model(**inputs).logits}
        for name, config in CONFIGS.items():
            if name == "cross" and family != "t5":
                continue
            model.add_adapter(name, config=config)
            part = {key: value for key, value in model.named_parameters() if f"adapters.{name}." in key}
            generator = torch.Generator().manual_seed(3)
            for _, parameter in sorted(part.items()):
                parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            model.set_active_adapters(name)
            found[name] = model(**inputs).logits
            model.save_adapter(str(HERE / family / name), name, with_head=False, use_safetensors=True)
            if name == "seq_bn":
                model.save_adapter(str(HERE / family / "pickled"), name, with_head=False, use_safetensors=False)
            model.set_active_adapters(None)
        save_file({key: value.contiguous() for key, value in found.items()}, HERE / family / "logits.safetensors")
    versions = {"adapters": adapters.__version__, "torch": torch.__version__}
    (HERE / "versions.json").write_text(json.dumps(versions) + "\n")


if __name__ == "__main__":
    main()
