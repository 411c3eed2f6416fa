"""Point-to-point exchange between context ranks: messages, and the keys of a row plan that travel.

A `Transfer` is what one rank sends and receives at one moment. It is committed once, which starts
every message, and waited for once. On gloo the messages are asynchronous works of threads of their
own; on CUDA they run on NCCL's stream, which events order after what the committing stream had
queued, so that attention queued later runs beside them. NCCL takes all messages of a transfer in
one call, in which a rank may send and receive at once without blocking.

`KeyExchange` moves keys and values along a `RowPlan`: at step s rank r receives from r - s and
sends to r + s (mod R), only what some query there sees, and gradients go the opposite way. The
transfers start in one order on all ranks (keys of step s + 1, then gradients of step s), which one
NCCL stream needs in order not to block: all who take part in the first transfer that is not done
have done those before it. An empty message does not travel; both sides know it from the plan.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from lclm.context.plan.row_plan import RowPlan
from lclm_kernels.interval_attention import IntervalPlan, make_plan

# Tags keep kinds of message apart where two ranks exchange several (gloo; NCCL goes by order).
KEYS, GRADIENTS, HEADS, DIGESTS = range(4)

_LOST_KEY = "lclm.context.lost"
_GRACE = timedelta(seconds=3)  # for a rank that failed first to say whom it had lost


class ExchangeError(RuntimeError):
    """A message between context ranks did not arrive; the text names the rank that is lost."""


@dataclass(frozen=True)
class Message:
    """A contiguous buffer for or from a rank of the group."""

    peer: int
    buffer: torch.Tensor


class Transfer:
    """Messages that start together: commit once, wait once, finish once, in this order.

    A gloo message that does not come within the group's timeout raises `ExchangeError`. NCCL waits
    on the stream, not on the host: there a lost rank shows in NCCL's watchdog.

    Args:
        what: shown in errors.
        group: the ranks that `Message.peer` counts.
        tag: kind of message.
        sends, receives: messages of one device; empty ones do not travel.
    """

    def __init__(
        self,
        what: str,
        group: dist.ProcessGroup,
        tag: int,
        sends: Sequence[Message],
        receives: Sequence[Message],
    ) -> None:
        self._what, self._group, self._tag = what, group, tag
        self._arrivals = [message.buffer for message in receives]
        self._receives = [message for message in receives if message.buffer.numel()]
        self._sends = [message for message in sends if message.buffer.numel()]
        self._works: list[dist.Work] = []
        self._state = "new"

    def commit(self) -> None:
        """Start every message; buffers to be sent must not change until `finish`."""
        self._advance("new", "committed")
        operations = [
            dist.P2POp(run, m.buffer, group=self._group, tag=self._tag, group_peer=m.peer)
            for run, messages in ((dist.irecv, self._receives), (dist.isend, self._sends))
            for m in messages
        ]
        # NCCL must get all messages in one call, gloo gets them one by one: an error has one peer.
        is_joint = any(operation.tensor.is_cuda for operation in operations)
        for call in [operations] if is_joint else [[operation] for operation in operations]:
            try:
                self._works += dist.batch_isend_irecv(call)
            except RuntimeError as error:
                self._fail([operation.group_peer for operation in call], error)

    def wait(self) -> list[torch.Tensor]:
        """Wait for what is received and hand it over, in the order of `receives`."""
        self._advance("committed", "received")
        # NCCL gives one work for all messages, gloo one for each.
        is_joint = len(self._works) != len(self._receives) + len(self._sends)
        count = len(self._works) if is_joint else len(self._receives)
        self._wait(count, [*self._receives, *self._sends] if is_joint else self._receives)
        buffers, self._arrivals, self._receives = self._arrivals, [], []
        return buffers

    def finish(self) -> None:
        """Wait until what is sent has left, and let go of it."""
        self._advance("received", "finished")
        self._wait(len(self._works), self._sends)
        self._sends = []

    def _advance(self, before: str, after: str) -> None:
        if self._state != before:
            raise RuntimeError(
                f"{self._what}: the transfer is {self._state} and cannot be {after}; commit, wait "
                "and finish follow one another, each once"
            )
        self._state = after

    def _wait(self, count: int, messages: Sequence[Message]) -> None:
        works, self._works = self._works[:count], self._works[count:]
        for number, work in enumerate(works):
            try:
                work.wait()
            except RuntimeError as error:
                of_work = messages if len(works) != len(messages) else [messages[number]]
                self._fail([message.peer for message in of_work], error)

    def _fail(self, peers: Sequence[int], error: RuntimeError) -> None:
        ranks = sorted({dist.get_global_rank(self._group, peer) for peer in peers})
        lost = _find_lost(ranks[0]) if len(ranks) == 1 else None
        name = f"rank {lost} is lost" if lost is not None else f"one of the ranks {ranks} is lost"
        raise ExchangeError(
            f"{self._what}: {name}; rank {dist.get_rank()} was waiting for rank(s) {ranks} and "
            f"got: {error}"
        ) from error


def start_all_to_all(
    what: str,
    group: dist.ProcessGroup,
    tag: int,
    sent: Sequence[torch.Tensor] | torch.Tensor,
    received: Sequence[torch.Tensor] | torch.Tensor,
    ranks: Sequence[int] | None = None,
) -> Transfer:
    """Commit a message from each of some ranks of the group (None: all) to each other one.

    Entry j of `sent` goes to the j-th of them, entry j of `received` comes from it; this rank's own
    entries are left alone.
    """
    ranks = range(group.size()) if ranks is None else ranks
    peers = [(place, peer) for place, peer in enumerate(ranks) if peer != group.rank()]
    sends = [Message(peer, sent[place]) for place, peer in peers]
    receives = [Message(peer, received[place]) for place, peer in peers]
    transfer = Transfer(what, group, tag, sends, receives)
    transfer.commit()
    return transfer


def _find_lost(peer: int) -> int:
    """The rank that failed first, as far as the ranks have told, starting from a failed peer.

    A rank that fails because of another leaves that one's number in the store before it goes, so
    those who then miss the messenger still learn who was lost. All ranks are global.
    """
    seen = {dist.get_rank()}
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"{_LOST_KEY}/{dist.get_rank()}", str(peer))
        while peer not in seen:
            seen.add(peer)
            store.wait([f"{_LOST_KEY}/{peer}"], _GRACE)
            peer = int(store.get(f"{_LOST_KEY}/{peer}"))
    except dist.DistError:
        # No word from that rank, or the store went with it: it is the one.
        return peer
    return peer


class SideStream:
    """A CUDA stream beside the one that layers run on; on a CPU there is none.

    Buffers that are used here belong to the stream of the layers: they are made before `after` and
    let go after that stream has waited for the messages. So the allocator needs no `record_stream`,
    which would keep every step's buffers until the host sees this stream idle.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def after(self) -> Iterator[None]:
        """Work queued inside starts after what the current stream has now, and runs beside what
        that stream gets later."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield


@dataclass(frozen=True)
class KeyStep:
    """One step of the exchange on one rank. Step 0 stands for its own keys."""

    number: int
    source: int
    num_received: int
    destination: int
    sent: torch.Tensor
    """int64 [tokens], which local tokens travel to `destination`, sorted; on the device."""
    intervals: IntervalPlan
    """What each local query sees of the keys of this step."""


class KeyExchange:
    """The ring's sends and receives of one row on one rank: keys and values out, gradients home.

    It knows for every step which local tokens leave, how many arrive and what each local query sees
    of them. Made once per micro-batch, used by every layer.

    Args:
        plan: of as many ranks as the group has.
        group: may be None where the plan has one rank.
        device: where keys live.
    """

    def __init__(
        self, plan: RowPlan, group: dist.ProcessGroup | None, device: torch.device
    ) -> None:
        rank, size = (group.rank(), group.size()) if group is not None else (0, 1)
        if size != plan.cp_size:
            raise ValueError(
                f"key exchange: the plan is for {plan.cp_size} ranks, the group has {size}"
            )
        self._group, self._side = group, SideStream(device)
        positions = plan.positions(rank)
        own = make_plan(*plan.intervals(rank, rank), len(positions))
        nothing = torch.empty(0, dtype=torch.int64)
        self.local = KeyStep(0, rank, len(positions), rank, nothing, own)
        steps = []
        for number in range(1, size):
            source, destination = (rank - number) % size, (rank + number) % size
            num_received = int(plan.received[rank, source])
            ranges = [
                np.searchsorted(positions, start) + np.arange(end - start)
                for start, end in plan.travels(destination, rank)
            ]
            sent = np.concatenate(ranges) if ranges else np.empty(0, dtype=np.int64)
            intervals = make_plan(*plan.travel_intervals(rank, source), num_received)
            index = torch.from_numpy(sent).to(device)
            steps.append(KeyStep(number, source, num_received, destination, index, intervals))
        self.steps = tuple(steps)
        """Steps 1 .. R - 1, also those in which nothing travels."""

    def fetch(
        self, k_TKH: torch.Tensor, v_TKH: torch.Tensor, is_eager: bool
    ) -> Iterator[tuple[KeyStep, torch.Tensor, torch.Tensor]]:
        """Yield each step with its keys and values `[S, K, H]`, the next ones already on the way.

        The first step is the local one. Drop the tensors before asking for the next step: then
        two steps' keys exist at a time.

        Args:
            k_TKH, v_TKH: local keys and values.
            is_eager: start everything up to the next step that brings keys, so that steps without
                any hide nothing less. Not where gradients are sent in between.
        """
        transfers: list[Transfer] = []

        def commit_to(place: int) -> None:
            while is_eager and place < len(self.steps) and not self.steps[place].num_received:
                place += 1
            for step in self.steps[len(transfers) : place + 1]:
                transfers.append(self._send_keys(step, k_TKH, v_TKH))

        commit_to(0)
        yield self.local, k_TKH, v_TKH
        for place, step in enumerate(self.steps):
            (kv,) = transfers[place].wait()
            if place:
                transfers[place - 1].finish()
            commit_to(place + 1)
            k, v = kv
            del kv
            yield step, k, v
            del k, v
        if transfers:
            transfers[-1].finish()

    def gradients(self, step: KeyStep, grads_2SKH: torch.Tensor) -> Transfer:
        """Send the gradients of the keys and values of a step home; receive those of ours.

        Args:
            grads_2SKH: fp32 `[2, S, K, H]`, of the received keys and values.

        Returns:
            A committed transfer; it brings `[2, tokens of step.sent, K, H]`.
        """
        home = grads_2SKH.new_empty(2, len(step.sent), *grads_2SKH.shape[2:])
        outgoing, incoming = Message(step.source, grads_2SKH), Message(step.destination, home)
        transfer = self._transfer(step, GRADIENTS, outgoing, incoming)
        transfer.commit()
        return transfer

    def _send_keys(self, step: KeyStep, k_TKH: torch.Tensor, v_TKH: torch.Tensor) -> Transfer:
        """Pack and send the keys and values that leave in a step; receive those that arrive."""
        shape = k_TKH.shape[1:]
        packed = k_TKH.new_empty(2, len(step.sent), *shape)
        received = k_TKH.new_empty(2, step.num_received, *shape)
        outgoing, incoming = Message(step.destination, packed), Message(step.source, received)
        transfer = self._transfer(step, KEYS, outgoing, incoming)
        with self._side.after():
            torch.index_select(k_TKH, 0, step.sent, out=packed[0])
            torch.index_select(v_TKH, 0, step.sent, out=packed[1])
            transfer.commit()
        return transfer

    def _transfer(self, step: KeyStep, tag: int, outgoing: Message, incoming: Message) -> Transfer:
        assert self._group is not None  # only a plan of several ranks has steps
        name = "keys" if tag == KEYS else "gradients of keys"
        what = f"context exchange, step {step.number} of {len(self.steps)}, {name}"
        return Transfer(what, self._group, tag, [outgoing], [incoming])
