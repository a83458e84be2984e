"""What a worker holds for images between requests: embeddings, and steps and outputs that travel in parts."""

from __future__ import annotations

from collections import OrderedDict

from split_common.errors import Malformed, NeedEmbeddings, Oversized
from split_common.models.denoisers.spec import StepConditioning
from split_common.protocol import payloads
from split_common.trust.shares import Usage

#: Bytes that are held by default.
HELD_BYTES = 1024**3

#: Most embeddings, steps and outputs held at once, because small ones take more memory than their bytes.
MAX_HELD = 8192

#: Keys of what is held of a session beside embeddings: the parts of a step so far, and an output sent in parts.
PARTS, OUTPUT = b"parts", b"output"


class ImageState:
    """A session of images (a `SessionState`). `HeldArrays` holds its arrays, with this object in their keys.

    A refused step leaves nothing to undo, because what is held may be forgotten at any time.
    """

    holds_memory = False
    sequences = ()

    def __init__(self, held: HeldArrays, member: str = "") -> None:
        self._held = held
        self.member = member

    def fork(self) -> ImageState:
        return ImageState(self._held, self.member)

    def commit(self) -> None: ...

    def undo(self) -> None: ...

    def free(self) -> None:
        self._held.forget(self)


class HeldArrays:
    """What is held for images, by session and key. The member that has most of it loses first.

    Of its own, it loses what it used least recently.

    Used by the thread that computes.

    Args:
        memory: most bytes to hold; a single item may be larger.
    """

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._held: OrderedDict[tuple[ImageState, bytes], StepConditioning | bytearray | bytes] = OrderedDict()
        # Bytes and items of each member.
        self._bytes = Usage()
        self._items = Usage()

    @property
    def used(self) -> int:
        """Bytes that are held."""
        return self._bytes.total

    def put(self, state: ImageState, key: bytes, held: StepConditioning | bytearray | bytes) -> None:
        self._take(state, key)
        self._held[state, key] = held
        self._bytes.add(state.member, _size(held))
        self._items.add(state.member, 1)
        while len(self._held) > 1 and (len(self._held) > MAX_HELD or self.used > self._memory):
            share = self._items if len(self._held) > MAX_HELD else self._bytes
            others = (place for place in self._held if place != (state, key))
            self._take(*max(others, key=lambda place: share[place[0].member]))

    def _take(self, state: ImageState, key: bytes) -> StepConditioning | bytearray | bytes | None:
        """Takes out what is held under a key; None if nothing is."""
        held = self._held.pop((state, key), None)
        if held is not None:
            self._bytes.add(state.member, -_size(held))
            self._items.add(state.member, -1)
        return held

    def conditioning(self, state: ImageState, key: bytes) -> StepConditioning:
        """What an image is conditioned on. Raises NeedEmbeddings if it is not held."""
        held = self._held.get((state, key))
        if not isinstance(held, StepConditioning):
            raise NeedEmbeddings("the worker does not hold the embeddings of this image")
        self._held.move_to_end((state, key))
        return held

    def extend(self, state: ImageState, offset: int, data: memoryview) -> None:
        """Appends bytes of a step to those that are held.

        Raises:
            NeedEmbeddings: the bytes before them are not held.
            Oversized: the step would have more than `payloads.MAX_STEP` bytes.
        """
        held = self._take(state, PARTS) if offset else None
        held = held if isinstance(held, bytearray) else bytearray()
        if len(held) != offset:
            raise NeedEmbeddings("the worker does not hold the parts of this step that came before")
        if offset + len(data) > payloads.MAX_STEP:
            raise Oversized(f"a step of more than {payloads.MAX_STEP} bytes")
        held += data
        self.put(state, PARTS, held)

    def whole(self, state: ImageState, sent: int, data: memoryview) -> memoryview:
        """All bytes of a step, of which `sent` came before. Raises NeedEmbeddings if those are not held."""
        held = self._take(state, PARTS)
        self._take(state, OUTPUT)
        if not sent:
            return data
        if not isinstance(held, bytearray) or len(held) != sent:
            raise NeedEmbeddings("the worker does not hold the parts of this step that came before")
        held += data
        return memoryview(held)

    def output(self, state: ImageState, offset: int, size: int) -> bytes:
        """The bytes `[offset, offset + size)` of the last step's output.

        Raises:
            NeedEmbeddings: the output is not held.
            Malformed: it ends before that.
        """
        held = self._held.get((state, OUTPUT))
        if not isinstance(held, bytes):
            raise NeedEmbeddings("the worker does not hold the output of this step")
        if offset + size > len(held):
            raise Malformed(f"bytes up to {offset + size} of an output that has {len(held)}")
        return held[offset : offset + size]

    def forget(self, state: ImageState) -> None:
        for place in [place for place in self._held if place[0] is state]:
            self._take(*place)


def _size(held: StepConditioning | bytearray | bytes) -> int:
    return held.nbytes if isinstance(held, StepConditioning) else len(held)
