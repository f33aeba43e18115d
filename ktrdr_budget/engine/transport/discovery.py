"""Where the server of a tenant's slot is: told by the sentinels, or by the nodes of a cluster.

Both are asked all at once, with a short deadline, and what they say is weighed: one that is dead, that hangs, or that a
partition cut off from the others must not delay or mislead. (redis-py's own Sentinel asks one after another, and
believes the first that answers; its RedisCluster sends no scripts through a pipeline and knows nothing of deadlines.)
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ktrdr_budget.engine.transport.connection import TRUSTED_IDLE_S
from ktrdr_budget.engine.transport.credentials import Credentials
from ktrdr_budget.engine.transport.node import connection_to
from ktrdr_budget.engine.transport.urls import Address, StoreUrl
from ktrdr_budget.engine.transport.wrong_protocol import WrongProtocol

__all__ = ["ClusterDiscovery", "Discovery", "PrimaryNotFound", "DiscoveryRefused", "SentinelDiscovery"]

ANSWER_S = 0.5
"""How long one node has to connect and answer, each."""
_LAST_ANSWERS_S = 0.05
"""How much longer the last ones have, once most have answered."""
_ASKED_MAX = 8
_SLOTS = ("CLUSTER", "SLOTS")


class PrimaryNotFound(Exception):
    """There is no server to be found now; ``known`` if that is what the answers say, not for want of answers."""

    def __init__(self, message: str, known: bool) -> None:
        super().__init__(message)
        self.known = known


class DiscoveryRefused(Exception):
    """All that answered refuse to tell, in these words."""


class _Source:
    """One node that is asked, on a connection of its own that stays.

    Commands go past redis-py's client, which an instrumentation may watch: these are nobody's requests.
    """

    def __init__(self, url: str, credentials: Credentials | None = None) -> None:
        self._url = url
        self._credentials = credentials
        self._connection: Any = None
        self._answered_s = 0.0
        self._turn = asyncio.Lock()

    async def ask(self, commands: Sequence[Sequence[str]]) -> list[Any]:
        """The answers to some commands, within a short time.

        Raises:
            OSError, TimeoutError, redis.RedisError: there are none, or one is an error.
        """
        import redis

        async with asyncio.timeout(ANSWER_S), self._turn:
            if asyncio.get_running_loop().time() - self._answered_s > TRUSTED_IDLE_S:
                await self.close()
            if self._connection is not None:
                try:
                    return await self._ask(commands)
                except (ConnectionError, redis.ConnectionError):
                    pass  # it has ended since it was used last
            self._connection = connection_to(self._url, self._credentials)
            return await self._ask(commands)

    async def _ask(self, commands: Sequence[Sequence[str]]) -> list[Any]:
        try:
            await self._connection.connect()
            for words in commands:
                await self._connection.send_command(*words)
            answers = [await self._connection.read_response() for _ in commands]
            self._answered_s = asyncio.get_running_loop().time()
            return answers
        except BaseException:  # also of an answer that is an error: the next is not waited for
            await self.close()
            raise

    async def listen(self, channels: Sequence[str], told: Callable[[], None]) -> None:
        """Tells of each message on these channels, on another connection, as long as that stands."""
        connection = connection_to(self._url, self._credentials)
        try:
            await connection.connect()
            await connection.send_command("SUBSCRIBE", *channels)
            while True:
                message = await connection.read_response()
                if message and message[0] == b"message":
                    told()
        finally:
            await connection.disconnect(nowait=True)

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)


class Discovery:
    """Finds the server, and notices when it is another one."""

    look_every_s = 1.0
    always_looks = False
    """Whether to look without a reason, too: nobody else tells that the server is not the right one any more."""

    def __init__(self, url: StoreUrl, credentials: Credentials | None = None) -> None:
        self.url = url
        self._credentials = credentials
        self._sources: dict[Address, _Source] = {}

    async def find(self, suspect: Address | None) -> Address:
        """Where the server is now.

        Args:
            suspect: the one that has failed just now, or ``None``.

        Raises:
            PrimaryNotFound: there is none, or nobody tells.
            DiscoveryRefused: nobody is willing to tell this user, or it is no such store.
        """
        raise NotImplementedError

    async def listen(self, told: Callable[[], None]) -> None:
        """Tells as soon as the server may be another; ends never."""
        await asyncio.Event().wait()

    def learn(self, address: Address) -> None:
        """A server that belongs to the store, as another has said."""

    async def close(self) -> None:
        """Ends the connections to those that were asked."""
        for source in self._sources.values():
            await source.close()
        self._sources.clear()

    def _source_url(self, address: Address) -> str:
        return self.url.at(address)

    def _source(self, address: Address) -> _Source:
        source = self._sources.get(address)
        if source is None:
            source = self._sources[address] = _Source(self._source_url(address), self._credentials)
        return source

    async def _ask_all(self, addresses: Iterable[Address], *commands: Sequence[str]) -> list[tuple[Address, Any]]:
        """What each has answered, an exception being an answer too; without those from whom nothing came."""
        asked = {asyncio.ensure_future(self._source(address).ask(commands)): address for address in addresses}
        loop = asyncio.get_running_loop()
        pending, answers, ends = set(asked), list[tuple[Address, Any]](), loop.time() + ANSWER_S
        try:
            while pending and (left_s := ends - loop.time()) > 0:
                done, pending = await asyncio.wait(pending, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    answers.append((asked[task], task.exception() or task.result()))
                given = sum(not isinstance(answer, Exception) for _, answer in answers)
                if 2 * given > len(asked):
                    ends = min(ends, loop.time() + _LAST_ANSWERS_S)
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        return answers

    def _nothing(self, answers: Iterable[tuple[Address, Any]], who: str) -> Exception:
        """Why no answer was of use."""
        from redis.exceptions import AuthenticationError, ResponseError

        errors = [answer for _, answer in answers if isinstance(answer, Exception)]
        refusals = [error for error in errors if isinstance(error, (ResponseError, AuthenticationError, WrongProtocol))]
        passing = ("LOADING", "MASTERDOWN", "CLUSTERDOWN")
        if refusals and not any(str(error).startswith(passing) for error in refusals):
            return DiscoveryRefused(str(refusals[0]))
        causes = sorted({str(error).split(":", 1)[0][:100] or type(error).__name__ for error in errors})
        return PrimaryNotFound(f"{who} answers{': ' if causes else ''}{'; '.join(causes)}", known=False)


class _View:
    """What one sentinel knows of the master.

    Args:
        state: the flat answer of ``SENTINEL MASTER``, which names the old master as long as replicas are being told
            of the new one.
        named: the answer of ``SENTINEL GET-MASTER-ADDR-BY-NAME``, which names the new one as soon as it is promoted.
    """

    def __init__(self, state: list[bytes], named: list[bytes]) -> None:
        fields = dict(zip(state[::2], state[1::2], strict=True))
        self.address: Address = (named[0].decode(), int(named[1]))
        self.epoch = int(fields[b"config-epoch"])
        self.promotes = (fields[b"ip"].decode(), int(fields[b"port"])) != self.address
        self.down = b"o_down" in fields[b"flags"].split(b",") and not self.promotes


class SentinelDiscovery(Discovery):
    """The master of a service, by the newest knowledge among the sentinels."""

    always_looks = True

    def _source_url(self, address: Address) -> str:
        return self.url.sentinel_at(address)

    async def find(self, suspect: Address | None) -> Address:
        """See :class:`Discovery`. A master whom the sentinels have agreed to be down is none any more."""
        service = self.url.service
        commands = ("SENTINEL", "MASTER", service), ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", service)
        answers = await self._ask_all(self.url.hosts, *commands)
        views = [_View(*answer) for _, answer in answers if isinstance(answer, list)]
        if not views:
            raise self._nothing(answers, "no sentinel")
        # The epoch grows with each failover: a sentinel that was cut off has missed it, and names the old master still.
        named = max(views, key=lambda view: (view.epoch, view.promotes)).address
        if any(view.address == named and view.down for view in views):
            raise PrimaryNotFound(f"the sentinels have seen that {service} is down", known=True)
        return named

    async def listen(self, told: Callable[[], None]) -> None:
        """See :class:`Discovery`."""
        channels = ("+switch-master", "+promoted-slave", "+odown")

        async def listen_to(address: Address) -> None:
            while True:
                with contextlib.suppress(Exception):
                    await _Source(self._source_url(address)).listen(channels, told)
                await asyncio.sleep(self.look_every_s)

        await asyncio.gather(*map(listen_to, self.url.hosts))


class ClusterDiscovery(Discovery):
    """The master of a slot, by the first node whose answer does not name one that has failed just now.

    Args:
        slot: of the tenant whose batches the store gets.
    """

    look_every_s = 0.5

    def __init__(self, url: StoreUrl, slot: int, credentials: Credentials | None = None) -> None:
        super().__init__(url, credentials)
        self._slot = slot
        self._nodes: list[Address] = []
        """Those of the last answer."""

    def learn(self, address: Address) -> None:
        """See :class:`Discovery`."""
        if address not in self._nodes:
            self._nodes.append(address)

    async def find(self, suspect: Address | None) -> Address:
        """See :class:`Discovery`."""
        known = [*dict.fromkeys((*self._nodes, *self.url.hosts))]
        others = [address for address in known if address != suspect]
        answers = await self._ask_all(random.sample(others, min(_ASKED_MAX, len(others))), _SLOTS)
        if suspect in known and not any(isinstance(answer, list) for _, answer in answers):
            answers += await self._ask_all([suspect], _SLOTS)
        owners = [owner for address, answer in answers if (owner := self._owner(answer, address)) is not None]
        await self._forget_all_but({*self._nodes, *self.url.hosts})
        if not owners:
            if any(isinstance(answer, list) for _, answer in answers):
                raise PrimaryNotFound(f"no node of the cluster serves slot {self._slot}", known=True)
            raise self._nothing(answers, "no node of the cluster")
        return next((owner for owner in owners if owner != suspect), owners[0])

    def _owner(self, answer: Any, asked: Address) -> Address | None:
        """Whom this answer names; takes note of all nodes in it."""
        found, nodes = None, list[Address]()
        for first, last, *members in answer[0] if isinstance(answer, list) else ():
            places = [_place(member, asked) for member in members]
            nodes += [place for place in places if place is not None]
            if first <= self._slot <= last and places:
                found = places[0]
        if found is not None:
            self._nodes = [*dict.fromkeys(nodes)]
        return found

    async def _forget_all_but(self, nodes: set[Address]) -> None:
        for address in [address for address in self._sources if address not in nodes]:
            await self._sources.pop(address).close()


def _place(member: list[Any], asked: Address) -> Address | None:
    """An address of ``CLUSTER SLOTS``; a node that does not know its own name is where it was asked."""
    host = (member[0] or b"").decode()
    return None if host == "?" else (host or asked[0], int(member[1]))
