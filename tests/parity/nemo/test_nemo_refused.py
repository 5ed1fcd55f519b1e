"""`.nemo` archives that would give another result, or are malformed, are refused with file, field and rule."""

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.nemo.nemo_files import (
    BOTTLENECK,
    LORA,
    PTUNING,
    Full,
    Shape,
    add_member,
    make_full,
    shape_of,
    write_nemo,
)
from support.tiny import hf_model, random_tokens, tiny_flan, tiny_gpt2, tiny_llama

from quiver_peft import GPT, AdapterError, BaseMismatchError, load_model

torch.set_num_threads(1)

TOKENS = random_tokens(1, 8)
ALL_FOUR: dict[str, dict[str, Any]] = {
    "lora": {**LORA, "target_modules": ["all"]},
    "ia3": {},
    "adapter": BOTTLENECK,
    "ptuning": PTUNING,
}


class Good:
    """A Llama of four layers, and what an archive for it is made of."""

    def __init__(self, folder: Path) -> None:
        tiny_llama(folder, num_hidden_layers=4)
        self.model = GPT.from_pretrained(folder)
        self.shape: Shape = shape_of(hf_model(folder).config, is_mcore=True)
        self.full: Full = make_full(self.shape, ALL_FOUR)

    def refused(self, path: Path, message: str, error: type[AdapterError] = AdapterError) -> None:
        before = self.model(TOKENS)
        with pytest.raises(AdapterError, match=message) as caught:
            self.model.load_adapters(path)
        assert type(caught.value) is error
        assert str(path) in str(caught.value)
        assert self.model.adapter is None and torch.equal(self.model(TOKENS), before)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    return Good(tmp_path_factory.mktemp("llama"))


SETTINGS: list[tuple[str, dict[str, Any], str]] = [
    (
        "lora",
        {"target_modules": ["attention_kv"]},
        r"lora_tuning.target_modules = \['attention_kv'\] must be a list of",
    ),
    ("lora", {"target_modules": []}, r"lora_tuning.target_modules = \[\] must be"),
    ("lora", {"variant": "split"}, "lora_tuning.variant = 'split' must be one of nemo, canonical"),
    ("lora", {"dropout_position": "mid"}, "lora_tuning.dropout_position = 'mid' must be one of pre, post"),
    ("lora", {"alpha": "${model.x}"}, r"lora_tuning.alpha = '\$\{model.x\}' must be a number"),
    ("lora", {"adapter_dim": "4"}, "lora_tuning.adapter_dim = '4' must be a whole number above zero"),
    ("lora", {"adapter_dim": 8}, r"lora_kqv_adapter.linear_in.weight' has shape \[4, 64\]; .* need \[8, 64\]"),
    ("lora", {"use_dora": True}, "lora_tuning.use_dora = True is not known"),
    ("lora", {"layer_selection": [5]}, "layer_selection: 5 is no layer of this base"),
    ("lora", {"layer_selection": "1"}, "lora_tuning.layer_selection = '1' must be a list of whole numbers"),
    ("lora", {"layer_selection": [1]}, r"tensor 'layers\.1\.self_attention\.lora_kqv_adapter.* belongs to nothing"),
    (
        "lora",
        {"weight_tying": True, "position_embedding_strategy": "add"},
        "lora_tuning.position_embedding_strategy = 'add' with weight_tying is not supported",
    ),
    (
        "adapter",
        {"weight_tying": True, "position_embedding_strategy": "concat"},
        "adapter_tuning.position_embedding_strategy = 'concat' with weight_tying is not supported",
    ),
    ("adapter", {"norm_position": "both"}, "adapter_tuning.norm_position = 'both' must be one of pre, post, None"),
    ("adapter", {"norm_position": None}, r"layer_norm.* belongs to nothing that peft of model_config.yaml has"),
    ("adapter", {"norm_type": "rmsnorm"}, "adapter_tuning.norm_type = 'rmsnorm' must be one of mixedfused"),
    ("adapter", {"adapter_dropout": "some"}, "adapter_tuning.adapter_dropout = 'some' must be a number"),
    ("ia3", {"scale_queries": True}, "ia3_tuning.scale_queries = True is not known"),
    ("ia3", {"layer_selection": [1, 2, 3, 4, 5]}, "layer_selection: 5 is no layer"),
    ("ptuning", {"virtual_tokens": 0}, "p_tuning.virtual_tokens = 0 must be a whole number above zero"),
    ("ptuning", {"virtual_tokens": 7}, r"'ptuning_adapter.embedding.weight' has shape \[5, 12\]; .* need \[7, 12\]"),
    ("ptuning", {"virtual_tokens": 255}, "255 leave no room for a prompt and an answer"),
    ("ptuning", {"encoder_type": "lstm"}, "p_tuning.encoder_type = 'lstm' is not known"),
]


@pytest.mark.parametrize(("scheme", "changes", "message"), SETTINGS)
def test_settings(scheme: str, changes: dict[str, Any], message: str, good: Good, tmp_path: Path) -> None:
    schemes = {**ALL_FOUR, scheme: {**ALL_FOUR[scheme], **changes}}
    good.refused(write_nemo(tmp_path / "a.nemo", good.shape, schemes, good.full), message)


MODEL: list[tuple[dict[str, Any], str, type[AdapterError]]] = [
    ({"peft": {"peft_scheme": "qlora"}}, "peft_scheme 'qlora' is not supported; .* quantised", AdapterError),
    ({"peft": {"peft_scheme": "selective"}}, "'selective' is not supported; it changes the base's own", AdapterError),
    ({"peft": {"peft_scheme": "lora,mlp_head"}}, "'mlp_head' is not supported", AdapterError),
    ({"peft": {"peft_scheme": "sdlora"}}, "'sdlora' is not supported", AdapterError),
    ({"peft": {"peft_scheme": "vera"}}, "'vera' is not supported; known: adapter, ia3, lora, ptuning", AdapterError),
    ({"peft": {"peft_scheme": "none"}}, "'none' is not supported", AdapterError),
    ({"peft": {"peft_scheme": None}}, "peft.peft_scheme = None: this is no adapter", AdapterError),
    ({"peft": None}, "peft.peft_scheme = None: this is no adapter", AdapterError),
    ({"peft": {"peft_scheme": "ia3,ia3"}}, "peft.ia3_tuning must hold one scheme's settings", AdapterError),
    ({"peft": {"peft_scheme": "ia3", "ia3_tuning": 3}}, "peft.ia3_tuning must hold one scheme's", AdapterError),
    ({"peft": {"peft_scheme": "ia3", "ia3_tuning": {}}}, "belongs to nothing that peft of model_config", AdapterError),
    ({"megatron_legacy": True}, "megatron_legacy = True is not supported; only False is", AdapterError),
    ({"transformer_block_type": "normformer"}, "transformer_block_type = 'normformer' is not supp", AdapterError),
    ({"num_moe_experts": 8}, "num_moe_experts = 8 is not supported; only None is", AdapterError),
    ({"virtual_pipeline_model_parallel_size": 2}, "virtual_pipeline_model_parallel_size = 2 is not", AdapterError),
    ({"tensor_model_parallel_size": 2}, "tensor_model_parallel_size is 2, but the archive holds 1", AdapterError),
    ({"hidden_size": 32}, "hidden_size is 32, of this base 64", BaseMismatchError),
    ({"num_layers": 5}, "num_layers is 5, of this base 4", BaseMismatchError),
    ({"num_attention_heads": 8}, "num_attention_heads is 8, of this base 4", BaseMismatchError),
    ({"num_query_groups": None}, "num_query_groups is 4, of this base 2", BaseMismatchError),
    ({"ffn_hidden_size": 64}, "ffn_hidden_size is 64, of this base 96", BaseMismatchError),
    ({"kv_channels": 8}, "kv_channels is 8, of this base 16", BaseMismatchError),
]


@pytest.mark.parametrize(("changes", "message", "error"), MODEL)
def test_models(changes: dict[str, Any], message: str, error: type[AdapterError], good: Good, tmp_path: Path) -> None:
    file = write_nemo(tmp_path / "a.nemo", good.shape, ALL_FOUR, good.full, changes=changes)
    good.refused(file, message, error)


FIRST = ("", 0, "self_attention.")
TENSORS: list[tuple[Callable[[Full], object], str]] = [
    (lambda full: full.pop((FIRST, "key_infused_adapter.scalers")), "key_infused_adapter.scalers' is missing"),
    (lambda full: full.pop((("", -1, ""), "ptuning_adapter.first.bias")), "'ptuning_adapter.first.bias' is missing"),
    (
        lambda full: full.update({(FIRST, "lora_q_adapter.linear_in.weight"): torch.ones(4, 64)}),
        "lora_q_adapter.linear_in.weight' is of no adapter that is known",
    ),
    (
        lambda full: full.update({(("", 0, ""), "adapter_1.alpha"): torch.ones(1)}),
        "adapter_1.alpha' is of no adapter that is known",
    ),
    (
        lambda full: full.update({(FIRST, "key_infused_adapter.scalers"): torch.ones(32, dtype=torch.int64)}),
        "has type torch.int64; adapter weights are floating point",
    ),
    (
        lambda full: full[FIRST, "key_infused_adapter.scalers"].fill_(float("nan")),
        "holds a value that is not finite",
    ),
]


@pytest.mark.parametrize(("damage", "message"), TENSORS)
def test_tensors(damage: Callable[[Full], object], message: str, good: Good, tmp_path: Path) -> None:
    full = {key: tensor.clone() for key, tensor in good.full.items()}
    damage(full)
    good.refused(write_nemo(tmp_path / "a.nemo", good.shape, ALL_FOUR, full), message)


def rewrite(path: Path, edit: Callable[[dict[str, bytes]], object]) -> Path:
    """The archive with other members. edit: gets {name: content}."""
    with tarfile.open(path) as tar:
        members = {name: tar.extractfile(name).read() for name in tar.getnames()}  # pyright: ignore[reportOptionalMemberAccess]
    edit(members)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            add_member(tar, name, content)
    return path


class _Code:
    """A pickle that would run something."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this ran",))


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


WEIGHTS = "./model_weights.ckpt"
MEMBERS: list[tuple[Callable[[dict[str, bytes]], object], str]] = [
    (lambda members: members.pop("./model_config.yaml"), "holds no model_config.yaml; is it a .nemo archive"),
    (lambda members: members.pop(WEIGHTS), "holds no model_weights.ckpt; .*distributed checkpoint of a whole model"),
    (lambda members: members.update({"./model_config.yaml": b"peft: ["}), "model_config.yaml is not valid YAML"),
    (
        lambda members: members.update({"./model_config.yaml": b"a: !!python/object/apply:print ['this ran']"}),
        "is not valid YAML",
    ),
    (lambda members: members.update({"./model_config.yaml": b"- 1"}), "must hold settings by name, not list"),
    (lambda members: members.update({WEIGHTS: pickle.dumps(_Code())}), "not a pickle of tensors alone"),
    (lambda members: members.update({WEIGHTS: members[WEIGHTS][:900]}), "not a pickle of tensors alone"),
    (lambda members: members.update({WEIGHTS: saved({"model_0": {}})}), "must hold tensors by name"),
    (
        lambda members: members.update(
            {WEIGHTS: saved({"model.decoder.layers.4.adapter_layer.adapter_1.linear_in.weight": torch.ones(4, 64)})}
        ),
        r"layers.4.adapter_layer.adapter_1.linear_in.weight' lies in pipeline stage 0, which cannot hold it",
    ),
    (
        lambda members: members.update({WEIGHTS: saved({"model.decoder.final_layernorm.weight": torch.ones(64)})}),
        "'model.decoder.final_layernorm.weight' is no adapter's; nothing may be left unapplied",
    ),
    (
        lambda members: members.update(
            {WEIGHTS: saved({"model.encoder.layers.0.adapter_layer.adapter_1.linear_in.weight": torch.ones(4, 64)})}
        ),
        "lies in encoder, which is no place in this kind of base",
    ),
    (
        lambda members: members.update(
            {
                WEIGHTS: saved(
                    {
                        "model.decoder.layers.0.adapter_layer.adapter_1.linear_in.weight": torch.ones(4, 64),
                        "model.language_model.encoder.layers.1.adapter_layer.adapter_1.linear_in.weight": torch.ones(
                            4, 64
                        ),
                    }
                )
            }
        ),
        "are those of a Megatron-Core model and of an older one at once",
    ),
]


@pytest.mark.parametrize(("edit", "message"), MEMBERS)
def test_archives(
    edit: Callable[[dict[str, bytes]], object],
    message: str,
    good: Good,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write_nemo(tmp_path / "a.nemo", good.shape, ALL_FOUR, good.full)
    good.refused(rewrite(file, edit), message)
    assert "this ran" not in capsys.readouterr().out


def test_files_that_are_no_archive(good: Good, tmp_path: Path) -> None:
    file = write_nemo(tmp_path / "a.nemo", good.shape, ALL_FOUR, good.full)
    whole = file.read_bytes()
    for content in (b"", b"no tar", whole[: len(whole) // 2]):
        file.write_bytes(content)
        good.refused(file, "not a whole tar archive|holds no")
    good.refused(tmp_path / "none.nemo", "no such file")
    with tarfile.open(file, "w") as tar:
        link = tarfile.TarInfo("model_config.yaml")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    good.refused(file, "model_config.yaml is no plain file")


def test_an_archive_is_read_only_when_it_is_named(good: Good, tmp_path: Path) -> None:
    write_nemo(tmp_path / "a.nemo", good.shape, ALL_FOUR, good.full)
    good.refused(tmp_path, r"only as the pickle a\.nemo, which is not read unless that file itself is named")


def test_ranks(good: Good, tmp_path: Path) -> None:
    """A rank that is not there, or says otherwise than the others."""
    file = tmp_path / "a.nemo"

    def write() -> Path:
        return write_nemo(file, good.shape, ALL_FOUR, good.full, tensor_parallel=2, pipeline=2)

    folder = "./tp_rank_01_pp_rank_001/model_weights.ckpt"
    good.refused(rewrite(write(), lambda members: members.pop(folder)), "rank 1, stage 1 are missing")
    good.refused(
        rewrite(write(), lambda members: members.update({folder: saved({})})),
        "stage 1: its tensor-parallel ranks hold different tensors",
    )

    def drift(members: dict[str, bytes]) -> None:
        tensors = torch.load(io.BytesIO(members[folder]), weights_only=True)
        next(tensor for name, tensor in tensors.items() if "layer_norm" in name).add_(1)
        members[folder] = saved(tensors)

    good.refused(rewrite(write(), drift), "must be the same in all tensor-parallel ranks")


def test_a_scale_of_zero_beside_a_lora_of_parts(good: Good, tmp_path: Path) -> None:
    """NeMo adds that LoRA after the scale, where ours cannot reach it."""
    schemes = {"lora": {**LORA, "variant": "canonical"}, "ia3": {}}
    full = make_full(good.shape, schemes)
    full[FIRST, "value_infused_adapter.scalers"][3] = 0
    file = write_nemo(tmp_path / "a.nemo", good.shape, schemes, full)
    good.refused(file, "a LoRA beside an IA3 scale of zero is not supported")


def test_halves_of_an_mlp_without_a_gate(tmp_path: Path) -> None:
    theirs = tiny_gpt2(tmp_path / "base")
    shape = shape_of(theirs.config, is_mcore=True)
    schemes = {"lora": {**LORA, "variant": "canonical", "target_modules": ["mlp_fc1"]}}
    file = write_nemo(tmp_path / "a.nemo", shape, schemes, make_full(shape, schemes))
    with pytest.raises(AdapterError, match=r"variant 'canonical' halves layers.0.mlp.up, which is one projection"):
        load_model(tmp_path / "base").load_adapters(file)


def test_p_tuning_on_an_encoder_decoder_of_megatron_core(tmp_path: Path) -> None:
    theirs = tiny_flan(tmp_path / "base")
    shape = shape_of(theirs.config, is_mcore=True)
    file = write_nemo(tmp_path / "a.nemo", shape, {"ptuning": PTUNING}, make_full(shape, {"ptuning": PTUNING}))
    with pytest.raises(AdapterError, match=r"P-Tuning on a Megatron-Core T5 also replaced the decoder's first tokens"):
        load_model(tmp_path / "base").load_adapters(file)


def test_a_pipeline_of_an_encoder_decoder_needs_its_split(tmp_path: Path) -> None:
    theirs = tiny_flan(tmp_path / "base", num_layers=2, num_decoder_layers=2)
    shape = shape_of(theirs.config, is_mcore=False)
    full, changes = make_full(shape, {"ia3": {}}), {"pipeline_model_parallel_split_rank": None}
    file = write_nemo(tmp_path / "a.nemo", shape, {"ia3": {}}, full, pipeline=2, changes=changes)
    with pytest.raises(AdapterError, match=r"split_rank must lie within the 2 stages, not be None"):
        load_model(tmp_path / "base").load_adapters(file)
