"""What an engine's cache of prompts is worth: the seconds of prefill it is expected to save. Pure.

For each conversation that it holds: tokens, times seconds of prefill per token, times the chance
that the conversation goes on. That chance is learnt per API key, from how many requests continue
a conversation, and per conversation, from how often it has come back; it falls as the silence
gets longer than the key's usual pauses.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping
from itertools import islice
from typing import Any

from swapserve.ids import EngineName
from swapserve.messages import Ask, Used
from swapserve.scheduler.knowledge.bounded import Bounded
from swapserve.scheduler.knowledge.delay import Delay
from swapserve.scheduler.knowledge.stored import number, objects, valid

ENGINES_MAX = 1024
KEYS_MAX = 32
"""Of one engine."""
REMEMBERED = 256
"""Conversations of one engine of which it is known that they have been there."""
HELD = 32
"""The latest of them, which are taken to be in its cache."""
FIRST_REUSE = 0.3
REUSE_WEIGHT = 0.1
KEY_WEIGHT = 2.0
"""What a key tells of its conversations, in comebacks of a single one."""
FIRST_PAUSE_S = 60.0
FORGET = 0.9
"""Weight of earlier prefills, at each new one."""
OUTLIER = 4.0
"""Times the rate so far; a prefill beyond counts as if it were just there."""
FRESH_SHARE = 0.03
FRESH_S = 2.0
"""All conversations are looked at anew once the silence has grown by that share, and so many
seconds; in between only those that go on."""


class _Key:
    __slots__ = ("pause", "reuse")

    def __init__(self) -> None:
        self.reuse = FIRST_REUSE
        self.pause = Delay(FIRST_PAUSE_S)


class _Talk:
    __slots__ = ("at", "comebacks", "key", "tokens")

    def __init__(self, key: _Key) -> None:
        self.key = key
        self.at = 0.0
        self.comebacks = 0
        self.tokens = 0.0
        """That the cache holds of it."""

    def wanted(self, now: float) -> float:
        """Return its tokens in the cache, times the chance that it goes on."""
        if not self.tokens:
            return 0.0
        chance = KEY_WEIGHT * self.key.reuse + self.comebacks
        chance /= KEY_WEIGHT + self.comebacks
        later = chance * self.key.pause.longer(now - self.at)
        return self.tokens * later / (later + 1.0 - chance) if later else 0.0


class _Engine:
    __slots__ = ("fresh_until", "keys", "prefill_s", "prefill_tokens", "talks", "wanted")

    def __init__(self) -> None:
        self.keys: Bounded[str, _Key] = Bounded(KEYS_MAX, _Key)
        self.talks: OrderedDict[int, _Talk] = OrderedDict()
        self.prefill_s = 0.0
        self.prefill_tokens = 0.0
        self.wanted = 0.0
        """Tokens in the cache that are expected to be asked for again, as of the latest look."""
        self.fresh_until = -math.inf

    def prefilled(self, tokens: float, seconds: float) -> None:
        """Take in what a prompt took of which the cache held nothing."""
        if self.prefill_tokens:
            usual = tokens * self.prefill_s / self.prefill_tokens
            if usual > 0.0:
                seconds = min(seconds, usual * OUTLIER)
        self.prefill_s = FORGET * self.prefill_s + seconds
        self.prefill_tokens = FORGET * self.prefill_tokens + tokens

    def silent_s(self, now: float) -> float:
        """Return how long no conversation has gone on."""
        return now - next(reversed(self.talks.values())).at if self.talks else 0.0

    def look(self, now: float) -> None:
        """Take in that time has passed."""
        if now >= self.fresh_until:
            held = islice(reversed(self.talks.values()), HELD)
            self.wanted = sum(talk.wanted(now) for talk in held)
            self.fresh_until = now + max(FRESH_SHARE * self.silent_s(now), FRESH_S)


class Caches:
    """Worth of the engines' caches."""

    def __init__(self) -> None:
        self._engines: Bounded[EngineName, _Engine] = Bounded(ENGINES_MAX, _Engine)

    def served(self, engine: EngineName, ask: Ask, used: Used, now: float) -> None:
        """Take in a request that was answered to its end."""
        tokens_in, tokens_out = used.tokens_in, used.tokens_out
        if not (valid(tokens_in) and valid(tokens_out)):
            return
        known = self._engines[engine]
        talks = known.talks
        talk = talks.get(ask.conversation) if ask.conversation else None
        prefill_s = used.prefill_s
        if prefill_s is not None and valid(prefill_s) and (talk is None or not talk.tokens):
            known.prefilled(max(tokens_in, 1.0), prefill_s)
        if not ask.conversation:
            return
        key = known.keys[ask.key]
        key.reuse += REUSE_WEIGHT * ((talk is not None) - key.reuse)
        if talk is not None:
            known.wanted -= talk.wanted(now)
            talk.comebacks += 1
            key.pause.add(max(0.0, now - talk.at))
            talks.move_to_end(ask.conversation)
        else:
            if len(talks) >= REMEMBERED:
                talks.popitem(last=False)
            talk = talks[ask.conversation] = _Talk(key)
        talk.key = key
        talk.at = now
        talk.tokens = tokens_in + tokens_out
        known.wanted += talk.wanted(now)

    def emptied(self, engine: EngineName) -> None:
        """Take in that the engine's process is new, or has given up its cache."""
        if (known := self._engines.find(engine)) is not None:
            for talk in known.talks.values():
                talk.tokens = 0.0
            known.wanted = 0.0

    def worth_s(self, engine: EngineName, now: float) -> float:
        """Return the seconds of prefill that the cache is expected to save if it is kept."""
        known = self._engines.find(engine)
        if known is None or not known.prefill_tokens:
            return 0.0
        known.look(now)
        return max(0.0, known.wanted) * known.prefill_s / known.prefill_tokens

    # ------------------------------------------------------------------ storing

    def as_json(self) -> dict[str, Any]:
        """Return the stored form.

        What a cache holds is not part of it, nor are conversations: only how they usually go.
        """
        return {
            name: {
                "prefill_s": known.prefill_s,
                "prefill_tokens": known.prefill_tokens,
                "keys": {
                    key: {"reuse": usual.reuse, **usual.pause.as_json()}
                    for key, usual in known.keys.items()
                },
            }
            for name, known in self._engines.items()
        }

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> "Caches":
        """Build from the stored form; what makes no sense is left out."""
        caches = cls()
        for name, stored in objects(data, ENGINES_MAX):
            known = caches._engines[EngineName(name)]
            seconds, tokens = number(stored.get("prefill_s")), number(stored.get("prefill_tokens"))
            if seconds is not None and tokens is not None and tokens >= 1.0:
                known.prefill_s, known.prefill_tokens = seconds, tokens
            for key, item in objects(stored.get("keys"), KEYS_MAX):
                reuse = number(item.get("reuse"))
                if reuse is not None and reuse <= 1.0:
                    usual = known.keys[key]
                    usual.reuse = reuse
                    usual.pause.read(item)
        return caches
