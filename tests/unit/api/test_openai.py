"""What the front door itself answers, over real sockets; no engine is needed."""

import asyncio
import json
from typing import Any

import pytest

from swapserve.config.schema import ApiKey, ServerConfig
from tests.support.front_door import ALIAS, NAME, FrontDoor, front_door

pytestmark = pytest.mark.anyio
NO_ENGINE = 1
VALID = json.dumps({"model": ALIAS, "prompt": "x"}).encode()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def keys(*secrets: str) -> tuple[ApiKey, ...]:
    return tuple(ApiKey(secret=one, name=f"key-{n}") for n, one in enumerate(secrets))


async def error_of(
    door: FrontDoor, method: str, path: str, expected: int, **more: Any
) -> dict[str, Any]:
    async with door.client.request(method, door.url + path, **more) as answer:
        assert answer.status == expected, await answer.text()
        body = await answer.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'{"prompt": "x"}', "'model' is missing"),
        (b'{"model": 1}', "'model' must be"),
        (b'{"model": "\xff"}', "not UTF-8"),
        (b'{"model": "tiny", "stream": 1}', "'stream' must be"),
    ],
)
async def test_a_bad_body_is_a_400_that_says_why(body: bytes, says: str) -> None:
    async with front_door(NO_ENGINE) as door:
        error = await error_of(
            door,
            "POST",
            "/v1/completions",
            400,
            data=body,
            headers={"Content-Type": "application/json"},
        )
        assert says in error["message"]
        assert error["type"] == "invalid_request_error"
        assert door.scheduler.waiting == []


@pytest.mark.parametrize(
    ("content_type", "says"),
    [
        ("application/x-www-form-urlencoded", "curl: -H 'Content-Type: application/json'"),
        ("multipart/form-data", "must be 'application/json'"),
        ("application/json; charset=latin-1", "must be UTF-8"),
    ],
)
async def test_a_wrong_content_type_is_a_400_that_says_the_right_one(
    content_type: str, says: str
) -> None:
    async with front_door(NO_ENGINE) as door:
        headers = {"Content-Type": content_type}
        error = await error_of(door, "POST", "/v1/completions", 400, data=VALID, headers=headers)
        assert says in error["message"]


async def test_a_body_over_the_limit_is_a_413() -> None:
    async with front_door(NO_ENGINE, server=ServerConfig(max_body_bytes=2000)) as door:
        body = {"model": ALIAS, "prompt": "x" * 3000}
        error = await error_of(door, "POST", "/v1/completions", 413, json=body)
        assert "2000 bytes" in error["message"]


async def test_an_unknown_model_is_a_404_with_near_misses() -> None:
    async with front_door(NO_ENGINE) as door:
        error = await error_of(door, "POST", "/v1/completions", 404, json={"model": "tinny"})
        assert error["code"] == "model_not_found"
        assert error["param"] == "model"
        assert "tiny" in error["message"]


async def test_an_endpoint_that_the_engine_does_not_have_is_a_404_of_ours() -> None:
    async with front_door(NO_ENGINE, endpoints=["/v1/completions"]) as door:
        error = await error_of(door, "POST", "/v1/embeddings", 404, json={"model": ALIAS})
        assert error["code"] == "endpoint_not_found"
        assert door.scheduler.waiting == []


@pytest.mark.parametrize(
    "path", ["/sleep", "/v1/sleep", "/collective_rpc", "/v1/completions/../../sleep", "/", "/v1"]
)
async def test_no_other_path_leads_to_an_engine(path: str) -> None:
    async with front_door(NO_ENGINE) as door:
        error = await error_of(door, "POST", path, 404, json={"model": ALIAS})
        assert error["code"] == "endpoint_not_found"
        assert door.scheduler.waiting == []


async def test_a_wrong_method_is_a_405_that_names_the_right_one() -> None:
    async with front_door(NO_ENGINE) as door:
        async with door.client.get(f"{door.url}/v1/completions") as answer:
            assert answer.headers["Allow"] == "POST"
        error = await error_of(door, "GET", "/v1/completions", 405)
        assert error["code"] == "method_not_allowed"


async def test_models_are_listed_with_state_tier_and_aliases() -> None:
    async with front_door(NO_ENGINE) as door, door.client.get(f"{door.url}/v1/models") as answer:
        listed = await answer.json()
        assert listed["object"] == "list"
        (model,) = listed["data"]
        assert (model["id"], model["object"], model["owned_by"]) == (NAME, "model", "swapserve")
        assert model["created"] > 1_700_000_000
        assert model["swapserve"] == {"state": "ready", "tier": "device", "aliases": [ALIAS]}


@pytest.mark.parametrize("name", [NAME, ALIAS, "org%2Ftiny"])
async def test_one_model_is_found_by_any_of_its_names(name: str) -> None:
    async with (
        front_door(NO_ENGINE) as door,
        door.client.get(f"{door.url}/v1/models/{name}") as answer,
    ):
        assert (await answer.json())["id"] == NAME


async def test_one_unknown_model_is_a_404() -> None:
    async with front_door(NO_ENGINE) as door:
        assert (await error_of(door, "GET", "/v1/models/no", 404))["code"] == "model_not_found"


async def test_health_is_open_and_tells_versions() -> None:
    server = ServerConfig(api_keys=keys("k"))
    async with (
        front_door(NO_ENGINE, server=server) as door,
        door.client.get(f"{door.url}/health") as answer,
    ):
        body = await answer.json()
        assert body["status"] == "ok"
        assert {"swapserve", "python", "aiohttp"} <= set(body["versions"])


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/metrics")]
)
async def test_keys_are_asked_for_where_they_are_configured(method: str, path: str) -> None:
    async with front_door(NO_ENGINE, server=ServerConfig(api_keys=keys("right", "other"))) as door:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic right"},
            {"x-api-key": "righ"},
        ):
            error = await error_of(door, method, path, 401, headers=headers)
            assert error["code"] == "invalid_api_key"
        for headers in (
            {"Authorization": "Bearer right"},
            {"authorization": "bearer other"},
            {"x-api-key": "other"},
        ):
            async with door.client.request(method, door.url + path, headers=headers) as answer:
                assert answer.status != 401


async def test_an_admin_key_opens_the_metrics_but_not_the_models() -> None:
    server = ServerConfig(api_keys=keys("user"), admin_keys=("admin",))
    headers = {"Authorization": "Bearer admin"}
    async with front_door(NO_ENGINE, server=server) as door:
        async with door.client.get(f"{door.url}/metrics", headers=headers) as answer:
            assert answer.status == 200
        await error_of(door, "GET", "/v1/models", 401, headers=headers)


async def test_the_admin_routes_are_part_of_the_application() -> None:
    async with (
        front_door(NO_ENGINE) as door,
        door.client.get(f"{door.url}/admin/v1/status") as answer,
    ):
        assert (await answer.json())["profile"] == "unprivileged"


async def test_metrics_count_requests() -> None:
    async with front_door(NO_ENGINE) as door:
        assert (await door.post()).status == 502
        async with door.client.get(f"{door.url}/metrics") as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            text = await answer.text()
        assert (
            f'swapserve_requests_total{{engine="{NAME}",endpoint="/v1/completions",'
            'outcome="upstream_error"} 1\n'
        ) in text


async def test_a_mistake_of_ours_is_still_an_error_object(caplog: pytest.LogCaptureFixture) -> None:
    async with front_door(NO_ENGINE) as door:
        door.places.clear()  # a KeyError inside
        error = await error_of(door, "POST", "/v1/completions", 500, json={"model": ALIAS})
        assert error["code"] == "internal_error"
        assert "KeyError" in caplog.text
        assert (await door.until_ended()).outcome == "internal_error"
        assert len(door.scheduler.ended) == 1


async def test_a_stalled_upload_that_is_given_up_leaves_nothing() -> None:
    async with front_door(NO_ENGINE) as door:
        host, port = door.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        await asyncio.sleep(0.05)
        assert door.scheduler.waiting == []


@pytest.mark.parametrize(
    ("headers", "status", "code", "says"),
    [
        ({"x-swapserve-priority": "high"}, 400, "invalid_request", "urgent, interactive, batch"),
        ({"x-swapserve-deadline": "soon"}, 400, "invalid_request", "number of seconds"),
        ({"x-swapserve-priority": "urgent"}, 403, "forbidden", "'key-0'"),
    ],
)
async def test_a_wish_that_cannot_be_granted_says_where_and_what_to_do(
    headers: dict[str, str], status: int, code: str, says: str
) -> None:
    sent = {"Authorization": "Bearer k", "Content-Type": "application/json", **headers}
    async with front_door(NO_ENGINE, server=ServerConfig(api_keys=keys("k"))) as door:
        error = await error_of(door, "POST", "/v1/completions", status, data=VALID, headers=sent)
    assert (error["code"], error["param"]) == (code, next(iter(headers)) if status == 400 else None)
    assert says in error["message"]
