import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from swapserve.config.init import Gpu, Machine, starter
from swapserve.config.jsonschema import json_schema, recipe_schema
from swapserve.config.load import default_paths

ROOT = Path(__file__).parents[3]
CONFIG = jsonschema.Draft202012Validator(json_schema())
RECIPE = jsonschema.Draft202012Validator(recipe_schema())


def test_both_are_schemas_and_plain_json() -> None:
    for schema in (json_schema(), recipe_schema()):
        jsonschema.Draft202012Validator.check_schema(schema)
        assert json.loads(json.dumps(schema)) == schema


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "server:\npaths: {state_dir: ~}",
        "server: {port: 1, api_keys: ['${env:A}', {file: x}], max_body: 1GiB, queue_timeout: 5m}",
        "server: {api_keys: [k, {key: k, name: a, priority: batch}, {key: {file: x}}]}",
        "scheduling: {policy: my-own, quantum: ~, overhead_share: 0.5, slo_itl: 50ms}",
        "models: [{name: a, recipe: x, slots: 4, queue_limit: 1, deadline: 1m, slo_ttft: ~}]",
        "devices: {ram: {memory: 8GiB}, g: {kind: gpu, uuid: x, memory: 100}}",
        "models: [{name: a/b:c, recipe: vllm, args: [--x, 1, true], env: {A: 1}, ttl: 30}]",
        "models: [{name: a, recipe: x, tiers: [host, none], keep_cache: never}]",
        "models: [{name: a, recipe: x, device: g0, mechanism: deep_sleep, tiers: [host, disk]}]",
        "models: [{name: a, recipe: x, device: [g0, g1]}]",
        "keeper: {gpu_margin: 1GiB, gpu_paths: [/a], cuda_checkpoint: ~, cuda_rate: 1GiB}",
        "recipe_dirs: [a]\nlog: {format: json}",
    ],
)
def test_right_files_are_accepted(text: str) -> None:
    CONFIG.validate(yaml.safe_load(text))


@pytest.mark.parametrize(
    "text",
    [
        "modles: []",
        "server: {prot: 1}",
        "server: {port: 70000}",
        "server: {port: '1'}",
        "server: {max_body: big}",
        "server: {queue_timeout: 5 minutes}",
        "server: {queue_timeout: -1}",
        "server: {api_keys: [{fil: x}]}",
        "server: {api_keys: [{name: a}]}",
        "server: {api_keys: [{key: k, priority: high}]}",
        "scheduling: {busy: drain}",
        "scheduling: {overhead_share: 1}",
        "models: [{name: a, recipe: x, slots: 0}]",
        "devices: {'a b': {}}",
        "devices: {ram: {memory: 8GiBs}}",
        "models: {a: 1}",
        "models: [{name: a}]",
        "models: [{name: '-a', recipe: x}]",
        "models: [{name: a, recipe: x, tiers: [device]}]",
        "models: [{name: a, recipe: x, pin: 1}]",
        "models: [{name: a, recipe: x, device: [g0, {g1: 1}]}]",
        "models: [{name: a, recipe: x, mechanism: hibernate}]",
        "keeper: {cuda_lock_timeout: 0}",
        "log: {level: loud}",
        "images: {canary_rate: 2}",
    ],
)
def test_wrong_files_are_not(text: str) -> None:
    assert list(CONFIG.iter_errors(yaml.safe_load(text)))


def test_the_starter_is_accepted() -> None:
    machine = Machine(memory_bytes=8 << 30, paths=default_paths("auto"))
    CONFIG.validate(yaml.safe_load(starter(machine)))
    card = Gpu(uuid="GPU-0", name="H200", memory_bytes=140 << 30)
    machine = Machine(memory_bytes=8 << 30, paths=default_paths("auto"), gpus=(card,))
    CONFIG.validate(yaml.safe_load(starter(machine)))


def test_the_documents_examples_are_accepted() -> None:
    document = (ROOT / "docs" / "configuration.md").read_text()
    examples = re.findall(r"```yaml\n(.*?)```", document, re.DOTALL)
    assert len(examples) >= 2
    for example in examples:
        assert yaml.safe_load(example)["models"]
        CONFIG.validate(yaml.safe_load(example))


@pytest.mark.parametrize("path", sorted((ROOT / "engines").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_are_accepted(path: Path) -> None:
    RECIPE.validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("text", ["name: a", "{name: a, adapter: x, argv: [a]}", "{name: A}"])
def test_wrong_recipes_are_not(text: str) -> None:
    assert list(RECIPE.iter_errors(yaml.safe_load(text)))


def test_every_key_has_a_description() -> None:
    for schema in (json_schema(), recipe_schema()):
        for name, item in schema["properties"].items():
            assert item["description"], name
            for body in item.get("anyOf", []):
                inner = body.get("items", body.get("additionalProperties", body))
                for key, value in (inner or {}).get("properties", {}).items():
                    assert value["description"], f"{name}.{key}"
