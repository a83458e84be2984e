"""The protocol's messages: what is encoded is decoded, and nothing else is."""

from __future__ import annotations

import struct
import tracemalloc

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from split_common.errors import Malformed, Oversized, ProtocolError, VersionMismatch
from split_common.protocol import encoding, headers, payloads

_peers = st.binary(min_size=8, max_size=8)
_naturals = st.integers(0, 2**62 - 1)
_sessions = _naturals | st.binary(min_size=16, max_size=16)
_services = st.builds(headers.Service, st.binary(min_size=32, max_size=32), _naturals, _naturals)
_headers = st.one_of(
    st.builds(
        headers.Announce,
        _peers,
        st.sampled_from(["device", "worker"]),
        st.text(max_size=512),
        _naturals,
        st.lists(_peers, max_size=20),
        st.none() | _services,
        st.text(max_size=512),
        _naturals,
        st.booleans(),
    ),
    st.builds(headers.Welcome, _peers, _naturals, st.lists(_peers, max_size=20)),
    st.just(headers.Probe()),
    st.builds(headers.RosterRequest, _peers),
    st.just(headers.RosterReply()),
    st.builds(headers.Open, _peers, _naturals, _services, st.lists(_peers, max_size=64)),
    st.builds(
        headers.Relay,
        *(_peers, _peers, st.sampled_from(headers.RelayKind), _naturals, _sessions),
        *[_naturals] * 3,
    ),
    st.builds(
        headers.Bounce,
        st.sampled_from(["no-worker", "busy", "gone", "full", "revoked"]),
        *(_naturals, _sessions, _naturals),
        _peers,
        st.text(max_size=50),
        st.floats(0, 60),
    ),
)
_rows = st.lists(
    st.builds(
        payloads.Run, st.integers(0, 4095), _naturals, st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5)
    ),
    max_size=5,
)
_arrays = st.builds(
    payloads.Array,
    st.sampled_from(sorted(payloads.CODEC_BITS)),
    st.lists(st.integers(1, 4), min_size=2, max_size=4),
    st.booleans(),
)
_keys = st.binary(min_size=32, max_size=32)
_requests = st.one_of(
    st.builds(
        payloads.Conditioning,
        _keys,
        st.lists(_arrays, min_size=1, max_size=3),
        st.lists(st.floats(allow_nan=False), max_size=5),
    ),
    st.builds(payloads.TensorPart, _naturals, st.integers(1, 5000)),
    st.builds(payloads.PartRequest, _naturals, st.integers(1, payloads.PART_BYTES)),
    st.builds(
        payloads.Denoise,
        st.none() | _keys,
        st.lists(st.integers(-1, payloads.MAX_IMAGE_ROWS - 1), min_size=1, max_size=9),
        st.lists(_arrays, min_size=2, max_size=5),
        st.sampled_from(sorted(payloads.CODEC_BITS)),
        _naturals,
        st.integers(0, 5000),
    ),
    st.builds(
        payloads.Step,
        st.sampled_from(sorted(payloads.DTYPES)),
        st.integers(1, 64),
        _rows,
        st.none() | st.lists(st.integers(0, 2**40), max_size=9),
        _naturals,
    ),
    st.builds(
        payloads.PlacedStep,
        st.sampled_from(sorted(payloads.DTYPES)),
        st.integers(1, 64),
        _rows,
        axes=st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=9), max_size=5),
        spans=st.lists(
            st.builds(payloads.Span, st.integers(0, 4095), _naturals, st.integers(2, payloads.MAX_SPAN)), max_size=5
        ),
    ),
    st.builds(payloads.Fork, _sessions, _naturals),
    st.just(payloads.Close()),
)


def _tensor(payload: payloads.Payload) -> bytes:
    return bytes(range(256)) * (payload.tensor_bytes // 256 + 1)


@given(_headers)
@settings(max_examples=300, deadline=None)
def test_headers_come_back_as_they_were(header: headers.Header) -> None:
    assert headers.decode_header(headers.encode_header(header)) == header


@given(st.binary(max_size=200))
@settings(max_examples=1000, deadline=None)
def test_any_bytes_are_a_header_or_refused(frame: bytes) -> None:
    for candidate in (frame, bytes((headers.VERSION,)) + frame):
        try:
            headers.decode_header(candidate)
        except ProtocolError:
            continue


@given(_headers, st.data())
@settings(max_examples=1000, deadline=None)
def test_a_damaged_header_is_another_one_or_refused(header: headers.Header, data: st.DataObject) -> None:
    frame = bytearray(headers.encode_header(header))
    index = data.draw(st.integers(0, len(frame) - 1))
    if data.draw(st.booleans()):
        del frame[index:]
    else:
        frame[index] ^= 1 << data.draw(st.integers(0, 7))
    try:
        assert headers.decode_header(bytes(frame)) != header
    except ProtocolError:
        return


def test_headers_of_another_version_or_size_are_refused_by_name() -> None:
    frame = headers.encode_header(headers.Probe())
    with pytest.raises(VersionMismatch, match="version 3"):
        headers.decode_header(b"\x03" + frame[1:])
    with pytest.raises(Oversized):
        headers.decode_header(frame + bytes(headers.MAX_HEADER))
    with pytest.raises(Malformed, match="empty"):
        headers.decode_header(b"")
    with pytest.raises(Oversized):
        headers.check_body(bytes(headers.MAX_BODY + 1))
    assert headers.check_body(bytes(headers.MAX_BODY))


def in_version(version: int, header: headers.Header) -> bytes:
    """A header whose first byte says that it is of this version."""
    return bytes((version,)) + headers.encode_header(header)[1:]


def test_version_1_has_no_session_keys() -> None:
    relay = headers.Relay(bytes(8), bytes(8), headers.RelayKind.REQUEST, 1, 2)
    keyed = msgspec.structs.replace(relay, session=bytes(16))
    assert [headers.encode_header(header)[0] for header in (headers.Probe(), relay, keyed)] == [1, 1, 2]
    assert headers.decode_header(in_version(headers.VERSION, headers.Probe())) == headers.Probe()
    with pytest.raises(Malformed, match="session key in a header of version 1"):
        headers.decode_header(in_version(headers.VERSION_1, keyed))
    for wrong in (bytes(15), bytes(17), -1, 2**62, None):
        with pytest.raises(Malformed):
            headers.decode_header(headers.encode_header(msgspec.structs.replace(relay, session=wrong)))


def test_a_header_nested_too_deeply_is_malformed() -> None:
    """An unknown element of a service is skipped, and skipping recurses."""
    deep = b"\x91" * 60_000 + b"\x01"
    service = msgspec.msgpack.encode((bytes(32), 0, 1))
    head = msgspec.msgpack.encode((6, bytes(8), 1))
    nested = bytes((headers.VERSION, head[0] + 1)) + head[1:] + bytes((service[0] + 1,)) + service[1:] + deep
    with pytest.raises(Malformed):
        headers.decode_header(nested)


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0, 1e9])
def test_a_peer_cannot_ask_for_an_impossible_wait(seconds: float) -> None:
    with pytest.raises(Malformed):
        headers.decode_header(headers.encode_header(headers.Bounce("full", retry_after=seconds)))
    with pytest.raises(Malformed):
        encoding.decode_payload(
            encoding.encode_payload(payloads.Refusal("busy", "", seconds)), encoding.reply_decoder
        )


def test_announcements_are_bounded_in_what_they_watch() -> None:
    most = headers.Announce(bytes(8), "device", "d", watching=[bytes(8)] * headers.MAX_WATCHED)
    assert headers.decode_header(headers.encode_header(most)) == most
    more = headers.Announce(bytes(8), "device", "d", watching=[bytes(8)] * (headers.MAX_WATCHED + 1))
    with pytest.raises(Malformed):
        headers.decode_header(headers.encode_header(more))


# --- payloads ----------------------------------------------------------------------------------------------


@given(_requests, st.sampled_from([0, 16, 32]))
@settings(max_examples=300, deadline=None)
def test_payloads_come_back_with_their_tensor(payload: payloads.Payload, overhead: int) -> None:
    tensor = _tensor(payload)[: payload.tensor_bytes]
    body = encoding.encode_payload(payload, tensor, overhead=overhead)
    assert encoding.padded_size(len(body) + overhead) == len(body) + overhead
    decoded, found = encoding.decode_payload(body, encoding.request_decoder)
    assert decoded == payload
    assert bytes(found) == tensor


@pytest.mark.parametrize(
    "step",
    [
        payloads.Step("float32", 4, [payloads.Run(0, 0, list(range(300, 100_300)))]),
        payloads.Step("float32", 4, [payloads.Run(row, 0, [300]) for row in range(4096)]),
    ],
    ids=["positions", "rows"],
)
def test_what_a_payload_takes_in_memory_is_not_underestimated(step: payloads.Step) -> None:
    body = msgspec.msgpack.encode(step)
    body = struct.pack("<I", len(body)) + body
    decoder = msgspec.msgpack.Decoder(payloads.AnyRequest)
    tracemalloc.start()
    try:
        kept = decoder.decode(memoryview(body)[4:])
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept == step
    assert taken + len(body) <= encoding.held_bytes(body) <= 100 * (taken + len(body))


@given(_requests, st.data())
@settings(max_examples=1000, deadline=None)
def test_a_damaged_payload_is_refused_or_fits_its_body(payload: payloads.Payload, data: st.DataObject) -> None:
    body = bytearray(encoding.encode_payload(payload, _tensor(payload)[: payload.tensor_bytes]))
    index = data.draw(st.integers(0, len(body) - 1))
    if data.draw(st.booleans()):
        del body[index:]
    else:
        body[index] ^= 1 << data.draw(st.integers(0, 7))
    try:
        decoded, tensor = encoding.decode_payload(bytes(body), encoding.request_decoder)
    except ProtocolError:
        return
    assert len(tensor) == decoded.tensor_bytes <= len(body)


@given(st.binary(max_size=300))
@settings(max_examples=1000, deadline=None)
def test_any_bytes_are_a_payload_or_refused(body: bytes) -> None:
    for decoder in (encoding.request_decoder, encoding.reply_decoder):
        try:
            encoding.decode_payload(body, decoder)
        except ProtocolError:
            continue


def test_a_payload_cannot_name_a_tensor_that_is_not_there() -> None:
    huge = payloads.Result("float32", 2**61, 2**19)
    with pytest.raises(Malformed, match="tensor"):
        encoding.decode_payload(encoding.encode_payload(huge), encoding.reply_decoder)
    with pytest.raises(Malformed, match="truncated"):
        encoding.decode_payload(b"\xff\xff\x00\x00", encoding.reply_decoder)
    with pytest.raises(Oversized):
        encoding.decode_payload(b"\xff\xff\xff\x7f" + bytes(2 << 20), encoding.reply_decoder)


def test_a_body_too_large_to_travel_is_refused_before_it_is_built() -> None:
    step = payloads.Step("float32", 2**19, [payloads.Run(0, 0, [0] * 8)])
    with pytest.raises(Oversized):
        encoding.encode_payload(step, bytes(headers.MAX_BODY))


# --- padding -----------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32))
@settings(max_examples=1000, deadline=None)
def test_padme_hides_most_of_a_size_for_an_eighth_of_it(size: int) -> None:
    padded = encoding.padded_size(size)
    assert size <= padded <= max(size, size * 1.12 + 1)
    assert encoding.padded_size(padded) == padded
    if size > 2:
        exponent = size.bit_length() - 1
        assert padded % (1 << (exponent - exponent.bit_length())) == 0


@pytest.mark.parametrize(("width", "rows"), [(32, 1), (576, 1), (576, 8), (4096, 3)])
def test_decode_steps_have_one_size_wherever_they_are(width: int, rows: int) -> None:
    """The numbers in a step grow with the text; neither they nor a beam's reordering show in its size."""
    tensor = bytes(rows * width * 2)
    places = (1, 100, 127, 128, 255, 256, 4000, 65535, 65536, 130_000)
    sizes = {
        len(
            encoding.encode_payload(
                payloads.Step("bfloat16", width, [payloads.Run(row, at, [at]) for row in range(rows)], select, at),
                tensor,
                overhead=32,
            )
        )
        for at in places
        for select in (None, list(range(rows)))
    }
    answers = {
        len(encoding.encode_payload(payloads.Result("bfloat16", rows, width, time, 7 * time), tensor, overhead=32))
        for time in (1, 1000, 10**6, 10**8)
    }
    assert len(sizes) == len(answers) == 1
