"""Codecs of a language model's hidden states: how they travel between a device and a worker.

A codec is a module here, behind the small interface `Codec`. Which one a step uses is said in its payload
(`split_common.protocol.payloads.CodedStep`); what a peer may not support is a capability of its channel.

Whatever a codec makes of a token depends on that token's hidden state alone, bit for bit: not on the tokens beside
it in a message, nor on the CPU or GPU. A device that replays a session on another worker encodes the states that it
kept once more, in messages of other sizes, and the worker still gets the same numbers as the first one. The codecs
therefore use elementwise operations only, whose results IEEE 754 defines, and no matrix products.
"""

from __future__ import annotations

from split_common.models.codecs.base import Codec
from split_common.models.codecs.exact import Exact
from split_common.models.codecs.int4 import Int4
from split_common.models.codecs.int8 import Int8
from split_common.models.codecs.lossless import Lossless

#: The codec that changes nothing, and that every peer has.
EXACT = Exact.name

#: All codecs by name. The names other than "exact" are those of `capabilities.StatesCodec`.
CODECS: dict[str, Codec] = {codec.name: codec for codec in (Exact(), Lossless(), Int8(), Int4())}
