"""The body of a language model: sessions are rows of keys, values and states, to which steps append tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from split_common.engine.forward import Forward
from split_common.engine.native import compiler, failed, instruction_set
from split_common.engine.runner import Runner
from split_common.engine.sequences import KVSequence, TokenRun
from split_common.errors import Busy, Malformed, Oversized, PromptTooLong, UnknownAdapter
from split_common.models.codecs import CODECS, EXACT
from split_common.models.codecs.base import Codec
from split_common.models.tensors import dtype_name
from split_common.protocol import headers, payloads
from split_common.protocol.capabilities import INDIVISIBLE, POSITION_AXES, SPANS, TREES, UNPADDED
from split_common.trust.shares import Usage
from split_worker.bodies.branches import branches, check_branches
from split_worker.bodies.placement import check_placement, placements
from split_worker.bodies.spread import PlacedRange
from split_worker.watchdog import FIRST_TURN

#: Most rows that one session may have.
MAX_SESSION_ROWS = 256

#: Most rows that all sessions may have beyond one for each.
FURTHER_ROWS = 4096

#: Seconds after which a device may repeat a step that was refused because there are too many rows.
ROWS_RETRY = 0.5

#: Tokens per session for which a worker reports how many sessions fit into its memory.
SESSION_TOKENS = 2048


class Rows:
    """The rows of a session, each with keys, values and states of its own (a `SessionState`).

    Args:
        further: rows of each member's sessions beyond one for each session.
        member: whose session it is.
    """

    def __init__(self, further: Usage | None = None, member: str = "") -> None:
        self.sequences: list[KVSequence] = []
        self._further = further if further is not None else Usage()
        self._member = member
        #: How many of these rows are this session's.
        self._counted = 0
        #: The number of the session's adapter; None without one.
        self.adapter: int | None = None
        #: Why the session did not get the adapter that it asked for; its steps are refused, too.
        self.lacking: UnknownAdapter | None = None
        #: The rows before a step's selection, until the step is answered.
        self._before: list[KVSequence] = []

    @property
    def holds_memory(self) -> bool:
        return bool(self.sequences)

    def begin(self, step: payloads.Step, states: torch.Tensor, runner: Runner) -> list[TokenRun[Any]]:
        """Prepares the rows for a step over states `[tokens, width]`: selects and truncates them as it says.

        The step has passed `check`. If it fails later, its tokens stay until the next step's `start` truncates
        them. What of a tree does not stay is dropped when the forward is launched, and so not at all if the step
        is refused before.

        Raises:
            Busy: there are too many rows, and the member has more than its share of them; nothing was changed.
            Evicted: a row has states that cannot be taken back to the step's start.
        """
        wanted = max((run.row + 1 for run in step.rows), default=0)
        self._count(max(len(self.sequences), len(step.select or ()), wanted))
        if step.select is not None:
            self._select(step.select)
        self.sequences += [runner.store.new_sequence() for _ in range(wanted - len(self.sequences))]
        parts = torch.split(states, [len(run.positions) for run in step.rows])
        runs = []
        placed = placements(step, runner.layers.stack.position_axes)
        for index, (run, part, (axes, spans)) in enumerate(zip(step.rows, parts, placed, strict=True)):
            sequence = self.sequences[run.row]
            parents, kept = branches(step, index)
            if kept is None:
                sequence.truncate(run.start)
            runs.append(
                TokenRun(sequence, part, run.positions, self.adapter, axes, spans, parents=parents, kept=kept)
            )
        return runs

    def check(self, step: payloads.Step, runner: Runner) -> None:
        """Checks a step against the session and the model, by its payload alone.

        Raises:
            Malformed: rows, positions or width do not fit.
            PromptTooLong: a row would exceed the model's positions, or the worker's whole memory.
        """
        source = list(range(len(self.sequences))) if step.select is None else step.select
        if step.width != runner.width:
            raise Malformed(f"hidden states of width {step.width}: the model's width is {runner.width}")
        if any(old >= len(self.sequences) for old in source):
            raise Malformed("a step selects a row that the session does not have")
        numbers = [run.row for run in step.rows]
        if (
            len(set(numbers)) < len(numbers)
            or max([len(source), *(number + 1 for number in numbers)]) > MAX_SESSION_ROWS
        ):
            raise Malformed(f"a step may have each row once, and at most {MAX_SESSION_ROWS} rows")
        lengths = [self.sequences[source[run.row]].length if run.row < len(source) else 0 for run in step.rows]
        for run, length in zip(step.rows, lengths, strict=True):
            if run.start > length:
                raise Malformed(f"a run starts at {run.start}, but its row has {length} tokens")
            tokens = run.start + len(run.positions)
            if max(tokens, max(run.positions) + 1) > runner.max_positions:
                raise PromptTooLong(f"a row exceeds the model's {runner.max_positions} positions")
            if tokens > (most := runner.store.capacity - runner.store.sequence_tokens):
                raise PromptTooLong(f"{tokens} tokens do not fit: the worker has memory for {most}")
        if isinstance(step, payloads.PlacedStep):
            check_placement(step, runner)
        if isinstance(step, payloads.TreeStep):
            check_branches(step, lengths, runner)

    def _select(self, select: list[int]) -> None:
        """Makes row `select[i]` row i. A row that is selected twice is forked."""
        self._before, taken = self.sequences, set[int]()
        self.sequences = []
        for old in select:
            row = self._before[old]
            self.sequences.append(row.fork() if old in taken else row)
            taken.add(old)

    def _count(self, rows: int) -> None:
        """Counts rows that it is to have. Raises Busy if its member would have too many."""
        more = max(0, rows - 1) - self._counted
        if more > 0 and self._further[self._member] + more > self._further.level(FURTHER_ROWS, self._member, more):
            raise Busy("the worker has too many rows", retry_after=ROWS_RETRY)
        self._further.add(self._member, more)
        self._counted += more

    def fork(self) -> Rows:
        twin = Rows(self._further, self._member)
        twin._count(len(self.sequences))
        twin.sequences = [sequence.fork() for sequence in self.sequences]
        twin.adapter = self.adapter
        return twin

    def commit(self) -> None:
        """Frees the rows that the step did not select."""
        _free_all_but(self.sequences, self._before)
        self._before = []
        self._count(len(self.sequences))

    def undo(self) -> None:
        """Reverts the step's selection."""
        if self._before:
            _free_all_but(self._before, self.sequences)
            self.sequences, self._before = self._before, []
        self._count(len(self.sequences))

    def free(self) -> None:
        self.undo()
        _free_all_but([], self.sequences)
        self.sequences = []
        self._count(0)


def _free_all_but(kept: list[KVSequence], sequences: list[KVSequence]) -> None:
    here = set(map(id, kept))
    for sequence in sequences:
        if id(sequence) not in here:
            sequence.free()


class LanguageBody:
    """The layers between a language model's ends (a `Body`).

    Args:
        runner: runs the layers.
        parameter_bytes: bytes of their weights, with those of adapters.
        quantization: says how quantized weights are run; None if they are not quantized.
        adapters: what sessions may ask for, in the order of the adapters' numbers.
        ranges: of the layers, each on a device; empty if all are on one.
    """

    first_turn = FIRST_TURN

    def __init__(
        self,
        runner: Runner,
        parameter_bytes: int,
        quantization: str | None = None,
        adapters: Sequence[payloads.UseAdapter] = (),
        ranges: Sequence[PlacedRange] = (),
    ) -> None:
        self.runner = runner
        self.quantization = quantization
        self.adapters = adapters
        self.ranges = ranges
        self._further = Usage()
        self._numbers = {adapter.root: number for number, adapter in enumerate(adapters)}
        self.parameter_bytes = parameter_bytes
        self.store = runner.store
        self.device, self.dtype = runner.device, runner.dtype
        self.asynchronous = runner.asynchronous
        self.divisible = runner.divisible
        kinds = {
            UNPADDED: runner.padding_matters,
            INDIVISIBLE: runner.indivisible,
            TREES: runner.takes_trees,
            POSITION_AXES: runner.layers.stack.position_axes > 1,
            SPANS: runner.layers.stack.has_spans,
        }
        self.lacks = frozenset(kind for kind, has in kinds.items() if not has)

    def new_state(self, member: str = "") -> Rows:
        return Rows(self._further, member)

    def begin(self, state: Rows, request: payloads.AnyRequest, data: memoryview) -> list[TokenRun[Any]]:
        if isinstance(request, payloads.UseAdapter):
            self._use_adapter(state, request)
            return []
        if not isinstance(request, payloads.Step):
            raise Malformed(f"a {type(request).__name__} for a language model")
        if state.lacking is not None:
            raise state.lacking
        tokens = request.room if isinstance(request, payloads.PaddedStep) else request.tokens
        size = tokens * request.width * self.dtype.itemsize
        if size > headers.MAX_BODY // 2:
            # The answer, in the body's dtype, would not fit into a message.
            raise Oversized(f"a step whose answer has {size} bytes: send it in chunks")
        if isinstance(request, payloads.BriefStep):
            _check_outputs(request)
        if isinstance(request, payloads.PaddedStep) and request.pads:
            _check_size(request)
            data = data[: request.size]
        state.check(request, self.runner)
        states = _codec(request).decode(data, request.dtype, request.tokens, request.width)
        return state.begin(request, states, self.runner)

    def _use_adapter(self, state: Rows, request: payloads.UseAdapter) -> None:
        """Gives a new session an adapter. Raises Malformed if it is not new, or UnknownAdapter."""
        if state.sequences or state.adapter is not None:
            raise Malformed("only the first request of a session may choose its adapter")
        number = self._numbers.get(request.root)
        if number is None:
            names = [adapter.name for adapter in self.adapters]
            # A name from the network: one without control characters.
            asked = repr(request.name)
            why = (
                f"the adapter {asked} here has other tensors or settings"
                if request.name in names
                else f"no adapter {asked} is loaded (loaded: {', '.join(names) or 'none'}): start the worker with "
                "--adapter NAME=DIR"
            )
            state.lacking = UnknownAdapter(why)
            raise state.lacking
        state.adapter = number

    def launch(self, runs: Sequence[TokenRun[Any]]) -> Forward:
        return self.runner.launch(runs)

    def reply(
        self, state: Rows, request: payloads.AnyRequest, output: torch.Tensor
    ) -> tuple[payloads.AnyReply, memoryview | bytes]:
        if not isinstance(request, payloads.Step):
            return payloads.Done(), b""
        codec, dtype = _codec(request), dtype_name(output.dtype)
        if isinstance(request, payloads.BriefStep):
            output = output[request.outputs]
        data = codec.encode(output) if len(output) else b""
        tokens, width = output.shape
        size = len(data)
        if isinstance(request, payloads.PaddedStep) and request.pads:
            data = b"".join((data, bytes((codec.size(dtype, request.room, width) or 0) - size)))
        if not isinstance(request, payloads.CodedStep) or request.codec == "exact":
            return payloads.Result(dtype, tokens, width), data
        return payloads.CodedResult(dtype, tokens, width, codec=request.codec, size=size), data

    def memory(self) -> dict[str, float]:
        return {"kv_tokens": self.store.capacity, "kv_tokens_used": self.store.capacity - self.store.free_tokens}

    def facts(self) -> dict[str, Any]:
        attention = self.runner.executor.attention
        return {
            "kv_tokens": self.store.capacity,
            "kv_sessions": self._kv_sessions,
            "ranges": [
                {"device": str(each.device), "layers": f"{each.first}:{each.last}", "bytes": each.parameter_bytes}
                for each in self.ranges
            ],
            "packed": attention is not None,
            "attention": attention,
            "compiled": self.runner.compiled,
            "tuning": self._tuning,
            "fusion": self.runner.executor.fusion,
            "adapters": [adapter.name for adapter in self.adapters],
        }

    def describe(self, layers: str) -> list[str]:
        kept = "keys, values and states" if self.store.sequence_tokens else "keys and values"
        lines = [
            f"layers {layers} on {self.device.type} in {str(self.dtype).removeprefix('torch.')} "
            f"({self.parameter_bytes:,} bytes of weights; {kept} for {self.store.capacity:,} tokens, "
            f"or {self._kv_sessions:,} sessions of {self._session_tokens:,})"
        ]
        if self.ranges:
            lines.append(f"layers {', '.join(map(str, self.ranges))}")
        if self.quantization is not None:
            lines.append(self.quantization)
        if self._tuning is not None:
            lines.append(f"fastest on this CPU, as measured: {self._tuning}")
        match self.runner.executor.fusion:
            case "fused":
                lines.append(
                    f"layers are fused: computed in one call, by code compiled for this CPU ({instruction_set()})"
                )
            case "compiling":
                lines.append("a C++ compiler is at work, and layers will be fused")
            case None if self._tuning is not None:
                lines.append(f"layers are not fused: {self._unfused_because}")
        if self.adapters:
            lines.append(f"adapters: {', '.join(adapter.name for adapter in self.adapters)}")
        if self.runner.unpacked_because is not None:
            lines.append(f"sessions run one at a time: {self.runner.unpacked_because}")
        if self.runner.indivisible:
            lines.append("prompts are not computed in chunks: in parts, these layers give a different result")
        if self.runner.padding_matters:
            lines.append(
                "rows with padding to their left are refused: for them, these layers give a different result"
            )
        return lines

    @property
    def _unfused_because(self) -> str:
        """Why layers on the CPU are not computed in one call."""
        if self.dtype != torch.float32:
            return f"they compute in {dtype_name(self.dtype)}, and only float32 can be"
        if compiler() is None:
            return "there is no C++ compiler"
        if failed():
            return "the C++ compiler has failed, or its code cannot be loaded; the log says more"
        return "they are not of the usual shape"

    @property
    def _tuning(self) -> str | None:
        """What was measured to be fastest on this CPU; None if nothing was measured."""
        tuning = self.runner.layers.tuning
        return tuning.describe() if tuning.measured else None

    @property
    def _kv_sessions(self) -> int:
        """How many sessions of `_session_tokens` tokens fit into memory, if each has one row."""
        return self.store.capacity // (self._session_tokens + self.store.sequence_tokens)

    @property
    def _session_tokens(self) -> int:
        return min(SESSION_TOKENS, self.runner.max_positions)


def _check_outputs(step: payloads.BriefStep) -> None:
    """Raises Malformed if a step asks for outputs that it does not have, or for one twice."""
    wanted = step.outputs
    if wanted != sorted(set(wanted)) or (wanted and wanted[-1] >= step.tokens):
        raise Malformed(
            f"a step of {step.tokens} tokens asks for outputs that are not those of its tokens, in order"
        )


def _check_size(step: payloads.PaddedStep) -> None:
    """Raises Malformed if a step is not as large as its answer would be, or holds more than it has room for."""
    most = _codec(step).size(step.dtype, step.room, step.width)
    if most is None:
        raise Malformed(f"a step in the codec {step.codec} cannot be padded: its size depends on its states")
    if not (step.tokens <= step.room and step.size <= most <= step.padded):
        raise Malformed(
            f"a step of {step.tokens} tokens and {step.padded} bytes is not padded to one of {step.room} tokens"
        )


def _codec(step: payloads.Step) -> Codec:
    """Encodes the states of a step and of its answer."""
    return CODECS[step.codec if isinstance(step, payloads.CodedStep) else EXACT]
