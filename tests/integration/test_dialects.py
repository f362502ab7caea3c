"""The adapters' way to put engines to rest, over real connections, against strict stand-ins."""

import asyncio
import time

import httpx
import pytest
from aiohttp import web

from swapserve.engines import ollama, resting, sglang, vllm
from swapserve.engines.base import Rest
from swapserve.engines.registry import adapter_for
from swapserve.errors import EngineError, QuiesceFailed
from swapserve.testing.dialect import Habits
from swapserve.testing.dialects import Dialect
from tests.support.engines import DIALECTS, Engine, model, running

pytestmark = pytest.mark.anyio

WAYS: list[tuple[Dialect, Rest]] = [
    ("vllm", "release"),
    ("vllm", "sleep"),
    ("vllm", "deep_sleep"),
    ("sglang", "release"),
    ("sglang", "sleep"),
    ("sglang", "deep_sleep"),
    ("ollama", "deep_sleep"),
]
ways = pytest.mark.parametrize(("which", "how"), WAYS)
SHORT_S = 0.3


def habits_for(how: Rest, **extra: object) -> Habits:
    """Return an engine as it was launched for that rest: SGLang decides about weights then."""
    return Habits(weights_backup=how != "deep_sleep", **extra)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def deep_sleeping_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the adapter of SGLang do every rest; which it offers is tested elsewhere."""
    able = frozenset({"checkpoint", "lean", "sleep", "deep_sleep", "restart"})
    monkeypatch.setattr(sglang.SGLangAdapter, "_able", lambda _self: able)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every wait on an engine short."""
    for module in (ollama, resting, sglang, vllm):
        for name in vars(module):
            if name.endswith("_TIMEOUT_S"):
                monkeypatch.setattr(module, name, SHORT_S)


async def alive(engine: Engine) -> bool:
    try:
        return bool(await engine.answer())
    except EngineError:
        return False


# --------------------------------------------------------------------- what a rest is


@ways
async def test_a_rest_frees_what_it_promises_and_waking_gives_the_same_answers(
    which: Dialect, how: Rest
) -> None:
    async with running(which, habits=habits_for(how)) as engine:
        before = await engine.answer()
        assert await engine.adapter.resting(engine.address) is False
        for _ in range(2):
            await engine.adapter.rest(engine.address, how)
            assert engine.part.held.keys() == ({"weights"} if how == "release" else set())
            assert engine.part.kept.keys() == ({"weights"} if how == "sleep" else set())
            assert await engine.adapter.resting(engine.address) is True
            await engine.adapter.wake(engine.address)
            assert await engine.adapter.resting(engine.address) is False
            assert not engine.part.paused
            assert await engine.answer() == before
        assert engine.part.crashed is None


@pytest.mark.parametrize(
    ("which", "how", "out", "back"),
    [
        (
            "vllm",
            "release",
            ["/pause?mode=wait", "/release_kv_cache_memory"],
            ["/wake_up?tags=weights", "/reset_prefix_cache", "/wake_up?tags=kv_cache"],
        ),
        (
            "vllm",
            "sleep",
            ["/pause?mode=wait", "/sleep?level=1&mode=keep"],
            ["/wake_up?tags=weights", "/reset_prefix_cache", "/wake_up?tags=kv_cache"],
        ),
        (
            "vllm",
            "deep_sleep",
            ["/pause?mode=wait", "/sleep?level=2&mode=keep"],
            [
                "/wake_up?tags=weights",
                "/collective_rpc",
                "/reset_prefix_cache",
                "/wake_up?tags=kv_cache",
            ],
        ),
        (
            "sglang",
            "sleep",
            [
                "/flush_cache",
                "/pause_generation",
                "/flush_cache",
                "/update_weight_version",
                "/release_memory_occupation",
            ],
            ["/resume_memory_occupation", "/update_weight_version", "/continue_generation"],
        ),
        (
            "sglang",
            "deep_sleep",
            [
                "/flush_cache",
                "/pause_generation",
                "/flush_cache",
                "/update_weight_version",
                "/release_memory_occupation",
            ],
            [
                "/resume_memory_occupation",
                "/update_weight_version",
                "/update_weights_from_disk",
                "/update_weight_version",
                "/continue_generation",
            ],
        ),
        ("ollama", "deep_sleep", ["/api/generate"], ["/api/generate"]),
    ],
)
async def test_the_calls_come_in_the_order_that_is_safe(
    which: Dialect, how: Rest, out: list[str], back: list[str]
) -> None:
    async with running(which, habits=habits_for(how)) as engine:
        await engine.adapter.rest(engine.address, how)
        assert engine.calls.seen == out
        await engine.adapter.wake(engine.address)
        assert engine.calls.seen == out + back


@pytest.mark.parametrize("which", DIALECTS)
async def test_waking_an_engine_that_is_awake_changes_nothing(which: Dialect) -> None:
    async with running(which) as engine:
        before = await engine.answer()
        await engine.adapter.wake(engine.address)
        assert await engine.answer() == before
        harmless = {"vllm": [], "sglang": ["/continue_generation"], "ollama": ["/api/generate"]}
        assert engine.calls.seen == harmless[which]


@ways
async def test_a_new_daemon_finds_out_what_the_former_did(which: Dialect, how: Rest) -> None:
    async with running(which, habits=habits_for(how)) as engine:
        before = await engine.answer()
        await engine.adapter.rest(engine.address, how)
        new = adapter_for(model(which))
        assert await new.resting(engine.address) is True
        await new.wake(engine.address)
        assert await new.resting(engine.address) is False
        assert await engine.answer() == before
        assert engine.part.crashed is None


@pytest.mark.parametrize("which", DIALECTS)
async def test_a_new_daemon_sees_that_an_engine_is_awake(which: Dialect) -> None:
    async with running(which) as engine:
        assert await adapter_for(model(which)).resting(engine.address) is False


# ------------------------------------------------------------------ requests in flight


@ways
async def test_a_request_that_is_still_there_is_waited_for(which: Dialect, how: Rest) -> None:
    habits = habits_for(how)
    async with running(which, habits=habits, delay_per_token_s=0.02) as engine:
        async with asyncio.TaskGroup() as tasks:
            request = tasks.create_task(engine.answer())
            while not engine.part.running:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            await engine.adapter.rest(engine.address, how)
            assert engine.part.running == 0
        await engine.adapter.wake(engine.address)
        assert request.result() == await engine.answer()


@ways
async def test_one_that_does_not_end_keeps_the_engine_awake_and_is_not_harmed(
    which: Dialect, how: Rest, impatient: None
) -> None:
    habits = habits_for(how)
    async with running(which, habits=habits, delay_per_token_s=2 * SHORT_S) as engine:
        async with asyncio.TaskGroup() as tasks:
            request = tasks.create_task(engine.answer())
            while not engine.part.running:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            with pytest.raises(QuiesceFailed) as failed:
                await engine.adapter.rest(engine.address, how)
            assert failed.value.left_awake is True
            assert not failed.value.unsupported
            engine.part.delay_per_token_s = 0.0
        assert engine.part.crashed is None
        assert request.result() == await engine.answer()
        assert await engine.adapter.resting(engine.address) is False


# ------------------------------------------------------------------------- what fails


@pytest.mark.parametrize(
    ("which", "how"), [("vllm", "sleep"), ("vllm", "deep_sleep"), ("ollama", "deep_sleep")]
)
async def test_an_answer_before_the_work_is_done_is_not_believed(which: Dialect, how: Rest) -> None:
    async with running(which, habits=Habits(early_answer_s=0.2)) as engine:
        await engine.adapter.rest(engine.address, how)
        assert engine.part.held == {}


async def test_a_call_may_take_longer_by_its_path_and_query() -> None:
    slow = {"/sleep?level=2&mode=keep": 0.3, "/wake_up": 0.2}
    async with running("vllm", habits=Habits(seconds=slow)) as engine:
        begun = time.monotonic()
        await engine.adapter.rest(engine.address, "sleep")
        assert time.monotonic() - begun < 0.3
        await engine.adapter.wake(engine.address)
        begun = time.monotonic()
        await engine.adapter.rest(engine.address, "deep_sleep")
        assert time.monotonic() - begun > 0.3


@pytest.mark.parametrize(
    ("which", "how", "path"),
    [
        ("vllm", "release", "/pause"),
        ("vllm", "release", "/release_kv_cache_memory"),
        ("vllm", "sleep", "/sleep"),
        ("vllm", "deep_sleep", "/sleep"),
        ("sglang", "sleep", "/pause_generation"),
        ("sglang", "sleep", "/update_weight_version"),
        ("sglang", "release", "/release_memory_occupation"),
        ("sglang", "deep_sleep", "/release_memory_occupation"),
    ],
)
@pytest.mark.parametrize("fault", ["refused", "hung"])
async def test_a_rest_that_fails_is_taken_back(
    which: Dialect, how: Rest, path: str, fault: str, impatient: None
) -> None:
    habits = habits_for(how, **{fault: frozenset({path})})
    async with running(which, habits=habits) as engine:
        before = await engine.answer()
        with pytest.raises(QuiesceFailed, match=path) as failed:
            await engine.adapter.rest(engine.address, how)
        if (fault, path) == ("hung", "/release_memory_occupation"):
            # Resuming what was not released is the end of the engine; that it was not released,
            # nobody could know.
            assert failed.value.left_awake is None
            assert engine.part.crashed is not None
            return
        assert engine.part.crashed is None
        assert not failed.value.unsupported
        if path == "/update_weight_version":
            assert failed.value.left_awake in {True, None}
        else:
            assert failed.value.left_awake is True
        assert await engine.answer() == before


@pytest.mark.parametrize(
    ("which", "how", "path"),
    [
        ("vllm", "release", "/release_kv_cache_memory"),
        ("vllm", "sleep", "/pause"),
        ("sglang", "sleep", "/pause_generation"),
    ],
)
async def test_a_version_without_the_call_is_told_from_a_failure(
    which: Dialect, how: Rest, path: str
) -> None:
    async with running(which, habits=Habits(missing=frozenset({path}))) as engine:
        before = await engine.answer()
        with pytest.raises(QuiesceFailed, match=path) as failed:
            await engine.adapter.rest(engine.address, how)
        assert failed.value.unsupported
        assert await engine.answer() == before


@pytest.mark.parametrize("how", ["release", "sleep", "deep_sleep"])
async def test_an_sglang_that_takes_no_notes_is_woken_by_who_put_it_to_rest(how: Rest) -> None:
    missing = frozenset({"/model_info", "/update_weight_version"})
    async with running("sglang", habits=habits_for(how, missing=missing)) as engine:
        new = adapter_for(model("sglang"))
        before = await engine.answer()
        await engine.adapter.rest(engine.address, how)
        assert await engine.adapter.resting(engine.address) is True
        # Another daemon cannot know, and must not guess: a wrong guess ends the engine.
        assert await new.resting(engine.address) is None
        with pytest.raises(QuiesceFailed, match="does not tell") as failed:
            await new.wake(engine.address)
        assert failed.value.left_awake is None
        await engine.adapter.wake(engine.address)
        assert await engine.answer() == before


@ways
async def test_an_engine_that_is_gone_is_unknown(which: Dialect, how: Rest) -> None:
    async with running(which, habits=habits_for(how)) as engine:
        with pytest.raises(ConnectionResetError):
            engine.part.crash("gone")
        with pytest.raises(QuiesceFailed) as failed:
            await engine.adapter.rest(engine.address, how)
        assert failed.value.left_awake is None
        assert await engine.adapter.resting(engine.address) is None
        with pytest.raises(QuiesceFailed) as failed:
            await engine.adapter.wake(engine.address)
        assert failed.value.left_awake is None


async def test_weights_that_cannot_be_read_again_leave_vllm_asleep_not_babbling(
    impatient: None,
) -> None:
    async with running("vllm", habits=Habits(refused=frozenset({"/collective_rpc"}))) as engine:
        await engine.adapter.rest(engine.address, "deep_sleep")
        with pytest.raises(QuiesceFailed, match="collective_rpc") as failed:
            await engine.adapter.wake(engine.address)
        assert failed.value.left_awake is False
        assert engine.part.paused  # so that nobody is given nonsense


async def test_weights_that_cannot_be_read_again_are_not_forgotten_by_sglang() -> None:
    habits = habits_for("deep_sleep", model_path="/elsewhere")
    async with running("sglang", habits=habits) as engine:
        await engine.adapter.rest(engine.address, "deep_sleep")
        for adapter in (engine.adapter, engine.adapter, adapter_for(model("sglang"))):
            with pytest.raises(QuiesceFailed, match="update_weights_from_disk") as failed:
                await adapter.wake(engine.address)
            assert failed.value.left_awake is False
        assert engine.part.crashed is None
        assert engine.part.paused


async def test_vllm_with_an_index_of_a_lost_cache_is_not_resumed(impatient: None) -> None:
    async with running("vllm", habits=Habits(refused=frozenset({"/reset_prefix_cache"}))) as engine:
        await engine.adapter.rest(engine.address, "sleep")
        with pytest.raises(QuiesceFailed, match="reset_prefix_cache") as failed:
            await engine.adapter.wake(engine.address)
        assert failed.value.left_awake is False


async def test_vllm_without_metrics_is_given_its_weights_again() -> None:
    async with running("vllm", habits=Habits(missing=frozenset({"/metrics"}))) as engine:
        before = await engine.answer()
        for how in ("deep_sleep", "sleep", "release"):
            await engine.adapter.rest(engine.address, how)
            await adapter_for(model("vllm")).wake(engine.address)
            assert await engine.answer() == before


async def test_an_ollama_model_without_text_is_loaded_too() -> None:
    async with running("ollama", habits=Habits(generates=False)) as engine:
        await engine.adapter.rest(engine.address, "deep_sleep")
        await engine.adapter.wake(engine.address)
        assert engine.part.held.keys() == {"weights", "kv_cache"}
        assert engine.calls.seen == ["/api/generate", "/api/generate", "/api/embed"]


async def test_an_answer_of_another_shape_is_no_answer() -> None:
    async def ps(_request: web.Request) -> web.Response:
        return web.json_response({"models": [{"digest": "0"}]})

    app = web.Application()
    app.router.add_get("/api/ps", ps)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        address = f"127.0.0.1:{runner.addresses[0][1]}"
        assert await adapter_for(model("ollama")).resting(address) is None
        with pytest.raises(QuiesceFailed, match="digest"):
            await adapter_for(model("ollama")).rest(address, "deep_sleep")
    finally:
        await runner.cleanup()


async def test_a_pause_that_was_left_behind_is_ended() -> None:
    async with running("vllm") as engine, httpx.AsyncClient() as http:
        await http.post(f"http://{engine.address}/pause")
        assert await engine.adapter.resting(engine.address) is True
        await engine.adapter.wake(engine.address)
        assert await engine.answer()
    async with running("sglang") as engine, httpx.AsyncClient() as http:
        await http.post(f"http://{engine.address}/pause_generation", json={})
        await engine.adapter.wake(engine.address)
        assert await engine.answer()


# --------------------------------------------------------- the stand-ins are as strict


async def call(
    engine: Engine, path: str, body: dict[str, object] | None = None
) -> httpx.Response | None:
    """Call a path; None if the engine ended."""
    async with httpx.AsyncClient() as http:
        try:
            return await http.post(f"http://{engine.address}{path}", json=body)
        except httpx.RemoteProtocolError:
            return None


@pytest.mark.parametrize(
    ("which", "path", "body"),
    [
        ("vllm", "/sleep?level=1", None),
        ("sglang", "/release_memory_occupation", {"tags": ["kv_cache"]}),
    ],
)
async def test_giving_memory_back_under_a_request_ends_the_engine(
    which: Dialect, path: str, body: dict[str, object] | None
) -> None:
    async with running(which, delay_per_token_s=0.05) as engine:
        async with asyncio.TaskGroup() as tasks:
            request = tasks.create_task(alive(engine))
            while not engine.part.running:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            assert await call(engine, path, body) is None
        assert not request.result()
        assert engine.part.crashed


@pytest.mark.parametrize(
    ("which", "calls"),
    [
        ("sglang", [("/resume_memory_occupation", {"tags": ["kv_cache"]})]),
        ("sglang", [("/release_memory_occupation", {})] * 2),
        (
            "sglang",
            [("/release_memory_occupation", {"tags": ["kv_cache"]}), ("/flush_cache", None)],
        ),
        ("vllm", [("/sleep?level=2", None), ("/collective_rpc", {"method": "reload_weights"})]),
    ],
)
async def test_a_wrong_order_ends_the_engine(
    which: Dialect, calls: list[tuple[str, dict[str, object] | None]]
) -> None:
    async with running(which) as engine:
        *first, last = [await call(engine, path, body) for path, body in calls]
        assert all(answer is not None and answer.is_success for answer in first)
        assert last is None
        assert not await alive(engine)


@pytest.mark.parametrize(
    ("which", "calls"),
    [
        ("vllm", [("/sleep?level=2", None), ("/wake_up", None)]),
        (
            "sglang",
            [("/release_memory_occupation", {}), ("/resume_memory_occupation", {})],
        ),
    ],
)
async def test_weights_that_were_dropped_come_back_as_nonsense(
    which: Dialect, calls: list[tuple[str, dict[str, object] | None]]
) -> None:
    async with running(which, habits=Habits(weights_backup=False)) as engine:
        before = await engine.answer()
        for path, body in calls:
            answer = await call(engine, path, body)
            assert answer is not None
            assert answer.is_success
        assert await engine.answer() != before


@pytest.mark.parametrize(
    ("which", "path", "body", "status"),
    [
        ("vllm", "/sleep?levels=2", None, 400),
        ("vllm", "/sleep?level=3", None, 400),
        ("vllm", "/pause?mode=soon", None, 400),
        ("vllm", "/release_kv_cache_memory", None, 500),
        ("vllm", "/collective_rpc", {"method": "nonsense"}, 500),
        ("vllm", "/collective_rpc", {}, 400),
        ("sglang", "/release_memory_occupation", {"tag": ["kv_cache"]}, 400),
        ("sglang", "/release_memory_occupation", {"tags": ["kv"]}, 400),
        ("sglang", "/release_memory_occupation", None, 400),
        ("sglang", "/pause_generation", {"mode": "wait"}, 400),
        ("ollama", "/api/generate", {"model": "other"}, 404),
        ("ollama", "/api/generate", {"model": "model", "keepalive": 0}, 400),
    ],
)
async def test_a_call_that_means_nothing_is_refused(
    which: Dialect, path: str, body: dict[str, object] | None, status: int
) -> None:
    async with running(which) as engine:
        before = await engine.answer()
        answer = await call(engine, path, body)
        assert answer is not None
        assert answer.status_code == status
        assert await engine.answer() == before


async def test_a_token_on_memory_that_is_gone_ends_the_engine() -> None:
    async with running("sglang") as engine:
        await call(engine, "/release_memory_occupation", {})
        assert not await alive(engine)
        assert engine.part.crashed


async def test_vllm_answers_a_wrong_tag_with_success_and_does_nothing() -> None:
    async with running("vllm") as engine:
        await call(engine, "/sleep?level=1")
        answer = await call(engine, "/wake_up?tags=kv")
        assert answer is not None
        assert answer.json() == {"status": "sleeping", "tags": ["kv"]}
        assert engine.part.held == {}


async def test_sglang_without_its_memory_saver_says_done_and_frees_nothing() -> None:
    async with running("sglang", habits=Habits(memory_saver=False)) as engine:
        await engine.adapter.rest(engine.address, "sleep")
        assert engine.part.held.keys() == {"weights", "kv_cache"}
        await engine.adapter.wake(engine.address)
        assert await engine.answer()
