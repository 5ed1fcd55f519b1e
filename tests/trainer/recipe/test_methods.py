"""The sections of a recipe offer what the methods' configurations have, no more and no less."""

from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from support.tiny import tiny_t5, tiny_tokenizer

from quiver_peft import T5
from quiver_peft.adapters.methods.configs import METHOD_ORDER, PEFTConfig, method_name
from quiver_trainer import TrainConfig, Trainer
from quiver_trainer.recipe.methods import METHOD_SECTIONS, AnyMethodSection

CONFIGS: dict[str, type[PEFTConfig]] = {method_name(config()): config for config in get_args(PEFTConfig)}
# What trained adapters of other makers have, on a T5: everything that the defaults leave out.
PARALLEL = {"bias": True, "scale": 0.5, "source": "residual", "norm_position": None, "column_init_method": "normal"}


def default_of(field: Field[Any]) -> Any:
    value = field.default if field.default_factory is MISSING else field.default_factory()
    return tuple(value) if isinstance(value, list) else value


def choices_of(hint: Any) -> set[Any]:
    """All values that a type lists, at whatever depth."""
    if get_origin(hint) is Literal:
        return set(get_args(hint))
    return set[Any]().union(*(choices_of(part) for part in get_args(hint)))


def test_every_method_has_a_section() -> None:
    assert set(METHOD_SECTIONS) == set(METHOD_ORDER) == set(CONFIGS)
    assert set(get_args(get_args(AnyMethodSection)[0])) == set(METHOD_SECTIONS.values())


@pytest.mark.parametrize("method", METHOD_ORDER)
def test_sections_have_the_fields_and_defaults_of_the_configurations(method: str) -> None:
    section, config = METHOD_SECTIONS[method], CONFIGS[method]
    offered = {name: field.default for name, field in section.model_fields.items() if name != "method"}
    assert offered == {field.name: default_of(field) for field in fields(config)}


@pytest.mark.parametrize("method", METHOD_ORDER)
def test_sections_offer_the_choices_of_the_configurations(method: str) -> None:
    offered = get_type_hints(METHOD_SECTIONS[method])
    for name, hint in get_type_hints(CONFIGS[method]).items():
        if choices := choices_of(hint):
            assert choices_of(offered[name]) == choices, name


def test_an_adapter_as_others_make_them_is_trained_from_a_recipe(
    make_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    tiny_t5(tmp_path / "t5")
    tiny_tokenizer(tmp_path / "t5")
    places = ("attention", "cross_attention", "mlp")
    adapter = [{"method": "canonical", "adapter_dim": 3, "places": places, **PARALLEL}]
    config = make_config(base=tmp_path / "t5", adapter=adapter, max_steps=1)
    model = T5.from_pretrained(config.base)
    torch.manual_seed(0)
    assert config.adapter is not None
    model.add_adapter([section.to_peft() for section in config.adapter])
    Trainer(config).fit(model)
    again = T5.from_pretrained(config.base)
    again.load_adapters(config.output)
    assert again.adapter is not None
    (trained,) = again.adapter.configs
    assert {name: trained.to_dict()[name] for name in PARALLEL if name != "column_init_method"} == {
        name: value for name, value in PARALLEL.items() if name != "column_init_method"
    }
    assert set(trained.to_dict()["places"]) == set(places)
