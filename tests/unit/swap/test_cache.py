"""Is a cache worth a live dump?"""

from swapserve.swap.cache import CacheValue

PROMPT_BYTES = 40_000  # 10,000 tokens
PREFILL_S = 10.0
FOOTPRINT = 2_000_000_000  # a first dump is guessed at 2 s


def chat(cache: CacheValue, turns: int, *, prefix: int = 1) -> None:
    for _ in range(turns):
        cache.served(
            bytes_in=PROMPT_BYTES, bytes_out=400, stream=False, prefix=prefix, prefill_s=PREFILL_S
        )


def test_a_long_conversation_is_worth_keeping() -> None:
    cache = CacheValue()
    chat(cache, 5)
    assert cache.worth_keeping(FOOTPRINT)


def test_nothing_is_worth_keeping_before_anything_was_learnt() -> None:
    assert not CacheValue().worth_keeping(FOOTPRINT)


def test_conversations_that_never_come_back_are_not_worth_it() -> None:
    cache = CacheValue()
    for prefix in range(40):
        cache.emptied()
        chat(cache, 1, prefix=prefix)
    assert cache.reuse < 0.01
    assert not cache.worth_keeping(FOOTPRINT)


def test_a_dump_that_takes_longer_than_the_prefill_saves_is_not_made() -> None:
    cache = CacheValue()
    chat(cache, 2)
    cache.dumped(1000.0)
    assert not cache.worth_keeping(FOOTPRINT)


def test_a_new_process_starts_with_an_empty_cache() -> None:
    cache = CacheValue()
    chat(cache, 5)
    cache.emptied()
    assert not cache.worth_keeping(FOOTPRINT)


def test_a_stream_is_not_taken_for_more_tokens_than_it_has() -> None:
    plain, stream = CacheValue(), CacheValue()
    for cache, streamed in ((plain, False), (stream, True)):
        cache.served(bytes_in=400, bytes_out=20_000, stream=streamed, prefix=1, prefill_s=None)
    assert stream.tokens < plain.tokens / 10
