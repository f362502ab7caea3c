"""Names of models."""

import pytest

from swapserve.config.recipes import Recipe
from swapserve.config.schema import ModelConfig
from swapserve.errors import ModelNotFound
from swapserve.ids import DeviceName, EngineName
from swapserve.router.resolve import Directory


def directory() -> Directory:
    recipe = Recipe(name="r", adapter="generic", argv=("x",))
    device = DeviceName("ram")
    return Directory(
        [
            ModelConfig(
                name=EngineName("Qwen/Qwen3-8B"),
                aliases=("qwen",),
                recipe=recipe,
                devices=(device,),
            ),
            ModelConfig(name=EngineName("llama-70b"), recipe=recipe, devices=(device,)),
        ]
    )


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "qwen"])
def test_a_name_and_its_alias_lead_to_the_same_engine(name: str) -> None:
    found = directory()
    assert found.resolve(name) == "Qwen/Qwen3-8B"
    assert found.model(found.resolve(name)).aliases == ("qwen",)


@pytest.mark.parametrize(
    ("name", "near"),
    [("qwen/qwen3-8b", "Qwen/Qwen3-8B"), ("LLAMA-70B", "llama-70b"), ("qven", "qwen")],
)
def test_an_unknown_name_comes_with_the_closest_known_one(name: str, near: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        directory().resolve(name)
    assert caught.value.near[0] == near
    assert near in str(caught.value)


def test_a_name_that_is_like_no_other_has_no_suggestion_and_is_not_echoed_at_length() -> None:
    with pytest.raises(ModelNotFound) as caught:
        directory().resolve("z" * 100_000)
    assert caught.value.near == ()
    assert len(str(caught.value)) < 400
